from ._acdc import acdc as acdc
from ._hard_concrete import learn_masks as learn_masks
