"""The basis is the space in which only the language varies; what it must not depend on drops out exactly."""

import math
import pickle

import numpy as np
import pytest
import torch

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.fit import run
from kernel_surgery.subspace.activations import Activations, load_activations
from kernel_surgery.subspace.describing import variance_captured
from kernel_surgery.subspace.fitting import fit_subspace, language_rows, principal_basis

LANGS = ("zh", "en", "es", "ar", "ja", "ko", "sw")


def planted(problems=60, d=96, rank=4, noise=0.0, layers=(2, 3), seed=0):
    """Activations = problem part + offset of the language inside a known subspace, which varies with the problem."""
    g = torch.Generator().manual_seed(seed)
    vectors = {lang: {} for lang in LANGS}
    spaces = {}
    for layer in layers:
        spaces[layer] = torch.linalg.qr(torch.randn(d, rank, generator=g, dtype=torch.float64))[0]
        common = torch.randn(problems, d, generator=g, dtype=torch.float64) * 5
        for lang in LANGS:
            within = torch.randn(problems, rank, generator=g, dtype=torch.float64) + torch.randn(
                rank, generator=g, dtype=torch.float64
            )
            extra = noise * torch.randn(problems, d, generator=g, dtype=torch.float64)
            vectors[lang][layer] = (common + within @ spaces[layer].T + extra).float()
    return Activations(vectors, {"n_layers": 6, "site": "mlp_out", "model_id": "planted"}), spaces


def projector(basis):
    return basis.double() @ basis.double().T


def test_a_planted_subspace_is_recovered_and_holds_all_the_variance():
    activations, spaces = planted()
    subspace = fit_subspace(activations, 4, method="deviations")
    for layer, space in spaces.items():
        basis = subspace.bases[layer]
        assert basis.shape == (96, 4) and basis.dtype == torch.float32
        # Float32 activations of size 5: the span can be known to about 5 * 2^-24 * sqrt(rows) / s_k of it.
        error = (projector(basis) - space @ space.T).norm()
        bound = 4 * 2.0**-24 * 5 * (60 * 7 * 96) ** 0.5 / float(subspace.spectrum[layer][3])
        print(f"layer {layer}: span error {error:.2e}, error/bound {error / bound:.2f}")
        assert error <= bound
        orthonormality = (basis.T @ basis - torch.eye(4)).abs().max()
        assert orthonormality <= 1e-5
        assert variance_captured(subspace.spectrum[layer], 4) > 1 - 1e-9
        assert variance_captured(subspace.spectrum[layer], 3) < 0.95


def test_what_all_languages_share_drops_out():
    activations, _ = planted(noise=0.3)
    shift = torch.randn(60, 96, generator=torch.Generator().manual_seed(9)) * 3
    moved = Activations(
        {lang: {i: x + shift for i, x in by.items()} for lang, by in activations.vectors.items()},
        activations.provenance,
    )
    one, other = fit_subspace(activations, 4, method="deviations"), fit_subspace(moved, 4, method="deviations")
    assert (projector(one.bases[2]) - projector(other.bases[2])).norm() < 1e-5
    # Teeth: shifting one language alone does change it.
    lopsided = dict(activations.vectors) | {"en": {i: x + shift for i, x in activations.vectors["en"].items()}}
    other = fit_subspace(Activations(lopsided, activations.provenance), 4, method="deviations")
    assert (projector(one.bases[2]) - projector(other.bases[2])).norm() > 0.1


def test_it_is_the_reference_scripts_arithmetic():
    activations, _ = planted(noise=0.5)
    per_lang = np.stack([activations.vectors[lang][2].numpy() for lang in LANGS], axis=1)
    deviations = (per_lang - per_lang.mean(axis=1, keepdims=True)).reshape(-1, 96)
    _, s, vt = np.linalg.svd(deviations, full_matrices=False)
    script = torch.from_numpy(vt[:4].T @ vt[:4])
    ours = fit_subspace(activations, 4, method="deviations")
    # The script works in float32 throughout; its own span error is of that order over the gap s_4 - s_5.
    assert (projector(ours.bases[2]) - script).norm() < 1e-4
    assert variance_captured(ours.spectrum[2], 4) == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), rel=1e-5)


def test_rank_beyond_the_data_is_refused_with_the_number():
    activations, _ = planted()
    with pytest.raises(ValueError, match=r"cannot fit rank 5 at layer 2: .* span 4 dimensions.\n.*1 to 4"):
        fit_subspace(activations, 5, method="deviations")
    noisy, _ = planted(noise=0.5)
    assert fit_subspace(noisy, 6, method="centroids").rank == 6
    with pytest.raises(ValueError, match="span 6 dimensions"):
        fit_subspace(noisy, 7, method="centroids")
    with pytest.raises(SubspaceError, match="there is no subspace to fit at the data: the activations do not differ"):
        principal_basis(language_rows(torch.randn(5, 1, 8), "deviations"), 1)
    with pytest.raises(ValueError, match="rank 0"):
        principal_basis(torch.randn(10, 5), 0)


def test_activations_that_differ_by_rounding_only_are_refused():
    """Equal activations half way between two float32 numbers, each rounded up or down. Teeth: four times as much."""
    activations, _ = planted(noise=0.5)
    same = activations.vectors["en"]
    for factor in (1, 4):
        generator, vectors = torch.Generator().manual_seed(0), {}
        for lang in LANGS:
            vectors[lang] = {}
            for layer, x in same.items():
                step = torch.nextafter(x, torch.full_like(x, torch.inf)) - x
                vectors[lang][layer] = x + factor * step * torch.randint(0, 2, x.shape, generator=generator)
        rounded = Activations(vectors, activations.provenance)
        if factor == 4:
            assert fit_subspace(rounded, 1, method="deviations").rank == 1
        else:
            with pytest.raises(SubspaceError, match="at layer 2: the activations do not differ between languages"):
                fit_subspace(rounded, 1, method="deviations")


def test_layers_that_were_not_collected_are_refused():
    activations, _ = planted()
    with pytest.raises(ValueError, match=r"layers \[4\] were not collected: the activations hold \[2, 3\]"):
        fit_subspace(activations, 2, method="deviations", layers=[3, 4])


def test_equal_data_give_equal_files(tmp_path):
    activations, _ = planted(noise=0.5)
    for name in ("a", "b"):
        fit_subspace(activations, 4, method="deviations").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_scripts_npz_and_our_file_give_the_same_subspace(tmp_path, capsys):
    activations, _ = planted(noise=0.5)
    npz, ours = tmp_path / "multilingual_all_layers.npz", tmp_path / "acts.safetensors"
    np.savez(npz, **{f"{lang}_L{i}": x.numpy() for lang, by in activations.vectors.items() for i, x in by.items()})
    activations.save(ours)
    for source, extra in ((npz, ["--model-id", "planted", "--site", "resid_post"]), (ours, [])):
        out = str(source) + ".subspace"
        assert run(["--activations", str(source), "--out", out, "--rank", "4", "--layers", "2-3", *extra]) == 0
    from kernel_surgery import Subspace

    one = Subspace.load(str(npz) + ".subspace", force=True)
    other = Subspace.load(str(ours) + ".subspace", force=True)
    assert all(torch.equal(one.bases[i], other.bases[i]) for i in (2, 3))
    assert (one.site, other.site) == ("resid_post", "mlp_out")
    assert "  L2: lang variance captured = 0." in capsys.readouterr().out


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickled_npz_is_refused_and_never_unpickled(tmp_path):
    planted_file, path = tmp_path / "ran", tmp_path / "acts.npz"
    np.savez(path, en_L2=np.array([Bomb(planted_file)], dtype=object))
    with pytest.raises(ValueError, match=r"is not an \.npz of plain arrays\. Pickles are never loaded"):
        load_activations(path)
    assert not planted_file.exists()
    pickle.loads(pickle.dumps(Bomb(planted_file))).close()  # teeth: unpickling it would have left a mark
    assert planted_file.exists()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"en_L2": np.zeros((4, 8)), "zh_L2": np.zeros((5, 8))}, r"ragged: en_L2 is \(4, 8\), but zh_L2 is \(5, 8\)"),
        ({"en_L2": np.zeros((4, 8)), "zh_L3": np.zeros((4, 8))}, r"ragged: en has layers \[2\], but zh has \[3\]"),
        ({"en_L2": np.full((4, 8), np.nan), "zh_L2": np.zeros((4, 8))}, "en_L2 holds NaN or Inf"),
        ({"en_L2": np.zeros((4, 8))}, r"holds too few languages \(en\)"),
        ({"layer2": np.zeros((4, 8))}, r"entry 'layer2' of shape \(4, 8\)"),
        ({"en_L2": np.zeros((0, 8)), "zh_L2": np.zeros((0, 8))}, r"entry 'en_L2' of shape \(0, 8\)"),
    ],
)
def test_bad_activations_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "acts.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_activations(tmp_path / "acts.npz")


def test_a_file_that_only_says_npz_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros((4, 8)))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("en_L2")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("array", "empty", "text", "cut"):
        with pytest.raises(ValueError, match=rf"{name}\.npz' is not (an?|a readable) \.npz"):
            load_activations(tmp_path / f"{name}.npz")


def test_a_file_that_is_neither_is_refused(tmp_path):
    (tmp_path / "acts.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match="neither a safetensors file"):
        load_activations(tmp_path / "acts.safetensors")
    with pytest.raises(FileNotFoundError, match=r"kernel_surgery\.collect"):
        load_activations(tmp_path / "nowhere.safetensors")


def test_an_option_that_contradicts_the_file_is_refused(tmp_path):
    activations, _ = planted()
    activations.save(tmp_path / "acts.safetensors")
    with pytest.raises(ValueError, match="measured with site 'mlp_out', not 'resid_post'"):
        load_activations(tmp_path / "acts.safetensors", site="resid_post")


def test_rows_are_what_the_methods_say():
    """Fewer rows than deviations, one a problem less, with the same scatter: nothing else is asked of them."""
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    for method, given in (("deviations", x), ("centroids", x.mean(0, keepdim=True))):
        rows, deviations = language_rows(x, method), (given - given.mean(1, keepdim=True)).reshape(-1, 8)
        assert rows.shape == (2 * len(given), 8)
        scale = deviations.norm() ** 2
        assert (rows.T @ rows - deviations.T @ deviations).norm() <= 100 * 2.0**-52 * scale
        assert (rows.T @ rows - (x - x.mean()).reshape(-1, 8).T @ (x - x.mean()).reshape(-1, 8)).norm() > 0.1 * scale


@pytest.mark.parametrize("n, d", [(40, 90), (90, 40)])
@pytest.mark.parametrize("weakest", [1.0, 1e-2, 1e-3])
def test_the_basis_is_the_svds_however_weak_its_last_direction(n, d, weakest):
    """Both shapes, down to just above where the rank ends: the largest principal angle to a float64 SVD."""
    generator = torch.Generator().manual_seed(n)
    left, right = (torch.linalg.qr(torch.randn(m, 6, generator=generator, dtype=torch.float64))[0] for m in (n, d))
    s = torch.logspace(0, math.log10(weakest), 5, dtype=torch.float64).tolist()
    s = torch.tensor([*s, s[-1] / 4], dtype=torch.float64)
    rows = left * s @ right.T
    basis, values = principal_basis(rows, 5)
    exact = torch.linalg.svd(rows, full_matrices=False)[2][:5].T
    sine = float(torch.linalg.matrix_norm(basis.double() - exact @ (exact.T @ basis.double()), 2))
    # Davis and Kahan with float64's rounding of the Gram matrix over the gap of the squares; and of the float32 basis.
    bound = max(n, d) * 2.0**-52 * s[0] ** 2 / (s[4] ** 2 - s[5] ** 2) + 5**0.5 * 2.0**-24
    print(f"{n}x{d} weakest {weakest}: sine {sine:.1e}, error/bound {sine / bound:.2f}")
    assert sine <= bound <= 1e-5
    assert (basis.T @ basis - torch.eye(5)).abs().max() <= 8 * 2.0**-24
    assert torch.allclose(values[:6].double(), s, rtol=2.0**-22, atol=0)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'pca'; known: deviations, centroids"):
        language_rows(torch.randn(5, 3, 8), "pca")
