"""Loading a model, and where in it an edit is made."""
