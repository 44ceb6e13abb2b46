"""Reading the cases of samples: with patience, named where it fails, others standing in."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_data import CacheLimits
from glmae_ray.errors import DamagedError
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore

Columns = dict[str, NDArray[Any]]

_STAND_INS = 16  # as many cases in a row that cannot be read are a broken store
_PAUSES_S = (0.5, 2.0)  # before a disk is asked again; tensorstore has its own for S3
_FAULT_BYTES = 320  # room for what was wrong with a case, in a column of fixed width

# Of the columns, what is for people and checks, not for the device.
FOR_THE_HOST = ("number", "case", "fault", "made_s")


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


@dataclass(frozen=True)
class Maker(ABC):
    """Makes samples out of their numbers, views or crops; plain data that travels with every task.

    Attributes:
        store: The store; each process opens it once.
        index: The cases, in the order in which the plan counts them.
        plan: Sample number -> case, boxes, seeds.
        stand_in: Whether another case stands in for one that cannot be read.
        threads: How many samples are made at a time in one call.
        cache: Where chunks from an object store are kept on this machine.
    """

    store: str
    index: VolumeIndex
    plan: Any  # of `sampling` or `crop_plan`: has `passes`
    stand_in: bool = field(default=False, kw_only=True)
    threads: int = field(default=1, kw_only=True)
    cache: CacheLimits | None = field(default=None, kw_only=True)

    def case(self, number: int) -> int:
        """Row of the case that the plan has for a sample."""
        return self.plan.passes.case(number)

    def make(self, rows: Mapping[str, NDArray[Any]]) -> Columns:
        """Make the samples whose numbers are in `rows["number"]`.

        Returns:
            `number` int64 (B,); `case` int64 (B,), row of the case; `fault` uint8 (B, 320), zero
            but where a case stands in for another: then UTF-8 text; `made_s` float64 (B, 3):
            seconds of reading and resizing, and when it was done, in seconds since 1970; and those
            that the kind of maker says.

        Raises:
            UnreadableCaseError: A case cannot be read, and none is to stand in.
            UserError: The object store refuses.
        """
        numbers = np.asarray(rows["number"], dtype=np.int64)
        columns: Columns = {
            "number": numbers,
            "case": np.empty(len(numbers), np.int64),
            "fault": np.zeros((len(numbers), _FAULT_BYTES), np.uint8),
            "made_s": np.empty((len(numbers), 3)),
            **self._room(len(numbers)),
        }
        fill = functools.partial(self._fill, columns)
        if self.threads == 1 or len(numbers) == 1:
            for place in range(len(numbers)):
                fill(place)
            return columns
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(fill, range(len(numbers))):
                pass
        return columns

    @abstractmethod
    def _room(self, count: int) -> Columns:
        """The columns of so many samples beside those that all makers have, to be filled."""

    @abstractmethod
    def _make(self, columns: Columns, place: int, case: int) -> None:
        """Make the sample at a place of the columns of the case in a row of the index."""

    def _fill(self, columns: Columns, place: int) -> None:
        """Make a sample of its own case, or of one that stands in."""
        number = int(columns["number"][place])
        own = case = self.plan.passes.case(number)
        fault = ""
        for attempt in range(1, _STAND_INS + 1):
            try:
                self._make(columns, place, case)
            except UnreadableCaseError as error:
                if not self.stand_in:
                    hint = "pipeline.on_error=skip lets other cases stand in"
                    raise UnreadableCaseError(f"{error}; {hint}") from None
                fault = fault or str(error)
                case = self.plan.passes.substitute(number, attempt)
                if case == own:  # there is no other
                    break
            else:
                columns["case"][place] = case
                text = np.frombuffer(fault.encode()[:_FAULT_BYTES], np.uint8)
                columns["fault"][place, : len(text)] = text
                return
        raise UnreadableCaseError(f"{fault}; nor can the {attempt - 1} that stood in")


def fault_texts(faults: NDArray[np.uint8]) -> Iterable[str]:
    """What the column `fault` (B, 320) says of each sample; empty where nothing was wrong."""
    return (bytes(row).rstrip(b"\0").decode(errors="replace") for row in faults)


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
