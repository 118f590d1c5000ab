"""Run a benchmark without a GPU, up to its first use of one: python -m bench.dry MODULE [options]

    python -m bench.dry bench.op --device cuda --rounds 12

The module is run with its real options on a machine that seems to have one CUDA device. What comes before that device
is first used really runs: imports, options, models that are made on the CPU. The first use ends the run, and is
success. Any other end is an error: an option that does not exist, an import that fails, or a run that needs no GPU.

What would come after the first use is not run. But every import of ours that stands anywhere in the module, also
inside its functions, is made.
"""

import ast
import importlib
import inspect
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError

OURS = ("bench", "kernel_surgery")
ROOT = Path(__file__).resolve().parent.parent


class Reached(BaseException):
    """The GPU is used for the first time. Not an Exception, which a benchmark may catch and go on."""


def _reach(*args: object, **kwargs: object) -> None:
    raise Reached


@contextmanager
def seeming_gpu(module: ModuleType) -> Iterator[None]:
    """Let this process seem to have one CUDA device, and vLLM. Their first use by `module` raises Reached."""
    name = {"return_value": "a GPU that is not there"}
    with ExitStack() as stack:
        for target, more in {
            "torch.cuda.is_available": {"return_value": True},
            "torch.cuda.device_count": {"return_value": 1},
            "torch.cuda.get_device_name": name,
            "torch.cuda._lazy_init": {"side_effect": _reach},  # torch calls it before anything is done on the device
            "bench.timing.copy_bandwidth": {"return_value": 1.0},  # measured first, before any input is made
            "bench.tune.warm_all": {"return_value": []},  # processes that compile on the GPU
            "bench.per_request.lacking": {"return_value": None},
            "kernel_surgery.engines.offline.require_vllm": name,
            "kernel_surgery.engines.offline.started": {"side_effect": _reach},
        }.items():
            stack.enter_context(patch(target, **more))
        if hasattr(module, "copy_bandwidth"):  # imported by name
            stack.enter_context(patch.object(module, "copy_bandwidth", return_value=1.0))
        yield


def imported(module: ModuleType) -> None:
    """Make every import of ours in a module, also those inside functions. Raises what they raise."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            found = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(found, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in OURS:
                    importlib.import_module(alias.name)


def reach(name: str, words: list[str]) -> str:
    """Run a module's `run(words)` up to the first use of the GPU. Return where that was, as FILE:LINE.

    Raises what the module raises, and UserError if it ends without a use.
    """
    module = importlib.import_module(name)
    imported(module)
    with seeming_gpu(module):
        try:
            status = module.run(words)
        except Reached as reached:
            frames = [Path(frame.filename) for frame in traceback.extract_tb(reached.__traceback__)]
            lines = [frame.lineno for frame in traceback.extract_tb(reached.__traceback__)]
            ours = [i for i, file in enumerate(frames) if ROOT in file.parents and file != Path(__file__)]
            return f"{frames[ours[-1]].relative_to(ROOT)}:{lines[ours[-1]]}"
    raise UserError(f"{name} ended with status {status} and did not use the GPU.")


def parser() -> Parser:
    """The command line. The words after the module go to it."""
    p = bench_parser("dry", "Run a benchmark up to its first use of a GPU.")
    p.add_argument("module", help="such as bench.op")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print where the module would use the GPU first."""
    import sys

    words = sys.argv[1:] if argv is None else argv
    name = parser().parse_args(words[:1]).module
    print(f"{name}: up to the first use of the GPU, in {reach(name, words[1:])}")
    return 0


if __name__ == "__main__":
    main(run)
