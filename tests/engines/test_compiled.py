"""vLLM on two ranks, and compiled: the same certificates as of an eager engine on one device."""

import pytest

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.engines.variants import ENGINE_MODES
from tests.support.cells import store
from tests.support.engines import within

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("vllm_environment")]


def test_two_ranks_give_them_too(certificate):
    found = certificate("polyglot", tensor_parallel=2)
    assert found["faults"] == []
    for mode in ENGINE_MODES:
        store("polyglot", mode, "tensor parallel 2", within(found, mode))


def test_a_model_that_vllm_cannot_split_is_refused_with_its_reason(certificate):
    with pytest.raises(KernelSurgeryError, match=r"attention heads \(9\) must be divisible by"):
        certificate("smollm2", ("fused",), tensor_parallel=2)
    for mode in ENGINE_MODES:
        store("smollm2", mode, "tensor parallel 2", "vLLM refuses: 9 heads")


def test_compiled_engines_give_them_too(certificate):
    found = certificate("polyglot", compiled=True)
    assert found["faults"] == []
    for mode in ENGINE_MODES:
        store("polyglot", mode, "compiled", within(found, mode))
