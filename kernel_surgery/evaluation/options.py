"""The options of an evaluation, and which problems they ask."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernel_surgery.checkpoint.record import read_provenance
from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.errors import UserError
from kernel_surgery.engines.server import TIMEOUT_S, read_served
from kernel_surgery.engines.texts import ENGINES, SERVER, TRANSFORMERS, VLLM, parse_arguments
from kernel_surgery.engines.variants import engine_modes
from kernel_surgery.evaluation.controls import parse_controls
from kernel_surgery.files.problems import Given, problem_source
from kernel_surgery.problems.generator import EXPAG_LANGUAGES, Problem, expag_problems, parse_languages

# No text depends on these options, so they may change when a run is resumed.
LATER = (
    *("out", "resume", "controls", "margin", "no_damage", "certificate", "baked", "adapter"),
    *("in_flight", "request_timeout"),
)

# What is recorded only for the engine that it belongs to (`Options.engine_record`).
OF_ENGINES = ("engine", "tensor_parallel", "engine_args", "base_url", "served", "text_prompts")


@dataclass(frozen=True)
class Asked:
    """The problems of an evaluation and its languages. record, note: what records and outputs say of their origin.

    alike: what outputs say of wordings that a fit on the same file has seen (`Source.worded_alike`). seen: the share of
    such prompts.
    """

    problems: tuple[Problem, ...]
    languages: tuple[str, ...]
    record: dict[str, Any]
    note: str | None
    alike: str | None = None
    seen: float = 0.0


def check_engine_controls(controls: str | None, engine: str) -> None:
    """Raise UserError for controls, such as "pca:20", that an engine cannot be asked, and what `parse_controls` raises.

    engine: one of `engines.texts.ENGINES`.
    """
    parsed = parse_controls(controls)
    if not parsed or engine == TRANSFORMERS or (engine == VLLM and parsed[0] == "haar"):
        return
    why = "a server does not load them." if engine == SERVER else "it gives no activations. Use haar:N."
    raise UserError(f"--controls {controls} cannot be asked of {engine}: {why}")


@dataclass(frozen=True)
class Options:
    """The options of an evaluation, with the names that `python -m kernel_surgery.eval` uses.

    mode: how the edit is made, or "all".
    model: "polyglot" (the embedded model), a folder, or a hub id.
    subspace: the subspace file (None: the one shipped with polyglot).
    protocol: "strict" or "expag" (see the module).
    languages: comma-separated, or "all".
    problems: number per category (None: 40), or files (`files.problems`). seed: selects the generated ones.
    max_new_tokens: the budget per text (None: 256, or the reference script's 128 with protocol "expag").
    strength: a in the edit y - a U (U^T y).
    controls: such as "haar:20": also ask that many random subspaces.
    margin: accuracies that differ by less than this are equivalent.
    certificate: JSON file from `verify`, shown in the report.
    no_damage: skip neutral text and language probes.
    out: folder for the results (None: results/<date>-<mode>-<protocol>). resume: continue the run in it.
    chat: "auto", "on" or "off", how prompts are put to the model (`models.chat`). thinking: let it think.
    baked, adapter: a folder from `bake` or `lora`, evaluated as it was written, as mode "baked" or "lora".
    force: accept a subspace of unknown origin, or one fitted on another model or on the test split.
    engine: who writes the texts: "transformers" (here), "vllm" (here) or "openai" (any server of that protocol).
    tensor_parallel, engine_args: of vLLM: the number of devices, and more arguments of `vllm.LLM` as JSON.
    base_url, served, in_flight: of a server: its address, MODE=NAME of the models that it serves, and how many requests
    it has at a time. request_timeout: the seconds that one try of one request may take. text_prompts: send prompts as
    text, to a server that takes no token ids.
    """

    mode: str = "fused"
    model: str = "polyglot"
    subspace: Path | None = None
    protocol: str = "strict"
    languages: str = "en,zh"
    problems: Given = None
    seed: int = 0
    max_new_tokens: int | None = None
    strength: float = 1.0
    controls: str | None = None
    margin: float = 0.05
    certificate: Path | None = None
    no_damage: bool = False
    chat: str = "auto"
    thinking: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 64
    engine: str = TRANSFORMERS
    tensor_parallel: int = 1
    engine_args: str | None = None
    base_url: str | None = None
    served: Sequence[str] = ()
    in_flight: int = 32
    request_timeout: float = TIMEOUT_S
    text_prompts: bool = False
    out: Path | None = None
    resume: bool = False
    baked: Path | None = None
    adapter: Path | None = None
    force: bool = False

    @property
    def strict(self) -> bool:
        return self.protocol == "strict"

    @property
    def budget(self) -> int:
        """The maximum number of new tokens per text."""
        return self.max_new_tokens if self.max_new_tokens is not None else 256 if self.strict else 128

    @property
    def written(self) -> tuple[Path, str] | None:
        """The folder of an edit that was made before and its kind, "baked" or "adapter"; else None."""
        return (self.baked, "baked") if self.baked else (self.adapter, "adapter") if self.adapter else None

    def as_written(self) -> "Options":
        """The same options; with `baked` or `adapter`, mode and strength are the folder's.

        Raises UserError for options that contradict it, and CheckpointError for a folder of another kind.
        """
        if self.written is None:
            return self
        (folder, kind), mode = self.written, "baked" if self.baked else "lora"
        option = f"--{kind} {str(folder)!r}"
        if self.baked and self.adapter:
            raise UserError("give --baked or --adapter, not both.")
        if self.subspace is not None:
            raise UserError(f"{option} has its own subspace: leave out --subspace.")
        if self.mode not in ("fused", mode):  # fused is the default
            raise UserError(f"{option} is evaluated as mode {mode}: leave out --mode {self.mode}.")
        strength = float(read_provenance(folder, kind)["strength"])
        if self.strength not in (1.0, strength):  # 1 is the default
            raise UserError(f"{option} was made at strength {strength:g}: leave out --strength {self.strength:g}.")
        return replace(self, mode=mode, strength=strength)

    def with_folder(self) -> "Options":
        """The same options with `out` set: to the default folder where none was named."""
        if self.out is not None or self.resume:
            return self
        return replace(self, out=Path("results") / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.mode}-{self.protocol}")

    def check(self) -> None:
        """Check the options. Raises UserError for values that cannot be used."""
        for name, value in (("--max-new-tokens", self.budget), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        check_finite_strength(self.strength)
        if not self.margin > 0:
            raise UserError(f"--margin must be positive, got {self.margin}.")
        if self.controls and (self.mode == "original" or not self.strict):
            raise UserError("--controls needs an edited mode (not --mode original) and --protocol strict.")
        parse_controls(self.controls)
        self.check_engine()

    @property
    def engine_record(self) -> dict[str, Any]:
        """The fields of the engine that texts depend on, for the record: none for transformers.

        Of a server's models they hold the names and no addresses: a server may move, and records travel.
        """
        if self.engine == SERVER:
            served, modes = self.served_models(), engine_modes(self.mode, self.engine)
            names = {mode: served[mode][0] for mode in modes}
            return {"engine": SERVER, "served": names, "text_prompts": self.text_prompts}
        names_of = {TRANSFORMERS: (), VLLM: ("engine", "tensor_parallel", "engine_args")}
        return {name: getattr(self, name) for name in names_of[self.engine]}

    def check_engine(self) -> None:
        """Check the options of an engine. Raises UserError for those that it does not have."""
        if self.engine not in ENGINES:
            raise UserError(f"--engine is {self.engine!r}: choose from {', '.join(ENGINES)}.")
        for name, value in (("--tensor-parallel", self.tensor_parallel), ("--in-flight", self.in_flight)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.request_timeout < float("inf"):
            raise UserError(f"--request-timeout must be positive seconds, got {self.request_timeout}.")
        for name, given, engine in (
            ("--tensor-parallel", self.tensor_parallel != 1, VLLM),
            ("--engine-args", self.engine_args is not None, VLLM),
            ("--base-url", self.base_url is not None, SERVER),
            ("--served", bool(self.served), SERVER),
            ("--request-timeout", self.request_timeout != TIMEOUT_S, SERVER),
            ("--text-prompts", self.text_prompts, SERVER),
        ):
            if given and self.engine != engine:
                raise UserError(f"{name} is for --engine {engine}, not --engine {self.engine}.")
        if self.engine == TRANSFORMERS:
            return
        if self.device != "auto":
            raise UserError(f"--device is for --engine transformers: {self.engine} has its own.")
        if self.engine == SERVER and self.dtype != "auto":
            raise UserError("--dtype is not for --engine openai: the server has its own.")
        modes = engine_modes(self.mode, f"--engine {self.engine}")
        check_engine_controls(self.controls, self.engine)
        if self.engine == SERVER and (missing := [mode for mode in modes if mode not in self.served_models()]):
            raise UserError(f"--engine openai needs --served {missing[0]}=NAME, the served model of that mode.")
        parse_arguments(self.engine_args)

    def served_models(self) -> dict[str, tuple[str, str]]:
        """Return {mode: (name, address)} of a server's models. Raises what `read_served` raises."""
        return read_served(self.served, self.base_url)

    def asked(self) -> "Asked":
        """Return the problems that the protocol asks.

        Raises UserError for options that the protocol does not allow, and what `problem_source` raises.
        """
        if self.strict:
            source = problem_source(self.problems, seed=self.seed)
            languages = source.languages(self.languages)
            about = source.record, source.note("test"), source.worded_alike("test")
            return Asked(tuple(source.split("test")), languages, *about)
        languages = parse_languages(self.languages)
        if foreign := [language for language in languages if language not in EXPAG_LANGUAGES]:
            raise UserError(
                f"--protocol expag has no problems in {foreign[0]!r}: the reference script's 20 are in en and zh."
            )
        if self.problems is not None:
            raise UserError("--protocol expag always uses the reference script's 20 problems: omit --problems.")
        return Asked(tuple(expag_problems()), languages, {}, None)
