"""Trains polyglot from nothing: python -m kernel_surgery.polyglot.train --out DIR

Seeded and resumable: batch number b is a function of (seed, b) alone, and the state (weights, optimizers, step) is
saved every few minutes, so a run that is killed goes on where it was when the same command is given again. The
learning rate is constant, then falls linearly to zero over the last part; `--steps` may be raised on resumption as
long as that part has not begun. The best weights by dev accuracy are kept in DIR/best, in bfloat16, as an ordinary
checkpoint.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.progress import progress_bar

EPILOG = """\
How long it takes: on 2 cores of a Xeon with AMX, nothing else running, 7,200 tokens a second in float32 and 9,000 with
--precision bfloat16 --compile (0.24 s a step): 16,000 steps, 34 million tokens, are 65 to 80 minutes. Not measured on a
GPU yet.
Learning curve: DIR/log.jsonl (step, tokens, loss, dev accuracy by kind).
"""
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHUNK = 16  # batches drawn together, so that each holds examples of similar length
TOKENS = 2048  # padded tokens in a batch
WARMUP = 100
DEV_PER_CATEGORY = 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        "polyglot.train",
        description="Train the embedded model from scratch on the seven-language problems.",
        epilog=EPILOG,
    )
    p.add_argument("--out", type=Path, required=True, help="folder for state, log and the best checkpoint")
    p.add_argument("--steps", type=int, default=16_000, help="optimizer steps in all (default 16000)")
    p.add_argument("--decay", type=float, default=0.7, help="share of the steps with a falling learning rate (0.7)")
    p.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's learning rate (embedding, biases, norms)")
    p.add_argument("--muon-lr", type=float, default=0.01, help="Muon's learning rate (matrices); 0: AdamW for all")
    p.add_argument("--seed", type=int, default=0, help="of the initial weights and the training problems (default 0)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    p.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of matrix products and activations (default float32); weights and optimizers are always float32",
    )
    p.add_argument("--compile", action="store_true", help="fuse with torch.compile (needs a C++ compiler on a CPU)")
    p.add_argument("--minutes", type=float, default=0, help="save the state and stop after this long (0: no limit)")
    p.add_argument("--eval-every", type=int, default=500, help="steps between dev evaluations and saved states")
    return p


def lr_factor(step: int, steps: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last `decay` of the steps."""
    start = (1 - decay) * steps
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / max(1.0, steps - start)))


def encode(tokenizer, prompt: str, solution: str) -> tuple[list[int], int]:
    """(ids, length of the prompt in ids); the end token closes the solution."""
    asked = tokenizer(prompt).input_ids
    return asked + tokenizer(solution).input_ids + [tokenizer.eos_token_id], len(asked)


def collate(rows: list[tuple[list[int], int]], pad: int):
    """Right-padded ids and labels [batch, tokens]; prompts and padding are not learned (label -100)."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for i, (row, asked) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, asked : len(row)] = torch.tensor(row[asked:])
    return ids, labels


def chunk_batches(tokenizer, seed: int, chunk: int):
    """CHUNK batches of about TOKENS padded tokens, drawn together, sorted by length, in random order."""
    from kernel_surgery.polyglot.corpus import example, training_draws

    rng = random.Random(f"train:{seed}:{chunk}")
    draws = training_draws(rng)
    rows, total = [], 0
    while total < CHUNK * TOKENS:
        rows.append(encode(tokenizer, *example(next(draws))))
        total += len(rows[-1][0])
    rows.sort(key=lambda row: len(row[0]))
    # Cut into CHUNK pieces of equal token count (not row count): every step then costs about the same.
    batches: list[list[tuple[list[int], int]]] = [[]]
    goal, seen = total / CHUNK, 0
    for row in rows:
        if seen >= goal * len(batches) and len(batches) < CHUNK:
            batches.append([])
        batches[-1].append(row)
        seen += len(row[0])
    rng.shuffle(batches)
    return [collate(batch, tokenizer.eos_token_id) for batch in batches]


def dev_accuracy(model, tokenizer, per_category: int) -> dict[str, float]:
    """Share of dev problems whose whole solution greedy decoding would reproduce, by kind and over all.

    Teacher forcing answers that exactly: greedy decoding writes the reference if and only if the reference is the
    argmax at every position. A correct answer reached by other words counts as wrong here, so this is a lower bound.
    """
    import torch

    from kernel_surgery.common.names import LANGUAGES
    from kernel_surgery.polyglot.solutions import solution
    from kernel_surgery.problems.generator import problems

    rows, kinds = [], []
    for problem in problems("dev", per_category):
        for language in LANGUAGES:
            rows.append(encode(tokenizer, problem.prompts[language], solution(problem, language)))
            kinds.append(problem.kind)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    right: dict[str, list[bool]] = {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            ids, labels = collate([rows[i] for i in chosen], tokenizer.eos_token_id)
            ids, labels = ids.to(model.device), labels.to(model.device)
            best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
            good = ((best == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).tolist()
            for i, ok in zip(chosen, good, strict=True):
                right.setdefault(kinds[i], []).append(ok)
    model.train()
    every = [ok for group in right.values() for ok in group]
    return {kind: sum(group) / len(group) for kind, group in sorted(right.items())} | {"all": sum(every) / len(every)}


def save_checkpoint(model, tokenizer_folder: Path, folder: Path) -> None:
    """An ordinary bfloat16 checkpoint (config, weights, tokenizer) in `folder`, replaced as a whole."""
    import torch
    from transformers import Qwen2ForCausalLM

    temporary = folder.with_name(folder.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(temporary)  # only written, never run: RoPE's buffer is not saved
    for file in tokenizer_folder.glob("tokenizer*.json"):
        shutil.copy(file, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def optimizers(model, lr: float, muon_lr: float):
    """Muon for the matrices inside the layers, AdamW for everything else (for everything if muon_lr is 0)."""
    import torch

    from kernel_surgery.polyglot.optimizer import Muon

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n] if muon_lr else []
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return [adamw, Muon(matrices, lr=muon_lr)] if matrices else [adamw]


def _append(log_file: Path, line: dict) -> None:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _started(args: argparse.Namespace, step: int) -> dict:
    """The log's line for a start or a resumption: what was asked, and with which versions."""
    options = {name: value for name, value in vars(args).items() if name != "out"}
    return {"started_at": step, "options": options, "environment": environment_record()}


def _new_model(folder: Path, seed: int, device: str):
    """(tokenizer, model before training). A tokenizer that is not in `folder` yet is trained and saved there."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from kernel_surgery.polyglot.tokenizer import VOCABULARY, train_tokenizer

    if not (folder / "config.json").exists():
        train_tokenizer(folder, seed=seed)
        Qwen2Config().save_pretrained(folder)  # AutoTokenizer reads the model type from it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    config = Qwen2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=end, pad_token_id=end, **CONFIG)
    # Plain attention: on a CPU the fused one has no fast backward pass in bfloat16, and sequences here are short.
    config._attn_implementation = "eager"
    return tokenizer, Qwen2ForCausalLM(config).to(device)


def run(argv: list[str] | None = None) -> int:
    """Train, or go on training, until --steps or --minutes."""
    args = parser().parse_args(argv)
    import torch

    from kernel_surgery.models.load import quiet_transformers

    quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer_folder, state_file, log_file = args.out / "tokenizer", args.out / "state.pt", args.out / "log.jsonl"
    tokenizer, model = _new_model(tokenizer_folder, args.seed, device)
    both = optimizers(model, args.lr, args.muon_lr)
    base_lrs = [group["lr"] for optimizer in both for group in optimizer.param_groups]
    step, tokens, best, elapsed = 0, 0, -1.0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, best, elapsed = state["step"], state["tokens"], state["best"], state["elapsed"]

    def loss_of(ids, labels):
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    if args.compile:
        loss_of = torch.compile(loss_of, dynamic=True)
    _append(log_file, _started(args, step))
    started = time.monotonic()
    bar = progress_bar(args.steps, "training", initial=step)
    losses: list[float] = []
    batches, chunk = [], -1
    while step < args.steps:
        if chunk != step // CHUNK:
            chunk = step // CHUNK
            batches = chunk_batches(tokenizer, args.seed, chunk)
        ids, labels = (t.to(device) for t in batches[step % CHUNK])
        factor = lr_factor(step, args.steps, args.decay)
        groups = [group for optimizer in both for group in optimizer.param_groups]
        for group, lr in zip(groups, base_lrs, strict=True):
            group["lr"] = lr * factor
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += ids.numel()
        step += 1
        bar.update()
        late = args.minutes and time.monotonic() - started > 60 * args.minutes
        if step % args.eval_every == 0 or step == args.steps or late:
            accuracy = dev_accuracy(model, tokenizer, DEV_PER_CATEGORY)
            seconds = elapsed + time.monotonic() - started
            line = {"step": step, "tokens": tokens, "seconds": round(seconds), "loss": sum(losses) / len(losses)}
            _append(log_file, line | {"dev": accuracy})
            bar.set_postfix(loss=f"{line['loss']:.3f}", dev=f"{accuracy['all']:.3f}")
            losses = []
            if accuracy["all"] >= best:  # of equals the later: trained for longer, at a lower learning rate
                best = accuracy["all"]
                save_checkpoint(model, tokenizer_folder, args.out / "best")
                shutil.copy(log_file, args.out / "training.jsonl")
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in both]}
            state |= {"step": step, "tokens": tokens, "best": best, "elapsed": seconds}
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)
        if late:
            break
    bar.close()
    print(f"step {step} of {args.steps}, {tokens:,} tokens; best dev accuracy {best:.3f}: {args.out / 'best'}")
    return 0


if __name__ == "__main__":
    main(run)
