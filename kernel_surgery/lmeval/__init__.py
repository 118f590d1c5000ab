"""Our problems as tasks of lm-evaluation-harness: give FOLDER to `lm_eval --include_path` (docs/lm-eval.md)."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
