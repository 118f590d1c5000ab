"""What a certificate compares from layer to layer and at the end: hidden states and logits, against the oracle's."""

from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.checks import LogitComparison
from kernel_surgery.common.progress import waiting
from kernel_surgery.models.layerwise import Layerwise

# The original makes about a dozen roundings per layer. An edited layer makes one or two more. So a mode whose error is
# more than twice the original's is not just rounding. There is one complication: if an edit removes most of an
# activation, the earlier rounding errors stay and weigh more. So the yardstick is the larger of two errors: the
# original's, and that of `IDEAL`, the model in the same dtype with the edit made in float64 and rounded once.
BESIDE_ORIGINAL = 2.0
IDEAL = "ideal"
# The hidden states [sequences, tokens, d_model] of one mode, and the next norm's result where it is there already.
Stream = tuple[Tensor, Tensor | None]


class Compared:
    """Compare the streams of a certificate with the oracle's, and collect the faults.

    low, wide: the model in the dtype that is certified, and the oracle. modes: may get fewer. first: edited layer.
    """

    def __init__(self, low: Layerwise, wide: Layerwise, modes: list[str], first: int):
        self.low, self.wide, self.modes, self.first = low, wide, modes, first
        self.hidden: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.astray: set[str] = set()

    def fault(self, layer: int, mode: str, what: str) -> None:
        """Add a fault of one mode in one layer."""
        self.faults.append(f"layer {layer}: {mode}: {what}")

    def compare_hidden(self, index: int, streams: dict[str, Stream], oracles: dict[str, Tensor]) -> None:
        """Record the relative error of the hidden states after a layer, against the oracle's.

        It is the root mean square over the tokens: a few have states that are a thousand times the others', and would
        hide them in the norm of all.
        """

        def relative(mode: str, oracle: str) -> float:
            exact = oracles[oracle].double()
            # A state may be zero: that of a token whose embedding is.
            sizes = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
            errors = (streams[mode][0].double() - exact).norm(dim=-1) / sizes
            return float(errors.square().mean().sqrt())

        row: dict[str, Any] = {
            "layer": index,
            "original": relative("original", "original"),
            IDEAL: relative(IDEAL, "edited"),
        }
        own = row["yardstick"] = max(row["original"], row[IDEAL])
        for mode in self.modes:
            row[mode] = relative(mode, "edited")
            # Report a mode once: an error at one layer carries on through all later layers.
            if index >= self.first and not row[mode] <= BESIDE_ORIGINAL * own and mode not in self.astray:
                self.astray.add(mode)
                self.fault(index, mode, f"the error of the hidden states is {row[mode] / own:.3g} times the original's")
        self.hidden.append(row)

    @waiting("comparing logits")
    def compare_logits(
        self, streams: dict[str, Stream], oracles: dict[str, Tensor], prompt: int, decoded: dict[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        """Return the figures of the logits by mode, against the oracle's.

        decoded: {mode: logits [sequences, new tokens + 1, words]} of the whole model, from the last prompt token on. It
        is empty if the model was not loaded whole.
        """
        sequences, length = streams["original"][0].shape[:2]
        with self.low.final_norm() as norm:
            ends = {m: (norm(h) if n is None else n).flatten(0, 1) for m, (h, n) in streams.items()}
        with self.wide.final_norm() as norm:
            exact = {name: norm(h).flatten(0, 1) for name, h in oracles.items()}
        comparisons = {mode: LogitComparison(len(ends[mode]), self.low.device) for mode in ends}
        decoded_comparisons = {
            mode: LogitComparison(sequences * (length - prompt + 1), self.low.device) for mode in decoded
        }
        for (start, ending), (_, wide) in zip(self.low.head_blocks(), self.wide.head_blocks(), strict=True):
            logits = {name: wide(h) for name, h in exact.items()}
            words = logits["original"].shape[-1]
            for mode, comparison in comparisons.items():
                oracle = logits["original" if mode == "original" else "edited"]
                comparison.add(oracle, ending(ends[mode]))
                if mode in decoded_comparisons:
                    oracle = oracle.unflatten(0, (sequences, length))[:, prompt - 1 :].flatten(0, 1)
                    decoded_comparisons[mode].add(oracle, decoded[mode][..., start : start + words].flatten(0, 1))
        figures = self.beside_original(comparisons, "the error of the logits")
        what = "the error of the logits, decoded with all layers edited at once,"
        whole = (
            self.beside_original(decoded_comparisons | {IDEAL: comparisons[IDEAL]}, what) if decoded_comparisons else {}
        )
        for mode, figure in figures.items():
            figure["decoded"] = whole.get(mode)
            if mode not in ("original", IDEAL):
                figure |= comparisons[mode].divergence(sequences, prompt - 1)
        return figures

    def beside_original(self, found: dict[str, LogitComparison], words: str) -> dict[str, dict[str, Any]]:
        """Return the figures of every mode, with "of_original": its error over the original's.

        Adds a fault for every mode whose error is too large.
        """
        figures: dict[str, dict[str, Any]] = {mode: comparison.figures() for mode, comparison in found.items()}
        own = max(figures["original"]["relative"], figures[IDEAL]["relative"])
        for mode in self.modes:
            figures[mode]["of_original"] = figures[mode]["relative"] / figures["original"]["relative"]
            ratio = figures[mode]["relative"] / own
            if not ratio <= BESIDE_ORIGINAL:
                self.faults.append(f"{mode}: {words} is {ratio:.3g} times the original's")
        return figures
