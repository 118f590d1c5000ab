"""Kill a collection again and again: python -m tests.support.killed SEED KILLS collect-options...

One JSON line: how many batches were run in all, how often the command was killed, and its last exit status. The command
runs in forks of this process, so that each of them starts in a moment. SIGKILL comes at seeded times: while the model
loads, while a batch runs or is saved, or while the file is written.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from kernel_surgery.collect import run
from kernel_surgery.common.command import main
from kernel_surgery.models.load import load_model

_COUNTED = "Qwen2Model"  # the embedded model's body


def started(log: Path, argv: list[str]) -> int:
    """The process id of a fork that runs the command. It adds a byte to `log` when a batch begins."""
    if child := os.fork():
        return child
    torch.set_num_threads(1)  # here, before the loader's threads do it all at once: the pool is the parent's
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def count(module, inputs):
        if type(module).__name__ == _COUNTED:
            os.write(handle, b".")

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        main(run, argv)
    except SystemExit as left:
        sys.stdout.flush()
        os._exit(left.code)
    os._exit(70)


def killed(seed: int, kills: int, argv: list[str]) -> dict:
    """Kill the command `kills` times, and let it finish. Before each kill it may begin 0 to 4 batches."""
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        log, done = Path(folder) / "log", 0
        log.touch()
        batch_s = 0.05
        for _ in range(kills):
            child, begun, wanted = started(log, argv), log.stat().st_size, random.randint(0, 4)
            since = time.monotonic()
            while log.stat().st_size < begun + wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            if wanted > 1:
                batch_s = (time.monotonic() - since) / wanted
            time.sleep(random.uniform(0, batch_s))
            try:
                os.kill(child, signal.SIGKILL)
                done += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            except (ProcessLookupError, ChildProcessError):
                break  # it was done before
        status = os.waitstatus_to_exitcode(os.waitpid(started(log, argv), 0)[1]) if done == kills else 0
        return {"batches": log.stat().st_size, "kills": done, "status": status}


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_model("polyglot")  # imports what the forks need
    print(json.dumps(killed(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
