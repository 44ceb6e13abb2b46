"""Checkpoint folders of a run: what they hold, which are complete, and which stay.

RUN/checkpoints/step-0000500-2/     of step 500, written in the run's sitting 2
  engine/       DeepSpeed's files: student, teacher, decoder, heads, centre; optimizer, scaler
  rng-0.pt      random state of rank 0's process
  state.json    step, samples consumed, config, versions, store; rank 0's
  part-0.json   size and CRC32C of each file that rank 0 wrote, after all of them

A checkpoint is complete when there are as many parts as its state names: what a kill, a full disk
or a lost node leaves is none. Ray Train's own register of checkpoints is not used: one that fails
to be written ends the run there, and so does a register that a kill cut short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from glmae_ray.paths import Place, names_in, publish, read_file, remove_folder

FOLDER = "checkpoints"  # in the run folder
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)-(\d+)")


class CorruptError(Exception):
    """A complete checkpoint does not hold what was written."""


class Checkpoint(NamedTuple):
    """A complete checkpoint.

    Attributes:
        place: Its folder.
        state: The facts in its state.json.
    """

    place: Place
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def folder_of(run: Place, *, step: int, sitting: int) -> Place:
    """Where the checkpoint of a step goes."""
    return run / FOLDER / f"step-{step:07d}-{sitting}"


def write_part(folder: Place, files: Mapping[str, bytes], *, rank: int) -> None:
    """Write a rank's files, and then the list of them that makes them count.

    Args:
        folder: Of the checkpoint.
        files: Name inside the folder -> content.
        rank: Whose.

    Raises:
        OSError: The disk is full or fails, or the object store does.
        UserError: The object store refuses.
    """
    for name, data in files.items():
        publish(folder / name, data)
    listed = {name: _facts(data) for name, data in files.items()}
    publish(folder / _part(rank), json.dumps({"files": listed}, indent=1))


def remove_part(folder: Place, files: Mapping[str, bytes]) -> None:
    """Free what a rank has written of a checkpoint that will not be complete, where it can be."""
    if isinstance(folder, Path):
        with suppress(OSError):  # the disk may be gone; at its next start the run tries again
            for name in files:
                for path in (folder / name).parent.glob(f"{Path(name).name}*"):
                    path.unlink(missing_ok=True)


def complete(run: Place) -> list[Checkpoint]:
    """The complete checkpoints of a run, newest first; `contents` finds those that are damaged."""
    found = []
    for name in sorted(_folders(run), key=_order, reverse=True):
        place = run / FOLDER / name
        raw = read_file(place / STATE)
        if raw is None:
            continue
        state = _read_state(raw, name)
        if {_part(rank) for rank in range(state["parts"])} <= names_in(place):
            found.append(Checkpoint(place, state))
    return found


def latest_step(run: Place) -> int:
    """Steps done at the newest complete checkpoint of a run; 0 where there is none."""
    found = complete(run)
    return found[0].step if found else 0


def contents(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Every file of a checkpoint, read and compared with what was written.

    Raises:
        CorruptError: One is missing, or is another.
    """
    for rank in range(checkpoint.state["parts"]):
        for name, facts in _read_part(checkpoint.place / _part(rank)).items():
            data, path = read_file(checkpoint.place / name), checkpoint.place / name
            if data is None:
                raise CorruptError(f"{path} is missing")
            if len(data) != facts["bytes"]:
                raise CorruptError(f"{path} has {len(data)} of its {facts['bytes']} bytes")
            if _facts(data) != facts:
                raise CorruptError(f"{path} does not hold what was written (CRC32C)")
            yield name, data


def copy(checkpoint: Checkpoint, run: Place) -> None:
    """Copy a checkpoint into another run, where it is complete after its last file.

    Raises:
        CorruptError: It does not hold what was written.
    """
    folder = run / FOLDER / checkpoint.place.name
    for name, data in contents(checkpoint):
        publish(folder / name, data)
    for rank in range(checkpoint.state["parts"]):
        part = read_file(checkpoint.place / _part(rank))
        if part is None:
            raise CorruptError(f"{checkpoint.place / _part(rank)} is missing")
        publish(folder / _part(rank), part)


def surplus(found: list[Checkpoint], *, keep: int) -> list[Checkpoint]:
    """Complete checkpoints that need not stay: not of the last `keep`, and not the best.

    Args:
        found: All of a run, newest first.
        keep: How many of the last stay.
    """
    judged = [c for c in found if math.isfinite(_val_loss(c))]
    best = min(judged, key=_val_loss, default=None)
    return [c for c in found[keep:] if c is not best]


def unfinished(run: Place, *, before: int) -> list[Place]:
    """Folders of earlier sittings that are no complete checkpoints."""
    whole = {checkpoint.place.name for checkpoint in complete(run)}
    names = [name for name in _folders(run) if name not in whole and _order(name)[1] < before]
    return [run / FOLDER / name for name in names]


def remove(place: Place) -> None:
    """Remove a checkpoint; from the first moment on it is not complete."""
    remove_folder(place, first=STATE)


def _folders(run: Place) -> list[str]:
    return [name for name in names_in(run / FOLDER) if _NAME.fullmatch(name)]


def _order(name: str) -> tuple[int, int]:
    """Step and sitting."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2])


def _read_state(raw: bytes, name: str) -> dict[str, Any]:
    """What a state.json says; of one that is damaged, what the name of its folder does."""
    with suppress(ValueError, TypeError, KeyError):
        state = json.loads(raw)
        return state | {"step": int(state["step"]), "parts": int(state["parts"])}
    return {"step": _order(name)[0], "parts": 1}


def _read_part(place: Place) -> dict[str, dict[str, Any]]:
    """The files that a rank lists, by name."""
    raw = read_file(place)
    if raw is None:
        raise CorruptError(f"{place} is missing")
    try:
        files = json.loads(raw)["files"]
        return {name: {"bytes": f["bytes"], "crc32c": f["crc32c"]} for name, f in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CorruptError(f"{place} does not hold what was written") from None


def _val_loss(checkpoint: Checkpoint) -> float:
    """Held-out loss; not a number where none was measured."""
    found = checkpoint.state.get("val_loss")
    return math.nan if found is None else float(found)


def _part(rank: int) -> str:
    return f"part-{rank}.json"


def _facts(data: bytes) -> dict[str, Any]:
    # A tenth of what SHA-256 takes, beside training, on the same cores.
    return {"bytes": len(data), "crc32c": google_crc32c.value(data)}
