"""What ingest has Ray do: read headers of files, take in cases, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from glmae_ray.errors import UserError
from glmae_ray.paths import plain_errors, to_place
from glmae_ray.store.dicom_headers import is_dicom, is_named_dicom, read_slice_header
from glmae_ray.store.intake import Choices, Pending, Taken, take_in
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import Header
from glmae_ray.store.zarr_store import VolumeStore

_HEADERS_A_TASK = 256
_FEW_HEADERS = 1024  # read here, in seconds, rather than starting Ray
_MAGIC_BYTES = 132
_BASE_BYTES = 400 * 2**20  # of a worker, libraries loaded
_VOLUMES_HELD = 4  # copies of a volume that a worker has in memory at its peak
_UNPACKED = 3  # size of a compressed file's voxels, as a multiple of the file

Outcome = tuple[Pending, Taken | ReadError]


def read_headers(
    locations: Sequence[str], *, salt: bytes, start_ray: Callable[[], Any]
) -> list[Header]:
    """What files that may be DICOM turn out to be, in order."""
    if len(locations) <= _FEW_HEADERS:
        return _headers(locations, salt)
    start_ray()
    import ray  # after ray_session has set what Ray reads when it is imported

    parts = [
        locations[start : start + _HEADERS_A_TASK]
        for start in range(0, len(locations), _HEADERS_A_TASK)
    ]
    task = ray.remote(num_cpus=1)(_headers)
    return [header for done in ray.get([task.remote(p, salt) for p in parts]) for header in done]


def outcomes(todo: Sequence[Pending], *, store: VolumeStore, choices: Choices) -> Iterator[Outcome]:
    """Every item with what became of it, as they finish: a Ray task each, few at once."""
    import ray  # after ray_session has set what Ray reads when it is imported

    task = ray.remote(num_cpus=1)(_take_in)
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    queue = iter(todo)
    flying: dict[Any, Pending] = {}
    while True:
        for pending in islice(queue, at_once - len(flying)):
            options = {"memory": min(_memory_of(pending), int(most))}
            flying[task.options(**options).remote(pending, store, choices)] = pending
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


def _headers(locations: Sequence[str], salt: bytes) -> list[Header]:
    return [_header(location, salt) for location in locations]


def _header(location: str, salt: bytes) -> Header:
    place = to_place(location)
    try:
        with plain_errors(place):
            if not is_named_dicom(place):
                with place.open("rb") as file:
                    if not is_dicom(file.read(_MAGIC_BYTES)):
                        return None
            return read_slice_header(place, salt=salt)
    except ReadError as error:
        return error
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        return ReadError("unreadable", f"{location}: {reason}; restore it")


def _take_in(pending: Pending, store: VolumeStore, choices: Choices) -> Taken | ReadError:
    try:
        return take_in(pending, store=store, choices=choices)
    except ReadError as error:
        return error


def _memory_of(pending: Pending) -> int:
    """Bytes that Ray sets aside for a task; what the files hold is known once they are read."""
    return _BASE_BYTES + _VOLUMES_HELD * _UNPACKED * pending.item.size
