"""The vLLM side: registration, attention backends, and side data in the paged KV cache."""
