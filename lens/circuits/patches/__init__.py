"""Activations of one run put into another, and what the heads of a circuit are made of."""
