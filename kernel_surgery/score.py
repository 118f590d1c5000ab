"""Command: score texts that any engine generated, with the scorer that `eval` uses.

    python -m kernel_surgery.score FILE.jsonl

Input lines are JSON: {"text", "answer", "language", "prompt"}. "prompt" may be missing, and other fields are preserved.
The same lines go to stdout with {"extracted", "correct", "language_found"} added. A summary goes to stderr.

    --labels   The lines carry a reader's verdict ("correct", and "value" or null). Instead of the lines, print how
               often the scorer agrees with it: precision and recall, beside those of the reference script's rule
               (`scoring.expag`).
"""

import argparse
import json
import sys
from pathlib import Path

from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.ending import Following, next_command
from kernel_surgery.common.progress import progress, waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    description = 'Score texts that any engine generated: JSON lines {"text", "answer", "language", "prompt"}.'
    p = Parser("score", description=description)
    p.add_argument("file", type=Path, help="file of JSON lines; samples.jsonl from an evaluation works too")
    p.add_argument("--labels", action="store_true", help="print how often the scorer agrees with a reader's labels")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the lines with their verdicts, or the table of agreement. Return 0.

    Raises UserError for a line that cannot be used.
    """
    args = parser().parse_args(argv)

    with waiting("starting"):
        from kernel_surgery.evaluation.external import check_labels, label_table, read_lines, scored, summary_table

    lines = read_lines(args.file)
    if args.labels:
        check_labels(args.file, lines)
        print(label_table(lines))
        note = "This shows the verdict on each text:"
        next_command(Following("score", [args.file], note), file=sys.stderr)
        return 0
    results = [scored(line) for line in progress(lines, total=len(lines), desc="score")]
    for line in results:
        print(json.dumps(line, ensure_ascii=False))
    with waiting("counting"):
        summary = summary_table(results)
    print(summary, file=sys.stderr)
    note = 'Write into a copy what you read in each text ("correct", "value"), and see how often the scorer is right:'
    copy = args.file.with_name(f"{args.file.stem}-read.jsonl")
    next_command(Following("score", [copy, "--labels"], note), file=sys.stderr)
    return 0


if __name__ == "__main__":
    main(run)
