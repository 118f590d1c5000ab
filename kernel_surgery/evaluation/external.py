"""Texts made by any engine, scored as `eval` scores its own: python -m kernel_surgery.score FILE.jsonl

Lines {"text", "answer", "language", "prompt"} in ("prompt" may be missing; whatever else a line holds is kept); the
same lines plus {"extracted", "correct", "language_found"} out, on stdout. A summary goes to stderr.

    --labels   the lines carry a reader's verdict ("correct", and "value" or null): print, instead of the lines, how
               often the scorer agrees: its precision and recall, and those of the reference script's rule beside it
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.evaluation.judging import judged
from kernel_surgery.evaluation.stats import wilson
from kernel_surgery.scoring.answers import exact_answer
from kernel_surgery.scoring.expag import expag_check
from kernel_surgery.scoring.language import fidelity, judge

# A field that must be there, and what it may be.
LARGEST_EXPONENT = 400
_FIELDS = {"text": str, "answer": (str, int, float), "language": str}


def read_lines(path: Path) -> list[dict]:
    """The lines of a file, checked. Raises UserError naming the line and the field that is wrong."""
    lines = []
    # Split at line feeds alone: a text may hold U+2028.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}). Nothing was scored.") from error
        if not isinstance(line, dict):
            raise UserError(f"{where} is a {type(line).__name__}, not an object. Nothing was scored.")
        if not isinstance(line.get("prompt", ""), (str, type(None))):
            raise UserError(f"{where}: 'prompt' is {line['prompt']!r}. Nothing was scored.")
        for name, kind in _FIELDS.items():
            if not isinstance(line.get(name), kind) or isinstance(line.get(name), bool):
                raise UserError(f"{where}: {name!r} is {line.get(name)!r}. Nothing was scored.")
        if line["language"] not in LANGUAGES:
            raise UserError(
                f"{where}: unknown language {line['language']!r}; known: {', '.join(LANGUAGES)}. Nothing was scored."
            )
        for name in ("answer", "value"):
            try:
                exact(line[name] if line.get(name) is not None else 0)
            except (ValueError, TypeError, ZeroDivisionError) as error:
                raise UserError(f"{where}: {name} {line[name]!r} is no number. Nothing was scored.") from error
        for name in ("text", "prompt"):
            # Half a character, which JSON can spell and no output can hold.
            if line.get(name):
                line[name] = line[name].encode("utf-8", "replace").decode("utf-8")
        lines.append(line)
    if not lines:
        raise UserError(f"{str(path)!r} holds no lines. Nothing was scored.")
    return lines


def exact(answer: str | int | float) -> Fraction:
    """An answer as an exact number: 390, "390", "1,234", "3/4", 2.5 (as it is written, not as binary has it).

    Raises ValueError for what is no number, or has more digits than a text could state.
    """
    written = str(answer).strip()
    _, _, exponent = written.lower().partition("e")
    if exponent.lstrip("+-").isdigit() and abs(int(exponent)) > LARGEST_EXPONENT:
        raise KernelSurgeryError(f"{written!r} has more than {LARGEST_EXPONENT} digits")
    try:
        return Fraction(written)
    except ValueError:
        return exact_answer(written)


def scored(line: dict) -> dict:
    """The line, with the verdict of the strict protocol."""
    made = judged(line["text"], line.get("prompt") or "", line["language"], exact(line["answer"]))
    return line | {key: made[key] for key in ("extracted", "correct", "language_found")}


@dataclass(frozen=True)
class Agreement:
    """A scorer against a reader, on n texts: how often it called a text right, and rightly so."""

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
    """Our scorer ("strict"), or the reference script's rule ("expag"), against the labels of the lines."""
    said, same = [], 0
    for line in lines:
        if rule == "expag":
            said.append(expag_check(line["text"], line["answer"]))
            continue
        result = scored(line)
        said.append(result["correct"])
        label = None if line["value"] is None else exact(line["value"])
        same += (None if result["extracted"] is None else Fraction(result["extracted"])) == label
    right = [bool(line["correct"]) for line in lines]
    both = sum(a and b for a, b in zip(said, right, strict=True))
    return Agreement(len(lines), sum(said), sum(right), both, same if rule == "strict" else None)


def label_table(lines: Sequence[dict]) -> str:
    """Precision and recall by language, ours and the script's."""
    languages = list(dict.fromkeys(line["language"] for line in lines))
    rows = [f"{'':<5} {'texts':>5} {'right':>5}   precision recall  same answer   the script's rule: precision recall"]
    for language in [*languages, None]:
        chosen = [line for line in lines if language in (None, line["language"])]
        ours, script = agreement(chosen), agreement(chosen, "expag")
        rows.append(
            f"{language or 'all':<5} {ours.n:>5} {ours.are_right:>5}   {ours.precision:>9.3f} {ours.recall:>6.3f}"
            f"  {ours.same_value / ours.n:>11.3f}   {script.precision:>28.3f} {script.recall:>6.3f}"
        )
    return "\n".join(rows)


def check_labels(path: Path, lines: Sequence[dict]) -> None:
    """Raises UserError for a line without a reader's verdict, or with one that contradicts itself."""
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
    """Accuracy, language fidelity and coverage by language."""
    rows = []
    for name in dict.fromkeys(line["language"] for line in lines):
        chosen = [line for line in lines if line["language"] == name]
        right = sum(line["correct"] for line in chosen)
        low, high = wilson(right, len(chosen))
        kept = fidelity([judge(line["text"], name) for line in chosen])
        rate = "-" if kept["language_fidelity"] is None else f"{kept['language_fidelity']:.3f}"
        rows.append(
            f"{name}: {right}/{len(chosen)} right, {right / len(chosen):.3f} ({low:.3f} to {high:.3f}), fidelity "
            f"{rate}, coverage {kept['coverage']:.3f}"
        )
    return "\n".join(rows)
