"""The notes that every output of an evaluation shows beside its figures: what a reader must know of its origin."""

from collections.abc import Mapping, Sequence
from typing import Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.engines.texts import SERVER
from kernel_surgery.evaluation.judging import FROM_TEXT, Cells
from kernel_surgery.evaluation.options import Asked, Options
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.subspace.artifact import Subspace

# How much of a layer the fused mode took into one operator, in words.
FUSED = {
    "output": "only the edit is fused",
    "add": "the edit is fused with the residual addition only",
    "norm": "the edit is fused with the residual addition and the norm",
}


def fitted_on(subspace: Subspace, asked: Asked | None) -> str | None:
    """Return the split that the subspace was fitted on, of the problems that are asked; None if it says none.

    "elsewhere" are problems of another origin: generated ones and those of a file share none. Of two files nothing is
    known.
    """
    fit, here = subspace.fit or {}, {} if asked is None else asked.record
    digests = (fit.get("problems_sha256"), here.get("problems_sha256"))
    if "split" in fit and digests[0] != digests[1]:
        return "another file" if all(digests) else "elsewhere"
    return fit.get("split")


def check_held_out(subspace: Subspace | None, options: Options, asked: Asked | None = None) -> None:
    """Raise UserError if the subspace was fitted on the problems that are asked, unless `force` is set."""
    split = fitted_on(subspace, asked) if subspace is not None else None
    if options.strict and split == "test" and not options.force:
        raise UserError(
            "the subspace was fitted on the test problems, on which it would be evaluated here. Collect on the fit "
            "split. With --force the evaluation runs, and its outputs say so."
        )


def chat_notes(subspace: Subspace | None, options: Options, chat: Chat) -> list[str]:
    """Return the notes on how the prompts were put: as a chat, and unlike those of the fit."""
    notes = []
    if chat.on:
        notes.append(f"prompts are put as the user's turn of the chat template{', thinking' * chat.thinking}")
    if not options.strict and (options.chat == "on" or options.thinking):
        notes.append("expag puts prompts as they are, as the reference script did: --chat and --thinking do not count")
    fit = (subspace.fit if subspace is not None else None) or {}
    # Collections made before there was a choice have a split, but say nothing of a chat: it was off.
    fitted = Chat(fit.get("chat", "off" if "split" in fit else None) == "on", bool(fit.get("thinking", False)))
    if ("chat" in fit or "split" in fit) and (fitted.on, fitted.thinking) != (chat.on, chat.thinking):
        was, now = (f"chat {'on' if c.on else 'off'}{', thinking' * c.thinking}" for c in (fitted, chat))
        notes.append(f"the subspace was fitted on prompts with {was}, but is evaluated with {now}")
    return notes


def server_notes(options: Options) -> list[str]:
    """Return the notes on what is not known of a server."""
    if options.engine != SERVER:
        return []
    names = ", ".join(f"{mode} is {name!r}" for mode, name in options.engine_record["served"].items())
    what = "its weights" if options.mode == "original" else "its weights and edits, and the strength"
    notes = [f"a server wrote the texts ({names}): {what} are not checked here"]
    if options.text_prompts:
        notes.append("prompts were sent as text: the server made their tokens, whose number alone is checked")
    return notes


def text_notes(options: Options, cells: Cells) -> list[str]:
    """Return the notes on what a server wrote: without token ids, or the same as the original.

    cells: the samples of every mode and language.
    """
    notes, modes = [], dict.fromkeys(mode for mode, _ in cells)
    remade = dict.fromkeys(mode for (mode, _), cell in cells.items() if any(FROM_TEXT in sample for sample in cell))
    if remade:
        notes.append(
            f"{', '.join(remade)}: the server returned no token ids, so they were made of the texts again, perhaps not "
            "as the model wrote them: FAT and other counts of tokens depend on that"
        )
    for mode in modes if options.engine == SERVER else ():
        own = [(cell, cells["original", lang]) for (of, lang), cell in cells.items() if of == mode != "original"]
        if own and all(a["text"] == b["text"] for pair in own for a, b in zip(*pair, strict=True)):
            notes.append(
                f"{mode}: every text is the original's. A mild edit may do that, and a server that does not edit does: "
                "compare a log probability (docs/how-to/serve-with-vllm.md)"
            )
    return notes


def floor_notes(modes: Mapping[str, Mapping[str, Any]], power: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note for each language in which the original solves too little for a drop to be shown.

    modes, power: of results.json. An accuracy falls by itself at most.
    """
    notes = []
    for row in power:
        original, smallest = modes["original"][row["language"]], row["smallest_shown"]
        if smallest is not None and original["accuracy"] < smallest:
            notes.append(
                f"{row['language']}: the original solves {original['correct']} of {original['n']}, so no drop in "
                f"accuracy could be shown there (at least {smallest:.3f} is needed). Ask easier problems, or more"
            )
    return notes


def notes_of(
    subspace: Subspace | None,
    edits: dict[str, dict[str, Any]],
    options: Options,
    chat: Chat = OFF,
    asked: Asked | None = None,
) -> list[str]:
    """Return the notes that every output shows beside the figures."""
    notes = [edit["note"] for edit in edits.values() if edit["note"]]
    if options.written is not None:
        folder, kind = options.written
        what = "weights" if kind == "baked" else "adapter"
        notes.append(f"{options.mode}: the {what} as written in {folder.name}, at strength {options.strength:g}")
    for edit in edits.values():
        for reason in dict.fromkeys(edit["fallbacks"].values()):
            layers = [layer for layer, why in edit["fallbacks"].items() if why == reason]
            fused = FUSED[edit["reach"][layers[0]]]
            notes.append(f"in layers {', '.join(layers)}, {fused}: {reason}")
    if not options.strict:
        notes.append("expag: the 20 problems and the scoring of the reference script, only to compare with its figures")
    elif subspace is not None:
        split = fitted_on(subspace, asked)
        if split == "test":
            notes.append("the subspace was fitted on the test problems: these figures are not held out")
        elif split is None:
            notes.append("the subspace does not say which problems it was fitted on: they may be the test problems")
        elif split == "another file":
            fitted = (subspace.fit or {}).get("problems_file")
            notes.append(f"the subspace was fitted on problems of another file, {fitted}: some may be among these")
    if asked is not None:
        own = (subspace.fit or {}).get("problems_sha256") if subspace is not None else None
        alike = asked.alike if own and own == asked.record.get("problems_sha256") else None
        notes += filter(None, [asked.note, alike])
    return list(dict.fromkeys([*notes, *chat_notes(subspace, options, chat), *server_notes(options)]))
