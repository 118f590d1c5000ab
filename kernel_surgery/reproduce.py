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
    Raises UserError for a folder that is no bundle.
    """
    from kernel_surgery.problems import expag_problems, problems
    from kernel_surgery.provenance import changed_files
    from kernel_surgery.results import expag_metrics, pair, score_kept, summarize

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
    lines = (folder / "samples.jsonl").read_bytes().split(b"\n")
    samples = [json.loads(line) for line in lines if line]
    config, cells = results["config"], {}
    strict = config["protocol"] == "strict"
    asked = problems("test", config["problems"] // 5, seed=config["seed"]) if strict else expag_problems()
    known = {p.id: p for p in asked}
    for sample in cli.progress(samples, total=len(samples), desc="score"):
        key = sample["mode"], sample["language"]
        problem = known.get(sample["id"])
        if problem is None or sample["prompt"] != problem.prompts[sample["language"]]:
            faults.append(f"{' '.join(key)}: {sample['id']} is not a problem of this test set, as it is asked here")
            continue
        if sample["answer"] != problem.answer:
            said = f"{sample['id']} says the answer is {sample['answer']}, it is {problem.answer}"
            faults.append(f"{' '.join(key)}: {said}")
        again = score_kept(problem, sample)
        for field in ("extracted", "correct", "language_passed"):
            if again[field] != sample[field]:
                faults.append(f"{' '.join(key)}: {sample['id']}: {field} was {sample[field]}, is {again[field]}")
        cells.setdefault(key, []).append(again)
    for (mode, language), cell in cells.items():
        if [s["id"] for s in cell] != [p.id for p in asked]:
            faults.append(f"{mode} {language}: {len(cell)} texts, not those of the {len(asked)} problems in order")
    if faults:
        return faults
    budget = config["max_new_tokens"]
    made = {
        "modes": {m: {lang: summarize(cells[m, lang], budget) for lang in by} for m, by in results["modes"].items()},
        "paired": pair(cells, (results["paired"] or [{"margin": 0.05}])[0]["margin"]),
        "expag_metrics": expag_metrics(cells),
    }
    for name, value in made.items():
        faults += differences(name, json.loads(json.dumps(value)), results[name])
    return faults


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
    print(f"{args.check}: " + (f"{len(faults)} differences" if faults else "everything is what it says"))
    sys.stdout.flush()
    return 1 if faults else 0


if __name__ == "__main__":
    cli.main(run)
