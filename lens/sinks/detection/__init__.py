"""Where sinks are, how often, and since when."""
