"""Command: measure activations of the same problems in several languages.

    python -m kernel_surgery.collect --model M --out FILE

The model reads every problem of a split in every language, as a raw prompt. Each layer gives one float32 vector per
prompt. `--site` says where it is read. `mlp_out` is what the MLP adds to the residual stream; the edit is made there.
`resid_post` is the residual stream after the layer; the reference script that this project began with used it. `--pool`
takes the last prompt token, or the mean over the prompt's tokens. Padding is never read, on either side.
"""

import argparse
from pathlib import Path
from typing import Any

from kernel_surgery.common.command import Parser, add_overwrite, main, untouched
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import DTYPES, LANGUAGES, POOLS, SITES, SPLITS


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("collect", description="Measure activations of the same problems in several languages.")
    more = '"polyglot" (the embedded model, default), a folder, or a Hugging Face id'
    p.add_argument("--model", default="polyglot", help=more)
    p.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    more = "where to read: the MLP's output, which is edited (default), or the residual stream after the layer"
    p.add_argument("--site", choices=SITES, default="mlp_out", help=more)
    p.add_argument("--pool", choices=POOLS, default="last", help="last prompt token (default) or mean over the prompt")
    more = f"comma-separated, or all: {','.join(LANGUAGES)} (default: all)"
    p.add_argument("--languages", default="all", help=more)
    p.add_argument("--layers", default="all", help='such as "9-26" or "2,3,5-7" (default: all)')
    p.add_argument("--split", choices=SPLITS, default="fit", help="which problems (default: fit); eval uses test")
    p.add_argument("--problems", type=int, default=40, help="problems in each of five categories (default 40)")
    p.add_argument("--seed", type=int, default=0, help="selects the problems from the split (default 0)")
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    p.add_argument("--batch-size", type=int, default=32, help="prompts in one forward pass (default 32)")
    add_overwrite(p)
    return p


@untouched("No file was written.")
def run(argv: list[str] | None = None) -> int:
    """Collect the activations and save them. Return 0. Raises UserError for options that cannot be used."""
    args = parser().parse_args(argv)

    from kernel_surgery.models.architectures import parse_layers
    from kernel_surgery.models.before import load_checked
    from kernel_surgery.models.load import parse_device, parse_dtype, public_name
    from kernel_surgery.models.threads import choose_threads
    from kernel_surgery.problems.generator import parse_languages, problems
    from kernel_surgery.subspace.collecting import collect_activations

    languages = parse_languages(args.languages)
    if len(languages) < 2:
        raise UserError("a language subspace needs at least two languages; --languages names one.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}.")
    chosen_problems = problems(args.split, args.problems, seed=args.seed)
    check_output(args.out, overwrite=args.overwrite)
    device = parse_device(args.device)
    choose_threads(args.model)

    def check(source: Path, config: dict[str, Any]) -> None:
        n_layers = config["num_hidden_layers"]
        layers = range(n_layers) if args.layers == "all" else parse_layers(args.layers, n_layers)
        size = 4 * config["hidden_size"] * len(layers) * len(prompts)
        check_output(args.out, size=size, overwrite=args.overwrite)

    prompts = [problem.prompts[language] for problem in chosen_problems for language in languages]
    where = parse_dtype(args.dtype, device), device
    model, tokenizer = load_checked(args.model, where, prompts, 0, check)
    activations = collect_activations(
        model,
        tokenizer,
        chosen_problems,
        languages,
        args.layers,
        site=args.site,
        pool=args.pool,
        batch_size=args.batch_size,
        about={"model_id": public_name(args.model), "split": args.split, "seed": args.seed},
    )
    activations.save(args.out)
    size = args.out.stat().st_size / 1e6
    print(
        f"{args.out}: {len(chosen_problems)} problems x {len(languages)} languages x {len(activations.layers)} layers, "
        f"d_model {activations.provenance['d_model']}, site {args.site}, pool {args.pool} ({size:.1f} MB)"
    )
    return 0


if __name__ == "__main__":
    main(run)
