"""Multi-key retrieval: 64 codes hidden in one text, one asked for at a time."""

from collections.abc import Iterator

from vllm_toptheta.evaluation.tasks import haystack
from vllm_toptheta.evaluation.tasks.cases import Case, Question, Source, begins_with

KEYS = 64
_DIGITS = 5


def kv_retrieval(source: Source) -> Iterator[Case]:
    """Contexts of 64 keys each, with a question for every key: fifty questions are one prefill."""
    index = 0
    while True:
        names = ("kv_retrieval", source.length, index)

        def build(units: int, names: tuple[object, ...] = names) -> Case:
            chance = source.chance(*names)
            keys = haystack.word_keys(KEYS, chance)
            codes = haystack.numbers(KEYS, chance, _DIGITS)
            needles = [
                f"The code of the {key.replace('-', ' ')} is {code}."
                for key, code in zip(keys, codes, strict=True)
            ]
            order = chance.sample(range(KEYS), KEYS)
            context = haystack.hide(haystack.passage(source.text, units, chance), needles, chance)
            return Case(
                context,
                [
                    Question(
                        f"\n\nWhat is the code of the {keys[i].replace('-', ' ')}?",
                        f" The code of the {keys[i].replace('-', ' ')} is",
                        max_tokens=8,
                        score=begins_with(codes[i]),
                        stop=(".", "\n"),
                    )
                    for i in order
                ],
            )

        yield source.fill(build)
        index += 1
