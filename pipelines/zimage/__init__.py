"""Z-Image and Z-Image-Turbo: a single-stream DiT with a Qwen3 text encoder."""
