"""Checks that an edit was made exactly."""
