"""One evaluation, from its options to results.json, samples.jsonl and report.html.

The original and the edited model answer the same problems in the same process. They are compared problem by problem, by
one of two protocols:

    strict   (default) the test split, one final answer per text, exact comparison, intervals and corrected tests
    expag    the 20 problems and the scoring of the reference script that this project began with (`scoring.expag`),
             only to continue its figures
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.checkpoint.source import check_edit
from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.damage.measure import headline
from kernel_surgery.edit.modes import applied, describe_edit, modes_of
from kernel_surgery.evaluation.answering import Context, answer_cells
from kernel_surgery.evaluation.controls import parse_controls, run_controls
from kernel_surgery.evaluation.describing import describe_model, describe_subspace
from kernel_surgery.evaluation.effects import measure_effects
from kernel_surgery.evaluation.judging import Cells, score_again
from kernel_surgery.evaluation.report import write_report
from kernel_surgery.evaluation.samples import check_run, digest, open_run, take_up, write_cells
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, summarize
from kernel_surgery.models.before import load_checked
from kernel_surgery.models.load import (
    POLYGLOT_SUBSPACE,
    parse_device,
    parse_dtype,
    public_name,
    resolve_model,
)
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.problems.generator import (
    EXPAG_LANGUAGES,
    Problem,
    expag_problems,
    parse_languages,
    problems,
)
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# No text depends on these options, so they may change when a run is resumed.
LATER = ("out", "resume", "controls", "margin", "no_damage", "certificate")
# How much of a layer the fused mode took into one operator, in words.
FUSED = {
    "output": "only the edit is fused",
    "add": "the edit is fused with the residual addition only",
    "norm": "the edit is fused with the residual addition and the norm",
}


@dataclass(frozen=True)
class Options:
    """The options of an evaluation, with the names that `python -m kernel_surgery.eval` uses.

    mode: how the edit is made, or "all".
    model: "polyglot" (the embedded model), a folder, or a hub id.
    subspace: the subspace file (None: the one shipped with polyglot).
    protocol: "strict" or "expag" (see the module).
    languages: comma-separated, or "all".
    problems: number per category (None: 40). seed: selects the problems.
    max_new_tokens: the budget per text (None: 256, or the reference script's 128 with protocol "expag").
    strength: a in the edit y - a U (U^T y).
    controls: such as "haar:20": also ask that many random subspaces.
    margin: accuracies that differ by less than this are equivalent.
    certificate: JSON file from `verify`, shown in the report.
    no_damage: skip neutral text and language probes.
    out: folder for the results (None: results/<date>-<mode>-<protocol>). resume: continue the run in it.
    force: accept a subspace of unknown origin, or one fitted on another model or on the test split.
    """

    mode: str = "fused"
    model: str = "polyglot"
    subspace: Path | None = None
    protocol: str = "strict"
    languages: str = "en,zh"
    problems: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    strength: float = 1.0
    controls: str | None = None
    margin: float = 0.05
    certificate: Path | None = None
    no_damage: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 64
    out: Path | None = None
    resume: bool = False
    force: bool = False

    @property
    def strict(self) -> bool:
        return self.protocol == "strict"

    @property
    def budget(self) -> int:
        """The maximum number of new tokens per text."""
        return self.max_new_tokens if self.max_new_tokens is not None else 256 if self.strict else 128

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

    def asked(self, languages: tuple[str, ...]) -> list[Problem]:
        """Return the problems that the protocol asks.

        Raises UserError for options that the protocol does not allow.
        """
        if self.strict:
            return problems("test", 40 if self.problems is None else self.problems, seed=self.seed)
        if foreign := [language for language in languages if language not in EXPAG_LANGUAGES]:
            raise UserError(
                f"--protocol expag has no problems in {foreign[0]!r}: the reference script's 20 are in en and zh."
            )
        if self.problems is not None:
            raise UserError("--protocol expag always uses the reference script's 20 problems: omit --problems.")
        return expag_problems()


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    results: the contents of results.json. cells: the samples of every (mode, language).
    """

    folder: Path
    results: dict[str, Any]
    cells: Cells


def subspace_of(options: Options) -> tuple[Subspace | None, Path | None]:
    """Load the subspace. Return it with its path, or (None, None) for mode "original".

    Raises UserError if the model needs a subspace file and none was named.
    """
    if options.mode == "original":
        return None, None
    if options.subspace is None and options.model != "polyglot":
        raise UserError(
            f"--mode {options.mode} needs --subspace for {options.model!r}. Make one with python -m "
            "kernel_surgery.collect and python -m kernel_surgery.fit."
        )
    path = options.subspace or POLYGLOT_SUBSPACE
    return Subspace.load(path, force=options.force), path


def read_certificate(path: Path | None) -> dict[str, Any] | None:
    """Read a certificate from `verify`. Raises UserError for a file that is not one."""
    if path is None:
        return None
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
        if certificate["kind"] != "certificate":
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a certificate from python -m kernel_surgery.verify.") from error
    return certificate


def check_edits(
    modes: list[str], model: "PreTrainedModel", subspace: Subspace | None, options: Options
) -> dict[str, dict[str, Any]]:
    """Make and undo every edit once. Return {mode: its record as JSON}.

    An edit that cannot be made is thus found before anything is written.
    """
    edits = {}
    for mode in modes:
        with applied(mode, model, subspace, options.strength, options.force) as records:
            for edit in records:
                edits[mode] = describe_edit(edit)
    return edits


def check_held_out(subspace: Subspace | None, options: Options) -> None:
    """Raise UserError if the subspace was fitted on the problems that are asked, unless `force` is set."""
    split = (subspace.fit or {}).get("split") if subspace is not None else None
    if options.strict and split == "test" and not options.force:
        raise UserError(
            "the subspace was fitted on the test problems, on which it would be evaluated here. Collect on the fit "
            "split. With --force the evaluation runs, and its outputs say so."
        )


def notes_of(subspace: Subspace | None, edits: dict[str, dict[str, Any]], options: Options) -> list[str]:
    """Return the notes that every output shows beside the figures."""
    notes = [edit["note"] for edit in edits.values() if edit["note"]]
    for edit in edits.values():
        for reason in dict.fromkeys(edit["fallbacks"].values()):
            layers = [layer for layer, why in edit["fallbacks"].items() if why == reason]
            fused = FUSED[edit["reach"][layers[0]]]
            notes.append(f"in layers {', '.join(layers)}, {fused}: {reason}")
    if not options.strict:
        notes.append("expag: the 20 problems and the scoring of the reference script, only to compare with its figures")
    elif subspace is not None:
        split = (subspace.fit or {}).get("split")
        if split == "test":
            notes.append("the subspace was fitted on the test problems: these figures are not held out")
        elif split is None:
            notes.append("the subspace does not say which problems it was fitted on: they may be the test problems")
    return list(dict.fromkeys(notes))


def configuration(
    options: Options,
    asked: tuple[list[Problem], tuple[str, ...]],
    where: tuple[torch.dtype, torch.device],
    subspace_path: Path | None,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Return config.json, everything that a text depends on, but for "weights": a digest of the model's.

    asked: the problems and the languages. where: the model's dtype and device.
    """
    (asked_problems, languages), (dtype, device) = asked, where
    config = {key: value for key, value in asdict(options).items() if key not in LATER}
    return config | {
        "model": public_name(options.model),
        "languages": list(languages),
        "problems": len(asked_problems),
        "max_new_tokens": options.budget,
        "dtype": name_of(dtype),
        "device": device.type,
        "subspace": hashlib.sha256(subspace_path.read_bytes()).hexdigest() if subspace_path else None,
        "prompts": digest([[p.id, p.prompts[lang]] for p in asked_problems for lang in languages]),
        "versions": {name: environment[name] for name in ("kernel_surgery", "torch", "transformers")},
    }


def _controls_and_damage(
    context: Context,
    cells: Cells,
    options: Options,
    folder: Path,
    subspace: Subspace | None,
    seconds_per_text: float | None,
    say: Callable[[str], object],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Run what is shown beside the answers: random subspaces, and the effects on neutral text. Return both results."""
    controls = damage = None
    if options.controls:
        assert subspace is not None  # `Options.check`
        controls = run_controls(
            *(context, cells, folder, subspace, options.controls, options.mode, options.strength, options.seed),
            *(seconds_per_text, say),
        )
    if not options.no_damage:
        modes, seed, force = modes_of(options.mode), options.seed, options.force
        damage = measure_effects(
            *(context, modes, subspace), strength=options.strength, seed=seed, force=force, probed=options.strict
        )
    return controls, damage


def in_words(damage: dict[str, Any] | None, options: Options) -> str:
    """Return the first line of every output: what the edit did to the model."""
    if options.mode == "original":
        return "damage: none, the model is not edited"
    return headline(damage, "--no-damage")


def evaluate(
    options: Options | None = None,
    *,
    command: str | None = None,
    say: Callable[[str], object] = lambda line: None,
    **settings: Any,
) -> Evaluation:
    """Run an evaluation: generate, judge, compare, and write results.json, samples.jsonl and report.html.

    options: or, as keywords, the fields of `Options` that are not at their defaults: `evaluate(mode="hook",
    problems=4)`.
    command: the command line, for the record.
    say: called with a line of text before a step that takes long.

    With `resume`, an interrupted run continues. Every mode and language that was finished is kept.

    Raises KernelSurgeryError for options, models and subspaces that cannot be used. Nothing was written then.
    """
    options = (options or Options(**settings)).with_folder()
    languages = parse_languages(options.languages)
    problem_list = options.asked(languages)
    options.check()
    certificate = read_certificate(options.certificate)
    if options.out is None:  # `with_folder` leaves it so with `resume` alone
        raise UserError("--resume needs --out, the folder of the run to continue.")
    source, device = resolve_model(options.model), parse_device(options.device)
    folder, modes = options.out, modes_of(options.mode)
    dtype, environment = parse_dtype(options.dtype, device), environment_record(device)
    subspace, subspace_path = subspace_of(options)
    check_held_out(subspace, options)
    config = configuration(options, (problem_list, languages), (dtype, device), subspace_path, environment)
    check_run(folder, config, resume=options.resume)

    def check(source: Path, config: dict[str, Any]) -> None:
        if subspace is not None:
            check_edit(source, subspace, modes, force=options.force)

    prompts = [problem.prompts[language] for problem in problem_list for language in languages]
    model, tokenizer = load_checked(source, (dtype, device), prompts, options.budget, check)
    context = Context(model, tokenizer, tuple(problem_list), languages, options.budget, options.batch_size)
    edits = check_edits(modes, model, subspace, options)
    notes = notes_of(subspace, edits, options)
    config["weights"] = digest(fingerprint(model))
    open_run(folder, config, resume=options.resume)

    samples, started = folder / "samples.jsonl", time.monotonic()
    done = take_up(samples, problem_list, score_again(tokenizer))
    blocks = {mode: partial(applied, mode, model, subspace, options.strength, options.force) for mode in modes}
    cells = answer_cells(context, blocks, done, samples)
    new_texts = len(cells.keys() - done.keys()) * len(problem_list)
    seconds_per_text = (time.monotonic() - started) / new_texts if new_texts else None
    controls, damage = _controls_and_damage(context, cells, options, folder, subspace, seconds_per_text, say)
    paired = pair(cells, options.margin)
    results = {
        "damage_in_words": in_words(damage, options),
        "schema": 1,
        "config": config,
        "environment": environment | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "model": describe_model(public_name(options.model), model),
        "subspace": describe_subspace(subspace, subspace_path, config["subspace"]),
        "certificate": certificate,
        "command": command,
        # The code that ran the edit: the fused operator's if it was used, else PyTorch's own operations.
        "provider": edits["fused"]["provider"] if "fused" in edits else f"aten/{device.type}",
        "edits": edits,
        "notes": notes,
        "modes": {m: {lang: summarize(cells[m, lang], context.budget) for lang in languages} for m in modes},
        "paired": paired,
        "power": power(paired),
        "controls": controls,
        "damage": damage,
        "expag_metrics": expag_metrics(cells),
        "seconds": time.monotonic() - started,
    }
    write_cells(samples, cells)
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_report(folder / "report.html", results, cells)
    return Evaluation(folder, results, cells)
