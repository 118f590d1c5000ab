"""Resolve and load models and tokenizers by name; read devices and dtypes."""

import functools
import glob
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from kernel_surgery.common.command import did_you_mean
from kernel_surgery.common.environment import PACKAGE
from kernel_surgery.common.errors import ModelError, UserError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.common.progress import shown, waiting
from kernel_surgery.common.ranks import current
from kernel_surgery.files.contents import contents, select
from kernel_surgery.models.gguf import is_gguf, opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLYGLOT = PACKAGE / "polyglot" / "model"
# The subspace file of the embedded model: `Subspace.load` reads it.
POLYGLOT_SUBSPACE = PACKAGE / "polyglot" / "subspace.safetensors"
# Fetched by `make smollm2`: in a clone beside the package, else in the user's cache.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel-surgery"
SMOLLM2_FOLDER = (PACKAGE.parent if (PACKAGE.parent / "setup.py").is_file() else _CACHE) / "models" / "smollm2"
# Letters, digits and -_. on both sides of exactly one slash: what the hub allows as a repository's name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_TIMEOUT_S = 5.0


def public_name(name: str | os.PathLike) -> str:
    """Return the name of a model for records and cards, which travel: the hub id if it has one, else its folder's name.

    name: as in `load_model`. The hub's cache knows the id of a folder.
    """
    path = Path(name).expanduser()
    if str(name) in ("polyglot", "smollm2"):
        return str(name)
    if not path.is_dir():
        return path.name if is_gguf(path) else str(name)
    folder = path.resolve()
    if folder in (POLYGLOT, SMOLLM2_FOLDER):
        return "polyglot" if folder == POLYGLOT else "smollm2"
    return hub_id(folder) or folder.name


def hub_id(name: str | os.PathLike) -> str | None:
    """Return the hub id of a model, or None if it has none that is known. name: as in `load_model`."""
    path = Path(name).expanduser()
    if path.is_dir():
        cached = re.fullmatch(r"models--([^/]+)--([^/]+)", path.resolve().parent.parent.name)
        return f"{cached[1]}/{cached[2]}" if cached and path.resolve().parent.name == "snapshots" else None
    return str(name) if _HUB_ID.fullmatch(str(name)) else None


def findable(name: str | None) -> str | None:
    """Return the name that a record gives of a model if --model finds the model by it here, else None."""
    if name is None:
        return None
    path = Path(name).expanduser()
    there = (path / "config.json").is_file() or (is_gguf(path) and path.is_file())
    return name if name in ("polyglot", "smollm2") or there or hub_id(name) else None


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and advice, unless TRANSFORMERS_VERBOSITY is set."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


def resolve_model(name: str) -> str:
    """Return the folder or hub id that `from_pretrained` needs for `name`. Nothing is loaded.

    "polyglot" is the embedded model, and "smollm2" the one that `make smollm2` fetches. A GGUF file is dequantised into
    a folder of this process. A local folder must hold config.json and complete safetensors weights. For a hub
    id (org/name) the hub is asked once, for five seconds at most: the loader would retry for half a minute. If it
    cannot be reached, or HF_HUB_OFFLINE is set, the copy in the local cache is used. Raises UserError otherwise.
    """
    if name == "polyglot":
        contents(POLYGLOT, "the embedded model")
        return str(POLYGLOT)
    if name == "smollm2":
        if not (SMOLLM2_FOLDER / "config.json").is_file():
            raise UserError("smollm2 is not here yet. Fetch it (98 MB): python -m kernel_surgery.dequantize smollm2")
        return str(SMOLLM2_FOLDER)
    path = Path(name).expanduser()
    if name and path.is_dir():
        contents(path)
        return str(path)
    if is_gguf(path) and path.is_file():
        quiet_transformers()
        return str(opened(path.resolve()))
    if path.is_file():
        raise UserError(f"model {name!r} is a file. Give the folder that holds config.json and the weights.")
    if _HUB_ID.fullmatch(name) and not Path(name.split("/")[0]).is_dir():
        return _resolve_hub_id(name)
    raise UserError(
        f"no model at {name!r}: there is no such folder{did_you_mean(name, ('polyglot', 'smollm2')) or '.'} "
        'Give "polyglot" (the embedded model), a folder with config.json and weights, a GGUF file, or a hub id.'
    )


def resolve_checkpoint(name: str) -> str:
    """As `resolve_model`, for commands that edit a checkpoint's files: a GGUF file is refused. Raises UserError."""
    if is_gguf(name):
        raise UserError(
            f"model {name!r} is a GGUF file, whose weights are packed. Make a checkpoint first: "
            f"python -m kernel_surgery.dequantize {name} --out DIR"
        )
    return resolve_model(name)


@functools.cache
def _resolve_hub_id(name: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    cached = try_to_load_from_cache(name, "config.json")
    here = f"There is no local folder {name!r} either."
    # Transport errors inherit from the first base class of the hub client's HTTP error, whatever HTTP library it uses.
    unreachable = (OSError, HfHubHTTPError.__bases__[0])
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: accept its terms on the hub and log in with a token.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {name!r}, or you have no access to it. {here}") from error
    except unreachable as error:
        if isinstance(cached, str):
            contents(Path(cached).parent, "cached model")
            return str(Path(cached).parent)
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"model {name!r} is not in the local cache, and HF_HUB_OFFLINE is set. {here}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"model {name!r} is not in the local cache, and the hub did not answer ({reason}). {here}"
        ) from error
    return name


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
) -> "PreTrainedModel":
    """Load a causal LM in eval mode.

    name: "polyglot" (the embedded model), a folder, or a hub id org/name.
    dtype: None is bfloat16 on CUDA and float32 on the CPU.
    device_map: "auto" lets accelerate spread the layers over all GPUs; `device` is then only for the default dtype.

    The loader gets the dtype, because casting afterwards (`model.to(dtype)`) would round the rotary embedding's
    inv_freq. Remote code is never run, and nothing is unpickled. Raises UserError if the checkpoint cannot be read or
    lacks a weight, which transformers would fill with random numbers, and if a device map needs accelerate.
    """
    check_device_map(device_map)
    source = str(local_folder(resolve_model(name)))
    dtype = parse_dtype("auto", device) if dtype is None else dtype
    with waiting(f"loading {public_name(source)}"):
        model = _loaded(source, dtype, device_map)
        return (model if device_map else model.to(device)).eval()


def _loaded(source: str, dtype: torch.dtype, device_map: str | None) -> "PreTrainedModel":
    """Return the model of a folder, on the CPU or as the device map says. Raises UserError as `load_model` does."""
    quiet_transformers()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _dequantised_at_once(config)
        model, info = model_class(config).from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({"device_map": device_map} if device_map else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {source!r}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {source!r} are incomplete. Missing tensors: {len(missing)} (first: {missing[0]}). "
            "Fetch the model again."
        )
    _in_one_dtype(model, config, dtype)
    if (folder := Path(source)).parent.name == "snapshots":  # the hub's cache: the folder's name is the commit
        model.config._commit_hash = folder.name
    return model


def _in_one_dtype(model: "PreTrainedModel", config: Any, dtype: torch.dtype) -> None:
    """Widen what transformers 5.23 leaves in 16 bits of a float8 checkpoint that is loaded in float32.

    It gives the linear layers the dtype that was asked, and embeddings and norms their own: the first product fails.
    Parameters alone: a buffer is computed in the dtype that it needs. Widening is exact.
    """
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if method == "fp8" and dtype == torch.float32:
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


def _dequantised_at_once(config: Any) -> None:
    """Let a checkpoint of compressed-tensors be dequantised when it is loaded, not at its first forward pass.

    Either way every weight is a tensor of floats from then on. So it takes no more memory, and every mode can edit it.
    Weights whose columns are in an order of their own are left out: transformers 5.23 forgets the order
    (`weight_g_idx`) when it dequantises, and the numbers are wrong without a word.
    """
    quantised = getattr(config, "quantization_config", None)
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "compressed-tensors":
        return
    groups = (quantised.get("config_groups") or {}).values()
    if not any((group.get("weights") or {}).get("actorder") in (True, "group", "dynamic") for group in groups):
        quantised.setdefault("dequantize", True)


def model_class(config: Any) -> Any:
    """Return the auto class of transformers that makes the model of a configuration.

    A language model inside one of several modalities is loaded with the others: its checkpoint holds them all.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if "text_config" in config.sub_configs else AutoModelForCausalLM


def check_device_map(device_map: str | None) -> None:
    """Raise UserError if a device map is given, and accelerate, which makes it, is not installed."""
    if device_map and importlib.util.find_spec("accelerate") is None:
        raise UserError(f"--device-map {device_map} needs accelerate, which is not installed: pip install accelerate.")


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model. Raises UserError if there is none that can be read. name: as in `load_model`."""
    source = str(local_folder(resolve_model(name)))
    try:
        with waiting("loading the tokenizer"):
            quiet_transformers()
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from {source!r}: {_first_line(error)}") from error
    # If the files are missing, transformers returns an empty tokenizer of the model's class without a warning.
    if not tokenizer("0").input_ids:
        raise UserError(f"cannot load a tokenizer from {source!r}: it has no vocabulary. Is tokenizer.json missing?")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_device(name: str = "auto") -> torch.device:
    """Return the device of a name: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.

    Of several processes (`common.ranks`), each gets a GPU of its own for auto and cuda.

    Raises UserError for any other name, and for a CUDA device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}: choose from auto, cpu, cuda, cuda:N.")
    device = torch.device(name)
    if device == torch.device("cuda") and current().size > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise UserError(f"no device {str(device)!r}: this machine has {found} CUDA devices. Use --device cpu.")
    return device


def parse_dtype(name: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype of a name: float32, bfloat16 or float16. auto is bfloat16 on CUDA and float32 on the CPU.

    Raises UserError for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose from auto, {', '.join(DTYPES)}.")
    return getattr(torch, name)


def local_folder(source: str) -> Path:
    """Return the folder of a resolved model.

    Of a hub id, the files that belong to the checkpoint (`files.contents`) are fetched into the local cache first.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    if shown() and are_progress_bars_disabled():  # `quiet_transformers`; a download of gigabytes needs its bar
        enable_progress_bars()
    info = HfApi().model_info(source, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def read(name: str) -> str:
        return Path(hf_hub_download(source, name, revision=info.sha)).read_text(encoding="utf-8")

    found = select(sizes, read, f"model {source!r}")
    names = [glob.escape(name) for name in (*found.weights, *found.along)]
    return Path(snapshot_download(source, revision=info.sha, allow_patterns=names))


OLDER_FIELDS = {
    **{"n_embd": "hidden_size", "n_embed": "hidden_size", "d_model": "hidden_size"},
    **{"n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers"},
    **{"n_positions": "max_position_embeddings", "max_seq_len": "max_position_embeddings"},
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as a dict. Raises ModelError if it cannot be read or lacks a field that an edit needs.

    The fields of the language model inside a model of several modalities are those of the model, and some older names
    of fields are replaced by today's.
    """
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        kind, inner = config["model_type"], dict(config.get("text_config") or {})
        config |= inner
        config |= {new: config[old] for old, new in OLDER_FIELDS.items() if old in config and new not in config}
        config |= {"model_type": kind, "inner_type": inner.get("model_type")}
        for name, wanted in (("model_type", str), ("num_hidden_layers", int), ("hidden_size", int)):
            if not isinstance(config[name], wanted):
                raise TypeError(f"{name} is {config[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"config.json in {str(folder)!r} cannot be used ({what}).\nFetch it again, or add the field."
        ) from error
    return config
