"""Answers of the original and the edited model, compared."""
