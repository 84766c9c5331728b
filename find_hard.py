"""Step 1: which training images are hard.

In a long-tailed data set these are all images of the few-shot classes: those with fewer than --few-max training images
(DisCL).

Reads:  the training set
Writes: hard.csv (source, label, class_name, reason, score): one row a hard image; the score is the class's image count

    python find_hard.py --dataset digits --out runs/hard.csv
"""

from __future__ import annotations

from pathlib import Path

import cli
import datasets
import spectrum


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "find_hard")
    parser.add_dataset()
    parser.add_argument("--rule", choices=["few"], default="few", help="few: all images of the few-shot classes")
    parser.add_argument(
        "--few-max",
        type=cli.whole(1),
        default=20,
        metavar="IMAGES",
        help="a class is few-shot with fewer training images than this",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/hard.csv"), metavar="FILE", help="the table to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    data = datasets.load(args.dataset, args.imb_ratio)
    counts = data.counts
    hard = [
        {
            "source": source,
            "label": label,
            "class_name": data.class_names[label],
            "reason": args.rule,
            "score": counts[label],
        }
        for source, label in zip(data.train.sources, data.train.labels.tolist(), strict=True)
        if counts[label] < args.few_max
    ]
    if not hard:
        raise cli.UserError(
            f"--few-max {args.few_max}: no class of {data.name} has fewer images; the smallest has {counts.min()}"
        )
    spectrum.write_hard(args.out, hard)
    classes = {row["label"] for row in hard}
    print(f"{args.out}: {len(hard)} hard images of {len(data.train)}, in {len(classes)} classes of {len(counts)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
