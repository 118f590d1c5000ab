"""The equivalence certificate of a model: every mode against the exact edit and against each other.

The model is run layer by layer from its files (`layerwise.py`), all streams side by side: the original and every mode
in the dtype that is certified, the original and the edited model as oracle in float64 (float32 where the dtype is a
16-bit one). At every edited layer the modes are given the same activations and held to their bounds (`checks.py`);
along the way the hidden states, and at the end the logits, are compared with the oracle's, beside what the original
model itself loses in that dtype.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from kernel_surgery.certify.checks import LogitComparison, broken, check_outputs, check_span, check_tensor, span_rows
from kernel_surgery.certify.running import ROWS, _instead, _sampled, _seen, exactly_edited, greedy, prompt_ids
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.lora import refuse_bias
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.models.architectures import LLAMA, next_norm, submodule
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_model, load_tokenizer
from kernel_surgery.numerics.bounds import add_bound, rmsnorm_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.precision import STORED, name_of, whole_products
from kernel_surgery.subspace.artifact import Subspace

# Original and edited model make the same roundings but for one or two more in an edited layer, of a dozen: a mode that
# errs by more than twice as much does something else. Where an edit takes most of an activation away, the rounding of
# what was there before remains and weighs more: so the yardstick is the larger of two errors, the original's and the
# `IDEAL`'s, the model in the same dtype with the edit made in float64 and rounded once.
BESIDE_ORIGINAL = 2.0
IDEAL = "ideal"
WHOLE = 2e9  # bytes: a model of no more is also loaded whole


class _Certifier:
    """One certificate under way."""

    def __init__(self, source, bases, strength, dtype, device, made: Path | None):
        self.low = Layerwise(source, dtype, device)
        self.wide = Layerwise(source, torch.float64 if dtype == torch.float32 else torch.float32, device, exact=True)
        self.made = None if made is None else Layerwise(made, dtype, device)
        self.bases = {layer: basis.to(device) for layer, basis in bases.items()}
        self.strength = strength
        self.modes, self.left_out = list(APPLIERS), {}
        self.layers, self.pairs, self.tensors, self.faults, self.hidden = [], [], [], [], []
        self.providers: dict[str, str] = {}
        self.astray: set[str] = set()
        for layer in bases:
            name = LLAMA.site(layer)
            if "lora" in self.modes and f"{name}.bias" in self.low.places:
                try:
                    refuse_bias(name, self.low.tensor(f"{name}.bias"))
                except ValueError as error:
                    self.modes.remove("lora")
                    self.left_out["lora"] = str(error).splitlines()[0]

    def fault(self, layer: int, mode: str, what: str) -> None:
        self.faults.append(f"layer {layer}: {mode}: {what}")

    def run_layer(self, index: int, streams: dict, oracles: dict, where: dict, wide_where: dict) -> None:
        """All streams through one layer, and the checks if it is an edited one."""
        basis = self.bases.get(index)
        with self.wide.layer(index) as block:
            oracles["original"] = block(oracles["original"], **wide_where)
            with exactly_edited(block, basis, self.strength):
                oracles["edited"] = block(oracles["edited"], **wide_where)
        with self.low.layer(index) as block:
            streams["original"] = (block(streams["original"][0], **where), None)
            with exactly_edited(block, basis, self.strength):
                streams[IDEAL] = (block(streams[IDEAL][0], **where), None)
            if basis is None:
                for mode in self.modes:
                    streams[mode] = self.plain(block, index, mode, streams[mode], where)
            else:
                self.edited_layer(block, index, basis, streams, where)

    def plain(self, block: nn.Module, index: int, mode: str, stream: tuple, where: dict) -> tuple:
        """A layer that is not edited; a baked checkpoint's comes from its own files."""
        hidden, normed = stream
        with _instead(block.input_layernorm, normed):
            if mode == "baked" and self.made is not None:
                with self.made.layer(index) as own:
                    return own(hidden, **where), None
            return block(hidden, **where), None

    def edited_layer(self, block: nn.Module, index: int, basis: Tensor, streams: dict, where: dict) -> None:
        down, dtype, outputs, rows = submodule(block, LLAMA.projection), self.low.dtype, {}, {}
        inside, h, rounded = span_rows(basis, dtype)[None], None, None
        for mode in self.modes:
            hidden, normed = streams[mode]
            from_files = mode == "baked" and self.made is not None
            rows[mode] = {"layer": index, "mode": mode}
            with (
                self.made.layer(index) if from_files else nullcontext(block) as run,
                nullcontext() if from_files else self.applied(mode, index, basis) as edit,
            ):
                site = submodule(run, LLAMA.projection)
                with (
                    _instead(run.input_layernorm, normed),
                    _seen(site) as entered,
                    _seen(run.post_attention_layernorm) as residual,
                ):
                    out = run(hidden, **where)
                if h is None:
                    h = _sampled(entered[0])
                # Three dimensions, as in the model.
                outputs[mode] = site(h[None])[0]
                after = [p.detach().clone() for p in (site.weight, site.bias) if p is not None]
                normed = None
                if mode == "fused":
                    normed = next_norm(self.low.model, index)(out)
                if mode in ("hook", "fused"):
                    with _instead(down, inside):
                        rows[mode] |= check_span(down(h[None])[0], inside[0], basis, self.strength)
            streams[mode] = (out, normed)
            self.providers[mode] = "weights on disk" if from_files else edit.provider
            if edit is not None and edit.calls and not edit.calls[index]:
                self.fault(index, mode, "the edit never ran")
            if mode == "baked":
                self.check_weights(index, basis, after, down)
            if mode == "fused":
                norm = next_norm(self.low.model, index)
                rows[mode] |= self.check_fused(norm, basis, down(_sampled(entered[0])), residual[0], out, normed)
        rounded = down(h)
        modes, pairs = check_outputs(outputs, rounded, down.weight, down.bias, h, basis, self.strength)
        for mode, found in modes.items():
            rows[mode] |= found
            self.layers.append(rows[mode])
            for key, what in LIMITS.items():
                if key in rows[mode] and not rows[mode][key] <= 1:
                    self.fault(index, mode, f"{what} is {rows[mode][key]:.3g} times its bound")
        for pair in pairs:
            self.pairs.append({"layer": index} | pair)
            worst = max(pair["error_over_bound"], pair.get("row_over_bound", 0.0))
            if not worst <= 1:
                self.fault(index, " and ".join(pair["pair"]), f"they differ by {worst:.3g} times their bound")

    def applied(self, mode: str, index: int, basis: Tensor):
        return APPLIERS[mode](self.low.model, {index: basis}, self.strength)

    def check_weights(self, index: int, basis: Tensor, after: list[Tensor], down: nn.Module) -> None:
        """The edited weight, and bias, element by element."""
        kind = STORED[name_of(self.low.dtype)].code
        before = [p for p in (down.weight, down.bias) if p is not None]
        for part, new, old in zip(("weight", "bias"), after, before, strict=False):
            row = {"layer": index, "tensor": f"{LLAMA.site(index)}.{part}", "dtype": kind}
            new, old = (t.reshape(len(t), -1) for t in (new, old))
            row |= check_tensor(new, old, basis.double().T @ old.double(), basis, self.strength)
            self.tensors.append(row)
            self.faults += [f"layer {index}: baked {part}: {what}" for what in broken(row)]

    def check_fused(self, norm, basis, x: Tensor, residual: Tensor, out: Tensor, normed: Tensor) -> dict[str, float]:
        """What the fused layer returns, and the norm it hands over, against `add_bound` and `rmsnorm_bound`."""
        residual, out, normed = (_sampled(t) for t in (residual, out, normed))
        exact = residual.double() + project_oracle(x, basis, self.strength)
        eps, w = norm.variance_epsilon, norm.weight
        return {
            "add": worst_ratio((out.double() - exact).abs(), add_bound(x, residual, basis, self.strength)),
            "norm": worst_ratio((normed.double() - rmsnorm_oracle(out, w, eps)).abs(), rmsnorm_bound(out, w, eps)),
        }

    def compare_hidden(self, index: int, streams: dict, oracles: dict) -> None:
        """How far the hidden states after a layer are from the oracle's, relative to them."""

        def relative(mode: str, oracle: str) -> float:
            exact = oracles[oracle].double()
            return float((streams[mode][0].double() - exact).norm() / exact.norm())

        row = {"layer": index, "original": relative("original", "original"), IDEAL: relative(IDEAL, "edited")}
        own = row["yardstick"] = max(row["original"], row[IDEAL])
        for mode in self.modes:
            row[mode] = relative(mode, "edited")
            # Once a mode: what errs at one layer errs at all that follow.
            if index >= min(self.bases) and not row[mode] <= BESIDE_ORIGINAL * own and mode not in self.astray:
                self.astray.add(mode)
                self.fault(index, mode, f"hidden states err {row[mode] / own:.3g} times as much as the original's")
        self.hidden.append(row)

    def compare_logits(self, streams: dict, oracles: dict, prompt: int, decoded: dict) -> dict[str, dict]:
        """decoded: {mode: logits [sequences, new tokens + 1, words]} of the whole model, from the last prompt token on;
        empty where it was not loaded."""
        sequences, length = streams["original"][0].shape[:2]
        with self.low.final_norm() as norm:
            ends = {m: (norm(h) if n is None else n).flatten(0, 1) for m, (h, n) in streams.items()}
        with self.wide.final_norm() as norm:
            exact = {name: norm(h).flatten(0, 1) for name, h in oracles.items()}
        found = {mode: LogitComparison(len(ends[mode]), self.low.device) for mode in ends}
        later = {mode: LogitComparison(sequences * (length - prompt + 1), self.low.device) for mode in decoded}
        for (start, rows), (_, wide) in zip(self.low.head_blocks(), self.wide.head_blocks(), strict=True):
            logits = {name: h @ wide.T for name, h in exact.items()}
            for mode, comparison in found.items():
                oracle = logits["original" if mode == "original" else "edited"]
                comparison.add(oracle, ends[mode] @ rows.T)
                if mode in later:
                    oracle = oracle.unflatten(0, (sequences, length))[:, prompt - 1 :].flatten(0, 1)
                    later[mode].add(oracle, decoded[mode][..., start : start + len(rows)].flatten(0, 1))
        figures = self.beside_original(found, "the logits err")
        words = "decoded with all layers edited at once, the logits err"
        whole = self.beside_original(later | {IDEAL: found[IDEAL]}, words) if later else {}
        for mode, figure in figures.items():
            figure["decoded"] = whole.get(mode)
            if mode not in ("original", IDEAL):
                figure |= found[mode].divergence(sequences, prompt - 1)
        return figures

    def beside_original(self, found: dict[str, LogitComparison], words: str) -> dict[str, dict]:
        """The figures of every mode, "of_original" among them; a fault where it errs too much."""
        figures = {mode: comparison.figures() for mode, comparison in found.items()}
        own = max(figures["original"]["relative"], figures[IDEAL]["relative"])
        for mode in self.modes:
            figures[mode]["of_original"] = figures[mode]["relative"] / figures["original"]["relative"]
            ratio = figures[mode]["relative"] / own
            if not ratio <= BESIDE_ORIGINAL:
                self.faults.append(f"{mode}: {words} {ratio:.3g} times as much as the original's")
        return figures

    def decode(self, ids: Tensor, prompt: int) -> dict[str, Tensor]:
        """{mode: logits [sequences, new tokens + 1, words]}: the model loaded whole, every layer of the subspace edited
        at once, and the text fed to it token by token with a cache, as when it generates."""
        model, found = load_model(str(self.low.folder), self.low.dtype, self.low.device), {}
        ids = ids.to(self.low.device)
        for mode in ("original", *self.modes):
            here, edit = model, nullcontext()
            if mode == "baked" and self.made is not None:
                here = load_model(str(self.made.folder), self.low.dtype, self.low.device)
            elif mode != "original":
                edit = APPLIERS[mode](model, self.bases, self.strength)
            with edit:
                out = here(ids[:, :prompt], use_cache=True)
                logits = [out.logits[:, -1:]]
                for at in range(prompt, ids.shape[1]):
                    out = here(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                    logits.append(out.logits)
            found[mode] = torch.cat(logits, 1)
        return found


# What a mode's row holds to 1, in words.
LIMITS = {
    "error_over_bound": "the error against the exact edit",
    "rule_a": "the error of the projection (Rule A)",
    "span_rule_a": "the error of the projection inside the subspace (Rule A)",
    "span_leak": "the leak of what lies inside the subspace",
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
) -> dict:
    """The certificate of a model, as a dict.

    source: folder of the original. made: a baked checkpoint of it, whose weights are then the baked mode's. dtype: in
    which the modes run (float32, bfloat16, float16). prompts, new_tokens, seed: what is sampled. whole: load the model
    whole as well, edit all layers at once and decode token by token (None: where that takes 2 GB or less).

    "layers": a row a layer and mode; "pairs": a row a layer and pair; "tensors": the baked weights; "hidden": relative
    errors by layer; "logits": by mode; "faults": sentences, empty if everything holds; "sampled": on what. Runs
    under `reference.whole_products`. Raises ValueError where the subspace does not fit, and UserError where the model
    overflows in the dtype.
    """
    tokenizer = load_tokenizer(str(source)) if (Path(source) / "tokenizer.json").is_file() else None
    run = _Certifier(source, subspace.bases, strength, dtype, device, made)
    ids, about = prompt_ids(tokenizer, prompts, seed, run.low.config.vocab_size)
    length = ids.shape[1]
    run.low.check_length(length + new_tokens)
    with progress_bar((new_tokens + 1) * run.low.layers, "certify", unit="layer", leave=False) as bar:
        ids = greedy(run.wide, ids, run.bases, strength, new_tokens, bar.update)
        hidden, wide = run.low.embed(ids), run.wide.embed(ids)
        streams = {mode: (hidden, None) for mode in ("original", IDEAL, *run.modes)}
        oracles = {"original": wide, "edited": wide}
        where, wide_where = (m.positions(0, ids.shape[1]) for m in (run.low, run.wide))
        for index in range(run.low.layers):
            run.run_layer(index, streams, oracles, where, wide_where)
            if not bool(torch.isfinite(streams["original"][0]).all()):
                raise UserError(
                    f"the original model gives NaN or Inf in {dtype} from layer {index} on: there is nothing to "
                    "compare with. Choose another --dtype."
                )
            run.compare_hidden(index, streams, oracles)
            bar.update()
        if whole is None:
            width = torch.finfo(dtype).bits // 8
            whole = sum(math.prod(entry.shape) * width for _, entry in run.low.places.values()) <= WHOLE
        decoded = run.decode(ids, length) if whole else {}
        logits = run.compare_logits(streams, oracles, length, decoded)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "oracle": str(run.wide.dtype).removeprefix("torch."),
        "device": str(device),
        "providers": run.providers,
        "sampled": {
            **{"prompts": len(ids), "prompt_tokens": length, "new_tokens": new_tokens, "text": about, "seed": seed},
            **{"positions": ids.numel(), "rows_per_layer": min(ROWS, ids.numel()), "decoded_whole": whole},
        },
        **{"modes": run.modes, "left_out": run.left_out, "layers": run.layers, "pairs": run.pairs},
        **{"tensors": run.tensors, "hidden": run.hidden, "logits": logits, "faults": run.faults},
    }
