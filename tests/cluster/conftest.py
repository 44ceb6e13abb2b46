"""A small store, and machines within this one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machine import Machine, can_be_made
from tests.conftest import TINY
from tests.test_crops import write_store

# Long enough to be stopped in the midst.
WORDS = [
    *TINY[2:],
    *("steps=150", "optim.warmup_steps=1", "log.every_steps=1", "save.every_steps=150"),
    *("validation.every_steps=150", "log.pictures=false", "log.tensorboard=false"),
]


@pytest.fixture(scope="package")
def short_folder() -> Iterator[Path]:
    """A folder with a path so short that sockets fit below."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def machine(short_folder, request) -> Iterator[Machine]:
    """One for the tests of a module."""
    if not can_be_made():
        pytest.skip("needs root on Linux, for namespaces of its own")
    with Machine(short_folder / request.module.__name__[-4:]) as made:
        yield made


@pytest.fixture(scope="package")
def store(tmp_path_factory) -> Path:
    """Eight people to train on and one to hold out."""
    return write_store(tmp_path_factory.mktemp("people") / "store", cases=8)
