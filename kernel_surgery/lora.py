"""Command: write the edit as an exact low-rank adapter, for engines that switch adapters per request.

    python -m kernel_surgery.lora --model SRC --subspace S --out DIR

The adapter is W + B A, in PEFT's LoRA format, in float32: A is a B_e^T W and B is -A_e, with the edit's A_e and B_e
(both U for an orthogonal edit). alpha = r makes its scaling 1.
The rank is the subspace's, padded with zeros to one that serving engines accept.

In exact arithmetic the adapter is the edit. In floating point it differs from hook and fused in one place. It subtracts
the component of the exact W h in the subspace; they subtract that of the MLP block's rounded output
(`numerics.bounds.applied_bound`).
"""

import argparse
from functools import partial
from pathlib import Path

from kernel_surgery.common.command import (
    Parser,
    add_base,
    add_damage,
    check_finite_strength,
    command_line,
    main,
    untouched,
)
from kernel_surgery.common.ending import Following, next_command, quoted, wrote
from kernel_surgery.common.files import check_output
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("lora", description="Write the edit as a LoRA adapter, which serving engines can switch per request.")
    p.add_argument("--model", required=True, help='"polyglot" (the embedded model), a folder, or a Hugging Face id')
    p.add_argument("--subspace", type=Path, required=True, help="subspace file from kernel_surgery.fit")
    p.add_argument("--out", type=Path, required=True, help="new folder for the adapter")
    more = "1 removes the subspace (default), 2 reflects it, 0 changes nothing"
    p.add_argument("--strength", type=float, default=1.0, help=more)
    add_base(p)
    add_damage(p)
    return p


@untouched("No adapter was written.")
def run(argv: list[str] | None = None) -> int:
    """Write the adapter and print its rank. Return 0. The subspace must belong to the checkpoint.

    Raises what `checkpoint.adapter.write_adapter` raises.
    """
    args = parser().parse_args(argv)
    check_finite_strength(args.strength)
    check_output(args.out)

    with waiting("starting"):
        from kernel_surgery.checkpoint.adapter import served_modules, write_adapter
        from kernel_surgery.damage.before import damage_before_writing, languages_measured
        from kernel_surgery.models.load import hub_id, local_folder, resolve_checkpoint
        from kernel_surgery.models.stored import layout_in
        from kernel_surgery.subspace.artifact import Subspace

    command, source = command_line("lora", argv), resolve_checkpoint(args.model)
    subspace = Subspace.load(args.subspace, force=bool(args.force))
    languages = languages_measured(args.languages, subspace)
    folder = local_folder(source)
    options = {"strength": args.strength, "model_id": args.model, "force": bool(args.force), "command": command}
    options["base"] = args.base_model
    how = {"languages": languages, "force": args.force, "skip": args.no_damage, "say": partial(print, flush=True)}
    options["measure"] = partial(damage_before_writing, folder, subspace, "lora", args.strength, **how)
    rank = write_adapter(folder, subspace, args.out, **options)
    if note := subspace.note_on(layout_in(folder)):
        print(note)
    print(f"{len(subspace.layers)} layers, rank {subspace.rank} padded to {rank}, strength {args.strength:g}")
    # One slot more than there are adapters: on a CPU, vLLM takes the last one for requests without an adapter.
    print(
        f"serve: vllm serve {quoted(hub_id(args.model) or folder)} --enable-lora --max-loras 2 --max-lora-rank {rank} "
        f"--lora-target-modules {' '.join(served_modules(layout_in(folder)))} --lora-modules "
        f"{quoted(f'edited={args.out}')}\n"
        "(--max-loras is one more than the adapters that are loaded; docs/engines.md says why)"
    )
    wrote(args.out)
    next_command(Following("verify", ["--adapter", args.out, "--model", args.model]))
    return 0


if __name__ == "__main__":
    main(run)
