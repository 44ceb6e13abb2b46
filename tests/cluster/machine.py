"""A machine within this one, for what a cluster's scripts do to a machine.

Its processes, its ports, its home and its /tmp/ray are its own, so that `ray start` takes its usual
ports and `ray stop`, which ends every Ray that it finds, finds no other. All of it ends with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]
_SPACES = ["--pid", "--mount", "--net"]
_SET_UP = (
    "set -e; ip link set lo up; mkdir -p /tmp/ray; mount --bind {home}/ray /tmp/ray; "
    # The first process of a machine takes note of the end of those whose parents have ended.
    "touch {home}/up; while true; do sleep 1; done"
)


def can_be_made() -> bool:
    """Whether this process may make one: it takes Linux and its root."""
    try:
        return not subprocess.run(["unshare", *_SPACES, "--fork", "true"], check=False).returncode
    except OSError:
        return False


class Machine:
    """A place where commands run.

    Attributes:
        env: Their environment.
    """

    def __init__(self, home: Path, env: Mapping[str, str] = {}) -> None:
        """Make it.

        Args:
            home: Of its user; a short path, as sockets lie below it.
            env: What its commands see beside the path to this Python's scripts.
        """
        (home / "ray").mkdir(parents=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "AWS_"))}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        # Workers as important as the rest, or nothing moves beside other work.
        own = {"HOME": str(home), "PATH": path, "RAY_worker_niceness": "0"}
        self.env = {**kept, **own, "RAY_USAGE_STATS_ENABLED": "0", **env}
        command = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc"]
        self._process = psutil.Popen([*command, "sh", "-c", _SET_UP.format(home=home)])
        wait_until((home / "up").exists, timeout_s=30)
        (self._first,) = self._process.children()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def start(self, *command: str, log: Path, env: Mapping[str, str] = {}) -> subprocess.Popen:
        """Begin a command in the repository's root; what it prints goes into a file."""
        within = ["nsenter", f"--target={self._first.pid}", *_SPACES, f"--wd={ROOT}"]
        with log.open("a") as out:
            return subprocess.Popen(
                [*within, *command], env=self.env | env, stdout=out, stderr=out, cwd=ROOT
            )

    def run(
        self, *command: str, env: Mapping[str, str] = {}, timeout_s: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end; both of its outputs as one text."""
        log = Path(self.env["HOME"]) / f"{time.monotonic_ns()}.log"
        process = self.start(*command, log=log, env=env)
        code = process.wait(timeout_s)
        return subprocess.CompletedProcess(command, code, log.read_text(errors="replace"))

    def processes(self) -> list[psutil.Process]:
        """All that run on it, beside what keeps it."""
        space = os.readlink(f"/proc/{self._first.pid}/ns/pid")
        psutil.process_iter.cache_clear()  # else a name is that which it had when first seen
        found = psutil.process_iter(["name", "status"])
        mine = [p for p in found if p != self._first and _space(p) == space]
        # Those whose parents have ended are children of the first, as its own `sleep` is.
        return [
            p
            for p in mine
            if p.info["status"] != psutil.STATUS_ZOMBIE and p.info["name"] != "sleep"
        ]


def _space(process: psutil.Process) -> str:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:  # it has ended
        return ""


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 600) -> None:
    """Look until something holds."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.1)
