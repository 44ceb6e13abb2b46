"""Whether all nodes see the folders of a run: a path may name another folder on each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import ray

from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import Node
from glmae_ray.jobs.asking import ask
from glmae_ray.paths import Place

FILES = {"store": "index.parquet", "run": "config.json"}  # that are in a folder from the start
_HEAD_BYTES = 1 << 20  # of a file, which with its length tell it from another


def check_shared(folders: dict[str, Place], nodes: Sequence[Node]) -> None:
    """See that every node that could work reads the same files as this process.

    Args:
        folders: Field of the config -> the folder that it names; those in buckets pass.
        nodes: Those of the cluster that are alive, as `ray.nodes()` has them.

    Raises:
        UserError: A line for each folder that some node does not see.
    """
    local = {name: place for name, place in folders.items() if isinstance(place, Path)}
    if not local or len(nodes) == 1:
        return
    files = [place / FILES[name] for name, place in local.items()]
    asked = [node for node in nodes if node["Resources"].get("CPU")]
    # Those that answer nothing have just gone.
    there = {
        node["NodeManagerAddress"]: answer.value
        for node, answer in zip(asked, ask(asked, ray.remote(_contents), files), strict=True)
        if not answer.trouble
    }
    lines = []
    for number, ((name, place), here) in enumerate(
        zip(local.items(), _contents(files), strict=True)
    ):
        if blind := [address for address, seen in there.items() if seen[number] != here]:
            lines.append(not_shared(name, place, blind))
    if lines:
        raise UserError(*lines)


def not_shared(name: str, place: Place, blind: Sequence[str]) -> str:
    """The line about a folder that is another one on some nodes."""
    return (
        f"{name}: {place} is not the same folder on {', '.join(sorted(blind))} as here; "
        "give one on a disk that all nodes share, or s3://BUCKET/FOLDER"
    )


def _contents(files: Sequence[Path]) -> list[str]:
    """What tells whether files are the same; empty for one that is not there."""
    return [content(file) for file in files]


def content(file: Path) -> str:
    """What tells whether a file is the same; empty for one that is not there."""
    try:
        with file.open("rb") as opened:  # opened: NFS may remember of what is only looked at
            start = hashlib.sha256(opened.read(_HEAD_BYTES)).hexdigest()
            return f"{start} {opened.seek(0, 2)}"
    except OSError:
        return ""
