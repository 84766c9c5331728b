"""Adapters: the layers, counts and files of diffusers and peft; several at once as each alone; CLIP's q and v."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from loaders.base import ASSETS
from training import diffusion, lora

TINY = str(ASSETS / "tiny_sd")


@pytest.fixture(scope="module")
def pipe():
    import models

    return models.load_generator(TINY, "cpu")


@pytest.fixture
def fresh(pipe):
    """The pipeline without adapters before and after a test."""
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        module.requires_grad_(False)
    yield pipe
    pipe.unload_lora_weights()
    for module in (pipe.unet, pipe.text_encoder):
        lora.remove_adapters(module)


def filled(layers: dict, seed: int = 0) -> None:
    """Weights as after a training: B not zero either."""
    lora.start_adapters(layers, [seed + group for group in range(next(iter(layers.values())).groups)])
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.b.data = 0.1 * torch.randn(layer.b.shape, generator=generator)


def forward(pipe, prompts: list[list[str]]) -> torch.Tensor:
    count = sum(map(len, prompts))
    z = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    told = diffusion.conditions(pipe, diffusion.encode_prompts(pipe, prompts), 16)
    return pipe.unet(z, torch.arange(count) * 300, **told).sample


def test_a_saved_adapter_draws_the_same_in_plain_diffusers(fresh, tmp_path):
    """alpha is twice the rank: without its metadata the adapter would count half. Both halves are in the file."""
    prompts = [["a photo of a two", "a photo of a nine"]]
    layers = lora.add_adapters(fresh, ["unet", "text"], 1, 4, 8)
    filled(layers)
    with torch.no_grad():
        expected = forward(fresh, prompts)
        text = fresh.encode_prompt(prompts[0], "cpu", 1, False)[0]
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora.save_adapter(path, lora.adapter_weights(layers, 0), 4, 8, {"prompt": "a photo of a two"})
    for module in (fresh.unet, fresh.text_encoder):
        lora.remove_adapters(module)
    with torch.no_grad():
        plain, plain_text = forward(fresh, prompts), fresh.encode_prompt(prompts[0], "cpu", 1, False)[0]
        fresh.load_lora_weights(tmp_path)
        loaded, loaded_text = forward(fresh, prompts), fresh.encode_prompt(prompts[0], "cpu", 1, False)[0]
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loaded_text, text, atol=1e-5, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.01
    assert (plain_text - text).abs().max() > 0.01


def test_files_name_text_layers_for_older_readers_too_and_are_equal_byte_for_byte(fresh, tmp_path):
    layers = lora.add_adapters(fresh, ["unet", "text"], 1, 2, 2)
    weights = lora.adapter_weights(layers, 0)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in weights
    notes = {name: name for name in "abcdefgh"}
    files = []
    for number in range(3):
        lora.save_adapter(tmp_path / f"{number}.safetensors", weights, 2, 2, notes)
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(set(files)) == 1
    header = json.loads(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_targets_and_weights_of_stable_diffusion_2_1():
    """3.32 M weights in the UNet and 3.01 M in the text encoder at rank 16 (DataDream), by the published shapes."""
    import transformers
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
            )
        )
    found = {"unet": lora.find_targets("unet", unet), "text_encoder": lora.find_targets("text_encoder", text)}
    weights = {
        name: sum(16 * (layer.in_features + layer.out_features) for _, layer in layers)
        for name, layers in found.items()
    }
    assert len(found["unet"]) == 16 * 2 * 4 and len(found["text_encoder"]) == 23 * 4
    # blocks of width 320, 640 and 1280: five, five and six; keys and values of cross-attention come from 1024
    assert weights["unet"] == 16 * sum(14 * width + 2048 for width in [320] * 5 + [640] * 5 + [1280] * 6) == 3_319_808
    assert weights["text_encoder"] == 23 * 4 * 16 * 2048 == 3_014_656


def test_adapters_side_by_side_are_trained_as_each_alone(fresh):
    """Two adapters on batches of their own: outputs, gradients and clipped gradients of each alone, to rounding."""
    prompts = [["a photo of a two"] * 3, ["a photo of a nine"] * 3]

    def gradients(groups: list[int], seeds: list[int]) -> list[torch.Tensor]:
        layers = lora.add_adapters(fresh, ["unet", "text"], len(groups), 4, 4)
        lora.start_adapters(layers, seeds)
        for group, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(100 + seed)
            for layer in layers.values():
                layer.b.data[group] = 0.1 * torch.randn(layer.b.shape[1:], generator=generator)
        z = torch.cat([torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        told = diffusion.conditions(fresh, diffusion.encode_prompts(fresh, [prompts[group] for group in groups]), 16)
        scheduler = diffusion.noise_scheduler(fresh)
        times = torch.tensor([10, 400, 900] * len(groups))
        loss = diffusion.denoising_loss(fresh, scheduler, z, z.flip(1), times, told)
        loss.view(len(groups), -1).mean(1).sum().backward()
        norms = lora.clip_gradients(layers, 1e-3)
        return [norms, *(parameter.grad.clone() for parameter in lora.parameters(layers))]

    both, first, second = gradients([0, 1], [7, 8]), gradients([0], [7]), gradients([1], [8])
    for together, one, two in zip(both, first, second, strict=True):
        torch.testing.assert_close(together[0], one[0], atol=1e-7, rtol=1e-3)
        torch.testing.assert_close(together[1], two[0], atol=1e-7, rtol=1e-3)
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in first[1:]))
    assert total == pytest.approx(1e-3, rel=1e-3)  # clipped, each to itself


def test_one_adapter_is_what_peft_computes():
    import peft

    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    ours = lora.GroupedLinear(base, 1, 3, 6)
    ours.a.data, ours.b.data = torch.randn(1, 6, 3), torch.randn(1, 3, 5)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(6, 5)}), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    ).base_model.model["layer"]
    theirs.base_layer.load_state_dict(base.state_dict())
    theirs.lora_A["default"].weight.data = ours.a.data[0].T
    theirs.lora_B["default"].weight.data = ours.b.data[0].T
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_adapters_of_an_attention_layer_reach_the_projections_that_they_name(batch_first):
    """Merged into the rows of torch's one weight they give the same; of strength 0 nothing; k and out stay."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    layer.in_proj_bias.data.normal_()
    x, mask = torch.randn(3, 5, 8), torch.full((5, 5), -math.inf).triu(1)
    x = x if batch_first else x.transpose(0, 1)
    plain = layer(x, x, x, need_weights=False, attn_mask=mask)[0].detach()
    before = layer.in_proj_weight.detach().clone(), layer.out_proj.weight.detach().clone()
    adapted = lora.LoraAttention(layer, ["q", "v"], 2, 4, 0.0)
    torch.testing.assert_close(adapted(x, x, x, attn_mask=mask)[0], plain)  # B is zero
    for name in adapted.b:
        adapted.b[name].data.normal_()
    moved = adapted(x, x, x, attn_mask=mask)[0]
    assert (moved - plain).abs().max() > 0.1
    adapted.strength = 0.0
    torch.testing.assert_close(adapted(x, x, x, attn_mask=mask)[0], plain)
    adapted.strength = 1.0
    delta = 2 * adapted.b["q"] @ adapted.a["q"]
    merged = adapted.merge()
    torch.testing.assert_close(merged(x, x, x, need_weights=False, attn_mask=mask)[0], moved)
    torch.testing.assert_close(merged.in_proj_weight[:8] - before[0][:8], delta)
    assert torch.equal(merged.in_proj_weight[8:16], before[0][8:16]) and torch.equal(merged.out_proj.weight, before[1])


def test_a_classifiers_adapters_start_as_the_papers_do():
    """DataDream's loralib and peft draw A as torch draws a linear layer of its width, whatever the rank."""
    import peft

    torch.manual_seed(0)
    layer = lora.LoraAttention(nn.MultiheadAttention(256, 2), ["q", "v"], 16, 32, 0.1)
    config = peft.LoraConfig(r=16, target_modules=["layer"])
    theirs = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(256, 256)}), config).base_model.model["layer"]
    for own in layer.a.values():
        for measure in (lambda a: a.abs().max().item(), lambda a: a.std().item()):
            assert measure(own) == pytest.approx(measure(theirs.lora_A["default"].weight), rel=0.05)
    assert not any(own.any() for own in layer.b.values())


@pytest.mark.parametrize("kind", ["refiner", "base"])
def test_sdxl_is_tuned_with_its_sizes_and_saved_for_plain_diffusers(kind, tmp_path):
    """Both text encoders of the base, the one of the refiner; a step reaches every adapter; the file loads."""
    from test_generate_jobs import TINY_REFINER, tiny_base

    from bench import bench_spectrum as bench

    pipe = tiny_base() if kind == "base" else bench.build_refiner(TINY_REFINER)
    for module in (pipe.unet, pipe.vae, *lora.text_encoders(pipe).values()):
        module.requires_grad_(False)
    layers = lora.add_adapters(pipe, ["unet", "text"], 2, 2, 2)
    lora.start_adapters(layers, [0, 1])
    prompts = [["a photo of a two"] * 2, ["a photo of a nine"] * 2]
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([10, 400, 10, 900])

    def loss() -> torch.Tensor:
        told = diffusion.conditions(pipe, diffusion.encode_prompts(pipe, prompts), 64)
        return diffusion.denoising_loss(pipe, diffusion.noise_scheduler(pipe), z, z.flip(1), times, told)

    optimizer = torch.optim.SGD(lora.parameters(layers), 10.0)
    loss().sum().backward()
    assert (lora.clip_gradients(layers, 1.0) > 0).all()
    optimizer.step()
    # The base reads its first text encoder one layer before the last; that encoder has but one here.
    read = [layer for name, layer in layers.items() if kind == "refiner" or not name.startswith("text_encoder.")]
    assert all(layer.b.abs().sum() > 0 for layer in read)
    expected = loss().detach()
    lora.save_adapter(tmp_path / "pytorch_lora_weights.safetensors", lora.adapter_weights(layers, 1), 2, 2, {})
    for module in (pipe.unet, *lora.text_encoders(pipe).values()):
        lora.remove_adapters(module)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        loaded = loss()
    torch.testing.assert_close(loaded[2:], expected[2:], atol=1e-5, rtol=1e-4)
    components = {"refiner": {"unet", "text_encoder_2"}, "base": {"unet", "text_encoder", "text_encoder_2"}}[kind]
    assert {name.split(".")[0] for name in layers} == components
