"""What the tests of vLLM share: models, edits, certificates. Each certificate is made once."""

import functools

import torch

from kernel_surgery.engines.variants import ENGINE_MODES
from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE, SMOLLM2_FOLDER, load_model, load_tokenizer
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis

EAGER = {"enforce_eager": True}
EDITED = ENGINE_MODES[1:]
NEW_TOKENS = {"polyglot": 6, "smollm2": 2}  # of the oracle, after each prompt of a certificate
FOLDERS = {"polyglot": POLYGLOT, "smollm2": SMOLLM2_FOLDER}


@functools.cache
def loaded(name):
    """(model in float32, tokenizer)."""
    if name == "smollm2":
        assert (SMOLLM2_FOLDER / "config.json").is_file(), "fetch the model first: make smollm2"
    return load_model(name, torch.float32), load_tokenizer(name)


def edit_files(folder):
    """{model: the file of an edit}. SmolLM2's is random: what is shown is that it is made, not what it is."""
    model, _ = loaded("smollm2")
    bases = {layer: basis(576, 4, seed=layer) for layer in range(8, 22)}
    known = {"fingerprint": fingerprint(model), "n_layers": 30, "site": "mlp_out", "model_id": "smollm2"}
    file = folder / "smollm2.safetensors"
    Subspace(bases, **known).save(file)
    return {"polyglot": POLYGLOT_SUBSPACE, "smollm2": file}


def within(found, mode):
    """A cell: the error of a mode in yardsticks, which must be within the limit."""
    across = found["across_engines"]
    row = across["modes"][mode]
    assert max(row["rms_of_original"], row["max_of_original"]) <= across["limit"]
    return f"{row['rms_of_original']:.2f}"
