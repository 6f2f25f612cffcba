"""Launch every kernel through Triton's own launchers and the null driver: `python launched.py 90` prints as JSON what
each call launched, the kernels, and those of tools/lower_triton.py, by the hash of their PTX. A process of its own
(see tools/null_driver.py).
"""

import hashlib
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))

import lower_triton
import null_driver

from isonet_fast.geometry import Layer
from isonet_fast.kernels import orthogonality, packed, plan
from isonet_fast.problem import Problem

SHAPES = [(256, 128, 1, 1), (64, 64, 3, 3), (24, 1, 3, 3), (64, 64, 5, 5)]
# large tiles, small tiles, a depthwise convolution, a layer over frequencies


def code(kernel) -> str:
    """A name for what runs."""
    return hashlib.sha256(kernel.asm["ptx"].encode()).hexdigest()


def main(arch: int) -> None:
    driver = null_driver.activate(arch)
    packed.NARROW_LAUNCH = plan.GRAD_LAUNCH = 0  # few layers have every launch
    variant = "pointer" if arch == 80 else "tma"
    orthogonality.variant = lambda device, precision: precision or variant
    layers = tuple(Layer(s, (1, 1), (1, 1), 24 if s[1] == 1 else 1, "isonet") for s in SHAPES)
    weights = [torch.zeros(s) for s in SHAPES]
    launches, problems = {}, []
    for precision in (None, "highest"):
        problem = Problem(layers, (1.0,) * len(layers), precision)
        problems.append(problem)
        saved = orthogonality.forward(weights, problem, True)[2]
        calls = {
            "loss": lambda p=problem: orthogonality.forward(weights, p, False),
            "loss, saved": lambda p=problem: orthogonality.forward(weights, p, True),
            "gradient": lambda p=problem, s=saved: orthogonality.backward(torch.ones(()), s, weights, p),
            "gradient of an element": lambda p=problem, s=saved: orthogonality.backward(
                torch.ones(5)[3], s, weights, p
            ),
            "accumulate": lambda p=problem: orthogonality.accumulate_grad_(weights, weights, p, 1),
        }
        for name, call in calls.items():
            for time in ("first", "again"):
                before = driver.launches, driver.tensor_maps
                call()
                launches[f"{name}, {precision}, {time}"] = driver.launches - before[0], driver.tensor_maps - before[1]
    tables = [table for problem in problems for table in problem.tables.values()]
    compiled = [c for table in tables for c, _ in table.launches._compiled.values()]
    kernels = {code(c): c.name for c in compiled}
    lowered = {code(lower_triton.compile_case(case, arch)): case.name for case in lower_triton.cases(arch)}
    assert len(lowered) == len(list(lower_triton.cases(arch)))
    print(json.dumps({"launches": launches, "kernels": kernels, "lowered": lowered}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
