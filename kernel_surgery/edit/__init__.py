"""Apply the edit to a model in memory, as a hook, a fused operator, new weights or an adapter."""
