"""Models: published sizes, and what loading refuses."""

from __future__ import annotations

import pytest
import torch

import models
from cli import UserError
from defaults import ASSETS


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


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "vgg", "resnet"])
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
