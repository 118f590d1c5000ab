"""These tests need what `make engines` installs. `-m engines` asks for them by name: then they may not be skipped."""

import re
from importlib.util import find_spec

import pytest


def pytest_runtest_setup(item):
    asked = "engines" in re.sub(r"not\s+engines", "", item.config.option.markexpr)
    if item.get_closest_marker("engines") is None or asked:
        return
    if missing := [name for name in ("lm_eval", "vllm") if find_spec(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)} here; `make engines` has them")
