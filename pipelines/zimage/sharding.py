"""What ranks share of the transformer under tensor parallelism."""

from __future__ import annotations

from multimodal_gen.parallel.tensor import COLUMN, ROW, Rule

# Norms of queries and keys are per head, and modulations are a fiftieth of the weights: every rank has them whole.
SHARDING = (
    Rule(r".+\.attention\.qkv", COLUMN),
    Rule(r".+\.attention\.out", ROW),
    Rule(r".+\.feed_forward\.gate_up", COLUMN),
    Rule(r".+\.feed_forward\.down", ROW),
)
