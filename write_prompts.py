"""Step 2: text prompts for each class that has hard images.

Reads:  hard.csv
Writes: prompts.json: for each class index its name, the prompt that CLIPScore is taken against, and the prompts that
        the generator draws from. Classes that the file already holds are left as they are.

    python write_prompts.py --dataset digits --hard runs/hard.csv --out runs/prompts.json
"""

from __future__ import annotations

from pathlib import Path

import cli
import runs
import spectrum
from datasets import TEMPLATES


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "write_prompts")
    parser.add_argument("--dataset", default="digits", choices=sorted(TEMPLATES), help="whose templates to take")
    parser.add_argument(
        "--hard", type=cli.existing_file, default=Path("runs/hard.csv"), metavar="FILE", help="table of find_hard.py"
    )
    parser.add_argument(
        "--source",
        choices=["template"],
        default="template",
        help="template: the data set's own phrasings, with the class name in them",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/prompts.json"), metavar="FILE", help="the file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    names = {row.label: row.class_name for row in spectrum.read_hard(args.hard)}
    prompts = spectrum.read_prompts(args.out, []) if args.out.exists() else {}
    for label in names.keys() & prompts.keys():
        if prompts[label]["class_name"] != names[label]:
            raise cli.UserError(
                f"{args.out} class {label} is {prompts[label]['class_name']!r} there, {names[label]!r} in {args.hard}; "
                "expected prompts of the same data set, or another --out"
            )
    new = sorted(label for label in names if not prompts.get(label, {}).get("prompts"))
    for label in new:
        texts = [template.format(names[label]) for template in TEMPLATES[args.dataset]]
        prompts[label] = {"class_name": names[label], "score_prompt": texts[0], "prompts": texts}
    runs.write_json(args.out, {str(label): prompts[label] for label in sorted(prompts)})
    print(f"{args.out}: prompts for {len(prompts)} classes, {len(new)} of them new, from {args.source}")
    return 0


if __name__ == "__main__":
    cli.run(main)
