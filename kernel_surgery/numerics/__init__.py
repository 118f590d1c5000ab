"""Precision, exact oracles in float64, and how far rounding may take a result from them."""
