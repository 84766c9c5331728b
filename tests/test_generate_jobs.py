"""Spectrum generation as a job: shards, signals, bad sources, a full disk, further units, checks, other generators."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_generate import TINY, contents, image_folder, rows_of, write_hard

import datasets
import generate_spectrum
import models
from bench import bench_spectrum as bench
from generation import generator as generators
from generation import job, loras, worklist
from generation.known import GENERATORS
from generation.writer import save_image
from loaders.sources import Sources
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import Unit

HEADER = "source,level,seed,prompt\n"


@pytest.fixture(scope="module")
def few(road, tmp_path_factory):
    """Arguments of a small job, 6 sources x 2 levels x 2 seeds in batches of 5, and the folder that it makes."""
    folder = tmp_path_factory.mktemp("few")
    lines = road.hard.read_text().splitlines(keepends=True)
    (folder / "hard.csv").write_text("".join(lines[:7]))
    command = ["--hard", str(folder / "hard.csv"), "--prompts", str(road.prompts), "--steps", "4", "--batch-size", "5"]
    command += ["--levels", "50", "90", "--seeds", "2"]
    assert generate_spectrum.main([*command, "--out", str(folder / "s")]) == 0
    assert spectrum_folder.check(folder / "s") == (24, [])
    return command, folder / "s"


def draw(few, out: Path, *more, code: int = 0) -> Path:
    """Run the small job into `out`, and check what it made."""
    assert generate_spectrum.main([*few[0], "--out", str(out), *map(str, more)]) == code
    assert spectrum_folder.check(out)[1] == []
    return out


def failures(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "shard-00000/failures.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# shards and signals


def test_shards_draw_the_same_bytes_and_their_number_may_change(few, tmp_path):
    out = tmp_path / "s"
    draw(few, out, "--shard", "0/2")
    part = contents(out)
    assert 0 < len(part) < 24
    for index in range(3):
        draw(few, out, "--shard", f"{index}/3")
    assert contents(out) == contents(few[1])
    assert len(spectrum_folder.read_rows(out, decode=True)) == 24
    assert part.items() <= contents(out).items()


def test_a_second_process_on_a_shard_leaves_at_once(few, tmp_path):
    out = tmp_path / "s"
    with spectrum_folder.claim(out, 0, 2, 5):
        with pytest.raises(UserError, match="--shard 0/2: another process is drawing"):
            draw(few, out, "--shard", "0/2")
        with pytest.raises(UserError, match="is being drawn in 2 shards and batches of 5; expected the same"):
            draw(few, out, "--shard", "1/3")
        with pytest.raises(
            UserError, match="--shard 1/2, --batch-size 4: .* is being drawn in 2 shards and batches of 5"
        ):
            draw(few, out, "--shard", "1/2", "--batch-size", "4")
        draw(few, out, "--shard", "1/2")
        assert not (out / "shard-00000/metadata.jsonl").exists()
    draw(few, out)
    assert contents(out) == contents(few[1])


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_a_shard_is_one_of_n(text, capsys):
    with pytest.raises(SystemExit):
        generate_spectrum.build_parser().parse_args(["--shard", text])
    assert "--shard" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_the_job_after_the_batch_in_flight(few, tmp_path, monkeypatch, number, capsys):
    before, real = signal.getsignal(number), generators.to_host

    def to_host(drawn):
        os.kill(os.getpid(), number)
        return real(drawn)

    with monkeypatch.context() as patched:
        patched.setattr(generators, "to_host", to_host)
        draw(few, tmp_path / "s", code=75)
    assert len(contents(tmp_path / "s")) == 5
    assert f"{number.name} after 5 images; run the same command again" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    draw(few, tmp_path / "s")
    assert contents(tmp_path / "s") == contents(few[1])


def test_a_batch_cut_in_two_is_drawn_whole_so_that_not_a_bit_changes(few, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(few[1], out)
    rows = (out / "shard-00000/metadata.jsonl").read_text().splitlines(keepends=True)
    (out / "shard-00000/metadata.jsonl").write_text("".join(rows[:7]) + rows[7][:30])
    for row in rows[8:]:
        (out / "shard-00000" / json.loads(row)["file_name"]).unlink()
    draw(few, out)
    assert contents(out) == contents(few[1])


def test_what_is_kept_in_memory_does_not_change_the_images(few, tmp_path):
    assert contents(draw(few, tmp_path / "s", "--cache-mb", "0")) == contents(few[1])


def test_batches_that_do_not_fit_into_memory_are_drawn_in_parts(few, tmp_path, monkeypatch, capsys):
    draw_all, sizes = generators.Generator.draw, []

    def draw_few(self, batch, *rest):
        sizes.append(len(batch.units))
        if len(batch.units) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_all(self, batch, *rest)

    monkeypatch.setattr(generators.Generator, "draw", draw_few)
    out = draw(few, tmp_path / "s")
    assert sizes[:4] == [5, 2, 2, 1] and max(sizes[1:]) == 2  # found out once
    assert "5 images of 16x16 do not fit into this device's memory: 2 at once" in capsys.readouterr().out
    assert rows_of(out) == rows_of(few[1])
    for name in rows_of(out):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (out, few[1]))
        assert abs(a - b).max() <= 1
    monkeypatch.setattr(generators.Generator, "draw", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="--size: one image of 16x16 does not fit"):
        generate_spectrum.main([*few[0], "--out", str(tmp_path / "t")])


def test_an_autoencoder_that_needs_more_memory_goes_in_parts_and_no_denoising_is_lost(monkeypatch):
    pipe = models.load_generator(TINY, "cpu")
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    names = "abcde"
    batch = worklist.Batch(50, (16, 16), None, [Unit(name, 50, 0) for name in names])
    pictures = {name: source.rotate(90 * place) for place, name in enumerate(names)}
    expected = generators.Generator(pipe, steps=4, text_guidance=3.0).draw(batch, 0, ["a nine"] * 5, pictures)
    met = {"encode": [], "decode": [], "unet": []}

    def limit(half: str, most: int) -> None:
        real = getattr(pipe.vae, half)

        def run(images, *rest, **options):
            met[half].append(len(images))
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(images, *rest, **options)

        monkeypatch.setattr(pipe.vae, half, run)

    limit("encode", 2)
    limit("decode", 3)
    pipe.unet.register_forward_pre_hook(lambda *_: met["unet"].append(0))
    generator = generators.Generator(pipe, steps=4, text_guidance=3.0)
    drawn = generator.draw(batch, 0, ["a nine"] * 5, pictures)
    assert met["encode"] == [5, 2, 2, 1] and met["decode"] == [5, 2, 2, 1] and len(met["unet"]) == 2
    assert (drawn - expected).abs().max() < 1e-4
    # Known in pixels: of images twice as wide one goes at a time, without another try.
    wide = batch._replace(size=(32, 16))
    generator.draw(wide, 0, ["a nine"] * 5, {name: image.resize((32, 16)) for name, image in pictures.items()})
    assert met["encode"][4:] == [1] * 5 and met["decode"][4:] == [1] * 5


def test_an_error_of_the_writer_ends_the_job(few, tmp_path, monkeypatch):
    def fail_once(image, path):
        monkeypatch.setattr("generation.writer.save_image", save_image)
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")

    monkeypatch.setattr("generation.writer.save_image", fail_once)
    with pytest.raises(UnicodeEncodeError):
        generate_spectrum.main([*few[0], "--out", str(tmp_path / "s")])
    draw(few, tmp_path / "s")
    assert contents(tmp_path / "s") == contents(few[1])


def failing_for(bad: str):
    """Sources.size, to which one source is not there."""
    real = Sources.size

    def size(self, name):
        if name == bad:
            raise UserError(f"source {name}: not there just now")
        return real(self, name)

    return size


def test_a_source_that_one_shard_cannot_open_moves_nothing(few, tmp_path, monkeypatch):
    """The first of two shards sees all sources, the second one source less; each unit is drawn once."""
    out = tmp_path / "s"
    names = [row.source for row in tables.read_hard(Path(few[0][1]))]
    draw(few, out, "--shard", "0/2")
    monkeypatch.setattr(Sources, "size", failing_for(names[0]))
    draw(few, out, "--shard", "1/2")
    assert contents(out) == contents(few[1])
    assert len(list(out.glob("shard-*/*.png"))) == 24
    assert len((out / "sizes-00000.csv").read_text().splitlines()) == 1 + len(names)


def test_a_source_that_no_process_could_open_is_laid_out_by_itself_once_it_can_be(few, tmp_path, monkeypatch):
    out = tmp_path / "s"
    name = [row.source for row in tables.read_hard(Path(few[0][1]))][2]
    with monkeypatch.context() as patched:
        patched.setattr(Sources, "size", failing_for(name))
        draw(few, out, "--shard", "0/2", code=1)
    before = contents(out)
    for index in ("1/2", "0/2"):
        draw(few, out, "--shard", index)
    assert before.items() <= contents(out).items()
    assert len(list(out.glob("shard-*/*.png"))) == len(contents(out)) == 24
    assert (out / "sizes-00001.csv").read_text().splitlines()[1].startswith(name)


def test_a_unit_in_two_shards_counts_once(few, tmp_path, road, capsys):
    import filter_clipscore

    out = tmp_path / "s"
    shutil.copytree(few[1], out)
    shutil.copytree(out / "shard-00000", out / "shard-00003")
    assert len(spectrum_folder.read_rows(out)) == len(spectrum_folder.read_made(out)) == 24
    assert spectrum_folder.check(out)[0] == 24
    assert filter_clipscore.main(["--spectrum", str(out), "--prompts", str(road.prompts), "--threshold", "-1"]) == 0
    assert "24 of 24 images kept" in capsys.readouterr().out
    for path in (out / "shard-00000").glob("*.png"):
        path.unlink()
    assert {row["file_name"].partition("/")[0] for row in spectrum_folder.read_made(out)} == {"shard-00003"}


def test_a_file_system_without_locks_is_said_and_used(few, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("runtime.files.fcntl.flock", flock)
    draw(few, tmp_path / "s")
    assert "no locks on this file system (No locks available): see to it" in capsys.readouterr().out
    assert contents(tmp_path / "s") == contents(few[1])


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_levels_of_equal_steps_are_refused(few, tmp_path):
    with pytest.raises(UserError, match="--levels 80 90: both are 1 of --steps 4; expected levels that differ"):
        draw(few, tmp_path / "s", "--levels", "50", "80", "90")


def test_a_source_that_changed_since_is_found_before_drawing(tmp_path, road, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / name)
    write_hard(tmp_path / "hard.csv", [(name, 3, "three") for name in ("a.png", "b.png")])
    command = [*image_folder(folder), "--hard", str(tmp_path / "hard.csv"), "--prompts", str(road.prompts)]
    command += ["--levels", "50", "90", "--seeds", "1", "--steps", "4", "--out", str(tmp_path / "s")]
    assert generate_spectrum.main(command) == 0
    next((tmp_path / "s").glob("shard-*/*level090*.png")).unlink()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), "green").save(folder / name)
    monkeypatch.setattr(models, "load_generator", None)  # not even loaded
    with pytest.raises(UserError, match="2 sources have changed since images were drawn from them, the first a"):
        generate_spectrum.main(command)


def test_odd_and_broken_sources(tmp_path, road):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    pixels.save(folder / "good.png")
    pixels.convert("CMYK").save(folder / "cmyk.jpg")
    pixels.quantize(16).save(folder / "palette.png")
    Image.fromarray(np.full((20, 30), 32896, dtype=np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken on its side
    pixels.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    (folder / "zero.png").touch()
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:900])
    names = sorted(path.name for path in folder.iterdir()) + ["missing.png"]
    write_hard(tmp_path / "hard.csv", [(name, 3, "three") for name in names])
    command = [*image_folder(folder), "--hard", str(tmp_path / "hard.csv"), "--prompts", str(road.prompts)]
    command += ["--levels", "90", "--seeds", "1", "--steps", "4", "--out", str(tmp_path / "s")]
    assert generate_spectrum.main(command) == 1
    bad = ["corrupt.png", "cut.png", "missing.png", "zero.png"]
    assert [failure["source"] for failure in failures(tmp_path / "s")] == bad
    assert all(name in failure["reason"] for name, failure in zip(bad, failures(tmp_path / "s"), strict=True))
    rows = {row["source"]: row for row in spectrum_folder.read_rows(tmp_path / "s", decode=True)}
    assert sorted(rows) == [name for name in names if name not in bad]
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == {
        "good.png": (30, 20), "cmyk.jpg": (30, 20), "palette.png": (30, 20), "sixteen.png": (30, 20),
        "turned.jpg": (20, 30), "one.png": (2, 2),
    }  # fmt: skip
    assert spectrum_folder.check(tmp_path / "s") == (6, [])
    sources = Sources(datasets.load("digits", 30).train, folder)
    assert np.asarray(sources.read("sixteen.png")[0]).tolist() == [[[128] * 3] * 30] * 20  # 32896 = 128 * 257
    # A source that is mended is drawn by the next run, and is no failure any more.
    for name in bad:
        shutil.copy(folder / "good.png", folder / name)
    assert generate_spectrum.main(command) == 0
    assert spectrum_folder.check(tmp_path / "s") == (10, [])
    assert not (tmp_path / "s/shard-00000/failures.jsonl").exists()


def test_sources_of_another_data_set_stop_the_job(few, tmp_path):
    names = [*(row.source for row in tables.read_hard(Path(few[0][1]))), "index:99999"]
    write_hard(tmp_path / "hard.csv", [(name, 3, "three") for name in names])
    with pytest.raises(UserError, match="source index:99999: not a training image of this data set"):
        draw(few, tmp_path / "s", "--hard", tmp_path / "hard.csv")
    assert not (tmp_path / "s").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(few, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(UserError, match="No space left on device; .* free some space and run the same command"):
            generate_spectrum.main([*few[0], "--out", str(disk / "s")])
        count, wrong = spectrum_folder.check(disk / "s")
        assert count < 24 and not [line for line in wrong if "has no row" not in line]
        assert not list(disk.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        draw(few, disk / "s")
        assert contents(disk / "s") == contents(few[1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nan_from_the_model_is_never_saved_and_listed(few, tmp_path, monkeypatch, capsys):
    """The last image of the first batch is not finite however often it is drawn."""
    real, spoilt = generators.Generator.draw, {}

    def spoil(self, batch, *rest):
        drawn = real(self, batch, *rest).clone()
        spoilt.setdefault("unit", batch.units[-1])
        for place, unit in enumerate(batch.units):
            if unit == spoilt["unit"]:
                drawn[place, 0, 0, 0] = float("nan")
        return drawn

    monkeypatch.setattr(generators.Generator, "draw", spoil)
    out = draw(few, tmp_path / "s", code=1)
    assert [Unit(row["source"], row["level"], row["seed"]) for row in failures(out)] == [spoilt["unit"]]
    expected = {name: image for name, image in contents(few[1]).items() if name != spoilt["unit"].file_name}
    assert contents(out) == expected
    assert "1 image stayed blank or not finite after 3 redraws" in capsys.readouterr().out


def test_a_model_that_gives_nothing_but_nan_is_noticed_early(few, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("generation.job.TRIAL", 5)
    monkeypatch.setattr(
        generators.Generator,
        "draw",
        lambda self, batch, *_: calls.append(0) or torch.full((len(batch.units), 3, 16, 16), torch.nan),
    )
    with pytest.raises(UserError, match="images are blank or not finite: .* does not work in float32"):
        generate_spectrum.main([*few[0], "--levels", "90", "--out", str(tmp_path / "s")])
    assert len(calls) < 4


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def test_further_units_are_drawn_once_and_belong_to_the_plan_from_then_on(few, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(few[1], out)
    first, second = [row.source for row in tables.read_hard(Path(few[0][1]))[:2]]
    more = tmp_path / "more.csv"
    more.write_text(HEADER + f"{first},90,7,a nine in red ink\n{second},30,0,\n{second},90,1,\n")
    draw(few, out, "--also-draw", more)
    rows = {(row["source"], row["level"], row["seed"]): row for row in rows_of(out).values()}
    assert len(rows) == 26  # the third is in the plan already
    assert rows[first, 90, 7]["prompt"] == "a nine in red ink"
    assert rows[second, 30, 0]["prompt"]
    before = contents(out)
    for name in set(before) - set(contents(few[1])):
        next(out.glob(f"shard-*/{name}")).unlink()
    draw(few, out)  # without --also-draw: the folder remembers
    assert contents(out) == before
    draw(few, out, "--also-draw", more)
    assert len(list(out.glob("extra-*.csv"))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nowhere,90,7,\n", "row 2: source 'nowhere': expected one of hard.csv"),
        ("{source},100,7,\n", "row 2: expected a level from 0 to 99"),
        ("{source},90,-1,\n", "row 2: expected a level from 0 to 99 and a seed"),
        ("{source},90,7,a\n{source},90,7,b\n", "row 3: .* is there before with the prompt 'a'"),
        ("{source},90,1,another prompt\n", "is in the plan with the prompt"),
    ],
)
def test_bad_further_units_are_named(few, tmp_path, row, message):
    (tmp_path / "more.csv").write_text(HEADER + row.format(source=tables.read_hard(Path(few[0][1]))[0].source))
    with pytest.raises(UserError, match=message):
        generate_spectrum.main(
            [*few[0], "--out", str(tmp_path / "s"), "--also-draw", str(tmp_path / "more.csv"), "--dry-run"]
        )


def test_a_dry_run_counts_and_touches_nothing(few, tmp_path, capsys):
    out = tmp_path / "s"
    assert generate_spectrum.main([*few[0], "--out", str(out), "--dry-run", "--steps-per-second", "0.01"]) == 0
    text = capsys.readouterr().out
    # 12 images of 2 steps and 12 of 1 are 36 steps: one hour at 0.01 steps a second
    assert "level 50: 12 images of 2 steps" in text and "level 90: 12 images of 1 step" in text
    assert "24 images, 6 batches, 36 denoising steps: 1.00 hours at 0.01 steps a second" in text
    assert not out.exists()
    generate_spectrum.main([*few[0], "--out", str(few[1]), "--dry-run"])
    assert "24 done, 0 to draw" in capsys.readouterr().out


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_images_may_be_drawn_large_and_saved_small_in_other_formats(few, tmp_path, image_format):
    out = draw(
        few, tmp_path / "s", "--size", "32x24", "--save-size", "source", "--format", image_format, "--levels", "90"
    )
    paths = [path for path in out.glob("shard-*/*") if path.suffix == f".{image_format}"]
    assert len(paths) == 12
    sources = Sources(datasets.load("digits", 30).train, None)
    for row in rows_of(out).values():
        image = Image.open(out / row["file_name"])
        assert image.size == (row["width"], row["height"]) == (16, 16)
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[image_format]
        real = np.asarray(sources.read(row["source"])[0]).astype(int)
        assert (
            abs(np.asarray(image.convert("RGB")).astype(int) - real).mean() < 70
        )  # a generator for 16x16, but level 90


def test_the_native_size_of_an_unknown_generator_is_asked_for(few, tmp_path):
    with pytest.raises(UserError, match="--size native: not known for"):
        draw(few, tmp_path / "s", "--size", "native")


# ---------------------------------------------------------------------------------------------------------------------
# the check


def test_the_check_names_what_is_wrong(few, tmp_path, capsys):
    out = tmp_path / "s"
    shutil.copytree(few[1], out)
    shard = out / "shard-00000"
    rows = [json.loads(line) for line in (shard / "metadata.jsonl").read_text().splitlines()]
    del rows[0]["prompt"]
    rows[1]["width"] = 17
    rows[2]["level"] = "90"
    rows[3]["revision"] = "other"
    rows[4]["label"] = 0
    (shard / rows[5]["file_name"]).write_bytes(b"no image")
    (shard / rows[6]["file_name"]).rename(shard / "renamed.png")
    rows[6]["file_name"] = "renamed.png"
    Image.new("RGB", (16, 16)).save(shard / "orphan.png")
    (shard / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate_spectrum.main(["--out", str(out), "--validate"]) == 1
    text = capsys.readouterr().out
    for part in ("row 1: prompt is None", "is 16x16, its row has 17x16", "row 3: level is '90'", "row 4: revision is",
                 "row 5: level 50 of class 0 is not", "does not decode", "row 7: shard-00000/renamed.png should be",
                 "orphan.png: has no row"):  # fmt: skip
        assert part in text, part
    assert generate_spectrum.main(["--out", str(few[1]), "--validate"]) == 0
    with pytest.raises(UserError, match="no plan.json"):
        generate_spectrum.main(["--out", str(tmp_path), "--validate"])


# ---------------------------------------------------------------------------------------------------------------------
# generators


TINY_REFINER = {
    # Groups of several channels: those of one channel and one pixel would blow rounding errors up.
    "unet": bench.SMALL["unet"]
    | {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": (1, 2, 2, 2), "norm_num_groups": 4},
    "vae": bench.SMALL["vae"] | {"block_out_channels": (8, 16, 16, 16)},
    "text": bench.SMALL["text"] | {"num_hidden_layers": 1},
}


def tiny_base():
    """An SDXL base in small: two text encoders, and no aesthetic score."""
    from diffusers import StableDiffusionXLImg2ImgPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = TINY_REFINER["unet"] | {"cross_attention_dim": 128, "projection_class_embeddings_input_dim": 64 + 6 * 16}
    parts = bench.build_refiner(TINY_REFINER | {"unet": unet}).components
    config = {name: value for name, value in TINY_REFINER["text"].items() if name != "projection_dim"}
    parts |= {"text_encoder": CLIPTextModel(CLIPTextConfig(**config)).eval(), "tokenizer": parts["tokenizer_2"]}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=False, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("level", [0, 70])
@pytest.mark.parametrize("build", [lambda: bench.build_refiner(TINY_REFINER), tiny_base], ids=["refiner", "base"])
def test_sdxl_batches_equal_plain_calls(build, level, tmp_path):
    """Conditioning on sizes and aesthetic score holds for every image of a batch, also after saving and loading."""
    build().save_pretrained(tmp_path / "xl")
    pipe = models.load_generator(str(tmp_path / "xl"), "cpu")
    assert pipe.watermark is None and models.latent_multiple(str(tmp_path / "xl")) == 8
    rng = np.random.default_rng(0)
    units = [Unit(name, level, 0) for name in "abc"]
    sources = {name: Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for name in "abc"}
    texts = ["a nine", "a nine in red ink", "a zero"]
    generator = generators.Generator(pipe, steps=4, text_guidance=5.0)
    drawn = generator.draw(worklist.Batch(level, (64, 48), None, units), 0, texts, sources)
    for ours, unit, text in zip(drawn, units, texts, strict=True):
        plain = pipe(
            text, image=sources[unit.source], strength=1.0 if level == 0 else 0.3, num_inference_steps=4,
            guidance_scale=5.0, generator=torch.Generator().manual_seed(unit.noise_seed()), output_type="pt",
        ).images[0]  # fmt: skip
        assert ours.shape == (3, 48, 64)
        assert (ours - plain).abs().max() < 1e-4
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def draw_one(generator, level: int, source: Image.Image, pad_to: int = 0) -> torch.Tensor:
    batch = worklist.Batch(level, (16, 16), None, [Unit("a", level, 0)])
    generator.cache.entries.clear()
    return generator.draw(batch, 0, ["a nine"], {"a": source}, pad_to)


@pytest.mark.parametrize("scheduler", ["shipped", "ddim", "euler"])
def test_pure_noise_leaves_no_trace_of_the_source_and_is_text_to_image(scheduler):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.torch_utils import randn_tensor

    pipe = models.load_generator(TINY, "cpu", scheduler=scheduler)
    black, white = Image.new("RGB", (16, 16), "black"), Image.new("RGB", (16, 16), "white")
    pure = generators.Generator(pipe, steps=4, text_guidance=3.0, pure_noise=True)
    assert torch.equal(draw_one(pure, 0, black), draw_one(pure, 0, white))
    assert not torch.equal(draw_one(pure, 50, black), draw_one(pure, 50, white))
    paper = generators.Generator(pipe, steps=4, text_guidance=3.0)
    assert not torch.equal(draw_one(paper, 0, black), draw_one(paper, 0, white))

    # The same start handed to the text-to-image pipeline.
    noise = torch.Generator().manual_seed(Unit("a", 0, 0).noise_seed())
    first, second = (randn_tensor((1, 4, 8, 8), generator=noise) for _ in range(2))
    pipe.scheduler.set_timesteps(4)
    start = pipe.scheduler.add_noise(first, second, pipe.scheduler.timesteps[:1])
    text = StableDiffusionPipeline(**{**pipe.components, "safety_checker": None}, requires_safety_checker=False)
    text.set_progress_bar_config(disable=True)
    expected = text(
        "a nine", latents=start / pipe.scheduler.init_noise_sigma, num_inference_steps=4, guidance_scale=3.0,
        height=16, width=16, output_type="pt",
    ).images  # fmt: skip
    assert (draw_one(pure, 0, black) - expected).abs().max() < 1e-4


def test_a_padded_batch_has_one_shape_and_gives_the_same_images():
    pipe = models.load_generator(TINY, "cpu")
    generator = generators.Generator(pipe, steps=4, text_guidance=3.0)
    shapes = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    alone, padded = draw_one(generator, 50, source), draw_one(generator, 50, source, pad_to=4)
    assert set(shapes) == {2, 8}  # twice the images, for classifier-free guidance
    assert padded.shape == alone.shape and (padded - alone).abs().max() < 1e-4


def test_a_compiled_model_meets_few_sizes_of_batches():
    assert [job.pad_size(count, 24) for count in (1, 2, 3, 5, 9, 16, 17, 24)] == [1, 2, 4, 8, 16, 16, 24, 24]


def test_compiling_pads_batches_to_few_shapes(few, tmp_path, monkeypatch):
    compiled, shapes, real = [], set(), models.load_generator

    def load(*arguments):
        pipe = real(*arguments)
        pipe.unet.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
        return pipe

    monkeypatch.setattr(models, "load_generator", load)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    out = draw(few, tmp_path / "s", "--compile")
    # Of 12 units of a level five, five and two, each twice for classifier-free guidance.
    assert compiled == ["UNet2DConditionModel"] and shapes == {(10, 4, 8, 8), (4, 4, 8, 8)}
    assert rows_of(out) == rows_of(few[1])
    for name in rows_of(out):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (out, few[1]))
        assert abs(a - b).max() <= 1


def test_without_text_guidance_images_equal_plain_calls_too():
    """As SDXL-Turbo wants it: no second pass under the empty text."""
    pipe = models.load_generator(TINY, "cpu")
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    drawn = draw_one(generators.Generator(pipe, steps=4, text_guidance=0.0), 50, source)
    plain = pipe(
        "a nine", image=source, strength=0.5, num_inference_steps=4, guidance_scale=0.0, output_type="pt",
        generator=torch.Generator().manual_seed(Unit("a", 50, 0).noise_seed()),
    ).images  # fmt: skip
    assert (drawn - plain).abs().max() < 1e-4


def test_a_pipeline_of_any_other_kind_is_called_with_images_and_texts(monkeypatch):
    pipe = models.load_generator(TINY, "cpu")
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    expected = draw_one(generators.Generator(pipe, steps=4, text_guidance=3.0), 50, source)
    monkeypatch.setattr(generators, "LATENT_PIPELINES", {})
    other = generators.Generator(pipe, steps=4, text_guidance=3.0)
    assert (draw_one(other, 50, source) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("level", [0, 50])
def test_pndm_takes_one_timestep_twice_and_is_let(level):
    """The scheduler that Stable Diffusion 1.5 and 2.1-base, DataDream's generator, ship with."""
    from diffusers import PNDMScheduler

    pipe = models.load_generator(TINY, "cpu")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    generator = generators.Generator(pipe, steps=4, text_guidance=3.0)
    assert draw_one(generator, level, Image.linear_gradient("L").resize((16, 16)).convert("RGB")).isfinite().all()


def test_a_pipeline_that_runs_other_steps_than_recorded_stops_the_job(monkeypatch):
    generator = generators.Generator(models.load_generator(TINY, "cpu"), steps=4, text_guidance=3.0)
    monkeypatch.setattr(generators.Generator, "strength_of", lambda self, run: 0.9)
    with pytest.raises(UserError, match="ran 3 denoising steps where 2 were asked for"):
        draw_one(generator, 50, Image.new("RGB", (16, 16), "grey"))


def test_a_pipeline_without_a_strength_is_refused():
    from diffusers import StableDiffusionPipeline

    parts = models.load_generator(TINY, "cpu").components
    text = StableDiffusionPipeline(**parts | {"safety_checker": None}, requires_safety_checker=False)
    with pytest.raises(UserError, match="StableDiffusionPipeline has no strength"):
        generators.Generator(text, steps=4, text_guidance=3.0)


def test_a_signal_between_denoising_steps_ends_the_job_without_the_batch_in_flight(few, tmp_path, monkeypatch):
    real = models.load_generator

    def load(*arguments):
        pipe = real(*arguments)
        pipe.unet.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return pipe

    with monkeypatch.context() as patched:
        patched.setattr(models, "load_generator", load)
        draw(few, tmp_path / "s", code=75)
    assert contents(tmp_path / "s") == {}
    draw(few, tmp_path / "s")
    assert contents(tmp_path / "s") == contents(few[1])


def test_prompts_that_the_generator_cuts_are_counted_and_may_be_an_error(few, tmp_path, road, capsys):
    tokenizer = models.load_generator(TINY, "cpu").tokenizer
    longest = "nine " * (tokenizer.model_max_length - 2)  # and the marks of begin and end
    prompts = json.loads(road.prompts.read_text())
    label = str(tables.read_hard(Path(few[0][1]))[0].label)
    prompts[label]["prompts"] = [longest.strip(), (longest + "nine").strip()]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    command = [*few[0], "--prompts", str(tmp_path / "p.json"), "--levels", "90", "--out"]
    with pytest.raises(UserError, match=r"--prompts: 1 of \d+ prompts are longer than .* reads, the first 'nine nine"):
        generate_spectrum.main([*command, str(tmp_path / "s"), "--on-long-prompt", "error"])
    assert generate_spectrum.main([*command, str(tmp_path / "t")]) == 0
    assert "prompts are longer than" in capsys.readouterr().out


def test_latents_of_another_number_of_channels_are_no_images():
    """diffusers takes what has four channels for latents, and would encode latents of eight as if they were images."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = models.load_generator(TINY, "cpu")
    vae, unet = dict(pipe.vae.config), dict(pipe.unet.config)
    pipe.register_modules(
        vae=AutoencoderKL.from_config(vae | {"latent_channels": 8}).eval(),
        unet=UNet2DConditionModel.from_config(unet | {"in_channels": 8, "out_channels": 8}).eval(),
    )
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    drawn = draw_one(generators.Generator(pipe, steps=4, text_guidance=3.0), 50, source)
    plain = pipe(
        "a nine", image=source, strength=0.5, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(Unit("a", 50, 0).noise_seed()),
    ).images  # fmt: skip
    assert (drawn - plain).abs().max() < 1e-4
    with pytest.raises(UserError, match="--pure-noise: not possible with StableDiffusionImg2ImgPipeline"):
        generators.Generator(pipe, steps=4, text_guidance=3.0, pure_noise=True)


def test_what_was_encoded_is_kept_within_its_bound():
    cache = generators.Cache(1)
    quarter = torch.zeros(2**16)  # of a MiB
    for key in "abcdef":
        cache.put(key, (quarter,))
        cache.missing(["a"])
        cache.shrink()
    assert list(cache.entries) == ["d", "e", "f", "a"] and cache.bytes == 2**20
    assert cache.missing(["a", "b", "b"]) == ["b"]
    cache.put("a", (quarter,))
    assert cache.bytes == 2**20


def test_known_generators_say_what_they_were_made_for():
    assert GENERATORS["stabilityai/stable-diffusion-xl-refiner-1.0"].native == 1024
    table = (ROOT / "docs/generators.md").read_text()
    for name, known in GENERATORS.items():
        assert name.count("/") == 1 and known.note and known.native % known.multiple == 0
        low, high = known.text_guidance
        line = f"| `{name}` | {known.native} | {known.steps} | {low:g} to {high:g} | {known.licence} | {known.note} |"
        assert line in table
    assert set(models.SCHEDULERS) == {"shipped", "ddim", "euler", "dpm++2m"}
    parser = generate_spectrum.build_parser()
    actions = {action.dest: action for action in parser._actions}
    assert set(actions["scheduler"].choices) == set(models.SCHEDULERS)
    assert set(actions["dtype"].choices) == {"auto", *models.DTYPES}


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

PLACE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


def save_lora(path: Path, pipe, place: str = PLACE, scale: float = 1.0) -> torch.Tensor:
    """A LoRA of rank 2 on one projection of the UNet, and what it adds to that projection's weight."""
    from safetensors.torch import save_file

    weight = pipe.unet.get_submodule(PLACE).weight
    seed = torch.Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=seed)
    up = torch.randn(weight.shape[0], 2, generator=seed) * scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"unet.{place}.lora_A.weight": down, f"unet.{place}.lora_B.weight": up}, path)
    return up @ down


def test_a_lora_draws_what_its_merged_weights_draw(tmp_path):
    source = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    merged = models.load_generator(TINY, "cpu")
    plain = draw_one(generators.Generator(merged, steps=4, text_guidance=3.0), 50, source)
    added = save_lora(tmp_path / "lora/pytorch_lora_weights.safetensors", merged)
    merged.unet.get_submodule(PLACE).weight.data += added
    expected = draw_one(generators.Generator(merged, steps=4, text_guidance=3.0), 50, source)
    adapted = models.load_generator(TINY, "cpu")
    loras.Adapters(adapted, loras.find_loras(tmp_path / "lora", None)).switch("all")
    drawn = draw_one(generators.Generator(adapted, steps=4, text_guidance=3.0), 50, source)
    assert (drawn - expected).abs().max() < 1e-4
    assert (drawn - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "build",
    [lambda: models.load_generator(TINY, "cpu"), lambda: bench.build_refiner(TINY_REFINER)],
    ids=["stable-diffusion", "sdxl"],
)
def test_loras_are_switched_where_the_encoder_alone_is_of_float32(build, tmp_path):
    """As on a GPU, whose generators are of bfloat16."""
    pipe = build()
    files = {f"class_{number}": tmp_path / f"{number}.safetensors" for number in (1, 2)}
    for number, path in enumerate(files.values(), start=1):
        save_lora(path, pipe, scale=number)
    pipe.to(torch.bfloat16)
    generator = generators.Generator(pipe, steps=2, text_guidance=2.0, adapters=loras.Adapters(pipe, files))
    drawn = []
    for name in files:
        batch = worklist.Batch(50, (64, 64), name, [Unit("a", 50, 0)])
        drawn.append(generator.draw(batch, 0, ["a nine"], {"a": Image.new("RGB", (64, 64), "grey")}))
        assert generator.encoder_dtype == torch.float32 == next(pipe.vae.encoder.parameters()).dtype
    assert not torch.equal(*drawn)


def test_loras_go_into_pipelines_for_masks_and_instructions_and_not_into_a_transformer(tmp_path):
    import tiny_editors
    import tiny_flow

    editor = tiny_editors.save_pix2pix_xl(tmp_path / "editor")
    for pipe in (models.load_generator(TINY, "cpu", masked=True), models.load_generator(str(editor), "cpu")):
        files = {"all": tmp_path / f"{type(pipe).__name__}.safetensors"}
        save_lora(files["all"], pipe)
        loras.Adapters(pipe, files).switch("all")
    with pytest.raises(UserError, match="Diffusion3.* draws with a transformer; expected a generator with a UNet"):
        loras.Adapters(tiny_flow.build_sd3(), files)


@pytest.mark.parametrize(
    ("place", "scale"), [(PLACE, 0.0), ("text_model.other.to_v", 1.0)], ids=["untrained", "no such layer"]
)
def test_a_lora_that_changes_nothing_stops_the_job(few, tmp_path, place, scale):
    save_lora(tmp_path / "a.safetensors", models.load_generator(TINY, "cpu"), place, scale)
    with pytest.raises(UserError, match="a.safetensors: (changes nothing|not a LoRA of this generator)"):
        draw(few, tmp_path / "s", "--lora", tmp_path / "a.safetensors")
    assert not (tmp_path / "s").exists()


def test_a_missing_lora_is_named(few, tmp_path):
    with pytest.raises(UserError, match="--lora .*none: expected a .safetensors file"):
        draw(few, tmp_path / "s", "--lora", tmp_path / "none")
    with pytest.raises(UserError, match="--lora-by-class .*: no adapter for class 3; expected 3.safetensors"):
        draw(few, tmp_path / "s", "--lora-by-class", tmp_path)


def test_each_class_is_drawn_with_its_own_lora(road, tmp_path):
    """Two classes, of which one has hardly any adapter at all: its images stay as they were, the other's do not."""
    hard = [row for row in tables.read_hard(road.hard) if row.label in (8, 9)]
    assert {row.label for row in hard} == {8, 9}
    write_hard(tmp_path / "hard.csv", [(row.source, row.label, row.class_name) for row in hard])
    command = ["--hard", str(tmp_path / "hard.csv"), "--prompts", str(road.prompts), "--steps", "4", "--seeds", "1"]
    command += ["--levels", "50"]
    pipe = models.load_generator(TINY, "cpu")
    save_lora(tmp_path / "loras/8.safetensors", pipe, scale=1e-4)
    save_lora(tmp_path / "loras/9/pytorch_lora_weights.safetensors", pipe)
    assert generate_spectrum.main([*command, "--out", str(tmp_path / "without")]) == 0
    adapted = [*command, "--out", str(tmp_path / "with"), "--lora-by-class", str(tmp_path / "loras")]
    assert generate_spectrum.main(adapted) == 0
    without, adapted = rows_of(tmp_path / "without"), rows_of(tmp_path / "with")
    for name, row in adapted.items():
        assert row == without[name]
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("without", "with"))
        assert (abs(a - b).max() > 3) == (row["label"] == 9)


# ---------------------------------------------------------------------------------------------------------------------
# the benchmark


def test_the_benchmark_compares_the_same_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.CONFIGS, "small", (TINY_REFINER, bench.CONFIGS["small"][1]))
    real, looks = generators.is_good, []

    def is_good(images):
        """The first image that is measured counts as blank, and is drawn anew after the others."""
        looks.append(1)
        return real(images) & (torch.arange(len(images)) >= (len(looks) == 2))

    monkeypatch.setattr(generators, "is_good", is_good)
    command = ["--sources", "3", "--plain-sources", "2", "--levels", "50", "90", "--steps", "4", "--size", "62x38"]
    command += ["--rounds", "1"]
    result = bench.main([*command, "--out", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["size"] == [64, 40] and 0 < result["unet_share_of_wall_time"] < 1
    assert result["largest_difference"] < 1e-4 and result["blank_images"] == 1
    assert result["ratio"] == pytest.approx(result["images_per_second"] / result["plain_images_per_second"])
    assert models.load_generator.__module__ == "models" and generators.to_host.__module__ == "generation.generator"


def test_the_benchmark_times_the_unet_and_counts_its_operations():
    pipe = bench.build_refiner(TINY_REFINER)
    generator = generators.Generator(pipe, steps=4, text_guidance=5.0)
    operations = []
    for size in ((64, 64), (128, 64)):
        batch = worklist.Batch(50, size, None, [Unit("a", 50, 0)])
        with bench.DenoiserTimer(pipe.unet) as timer:
            generator.draw(batch, 0, ["a nine"], {"a": Image.new("RGB", size)})
        assert timer.calls == 2 and timer.seconds > 0
        operations.append(bench.count_flops(pipe.unet, timer.last, 1))
    # Operations of convolutions and of attention's projections grow with the pixels.
    small, large = operations
    assert 1.5 * small < large < 2.5 * small
