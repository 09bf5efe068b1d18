"""The definition of reciprocal attention in plain torch: the only reference in the repository."""
