"""Apply the edit to a checkpoint on disk: bake it into the weights, undo it, or write an adapter."""
