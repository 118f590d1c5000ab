"""Read a model's activations for the same problems in several languages: vectors per prompt, or moments over tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import BATCH_TOKENS, LANGUAGES, POOLS, TOKENS
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.common.ranks import ALONE
from kernel_surgery.models.architectures import decoder_layers, parse_layers
from kernel_surgery.models.body import refuse_offloaded
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.padding import token_batches
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.problems.generator import Problem, problems
from kernel_surgery.subspace.activations import Activations
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.subspace.moments import LanguageMoments, Moments
from kernel_surgery.subspace.partial import Partial
from kernel_surgery.subspace.reading import reading, sites_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pool_states(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Pool to one vector per prompt: [batch, tokens, d_model] to [batch, d_model] float32.

    mask: [batch, tokens], 1 for tokens and 0 for padding on either side.
    pool: "last" is the last token that is not padding. "mean" is the mean over those tokens, in float32.
    """
    if pool == "last":
        tokens = torch.arange(mask.shape[1], device=mask.device)
        last = (tokens * mask).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), last].float()
    kept = mask.unsqueeze(-1).float()
    # Padding is replaced, not multiplied by zero: an Inf in the padding would become NaN.
    return torch.where(kept > 0, states.float(), 0.0).sum(1) / kept.sum(1)


def prompt_states(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    layers: Sequence[int],
    *,
    site: str = "mlp_out",
    pool: str = "last",
    batch_tokens: int = BATCH_TOKENS,
    desc: str = "collect",
    partial: Partial | None = None,
    settings: Mapping[str, Any] | None = None,
    chat: Chat = OFF,
) -> dict[int, Tensor]:
    """Return one activation per prompt and layer: {layer: [prompts, d_model] float32 on the CPU}, in prompt order.

    Prompts are batched by length (`models.padding.token_batches`). Only the layers up to the last one asked run.
    Positions are counted from the mask, so padding on either side changes neither the rotary positions nor the token
    that is read.

    partial: where finished batches are kept, and taken from; several processes may share it. settings: what else
    identifies the collection there.
    chat: how the prompts are put to the model.

    Raises SubspaceError for an unknown site or pool and a budget below 1, ModelError for an unknown architecture or
    layer, UserError if `partial` is of another collection, and RuntimeError if a layer did not run.
    """
    if pool not in POOLS:
        raise SubspaceError(f"unknown pooling {pool!r}; known: {', '.join(POOLS)}")
    encoded, batches = encode(tokenizer, prompts, batch_tokens, [chat])
    rows = {layer: torch.empty(len(prompts), model.config.get_text_config().hidden_size) for layer in sorted(layers)}
    batch: list[int] = []  # the one that runs

    def take(layer: int, states: Tensor, mask: Tensor) -> None:
        rows[layer][batch] = pool_states(states, mask, pool).cpu()

    ranks = ALONE if partial is None else partial.ranks
    mine = ranks.share(batches)

    def put(batches: Sequence[list[int]], kept: Iterator[Tensor]) -> None:
        for batch, vectors in zip(batches, kept, strict=False):
            for layer, found in zip(rows, vectors, strict=True):
                rows[layer][batch] = found

    with reading(model, tokenizer, layers, site, take) as read:
        done = 0
        if partial is not None:
            done = partial.begin({**(settings or {}), "prompts": digest(encoded)}, len(mine))
            put(mine, partial.vectors(done))
        for number, batch in in_order(encoded, mine, done, desc):
            read([encoded[i] for i in batch])
            if partial is not None:
                partial.add_vectors(number, torch.stack([x[batch] for x in rows.values()]))
    if partial is not None and ranks.size > 1:
        ranks.wait()
        for rank in range(ranks.size):
            theirs = ranks.share(batches, rank)
            put(theirs, partial.vectors(len(theirs), rank))
    return rows


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], batch_tokens: int, forms: Sequence[Chat] = (OFF,)
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of every prompt in each form, one form after the other, and the batches as indices.

    Raises SubspaceError for a budget below 1.
    """
    if batch_tokens < 1:
        raise SubspaceError(f"a batch needs at least 1 token, got {batch_tokens}.")
    encoded = [chat.ids(tokenizer, prompt) for chat in forms for prompt in prompts]
    return encoded, token_batches([len(ids) for ids in encoded], batch_tokens)


def in_forms(chat: Chat) -> dict[str, str]:
    """Return what a record of moments says of the forms of a prompt; nothing if there is one."""
    return {"forms": "chat and plain"} if len(chat.forms) > 1 else {}


def digest(encoded: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of token ids."""
    return hashlib.sha256(json.dumps(encoded).encode()).hexdigest()


def in_order(
    encoded: Sequence[Sequence[int]], batches: Sequence[list[int]], start: int, desc: str
) -> Iterator[tuple[int, list[int]]]:
    """Yield (number, batch) from batch `start` on, with a bar.

    It counts tokens, padding included: that is what the time of a batch depends on.
    """
    sizes = [len(batch) * len(encoded[batch[0]]) for batch in batches]
    with progress_bar(sum(sizes), desc, unit="token", unit_scale=True, initial=sum(sizes[:start]), leave=False) as bar:
        for number in range(start, len(batches)):
            yield number, batches[number]
            bar.update(sizes[number])


def collect_languages(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem],
    languages: Sequence[str],
    layers: Sequence[int],
    **options: Any,
) -> dict[str, dict[int, Tensor]]:
    """Return {language: {layer: [problems, d_model]}}. Row i is the same problem in every language.

    options: of `prompt_states`. Prompts of all languages are batched together, so batches hold little padding.
    """
    prompts = [problem.prompts[language] for language in languages for problem in chosen]
    states = prompt_states(model, tokenizer, prompts, layers, **options)
    vectors: dict[str, dict[int, Tensor]] = {language: {} for language in languages}
    for layer in list(states):
        # Copies: tensors of a file may not share memory. One layer at a time, so that little is held twice.
        for language, x in zip(languages, states.pop(layer).split(len(chosen)), strict=True):
            vectors[language][layer] = x.clone()
    return vectors


# What a fit's record takes from the provenance of its activations, beside what `fit_subspace` takes.
_ASKED = (*Chat(True).record(), "forms", "problems_file", "problems_sha256")
# Of the provenance, in the order in which it is written.
_FIELDS = (
    *("model_id", "revision", "n_layers", "d_model", "fingerprint", "site", "pool", "first_token", "tokens"),
    *("languages", "split", "problems", "seed", *_ASKED, "dtype", "environment"),
)


@dataclass(frozen=True)
class Collection:
    """What is collected: problems in languages, at the layers of a model, and what the record says of them."""

    chosen: Sequence[Problem]
    languages: Sequence[str]
    layers: Sequence[int]
    record: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: "PreTrainedModel",
        chosen: Sequence[Problem] | None,
        languages: Sequence[str],
        layers: str,
        about: dict[str, Any] | None,
        chat: Chat,
        **more: Any,
    ) -> "Collection":
        """Check what `collect_activations` and `collect_moments` are given. more: further fields of the record."""
        if len(languages) < 2:
            named = ", ".join(languages) or "none"
            raise SubspaceError(f"a language subspace needs at least two languages, got {named}.")
        if chosen is None:
            chosen, about = problems("fit", 40), {"split": "fit", "seed": 0} | (about or {})
        refuse_offloaded(model)
        n_layers = len(decoder_layers(model))
        record = (about or {}) | {
            "revision": getattr(model.config, "_commit_hash", None),
            "n_layers": n_layers,
            "d_model": model.config.get_text_config().hidden_size,
            "fingerprint": fingerprint(model),
            "languages": list(languages),
            "problems": len(chosen),
            **chat.record(),
            "dtype": name_of(model.dtype),
            "environment": environment_record(model.device),
        }
        indices = range(n_layers) if layers == "all" else parse_layers(layers, n_layers)
        return cls(chosen, languages, indices, record | more)

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return the record, in the order of its fields. more: what is known only now."""
        record = self.record | more
        return {name: record[name] for name in _FIELDS if name in record}

    def settings(self, batch_tokens: int) -> dict[str, Any]:
        """Return what an unfinished collection must share to be continued as this one.

        Not the platform: it names the kernel, which an update changes.
        """
        environment = {k: v for k, v in self.record["environment"].items() if k != "platform"}
        more = {"layers": list(self.layers), "batch_tokens": batch_tokens, "environment": environment}
        return self.provenance() | more


def collect_activations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem] | None = None,
    languages: Sequence[str] = LANGUAGES,
    layers: str = "all",
    *,
    site: str = "mlp_out",
    pool: str = "last",
    batch_tokens: int = BATCH_TOKENS,
    about: dict[str, Any] | None = None,
    partial: Partial | None = None,
    chat: Chat = OFF,
) -> Activations:
    """Read the activations of a loaded model for the same problems in several languages.

    chosen: the problems (default: the fit split, 40 per category).
    languages: at least two, such as ("en", "sw") (default: all seven).
    layers: such as "9-26" or "2,3,5-7", or "all".
    site: "mlp_out" (the MLP block's output, which is edited) or "resid_post" (the residual stream after the layer).
    pool: "last" (the last prompt token) or "mean" (the mean over the prompt). `collect_moments` takes all tokens.
    batch_tokens: the most tokens in one forward pass, padding included. A longer prompt is run alone.
    about: fields to add to the provenance: "model_id", "split", "seed".
    partial: where finished batches are kept (`subspace.partial.resuming`); a killed collection goes on from there.
    chat: how the prompts are put to the model (`models.chat.choose_chat`; default: as they are).

    Returns `Activations`: one float32 vector [d_model] on the CPU per problem, language and layer. `fit_subspace` takes
    them, and `Activations.save` writes them. Raises ModelError for a model or layers that are not known and for weights
    that are not in memory, SubspaceError for an unknown site or pool, a budget below 1, or for one language alone, and
    UserError if `partial` is of another collection.
    """
    what = Collection.of(model, chosen, languages, layers, about, chat, site=site, pool=pool)
    options: dict[str, Any] = {"site": site, "pool": pool, "batch_tokens": batch_tokens, "partial": partial}
    options |= {"chat": chat, "settings": what.settings(batch_tokens) if partial is not None else None}
    vectors = collect_languages(model, tokenizer, what.chosen, languages, what.layers, **options)
    return Activations(vectors, what.provenance())


def collect_moments(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem] | None = None,
    languages: Sequence[str] = LANGUAGES,
    layers: str = "all",
    *,
    site: str = "mlp_out",
    keep_first: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    about: dict[str, Any] | None = None,
    partial: Partial | None = None,
    chat: Chat = OFF,
) -> LanguageMoments:
    """Read the moments of a loaded model's activations over all prompt tokens, by language. No activation is kept.

    chat: how the prompts are put to the model. In a chat, each is read twice: in the template, and as it is.
    keep_first: count the first token of every prompt too. By default it is left out: models use it as an attention
    sink, and its activations are unlike the others' (10 times the squared norm in SmolLM2-135M after layer 8; from
    layer 9 on, some other tokens are as large). Padding is never counted.

    The other arguments are those of `collect_activations`.

    Returns `LanguageMoments`: float64 on the CPU, [d_model, d_model] per layer. `fit_subspace` takes them. The
    provenance has "tokens", {language: how many}, and "first_token", "left out" or "kept".

    Numerics: float64 products and sums, of activations in the model's dtype. An entry of n tokens is off by at most
    n 2^-53 sum |x_i x_j|. The order of the sums depends on the prompts, `batch_tokens` and the number of processes that
    share `partial` alone.

    Raises what `collect_activations` raises, and SubspaceError for a language whose prompts have no token to count and
    for activations that are not finite.
    """
    more: dict[str, Any] = {"first_token": "kept" if keep_first else "left out"} | in_forms(chat)
    what = Collection.of(model, chosen, languages, layers, about, chat, site=site, pool=TOKENS, **more)
    prompts = [problem.prompts[language] for language in languages for problem in what.chosen]
    encoded, batches = encode(tokenizer, prompts, batch_tokens, chat.forms)
    language_of = torch.arange(len(languages)).repeat_interleave(len(what.chosen)).repeat(len(chat.forms))
    tokens = dict.fromkeys(languages, 0)
    for ids, language in zip(encoded, language_of.tolist(), strict=True):
        tokens[languages[language]] += len(ids) - (not keep_first)
    if empty := [language for language, count in tokens.items() if count < 1]:
        raise SubspaceError(f"the prompts in {empty[0]} have no token but the first, which is left out: keep it.")
    batch: list[int] = []  # the one that runs

    def take(layer: int, states: Tensor, mask: Tensor) -> None:
        counted = mask.bool() if keep_first else (mask * mask.cumsum(-1)) > 1
        labels = language_of[batch].to(mask.device)[:, None].expand_as(mask)
        found[layer].add(states[counted], labels[counted])

    d, done = what.record["d_model"], 0
    places = {layer: next(at.module.parameters()).device for layer, at in sites_at(model, what.layers, site).items()}
    found = {layer: Moments.empty(len(languages), d, place) for layer, place in places.items()}
    ranks = ALONE if partial is None else partial.ranks
    mine = ranks.share(batches)
    with reading(model, tokenizer, what.layers, site, take) as read:
        if partial is not None:
            done = partial.begin(what.settings(batch_tokens) | {"prompts": digest(encoded)}, len(mine))
            if done:
                partial.load_moments(found)
        for number, batch in in_order(encoded, mine, done, "collect"):
            read([encoded[i] for i in batch])
            if partial is not None:
                partial.add_moments(number + 1, found)
    if partial is not None and ranks.size > 1:
        partial.add_moments(len(mine), found, last=True)
        partial.sum_moments(found)
    if broken := [layer for layer, moments in found.items() if not bool(torch.isfinite(moments.second).all())]:
        raise SubspaceError(f"the activations of layer {broken[0]} hold NaN or Inf. Collect in float32 or bfloat16.")
    on_cpu = {layer: Moments(m.counts.cpu(), m.sums.cpu(), m.second.cpu()) for layer, m in found.items()}
    environment = what.record["environment"] | ranks.record()  # the bits of the sums depend on it
    return LanguageMoments(on_cpu, what.provenance(tokens=tokens, environment=environment))
