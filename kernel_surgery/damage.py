"""What else the edit did: to predictions on neutral text, and to what a linear probe reads of the language.

Damage is measured where nothing was asked: token by token on `neutral.SENTENCES`, KL(original || edited) in nats, and
the perplexity of both. Erasure is measured by held-out linear probes for the language, layer by layer, at the site
(the MLP's output, after the edit) and in the residual stream, which attention goes on writing to.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernel_surgery.neutral import SENTENCES

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3  # of the probe's mean squared feature


def next_token_logits(model, tokenizer, text: str) -> "tuple[Tensor, Tensor]":
    """(logits [tokens - 1, vocabulary] float32, the tokens that came [tokens - 1]) of one text, on the CPU."""
    import torch

    ids = torch.tensor([tokenizer(text).input_ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
    return logits, ids[0, 1:].cpu()


def neutral_logits(model, tokenizer, languages: Sequence[str]) -> dict:
    """{language: [(logits, tokens) of each sentence]}; kept for the original, so that edits can be compared with it."""
    return {lang: [next_token_logits(model, tokenizer, s) for s in SENTENCES[lang]] for lang in languages}


def damage(model, tokenizer, before: dict) -> dict[str, dict]:
    """{language: {"tokens", "kl_mean", "kl_p99", "perplexity", "original_perplexity"}} of a model, against `before`."""
    import torch

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
    before = found["probes"]["original"]
    for mode, after in found["probes"].items():
        if mode != "original":
            worst = {site: min(after[site].items(), key=lambda item: item[1]) for site in after}
            read = ", ".join(
                f"{site} {v:.3f} at layer {i} (original {before[site][i]:.3f})" for site, (i, v) in worst.items()
            )
            lines.append(
                f"{mode}: a linear probe still reads the language, chance {found['chance']:.3f}, least in {read}"
            )
    return "\n".join(lines)


def probe_accuracy(x: "Tensor", labels: "Tensor", groups: "Tensor", folds: int = 5) -> float:
    """Held-out accuracy of a linear probe: ridge regression to one-hot labels, cross-validated over groups.

    x [rows, d_model], labels [rows] int, groups [rows] int: rows of one group (a problem in all its languages) are held
    out together, so that the probe never sees the problem it is asked about. float64; features are centred on the
    training rows.
    """
    import torch

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


def probes(model, tokenizer, problems, languages: Sequence[str], batch_size: int = 32) -> dict[str, dict[int, float]]:
    """{"mlp_out": {layer: accuracy}, "resid_post": {...}} at the last prompt token, of the model as it is now.

    Chance is 1 / len(languages). With an edit in force, "mlp_out" is read after it.
    """
    import torch

    from kernel_surgery.collect import SITES, collect
    from kernel_surgery.sites import decoder_layers

    layers = range(len(decoder_layers(model)))
    prompts = [p.prompts[lang] for p in problems for lang in languages]
    labels = torch.arange(len(languages)).repeat(len(problems))
    groups = torch.arange(len(problems)).repeat_interleave(len(languages))
    found = {}
    for site in SITES:
        states = collect(model, tokenizer, prompts, layers, site=site, batch_size=batch_size, desc=f"probe {site}")
        found[site] = {layer: probe_accuracy(x, labels, groups) for layer, x in states.items()}
    return found


def measure(modes, model, tokenizer, languages, args, subspace) -> dict:
    """Neutral text for every mode, probes for the first edited one; what results.json says of them."""
    from kernel_surgery.modes import applied
    from kernel_surgery.problems import LANGUAGES, problems

    before, asked = neutral_logits(model, tokenizer, languages), problems("dev", 20, seed=args.seed)
    found = {
        "neutral": {},
        "probes": {"original": probes(model, tokenizer, asked, LANGUAGES)},
        "chance": 1 / len(LANGUAGES),
    }
    for number, mode in enumerate(modes[1:]):
        with applied(mode, model, subspace, args.strength, args.force):
            found["neutral"][mode] = damage(model, tokenizer, before)
            if number == 0:
                found["probes"][mode] = probes(model, tokenizer, asked, LANGUAGES)
    return found
