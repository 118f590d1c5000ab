"""Processes that share one command's work: who they are, that none waits for one that failed, one message for all."""

import subprocess
import sys

import pytest

from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.ranks import ALONE, Ranks, StoppedElsewhere, current, silent
from tests.support.ranks import ROOT, run, torchrun
from tests.support.together import together


def launched(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_without_a_launcher_there_is_one_process_that_asks_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current() is ALONE and not silent()
    assert ALONE.first and ALONE.gathered(7) == [7] and ALONE.agreed(7) == 7 and ALONE.failed()
    assert ALONE.share("abc") == ["a", "b", "c"] and ALONE.record() == {}
    ALONE.wait()
    ALONE.told()
    # torch is not even imported for it: a command's --help stays fast.
    code = "import sys\nfrom kernel_surgery.common.ranks import current\ncurrent().wait()\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_launcher_says_who_it_is(monkeypatch):
    launched(monkeypatch, 1, 2)
    assert current() == Ranks(1, 2) and silent() and not current().first and current().record() == {"processes": 2}
    launched(monkeypatch, 0, 2)
    assert current() == Ranks(0, 2) and not silent()
    launched(monkeypatch, 0, 1)
    assert current() is ALONE
    for rank, size in (("2", "2"), ("-1", "2"), ("one", "2"), ("0", "many"), ("0", "0")):
        launched(monkeypatch, rank, size)
        with pytest.raises(UserError, match=f"RANK='{rank}' and WORLD_SIZE='{size}' name no process"):
            current()


def test_shares_are_every_nth_and_together_all():
    shares = [Ranks(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]] == [Ranks(0, 3).share(range(8), rank) for rank in range(3)]


def test_values_come_by_rank_and_all_agree_with_the_first():
    found = together(3, lambda ranks: (ranks.gathered(ranks.rank * 10), ranks.agreed(ranks.rank)))
    assert found == [([0, 10, 20], 0)] * 3


@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}, {0, 1, 2}])
def test_an_error_in_one_process_stops_all_at_their_next_exchange_and_one_prints_it(failing):
    def work(ranks):
        ranks.wait()
        if ranks.rank in failing:
            printed = ranks.failed()
            ranks.told()
            return printed
        return ranks.gathered("never seen")

    found = together(3, work)
    for rank, one in enumerate(found):
        assert one is (rank == min(failing)) if rank in failing else isinstance(one, StoppedElsewhere), found


def test_parts_are_made_by_all_and_an_error_of_bad_input_is_raised_in_all_which_go_on():
    def work(ranks):
        def part():
            if ranks.rank:
                raise UserError(f"process {ranks.rank} has no luck")
            return "made"

        with pytest.raises(UserError, match="process 1 has no luck"):
            ranks.parts(part)
        return ranks.parts(lambda: ranks.rank), ranks.by_first(lambda: [f"by {ranks.rank}"][ranks.rank])

    assert together(3, work) == [([0, 1, 2], "by 0")] * 3  # none but the first makes it: they would find no such item
    assert ALONE.parts(lambda: 7) == [7] and ALONE.by_first(lambda: 7) == 7


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_cannot_share_its_work_is_refused_under_a_launcher(monkeypatch, capsys, rank):
    launched(monkeypatch, rank, 2)
    with pytest.raises(SystemExit) as left:
        main(lambda argv: pytest.fail("it ran"), [])
    assert left.value.code == 2
    message = "error: this command runs in one process, and WORLD_SIZE says that there are 2. Start it without a "
    assert capsys.readouterr().err.strip() == ("" if rank else f"{message}launcher.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_option_is_named_once(monkeypatch, capsys, rank):
    launched(monkeypatch, rank, 2)
    with pytest.raises(SystemExit):
        Parser("eval").parse_args(["--wrong"])
    assert capsys.readouterr().err.count("error: unrecognized arguments: --wrong") == 1 - rank


# On a free port. Without --multi_gpu, accelerate starts one process where there is no GPU.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--main_process_port", "0"]


@pytest.mark.parametrize(
    ("launcher", "who"),
    [
        (torchrun(), "1"),
        *(pytest.param(torchrun(), who, marks=pytest.mark.slow) for who in ("0", "all", "none")),
        *(pytest.param(ACCELERATE, who, marks=pytest.mark.slow) for who in ("1", "none")),
    ],
)
def test_two_real_processes_end_together_with_one_message(tmp_path, launcher, who):
    done = run([*launcher, "-m", "tests.support.one_fails", who], cwd=tmp_path)
    ours = ("error: ", "all is done", "left open")
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(ours)]
    failing = {"all": "0", "none": None}.get(who, who)
    assert said == (["all is done"] if failing is None else [f"error: process {failing} has no luck."])
    assert (done.returncode == 0) == (failing is None)
    assert "exitcode: -6" not in done.stderr.replace(" ", "")  # none was aborted because another was gone


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    torch = pytest.importorskip("torch")
    from kernel_surgery.models.load import parse_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse_device("auto") == torch.device("cuda")
    launched(monkeypatch, 5, 8)
    assert parse_device("auto") == parse_device("cuda") == torch.device("cuda:1")
    assert parse_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no device 'cuda:2': this machine has 2 CUDA devices"):
        parse_device("auto")
