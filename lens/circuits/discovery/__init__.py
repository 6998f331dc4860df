"""Searches for a circuit that are no scores: edges taken out, gates learned."""
