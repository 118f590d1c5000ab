"""Measure the damage of an edit before it is written to a checkpoint or an adapter."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.damage.measure import headline, measure_damage
from kernel_surgery.damage.words import BROKEN
from kernel_surgery.models.load import load_model, load_tokenizer, parse_device, parse_dtype
from kernel_surgery.models.stored import located
from kernel_surgery.problems.generator import parse_languages
from kernel_surgery.quantised.formats import belonging, quantised_in
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

# Of the weights: the model itself, one weight that is rounded for a yardstick, and activations.
ROOM = 1.15
LOGITS = 750  # tokens of a language whose logits are held in float32: the original's, and a part of a pass


def languages_measured(asked: str | None, subspace: Subspace) -> tuple[str, ...]:
    """Return the languages in which damage is measured: `asked`, by default those of the fit with neutral text.

    Raises UserError for an unknown language.
    """
    fitted = (subspace.fit or {}).get("languages") or ()
    own = ",".join(name for name in fitted if name in LANGUAGES)
    return parse_languages(asked if asked is not None else own or "en,zh")


def memory_needed(folder: Path, dtype: torch.dtype, languages: int = 2) -> int:
    """Return the bytes that a checkpoint needs in memory while its damage is measured. It is loaded as floats."""
    places = located(folder)
    quantised = quantised_in(folder, places)
    packed = {name for of, how in quantised.items() for name in belonging(of, *how, places)}
    entries = {name: entry for name, (_, entry) in places.items() if name not in packed}
    numbers = sum(math.prod(entry.shape) for entry in entries.values())
    for matrix, form in quantised.values():
        held = matrix.pieces["numbers"][1]
        numbers += math.prod(matrix.shape) * (held.shape[0] if form.stacks(held) else 1)
    vocabulary = max((entry.shape[0] for name, entry in entries.items() if "embed" in name), default=0)
    return int(ROOM * numbers * dtype.itemsize) + 4 * LOGITS * languages * vocabulary


def memory_free(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def damage_before_writing(
    folder: Path,
    subspace: Subspace,
    mode: str,
    strength: float,
    *,
    languages: tuple[str, ...],
    force: int,
    skip: bool,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Return the damage as `measure_damage` does, without the yardsticks' figures and with "in_words".

    folder: the original checkpoint. mode: "baked" or "lora", as it will be written. languages: of the neutral text.
    force: how many objections are overruled. That the subspace is not of these weights is one, a broken model is one.
    skip: measure nothing, because the user asked for that, and return {"in_words": why}. say: called with the damage in
    words.

    A model that is too large for the GPU is measured on the CPU.

    Raises UserError for an edit that breaks the model, unless `force` overrules that too, and if the damage cannot be
    measured.
    """
    found = (
        {"in_words": headline(None, "--no-damage")}
        if skip
        else _measured(folder, subspace, mode, strength, languages, force)
    )
    say(found["in_words"])
    return found


def unmeasured(why: str) -> UserError:
    """Return the error for damage that cannot be measured: an edit that may break the model is not written unasked."""
    return UserError(
        f"the damage cannot be measured: {why}\nThe edit may break the model. Measure it on a machine that can hold "
        "the model, or add --no-damage: then it is written, and its card says that nothing was measured."
    )


def _place(folder: Path, languages: int) -> tuple[torch.device, torch.dtype]:
    """Return where a model is measured, and in which dtype. Raises UserError if it fits nowhere."""
    small = []
    for device in dict.fromkeys((parse_device(), torch.device("cpu"))):
        dtype = parse_dtype("auto", device)
        needed, free = memory_needed(folder, dtype, languages), memory_free(device)
        if needed <= free:
            return device, dtype
        small.append(f"on {device.type} the model needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    raise unmeasured("; ".join(small) + ".")


def _measured(
    folder: Path, subspace: Subspace, mode: str, strength: float, languages: tuple[str, ...], force: int
) -> dict[str, Any]:
    device, dtype = _place(folder, len(languages))
    try:
        tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), dtype, device)
    except KernelSurgeryError as error:
        raise unmeasured(str(error).splitlines()[0]) from error
    found = measure_damage(
        *(model, tokenizer, languages, [mode], subspace), strength=strength, force=force > 0, controls=False
    )
    words = headline(found)
    foreign = subspace.doubt(partial(fingerprint, model)) is not None
    if found["verdict"][mode]["word"] == BROKEN and force <= foreign:
        way = "With --force it is written anyway."
        if force:
            way = "One --force accepts the subspace of other weights. With a second one the edit is written anyway."
        raise UserError(f"{words}.\nChoose a lower rank or strength, fewer layers, or fit --method oblique. {way}")
    del found["yardsticks"]  # the verdict holds the ratios to them
    return {"in_words": words} | found
