"""Activations and their files: our safetensors format, or the reference script's .npz."""

import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from kernel_surgery.common.errors import MissingFileError, SubspaceError
from kernel_surgery.common.files import mistaken, replacing
from kernel_surgery.common.names import LANGUAGE_TAG, SITES
from kernel_surgery.files.tensorfile import save_tensors
from kernel_surgery.subspace.fingerprint import check_provenance

FORMAT = "kernel-surgery-activations-1"


@dataclass(frozen=True)
class Activations:
    """One activation per problem, language and layer.

    vectors: {language: {layer: [problems, d_model] float32}}. Row i is the same problem in every language.
    provenance: the model, site, pooling, problems and environment that they were measured with.
    """

    vectors: dict[str, dict[int, torch.Tensor]]
    provenance: dict

    def __repr__(self) -> str:
        rows, d_model = next(iter(next(iter(self.vectors.values())).values())).shape
        shape = f"{rows} problems, {', '.join(self.languages)}; {len(self.layers)} layers; d_model={d_model}"
        return f"Activations({shape})"

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.vectors)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(next(iter(self.vectors.values()))))

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, completely or not at all. Tensors are named `{lang}_L{layer}`."""
        tensors = {f"{lang}_L{i}": t.contiguous() for lang, by in self.vectors.items() for i, t in by.items()}
        metadata = {"provenance": json.dumps({"format": FORMAT} | self.provenance, ensure_ascii=False)}
        with replacing(path) as partial:
            save_tensors(tensors, partial, metadata=metadata)


_KEY = re.compile(rf"({LANGUAGE_TAG})_L(\d+)")


def load_activations(path: Path, model_id: str | None = None, site: str | None = None) -> Activations:
    """Read activations from our safetensors file or the reference script's .npz (keys "{lang}_L{layer}").

    An .npz is never unpickled. model_id, site: provenance that an .npz cannot hold.

    Raises MissingFileError if there is no file. Raises SubspaceError, naming the file and the entry, if the format is
    another, if it needs pickle, or for unknown keys, ragged shapes, and numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no activations at {str(path)!r}. Make them with python -m kernel_surgery.collect.")
    if site is not None and site not in SITES:
        raise SubspaceError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    provenance: dict = {}
    arrays: dict[str, torch.Tensor] = {}
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {key: torch.from_numpy(np.asarray(data[key], dtype=np.float32)) for key in data.files}
        # numpy takes a file that it does not know for a pickle. Only one that looks like an array can hold one.
        # It passes on any error of its parser: EOFError for an empty file, TypeError for a .npy with this suffix.
        except (ValueError, OSError, EOFError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as error:
            with path.open("rb") as file:
                head = file.read(20)
            if (what := mistaken(path)) or not head.startswith((b"PK", b"\x93NUMPY", b"\x80")):
                what = what or f"it starts with {head.decode(errors='replace')!r}"
                raise SubspaceError(f"{str(path)!r} is not an .npz file ({what}).") from error
            if "pickle" in str(error).lower():
                raise SubspaceError(
                    f"{str(path)!r} is not an .npz of plain arrays. Pickles are never loaded: they can run code.\n"
                    "Save plain float32 arrays: np.savez(path, **{f'{lang}_L{i}': np.asarray(x, np.float32)})."
                ) from error
            raise SubspaceError(f"{str(path)!r} is not a readable .npz file ({error}).") from error
    else:
        try:
            with safe_open(path, "pt") as file:
                arrays = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
            check_provenance(provenance)
        except SubspaceError as error:
            raise SubspaceError(f"{str(path)!r}: {error}") from error
        except (SafetensorError, ValueError, RecursionError) as error:
            raise SubspaceError(
                f"{str(path)!r} is neither a safetensors file of activations nor an .npz ({mistaken(path) or error})."
            ) from error
    for name, given in (("model_id", model_id), ("site", site)):
        if given and provenance.get(name, given) != given:
            raise SubspaceError(
                f"{str(path)!r} was measured with {name} {provenance[name]!r}, not {given!r}. Omit the option."
            )
        if given:
            provenance[name] = given
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if not match or array.ndim != 2 or 0 in array.shape:
            raise SubspaceError(
                f"{str(path)!r} has an entry {key!r} of shape {tuple(array.shape)}; expected [problems, d_model] "
                'arrays named "{lang}_L{layer}", such as "en_L9".'
            )
        if not torch.isfinite(array).all():
            raise SubspaceError(f"{str(path)!r}: {key} holds NaN or Inf. Collect again, in float32 or bfloat16.")
        vectors.setdefault(match[1], {})[int(match[2])] = array
    shapes = {f"{lang}_L{i}": tuple(a.shape) for lang, by in vectors.items() for i, a in by.items()}
    if len(vectors) < 2:
        held = ", ".join(vectors) or "none"
        raise SubspaceError(f"{str(path)!r} holds too few languages ({held}): a language subspace needs at least two.")
    if len(set(shapes.values())) > 1 or len({tuple(sorted(by)) for by in vectors.values()}) > 1:
        raise SubspaceError(
            f"{str(path)!r} is ragged: {_unequal(vectors, shapes)}.\n"
            "Every language needs the same problems at the same layers."
        )
    return Activations(vectors, provenance)


def _unequal(vectors: dict[str, dict[int, torch.Tensor]], shapes: dict[str, tuple]) -> str:
    """Return the first two entries of different shape, or the first two languages with different layers, in words."""
    first = next(iter(shapes))
    if other := next((key for key in shapes if shapes[key] != shapes[first]), None):
        return f"{first} is {shapes[first]}, but {other} is {shapes[other]}"
    layers = {language: sorted(by) for language, by in vectors.items()}
    first = next(iter(layers))
    other = next(language for language in layers if layers[language] != layers[first])
    return f"{first} has layers {layers[first]}, but {other} has {layers[other]}"
