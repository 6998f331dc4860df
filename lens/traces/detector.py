"""TransformerLens' head detector from a trace: the same scores without its N×N matrices.

`lens.profile` means over the rows that can show a pattern; the detector divides by all attention of
the prompt, so its numbers are a little smaller on short prompts. Here to compare with published ones.
"""

import numpy as np

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.traces.trace import AttentionTrace

_RULES: dict[str, str] = {
    "previous_token_head": "previous_token",
    "duplicate_token_head": "same_token",
    "induction_head": "induction",
}
PATTERNS = tuple(_RULES)


def detect(
    trace: AttentionTrace,
    pattern: str,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
) -> np.ndarray:
    """[layer, head]: `sum(A * mask) / sum(A)`, the share of all attention that the pattern holds.

    Args:
        trace: of a causal model, with match_mass, first_mass and rest_mass.
        pattern: "previous_token_head", "duplicate_token_head" or "induction_head".
        exclude_bos: leave the first key out of both sums.
        exclude_current_token: leave each query's own key out of both sums.

    Reference: TransformerLens, `head_detector.detect_head` with `error_measure="mul"`.

    Raises:
        LensError: an unknown pattern, a model that looks ahead, a prompt without token ids, or a
            trace that lacks what it takes.

    Example:
        >>> detect(trace, "induction_head").argmax()
    """
    check_choice("pattern", pattern, PATTERNS)
    if not trace.attrs["causal"]:
        raise LensError(f"{trace.model} looks ahead; the detector is defined for causal models")
    ids = trace.dataset["token_id"].values
    if (ids < 0).any():
        raise LensError("the prompt has no token ids, which the patterns compare")
    if missing := [
        name for name in ("match_mass", "first_mass", "rest_mass") if name not in trace.dataset
    ]:
        raise LensError(f"the detector needs {', '.join(missing)}; capture with statistics='all'")

    def of(rule: str) -> np.ndarray:
        return trace.match_mass.sel(match=rule).values.astype(np.float64)  # [layer, head, query]

    first, rest = (
        trace.dataset[name].values.astype(np.float64) for name in ("first_mass", "rest_mass")
    )
    own, held = of("current_token_position"), of(_RULES[pattern])
    if pattern == "duplicate_token_head":
        held = held - own
    total = rest if exclude_bos else first + rest
    position = np.arange(len(ids))
    if exclude_bos:
        on_first = {
            "previous_token_head": position == 1,
            "duplicate_token_head": (ids == ids[0]) & (position >= 1),
            "induction_head": np.zeros(len(ids), bool),
        }
        held = held - np.where(on_first[pattern], first, 0)
    if exclude_current_token:
        total = total - np.where(exclude_bos & (position == 0), 0, own)
        if pattern == "induction_head":  # a token that repeats at once follows its own copy
            at_once = np.concatenate([[False], ids[1:] == ids[:-1]])
            held = held - np.where(at_once, own, 0)
    return held.sum(-1) / total.sum(-1)
