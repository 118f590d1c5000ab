"""Run a causal LM with one decoder layer in memory at a time, read from its checkpoint's files.

The modules are those of transformers. They are created without memory (on the meta device) and filled layer by layer,
so they compute the same as after `from_pretrained`. Everything around the layers is transformers' own code as well.
What a layer is called with comes from one run of the model's body, in which the layers only record it. So positions,
masks and whatever is done with the embedding are those of the architecture. All sequences have the same length,
without padding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError, UserError
from kernel_surgery.common.names import WRITE
from kernel_surgery.models.architectures import (
    DecoderLayer,
    MlpSite,
    Norm,
    decoder_layers,
    layout_of,
    mlp_outputs,
    submodule,
)
from kernel_surgery.models.exact import make_norms_exact
from kernel_surgery.models.filling import Filling, make_buffers, replaced
from kernel_surgery.models.load import model_class, quiet_transformers, read_config

BLOCK = 8192  # rows of the output embedding at a time


Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and keyword arguments


class _Changed(Exception):
    """The body did something to the hidden states between its layers."""


@dataclass(frozen=True)
class Calls:
    """What each decoder layer is called with besides the hidden states. cache: of keys and values, if there is one."""

    each: tuple[Call, ...]
    cache: Any = None

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer on hidden states [sequences, tokens, d_model]. Return them after it."""
        args, kwargs = self.each[index]
        return _first(block(hidden, *args, **kwargs))


class Layerwise:
    """A model without weights, of which `layer(i)` fills one layer at a time.

    exact: compute norms in float64 (`models.exact`). What transformers computes in float32 in every dtype stays so
    otherwise: rotary angles, the scores of routers and of some attentions, norms with a gate, and recurrences.

    Raises UserError for a folder whose tensors do not fit its configuration, ValueError for an unknown architecture.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", exact: bool = False):
        quiet_transformers()
        from transformers import AutoConfig

        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        read_config(self.folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            # Whatever config.json says, it is the attention that transformers chooses by itself.
            config._attn_implementation = None
            if exact:  # the grouped products of experts have no float64
                config._experts_implementation = "eager"
            with torch.device("meta"):
                self.model = model_class(config).from_config(config, dtype=dtype, trust_remote_code=False).eval()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            raise UserError(f"cannot make a model of {str(folder)!r}: {str(error).splitlines()[0]}") from error
        decoder_layers(self.model)
        self.layout = layout_of(self.model)
        self.config = self.model.config.get_text_config()
        self.body = cast(Any, submodule(self.model, self.layout.body))
        self.filling = Filling(self.model, self.folder, dtype, self.device)
        head = f"{self.layout.head}.weight"
        self.tied = head not in self.filling.origins and head in self.model.all_tied_weights_keys
        inside = (f"{self.layout.body}.", f"{self.layout.head}.")
        wanted = [n for n in self.filling.held if n.startswith(inside) and not (self.tied and n == head)]
        self.filling.check(wanted)
        make_buffers(self.body, self.device)
        if exact:
            make_norms_exact(self.body)
        embedding = cast(Any, submodule(self.body, self.layout.embedding))
        embedding.padding_idx = None  # it does not count in a forward pass, and need not be among the rows read
        # What else the body has, such as positions that are learned: small, and always in memory.
        apart = (f"{self.layout.layers}.", f"{self._norm_path}.", self.layout.embedding_name(), inside[1])
        self._rest = self.filling.read([name for name in wanted if not name.startswith(apart)])
        self._tuples = False  # whether the body reads the first element of what a layer returns

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.model))

    @property
    def _norm_path(self) -> str:
        return f"{self.layout.body}.{self.layout.norm}"

    def check_length(self, length: int) -> None:
        """Raise UserError for sequences longer than the model's positions."""
        limit = getattr(self.config, "max_position_embeddings", getattr(self.config, "max_seq_len", None))
        if limit is not None and length > limit:
            raise UserError(
                f"sequences of {length} tokens are longer than the model's {limit} positions. Use fewer --new-tokens."
            )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the model, as it has it in memory."""
        return self.filling.read([name])[name]

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Give decoder layer `index`, and the norm after it if there is one, their weights while the block runs."""
        path = self.layout.next_norm(index, self.layers)
        names = [*self.filling.under(self.layout.layer(index)), *(self.filling.under(path) if path else ())]
        with self.filling.filled(names):
            yield decoder_layers(self.model)[index]

    def site(self, index: int, where: str = "mlp_out") -> MlpSite:
        """Return what is edited in a layer, with the weights that the layer has now. where: as in `mlp_outputs`."""
        return mlp_outputs(self.model, [index], where)[index]

    def output(self, index: int, where: str = "mlp_out") -> nn.Module:
        """Return the module whose output is edited in a layer. where: as in `mlp_outputs`."""
        path = self.layout.after if where == WRITE else self.layout.site
        return cast(nn.Module, submodule(decoder_layers(self.model)[index], path or ""))

    @contextmanager
    def final_norm(self) -> Iterator[Norm]:
        """Give the norm before the output embedding its weights while the block runs."""
        with self.filling.filled(self.filling.under(self._norm_path)):
            yield cast(Norm, submodule(self.model, self._norm_path))

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the first layer gets for ids [sequences, tokens]: [sequences, tokens, d_model]."""
        return self.begin(ids)[0]

    def calls(self, sequences: int, tokens: int) -> Calls:
        """Return what the layers are called with for any text of this size."""
        return self.begin(torch.zeros(sequences, tokens, dtype=torch.long))[1]

    @torch.no_grad()
    def begin(self, ids: Tensor, cache: Any = None, keep: bool = False) -> tuple[Tensor, Calls]:
        """Return what the first layer gets for ids [sequences, tokens], and what all layers are called with.

        cache: of the tokens before. keep: start one, if there is none. Of the embedding, only the rows of `ids` are
        read from the file.

        Raises ModelError if the body does more between its layers than to hand the hidden states on.
        """
        ids, name = ids.to(self.device), self.layout.embedding_name()
        wanted, where = ids.unique(return_inverse=True)
        table = torch.cat([self.filling.rows(name, int(i), int(i) + 1) for i in wanted])
        with replaced(self.model, self._rest | {name: table}), self._embedding(where):
            for tuples in (self._tuples, not self._tuples):
                with suppress(_Changed):
                    hidden, each, kept = self._recorded(ids, cache, keep, tuples)
                    self._tuples = tuples
                    return hidden, Calls(each, kept)
        raise ModelError(
            f"cannot run a {self.config.model_type!r} model layer by layer: it changes the hidden states between its "
            "layers. Nothing was read."
        )

    @contextmanager
    def _embedding(self, where: Tensor) -> Iterator[None]:
        """Make the embedding look up the rows of the table that was read, instead of the ids."""
        module = cast(nn.Module, submodule(self.body, self.layout.embedding))
        handle = module.register_forward_pre_hook(lambda module, args: (where.view_as(args[0]), *args[1:]))
        try:
            yield
        finally:
            handle.remove()

    def _recorded(self, ids: Tensor, cache: Any, keep: bool, tuples: bool) -> tuple[Tensor, tuple[Call, ...], Any]:
        """Run the body with layers that return what they are given. Return that, and what else they are given.

        The third is the cache, if there is one. tuples: the layers return tuples. Raises _Changed if a layer or the
        final norm is given anything else.
        """
        seen: list[tuple[Tensor, Call]] = []

        def record(tuples: bool, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, (args, kwargs)))
            if hidden is not seen[0][0]:
                raise _Changed
            return (hidden, None) if tuples else hidden

        norm = cast(nn.Module, submodule(self.body, self.layout.norm))
        with ExitStack() as stack:
            for block in decoder_layers(self.model):
                stack.enter_context(instead(block, partial(record, tuples)))
            stack.enter_context(instead(norm, partial(record, False)))
            out = self.body(input_ids=ids, past_key_values=cache, use_cache=keep or cache is not None)
        if len(seen) != self.layers + 1:
            raise _Changed
        calls = tuple(call for _, call in seen[:-1])
        return seen[0][0], calls, getattr(out, "past_key_values", None)

    def head_blocks(self) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
        """Yield (first word, function) for each block of the vocabulary, one block in memory at a time.

        The function gives the logits [..., <= BLOCK] of normed hidden states [..., d_model], until the next block. It
        is the model's own end: a bias of the head, and a scale or cap of the logits, are in them.
        """
        head = self.layout.head
        rows = self.layout.embedding_name() if self.tied else f"{head}.weight"
        biases = [name for name in self.filling.under(head) if name.endswith(".bias")]
        total = self.filling.held[rows].shape[0]
        for start in range(0, total, BLOCK):
            stop = min(start + BLOCK, total)
            block = {name: self.filling.rows(name, start, stop) for name in biases}
            with replaced(self.model, block | {f"{head}.weight": self.filling.rows(rows, start, stop)}):
                yield start, self._end

    def _end(self, normed: Tensor) -> Tensor:
        """Return the logits of normed hidden states [..., d_model]: what the model's own code makes of them."""
        path, rest = self.layout.head.rpartition(".")[0], self.layout.body
        owner = cast(nn.Module, submodule(self.model, path)) if path else self.model
        inner = cast(nn.Module, submodule(owner, rest.removeprefix(f"{path}." if path else "").partition(".")[0]))
        states = normed.reshape(1, -1, normed.shape[-1])
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
        with instead(inner, lambda *args, **kwargs: _Ends(states)):
            logits = owner(input_ids=ids, use_cache=False).logits
        return logits.reshape(*normed.shape[:-1], -1)

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """Return the greedy next tokens [sequences] for normed hidden states [sequences, d_model]."""
        best = torch.full(hidden.shape[:1], -torch.inf, dtype=torch.float64, device=self.device)
        chosen = torch.zeros(hidden.shape[:1], dtype=torch.long, device=self.device)
        for start, logits in self.head_blocks():
            value, at = logits(hidden).double().max(-1)
            chosen = torch.where(value > best, start + at, chosen)
            best = torch.maximum(best, value)
        return chosen


class _Ends:
    """What a body returns, with the final hidden states alone: [1, positions, d_model]."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward while the block runs."""
    had = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if had is not None:
            module.forward = had
