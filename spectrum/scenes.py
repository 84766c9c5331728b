"""Scene descriptions of any class, made offline from a small grammar of action, place, light, weather and view.

They stand in for descriptions by a language model: varied, at least 15 words each, and the same ones every time.
"""

from __future__ import annotations

import random

from runtime.files import digest_int

LEAST_WORDS = 15

# Every phrase fits behind every other slot's, for a thing, an animal, a plant, a dish or a building.
ACTIONS = (
    "resting quietly",
    "standing out clearly",
    "partly hidden from sight",
    "facing the camera",
    "turned to one side",
    "casting a long shadow",
    "in the very centre of the picture",
    "at the edge of the frame",
    "surrounded by open space",
    "beside a larger object",
    "seen among several others",
    "caught in an ordinary moment",
)
PLACES = (
    "on a rocky shore",
    "in a quiet village street",
    "on a worn wooden table",
    "in a meadow of tall grass",
    "at the edge of a pine forest",
    "in front of a brick wall",
    "in a busy open market",
    "beside a slow river",
    "on a city pavement",
    "in a small walled garden",
    "on a sandy plain",
    "by a large window indoors",
    "in an old stone courtyard",
    "on a hillside above a lake",
)
LIGHTS = (
    "in soft morning light",
    "under a bright midday sun",
    "in the warm glow of sunset",
    "lit from behind",
    "under the lamps of an early evening",
    "in deep shade with bright spots",
    "in pale winter light",
    "under a single warm lamp",
    "in clear and even light",
    "in the blue light before dawn",
    "with strong light from the left",
    "with dim and cool light",
)
WEATHERS = (
    "after a light rain",
    "with thin mist in the distance",
    "on a dry and windy day",
    "under a cloudless sky",
    "with heavy clouds above",
    "while a few snowflakes fall",
    "on a hazy summer day",
    "with drops of dew all around",
    "on a still and humid day",
    "with a storm gathering far away",
    "on a crisp autumn day",
    "just as the fog lifts",
)
VIEWS = (
    "photographed from a low angle",
    "photographed from above",
    "photographed from across the scene",
    "in a close view that shows fine detail",
    "in a wide view with much background",
    "seen at eye level",
    "seen through blurred leaves in front",
    "with a sharp subject and a soft background",
    "in a view slightly from one side",
    "photographed with a long lens from far away",
    "in a plain documentary photograph",
    "framed by dark edges",
)
SLOTS = (ACTIONS, PLACES, LIGHTS, WEATHERS, VIEWS)


def describe(class_name: str, count: int) -> list[str]:
    """`count` different descriptions of a scene with a `class_name`, each of 15 words or more.

    They depend on the class name alone, and the first ones stay the same whatever `count` is. No phrase comes twice
    among the first twelve.

    Args:
        class_name: any text that is not blank.
        count: up to 10,000.
    """
    name = " ".join(class_name.split())
    article = "an" if name[0].lower() in "aeiou" else "a"
    rng = random.Random(digest_int("scenes", class_name))
    found: dict[str, None] = {}
    left: list[list[str]] = [[] for _ in SLOTS]
    while len(found) < count:
        for phrases, slot in zip(left, SLOTS, strict=True):
            if not phrases:  # every phrase has had its turn: shuffle anew
                phrases.extend(rng.sample(slot, len(slot)))
        action, place, light, weather, view = (phrases.pop() for phrases in left)
        found[f"{article} {name} {action} {place}, {light}, {weather}, {view}"] = None
    return list(found)
