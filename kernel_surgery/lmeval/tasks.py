"""What the YAML files of this folder call: the problems that `eval` asks, and the verdicts that `score` gives.

lm-eval loads this file by its path, so it imports the rest of the package by its full name.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernel_surgery.evaluation.judging import judged
from kernel_surgery.evaluation.options import Options

if TYPE_CHECKING:
    from datasets import Dataset

    from kernel_surgery.files.problems import Given


def documents(language: str, problems: "Given" = None, **_: Any) -> "dict[str, Dataset]":
    """Return {"test": the problems that `eval` asks in one language}, in its order.

    A document has "id", "category", "language", "prompt" (exactly what is to be tokenized) and "answer" (a string that
    holds a number). problems: the number per category, or files, as in `eval --problems`; None gives eval's default.
    lm-eval also passes the metadata of the task and the arguments of the model; they are ignored.

    Raises UserError and KernelSurgeryError for problems that `eval` refuses too.
    """
    from datasets import Dataset

    asked = Options(problems=problems, languages=language).asked()
    rows = [
        {"id": p.id, "category": p.category, "language": language, "prompt": p.prompts[language]}
        | {"answer": str(p.answer)}
        for p in asked.problems
    ]
    return {"test": Dataset.from_list(rows)}


def verdicts(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Judge one text, as `score` does. Return its part of each metric, 0 or 1.

    accuracy: the text gives the right answer. coverage: its language could be judged. language_fidelity: no judged line
    is in another language. A text whose language could not be judged has no such entry, so that lm-eval's mean is over
    the judged texts, as in `evaluation.summary`.
    """
    (text,) = results
    verdict = judged(text, document["prompt"], document["language"], document["answer"])
    parts = {"accuracy": float(verdict["correct"]), "coverage": float(verdict["language_judged"])}
    if verdict["language_judged"]:
        parts["language_fidelity"] = float(verdict["language_passed"])
    return parts
