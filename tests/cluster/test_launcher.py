"""Files for `ray up`: Ray's launcher takes them, and wrong ones are found before they cost."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from cluster.launcher import _is_spot
from cluster.validate import main, mistakes
from glmae_ray.jobs.profiles import PROFILES
from tests.cluster.machine import ROOT, wait_until

CLOUDS = pytest.mark.parametrize("cloud", ["aws", "gcp"])
Tree = dict[str, Any]


def text_of(cloud: str) -> str:
    return (ROOT / "cluster" / f"{cloud}.yaml").read_text()


@CLOUDS
def test_the_files_are_right(cloud, capsys):
    path = ROOT / "cluster" / f"{cloud}.yaml"
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no mistake found\n"


@CLOUDS
def test_workers_are_spot_machines_with_others_behind_them_and_the_head_is_none(cloud):
    types = yaml.safe_load(text_of(cloud))["available_node_types"]
    spot = {name for name, one in types.items() if _is_spot(one)}
    assert spot == {"gpu_spot", "makers"}
    assert types["gpu"]["resources"] == types["gpu_spot"]["resources"]
    assert types["makers"]["labels"] == {"pool": "cpu"}


@CLOUDS
def test_nodes_start_in_the_environment_of_the_profile(cloud):
    tree = yaml.safe_load(text_of(cloud))
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        for variable, value in PROFILES["spot"].start.items():
            assert f"export {variable}={value};" in tree[name][-1], name


# Mistakes

Change = Callable[[Tree], None]


def command(old: str, new: str, *, of: str = "worker") -> Change:
    def change(tree: Tree) -> None:
        commands = tree[f"{of}_start_ray_commands"]
        assert old in commands[-1]
        commands[-1] = commands[-1].replace(old, new)

    return change


def kind(name: str, change: Callable[[Tree], Any]) -> Change:
    return lambda tree: change(tree["available_node_types"][name])


MISTAKES: dict[str, Change] = {
    "Ray's launcher cannot read it: Additional properties": lambda t: t.update(max_worker=3),
    "Ray's launcher cannot read it: `head_node_type` must be one of": lambda t: t.update(
        head_node_type="heads"
    ),
    "setup_commands: left out": lambda t: t.pop("setup_commands"),
    "aws_credentials: no credentials in files": lambda t: t["provider"].update(aws_credentials={}),
    "file_mounts: ~/.ray/auth_token": lambda t: t.pop("file_mounts"),
    "0.0.0.0/0 lets all of the internet knock": lambda t: t["provider"]["security_group"].update(
        IpPermissions=[{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    ),
    "head_node_type: is a spot machine": kind(
        "head", lambda one: one["node_config"].update(InstanceMarketOptions={"MarketType": "spot"})
    ),
    "gpu: resources differ from gpu_spot's": kind(
        "gpu", lambda one: one.update(resources={"GPU": 1})
    ),
    "gpu: priority has to be less than gpu_spot's": kind(
        "gpu", lambda one: one.update(priority=10)
    ),
    "worker_start_ray_commands: has 0 commands": command("ray start", "ray begin"),
    "worker_start_ray_commands: ray start lacks --block": command("--block", ""),
    "head_start_ray_commands: ray start lacks --autoscaling-config": command(
        "--autoscaling-config=~/ray_bootstrap_config.yaml", "", of="head"
    ),
    "head_start_ray_commands: ray start has no --dashbord-host; --dashboard-host?": command(
        "dashboard-host", "dashbord-host", of="head"
    ),
    "worker_start_ray_commands: RAY_AUTH_MODE=token is not exported": command(
        "=token", "=disabled"
    ),
    "worker_start_ray_commands: exports ": command("_period_ms=1000", "_period_ms=10000"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_found(line):
    tree = yaml.safe_load(text_of("aws"))
    MISTAKES[line](tree)
    (found,) = mistakes(yaml.safe_dump(tree))
    assert line in found


# node.sh: the notice


class _Metadata(http.server.BaseHTTPRequestHandler):
    """What a machine of a cloud is told of itself; `taken` is when it will be taken."""

    server: Any

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self._answer(200 if self.server.taken else 404, "")
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, "TRUE" if self.server.taken else "FALSE")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def metadata() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    server.taken, server.asked = False, 0
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


NODE = (
    "import signal, sys, time; "
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(99)"
)


def start_node(cloud: str, metadata: Any, *script: str) -> subprocess.Popen[str]:
    place = f"http://127.0.0.1:{metadata.server_port}"
    return subprocess.Popen(
        [ROOT / "cluster" / "node.sh", cloud, sys.executable, *script],
        env={**os.environ, "GLMAE_METADATA": place, "no_proxy": "127.0.0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@CLOUDS
def test_the_notice_that_a_machine_is_taken_reaches_ray(cloud, metadata):
    node = start_node(cloud, metadata, "-c", NODE)
    assert node.stdout.readline() == "up\n"
    wait_until(lambda: metadata.asked >= 2, timeout_s=60)
    assert node.poll() is None
    metadata.taken = True
    said, _ = node.communicate(timeout=60)
    assert node.returncode == 7
    assert said == f"{cloud} takes this node; it drains\n"


def test_a_machine_that_is_shut_down_passes_it_on(metadata):
    node = start_node("aws", metadata, "-c", NODE)
    assert node.stdout.readline() == "up\n"
    node.send_signal(signal.SIGTERM)
    node.communicate(timeout=60)
    assert node.returncode == 7


def test_a_node_that_ends_ends_its_watch(metadata):
    node = start_node("gcp", metadata, "-c", "raise SystemExit(3)")
    said, _ = node.communicate(timeout=60)
    assert (node.returncode, said) == (3, "")
