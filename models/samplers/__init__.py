"""How a generator is asked for codes: guidance, picking, decoding."""
