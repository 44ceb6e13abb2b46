"""`glmae ingest`: files, folders and nnU-Net data sets into a store; again to continue."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

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
    store = _existing_store(cfg)
    words = (cfg.modality or item.modality or "CT" for item in sources.items)
    items = [replace(item, modality=word) for item, word in zip(sources.items, words, strict=True)]
    if sources.ignored:
        print(f"{sources.ignored} files under {cfg.source} are no images")
    ...
