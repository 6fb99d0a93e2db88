"""Checkpoints: where they are, whether they are whole, and how their tensors reach the model."""
