"""Less neutral text, for tests on a real model that are about something else than its size."""

import pytest

from kernel_surgery.problems import neutral


def fewer_sentences(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the neutral text have this many sentences in each language and split."""
    whole = neutral._texts()
    cut = {split: {lang: texts[:count] for lang, texts in by.items()} for split, by in whole.items()}
    patch.setattr(neutral, "_texts", lambda: cut)
