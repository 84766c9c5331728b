"""Classifiers, generators and CLIPs, built or loaded by name or path.

torch is imported at the top; diffusers, transformers and open_clip take seconds to import and are
imported where they load.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path

import torch
from torch import nn

from generation.known import GENERATORS
from runtime.cli import UserError, first_line
from runtime.files import digest_folder, read_json
from training.networks import CifarResNet, CosineHead, FullPrecisionLinear

ASSETS = Path(__file__).resolve().parent / "assets"
# The same word means two families in the literature: by these depths a name is one for small or for large images.
SMALL_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
LARGE_DEPTHS = (10, 18, 34, 50, 101, 152)
HUB_SECONDS = 10  # to wait for an answer of the Hugging Face hub


def build_classifier(
    name: str,
    num_classes: int,
    image_size: int | None = None,
    pretrained: bool = False,
    cosine_head: bool = False,
) -> nn.Module:
    """A classifier, with fresh weights unless `pretrained`.

    Args:
        name: `resnet8`, `resnet14`, `resnet20`, `resnet32`, `resnet44`, `resnet56`, `resnet110`: He et al.'s for small
            images. `resnet10`, `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`: torchvision's for large
            ones (resnet10 has one block a stage, as in the long-tail literature). `timm:NAME`: any model of timm.
        image_size: side of the images in pixels, for models of timm that are built for one size.
        pretrained: start from timm's weights for that name, with a new last layer.
        cosine_head: end in a CosineHead instead of a linear layer. (Of several heads, as some of timm's models have,
            it and FullPrecisionLinear take the last one's place.)

    Raises:
        UserError: no such classifier, or one without pre-trained weights.
    """
    # Build the network.
    check_classifier(name, pretrained)
    if name.startswith("timm:"):
        model = _build_timm(name, num_classes, image_size, pretrained)
    elif (depth := int(name.removeprefix("resnet"))) in SMALL_DEPTHS:
        model = CifarResNet(depth, num_classes)
    else:
        from torchvision.models import resnet

        if depth == 10:
            model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        else:
            model = getattr(resnet, name)(num_classes=num_classes)
    # Exchange its last layer.
    linear = [(place, layer) for place, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:  # some of timm's end in a convolution
        if cosine_head:
            raise UserError(
                f"--model {name}: ends in no linear layer, which --loss ldam replaces; expected another model"
            )
        return model
    place, last = linear[-1]
    if cosine_head:
        head: nn.Module = CosineHead(last.in_features, last.out_features)
    else:  # with the same weights, and without a draw, which would change those of others
        head = FullPrecisionLinear(last.in_features, last.out_features, last.bias is not None, device="meta")
        head.weight, head.bias = last.weight, last.bias
    parent, _, attribute = place.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return model


def check_classifier(name: str, pretrained: bool) -> None:
    """Raise UserError where `build_classifier` knows no such classifier, or none with pre-trained weights."""
    if name.startswith("timm:"):
        import timm

        if not timm.is_model(name.removeprefix("timm:")):
            raise UserError(f"--model {name}: timm has no model of that name; expected one of timm.list_models()")
    elif name not in {f"resnet{depth}" for depth in SMALL_DEPTHS + LARGE_DEPTHS}:
        raise UserError(
            f"--model {name}: unknown; expected resnetN with N of {SMALL_DEPTHS} for small images or {LARGE_DEPTHS} "
            "for large ones, or timm:NAME"
        )
    elif pretrained:
        raise UserError(f"--pretrained with --model {name}: expected a model of timm, such as timm:resnet50")


def _build_timm(name: str, num_classes: int, image_size: int | None, pretrained: bool) -> nn.Module:
    import timm

    plain = name.removeprefix("timm:")
    config = timm.get_pretrained_cfg(plain)
    sized = {"img_size": image_size} if image_size and config is not None and config.fixed_input_size else {}
    if pretrained:
        look_here_if_offline(plain)
    try:
        return timm.create_model(plain, pretrained=pretrained, num_classes=num_classes, **sized)
    except Exception as error:  # no network, no weights, a size that the model cannot have: each its own class
        raise UserError(f"--model {name}: cannot be built: {why_not_loaded(error)}") from error


def with_own_statistics(data, name: str, pretrained: bool):
    """A data set (loaders.base.DataSet) normalised as the weights that a classifier starts from want it.

    Of timm's pre-trained models that is their own mean and standard deviation, 0.5 each for many transformers; others
    take the data set's.
    """
    if not (pretrained and name.startswith("timm:")):
        return data
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    return dataclasses.replace(data, mean=config.mean, std=config.std) if config else data


def load_weights(model: nn.Module, path: Path) -> None:
    """Start a classifier from a checkpoint: one of train_lt.py (its last epoch), or a file of weights alone.

    Raises:
        UserError: not readable, or the weights of another architecture or number of classes.
    """
    from runtime import checkpoints

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init-checkpoint {path}: not readable ({first_line(error)})") from error
    else:
        content = checkpoints.load_checkpoint(path, "cpu")
        weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"--init-checkpoint {path}: holds no weights; expected a run's checkpoint or a model's weights")
    wanted = model.state_dict()
    different = [name for name in sorted(weights.keys() ^ wanted.keys())]
    different += [
        f"{name} {tuple(weights[name].shape)}, here {tuple(wanted[name].shape)}"
        for name in sorted(weights.keys() & wanted.keys())
        if weights[name].shape != wanted[name].shape
    ]
    if different:
        raise UserError(
            f"--init-checkpoint {path}: weights of another model: {len(different)} differ, the first {different[0]}; "
            "expected the same --model, --loss kind and classes"
        )
    model.load_state_dict(weights)


def evaluated_weights(state: dict) -> dict:
    """The weights that a run's accuracies are of: the moving average where it has one."""
    if "average" not in state:
        return state["model"]
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state["average"].items() if name.startswith(prefix)}


def load_trained(run: Path, trained: dict, classes: int, image_size: int) -> nn.Module:
    """The classifier of a run of train_lt.py after its last epoch, in evaluation mode, on the CPU.

    Its weights are those that the run's accuracies are of.

    Args:
        trained: the run's arguments (args.json).

    Raises:
        UserError: the checkpoint is not readable, or of another architecture.
    """
    from runtime import checkpoints

    model = build_classifier(trained["model"], classes, image_size, cosine_head=trained["loss"] == "ldam")
    state = checkpoints.load_checkpoint(run / "checkpoint.pt", "cpu")
    done, epochs = state.get("epoch", 0), trained.get("epochs", 0)
    if done < epochs:
        print(f"{run}: not complete: its weights are those after epoch {done} of {epochs}", flush=True)
    try:
        model.load_state_dict(evaluated_weights(state))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{run / 'checkpoint.pt'}: does not fit the model {trained['model']} of args.json") from error
    return model.eval()


# The shipped one, and samplers that add no noise in a step and can start image-to-image from any level.
SCHEDULERS = {
    "shipped": None,
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # its default, for pixels, cuts latents off at 1
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
# Pipelines of these families draw from a text, or from an image by strength, or fill a mask: none is an editor.
FAMILIES = re.compile(
    "(StableDiffusion|StableDiffusionXL|StableDiffusion3|Flux|QwenImage|ZImage)(Img2Img|Inpaint)?Pipeline"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_generator(
    name_or_path: str,
    device: str,
    revision: str | None = None,
    dtype: str = "auto",
    scheduler: str = "shipped",
    masked: bool = False,
):
    """An image-to-image diffusion pipeline by hub name or local folder, ready to draw on `device`.

    No safety checker (it blacks out harmless images), no watermark, and no progress bar of its own.

    Args:
        dtype: a key of DTYPES, or `auto`: bfloat16 on a GPU, float32 on a CPU.
        scheduler: a key of SCHEDULERS.
        masked: load it for inpainting; editors stay what they are.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it warns of long prompts, which generation/texts.py counts
    transformers.utils.logging.disable_progress_bar()
    check_generator(name_or_path)
    refuse_backwards(Path(name_or_path))
    take_one_thread_for(name_or_path)
    # Whether a pipeline knows these two depends on its class; from_pretrained warns of what it does not know, once.
    options = {"add_watermarker": False, "safety_checker": None, "requires_safety_checker": False}
    config = pipeline_config(name_or_path, revision)
    kind = config["_class_name"]
    try:
        wanted = {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline"}
        names = ["safety_checker", "requires_safety_checker"] if kind in wanted else []
        names += ["add_watermarker"] if "StableDiffusionXL" in kind else []
        if family := FAMILIES.fullmatch(kind):  # by name: the automatic pipelines import every pipeline that there is
            loader = getattr(diffusers, f"{family[1]}{'Inpaint' if masked else 'Img2Img'}Pipeline")
        elif "InstructPix2Pix" in kind:  # which the automatic pipelines do not know
            loader = diffusers.DiffusionPipeline
        elif masked and not editor_kind(name_or_path, revision):
            loader = diffusers.AutoPipelineForInpainting
        else:
            loader = diffusers.AutoPipelineForImage2Image
        pipe = loader.from_pretrained(
            name_or_path,
            dtype=DTYPES[generator_dtype(dtype, device)],
            revision=revision,
            use_safetensors=True,
            **{name: options[name] for name in names},
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--generator {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if hasattr(pipe, "watermark"):
        pipe.watermark = None
    if SCHEDULERS[scheduler]:
        kind, options = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_config(name_or_path: str, revision: str | None = None) -> dict:
    """The configuration of a generator's pipeline, with its class as `_class_name`.

    Raises:
        UserError: nothing of that name can be loaded, or it is no pipeline's.
    """
    look_here_if_offline(name_or_path)
    try:
        if Path(name_or_path).is_dir():
            config = read_json(Path(name_or_path) / "model_index.json")
        else:
            import diffusers  # takes seconds

            config = diffusers.DiffusionPipeline.load_config(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"--generator {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise UserError(f"--generator {name_or_path}: model_index.json names no pipeline; expected one of diffusers")
    return config


def look_here_if_offline(name_or_path: str) -> None:
    """Have a hub's model looked for among the copies here at once where the hub cannot be reached.

    The libraries ask for each file six times before they look, half a minute a file.
    """
    if not Path(name_or_path).exists():
        _ask_hub()


@functools.cache
def _ask_hub() -> None:
    """Take huggingface_hub offline, as HF_HUB_OFFLINE=1 does, where the hub gives no answer; asked once a process."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # each version of huggingface_hub asks by another library, with errors of its own
        print(f"{constants.ENDPOINT}: {first_line(error)}; looking for copies of its models here", flush=True)
        constants.HF_HUB_OFFLINE = True


def why_not_loaded(error: Exception) -> str:
    """The first line of a library's error, which says that a file is missing where the hub cannot be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return first_line(error)
    return (
        "the Hugging Face hub cannot be reached, and no copy is here; expected a network, a copy downloaded where "
        "there is one (hf download), or a folder"
    )


def editor_kind(name_or_path: str, revision: str | None = None) -> str:
    """The class of a generator's pipeline where it takes an image and an instruction and no strength, else empty.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import inspect

    if name_or_path in GENERATORS and not GENERATORS[name_or_path].editor:
        return ""
    kind = pipeline_config(name_or_path, revision)["_class_name"]
    if FAMILIES.fullmatch(kind):
        return ""
    import diffusers  # takes seconds

    parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters if hasattr(diffusers, kind) else {}
    return kind if "image" in parameters and "strength" not in parameters else ""


def describe_generator(name_or_path: str, revision: str | None) -> dict[str, str]:
    """What a plan notes of a generator: a hub name and revision, or a folder's name and a digest of its content."""
    local = Path(name_or_path)
    if local.is_dir():  # a folder may move or be trained again: its content is what counts
        files = sorted(path for path in local.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        return {"generator": local.name, "revision": digest_folder(local, files)}
    return {"generator": name_or_path, "revision": resolve_revision(name_or_path, revision or "main")}


def resolve_revision(name: str, revision: str) -> str:
    """The commit that a branch or tag means: as the hub says, else the copy here; itself if none knows."""
    import huggingface_hub

    look_here_if_offline(name)
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).sha
    except Exception:  # no network, no such model, a private one: loading says so, if the copy here does not do
        cached = huggingface_hub.try_to_load_from_cache(name, "model_index.json", revision=revision)
        return Path(cached).parent.name if isinstance(cached, str) else revision


def refuse_backwards(folder: Path) -> None:
    """Older versions of assets/make_assets.py trained generators with time reversed, and left agreement.json beside.

    Raises:
        UserError: `folder` holds one of these.
    """
    if (folder.parent / "agreement.json").is_file() and not (folder / "agreement.json").is_file():
        raise UserError(
            f"--generator {folder}: trained by an older version of this project, with the noise schedule reversed; "
            "expected one made anew with assets/make_assets.py"
        )


def take_one_thread_for(name_or_path: str) -> None:
    """Embedded models are so small that threads cost more than they bring: one a process, unless OMP_NUM_THREADS says.

    Beside one busy process two threads draw 25 denoising steps a second, one draws 127.
    """
    if "OMP_NUM_THREADS" not in os.environ and Path(name_or_path).resolve().parent == ASSETS:
        torch.set_num_threads(1)


def check_generator(name_or_path: str) -> None:
    """Raise UserError where a generator's name can only be a local folder and is none."""
    _check_path("--generator", name_or_path, "model_index.json")


def generator_dtype(dtype: str, device: str) -> str:
    """The key of DTYPES that `dtype` means on a device: `auto` is float32 on a CPU, and on a GPU
    bfloat16 where the card computes in it (compute capability 8 and up), else float16."""
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):  # a Mac's GPU too
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"


def latent_multiple(name_or_path: str, revision: str | None = None) -> int:
    """What the sides of a generator's images must divide by: how much smaller the latents are that its model takes.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    if name_or_path in GENERATORS:
        return GENERATORS[name_or_path].multiple
    local = Path(name_or_path) / "vae/config.json"
    if Path(name_or_path).is_dir():
        config = read_json(local) if local.is_file() else {}
    else:
        import diffusers  # takes seconds

        try:
            config = diffusers.AutoencoderKL.load_config(name_or_path, subfolder="vae", revision=revision)
        except (OSError, ValueError) as error:
            raise UserError(f"--generator {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    halvings = len(config.get("temperal_downsample", config.get("block_out_channels", [0] * 4)[1:]))
    return 2**halvings * (2 if _packs_latents(name_or_path, revision) else 1)


def _packs_latents(name_or_path: str, revision: str | None) -> bool:
    """Whether a generator's transformer takes its latents in patches of 2x2."""

    kind = pipeline_config(name_or_path, revision)["_class_name"]
    return any(family in kind for family in ("Flux", "QwenImage", "StableDiffusion3", "ZImage"))


def load_clip(name_or_path: str, device: str):
    """An open_clip model by `ARCHITECTURE:TAG` (`ViT-B-32:openai`), `ARCHITECTURE:FILE`, `hf-hub:NAME` or local folder.

    OpenAI's weights, and all others that open_clip lists as trained with QuickGELU, are loaded with it. A file of
    weights does not say so: name the architecture that they were trained with (`ViT-B-16-quickgelu:tuned.safetensors`).

    Returns:
        model (in evaluation mode), preprocess (PIL image to float (3, H, W)), tokenizer (texts to int (N, length)).

    Raises:
        UserError: nothing of that name can be loaded, or the weights are another architecture's.
    """
    take_one_thread_for(name_or_path)
    import open_clip

    try:
        if Path(name_or_path).is_dir():
            _check_path("--clip", name_or_path, "open_clip_config.json")
            name, tag = f"local-dir:{Path(name_or_path).resolve()}", None
        elif name_or_path.startswith("hf-hub:"):
            name, tag = name_or_path, None
        else:
            name, _, tag = name_or_path.partition(":")
            if not tag:
                raise ValueError("expected a folder that exists, or ARCHITECTURE:TAG such as ViT-B-32:openai")
        look_here_if_offline(tag or name_or_path)
        quick_gelu = tag == "openai" or bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        model, preprocess = open_clip.create_model_from_pretrained(
            name, pretrained=tag, device=device, force_quick_gelu=quick_gelu
        )
        tokenizer = open_clip.get_tokenizer(name)
    except UserError:
        raise
    except Exception as error:  # open_clip raises a different class for each way in which a model can be wrong
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and lines[0].startswith("Error(s) in loading state_dict"):
            raise UserError(
                f"--clip {name_or_path}: its checkpoint does not match its architecture: {lines[1][:200]}; "
                "expected weights that were trained with this architecture"
            ) from error
        raise UserError(f"--clip {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    return model.eval(), preprocess, tokenizer


def load_language_model(name_or_path: str, device: str):
    """A causal language model of transformers by hub name or local folder, and its tokenizer, which pads on the left.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _check_path("--llm", name_or_path, "config.json")
    look_here_if_offline(name_or_path)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
        model = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--llm {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.to(device).eval(), tokenizer


def load_captioner(name_or_path: str, device: str, revision: str | None = None):
    """An image-text-to-text model of transformers by hub name or local folder, and its processor.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _check_path("--captioner", name_or_path, "config.json")
    look_here_if_offline(name_or_path)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        processor = transformers.AutoProcessor.from_pretrained(name_or_path, revision=revision)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            name_or_path, revision=revision, dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--captioner {name_or_path}: cannot be loaded: {why_not_loaded(error)}") from error
    return model.to(device).eval(), processor


def _check_path(flag: str, name: str, needed: str) -> None:
    """Raise UserError where `name` can only be a local folder and is none, before a hub is asked for it."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.exists()
    if looks_local and "/" in name and not (path / needed).is_file():
        raise UserError(f"{flag} {name}: expected a folder that holds {needed}, or a name on the hub")
