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

import argparse
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

from kernel_surgery import cli, runs
from kernel_surgery.modes import MODES, applied
from kernel_surgery.problems import Problem, problems

DEFAULTS = {
    **{"model": "polyglot", "mode": "fused", "languages": ["en", "zh"], "problems": 40, "max_new_tokens": 256},
    **{"seed": 0, "test": "chosen", "dtype": "auto", "device": "auto", "batch_size": 64},
}
GRID = {"rank": [10], "site": ["mlp_out"], "pool": ["last"], "strength": [1.0], "layers": ["middle"]}
_KINDS = {"rank": int, "site": str, "pool": str, "strength": (int, float), "layers": str}


def read_grid(path: Path) -> dict:
    """The declaration with its defaults filled in. Raises UserError for what it does not know or cannot use."""
    from kernel_surgery.collect import POOLS, SITES

    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise cli.UserError(f"{str(path)!r} is not TOML ({error}). Nothing was written.") from error
    grid = given.pop("grid", {})
    known = {*DEFAULTS, "budget"}
    for name in [*(given.keys() - known), *(f"grid.{key}" for key in grid.keys() - GRID.keys())]:
        raise cli.UserError(f"{str(path)!r}: unknown setting {name!r}. Nothing was written.")
    made = DEFAULTS | given
    made["budget"] = given.get("budget", made["max_new_tokens"])
    made["grid"] = GRID | grid
    for name, values in made["grid"].items():
        listed = values if isinstance(values, list) else []
        if not listed or any(not isinstance(v, _KINDS[name]) or isinstance(v, bool) for v in listed):
            raise cli.UserError(f"{str(path)!r}: grid.{name} is {values!r}, not a list of such values.")
    for name, choices in (("site", SITES), ("pool", POOLS)):
        for value in made["grid"][name]:
            if value not in choices:
                raise cli.UserError(f"{str(path)!r}: grid.{name} has {value!r}; known: {', '.join(choices)}.")
    for name, choices in (("mode", MODES[1:]), ("test", ("chosen", "all"))):
        if made[name] not in choices:
            raise cli.UserError(f"{str(path)!r}: {name} is {made[name]!r}; known: {', '.join(choices)}.")
    for name in ("problems", "max_new_tokens", "budget", "batch_size"):
        if not isinstance(made[name], int) or made[name] < 1:
            raise cli.UserError(f"{str(path)!r}: {name} is {made[name]!r}, not a number of at least 1.")
    if made["budget"] > made["max_new_tokens"]:
        raise cli.UserError(
            f"{str(path)!r}: budget {made['budget']} is beyond max_new_tokens {made['max_new_tokens']}."
        )
    made["languages"] = list(cli.parse_languages(",".join(made["languages"])))
    return made


def cells_of(grid: dict) -> dict[str, dict]:
    """{name: setting} of every cell, in the order of the declaration; the name says all of it."""
    cells = {}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        cells[" ".join(f"{name}={value}" for name, value in setting.items())] = setting
    return cells


def digest(setting: dict, declared: dict) -> str:
    """SHA-256 of a chosen cell with everything else that its texts depend on."""
    rest = {key: value for key, value in declared.items() if key != "grid"}
    return hashlib.sha256(json.dumps([setting, rest], sort_keys=True).encode()).hexdigest()


def subspaces(model, tokenizer, declared: dict, cells: dict[str, dict], folder: Path) -> Iterator[tuple[str, object]]:
    """(name, Subspace) of every cell. Activations are collected once a site and pool, and kept."""
    from kernel_surgery.collect import Activations, collect_languages
    from kernel_surgery.fit import fit, load_activations
    from kernel_surgery.problems import LANGUAGES
    from kernel_surgery.sites import decoder_layers, default_layers, parse_layers
    from kernel_surgery.subspace import fingerprint

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
        yield name, fit(kept[site, pool], setting["rank"], layers=list(at))


def ask(path: Path, asked: list[Problem], chosen: dict, declared: dict, model, tokenizer) -> dict:
    """{(name, language): samples} of the original and every chosen cell, each on disk as it is finished.

    chosen: {name: (setting, Subspace)}.
    """
    from kernel_surgery.generate import generate
    from kernel_surgery.results import score, score_again, text_of

    done = runs.take_up(path, asked, score_again(tokenizer))
    wanted = {"original": (None, None), **chosen}
    missing = [(name, lang) for name in wanted for lang in declared["languages"] if (name, lang) not in done]
    with cli.bar(len(missing) * len(asked), path.stem, unit="text") as bar:
        for name in dict.fromkeys(name for name, _ in missing):
            setting, subspace = wanted[name]
            strength = 1.0 if setting is None else setting["strength"]
            mode = "original" if setting is None else declared["mode"]
            with applied(mode, model, subspace, strength, False):
                for language in (lang for which, lang in missing if which == name):
                    prompts = [p.prompts[language] for p in asked]
                    options = {"max_new_tokens": declared["max_new_tokens"], "batch_size": declared["batch_size"]}
                    texts = generate(model, tokenizer, prompts, **options, advance=bar.update)
                    decode = text_of(tokenizer)
                    cell = [score(p, language, name, t, decode) for p, t in zip(asked, texts, strict=True)]
                    runs.append_cell(path, cell)
                    done[name, language] = cell
    return {key: done[key] for key in ((name, lang) for name in wanted for lang in declared["languages"])}


def at_budget(cells: dict, budget: int, tokenizer) -> dict:
    """The cells as a budget of so many tokens would have left them."""
    from kernel_surgery.generate import Generation
    from kernel_surgery.results import score, text_of

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
    from kernel_surgery.results import summarize

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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Choose among declared settings on dev, freeze the choice, report it on test.")
    p.add_argument("grid", type=Path, help="TOML file; python -m pydoc kernel_surgery.study shows one")
    p.add_argument("--out", type=Path, required=True, help="folder of the study; the same command goes on in it")
    p.add_argument("--controls", help="haar:20, energy:20 or pca:20: random subspaces beside the chosen one, on test")
    return p


def run(argv: list[str] | None = None) -> int:
    """Fit, ask on dev, choose, freeze, ask on test, compare, write, print."""
    args = parser().parse_args(argv)
    declared = read_grid(args.grid)
    from kernel_surgery.controls import parse_controls

    parse_controls(args.controls)
    command = cli.command_line("kernel_surgery.study", argv)
    source, device = cli.resolve_model(declared["model"]), cli.parse_device(declared["device"])
    dtype = cli.parse_dtype(declared["dtype"], device)

    from kernel_surgery.results import pair, power, strict_table
    from kernel_surgery.subspace import fingerprint

    model, tokenizer = cli.load_model(source, dtype, device), cli.load_tokenizer(source)
    config = declared | {"weights": runs.digest(fingerprint(model)), "resolved_dtype": str(dtype)}
    runs.open_run(args.out, config, resume=(args.out / "config.json").exists())
    cells, languages, budget = cells_of(declared["grid"]), declared["languages"], declared["budget"]
    fitted = dict(subspaces(model, tokenizer, declared, cells, args.out))
    every = {name: (setting, fitted[name]) for name, setting in cells.items()}
    asked = problems("dev", declared["problems"], seed=declared["seed"])
    texts = at_budget(ask(args.out / "dev.jsonl", asked, every, declared, model, tokenizer), budget, tokenizer)
    dev = figures(texts, ["original", *cells], languages, budget)
    chosen = choose(dev, list(cells))
    frozen = {"cell": chosen, "setting": cells[chosen], "sha256": digest(cells[chosen], declared), "of": len(cells)}
    # Before a test problem is asked. A study that goes on must choose the same again.
    file = args.out / "frozen.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != frozen:
        raise cli.UserError(f"{str(file)!r} holds another choice than dev gives now. The study was left as it is.")
    cli.write_atomic(file, json.dumps(frozen, indent=2) + "\n")
    fitted[chosen].save(args.out / "chosen.safetensors")
    reported = {chosen: every[chosen]} if declared["test"] == "chosen" else every
    asked = problems("test", declared["problems"], seed=declared["seed"])
    texts = ask(args.out / "test.jsonl", asked, reported, declared, model, tokenizer)
    texts = at_budget(texts, budget, tokenizer)
    test = figures(texts, ["original", *reported], languages, budget)
    paired = pair(texts)
    controls = None
    if args.controls:
        from kernel_surgery.controls import run as run_controls

        strength = cells[chosen]["strength"]
        about = argparse.Namespace(controls=args.controls, mode=declared["mode"], strength=strength)
        about.seed, about.batch_size = declared["seed"], declared["batch_size"]
        own = {(declared["mode"] if name == chosen else name, lang): cell for (name, lang), cell in texts.items()}
        controls = run_controls(model, tokenizer, asked, languages, own, args.out, about, fitted[chosen], budget, None)
    study = {
        **{"schema": 1, "command": command, "declared": declared, "environment": cli.environment(device)},
        **{"dev": dev, "frozen": frozen, "test": test, "paired": paired, "power": power(paired), "controls": controls},
    }
    cli.write_atomic(args.out / "study.json", json.dumps(study, indent=2, ensure_ascii=False) + "\n")
    print(table(dev, chosen))
    print(f"frozen: {frozen['sha256'][:16]}, one of {len(cells)}; test, {len(asked)} problems a language:")
    print(strict_table(test, paired))
    if controls:
        from kernel_surgery.controls import table as control_table

        print(control_table(controls))
    print(f"{args.out}: study.json, frozen.json, chosen.safetensors, dev.jsonl, test.jsonl")
    return 0


if __name__ == "__main__":
    cli.main(run)
