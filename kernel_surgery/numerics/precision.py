"""The dtypes of the edit, and its precision, which the process's settings must not lower."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A dtype that weights and activations are stored in.

    code: its name in a safetensors file. triton: its name in a kernel's signature. roundoff: the unit roundoff u, half
    of finfo.eps.
    """

    dtype: torch.dtype
    code: str
    triton: str
    roundoff: float


# The only table of dtypes, by name.
STORED = {
    "float64": Stored(torch.float64, "F64", "fp64", 2.0**-53),
    "float32": Stored(torch.float32, "F32", "fp32", 2.0**-24),
    "float16": Stored(torch.float16, "F16", "fp16", 2.0**-11),
    "bfloat16": Stored(torch.bfloat16, "BF16", "bf16", 2.0**-8),
}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_full(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast on x's device. Autocast would compute float32 products in 16 bits."""
    device = x.device.type
    # The meta device has no autocast, and is_autocast_enabled raises for it. is_autocast_available would answer for any
    # device, but dynamo of torch 2.11 cannot trace it.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


@torch.compiler.assume_constant_result  # dynamo cannot trace this; it recompiles if the setting changes
def _float32_is_whole(device: str) -> bool:
    """Whether a device computes float32 products in float32. `torch.set_float32_matmul_precision` can lower that."""
    backend: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device)
    return backend is None or backend.matmul.fp32_precision in ("none", "ieee")


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which the edit of x is computed: float32, or float64 for float64 x.

    It is also float64 if the process lets float32 products use TF32 or bfloat16, which would break Rule A. That setting
    belongs to the process, so it is not changed here.
    """
    return torch.promote_types(x.dtype, torch.float32 if _float32_is_whole(x.device.type) else torch.float64)


@contextmanager
def whole_products() -> Iterator[None]:
    """Within the block, sum 16-bit matrix products in float32 and compute float32 products in full precision.

    The error bounds assume this, but it is not the default. cuBLAS may sum partial results of a 16-bit product in 16
    bits, and the process may have allowed TF32. The settings apply to the whole process, so use this in a check and not
    beside other work. They are restored at the end.
    """
    mkldnn: Any = torch.backends.mkldnn
    cuda, cpu = torch.backends.cuda.matmul, mkldnn.matmul
    wanted: list[tuple[Any, str, str | bool]] = [(cuda, "fp32_precision", "ieee"), (cpu, "fp32_precision", "ieee")]
    wanted += [(cuda, f"allow_{kind}_reduced_precision_reduction", False) for kind in ("bf16", "fp16")]
    before = [getattr(where, name) for where, name, _ in wanted]
    try:
        for where, name, value in wanted:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(wanted, before, strict=True):
            setattr(where, name, value)
