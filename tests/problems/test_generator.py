"""The splits share nothing, the languages say the same thing, and the reference script's 20 are its 20."""

import json
import math
import random
import re
import string
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.polyglot.corpus import allowed, training_draws
from kernel_surgery.problems.generator import (
    CATEGORIES,
    SPLITS,
    answer_of,
    count,
    draw,
    expag_problems,
    fact,
    problems,
    split_of,
    tuples,
)
from kernel_surgery.problems.wordings import EXPAG_WORDINGS, WORDINGS

SPEC = json.loads((Path(__file__).parents[1] / "data" / "expag_problems.json").read_text(encoding="utf-8"))
# One mark a meaning, in the three scripts that write it differently.
MARKS = {".": "stop", "。": "stop", "?": "question", "？": "question", "؟": "question"}


def test_the_expag_set_is_the_specification():
    made = expag_problems()
    assert len(made) == len(SPEC) == 20
    for problem, spec in zip(made, SPEC, strict=True):
        parameters = dict(spec["parameters"])
        assert problem.kind == parameters.pop("op", problem.kind)
        assert (problem.category, problem.answer, problem.parameters) == (
            spec["category"],
            spec["answer"],
            parameters,
        )
        assert problem.prompts == {"en": spec["en"], "zh": spec["zh"]}


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_forty_problems_per_category_each_with_a_right_answer(split):
    made = problems(split, 40)
    assert len(made) == 200 and len({p.id for p in made}) == 200
    assert [sum(p.category == c for p in made) for c in CATEGORIES] == [40] * 5
    for p in made:
        v = list(p.parameters.values())
        slow = {
            "plus": lambda v: v[0] + v[1],
            "times": lambda v: sum(v[0] for _ in range(v[1])),
            "combinatorics": lambda v: math.factorial(v[0]) // math.factorial(v[1]) // math.factorial(v[0] - v[1]),
            "modular": lambda v: v[0] - v[0] // v[1] * v[1],
            "geometry": lambda v: sum(v[1] for _ in range(v[0])),
            "sequences": lambda v: sum(v[0] + i * v[1] for i in range(v[2])),
        }
        assert p.answer == slow[p.kind](v)
        assert set(p.prompts) == set(LANGUAGES)
        numbers = sorted(re.findall(r"\d+", p.prompts["en"]))
        assert numbers == sorted(map(str, v))
        assert all(sorted(re.findall(r"\d+", text)) == numbers for text in p.prompts.values())


def test_splits_share_no_fact_and_none_is_an_expag_problem():
    facts = {split: {fact(p.kind, p.parameters) for p in problems(split, 80)} for split in SPLITS}
    facts["expag"] = {fact(p.kind, p.parameters) for p in expag_problems()}
    for one, other in combinations(facts, 2):
        assert not facts[one] & facts[other], (one, other)


def test_whole_categories_partition_by_fact():
    """Over every tuple there is, not a sample: one fact, one split (arithmetic alone is sampled, for its size)."""
    home: dict[tuple, str] = {}
    for category in ("combinatorics", "geometry", "sequences"):
        for kind, parameters in tuples(category):
            split = split_of(kind, parameters)
            assert home.setdefault(fact(kind, parameters), split) == split
    for w in range(10, 51):
        for h in range(10, 51):
            assert split_of("times", {"a": h, "b": w}) == split_of("geometry", {"w": w, "h": h})
            assert split_of("plus", {"a": h, "b": w}) == split_of("plus", {"a": w, "b": h})
    for n in range(5, 31):
        for k in range(1, n):
            assert split_of("combinatorics", {"n": n, "k": k}) == split_of("combinatorics", {"n": n, "k": n - k})


def test_ranges_are_the_scripts_none_shrunk():
    """Every tuple the script can draw is one of ours, and C(n, k) goes on to n = 30, every 1 <= k < n."""
    assert {(p["n"], p["k"]) for _, p in tuples("combinatorics")} == {(n, k) for n in range(5, 31) for k in range(1, n)}
    rng = random.Random(0)
    ours = {"geometry": set(), "sequences": set()}
    for category, seen in ours.items():
        seen.update(tuple(p.values()) for _, p in tuples(category))
    assert len(ours["geometry"]) == 49**2 and len(ours["sequences"]) == 20 * 10 * 26
    extremes = {"a": [math.inf, -math.inf], "b": [math.inf, -math.inf]}
    for _ in range(20_000):
        _, p = draw("modular", rng)
        for name, (low, high) in extremes.items():
            extremes[name] = [min(low, p[name]), max(high, p[name])]
    assert extremes["b"] == [3, 37] and extremes["a"][0] < 60 and extremes["a"][1] > 9990


def test_a_shorter_list_begins_a_longer_one_and_another_process_agrees():
    short, long = problems("test", 5), problems("test", 50)
    for category in CATEGORIES:
        pick = [[p.prompts for p in some if p.category == category] for some in (short, long)]
        assert pick[0] == pick[1][:5]
    code = "from kernel_surgery.problems import generator as g; print([p.prompts['sw'] for p in g.problems('test', 5)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([p.prompts["sw"] for p in short])


def test_asking_for_more_than_exist_states_the_number():
    exist = count("combinatorics", "test")
    assert exist >= 40
    everything = [p for p in problems("test", exist) if p.category == "combinatorics"]
    assert len({tuple(p.parameters.values()) for p in everything}) == exist
    with pytest.raises(ValueError, match=rf"cannot take {exist + 1} combinatorics .* only {exist} exist"):
        problems("test", exist + 1)
    with pytest.raises(ValueError, match="unknown split 'train'; known: fit, dev, test"):
        problems("train")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        problems("test", 0)


def fields(template: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(template) if name)


def unparallel(wordings) -> list[str]:
    """Every way in which the languages of one wording differ in what they state or how they end."""
    faults = []
    for kind, by_language in wordings.items():
        if set(by_language) != set(LANGUAGES):
            faults.append(f"{kind}: languages {sorted(by_language)}")
        for column in range(3):
            texts = [by_language[language][column] for language in by_language]
            if len({tuple(fields(t)) for t in texts}) > 1:
                faults.append(f"{kind} {column}: different parameters")
            if len({MARKS.get(t[-1], t[-1]) for t in texts}) > 1:
                faults.append(f"{kind} {column}: different final punctuation")
        for language, texts in by_language.items():
            if len(set(texts)) < 3:
                faults.append(f"{kind} {language}: a wording in two splits")
    return faults


def test_wordings_are_parallel_and_no_split_shares_one():
    assert unparallel(WORDINGS) == []
    ours = {t for by in WORDINGS.values() for texts in by.values() for t in texts}
    scripts = {t for by in EXPAG_WORDINGS.values() for t in by.values()}
    assert len(ours) == 6 * 7 * 3 and not ours & scripts


def test_the_parallel_check_can_fail():
    broken = {kind: dict(by) for kind, by in WORDINGS.items()}
    broken["plus"]["sw"] = ("Tafuta jibu la {a} + {b}", "{a} jumlisha {b} ni ngapi?", "Jumlisha namba {a}.")
    assert unparallel(broken) == ["plus 0: different final punctuation", "plus 2: different parameters"]


def test_nothing_held_out_is_trained_on():
    """In a sample of the training stream: no dev, test or expag fact, but for C(n, k)."""
    held = {
        fact(p.kind, p.parameters)
        for made in (problems("dev", 80), problems("test", 80), expag_problems())
        for p in made
        if p.kind != "combinatorics"
    }
    draws = training_draws(random.Random("any"))
    seen = [next(draws) for _ in range(20_000)]
    assert not held & {fact(d.kind, d.parameters) for d in seen}
    assert {d.kind for d in seen} == set(WORDINGS) and {d.language for d in seen} == set(LANGUAGES)
    # The teeth: the filter is what keeps them out.
    test = next(p for p in problems("test", 1) if p.kind != "combinatorics")
    assert not allowed(test.kind, test.parameters)
    assert answer_of(test.kind, test.parameters) == test.answer
