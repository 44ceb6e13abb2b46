"""One Ray for the tests of jobs, an S3 server, and a small store to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from glmae_ray.cli import main
from tests.store.object_store import bucket, proxy, s3_server
from tests.store.scans import write_people

__all__ = ["bucket", "local_ray", "proxy", "s3_server", "small_store"]


@pytest.fixture(scope="package")
def local_ray() -> Iterator[str]:
    """Four logical CPUs for two workers, their readers and a margin; its address."""
    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield context.address_info["address"]
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
