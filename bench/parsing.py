"""The command line of a benchmark."""

from kernel_surgery.common.command import Parser


def bench_parser(name: str, description: str, **options) -> Parser:
    """A parser whose usage line reads `python -m bench.NAME`, or `python -m bench` for an empty name."""
    made = Parser(name, description=description, **options)
    made.prog = f"python -m bench.{name}".removesuffix(".")
    return made
