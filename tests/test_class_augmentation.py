"""CUDA's levels of learning: their update by hand, its invariants, the operations, and that runs go on exactly."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

import train_lt
from runtime import checkpoints, files, runs
from training import class_augmentation as lol

TRIES = np.array([10 * (s + 1) for s in range(11)])  # 10 images at strength 0, 20 at 1, 30 at 2 ...


def test_levels_by_hand():
    levels = np.array([0, 0, 2, 2, 0, 10, 1])
    tried = np.where(np.arange(11) <= levels[:, None], TRIES, 0)
    tried[6] = 0  # a class without a training image
    right = np.zeros_like(tried)
    right[0, 0] = 7  # 7 of 10 are more than 0.6: 0 -> 1
    right[1, 0] = 6  # 6 of 10 are not more: stays at the lowest, 0
    right[2, :3] = 10, 13, 19  # 10/10, 13/20 and 19/30 are all more than 0.6: 2 -> 3
    right[3, :3] = 10, 12, 30  # 12 of 20 are not: 2 -> 1, however well strength 2 went
    right[4, 0] = 0  # 0 -> 0
    right[5] = TRIES  # everything right: stays at the highest, 10
    assert lol.updated(levels, right, tried).tolist() == [1, 0, 3, 1, 0, 10, 1]


@given(st.data())
def test_a_level_moves_by_one_within_its_range_and_only_up_to_its_strength_counts(data):
    levels = np.array(data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=5)))
    tried = np.where(np.arange(11) <= levels[:, None], TRIES, 0)
    share = np.array(data.draw(st.lists(st.floats(0, 1), min_size=11, max_size=11)))
    right = np.floor(tried * share).astype(int)
    found = lol.updated(levels, right, tried)
    assert ((found >= 0) & (found <= 10) & (abs(found - levels) <= 1)).all()
    # More right answers never give a lower level; and what was not tried changes nothing.
    assert (lol.updated(levels, tried, tried) >= found).all()
    assert (lol.updated(levels, tried, tried) == np.minimum(levels + 1, 10)).all()
    beyond = right + np.where(np.arange(11) > levels[:, None], 1, 0)
    assert (lol.updated(levels, beyond, tried) == found).all()


def test_a_trial_draws_more_the_stronger_and_from_the_class_alone():
    labels = np.array([0, 0, 2, 0, 2])
    places, strengths = lol.trial(labels, np.array([1, 5, 0]), np.random.default_rng(0))
    # Class 0: 10 at strength 0 and 20 at 1; class 1 has no image; class 2: 10 at strength 0.
    assert lol.counted(labels[places], strengths, np.ones(len(places), bool), 3).tolist() == [
        [10, 20] + [0] * 9, [0] * 11, [10] + [0] * 10
    ]  # fmt: skip
    assert set(places[labels[places] == 2]) == {2, 4}
    assert lol.counted(labels[places], strengths, labels[places] == 2, 3).sum() == 10


def test_half_of_an_epoch_is_augmented_at_its_classes_level():
    labels = np.repeat([0, 1], 2000)
    strengths = lol.epoch_strengths(labels, np.array([0, 7]), np.random.default_rng(0))
    assert set(strengths[labels == 0]) == {0} and set(strengths[labels == 1]) == {0, 7}
    assert abs((strengths[labels == 1] == 7).mean() - 0.5) < 0.04


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kernel", "theirs"),
    [(lol.EDGES, ImageFilter.EDGE_ENHANCE), (lol.DETAIL, ImageFilter.DETAIL), (lol.SMOOTH, ImageFilter.SMOOTH)],
)
def test_filters_are_pillows(kernel, theirs):
    pixels = picture()
    ours = lol.filtered(torch.from_numpy(pixels).permute(2, 0, 1), kernel).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(Image.fromarray(pixels).filter(theirs))).max() <= 1


@pytest.mark.parametrize("kind", range(len(lol.OPERATIONS)))
@pytest.mark.parametrize("share", [0, 1 / 30, 1 / 3])
def test_every_operation_gives_an_image_of_the_same_shape(kind, share):
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    operation, low, high = lol.OPERATIONS[kind]
    before = image.clone()
    for sign in (-1, 1):
        found = operation(image, low + (high - low) * share, sign)
        assert found.shape == image.shape and found.dtype == torch.uint8
    assert torch.equal(image, before), "the image that it was given is another one now"


def test_directions_and_ranges():
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    image[:, 4, 4] = 255
    right = lol.moved(image, x=3)
    assert right[:, 4, 7].tolist() == [255] * 3 and int(right.sum()) == 3 * 255
    # Strength 10 of 30: a third of the range, 100 pixels of translation to 33.
    assert torch.equal(lol.augmented(image, 0, 1, 1), image)
    quarter = lol.moved(image, x=2, angle=0, y=-4)
    assert quarter[:, 0, 6].tolist() == [255] * 3


def test_the_draws_depend_on_the_seed_and_the_number_alone():
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    state = torch.get_rng_state()
    one, again, other = (lol.augmented(image, 5, 3, number) for number in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_stronger_is_further_from_the_image():
    image = torch.from_numpy(np.kron(picture()[:6, :5], np.ones((8, 8, 1), np.uint8))).permute(2, 0, 1)
    far = [
        np.mean([(lol.augmented(image, s, 0, i).float() - image.float()).abs().mean().item() for i in range(60)])
        for s in (0, 1, 4, 10)
    ]
    assert far == sorted(far) and far[0] == 0 and far[-1] > far[1] + 5


SHORT = ["--curriculum", "none", "--augment", "cuda", "--epochs", "4", "--model", "resnet8", "--loss", "bs"]


@pytest.mark.slow
def test_a_run_moves_its_levels_and_goes_on_exactly_after_a_signal(tmp_path, monkeypatch):
    assert train_lt.main([*SHORT, "--out", str(tmp_path / "whole")]) == 0
    history = files.read_json_lines(tmp_path / "whole/history.jsonl")
    assert all({"cuda_overall", "cuda_many", "cuda_few"} <= set(record) for record in history)
    assert any(record["cuda_overall"] > 0 for record in history)
    from training import augmentations

    steps, augment = [], augmentations.augment

    def counting(*args):
        steps.append(1)
        if len(steps) == 30:  # in the third epoch of 12 batches
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(*args)

    monkeypatch.setattr(augmentations, "augment", counting)
    assert train_lt.main([*SHORT, "--out", str(tmp_path / "r")]) == runs.RESUMABLE
    saved = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")
    assert saved["partial"] and len(saved["learned"]) == 10
    assert train_lt.main([*SHORT, "--out", str(tmp_path / "r")]) == 0
    logits = [np.load(tmp_path / run / "predictions.npz")["logits"] for run in ("whole", "r")]
    assert np.array_equal(*logits)


def test_files_are_augmented_by_workers_as_without(tmp_path):
    from training import stores

    names = []
    for i in range(6):
        Image.fromarray(np.kron(picture(), np.ones((4, 4, 1), np.uint8))).save(tmp_path / f"{i}.png")
        names.append(tmp_path / f"{i}.png")
    places = [torch.arange(4), torch.arange(4, 6)]
    strengths = [torch.tensor([0, 3, 0, 9]), torch.tensor([2, 0])]
    found = [
        list(stores.Decoded(names, "cpu", 32, workers).training(places, places, 5, strengths)) for workers in (0, 2)
    ]
    for alone, together in zip(*found, strict=True):
        assert torch.equal(alone, together)
    plain = list(stores.Decoded(names, "cpu", 32, 0).training(places, places, 5))
    same = [torch.equal(a, b) for a, b in zip(torch.cat(plain), torch.cat(found[0]), strict=True)]
    assert [same[0], same[2], same[5]] == [True] * 3 and not all(same)


def test_the_crop_says_nothing_about_the_operations(monkeypatch):
    """From one generator's numbers, a large crop would always be moved aside and a small one always mirrored."""
    from training import stores

    crops, operations = [], []

    def decode(path, size, rng, crop):
        crops.append(rng.random())
        return np.zeros((size, size, 3), np.uint8)

    def draw(image, strength, seed, number):
        operations.append(np.random.default_rng([seed, number]).random())
        return image

    monkeypatch.setattr(stores, "decode", decode)
    monkeypatch.setattr(stores, "augmented", draw)
    places = [torch.arange(8)]
    list(stores.Decoded(["none.png"] * 8, "cpu", 8, 0).training(places, places, 5, [torch.full((8,), 3)]))
    assert len(set(crops + operations)) == 16
