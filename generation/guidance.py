"""Which image guidance an editor has at each level."""

from __future__ import annotations

from runtime.cli import UserError

PIX2PIX = {"StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"}


def copies_each_step(kind: str, text_guidance: float) -> int:
    """On how many copies of a batch a denoising step runs the model: with guidance 2, for InstructPix2Pix 3.

    Args:
        kind: class of the pipeline where it is an editor, else empty.
    """
    if text_guidance <= 1:
        return 1
    return 3 if kind in PIX2PIX else 2


def most_at_once(batch_size: int, kind: str, text_guidance: float) -> int:
    """Images drawn at once, so that three copies need no more memory than --batch-size images in two copies do."""
    copies = copies_each_step(kind, text_guidance)
    return max(1, 2 * batch_size // copies) if copies > 2 else batch_size


def image_guidance_by_level(kind: str, levels: list[int], scales: list[float] | None) -> dict[int, float]:
    """The image guidance of each level; empty where a generator has a strength or takes none.

    Args:
        kind: class of the pipeline.
        levels: as typed.
        scales: of --image-guidance, as typed.

    Raises:
        UserError: an editor without a scale for each level, or scales for a generator that takes none.
    """
    if kind and kind not in PIX2PIX and len(set(levels)) > 1:
        raise UserError(f"--levels {levels}: {kind} has no strength; expected one level, a nominal one")
    if kind in PIX2PIX:
        if not scales or len(scales) != len(levels):
            raise UserError(
                f"--image-guidance: {len(scales or [])} scales for {len(levels)} levels; {kind} has no strength, and "
                "expects one for each of --levels, such as 1.5"
            )
        if min(scales) < 1:
            raise UserError(f"--image-guidance {min(scales):g}: expected 1 or more, below which {kind} has no guidance")
        return dict(sorted(zip(levels, scales, strict=True)))
    if scales:
        raise UserError(
            f"--image-guidance: {kind or 'this generator'} takes none; expected an InstructPix2Pix generator"
        )
    return {}
