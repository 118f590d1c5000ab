"""The declaration of a study, a TOML file: what it may say, and what is assumed where it is silent.

`kernel_surgery.study` shows a grid, and `studies.space` a search.
"""

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

from kernel_surgery.common.command import check_finite_strength
from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import CHATS, MODES, POOLS, SITES
from kernel_surgery.engines.texts import TRANSFORMERS, VLLM, refuse_own
from kernel_surgery.engines.variants import ENGINE_MODES
from kernel_surgery.models.architectures import default_layers, parse_layers
from kernel_surgery.ops.library import MAX_RANK
from kernel_surgery.problems.generator import parse_languages
from kernel_surgery.studies.space import read_search

DEFAULTS: dict[str, Any] = {
    **{"model": "polyglot", "mode": "fused", "languages": ["en", "zh"], "problems": 40, "max_new_tokens": 256},
    **{"seed": 0, "test": "chosen", "dtype": "auto", "device": "auto", "batch_size": 64},
    **{"chat": "auto", "thinking": False},
    **{"engine": TRANSFORMERS, "tensor_parallel": 1, "engine_args": {}},
}
GRID: dict[str, list[Any]] = {
    "rank": [10],
    "site": ["mlp_out"],
    "pool": ["last"],
    "strength": [1.0],
    "layers": ["middle"],
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "rank": int,
    "site": str,
    "pool": str,
    "strength": (int, float),
    "layers": str,
}


def read_grid(path: Path) -> dict[str, Any]:
    """Read a declaration and fill in the defaults.

    Raises UserError for unknown settings and for values that cannot be used.
    """
    try:
        declaration = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not TOML ({error}).") from error
    grid, search = declaration.pop("grid", {}), declaration.pop("search", None)
    if search is not None and grid:
        raise UserError(f"{str(path)!r} has a [grid] and a [search]: a study has one of them.")
    known = {*DEFAULTS, "budget"}
    for prefix, names, expected in (("", declaration, known), ("grid.", grid, {*GRID})):
        for name in names.keys() - expected:
            choose = ", ".join(f"{prefix}{choice}" for choice in sorted(expected))
            raise UserError(f"{str(path)!r}: unknown setting {prefix + name!r}: choose from {choose}.")
    settings = DEFAULTS | declaration
    settings["budget"] = declaration.get("budget", settings["max_new_tokens"])
    settings["grid"] = GRID | grid
    for name, values in settings["grid"].items():
        listed = values if isinstance(values, list) else []
        if not listed or any(not isinstance(v, _KINDS[name]) or isinstance(v, bool) for v in listed):
            raise UserError(f"{str(path)!r}: grid.{name} is {values!r}, not a list such as {GRID[name]!r}.")
    for strength in settings["grid"]["strength"]:
        check_finite_strength(strength)
    choices: tuple[str, ...]
    for name, choices in (("site", SITES), ("pool", POOLS)):
        for value in settings["grid"][name]:
            if value not in choices:
                raise UserError(f"{str(path)!r}: grid.{name} has {value!r}; known: {', '.join(choices)}.")
    for name, choices in (("mode", MODES[1:]), ("test", ("chosen", "all")), ("chat", CHATS)):
        if settings[name] not in choices:
            raise UserError(f"{str(path)!r}: {name} is {settings[name]!r}; known: {', '.join(choices)}.")
    given = settings["problems"] if isinstance(settings["problems"], list) else [settings["problems"]]
    if not given or not (all(isinstance(word, str) for word in given) or isinstance(settings["problems"], int)):
        raise UserError(
            f"{str(path)!r}: problems is {settings['problems']!r}, neither a whole number nor files of problems."
        )
    number = ("problems",) if isinstance(settings["problems"], int) else ()
    for name in (*number, "max_new_tokens", "budget", "batch_size"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise UserError(f"{str(path)!r}: {name} is {settings[name]!r}, not a whole number of at least 1.")
    if isinstance(seed := settings["seed"], bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"{str(path)!r}: seed is {seed!r}, not a whole number from 0 to 2^31 - 1.")
    if not isinstance(settings["thinking"], bool):
        raise UserError(f"{str(path)!r}: thinking is {settings['thinking']!r}, not true or false.")
    if settings["budget"] > settings["max_new_tokens"]:
        raise UserError(
            f"{str(path)!r}: budget is {settings['budget']}, above max_new_tokens, {settings['max_new_tokens']}."
        )
    _check_engine(settings, repr(str(path)), searches=search is not None)
    if search is not None:
        if settings["test"] != "chosen":
            raise UserError(f"{str(path)!r}: test is {settings['test']!r}: a search reports its choice alone.")
        del settings["grid"]
        settings["search"] = read_search(search, repr(str(path)))
    settings["languages"] = list(parse_languages(",".join(settings["languages"])))
    return settings


def _check_engine(settings: dict[str, Any], where: str, *, searches: bool) -> None:
    """Check who writes the texts. where: the file, for the message. Raises UserError for what an engine lacks."""
    engine, devices, more = (settings[name] for name in ("engine", "tensor_parallel", "engine_args"))
    if engine not in (TRANSFORMERS, VLLM):
        raise UserError(f"{where}: engine is {engine!r}; known: {TRANSFORMERS}, {VLLM}.")
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise UserError(f"{where}: tensor_parallel is {devices!r}, not a whole number of at least 1.")
    try:
        json.dumps(more)
    except TypeError as error:
        raise UserError(f"{where}: engine_args cannot be recorded as JSON ({error}).") from error
    if not isinstance(more, dict):
        raise UserError(f"{where}: engine_args is {more!r}, not a table such as {{enforce_eager = true}}.")
    refuse_own(more, f"{where}: engine_args")
    if engine == TRANSFORMERS:
        for name, given in (("tensor_parallel", devices != 1), ("engine_args", bool(more))):
            if given:
                raise UserError(f'{where}: {name} is for engine = "{VLLM}", which is not declared.')
        return
    if searches:
        raise UserError(
            f'{where}: a [search] measures every setting in the loaded model: leave out engine = "{engine}", or '
            "declare a [grid]."
        )
    if settings["mode"] not in ENGINE_MODES:
        choose = ", ".join(ENGINE_MODES[1:])
        raise UserError(f"{where}: mode is {settings['mode']!r}, which {engine} does not have; it has {choose}.")


def cells_of(grid: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return {name: setting} of every cell, in the order of the declaration. The name spells out the setting."""
    cells = {}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        cells[" ".join(f"{name}={value}" for name, value in setting.items())] = setting
    return cells


def check_cells(cells: dict[str, dict[str, Any]], mode: str, config: dict[str, Any]) -> None:
    """Check the layers and ranks of all cells against a model's configuration.

    Raises ModelError for layers that it does not have, and KernelSurgeryError for a rank that it cannot have.
    """
    most = min(config["hidden_size"], MAX_RANK if mode == "fused" else config["hidden_size"])
    for setting in cells.values():
        layers_of(setting["layers"], config["num_hidden_layers"])
        if not 1 <= setting["rank"] <= most:
            raise KernelSurgeryError(f"grid.rank has {setting['rank']}: choose 1 to {most} for this model and mode.")


def layers_of(text: str, n_layers: int) -> list[int]:
    return list(default_layers(n_layers) if text == "middle" else parse_layers(text, n_layers))
