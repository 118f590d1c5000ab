"""Everything from a model to a report, and a bundle that a stranger can check: python -m kernel_surgery.reproduce

    --model M --out DIR   collect, fit, bake, verify, eval (with its report); what is finished is not made again
    --check DIR           a bundle, without the model: its hashes, every text scored again, every figure made again

DIR/bundle holds the configuration, versions, subspace, certificate, results, every text, the report, and manifest.json
with the SHA-256 of each. The activations and the baked checkpoint stay beside it, in DIR.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from kernel_surgery import cli
from kernel_surgery.modes import modes_of

BUNDLE = ("subspace.safetensors", "certificate.json", "certificate.svg", "provenance.json")
RUN = ("config.json", "results.json", "samples.jsonl", "report.html")
MANIFEST = "manifest.json"


def steps(args: argparse.Namespace) -> list[tuple[str, Path, list]]:
    """(stage, what it leaves behind, its words) of every step, in order."""
    out, model = args.out, args.model
    acts, space, baked, certificate = (out / name for name in ("acts.safetensors", BUNDLE[0], "baked", BUNDLE[1]))
    common = ["--problems", args.problems] if args.problems else []
    language = ["--languages", args.languages]
    return [
        ("collect", acts, ["--model", model, "--out", acts, *common]),
        ("fit", space, ["--activations", acts, "--out", space, "--rank", args.rank]),
        ("bake", baked, ["--model", model, "--subspace", space, "--out", baked]),
        ("verify", certificate, ["--model", model, "--subspace", space, "--baked", baked, "--out", certificate]),
        (
            "eval",
            out / "eval" / "results.json",
            ["--mode", args.mode, "--model", model, "--subspace", space, "--certificate", certificate]
            + ["--out", out / "eval", *language, *common, "--seed", args.seed]
            + (["--controls", args.controls] if args.controls else []),
        ),
    ]


def stage(name: str) -> Callable[[list[str]], int | None]:
    """The `run` of a stage."""
    from importlib import import_module

    return import_module(f"kernel_surgery.{name}").run


def make(args: argparse.Namespace, command: str) -> int:
    """Run what is missing and write the bundle; 1 where the certificate broke."""
    commands = []
    for name, left, words in steps(args):
        words = [str(word) for word in words]
        commands.append(cli.command_line(f"kernel_surgery.{name}", words))
        if left.exists():
            print(f"{name}: {left} is there", flush=True)
            continue
        print(f"{name}: {' '.join(words)}", flush=True)
        if name == "eval" and (left.parent / "config.json").exists():
            words.append("--resume")
        stage(name)(words)
    bundle = args.out / "bundle"
    bundle.mkdir(exist_ok=True)
    shutil.copy(args.out / "baked" / "provenance.json", args.out / "provenance.json")
    files = [args.out / name for name in BUNDLE] + [args.out / "eval" / name for name in RUN]
    files += [file for file in (args.out / "eval" / "controls.jsonl",) if file.exists()]
    from kernel_surgery.stream import sha256

    for file in files:
        shutil.copy(file, bundle / file.name)
    manifest = {
        **{"kind": "bundle", "schema": 1, "command": command, "commands": commands, "model": args.model},
        **{"environment": cli.environment(), "sha256": {file.name: sha256(bundle / file.name) for file in files}},
    }
    cli.write_atomic(bundle / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    print(f"{bundle}: {len(files) + 1} files; check it with python -m kernel_surgery.reproduce --check {bundle}")
    # A broken certificate does not keep the evaluation from being made; the exit status says it.
    return 1 if json.loads((bundle / "certificate.json").read_text(encoding="utf-8"))["faults"] else 0


def check(folder: Path) -> list[str]:
    """What is wrong with a bundle, in sentences; empty if every hash, verdict and figure is what it says.

    Texts are scored by the code that runs now, so a bundle of another version may differ in verdicts: those are named.
    Of the embedded model, whose tokenizer is at hand, tokens are decoded and FAT is found again too. What no text can
    show is `UNCHECKED`. Raises UserError for a folder that is no bundle.
    """
    from kernel_surgery.problems import expag_problems, problems
    from kernel_surgery.provenance import changed_files
    from kernel_surgery.results import expag_metrics, pair, power, summarize

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["kind"] != "bundle":
            raise KeyError("kind")
        names = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.UserError(f"{str(folder)!r} is no bundle of kernel_surgery.reproduce ({MANIFEST}).") from error
    faults = changed_files(folder, names, MANIFEST)
    if missing := [name for name in ("results.json", "samples.jsonl") if not (folder / name).is_file()]:
        return [*faults, f"without {missing[0]} nothing more can be checked"]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config, languages = results["config"], results["config"]["languages"]
    strict = config["protocol"] == "strict"
    asked = problems("test", config["problems"] // 5, seed=config["seed"]) if strict else expag_problems()
    tokenizer = cli.load_tokenizer("polyglot") if results["model"]["id"] == "polyglot" else None
    cells, wrong = scored_again(folder / "samples.jsonl", {p.id: p for p in asked}, tokenizer)
    faults += wrong
    wanted = {(mode, language) for mode in modes_of(config["mode"]) for language in languages}
    told = {(mode, language) for mode, by in results["modes"].items() for language in by}
    for mode, language in sorted(wanted - cells.keys()):
        faults.append(f"{mode} {language}: there is no text of it, and the configuration asks for it")
    for mode, language in sorted((cells.keys() ^ told) - (wanted - cells.keys())):
        faults.append(f"{mode} {language}: stands in only one of samples.jsonl and results.json")
    for (mode, language), cell in cells.items():
        if [s["id"] for s in cell] != [p.id for p in asked]:
            faults.append(f"{mode} {language}: {len(cell)} texts, not those of the {len(asked)} problems in order")
    if faults:
        return faults
    budget = config["max_new_tokens"]
    paired = pair(cells, (results["paired"] or [{"margin": 0.05}])[0]["margin"])
    made = {
        "modes": {m: {lang: summarize(cells[m, lang], budget) for lang in by} for m, by in results["modes"].items()},
        "paired": paired,
        "power": power(paired),
        "expag_metrics": expag_metrics(cells),
    }
    for name, value in made.items():
        faults += differences(name, json.loads(json.dumps(value)), results[name])
    if results.get("controls"):
        faults += check_controls(folder, results["controls"], cells, config, tokenizer)
    return faults


UNCHECKED = "the hashes alone hold what no text shows: damage and probes, the certificate, the subspace, report.html"


def scored_again(path: Path, known: dict, tokenizer) -> tuple[dict, list[str]]:
    """({(mode, language): samples}, faults) of a file of samples, each judged from its text by the code that runs now.

    known: the problems by id. tokenizer: the model's, or None; without it tokens and what is counted in them are only
    held against each other.
    """
    from kernel_surgery.results import score_again, score_kept

    cells, faults = {}, []
    samples = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    fields = ("extracted", "correct", "language_passed")
    if tokenizer is not None:
        fields += ("text", "fat_tokens", "correct_at")
    for sample in cli.progress(samples, total=len(samples), desc="score"):
        key = sample["mode"], sample["language"]
        problem = known.get(sample["id"])
        if problem is None or sample["prompt"] != problem.prompts[sample["language"]]:
            faults.append(f"{' '.join(key)}: {sample['id']} is not a problem of this test set, as it is asked here")
            continue
        if sample["answer"] != problem.answer:
            said = f"{sample['id']} says the answer is {sample['answer']}, it is {problem.answer}"
            faults.append(f"{' '.join(key)}: {said}")
        if tokenizer is None:
            again = score_kept(problem, sample)
        else:
            text = tokenizer.decode(sample["tokens"], skip_special_tokens=True)
            again = score_again(tokenizer)(problem, sample) | {"text": text}
        for field in fields:
            if again.get(field) != sample.get(field):
                faults.append(
                    f"{' '.join(key)}: {sample['id']}: {field} was {sample.get(field)}, is {again.get(field)}"
                )
        first = sample["fat_tokens"]
        if (first is not None and not sample["correct"]) or not 0 < (first or 1) <= max(1, len(sample["tokens"])):
            said = f"an answer after {first} tokens of {len(sample['tokens'])}, correct={sample['correct']}"
            faults.append(f"{' '.join(key)}: {sample['id']}: {said}")
        cells.setdefault(key, []).append(again)
    return cells, faults


def check_controls(folder: Path, said: dict, cells: dict, config: dict, tokenizer) -> list[str]:
    """What is wrong with the controls' figures: they are made again from controls.jsonl."""
    from kernel_surgery.controls import compared
    from kernel_surgery.problems import problems

    path = folder / "controls.jsonl"
    if not path.is_file():
        return ["there are figures of controls and no controls.jsonl"]
    chosen = problems("test", said["problems"] // 5, seed=said["seed"])
    try:
        done, faults = scored_again(path, {p.id: p for p in chosen}, tokenizer)
        ids, mode = {p.id for p in chosen}, said["mode"]
        more = (config["languages"], ids, config["max_new_tokens"])
        made = compared(done, cells, said["kind"], said["count"], mode, *more)
    except (ValueError, KeyError, TypeError) as error:
        return [f"controls.jsonl does not hold the texts of the controls ({type(error).__name__}: {error})"]
    told = {key: said[key] for key in made}
    return faults + differences("controls", json.loads(json.dumps(made)), told)


def differences(where: str, made, said) -> list[str]:
    """Where two JSON values differ, numbers to nine digits, in sentences."""
    if isinstance(made, dict) and isinstance(said, dict):
        keys = sorted(made.keys() | said.keys())
        return [d for key in keys for d in differences(f"{where}.{key}", made.get(key), said.get(key))]
    if isinstance(made, list) and isinstance(said, list) and len(made) == len(said):
        return [d for i, pair in enumerate(zip(made, said, strict=True)) for d in differences(f"{where}[{i}]", *pair)]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (made, said))
    if made == said or (numbers and abs(made - said) <= 1e-9 * max(1.0, abs(made))):
        return []
    return [f"results.json: {where} is {said}; the texts give {made}"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="From a model to a report, and a bundle that can be checked without the model.")
    p.add_argument("--model", help='"polyglot", a folder, or a hub id')
    p.add_argument("--out", type=Path, help="folder for everything; the same command goes on in it")
    p.add_argument("--check", type=Path, help="a bundle to be checked instead")
    p.add_argument("--mode", default="fused", choices=("hook", "baked", "fused", "lora", "all"))
    p.add_argument("--rank", type=int, default=10)
    p.add_argument("--languages", default="en,zh")
    p.add_argument("--problems", type=int, help="problems per category (default 40)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--controls", help="haar:20, energy:20 or pca:20")
    return p


def run(argv: list[str] | None = None) -> int:
    """Make, or check; 1 if something is broken."""
    args = parser().parse_args(argv)
    if (args.check is None) == (args.out is None) or (args.out is not None and args.model is None):
        raise cli.UserError("give --model and --out to make a bundle, or --check to check one. Nothing was written.")
    if args.check is None:
        args.out.mkdir(parents=True, exist_ok=True)
        return make(args, cli.command_line("kernel_surgery.reproduce", argv))
    faults = check(args.check)
    for fault in faults:
        print(f"broken: {fault}")
    print(
        f"{args.check}: "
        + (f"{len(faults)} differences" if faults else f"every figure is what the texts give; {UNCHECKED}")
    )
    sys.stdout.flush()
    return 1 if faults else 0


if __name__ == "__main__":
    cli.main(run)
