"""The formats of quantised checkpoints: which tensors make one matrix, and by which rule it is quantised.

A format is recognised from config.json's quantization_config and from the tensors' names and dtypes, so no model needs
code of its own. A format that is not in the table is refused by name, with what can be done instead.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.files.tensorfile import QUANTISED, Entry
from kernel_surgery.quantised.blocks import Scheme
from kernel_surgery.quantised.matrix import Matrix, Place, read
from kernel_surgery.quantised.numbers import FP8, Numbers, integers


@dataclass(frozen=True)
class Format:
    """One way in which the tensors of a matrix are named. The suffixes follow the matrix's own name.

    method: quant_method of quantization_config. numbers, scale: suffixes of the tensors that every matrix has. dtypes:
    that the numbers may have. swapped: once unpacked, transformers holds the matrix as [columns, rows].
    """

    words: str
    method: str
    numbers: str
    scale: str
    dtypes: tuple[str, ...]
    swapped: bool = False
    refusal: str | None = None

    def stacks(self, numbers: Entry) -> bool:
        """Return whether the numbers of a matrix are those of several experts, along the first axis."""
        return len(numbers.shape) - (self.method == "mxfp4") > 2


FORMATS = (
    Format("FP8", "fp8", "", "_scale_inv", ("F8_E4M3",)),
    Format("compressed-tensors", "compressed-tensors", "", "_scale", ("F8_E4M3", "I8")),
    Format("compressed-tensors, packed", "compressed-tensors", "_packed", "_scale", ("I32",)),
    Format(
        *("MXFP4", "mxfp4", "_blocks", "_scales", ("U8",), True),
        refusal="its 4-bit floats share a power of two, which is not written here",
    ),
)
# compressed-tensors' names of its formats that are read here. Another, such as of 4-bit floats, is not.
PACKINGS = ("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
METHODS = tuple(dict.fromkeys(form.method for form in FORMATS))
# What else may belong to a quantised matrix, and has no meaning without it.
_ZERO, _ORDER, _SHAPE = "_zero_point", "_g_idx", "_shape"
_MORE = (_ZERO, _ORDER, _SHAPE)
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
_SCALES = ("BF16", "F16", "F32", "F8_E8M0", "U8")


def quantisation(folder: Path) -> dict[str, Any]:
    """Return quantization_config of a checkpoint's config.json, of the language model inside it too. Empty: none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        inner = config.get("text_config") or {}
        return dict(config.get("quantization_config") or inner.get("quantization_config") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # `read_config` reports it


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the method of a quantization_config, or None for an empty one."""
    return str(config.get("quant_method", "an unnamed method")) if config else None


def unreadable(folder: Path) -> str | None:
    """Return the method of a checkpoint whose quantised matrices cannot be read here, or None."""
    config = quantisation(folder)
    method, packing = method_of(config), config.get("format")
    if method == "compressed-tensors" and packing is not None and packing not in PACKINGS:
        return f"{method} {packing}"
    return None if method is None or method in METHODS else method


def quantised_in(folder: Path, places: Mapping[str, Place]) -> dict[str, tuple[Matrix, Format]]:
    """Return {name: (matrix, format)} of the quantised matrices of a checkpoint. Stacked experts are one matrix.

    places: {tensor name: (file, entry)}. Raises CheckpointError for tensors that do not fit together.
    """
    config, found = quantisation(folder), {}
    for form in FORMATS if config else ():
        if form.method != method_of(config):
            continue
        for tensor, (_, entry) in places.items():
            name = tensor.removesuffix(form.numbers)
            if not tensor.endswith(form.numbers) or entry.dtype not in form.dtypes or len(entry.shape) < 2:
                continue
            if f"{name}{form.scale}" in places:
                found[name] = _matrix(name, form, config, places), form
    return found


def belonging(name: str, matrix: Matrix, form: Format, places: Mapping[str, Place]) -> set[str]:
    """Return the names of all tensors that belong to a quantised matrix, and have no meaning without it."""
    module = name.removesuffix("weight")
    own = {f"{name}{suffix}" for suffix in (form.numbers, form.scale, *_MORE)}
    return (own | {f"{module}{more}" for more in _ACTIVATIONS if module != name}) & places.keys()


def _matrix(name: str, form: Format, config: Mapping[str, Any], places: Mapping[str, Place]) -> Matrix:
    pieces = {"numbers": places[f"{name}{form.numbers}"], "scale": places[f"{name}{form.scale}"]}
    pieces |= {
        role: places[f"{name}{suffix}"]
        for role, suffix in (("zero", _ZERO), ("order", _ORDER))
        if f"{name}{suffix}" in places
    }
    numbers, scale = pieces["numbers"][1], pieces["scale"][1]
    if scale.dtype not in _SCALES or f"{name}_global_scale" in places:
        raise CheckpointError(f"{scale.name} is stored as {scale.dtype}, which is not known in {form.words}.")
    weights = _weights(config, form, numbers)
    kind = integers(int(weights.get("num_bits", 8))) if numbers.dtype in ("I8", "I32") else FP8
    shape = _shape(name, form, numbers, kind, places)
    block = _block(weights, shape, scale, stacked=form.stacks(numbers))
    power = str(config.get("scale_fmt", "")) == "ue8m0" or scale.dtype in ("F8_E8M0", "U8")
    symmetric = bool(weights.get("symmetric", True))
    if not symmetric and "zero" not in pieces:
        raise CheckpointError(f"{name} has no zero points, but config.json says that it is not symmetric.")
    dtype = QUANTISED[scale.dtype]
    words = f"{form.words} {_described(kind, numbers)}, blocks of {block[0]} x {block[1]}"
    return Matrix(name, words, shape, Scheme(kind, block, dtype, power, symmetric), pieces, form.refusal)


def _weights(config: Mapping[str, Any], form: Format, numbers: Entry) -> dict[str, Any]:
    """Return what the configuration says about the weights that are stored as `numbers`."""
    if form.method != "compressed-tensors":
        return {"block_structure": config.get("weight_block_size")}
    kind = "float" if numbers.dtype == "F8_E4M3" else "int"
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    own = [weights for weights in groups if weights.get("type", "int") == kind]
    if not own or any(weights != own[0] for weights in own):
        # Several groups may quantise in one way, and differ in which modules they name.
        same = {(w.get("num_bits", 8), w.get("symmetric", True), str(w.get("block_structure"))) for w in own}
        if len(same) != 1:
            raise CheckpointError(
                f"config.json quantises {kind} weights in {len(same)} ways, and which one {numbers.name} has is not "
                "known here. Use the unquantised checkpoint, or eval --mode fused."
            )
    return dict(own[0])


def _shape(name: str, form: Format, numbers: Entry, kind: Numbers, places: Mapping[str, Place]) -> tuple[int, int]:
    """Return the rows and columns of a matrix, or of each of stacked ones."""
    if form.method == "mxfp4":
        rows, groups, size = numbers.shape[-3:]
        return rows, groups * size * 2
    rows, columns = numbers.shape[-2:]
    if form.numbers != "_packed":
        return rows, columns
    each = 32 // kind.bits
    if f"{name}{_SHAPE}" in places:
        columns_given = int(read(places[f"{name}{_SHAPE}"]).reshape(-1)[-1])
        if -(-columns_given // each) != columns:
            raise CheckpointError(
                f"{numbers.name} has {columns} words of {kind.bits}-bit numbers a row, but {name}{_SHAPE} says "
                f"{columns_given} columns."
            )
        return rows, columns_given
    return rows, columns * each


def _block(weights: Mapping[str, Any], shape: tuple[int, int], scale: Entry, stacked: bool) -> tuple[int, int]:
    """Return the rows and columns that share a scale. Raises CheckpointError if the scales do not fit the shape."""
    grid = scale.shape[1:] if stacked else scale.shape
    grid = (1, 1) if math.prod(grid) == 1 else (*grid, 1) if len(grid) == 1 else grid
    given = weights.get("block_structure")
    if isinstance(given, str):
        given = [int(size) for size in given.split("x")]
    if len(grid) == 2 and given and tuple(-(-n // int(size)) for n, size in zip(shape, given, strict=True)) == grid:
        return int(given[0]), int(given[1])
    if len(grid) != 2 or any(n % blocks for n, blocks in zip(shape, grid, strict=True)):
        raise CheckpointError(f"{scale.name} has shape {scale.shape}, which does not divide a matrix {shape}.")
    return shape[0] // grid[0], shape[1] // grid[1]


def _described(kind: Numbers, numbers: Entry) -> str:
    return f"int{kind.bits}" if kind.bits else "4-bit floats" if numbers.dtype == "U8" else "float8_e4m3"
