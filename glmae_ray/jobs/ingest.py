"""`glmae ingest`: files, folders and nnU-Net data sets into a store; again to continue."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmae_ray.config import IngestConfig, UserError
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.store.intake import Pending, Taken, take_in
from glmae_ray.store.ledger import Ledger
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import discover
from glmae_ray.store.zarr_store import VolumeStore

_SAVE_S = 30.0  # between two writes of the tables: what a kill costs is reading cases' own rows
_TELL_S = 5.0  # between two lines where there is no terminal
_NAMED = 20  # quarantined sources that are printed one by one

Outcome = tuple[Pending, Taken | ReadError]


@dataclass(frozen=True)
class IngestResult:
    """Outcomes of the source's items.

    Attributes:
        ingested: Became a case in this run.
        already_stored: Had their case before.
        quarantined: Cannot become one.
        cases: Cases in the store, from whatever source.
    """

    ingested: int
    already_stored: int
    quarantined: int
    cases: int


def run(cfg: IngestConfig) -> None:
    """Ingest, and end with the line that people and scripts read.

    Raises:
        UserError: Nothing at all could be ingested.
    """
    result = ingest(cfg)
    print(
        f"ingested {result.ingested}, already stored {result.already_stored}, "
        f"quarantined {result.quarantined}"
    )
    if result.cases == 0:
        reasons = Path(cfg.store) / "quarantine.parquet"
        raise UserError(f"source: {cfg.source} gave no case; {reasons} says why")


def ingest(cfg: IngestConfig) -> IngestResult:
    """Take in every item of the source that the store does not have.

    Raises:
        UserError: The source holds no image, or the store cannot be used; nothing is written.
    """
    sources = discover(cfg.source)
    is_new = not VolumeStore.exists(cfg.store)
    store = _planned(cfg) if is_new else _opened(cfg)
    if sources.ignored:
        print(f"{sources.ignored} other files under {cfg.source} are left alone")
    # "ct" and "CT" are one modality, whose window is in HU.
    words = ((cfg.modality or item.modality or "CT").upper() for item in sources.items)
    items = [replace(item, modality=word) for item, word in zip(sources.items, words, strict=True)]
    ledger = Ledger(store, items, splits=cfg.splits)
    if ledger.pending:
        with ray_session(cfg.ray):
            if is_new:
                VolumeStore.create(cfg.store, chunk=cfg.chunk, levels=cfg.levels)
            _take_all(ledger, store)
    else:
        ledger.save()
    _tell_quarantined(ledger)
    rejected = len(ledger.quarantined)
    return IngestResult(ledger.ingested, ledger.already_stored, rejected, cases=len(ledger))


def _planned(cfg: IngestConfig) -> VolumeStore:
    """The store as it will be; nothing is written before the source and Ray have answered."""
    return VolumeStore(cfg.store, chunk=cfg.chunk, levels=cfg.levels, threads=1)


def _opened(cfg: IngestConfig) -> VolumeStore:
    # One thread a task: Ray already runs a task per core.
    store = VolumeStore.open(cfg.store, threads=1)
    for name, kept in (("chunk", store.chunk), ("levels", store.levels)):
        if getattr(cfg, name) != kept:
            print(f"{name}: {getattr(cfg, name)} has no effect, {cfg.store} was made with {kept}")
    return store


def _take_all(ledger: Ledger, store: VolumeStore) -> None:
    ledger.save()  # before the first case changes: no row may speak of voxels that are gone
    saved = time.monotonic()
    try:
        for pending, outcome in _with_progress(_outcomes(ledger.pending, store), ledger):
            ledger.add(pending, outcome)
            if time.monotonic() - saved > _SAVE_S:
                ledger.save()
                saved = time.monotonic()
    finally:
        ledger.save()


def _outcomes(todo: Sequence[Pending], store: VolumeStore) -> Iterator[Outcome]:
    """Every item with what became of it, as they finish: a Ray task each, few at once."""
    import ray  # after ray_session has set what Ray reads when it is imported

    task = ray.remote(num_cpus=1)(_take_in)
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    queue = iter(todo)
    flying: dict[Any, Pending] = {}
    while True:
        for pending in islice(queue, at_once - len(flying)):
            flying[task.remote(pending, store)] = pending
        if not flying:
            return
        (done,), _ = ray.wait(list(flying), num_returns=1)
        pending = flying.pop(done)
        try:
            yield pending, ray.get(done)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            # Ray has tried it several times.
            message = f"{pending.item.source}: its reader died ({error}); too large for the memory?"
            yield pending, ReadError("unreadable", " ".join(message.split()))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _take_in(pending: Pending, store: VolumeStore) -> Taken | ReadError:
    try:
        return take_in(pending, store=store)
    except ReadError as error:
        return error


def _with_progress(outcomes: Iterable[Outcome], ledger: Ledger) -> Iterator[Outcome]:
    total = len(ledger.pending)
    if sys.stderr.isatty():
        yield from tqdm(outcomes, total=total, unit="case", desc="ingest")
        return
    start = told = time.monotonic()
    for number, outcome in enumerate(outcomes, start=1):
        yield outcome
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            print(f"ingest: {number} of {total}, {told - start:.0f} s", flush=True)


def _tell_quarantined(ledger: Ledger) -> None:
    rows = ledger.quarantined
    for row in rows[:_NAMED]:
        print(f"quarantined ({row['reason']}): {row['message']}")
    if len(rows) > _NAMED:
        print(f"quarantined: {len(rows) - _NAMED} more, in quarantine.parquet")
