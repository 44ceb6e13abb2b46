"""A Ray cluster of several nodes on this machine, each of which can be lost in the ways nodes are.

A node is a `ray start --block` of its own with an address of its own (127.0.0.N), so that Ray and
torch take it for a machine. Nothing here is a driver: runs are processes of their own, which join
through `environment`. Whatever ends, ends by its process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2

_STORE_BYTES = 100_000_000  # the object store of a node
_WORKER = "ray::RayTrainWorker"  # how Ray Train's workers title their processes
_START_S = 180.0  # on a machine that is busy


@dataclass(frozen=True)
class Node:
    """A node that was started.

    Attributes:
        address: 127.0.0.N; the head has the machine's own.
        id: What Ray calls it.
        process: Its `ray start`, above all else that runs there.
    """

    address: str
    id: str
    process: psutil.Popen

    def processes(self) -> list[psutil.Process]:
        """All that run on it now."""
        return session(self.process.pid)

    def raylet(self) -> psutil.Process:
        """The process that is Ray on this node."""
        return next(p for p in self.processes() if _title(p).endswith("/raylet"))

    def workers(self) -> list[psutil.Process]:
        """Training workers that run on it now."""
        return [p for p in self.processes() if _title(p).startswith(_WORKER)]


class LoopbackCluster:
    """A head without CPUs, and nodes that come and go.

    Attributes:
        head: Where drivers, controllers and what they start without CPUs run.
        nodes: Those that are there now, in the order of their coming.
        address: For `RAY_ADDRESS`.
    """

    def __init__(self, *, nodes: int = 0, cpus: float = 2, env: Mapping[str, str] = {}) -> None:
        """Start a head, and nodes at once.

        Args:
            nodes: How many beside the head.
            cpus: Of each.
            env: Variables for all that runs on nodes, workers included.
        """
        self._cpus = cpus
        # Ray notes the address of a cluster here; in the usual place other drivers would find it.
        # Short, because sockets lie in it.
        self._folder = Path(tempfile.mkdtemp(prefix="loop", dir="/tmp"))
        self._env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        # Nodes share these cores: a thread that waits for another must not keep one busy.
        self._env |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        self._env.pop("RAY_ADDRESS", None)
        self._env |= env
        self._started: list[psutil.Popen] = []
        self.nodes: list[Node] = []
        try:
            self._start_head()
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that is to join."""
        return self._env | {"RAY_ADDRESS": self.address}

    def _start_head(self) -> None:
        port, client_port = _free_port(), _free_port()
        options = [f"--temp-dir={self._folder}", f"--port={port}", "--head"]
        options += [f"--ray-client-server-port={client_port}", "--include-dashboard=False"]
        process = self._ray_start("head", "--num-cpus=0", *options)
        written = self._folder / "ray_current_cluster"
        self.address = self._wait(
            "head", process, lambda: written.read_text() if written.exists() else None
        )
        self._gcs = GcsClient(address=self.address)
        host, _, _ = self.address.rpartition(":")
        head_id = self._wait("head", process, lambda: self._alive().get(host))
        self.head = Node(host, head_id, process)

    def add_node(self, *, blind_to: Path | None = None) -> Node:
        """Start a node and wait until Ray knows it.

        Args:
            blind_to: A folder that is another one there, empty, as where no disk is shared; takes
                root.
        """
        address = f"127.0.0.{10 + len(self._started)}"
        options = [f"--address={self.address}", f"--node-ip-address={address}"]
        options += [f"--num-cpus={self._cpus:g}", "--include-log-monitor=False"]
        process = self._ray_start(address, *options, blind_to=blind_to)
        node_id = self._wait(address, process, lambda: self._alive().get(address))
        self.nodes.append(Node(address, node_id, process))
        return self.nodes[-1]

    def _ray_start(self, name: str, *options: str, blind_to: Path | None = None) -> psutil.Popen:
        common = ["--block", f"--object-store-memory={_STORE_BYTES}"]
        common += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *common, *options]
        if blind_to is not None:
            hide = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(blind_to), *command]
        with (self._folder / f"{name}.log").open("w") as log:
            # Each a session of its own, by which orphans are found as well.
            process = psutil.Popen(
                command, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        return process

    def _wait(self, name: str, process: psutil.Popen, ready: Callable[[], str | None]) -> str:
        """What `ready` gives, once it gives something."""
        until = time.monotonic() + _START_S
        while not (found := ready()):
            if process.poll() is not None or time.monotonic() > until:
                log = (self._folder / f"{name}.log").read_text()
                raise RuntimeError(f"{name} did not start: {log[-2000:]}")
            time.sleep(0.1)
        return found

    def _alive(self) -> dict[str, str]:
        """Address -> id of the nodes that Ray counts as alive."""
        with suppress(Exception):  # the head may be on its way
            return {
                info.node_manager_address: info.node_id.hex()
                for info in self._gcs.get_all_node_info(timeout=5).values()
                if info.state == gcs_pb2.GcsNodeInfo.ALIVE
            }
        return {}

    def processes(self) -> list[psutil.Process]:
        """All that was started and still runs, on nodes that are lost as well."""
        return [process for one in self._started for process in session(one.pid)]

    def workers(self) -> list[psutil.Process]:
        """Training workers on all nodes, in the order of the nodes."""
        return [worker for node in self.nodes for worker in node.workers()]

    def kill_raylet(self, node: Node) -> None:
        """SIGKILL of Ray on a node; what ran there ends by itself."""
        node.raylet().kill()
        self.nodes.remove(node)

    def kill_node(self, node: Node) -> None:
        """All of a node at once and without notice: a machine that loses its power."""
        _end(node.process)
        _kill(node.processes())
        self.nodes.remove(node)

    def freeze_node(self, node: Node) -> None:
        """All of a node stands still and answers nobody: a cable that is pulled."""
        for process in node.processes():
            with suppress(psutil.Error):
                process.suspend()
        self.nodes.remove(node)

    def drain_node(self, node: Node, *, grace_s: float) -> None:
        """Tell Ray that a node will be taken, as a cloud does; `kill_node` takes it."""
        accepted, reason = self._gcs.drain_node(
            node.id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "the spot instance is reclaimed",
            int((time.time() + grace_s) * 1000),
        )
        assert accepted, reason

    def terminate_node(self, node: Node) -> None:
        """SIGTERM to `ray start --block`, as Kubernetes evicts: it drains, then ends."""
        node.process.send_signal(signal.SIGTERM)
        self.nodes.remove(node)

    def kill_head(self) -> None:
        """The head at once, and with it the cluster."""
        _end(self.head.process)
        _kill(self.head.processes())

    def stop(self) -> None:
        """End everything that was started, with what was lost and has left something."""
        for process in self._started:
            _end(process)
        _kill(self.processes())
        shutil.rmtree(self._folder, ignore_errors=True)


def session(leader: int) -> list[psutil.Process]:
    """Processes of the session that a process began, which may have ended."""
    found = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
    return found


def _end(process: psutil.Popen) -> None:
    """SIGKILL of a child, whose end nobody else may take note of."""
    with suppress(psutil.Error):
        process.kill()
    process.wait(timeout=10)


def _kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    ended = []
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
            ended.append(process)
    psutil.wait_procs(ended, timeout=10)


def _title(process: psutil.Process) -> str:
    """The first word of a process's command line; empty where it has ended."""
    with suppress(psutil.Error):
        return next(iter(process.cmdline()), "")
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
