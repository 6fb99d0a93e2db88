"""Wan2.1 and Wan2.2: video diffusion transformers with a UMT5 text encoder."""
