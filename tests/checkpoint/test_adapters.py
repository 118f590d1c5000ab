"""Adapters of every architecture: what PEFT makes of them, experts one by one and stacked, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import Subspace, adapted
from kernel_surgery.certify.files import verify_adapter
from kernel_surgery.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, served_modules, write_adapter
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.lora import lora_pair
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.written import read_written
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.architectures import layout_named, mlp_outputs
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.bounds import baked_element_bound, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import oblique
from tests.support.picos import D, pico_of

LAYERS = (1, 2)
STRENGTH = 0.5
# Experts one by one with a dense layer between, under other names, with a shared expert, stacked; and one that is
# transposed, with a name that attention has too.
KINDS = ("qwen3_moe", "mixtral", "qwen2_moe", "granitemoe", "gpt2")


def stacked_the_other_way(kind):
    """Whether a model type's experts are stacked and transposed: their adapter is refused, as a test shows."""
    return any(form.stacked and form.transposed for form in ARCHITECTURES[kind].writes)


def saved(kind, folder, biases=False):
    """(model, Subspace) of a checkpoint at folder / "source". biases: of what is edited, or else they are zero."""
    model = pico_of(kind)
    for site in mlp_outputs(model, LAYERS).values():
        for weight in site.weights:
            if not weight.matrix and not biases:
                weight.tensor.data.zero_()
    model.save_pretrained(folder / "source")
    edits = {layer: oblique(D, 3, layer, spread=3.0) for layer in LAYERS}
    return model, Subspace.of(edits, fingerprint=fingerprint(model), n_layers=4, site="mlp_out")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_and_computes_what_our_lora_mode_does(kind, tmp_path):
    from peft import PeftModel

    model, subspace = saved(kind, tmp_path)
    write_adapter(tmp_path / "source", subspace, tmp_path / "adapter", strength=STRENGTH)
    wide = type(model)(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    wide.set_experts_implementation("eager")  # the other ones take no float64
    unedited = logits(wide)
    with applied("hook", wide, subspace, STRENGTH, True):
        exact = logits(wide)
    with adapted(model, subspace, STRENGTH):
        ours = logits(model)
    originals = {
        name: part.detach().clone()
        for site in mlp_outputs(model, LAYERS).values()
        for weight in site.weights
        if weight.matrix
        for name, part in weight.parts()
    }
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter")
    found = logits(theirs)
    # Both are float32 forms of one exact function. What ours is off by is the size of float32's error in this model.
    error, own = ((y.double() - exact).abs().max() for y in (found, ours))
    without = (unedited - exact).abs().max()
    print(f"{kind}: PEFT is off by {error / own:.2f} times what mode lora is, no edit by {without / own:.0f}")
    assert error <= 2 * own and without > 1000 * own
    # Merged, every matrix is within the bound of one that is baked in float32.
    merged, worst = theirs.merge_and_unload(), 0.0
    for layer, site in mlp_outputs(merged, LAYERS).items():
        edit = subspace.projections[layer]
        for name, weight in (pair for held in site.weights if held.matrix for pair in held.parts()):
            now = weight.detach()
            bound = baked_element_bound(originals[name], edit, STRENGTH)
            off = (now.double() - bake_oracle(originals[name], edit, STRENGTH)).abs()
            worst = max(worst, worst_ratio(off, bound))
            assert worst_ratio((now.double() - originals[name].double()).abs(), bound) > 1
    print(f"{kind}: {len(originals)} merged matrices, error/bound {worst:.3f}")
    assert worst <= 1 and len(originals) == {"qwen3_moe": 5, "qwen2_moe": 6, "gpt2": 2}.get(kind, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_was_written_is_evaluated_as_it_is(kind, tmp_path):
    model, subspace = saved(kind, tmp_path)
    write_adapter(tmp_path / "source", subspace, tmp_path / "adapter")
    written = read_written(tmp_path / "adapter", "adapter", tmp_path / "source")
    for layer, site in mlp_outputs(model, LAYERS).items():
        for name, weight in (pair for held in site.weights if held.matrix for pair in held.parts()):
            pair, module = lora_pair(weight, subspace.projections[layer]), name.removesuffix(".weight")
            assert torch.equal(written.tensors[f"{module}.lora_A"][:3], pair.a)
            assert torch.equal(written.tensors[f"{module}.lora_B"][:, :3], pair.b)
    with adapted(model, written):
        ours = logits(model)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = next(name for name in tensors if ".1." in name and "lora_B" in name and tensors[name].any())
    changed = tensors | {name: tensors[name] * 1.5}
    save_file(changed, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    rehash(tmp_path / "adapter")
    with adapted(model, read_written(tmp_path / "adapter", "adapter", tmp_path / "source")):
        assert not torch.allclose(logits(model), ours)


def rehash(adapter):
    record = json.loads((adapter / "provenance.json").read_text())
    record["sha256"][WEIGHTS] = sha256(adapter / WEIGHTS)
    (adapter / "provenance.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("kind", "module", "names"),
    [
        ("qwen2_moe", "model.layers.2.mlp.experts.{}.down_proj", "model.layers.2.mlp.experts.down_proj[{}]"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.{}.w2", "model.layers.2.mlp.experts.down_proj[{}]"),
    ],
)
def test_a_fault_in_one_expert_is_named(kind, module, names, tmp_path):
    _, subspace = saved(kind, tmp_path)
    adapter = tmp_path / "adapter"
    write_adapter(tmp_path / "source", subspace, adapter)
    right = load_file(adapter / WEIGHTS)
    a, b = ([f"{PREFIX}{module.format(i)}.lora_{part}.weight" for i in range(4)] for part in "AB")
    last = module.rpartition(".")[2]
    gate = a[1].replace(f".{last}.", {"down_proj": ".gate_proj.", "w2": ".w1."}[last])

    def faults(change, source=tmp_path / "source"):
        tensors = {name: t.clone() for name, t in right.items()}
        change(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
        rehash(adapter)
        return verify_adapter(adapter, source)["faults"]

    assert faults(lambda t: None) == [] and faults(lambda t: None, None) == []
    (found,) = faults(lambda t: t[a[3]].mul_(0.99))
    assert found.startswith(f"layer 2: {names.format(3)}: the error of A is ")
    swapped = faults(lambda t: t.update({a[0]: t[a[1]].clone(), a[1]: t[a[0]].clone()}))
    assert [f.partition(": the")[0] for f in swapped] == [f"layer 2: {names.format(i)}" for i in (0, 1)]
    (found,) = faults(lambda t: t[b[2]][5, 1].add_(1e-6), None)
    assert found == f"layer 2: {names.format(2)}: B is not the negative basis"
    for gone in (a[1], b[1], gate):
        found = faults(lambda t, gone=gone: t.pop(gone))
        assert f"layer 2: {names.format(1)}: A or B is missing, or of another shape" in found
    assert f"{gate} does not belong to a layer of the subspace" in faults(lambda t: t[gate].add_(1))
    if kind == "qwen2_moe":
        shared = f"{PREFIX}model.layers.2.mlp.shared_expert.down_proj.lora_A.weight"
        (found,) = faults(lambda t: t[shared].mul_(0.99))
        assert found.startswith("layer 2: model.layers.2.mlp.shared_expert.down_proj: the error of A is ")


def test_a_fault_in_one_of_the_stacked_experts_is_named(tmp_path):
    _, subspace = saved("granitemoe", tmp_path)
    adapter, name = tmp_path / "adapter", f"{PREFIX}model.layers.1.block_sparse_moe.experts.lora_A.weight"
    write_adapter(tmp_path / "source", subspace, adapter)
    assert verify_adapter(adapter, tmp_path / "source")["faults"] == []
    tensors = load_file(adapter / WEIGHTS)
    assert tensors[name].shape[0] == 4 * 8  # four experts of rank 3, padded to 8
    tensors[name][2 * 8 + 1, 4] *= -1
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    rehash(adapter)
    (found,) = verify_adapter(adapter, tmp_path / "source")["faults"]
    assert found.startswith("layer 1: model.layers.1.block_sparse_moe.experts.down_proj[2]: the error of A is ")


def test_the_configuration_and_the_card_say_what_is_edited(tmp_path):
    found = {}
    for kind in ("qwen2_moe", "gpt2", "starcoder2"):
        _, subspace = saved(kind, tmp_path / kind)
        write_adapter(tmp_path / kind / "source", subspace, tmp_path / kind / "adapter")
        config = json.loads((tmp_path / kind / "adapter" / CONFIG).read_text())
        found[kind] = (config["target_modules"], config.get("layers_pattern"), config["fan_in_fan_out"])
        if kind == "qwen2_moe":
            layers = "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.shared_expert.down_proj.weight"
            assert config["target_parameters"] == [layers[0], "model.layers.2.mlp.experts.down_proj", layers[1]]
            card = (tmp_path / kind / "adapter" / "README.md").read_text()
            assert "`mlp.down_proj` and `mlp.experts.down_proj` and `mlp.shared_expert.down_proj` (4 experts)" in card
    assert found == {
        "qwen2_moe": ([], None, False),
        "gpt2": (["mlp.c_proj"], "h", True),
        "starcoder2": (["c_proj"], "layers", False),
    }
    served = {kind: served_modules(layout_named(kind)) for kind in ("llama", "gpt2", "qwen2_moe", "granitemoe", "lfm2")}
    assert served == {
        **{"llama": ["down_proj"], "gpt2": ["c_proj"], "qwen2_moe": ["down_proj", "experts"]},
        **{"granitemoe": ["experts"], "lfm2": ["w2"]},
    }


@pytest.mark.parametrize(
    ("kind", "biases", "words"),
    [
        ("gpt_oss", True, r"mlp\.experts\.down_proj\[0\] has a bias, which an adapter cannot edit"),
        ("gpt_oss", False, r"mlp\.experts\.down_proj\[0\] is stacked as \[d_ff, d_model\], which PEFT takes"),
        ("llama4_text", False, r"feed_forward\.experts\.down_proj\[0\] is stacked as \[d_ff, d_model\]"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_and_nothing_is_left(kind, biases, words, tmp_path):
    _, subspace = saved(kind, tmp_path, biases)
    with pytest.raises(KernelSurgeryError, match=words):
        write_adapter(tmp_path / "source", subspace, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k not in KINDS and not stacked_the_other_way(k)])
def test_an_adapter_of_every_architecture_is_what_our_lora_mode_is(kind, tmp_path):
    model, subspace = saved(kind, tmp_path)
    write_adapter(tmp_path / "source", subspace, tmp_path / "adapter")
    assert verify_adapter(tmp_path / "adapter", tmp_path / "source")["faults"] == []
    from peft import PeftModel

    plain = logits(model)
    with adapted(model, subspace):
        ours = logits(model)
    found = logits(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    off, edit = float((found - ours).abs().max()), float((ours - plain).abs().max())
    print(f"{kind}: PEFT differs by {off:.1e}, the edit moves the logits by {edit:.1e}")
    # Four layers of float32, whose rounding is 6e-8 of the largest logit: a factor of 1000 leaves room for all.
    assert off <= 1000 * 2.0**-24 * float(ours.abs().max()) < edit
