"""An edit fitted on other problems, beside the one fitted on ours: python -m bench.sources --problems FILES

`--problems` takes what `collect` takes, such as the folder of MGSM's TSV files: problems that nobody here wrote. Three
oblique edits are fitted to all tokens of prompts as they are: of our problems in seven languages, of ours in the
languages of the files, and of the files. For each: the damage on neutral text, and what a probe and the means still
tell of the language at the edited sites, on our unseen wordings and on unseen problems of the files, in the languages
of the files. For the last two also the principal angles between
what they read (B) and what they write (A), layer by layer, beside those of random subspaces.

Then a learning curve: the edit fitted on the first problems of the files, on more and more of them, at every rank, and
layer by layer. Rows are stored one by one; --resume goes on with those that are missing.

At last, what a probe reads of unseen prompts of the files, at the MLPs' outputs and in the residual stream: of every
token, as above, and of the last one alone, as `eval` does. Of the original, and with the edits that were fitted on all
of the files' problems.
"""

import json
import statistics
from pathlib import Path

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

ORIGINAL, ALONE, IN_ORDER = "original", "one by one", "layer by layer"
EVERY, LAST = "every token", "last token"
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


def curve(count: int, most: int) -> list[tuple[int, int | None, bool]]:
    """(problems, rank or None for the most, layer by layer) of every row of the curve, for `count` problems."""
    sizes = [n for n in (2, 6, 18, 54) if n < count]
    rows: list[tuple[int, int | None, bool]] = [(n, None, False) for n in sizes]
    rows += [(count, rank, False) for rank in range(1, most)]
    return rows + [(n, None, True) for n in (*sizes[-1:], count)]


def parser() -> Parser:
    """The command line."""
    p = bench_parser("sources", "An edit fitted on other problems, beside the one fitted on ours.")
    p.add_argument("--problems", nargs="+", required=True, help="as for collect: FILE.jsonl, TSV files or their folder")
    p.add_argument("--model", default="smollm2", help="smollm2 (default), or another model (no chat template is used)")
    p.add_argument("--languages", default="en,zh", help="of the neutral text (default en,zh)")
    p.add_argument("--count", type=int, default=5, help="our problems per category (default 5)")
    p.add_argument("--out", type=Path, help="JSON file to store the result in")
    p.add_argument("--resume", action="store_true", help="keep the rows that are in --out, and go on")
    return p


class Sources:
    """A loaded model, the problems of both sources, and what measures an edit on each."""

    def __init__(self, name: str, files: list[str], spoken: tuple[str, ...], count: int):
        from kernel_surgery.common.names import LANGUAGES
        from kernel_surgery.files.problems import problem_source
        from kernel_surgery.models.architectures import default_layers
        from kernel_surgery.models.load import load_model, load_tokenizer, local_folder, resolve_model
        from kernel_surgery.problems.generator import problems
        from kernel_surgery.studies.measuring import Measuring, first_problems

        self.folder = local_folder(resolve_model(name))
        self.model, self.tokenizer = load_model(name), load_tokenizer(name)
        self.layers = list(default_layers(self.model.config.num_hidden_layers))
        source = problem_source(files)
        self.file, theirs, ours = source.record["problems_file"], source.languages(), problems("fit", count)
        self.fits = {OURS: (ours, LANGUAGES), FEWER: (ours, theirs), THEIRS: (source.split("fit"), theirs)}
        # Both in the languages of the files, so that no edit is asked about a language that it was not fitted on.
        asked = {OURS: (problems("test", 4), theirs), THEIRS: (first_problems(source.split("test"), 20), theirs)}
        self.unseen = source.split("test")
        self.moments: dict = {}  # {(source, problems): what was collected}
        about = (self.layers, "hook", "test")
        self.measuring = {
            where: Measuring(self.model, self.tokenizer, spoken, chosen, languages, *about)
            for where, (chosen, languages) in asked.items()
        }

    def fit(self, name: str, count: int | None = None, rank: int | None = None, sequential: bool = False):
        """The subspace fitted on the first `count` problems of a source (None: on all)."""
        import torch

        from kernel_surgery import collect_moments, fit_subspace
        from kernel_surgery.models.layerwise import Layerwise
        from kernel_surgery.subspace.sequential import fit_sequentially

        chosen, languages = self.fits[name]
        if sequential:
            reader = Layerwise(self.folder, torch.float32)
            return fit_sequentially(reader, self.tokenizer, chosen[:count], languages, self.layers, rank=rank)
        key = name, len(chosen[:count])
        if key not in self.moments:
            layers = f"{self.layers[0]}-{self.layers[-1]}"
            self.moments[key] = collect_moments(self.model, self.tokenizer, chosen[:count], languages, layers)
        return fit_subspace(self.moments[key], rank)

    def probes(self, subspace) -> dict[str, dict[str, dict[int, float]]]:
        """{which tokens: {site: {layer: a probe's accuracy}}} on the files' test problems. subspace: or None.

        Of every token, at the first, the middle and the last edited layer and the model's last.
        """
        from kernel_surgery.edit.modes import applied
        from kernel_surgery.evaluation.effects import last_states, probe_accuracy, probes

        measuring, languages, edited = self.measuring[THEIRS], self.fits[THEIRS][1], self.layers
        layers = [edited[0], edited[len(edited) // 2], edited[-1], self.model.config.num_hidden_layers - 1]
        every: dict = {"mlp_out": {}, "resid_post": {}}
        with applied("original" if subspace is None else "hook", self.model, subspace, 1.0):
            last = probes(last_states(self.model, self.tokenizer, self.unseen, languages), len(languages))
            rows, groups, labels = measuring.tokens_at(dict.fromkeys(every, layers))
        for site, found in every.items():
            found |= {layer: probe_accuracy(x, labels, groups) for layer, x in rows[site].items()}
        return {EVERY: every, LAST: last}

    def row(self, subspace, where: tuple[str, ...]) -> dict:
        """What is measured of a subspace on the given sources."""
        found = {name: self.measuring[name].figures(self.measuring[name].measure(subspace)) for name in where}
        first = found[where[0]]
        read = {name: {key: by[key] for key in ("probe", "probe_ci95", "means")} for name, by in found.items()}
        fit = subspace.fit
        return {"rank": subspace.rank, "problems": fit["problems"], "tokens": sum(fit["tokens"].values())} | {
            "damage": first["neutral"],
            "word": first["word"],
            "read": read,
        }


def run(argv: list[str] | None = None) -> int:
    """Print and store the comparison and the learning curve. Return 0. Raises UserError for rows of another run."""
    args = parser().parse_args(argv)

    from bench.timing import stamp
    from kernel_surgery.models.threads import choose_threads

    choose_threads(args.model)
    result: dict = {"rows": {}, "curve": {}, "streams": {}}
    if args.resume and args.out and args.out.is_file():
        result |= json.loads(args.out.read_text(encoding="utf-8"))
    sources = Sources(args.model, args.problems, tuple(args.languages.split(",")), args.count)
    about = {"model": args.model, "problems_file": sources.file, "spoken": args.languages, "count": args.count}
    for name, value in about.items():
        if result.get(name, value) != value:
            raise UserError(f"{str(args.out)!r} holds rows with {name} {result[name]!r}, not {value!r}.")
    measured = stamp("cpu")
    about["command"] = f"python -m bench.sources --problems {sources.file}"  # without a folder of this machine
    result = measured | result | about  # every row has the stamp of its own run, if the file's is another
    own = {name: measured[name] for name in ("commit", "dirty", "date", "torch", "device")}

    def keep(part: str, name: str, row: dict) -> None:
        result[part][name] = row | own
        print(part, name, json.dumps({key: row.get(key) for key in ("tokens", "word", "read")}), flush=True)
        if args.out:
            write_atomic(args.out, json.dumps(result, indent=1) + "\n")

    if "original" not in result:
        both = {where: measuring.measure(None) for where, measuring in sources.measuring.items()}
        result["original"] = {where: found.as_json()["probe"] for where, found in both.items()}
        result["sentences"] = sources.measuring[OURS].text.sentences
    subspaces = {}
    for name in (OURS, FEWER, THEIRS):
        if name not in result["rows"] or "angles" not in result:
            subspaces[name] = sources.fit(name)
        if name not in result["rows"]:
            row = sources.row(subspaces[name], (OURS, THEIRS))
            keep("rows", name, row | {"languages": list(sources.fits[name][1])})
    if "angles" not in result:
        one, other = subspaces[FEWER].projections, subspaces[THEIRS].projections
        d, k = one[sources.layers[0]].basis.shape
        result["angles"] = {
            "written": {layer: angles(one[layer].basis, other[layer].basis) for layer in sources.layers},
            "read": {layer: angles(one[layer].reads, other[layer].reads) for layer in sources.layers},
            "random": random_angles(d, k),
        }
    for count, rank, sequential in curve(len(sources.fits[THEIRS][0]), len(sources.fits[THEIRS][1]) - 1):
        name = f"{count} problems, rank {rank or 'all'}{', layer by layer' * sequential}"
        if name not in result["curve"]:
            subspace = sources.fit(THEIRS, count, rank, sequential)
            keep("curve", name, sources.row(subspace, (THEIRS,)) | {"sequential": sequential})
    for name, sequential in ((ORIGINAL, None), (ALONE, False), (IN_ORDER, True)):
        if name not in result["streams"]:
            subspace = None if sequential is None else sources.fit(THEIRS, sequential=sequential)
            counts = {EVERY: len(sources.measuring[THEIRS].asked), LAST: len(sources.unseen)}
            keep("streams", name, {"problems": counts, "read": sources.probes(subspace)})
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main(run)
