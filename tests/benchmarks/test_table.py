"""README tables come from rows; targets are judged only by rows."""

import types

import pytest

from benchmarks import breakdown, plot, rows, table, targets

STAMP = {"device": "NVIDIA H200", "torch": "2.11.0", "driver": "1, CUDA 13.0"}


def measured(op, mode, case, dtype, stamp="1", **times):
    base = dict.fromkeys(rows.COLUMNS, "") | STAMP | {"layout": "", "utc": stamp}
    found = []
    for provider, ms in times.items():
        row = base | {"op": op, "mode": mode, "case": case, "dtype": dtype, "provider": provider.replace("_0", ", ")}
        row |= {"p50_ms": str(ms), "p20_ms": str(ms), "p80_ms": str(ms), "peak_bytes": "1000000"}
        bound = times.get("copy", times.get("matmul"))
        found.append(row | {"fraction_of_limit": str(bound / ms) if bound else ""})
    return found


def on_gpu(slow=1.0):
    """Rows that reach every GPU target at slow=1, and none at a large one."""
    ours = 0.5 * slow
    found = []
    for layout, more in (("channels_last", 1), ("nchw", 9)):  # whose slowness is shown, and no target
        times = dict(official=30, compile=4, isonet_fast=ours * more, matmul=0.36, copy=0.02)
        rows_of = measured("orthogonality", "loss+gradient graph", "isonet34", "float32", str(more), **times)
        found += [row | {"layout": layout} for row in rows_of]
    for mode in ("accumulate_grad_", "loss", "gradient"):
        found += measured("orthogonality_host", mode, "isonet101, 99 layers", "float32", isonet_fast=0.2 * slow)
    for op in ("srelu", "residual_srelu"):
        for mode, compiled in (("forward", 2), ("backward", 2), ("forward+backward", 3)):
            times = dict(isonet_fast=1.05 * slow, copy=1.0, compile=compiled, official=4)
            found += measured(op, mode, "256x256x56x56", "bfloat16", **times)
            found += measured(
                op, mode, "8x256x7x7", "bfloat16", isonet_fast=9, copy=1.0, compile=0.1
            )  # too small to count
    accuracy = measured("orthogonality_accuracy", "gradient", "512 channels, 3x3", "float32", isonet_fast=1)
    found += [row | {"error": str(0.005 * slow), "p50_ms": ""} for row in accuracy]
    for network in ("isonet50", "risonet50"):
        times = dict(isonet_fast=100 * slow, official=300, compile=150, bare=95, resnet=170, resnet_0compile=130)
        step = measured("step", "training", f"{network} batch 256 224x224", "bfloat16", **times)
        step += measured("step", "training", f"{network} batch 256 224x224", "bfloat16", isonet_fast=1, stamp="0")
        step[0]["peak_bytes"] = str(int(400000 * slow))
        without = dict(step[0], provider="isonet_fast without penalty", p50_ms="99")
        found += [*step, without]
    times = {"SReLU's forward kernel": 2, "the regularizer, kernel excluded": 1, breakdown.PROFILER: 0.5}
    found += measured("step, lines", "training", "isonet50 batch 256 224x224", "bfloat16", **times)
    for mode in ("one thread", "all threads"):
        small = measured("orthogonality_small", mode, "16 channels, 3x3", "float32", overlap=2, frequency=1)
        found += [row | {"tflops": "1"} for row in small]
    times = {"every step": 3, "every 4th step": 2, "every 16th step": 1, "no penalty": 1}
    found += measured("interval", "training", "cifar32 batch 32 16x16", "float32", **times)
    found += measured("peers", "step", "3x3 64->64, batch 16", "float32", none=1, isonet_fast=1.1, official=2)
    return found


@pytest.mark.parametrize(("slow", "reached"), [(1.0, True), (5.0, False)])
def test_gpu_targets_are_reached_or_missed(slow, reached):
    outcomes = [(t.what, o) for t, o in targets.evaluate(on_gpu(slow)) if t.device == "GPU"]
    assert len(outcomes) == 14
    for what, outcome in outcomes:
        assert outcome is not None and outcome.reached is reached, (what, outcome)


@pytest.mark.parametrize(("ours", "reached"), [(10.0, True), (100.0, False)])
def test_cpu_targets_are_reached_or_missed(ours, reached):
    found = measured("srelu", "forward+backward", "2x3x4x4", "float32", official=25, isonet_fast=ours, copy=5)
    found += measured("orthogonality", "loss+gradient", "cifar32", "float32", official=25, isonet_fast=ours, matmul=1)
    found += measured("step", "training", "cifar32 batch 32 32x32", "float32", official=30, isonet_fast=ours, bare=5)
    for mode in ("accumulate_grad_", "loss"):
        found += measured("orthogonality_host", mode, "isonet101, 99 layers", "float32", isonet_fast=ours / 100)
    found = [row | {"device": "cpu: some (2 threads)"} for row in found]
    outcomes = [o for t, o in targets.evaluate(found) if t.device == "CPU"]
    assert [o.reached for o in outcomes] == [reached] * 4
    assert all(o is None for t, o in targets.evaluate(found) if t.device == "GPU")


@pytest.mark.parametrize(("peak", "reached"), [("999999", True), ("1000001", False)])
def test_a_penalty_that_takes_more_memory_misses_its_target(peak, reached):
    found = measured("orthogonality", "loss+gradient", "isonet18", "float32", official=25, isonet_fast=5, matmul=1)
    found = [row | {"device": "cpu: some (2 threads)"} for row in found]
    found = [row | {"peak_bytes": peak} if row["provider"] == "isonet_fast" else row for row in found]
    assert [o.reached for _, o in targets.evaluate(found) if o is not None] == [reached]


def test_half_of_the_calls_tells_nothing_of_the_host():
    found = measured("orthogonality_host", "loss", "isonet101, 99 layers", "float32", isonet_fast=0.1)
    assert all(outcome is None for _, outcome in targets.evaluate(found))


def test_tables_are_made_between_markers_and_nothing_else_changes():
    text = "before\n<!-- benchmark:targets -->\nold\n<!-- /benchmark -->\nafter <!-- /benchmark -->\n"
    made = table.render(text, on_gpu())
    assert made.startswith("before\n<!-- benchmark:targets -->\n|") and made.endswith("after <!-- /benchmark -->\n")
    assert "old" not in made and table.render(made, on_gpu()) == made
    with pytest.raises(ValueError, match="benchmark:nothing"):
        table.render("<!-- benchmark:nothing -->\n<!-- /benchmark -->", [])


@pytest.mark.parametrize("name", table.TABLES)
def test_every_table_is_made_with_and_without_measurements(name):
    made = table.render(f"<!-- benchmark:{name} -->\n<!-- /benchmark -->", on_gpu())
    body = made.splitlines()
    assert {line.count("|") for line in body if line.startswith("|")} != {0}
    widths = {line.count(" | ") for line in body if line.startswith("|")}
    assert len(widths) == 1, made
    assert "No GPU has measured this yet" not in made
    empty = table.render(f"<!-- benchmark:{name} -->\n<!-- /benchmark -->", [])
    assert "not measured" in empty or "No machine has measured this yet" in empty


def test_lines_of_a_step_are_the_operators_own_time():
    def operator(name, ms, parent=None):
        return types.SimpleNamespace(name=name, self_cpu_time_total=1e3 * ms, cpu_parent=parent)

    layer, penalty = operator("bench:SReLU", 0.5), operator("bench:penalty", 0.25)
    function = operator("SReLU", 0.125, layer)
    kernel = operator("isonet_fast::srelu_", 2, function)
    engine = operator("autograd::engine::evaluate_function: SReLUBackward", 0.5)
    node = operator("SReLUBackward", 0.25, engine)
    events = [
        *(operator("aten::mkldnn_convolution", 100), operator("aten::add_", 9, operator("Optimizer.step#SGD.step", 9))),
        *(layer, function, kernel, operator("aten::maximum", 1, kernel)),  # where nothing is compiled
        *(engine, node, operator("isonet_fast::srelu_backward", 4, node)),
        *(penalty, operator("isonet_fast::orthogonality_small_", 8, penalty), operator("aten::sub", 0.125, penalty)),
    ]
    assert list(breakdown.lines(events).values()) == [3, 4, 8, 0.625, 0.75, 0.375]


def test_lines_of_a_step_add_up_to_the_difference_of_the_steps_compared_before():
    workload = "step", "training", "cifar32 batch 32 32x32", "float32"
    found = measured(*workload, stamp="1", official=900, isonet_fast=500, bare=100)
    found += measured(*workload, stamp="2", official=150, isonet_fast=112, bare=100)
    times = dict(zip((line for line, _ in breakdown.LINES), (1, 2, 3, 0.5, 0.5, 0.25), strict=True))
    found += measured("step, lines", *workload[1:], stamp="3", **times, **{breakdown.PROFILER: 1.5})
    found += measured(*workload, stamp="4", official=900, isonet_fast=500, bare=100)
    made = [line.strip("| ").split(" | ") for line in table.lines_table(found).splitlines()]
    assert made[0] == ["cifar32 batch 32 32x32", "ms", "share of official - bare"]
    assert made[2] == ["SReLU's forward kernel", "1.00", "2%"] and len(made) == 13
    numbers = {line: (float(ms), share) for line, ms, share in made[2:]}
    whole = numbers["**ours - bare**"]
    assert whole == (12, "24%") and sum(float(line[1]) for line in made[2:9]) == 12
    assert numbers["official - bare"] == (50, "100%") and numbers["the kernels alone"] == (6, "12%")
    assert numbers[breakdown.PROFILER] == (1.5, "3%")


def test_check_tells_a_stale_table(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:step -->\nstale\n<!-- /benchmark -->\n")
    assert table.main(["--check"], [readme]) == 1 and "differ" in capsys.readouterr().err
    assert table.main([], [readme]) == 0 and table.main(["--check"], [readme]) == 0
    assert "stale" not in readme.read_text()


def test_readme_tables_are_those_of_the_rows():
    assert table.main(["--check"]) == 0
    pages = "".join(page.read_text() for page in table.PAGES)
    assert {match[1] for match in table.MARKED.findall(pages)} == set(table.TABLES)


def test_figures_need_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    found = on_gpu()
    for n in (1, 2):
        found += measured("step, scaling", "training", f"depth {n}", "float32", isonet_fast=n, official=2 * n)
    paths = plot.draw(found, "gpu", tmp_path)
    assert [path.name for path in paths] == ["speed-gpu.png", "scaling-gpu.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_rows_of_errors_do_not_choose_the_device_of_the_results():
    timed = measured("step", "training", "cifar32", "float32", official=2.0, isonet_fast=1.0)
    error = timed[-1] | {"op": "orthogonality_accuracy", "device": "another", "p50_ms": "", "error": "1e-4"}
    assert table.results_table([*timed, error]) == table.results_table(timed)
