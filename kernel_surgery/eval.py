"""What the edit did to the answers: python -m kernel_surgery.eval --mode fused

Puts the same problems to the original model and to the edited one, in the same process, and compares them problem by
problem.

    strict   (default) the test split, one final answer a text, exact comparison, intervals and corrected tests
    expag    the reference script's 20 problems and its own scoring, for continuity with its figures; nothing else

Writes DIR/results.json, DIR/samples.jsonl (every text in full) and DIR/report.html. A run that was cut short goes on
with --resume: each mode and language that was finished is kept.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

from kernel_surgery import cli
from kernel_surgery.problems import EXPAG_LANGUAGES, Problem, expag_problems, problems

MODES = ("original", "hook", "baked", "fused")
# Beyond these a run is still the same run: where it writes, how it is batched, what else is asked for.
_NOT_IDENTITY = ("mode", "languages", "batch_size", "out", "resume", "device")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Compare a model with and without its language subspace on maths problems.")
    p.add_argument("--mode", choices=(*MODES, "all"), default="fused", help="where the edit is made (default: fused)")
    p.add_argument("--model", default="polyglot", help='"polyglot" (default), a folder, or a hub id')
    p.add_argument("--subspace", type=Path, help="subspace file (default: the one shipped with polyglot)")
    p.add_argument("--protocol", choices=("strict", "expag"), default="strict")
    p.add_argument("--languages", default="en,zh", help='comma-separated, or "all" seven (default: en,zh)')
    p.add_argument("--problems", type=int, help="problems per category (default 40: 200 a language)")
    p.add_argument("--seed", type=int, default=0, help="which problems of the test split are drawn")
    p.add_argument("--max-new-tokens", type=int, help="budget (default 256; expag: the script's 128)")
    p.add_argument("--strength", type=float, default=1.0, help="1 removes the subspace (default), 2 reflects it")
    p.add_argument("--dtype", default="auto", choices=("auto", *cli.DTYPES), help="auto: float32 on CPU, else bfloat16")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--out", type=Path, help="folder for the results (default: results/<date>-<mode>-<protocol>)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def chosen_problems(args: argparse.Namespace, languages: tuple[str, ...]) -> list[Problem]:
    """The problems that the protocol asks; raises UserError for options that do not go with it."""
    if args.protocol == "strict":
        return problems("test", 40 if args.problems is None else args.problems, seed=args.seed)
    if foreign := [language for language in languages if language not in EXPAG_LANGUAGES]:
        raise cli.UserError(
            f"the expag protocol has no problems in {foreign[0]!r}: it is the script's 20, in en and zh."
        )
    if args.problems is not None:
        raise cli.UserError("the expag protocol is exactly 20 problems: leave --problems out.")
    return expag_problems()


def load_subspace(args: argparse.Namespace):
    """(Subspace, path) for the modes that need one, or (None, None). Raises UserError where it is missing."""
    if args.mode == "original":
        return None, None
    if args.subspace is None and args.model != "polyglot":
        raise cli.UserError(
            f"--mode {args.mode} needs --subspace for {args.model!r}. Make one with kernel_surgery.collect and .fit."
        )
    from kernel_surgery.subspace import Subspace

    path = args.subspace or cli.POLYGLOT / "subspace.safetensors"
    return Subspace.load(path, force=args.force), path


def open_folder(args: argparse.Namespace, identity: dict) -> Path:
    """The run's folder with its config.json; refuses one that holds another run, or a run not asked to go on."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.out or Path("results") / f"{stamp}-{args.mode}-{args.protocol}"
    config = folder / "config.json"
    if config.exists():
        if not args.resume:
            raise cli.UserError(
                f"{str(folder)!r} holds a run already; it was left as it is. Go on with it (--resume), or choose "
                "another --out."
            )
        old = json.loads(config.read_text(encoding="utf-8"))
        if changed := [key for key in identity if old.get(key) != identity[key]]:
            raise cli.UserError(
                f"{str(folder)!r} holds a run with other settings: {changed[0]} was {old.get(changed[0])!r}, now "
                f"{identity[changed[0]]!r}. It was left as it is. Choose another --out."
            )
    elif args.resume and args.out and folder.exists() and any(folder.iterdir()):
        raise cli.UserError(f"{str(folder)!r} holds no run to go on with (no config.json). Choose another --out.")
    else:
        cli.write_atomic(config, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    return folder


def read_cells(samples: Path, asked: int) -> dict[tuple[str, str], list[dict]]:
    """The finished cells of an interrupted run; a last line cut off by a kill is dropped with its cell."""
    cells: dict[tuple[str, str], list[dict]] = {}
    if samples.exists():
        for line in samples.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                sample = json.loads(line)
                cells.setdefault((sample["mode"], sample["language"]), []).append(sample)
    return {key: cell for key, cell in cells.items() if len(cell) == asked}


def append_cell(samples: Path, cell: list[dict]) -> None:
    """Add one finished cell, on disk before anything else happens."""
    with samples.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in cell)
        file.flush()
        os.fsync(file.fileno())


def applied(mode: str, model, subspace, strength: float, force: bool):
    """The context manager that holds the edit (or none, for the original); yields its record."""
    from kernel_surgery import baked, fused, hooked

    if mode == "original":
        return contextlib.nullcontext()
    applier = {"hook": hooked, "baked": baked, "fused": fused}[mode]
    return applier(model, subspace, strength, force=force)


def describe_edit(edit) -> dict:
    """What results.json says of one applied edit."""
    return {
        "provider": edit.provider,
        "layers": list(edit.layers),
        "strength": edit.strength,
        "note": edit.note,
        "norms": {str(layer): list(pair) for layer, pair in (edit.norms or {}).items()},
    }


def answer_all(model, tokenizer, asked, languages, modes, cells, samples_path, args, subspace, budget):
    """Fill `cells` with every (mode, language) that is missing; returns what each edit recorded."""
    from tqdm import tqdm

    from kernel_surgery.generate import generate
    from kernel_surgery.results import score

    missing = [(m, lang) for m in modes for lang in languages if (m, lang) not in cells]
    bar = tqdm(total=len(missing) * len(asked), file=sys.stderr, disable=not sys.stderr.isatty(), unit="text")
    edits: dict[str, dict] = {}

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    with bar:
        for mode in modes:
            with applied(mode, model, subspace, args.strength, args.force) as edit:
                if edit is not None:
                    edits[mode] = describe_edit(edit)
                for language in (lang for m, lang in missing if m == mode):
                    bar.set_description(f"{mode} {language}")
                    before = dict(edit.calls) if edit is not None and edit.calls else {}
                    texts = generate(
                        model,
                        tokenizer,
                        [p.prompts[language] for p in asked],
                        max_new_tokens=budget,
                        batch_size=args.batch_size,
                        advance=bar.update,
                    )
                    if idle := [layer for layer in before if edit.calls[layer] == before[layer]]:
                        raise RuntimeError(
                            f"{mode} never ran at layers {idle}: these texts are not of the edited model"
                        )
                    cell = [score(p, language, mode, t, decode) for p, t in zip(asked, texts, strict=True)]
                    append_cell(samples_path, cell)
                    cells[mode, language] = cell
    return edits


def print_expag(results: dict, mode: str) -> None:
    """What the reference script prints, in its order."""
    from kernel_surgery.results import expag_table

    for layer, (before, after) in results["edits"].get(mode, {}).get("norms", {}).items():
        print(f"  L{layer}: W_down modified. Norm change: {before:.1f} -> {after:.1f}")
    metrics = results["expag_metrics"]
    for word, key in (("baseline", "original"), ("surgery", mode)):
        if key not in metrics or (word == "surgery" and mode == "original"):
            continue
        for language, r in metrics[key].items():
            print(f"  [{word}] {language.upper()}: {r['correct']}/{r['total']} correct, mean FAT={r['mean_fat']:.1f}")
            print(f"  {language.upper()} prompts -> output languages: {r['languages']}")
    print(expag_table(metrics, mode))


def run(argv: list[str] | None = None) -> int:
    """Validate, answer, score, compare, write, print."""
    args = parser().parse_args(argv)
    languages = cli.parse_languages(args.languages)
    asked = chosen_problems(args, languages)
    budget = args.max_new_tokens if args.max_new_tokens is not None else 256 if args.protocol == "strict" else 128
    for name, value in (("--max-new-tokens", budget), ("--batch-size", args.batch_size)):
        if value < 1:
            raise cli.UserError(f"{name} must be at least 1, got {value}.")
    if not math.isfinite(args.strength):
        raise cli.UserError(f"--strength must be a finite number, got {args.strength}.")
    source = cli.resolve_model(args.model)
    device = cli.parse_device(args.device)
    dtype = cli.parse_dtype(args.dtype, device)
    subspace, subspace_path = load_subspace(args)
    modes = {"all": list(MODES), "original": ["original"]}.get(args.mode) or ["original", args.mode]

    from kernel_surgery import ops, sites
    from kernel_surgery.results import expag_metrics, pair, strict_table, summarize

    digest = hashlib.sha256(subspace_path.read_bytes()).hexdigest() if subspace_path else None
    identity = {key: value for key, value in vars(args).items() if key not in _NOT_IDENTITY}
    identity |= {"subspace": digest, "max_new_tokens": budget, "dtype": str(dtype).removeprefix("torch.")}
    identity |= {"problems": len(asked), "device": device.type}
    model, tokenizer = cli.load_model(source, dtype, device), cli.load_tokenizer(source)
    if subspace is not None:
        subspace.check_model(model, force=args.force)
    folder = open_folder(args, identity)
    samples_path = folder / "samples.jsonl"
    cells = read_cells(samples_path, len(asked)) if args.resume else {}
    started = time.monotonic()
    edits = answer_all(model, tokenizer, asked, languages, modes, cells, samples_path, args, subspace, budget)
    cells = {(m, lang): cells[m, lang] for m in modes for lang in languages}
    results = {
        "schema": 1,
        "config": {**identity, "mode": args.mode, "languages": list(languages), "batch_size": args.batch_size},
        "environment": cli.environment(device) | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "model": {
            "id": args.model,
            "revision": getattr(model.config, "_commit_hash", None),
            "architecture": model.config.model_type,
            "layers": len(sites.decoder_layers(model)),
            "d_model": model.config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "subspace": None
        if subspace is None
        else {
            "file": subspace_path.name,
            "sha256": digest,
            "model_id": subspace.model_id,
            "rank": subspace.rank,
            "layers": list(subspace.layers),
            "site": subspace.site,
            "pool": subspace.pool,
            "fit": subspace.fit,
        },
        "provider": ops.provider(device),
        "edits": edits,
        "modes": {m: {lang: summarize(cells[m, lang], budget) for lang in languages} for m in modes},
        "paired": pair(cells),
        "expag_metrics": expag_metrics(cells),
        "seconds": time.monotonic() - started,
    }
    lines = (json.dumps(sample, ensure_ascii=False) for cell in cells.values() for sample in cell)
    cli.write_atomic(samples_path, "".join(line + "\n" for line in lines))
    cli.write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    from kernel_surgery.report import write_report

    write_report(folder / "report.html", results, cells)
    if args.protocol == "expag":
        for mode in modes[1:] or modes:
            print_expag(results, mode)
    else:
        print(
            f"{args.model}: {len(asked)} test problems a language, greedy, {budget} new tokens, "
            f"{identity['dtype']}, {results['provider']}"
        )
        for note in dict.fromkeys(edit["note"] for edit in edits.values() if edit["note"]):
            print(note)
        print(strict_table(results["modes"], results["paired"]))
    print(f"{folder}: results.json, samples.jsonl, report.html ({results['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    cli.main(run)
