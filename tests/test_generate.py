"""The spectrum: the same images as diffusers draws them, whatever the batch, and after any kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

import datasets
import generate_spectrum
import models
from generation import generator as generators
from generation import worklist
from loaders.base import ASSETS
from runtime import cli
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import ROW_FIELDS, Unit

TINY = str(ASSETS / "tiny_sd")


def contents(folder: Path) -> dict[str, bytes]:
    """Every image of a spectrum folder by name."""
    return {path.name: path.read_bytes() for path in folder.glob("shard-*/*.png")}


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["file_name"]: row for row in spectrum_folder.read_rows(folder, decode=True)}


def test_rows_describe_what_was_drawn(road):
    rows = spectrum_folder.read_rows(road.spectrum, decode=True)
    assert len(rows) == 55 * 3
    for row in rows:
        assert set(row) == set(ROW_FIELDS)
        assert all(isinstance(row[name], kind) for name, kind in ROW_FIELDS.items())
        assert row["steps"] == {0: 4, 50: 2, 90: 1}[row["level"]]
        assert row["prompt"] in [text.replace("{}", row["class_name"]) for text in datasets.TEMPLATES["digits"]]
    starts = {row["level"]: row["start_timestep"] for row in rows}
    assert starts[0] > starts[50] > starts[90]
    told = json.loads((road.spectrum / "shard-00000/speed.json").read_text())["environment"]
    assert torch.__version__.startswith(told["packages"]["torch"])


@pytest.mark.parametrize(
    ("level", "steps", "expected"),
    [(0, 50, 50), (10, 50, 45), (90, 50, 5), (80, 50, 10), (70, 20, 6), (99, 20, 1), (97, 50, 2), (50, 1, 1)],
)
def test_executed_steps_are_rounded_not_cut(level, steps, expected):
    assert worklist.steps_at(level, steps) == expected


def draw_nines(pipe, level: int, **settings) -> tuple[torch.Tensor, list, list, list]:
    """Three of digits' nines at a level, in one batch: float (3, 3, 16, 16), and their units, sources and texts."""
    data = datasets.load("digits", 30)
    units = [Unit(source, level, 1) for source in data.train.sources[-3:]]
    sources = [Image.fromarray(image) for image in data.train.images[-3:]]
    texts = ["a photo of a nine", "a nine in red ink", "a nine in blue ink"]
    generator = generators.Generator(pipe, steps=10, text_guidance=3.0, **settings)
    batch = worklist.Batch(level, (16, 16), None, units)
    names = [unit.source for unit in units]
    assert generator.missing_sources(batch) == names
    return generator.draw(batch, 0, texts, dict(zip(names, sources, strict=True))), units, sources, texts


def plain(pipe, unit: Unit, source, text: str, **call) -> torch.Tensor:
    """One image a call, as diffusers' documentation has it, with the generator of the work unit: float (3, H, W)."""
    level = unit.level
    settings = {"strength": 1 if level == 0 else 1 - level / 100 + 1e-6, "num_inference_steps": 10}
    settings |= {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(unit.noise_seed())}
    return pipe(text, image=source, output_type="pt", **settings | call).images[0]


@pytest.mark.parametrize("level", [0, 10, 90])
def test_images_equal_a_plain_call_of_the_pipeline(level):
    pipe = models.load_generator(TINY, "cpu")
    for ours, *asked in zip(*draw_nines(pipe, level), strict=True):
        assert (ours - plain(pipe, *asked)).abs().max() < 1e-4


@pytest.mark.parametrize("level", [0, 50, 90])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m"])
def test_every_scheduler_draws_what_a_plain_call_draws(scheduler, level):
    pipe = models.load_generator(TINY, "cpu", scheduler=scheduler)
    drawn, units, sources, texts = draw_nines(pipe, level)
    for ours, *asked in zip(drawn, units, sources, texts, strict=True):
        assert (ours - plain(pipe, *asked)).abs().max() < 1e-4
    if level == 90:  # one step of ten: close to the source whatever the scheduler
        originals = torch.stack([torch.from_numpy(np.array(source)).permute(2, 0, 1) / 255 for source in sources])
        assert (drawn - originals).abs().mean() < 0.12


@torch.inference_mode()
def euler_from(pipe, unit: Unit, source, text: str, timesteps: list[int]) -> torch.Tensor:
    """The noised source, denoised by Euler's method at these timesteps, by the formulas alone: float (3, H, W)."""
    kept = pipe.scheduler.alphas_cumprod[timesteps]
    sigmas = [*((1 - kept) / kept).sqrt().tolist(), 0.0]
    generator = torch.Generator().manual_seed(unit.noise_seed())
    pixels = pipe.image_processor.preprocess(source)
    latent = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    noised = latent + sigmas[0] * torch.randn(latent.shape, generator=generator)
    tokens = pipe.tokenizer([text, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    texts = pipe.text_encoder(tokens[:, : pipe.tokenizer.model_max_length])[0]
    for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        seen = (noised / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
        led, unled = pipe.unet(seen, timestep, texts)[0]
        noised = noised + (following - sigma) * (unled + 3.0 * (led - unled))
    return (pipe.vae.decode(noised / pipe.vae.config.scaling_factor)[0][0] / 2 + 0.5).clamp(0, 1)


# Of 1000 timesteps the last of the share that a level leaves, then evenly to 0, in no longer steps than level 0.
FOUR_STEPS = {0: [999, 749, 499, 249], 10: [899, 674, 449, 224], 30: [699, 466, 232], 50: [499, 249], 70: [299, 149],
              90: [99]}  # fmt: skip


@pytest.mark.parametrize("level", FOUR_STEPS)
def test_levels_by_noise_begin_at_their_own_noise_whatever_the_steps(level):
    pipe = models.load_generator(TINY, "cpu", scheduler="euler")
    generator = generators.Generator(pipe, steps=4, text_guidance=3.0, by_noise=True)
    data = datasets.load("digits", 30).train
    unit, source, text = Unit(data.sources[-1], level, 1), Image.fromarray(data.images[-1]), "a nine in red ink"
    [drawn] = generator.draw(worklist.Batch(level, (16, 16), None, [unit]), 0, [text], {unit.source: source})
    assert generator.start_timestep(level, (16, 16)) == FOUR_STEPS[level][0]
    assert worklist.steps_at(level, 4, by_noise=True) == len(FOUR_STEPS[level])
    assert (drawn - euler_from(pipe, unit, source, text, FOUR_STEPS[level])).abs().max() < 1e-4


@pytest.mark.parametrize("level", [0, 50, 90])
def test_ddim_follows_its_formula_unclipped(level):
    """DDIM without noise is Euler's method; latents reach far beyond the 1 that it would clip pixels to."""
    pipe = models.load_generator(TINY, "cpu", scheduler="ddim")
    drawn, units, sources, texts = draw_nines(pipe, level)
    timesteps = list(range(999 - 10 * level, 0, -100))
    for ours, *asked in zip(drawn, units, sources, texts, strict=True):
        assert (ours - euler_from(pipe, *asked, timesteps)).abs().max() < 1e-4


@pytest.mark.slow
def test_a_four_step_spectrum_by_noise_has_six_levels(road, tmp_path, capsys):
    command = [*road.inputs, "--out", str(tmp_path / "s"), "--levels", "0", "10", "30", "50", "70", "90"]
    command += ["--seeds", "1", "--steps", "4"]
    with pytest.raises(UserError, match="--levels 0 10: both are 4 of --steps 4; .* or --levels-by noise"):
        generate_spectrum.main(command)
    assert generate_spectrum.main([*command, "--levels-by", "noise"]) == 0
    rows = spectrum_folder.read_rows(tmp_path / "s", decode=True)
    starts = {row["level"]: (row["start_timestep"], row["steps"]) for row in rows}
    assert starts == {level: (steps[0], len(steps)) for level, steps in FOUR_STEPS.items()}
    # Nearer to the source by each level.
    data = datasets.load("digits", 30).train
    sources = dict(zip(data.sources, data.images, strict=True))
    far = {level: [] for level in FOUR_STEPS}
    for row in rows:
        drawn = np.asarray(Image.open(tmp_path / "s" / row["file_name"])).astype(float)
        far[row["level"]].append(abs(drawn - sources[row["source"]]).mean())
    means = [np.mean(far[level]) for level in FOUR_STEPS]
    assert means == sorted(means, reverse=True)
    # A folder by steps is another spectrum.
    with pytest.raises(UserError, match="levels_by"):
        generate_spectrum.main([*command, "--levels", "0", "50"])


def test_levels_by_noise_want_a_scheduler_that_takes_timesteps():
    pipe = models.load_generator(TINY, "cpu", scheduler="ddim")
    with pytest.raises(
        UserError, match=r"--levels-by noise: .* with DDIMScheduler takes no timesteps; expected .*euler"
    ):
        generators.Generator(pipe, steps=4, text_guidance=3.0, by_noise=True)


def test_a_generator_that_cannot_draw_what_is_asked_for_leaves_no_folder(road, tmp_path):
    """Else the same command with the flag that the error asks for would be refused as another plan."""
    command = [*road.inputs, "--out", str(tmp_path / "s"), "--levels", "0", "50", "--seeds", "1", "--steps", "2"]
    with pytest.raises(UserError, match="--levels-by noise"):
        generate_spectrum.main([*command, "--levels-by", "noise", "--scheduler", "ddim"])
    assert not (tmp_path / "s").exists()


def test_the_batch_size_does_not_change_the_images(road, tmp_path):
    some = ["--levels", "50", "90", "--seeds", "1", "--steps", "4", "--batch-size", "7"]
    generate_spectrum.main([*road.inputs, "--out", str(tmp_path / "s"), *some])
    expected, found = contents(road.spectrum), contents(tmp_path / "s")
    assert found.keys() == {name for name in expected if "level000" not in name}
    for name in found:
        a, b = (np.asarray(Image.open(next(folder.glob(f"shard-*/{name}")))).astype(int)
                for folder in (road.spectrum, tmp_path / "s"))  # fmt: skip
        assert abs(a - b).max() <= 1


def test_the_same_command_twice_draws_the_same_bytes_and_then_nothing(road, tmp_path, capsys):
    command = [*road.inputs, "--out", str(tmp_path / "s"), *SMALL]
    assert generate_spectrum.main(command) == 0
    assert contents(tmp_path / "s") == contents(road.spectrum)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.png")}
    assert generate_spectrum.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.png")} == before
    assert "165 done, 0 to draw" in capsys.readouterr().out


def test_a_changed_plan_stops_and_shows_the_difference(road, tmp_path):
    generate_spectrum.main(
        [*road.inputs, "--out", str(tmp_path / "s"), "--levels", "90", "--seeds", "1", "--steps", "4"]
    )
    before = contents(tmp_path / "s")
    with pytest.raises(UserError, match=r"text_guidance is 3.0 there, 7.0 here"):
        generate_spectrum.main(
            [*road.inputs, "--out", str(tmp_path / "s"), "--levels", "90", "--seeds", "1", "--steps", "4",
             "--text-guidance", "7"]
        )  # fmt: skip
    assert contents(tmp_path / "s") == before


def test_missing_and_damaged_images_are_drawn_again(road, tmp_path):
    command = [*road.inputs, "--out", str(tmp_path / "s"), *SMALL]
    shutil.copytree(road.spectrum, tmp_path / "s")
    images = sorted((tmp_path / "s").rglob("*.png"))
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:60])
    with (tmp_path / "s/shard-00000/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "torn')
    assert generate_spectrum.main(command) == 0
    assert contents(tmp_path / "s") == contents(road.spectrum)
    assert rows_of(tmp_path / "s").keys() == rows_of(road.spectrum).keys()


def test_blank_and_broken_images_are_not_good():
    images = torch.rand(3, 3, 8, 8)
    images[1] = 0.5
    images[2, 0, 0, 0] = float("nan")
    assert generators.is_good(images).tolist() == [True, False, False]


def test_a_generator_that_draws_nothing_but_black_fails_the_job_and_keeps_nothing(road, tmp_path, capsys):
    """Its decoder's last layer is zero: every image is of one colour."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(TINY)
    torch.nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(pipe.vae.decoder.conv_out.bias)
    pipe.save_pretrained(tmp_path / "black")
    command = [*road.inputs, "--generator", str(tmp_path / "black"), "--out", str(tmp_path / "s")]
    assert generate_spectrum.main([*command, "--levels", "90", "--seeds", "1", "--steps", "4"]) == 1
    assert contents(tmp_path / "s") == {}
    assert "55 images stayed blank" in capsys.readouterr().out


def write_hard(path: Path, names: list[tuple[str, int, str]]) -> None:
    tables.write_hard(
        path,
        [{"source": source, "label": label, "class_name": name, "reason": "few", "score": 1}
         for source, label, name in names],
    )  # fmt: skip


def image_folder(folder: Path) -> list[str]:
    """Flags by which the files in `folder` are sources of a data set of one's own, drawn with an embedded model."""
    for split in ("train", "val", "test"):
        (folder / split / "zero").mkdir(parents=True)
        Image.new("RGB", (16, 16), "white").save(folder / split / "zero/0.png")
    return ["--dataset", "imagefolder", "--data-root", str(folder), "--generator", TINY, "--text-guidance", "3"]


def test_sources_may_be_files_of_any_size_and_hostile_class_names_survive(tmp_path):
    names = ["a/b", "..", 'say "hi" {0}', "crème brûlée", "a/b"]
    rng = np.random.default_rng(0)
    for label in range(len(names)):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        pixels = rng.integers(0, 256, (17 + label, 21, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / str(label) / "x y.png")
    write_hard(tmp_path / "hard.csv", [(f"{label}/x y.png", label, name) for label, name in enumerate(names)])
    import filter_clipscore
    import write_prompts

    hard, prompts, out = tmp_path / "hard.csv", tmp_path / "prompts.json", tmp_path / "s"
    write_prompts.main(["--dataset", "imagefolder", "--hard", str(hard), "--out", str(prompts)])
    flags = [*image_folder(tmp_path / "images"), *SMALL]
    assert generate_spectrum.main(["--hard", str(hard), "--prompts", str(prompts), "--out", str(out), *flags]) == 0
    rows = spectrum_folder.read_rows(out, decode=True)
    assert {row["label"]: row["class_name"] for row in rows} == dict(enumerate(names))
    assert {(row["label"], row["width"], row["height"]) for row in rows} == {
        (0, 20, 16), (1, 20, 18), (2, 20, 18), (3, 20, 20), (4, 20, 20)
    }  # fmt: skip
    command = ["--spectrum", str(out), "--prompts", str(prompts), *flags[:4], "--clip", str(ASSETS / "tiny_clip")]
    assert filter_clipscore.main(command) == 0
    assert len(tables.read_scores(out / "scores.csv")) == 15


def test_an_unreadable_source_is_named_before_the_model_loads(road, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    write_hard(tmp_path / "hard.csv", [("broken.png", 3, "three")])
    command = ["--hard", str(tmp_path / "hard.csv"), "--prompts", str(road.prompts), "--out", str(tmp_path / "s")]
    with pytest.raises(UserError, match=r"source broken.png: not a readable image"):
        generate_spectrum.main([*command, *image_folder(tmp_path)])
    assert not (tmp_path / "s").exists()


def test_bad_input_is_one_line_and_exit_code_2(road, tmp_path, capfd):
    empty = tmp_path / "empty.csv"
    empty.write_text("source,label,class_name,reason,score\n")
    base = ["--prompts", str(road.prompts), "--out", str(tmp_path / "s")]
    cases = {
        "no hard images": ["--hard", str(empty)],
        "--levels 100": ["--hard", str(road.hard), "--levels", "0", "100"],
        "'101': expected a whole number": ["--hard", str(road.hard), "--levels", "101"],
        "-1": ["--hard", str(road.hard), "--levels", "-1"],
        "no such file": ["--hard", str(tmp_path / "none.csv")],
        "--dataset": ["--hard", str(road.hard), "--dataset", "mnist"],
        "--generator /no/such/model": ["--hard", str(road.hard), "--generator", "/no/such/model"],
    }
    for message, extra in cases.items():
        with pytest.raises(SystemExit) as left:
            cli.run(lambda extra=extra: generate_spectrum.main([*base, *extra]))
        said = capfd.readouterr().err
        assert left.value.code == 2, message
        assert message in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "s").exists()


def test_the_public_imagefolder_loader_reads_a_filtered_spectrum(road, tmp_path):
    script = (
        "import json, sys, datasets\n"
        "found = datasets.load_dataset('imagefolder', data_dir=sys.argv[1], split='train', cache_dir=sys.argv[2])\n"
        "first = found[0]\n"
        "print(json.dumps([len(found), sorted(found.column_names), first['image'].size, first['label']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(road.spectrum), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    count, columns, size, label = json.loads(done.stdout.strip().splitlines()[-1])
    assert count == 165 and size == [16, 16] and label in range(3, 10)
    assert {"image", "source", "level", "seed", "prompt", "label"} <= set(columns)
