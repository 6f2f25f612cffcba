"""A pytest plugin: Triton's interpreter serves the ops as a GPU would, so that their tests run on the real kernels."""

import torch
import triton_interpreter

triton_interpreter.repair()

from isonet_fast.ops import orthogonality

orthogonality.serves = lambda weights: len(weights) > 0 and all(w.dtype != torch.float64 for w in weights)
