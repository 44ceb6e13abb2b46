"""What the tests of models share: one thread, an S3 server, a CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.store.object_store import bucket, s3_server

__all__ = ["bucket", "cuda", "one_thread", "s3_server"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights: on a busy machine more threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)
