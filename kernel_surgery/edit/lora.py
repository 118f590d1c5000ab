"""The edit as an exact low-rank adapter in a model in memory: W + B A with A = a U^T W and B = -U.

The form is LoRA's (Hu et al. 2021, arXiv:2106.09685), but nothing is trained.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.plan import Edit, SubspaceLike, new_edit, output_hooks, plan_edit
from kernel_surgery.numerics.precision import computed_in, in_full

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes; its default is 16


def padded_rank(k: int) -> int:
    """Return the smallest rank in RANKS that is at least k.

    Raises KernelSurgeryError if k is larger than all of them.
    """
    for rank in RANKS:
        if k <= rank:
            return rank
    raise KernelSurgeryError(f"no engine takes an adapter of rank {k}: at most {RANKS[-1]}. Fit with a smaller --rank.")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of W + B A, in float32: a is A [k, d_ff], b is B [d_model, k]."""

    a: Tensor
    b: Tensor

    def stacked(self) -> Tensor:
        """Return B above A^T, [d_model + d_ff, k]: one tensor, so that a module can hold it as a buffer."""
        return torch.cat([self.b, self.a.T])

    @staticmethod
    def unstacked(stacked: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
        """Split the result of `stacked` into A^T [d_ff, k] and B [d_model, k]."""
        return stacked[d_model:], stacked[:d_model]


def lora_pair(weight: Tensor, basis: Tensor, strength: float = 1.0) -> LoraPair:
    """Return A = a U^T W and B = -U, so that (W + B A) h = W h - a U (U^T W h).

    weight: W [d_model, d_ff], any floating dtype. basis: U [d_model, k]. strength: a.

    Numerics: float32 arithmetic (`numerics.precision.computed_in`). The error bound of A is
    `numerics.bounds.adapter_bound`.
    """
    wide = computed_in(weight)
    u = basis.to(weight.device, torch.float32)
    with in_full(weight):
        return LoraPair((strength * (u.T.to(wide) @ weight.detach().to(wide))).float(), -u)


def refuse_bias(name: str, bias: Tensor | None) -> None:
    """Refuse a bias that is not zero.

    An adapter adds B A h, which depends on the input alone, so it cannot edit a bias. Raises KernelSurgeryError.
    """
    if bias is not None and bool((bias != 0).any()):
        raise KernelSurgeryError(
            f"{name} has a bias, which an adapter cannot edit. Use bake or --mode fused, which edit biases too."
        )


def add_pair(output: Tensor, stacked: Tensor, h: Tensor) -> Tensor:
    """Return output + B (A h), computed in float32 and rounded once, as PEFT does with a float32 adapter.

    output: [..., d_model]. h: [..., d_ff]. stacked: from `LoraPair.stacked`. The result has output's shape and dtype.
    """
    wide = computed_in(output)
    a_transposed, b = (t.to(wide) for t in LoraPair.unstacked(stacked, output.shape[-1]))
    with in_full(output):
        return (output.to(wide) + (h.to(wide) @ a_transposed) @ b.T).to(output.dtype)


@contextmanager
def adapted(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """Make `down_proj` return W h + B (A h) while the block runs, in every layer of `subspace`.

    This is the arithmetic of the LoRA adapter that `checkpoint.adapter` writes. The weights are not changed.

    model, subspace, strength, layers, force: as in `edit.hook.hooked`. When the block ends, normally or by an
    exception, the model is restored. Yields the record of the edit.

    Numerics: as in `lora_pair` and `add_pair`.

    Raises what `edit.plan.plan_edit` raises, and KernelSurgeryError for a bias that is not zero. Both come before
    anything is changed.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    pairs = {}
    for layer, site in plan.sites.items():
        refuse_bias(site.name, site.module.bias)
        pairs[layer] = lora_pair(site.module.weight, plan.bases[layer], plan.number).stacked()
    edit = new_edit("lora", plan, "torch/eager")

    def edited(output: Tensor, pair: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return add_pair(output, pair, inputs[0])

    with output_hooks(plan, edit, edited, pairs):
        yield edit
