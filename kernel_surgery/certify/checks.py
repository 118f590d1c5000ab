"""The checks of a certificate: one tensor on disk, the outputs of one layer, the logits.

Everything here is computed in float64 and reads no files. Most figures are an error divided by its derived bound
(`numerics.bounds`), so a check fails above 1.

Two bounds have names in the certificate. Rule A bounds an edit of an output that is already rounded (`rule_a_bound`).
Rule B bounds the difference between editing the outputs and editing the weights (`rule_b_bounds`).
"""

import itertools
import math
from typing import Any

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
from kernel_surgery.numerics.oracle import exact_output, leak, project_oracle
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.numerics.rounding import ulp

LEAK_GATE = 1.1  # limit of leak / floor for a weight; `leak_gate` gives the limit for smaller tensors
COLUMNS = 1024  # of a weight that are in float64 at a time: 16 MB at d_model 2048
ON_OUTPUTS = ("hook", "fused")  # the modes that edit the rounded output: Rule A applies to them


def check_tensor(
    after: Tensor, before: Tensor | None, inside: Tensor | None, basis: BasisLike, strength: float
) -> dict[str, float | None]:
    """Check one edited tensor on disk.

    after, before: the edited and the original tensor, [d_model, columns], as stored; `before` is float32 if it was
    quantised. It may be None.
    inside: B^T W [k, columns], used only without `before`.
    basis: of the layer. Its offset counts, so for a weight pass `Projection.linear`. strength: a.

    Returns these figures. Error and leak are infinite if the tensor is not finite:
        "error_over_bound": the largest error of an element over `baked_element_bound`; None without `before`.
        "leak": norm(z' - (1 - a) z) / norm(z), z = B^T W (for a bias, B^T b - c): how much is left that should be gone.
        "leak_floor": the leak that correct rounding causes by itself.
        "leak_over_floor": their ratio.
        "leak_gate": the limit of that ratio.
        "finite": whether every element is finite.

    The floor is the leak of the exact edit after rounding. For float32 arithmetic, |a| 2^-22 (sqrt(d) + 2 s) is added,
    s = norm(B) / sqrt(d) norm(W) / norm(z). Without the original, W is restored from `inside` and a dithered `after`. A
    model of rounding as noise of ulp / sqrt(12) (`numerics.bounds.leak_floor`) would be much too low if the edit
    changes elements by less than an ulp. That happens at small strengths, at low ranks and in wide models.

    Numerics: float64, COLUMNS columns at a time.
    """
    edit, worst, kept_energy, inside_energy, weight_energy = Projection.of(basis).double(), 0.0, 0.0, 0.0, 0.0
    column_energies: list[Tensor] = []
    d, k = edit.basis.shape

    def inside_of(columns: Tensor) -> Tensor:
        return edit.inside(columns.T).T

    generator, draws = torch.Generator().manual_seed(0), 1 if before is not None else max(1, 64 // after.shape[1])
    for start in range(0, after.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        new = after[:, block].double()
        if before is not None:
            old = before[:, block]
            z = inside_of(old.double())
        else:
            assert inside is not None  # one of the two is given
            z = inside[:, block].double()
            # Without dither, the restored W would round back to `after`, and the floor would be the leak itself.
            # A bias has too few elements for one random draw, so it is dithered several times.
            repeated = new.repeat(1, draws)
            dither = torch.rand(repeated.shape, generator=generator, dtype=torch.float64).to(new.device) - 0.5
            spacing = ulp(after[:, block]).repeat(1, draws)
            old = (repeated + dither * spacing + strength * (edit.basis @ z).repeat(1, draws)).to(after.dtype)
        exact = project_oracle(old.T, edit, strength).T
        if before is not None:
            # Only a bias has an offset.
            bound = baked_element_bound(old if edit.offset is None else old[:, 0], edit, strength, after.dtype)
            worst = max(worst, worst_ratio((new - exact).abs(), bound.reshape(new.shape)))
        kept_energy += float((inside_of(new) - (1 - strength) * z).square().sum())
        inside_energy += float(z.square().sum())
        weight_energy += float(old.double().square().sum()) / draws
        energy = (edit.reads.T @ (exact.to(after.dtype).double() - exact)).square().sum(0)
        column_energies.append(energy.reshape(draws, -1).mean(0))
    energies = torch.cat(column_energies)
    noise, fourth = float(energies.sum()), float(energies.square().sum())
    # A bias of zeros has no component in the subspace, so it cannot leak.
    leak = math.sqrt(kept_energy / inside_energy) if inside_energy else math.inf if kept_energy else 0.0
    floor = 0.0
    if inside_energy:
        spread = float(edit.reads.norm()) * math.sqrt(weight_energy / inside_energy / d)
        floor = math.sqrt(noise / inside_energy) + abs(strength) * 2.0**-22 * (math.sqrt(d) + 2 * spread)
    leak_over_floor = leak / floor if floor else math.inf if leak else 0.0
    return {
        "error_over_bound": None if before is None else worst,
        "leak": leak if math.isfinite(leak) else math.inf,
        "leak_floor": floor,
        "leak_over_floor": leak_over_floor if math.isfinite(leak_over_floor) else math.inf,
        "leak_gate": LEAK_GATE if before is not None or not fourth else leak_gate(k * noise**2 / fourth),
        "finite": bool(torch.isfinite(after).all()),
    }


def leak_gate(samples: float) -> float:
    """Return how far the leak may exceed a floor that was estimated from other roundings.

    samples: the effective number of elements behind the estimate, k * columns counted by their weight.

    leak^2 / floor^2 is a mean of squares with mean 1 and variance 2, because each is a sum of many roundings. Seven
    standard deviations of that mean are 7 sqrt(2 / samples). The limit is 1.1 or that, whichever is larger. For a
    weight the second is negligible; for a bias it dominates.
    """
    return max(LEAK_GATE, math.sqrt(1 + 7 * math.sqrt(2 / samples)))


def broken(row: dict[str, Any]) -> list[str]:
    """Return the limits that a tensor's figures exceed, in words. The list is empty if all hold."""
    faults = []
    if not row["finite"]:
        faults.append("it holds NaN or Inf")
    if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1:
        faults.append(f"an element differs from the exact edit by {row['error_over_bound']:.3g} times its bound")
    if not row["leak_over_floor"] <= row["leak_gate"]:
        faults.append(f"its leak is {row['leak_over_floor']:.3g} times the floor (allowed: {row['leak_gate']:.3g})")
    return faults


def check_outputs(
    outputs: dict[str, Tensor],
    rounded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    basis: BasisLike,
    strength: float,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Check the outputs that the modes give for the same input h. Return one row per mode, and one per pair of modes.

    outputs: {mode: [rows, d_model]}.
    rounded: the unedited output of the module, in the dtype.
    weight [d_model, d_ff], bias [d_model] or None, h [rows, d_ff], basis of the layer, strength a.

    The row of a mode, {mode: figures}:
        "error_over_bound": against the exact edit (`applied_bound`).
        "leak": norm(z' - (1-a) z) / norm(z), z = B^T x - c, with root mean squares over the rows.
        "rule_a": error over `rule_a_bound`, for the modes that edit the rounded output.
    The row of a pair:
        "pair": the two modes.
        "error_over_bound": their difference over its bound. For hook or fused against baked it is Rule B
        (`rule_b_bounds`).
        "row_over_bound": Rule B for whole rows.
        "of_expected": the median of norm(difference) / (0.88 u norm(x)), for 16-bit dtypes at a = 1. Random roundings
        give about 1.

    Numerics: float64 from the stored inputs.
    """
    exact = exact_output(weight, h, basis, strength, bias)
    d_ff, dtype, edit = weight.shape[1], weight.dtype, Projection.of(basis).double()
    bounds = {mode: applied_bound(mode, exact, basis, d_ff, dtype, strength) for mode in outputs}
    inside = edit.inside(exact.x)
    modes: dict[str, dict[str, Any]] = {}
    for mode, y in outputs.items():
        leaked = edit.inside(y.double()) - (1 - strength) * inside
        modes[mode] = {
            "error_over_bound": worst_ratio((y.double() - exact.y).abs(), bounds[mode]),
            "leak": float(leaked.square().mean().sqrt() / inside.square().mean().sqrt()),
        }
        if mode in ON_OUTPUTS:
            error = (y.double() - project_oracle(rounded, basis, strength)).abs()
            modes[mode]["rule_a"] = worst_ratio(error, rule_a_bound(rounded, basis, strength))
    pairs = []
    for one, other in itertools.combinations(outputs, 2):
        difference = outputs[one].double() - outputs[other].double()
        row: dict[str, Any] = {"pair": [one, other]}
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


def span_rows(basis: BasisLike, dtype: torch.dtype, rows: int = 64, seed: int = 0) -> Tensor:
    """Return random rows inside span(A), in the dtype: [rows, d_model].

    Ordinary random rows would hide an edit that is too coarse inside the subspace.
    """
    generator = torch.Generator().manual_seed(seed)
    written = Projection.of(basis).basis.double()
    z = torch.randn(rows, written.shape[1], generator=generator, dtype=torch.float64)
    return (z.to(written.device) @ written.T).to(dtype)


def check_span(y: Tensor, x: Tensor, basis: BasisLike, strength: float) -> dict[str, float]:
    """Check an edit of rows inside span(A).

    y: the edited rows [rows, d_model]. x: the rows before. Returns "span_rule_a", the error over `rule_a_bound`, and at
    strength 1 also "span_leak", norm(B^T y - c) over `leak_bound`.
    """
    error = (y.double() - project_oracle(x, basis, strength)).abs()
    figures = {"span_rule_a": worst_ratio(error, rule_a_bound(x, basis, strength))}
    if strength == 1:
        figures["span_leak"] = worst_ratio(leak(y, basis), leak_bound(y, x, basis))
    return figures


class LogitComparison:
    """Compare the logits of a mode with the oracle's, for every position at once.

    The vocabulary comes in blocks: call `add` with [positions, words] of both, then `figures` at the end. The
    Kullback-Leibler divergence is KL(oracle || mode) in nats, accumulated over the blocks with a running maximum.
    Numerics: float64.
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
        """Return the figures over all positions.

        "rms": root mean square difference. "relative": that over the spread of the oracle's logits. "max": the largest
        difference. "kl_mean", "kl_p99", "kl_max": KL per position. "top1": share of positions with the same best word.
        """
        kl = self.moved / self.mass - (self.top + self.mass.log()) + (self.other_top + self.other_mass.log())
        kl = kl.clamp_min(0)  # below 0 only by float64 rounding
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

    def divergence(self, sequences: int, start: int) -> dict[str, int | None]:
        """Find where the mode's own greedy text would first differ from the oracle's.

        The positions are `sequences` texts of one length. From position `start` on they are the oracle's own greedy
        text. Up to the first position with another best word, the mode's greedy text would be the same.

        Returns {"diverged": number of texts that differ, "first": earliest new token that differs, or None}.
        """
        same = (self.best == self.other_best).reshape(sequences, -1)[:, start:]
        firsts = [int(row.logical_not().nonzero()[0]) for row in same if not bool(row.all())]
        return {"diverged": len(firsts), "first": min(firsts, default=None)}
