"""The ways in which models write tool calls; `registry.py` is the table of them."""
