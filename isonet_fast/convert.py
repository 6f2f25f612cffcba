"""`convert(model)`: an existing network on our layers, with its weights, optimizer and hooks as they were."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .nn import OrthoConv1d, OrthoConv2d, OrthoConv3d, SReLU

_log = logging.getLogger(__name__)
_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: OrthoConv1d,
    nn.Conv2d: OrthoConv2d,
    nn.Conv3d: OrthoConv3d,
}


def convert(model: nn.Module, *, convolutions: bool = True) -> nn.Module:
    """Replace exact nn.Conv1d to Conv3d and official-style SReLU layers by ours, in place; returns `model`.

    (Where `model` itself is such a layer, the replacement is returned.) Nothing is initialised anew: the layers keep
    their Parameter objects, so that the state_dict and an optimizer built before are the same, and their mode, hooks
    and attributes. A layer used in several places is replaced by one layer. ReLU is never touched.

    Left as they are, and listed in one warning of the logger `isonet_fast.convert`: subclasses of convolutions other
    than ours, parametrized, quantised and lazy layers, weights that are complex, of integers or sparse, and networks
    compiled by torch.compile or TorchScript (convert first, then compile). A lazy convolution becomes an nn.Conv by
    itself at its first call; convert after that. Weights on the meta device, fake and tied ones are converted.

    Some tools compare types and know only the convolutions of torch.nn: BatchNorm folding, `fuse_modules`, quantisation
    of a graph from torch.export. Call `deconvert` before you use them. Or convert with `convolutions=False`, which
    leaves every convolution as it is: `OrthoRegularizer` covers those of torch.nn too.

    An official-style SReLU is a module of a class named SReLU with one parameter, `srelu_bias`, and one child, the ReLU
    `srelu_relu`. Raises TypeError for something that is no module.

    Examples:
        >>> isonet_fast.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        Sequential(
          (0): OrthoConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), penalty='isonet')
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    left: dict[str, str] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    converted = _visit(model, "", replacements, left, convolutions)
    if left:
        listed = "; ".join(f"{name or 'the model itself'} ({why})" for name, why in left.items())
        _log.warning("convert left %d modules as they are: %s", len(left), listed)
    return converted


def _visit(
    module: nn.Module, name: str, done: dict[nn.Module, nn.Module], left: dict[str, str], convolutions: bool
) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = module  # a module that contains itself ends here
    why = compiled(module) or _quantised(module)
    if why:
        left[name] = why
        return module
    replacement = _replacement(module, name, left, convolutions)
    if replacement is not None:
        done[module] = replacement
        return replacement
    for child_name, child in list(module._modules.items()):
        if child is None:
            continue
        new = _visit(child, f"{name}.{child_name}" if name else child_name, done, left, convolutions)
        if new is not child:
            module._modules[child_name] = new
    return module


def compiled(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled"
    if isinstance(module, torch.fx.GraphModule):
        return "a traced graph"
    return None


def _quantised(module: nn.Module) -> str | None:
    """The reason to keep a module made for quantisation, or None. An example is a convolution fused with its ReLU: the
    type of its child is part of its meaning."""
    kind = type(module)
    return "for quantisation" if kind.__module__.startswith("torch.ao.nn.") and "Conv" in kind.__name__ else None


def _replacement(module: nn.Module, name: str, left: dict[str, str], convolutions: bool) -> nn.Module | None:
    """Our layer in place of this one, or None to keep it. If a user might wonder why, the reason goes into `left`."""
    if isinstance(module, tuple(_CONVOLUTIONS)) and not isinstance(module, tuple(_CONVOLUTIONS.values())):
        if not convolutions:
            return None
        if "weight" not in module._parameters or hasattr(module, "parametrizations"):
            left[name] = "parametrized"
        elif isinstance(module, LazyModuleMixin):
            left[name] = "lazy: convert after its first call"
        elif type(module) not in _CONVOLUTIONS:
            left[name] = f"a subclass, {type(module).__qualname__}"
        elif "forward" in module.__dict__:
            left[name] = "its forward is replaced"
        elif odd := _odd("weight", module._parameters["weight"]):
            left[name] = odd
        else:
            return adopt(_CONVOLUTIONS[type(module)], module, penalty="isonet")
    elif _is_official_srelu(module):
        if "forward" in module.__dict__ or _has_hooks(module._modules["srelu_relu"]):
            left[name] = "an SReLU with hooks on its ReLU, or whose forward is replaced"
        elif odd := _odd("srelu_bias", module._parameters["srelu_bias"]):
            left[name] = odd
        else:
            new = adopt(SReLU, module, num_channels=module.get_parameter("srelu_bias").numel(), inplace=False)
            del new._modules["srelu_relu"]
            return new
    return None


def _odd(name: str, parameter: Tensor | None) -> str | None:
    """Why no layer of ours computes with this parameter."""
    if parameter is None:
        return f"{name} is None"
    if is_lazy(parameter):
        return f"{name} has no shape before the first call"
    if not parameter.is_floating_point():  # complex, quantised, integers
        return f"{name} is {str(parameter.dtype).removeprefix('torch.')}"
    if parameter.layout != torch.strided:
        return f"{name} is {str(parameter.layout).removeprefix('torch.')}"
    return None


def _is_official_srelu(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "SReLU"
        and list(module._parameters) == ["srelu_bias"]
        and list(module._modules) == ["srelu_relu"]
        and isinstance(module._modules["srelu_relu"], nn.ReLU)
        and not module._buffers
    )


def adopt(cls: type[nn.Module], module: nn.Module, **attributes: Any) -> nn.Module:
    """An instance of `cls` with everything of `module`: parameters, buffers, hooks, mode and plain attributes.

    It takes the dictionaries themselves, not copies, so that the handle of a hook can still remove that hook.
    """
    new = cls.__new__(cls)
    for key, value in module.__dict__.items():
        new.__dict__[key] = value.copy() if key == "_modules" else value
    new.__dict__.update(attributes)
    return new


def _has_hooks(module: nn.Module | None) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return module is not None and any(module.__dict__[name] for name in names)
