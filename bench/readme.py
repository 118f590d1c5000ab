"""The README's table of figures, written from a results file and never typed: python -m bench.readme --results DIR

DIR is a finished `kernel_surgery.eval --mode fused`. Its results.json is kept as bench/results/eval-polyglot.json; the
README shows what stands there, between two marks.
"""

import json
import re
from pathlib import Path

from kernel_surgery import cli

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "bench" / "results" / "eval-polyglot.json"
MARKS = ("<!-- measured: python -m bench.readme -->", "<!-- end -->")


def section(results: dict) -> str:
    """What stands between the marks: the run's own table, the command, where and when it was made."""
    from kernel_surgery.results import strict_table

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


def with_section(readme: str, results: dict) -> str:
    """The README with the part between the marks replaced. Raises ValueError where the marks are not there once."""
    begin, end = MARKS
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold {begin} and {end} once each; nothing was written.")
    body = f"{begin}\n{section(results)}{end}"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, readme, flags=re.DOTALL)


def run(argv: list[str] | None = None) -> int:
    """Keep the results and rewrite README.md; neither where README.md lacks the marks."""
    parser = cli.Parser(prog="python -m bench.readme", description="Write the README's table from an evaluation.")
    parser.add_argument("--results", type=Path, required=True, help="folder of a finished kernel_surgery.eval")
    args = parser.parse_args(argv)
    file = args.results / "results.json"
    if not file.is_file():
        raise cli.UserError(f"{str(file)!r} does not exist: give the folder of a finished evaluation.")
    results = json.loads(file.read_text(encoding="utf-8"))
    readme = with_section((ROOT / "README.md").read_text(encoding="utf-8"), results)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    cli.write_atomic(KEPT, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    cli.write_atomic(ROOT / "README.md", readme)
    return 0


if __name__ == "__main__":
    cli.main(run)
