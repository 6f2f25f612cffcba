"""The model of the launches' time: its arithmetic, and what it predicts of the published networks."""

import pathlib
import re
import sys

import numpy as np
import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))

import schedule


def test_programs_start_in_order_where_one_is_free():
    for times, end in (([3, 2, 2, 2], 5), ([2, 2, 2, 3], 5), ([2, 2, 2, 2, 3], 7), ([], 0)):
        own, count = np.array(times, float), len(times)
        whole = schedule.Programs(own, np.zeros(count), np.arange(count), np.ones(count, int))
        assert schedule.makespan(whole, 2) == end


@pytest.mark.parametrize("layers", ["isonet18", "5x5"])
def test_steps_are_counted_from_the_tables(layers):
    """Every multiply-add of the summary is in some program's steps."""
    plan = schedule.plan_of(schedule.chain((256, 256), (5, 5)) if layers == "5x5" else schedule.layers_of(layers))
    free = dict(l2_tbytes=1e9, memory_tbytes=1e9, tile_us=0, gradient_bytes=0)
    unit = schedule.Machine(multiprocessors=1, tflops=1e-6, **free)
    flops = sum(each.together for _, each in schedule.programs(plan, unit))
    assert flops == pytest.approx(sum(row.padded_flops for row in plan.summary()), rel=1e-12)


def test_each_assumption_counts():
    """A slower machine takes longer, whichever part of it is slower."""
    plan = schedule.plan_of(schedule.layers_of("isonet18"))
    usual = schedule.total_us(plan, schedule.Machine())
    slower = dict(tflops=400, l2_tbytes=4, memory_tbytes=2, tile_us=4, launch_us=4, finish_us=200)
    for name, value in (slower | {"gradient_bytes": 12}).items():
        assert schedule.total_us(plan, schedule.Machine(**{name: value})) > usual, name


@pytest.mark.parametrize("network, limit", [("18", 1.5), ("34", 1.45), ("50", 1.5), ("101", 1.5)])
def test_published_networks_are_predicted_near_their_floor(network, limit):
    """Targets of the first run on a GPU; ISONet-50 takes 1.53 if its 1x1 layers start as late as their length says."""
    assert schedule.ratio(f"isonet{network}", schedule.Machine()) <= limit


@pytest.mark.parametrize("network, least", [("isonet34", 6.2), ("isonet50", 5.6)])
def test_eight_ranks_are_predicted_to_gain(network, least):
    assert schedule.speedup(network, 8, schedule.Machine()) >= least
    assert schedule.even_speedup(network, 8, schedule.Machine()) < 8


@pytest.mark.parametrize("network, least", [("isonet34", [1.9, 3.5]), ("isonet50", [1.8, 3.2])])
def test_few_ranks_are_predicted_to_gain(network, least):
    assert all(schedule.speedup(network, r, schedule.Machine()) >= gain for r, gain in zip((2, 4), least, strict=True))


def test_a_piece_is_stored_and_one_program_adds():
    """One tile of 9 x 8 steps of 128 x 128 x 64: whole or in pieces, its products are the same."""
    layers = schedule.chain((512, 512), (3, 3))
    plan = schedule.plan_of(layers, (0, 8))
    free = dict(tile_us=0, l2_tbytes=1e9, memory_tbytes=1e9)
    _, each = next(schedule.programs(plan, schedule.Machine(**free)))
    products = sum(row.padded_flops for row in plan.summary())
    assert plan.gram_parts and each.together < 1e-6 * 132 * products / 620
    table = next(iter(plan.gram_tiles.values()))
    slow = schedule.Machine(l2_tbytes=1, tflops=1e9, tile_us=0)
    part, pieces = slow.step_us(0, 4 * 128**2), table["pieces"]
    split = pieces > 1
    own, rest, tile, of = schedule.in_pieces(table, np.zeros(len(table)), 4 * 128**2, 0, slow)
    assert own == pytest.approx(np.where(split, part, 0)) and rest == pytest.approx(np.where(split, pieces * part, 0))
    assert of.tolist() == pieces.tolist() and len(set(tile[split])) == plan.arrivals
    assert len(set(tile)) == sum(1 / pieces)


def test_sharing_the_work_pays():
    assert schedule.speedup("isonet18", 1, schedule.Machine()) == 1
    assert schedule.speedup("isonet18", 2, schedule.Machine()) > 1.5


def test_the_schedule_is_printed(capsys):
    schedule.report(["isonet18"], schedule.Machine())
    printed = capsys.readouterr().out
    assert "isonet18" in printed and "gram 128x128" in printed and "times floor and packing" in printed
    assert np.isfinite(schedule.ratio("isonet18", schedule.Machine()))


def test_transforms_are_counted():
    """41 frequencies of 25 taps, of which 13 are multiplied, in steps of 16; frequencies in steps of 32 and 16."""
    plan = schedule.plan_of(schedule.chain((256, 256), (5, 5)))
    moving, multiplying = schedule.Machine(float32_tflops=1e9), schedule.Machine(memory_tbytes=1e9)
    for back, nbytes, waves in ((False, 41 * 18 + 25 * 4, 64), (True, 41 * 8 + 25 * 4, 48)):
        assert schedule.transform_us(plan, moving, back) == pytest.approx(256**2 * nbytes / 4.4e6)
        assert schedule.transform_us(plan, multiplying, back) == pytest.approx(256**2 * 4 * waves * 16 / 30e6)
    names = [launch.name for launch in schedule.launches(plan, schedule.Machine())]
    assert names == ["transform", "gram 128x128", "grad 128x256 of planes", "transform back"]


def test_frequencies_gain_what_the_notes_say(capsys):
    schedule.report_frequency(schedule.Machine())
    lines = capsys.readouterr().out.splitlines()[1:]
    gains = {re.sub(" +", " ", line[:18]).strip(): float(line.split()[-1].rstrip("x")) for line in lines}
    notes = (pathlib.Path(__file__).parents[2] / "docs/gpu-notes.md").read_text()
    table = re.findall(r"^\| (\dx\S+), (\d+ to \d+) \|.*\| ([\d.]+)x \| [\d.]+x \|$", notes, re.MULTILINE)
    assert len(table) == 6
    for kernel, channels, gain in table:
        assert gains.pop(f"{kernel} {channels}") == pytest.approx(float(gain), abs=0.05), (kernel, channels)
    assert set(gains.values()) == {1.0}
