"""Every kind of setting is fitted as its own command would fit it."""

import pytest
import torch

from kernel_surgery import collect_activations, collect_moments, fit_subspace
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.files.problems import problem_source
from kernel_surgery.models.chat import OFF
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from kernel_surgery.studies.settings import Fitter, Setting
from kernel_surgery.subspace.sequential import fit_sequentially

MIDDLE = (2, 5)


@pytest.fixture(scope="module")
def fitter(tmp_path_factory):
    model, tokenizer = load_model("polyglot", torch.float32), load_tokenizer("polyglot")
    folder = tmp_path_factory.mktemp("fitter")
    return Fitter(model, tokenizer, range(2, 6), problem_source(1), folder, "polyglot", 0, OFF)


def same(one, other):
    assert one.layers == other.layers and one.form == other.form and one.rank == other.rank
    for layer, edit in one.projections.items():
        for a, b in zip(vars(edit).values(), vars(other.projections[layer]).values(), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), layer


def test_tokens_vectors_and_layer_by_layer(fitter):
    asked = problems("fit", 1)
    moments = collect_moments(fitter.model, fitter.tokenizer, asked, LANGUAGES, "2-5")
    same(fitter.fit(Setting(layers=MIDDLE)), fit_subspace(moments))
    leace = fitter.fit(Setting("leace", 3, shrinkage=0.2, layers=MIDDLE))
    same(leace, fit_subspace(moments, 3, method="leace", shrinkage=0.2))
    vectors = collect_activations(
        fitter.model, fitter.tokenizer, asked, LANGUAGES, "2-5", site="resid_post", pool="mean"
    )
    made = fitter.fit(Setting("deviations", 2, "resid_post", "mean", layers=MIDDLE))
    same(made, fit_subspace(vectors, 2, method="deviations"))
    assert made.site == "resid_post" and made.pool == "mean" and made.fit["split"] == "fit"
    reader = Layerwise(POLYGLOT, torch.float32)
    made = fitter.fit(Setting("oblique", 6, pool="sequential", shrinkage=0.2, layers=MIDDLE))
    same(made, fit_sequentially(reader, fitter.tokenizer, asked, LANGUAGES, [2, 3, 4, 5], rank=6, shrinkage=0.2))
    made.check_model(fitter.model)  # the fingerprint is in the record
    assert made.fit["seed"] == 0 and made.model_id == "polyglot"


def test_activations_are_read_once(fitter, monkeypatch):
    fitter.fit(Setting(layers=MIDDLE))
    files = sorted(path.name for path in fitter.folder.iterdir())
    assert "activations-mlp_out-tokens.safetensors" in files
    monkeypatch.setattr(Fitter, "_collect", lambda *_: 1 / 0)
    again = Fitter(*(getattr(fitter, name) for name in Fitter.__dataclass_fields__))  # a second run, in the same folder
    same(again.fit(Setting(layers=MIDDLE)), fitter.fit(Setting(layers=MIDDLE)))


def test_an_offset_keeps_the_mean(fitter):
    made = fitter.fit(Setting("oblique", offset=True, layers=MIDDLE))
    assert made.form == "affine"
    moments = fitter.activations("mlp_out", "tokens").by_layer
    for layer, edit in made.projections.items():
        exact, mean = edit.double(), moments[layer].mean
        moved = exact.basis @ exact.inside(mean)
        # The mean and the offset are stored in float32: each is off by 2^-24 of itself, seen through B and then A.
        room = 2.0**-24 * exact.basis.norm() * (exact.reads.norm() * mean.norm() + exact.offset.norm())
        print(f"layer {layer}: moved {float(moved.norm()):.1e}, bound {float(room):.1e}")
        assert float(moved.norm()) <= float(room)
        assert float((exact.basis @ (exact.reads.T @ mean)).norm()) > 100 * float(room)  # without one it moves


def test_a_schedule_is_in_the_subspace_and_a_layer_of_strength_0_is_not(fitter):
    made = fitter.fit(Setting(layers=MIDDLE, strengths=(1.0, 0.0, 0.5, 1.0)))
    assert made.layers == (2, 4, 5) and made.strengths == {4: 0.5}
    sequential = fitter.fit(Setting(pool="sequential", layers=MIDDLE, strengths=(1.0, 0.0, 0.0, 1.0)))
    reader, asked = Layerwise(POLYGLOT, torch.float32), problems("fit", 1)
    same(sequential, fit_sequentially(reader, fitter.tokenizer, asked, LANGUAGES, [2, 5]))
    with pytest.raises(SubspaceError, match="the strength is 0 in every layer"):
        fitter.fit(Setting(layers=MIDDLE, strengths=(0.0,)))


def test_what_cannot_be_fitted_is_refused_by_name(fitter):
    with pytest.raises(SubspaceError, match="deviations, layers 2-5, tokens, strength 1: deviations needs pairs"):
        fitter.fit(Setting("deviations", layers=MIDDLE))
    with pytest.raises(SubspaceError, match="cannot fit rank 7"):
        fitter.fit(Setting(rank=7, layers=MIDDLE))
