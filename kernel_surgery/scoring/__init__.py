"""Scoring of a generated text: its numbers, its final answer and its language."""
