"""Baking quantised checkpoints: as bfloat16, and back in their own format with the error certified."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kernel_surgery.certify.files import verify_adapter, verify_checkpoint, verify_restored
from kernel_surgery.certify.quantised import GATE
from kernel_surgery.certify.render import shown
from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.models.before import check_stored
from kernel_surgery.models.load import load_model
from kernel_surgery.models.stored import layout_in, layouts, parts
from kernel_surgery.numerics.bounds import adapter_bound, worst_ratio
from kernel_surgery.numerics.oracle import quantised_oracle
from kernel_surgery.quantised.blocks import Scheme
from kernel_surgery.subspace.artifact import Subspace
from tests.support.models import basis
from tests.support.picos import D
from tests.support.quantised import CONFIGS, save_mxfp4, save_quantised

EVERY = sorted(CONFIGS)
BOUND = Scheme.bound
LAYERS = (1, 2)


def space(d=D, layers=LAYERS):
    return Subspace(bases={i: basis(d, 4, i) for i in layers}, site="mlp_out")


def bake(source, out, how, strength=1.0, **more):
    return bake_checkpoint(source, space(**more), out, strength=strength, force=True, quantised=how)


def held(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("strength", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("name", EVERY)
def test_a_requantised_bake_is_no_worse_than_the_formats_own_rounding(tmp_path, name, strength):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, name)
    bake(source, out, "requantize", strength)
    certificate = verify_checkpoint(out, source)
    assert certificate["faults"] == []
    rows = certificate["tensors"]
    assert len(rows) == len(LAYERS)
    for row in rows:
        print(f"{name} a={strength}: file/format {row['requantised_over_rounding']:.3f}, edit {row['edit_error']:.1e}")
        assert row["requantised_over_rounding"] <= GATE and row["edit_over_bound"] <= 1
        assert row["edit_error"] < 1e-6 < row["rounding"] and row["format"].endswith(tuple("0123456789"))
        assert row["rounding_max"] > row["rounding"]
    before, after = held(source), held(out)
    assert {key: (t.dtype, t.shape) for key, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    edited = {n for part in parts(layout_in(source), layouts(source), LAYERS) for n in part.tensors}
    changed = {key for key in before if not same(before[key], after[key])}
    assert changed and changed <= edited
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    text = shown(certificate)
    assert "edit's error" in text and "file/format" in text and "everything holds" in text


@pytest.mark.parametrize("name", EVERY)
def test_at_strength_0_every_byte_stays(tmp_path, name):
    save_quantised(tmp_path / "source", name)
    bake(tmp_path / "source", tmp_path / "baked", "requantize", 0.0)
    before, after = held(tmp_path / "source"), held(tmp_path / "baked")
    assert all(same(before[key], after[key]) for key in before)


def test_scales_in_another_file_than_their_numbers_are_written_too(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "fp8-block", shards=3, scale=torch.float32)
    part = parts(layout_in(source), layouts(source), [1])[0]
    assert len({path for path, _ in part.quantised.pieces.values()}) == 2
    bake(source, out, "requantize")
    assert verify_checkpoint(out, source)["faults"] == []
    model = load_model(str(out), torch.bfloat16)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().float()
    assert float((space().bases[1].T @ weight).norm()) < 0.05 * float(weight.norm())


def test_fp8_experts_that_lie_one_by_one_are_all_edited(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "fp8-block", "qwen3_moe")
    bake(source, out, "requantize")
    certificate = verify_checkpoint(out, source)
    assert certificate["faults"] == [] and len(certificate["tensors"]) == 1 + 4  # layer 1 is dense
    assert max(row["requantised_over_rounding"] for row in certificate["tensors"]) <= GATE


def _truncated(self, x):
    return x.clamp(self.least, self.largest).trunc() if self.bits else x.sign() * (x.abs() * 0.97).to(self.dtype).to(x)


def _grown(self, matrix):
    scale, zero = _rule(self, matrix)
    return scale * 1.5, zero


_rule = Scheme.rule


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("int8-channel", "nearest", "times the format's own rounding"),
        ("int4-group", "nearest", "times the format's own rounding"),
        ("fp8-block", "nearest", "times the format's own rounding|times its bound"),
        ("int8-channel", "rule", "times the format's own rounding"),
    ],
)
def test_a_matrix_that_is_worse_than_its_format_is_named(tmp_path, monkeypatch, name, wrong, message):
    """Rounding toward zero, and scales that are half as fine again as they could be."""
    from kernel_surgery.quantised.numbers import Numbers

    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, name)
    monkeypatch.setattr(*((Numbers, "nearest", _truncated) if wrong == "nearest" else (Scheme, "rule", _grown)))
    if wrong == "rule":
        monkeypatch.setattr(Scheme, "bound", lambda self, numbers, scale: torch.zeros_like(numbers))  # keeps no scale
    bake(source, out, "requantize")
    monkeypatch.undo()
    faults = verify_checkpoint(out, source)["faults"]
    assert len([fault for fault in faults if "down_proj" in fault]) >= len(LAYERS)
    import re

    assert re.search(message, "\n".join(faults)), faults


@pytest.mark.parametrize("name", ["fp8-block", "int8-channel"])
def test_a_rule_that_is_wrong_where_it_is_written_and_where_it_is_checked_is_named(tmp_path, monkeypatch, name):
    """The certificate has a rule of its own: scales that waste numbers, or clip, are found though bake has them too."""
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, name)
    rule = Scheme.rule

    def wrong(self, matrix):
        scale, zero = rule(self, matrix)
        return scale * (0.5 if name == "fp8-block" else 2.0), zero

    monkeypatch.setattr(Scheme, "rule", wrong)
    monkeypatch.setattr(Scheme, "bound", lambda self, numbers, scale: torch.zeros_like(numbers))  # keeps no scale
    bake(source, out, "requantize")
    monkeypatch.setattr(Scheme, "bound", BOUND)
    faults = verify_checkpoint(out, source)["faults"]
    assert len([fault for fault in faults if "times the format's own rounding" in fault]) >= len(LAYERS), faults


@pytest.mark.parametrize("name", [name for name in EVERY if name != "int4-zero"])
def test_two_ways_to_quantise_agree(name, tmp_path):
    """The oracle of the certificate, and the code that writes: the same numbers, but where two are equally near."""
    save_quantised(tmp_path, name)
    part = parts(layout_in(tmp_path), layouts(tmp_path), [1])[0]
    scheme = part.quantised.scheme
    assert scheme.symmetric
    matrix = torch.randn(part.quantised.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[:3] *= 100  # an outlier in some blocks
    ours = scheme.dequantise(*scheme.by_rule(matrix, None))
    grid = scheme.numbers.grid()
    oracle = quantised_oracle(matrix, grid, scheme.block, scheme.scale, scheme.power)
    errors = (ours - matrix).abs(), (oracle - matrix).abs()
    assert torch.allclose(*errors, rtol=1e-6, atol=1e-9) and float((ours != oracle).double().mean()) < 1e-3


def test_a_packing_that_is_not_known_is_left_alone_by_the_modes_that_change_no_weight(tmp_path):
    """4-bit floats of compressed-tensors: the model can be edited while it runs, and not in its files."""
    source = tmp_path / "source"
    save_quantised(source, "int8-channel")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["format"] = "nvfp4-pack-quantized"
    (source / "config.json").write_text(json.dumps(config))
    check_stored(source)
    with pytest.raises(CheckpointError, match=r"compressed-tensors nvfp4-pack-quantized"):
        bake(source, tmp_path / "out", "dequantize")


def _rewritten(folder, tensor, change):
    """Change a tensor of a folder, and the hash that the folder records."""
    from safetensors.torch import save_file

    from kernel_surgery.files.hashing import sha256

    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "provenance.json").read_text())
    record["sha256"]["model.safetensors"] = sha256(folder / "model.safetensors")
    (folder / "provenance.json").write_text(json.dumps(record))


def test_a_scale_that_was_changed_and_an_edit_that_was_not_made_are_faults(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "fp8-channel")
    bake(source, out, "requantize")
    before = held(source)
    one, two = (f"model.layers.{i}.mlp.down_proj.weight" for i in LAYERS)
    _rewritten(out, f"{one}_scale", lambda scale: scale * 1.25)
    _rewritten(out, two, lambda _: before[two])
    _rewritten(out, f"{two}_scale", lambda _: before[f"{two}_scale"])
    _rewritten(out, "model.layers.0.mlp.down_proj.weight_scale", lambda scale: scale * 2)
    faults = "\n".join(verify_checkpoint(out, source)["faults"])
    assert f"layer 1: {one}: its error is" in faults and f"layer 2: {two}: its leak is" in faults
    assert "model.layers.0.mlp.down_proj.weight_scale should not have been edited" in faults
    _rewritten(out, f"{one}_scale", lambda scale: torch.full_like(scale, torch.nan))
    assert f"layer 1: {one}: it holds NaN or Inf" in verify_checkpoint(out, source)["faults"]
    alone = "\n".join(verify_checkpoint(out)["faults"])
    assert "only the original shows what was edited; give --model" in alone


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_dequantised_every_matrix_is_bfloat16_and_the_edit_exact(tmp_path, name, shards):
    source, out = tmp_path / "source", tmp_path / "baked"
    before = save_quantised(source, name, shards=shards)
    bake(source, out, "dequantize")
    certificate = verify_checkpoint(out, source)
    assert certificate["faults"] == [] and len(certificate["tensors"]) == len(LAYERS)
    assert verify_checkpoint(out)["faults"] == []
    after = held(out)
    assert {t.dtype for t in after.values()} == {torch.bfloat16} and before.keys() <= after.keys()
    assert not [
        key
        for key in after
        if key.endswith(("_scale", "input_scale", "_scale_inv", "_packed", "_shape", "_zero_point"))
    ]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model = load_model(str(out), torch.bfloat16)
    assert set(after) == set(model.state_dict()) - {"lm_head.weight"} or set(after) == set(model.state_dict())
    record = json.loads((out / "provenance.json").read_text())["quantisation"]
    assert record["how"] == "dequantised" and record["matrices"] == len(before)


def test_a_dequantised_bake_with_another_tensor_changed_is_a_fault(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "fp8-block")
    bake(source, out, "dequantize")
    name = "model.layers.0.mlp.gate_proj.weight"

    def nudged(tensor):
        tensor[3, 3] = tensor[3, 3] * 1.01 + 0.01
        return tensor

    _rewritten(out, name, nudged)
    assert (
        f"{name} should not have been edited, but differs from the original" in verify_checkpoint(out, source)["faults"]
    )


def test_mxfp4_is_dequantised_with_the_edit_in_every_expert_and_bias_and_not_requantised(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    experts = save_mxfp4(source)
    with pytest.raises(CheckpointError, match=r"own format \(MXFP4 .*\): its 4-bit floats share a power of two"):
        bake(source, tmp_path / "no", "requantize", d=64)
    bake(source, out, "dequantize", d=64)
    certificate = verify_checkpoint(out, source)
    assert certificate["faults"] == [] and len(certificate["tensors"]) == 2 * len(LAYERS) * 4
    after = held(out)
    for tensor, matrices in experts.items():
        if "layers.1." in tensor and "down" in tensor:
            u = space(64).bases[1]
            assert float((after[tensor].float() @ u).norm()) < 0.05 * float((matrices @ u).norm())
        elif "layers.0." in tensor:
            assert torch.equal(after[tensor], matrices.bfloat16())
    assert load_model(str(out), torch.bfloat16) is not None


def test_an_undo_restores_the_dequantised_weights_and_a_requantised_bake_refuses(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "fp8-block")
    bake(source, out, "dequantize")
    undo_checkpoint(out, tmp_path / "restored")
    certificate = verify_restored(tmp_path / "restored", source)
    assert certificate["faults"] == [] and len(certificate["tensors"]) == len(LAYERS)
    name = "model.layers.1.mlp.down_proj.weight"
    _rewritten(tmp_path / "restored", name, lambda _: held(out)[name])
    faults = "\n".join(verify_restored(tmp_path / "restored", source)["faults"])
    assert f"{name}: an element differs from the original by" in faults
    bake(source, tmp_path / "again", "requantize")
    assert not (tmp_path / "again" / "kernel_surgery" / "undo.safetensors").exists()
    with pytest.raises(CheckpointError, match="cannot be undone: its matrices were quantised again"):
        undo_checkpoint(tmp_path / "again", tmp_path / "no")


def test_refusals_name_the_ways_out_and_leave_nothing_behind(tmp_path):
    source = tmp_path / "source"
    save_quantised(source, "fp8-block")
    ways = r"it is quantised \(FP8 .*8 x 16\).\n--dequantize .* --requantize .*kernel_surgery.lora.*fused"
    with pytest.raises(CheckpointError, match=ways):
        bake(source, tmp_path / "no", None)
    config = json.loads((source / "config.json").read_text())
    for method in ("gptq", "awq", "bitsandbytes"):
        config["quantization_config"] = {"quant_method": method}
        (source / "config.json").write_text(json.dumps(config))
        for how in (None, "dequantize", "requantize"):
            with pytest.raises(CheckpointError, match=rf"(?s)quantised by {method}, .*bake it and quantise the result"):
                bake(source, tmp_path / "no", how)
    from tests.support.picos import pico_of

    pico_of("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"is quantised, such as .*: omit --requantize"):
        bake(tmp_path / "plain", tmp_path / "no", "requantize")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "source"]


@pytest.mark.parametrize("name", ["fp8-block", "int4-zero"])
def test_the_adapter_of_a_quantised_checkpoint_is_of_its_dequantised_weights(tmp_path, name):
    source = tmp_path / "source"
    save_quantised(source, name)
    write_adapter(source, space(), tmp_path / "adapter", force=True)
    made = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for part in parts(layout_in(source), layouts(source), LAYERS):
        w, u = part.read(), space().bases[part.layer]
        a = made[f"base_model.model.{part.name.removesuffix('.weight')}.lora_A.weight"][:4]
        assert worst_ratio((a.double() - u.double().T @ w.double()).abs(), adapter_bound(w)) <= 1
    assert verify_adapter(tmp_path / "adapter", source)["faults"] == []


def test_a_layer_that_is_not_quantised_is_baked_as_it_is_beside_others_that_are(tmp_path):
    source, out = tmp_path / "source", tmp_path / "baked"
    before = save_quantised(source, "fp8-channel")
    from safetensors.torch import save_file

    tensors = held(source)
    for i in LAYERS:  # as the configuration's `ignore` leaves some out
        name = f"model.layers.{i}.mlp.down_proj.weight"
        tensors[name] = before[name]
        del tensors[f"{name}_scale"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    bake(source, out, None)
    certificate = verify_checkpoint(out, source)
    assert certificate["faults"] == [] and {row["dtype"] for row in certificate["tensors"]} == {"BF16"}
    with pytest.raises(CheckpointError, match="omit --requantize"):
        bake(source, tmp_path / "no", "requantize")


def test_a_checkpoint_in_a_format_that_is_not_read_can_still_be_edited_in_memory(tmp_path):
    from safetensors.torch import save_file

    from kernel_surgery.checkpoint.source import check_edit
    from tests.support.picos import pico_of

    pico_of("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        module = name.removesuffix("weight")
        tensors[f"{module}qweight"] = torch.zeros(tensors.pop(name).shape[1] // 8, D, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is incomplete: it has no tensor"):
        check_edit(tmp_path, space(), ["fused"], force=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    check_edit(tmp_path, space(), ["hook", "fused", "lora"], force=True)


def test_the_commands_bake_and_verify_a_quantised_checkpoint(tmp_path, capsys):
    from kernel_surgery.bake import run as bake_command
    from kernel_surgery.common.errors import UserError
    from kernel_surgery.verify import run as verify_command

    source, file = tmp_path / "source", tmp_path / "subspace.safetensors"
    save_quantised(source, "fp8-block", num_attention_heads=4, head_dim=None)
    space().save(file)
    words = ["--model", str(source), "--subspace", str(file), "--force", "--no-damage"]
    for how in ("requantize", "dequantize"):
        out = ["--out", str(tmp_path / how)]
        assert bake_command([*words, *out, f"--{how}"]) == 0
        assert verify_command(["--baked", str(tmp_path / how), "--model", str(source)]) == 0
        card = (tmp_path / how / "README.md").read_text()
        assert ("cannot be undone" in card) == (how == "requantize")
        assert ("other quantised tensors were written as bfloat16" in card) == (how == "dequantize")
        assert ("verify --baked THIS --model ORIGINAL\n" in card) == (how == "requantize")
        assert "The damage was measured" not in card and "not measured (--no-damage)" in card
    printed = capsys.readouterr().out
    assert "file/format" in printed and "everything holds" in printed
    with pytest.raises(UserError, match="omit --dequantize"):
        bake_command(["--undo", "--model", str(tmp_path / "dequantize"), "--out", str(tmp_path / "no"), "--dequantize"])
    both = ["--model", str(source), "--subspace", str(file), "--force", "--baked", str(tmp_path / "requantize")]
    with pytest.raises(UserError, match="Verify the files with --model and --baked alone"):
        verify_command(both)


@pytest.mark.parametrize("name", ["fp8-block", "int4-zero"])
def test_every_mode_is_certified_on_the_dequantised_weights_a_layer_at_a_time(tmp_path, name):
    from kernel_surgery.certify.whole import verify_model

    source, file = tmp_path / "source", tmp_path / "subspace.safetensors"
    save_quantised(source, name)
    space().save(file)
    certificate = verify_model(source, file, model_id="pico", prompts=2, new_tokens=0, whole=False, force=True)
    assert certificate["faults"] == []
    assert {row["layer"] for row in certificate["model"]["layers"]} == set(LAYERS)


def test_a_subspace_that_was_fitted_on_the_loaded_model_belongs_to_its_files(tmp_path):
    from dataclasses import replace

    from kernel_surgery.common.errors import MismatchError
    from kernel_surgery.subspace.fingerprint import fingerprint

    source = tmp_path / "source"
    save_quantised(source, "fp8-block", scale=torch.float32)
    fitted = replace(space(), fingerprint=fingerprint(load_model(str(source), torch.bfloat16)))
    bake_checkpoint(source, fitted, tmp_path / "baked", quantised="requantize")
    (tmp_path / "baked" / "provenance.json").unlink()
    with pytest.raises(MismatchError, match="measured on other weights"):
        bake_checkpoint(tmp_path / "baked", fitted, tmp_path / "twice", quantised="requantize")


def test_a_requantised_checkpoint_can_be_evaluated_beside_its_original(tmp_path):
    from kernel_surgery.evaluation.written import read_written

    source, out = tmp_path / "source", tmp_path / "baked"
    save_quantised(source, "int8-packed")
    bake(source, out, "requantize")
    made = read_written(out, "baked", source)
    for part in parts(layout_in(out), layouts(out), LAYERS):
        assert torch.equal(made.tensors[part.name], part.read())
