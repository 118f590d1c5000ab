"""Every benchmark by name: python -m bench [NAME [options]]

Without a name it prints the list. With a name it does the same as `python -m bench.NAME`.
"""

import importlib
import sys

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError

# {name: (what it measures, about how long it takes on two CPU cores, the file of its figures)}
BENCHES = {
    "opcount": ("operations, matrix products, allocations and bytes of every method", "5 min", "opcount.json"),
    "op": ("the operators, beside eager code, addmm, torch.compile and a copy", "1 min", "op.json"),
    "model": (
        "a layer, a stack of layers or a whole model: prefill and decode with every method",
        "4 min",
        "model-*.json",
    ),
    "fit": ("fitting 36 layers, beside numpy's full SVD and top-k solvers", "2 min", "fit.json"),
    "collect": ("reading activations, beside the whole model; memory beside the vocabulary", "15 min", "collect.json"),
    "evaluation": ("the batched evaluation, beside a loop over single prompts", "10 min", "evaluation.json"),
    "real": ("damage and erasure of every way to fit, on SmolLM2", "1 h", "docs/real-smollm2.json"),
    "sources": ("an edit fitted on other problems, such as MGSM's", "15 min", "docs/real-sources.json"),
    "texts": ("what SmolLM2 writes before and after an edit", "5 min", "docs/real-texts.json"),
    "checkpoint": (
        "baking 6 GB, beside cp with SHA-256, a dense P @ W and PEFT's merge",
        "4 min",
        "checkpoint-*.json",
    ),
    "engines": ("vLLM with the edit in every mode, beside the original", "10 min, needs vLLM", "engines*.json"),
    "busy": ("the evaluation alone and beside busy processes", "25 min", "busy.json"),
    "growth": ("time and memory as tokens, width, rank, layers, problems or files grow", "8 min", "growth.json"),
    "cost": ("what collect, fit and eval cost for a model of any size", "3 s; --measure 2 min", "cost.json"),
    "tune": ("the kernels with other launch options, one by one", "4 min, needs CUDA", "DATE-DEVICE/tune.json"),
    "per_request": ("a strength for each request in vLLM", "needs CUDA and vLLM", "DATE-DEVICE/vllm.json"),
    "dry": ("a benchmark that needs CUDA, up to its first use of it", "10 s", "-"),
    "smoke": ("launches every kernel once, for compute-sanitizer or ncu", "needs CUDA", "-"),
    "gpu": ("everything that needs a CUDA GPU, in under nine minutes", "-", "DATE-DEVICE/"),
    "pictures": ("README.md's pictures: the report's first screen and the edit in its four places", "10 s", "-"),
    "pages": ("the measured tables of README.md and docs/ and the plots, from stored figures", "20 s", "-"),
    "site": ("the documentation as a site, with every link checked", "5 s", "site/"),
}


def listing() -> str:
    """All benchmarks as text."""
    lines = ["python -m bench NAME [options]; --help lists the options. Figures are stored in bench/results/.", ""]
    return "\n".join(lines + [f"  {name:<11} {what} ({time}; {file})" for name, (what, time, file) in BENCHES.items()])


def parser() -> Parser:
    """The command line. The words after the name go to the benchmark."""
    p = bench_parser("", "Run a benchmark by its name, or list them.", add_help=False)
    p.add_argument("name", nargs="?")
    return p


def run(argv: list[str] | None = None) -> int | None:
    """Run the benchmark that the first word names with the other words, or print the list."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = parser().parse_args(words[:1]).name
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; the benchmarks are {', '.join(BENCHES)}. Nothing was run.")
    return importlib.import_module(f"bench.{name}").run(words[1:])


if __name__ == "__main__":
    main(run)
