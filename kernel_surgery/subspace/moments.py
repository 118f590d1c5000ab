"""First and second moments of activations, by language: all that an oblique edit is fitted to.

They are sums, so they grow while activations stream by, and no activation is kept: [d_model, d_model] per layer.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernel_surgery.common.errors import MissingFileError, SubspaceError
from kernel_surgery.common.files import mistaken, replacing
from kernel_surgery.files.tensorfile import save_tensors
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.fingerprint import check_provenance

FORMAT = "kernel-surgery-moments-1"
_PARTS = ("counts", "sums", "second")
_NAME = re.compile(r"L(\d+)\.(counts|sums|second)")


@dataclass
class Moments:
    """Moments of one layer's activations. All tensors are float64.

    counts: [languages], how many activations. sums: [languages, d_model]. second: the sum of x x^T over all of them,
    [d_model, d_model].
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def empty(cls, languages: int, d_model: int, device: torch.device | str = "cpu") -> "Moments":
        """Return moments of no activations."""
        shapes = ((languages,), (languages, d_model), (d_model, d_model))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, language: Tensor | int) -> None:
        """Add activations x [n, d_model], of one language or of one language each ([n], whole numbers).

        Numerics: float64 products. Equal calls in equal order give equal bits on one device: there is no atomic sum.
        """
        x = x.to(self.second.device, torch.float64)
        of = torch.as_tensor(language, device=x.device).expand(len(x))
        one_hot = torch.nn.functional.one_hot(of, len(self.counts)).to(torch.float64)
        self.counts += one_hot.sum(0)
        self.sums.addmm_(one_hot.T, x)
        self.second.addmm_(x.T, x)

    @property
    def total(self) -> float:
        """How many activations there are."""
        return float(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """E x, [d_model]."""
        return self.sums.sum(0) / self.total

    @property
    def mean_square(self) -> Tensor:
        """E x x^T, [d_model, d_model]."""
        return self.second / self.total

    @property
    def covariance(self) -> Tensor:
        """E x x^T - E x E x^T, [d_model, d_model]."""
        return self.mean_square - torch.outer(self.mean, self.mean)

    @property
    def means(self) -> Tensor:
        """The mean of each language, [languages, d_model]."""
        return self.sums / self.counts[:, None]

    @property
    def label_covariance(self) -> Tensor:
        """The covariance of x with the one-hot language label, [d_model, languages].

        Column l is the share of language l times (its mean - E x).
        """
        shares = self.counts / self.counts.sum()
        return ((self.means - self.mean) * shares[:, None]).T

    def energy(self, edit: Projection) -> float:
        """Return E of norm(A (B^T x - c))^2: what an edit takes away at strength 1, in mean square."""
        exact = edit.to(self.second.device).double()
        inside = exact.reads.T @ self.mean_square @ exact.reads
        if exact.offset is not None:
            mean = exact.reads.T @ self.mean
            inside = inside - torch.outer(mean, exact.offset) - torch.outer(exact.offset, mean)
            inside = inside + torch.outer(exact.offset, exact.offset)
        return float((inside * (exact.basis.T @ exact.basis)).sum())

    def components(self, count: int) -> Tensor:
        """Return the first principal components, [d_model, count] orthonormal, float64.

        There are fewer if the activations do not vary in that many dimensions.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        nonzero = int((values > values[-1] * len(values) * 2.0**-24).sum())
        return vectors[:, -min(count, nonzero) :].flip(1)


def moments_of(rows: Sequence[Tensor]) -> Moments:
    """Return the moments of one [n, d_model] tensor of activations per language."""
    found = Moments.empty(len(rows), rows[0].shape[1], rows[0].device)
    for language, x in enumerate(rows):
        found.add(x, language)
    return found


@dataclass(frozen=True)
class LanguageMoments:
    """The moments of every layer, and how they were measured: what `collect --pool tokens` writes.

    layers: {layer: `Moments`}. provenance: the model, site, languages, problems and environment.
    """

    by_layer: dict[int, Moments]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.by_layer))

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.provenance["languages"])

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, completely or not at all. Tensors are L{layer}.counts, .sums and .second."""
        tensors = {f"L{i}.{part}": getattr(m, part).cpu() for i, m in self.by_layer.items() for part in _PARTS}
        metadata = {"provenance": json.dumps({"format": FORMAT} | self.provenance, ensure_ascii=False)}
        with replacing(path) as partial:
            save_tensors(tensors, partial, metadata=metadata)


def holds_moments(path: Path) -> bool:
    """Return whether a file says that it holds moments. False for any other file, and for none."""
    try:
        with safe_open(path, "pt") as file:
            return FORMAT in (file.metadata() or {}).get("provenance", "")
    except (OSError, SafetensorError):
        return False


def load_moments(path: Path) -> LanguageMoments:
    """Read a file of moments. Raises MissingFileError if there is none, and SubspaceError for any other content."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no moments at {str(path)!r}. Make them with python -m kernel_surgery.collect.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            provenance = dict(json.loads((file.metadata() or {}).get("provenance", "{}")))
        check_provenance(provenance)
    except SubspaceError as error:
        raise SubspaceError(f"{str(path)!r}: {error}") from error
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise SubspaceError(f"{str(path)!r} is not a file of moments ({mistaken(path) or error}).") from error
    by_layer = _by_layer(path, tensors)
    languages = provenance.get("languages")
    found = len(next(iter(by_layer.values())).counts)
    if not isinstance(languages, list) or len(languages) != found:
        raise SubspaceError(f"{str(path)!r} names the languages {languages!r}, but holds moments of {found}.")
    provenance.pop("format", None)
    return LanguageMoments(by_layer, provenance)


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[int, Moments]:
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if not match or tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
            raise SubspaceError(
                f"{str(path)!r} has an entry {name!r} of {tensor.dtype} {tuple(tensor.shape)}; expected finite float64 "
                "tensors such as L9.counts, L9.sums and L9.second."
            )
        parts.setdefault(int(match[1]), {})[match[2]] = tensor
    shapes = set()
    for layer, own in parts.items():
        if own.keys() != set(_PARTS):
            raise SubspaceError(f"{str(path)!r} lacks {min(set(_PARTS) - own.keys())} of layer {layer}.")
        counts, sums, second = (own[part] for part in _PARTS)
        shapes.add((counts.shape, sums.shape, second.shape))
        if sums.shape != (*counts.shape, second.shape[-1]) or second.shape[0] != second.shape[-1] or not counts.all():
            raise SubspaceError(f"{str(path)!r}: the moments of layer {layer} do not fit together.")
    if len(shapes) != 1:
        raise SubspaceError(f"{str(path)!r} holds moments of {len(shapes)} different shapes; expected one.")
    return {layer: Moments(**own) for layer, own in parts.items()}
