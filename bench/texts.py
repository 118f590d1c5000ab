"""What the real model writes before and after an edit, side by side: python -m bench.texts --model smollm2

The default edit and the first script's (`deviations`, rank 10, last token), fitted as `bench.real` fits them; and with
--chosen any other, such as a search's choice. The prompts are asked in the chat template, and decoded greedily.
"""

import json
from pathlib import Path

from bench.parsing import bench_parser
from bench.real import Setting
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.files import write_atomic

PROMPTS = (
    "Why is the sky blue? Answer in one sentence.",
    "What is the capital of France?",
    "用一句话介绍北京。",
    "Escribe una frase sobre el mar.",
)
EDITS = {
    "default edit": Setting("oblique", 6, chat="and plain"),
    "deviations, rank 10": Setting("deviations", 10, "last", problems=10),
}


def parser() -> Parser:
    """The command line."""
    p = bench_parser("texts", "Texts of the original and the edited model, side by side.")
    p.add_argument("--model", default="smollm2", help="smollm2 (default), or another model")
    p.add_argument("--chosen", type=Path, help="also this subspace, such as a search's chosen.safetensors")
    p.add_argument("--max-new-tokens", type=int, default=40, help="of each text (default 40)")
    p.add_argument("--out", type=Path, help="JSON file to store the texts in")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print and store the texts. Return 0."""
    args = parser().parse_args(argv)

    from bench.timing import stamp
    from kernel_surgery import Subspace, collect_activations, collect_moments, fit_subspace
    from kernel_surgery.evaluation.sidebyside import compare_texts
    from kernel_surgery.models.chat import OFF, choose_chat
    from kernel_surgery.models.load import load_model, load_tokenizer
    from kernel_surgery.models.threads import choose_threads
    from kernel_surgery.problems.generator import problems

    choose_threads(args.model)
    chosen = f" --chosen {args.chosen.name}" if args.chosen else ""  # without a folder of this machine
    about = stamp("cpu") | {"model": args.model, "command": f"python -m bench.texts --model {args.model}{chosen}"}
    model, tokenizer, chat = load_model(args.model), load_tokenizer(args.model), choose_chat(args.model)
    subspaces = {}
    for name, setting in EDITS.items():
        collect = collect_moments if setting.pool == "tokens" else collect_activations
        asked = problems("fit", setting.problems)
        found = collect(model, tokenizer, asked, chat=chat if setting.chat else OFF)
        subspaces[name] = fit_subspace(found, setting.rank, method=setting.method, layers=_middle(model))
    if args.chosen:
        subspaces["the search's choice"] = Subspace.load(args.chosen)
    texts: dict[str, list[str]] = {}
    for name, subspace in subspaces.items():
        options = {"max_new_tokens": args.max_new_tokens, "chat": chat}
        pairs = compare_texts(model, tokenizer, PROMPTS, subspace, **options)
        texts["original"] = [pair.original for pair in pairs]
        texts[name] = [pair.edited for pair in pairs]
    for name, by in texts.items():
        for prompt, text in zip(PROMPTS, by, strict=True):
            print(f"{name} | {prompt} | {text!r}")
    if args.out:
        result = about | {"prompts": list(PROMPTS), "chat": chat.on, "tokens": args.max_new_tokens, "texts": texts}
        write_atomic(args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


def _middle(model) -> list[int]:
    from kernel_surgery.models.architectures import default_layers

    return list(default_layers(model.config.num_hidden_layers))


if __name__ == "__main__":
    main(run)
