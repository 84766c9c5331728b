"""What ALIA's rules did right and wrong on biased_digits, by a judge that took no part in it.

The judge is a classifier trained on the benchmark's test images, which show every digit on every paper: nothing else is
trained on them, and the judge is no part of the pipeline. The paper of an edit is the one whose colour is nearest to
that of its border.

Reads:  the folder of `demo.py --dataset biased_digits`: edits/ with edits.csv, and prompts.json
Writes: nothing; prints how many edits show the digit and the paper that they should, and for each rule how many of the
        edits that it drops are wrong, and how many of the wrong ones it drops

    python bench/judge_edits.py --demo runs/demo_biased
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets
from loaders import digits
from loaders.pictures import read_image
from runtime import cli, files
from spectrum import folder as spectrum_folder
from spectrum.edits import EDITS, read_edits

PAPERS = np.array(list(digits.PAPERS.values())) - 5  # as the loader draws them, on average


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "judge_edits")
    parser.add_argument("--demo", type=cli.existing_folder, required=True, metavar="FOLDER", help="folder of the demo")
    parser.add_argument("--epochs", type=cli.whole(1), default=15, metavar="N", help="epochs of the judge")
    return parser


def train_judge(epochs: int):
    """A ResNet-8 trained on four fifths of the test images, and its accuracy in percent on the scans of the rest."""
    import torch
    from torch.nn import functional as F

    import models

    torch.manual_seed(0)
    data = datasets.load("biased_digits", None)
    pixels, labels = as_tensor(data.test.images), torch.from_numpy(data.test.labels)
    scans = np.array([int(source.split(":")[1]) for source in data.test.sources])
    held = torch.from_numpy(np.isin(scans, np.unique(scans)[::5]))
    model = models.build_classifier("resnet8", 10, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    train = held.logical_not().nonzero()[:, 0]
    for _ in range(epochs):
        model.train()
        for batch in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        right = (model(pixels[held]).argmax(1) == labels[held]).float().mean()
    return model, 100 * float(right)


def as_tensor(images: np.ndarray):
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def paper_of(images: np.ndarray) -> np.ndarray:
    """The paper whose colour is nearest to the border's median, int (N,), of uint8 (N, H, W, 3)."""
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    return ((np.median(border, 1)[:, None] - PAPERS) ** 2).sum(-1).argmin(1)


def main(argv: list[str] | None = None) -> int:
    import torch

    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    folder = args.demo / "edits"
    rows, verdicts = spectrum_folder.read_rows(folder), read_edits(folder / EDITS)
    images = np.stack([np.asarray(read_image(folder / row["file_name"])) for row in rows])
    judge, accuracy = train_judge(args.epochs)
    with torch.inference_mode():
        digit = judge(as_tensor(images)).argmax(1).numpy() == [row["label"] for row in rows]
    papers = list(digits.PAPERS)
    paper = paper_of(images) == [papers.index(row["domain"].split()[1]) for row in rows]
    print(f"judge: {accuracy:.1f} % of the test scans that it was not trained on")
    print(f"{len(rows)} edits: {digit.mean():.1%} show the digit, {paper.mean():.1%} the paper that was asked for")
    wrong = ~(digit & paper)
    for rule in files.read_json(folder / "edits.json")["rules"]:
        dropped = np.array([rule in verdicts[row["file_name"]]["dropped_by"].split() for row in rows])
        right = f"{(dropped & wrong).sum()} of its {dropped.sum()} are wrong"
        print(f"{rule:<10} drops {dropped.mean():6.1%} of the edits: {right}; of {wrong.sum()} wrong ones it drops "
              f"{(dropped & wrong).sum()}")  # fmt: skip
        if rule == "confidence":
            for reason in sorted({verdicts[row["file_name"]]["reason"] for row in rows} - {""}):
                of = np.array([verdicts[row["file_name"]]["reason"] == reason for row in rows])
                print(f"  {reason:<16} {of.sum():4} edits, {digit[of].mean():.1%} of them show the digit, "
                      f"{paper[of].mean():.1%} the paper")  # fmt: skip
    return 0


if __name__ == "__main__":
    cli.run(main)
