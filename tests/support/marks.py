"""Which cases of a test run every day. The others run with `make slow` and in CI."""

import pytest


def everyday(values, *kept):
    """`values` for pytest.mark.parametrize: those in `kept` run every day, the others are marked slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
