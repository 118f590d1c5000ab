"""A baked checkpoint is the original with the edit in it and nothing else changed; a failure leaves nothing behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import cli
from kernel_surgery.checkpoint import bake_checkpoint, sha256
from kernel_surgery.reference import bake_oracle, baked_element_bound, leak_floor, leak_of_weight, worst_ratio
from kernel_surgery.subspace import Subspace, fingerprint
from tests.models import basis, pico


@pytest.fixture(params=["single", "sharded"])
def source(request, tmp_path):
    model = pico("qwen2", dtype=torch.bfloat16)
    folder = tmp_path / "source"
    model.save_pretrained(folder, max_shard_size="20KB" if request.param == "sharded" else "5GB")
    (folder / "notes.txt").write_text("travels along")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "sharded")
    return folder


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def space(folder, layers=(1, 2), d=None):
    """A subspace that says it was fitted on the checkpoint in `folder`."""
    model = cli.load_model(str(folder), torch.bfloat16)
    d = d or model.config.hidden_size
    return Subspace(bases={i: basis(d, 4, i) for i in layers}, site="mlp_out", fingerprint=fingerprint(model))


def test_edited_tensors_are_right_and_all_others_are_byte_equal(source, tmp_path):
    before = {f.name: sha256(f) for f in source.iterdir()}
    old = tensors(source)
    subspace = space(source)
    norms = bake_checkpoint(source, subspace, tmp_path / "baked")
    new = tensors(tmp_path / "baked")
    assert set(new) == set(old)
    edited = {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    assert set(norms) == edited
    for name in old:
        if name not in edited:
            assert torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype
            continue
        u = subspace.bases[int(name.split(".")[2])]
        ratio = worst_ratio(
            (new[name].double() - bake_oracle(old[name], u, 1.0)).abs(), baked_element_bound(old[name], u, 1.0)
        )
        leak = float(leak_of_weight(new[name], old[name], u, 1.0))
        floor = float(leak_floor(new[name], old[name], u))
        print(f"{name}: error/bound {ratio:.2f}, leak {leak:.2e}, floor {floor:.2e}, ratio {leak / floor:.2f}")
        assert ratio <= 1 and new[name].dtype == torch.bfloat16
    assert {f.name: sha256(f) for f in source.iterdir()} == before
    assert (tmp_path / "baked" / "notes.txt").read_text() == "travels along"
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["layers"] == [1, 2] and record["strength"] == 1.0
    assert all(sha256(tmp_path / "baked" / n) == h for n, h in record["sha256"]["baked"].items())
    assert cli.load_model(str(tmp_path / "baked"), torch.bfloat16) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baked", "source"]


def refused(source, destination, subspace, error, message, **options):
    before = {f.name: sha256(f) for f in source.iterdir()}
    there = sorted(p.name for p in destination.parent.iterdir())
    with pytest.raises(error, match=message):
        bake_checkpoint(source, subspace, destination, **options)
    assert sorted(p.name for p in destination.parent.iterdir()) == there
    assert {f.name: sha256(f) for f in source.iterdir()} == before


def test_refusals_leave_nothing_behind(source, tmp_path):
    good = space(source)
    bake_checkpoint(source, good, tmp_path / "once")
    refused(source, tmp_path / "once", good, FileExistsError, "exists and was left as it is")
    refused(tmp_path / "once", tmp_path / "twice", good, ValueError, "was baked before")
    (tmp_path / "once" / "provenance.json").unlink()
    refused(tmp_path / "once", tmp_path / "twice", good, ValueError, "measured on other weights")
    out_of_range = space(source, (1, 40))
    missing = r"no tensor model\.layers\.40\.mlp\.down_proj\.weight"
    refused(source, tmp_path / "new", out_of_range, ValueError, missing)
    for force in (False, True):
        refused(source, tmp_path / "new", space(source, d=50), ValueError, "d_model=50, the model 48", force=force)


@pytest.mark.parametrize("fault, message", [("nan", "holds NaN or Inf"), ("int8", "stored as torch.int8")])
def test_weights_that_cannot_be_edited_are_refused(source, tmp_path, fault, message):
    name = "model.layers.2.mlp.down_proj.weight"
    file = next(f for f in source.glob("*.safetensors") if name in load_file(f))
    content = load_file(file)
    subspace = space(source)
    if fault == "nan":
        content[name][1, 1] = float("nan")
    else:
        content[name] = content[name].to(torch.int8)
    save_file(content, file, metadata={"format": "pt"})
    refused(source, tmp_path / "new", subspace, ValueError, message, force=True)


def test_damaged_files_and_full_disks_are_named(source, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    subspace = space(source)

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    refused(source, tmp_path / "new", subspace, ValueError, r"cannot write .*new.*No space left.*Nothing was kept")
    monkeypatch.undo()
    file = next(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    refused(source, tmp_path / "new", subspace, ValueError, rf"{file.name}' cannot be read as safetensors")


def test_a_basis_of_another_site_is_said_in_the_provenance(source, tmp_path):
    from dataclasses import replace

    bake_checkpoint(source, replace(space(source), site="resid_post"), tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["note"] == "resid_post basis applied at mlp_out"


def test_an_exception_half_way_leaves_no_destination_and_the_next_run_is_clean(source, tmp_path, monkeypatch):
    subspace = space(source)
    monkeypatch.setattr(cli, "write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    refused(source, tmp_path / "new", subspace, KeyboardInterrupt, None)
    monkeypatch.undo()
    # What a kill leaves: the sibling with the deterministic name. A rerun replaces it.
    (tmp_path / ".new.baking").mkdir()
    (tmp_path / ".new.baking" / "model.safetensors").write_bytes(b"half")
    bake_checkpoint(source, subspace, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]
