"""Launches that don't look their kernel up again.

`kernel[grid](...)` inspects every argument to find the compiled kernel that fits, which takes longer than launching it.
The launchers of one plan always pass the same kinds of arguments, so each keeps what the first launch found.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Launches:
    """The compiled kernels of one plan on one device.

    A key stands for one kernel, its meta-parameters, and everything about its arguments that Triton compiles for:
    dtypes, which ones are None, which pointers are aligned to 16 bytes.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, tuple[Any, list[Any]]] = {}

    def __call__(
        self, key: Hashable, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        found = self._compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[(programs, 1, 1)](*arguments, *constants)
        else:
            compiled = kernel[(programs,)](*arguments, **options)
            if compiled is not None:  # the interpreter compiles nothing
                self._compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]
