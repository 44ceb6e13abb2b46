"""One Ray for the tests of jobs, an S3 server that its workers know, and a small store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from glmae_ray.cli import main
from tests.conftest import start_ray
from tests.jobs.planted import SECRETS
from tests.store.object_store import bucket, point_at, proxy, s3_server
from tests.store.scans import write_people

__all__ = ["bucket", "cases_here", "local_ray", "proxy", "s3_server", "small_store"]


@pytest.fixture(scope="package")
def local_ray(s3_server) -> Iterator[str]:
    """Four logical CPUs for two workers, their readers and a margin; its address."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(s3_server, patch)  # workers keep the environment in which Ray starts
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        address = start_ray()
    yield address
    ray.shutdown()


@pytest.fixture(scope="package")
def small_store(local_ray, tmp_path_factory) -> Path:
    """Twelve people with grids of unequal sides, about half of them for training."""
    folder = tmp_path_factory.mktemp("people")
    write_people(folder / "scans", count=12)
    store = folder / "store"
    words = [f"source={folder / 'scans'}", f"store={store}", "splits=[0.6,0.4,0.0]"]
    assert main(["ingest", *words]) == 0
    return store


@pytest.fixture
def cases_here(monkeypatch) -> None:
    """`evaluate` and `predict` do their cases here; actors import torch and MONAI for seconds."""

    def over_cases(
        make: Callable[..., Any], *args: Any, todo: Sequence[Any], workers: int | None
    ) -> Iterator[tuple[Any, Any]]:
        worker = make(*args)
        for item in todo:
            yield item, worker.do(item)

    for job in ("evaluate", "predict"):
        monkeypatch.setattr(f"glmae_ray.jobs.{job}.over_cases", over_cases)
