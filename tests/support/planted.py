"""Faults in the vLLM plugin, planted in a worker process: vLLM imports this module there as `worker_extension_cls`."""

from kernel_surgery.engines import layers


class SkippedOnRank1:
    """The edit is not made on rank 1."""


_edits_of = layers.edits_of


def _edits_without_rank_1(config):
    from vllm.distributed import get_tensor_model_parallel_rank

    edits = _edits_of(config)
    if get_tensor_model_parallel_rank() == 1:
        edits.strengths.zero_()
    return edits


layers.edits_of = _edits_without_rank_1
