"""Certify that an edit was made exactly: in a model in every mode, and in files on disk."""
