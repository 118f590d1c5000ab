"""Command: compare the answers of the original and the edited model.

    python -m kernel_surgery.eval --mode fused

Both models answer the same problems in the same process, and are compared problem by problem. Writes DIR/results.json,
DIR/samples.jsonl (every text in full) and DIR/report.html. An interrupted run continues with --resume and the same
options.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, command_line, main
from kernel_surgery.common.names import DTYPES, MODES


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("eval", description="Compare a model with and without its language subspace on maths problems.")
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
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: float32 on CPU, else bfloat16")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--out", type=Path, help="folder for the results (default: results/<date>-<mode>-<protocol>)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the evaluation and print the tables. Return 0. Raises what `evaluation.run.evaluate` raises."""
    args = parser().parse_args(argv)

    from kernel_surgery.evaluation.run import Options, evaluate
    from kernel_surgery.evaluation.tables import shown

    def say(line: str) -> None:
        print(line, flush=True)

    evaluation = evaluate(Options(**vars(args)), command=command_line("eval", argv), say=say)
    print(shown(evaluation.results))
    seconds = evaluation.results["seconds"]
    print(f"{evaluation.folder}: results.json, samples.jsonl, report.html ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    main(run)
