"""Files on disk: the safetensors layout, hashes, and folders that appear whole or not at all."""
