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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.checkpoint.source import check_edit
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import BEFORE_CHAT
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.measure import headline
from kernel_surgery.edit.modes import applied, describe_edit, modes_of
from kernel_surgery.evaluation.answering import Context, EditBlock, answer_cells
from kernel_surgery.evaluation.controls import run_controls
from kernel_surgery.evaluation.describing import describe_model, describe_subspace
from kernel_surgery.evaluation.effects import measure_effects
from kernel_surgery.evaluation.judging import Cells, score_again
from kernel_surgery.evaluation.notes import check_held_out, notes_of
from kernel_surgery.evaluation.options import LATER, Asked, Options
from kernel_surgery.evaluation.report import write_report
from kernel_surgery.evaluation.samples import check_run, digest, open_run, write_cells
from kernel_surgery.evaluation.shares import answer_together, refuse_other_shares, take_up_together
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, summarize
from kernel_surgery.evaluation.written import read_written
from kernel_surgery.files.contents import PROVENANCE
from kernel_surgery.models.before import load_checked
from kernel_surgery.models.chat import OFF, Chat, choose_chat
from kernel_surgery.models.load import (
    POLYGLOT_SUBSPACE,
    local_folder,
    parse_device,
    parse_dtype,
    public_name,
    resolve_model,
)
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    if options.written is not None:
        folder, kind = options.written
        return read_written(folder, kind, local_folder(resolve_model(options.model))), folder / PROVENANCE
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


def configuration(
    options: Options,
    asked: Asked,
    where: tuple[torch.dtype, torch.device],
    subspace_path: Path | None,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Return config.json, everything that a text depends on, but for how they are put (`Chat.record`)
    and "weights": a digest of the model's.

    where: the model's dtype and device.
    """
    dtype, device = where
    config = {key: value for key, value in asdict(options).items() if key not in (*LATER, *BEFORE_CHAT)}
    return config | {
        "model": public_name(options.model),
        "languages": list(asked.languages),
        "problems": len(asked.problems),
        **asked.record,
        "max_new_tokens": options.budget,
        "dtype": name_of(dtype),
        "device": device.type,
        "subspace": hashlib.sha256(subspace_path.read_bytes()).hexdigest() if subspace_path else None,
        "prompts": digest([[p.id, p.prompts[lang]] for p in asked.problems for lang in asked.languages]),
        "versions": {name: environment[name] for name in ("kernel_surgery", "torch", "transformers")},
    }


def _chat_of(options: Options, source: str, config: dict[str, Any]) -> Chat:
    """Return how the prompts are put, and record it in config. The folder is checked before the model is looked at."""
    assert options.out is not None  # `Options.with_folder`
    check_run(options.out, config, resume=options.resume)
    chat = choose_chat(source, options.chat, thinking=options.thinking) if options.strict else OFF
    config |= chat.record()
    check_run(options.out, config, resume=options.resume)
    return chat


def _controls_and_damage(
    context: Context,
    cells: Cells,
    options: Options,
    folder: Path,
    subspace: Subspace | None,
    seconds_per_text: float | None,
    say: Callable[[str], object],
    ranks: Ranks,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Run what is shown beside the answers: random subspaces, and the effects on neutral text. Return both results."""
    controls = damage = None
    if options.controls:
        assert subspace is not None  # `Options.check`
        controls = run_controls(
            *(context, cells, folder, subspace, options.controls, options.mode, options.strength, options.seed),
            *(seconds_per_text, say, ranks),
        )
    if not options.no_damage and ranks.first:
        modes, seed, force = modes_of(options.mode), options.seed, options.force
        damage = measure_effects(
            *(context, modes, subspace), strength=options.strength, seed=seed, force=force, probed=options.strict
        )
    return controls, damage


def _open(ranks: Ranks, folder: Path, config: dict[str, Any], options: Options) -> Path:
    """Open the folder of the run. Process 0 alone writes, when all have seen what was there before.

    Returns the file of the texts.
    """
    samples = folder / "samples.jsonl"
    check_run(folder, config, resume=options.resume)
    refuse_other_shares(samples, ranks)
    ranks.wait()
    if ranks.first:
        open_run(folder, config, resume=options.resume)
    ranks.wait()
    return samples


def _answered(
    ranks: Ranks, context: Context, blocks: dict[str, EditBlock], samples: Path
) -> tuple[Cells, float | None]:
    """Return the cells of all modes in `blocks`, and the seconds per new text if there is one."""
    started, rescore = time.monotonic(), score_again(context.tokenizer, context.chat)
    done = take_up_together(ranks, samples, context.problems, rescore)

    def answer(context: Context, done: Cells, samples: Path) -> Cells:
        return answer_cells(context, blocks, done, samples)

    cells = answer_together(ranks, context, done, samples, answer, rescore)
    new_texts = len(cells.keys() - done.keys()) * len(context.problems)
    return cells, (time.monotonic() - started) / new_texts if new_texts else None


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
    ranks: Ranks = ALONE,
    **settings: Any,
) -> Evaluation:
    """Run an evaluation: generate, judge, compare, and write results.json, samples.jsonl and report.html.

    options: or, as keywords, the fields of `Options` that are not at their defaults: `evaluate(mode="hook",
    problems=4)`.
    command: the command line, for the record.
    say: called with a line of text before a step that takes long.
    ranks: the processes that share the answering (`common.ranks.current`). All call this; process 0 does the rest.

    With `resume`, an interrupted run continues. Every mode and language that was finished is kept.

    Raises KernelSurgeryError for options, models and subspaces that cannot be used. Nothing was written then.
    """
    options = ranks.agreed((options or Options(**settings)).as_written().with_folder())
    asked = options.asked()
    languages, problem_list = asked.languages, asked.problems
    options.check()
    certificate = read_certificate(options.certificate)
    if options.out is None:  # `with_folder` leaves it so with `resume` alone
        raise UserError("--resume needs --out, the folder of the run to continue.")
    source, device = resolve_model(options.model), parse_device(options.device)
    folder, modes = options.out, modes_of(options.mode)
    dtype, environment = parse_dtype(options.dtype, device), environment_record(device)
    subspace, subspace_path = subspace_of(options)
    check_held_out(subspace, options, asked)
    config = configuration(options, asked, (dtype, device), subspace_path, environment)
    chat = _chat_of(options, source, config)

    def check(source: Path, config: dict[str, Any]) -> None:
        if subspace is not None:
            check_edit(source, subspace, modes, force=options.force)

    prompts = [problem.prompts[language] for problem in problem_list for language in languages]
    model, tokenizer = load_checked(source, (dtype, device), prompts, options.budget, check, chat=chat)
    context = Context(model, tokenizer, problem_list, languages, options.budget, options.batch_size, chat)
    edits = check_edits(modes, model, subspace, options)
    notes = notes_of(subspace, edits, options, chat, asked)
    config["weights"] = digest(fingerprint(model))
    samples, started = _open(ranks, folder, config, options), time.monotonic()
    block = partial(applied, model=model, subspace=subspace, strength=options.strength, force=options.force)
    cells, seconds_per_text = _answered(ranks, context, {mode: partial(block, mode) for mode in modes}, samples)
    more = (options, folder, subspace, seconds_per_text, say, ranks)
    controls, damage = _controls_and_damage(context, cells, *more)
    if not ranks.first:
        ranks.wait()
        return Evaluation(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")), cells)
    paired = pair(cells, options.margin)
    results = {
        "damage_in_words": in_words(damage, options),
        "schema": 1,
        "config": config,
        "environment": environment | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | ranks.record(),
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
    ranks.wait()
    return Evaluation(folder, results, cells)
