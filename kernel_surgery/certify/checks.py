"""The checks of a certificate: of one tensor on disk, of one layer's outputs, of the logits. float64, no files.

Each returns figures that are an error over its derived bound (`reference.py`), so that 1 is where it breaks.
"""

import itertools
import math

import torch
from torch import Tensor

from kernel_surgery.numerics.bounds import (
    applied_bound,
    baked_element_bound,
    leak_bound,
    rule_a_bound,
    rule_b_bounds,
    worst_ratio,
)
from kernel_surgery.numerics.oracle import bake_oracle, exact_output, leak, project_oracle
from kernel_surgery.numerics.rounding import ulp

LEAK_GATE = 1.1  # leak over floor, for a weight; `leak_gate` for anything smaller
COLUMNS = 1024  # of a weight, in float64, at a time: 16 MB at d_model 2048
ON_OUTPUTS = ("hook", "fused")  # the modes that edit what down_proj has already rounded: Rule A is theirs


def check_tensor(
    after: Tensor, before: Tensor | None, inside: Tensor, basis: Tensor, strength: float
) -> dict[str, float | None]:
    """One edited tensor: {"error_over_bound", "leak", "leak_floor", "leak_over_floor", "leak_gate", "finite"}.

    after, before [d_model, columns] as stored; without `before` (None) the first is None. inside: U^T W [k, columns];
    from `before` where there is one. The floor is what the exact edit of the original leaks once it is rounded, plus,
    for float32 arithmetic, |a| 2^-22 (sqrt(d) + 2 sqrt(k/d) norm(W) / norm(U^T W)); without the original, of the
    original as `inside` and a dithered `after` restore it. (A model of rounding as noise of ulp / sqrt(12),
    `reference.leak_floor`, falls far short of it where the edit changes elements by less than an ulp: small strengths,
    low ranks, wide models.) Everything infinite where something is not finite.
    """
    u, worst, kept, whole, size, columns = basis.double(), 0.0, 0.0, 0.0, 0.0, []
    generator, throws = torch.Generator().manual_seed(0), 1 if before is not None else max(1, 64 // after.shape[1])
    for start in range(0, after.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        new = after[:, part].double()
        if before is not None:
            old = before[:, part]
            held = u.T @ old.double()
        else:
            held = inside[:, part].double()
            # Dithered: restored as it is, it would round back to where it came from and show its own leak as the floor.
            # A bias has too few elements for one throw.
            wide = new.repeat(1, throws)
            dither = torch.rand(wide.shape, generator=generator, dtype=torch.float64).to(new.device) - 0.5
            spacing = ulp(after[:, part]).repeat(1, throws)
            old = (wide + dither * spacing + strength * (u @ held).repeat(1, throws)).to(after.dtype)
        exact = bake_oracle(old, basis, strength)
        if before is not None:
            worst = max(worst, worst_ratio((new - exact).abs(), baked_element_bound(old, basis, strength)))
        kept += float((u.T @ new - (1 - strength) * held).square().sum())
        whole += float(held.square().sum())
        size += float(old.double().square().sum()) / throws
        energy = (u.T @ (exact.to(after.dtype).double() - exact)).square().sum(0)
        columns.append(energy.reshape(throws, -1).mean(0))
    energies = torch.cat(columns)
    noise, fourth = float(energies.sum()), float(energies.square().sum())
    # A bias of zeros holds nothing of the subspace and leaks nothing.
    leak = math.sqrt(kept / whole) if whole else math.inf if kept else 0.0
    floor = 0.0
    if whole:
        spread = math.sqrt(basis.shape[1] / len(u) * size / whole)
        floor = math.sqrt(noise / whole) + abs(strength) * 2.0**-22 * (math.sqrt(len(u)) + 2 * spread)
    over = leak / floor if floor else math.inf if leak else 0.0
    return {
        "error_over_bound": None if before is None else worst,
        "leak": leak if math.isfinite(leak) else math.inf,
        "leak_floor": floor,
        "leak_over_floor": over if math.isfinite(over) else math.inf,
        "leak_gate": LEAK_GATE if before is not None or not fourth else leak_gate(basis.shape[1] * noise**2 / fourth),
        "finite": bool(torch.isfinite(after).all()),
    }


def leak_gate(samples: float) -> float:
    """How far the leak may lie above a floor that is not of the same roundings: 1.1, and more for few samples.

    leak^2 / floor^2 is a mean of k * columns squares of mean 1 and variance 2 (sums of many roundings), counted by
    their weight: seven of its standard deviations are 7 sqrt(2 / samples). For a weight that is nothing, for a bias it
    is most of the gate.
    """
    return max(LEAK_GATE, math.sqrt(1 + 7 * math.sqrt(2 / samples)))


def broken(row: dict) -> list[str]:
    """What a tensor breaks, in words; empty if nothing."""
    found = []
    if not row["finite"]:
        found.append("it holds NaN or Inf")
    if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1:
        found.append(f"an element is {row['error_over_bound']:.3g} times its bound away from what the edit gives")
    if not row["leak_over_floor"] <= row["leak_gate"]:
        found.append(f"it leaks {row['leak_over_floor']:.3g} times its floor (allowed: {row['leak_gate']:.3g})")
    return found


def check_outputs(
    outputs: dict[str, Tensor],
    rounded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    basis: Tensor,
    strength: float,
) -> tuple[dict[str, dict], list[dict]]:
    """What the modes made of the same h: (a row a mode, a row a pair of modes).

    outputs: {mode: [rows, d_model]}; rounded: the unedited output of `down_proj`, in the dtype; h [rows, d_ff]. A
    mode's row: "error_over_bound" against the exact edit (`applied_bound`); "rule_a" for those that edit the rounded
    output; "leak", norm(U^T (y - (1-a) x)) over norm(U^T x), root mean squares. A pair's: "error_over_bound", of hook
    or fused against baked by Rule B, its "row_over_bound", and in 16 bits, at a = 1, "of_expected": the median of
    norm(difference) over 0.88 u norm(x), which is what random roundings give.
    """
    exact = exact_output(weight, h, basis, strength, bias)
    d_ff, dtype, u = weight.shape[1], weight.dtype, basis.double()
    bounds = {mode: applied_bound(mode, exact, basis, d_ff, dtype, strength) for mode in outputs}
    inside = exact.x @ u
    modes = {}
    for mode, y in outputs.items():
        left = y.double() @ u - (1 - strength) * inside
        modes[mode] = {
            "error_over_bound": worst_ratio((y.double() - exact.y).abs(), bounds[mode]),
            "leak": float(left.square().mean().sqrt() / inside.square().mean().sqrt()),
        }
        if mode in ON_OUTPUTS:
            error = (y.double() - project_oracle(rounded, basis, strength)).abs()
            modes[mode]["rule_a"] = worst_ratio(error, rule_a_bound(rounded, basis, strength))
    pairs = []
    for one, other in itertools.combinations(outputs, 2):
        difference = outputs[one].double() - outputs[other].double()
        row = {"pair": [one, other]}
        if one in ON_OUTPUTS and other in ON_OUTPUTS:
            each = 2 * rule_a_bound(rounded, basis, strength)
        elif {one, other} - set(ON_OUTPUTS) == {"baked"}:
            each, whole = rule_b_bounds(weight, h, basis, strength, exact)
            row["row_over_bound"] = worst_ratio(difference.norm(dim=-1), whole)
            if strength == 1 and dtype != torch.float32:
                expected = 0.88 * torch.finfo(dtype).eps / 2 * exact.x.norm(dim=-1)
                row["of_expected"] = float((difference.norm(dim=-1) / expected).median())
        else:
            each = bounds[one] + bounds[other]
        pairs.append(row | {"error_over_bound": worst_ratio(difference.abs(), each)})
    return modes, pairs


def span_rows(basis: Tensor, dtype: torch.dtype, rows: int = 64, seed: int = 0) -> Tensor:
    """Rows inside span(U), in the dtype: [rows, d_model]. Random rows hide an edit that is too coarse there."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, basis.shape[1], generator=generator, dtype=torch.float64)
    return (z.to(basis.device) @ basis.double().T).to(dtype)


def check_span(y: Tensor, x: Tensor, basis: Tensor, strength: float) -> dict[str, float]:
    """An edit of rows inside span(U): Rule A there and, at strength 1, the leak rule."""
    error = (y.double() - project_oracle(x, basis, strength)).abs()
    found = {"span_rule_a": worst_ratio(error, rule_a_bound(x, basis, strength))}
    if strength == 1:
        found["span_leak"] = worst_ratio(leak(y, basis), leak_bound(y, x, basis))
    return found


class LogitComparison:
    """Two sets of logits, the oracle's and a mode's, compared block of vocabulary by block, every position at once.

    `add` is given [positions, words] of both; `figures` is asked at the end. Kullback-Leibler divergence is
    KL(oracle || mode) in nats.
    """

    def __init__(self, positions: int, device: torch.device | str):
        def full(value: float) -> Tensor:
            return torch.full((positions,), value, dtype=torch.float64, device=device)

        self.top, self.mass, self.moved = full(-math.inf), full(0), full(0)
        self.other_top, self.other_mass = full(-math.inf), full(0)
        self.squares, self.oracle_squares, self.oracle_sum, self.largest = full(0), full(0), full(0), full(0)
        self.best, self.other_best = (torch.zeros(positions, dtype=torch.long, device=device) for _ in range(2))
        self.words = 0

    def add(self, oracle: Tensor, mode: Tensor) -> None:
        p, q = oracle.double(), mode.double()
        gap = p - q
        self.squares += gap.square().sum(-1)
        self.oracle_squares += p.square().sum(-1)
        self.oracle_sum += p.sum(-1)
        self.largest = torch.maximum(self.largest, gap.abs().amax(-1))
        top, at = p.max(-1)
        self.best = torch.where(top > self.top, self.words + at, self.best)
        new = torch.maximum(self.top, top)
        scale, weight = (self.top - new).exp(), (p - new[:, None]).exp()
        self.mass = self.mass * scale + weight.sum(-1)
        self.moved = self.moved * scale + (weight * gap).sum(-1)
        self.top = new
        top, at = q.max(-1)
        self.other_best = torch.where(top > self.other_top, self.words + at, self.other_best)
        new = torch.maximum(self.other_top, top)
        self.other_mass = self.other_mass * (self.other_top - new).exp() + (q - new[:, None]).exp().sum(-1)
        self.other_top = new
        self.words += p.shape[-1]

    def figures(self) -> dict[str, float]:
        """{"rms", "relative" (to the spread of the oracle's logits), "max", "kl_mean", "kl_p99", "kl_max", "top1"}."""
        kl = self.moved / self.mass - (self.top + self.mass.log()) + (self.other_top + self.other_mass.log())
        kl = kl.clamp_min(0)  # it is not negative but for the rounding of float64
        rms = float((self.squares.mean() / self.words).sqrt())
        spread = self.oracle_squares / self.words - (self.oracle_sum / self.words).square()
        return {
            "rms": rms,
            "relative": rms / float(spread.mean().sqrt()),
            "max": float(self.largest.max()),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "kl_max": float(kl.max()),
            "top1": float((self.best == self.other_best).double().mean()),
        }

    def divergence(self, sequences: int, start: int) -> dict:
        """Where greedy text of the mode would first part from the oracle's, counted in new tokens.

        Positions are those of `sequences` of one length, each of the oracle's greedy text from position `start` on: up
        to where the two first choose differently, a mode's own greedy text is the same. {"diverged", "first"}.
        """
        same = (self.best == self.other_best).reshape(sequences, -1)[:, start:]
        firsts = [int(row.logical_not().nonzero()[0]) for row in same if not bool(row.all())]
        return {"diverged": len(firsts), "first": min(firsts, default=None)}
