"""Write every measured table of README.md and docs/ from stored results: python -m bench.pages

    --check            write nothing; print one line for each page or plot that is not up to date, and return 1
    --results DIR      first store the figures of a finished `kernel_surgery.eval --mode fused` (README.md's table)
    --study DIR        first store a finished study (docs/retest.md), or a search (docs/real.md)
    --controls DIR...  first store the controls of finished evaluations (docs/retest.md)
    --probes DIR...    first store finished runs of `kernel_surgery.probe`; one with the same command is replaced
                       (docs/real.md)

A table stands between two marks on its page: <!-- measured: NAME --> and <!-- end -->. Nobody types a figure there.
The reference of the public names (docs/api.md) and the messages of docs/errors.md are written in the same way.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import api, architectures, blocks, cost, engines, messages, readme, reals, tables
from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
ANSWERS, CONTROLS = tables.RESULTS / "eval-polyglot.json", ROOT / "docs" / "retest-controls.json"
STUDY = ROOT / "docs" / "retest.json"
END = "<!-- end -->"


def answers(explained: str = "below") -> str:
    """The evaluation's table with its command, machine and date. explained: link to what its columns mean."""
    from kernel_surgery.evaluation.tables import strict_table

    results = json.loads(ANSWERS.read_text(encoding="utf-8"))
    environment, config = results["environment"], results["config"]
    command = f"python -m kernel_surgery.eval --mode {config['mode']}"
    if config["languages"] != ["en", "zh"]:
        command += f" --languages {','.join(config['languages'])}"
    return (
        f"```text\n{results['damage_in_words']}\n\n{strict_table(results['modes'], results['paired'])}\n```\n\n"
        f"`{command}` took {results['seconds']:.0f} s on {environment['device']}, torch {environment['torch']}, "
        f"commit {environment['commit'][:10]}, {environment['date'][:10]}. FAT: tokens until the right answer is "
        f"complete; Holm p: corrected for all comparisons; the rest: see {explained}.\n"
    )


def retest() -> str:
    """Every setting of the re-test, from the stored study."""
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    languages, asked = study["declared"]["languages"], study["test"]["original"]
    solved = [f"{name} ({asked[name]['correct']}/{asked[name]['n']})" for name in languages]
    body = []
    for setting in dict.fromkeys(r["mode"] for r in study["paired"]):
        rows = {r["language"]: r for r in study["paired"] if r["mode"] == setting}
        options = dict(word.split("=") for word in setting.split())
        cells = [f"{r['delta']:+.3f} ({r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f})" for r in rows.values()]
        words = {name: r["verdict"].split(" (")[0] for name, r in rows.items()}
        moved = [f"{word} ({', '.join(n for n, w in words.items() if w == word)})" for word in ("improved", "worse")]
        moved = [word for word in moved if not word.endswith("()")]
        margin = next(iter(rows.values()))["margin"]
        same = f", within {margin:g} in each language" if all(rows[name]["equivalent"] for name in languages) else ""
        words = ", ".join(moved) or f"no difference shown{same}"
        body.append([options["rank"], options["site"], options["strength"], *cells, words])
    about = study["environment"]
    return (
        tables.table(["rank", "fitted at", "strength", *solved, "both, by problem", ""], body)
        + f"\nIntervals are each comparison's own, 95%; the words are corrected for all {len(study['paired'])} "
        "together, and hold at this budget. "
        f"{about['device']}, torch {about['torch']}, commit {about['commit'][:10]}.\n"
    )


def labels() -> str:
    """The scorer's precision and recall."""
    from kernel_surgery.evaluation.external import label_table, read_lines

    text = label_table(read_lines(ROOT / "tests" / "labelled.jsonl"))
    return f"```text\n{text}\n```\n"


def controls() -> str:
    """The controls of the re-test's harshest setting."""
    from kernel_surgery.evaluation.controls import table as control_table

    stored = json.loads(CONTROLS.read_text(encoding="utf-8"))
    parts = [f"    {r['command']}\n\n```text\n{control_table(r['controls'])}\n```\n" for r in stored]
    return "\n".join(parts) + f"\nCommit {stored[0]['commit'][:10]}, {stored[0]['date'][:10]}.\n"


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"two models": reals.two_models, "places": readme.places, "peers": readme.peers},
    "docs/benchmarks.md": {
        "opcount": lambda: tables.opcount("stack"),
        "opcount-polyglot": lambda: tables.opcount("polyglot"),
        "gpu": tables.on_gpu,
        "blocks": blocks.found,
        "models": tables.models,
        "op": tables.op,
        "collect": tables.collect,
        "fit": tables.fit,
        "evaluation": tables.evaluation,
        "checkpoint": tables.checkpoint,
        "busy": tables.busy,
        "growth": tables.growth,
        "fields": tables.fields,
    },
    "docs/cost.md": {"speed": lambda: tables.speed("benchmarks.md")},
    "docs/engines.md": {
        "engines": engines.found,
        "engines-models": engines.architectures,
        "throughput": engines.throughput,
    },
    "docs/judging.md": {"answers": answers},
    "docs/models.md": {"models": architectures.found, "refused": architectures.refused},
    "docs/api.md": {"api": api.page},
    "docs/errors.md": messages.SECTIONS,
    "docs/scale.md": {"cost": cost.page},
    "docs/scoring.md": {"labels": labels},
    "docs/real.md": {
        "real": reals.real,
        "search": reals.search,
        "sources": reals.sources,
        "curve": reals.curve,
        "streams": reals.streams,
        "probes": reals.probes,
        "texts": reals.texts,
        "polyglot": reals.polyglot,
    },
    "docs/retest.md": {"retest": retest, "controls": controls},
}


def renewed(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """A page with every table replaced. Raises UserError unless the page has each mark exactly once."""
    for name, section in sections.items():
        begin = f"<!-- measured: {name} -->"
        if text.count(begin) != 1 or END not in text.partition(begin)[2]:
            raise UserError(f"a page must have {begin} exactly once, with {END} after it. Nothing was written.")
        body = begin + "\n" + (section() or "Not measured yet.\n") + END
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(END)}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def finished(folder: Path, name: str = "results.json") -> dict:
    """results.json of a finished evaluation, or study.json of a study. Raises UserError if there is no such file."""
    file = folder / name
    if not file.is_file():
        raise UserError(f"{str(file)!r} does not exist: give the folder of a finished run.")
    return json.loads(file.read_text(encoding="utf-8"))


def parser() -> Parser:
    """The command line."""
    p = bench_parser("pages", "Write the measured tables from stored results.")
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is not up to date")
    p.add_argument("--results", type=Path, help="first store the figures of this finished evaluation for README.md")
    p.add_argument("--study", type=Path, help="first store this finished study")
    p.add_argument("--controls", type=Path, nargs="+", help="first store the controls of these evaluations")
    p.add_argument("--probes", type=Path, nargs="+", help="first store these finished runs of probe")
    return p


def store_inputs(args: argparse.Namespace) -> None:
    """Copy the results that the command line names to the files that the tables are made from."""
    if args.results:
        write_atomic(ANSWERS, json.dumps(finished(args.results), indent=1, ensure_ascii=False) + "\n")
    if args.study and "search" in finished(args.study, "study.json"):
        held = finished(args.study, "study.json")
        kept = ("declared", "environment", "damage_in_words", "search", "frozen", "measured", "difference", "damage")
        write_atomic(reals.SEARCH, json.dumps({name: held[name] for name in kept}, indent=1) + "\n")
    elif args.study:
        write_atomic(STUDY, json.dumps(finished(args.study, "study.json")) + "\n")
    if args.controls:
        stored = []
        for folder in args.controls:
            r = finished(folder)
            about = {"commit": r["environment"]["commit"], "date": r["environment"]["date"], "command": r["command"]}
            stored.append(about | {"controls": r["controls"]})
        write_atomic(CONTROLS, json.dumps(stored) + "\n")
    if args.probes:
        runs = {run["command"]: run for run in reals.probe_runs()}
        runs |= {run["command"]: run for run in (reals.of_probe(finished(at, "probe.json")) for at in args.probes)}
        write_atomic(reals.PROBES, json.dumps(list(runs.values()), indent=1, ensure_ascii=False) + "\n")


def outdated() -> dict[str, str]:
    """{file: the text it should have} of every page and plot that is not up to date.

    Raises UserError, and names the page, if a page lacks a mark.
    """
    from bench.plots import draw, same_picture

    texts = {}
    for page, sections in SECTIONS.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        try:
            new = renewed(text, sections)
        except UserError as error:
            raise UserError(f"{page}: {error}") from error
        if new != text:
            texts[page] = new
    for name, picture in draw().items():
        file = ROOT / "bench" / "plots" / name
        if not file.is_file() or not same_picture(picture, file.read_text(encoding="utf-8")):
            texts[f"bench/plots/{name}"] = picture
    return texts


def run(argv: list[str] | None = None) -> int:
    """Store what is given, then write the pages and plots that are not up to date. With --check only list them."""
    args = parser().parse_args(argv)
    if args.check:
        if args.results or args.study or args.controls or args.probes:
            raise UserError("--check writes nothing: leave out --results, --study, --controls and --probes.")
        files = outdated()
        for name in files:
            print(f"{name} is not up to date. Run python -m bench.pages")
        return 1 if files else 0
    store_inputs(args)
    for name, text in outdated().items():
        write_atomic(ROOT / name, text)
    return 0


if __name__ == "__main__":
    main(run)
