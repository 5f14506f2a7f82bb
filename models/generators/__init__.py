"""Autoregressive generators of image codes."""
