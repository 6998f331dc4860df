"""Models in: what the project knows by name, and how any model becomes a `LoadedModel`.

`catalogue` needs no torch; `loading.load` is the public `lens.load`.
"""
