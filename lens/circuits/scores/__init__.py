"""Every way to score edges, heads and routes."""
