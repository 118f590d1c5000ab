"""Benchmarks. Correctness comes first: no time and no count is reported without its error/bound."""
