"""The entry point: `python -m kernel_surgery` or `kernel-surgery` lists the commands.

`kernel-surgery eval ...` runs one of them, as `python -m kernel_surgery.eval ...` does.
"""

import sys
from importlib import import_module
from typing import NoReturn

from kernel_surgery.common.command import SCRIPT, did_you_mean, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import VERSION

COMMANDS = {
    "collect": "measure activations of the same problems in several languages",
    "fit": "fit a language subspace to the collected activations",
    "bake": "write a checkpoint with the edit in its weights, or undo one",
    "lora": "write the edit as a LoRA adapter",
    "verify": "check that an edit was made exactly",
    "eval": "compare the original and the edited model on maths problems",
    "probe": "measure what is still read of the language, beside random edits",
    "compare": "read what the original and the edited model write, side by side",
    "score": "score texts that any engine generated",
    "study": "choose a setting on the dev problems, freeze it, report it on the test problems",
    "reproduce": "run everything and write one bundle that anyone can check",
    "dequantize": "make a checkpoint of a GGUF file, or fetch SmolLM2",
    "aot": "compile the Triton kernels ahead of time, without a GPU",
}
SHARED = ("collect", "eval", "probe", "study")  # several processes may share their work


def listing() -> str:
    """Return the usage text, with one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {words}" for name, words in COMMANDS.items()]
    more = "kernel-surgery COMMAND --help lists the options of a command."
    return "\n".join(["usage: kernel-surgery COMMAND [options]", "", *lines, "", more])


def run(argv: list[str] | None = None) -> int | None:
    """Run the command that the first word names. Without a word, list the commands.

    Returns the exit status: the command's, or 2 for an unknown command.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    if words[0] == "--version":
        print(f"{SCRIPT} {VERSION}")
        return 0
    if words[0] not in COMMANDS:
        names = f": choose from {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS) or names}")
    return import_module(f"kernel_surgery.{words[0]}").run(words[1:])


def script() -> NoReturn:
    """Run the console script `kernel-surgery`."""
    main(run, shared=sys.argv[1:2] in ([name] for name in SHARED))


if __name__ == "__main__":
    script()
