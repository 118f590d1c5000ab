"""The language subspace: collecting activations, fitting, the file, and the fingerprint of its model."""
