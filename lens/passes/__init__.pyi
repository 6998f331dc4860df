from .loading import load as load
from .wrapping import wrap as wrap
