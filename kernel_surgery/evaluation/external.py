"""Scoring of texts that any engine generated, with the scorer that `eval` uses.

Input lines are JSON: {"text", "answer", "language", "prompt"}. "prompt" may be missing, and other fields are preserved.
The output adds {"extracted", "correct", "language_found"} to each line.

Lines with a reader's verdict ("correct", and "value" or null) serve as labels. They show how often the scorer agrees:
its precision and recall, beside those of the reference script's rule (`scoring.expag`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.evaluation.judging import judged
from kernel_surgery.evaluation.stats import wilson
from kernel_surgery.scoring.answers import exact
from kernel_surgery.scoring.expag import expag_check
from kernel_surgery.scoring.language import fidelity, judge

# The required fields and their types.
_FIELDS: dict[str, type | tuple[type, ...]] = {"text": str, "answer": (str, int, float), "language": str}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read and check the lines of a file. Raises UserError that names the line and the wrong field."""
    lines = []
    # Split at line feeds only: a text may contain U+2028.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}).") from error
        if not isinstance(line, dict):
            raise UserError(f"{where} is a {type(line).__name__}, not an object.")
        if not isinstance(line.get("prompt", ""), (str, type(None))):
            raise UserError(f"{where}: 'prompt' is {json.dumps(line['prompt'])}, not a string.")
        for name, kind in _FIELDS.items():
            if not isinstance(line.get(name), kind) or isinstance(line.get(name), bool):
                given = json.dumps(line[name]) if name in line else "missing"
                wanted = "a number, or a string that holds one" if name == "answer" else "a string"
                raise UserError(f"{where}: {name!r} is {given}. It must be {wanted}.")
        if line["language"] not in LANGUAGES:
            raise UserError(
                f"{where}: unknown language {line['language']!r}; known: {', '.join(LANGUAGES)}."
            )
        for name in ("answer", "value"):
            try:
                exact(line[name] if line.get(name) is not None else 0)
            except (ValueError, TypeError, ZeroDivisionError) as error:
                raise UserError(f"{where}: {name} {line[name]!r} is not a number.") from error
        lines.append(_without_surrogates(line))
    if not lines:
        raise UserError(f"{str(path)!r} holds no lines.")
    return lines


def _without_surrogates(value: Any) -> Any:
    """Replace lone surrogates in every name and text by "?". JSON can express them, but UTF-8 output cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value


def scored(line: dict[str, Any]) -> dict[str, Any]:
    """Return the line with the verdict of the strict protocol."""
    verdicts = judged(line["text"], line.get("prompt") or "", line["language"], exact(line["answer"]))
    return line | {key: verdicts[key] for key in ("extracted", "correct", "language_found")}


@dataclass(frozen=True)
class Agreement:
    """How well a scorer agrees with a reader on n texts.

    called_right: texts that the scorer called right. are_right: those the reader called right. both: those that both
    did. same_value: texts from which both took the same answer; None for the reference script's rule.
    """

    n: int
    called_right: int
    are_right: int
    both: int
    same_value: int | None = None

    @property
    def precision(self) -> float:
        return self.both / self.called_right if self.called_right else math.nan

    @property
    def recall(self) -> float:
        return self.both / self.are_right if self.are_right else math.nan


def agreement(lines: Sequence[dict], rule: str = "strict") -> Agreement:
    """Compare our scorer ("strict"), or the reference script's rule ("expag"), with the labels of the lines."""
    calls, same_value = [], 0
    for line in lines:
        if rule == "expag":
            calls.append(expag_check(line["text"], line["answer"]))
            continue
        result = scored(line)
        calls.append(result["correct"])
        label = None if line["value"] is None else exact(line["value"])
        same_value += (None if result["extracted"] is None else Fraction(result["extracted"])) == label
    labels = [bool(line["correct"]) for line in lines]
    both = sum(a and b for a, b in zip(calls, labels, strict=True))
    return Agreement(len(lines), sum(calls), sum(labels), both, same_value if rule == "strict" else None)


def label_table(lines: Sequence[dict]) -> str:
    """Return precision and recall by language, for our scorer and for the reference script's rule."""
    languages = list(dict.fromkeys(line["language"] for line in lines))
    rows = [f"{'':<5} {'texts':>5} {'right':>5}   precision recall  same answer   reference script:  precision recall"]
    for language in [*languages, None]:
        subset = [line for line in lines if language in (None, line["language"])]
        ours, script = agreement(subset), agreement(subset, "expag")
        assert ours.same_value is not None  # only the script's rule takes no answer
        rows.append(
            f"{language or 'all':<5} {ours.n:>5} {ours.are_right:>5}   {ours.precision:>9.3f} {ours.recall:>6.3f}"
            f"  {ours.same_value / ours.n:>11.3f}   {script.precision:>28.3f} {script.recall:>6.3f}"
        )
    return "\n".join(rows)


def check_labels(path: Path, lines: Sequence[dict]) -> None:
    """Check the labels. Raises UserError for a line without a reader's verdict, or with a contradictory one."""
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get("correct"), bool) or "value" not in line:
            raise UserError(f'{str(path)!r}, text {number}: --labels needs "correct" and "value" in every line.')
        value = line["value"]
        if line["correct"] != (value is not None and exact(value) == exact(line["answer"])):
            raise UserError(
                f"{str(path)!r}, text {number}: it says correct={line['correct']}, value={value!r} and answer="
                f"{line['answer']!r}, which contradict each other."
            )


def summary_table(lines: Sequence[dict]) -> str:
    """Return accuracy, language fidelity and coverage by language, one line each.

    Fidelity is the share of judged texts with no line in another language. Coverage is the share that could be judged.
    Lines with a "mode", as in samples.jsonl, are counted by mode: an edited model is never pooled with the original.
    """
    rows = []
    for mode, name in dict.fromkeys((_mode(line), line["language"]) for line in lines):
        subset = [line for line in lines if (_mode(line), line["language"]) == (mode, name)]
        right = sum(line["correct"] for line in subset)
        low, high = wilson(right, len(subset))
        language_rates = fidelity([judge(line["text"], name) for line in subset])
        rate = "-" if language_rates["language_fidelity"] is None else f"{language_rates['language_fidelity']:.3f}"
        rows.append(
            f"{mode}{name}: {right}/{len(subset)} right, {right / len(subset):.3f} ({low:.3f} to {high:.3f}), language "
            f"fidelity {rate}, judged {language_rates['coverage']:.3f}"
        )
    return "\n".join(rows)


def _mode(line: dict[str, Any]) -> str:
    mode = line.get("mode")
    return "" if mode is None else f"{mode} "
