"""What answers must match: schemas, expressions and grammars, compiled by a helper process, followed by the engine."""
