"""The names that options, files and results share. It imports nothing, so `--help` is fast."""

# The version of this package, a string.
VERSION = "0.1.0"
LANGUAGES = ("zh", "en", "es", "ar", "ja", "ko", "sw")
LANGUAGE_TAG = r"[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*"  # of any language, as in BCP 47: de, pt-BR, zh-Hans
SPLITS = ("fit", "dev", "test")
DTYPES = ("float32", "bfloat16", "float16")
SITES = ("mlp_out", "resid_post", "mlp_write")
WRITE = "mlp_write"  # the site after the norm that follows the MLP block's output in some models
POOLS = ("last", "mean")
TOKENS = "tokens"  # collect's third pooling: no vectors, but moments over all tokens
# Of one forward pass of collect, padding included. On a CPU, 2048 are slower: they leave the cache (`bench.collect`).
BATCH_TOKENS = 1024
METHODS = ("deviations", "centroids", "leace", "oblique")
METHOD = "oblique"  # the default: it does the least damage to a real model (docs/real.md)
ERASING = ("leace", "oblique")  # the methods that fit a dual beside the basis
RANK = 10  # of the other methods, by default; an erasing one takes as many as there are
RANDOM_EDITS = "energy:5,matched:5"  # that probe measures beside an edit, by default
CHATS = ("auto", "on", "off")
# What a record says that was written before there was a choice.
BEFORE_CHAT = {"chat": "off", "thinking": False}
BEFORE_ENGINES = {"engine": "transformers"}  # it is not recorded: the hashes of older records stay the same
MODES = ("original", "hook", "baked", "fused", "lora")
REACHES = ("output", "add", "norm")
PLUGIN = "kernel_surgery"  # the plugin's part of vLLM's additional_config
REQUEST_STRENGTH = "kernel_surgery_strength"  # in the extra_args of a request to vLLM
PROVENANCE = "provenance.json"  # the record in a written folder
LARGEST_STRENGTH = 3.4e38  # of float32, in which edits are computed
