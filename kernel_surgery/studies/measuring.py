"""What a search measures of an edit: the damage on neutral text, and what a probe still reads of the language.

Every edit is read at the same layers, whatever layers it changes: an edit of one layer is then no better than it is.

Several processes (`common.ranks`) share a measurement: each reads some of the languages' neutral text, and probes some
of the layers. Batches stay whole, so the figures are one process's.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import BATCH_TOKENS
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.measure import yardstick_readings
from kernel_surgery.damage.neutral import NeutralText, Reading, Texts
from kernel_surgery.damage.words import judged, ratio_interval, with_intervals
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.controls import first_of_each_category
from kernel_surgery.evaluation.effects import probe_hits
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.padding import token_batches
from kernel_surgery.problems.generator import Problem
from kernel_surgery.problems.neutral import Split
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.moments import Moments
from kernel_surgery.subspace.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STREAM = "resid_post"
Hits = dict[str, dict[int, np.ndarray]]
Norms = dict[int, float]


@dataclass(frozen=True)
class Measured:
    """One edit on one split.

    kl: {language: `Reading`}. hits: {layer: tokens that the probe reads right, [problems]}. tokens: [problems], those
    that it was asked. left: {layer: norm of the covariance with the language label, over that of the original}.
    streams: as hits, in the residual stream after a layer.
    """

    kl: Mapping[str, Reading]
    hits: Mapping[int, np.ndarray]
    tokens: np.ndarray
    left: Mapping[int, float]
    streams: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def damage(self) -> float:
        """KL(original || edited) of the language that it is largest in, nats per token. Inf if it is not finite."""
        means = [reading.kl_mean for reading in self.kl.values()]
        return max(mean if math.isfinite(mean) else math.inf for mean in means)

    @property
    def probe(self) -> float:
        """The probe's accuracy, mean over the layers."""
        return float(np.mean(list(self.by_layer().values())))

    def by_layer(self) -> dict[int, float]:
        """Return {layer: the probe's accuracy}."""
        return self._rates(self.hits)

    def by_stream(self) -> dict[int, float]:
        """Return {layer: the probe's accuracy in the residual stream after it}."""
        return self._rates(self.streams)

    def _rates(self, hits: Mapping[int, np.ndarray]) -> dict[int, float]:
        return {layer: float(found.sum() / self.tokens.sum()) for layer, found in hits.items()}

    @property
    def all_hits(self) -> np.ndarray:
        """Tokens that the probe reads right, summed over the layers, [problems]."""
        return np.sum(list(self.hits.values()), axis=0)

    @property
    def means(self) -> float:
        """How much the means still tell of the language: `left`, mean over the layers."""
        return float(np.mean(list(self.left.values())))

    def as_json(self) -> dict[str, Any]:
        """Return the figures that decide, as JSON."""
        languages = {language: reading.kl_mean for language, reading in self.kl.items()}
        found: dict[str, Any] = {"damage": self.damage, "probe": self.probe, "means": self.means, "kl": languages}
        found |= {"probes": self.by_layer(), "left": dict(self.left)}
        return found | ({"streams": self.by_stream()} if self.streams else {})

    def whole(self) -> dict[str, Any]:
        """Return everything as JSON, for `of`."""
        readings = {
            language: {name: np.asarray(value).tolist() for name, value in vars(reading).items()}
            for language, reading in self.kl.items()
        }
        hits, streams = ({layer: found.tolist() for layer, found in by.items()} for by in (self.hits, self.streams))
        whole = {"kl": readings, "hits": hits, "tokens": self.tokens.tolist(), "left": dict(self.left)}
        return whole | ({"streams": streams} if streams else {})

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> "Measured":
        """Return what `whole` gave."""
        kl = {}
        for language, by in held["kl"].items():
            tokens, sums, loss, original = (np.array(by[name]) for name in ("tokens", "kl", "loss", "original_loss"))
            kl[language] = Reading(tokens, sums, loss, original, by["kl_p99"])
        hits, streams = (
            {int(layer): np.array(found) for layer, found in by.items()}
            for by in (held["hits"], held.get("streams", {}))
        )
        left = {int(layer): x for layer, x in held["left"].items()}
        return cls(kl, hits, np.array(held["tokens"]), left, streams)


@dataclass(frozen=True)
class Measuring:
    """Measures edits of one model on one split.

    model: unedited when this is made. languages: of the neutral text. asked: the problems whose prompts the probe
    reads, in `probed` languages. layers: where it reads, at `site`. mode: how edits are made. ranks: the
    processes that share a measurement; all call `measure` with the same edits, one after the other. streams: the layers
    after which a probe reads the residual stream too. texts: {language: sentences} on which the damage is measured, in
    place of the neutral text. site: where the edits are made and the probe reads, "mlp_out" or "mlp_write". force: as
    for the mode.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    languages: Sequence[str]
    asked: Sequence[Problem]
    probed: Sequence[str]
    layers: Sequence[int]
    mode: str
    split: Split
    chat: Chat = OFF
    ranks: Ranks = ALONE
    streams: Sequence[int] = ()
    texts: Texts | None = None
    site: str = "mlp_out"
    force: bool = False

    @cached_property
    def text(self) -> NeutralText:
        """The original's predictions."""
        return NeutralText(self.model, self.tokenizer, self.languages, self.split, texts=self.texts)

    @cached_property
    def yardsticks(self) -> dict[str, dict[str, Reading]]:
        """What the words are measured against."""
        return yardstick_readings(self.text)

    def measure(self, subspace: Subspace | None) -> Measured:
        """Measure an edit, or the original. The model is unchanged afterwards.

        Raises KernelSurgeryError for an edit that cannot be made, in all processes.
        """
        original, before = self._original  # read before there is an edit
        if subspace is None:
            return original
        kl, hits, norms = self._read(lambda: applied(self.mode, self.model, subspace, 1.0, self.force))
        left = {layer: norm / before[layer] for layer, norm in norms.items()}
        return Measured(kl, hits[self.site], original.tokens, left, hits[STREAM])

    @cached_property
    def _original(self) -> tuple[Measured, dict[int, float]]:
        """The original, and the norm of its covariance with the language label by layer."""
        kl, hits, norms = self._read(nullcontext)
        return Measured(kl, hits[self.site], self._tokens, dict.fromkeys(norms, 1.0), hits[STREAM]), norms

    def _read(self, edited: Callable[[], AbstractContextManager[object]]) -> tuple[dict[str, Reading], Hits, Norms]:
        """Return the readings of the text, {language: `Reading`}, and what `_probe` returns.

        edited: edits the model. Each process does its languages and its layers.
        """
        text = self.text  # of the original, so made before the edit
        languages, places = self.ranks.share(self.languages), {self.site: self.layers, STREAM: self.streams}

        def own() -> tuple[dict[str, Reading], Hits, Norms]:
            with edited():
                return text.read(languages=languages), *self._probe(
                    {site: self.ranks.share(layers) for site, layers in places.items()}
                )

        parts = self.ranks.parts(own)
        kl = {language: found for by, _, _ in parts for language, found in by.items()}
        norms = {layer: found for _, _, by in parts for layer, found in by.items()}
        # In the order that one process has.
        hits = {
            site: {layer: next(by[site][layer] for _, by, _ in parts if layer in by[site]) for layer in layers}
            for site, layers in places.items()
        }
        kl, norms = {lang: kl[lang] for lang in self.languages}, {layer: norms[layer] for layer in self.layers}
        return kl, hits, norms

    @cached_property
    def _encoded(self) -> list[list[int]]:
        """The prompts that the probe reads: of each problem, in each language."""
        texts = [problem.prompts[language] for problem in self.asked for language in self.probed]
        return [self.chat.ids(self.tokenizer, text) for text in texts]

    @cached_property
    def left_out(self) -> int:
        """The tokens at the beginning of each prompt that the probe is not asked.

        It is all that the prompts have in common there, such as a template: what comes before the first difference is
        the same in every language. At least the first token, which may be an attention sink.
        """
        common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*self._encoded, strict=False)))
        return max(1, min(common, min(map(len, self._encoded)) - 1))

    @property
    def _tokens(self) -> np.ndarray:
        """The tokens that the probe is asked, [problems]."""
        counts = np.array([len(ids) - self.left_out for ids in self._encoded], dtype=np.float64)
        return counts.reshape(len(self.asked), len(self.probed)).sum(1)

    def tokens_at(self, places: Mapping[str, Sequence[int]]) -> tuple[dict[str, dict[int, Tensor]], Tensor, Tensor]:
        """Return the states of the tokens that the probe is asked, {site: {layer: [tokens, d_model] float32}}, of the
        model as it is now; and of each token its problem and its language, [tokens] whole numbers.

        places: {site: layers}.
        """
        prompts = [(g, label) for g in range(len(self.asked)) for label in range(len(self.probed))]
        encoded, left_out = self._encoded, self.left_out
        rows: dict[str, dict[int, list[Tensor]]] = {
            site: {layer: [] for layer in layers} for site, layers in places.items()
        }

        def take(site: str, layer: int, states: Tensor, mask: Tensor) -> None:
            if layer in rows[site]:
                rows[site][layer].append(states[(mask * mask.cumsum(-1)) > left_out].float().cpu())

        layers = sorted({layer for by in places.values() for layer in by})
        (first, one), *others = ((site, partial(take, site)) for site, by in places.items() if by)
        order: list[int] = []  # the prompt of every row
        with reading(self.model, self.tokenizer, layers, first, one, dict(others)) as read:
            for batch in token_batches([len(ids) for ids in encoded], BATCH_TOKENS):
                read([encoded[i] for i in batch])
                order += [i for i in batch for _ in encoded[i][left_out:]]
        groups, labels = torch.tensor(prompts)[order].T
        whole = {site: {layer: torch.cat(by.pop(layer)) for layer in places[site]} for site, by in rows.items()}
        return whole, groups, labels

    def _probe(self, places: Mapping[str, Sequence[int]]) -> tuple[Hits, Norms]:
        """Return the tokens that a probe reads right, {site: {layer: [problems]}}, and the norm of the covariance of
        the tokens at `site` with the language label, {layer: norm}."""
        hits: Hits = {site: {} for site in places}
        norms: Norms = {}
        if not any(places.values()):
            return hits, norms
        rows, groups, labels = self.tokens_at(places)
        for site, layers in places.items():
            for layer in layers:
                x = rows[site].pop(layer)
                right = groups[probe_hits(x, labels, groups)]
                hits[site][layer] = torch.bincount(right, minlength=len(self.asked)).double().numpy()
                if site != self.site:
                    continue
                moments = Moments.empty(len(self.probed), x.shape[1])
                moments.add(x, labels)
                norms[layer] = float(moments.label_covariance.norm())
        return hits, norms

    @property
    def chance(self) -> float:
        """The accuracy of a probe that knows nothing: it always names the language that has most of the tokens."""
        counts = np.zeros(len(self.probed))
        for index, ids in enumerate(self._encoded):
            counts[index % len(self.probed)] += len(ids) - self.left_out
        return float(counts.max() / counts.sum())

    def asked_of(self) -> dict[str, Any]:
        """Return what the probe is asked: problems, languages, tokens, the layers, and the accuracy of chance."""
        tokens = int(self._tokens.sum())
        about = {"problems": len(self.asked), "languages": list(self.probed), "tokens": tokens}
        about |= {"left_out": self.left_out}
        return about | {"layers": list(self.layers), "chance": self.chance}

    def figures(self, found: Measured) -> dict[str, Any]:
        """Return everything that is reported of an edit, with intervals and its damage in words."""
        judgement = judged(found.kl, self.yardsticks)
        return found.as_json() | {
            "neutral": {language: with_intervals(reading) for language, reading in found.kl.items()},
            "word": judgement["word"],
            "words": {language: own["word"] for language, own in judgement["languages"].items()},
            "probe_ci95": list(ratio_interval(found.all_hits, found.tokens * len(found.hits))),
        }

    def all_of(self, edits: Mapping[str, Callable[[], Subspace | None]], file: Path, of: str) -> dict[str, Measured]:
        """Measure several edits, by name. What is finished is kept in a file, so a killed run does not do it again.

        edits: {name: a function that returns the edit}. It is called in process 0 alone, for the edits that are
        missing. of: what the file is about; one that is about something else is begun again. All processes must call
        this; process 0 writes.
        """
        kept = self.ranks.by_first(lambda: _kept(file, of))
        kept = {name: found for name, found in kept.items() if name in edits}
        with progress_bar(len(edits), "edits", initial=len(kept)) as bar:
            for name, make in edits.items():
                if name not in kept:
                    kept[name] = self.measure(self.ranks.by_first(make)).whole()
                    if self.ranks.first:
                        write_atomic(file, json.dumps({"of": of, "edits": kept}) + "\n")
                    bar.update()
        return {name: Measured.of(kept[name]) for name in edits}


def _kept(file: Path, of: str) -> dict[str, Any]:
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return held["edits"] if held.get("of") == of else {}


def first_problems(asked: Sequence[Problem], count: int) -> list[Problem]:
    """Return about `count` problems: the first of every category, the same number of each.

    Raises UserError if that is one problem: a probe is trained on some and asked others.
    """
    categories = len({problem.category for problem in asked})
    chosen = first_of_each_category(asked, max(1, count // categories))
    if len(chosen) < 2:
        raise UserError(f"a probe needs at least 2 problems of each split, there is {len(chosen)}: ask more problems.")
    return chosen


def difference(edit: Measured, baseline: Measured) -> dict[str, Any]:
    """Compare an edit with another one, on the same texts. Every interval is 95%, paired over sentences or problems.

    Returns {"damage": {language: [ratio of the mean KL, low, high], or None if a sentence has no damage in the other},
    "probe": [difference in accuracy, low, high]}. Each interval is its own: it is not corrected for the others.
    """
    ratios: dict[str, list[float] | None] = {}
    for language, one in edit.kl.items():
        other = baseline.kl[language]
        if not (other.kl > 0).all():
            ratios[language] = None
            continue
        ratios[language] = [float(one.kl.sum() / other.kl.sum()), *ratio_interval(one.kl, other.kl)]
    above = edit.all_hits - baseline.all_hits
    below = edit.tokens * len(edit.hits)
    return {"damage": ratios, "probe": [float(above.sum() / below.sum()), *ratio_interval(above, below)]}
