"""Command: measure activations of the same problems in several languages.

    python -m kernel_surgery.collect --model M --out FILE

The model reads every problem of a split in every language. The file holds, for each layer, sums of x and of x x^T over
all prompt tokens (moments), of which `fit` makes the edit that does least damage. With an instruct model, moments are
taken of every prompt twice: as the user's turn of a chat and as it is (`--chat`). `--pool last` and `--pool mean` keep
a float32 vector per prompt instead: of the last prompt token, or the mean over the tokens. `fit --method deviations`
needs them. `--site` says where it is read. `mlp_out` is what the MLP adds to the residual stream; the edit is made
there. `resid_post` is the residual stream after the layer; the reference script that this project began with used it.
Padding is never read, on either side.

Finished batches are kept in the folder FILE.partial until FILE is complete. If the command is killed, the same command
goes on from there and writes the same bytes.

`--list-models` prints the model types that are known and what is edited in each.

Several processes share the batches: torchrun --nproc-per-node N -m kernel_surgery.collect ..., or accelerate launch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.command import Parser, add_chat, add_overwrite, add_problems, main, untouched
from kernel_surgery.common.ending import Following, free, next_command, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import BATCH_TOKENS, DTYPES, LANGUAGES, POOLS, SITES, SPLITS, TOKENS
from kernel_surgery.common.progress import waiting

if TYPE_CHECKING:
    from kernel_surgery.subspace.activations import Activations
    from kernel_surgery.subspace.moments import LanguageMoments


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("collect", description="Measure activations of the same problems in several languages.")
    more = '"polyglot" (the embedded model, default), a folder, or a Hugging Face id'
    p.add_argument("--model", default="polyglot", help=more)
    p.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    more = "where to read: the MLP's output, which is edited (default), or the residual stream after the layer"
    p.add_argument("--site", choices=SITES, default="mlp_out", help=more)
    more = "tokens (default): moments over all prompt tokens; last: the last one of each prompt; mean: their mean"
    p.add_argument("--pool", choices=(*POOLS, TOKENS), default=TOKENS, help=more)
    more = "with --pool tokens, count each prompt's first token too (default: it is left out as an attention sink)"
    p.add_argument("--keep-first", action="store_true", help=more)
    more = f"comma-separated, or all: {','.join(LANGUAGES)}, or what a file of --problems is in (default: all)"
    p.add_argument("--languages", default="all", help=more)
    p.add_argument("--layers", default="all", help='such as "9-26" or "2,3,5-7" (default: all)')
    p.add_argument("--split", choices=SPLITS, default="fit", help="which problems (default: fit); eval uses test")
    add_problems(p, "default 40")
    p.add_argument("--seed", type=int, default=0, help="selects the problems from the split (default 0)")
    add_chat(p)
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    more = "auto: spread the layers over all GPUs; needs accelerate"
    p.add_argument("--device-map", choices=("auto",), help=more)
    more = f"most tokens in one forward pass, padding included (default {BATCH_TOKENS}); a longer prompt runs alone"
    p.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=more)
    more = "begin again; by default, a run that was killed is continued"
    p.add_argument("--restart", action="store_true", help=more)
    add_overwrite(p)
    p.add_argument("--list-models", action=_ListModels, nargs=0, help="print the model types that are known, and stop")
    return p


class _ListModels(argparse.Action):
    """Print the table of architectures and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        from kernel_surgery.models.listing import lines

        print("\n".join(lines()))
        parser.exit()


@untouched("No file was written.")
def run(argv: list[str] | None = None) -> int:
    """Collect the activations and save them. Return 0. Raises UserError for options that cannot be used."""
    args = parser().parse_args(argv)

    with waiting("starting"):
        from kernel_surgery.common.ranks import current
        from kernel_surgery.files.problems import problem_source
        from kernel_surgery.models.architectures import parse_layers
        from kernel_surgery.models.before import load_checked
        from kernel_surgery.models.chat import choose_chat
        from kernel_surgery.models.load import parse_device, parse_dtype, public_name
        from kernel_surgery.models.threads import choose_threads
        from kernel_surgery.subspace.collecting import collect_activations, collect_moments
        from kernel_surgery.subspace.partial import check_partial, partial_folder, refuse_other_launch, resuming

    asked = problem_source(args.problems, seed=args.seed)
    languages = asked.languages(args.languages, judged=False)
    _check_options(args, languages)
    chosen = asked.split(args.split)
    check_output(args.out, overwrite=args.overwrite)
    device = parse_device(args.device)
    dtype, tokens, ranks = parse_dtype(args.dtype, device), args.pool == TOKENS, current()
    partial = partial_folder(args.out, ranks)
    about = {"model_id": public_name(args.model), "split": args.split, "seed": args.seed} | asked.record
    refuse_other_launch(args.out, ranks, restart=args.restart)
    choose_threads(args.model)
    chat = choose_chat(args.model, args.chat, thinking=args.thinking)

    def check(source: Path, config: dict[str, Any]) -> None:
        n_layers, d = config["num_hidden_layers"], config["hidden_size"]
        layers = list(range(n_layers)) if args.layers == "all" else parse_layers(args.layers, n_layers)
        # Twice: the batches and the whole, or the last moments and the new ones.
        size = 2 * len(layers) * (8 * d * d if tokens else 4 * d * len(prompts))
        check_output(args.out, size=size, overwrite=args.overwrite)
        known = {"languages": list(languages), "layers": layers, "problems": len(chosen), "site": args.site}
        known |= {"pool": args.pool, "dtype": str(dtype).removeprefix("torch."), "batch_tokens": args.batch_tokens}
        known |= chat.record()
        known |= {"first_token": "kept" if args.keep_first else "left out"} if tokens else {}
        check_partial(partial, {} if args.restart else about | known)

    prompts = [problem.prompts[language] for problem in chosen for language in languages]
    model, tokenizer = load_checked(args.model, (dtype, device), prompts, 0, check, args.device_map, chat)
    common: dict[str, Any] = {"site": args.site, "batch_tokens": args.batch_tokens, "about": about, "chat": chat}
    what = model, tokenizer, chosen, languages, args.layers
    folders = [partial_folder(args.out, ranks, rank) for rank in range(ranks.size)]
    shared: dict[str, Any] = {"restart": args.restart, "ranks": ranks, "folders": folders}

    def say(line: str) -> None:
        if ranks.first:
            print(line, file=sys.stderr)

    with resuming(partial, say=say, **shared) as kept:
        found: Activations | LanguageMoments
        if tokens:
            found = collect_moments(*what, keep_first=args.keep_first, partial=kept, **common)
        else:
            found = collect_activations(*what, pool=args.pool, partial=kept, **common)
        kept.publish(found.save, args.out)
    if not ranks.first:
        return 0
    print(_summary(found.provenance, len(found.layers)))
    if note := asked.note(args.split):
        print(note)
    wrote(args.out)
    subspace = free(args.out.with_name("subspace.safetensors"))
    next_command(Following("fit", ["--activations", args.out, "--out", subspace]))
    return 0


def _check_options(args: argparse.Namespace, languages: Sequence[str]) -> None:
    """Raise UserError for options that cannot be used, or not together."""
    if len(languages) < 2:
        raise UserError("a language subspace needs at least two languages; --languages names one.")
    if args.batch_tokens < 1:
        raise UserError(f"--batch-tokens must be at least 1, got {args.batch_tokens}.")
    if args.keep_first and args.pool != TOKENS:
        raise UserError(f"--keep-first is for --pool {TOKENS}, not {args.pool}.")
    if args.device_map and args.device != "auto":
        raise UserError(f"--device-map {args.device_map} chooses the devices itself; leave out --device {args.device}.")


def _summary(record: dict[str, Any], layers: int) -> str:
    """Return the line that says what was measured."""
    what = f"{record['problems']} problems x {len(record['languages'])} languages x {layers} layers"
    pool = f"pool {record['pool']}"
    if record["pool"] == TOKENS:
        count, first = sum(record["tokens"].values()), record["first_token"]
        pool = f"moments over {count} tokens (the first of each prompt {first})"
    return f"{what}, d_model {record['d_model']}, site {record['site']}, {pool}"


if __name__ == "__main__":
    main(run, shared=True)
