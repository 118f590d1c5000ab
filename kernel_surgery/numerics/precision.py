"""In which precision the edit is computed, whatever the process's settings say."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A dtype that weights and activations are stored in.

    code: its name in a safetensors file. triton: its name in a kernel's signature. roundoff: u, half of finfo.eps.
    """

    dtype: torch.dtype
    code: str
    triton: str
    roundoff: float


# The one table of dtypes, by name.
STORED = {
    "float64": Stored(torch.float64, "F64", "fp64", 2.0**-53),
    "float32": Stored(torch.float32, "F32", "fp32", 2.0**-24),
    "float16": Stored(torch.float16, "F16", "fp16", 2.0**-11),
    "bfloat16": Stored(torch.bfloat16, "BF16", "bf16", 2.0**-8),
}


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_full(x: Tensor) -> AbstractContextManager:
    """A block in which products on x's device keep their operands' dtype: autocast would make float32's 16 bits."""
    device = x.device.type
    # Tensors without memory have no autocast, and asking raises. (is_autocast_available would say so of any device, but
    # dynamo of torch 2.11 cannot trace it.)
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


@torch.compiler.assume_constant_result  # dynamo cannot trace the question; it traces again when the setting changes
def _float32_is_whole(device: str) -> bool:
    """Whether a float32 product on a device has float32's bits: `torch.set_float32_matmul_precision` may say others."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device)
    return backend is None or backend.matmul.fp32_precision in ("none", "ieee")


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that the edit of x is computed in: float32, for float64 x float64. Float64 too where float32's products
    are made of fewer bits (TF32, bfloat16), which would break Rule A: the setting is the whole process's, and not ours
    to change."""
    return torch.promote_types(x.dtype, torch.float32 if _float32_is_whole(x.device.type) else torch.float64)


@contextmanager
def whole_products() -> Iterator[None]:
    """While the block lasts, matrix products of every dtype are summed in float32 and float32's keep their bits.

    Not so by default: cuBLAS may add the parts of a 16-bit product in 16 bits, and a process may have allowed TF32. The
    bounds of a product assume otherwise. The settings are the process's own: for a check, not beside other work.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    wanted = [(cuda, "fp32_precision", "ieee"), (cpu, "fp32_precision", "ieee")]
    wanted += [(cuda, f"allow_{kind}_reduced_precision_reduction", False) for kind in ("bf16", "fp16")]
    before = [getattr(where, name) for where, name, _ in wanted]
    try:
        for where, name, value in wanted:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(wanted, before, strict=True):
            setattr(where, name, value)
