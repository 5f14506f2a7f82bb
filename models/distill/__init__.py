"""Generators distilled to one step: the token map from noise to codes, Distilled Decoding 1 and 2, guidance-free teachers."""
