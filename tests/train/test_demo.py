"""`isonet-fast demo`: what it writes, what it says when something goes wrong. The full training is `make demo`."""

import copy
import inspect
import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isonet_fast import SReLU
from isonet_fast.models import isonet_cifar
from isonet_fast.models.official import official_penalty
from isonet_fast.train import config
from isonet_fast.train.commands import cli, demo
from isonet_fast.train.data import datasets
from isonet_fast.train.data.digits import digits
from isonet_fast.train.divergence import Diverged, first_nonfinite
from isonet_fast.train.loop import Run

pytest.importorskip("sklearn", reason="the demo's data come with scikit-learn: pip install 'isonet_fast[demo]'")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: pip install 'isonet_fast[demo]'")

recipe = demo.recipe  # of the real demo: the tests use a shallow network
KEYS = ["network", "depth", "device", "epochs", "seconds", "test_accuracy", "penalty", "step_ms", "speedup"]


def few_digits(seed=0, size=16, count=96):
    images, labels, test_images, test_labels = digits(seed, size)
    return images[:count], labels[:count], test_images[:50], test_labels[:50]


@pytest.fixture(scope="module")
def small():
    """The demo with a shallow network and few images; `small.runs` are the runs that it made."""
    runs = []

    def shallow(*args):
        settled = recipe(*args)
        settled.model.depth = 8
        return settled

    def run(*args, **kwargs):
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "recipe", shallow)
        patch.setattr(demo, "Run", run)
        patch.setattr(datasets, "digits", few_digits)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield SimpleNamespace(runs=runs)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    summary = demo.run(epochs=2, output=output)
    return SimpleNamespace(output=output, summary=summary, model=small.runs[-1].model)


def test_summary_has_exactly_the_promised_keys(finished):
    written = json.loads((finished.output / "summary.json").read_text())
    assert written == finished.summary
    assert list(written) == KEYS
    assert list(written["step_ms"]) == ["official", "isonet_fast", "bare"]
    assert (written["network"], written["depth"], written["device"], written["epochs"]) == ("isonet_cifar", 8, "cpu", 2)


def test_summary_tells_of_the_trained_network(finished):
    """Accuracy of the last epoch, the unweighted penalty, the ratio of the medians."""
    summary = finished.summary
    _, _, images, labels = few_digits()
    correct = (finished.model.eval()(images).argmax(1) == labels).sum().item()
    assert summary["test_accuracy"] == pytest.approx(correct / 50)
    assert summary["penalty"] == pytest.approx(official_penalty(finished.model).item(), rel=1e-4)
    assert summary["penalty"] > 0 and summary["seconds"] > 0
    steps = summary["step_ms"]
    assert all(value > 0 for value in steps.values())
    assert summary["speedup"] == steps["official"] / steps["isonet_fast"]


def test_training_png_is_an_image_of_three_curves(finished):
    path = finished.output / "training.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib import image

    pixels = image.imread(path)
    height, width = pixels.shape[:2]
    thirds = [pixels[:, n * width // 3 : (n + 1) * width // 3, :3] for n in range(3)]
    assert height > 300 and all((third < 0.5).any() for third in thirds)


def test_nothing_else_is_written(finished):
    assert sorted(p.name for p in finished.output.iterdir()) == ["summary.json", "training.png"]


def test_prints_a_table_with_every_figure(small, tmp_path, capsys, monkeypatch):
    steps = {"official": 30.0, "isonet_fast": 12.0, "bare": 10.0}
    monkeypatch.setattr(demo, "time_steps", lambda *args: steps)
    assert cli.main(["demo", "--epochs", "1", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["official", "arithmetic", "30.0"] in rows and ["isonet_fast", "12.0"] in rows
    assert ["bare", "(the", "lower", "bound)", "10.0"] in rows
    assert "speedup over the official arithmetic: 2.50x" in out
    assert "96 digits" in out and str(tmp_path / "summary.json") in out and str(tmp_path / "training.png") in out


def test_the_recipe_is_the_preset():
    """With another number of epochs the milestones keep their share of them."""
    assert recipe(20, 0, None) == config.load("isonet_digits")
    args = cli.parser().parse_args(["demo"])
    assert (args.epochs, args.lr, args.seed, str(args.output)) == (20, None, 0, "runs/demo")
    assert "(default 0.005)" in inspect.getsource(cli) and recipe(20, 0, None).optimizer.lr == 0.005
    other = recipe(10, 3, 0.1)
    assert (other.schedule.milestones, other.seed, other.optimizer.lr) == ([6, 8], 3, 0.1)


def test_digits_are_the_standardised_split():
    images, labels, test_images, test_labels = digits(0)
    assert images.shape == (1437, 1, 16, 16) and test_images.shape == (360, 1, 16, 16)
    assert images.mean().abs() < 1e-5 and abs(images.std() - 1) < 1e-5
    assert test_images.mean().abs() < 0.1  # with the mean of the training part
    assert images.dtype == torch.float32 and labels.dtype == torch.long
    both = torch.bincount(labels, minlength=10) / 1437 - torch.bincount(test_labels, minlength=10) / 360
    assert both.abs().max() < 0.01  # stratified
    assert torch.equal(digits(0)[0], images) and not torch.equal(digits(1)[0], images)


def test_timing_is_of_at_least_ten_steps_and_leaves_the_network_alone():
    assert inspect.signature(demo.time_steps).parameters["steps"].default >= 10
    model = isonet_cifar(8, in_channels=1)
    before = copy.deepcopy(model.state_dict())
    images, labels, *_ = few_digits()
    times = demo.time_steps(model, images[:2], labels[:2], demo.recipe(20, 0, None), steps=1, warmup=0)
    assert list(times) == ["official", "isonet_fast", "bare"] and all(value > 0 for value in times.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_divergence_in_the_command_is_one_line_and_exit_code_1(small, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("former")
    assert cli.main(["demo", "--lr", "1e6", "--epochs", "1", "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("epoch 1/1:")]
    assert len(lines) == 1 and lines[0].startswith("isonet-fast: non-finite loss at step ")
    assert "halve the learning rate" in lines[0].lower()
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "former"


def test_a_large_learning_rate_of_the_real_network_diverges(tmp_path, monkeypatch):
    """The 32-layer network on its real batches: lr 100 is gone within a few steps."""
    monkeypatch.setattr(datasets, "digits", few_digits)
    with pytest.raises(Diverged, match=r"(?i)step \d+: layer '[a-z0-9_.]+' .*halve the learning rate"):
        Run(recipe(1, 0, 100.0), tmp_path, keep=False).fit()
    assert list(tmp_path.iterdir()) == []


class Breaks(nn.Module):
    def forward(self, x):
        return x * float("inf")


def test_first_nonfinite_names_the_first_layer_in_order_of_execution():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(SReLU(3), Breaks()), nn.Linear(3, 2))
    assert first_nonfinite(net, torch.ones(2, 3)) == "1.1"
    with torch.no_grad():
        net[0].weight.fill_(float("nan"))
    assert first_nonfinite(net, torch.ones(2, 3)) == "0"
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_first_nonfinite_of_a_healthy_network_is_none():
    assert first_nonfinite(nn.Sequential(nn.Linear(3, 3), SReLU(3)), torch.ones(2, 3)) is None
    message = str(Diverged(7, None))
    assert "step 7" in message and "every layer's output is finite" in message and "Halve" in message


def half_written(monkeypatch, where):
    """The disk is full after half of the file."""
    from matplotlib.figure import Figure

    def write(self, target, *args, **kwargs):
        with open(target if where == "training.png" else self, "w") as file:
            file.write("hal")
        raise OSError("No space left on device")

    if where == "training.png":
        monkeypatch.setattr(Figure, "savefig", write)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", write)


@pytest.mark.parametrize("where", ["training.png", "summary.json"])
def test_a_failure_while_writing_leaves_the_former_file(small, tmp_path, monkeypatch, capsys, where):
    (tmp_path / where).write_bytes(b"former")
    monkeypatch.setattr(demo, "time_steps", lambda *args: {"official": 1.0, "isonet_fast": 1.0, "bare": 1.0})
    half_written(monkeypatch, where)
    assert cli.main(["demo", "--epochs", "1", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "isonet-fast: No space left on device"
    assert (tmp_path / where).read_bytes() == b"former"
    assert {p.name for p in tmp_path.iterdir()} <= {"training.png", "summary.json"}


@pytest.fixture
def training_fails(monkeypatch):
    """Whoever reaches the training has noticed too late."""

    def fit(self):
        raise AssertionError("minutes of training for nothing")

    monkeypatch.setattr(Run, "fit", fit)


@pytest.mark.parametrize(
    "package, modules", [("scikit-learn", ["sklearn", "sklearn.datasets"]), ("matplotlib", ["matplotlib"])]
)
def test_a_missing_package_gives_the_pip_hint_before_training(
    training_fails, monkeypatch, capsys, tmp_path, package, modules
):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("isonet-fast: ") and package in line and "pip install 'isonet_fast[demo]'" in line


def test_an_output_that_cannot_be_a_directory_fails_before_training(training_fails, capsys, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["demo", "--output", str(tmp_path / "taken")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("isonet-fast: ") and "taken" in line


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epochs", "0"], "schedule.epochs must be positive and finite, got 0"),
        (["--seed", "-1"], "seed must be finite and not negative, got -1"),
        (["--seed", str(2**70)], "seed must be at most 1099511627776, got 11805916207"),
        (["--lr", "nan"], "optimizer.lr must be positive and finite, got nan"),
        (["--lr", "0"], "optimizer.lr must be positive and finite, got 0"),
    ],
)
def test_numbers_out_of_range(training_fails, capsys, tmp_path, words, message):
    assert cli.main(["demo", *words, "--output", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err.startswith(f"isonet-fast: {message}")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    """No handler of ours stands between Ctrl-C and the end: there is nothing to save."""

    def train_step(self, batches):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "_train_step", train_step)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "isonet-fast: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["fly"])
    assert raised.value.code == 2 and "demo" in capsys.readouterr().err
