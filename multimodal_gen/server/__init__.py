"""The HTTP front: OpenAI's image API over the engine, and what operators need around it."""
