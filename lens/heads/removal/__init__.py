"""What a model can do without: heads and sub-layers taken away."""
