"""The faults: each one injected for real, at random points, and what it cost measured. Broken if more than promised."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from isonet_fast.train.saving import checkpoint

from ..train.conftest import photographs_in
from .lab import EVERY, STEPS, Children, Lab, Outcome, compare, expect, expect_error, new, no_litter, resume


class Impossible(Exception):
    """This machine cannot have this fault injected."""


@dataclass
class Fault:
    """`inject` does it once and is called `quick` times by the test suite, `full` times by `make faults`."""

    name: str
    promise: str
    inject: Callable[[Lab], Outcome]
    quick: int
    full: int


FAULTS: list[Fault] = []


def fault(name: str, promise: str, quick: int, full: int) -> Callable:
    def register(inject: Callable[[Lab], Outcome]) -> Callable[[Lab], Outcome]:
        FAULTS.append(Fault(name, promise, inject, quick, full))
        return inject

    return register


# -- killed ---------------------------------------------------------------------------------------------------------

REPEATED = f"at most the {EVERY} steps since the last checkpoint; resumed, the same bits"


@fault("`kill -9` of a run at a random moment, and of the resumed run, three times over", REPEATED, 1, 6)
def killed(lab: Lab) -> Outcome:
    run, lost, said = lab.directory(), [], ""
    arguments = new(run)
    for _ in range(3):
        done = lab.child(arguments, "kill", most=3, delay=lab.moment())
        expect(done.code == -signal.SIGKILL, f"{done}")
        lost.append(lab.lost(run, done))
        arguments = resume(run)
    said = lab.finish(run).line("resuming from")
    return Outcome(3, max(lost), said)


def several(ranks: int, *settings: str) -> list[str]:
    """The same work for `ranks` processes, quick to start."""
    return ["data.source=synthetic:264", "data.image_size=16", f"data.batch_size={24 // ranks}", *settings]


def rank_killed(lab: Lab, ranks: int, *settings: str) -> Outcome:
    """Twice, each time another process at another moment; torchrun ends the others and starts them all again."""
    settings = (*several(ranks), *settings)
    whole, run = lab.whole(*settings, ranks=ranks), lab.directory()
    faults = [
        {"name": "kill", "step": lab.rng.randint(2, 6), "delay": lab.moment(), "rank": lab.rng.randrange(ranks)}
        for _ in range(2)
    ]
    done = lab.torchrun(ranks, new(run, *settings), faults)
    expect(done.code == 0 and done.last == STEPS, f"torchrun ended with {done.code}: {done.output}")
    repeated = [last - first + 1 for last, first in pairwise(done.begun) if first <= last]
    expect(len(done.begun) == STEPS + sum(repeated), f"steps {done.begun}")
    expect(done.output.count("resuming from") == 2, f"resumed {done.output.count('resuming from')} times")
    expect(max(repeated, default=0) <= EVERY, f"{max(repeated, default=0)} steps lost: {done.begun}")
    compare(run, whole)
    return Outcome(2, max(repeated, default=0), done.line("resuming from"))


@fault("`kill -9` of one of 2 processes; torchrun starts them again", REPEATED, 1, 1)
def one_of_two_killed(lab: Lab) -> Outcome:
    return rank_killed(lab, 2)


@fault("`kill -9` of one of 3 processes; torchrun starts them again", REPEATED, 0, 1)
def one_of_three_killed(lab: Lab) -> Outcome:
    return rank_killed(lab, 3)


@fault("`kill -9` of one of 2 processes with sharded weights (FSDP2)", REPEATED, 0, 1)
def one_of_two_sharded_killed(lab: Lab) -> Outcome:
    return rank_killed(lab, 2, "fsdp=true")


@fault("SIGTERM to torchrun of 2 processes", "nothing; resumed, the same bits", 0, 1)
def torchrun_terminated(lab: Lab) -> Outcome:
    settings = several(2)
    whole, run = lab.whole(*settings, ranks=2), lab.directory()
    stopped = lab.torchrun(2, new(run, *settings), terminate=lab.rng.randint(2, 15))
    expect(stopped.code != 0, f"{stopped}")
    said = stopped.line("stopped by SIGTERM")
    lost = lab.lost(run, stopped)
    expect(lost == 0, f"{lost} steps lost")
    done = lab.torchrun(2, resume(run))
    expect(done.code == 0 and done.begun[0] == stopped.last + 1, f"{done}")
    compare(run, whole)
    return Outcome(1, lost, said)


@fault("`kill -9` just before or after a checkpoint's temporary file is renamed", REPEATED, 3, 15)
def killed_at_a_rename(lab: Lab) -> Outcome:
    run = lab.directory()
    done = lab.child(new(run), "kill_at_rename", nth=lab.rng.randint(1, 8), after=lab.rng.random() < 0.5)
    expect(done.code == -signal.SIGKILL and "killed" in done.said(), f"{done}")
    lost = lab.lost(run, done)
    return Outcome(1, lost, lab.finish(run).line("resuming from"))


@fault("SIGTERM at a random moment", "nothing; exit code 143; resumed, the same bits", 1, 5)
def terminated(lab: Lab) -> Outcome:
    run = lab.directory()
    done = lab.child(new(run), "terminate", delay=lab.moment())
    expect(done.code == 143 and f"--resume {run}" in done.said(), f"{done}")
    lost = lab.lost(run, done)
    expect(lost == 0, f"{lost} steps lost")
    lab.finish(run)
    return Outcome(1, lost, done.said())


@fault(
    "SIGTERM, SIGINT or SIGHUP to the process group of a run with processes that load data, once or twice",
    "nothing; exit code 128 + the signal's number; resumed, the same bits",
    1,
    4,
)
def group_signalled(lab: Lab) -> Outcome:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        run, twice = lab.directory(), lab.rng.random() < 0.5
        done = lab.child(new(run, "data.workers=2"), "signal_group", delay=lab.moment(), number=number, twice=twice)
        expect(done.code == 128 + number and f"stopped by {number.name}" in done.said(), f"{done}")
        expect("Traceback" not in done.output and "Exception" not in done.output, f"{done}")
        lost = lab.lost(run, done)
        expect(lost == 0, f"{lost} steps lost")
        lab.finish(run, "data.workers=2")
    return Outcome(3, 0, done.said())


@fault("`kill -9` of a process that loads data", REPEATED, 1, 5)
def worker_killed(lab: Lab) -> Outcome:
    run = lab.directory()
    done = lab.child(new(run, "data.workers=2"), "kill_worker", delay=lab.moment(), which=lab.rng.random())
    # the other worker may print that it was left, and Python that it dropped an exception which it could not raise
    expect_error(done, "DataLoader worker", f"--resume {run}", alone=False)
    no_litter(run)
    lost = lab.lost(run, done)
    lab.finish(run, "data.workers=2")
    return Outcome(1, lost, done.said())


# -- the disk -------------------------------------------------------------------------------------------------------


@fault("a full disk (a small tmpfs)", f"{REPEATED}; no temporary file left", 0, 4)
def disk_full(lab: Lab) -> Outcome:
    """Room for one to three checkpoints and a part of the next: latest, previous, best and a temporary one are four."""
    disk, out = lab.directory("disk"), lab.directory()
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={int(lab.size * lab.rng.uniform(1.5, 3.9))} tmpfs {disk}"
    alone = ["unshare", "--user", "--map-root-user", "--mount"]  # a mount that nobody else sees, and no root is needed
    if not shutil.which("unshare") or subprocess.run([*alone, "sh", "-c", mount], capture_output=True).returncode:
        raise Impossible("no tmpfs can be mounted here")
    children = Children(lab.directory("children"), [*alone, "sh", "-c", f'{mount} && exec "$@"', "sh"])
    try:
        run = disk / "run"
        done = children.run(new(run))
        inside = Path(f"/proc/{children.process.pid}/root{run}")
        shutil.copytree(inside, out)
    finally:
        children.close()
    expect_error(done, "No space left on device", str(run), f"--resume {run}")
    no_litter(out)
    lost = lab.lost(out, done)
    lab.finish(out)
    return Outcome(1, lost, done.said())


@fault("a file that the kernel refuses to let grow (RLIMIT_FSIZE)", f"{REPEATED}; no temporary file left", 1, 5)
def file_limited(lab: Lab) -> Outcome:
    run = lab.directory()
    done = lab.child(new(run), "limit_files", size=int(lab.size * lab.rng.uniform(0.3, 0.95)))
    expect_error(done, "File too large", f"{run}/latest.pt", f"--resume {run}")
    no_litter(run)
    lost = lab.lost(run, done)
    lab.finish(run)
    return Outcome(1, lost, done.said())


# -- damaged files --------------------------------------------------------------------------------------------------


def interrupted(lab: Lab) -> Path:
    """A run in the middle: latest.pt and previous.pt of different steps."""
    run = lab.directory()
    done = lab.children.run(new(run), {"name": "terminate", "step": 9, "delay": 0})
    expect(done.code == 143, f"{done}")
    return run


def damage(content: bytes, lab: Lab) -> bytes:
    """One bit flipped, or the end cut off, anywhere."""
    position = lab.rng.randrange(len(content))
    if lab.rng.random() < 0.3:
        return content[:position]
    flipped = bytearray(content)
    flipped[position] ^= 1 << lab.rng.randrange(8)
    return bytes(flipped)


FALLS_BACK = "noticed every time; goes on from the checkpoint before it"


@fault("latest.pt with one flipped bit or cut off, anywhere in it", FALLS_BACK, 1, 3)
def damaged(lab: Lab) -> Outcome:
    """Every damaged file is read; the run is resumed from the last of them."""
    run = interrupted(lab)
    content, times = (run / "latest.pt").read_bytes(), 200
    before = checkpoint.load(run / "previous.pt")["position"]["step"]
    for _ in range(times):
        (run / "latest.pt").write_bytes(damage(content, lab))
        said: list[str] = []
        state, path = checkpoint.load_latest(run, said.append)
        expect(path.name == "previous.pt" and state["position"]["step"] == before, f"took {path}")
        expect(len(said) == 1 and "latest.pt is damaged" in said[0] and "falling back" in said[0], f"said {said}")
    return Outcome(times, checkpoint_distance(content, before), lab.finish(run).line("damaged"))


def checkpoint_distance(content: bytes, before: int) -> int:
    import io

    return torch.load(io.BytesIO(content), weights_only=True)["position"]["step"] - before


@fault("the same, and the run that fell back is killed at the renaming of its first checkpoint", FALLS_BACK, 1, 4)
def damaged_then_killed(lab: Lab) -> Outcome:
    """The damaged file must never take the place of the good one before it."""
    run = interrupted(lab)
    (run / "latest.pt").write_bytes(damage((run / "latest.pt").read_bytes(), lab))
    fault = {"name": "kill_at_rename", "step": 1, "nth": lab.rng.randint(1, 2), "after": lab.rng.random() < 0.5}
    done = lab.children.run(resume(run), fault)
    expect(done.code == -signal.SIGKILL, f"{done}")
    state, _ = checkpoint.load_latest(run, lambda text: None)
    lost = done.last - state["position"]["step"]
    expect(lost <= EVERY, f"{lost} steps lost")
    return Outcome(1, lost, lab.finish(run).line("resuming from"))


@fault("latest.pt and previous.pt damaged", "the run ends with an error; no file is changed", 1, 2)
def both_damaged(lab: Lab) -> Outcome:
    run = interrupted(lab)
    for name in ("latest.pt", "previous.pt"):
        (run / name).write_bytes(damage((run / name).read_bytes(), lab))
    before = {path: path.read_bytes() for path in run.glob("*.pt")}
    done = lab.children.run(resume(run))
    expect_error(done, "previous.pt is damaged", "neither latest.pt nor previous.pt", "best.pt")
    expect(before == {path: path.read_bytes() for path in run.glob("*.pt")}, "files were changed")
    return Outcome(1, None, done.said())


# -- bad numbers and bad images -------------------------------------------------------------------------------------


@fault("NaN or infinity in one number of one gradient, the loss finite", f"{REPEATED}; never in a checkpoint", 2, 8)
def spoilt_gradient(lab: Lab) -> Outcome:
    run = lab.directory()
    value = lab.rng.choice(["nan", "inf", "-inf"])
    done = lab.child(new(run), "spoil_gradient", value=value, which=lab.rng.random())
    expect_error(done, "non-finite", "latest.pt", "Halve the learning rate")
    for path in run.glob("*.pt"):
        weights = checkpoint.load(path)["model"]
        expect(all(value.isfinite().all() for value in weights.values()), f"{path.name} holds what is not finite")
    no_litter(run)
    lost = lab.lost(run, done)
    lab.finish(run)
    return Outcome(1, lost, done.said())


@fault("image files cut off, emptied or overwritten", "those images; each is named and counted; --strict ends", 1, 3)
def corrupt_images(lab: Lab) -> Outcome:
    images = lab.directory("images")
    photographs_in(images)
    files = sorted(images.rglob("*.jpg"))
    broken = lab.rng.sample(files, lab.rng.randint(1, 4))
    for path in broken:
        content = path.read_bytes()
        path.write_bytes(lab.rng.choice([b"", content[: len(content) // 2], b"<html>" * 50, lab.rng.randbytes(500)]))
    run, strict = lab.directory(), lab.directory("strict")
    settings = [f"data.source=imagefolder:{images}", "data.image_size=24", "data.batch_size=6", "data.workers=1"]
    done = lab.children.run(new(run, *settings))
    expect(done.code == 0, f"{done}")
    named = set(checkpoint.load(run / "latest.pt")["corrupt"])
    expect(named == {str(path) for path in broken}, f"named {named}, broken {broken}")
    expect((run / "metrics.csv").read_text().strip().endswith(f",{len(broken)}"), "the count in metrics.csv")
    ended = lab.children.run([*new(strict, *settings), "--strict"])
    expect_error(ended, "corrupt image", "without --strict")
    return Outcome(len(broken), 0, done.line("skipped"))
