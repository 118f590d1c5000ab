"""Numerics of the edit: its precision, its exact results in float64 (oracles), and error bounds for rounding."""
