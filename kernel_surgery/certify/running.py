"""Running a model layer by layer for a certificate: prompts, greedy text, and replaced modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernel_surgery.certify.routing import Replay
from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import LANGUAGES, WRITE
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.baked import AFTER_A_NORM, refuse_offset_without_bias
from kernel_surgery.edit.lora import refuse_bias, refuse_offset
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.edit.plan import Edit
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_model
from kernel_surgery.models.states import on_states, states_of
from kernel_surgery.models.table import holder
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.artifact import Subspace

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
def exactly_edited(site: nn.Module, basis: BasisLike | None, strength: float) -> Iterator[None]:
    """Edit the output of a site's module in float64 while the block runs, with one rounding to its dtype.

    This is the exact edit that the modes are compared with. basis: of one layer; None leaves the layer unedited.
    """
    if basis is None:
        yield
        return
    handle = site.register_forward_hook(
        on_states(lambda module, inputs, states: project_oracle(states, basis, strength).to(states.dtype))
    )
    try:
        yield
    finally:
        handle.remove()


def refusals(model: Layerwise, layer: int, edit: Projection, where: str = "mlp_out") -> list[tuple[str, str]]:
    """Return (mode, reason) of the modes that cannot make the edit of one layer. where: as in `mlp_outputs`."""
    if where == WRITE:
        return [(mode, AFTER_A_NORM) for mode in ("baked", "lora")]
    site, reasons = model.site(layer), []
    checks: list[tuple[str, Callable[[], None]]] = [
        ("lora", lambda: refuse_offset(edit)),
        ("baked", lambda: refuse_offset_without_bias(site.name, edit, site.constant)),
    ]
    for weight in site.weights:
        if not weight.matrix:
            name = holder(weight.name)
            checks.append(("lora", lambda name=name, held=weight.name: refuse_bias(name, model.tensor(held))))  # type: ignore[misc]
    for mode, check in checks:
        try:
            check()
        except KernelSurgeryError as error:
            reasons.append((mode, str(error).splitlines()[0]))
    return reasons


@contextmanager
def _seen(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Record the module's inputs while the block runs."""
    inputs: list[Tensor] = []
    if module is None:
        yield inputs
        return
    handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _through(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a site's module on inputs [rows, width], with a batch dimension as in the model.

    Return its output [rows, d_model], and what it was before any other hook changed it.
    """
    unedited: list[Tensor] = []
    see = on_states(lambda module, inputs, states: unedited.append(states.detach().clone()))
    handle = module.register_forward_hook(see, prepend=True)
    try:
        output = states_of((x[None],), module(x[None]))[0]
    finally:
        handle.remove()
    return output, unedited[0][0]


def greedy(
    oracle: Layerwise,
    ids: Tensor,
    edits: Mapping[int, BasisLike],
    strengths: Mapping[int, float],
    tokens: int,
    advance: Callable[[], object],
    where: str = "mlp_out",
) -> Tensor:
    """Return `ids` followed by `tokens` greedy tokens of the oracle, the edited model in higher precision.

    End-of-text tokens do not stop the text. Every new token takes one pass through the files, with a key-value cache.
    advance: called after every layer. where: the edited site, as in `mlp_outputs`.
    """
    cache, fresh = None, ids
    for _ in range(tokens):
        hidden, calls = oracle.begin(fresh, cache, keep=True)
        cache = calls.cache
        for index in range(oracle.layers):
            site, strength = oracle.output(index, where), strengths.get(index, 1.0)
            with oracle.layer(index) as block, exactly_edited(site, edits.get(index), strength):
                hidden = calls.run(index, block, hidden)
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
    routing: Mapping[str, Mapping[int, Any]],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Decode with the model loaded whole and every layer edited at once, in every mode.

    The text `ids` is given; it is fed token by token with a cache, as in generation. made: a baked checkpoint, for the
    baked mode. prompt: its number of tokens. routing: {"original", "edited": {layer: what the router gives `ids`}},
    which the whole model takes too. where: the edited site, as in `mlp_outputs`.

    Returns {mode: logits [sequences, new tokens + 1, words]}, and {mode: how many routing decisions would have been
    other ones}.
    """
    model = load_model(str(low.folder), low.dtype, low.device)
    logits_by_mode: dict[str, Tensor] = {}
    flips: dict[str, int] = {}
    ids = ids.to(low.device)
    spans = [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]
    for mode in ("original", *modes):
        running = model
        edit: AbstractContextManager[None] = nullcontext()
        if mode == "baked" and made is not None:
            running = load_model(str(made.folder), low.dtype, low.device)
        elif mode != "original":
            edit = all_layers(mode, model, edits, strengths, where)
        kept = routing["original" if mode == "original" else "edited"]
        replay = Replay(mlp_outputs(running, kept) if kept else {}, kept, len(ids))
        logits, cache, flips[mode] = [], None, 0
        with edit, progress_bar(len(spans), f"decode {mode}", unit="step", leave=False) as bar:
            for start, stop in spans:
                with ExitStack() as stack:
                    counts = replay.step(stack, start, stop)
                    out = running(ids[:, start:stop], past_key_values=cache, use_cache=True)
                flips[mode] += sum(map(sum, counts))
                cache = out.past_key_values
                logits.append(out.logits[:, -1:])
                bar.update()
        logits_by_mode[mode] = torch.cat(logits, 1)
    return logits_by_mode, flips


def applied_at(
    where: str, mode: str, model: nn.Module, edits: Mapping[int, Projection], strength: float
) -> AbstractContextManager[Edit]:
    """Make the edit of some layers at a site, as in `mlp_outputs`."""
    if where != WRITE:
        return APPLIERS[mode](model, edits, strength)
    return APPLIERS[mode](model, Subspace.of(edits, site=where), strength, force=True)


@contextmanager
def all_layers(
    mode: str, model: nn.Module, edits: Mapping[int, Projection], strengths: Mapping[int, float], where: str
) -> Iterator[None]:
    """Edit every layer while the block runs: layers with one strength together."""
    with ExitStack() as stack:
        for strength in dict.fromkeys(strengths.values()):
            together = {layer: edit for layer, edit in edits.items() if strengths[layer] == strength}
            stack.enter_context(applied_at(where, mode, model, together, strength))
        yield
