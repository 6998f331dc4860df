from .loaded import LoadedModel as LoadedModel
from .random_weights import random_weights as random_weights
