"""The equivalence certificate of a model: every mode against the exact edit and against each other.

The model is run layer by layer from its files (`models.layerwise`), with several streams of hidden states side by side.
The original and every mode run in the dtype that is certified. The oracle runs the original and the edited model in
higher precision: float64, or float32 if the dtype has 16 bits.

At every edited layer the modes get the same activations, and their errors are compared with bounds (`certify.checks`).
The hidden states after each layer, and the logits at the end, are compared with the oracle's. There the yardstick is
the error that the original model itself makes in that dtype.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernel_surgery.certify.checks import LogitComparison, broken, check_outputs, check_span, check_tensor, span_rows
from kernel_surgery.certify.running import (
    ROWS,
    _instead,
    _sampled,
    _seen,
    decode,
    exactly_edited,
    greedy,
    prompt_ids,
)
from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.baked import refuse_offset_without_bias
from kernel_surgery.edit.lora import refuse_bias, refuse_offset
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.edit.plan import Edit
from kernel_surgery.models.architectures import DecoderLayer, Norm, next_norm, submodule
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_tokenizer
from kernel_surgery.models.table import LLAMA
from kernel_surgery.numerics.bounds import add_bound, rmsnorm_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.precision import STORED, name_of, whole_products
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace

# The original makes about a dozen roundings per layer. An edited layer makes one or two more. So a mode whose error is
# more than twice the original's is not just rounding. There is one complication: if an edit removes most of an
# activation, the earlier rounding errors stay and weigh more. So the yardstick is the larger of two errors: the
# original's, and that of `IDEAL`, the model in the same dtype with the edit made in float64 and rounded once.
BESIDE_ORIGINAL = 2.0
IDEAL = "ideal"
WHOLE = 2e9  # bytes: models up to this size are also loaded whole
# The hidden states [sequences, tokens, d_model] of one mode, and the next norm's result where it is there already.
Stream = tuple[Tensor, Tensor | None]
# What a decoder layer is given besides the hidden states (`Layerwise.positions`).
Where = dict[str, Any]


class _Certifier:
    """Collect the figures and faults of one certificate."""

    def __init__(
        self,
        source: Path,
        edits: Mapping[int, Projection],
        strengths: Mapping[int, float],
        dtype: torch.dtype,
        device: torch.device | str,
        made: Path | None,
    ):
        self.low = Layerwise(source, dtype, device)
        self.wide = Layerwise(source, torch.float64 if dtype == torch.float32 else torch.float32, device, exact=True)
        self.made = None if made is None else Layerwise(made, dtype, device)
        self.edits = {layer: edit.to(device) for layer, edit in edits.items()}
        self.strengths = strengths
        self.modes = list(APPLIERS)
        self.left_out: dict[str, str] = {}
        self.layers: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.tensors: list[dict[str, Any]] = []
        self.hidden: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.providers: dict[str, str] = {}
        self.astray: set[str] = set()
        for layer, edit in self.edits.items():
            name = LLAMA.site_name(layer)
            biased = f"{name}.bias" in self.low.places
            self.leave_out("lora", refuse_offset, edit)
            self.leave_out("baked", refuse_offset_without_bias, name, edit, biased)
            self.leave_out("lora", refuse_bias, name, self.low.tensor(f"{name}.bias") if biased else None)

    def leave_out(self, mode: str, check: Callable[..., None], *given: object) -> None:
        """Leave a mode out, with the reason, if `check(*given)` refuses it."""
        try:
            if mode in self.modes:
                check(*given)
        except KernelSurgeryError as error:
            self.modes.remove(mode)
            self.left_out[mode] = str(error).splitlines()[0]

    def fault(self, layer: int, mode: str, what: str) -> None:
        self.faults.append(f"layer {layer}: {mode}: {what}")

    def run_layer(
        self, index: int, streams: dict[str, Stream], oracles: dict[str, Tensor], where: Where, wide_where: Where
    ) -> None:
        """Run all streams through one layer, and check the layer if it is edited."""
        edit, strength = self.edits.get(index), self.strengths.get(index, 1.0)
        with self.wide.layer(index) as block:
            oracles["original"] = block(oracles["original"], **wide_where)
            with exactly_edited(block, edit, strength):
                oracles["edited"] = block(oracles["edited"], **wide_where)
        with self.low.layer(index) as block:
            streams["original"] = (block(streams["original"][0], **where), None)
            with exactly_edited(block, edit, strength):
                streams[IDEAL] = (block(streams[IDEAL][0], **where), None)
            if edit is None:
                for mode in self.modes:
                    streams[mode] = self.plain(block, index, mode, streams[mode], where)
            else:
                self.edited_layer(block, index, streams, where)

    def plain(self, block: DecoderLayer, index: int, mode: str, stream: Stream, where: Where) -> Stream:
        """Run one mode through an unedited layer. A baked checkpoint uses the layer from its own files."""
        hidden, normed = stream
        with _instead(block.input_layernorm, normed):
            if mode == "baked" and self.made is not None:
                with self.made.layer(index) as own:
                    return own(hidden, **where), None
            return block(hidden, **where), None

    def edited_layer(self, block: DecoderLayer, index: int, streams: dict[str, Stream], where: Where) -> None:
        projection, strength = self.edits[index], self.strengths[index]
        down, inside = cast(nn.Linear, submodule(block, LLAMA.site)), span_rows(projection, self.low.dtype)[None]
        outputs: dict[str, Tensor] = {}
        rows: dict[str, dict[str, Any]] = {}
        h: Tensor | None = None
        for mode in self.modes:
            hidden, normed = streams[mode]
            made = self.made if mode == "baked" else None
            rows[mode] = {"layer": index, "mode": mode}
            with (
                nullcontext(block) if made is None else made.layer(index) as run,
                self.applied(mode, index) if made is None else nullcontext() as edit,
            ):
                site = cast(nn.Linear, submodule(run, LLAMA.site))
                with (
                    _instead(run.input_layernorm, normed),
                    _seen(site) as entered,
                    _seen(run.post_attention_layernorm) as residual,
                ):
                    out = run(hidden, **where)
                if h is None:
                    h = _sampled(entered[0])
                # With a batch dimension, as in the model.
                outputs[mode] = site(h[None])[0]
                after = [p.detach().clone() for p in (site.weight, site.bias) if p is not None]
                normed = None
                if mode == "fused":
                    normed = next_norm(self.low.model, index)(out)
                if mode in ("hook", "fused"):
                    with _instead(down, inside):
                        rows[mode] |= check_span(down(h[None])[0], inside[0], projection, strength)
            streams[mode] = (out, normed)
            self.providers[mode] = "weights on disk" if edit is None else edit.provider
            if edit is not None and edit.calls and not edit.calls[index]:
                self.fault(index, mode, "the edit did not run")
            if mode == "baked":
                self.check_weights(index, after, down)
            if normed is not None:  # in the fused mode
                norm = next_norm(self.low.model, index)
                rows[mode] |= self.check_fused(norm, index, down(_sampled(entered[0])), residual[0], out, normed)
        assert h is not None  # there is at least one mode
        rounded = down(h)
        modes, pairs = check_outputs(outputs, rounded, down.weight, down.bias, h, projection, strength)
        for mode, figures in modes.items():
            rows[mode] |= figures
            self.layers.append(rows[mode])
            for key, what in LIMITS.items():
                if key in rows[mode] and not rows[mode][key] <= 1:
                    self.fault(index, mode, f"{what} is {rows[mode][key]:.3g} times its bound")
        for pair in pairs:
            self.pairs.append({"layer": index} | pair)
            worst = max(pair["error_over_bound"], pair.get("row_over_bound", 0.0))
            if not worst <= 1:
                self.fault(index, " and ".join(pair["pair"]), f"they differ by {worst:.3g} times their bound")

    def applied(self, mode: str, index: int) -> AbstractContextManager[Edit]:
        return APPLIERS[mode](self.low.model, {index: self.edits[index]}, self.strengths[index])

    def check_weights(self, index: int, after: list[Tensor], down: nn.Linear) -> None:
        """Check the edited weight, and the bias if there is one, element by element."""
        kind = STORED[name_of(self.low.dtype)].code
        before = [p for p in (down.weight, down.bias) if p is not None]
        for part, new, old in zip(("weight", "bias"), after, before, strict=False):
            row: dict[str, Any] = {"layer": index, "tensor": f"{LLAMA.site_name(index)}.{part}", "dtype": kind}
            edit = self.edits[index].for_tensor(old.ndim)
            new, old = (t.reshape(len(t), -1) for t in (new, old))
            row |= check_tensor(new, old, None, edit, self.strengths[index])
            self.tensors.append(row)
            self.faults += [f"layer {index}: baked {part}: {what}" for what in broken(row)]

    def check_fused(
        self, norm: Norm, index: int, x: Tensor, residual: Tensor, out: Tensor, normed: Tensor
    ) -> dict[str, float]:
        """Check the fused layer's output against `add_bound`, and its norm against `rmsnorm_bound`."""
        residual, out, normed = (_sampled(t) for t in (residual, out, normed))
        edit, strength = self.edits[index], self.strengths[index]
        exact = residual.double() + project_oracle(x, edit, strength)
        eps, w = norm.variance_epsilon, norm.weight
        return {
            "add": worst_ratio((out.double() - exact).abs(), add_bound(x, residual, edit, strength)),
            "norm": worst_ratio((normed.double() - rmsnorm_oracle(out, w, eps)).abs(), rmsnorm_bound(out, w, eps)),
        }

    def compare_hidden(self, index: int, streams: dict[str, Stream], oracles: dict[str, Tensor]) -> None:
        """Record the relative error of the hidden states after a layer, against the oracle's."""

        def relative(mode: str, oracle: str) -> float:
            exact = oracles[oracle].double()
            return float((streams[mode][0].double() - exact).norm() / exact.norm())

        row: dict[str, Any] = {
            "layer": index,
            "original": relative("original", "original"),
            IDEAL: relative(IDEAL, "edited"),
        }
        own = row["yardstick"] = max(row["original"], row[IDEAL])
        for mode in self.modes:
            row[mode] = relative(mode, "edited")
            # Report a mode once: an error at one layer carries on through all later layers.
            if index >= min(self.edits) and not row[mode] <= BESIDE_ORIGINAL * own and mode not in self.astray:
                self.astray.add(mode)
                self.fault(index, mode, f"the error of the hidden states is {row[mode] / own:.3g} times the original's")
        self.hidden.append(row)

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
        for (start, rows), (_, wide) in zip(self.low.head_blocks(), self.wide.head_blocks(), strict=True):
            logits = {name: h @ wide.T for name, h in exact.items()}
            for mode, comparison in comparisons.items():
                oracle = logits["original" if mode == "original" else "edited"]
                comparison.add(oracle, ends[mode] @ rows.T)
                if mode in decoded_comparisons:
                    oracle = oracle.unflatten(0, (sequences, length))[:, prompt - 1 :].flatten(0, 1)
                    decoded_comparisons[mode].add(oracle, decoded[mode][..., start : start + len(rows)].flatten(0, 1))
        figures = self.beside_original(comparisons, "the error of the logits")
        words = "the error of the logits, decoded with all layers edited at once,"
        whole = (
            self.beside_original(decoded_comparisons | {IDEAL: comparisons[IDEAL]}, words)
            if decoded_comparisons
            else {}
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


# The figures of a mode's row that must not exceed 1, with the words that name them in a fault.
LIMITS = {
    "error_over_bound": "the error against the exact edit",
    "rule_a": "the error of the edit on the rounded output",
    "span_rule_a": "the error of the edit on rows inside the subspace",
    "span_leak": "the part of rows inside the subspace that the edit left",
    "add": "the error of the edit with the residual addition",
    "norm": "the error of the norm that follows",
}


@torch.no_grad()
@whole_products()
def certify_model(
    source: Path,
    subspace: Subspace,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    strength: float = 1.0,
    made: Path | None = None,
    prompts: int = 8,
    new_tokens: int = 16,
    seed: int = 0,
    whole: bool | None = None,
) -> dict[str, Any]:
    """Certify a model in every mode. Return the certificate as a dict.

    source: folder of the original.
    subspace: its edits; the edited layers are its layers.
    dtype: of the modes: float32, bfloat16 or float16. device: where everything runs. strength: a, which the
    subspace's schedule multiplies.
    made: a baked checkpoint of `source`. The baked mode then uses its weights.
    prompts, new_tokens, seed: how many sequences are sampled, how many greedy tokens follow each, and which they are.
    whole: also load the whole model, edit all layers at once and decode token by token. None does so up to 2 GB.

    Keys of the result:
        "layers": one row per edited layer and mode. "pairs": one row per layer and pair of modes.
        "tensors": one row per baked tensor. "hidden": relative errors of the hidden states by layer.
        "logits": figures by mode. "faults": sentences; the list is empty if everything holds.
        "modes", "left_out": the modes that were checked, and {mode: reason} for the others.
        "sampled": the text and the number of positions. "providers": {mode: the code that ran the edit}.
        "dtype", "oracle", "device": where and in which precision it ran.

    Numerics: runs under `numerics.precision.whole_products`. The bounds and the exact edit are float64; the oracle
    model is float64, or float32 for a 16-bit dtype.

    Raises KernelSurgeryError if the subspace does not fit. Raises UserError if the original model overflows in the
    dtype.
    """
    tokenizer = load_tokenizer(str(source)) if (Path(source) / "tokenizer.json").is_file() else None
    strengths = {layer: subspace.strength_at(layer, strength) for layer in subspace.layers}
    run = _Certifier(source, subspace.projections, strengths, dtype, device, made)
    ids, description = prompt_ids(tokenizer, prompts, seed, run.low.config.vocab_size)
    length = ids.shape[1]
    run.low.check_length(length + new_tokens)
    with progress_bar((new_tokens + 1) * run.low.layers, "certify", unit="layer", leave=False) as bar:
        ids = greedy(run.wide, ids, run.edits, strengths, new_tokens, bar.update)
        hidden, oracle_hidden = run.low.embed(ids), run.wide.embed(ids)
        streams: dict[str, Stream] = {mode: (hidden, None) for mode in ("original", IDEAL, *run.modes)}
        oracles = {"original": oracle_hidden, "edited": oracle_hidden}
        where, wide_where = (m.positions(0, ids.shape[1]) for m in (run.low, run.wide))
        for index in range(run.low.layers):
            run.run_layer(index, streams, oracles, where, wide_where)
            if not bool(torch.isfinite(streams["original"][0]).all()):
                raise UserError(
                    f"the original model gives NaN or Inf in {dtype} from layer {index} on, so there is nothing to "
                    "compare with. Choose another --dtype."
                )
            run.compare_hidden(index, streams, oracles)
            bar.update()
        if whole is None:
            width = torch.finfo(dtype).bits // 8
            whole = sum(math.prod(entry.shape) * width for _, entry in run.low.places.values()) <= WHOLE
        decoded = decode(run.low, run.made, run.edits, strengths, run.modes, ids, length) if whole else {}
        logits = run.compare_logits(streams, oracles, length, decoded)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "oracle": str(run.wide.dtype).removeprefix("torch."),
        "device": str(device),
        "providers": run.providers,
        "sampled": {
            **{"prompts": len(ids), "prompt_tokens": length, "new_tokens": new_tokens},
            **{"text": description, "seed": seed},
            **{"positions": ids.numel(), "rows_per_layer": min(ROWS, ids.numel()), "decoded_whole": whole},
        },
        **{"modes": run.modes, "left_out": run.left_out, "layers": run.layers, "pairs": run.pairs},
        **{"tensors": run.tensors, "hidden": run.hidden, "logits": logits, "faults": run.faults},
    }
