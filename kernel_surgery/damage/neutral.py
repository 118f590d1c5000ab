"""Read a model's predictions on neutral text, and compare them with those of the original.

Two figures per token: KL(original || changed) in nats, and the loss (the negative log probability of the token that
follows). Both are kept as sums over sentences, because sentences are the units that intervals resample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kernel_surgery.common.names import BATCH_TOKENS
from kernel_surgery.models.padding import padded, padding_id, token_batches
from kernel_surgery.problems.neutral import Split, neutral

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Called with a language; yields the log probabilities [tokens, vocabulary] of each sentence, in order.
Predictions = Callable[[str], Iterator[Tensor]]


@dataclass(frozen=True)
class Reading:
    """One model's predictions on the neutral text of one language, against the original's.

    tokens, kl, loss, original_loss: one value per sentence, [sentences] float64; the last three are sums over its
    tokens, in nats. kl_p99: the 99th percentile of KL over all tokens.
    """

    tokens: np.ndarray
    kl: np.ndarray
    loss: np.ndarray
    original_loss: np.ndarray
    kl_p99: float

    @property
    def kl_mean(self) -> float:
        """KL(original || changed), nats per token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss.sum() / self.tokens.sum()))

    @property
    def original_perplexity(self) -> float:
        return float(np.exp(self.original_loss.sum() / self.tokens.sum()))

    def figures(self) -> dict[str, Any]:
        """Return the figures as JSON, without intervals."""
        return {
            "sentences": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "kl_mean": self.kl_mean,
            "kl_p99": self.kl_p99,
            "perplexity": self.perplexity,
            "original_perplexity": self.original_perplexity,
            "perplexity_ratio": self.perplexity / self.original_perplexity,
        }


Texts = Mapping[str, Sequence[str]]
Encoded = dict[str, list[list[int]]]  # {language: the token ids of each sentence}


def encoded(
    tokenizer: "PreTrainedTokenizerBase", languages: Sequence[str], split: Split, texts: Texts | None = None
) -> Encoded:
    """Return the token ids of the neutral text, or of `texts`."""
    texts = neutral(split) if texts is None else texts
    return {lang: [tokenizer(text).input_ids for text in texts[lang]] for lang in languages}


def tokens_in(text: Encoded) -> int:
    """Return the number of tokens of a text: what one pass over it reads."""
    return sum(len(ids) for sentences in text.values() for ids in sentences)


class NeutralText:
    """The original's predictions on neutral text, with which every changed model is compared.

    model: as it is when this is created, that is unedited. languages: of `problems.neutral`. split: "dev" to choose
    an edit, "test" to report it. advance: called with the number of tokens that the model just read, in every pass.
    texts: {language: sentences}, another text than the neutral one, such as the prompts that are asked.

    The original's logits are kept on the CPU in float32, [tokens, vocabulary]: about 450 tokens per language.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        languages: Sequence[str],
        split: Split = "test",
        advance: Callable[[int], object] = lambda tokens: None,
        texts: Texts | None = None,
    ):
        self.model, self.tokenizer, self.languages, self.split = model, tokenizer, tuple(languages), split
        self.advance = advance
        self.encoded = encoded(tokenizer, languages, split, texts)
        self._pad = padding_id(model, tokenizer)
        self._logits = {lang: self._sentence_logits(lang) for lang in languages}

    @property
    def sentences(self) -> int:
        """The number of sentences per language."""
        return min(map(len, self.encoded.values()))

    def _sentence_logits(self, language: str) -> list[Tensor]:
        """Return the logits [tokens - 1, vocabulary] of each sentence, in order, for the model as it is now."""
        encoded = self.encoded[language]
        found: dict[int, Tensor] = {}
        for batch in token_batches([len(ids) for ids in encoded], BATCH_TOKENS):
            ids, mask = padded([encoded[i] for i in batch], self._pad, self.tokenizer.padding_side, self.model.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            for index, row, kept in zip(batch, logits, mask.bool(), strict=True):
                found[index] = row[kept.to(row.device)][:-1].float().cpu()
            self.advance(sum(len(encoded[i]) for i in batch))
        return [found[index] for index in range(len(encoded))]

    def model_predictions(self, language: str) -> Iterator[Tensor]:
        """Yield the log probabilities of each sentence, for the model as it is now. float64."""
        for logits in self._sentence_logits(language):
            yield logits.double().log_softmax(-1)

    def constant_predictions(self, language: str) -> Iterator[Tensor]:
        """Yield the same prediction at every token: the mean of the original's.

        No prediction that ignores the context has a smaller mean KL(original || it). So this is the best unigram model
        that the original could be replaced with on this text.
        """
        total, count = torch.zeros(self._logits[language][0].shape[1], dtype=torch.float64), 0
        for logits in self._logits[language]:
            total += logits.double().softmax(-1).sum(0)
            count += len(logits)
        mean = (total / count).log()
        for logits in self._logits[language]:
            yield mean.expand(len(logits), -1)

    def read(
        self, predictions: Predictions | None = None, languages: Sequence[str] | None = None
    ) -> dict[str, Reading]:
        """Compare predictions with the original's. Return {language: `Reading`}.

        predictions: by default those of the model as it is now, with whatever edit is in force. languages: some of the
        text's; by default all. Each is read in batches of its own, so its figures do not depend on the others.

        Numerics: float64 from float32 logits.
        """
        predictions = predictions or self.model_predictions
        asked = self.languages if languages is None else languages
        return {language: self._read(language, predictions(language)) for language in asked}

    def _read(self, language: str, changed: Iterator[Tensor]) -> Reading:
        sums: list[tuple[float, float, float, float]] = []
        every = []
        for ids, logits, q in zip(self.encoded[language], self._logits[language], changed, strict=True):
            following = torch.tensor(ids[1:])[:, None]
            p = logits.double().log_softmax(-1)
            # 0 (log 0 - log q) is 0. It would be NaN where both models give a word no probability at all.
            terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
            kl = terms.sum(-1).clamp_min(0)
            losses = (-float(x.gather(1, following).sum()) for x in (q, p))
            sums.append((len(kl), float(kl.sum()), *losses))  # type: ignore[arg-type]
            every.append(kl)
        tokens, kl_sums, loss, original = np.array(sums, dtype=np.float64).T
        return Reading(tokens, kl_sums, loss, original, float(torch.cat(every).quantile(0.99)))
