"""A declared grid, chosen from on dev, frozen, reported on test: python -m kernel_surgery.study GRID.toml --out DIR

    model = "polyglot"                   # every line but [grid] may be left out; these are the defaults
    mode = "fused"
    languages = ["en", "zh"]
    problems = 40                        # per category, on dev and on test alike
    max_new_tokens = 256
    budget = 256                         # at which cells are compared: the texts are cut there
    seed = 0
    test = "chosen"                      # or "all": every cell is put to the test problems, all of them corrected for

    [grid]                               # each a list; their product is the cells
    rank = [1, 3, 6, 10]
    site = ["mlp_out", "resid_post"]
    pool = ["last"]
    strength = [1.0, 2.0]
    layers = ["middle"]                  # or "2-5"

Bases are fitted on the fit split. The cell with the highest accuracy on dev (mean over languages; of equals the first)
is chosen, and its hash is written to frozen.json before a test problem is asked. Every text is kept as its cell is
finished (dev.jsonl, test.jsonl): the same command goes on where it was killed. study.json has everything else.
"""

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import LANGUAGES, MODES, POOLS, SITES
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.answering import Context, EditBlock, answer_cells
from kernel_surgery.evaluation.controls import parse_controls, run_controls
from kernel_surgery.evaluation.controls import table as control_table
from kernel_surgery.evaluation.judging import Cells, Generation, score, score_again, text_of
from kernel_surgery.evaluation.samples import digest, open_run, take_up
from kernel_surgery.evaluation.summary import pair, power, summarize
from kernel_surgery.evaluation.tables import strict_table
from kernel_surgery.models.architectures import decoder_layers, default_layers, parse_layers
from kernel_surgery.models.load import load_model, load_tokenizer, parse_device, parse_dtype, resolve_model
from kernel_surgery.problems.generator import Problem, parse_languages, problems
from kernel_surgery.subspace.activations import Activations, load_activations
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import collect_languages
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.subspace.fitting import fit_subspace

DEFAULTS = {
    **{"model": "polyglot", "mode": "fused", "languages": ["en", "zh"], "problems": 40, "max_new_tokens": 256},
    **{"seed": 0, "test": "chosen", "dtype": "auto", "device": "auto", "batch_size": 64},
}
GRID = {"rank": [10], "site": ["mlp_out"], "pool": ["last"], "strength": [1.0], "layers": ["middle"]}
_KINDS = {"rank": int, "site": str, "pool": str, "strength": (int, float), "layers": str}


def read_grid(path: Path) -> dict:
    """The declaration with its defaults filled in. Raises UserError for what it does not know or cannot use."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not TOML ({error}). Nothing was written.") from error
    grid = given.pop("grid", {})
    known = {*DEFAULTS, "budget"}
    for name in [*(given.keys() - known), *(f"grid.{key}" for key in grid.keys() - GRID.keys())]:
        raise UserError(f"{str(path)!r}: unknown setting {name!r}. Nothing was written.")
    made = DEFAULTS | given
    made["budget"] = given.get("budget", made["max_new_tokens"])
    made["grid"] = GRID | grid
    for name, values in made["grid"].items():
        listed = values if isinstance(values, list) else []
        if not listed or any(not isinstance(v, _KINDS[name]) or isinstance(v, bool) for v in listed):
            raise UserError(f"{str(path)!r}: grid.{name} is {values!r}, not a list of such values.")
    for name, choices in (("site", SITES), ("pool", POOLS)):
        for value in made["grid"][name]:
            if value not in choices:
                raise UserError(f"{str(path)!r}: grid.{name} has {value!r}; known: {', '.join(choices)}.")
    for name, choices in (("mode", MODES[1:]), ("test", ("chosen", "all"))):
        if made[name] not in choices:
            raise UserError(f"{str(path)!r}: {name} is {made[name]!r}; known: {', '.join(choices)}.")
    for name in ("problems", "max_new_tokens", "budget", "batch_size"):
        if not isinstance(made[name], int) or made[name] < 1:
            raise UserError(f"{str(path)!r}: {name} is {made[name]!r}, not a number of at least 1.")
    if made["budget"] > made["max_new_tokens"]:
        raise UserError(f"{str(path)!r}: budget {made['budget']} is beyond max_new_tokens {made['max_new_tokens']}.")
    made["languages"] = list(parse_languages(",".join(made["languages"])))
    return made


def cells_of(grid: dict) -> dict[str, dict]:
    """{name: setting} of every cell, in the order of the declaration; the name says all of it."""
    cells = {}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        cells[" ".join(f"{name}={value}" for name, value in setting.items())] = setting
    return cells


def frozen_digest(setting: dict, declared: dict) -> str:
    """SHA-256 of a chosen cell with everything else that its texts depend on."""
    rest = {key: value for key, value in declared.items() if key != "grid"}
    return hashlib.sha256(json.dumps([setting, rest], sort_keys=True).encode()).hexdigest()


def subspaces(model, tokenizer, declared: dict, cells: dict[str, dict], folder: Path) -> Iterator[tuple[str, object]]:
    """(name, Subspace) of every cell. Activations are collected once a site and pool, and kept."""
    layers = range(len(decoder_layers(model)))
    kept: dict[tuple[str, str], Activations] = {}
    for name, setting in cells.items():
        site, pool = setting["site"], setting["pool"]
        if (site, pool) not in kept:
            file = folder / f"activations-{site}-{pool}.safetensors"
            if not file.exists():
                chosen = problems("fit", declared["problems"], seed=declared["seed"])
                vectors = collect_languages(model, tokenizer, chosen, LANGUAGES, layers, site=site, pool=pool)
                about = {"model_id": declared["model"], "n_layers": len(layers), "fingerprint": fingerprint(model)}
                about |= {"site": site, "pool": pool, "split": "fit", "problems": len(chosen), "seed": declared["seed"]}
                Activations(vectors, about).save(file)
            kept[site, pool] = load_activations(file)
        wanted = setting["layers"]
        at = default_layers(len(layers)) if wanted == "middle" else parse_layers(wanted, len(layers))
        yield name, fit_subspace(kept[site, pool], setting["rank"], layers=list(at))


def edit_blocks(model, declared: dict, settings: Mapping[str, tuple[dict, Subspace]]) -> dict[str, EditBlock]:
    """The edits that are asked: the original's, and one of every (setting, subspace)."""
    blocks: dict[str, EditBlock] = {"original": partial(applied, "original", model, None, 1.0)}
    for name, (setting, subspace) in settings.items():
        blocks[name] = partial(applied, declared["mode"], model, subspace, setting["strength"])
    return blocks


def at_budget(cells: dict, budget: int, tokenizer) -> dict:
    """The cells as a budget of so many tokens would have left them."""
    decode, cut = text_of(tokenizer), {}
    for (name, language), cell in cells.items():
        cut[name, language] = []
        for sample in cell:
            if len(sample["tokens"]) <= budget:
                cut[name, language].append(sample)
                continue
            ids = tuple(sample["tokens"][:budget])
            problem = Problem(
                sample["id"], sample["category"], "", "", {}, sample["answer"], {language: sample["prompt"]}
            )
            made = score(problem, language, name, Generation(ids, decode(ids), "length"), decode)
            cut[name, language].append(made)
    return cut


def figures(cells: dict, names: list[str], languages: list[str], budget: int) -> dict[str, dict]:
    """{name: {language: summary}}."""
    return {name: {lang: summarize(cells[name, lang], budget) for lang in languages} for name in names}


def choose(dev: dict[str, dict], names: list[str]) -> str:
    """The cell with the highest mean accuracy on dev; of equals the first declared."""
    return max(names, key=lambda name: sum(r["accuracy"] for r in dev[name].values()))


def table(dev: dict[str, dict], chosen: str) -> str:
    """Every cell on dev, and which was chosen."""
    width = max(map(len, dev))
    lines = ["dev, from which the choice is made:"]
    for name, by in dev.items():
        rates = "  ".join(f"{lang} {r['accuracy']:.3f} FAT {r['fat_tokens']:6.1f}" for lang, r in by.items())
        lines.append(f"  {name:<{width}}  {rates}{'  <- chosen' if name == chosen else ''}")
    return "\n".join(lines)


def run_study(declared: dict, folder: Path, *, controls: str | None = None, command: str | None = None) -> dict:
    """Fit, ask on dev, choose, freeze, ask on test, compare; what study.json holds.

    declared: of `read_grid`. folder: of the study; what is finished in it is not done again. controls: such as
    "haar:20". Raises KernelSurgeryError for what cannot be asked, and UserError where dev gives another choice than
    frozen.json holds.
    """
    parse_controls(controls)
    source, device = resolve_model(declared["model"]), parse_device(declared["device"])
    dtype = parse_dtype(declared["dtype"], device)
    model, tokenizer = load_model(source, dtype, device), load_tokenizer(source)
    config = declared | {"weights": digest(fingerprint(model)), "resolved_dtype": str(dtype)}
    open_run(folder, config, resume=(folder / "config.json").exists())
    cells, languages, budget = cells_of(declared["grid"]), declared["languages"], declared["budget"]
    fitted = dict(subspaces(model, tokenizer, declared, cells, folder))
    every = {name: (setting, fitted[name]) for name, setting in cells.items()}

    def ask(split: str, settings: Mapping[str, tuple[dict, Subspace]]) -> tuple[Context, Cells]:
        asked = tuple(problems(split, declared["problems"], seed=declared["seed"]))
        context = Context(model, tokenizer, asked, tuple(languages), declared["max_new_tokens"], declared["batch_size"])
        samples = folder / f"{split}.jsonl"
        done = take_up(samples, asked, score_again(tokenizer))
        texts = answer_cells(context, edit_blocks(model, declared, settings), done, samples)
        return context, at_budget(texts, budget, tokenizer)

    dev = figures(ask("dev", every)[1], ["original", *cells], languages, budget)
    chosen = choose(dev, list(cells))
    frozen = freeze(folder, chosen, cells, declared)
    fitted[chosen].save(folder / "chosen.safetensors")
    reported = {chosen: every[chosen]} if declared["test"] == "chosen" else every
    context, texts = ask("test", reported)
    paired, mode = pair(texts), declared["mode"]
    found = None
    if controls:
        own = {(mode if name == chosen else name, lang): cell for (name, lang), cell in texts.items()}
        context, strength = replace(context, budget=budget), cells[chosen]["strength"]
        found = run_controls(context, own, folder, fitted[chosen], controls, mode, strength, declared["seed"])
    study = {
        **{"schema": 1, "command": command, "declared": declared, "environment": environment_record(device)},
        **{"dev": dev, "frozen": frozen, "test": figures(texts, ["original", *reported], languages, budget)},
        **{"paired": paired, "power": power(paired), "controls": found},
    }
    write_atomic(folder / "study.json", json.dumps(study, indent=2, ensure_ascii=False) + "\n")
    return study


def freeze(folder: Path, chosen: str, cells: dict[str, dict], declared: dict) -> dict:
    """Write the choice to frozen.json, before a test problem is asked; the same again if the study goes on.

    Raises UserError where the file holds another choice.
    """
    digest_of = frozen_digest(cells[chosen], declared)
    frozen = {"cell": chosen, "setting": cells[chosen], "sha256": digest_of, "of": len(cells)}
    file = folder / "frozen.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != frozen:
        raise UserError(f"{str(file)!r} holds another choice than dev gives now. The study was left as it is.")
    write_atomic(file, json.dumps(frozen, indent=2) + "\n")
    return frozen


def shown(study: dict) -> str:
    """What the command prints of a study."""
    frozen, declared = study["frozen"], study["declared"]
    lines = [table(study["dev"], frozen["cell"])]
    asked = 5 * declared["problems"]
    lines.append(f"frozen: {frozen['sha256'][:16]}, one of {frozen['of']}; test, {asked} problems a language:")
    lines.append(strict_table(study["test"], study["paired"]))
    if study["controls"]:
        lines.append(control_table(study["controls"]))
    return "\n".join(lines)
