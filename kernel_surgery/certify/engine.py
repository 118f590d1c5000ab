"""The certificate across engines: the log probabilities that vLLM gives to a text, in every mode, against the oracle's.

The text is given: prompts, and the greedy text of the exactly edited model after each. vLLM returns the log probability
of every token of it. The oracle is the model in higher precision, run layer by layer from its files (`certify.model`),
with the edit made exactly. A baked checkpoint's oracle is that checkpoint itself; that its files hold the exact edit is
checked tensor by tensor (`certify.files`).

Two engines never agree to the last bit, so the bound is what the original shows. An edit's error may be at most twice
the larger of two: that of the original in vLLM, and that of the model in the same dtype with the edit made exactly and
rounded once ("ideal"). It holds for the root mean square over all positions, and for the largest position. The original
itself may be off by four times what the same model shows here, in the same dtype. If the edit
itself moves the log probabilities by less than that, a missing edit could not be seen, and the certificate is refused.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.comparing import BESIDE_ORIGINAL
from kernel_surgery.certify.files import verify_checkpoint
from kernel_surgery.certify.running import exactly_edited, greedy, prompt_ids, refusals
from kernel_surgery.certify.whole import stored_dtype
from kernel_surgery.checkpoint.record import read_provenance
from kernel_surgery.checkpoint.source import check_source
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.engines.offline import Engine, EngineOptions, require_vllm, started
from kernel_surgery.engines.variants import ENGINE_MODES, Variant, variants
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_tokenizer, parse_device, public_name
from kernel_surgery.models.stored import layout_in, layouts
from kernel_surgery.numerics.precision import STORED, name_of, whole_products
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace

MIXED = "lora, base requests"  # requests without the adapter, in one batch with those that have it


@dataclass
class _Errors:
    """The log probabilities of one mode, and those that they are compared with. Both [texts, tokens - 1], in nats."""

    found: Tensor
    oracle: Tensor

    @property
    def each(self) -> Tensor:
        """The error at every position. One that is not a number is infinite."""
        return (self.found - self.oracle).abs().nan_to_num(nan=math.inf, posinf=math.inf)

    @property
    def rms(self) -> float:
        return float(self.each.square().mean().sqrt())

    def figures(self) -> dict[str, float]:
        return {"rms": self.rms, "max": float(self.each.max())}


@dataclass
class _Run:
    """What one certificate needs.

    ids: [texts, tokens]. oracles: {"original", "edited", and "baked" if there is a baked mode: log probabilities}.
    ideal, here: of the model that runs here, in the engine's dtype: with the exact edit rounded once, and without.
    """

    subspace: Subspace
    strengths: dict[int, float]
    ids: Tensor
    oracles: dict[str, Tensor]
    ideal: _Errors
    here: _Errors
    modes: dict[str, _Errors] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def take(self, variant: Variant, engine: Engine) -> None:
        """Ask the engine of one mode for its log probabilities."""
        texts = self.ids.tolist()
        if variant.mode == "lora":
            both = engine.log_probabilities([*texts, *texts], [True] * len(texts) + [False] * len(texts))
            self.modes["lora"] = _Errors(torch.stack(both[: len(texts)]), self.oracles["edited"])
            self.modes[MIXED] = _Errors(torch.stack(both[len(texts) :]), self.oracles["original"])
            return
        oracle = {"original": "original", "baked": "baked"}.get(variant.mode, "edited")
        found = torch.stack(engine.log_probabilities(texts))
        self.modes[variant.mode] = _Errors(found, self.oracles[oracle])
        report = engine.report()
        if report is None:
            return
        self.reports[variant.mode] = report
        assert variant.settings is not None  # it has a report
        asked = {"layers": list(self.subspace.layers), "rank": self.subspace.rank}
        asked |= {"strength": variant.settings.strength, "sha256": sha256(variant.settings.subspace)}
        if wrong := [name for name, value in asked.items() if report[name] != value]:
            self.faults.append(
                f"{variant.mode}: vLLM edits {wrong[0]} {report[wrong[0]]}, but {asked[wrong[0]]} was asked"
            )

    def yardstick(self) -> dict[str, float]:
        """Return the larger error of the original in vLLM and of the ideal edit: {"rms", "max"}."""
        both = [self.modes["original"].figures(), self.ideal.figures()]
        return {name: max(figures[name] for figures in both) for name in ("rms", "max")}

    def effect(self) -> float:
        """Return the root mean square by which the exact edit moves the log probabilities."""
        return _Errors(self.oracles["edited"], self.oracles["original"]).rms

    def refuse_blind(self, dtype: str) -> None:
        """Raise UserError if the edit is too small for a missing one to be seen. dtype: of the engine, in words."""
        limit = BESIDE_ORIGINAL * self.yardstick()["rms"]
        if any(self.strengths.values()) and not self.effect() > limit:
            raise UserError(
                f"the edit moves the log probabilities of these texts by {self.effect():.3g} nats (root mean square), "
                f"and an error of {limit:.3g} is allowed in {dtype}: a missing edit could not be seen. Nothing was "
                "certified. Use --dtype float32, or other --prompts."
            )

    def judge(self, piece: Callable[[int], str]) -> dict[str, dict[str, Any]]:
        """Return the figures of every mode. Adds a fault, with the first position, for each that is out of bounds.

        piece: returns the text of a token id.
        """
        limit, rows = self.yardstick(), dict[str, dict[str, Any]]()
        # Another engine rounds elsewhere; twice what an edit may be off is no rounding, but another model.
        astray = self.modes["original"].rms / (2 * BESIDE_ORIGINAL * self.here.rms)
        if not astray <= 1:
            self.faults.append(
                f"original: its log probabilities are off by {2 * BESIDE_ORIGINAL * astray:.3g} times what the same "
                "model shows here in the same dtype: the engine does not run this model as it is, and no edit can be "
                "judged beside it"
            )
        for mode, errors in self.modes.items():
            row: dict[str, Any] = errors.figures()
            row |= {f"{name}_of_original": row[name] / limit[name] for name in limit}
            rows[mode] = row
            worst = max(row["rms_of_original"], row["max_of_original"])
            if mode == "original" or worst <= BESIDE_ORIGINAL:
                continue
            beyond = (errors.each > BESIDE_ORIGINAL * limit["max"]).nonzero()
            text, at = (beyond[0] if len(beyond) else (errors.each == errors.each.max()).nonzero()[0]).tolist()
            row |= {"first": {"text": text, "token": at + 1, "error": float(errors.each[text, at])}}
            self.faults.append(
                f"{mode}: its log probabilities are off by {row['rms_of_original']:.3g} times what the original shows "
                f"(root mean square {row['rms']:.3g} nats), {'first' if len(beyond) else 'most'} at token {at + 1} of "
                f"text {text} ({piece(int(self.ids[text, at + 1]))!r}), by {float(errors.each[text, at]):.3g}"
            )
        return rows

    def pairs(self) -> list[dict[str, Any]]:
        """Return how far the edited modes lie apart in vLLM. The limit is the sum of what each may be off its oracle,
        and of what lies between their oracles."""
        rows = []
        edited = [mode for mode in self.modes if mode not in ("original", MIXED)]
        for i, one in enumerate(edited):
            for other in edited[i + 1 :]:
                a, b = self.modes[one], self.modes[other]
                apart, between = _Errors(a.found, b.found).rms, _Errors(a.oracle, b.oracle).rms
                limit = 2 * BESIDE_ORIGINAL * self.yardstick()["rms"] + between
                rows.append({"pair": [one, other], "rms": apart, "error_over_bound": apart / limit})
                if not apart <= limit:
                    self.faults.append(f"{one} and {other}: they differ by {apart / limit:.3g} times their bound")
        return rows


def log_probabilities(
    model: Layerwise, ids: Tensor, edits: Mapping[int, Projection], strengths: Mapping[int, float], advance: Callable
) -> Tensor:
    """Return the log probability of every token after the first, given those before it: [texts, tokens - 1] float64.

    edits: {layer: the edit that is made exactly there}. advance: called after every layer.
    """
    hidden, calls = model.begin(ids)
    for index in range(model.layers):
        site, strength = model.output(index), strengths.get(index, 1.0)
        with model.layer(index) as block, exactly_edited(site, edits.get(index), strength):
            hidden = calls.run(index, block, hidden)
        advance()
    with model.final_norm() as norm:
        ends = norm(hidden)[:, :-1]
    following = ids[:, 1:].to(model.device)
    mass = torch.full(following.shape, -math.inf, dtype=torch.float64, device=model.device)
    chosen = torch.zeros_like(mass)
    for start, ending in model.head_blocks():
        logits = ending(ends).double()
        words = logits.shape[-1]
        mass = torch.logaddexp(mass, logits.logsumexp(-1))
        inside = (following >= start) & (following < start + words)
        at = (following - start).clamp(0, words - 1)
        chosen = torch.where(inside, logits.gather(-1, at[..., None])[..., 0], chosen)
    return (chosen - mass).cpu()


def left_out(subspace: Subspace, low: Layerwise) -> dict[str, str]:
    """Return {mode: reason} of the modes that cannot make this edit."""
    reasons: dict[str, str] = {}
    for layer, edit in subspace.projections.items():
        for mode, reason in refusals(low, layer, edit):
            reasons.setdefault(mode, reason)
    return reasons


@torch.no_grad()
@whole_products()
def verify_engine(
    source: Path,
    subspace_file: Path,
    *,
    model_id: str,
    dtype: str = "auto",
    device: str = "auto",
    strength: float | None = None,
    baked: Path | None = None,
    prompts: int = 8,
    new_tokens: int = 16,
    seed: int = 0,
    tensor_parallel: int = 1,
    more: Mapping[str, Any] | None = None,
    edited: Iterable[str] = ENGINE_MODES[1:],
    force: bool = False,
) -> dict[str, Any]:
    """Certify vLLM's modes. Return the certificate as a dict.

    source: folder of the original. subspace_file: the edit. model_id: name of the model, for the record.
    dtype: of the engine, by its name, or "auto" for that of the files. device: where the oracle runs.
    strength: by default 1, or that of `baked`; the subspace's schedule multiplies it.
    baked: a baked checkpoint of `source`; by default one is written and removed again.
    prompts, new_tokens, seed: as in `certify.model.certify_model`.
    tensor_parallel, more: as in `engines.offline.EngineOptions`. edited: the modes to certify, beside the original.
    force: accept a subspace of unknown origin or of another model.

    Raises what `check_source`, `engines.variants.variants` and `engines.offline.started` raise. Raises UserError if the
    edit is too small to be seen beside the errors of the original.
    """
    name = require_vllm()
    subspace = Subspace.load(subspace_file, force=force)
    check_source(source, layouts(source), subspace, force=force)
    number = float(read_provenance(baked)["strength"]) if baked else 1.0 if strength is None else strength
    kind = STORED[stored_dtype(source, subspace.layers[0]) if dtype == "auto" else dtype].dtype
    where, more = parse_device(device), dict(more or {})
    tokenizer = load_tokenizer(str(source)) if (source / "tokenizer.json").is_file() else None
    if tokenizer is None:
        more["skip_tokenizer_init"] = True
    low = Layerwise(source, kind, where)
    ids, described = prompt_ids(tokenizer, prompts, seed, low.config.vocab_size)
    low.check_length(ids.shape[1] + new_tokens + 1)
    reasons = left_out(subspace, low)
    modes = ["original", *(mode for mode in edited if mode not in reasons)]
    written = {"baked": baked} if baked else {}
    certificate: dict[str, Any] = {"tensors": [], "faults": [], "of": {"baked": None, "model": public_name(source)}}
    with variants(modes, source, subspace, number, written=written, force=force) as (made, _):
        if "baked" in made:
            certificate = verify_checkpoint(made["baked"].model, source, subspace_file)
        run = _prepared(low, made, subspace, number, ids, new_tokens)
        options = EngineOptions(run.ids.shape[1] + 1, kind, tensor_parallel, more)
        with progress_bar(len(made), "vllm", unit="mode", leave=False) as bar:
            for variant in made.values():
                with started(variant, options) as engine:
                    run.take(variant, engine)
                bar.update()
    run.refuse_blind(name_of(kind))
    rows = run.judge((lambda token: str(token)) if tokenizer is None else (lambda token: tokenizer.decode([token])))
    across = {
        **{"engine": name, "tensor_parallel": tensor_parallel, "arguments": more, "dtype": name_of(kind)},
        **{"modes": rows, "pairs": run.pairs(), "reports": run.reports, "left_out": reasons},
        **{"yardstick": run.yardstick(), "ideal": run.ideal.figures(), "here": run.here.figures()},
        "effect_rms": run.effect(),
        **{"oracle": name_of(_wide(kind)), "prompts": len(ids), "prompt_tokens": ids.shape[1]},
        **{"new_tokens": new_tokens, "positions": run.ids.numel() - len(ids), "text": described},
        "limit": BESIDE_ORIGINAL,
    }
    certificate["faults"] = [*certificate["faults"], *run.faults]
    certificate |= {"kind": "certificate", "model_id": model_id, "strength": number, "rank": subspace.rank}
    certificate |= {"note": subspace.note_on(layout_in(source)), "across_engines": across}
    return certificate | {"environment": environment_record(where)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the oracle of a model in `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _prepared(
    low: Layerwise, made: Mapping[str, Variant], subspace: Subspace, strength: float, ids: Tensor, new_tokens: int
) -> _Run:
    """Write the text that is certified on, and compute what the engine's log probabilities are compared with.

    low: the original in the engine's dtype. made: what the modes load. ids: the prompts [texts, tokens].
    """
    wide = Layerwise(low.folder, _wide(low.dtype), low.device, exact=True)
    edits = {layer: edit.to(low.device) for layer, edit in subspace.projections.items()}
    strengths = {layer: subspace.strength_at(layer, strength) for layer in subspace.layers}
    passes = new_tokens + 4 + ("baked" in made)
    with progress_bar(passes * low.layers, "oracle", unit="layer", leave=False) as bar:
        ids = greedy(wide, ids.to(low.device), edits, strengths, new_tokens, bar.update).cpu()
        oracles = {
            "original": log_probabilities(wide, ids, {}, {}, bar.update),
            "edited": log_probabilities(wide, ids, edits, strengths, bar.update),
        }
        ideal = log_probabilities(low, ids, edits, strengths, bar.update)
        here = _Errors(log_probabilities(low, ids, {}, {}, bar.update), oracles["original"])
        if "baked" in made:
            files = Layerwise(made["baked"].model, wide.dtype, low.device, exact=True)
            oracles["baked"] = log_probabilities(files, ids, {}, {}, bar.update)
    return _Run(subspace, strengths, ids, oracles, _Errors(ideal, oracles["edited"]), here)
