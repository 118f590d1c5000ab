"""The check of a mixture of experts: what the modes give for the same input of the block.

The output of one linear module is W h, and a bound of each mode follows from its numbers (`certify.checks`). A mixture
adds the outputs of several experts, each rounded, scaled by its routing weight and rounded again, and its h are inside
the experts' own code. So the yardstick is measured: the error that the unedited block itself makes in the dtype, on the
same input with the same routing. An edit in the weights makes the roundings of the block and one of each weight, about
as large as those of the products. Rule A bounds an edit of the rounded output as it does anywhere.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.checks import ON_OUTPUTS
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import BasisLike, Projection


def check_block(
    outputs: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    rounded: Tensor,
    exact: Tensor,
    basis: BasisLike,
    strength: float,
    allowed: float,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Check the outputs of a mixture of experts. Return one row per mode, and one per pair, as `check_outputs` does.

    outputs: {mode: [rows, d_model]}. before: {mode: the output that the edit got}, of the modes that edit it.
    rounded: the unedited output in the dtype. exact: the same in higher precision. basis, strength: of the edit.
    allowed: how many times the yardstick an error may be.

    An error is that of a token's row, over the norm of its unedited row: a few tokens have outputs that are a thousand
    times the others', and would hide them. The yardstick is the larger of two errors: rounded - exact, and that of the
    exact edit of `rounded` with one rounding.

    "error_over_bound" is an error over `allowed` yardsticks, for all rows together or for the worst row, whichever is
    larger. For a pair, it is their difference over the sum of both, or for two modes that edit the output, over twice
    the bound of Rule A and what lies between the outputs that they got.

    Numerics: float64.
    """
    edit = Projection.of(basis).double()
    target = project_oracle(exact, edit, strength)
    ideal = project_oracle(rounded, edit, strength).to(rounded.dtype)
    rows = exact.double().norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    own = [_sizes(rounded.double() - exact.double(), rows), _sizes(ideal.double() - target, rows)]
    limit = tuple(allowed * max(sizes) for sizes in zip(*own, strict=True))

    def over(error: Tensor, times: float = 1.0) -> float:
        found = zip(_sizes(error, rows), limit, strict=True)
        return max(0.0 if size == 0 else size / (times * most) if most else float("inf") for size, most in found)

    inside = edit.inside(exact.double())
    modes: dict[str, dict[str, Any]] = {}
    for mode, y in outputs.items():
        leaked = edit.inside(y.double()) - (1 - strength) * inside
        modes[mode] = {
            "error_over_bound": over(y.double() - target),
            "leak": float(leaked.square().mean().sqrt() / inside.square().mean().sqrt()),
        }
        if mode in ON_OUTPUTS:
            error = (y.double() - project_oracle(before[mode], edit, strength)).abs()
            modes[mode]["rule_a"] = worst_ratio(error, rule_a_bound(before[mode], edit, strength))
    pairs = []
    for one, other in itertools.combinations(outputs, 2):
        difference = outputs[one].double() - outputs[other].double()
        if one in ON_OUTPUTS and other in ON_OUTPUTS:
            bounds = [rule_a_bound(before[mode], edit, strength) for mode in (one, other)]
            apart = project_oracle(before[one], edit, strength) - project_oracle(before[other], edit, strength)
            ratio = worst_ratio(difference.abs(), bounds[0] + bounds[1] + apart.abs())
        else:
            ratio = over(difference, 2)
        pairs.append({"pair": [one, other], "error_over_bound": ratio})
    return modes, pairs


def _sizes(error: Tensor, rows: Tensor) -> tuple[float, float]:
    """Return the root mean square of the rows' norms over those in `rows`, and the largest. Infinite if not finite."""
    norms = (error.norm(dim=-1) / rows).nan_to_num(nan=float("inf"))
    return float(norms.square().mean().sqrt()), float(norms.max())
