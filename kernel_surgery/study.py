"""Command: choose among declared settings on dev, freeze the choice, and report it on test.

    python -m kernel_surgery.study GRID.toml --out DIR

GRID.toml declares the settings. The lines above [grid] may be left out; they show the defaults:

    model = "polyglot"
    mode = "fused"
    languages = ["en", "zh"]
    problems = 40                        # per category, on dev and on test
    max_new_tokens = 256
    budget = 256                         # texts are cut off here before cells are compared
    seed = 0
    test = "chosen"                      # or "all": every cell is asked the test problems, with correction for all

    [grid]                               # each value is a list; the cells are their product
    rank = [1, 3, 6, 10]
    site = ["mlp_out", "resid_post"]
    pool = ["last"]
    strength = [1.0, 2.0]
    layers = ["middle"]                  # or "2-5"

The same command continues an interrupted study. All figures are in DIR/study.json.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, command_line, main


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("study", description="Choose among declared settings on dev, freeze the choice, report it on test.")
    p.add_argument("grid", type=Path, help="TOML file; python -m pydoc kernel_surgery.study shows one")
    p.add_argument("--out", type=Path, required=True, help="folder of the study; the same command goes on in it")
    p.add_argument("--controls", help="haar:20, energy:20 or pca:20: random subspaces beside the chosen one, on test")
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the study and print its tables. Return 0. Raises what `evaluation.study` raises."""
    args = parser().parse_args(argv)

    from kernel_surgery.evaluation.study import read_grid, run_study, shown

    study = run_study(read_grid(args.grid), args.out, controls=args.controls, command=command_line("study", argv))
    print(shown(study))
    print(f"{args.out}: study.json, frozen.json, chosen.safetensors, dev.jsonl, test.jsonl")
    return 0


if __name__ == "__main__":
    main(run)
