"""From a YAML file and `key=value` words to a checked config, with every mistake told at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from glmae_ray.config_base import BrokenRulesError
from glmae_ray.config_train import JobConfig
from glmae_ray.errors import UserError

Job = TypeVar("Job", bound=JobConfig)


def load(kind: type[Job], words: list[str]) -> Job:
    """Build a run's tree from an optional YAML file followed by `key=value` words.

    Args:
        kind: The verb's config class.
        words: `[CONFIG.yaml] [key=value ...]`; later words win.

    Raises:
        UserError: Every mistake at once, a line each.
    """
    has_file = bool(words) and "=" not in words[0]
    tree = read_yaml(Path(words[0])) if has_file else {}
    mistakes = [line for word in words[has_file:] if (line := _override(tree, word))]
    cfg, more = _validate(kind, tree)
    if cfg is None or mistakes:
        raise UserError(*mistakes, *more)
    return cfg


def build(kind: type[Job], tree: dict[str, Any]) -> Job:
    """Check a tree that is already in memory.

    Raises:
        UserError: Every mistake at once, a line each.
    """
    cfg, mistakes = _validate(kind, tree)
    if cfg is None:
        raise UserError(*mistakes)
    return cfg


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: The file is missing, is not YAML, or holds something else.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read as a config file ({reason})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}; a config is key: value lines")
    if odd := [key for key in tree or {} if not isinstance(key, str)]:
        raise UserError(f"{path}: {odd[0]!r} is not the name of a field")
    return tree or {}


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with the changes put in, section by section; neither argument is touched."""
    merged = dict(tree)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def shipped(name: str) -> Path:
    """Path of a config that comes with the project, such as `pretrain/demo.yaml`."""
    package = Path(__file__).parent
    inside_wheel, in_checkout = package / "configs" / name, package.parent / "configs" / name
    return inside_wheel if inside_wheel.exists() else in_checkout


def _override(tree: dict[str, Any], word: str) -> str | None:
    """Put one `a.b=value` into the tree; return the line that says why it cannot be."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        return f"{word}: is not key=value (a config file comes first, and only one)"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"{name}: {text!r} is not a YAML value; quote it"
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) != text:
        value = text  # `run=007` stays a name; a field that is a number reads the text again
    *sections, leaf = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return f"{name}: {section} is not a section"
    tree[leaf] = value
    return None


def _validate(kind: type[Job], tree: dict[str, Any]) -> tuple[Job | None, list[str]]:
    """Validate; go on without a wrong field, so that rules between the others speak too."""
    lines: list[str] = []
    dropped: set[str] = set()
    while True:
        try:
            cfg = kind.model_validate(tree)
        except BrokenRulesError as broken:
            lines += [line for fields, line in broken.problems if not dropped & set(fields)]
            return None, lines
        except ValidationError as error:
            wrong = [e for e in error.errors() if _field(e) not in dropped]
            if not wrong:
                return None, lines
            for e in wrong:
                if _field(e) not in dropped:  # a list is one field, whatever is wrong inside
                    lines.append(_explain(kind, e))
                    dropped.add(_field(e))
                    _repair(tree, e)
        else:
            return (None if lines else cfg), lines


def _path(error: ErrorDetails) -> list[str]:
    """The keys that lead to the wrong field, without positions inside a list."""
    keys = []
    for key in error["loc"]:
        if not isinstance(key, str):
            break
        keys.append(key)
    return keys


def _field(error: ErrorDetails) -> str:
    return ".".join(_path(error))


def _repair(tree: dict[str, Any], error: ErrorDetails) -> None:
    """Take the wrong value out, or put a stand-in where a required one is missing."""
    *sections, leaf = _path(error)
    for section in sections:
        tree = tree[section]
    if error["type"] == "missing" and len(_path(error)) == len(error["loc"]):
        tree[leaf] = 1  # reads as a count and as a name; no rule about this field is reported
    else:
        tree.pop(leaf, None)


def _explain(kind: type[JobConfig], error: ErrorDetails) -> str:
    name, value, message = _field(error), error["input"], error["msg"]
    if error["type"] == "missing" and len(_path(error)) < len(error["loc"]):
        return f"{name}: {value!r} is wrong: more values are needed"
    if error["type"] == "missing":
        return f"{name}: is missing; give {name}=..."
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, _path(error)[:-1])
        near = difflib.get_close_matches(_path(error)[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    return f"{name}: {value!r} is wrong: {message[0].lower()}{message[1:]}"


def _known_keys(kind: type[BaseModel], sections: list[str]) -> list[str]:
    for section in sections:
        field = kind.model_fields[section].annotation
        if isinstance(field, type) and issubclass(field, BaseModel):
            kind = field
    return list(kind.model_fields)
