"""Heads as files that other tools read."""
