"""Neutral text: everyday sentences in seven languages, without any maths.

Damage is measured on it (`evaluation.effects`). No sentence asks for maths, so a change in a model's predictions here
is not the removal of maths. It is general damage, or the loss of a language.

Sentence i of a split has the same meaning in every language. The two splits have no sentence in common:

    dev    serves to make choices
    test   gives the reported results

The sentences lie in neutral.json, beside this file. They were written for this project.
"""

import functools
import json
from pathlib import Path
from typing import Literal

from kernel_surgery.common.errors import UserError

Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test")
FILE = Path(__file__).with_name("neutral.json")


@functools.cache
def _texts() -> dict[str, dict[str, tuple[str, ...]]]:
    splits = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        split: {language: tuple(sentences) for language, sentences in languages.items()}
        for split, languages in splits.items()
    }


def neutral(split: Split) -> dict[str, tuple[str, ...]]:
    """Return {language: the sentences of one split}. Sentence i has the same meaning in every language.

    The file is read once. Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the neutral text; known: {', '.join(SPLITS)}")
    return dict(_texts()[split])
