"""The entries of results.json that describe the model and the subspace."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.describing import variance_captured

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe_model(name: str, model: "PreTrainedModel") -> dict[str, Any]:
    """Return the model's entry in results.json."""
    return {
        "id": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": model.config.model_type,
        "layers": len(decoder_layers(model)),
        "d_model": model.config.get_text_config().hidden_size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def describe_subspace(subspace: Subspace | None, path: Path | None, sha256: str | None) -> dict[str, Any] | None:
    """Return the subspace's entry in results.json; None for mode "original".

    "captured" is the share of the language variance that the basis holds, by layer. "spectrum" holds the leading
    singular values.
    """
    if subspace is None or path is None:
        return None
    spectrum = {str(layer): values for layer, values in subspace.spectrum.items() if layer in subspace.bases}
    leading = max(40, 2 * subspace.rank)
    return {
        "file": path.name,
        "sha256": sha256,
        "model_id": subspace.model_id,
        "rank": subspace.rank,
        "layers": list(subspace.layers),
        "site": subspace.site,
        "pool": subspace.pool,
        "fit": subspace.fit,
        "captured": {layer: variance_captured(values, subspace.rank) for layer, values in spectrum.items()},
        "spectrum": {layer: values[:leading].tolist() for layer, values in spectrum.items()},
    }
