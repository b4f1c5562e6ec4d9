"""The Triton door: what runs inside Triton's Python stub. It holds no model and imports no torch."""
