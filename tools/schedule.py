"""What the penalty's launches should take: a plan's tables, scheduled on the multiprocessors of a GPU.

    python tools/schedule.py [isonet34 ...] [--l2-tbytes 5.5 ...]
    python tools/schedule.py --frequency    # what large and 3-d kernels gain by frequencies

A model, of which no part was measured on a GPU. A launch's programs start in the order of their table, each on the
first multiprocessor that is free. A program takes

    tile_us + steps * max(products / tensor rate, bytes / L2 rate) + bytes of the gradient / memory rate

and, where a tile is split, the time to store its piece in L2. Whichever piece of a tile is stored last, its program
loads all of them and writes the gradient. All programs have an equal share of every rate. "floor" is the time of the
multiplications that the mathematics needs at the rate of a large product, and of packing. Every assumption is an
option.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

from isonet_fast import OrthoConv2d, models
from isonet_fast.geometry import Layer
from isonet_fast.kernels import tiles
from isonet_fast.kernels.plan import Plan
from isonet_fast.kernels.split_k import Programs, makespan
from isonet_fast.problem import Problem
from isonet_fast.regularizer import official_filter

NETWORKS = ("isonet18", "isonet34", "isonet50", "isonet101")
CHANNELS = {"64 to 256": (64, 64, 64, 128, 128, 256, 256), "256 to 512": (256, 256, 512, 512)}
KERNELS = ((3, 3), (5, 5), (7, 7), (3, 3, 3))
SHARDED = ("isonet34", "isonet50")
RANKS = (8, 64)


@dataclasses.dataclass
class Machine:
    """An H200, as far as the model knows it."""

    multiprocessors: int = 132
    tflops: float = 620.0  # of bf16 products in a loop
    floor_tflops: float = 790.0  # of one large product
    l2_tbytes: float = 7.0  # a second
    memory_tbytes: float = 4.4
    float32_tflops: float = 30.0  # outside of the tensor cores, half of the peak there
    tile_us: float = 2.0  # a tile's prologue and epilogue
    launch_us: float = 1.0  # from one kernel of a graph to the next
    finish_us: float = 7.0  # one program
    gradient_bytes: float = 4.0  # per element that is accumulated: 4 as sm_90 adds it, 8 where it is loaded and stored

    def store_us(self, nbytes: float) -> float:
        """The time of a program's writes."""
        return 1e-6 * self.multiprocessors * nbytes / self.memory_tbytes

    def step_us(self, flops: float, nbytes: float) -> float:
        """One step of a program's loop."""
        return 1e-6 * self.multiprocessors * max(flops / self.tflops, nbytes / self.l2_tbytes)


class Launch(NamedTuple):
    name: str
    us: float
    programs: int
    balance: float  # time if every multiprocessor were busy to the end, relative to what it takes


def layers_of(network: str) -> tuple[Layer, ...]:
    """What the official code penalises of a published network."""
    with torch.device("meta"):
        model = getattr(models, network)()
    return tuple(
        Layer(tuple(module.weight.shape), module.stride, module.dilation, module.groups, "isonet")
        for name, module in model.named_modules()
        if isinstance(module, OrthoConv2d) and official_filter(name, module)
    )


def plan_of(layers: tuple[Layer, ...], share: tuple[int, int] = (0, 1)) -> Plan:
    return Plan(Problem(layers, (1.0,) * len(layers), None, share), "tma")


def programs(plan: Plan, machine: Machine) -> Iterator[tuple[str, Programs]]:
    """For every launch of tiles, what each program takes."""
    for gram, table in plan.gram_tiles.items():
        steps = table["last"].astype(np.int64) - table["first"]
        size = gram.block * gram.chunk
        product = 2 * size * gram.block
        step = machine.step_us(3 * product, 4 * size * 2)
        diagonal = machine.step_us(2 * product, 2 * size * 2)
        step = np.where(table["a_row"] == table["b_row"], diagonal, step)
        yield f"gram {gram.block}x{gram.block}", in_pieces(table, steps * step, 4 * gram.block**2, 0, machine)
    done = np.concatenate([[0], np.cumsum(plan.runs["last"].astype(np.int64) - plan.runs["first"])])
    for of, tables, nbytes in (("", plan.grad_tiles, machine.gradient_bytes), (" of planes", plan.spectrum_tiles, 4)):
        for grad, table in tables.items():
            steps = done[table["last_run"]] - done[table["first_run"]]
            elements = grad.rows * grad.columns
            step = machine.step_us(2 * elements * grad.depth, (grad.rows + grad.columns) * grad.depth * 2)
            written = machine.store_us(elements * nbytes)
            yield f"grad {grad.rows}x{grad.columns}{of}", in_pieces(table, steps * step, 4 * elements, written, machine)


def in_pieces(table: np.ndarray, products: np.ndarray, nbytes: int, written: float, machine: Machine) -> Programs:
    """Programs that take so long for their products and to write a tile. Each piece of a tile, of `nbytes`, is stored,
    and all are loaded."""
    split = table["pieces"] > 1
    part = np.where(split, machine.step_us(0, nbytes), 0)
    tile = np.where(split, table["arrival"], -2 - np.arange(len(table)))
    return Programs(machine.tile_us + products + part, part * table["pieces"] + written, tile, table["pieces"])


def launches(plan: Plan, machine: Machine) -> list[Launch]:
    """Every launch of `accumulate_grad_` that another one waits for, in order."""
    made = [Launch("pack", pack_us(plan, machine), len(plan.pack_tiles), 1.0)] if len(plan.pack_tiles) else []
    there, back = plan.spectrum.there, plan.spectrum.back
    if len(there):
        made.append(Launch("transform", transform_us(plan, machine, False), len(there), 1.0))
    finishing = [([machine.finish_us], [0.0], [-1], [1])]  # a launch beside the first of the gradient's, on its own
    for name, each in programs(plan, machine):
        if name.startswith("grad") and finishing:
            each = Programs(*map(np.concatenate, zip(finishing.pop(), each, strict=True)))
        took = makespan(each, machine.multiprocessors)
        made.append(Launch(name, took, len(each.own), each.together / machine.multiprocessors / took))
    if len(back):
        made.append(Launch("transform back", transform_us(plan, machine, True), len(back), 1.0))
    return made


def pack_us(plan: Plan, machine: Machine) -> float:
    """Reading every weight of 4 bytes and writing its two planes, of 2 each."""
    elements = sum(math.prod(p.layer.shape) for p in plan.packed if p.units and not p.by_frequency)
    return 1e-6 * 8 * elements / machine.memory_tbytes


def transform_us(plan: Plan, machine: Machine, back: bool) -> float:
    """There: every weight of 4 bytes is read, of each frequency five hi and four lo planes are written. Back: 8 bytes
    of D per frequency are read. Cosines and sines are multiplied outside of the tensor cores, in whole steps."""
    pieces = plan.spectrum.back if back else plan.spectrum.there
    options = tiles.transform_back_options(True) if back else tiles.transform_options(True)
    size = options["ROWS"] * options["COLUMNS"]
    taps, frequencies = pieces["taps"].astype(np.int64), pieces["frequencies"].astype(np.int64)
    moved = size * (8 * frequencies + machine.gradient_bytes * taps if back else 9 * 2 * frequencies + 4 * taps)
    waves = -(-frequencies // options["FREQUENCIES"]) * options["FREQUENCIES"] * pieces["half"]
    return 1e-6 * max(moved.sum() / machine.memory_tbytes, 2 * 2 * size * waves.sum() / machine.float32_tflops)


def total_us(plan: Plan, machine: Machine) -> float:
    made = launches(plan, machine)
    return sum(launch.us for launch in made) + machine.launch_us * len(made)


def floor_us(plan: Plan, machine: Machine) -> float:
    return 1e-6 * sum(row.flops for row in plan.summary()) / machine.floor_tflops + pack_us(plan, machine)


def ratio(network: str, machine: Machine) -> float:
    """Predicted time of a penalty with its gradient over its floor."""
    plan = plan_of(layers_of(network))
    return total_us(plan, machine) / floor_us(plan, machine)


def speedup(network: str, ranks: int, machine: Machine) -> float:
    """Predicted gain of sharing the work between ranks, by the slowest of them."""
    layers = layers_of(network)
    slowest = max(total_us(plan_of(layers, (rank, ranks)), machine) for rank in range(ranks))
    return total_us(plan_of(layers), machine) / slowest


def even_speedup(network: str, ranks: int, machine: Machine) -> float:
    """What sharing could gain at most: if ranks and their multiprocessors shared everything but launches evenly."""
    plan = plan_of(layers_of(network))
    made = launches(plan, machine)
    busy = sum(launch.us * launch.balance for launch in made)
    return total_us(plan, machine) / (busy / ranks + machine.launch_us * len(made))


def chain(channels: Sequence[int], kernel: tuple[int, ...]) -> tuple[Layer, ...]:
    """Convolutions one after the other, stride 1."""
    ones = (1,) * len(kernel)
    return tuple(Layer((o, i, *kernel), ones, ones, 1, "isonet") for i, o in itertools.pairwise(channels))


class OverOffsets(Layer):
    """A layer that is computed over offsets whatever its kernel."""

    triton_form = "overlap"  # type: ignore[assignment]


def report_frequency(machine: Machine) -> None:
    """Print what the frequency form gains where the plan takes it."""
    print("predicted microseconds, a model: over offsets; as planned; the gain")
    for kernel in KERNELS:
        for name, channels in CHANNELS.items():
            layers = chain(channels, kernel)
            offsets = tuple(OverOffsets(**dataclasses.asdict(layer)) for layer in layers)
            over, planned = total_us(plan_of(offsets), machine), total_us(plan_of(layers), machine)
            print(f"{'x'.join(map(str, kernel)):6} {name:11} {over:6.0f} {planned:6.0f} {over / planned:.2f}x")


def report(networks: Iterable[str], machine: Machine) -> None:
    """Print the predicted schedule of each network, and what ranks gain."""
    print("predicted microseconds (share of the time in which multiprocessors are busy), a model:")
    for network in networks:
        plan = plan_of(layers_of(network))
        parts = ", ".join(f"{each.name} {each.us:.0f} ({each.balance:.0%})" for each in launches(plan, machine))
        took, floor = total_us(plan, machine), floor_us(plan, machine)
        print(f"{network:10} {took:.0f}, {took / floor:.2f} times floor and packing ({floor:.0f}): {parts}")
    for network in (name for name in networks if name in SHARDED):
        gains = [(ranks, speedup(network, ranks, machine), even_speedup(network, ranks, machine)) for ranks in RANKS]
        print(
            f"{network:10}",
            ", ".join(f"{gain:.1f}x on {ranks} ranks (even: {even:.1f}x)" for ranks, gain, even in gains),
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("networks", nargs="*", default=NETWORKS)
    for assumption in dataclasses.fields(Machine):
        name = "--" + assumption.name.replace("_", "-")
        options.add_argument(name, type=type(assumption.default), default=assumption.default, help="%(default)s")
    options.add_argument("--frequency", action="store_true", help="what a sum over frequencies gains")
    given = vars(options.parse_args())
    networks, frequency = given.pop("networks"), given.pop("frequency")
    if frequency:
        report_frequency(Machine(**given))
    else:
        report(networks, Machine(**given))


if __name__ == "__main__":
    main()
