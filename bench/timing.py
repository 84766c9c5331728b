"""How two ways to do the same are timed against each other, and how what was found is noted."""

from __future__ import annotations

import json
import resource
import statistics
import time
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
            before = spent()
            run()
            if number:
                found[name].append([counts[name] / (b - a) for a, b in zip(before, spent(), strict=True)])
    result = {}
    for place, suffix in enumerate(("", "_per_cpu_second")):
        rates = {name: [one[place] for one in values] for name, values in found.items()}
        result |= {f"{name}{suffix}": statistics.median(values) for name, values in rates.items()}
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        result[f"ratio{suffix}"] = statistics.median(ratios)
    return result


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
    row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"environment": environment()}) + "\n")
