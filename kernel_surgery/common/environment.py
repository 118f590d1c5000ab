"""Where a result was made: versions, machine, commit."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from kernel_surgery.common.names import VERSION

PACKAGE = Path(__file__).resolve().parent.parent


def environment_record(device: "torch.device | str | None" = None) -> dict[str, str | bool | None]:
    """Where a result was made: versions, platform, device, and the commit if this is a git checkout of ours.

    Keys: kernel_surgery, python, torch, triton, transformers, platform, device, commit, dirty. What is not
    there is None.
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
