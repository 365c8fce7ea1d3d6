"""From a mel matrix (B, T, F) to an embedding (B, D) and cosine logits (B, S)."""
