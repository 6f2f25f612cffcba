"""What only a GPU can show: streams, CUDA graphs, no synchronisation, and the probe. The rest of this directory's
tests run there too."""

import pytest
import torch

from isonet_fast import environment, kernels
from isonet_fast.geometry import Layer
from isonet_fast.problem import Problem

LAYERS = (Layer((64, 64, 3, 3), (1, 1), (1, 1), 1, "isonet"), Layer((256, 128, 1, 1), (1, 1), (1, 1), 1, "isonet"))
PROBLEM = Problem(LAYERS, (1.0, 0.5))


@pytest.fixture
def weights(device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    if kernels.why_not(torch.device("cuda")):
        pytest.skip(kernels.why_not(torch.device("cuda")))
    torch.manual_seed(0)
    return [torch.randn(layer.shape, device="cuda") / 30 for layer in LAYERS]


def gradient(weights):
    from isonet_fast.kernels import orthogonality

    loss, losses, saved = orthogonality.forward(weights, PROBLEM, True)
    return loss, losses, *orthogonality.backward(torch.ones_like(loss), saved, weights, PROBLEM)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_host_never_waits_for_the_gpu(weights):
    gradient(weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_stream_gives_the_same_bits(weights):
    """The tables were sent on another stream, and what is read here is written on this one."""
    expected = gradient(weights)
    torch.cuda.synchronize()
    PROBLEM.tables.clear()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            results.append(gradient(weights))
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


def test_a_second_device(weights):
    """Tables, streams and launches go where the weights are, whichever device is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("no second GPU")
    there = torch.device("cuda", 1)
    if kernels.why_not(there):
        pytest.skip(kernels.why_not(there))
    first, moved = gradient(weights), [w.to(there) for w in weights]
    for _ in range(2):  # the second call is the planned one
        second = gradient(moved)
        assert torch.cuda.current_device() == 0 and all(tensor.device == there for tensor in second)
        assert same([tensor.cpu() for tensor in first], [tensor.cpu() for tensor in second])


def test_graph_capture_follows_new_values(weights):
    gradient(weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient(weights)
    for _ in range(2):
        with torch.no_grad():
            for w in weights:
                w.mul_(1.25)
        graph.replay()
        assert same(captured, gradient(weights))


def test_graph_capture_of_gradients_that_the_graph_allocates(weights):
    from isonet_fast.kernels import orthogonality

    def step():
        grads = [torch.ones_like(w) for w in weights]
        return (*orthogonality.accumulate_grad_(weights, grads, PROBLEM, 0.5), *grads)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    filler = [torch.empty(2**20, device="cuda").normal_() for _ in range(8)]
    graph.replay()
    assert same(captured, expected) and len(filler) == 8


def test_capture_without_a_first_call_says_what_to_do(weights):
    PROBLEM.tables.clear()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gradient(weights)


def test_reasons_are_given_without_a_gpu(monkeypatch):
    assert "need a CUDA device" in kernels.why_not(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_reasons", {})
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 8.0" in kernels.why_not(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (11, 0))
    assert "no tiles for compute capability 11.0" in kernels._probe(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "7.5" in kernels.why_not(device)  # cached
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def broken(_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(kernels, "_launch", broken)
    assert kernels.why_not(device).endswith("Failed to find C compiler. Please specify via CC environment variable.")
    monkeypatch.setattr(kernels, "_reasons", {})

    def full(_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "_launch", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):  # a loss by the closed form, its gradient by the kernels: no
        kernels.why_not(device)
    assert environment._matrix(device).startswith("not known")
    monkeypatch.setattr(kernels, "_launch", lambda _: None)
    assert kernels.why_not(device) is None
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in kernels.why_not(device)


def test_probe_checks_the_numbers(device, monkeypatch):
    """Where kernels run, in the interpreter too: the probe computes what it expects, and notices what it does not."""
    from isonet_fast.kernels import orthogonality

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    results = {}

    def once(name):
        """The probe's weights are the same each time, and so is what the kernels compute of them."""
        real = getattr(orthogonality, name)

        def call(*arguments):
            (problem,) = (argument for argument in arguments if isinstance(argument, Problem))
            if (name, problem.text) not in results:
                results[name, problem.text] = real(*arguments)
            return results[name, problem.text]

        monkeypatch.setattr(orthogonality, name, call)
        return call

    forward, backward = once("forward"), once("backward")
    with torch._subclasses.FakeTensorMode():  # torch.compile asks before anything has run
        assert kernels._probe(device) is None

    def wrong_penalty(*arguments):
        loss, losses, saved = forward(*arguments)
        return loss, losses * torch.tensor([1.01, 1][: len(losses)], device=device), saved

    monkeypatch.setattr(orthogonality, "forward", wrong_penalty)
    assert "penalty" in kernels._launch(device)
    monkeypatch.setattr(orthogonality, "forward", forward)

    def wrong_gradient(*arguments):  # as a product that is lost on the way: everything else is right
        first, *rest = backward(*arguments)
        first[:, :, 1, 2] *= 0.8
        return first, *rest

    monkeypatch.setattr(orthogonality, "backward", wrong_gradient)
    assert "% off" in kernels._launch(device)


def test_the_probe_needs_every_kernel():
    """A tile size of its own per kernel, loops over several taps, chunks and transposed residuals."""
    pytest.importorskip("triton")
    from isonet_fast.kernels.plan import Plan
    from isonet_fast.kernels.tiles import TAPS, THERE_FREQUENCIES

    problems = [tuple(Layer(shape, (1, 1), (1, 1), 1, "isonet") for shape in shapes) for shapes in kernels.PROBED]
    for key in ("tma", "pointer"):
        plan, *more = (Plan(Problem(layers, (1.0,) * len(layers)), key) for layers in problems)
        assert {tile for p in (plan, *more) for tile in p.gram_tiles} == set(plan.variant.gram)
        assert {tile for p in (plan, *more) for tile in p.grad_tiles} == set(plan.variant.grad)
        gram = next(iter(plan.gram_tiles.values()))
        chunks = gram["columns"] // plan.variant.gram[0].chunk
        assert (gram["last"] / chunks).max() == 9 and chunks.max() >= 2
        assert plan.gram_parts and plan.grad_parts
        assert plan.spectrum_tiles and plan.spectrum.there["frequencies"].min() > THERE_FREQUENCIES
        assert plan.spectrum.there["half"].min() > TAPS


def test_addresses_in_a_capture(device, monkeypatch):
    """The view that a capture builds from its arguments equals the host's, wherever the gradients are."""
    from isonet_fast.kernels import tables
    from isonet_fast.kernels.plan import Plan

    mine = tables.Tables(Plan(PROBLEM, "tma"), device)
    first, second = ([torch.empty(layer.shape, device=device) for layer in LAYERS] for _ in range(2))
    second[1] = torch.empty(second[1].numel() + 1, device=device)[1:].view_as(second[1])  # not aligned to 16 bytes
    before = mine.view("add", first, None).clone()
    monkeypatch.setattr(tables, "capturing", lambda _: True)
    patched = mine.view("add", second, None)
    assert torch.equal(mine.view("add", first, None), before)
    monkeypatch.undo()
    assert torch.equal(patched, mine.view("add", second, None)) and not torch.equal(patched, before)
