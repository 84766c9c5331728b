"""The commands of docs/own_data.md, typed one after another on a folder of odd files."""

from __future__ import annotations

import re
import shlex

import forks
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

TINY = f"--clip {ROOT}/assets/tiny_clip"
# What makes a command cheap, appended to it as typed.
CHEAP = {
    "generate_spectrum": f"--generator {ROOT}/assets/tiny_sd --steps 10 --seeds 1 --size 16x16",
    "filter_clipscore": f"{TINY} --threshold -1",
    "train_lt": "--epochs 6 --curriculum-epochs 5 --warmup-epochs 0 --step-epochs 1 --image-size 32 --workers 0",
}
COUNTS = {"a $ and $ b": 26, "狐 fox": 24, "plain cat": 25, "few_one": 5, "Ł, few": 4}  # training images of a class


def write_odd_folder(root):
    """Images in the forms that real folders have: modes, depths, orientation, endings, and files that are none."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(COUNTS.items()):
        for split, images in (("train", count), ("test", 3)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 80, (40, 48, 3)) + [label * 40, 10, label * 20]
                image = Image.fromarray(pixels.astype("uint8"))
                turned = Image.Exif()
                turned[274] = 6  # lies on its side
                odd = [(image, ".jpg"), (image.convert("L"), ".png"), (image.convert("RGBA"), " 1.PNG"),
                       (image.convert("CMYK"), ".jpeg"), (image.convert("P"), ".png"), (image, ".webp")]  # fmt: skip
                form, ending = odd[i % len(odd)]
                form.save(folder / f"{i}{ending}", **({"exif": turned} if ending == ".webp" else {}))
    folder = root / "train/plain cat"
    Image.fromarray((rng.random((40, 48)) * 65535).astype("uint16")).save(folder / "deep.png")
    for name in ("train/.ipynb_checkpoints", "train/__MACOSX"):
        (root / name).mkdir()
        (root / name / "._a.jpg").write_bytes(b"no image")
    for path in (
        folder / "._0.jpg",
        folder / ".hidden.jpg",
        folder / "Thumbs.db",
        folder / "notes.txt",
        root / "train/readme.txt",
        root / ".DS_Store",
    ):
        path.write_bytes(b"no image")


@pytest.mark.slow
def test_the_commands_for_own_images_go_through_on_a_folder_of_odd_files(tmp_path):
    write_odd_folder(tmp_path / "mine")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    section = (ROOT / "docs/own_data.md").read_text(encoding="utf-8").partition("## Low quality")[0]
    commands = re.findall(r"^python (\w+)\.py (.*)$", section, re.M)
    assert [script for script, _ in commands] == [
        "check_data", "find_hard", "write_prompts", "generate_spectrum", "generate_spectrum", "filter_clipscore",
        "train_lt", "report",
    ]  # fmt: skip
    for script, words in commands:
        line = [*shlex.split(words, comments=True), *shlex.split(CHEAP.get(script, ""))]
        done = forks.type_command(tmp_path, f"{script}.py", *line)
        assert done.returncode == 0, f"{script} {shlex.join(line)}\n{done.stdout}\n{done.stderr}"
    report = tmp_path / "runs/mine/report"
    assert "| BS + d2s" in (report / "table.md").read_text(encoding="utf-8")
    assert (report / "spectrum.png").is_file() and (report / "acceptance.png").is_file()
