"""Run a causal LM with one decoder layer in memory at a time, read from its checkpoint's files.

The modules are those of transformers. They are created without memory (on the meta device) and filled layer by layer,
so they compute the same as after `from_pretrained`: bit-identical in float32 on one device. All sequences have the same
length, without padding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import UserError
from kernel_surgery.files.tensorfile import read_tensor, rows_of
from kernel_surgery.models.architectures import DecoderLayer, Norm, decoder_layers, layout_of, next_norm, submodule
from kernel_surgery.models.load import model_class, quiet_transformers, read_config
from kernel_surgery.models.stored import located
from kernel_surgery.numerics.oracle import rmsnorm_oracle
from kernel_surgery.quantised.formats import quantised_in

BLOCK = 8192  # rows of the output embedding at a time


class Layerwise:
    """A model without weights, of which `layer(i)` fills one layer at a time.

    exact: compute norms in float64. Those of transformers use float32 in every dtype.

    Raises UserError for a folder whose tensors do not fit its configuration, ValueError for an unknown architecture.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", exact: bool = False):
        quiet_transformers()
        from transformers import AutoConfig

        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        read_config(self.folder)
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            # Always sdpa: without a mask, it is the only attention that is causal by itself.
            options = {"dtype": dtype, "trust_remote_code": False, "attn_implementation": "sdpa"}
            with torch.device("meta"):
                self.model = model_class(self.config).from_config(self.config, **options).eval()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise UserError(f"cannot make a model of {str(folder)!r}: {str(error).splitlines()[0]}") from error
        decoder_layers(self.model)
        self.layout = layout_of(self.model)
        head = f"{self.layout.head}.weight"
        self.places = located(self.folder)
        found = quantised_in(self.folder, self.places)
        self.quantised = {name: matrix for name, (matrix, how) in found.items() if not how.swapped}
        self.tied = head not in self.places and bool(getattr(self.config, "tie_word_embeddings", False))
        wanted = {name: p.shape for name, p in self.model.named_parameters() if not (self.tied and name == head)}
        for name, shape in wanted.items():
            if name in self.quantised and self.quantised[name].shape == tuple(shape):
                continue
            if name not in self.places:
                raise UserError(f"the weights in {str(folder)!r} are incomplete: {name} is missing. Fetch them again.")
            if self.places[name][1].shape != tuple(shape):
                raise UserError(
                    f"{name} in {str(folder)!r} has shape {self.places[name][1].shape}, but config.json gives it "
                    f"{tuple(shape)}."
                )
        # Created again on the device: its tables are not parameters, and on the meta device they are empty.
        self.rotary = type(self.model.model.rotary_emb)(config=self.config).to(self.device)
        if exact:
            for module in self.model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = _exact_norm(module)

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.model))

    def check_length(self, length: int) -> None:
        """Raise UserError for sequences longer than the model's positions or its attention window."""
        window = (
            getattr(self.config, "sliding_window", None) if getattr(self.config, "use_sliding_window", True) else None
        )
        for limit, what in ((self.config.max_position_embeddings, "positions"), (window, "tokens of attention window")):
            if limit is not None and length > limit:
                raise UserError(
                    f"sequences of {length} tokens are longer than the model's {limit} {what}. Use fewer --new-tokens."
                )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint in the model's dtype, on its device. A quantised one is dequantised."""
        if name in self.quantised:
            return self.quantised[name].dequantised().to(self.device, self.dtype)
        path, entry = self.places[name]
        with path.open("rb") as file:
            return read_tensor(file.fileno(), entry).to(self.device, self.dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start .. stop - 1 of a matrix of the checkpoint."""
        path, entry = self.places[name]
        with path.open("rb") as file:
            return read_tensor(file.fileno(), rows_of(entry, start, stop)).to(self.device, self.dtype)

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Give decoder layer `index` and the norm after it their weights while the block runs."""
        norm, path = next_norm(self.model, index), self.layout.next_norm(index, self.layers)
        assert path is not None  # as there is a norm
        with ExitStack() as stack:
            stack.enter_context(self._filled(norm, path))
            block = decoder_layers(self.model)[index]
            stack.enter_context(self._filled(block, self.layout.layer(index)))
            yield block

    @contextmanager
    def _filled(self, module: nn.Module, path: str) -> Iterator[None]:
        empty = dict(module.named_parameters())
        try:
            for name in empty:
                _replace(module, name, nn.Parameter(self.tensor(f"{path}.{name}"), requires_grad=False))
            yield
        finally:
            for name, parameter in empty.items():
                _replace(module, name, parameter)

    @contextmanager
    def final_norm(self) -> Iterator[Norm]:
        """Give the norm before the output embedding its weights while the block runs."""
        norm = cast(Norm, submodule(self.model, f"{self.layout.body}.{self.layout.norm}"))
        with self._filled(norm, f"{self.layout.body}.{self.layout.norm}"):
            yield norm

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids [sequences, tokens] as [sequences, tokens, d_model]. Only their rows are read from the file."""
        wanted, where = ids.unique(return_inverse=True)
        table = torch.cat([self.rows(self.layout.embedding_name(), int(i), int(i) + 1) for i in wanted])
        return table[where.to(self.device)]

    def positions(self, start: int, stop: int) -> dict[str, Any]:
        """Return a decoder layer's arguments for positions start .. stop - 1."""
        ids = torch.arange(start, stop, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return {"position_ids": ids, "position_embeddings": self.rotary(like, ids)}

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows [<= BLOCK, d_model]) of the output embedding, one block in memory at a time."""
        name = self.layout.embedding_name() if self.tied else f"{self.layout.head}.weight"
        total = self.places[name][1].shape[0]
        for start in range(0, total, BLOCK):
            yield start, self.rows(name, start, min(start + BLOCK, total))

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """Return the greedy next tokens [sequences] for normed hidden states [sequences, d_model]."""
        best = torch.full(hidden.shape[:1], -torch.inf, dtype=self.dtype, device=self.device)
        chosen = torch.zeros(hidden.shape[:1], dtype=torch.long, device=self.device)
        for start, rows in self.head_blocks():
            value, at = (hidden @ rows.T).max(-1)
            chosen = torch.where(value > best, start + at, chosen)
            best = torch.maximum(best, value)
        return chosen


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, parameter)


def _exact_norm(norm: Norm) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return rmsnorm_oracle(hidden_states, norm.weight, norm.variance_epsilon).to(hidden_states.dtype)

    return forward
