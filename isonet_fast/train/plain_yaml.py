"""YAML as plain values: nothing in it is executed, and an error is reported in one line with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError


def read(path: Path) -> Any:
    """The values in a YAML file, which is UTF-8; ValueError says what is wrong with it, and in which line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} must be UTF-8, got the byte 0x{content[error.start]:02x} in line {line}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """The values in `text`; `where` names it in a ValueError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no valid YAML: {_reason(error, text)}") from error
    except RecursionError:
        raise ValueError(f"{where} is no valid YAML: its values are nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases: with them a short file is a value without an end, or one that fills memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConstructorError(None, None, "aliases (*name) are not read, write the value out", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Add the place to what PyYAML's constructors raise on values such as 2001-99-99."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{str(node.value)[:40]!r} is no {kind}", node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
        return values


def _reason(error: yaml.YAMLError, text: str) -> str:
    """What PyYAML found, where, and where the value began that it was in."""
    if isinstance(error, yaml.reader.ReaderError):  # it has a position and no mark
        before = text[: error.position]
        return f"the character {text[error.position]!r} is not allowed, in line {before.count(chr(10)) + 1}"
    assert isinstance(error, yaml.MarkedYAMLError)
    context, problem = error.context or "", error.problem or "unreadable"
    began = error.context_mark if context.startswith("while ") else None
    reason = problem if began or not context else f"{context}, {problem}"
    if error.problem_mark is not None:
        reason += f", in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    if began:
        reason += f" ({context} that began in line {began.line + 1})"
    return reason
