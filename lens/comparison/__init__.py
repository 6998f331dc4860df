"""Two runs side by side: what differs head by head, with intervals over the prompts that both have.

Reads run folders only; needs no torch.
"""

from lens.comparison.comparing import Comparison, compare_runs

__all__ = ["Comparison", "compare_runs"]
