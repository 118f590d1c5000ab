"""Activations of the same problems in several languages: python -m kernel_surgery.collect --model M --out FILE

Every problem of a split is put to the model in every language, as a raw prompt. At each layer one vector a prompt is
kept, in float32: what the MLP adds to the residual stream (`mlp_out`, the space that the surgery edits) or the
residual stream after the layer (`resid_post`, what the reference script used); at the last prompt token or as the
mean over the prompt's tokens. Padding is never read, on whichever side it is.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli
from kernel_surgery.problems import SPLITS, problems

if TYPE_CHECKING:
    import torch

SITES = ("mlp_out", "resid_post")
POOLS = ("last", "mean")
FORMAT = "kernel-surgery-activations-1"


@dataclass(frozen=True)
class Activations:
    """`vectors[language][layer]` is [problems, d_model] float32; row i is the same problem in every language."""

    vectors: dict[str, dict[int, "torch.Tensor"]]
    provenance: dict

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.vectors)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(next(iter(self.vectors.values()))))

    def save(self, path: str | os.PathLike) -> None:
        """One safetensors file, `{lang}_L{layer}` as the reference script names them; complete or not there."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{lang}_L{i}": t.contiguous() for lang, by in self.vectors.items() for i, t in by.items()}
        metadata = {"provenance": json.dumps({"format": FORMAT} | self.provenance, ensure_ascii=False)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def pool_states(states: "torch.Tensor", mask: "torch.Tensor", pool: str) -> "torch.Tensor":
    """One vector a prompt: [batch, tokens, d_model] and a 0/1 mask [batch, tokens] to [batch, d_model] float32.

    "last" is the last position the mask keeps, wherever the padding is; "mean" averages the kept ones in float32.
    """
    import torch

    if pool == "last":
        tokens = torch.arange(mask.shape[1], device=mask.device)
        last = (tokens * mask).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), last].float()
    kept = mask.unsqueeze(-1).float()
    # Masked positions are selected away, not multiplied by zero: an Inf in the padding must not become NaN.
    return torch.where(kept > 0, states.float(), 0.0).sum(1) / kept.sum(1)


def collect(
    model,
    tokenizer,
    prompts: Sequence[str],
    layers: Sequence[int],
    *,
    site: str = "mlp_out",
    pool: str = "last",
    batch_size: int = 32,
    desc: str = "collect",
) -> dict[int, "torch.Tensor"]:
    """One activation a prompt and layer: {layer: [prompts, d_model] float32 on the CPU}, in the order of `prompts`.

    Prompts are batched by length; positions are counted from the mask, so that padding on either side changes neither
    rotary positions nor what is read. Raises ValueError for an unknown site or pool and what `sites` raises for a
    model or layer it does not know; RuntimeError if a requested layer did not run.
    """
    import torch

    from kernel_surgery.sites import mlp_outputs, residual_outputs

    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    if pool not in POOLS:
        raise ValueError(f"unknown pooling {pool!r}; known: {', '.join(POOLS)}")
    sites = (mlp_outputs if site == "mlp_out" else residual_outputs)(model, layers)
    caught: dict[int, torch.Tensor] = {}
    mask = None

    def catch(layer: int):
        def hook(module, inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            caught[layer] = pool_states(states, mask, pool).cpu()

        return hook

    # Longest first: if memory runs out, it does so in the first batch.
    order = sorted(range(len(prompts)), key=lambda i: -len(tokenizer(prompts[i]).input_ids))
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in sites}
    handles = [found.module.register_forward_hook(catch(layer)) for layer, found in sites.items()]
    try:
        starts = range(0, len(order), batch_size)
        for start in cli.progress(starts, total=len(starts), desc=desc):
            texts = [prompts[i] for i in order[start : start + batch_size]]
            batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
            mask = batch["attention_mask"]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            caught.clear()
            with torch.no_grad():
                model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False)
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
    model, tokenizer, chosen: list, languages: Sequence[str], layers: Sequence[int], **options
) -> dict[str, dict[int, "torch.Tensor"]]:
    """`collect` for each language: {language: {layer: [problems, d_model]}}, row i the same problem in each."""
    return {
        language: collect(
            model, tokenizer, [p.prompts[language] for p in chosen], layers, desc=f"collect {language}", **options
        )
        for language in languages
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Measure activations of the same problems in several languages.")
    p.add_argument("--model", default="polyglot", help='"polyglot" (default), a folder, or a hub id')
    p.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    p.add_argument("--site", choices=SITES, default="mlp_out", help="where to read (default: where the edit is made)")
    p.add_argument("--pool", choices=POOLS, default="last", help="last prompt token (default) or mean over the prompt")
    p.add_argument("--languages", default="all", help="comma-separated, or all seven (default)")
    p.add_argument("--layers", default="all", help='such as "9-26" or "2,3,5-7" (default: all)')
    p.add_argument("--split", choices=SPLITS, default="fit", help="which problems (default: fit)")
    p.add_argument("--problems", type=int, default=40, help="problems per category (default 40: 200 in all)")
    p.add_argument("--seed", type=int, default=0, help="which problems of the split are drawn")
    p.add_argument("--dtype", default="auto", choices=("auto", *cli.DTYPES))
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, default=32)
    return p


def run(argv: list[str] | None = None) -> int:
    """Collect and save."""
    args = parser().parse_args(argv)
    languages = cli.parse_languages(args.languages)
    if len(languages) < 2:
        raise cli.UserError("a language subspace needs at least two languages; --languages names one.")
    if args.batch_size < 1:
        raise cli.UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    chosen = problems(args.split, args.problems, seed=args.seed)
    source = cli.resolve_model(args.model)
    device = cli.parse_device(args.device)
    dtype = cli.parse_dtype(args.dtype, device)

    from kernel_surgery.sites import decoder_layers, parse_layers
    from kernel_surgery.subspace import fingerprint

    tokenizer = cli.load_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = cli.load_model(source, dtype, device)
    n_layers = len(decoder_layers(model))
    layers = range(n_layers) if args.layers == "all" else parse_layers(args.layers, n_layers)
    vectors = collect_languages(
        model,
        tokenizer,
        chosen,
        languages,
        layers,
        site=args.site,
        pool=args.pool,
        batch_size=args.batch_size,
    )
    provenance = {
        "model_id": args.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "n_layers": n_layers,
        "d_model": model.config.hidden_size,
        "fingerprint": fingerprint(model),
        "site": args.site,
        "pool": args.pool,
        "languages": list(languages),
        "split": args.split,
        "problems": len(chosen),
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": cli.environment(device),
    }
    Activations(vectors, provenance).save(args.out)
    d_model, size = model.config.hidden_size, args.out.stat().st_size / 1e6
    print(
        f"{args.out}: {len(chosen)} problems x {len(languages)} languages x {len(vectors[languages[0]])} layers, "
        f"d_model {d_model}, {args.site}, {args.pool} ({size:.1f} MB)"
    )
    return 0


if __name__ == "__main__":
    cli.main(run)
