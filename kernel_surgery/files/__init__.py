"""Checkpoint files: the safetensors layout, hashes, and folders that are created atomically."""
