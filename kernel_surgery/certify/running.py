"""Running a model layer by layer for a certificate: prompts, greedy text, and replaced modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.models.architectures import submodule
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_model
from kernel_surgery.models.table import LLAMA
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.problems.generator import problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 256  # activations per layer that are checked against bounds; more are sampled at even intervals


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase | None", count: int, seed: int, vocabulary: int
) -> tuple[Tensor, str]:
    """Return token ids [count, tokens] to certify on, and a description of them.

    They are test problems that all have the same number of tokens, in as many languages as possible. Without a
    tokenizer they are random. seed: of the problems, or of the random ids. vocabulary: the number of tokens that the
    model knows.

    Raises UserError if the tokenizer gives an id that the model does not have.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (count, 32), generator=generator), f"random ids, seed {seed}"

    by_length: dict[int, dict[str, list[list[int]]]] = {}
    for problem in problems("test", 40, seed=seed):
        for language in LANGUAGES:
            ids = tokenizer(problem.prompts[language]).input_ids
            by_length.setdefault(len(ids), {}).setdefault(language, []).append(ids)
    usable = {n: group for n, group in by_length.items() if sum(map(len, group.values())) >= count} or by_length
    length = max(usable, key=lambda n: (len(usable[n]), sum(map(len, usable[n].values()))))
    queues = [list(prompts) for prompts in usable[length].values()]
    rows: list[list[int]] = []
    while len(rows) < count and any(queues):
        for queue in queues:
            if queue and len(rows) < count:
                rows.append(queue.pop(0))
    if max(map(max, rows)) >= vocabulary:
        raise UserError(
            f"the tokenizer gives id {max(map(max, rows))}, but the model has only {vocabulary} tokens: they do not "
            "belong together."
        )
    languages = ", ".join(language for language in LANGUAGES if language in usable[length])
    return torch.tensor(rows), f"test problems of {length} tokens ({languages}), seed {seed}"


@contextmanager
def exactly_edited(block: nn.Module, basis: BasisLike | None, strength: float) -> Iterator[None]:
    """Edit the output of `down_proj` in float64 while the block runs, with one rounding to its dtype.

    This is the exact edit that the modes are compared with. basis: of one layer; None leaves the layer unedited.
    """
    if basis is None:
        yield
        return
    handle = cast(nn.Module, submodule(block, LLAMA.site)).register_forward_hook(
        lambda module, inputs, output: project_oracle(output, basis, strength).to(output.dtype)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _instead(module: nn.Module, value: Tensor | None) -> Iterator[None]:
    """Make the module return `value` for any input while the block runs. None changes nothing."""
    if value is None:
        yield
        return
    had = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: value
    try:
        yield
    finally:
        del module.forward
        if had is not None:
            module.forward = had


@contextmanager
def _seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the module's inputs while the block runs."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def greedy(
    oracle: Layerwise,
    ids: Tensor,
    edits: Mapping[int, BasisLike],
    strengths: Mapping[int, float],
    tokens: int,
    advance: Callable[[], object],
) -> Tensor:
    """Return `ids` followed by `tokens` greedy tokens of the oracle, the edited model in higher precision.

    End-of-text tokens do not stop the text. Every new token takes one pass through the files, with a key-value cache.
    advance: called after every layer.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=oracle.config)
    fresh = ids
    for _ in range(tokens):
        start = ids.shape[1] - fresh.shape[1]
        hidden, where = oracle.embed(fresh), oracle.positions(start, ids.shape[1])
        for index in range(oracle.layers):
            with oracle.layer(index) as block, exactly_edited(block, edits.get(index), strengths.get(index, 1.0)):
                hidden = block(hidden, past_key_values=cache, use_cache=True, **where)
            advance()
        with oracle.final_norm() as norm:
            fresh = oracle.next_tokens(norm(hidden[:, -1])).to(ids.device)[:, None]
        ids = torch.cat([ids, fresh], 1)
    return ids


def _sampled(x: Tensor) -> Tensor:
    """Return at most ROWS rows of x, taken at even intervals."""
    rows = x.flatten(0, -2)
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=x.device).round().long()]


def decode(
    low: Layerwise,
    made: Layerwise | None,
    edits: Mapping[int, Projection],
    strengths: Mapping[int, float],
    modes: Sequence[str],
    ids: Tensor,
    prompt: int,
) -> dict[str, Tensor]:
    """Decode with the model loaded whole and every layer edited at once, in every mode.

    The text `ids` is given; it is fed token by token with a cache, as in generation. made: a baked checkpoint, for the
    baked mode. prompt: its number of tokens. Returns {mode: logits [sequences, new tokens + 1, words]}.
    """
    model = load_model(str(low.folder), low.dtype, low.device)
    logits_by_mode: dict[str, Tensor] = {}
    ids = ids.to(low.device)
    for mode in ("original", *modes):
        running = model
        edit: AbstractContextManager[None] = nullcontext()
        if mode == "baked" and made is not None:
            running = load_model(str(made.folder), low.dtype, low.device)
        elif mode != "original":
            edit = all_layers(mode, model, edits, strengths)
        with edit:
            out = running(ids[:, :prompt], use_cache=True)
            logits = [out.logits[:, -1:]]
            for at in range(prompt, ids.shape[1]):
                out = running(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits)
        logits_by_mode[mode] = torch.cat(logits, 1)
    return logits_by_mode


@contextmanager
def all_layers(
    mode: str, model: nn.Module, edits: Mapping[int, Projection], strengths: Mapping[int, float]
) -> Iterator[None]:
    """Edit every layer while the block runs: layers with one strength together."""
    with ExitStack() as stack:
        for strength in dict.fromkeys(strengths.values()):
            together = {layer: edit for layer, edit in edits.items() if strengths[layer] == strength}
            stack.enter_context(APPLIERS[mode](model, together, strength))
        yield
