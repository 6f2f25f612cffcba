"""The harness: statistics, order and repeats with a clock that the test turns; what is checked before it is timed."""

import csv
import itertools
import math

import pytest
import torch

from benchmarks import clocks, harness, rows
from benchmarks.harness import Contender, Session, Workload, error, interleave, parser, percentiles

WORKLOAD = Workload("op", "forward", "case", "float32", "nchw")


class FakeTime:
    """Seconds that pass only inside calls, and a log of the calls."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def call(self, name, *milliseconds):
        durations = itertools.cycle(milliseconds)

        def run():
            self.log.append(name)
            self.now += next(durations) / 1e3

        return run


@pytest.fixture
def fake(monkeypatch):
    time = FakeTime()
    clock = clocks.Clock(lambda: time.now)
    clock.peak = lambda call: call() or 0
    monkeypatch.setattr(harness, "Clock", lambda: clock)
    time.clock = clock
    return time


@pytest.fixture
def session(fake, monkeypatch):
    threads = torch.get_num_threads()
    made = Session("test", parser("").parse_args(["--dry-run"]))
    yield made
    torch.set_num_threads(threads)


def written(session):
    with open(session.path, newline="") as file:
        return list(csv.DictReader(file))


def test_percentiles_interpolate():
    assert percentiles([5, 1, 4, 2, 3]) == pytest.approx((3, 1.8, 4.2))
    assert percentiles([1, 2]) == pytest.approx((1.5, 1.2, 1.8))
    assert percentiles([7]) == (7, 7, 7)


def test_rounds_are_interleaved_and_begin_with_another_provider_each(fake):
    fake.clock.sample_ms = 0.0
    calls = {name: fake.call(name, 1) for name in "abc"}
    interleave(fake.clock, calls, seconds=math.inf, rounds=3)
    assert "".join(fake.log) == "aabbcc" + "abc" + "bca" + "cab"


def test_warm_up_is_not_counted_and_short_calls_are_repeated(fake):
    fake.clock.sample_ms = 5.0
    slow_start = fake.call("slow start", 90, *[2] * 1000)
    timing = interleave(fake.clock, {"a": slow_start, "b": fake.call("b", 20)}, seconds=math.inf, rounds=4)
    assert timing["a"] == pytest.approx((2, 2, 2)) and timing["b"] == pytest.approx((20, 20, 20))
    assert fake.log.count("slow start") == 2 + 4 * math.ceil(5 / 2) and fake.log.count("b") == 2 + 4


def test_time_is_limited_after_three_rounds(fake):
    call = fake.call("a", 1000)
    interleave(fake.clock, {"a": call}, seconds=1.0, rounds=50)
    assert fake.log.count("a") == 1 + 3


def test_error_is_relative_to_each_reference():
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert error([torch.tensor([1.0, -3.0])], [reference]) == pytest.approx(0.25)
    assert error([torch.tensor([1.0])], [reference]) == math.inf
    assert error([torch.tensor([math.nan, -4.0])], [reference]) == math.inf


def test_rows_name_shares_of_the_bound_and_have_the_columns(session, fake):
    bound = Contender("copy", fake.call("copy", 2), bytes=8e6)
    ours = Contender("isonet_fast", fake.call("ours", 4), lambda: 0.5, calls=2, bytes=8e6, resident=100)
    session.compare(WORKLOAD, [bound, ours], tolerance=0.5, limit="copy")
    copy, fast = written(session)
    assert tuple(fast) == rows.COLUMNS
    assert copy["p50_ms"] == "2" and copy["fraction_of_limit"] == "1" and copy["error"] == ""
    assert float(copy["gbytes_per_s"]) == pytest.approx(8e6 / 2e-3 * 1e-9)
    assert fast["p50_ms"] == "2" and fast["error"] == "0.5" and fast["peak_bytes"] == "100"
    assert fast["utc"] == copy["utc"] and fast["torch"] == torch.__version__


def test_flops_are_compared_with_a_rate_in_teraflops(session, fake):
    session.compare(WORKLOAD, [Contender("ours", fake.call("ours", 1), flops=1e9)], limit=4.0)
    assert written(session)[0]["fraction_of_limit"] == "0.25" and written(session)[0]["tflops"] == "1"


def test_a_wrong_or_failing_provider_is_reported_and_not_timed(session, fake, capsys):
    def fails():
        raise RuntimeError("no such kernel\nand a traceback")

    good = Contender("good", fake.call("good", 1), lambda: 0.0)
    wrong = Contender("wrong", fake.call("wrong", 1), lambda: 0.2)
    nan = Contender("nan", fake.call("nan", 1), lambda: math.nan)
    session.compare(WORKLOAD, [wrong, nan, Contender("broken", fails), good], tolerance=0.1)
    assert [row["provider"] for row in written(session)] == ["good"] and "wrong" not in fake.log
    told = capsys.readouterr().err
    assert "wrong: ArithmeticError: error 0.2" in told and "broken: RuntimeError: no such kernel\n" in told
    assert session.finish() == 3


def test_a_provider_that_fails_while_it_is_timed_leaves_the_others(session, fake, capsys):
    def broken(at):
        calls = itertools.count(1)

        def fails():  # the first two calls are not timed
            if next(calls) == at:
                raise MemoryError("none left")

        return Contender("broken", fails)

    good = [Contender(name, fake.call(name, 1)) for name in ("first", "last")]
    session.compare(WORKLOAD, [good[0], broken(5), good[1]])
    assert [row["provider"] for row in written(session)] == ["first", "last"]
    assert "broken: MemoryError: none left\n" in capsys.readouterr().err and session.finish() == 3
    assert session.compare(WORKLOAD, [broken(3)]) == {} and len(written(session)) == 2


def test_nothing_is_started_after_the_budget(fake, capsys):
    session = Session("test", parser("").parse_args(["--dry-run", "--budget", "-1"]))
    assert session.compare(WORKLOAD, [Contender("a", fake.call("a", 1))]) == {}
    assert not fake.log and "left out, no time: op forward case" in capsys.readouterr().err


def test_a_dry_run_keeps_no_rows(session):
    assert rows.RESULTS not in session.path.parents


def test_cuda_samples_are_the_time_between_two_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    clock = object.__new__(clocks.CudaClock)
    clock._flush = torch.zeros(1)
    assert clock.sample(lambda: log.append("call"), 3) == 4.0
    assert log == ["idle", "busy", "record", "call", "call", "call", "record", "wait"]  # no host latency in the sample
    log.clear()
    assert clock.cold(lambda: log.append("call"), 2) == 12.0
    assert log == ["busy", "record", "call", "record", "record", "call", "record", "idle"]


def test_the_latest_group_that_holds_every_provider():
    def row(provider, stamp, value):
        return dict.fromkeys(rows.COLUMNS, "") | {"provider": provider, "utc": stamp, "p50_ms": value, "op": "x y"}

    together = [row("a", "1", "1"), row("b", "1", "2")]
    later = [row("a", "2", "9"), row("b", "3", "9")]
    assert rows.group(together + later, ("a", "b"), op="x*") == {"a": together[0], "b": together[1]}
    assert rows.group(together + later, ("a",), op="x y") == {"a": later[0]}
    assert rows.group(together, ("c",)) == {} and rows.group(together, op="y") == {}


@pytest.mark.parametrize(
    ("failing", "left_out"),
    [
        ("SReLU", {("srelu", "isonet_fast"), ("step", "isonet_fast"), ("step", "isonet_fast without penalty")}),
        ("the penalty", {("orthogonality, scaling", "isonet_fast"), ("step", "isonet_fast")}),
    ],
)
def test_a_kernel_that_is_missing_costs_only_what_needs_it(monkeypatch, session, failing, left_out):
    """One probe fails: the other op's kernels are timed, and everybody else's."""
    reasons = {"SReLU": None, "the penalty": None} | {failing: "no kernel image is available"}
    monkeypatch.setattr(harness.library, "why_not", lambda device: reasons["SReLU"])
    monkeypatch.setattr(harness.kernels, "why_not", lambda device: reasons["the penalty"])
    session._lacking = harness.lacking(session.device)
    timed = set()
    wanted = [(op, provider) for op in ("srelu", "orthogonality, scaling") for provider in ("official", "isonet_fast")]
    wanted += [("step", provider) for provider in ("official", "isonet_fast", "isonet_fast without penalty")]
    for op, provider in wanted:
        found = session.compare(Workload(op, "forward", "2", "float32"), [Contender(provider, lambda: None)])
        timed |= {(op, name) for name in found}
    assert timed == {*wanted} - left_out
    assert session.failures == len(left_out)
