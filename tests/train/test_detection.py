"""Detection: COCO's files and what can be wrong with them, the tiny COCO, AP, and a run that is killed and goes on."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from isonet_fast.import_torchvision import import_torchvision
from isonet_fast.train import config
from isonet_fast.train.commands.cli import main
from isonet_fast.train.detection import coco, shapes
from isonet_fast.train.detection.annotations import read
from isonet_fast.train.detection.config import RULES, DetectionConfig, Steps
from isonet_fast.train.saving import checkpoint, lock, resuming
from isonet_fast.train.tables import detection

import_torchvision()
from isonet_fast.train.detection.run import DetectionRun, factor

from .test_loop import stop_at


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("coco")
    shapes.write(directory, train=200, val=40)
    return directory


@pytest.fixture
def broken(tiny, tmp_path):
    """Change the annotations of a copy: returns it with what `change` did to the contents of val2017."""

    def broken(change):
        copy = shutil.copytree(tiny, tmp_path / "coco")
        path = copy / "annotations" / "instances_val2017.json"
        contents = json.loads(path.read_text())
        change(contents)
        path.write_text(json.dumps(contents))
        return copy

    return broken


# -- files -------------------------------------------------------------------------------------------------------------


def set_first(key, value):
    return lambda contents: contents["annotations"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    "change, error",
    [
        (
            lambda c: c["images"][2].__setitem__("file_name", "gone.jpg"),
            r"instances_val2017.json: image 3 is 'gone.jpg', which is not in .*val2017$",
        ),
        (
            set_first("segmentation", [[1, 2, 3, 4]]),
            "annotation 1 of image 1: a polygon of 2 points; three is the least$",
        ),
        (set_first("category_id", 4), "annotation 1 of image 1: category 4 is none of 1, 2, 3$"),
        (set_first("image_id", 999), "annotation 1 of image 999: there is no such image$"),
        (
            set_first("bbox", [1, 2, None, 3]),
            r"bbox must be four numbers \[x, y, width, height\], got \[1, 2, None, 3\]$",
        ),
        (set_first("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "a polygon must be a list of numbers, x and y in turn$"),
        (set_first("segmentation", {"size": [9, 9], "counts": [81]}), "run-length code of size .* where the image has"),
        (lambda c: c["annotations"][0].pop("bbox"), "is no annotation file of COCO: no 'bbox' where one is expected$"),
        (lambda c: c["categories"].append({"id": 0, "name": "x"}), r"categories must have ids from 1 on"),
        (lambda c: c["images"].append(c["images"][0]), "1 images have an id that another has$"),
        (lambda c: c.pop("images"), "is no annotation file of COCO: no 'images' where one is expected$"),
    ],
    ids=["image", "polygon", "category", "no image", "bbox", "odd", "code", "key", "background", "twice", "section"],
)
def test_what_is_wrong_with_annotations_is_one_line(broken, change, error):
    with pytest.raises(ValueError, match=error) as raised:
        read(broken(change), "val2017")
    assert "\n" not in str(raised.value)


def test_annotations_that_are_cut_off(tiny, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    copy = shutil.copytree(tiny, tmp_path / "coco")
    path = copy / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:1000])
    arguments = ["detect", "--data", f"coco:{copy}", "--config", "maskrcnn_tiny", "--output", str(tmp_path / "run")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "instances_train2017.json is cut off or no JSON: line 1, column" in said and said.count("\n") == 1


def test_absent_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"instances_val2017.json is not there; coco:DIR needs DIR/annotations/"
    ):
        read(tmp_path, "val2017")
    with pytest.raises(ValueError, match="detectors train on --data coco:DIR, got 'digits'"):
        coco.open_coco("digits")


def test_without_pycocotools_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ModuleNotFoundError, match="by pycocotools .*: pip install pycocotools"):
        coco.open_coco(f"coco:{tiny}")


def test_the_tiny_coco_follows_from_its_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shapes.write(tmp_path / name, train=2, val=1, seed=seed)
    files = {n: [p.read_bytes() for p in sorted((tmp_path / n).rglob("*")) if p.is_file()] for n in "abc"}
    assert files["a"] == files["b"] and len(files["a"]) == 5
    assert all(x != y for x, y in zip(files["a"], files["c"], strict=True))


def test_boxes_and_masks_fit_the_pixels(tiny):
    pytest.importorskip("pycocotools")
    source = coco.open_coco(f"coco:{tiny}")
    assert (source.num_classes, len(source.train), len(source.val)) == (4, 200, 40)
    for seed in range(6):  # mirrored or not
        torch.manual_seed(seed)
        image, target = source.train[seed]
        assert image.shape == (3, 64, 64) and 0 <= image.min() and image.max() <= 1
        bright = image.amax(0) > 0.3  # the background is darker
        inside = target["masks"].amax(0).bool()
        assert (bright ^ inside).sum() < 0.25 * inside.sum()  # Pillow draws the edge too
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero().T
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - found).abs().max() <= 1.5


def test_perfect_detections_have_an_ap_of_100(tiny):
    pytest.importorskip("pycocotools")
    from isonet_fast.train.detection.evaluation import average_precision, results

    annotations = read(tiny, "val2017")
    perfect = []
    for image in annotations.images:
        target = coco._target(annotations.objects[image["id"]], 64, 64)
        scores = torch.ones(len(target["boxes"]))
        perfect += results(image["id"], {**target, "scores": scores, "masks": target["masks"][:, None].float()})
    found = average_precision(annotations, perfect, masks=True)
    assert found["box_AP"] == found["mask_AP"] == found["box_APs"] == pytest.approx(100)
    assert found["box_APl"] != found["box_APl"]  # there are no large objects
    half = average_precision(annotations, [row for row in perfect if row["image_id"] % 2], masks=True)
    assert 30 < half["box_AP"] < 70
    assert average_precision(annotations, [], masks=True)["mask_AP"] == 0


# -- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maskrcnn_risonet50", "maskrcnn_resnet50_frozen", "maskrcnn_resnet50_live"])
def test_the_presets_are_the_1x_schedule(name):
    c = config.load_as(DetectionConfig, name)
    assert (c.data.batch_size, c.optimizer.lr, c.optimizer.momentum, c.optimizer.weight_decay) == (16, 0.02, 0.9, 1e-4)
    assert c.schedule == Steps(90_000, 500, [60_000, 80_000], 0.1)
    assert (c.detector.min_size, c.detector.max_size, c.detector.channels) == (800, 1333, 256)


def test_the_learning_rate_follows_the_step():
    recipe = Steps()
    factors = [factor(step, recipe) for step in (1, 250, 499, 500, 60_000, 60_001, 80_000, 80_001)]
    assert factors == pytest.approx([1 / 500, 0.5, 499 / 500, 1, 1, 0.1, 0.1, 0.01])


def test_every_key_has_a_rule():
    assert list(RULES) == list(resuming.flat(DetectionConfig().as_dict()))


@pytest.mark.parametrize(
    "setting, error",
    [
        ("model.dropout=0.1", "model.dropout must be null, got 0.1: a backbone has no classifier"),
        ("detector.channels=0", "detector.channels must be positive"),
        ("fsdp=true", "unknown key fsdp"),
        ("schedule.epochs=3", "unknown key schedule.epochs"),
    ],
)
def test_a_configuration_is_checked(setting, error):
    with pytest.raises(ValueError, match=error):
        config.load_as(DetectionConfig, "maskrcnn_tiny", [setting])


# -- runs --------------------------------------------------------------------------------------------------------------

SHORT = (
    "schedule.steps=6",
    "data.batch_size=2",
    "detector.proposals=20",
    "detector.rois=8",
    "checkpoint.every_steps=3",
)


def settled(tiny, *more):
    return config.load_as(DetectionConfig, "maskrcnn_tiny", [f"data.source=coco:{tiny}", "device=cpu", *SHORT, *more])


class Stop(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(DetectionRun, "_evaluate", lambda self: {})
    whole = DetectionRun(settled(tiny), tmp_path / "whole")
    whole.fit()
    after = DetectionRun._after_step

    def stops(self):
        after(self)
        if self.step == 4:  # one step behind the last checkpoint
            raise Stop

    monkeypatch.setattr(DetectionRun, "_after_step", stops)
    with pytest.raises(Stop):
        DetectionRun(settled(tiny), tmp_path / "part").fit()
    monkeypatch.setattr(DetectionRun, "_after_step", after)
    state, _ = checkpoint.load_latest(tmp_path / "part")
    assert state["position"]["step"] == 3
    part = DetectionRun(settled(tiny), tmp_path / "part", state)
    part.fit()
    assert part.step == 6
    ends = whole.model.state_dict(), part.model.state_dict()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_that_is_killed_goes_on_and_learns(tiny, tmp_path, capfd):
    """The tiny Mask R-CNN, killed once half-way: box AP50 above 50 and mask AP50 above 40."""
    pytest.importorskip("pycocotools")
    directory = tmp_path / "run"
    short = [f"schedule.{s}" for s in ("steps=100", "warmup=20", "milestones=[80]")] + ["checkpoint.every_steps=20"]
    command = [sys.executable, "-m", "isonet_fast", "detect", "--data", f"coco:{tiny}", "--config", "maskrcnn_tiny"]
    command += ["--output", str(directory), *(word for one in short for word in ("--set", one))]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while run.poll() is None and not (directory / "previous.pt").exists():  # the second one, of step 20
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert main(["train", "--resume", str(directory)]) == 1
    assert f"of another command: go on with isonet-fast detect --resume {directory}" in capfd.readouterr().err
    assert main(["detect", "--resume", str(directory)]) == 0
    found = json.loads((directory / "evaluation.json").read_text())
    assert found["step"] == 100 and found["box_AP50"] > 50 and found["mask_AP50"] > 40, found
    assert found["box_APl"] is None  # there are no large objects, and JSON has no NaN


# -- table 6 -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_table_6_at_full_scale_are_the_published_recipe(capsys):
    assert main(["table", "6", "--scale", "imagenet", "--dry-run"]) == 0
    parts = capsys.readouterr().out.split("# table 6")[1:]
    printed = [yaml.safe_load(part.partition("\n")[2]) for part in parts]
    presets = ("maskrcnn_risonet50", "maskrcnn_resnet50_frozen", "maskrcnn_resnet50_live")
    assert printed == [config.load_as(DetectionConfig, name).as_dict() for name in presets]


def test_table_6_is_made_once_and_says_what_the_csv_says(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pycocotools")
    pytest.importorskip("matplotlib")
    command = ["table", "6", "--output", str(tmp_path / "t"), *(word for s in SHORT for word in ("--set", s))]
    command += ["--set", "schedule.steps=2", "--only", "R-ISONet"]
    assert main(command) == 0
    lines = list(csv.DictReader((tmp_path / "t" / "table6.csv").open()))
    assert [line["row"] for line in lines] == ["R-ISONet", "ResNet, live BatchNorm"]
    assert lines[0]["seeds"] == "1" and lines[0]["box_AP"] and not lines[1]["seeds"]
    assert (tmp_path / "t" / "table6.md").read_text() == detection.markdown("small", lines)
    assert (tmp_path / "t" / "table6.png").stat().st_size > 1000
    monkeypatch.setattr(DetectionRun, "fit", None)  # what is there is not made again
    assert main(command) == 0
    assert main([*command, "--set", "optimizer.lr=0.5"]) == 1
    assert "holds a run with other settings; choose another --output" in capsys.readouterr().err
    monkeypatch.setattr(DetectionRun, "fit", lambda self: dict.fromkeys(detection.MEASURES, 1.0))
    other = tmp_path / "t" / "resnet-live-batchnorm" / "seed-0"
    other.mkdir(parents=True)
    (other / "metrics.csv").write_text("seconds\n2\n")
    command[command.index("R-ISONet")] = "ResNet, live BatchNorm"
    assert main([*command, "--set", "optimizer.lr=0.5"]) == 0  # rows may have settings of their own
    lines = list(csv.DictReader((tmp_path / "t" / "table6.csv").open()))
    assert [line["seeds"] for line in lines] == ["1", "1"] and lines[1]["box_AP"] == "1.0"


def ends(output):
    """The table without its clock."""
    lines = csv.DictReader((output / "table6.csv").open())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_table_6_killed_within_a_row_and_between_rows(tiny, tmp_path, monkeypatch):
    """The average precisions are replaced by a sum of the weights, which a step more or less would change."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("matplotlib")
    taken, step = [], DetectionRun._train_step

    def counted(self, batches):
        taken.append(self.directory)
        step(self, batches)

    def weights(self):
        return dict.fromkeys(detection.MEASURES, 1e6 * sum(p.double().sum().item() for p in self.model.parameters()))

    monkeypatch.setattr(DetectionRun, "_train_step", counted)
    monkeypatch.setattr(DetectionRun, "_evaluate", weights)
    monkeypatch.setattr(detection, "_picture", lambda *args: None)

    def words(output):
        settings = (f"data.source=coco:{tiny}", *SHORT, "schedule.steps=4", "checkpoint.every_steps=2")
        return ["table", "6", "--output", str(output), *(word for s in settings for word in ("--set", s))]

    assert main(words(tmp_path / "whole")) == 0
    assert len(taken) == 8 and len(set(taken)) == 2
    taken.clear()
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:  # within the first row
        stop_at(3, patch)
        assert main(words(parts)) == 143
    with monkeypatch.context() as patch:  # behind the last step of a run, before its result is written
        patch.setattr(detection, "_conclude", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words(parts)) == 130
    real = detection.make
    with monkeypatch.context() as patch:  # between the first row and the second

        def killed(settled, folder, processes):
            if folder.parent.name != "r-isonet":
                raise KeyboardInterrupt
            return real(settled, folder, processes)

        patch.setattr(detection, "make", killed)
        assert main(words(parts)) == 130
    assert [line["seeds"] for line in ends(parts)] == ["1", ""]
    other = lock.locked(parts / "resnet-live-batchnorm" / "seed-0")  # and another process is at work on the second
    other.__enter__()
    waited = []
    monkeypatch.setattr(detection.time, "sleep", lambda _: waited.append(other.__exit__(None, None, None)))
    assert main(words(parts)) == 0
    assert len(waited) == 1 and len(taken) == 8 and len(set(taken)) == 2  # nothing twice
    assert ends(parts) == ends(tmp_path / "whole")


def test_a_diverged_row_of_table_6_is_a_result():
    result = {**dict.fromkeys(detection.MEASURES, 1.0), "diverged": None, "seconds": 1.0, "commit": "c"}
    line = detection.line("x", [result, {**result, "box_AP": 0.0, "diverged": 7}])
    assert (line["box_AP"], line["box_deviation"], line["diverged"], line["seeds"]) == ("1.0", "", "at step 7", "2")
    with pytest.raises(ValueError, match="table 6 has the scales small and imagenet .*, got cifar"):
        detection.rows("cifar")


def test_the_committed_table_6_says_what_its_csv_file_says():
    docs = Path(__file__).parents[2] / "docs"
    lines = list(csv.DictReader((docs / "tables" / "table6.csv").open()))
    assert [line["row"] for line in lines] == [row.name for row in detection.rows("small")]
    assert (docs / "tables" / "table6.md").read_text() == detection.markdown("small", lines)
    assert "tables/table6.md" in (docs / "tables.md").read_text() and (docs / "tables" / "table6.png").exists()
