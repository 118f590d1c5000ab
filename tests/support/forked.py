"""Real processes that share a command's work, without the seconds that each would import for.

One server imports once. Every launch is as many forks of it, with the variables that a launcher sets.
"""

import json
import subprocess
import sys
from contextlib import contextmanager

from tests.support.ranks import environment

SERVER = """
import json, os, runpy, signal, socket, sys, time
import matplotlib.figure, optuna, scipy.stats, torch
import kernel_surgery.studies.study
from kernel_surgery.common.errors import UserError
from kernel_surgery.studies import opening
from transformers import Qwen2ForCausalLM, Qwen2TokenizerFast  # imports what loading imports; it would start threads

def launch(size, words, until, failing):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        out = os.open(f"said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        real = opening.answer_cells

        def unlucky(asking, edits, done, samples):
            real(asking, {"original": edits["original"]}, done, samples)
            raise UserError(f"process {rank} has no luck.")

        if rank == failing:
            opening.answer_cells = unlucky
        sys.argv = words
        status = 1
        try:
            runpy.run_module(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    ended, deadline = {}, time.monotonic() + 120
    while len(ended) < size and time.monotonic() < deadline:
        if until and all(os.path.exists(file) and os.path.getsize(file) for file in until):
            break
        for pid in pids:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    alive = [pid for pid in pids if pid not in ended]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: none shall notice that another is gone
        for pid in alive:
            os.kill(pid, number)
    for pid in alive:
        ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [ended[pid] for pid in pids]

print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(launch(**json.loads(line))), flush=True)
"""


@contextmanager
def launches(folder):
    """Yield `launch(size, words, until=(), failing=None)`: the exit statuses by rank, and what each process has said.

    words: a module and its arguments. until: the processes are killed (status -9) as soon as these files hold
    something; so are processes that do not end within two minutes. failing: the rank of a process that raises a
    UserError when it has answered the original's problems.
    """
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment()
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def launch(size, words, until=(), failing=None):
            asked = {"size": size, "words": list(map(str, words)), "until": list(map(str, until)), "failing": failing}
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            statuses = json.loads(server.stdout.readline())
            return statuses, [(folder / f"said.{rank}").read_text(encoding="utf-8") for rank in range(size)]

        yield launch
        server.stdin.close()
