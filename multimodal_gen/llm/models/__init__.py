"""The language models: one decoder, and what its families call the same things."""
