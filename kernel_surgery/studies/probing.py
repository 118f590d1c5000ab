"""What a probe still reads of the language after an edit, beside what it reads after random edits.

Every edit is measured in the same way, on test problems, which no fit has seen (`Measuring`): how many tokens a linear
probe reads right at the edited layers, how much the languages' means still differ there, what a probe reads in the
residual stream after the last edited layer and after the model's last one, and the damage. Where random edits of the
same rank hide as much, nothing shows that the fitted one is about the language.

config.json holds what the figures depend on, measured.json every edit that is finished, probe.json everything.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.checkpoint.source import check_edit
from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.environment import environment_record, now
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import LANGUAGES, RANDOM_EDITS
from kernel_surgery.common.progress import waiting
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.words import ratio_interval
from kernel_surgery.evaluation.describing import describe_model, describe_subspace
from kernel_surgery.evaluation.notes import check_held_out, notes_of
from kernel_surgery.evaluation.options import Asked, Options
from kernel_surgery.evaluation.run import subspace_of
from kernel_surgery.evaluation.samples import check_run, digest
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.problems import problem_source
from kernel_surgery.models.before import load_checked
from kernel_surgery.models.chat import choose_chat
from kernel_surgery.models.load import parse_device, parse_dtype, public_name
from kernel_surgery.models.stored import layout_in
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.problems.generator import Problem
from kernel_surgery.studies.measuring import Measured, Measuring, difference, first_problems
from kernel_surgery.studies.opening import open_together
from kernel_surgery.studies.probe_page import write_page
from kernel_surgery.studies.probe_words import (
    EDIT,
    FEW,
    MORE,
    NO_MORE,
    NOTHING,
    ORIGINAL,
    PROBLEMS,
    UNCOMPARED,
    UNREAD,
)
from kernel_surgery.studies.randoms import KINDS, SCALED, parse_kinds, random_subspaces
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED, RESULTS = "measured.json", "probe.json"
NEUTRAL, PROMPTS = "neutral", "prompts"
FEW_TOKENS = 5  # for each feature of a probe
PROMPT_TOKENS = 450  # per language: as many as the neutral text has


def run_probe(
    options: Options,
    *,
    probed: int = 20,
    controls: str = RANDOM_EDITS,
    text: str | None = None,
    command: str | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure an edit beside random ones. Return the contents of probe.json, which is written with its page.

    options: of an evaluation, with `out`; those that say how texts are made do not count. languages: "all", or names.
    probed: problems whose tokens the probe reads, at most. controls: such as "energy:5,matched:5".
    text: what the damage is measured on, "neutral" or "prompts"; None: the neutral text where it has all languages.
    command: the command line, for the record.
    ranks: the processes that share the measuring. All call this; process 0 draws and writes.

    Raises KernelSurgeryError for options, models and subspaces that cannot be used. Nothing was written then.
    """
    options, kinds = ranks.agreed(options), parse_kinds(controls)
    check_finite_strength(options.strength)
    asked = _asked(options, probed)
    text = text_of(text, asked.languages)
    subspace, path = subspace_of(options)
    assert subspace is not None and path is not None and options.out is not None  # the mode edits; --out is required
    check_held_out(subspace, options, asked)
    device = parse_device(options.device)
    where, environment = (parse_dtype(options.dtype, device), device), environment_record(device)
    chat = choose_chat(options.model, options.chat, thinking=options.thinking)
    config = configuration(options, asked, where, path, environment) | {"text": text} | chat.record()
    check_run(options.out, config, resume=options.resume)
    notes = notes_of(subspace, {}, options, chat, asked)

    def check(place: Path, found: dict[str, Any]) -> None:
        check_edit(place, subspace, [options.mode], force=options.force)
        if note := subspace.note_on(layout_in(place)):
            notes.insert(0, note)

    prompts = [problem.prompts[language] for problem in asked.problems for language in asked.languages]
    model, tokenizer = load_checked(options.model, where, prompts, 0, check, chat=chat)
    config["weights"] = digest(fingerprint(model))
    open_together(ranks, options.out, config, resume=options.resume)
    last = model.config.get_text_config().num_hidden_layers - 1
    measuring = Measuring(
        *(model, tokenizer, asked.languages, asked.problems, asked.languages, subspace.layers, options.mode, "test"),
        *(chat, ranks),
        streams=sorted({subspace.layers[-1], last}),
        texts=prompt_texts(tokenizer, asked) if text == PROMPTS else None,
        site=subspace.edited_site,
        force=options.force,
    )
    edit = subspace.at_strength(options.strength)
    edits: dict[str, Callable[[], Subspace | None]] = {ORIGINAL: lambda: None, EDIT: lambda: edit}
    kinds = ranks.by_first(partial(with_those_before, kinds, options.out / MEASURED))
    edits |= random_subspaces(measuring.text, edit, kinds)
    found = measuring.all_of(edits, options.out / MEASURED, digest(config))
    results = {
        **{"schema": 1, "command": command, "config": config},
        "environment": environment | {"date": now()} | ranks.record(),
        "model": describe_model(public_name(options.model), model),
        "subspace": describe_subspace(subspace, path, config["subspace"]),
        "notes": notes,
        "asked": asked_of(measuring, text) | {"worded_as_fitted": asked.seen if asked.alike in notes else 0.0},
        "controls": kinds,
        **ranks.by_first(partial(compared, measuring, found)),
    }
    return _written(results, options.out, ranks)


def _asked(options: Options, probed: int) -> Asked:
    """Return the test problems that the probe is asked. Raises UserError for fewer than two languages or problems."""
    source = problem_source(options.problems, seed=options.seed)
    languages = source.languages(options.languages, judged=False)
    if len(languages) < 2:
        raise UserError("a probe tells languages apart, so it needs at least two; --languages names one.")
    alike, of = source.seen("test")
    about = source.record, source.note("test"), source.worded_alike("test"), alike / max(of, 1)
    return Asked(tuple(first_problems(source.split("test"), probed)), languages, *about)


def _written(results: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Write probe.json and its page, in process 0. Return the results as the file has them: layers are words there."""
    asked = results["asked"]
    results["notes"] = [*results["notes"], *few_tokens(asked, results["model"]["d_model"])]
    if asked["text"] == PROMPTS:
        results["notes"].append(
            f"the damage is measured on {asked['sentences']} prompts of the problems in each language, not on everyday "
            "text: the words for it say less"
        )
    text = json.dumps(results, indent=2, ensure_ascii=False)
    results = json.loads(text)
    if ranks.first:
        write_atomic(folder / RESULTS, text + "\n")
        with waiting("writing the page"):
            write_page(results, folder)
    ranks.wait()
    return results


def few_tokens(asked: Mapping[str, Any], d_model: int) -> list[str]:
    """Return a note if the probe has few tokens to learn from: fewer than `FEW_TOKENS` for each feature."""
    if asked["tokens"] >= FEW_TOKENS * d_model:
        return []
    return [
        f"the probe has {asked['tokens']} tokens to learn from for {d_model} features: it reads less than there is, "
        "with and without an edit. More problems help (--probed, or a longer file)"
    ]


def asked_of(measuring: Measuring, text: str) -> dict[str, Any]:
    """Return what was measured, and where. text: `NEUTRAL` or `PROMPTS`."""
    read = measuring.asked_of() | {"site": measuring.site, "streams": list(measuring.streams)}
    return read | {"text": text, "sentences": measuring.text.sentences}


def with_those_before(kinds: Mapping[str, int], file: Path) -> dict[str, int]:
    """Return {kind: number of random edits}: those that are asked for, and those that a run has measured before.

    So no figure is lost, and nobody chooses the random edits by their result.
    """
    held = json.loads(file.read_text(encoding="utf-8"))["edits"] if file.is_file() else {}
    counts = dict(kinds)
    for name in held:
        kind, _, number = name.partition(":")
        if number:
            counts[kind] = max(counts.get(kind, 0), int(number) + 1)
    return {kind: counts[kind] for kind in KINDS if kind in counts}


def text_of(given: str | None, languages: Sequence[str]) -> str:
    """Return what the damage is measured on, `NEUTRAL` or `PROMPTS`. Raises UserError for a text that is not there."""
    foreign = [language for language in languages if language not in LANGUAGES]
    if given == NEUTRAL and foreign:
        raise UserError(
            f"there is no neutral text in {foreign[0]!r}, only in {', '.join(LANGUAGES)}: use --text prompts, or fewer "
            "--languages."
        )
    return given or (PROMPTS if foreign else NEUTRAL)


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", asked: Asked) -> dict[str, list[str]]:
    """Return {language: the first prompts}: of as many problems as have `PROMPT_TOKENS` tokens in each language.

    At least two, because sentences are what an interval resamples.
    """
    chosen: list[Problem] = []
    tokens = dict.fromkeys(asked.languages, 0)
    for problem in asked.problems:
        if len(chosen) >= 2 and min(tokens.values()) >= PROMPT_TOKENS:
            break
        chosen.append(problem)
        for language in asked.languages:
            tokens[language] += len(tokenizer(problem.prompts[language]).input_ids)
    return {language: [problem.prompts[language] for problem in chosen] for language in asked.languages}


def configuration(
    options: Options,
    asked: Asked,
    where: tuple[torch.dtype, torch.device],
    subspace: Path,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return config.json: everything that the figures depend on, but for the chat, the text and the weights."""
    dtype, device = where
    return {
        "model": public_name(options.model),
        "subspace": sha256(subspace),
        "strength": options.strength,
        "languages": list(asked.languages),
        "problems": len(asked.problems),
        **asked.record,
        "seed": options.seed,
        "dtype": name_of(dtype),
        "device": device.type,
        "force": options.force,
        "prompts": digest([[p.id, p.prompts[lang]] for p in asked.problems for lang in asked.languages]),
        "versions": {name: environment[name] for name in ("kernel_surgery", "torch", "transformers")},
    }


def compared(measuring: Measuring, found: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the figures of every edit, and how the fitted one compares with the random ones.

    {"measured": {edit: figures}, "yardsticks": {name: {language: KL}}, "beside": {"all" or kind: {measure: `among`}},
    "difference": {another edit: [the fitted edit's accuracy of the probe minus its, low, high], paired over problems},
    of the original and of the random edit of each kind that the probe reads least after, "verdict": `verdict`}.
    """
    edit = found[EDIT]
    kinds: dict[str, dict[str, Measured]] = {}
    for name, by in found.items():
        if name not in (ORIGINAL, EDIT):
            kinds.setdefault(name.partition(":")[0], {})[name] = by
    randoms = {name: by for group in kinds.values() for name, by in group.items()}
    nearest = [min(group, key=lambda name: randoms[name].probe) for group in kinds.values()]
    with waiting("comparing the edits"):
        apart = {name: difference(edit, found[name])["probe"] for name in (ORIGINAL, *nearest)}
        yardsticks = measuring.yardsticks
        figures = {name: measuring.figures(by) | stream_intervals(by) for name, by in found.items()}
    return {
        "measured": figures,
        "yardsticks": {
            name: {language: reading.kl_mean for language, reading in by.items()} for name, by in yardsticks.items()
        },
        "beside": {
            kind: {name: among(of(edit), [of(by) for by in group.values()]) for name, of in measures(edit).items()}
            for kind, group in {"all": randoms, **kinds}.items()
        },
        "difference": apart,
        "verdict": verdict(
            apart[ORIGINAL],
            [apart[name] for name in nearest if name.partition(":")[0] != SCALED],
            len(measuring.asked),
            unread=figures[ORIGINAL]["probe_ci95"][0] <= measuring.chance,
        ),
    }


def measures(found: Measured) -> dict[str, Callable[[Measured], float]]:
    """Return {name: a function that reads that figure of an edit}."""
    each: dict[str, Callable[[Measured], float]] = {name: attrgetter(name) for name in ("probe", "means", "damage")}
    for layer in found.streams:
        each[f"stream {layer}"] = lambda by, layer=layer: by.by_stream()[layer]  # type: ignore[misc]
    return each


def stream_intervals(found: Measured) -> dict[str, Any]:
    """Return the intervals of what a probe reads in the residual stream: {"streams_ci95": {layer: [low, high]}}."""
    return {"streams_ci95": {layer: list(ratio_interval(hits, found.tokens)) for layer, hits in found.streams.items()}}


def among(value: float, others: Sequence[float]) -> dict[str, float | int]:
    """Return where a figure of the fitted edit lies among those of random edits.

    "low", "high": of the random ones. "n": their number. "as_low": how many are as low or lower. "p": (1 + as_low) /
    (1 + n), the one-sided Monte Carlo p-value of being as low.
    """
    as_low = sum(other <= value for other in others)
    return {
        **{"low": min(others), "high": max(others), "n": len(others)},
        **{"as_low": as_low, "p": (1 + as_low) / (1 + len(others))},
    }


def verdict(hidden: Sequence[float], apart: Sequence[Sequence[float]], problems: int, *, unread: bool = False) -> str:
    """Return what the intervals allow to say of the probe at the edited layers.

    hidden: [difference in accuracy from the original, low, high]. apart: the same from the random edit of each kind
    that hides most, of the kinds that take directions away. problems: that the probe was asked. unread: whether it
    reads nothing without an edit.

    `UNREAD` and `FEW` come first. `NOTHING` unless the first interval is below 0. `UNCOMPARED` if there are no others.
    `MORE` if all of them are below 0.
    """
    if unread:
        return UNREAD
    if problems < PROBLEMS:
        return FEW
    if hidden[2] >= 0:
        return NOTHING
    return UNCOMPARED if not apart else MORE if all(high < 0 for *_, high in apart) else NO_MORE
