"""Linear and recurrent mixers as attention-like matrices: Phi with y = Phi v, never built whole.

>>> q, k, v = torch.randn(3, 2, 40, 4)
>>> phi = lens.mixers.delta(q / 3, k / 3, v, torch.rand(2, 40))
>>> phi.tile((30, 40), (0, 10)).shape
torch.Size([2, 10, 10])
>>> lens.mixers.measure(phi).table()

After Sieber et al., "Understanding the differences in foundation models", arXiv 2405.15731.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
