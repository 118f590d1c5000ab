"""polyglot's tokenizer: byte-level BPE with exactly Qwen2's normalizer and pre-tokenizer, trained on our own texts.

For a model of type qwen2, transformers replaces whatever normalizer and pre-tokenizer a saved tokenizer carries with
Qwen2's own. Training with those same two (NFC; the split that isolates every digit) is therefore the only way to get
the training ids back from `AutoTokenizer`; tests/polyglot/test_polyglot.py checks that in all seven languages.
"""

import json
import random
from pathlib import Path

from kernel_surgery.polyglot.corpus import example, training_draws

VOCABULARY = 1536
END = "<|endoftext|>"


def train_tokenizer(folder: Path, *, examples: int = 40_000, seed: int = 0) -> None:
    """Train on `examples` prompt and solution texts and save into `folder` (tokenizer.json, tokenizer_config.json)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    donor = Qwen2Tokenizer()  # an empty one: only its normalizer and pre-tokenizer are read
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = donor.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = donor.backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draws = training_draws(random.Random(f"tokenizer:{seed}"))
    texts = (text for _ in range(examples) for text in example(next(draws)))
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
