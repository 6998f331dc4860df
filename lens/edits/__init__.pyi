from .attention import Bias as Bias
from .attention import Drop as Drop
from .attention import Force as Force
from .attention import Knockout as Knockout
from .attention import LearnedSink as LearnedSink
from .attention import Mask as Mask
from .attention import Move as Move
from .attention import Value as Value
from .freezing import Freeze as Freeze
from .parts import Ablate as Ablate
from .parts import Activation as Activation
from .published import Act as Act
from .published import Pasta as Pasta
from .published import Var as Var
from .searching import search_heads as search_heads
from .sparse import Sparse as Sparse
from .subspaces import Subspace as Subspace

__all__ = [
    "Ablate",
    "Act",
    "Activation",
    "Drop",
    "Force",
    "Freeze",
    "Knockout",
    "LearnedSink",
    "Mask",
    "Move",
    "Pasta",
    "Sparse",
    "Subspace",
    "Value",
    "Var",
]
