"""Several ranks compute one model: who they are, and how weights and tokens are shared out among them."""
