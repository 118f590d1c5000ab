"""The subspace as an artefact: written whole, read back equal, refused where it does not belong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kernel_surgery import Subspace
from kernel_surgery.subspace import artifact
from kernel_surgery.subspace.fingerprint import fingerprint, fingerprint_differences
from tests.support.models import basis, pico


def subspace(model, layers=(1, 2), k=4, **more):
    return Subspace(
        {layer: basis(48, k, seed=layer) for layer in layers},
        site="mlp_out",
        pool="last",
        means={layer: torch.randn(48) for layer in layers},
        spectrum={layer: torch.rand(9).sort(descending=True).values for layer in layers},
        model_id="pico",
        n_layers=4,
        fingerprint=fingerprint(model),
        fit={"rank": k, "method": "svd"},
        **more,
    )


@pytest.fixture(scope="module")
def model():
    return pico("qwen2")


def test_a_file_holds_everything_and_equal_subspaces_are_equal_files(model, tmp_path):
    made = subspace(model)
    made.save(tmp_path / "deep" / "a.safetensors")
    read = Subspace.load(tmp_path / "deep" / "a.safetensors")
    assert read.layers == (1, 2) and read.rank == 4 and read.d_model == 48
    for name in ("bases", "means", "spectrum"):
        one, other = getattr(made, name), getattr(read, name)
        assert one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)
    for name in ("site", "pool", "model_id", "n_layers", "fingerprint", "fit"):
        assert getattr(made, name) == getattr(read, name)
    read.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "deep" / "a.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    subspace(model).save(file)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "save_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        subspace(model, k=2).save(file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_not_a_subspace_is_refused_by_name(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no subspace at .*nowhere.*kernel_surgery.fit"):
        Subspace.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not one")
    with pytest.raises(ValueError, match="text' is not a safetensors file"):
        Subspace.load(tmp_path / "text")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"holds a tensor 'lm_head\.weight'"):
        Subspace.load(tmp_path / "weights")
    save_file({"layer.1.basis": torch.ones(8, 2)}, tmp_path / "skew", metadata={"provenance": json.dumps({})})
    with pytest.raises(ValueError, match="does not say which model"):
        Subspace.load(tmp_path / "skew")
    for broken in ("{", "[1, 2]", "7"):
        save_file(
            {"layer.1.basis": torch.eye(8)[:, :2].contiguous()}, tmp_path / "broken", metadata={"provenance": broken}
        )
        with pytest.raises(ValueError, match="broken' has provenance that is not a JSON object"):
            Subspace.load(tmp_path / "broken", force=True)
    with pytest.raises(ValueError, match=r"skew.*layer 1 is not orthonormal"):
        Subspace.load(tmp_path / "skew", force=True)


@pytest.mark.parametrize(
    "bases, message",
    [
        ({}, "at least one layer"),
        ({0: torch.eye(8)[:, :2], 1: torch.eye(8)[:, :3]}, r"layer 1 is \(8, 3\), but that of layer 0 is \(8, 2\)"),
        ({0: torch.eye(8)[0]}, r"shape \(8,\)"),
        ({0: torch.eye(8)[:2]}, r"shape \(2, 8\)"),
        ({0: torch.eye(8)[:, :2] * torch.nan}, "NaN or Inf"),
        ({0: torch.eye(8)[:, :2] * 1.0001}, r"not orthonormal: .*2\.0e-04, above 1e-05"),
        ({0: torch.eye(8)[:, [1, 1]]}, r"not orthonormal: .*1\.0e\+00"),
    ],
)
def test_bases_are_checked_when_made(bases, message):
    with pytest.raises(ValueError, match=message):
        Subspace(bases)


def test_truncating_and_selecting_keep_the_provenance(model):
    made = subspace(model)
    small = made.truncate(2)
    assert small.rank == 2 and torch.equal(small.bases[1], made.bases[1][:, :2])
    assert small.fit == {"rank": 2, "method": "svd", "truncated_from": 4} and small.fingerprint == made.fingerprint
    small.check_model(model)
    assert made.select([2]).layers == (2,)
    for rank in (0, 5, -1):
        with pytest.raises(ValueError, match=f"rank 4 to rank {rank}"):
            made.truncate(rank)
    with pytest.raises(ValueError, match=r"layers \[0\] are not in the subspace, which holds \[1, 2\]"):
        made.select([0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_are_recognised(model, dtype):
    subspace(model).check_model(pico("qwen2").to(dtype))


def test_other_weights_are_refused_with_both_names(model):
    made = subspace(model)
    other = pico("qwen2", seed=1)
    with pytest.raises(ValueError, match=r"other weights: model.embed_tokens.weight differs .and 4 more") as caught:
        made.check_model(other)
    assert "fitted on pico (mlp_out, rank 4)" in str(caught.value)
    made.check_model(other, force=True)
    # One tensor is enough: a finetuned or baked model is another model.
    edited = pico("qwen2")
    with torch.no_grad():
        edited.model.layers[3].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj\.weight differs\."):
        made.check_model(edited)


def test_another_shape_is_refused_whatever_force_says(model):
    made = subspace(model)
    with pytest.raises(ValueError, match="d_model=48, but the model has 24"):
        made.check_model(pico("qwen2", hidden_size=24, head_dim=6), force=True)
    with pytest.raises(ValueError, match="4 layers, but this one has 3"):
        made.check_model(pico("qwen2", num_hidden_layers=3), force=True)


def test_unknown_provenance_needs_force(model):
    made = Subspace({1: basis(48, 4)})
    with pytest.raises(ValueError, match="does not say which model"):
        made.check_model(model)
    made.check_model(model, force=True)


def test_a_fingerprint_allows_one_rounding_and_no_more():
    fitted = {"dtype": "float32", "samples": {"w": [1.0, -3e-41, 0.0]}}
    near = {"dtype": "bfloat16", "samples": {"w": [1.0 + 2**-8, -3.001e-41, 0.0]}}
    assert fingerprint_differences(fitted, near) == []
    far = {"dtype": "bfloat16", "samples": {"w": [1.0 + 2**-6, -3e-41, 0.0]}}
    assert fingerprint_differences(fitted, far) == ["w"]
    same = {"dtype": "float32", "samples": {"w": [1.0 + 2**-24, -3e-41, 0.0]}}
    assert fingerprint_differences(fitted, same) == ["w"]
    nan = {"dtype": "bfloat16", "samples": {"w": [float("nan"), -3e-41, 0.0]}}
    assert fingerprint_differences(fitted, nan) == ["w"]
    assert fingerprint_differences(fitted, {"dtype": "float32", "samples": {"v": []}}) == ["v", "w"]
