"""Command: make a bundle from a model, from collection to report, or check a bundle.

    python -m kernel_surgery.reproduce --model M --out DIR
    python -m kernel_surgery.reproduce --check DIR

The first form runs collect, fit, bake, verify and eval (with its report). Steps that are finished are not run again.
The second form checks a bundle without the model: it checks the hashes, scores every text again, and computes every
figure again. See `evaluation.bundle` for the contents.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

from kernel_surgery.common.command import Parser, command_line, kept_in, main, untouched
from kernel_surgery.common.ending import (
    Following,
    Word,
    free,
    look_at,
    next_command,
    one_of_several,
    quoted,
    read_it,
    wrote,
)
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    description = "Run all steps on a model and write a bundle, or check a bundle. A check does not need the model."
    p = Parser("reproduce", description=description)
    p.add_argument("--model", help='"polyglot" (the embedded model), a folder, or a Hugging Face id')
    p.add_argument("--out", type=Path, help="folder for all files; run the same command again to continue")
    p.add_argument("--check", type=Path, help="check this bundle (or the --out that holds it) instead of making one")
    more = "how the edit is made in the evaluation (default: fused)"
    p.add_argument("--mode", default="fused", choices=("hook", "baked", "fused", "lora", "all"), help=more)
    p.add_argument("--rank", type=int, help="dimensions of the subspace (default: one less than languages)")
    p.add_argument("--languages", default="en,zh", help="languages of the evaluation (default: en,zh)")
    p.add_argument("--problems", type=int, help="problems in each of five categories (default 40)")
    p.add_argument("--seed", type=int, default=0, help="selects the test problems (default 0)")
    p.add_argument("--controls", help="also test random subspaces: haar:20, energy:20 or pca:20 (see eval --help)")
    return p


def run_command(name: str, words: list[str]) -> None:
    """Run another command in this process. What comes next is said at the end of all."""
    with one_of_several():
        import_module(f"kernel_surgery.{name}").run(words)


def say(line: str) -> None:
    print(line, flush=True)


def run(argv: list[str] | None = None) -> int:
    """Make or check a bundle. Return 1 if the certificate or the check fails, else 0.

    Raises UserError for options that do not go together.
    """
    args = parser().parse_args(argv)
    if (args.check is None) == (args.out is None) or (args.out is not None and args.model is None):
        raise UserError("give --model and --out to make a bundle, or --check to check one.")

    with waiting("starting"):
        from kernel_surgery.evaluation.bundle import UNCHECKED, Recipe, bundle_in, check_bundle, make_bundle

    if args.check is None:
        recipe = Recipe(**{name: value for name, value in vars(args).items() if name != "check"})
        with untouched(lambda: kept_in(args.out)):
            recipe.check()
            held = make_bundle(recipe, command_line("reproduce", argv), run_command, say)
        wrote(args.out / "bundle")
        read_it(args.out / "bundle" / "report.html")
        if not held:
            look_at(f'"faults" in {quoted(args.out / "certificate.json")}')
            return 1
        next_command(Following("reproduce", ["--check", args.out / "bundle"]))
        return 0
    faults = check_bundle(args.check)
    for fault in faults:
        print(f"fault: {fault}")
    verdict = f"differences: {len(faults)}" if faults else f"every figure follows from the texts; {UNCHECKED}"
    say(f"{bundle_in(args.check)}: {verdict}")
    if faults:
        look_at('the lines above that begin with "fault:"')
        return 1
    next_command(_again(bundle_in(args.check)))
    return 0


def _again(bundle: Path) -> Following:
    """Return the command that makes a bundle again, in another folder: it computes what a check does not."""
    from kernel_surgery.models.load import findable

    results = json.loads((bundle / "results.json").read_text(encoding="utf-8"))
    config, controls, rank = results["config"], results.get("controls"), (results.get("subspace") or {}).get("rank")
    model, given = config["model"], parser().get_default
    place = findable(model)
    words: list[Word] = ["--model", place or "DIR", "--out", free(Path("again")), "--mode", config["mode"]]
    asked = {"languages": ",".join(config["languages"]), "problems": config["problems"] // 5, "seed": config["seed"]}
    asked |= {"rank": rank} if rank is not None and rank < len(LANGUAGES) - 1 else {}  # beyond that none is fitted
    asked |= {"controls": f"{controls['kind']}:{controls['count']}"} if controls else {}
    for name, value in asked.items():
        words += [] if value == given(name) else [f"--{name}", value]
    note = "This makes it again, and with it what no text shows."
    return Following("reproduce", words, note if place else f"{note} DIR is the folder of {model}.")


if __name__ == "__main__":
    main(run)
