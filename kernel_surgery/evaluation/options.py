"""The options of an evaluation, and which problems they ask."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernel_surgery.checkpoint.record import read_provenance
from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.controls import parse_controls
from kernel_surgery.files.problems import Given, problem_source
from kernel_surgery.problems.generator import EXPAG_LANGUAGES, Problem, expag_problems, parse_languages

# No text depends on these options, so they may change when a run is resumed.
LATER = ("out", "resume", "controls", "margin", "no_damage", "certificate", "baked", "adapter")


@dataclass(frozen=True)
class Asked:
    """The problems of an evaluation and its languages. record, note: what records and outputs say of their origin."""

    problems: tuple[Problem, ...]
    languages: tuple[str, ...]
    record: dict[str, Any]
    note: str | None


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

    def asked(self) -> "Asked":
        """Return the problems that the protocol asks.

        Raises UserError for options that the protocol does not allow, and what `problem_source` raises.
        """
        if self.strict:
            source = problem_source(self.problems, seed=self.seed)
            languages = source.languages(self.languages)
            return Asked(tuple(source.split("test")), languages, source.record, source.note("test"))
        languages = parse_languages(self.languages)
        if foreign := [language for language in languages if language not in EXPAG_LANGUAGES]:
            raise UserError(
                f"--protocol expag has no problems in {foreign[0]!r}: the reference script's 20 are in en and zh."
            )
        if self.problems is not None:
            raise UserError("--protocol expag always uses the reference script's 20 problems: omit --problems.")
        return Asked(tuple(expag_problems()), languages, {}, None)
