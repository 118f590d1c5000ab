"""What every test shares: no network, one seed, and GPU tests that are counted when they cannot run."""

import os
import random
import sys

# One thread for each of the processes that share the cores: two would wait for each other on tensors this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports huggingface_hub, which reads it once: what reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run, no deadline (two shared cores), no database of examples in the working
# folder.
settings.register_profile("kernel_surgery", derandomize=True, deadline=None, database=None)
settings.load_profile("kernel_surgery")

SEED = 20240607


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, so that no test depends on those that ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    # Torch takes seconds to import and starts from a fixed seed: not imported for tests that do without it.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def whole_products_on_a_gpu(request):
    """GPU tests hold a model's products to bounds: cuBLAS may else add the parts of a 16-bit one in 16 bits."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from kernel_surgery.numerics.precision import whole_products

    with whole_products():
        yield


def pytest_collection_modifyitems(items):
    """The kernels' tests take longest, so they begin first and no worker waits for another at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/ops/"))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped:
        terminalreporter.section("GPU tests")
        terminalreporter.write_line(
            f"{len(skipped)} GPU tests skipped: no CUDA device here; run `make gpu` on a machine with one"
        )
