"""How two ways to do the same are timed against each other, and how what was found is noted."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.runs import environment


def spent() -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process and of its workers that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in usage)


def compare(ours, theirs, images: int, rounds: int, their_images: int = 0) -> dict:
    """Medians of images a second of two functions, which are called in turn after a warm-up of each.

    By the clock, and by CPU seconds, which other work on the machine disturbs less.

    Args:
        images: of a call.
        their_images: of a call of theirs, where those are fewer.
    """
    counts = {"ours": images, "theirs": their_images or images}
    found: dict[str, list] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for name, run in (("ours", ours), ("theirs", theirs)):
            rates = rates_of(run, counts[name])
            if number:
                found[name].append(rates)
    return compare_rates(found["ours"], found["theirs"])


def rates_of(run, images: int) -> tuple[float, float]:
    """Images a second of one call: by the clock, and by CPU seconds."""
    before = spent()
    run()
    clock, cpu = (images / (b - a) for a, b in zip(before, spent(), strict=True))
    return clock, cpu


def compare_rates(ours: list[tuple], theirs: list[tuple]) -> dict:
    """Medians of the rates of `rates_of` and of their ratios, and the rates of each round."""
    result, rounds = {}, {}
    for place, suffix in enumerate(("", "_per_cpu_second")):
        both = [[rates[place] for rates in side] for side in (ours, theirs)]
        rounds |= {f"ours{suffix}": both[0], f"theirs{suffix}": both[1]}
        result |= {f"{name}{suffix}": value for name, value in medians(*both).items()}
    return result | {"rounds": rounds}


def medians(ours: Sequence[float], theirs: Sequence[float], lower: bool = False) -> dict[str, float]:
    """The median of each side's rounds, and of how many times better ours is in a round.

    Args:
        lower: of seconds, less is better.
    """
    ratios = [b / a if lower else a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ours": statistics.median(ours), "theirs": statistics.median(theirs), "ratio": statistics.median(ratios)}


def rate(ours, images: int, rounds: int) -> dict:
    """The median of images a second of one function, after a warm-up."""
    found = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        ours()
        if number:
            found.append(images / (time.perf_counter() - began))
    return {"ours": statistics.median(found)}


def note(path: Path, row: dict) -> None:
    """Print what was found, and add it to a file as a line of JSON, with the versions that it was found with."""
    row = shorten(row)
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"environment": environment()}) + "\n")


def shorten(found):
    """What was found, numbers within it in four digits."""
    if isinstance(found, dict):
        return {name: shorten(value) for name, value in found.items()}
    if isinstance(found, list):
        return [shorten(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found
