"""Attention over packed sequences of different lengths, one file per backend."""
