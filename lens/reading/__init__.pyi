from .attributing import attribute as attribute
from .components import components as components
from .explaining import explain as explain
from .explaining import explain_pairs as explain_pairs
from .judging import faithfulness as faithfulness
from .perturbing import adversary as adversary
from .perturbing import perturb as perturb
from .removing import removal as removal
