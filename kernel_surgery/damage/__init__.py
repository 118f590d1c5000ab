"""What an edit does to the model's predictions on text that asks nothing, in units that people know."""
