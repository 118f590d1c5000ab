"""Kill a launch of several processes at a chosen moment."""

import os
import signal
import subprocess
import time

from tests.support.ranks import environment


def killed_when(command, cwd, ready):
    """Start a launch, and kill all of it as soon as `ready()`. Fails if it ended before."""
    with (cwd / "killed.log").open("w+") as log:
        launch = subprocess.Popen(
            command, cwd=cwd, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not ready() and launch.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        alive = launch.poll() is None
        # The session of the launcher and, as they are started by it in sessions of their own, its workers.
        workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launch.pid)], capture_output=True, text=True)
        for pid in (launch.pid, *map(int, workers.stdout.split())):
            os.kill(pid, signal.SIGKILL)
        launch.wait()
        log.seek(0)
        assert alive, log.read()
