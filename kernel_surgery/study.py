"""Command: choose among declared settings on dev, freeze the choice, and report it on test.

    python -m kernel_surgery.study DECLARATION.toml --out DIR

The declaration has either a [grid], whose settings are all tried, or a [search], which looks for the best setting by
a declared rule, such as the least damage. A search needs Optuna, the extra `search`; `python -m pydoc
kernel_surgery.studies.space` shows one. The lines above [grid] may be left out; they show the defaults:

    model = "polyglot"
    mode = "fused"
    languages = ["en", "zh"]
    problems = 40                        # per category, on dev and on test; or as --problems of eval
    max_new_tokens = 256
    budget = 256                         # texts are cut off here before cells are compared
    seed = 0
    chat = "auto"                        # or "on", "off": as --chat
    thinking = false                     # as --thinking
    engine = "transformers"              # or "vllm": it writes the texts of a [grid], in mode fused, baked or lora
    tensor_parallel = 1                  # devices of vLLM
    engine_args = {}                     # more arguments of vllm.LLM, such as {enforce_eager = true}
    test = "chosen"                      # or "all": every cell is asked the test problems, with correction for all

    [grid]                               # each value is a list; the cells are their product
    rank = [1, 3, 6, 10]
    site = ["mlp_out", "resid_post"]
    pool = ["last"]
    strength = [1.0, 2.0]
    layers = ["middle"]                  # or "2-5"

With engine = "vllm" every setting is an engine of its own, one after the other. The fits and the damage are those of
the model that transformers loads. It needs memory beside the engine: on a GPU, engine_args =
{gpu_memory_utilization = 0.6} leaves it some.

The same command continues an interrupted study. All figures are in DIR/study.json. It also writes
DIR/report.html, with a picture of what was tried.

Several processes share the answering and, in a search, the measuring: torchrun --nproc-per-node N -m
kernel_surgery.study ..., or accelerate launch. To continue, start as many. Texts of vLLM need one process.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, add_chat, command_line, kept_in, main, untouched
from kernel_surgery.common.ending import next_command, read_it, wrote
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    description = "Choose a setting from a grid or by a search, on dev; freeze it; and report it on test.\n"
    description += "Several processes may share the work: start it with torchrun or accelerate launch."
    p = Parser("study", description=description)
    p.add_argument("grid", type=Path, help="TOML file of the settings; python -m pydoc kernel_surgery.study shows one")
    more = "folder of the study; run the same command again to continue, with as many processes"
    p.add_argument("--out", type=Path, required=True, help=more)
    more = "also test random subspaces beside the chosen one: haar:20, energy:20 or pca:20 (see eval --help)"
    p.add_argument("--controls", help=more)
    add_chat(p, None)
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the study and print its tables. Return 0. Raises what `studies.study` raises."""
    args = parser().parse_args(argv)

    with waiting("starting"):
        from kernel_surgery.common.ranks import current
        from kernel_surgery.evaluation.following import after_study
        from kernel_surgery.models.threads import choose_threads
        from kernel_surgery.studies.declaring import read_grid
        from kernel_surgery.studies.study import run_study, shown

    ranks = current()
    with untouched(lambda: kept_in(args.out)):
        grid = read_grid(args.grid)
        grid |= {"chat": args.chat or grid["chat"], "thinking": args.thinking or grid["thinking"]}
        choose_threads(grid["model"])
        command = command_line("study", argv)
        study = run_study(grid, args.out, controls=args.controls, command=command, ranks=ranks)
    if not ranks.first:
        return 0
    print(shown(study))
    wrote(args.out, ("report.html", "study.json", "frozen.json", "chosen.safetensors", "every text and trial"))
    read_it(args.out / "report.html")
    next_command(after_study(grid, args.out, study))
    return 0


if __name__ == "__main__":
    main(run, shared=True)
