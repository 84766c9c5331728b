"""Models: published sizes, and what loading refuses."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch

import datasets
import models
import train_lt
from loaders.base import ASSETS
from runtime.cli import UserError
from runtime.signals import StopSignals
from training.networks import CifarResNet, CosineHead, FullPrecisionLinear


# He et al. (2016), table 6, count these in millions: 0.27, 0.46, 0.66, 0.85.
@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66)])
def test_cifar_resnets_have_the_published_sizes(name, millions):
    model = models.build_classifier(name, 10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet20_counted_by_hand():
    def block(width_in, width):
        return 9 * width_in * width + 9 * width * width + 4 * width

    stem, head = 9 * 3 * 16 + 2 * 16, 64 * 10 + 10
    expected = stem + 3 * block(16, 16) + block(16, 32) + 2 * block(32, 32) + block(32, 64) + 2 * block(64, 64) + head
    assert sum(p.numel() for p in models.build_classifier("resnet20", 10).parameters()) == expected


# Parameters as torchvision's documentation and timm's results list them, at 1,000 classes; ResNet-10 by hand: the stem,
# four blocks of two 3x3 convolutions (three with a 1x1 shortcut), BatchNorm's two per channel, and the last layer.
def counted_resnet10() -> int:
    total, width_in = 3 * 64 * 49 + 2 * 64, 64
    for width in (64, 128, 256, 512):
        total += 9 * width_in * width + 9 * width * width + 4 * width
        total += width_in * width + 2 * width if width != width_in else 0
        width_in = width
    return total + 512 * 1000 + 1000


PUBLISHED = {
    "resnet10": counted_resnet10(),
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "timm:resnet26": 15_995_176,  # not the CIFAR network of 26 layers
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_models_have_the_published_sizes(name):
    with torch.device("meta"):
        model = models.build_classifier(name, 1000)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


# Multiplications of one forward pass, in billions: torchvision's documentation, and He et al. (2016) for CIFAR
# (ResNet-20: 41 million, as 3 * 9 * 16 * 32^2 + ... by hand).
@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [("resnet18", 224, 1.81), ("resnet34", 224, 3.66), ("resnet50", 224, 4.09), ("resnet152", 224, 11.51)],
)
def test_large_models_have_the_published_flops(name, size, billions):
    assert multiplications(name, size) / 1e9 == pytest.approx(billions, abs=0.006)


def multiplications(name, size):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, images = models.build_classifier(name, 1000), torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2


def test_the_flops_of_resnet20_counted_by_hand():
    # Each stage halves the side and doubles the width, so that all 3x3 convolutions but the first of a stage cost the
    # same: 9 * 16 * 16 * 32 * 32; the first ones of stages two and three cost half of it.
    one = 9 * 16 * 16 * 32 * 32
    assert multiplications("resnet20", 32) == 9 * 3 * 16 * 32 * 32 + 16 * one + 2 * one // 2 + 64 * 1000


def test_depths_that_two_families_share_are_named_apart():
    # 50 and 152 are 6n + 2 as well: by these names they are the networks for large images.
    assert not set(models.SMALL_DEPTHS) & set(models.LARGE_DEPTHS)
    assert type(models.build_classifier("resnet50", 3)).__module__.startswith("torchvision")
    assert isinstance(models.build_classifier("resnet44", 3), CifarResNet)


def test_models_of_timm_are_built_for_the_size_of_the_images():
    model = models.build_classifier("timm:test_vit", 7, image_size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match="--model timm:no_such: timm has no model"):
        models.build_classifier("timm:no_such", 7)
    with pytest.raises(UserError, match="expected a model of timm"):
        models.build_classifier("resnet50", 7, pretrained=True)


def test_pretrained_weights_that_cannot_be_had_are_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--model timm:test_vit: cannot be built"):
        models.build_classifier("timm:test_vit", 7, pretrained=True)


def test_pretrained_models_get_pixels_as_they_learnt_them(monkeypatch):
    """Many transformers of timm learnt with a mean and deviation of 0.5; a run that starts from them trains so too."""
    build, half = timm.create_model, (0.5, 0.5, 0.5)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: build(name, **more))
    data = dataclasses.replace(datasets.load("digits", 30.0), mean=(0.1, 0.2, 0.3))
    flags = ["--dataset", "digits", "--device", "cpu", "--curriculum", "none", "--out", "no_such_run", "--model"]
    for name, mean in (("timm:test_vit --pretrained", half), ("timm:test_vit", data.mean), ("resnet8", data.mean)):
        args = train_lt.build_parser().parse_args([*flags, *name.split()])
        trainer, _ = train_lt.prepare(args, data, {}, [], [], StopSignals())
        assert tuple(trainer.data.mean) == tuple(mean)
    found = models.with_own_statistics(data, "timm:vit_base_patch16_224.augreg_in21k", True)
    assert (found.mean, found.std) == (half, half)


@pytest.mark.parametrize("name", ["resnet20", "resnet10", "timm:test_vit"])
def test_a_cosine_head_gives_cosines(name):
    torch.manual_seed(0)
    model = models.build_classifier(name, 5, 32, cosine_head=True).eval()
    images = torch.randn(4, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (4, 5) and logits.abs().max() <= 1 + 1e-5
    head = next(layer for layer in model.modules() if isinstance(layer, CosineHead))
    with torch.no_grad():
        head.weight.mul_(7)
    assert torch.allclose(model(images), logits, atol=1e-5)


@pytest.mark.parametrize("cosine_head", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "resnet10", "timm:test_vit"])
def test_the_last_layer_computes_in_float32_under_autocast(name, cosine_head):
    torch.manual_seed(0)
    model = models.build_classifier(name, 5, 32, cosine_head=cosine_head).eval()
    head = [layer for layer in model.modules() if isinstance(layer, FullPrecisionLinear | CosineHead)][-1]
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    [features] = seen
    assert features.shape[0] == 4 and logits.dtype == torch.float32
    features, weight = features.double(), head.weight.double()
    if cosine_head:
        features, weight = (one / one.norm(dim=1, keepdim=True) for one in (features, weight))
    by_hand = features @ weight.T + (0 if cosine_head else head.bias.double())
    assert torch.allclose(logits.double(), by_hand, atol=1e-5)


def test_a_model_without_a_linear_layer_is_left_as_it_is():
    logits = models.build_classifier("timm:resnetv2_50x1_bit", 5).eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 5)
    with pytest.raises(UserError, match="ends in no linear layer"):
        models.build_classifier("timm:resnetv2_50x1_bit", 5, cosine_head=True)


def test_weights_are_taken_from_checkpoints_of_the_same_model_alone(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    one, other = (models.build_classifier("resnet8", 10) for _ in range(2))
    torch.save({"model": one.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    torch.save(one.state_dict(), tmp_path / "weights.pt")
    save_file(one.state_dict(), tmp_path / "weights.safetensors")
    for name in ("run.pt", "weights.pt", "weights.safetensors"):
        other = models.build_classifier("resnet8", 10)
        models.load_weights(other, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(
        UserError, match=r"weights of another model: 2 differ, the first head.bias \(10,\), here \(7,\)"
    ):
        models.load_weights(models.build_classifier("resnet8", 7), tmp_path / "run.pt")
    with pytest.raises(UserError, match="weights of another model"):
        models.load_weights(models.build_classifier("resnet14", 10), tmp_path / "run.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=f"{name}.*not.* readable"):
            models.load_weights(one, tmp_path / name)


def test_a_run_that_is_not_complete_says_so_where_its_weights_judge(tmp_path, capsys):
    trained = {"model": "resnet8", "loss": "ce", "epochs": 10}
    for epoch in (3, 10):
        state = {"epoch": epoch, "model": models.build_classifier("resnet8", 4).state_dict()}
        torch.save(state, tmp_path / "checkpoint.pt")
        models.load_trained(tmp_path, trained, 4, 16)
        assert ("after epoch 3 of 10" in capsys.readouterr().out) == (epoch == 3)


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "vgg", "resnet", "resnet26"])
def test_unknown_classifiers_are_named(name):
    with pytest.raises(UserError, match=f"--model {name}"):
        models.build_classifier(name, 10)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no_such_folder", "a/b/c", str(ASSETS)])
def test_a_missing_generator_is_named(name):
    with pytest.raises(UserError, match="--generator"):
        models.load_generator(name, "cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "ViT-B-32", "NoSuchModel:openai", str(ASSETS)])
def test_a_missing_clip_is_named(name):
    with pytest.raises(UserError, match="--clip"):
        models.load_clip(name, "cpu")


def test_a_generator_that_learnt_time_backwards_is_refused(tmp_path):
    shutil.copytree(ASSETS / "tiny_sd", tmp_path / "tiny_sd")
    (tmp_path / "tiny_sd/agreement.json").unlink(missing_ok=True)
    (tmp_path / "agreement.json").write_text("{}")  # where older versions of make_assets.py left it
    with pytest.raises(UserError, match="with the noise schedule reversed; expected one made anew"):
        models.load_generator(str(tmp_path / "tiny_sd"), "cpu")


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), ("2", 2)])
def test_embedded_models_take_one_thread_unless_told_otherwise(monkeypatch, threads, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        models.load_clip(str(ASSETS / "tiny_clip"), "cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_the_generator_draws_without_watermark_and_safety_checker():
    pipe = models.load_generator(str(ASSETS / "tiny_sd"), "cpu")
    assert type(pipe).__name__ == "StableDiffusionImg2ImgPipeline"
    assert pipe.safety_checker is None and getattr(pipe, "watermark", None) is None
    assert next(pipe.unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "quick_gelu"),
    [("ViT-B-32:openai", True), ("ViT-B-32:metaclip_400m", True), ("ViT-B-32:laion2b_s34b_b79k", False)],
)
def test_weights_that_were_trained_with_quickgelu_would_be_built_with_it(monkeypatch, name, quick_gelu):
    import open_clip

    asked = {}

    def record(name, **kwargs):
        asked.update(kwargs, name=name)
        raise RuntimeError("no network here")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", record)
    with pytest.raises(UserError, match="no network here"):
        models.load_clip(name, "cpu")
    assert asked["force_quick_gelu"] == quick_gelu and f"ViT-B-32:{asked['pretrained']}" == name


def test_the_tokenizers_give_each_caption_word_one_token():
    tokenizer = models.load_clip(str(ASSETS / "tiny_clip"), "cpu")[2]
    tokens = tokenizer(["a photo of a three", "a seven in purple ink on yellow paper"])
    ends = (tokens == tokens.max()).int().argmax(1)  # padding is the end token too: the first one ends the text
    assert ends.tolist() == [6, 9]  # a start token and one for each word


@pytest.mark.parametrize(("major", "dtype"), [(7, "float16"), (8, "bfloat16"), (9, "bfloat16")])
def test_bfloat16_is_taken_where_the_card_computes_in_it(monkeypatch, major, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (major, 5))
    assert models.generator_dtype("auto", "cuda") == dtype
    assert models.generator_dtype("auto", "cpu") == models.generator_dtype("float32", "cuda") == "float32"


def test_a_revision_is_the_commit_that_the_hub_or_the_copy_here_says(monkeypatch, tmp_path):
    from types import SimpleNamespace

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
    assert models.describe_generator("a/b", None) == {"generator": "a/b", "revision": "c0ffee"}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    copy = tmp_path / "snapshots/beef/model_index.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(copy))
    assert models.describe_generator("a/b", None)["revision"] == "beef"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert models.describe_generator("a/b", "v1")["revision"] == "v1"


@pytest.mark.slow
def test_without_a_network_copies_are_taken_at_once(tmp_path):
    """The libraries ask six times for each file first, half a minute a file, whether a copy is here or not."""
    copy = tmp_path / "hub/models--own--tiny"
    shutil.copytree(ASSETS / "tiny_sd", copy / "snapshots" / ("c0ffee42" * 5))
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("c0ffee42" * 5)
    code = (
        "import models\n"
        "print(models.describe_generator('own/tiny', None), type(models.load_generator('own/tiny', 'cpu')).__name__)\n"
        "for load in (models.load_captioner, models.load_language_model, models.load_clip):\n"
        "    try: load('hf-hub:own/other' if load is models.load_clip else 'own/other', 'cpu')\n"
        "    except models.UserError as error: print(error)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ASSETS.parent, check=True
    )
    said, loaded, *missing = done.stdout.splitlines()
    assert said.startswith("http://127.0.0.1:9: ") and said.endswith("looking for copies of its models here")
    assert "'revision': '" + "c0ffee42" * 5 in loaded and loaded.endswith("StableDiffusionImg2ImgPipeline")
    for flag, line in zip(("--captioner", "--llm", "--clip"), missing, strict=True):
        assert line.startswith(f"{flag} ") and "the Hugging Face hub cannot be reached, and no copy is here" in line
    assert "Retrying" not in done.stderr
