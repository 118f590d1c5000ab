"""Every model type of the table, by a pico model of its real class: every way to make the edit, and every check of it.

What is found is kept for docs/models.md (`tests.models.table`). Errors are in yardsticks: the error of the logits
against the float64 model with the exact edit, over the error of the unedited model against the unedited float64 model.
"""

import copy
import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery.certify.files import verify_checkpoint, verify_restored
from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.modes import APPLIERS, applied
from kernel_surgery.files.contents import weight_files
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.load import load_model
from kernel_surgery.models.stored import counted, layout_in, layouts, located, parts, sampled
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint, fingerprint_differences, sample_weights
from tests.support.marks import everyday
from tests.support.model_cells import store
from tests.support.models import basis
from tests.support.picos import WORDS, D, pico_of

LAYERS = (1, 2)
LIMIT = 2.0  # of a mode's error, in yardsticks: `certify.model.BESIDE_ORIGINAL`
KINDS = everyday(ARCHITECTURES, "qwen3", "gemma2", "gpt2", "qwen3_moe", "gpt_oss")
NAMES = {"baked": "baked in memory"}
IDS = torch.randint(1, WORDS, (3, 16), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def bases():
    return {layer: basis(D, 3, layer) for layer in LAYERS}


@functools.lru_cache(maxsize=1)
def original(kind):
    """A model type's pico, the exact logits {"original": ..., "edited": ...}, and what the pico itself errs by."""
    model = pico_of(kind)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # torch's grouped product of experts has no float64
    with applied("hook", exact, bases(), 1.0, True):
        edited = logits(exact)
    found = {"original": logits(exact), "edited": edited}
    return model, found, float((logits(model) - found["original"]).norm() / found["original"].norm())


def error(found, kind):
    """The error of logits over that of the unedited model."""
    _, exact, own = original(kind)
    return float((found - exact["edited"]).norm() / exact["edited"].norm()) / own


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_makes_the_same_edit(kind):
    model, _, _ = original(kind)
    before, cells = logits(model), {}
    assert error(before, kind) > 1000  # the edit is seen
    for mode in APPLIERS:
        try:
            with applied(mode, model, bases(), 1.0, True) as edits:
                made = error(logits(model), kind)
                assert len(edits) == 1 and edits[0].layers == LAYERS
        except KernelSurgeryError as why:
            biased = any(w.form.bias for site in mlp_outputs(model).values() for w in site.weights)
            assert mode == "lora" and biased and "has a bias, which an adapter cannot edit" in str(why)
            cells[mode] = "refused: biases"
            continue
        assert made <= LIMIT, (mode, made)
        cells[NAMES.get(mode, mode)] = f"{made:.2f}"
        assert torch.equal(logits(model), before)  # put back, to the bit
    store(kind, cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind, layout in ARCHITECTURES.items() if layout.plain])
def test_where_the_layer_is_plain_the_fused_operators_give_the_hooks_bits(kind, dtype):
    """The fused layer adds, and norms, as the model's own layer does. Its reach says how far that goes."""
    model, found = pico_of(kind, dtype=dtype), {}
    for mode in ("hook", "fused"):
        with applied(mode, model, bases(), 1.0, True) as (edit,):
            found[mode] = logits(model)
    assert set(edit.reach.values()) <= {"add", "norm"}, edit.fallbacks
    assert torch.equal(found["hook"], found["fused"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function of a model type that returns a folder with its checkpoint and the edit in its files, made once."""

    @functools.lru_cache(maxsize=1)
    def made(kind):
        folder, model = tmp_path_factory.mktemp(kind), original(kind)[0]
        model.save_pretrained(folder / "source")
        taken = fingerprint(model)
        subspace = Subspace(bases(), site="mlp_out", n_layers=len(mlp_outputs(model)), fingerprint=taken)
        # In the files the same weights are found, under the same names.
        assert not fingerprint_differences(taken, sample_weights(sampled(folder / "source").items()))
        subspace.save(folder / "subspace.safetensors")
        bake_checkpoint(folder / "source", subspace, folder / "baked")
        return folder

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_in_the_files_is_the_edit(kind, folders, tmp_path):
    folder, model = folders(kind), original(kind)[0]
    expected = {name for i, site in mlp_outputs(model, LAYERS).items() for w in site.weights for name, _ in w.parts()}
    certificate = verify_checkpoint(folder / "baked", folder / "source", folder / "subspace.safetensors")
    assert not certificate["faults"] and {row["tensor"] for row in certificate["tensors"]} == expected
    worst = max(row["error_over_bound"] for row in certificate["tensors"])
    loaded = load_model(str(folder / "baked"), torch.float32)
    made = error(logits(loaded), kind)
    assert made <= LIMIT
    # transformers reads what was written as what is in its modules, and writes it again: to the byte.
    loaded.save_pretrained(tmp_path / "again")
    again, ours = (merged(f) for f in (tmp_path / "again", folder / "baked"))
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    undo_checkpoint(folder / "baked", tmp_path / "restored")
    restored = verify_restored(tmp_path / "restored", folder / "source")
    assert not restored["faults"] and {row["tensor"] for row in restored["tensors"]} == expected
    store(
        kind,
        {
            "baked on disk": f"{made:.2f}",
            "certificate": f"{worst:.2f}",
            "undo": f"{max(row['error_over_bound'] for row in restored['tensors']):.2f}",
            "counted": counted(parts(layout_in(folder / "source"), layouts(folder / "source"), range(100))),
        },
    )


def merged(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_part_that_was_forgotten_is_named(kind, folders, tmp_path):
    """Of every role (dense, routed expert, shared expert) a matrix, and a bias: put back, and found by its name."""
    folder = folders(kind)
    shutil.copytree(folder / "baked", tmp_path / "baked")
    found = parts(layout_in(folder / "source"), layouts(folder / "source"), LAYERS)
    chosen = {(part.form.role, part.form.bias): part for part in found}  # the last of each: not the first expert
    places = located(tmp_path / "baked")
    for part in chosen.values():
        new, entry = places[part.tensor]
        at = entry.begin + part.entry.begin - located(folder / "source")[part.tensor][1].begin
        baked = new.read_bytes()
        old = part.path.read_bytes()[part.entry.begin : part.entry.end]
        new.write_bytes(baked[:at] + old + baked[at + len(old) :])
        faults = verify_checkpoint(tmp_path / "baked", folder / "source")["faults"]
        assert any(part.name in fault for fault in faults), (part.name, faults)
        others = {other.name for other in chosen.values()} - {part.name}
        assert not any(f"{name}:" in fault for name in others for fault in faults)
        new.write_bytes(baked)


@pytest.mark.parametrize("kind", everyday(("qwen3_moe", "qwen2_moe", "deepseek_v3"), "qwen3_moe"))
def test_a_checkpoint_with_an_expert_too_few_is_refused(kind, tmp_path):
    pico_of(kind).save_pretrained(tmp_path / "source")
    (file,) = weight_files(tmp_path / "source")
    held = load_file(file)
    lost = next(name for name in held if "experts.3.down_proj" in name and ".2." in name)
    save_file({name: tensor for name, tensor in held.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(KernelSurgeryError, match=r"has 3 experts in layer 2, but config.json gives it 4"):
        sampled(tmp_path / "source")


LOST = [
    ("qwen2_moe", "model.layers.2.mlp.shared_expert.down_proj.weight", "layer 2 lacks 1 shared matrix"),
    ("gpt_oss", "model.layers.2.mlp.experts.down_proj_bias", "layer 2 lacks 4 expert biases"),
    ("gpt2", "transformer.h.2.mlp.c_proj.bias", "layer 2 lacks 1 dense bias"),
]


@pytest.mark.parametrize("kind, lost, message", LOST)
def test_a_checkpoint_without_a_part_that_its_other_layers_have_is_refused(kind, lost, message, tmp_path):
    pico_of(kind).save_pretrained(tmp_path / "source")
    (file,) = weight_files(tmp_path / "source")
    held = load_file(file)
    assert lost in held
    save_file({name: tensor for name, tensor in held.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(KernelSurgeryError, match=f"is incomplete: {message} that other layers have"):
        sampled(tmp_path / "source")


def test_experts_one_by_one_are_found_where_the_model_stacks_them(tmp_path):
    """Some Llama 4 checkpoints hold [d_model, d_ff] of each expert; in memory they are stacked and transposed."""
    folder, model = tmp_path / "source", pico_of("llama4_text")
    model.save_pretrained(folder)
    (file,) = weight_files(folder)
    held = load_file(file)
    stacked = held.pop("model.layers.1.feed_forward.experts.down_proj")
    own = {f"model.layers.1.feed_forward.experts.{i}.down_proj.weight": t.T.contiguous() for i, t in enumerate(stacked)}
    save_file(held | own, file, metadata={"format": "pt"})
    found = [part for part in parts(layout_in(folder), layouts(folder), [1]) if part.form.role == "expert"]
    expected = {name: part for w in mlp_outputs(model, [1])[1].weights for name, part in w.parts()}
    assert len(found) == len(stacked) and all(torch.equal(part.read(), expected[part.name]) for part in found)
