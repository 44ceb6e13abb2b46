"""Ingest that is killed: workers, and the driver with all it started, at random moments."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from glmae_ray.cli import main
from tests.store import scans
from tests.store.scans import write_nifti

pytestmark = pytest.mark.ray


def archive(folder: Path, *, cases: int, shape) -> Path:
    """Cases, a broken file, a duplicate and a text."""
    for seed in range(cases):
        write_nifti(
            folder / f"{seed // 10}" / f"p{seed:03d}.nii.gz", scans.voxels(shape, seed=seed)
        )
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b nothing")
    (folder / "twin.nii.gz").write_bytes((folder / "0" / "p003.nii.gz").read_bytes())
    (folder / "notes.txt").write_text("left alone")
    return folder


def content(store: Path) -> dict[str, str]:
    """Hash of every file of a store, by its path in there."""
    files = (path for path in store.rglob("*") if path.is_file())
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def published(store: Path) -> int:
    return len(list((store / "cases").glob("*/zarr.json")))


def words(source: Path, store: Path) -> list[str]:
    return ["ingest", f"source={source}", f"store={store}", "modality=MR"]


@pytest.mark.usefixtures("local_ray")
def test_workers_that_are_killed_lose_nothing(tmp_path, capsys):
    source = archive(tmp_path / "in", cases=30, shape=(60, 70, 50))
    killed: list[int] = []
    done = threading.Event()

    def kill_now_and_then():
        while not done.is_set() and len(killed) < 4:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: it ends by itself
                    if not "".join(process.cmdline()[:1]).startswith("ray::_take_in"):
                        continue
                    process.kill()
                    killed.append(process.pid)
                    time.sleep(0.3)
                    break
            time.sleep(0.01)  # warm workers are done with all cases within a second

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        assert main(words(source, tmp_path / "s")) == 0
    finally:
        done.set()
        killer.join()
    assert killed
    assert capsys.readouterr().out.splitlines()[-1] == (
        "ingested 30, already stored 0, quarantined 2"
    )
    assert main(words(source, tmp_path / "whole")) == 0
    assert content(tmp_path / "s") == content(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_store_of_an_uninterrupted_run(tmp_path):
    source = archive(tmp_path / "in", cases=400, shape=(110, 120, 100))
    command = [sys.executable, "-m", "glmae_ray.cli"]
    env = {**os.environ, "GLMAE_SUBJECT_SALT": "for tests"}
    subprocess.run([*command, *words(source, tmp_path / "whole")], env=env, check=True)

    dice = random.Random(20)
    grown = []
    for _ in range(20):
        enough = published(tmp_path / "s") + dice.randint(0, 25)
        run = subprocess.Popen(
            [*command, *words(source, tmp_path / "s")], env=env, start_new_session=True
        )
        while run.poll() is None and published(tmp_path / "s") < enough:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.2))
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL  # it was still at work
        grown.append(published(tmp_path / "s"))
    subprocess.run([*command, *words(source, tmp_path / "s")], env=env, check=True)
    print(f"published after the kills: {grown}")
    assert len(set(grown)) > 10
    assert content(tmp_path / "s") == content(tmp_path / "whole")
