"""A plain command on this machine: who can knock at it, and where its credentials turn up."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from glmae_ray.tracking import read_metrics
from tests.cluster.machine import wait_until
from tests.conftest import TINY
from tests.jobs.planted import SECRETS, TOKEN, leaks
from tests.jobs.prometheus import Figure, figures, scrape, total
from tests.models import finetunes
from tests.test_crops import write_store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Long enough to be seen, and then stopped, in the midst.
WORDS = [
    *("steps=1000", "resources.workers=2", "optim.warmup_steps=1"),
    *("log.every_steps=1", "save.every_steps=3", "validation.every_steps=1000"),
]
VERBS = {
    "pretrain": TINY,
    "finetune": [*finetunes.TINY, "model.channels=1", "crops.window=[-300,600]"],
}


class Seen(NamedTuple):
    """A run of two workers that was looked at from outside, and then asked to stop.

    Attributes:
        verb: Its verb.
        folder: Its folder.
        out: What it printed.
        ray: What its Ray has written.
        doors: Title of the process and address of each socket that took connections.
        counted: Figure -> sum over all workers, as the endpoint showed it.
        metrics: All that the endpoint showed.
    """

    verb: str
    folder: Path
    out: Path
    ray: Path
    doors: list[tuple[str, str]]
    counted: dict[str, float]
    metrics: str


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a path so short that Ray's sockets fit below."""
    folder = Path(tempfile.mkdtemp(prefix="sec", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=VERBS)
def seen(home, request) -> Seen:
    verb = request.param
    folder, out, ray = (home / f"{verb}{suffix}" for suffix in ("", ".out", ".ray"))
    if not (store := home / "store").exists():
        write_store(store, cases=8)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    env |= SECRETS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(ray)}
    words = [verb, *VERBS[verb], *WORDS, f"store={store}", f"run={folder}"]
    command = [sys.executable, "-m", "glmae_ray.cli", *words]
    with out.open("w") as file:
        driver = psutil.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    processes = [driver]
    try:
        wait_until(lambda: len(read_metrics(folder)) > 8 or driver.poll() is not None)
        assert driver.poll() is None, out.read_text()
        processes += driver.children(recursive=True)
        (port,) = ray.glob("ray/session_2*/metrics_export_port_*")
        url = f"http://127.0.0.1:{port.read_text()}/metrics"
        found = figures(url, until=knows_steps, verb=verb, run=verb)
        counted = {f.name: sum(g.value for g in found if g.name == f.name) for f in found}
        opened = [door for process in processes for door in doors(process)]
        record = Seen(verb, folder, out, ray, opened, counted, scrape(url))
        driver.terminate()
        assert driver.wait(300) == 143, out.read_text()
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
    return record


def knows_steps(found: list[Figure]) -> bool:
    return total(found, "ray_glmae_samples_total") > 0


def doors(process: psutil.Process) -> list[tuple[str, str]]:
    """Its title, and the address, of each socket of a process that takes connections."""
    with suppress(psutil.NoSuchProcess):
        title = " ".join(process.cmdline())
        found = process.net_connections(kind="inet")
        return [(title, c.laddr.ip) for c in found if c.status == psutil.CONN_LISTEN]
    return []


def test_only_this_machine_can_knock_at_a_run(seen):
    titles = " ".join(title for title, _ in seen.doors)
    for part in ("glmae_ray.cli", "gcs_server", "raylet", "DashboardAgent", "RayTrainWorker"):
        assert part in titles
    outside = [(title, ip) for title, ip in seen.doors if not is_loopback(ip)]
    assert not outside


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def test_a_run_can_be_watched_while_it_trains(seen):
    assert seen.counted["ray_glmae_samples_total"] >= 4
    assert seen.counted["ray_glmae_planned_steps"] == 1000
    assert seen.counted["ray_glmae_step_seconds_total"] > 0


def test_credentials_of_the_environment_turn_up_nowhere(seen):
    assert (seen.folder / "environment.json").exists()
    assert [*seen.ray.glob("ray/session_2*/logs/worker-*.err")]
    texts = [seen.out.read_text(), seen.metrics]
    assert not [*leaks(folders=[seen.folder, seen.ray], texts=texts)]
