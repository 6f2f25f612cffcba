"""`deconvert(model)`: back to torch.nn, so that the model loads and runs where isonet_fast is not installed."""

from __future__ import annotations

import logging

from torch import fx, nn

from .convert import adopt, compiled
from .nn import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear

_log = logging.getLogger(__name__)
_PARENTS: dict[type[nn.Module], type[nn.Module]] = {
    OrthoConv1d: nn.Conv1d,
    OrthoConv2d: nn.Conv2d,
    OrthoConv3d: nn.Conv3d,
    OrthoLinear: nn.Linear,
}


def deconvert(model: nn.Module) -> nn.Module:
    """Replace every layer and network of this package by modules that need torch only, in place; returns `model`.

    (Where `model` itself is of this package, as our networks are, the replacement is returned.) OrthoConv1d to
    OrthoConv3d and OrthoLinear become nn.Conv1d to nn.Conv3d and nn.Linear. SReLU, the join, the shared scale and the
    blocks and networks of `isonet_fast.models` become graph modules of torch.fx, which bring their own source: each
    computes max(x, b) with torch.maximum, and its children keep their names. Parameters are the same objects, the
    state_dict has the same keys in the same order, hooks and the mode are kept. So `torch.save(deconvert(model), path)`
    is read by `torch.load(path, weights_only=False)` without this package, BatchNorm folding and quantisation find
    every convolution, and torch.jit.script takes it.

    What a graph module does not keep: methods and attributes other than `forward` (`features`, `num_channels`), and the
    fused kernels. An SReLU in your own network takes an unbatched x only if it has `spatial_dims`; otherwise it reads x
    as (N, C, ...). At a tie x == b, torch.maximum gives half of the gradient to x and half to b. SReLU gives it to b.

    Left as they are, and listed in one warning of the logger `isonet_fast.deconvert`: subclasses of our classes, whose
    own code needs this package, parametrized layers, and networks compiled by torch.compile or TorchScript. Raises
    TypeError for something that is no module.

    Examples:
        >>> isonet_fast.deconvert(nn.Sequential(isonet_fast.OrthoConv2d(3, 8, 3), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    left: dict[str, str] = {}
    plain = _visit(model, "", None, {}, left)
    if left:
        listed = "; ".join(f"{name or 'the model itself'} ({why})" for name, why in left.items())
        _log.warning("deconvert left %d modules as they are: %s", len(left), listed)
    return plain


def _visit(
    module: nn.Module, name: str, parent: nn.Module | None, done: dict[nn.Module, nn.Module], left: dict[str, str]
) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = module  # a module that contains itself ends here
    why = _why_not(module)
    if why:
        left[name] = why
        return module
    graph = _trace(module, parent) if _ours(type(module)) and type(module) not in _PARENTS else None
    for child_name, child in list(module._modules.items()):
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            module._modules[child_name] = _visit(child, path, module, done, left)
    if graph is not None:
        done[module] = _graph_module(module, graph)
    elif type(module) in _PARENTS:
        done[module] = adopt(_PARENTS[type(module)], module)
        del done[module].__dict__["penalty"]
    return done[module]


def _ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _why_not(module: nn.Module) -> str | None:
    """The reason why a module cannot be expressed without this package. None if it can be, or if it is not ours."""
    kind = type(module)
    if not isinstance(module, fx.GraphModule) and (why := compiled(module)):
        return why
    if any(map(_ours, kind.__mro__)) and not _ours(kind):
        return "parametrized" if hasattr(module, "parametrizations") else f"a subclass, {kind.__qualname__}"
    if _ours(kind) and "forward" in module.__dict__:
        return "its forward is replaced"
    return None


def _trace(module: nn.Module, parent: nn.Module | None) -> fx.Graph:
    """The forward as a graph of standard operators, in which each child is one call."""
    within = parent is not None and _ours(type(parent))
    tracer = fx.Tracer()  # itself, no subclass of ours: a graph module remembers the tracer's class
    tracer.is_leaf_module = lambda *_: True  # type: ignore[method-assign]
    names = [*["_in_torch_in_block"] * within, "_in_torch", "forward"]
    tracer.traced_func_name = next(name for name in names if hasattr(module, name))
    graph = tracer.trace(module)
    for node in graph.nodes:
        node.type = None  # an annotation would be written into the source, and TorchScript cannot read it there
    return graph


def _graph_module(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """A graph module with everything of `module` except its class: parameters, children, hooks and mode."""
    new = fx.GraphModule(module, graph, type(module).__name__)
    kept = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k in kept or "hook" in k})
    return new
