"""A setting is one way to fit and make an edit. Here one is described, and its subspace fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import ERASING, METHOD, TOKENS
from kernel_surgery.models.architectures import decoder_layers, spans
from kernel_surgery.models.chat import Chat
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import local_folder, public_name, resolve_model
from kernel_surgery.subspace.activations import Activations, load_activations
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import collect_languages, collect_moments
from kernel_surgery.subspace.erasing import SHRINKAGE
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.subspace.fitting import fit_subspace
from kernel_surgery.subspace.moments import LanguageMoments, load_moments
from kernel_surgery.subspace.sequential import fit_sequentially

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kernel_surgery.files.problems import Source

SEQUENTIAL = "sequential"


@dataclass(frozen=True)
class Setting:
    """How an edit is fitted and made.

    method, rank, shrinkage: as in `fit`; rank None is the method's own. site: where activations are read. pool: "last",
    "mean", "tokens", or "sequential" (all tokens, fitted layer by layer; each edit at strength 1 and without an offset
    while the next are fitted). offset: c = B^T E x, with the mean that the layer had when it was fitted.
    layers: first and last. strengths: at the first layer, at the last, and at as many between them; the layers in
    between are interpolated linearly. One number is the strength of all layers.
    """

    method: str = METHOD
    rank: int | None = None
    site: str = "mlp_out"
    pool: str = TOKENS
    shrinkage: float = SHRINKAGE
    offset: bool = False
    layers: tuple[int, int] = (0, 0)
    strengths: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        """The setting in words, the same for equal settings."""
        rank = "" if self.rank is None else f" rank {self.rank}"
        schedule = self.schedule()
        strengths = sorted({strength for strength in schedule.values() if strength})
        edited = [layer for layer, strength in schedule.items() if strength]
        # One strength in some of the layers, or a schedule that is shown by its knots.
        flat = len(strengths) == 1
        layers = spans(edited) if flat else f"{self.layers[0]}-{self.layers[1]}"
        parts = [f"{self.method}{rank}", f"layers {layers}", self.pool]
        parts += [self.site] * (self.site != "mlp_out")
        parts += [f"shrinkage {self.shrinkage:.3g}"] * (self.method in ERASING)
        parts += ["offset"] * self.offset
        shown = strengths if flat else self.strengths
        return ", ".join([*parts, "strength " + " ".join(f"{s:.3g}" for s in shown)])

    def schedule(self) -> dict[int, float]:
        """Return {layer: strength} of every layer."""
        first, last = self.layers
        parts, layers = len(self.strengths) - 1, range(first, last + 1)
        if not parts or first == last:
            return dict.fromkeys(layers, self.strengths[0])
        found = {}
        for layer in layers:
            # In whole numbers, so that a layer at a knot has exactly its strength.
            left, rest = divmod((layer - first) * parts, last - first)
            if not rest:
                found[layer] = self.strengths[left]
                continue
            share = rest / (last - first)
            found[layer] = (1 - share) * self.strengths[left] + share * self.strengths[left + 1]
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the setting as JSON holds it."""
        return asdict(self) | {"layers": list(self.layers), "strengths": list(self.strengths)}

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> "Setting":
        """Return the setting of `as_json`."""
        first, last = held["layers"]
        return cls(**{**held, "layers": (first, last), "strengths": tuple(held["strengths"])})


def impossible(setting: Setting, mode: str = "hook") -> str | None:
    """Return why a setting cannot be fitted, or cannot be made in a mode, or None."""
    erasing = setting.method in ERASING
    if setting.pool == TOKENS and setting.method == "deviations":
        return "deviations needs pairs of prompts: pool last or mean, not tokens"
    if setting.pool == SEQUENTIAL and not (erasing and setting.site == "mlp_out"):
        return f"pool sequential is for {' and '.join(ERASING)} at mlp_out"
    if setting.offset and setting.method == "leace":
        return "leace has its own offset: offset is for the other methods"
    if setting.offset and setting.site != "mlp_out":
        return "an offset needs the mean at mlp_out"
    if mode == "lora" and (setting.offset or setting.method == "leace"):
        return "an adapter cannot hold an offset"
    return None


@dataclass(frozen=True)
class Fitter:
    """Fits the subspaces of settings. Activations are read once per site and pooling, and kept in `folder`.

    layers: those that are read. source: of the problems; the fit split is used. model_name: as given to --model; a
    sequential fit reads its files.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    layers: range
    source: "Source"
    folder: Path
    model_name: str
    seed: int
    chat: Chat

    @cached_property
    def _held(self) -> dict[tuple[str, str], Activations | LanguageMoments]:
        return {}

    def activations(self, site: str, pool: str) -> Activations | LanguageMoments:
        """Return the activations of all layers at one site. They are measured if the folder does not hold them."""
        if (site, pool) not in self._held:
            file = self.folder / f"activations-{site}-{pool}.safetensors"
            if not file.exists():
                self._collect(file, site, pool)
            self._held[site, pool] = load_moments(file) if pool == TOKENS else load_activations(file)
        return self._held[site, pool]

    def _collect(self, file: Path, site: str, pool: str) -> None:
        chosen, languages = self.source.split("fit"), self.source.languages()
        options: dict[str, Any] = {"site": site, "chat": self.chat}
        if pool == TOKENS:
            layers = f"{self.layers[0]}-{self.layers[-1]}"
            options["about"] = self._about()
            collect_moments(self.model, self.tokenizer, chosen, languages, layers, **options).save(file)
            return
        vectors = collect_languages(self.model, self.tokenizer, chosen, languages, self.layers, pool=pool, **options)
        measured = {"n_layers": len(decoder_layers(self.model)), "fingerprint": fingerprint(self.model)}
        measured |= {"problems": len(chosen)}
        provenance = self._about() | measured | {"site": site, "pool": pool} | self.chat.record()
        Activations(vectors, provenance).save(file)

    def _about(self) -> dict[str, Any]:
        about = {"model_id": public_name(self.model_name), "split": "fit", "seed": self.seed}
        return about | self.source.record

    def fit(self, setting: Setting) -> Subspace:
        """Return the subspace of a setting, with its schedule of strengths. A layer of strength 0 is not in it.

        Raises SubspaceError for a setting that cannot be fitted.
        """
        if why := impossible(setting):
            raise SubspaceError(f"{setting.name}: {why}.")
        layers = [layer for layer, strength in setting.schedule().items() if strength != 0]
        if not layers:
            raise SubspaceError(f"{setting.name}: the strength is 0 in every layer.")
        if setting.pool == SEQUENTIAL:
            subspace = self._sequential(setting, layers)
        else:
            held = self.activations(setting.site, setting.pool)
            subspace = fit_subspace(
                *(held, setting.rank), method=setting.method, layers=layers, shrinkage=setting.shrinkage
            )
        if setting.offset:
            subspace = with_offset(subspace)
        strengths = {layer: strength for layer, strength in setting.schedule().items() if strength not in (0, 1)}
        return replace(subspace, strengths=strengths)

    def _sequential(self, setting: Setting, layers: Sequence[int]) -> Subspace:
        reader = Layerwise(local_folder(resolve_model(self.model_name)), self.model.dtype, self.model.device)
        chosen, languages = self.source.split("fit"), self.source.languages()
        options: dict[str, Any] = {"method": setting.method, "rank": setting.rank, "shrinkage": setting.shrinkage}
        options |= {"chat": self.chat, "about": self._about()}
        return fit_sequentially(reader, self.tokenizer, chosen, languages, layers, **options)


def with_offset(subspace: Subspace) -> Subspace:
    """Return the subspace with c = B^T E x, so that the edit keeps the mean that its activations had."""
    edits = subspace.projections.items()
    kept = {layer: edit.double().keeping(subspace.means[layer].double()).to(torch.float32) for layer, edit in edits}
    return subspace.with_edits(kept)
