"""Benchmarks. Correctness comes first: a provider that breaks its bound gets no time."""
