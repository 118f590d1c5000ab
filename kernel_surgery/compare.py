"""Command: read what the original and the edited model write, side by side.

    python -m kernel_surgery.compare --model M --subspace S "PROMPT"

Both models answer the same prompts by greedy decoding. What differs is coloured on a terminal; elsewhere it stands in
brackets, [-original-] and {+edited+}. A few texts show what an edit does, not how well it works: `eval` measures that.
"""

import argparse
import shutil
import sys
from pathlib import Path

from kernel_surgery.common.command import Parser, add_chat, add_vllm, check_finite_strength, main, untouched
from kernel_surgery.common.ending import Following, Word, next_command, strength_words
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES, MODES
from kernel_surgery.common.progress import waiting

WIDTH = 120  # columns where there is no terminal


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("compare", description="Show what the original and the edited model write, side by side.")
    p.add_argument("prompt", nargs="?", help="the prompt; or name a --file of them")
    p.add_argument("--file", type=Path, help="file with one prompt per line")
    more = '"polyglot" (the embedded model, default), a folder, or a Hugging Face id'
    p.add_argument("--model", default="polyglot", help=more)
    p.add_argument("--subspace", type=Path, help="subspace file (default: the one shipped with polyglot)")
    more = "how the edit is made (default: fused); see eval --help"
    p.add_argument("--mode", choices=MODES[1:], default="fused", help=more)
    more = "1 removes the subspace (default), 2 reflects it, 0 changes nothing"
    p.add_argument("--strength", type=float, default=1.0, help=more)
    p.add_argument("--max-new-tokens", type=int, default=256, help="longest text, in tokens (default 256)")
    more = "measure the damage on neutral text first (en, zh); it takes longer than the texts"
    p.add_argument("--damage", action="store_true", help=more)
    add_chat(p)
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add_vllm(p)
    more = "accept a subspace of unknown origin, or one fitted on another model"
    p.add_argument("--force", action="store_true", help=more)
    return p


@untouched("Nothing was written.")
def run(argv: list[str] | None = None) -> int:
    """Write the texts of both models to stdout. Return 0. Raises UserError for options that cannot be used."""
    args = parser().parse_args(argv)
    prompts = read_prompts(args.prompt, args.file)
    check_finite_strength(args.strength)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if args.damage and args.engine != "transformers":
        raise UserError(
            f"--damage cannot be measured with --engine {args.engine}: it needs logits, which an engine does not give. "
            "Leave one of them out."
        )

    with waiting("starting"):
        from kernel_surgery.evaluation.comparing import in_model, in_vllm
        from kernel_surgery.evaluation.notes import chat_notes
        from kernel_surgery.evaluation.options import Options
        from kernel_surgery.evaluation.run import subspace_of
        from kernel_surgery.evaluation.sidebyside import shown
        from kernel_surgery.models.chat import choose_chat
        from kernel_surgery.models.load import local_folder, parse_device, parse_dtype, public_name, resolve_model
        from kernel_surgery.models.stored import layout_in
        from kernel_surgery.models.threads import choose_threads

    given = {name: value for name, value in vars(args).items() if name not in ("prompt", "file", "damage")}
    options, engine = Options(**given), args.engine != "transformers"
    options.check_engine()
    resolve_model(args.model)
    device = parse_device(args.device)
    subspace, path = subspace_of(options)
    assert subspace is not None and path is not None  # the mode edits
    choose_threads(args.model)
    chat = choose_chat(args.model, args.chat, thinking=args.thinking)
    dtype = parse_dtype(args.dtype, device)
    if engine:
        first, write = in_vllm(options, prompts, subspace, chat, dtype)
    else:
        first, write = in_model(options, prompts, subspace, chat, (dtype, device), damage=args.damage)
    print(first)
    by = " in vLLM" if engine else ""
    print(f"{public_name(args.model)}, {path.name}: {args.mode}, strength {args.strength:g}, greedy decoding{by}")
    own = subspace.note_on(layout_in(local_folder(resolve_model(args.model))))
    for note in (*([own] if own else []), *chat_notes(subspace, options, chat)):
        print(note)
    colour = sys.stdout.isatty()
    width = shutil.get_terminal_size((WIDTH, 24)).columns if colour else WIDTH
    for pair in write():
        print(f"\n{shown(pair, args.mode, width=width, colour=colour)}")
    print()
    next_command(_measured(args))
    return 0


def _measured(args: argparse.Namespace) -> Following:
    """Return the evaluation of the same edit."""
    words: list[Word] = ["--mode", args.mode, "--model", args.model]
    words += ["--subspace", args.subspace] if args.subspace else []
    words += strength_words(args.strength)
    words += [f"--chat={args.chat}"] if args.chat != "auto" else []
    words += ["--thinking"] if args.thinking else []
    words += ["--device", args.device] if args.device != "auto" else []
    words += ["--force"] if args.force else []
    return Following("eval", words, "A few texts do not show how well it works. This measures it:")


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts: the one of the command line, or the lines of a file that are not blank.

    Raises UserError for none, for both, and for a file that is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise UserError('give one prompt, such as "What is 12 + 7?", or --file FILE with one per line.')
    if file is None:
        prompts = [prompt or ""]
    else:
        try:
            prompts = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{str(file)!r} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    prompts = [line.strip() for line in prompts if line.strip()]
    if not prompts:
        raise UserError("the prompt is empty." if file is None else f"{str(file)!r} holds no prompts: it is empty.")
    return prompts


if __name__ == "__main__":
    main(run)
