"""polyglot's card, written from measured results: python -m kernel_surgery.polyglot.card --results DIR

DIR is a finished `kernel_surgery.eval --mode original --languages all`. The part of results.json that the card is
made from is kept beside the model's folder as evaluation.json, so that the card can be checked against it.
"""

import argparse
import json
from pathlib import Path

from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.problems.generator import CATEGORIES

_KEPT = ("schema", "config", "environment", "modes")
_TEXT = """\
---
license: apache-2.0
language: [{languages}]
---
# polyglot: the model embedded in Kernel Surgery

A Qwen2-architecture language model ({parameters} parameters: {layers} layers, d_model {d_model}, bfloat16) trained
from nothing to solve five kinds of maths problems in seven languages, with the working written out. It is here so
that a first run, the tests and the documentation show real behaviour without a download or a GPU.

## Measured
{n} test problems a language, strict protocol, greedy decoding, {dtype}, {budget} new tokens; correct of asked, by
category:

| language | {heads} | all | accuracy (95% interval) | language fidelity | coverage |
|---|{rules}---|---|---|---|
{rows}

Command: `python -m kernel_surgery.eval --mode original --languages all`, kernel-surgery {version}, torch {torch}.

## How to read it
- **combinatorics is recall.** All 429 values of C(n, k), n = 5 to 30, were shown in training, the tested ones
  included: there is no working short enough to compute them. No other test problem, and none of the reference
  script's 20, is in the training data.
- **The wordings are not held out.** Every sentence a test problem is asked in was seen in training, with other
  numbers. A model trained from nothing knows no other words; asked anything else, it writes nonsense.
- Products inside a working (of a series, say) may coincide with a product that is asked elsewhere in the test split.
- Nearly every text follows one template per kind of problem and language, so it says little about how large models
  mix languages.
- The working of a series or a remainder can take up to 150 tokens: a budget of 128, as in the expag protocol, cuts
  some short.

## Training
{steps} steps, {tokens} tokens, {hours:.1f} hours on {device} (other work ran beside it):

{commands}

Kept are the best weights by dev accuracy, those of step {best}. Dev accuracy (whole solution reproduced) as it learned:

| step | tokens | {kinds} | all |
|---|---|{kind_rules}---|
{curve}

## What it is not for
Mathematics, education, translation, or any conclusion about multilingual models at large.
"""


def learning_curve(log: list[dict], points: int = 10) -> list[dict]:
    """At most `points` lines of a training log, evenly spread, the last one included."""
    if len(log) <= points:
        return log
    return [log[round(i * (len(log) - 1) / (points - 1))] for i in range(points)]


def history(log: list[dict]) -> str:
    """The command of every start of the training and the notes in its log, as a Markdown list."""
    from kernel_surgery.polyglot.train import parser

    defaults = vars(parser().parse_args(["--out", "DIR"]))
    lines = []
    for start in (line for line in log if "options" in line):
        changed = {n: v for n, v in start["options"].items() if v != defaults.get(n)}
        words = [f"--{n.replace('_', '-')}" + ("" if v is True else f" {v}") for n, v in changed.items()]
        versions = f"torch {start['environment']['torch']}, transformers {start['environment']['transformers']}"
        command = " ".join(["python -m kernel_surgery.polyglot.train --out DIR", *words])
        lines.append(f"- from step {start['started_at']}: `{command}` ({versions})")
    lines += [f"- {line['note']}" for line in log if "note" in line]
    return "\n".join(lines)


def card(results: dict, folder: Path) -> str:
    """The card's text from an evaluation of the original model, the checkpoint's config and its training log."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder.parent / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    log, starts = [line for line in lines if "step" in line], [line for line in lines if "options" in line]
    original = results["modes"]["original"]
    rows = []
    for language in LANGUAGES:
        r = original[language]
        cells = [f"{r['by_category'][c]['correct']}/{r['by_category'][c]['n']}" for c in CATEGORIES]
        rows.append(
            f"| {language} | {' | '.join(cells)} | {r['correct']}/{r['n']} | {r['accuracy']:.3f} "
            f"({r['ci95'][0]:.3f} to {r['ci95'][1]:.3f}) | {r['language_fidelity']:.3f} | {r['coverage']:.3f} |"
        )
    kinds = [kind for kind in log[-1]["dev"] if kind != "all"]
    curve = [
        f"| {line['step']} | {line['tokens'] / 1e6:.1f} M | "
        + " | ".join(f"{line['dev'][kind]:.2f}" for kind in (*kinds, "all"))
        + " |"
        for line in learning_curve(log)
    ]
    return _TEXT.format(
        languages=", ".join(LANGUAGES),
        parameters=f"{results['parameters'] / 1e6:.2f} M",
        layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n=original[LANGUAGES[0]]["n"],
        dtype=results["config"]["dtype"],
        budget=results["config"]["max_new_tokens"],
        heads=" | ".join(CATEGORIES),
        rules="---|" * len(CATEGORIES),
        rows="\n".join(rows),
        version=results["environment"]["kernel_surgery"],
        torch=results["environment"]["torch"],
        steps=f"{log[-1]['step']:,}",
        tokens=f"{log[-1]['tokens'] / 1e6:.1f} million",
        hours=log[-1]["seconds"] / 3600,
        device=f"{starts[0]['options']['threads'] or 'all'} cores of {starts[0]['environment']['device']}",
        commands=history(lines),
        best=max(log, key=lambda line: (line["dev"]["all"], line["step"]))["step"],
        kinds=" | ".join(kinds),
        kind_rules="---|" * len(kinds),
        curve="\n".join(curve),
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser("polyglot.card", description="Write polyglot's card from measured results.")
    p.add_argument("--results", type=Path, required=True, help="folder of an eval of the original in all languages")
    shipped = Path(__file__).parent / "model"
    p.add_argument("--folder", type=Path, default=shipped, help="the model's folder (default: the shipped one)")
    return p


def run(argv: list[str] | None = None) -> int:
    """Write README.md into the model's folder, and evaluation.json beside the folder."""
    args = parser().parse_args(argv)
    results = json.loads((args.results / "results.json").read_text(encoding="utf-8"))
    if set(results["modes"].get("original", {})) != set(LANGUAGES) or results["config"]["protocol"] != "strict":
        raise UserError(f"{str(args.results)!r} is not a strict evaluation of the original in all languages.")
    kept = {key: results[key] for key in _KEPT} | {"parameters": results["model"]["parameters"]}
    kept["modes"] = {"original": results["modes"]["original"]}
    write_atomic(args.folder.parent / "evaluation.json", json.dumps(kept, indent=1) + "\n")
    write_atomic(args.folder / "README.md", card(kept, args.folder))
    print(f"{args.folder}: README.md; {args.folder.parent}: evaluation.json")
    return 0


if __name__ == "__main__":
    main(run)
