"""What the edit did to the answers: python -m kernel_surgery.eval --mode fused

Puts the same problems to the original model and to the edited one, in the same process, and compares them problem by
problem.

    strict   (default) the test split, one final answer a text, exact comparison, intervals and corrected tests
    expag    the reference script's 20 problems and its own scoring, for continuity with its figures; nothing else

Writes DIR/results.json, DIR/samples.jsonl (every text in full) and DIR/report.html. A run that was cut short goes on
with --resume and the same options: each mode and language that was finished is kept.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

from kernel_surgery import cli, runs
from kernel_surgery.controls import parse_controls
from kernel_surgery.modes import MODES, applied, describe_edit, modes_of
from kernel_surgery.problems import EXPAG_LANGUAGES, Problem, expag_problems, problems


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
    p.add_argument("--controls", help="haar:20, energy:20 or pca:20: so many random subspaces beside the real one")
    p.add_argument("--margin", type=float, default=0.05, help="accuracies within it are called equivalent (.05)")
    p.add_argument("--certificate", type=Path, help="JSON file of kernel_surgery.verify, to be shown in the report")
    p.add_argument("--no-damage", action="store_true", help="leave out neutral text and language probes")
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


def check_edits(modes: list[str], model, subspace, args: argparse.Namespace) -> dict[str, dict]:
    """Make and undo every edit once; what each recorded. What cannot be done is found before anything is written."""
    edits = {}
    for mode in modes:
        with applied(mode, model, subspace, args.strength, args.force) as edit:
            if edit is not None:
                edits[mode] = describe_edit(edit)
    return edits


def spectrum_of(subspace) -> dict:
    """What results.json says of the fit: the variance captured by layer, and the leading singular values."""
    from kernel_surgery.fit import variance_captured

    values = {str(i): s for i, s in subspace.spectrum.items() if i in subspace.bases}
    shown = max(40, 2 * subspace.rank)
    return {
        "captured": {i: variance_captured(s, subspace.rank) for i, s in values.items()},
        "spectrum": {i: s[:shown].tolist() for i, s in values.items()},
    }


def read_certificate(path: Path | None) -> dict | None:
    """A certificate of `verify`, for the report. Raises UserError for a file that is none."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != "certificate":
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise cli.UserError(f"{str(path)!r} is no certificate of python -m kernel_surgery.verify.") from error
    return found


def notes_of(subspace, edits: dict[str, dict], args: argparse.Namespace) -> list[str]:
    """What every output says beside the figures. Raises UserError for a subspace fitted on the problems asked."""
    notes = [edit["note"] for edit in edits.values() if edit["note"]]
    for edit in edits.values():
        for reason in dict.fromkeys(edit["fallbacks"].values()):
            layers = [layer for layer, why in edit["fallbacks"].items() if why == reason]
            reach = edit["reach"][layers[0]]
            notes.append(f"fused no further than the {reach} in layers {', '.join(layers)}: {reason}")
    if args.protocol == "expag":
        notes.append("expag: the reference script's problems and scoring, quirks included, for continuity only")
    elif subspace is not None:
        split = (subspace.fit or {}).get("split")
        if split == "test" and not args.force:
            raise cli.UserError(
                "the subspace was fitted on the test split, the problems that are asked here. Nothing was written. "
                "Collect on the fit split, or use --force to see the figures with that note beside them."
            )
        if split == "test":
            notes.append("the subspace was fitted on the test split: nothing here is held out")
        elif split is None:
            notes.append("the subspace does not say which problems it was fitted on: they may be among those asked")
    return list(dict.fromkeys(notes))


def answer_all(model, tokenizer, asked, languages, modes, cells, samples_path, args, subspace, budget) -> None:
    """Fill `cells` with every (mode, language) that is missing, each on disk as it is finished."""
    from kernel_surgery.generate import generate
    from kernel_surgery.results import score, text_of

    missing = [(m, lang) for m in modes for lang in languages if (m, lang) not in cells]
    with cli.bar(len(missing) * len(asked), unit="text") as bar:
        for mode in dict.fromkeys(m for m, _ in missing):
            with applied(mode, model, subspace, args.strength, args.force) as edit:
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
                    cell = [score(p, language, mode, t, text_of(tokenizer)) for p, t in zip(asked, texts, strict=True)]
                    runs.append_cell(samples_path, cell)
                    cells[mode, language] = cell


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
    if not args.margin > 0:
        raise cli.UserError(f"--margin must be positive, got {args.margin}.")
    if args.controls and (args.mode == "original" or args.protocol != "strict"):
        raise cli.UserError("--controls goes with an edited mode and the strict protocol. Nothing was written.")
    parse_controls(args.controls)
    certificate = read_certificate(args.certificate)
    command = cli.command_line("kernel_surgery.eval", argv)
    source = cli.resolve_model(args.model)
    device = cli.parse_device(args.device)
    dtype = cli.parse_dtype(args.dtype, device)
    subspace, subspace_path = load_subspace(args)
    modes = modes_of(args.mode)

    if args.resume and args.out is None:
        raise cli.UserError("--resume goes on with the run in --out: name that folder.")
    folder = args.out or Path("results") / f"{time.strftime('%Y%m%d-%H%M%S')}-{args.mode}-{args.protocol}"
    environment = cli.environment(device)

    from kernel_surgery import sites
    from kernel_surgery.controls import run as run_controls
    from kernel_surgery.controls import table as control_table
    from kernel_surgery.damage import measure as measure_damage
    from kernel_surgery.damage import table as damage_table
    from kernel_surgery.results import expag_metrics, pair, power, score_again, strict_table, summarize
    from kernel_surgery.subspace import fingerprint

    model, tokenizer = cli.load_model(source, dtype, device), cli.load_tokenizer(source)
    layers = len(sites.decoder_layers(model))
    edits = check_edits(modes, model, subspace, args)
    notes = notes_of(subspace, edits, args)
    # What no text depends on may change when a run goes on: controls and damage are added to it.
    later = ("out", "resume", "controls", "margin", "no_damage", "certificate")
    config = {key: value for key, value in vars(args).items() if key not in later}
    config |= {
        "languages": list(languages),
        "problems": len(asked),
        "max_new_tokens": budget,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        # Everything else that a text depends on: the same options with other weights are another run.
        "subspace": hashlib.sha256(subspace_path.read_bytes()).hexdigest() if subspace_path else None,
        "weights": runs.digest(fingerprint(model)),
        "prompts": runs.digest([[p.id, p.prompts[lang]] for p in asked for lang in languages]),
        "versions": {name: environment[name] for name in ("kernel_surgery", "torch", "transformers")},
    }
    runs.open_run(folder, config, resume=args.resume)
    samples_path = folder / "samples.jsonl"
    cells = runs.take_up(samples_path, asked, score_again(tokenizer))
    started, kept = time.monotonic(), len(cells)
    answer_all(model, tokenizer, asked, languages, modes, cells, samples_path, args, subspace, budget)
    made = (len(cells) - kept) * len(asked)
    pace = (time.monotonic() - started) / made if made else None
    cells = {(m, lang): cells[m, lang] for m in modes for lang in languages}
    controls = damage = None
    if args.controls:
        controls = run_controls(model, tokenizer, asked, languages, cells, folder, args, subspace, budget, pace)
    if args.protocol == "strict" and not args.no_damage:
        damage = measure_damage(modes, model, tokenizer, languages, args, subspace)
    paired = pair(cells, args.margin)
    results = {
        "schema": 1,
        "config": config,
        "environment": environment | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        "model": {
            "id": args.model,
            "revision": getattr(model.config, "_commit_hash", None),
            "architecture": model.config.model_type,
            "layers": layers,
            "d_model": model.config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "subspace": None
        if subspace is None
        else {
            "file": subspace_path.name,
            "sha256": config["subspace"],
            "model_id": subspace.model_id,
            "rank": subspace.rank,
            "layers": list(subspace.layers),
            "site": subspace.site,
            "pool": subspace.pool,
            "fit": subspace.fit,
            **spectrum_of(subspace),
        },
        "certificate": certificate,
        "command": command,
        # What ran the edit: the operator's provider where it was used, else PyTorch's own operations.
        "provider": edits["fused"]["provider"] if "fused" in edits else f"aten/{device.type}",
        "edits": edits,
        "notes": notes,
        "modes": {m: {lang: summarize(cells[m, lang], budget) for lang in languages} for m in modes},
        "paired": paired,
        "power": power(paired),
        "controls": controls,
        "damage": damage,
        "expag_metrics": expag_metrics(cells),
        "seconds": time.monotonic() - started,
    }
    runs.write_cells(samples_path, cells)
    cli.write_atomic(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    from kernel_surgery.report import write_report

    write_report(folder / "report.html", results, cells)
    print(
        f"{args.model}: {len(asked)} {'test ' * (args.protocol == 'strict')}problems a language, greedy, {budget} new "
        f"tokens, {config['dtype']}, {results['provider']}"
    )
    for note in notes:
        print(note)
    if args.protocol == "expag":
        for mode in modes[1:] or modes:
            print_expag(results, mode)
    else:
        print(strict_table(results["modes"], results["paired"]))
        if damage and damage["neutral"]:
            print(damage_table(damage))
        if controls:
            print(control_table(controls))
    print(f"{folder}: results.json, samples.jsonl, report.html ({results['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    cli.main(run)
