"""Quotas: classes and levels of which too few images are kept, and what to draw more."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict


def find_short(plan: dict, names: dict[int, str], made: Counter, kept: Counter, least: int) -> list[dict]:
    """Each class and level of the plan with fewer than `least` kept images."""
    return [
        {
            "label": label,
            "class_name": names.get(label, ""),
            "level": level,
            "made": made[label, level],
            "kept": kept[label, level],
            "short": least - kept[label, level],
        }
        for label in plan["hard_classes"]
        for level in plan["levels"]
        if kept[label, level] < least
    ]


def plan_top_up(rows: list[dict], prompts: dict[int, dict], short: list[dict], first_seed: int) -> list[dict]:
    """The images to draw so that `short` may be filled: rows with source, level, seed and prompt.

    For each class and level as many as its acceptance so far makes it need, (kept + 1) of (made + 2) being accepted, at
    most ten times what is missing. They are shared among the class's sources; seeds go on above those of the spectrum;
    prompts are those that the class has used least at this level.

    Args:
        first_seed: the seeds that the spectrum's own plan has; new ones are never below.
    """
    sources, used, seeds = defaultdict(dict), defaultdict(Counter), defaultdict(lambda: first_seed)
    for row in rows:
        sources[row["label"]][row["source"]] = None
        used[row["label"], row["level"]][row["prompt"]] += 1
        unit = row["source"], row["level"]
        seeds[unit] = max(seeds[unit], row["seed"] + 1)
    planned = []
    for gap in short:
        label, level = gap["label"], gap["level"]
        if not sources[label]:
            continue
        draws = min(10 * gap["short"], math.ceil(gap["short"] * (gap["made"] + 2) / (gap["kept"] + 1)))
        texts, times = prompts[label]["prompts"], used[label, level]
        for source in itertools.islice(itertools.cycle(sources[label]), draws):
            prompt = min(texts, key=times.__getitem__)  # the first of those that are used least
            times[prompt] += 1
            planned.append({"source": source, "level": level, "seed": seeds[source, level], "prompt": prompt})
            seeds[source, level] += 1
    return planned
