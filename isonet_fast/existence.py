"""How near to an isometry a layer of some geometry can come, and whether its penalty leads there.

Achour, Malgouyres and Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR
2022, theorem 1, on a circular grid, extended to strides per dimension, dilation and groups: the taps of M outputs read
C prod r_i of the C prod s_i inputs in a stride cell, r_i = min(k_i, s_i / gcd(e_i, s_i)).
"""

from __future__ import annotations

import math
from dataclasses import replace

from .geometry import Layer


def isometry(layer: Layer, transposed: bool = False) -> str:
    """What the shape allows, in a few words for the tables. First what the operator can be at best:

        rows            row-orthogonal, M <= C prod r: fewer outputs than inputs; it expands nothing and loses something
        columns         column-orthogonal, M >= C prod s: an isometry
        both            orthogonal
        shifts only     both, with one input and one output (depthwise): +- a shift is all that there is
        none            neither; at the minimum of the penalty it is an isometry of the inputs that the taps reach

    then what stands in the way:

        reads n of m inputs     no tap reaches the others of a stride cell
        hard to train           M = C prod r, and taps overlap in two dimensions or more: from random weights descent
                                often ends at a penalty above 0, so start from a delta
        needs lorth             the layer's own penalty has minima that are neither row- nor column-orthogonal

    transposed: the operator is the adjoint of the convolution that `layer` describes. So "rows" and "columns" change
    places in the answer, and "reads n of m inputs" becomes "writes n of m outputs".

    Examples:
        >>> layer = isonet_fast.geometry.Layer((64, 32, 3, 3), (2, 2), (1, 1), groups=1, penalty="isonet")
        >>> isonet_fast.existence.isometry(layer)
        'rows, needs lorth'
    """
    lorth = replace(layer, penalty="lorth")
    outputs, inputs = layer.shape[0] // layer.groups, layer.shape[1]
    cell = math.prod(layer.stride)
    read = math.prod(map(min, lorth.kernel, lorth.steps))
    words = [_best(outputs, inputs * read, inputs * cell)]
    overlapping = sum(k > s for k, s in zip(lorth.kernel, lorth.steps, strict=True))
    if words == ["both"] and outputs == inputs == 1 and overlapping:
        words = ["shifts only"]
    if read < cell:
        words.append(f"reads {read} of {cell} inputs")
    if outputs == inputs * read and overlapping > 1:
        words.append("hard to train")
    if not _leads_there(layer, outputs, inputs, read, bool(overlapping)):
        words.append("needs lorth")
    text = ", ".join(words)
    return _of_the_adjoint(text) if transposed else text


def _best(outputs: int, read: int, inputs: int) -> str:
    if outputs == inputs:
        return "both" if read == inputs else "none"
    if outputs <= read:
        return "rows"
    return "columns" if read == inputs else "none"


def _leads_there(layer: Layer, outputs: int, inputs: int, read: int, overlapping: bool) -> bool:
    """Whether the penalty is 0 only where the operator is orthogonal on what it reads."""
    if layer.penalty == "isonet":  # its rows are inputs where these are fewer, whatever the stride
        return outputs <= inputs or read == 1
    return layer.penalty == "lorth" or not overlapping  # "matrix" asks nothing of overlapping taps


def _of_the_adjoint(text: str) -> str:
    names = {"rows": "columns", "columns": "rows"}
    first, *rest = text.split(", ")
    return ", ".join([names.get(first, first), *rest]).replace("reads", "writes").replace("inputs", "outputs")
