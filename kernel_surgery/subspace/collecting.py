"""Read a model's activations for the same problems in several languages."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import LANGUAGES, POOLS, SITES
from kernel_surgery.common.progress import progress
from kernel_surgery.models.architectures import Site, decoder_layers, mlp_outputs, parse_layers, residual_outputs
from kernel_surgery.models.padding import padded, padding_id
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.problems.generator import Problem, problems
from kernel_surgery.subspace.activations import Activations
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pool_states(states: torch.Tensor, mask: torch.Tensor, pool: str) -> torch.Tensor:
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
    batch_size: int = 32,
    desc: str = "collect",
) -> dict[int, torch.Tensor]:
    """Return one activation per prompt and layer: {layer: [prompts, d_model] float32 on the CPU}, in prompt order.

    Prompts are batched by length. Positions are counted from the mask, so padding on either side changes neither the
    rotary positions nor the token that is read.

    Raises SubspaceError for an unknown site or pool, ModelError for an unknown architecture or layer, and RuntimeError
    if a layer did not run.
    """
    if site not in SITES:
        raise SubspaceError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    if pool not in POOLS:
        raise SubspaceError(f"unknown pooling {pool!r}; known: {', '.join(POOLS)}")
    sites: Mapping[int, Site[nn.Module]]
    sites = mlp_outputs(model, layers) if site == "mlp_out" else residual_outputs(model, layers)
    caught: dict[int, torch.Tensor] = {}
    mask = torch.empty(0)  # of the batch that runs

    def catch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            caught[layer] = pool_states(states, mask, pool).cpu()

        return hook

    # Longest first: if memory runs out, it does so in the first batch.
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    order, pad = sorted(range(len(prompts)), key=lambda i: -len(encoded[i])), padding_id(model, tokenizer)
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in sites}
    handles = [found.module.register_forward_hook(catch(layer)) for layer, found in sites.items()]
    try:
        starts = range(0, len(order), batch_size)
        for start in progress(starts, total=len(starts), desc=desc):
            batch = [encoded[i] for i in order[start : start + batch_size]]
            ids, mask = padded(batch, pad, tokenizer.padding_side, model.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            caught.clear()
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            if silent := [layer for layer in sites if layer not in caught]:
                raise RuntimeError(f"layers {silent} did not run: nothing was read there, nothing was written")
            for layer, vectors in caught.items():
                rows[layer].append(vectors)
    finally:
        for handle in handles:
            handle.remove()
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return {layer: torch.cat(parts)[back] for layer, parts in rows.items()}


def collect_languages(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem],
    languages: Sequence[str],
    layers: Sequence[int],
    **options: Any,
) -> dict[str, dict[int, torch.Tensor]]:
    """Return {language: {layer: [problems, d_model]}}. Row i is the same problem in every language."""
    return {
        language: prompt_states(
            model, tokenizer, [p.prompts[language] for p in chosen], layers, desc=f"collect {language}", **options
        )
        for language in languages
    }


# Of the provenance, in the order in which it is written.
_FIELDS = (
    *("model_id", "revision", "n_layers", "d_model", "fingerprint", "site", "pool"),
    *("languages", "split", "problems", "seed", "dtype", "environment"),
)


def collect_activations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem] | None = None,
    languages: Sequence[str] = LANGUAGES,
    layers: str = "all",
    *,
    site: str = "mlp_out",
    pool: str = "last",
    batch_size: int = 32,
    about: dict[str, Any] | None = None,
) -> Activations:
    """Read the activations of a loaded model for the same problems in several languages.

    chosen: the problems (default: the fit split, 40 per category).
    languages: at least two, such as ("en", "sw") (default: all seven).
    layers: such as "9-26" or "2,3,5-7", or "all".
    site: "mlp_out" (the output of `down_proj`, which is edited) or "resid_post" (the residual stream after the layer).
    pool: "last" (the last prompt token) or "mean" (the mean over the prompt).
    batch_size: prompts in one forward pass.
    about: fields to add to the provenance: "model_id", "split", "seed".

    Returns `Activations`: one float32 vector [d_model] on the CPU per problem, language and layer. `fit_subspace` takes
    them, and `Activations.save` writes them. Raises ModelError for a model or layers that are not known, SubspaceError
    for an unknown site or pool, or for one language alone.
    """
    if len(languages) < 2:
        raise SubspaceError(f"a language subspace needs at least two languages, got {', '.join(languages) or 'none'}.")
    if chosen is None:
        chosen, about = problems("fit", 40), {"split": "fit", "seed": 0} | (about or {})
    n_layers = len(decoder_layers(model))
    indices = range(n_layers) if layers == "all" else parse_layers(layers, n_layers)
    options: dict[str, Any] = {"site": site, "pool": pool, "batch_size": batch_size}
    vectors = collect_languages(model, tokenizer, chosen, languages, indices, **options)
    record = (about or {}) | {
        "revision": getattr(model.config, "_commit_hash", None),
        "n_layers": n_layers,
        "d_model": model.config.hidden_size,
        "fingerprint": fingerprint(model),
        "site": site,
        "pool": pool,
        "languages": list(languages),
        "problems": len(chosen),
        "dtype": name_of(model.dtype),
        "environment": environment_record(model.device),
    }
    return Activations(vectors, {name: record[name] for name in _FIELDS if name in record})
