"""A command in which one process or all of them fail: python -m tests.support.one_fails RANK|all|none"""

import atexit
import sys

import torch.distributed

from kernel_surgery.common.command import main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.ranks import current


def run(argv=None):
    ranks, who = current(), sys.argv[1]
    assert ranks.agreed(f"from {ranks.rank}") == "from 0"
    assert ranks.gathered(ranks.rank) == list(range(ranks.size))
    if who in ("all", str(ranks.rank)):
        raise UserError(f"process {ranks.rank} has no luck.")
    ranks.wait()  # of the others: they must not wait forever
    if ranks.first:
        print("all is done")
    return 0


def left_open():
    """An exchange that is open at the end may abort another process that is still ending."""
    if torch.distributed.is_initialized():
        print("left open")


if __name__ == "__main__":
    atexit.register(left_open)
    main(run, shared=True)
