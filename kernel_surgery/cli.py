"""What every stage's command line shares: one-line errors, exit statuses, progress, names turned into things.

A stage is a module run as `python -m kernel_surgery.<stage>`:

    def run(argv=None) -> int | None:
        parser = cli.Parser(description=...)
        ...
    if __name__ == "__main__":
        cli.main(run)

Exit status: 0 done, 1 a check that was asked for failed (what `run` returns), 2 bad usage or input. Bad
input is one clear message on stderr whose first line starts with "error:", never a traceback; a fault of
ours keeps its traceback. Nothing here imports torch or transformers before it is called, so that `--help`
answers at once.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from kernel_surgery import __version__

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent
POLYGLOT = PACKAGE / "polyglot" / "model"
DTYPES = ("float32", "bfloat16", "float16")
# Letters, digits and -_. on both sides of exactly one slash: what the hub allows as a repository's name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_TIMEOUT_S = 5.0
_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class UserError(argparse.ArgumentTypeError, ValueError):
    """Something asked for cannot be done. The message says what, where, and the next step.

    It is an ArgumentTypeError as well so that argparse passes on the message of a `type=` function: of any
    other ValueError it says only "invalid ... value".
    """


class Parser(argparse.ArgumentParser):
    """ArgumentParser that says what is wrong in one line and takes no abbreviated options."""

    def __init__(self, prog: str | None = None, **kwargs):
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        if prog is None and spec is not None:
            prog = f"python -m {spec.name.removesuffix('.__main__')}"
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(run: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run a stage and leave the process with its exit status. Never returns.

    `run(argv)` returns None or 0 when done, 1 when a check that was asked for failed. Bad input becomes one
    message on stderr and status 2: an exception class of ours, a ValueError that our own code raised, a
    file that cannot be opened. KERNEL_SURGERY_TRACEBACK=1 shows where it came from. Ctrl-C is status 130, a
    closed pipe 141. Any other exception is a fault of ours and keeps its traceback.
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
    # A ValueError out of torch or numpy is not ours to explain away: it keeps its traceback.
    if isinstance(error, UserError) or type(error).__module__.split(".")[0] == "kernel_surgery":
        return True
    if isinstance(error, _FILE_ERRORS):
        return error.filename is not None or _raised_here(error)
    return isinstance(error, ValueError) and _raised_here(error)


def _raised_here(error: Exception) -> bool:
    """The innermost frame is ours and stands on a `raise`: an `int("x")` inside a stage stays a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    source = Path(frames[-1].filename).resolve()
    ours = PACKAGE in source.parents or PACKAGE.parent / "kernels" in source.parents
    return ours and (frames[-1].line or "raise").startswith("raise")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {os.fspath(error.filename)!r}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def progress(iterable: Iterable[T], total: int | None = None, desc: str | None = None) -> Iterator[T]:
    """The same items, with a bar on stderr while that is a terminal; nothing at all in a pipe or a log."""
    return iter(bar(total, desc, iterable=iterable, leave=False))


def bar(total: int | None, desc: str | None = None, **options) -> "tqdm":
    """A bar on stderr while that is a terminal: a context manager with `update`. options: tqdm's own."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, file=sys.stderr, disable=not sys.stderr.isatty(), **options)


def command_line(module: str, argv: "list[str] | None") -> str:
    """The command that a stage was called with, for its records."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else map(str, argv))])


def quiet_transformers() -> None:
    """No loading bars and no advice from transformers, unless TRANSFORMERS_VERBOSITY asks for it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


def resolve_model(name: str) -> str:
    """What `from_pretrained` should be given for `name`; checked before anything is loaded.

    "polyglot" is the embedded model. A local folder must hold config.json and complete safetensors weights.
    For a hub id (org/name) the hub is asked once, with a time limit of five seconds, instead of failing
    after the loader's half-minute of retries; where it cannot be reached, or HF_HUB_OFFLINE is set, the
    copy in the local cache is used. Raises UserError in every other case.
    """
    if name == "polyglot":
        _check_folder(POLYGLOT, "the embedded model")
        return str(POLYGLOT)
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_folder(path, "model")
        return str(path)
    if path.is_file():
        raise UserError(f"model {name!r} is a file. Give the folder that holds config.json and the weights.")
    if _HUB_ID.fullmatch(name) and not Path(name.split("/")[0]).is_dir():
        return _resolve_hub_id(name)
    raise UserError(
        f"no model at {name!r}: there is no such folder. "
        'Give "polyglot" (the embedded model), a folder with config.json and weights, or a hub id org/name.'
    )


def _check_folder(path: Path, what: str) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"{what} {str(path)!r} has no config.json: not a model folder.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{what}: {str(index)!r} is not a safetensors index ({error}).") from error
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(
                f"{what} {str(path)!r} is incomplete: {len(missing)} of {len(shards)} weight files missing, "
                f"{missing[0]} first."
            )
    elif not (path / "model.safetensors").is_file():
        pickled = next(iter(sorted(path.glob("pytorch_model*.bin"))), None)
        found = f"only pickled weights ({pickled.name}), which are never loaded" if pickled else "no weights"
        raise UserError(f"{what} {str(path)!r} has {found}: model.safetensors, or an index and its shards, is needed.")


@functools.cache
def _resolve_hub_id(name: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    cached = try_to_load_from_cache(name, "config.json")
    here = f"There is no local folder {name!r} either."
    # Transport errors descend from the first base of the hub client's HTTP error, in every HTTP library it
    # used.
    unreachable = (OSError, HfHubHTTPError.__bases__[0])
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: accept its terms on the hub and log in with a token.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {name!r} that you may read. {here}") from error
    except unreachable as error:
        if isinstance(cached, str):
            _check_folder(Path(cached).parent, "cached model")
            return str(Path(cached).parent)
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"model {name!r} is not in the local cache, and HF_HUB_OFFLINE is set. {here}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"model {name!r} is not in the local cache, and the hub did not answer ({reason}). {here}"
        ) from error
    return name


def load_model(name: str, dtype: "torch.dtype", device: "torch.device | str" = "cpu"):
    """A causal LM from `resolve_model(name)`, in `dtype`, on `device`, in eval mode.

    The dtype is given to the loader: casting afterwards (`model.to(dtype)`) would round the rotary
    embedding's inv_freq. Runs no remote code, unpickles nothing. Raises UserError when the checkpoint
    cannot be read or lacks a weight, which transformers would otherwise fill with random numbers.
    """
    source = resolve_model(name)
    quiet_transformers()
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {source!r}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {source!r} are incomplete: {len(missing)} tensors missing, {missing[0]} first."
        )
    return model.to(device).eval()


def load_tokenizer(name: str):
    """The tokenizer of `resolve_model(name)`. Raises UserError when there is none that can be read."""
    source = resolve_model(name)
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from {source!r}: {_first_line(error)}") from error
    # Where the files are missing, transformers makes an empty tokenizer of the model's class without a word.
    if not tokenizer("0").input_ids:
        raise UserError(f"cannot load a tokenizer from {source!r}: it has no vocabulary. Is tokenizer.json missing?")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_device(name: str = "auto") -> "torch.device":
    """auto (CUDA where there is one), cpu, cuda or cuda:N as a device.

    Raises UserError for any other name, and for a CUDA device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}: choose from auto, cpu, cuda, cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise UserError(f"device {name!r} was asked for, but this machine has {found} CUDA devices. Try --device cpu.")
    return device


def parse_dtype(name: str = "auto", device: "torch.device | str" = "cpu") -> "torch.dtype":
    """float32, bfloat16 or float16 as a dtype; auto is bfloat16 on CUDA and float32 on the CPU.

    Raises UserError for any other name.
    """
    import torch

    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose from auto, {', '.join(DTYPES)}.")
    return getattr(torch, name)


def parse_languages(text: str) -> tuple[str, ...]:
    """`en,zh` as ("en", "zh"), in the order given, each once; `all` is all seven.

    Raises UserError for a language that there are no problems in.
    """
    from kernel_surgery.problems import LANGUAGES

    if text.strip() == "all":
        return tuple(LANGUAGES)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [language for language in asked if language not in LANGUAGES]
    if unknown or not asked:
        raise UserError(f"unknown language {(unknown or [text])[0]!r}: choose from {', '.join(LANGUAGES)}, or all.")
    return tuple(dict.fromkeys(asked))


def environment(device: "torch.device | str | None" = None) -> dict[str, str | bool | None]:
    """Where a result was made: versions, platform, device, and the commit if this is a git checkout of ours.

    Keys: kernel_surgery, python, torch, triton, transformers, platform, device, commit, dirty. What is not
    there is None.
    """
    commit, dirty = _git_state()
    return {
        "kernel_surgery": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "platform": platform.platform(),
        "device": _device_name(device),
        "commit": commit,
        "dirty": dirty,
    }


def version(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _device_name(device: "torch.device | str | None") -> str:
    if device is not None and str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """(commit, dirty), or (None, None) where the package does not lie in the root of a git checkout.

    An installed copy inside somebody else's repository must not report that repository's commit. A copy without its
    history, on a machine it was sent to, is told: KERNEL_SURGERY_COMMIT, as `git describe --always --abbrev=40 --dirty`
    gives it.
    """
    root = PACKAGE.parent
    told = os.environ.get("KERNEL_SURGERY_COMMIT", "")
    elsewhere = (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return elsewhere
        # What was measured lies in bench/results and changes nothing that is measured.
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!bench/results"))
    except (OSError, subprocess.SubprocessError):
        return elsewhere


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path`, all of it or none: to a sibling first, renamed when it is on the disk.

    Missing parent folders are made. On an exception the sibling is removed and an older file at `path` is
    as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
