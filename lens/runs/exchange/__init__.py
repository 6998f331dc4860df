"""Traces from the attention matrices of other tools, and heads as files that other tools read."""
