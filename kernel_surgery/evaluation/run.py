"""One evaluation, from its options to results.json, samples.jsonl and report.html.

The same problems are put to the original model and to the edited one, in the same process, and compared problem by
problem.

    strict   (default) the test split, one final answer per text, exact comparison, intervals and corrected tests
    expag    the reference script's 20 problems and its own scoring, for continuity with its figures; nothing else
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.edit.modes import applied, describe_edit, modes_of
from kernel_surgery.evaluation.answering import Context, answer_cells
from kernel_surgery.evaluation.controls import parse_controls, run_controls
from kernel_surgery.evaluation.effects import measure_effects
from kernel_surgery.evaluation.judging import Cells, score_again
from kernel_surgery.evaluation.report import write_report
from kernel_surgery.evaluation.samples import digest, open_run, take_up, write_cells
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, summarize
from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.models.load import (
    POLYGLOT_SUBSPACE,
    load_model,
    load_tokenizer,
    parse_device,
    parse_dtype,
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
from kernel_surgery.subspace.fitting import variance_captured

# No text depends on these: they may change when a run goes on.
LATER = ("out", "resume", "controls", "margin", "no_damage", "certificate")


@dataclass(frozen=True)
class Options:
    """What an evaluation is asked for; the options of `python -m kernel_surgery.eval`, by the same names.

    problems: per category (None: 40). max_new_tokens: None is 256, or the script's 128 with protocol "expag".
    out: folder for the results (None: results/<date>-<mode>-<protocol>).
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
        """Most new tokens of a text."""
        return self.max_new_tokens if self.max_new_tokens is not None else 256 if self.strict else 128

    def check(self) -> None:
        """Raises UserError for what cannot be asked."""
        for name, value in (("--max-new-tokens", self.budget), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        check_finite_strength(self.strength)
        if not self.margin > 0:
            raise UserError(f"--margin must be positive, got {self.margin}.")
        if self.controls and (self.mode == "original" or not self.strict):
            raise UserError("--controls goes with an edited mode and the strict protocol. Nothing was written.")
        parse_controls(self.controls)

    def asked(self, languages: tuple[str, ...]) -> list[Problem]:
        """The problems that the protocol asks. Raises UserError for options that do not go with it."""
        if self.strict:
            return problems("test", 40 if self.problems is None else self.problems, seed=self.seed)
        if foreign := [language for language in languages if language not in EXPAG_LANGUAGES]:
            raise UserError(
                f"the expag protocol has no problems in {foreign[0]!r}: it is the script's 20, in en and zh."
            )
        if self.problems is not None:
            raise UserError("the expag protocol is exactly 20 problems: leave --problems out.")
        return expag_problems()


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its folder, what results.json holds, and the samples of every (mode, language)."""

    folder: Path
    results: dict
    cells: Cells


def subspace_of(options: Options) -> tuple[Subspace | None, Path | None]:
    """(Subspace, path) for the modes that need one, else (None, None). Raises UserError where it is missing."""
    if options.mode == "original":
        return None, None
    if options.subspace is None and options.model != "polyglot":
        raise UserError(
            f"--mode {options.mode} needs --subspace for {options.model!r}. Make one with kernel_surgery.collect and "
            ".fit."
        )
    path = options.subspace or POLYGLOT_SUBSPACE
    return Subspace.load(path, force=options.force), path


def read_certificate(path: Path | None) -> dict | None:
    """A certificate of `verify`, for the report. Raises UserError for a file that is not one."""
    if path is None:
        return None
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
        if certificate["kind"] != "certificate":
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is no certificate of python -m kernel_surgery.verify.") from error
    return certificate


def check_edits(modes: list[str], model, subspace: Subspace | None, options: Options) -> dict[str, dict]:
    """Make and undo every edit once; {mode: its record}. What cannot be done is found before anything is written."""
    edits = {}
    for mode in modes:
        with applied(mode, model, subspace, options.strength, options.force) as made:
            for edit in made:
                edits[mode] = describe_edit(edit)
    return edits


def notes_of(subspace: Subspace | None, edits: dict[str, dict], options: Options) -> list[str]:
    """What every output says beside the figures. Raises UserError for a subspace fitted on the problems asked."""
    notes = [edit["note"] for edit in edits.values() if edit["note"]]
    for edit in edits.values():
        for reason in dict.fromkeys(edit["fallbacks"].values()):
            layers = [layer for layer, why in edit["fallbacks"].items() if why == reason]
            reach = edit["reach"][layers[0]]
            notes.append(f"fused no further than the {reach} in layers {', '.join(layers)}: {reason}")
    if not options.strict:
        notes.append("expag: the reference script's problems and scoring, quirks included, for continuity only")
    elif subspace is not None:
        split = (subspace.fit or {}).get("split")
        if split == "test" and not options.force:
            raise UserError(
                "the subspace was fitted on the test split, the problems that are asked here. Nothing was written. "
                "Collect on the fit split, or use --force to see the figures with that note beside them."
            )
        if split == "test":
            notes.append("the subspace was fitted on the test split: nothing here is held out")
        elif split is None:
            notes.append("the subspace does not say which problems it was fitted on: they may be among those asked")
    return list(dict.fromkeys(notes))


def configuration(options: Options, context: Context, subspace_path: Path | None, environment: dict) -> dict:
    """config.json: everything that a text depends on. The same options with other weights are another run."""
    config = {key: value for key, value in asdict(options).items() if key not in LATER}
    return config | {
        "languages": list(context.languages),
        "problems": len(context.problems),
        "max_new_tokens": context.budget,
        "dtype": name_of(context.model.dtype),
        "device": context.model.device.type,
        "subspace": hashlib.sha256(subspace_path.read_bytes()).hexdigest() if subspace_path else None,
        "weights": digest(fingerprint(context.model)),
        "prompts": digest([[p.id, p.prompts[lang]] for p in context.problems for lang in context.languages]),
        "versions": {name: environment[name] for name in ("kernel_surgery", "torch", "transformers")},
    }


def describe_model(name: str, model) -> dict:
    """What results.json says of the model."""
    return {
        "id": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": model.config.model_type,
        "layers": len(decoder_layers(model)),
        "d_model": model.config.hidden_size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def describe_subspace(subspace: Subspace, path: Path, sha256: str) -> dict:
    """What results.json says of the subspace: where it comes from, the variance it captures, its singular values."""
    spectrum = {str(layer): values for layer, values in subspace.spectrum.items() if layer in subspace.bases}
    leading = max(40, 2 * subspace.rank)
    return {
        "file": path.name,
        "sha256": sha256,
        "model_id": subspace.model_id,
        "rank": subspace.rank,
        "layers": list(subspace.layers),
        "site": subspace.site,
        "pool": subspace.pool,
        "fit": subspace.fit,
        "captured": {layer: variance_captured(values, subspace.rank) for layer, values in spectrum.items()},
        "spectrum": {layer: values[:leading].tolist() for layer, values in spectrum.items()},
    }


def evaluate(
    options: Options | None = None,
    *,
    command: str | None = None,
    say: Callable[[str], object] = lambda line: None,
    **settings,
) -> Evaluation:
    """Answer, judge, compare, and write results.json, samples.jsonl and report.html.

    options: or, as keywords, what differs from the defaults of `Options`: `evaluate(mode="hook", problems=4)`.
    command: the command line, for the record. say: is told what is about to take long. A run that was cut short goes
    on with `resume`: every finished mode and language is kept.

    Raises KernelSurgeryError for what cannot be asked or loaded, before anything is written.
    """
    options = options or Options(**settings)
    languages = parse_languages(options.languages)
    asked = options.asked(languages)
    options.check()
    certificate = read_certificate(options.certificate)
    source, device = resolve_model(options.model), parse_device(options.device)
    dtype = parse_dtype(options.dtype, device)
    subspace, subspace_path = subspace_of(options)
    modes = modes_of(options.mode)
    if options.resume and options.out is None:
        raise UserError("--resume goes on with the run in --out: name that folder.")
    default = Path("results") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.mode}-{options.protocol}"
    folder, environment = options.out or default, environment_record(device)
    model, tokenizer = load_model(source, dtype, device), load_tokenizer(source)
    context = Context(model, tokenizer, tuple(asked), languages, options.budget, options.batch_size)
    edits = check_edits(modes, model, subspace, options)
    notes = notes_of(subspace, edits, options)
    config = configuration(options, context, subspace_path, environment)
    open_run(folder, config, resume=options.resume)

    samples, started = folder / "samples.jsonl", time.monotonic()
    done = take_up(samples, asked, score_again(tokenizer))
    blocks = {mode: partial(applied, mode, model, subspace, options.strength, options.force) for mode in modes}
    cells = answer_cells(context, blocks, done, samples)
    made = len(cells.keys() - done.keys()) * len(asked)
    pace = (time.monotonic() - started) / made if made else None
    controls = damage = None
    if options.controls:
        controls = run_controls(
            context, cells, folder, subspace, options.controls, options.mode, options.strength, options.seed, pace, say
        )
    if options.strict and not options.no_damage:
        damage = measure_effects(
            context, modes, subspace, strength=options.strength, seed=options.seed, force=options.force
        )
    paired = pair(cells, options.margin)
    results = {
        "schema": 1,
        "config": config,
        "environment": environment | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "model": describe_model(options.model, model),
        "subspace": None if subspace is None else describe_subspace(subspace, subspace_path, config["subspace"]),
        "certificate": certificate,
        "command": command,
        # What ran the edit: the operator's provider where it was used, else PyTorch's own operations.
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
