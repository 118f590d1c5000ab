"""Quantised checkpoints: the formats, reading a matrix as floats, and writing it back in its own format."""
