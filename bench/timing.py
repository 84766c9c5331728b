"""How two ways to do the same are timed against each other."""

from __future__ import annotations

import resource
import statistics
import time


def spent() -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process and of its workers that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in usage)


def compare(ours, theirs, images: int, rounds: int) -> dict:
    """Medians of images a second of two functions, which are called in turn after a warm-up of each.

    By the clock, and by CPU seconds, which other work on the machine disturbs less.
    """
    found: dict[str, list] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for name, run in (("ours", ours), ("theirs", theirs)):
            before = spent()
            run()
            if number:
                found[name].append([images / (b - a) for a, b in zip(before, spent(), strict=True)])
    result = {}
    for place, suffix in enumerate(("", "_per_cpu_second")):
        rates = {name: [one[place] for one in values] for name, values in found.items()}
        result |= {f"{name}{suffix}": statistics.median(values) for name, values in rates.items()}
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        result[f"ratio{suffix}"] = statistics.median(ratios)
    return result
