"""The flags of the scripts that show images to a CLIP or a classifier: which model, and on what it runs."""

from __future__ import annotations

from runtime import cli


def add_clip_flag(group) -> None:
    """Which CLIP."""
    group.add_argument(
        "--clip", metavar="NAME", help="open_clip model: ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder"
    )


def add_device_flags(group) -> None:
    """On what a model runs, on how many images at once, and who decodes them."""
    group.add_argument(
        "--batch-size", type=cli.whole(1), default=256, metavar="N", help="images that the model is given at once"
    )
    group.add_argument(
        "--workers",
        type=cli.whole(0),
        metavar="N",
        help="processes that decode images (default: a core each beside a GPU, 16 at most; none on a CPU)",
    )
    cli.add_device_flag(group)
