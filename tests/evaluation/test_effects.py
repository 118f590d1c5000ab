"""Damage on neutral text, and held-out probes."""

import pytest
import torch

from kernel_surgery import Subspace, fused
from kernel_surgery.common.names import LANGUAGES, MODES
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.effects import (
    RIDGE,
    last_states,
    leaks,
    probe_accuracy,
    probe_hits,
    probes,
    read_by_probe,
    table,
)
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.collecting import prompt_states


@pytest.fixture(scope="module")
def polyglot():
    subspace = Subspace.load(POLYGLOT.parent / "subspace.safetensors")
    return load_model("polyglot", torch.float32), load_tokenizer("polyglot"), subspace


def test_a_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels, groups = torch.arange(4).repeat(100), torch.arange(100).repeat_interleave(4)
    noise = torch.randn(400, 24, generator=generator)
    chance = probe_accuracy(noise, labels, groups)
    bound = 0.25 + 4 * (0.25 * 0.75 / 400) ** 0.5
    print(f"noise: {chance:.3f}, chance .25, bound {bound:.3f}")
    assert chance < bound
    means = torch.randn(4, 24, generator=generator)
    there = noise * 0.3 + means[labels]
    assert probe_accuracy(there, labels, groups) > 0.95
    # Taken out exactly, it is gone: the three directions between the four means.
    u = torch.linalg.svd((means - means.mean(0)).double(), full_matrices=False).Vh[:3].T
    assert probe_accuracy(there - (there.double() @ u @ u.T).float(), labels, groups) < bound
    # A feature that gives the problem away is no help with the next problem.
    problem = torch.nn.functional.one_hot(groups).float()
    assert probe_accuracy(problem, labels, groups) < bound
    # Nor where all rows of a problem share the label: they are held out together.
    shared = (groups * 7 // 3) % 4
    assert probe_accuracy(problem, shared, groups) < 0.25 + 4 * (0.25 * 0.75 / 100) ** 0.5


def test_the_probe_is_ridge_regression_on_centred_features_of_the_other_folds():
    """Against the sums of each training set, taken anew; with means that are large, as an outlier dimension's is."""
    generator = torch.Generator().manual_seed(1)
    groups, labels = torch.arange(20).repeat_interleave(6), torch.arange(3).repeat(40)
    labels[::7] = 0  # shares that differ
    x = torch.randn(120, 8, generator=generator) + torch.nn.functional.one_hot(labels, 8) * 0.7 + 30.0
    hits = probe_hits(x, labels, groups, 4)
    wide, targets = x.double(), torch.nn.functional.one_hot(labels).double()
    for fold in range(4):
        out = groups % 4 == fold
        mean, rate = wide[~out].mean(0), targets[~out].mean(0)
        train = wide[~out] - mean
        gram = train.T @ train
        gram += RIDGE * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
        read = (wide[out] - mean) @ torch.linalg.solve(gram, train.T @ (targets[~out] - rate)) + rate
        assert torch.equal(hits[out], read.argmax(-1) == labels[out])
    assert 0.4 < float(hits.double().mean()) < 1


def test_probes_read_both_sites_with_the_edit_in_force(polyglot):
    model, tokenizer, subspace = polyglot
    asked = problems("dev", 4)
    states = last_states(model, tokenizer, asked, LANGUAGES)
    before = probes(states, 7)
    assert list(before) == ["mlp_out", "resid_post"] and list(before["mlp_out"]) == list(range(8))
    assert min(before["resid_post"].values()) > 0.9
    # All of a layer's MLP output taken out: nothing is left to read there, and the residual stream still has it.
    everything = {i: torch.eye(128)[:, :64] for i in subspace.layers}
    other = {i: torch.eye(128)[:, 64:] for i in subspace.layers}
    with fused(model, everything), fused(model, other):
        edited = last_states(model, tokenizer, asked, LANGUAGES)
    after = probes(edited, 7)
    for i in subspace.layers:
        assert after["mlp_out"][i] == pytest.approx(1 / 7)
    assert after["mlp_out"][0] == before["mlp_out"][0] and min(after["resid_post"].values()) > 0.5
    # And the leak says the same: nothing at the site but rounding, and the stream still holds what others wrote.
    projections = {i: Projection(u) for i, u in everything.items()}
    leak = leaks(states, edited, projections)
    assert list(leak["mlp_out"]) == list(subspace.layers) and max(leak["mlp_out"].values()) < 1e-6
    assert min(leak["resid_post"].values()) > 0.1
    assert leaks(states, states, projections)["mlp_out"] == dict.fromkeys(subspace.layers, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_one_pass_gives_the_bits_of_a_pass_for_each_site(mode, polyglot):
    model, tokenizer, subspace = polyglot
    asked, languages = problems("dev", 1), ("en", "zh")
    prompts = [problem.prompts[language] for problem in asked for language in languages]
    with applied(mode, model, subspace, 1.0):
        for site, rows in last_states(model, tokenizer, asked, languages).items():
            alone = prompt_states(model, tokenizer, prompts, range(8), site=site)
            assert rows.keys() == alone.keys() and all(torch.equal(rows[i], alone[i]) for i in rows)


def test_the_table_names_the_worst_layer():
    found = {
        "neutral": {},
        "chance": 1 / 7,
        "probed": 140,
        "leak": {"fused": {"mlp_out": {2: 1e-7, 3: 2e-7}, "resid_post": {2: 0.5, 3: 0.25}}},
        "probes": {
            "original": {"mlp_out": {0: 1.0, 1: 0.99}, "resid_post": {0: 1.0, 1: 1.0}},
            "fused": {"mlp_out": {0: 1.0, 1: 0.5}, "resid_post": {0: 1.0, 1: 0.9}},
        },
    }
    said = table(found)
    assert (
        "fused: a linear probe at mlp_out still reads the language: lowest accuracy 0.500, at layer 1 (original "
        "0.990, chance 0.143, n=140)" in said
    )
    assert "at resid_post still reads the language: lowest accuracy 0.900, at layer 1" in said
    assert "fused: leak (share of the part inside the subspace that is left)" in said
    assert "largest over the layers: mlp_out 2e-07" in said
    # Only where the edit can have changed it: at its layers, and in the stream from the first of them on.
    for by in found["probes"].values():
        for site in by.values():
            site |= {2: 0.97, 3: 0.98, 4: 0.96}
    assert "at mlp_out still reads the language: lowest accuracy 0.970, at layer 2" in table(found)
    assert "at resid_post still reads the language: lowest accuracy 0.960, at layer 4" in table(found)
    for by in found["probes"].values():
        for site in by.values():
            for layer in (2, 3, 4):
                del site[layer]
    # Words follow numbers: at chance, or above it by no more than 140 texts may show, nothing is read.
    found["probes"]["fused"]["mlp_out"][1] = 1 / 7
    assert "at mlp_out is not shown to read the language: lowest accuracy 0.143, at layer 1" in table(found)
    assert read_by_probe(0.2, 1 / 7, 140).startswith("is not") and read_by_probe(0.22, 1 / 7, 140) == (
        "still reads the language"
    )
