"""The OpenAI door: HTTP as OpenAI's clients speak it. It holds no model and imports no torch."""
