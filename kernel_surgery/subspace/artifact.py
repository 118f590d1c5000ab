"""The language subspace and its file: the tensors of one edit per layer, with provenance.

The file is safetensors. `layer.{i}.basis` [d_model, k] is A, in float32. An oblique edit has `layer.{i}.dual`, B,
beside it, and may have `layer.{i}.offset` [k], c. Without a dual the basis is orthonormal and B is A. There may also be
`layer.{i}.mean` [d_model] and `layer.{i}.spectrum`. The provenance is JSON in the metadata. It holds a *fingerprint*: a
few weights of the measured model, by value. A subspace means nothing in another model of the same shape, and only the
fingerprint shows such a mistake.
"""

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from kernel_surgery.common.errors import MismatchError, MissingFileError, SubspaceError
from kernel_surgery.common.files import mistaken, replacing
from kernel_surgery.common.names import LARGEST_STRENGTH, WRITE
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.tensorfile import save_tensors
from kernel_surgery.models.architectures import spans
from kernel_surgery.models.table import Layout
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.subspace.describing import described, shortened
from kernel_surgery.subspace.fingerprint import check_provenance, fingerprint, fingerprint_differences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "kernel-surgery-subspace-1"
ORTHONORMAL = 1e-5  # largest allowed entry of U^T U - I: a float64 basis stored in float32 stays below it
_FILE = "_file"  # of a loaded subspace: its path and SHA-256, for people to read
_FIELDS = ("site", "pool", "model_id", "revision", "n_layers", "fingerprint", "fit")
_TENSORS = {"basis": "bases", "dual": "duals", "offset": "offsets", "mean": "means", "spectrum": "spectrum"}


@dataclass(frozen=True)
class Subspace:
    """A language subspace: the tensors of y = x - a A (B^T x - c) per layer, and how it was fitted.

    bases: {layer: A [d_model, k] float32}, with orthonormal columns where there is no dual.
    duals: {layer: B [d_model, k] float32 with B^T A = I}, of every layer or of none. offsets: {layer: c [k]}, likewise.
    strengths: {layer: number}, a schedule: the strength of an edit is multiplied by it. A layer without one has 1.
    site, pool: where and how the activations were read. means: {layer: [d_model]}. spectrum: {layer: singular values}.
    model_id, revision, n_layers, fingerprint: the model it was fitted on. fit: method, rank, languages, problems.

    Raises SubspaceError for no layers, unequal shapes, numbers that are not finite, columns that are not orthonormal
    (or B^T A that is not I), and provenance of the wrong type.
    """

    bases: Mapping[int, torch.Tensor]
    site: str | None = None
    pool: str | None = None
    means: Mapping[int, torch.Tensor] = field(default_factory=dict)
    spectrum: Mapping[int, torch.Tensor] = field(default_factory=dict)
    model_id: str | None = None
    revision: str | None = None
    n_layers: int | None = None
    fingerprint: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    duals: Mapping[int, torch.Tensor] = field(default_factory=dict)
    offsets: Mapping[int, torch.Tensor] = field(default_factory=dict)
    strengths: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_provenance({name: getattr(self, name) for name in _FIELDS})
        for name, given in (("dual", self.duals), ("offset", self.offsets)):
            if given and given.keys() != self.bases.keys():
                raise SubspaceError(
                    f"there is a {name} for layers {sorted(given)}, but a basis for layers {sorted(self.bases)}."
                )
        checked = dict(sorted(check_projections(self.projections).items()))
        object.__setattr__(self, "bases", {layer: edit.basis for layer, edit in checked.items()})
        for name, part in (("duals", "dual"), ("offsets", "offset")):
            parts = {layer: getattr(edit, part) for layer, edit in checked.items()}
            object.__setattr__(self, name, parts if getattr(self, name) else {})
        object.__setattr__(self, "strengths", check_strengths(self.strengths, self.bases))

    def __repr__(self) -> str:
        where = f"layers={shortened(spans(self.layers), 24)}, rank={self.rank}, d_model={self.d_model}"
        model = None if self.model_id is None else shortened(self.model_id, 32)
        return f"{type(self).__name__}({where}, site={self.site!r}, form={self.form!r}, model_id={model!r})"

    def __str__(self) -> str:
        """Five lines of at most 100 columns: the model, the fit, the edit, what it holds, and its file."""
        return "\n".join(described(self, self.__dict__.get(_FILE)))

    @classmethod
    def of(cls, edits: Mapping[int, Projection], **fields: Any) -> Self:
        """Return the subspace of one edit per layer.

        fields: the other fields of a `Subspace`, such as site and fit.
        """
        return cls(**_parts_of(edits), **fields)

    def with_edits(self, edits: Mapping[int, Projection]) -> "Subspace":
        """Return the same subspace with other edits at the same layers, and the same schedule of strengths."""
        return replace(self, **_parts_of(edits))

    @property
    def projections(self) -> dict[int, Projection]:
        """Return the edit of every layer."""
        return {
            layer: Projection(basis, self.duals.get(layer), self.offsets.get(layer))
            for layer, basis in self.bases.items()
        }

    def strength_at(self, layer: int, strength: float) -> float:
        """Return the strength of one layer, as the schedule makes it."""
        return strength * self.strengths.get(layer, 1.0)

    def at_strength(self, strength: float) -> "Subspace":
        """Return the same edits with every layer's strength multiplied."""
        return replace(self, strengths={layer: self.strength_at(layer, strength) for layer in self.layers})

    @property
    def form(self) -> str:
        """Return "orthogonal", "oblique" or "affine" (oblique or orthogonal with an offset)."""
        return "affine" if self.offsets else "oblique" if self.duals else "orthogonal"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are edited, in order."""
        return tuple(self.bases)

    @property
    def d_model(self) -> int:
        """The number of rows of every basis: the width of the model."""
        return next(iter(self.bases.values())).shape[0]

    @property
    def rank(self) -> int:
        """The number of columns of every basis, k."""
        return next(iter(self.bases.values())).shape[1]

    @property
    def edited_site(self) -> str:
        """The site where the edit is made: mlp_write if it was fitted there, else mlp_out."""
        return WRITE if self.site == WRITE else "mlp_out"

    @property
    def note(self) -> str | None:
        """A sentence for every output if the basis was fitted at another site than the edited one, else None."""
        return None if self.site in (None, "mlp_out", WRITE) else f"{self.site} basis applied at mlp_out"

    def note_on(self, layout: Layout) -> str | None:
        """A sentence for every output of the edit in a model with this layout, or None."""
        notes = [self.note, None if self.site == WRITE else layout.remark]
        return "; ".join(filter(None, notes)) or None

    def truncate(self, rank: int) -> "Subspace":
        """Return the subspace of the first `rank` columns of every matrix. Raises SubspaceError beyond its rank."""
        if not 1 <= rank <= self.rank:
            raise SubspaceError(
                f"cannot truncate a subspace of rank {self.rank} to rank {rank}. Choose 1 to {self.rank}."
            )
        fewer: dict[str, Any] = {
            name: {layer: tensor[..., :rank].contiguous() for layer, tensor in getattr(self, name).items()}
            for name in ("bases", "duals", "offsets")
        }
        return replace(self, **fewer, fit=(self.fit or {}) | {"rank": rank, "truncated_from": self.rank})

    def select(self, layers: Iterable[int]) -> "Subspace":
        """Return the same subspace with fewer layers. Raises SubspaceError for a layer that it does not hold."""
        chosen = list(layers)
        if missing := [layer for layer in chosen if layer not in self.bases]:
            raise SubspaceError(f"layers {missing} are not in the subspace, which holds {list(self.layers)}.")
        fewer: dict[str, Any] = {
            name: {layer: value for layer, value in getattr(self, name).items() if layer in chosen}
            for name in ("bases", "duals", "offsets", "strengths")
        }
        return replace(self, **fewer)

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, completely or not at all."""
        tensors = {
            f"layer.{layer}.{name}": tensor.detach().cpu().float().contiguous()
            for name, field_name in _TENSORS.items()
            for layer, tensor in getattr(self, field_name).items()
            if layer in self.bases
        }
        provenance = {"format": FORMAT} | {name: getattr(self, name) for name in _FIELDS}
        if self.strengths:
            provenance["strengths"] = {str(layer): strength for layer, strength in self.strengths.items()}
        # One entry only: safetensors writes several in random order, so equal subspaces would give different files.
        metadata = {"provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True)}
        with replacing(path) as partial:
            save_tensors(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, force: bool = False) -> "Subspace":
        """Read a file. A file without provenance (bases alone) is refused unless `force`.

        Raises MissingFileError if there is no file, and SubspaceError if it is not a subspace.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"no subspace at {str(path)!r}. Make one with python -m kernel_surgery.fit.")
        found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in _TENSORS}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118
                    parts = key.split(".")
                    if len(parts) != 3 or parts[0] != "layer" or not parts[1].isdigit() or parts[2] not in found:
                        raise SubspaceError(
                            f"{str(path)!r} is not a subspace: it holds a tensor {key!r}; expected layer.N.basis, "
                            "layer.N.dual, layer.N.offset, layer.N.mean and layer.N.spectrum."
                        )
                    found[parts[2]][int(parts[1])] = file.get_tensor(key)
        except SafetensorError as error:
            raise SubspaceError(f"{str(path)!r} is not a safetensors file ({mistaken(path) or error}).") from error
        try:
            provenance = dict(json.loads(metadata.get("provenance", "{}")))
        except (ValueError, TypeError) as error:
            raise SubspaceError(f"{str(path)!r} has provenance that is not a JSON object ({error}).") from error
        if not provenance.get("fingerprint") and not force:
            raise SubspaceError(
                f"{str(path)!r} does not say which model it was fitted on, so it cannot be checked against your "
                "model.\nUse --force (force=True) if you know that they belong together."
            )
        try:
            fields: dict[str, Any] = {field_name: found[name] for name, field_name in _TENSORS.items()}
            fields |= {name: provenance.get(name) for name in _FIELDS}
            loaded = cls(
                **fields,
                strengths={int(layer): strength for layer, strength in dict(provenance.get("strengths", {})).items()},
            )
        except (ValueError, TypeError) as error:
            raise SubspaceError(f"{str(path)!r}: {error}") from error
        # Not a field: what is cut or selected of a subspace is not this file's any more.
        loaded.__dict__[_FILE] = str(path), sha256(path)
        return loaded

    def check_model(self, model: "PreTrainedModel", *, force: bool = False) -> None:
        """Check a loaded model as `check` does."""
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        config = model.config.get_text_config()
        self.check(config.hidden_size, config.num_hidden_layers, lambda: fingerprint(model), name, force=force)

    def check(
        self, d_model: int, n_layers: int, take_fingerprint: Callable[[], dict], name: str, *, force: bool = False
    ) -> None:
        """Refuse a model that the subspace was not fitted on.

        Raises what `check_shape` raises, even with `force`. Without `force`, raises MismatchError for other weights
        than those measured, so also for a finetuned, merged or already baked model.
        """
        self.check_shape(d_model, n_layers, name)
        if force or (doubt := self.doubt(take_fingerprint)) is None:
            return
        ways = "Use --force (force=True) if you know that they belong together."
        if self.fingerprint is not None:
            ways = "Fit a subspace on this model, load the one it was fitted on, or use --force (force=True)."
        raise MismatchError(f"the subspace {doubt}.\n{self._beside(name)}{ways}")

    def doubt(self, take_fingerprint: Callable[[], dict]) -> str | None:
        """Return why the subspace may not belong to a model's weights, after "the subspace", or None if it does."""
        if self.fingerprint is None:
            return "does not say which model's weights it was measured on"
        differing = fingerprint_differences(self.fingerprint, take_fingerprint())
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        return f"was measured on other weights: {differing[0]} differs{more}" if differing else None

    @property
    def _other_way(self) -> str:
        named = f", or name the one that it was fitted on: --model {self.model_id}" if self.model_id else ""
        return f"Fit a subspace on this model{named}."

    def _beside(self, name: str) -> str:
        return (
            f"  subspace: fitted on {self.model_id or 'an unnamed model'} ({self.site or 'site not stated'}, "
            f"rank {self.rank})\n  model:    {name}\n"
        )

    def check_shape(self, d_model: int, n_layers: int, name: str) -> None:
        """Refuse a model of another shape. name: the model's, for the message.

        Raises MismatchError for another d_model or number of layers, and for a layer that the model does not have.
        """
        both = self._beside(name)
        if d_model != self.d_model:
            raise MismatchError(
                f"the subspace has d_model={self.d_model}, but the model has {d_model}.\n{both}{self._other_way}"
            )
        if self.n_layers not in (None, n_layers):
            raise MismatchError(
                f"the subspace was fitted on a model with {self.n_layers} layers, but this one has {n_layers}.\n{both}"
                f"{self._other_way}"
            )
        if self.layers[-1] >= n_layers:
            raise MismatchError(
                f"the subspace holds layer {self.layers[-1]}, but the model has {n_layers} layers, 0 to "
                f"{n_layers - 1}.\n{both}Fit a subspace on this model."
            )


def check_strengths(strengths: Mapping[int, float], layers: Container[int]) -> dict[int, float]:
    """Return a schedule of strengths. Raises SubspaceError for a layer without a basis and a value that is not one."""
    for layer, strength in strengths.items():
        if layer not in layers or isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise SubspaceError(f"the strength {strength!r} of layer {layer} cannot be used: expected a number there.")
        if not abs(strength) <= LARGEST_STRENGTH:
            raise SubspaceError(f"the strength of layer {layer} is {strength}, not a finite number.")
    return {layer: float(strengths[layer]) for layer in sorted(strengths)}


def check_projections(edits: Mapping[int, BasisLike]) -> dict[int, Projection]:
    """Return the edits in float32.

    Raises SubspaceError unless there is one, and all have one shape, finite numbers, and orthonormal columns or a dual
    with B^T A = I.
    """
    if not edits:
        raise SubspaceError("a subspace needs a basis for at least one layer, got none.")
    checked: dict[int, Projection] = {}
    for layer, edit in edits.items():
        edit = Projection.of(edit).map(torch.Tensor.detach).to(torch.float32)
        basis = edit.basis
        if basis.ndim != 2 or basis.shape[1] > basis.shape[0] or basis.shape[1] < 1:
            raise SubspaceError(
                f"the basis of layer {layer} has shape {tuple(basis.shape)}; expected [d_model, k], k <= d_model."
            )
        first = next(iter(checked.values()), edit).basis
        if basis.shape != first.shape:
            raise SubspaceError(
                f"the basis of layer {layer} is {tuple(basis.shape)}, but that of layer {next(iter(checked))} is "
                f"{tuple(first.shape)}. All layers need the same shape."
            )
        _check_parts(layer, edit)
        checked[int(layer)] = edit
    return checked


def _check_parts(layer: int, edit: Projection) -> None:
    """Check the tensors of one layer's edit, whose basis has a good shape. Raises SubspaceError."""
    basis = edit.basis
    parts = {"basis": (basis, basis.shape), "dual": (edit.dual, basis.shape), "offset": (edit.offset, basis.shape[1:])}
    for name, (tensor, shape) in parts.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise SubspaceError(
                f"the {name} of layer {layer} is {tuple(tensor.shape)}; a basis of {tuple(basis.shape)} needs "
                f"{tuple(shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise SubspaceError(f"the {name} of layer {layer} holds NaN or Inf.")
    a, b = basis.double(), edit.reads.double()
    off = (b.T @ a - torch.eye(basis.shape[1], dtype=torch.float64, device=a.device)).abs()
    if edit.dual is None:
        if float(off.max()) > ORTHONORMAL:
            raise SubspaceError(
                f"the basis of layer {layer} is not orthonormal: the largest entry of U^T U - I is "
                f"{float(off.max()):.1e}, above {ORTHONORMAL}."
            )
        return
    # Stored in float32, an entry of B^T A is off by a rounding of the size of its terms.
    room = ORTHONORMAL * (b.norm(dim=0)[:, None] * a.norm(dim=0)).clamp_min(1)
    if float((off / room).max()) > 1:
        raise SubspaceError(
            f"the dual of layer {layer} does not belong to its basis: the largest entry of B^T A - I is "
            f"{float(off.max()):.1e}. It must be 0 but for rounding."
        )


def _parts_of(edits: Mapping[int, Projection]) -> dict[str, Any]:
    """Return {"bases", "duals", "offsets"} of the edits, each {layer: tensor}; the last two may be empty."""
    return {
        "bases": {layer: edit.basis for layer, edit in edits.items()},
        "duals": {layer: edit.dual for layer, edit in edits.items() if edit.dual is not None},
        "offsets": {layer: edit.offset for layer, edit in edits.items() if edit.offset is not None},
    }


def check_bases(bases: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return orthonormal bases in float32. Raises what `check_projections` raises."""
    return {layer: edit.basis for layer, edit in check_projections(bases).items()}
