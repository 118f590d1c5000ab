"""Load models, and find the modules that are read and edited."""
