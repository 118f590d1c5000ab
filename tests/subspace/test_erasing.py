"""Oblique edits from moments: against concept-erasure, against their definition, and as files."""

import json

import pytest
import torch

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.subspace.activations import Activations
from kernel_surgery.subspace.artifact import ORTHONORMAL
from kernel_surgery.subspace.erasing import erasing_edit, label_covariance_left, oas_shrinkage, shrunk
from kernel_surgery.subspace.fitting import fit_subspace
from kernel_surgery.subspace.moments import LanguageMoments, Moments, holds_moments, load_moments, moments_of
from tests.support.calls import call

LANGUAGES, D = ("en", "zh", "es", "ar"), 24


def rows(seed=0, counts=(300, 200, 250, 150)):
    """Activations [n, D] per language: one covariance whose directions differ in size, and a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, D, dtype=torch.float64)
    centre = torch.randn(D, generator=generator, dtype=torch.float64)
    made = []
    for n in counts:
        shift = torch.randn(D, generator=generator, dtype=torch.float64)
        made.append(torch.randn(n, D, generator=generator, dtype=torch.float64) @ mix.T + centre + shift)
    return made


def stored(edit):
    """What storing A or B in float32 changes in A B^T, relative to x: 2^-24 norm(A) norm(B)."""
    return 2.0**-24 * float(edit.basis.double().norm() * edit.dual.double().norm())


def projector(edit):
    return edit.basis.double() @ edit.dual.double().T


def test_the_affine_form_is_concept_erasures_leace():
    """concept-erasure 0.2, the authors' own code, without shrinkage and with float64 statistics."""
    from concept_erasure import LeaceFitter

    data = rows()
    x = torch.cat(data)
    z = torch.nn.functional.one_hot(torch.arange(4).repeat_interleave(torch.tensor([len(r) for r in data])), 4)
    fitter = LeaceFitter(D, 4, dtype=torch.float64, shrinkage=False)
    fitter.update(x, z.double())
    theirs = fitter.eraser
    edit, singular = erasing_edit(moments_of(data), affine=True, shrinkage=0.0)
    ours = x - (x @ edit.dual.double() - edit.offset.double()) @ edit.basis.double().T
    error = float((ours - theirs(x)).norm(dim=1).max())
    # A, B and c are rounded to float32, c = B^T E x among them: three roundings of A B^T x or of A B^T E x.
    bound = 3 * stored(edit) * float(x.norm(dim=1).max())
    print(f"largest difference {error:.1e}, error/bound {error / bound:.2f}, singular values {singular}")
    assert edit.basis.shape == (D, 3) and error <= bound
    # Teeth: their linear P alone, without the affine part, is another map.
    assert float((x @ theirs.P.T - theirs(x)).abs().max()) > bound


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_it_erases_the_label_covariance_and_no_other_edit_of_that_span_changes_less(affine, rank):
    data, found = rows(), moments_of(rows())
    edit, _ = erasing_edit(found, rank, affine=affine, shrinkage=0.0)
    torch.testing.assert_close(edit.dual.T @ edit.basis, torch.eye(rank), rtol=0, atol=ORTHONORMAL)
    left = label_covariance_left(found, edit)
    print(f"affine={affine} rank {rank}: {left:.2e} of the covariance with the label is left")
    assert left <= 2 * stored(edit) if rank == 3 else 2 * stored(edit) < left < 1
    x = torch.cat(data)

    def change(p):
        shift = x - x.mean(0) if affine else x
        return float((shift @ p.T).square().sum(-1).mean())

    least = change(projector(edit))
    orthogonal = torch.linalg.qr(edit.basis.double())[0]  # the same span, read along itself
    assert least < change(orthogonal @ orthogonal.T)
    # Every other edit that writes the same has another B: in any direction away from ours it changes more.
    for seed in range(5):
        step = torch.randn(D, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step -= edit.dual.double() @ (edit.basis.double().T @ step)  # keeps B^T A = I
        assert change(edit.basis.double() @ (edit.dual.double() + 0.01 * step).T) > least


def test_the_affine_form_keeps_the_mean_and_the_linear_one_has_no_offset():
    data, found = rows(), moments_of(rows())
    edit, _ = erasing_edit(found, affine=True)
    mean = torch.cat(data).mean(0)
    # B and c are each rounded to float32.
    assert float(edit.double().inside(mean).norm()) <= 2 * 2.0**-24 * float(edit.dual.double().norm() * mean.norm())
    assert erasing_edit(found)[0].offset is None


def test_shrinkage_moves_the_covariance_towards_the_identity():
    second = moments_of(rows()).mean_square
    assert torch.equal(shrunk(second, 0.0), second)
    torch.testing.assert_close(shrunk(second, 1.0), second.trace() / D * torch.eye(D).double())
    assert float(shrunk(second, 0.3).trace()) == pytest.approx(float(second.trace()))
    edits = {s: erasing_edit(moments_of(rows()), shrinkage=s)[0] for s in (0.0, 0.01, 1.0)}
    # At 1 nothing of the covariance is left: the edit is orthogonal.
    p = projector(edits[1.0])
    assert float((p - p.T).abs().max()) <= 4 * stored(edits[1.0])
    lengths = [float(e.dual.norm() * e.basis.norm()) for e in edits.values()]
    assert lengths[0] > lengths[1] > lengths[2]


def test_the_estimated_shrinkage_is_near_the_one_that_errs_least():
    """On Gaussian data with a known covariance, over many draws."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64) * torch.logspace(-0.4, 0.4, D).double()
    true, losses, estimates = root @ root.T, torch.zeros(101).double(), []
    for _ in range(200):
        x = torch.randn(50, D, generator=generator, dtype=torch.float64) @ root.T
        sample = x.T @ x / len(x)
        estimates.append(oas_shrinkage(sample, len(x)))
        losses += torch.stack([(shrunk(sample, i / 100) - true).square().sum() for i in range(101)])
    mean = sum(estimates) / len(estimates)
    at, half, twice = (float(losses[round(100 * m)]) for m in (mean, mean / 2, 2 * mean))
    print(
        f"estimated {mean:.3f}, best {int(losses.argmin()) / 100:.2f}; "
        f"loss {at:.0f}, at half {half:.0f}, at twice {twice:.0f}"
    )
    assert at < min(half, twice, float(losses[0]))


def test_moments_add_up_over_batches_and_languages():
    data, whole = rows(), moments_of(rows())
    pieces = Moments.empty(4, D)
    label = torch.arange(4).repeat_interleave(torch.tensor([len(r) for r in data]))
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(1))
    for part in order.split(37):
        pieces.add(torch.cat(data)[part], label[part])
    for name in ("counts", "sums", "second"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name))
    x = torch.cat(data)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T, correction=0))
    z = torch.nn.functional.one_hot(label, 4).double()
    torch.testing.assert_close(whole.label_covariance, (x - x.mean(0)).T @ (z - z.mean(0)) / len(x))


def moments_file(path, **provenance):
    said = {"site": "mlp_out", "pool": "tokens", "languages": list(LANGUAGES), "model_id": None, "problems": 3}
    LanguageMoments({1: moments_of(rows()), 2: moments_of(rows(1))}, said | provenance).save(path)
    return path


def test_a_file_of_moments_is_fitted_by_the_command_and_has_no_pairs_of_prompts(tmp_path):
    file = moments_file(tmp_path / "moments.safetensors")
    assert holds_moments(file) and not holds_moments(tmp_path / "none")
    again = load_moments(file)
    assert torch.equal(again.by_layer[2].second, moments_of(rows(1)).second) and again.languages == LANGUAGES
    for method in ("leace", "oblique", "centroids"):
        status, out, err = call(
            "fit", "--activations", file, "--method", method, "--rank", 3, "--out", tmp_path / method
        )
        assert status == 0, err
        assert {"leace": "affine", "oblique": "oblique", "centroids": "orthogonal"}[method] in out
    status, _, err = call("fit", "--activations", file, "--method", "deviations", "--out", tmp_path / "d")
    assert status == 2 and "no pairs of prompts" in err and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "rank, message", [(4, r"differ in 3 dimensions.\nChoose --rank 1 to 3"), (0, r"Choose --rank 1 to 3")]
)
def test_a_rank_that_the_data_do_not_have_is_refused(rank, message):
    with pytest.raises(SubspaceError, match=message):
        erasing_edit(moments_of(rows()), rank)


def test_activations_that_do_not_differ_are_refused():
    x = rows()[0]
    with pytest.raises(SubspaceError, match="do not differ between languages"):
        erasing_edit(moments_of([x, x, x]))


def test_vectors_give_what_their_moments_give(tmp_path):
    vectors = {lang: {1: r[:100].float()} for lang, r in zip(LANGUAGES, rows(), strict=True)}
    activations = Activations(vectors, {"site": "mlp_out", "pool": "last"})
    subspace = fit_subspace(activations, method="oblique")
    edit, _ = erasing_edit(moments_of([vectors[lang][1] for lang in LANGUAGES]))
    assert torch.equal(subspace.bases[1], edit.basis) and torch.equal(subspace.duals[1], edit.dual)
    assert subspace.rank == 3 and subspace.form == "oblique" and subspace.fit["method"] == "oblique"
    assert json.dumps(subspace.fit)
