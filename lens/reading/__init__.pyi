from .components import components as components
from .explaining import explain as explain
from .explaining import explain_pairs as explain_pairs
from .removing import removal as removal
