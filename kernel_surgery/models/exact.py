"""Norms in float64. Those of transformers compute in float32 in every dtype, which a float64 model must not.

What a norm computes is found by running it once, not by its name: the mean may be subtracted or not, and the weight
may be w, 1 + w or nothing.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from kernel_surgery.numerics.oracle import rmsnorm_oracle

_GAINS: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w, lambda w: 1 + w)
_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_DEFAULT_EPSILON = 1e-5  # of norms that have no such attribute


def make_norms_exact(body: nn.Module) -> None:
    """Make every norm below a module compute in float64, and round once to the dtype of its input.

    The modules may be without memory. Norms of other forms, such as those with a gate, stay as they are, and so does
    `torch.nn.LayerNorm`, which computes in the dtype that it is given.
    """
    for module in body.modules():
        if "Norm" in type(module).__name__ and not isinstance(module, nn.LayerNorm):
            forward = exact_forward(module)
            if forward is not None:
                module.forward = forward


def exact_forward(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of a norm in float64, or None if its form is unknown.

    Numerics: (h - m) / sqrt(mean((h - m)^2) + eps) times the gain, with m = 0 or mean(h).
    """
    weight, eps = getattr(norm, "weight", None), _epsilon(norm)
    if getattr(norm, "bias", None) is not None:
        return None
    gains = _GAINS if isinstance(weight, Tensor) else (lambda w: torch.ones(()),)
    generator = torch.Generator().manual_seed(0)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else _shape(norm)
    # Small numbers, so that a wrong eps shows.
    x = 3e-3 * torch.randn(2, *shape, generator=generator) + 1e-3
    w = torch.randn(shape, generator=generator)
    own = _run(norm, weight, w, x)
    if own is None or own.shape != x.shape:
        return None
    for centered, gain in product((False, True), gains):
        if torch.allclose(own.double(), _normed(x, gain(w.double()), eps, centered), rtol=1e-4, atol=1e-6):
            return _forward(norm, gain, eps, centered)
    return None


def _shape(norm: nn.Module) -> tuple[int, ...]:
    shape: Any = getattr(norm, "normalized_shape", (16,))
    return tuple(shape)


def _epsilon(norm: nn.Module) -> float:
    return next((float(getattr(norm, name)) for name in _EPSILONS if hasattr(norm, name)), _DEFAULT_EPSILON)


def _run(norm: nn.Module, weight: Tensor | None, w: Tensor, x: Tensor) -> Tensor | None:
    """Run a norm on x with the weight w. None: it takes more than x."""
    if isinstance(weight, Tensor):
        norm.weight = nn.Parameter(w, requires_grad=False)
    try:
        with torch.no_grad():
            out = norm(x)
    except (TypeError, AttributeError):
        return None
    finally:
        if isinstance(weight, Tensor):
            norm.weight = weight
    return out if isinstance(out, Tensor) else None


def _normed(h: Tensor, gain: Tensor, eps: float, centered: bool) -> Tensor:
    wide = h.double()
    return rmsnorm_oracle(wide - wide.mean(-1, keepdim=True) if centered else wide, gain, eps)


def _forward(
    norm: nn.Module, gain: Callable[[Tensor], Tensor], eps: float, centered: bool
) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        weight = getattr(norm, "weight", None)
        scale = torch.ones((), device=hidden_states.device) if weight is None else gain(weight.double())
        return _normed(hidden_states, scale, eps, centered).to(hidden_states.dtype)

    return forward
