"""`glmae ingest`: files, folders, data sets and manifests into a store; again to continue."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial

from glmae_ray.config_store import IngestConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.ingest_tasks import outcomes, read_headers
from glmae_ray.jobs.progress import with_progress
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.subject_salt import salt_name, subject_salt
from glmae_ray.store.accounts import known_headers
from glmae_ray.store.index import read_files
from glmae_ray.store.intake import Choices
from glmae_ray.store.ledger import Ledger
from glmae_ray.store.scan import Limits
from glmae_ray.store.sources import Sources, discover
from glmae_ray.store.zarr_store import VolumeStore

_SAVE_S = 30.0  # between two writes of the tables: what a kill costs is reading cases' own rows
_SAVE_SHARE = 0.05  # of the time, at most, goes into writing them
_NAMED = 20  # quarantined sources that are printed one by one


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
        reasons = f"{cfg.store.rstrip('/')}/quarantine.parquet"
        raise UserError(f"source: {cfg.source} gave no case; {reasons} says why")


def ingest(cfg: IngestConfig) -> IngestResult:
    """Take in every item of the source that the store does not have.

    Raises:
        UserError: The source holds no image, or the store cannot be used; nothing is written.
    """
    salt = subject_salt()
    secret = salt_name(salt)
    is_new = not VolumeStore.exists(cfg.store)
    store = _planned(cfg) if is_new else _opened(cfg)
    known = {} if is_new else known_headers(read_files(store.path), secret=secret)
    with ExitStack() as stack:
        # Ray starts when there is work for it: seconds that a second look should not cost.
        start_ray = cache(lambda: stack.enter_context(ray_session(cfg.ray)))
        look = partial(read_headers, salt=salt, start_ray=start_ray)
        by_folder = cfg.subjects == "folder"
        sources = discover(cfg.source, read_headers=look, known=known, by_folder=by_folder)
        if cfg.modality is not None:
            items = [replace(item, modality=cfg.modality) for item in sources.items]
            sources = replace(sources, items=items)
        ledger = Ledger(store, sources, splits=cfg.splits, choices=_choices(cfg))
        if ledger.pending:
            start_ray()
        if is_new:
            _create(cfg)
        ledger.save_files(secret=secret)
        _take_all(ledger, store, _choices(cfg))
        ledger.save_files(secret=secret)
    _tell(ledger, cfg, sources)
    rejected = len(ledger.quarantined)
    return IngestResult(ledger.ingested, ledger.already_stored, rejected, cases=len(ledger))


def _choices(cfg: IngestConfig) -> Choices:
    limits = Limits(**cfg.limits.model_dump())
    return Choices(
        limits, cfg.volume, cfg.non_finite == "fill", cfg.spacing_mm, crop=cfg.crop is not None
    )


def _planned(cfg: IngestConfig) -> VolumeStore:
    """The store as it will be; nothing is written before the source and Ray have answered."""
    return VolumeStore(cfg.store, chunk=cfg.chunk, levels=cfg.levels, codec=cfg.codec)


def _create(cfg: IngestConfig) -> None:
    try:
        VolumeStore.create(cfg.store, chunk=cfg.chunk, levels=cfg.levels, codec=cfg.codec)
    except OSError as error:
        raise UserError(f"store: {cfg.store} cannot be made ({error.strerror or error})") from None


def _opened(cfg: IngestConfig) -> VolumeStore:
    store = VolumeStore.open(cfg.store)
    for name in ("chunk", "levels", "codec"):
        kept = getattr(store, name)
        if getattr(cfg, name) != kept:
            print(f"{name}: {getattr(cfg, name)} has no effect, {cfg.store} was made with {kept}")
    return store


def _take_all(ledger: Ledger, store: VolumeStore, choices: Choices) -> None:
    ledger.save()  # before the first case changes: no row may speak of voxels that are gone
    if not ledger.pending:
        return
    saved, pause_s = time.monotonic(), _SAVE_S
    try:
        taken = outcomes(ledger.pending, store=store, choices=choices)
        for pending, outcome in with_progress(taken, len(ledger.pending), what="ingest"):
            ledger.add(pending, outcome)
            if (begin := time.monotonic()) - saved > pause_s:
                ledger.save()
                saved = time.monotonic()
                pause_s = max(_SAVE_S, (saved - begin) / _SAVE_SHARE)
    finally:
        ledger.save()


def _tell(ledger: Ledger, cfg: IngestConfig, sources: Sources) -> None:
    if sources.others:
        print(f"{len(sources.others)} files of {cfg.source} are no images; files.parquet has them")
    if sources.ambiguous:
        names = ", ".join(sources.ambiguous[:3])
        print(f"one subject each, from several folders: {names}; subjects=folder tells them apart")
    rows = ledger.quarantined
    for row in rows[:_NAMED]:
        print(f"quarantined ({row['reason']}): {row['message']}")
    if len(rows) > _NAMED:
        print(f"quarantined: {len(rows) - _NAMED} more, in quarantine.parquet")
