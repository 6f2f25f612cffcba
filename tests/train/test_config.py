"""Configurations: every preset is the published recipe; anything unknown or of the wrong type is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isonet_fast.train import config, schedule

PUBLISHED = {  # learning rate, batch per GPU, gamma, dropout
    "isonet18": (0.01, 128, 1e-4, 0.1),
    "isonet34": (0.01, 128, 1e-4, 0.1),
    "isonet50": (0.0075, 96, 1e-4, 0.1),
    "isonet101": (0.005, 64, 3e-4, 0.1),
    "risonet18": (0.05, 128, 1e-4, 0.4),
    "risonet34": (0.05, 128, 1e-4, 0.4),
    "risonet50": (0.025, 64, 1e-4, 0.4),
    "risonet101": (0.0125, 32, 1e-4, 0.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_recipes(name: str) -> None:
    c = config.load(name)
    assert (c.optimizer.lr, c.data.batch_size, c.penalty.coeff, c.model.dropout) == PUBLISHED[name]
    assert (c.model.name, c.optimizer.momentum, c.optimizer.weight_decay, c.penalty.kind) == (name, 0.9, 1e-4, "isonet")
    assert (c.schedule.epochs, c.schedule.warmup, c.schedule.milestones) == (100, 5, [30, 60, 90])


def test_presets_are_those_and_the_small_ones() -> None:
    assert config.presets() == sorted([*PUBLISHED, "isonet_cifar110", "isonet_digits"])


def test_settings_come_last_and_are_typed() -> None:
    c = config.load("isonet50", ["optimizer.lr=1e-3", "schedule.milestones=[3, 5]", "optimizer.clip=1", "compile=true"])
    assert c.optimizer.lr == 1e-3 and c.schedule.milestones == [3, 5] and c.compile is True
    assert c.optimizer.clip == 1.0 and isinstance(c.optimizer.clip, float)
    assert config.load("isonet50", ["optimizer.clip=null"]).optimizer.clip is None


def test_a_checkpoint_configuration_reads_back() -> None:
    c = config.load("risonet101", ["seed=3"])
    assert config.load(None, ["seed=4"], base=c.as_dict()) == config.load("risonet101", ["seed=4"])


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {name: isonet34}\noptimizer: {lr: 1e-2}\n")
    c = config.load(str(tmp_path / "mine.yaml"))
    assert c.model.name == "isonet34" and c.optimizer.lr == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.learning_rate=1"], r"unknown key optimizer\.learning_rate; known: lr, momentum"),
        (["optimiser.lr=1"], r"unknown key optimiser; did you mean 'optimizer'\?"),
        (["data.bach_size=1"], r"unknown key data\.bach_size; did you mean 'batch_size'\?"),
        (["momentum=1"], r"unknown key momentum; did you mean 'optimizer\.momentum'\?"),
        (["optimizer.lr=fast"], r"optimizer\.lr must be float, got 'fast'"),
        (["optimizer.lr=true"], r"optimizer\.lr must be float, got True"),
        (["optimizer.clip=[1]"], r"optimizer\.clip must be float or null, got \[1\]"),
        (["data.batch_size=1.5"], r"data\.batch_size must be int, got 1\.5"),
        (["data.batch_size=true"], r"data\.batch_size must be int, got True"),
        (["data.batch_size=0"], r"data\.batch_size must be positive and finite, got 0"),
        (["schedule.milestones=[a]"], r"schedule\.milestones\[0\] must be int, got 'a'"),
        (["schedule.milestones=3"], r"schedule\.milestones must be list\[int\], got 3"),
        (["penalty.coeff=-1"], r"penalty\.coeff must be finite and not negative"),
        (["optimizer.lr=.nan"], r"optimizer\.lr must be positive and finite, got nan"),
        (["optimizer=3"], r"optimizer is a section of keys, got 3"),
        (["precision=half"], r"precision must be one of float32, bfloat16, float16, got 'half'"),
        (["lr"], r"a setting is KEY=VALUE"),
        (["seed=[1"], r"--set seed=\[1 is no valid YAML"),
        (["seed=!!python/object/apply:os.getpid []"], r"is no valid YAML: could not determine a constructor"),
        (["seed=2001-99-99"], r"'2001-99-99' is no timestamp, in line 1"),
        (["seed=!!int ''"], r"'' is no int, in line 1"),
        (["seed=" + 5000 * "9"], r"'9{40}' is no int, in line 1"),
        (["seed=" + 30 * "9"], r"seed must be at most 1099511627776, got 9{30}$"),
        (["accumulate=" + 400 * "9"], r"accumulate must be at most 281474976710656, got 9+\.\.\.9+$"),
        (["data.image_size=65537"], r"data\.image_size must be at most 65536, got 65537"),
        (["model.width=65537"], r"model\.width must be at most 65536, got 65537"),
        (["optimizer.lr=" + 400 * "9"], r"optimizer\.lr must be float, got 9+\.\.\.9+$"),
        (["optimizer.lr=" + 400 * "x"], r"optimizer\.lr must be float, got 'x+\.\.\.x+'$"),
        (["optimizer.weight_decay=inf"], r"optimizer\.weight_decay must be finite and not negative, got inf"),
        (["model.dropout=2"], r"model\.dropout must be from 0 to 1, or null, got 2\.0"),
        (["penalty.kind=lort"], r"penalty\.kind must be one of isonet, lorth, .*, got 'lort'"),
    ],
)
def test_wrong_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load("isonet18", settings)


FILES = [
    (
        b"model: {depth: 8\noptimizer:\n  lr: 1\n",
        r"but got ':', in line 2, column 10 \(.* mapping that began in line 1\)",
    ),
    (b"model:\n\tname: a\n", r"found character '\\t' that cannot start any token, in line 2, column 1"),
    (b"model: isonet: 18", r"mapping values are not allowed here, in line 1, column 14"),
    (b"--- 1\n--- 2\n", r"expected a single document in the stream, but found another document, in line 2"),
    (b"seed: 1\nseed: 2\n", r"the key 'seed' is given twice, in line 1, column 1"),
    (b"{[a]: 1}: 2\n", r"found unhashable key, in line 1"),
    (b"seed: \0\n", r"the character '\\x00' is not allowed, in line 1"),
    (b"model:\n  name: caf\xe9\n", r"must be UTF-8, got the byte 0xe9 in line 2"),
    ("seed: 1\n".encode("utf-16"), r"must be UTF-8, got the byte 0xff in line 1"),
    (b"", r"must hold a mapping of sections, got None"),
    (b"- 1\n", r"must hold a mapping of sections, got \[1\]"),
    (b'data: {source: "digits\\0"}', r"data\.source must not hold the character NUL, got 'digits\\x00'"),
    (b"a: " + 5000 * b"[", r"is no valid YAML: its values are nested too deeply"),
    (
        b"optimizer: {lr: " + 100 * b"[" + 100 * b"]" + b"}",
        r"optimizer\.lr must be float, got \[{7}\.\.\.\]{7}$",
    ),
    (b"a: &a\n  b: *a\n", r"aliases \(\*name\) are not read, write the value out, in line 2"),
    (
        b"\n".join([b"a0: &a0 {}", *(b"a%d: &a%d {b: *a%d, c: *a%d}" % (n, n, n - 1, n - 1) for n in range(1, 60))]),
        "alias",
    ),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_what_is_wrong_with_a_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        config.load(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300 + len(str(path))


def test_a_file_that_a_windows_editor_wrote(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfoptimizer:\r\n  lr: 0.5\r\n")
    assert config.load(str(tmp_path / "mine.yaml")).optimizer.lr == 0.5


def test_the_configuration_of_a_checkpoint_is_checked_too() -> None:
    endless: dict = {}
    endless["model"] = endless
    for base, message in (
        (endless, r"unknown key model\.model"),
        ({"seed": endless}, r"seed must be int, got \{'model': \{"),
        ([1], r"the configuration in the checkpoint must hold a mapping of sections, got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            config.load(None, [], base)


@pytest.mark.parametrize(
    "path", ["im #2", "a: b", "it's", 'a "b"', "*a", "&a", "[a", "{a}", "~", "a\nb", "a ", "null", "ü\udcff"]
)
def test_a_path_is_taken_literally(path: str) -> None:
    source = f"imagefolder:{path}"
    assert config.load(None, [f"data.source={source}"]).data.source == source


def test_text_in_quotes_is_read_as_yaml() -> None:
    assert config.load(None, ["precision='bfloat16'", 'model.name="isonet18"']).precision == "bfloat16"


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'isonet51'; did you mean 'isonet50'\?"):
        config.load("isonet51")


def test_the_learning_rate_warms_up_and_falls_after_each_milestone() -> None:
    """Epochs count from 1; the milestone's own epoch is still at the higher rate; groups keep their ratio."""
    recipe = config.load("isonet18").schedule
    factors = [schedule.factor(epoch, recipe) for epoch in (1, 4, 5, 30, 31, 60, 61, 91)]
    assert factors == pytest.approx([0.2, 0.8, 1, 1, 0.1, 0.1, 0.01, 0.001])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    schedule.apply(optimizer, [1.0, 0.1], 31, recipe)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
