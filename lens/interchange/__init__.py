"""Traces from the attention matrices of other tools.

>>> outputs = model(ids, output_attentions=True)
>>> trace = lens.interchange.from_attentions(outputs.attentions, token_ids=ids[0])
"""

from lens.interchange.imports import from_attentions, from_transformer_lens

__all__ = ["from_attentions", "from_transformer_lens"]
