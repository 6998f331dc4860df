"""Which attention and MLP sub-layers a model can do without."""
