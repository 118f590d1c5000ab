"""The equivalence certificate of a model: every mode against the exact edit and against each other.

The model is run layer by layer from its files (`models.layerwise`), with several streams of hidden states side by side.
The original and every mode run in the dtype that is certified. The oracle runs the original and the edited model in
higher precision: float64, or float32 if the dtype has 16 bits.

At every edited layer the modes get the same activations, and their errors are compared with bounds (`certify.checks`).
A mixture of experts is checked as a block (`certify.blocks`), its weights one expert at a time. All streams take the
oracle's routing (`certify.routing`).

The hidden states after each layer, and the logits at the end, are compared with the oracle's. There the yardstick is
the error that the original model itself makes in that dtype.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernel_surgery.certify.blocks import check_block
from kernel_surgery.certify.checks import broken, check_outputs, check_span, check_tensor, span_rows
from kernel_surgery.certify.comparing import BESIDE_ORIGINAL, IDEAL, Compared, Stream
from kernel_surgery.certify.routing import on_cpu, router_of, routing_given, routing_seen
from kernel_surgery.certify.running import (
    ROWS,
    _sampled,
    _seen,
    _through,
    applied_at,
    decode,
    exactly_edited,
    greedy,
    prompt_ids,
    refusals,
)
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.progress import progress_bar, waiting
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.edit.plan import Edit
from kernel_surgery.models.architectures import MlpSite, decoder_layers, next_norm, submodule
from kernel_surgery.models.layerwise import Calls, Layerwise, instead
from kernel_surgery.models.load import load_tokenizer
from kernel_surgery.models.states import states_of
from kernel_surgery.numerics.bounds import add_bound, rmsnorm_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.precision import STORED, name_of, whole_products
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace

WHOLE = 2e9  # bytes: models up to this size are also loaded whole
Rows = dict[str, dict[str, Any]]  # {mode: figures}


class _Certifier(Compared):
    """Collect the figures and faults of one certificate."""

    @waiting("reading the model's files")
    def __init__(
        self,
        source: Path,
        edits: Mapping[int, Projection],
        strengths: Mapping[int, float],
        dtype: torch.dtype,
        device: torch.device | str,
        made: Path | None,
        where: str = "mlp_out",
    ):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        low = Layerwise(source, dtype, device)
        super().__init__(low, Layerwise(source, wide, device, exact=True), list(APPLIERS), min(edits))
        self.made = None if made is None else Layerwise(made, dtype, device)
        self.edits = {layer: edit.to(device) for layer, edit in edits.items()}
        self.strengths, self.where = strengths, where
        self.left_out: dict[str, str] = {}
        self.layers: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.tensors: list[dict[str, Any]] = []
        self.providers: dict[str, str] = {}
        # {"original", "edited": {layer: what the oracle's router returned}}, and {mode: decisions that differ}.
        self.routing: dict[str, dict[int, Any]] = {"original": {}, "edited": {}}
        self.flips: Counter[str] = Counter()
        for layer, edit in self.edits.items():
            for mode, reason in refusals(self.low, layer, edit, where):
                if mode in self.modes:
                    self.modes.remove(mode)
                    self.left_out[mode] = reason

    def run_layer(
        self, index: int, streams: dict[str, Stream], oracles: dict[str, Tensor], calls: Calls, wide_calls: Calls
    ) -> None:
        """Run all streams through one layer, and check the layer if it is edited."""
        edit, strength = self.edits.get(index), self.strengths.get(index, 1.0)
        with self.wide.layer(index) as block:
            router = router_of(self.wide.site(index))
            for name, own in (("original", None), ("edited", edit)):
                with exactly_edited(self.wide.output(index, self.where), own, strength), routing_seen(router) as seen:
                    oracles[name] = wide_calls.run(index, block, oracles[name])
                if seen:
                    self.routing[name][index] = on_cpu(seen[0])
        with self.low.layer(index) as block:
            with self.routed(self.low.site(index), "original"):
                streams["original"] = (calls.run(index, block, streams["original"][0]), None)
            output = self.low.output(index, self.where)
            with exactly_edited(output, edit, strength), self.routed(self.low.site(index), IDEAL):
                streams[IDEAL] = (calls.run(index, block, streams[IDEAL][0]), None)
            checked = None
            if edit is None:
                for mode in self.modes:
                    streams[mode] = self.plain(index, mode, streams[mode], calls)
            else:
                checked = self.edited_layer(self.low.site(index, self.where), streams, calls)
        if checked is not None:
            self.check_in_both(index, *checked)

    @contextmanager
    def routed(self, site: MlpSite, mode: str) -> Iterator[None]:
        """Give a stream the oracle's routing in a layer while the block runs, and count where it differs."""
        given = self.routing["original" if mode == "original" else "edited"].get(site.layer)
        with routing_given(router_of(site), given) as flips:
            yield
        self.flips[mode] += sum(flips)

    def handed_on(self, block: nn.Module, normed: Tensor | None) -> AbstractContextManager[None]:
        """Make the layer's first norm return what the layer before has computed already, if it has."""
        path = self.low.layout.input_norm
        if normed is None or path is None:
            return nullcontext()
        return instead(cast(nn.Module, submodule(block, path)), lambda *args, **kwargs: normed)

    def plain(self, index: int, mode: str, stream: Stream, calls: Calls) -> Stream:
        """Run one mode through an unedited layer. A baked checkpoint uses the layer from its own files."""
        hidden, normed = stream
        made = self.made if mode == "baked" else None
        reader = made or self.low
        with nullcontext() if made is None else made.layer(index):
            block = decoder_layers(reader.model)[index]
            with self.handed_on(block, normed), self.routed(reader.site(index), mode):
                return calls.run(index, block, hidden), None

    def edited_layer(
        self, site: MlpSite, streams: dict[str, Stream], calls: Calls
    ) -> tuple[Tensor, Rows, dict[str, Tensor], dict[str, Tensor]] | None:
        """Run the modes through an edited layer and check them.

        The output of a mixture of experts, or of a norm, is compared with the oracle's. What `check_in_both` needs for
        that is returned then.
        """
        index, inside = site.layer, span_rows(self.edits[site.layer], self.low.dtype)[None]
        projection, strength = self.edits[index], self.strengths[index]
        outputs: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        rows: Rows = {}
        x: Tensor | None = None
        for mode in self.modes:
            hidden, normed = streams[mode]
            made = self.made if mode == "baked" else None
            reader = made or self.low
            rows[mode] = {"layer": index, "mode": mode}
            with (
                nullcontext() if made is None else made.layer(index),
                self.applied(mode, index) if made is None else nullcontext() as edit,
            ):
                block, own = decoder_layers(reader.model)[index], reader.site(index, self.where)
                with (
                    self.handed_on(block, normed),
                    _seen(own.module) as entered,
                    _seen(submodule(block, reader.layout.mlp_norm or "")) as residual,
                    self.routed(reader.site(index), mode),
                ):
                    out = calls.run(index, block, hidden)
                if x is None:
                    x = _sampled(entered[0])
                outputs[mode], before[mode] = _through(own.module, x)
                if mode == "baked":
                    after = {name: t.detach().clone() for weight in own.weights for name, t in weight.parts()}
                reach = edit.reach.get(index, "output") if edit is not None and mode == "fused" else "output"
                normed = next_norm(self.low.model, index)(out) if reach == "norm" else None
                if mode in ("hook", "fused"):
                    zeros = x.new_zeros(1, inside.shape[1], x.shape[-1])
                    with instead(site.module, lambda *args, **kwargs: inside):
                        spanned = states_of((zeros,), site.module(zeros))[0]
                    rows[mode] |= check_span(spanned, inside[0], projection, strength)
            streams[mode] = (out, normed)
            self.providers[mode] = "weights on disk" if edit is None else edit.provider
            if edit is not None and edit.calls.get(index) == 0:
                self.fault(index, mode, "the edit did not run")
            if mode == "baked":
                self.check_weights(site, after)
            if reach != "output":
                unedited = _through(site.module, _sampled(entered[0]))[0]
                rows[mode] |= self.check_fused(index, unedited, residual[0], out, normed)
        assert x is not None  # there is at least one mode
        matrices = [weight for weight in site.weights if weight.matrix]
        if len(matrices) != 1 or matrices[0].form.stacked:
            return x, rows, outputs, before
        with _seen(matrices[0].owner) as given:
            rounded = _through(site.module, x)[0]
        bias = next((part for weight in site.weights if not weight.matrix for _, part in weight.parts()), None)
        h = given[0].flatten(0, -2)
        self.record(
            index, rows, *check_outputs(outputs, rounded, matrices[0].parts()[0][1], bias, h, projection, strength)
        )
        return None

    def check_in_both(
        self, index: int, x: Tensor, rows: Rows, outputs: dict[str, Tensor], before: dict[str, Tensor]
    ) -> None:
        """Check the outputs of a site for inputs x [rows, d_model] against the oracle's (`certify.blocks`).

        The layer is read again, in one precision after the other, so that one layer is in memory at a time.
        """
        with self.low.layer(index), routing_seen(router_of(self.low.site(index))) as seen:
            rounded = _through(self.low.output(index, self.where), x)[0]
        given = seen[0] if seen else None
        with self.wide.layer(index), routing_given(router_of(self.wide.site(index)), given):
            exact = _through(self.wide.output(index, self.where), x.to(self.wide.dtype))[0]
        edit, strength = self.edits[index], self.strengths[index]
        self.record(index, rows, *check_block(outputs, before, rounded, exact, edit, strength, BESIDE_ORIGINAL))

    def record(self, index: int, rows: Rows, modes: Rows, pairs: list[dict[str, Any]]) -> None:
        """Add the figures of a layer's modes and pairs, and a fault for each that is over its bound."""
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
        return applied_at(self.where, mode, self.low.model, {index: self.edits[index]}, self.strengths[index])

    def check_weights(self, site: MlpSite, after: Mapping[str, Tensor]) -> None:
        """Check every edited matrix and bias, element by element: of experts each one. A fault names it."""
        kind, index = STORED[name_of(self.low.dtype)].code, site.layer
        for name, old in (part for weight in site.weights for part in weight.parts()):
            row: dict[str, Any] = {"layer": index, "tensor": name, "dtype": kind}
            edit = self.edits[index].for_tensor(old.ndim)
            new, old = (t.reshape(len(t), -1) for t in (after[name], old))
            row |= check_tensor(new, old, None, edit, self.strengths[index])
            self.tensors.append(row)
            part = name.removeprefix(f"{site.name}.")
            self.faults += [f"layer {index}: baked {part}: {what}" for what in broken(row)]

    def check_fused(
        self, index: int, x: Tensor, residual: Tensor, out: Tensor, normed: Tensor | None
    ) -> dict[str, float]:
        """Check the fused layer's output against `add_bound`, and its norm, if any, against `rmsnorm_bound`."""
        residual, out = (_sampled(t) for t in (residual, out))
        edit, strength = self.edits[index], self.strengths[index]
        exact = residual.double() + project_oracle(x, edit, strength)
        figures = {"add": worst_ratio((out.double() - exact).abs(), add_bound(x, residual, edit, strength))}
        if normed is not None:
            norm = next_norm(self.low.model, index)
            eps, w = norm.variance_epsilon, norm.weight
            error = (_sampled(normed).double() - rmsnorm_oracle(out, w, eps)).abs()
            figures["norm"] = worst_ratio(error, rmsnorm_bound(out, w, eps))
        return figures

    def routing_record(self, positions: int, decoded: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what the certificate says of routing; None for a model without experts. positions: of the text."""
        if not self.routing["original"]:
            return None
        decisions = positions * len(self.routing["original"])
        return {"taken": "the oracle's", "decisions": decisions, "differ": dict(self.flips), "decoded": dict(decoded)}


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
        "routing": None, or for a mixture of experts whose routing all streams took, also in the whole model
        (`certify.routing`), how many decisions there were, and {mode: how many it would have made otherwise}.
        "sampled": the text and the number of positions. "providers": {mode: the code that ran the edit}.
        "dtype", "oracle", "device": where and in which precision it ran.

    Numerics: runs under `numerics.precision.whole_products`. The bounds and the exact edit are float64; the oracle
    model is float64, or float32 for a 16-bit dtype.

    Raises KernelSurgeryError if the subspace does not fit. Raises UserError if the original model overflows in the
    dtype.
    """
    tokenizer = load_tokenizer(str(source)) if (Path(source) / "tokenizer.json").is_file() else None
    strengths = {layer: subspace.strength_at(layer, strength) for layer in subspace.layers}
    where = subspace.edited_site
    run = _Certifier(source, subspace.projections, strengths, dtype, device, made, where)
    ids, description = prompt_ids(tokenizer, prompts, seed, run.low.config.vocab_size)
    length = ids.shape[1]
    run.low.check_length(length + new_tokens)
    with progress_bar((new_tokens + 1) * run.low.layers, "certify", unit="layer", leave=False) as bar:
        ids = greedy(run.wide, ids, run.edits, strengths, new_tokens, bar.update, where)
        (hidden, calls), (oracle_hidden, wide_calls) = run.low.begin(ids), run.wide.begin(ids)
        streams: dict[str, Stream] = {mode: (hidden, None) for mode in ("original", IDEAL, *run.modes)}
        oracles = {"original": oracle_hidden, "edited": oracle_hidden}
        for index in range(run.low.layers):
            run.run_layer(index, streams, oracles, calls, wide_calls)
            if not bool(torch.isfinite(streams["original"][0]).all()):
                raise UserError(
                    f"the original model gives NaN or Inf in {dtype} from layer {index} on, so there is nothing to "
                    "compare with. Choose another --dtype."
                )
            run.compare_hidden(index, streams, oracles)
            bar.update()
    if whole is None:
        width = torch.finfo(dtype).bits // 8
        whole = sum(math.prod(entry.shape) * width for _, entry in run.low.filling.places.values()) <= WHOLE
    given = (run.low, run.made, run.edits, strengths, run.modes, ids, length, run.routing, where)
    decoded, flips = decode(*given) if whole else ({}, {})
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
        "routing": run.routing_record(ids.numel(), flips),
    }
