"""The edit as an exact low-rank adapter in a model in memory: W + B A with A = a U^T W, B = -U."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.plan import Edit, SubspaceLike, new_edit, output_hooks, plan_edit
from kernel_surgery.numerics.precision import computed_in, in_full

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank takes these; its default is 16


def padded_rank(k: int) -> int:
    """The smallest rank in RANKS that holds k. Raises ValueError beyond the largest."""
    for rank in RANKS:
        if k <= rank:
            return rank
    raise KernelSurgeryError(f"no engine takes an adapter of rank {k}: at most {RANKS[-1]}. Fit with a smaller --rank.")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of a low-rank addition to a weight: W + B A. a: A [k, d_ff]; b: B [d_model, k]; float32."""

    a: Tensor
    b: Tensor

    def stacked(self) -> Tensor:
        """[d_model + d_ff, k]: B above A^T, as one tensor that a module can hold as a buffer."""
        return torch.cat([self.b, self.a.T])

    @staticmethod
    def unstacked(stacked: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
        """(A^T [d_ff, k], B [d_model, k]) of what `stacked` made."""
        return stacked[d_model:], stacked[:d_model]


def lora_pair(weight: Tensor, basis: Tensor, strength: float = 1.0) -> LoraPair:
    """A = a U^T W and B = -U, so that (W + B A) h = W h - a U (U^T W h).

    weight [d_model, d_ff] of any floating dtype, basis [d_model, k]. Float32 arithmetic: `bounds.adapter_bound`.
    """
    wide = computed_in(weight)
    u = basis.to(weight.device, torch.float32)
    with in_full(weight):
        return LoraPair((strength * (u.T.to(wide) @ weight.detach().to(wide))).float(), -u)


def refuse_bias(name: str, bias: Tensor | None) -> None:
    """Raises ValueError for a bias that is not zero: an adapter adds B A h, which knows nothing of it."""
    if bias is not None and bool((bias != 0).any()):
        raise KernelSurgeryError(
            f"{name} has a bias, and an adapter cannot edit a bias: what it adds depends on the input alone. Nothing "
            "was changed. Use bake or --mode fused, which edit biases too."
        )


def add_pair(output: Tensor, stacked: Tensor, h: Tensor) -> Tensor:
    """What PEFT computes with a float32 adapter: output + B (A h), in float32, one rounding.

    output [..., d_model], h [..., d_ff]; stacked: of a `LoraPair`.
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
    """Inside the block, `down_proj` of every layer of `subspace` returns W h + B (A h), the adapter's arithmetic.

    The weights are untouched. layers, force: as in `hook.hooked`. Raises what `plan.plan_edit` raises, and
    KernelSurgeryError for a bias that is not zero, before anything is changed. The model is restored when the block
    ends, also by an exception.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    pairs = {}
    for layer, site in plan.sites.items():
        refuse_bias(site.name, site.module.bias)
        pairs[layer] = lora_pair(site.module.weight, plan.bases[layer], plan.strength).stacked()
    edit = new_edit("lora", plan, "torch/eager")

    def edited(output: Tensor, pair: Tensor, inputs: tuple) -> Tensor:
        return add_pair(output, pair, inputs[0])

    with output_hooks(plan, edit, edited, pairs):
        yield edit
