"""Imports go one way, and to public names: no module of the package comes back to itself through what it imports, at
the top or inside, and none imports a name with an underscore from another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import isonet_fast

ROOT = Path(isonet_fast.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported_from(name: str, node: ast.ImportFrom) -> str:
    """The module that this statement of `name` imports from."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    above = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*above, *(node.module or "").split(".")]).rstrip(".")


def imports(name: str) -> Iterator[str]:
    """The modules of the package that `name` imports when it runs, not only when its types are checked."""
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
        if not isinstance(node, ast.ImportFrom):
            continue
        module = imported_from(name, node)
        for alias in node.names:
            target = f"{module}.{alias.name}"
            yield target if target in MODULES else module


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {target for target in imports(name) if target in MODULES} for name in MODULES}
    assert len(graph) > 50 and "isonet_fast.reference" in graph["isonet_fast"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_module_imports_a_private_name_of_another() -> None:
    private = [
        f"{name} imports {module}.{alias.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (module := imported_from(name, node)).startswith("isonet_fast")
        for alias in node.names
        if alias.name.startswith("_") and f"{module}.{alias.name}" not in MODULES and not alias.name.endswith("__")
    ]
    assert not private
