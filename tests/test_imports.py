"""Imports go down, and to public names. The package is a house of floors: a module imports what is on its own floor or
below, wherever in the file it does so, and no module comes back to itself through what it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import isonet_fast

ROOT = Path(isonet_fast.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

# From the ground up. A folder stands for all of its modules.
FLOORS = [
    "_require_torch _version dtypes geometry gradient_layout import_torchvision reference safe_load",
    "existence penalty_arguments problem sharded split_work summary",
    "activation_arguments init inplace",
    "kernels",
    "ops",
    "functional",
    "nn",
    "convert deconvert layers param_groups",
    "backward_order diagnostics environment selection",
    "regularizer",
    "models",
    "hub timm __init__",
    "train.__init__ train.divergence train.interrupts train.mixup train.paths train.plain_yaml train.terminal",
    "train.config",
    "train.build train.schedule",
    "train.distributed",
    "train.data train.saving",
    "train.metrics train.snapshot train.validation",
    "train.loop",
    "train.detection",
    "train.tables",
    "train.commands",
    "__main__",
]
# Some have nothing to say to each other, although their floors would allow it.
STRANGERS = {
    "nn": "ops",
    "models": "ops",
    "train.data": "train.saving",
    "train.saving": "train.data",
}
# Packages that a module may not import at all.
WITHOUT = {"reference": "isonet_fast", "geometry": "isonet_fast torch", "existence": "torch", "split_work": "torch"}


def short(module: str) -> str:
    """The module's name within the package, such as "ops.srelu", "ops" or, for the package itself, "__init__"."""
    return module.removeprefix("isonet_fast").removeprefix(".") or "__init__"


def within(module: str, place: str) -> bool:
    """Whether a module is what this name stands for: itself, or a module of that folder."""
    return short(module) == place.removesuffix(".__init__") or (short(module) + ".").startswith(place + ".")


def floors_of(module: str) -> list[int]:
    return [n for n, floor in enumerate(FLOORS) for place in floor.split() if within(module, place)]


def imported_from(name: str, node: ast.ImportFrom) -> str:
    """The module that this statement of `name` imports from."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    above = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*above, *(node.module or "").split(".")]).rstrip(".")


def imports(name: str) -> Iterator[str]:
    """The modules that `name` imports when it runs, inside functions too, not only when its types are checked."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = imported_from(name, node)
            for alias in node.names:
                target = f"{module}.{alias.name}"
                yield target if target in MODULES else module


GRAPH = {name: set(imports(name)) for name in MODULES}
INSIDE = {name: targets & set(MODULES) for name, targets in GRAPH.items()}


def test_no_module_imports_itself_through_others() -> None:
    assert len(INSIDE) > 50 and "isonet_fast.reference" in INSIDE["isonet_fast"]
    try:
        TopologicalSorter(INSIDE).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_each_module_is_on_one_floor() -> None:
    assert not [short(module) for module in MODULES if len(floors_of(module)) != 1]


def test_each_name_stands_for_a_module() -> None:
    named = " ".join([*FLOORS, *STRANGERS, *STRANGERS.values(), *WITHOUT]).split()
    assert not [place for place in named if not any(within(module, place) for module in MODULES)]


def test_imports_go_down() -> None:
    assert not [
        f"{short(module)} imports {short(target)}"
        for module, targets in INSIDE.items()
        for target in targets
        if floors_of(target) > floors_of(module)
    ]


@pytest.mark.parametrize("place", STRANGERS)
def test_strangers_import_nothing_of_each_other(place) -> None:
    inside = [module for module in MODULES if within(module, place)]
    assert not [(module, target) for module in inside for target in INSIDE[module] if within(target, STRANGERS[place])]


@pytest.mark.parametrize("place", WITHOUT)
def test_shapes_and_the_specification_stand_alone(place) -> None:
    targets = GRAPH[f"isonet_fast.{place}"]
    assert targets and not [target for target in targets if target.partition(".")[0] in WITHOUT[place].split()]


def test_triton_is_imported_in_kernels_alone() -> None:
    elsewhere = [module for module in MODULES if not within(module, "kernels")]
    assert not [module for module in elsewhere if any(name.partition(".")[0] == "triton" for name in GRAPH[module])]


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_no_module_imports_a_private_name_of_another() -> None:
    found = [
        f"{name} imports {module}.{alias.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (module := imported_from(name, node)).startswith("isonet_fast")
        for alias in node.names
        if private(alias.name) and f"{module}.{alias.name}" not in MODULES
    ]
    assert not found


def test_a_private_module_is_imported_in_its_own_folder_only() -> None:
    found = [
        f"{name} imports {target}"
        for name, targets in INSIDE.items()
        for target in targets
        if private(target.rpartition(".")[2]) and not f"{name}.".startswith(target.rpartition(".")[0] + ".")
    ]
    assert not found
