"""Networks: pure torch, no config, no trainer, no data."""
