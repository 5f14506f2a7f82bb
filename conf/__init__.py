"""Config: Hydra groups, and the schema that checks them."""
