"""Reference logits: what the logits of `bench.model` are compared with."""

from bench.timing import NOISE


def prompts(model, sequences: int, tokens: int):
    """Random ids [sequences, tokens + 1]. A decoding step reads the last one."""
    import torch

    generator = torch.Generator().manual_seed(sequences + tokens)
    return torch.randint(1, model.config.vocab_size, (sequences, tokens + 1), generator=generator).to(model.device)


def wider(dtype):
    """The dtype in which the oracle computes."""
    import torch

    return torch.float64 if dtype == torch.float32 else torch.float32


def last_logits(model, ids, keep: int = 1):
    """The last `keep` logits of every sequence, [sequences, keep, words], as a copy."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.clone()


def row_errors(logits, exact):
    """The root-mean-square error over the vocabulary, for each row."""
    return (logits.double() - exact.double()).square().mean(-1).sqrt()


class Oracle:
    """The model in the next wider dtype, edited and unedited: the reference for the timed logits.

    `own` is the largest error of the original model's logits over many rows of other prompts. The error of a single
    row may be small by luck.
    """

    def __init__(self, model, bases: dict, sequences: int = 8, tokens: int = 64, keep: int = 16):
        import copy

        # Widening changes no value.
        self.exact, self.bases = copy.deepcopy(model).to(wider(model.dtype)), bases
        ids = prompts(model, sequences, tokens)
        self.own = float(row_errors(last_logits(model, ids, keep), last_logits(self.exact, ids, keep)).max())

    def logits(self, ids) -> dict:
        """{"original", "edited"}: the last logits of every sequence, [sequences, words]."""
        from kernel_surgery import hooked

        exact = {"original": last_logits(self.exact, ids)[:, -1]}
        with hooked(self.exact, self.bases):
            return exact | {"edited": last_logits(self.exact, ids)[:, -1]}

    def error_over_bound(self, name: str, logits, exact: dict) -> float:
        """A method's largest error in a row, over the certificate's factor times `own`."""
        from kernel_surgery.certify.model import BESIDE_ORIGINAL

        which = "original" if name in ("original", NOISE) else "edited"
        return float(row_errors(logits, exact[which]).max()) / (BESIDE_ORIGINAL * self.own)
