"""One evaluation, from its options to results.json, samples.jsonl and report.html.

The original and the edited model answer the same problems in the same process. They are compared problem by problem, by
one of two protocols:

    strict   (default) the test split, one final answer per text, exact comparison, intervals and corrected tests
    expag    the 20 problems and the scoring of the reference script that this project began with (`scoring.expag`),
             only to continue its figures
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.checkpoint.source import check_edit, refuse_baked
from kernel_surgery.common.environment import environment_record, now
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import BEFORE_CHAT, PROVENANCE
from kernel_surgery.common.progress import waiting
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.edit.modes import modes_of
from kernel_surgery.engines.offline import require_vllm
from kernel_surgery.engines.texts import SERVER, TRANSFORMERS, VLLM
from kernel_surgery.evaluation.answering import Asking, Context, EditBlock, answer_cells
from kernel_surgery.evaluation.backends import Backend, Loaded
from kernel_surgery.evaluation.controls import run_controls
from kernel_surgery.evaluation.describing import describe_subspace
from kernel_surgery.evaluation.judging import Cells, score_again
from kernel_surgery.evaluation.notes import check_held_out, floor_notes, notes_of, text_notes
from kernel_surgery.evaluation.options import LATER, OF_ENGINES, Asked, Options
from kernel_surgery.evaluation.report import write_report
from kernel_surgery.evaluation.samples import check_run, digest, open_run, write_cells
from kernel_surgery.evaluation.served import served
from kernel_surgery.evaluation.shares import answer_together, refuse_other_shares, take_up_together
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, summarize
from kernel_surgery.evaluation.written import read_written
from kernel_surgery.files.hashing import sha256
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
        refuse_baked(
            Path(options.model),
            "Ask it alone with --mode original, or beside its original: --model ORIGINAL --baked THIS (an adapter: "
            "--adapter THIS).",
        )
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


def check_certificate(
    certificate: dict[str, Any], options: Options, config: dict[str, Any], subspace: Subspace
) -> None:
    """Raise UserError for a certificate of another edit than the one that is evaluated.

    What an older certificate does not say is not compared.
    """
    folder, of = options.baked or options.adapter, certificate.get("of") or {}
    ours = {"strength": config["strength"], "rank": subspace.rank, "subspace_sha256": config["subspace"]}
    ours |= {"record_sha256": None if folder is None else sha256(folder / PROVENANCE)}
    theirs = {name: certificate.get(name, of.get(name)) for name in ours}
    for name, value in ours.items():
        if None not in (value, theirs[name]) and value != theirs[name]:
            raise UserError(
                f"{str(options.certificate)!r} certifies another edit: its {name} is {theirs[name]}, and here "
                f"it is {value}. Make one of this edit: python -m kernel_surgery.verify."
            )


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
    left_out = (*LATER, *BEFORE_CHAT, *OF_ENGINES)
    config = {key: value for key, value in asdict(options).items() if key not in left_out}
    return config | {
        **options.engine_record,
        **({"engine_version": require_vllm()} if options.engine == VLLM else {}),
        "model": public_name(options.model),
        "languages": list(asked.languages),
        "problems": len(asked.problems),
        **asked.record,
        "max_new_tokens": options.budget,
        "dtype": name_of(dtype) if options.engine != SERVER else "dtype of the server",
        "device": device.type if options.engine != SERVER else "server",
        "subspace": sha256(subspace_path) if subspace_path else None,
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


@contextmanager
def opened(
    options: Options, asked: Asked, subspace: Subspace | None, chat: Chat, where: tuple[torch.dtype, torch.device]
) -> Iterator[Backend]:
    """Load the model, or prepare the engine, and yield it.

    where: the model's dtype and device. Raises what `load_checked`, `check_edit` and `served` raise.
    """
    modes = [mode for mode in modes_of(options.mode) if options.engine == TRANSFORMERS or mode != "hook"]

    def check(source: Path, config: dict[str, Any]) -> None:
        if subspace is not None:
            check_edit(source, subspace, modes, force=options.force)

    if options.engine != TRANSFORMERS:
        with served(options, asked, subspace, chat, where[0], check) as backend:
            yield backend
        return
    prompts = [problem.prompts[language] for problem in asked.problems for language in asked.languages]
    source = resolve_model(options.model)
    model, tokenizer = load_checked(source, where, prompts, options.budget, check, chat=chat)
    about = (asked.problems, asked.languages, options.budget, options.batch_size, chat)
    yield Loaded(Context(model, tokenizer, *about), options, subspace)


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
    ranks: Ranks, asking: Asking, blocks: dict[str, EditBlock], samples: Path
) -> tuple[Cells, float | None]:
    """Return the cells of all modes in `blocks`, and the seconds per new text if there is one."""
    started, rescore = time.monotonic(), score_again(asking.tokenizer, asking.chat)
    done = take_up_together(ranks, samples, asking.problems, rescore)

    def answer(asking: Asking, done: Cells, samples: Path) -> Cells:
        return answer_cells(asking, blocks, done, samples)

    cells = answer_together(ranks, asking, done, samples, answer, rescore)
    new_texts = len(cells.keys() - done.keys()) * len(asking.problems)
    return cells, (time.monotonic() - started) / new_texts if new_texts else None


def _ran(
    backend: Backend,
    options: Options,
    asked: Asked,
    subspace: Subspace | None,
    chat: Chat,
    config: dict[str, Any],
    ranks: Ranks,
    say: Callable[[str], object],
) -> tuple[dict[str, Any], Cells]:
    """Ask the problems, and measure what is shown beside the texts. Return entries of results.json, and the cells."""
    assert options.out is not None  # `evaluate`
    edits = backend.edits()
    notes = notes_of(subspace, edits, options, chat, asked)
    config["weights"] = backend.weights()
    samples, started = _open(ranks, options.out, config, options), time.monotonic()
    cells, pace = _answered(ranks, backend.asking, backend.blocks(), samples)
    controls = damage = None
    if options.controls:
        assert subspace is not None  # `Options.check`
        about = (subspace, options.controls, options.mode, options.strength, options.seed, pace, say, ranks)
        controls = run_controls(backend.asking, cells, options.out, *about, **backend.for_controls())
    if ranks.first:
        damage = backend.effects()
    ran = {
        **{"damage_in_words": backend.in_words(damage), "model": backend.description()},
        **{"provider": backend.provider(edits), "edits": edits, "notes": notes + text_notes(options, cells)},
        **{"controls": controls, "damage": damage, "seconds": time.monotonic() - started},
    }
    return ran, cells


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
    languages = asked.languages
    options.check()
    if ranks.size > 1 and options.engine != TRANSFORMERS:
        raise UserError(
            f"--engine {options.engine} answers all problems itself, so it runs in one process, not {ranks.size}. Use "
            "--tensor-parallel for more devices, --in-flight for more requests."
        )
    certificate = read_certificate(options.certificate)
    if options.out is None:  # `with_folder` leaves it so with `resume` alone
        raise UserError("--resume needs --out, the folder of the run to continue.")
    source, device = resolve_model(options.model), parse_device(options.device)
    folder = options.out
    dtype, environment = parse_dtype(options.dtype, device), environment_record(device)
    subspace, subspace_path = subspace_of(options)
    check_held_out(subspace, options, asked)
    config = configuration(options, asked, (dtype, device), subspace_path, environment)
    if certificate is not None and subspace is not None:
        check_certificate(certificate, options, config, subspace)
    chat = _chat_of(options, source, config)

    samples = folder / "samples.jsonl"
    with opened(options, asked, subspace, chat, (dtype, device)) as backend:
        ran, cells = _ran(backend, options, asked, subspace, chat, config, ranks, say)
    if not ranks.first:
        ranks.wait()
        return Evaluation(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")), cells)
    paired, seconds = pair(cells, options.margin), ran.pop("seconds")
    modes = dict.fromkeys(mode for mode, _ in cells)
    by_mode = {m: {lang: summarize(cells[m, lang], options.budget) for lang in languages} for m in modes}
    shown = power(paired)
    ran["notes"] += floor_notes(by_mode, shown)
    results = {
        "damage_in_words": ran.pop("damage_in_words"),
        "schema": 1,
        "config": config,
        "environment": environment | {"date": now()} | ranks.record(),
        "model": ran.pop("model"),
        "subspace": describe_subspace(subspace, subspace_path, config["subspace"]),
        "certificate": certificate,
        "command": command,
        **{key: ran.pop(key) for key in ("provider", "edits", "notes")},
        "modes": by_mode,
        "paired": paired,
        "power": shown,
        **ran,
        "expag_metrics": expag_metrics(cells),
        "seconds": seconds,
    }
    write_cells(samples, cells)
    write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    with waiting("writing the report"):
        write_report(folder / "report.html", results, cells)
    ranks.wait()
    return Evaluation(folder, results, cells)
