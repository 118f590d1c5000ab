"""Certificates of the general edit y = x - a A (B^T x - c), in memory and on disk, and the faults that they name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import Subspace, adapted, bake_checkpoint, hooked, write_adapter
from kernel_surgery.certify.files import verify_adapter, verify_checkpoint, verify_restored
from kernel_surgery.checkpoint.baking import undo_checkpoint
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.lora import lora_pair
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.load import load_model
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.certify.test_model import DTYPES, RIGHT, WRONG_LAYER, at_one_layer, certified, with_output, with_weights
from tests.support.models import oblique, pico

LAYERS = (2, 3, 4, 5)
SCHEDULE = {2: 0.5, 3: 1.0, 4: 0.75, 5: 1.25}


def subspace_of(edits, model, strengths=None):
    return Subspace.of(edits, fingerprint=fingerprint(model), strengths=strengths or {})


@pytest.fixture(scope="module")
def linear():
    """An oblique subspace of the embedded model, with a schedule."""
    return subspace_of({i: oblique(128, 6, i) for i in LAYERS}, load_model("polyglot", torch.float32), SCHEDULE)


@pytest.fixture(scope="module")
def affine(tmp_path_factory):
    """(a model whose MLPs have a bias, an affine subspace of it)."""
    folder = tmp_path_factory.mktemp("affine")
    model = pico(
        "llama", dtype=torch.bfloat16, bias=True, mlp_bias=True, num_hidden_layers=6, hidden_size=64, head_dim=16
    )
    model.save_pretrained(folder)
    return folder, subspace_of({i: oblique(64, 6, i, offset=True) for i in LAYERS}, model, SCHEDULE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_holds_for_a_linear_edit_in_every_mode(linear, dtype):
    found = certified(dtype, subspace=linear)
    worst = max(row["error_over_bound"] for row in found["layers"])
    print(f"{dtype}: largest error/bound {worst:.3f}")
    assert found["faults"] == [] and found["modes"] == ["hook", "fused", "baked", "lora"]
    assert 0.01 < worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_holds_for_an_affine_edit_of_a_model_with_biases(affine, dtype):
    found = certified(dtype, affine[0], affine[1])
    assert found["faults"] == [] and found["modes"] == ["hook", "fused", "baked"]
    assert "offset" in found["left_out"]["lora"]
    assert {r["tensor"].rpartition(".")[2] for r in found["tensors"]} == {"weight", "bias"}


def test_an_affine_edit_of_a_model_without_biases_leaves_the_modes_out_that_cannot(linear):
    shifted = replace(linear, offsets={i: torch.randn(6) for i in LAYERS})
    found = certified(torch.bfloat16, subspace=shifted)
    assert found["faults"] == [] and found["modes"] == ["hook", "fused"]
    assert sorted(found["left_out"]) == ["baked", "lora"]


# --- faults in an applier, right everywhere but at one layer ---


def changed(change):
    """(an output, a weight and a bias) of another edit than the one that was asked for."""
    return (
        with_output(lambda x, e, a: project_eager(x, change(e), a)),
        with_weights(lambda w, *rest: [bake_weight(t, change(rest[-2]), rest[-1]) for t in (w, *rest[:-2])]),
    )


CHANGES = {
    "dual forgotten": lambda e: Projection(e.basis, e.basis, e.offset),
    "basis forgotten": lambda e: Projection(e.dual, e.dual, e.offset),
    "A and B swapped": lambda e: Projection(e.dual, e.basis, e.offset),
    "B's columns in another order": lambda e: Projection(e.basis, e.dual.roll(1, 1), e.offset),
    "B^T A not I": lambda e: Projection(e.basis, 1.02 * e.dual, e.offset),
    "a basis made orthonormal": lambda e: Projection(torch.linalg.qr(e.basis)[0], e.dual, e.offset),
    "a column lost": lambda e: Projection(e.basis[:, :-1], e.dual[:, :-1], None if e.offset is None else e.offset[:-1]),
    "another layer's dual": lambda e: Projection(e.basis, oblique(len(e.basis), 6, 99).dual, e.offset),
}
OFFSET = {
    "offset dropped": lambda e: e.linear,
    "offset's sign": lambda e: Projection(e.basis, e.dual, -e.offset),
    "offset of another dimension": lambda e: Projection(e.basis, e.dual, e.offset.roll(1)),
    "offset doubled": lambda e: Projection(e.basis, e.dual, 2 * e.offset),
}


def named(found, mode):
    faults = found["faults"]
    print("\n".join(faults))
    assert any(f.startswith(f"layer {WRONG_LAYER}: ") and mode in f for f in faults)
    assert all(f.startswith((f"layer {WRONG_LAYER}: ", f"{mode}: ")) and mode in f for f in faults)


@pytest.mark.slow
@pytest.mark.parametrize("mode", RIGHT)
@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_form_at_one_layer_is_named(linear, mode, name, monkeypatch):
    if mode == "lora":

        def wrong(model, edits, strength):
            (layer, edit), *_ = edits.items()
            return adapted(model, {layer: CHANGES[name](edit)}, strength)
    else:
        wrong = changed(CHANGES[name])[mode == "baked"]
    monkeypatch.setattr("kernel_surgery.edit.plan.check_projections", lambda edits: edits)  # which would refuse it
    monkeypatch.setitem(APPLIERS, mode, at_one_layer(RIGHT[mode], wrong))
    named(certified(torch.bfloat16, subspace=linear, whole=False), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hook", "fused", "baked"])
@pytest.mark.parametrize("name", OFFSET)
def test_a_wrong_offset_at_one_layer_is_named(affine, mode, name, monkeypatch):
    monkeypatch.setitem(APPLIERS, mode, at_one_layer(RIGHT[mode], changed(OFFSET[name])[mode == "baked"]))
    named(certified(torch.bfloat16, affine[0], affine[1], whole=False), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hook", "fused", "baked", "lora"])
def test_a_schedule_that_is_shifted_by_a_layer_is_named(linear, mode, monkeypatch):
    """Each layer gets the strength of the one before it."""
    right, before = RIGHT[mode], dict(zip(LAYERS, (SCHEDULE[5], *(SCHEDULE[i] for i in LAYERS)), strict=False))

    def shifted(model, edits, strength):
        (layer,) = edits
        return right(model, edits, before[layer])

    monkeypatch.setitem(APPLIERS, mode, shifted)
    faults = certified(torch.bfloat16, subspace=linear, whole=False)["faults"]
    assert all(any(f.startswith(f"layer {i}: ") and mode in f for f in faults) for i in LAYERS)


def test_a_schedule_that_only_the_whole_model_forgets_is_found_there(linear, monkeypatch):
    """Right as long as one layer is edited at a time."""
    monkeypatch.setattr(
        "kernel_surgery.certify.running.all_layers", lambda mode, model, edits, *rest: hooked(model, edits, 1.0)
    )
    faults = certified(torch.float32, subspace=linear)["faults"]
    assert faults and all("decoded with all layers edited at once" in f for f in faults)


# --- on disk ---

KINDS = {"linear": ("qwen2", False), "affine": ("llama", True)}


def made(folder, kind, dtype=torch.bfloat16, strength=1.0, layers=(1, 2)):
    name, bias = KINDS[kind]
    more = {"mlp_bias": True} if bias else {}
    model = pico(name, dtype=dtype, bias=bias, hidden_size=128, intermediate_size=512, head_dim=32, **more)
    model.save_pretrained(folder / "source")
    edits = {i: oblique(128, 6, i, offset=bias) for i in layers}
    subspace = subspace_of(edits, model, {1: 0.5, 2: 1.25})
    subspace.save(folder / "subspace.safetensors")
    bake_checkpoint(folder / "source", subspace, folder / "baked", strength=strength)
    return subspace


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_baked_weights_are_certified_and_taken_back(tmp_path, kind, dtype):
    made(tmp_path, kind, dtype)
    for subspace in (None, tmp_path / "subspace.safetensors"):
        found = verify_checkpoint(tmp_path / "baked", tmp_path / "source", subspace)
        assert found["faults"] == [] and len(found["tensors"]) == (4 if kind == "affine" else 2)
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["form"] == {"linear": "oblique"}.get(kind, kind) and record["schedule"] == {"1": 0.5, "2": 1.25}
    assert (
        certified(
            dtype, tmp_path / "source", Subspace.load(tmp_path / "subspace.safetensors"), made=tmp_path / "baked"
        )["faults"]
        == []
    )
    undo_checkpoint(tmp_path / "baked", tmp_path / "restored")
    assert verify_restored(tmp_path / "restored", tmp_path / "source")["faults"] == []


def forged(folder, change):
    """Change the baked tensors, and their hash with them."""
    file = folder / "baked" / "model.safetensors"
    tensors, old = load_file(file), load_file(folder / "source" / "model.safetensors")
    change(tensors, old)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    record = json.loads((folder / "baked" / "provenance.json").read_text())
    record["sha256"][file.name] = sha256(file)
    (folder / "baked" / "provenance.json").write_text(json.dumps(record))


def redone(subspace, part, change, strength=None):
    """A change that bakes layer 2's weight or bias with another edit, or with another strength."""

    def into(tensors, old):
        name, edit = f"model.layers.2.mlp.down_proj.{part}", subspace.projections[2]
        a = subspace.strength_at(2, 1.0) if strength is None else strength
        tensors[name] = bake_weight(old[name], change(edit), a)

    return into


@pytest.mark.parametrize(
    "name, part",
    [
        *((name, part) for name in (*CHANGES, "strength of the layer before") for part in ("weight", "bias")),
        *((name, "bias") for name in OFFSET),  # a weight takes no offset
    ],
)
def test_a_wrong_form_on_disk_is_named_though_the_hashes_match(tmp_path, name, part):
    subspace = made(tmp_path, "affine")
    change = {**CHANGES, **OFFSET}.get(name, lambda e: e)
    forged(tmp_path, redone(subspace, part, change, 0.5 if name.startswith("strength") else None))
    faults = verify_checkpoint(tmp_path / "baked", tmp_path / "source")["faults"]
    assert faults and all(f.startswith(f"layer 2: {part}") or f"layers.2.mlp.down_proj.{part}" in f for f in faults), (
        faults
    )


@pytest.mark.parametrize("part", ["basis", "dual", "offset", "strengths"])
def test_another_subspace_is_named_by_its_part(tmp_path, part):
    subspace = made(tmp_path, "affine")
    if part == "basis":  # and the dual with it: together they are a projection again
        edits = subspace.projections | {2: oblique(128, 6, 9, offset=True)}
        other = replace(
            subspace,
            bases={i: e.basis for i, e in edits.items()},
            duals={i: e.dual for i, e in edits.items()},
        )
    elif part == "dual":
        a = subspace.bases[2]
        other = replace(subspace, duals=subspace.duals | {2: torch.linalg.pinv(a.double()).T.float()})
    elif part == "offset":
        other = replace(subspace, offsets=subspace.offsets | {2: subspace.offsets[2] + 1})
    else:
        other = replace(subspace, strengths={1: 0.5, 2: 1.5})
    other.save(tmp_path / "other.safetensors")
    faults = verify_checkpoint(tmp_path / "baked", subspace=tmp_path / "other.safetensors")["faults"]
    word = {"strengths": "strength"}.get(part, part)
    assert any(f.startswith(f"layer 2: the {word} ") for f in faults), faults


def test_an_adapter_of_an_oblique_edit_is_certified_and_of_an_affine_one_refused(tmp_path):
    subspace = made(tmp_path, "linear")
    write_adapter(tmp_path / "source", subspace, tmp_path / "adapter", strength=0.8)
    assert verify_adapter(tmp_path / "adapter", tmp_path / "source", tmp_path / "subspace.safetensors")["faults"] == []
    model = load_model(str(tmp_path / "source"), torch.float32)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    pair = lora_pair(model.model.layers[2].mlp.down_proj.weight, subspace.projections[2], 1.25 * 0.8)
    (a,) = (t for name, t in tensors.items() if "layers.2." in name and "lora_A" in name)
    torch.testing.assert_close(a[:6], pair.a, rtol=1e-4, atol=1e-6)
    (tmp_path / "other").mkdir()
    shifted = made(tmp_path / "other", "affine")
    with pytest.raises(KernelSurgeryError, match="offset"):
        write_adapter(tmp_path / "other" / "source", shifted, tmp_path / "other" / "adapter")
    assert not (tmp_path / "other" / "adapter").exists()


def test_baking_an_offset_into_a_model_without_biases_is_refused_before_anything_is_written(tmp_path):
    subspace = made(tmp_path, "linear")
    shifted = replace(subspace, offsets={i: torch.ones(6) for i in (1, 2)})
    with pytest.raises(KernelSurgeryError, match="bias"):
        bake_checkpoint(tmp_path / "source", shifted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "affine"])
def test_the_certificate_holds_on_the_gpu(linear, affine, dtype, kind):
    """The same checks, with the Triton kernels in the fused mode."""
    options = {"subspace": linear} if kind == "linear" else {"source": affine[0], "subspace": affine[1]}
    found = certified(dtype, device="cuda", **options)
    assert found["faults"] == [] and found["providers"]["fused"] == "triton/cuda"
