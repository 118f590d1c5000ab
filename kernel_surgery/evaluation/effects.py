"""How well a linear probe still reads the language after an edit, and how much of the subspace is left.

Probes read the language on held-out problems, layer by layer: at the site (the MLP's output, after the edit) and in the
residual stream, which attention still writes to. What the edit did to the predictions on other text is measured in
`kernel_surgery.damage`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernel_surgery.common.names import BATCH_TOKENS, LANGUAGES
from kernel_surgery.common.progress import progress
from kernel_surgery.damage.measure import measure_damage
from kernel_surgery.damage.measure import table as damage_table
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.answering import Context
from kernel_surgery.evaluation.stats import wilson
from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.problems.generator import Problem, problems
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import encode, in_order, pool_states
from kernel_surgery.subspace.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# {site: {layer: [problems * languages, d_model]}}.
States = dict[str, dict[int, Tensor]]
STREAM = "resid_post"
RIDGE = 1e-3  # in units of the probe's mean squared feature


def table(found: dict[str, Any]) -> str:
    """Return the text that a run prints: the damage, what the probes still read, and the leak."""
    lines = [damage_table(found)] if found["neutral"] else []
    for mode, by in found.get("losses", {}).items():
        for language, r in by.items():
            low, high = r["perplexity_ratio_ci95"]
            lines.append(
                f"{mode}: perplexity of {r['sentences']} neutral sentences in {language}: {r['perplexity']:.4g}, "
                f"original {r['original_perplexity']:.4g}: x{r['perplexity_ratio']:.4g} ({low:.4g} to {high:.4g})"
            )
    if "probes" not in found:
        return "\n".join(lines)
    before, chance, n = found["probes"]["original"], found["chance"], found["probed"]
    for mode, after in found["probes"].items():
        if mode == "original":
            continue
        for site in after:
            layer, least = min(reached(found, mode, after[site], site).items(), key=lambda item: item[1])
            words = read_by_probe(least, chance, n)
            lines.append(
                f"{mode}: a linear probe at {site} {words}: lowest accuracy {least:.3f}, at layer {layer} (original "
                f"{before[site][layer]:.3f}, chance {chance:.3f}, n={n})"
            )
    for mode, sites in found["leak"].items():
        largest = ", ".join(f"{site} {max(by.values()):.2g}" for site, by in sites.items() if by)
        lines.append(
            f"{mode}: leak (share of the part inside the subspace that is left), largest over the layers: {largest}"
        )
    return "\n".join(lines)


def reached(found: dict[str, Any], mode: str, by: Mapping[Any, float], site: str) -> dict[Any, float]:
    """Return the layers where an edit can change what a probe reads: at its site the edited ones, and in the residual
    stream those from the first edited one on. All, if it is not known which are edited."""
    edited = [int(layer) for by_site in found.get("leak", {}).get(mode, {}).values() for layer in by_site]
    if site != STREAM:
        own = {layer: value for layer, value in by.items() if int(layer) in edited}
    else:
        own = {layer: value for layer, value in by.items() if edited and int(layer) >= min(edited)}
    return own or dict(by)


def read_by_probe(accuracy: float, chance: float, n: int) -> str:
    """Return the words that a probe's accuracy over n texts allows.

    "still reads" needs the whole Wilson interval above chance.
    """
    low, _ = wilson(round(accuracy * n), n)
    return "still reads the language" if low > chance else "is not shown to read the language"


def probe_hits(x: Tensor, labels: Tensor, groups: Tensor, folds: int = 5) -> Tensor:
    """Return which rows a held-out linear probe reads right, [rows] bool.

    The probe is a ridge regression to one-hot labels, cross-validated over groups. x: [rows, d_model]. labels: [rows]
    int. groups: [rows] int. The rows of one group (a problem in all its languages) are held out together, so the probe
    never trains on the problem it is tested on. Features are centred on the training rows.

    Numerics: float64. The sums of each fold are taken once. Those of the training rows are what the other folds have.
    """
    x, hits = x.double(), torch.zeros(len(x), dtype=torch.bool)
    targets = torch.nn.functional.one_hot(labels).double()
    held_out = [groups % folds == fold for fold in range(folds)]
    sums = []
    for rows in held_out:
        a, b = x[rows], targets[rows]
        sums.append((a.T @ a, a.T @ b, a.sum(0), b.sum(0)))
    whole = [torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)]
    for rows, own in zip(held_out, sums, strict=True):
        squares, cross, feature, label = (every - part for every, part in zip(whole, own, strict=True))
        count = len(x) - int(rows.sum())
        mean, rate = feature / count, label / count
        gram = squares - count * torch.outer(mean, mean)
        # The lower limit keeps the system solvable if all features are zero. The probe then reads nothing.
        gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp_min(1e-30))
        weights = torch.linalg.solve(gram, cross - count * torch.outer(mean, rate))
        hits[rows] = ((x[rows] - mean) @ weights + rate).argmax(-1) == labels[rows]
    return hits


def probe_accuracy(x: Tensor, labels: Tensor, groups: Tensor, folds: int = 5) -> float:
    """Return the held-out accuracy of a linear probe (`probe_hits`)."""
    return float(probe_hits(x, labels, groups, folds).double().mean())


def last_states(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    languages: Sequence[str],
    chat: Chat = OFF,
    site: str = "mlp_out",
) -> States:
    """Return the states at the last prompt token, of the model as it is now, from one pass over the prompts.

    {site: {layer: [problems * languages, d_model]}, "resid_post": {...}}. With an edit in force at the site, it is read
    after the edit. chat: how the prompts are put to the model.
    """
    layers, prompts = range(len(decoder_layers(model))), [p.prompts[lang] for p in problems for lang in languages]
    encoded, batches = encode(tokenizer, prompts, BATCH_TOKENS, [chat])
    d = model.config.get_text_config().hidden_size
    rows = {site: {layer: torch.empty(len(prompts), d) for layer in layers} for site in (site, STREAM)}
    batch: list[int] = []  # the one that runs

    def keep(site: str, layer: int, states: Tensor, mask: Tensor) -> None:
        rows[site][layer][batch] = pool_states(states, mask, "last").cpu()

    own, stream = (partial(keep, name) for name in rows)
    with reading(model, tokenizer, layers, site, own, {STREAM: stream}) as read:
        for _, batch in in_order(encoded, batches, 0, "read for the probes"):
            read([encoded[i] for i in batch])
    return rows


def probes(states: States, languages: int) -> dict[str, dict[int, float]]:
    """Return {site: {layer: held-out probe accuracy}} for the result of `last_states`.

    languages: their number. Chance is 1 / languages.
    """
    accuracies: dict[str, dict[int, float]] = {site: {} for site in states}
    each = [(site, layer, x) for site, by_layer in states.items() for layer, x in by_layer.items()]
    for site, layer, x in progress(each, total=len(each), desc="probes"):
        problems = len(x) // languages
        labels = torch.arange(languages).repeat(problems)
        groups = torch.arange(problems).repeat_interleave(languages)
        accuracies[site][layer] = probe_accuracy(x, labels, groups)
    return accuracies


def leaks(before: States, after: States, edits: Mapping[int, Projection]) -> dict[str, dict[int, float]]:
    """Return {site: {edited layer: leak}} for two results of `last_states`.

    The leak is norm(B^T y - c) / norm(B^T x - c) over the rows; 0 means that the edit reads nothing any more. At
    the edited site it is the part of the layer's own output that the edit left. In the residual stream it is all that
    the subspace still holds, most of it written by attention and by other layers.
    """
    leak_of: dict[str, dict[int, float]] = {}
    for site in before:
        leak_of[site] = {}
        for layer, edit in edits.items():
            exact = edit.double().to("cpu")
            x, y = (exact.inside(states[site][layer].double().cpu()).norm() for states in (before, after))
            if float(x) > 0:
                leak_of[site][layer] = float(y) / float(x)
    return leak_of


def measure_effects(
    context: Context,
    modes: Sequence[str],
    subspace: Subspace | None,
    *,
    strength: float,
    seed: int,
    force: bool,
    probed: bool = True,
) -> dict[str, Any]:
    """Measure the damage of every mode, and with `probed` also probes and leak of the first edited mode.

    Returns the "damage" entry of results.json.
    """
    model, tokenizer, edited_modes = context.model, context.tokenizer, [mode for mode in modes if mode != "original"]
    effects: dict[str, Any] = {"neutral": {}}
    if subspace is not None:
        edits = (model, tokenizer, context.languages, edited_modes, subspace)
        effects = measure_damage(*edits, strength=strength, force=force, controls=probed)
    if not probed:
        return effects
    dev_problems = problems("dev", 20, seed=seed)
    site = "mlp_out" if subspace is None else subspace.edited_site
    about = model, tokenizer, dev_problems, LANGUAGES, context.chat, site
    states = last_states(*about)
    effects |= {"leak": {}, "chance": 1 / len(LANGUAGES), "probed": len(dev_problems) * len(LANGUAGES)}
    effects["probes"] = {"original": probes(states, len(LANGUAGES))}
    for mode in edited_modes[:1]:
        assert subspace is not None  # the mode edits
        with applied(mode, model, subspace, strength, force):
            edited = last_states(*about)
        effects["probes"][mode] = probes(edited, len(LANGUAGES))
        effects["leak"][mode] = leaks(states, edited, subspace.projections)
    return effects
