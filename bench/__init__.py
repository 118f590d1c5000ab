"""Benchmarks. Correctness comes first: a time or a count stands beside its error/bound, or there is none."""
