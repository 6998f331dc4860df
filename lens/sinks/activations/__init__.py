"""Massive activations and tokens of high norm."""
