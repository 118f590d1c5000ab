"""A quantised matrix read as floats: each format against what was quantised, transformers and compressed-tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.stored import layout_in, layouts, located, parts
from kernel_surgery.quantised.formats import FORMATS, quantised_in
from kernel_surgery.quantised.matrix import read
from kernel_surgery.quantised.numbers import FP8, integers, pack, unpack
from tests.support.picos import EXPERTS, D
from tests.support.quantised import CONFIGS, save_mxfp4, save_quantised

EVERY = sorted(CONFIGS)


def matrices(folder):
    return {name: matrix for name, (matrix, _) in quantised_in(folder, located(folder)).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_a_matrix_is_read_to_within_half_a_step_of_what_was_quantised(tmp_path, name, shards):
    before = save_quantised(tmp_path, name, shards=shards)
    found = matrices(tmp_path)
    assert found.keys() == before.keys()
    for tensor, matrix in found.items():
        loaded, w = matrix.load(), before[tensor].float()
        got = matrix.dequantised()
        assert got.dtype == torch.float32 and got.shape == w.shape
        numbers = loaded.stored(slice(0, len(w))).float()
        bound = loaded.unordered(matrix.scheme.bound(numbers, loaded.scale))
        # The scale is rounded to bfloat16, so the ends of the range may be clipped by that much.
        clipped = 2.0**-8 * w.abs().max() * (1 if name.startswith("fp8") else 2)
        assert bool(((got - w).abs() <= bound + 1e-6 + clipped * (bound == bound)).all())
        assert float((got - w).norm() / w.norm()) < (0.05 if "8" in name else 0.12)


THEIRS = [name for name in EVERY if CONFIGS[name]["quant_method"] == "compressed-tensors"]


def compressor(name):
    """compressed-tensors' own compressor of a format, and its scheme."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(CONFIGS[name])
    return BaseCompressor.get_value_from_registry(config.format), config.config_groups["group_0"]


def module_of(held, tensor):
    module = tensor.removesuffix("weight")
    return {key.removeprefix(module): value for key, value in held.items() if key.startswith(module)}


@pytest.mark.parametrize("name", THEIRS)
def test_compressed_tensors_decompresses_to_the_same_bits(tmp_path, name):
    theirs, scheme = compressor(name)
    save_quantised(tmp_path, name, scale=torch.float32)
    held = load_file(tmp_path / "model.safetensors")
    for tensor, matrix in matrices(tmp_path).items():
        weight = theirs.decompress(module_of(held, tensor), scheme)["weight"]
        assert torch.equal(matrix.dequantised(), weight.float())


@pytest.mark.parametrize("name", THEIRS)
def test_compressed_tensors_compresses_to_the_same_bytes_by_the_same_rule(tmp_path, name):
    """Of a matrix for which every block takes the scale of the rule."""
    theirs, scheme = compressor(name)
    from compressed_tensors.quantization.utils import calculate_qparams

    save_quantised(tmp_path, name, scale=torch.float32)
    held = load_file(tmp_path / "model.safetensors")
    tensor = "model.layers.1.mlp.down_proj.weight"
    matrix, own = matrices(tmp_path)[tensor], module_of(held, tensor)
    edited = matrix.dequantised() * 3 + torch.randn(matrix.shape)
    loaded = matrix.load()
    blocks = matrix.scheme.blocked(loaded.ordered(edited))
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scale, zero = calculate_qparams(low, high, scheme.weights)
    made = matrix.requantised(edited)
    assert torch.equal(made["scale"].reshape(scale.shape), scale)
    state = own | {"weight": edited, "weight_scale": scale.reshape(own["weight_scale"].shape)}
    state["weight_zero_point"] = zero
    expected = theirs.compress(state, scheme)
    roles = {"numbers": "weight_packed" if matrix.packed else "weight", "zero": "weight_zero_point"}
    for role in made.keys() - {"scale"}:
        assert torch.equal(made[role].view(torch.uint8), expected[roles[role]].view(torch.uint8)), role


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_loads_what_was_requantised_with_the_same_numbers(tmp_path, name):
    compressor(name)
    from kernel_surgery.checkpoint.baking import bake_checkpoint
    from kernel_surgery.models.load import load_model
    from kernel_surgery.subspace.artifact import Subspace
    from tests.support.models import basis

    save_quantised(tmp_path / "source", name)
    space = Subspace(bases={1: basis(D, 4)}, site="mlp_out")
    bake_checkpoint(tmp_path / "source", space, tmp_path / "baked", force=True, quantised="requantize")
    model = load_model(str(tmp_path / "baked"), torch.bfloat16)
    assert (mlp_outputs(model)[1].quantised is None) == (name != "int4-order")
    model(torch.arange(4)[None])  # columns in an order of their own: it dequantises now
    for tensor, matrix in matrices(tmp_path / "baked").items():
        assert torch.equal(model.get_parameter(tensor), matrix.dequantised().bfloat16())


def test_transformers_loads_an_fp8_checkpoint_with_the_same_numbers(tmp_path):
    from kernel_surgery.models.load import load_model

    save_quantised(tmp_path, "fp8-block", scale=torch.float32)
    model = load_model(str(tmp_path), torch.bfloat16)
    for tensor, matrix in matrices(tmp_path).items():
        assert torch.equal(model.get_parameter(tensor), matrix.dequantised().bfloat16())


def test_an_fp8_checkpoint_runs_in_float32_which_is_the_default_on_a_cpu(tmp_path):
    from kernel_surgery.models.load import load_model

    save_quantised(tmp_path, "fp8-block", scale=torch.bfloat16)
    ids = torch.arange(6)[None]
    model, narrow = load_model(str(tmp_path)), load_model(str(tmp_path), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} == {model.dtype}
    for tensor, matrix in matrices(tmp_path).items():
        assert torch.equal(model.get_parameter(tensor), matrix.dequantised())
    with torch.no_grad():
        made, near = model(input_ids=ids).logits, narrow(input_ids=ids).logits
    assert made.dtype == torch.float32 and float((made - near).norm() / made.norm()) < 0.05


def test_experts_that_lie_one_by_one_are_parts_of_their_layer(tmp_path):
    save_quantised(tmp_path, "fp8-block", "qwen3_moe")
    found = parts(layout_in(tmp_path), layouts(tmp_path), [0, 1])
    assert [part.name for part in found if part.layer == 0] == [
        f"model.layers.0.mlp.experts.down_proj[{i}]" for i in range(EXPERTS)
    ]
    for part in found:
        assert part.quantised is not None and part.read().shape[0] == D == part.entry.shape[0]
        assert part.tensors == {part.tensor, f"{part.tensor}_scale_inv"}


def test_mxfp4_experts_are_read_as_transformers_holds_them(tmp_path):
    experts = save_mxfp4(tmp_path)
    found = [part for part in parts(layout_in(tmp_path), layouts(tmp_path), [2]) if not part.form.bias]
    assert len(found) == EXPERTS
    for number, part in enumerate(found):
        assert part.name == f"model.layers.2.mlp.experts.down_proj[{number}]"
        assert torch.equal(part.read(), experts["model.layers.2.mlp.experts.down_proj"][number].T)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    theirs = convert_moe_packed_tensors(held[f"{name}_blocks"], held[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(theirs, experts[name])


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_packed_integers_come_back(bits):
    half = 2 ** (bits - 1)
    numbers = torch.randint(-half, half, (7, 37), dtype=torch.int8)
    assert torch.equal(unpack(pack(numbers, bits), bits, 37), numbers)


def test_the_spacing_of_numbers_is_that_of_their_dtype():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448, in order
    gaps = every.diff()
    assert torch.equal(FP8.spacing(every)[:-1], gaps)
    assert torch.equal(FP8.nearest(every), every) and float(FP8.nearest(torch.tensor(460.0))) == 448
    assert torch.equal(integers(4).nearest(torch.tensor([-9.0, 0.5, 1.5, 7.5])), torch.tensor([-8.0, 0.0, 2.0, 7.0]))


def test_blocks_that_do_not_divide_a_matrix_are_smaller_at_its_ends():
    from kernel_surgery.quantised.blocks import Scheme

    w, scheme = torch.randn(20, 37), Scheme(FP8, (8, 16), torch.float32)
    scale, _ = scheme.rule(w)
    assert scale.shape == (3, 3) and torch.equal(scale[2, 2], w[16:, 32:].abs().max() / 448)
    numbers = scheme.numbers_of(w, scale, None)
    error = (scheme.dequantise(numbers, scale, None) - w).abs()
    assert bool((error <= scheme.bound(numbers, scale) * (1 + 1e-6)).all()) and error.shape == w.shape


def test_scales_that_are_powers_of_two_clip_nothing_and_are_as_small_as_they_can_be():
    from kernel_surgery.quantised.blocks import Scheme

    w, scheme = torch.randn(32, 64) * 3, Scheme(FP8, (8, 16), torch.float32, power=True)
    scale, _ = scheme.rule(w)
    most = scheme.blocked(w).abs().amax((1, 3))
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert bool((most <= 448 * scale).all()) and bool((most > 224 * scale).all())
    assert float(scheme.slack(w).max()) == 0


def test_tensors_that_do_not_fit_together_are_named(tmp_path):
    save_quantised(tmp_path, "int4-group")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_packed has \d+ words of 8-bit numbers a row, but .*_shape says"):
        matrices(tmp_path)
    other = json.loads(json.dumps(config["quantization_config"]["config_groups"]["group_0"]))
    other["weights"]["num_bits"] = 4
    config["quantization_config"]["config_groups"]["group_1"] = other
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantises int weights in 2 ways"):
        matrices(tmp_path)


def test_every_tensor_of_a_matrix_is_counted_and_none_of_another(tmp_path):
    save_quantised(tmp_path, "int4-zero")
    place = located(tmp_path)
    for matrix, form in quantised_in(tmp_path, place).values():
        assert form in FORMATS and {"numbers", "scale", "zero"} == matrix.pieces.keys()
        assert all(read(piece).numel() for piece in matrix.pieces.values())
