"""Files of weights, opened without running any code that they name: safetensors and state dicts."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmae_ray.errors import UserError
from glmae_ray.paths import Place, read_file, to_place

WEIGHTS = "encoder.safetensors"  # in a run's folder and in an export
FORMAT = 1  # of the facts beside the weights
HEADER = "glmae"  # the same facts in the header of a safetensors file
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_WRAPPERS = ("state_dict", "model")


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        source: Where it is.
        sha256: Of its bytes.
        facts: What we wrote beside or into it; empty for a file of others.
        tensors: The state dict of the part that was asked for, under the file's own names.
        is_part: Whether the file has an entry of that part's name.
        beside: Other entries of the file, each with the reason why it is left alone.
    """

    source: str
    sha256: str
    facts: dict[str, Any]
    tensors: dict[str, Any]
    is_part: bool
    beside: dict[str, str]


def open_weights(location: str | Place, *, part: str) -> WeightFile:
    """Read a file, or `encoder.safetensors` of a folder; local or on S3.

    Args:
        location: A `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file, or a folder.
        part: The entry to take of a file that has several, such as `student` and `teacher`.

    Raises:
        UserError: Nothing there, not such a file, or one that needs its code to be run.
    """
    place = _file_of(to_place(location))
    data = read_file(place)
    if data is None and place == to_place(location):
        raise UserError(f"{location}: no such file; give one, or the folder of a run")
    if data is None:
        raise UserError(f"{location}: has no {WEIGHTS}, which a run writes at its end")
    is_safe = place.suffix == ".safetensors"
    tree, header = _parse_safetensors(place, data) if is_safe else (_unpickle(place, data), {})
    state, is_part = _state_dict(tree, part)
    beside = {} if state is tree else _left_alone(tree, state)
    return WeightFile(
        source=str(place),
        sha256=hashlib.sha256(data).hexdigest(),
        facts=_facts(place, header),
        tensors={str(name): value for name, value in state.items()},
        is_part=is_part,
        beside=beside,
    )


def read_safetensors(place: Place) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors of a file, and our facts from its header where there are any; None for no file.

    Raises:
        UserError: It is not a whole safetensors file.
    """
    data = read_file(place)
    return None if data is None else _parse_safetensors(place, data)


def _file_of(place: Place) -> Place:
    is_file = place.suffix in (".safetensors", *_PICKLED)
    is_folder = isinstance(place, Path) and place.is_dir()  # of a URL the suffix tells
    return place if is_file and not is_folder else place / WEIGHTS


def _parse_safetensors(place: Place, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and our facts from the header where there are any."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{place}: is not a whole safetensors file ({error})") from None
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return tensors, json.loads(metadata.get(HEADER, "{}"))


def _unpickle(place: Place, data: bytes) -> dict[str, Any]:
    """What `torch.save` wrote, if it is plain data and tensors."""
    advice = "save the state dict alone with torch.save, or as safetensors"
    try:
        tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{place}: {_what_was_refused(str(error))}; {advice}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{place}: cannot be read as weights ({reason}); {advice}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{place}: holds a {type(tree).__name__}, not a state dict; {advice}")
    return dict(tree)


def _what_was_refused(message: str) -> str:
    """One clause out of torch's page of advice."""
    marker = "GLOBAL "
    if marker in message:
        name = message.split(marker, 1)[1].split()[0].rstrip(".,")
        return f"holds more than tensors ({name}), which would run code of the file's own"
    return "is not a file of weights, or holds more than tensors"


def _state_dict(tree: dict[str, Any], part: str) -> tuple[Mapping[Any, Any], bool]:
    """The part of a file, and whether it goes by that name."""
    if isinstance(tree.get(part), Mapping):
        return tree[part], True
    found = (tree[name] for name in _WRAPPERS if isinstance(tree.get(name), Mapping))
    return next(found, tree), False


def _left_alone(tree: dict[str, Any], state: Mapping[Any, Any]) -> dict[str, str]:
    parts = ("student", "teacher", *_WRAPPERS)
    return {
        str(name): "a part that was not asked for" if name in parts else "not weights"
        for name, value in tree.items()
        if value is not state
    }


def _facts(place: Place, header: dict[str, Any]) -> dict[str, Any]:
    """Facts from the JSON of the same name, else from the header; both have to agree."""
    path = place.with_suffix(".json")
    text = read_file(path)
    try:
        beside = json.loads(text) if text else {}
    except ValueError:
        beside = {}
    if not (isinstance(beside, dict) and "format" in beside and "width" in beside):
        beside = {}  # somebody else's
    lines = [
        f"{path}: has {name} {beside[name]}, but {place.name} says {value} itself"
        for name, value in header.items()
        if beside and name in beside and beside[name] != value
    ]
    facts = beside or header
    if facts and facts["format"] != FORMAT:
        lines.append(f"{path}: has format {facts['format']}; this version reads {FORMAT}")
    if lines:
        raise UserError(*lines)
    return facts
