"""The networks as graphs for other tools: torch.export, ONNX, torch.fx, torch.jit.trace, AOTInductor, quantisation."""

import copy
import shutil

import pytest
import torch
from torch import nn

from isonet_fast import ResidualSReLU, SReLU, functional, models

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(residual=True, make=models.isonet_cifar, **arguments):
    torch.manual_seed(0)
    arguments = arguments or {"depth": 8, "residual": residual, "width": 4}
    net = make(**arguments)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.3)
            elif name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net.eval()


def exported(net, images=IMAGES, **options):
    return torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), **options)


def operators(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_torch_export_holds_standard_operators(residual, strict, dtype):
    net, images = network(residual).to(dtype), IMAGES.to(dtype)
    program = exported(net, images, strict=strict)
    names = operators(program.graph)
    assert "aten.maximum.default" in names and not [n for n in names if not n.startswith("aten.") or "promote" in n]
    torch.testing.assert_close(program.module()(images[:2]), net(images[:2]), rtol=1e-12, atol=1e-12)


def test_an_exported_network_trains():
    net = network().double().train()
    module = torch.export.export(net, (IMAGES.double(),)).module()
    module(IMAGES.double()).square().sum().backward()
    got = {name: p.grad for name, p in module.named_parameters()}
    net(IMAGES.double()).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-10, atol=1e-10)


ONNX = {
    "isonet_cifar": (models.isonet_cifar, {"depth": 8, "width": 4}, IMAGES),
    "risonet_cifar": (models.isonet_cifar, {"depth": 8, "residual": True, "width": 4}, IMAGES),
    "risonet18": (models.risonet18, {"num_classes": 10}, torch.randn(2, 3, 64, 64)),
}


@pytest.mark.parametrize("name", ONNX)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnxruntime_gives_the_logits(name, tmp_path):
    """onnxruntime gives the logits, for batches of any size; the graph holds operators of ONNX itself."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    make, arguments, images = ONNX[name]
    net = network(make=make, **arguments)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(net, (images,), dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    assert "Max" in {node.op_type for node in program.model.graph}
    program.save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for batch in (1, 2, 5):
        x = torch.randn(batch, *images.shape[1:])
        expected = net(x).detach()
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_holds_standard_operators_only(residual):
    """With PyTorch's own check of the trace; batches of another size too."""
    net = network(residual)
    traced = torch.jit.trace(net, IMAGES)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::maximum" in kinds and {kind.split("::")[0] for kind in kinds} == {"aten", "prim"}
    assert "prim::PythonOp" not in kinds
    torch.testing.assert_close(traced(IMAGES[:2]), net(IMAGES[:2]))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_torchscript_exporter_writes_onnx_too(residual, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    net, path = network(residual), tmp_path / "net.onnx"
    torch.onnx.export(net, (IMAGES,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    x = torch.randn(5, *IMAGES.shape[1:])
    got = torch.from_numpy(runtime.InferenceSession(path).run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(got, net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_symbolic_trace_keeps_the_fast_functions(residual):
    net = network(residual)
    traced = torch.fx.symbolic_trace(net)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert functional.srelu in called and (functional.residual_srelu in called) == residual
    torch.testing.assert_close(traced(IMAGES), net(IMAGES))
    traced.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_aotinductor_compiles_for_batches_of_any_size(tmp_path):
    """Compiled in one file, for batches of any size, that runs without this package."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")

    class Activations(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.join = SReLU(3, inplace=True), ResidualSReLU(3, inplace=True)

        def forward(self, x):
            return self.join(x, self.relu(2 * x))

    net = Activations()
    package = torch._inductor.aoti_compile_and_package(exported(net), package_path=str(tmp_path / "net.pt2"))
    module = torch._inductor.aoti_load_package(package)
    for batch in (2, 3):
        torch.testing.assert_close(module(IMAGES[:batch]), net(IMAGES[:batch]), rtol=1e-4, atol=1e-5)


def matrix_products(graph):
    """For every convolution and linear layer, whether its input and its weight come from int8."""
    products = [n for n in graph.nodes if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)]
    return [all("dequantize" in str(node.target) for node in product.args[:2]) for product in products]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_quantisation_after_export_keeps_the_logits(residual, dynamic):
    """PT2E: every convolution and linear layer of an exported network in int8, within 5 % of the largest logit.

    Strict export, because the quantizer knows a convolution by the function that was called."""
    pytest.importorskip("torchao", reason="PT2E lives in torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = network(residual)
    configuration = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    program = exported(net, strict=True).module()
    assert matrix_products(program.graph) == [False] * (10 if residual else 8)
    prepared = prepare_pt2e(program, x86.X86InductorQuantizer().set_global(configuration))
    prepared(IMAGES)
    quantised = convert_pt2e(prepared)
    assert matrix_products(quantised.graph) == [True] * (10 if residual else 8)
    expected = net(IMAGES)
    assert 0 < (quantised(IMAGES) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation_keeps_the_logits():
    net = network()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear})
    expected = net(IMAGES)
    assert 0 < (quantised(IMAGES) - expected).abs().max() < 0.05 * expected.abs().max()
