"""The base of every command: its parser, its one-line errors and its exit status.

A command is a module that is run as `python -m kernel_surgery.<name>`:

    def run(argv=None) -> int | None:
        args = parser().parse_args(argv)
        ...
    if __name__ == "__main__":
        main(run)

Exit status: 0 if the command is done, 1 if a requested check failed (`run` returns it), 2 for bad usage or input. Bad
input gives one message on stderr that starts with "error:", and no traceback. A bug in this package keeps its
traceback. This module imports neither torch nor transformers, so `--help` is fast.
"""

import argparse
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.files import shareable
from kernel_surgery.common.names import LARGEST_STRENGTH
from kernel_surgery.common.ranks import ALONE, Ranks, StoppedElsewhere, close, current, silent

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PACKAGE_NAME = "kernel_surgery"
RESUMES = (
    "Give the same command again: collect, fit and study go on where they were, eval and probe with --resume, all "
    "others begin anew."
)
SCRIPT = "kernel-surgery"
_ADDRESS = re.compile(r"https?://[^\s\"'<>]+")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and without abbreviated options.

    name: the command's name, such as "eval" or "polyglot.train". The usage line shows how the command was called.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(program(name), **kwargs)

    def parse_known_args(  # type: ignore[override]  # argparse overloads it by the type of the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, but name a misspelt option first: argparse names the one that it then misses."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][a-z0-9-]*", name) and name not in (known := self._option_string_actions):
                self.error(f"unrecognized arguments: {name}{did_you_mean(name, known)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if silent() else f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that is most like a misspelt one, or nothing."""
    return "".join(f"; did you mean {other}?" for other in difflib.get_close_matches(name, known, 1))


def program(name: str) -> str:
    """Return how a command is called, in the way that this one was: as a module, or by the console script."""
    return f"{SCRIPT} {name}" if Path(sys.argv[0]).name == SCRIPT else f"python -m {PACKAGE_NAME}.{name}"


def main(
    run: Callable[[list[str] | None], int | None], argv: list[str] | None = None, *, shared: bool = False
) -> NoReturn:
    """Run a command and exit the process with its status. Never returns.

    `run(argv)` returns None or 0 if it is done, and 1 if a requested check failed. Bad input is a `KernelSurgeryError`
    or a file that cannot be opened. It becomes one message on stderr and status 2. KERNEL_SURGERY_TRACEBACK=1 shows its
    traceback. Ctrl-C exits with status 130, a closed pipe with 141. Any other exception is a bug in this package and
    keeps its traceback.

    shared: whether several processes may share its work (`common.ranks`). A command that does not know how is refused
    under a launcher. An error in one process ends all of them, with one message.
    """
    _speak_utf8()
    # torch reads this when it is imported. Threads that wait for work then sleep: beside other processes, threads that
    # spin hold up the very thread they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ranks = ALONE
    try:
        ranks = current() if shared else _alone()
        status = run(argv) or 0
        sys.stdout.flush()
        ranks.wait()
    except StoppedElsewhere:
        status = 2
    except KeyboardInterrupt:
        print("interrupted: nothing is left half written. " + RESUMES, file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe. Python flushes stdout again on exit, so point it at /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        if os.environ.get("KERNEL_SURGERY_TRACEBACK") or not _is_user_error(error):
            raise
        if ranks.failed() and not (ranks is ALONE and silent()):
            print("\n".join([f"error: {_message(error)}", *getattr(error, "__notes__", ())]), file=sys.stderr)
            sys.stderr.flush()
        ranks.told()
        status = 2
    close()
    sys.exit(status)


def _alone() -> Ranks:
    """Return `ALONE`. Raises UserError if this is one of several processes, which would all do the same work."""
    if (size := current().size) > 1:
        raise UserError(
            f"this command runs in one process, and WORLD_SIZE says that there are {size}. Start it without a launcher."
        )
    return ALONE


def _speak_utf8() -> None:
    """Print UTF-8 whatever the locale: texts are in seven languages. A file name that is not UTF-8 is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _is_user_error(error: Exception) -> bool:
    # A ValueError from torch or numpy is a bug in this package and keeps its traceback.
    if isinstance(error, KernelSurgeryError):
        return True
    return isinstance(error, _FILE_ERRORS) and error.filename is not None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {os.fspath(error.filename)!r}: {error.strerror}"
    return str(error).strip() or type(error).__name__


@contextmanager
def untouched(sentence: str | Callable[[], str]) -> Iterator[None]:
    """Add to an error raised in the block what the command left as it was, such as "No file was written."

    The library says what is wrong and `main` prints both. sentence: may be a function, called when the error is there.
    Also a decorator of a command's `run`.
    """
    try:
        yield
    except (KernelSurgeryError, *_FILE_ERRORS) as error:
        error.add_note(sentence if isinstance(sentence, str) else sentence())
        raise


def kept_in(folder: Path | None) -> str:
    """What a command that resumes leaves in its folder after an error."""
    try:
        if folder is None or not any(folder.iterdir()):
            return "Nothing was written."
    except OSError:  # no such folder, or a name that no folder can have
        return "Nothing was written."
    return f"The files in {str(folder)!r} were kept."


def command_line(name: str, argv: list[str] | None) -> str:
    """Return the command line as it was called, for a record. name: the command's name, such as "eval".

    Records travel, so of an absolute path only the last name is kept, and an address becomes the word URL.
    """
    words = sys.argv[1:] if argv is None else map(str, argv)
    return shlex.join(["python", "-m", f"{PACKAGE_NAME}.{name}", *map(_without_place, words)])


def _without_place(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + _ADDRESS.sub("URL", shareable(value))


def add_damage(p: argparse.ArgumentParser) -> None:
    """Add the options of a command that measures an edit's damage before it writes, or refuses to."""
    from kernel_surgery.common.names import LANGUAGES

    more = f"languages of the damage; comma-separated, or all: {','.join(LANGUAGES)} (default: those of the fit)"
    p.add_argument("--languages", help=more)
    more = "do not load the model to measure the damage; the card says that it was not measured"
    p.add_argument("--no-damage", action="store_true", help=more)
    more = "accept a subspace of unknown origin or of another model, or an edit that breaks the model; twice: both"
    p.add_argument("--force", action="count", default=0, help=more)


def add_base(p: argparse.ArgumentParser) -> None:
    """Add the option --base-model of a command that writes a folder with a card."""
    more = "hub id of the original, ORG/NAME, for the card and for PEFT (default: --model's, if it is one)"
    p.add_argument("--base-model", metavar="ID", help=more)


def add_chat(p: argparse._ActionsContainer, default: str | None = "auto") -> None:
    """Add the options that say how a prompt is put to the model (`models.chat`). default: None if a file may say it."""
    from kernel_surgery.common.names import CHATS

    more = "put a prompt as the user's turn of the chat template; auto: for an instruct model, which stops where its "
    more += "template ends a turn" + (f" (default {default})" if default else "")
    p.add_argument("--chat", choices=CHATS, default=default, help=more)
    p.add_argument("--thinking", action="store_true", help="let it think, where its chat template has a switch for it")


def add_problems(p: argparse._ActionsContainer, words: str) -> None:
    """Add the option --problems: a number, or files (`files.problems`). words: the default."""
    more = f"a number, in each of five categories ({words}); or your own problems: a FILE.jsonl, or files "
    more += "NAME_{lang}.tsv or their folder"
    p.add_argument("--problems", nargs="+", metavar="N|FILE", help=more)


def add_vllm(p: argparse._ActionsContainer) -> None:
    """Add the options of a command whose texts transformers or vLLM writes."""
    more = "who writes the texts: transformers (default) or vllm (in this process)"
    p.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help=more)
    _add_vllm_options(p)


def add_engine(p: argparse._ActionsContainer) -> None:
    """Add the options that say who writes the texts (`engines.texts.ENGINES`)."""
    more = "who writes the texts: transformers (default), vllm (in this process), or openai (a server of that protocol)"
    p.add_argument("--engine", choices=("transformers", "vllm", "openai"), default="transformers", help=more)
    _add_vllm_options(p)
    p.add_argument("--base-url", metavar="URL", help="address of the server, such as http://localhost:8000/v1")
    more = "the server's models: MODE=NAME, or MODE=NAME@URL for one at another address"
    p.add_argument("--served", nargs="+", default=(), metavar="MODE=NAME", help=more)
    p.add_argument("--in-flight", type=int, default=32, metavar="N", help="requests at a time (default 32)")
    more = "seconds that one try of a request may take (default 600); it is tried again five times"
    p.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help=more)
    more = "send prompts as text, to a server that takes no token ids, such as TGI"
    p.add_argument("--text-prompts", action="store_true", help=more)


def _add_vllm_options(p: argparse._ActionsContainer) -> None:
    p.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="devices of --engine vllm (default 1)")
    p.add_argument("--engine-args", metavar="JSON", help='more arguments of vllm.LLM, such as {"enforce_eager": true}')


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add the option --overwrite of a command that writes a file."""
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --out if there is one")


def check_finite_strength(strength: float | None) -> None:
    """Raise UserError if --strength is NaN, infinite, or beyond float32."""
    if strength is not None and not abs(strength) <= LARGEST_STRENGTH:
        raise UserError(f"--strength must be a finite number of at most {LARGEST_STRENGTH:.2g}, got {strength}.")
