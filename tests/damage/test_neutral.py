"""Predictions on neutral text against the original's, counted by hand."""

import math

import pytest
import torch

from kernel_surgery import Subspace, hooked
from kernel_surgery.damage.neutral import NeutralText
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model, load_tokenizer
from kernel_surgery.problems.neutral import neutral


@pytest.fixture(scope="module")
def polyglot():
    return load_model("polyglot", torch.float32), load_tokenizer("polyglot"), Subspace.load(POLYGLOT_SUBSPACE)


@pytest.fixture(scope="module")
def text(polyglot):
    model, tokenizer, _ = polyglot
    return NeutralText(model, tokenizer, ("en", "ar"))


def by_hand(model, tokenizer, language):
    """Per sentence: log probabilities [tokens - 1, vocabulary] float64, and transformers' own loss, a mean."""
    for sentence in neutral("test")[language]:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(ids, labels=ids)
        yield out.logits[0, :-1].double().log_softmax(-1), float(out.loss)


def test_the_figures_are_those_counted_by_hand(polyglot, text):
    model, tokenizer, subspace = polyglot
    original = list(by_hand(model, tokenizer, "ar"))
    with hooked(model, subspace, 2.0):
        found = text.read()["ar"]
        edited = list(by_hand(model, tokenizer, "ar"))
    tokens = [len(p) for p, _ in original]
    kl = [
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        for (p, _), (q, _) in zip(original, edited, strict=True)
    ]
    # float32 logits of a padded batch differ from those of one sentence by rounding.
    assert found.tokens.tolist() == tokens and len(tokens) == text.sentences == 22
    assert found.kl == pytest.approx([float(x.sum()) for x in kl], rel=1e-4)
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4) and found.kl_mean > 0.01
    assert found.kl_p99 == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-4)
    for name, sentences in (("perplexity", edited), ("original_perplexity", original)):
        loss = sum(mean * n for (_, mean), n in zip(sentences, tokens, strict=True)) / sum(tokens)
        assert getattr(found, name) == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.figures()["perplexity_ratio"] == found.perplexity / found.original_perplexity


def test_an_unchanged_model_has_no_damage_and_a_stronger_edit_has_more(polyglot, text):
    model, _, subspace = polyglot
    for found in text.read().values():
        assert found.kl_mean == found.kl_p99 == 0 and found.perplexity == found.original_perplexity
    means = []
    for strength in (0.5, 1.0, 2.0):
        with hooked(model, subspace, strength):
            means.append(text.read()["en"].kl_mean)
    assert means == sorted(means) and means[0] > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(polyglot, side, monkeypatch):
    model, tokenizer, subspace = polyglot
    monkeypatch.setattr(tokenizer, "padding_side", side)
    whole = NeutralText(model, tokenizer, ("sw",))
    monkeypatch.setattr("kernel_surgery.damage.neutral.BATCH_TOKENS", 1)
    alone = NeutralText(model, tokenizer, ("sw",))
    with hooked(model, subspace):
        a = alone.read()["sw"]
        monkeypatch.undo()
        b = whole.read()["sw"]
    assert a.kl == pytest.approx(b.kl, rel=1e-3) and a.loss == pytest.approx(b.loss, rel=1e-5)


def test_no_constant_prediction_is_closer_to_the_original_than_the_mean_one(text):
    constant = text.read(text.constant_predictions)
    for language, best in constant.items():
        other = torch.cat(text._logits[language]).double().softmax(-1)

        def predicted(lang, away=other, language=language):
            # Towards the prediction at the first token: still constant, and no longer the mean.
            mean = (0.9 * away.mean(0) + 0.1 * away[0]).log()
            for logits in text._logits[lang]:
                yield mean.expand(len(logits), -1)

        worse = text._read(language, predicted(language))
        assert worse.kl_mean > best.kl_mean > 0
        assert torch.allclose(next(text.constant_predictions(language))[0].exp(), other.mean(0), rtol=1e-12)
