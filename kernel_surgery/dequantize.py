"""Command: make a checkpoint of a GGUF file, so that it can be baked, adapted and served.

    python -m kernel_surgery.dequantize FILE.gguf --out DIR
    python -m kernel_surgery.dequantize smollm2

The checkpoint is in float32, which holds every dequantised number exactly. `smollm2` fetches SmolLM2-135M-Instruct
(98 MB), checks its SHA-256, and writes it where `--model smollm2` looks for it. It needs the packages gguf and
accelerate: pip install gguf accelerate.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, main, untouched
from kernel_surgery.common.ending import Following, free, next_command, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.progress import waiting

SMOLLM2_SIZE = 760_000_000  # bytes: the package, the file in it, and the checkpoint


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("dequantize", description="Make a checkpoint of a GGUF file, in float32.")
    p.add_argument("model", help='a GGUF file, or "smollm2": SmolLM2-135M-Instruct, which is fetched first (98 MB)')
    p.add_argument("--out", type=Path, help="new folder for the checkpoint (smollm2 has a default)")
    return p


@untouched("No checkpoint was written.")
def run(argv: list[str] | None = None) -> int:
    """Write the checkpoint. Return 0. Raises UserError for a file that is no GGUF file and for a failed download."""
    args = parser().parse_args(argv)
    with waiting("starting"):
        from kernel_surgery.models.gguf import card_of, fetch_smollm2, is_gguf, size_in_float32, write_checkpoint
        from kernel_surgery.models.load import SMOLLM2_FOLDER, quiet_transformers

    if args.model != "smollm2" and not is_gguf(args.model):
        raise UserError(f"{args.model!r} is not a GGUF file. Give a file that ends in .gguf, or smollm2.")
    out = args.out or (SMOLLM2_FOLDER if args.model == "smollm2" else None)
    if out is None:
        raise UserError("--out is missing: a new folder for the checkpoint.")
    if args.model == "smollm2" and args.out is None and (out / "config.json").is_file():
        print(f"{out}: already there")
        _next("smollm2")
        return 0
    file = Path(args.model).expanduser()
    check_output(out)
    check_output(out, size=SMOLLM2_SIZE if args.model == "smollm2" else size_in_float32(file))
    quiet_transformers()
    if args.model == "smollm2":
        fetch_smollm2(out)
    else:
        write_checkpoint(file, out, card_of(file))
    print("a checkpoint in float32")
    wrote(out)
    _next("smollm2" if out == SMOLLM2_FOLDER else out)
    return 0


def _next(model: str | Path) -> None:
    next_command(Following("collect", ["--model", model, "--out", free(Path("acts.safetensors"))]))


if __name__ == "__main__":
    main(run)
