"""Attention moved while the model runs: `lens.redistribute`.

`keys` says which keys are meant, `rules` what an edit does with the states of key groups, `editing`
puts it into the model.
"""
