"""Samples: numbers of a plan become views, seeds and windows, whatever process makes them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config import PretrainConfig
from glmae_ray.config_data import CacheLimits, ViewsConfig
from glmae_ray.errors import DamagedError
from glmae_ray.sampling import Plan
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from glmae_ray.store.statistics import tissue_above
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.views import Cut, Source, make_views

Columns = dict[str, NDArray[Any]]

# Of the index, beside what the selection asks for.
_COLUMNS = {
    "case_id", "shape", "factors", "box_start", "box_stop", "modality", "channels", "dtype",
    "minimum", "maximum", "p0_5", "p99_5",
}  # fmt: skip
# Of the columns, what is for people and checks, not for the device.
FOR_THE_HOST = ("number", "case", "fault", "made_s")
_REDRAWS = 8  # a view that is still air then stays: its case is nearly empty
_STAND_INS = 16  # as many cases in a row that cannot be read are a broken store
_PAUSES_S = (0.5, 2.0)  # before a disk is asked again; tensorstore has its own for S3
_FAULT_BYTES = 320  # room for what was wrong with a case, in a column of fixed width


class UnreadableCaseError(OSError):
    """A case whose views cannot be made."""


class Maker(Protocol):
    """What makes samples out of their numbers: views, crops; plain data."""

    @property
    def index(self) -> VolumeIndex:
        """The cases, in the order in which the plan counts them."""
        ...

    def case(self, number: int) -> int:
        """Row of the case that the plan has for a sample."""
        ...

    def make(self, rows: Mapping[str, NDArray[Any]]) -> Columns:
        """Make the samples whose numbers are in `rows["number"]`.

        Returns:
            Columns with one row a sample; among them those of `FOR_THE_HOST`.
        """
        ...


@dataclass(frozen=True)
class SampleMaker:
    """Makes the columns of any sample; plain data that travels with every task.

    Attributes:
        store: The store; each process opens it once.
        index: The cases, in the order in which the plan counts them.
        plan: Sample number -> case, boxes, seeds.
        views: Counts and sizes.
        kinds: The kinds of view that the loss uses.
        stand_in: Whether another case stands in for one that cannot be read.
        threads: How many samples are made at a time in one call.
        cache: Where chunks from an object store are kept on this machine.
    """

    store: str
    index: VolumeIndex
    plan: Plan
    views: ViewsConfig
    kinds: tuple[str, ...]
    stand_in: bool = False
    threads: int = 1
    cache: CacheLimits | None = None

    def make(self, rows: Mapping[str, NDArray[Any]]) -> Columns:
        """Make the samples whose numbers are in `rows["number"]`.

        Returns:
            `number` int64 (B,); a kind's views int16 (B, V, C, Z, Y, X) and its mask seeds int64
            (B, V); `window` float32 (B, C, 2), the values that become 0 and 1; `case` int64 (B,),
            row of the case; `fault` uint8 (B, 320), zero but where a case stands in for another:
            then UTF-8 text; `made_s` float64 (B, 3): seconds of reading and resizing, and when it
            was done, in seconds since 1970.

        Raises:
            UnreadableCaseError: A case cannot be read, and none is to stand in.
            UserError: The object store refuses.
        """
        numbers = np.asarray(rows["number"], dtype=np.int64)
        columns = self._room(numbers)
        if self.threads == 1 or len(numbers) == 1:
            for place in range(len(numbers)):
                self._fill(columns, place)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                for _ in pool.map(lambda place: self._fill(columns, place), range(len(numbers))):
                    pass
        return columns

    def case(self, number: int) -> int:
        """Row of the case that the plan has for a sample."""
        return self.plan.case(number)

    def source(self, case: int) -> Source:
        """The facts about the case of a row."""
        return _source(self.index.at(case), self.views.window)

    def _room(self, numbers: NDArray[np.int64]) -> Columns:
        """Columns to be filled."""
        count, channels = len(numbers), int(self.index.at(0)["channels"])
        columns: Columns = {
            "number": numbers,
            "case": np.empty(count, np.int64),
            "fault": np.zeros((count, _FAULT_BYTES), np.uint8),
            "made_s": np.empty((count, 3)),
            "window": np.empty((count, channels, 2), np.float32),
        }
        for kind in self.kinds:
            views, size = getattr(self.views, f"{kind}_count"), getattr(self.views, f"{kind}_size")
            columns[kind] = np.empty((count, views, channels, *size), np.int16)
            columns[f"{kind}_seeds"] = np.empty((count, views), np.int64)
        return columns

    def _fill(self, columns: Columns, place: int) -> None:
        """Make one sample, of a case that stands in if need be."""
        number = int(columns["number"][place])
        case, fault = self.plan.case(number), ""
        for attempt in range(1, _STAND_INS + 1):
            try:
                self._make(columns, place, case)
            except UnreadableCaseError as error:
                if not self.stand_in:
                    hint = "pipeline.on_error=skip lets other cases stand in"
                    raise UnreadableCaseError(f"{error}; {hint}") from None
                fault = fault or str(error)
                case = self.plan.substitute(number, attempt)
                if case == self.plan.case(number):  # there is no other
                    break
            else:
                columns["case"][place] = case
                text = np.frombuffer(fault.encode()[:_FAULT_BYTES], np.uint8)
                columns["fault"][place, : len(text)] = text
                return
        raise UnreadableCaseError(f"{fault}; nor can the {attempt - 1} that stood in")

    def _make(self, columns: Columns, place: int, case: int) -> None:
        number, source = int(columns["number"][place]), self.source(case)
        cuts: list[Cut] = []
        for kind in self.kinds:
            draw = self.plan.draw(number, kind, case=case)
            columns[f"{kind}_seeds"][place] = draw.mask_seeds
            cuts += map(Cut, draw.boxes, columns[kind][place])
        reader = _Watched(lambda: _open_store(self.store, self.cache), source.case_id)
        began = time.perf_counter()
        make_views(reader, source, cuts, level_share=self.views.level_share)
        self._redraw(reader, source, columns, place, case)
        whole_s = time.perf_counter() - began
        columns["window"][place] = source.coded_window
        columns["made_s"][place] = reader.read_s, whole_s - reader.read_s, time.time()

    def _redraw(
        self, reader: _Watched, source: Source, columns: Columns, place: int, case: int
    ) -> None:
        """Make the views that came out as air again, from the plan's next boxes for them."""
        number = int(columns["number"][place])
        for kind in self.kinds:
            views = columns[kind][place]
            air = [view for view in range(len(views)) if source.is_air(views[view])]
            for attempt in range(1, _REDRAWS + 1):
                if not air:
                    break
                boxes = self.plan.draw(number, kind, case=case, attempt=attempt).boxes
                cuts = [Cut(boxes[view], views[view]) for view in air]
                make_views(reader, source, cuts, level_share=self.views.level_share)
                air = [view for view in air if source.is_air(views[view])]


def sample_maker(
    cfg: PretrainConfig, *, split: str, kinds: tuple[str, ...], threads: int = 1
) -> SampleMaker:
    """The maker of a run's samples.

    Args:
        cfg: The run.
        split: `train`: the cases that `sampling` chooses. `val`: the held-out ones, all alike, with
            other boxes and masks from the same seed.
        kinds: `local`, `global` or both.
        threads: How many samples are made at a time in one call.

    Raises:
        UserError: The store has no index, or `sampling` does not fit it.
    """
    columns = _COLUMNS | columns_to_select(cfg.sampling)
    index, weights, seed = VolumeIndex.read(cfg.store, columns=columns), None, cfg.seed
    if split == "train":
        selection = select_cases(index, cfg.sampling)
        index, weights = selection.index, selection.weights
    else:
        index, seed = index.select(split=split), cfg.seed + 2**32
    plan = Plan(seed=seed, foreground=index.boxes(), views=cfg.views, weights=weights)
    return SampleMaker(
        cfg.store,
        index,
        plan,
        cfg.views,
        kinds,
        stand_in=split == "train" and cfg.pipeline.on_error == "skip",
        threads=threads,
        cache=cfg.pipeline.cache_limits,
    )


def fault_texts(faults: NDArray[np.uint8]) -> Iterable[str]:
    """What the column `fault` (B, 320) says of each sample; empty where nothing was wrong."""
    return (bytes(row).rstrip(b"\0").decode(errors="replace") for row in faults)


class _Watched:
    """A store of which one case is read: times it, and says which case it is that fails."""

    def __init__(self, store: Callable[[], VolumeStore], case_id: str) -> None:
        self.read_s = 0.0
        self._store, self._case_id = store, case_id

    def read_blocks(self, requests: Any) -> Any:
        began = time.perf_counter()
        try:
            return _patiently(lambda: self._store().read_blocks(requests))
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableCaseError(f"case {self._case_id}: {reason}") from error
        finally:
            self.read_s += time.perf_counter() - began


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


def _source(row: Mapping[str, Any], hounsfield: tuple[float, float]) -> Source:
    z, y, x = row["shape"]
    low, high = (np.array(row[name], float) for name in ("p0_5", "p99_5"))
    is_ct = row["modality"] == "CT"
    return Source(
        case_id=row["case_id"],
        shape=(z, y, x),
        factors=tuple(tuple(factors) for factors in row["factors"]),
        is_integer=np.issubdtype(np.dtype(row["dtype"]), np.integer),
        window=np.tile(hounsfield, (len(low), 1)) if is_ct else _window(row, low, high),
        tissue=np.array(
            [tissue_above(*ends, modality=row["modality"]) for ends in zip(low, high, strict=True)]
        ),
    )


def _window(
    row: Mapping[str, Any], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The intensities (C, 2) of a case other than CT that become 0 and 1."""
    window = np.stack([low, high], axis=1)
    # Where nearly all voxels are alike, percentiles meet; where all are, one unit is as good.
    flat = low == high
    window[flat] = np.stack([row["minimum"], row["maximum"]], axis=1)[flat]
    window[:, 1] += window[:, 0] == window[:, 1]
    return window


@functools.lru_cache(maxsize=4)
def _open_store(path: str, cache: CacheLimits | None) -> VolumeStore:
    # Ray Data unpickles the maker for every task; the store's open arrays should outlive one.
    return VolumeStore.open(path, cache=cache)
