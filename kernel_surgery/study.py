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

The same command goes on where it was killed. DIR/study.json has everything.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, command_line, main


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser("study", description="Choose among declared settings on dev, freeze the choice, report it on test.")
    p.add_argument("grid", type=Path, help="TOML file; python -m pydoc kernel_surgery.study shows one")
    p.add_argument("--out", type=Path, required=True, help="folder of the study; the same command goes on in it")
    p.add_argument("--controls", help="haar:20, energy:20 or pca:20: random subspaces beside the chosen one, on test")
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the study, and print its tables."""
    args = parser().parse_args(argv)

    from kernel_surgery.evaluation.study import read_grid, run_study, shown

    study = run_study(read_grid(args.grid), args.out, controls=args.controls, command=command_line("study", argv))
    print(shown(study))
    print(f"{args.out}: study.json, frozen.json, chosen.safetensors, dev.jsonl, test.jsonl")
    return 0


if __name__ == "__main__":
    main(run)
