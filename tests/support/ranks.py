"""Start processes that know of each other, as torchrun and accelerate launch do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, gloo on this machine, the package of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TORCHELASTIC"))}
    mine = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    return kept | mine | more


def torchrun(*words: str, processes: int = 2) -> list[str]:
    """The command line of torchrun on a port that is free; words: `-m module arguments` or a file."""
    # --standalone: its own rendezvous, so that two tests at once do not meet.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]


def run(command: list[str], *, cwd: Path, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout)
