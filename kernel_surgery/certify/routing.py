"""The routing of a mixture of experts in a certificate: every stream takes the oracle's.

A router chooses experts by the largest of some scores. Where two scores are close, rounding decides, and another expert
gives another output: no bound covers that, and it is not a fault of the edit. So the oracle's decisions and weights are
kept, and given to every stream in its own dtype. Where a stream would have decided otherwise is counted.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.architectures import MlpSite


def router_of(site: MlpSite) -> nn.Module | None:
    """Return the module that decides which experts a token passes, or None for a block that is no mixture.

    It is the part of the block that has a matrix [experts, d_model]. Raises ModelError if there is not exactly one.
    """
    experts = next((len(weight.tensor) for weight in site.weights if weight.form.stacked), None)
    if experts is None:
        return None
    shape, owners = (experts, site.d_model), [weight.owner for weight in site.weights]
    others = [part for part in site.module.children() if part not in owners]
    found = [part for part in others if any(tuple(p.shape) == shape for p in part.parameters())]
    if len(found) != 1:
        raise ModelError(
            f"cannot find the router of {site.name}: {len(found)} of its parts have a matrix {list(shape)}, expected "
            "one. Nothing was certified."
        )
    return found[0]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _chosen(output: Any) -> Tensor:
    """Return which experts a router's output chooses: numbers in order, or the scores that are not zero."""
    tensors = _tensors(output)
    numbers = next((t for t in tensors if not t.is_floating_point()), None)
    return tensors[0] != 0 if numbers is None else numbers.sort(-1).values


def differing(one: Any, other: Any) -> int:
    """Return for how many tokens two routers' outputs choose other experts."""
    a, b = _chosen(one), _chosen(other)
    return int((a != b.to(a.device)).any(-1).sum())


@contextmanager
def routing_seen(router: nn.Module | None) -> Iterator[list[Any]]:
    """Record what the router returns while the block runs."""
    seen: list[Any] = []
    if router is None:
        yield seen
        return
    handle = router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def routing_given(router: nn.Module | None, given: Any) -> Iterator[list[int]]:
    """Make the router return `given`, in the dtypes of its own output, while the block runs. None changes nothing.

    Yields a list, to which each call adds the number of tokens for which it would have decided otherwise.
    """
    flips: list[int] = []
    if router is None or given is None:
        yield flips
        return

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Any:
        flips.append(differing(output, given))
        made = tuple(new.to(own.device, own.dtype) for new, own in zip(_tensors(given), _tensors(output), strict=True))
        return made if isinstance(output, tuple) else made[0]

    handle = router.register_forward_hook(replaced)
    try:
        yield flips
    finally:
        handle.remove()


class Replay:
    """Give a whole model the routing of a text, layer by layer, as the text is fed to it.

    kept: {layer: what the router returned for [sequences, tokens], in one dimension}.
    """

    def __init__(self, sites: Mapping[int, MlpSite], kept: Mapping[int, Any], sequences: int):
        self.routers = {layer: router_of(sites[layer]) for layer in kept}
        self.kept, self.sequences = kept, sequences

    def step(self, stack: ExitStack, start: int, stop: int) -> list[list[int]]:
        """Give the routing of tokens start .. stop - 1 until the stack ends. Return the counts of `routing_given`."""

        def part(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (self.sequences, -1))[:, start:stop].flatten(0, 1)

        return [
            stack.enter_context(routing_given(self.routers[layer], tuple(map(part, _tensors(output)))))
            for layer, output in self.kept.items()
        ]


def on_cpu(output: Any) -> tuple[Tensor, ...]:
    """Return a router's output in the CPU's memory."""
    return tuple(t.detach().to(torch.device("cpu")) for t in _tensors(output))
