"""What a user asks of the plugin: one JSON object, under "kernel_surgery" of vLLM's `additional_config`.

    {"kernel_surgery": {"subspace": "subspace.safetensors", "strength": 1, "layers": "9-26", "force": false}}

Only "subspace" is required. Nothing here imports vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import PLUGIN
from kernel_surgery.models.architectures import parse_layers
from kernel_surgery.subspace.artifact import Subspace

KEY = PLUGIN
_FIELDS = ("subspace", "strength", "layers", "force")


@dataclass(frozen=True)
class PluginSettings:
    """The plugin's settings.

    subspace: the file. strength: a in y - a A (B^T y - c), which the subspace's schedule multiplies. layers: the layers
    to edit, of those that the file holds; None means all of them. force: accept a subspace of unknown origin, or one
    fitted on another model.
    """

    subspace: Path
    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    force: bool = False

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON, in the form that `read_settings` takes."""
        found: dict[str, Any] = {"subspace": str(self.subspace), "strength": self.strength, "force": self.force}
        return found if self.layers is None else found | {"layers": list(self.layers)}

    def load(self) -> Subspace:
        """Return the subspace with the layers that are asked. Raises what `Subspace.load` and `select` raise."""
        subspace = Subspace.load(self.subspace, force=self.force)
        return subspace if self.layers is None else subspace.select(self.layers)


def read_settings(additional_config: object) -> PluginSettings | None:
    """Return the settings in vLLM's `additional_config`, or None if it says nothing of this plugin.

    Raises KernelSurgeryError for a field that is unknown, missing or of the wrong type.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    asked = additional_config[KEY]

    def refuse(what: str) -> KernelSurgeryError:
        return KernelSurgeryError(
            f'additional_config["{KEY}"]: {what}. The engine was not started. Expected an object such as '
            '{"subspace": PATH, "strength": 1, "layers": "9-26"}.'
        )

    if not isinstance(asked, Mapping):
        raise refuse(f"it is {asked!r}, not an object")
    if unknown := sorted(set(asked) - set(_FIELDS)):
        raise refuse(f"there is no field {unknown[0]!r}, only {', '.join(_FIELDS)}")
    path, strength, layers, force = (asked.get(name) for name in _FIELDS)
    if not isinstance(path, str) or not path:
        raise refuse(f'"subspace" is {path!r}, not the path of a file')
    if isinstance(strength, bool) or not isinstance(strength, int | float | None):
        raise refuse(f'"strength" is {strength!r}, not a number')
    if not isinstance(force, bool | None):
        raise refuse(f'"force" is {force!r}, not true or false')
    try:
        check_finite_strength(strength)
        chosen = None if layers is None else _layers(layers)
    except KernelSurgeryError as error:
        raise refuse(str(error).rstrip(".")) from error
    return PluginSettings(Path(path).expanduser(), 1.0 if strength is None else float(strength), chosen, bool(force))


def _layers(asked: object) -> tuple[int, ...]:
    """Return layers that are written as "9-26" or as a list of numbers."""
    if isinstance(asked, list) and asked and all(type(layer) is int for layer in asked):
        asked = ",".join(map(str, asked))
    if not isinstance(asked, str):
        raise KernelSurgeryError(f'"layers" is {asked!r}, neither a text such as "9-26" nor a list of numbers')
    # Whether the model has them is checked when its number of layers is known.
    return tuple(parse_layers(asked, 1_000_000))
