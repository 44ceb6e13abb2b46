"""What tests of run folders share: an S3 server, and no patience with it."""

import pytest

from glmae_ray import outbox, s3
from tests.store.object_store import bucket, proxy, s3_server

__all__ = ["bucket", "impatient", "proxy", "s3_server"]


@pytest.fixture
def impatient(monkeypatch):
    """One try in place of several, and a fifth of a second between two publications."""
    monkeypatch.setattr(s3, "TRIES", 1)
    monkeypatch.setattr(outbox, "EVERY_S", 0.2)
