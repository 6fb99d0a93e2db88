"""The fallback family: any text-to-image pipeline of diffusers that has no family of its own here."""
