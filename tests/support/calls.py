"""Commands driven in this process: the one place of two tests that knows where the command line's `main` is."""

import contextlib
import importlib
import io
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported


def call(stage: str, *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `python -m kernel_surgery.<stage>` with these words."""
    from kernel_surgery.common import command

    run = importlib.import_module(f"kernel_surgery.{stage}").run
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.main(run, [str(word) for word in words])
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def one_thread():
    """Torch on one thread: tensors this small gain nothing from two, and wait for each other where a core is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
