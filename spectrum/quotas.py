"""Quotas: which classes and levels have too few kept images, and which further images to draw for them."""

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
    """Further images that should fill `short`: rows with source, level, seed and prompt.

    A class and level gets short / p of them, rounded up, where p = (kept + 1) / (made + 2) estimates the acceptance
    rate from the images so far; at most ten times `short`. The class's sources take turns, each with its next unused
    seed, and each image gets the prompt that the class has used least at this level.

    Args:
        first_seed: number of seeds in the spectrum's own plan; new seeds start there or above.
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
            prompt = min(texts, key=times.__getitem__)  # the first of the least used
            times[prompt] += 1
            planned.append({"source": source, "level": level, "seed": seeds[source, level], "prompt": prompt})
            seeds[source, level] += 1
    return planned
