"""What the sections of `lens explain` share: which heads and pairs, and what their columns mean."""

from typing import Literal

import pandas as pd

from lens.common.head_ids import HeadId, head_columns
from lens_analyses.config.listed import listed
from lens_analyses.steps.subject import Subject

_HEADS = 3
_METRIC = {"induction": "induction", "duplicate": "duplicate_token", "previous": "previous_token"}


def heads_of(subject: Subject) -> list[HeadId]:
    """The heads that are asked for, or the three of the profile that look most at such keys.

    Raises:
        LensError: a head that the model has not got.
    """
    if subject.settings.heads:
        return [subject.model.info.head(name) for name in listed(subject.settings.heads)]
    table = subject.run.heads
    rows = table[(table["metric"] == _METRIC[pairs_of(subject)]) & (table["variant"] == "raw")]
    means = rows.groupby(["layer", "head"])["value"].mean().sort_values(ascending=False)
    return [HeadId(int(layer), int(head)) for layer, head in list(means.index)[:_HEADS]]


def pairs_of(subject: Subject) -> Literal["induction", "duplicate", "previous"]:
    """Which keys they are asked about."""
    return subject.settings.pairs


def key(head: HeadId) -> str:
    """Of the head in names of figures."""
    return str(head).lower()


def named(head: HeadId, table: pd.DataFrame) -> pd.DataFrame:
    """The table with its head in front."""
    columns = head_columns([head] * len(table))
    return pd.concat([pd.DataFrame(columns), table.reset_index(drop=True)], axis=1)


def configuration(subject: Subject) -> dict[str, object]:
    """What the sections of heads were made with."""
    return {
        "task": subject.settings.task,
        "pairs": pairs_of(subject),
        "heads": [str(head) for head in heads_of(subject)],
        "seed": subject.seed,
    }


COLUMNS = {
    "name": "Layer and head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "side": "Whether the part is of the queries or of the keys.",
    "part": "What wrote it: embedding, position, an earlier head or MLP, a bias.",
    "query_part": "What wrote that part of the query.",
    "key_part": "What wrote that part of the key.",
    "value": "Part of the logit, nats, mean over prompts.",
    "contrast": "The same less its mean over the keys that the query sees, nats.",
    "share": "Of all that the row is about: of the logit above the mean of its row, or of all that a map carries.",
    "literal": "Share of the needle that the head looks at most while it is generated (Wu et al.).",
    "output": "Logit that the head brings from the needle to the generated tokens, less that from as many others (LOCOS).",
    "trials": "Needles that there were; n of them came back.",
    "masked": "How many heads give nothing.",
    "recall": "Share of the needle that comes back then.",
    "a": "One definition.",
    "b": "Another.",
    "correlation": "Rank correlation of all heads.",
    "query": "Place of the query in the first prompt; of retrieval: attention of the last tokens to the needle, less that of others (QRHead).",
    "key": "Place of the key.",
    "query_token": "What the query says.",
    "key_token": "What the key says.",
    "mass": "Attention of the query to the key.",
    "logit": "Of the pair, nats.",
    "above": "The same less the mean over the keys that the query sees.",
    "said": "The pair in words.",
    "distance": "Part of the logit that rotary embedding adds for the distance, nats.",
    "content": "Part of the logit if query and key stood at one place: without what rotary embedding adds, nats.",
    "pairs": "Pairs of query and key in all prompts.",
    "n": "Prompts.",
    "map": "Of queries and keys, or of values and output.",
    "component": "Singular component, largest singular value first.",
    "singular_value": "Of the map; that of queries and keys with the scale of the logits.",
    "carried": "Nats of the logit above the mean of its row, or share of the square of what the head writes.",
    "clean": "Attention to the keys of the pairs, as the model is.",
    "predicted": "The same without the part, by its products, norms held.",
    "measured": "The same when the model runs without the part.",
    "method": "What scores the tokens; random: random order.",
    "comprehensiveness": "Probability of the answer less that without the tokens that score highest, mean over shares.",
    "sufficiency": "Probability of the answer less that with those tokens alone; less is better.",
    "soft_comprehensiveness": "Loss of probability when high tokens are kept least, at equal expected retention, 0 to 1.",
    "soft_sufficiency": "What is kept of the probability when high tokens are kept most, at equal retention, 0 to 1.",
    "as_leave_one_out": "Rank correlation with the probability lost without each token.",
    "as_integrated_gradients": "Rank correlation with integrated gradients.",
    "above_random": "Share of the random orders with a lower comprehensiveness.",
    "missing": "How far the scores' sum is from the logit that they are parts of, mean size; empty where they are no parts of one.",
    "n_soft": "Prompts whose answer depends on the tokens: those of the soft measures.",
    "error": "Mean absolute difference of predicted and measured.",
    "by": "Definition whose first heads are masked; random: as many others.",
    "measure": "weights: attention; norms: sizes of what is written; with _residual the residual stream, with _norm the norm behind it.",
    "ratio": "Share of a token's next state that other tokens bring, mean over tokens.",
    "group": "Offset, or classes of query and key.",
    "second": "The part with the second largest contrast.",
    "lead": "Contrast of the first part over that of the second, sizes, nats.",
    "basis": "What is taken out: the contrast, principal components of queries or of keys, another head's contrast, random directions.",
    "rank": "How many directions.",
    "other": "Attention to the keys of pairs of another kind.",
    "loss_change": "Next-token loss at the queries of the pairs less that with nothing taken out, nats.",
    "clean_other": "The attention to those keys as the model is.",
    "n_other": "Prompts that have such keys.",
    "divergence": "Jensen-Shannon divergence of the head's row and the furthest row found that writes the same, nats, at most ln 2.",
    "uniform": "The same of the head's row and even attention.",
    "change": "Loss of the answer with that row in the head's place, less that of the model as it is, nats.",
    "uniform_change": "The same with even attention in its place.",
    "free": "Dimensions in which the row can change and write the same.",
    "along": "Which logits change: logits, any; pairs, from one token to another in all rows that see both.",
    "size": "Mean absolute contrast of a pair, nats: far above the mean where signs cancel.",
    "worst": "Change of loss along the gradient, nats.",
    "random": "Change of loss in random directions of the same size, nats.",
}
