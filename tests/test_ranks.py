"""What workers tell each other: two processes over gloo, one of which falls silent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glmae_ray.ranks import Ranks


def test_one_worker_alone_tells_itself():
    alone = Ranks(0, 1, 0, None)
    assert alone.told("a") == "a"
    assert alone.each("a") == ["a"]


def tell_and_fall_silent(rank: int) -> dict[str, Any]:
    """What a rank was told, and how long it waited for one that was silent."""
    import torch.distributed as dist

    address = os.environ["RANKS_STORE"]
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ranks = Ranks.join(local_rank=rank, timeout_s=2.0)
    found: dict[str, Any] = {"facts": [ranks.rank, ranks.size, ranks.local_rank]}
    found["told"] = ranks.told({"path": f"of {rank}", "large": "x" * 10**6 * rank})
    found["told nothing"] = ranks.told(None if rank == 0 else "something")
    found["each"] = ranks.each((rank, "longer" * rank))
    began = time.monotonic()
    if rank == 0:
        try:
            ranks.each("are you there?")
        except RuntimeError as error:
            found["error"] = str(error)
        found["waited_s"] = time.monotonic() - began
    else:
        time.sleep(6)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    code = (
        "import json, os, sys; from tests.test_ranks import tell_and_fall_silent\n"
        "print(json.dumps(tell_and_fall_silent(int(sys.argv[1]))), flush=True)\n"
        "os._exit(0)"  # nobody answers any more
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            env=os.environ | {"RANKS_STORE": address},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


def test_all_are_told_what_the_first_has(found):
    assert [ranks["facts"] for ranks in found] == [[0, 2, 0], [1, 2, 1]]
    assert [ranks["told"] for ranks in found] == [{"path": "of 0", "large": ""}] * 2
    assert [ranks["told nothing"] for ranks in found] == [None, None]


def test_each_gives_the_values_of_all_in_their_order(found):
    assert [ranks["each"] for ranks in found] == [[[0, ""], [1, "longer"]]] * 2


def test_a_silent_peer_is_an_error_after_the_stated_time(found):
    assert "error" in found[0]
    assert found[0]["waited_s"] >= 1.9
