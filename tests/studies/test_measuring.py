"""What a search measures is what `eval` and `fit` measure, and the model is unchanged afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernel_surgery import Subspace, collect_moments, fit_subspace, hooked
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.damage.measure import measure_damage
from kernel_surgery.evaluation.effects import probe_accuracy
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from kernel_surgery.studies.measuring import Measured, Measuring, difference, first_problems
from kernel_surgery.subspace.reading import reading

ASKED = problems("dev", 2)
LAYERS = [2, 3, 4, 5]


@pytest.fixture(scope="module")
def measuring():
    model, tokenizer = load_model("polyglot", torch.float32), load_tokenizer("polyglot")
    return Measuring(model, tokenizer, ("en", "zh"), ASKED, LANGUAGES, LAYERS, "hook", "dev")


@pytest.fixture(scope="module")
def shipped():
    return Subspace.load(POLYGLOT.parent / "subspace.safetensors")


@pytest.fixture(scope="module")
def found(measuring, shipped):
    return measuring.measure(None), measuring.measure(shipped)


def test_the_damage_is_that_of_eval(measuring, shipped, found):
    about = (measuring.model, measuring.tokenizer, ("en", "zh"), ["hook"], shipped)
    there = measure_damage(*about, split="dev", controls=False)
    figures = measuring.figures(found[1])
    assert figures["neutral"] == there["neutral"]["hook"] and figures["word"] == there["verdict"]["hook"]["word"]
    assert found[1].damage == max(r["kl_mean"] for r in there["neutral"]["hook"].values())
    assert found[0].damage == 0 and found[0].means == 1


def test_the_probe_reads_the_tokens_of_the_edited_model(measuring, shipped, found):
    rows, labels, groups = [], [], []
    with (
        hooked(measuring.model, shipped),
        reading(measuring.model, measuring.tokenizer, [4], "mlp_out", lambda _, x, mask: rows.append(x[0, 1:])) as read,
    ):
        for group, problem in enumerate(ASKED):
            for label, language in enumerate(LANGUAGES):
                ids = list(measuring.tokenizer(problem.prompts[language]).input_ids)
                read([ids])
                labels += [label] * (len(ids) - 1)
                groups += [group] * (len(ids) - 1)
    x, labels, groups = torch.cat(rows), torch.tensor(labels), torch.tensor(groups)
    expected = probe_accuracy(x, labels, groups)
    assert found[1].tokens.sum() == len(x) and len(found[1].tokens) == len(ASKED)
    # Batched with padding, an activation differs by a rounding, which may turn a token or two.
    print(f"one by one {expected:.4f}, batched {found[1].by_layer()[4]:.4f}")
    assert abs(found[1].by_layer()[4] - expected) <= 2 / len(x)
    assert found[1].by_layer()[4] < found[0].by_layer()[4]
    assert found[1].probe == pytest.approx(np.mean(list(found[1].by_layer().values())))


def test_what_is_left_is_nothing_where_the_edit_was_fitted_on_these_tokens(measuring):
    moments = collect_moments(measuring.model, measuring.tokenizer, ASKED, LANGUAGES, "2")
    left = measuring.measure(fit_subspace(moments)).left
    print("left", left)
    # float32 edits of float32 activations: the rest is rounding.
    assert left[2] < 1e-4 < min(left[layer] for layer in (3, 4, 5))


def test_the_model_is_unchanged_afterwards(measuring, found):
    again = measuring.measure(None)
    assert again is found[0]
    fresh = Measuring(*(getattr(measuring, name) for name in Measuring.__dataclass_fields__))
    assert fresh.measure(None).as_json() == found[0].as_json()


def test_a_measurement_is_whole_in_json(found):
    again = Measured.of(json.loads(json.dumps(found[1].whole())))
    assert again.as_json() == found[1].as_json() and again.whole() == found[1].whole()


def test_a_difference_is_paired(found):
    original, edited = found
    same = difference(edited, edited)
    assert same["damage"] == {"en": [1, 1, 1], "zh": [1, 1, 1]} and same["probe"] == [0, 0, 0]
    twice = Measured({k: _scaled(r, 2) for k, r in edited.kl.items()}, edited.hits, edited.tokens, edited.left)
    assert difference(twice, edited)["damage"]["en"] == [2, 2, 2]
    probe, low, high = difference(edited, original)["probe"]
    assert difference(edited, original)["damage"] == {"en": None, "zh": None}  # no ratio to no damage
    print(f"probe {probe:+.4f} ({low:+.4f} to {high:+.4f})")
    assert probe == pytest.approx(edited.probe - original.probe) and low <= probe <= high


def _scaled(reading, by):
    return type(reading)(reading.tokens, reading.kl * by, reading.loss, reading.original_loss, reading.kl_p99)


def test_a_damage_that_is_not_finite_is_without_end(found):
    broken = {k: _scaled(r, float("nan")) for k, r in found[1].kl.items()}
    assert Measured(broken, found[1].hits, found[1].tokens, found[1].left).damage == float("inf")


def test_the_same_number_of_every_category_is_probed():
    asked = problems("dev", 8)
    assert [p.category for p in first_problems(asked, 20)] == [p.category for p in problems("dev", 4)]
    assert len(first_problems(asked, 3)) == 5 and len(first_problems(asked[:8], 20)) == 8
    with pytest.raises(UserError, match="a probe needs at least 2 problems of each split, there is 1"):
        first_problems(asked[:8], 1)


def test_the_record_says_what_the_probe_is_asked(measuring, found):
    made = measuring.asked_of()
    assert made["problems"] == 10 and made["layers"] == LAYERS and made["left_out"] == 1
    assert made["tokens"] == found[0].tokens.sum() and made["languages"] == list(LANGUAGES)


def test_chance_is_always_naming_the_language_with_most_tokens(measuring, found):
    _, _, labels = measuring.tokens_at({"mlp_out": [2]})
    counts = torch.bincount(labels)
    assert (
        measuring.asked_of()["chance"] == pytest.approx(float(counts.max() / counts.sum()))
        and counts.max() > counts.min()
    )
    # A probe that sees nothing does that.
    groups = torch.arange(len(labels)) % 10
    assert probe_accuracy(torch.zeros(len(labels), 4), labels, groups) == pytest.approx(measuring.chance, abs=0.01)


def test_what_all_prompts_begin_with_is_not_asked(measuring):
    """A template before the prompt is the same in every language, and so are its states."""

    class Templated:
        on = False

        def ids(self, tokenizer, prompt):
            return [*tokenizer("Add 1 and 1.").input_ids, *tokenizer(prompt).input_ids]

    held = {name: getattr(measuring, name) for name in Measuring.__dataclass_fields__}
    templated = Measuring(**held | {"chat": Templated()})
    template = len(measuring.tokenizer("Add 1 and 1.").input_ids)
    assert measuring.left_out == 1 and templated.left_out >= template > 1
    rows, groups, _ = templated.tokens_at({"mlp_out": [2]})
    assert len(rows["mlp_out"][2]) == len(groups) == templated.measure(None).tokens.sum()
    encoded = [ids[templated.left_out :] for ids in templated._encoded]
    assert len(groups) == sum(map(len, encoded)) and min(map(len, encoded)) > 0
    # One that is the beginning of all others keeps its last token.
    short = Measuring(**held | {"asked": [replace(ASKED[0], prompts=dict.fromkeys(LANGUAGES, "Add 1 and 1."))] * 2})
    assert short.left_out == template - 1
