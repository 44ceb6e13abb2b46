"""Reading the cases of samples: with patience, named where it fails, others standing in."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import CacheLimits
from glmae_ray.errors import DamagedError
from glmae_ray.passes import Passes
from glmae_ray.store.zarr_store import VolumeStore

Columns = dict[str, NDArray[Any]]

_STAND_INS = 16  # as many cases in a row that cannot be read are a broken store
_PAUSES_S = (0.5, 2.0)  # before a disk is asked again; tensorstore has its own for S3
_FAULT_BYTES = 320  # room for what was wrong with a case, in a column of fixed width


class UnreadableCaseError(OSError):
    """A case whose samples cannot be made."""


class CaseReader:
    """A store of which one case is read: times it, and says which case it is that fails.

    Attributes:
        read_s: Seconds that reading has taken.
    """

    def __init__(self, case_id: str, *, store: str, cache: CacheLimits | None = None) -> None:
        """Name the case; the store is opened, once in a process, by the first read.

        Args:
            case_id: The case.
            store: The store.
            cache: Where chunks from an object store are kept on this machine.
        """
        self.read_s = 0.0
        self._case_id, self._store, self._cache = case_id, store, cache

    def read_blocks(self, requests: Any) -> Any:
        """See `VolumeStore`; an `UnreadableCaseError` for whatever is wrong with the case."""
        return self._read(lambda store: store.read_blocks(requests))

    def read_labels(self, requests: Any) -> Any:
        """See `VolumeStore`; an `UnreadableCaseError` for whatever is wrong with the case."""
        return self._read(lambda store: store.read_labels(requests))

    def read_label_blocks(self, requests: Any) -> Any:
        """See `VolumeStore`; an `UnreadableCaseError` for whatever is wrong with the case."""
        return self._read(lambda store: store.read_label_blocks(requests))

    def _read(self, read: Callable[[VolumeStore], Any]) -> Any:
        began = time.perf_counter()
        try:
            return _patiently(lambda: read(_open_store(self._store, self._cache)))
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableCaseError(f"case {self._case_id}: {reason}") from error
        finally:
            self.read_s += time.perf_counter() - began


def room(numbers: NDArray[np.int64]) -> Columns:
    """The columns that all samples have, to be filled.

    Returns:
        `number` int64 (B,); `case` int64 (B,), row of the case; `fault` uint8 (B, 320), zero but
        where a case stands in for another: then UTF-8 text; `made_s` float64 (B, 3): seconds of
        reading and resizing, and when it was done, in seconds since 1970.
    """
    return {
        "number": numbers,
        "case": np.empty(len(numbers), np.int64),
        "fault": np.zeros((len(numbers), _FAULT_BYTES), np.uint8),
        "made_s": np.empty((len(numbers), 3)),
    }


def fill(
    columns: Columns,
    make: Callable[[int, int], None],
    *,
    passes: Passes,
    stand_in: bool,
    threads: int,
) -> None:
    """Make every sample, each of its own case or of one that stands in.

    Args:
        columns: With those of `room`.
        make: Makes the sample at a place of the columns of the case in a row of the index.
        passes: Which case a sample shows, and which ones stand in.
        stand_in: Whether any does.
        threads: How many samples are made at a time.

    Raises:
        UnreadableCaseError: A case cannot be read, and none is to stand in.
        UserError: The object store refuses.
    """

    def one(place: int) -> None:
        number = int(columns["number"][place])
        attempt = functools.partial(make, place)
        case, fault = _by_some_case(attempt, number, passes=passes, stand_in=stand_in)
        columns["case"][place] = case
        text = np.frombuffer(fault.encode()[:_FAULT_BYTES], np.uint8)
        columns["fault"][place, : len(text)] = text

    places = range(len(columns["number"]))
    if threads == 1 or len(places) == 1:
        for place in places:
            one(place)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, places):
            pass


def fault_texts(faults: NDArray[np.uint8]) -> Iterable[str]:
    """What the column `fault` (B, 320) says of each sample; empty where nothing was wrong."""
    return (bytes(row).rstrip(b"\0").decode(errors="replace") for row in faults)


def _by_some_case(
    make: Callable[[int], None], number: int, *, passes: Passes, stand_in: bool
) -> tuple[int, str]:
    """Row of the case that a sample was made of, and what was wrong with the planned one."""
    own = case = passes.case(number)
    fault = ""
    for attempt in range(1, _STAND_INS + 1):
        try:
            make(case)
        except UnreadableCaseError as error:
            if not stand_in:
                hint = "pipeline.on_error=skip lets other cases stand in"
                raise UnreadableCaseError(f"{error}; {hint}") from None
            fault = fault or str(error)
            case = passes.substitute(number, attempt)
            if case == own:  # there is no other
                break
        else:
            return case, fault
    raise UnreadableCaseError(f"{fault}; nor can the {attempt - 1} that stood in")


def _patiently(read: Callable[[], Any]) -> Any:
    """Try again what a disk or network may do better next time."""
    for pause_s in _PAUSES_S:
        try:
            return read()
        except (DamagedError, FileNotFoundError):
            raise
        except OSError:
            time.sleep(pause_s)
    return read()


@functools.lru_cache(maxsize=4)
def _open_store(path: str, cache: CacheLimits | None) -> VolumeStore:
    # Ray Data unpickles the maker for every task; the store's open arrays should outlive one.
    return VolumeStore.open(path, cache=cache)
