"""What the gradient of one tap contracts, as rectangles of taps that the kernel walks with arithmetic.

The half of T that is needed is in lexicographic order, so for whole layers an offset's index is affine in the taps and
one run serves each of the kernel's loops. Reading a table inside a loop would cost a pipeline stage.
"""

from __future__ import annotations

import itertools

from .packed import WAVES, Packed


def append_tap_runs(p: Packed, steps: int, runs: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Append what the gradient of every tap contracts, rows of `grad.RUN`; a pair of taps takes so many steps.

    Returns for each tap its first run, its first transposed run, and the one after its last.
    """
    ranges = []
    for u in itertools.product(*map(range, p.kernel)):
        direct, transposed = _whole_runs(p, u) if _is_whole(p) else _partial_runs(p, u)
        ranges.append(_append(direct, transposed, steps, runs))
    return ranges


def append_wave_runs(p: Packed, steps: int, runs: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """The same for D_C and D_S (transform.py), at w = 0 and at any other frequency. Their planes lie together."""
    c, _, p_, n, minus_n = ((0, 1, 1, 0, 0, 0, plane * p.tap_rows, 0, 0) for plane in range(len(WAVES)))
    contracted: list[tuple[list, list]] = [([c], []), ([], []), ([p_], [minus_n]), ([n], [p_])]
    return [_append(direct, transposed, steps, runs) for direct, transposed in contracted]


def _append(direct: list, transposed: list, steps: int, runs: list[tuple[int, ...]]) -> tuple[int, int, int]:
    first = len(runs)
    runs += [(start * steps, stop * steps, *rest) for start, stop, *rest in direct + transposed]
    return first, first + len(direct), len(runs)


def append_part(
    runs: list[tuple[int, ...]], first: int, middle: int, last: int, begin: int, end: int
) -> tuple[int, int, int]:
    """Append runs for the steps `begin` to `end` of these runs, counted from the first run on. Returns bounds as
    `append_tap_runs` does."""
    bounds = [len(runs)]
    for some in (range(first, middle), range(middle, last)):
        for start, stop, *rest in [runs[index] for index in some]:
            low, high = max(start, start + begin), min(stop, start + end)
            if low < high:
                runs.append((low, high, *rest))
            begin, end = begin - (stop - start), end - (stop - start)
        bounds.append(len(runs))
    return bounds[0], bounds[1], bounds[2]


def _is_whole(p: Packed) -> bool:
    """Whether all offsets are here and lie in a plane, so that one run serves each direction."""
    return p.units == p.layer.offsets and p.kernel[0] == 1


def _whole_runs(p: Packed, u: tuple[int, ...]) -> tuple[list, list]:
    """Taps v with v - u in T form a lattice with u on it; those from u on are the direct run, those before it the
    transposed one. The index of offset t is (line of t) * width of T + (column of t)."""
    _, ky, kx = p.kernel
    _, uy, ux = u
    sy, sx = (1, 1, *p.layer.steps)[-2:]
    offsets_wide = 2 * ((kx - 1) // sx) + 1
    width = (kx - 1 - ux % sx) // sx + 1
    lines = (ky - 1 - uy % sy) // sy + 1
    here = (uy // sy) * width + ux // sx
    at_u = ((uy // sy) * offsets_wide + ux // sx) * p.offset_rows
    line, step = offsets_wide * p.offset_rows, p.offset_rows
    a = ((uy % sy) * kx + ux % sx) * p.tap_rows, sy * kx * p.tap_rows, sx * p.tap_rows
    direct = (here, lines * width, width, -at_u, line, step, *a)
    transposed = (0, here, width, at_u, -line, -step, *a)
    return [direct], [transposed] if here else []


def _partial_runs(p: Packed, u: tuple[int, ...]) -> tuple[list, list]:
    """Runs for any subset of the offsets, in any dimension: maximal arithmetic progressions."""
    _, ky, kx = p.kernel
    found: tuple[list, list] = ([], [])
    for index, t in enumerate(p.units):
        t3 = (0,) * (3 - len(t)) + t
        for transposed, sign in ((0, 1), (1, -1)):
            if transposed and not any(t):
                continue
            v = tuple(ui + sign * ti for ui, ti in zip(u, t3, strict=True))
            if all(0 <= vi < k for vi, k in zip(v, p.kernel, strict=True)):
                tap = (v[0] * ky + v[1]) * kx + v[2]
                found[transposed].append((index * p.offset_rows, tap * p.tap_rows))
    return _progressions(found[0]), _progressions(found[1])


def _progressions(pairs: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    runs: list[tuple[int, ...]] = []
    at = 0
    while at < len(pairs):
        end = at + 1
        step = (0, 0)
        if end < len(pairs):
            step = pairs[end][0] - pairs[at][0], pairs[end][1] - pairs[at][1]
            while end < len(pairs) and (pairs[end][0] - pairs[end - 1][0], pairs[end][1] - pairs[end - 1][1]) == step:
                end += 1
        count = end - at
        runs.append((0, count, count, pairs[at][0], 0, step[0], pairs[at][1], 0, step[1]))
        at = end
    return runs
