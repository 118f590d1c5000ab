"""Maths problems in seven languages, in three splits that share neither a problem nor a wording.

The problems have five categories. Each is asked in every language. A *problem* is a tuple of parameters, and a
*wording* is a sentence that asks it. The *reference script*, or *expag*, is the script that this project began with.
The parameters have its ranges. The splits are:

    fit    measures the subspace
    dev    serves to make choices
    test   gives the reported results

A hash of the tuple decides its split. The number of requested problems does not matter, so a run with 40 problems and a
run with 400 use the same splits. Tuples that state the same fact share a split:

    a + b and b + a
    a × b, b × a, and the rectangle with these sides
    C(n, k) and C(n, n-k)

The 20 problems of the reference script (`expag_problems`) belong to no split.
"""

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import LANGUAGES, SPLITS
from kernel_surgery.problems.wordings import EXPAG_WORDINGS, WORDINGS


def parse_languages(text: str) -> tuple[str, ...]:
    """Parse `en,zh` to ("en", "zh"): in the same order, without repetitions. `all` gives all seven languages.

    Raises UserError for an unknown language, and for a text without any.
    """
    if text.strip() == "all":
        return tuple(LANGUAGES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [language for language in names if language not in LANGUAGES]
    if unknown or not names:
        raise UserError(f"unknown language {(unknown or [text])[0]!r}: choose from {', '.join(LANGUAGES)}, or all.")
    return tuple(dict.fromkeys(names))


CATEGORIES = ("arithmetic", "combinatorics", "modular", "geometry", "sequences")
EXPAG_LANGUAGES = ("en", "zh")
# Percent of the hash range for (test, dev). The rest is fit. C(n, k) gets more, because it has only 225 distinct facts.
_SHARES = {"combinatorics": (24, 24)}
_DEFAULT_SHARES = (10, 10)
# Categories that are small enough to enumerate at every call, the smallest first.
_LISTED = ("combinatorics", "geometry", "sequences")
Parameters = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """One problem. `prompts[language]` is the exact text to tokenize, and `answer` an integer, or a string that holds
    another number.
    """

    id: str
    category: str
    kind: str
    split: str
    parameters: Parameters
    answer: int | str
    prompts: dict[str, str] = field(repr=False)


def answer_of(kind: str, p: Parameters) -> int:
    """Return the answer to a tuple of parameters p. Raises KernelSurgeryError for an unknown kind."""
    match kind:
        case "plus":
            return p["a"] + p["b"]
        case "times":
            return p["a"] * p["b"]
        case "combinatorics":
            return math.comb(p["n"], p["k"])
        case "modular":
            return p["a"] % p["b"]
        case "geometry":
            return p["w"] * p["h"]
        case "sequences":
            return p["n"] * (2 * p["a1"] + (p["n"] - 1) * p["d"]) // 2
    raise KernelSurgeryError(f"unknown kind of problem {kind!r}; known: {', '.join(WORDINGS)}")


def fact(kind: str, parameters: Parameters) -> tuple:
    """Return the mathematical fact that a tuple states. Tuples with equal facts share a split.

    A rectangle and the product of its sides are one fact. C(n, k) and C(n, n-k) are one fact.
    """
    values = tuple(parameters.values())
    match kind:
        case "plus":
            return ("plus", *sorted(values))
        case "times" | "geometry":
            return ("times", *sorted(values))
        case "combinatorics":
            n, k = values
            return ("combinatorics", n, min(k, n - k))
    return (kind, *values)


@cache
def _expag_facts() -> frozenset[tuple]:
    return frozenset(fact(p.kind, p.parameters) for p in expag_problems())


def split_of(kind: str, parameters: Parameters) -> str:
    """Return the split of a tuple: "fit", "dev" or "test". Facts of the reference script's 20 problems give "expag"."""
    key = fact(kind, parameters)
    if key in _expag_facts():
        return "expag"
    test, dev = _SHARES.get(kind, _DEFAULT_SHARES)
    bucket = zlib.crc32(":".join(map(str, key)).encode()) % 100
    return "test" if bucket < test else "dev" if bucket < test + dev else "fit"


def _pairs(kind: str, x: str, y: str, xs: range, ys: range) -> Iterator[tuple[str, Parameters]]:
    return ((kind, {x: i, y: j}) for i in xs for j in ys)


def tuples(category: str) -> Iterator[tuple[str, Parameters]]:
    """Yield every (kind, parameters) of a category, in a fixed order.

    The ranges are those of the reference script, except that C(n, k) goes up to n = 30 and takes every 1 <= k < n.
    Raises KernelSurgeryError for an unknown category.
    """
    match category:
        case "arithmetic":
            yield from _pairs("plus", "a", "b", range(10, 1000), range(10, 1000))
            yield from _pairs("times", "a", "b", range(10, 1000), range(10, 1000))
        case "combinatorics":
            yield from (("combinatorics", {"n": n, "k": k}) for n in range(5, 31) for k in range(1, n))
        case "modular":
            yield from _pairs("modular", "a", "b", range(50, 10000), range(3, 38))
        case "geometry":
            yield from _pairs("geometry", "w", "h", range(2, 51), range(2, 51))
        case "sequences":
            yield from (
                ("sequences", {"a1": a1, "d": d, "n": n})
                for a1 in range(1, 21)
                for d in range(1, 11)
                for n in range(5, 31)
            )
        case _:
            raise KernelSurgeryError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")


def draw(category: str, rng: random.Random) -> tuple[str, Parameters]:
    """Draw one (kind, parameters) of a category. Each parameter is uniform over the ranges of `tuples`.

    Raises KernelSurgeryError for an unknown category.
    """
    match category:
        case "arithmetic":
            return rng.choice(("plus", "times")), {"a": rng.randint(10, 999), "b": rng.randint(10, 999)}
        case "combinatorics":
            n = rng.randint(5, 30)
            return "combinatorics", {"n": n, "k": rng.randint(1, n - 1)}
        case "modular":
            return "modular", {"a": rng.randint(50, 9999), "b": rng.randint(3, 37)}
        case "geometry":
            return "geometry", {"w": rng.randint(2, 50), "h": rng.randint(2, 50)}
        case "sequences":
            return "sequences", {"a1": rng.randint(1, 20), "d": rng.randint(1, 10), "n": rng.randint(5, 30)}
    raise KernelSurgeryError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")


@cache
def count(category: str, split: str) -> int:
    """Return the number of tuples of a category in a split. It enumerates them, which takes seconds for arithmetic."""
    return sum(split_of(kind, parameters) == split for kind, parameters in tuples(category))


def _make(category: str, kind: str, parameters: Parameters, split: str, index: int) -> Problem:
    column = SPLITS.index(split)
    prompts = {language: WORDINGS[kind][language][column].format(**parameters) for language in LANGUAGES}
    return Problem(
        f"{split}-{category}-{index:04d}", category, kind, split, parameters, answer_of(kind, parameters), prompts
    )


def _select(category: str, split: str, n: int, seed: int) -> list[tuple[str, Parameters]]:
    """Return the first n tuples of a category in a random order. The order does not depend on n or other categories."""
    # random.Random hashes a string seed with SHA-512, so the order is the same on every platform and Python version.
    rng = random.Random(f"{seed}:{split}:{category}")
    if category in _LISTED:
        chosen = [(kind, parameters) for kind, parameters in tuples(category) if split_of(kind, parameters) == split]
        if len(chosen) < n:
            raise KernelSurgeryError(
                f"cannot take {n} {category} problems from the {split} split: only {len(chosen)} exist.\n"
                f"Use at most {len(chosen)} per category."
            )
        rng.shuffle(chosen)
        return chosen[:n]
    # Draw from the large categories, because arithmetic has two million tuples. n is far below that: the listed
    # categories raised an error for a larger one.
    drawn: dict[tuple, tuple[str, Parameters]] = {}
    while len(drawn) < n:
        kind, parameters = draw(category, rng)
        if split_of(kind, parameters) == split:
            drawn.setdefault((kind, *parameters.values()), (kind, parameters))
    return list(drawn.values())


def problems(split: str, per_category: int = 40, *, seed: int = 0) -> list[Problem]:
    """Return `per_category` different problems of each category from one split, in seven languages.

    The result depends only on the arguments. Within a category, a shorter list is the beginning of a longer one.

    Raises KernelSurgeryError for an unknown split, for per_category < 1, and if a category has fewer problems.
    """
    if split not in SPLITS:
        raise KernelSurgeryError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if per_category < 1:
        raise KernelSurgeryError(f"problems per category must be at least 1, got {per_category}.")
    # The smallest categories come first, because only they may have too few problems.
    chosen = {category: _select(category, split, per_category, seed) for category in (*_LISTED, *CATEGORIES)}
    return [
        _make(category, kind, parameters, split, index)
        for category in CATEGORIES
        for index, (kind, parameters) in enumerate(chosen[category])
    ]


def expag_problems() -> list[Problem]:
    """Return the reference script's 20 problems in English and Chinese, in its order.

    It repeats the script's draws: 40 problems per category from `Random(42)`, shuffled with a second `Random(42)`. It
    takes the first four of each category, and orders the categories by first appearance.
    """
    rng = random.Random(42)
    drawn: list[tuple[str, str, Parameters]] = []
    for _ in range(40):
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        drawn.append(("arithmetic", rng.choice(["plus", "times"]), {"a": a, "b": b}))
    for _ in range(40):
        n = rng.randint(5, 20)
        drawn.append(("combinatorics", "combinatorics", {"n": n, "k": rng.randint(1, min(n - 1, 8))}))
    for _ in range(40):
        drawn.append(("modular", "modular", {"a": rng.randint(50, 9999), "b": rng.randint(3, 37)}))
    for _ in range(40):
        drawn.append(("geometry", "geometry", {"w": rng.randint(2, 50), "h": rng.randint(2, 50)}))
    for _ in range(40):
        drawn.append(
            ("sequences", "sequences", {"a1": rng.randint(1, 20), "d": rng.randint(1, 10), "n": rng.randint(5, 30)})
        )
    order = list(range(len(drawn)))
    random.Random(42).shuffle(order)
    first_four: dict[str, list[Problem]] = {}
    for category, kind, parameters in (drawn[i] for i in order):
        chosen = first_four.setdefault(category, [])
        if len(chosen) < 4:
            prompts = {lang: EXPAG_WORDINGS[kind][lang].format(**parameters) for lang in EXPAG_LANGUAGES}
            chosen.append(
                Problem(
                    f"expag-{category}-{len(chosen)}",
                    category,
                    kind,
                    "expag",
                    parameters,
                    answer_of(kind, parameters),
                    prompts,
                )
            )
    return [problem for chosen in first_four.values() for problem in chosen]
