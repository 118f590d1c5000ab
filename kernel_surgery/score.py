"""Texts made by any engine, scored as `eval` scores its own: python -m kernel_surgery.score FILE.jsonl

Lines {"text", "answer", "language", "prompt"} in ("prompt" may be missing; whatever else a line holds is kept); the
same lines plus {"extracted", "correct", "language_found"} out, on stdout. A summary goes to stderr.

    --labels   the lines carry a reader's verdict ("correct", and "value" or null): print, instead of the lines, how
               often the scorer agrees: its precision and recall, and those of the reference script's rule beside it
"""

import argparse
import json
import sys
from pathlib import Path

from kernel_surgery.common.command import Parser, main


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = 'Score texts: JSON lines {"text", "answer", "language", "prompt"}, made by any engine.'
    p = Parser("score", description=description)
    p.add_argument("file", type=Path, help="the lines; samples.jsonl of an evaluation has them too")
    p.add_argument("--labels", action="store_true", help="compare with a reader's verdicts instead")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the lines with their verdicts, or the table of agreement."""
    args = parser().parse_args(argv)

    from kernel_surgery.common.progress import progress
    from kernel_surgery.evaluation.external import check_labels, label_table, read_lines, scored, summary_table

    lines = read_lines(args.file)
    if args.labels:
        check_labels(args.file, lines)
        print(label_table(lines))
        return 0
    results = [scored(line) for line in progress(lines, total=len(lines), desc="score")]
    for line in results:
        print(json.dumps(line, ensure_ascii=False))
    print(summary_table(results), file=sys.stderr)
    return 0


if __name__ == "__main__":
    main(run)
