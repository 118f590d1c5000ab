"""A subspace in five short lines, for `print(subspace)`: where it belongs, how it was fitted, and what it holds."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from kernel_surgery.common.names import ERASING
from kernel_surgery.models.architectures import spans

WIDTH = 100  # columns at most
ENOUGH = 10  # tokens for each dimension: with fewer than about seven, fits on natural text broke a model (docs/real.md)
_LABELS = ("model", "fit", "edit", "holds", "file")


class Described(Protocol):
    """What is read of a `Subspace`."""

    @property
    def bases(self) -> Mapping[int, torch.Tensor]: ...
    @property
    def spectrum(self) -> Mapping[int, torch.Tensor]: ...
    @property
    def strengths(self) -> Mapping[int, float]: ...
    @property
    def fit(self) -> dict[str, Any] | None: ...
    @property
    def model_id(self) -> str | None: ...
    @property
    def n_layers(self) -> int | None: ...
    @property
    def site(self) -> str | None: ...
    @property
    def pool(self) -> str | None: ...
    @property
    def form(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def d_model(self) -> int: ...
    @property
    def rank(self) -> int: ...


def variance_captured(spectrum: torch.Tensor, rank: int) -> float:
    """Return the share of the sum of squared singular values that the first `rank` of them have."""
    squares = spectrum.double() ** 2
    return float(squares[:rank].sum() / squares.sum())


def described(subspace: Described, file: tuple[str, str] | None = None) -> list[str]:
    """Return five lines of at most `WIDTH` columns: model, fit, edit, what it holds, and its file or how to use it.

    file: its name and its SHA-256. None says how the subspace is used instead.
    """
    fifth = "in memory: subspace.save(PATH) writes it, with fused(model, subspace): ... uses it"
    if file is not None:
        fifth = f"{shortened(file[0], 50)}, SHA-256 {file[1][:16]}"
    texts = (_model(subspace), _fit(subspace), _edit(subspace), _holds(subspace), fifth)
    return [f"{label:<7}{shortened(text, WIDTH - 7)}" for label, text in zip(_LABELS, texts, strict=True)]


def few_tokens(subspace: Described) -> str | None:
    """Return a note if an erasing edit was fitted on few tokens: its covariance is then estimated badly."""
    fit = subspace.fit or {}
    tokens = fit.get("tokens")
    if fit.get("method") not in ERASING or not isinstance(tokens, dict):
        return None
    count = sum(tokens.values())
    if count >= ENOUGH * subspace.d_model:
        return None
    return (
        f"few tokens: {count} for d_model {subspace.d_model}; {ENOUGH * subspace.d_model} are better. A fit on few can "
        "break the model (docs/real.md, the learning curve): collect more problems"
    )


def shortened(text: str, columns: int) -> str:
    """Return the text on one line, with its middle left out if it is longer than that."""
    text = " ".join(text.split())
    if len(text) <= columns:
        return text
    left = (columns - 1) // 2
    return f"{text[:left]}…{text[len(text) - (columns - 1 - left) :]}"


def layers_in_words(layers: Sequence[int], n_layers: int | None = None) -> str:
    """Return layers such as "layers 9-26 of 36". Many separate ones are counted."""
    where = spans(layers)
    of = "" if n_layers is None else f" of {n_layers}"
    if len(where) > 24:
        where = f"{layers[0]}-{layers[-1]} (only {len(layers)} of these)"
    return f"layer{'s' * (len(layers) > 1)} {where}{of}"


def _model(subspace: Described) -> str:
    site = f"site {subspace.site}" if subspace.site else "site not stated"
    name = shortened(subspace.model_id or "not stated", 40)
    return f"{name}, {layers_in_words(subspace.layers, subspace.n_layers)}, {site}, d_model {subspace.d_model}"


def _fit(subspace: Described) -> str:
    fit = subspace.fit or {}
    method = shortened(str(fit.get("method") or "method not stated"), 24)
    words = [method + ", layer by layer" * ("sequential" in fit), f"rank {subspace.rank}"]
    if "truncated_from" in fit:
        words[-1] += f" (cut from {fit['truncated_from']})"
    first, *others = subspace.bases.values()
    if others and all(torch.equal(first, other) for other in others):
        words[-1] += ", one basis for all layers"
    source = []
    if isinstance(fit.get("problems"), int):
        source.append(f"{fit['problems']} problems")
    if languages := list(map(str, fit.get("languages") or ())):
        few = " ".join(languages)
        source.append(f"in {few if len(few) <= 24 else f'{len(languages)} languages'}")
    if source:
        words.append(" ".join(source))
    if subspace.pool:
        pools = {"tokens": "all prompt tokens", "last": "last prompt token", "mean": "mean over tokens"}
        words.append(pools.get(subspace.pool, subspace.pool))
    return ", ".join(words)


def _edit(subspace: Described) -> str:
    rule = {
        "orthogonal": "orthogonal, y = x - a U (U^T x)",
        "oblique": "oblique, y = x - a A (B^T x)",
        "affine": "affine, y = x - a A (B^T x - c), offset c",
    }[subspace.form]
    if not subspace.strengths:
        return f"{rule}, the same strength a in every layer"
    factors = [subspace.strengths.get(layer, 1.0) for layer in subspace.layers]
    low, high = min(factors), max(factors)
    scale = f"{low:.3g} in every layer" if low == high else f"{low:.3g} to {high:.3g} by layer"
    return f"{rule}, strength a times {scale}"


def _holds(subspace: Described) -> str:
    left = (subspace.fit or {}).get("sequential")
    if isinstance(left, dict) and left and all(isinstance(value, float) for value in left.values()):
        return f"covariance with the language label left, by layer: {_range(list(left.values()), '.1e')}"
    shares = [
        variance_captured(subspace.spectrum[layer], subspace.rank)
        for layer in subspace.layers
        if layer in subspace.spectrum
    ]
    if not shares:
        return "not recorded: there are no singular values beside the basis"
    # An erasing method weighs the means' differences by the covariance: all of them are 1 at its full rank.
    told = "what the languages' means tell on the text of the fit"
    of = told if (subspace.fit or {}).get("method") in ERASING else "the language variance"
    return f"{_range(shares, '.3f')} of {of}, by layer"


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(pick(values), form) for pick in (min, max))
    return low if low == high else f"{low} to {high}"
