"""The hidden states in what an MLP block returns."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def states_of(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Return a block's hidden states, with the dimensions of its first input: a view.

    A mixture of experts may return a tuple, of which they are the first element, and tokens in one dimension.
    """
    states: Tensor = output[0] if isinstance(output, tuple) else output
    if inputs and inputs[0].ndim != states.ndim:
        return states.view(*inputs[0].shape[:-1], states.shape[-1])
    return states


def on_states(hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]) -> Callable[..., Any]:
    """Return a forward hook that gives `hook` the hidden states alone (`states_of`).

    What it returns, if anything, replaces them in the output, in the form that they have there.
    """

    def outer(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        made = hook(module, inputs, states_of(inputs, output))
        if made is None:
            return None
        shape = (output[0] if isinstance(output, tuple) else output).shape
        made = made.view(shape) if made.shape != shape else made
        return (made, *output[1:]) if isinstance(output, tuple) else made

    return outer
