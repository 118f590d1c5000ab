"""Every benchmark by name: python -m bench [NAME [options]]

Without a name the list; with one the same as `python -m bench.NAME`.
"""

import importlib
import sys

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError

# name: (what it shows, about how long on two CPU cores, where its figures are kept)
BENCHES = {
    "opcount": ("operations, products, allocations and bytes of every way to make the edit", "10 s", "opcount.json"),
    "op": ("the operators against eager, addmm, torch.compile and a copy", "1 min", "op.json"),
    "model": (
        "a layer, a stack of layers or a whole model, prefill and decode, every provider",
        "4 min",
        "model-*.json",
    ),
    "fit": ("fitting 36 layers against numpy's full SVD and top-k solvers", "2 min", "fit.json"),
    "evaluation": ("the batched evaluation against one prompt at a time", "10 min", "evaluation.json"),
    "checkpoint": (
        "baking 6 GB against cp and sha256sum, a dense P @ W and PEFT's merge",
        "4 min",
        "checkpoint-*.json",
    ),
    "growth": ("time and memory as tokens, width, rank, layers, problems or files grow", "2 min", "growth.json"),
    "tune": ("launch options of the kernels, tried one by one", "4 min, needs CUDA", "DATE-DEVICE/tune.json"),
    "smoke": ("every kernel once, for compute-sanitizer or ncu", "needs CUDA", "-"),
    "gpu": ("everything that needs a CUDA GPU, in under nine minutes", "-", "DATE-DEVICE/"),
    "pages": ("the tables of README.md and docs/ and the plots, from the kept figures alone", "20 s", "-"),
}


def listing() -> str:
    """The list."""
    lines = ["python -m bench NAME [options], --help for them. Figures are kept under bench/results/.", ""]
    return "\n".join(lines + [f"  {name:<11} {what} ({took}; {file})" for name, (what, took, file) in BENCHES.items()])


def parser() -> Parser:
    """The command line; what follows the name is the benchmark's own."""
    p = bench_parser("", "Run a benchmark by its name, or list them.", add_help=False)
    p.add_argument("name", nargs="?")
    return p


def run(argv: list[str] | None = None) -> int | None:
    """Run the benchmark that the first word names, with the other words; or list them."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = parser().parse_args(words[:1]).name
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(BENCHES)}. Nothing was run.")
    return importlib.import_module(f"bench.{name}").run(words[1:])


if __name__ == "__main__":
    main(run)
