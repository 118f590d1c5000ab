"""Running a model layer by layer for a certificate: prompts, greedy text, replaced modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.models.architectures import LLAMA, submodule
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.problems.generator import problems

ROWS = 256  # activations a layer that are held to bounds; more are spread evenly


def prompt_ids(tokenizer, count: int, seed: int, vocabulary: int) -> tuple[Tensor, str]:
    """(ids [count, tokens], what they are): test problems of one length in tokens, in as many languages as have that
    length; without a tokenizer, random ids."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (count, 32), generator=generator), f"random ids, seed {seed}"

    by_length: dict[int, dict[str, list]] = {}
    for problem in problems("test", 40, seed=seed):
        for language in LANGUAGES:
            ids = tokenizer(problem.prompts[language]).input_ids
            by_length.setdefault(len(ids), {}).setdefault(language, []).append(ids)
    enough = {n: found for n, found in by_length.items() if sum(map(len, found.values())) >= count} or by_length
    length = max(enough, key=lambda n: (len(enough[n]), sum(map(len, enough[n].values()))))
    queues, chosen = [list(prompts) for prompts in enough[length].values()], []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    if max(map(max, chosen)) >= vocabulary:
        raise UserError(
            f"the tokenizer gives id {max(map(max, chosen))}, the model has {vocabulary}: they do not belong together."
        )
    languages = ", ".join(language for language in LANGUAGES if language in enough[length])
    return torch.tensor(chosen), f"test problems of {length} tokens ({languages}), seed {seed}"


@contextmanager
def exactly_edited(block: nn.Module, basis: Tensor | None, strength: float) -> Iterator[None]:
    """The oracle's edit: float64, on the output of `down_proj`."""
    if basis is None:
        yield
        return
    handle = submodule(block, LLAMA.projection).register_forward_hook(
        lambda module, inputs, output: project_oracle(output, basis, strength).to(output.dtype)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _instead(module: nn.Module, value: Tensor | None) -> Iterator[None]:
    """While the block lasts, the module gives `value` whatever it is given (None: what it always gives)."""
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
    """What enters the module while the block lasts."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def greedy(oracle: Layerwise, ids: Tensor, bases: dict, strength: float, tokens: int, advance: Callable) -> Tensor:
    """ids with the edited oracle's own greedy continuation; end tokens do not end it. One pass through the files a
    token, with a cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=oracle.config)
    fresh = ids
    for _ in range(tokens):
        start = ids.shape[1] - fresh.shape[1]
        hidden, where = oracle.embed(fresh), oracle.positions(start, ids.shape[1])
        for index in range(oracle.layers):
            with oracle.layer(index) as block, exactly_edited(block, bases.get(index), strength):
                hidden = block(hidden, past_key_values=cache, use_cache=True, **where)
            advance()
        with oracle.final_norm() as norm:
            fresh = oracle.next_tokens(norm(hidden[:, -1])).to(ids.device)[:, None]
        ids = torch.cat([ids, fresh], 1)
    return ids


def _sampled(x: Tensor) -> Tensor:
    """At most ROWS rows, spread evenly."""
    rows = x.flatten(0, -2)
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=x.device).round().long()]
