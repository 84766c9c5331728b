"""Bad input to every script, as unlucky and malicious users have it: one line on stderr and exit code 2, no traceback.

A row is a script, what is wrong, the command as typed in a folder of its own, the files that lie there, and what the
line must say. `$ROAD` is the small finished road of conftest.py; a file's content is text, bytes, or a function that
makes the path.
"""
# ruff: noqa: E501  (a row a line)

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from PIL import Image
from small_data import draw_toycam

from loaders import digits
from reporting import recipes
from runtime import cli

HARD = "source,label,class_name,reason,score\n"
HUGE = "9" * 5000
TINY = f"{ROOT}/assets/tiny_clip"
SD = f"{ROOT}/assets/tiny_sd"


class Row(NamedTuple):
    script: str
    wrong: str
    command: str
    says: str
    files: dict = {}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own colour, or two would be one image.
    Image.new("RGB", (32, 32), tuple(os.urandom(3))).save(path)


def classes(root: str, **images: int) -> dict[str, Callable]:
    """Files of an image folder of two classes: `images` in each class of each split."""
    return {
        f"{root}/{split}/{name}/{i}.png": picture
        for split, count in images.items() for name in ("cat", "dog") for i in range(count)
    }  # fmt: skip


def spectrum(**changed) -> dict:
    """A copy of the road's spectrum at `s`, with files of it replaced."""

    def copy(path: Path) -> None:
        shutil.copytree(ROAD.spectrum, path)

    return {
        "s": copy,
        **{f"s/{name.replace('__', '/').replace('_J', '.json')}": what for name, what in changed.items()},
    }


ROAD = None  # set by the fixture


def edited(name: str, edit: Callable) -> Callable:
    """A file of the road's spectrum with its text changed."""
    return lambda path: path.write_text(edit((ROAD.spectrum / name).read_text()))


def edit_plan(**changes) -> Callable:
    return edited("plan.json", lambda text: json.dumps(json.loads(text) | changes))


def edit_first_row(**changes) -> Callable:
    """metadata.jsonl of the first shard with values of its first row changed."""

    def edit(text: str) -> str:
        first, rest = text.split("\n", 1)
        return json.dumps(json.loads(first) | changes) + "\n" + rest

    return edited("shard-00000/metadata.jsonl", edit)


def garbage_checkpoint(path: Path) -> None:
    """A pickle that would run a command."""

    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Evil()))


def trained(**changes) -> dict:
    """A run folder `r` of train_lt.py by its args.json alone."""
    args = {
        "dataset": "digits",
        "imb_ratio": 30.0,
        "data_seed": 0,
        "model": "resnet8",
        "loss": "ce",
        "image_size": 224,
        "augment": "none",
        "pretrained": False,
    }
    return {"r/args.json": json.dumps({"args": args | changes, "inputs": {}}), "r/checkpoint.pt": garbage_checkpoint}


def zip_of(**content: bytes) -> Callable:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name.replace("__", "/"), data)

    return write


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def zip_with(at: int, value: int) -> Callable:
    """A zip of CIFAR's form in whose members' headers, here and at the end, a byte is `value`."""

    def write(path: Path) -> None:
        names = [f"{part}__c{k}__{i}.png" for part in ("train", "test") for k in range(10) for i in range(3)]
        zip_of(**dict.fromkeys(names, png(32)))(path)
        content = bytearray(path.read_bytes())
        for sign, further in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
            for found in re.finditer(re.escape(sign), bytes(content)):
                content[found.start() + at + further] = value
        path.write_bytes(content)

    return write


def parquet(metadata: str = "{}", **first) -> dict[str, Callable]:
    """Hugging Face's files of CIFAR, 40 images each, with values of the first image changed."""

    def write(path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        rows = {"img": [{"bytes": png(32)}] * 40, "label": [i % 10 for i in range(40)]}
        rows = {name: [first.get(name, values[0]), *values[1:]] for name, values in rows.items()}
        write_table(pyarrow.table(rows).replace_schema_metadata({"huggingface": metadata}), path)

    return {"d/train-0.parquet": write, "d/test-0.parquet": write}


METADATA = "split,y,filename,location_remapped\n"
TRAPS = {"d/class_names.txt": "empty\nfox\n", "d/train/a.jpg": picture}
COOP = {"d/images/a/1.jpg": picture}
CUB = {"d/classes.txt": "1 001.A\n", "d/image_class_labels.txt": "1 1\n", "d/train_test_split.txt": "1 1\n"}
PROMPT = {"class_name": "0", "score_prompt": "a", "prompts": ["a"]}
PROMPTS = {str(label): PROMPT | {"class_name": name} for label, name in enumerate(digits.NAMES)}
OTHERS = {"p.json": json.dumps({label: prompt | {"class_name": "owl"} for label, prompt in PROMPTS.items()})}
DRAW = "--hard $ROAD/hard.csv --prompts $ROAD/prompts.json --out s2 --levels 50 --seeds 1 --steps 4"
ONE = {"one.csv": HARD + "index:1,9,9,few,1\n"}
DOMAINS = {"prefix": "a {}", "superclass": "", "positive": "a", "negatives": ["b"], "domains": []}

ROWS = [
    # the data set
    Row("check_data", "no data root", "--dataset imagefolder", "expected --data-root, the folder of its images"),
    Row("check_data", "data root is a text file", "--dataset imagefolder --data-root a.txt", "no folder train there", {"a.txt": "x"}),
    Row("check_data", "data root is not there", "--dataset imagefolder --data-root d", "d: no such file or folder"),
    Row("check_data", "no class has an image", "--dataset imagefolder --data-root d", "no class folder with an image in train", {"d/train/cat/notes.txt": "x"}),
    Row("check_data", "a class of test is none of train", "--dataset imagefolder --data-root d", "test/eel is no class of train", classes("d", train=2, test=1) | {"d/test/eel/1.png": picture}),
    Row("check_data", "ratio is nan", "--imb-ratio nan", "--imb-ratio: 'nan': expected a number from 1"),
    Row("check_data", "ratio leaves classes none", "--dataset imagefolder --data-root d --imb-ratio 1e9", "--imb-ratio 1e+09: the smallest class would keep none of its images; expected at most 6", classes("d", train=6, test=1)),
    Row("check_data", "too few images to hold any out", "--dataset imagefolder --data-root d", "no class has 5 training images or more", classes("d", train=2, test=1)),
    Row("check_data", "more shots than images", "--shots 1000", "--shots 1000: class"),
    Row("check_data", "seed of 5000 digits", f"--data-seed {HUGE}", "expected a whole number of 0 or more"),
    Row("check_data", "list with a label too high", "--dataset places_lt --data-root d", "line 1: 'a/b.jpg 365': expected a path and a label below 365", {"d/Places_LT_train.txt": "a/b.jpg 365\n"}),
    Row("check_data", "list leads out of the folder", "--dataset places_lt --data-root d", "line 2: ../../etc/passwd: expected a path below --data-root", {"d/Places_LT_train.txt": "a/b.jpg 3\n../../etc/passwd 4\n"}),
    Row("check_data", "list in UTF-16", "--dataset places_lt --data-root d", "is UTF-16", {"d/Places_LT_train.txt": "a/b.jpg 3\n".encode("utf-16")}),
    Row("check_data", "empty lists", "--dataset places_lt --data-root d", "Places_LT_train.txt: lists no image", {f"d/Places_LT_{part}.txt": "" for part in ("train", "val", "test")}),
    Row("check_data", "zip is none", "--dataset cifar10_lt --data-root c.zip", "c.zip: not a readable zip file", {"c.zip": b"PK\3\4 no"}),
    Row("check_data", "zip of one class", "--dataset cifar10_lt --data-root c.zip", "1 classes in train, 1 in test; expected the same 10", {"c.zip": zip_of(train__a__1=png(), test__a__1=png())}),
    Row("check_data", "zip of images of another size", "--dataset cifar10_lt --imb-ratio 2 --data-root c.zip", "is 8x8; expected 32x32", {"c.zip": zip_of(**{f"{part}__{name}__{i}": png() for part in ("train", "test") for name in "abcdefghij" for i in range(2)})}),
    Row("check_data", "parquet is none", "--dataset cifar10_lt --data-root d", "not a readable parquet file|needs pyarrow", {"d/train-0.parquet": b"PAR1no", "d/test-0.parquet": b"PAR1no"}),
    Row("check_data", "zip with a password", "--dataset cifar10_lt --imb-ratio 2 --data-root c.zip", "c0/0.png: not a readable image ", {"c.zip": zip_with(6, 1)}),
    Row("check_data", "zip packed by an unknown method", "--dataset cifar10_lt --imb-ratio 2 --data-root c.zip", "not a readable image", {"c.zip": zip_with(8, 97)}),
    Row("check_data", "parquet with a class too high", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "d: train image 0, of label 10: expected bytes in img and a class below 10", parquet(label=10)),
    Row("check_data", "parquet with a negative class", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "d: train image 0, of label -1: expected", parquet(label=-1)),
    Row("check_data", "parquet without a class", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "d: train image 0, of label None: expected", parquet(label=None)),
    Row("check_data", "parquet without an image", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "d: train image 0, of label 0: expected bytes in img", parquet(img=None)),
    Row("check_data", "parquet with an image of another size", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "image 0: is 8x8; expected 32x32", parquet(img={"bytes": png()})),
    Row("check_data", "parquet whose metadata are torn", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "train-0.parquet: its metadata huggingface are not readable", parquet("{")),
    Row("check_data", "parquet whose metadata are a list", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "train-0.parquet: its metadata huggingface are not readable", parquet("[]")),
    Row("check_data", "parquet with a name for one class", "--dataset cifar10_lt --imb-ratio 2 --data-root d", "1 classes in train, 1 in test; expected the same 10", parquet('{"info": {"features": {"label": {"names": ["a"]}}}}')),
    Row("check_data", "damaged torchvision folder", "--dataset cifar10_lt --data-root d", "--data-root d: Dataset not found or corrupted", {"d/cifar-10-batches-py/data_batch_1": garbage_checkpoint}),
    Row("check_data", "split file is a list", "--dataset dtd --data-root d", "not a CoOp split", COOP | {"d/split_zhou_DescribableTextures.json": "[1, 2]"}),
    Row("check_data", "split file with short rows", "--dataset dtd --data-root d", "not a CoOp split", COOP | {"d/split_zhou_DescribableTextures.json": json.dumps({"train": [["a/1.jpg", 0]], "val": [], "test": []})}),
    Row("check_data", "split file with a label that is text", "--dataset dtd --data-root d", "not a CoOp split", COOP | {"d/split_zhou_DescribableTextures.json": json.dumps({"train": [["a/1.jpg", "zero", "a"]], "val": [], "test": []})}),
    Row("check_data", "split file with an infinite label", "--dataset dtd --data-root d", "not a CoOp split", COOP | {"d/split_zhou_DescribableTextures.json": '{"train": [["a/1.jpg", Infinity, "a"]], "val": [], "test": []}'}),
    Row("check_data", "split file without a test image", "--dataset dtd --data-root d", "lists no image", COOP | {"d/split_zhou_DescribableTextures.json": json.dumps({"train": [["a/1.jpg", 0, "a"]], "val": [], "test": []})}),
    Row("check_data", "variants file is empty", "--dataset aircraft --data-root d", "lists no image of a split", {"d/variants.txt": "\n\n"} | {f"d/images_variant_{part}.txt": "" for part in ("train", "val", "test")}),
    Row("check_data", "annotations of wrong types", "--dataset inat2018 --data-root d", "not an iNaturalist annotation file", {"d/train2018.json": '{"images": 3}'}),
    Row("check_data", "annotations with an infinite category", "--dataset inat2018 --data-root d", "not an iNaturalist annotation file", {"d/train2018.json": '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": Infinity}], "categories": [{"id": 0, "name": "a"}]}'}),
    Row("check_data", "annotations whose names are numbers", "--dataset inat2018 --data-root d", "not below --data-root d, the first 7", {f"d/{part}2018.json": '{"images": [{"id": 1, "file_name": 7}], "annotations": [{"image_id": 1, "category_id": 0}], "categories": [{"id": 0, "name": 5}]}' for part in ("train", "val")}),
    Row("check_data", "metadata without a column", "--dataset cameratraps --data-root d", "no column location_remapped", TRAPS | {"d/metadata.csv": "split,y,filename\ntrain,0,a.jpg\n"}),
    Row("check_data", "metadata with a negative class", "--dataset cameratraps --data-root d", "row 2: y -1", TRAPS | {"d/metadata.csv": METADATA + "train,-1,a.jpg,0\n"}),
    Row("check_data", "metadata with a class beyond the names", "--dataset cameratraps --data-root d", "row 2: class 2; expected one below 2", TRAPS | {"d/metadata.csv": METADATA + "train,2,a.jpg,0\n"}),
    Row("check_data", "metadata leads out of the folder", "--dataset cameratraps --data-root d", "row 2: /etc/passwd: expected a file below train", TRAPS | {"d/metadata.csv": METADATA + "train,1,/etc/passwd,0\n"}),
    Row("check_data", "metadata with a nul byte", "--dataset cameratraps --data-root d", "metadata.csv", TRAPS | {"d/metadata.csv": METADATA + "train,1,a\0.jpg,0\n"}),
    Row("check_data", "metadata is a folder", "--dataset cameratraps --data-root d", "metadata.csv: Is a directory", TRAPS | {"d/metadata.csv": Path.mkdir}),
    Row("check_data", "an open quote swallows the table", "--dataset cameratraps --data-root d", "metadata.csv (row|line) ", TRAPS | {"d/metadata.csv": METADATA + 'train,1,"a.jpg,0\n' + "train,1,b.jpg,0\n" * 10000}),
    Row("check_data", "bird list that is none", "--dataset cub --data-root d", "images.txt line 1: 'nonsense': expected a number and a value", CUB | {"d/images.txt": "nonsense\n"}),
    Row("check_data", "a name that is not UTF-8", "--dataset imagefolder --data-root d", "is not UTF-8; expected it renamed", classes("d", train=6, test=1) | {"d/train/cat/caf\udce9.png": picture}),
    Row("check_data", "two classes in two spellings of one name", "--dataset imagefolder --data-root d", "two folders of train are called", {f"d/{split}/{name}/{i}.png": picture for split in ("train", "test") for name in ("caf\u00e9", "cafe\u0301") for i in range(6)}),
    # find_hard
    Row("find_hard", "no class is few-shot", "--few-below 1 --out h.csv", "--few-below 1: no class of digits has fewer images"),
    Row("find_hard", "out is a folder", "--out .", "Is a directory|is a folder"),
    Row("find_hard", "out below a file", "--out a.txt/h.csv", "a.txt", {"a.txt": "x"}),
    Row("find_hard", "confidence by nothing", "--rule confidence", "expected --checkpoint or --clip"),
    Row("find_hard", "run folder without args.json", "--rule confidence --checkpoint r --out h.csv", "args.json: no such file", {"r/checkpoint.pt": b""}),
    Row("find_hard", "args.json is a list", "--rule confidence --checkpoint r --out h.csv", "args.json", {"r/args.json": "[]", "r/checkpoint.pt": b""}),
    Row("find_hard", "args.json lacks what is needed", "--rule confidence --checkpoint r --out h.csv", "args.json: its args have no model, loss, image_size, augment, pretrained; expected a run of train_lt.py", {"r/args.json": '{"args": {"dataset": "digits"}}', "r/checkpoint.pt": b""}),
    Row("find_hard", "run of another data set", "--rule confidence --checkpoint r --out h.csv", "was trained with --dataset toycam; expected digits", trained(dataset="toycam")),
    Row("find_hard", "checkpoint that would run a command", "--rule confidence --checkpoint r --out h.csv", "not a readable checkpoint", trained()),
    Row("find_hard", "CLIP that there is not", "--rule confidence --clip ViT-Z-99:openai --out h.csv", "--clip ViT-Z-99:openai"),
    Row("find_hard", "CLIP folder without a model", "--rule confidence --clip c --out h.csv", "--clip c", {"c/readme.txt": "x"}),
    Row("find_hard", "CLIP folder with a broken configuration", "--rule confidence --clip c --out h.csv", "--clip c", {"c/open_clip_config.json": "[]"}),
    Row("find_hard", "CLIP without a name", "--rule confidence --clip '' --out h.csv", "--clip"),
    Row("find_hard", "template without a place for the name", f"--rule confidence --clip {TINY} --templates 'a photo' --out h.csv", "--templates: expected texts with {}"),
    Row("find_hard", "a flag of another rule", "--fraction 0.1 --out h.csv", "--fraction: expected with --rule confidence only, not with --rule few"),
    Row("find_hard", "fraction of 2", "--rule confidence --fraction 2", "--fraction: '2': expected a number from 0 to 1"),
    Row("find_hard", "scores of another model there", f"--rule confidence --clip {TINY} --out h.csv", "h.probabilities.json", {"h.probabilities.json": '{"model": "other"}', "h.probabilities.jsonl": "{}\n"}),
    Row("find_hard", "scores' note is torn", f"--rule confidence --clip {TINY} --out h.csv", "h.probabilities.json: not valid JSON", {"h.probabilities.json": '{"model": "ot', "h.probabilities.jsonl": "{}\n"}),
    Row("find_hard", "scores' note is a list", f"--rule confidence --clip {TINY} --out h.csv", "h.probabilities.json", {"h.probabilities.json": "[]", "h.probabilities.jsonl": "{}\n"}),
    # write_prompts
    Row("write_prompts", "table of image files, for a data set that has none", "--hard h.csv --out p.json", "--dataset digits: h.csv names image files, the first train/a b/1.png", {"h.csv": HARD + "train/a b/1.png,0,a b,few,1\n"}),
    Row("write_prompts", "label of 5000 digits", "--hard h.csv --out p.json", "expected a class index", {"h.csv": HARD + f"a,{HUGE},a,few,1\n"}),
    Row("write_prompts", "label in superscript", "--hard h.csv --out p.json", "label '²': expected a class index", {"h.csv": HARD + "a,²,a,few,1\n"}),
    Row("write_prompts", "empty table", "--hard h.csv --out p.json", "h.csv: no column source", {"h.csv": ""}),
    Row("write_prompts", "header alone", "--hard h.csv --out p.json", "no hard images", {"h.csv": HARD}),
    Row("write_prompts", "tabs for commas", "--hard h.csv --out p.json", "no column", {"h.csv": HARD.replace(",", "\t")}),
    Row("write_prompts", "one class, two names", "--hard h.csv --out p.json", "row 3: class 0 is 'b' here, 'a' above", {"h.csv": HARD + "x,0,a,few,1\ny,0,b,few,1\n"}),
    Row("write_prompts", "class without a name", "--hard h.csv --out p.json", "the class name of class 0 is empty", {"h.csv": HARD + "x,0, ,few,1\n"}),
    Row("write_prompts", "table is a picture", "--hard h.csv --out p.json", "h.csv", {"h.csv": png()}),
    Row("write_prompts", "no table", "--hard h.csv --out p.json", "--hard: h.csv: no such file"),
    Row("write_prompts", "frame with two places", "--hard $ROAD/hard.csv --frame '{} {}' --out p.json", "--frame"),
    Row("write_prompts", "own prompts are a list", "--hard $ROAD/hard.csv --from file --file f.json --out p.json", "expected an object with a list of prompts", {"f.json": "[]"}),
    Row("write_prompts", "an own prompt is a number", "--hard $ROAD/hard.csv --from file --file f.json --out p.json", "the prompt is empty or no text", {"f.json": '{"9": [3]}'}),
    Row("write_prompts", "own prompts are a picture", "--hard $ROAD/hard.csv --from file --file f.csv --out p.json", "f.csv", {"f.csv": png()}),
    Row("write_prompts", "own prompts lack a class", "--hard $ROAD/hard.csv --from file --file f.csv --out p.json", "no prompt for class", {"f.csv": "class,prompt\nno such,a\n"}),
    Row("write_prompts", "what was written is torn", "--hard $ROAD/hard.csv --out p.json", "p.json: not valid JSON", {"p.json": '{"0": '}),
    Row("write_prompts", "what was written is another data set's", "--hard $ROAD/hard.csv --out p.json", "expected prompts of the same data set", {"p.json": json.dumps({"9": PROMPT | {"class_name": "owl"}})}),
    Row("write_prompts", "prompts are one text", "--hard $ROAD/hard.csv --out p.json", "expected a list prompts", {"p.json": json.dumps({"9": PROMPT | {"prompts": "abc"}})}),
    Row("write_prompts", "no such language model", "--hard $ROAD/hard.csv --from llm --llm m --out p.json", "--llm m", {"m/config.json": "{}"}),
    Row("write_prompts", "domains of wrong types", "--hard $ROAD/hard.csv --from domains --domains d.json --out p.json", "d.json", {"d.json": json.dumps(DOMAINS | {"domains": [3]})}),
    Row("write_prompts", "domains are null", "--hard $ROAD/hard.csv --from domains --domains d.json --out p.json", "d.json", {"d.json": "null"}),
    # generate_spectrum
    Row("generate_spectrum", "spectrum folder is the data's", "--dataset imagefolder --data-root d --hard $ROAD/hard.csv --out d", "--out d: is --data-root", classes("d", train=6, test=1)),
    Row("generate_spectrum", "level 100", f"{DRAW} --levels 100", "--levels 100: that is the real image"),
    Row("generate_spectrum", "levels of text alone", f"{DRAW} --per-class 4", "--per-class: draws N images of a class at level 0; expected no other --levels"),
    Row("generate_spectrum", "two levels of one length", f"{DRAW} --levels 50 55", "both are 2 of --steps 4"),
    Row("generate_spectrum", "size in superscript", f"{DRAW} --size ²x²", "expected WIDTHxHEIGHT"),
    Row("generate_spectrum", "size of 5000 digits", f"{DRAW} --size {HUGE}x8", "expected WIDTHxHEIGHT"),
    Row("generate_spectrum", "size larger than any memory", f"{DRAW} --size 999999999999x16", "--size"),
    Row("generate_spectrum", "generator without a pipeline", f"{DRAW} --generator g", "--generator g", {"g/readme.txt": "x"}),
    Row("generate_spectrum", "generator whose index is a list", f"{DRAW} --generator g", "--generator g", {"g/model_index.json": "[]"}),
    Row("generate_spectrum", "generator of no known class", f"{DRAW} --generator g", "--generator g", {"g/model_index.json": '{"_class_name": "os"}'}),
    Row("generate_spectrum", "generator whose class is a number", f"{DRAW} --generator g", "--generator g", {"g/model_index.json": '{"_class_name": 3}'}),
    Row("generate_spectrum", "seeds beside images of a class", f"{DRAW} --levels 0 --per-class 2", "expected no --seeds beside it"),
    Row("generate_spectrum", "threshold that nothing is compared with", f"{DRAW} --threshold 0.2", "--threshold: expected with --score only"),
    Row("generate_spectrum", "generator from an unknown place", f"{DRAW} --generator nobody/nothing", "--generator nobody/nothing: cannot be loaded: the Hugging Face hub cannot be reached, and no copy is here"),
    Row("generate_spectrum", "generator whose weights are torn", f"{DRAW} --generator g", "--generator g: cannot be loaded", {"g": lambda path: shutil.copytree(SD, path), "g/unet/diffusion_pytorch_model.safetensors": b"torn"}),
    Row("generate_spectrum", "adapter that is none", f"{DRAW} --lora l.safetensors", "l.safetensors: not a LoRA", {"l.safetensors": b"no"}),
    Row("generate_spectrum", "adapter that is not there", f"{DRAW} --lora l.safetensors", "--lora"),
    Row("generate_spectrum", "adapters lack a class", f"{DRAW} --lora-by-class l", "--lora-by-class", {"l/readme.txt": "x"}),
    Row("generate_spectrum", "tuned folder is empty", f"{DRAW} --tuned t", "t", {"t/readme.txt": "x"}),
    Row("generate_spectrum", "further units of an unknown source", f"{DRAW} --also-draw e.csv", "row 2: source 'x': expected one of hard.csv", {"e.csv": "source,level,seed,prompt\nx,1,1,\n"}),
    Row("generate_spectrum", "further units with a level of 1.5", f"{DRAW} --also-draw e.csv", "row 2: ", {"e.csv": "source,level,seed,prompt\nx,1.5,1,\n"}),
    Row("generate_spectrum", "prompts lack a class", f"{DRAW} --prompts p.json", "no prompt for class", {"p.json": "{}"}),
    Row("generate_spectrum", "prompts of another data set", f"{DRAW} --prompts p.json", "expected prompts of the same data set", OTHERS),
    Row("generate_spectrum", "hard table whose classes have moved", f"{DRAW} --hard h.csv", "in --dataset digits; expected a table of the same data: run find_hard.py again", {"h.csv": lambda path: path.write_text(ROAD.hard.read_text().replace(",9,nine,", ",8,eight,"))}),
    Row("generate_spectrum", "hard table in Latin-1", f"{DRAW} --hard h.csv", "h.csv line 2: is not UTF-8", {"h.csv": HARD.encode() + b"caf\xe9,9,9,few,1\n"}),
    Row("generate_spectrum", "hard table names one image twice", f"{DRAW} --hard h.csv", "is there twice", {"h.csv": HARD + "index:1,9,9,few,1\n" * 2}),
    Row("generate_spectrum", "shard of too many", f"{DRAW} --shard 3/2", "expected I/N"),
    Row("generate_spectrum", "no such device", f"{DRAW} --device cuda:99", "--device cuda:99: cannot be used here"),
    Row("generate_spectrum", "device that is a word", f"{DRAW} --device toaster", "--device toaster"),
    Row("generate_spectrum", "out is a file", f"{DRAW} --out a.txt", "a.txt", {"a.txt": "x"}),
    Row("generate_spectrum", "plan is torn", f"{DRAW}", "plan.json: not valid JSON", {"s2/plan.json": '{"a'}),
    Row("generate_spectrum", "plan is a list", f"{DRAW}", "plan.json: expected an object", {"s2/plan.json": "[]"}),
    Row("generate_spectrum", "frozen sizes of 5000 digits", f"{DRAW}", "sizes-00000.csv row 2", {"s2/sizes-00000.csv": f"source,width,height\nindex:1,{HUGE},8\n"}),
    Row("generate_spectrum", "frozen sizes of nought", f"{DRAW}", "sizes-00000.csv row 2", {"s2/sizes-00000.csv": "source,width,height\nindex:1,0,8\n"}),
    Row("generate_spectrum", "guidance by an image that is not taken", f"{DRAW} --image-guidance 1", "--image-guidance"),
    Row("generate_spectrum", "own domains are none", f"{DRAW} --each-prompt --skip-own-domain f.csv", "f.csv", {"f.csv": "a,b\n1,2\n"}),
    Row("generate_spectrum", "nothing to look through", "--validate --out s2", "no plan.json there"),
    Row("generate_spectrum", "score by no CLIP", f"{DRAW} --score --clip c", "--clip c", {"c/readme.txt": "x"}),
    Row("generate_spectrum", "guidance without end", f"{DRAW} --text-guidance inf", "--text-guidance: 'inf': expected a number"),
    Row("generate_spectrum", "resume with other prompts", "--hard $ROAD/hard.csv --prompts p.json --out s --levels 0 50 90 --seeds 1 --steps 4", "written by a run with other settings", spectrum() | {"p.json": json.dumps(PROMPTS)}),
    # filter_clipscore
    Row("filter_clipscore", "no spectrum", "--spectrum s --prompts $ROAD/prompts.json", "s: no plan.json there", {"s/readme.txt": "x"}),
    Row("filter_clipscore", "spectrum of another data set", "--dataset toycam --spectrum $ROAD/spectrum --prompts $ROAD/prompts.json", "was made with digits"),
    Row("filter_clipscore", "prompts of another data set", "--spectrum $ROAD/spectrum --prompts p.json", "expected prompts of the same data set", OTHERS),
    Row("filter_clipscore", "plan of wrong types", "--spectrum s --prompts $ROAD/prompts.json --min-per-class-level 2", "plan.json", spectrum() | {"s/plan.json": edit_plan(levels="abc", hard_classes=7)}),
    Row("filter_clipscore", "a row's level is text", "--spectrum s --prompts $ROAD/prompts.json", "row 1: level is '50'", spectrum() | {"s/shard-00000/metadata.jsonl": edit_first_row(level="50")}),
    Row("filter_clipscore", "a row's class has no prompt", "--spectrum s --prompts $ROAD/prompts.json", "no prompt for class 77", spectrum() | {"s/shard-00000/metadata.jsonl": edit_first_row(label=77)}),
    Row("filter_clipscore", "rows in UTF-16", "--spectrum s --prompts $ROAD/prompts.json", "s: holds no image", spectrum() | {"s/shard-00000/metadata.jsonl": "{}\n".encode("utf-16")}),
    Row("filter_clipscore", "scores that are text", "--spectrum s --prompts $ROAD/prompts.json", "scores.csv row 2: expected numbers", spectrum() | {"s/scores.csv": edited("scores.csv", lambda text: text.split("\n")[0] + "\nx.png,high,low,1,\n")}),
    Row("filter_clipscore", "scores' note is a list", "--spectrum s --prompts $ROAD/prompts.json", "scores.json", spectrum() | {"s/scores.json": "[]"}),
    Row("filter_clipscore", "scores' note of wrong types", "--spectrum s --prompts $ROAD/prompts.json", "scores.json", spectrum() | {"s/scores.json": edited("scores.json", lambda text: json.dumps(json.loads(text) | {"groups": [1], "rounds": "two"}))}),
    Row("filter_clipscore", "share of 2", "--spectrum $ROAD/spectrum --keep-share 2", "--keep-share: '2': expected a number from 0"),
    Row("filter_clipscore", "share of what, without a share", "--spectrum $ROAD/spectrum --prompts $ROAD/prompts.json --share-of level", "--share-of: expected with --keep-share only"),
    Row("filter_clipscore", "threshold is nan", "--spectrum $ROAD/spectrum --threshold nan", "--threshold: 'nan'"),
    Row("filter_clipscore", "prompts are a directory", "--spectrum $ROAD/spectrum --prompts .", "--prompts: .: no such file"),
    Row("filter_clipscore", "plan of redraws is none", "--spectrum s --prompts $ROAD/prompts.json --threshold 0.1 --min-per-class-level 50", "top_up.csv", spectrum() | {"s/top_up.csv": "source,level\n1,2\n"}),
    # train_lt
    Row("train_lt", "batch larger than the data", "--curriculum none --batch-size 99999 --out r", "--batch-size 99999: expected at most the"),
    Row("train_lt", "crops of small images", "--curriculum none --augment resized_crop --out r", "expected crop_flip or shift"),
    Row("train_lt", "spectrum without scores", "--curriculum d2s --spectrum s --out r", "no scores.csv there", {"s": lambda path: shutil.copytree(ROAD.spectrum, path, ignore=shutil.ignore_patterns("scores.csv"))}),
    Row("train_lt", "level that was not drawn", "--curriculum d2s --spectrum $ROAD/spectrum --levels 30 100 --out r", "level 30: "),
    Row("train_lt", "spectrum of classes beyond the data", "--curriculum d2s --spectrum s --out r", "77", spectrum() | {"s/shard-00000/metadata.jsonl": edit_first_row(label=77)}),
    Row("train_lt", "spectrum plan with classes as text", "--curriculum d2s --spectrum s --out r", "plan.json", spectrum() | {"s/plan.json": edit_plan(hard_classes="all")}),
    Row("train_lt", "no such model", "--curriculum none --model resnet9 --out r", "--model resnet9: unknown"),
    Row("train_lt", "no such model of timm", "--curriculum none --model timm:none --out r", "timm has no model of that name"),
    Row("train_lt", "run folder is the data's", "--dataset imagefolder --data-root d --out d/.", "--out d: is --data-root", classes("d", train=6, test=1)),
    Row("train_lt", "start weights that would run a command", "--curriculum none --init-checkpoint w.pt --out r", "w.pt: not a readable checkpoint", {"w.pt": garbage_checkpoint}),
    Row("train_lt", "start weights that are a list", "--curriculum none --init-checkpoint w.pt --out r", "w.pt", {"w.pt": lambda path: torch_save([1, 2], path)}),
    Row("train_lt", "start weights of another model", "--curriculum none --init-checkpoint w.pt --out r", "holds no weights", {"w.pt": lambda path: torch_save({"a": 1}, path)}),
    Row("train_lt", "checkpoint is garbage", "--curriculum none --epochs 2 --out r", "not a readable checkpoint", {"r/checkpoint.pt": b"no"}),
    Row("train_lt", "checkpoint of another form", "--curriculum none --epochs 2 --out r", "checkpoint.pt", {"r/checkpoint.pt": lambda path: torch_save({"a": 1}, path)}),
    Row("train_lt", "arguments of another run", "--curriculum none --epochs 2 --out r", "written by a run with other settings", {"r/args.json": '{"args": {}, "inputs": {}}'}),
    Row("train_lt", "arguments are a list", "--curriculum none --epochs 2 --out r", "args.json", {"r/args.json": "[]"}),
    Row("train_lt", "shares of no level", "--curriculum d2s --spectrum $ROAD/spectrum --level-shares 1 2 3 4 5 6 7 8 9 --out r", "--level-shares"),
    Row("train_lt", "rate is nan", "--lr nan", "--lr: 'nan'"),
    Row("train_lt", "out is a file", "--curriculum none --epochs 1 --out a.txt", "a.txt", {"a.txt": "x"}),
    Row("train_lt", "arguments' file with an open quote", "@a.args", "a.args: No closing quotation", {"a.args": "--out 'r"}),
    Row("train_lt", "arguments' file includes itself", "@a.args", "a.args: includes itself", {"a.args": "@a.args"}),
    Row("train_lt", "arguments' file is not there", "@a.args", "a.args: no such file"),
    Row("train_lt", "part of none", "--curriculum none --leave-out 3/2", "--leave-out"),
    Row("train_lt", "additions like no file", "--curriculum all --spectrum $ROAD/spectrum --add like:no.csv --out r", "no.csv"),
    Row("train_lt", "additions like a table without a row", "--curriculum all --spectrum $ROAD/spectrum --add like:a.csv --out r", "a.csv", {"a.csv": "label\n"}),
    Row("train_lt", "additions like a table with labels of 5000 digits", "--curriculum all --spectrum $ROAD/spectrum --add like:a.csv --out r", "a.csv", {"a.csv": f"label\n{HUGE}\n"}),
    Row("train_lt", "a test image is a text", "--dataset imagefolder --data-root d --curriculum none --model resnet10 --batch-size 4 --out r", "1 image cannot be used: test: d/test/cat/0.png", classes("d", train=6, test=2) | {"d/test/cat/0.png": "no image"}),
    Row("train_lt", "no such model, known before files are read", "--dataset imagefolder --data-root d --curriculum none --model resnet9 --batch-size 4 --out r", "--model resnet9: unknown", classes("d", train=6, test=2) | {"d/test/cat/0.png": "no image"}),
    Row("train_lt", "arguments of another run, known before files are read", "--dataset imagefolder --data-root d --curriculum none --model resnet10 --batch-size 4 --out r", "written by a run with other settings", classes("d", train=6, test=2) | {"d/test/cat/0.png": "no image", "r/args.json": '{"args": {}, "inputs": {}}'}),
    Row("train_lt", "scores keep an image twice", "--curriculum d2s --spectrum s --out r", "scores.csv", spectrum() | {"s/scores.csv": edited("scores.csv", lambda text: text + text.splitlines()[1] + "\n")}),
    Row("train_lt", "an accepted image is torn", "--curriculum d2s --spectrum s --epochs 6 --curriculum-epochs 5 --out r", "not a readable image", spectrum() | {"s/shard-00000": lambda path: [file.write_bytes(file.read_bytes()[:50]) for file in path.glob("*.png")]}),
    # train_iwildcam
    Row("train_iwildcam", "data without cameras", "--dataset digits", "--dataset: invalid choice: 'digits'"),
    Row("train_iwildcam", "older version of the data", "--dataset iwildcam --data-root d --curriculum none", "this is version 1.0 of WILDS", {"d/metadata.csv": "a,b\n", "d/val_trans.csv": ""}),
    Row("train_iwildcam", "a split without an image", "--dataset cameratraps --data-root d --curriculum none", "no image in split val, test, id_val, id_test", TRAPS | {"d/metadata.csv": METADATA + "train,1,a.jpg,0\n"}),
    Row("train_iwildcam", "images that are not there", "--dataset cameratraps --data-root d --curriculum none", "1 of the 1 images of train are not there: train/b.jpg", TRAPS | {"d/metadata.csv": METADATA + "".join(f"{split},1,b.jpg,0\n" for split in ("train", "val", "test", "id_val", "id_test"))}),
    Row("train_iwildcam", "no spectrum", "--curriculum d2s --dataset toycam --data-root $TOYCAM --spectrum s --out r", "s: no plan.json there"),
    Row("train_iwildcam", "spectrum of another data set", "--curriculum d2s --dataset toycam --data-root $TOYCAM --spectrum $ROAD/spectrum --out r", "digits"),
    Row("train_iwildcam", "templates without a place for the name", "--dataset toycam --data-root $TOYCAM --curriculum none --templates photo --out r", "--templates"),
    Row("train_iwildcam", "no such CLIP", "--dataset toycam --data-root $TOYCAM --curriculum none --clip RN50:nobody --out r", "--clip RN50:nobody"),
    # report
    Row("report", "nothing to report", "--runs --out o", "nothing to report"),
    Row("report", "folder that is not there", "--runs no --out o", "no"),
    Row("report", "results are torn", "--runs r --out o", "nothing to report: expected --runs with a finished run", {"r/args.json": '{"args": {}}', "r/results.json": '{"last":'}),
    Row("report", "results are a list", "--runs r --out o", "nothing to report: expected --runs with a finished run", {"r/args.json": '{"args": {"dataset": "digits"}}', "r/results.json": "[]"}),
    Row("report", "results without arguments", "--runs r --out o", "nothing to report: expected --runs with a finished run", {"r/results.json": "{}"}),
    Row("report", "arguments are null", "--runs r --out o", "nothing to report: expected --runs with a finished run", {"r/args.json": "null", "r/results.json": '{"last": {}}'}),
    Row("report", "results lack figures", "--runs r --out o", "nothing to report: expected --runs with a finished run", {"r/args.json": '{"args": {"dataset": "digits", "seed": 0}}', "r/results.json": '{"last": 7}'}),
    Row("report", "no spectrum", "--spectrum s --out o", "s: no such folder|no plan.json"),
    Row("report", "gallery of nothing", "--gallery --out o", "--gallery: expected the --spectrum"),
    Row("report", "gallery without scores", "--gallery --spectrum s --out o", "s has neither scores.json nor", {"s/plan.json": "{}"}),
    Row("report", "gallery without its data", "--gallery --spectrum s --out o", "--dataset imagefolder: expected --data-root", spectrum(plan_J=edit_plan(dataset="imagefolder"))),
    Row("report", "gallery whose note is a list", "--gallery --spectrum s --out o", "scores.json", spectrum() | {"s/scores.json": "[]"}),
    Row("report", "gallery whose note has no rule", "--gallery --spectrum s --out o", "scores.json", spectrum() | {"s/scores.json": '{"clip": "x"}'}),
    # demo
    Row("demo", "no jobs", "--jobs 0", "--jobs: '0': expected a whole number of 1 or more"),
    Row("demo", "seed below nought", "--train-seeds -1", "--train-seeds"),
    Row("demo", "one seed twice", "--train-seeds 1 1 --out o", "--train-seeds"),
    Row("demo", "out is a file", "--out a.txt", "a.txt", {"a.txt": "x"}),
    # tune_generator
    Row("tune_generator", "no shots", "--dataset digits --out t", "--shots or --hard: expected one of them"),
    Row("tune_generator", "template without a place for the name", "--dataset fewshot_digits --shots 2 --template photo --out t", "--template"),
    Row("tune_generator", "rank of nought", "--rank 0", "--rank: '0': expected a whole number of 1 or more"),
    Row("tune_generator", "table of another data set", "--dataset fewshot_digits --hard h.csv --out t", "h.csv", {"h.csv": HARD + "no/such.jpg,0,0,few,1\n"}),
    Row("tune_generator", "no such generator", "--dataset fewshot_digits --shots 2 --generator g --out t", "--generator g", {"g/model_index.json": "{}"}),
    Row("tune_generator", "plan is a list", "--dataset fewshot_digits --shots 2 --out t", "plan.json", {"t/plan.json": "[]"}),
    Row("tune_generator", "alpha is inf", "--dataset fewshot_digits --shots 2 --alpha inf", "--alpha: 'inf'"),
    # train_fewshot
    Row("train_fewshot", "grid of words", "--shots 2 --images real --grid lr=abc", "--grid: 'abc': expected a number from 0"),
    Row("train_fewshot", "grid of an unknown flag", "--shots 2 --images real --grid shots=1,2", "expected FLAG=A,B"),
    Row("train_fewshot", "grid of half an epoch", "--shots 2 --images real --grid epochs=0.5 --out r", "--grid: '0.5': expected a whole number"),
    Row("train_fewshot", "grid of a rate that is nan", "--shots 2 --images real --grid lr=nan --out r", "--grid: 'nan': expected a number from 0"),
    Row("train_fewshot", "grid of a weight of 7", "--shots 2 --images real --grid real_weight=7 --out r", "--grid: '7': expected a number from 0 to 1"),
    Row("train_fewshot", "halves of an odd batch", "--shots 2 --batch-size 3", "--batch-size 3: expected an even number"),
    Row("train_fewshot", "synthetic images without a curriculum", "--shots 2 --curriculum none", "--curriculum none"),
    Row("train_fewshot", "spectrum of another data set", "--shots 2 --spectrum $ROAD/spectrum --out r", "digits"),
    Row("train_fewshot", "template without a place for the name", "--shots 2 --images real --template photo", "--template"),
    Row("train_fewshot", "no image to train on", "--shots 0", "--shots: '0': expected"),
    # describe_domains
    Row("describe_domains", "no such captioner", "--dataset biased_digits --captioner c --out o", "--captioner c", {"c/config.json": "{}"}),
    Row("describe_domains", "captioner is another kind of model", f"--dataset biased_digits --captioner {SD} --out o", "--captioner"),
    Row("describe_domains", "prefix without a place for the name", "--dataset biased_digits --prefix photo --out o", "--prefix"),
    Row("describe_domains", "own domains are torn", "--dataset biased_digits --summary file --domains d.json --out o", "d.json: not valid JSON", {"d.json": "{"}),
    Row("describe_domains", "own domains are numbers", "--dataset biased_digits --summary file --domains d.json --out o", "d.json", {"d.json": json.dumps(DOMAINS | {"domains": [1, 2]})}),
    Row("describe_domains", "language model without a word for all", "--dataset biased_digits --summary llm --llm m --superclass '' --out o", "--superclass"),
    Row("describe_domains", "file without one", "--dataset biased_digits --summary file --out o", "expected --domains"),
    # filter_edits
    Row("filter_edits", "meaning without domains", "--spectrum $ROAD/spectrum --rules semantic --clip c", "--domains"),
    Row("filter_edits", "confidence without a run", "--spectrum $ROAD/spectrum --rules confidence", "--checkpoint"),
    Row("filter_edits", "domains without negatives", "--spectrum $ROAD/spectrum --prompts $ROAD/prompts.json --rules semantic --clip c --domains d.json", "d.json", {"d.json": json.dumps(DOMAINS | {"negatives": 3})}),
    Row("filter_edits", "run whose arguments are a list", "--spectrum $ROAD/spectrum --prompts $ROAD/prompts.json --rules confidence --checkpoint r", "args.json", {"r/args.json": "[]", "r/checkpoint.pt": b"x"}),
    Row("filter_edits", "run that is torn", "--spectrum $ROAD/spectrum --prompts $ROAD/prompts.json --rules confidence --checkpoint r", "checkpoint.pt", trained()),
    Row("filter_edits", "share of 2", "--spectrum $ROAD/spectrum --keep-dropped 2", "--keep-dropped: '2': expected"),
    # submit
    Row("submit", "no script", "", "no script"),
    Row("submit", "unknown script", "rm.py -rf", "rm.py: unknown script"),
    Row("submit", "script elsewhere", "../train_lt.py", "../train_lt.py: unknown script"),
    Row("submit", "sweep of nothing", "--dry-run --sweep lr train_lt.py", "--sweep lr: expected FLAG=A,B"),
    Row("submit", "sweep of an unknown flag", "--dry-run --sweep nothing=1,2 train_lt.py", "unrecognized arguments: --nothing"),
    Row("submit", "shards of a trainer", "--dry-run --shards 2 train_lt.py", "--shards: only"),
    Row("submit", "more shards than work", f"--dry-run --shards 99999 generate_spectrum.py {DRAW}", "more than there is work for"),
    Row("submit", "bad flag of the script", "--dry-run train_lt.py --lr high", "--lr: 'high'"),
    Row("submit", "option without a value", "--dry-run --slurm-nodelist train_lt.py", "expected"),
    Row("submit", "status of nothing", "--status s", "submission.json", {"s/a.txt": "x"}),
    Row("submit", "status that is torn", "--status s", "submission.json", {"s/submission.json": "{"}),
    Row("submit", "status that is a list", "--status s", "submission.json", {"s/submission.json": "[]"}),
    Row("submit", "then nothing", "--dry-run train_lt.py --curriculum none --then", "--then: expected between two scripts"),
    Row("submit", "then before any script", "--dry-run --then train_lt.py --curriculum none", "--then"),
    Row("submit", "arguments' file with an open quote", "--dry-run train_lt.py @a.args", "a.args: No closing quotation", {"a.args": "'"}),
    # make_assets
    Row("make_assets", "no place", "", "required: --out"),
    Row("make_assets", "data that are not there", "--benchmark cifar100_lt --data-root d --out o", "d: no such file or folder"),
    Row("make_assets", "no data", "--benchmark cifar100_lt --out o", "--data-root"),
    Row("make_assets", "caption noise of 2", "--caption-noise 2 --out o", "--caption-noise: '2': expected a number from 0 to 1"),
    Row("make_assets", "start that is no generator", "--start g --out o", "g", {"g/readme.txt": "x"}),
    Row("make_assets", "out is a file", "--out a.txt", "a.txt", {"a.txt": "x"}),
    Row("make_assets", "checkpoint is torn", "--out o", "o/", {"o/checkpoint.pt": b"no"}),
]  # fmt: skip


def torch_save(content, path: Path) -> None:
    import torch

    torch.save(content, path)


@pytest.fixture(scope="module")
def toycam(tmp_path_factory):
    return draw_toycam(tmp_path_factory.mktemp("toycam") / "toycam", 96, 6)


def load_main(script: str) -> Callable:
    if script == "submit":
        from test_slurm import submit

        return submit.main
    return importlib.import_module("assets.make_assets" if script == "make_assets" else script).main


def write(folder: Path, content: dict) -> None:
    for name, what in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(what):
            what(path)
        else:
            path.write_bytes(what if isinstance(what, bytes) else what.encode())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.script}: {row.wrong}")
def test_bad_input_is_one_line_and_exit_code_2(row, request, tmp_path, monkeypatch, capfd):
    global ROAD
    command = row.command
    if "$ROAD" in command or "s" in row.files:
        ROAD = request.getfixturevalue("road")
        command = command.replace("$ROAD", str(ROAD.folder))
    if "$TOYCAM" in command:
        command = command.replace("$TOYCAM", str(request.getfixturevalue("toycam")))
    write(tmp_path, row.files)
    if row.script == "report":  # which else reads the project's 160 recipes first
        monkeypatch.setattr(recipes.read_all, "__defaults__", (recipes.FOLDER / "none",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{row.script}.py"])
    words, main = shlex.split(command), load_main(row.script)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main(words))
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip() and not re.search(r" \d+ of \d+, ", line)]
    assert left.value.code == 2, f"exit code {left.value.code}\n{printed.out}\n{printed.err}"
    assert len(lines) == 1 and re.match(r"\w+\.py: error: ", lines[0]), printed.err
    assert re.search(row.says if "|" in row.says or "(" in row.says else re.escape(row.says), lines[0]), lines[0]
    assert len(lines[0]) < 2000 and " at 0x" not in lines[0]
    assert not (tmp_path / "pwned").exists()
