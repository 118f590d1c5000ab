"""Quantised checkpoints made offline, in each format, from picos: by the formats' own rules, written here anew."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.picos import pico_of

BLOCK = (8, 16)  # of FP8; config.json says it
GROUP = 16
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _weights(kind: str, bits: int, strategy: str, form: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it. Other formats than the packed one quantise inputs too."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False, **more}
    inputs = {"num_bits": bits, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    group["input_activations"] = None if form == "pack-quantized" else inputs
    return {
        **{"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"},
        **{"config_groups": {"group_0": group}, "ignore": ["lm_head"], "global_compression_ratio": None},
    }


_PACKED = "pack-quantized"
# {name: quantization_config}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
    "fp8-channel": _weights("float", 8, "channel", "float-quantized"),
    "fp8-grid": _weights("float", 8, "block", "float-quantized", block_structure=list(BLOCK)),
    "fp8-tensor": _weights("float", 8, "tensor", "float-quantized"),
    "int8-channel": _weights("int", 8, "channel", "int-quantized"),
    "int8-packed": _weights("int", 8, "channel", _PACKED),
    "int4-group": _weights("int", 4, "group", _PACKED, group_size=GROUP),
    "int4-zero": _weights("int", 4, "group", _PACKED, symmetric=False, group_size=GROUP),
    "int4-order": _weights("int", 4, "group", _PACKED, group_size=GROUP, actorder="group"),
}


def _block_of(name: str, shape: torch.Size) -> tuple[int, int]:
    rows, columns = shape
    how = name.partition("-")[2]
    return {"block": BLOCK, "grid": BLOCK, "tensor": (rows, columns)}.get(how) or (
        (1, columns) if how in ("channel", "packed") else (1, GROUP)
    )


def _words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack whole rows, number by number."""
    each, made = 32 // bits, torch.zeros(len(numbers), numbers.shape[1] * bits // 32, dtype=torch.int64)
    for column in range(numbers.shape[1]):
        made[:, column // each] |= (numbers[:, column].long() + 2 ** (bits - 1)) << (bits * (column % each))
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)


def quantised(name: str, weight: torch.Tensor, tensor: str, scale: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of one matrix in a format of `CONFIGS`. tensor: its name. scale: the dtype of its scales."""
    (rows, columns), (tall, wide) = weight.shape, _block_of(name, weight.shape)
    order = torch.randperm(columns) if name.endswith("order") else torch.arange(columns)
    blocks = weight[:, order].float().reshape(rows // tall, tall, columns // wide, wide)
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    floats, bits = name.startswith("fp8"), 4 if name.startswith("int4") else 8
    zero = None
    if name.endswith("zero"):
        s = ((high - low) / 15).to(scale)
        zero = (-8 - low / s.float()).round().clamp(-8, 7)
    else:
        s = (torch.maximum(high, -low) / (448.0 if floats else (2**bits - 1) / 2)).to(scale)
    ratio = blocks / s.float()[:, None, :, None] + (0 if zero is None else zero[:, None, :, None])
    back = torch.argsort(order)
    if floats:
        codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).reshape(rows, columns)
    else:
        codes = ratio.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
        codes = codes.reshape(rows, columns)[:, back]
    if name == "fp8-block":
        return {tensor: codes, f"{tensor}_scale_inv": s}
    if name == "fp8-tensor":
        inputs = tensor.replace("weight", "input_scale")  # of activations: it has no meaning without the rest
        return {tensor: codes, f"{tensor}_scale": s.reshape(1), inputs: torch.ones(1, dtype=scale)}
    if floats or name == "int8-channel":
        return {tensor: codes, f"{tensor}_scale": s}
    made = {
        f"{tensor}_packed": _words(codes, bits),
        f"{tensor}_scale": s,
        f"{tensor}_shape": torch.tensor([rows, columns]),
    }
    if zero is not None:
        made[f"{tensor}_zero_point"] = _words(zero.T.contiguous(), bits).T.contiguous()
    if name.endswith("order"):
        place = torch.empty(columns, dtype=torch.int32)
        place[order] = torch.arange(columns, dtype=torch.int32) // wide
        made[f"{tensor}_g_idx"] = place
    return made


def save_quantised(
    folder: Path, name: str, kind: str = "llama", *, scale: torch.dtype = torch.bfloat16, shards: int = 1, **config: Any
) -> dict[str, torch.Tensor]:
    """Write a pico checkpoint in a format. Return its linear weights as they were before. config: of the pico."""
    pico_of(kind, dtype=torch.bfloat16, **config).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    made, before = {}, {}
    for tensor, weight in plain.items():
        if ".layers." in tensor and tensor.endswith("proj.weight") and weight.ndim == 2:
            before[tensor] = weight
            made |= quantised(name, weight, tensor, scale)
        else:
            made[tensor] = weight
    _write(folder, made, shards)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": CONFIGS[name]}))
    return before


def save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Write a pico gpt-oss with MXFP4 experts. Return their matrices as transformers holds them: [E, ff, d]."""
    pico_of("gpt_oss", dtype=torch.bfloat16, intermediate_size=32, hidden_size=64, head_dim=16).save_pretrained(folder)
    made, experts = load_file(folder / "model.safetensors"), {}
    for tensor in [name for name in made if name.endswith("_proj") and "experts" in name]:
        matrix = made.pop(tensor).float().transpose(1, 2).contiguous()  # [E, rows, columns]
        blocks = matrix.reshape(*matrix.shape[:2], -1, 32)
        exponent = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
        nearest = (blocks.abs()[..., None] / 2 ** exponent[..., None] - _E2M1).abs().argmin(-1)
        codes = (nearest + 8 * (blocks < 0)).to(torch.uint8)
        made[f"{tensor}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        made[f"{tensor}_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
        values = _E2M1[nearest] * torch.where(blocks < 0, -1.0, 1.0) * 2**exponent
        experts[tensor] = values.reshape(matrix.shape).transpose(1, 2)
    _write(folder, made, 1)
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(about))
    return experts


def _write(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write tensors to one file, or round robin to several, so that a matrix and its scales are apart."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
