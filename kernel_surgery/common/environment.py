"""The environment record of a result: versions, machine and commit."""

import contextlib
import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from kernel_surgery.common.names import VERSION

PACKAGE = Path(__file__).resolve().parent.parent


def now() -> str:
    """Return the date and the time as records have them, with the time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment_record(device: "torch.device | str | None" = None) -> dict[str, str | bool | None]:
    """Return the environment of a result: versions, platform, device, and the commit of this package's checkout.

    device: the torch device of the computation. Without a CUDA device, the CPU's name is recorded.

    Keys: kernel_surgery, python, torch, triton, transformers, platform, device, commit, dirty. A distribution that is
    not installed has the version None. Without a git checkout, commit and dirty come from KERNEL_SURGERY_COMMIT. They
    are None if that is not set.
    """
    commit, dirty = _git_state()
    return {
        "kernel_surgery": VERSION,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "platform": platform.platform(),
        "device": _device_name(device),
        "commit": commit,
        "dirty": dirty,
    }


def version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
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
    """Return (commit, dirty), or (None, None) if the package is not in the root of a git checkout.

    A copy that is installed inside another repository must not report that repository's commit. For a copy without git
    history, KERNEL_SURGERY_COMMIT holds the commit, in the form of `git describe --always --abbrev=40 --dirty`.
    """
    root = PACKAGE.parent
    described = os.environ.get("KERNEL_SURGERY_COMMIT", "")
    fallback = (described.removesuffix("-dirty"), described.endswith("-dirty")) if described else (None, None)

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
        return ran.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return fallback
        # Only code counts: what a run leaves in the clone does not change what is measured.
        code = ("kernel_surgery/*.py", "kernels/*.py", "kernel_surgery/polyglot", "bench/*.py", "setup.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.SubprocessError):
        return fallback
