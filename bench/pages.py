"""Every measured table of README.md and docs/, written from kept results and never typed: python -m bench.pages

    --results DIR      first keep the figures of a finished `kernel_surgery.eval --mode fused` (README.md's table)
    --controls DIR...  first keep the controls of finished evaluations (docs/retest.md)

A page shows what lies under bench/results/ and docs/ between two marks, <!-- measured: NAME --> and <!-- end -->.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.counted import KINDS, figure, off
from bench.model import GOAL
from bench.timing import NOISE, ends
from kernel_surgery import cli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
KEPT, CONTROLS = RESULTS / "eval-polyglot.json", ROOT / "docs" / "retest-controls.json"
END = "<!-- end -->"


def rows(name: str) -> list[dict]:
    """The kept rows of a benchmark; none where it has not been run."""
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def where(row: dict) -> str:
    """Where and when a row was measured."""
    commit = (row["commit"] or "unknown")[:10] + (", tree changed since" if row["dirty"] else "")
    device = f"{row['device']}, " if row.get("device") else ""
    versions = ", ".join(
        f"{name} {row[name]}" for name in ("torch", "transformers", "peft", "nnsight") if row.get(name)
    )
    return f"{device}{versions}, commit {commit}, {row['date']}.\n"


def interval(row: dict) -> str:
    """A ratio with its interval, or its range where there is none."""
    low, high = ends(row)
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def answers() -> str:
    """README.md: the evaluation's own table, the command, where and when it was made."""
    from kernel_surgery.results import strict_table

    results = json.loads(KEPT.read_text(encoding="utf-8"))
    environment, config = results["environment"], results["config"]
    command = f"python -m kernel_surgery.eval --mode {config['mode']}"
    if config["languages"] != ["en", "zh"]:
        command += f" --languages {','.join(config['languages'])}"
    return (
        f"```text\n{strict_table(results['modes'], results['paired'])}\n```\n\n"
        f"`{command}` took {results['seconds']:.0f} s on {environment['device']}, torch {environment['torch']}, "
        f"commit {environment['commit'][:10]}, {environment['date'][:10]}. FAT: tokens until the right answer is "
        "complete; fidelity and coverage: see [below](#how-an-answer-is-judged).\n"
    )


def providers_counted(model: str) -> list[dict]:
    """The rows of bench.counted for a model, but for the original's repetition, which is 0 throughout."""
    return [r for r in rows("counted.json") if r["model"] == model and r["provider"] != NOISE]


def counted(model: str) -> str:
    """What every provider does beyond the original, an edited layer."""
    found, out = providers_counted(model), ""
    for dtype in dict.fromkeys(r["dtype"] for r in found):
        chosen = [r for r in found if r["dtype"] == dtype]
        body = [[r["provider"], *(f"{figure(r, kind):.4g}" for kind in KINDS), off(r)] for r in chosen]
        out += f"{dtype}, d_model {chosen[0]['d']}, k = {chosen[0]['k']}; bytes in units of the MLP's output\n\n"
        out += table(["", *(kind.replace("_", " ") for kind in KINDS), "error/bound"], body) + "\n"
    return out + where(found[0]) if found else ""


def speed() -> str:
    """README.md: the counted work in short, and the other ratios in a line each, each with where it was measured."""
    found, lines = providers_counted("stack"), []
    dtypes = list(dict.fromkeys(r["dtype"] for r in found))
    body = []
    for name in dict.fromkeys(r["provider"] for r in found):
        line = [name]
        for dtype in dtypes:
            row = next((r for r in found if (r["provider"], r["dtype"]) == (name, dtype)), None)
            line += [f"{row['allocations']:g}", f"{figure(row, 'bytes_moved'):.1f}", off(row)] if row else [""] * 3
        body.append(line)
    head = [f"{word}, {dtype}" for dtype in dtypes for word in ("tensors", "bytes", "error/bound")]
    out = table(["", *head], body) + "\n" + where(found[0]) + "\n" if found else ""
    for name, which, words in (
        ("fit.json", "kernel_surgery.fit", "`fit`: {} times the speed of numpy's full SVD of the same layers, exact"),
        ("evaluation.json", "kernel_surgery.eval", "`eval`: {} times the speed of a loop over single prompts"),
        ("evaluation.json", "the loop, batched", "that loop, batched: {} times"),
        ("checkpoint-bake.json", "bake", "`bake`: {} of the time of `cp -r` and `sha256sum`"),
    ):
        for row in rows(name):
            if row["provider"] == which:
                said = interval(row) if "ratio" in row else f"{row['ratio_to_floor']:.2f}"
                lines.append(f"- {words.format(said)}. {where(row)}")
    return out + "".join(lines) + "\nIn full: [docs/benchmarks.md](docs/benchmarks.md).\n"


def op_table(found: list[dict], cuda: bool = False) -> str:
    """The operators beside their alternatives; on CUDA replayed and cold, without what the host's launches cost."""
    body = []
    for r in found:
        if r["left_out"] or (cuda and r["cache"] == "warm" and not r["graph"]):
            continue
        low, high = ends(r)
        broken = "" if r["error_over_bound"] <= 1 else " (breaks its bound)"
        body.append(
            [
                *(r["case"], f"{r['M']} x {r['d']}, k = {r['k']}", r["dtype"], r["provider"], f"{r['us_p50']:.3g}"),
                f"{r['fraction_of_copy']:.2f} ({1 / high:.2f} to {1 / low:.2f})",
                f"{r['error_over_bound']:.2f}{broken}",
                *([r["cache"], str(r["launches"])] if cuda else []),
            ]
        )
    head = ["", "rows x d", "", "provider", "us", "speed over the floor's", "error/bound"]
    return table([*head, *(["cache", "launches"] if cuda else [])], body)


def op() -> str:
    """The operators on this CPU."""
    found = rows("op.json")
    return op_table(found) + "\n" + where(found[0]) if found else ""


def fit() -> str:
    """Providers of the fit."""
    found = rows("fit.json")
    body = [
        [
            r["provider"],
            "yes" if r["exact"] else "no",
            f"{r['us_p50'] / 1e6:.3f}",
            interval(r),
            f"{r['sine']:.1e}",
            f"{r['residual']:.1e}",
        ]
        for r in found
    ]
    if not found:
        return ""
    head = ["", "exact", "s a layer", "times the script's speed", "sine to a float64 SVD", "residual"]
    first = found[0]
    about = f"{first['layers']} layers of {first['rows']} x {first['d']} deviations, k = {first['k']}.\n\n"
    return about + table(head, body) + "\n" + where(first)


def evaluation() -> str:
    """The evaluation against the loop."""
    found = rows("evaluation.json")
    if not found:
        return ""
    body = [
        [
            r["provider"],
            str(r["batch"]),
            f"{r['us_p50'] / 1e6:.1f}",
            f"{r['tokens'] / r['us_p50'] * 1e6:.0f}",
            interval(r),
        ]
        for r in found
    ]
    parted = max(r["parted_by_rounding"] for r in found)
    about = f"{found[0]['texts']} texts, the same from all (at most {parted} parted by rounding).\n\n"
    return about + table(["", "batch", "s", "tokens/s", "times the loop's speed"], body) + "\n" + where(found[0])


def checkpoint() -> str:
    """Baking against its floor and its peers."""
    out = ""
    for name in ("checkpoint-bake.json", "checkpoint-peers.json"):
        found = rows(name)
        if not found:
            continue
        body = [
            [
                r["provider"],
                f"{r['seconds_p50']:.1f}",
                f"{r['ratio_to_floor']:.2f}",
                *(
                    f"{r[key]:{form}}" if key in r else ""
                    for key, form in (
                        ("peak_resident_gb", ".2f"),
                        ("peak_anonymous_gb", ".2f"),
                        ("leak_over_floor", ".3f"),
                        ("error_over_bound", ".3f"),
                        ("not_correctly_rounded", ".5f"),
                    )
                ),
            ]
            for r in found
        ]
        head = ["", "s", "of the floor", "resident GB", "anonymous GB", "leak/floor", "error/bound", "wrongly rounded"]
        about = f"{found[0]['gigabytes']:.2f} GB, {found[0]['layers']} layers of Qwen2.5-3B's shapes.\n\n"
        out += about + table(head, body) + "\n" + where(found[0]) + "\n"
    return out


def model_tables(found: list[dict]) -> str:
    """Every provider in a model, phase by phase."""
    out = ""
    for key in dict.fromkeys((r["how"], r["case"], r["sequences"], r["tokens"]) for r in found):
        chosen = [r for r in found if (r["how"], r["case"], r["sequences"], r["tokens"]) == key]
        first, body = chosen[0], []
        for r in chosen:
            if r["left_out"]:
                body.append([r["provider"], "", "", "", "", r["left_out"]])
                continue
            low, high = ends(r)
            goal = {None: "", True: f"; {GOAL} met", False: f"; {GOAL} not met"}[r["goal_met"]]
            times = [f"{r['us_p50'] / 1e3:.2f}", f"{r['ratio']:.3f} ({low:.3f} to {high:.3f})", f"{r['us_added']:+.0f}"]
            body.append([r["provider"], *times, f"{r['error_over_bound']:.2f}", r["verdict"] + goal])
        noise = next((f"; noise {r['noise']:.3f}" for r in chosen if not r["left_out"]), "")
        out += (
            f"{first['model']}, {first['layers']} layers, {first['edited']} edited, {first['dtype']}, {key[0]}: "
            f"{key[1]} {key[2]} x {key[3]}{noise}\n\n"
            + table(["", "ms", "of the original (95% interval)", "us added", "error/bound", ""], body)
            + "\n"
        )
    return out + where(found[0]) + "\n" if found else ""


def models() -> str:
    """Every kept model."""
    return "".join(model_tables(rows(f"model-{case}.json")) for case in ("layer", "stack", "polyglot"))


def on_gpu() -> str:
    """The newest run of `make gpu`: what was checked, the operators, the whole model."""
    runs = sorted(file.parent for file in RESULTS.glob("*/summary.json"))
    if not runs:
        return "Nothing has been measured on a GPU yet; `make gpu` is what will.\n"
    folder = runs[-1]
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    about = found["environment"] | {"date": f"{found['date'][:4]}-{found['date'][4:6]}-{found['date'][6:]}"}
    parts = [[name, str(part["status"]), f"{part['seconds']:.0f}"] for name, part in found["parts"].items()]
    made = where(about) + "\n" + table(["part", "status", "s"], parts) + "\n"
    op_rows, model_rows = rows(f"{folder.name}/op.json"), rows(f"{folder.name}/model.json")
    if op_rows:
        made += f"A large copy moved {op_rows[0]['copy_gbps']:.0f} GB/s.\n\n{op_table(op_rows, cuda=True)}\n"
    return made + model_tables(model_rows)


def growth() -> str:
    """Fitted slopes."""
    found = rows("growth.json")
    body = []
    for what in dict.fromkeys(r["case"] for r in found):
        chosen = [r for r in found if r["case"] == what]
        sizes = ", ".join(f"{r['size']}: {r['seconds'] * 1e3:.3g}" for r in chosen)
        first = chosen[0]
        most = f"{max(r['peak_bytes'] for r in chosen) / 1e6:.0f} MB"
        memory = "-" if first["memory_slope"] is None else f"{first['memory_slope']:.2f}"
        body.append([what, sizes, f"{first['slope']:.2f} ± {first['slope_se']:.2f}", first["expected"], memory, most])
    head = ["", "ms", "slope of time", "expected", "slope of peak memory", "at most"]
    return table(head, body) + "\n" + where(found[0]) if found else ""


def labels() -> str:
    """The scorer's precision and recall."""
    from kernel_surgery.score import label_table, read_lines

    found = label_table(read_lines(ROOT / "tests" / "labelled.jsonl"))
    return f"```text\n{found}\n```\n"


def controls() -> str:
    """The controls of the re-test's harshest setting."""
    from kernel_surgery.controls import table as control_table

    kept = json.loads(CONTROLS.read_text(encoding="utf-8"))
    parts = [f"    {r['command']}\n\n```text\n{control_table(r['controls'])}\n```\n" for r in kept]
    return "\n".join(parts) + f"\nCommit {kept[0]['commit'][:10]}, {kept[0]['date'][:10]}.\n"


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"answers": answers, "speed": speed},
    "docs/benchmarks.md": {
        **{
            "counted": lambda: counted("stack"),
            "counted-polyglot": lambda: counted("polyglot"),
            "gpu": on_gpu,
            "models": models,
            "op": op,
            "fit": fit,
        },
        **{"evaluation": evaluation, "checkpoint": checkpoint, "growth": growth},
    },
    "docs/scoring.md": {"labels": labels},
    "docs/retest.md": {"controls": controls},
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


def finished(folder: Path) -> dict:
    """results.json of a finished evaluation. Raises UserError where there is none."""
    file = folder / "results.json"
    if not file.is_file():
        raise cli.UserError(f"{str(file)!r} does not exist: give the folder of a finished evaluation.")
    return json.loads(file.read_text(encoding="utf-8"))


def parser() -> cli.Parser:
    """The command line."""
    p = cli.Parser(prog="python -m bench.pages", description="Write the measured tables from kept results.")
    p.add_argument("--results", type=Path, help="keep the figures of this finished evaluation for README.md first")
    p.add_argument("--controls", type=Path, nargs="+", help="keep the controls of these evaluations first")
    return p


def run(argv: list[str] | None = None) -> int:
    """Keep what is given, rewrite the pages and the plots; nothing where a page lacks its marks."""
    args = parser().parse_args(argv)
    if args.results:
        found = finished(args.results)
        cli.write_atomic(KEPT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if args.controls:
        kept = []
        for folder in args.controls:
            r = finished(folder)
            about = {"commit": r["environment"]["commit"], "date": r["environment"]["date"], "command": r["command"]}
            kept.append(about | {"controls": r["controls"]})
        cli.write_atomic(CONTROLS, json.dumps(kept) + "\n")
    pages = {name: renewed((ROOT / name).read_text(encoding="utf-8"), parts) for name, parts in SECTIONS.items()}
    for name, text in pages.items():
        cli.write_atomic(ROOT / name, text)
    from bench.plots import draw

    for name, picture in draw().items():
        cli.write_atomic(ROOT / "bench" / "plots" / name, picture)
    return 0


if __name__ == "__main__":
    cli.main(run)
