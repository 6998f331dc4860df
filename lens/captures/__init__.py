"""Traces out: one instrumented attention pass through a model, layer by layer.

`masks` reads the structure of transformers' masks, `interface` puts our attention in the model's
place, `layer` computes the statistics of one layer, `recorder` collects them, `run` is the public
`lens.capture`, `check` proves at load that all this reproduces the model.
"""
