"""Step 4: the CLIPScore of every synthetic image, and which images are kept.

The text score is the cosine of the image's and its class prompt's CLIP embeddings, the image score that of the image's
and its source's. An image is kept where the text score reaches --threshold (DisCL).

Reads:  a spectrum folder, prompts.json, the sources
Writes: SPECTRUM/scores.csv (file_name, text_score, image_score, kept, reason), SPECTRUM/scores.json (what made it)

Images scored before by the same CLIP are not scored again, so another threshold takes no time.

    python filter_clipscore.py --spectrum runs/spectrum --prompts runs/prompts.json
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import cli
import datasets
import runs
import spectrum


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "filter_clipscore")
    parser.add_dataset()
    parser.add_argument(
        "--data-root",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="folder that the sources are relative to, where they are files",
    )
    parser.add_argument(
        "--spectrum",
        type=cli.existing_folder,
        default=Path("runs/spectrum"),
        metavar="FOLDER",
        help="folder of generate_spectrum.py",
    )
    parser.add_argument(
        "--prompts",
        type=cli.existing_file,
        default=Path("runs/prompts.json"),
        metavar="FILE",
        help="file of write_prompts.py",
    )
    parser.add_argument("--clip", metavar="NAME", help="open_clip model: ARCHITECTURE:TAG or local folder")
    parser.add_argument("--threshold", type=cli.number(-1, 1), metavar="COSINE", help="keep text scores from here up")
    parser.add_argument("--batch-size", type=cli.whole(1), default=256, metavar="N", help="images embedded at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def embed(model, preprocess, images: list, device: str):
    """Unit-length CLIP embeddings of PIL images: float (N, D), on the CPU."""
    import torch

    with torch.inference_mode():
        pixels = torch.stack([preprocess(image) for image in images]).to(device)
        return model.encode_image(pixels, normalize=True).float().cpu()


def score(rows: list[dict], prompts: dict[int, dict], args, scores: dict[str, dict], save) -> None:
    """Score `rows` into `scores`, calling `save` every half minute. Each text and each source is embedded once."""
    import torch

    from models import load_clip, pick_device

    device = pick_device(args.device)
    model, preprocess, tokenizer = load_clip(args.clip, device)
    labels = sorted({row["label"] for row in rows})
    with torch.inference_mode():
        tokens = tokenizer([prompts[label]["score_prompt"] for label in labels]).to(device)
        texts = dict(zip(labels, model.encode_text(tokens, normalize=True).float().cpu(), strict=True))
    train = datasets.load(args.dataset, args.imb_ratio).train
    names = list(dict.fromkeys(row["source"] for row in rows))
    sources: dict[str, torch.Tensor] = {}
    read = datasets.read_sources(names, train, args.data_root)
    for start in range(0, len(names), args.batch_size):
        some = names[start : start + args.batch_size]
        images = [image for image, _ in (next(read) for _ in some)]
        sources |= zip(some, embed(model, preprocess, images, device), strict=True)

    saved = time.monotonic()
    with cli.progress(len(rows), "scoring", "image") as bar:
        for start in range(0, len(rows), args.batch_size):
            batch = []
            for row in rows[start : start + args.batch_size]:
                bar.update()
                try:
                    batch.append((row, datasets.read_image(args.spectrum / row["file_name"])))
                except cli.UserError:  # its row says so, and the step ends in an error, after all others are scored
                    scores[row["file_name"]] = {"text_score": math.nan, "image_score": math.nan}
            if batch:
                embedded = embed(model, preprocess, [image for _, image in batch], device)
                for (row, _), vector in zip(batch, embedded, strict=True):
                    scores[row["file_name"]] = {
                        "text_score": round(float(vector @ texts[row["label"]]), 6),
                        "image_score": round(float(vector @ sources[row["source"]]), 6),
                    }
            if time.monotonic() - saved > 30:
                save()
                saved = time.monotonic()


def decide(text_score: float, threshold: float) -> tuple[bool, str]:
    """Whether an image is kept, and if not, why."""
    if math.isnan(text_score):
        return False, "unreadable"
    return (True, "") if text_score >= threshold else (False, "low text score")


def acceptance_table(rows: list[dict], scores: dict[str, dict]) -> str:
    """Kept of made images, by class and level, as text."""
    made, kept = Counter(), Counter()
    names = {row["label"]: row["class_name"] for row in rows}
    levels = sorted({row["level"] for row in rows})
    for row in rows:
        for key in ((row["label"], row["level"]), ("all", row["level"])):
            made[key] += 1
            kept[key] += scores[row["file_name"]]["kept"]
    width = max(len("class"), *(len(name) for name in names.values()))
    lines = ["  ".join(["class".ljust(width), *(f"level {level:>3}" for level in levels)])]
    for label in [*sorted(names), "all"]:
        shares = (f"{kept[label, level]}/{made[label, level]}".rjust(9) for level in levels)
        lines.append("  ".join([names.get(label, "all").ljust(width), *shares]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    plan = spectrum.read_plan(args.spectrum)
    for name in ("dataset", "imb_ratio"):
        if plan[name] != getattr(args, name):
            raise cli.UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {args.spectrum} was made with {plan[name]}"
            )
    rows = spectrum.read_rows(args.spectrum)
    if not rows:
        raise cli.UserError(f"{args.spectrum}: holds no image; run generate_spectrum.py")
    prompts = spectrum.read_prompts(args.prompts, [row["label"] for row in rows])
    clip = Path(args.clip)
    made_by = {
        "clip": clip.name if clip.is_dir() else args.clip,
        "clip_digest": runs.digest_files(sorted(clip.glob("*"))) if clip.is_dir() else "",
        "score_prompts": {str(label): prompts[label]["score_prompt"] for label in sorted(prompts)},
    }

    path, note = args.spectrum / "scores.csv", args.spectrum / "scores.json"
    scores = spectrum.read_scores(path) if path.exists() else {}
    if not note.exists() or {name: runs.read_json(note).get(name) for name in made_by} != made_by:
        scores = {}
    scores = {name: score for name, score in scores.items() if not math.isnan(score["text_score"])}

    def save() -> None:
        for entry in scores.values():
            entry["kept"], entry["reason"] = decide(entry["text_score"], args.threshold)
        spectrum.write_scores(
            path,
            (
                {
                    "file_name": row["file_name"],
                    "text_score": f"{entry['text_score']:.6f}",
                    "image_score": f"{entry['image_score']:.6f}",
                    "kept": int(entry["kept"]),
                    "reason": entry["reason"],
                }
                for row in rows
                if (entry := scores.get(row["file_name"]))
            ),
        )
        runs.write_json(note, made_by | {"threshold": args.threshold})

    new = [row for row in rows if row["file_name"] not in scores]
    if new:
        score(new, prompts, args, scores, save)
    save()
    kept = sum(scores[row["file_name"]]["kept"] for row in rows)
    print(acceptance_table(rows, scores))
    print(
        f"{path}: {kept} of {len(rows)} images kept ({kept / len(rows):.1%}) at CLIPScore {args.threshold:g} and up, "
        f"{len(new)} newly scored"
    )
    unreadable = [row["file_name"] for row in rows if scores[row["file_name"]]["reason"] == "unreadable"]
    if unreadable:
        print(
            f"{args.spectrum}: {len(unreadable)} images cannot be read, the first {unreadable[0]}; "
            "run generate_spectrum.py again"
        )
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
