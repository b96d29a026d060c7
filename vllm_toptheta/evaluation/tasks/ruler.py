"""RULER's tasks, written from the paper (Hsieh et al., arXiv 2404.06654): needles, variable
tracking and word counts. Its two question-answering tasks are in `user_texts.py`: they need texts.

Templates and numbers of needles are the paper's; haystacks are of the user's text instead of Paul
Graham's essays, words come from it too, and an answer may take as many tokens as its values need.
"""

import itertools
import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_toptheta.evaluation.tasks import haystack
from vllm_toptheta.evaluation.tasks.cases import Case, Question, Source, Task, contains_all

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_TOKENS = {"numbers": 16, "uuids": 48}
_HOPS = 4


@dataclass(frozen=True)
class Needles:
    """One of the needle tasks.

    Attributes:
        hay: "noise", "text", or "needles": everything is a needle.
        keys: words or uuids.
        values: numbers or uuids.
        hidden: different keys in the text; with "needles" as many as fit.
        values_per_key: values that a key has.
        asked: keys that one question asks for.
    """

    hay: str
    keys: str = "words"
    values: str = "numbers"
    hidden: int = 1
    values_per_key: int = 1
    asked: int = 1

    def build(self, source: Source, units: int, name: str, index: int) -> Case:
        """A case with so many sentences or needles of haystack."""
        chance = source.chance(name, source.length, index)
        number = units if self.hay == "needles" else self.hidden
        keys = (haystack.word_keys if self.keys == "words" else haystack.uuids)(number, chance)
        draw = haystack.numbers if self.values == "numbers" else haystack.uuids
        values = draw(number * self.values_per_key, chance)
        of_key = [values[i :: len(keys)] for i in range(len(keys))]
        needles = [
            f"One of the special magic {self.values} for {key} is: {value}."
            for key, mine in zip(keys, of_key, strict=True)
            for value in mine
        ]
        chance.shuffle(needles)
        if self.hay == "text":
            hay = haystack.passage(source.text, units, chance)
        else:
            hay = [_NOISE[i % len(_NOISE)] for i in range(units)] if self.hay == "noise" else []
        chosen = chance.sample(range(number), self.asked)
        answers = [value for i in chosen for value in of_key[i]]
        asked = [keys[i] for i in chosen]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
        what, verb = (self.values, "are") if len(answers) > 1 else (self.values[:-1], "is")
        verb_first = "are all the" if len(answers) > 1 else "is the"
        return Case(
            f"Some special magic {self.values} are hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {self.values} afterwards.\n"
            + haystack.hide(hay, needles, chance),
            [
                Question(
                    f"\nWhat {verb_first} special magic {what} for {query} mentioned in the "
                    "provided text?",
                    f" The special magic {what} for {query} mentioned in the provided text {verb}",
                    max_tokens=_TOKENS[self.values] * len(answers),
                    score=contains_all(answers),
                )
            ],
        )


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", values="uuids"),
    "niah_multikey_1": Needles("text", hidden=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("text", values_per_key=4),
    "niah_multiquery": Needles("text", hidden=4, asked=4),
}


def _tracking(source: Source, units: int, index: int) -> Case:
    chance = source.chance("vt", source.length, index)

    def chain(number: str) -> tuple[list[str], list[str]]:
        names: list[str] = []
        while len(names) <= _HOPS:
            name = "".join(chance.choices(string.ascii_uppercase, k=5))
            names += [name] if name not in names else []
        values = [number, *(f"VAR {name}" for name in names)]
        return names, [f"VAR {name} = {value}." for name, value in zip(names, values, strict=False)]

    def asked(number: str) -> tuple[str, str]:
        question = "Question: Find all variables that are assigned the value {} in the text above."
        lead = (
            " Answer: According to the chain(s) of variable assignment in the text above, {} "
            "variables are assigned the value {}, they are:"
        )
        return "\n" + question.format(number), lead.format(_HOPS + 1, number)

    def noise(number: int) -> list[str]:
        return [_NOISE[i % len(_NOISE)] for i in range(number)]

    task = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    shown, real = haystack.numbers(2, chance, 5)
    example, lines = chain(shown)
    names, needles = chain(real)
    one_shot = task + haystack.hide(noise(10), lines, chance) + "".join(asked(shown))
    return Case(
        f"{one_shot} {' '.join(example)}\n\n{task}" + haystack.hide(noise(units), needles, chance),
        [Question(*asked(real), max_tokens=40, score=contains_all(names), stop=("\n\n",))],
    )


def _common_words(source: Source, units: int, index: int) -> Case:
    chance = source.chance("cwe", source.length, index)
    words = list(haystack.vocabulary(source.text))
    if len(words) < units + 40:  # a short text at a great length
        words += [key.replace("-", "") for key in haystack.word_keys(units + 40, chance)]
    drawn = chance.sample(words, units + 40)
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    asked = "\nQuestion: What are the 10 most common words in the above list?"
    lead = " Answer: The top 10 words that appear most often in the list are:"

    def listed(common: Sequence[str], often: int, others: Sequence[str]) -> str:
        every = [*common] * often + [*others] * 3
        chance.shuffle(every)
        return " ".join(f"{number}. {word}" for number, word in enumerate(every, 1))

    example, common = drawn[:10], drawn[20:30]
    answer = " ".join(f"{number}. {word}" for number, word in enumerate(example, 1))
    return Case(
        f"{task}{listed(example, 10, drawn[10:20])}{asked}{lead} {answer}\n\n"
        f"{task}{listed(common, 30, drawn[40:])}",
        [Question(asked, lead, max_tokens=100, score=contains_all(common), stop=("\n\n",))],
    )


def _frequent_words(source: Source, units: int, index: int) -> Case:
    chance = source.chance("fwe", source.length, index)
    words = ["".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(2000)]
    words[0] = "..."  # the most frequent is noise
    zeta = math.pi**2 / 6  # of the exponent 2
    counts = [int(units / (rank**2 * zeta)) for rank in range(1, len(words) + 1)]
    every = [word for word, often in zip(words, counts, strict=True) for _ in range(often)]
    chance.shuffle(every)
    return Case(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(every)}",
        [
            Question(
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
                "are the three most frequently appeared words in the above coded text?",
                " Answer: According to the coded text above, the three most frequently appeared "
                "words are:",
                max_tokens=50,
                score=contains_all(words[1:4]),
                stop=("\n\n",),
            )
        ],
    )


def _endless(build: Callable[..., Case], smallest: int = 1) -> Task:
    def cases(source: Source) -> Iterator[Case]:
        for index in itertools.count():
            yield source.fill(partial(build, source, index=index), smallest)

    return cases


def _needles(name: str) -> Task:
    task = NEEDLES[name]
    return _endless(lambda source, units, index: task.build(source, units, name, index))


TASKS: dict[str, Task] = {
    **{name: _needles(name) for name in NEEDLES},
    "vt": _endless(_tracking),
    "cwe": _endless(_common_words),
    "fwe": _endless(_frequent_words, smallest=100),
}
