from .explaining import explain as explain
from .explaining import explain_pairs as explain_pairs
