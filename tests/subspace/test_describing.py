"""print(subspace) is five short lines for every kind of subspace; repr is one; neither prints a tensor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernel_surgery import Subspace
from kernel_surgery.models.load import POLYGLOT_SUBSPACE
from kernel_surgery.subspace.activations import Activations
from kernel_surgery.subspace.describing import WIDTH, few_tokens, shortened
from kernel_surgery.subspace.fitting import fit_subspace
from kernel_surgery.subspace.written import Written
from tests.support.calls import call
from tests.support.models import basis

LABELS = ["model", "fit", "edit", "holds", "file"]


def bare(layers=(1, 2), d=48, **more):
    return Subspace({layer: basis(d, 4, seed=layer) for layer in layers}, **more)


def activations(languages=("en", "zh", "es", "ar"), d=24):
    """Activations of 12 problems at layers 2 and 3, with a mean of its own for every language."""
    generator = torch.Generator().manual_seed(0)
    vectors = {
        lang: {i: torch.randn(12, d, generator=generator) + 3 * torch.randn(d, generator=generator) for i in (2, 3)}
        for lang in languages
    }
    return Activations(vectors, {"site": "mlp_out", "pool": "last", "model_id": "example/pico", "problems": 12})


KINDS = {
    "orthogonal": (lambda: Subspace.load(POLYGLOT_SUBSPACE), "orthogonal, y = x - a U (U^T x), the same strength a"),
    "oblique": (
        lambda: fit_subspace(activations(), method="oblique"),
        "oblique, y = x - a A (B^T x), the same strength a in every layer",
    ),
    "affine": (lambda: fit_subspace(activations(), method="leace"), "affine, y = x - a A (B^T x - c), offset c"),
    "schedule": (lambda: bare(strengths={1: 0.25}), "strength a times 0.25 to 1 by layer"),
    "even schedule": (lambda: bare(strengths={1: 0.5, 2: 0.5}), "strength a times 0.5 in every layer"),
    "shared basis": (lambda: Subspace(dict.fromkeys((3, 4, 9), basis(48, 4, seed=0))), "one basis for all layers"),
    "truncated": (lambda: Subspace.load(POLYGLOT_SUBSPACE).truncate(3), "rank 3 (cut from 10)"),
    "bases alone": (bare, "not stated, layers 1-2, site not stated, d_model 48"),
    "one layer": (lambda: bare((7,), n_layers=9), "layer 7 of 9"),
    "layers apart": (lambda: bare(range(1, 99, 2), n_layers=99), "layers 1-97 (only 49 of these) of 99"),
    "no spectrum": (bare, "not recorded: there are no singular values"),
    "layer by layer": (
        lambda: bare(fit={"method": "oblique", "sequential": {"1": 2e-7, "2": 3e-6}}),
        "covariance with the language label left, by layer: 2.0e-07 to 3.0e-06",
    ),
    "long names": (
        lambda: bare(model_id="o" * 90 + "/" + "m" * 90, site="mlp_out", n_layers=80, fit={"method": "m" * 300}),
        "…",
    ),
    "strange record": (
        lambda: bare(fit={"method": None, "problems": "many", "languages": None, "sequential": 3, "rank": "x"}),
        "method not stated, layer by layer, rank 4",
    ),
    "many languages": (lambda: bare(fit={"languages": [f"l{i}" for i in range(40)]}), "in 40 languages"),
    "line feeds": (lambda: bare(model_id="two\nlines", pool="last"), "two lines"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_five_short_lines_and_no_tensor(kind):
    make, words = KINDS[kind]
    subspace = make()
    lines = str(subspace).split("\n")
    assert [line.split()[0] for line in lines] == LABELS
    assert all(len(line) <= WIDTH for line in lines), lines
    assert any(words in line for line in lines), lines
    assert "tensor(" not in str(subspace) and len(repr(subspace)) <= 200 and "\n" not in repr(subspace)
    assert repr(subspace).startswith("Subspace(layers=") and "tensor(" not in repr(subspace)


def test_a_loaded_one_names_its_file_and_a_changed_one_does_not(tmp_path):
    file = tmp_path / "subspace.safetensors"
    bare().save(file)
    loaded = Subspace.load(file, force=True)
    assert "subspace.safetensors, SHA-256 " in str(loaded)
    for changed in (loaded.truncate(2), loaded.select([1]), replace(loaded, strengths={1: 2.0})):
        assert "SHA-256" not in str(changed) and "subspace.save(PATH)" in str(changed)


def test_one_that_was_converted_from_an_npz_says_what_is_known(tmp_path):
    npz, out = tmp_path / "acts.npz", tmp_path / "subspace.safetensors"
    vectors = activations().vectors
    np.savez(npz, **{f"{lang}_L{i}": x.numpy() for lang, by in vectors.items() for i, x in by.items()})
    assert call("fit", "--activations", npz, "--out", out, "--layers", 2, "--rank", 3)[0] == 0
    lines = str(Subspace.load(out, force=True)).split("\n")
    assert len(lines) == 5 and "not stated, layer 2" in lines[0] and "site not stated" in lines[0]
    assert lines[1].startswith("fit    oblique, rank 3, in ")
    assert lines[3] == "holds  1.000 of what the languages' means tell on the text of the fit, by layer"


def test_the_edit_of_a_folder_prints_no_tensor():
    held = bare()
    written = Written(held.bases, tensors={"w": torch.zeros(3)})
    assert str(written).count("\n") == 4 and repr(written).startswith("Written(") and "tensor(" not in repr(written)


def test_a_long_text_keeps_both_ends():
    assert shortened("a" * 10 + "b" * 10, 9) == "aaaa…bbbb" and shortened("short", 9) == "short"


@pytest.mark.parametrize(
    ("method", "tokens", "said"),
    [
        ("oblique", {"en": 240, "zh": 239}, True),
        ("leace", {"en": 479}, True),
        ("oblique", {"en": 240, "zh": 240}, False),
        ("deviations", {"en": 3}, False),
        ("oblique", None, False),
    ],
)
def test_an_erasing_fit_on_fewer_than_ten_tokens_a_dimension_says_so(method, tokens, said):
    note = few_tokens(bare(fit={"method": method, "tokens": tokens}))  # of d_model 48
    assert (note is not None) == said
    if said:
        assert note.startswith(f"few tokens: {sum(tokens.values())} for d_model 48; 480 are better")


def test_fit_says_that_the_tokens_are_few_and_leaves_out_what_is_so_by_construction(tmp_path):
    words = ("--problems", 1, "--languages", "en,zh", "--device", "cpu")
    assert call("collect", *words, "--out", tmp_path / "few.safetensors")[0] == 0
    status, out, _ = call("fit", "--activations", tmp_path / "few.safetensors", "--out", tmp_path / "s.safetensors")
    assert status == 0 and "few tokens: " in out and "for d_model 128; 1280 are better" in out
    assert "lang variance captured" not in out and "holds  1.000 of what" in out
