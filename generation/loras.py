"""LoRA adapters in generation: found, checked, and loaded one at a time, when their class comes.

torch is imported where an adapter is loaded, so that a command line is checked within a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runtime.cli import UserError, first_line
from runtime.files import read_object
from spectrum.tables import Hard
from spectrum.units import short_name

FILE = "pytorch_lora_weights.safetensors"
RESIDENT = "resident"  # the name of the one adapter that is loaded
DOWN = ("lora_A", "lora_down", "lora.down")  # how the formats call a layer's first matrix
TEXT = ("text_encoder", "lora_te")  # what the keys of a text encoder's layers begin with


def find_asked(args, hard: dict[str, Hard], generator: dict[str, str]) -> dict[str, Path]:
    """The adapter files that --lora, --lora-by-class or --tuned names, by adapter: `all`, or `class_3` and so on.

    Args:
        args: of the command line.
        hard: hard images by source.
        generator: `generator` and `revision` of the one that draws (models.describe_generator).

    Raises:
        UserError: two of the flags, or an adapter that is missing or was made for another generator.
    """
    given = [name for name in ("lora", "lora_by_class", "tuned") if getattr(args, name)]
    if len(given) > 1:
        raise UserError("--lora, --lora-by-class and --tuned: expected one of them")
    if not given:
        return {}
    names = {row.label: row.class_name for row in hard.values()}
    if args.tuned:
        return find_tuned(args.tuned, names, generator, list(hard))[0]
    by_class = sorted(names) if args.lora_by_class else None
    return find_loras(args.lora or args.lora_by_class, by_class, f"--{given[0].replace('_', '-')}")


def find_loras(path: Path, labels: list[int] | None, flag: str = "--lora") -> dict[str, Path]:
    """The LoRA files to load, by adapter name.

    Args:
        path: a file or folder of one adapter, or with `labels` a folder that holds one for each class index.
        labels: the classes that need an adapter of their own.

    Raises:
        UserError: one is missing.
    """

    def find(place: Path) -> Path | None:
        files = [place, place.with_name(f"{place.name}.safetensors"), place / FILE]
        return next((file for file in files if file.is_file() and file.suffix == ".safetensors"), None)

    if labels is None:
        found = find(path)
        if found is None:
            raise UserError(f"{flag} {path}: expected a .safetensors file, or a folder with pytorch_lora_weights in it")
        return {"all": found}
    by_class = {f"class_{label}": find(path / str(label)) for label in labels}
    missing = [name.removeprefix("class_") for name, file in by_class.items() if file is None]
    if missing:
        raise UserError(
            f"{flag} {path}: no adapter for class {', '.join(missing[:5])}; expected "
            f"{missing[0]}.safetensors or {missing[0]}/pytorch_lora_weights.safetensors there"
        )
    return by_class


def find_tuned(
    folder: Path, class_names: dict[int, str], generator: dict[str, str], sources: Iterable[str] = ()
) -> tuple[dict[str, Path], dict]:
    """The adapters of a folder of tune_generator.py, checked, and its plan.

    They are called `class_3` and so on, `source_HEX` for that of one image, or `all`.

    Args:
        class_names: of the classes to draw, by index.
        sources: real images to draw from.
        generator: `generator` and `revision` of the one that draws (models.describe_generator).

    Raises:
        UserError: tuned for another generator or other classes, an adapter missing, of another rank or without a half.
    """
    plan = read_object(folder / "plan.json", "class_names", "mode")
    for name in ("generator", "revision"):
        if plan.get(name) != generator[name]:
            raise UserError(
                f"--tuned {folder}: tuned for the generator {plan.get('generator')} ({plan.get('revision')}), not "
                f"{generator['generator']} ({generator['revision']}); expected the same --generator"
            )
    for label, name in sorted(class_names.items()):
        tuned = plan["class_names"].get(str(label))
        if tuned != name:
            raise UserError(
                f"--tuned {folder}: class {label} is {tuned!r} there, {name!r} here; expected the classes that it was "
                "tuned on"
            )
    if plan["mode"] == "source":
        files = {f"source_{short_name(source)}": folder / short_name(source) / FILE for source in sources}
        missing = [source for source, path in zip(sources, files.values(), strict=True) if not path.is_file()]
        if missing:
            raise UserError(f"--tuned {folder}: no adapter for source {missing[0]}; expected --hard {folder}/shots.csv")
    elif plan["mode"] == "cls":
        files = find_loras(folder, sorted(class_names), "--tuned")
    else:
        files = find_loras(folder / "all", None, "--tuned")
    for path in files.values():
        check_tuned_file(path, plan)
    return files, plan


def check_tuned_file(path: Path, plan: dict) -> None:
    """Raise UserError where an adapter is not of this plan: its generator, rank or halves. Reads the head alone."""
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes, keys = file.metadata() or {}, list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable adapter ({first_line(error)}); delete it and tune again") from None
    if notes.get("base_revision") != plan["revision"]:
        raise UserError(
            f"{path}: an adapter of {notes.get('base')}; expected one of {plan['generator']}, as plan.json says"
        )
    ranks = {value for name, value in json.loads(notes["lora_adapter_metadata"]).items() if name.endswith(".r")}
    if ranks != {plan["rank"]}:
        raise UserError(f"{path}: of rank {sorted(ranks)}; expected rank {plan['rank']}, as plan.json says")
    halves = {"unet": any(key.startswith("unet.") for key in keys), "text": any(key.startswith(TEXT) for key in keys)}
    for part in plan["parts"]:
        if not halves[part]:
            raise UserError(f"{path}: holds no layer of the {part} half; expected both that plan.json names")


def read_adapter(path: Path) -> tuple[dict, str | None]:
    """The weights of an adapter's file, and its settings as they stand in its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        settings = (file.metadata() or {}).get("lora_adapter_metadata")
        return {key: file.get_tensor(key) for key in file.keys()}, settings  # noqa: SIM118  (no dictionary)


def mix_adapters(parts: list[tuple[dict, str]]) -> dict:
    """The mean of several adapters of tune_generator.py, as one of the sum of their ranks, which counts as it stands.

    A of the mix are all A below each other, and B all B beside each other, each times its alpha / rank / number of
    adapters.
    """
    import json

    import torch

    mixed: dict = {}
    for weights, settings in parts:
        notes = json.loads(settings)
        for key, weight in weights.items():
            component = key.partition(".")[0]
            scale = notes[f"{component}.lora_alpha"] / notes[f"{component}.r"] / len(parts)
            mixed.setdefault(key, []).append(weight if "lora_A" in key else weight * scale)
    return {key: torch.cat(some, dim=0 if "lora_A" in key else 1) for key, some in mixed.items()}


class Adapters:
    """The adapters of a pipeline; one is loaded at a time.

    A further one is copied into the place of the one before, where its layers and shapes are the same: no memory grows
    with the number of classes, and a compiled UNet stays compiled. `switch` checks that each one changes the output.

    Args:
        pipe: without adapters.
        files: by name, as `find_loras` gives them.

    Raises:
        UserError: the pipeline has no UNet.
    """

    def __init__(self, pipe, files: dict[str, Path]):
        if not hasattr(pipe, "unet"):
            raise UserError(
                f"{next(iter(files.values()))}: {type(pipe).__name__} draws with a transformer; expected a generator "
                "with a UNet, Stable Diffusion or SDXL, to put a LoRA into"
            )
        self.pipe, self.files, self.slots, self.settings = pipe, files, {}, None
        self.plain = self._look()

    def switch(self, name: str) -> None:
        """Draw with the adapter called `name` from now on, or with two called `A+B`, mixed in equal parts.

        Raises:
            UserError: it does not fit the pipeline, or changes nothing.
        """
        import torch
        from safetensors import SafetensorError

        path, *others = (self.files[part] for part in name.split("+"))
        try:
            weights, settings = read_adapter(path)
            if others:
                weights, settings = mix_adapters([(weights, settings), *map(read_adapter, others)]), ""
            if not self._copy(weights, settings):
                self._load(None if others else path, weights, settings)
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, SafetensorError) as error:
            lines = str(error).splitlines()  # torch names the first layer of another size in the second
            why = lines[1].strip() if len(lines) > 1 and "Error(s) in loading" in lines[0] else first_line(error)
            raise UserError(f"{path}: not a LoRA of this generator: {why}") from error
        drawn, read = self._look()
        wants_text = any(key.startswith(TEXT) for key in weights)
        if torch.equal(drawn, self.plain[0]) or (wants_text and torch.equal(read, self.plain[1])):
            raise UserError(
                f"{path}: changes nothing that the generator draws; expected a trained LoRA of this very architecture"
            )

    def _copy(self, weights: dict, settings: str | None) -> bool:
        """Copy weights into the resident adapter, if its layers are these."""
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        if not self.slots or settings != self.settings or shapes != {k: tuple(s.shape) for k, s in self.slots.items()}:
            return False
        for key, slot in self.slots.items():
            slot.data.copy_(weights[key])
        return True

    def _load(self, path: Path | None, weights: dict, settings: str | None) -> None:
        """Load a file, or weights that stand in none, as the resident adapter."""
        import diffusers
        import transformers

        if self.settings is not None or self.slots:
            self.pipe.delete_adapters(RESIDENT)
        before, errors = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # a table of layers that are not in the file
        diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)  # a line for each layer of another size
        try:
            if path is None:
                self.pipe.load_lora_weights(dict(weights), adapter_name=RESIDENT)
            else:
                self.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=RESIDENT)
        finally:
            transformers.logging.set_verbosity(before)
            diffusers.logging.set_verbosity(errors)
        self.pipe.set_adapters([RESIDENT])
        modules = [module for module in modules_of(self.pipe) if hasattr(module, "lora_A")]
        wanted = sum(any(word in key for word in DOWN) and not key.endswith("alpha") for key in weights)
        found = sum(RESIDENT in module.lora_A for module in modules)
        if found != wanted:
            raise ValueError(f"{wanted} layers in the file, {found} of them in this generator")
        self.slots, self.settings = self._find_slots(weights), settings or ""

    def _find_slots(self, weights: dict) -> dict:
        """The parameter that each tensor of a file went to; none where the file has another format than diffusers'."""
        slots = {}
        for key in weights:
            component, _, rest = key.partition(".")
            name, _, kind = rest.removesuffix(".weight").rpartition(".")
            try:
                module = getattr(self.pipe, component)
                names = [name, name.removeprefix("text_model.")]
                layer = next(module.get_submodule(one) for one in names if _has(module, one))
                slots[key] = getattr(layer, kind)[RESIDENT].weight
            except (AttributeError, StopIteration, KeyError):
                return {}
        return slots

    def _look(self) -> tuple:
        """What the UNet makes of noise, and how the text encoders read a text: tensors.

        They are called themselves, for each pipeline has a call of its own, and a compiled UNet would be compiled for
        these sizes too.
        """
        import torch

        unet, seed = self.pipe.unet, torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=seed).to(unet.device, unet.dtype)

        call = {"encoder_hidden_states": noise(1, 4, unet.config.cross_attention_dim)}
        if unet.config.addition_embed_type == "text_time":  # SDXL: a text's vector, and numbers of any count
            width = unet.config.projection_class_embeddings_input_dim - unet.config.addition_time_embed_dim
            call["added_cond_kwargs"] = {"text_embeds": noise(1, width), "time_ids": noise(1, 1)}
        read = []
        with torch.inference_mode():
            drawn = unet.forward(noise(1, unet.config.in_channels, 8, 8), 500, **call).sample
            for number in ("", "_2"):
                if encoder := getattr(self.pipe, f"text_encoder{number}", None):
                    tokens = getattr(self.pipe, f"tokenizer{number}")("a photo", return_tensors="pt").input_ids
                    read.append(encoder(tokens.to(encoder.device))[0].flatten())
        return drawn, torch.cat(read)


def modules_of(pipe) -> list:
    """All modules of a pipeline's UNet and text encoders."""
    parts = (getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    return [module for part in parts if part is not None for module in part.modules()]


def _has(module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
