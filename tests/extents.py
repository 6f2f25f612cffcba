"""The dtypes of every op and the extents of its CUDA kernels, for what runs without torch as well (tests/cases.py has
the rest)."""

DTYPES = ("float32", "float64", "float16", "bfloat16")

# (outer, channels, inner): what becomes of each is written beside it, for 16-byte accesses.
EXTENTS = [
    (3, 4, 256),  # planes
    (2, 2, 9216),  # planes, several blocks per channel
    (3, 2, 272),  # planes whose list ends inside a round of loads
    (40, 64, 1),  # channels_last
    (1100, 8, 1),  # channels_last, several blocks of rows
    (2, 150, 1),  # channels_last, few rows, tiles side by side
    (9, 20, 1),  # two (float16) or more rows taken as one, and a tail
    (65, 3, 1),  # the same, with three channels
    (5, 3, 49),  # small planes, odd in every way
    (9, 16, 49),  # small planes in whole vectors
    (33, 8, 4),  # tiny planes
    (2, 3, 1025),  # long odd planes: tiles side by side within a channel
    (1, 7, 33),  # one row
    (1, 1, 1000),  # one channel
    (1, 1, 1),
    (4, 1, 3),
    (0, 4, 1),  # no element; the gradients of the parameters are zero
    (0, 0, 1),
]
