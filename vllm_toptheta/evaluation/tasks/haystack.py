"""Text and a seed in; sentences, words and keys to hide and ask for out."""

import random
import re
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vllm_toptheta.evaluation.tasks.cases import Unbuildable

_ADJECTIVES = (
    "amber ancient ashen azure bitter bold brave brief bright brisk broken calm candid careful "
    "clever cold copper crimson curious dapper distant eager early emerald faint famous fierce "
    "fragile frozen gentle gilded golden grand hidden hollow humble idle ivory jolly keen lofty "
    "lonely loyal lucky mellow mighty modest muted narrow nimble noble odd pale patient plain "
    "polite proud quick quiet rapid rare restless ripe rough royal rustic scarlet secret sharp "
    "shy silent silver simple sleepy slender smooth solemn spare steady stern sturdy subtle "
    "sudden sunny swift tall tame tender tidy tiny tough tranquil urban vague vast velvet vivid "
    "warm weary wild wise witty wooden young zealous"
)
_NOUNS = (
    "acorn anchor anvil apple arrow badger barrel basket beacon bell bishop blanket bottle bridge "
    "bucket button cabin candle canyon carpet castle cedar chapel cherry circle clock cloud "
    "cobbler comet cottage cradle crystal curtain dagger daisy desert dolphin dragon drum eagle "
    "ember engine falcon feather fiddle forest fountain garden glacier goblet hammer harbor "
    "harvest helmet heron island jacket jewel kettle kitten ladder lantern lemon letter lizard "
    "locket magnet maple marble meadow mirror monkey mountain needle nettle ocean orchard otter "
    "paddle palace parcel pebble pepper pigeon pillow planet pocket poplar quarry quill rabbit "
    "raven ribbon river rocket saddle sailor sandal shadow shelter shovel signal spider spoon "
    "stable statue summit table temple thimble thunder ticket timber tunnel turtle valley vessel "
    "violin walnut whistle willow window winter wizard zipper"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def read_text(paths: Sequence[Path] | None) -> str:
    """The user's files, or the prose that every Python carries without any.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not UTF-8 text.
    """
    if paths:
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@lru_cache(maxsize=2)
def sentences(text: str) -> list[str]:
    """A text's sentences, each on one line."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))


def passage(text: str, number: int, chance: random.Random) -> list[str]:
    """Sentences in a row from a random place; the text repeats where it ends."""
    found = sentences(text)
    start = chance.randrange(len(found))
    return [found[(start + index) % len(found)] for index in range(number)]


@lru_cache(maxsize=2)
def vocabulary(text: str) -> list[str]:
    """A text's different lower-case words of four to nine letters, in alphabetic order."""
    return sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))


def hide(haystack: Sequence[str], needles: Sequence[str], chance: random.Random) -> str:
    """Sentences with needles between them, in order, at random places."""
    places = sorted(chance.randrange(len(haystack) + 1) for _ in needles)
    parts, done = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*haystack[done:place], needle]
        done = place
    return " ".join([*parts, *haystack[done:]])


def word_keys(number: int, chance: random.Random) -> list[str]:
    """Different keys such as "silent-harbor".

    Raises:
        Unbuildable: there are not so many.
    """
    if number > (most := len(ADJECTIVES) * len(NOUNS)):
        raise Unbuildable(f"needs {number} different keys, there are {most}; give a smaller length")
    drawn = chance.sample(range(most), number)
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in drawn]


def numbers(number: int, chance: random.Random, digits: int = 7) -> list[str]:
    """Different numbers."""
    return [str(n) for n in chance.sample(range(10 ** (digits - 1), 10**digits), number)]


def uuids(number: int, chance: random.Random) -> list[str]:
    """Random UUIDs."""
    return [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(number)]
