"""The edit in a model in memory: hook, fused, baked, lora."""
