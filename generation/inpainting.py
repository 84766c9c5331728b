"""Drawing under masks: a pipeline for inpainting draws what the masks do not keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from generation.generator import Generator
from generation.masks import read_mask
from generation.worklist import Batch


class Inpainter(Generator):
    """A pipeline for inpainting: it draws anew what the masks do not keep, and sees what they keep.

    The strength of a level is that of the region drawn anew; at level 0 it starts from noise.
    """

    def __init__(
        self, pipe, steps: int, text_guidance: float, masks: dict[str, Path], cache_mb: int = 4096, adapters=None
    ):
        super().__init__(pipe, steps, text_guidance, False, cache_mb, adapters)
        self.masks = masks

    def more_inputs(self, batch: Batch) -> dict:
        """The masks of a batch, white where the pipeline draws."""
        blank = Image.new("L", batch.size, 255)
        return {"mask_image": [self.drawn_region(unit.source, batch.size, blank) for unit in batch.units]}

    def drawn_region(self, source: str, size: tuple[int, int], blank: Image.Image) -> Image.Image:
        """What is drawn anew of a source, white; all of it where it has no mask."""
        if source not in self.masks:
            return blank
        return Image.fromarray(np.where(read_mask(self.masks[source], size), 0, 255).astype(np.uint8))
