"""From a text to a verdict: its numbers, its final answer, its language."""
