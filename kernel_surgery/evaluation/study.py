"""A study: try a declared grid of settings on dev, freeze the best, report it on test.

`kernel_surgery.study` shows the declaration, a TOML file.

Bases are fitted on the fit split. The setting with the highest accuracy on dev (mean over languages; ties go to the
first declared) is chosen. Its hash is written to frozen.json before any test problem is asked. A cell here is one
setting of the grid.

Each finished set of texts is stored at once (dev.jsonl, test.jsonl), so the same command continues an interrupted
study. study.json holds everything else.
"""

import hashlib
import itertools
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import BEFORE_CHAT, CHATS, MODES, POOLS, SITES
from kernel_surgery.damage.measure import headline, measure_damage
from kernel_surgery.damage.measure import table as damage_table
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.answering import Context, EditBlock, answer_cells
from kernel_surgery.evaluation.controls import parse_controls, run_controls
from kernel_surgery.evaluation.controls import table as control_table
from kernel_surgery.evaluation.judging import Cells, Generation, score, score_again, text_of
from kernel_surgery.evaluation.samples import check_run, digest, open_run, take_up
from kernel_surgery.evaluation.summary import pair, power, summarize
from kernel_surgery.evaluation.tables import strict_table
from kernel_surgery.files.problems import Source, problem_source
from kernel_surgery.models.architectures import decoder_layers, default_layers, parse_layers
from kernel_surgery.models.before import load_checked
from kernel_surgery.models.chat import OFF, Chat, choose_chat
from kernel_surgery.models.load import parse_device, parse_dtype, public_name
from kernel_surgery.ops.library import MAX_RANK
from kernel_surgery.problems.generator import Problem, parse_languages
from kernel_surgery.subspace.activations import Activations, load_activations
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import collect_languages
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.subspace.fitting import fit_subspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULTS: dict[str, Any] = {
    **{"model": "polyglot", "mode": "fused", "languages": ["en", "zh"], "problems": 40, "max_new_tokens": 256},
    **{"seed": 0, "test": "chosen", "dtype": "auto", "device": "auto", "batch_size": 64},
    **{"chat": "auto", "thinking": False},
}
GRID: dict[str, list[Any]] = {
    "rank": [10],
    "site": ["mlp_out"],
    "pool": ["last"],
    "strength": [1.0],
    "layers": ["middle"],
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "rank": int,
    "site": str,
    "pool": str,
    "strength": (int, float),
    "layers": str,
}


def read_grid(path: Path) -> dict[str, Any]:
    """Read a declaration and fill in the defaults.

    Raises UserError for unknown settings and for values that cannot be used.
    """
    try:
        declaration = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not TOML ({error}).") from error
    grid = declaration.pop("grid", {})
    known = {*DEFAULTS, "budget"}
    for prefix, names, expected in (("", declaration, known), ("grid.", grid, {*GRID})):
        for name in names.keys() - expected:
            choose = ", ".join(f"{prefix}{choice}" for choice in sorted(expected))
            raise UserError(f"{str(path)!r}: unknown setting {prefix + name!r}: choose from {choose}.")
    settings = DEFAULTS | declaration
    settings["budget"] = declaration.get("budget", settings["max_new_tokens"])
    settings["grid"] = GRID | grid
    for name, values in settings["grid"].items():
        listed = values if isinstance(values, list) else []
        if not listed or any(not isinstance(v, _KINDS[name]) or isinstance(v, bool) for v in listed):
            raise UserError(f"{str(path)!r}: grid.{name} is {values!r}, not a list such as {GRID[name]!r}.")
    for strength in settings["grid"]["strength"]:
        check_finite_strength(strength)
    choices: tuple[str, ...]
    for name, choices in (("site", SITES), ("pool", POOLS)):
        for value in settings["grid"][name]:
            if value not in choices:
                raise UserError(f"{str(path)!r}: grid.{name} has {value!r}; known: {', '.join(choices)}.")
    for name, choices in (("mode", MODES[1:]), ("test", ("chosen", "all")), ("chat", CHATS)):
        if settings[name] not in choices:
            raise UserError(f"{str(path)!r}: {name} is {settings[name]!r}; known: {', '.join(choices)}.")
    given = settings["problems"] if isinstance(settings["problems"], list) else [settings["problems"]]
    if not given or not (all(isinstance(word, str) for word in given) or isinstance(settings["problems"], int)):
        raise UserError(
            f"{str(path)!r}: problems is {settings['problems']!r}, neither a whole number nor files of problems."
        )
    number = ("problems",) if isinstance(settings["problems"], int) else ()
    for name in (*number, "max_new_tokens", "budget", "batch_size"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise UserError(f"{str(path)!r}: {name} is {settings[name]!r}, not a whole number of at least 1.")
    if not isinstance(settings["thinking"], bool):
        raise UserError(f"{str(path)!r}: thinking is {settings['thinking']!r}, not true or false.")
    if settings["budget"] > settings["max_new_tokens"]:
        raise UserError(
            f"{str(path)!r}: budget is {settings['budget']}, above max_new_tokens, {settings['max_new_tokens']}."
        )
    settings["languages"] = list(parse_languages(",".join(settings["languages"])))
    return settings


def cells_of(grid: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return {name: setting} of every cell, in the order of the declaration. The name spells out the setting."""
    cells = {}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        cells[" ".join(f"{name}={value}" for name, value in setting.items())] = setting
    return cells


def check_cells(cells: dict[str, dict[str, Any]], mode: str, config: dict[str, Any]) -> None:
    """Check the layers and ranks of all cells against a model's configuration.

    Raises ModelError for layers that it does not have, and KernelSurgeryError for a rank that it cannot have.
    """
    most = min(config["hidden_size"], MAX_RANK if mode == "fused" else config["hidden_size"])
    for setting in cells.values():
        _layers(setting["layers"], config["num_hidden_layers"])
        if not 1 <= setting["rank"] <= most:
            raise KernelSurgeryError(f"grid.rank has {setting['rank']}: choose 1 to {most} for this model and mode.")


def _layers(text: str, n_layers: int) -> list[int]:
    return list(default_layers(n_layers) if text == "middle" else parse_layers(text, n_layers))


def frozen_digest(setting: dict[str, Any], declared: dict[str, Any]) -> str:
    """Return the SHA-256 of a chosen setting with everything else that its texts depend on."""
    rest = {key: value for key, value in declared.items() if key != "grid"}
    return hashlib.sha256(json.dumps([setting, rest], sort_keys=True).encode()).hexdigest()


def subspaces(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    declared: dict[str, Any],
    cells: dict[str, dict[str, Any]],
    folder: Path,
    source: Source,
    chat: Chat = OFF,
) -> Iterator[tuple[str, Subspace]]:
    """Fit the subspace of every cell. Yields (name, Subspace).

    Activations are collected once per site and pooling, and stored in the folder. source: of
    the problems. chat: how the prompts are put to the model.
    """
    layers = range(len(decoder_layers(model)))
    activations: dict[tuple[str, str], Activations] = {}
    for name, setting in cells.items():
        site, pool = setting["site"], setting["pool"]
        if (site, pool) not in activations:
            file = folder / f"activations-{site}-{pool}.safetensors"
            if not file.exists():
                fit_problems = source.split("fit")
                options: dict[str, Any] = {"site": site, "pool": pool, "chat": chat}
                vectors = collect_languages(model, tokenizer, fit_problems, source.languages(), layers, **options)
                provenance = {"model_id": public_name(declared["model"]), "n_layers": len(layers)}
                provenance |= {
                    "fingerprint": fingerprint(model),
                    "site": site,
                    "pool": pool,
                    "split": "fit",
                    "problems": len(fit_problems),
                    "seed": declared["seed"],
                    **chat.record(),
                    **source.record,
                }
                Activations(vectors, provenance).save(file)
            activations[site, pool] = load_activations(file)
        fit_layers = _layers(setting["layers"], len(layers))
        held = activations[site, pool]
        yield name, fit_subspace(held, setting["rank"], method="deviations", layers=fit_layers)


def edit_blocks(
    model: "PreTrainedModel", declared: dict[str, Any], settings: Mapping[str, tuple[dict[str, Any], Subspace]]
) -> dict[str, EditBlock]:
    """Return the edits to ask: the original's, and one for every (setting, subspace)."""
    blocks: dict[str, EditBlock] = {"original": partial(applied, "original", model, None, 1.0)}
    for name, (setting, subspace) in settings.items():
        blocks[name] = partial(applied, declared["mode"], model, subspace, setting["strength"])
    return blocks


def at_budget(cells: Cells, budget: int, tokenizer: "PreTrainedTokenizerBase", chat: Chat = OFF) -> Cells:
    """Return the cells as a budget of `budget` tokens would have left them, scored again. chat: as in `text_of`."""
    decode = text_of(tokenizer, chat)
    shortened: Cells = {}
    for (name, language), cell in cells.items():
        shortened[name, language] = []
        for sample in cell:
            if len(sample["tokens"]) <= budget:
                shortened[name, language].append(sample)
                continue
            ids = tuple(sample["tokens"][:budget])
            problem = Problem(
                sample["id"], sample["category"], "", "", {}, sample["answer"], {language: sample["prompt"]}
            )
            sample_at_budget = score(problem, language, name, Generation(ids, decode(ids), "length"), decode)
            shortened[name, language].append(sample_at_budget)
    return shortened


def figures(cells: Cells, names: list[str], languages: list[str], budget: int) -> dict[str, dict[str, Any]]:
    """Return {name: {language: summary}}."""
    return {name: {lang: summarize(cells[name, lang], budget) for lang in languages} for name in names}


def choose(dev: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Return the name of the cell with the highest mean accuracy on dev. Ties go to the first declared."""
    return max(names, key=lambda name: sum(r["accuracy"] for r in dev[name].values()))


def table(dev: dict[str, dict[str, Any]], chosen: str) -> str:
    """Return the table of all cells on dev, with the chosen one marked."""
    width = max(map(len, dev))
    lines = ["dev problems, on which the setting with the highest accuracy is chosen:"]
    for name, by in dev.items():
        rates = "  ".join(f"{lang} {r['accuracy']:.3f} FAT {r['fat_tokens']:6.1f}" for lang, r in by.items())
        lines.append(f"  {name:<{width}}  {rates}{'  <- chosen' if name == chosen else ''}")
    return "\n".join(lines)


def run_study(
    declared: dict[str, Any], folder: Path, *, controls: str | None = None, command: str | None = None
) -> dict[str, Any]:
    """Run a study: fit, ask on dev, choose, freeze, ask on test, compare. Return the contents of study.json.

    declared: the result of `read_grid`.
    folder: of the study. Whatever is finished in it is not done again.
    controls: such as "haar:20", random subspaces beside the chosen one, on test.
    command: the command line, for the record.

    Raises KernelSurgeryError for settings that cannot be used. Raises UserError if dev now gives another choice than
    frozen.json holds.
    """
    parse_controls(controls)
    cells, budget = cells_of(declared["grid"]), declared["budget"]
    source = problem_source(declared["problems"], seed=declared["seed"])
    languages = list(source.languages(",".join(declared["languages"])))
    source.split("fit")
    if source.own:  # the place of a file is not recorded: records travel
        declared = declared | {"problems": source.record["problems_file"]} | source.record
    device = parse_device(declared["device"])
    dtype = parse_dtype(declared["dtype"], device)
    chat = choose_chat(declared["model"], declared["chat"], thinking=declared["thinking"])
    # Off leaves no trace: the hash of a choice that was frozen before there was a chat stays the same.
    declared = {name: value for name, value in declared.items() if name not in BEFORE_CHAT}
    declared |= chat.record() if chat.on else {}
    named = declared | {"model": public_name(declared["model"])}
    config = named | {"resolved_dtype": str(dtype)}
    resume = os.path.exists(folder / "config.json")  # False for a name that no folder can have: check_run says so
    check_run(folder, config, resume=resume)
    splits = {split: tuple(source.split(split)) for split in ("dev", "test")}
    prompts = [p.prompts[language] for split in splits.values() for p in split for language in languages]
    model, tokenizer = load_checked(
        *(declared["model"], (dtype, device), prompts, declared["max_new_tokens"]),
        lambda source, found: check_cells(cells, declared["mode"], found),
        chat=chat,
    )
    config["weights"] = digest(fingerprint(model))
    open_run(folder, config, resume=resume)
    subspace_of = dict(subspaces(model, tokenizer, declared, cells, folder, source, chat))
    settings_of = {name: (setting, subspace_of[name]) for name, setting in cells.items()}

    def ask(split: str, settings: Mapping[str, tuple[dict[str, Any], Subspace]]) -> tuple[Context, Cells]:
        context = Context(
            model, tokenizer, splits[split], tuple(languages), declared["max_new_tokens"], declared["batch_size"], chat
        )
        samples = folder / f"{split}.jsonl"
        done = take_up(samples, splits[split], score_again(tokenizer, chat))
        texts = answer_cells(context, edit_blocks(model, declared, settings), done, samples)
        return context, at_budget(texts, budget, tokenizer, chat)

    dev = figures(ask("dev", settings_of)[1], ["original", *cells], languages, budget)
    best = choose(dev, list(cells))
    frozen = freeze(folder, best, cells, declared)
    subspace_of[best].save(folder / "chosen.safetensors")
    reported = {best: settings_of[best]} if declared["test"] == "chosen" else settings_of
    context, texts = ask("test", reported)
    paired, mode = pair(texts), declared["mode"]
    control_results = None
    if controls:
        own = {(mode if name == best else name, lang): cell for (name, lang), cell in texts.items()}
        context, strength = replace(context, budget=budget), cells[best]["strength"]
        control_results = run_controls(
            context, own, folder, subspace_of[best], controls, mode, strength, declared["seed"]
        )
    damage = measure_damage(*(model, tokenizer, languages, [mode], subspace_of[best]), strength=cells[best]["strength"])
    study = {
        "damage_in_words": headline(damage),
        "notes": [note] if (note := source.note("test")) else [],
        **{"schema": 1, "command": command, "declared": named, "environment": environment_record(device)},
        **{"dev": dev, "frozen": frozen, "test": figures(texts, ["original", *reported], languages, budget)},
        **{"paired": paired, "power": power(paired), "controls": control_results, "damage": damage},
    }
    write_atomic(folder / "study.json", json.dumps(study, indent=2, ensure_ascii=False) + "\n")
    return study


def freeze(folder: Path, chosen: str, cells: dict[str, dict[str, Any]], declared: dict[str, Any]) -> dict[str, Any]:
    """Write the choice to frozen.json, before any test problem is asked. Return its contents.

    A continued study writes the same file again. Raises UserError if the file holds another choice.
    """
    digest_of = frozen_digest(cells[chosen], declared)
    frozen = {"cell": chosen, "setting": cells[chosen], "sha256": digest_of, "of": len(cells)}
    file = folder / "frozen.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != frozen:
        raise UserError(f"{str(file)!r} holds another choice than dev gives now. Choose another --out.")
    write_atomic(file, json.dumps(frozen, indent=2) + "\n")
    return frozen


def shown(study: dict[str, Any]) -> str:
    """Return the text that the command prints about a study."""
    frozen = study["frozen"]
    lines = [study["damage_in_words"], table(study["dev"], frozen["cell"])]
    count = next(iter(study["test"]["original"].values()))["n"]
    lines.append(f"choice frozen: {frozen['sha256'][:16]}, one of {frozen['of']} settings")
    lines.append(f"test problems, {count} per language:")
    lines += study["notes"]
    lines.append(strict_table(study["test"], study["paired"]))
    if study["controls"]:
        lines.append(control_table(study["controls"]))
    lines.append(damage_table(study["damage"]))
    return "\n".join(lines)
