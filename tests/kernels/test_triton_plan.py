"""The plan's budget for the published networks: launches, padding, multiply-adds; and what it says of each layer."""

import contextlib
import math
import sys

import numpy as np
import pytest
import torch

from isonet_fast import OrthoRegularizer, geometry
from isonet_fast.geometry import Layer
from isonet_fast.kernels import grad, gram, pack, packed, split_k, transform
from isonet_fast.kernels import plan as planning
from isonet_fast.problem import Problem

FLOOR = {18: 192, 34: 358, 50: 184, 101: 310}  # GFLOP of ISONet: bf16x3 gram and gradient, without padding
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
VARIANTS = ["tma", "pointer"]


def network(depth: int, residual: bool) -> tuple[Layer, ...]:
    """The regularised convolutions of the published networks: everything but the 7x7 stem."""
    layers: list[Layer] = []

    def add(outputs, inputs, kernel, stride):
        layers.append(Layer((outputs, inputs, kernel, kernel), (stride, stride), (1, 1), 1, "isonet"))

    inputs = 64
    for stage, (count, width) in enumerate(zip(BLOCKS[depth], (64, 128, 256, 512), strict=True)):
        outputs = width if depth < 50 else 4 * width
        for block in range(count):
            stride = 2 if stage and not block else 1
            if depth < 50:
                add(width, inputs, 3, stride)
                add(width, width, 3, 1)
            else:
                add(width, inputs, 1, 1)
                add(width, width, 3, stride)
                add(outputs, width, 1, 1)
            if residual and (stride > 1 or inputs != outputs):
                add(outputs, inputs, 1, stride)
            inputs = outputs
    return tuple(layers)


def make(layers, precision=None, variant="tma"):
    return planning.Plan(Problem(layers, (1.0,) * len(layers), precision), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", BLOCKS)
def test_budget_of_published_networks(depth, residual, variant):
    plan = make(network(depth, residual), variant=variant)
    rows = plan.summary()
    useful, padded = sum(r.flops for r in rows), sum(r.padded_flops for r in rows)
    assert sum(plan.launches.values()) <= 6
    assert padded / useful - 1 <= 0.15
    if not residual:
        assert abs(useful / 1e9 - FLOOR[depth]) <= 1
    assert {101: 99, 50: 48, 34: 32, 18: 16}[depth] == len(rows) or residual


@pytest.mark.parametrize("depth", BLOCKS)
def test_launches_of_a_call(depth, monkeypatch):
    """What is launched, counted with kernels that do nothing, and what a planned call looks at: addresses only."""
    pytest.importorskip("triton")
    from isonet_fast.kernels import orthogonality, tables

    launched = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid[0]))

    for name in (
        "pack_kernel",
        "transform_kernel",
        "gram_kernel",
        "finish_kernel",
        "grad_kernel",
        "transform_back_kernel",
    ):
        monkeypatch.setattr(orthogonality, name, Counted(name))
    layers = network(depth, True)
    weights = [torch.empty(layer.shape) for layer in layers]
    grads = [torch.empty(layer.shape) for layer in layers]
    problem = Problem(layers, (1e-4,) * len(layers))
    orthogonality.accumulate_grad_(weights, grads, problem, 1.0)
    assert len(launched) <= 6 and all(grid > 0 for _, grid in launched)
    launched.clear()
    _, _, saved = orthogonality.forward(weights, problem, True)
    views = orthogonality.backward(torch.ones(()), saved, weights, problem)
    assert len(launched) <= 6
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    monkeypatch.setattr(tables.Tables, "_rows", None)  # nothing is sent again
    orthogonality.backward(torch.ones(()), saved, weights, problem)
    empty, made = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda size, **options: made.append(size) or empty(size, **options))
    orthogonality.accumulate_grad_(weights, grads, problem, 1.0)
    assert len(made) == 6  # two planes, residuals, partial sums, penalties, total: no tile is split


def test_finish_runs_beside_the_gradient(monkeypatch):
    """It has a stream of its own, which waits for gram. The current stream waits for it before it goes on."""
    pytest.importorskip("triton")
    from isonet_fast.kernels import orthogonality, tables

    events, current = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(one):
        current.append(one.name)
        yield
        current.pop()

    monkeypatch.setattr(tables.DeviceArrays, "use_on", lambda self, stream: None)
    monkeypatch.setattr(orthogonality, "_on", lambda device: contextlib.nullcontext(Stream("main")))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    layers = (Layer((8, 8, 3, 3), (1, 1), (1, 1), 1, "isonet"),)
    problem, weights = Problem(layers, (1.0,)), [torch.empty(8, 8, 3, 3)]
    made = orthogonality.tables_of(problem, torch.device("cpu"))
    made.aside = Stream("aside")
    made.launches = lambda key, *_: events.append((key if isinstance(key, str) else key[0], current[-1]))
    orthogonality.accumulate_grad_(weights, [torch.empty(8, 8, 3, 3)], problem, 1.0)
    finish = ["aside waits for main", ("finish", "aside"), ("grad", "main"), "main waits for aside"]
    assert events == [("pack", "main"), ("gram", "main"), *finish]


def test_few_calls_lie_between_the_regularizer_and_the_first_launch(monkeypatch):
    pytest.importorskip("triton")
    from isonet_fast.kernels import orthogonality
    from isonet_fast.ops import orthogonality as ops

    chains = []

    def launch(key, *_):
        frame, names = sys._getframe(1), []
        while frame.f_code not in (OrthoRegularizer.__call__.__code__, OrthoRegularizer.accumulate_grad_.__code__):
            names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        chains.append((key, names))

    monkeypatch.setattr(ops, "serves", lambda weights: True)
    tables_of = orthogonality.tables_of

    def watched(*arguments):
        tables = tables_of(*arguments)
        tables.launches = launch
        return tables

    monkeypatch.setattr(orthogonality, "tables_of", watched)
    reg = OrthoRegularizer(torch.nn.Conv2d(8, 8, 3))
    reg()
    reg.accumulate_grad_()
    first = [names for key, names in chains if key == "pack"]
    assert [len(names) <= 6 for names in first] == [True, True], first


def walk_gram(plan):
    """Multiply-adds of the gram tiles, only from their table; one product fewer where both sides are the same rows."""
    work = 0
    for tile, table in plan.gram_tiles.items():
        columns = (table["last"].astype(np.int64) - table["first"]) * tile.chunk
        products = plan.variant.products - (table["a_row"] == table["b_row"]) * (plan.variant.products == 3)
        work += int((columns * products).sum()) * tile.block**2
    return work


def walk_grad(plan):
    work = 0
    lengths = plan.runs["last"] - plan.runs["first"]
    for tile, table in [*plan.grad_tiles.items(), *plan.spectrum_tiles.items()]:
        for row in table:
            steps = int(lengths[row["first_run"] : row["last_run"]].sum())
            work += steps * tile.depth * tile.rows * tile.columns
    return work


@pytest.mark.parametrize("precision", [None, "highest"])
def test_summary_counts_what_the_tables_say(precision):
    layers = (*network(50, True)[:12], Layer((90, 1, 3, 3), (1, 1), (1, 1), 90, "isonet"))
    layers += (Layer((6, 5, 2, 2, 3), (1, 2, 1), (1, 1, 1), 1, "lorth"),)
    layers += (Layer((70, 90, 5, 5), (1, 1), (1, 1), 1, "isonet"), Layer((40, 20, 4, 5), (1, 1), (1, 1), 2, "isonet"))
    plan = make(layers, precision, "tma" if precision is None else "highest")
    assert sum(r.padded_flops for r in plan.summary()) == 2 * (walk_gram(plan) + walk_grad(plan))
    assert sum(r.gram_tiles for r in plan.summary()) == plan.partials == count(plan.gram_tiles)
    assert sum(r.grad_tiles for r in plan.summary()) == count(plan.grad_tiles) + count(plan.spectrum_tiles)


def count(tiles):
    return sum(int((table["piece"] == 0).sum()) for table in tiles.values())


def test_layers_stay_together_those_without_short_tiles_first():
    """Except for the last, as many as the L2 cache holds: there the longest tiles come first."""
    plan = make(network(34, False))
    (table,) = plan.gram_tiles.values()
    layers = table["layer"].tolist()
    apart = next(n for n in range(len(layers)) if layers[n] in layers[:n] and layers[n] != layers[n - 1])
    last = set(layers[apart:])
    start = next(n for n in range(len(layers)) if layers[n] in last)
    assert len(last) >= 3 and not set(layers[:start]) & last
    assert sum(plan.packed[n].plane_rows * 256 * 4 for n in last) <= planning.L2_BYTES
    order = [(plan._shortest(n), plan._longest(n)) for n in dict.fromkeys(layers[:start])]
    assert order == sorted(order, reverse=True)
    steps = table[start:]["last"] * np.where(table[start:]["a_row"] == table[start:]["b_row"], 2, 3)
    assert (np.diff(steps) <= 0).all() and steps[0] > steps[-1]


def test_the_last_layers_are_those_that_the_cache_holds():
    table = np.array([(n,) for n in (7, 7, 3, 3, 5, 5)], [("layer", np.int32)])
    steps, size = np.array([9, 1, 2, 4, 1, 3]), planning.L2_BYTES // 2
    order = planning._longest_last_layers_first
    assert order(table, steps, {7: size, 3: size, 5: size})["layer"].tolist() == [7, 7, 3, 5, 3, 5]
    assert order(table, steps, {7: 1, 3: 1, 5: 1})["layer"].tolist() == [7, 3, 5, 3, 7, 5]
    assert order(table, steps, {7: 1, 3: 1, 5: 3 * size})["layer"].tolist() == [7, 7, 3, 3, 5, 5]


def test_no_tile_of_a_whole_network_is_split():
    for depth in BLOCKS:
        plan = make(network(depth, False))
        assert (plan.gram_parts, plan.grad_parts, plan.arrivals) == (0, 0, 0)


@pytest.mark.parametrize("precision", [None, "highest"])
def test_pieces_of_a_share_make_up_its_tiles(precision):
    """Each step is in one piece; the parts of a tile lie together, no two tiles share a part or a place to count in."""
    layers = network(50, False)
    variant = "tma" if precision is None else precision
    for rank in (0, 5):
        plan = planning.Plan(Problem(layers, (1.0,) * len(layers), precision, (rank, 8)), variant)
        used, counted = {"gram": [], "grad": []}, []
        for kind, tables in (("gram", plan.gram_tiles), ("grad", plan.grad_tiles)):
            for table in tables.values():
                split = table[table["pieces"] > 1]
                assert len(split) < len(table)
                for arrival in np.unique(split["arrival"]):
                    pieces = np.sort(split[split["arrival"] == arrival], order="piece")
                    assert (
                        pieces["piece"].tolist() == list(range(len(pieces))) and (pieces["pieces"] == len(pieces)).all()
                    )
                    used[kind] += (pieces["first_part"] + pieces["piece"]).tolist()
                    counted.append(arrival)
                    if kind == "gram":
                        assert pieces["first"].tolist() == [0, *pieces["last"][:-1]]
                        assert len(np.unique(pieces[["layer", "a_row", "b_row", "out_row", "out_column"]])) == 1
                    else:  # every step of every pair once
                        steps = int(pieces["contracted"][0]) // plan.variant.grad[0].depth
                        walked = [
                            at for row in pieces for at in walk(plan, range(*row[["first_run", "last_run"]]), steps)
                        ]
                        assert len(set(walked)) == len(walked) and len(walked) % steps == 0
        assert sorted(used["gram"]) == list(range(plan.gram_parts))
        assert sorted(used["grad"]) == list(range(plan.grad_parts))
        assert sorted(counted) == list(range(plan.arrivals))
        assert sum(r.padded_flops for r in plan.summary()) == 2 * (walk_gram(plan) + walk_grad(plan))


def end(pieces, steps, cost):
    return split_k.makespan(pieces.programs(np.ones(len(steps)), cost).longest_first())


def test_pieces_end_earlier_than_whole_sums():
    """10 long sums and 200 short ones on 132 multiprocessors: no longer than a fair share and a piece."""
    steps = np.array([72] * 10 + [8] * 200)
    cost = split_k.Cost(begin=1.0, write=0.5, part=1.0)
    chosen = split_k.balanced(steps, np.ones(len(steps)), cost)
    assert end(chosen, steps, cost) < 0.45 * 73.5
    assert np.bincount(chosen.row, weights=chosen.last - chosen.first).tolist() == steps.tolist()
    equal = np.full(528, 9)
    assert (split_k.balanced(equal, np.ones(528), cost).pieces == 1).all()
    late = np.full(140, 72)  # eight of them would begin when the others end
    assert end(split_k.balanced(late, np.ones(140), cost), late, cost) < 0.75 * 2 * 73.5


def programs(*each):
    """Of (own, rest, row, pieces)."""
    return split_k.Programs(*map(np.array, zip(*each, strict=True)))


def test_the_piece_that_is_stored_last_adds_and_writes():
    """Not the last one of its tile: which one it is depends on when each began and how long it is."""
    long_first = programs((20.0, 4.0, 0, 2), (10.0, 4.0, 0, 2))
    assert split_k.makespan(long_first, 2) == 20 + 4  # side by side the short one is there first
    assert split_k.makespan(long_first, 1) == 30 + 4
    assert split_k.makespan(programs((10.0, 4.0, 0, 2), (20.0, 4.0, 0, 2)), 2) == 20 + 4
    # 9 begins when 10 ends; the tile ends with it
    tiles = programs((20.0, 0.0, 1, 1), (10.0, 4.0, 0, 2), (9.0, 4.0, 0, 2))
    assert split_k.makespan(tiles, 2) == 10 + 9 + 4 and tiles.together == 43


def test_pieces_of_equal_sums_are_equal():
    """With as many multiprocessors as pieces, nothing starts later, so no shorter rest would fill a gap."""
    steps = np.full(66, 40)
    chosen = split_k.balanced(steps, np.ones(66), split_k.Cost(begin=2.0, write=4.0, part=2.0))
    assert (chosen.pieces == 2).all() and (chosen.last - chosen.first == 20).all()


def test_sums_of_one_length_are_cut_to_fit_the_others():
    """No limit that is tried cuts 48 sums in halves and leaves 32 shorter ones whole."""
    steps, cost = np.repeat([16, 8], [48, 32]), split_k.Cost(begin=2.0, write=4.0, part=2.0)
    chosen = split_k.balanced(steps, np.ones(80), cost)
    assert np.bincount(chosen.row).tolist() == [2] * 48 + [1] * 32
    assert end(chosen, steps, cost) == 2 + 8 + 3 * 2 + 4


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("limit", [5, 8, 13.5, 21, 40, 100])
def test_no_piece_takes_longer_than_the_limit(limit, equal):
    """Equal ones not even if they also add all pieces up and write. If it can't be kept, every piece has a step."""
    steps, step = np.arange(1, 73), np.where(np.arange(72) % 3, 1.0, 2 / 3)
    cost = split_k.Cost(begin=2.0, write=4.0, part=0.5)
    pieces = split_k.cut(steps, split_k.within(limit, steps, step, cost, equal))
    length = pieces.last - pieces.first
    assert length.min() >= 1 and np.bincount(pieces.row, weights=length).tolist() == steps.tolist()
    assert (pieces.first[pieces.piece == 0] == 0).all() and pieces.first[1:][pieces.piece[1:] > 0].tolist() == (
        pieces.last[:-1][pieces.piece[1:] > 0].tolist()
    )
    assert (pieces.pieces[(cost.begin + steps * step + cost.write)[pieces.row] <= limit] == 1).all()
    own, rest, *_ = pieces.programs(step, cost)
    if limit > 13:
        assert own.max() <= limit + 1e-9
    if limit > 21 and equal:
        assert (own + rest).max() <= limit + 1e-9


def test_a_second_launch_of_gradient_tiles_must_pay():
    """In the published networks small tiles would save 1 to 2 % of the work, less than their launch."""
    for depth in BLOCKS:
        plan = make(network(depth, False))
        assert list(plan.grad_tiles) == [plan.variant.grad[0]]
    narrow = tuple(Layer((64, 64, 3, 3), (1, 1), (1, 1), 1, "isonet") for _ in range(8))
    assert list(make(narrow).grad_tiles) == [plan.variant.grad[1]]


def test_a_rank_with_few_narrow_layers_has_no_launches_for_them():
    """They would take longer than the padding that they save: 4 and 7 microseconds of 70, as predicted."""
    layers = network(50, False)
    for rank in range(8):
        plan = planning.Plan(Problem(layers, (1.0,) * len(layers), None, (rank, 8)), "tma")
        assert plan.launches == {"loss": 3, "gradient": 1}
    narrow = tuple(Layer((64, 64, 3, 3), (1, 1), (1, 1), 1, "isonet") for _ in range(60))
    assert make((*layers, *narrow)).launches == {"loss": 4, "gradient": 2}


@pytest.mark.parametrize("offsets", ["whole", "shards"])
def test_runs_name_every_pair_once(offsets):
    """A run walked with arithmetic gives exactly the pairs (offset, tap) of the mathematics."""
    shapes = [((5, 5, 3, 3), 1, 1), ((5, 5, 3, 3), 2, 1), ((5, 5, 5, 3), 2, 1), ((5, 5, 4, 4), 3, 2), ((5, 5, 7), 2, 1)]
    shapes += [((5, 5, 2, 3, 2), 1, 1), ((5, 5, 3, 1, 3), 2, 1), ((5, 5), 1, 1)]
    for shape, stride, dilation in shapes:
        dims = len(shape) - 2
        layers = (Layer(shape, (stride,) * dims, (dilation,) * dims, 1, "isonet"),)
        for rank in range(1 if offsets == "whole" else 3):
            problem = Problem(layers, (1.0,), None, (rank, 1 if offsets == "whole" else 3))
            plan, ts = planning.Plan(problem, "tma"), problem.units(("overlap",), triton=True)
            (one,) = plan.packed
            kernel = one.kernel
            for table in plan.grad_tiles.values():
                for row in table:
                    u = np.unravel_index(row["tap"], kernel)
                    middle = row["middle_run"]
                    runs = range(row["first_run"], middle), range(middle, row["last_run"])
                    found = [walk(plan, some, 1) for some in runs]
                    for transposed, sign in ((0, 1), (1, -1)):
                        wanted = set()
                        for index, t in enumerate(ts[0]):
                            v = tuple(a + sign * b for a, b in zip(u, (0,) * (3 - dims) + t, strict=True))
                            inside = all(0 <= a < k for a, k in zip(v, kernel, strict=True))
                            if inside and (any(t) or not transposed):
                                tap = int(np.ravel_multi_index(v, kernel))
                                wanted.add((index * one.offset_rows, tap * one.tap_rows, 0))
                        assert sorted(found[transposed]) == sorted(wanted)


def walk(plan, runs, steps):
    """Where R and A of each pair are, and the step of their product."""
    found = []
    for run in runs:
        first, last, width, r, r_line, r_tap, a, a_line, a_tap = map(int, plan.runs[run].tolist()[:9])
        for i, step in (divmod(it, steps) for it in range(first, last)):
            found.append(
                (r + i // width * r_line + i % width * r_tap, a + i // width * a_line + i % width * a_tap, step)
            )
    return found


def test_small_groups_share_a_block():
    plan = make((Layer((1024, 1, 3, 3), (1, 1), (1, 1), 1024, "isonet"),))
    (one,) = plan.packed
    assert (one.merged, one.blocks) == (64, 16)
    assert math.prod(plan.planes_shape) * 4 < 32 * 2**20


@pytest.mark.parametrize("shape", [(2**16, 2**13, 3, 3), (2**15, 2**15)])
def test_rejects_more_than_32_bits_can_name(shape):
    layers = (Layer(shape, (1,) * (len(shape) - 2), (1,) * (len(shape) - 2), 1, "isonet"),)
    with pytest.raises(ValueError, match="32-bit"):
        packed.shapes(Problem(layers * 600, (1.0,) * 600))


@pytest.mark.parametrize(
    "table, module, prefix",
    [
        (pack.PACK, pack, "TILE"),
        (transform.PATCH, transform, "TILE"),
        (gram.GRAM, gram, "TILE"),
        (grad.GRAD, grad, "TILE"),
        (grad.RUN, grad, "RUN"),
    ],
)
def test_kernels_read_the_columns_by_their_names(table, module, prefix):
    unread = "unused", "layer", *split_k.SPLIT_COLUMNS.split()[1:]  # which follow the first of them
    for name in table.names:
        if name not in unread or hasattr(module, f"{prefix}_{name.upper()}"):
            assert getattr(module, f"{prefix}_{name.upper()}").value * 4 == table.fields[name][1]


def test_only_large_and_3d_kernels_are_computed_over_frequencies():
    """The published networks are not: of 3x3 three fifths of the products would be left."""
    published = {layer for depth in BLOCKS for residual in (False, True) for layer in network(depth, residual)}
    assert {layer.triton_form for layer in published} == {"overlap"}
    for channels, kernel, stride, dilation, penalty, form in (
        (64, (5, 5), 1, 1, "isonet", "frequency"),
        (64, (5, 5), 2, 2, "lorth", "frequency"),  # unstrided, spread out
        (64, (4, 5), 1, 1, "isonet", "frequency"),
        (64, (4, 4), 1, 1, "isonet", "overlap"),
        (64, (3, 3, 3), 1, 1, "lorth", "frequency"),
        (64, (11,), 1, 1, "isonet", "frequency"),
        (64, (9,), 1, 1, "isonet", "overlap"),
        (64, (9, 9), 2, 1, "isonet", "overlap"),
        (64, (9, 9), 1, 1, "matrix", "overlap"),  # one tap
        (8, (9, 9), 1, 1, "isonet", "overlap"),  # thin
        (64, (0, 9), 1, 1, "isonet", "overlap"),
        (64, (), 1, 1, "isonet", "overlap"),
    ):
        dims = len(kernel)
        layer = Layer((64, channels, *kernel), (stride,) * dims, (dilation,) * dims, 1, penalty)
        assert layer.triton_form == form, layer


class OverOffsets(Layer):
    triton_form = "overlap"


@pytest.mark.parametrize("kernel", [(5, 5), (3, 3, 3), (3, 3)])
def test_the_rule_counts_what_the_tables_multiply(kernel):
    """The rule counts the gradient's products; gram takes half as many, in either form."""
    layer = Layer((256, 256, *kernel), (1,) * len(kernel), (1,) * len(kernel), 1, "isonet")
    over_offsets = OverOffsets(layer.shape, layer.stride, layer.dilation, 1, "isonet")
    offsets, frequencies = walk_grad(make((over_offsets,))), 256**3 * (2 * math.prod(layer.grid) - 1)
    assert layer.triton_form == ("frequency" if frequencies <= geometry.TRITON_SHARE * offsets else "overlap")
    if layer.triton_form == "frequency":
        plan = make((layer,))
        assert walk_grad(plan) == frequencies
        assert walk_gram(plan) == pytest.approx(3 * frequencies / 2, rel=1e-2)
