"""Every measured table of README.md and docs/, written from kept results and never typed: python -m bench.pages

    --results DIR      first keep the figures of a finished `kernel_surgery.eval --mode fused` (README.md's table)
    --study DIR        first keep a finished study (docs/retest.md)
    --controls DIR...  first keep the controls of finished evaluations (docs/retest.md)

A page shows what lies under bench/results/ and docs/ between two marks, <!-- measured: NAME --> and <!-- end -->.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import tables
from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
KEPT, CONTROLS = tables.RESULTS / "eval-polyglot.json", ROOT / "docs" / "retest-controls.json"
STUDY = ROOT / "docs" / "retest.json"
END = "<!-- end -->"


def answers() -> str:
    """README.md: the evaluation's own table, the command, where and when it was made."""
    from kernel_surgery.evaluation.tables import strict_table

    results = json.loads(KEPT.read_text(encoding="utf-8"))
    environment, config = results["environment"], results["config"]
    command = f"python -m kernel_surgery.eval --mode {config['mode']}"
    if config["languages"] != ["en", "zh"]:
        command += f" --languages {','.join(config['languages'])}"
    return (
        f"```text\n{strict_table(results['modes'], results['paired'])}\n```\n\n"
        f"`{command}` took {results['seconds']:.0f} s on {environment['device']}, torch {environment['torch']}, "
        f"commit {environment['commit'][:10]}, {environment['date'][:10]}. FAT: tokens until the right answer is "
        "complete; Holm p: corrected for all comparisons; the rest: see [below](#how-an-answer-is-judged).\n"
    )


def retest() -> str:
    """Every setting of the re-test, from the study as it was written."""
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    languages, asked = study["declared"]["languages"], study["test"]["original"]
    solved = [f"{name} ({asked[name]['correct']}/{asked[name]['n']})" for name in languages]
    body = []
    for setting in dict.fromkeys(r["mode"] for r in study["paired"]):
        found = {r["language"]: r for r in study["paired"] if r["mode"] == setting}
        known = dict(word.split("=") for word in setting.split())
        cells = [f"{r['delta']:+.3f} ({r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f})" for r in found.values()]
        words = {name: r["verdict"].split(" (")[0] for name, r in found.items()}
        moved = [f"{word} ({', '.join(n for n, w in words.items() if w == word)})" for word in ("improved", "worse")]
        moved = [word for word in moved if not word.endswith("()")]
        margin = next(iter(found.values()))["margin"]
        same = f", within {margin:g} in each language" if all(found[name]["equivalent"] for name in languages) else ""
        words = ", ".join(moved) or f"no difference shown{same}"
        body.append([known["rank"], known["site"], known["strength"], *cells, words])
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

    found = label_table(read_lines(ROOT / "tests" / "labelled.jsonl"))
    return f"```text\n{found}\n```\n"


def controls() -> str:
    """The controls of the re-test's harshest setting."""
    from kernel_surgery.evaluation.controls import table as control_table

    kept = json.loads(CONTROLS.read_text(encoding="utf-8"))
    parts = [f"    {r['command']}\n\n```text\n{control_table(r['controls'])}\n```\n" for r in kept]
    return "\n".join(parts) + f"\nCommit {kept[0]['commit'][:10]}, {kept[0]['date'][:10]}.\n"


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"answers": answers, "speed": tables.speed},
    "docs/benchmarks.md": {
        "opcount": lambda: tables.opcount("stack"),
        "opcount-polyglot": lambda: tables.opcount("polyglot"),
        "gpu": tables.on_gpu,
        "models": tables.models,
        "op": tables.op,
        "fit": tables.fit,
        "evaluation": tables.evaluation,
        "checkpoint": tables.checkpoint,
        "growth": tables.growth,
        "fields": tables.fields,
    },
    "docs/scoring.md": {"labels": labels},
    "docs/retest.md": {"retest": retest, "controls": controls},
}


def renewed(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """A page with every part between its marks replaced. Raises ValueError where a mark is not there once."""
    for name, made in sections.items():
        begin = f"<!-- measured: {name} -->"
        if text.count(begin) != 1 or END not in text.partition(begin)[2]:
            raise ValueError(f"a page must hold {begin} once, with {END} after it; nothing was written.")
        body = begin + "\n" + (made() or "Not measured yet.\n") + END
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(END)}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def finished(folder: Path, name: str = "results.json") -> dict:
    """results.json of a finished evaluation, or study.json of a study. Raises UserError where there is none."""
    file = folder / name
    if not file.is_file():
        raise UserError(f"{str(file)!r} does not exist: give the folder of a finished run.")
    return json.loads(file.read_text(encoding="utf-8"))


def parser() -> Parser:
    """The command line."""
    p = bench_parser("pages", "Write the measured tables from kept results.")
    p.add_argument("--results", type=Path, help="keep the figures of this finished evaluation for README.md first")
    p.add_argument("--study", type=Path, help="keep this finished study first")
    p.add_argument("--controls", type=Path, nargs="+", help="keep the controls of these evaluations first")
    return p


def run(argv: list[str] | None = None) -> int:
    """Keep what is given, rewrite the pages and the plots; nothing where a page lacks its marks."""
    args = parser().parse_args(argv)
    if args.results:
        found = finished(args.results)
        write_atomic(KEPT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if args.study:
        write_atomic(STUDY, json.dumps(finished(args.study, "study.json")) + "\n")
    if args.controls:
        kept = []
        for folder in args.controls:
            r = finished(folder)
            about = {"commit": r["environment"]["commit"], "date": r["environment"]["date"], "command": r["command"]}
            kept.append(about | {"controls": r["controls"]})
        write_atomic(CONTROLS, json.dumps(kept) + "\n")
    pages = {name: renewed((ROOT / name).read_text(encoding="utf-8"), parts) for name, parts in SECTIONS.items()}
    for name, text in pages.items():
        write_atomic(ROOT / name, text)
    from bench.plots import draw

    for name, picture in draw().items():
        write_atomic(ROOT / "bench" / "plots" / name, picture)
    return 0


if __name__ == "__main__":
    main(run)
