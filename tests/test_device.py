"""Devices: which one is taken, what a Mac's GPU gets, and what does not fit into memory at once."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_captioners
import torch
from conftest import ROOT
from PIL import Image

import datasets
import filter_clipscore
import find_hard
import models
from loaders.base import ASSETS
from runtime import device as devices
from runtime.cli import UserError, is_out_of_memory
from spectrum import embeddings, tables
from training import distributed, evaluation, graphs, loop, stores

SCRIPTS = ["describe_domains", "filter_clipscore", "filter_edits", "find_hard", "generate_spectrum", "train_fewshot"]
SCRIPTS += ["train_iwildcam", "train_lt", "tune_generator", "write_prompts"]
CLIP = ["--clip", str(ASSETS / "tiny_clip")]


# ---------------------------------------------------------------------------------------------------------------------
# a Mac's GPU


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_with_a_device_says_that_mps_is_untested(script):
    parser = importlib.import_module(script).build_parser()
    [flag] = [action for action in parser._actions if "--device" in action.option_strings]
    assert flag.default == "auto" and flag.help.endswith("cuda:N or, untested, mps")


def test_mps_is_refused_where_there_is_none_and_never_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps: cannot be used here: no Mac"):
        devices.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == "cpu"


def test_what_follows_from_mps(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices._say_untested.cache_clear()
    assert [devices.pick_device("mps") for _ in range(2)] == ["mps"] * 2
    assert capsys.readouterr().out.count("never tested") == 1
    # float32 throughout, without pinned memory, workers that a GPU of CUDA would want, or CUDA graphs.
    assert models.generator_dtype("auto", "mps") == "float32" and devices.sum_type("mps") == torch.float32
    with pytest.raises(UserError, match="--precision bf16: not on --device mps; expected fp32"):
        devices.check_bfloat16("bf16", "mps")
    devices.check_bfloat16("fp32", "mps")
    assert embeddings.default_workers("mps") == 0
    trainer = SimpleNamespace(args=SimpleNamespace(cuda_graph="auto", mix="none"), device="mps")
    assert graphs.build_graph(trainer) is None
    trainer.args.cuda_graph = "on"
    with pytest.raises(UserError, match="--cuda-graph on: expected a GPU"):
        graphs.build_graph(trainer)
    asked = []
    monkeypatch.setattr(embeddings, "DataLoader", lambda *_, **options: asked.append(options["pin_memory"]) or [])
    assert list(embeddings.batches(["a"], None, None, 1, 0, "mps")) == [] and asked == [False]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device mps: expected cuda or auto with torchrun"):
        distributed.start("mps")


def test_the_generator_of_mps_is_in_a_checkpoint(monkeypatch):
    kept = {}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: kept.update(state=state.tolist()))
    generator = torch.Generator()
    loop.restore_draws(loop.current_draws(generator, "mps"), generator, "mps")
    assert kept == {"state": [7]} and "device_rng" not in loop.current_draws(generator, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_ran_out(error, told):
    assert is_out_of_memory(error) == told


def test_what_fits_is_found_by_halving_and_remembered(capsys):
    fitting, met = devices.Fitting(), []

    def compute(some: slice) -> list[int]:
        met.append(some.stop - some.start)
        if met[-1] > 3:
            raise torch.OutOfMemoryError
        return list(range(some.start, some.stop))

    # Twenty: 20, 10 and 5 do not fit, 2 do.
    assert sum(fitting.run(20, compute), []) == list(range(20)) and met == [20, 10, 5, *[2] * 10]
    assert capsys.readouterr().out.count("do not fit into memory") == 3
    met.clear()
    assert sum(fitting.run(5, compute), []) == list(range(5)) and met == [2, 2, 1]
    assert fitting.run(0, compute) == [] and capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="a bug"):
        fitting.run(1, lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(UserError, match="--device: one image does not fit into memory beside the model"):
        fitting.run(4, lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()))


@pytest.fixture
def small_memory(monkeypatch):
    """CLIPs that take so many images at once, and no more; what they met."""
    load, state = models.load_clip, SimpleNamespace(most=3, met=[])

    def load_small(*arguments):
        model, *rest = load(*arguments)
        encode = model.encode_image

        def encode_few(images, *more, **options):
            state.met.append(len(images))
            if len(images) > state.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return encode(images, *more, **options)

        model.encode_image = encode_few
        return model, *rest

    monkeypatch.setattr(models, "load_clip", load_small)
    return state


def test_finding_hard_images_by_a_clip_halves_its_batch(small_memory, blank_figures, tmp_path, capsys):
    small_memory.most = 50
    flags = ["--rule", "confidence", *CLIP, "--batch-size", "128", "--fraction", "1", "--out"]
    assert find_hard.main([*flags, str(tmp_path / "few.csv")]) == 0
    assert small_memory.met[:3] == [128, 64, 32] and max(small_memory.met[3:]) == 32
    assert capsys.readouterr().out.count("do not fit into memory") == 2
    small_memory.most = 1000
    assert find_hard.main([*flags, str(tmp_path / "all.csv")]) == 0
    few, whole = (tables.read_probabilities(tmp_path / f"{name}.probabilities.jsonl") for name in ("few", "all"))
    assert len(few) == 184 and few == pytest.approx(whole, abs=1e-5)
    small_memory.most = 0
    with pytest.raises(UserError, match="one image does not fit into memory beside the model"):
        find_hard.main([*flags, str(tmp_path / "none.csv")])


def test_the_filter_halves_its_batch_and_keeps_the_same(road, small_memory, tmp_path, capsys):
    shutil.copytree(road.spectrum, tmp_path / "s")
    before = tables.read_scores(tmp_path / "s/scores.csv")
    for name in ("scores.csv", "scores.json"):
        (tmp_path / "s" / name).unlink()
    command = ["--spectrum", str(tmp_path / "s"), "--prompts", str(road.prompts), "--threshold", "0.1"]
    assert filter_clipscore.main(command) == 0
    after = tables.read_scores(tmp_path / "s/scores.csv")
    assert small_memory.met and max(small_memory.met[-20:]) <= 3
    assert {name: row["kept"] for name, row in before.items()} == {name: row["kept"] for name, row in after.items()}
    assert all(row["text_score"] == pytest.approx(before[name]["text_score"], abs=1e-5) for name, row in after.items())


def test_a_classifier_is_evaluated_in_parts(capsys):
    torch.manual_seed(0)
    data = datasets.load("digits", 30)
    model = models.build_classifier("resnet8", 10).eval()
    store, places = stores.build([data.val], "cpu", 16, 0, "contiguous"), np.arange(20)
    whole = evaluation.predict(model, store, places, data, "cpu", batch_size=8)
    met = []

    def stop(_, inputs):
        met.append(len(inputs[0]))
        if met[-1] > 3:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(stop)
    parts = evaluation.predict(model, store, places, data, "cpu", batch_size=8)
    assert met == [8, 4, *[2] * 10] and torch.allclose(whole, parts, atol=1e-5)
    met.clear()
    evaluation.predict(model, store, places, data, "cpu", batch_size=8)  # the next epoch's
    assert met == [2] * 10 and capsys.readouterr().out.count("do not fit") == 2


def test_a_captioner_halves_its_batch(tmp_path):
    from spectrum.captions import Captioner

    torch.manual_seed(0)
    loaded = models.load_captioner(str(tiny_captioners.save_git(tmp_path / "model")), "cpu")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    expected, generate, met = Captioner(loaded, None, 5).caption(images), loaded[0].generate, []

    def generate_few(**inputs):
        met.append(len(inputs["pixel_values"]))
        if met[-1] > 2:
            raise torch.OutOfMemoryError
        return generate(**inputs)

    loaded[0].generate = generate_few
    assert Captioner(loaded, None, 5).caption(images) == expected and met == [5, 2, 2, 1]


@pytest.mark.slow
def test_memory_that_runs_out_anywhere_else_is_one_line():
    script = "import sys; sys.argv[0] = 'x.py'; from runtime import cli; import torch\n"
    script += "def main(): raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB\\nmore')\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.fullmatch(
        r"x.py: error: out of memory \(CUDA out of memory. Tried 2 GiB\); expected a smaller --batch-size.*\n",
        done.stderr,
    )


BLOCKS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from runtime.device import keep_freed_memory
keep_freed_memory()
b"x" * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for byte in (b"a", b"b", b"c", b"d"):
    byte * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_is_freed_is_kept_for_the_next_tensor():
    """Else each of these blocks of 64 MB asks the system for 16,384 pages, which are cleared first."""
    done = subprocess.run([sys.executable, "-c", BLOCKS, str(ROOT)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096
