"""Where faults are tried: children to put them into, and what a run that suffered one is compared with."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from isonet_fast.train.saving import checkpoint

from ..train.conftest import SMALL
from ..train.test_loop import rows, same

ROOT = Path(__file__).parents[2]
EVERY = 2  # steps from checkpoint to checkpoint: what a fault may cost
STEPS = 22  # of a whole run: two epochs
SETTINGS = [*SMALL, "schedule.epochs=2", "data.batch_size=128", f"checkpoint.every_steps={EVERY}"]
ENVIRONMENT = {  # as many threads each time: the same order of additions
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}  # fmt: skip


Injection = dict[str, Any]  # a fault: its name in `child`, the step that it starts with, and what it takes


class Broken(AssertionError):
    """A fault did more damage than is promised, or was not reported as promised."""


@dataclass
class Outcome:
    """What faults of one kind did: how many were injected, the most steps that one of them cost, what was printed."""

    times: int
    lost: int | None  # None where steps are not what could be lost
    reported: str


@dataclass
class Done:
    """A child's end."""

    code: int  # minus the signal's number if it was killed
    output: str
    begun: list[int]  # the steps that it began, in this order

    @property
    def last(self) -> int:
        return self.begun[-1] if self.begun else 0

    def said(self) -> str:
        """The child's error message, or else its last line."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("isonet-fast: ")), lines[-1] if lines else "")

    def line(self, words: str) -> str:
        """The first line printed that has these words."""
        found = next((line for line in self.output.splitlines() if words in line), None)
        expect(found is not None, f"nothing says {words!r}: {self.output}")
        return (found or "").rpartition("step/s]")[2]  # a progress bar may stand before it


class Children:
    """Runs plans one after the other, each in a process forked from one that has the imports done."""

    def __init__(self, scratch: Path, through: Sequence[str] = ()) -> None:
        self.scratch, self.count = scratch, 0
        scratch.mkdir(parents=True, exist_ok=True)
        command = [*through, sys.executable, "-m", "tests.faults.child"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
        )

    def run(self, arguments: Sequence[str], fault: Injection | None = None) -> Done:
        self.count += 1
        trace, output = (self.scratch / f"{kind}-{self.count}" for kind in ("trace", "output"))
        plan = {"arguments": list(arguments), "trace": str(trace), "output": str(output), "faults": [fault]}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks the children ended with {self.process.wait()}")
        return Done(int(answer), output.read_text(), steps(trace))

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(30)
        self.process.stdout.close()  # type: ignore[union-attr]


@dataclass
class Lab:
    """One visit: a scratch directory, a seeded source of random points, and the runs that everything is measured by."""

    scratch: Path
    seed: int
    rng: random.Random = field(init=False)
    count: int = 0
    wholes: dict[tuple[str | int, ...], Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if "children" in vars(self):
            self.children.close()

    @cached_property
    def children(self) -> Children:
        return Children(self.scratch / "children")

    def directory(self, name: str = "run") -> Path:
        self.count += 1
        return self.scratch / f"{name}-{self.count}"

    def whole(self, *settings: str, ranks: int = 1) -> Path:
        """The run that nothing happens to."""
        key = (*settings, ranks)
        if key not in self.wholes:
            run = self.wholes[key] = self.directory("whole")
            arguments = new(run, *settings)
            done = self.children.run(arguments) if ranks == 1 else self.torchrun(ranks, arguments)
            expect(done.code == 0 and done.begun == list(range(1, STEPS + 1)), f"the run without a fault: {done}")
        return self.wholes[key]

    @cached_property
    def size(self) -> int:
        """Bytes of a checkpoint."""
        return (self.whole() / "latest.pt").stat().st_size

    def child(self, arguments: Sequence[str], name: str, most: int = 15, **fault: Any) -> Done:
        """A run with the fault at a random step, 2 to `most`, counted from its start."""
        return self.children.run(arguments, {"name": name, "step": self.rng.randint(2, most), **fault})

    def torchrun(
        self, ranks: int, arguments: Sequence[str], faults: Sequence[Injection] = (), terminate: int | None = None
    ) -> Done:
        """Processes with a fault for each start of theirs; torchrun starts them again as often as there are faults.
        terminate: the step in which torchrun itself is sent SIGTERM."""
        trace, output = self.directory("trace"), self.directory("output")
        plan = {"arguments": list(arguments), "trace": str(trace), "faults": list(faults)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={len(faults)}", "-m", "tests.faults.child", json.dumps(plan)]
        with open(output, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=ENVIRONMENT)
            while terminate is not None and process.poll() is None and len(steps(trace)) < terminate:
                time.sleep(0.01)
            if terminate is not None:
                process.terminate()
            code = process.wait(300)
        return Done(code, output.read_text(), steps(trace))

    def moment(self) -> float:
        """A random time in steps, from the beginning of one to somewhere in the next few."""
        return self.rng.uniform(0, 3)

    def lost(self, run: Path, done: Done, damaged: bool = False) -> int:
        """Steps that the run has to repeat; Broken if they are more than a checkpoint's distance, or nothing loads."""
        said: list[str] = []
        state, _ = checkpoint.load_latest(run, said.append)
        expect(bool(said) == damaged, f"reading the checkpoints said {said}")
        lost = done.last - state["position"]["step"]
        expect(0 <= lost <= EVERY, f"{lost} steps lost: killed in step {done.last}, {state['position']}")
        return lost

    def finish(self, run: Path, *settings: str) -> Done:
        """Resume to the end; Broken unless every bit is that of the run with these settings left alone."""
        done = self.children.run(resume(run))
        expect(done.code == 0 and "resuming from" in done.output, f"resuming ended with {done.code}: {done.output}")
        compare(run, self.whole(*settings))
        return done


def compare(run: Path, whole: Path) -> None:
    """The same bits in latest.pt, best.pt and the metrics, and nothing left lying about."""
    try:
        for name in ("latest", "best"):
            same(*(checkpoint.load(checkpoint.find(directory, name)[0]) for directory in (whole, run)), path=name)
        expect(rows(whole) == rows(run), "metrics.csv differs")
    except AssertionError as error:
        raise Broken(f"not the bits of the run that was left alone: {error}") from error
    no_litter(run)


def no_litter(run: Path) -> None:
    left = [path.name for path in run.glob(".*.tmp*")]
    expect(not left, f"temporary files are left: {left}")


def new(run: Path, *settings: str) -> list[str]:
    words = [word for setting in [*SETTINGS, *settings] for word in ("--set", setting)]
    return ["train", "--config", "isonet_digits", *words, "--output", str(run)]


def resume(run: Path) -> list[str]:
    return ["train", "--resume", str(run)]


def steps(trace: Path) -> list[int]:
    return [int(line) for line in trace.read_text().split()] if trace.exists() else []


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)


def expect_error(done: Done, *words: str, alone: bool = True) -> None:
    """The child ended with 1 and one message that has all these words; alone: and no traceback beside it."""
    expect(done.code == 1, f"exit code {done.code}, expected 1: {done.output}")
    missing = [word for word in words if word not in done.said()]
    expect(not missing, f"the message lacks {missing}: {done.output}")
    expect(not alone or "Traceback" not in done.output, f"a traceback beside the message: {done.output}")
