"""The edit in a checkpoint's files: safetensors in, safetensors out, nothing else changed; and back again.

One tensor is in memory at a time, the rest is copied by the kernel (`stream.py`). The new folder is built under a
temporary name beside its destination and renamed when it is complete: a destination that exists is whole. In it,
`provenance.json` says what was done, to what, with what; `kernel_surgery/undo.safetensors` holds what was removed,
U^T W of every edited tensor, from which `--undo` restores the weights to within a rounding.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli, stream
from kernel_surgery.provenance import (
    PROVENANCE,
    check_absent,
    new_folder,
    opened,
    read_provenance,
    write_bases,
    write_provenance,
)
from kernel_surgery.stream import sha256

if TYPE_CHECKING:
    import torch

    from kernel_surgery.subspace import Subspace

_DOWN_PROJ = re.compile(r"model\.layers\.(\d+)\.mlp\.down_proj\.(weight|bias)")
# In a folder of its own: some engines load every *.safetensors that lies beside the weights.
UNDO = Path("kernel_surgery") / "undo.safetensors"
BASE_CARD = "README.base.md"
# Weights in other formats would be the original's, unedited, in a folder that says it is edited.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def edited_name(name: str, layers) -> int | None:
    """The layer of a tensor that the edit of these layers concerns, else None."""
    match = _DOWN_PROJ.fullmatch(name)
    return int(match[1]) if match and int(match[1]) in layers else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


def located(folder: Path) -> dict[str, tuple[Path, stream.Entry]]:
    """Where every tensor of a checkpoint lies: {name: (file, entry)}."""
    layouts = [stream.read_layout(file) for file in weight_files(folder)]
    return {name: (layout.path, entry) for layout in layouts for name, entry in layout.entries.items()}


def local_folder(source: str) -> Path:
    """The folder of a resolved model: itself, or the hub's files in the local cache, fetched if need be."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.md", "*.jinja"]))


def read_config(folder: Path) -> dict:
    """config.json. Raises ValueError for one that is missing, cannot be read, or lacks what an edit asks of it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, kind in (("model_type", str), ("num_hidden_layers", int), ("hidden_size", int)):
            if not isinstance(config[name], kind):
                raise TypeError(f"{name} is {config[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"config.json in {str(folder)!r} cannot be used ({what}). Nothing was written.") from error
    return config


def revision_of(folder: Path, subspace: "Subspace") -> str | None:
    """The commit of a checkpoint that lies in the hub's cache; else the one that the subspace was measured on."""
    return folder.name if folder.parent.name == "snapshots" else subspace.revision


def check_source(folder: Path, layouts: list[stream.Layout], subspace: "Subspace", *, force: bool = False) -> None:
    """Refuse a checkpoint that the subspace was not fitted on, or of unknown architecture; reads a few tensors."""
    from kernel_surgery.sites import ARCHITECTURES
    from kernel_surgery.subspace import EMBEDDING, sample_weights

    config = read_config(folder)
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(
            f"cannot edit a {config.get('model_type')!r} checkpoint: known architectures are "
            f"{', '.join(ARCHITECTURES)}.\nNothing was written."
        )
    n_layers = config["num_hidden_layers"]
    where = {name: layout.path for layout in layouts for name in layout.entries}
    wanted = [EMBEDDING, *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(n_layers))]
    if missing := [name for name in wanted if name not in where]:
        raise ValueError(f"{str(folder)!r} has no tensor {missing[0]}. Nothing was written.")

    def weights():
        for name in wanted:
            with opened(where[name]) as file:
                yield name, file.get_tensor(name)

    subspace.check(config["hidden_size"], n_layers, lambda: sample_weights(weights()), str(folder), force=force)


Edit = Callable[[str, "torch.Tensor"], "torch.Tensor"]


def _write_file(layout: stream.Layout, target: Path, edits: dict[str, Edit], advance) -> stream.Follower:
    """One weight file, front to back: edited tensors computed, everything between them copied. Its hash, under way."""
    edited = sorted((layout.entries[name] for name in edits if name in layout.entries), key=lambda e: e.begin)
    with layout.path.open("rb") as source, target.open("w+b") as out:
        shared = stream.share_blocks(source.fileno(), out.fileno())
        follower = stream.Follower(target, layout.size)
        done = 0

        def reached(upto: int) -> None:
            nonlocal done
            follower.ready(upto)
            advance(upto - done)
            done = upto

        try:
            for entry in [*edited, None]:
                upto = layout.size if entry is None else entry.begin
                if shared:
                    reached(upto)
                else:
                    stream.copy_range(source.fileno(), out.fileno(), done, upto, reached)
                if entry is not None:
                    tensor = edits[entry.name](entry.name, stream.read_tensor(source.fileno(), entry))
                    stream.write_tensor(out.fileno(), entry, tensor)
                    del tensor  # before the next one is read
                    reached(entry.end)
        except BaseException:
            follower.give_up()
            raise
    return follower


def others(source: Path) -> tuple[list[Path], list[str]]:
    """(files that go along as they are, names of files that are left out)."""
    along, left_out = [], []
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == PROVENANCE:
            continue
        if file.suffix in _OTHER_WEIGHTS:
            left_out.append(file.name)
        else:
            along.append(file)
    weights = {file.name for file in weight_files(source)}
    return along, [name for name in left_out if name not in weights]


def _rewrite(
    source: Path,
    destination: Path,
    layouts: list[stream.Layout],
    edits: dict[str, Edit],
    rename: Callable[[str], str | None],
    finish: Callable[[Path], dict],
) -> None:
    """`source` with some tensors edited as the new folder `destination`; `rename` gives the names under which
    other files go along (None: not at all); `finish(folder)` adds files and returns the record, to which the hash of
    every file is added. All of it or nothing."""
    total = sum(layout.size for layout in layouts)
    with (
        new_folder(destination, total) as temporary,
        cli.bar(total, destination.name, unit="B", unit_scale=True, leave=False) as bar,
    ):
        followers = {}
        for layout in layouts:
            name = layout.path.name
            followers[name] = _write_file(layout, temporary / name, edits, bar.update)
        along, left_out = others(source)
        for file in along:
            if name := rename(file.name):
                shutil.copy(file, temporary / name)
        record = finish(temporary) | {"left_out": left_out}
        write_provenance(temporary, record, {name: follower.hexdigest() for name, follower in followers.items()})


def original_layouts(source: Path) -> list[stream.Layout]:
    """The weight files of a checkpoint that was not baked before. Raises ValueError for one that was."""
    if (source / PROVENANCE).exists():
        raise ValueError(
            f"{str(source)!r} was baked before (it holds {PROVENANCE}): the edit again would not remove anything more "
            "at strength 1 and would compound at any other. Nothing was written. Take the original checkpoint."
        )
    return [stream.read_layout(file) for file in weight_files(source)]


def editable(layouts: list[stream.Layout], bases: dict) -> list[stream.Entry]:
    """The tensors that the edit concerns: weights, and biases where there are any. Refuses what cannot be edited."""
    found = []
    for layout in layouts:
        for name, entry in layout.entries.items():
            layer = edited_name(name, bases)
            if layer is None:
                continue
            basis = bases[layer]
            if entry.dtype not in ("F32", "BF16", "F16"):
                raise ValueError(
                    f"cannot edit {name}: it is stored as {entry.dtype}, not as float32, bfloat16 or float16.\n"
                    "Nothing was written. Take the unquantised checkpoint, or use --mode fused, which leaves weights "
                    "alone."
                )
            if entry.shape[0] != basis.shape[0]:
                raise ValueError(
                    f"cannot edit {name}: basis has d_model={basis.shape[0]}, the tensor is {entry.shape}.\n"
                    "Nothing was written. Fit a subspace on this model."
                )
            found.append(entry)
    missing = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in bases} - {entry.name for entry in found}
    if missing:
        raise ValueError(f"{str(layouts[0].path.parent)!r} has no tensor {min(missing)}. Nothing was written.")
    return found


def _card(record: dict) -> str:
    """A model card: what the weights are, and how to take the edit back."""
    model, layers, a = record["model_id"], record["layers"], record["strength"]
    lines = [
        *("---", f"base_model: {json.dumps(model)}", "tags: [kernel-surgery]", "---", ""),
        *(f"# {Path(model).name}, language subspace removed", ""),
        f"These are the weights of {model} with one edit: in layers {layers[0]} to {layers[-1]} ({len(layers)} in all)",
        f"W of `mlp.down_proj` became W - a U (U^T W), with U of rank {record['rank']} and a = {a:g}.",
        "Every other tensor is byte for byte the original's.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        f"`{PROVENANCE}` has the SHA-256 of every file and says how the subspace was found. `{UNDO.as_posix()}`",
        "has what was removed:",
        "",
        "    python -m kernel_surgery.bake --undo --model THIS --out RESTORED",
        "",
        f"takes the edit back to within a rounding. The original's card, where it had one, is `{BASE_CARD}`.",
    ]
    return "\n".join(lines) + "\n"


def bake_checkpoint(
    source: Path,
    subspace: "Subspace",
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
    command: str | None = None,
) -> dict[str, tuple[float, float]]:
    """Write `source` with the edit in its weights to the new folder `destination`; {tensor: (norm before, after)}.

    Float32 arithmetic, one rounding: `reference.baked_element_bound`. Raises what `check_source` raises,
    FileExistsError if `destination` exists, ValueError for a source that was baked before (by its provenance; at
    strength 1 also by its weights), for a layer whose down_proj is not in the files, and for what cannot be edited,
    read or written; on any exception `destination` does not exist and `source` is as it was.
    """
    import torch
    from safetensors.torch import save_file

    from kernel_surgery.bake import remove
    from kernel_surgery.reference import storage_noise, storage_noise_at_most

    source, destination = Path(source), Path(destination)
    check_absent(destination)
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    norms: dict[str, tuple[float, float]] = {}
    found = editable(layouts, subspace.bases)
    # Made before the first weight is read: small tensors that stay, between large ones that come and go, would keep the
    # heap from shrinking (500 MB after 32 layers of 8 MB).
    removed: dict[str, torch.Tensor] = {}
    for entry in found:
        rank = subspace.bases[edited_name(entry.name, subspace.bases)].shape[1]
        wide = torch.float64 if entry.dtype == "F64" else torch.float32
        removed[entry.name] = torch.empty(rank, *(entry.shape[1:] or (1,)), dtype=wide)

    def edit(name: str, weight: torch.Tensor) -> torch.Tensor:
        basis = subspace.bases[edited_name(name, subspace.bases)]
        edited, inside = remove(weight, basis, strength)
        # One NaN or Inf in a column makes all of that column's inside NaN or Inf.
        if not torch.isfinite(inside).all():
            raise ValueError(f"cannot bake {name}: it holds NaN or Inf. Nothing was written.")
        # Element by element the noise takes as long as the edit: looked at where its bound does not settle it.
        held, matrix = float(inside.norm()), strength == 1 and weight.ndim == 2
        if matrix and held < 3 * storage_noise_at_most(weight, basis) and held < 3 * storage_noise(weight, basis):
            raise ValueError(
                f"cannot bake {name}: it holds no more of the subspace than rounding leaves (norm(U^T W) = "
                f"{float(inside.norm()):.3g}): it was baked with this subspace before. Nothing was written. "
                "Bake the original checkpoint."
            )
        norms[name] = float(weight.norm(dtype=torch.float32)), float(edited.norm(dtype=torch.float32))
        removed[name].copy_(inside)
        return edited

    def finish(folder: Path) -> dict:
        (folder / UNDO).parent.mkdir()
        tensors = {f"basis.{layer}": basis.contiguous() for layer, basis in subspace.bases.items()}
        tensors |= {f"inside.{name}": inside.contiguous() for name, inside in removed.items()}
        save_file(tensors, folder / UNDO, metadata={"strength": repr(strength)})
        record = {"kind": "baked", "model_id": model_id or str(source), "strength": strength}
        record |= {"layers": list(subspace.layers), "rank": subspace.rank, "site": subspace.site}
        record |= {"revision": revision_of(source, subspace), "note": subspace.note, "fit": subspace.fit}
        record["command"] = command
        cli.write_atomic(folder / "README.md", _card(record))
        return record

    edits = {entry.name: edit for entry in found}
    _rewrite(source, destination, layouts, edits, lambda n: BASE_CARD if n == "README.md" else n, finish)
    return norms


def undo_checkpoint(source: Path, destination: Path, *, command: str | None = None) -> dict[str, tuple[float, float]]:
    """Write a baked checkpoint with its edit taken back to the new folder `destination`; {tensor: (norm before,
    after)}.

    W = W' + a U (U^T W), from what was kept beside the weights; within 1.01 u (|W| + |W'|) and float32's own errors,
    not bit for bit. Raises FileExistsError, or ValueError for a folder that is not a baked checkpoint or whose files
    are not those that were written; on any exception `destination` does not exist and `source` is as it was.
    """
    import torch

    from kernel_surgery.reference import computed_in, in_full

    source, destination = Path(source), Path(destination)
    check_absent(destination)
    record = read_provenance(source)
    for name, digest in record["sha256"].items():
        if not (source / name).is_file() or sha256(source / name) != digest:
            raise ValueError(
                f"{str(source / name)!r} is not the file that was written when this checkpoint was baked: undoing the "
                "edit would not give back the original. Nothing was written."
            )
    layouts = [stream.read_layout(file) for file in weight_files(source)]
    with opened(source / UNDO) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    norms: dict[str, tuple[float, float]] = {}

    def edit(name: str, weight: torch.Tensor) -> torch.Tensor:
        basis, inside = kept[f"basis.{_DOWN_PROJ.fullmatch(name)[1]}"], kept[f"inside.{name}"]
        wide = computed_in(weight)
        columns = weight.to(wide).reshape(weight.shape[0], -1)
        with in_full(weight):
            back = torch.addmm(columns, basis.to(wide), inside.to(wide), alpha=record["strength"])
        back = back.reshape(weight.shape).to(weight.dtype)
        norms[name] = float(weight.norm(dtype=torch.float32)), float(back.norm(dtype=torch.float32))
        return back

    def finish(folder: Path) -> dict:
        write_bases(folder, {int(name[6:]): basis for name, basis in kept.items() if name.startswith("basis.")})
        about = {"kind": "restored", "model_id": record["model_id"], "strength": record["strength"]}
        return about | {"rank": record["rank"], "layers": record["layers"], "command": command}

    names = {"README.md": None, BASE_CARD: "README.md"}
    edits = {name.removeprefix("inside."): edit for name in kept if name.startswith("inside.")}
    _rewrite(source, destination, layouts, edits, lambda n: names.get(n, n), finish)
    return norms
