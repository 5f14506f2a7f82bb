"""tokar: image tokenizers and autoregressive image generators on one spine."""
