"""A command in which one process or all of them fail: python -m tests.support.one_fails RANK|all|none"""

import sys

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


if __name__ == "__main__":
    main(run, shared=True)
