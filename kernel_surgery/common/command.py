"""What every command shares: its parser, one-line errors, and exit statuses.

A command is a module run as `python -m kernel_surgery.<name>`:

    def run(argv=None) -> int | None:
        args = parser().parse_args(argv)
        ...
    if __name__ == "__main__":
        main(run)

Exit status: 0 done, 1 a check that was asked for failed (what `run` returns), 2 bad usage or input. Bad input is one
clear message on stderr whose first line starts with "error:", never a traceback. A fault of ours keeps its traceback.
Nothing here imports torch or transformers, so that `--help` answers at once.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kernel_surgery.common.errors import KernelSurgeryError, UserError

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PACKAGE_NAME = "kernel_surgery"
SCRIPT = "kernel-surgery"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that says what is wrong in one line and takes no abbreviated options.

    name: of the command, such as "eval" or "polyglot.train"; the usage line shows how it was called.
    """

    def __init__(self, name: str, **kwargs):
        as_script = Path(sys.argv[0]).name == SCRIPT
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(f"{SCRIPT} {name}" if as_script else f"python -m {PACKAGE_NAME}.{name}", **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(run: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run a command and leave the process with its exit status. Never returns.

    `run(argv)` returns None or 0 when done, 1 when a check that was asked for failed. Bad input becomes one message on
    stderr and status 2: a `KernelSurgeryError`, or a file that cannot be opened. KERNEL_SURGERY_TRACEBACK=1 shows where
    it came from. Ctrl-C is status 130, a closed pipe 141. Any other exception is a fault of ours and keeps its
    traceback.
    """
    try:
        status = run(argv) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python flushes stdout once more on exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        if os.environ.get("KERNEL_SURGERY_TRACEBACK") or not _is_user_error(error):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _is_user_error(error: Exception) -> bool:
    # A ValueError of torch or numpy is a fault of ours: it keeps its traceback.
    if isinstance(error, KernelSurgeryError):
        return True
    return isinstance(error, _FILE_ERRORS) and error.filename is not None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {os.fspath(error.filename)!r}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def command_line(name: str, argv: list[str] | None) -> str:
    """The command as it was called, for its records. name: such as "eval"."""
    words = sys.argv[1:] if argv is None else map(str, argv)
    return shlex.join(["python", "-m", f"{PACKAGE_NAME}.{name}", *words])


def check_finite_strength(strength: float | None) -> None:
    """Raises UserError for a --strength that is NaN or infinite."""
    if strength is not None and not math.isfinite(strength):
        raise UserError(f"--strength must be a finite number, got {strength}.")
