"""The check of a strength for each request in vLLM, on engines that are made up: a right one, and each wrong one."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import gpu, per_request
from bench.per_request import CACHED, ENGINE, STRENGTHS, Tally, Text, check_cache, check_strengths, rounding
from kernel_surgery.common.errors import UserError

PROMPTS = [list(range(start, start + 20)) for start in range(7)]
LIMIT = 1e-6


def text(prompt, strength, cached=0):
    """A greedy text of a made-up model, whose edit moves every logit."""
    rng = np.random.default_rng(prompt)
    logits = rng.normal(size=(8, 50)) + strength * rng.normal(size=(8, 50))
    logs = np.sort(logits - np.log(np.exp(logits).sum(1, keepdims=True)), axis=1)
    best, second = logs[:, -1], logs[:, -2]
    return Text(tuple(map(int, logits.argmax(1))), tuple(best), tuple(best - second), cached)


WANTED = {strength: [text(prompt, strength) for prompt in PROMPTS] for strength in STRENGTHS}


def engine(of=lambda asked: asked, key=lambda strength: strength, mixes=False):
    """An engine. of: from the strengths asked to those used. key: of the prefix cache. mixes: it uses what it holds."""
    held = {}

    def ask(prompts, strengths):
        used = of([ENGINE if strength is None else strength for strength in strengths])
        found = []
        for prompt, strength, asked in zip(prompts, used, strengths, strict=True):
            place = (tuple(prompt), key(asked))
            cached = 16 if place in held else 0
            found.append(text(prompt, held[place] if cached and mixes else strength, cached))
            held.setdefault(place, strength)
        return found

    return ask


def test_an_engine_that_keeps_every_requests_strength_is_right():
    tally = Tally(LIMIT)
    check_strengths(engine(), PROMPTS, WANTED, tally)
    assert (tally.faults, tally.same, tally.bits, tally.ties) == ((), 21, 21, 0)  # every prompt at every strength
    wanted = {strength: found[0] for strength, found in WANTED.items()}
    assert check_cache(engine(), PROMPTS[0], wanted, tally) == [0, 0, 16, 0, 16] and tally.faults == ()
    assert tally.same == 21 + len(CACHED)


@pytest.mark.parametrize(
    "of",
    [
        lambda asked: [ENGINE] * len(asked),  # ignored
        lambda asked: [0.0] * len(asked),
        lambda asked: asked[1:] + asked[:1],  # the neighbour's
        lambda asked: [0.5 if a == 0.5 else 1 - a for a in asked],
        lambda asked: [a if a != 0.5 else 1.0 for a in asked],
        lambda asked: [a + 1e-4 for a in asked],
    ],
)
def test_an_engine_that_uses_another_strength_is_found(of):
    tally = Tally(LIMIT)
    check_strengths(engine(of), PROMPTS, WANTED, tally)
    assert tally.faults and "prompt " in tally.faults[0] and " at strength " in tally.faults[0]


def test_a_prefix_cache_that_mixes_strengths_is_found_and_one_that_is_not_used_too():
    wanted = {strength: found[0] for strength, found in WANTED.items()}
    for mixes in (True, False):  # seen by the number of cached tokens, also where the text does not show it
        tally = Tally(LIMIT)
        check_cache(engine(key=lambda strength: 0, mixes=mixes), PROMPTS[0], wanted, tally)
        assert any("request 1 of one prompt, at strength 1.0: 16 tokens of another" in fault for fault in tally.faults)
        assert any("of the engine: 16 tokens of another strength came" in fault for fault in tally.faults)
        assert any("another token at" in fault for fault in tally.faults) == mixes
    numbers, tally = iter(range(9)), Tally(LIMIT)
    check_cache(engine(key=lambda strength: next(numbers)), PROMPTS[0], wanted, tally)
    assert [fault.partition(",")[0] for fault in tally.faults] == ["request 2 of one prompt", "request 4 of one prompt"]
    assert all("was not used" in fault for fault in tally.faults)


def test_an_edit_that_cannot_be_seen_is_a_fault():
    unedited, tally = {strength: WANTED[0.0] for strength in STRENGTHS}, Tally(LIMIT)
    check_strengths(lambda prompts, strengths: WANTED[0.0], PROMPTS, unedited, tally)
    assert len(tally.faults) == len(PROMPTS) and all("could not be told from rounding" in f for f in tally.faults)


def test_only_a_text_that_parts_where_the_best_two_are_close_is_a_near_tie():
    wanted = text(PROMPTS[0], 0.0)
    other = dataclasses.replace(wanted, ids=(*wanted.ids[:3], 99, *wanted.ids[4:]))
    tally = Tally(LIMIT)
    tally.compare("a text", other, wanted)
    assert tally.faults == (f"a text: another token at 3, and the best two are {wanted.gaps[3]:.2e} apart",)
    close = dataclasses.replace(wanted, gaps=(*wanted.gaps[:3], 1.9 * LIMIT, *wanted.gaps[4:]))
    tally = Tally(LIMIT)
    tally.compare("a text", other, close)
    assert (tally.faults, tally.ties, tally.same) == ((), 1, 0)
    # What stood before it must agree all the same.
    off = dataclasses.replace(other, logs=(wanted.logs[0] + 2 * LIMIT, *wanted.logs[1:]))
    tally.compare("a text", off, close)
    assert tally.ties == 1 and "a log probability is off by 2.00e-06, at most 1.00e-06" in tally.faults[0]


def test_the_limit_is_twice_what_a_batch_changes_and_at_least_rounding():
    texts = WANTED[0.0]
    largest = max(abs(log) for one in texts for log in one.logs)
    assert rounding(texts, texts) == 2 * 2.0**-23 * largest
    moved = [dataclasses.replace(one, logs=(one.logs[0] + 1e-4, *one.logs[1:])) for one in texts]
    assert rounding(texts, moved) == pytest.approx(2e-4)
    # Where a text parts from the other, its later log probabilities are of another text.
    parted = [dataclasses.replace(one, ids=(99, *one.ids[1:])) for one in moved]
    assert rounding(texts, parted) == 2 * 2.0**-23 * largest


def test_a_text_is_read_from_what_vllm_returns():
    held = [{5: SimpleNamespace(logprob=-0.5), 7: SimpleNamespace(logprob=-1.0)}, {2: -1, 3: -2}]
    held[1] = {3: SimpleNamespace(logprob=-0.25), 2: SimpleNamespace(logprob=-2.25)}
    written = SimpleNamespace(token_ids=[5, 3], logprobs=held)
    output = SimpleNamespace(outputs=[written], num_cached_tokens=None)
    assert per_request.text_of(output) == Text((5, 3), (-0.5, -0.25), (0.5, 2.0), 0)


def test_what_is_missing_is_named_with_what_to_install(tmp_path, monkeypatch):
    package, points = tmp_path / "vllm", []
    found = {"vllm": None}
    monkeypatch.setattr(per_request, "find_spec", lambda name: found[name])
    monkeypatch.setattr(per_request, "entry_points", lambda group: points)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert per_request.lacking() == (
        "vLLM is not installed here. In an environment of its own: pip install vllm, then pip install --no-deps -e . "
        "&& pip install py3langid matplotlib scipy pytest (docs/engines.md, Installing)"
    )
    with pytest.raises(UserError, match=r"vLLM is not installed here\..*Nothing was run\.$"):
        per_request.run([])
    found["vllm"] = SimpleNamespace(origin=str(package / "__init__.py"))
    assert "no V2 model runner" in per_request.lacking()
    (package / "v1/worker/gpu/model_states").mkdir(parents=True)
    assert "cannot find the plugin" in per_request.lacking()
    points.append(SimpleNamespace(name="kernel_surgery"))
    assert per_request.lacking() == "there is no CUDA device here"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert per_request.lacking() is None


def test_a_part_that_cannot_run_counts_as_not_run_and_has_failed_if_it_was_named(tmp_path, capsys):
    (part,) = (part for part in gpu.parts(tmp_path) if part.name == "vllm")
    assert part.by_name and part.timed and part.lacking is per_request.lacking
    part = dataclasses.replace(part, lacking=lambda: "vLLM is not installed here. Install it")

    def execute(command, limit, log):
        raise AssertionError("it must not run")

    assert gpu.run_parts([part], tmp_path, {}, execute, named=["vllm"]) == 1
    assert "vllm: not run: vLLM is not installed here. Install it" in capsys.readouterr().out
    kept = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["parts"]["vllm"]
    assert kept == {"status": "not run: vLLM is not installed here. Install it", "seconds": 0.0}
    assert gpu.run_parts([part], tmp_path, {}, execute) == 0
