"""The package as users meet it: public names, typing, imports with Triton or PyTorch missing or too old."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import isonet_fast

PACKAGE = Path(isonet_fast.__file__).parent

# What users import, whatever else changes.
NAMES = [
    "functional.srelu",
    "functional.residual_srelu",
    "functional.orthogonality_loss",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoLinear",
    "SReLU",
    "ResidualSReLU",
    "SharedScale",
    "OrthoRegularizer",
    "param_groups",
    "models.isonet_cifar",
    "init.delta_",
    "reference.srelu",
    "reference.residual_srelu",
    "reference.orthogonality_loss",
    "info",
]
ARGUMENTS = {
    "functional.srelu": ["x", "bias", "inplace"],
    "functional.residual_srelu": ["shortcut", "branch", "bias", "scale"],
    "functional.orthogonality_loss": ["weights", "stride", "dilation", "groups", "penalty", "precision"],
    "SReLU": ["num_channels", "init", "inplace"],
    "ResidualSReLU": ["num_channels", "init"],
    "SharedScale": ["init"],
    "OrthoRegularizer": ["model", "coeff", "penalty", "filter", "interval", "work_group", "precision"],
    "param_groups": ["model", "lr", "weight_decay"],
    "models.isonet_cifar": ["depth", "residual", "width", "num_classes", "in_channels"],
    "init.delta_": ["weight", "groups", "stride"],
}


def lookup(name):
    value = isonet_fast
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_there_and_documented(name):
    assert inspect.getdoc(lookup(name))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_of_the_design(name):
    """The arguments come in this order; what follows them is optional."""
    parameters = inspect.signature(lookup(name)).parameters
    assert list(parameters)[: len(ARGUMENTS[name])] == ARGUMENTS[name]
    further = list(parameters.values())[len(ARGUMENTS[name]) :]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in further)


def test_all_names_everything_public_and_nothing_else():
    for name in isonet_fast.__all__:
        assert getattr(isonet_fast, name) is not None
    assert {name.split(".")[0] for name in NAMES} <= set(isonet_fast.__all__)
    assert not {"torch", "require_torch"} & set(vars(isonet_fast))


def test_a_public_module_names_what_is_public():
    modules = [value for name in isonet_fast.__all__ if inspect.ismodule(value := getattr(isonet_fast, name))]
    assert isonet_fast.functional in modules
    for module in modules:
        assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__)


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_works_without_triton():
    """Import, both ops and their gradients, the regularizer, and info()."""
    code = """
import isonet_fast, torch
assert "triton" not in sys.modules
x = torch.randn(2, 3, 4, 4, requires_grad=True)
isonet_fast.SReLU(3)(x).sum().backward()
net = isonet_fast.models.isonet_cifar(8, width=4)
net(x).sum().backward()
isonet_fast.OrthoRegularizer(net).accumulate_grad_()
isonet_fast.OrthoRegularizer(net)().backward()
isonet_fast.info()
assert "triton" not in sys.modules
"""
    result = python(BLOCK.format(package="triton") + code)
    assert result.returncode == 0, result.stderr
    assert "orthogonality_loss on cpu" in result.stdout


def old_torch(version):
    return f"import sys, types; sys.modules['torch'] = types.SimpleNamespace(__version__={version!r})\n"


@pytest.mark.parametrize(
    "before, kind",
    [(BLOCK.format(package="torch"), "ModuleNotFoundError"), (old_torch("2.10.0+cpu"), "ImportError")],
)
def test_without_a_new_enough_torch_the_error_names_pytorch(before, kind):
    result = python(f"{before}import isonet_fast")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"{kind}: isonet_fast needs PyTorch 2.11 or newer") and "https://pytorch.org" in last


def test_without_torch_the_command_ends_with_one_line():
    code = BLOCK.format(package="torch") + "sys.argv[0] = 'bin/isonet-fast'; import isonet_fast.__main__"
    result = python(code)
    assert result.returncode == 1
    assert result.stderr.startswith("isonet-fast: isonet_fast needs PyTorch 2.11 or newer, it is not installed")
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_importing_needs_no_other_package():
    """What commands need they import; pip --no-deps may have installed none. (torch imports tqdm itself if it can.)"""
    code = (
        "import isonet_fast; print([m for m in ('sklearn', 'matplotlib', 'torchvision', 'yaml') if m in sys.modules])"
    )
    result = python(BLOCK.format(package="tqdm") + code)
    assert result.stdout == "[]\n", result.stderr


OPTIONAL = ("PIL", "torchvision", "matplotlib", "sklearn", "pycocotools", "timm", "onnx", "safetensors", "triton")


def test_the_command_runs_without_optional_packages():
    missing = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"
    code = f"{missing}; from isonet_fast.__main__ import main; sys.exit(main(sys.argv[1:]))"
    for arguments in (["info"], ["table", "1", "--dry-run"], ["detect", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=120)


def test_a_library_built_from_other_sources_is_named_with_the_remedy():
    code = """
import torch
early = torch.library.Library("isonet_fast", "FRAGMENT")
early.define("srelu({arguments}) -> Tensor")
import isonet_fast
"""
    result = python(code.format(arguments="Tensor x"))
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "it defines isonet_fast::srelu(Tensor x) -> Tensor, not srelu(" in last
    assert last.endswith("build it again: pip install --no-build-isolation .")
    assert python(code.format(arguments="Tensor x, Tensor bias")).returncode == 0
