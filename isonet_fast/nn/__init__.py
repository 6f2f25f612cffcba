"""Layers: drop-in replacements for their torch.nn parents. Each file names its own in `__all__`."""

from .conv import *
from .srelu import *
