"""Whether every node reads the store of a run, and reads and writes where its folder is to be.

A run sees to the first itself, for folders, once its own has its first files (shared_folders.py).
Here nothing is there yet, and nothing stays: each node reads a file that this process has written,
and writes one of its own, with the rights and the credentials that it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import ray

from glmae_ray import s3
from glmae_ray.config import DoctorConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import Node
from glmae_ray.jobs.asking import Answer, ask
from glmae_ray.jobs.doctor_nodes import at, counted
from glmae_ray.jobs.findings import Finding
from glmae_ray.jobs.shared_folders import FILES, content, not_shared
from glmae_ray.paths import Place, publish, read_file, to_place

_NAME = ".glmae-doctor-"


def check_storage(
    cfg: DoctorConfig, nodes: Sequence[Node], *, timeout_s: float
) -> Iterator[Finding]:
    """See what nodes can do with the store and the run folder, as far as they are named.

    Args:
        cfg: The run, with whole paths.
        nodes: Those that could work.
        timeout_s: How long they have for each.
    """
    try:
        if cfg.store and (here := _seen(file := to_place(cfg.store) / FILES["store"])):
            answers = _answers(nodes, _read, str(file), timeout_s=timeout_s)
            yield from judge_place("store", file.parent, answers, here=here, done="read")
        if cfg.run:
            yield from _check_run(to_place(cfg.run), nodes, timeout_s)
    except UserError as error:
        yield from (Finding("reason", line) for line in error.lines)


def judge_place(
    name: str, place: Place, answers: Mapping[str, Answer], *, here: str, done: str
) -> Iterator[Finding]:
    """What nodes saw of a place, and what they could not do there.

    Args:
        name: Field of the config.
        place: That it names.
        answers: Address of a node -> what it saw, and what kept it from looking.
        here: What this process sees.
        done: What they tried, as a participle.
    """
    blind, troubled = [], dict[str, list[str]]()
    for address, answer in answers.items():
        seen, trouble = answer.value or ("", answer.trouble)
        if trouble:
            troubled.setdefault(trouble, []).append(address)
        elif seen != here:
            blind.append(address)
    if blind and isinstance(place, Path):
        yield Finding("reason", not_shared(name, place, blind))
    elif blind:
        line = f"{name}: {place} is not from {at(blind)} what it is from here; "
        yield Finding("reason", f"{line}give all nodes the same AWS_ENDPOINT_URL")
    for trouble, addresses in troubled.items():
        line = f"{name}: {place} cannot be {done} from {at(addresses)}: {trouble}"
        yield Finding("reason", line)
    if not (blind or troubled):
        yield Finding(
            "fact", f"{name}: {place} can be {done} from {counted(answers)}, as from here"
        )


def _check_run(run: Place, nodes: Sequence[Node], timeout_s: float) -> Iterator[Finding]:
    folder = run
    if isinstance(run, Path):  # what is not there yet will be made in what is
        folder = next(place for place in (run, *run.parents) if place.is_dir())
    mark = folder / f"{_NAME}{uuid4().hex}"
    try:
        publish(mark, mark.name)
    except OSError as error:
        yield Finding("reason", f"run: {run} cannot be written from here: {_reason(error)}")
        return
    try:
        here = _seen(mark)
        answers = _answers(nodes, _read_and_write, str(mark), here, timeout_s=timeout_s)
    finally:
        _remove(mark)
    yield from judge_place("run", run, answers, here=here, done="read and written")


def _answers(
    nodes: Sequence[Node], task: Callable[..., tuple[str, str]], *args: str, timeout_s: float
) -> dict[str, Answer]:
    answers = ask(nodes, ray.remote(task), *args, timeout_s=timeout_s)
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    return dict(zip(addresses, answers, strict=True))


def _read(file: str) -> tuple[str, str]:
    """What a node sees of a file, and what kept it from looking."""
    try:
        return _seen(to_place(file)), ""
    except (UserError, OSError) as error:
        return "", _reason(error)


def _read_and_write(file: str, here: str) -> tuple[str, str]:
    """The same, and where it sees what `here` says also what keeps it from writing there."""
    seen, trouble = _read(file)
    if trouble or seen != here:
        return seen, trouble
    own = to_place(f"{file}-{uuid4().hex}")
    try:
        publish(own, own.name)
        _remove(own)
    except (UserError, OSError) as error:
        return seen, _reason(error)
    return seen, ""


def _seen(file: Place) -> str:
    """What tells whether a file is the same; empty for one that is not there."""
    if isinstance(file, Path):
        return content(file)
    data = read_file(file)
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _remove(file: Place) -> None:
    if isinstance(file, Path):
        file.unlink()
    else:
        s3.delete_objects(file, [file.path])


def _reason(error: Exception) -> str:
    """What went wrong, without the name of a file that nobody knows."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, PermissionError):
        return f"{reason}; let the user who runs this there, or name another place"
    return reason
