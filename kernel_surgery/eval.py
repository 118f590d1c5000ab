"""Command: compare the answers of the original and the edited model.

    python -m kernel_surgery.eval --mode fused

Both models answer the same problems in the same process, and are compared problem by problem. Writes DIR/results.json,
DIR/samples.jsonl (every text in full) and DIR/report.html. An interrupted run continues with --resume and the same
options.

Several processes share the answering: torchrun --nproc-per-node N -m kernel_surgery.eval ..., or accelerate launch.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import (
    Parser,
    add_chat,
    add_engine,
    add_problems,
    command_line,
    kept_in,
    main,
    untouched,
)
from kernel_surgery.common.ending import next_command, read_it, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES, LANGUAGES, MODES
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("eval", description="Compare a model with and without its language subspace on maths problems.")
    more = "how the edit is made: hook (plain PyTorch), baked (in the weights), fused (one operator, the default) or "
    more += "lora (an adapter); original: no edit; all: compare all of them"
    p.add_argument("--mode", choices=(*MODES, "all"), help=more)
    more = '"polyglot" (the embedded model, default), a folder, or a Hugging Face id'
    p.add_argument("--model", default="polyglot", help=more)
    p.add_argument("--subspace", type=Path, help="subspace file (default: the one shipped with polyglot)")
    more = "evaluate this checkpoint from kernel_surgery.bake as it is, beside the --model that it was made of"
    p.add_argument("--baked", type=Path, help=more)
    p.add_argument("--adapter", type=Path, help="the same for an adapter from kernel_surgery.lora")
    more = "strict (default): test problems, exact scoring, confidence intervals; expag: the 20 problems and the "
    more += "scoring of the script that the project began with, to compare with its figures"
    p.add_argument("--protocol", choices=("strict", "expag"), default="strict", help=more)
    more = f"comma-separated, or all: {','.join(LANGUAGES)} (default: en,zh)"
    p.add_argument("--languages", default="en,zh", help=more)
    add_problems(p, "default 40, that is 200 per language")
    p.add_argument("--seed", type=int, default=0, help="selects the problems from the test split (default 0)")
    p.add_argument("--max-new-tokens", type=int, help="longest text, in tokens (default 256; expag: 128)")
    more = "1 removes the subspace (default), 2 reflects it, 0 changes nothing"
    p.add_argument("--strength", type=float, default=1.0, help=more)
    more = "KIND:N also tests N random subspaces: haar:20 (uniform), energy:20 (scaled to remove as much), pca:20 "
    more += "(among the principal components)"
    p.add_argument("--controls", help=more)
    more = "accuracies that differ by less than this are equivalent (default 0.05)"
    p.add_argument("--margin", type=float, default=0.05, help=more)
    p.add_argument("--certificate", type=Path, help="JSON file from kernel_surgery.verify, shown in the report")
    p.add_argument("--no-damage", action="store_true", help="skip the measurements on neutral text and the probes")
    add_chat(p)
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    p.add_argument("--batch-size", type=int, default=64, help="prompts that are generated at a time (default 64)")
    add_engine(p)
    p.add_argument("--out", type=Path, help="folder for the results (default: results/<date>-<mode>-<protocol>)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out, with the same options")
    more = "accept a subspace of unknown origin, of another model, or fitted on the test problems"
    p.add_argument("--force", action="store_true", help=more)
    return p


def run(argv: list[str] | None = None) -> int:
    """Run the evaluation and print the tables. Return 0. Raises what `evaluation.run.evaluate` raises."""
    args = parser().parse_args(argv)

    with waiting("starting"):
        from kernel_surgery.common.ranks import current
        from kernel_surgery.evaluation.following import after_evaluation
        from kernel_surgery.evaluation.options import Options
        from kernel_surgery.evaluation.run import evaluate
        from kernel_surgery.evaluation.tables import shown
        from kernel_surgery.models.threads import choose_threads

    ranks = current()

    def say(line: str) -> None:
        if ranks.first:
            print(line, flush=True)

    choose_threads(args.model)
    with untouched("Nothing was written."):
        if args.mode not in (None, "baked" if args.baked else "lora") and (args.baked or args.adapter):
            raise UserError(f"a folder is evaluated as it was written: leave out --mode {args.mode}.")
        options = ranks.agreed(Options(**vars(args) | {"mode": args.mode or "fused"}).as_written().with_folder())
    with untouched(lambda: kept_in(options.out)):
        evaluation = evaluate(options, command=command_line("eval", argv), say=say, ranks=ranks)
    if not ranks.first:
        return 0
    print(shown(evaluation.results))
    print(f"took {evaluation.results['seconds']:.0f} s")
    wrote(evaluation.folder, ("results.json", "samples.jsonl", "report.html"))
    read_it(evaluation.folder / "report.html")
    next_command(after_evaluation(options, evaluation.results))
    return 0


if __name__ == "__main__":
    main(run, shared=True)
