"""How many threads a command uses on the CPU."""

import os
from pathlib import Path

import torch

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.models.load import POLYGLOT, read_config

# Models narrower than this run on one thread. Measured on two cores: at d_model 128 a second thread saves nothing, at
# 256 it saves a quarter of the time. Beside other work, threads that wait for each other lose more than they save.
ONE_THREAD_BELOW = 256


def choose_threads(model: str) -> None:
    """Let torch use one thread if the model is small. Leaves torch alone if OMP_NUM_THREADS is set.

    model: as in `models.load.load_model`. A hub id is not looked up, and a folder that cannot be read is left to the
    loader, which says what is wrong with it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    folder = POLYGLOT if model == "polyglot" else Path(model).expanduser()
    try:
        narrow = read_config(folder)["hidden_size"] < ONE_THREAD_BELOW
    except KernelSurgeryError:
        return
    if narrow:
        torch.set_num_threads(1)
