"""polyglot, the embedded model: `model/` holds weights, tokenizer, card, subspace; the rest is how they were made."""
