"""Drawing with editors: models that take an image and an instruction and have no strength.

InstructPix2Pix (SD and SDXL) starts from noise and is led by two guidance scales, of the text and of the image; its
UNet runs on three copies of a batch (text and image, image alone, neither). Others, such as Flux Kontext and
Qwen-Image-Edit, take the text alone and are called with one image at a time.

A level is then a nominal place between the text and the source, which curricula and tables go by: each has its image
guidance, and all run every denoising step.
"""

from __future__ import annotations

import inspect

import torch
from PIL import Image

from generation.generator import EMBEDDINGS, Generator, Interrupted
from generation.guidance import PIX2PIX
from generation.worklist import Batch
from runtime.cli import UserError


class Editor(Generator):
    """An editor's pipeline, and what it has encoded.

    Args:
        pipe: of `models.load_generator`.
        steps: denoising steps, whatever the level.
        text_guidance: classifier-free guidance scale of the text.
        image_guidance: that of the image by level, for InstructPix2Pix.
        cache_mb: memory in MiB for encoded sources and texts.
        adapters: a loras.Adapters, where batches name adapters.
    """

    def __init__(
        self,
        pipe,
        steps: int,
        text_guidance: float,
        image_guidance: dict[int, float],
        cache_mb: int = 4096,
        adapters=None,
    ):
        super().__init__(pipe, steps, text_guidance, False, cache_mb, adapters)
        self.image_guidance = image_guidance
        self.pix2pix = type(pipe).__name__ in PIX2PIX
        if text_guidance > 1 and getattr(pipe, "config", {}).get("is_distilled"):  # FLUX.2 [klein] would only warn
            raise UserError(
                f"--text-guidance {text_guidance:g}: {type(pipe).__name__} was distilled and takes none; expected 1"
            )
        if self.pix2pix:
            if pipe.vae.config.latent_channels != 4:
                raise UserError(f"--generator: {type(pipe).__name__} with latents of four channels is expected")
            self.xl = "XL" in type(pipe).__name__
            self.embeddings = EMBEDDINGS if self.xl else EMBEDDINGS[:2]
            self.prepare_vae()

    def start_timestep(self, level: int, size: tuple[int, int]) -> int:
        """-1: an editor starts from noise, at a timestep that only the pipeline knows."""
        return -1

    @torch.inference_mode()
    def draw(
        self, batch: Batch, redraw: int, texts: list[str], images: dict[str, Image.Image], pad_to: int = 0
    ) -> torch.Tensor:
        """See Generator.draw."""
        surplus = max(0, pad_to - len(batch.units))
        units, texts = batch.units + batch.units[-1:] * surplus, texts + texts[-1:] * surplus
        batch = batch._replace(units=units)
        if batch.adapter:
            raise UserError("--lora-by-class: not with an editor; expected --lora, or a generator with a strength")
        generators = [torch.Generator().manual_seed(unit.noise_seed(redraw)) for unit in units]
        drawn = (self._edit_batch if self.pix2pix else self._edit_each)(batch, texts, images, generators)
        self.cache.shrink()
        return drawn[: len(units) - surplus].float()

    def _edit_batch(self, batch: Batch, texts: list[str], images: dict, generators: list) -> torch.Tensor:
        """InstructPix2Pix: a batch at once, sources and texts from the cache."""
        self._encode_sources(batch, images)
        self._encode_instructions(texts)
        # The source enters as the mode of its latent, not scaled; a channel count of four tells it from an image.
        sources = torch.stack([self.cache.get(key)[0] for key in self._source_keys(batch)])
        call = self._embeddings(texts, None)
        if self.xl:
            call |= {"width": batch.size[0], "height": batch.size[1]}
            self.pipe.vae.to(self.dtype)  # its pipeline brings the sources to the type of its autoencoder
        try:
            latents = self.call_pipeline(
                image=sources.to(self.device, self.dtype),
                num_inference_steps=self.steps,
                guidance_scale=self.text_guidance,
                image_guidance_scale=self.image_guidance[batch.level],
                generator=generators,
                output_type="latent",
                **call,
                **self._stop_between_steps(),
            ).images
        finally:
            if self.xl:
                self.prepare_vae()
        return self._decode(latents)

    def _stop_between_steps(self) -> dict:
        """What a pipeline's call takes to raise Interrupted after the step in which a signal came."""

        def look(*_) -> dict:
            if self.stop is not None and self.stop.received:
                raise Interrupted
            return {}

        if "callback_on_step_end" in self.accepted:
            return {"callback_on_step_end": look}
        return {"callback": look, "callback_steps": 1} if "callback" in self.accepted else {}

    def _encode_instructions(self, texts: list[str]) -> None:
        """Keep the embeddings of each text, and of the empty text, once."""
        if hasattr(self.pipe, "encode_prompt"):
            self._encode_texts(texts, None)
            return
        for text in [key[2] for key in self.cache.missing([("text", None, text) for text in texts])]:
            self.cache.put(("text", None, text), (self._encode_one(text),))
        if self.cache.missing([("negative", None)]):
            self.cache.put(("negative", None), (self._encode_one(""),))

    def _encode_one(self, text: str) -> torch.Tensor:
        encoded = self.pipe._encode_prompt(text, self.device, 1, False)
        return encoded[0].cpu().clone()

    def _edit_each(self, batch: Batch, texts: list[str], images: dict, generators: list) -> torch.Tensor:
        """Other editors, one image a call: several of them cannot take a batch."""
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        for key in self.cache.missing(self._source_keys(batch)):
            self.cache.put(key, (torch.frombuffer(bytearray(images[key[1]].tobytes()), dtype=torch.uint8),))
        drawn = []
        for key, text, generator in zip(self._source_keys(batch), texts, generators, strict=True):
            picture = Image.frombytes("RGB", batch.size, self.cache.get(key)[0].numpy().tobytes())
            # Kontext would choose a size of its own, of about a megapixel.
            call = {"width": batch.size[0], "height": batch.size[1], "_auto_resize": False}
            call["max_area"] = batch.size[0] * batch.size[1]
            call |= self.guidance(1)
            image = self.call_pipeline(
                prompt=text,
                image=picture,
                num_inference_steps=self.steps,
                generator=generator,
                output_type="pt",
                **{name: value for name, value in call.items() if name in accepted},
                **self._stop_between_steps(),
            ).images
            if image.shape[-2:] != (batch.size[1], batch.size[0]):  # Qwen and Kontext choose sizes of their own
                image = torch.nn.functional.interpolate(
                    image.float(), size=(batch.size[1], batch.size[0]), mode="bilinear", antialias=True
                )
            drawn.append(image)
        return torch.cat(drawn)
