"""polyglot, the embedded model: `model/` is its checkpoint. Beside it lie its subspace and how it was made."""
