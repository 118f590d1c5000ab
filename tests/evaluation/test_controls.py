"""Random subspaces: of the right law, at the right strength, compared in words that follow the numbers."""

import random

import numpy as np
import pytest
import torch

from kernel_surgery import Subspace, fused, hooked
from kernel_surgery.common.errors import UserError
from kernel_surgery.damage.yardsticks import haar_basis
from kernel_surgery.evaluation import controls
from kernel_surgery.evaluation.controls import (
    KINDS,
    MEASURES,
    TESTED,
    Control,
    compare,
    controlled,
    draw,
    moments,
    parse_controls,
    percentile,
    verdict,
)
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.collecting import encode
from kernel_surgery.subspace.reading import reading
from tests.support.models import basis, oblique, pico

LAYERS = (1, 2)


def space(d=48, k=5):
    return Subspace({i: basis(d, k, i) for i in LAYERS})


class Words:
    """A tokenizer of its own: a token a character."""

    pad_token_id, eos_token_id, padding_side = 0, 0, "left"

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [1 + ord(c) % 60 for c in text]})


PROMPTS = ["one and two", "three", "a longer prompt than the others", "1 + 1"]


@pytest.mark.parametrize("text, found", [(None, None), ("haar:20", ("haar", 20)), ("pca:1", ("pca", 1))])
def test_controls_are_asked_for_by_kind_and_number(text, found):
    assert parse_controls(text) == found


@pytest.mark.parametrize("text", ["haar", "haar:0", "haar:-1", "haar:x", "gauss:5", ""])
def test_other_controls_are_refused(text):
    with pytest.raises(UserError, match=r"--controls takes haar:N, energy:N, pca:N with N at least 1"):
        parse_controls(text)


def test_a_haar_basis_is_orthonormal_and_favours_no_direction():
    generator = torch.Generator().manual_seed(0)
    drawn = [haar_basis(12, 3, generator) for _ in range(4000)]
    gram = torch.stack([u.T @ u for u in drawn])
    assert float((gram - torch.eye(3, dtype=torch.float64)).abs().max()) < 1e-12
    # E[U U^T] = k/d I; the entries of U U^T have a variance below 1/d.
    mean = torch.stack([u @ u.T for u in drawn]).mean(0)
    off = float((mean - 3 / 12 * torch.eye(12, dtype=torch.float64)).abs().max())
    bound = 5 * (1 / 12 / 4000) ** 0.5
    print(f"largest deviation of the mean projector: {off:.4f}, error/bound {off / bound:.2f}")
    assert off < bound


def test_moments_are_those_of_every_token_and_of_no_padding():
    model = pico("llama")
    found = moments(model, Words(), PROMPTS, LAYERS, batch_tokens=20)
    seen = {i: [] for i in LAYERS}
    handles = [
        site.module.register_forward_hook(lambda m, args, out, i=i: seen[i].append(out[0].double()))
        for i, site in mlp_outputs(model, LAYERS).items()
    ]
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([Words()(prompt).input_ids]))
    for handle in handles:
        handle.remove()
    for i in LAYERS:
        x = torch.cat(seen[i])
        torch.testing.assert_close(found[i].mean, x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[i].mean_square, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        u = basis(48, 5, i)
        removed = (x - project_oracle(x, u)).square().sum(-1).mean()
        assert found[i].energy(Projection(u)) == pytest.approx(float(removed), rel=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


def test_controls_are_drawn_as_they_are_named():
    model = pico("llama")
    found = moments(model, Words(), PROMPTS, LAYERS)
    real = space()
    for kind in KINDS:
        drawn = draw(kind, 3, real, 1.0, found)
        assert [c.name for c in drawn] == [f"{kind}:{i:02d}" for i in range(3)]
        again = draw(kind, 2, real, 1.0, found)
        assert all(torch.equal(a.bases[i], b.bases[i]) for a, b in zip(drawn, again, strict=False) for i in LAYERS)
        assert not torch.equal(drawn[0].bases[1], drawn[1].bases[1])
        assert not torch.equal(drawn[0].bases[1], drawn[0].bases[2])
        assert not torch.equal(draw(kind, 1, real, 1.0, found, seed=1)[0].bases[1], drawn[0].bases[1])
        for control in drawn:
            Subspace(control.bases)  # orthonormal, of one shape
            for i in LAYERS:
                assert tuple(control.bases[i].shape) == (48, 5)
                energy = found[i].energy(Projection(control.bases[i])) * control.strengths[i] ** 2
                if kind == "energy":
                    assert energy == pytest.approx(found[i].energy(real.projections[i]), rel=1e-6)
                else:
                    assert control.strengths[i] == 1.0
    inside = found[1].components(20)
    assert inside.shape == (48, 20)
    values = torch.tensor([found[1].energy(Projection(inside[:, [j]])) for j in range(20)])
    centred = values - (inside.T @ found[1].mean) ** 2
    assert bool((centred.diff() <= 1e-9).all())  # the largest variance first


@pytest.mark.parametrize("kind", ["haar", "energy"])
def test_controls_have_the_strength_of_the_edit_in_each_layer(kind):
    """A schedule counts, and the energy is that which an oblique edit with an offset takes away, summed over tokens."""
    model = pico("llama")
    rows = {i: [] for i in LAYERS}
    with reading(model, Words(), LAYERS, "mlp_out", lambda i, x, mask: rows[i].append(x[mask.bool()].double())) as read:
        read(encode(Words(), PROMPTS, 1000)[0])
    found = moments(model, Words(), PROMPTS, LAYERS)
    edits = {i: oblique(48, 3, i) for i in LAYERS}
    edits = {i: Projection(e.basis, e.dual, torch.arange(3.0)) for i, e in edits.items()}
    real = Subspace.of(edits, strengths={LAYERS[0]: 0.25})
    (control,) = draw(kind, 1, real, 2.0, found)
    for layer in LAYERS:
        strength = 2.0 * real.strengths.get(layer, 1.0)
        if kind == "haar":
            assert control.strengths[layer] == strength
            continue
        x, exact = torch.cat(rows[layer]), edits[layer].double()
        taken = strength * exact.inside(x) @ exact.basis.T
        u = control.bases[layer].double()
        other = control.strengths[layer] * x @ u @ u.T
        # The bases are stored in float32: the energies agree to a few roundings.
        assert float(other.square().sum()) == pytest.approx(float(taken.square().sum()), rel=1e-5)


def test_pca_controls_lie_in_the_principal_components(monkeypatch):
    model, real = pico("llama"), space(k=3)
    found = moments(model, Words(), PROMPTS, LAYERS)
    monkeypatch.setattr(controls, "COMPONENTS", 6)
    (control,) = draw("pca", 1, real, 1.0, found)
    inside = found[2].components(6)
    u = control.bases[2].double()
    assert float((u - inside @ (inside.T @ u)).abs().max()) < 1e-6
    monkeypatch.setattr(controls, "COMPONENTS", 2)
    with pytest.raises(ValueError, match=r"layer 1: the activations span 2 components, the subspace has rank 3"):
        draw("pca", 1, real, 1.0, found)


def test_a_control_edits_each_layer_at_its_own_strength_and_lets_go():
    model = pico("qwen2")
    control = Control("x", {1: basis(48, 5, 8), 2: basis(48, 5, 9)}, {1: 0.5, 2: 3.0})
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with hooked(model, {1: control.bases[1]}, 0.5), hooked(model, {2: control.bases[2]}, 3.0):
            both = model(ids).logits
        with controlled(hooked, model, control):
            assert torch.equal(model(ids).logits, both)
        with controlled(fused, model, control):
            torch.testing.assert_close(model(ids).logits, both, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, plain)
        assert float((both - plain).abs().max()) > 0.1
    idle = pytest.raises(RuntimeError, match=r"x never ran at layers \[1, 2\]")
    with idle, controlled(fused, model, control):
        pass


@pytest.mark.parametrize("n", [5, 19])
def test_the_p_value_of_a_figure_that_is_drawn_as_the_controls_are_is_no_smaller_than_it_says(n):
    """With the median of the controls alone, one in five is farther out than five of its like, and not one in six."""
    drawn = np.random.default_rng(3).normal(size=(6000, n + 1))
    small = np.mean([percentile(row[0], row[1:].tolist())["p"] <= 1 / (n + 1) + 1e-9 for row in drawn])
    print(f"{n} controls: p = {1 / (n + 1):.3f} in {small:.3f} of draws")
    assert small == pytest.approx(1 / (n + 1), abs=3.3 * (1 / (n + 1) / 6000) ** 0.5)


def test_words_follow_the_percentile():
    found = percentile(0.9, [0.5] * 19 + [0.6])
    assert found == {"percentile": 1.0, "as_far": 0, "n": 20, "p": pytest.approx(1 / 21), "spread": pytest.approx(0.1)}
    middle = percentile(0.5, [0.4, 0.5, 0.6, 0.5])
    assert middle["percentile"] == 0.5 and middle["p"] == 1.0

    def words(real, others, comparisons=1):
        row = percentile(real, others)
        return verdict(row | {"holm_p": min(1, comparisons * row["p"]), "comparisons": comparisons})

    assert words(0.9, [0.5] * 19 + [0.6]) == "different from random subspaces (corrected p 0.048)"
    assert words(0.5, [0.4, 0.5, 0.6, 0.5]) == "no farther out than any of 4"
    assert words(0.5, [0.5] * 4) == "the same as all 4"
    assert words(0.6, [0.5, 0.5, 0.5, 0.9]) == "indistinguishable from random subspaces (1 of 4 are as far out)"
    assert words(9.0, [0.0] * 98 + [99.0]) == "different from random subspaces (corrected p 0.020)"
    # Beyond all of them, and still no evidence: too few, or too many comparisons. The number named is the least.
    assert words(0.0, [0.8] * 5) == "farther out than all 5, which are too few to show a difference (20 needed)"
    assert (
        words(0.0, [0.8] * 20, 6) == "farther out than all 20, which are too few to show a difference (120 needed)"
    )
    assert words(0.0, [0.8] * 120, 6).startswith("different")
    assert words(0.0, [0.8] * 119, 6).startswith("farther out than all")


def test_every_measure_that_words_are_said_of_is_corrected_for():
    """Under no effect, one "unlike" in 20 runs at most, however many measures and languages there are."""
    rng, false = random.Random(0), 0
    for _ in range(400):
        rows = [
            {"name": str(i), "language": lang} | {m: rng.random() for m in MEASURES}
            for i in range(121)
            for lang in ("en", "zh")
        ]
        real = {row.pop("language"): row for row in rows[:2]}
        made = compare(real, rows[2:])
        tested = [made[lang][m] for lang in made for m in TESTED]
        assert {row["comparisons"] for row in tested} == {6} and "holm_p" not in made["en"]["repetition"]
        false += any(verdict(row).startswith("different") for row in tested)
    print(f"{false} of 400 null runs call something different; stated .05")
    assert false <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5


def test_a_language_with_nothing_to_compare_is_left_out():
    real = {
        "en": {"accuracy": 1.0, "fat_tokens": 5.0, "language_fidelity": None, "mean_tokens": 9.0, "repetition": 0.0}
    }
    rows = [{"name": "haar:00", "language": "en"} | real["en"] | {"accuracy": 0.5}]
    made = compare(real, rows)
    assert list(made["en"]) == ["accuracy", "fat_tokens", "mean_tokens", "repetition"]
    assert made["en"]["accuracy"]["percentile"] == 1.0
