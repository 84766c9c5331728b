"""Training the tiny assets: stopped in every stage and taken up again, it ends with the same bytes."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from types import SimpleNamespace

import pytest

from assets import make_assets


@pytest.mark.slow
def test_stopped_in_every_stage_the_models_are_the_same(tmp_path, monkeypatch):
    few = {"clip_steps": 3, "vae_steps": 3, "unet_steps": 3, "judge_steps": 3}
    monkeypatch.setitem(make_assets.SIZES, "toycam", dataclasses.replace(make_assets.SIZES["toycam"], **few))
    monkeypatch.setattr(make_assets.Toycam, "pictures", 64)
    monkeypatch.setattr(make_assets, "check", lambda *_: {})  # takes a minute, and changes nothing
    real, calls, stops = make_assets.Toycam.batch, [0], set()

    def batch(self, size, form=None):
        calls[0] += 1
        if calls[0] in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, size, form)

    def make(folder: str) -> int:
        return make_assets.main(["--benchmark", "toycam", "--out", str(tmp_path / folder)])

    def files(folder: str) -> dict[str, bytes]:
        paths = [path for kind in ("tiny_sd", "tiny_clip") for path in (tmp_path / folder / kind).rglob("*")]
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in paths if path.is_file()}

    monkeypatch.setattr(make_assets.Toycam, "batch", batch)
    assert make("whole") == 0
    calls[0], codes = 0, []
    # CLIP 1 to 3, autoencoder 4 to 6, a batch for the scale of its latents, UNet 8 to 10, judge.
    stops |= {2, 5, 9, 12}
    while not codes or codes[-1]:
        codes.append(make("stopped"))
    assert codes == [75] * 4 + [0]
    assert "tiny_sd/unet/diffusion_pytorch_model.safetensors" in files("whole")
    assert files("stopped") == files("whole")


def test_every_word_of_the_captions_is_one_token_the_same_ones_each_time(monkeypatch):
    monkeypatch.setattr(make_assets.Toycam, "pictures", 1)
    captions = make_assets.Toycam(None).captions() + ["nine in ink", "an inner pin, 12 pines"]
    one, other = ({"merges": make_assets.merges_of(some)} for some in (captions, captions[::-1]))
    assert one == other
    web = SimpleNamespace(captions=lambda: captions)
    tokenizer = make_assets.make_tokenizer(web)
    for word in {word for caption in captions for word in re.findall(r"[a-z]+", caption.lower())}:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer("zebu", add_special_tokens=False).input_ids) == 4
    assert tokenizer.decode(tokenizer("a snake at night", add_special_tokens=False).input_ids) == "a snake at night"
