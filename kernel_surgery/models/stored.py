"""A checkpoint's tensors on disk: under the names that the loaded model gives them, and which of them the edit changes.

Experts are edited one at a time, also where a file holds all of them as one tensor. So what is read at once is one
expert's matrix, whatever their number. A quantised matrix is read as floats (`quantised`).
"""

import dataclasses
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.files.contents import weight_files
from kernel_surgery.files.tensorfile import EDITABLE, Entry, Layout, mapped, one_of, read_layout, read_tensor
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.models.load import read_config
from kernel_surgery.models.table import EXPERT_COUNTS, Form, Part
from kernel_surgery.models.table import Layout as Architecture
from kernel_surgery.quantised.formats import Format, quantised_in, unreadable
from kernel_surgery.quantised.matrix import Matrix


@dataclasses.dataclass(frozen=True)
class StoredPart(Part):
    """One matrix or bias that the edit changes, as a file holds it.

    path: the file. tensor: the name of the tensor there, under which `layouts` lists it. entry: the place of the part,
    which is the tensor's, or that of one expert in it. quantised: how the matrix is quantised, or None. Then `tensor`
    is the name that it has unquantised, and `entry` has its shape and the dtype of its numbers.
    """

    path: Path
    tensor: str
    entry: Entry
    quantised: Matrix | None = None

    @property
    def tensors(self) -> set[str]:
        """The names of the tensors in the files that it consists of, stacked experts' with all of them."""
        pieces = {"": (self.path, self.entry)} if self.quantised is None else self.quantised.pieces
        return {entry.name.partition("[")[0] for _, entry in pieces.values()}

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return the tensor as [d_model, columns], or a bias as [d_model]. Its own inverse; a view."""
        return tensor.T if self.form.transposed else tensor

    def read(self) -> Tensor:
        """Read it as [d_model, columns], or a bias as [d_model]. A quantised one is float32."""
        if self.quantised is not None:
            return self.oriented(self.quantised.dequantised())
        with self.path.open("rb") as file:
            return self.oriented(read_tensor(file.fileno(), self.entry))

    def mapped(self) -> Tensor:
        """Return it as [d_model, columns], or a bias as [d_model], without reading it all (`files.tensorfile`).

        A quantised one is read, as `read` does.
        """
        return self.read() if self.quantised is not None else self.oriented(mapped(self.path, self.entry))


def layout_in(folder: Path) -> Architecture:
    """Return the layout of a checkpoint's architecture. Raises ModelError as `read_config` and `layout_named` do."""
    config = read_config(folder)
    return layout_named(config["model_type"], config["inner_type"])


def layouts(folder: Path) -> list[Layout]:
    """Return the headers of a checkpoint's weight files, with the tensors under the model's names.

    A language model that was saved alone lacks the first part of its names, and in one of several modalities the files
    may have another (`Layout.bodies`); transformers changes them, and so do we.

    Raises FileNotFoundError for a missing file, and CheckpointError for a damaged one, and for a tensor in two files.
    """
    found, place = [read_layout(file) for file in weight_files(folder)], dict[str, Path]()
    for layout in found:
        if twice := sorted(place.keys() & layout.entries.keys()):
            files = f"{place[twice[0]].name} and {layout.path.name}"
            raise CheckpointError(f"{str(folder)!r}: {twice[0]} is in two of its weight files, {files}.")
        place |= dict.fromkeys(layout.entries, layout.path)
    kind = layout_in(folder)
    if kind.embedding_name() in place:
        return found
    for body in kind.bodies:
        prefix = f"{body}." if body else ""
        if f"{prefix}{kind.embedding}.weight" in place:
            return [_renamed(layout, kind, prefix) for layout in found]
    return found


def _renamed(layout: Layout, kind: Architecture, prefix: str) -> Layout:
    """Return a header with `prefix` of the body's tensors replaced by that of the model's names."""
    entries = {}
    for name, entry in layout.entries.items():
        own = name.startswith(prefix) and not name.startswith(f"{kind.head}.")
        new = f"{kind.body}.{name.removeprefix(prefix)}" if own else name
        entries[new] = dataclasses.replace(entry, name=new)
    return dataclasses.replace(layout, entries=entries)


def located(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor of a checkpoint. Raises what `layouts` raises."""
    return places(layouts(folder))


def places(found: Iterable[Layout]) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor of some weight files: {name: (file, entry)}."""
    return {name: (layout.path, entry) for layout in found for name, entry in layout.entries.items()}


def parts(kind: Architecture, found: Iterable[Layout], layers: Container[int]) -> list[StoredPart]:
    """Return the matrices and biases that an edit of `layers` changes, in the order of layers and names.

    kind: of the architecture. found: the headers of the weight files. Of a checkpoint that is quantised in a format
    that cannot be read (`quantised.formats.unreadable`), the quantised matrices are left out.
    """
    made, place_of = [], places(found)
    folder = next((path.parent for path, _ in place_of.values()), None)
    if folder is None:
        return []
    quantised, hidden = quantised_in(folder, place_of), unreadable(folder) is not None
    for name, (path, entry) in place_of.items():
        if name not in quantised and (stored := kind.stored(name, layers)):
            layer, form, expert = stored
            if hidden and entry.dtype not in EDITABLE:
                continue
            for number, piece in _pieces(form, entry, expert):
                made.append(StoredPart(layer, kind.name_of(layer, form, number), form, path, name, piece))
    for name, (matrix, how) in quantised.items():
        if stored := kind.stored(name, layers):
            made += _quantised_parts(kind, name, matrix, how, stored)
    return sorted(made, key=lambda part: (part.layer, part.form.role, part.form.bias, len(part.name), part.name))


def _quantised_parts(
    kind: Architecture, name: str, matrix: Matrix, how: Format, stored: tuple[int, Form, int | None]
) -> Iterable[StoredPart]:
    """Yield the parts that one quantised matrix holds: itself, or one for each of stacked experts."""
    layer, form, expert = stored
    form = dataclasses.replace(form, transposed=form.transposed and not how.swapped)
    path, entry = matrix.pieces["numbers"]
    for number in range(entry.shape[0]) if form.stacked else (expert,):
        own = matrix.expert(number) if form.stacked and number is not None else matrix
        place = dataclasses.replace(own.pieces["numbers"][1], shape=own.shape)
        yield StoredPart(layer, kind.name_of(layer, form, number), form, path, name, place, own)


def _pieces(form: Form, entry: Entry, expert: int | None) -> Iterable[tuple[int | None, Entry]]:
    if not form.stacked:
        return [(expert, entry)]
    return [(number, one_of(entry, number)) for number in range(entry.shape[0])]


class _Samples(Mapping[str, Tensor]):
    """Tensors by name. Each is mapped or read when it is asked for, and let go: pages that were read would stay."""

    def __init__(self, name: str, embedding: tuple[Path, Entry], chosen: Iterable[StoredPart]):
        self.embedding = embedding
        self.held: dict[str, StoredPart | None] = {name: None} | {part.name: part for part in chosen}

    def __getitem__(self, name: str) -> Tensor:
        part = self.held[name]
        if part is None:
            return mapped(*self.embedding)
        return part.mapped() if part.quantised is None else part.read().to(EDITABLE[self.embedding[1].dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def sampled(folder: Path, found: Iterable[Layout] | None = None) -> Mapping[str, Tensor]:
    """Return the tensors that a fingerprint samples, mapped: the embedding, and matrices of every layer's MLP block.

    folder: of the checkpoint. found: the headers of its weight files, if they were read before. Of routed experts the
    first one's matrix is sampled. A quantised matrix is rounded to the embedding's dtype, as transformers does when it
    loads one, and is read anew each time.

    Raises CheckpointError for a tensor that is missing, such as in an incomplete download.
    """
    kind, found = layout_in(folder), layouts(folder) if found is None else list(found)
    name = kind.embedding_name()
    place = places(found).get(name)
    if place is None:
        raise CheckpointError(f"{str(folder)!r} is incomplete: it has no tensor {name}. Fetch the model again.")
    matrices = [part for part in whole_parts(folder, found) if not part.form.bias]
    chosen = [part for part in matrices if part.form.role != "expert" or part.name.endswith("[0]")]
    return _Samples(name, place, chosen)


def whole_parts(folder: Path, found: list[Layout], layers: Iterable[int] | None = None) -> list[StoredPart]:
    """Return what `parts` does, of some layers or of all, once it is known that none is missing.

    Raises CheckpointError for a layer without a matrix, and for experts that are fewer than config.json says.
    """
    config, kind = read_config(folder), layout_in(folder)
    every = parts(kind, found, range(config["num_hidden_layers"]))
    layers = range(config["num_hidden_layers"]) if layers is None else list(layers)
    made, experts = [part for part in every if part.layer in layers], experts_in(config)
    if unreadable(folder) is not None:
        return made
    for layer in layers:
        here = [part for part in made if part.layer == layer and not part.form.bias]
        if not any(part.form.role in ("dense", "expert") for part in here):
            name = kind.name_of(layer, kind.writes[0], 0)
            raise CheckpointError(f"{str(folder)!r} is incomplete: it has no tensor {name}. Fetch the model again.")
        routed = {part.name for part in here if part.form.role == "expert"}
        if routed and experts is not None and len(routed) != experts:
            raise CheckpointError(
                f"{str(folder)!r} has {len(routed)} experts in layer {layer}, but config.json gives it {experts}. "
                "Fetch the model again."
            )
    _check_alike(folder, every)
    return made


def _check_alike(folder: Path, found: list[StoredPart]) -> None:
    """Raise CheckpointError unless all mixtures have the same parts, and all dense layers: then one is missing."""
    layers: dict[int, Counter[tuple[str, bool]]] = {}
    for part in found:
        layers.setdefault(part.layer, Counter())[part.form.role, part.form.bias] += 1
    for role in ("dense", "expert"):
        alike = {layer: own for layer, own in layers.items() if own[role, False]}
        most = max(alike.values(), key=Counter.total, default=Counter())
        for layer, own in alike.items():
            if lacking := most - own:
                (what, bias), number = next(iter(lacking.items()))
                one, more = ("bias", "biases") if bias else ("matrix", "matrices")
                raise CheckpointError(
                    f"{str(folder)!r} is incomplete: layer {layer} lacks "
                    f"{_number(number, f'{what} {one}', f'{what} {more}')} that other layers have. Fetch the model "
                    "again."
                )


def experts_in(config: dict[str, Any]) -> int | None:
    """Return the number of routed experts of a layer that config.json gives, or None if it gives none."""
    return next((config[name] for name in EXPERT_COUNTS if isinstance(config.get(name), int)), None)


def counted(found: Iterable[Part]) -> str:
    """Return in words what an edit changes, such as "128 experts + 1 shared in 47 layers, 1 dense layer"."""
    layers: dict[int, Counter[str]] = {}
    for part in found:
        layers.setdefault(part.layer, Counter())["bias" if part.form.bias else part.form.role] += 1
    alike = Counter((own["expert"], own["shared"]) for own in layers.values() if own["expert"])
    words = []
    for (routed, shared), number in alike.items():
        more = f" + {shared} shared" if shared else ""
        words.append(f"{routed} experts{more} in {_number(number, 'layer')}")
    if dense := sum(own["dense"] for own in layers.values()):
        words.append(_number(dense, "dense layer") if alike else _number(dense, "matrix", "matrices"))
    if biases := sum(own["bias"] for own in layers.values()):
        words.append(_number(biases, "bias", "biases"))
    return ", ".join(words)


def _number(count: int, one: str, more: str | None = None) -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"
