"""Metrics with stated protocols, and the report page."""
