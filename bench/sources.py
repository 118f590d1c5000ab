"""The default edit fitted on other problems, beside the one fitted on ours: python -m bench.sources --problems FILES

`--problems` takes what `collect` takes, such as the folder of MGSM's TSV files: problems that nobody here wrote. Three
edits are fitted: on our problems in seven languages (the default), on ours in the languages of the files, and on the
files. For each: the damage on neutral text, and what a probe and the means still tell of the language at the edited
sites, on our unseen wordings and on unseen problems of the files. For the last two also the principal angles between
what they read (B) and what they write (A), layer by layer, beside those of random subspaces.
"""

import json
import statistics
from pathlib import Path

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.files import write_atomic

OURS, FEWER, THEIRS = "our problems", "our problems, the files' languages", "the files' problems"


def angles(one, other) -> list[float]:
    """The principal angles between the spans of two [d, k] tensors, in degrees, from small to large."""
    import torch

    q, r = (torch.linalg.qr(x.double())[0] for x in (one, other))
    return torch.rad2deg(torch.linalg.svdvals(q.T @ r).clamp(max=1).acos()).tolist()


def random_angles(d: int, k: int, draws: int = 200) -> list[float]:
    """The median of each principal angle between two random subspaces."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = [
        angles(*(torch.randn(d, k, generator=generator, dtype=torch.float64) for _ in range(2))) for _ in range(draws)
    ]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def parser() -> Parser:
    """The command line."""
    p = bench_parser("sources", "The default edit fitted on other problems, beside the one fitted on ours.")
    p.add_argument("--problems", nargs="+", required=True, help="as for collect: FILE.jsonl, TSV files or their folder")
    p.add_argument("--model", default="smollm2", help="smollm2 (default), or another model (no chat template is used)")
    p.add_argument("--languages", default="en,zh", help="of the neutral text (default en,zh)")
    p.add_argument("--count", type=int, default=5, help="our problems per category (default 5)")
    p.add_argument("--out", type=Path, help="JSON file to store the result in")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print and store the comparison. Return 0."""
    args = parser().parse_args(argv)

    from bench.timing import stamp
    from kernel_surgery import collect_moments, fit_subspace
    from kernel_surgery.common.names import LANGUAGES
    from kernel_surgery.files.problems import problem_source
    from kernel_surgery.models.architectures import default_layers
    from kernel_surgery.models.load import load_model, load_tokenizer
    from kernel_surgery.models.threads import choose_threads
    from kernel_surgery.problems.generator import problems
    from kernel_surgery.studies.measuring import Measuring, first_problems

    choose_threads(args.model)
    about = {"model": args.model} | stamp("cpu")
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    layers = list(default_layers(model.config.num_hidden_layers))
    source, spoken = problem_source(args.problems), tuple(args.languages.split(","))
    theirs = source.languages()
    asked = {OURS: (problems("test", 4), LANGUAGES), THEIRS: (first_problems(source.split("test"), 20), theirs)}
    measuring = {
        name: Measuring(model, tokenizer, spoken, chosen, languages, layers, "hook", "test")
        for name, (chosen, languages) in asked.items()
    }
    ours = problems("fit", args.count)
    fits = {OURS: (ours, LANGUAGES), FEWER: (ours, theirs), THEIRS: (source.split("fit"), theirs)}
    rows, subspaces = [], {}
    for name, (chosen, languages) in fits.items():
        moments = collect_moments(model, tokenizer, chosen, languages, f"{layers[0]}-{layers[-1]}")
        subspaces[name] = fit_subspace(moments)
        figures = {where: m.figures(m.measure(subspaces[name])) for where, m in measuring.items()}
        row = {"fitted on": name, "languages": list(languages), "rank": subspaces[name].rank}
        row |= {"problems": len(chosen), "tokens": sum(moments.provenance["tokens"].values())}
        row |= {"damage": figures[OURS]["neutral"], "word": figures[OURS]["word"]}
        row |= {"read": {where: {k: found[k] for k in ("probe", "means")} for where, found in figures.items()}}
        rows.append(row)
        print(json.dumps({key: row[key] for key in ("fitted on", "tokens", "word", "read")}), flush=True)
    one, other = subspaces[FEWER].projections, subspaces[THEIRS].projections
    d, k = one[layers[0]].basis.shape
    found = {
        "written": {layer: angles(one[layer].basis, other[layer].basis) for layer in layers},
        "read": {layer: angles(one[layer].reads, other[layer].reads) for layer in layers},
        "random": random_angles(d, k),
    }
    original = {where: {k: getattr(m.measure(None), k) for k in ("probe", "means")} for where, m in measuring.items()}
    result = about | {"problems_file": source.record["problems_file"], "rows": rows, "angles": found}
    result |= {"original": original, "sentences": measuring[OURS].text.sentences}
    for side in ("written", "read"):
        middle = [statistics.median(column) for column in zip(*found[side].values(), strict=True)]
        print(side, *(f"{x:.0f}" for x in middle), "degrees; random", *(f"{x:.0f}" for x in found["random"]))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main(run)
