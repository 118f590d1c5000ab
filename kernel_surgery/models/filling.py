"""Which tensors of a checkpoint's files become which tensors of the model, and how to read only some of them.

Names and shapes in files may differ from those in memory: experts one by one that memory holds as one tensor, routers
under another name. The rules are transformers' own (`conversion_mapping`), so a tensor read here is the one that
`from_pretrained` gives, to the bit. A quantised matrix is dequantised (`quantised.formats`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import UserError
from kernel_surgery.files.tensorfile import Entry, read_tensor, rows_of
from kernel_surgery.models.stored import located
from kernel_surgery.quantised.formats import quantised_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Origin:
    """What one or more tensors of the model are made from.

    converter: of transformers; None: the tensor is in a file as it is in memory. sources: (the converter's pattern,
    the name in the files), in the order in which experts are stacked.
    """

    targets: tuple[str, ...]
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)


class Filling:
    """The tensors of a checkpoint under the names that they have in a model.

    model: on the meta device. folder: the checkpoint.

    Raises what `models.stored.located` raises.
    """

    def __init__(self, model: "PreTrainedModel", folder: Path, dtype: torch.dtype, device: torch.device):
        self.model, self.folder, self.device = model, folder, device
        self.places = located(folder)
        self.quantised = quantised_in(folder, self.places)
        self.held: Mapping[str, Tensor] = model.state_dict()
        wide = model._get_dtype_plan(dtype)
        self._wide = {re.compile(name.replace("*", ".*")): kept for name, kept in wide.items()}
        self.origins: dict[str, _Origin] = {}
        for name, target, converter, pattern in self._renamed():
            origin = self.origins.get(target)
            if origin is None:
                targets = _targets(target, converter)
                origin = _Origin(targets, converter)
                self.origins |= dict.fromkeys(targets, origin)
            origin.sources.append((pattern, name))

    def _renamed(self) -> Iterator[tuple[str, str, Any, str]]:
        """Yield (name in the files, first name in memory, converter or None, its pattern) of what the model has."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        held: Any = self.held
        for name in sorted(self.places.keys() | self.quantised.keys(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, held)
            if target in held:
                yield name, target, by_pattern.get(pattern or ""), pattern or name

    def check(self, names: Iterable[str]) -> None:
        """Raise UserError for a tensor that is not in the files, and for one whose shape there is another."""
        for name in names:
            if name not in self.origins:
                raise UserError(
                    f"the weights in {str(self.folder)!r} are incomplete: {name} is missing. Fetch them again."
                )
            origin = self.origins[name]
            stored = origin.sources[0][1]
            if origin.converter is None and stored not in self.quantised:
                self._check_shape(name, self.places[stored][1].shape)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if tuple(shape) != tuple(self.held[name].shape):
            raise UserError(
                f"{name} in {str(self.folder)!r} has shape {tuple(shape)}, but config.json gives it "
                f"{tuple(self.held[name].shape)}."
            )

    def under(self, path: str) -> list[str]:
        """Return the names of the model's tensors below a module, as far as they are in the files."""
        return [name for name in self.origins if name.startswith(f"{path}.")]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors of the model, in the dtypes that they have there. More come with them if they are made as one.

        Raises UserError for a shape that config.json does not give.
        """
        made: dict[str, Tensor] = {}
        for name in names:
            if name not in made:
                made |= self._made(self.origins[name])
        return made

    def _made(self, origin: _Origin) -> dict[str, Tensor]:
        first, dtype = origin.targets[0], self.dtype_of(origin.targets[0])
        if origin.converter is None:
            return {first: self._tensor(origin.sources[0][1], dtype)}
        converter = deepcopy(origin.converter)
        for pattern, name in origin.sources:
            converter.add_tensor(first, name, pattern, partial(self._tensor, name, dtype))
        found = converter.convert(first, model=self.model, config=self.model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        for name, tensor in made.items():
            self._check_shape(name, tuple(tensor.shape))
        return made

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor has in memory: a few stay in float32 (`_keep_in_fp32_modules`)."""
        kept = [dtype for pattern, dtype in self._wide.items() if pattern.search(name)]
        return kept[0] if kept else self.held[name].dtype

    def _tensor(self, stored: str, dtype: torch.dtype) -> Tensor:
        if stored in self.quantised:
            matrix, form = self.quantised[stored]
            numbers = matrix.pieces["numbers"][1]
            own = [matrix.expert(i) for i in range(numbers.shape[0])] if form.stacks(numbers) else [matrix]
            made = [one.dequantised().to(self.device, dtype) for one in own]
            made = [one.T.contiguous() for one in made] if form.swapped else made
            return torch.stack(made) if form.stacks(numbers) else made[0]
        path, entry = self.places[stored]
        return self._read(path, entry, dtype)

    def _read(self, path: Path, entry: Entry, dtype: torch.dtype) -> Tensor:
        with path.open("rb") as file:
            return read_tensor(file.fileno(), entry).to(self.device, dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start .. stop - 1 of a matrix. Only they are read if a file holds the matrix as it is."""
        origin = self.origins[name]
        if origin.converter is not None or origin.sources[0][1] in self.quantised:
            return self.read([name])[name][start:stop]
        path, entry = self.places[origin.sources[0][1]]
        return self._read(path, rows_of(entry, start, stop), self.dtype_of(name))

    @contextmanager
    def filled(self, names: Iterable[str]) -> Iterator[None]:
        """Give the model some of its tensors while the block runs."""
        with replaced(self.model, self.read(names)):
            yield


def _targets(first: str, converter: Any) -> tuple[str, ...]:
    """Return the names of all tensors that a converter makes, of which `first` is one."""
    patterns = [] if converter is None else converter.target_patterns
    return tuple(dict.fromkeys([first, *(first.replace(patterns[0], pattern) for pattern in patterns)]))


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a model's parameters and buffers while the block runs."""
    owners = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tensors}
    before = {name: getattr(owner, last) for name, (owner, last) in owners.items()}
    try:
        for name, (owner, last) in owners.items():
            new = tensors[name]
            is_buffer = last in owner._buffers
            setattr(owner, last, new if is_buffer else nn.Parameter(new, requires_grad=False))
        yield
    finally:
        for name, (owner, last) in owners.items():
            setattr(owner, last, before[name])


def make_buffers(body: "PreTrainedModel", device: torch.device) -> None:
    """Compute the tables that no file holds, such as rotary frequencies, as transformers does after loading."""
    for module in body.modules():
        tables = [n for n in module._non_persistent_buffers_set if getattr(module, n, None) is not None]
        for name in tables:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if tables:
            body._init_weights(module)
