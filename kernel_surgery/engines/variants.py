"""What an engine loads for each mode: a folder of weights, and what is added to it.

    original    the model's own folder
    baked       a checkpoint with the edit in its weights
    lora        the model's folder, and an adapter that requests name
    fused       the model's folder, and the plugin (`engines.plugin`)

There is no hook in an engine. The baked checkpoint and the adapter are written here, unless they are there already.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.common.errors import UserError
from kernel_surgery.engines.settings import PluginSettings
from kernel_surgery.subspace.artifact import Subspace

ENGINE_MODES = ("original", "baked", "fused", "lora")


@dataclass(frozen=True)
class Variant:
    """What an engine loads for one mode.

    model: the folder of the weights. tokenizer: the folder of the original, whose tokenizer all modes use.
    settings: of the plugin, or None. adapter: the folder of an adapter, or None.
    """

    mode: str
    model: Path
    tokenizer: Path
    settings: PluginSettings | None = None
    adapter: Path | None = None


def engine_modes(name: str, engine: str) -> list[str]:
    """Return the modes that `--mode name` compares in an engine. Raises UserError for one that an engine does not have.

    engine: its name, for the message.
    """
    if name == "all":
        return list(ENGINE_MODES)
    if name not in ENGINE_MODES:
        raise UserError(
            f"--mode {name} does not exist in {engine}: it runs no PyTorch hooks of ours. Choose from "
            f"{', '.join(ENGINE_MODES)}, all."
        )
    return list(dict.fromkeys(["original", name]))


@contextmanager
def variants(
    modes: Iterable[str],
    source: Path,
    subspace: Subspace | None,
    strength: float = 1.0,
    *,
    written: Mapping[str, Path] | None = None,
    force: bool = False,
    beside: Path | None = None,
) -> Iterator[tuple[dict[str, Variant], Path]]:
    """Write what the modes load. Yield {mode: `Variant`}, and the folder that holds it, which is removed at the end.

    source: folder of the original checkpoint. subspace, strength: the edit; the subspace's schedule multiplies the
    strength. written: {mode: a baked checkpoint or an adapter that is used as it is}. force: accept a subspace of
    unknown origin or of another model. beside: write next to this path; by default in the
    system's temporary folder. A baked checkpoint is as large as the original.

    Raises what `bake_checkpoint` and `write_adapter` raise.
    """
    place = None if beside is None else beside.absolute().parent
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".kernel-surgery-", dir=place) as name:
        work, found, given = Path(name), dict[str, Variant](), written or {}
        for mode in modes:
            if mode == "original":
                found[mode] = Variant(mode, source, source)
                continue
            assert subspace is not None  # the mode edits
            if mode == "baked":
                folder = given.get(mode, work / "baked")
                if mode not in given:
                    bake_checkpoint(source, subspace, folder, strength=strength, force=force)
                found[mode] = Variant(mode, folder, source)
            elif mode == "lora":
                folder = given.get(mode, work / "adapter")
                if mode not in given:
                    write_adapter(source, subspace, folder, strength=strength, force=force)
                found[mode] = Variant(mode, source, source, adapter=folder)
            else:
                file = work / "subspace.safetensors"
                subspace.save(file)
                found[mode] = Variant(mode, source, source, PluginSettings(file, strength, None, force))
        yield found, work
