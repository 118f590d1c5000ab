"""Which files of a folder are the checkpoint: one rule for every command.

The weights are the files that transformers loads: the file that config.json names as `transformers_weights`, else
model.safetensors, else the files of model.safetensors.index.json. Small files beside them belong to the checkpoint too
(configuration, tokenizer, card, licence), and so do chat templates in additional_chat_templates/. Everything else is
left out: a second copy of the weights, weights in other formats, other subfolders. A checkpoint written without them
holds the same weights for vLLM, which loads every safetensors file of a folder that has no index.

Hidden files and our own records are neither. The rule needs names and sizes only, so it also works on a repository of
the hub before anything is fetched.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.names import PROVENANCE

OURS = "kernel_surgery"  # the subfolder for our own tensors
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
# Copies in other formats hold unedited weights.
_COPIES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".index.json")
# The largest tokenizers have 40 MB. A larger file that no loader reads is data of some other kind.
SMALL = 100_000_000
# What people read and no engine does: who publishes a checkpoint rewrites its card and adds a licence or a certificate.
DOCUMENT = re.compile(
    r"(README|LICEN[CS]E|NOTICE|COPYING|CITATION|USE_POLICY)[^/]*|[^/]*\.(md|html|svg|png|pdf)|certificate[^/]*\.json",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Contents:
    """The names of a folder's files, relative to it.

    weights: safetensors files of the checkpoint. along: the small files that belong to it. left_out: the rest, with one
    entry "name/" for a subfolder.
    """

    weights: tuple[str, ...]
    along: tuple[str, ...]
    left_out: tuple[str, ...]


def select(sizes: Mapping[str, int], read: Callable[[str], str], where: str) -> Contents:
    """Sort files by the rule above.

    sizes: {name relative to the folder, with "/": size in bytes}. read: returns the text of one of them. where: the
    folder's name, for messages.

    Raises CheckpointError for a folder without config.json or weights, an index that cannot be read, and weight files
    that are missing or outside the folder.
    """
    if "config.json" not in sizes:
        raise CheckpointError(f"{where} has no config.json, so it is not a model folder.")
    weights, index = _weights(sizes, read, where)
    along, left_out = [], []
    for name in sorted(sizes):
        parts = PurePosixPath(name).parts
        if name in weights or name == PROVENANCE or parts[0] == OURS or any(part.startswith(".") for part in parts):
            continue
        if len(parts) == 2 and parts[0] == TEMPLATES and name.endswith(".jinja"):
            along.append(name)
        elif len(parts) > 1:
            left_out.append(f"{parts[0]}/")
        elif name != index and (name.endswith(_COPIES) or sizes[name] > SMALL):
            left_out.append(name)
        else:
            along.append(name)
    return Contents(tuple(sorted(weights)), tuple(along), tuple(dict.fromkeys(left_out)))


def _weights(sizes: Mapping[str, int], read: Callable[[str], str], where: str) -> tuple[set[str], str | None]:
    """Return the names of the weight files, and the index that names them."""
    try:
        explicit = json.loads(read("config.json")).get("transformers_weights")
    except (ValueError, AttributeError):
        explicit = None  # whoever needs the configuration reports it
    if explicit is not None and str(explicit) in sizes and not str(explicit).endswith(".index.json"):
        return {str(explicit)}, None
    single, index = (SINGLE, INDEX) if explicit is None else (str(explicit), str(explicit))
    if explicit is None and single in sizes:
        # An index that names this one file alone says the same.
        return {single}, index if index in sizes and _names_only(single, read, index, where) else None
    if index not in sizes:
        pickled = next((name for name in sorted(sizes) if re.fullmatch(r"pytorch_model.*\.bin", name)), None)
        found = f"only pickled weights ({pickled}), which are never loaded" if pickled else "no weights"
        raise CheckpointError(f"{where} has {found}. It needs {single}, or an index and its shards.")
    shards = _indexed(read, index, where)
    if outside := [name for name in sorted(shards) if "/" in name or "\\" in name or not name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{where}: its {index} names {outside[0]!r}, which is not a safetensors file in the same folder."
        )
    if missing := sorted(shards - sizes.keys()):
        raise CheckpointError(
            f"{where} is incomplete: {len(missing)} of {len(shards)} weight files missing (first: {missing[0]}). Fetch "
            "the model again."
        )
    return shards, index


def _names_only(single: str, read: Callable[[str], str], index: str, where: str) -> bool:
    try:
        return _indexed(read, index, where) == {single}
    except CheckpointError:
        return False  # transformers does not read it either


def _indexed(read: Callable[[str], str], index: str, where: str) -> set[str]:
    try:
        names = set(json.loads(read(index))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("its weight_map names no files")
        return names
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where}: {index!r} is not a safetensors index ({what}). Fetch it again.") from error


def contents(folder: Path, what: str = "model") -> Contents:
    """Return the contents of a folder. what: what it is, for messages. Raises what `select` raises."""
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names]
        sizes |= {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.is_file()}
    return select(sizes, lambda name: (folder / name).read_text(encoding="utf-8"), f"{what} {str(folder)!r}")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint. Raises what `select` raises."""
    return [folder / name for name in contents(folder).weights]
