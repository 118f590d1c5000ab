"""The entry point of the vLLM plugin. vLLM calls `register` in every process, perhaps more than once.

    vllm serve MODEL --additional-config '{"kernel_surgery": {"subspace": "subspace.safetensors"}}'

An engine that is not configured so is not changed. Three methods of vLLM are wrapped, and each wrapper first looks
whether the engine's `additional_config` names this plugin:

    VllmConfig.__post_init__         what cannot work is refused before a process is started
    WorkerBase.__init__              the worker then edits the model while it loads it (`engines.layers`)
    InputProcessor.process_inputs    a request's own strength is checked, and enters the prefix cache's key

vLLM only logs an error that is raised while a plugin is imported, and would then serve the original model. So this
module imports nothing that may be missing, and what it wraps imports the rest only where the plugin is asked for.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from kernel_surgery.common.names import PLUGIN, REQUEST_STRENGTH

_WRAPPED = "_kernel_surgery_wrapped"
_unknown: str | None = None  # why this vLLM is none that we know


def register() -> None:
    """Wrap vLLM's methods, once per process. If there are others, only engines that ask for the plugin are refused."""
    global _unknown
    try:
        from vllm.config import VllmConfig
    except ImportError:  # no vLLM that we know, and nothing to refuse it by
        return
    try:
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.worker_base import WorkerBase

        _wrap(WorkerBase, "__init__", _worker_made)
        _wrap(InputProcessor, "process_inputs", _request_made)
    except (ImportError, AttributeError) as error:
        _unknown = str(error)
    _wrap(VllmConfig, "__post_init__", _config_made)


def _wrap(owner: type, name: str, made: Callable[..., Any]) -> None:
    """Replace a method by `made(method, self, ...)`, unless that was done before."""
    method = getattr(owner, name)
    if hasattr(method, _WRAPPED):
        return

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return made(method, self, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def _configured(vllm_config: Any) -> bool:
    asked = getattr(vllm_config, "additional_config", None)
    return isinstance(asked, dict) and PLUGIN in asked


def _config_made(method: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> None:
    method(config, *args, **kwargs)
    draft = getattr(getattr(config, "speculative_config", None), "draft_model_config", None)
    # A draft model is configured by a copy of the engine's configuration. It is not edited.
    if not _configured(config) or config.model_config is None or config.model_config is draft:
        return
    from kernel_surgery.engines.refusing import refuse_config, refuse_unknown

    refuse_unknown(_unknown)
    refuse_config(config)


def _worker_made(method: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> None:
    method(worker, *args, **kwargs)
    if _configured(worker.vllm_config):
        from kernel_surgery.engines.layers import prepare_worker

        prepare_worker(worker)


def _request_made(
    method: Callable[..., Any], processor: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if REQUEST_STRENGTH not in (getattr(params, "extra_args", None) or {}):
        return method(processor, request_id, prompt, params, *args, **kwargs)
    from kernel_surgery.engines.per_request import check_request, salted

    strength = check_request(processor.vllm_config, params, resumable=bool(kwargs.get("resumable")))
    assert strength is not None  # it is asked
    return salted(method(processor, request_id, prompt, params, *args, **kwargs), strength)
