"""Traces from the attention matrices of other tools, and heads as files that other tools read.

>>> outputs = model(ids, output_attentions=True)
>>> trace = lens.interchange.from_attentions(outputs.attentions, token_ids=ids[0])
>>> lens.interchange.to_headvis(traces, "headvis")
"""

from lens.interchange.headvis import to_headvis
from lens.interchange.imports import from_attentions, from_transformer_lens
from lens.interchange.tables import to_csv, to_parquet

__all__ = ["from_attentions", "from_transformer_lens", "to_csv", "to_headvis", "to_parquet"]
