"""Work units of a spectrum, and the row that metadata.jsonl holds of each image."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from runtime.files import digest_int

ROW_FIELDS = {
    "file_name": str,
    "source": str,
    "source_sha256": str,
    "label": int,
    "class_name": str,
    "level": int,
    "seed": int,
    "redraws": int,
    "prompt": str,
    "text_guidance": float,
    "steps": int,
    "start_timestep": int,
    "width": int,
    "height": int,
    "generator": str,
    "revision": str,
    "scheduler": str,
}
SCORED_FIELDS = {"text_score": float, "image_score": float}  # what a spectrum drawn with --score has besides


def short_name(source: str) -> str:
    """Twelve hexadecimal digits in place of a source's name, which may be no safe file name."""
    return hashlib.blake2b(source.encode(), digest_size=6).hexdigest()


class Unit(NamedTuple):
    """A work unit: one image to draw. Its noise depends on these three and on nothing else."""

    source: str
    level: int
    seed: int

    def noise_seed(self, redraw: int = 0) -> int:
        """The seed of the unit's noise; each redraw has another."""
        return digest_int("noise", self.source, self.level, self.seed, redraw)

    @property
    def file_name(self) -> str:
        """A name that holds no part of the source's, which may be no safe file name."""
        return f"{short_name(self.source)}_level{self.level:03d}_seed{self.seed:02d}.png"
