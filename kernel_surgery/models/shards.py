"""Weights that are split over processes: transformers' tensor parallelism (`tp_plan="auto"` under torchrun).

There the weight W [d_model, d_ff] of `down_proj` is a `DTensor`. Each process holds some of its columns and multiplies
them with the same columns of the input. The partial outputs are then summed over the processes, and the bias is added
once, all within the module's forward. So a forward hook sees the whole output, after the reduction, and every process
sees the same bits. The input that it sees is only this process's part.

The functions here take plain tensors too, and return them as they are. Those that say "together" exchange data: every
process of the group must call them in the same order.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError

_PLAN = "rowwise"  # transformers' name of the split described above


def is_split(tensor: Tensor) -> bool:
    """Return whether a tensor is split over processes, or held by several that know of each other (a `DTensor`)."""
    module = sys.modules.get("torch.distributed.tensor")  # imported by whatever made a DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor. It shares the memory: writing to it writes to the tensor."""
    return _dtensor(tensor).to_local() if is_split(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered together. Every process then holds a copy of its own."""
    return _dtensor(tensor.detach()).full_tensor() if is_split(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole `tensor` that this process would hold, if it were split as `like` is. A copy if so."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split = _dtensor(like)
    return distribute_tensor(tensor.detach(), split.device_mesh, split.placements, src_data_rank=None).to_local()


def total(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes that `like` is split over, made together.

    Every process gets the same bits. The gradient of the sum is that of each part.
    """
    return _Sum.apply(tensor, _dtensor(like).device_mesh.get_group()) if is_split(like) else tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        made = part.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(made, group=group)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What follows the sum runs in every process alike, so each has the whole gradient already.
        return gradient, None


def refuse_unknown_split(name: str, module: nn.Module, weight: Tensor, plan: str | None) -> None:
    """Raise ModelError if a module is split over processes in another way than described above.

    name: its path. weight: its weight. plan: what transformers' plan for tensor parallelism says of it, if
    it says something.
    """
    hooked = bool(getattr(module, "_is_hooked", False))
    if not is_split(weight):
        if not hooked:
            return
        how = "its weight is hidden in a plain tensor (an older transformers does that)"
    else:
        mesh, placements = _dtensor(weight).device_mesh, _dtensor(weight).placements
        if not hooked or "forward" not in vars(module):
            how = "its weight is a DTensor, but transformers did not split it"
        elif plan == _PLAN and mesh.ndim == 1 and placements[0].is_shard(1):
            return
        else:
            how = f"its weight is a DTensor with {', '.join(map(str, placements))}, and its plan is {plan!r}"
    raise ModelError(
        f"{name} is split over processes in a way that is not known here: {how}. The model is unchanged.\n"
        'Split it with transformers\' tp_plan="auto", whose plan for it is "rowwise", or load it in one process.'
    )


def refuse_split(model: nn.Module, doing: str) -> None:
    """Raise ModelError if weights of a model are split over processes. doing: what cannot be done then."""
    if split := [name for name, weight in model.named_parameters() if is_split(weight)]:
        raise ModelError(
            f"cannot {doing}: {split[0]} is split over processes, as {len(split)} weights are. The model is unchanged. "
            "Load it in one process, or with device_map."
        )


def _dtensor(tensor: Tensor) -> Any:
    return tensor
