"""Command: what a linear probe still reads of the language after an edit, and after random edits beside it.

    python -m kernel_surgery.probe --model M --subspace S --out DIR

Is an edit about the language, or would any k directions do? The fitted edit and random ones of the same rank are
measured in the same way, on test problems that no fit has seen:

    probe        accuracy of a held-out linear probe for the language of every prompt token, at the edited layers
    means left   how much the languages' means still differ there: 1 without an edit
    stream       the same probe in the residual stream, after the last edited layer and after the model's last one
    KL           the damage: on neutral text, or on the prompts where a language has no neutral text

Any language of a file of --problems will do: nothing is answered, so nothing has to be judged.

`--controls` names the random edits: energy:N are uniform and take as much of the activations' energy as the fitted
edit, matched:N lie where the activations vary, haar:N are uniform at the fitted edit's strength, pca:N lie among the
principal components. The default is five of each of the first two. 19 of a kind can show p = .05.

DIR has probe.json, report.html and measured.json. A run that was killed goes on with --resume; more random edits may be
asked for then, and those that were measured stay. Several processes share the layers and the languages: torchrun
--nproc-per-node N -m kernel_surgery.probe ..., or accelerate launch.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, add_chat, add_problems, command_line, kept_in, main, untouched
from kernel_surgery.common.ending import Following, Word, next_command, read_it, strength_words, wrote
from kernel_surgery.common.names import DTYPES, LANGUAGES, RANDOM_EDITS
from kernel_surgery.common.progress import waiting

PROMPT = "A PROMPT IN YOUR LANGUAGE"


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    description = "Measure what a linear probe still reads of the language after an edit, beside random edits.\n"
    description += "Several processes may share the work: start it with torchrun or accelerate launch."
    p = Parser("probe", description=description)
    more = '"polyglot" (the embedded model, default), a folder, or a Hugging Face id'
    p.add_argument("--model", default="polyglot", help=more)
    p.add_argument("--subspace", type=Path, help="subspace file (default: the one shipped with polyglot)")
    p.add_argument("--out", type=Path, required=True, help="folder for the results")
    more = "random edits beside it: kinds with numbers, of haar, matched, energy and pca (default "
    more += f"{RANDOM_EDITS})"
    p.add_argument("--controls", default=RANDOM_EDITS, help=more)
    more = "1 removes the subspace (default), 2 reflects it, 0 changes nothing"
    p.add_argument("--strength", type=float, default=1.0, help=more)
    add_problems(p, "default 40")
    more = "problems of the test split whose tokens the probe reads, at most (default 20)"
    p.add_argument("--probed", type=int, default=20, metavar="N", help=more)
    more = "that the probe tells apart, and in which the damage is measured; comma-separated, or all: "
    more += f"{','.join(LANGUAGES)}, or what a file of --problems is in (default: all)"
    p.add_argument("--languages", default="all", help=more)
    more = "what the damage is measured on (default: neutral, if there is such text in all languages)"
    p.add_argument("--text", choices=("neutral", "prompts"), help=more)
    p.add_argument("--seed", type=int, default=0, help="selects the problems from the split (default 0)")
    add_chat(p)
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    p.add_argument("--resume", action="store_true", help="continue the run in --out, with the same options")
    more = "accept a subspace of unknown origin, of another model, or fitted on the test problems"
    p.add_argument("--force", action="store_true", help=more)
    return p


def run(argv: list[str] | None = None) -> int:
    """Measure the edits and print the tables. Return 0. Raises what `studies.probing.run_probe` raises."""
    args = parser().parse_args(argv)

    with waiting("starting"):
        from kernel_surgery.common.ranks import current
        from kernel_surgery.evaluation.options import Options
        from kernel_surgery.models.threads import choose_threads
        from kernel_surgery.studies.probe_words import shown
        from kernel_surgery.studies.probing import run_probe

    ranks = current()
    given = {name: value for name, value in vars(args).items() if name not in ("probed", "controls", "text")}
    choose_threads(args.model)
    with untouched(lambda: kept_in(args.out)):
        about = {"probed": args.probed, "controls": args.controls, "text": args.text}
        found = run_probe(Options(mode="hook", **given), **about, command=command_line("probe", argv), ranks=ranks)
    if not ranks.first:
        return 0
    print(shown(found))
    wrote(args.out, ("probe.json", "report.html", "measured.json"))
    read_it(args.out / "report.html")
    judged = set(found["asked"]["languages"]) <= set(LANGUAGES)
    broken, rank = found["measured"]["edit"]["word"] == "broken", found["subspace"]["rank"]
    next_command(_following(args, broken=broken, rank=rank, judged=judged))
    return 0


def _following(args: argparse.Namespace, *, broken: bool, rank: int = 1, judged: bool = True) -> Following:
    """Return what shows the model's answers. broken: whether the edit breaks the model. judged: whether answers are, in
    the languages of the edit. rank: of the edit."""
    words: list[Word] = ["--mode", "fused", "--model", args.model]
    words += ["--subspace", args.subspace] if args.subspace else []
    words += strength_words(args.strength)
    words += ["--force"] if args.force else []
    note = "What the edited model answers is another question. This measures it:"
    if broken:
        less = "fewer layers or a lower rank (fit --layers, --rank)" if rank > 1 else "fewer layers (fit --layers)"
        note = f"Try {less}. {note}"
    if not judged:
        return Following("compare", [*words, PROMPT], note.replace("measures", "shows"))
    return Following("eval", words, note)


if __name__ == "__main__":
    main(run, shared=True)
