"""Graphs, circuits, scores of edges, and the forward pass in which each edge carries what its mask says."""
