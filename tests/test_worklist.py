"""The work list: every image once, in full batches of one shape, shared out evenly, planned in seconds."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from generation import worklist
from generation.plan import DrawPlan
from generation.sizes import draw_size, round_size
from spectrum.tables import Hard
from spectrum.units import Unit, short_name


def size_of(source: str) -> tuple[int, int]:
    return [(16, 16), (32, 16), (16, 32)][int(source) % 3]


plans = st.fixed_dictionaries(
    {
        "sources": st.integers(1, 40),
        "levels": st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
        "seeds": st.integers(1, 5),
        "batch_size": st.integers(1, 40),
        "shards": st.integers(1, 20),
    }
)


@given(plans)
def test_every_unit_is_drawn_once_in_batches_of_one_shape_and_few_are_short(plan):
    names = [str(number) for number in range(plan["sources"])]
    units = list(worklist.order_units(dict.fromkeys(names, plan["seeds"]), plan["levels"]))
    assert len(units) == plan["sources"] * len(plan["levels"]) * plan["seeds"]
    batches = worklist.make_batches(units, size_of, plan["batch_size"])
    assert sorted(unit for batch in batches for unit in batch.units) == sorted(units)
    for batch in batches:
        assert {(unit.level, size_of(unit.source)) for unit in batch.units} == {(batch.level, batch.size)}
    short = [(batch.level, batch.size) for batch in batches if len(batch.units) < plan["batch_size"]]
    assert len(short) == len(set(short)), "two short batches of one shape should be one"


def steps_of(level: int) -> int:
    return worklist.steps_at(level, 50)


@given(plans)
def test_shards_hold_every_batch_once_and_differ_by_no_more_than_one_batch(plan):
    names = [str(number) for number in range(plan["sources"])]
    units = worklist.order_units(dict.fromkeys(names, plan["seeds"]), plan["levels"])
    batches = worklist.make_batches(units, size_of, plan["batch_size"])
    shares = worklist.share_out(batches, steps_of, plan["shards"])
    assert len(shares) == plan["shards"]
    assert sorted(batch.units for share in shares for batch in share) == sorted(batch.units for batch in batches)
    work = [sum(worklist.cost(batch, steps_of(batch.level)) for batch in share) for share in shares]
    assert max(work) - min(work) <= max(worklist.cost(batch, steps_of(batch.level)) for batch in batches)


def test_the_cost_of_a_batch_is_steps_times_images_times_pixels():
    units = [worklist.Unit("a", 90, seed) for seed in range(3)]
    assert worklist.cost(worklist.Batch(90, (32, 16), None, units), 5) == 5 * 3 * 32 * 16


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [((480, 270), 8, (480, 272)), ((268, 4), 8, (264, 8)), ((1, 1), 8, (8, 8)), ((21, 17), 2, (20, 16))],
)
def test_sides_are_rounded_to_the_nearest_multiple(size, multiple, expected):
    assert round_size(size, multiple) == expected


def test_the_size_asked_for_is_the_size_drawn():
    assert draw_size((32, 32), "source", 1024, 8) == (32, 32)
    assert draw_size((32, 32), (500, 270), 1024, 8) == (496, 272)
    assert draw_size((200, 50), "native", 512, 8) == (1024, 256)  # 4 to 1, of 512 * 512 pixels


MILLION = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
from generation import worklist
began = time.monotonic()
names = [f"n0{number % 1000}/image_{number}.JPEG" for number in range(25_000)]
units = worklist.order_units(dict.fromkeys(names, 8), [0, 10, 30, 50, 70])
batches = worklist.make_batches(units, lambda name: (480, 272), 32)
mine = worklist.share_out(batches, lambda level: worklist.steps_at(level, 50), 16)[3]
wanted = {unit for batch in batches for unit in batch.units}
assert len(wanted) == 1_000_000
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())  # of this process, not of its parent
print(time.monotonic() - began, int(peak[1]) / 2**20)
"""


@pytest.mark.slow
def test_a_million_units_are_planned_in_30_seconds_and_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MILLION, str(ROOT)], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 30 and gigabytes < 1


def test_photographs_far_larger_than_the_generator_draws_are_drawn_at_its_native_area():
    """12 megapixels of 4:3: 1024 * 1024 pixels of that shape are 1182 x 887; 1600 x 1200 stays below twice the area."""
    assert draw_size((4000, 3000), "source", 1024, 8, most=2 * 1024**2) == (1184, 888)
    assert draw_size((1600, 1200), "source", 1024, 8, most=2 * 1024**2) == (1600, 1200)
    assert draw_size((4000, 3000), (640, 480), 1024, 8, most=2 * 1024**2) == (640, 480)


def test_iwildcam_is_drawn_at_480x272_and_saved_and_scored_at_480x270():
    import generate_spectrum

    args = generate_spectrum.build_parser().parse_args(["--dataset", "iwildcam"])
    assert args.size == args.save_size == (480, 270)


@pytest.mark.parametrize(("asked", "saved"), [(None, (480, 272)), ("source", (480, 270)), ((64, 32), (64, 32))])
def test_the_save_size_is_the_one_asked_for(asked, saved):
    plan = SimpleNamespace(args=SimpleNamespace(save_size=asked), sizes={"a": (480, 270)})
    assert DrawPlan.save_size_of(plan, "a", (480, 272)) == saved


def test_the_lora_is_that_of_the_sources_class():
    plan = SimpleNamespace(hard={"a": Hard("a", 7, "owl")}, adapters=["class_3", "class_7"])
    assert DrawPlan.adapter_of(plan, Unit("a", 0, 0)) == "class_7"
    plan.adapters = ["all"]
    assert DrawPlan.adapter_of(plan, Unit("a", 0, 0)) is None


def test_an_image_is_drawn_with_its_sources_adapter_and_another_of_its_class():
    hard = {name: Hard(name, label, "owl") for name, label in (("a", 7), ("b", 7), ("c", 7), ("d", 8))}
    called = {name: f"source_{short_name(name)}" for name in hard}
    plan = SimpleNamespace(
        hard=hard,
        adapters=list(called.values()),
        by_class={7: [called[name] for name in "abc"], 8: [called["d"]]},
        settings={"lora_mix": 2},
    )
    mixes = [DrawPlan.adapter_of(plan, Unit("a", 0, seed)) for seed in range(160)]
    assert set(mixes) == {f"{called['a']}+{called['b']}", f"{called['a']}+{called['c']}"}
    assert mixes[:8] == [mixes[0]] * 8  # eight images share a mix
    assert DrawPlan.adapter_of(plan, Unit("d", 0, 0)) == called["d"]  # the only one of its class
    plan.settings["lora_mix"] = 1
    assert DrawPlan.adapter_of(plan, Unit("a", 0, 9)) == called["a"]
