"""Without a CUDA GPU the Triton kernels run in Triton's interpreter.

Triton reads the variable when a kernel is decorated, so it is set before any test imports one.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
