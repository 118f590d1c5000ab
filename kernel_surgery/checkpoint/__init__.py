"""The edit on disk: baked checkpoints, undo, adapters."""
