"""What else the edit did: to predictions on neutral text, and to what a linear probe reads of the language.

Damage is measured where nothing was asked: token by token on `neutral.SENTENCES`, KL(original || edited) in nats, and
the perplexity of both. Erasure is measured by held-out linear probes for the language, layer by layer, at the site
(the MLP's output, after the edit) and in the residual stream, which attention goes on writing to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernel_surgery.common.names import LANGUAGES, SITES
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.answering import Context
from kernel_surgery.evaluation.stats import wilson
from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.problems.generator import problems
from kernel_surgery.problems.neutral import SENTENCES
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import collect_activations

RIDGE = 1e-3  # of the probe's mean squared feature


def next_token_logits(model, tokenizer, text: str) -> tuple[Tensor, Tensor]:
    """(logits [tokens - 1, vocabulary] float32, the tokens that came [tokens - 1]) of one text, on the CPU."""
    ids = torch.tensor([tokenizer(text).input_ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
    return logits, ids[0, 1:].cpu()


def neutral_logits(model, tokenizer, languages: Sequence[str]) -> dict:
    """{language: [(logits, tokens) of each sentence]}; kept for the original, so that edits can be compared with it."""
    return {lang: [next_token_logits(model, tokenizer, s) for s in SENTENCES[lang]] for lang in languages}


def damage(model, tokenizer, before: dict) -> dict[str, dict]:
    """{language: {"tokens", "kl_mean", "kl_p99", "perplexity", "original_perplexity"}} of a model, against `before`."""
    found = {}
    for language, sentences in before.items():
        kl, losses, own = [], [], []
        for text, (logits, tokens) in zip(SENTENCES[language], sentences, strict=True):
            edited, _ = next_token_logits(model, tokenizer, text)
            p, q = logits.double().log_softmax(-1), edited.double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
            own.append(-p.gather(1, tokens[:, None])[:, 0])
            losses.append(-q.gather(1, tokens[:, None])[:, 0])
        every = torch.cat(kl)
        found[language] = {
            "tokens": len(every),
            "kl_mean": float(every.mean()),
            "kl_p99": float(every.quantile(0.99)),
            "perplexity": float(torch.cat(losses).mean().exp()),
            "original_perplexity": float(torch.cat(own).mean().exp()),
        }
    return found


def table(found: dict) -> str:
    """What the run prints: the divergence on neutral text, and what the probes still read."""
    lines = []
    for mode, by_language in found["neutral"].items():
        rows = ", ".join(f"{lang} {r['kl_mean']:.3f} ({r['kl_p99']:.2f})" for lang, r in by_language.items())
        lines.append(f"{mode}: KL(original || edited) on neutral text, nats a token, mean (p99): {rows}")
    before, chance, n = found["probes"]["original"], found["chance"], found["probed"]
    for mode, after in found["probes"].items():
        if mode == "original":
            continue
        for site in after:
            layer, least = min(after[site].items(), key=lambda item: item[1])
            words = read_by_probe(least, chance, n)
            lines.append(
                f"{mode}: a linear probe at {site} {words}: least {least:.3f} at layer {layer} (original "
                f"{before[site][layer]:.3f}, chance {chance:.3f}, n={n})"
            )
    for mode, sites in found["leak"].items():
        said = ", ".join(f"{site} {max(by.values()):.2g}" for site, by in sites.items() if by)
        lines.append(f"{mode}: leak, the part inside the subspace that is left, at most over the edited layers: {said}")
    return "\n".join(lines)


def read_by_probe(accuracy: float, chance: float, n: int) -> str:
    """The words that a probe's accuracy over n texts allows: "still reads" needs the whole Wilson interval above
    chance."""
    low, _ = wilson(round(accuracy * n), n)
    return "still reads the language" if low > chance else "is not shown to read the language"


def probe_accuracy(x: Tensor, labels: Tensor, groups: Tensor, folds: int = 5) -> float:
    """Held-out accuracy of a linear probe: ridge regression to one-hot labels, cross-validated over groups.

    x [rows, d_model], labels [rows] int, groups [rows] int: rows of one group (a problem in all its languages) are held
    out together, so that the probe never sees the problem it is asked about. float64; features are centred on the
    training rows.
    """
    x, correct = x.double(), 0
    targets = torch.nn.functional.one_hot(labels).double()
    for fold in range(folds):
        held = groups % folds == fold
        mean = x[~held].mean(0)
        train, test = x[~held] - mean, x[held] - mean
        gram = train.T @ train
        # The floor is for features that are all zero: there is nothing to read in them, and no error either.
        gram += (RIDGE * gram.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram, train.T @ (targets[~held] - targets[~held].mean(0)))
        correct += int(((test @ weights + targets[~held].mean(0)).argmax(-1) == labels[held]).sum())
    return correct / len(x)


def last_states(model, tokenizer, problems, languages: Sequence[str], batch_size: int = 32) -> dict[str, dict]:
    """{"mlp_out": {layer: [problems * languages, d_model]}, "resid_post": {...}} at the last prompt token, of the model
    as it is now: with an edit in force, "mlp_out" is read after it."""
    layers, prompts = range(len(decoder_layers(model))), [p.prompts[lang] for p in problems for lang in languages]
    return {
        site: collect_activations(
            model, tokenizer, prompts, layers, site=site, batch_size=batch_size, desc=f"probe {site}"
        )
        for site in SITES
    }


def probes(states: dict, languages: int) -> dict[str, dict[int, float]]:
    """{site: {layer: held-out accuracy}} of `last_states` in so many languages. Chance is 1 / languages."""
    found = {}
    for site, by_layer in states.items():
        problems = len(next(iter(by_layer.values()))) // languages
        labels = torch.arange(languages).repeat(problems)
        groups = torch.arange(problems).repeat_interleave(languages)
        found[site] = {layer: probe_accuracy(x, labels, groups) for layer, x in by_layer.items()}
    return found


def leaks(before: dict, after: dict, bases: dict) -> dict[str, dict[int, float]]:
    """{site: {edited layer: norm(U^T y) / norm(U^T x)}} over the rows of two `last_states`: 0 is nothing left.

    At mlp_out it is what the edit left of what that layer wrote there before; in the residual stream, what the
    subspace still holds, most of which attention and other layers wrote.
    """
    found = {}
    for site in before:
        found[site] = {}
        for layer, basis in bases.items():
            u, x, y = basis.double().cpu(), before[site][layer].double().cpu(), after[site][layer].double().cpu()
            if (inside := float((x @ u).norm())) > 0:
                found[site][layer] = float((y @ u).norm()) / inside
    return found


def measure_effects(
    context: Context, modes: Sequence[str], subspace: Subspace | None, *, strength: float, seed: int, force: bool
) -> dict:
    """Neutral text for every mode, probes for the first edited one; what results.json says of them."""
    model, tokenizer = context.model, context.tokenizer
    before, asked = neutral_logits(model, tokenizer, context.languages), problems("dev", 20, seed=seed)
    states = last_states(model, tokenizer, asked, LANGUAGES)
    found = {
        **{"neutral": {}, "leak": {}, "chance": 1 / len(LANGUAGES), "probed": len(asked) * len(LANGUAGES)},
        "probes": {"original": probes(states, len(LANGUAGES))},
    }
    for number, mode in enumerate(modes[1:]):
        with applied(mode, model, subspace, strength, force):
            found["neutral"][mode] = damage(model, tokenizer, before)
            if number == 0:
                edited = last_states(model, tokenizer, asked, LANGUAGES)
                found["probes"][mode] = probes(edited, len(LANGUAGES))
                found["leak"][mode] = leaks(states, edited, subspace.bases)
    return found
