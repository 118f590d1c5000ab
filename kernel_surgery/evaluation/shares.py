"""Several processes answer the problems of one run: each a share of them, in a file of its own; one merges the files.

    samples.0-of-2.jsonl    what process 0 of 2 has answered so far, beside samples.jsonl

A share holds every `size`-th problem of each category, so all processes have as many of each, and of each language. If
the launch is killed, the same launch goes on from these files. Process 0 puts the texts together in problem order,
appends them to samples.jsonl as one process would have, and removes the shares.

A text depends on its batch only through rounding, which can swap two logits that are almost equal (`generate`). So two
processes write what one writes, but for such near ties.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.ranks import Ranks
from kernel_surgery.evaluation.answering import Asking
from kernel_surgery.evaluation.judging import Cells, Sample
from kernel_surgery.evaluation.samples import append_cell, read_cells, take_up
from kernel_surgery.problems.generator import Problem

# Answers a context's problems: called with it, the cells that are done, and the file for the others.
Answer = Callable[[Asking, Cells, Path], Cells]
Rescore = Callable[[Problem, Sample], Sample]


def share_of(problems: Sequence[Problem], ranks: Ranks, rank: int | None = None) -> list[int]:
    """Return the indices of the problems that a process answers, in order. rank: of another process.

    Categories are dealt out one after the other, so the shares differ by one problem at most, in each and in all.
    """
    categories = list(dict.fromkeys(problem.category for problem in problems))
    dealt = sorted(range(len(problems)), key=lambda i: categories.index(problems[i].category))
    return sorted(ranks.share(dealt, rank))


def share_file(samples: Path, ranks: Ranks, rank: int | None = None) -> Path:
    """Return the file of a process's share. rank: of another process."""
    number = ranks.rank if rank is None else rank
    return samples.with_name(f"{samples.stem}.{number}-of-{ranks.size}{samples.suffix}")


def refuse_other_shares(samples: Path, ranks: Ranks) -> None:
    """Raise UserError if `samples` has shares of a launch of another number of processes, which would be lost."""
    pattern = re.compile(rf"{re.escape(samples.stem)}\.\d+-of-(\d+){re.escape(samples.suffix)}")
    for path in sorted(samples.parent.iterdir()) if samples.parent.is_dir() else ():
        if (found := pattern.fullmatch(path.name)) and int(found[1]) != ranks.size:
            raise UserError(
                f"{str(samples.parent)!r} holds the shares of {found[1]} processes ({path.name}), this is one of "
                f"{ranks.size}. Continue with {found[1]}, or remove the shares and their texts."
            )


def take_up_together(ranks: Ranks, samples: Path, asked: Sequence[Problem], rescore: Rescore) -> Cells:
    """Return the complete cells of an interrupted run, as `take_up` does. Process 0 alone rewrites the file."""
    cells = take_up(samples, asked, rescore) if ranks.first else {}
    ranks.wait()
    return cells if ranks.first else read_cells(samples, asked)


def answer_together(
    ranks: Ranks, context: Asking, done: Cells, samples: Path, answer: Answer, rescore: Rescore
) -> Cells:
    """Return the cells of all problems, as `answer` does for one process. Each process answers its share.

    done: the cells that were answered before. samples: the file that finished cells are appended to. rescore: as in
    `take_up`.

    Raises UserError if the processes do not share the folder of `samples`, and what `answer` raises.
    """
    refuse_other_shares(samples, ranks)
    if ranks.size == 1:
        return answer(context, done, samples)
    mine, own = share_of(context.problems, ranks), share_file(samples, ranks)
    share = context.about([context.problems[i] for i in mine])
    before = {key: [cell[i] for i in mine] for key, cell in done.items()}
    cells = answer(share, take_up(own, share.problems, rescore) | before, own) if mine else before
    keys = ranks.agreed(list(cells))
    if ranks.first:
        _merge(ranks, context, [key for key in keys if key not in done], samples)
    ranks.wait()
    merged = read_cells(samples, context.problems)
    return {key: done[key] if key in done else merged[key] for key in keys}


def _merge(ranks: Ranks, context: Asking, keys: Sequence[tuple[str, str]], samples: Path) -> None:
    """Append the cells of all shares to `samples`, and remove the shares."""
    shares = [share_of(context.problems, ranks, rank) for rank in range(ranks.size)]
    files = [share_file(samples, ranks, rank) for rank in range(ranks.size)]
    held = [
        read_cells(file, [context.problems[i] for i in share]) for file, share in zip(files, shares, strict=True)
    ]
    for key in keys:
        texts: dict[int, Sample] = {}
        for rank, (share, cells) in enumerate(zip(shares, held, strict=True)):
            if share and key not in cells:
                raise UserError(
                    f"process {rank} has answered {key[0]} in {key[1]}, but {str(files[rank])!r} does not hold it. All "
                    "processes must share the folder --out."
                )
            texts |= dict(zip(share, cells.get(key, ()), strict=True))
        append_cell(samples, [texts[i] for i in range(len(context.problems))])
    for file in files:
        file.unlink(missing_ok=True)
