"""What any `lens` command imports, imported: the process from which tests fork commands starts with this."""

import lens_analyses.analysing
import lens_analyses.runner  # noqa: F401
import torch
from lens_analyses.steps import STEPS  # noqa: F401

import lens

torch.set_num_threads(1)  # the threads of a pool are not there after a fork
lens.capture(lens.load("induction-2l"), [[5, 6, 7]], progress=False)
