"""Two models that share layers, trained one after the other: what the first one forgets, and what prevents it."""
