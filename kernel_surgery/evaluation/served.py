"""An engine that people serve with, as the writer of an evaluation's texts.

Every mode is one engine, started when its first text is asked for and stopped after its last: an engine takes most of a
device's memory. Problems, scoring and statistics are those of a loaded model. What an engine does not give is said:
without logits there is no KL, and without hidden states there are no probes. vLLM's prompt log probabilities give the
loss on neutral text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kernel_surgery.common.environment import version
from kernel_surgery.damage.words import ratio_interval
from kernel_surgery.engines.offline import Engine, EngineOptions, require_vllm, started
from kernel_surgery.engines.server import Server
from kernel_surgery.engines.settings import PluginSettings
from kernel_surgery.engines.texts import SERVER, Writer, parse_arguments
from kernel_surgery.engines.variants import Variant, engine_modes, variants
from kernel_surgery.evaluation.answering import EditBlock, missing_cells
from kernel_surgery.evaluation.controls import Control
from kernel_surgery.evaluation.generate import stored_end_tokens
from kernel_surgery.evaluation.judging import Generation, text_of
from kernel_surgery.evaluation.options import Asked, Options
from kernel_surgery.evaluation.samples import digest, read_cells
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.models.before import check_files
from kernel_surgery.models.chat import Chat
from kernel_surgery.models.load import public_name
from kernel_surgery.models.stored import located, sampled
from kernel_surgery.problems.generator import Problem
from kernel_surgery.problems.neutral import neutral
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import sample_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Running:
    """The engine that runs at the moment, if one does."""

    writer: Writer | None = None


@dataclass(frozen=True)
class EngineAsking:
    """What is asked of an engine (`evaluation.answering.Asking`). ends: the token ids that end a text."""

    tokenizer: "PreTrainedTokenizerBase"
    problems: tuple[Problem, ...]
    languages: tuple[str, ...]
    budget: int
    chat: Chat
    ends: tuple[int, ...]
    running: Running = field(default_factory=Running)

    def about(self, problems: Sequence[Problem]) -> "EngineAsking":
        """Return the same about other problems."""
        return replace(self, problems=tuple(problems))

    def write(self, prompts: Sequence[str], advance: Callable[[int], object]) -> list[Generation]:
        """Return greedy texts of the engine that runs, in the order of `prompts`."""
        assert self.running.writer is not None  # a block of `Served.blocks` is open
        encoded, decode = [self.chat.ids(self.tokenizer, p) for p in prompts], text_of(self.tokenizer, self.chat)
        texts = self.running.writer.texts(encoded, max_new_tokens=self.budget, ends=self.ends, advance=advance)
        opener = self.chat.opener(self.tokenizer)
        return [
            Generation(t.ids, decode(t.ids), t.finish)
            if t.text is None
            else Generation(t.ids, opener + t.text, t.finish, from_text=True)
            for t in texts
        ]


@contextmanager
def writing(asking: EngineAsking, variant: Variant, engine: EngineOptions) -> Iterator[Engine]:
    """Start an engine, which writes the texts that are asked for while the block runs. Raises what `started` raises."""
    with started(variant, engine) as running:
        asking.running.writer = running
        try:
            yield running
        finally:
            asking.running.writer = None


def in_engine(running: Callable[[Variant], AbstractContextManager[object]], folder: Path) -> dict[str, Any]:
    """Return the last arguments of `controls.run_controls` for vLLM: its plugin makes a control, from a file.

    running: returns the block in which a variant's engine writes. folder: of the original checkpoint.
    """

    @contextmanager
    def controlled(control: Control) -> Iterator[tuple[()]]:
        with TemporaryDirectory(prefix="kernel-surgery-") as work:
            file = Path(work) / "subspace.safetensors"
            Subspace(control.bases, strengths=control.strengths).save(file)
            with running(Variant(control.name, folder, folder, PluginSettings(file, 1.0, None, force=True))):
                yield ()

    def no_activations(prompts: list[str]) -> Any:
        raise AssertionError("check_engine_controls refuses controls that need activations")

    return {"block_of": lambda control: partial(controlled, control), "activations_of": no_activations}


class Served:
    """An engine behind an evaluation (`evaluation.backends.Backend`).

    folder: of the original checkpoint. found: {mode: `Variant`}; empty for a server.
    """

    def __init__(
        self,
        asking: EngineAsking,
        options: Options,
        subspace: Subspace | None,
        folder: Path,
        config: dict[str, Any],
        found: dict[str, Variant],
        engine: EngineOptions,
    ):
        self.asking, self.options, self.subspace, self.folder, self.config = asking, options, subspace, folder, config
        self.found, self.engine = found, engine
        self.modes = engine_modes(options.mode, options.engine)
        self.losses: dict[str, dict[str, list[tuple[float, int]]]] = {}
        self.providers: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The engine in words."""
        return f"openai {version('openai')}" if self.options.engine == SERVER else require_vllm()

    def edits(self) -> dict[str, dict[str, Any]]:
        if self.subspace is None:
            return {}
        subspace, strength = self.subspace, self.options.strength
        record = {
            **{"provider": self.name, "layers": list(subspace.layers), "strength": strength},
            **{"schedule": {str(layer): factor for layer, factor in subspace.strengths.items()}},
            **{"note": subspace.note_on(layout_named(self.config["model_type"]))},
            **{"norms": {}, "reach": {}, "fallbacks": {}},
        }
        return {mode: dict(record) for mode in self.modes if mode != "original"}

    def weights(self) -> str:
        if self.options.engine == SERVER:
            return digest(self.options.engine_record["served"])
        return digest(sample_weights(sampled(self.folder).items()))

    def description(self) -> dict[str, Any]:
        entries = [entry for _, entry in located(self.folder).values()]
        return {
            **{"id": public_name(self.options.model), "revision": None, "architecture": self.config["model_type"]},
            **{"layers": self.config["num_hidden_layers"], "d_model": self.config["hidden_size"]},
            "parameters": sum(math.prod(entry.shape) for entry in entries),
        }

    def blocks(self) -> dict[str, EditBlock]:
        if self.options.engine == SERVER:
            return {mode: partial(self._reached, mode) for mode in self.modes}
        return {mode: partial(self._running, self.found[mode]) for mode in self.modes}

    def _server(self, mode: str) -> Server:
        name, address = self.options.served_models()[mode]
        return Server(
            *(name, address, self.asking.tokenizer, self.options.in_flight),
            timeout_s=self.options.request_timeout,
            text_prompts=self.options.text_prompts,
        )

    def check_servers(self, samples: Path) -> None:
        """Check the servers of the modes whose texts are not all in `samples`. Raises what `Server.check` raises."""
        asking, done = self.asking, read_cells(samples, self.asking.problems)
        prompt = asking.problems[0].prompts[asking.languages[0]]
        for mode in dict.fromkeys(mode for mode, _ in missing_cells(asking, self.modes, done)):
            self._server(mode).check(asking.chat.ids(asking.tokenizer, prompt), asking.ends)

    @contextmanager
    def _reached(self, mode: str) -> Iterator[tuple[()]]:
        self.asking.running.writer = self._server(mode)
        try:
            yield ()
        finally:
            self.asking.running.writer = None

    @contextmanager
    def _running(self, variant: Variant) -> Iterator[tuple[()]]:
        with writing(self.asking, variant, self.engine) as engine:
            if not self.options.no_damage and variant.mode in self.modes:
                self.losses[variant.mode] = self._losses(engine)
            report = engine.report()
            if report is not None:
                self.providers[variant.mode] = report["provider"]
            yield ()

    def for_controls(self) -> dict[str, Any]:
        return in_engine(self._running, self.folder)

    def _losses(self, engine: Engine) -> dict[str, list[tuple[float, int]]]:
        """Return {language: [(loss in nats, tokens) of every neutral sentence]}."""
        texts = neutral("test")
        found = {}
        for language in self.asking.languages:
            encoded = [self.asking.tokenizer(text).input_ids for text in texts[language]]
            found[language] = [(-float(log.sum()), len(log)) for log in engine.log_probabilities(encoded)]
        return found

    def effects(self) -> dict[str, Any] | None:
        if self.options.no_damage or self.options.engine == SERVER:
            return None
        for mode in self.modes:
            if mode not in self.losses:  # its texts were there already
                with self.blocks()[mode]():
                    pass
        original, losses = self.losses["original"], {}
        for mode in self.modes[1:]:
            losses[mode] = {lang: _ratio(original[lang], self.losses[mode][lang]) for lang in self.asking.languages}
        return {"neutral": {}, "losses": losses}

    def in_words(self, effects: dict[str, Any] | None) -> str:
        if self.options.mode == "original":
            return "damage: none, the model is not edited"
        if effects is None:
            why = "--no-damage" if self.options.no_damage else "a server gives no logits; eval without --engine does"
            return f"damage: not measured ({why})"
        words = "; ".join(
            f"{mode} " + ", ".join(f"{lang} x{r['perplexity_ratio']:.3g}" for lang, r in by.items())
            for mode, by in effects["losses"].items()
        )
        said = f"Perplexity on neutral text: {words}"
        first = next(iter(effects["losses"].values()))
        # A uniform guess has the perplexity of the vocabulary's size.
        if lost := [lang for lang, r in first.items() if r["original_perplexity"] >= self.config["vocab_size"]]:
            said += f". It says nothing in {', '.join(lost)}: the original predicts that text worse than a uniform "
            said += "guess"
        return f"damage: not judged. {self.name} gives no logits, and KL needs them: eval without --engine. {said}"

    def provider(self, edits: dict[str, dict[str, Any]]) -> str:
        for mode, provider in self.providers.items():
            if mode in edits:
                edits[mode]["provider"] = f"{self.name}, {provider}"
        return edits["fused"]["provider"] if "fused" in edits else self.name


def _ratio(original: list[tuple[float, int]], edited: list[tuple[float, int]]) -> dict[str, Any]:
    """Return the figures of one mode in one language, beside the original's. Each list: (loss, tokens) by sentence."""
    before, tokens = np.array(original, dtype=np.float64).T
    after, _ = np.array(edited, dtype=np.float64).T
    low, high = ratio_interval(after - before, tokens)
    each = [float(np.exp(loss.sum() / tokens.sum())) for loss in (after, before)]
    return {
        **{"sentences": len(tokens), "tokens": int(tokens.sum()), "perplexity": each[0]},
        **{"original_perplexity": each[1], "perplexity_ratio": each[0] / each[1]},
        "perplexity_ratio_ci95": [float(np.exp(low)), float(np.exp(high))],
    }


@contextmanager
def served(
    options: Options,
    asked: Asked,
    subspace: Subspace | None,
    chat: Chat,
    dtype: torch.dtype,
    check: Callable[[Path, dict[str, Any]], object],
) -> Iterator[Served]:
    """Prepare an engine: check the model's files and the edit, and write what the modes load. No engine is started yet.

    check: called with the model's folder and configuration. Raises what the checks and `engines.variants` raise.
    """
    assert options.out is not None  # `Options.with_folder`
    modes = engine_modes(options.mode, options.engine)
    prompts = [problem.prompts[language] for problem in asked.problems for language in asked.languages]
    source, config, tokenizer, longest = check_files(options.model, prompts, options.budget, check, chat)
    neutral_lengths = [len(tokenizer(text).input_ids) + 1 for lang in asked.languages for text in neutral("test")[lang]]
    positions = max(longest + options.budget, max(neutral_lengths, default=0))
    more = parse_arguments(options.engine_args)
    engine = EngineOptions(positions, dtype, options.tensor_parallel, more)
    about = (asked.problems, asked.languages, options.budget, chat, stored_end_tokens(source, tokenizer))
    asking = EngineAsking(tokenizer, *about)
    if options.engine == SERVER:
        backend = Served(asking, options, subspace, source, config, {}, engine)
        backend.check_servers(options.out / "samples.jsonl")
        yield backend
        return
    require_vllm()
    written = {} if options.written is None else {options.mode: options.written[0]}
    about_edit = (modes, source, subspace, options.strength)
    with variants(*about_edit, written=written, force=options.force, beside=options.out) as (found, _):
        yield Served(asking, options, subspace, source, config, found, engine)
