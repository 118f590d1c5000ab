"""The modes by name: the original, and the four places where the edit can be made."""

import contextlib

MODES = ("original", "hook", "baked", "fused", "lora")


def modes_of(name: str) -> list[str]:
    """The modes that a run of `--mode name` compares: the original, and the one named or all."""
    return list(MODES) if name == "all" else list(dict.fromkeys(["original", name]))


def applied(mode: str, model, subspace, strength: float, force: bool):
    """The context manager that holds the edit (or none, for the original); yields its record."""
    if mode == "original":
        return contextlib.nullcontext()
    return applier_of(mode)(model, subspace, strength, force=force)


def applier_of(mode: str):
    """The applier that a mode's name stands for."""
    from kernel_surgery import adapted, baked, fused, hooked

    return {"hook": hooked, "baked": baked, "fused": fused, "lora": adapted}[mode]


def describe_edit(edit) -> dict:
    """What results.json says of one applied edit."""
    return {
        "provider": edit.provider,
        "layers": list(edit.layers),
        "strength": edit.strength,
        "note": edit.note,
        "norms": {str(layer): list(pair) for layer, pair in (edit.norms or {}).items()},
        "reach": {str(layer): reach for layer, reach in edit.reach.items()},
        "fallbacks": {str(layer): reason for layer, reason in edit.fallbacks.items()},
    }
