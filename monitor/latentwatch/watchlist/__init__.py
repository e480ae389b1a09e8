"""What to watch: the watchlist artifact, from YAML and published files to one content-hashed safetensors file."""
