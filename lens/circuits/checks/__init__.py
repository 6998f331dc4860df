"""Whether a circuit is what is claimed of it."""
