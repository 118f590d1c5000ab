"""What each edit does to a real model, and how much of the language it leaves: python -m bench.real --model smollm2

For every setting, one row: the damage on neutral text (`kernel_surgery.damage`), the covariance with the language label
that is left at the edited sites with all edits on, on the fitting tokens, and what a linear probe still reads at those
sites, on problems and wordings that no edit was fitted on. All settings share the yardsticks and the texts.

Rows are stored one by one. A run that was killed goes on with --resume.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic

ORIGINAL = "original"
OWN = ("commit", "dirty", "date")  # of the run that measured a row


@dataclass(frozen=True)
class Setting:
    """One way to fit. pool: "last" or "tokens". sequential: layer by layer. problems: per category, for the fit.

    Prompts are put as they are, but with `chat`.
    """

    method: str
    rank: int | None = None
    pool: str = "tokens"
    sequential: bool = False
    problems: int = 5
    strength: float = 1.0
    chat: str = ""  # "and plain": every prompt twice, in the chat template and as it is; "alone": in the template

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f" rank {self.rank}"
        pool = {"last": "last token", "tokens": "all tokens"}[self.pool]
        how = "layer by layer" if self.sequential else pool
        how += f", chat {self.chat}" if self.chat else ""
        strength = "" if self.strength == 1 else f", strength {self.strength:g}"
        return f"{self.method}{rank}, {how}, {self.problems} problems per category{strength}"


SETTINGS = (
    Setting("deviations", 10, "last", problems=10),
    Setting("deviations", 3, "last", problems=10),
    Setting("deviations", 1, "last", problems=10),
    Setting("centroids", 6, "last", problems=10),
    Setting("oblique", 6, "last", problems=10),
    Setting("leace", 6),
    Setting("oblique", 6),
    Setting("oblique", 6, chat="and plain"),
    Setting("oblique", 6, chat="alone"),
    Setting("oblique", 1),
    Setting("oblique", 6, sequential=True, problems=1),
    Setting("oblique", 6, sequential=True, problems=3),
    Setting("oblique", 6, sequential=True),
    Setting("oblique", 3, sequential=True),
    Setting("oblique", 1, sequential=True),
    Setting("oblique", 6, sequential=True, strength=0.5),
    Setting("oblique", 6, problems=30),
    Setting("oblique", 6, sequential=True, problems=10),
    Setting("oblique", 6, sequential=True, problems=30),
    Setting("oblique", 6, sequential=True, problems=100),
)


class Bench:
    """A loaded model, the original's readings, and what settings share."""

    def __init__(self, name: str, languages: tuple[str, ...]):
        from kernel_surgery.common.names import LANGUAGES
        from kernel_surgery.models.architectures import default_layers
        from kernel_surgery.models.load import load_model, load_tokenizer, local_folder, resolve_model
        from kernel_surgery.problems.generator import problems
        from kernel_surgery.studies.measuring import Measuring

        self.folder = local_folder(resolve_model(name))
        self.name, self.model, self.tokenizer = name, load_model(name), load_tokenizer(name)
        self.layers = list(default_layers(self.model.config.num_hidden_layers))
        ends = [self.layers[0], self.layers[len(self.layers) // 2], self.layers[-1]]
        about = (problems("dev", 4), LANGUAGES, ends, "hook", "test")
        self.measuring = Measuring(self.model, self.tokenizer, languages, *about)
        self.fitting = problems("fit", 5)
        self.before = self.label_covariance(self.fitting)

    def label_covariance(self, chosen) -> dict:
        """{layer: covariance with the language label at the site}, of the model as it is now."""
        from kernel_surgery import collect_moments

        layers = ",".join(map(str, self.layers))
        by = collect_moments(self.model, self.tokenizer, chosen, layers=layers).by_layer
        return {layer: by[layer].label_covariance for layer in self.layers}

    def fit(self, setting: Setting):
        """The subspace of a setting."""
        import torch

        from kernel_surgery import collect_activations, collect_moments, fit_subspace
        from kernel_surgery.models.chat import OFF, choose_chat
        from kernel_surgery.models.layerwise import Layerwise
        from kernel_surgery.problems.generator import problems
        from kernel_surgery.subspace.sequential import fit_sequentially

        chosen = problems("fit", setting.problems)
        if setting.sequential:
            from kernel_surgery.common.names import LANGUAGES

            reader = Layerwise(self.folder, torch.float32)
            how = {"method": setting.method, "rank": setting.rank}
            return fit_sequentially(reader, self.tokenizer, chosen, LANGUAGES, self.layers, **how)
        layers = ",".join(map(str, self.layers))
        collect = collect_moments if setting.pool == "tokens" else collect_activations
        chat = replace(choose_chat(self.name, "on"), alone=setting.chat == "alone") if setting.chat else OFF
        found = collect(self.model, self.tokenizer, chosen, layers=layers, chat=chat)
        return fit_subspace(found, setting.rank, method=setting.method)

    def row(self, setting: Setting) -> dict:
        """Everything that is measured of one setting."""
        from kernel_surgery import hooked

        subspace = self.fit(setting)
        if setting.strength != 1:
            subspace = replace(subspace, strengths=dict.fromkeys(subspace.layers, setting.strength))
        figures = self.measuring.figures(self.measuring.measure(subspace))
        with hooked(self.model, subspace):
            left = {
                layer: float(after.norm() / self.before[layer].norm())
                for layer, after in self.label_covariance(self.fitting).items()
            }
        tokens = (subspace.fit or {}).get("tokens")
        return {
            **{"setting": setting.name, "rank": subspace.rank, "form": subspace.form},
            "tokens": sum(tokens.values()) if tokens else setting.problems * 5 * 7,
            **{"damage": figures["neutral"], "word": figures["word"], "left": left, "probes": figures["probes"]},
        }


def rows_of(bench: Bench, settings: tuple[Setting, ...], done: list[dict]) -> Iterator[dict]:
    """The rows that are not in `done`, one after the other."""
    from kernel_surgery.damage.measure import named
    from kernel_surgery.damage.words import with_intervals

    have = {row["setting"] for row in done}
    about = {"precision": "bfloat16"}
    for name, by in bench.measuring.yardsticks.items():
        if named(name, about) not in have:
            figures = {language: with_intervals(r) for language, r in by.items()}
            yield {"setting": named(name, about), "damage": figures, "word": "", "yardstick": True}
    if ORIGINAL not in have:
        yield {"setting": ORIGINAL, "probes": bench.measuring.measure(None).by_layer(), "damage": {}, "word": ""}
    for setting in settings:
        if setting.name not in have:
            yield bench.row(setting)


def line(row: dict) -> str:
    """A row as text."""
    kl = ", ".join(f"{lang} {r['kl_mean']:.3g} x{r['perplexity_ratio']:.3g}" for lang, r in row["damage"].items())
    left = f"; left {max(row['left'].values()):.1e} at most" if "left" in row else ""
    probes = "; probes " + " ".join(f"{x:.3f}" for x in row["probes"].values()) if "probes" in row else ""
    return f"{row['setting']}: {kl} {row['word']}{left}{probes}"


def parser() -> Parser:
    """The command line."""
    p = bench_parser("real", "Damage and erasure of every way to fit, on a real model.")
    p.add_argument("--model", default="smollm2", help="smollm2 (default), or another model")
    p.add_argument("--languages", default="en,zh", help="of the neutral text (default en,zh)")
    p.add_argument("--most", type=int, default=100, help="largest number of problems per category (default 100)")
    p.add_argument("--out", type=Path, help="JSON file to store the rows in")
    p.add_argument("--resume", action="store_true", help="keep the rows that are in --out, and go on")
    return p


def run(argv: list[str] | None = None, settings: tuple[Setting, ...] = SETTINGS, say: Callable = print) -> int:
    """Print and store a row for every setting. Return 0."""
    args = parser().parse_args(argv)

    from bench.timing import stamp
    from kernel_surgery.models.chat import has_template
    from kernel_surgery.models.threads import choose_threads

    choose_threads(args.model)
    rows: list[dict] = []
    measured = stamp("cpu")
    own = {name: measured[name] for name in OWN}
    about = measured | {"model": args.model, "command": f"python -m bench.real --model {args.model}"}
    if args.resume and args.out and args.out.is_file():
        held = json.loads(args.out.read_text(encoding="utf-8"))
        if held["model"] != args.model:
            raise UserError(f"{str(args.out)!r} holds rows of {held['model']!r}, not of {args.model!r}.")
        rows = [{name: held[name] for name in OWN} | row for row in held["rows"]]
    bench = Bench(args.model, tuple(args.languages.split(",")))
    about |= {"sentences": bench.measuring.text.sentences, "layers": bench.layers}
    wanted = [s for s in settings if s.problems <= args.most and (not s.chat or has_template(bench.folder))]
    for row in rows_of(bench, tuple(wanted), rows):
        rows.append(row | own)
        say(line(row))
        if args.out:
            write_atomic(args.out, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main(run)
