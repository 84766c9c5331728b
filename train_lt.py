"""Step 5a: train a classifier on a long-tailed data set with a generative curriculum.

Each epoch of the curriculum trains on real images and on synthetic images of the levels that the curriculum names; the
epochs after it train on real images alone (DisCL; curricula.py and datasets.stage_mix have the rules).

Reads:  the data set, a filtered spectrum folder (none is needed for --curriculum none; if the default one is not there,
        it is made first)
Writes: OUT/args.json, checkpoint.pt, TensorBoard events, history.jsonl, predictions.npz, results.json

Killed at any moment, the same command goes on after the last finished epoch, to the same result. The best epoch is
chosen on the validation set; the test set is looked at once, at the end.

    python train_lt.py --loss bs --curriculum d2s
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np

import cli
import curricula
import datasets
import losses
import road
import runs
import spectrum

DEFAULT_SPECTRUM = Path("runs/spectrum")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "train_lt")
    parser.add_dataset()
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="run folder (default: runs/DATASET_LOSS_CURRICULUM_seedN)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of weights, order and draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    group = parser.add_argument_group("curriculum")
    group.add_argument(
        "--curriculum",
        choices=curricula.CURRICULA,
        default="none",
        help="which guidance levels each epoch trains on; d2s goes from diverse to specific, s2d back",
    )
    group.add_argument(
        "--spectrum",
        type=Path,
        default=DEFAULT_SPECTRUM,
        metavar="FOLDER",
        help="filtered folder of generate_spectrum.py",
    )
    group.add_argument(
        "--levels",
        type=cli.level,
        nargs="+",
        metavar="PERCENT",
        help="guidance levels to use (default: all of the spectrum)",
    )
    group.add_argument("--fixed-level", type=cli.level, default=50, metavar="PERCENT", help="the level of fixed")
    group.add_argument(
        "--curriculum-epochs",
        type=cli.whole(0),
        metavar="N",
        help="epochs with synthetic images; those after them are real only",
    )
    group.add_argument(
        "--hard-share",
        type=cli.number(0, 0.99),
        metavar="SHARE",
        help="share of hard classes, real and synthetic, in a curriculum epoch (default: hard classes / all classes)",
    )
    group.add_argument(
        "--undersample",
        type=cli.number(0, 1),
        metavar="SHARE",
        help="share of the other real images that a curriculum epoch sees, drawn anew each epoch",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--model", metavar="NAME", help="classifier: resnet8, resnet20, resnet32, ...")
    group.add_argument("--loss", choices=losses.LOSSES, default="ce", help="ce: cross-entropy; bs: Balanced Softmax")
    group.add_argument(
        "--prior",
        choices=["real", "stage"],
        default="real",
        help="class counts in Balanced Softmax: of the real training set, or of the epoch's own images",
    )
    group.add_argument("--epochs", type=cli.whole(1), metavar="N", help="epochs, curriculum included")
    group.add_argument("--batch-size", type=cli.whole(1), metavar="N", help="images in a step")
    group.add_argument("--lr", type=cli.number(0), metavar="RATE", help="AdamW's first learning rate; cosine to 0")
    group.add_argument("--weight-decay", type=cli.number(0), metavar="RATE", help="AdamW's weight decay")
    return parser


def augment(images, generator):
    """Training images uint8 (N, 3, H, W), shifted by up to 1/8 of their side, edges repeated: float in [-1, 1]."""
    import torch
    from torch.nn import functional as F

    count, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    padded = F.pad(images.float() / 127.5 - 1, (pad, pad, pad, pad), mode="replicate")
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator).to(images.device)
    y = top[:, None, None] + torch.arange(height, device=images.device)[:, None]
    x = left[:, None, None] + torch.arange(width, device=images.device)
    return padded[torch.arange(count, device=images.device)[:, None, None], :, y, x].permute(0, 3, 1, 2)


def to_tensors(image_set: datasets.ImageSet, device: str):
    """Images uint8 (N, 3, H, W) and labels int64 (N,), on the device."""
    import torch

    images = torch.from_numpy(np.ascontiguousarray(image_set.images.transpose(0, 3, 1, 2))).to(device)
    return images, torch.from_numpy(image_set.labels).to(device)


def predict(model, images, batch_size: int = 512):
    """Logits, float (N, C), on the CPU; the model is left as it was, in evaluation mode."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part.float() / 127.5 - 1).float().cpu() for part in images.split(batch_size)])


def accuracies(logits, labels: np.ndarray, groups: dict[str, np.ndarray]) -> dict:
    """Accuracy in percent: overall, of each group of classes, and per class; None where there is no such image."""
    classes = logits.shape[1]
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[logits.argmax(1).numpy() == labels], minlength=classes)

    def share(chosen: np.ndarray) -> float | None:
        total = int(count[chosen].sum())
        return 100 * int(right[chosen].sum()) / total if total else None

    return {
        "overall": share(np.arange(classes)),
        **{name: share(chosen) for name, chosen in groups.items()},
        "per_class": [share(np.array([label])) for label in range(classes)],
    }


def learning_rate(base: float, progress: float) -> float:
    """Cosine from `base` at progress 0 to 0 at progress 1."""
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def epoch_data(args, epoch: int, levels: list[int], labels: np.ndarray, is_hard: np.ndarray, synthetic: dict) -> dict:
    """What an epoch trains on: indices of real images, and (level, index) of synthetic ones, before shuffling."""
    if not levels:
        return {"real": np.arange(len(labels)), "synthetic": []}
    pool = [(level, index) for level in levels for index in range(len(synthetic[level][1]))]
    share = args.hard_share if args.hard_share is not None else is_hard.mean()
    rng = np.random.default_rng([args.seed, epoch])
    real, drawn = datasets.stage_mix(labels, is_hard, len(pool), share, args.undersample, rng)
    return {"real": real, "synthetic": [pool[index] for index in drawn]}


def train_epoch(args, epoch: int, model, optimizer, chosen: dict, real: tuple, synthetic: dict, classes: int) -> dict:
    """One pass over the epoch's images; every draw depends on the seed and the epoch alone."""
    import torch

    images = [real[0][chosen["real"]]]
    labels = [real[1][chosen["real"]]]
    for level in sorted({level for level, _ in chosen["synthetic"]}):
        index = [i for of, i in chosen["synthetic"] if of == level]
        images.append(synthetic[level][0][index])
        labels.append(synthetic[level][1][index])
    images, labels = torch.cat(images), torch.cat(labels)
    counts = torch.bincount(real[1] if args.prior == "real" else labels, minlength=classes)

    torch.manual_seed(runs.digest_int("epoch", args.seed, epoch))
    generator = torch.Generator().manual_seed(runs.digest_int("augment", args.seed, epoch))
    batches = torch.randperm(len(labels), generator=generator).split(args.batch_size)
    model.train()
    total, began = 0.0, time.monotonic()
    for number, batch in enumerate(batches):
        rate = learning_rate(args.lr, (epoch + number / len(batches)) / args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(labels.device)
        loss = losses.loss_by_name(args.loss, model(augment(images[batch], generator)), labels[batch], counts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    if not math.isfinite(total):
        raise cli.UserError(
            f"epoch {epoch}: the loss is not finite; the checkpoint of the epoch before is kept. Expected a lower --lr"
        )
    return {
        "loss": total / len(labels),
        "lr": rate,
        "images": len(labels),
        "synthetic_share": len(chosen["synthetic"]) / len(labels),
        "images_per_second": len(labels) / (time.monotonic() - began),
    }


def prepare_spectrum(args) -> tuple[list[int], list[int]]:
    """The levels that the curriculum may ask for, and the hard classes; makes the default spectrum if it is missing."""
    if args.spectrum == DEFAULT_SPECTRUM and not (args.spectrum / "scores.csv").exists():
        print(f"{args.spectrum}: no finished spectrum there; making it first", flush=True)
        road.make_spectrum(args.spectrum.parent, args.dataset, args.imb_ratio)
    plan = spectrum.read_plan(args.spectrum)
    levels = curricula.needed_levels(args.curriculum, args.levels or plan["levels"], args.fixed_level)
    return levels, plan["hard_classes"]


def finished(args) -> bool:
    """Whether the run that these arguments name is complete."""
    return (run_folder(args) / "results.json").is_file()


def run_folder(args) -> Path:
    """Where a run goes: --out, or a name that its main settings make."""
    return args.out or Path(f"runs/{args.dataset}_{args.loss}_{args.curriculum}_seed{args.seed}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.out = run_folder(args)
    data = datasets.load(args.dataset, args.imb_ratio)
    levels, hard_classes, inputs, synthetic = [], [], {}, {}
    if args.curriculum != "none":
        levels, hard_classes = prepare_spectrum(args)
        curricula.epoch_levels(args.curriculum, 0, args.curriculum_epochs, levels, args.fixed_level, args.seed)
        synthetic = datasets.load_spectrum(args.spectrum, levels, data)
        inputs = {"spectrum": runs.digest_files([args.spectrum / "plan.json", args.spectrum / "scores.csv"])}
    if runs.open_run(args.out, args, inputs, args.overwrite):
        print(f"{args.out}: already complete")
        return 0

    import torch
    from torch.utils.tensorboard import SummaryWriter

    from models import build_classifier, pick_device

    device = pick_device(args.device)
    torch.manual_seed(runs.digest_int("weights", args.seed))
    model = build_classifier(args.model, len(data.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    real, val = to_tensors(data.train, device), to_tensors(data.val, device)
    synthetic = {level: to_tensors(image_set, device) for level, image_set in synthetic.items()}

    state = {"epoch": 0, "history": [], "seconds": 0.0, "best": {"epoch": -1, "val_overall": -1.0, "model": {}}}
    is_hard = np.isin(np.arange(len(data.class_names)), hard_classes)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = runs.load_checkpoint(checkpoint, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{args.out}: going on after epoch {state['epoch']} of {args.epochs}", flush=True)

    writer = SummaryWriter(str(args.out), purge_step=state["epoch"])
    with cli.progress(args.epochs, args.out.name, "epoch") as bar:
        bar.update(state["epoch"])
        for epoch in range(state["epoch"], args.epochs):
            began = time.monotonic()
            stage = curricula.epoch_levels(
                args.curriculum, epoch, args.curriculum_epochs, levels, args.fixed_level, args.seed
            )
            record = train_epoch(
                args,
                epoch,
                model,
                optimizer,
                epoch_data(args, epoch, stage, data.train.labels, is_hard, synthetic),
                real,
                synthetic,
                len(data.class_names),
            )
            found = accuracies(predict(model, val[0]), data.val.labels, data.groups)
            if found["overall"] > state["best"]["val_overall"]:
                state["best"] = {
                    "epoch": epoch,
                    "val_overall": found["overall"],
                    "model": {name: value.clone() for name, value in model.state_dict().items()},
                }
            state["history"].append(
                {
                    "epoch": epoch,
                    "levels": stage or [100],
                    **record,
                    **{f"val_{name}": found[name] for name in ("overall", *data.groups)},
                }
            )
            state["seconds"] += time.monotonic() - began
            log(writer, epoch, state["history"][-1])
            state |= {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            runs.save_checkpoint(checkpoint, state)
            bar.update()
    finish(args, data, model, state, writer, device)
    return 0


def log(writer, epoch: int, record: dict) -> None:
    """The TensorBoard scalars of an epoch."""
    for name in ("loss", "lr", "images_per_second", "synthetic_share"):
        writer.add_scalar(f"train/{name}", record[name], epoch)
    writer.add_scalar("curriculum/level", np.mean(record["levels"]), epoch)
    for name, value in record.items():
        if name.startswith("val_") and value is not None:
            writer.add_scalar(f"val/{name[4:]}", value, epoch)
    writer.flush()  # before the checkpoint: a resumed run writes no epoch twice, and misses none


def finish(args, data: datasets.LongTailed, model, state: dict, writer, device: str) -> None:
    """Test the last and the best-by-validation weights, and write what the run leaves."""
    test = to_tensors(data.test, device)
    logits = predict(model, test[0])
    results = {"last": accuracies(logits, data.test.labels, data.groups) | {"epoch": args.epochs - 1}}
    np.savez(args.out / "predictions.npz", logits=logits.numpy(), labels=data.test.labels)
    model.load_state_dict(state["best"]["model"])
    results["best_by_val"] = accuracies(predict(model, test[0]), data.test.labels, data.groups) | {
        "epoch": state["best"]["epoch"],
        "val_overall": state["best"]["val_overall"],
    }
    images = sum(record["images"] for record in state["history"])
    results |= {
        "train_counts": data.counts.tolist(),
        "class_names": data.class_names,
        "images": images,
        "seconds": state["seconds"],
        "images_per_second": images / state["seconds"],
    }
    for name in ("overall", *data.groups):
        if results["last"][name] is not None:
            writer.add_scalar(f"test/{name}", results["last"][name], args.epochs - 1)
    writer.close()
    runs.write_text(args.out / "history.jsonl", "".join(json.dumps(record) + "\n" for record in state["history"]))
    runs.write_json(args.out / "results.json", results)
    shown = ", ".join(
        f"{name} {results['last'][name]:.1f}" for name in ("overall", *data.groups) if results["last"][name] is not None
    )
    print(f"{args.out}: test accuracy % after the last epoch: {shown}")


if __name__ == "__main__":
    cli.run(main)
