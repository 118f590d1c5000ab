"""What polyglot is trained on: an endless, seeded stream of problems with worked solutions.

Never in it: a tuple of the dev or the test split, or one of the reference script's 20 problems (`split_of` decides,
and every draw passes through it). The one exception is C(n, k): all 429 values are shown, because there is no working
short enough to compute them; what polyglot knows of them is recall and is reported apart. All wordings are shown,
those of dev and test included: a model trained from nothing knows no word it has not seen.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.polyglot.solutions import solution
from kernel_surgery.problems.generator import Parameters, Problem, answer_of, draw, fact, split_of
from kernel_surgery.problems.wordings import EXPAG_WORDINGS, WORDINGS

# Shares of the stream by kind, found by watching dev accuracy: long multiplication and division take the most examples,
# and each C(n, k) has to be seen about a hundred times to be remembered; they are short.
SHARES = {"plus": 8, "times": 28, "combinatorics": 22, "modular": 24, "geometry": 6, "sequences": 12}
_CATEGORY = {"plus": "arithmetic", "times": "arithmetic"}


class Draw(NamedTuple):
    """One training example before it is text. `wording`: the three splits' wordings, then the script's."""

    kind: str
    parameters: Parameters
    language: str
    wording: int


def allowed(kind: str, parameters: Parameters) -> bool:
    """Whether a tuple may be trained on."""
    return kind == "combinatorics" or split_of(kind, parameters) == "fit"


def _draw_kind(kind: str, rng: random.Random) -> Parameters:
    while True:
        drawn, parameters = draw(_CATEGORY.get(kind, kind), rng)
        if drawn == kind and allowed(kind, parameters):
            return parameters


def training_draws(rng: random.Random) -> Iterator[Draw]:
    """The endless stream, determined by `rng`."""
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        parameters = _draw_kind(kind, rng)
        language = rng.choice(LANGUAGES)
        wordings = len(WORDINGS[kind][language]) + (language in EXPAG_WORDINGS[kind])
        yield Draw(kind, parameters, language, rng.randrange(wordings))


def example(drawn: Draw) -> tuple[str, str]:
    """(prompt, solution) as texts. They are tokenized apart, as they are when the model is used."""
    kind, parameters, language, wording = drawn
    templates = (*WORDINGS[kind][language], EXPAG_WORDINGS[kind].get(language, ""))
    problem = Problem(
        str(fact(kind, parameters)),
        _CATEGORY.get(kind, kind),
        kind,
        "fit",
        parameters,
        answer_of(kind, parameters),
        {language: templates[wording].format(**parameters)},
    )
    return problem.prompts[language], solution(problem, language)
