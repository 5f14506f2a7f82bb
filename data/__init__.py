"""Images and codes on disk, and the exact stream of them. Knows nothing of models or training."""
