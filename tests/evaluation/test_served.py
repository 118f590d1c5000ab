"""What is said of an edit whose texts an engine wrote: its first line, and its part of the report."""

import math
from types import SimpleNamespace

import pytest

from kernel_surgery.certify.page import body, page
from kernel_surgery.certify.render import shown
from kernel_surgery.certify.tables import across_plot
from kernel_surgery.evaluation.sections import damage
from kernel_surgery.evaluation.served import Served, _ratio

# The loss in nats and the tokens of three sentences, of the original and of an edit.
ORIGINAL, EDITED = [(10.0, 10), (21.0, 20), (5.0, 5)], [(11.0, 10), (22.0, 20), (5.5, 5)]


def test_the_ratio_of_perplexities_is_that_of_all_tokens_together():
    found = _ratio(ORIGINAL, EDITED)
    ratio, (low, high) = found["perplexity_ratio"], found["perplexity_ratio_ci95"]
    assert ratio == pytest.approx(math.exp(2.5 / 35)) and low < ratio < high
    assert _ratio(ORIGINAL, ORIGINAL)["perplexity_ratio_ci95"] == [1.0, 1.0]


@pytest.mark.parametrize("vocabulary, lost", [(2, True), (64, False)])
def test_perplexity_says_nothing_of_text_that_the_original_cannot_predict(vocabulary, lost):
    """The original's perplexity here is e^(36/35), 2.8: worse than a uniform guess among two words."""
    served = object.__new__(Served)
    served.options, served.config = SimpleNamespace(mode="fused", engine="openai"), {"vocab_size": vocabulary}
    words = served.in_words({"losses": {"fused": {"en": _ratio(ORIGINAL, EDITED)}}})
    assert words.startswith("damage: not judged. ") and "fused en x1.07" in words
    assert ("It says nothing in en" in words) == lost


def test_the_report_shows_the_ratio_with_its_interval():
    section = damage({"damage": {"neutral": {}, "losses": {"fused": {"en": _ratio(ORIGINAL, EDITED)}}}})
    assert "1.074 (" in section and "An engine gives no logits" in section


def test_a_certificate_across_engines_is_printed_drawn_and_in_the_report():
    row = {"rms": 1e-6, "rms_of_original": 1.0, "max": 2e-6, "max_of_original": 1.25}
    across = {"engine": "vLLM 0", "dtype": "float32", "tensor_parallel": 2, "oracle": "float64", "limit": 2.0}
    across |= {"prompts": 3, "text": "test problems", "new_tokens": 4, "positions": 60}
    across |= {"left_out": {"lora": "an offset"}}
    across |= {"modes": {"original": row, "fused": row}, "yardstick": {"rms": 1e-6, "max": 2e-6}, "effect_rms": 0.5}
    across |= {"pairs": [{"pair": ["baked", "fused"], "rms": 1e-6, "error_over_bound": 0.321}]}
    certificate = {"tensors": [], "faults": [], "across_engines": across, "rank": 3, "strength": 1.0}
    for text in (shown(certificate), body(certificate)):
        for words in ("float32, tensor parallel 2", "lora left out: an offset", "baked-fused 0.321", "5e+05", "1.250"):
            assert words in text, words
    assert "yardsticks" in across_plot(across)
    # Its own page names the engine, and draws the largest error, which may be beyond the limit where the mean is not.
    text = page(certificate | {"model_id": "polyglot"})
    assert "<dd>vLLM 0</dd>" in text and "1, largest 1.25" in text and "<h2>By mode</h2>" in text
