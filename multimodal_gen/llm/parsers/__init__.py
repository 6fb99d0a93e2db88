"""What a model writes → what a client reads: reasoning apart from the answer, tool calls apart from text."""
