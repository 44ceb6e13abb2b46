"""Resume: load the newest checkpoint that is whole, on any number of workers."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import ray

from glmae_ray import checkpoint
from glmae_ray.checkpoint import Checkpoint, CorruptError
from glmae_ray.engine import Engine
from glmae_ray.errors import CommonError
from glmae_ray.jobs.random_state import restore_random_state
from glmae_ray.paths import Place, publish
from glmae_ray.ranks import Ranks
from glmae_ray.universal import read_rest, to_universal
from glmae_ray.watch import Event, Tell


def resume(
    engine: Engine,
    run: Place,
    *,
    ranks: Ranks,
    tell: Tell,
    wanted: Callable[[Checkpoint], bool] = lambda _: True,
) -> Checkpoint | None:
    """Load the newest complete checkpoint that holds what was written. Collective.

    One that does not is told and removed, and the one before is tried.

    Args:
        engine: Takes the state.
        run: The run folder.
        ranks: This worker among the others.
        tell: Takes what a person should read.
        wanted: Which checkpoints to look at.

    Returns:
        What was loaded; None where the run has no checkpoint that is wanted.

    Raises:
        CommonError: The run has checkpoints, and none is whole.
    """
    known = [c for c in checkpoint.complete(run) if wanted(c)] if ranks.rank == 0 else []
    known = ranks.told(known)
    for found in known:
        folder = _folder(found)
        faults = [fault for fault in ranks.each(_fetch(found, folder, ranks)) if fault]
        if not faults:
            _load(engine, folder, found, ranks)
            restore_random_state(folder, ranks=ranks, saved_ranks=found.state["parts"])
        ranks.each(None)  # nobody removes what another still reads
        if folder != found.place and ranks.local_rank == 0:
            shutil.rmtree(folder)
        if not faults:
            return found
        if ranks.rank == 0:
            line = f"{found.place}: is damaged and is not used: {faults[0]}"
            tell(Event("checkpoint_corrupt", line, {"step": found.step, "reason": faults[0]}))
            checkpoint.remove(found.place)
    if known:
        raise CommonError(
            f"{run / checkpoint.FOLDER}: no checkpoint is whole; name another run, or remove this "
            "folder to start again from step 0"
        )
    return None


def _load(engine: Engine, folder: Path, found: Checkpoint, ranks: Ranks) -> None:
    """Load what as many ranks wrote as there are, or what any number can take. Collective."""
    saved = int(found.state["parts"])
    if engine.zero_stage and saved != ranks.size:
        if _is_first(found, folder, ranks):
            try:
                read_rest(folder)  # made at an earlier start, where all share the folder
            except FileNotFoundError:
                to_universal(folder, folder)
        ranks.each(None)
    engine.load(folder, saved_workers=saved)


def _folder(found: Checkpoint) -> Path:
    """Where a checkpoint can be read from on this node."""
    if isinstance(found.place, Path):
        return found.place
    # A machine may have several of Ray's nodes.
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    name = hashlib.sha256(f"{found.place} {node}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"glmae-checkpoint-{name}"


def _fetch(found: Checkpoint, folder: Path, ranks: Ranks) -> str | None:
    """See that a checkpoint holds what was written, and bring it to this node; what is wrong.

    One rank of each node fetches from an object store; rank 0 reads a folder that all share.
    """
    if not _is_first(found, folder, ranks):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in checkpoint.contents(found):
            if folder != found.place:
                publish(folder / name, data)
    except CorruptError as error:
        return str(error)
    return None


def _is_first(found: Checkpoint, folder: Path, ranks: Ranks) -> bool:
    """Whether this rank does what one has to do, on its node or where all share the folder."""
    return (ranks.rank if folder == found.place else ranks.local_rank) == 0
