"""Two workers under a `HangWatch`, of which the first waits for the second, which sleeps.

python -m tests.jobs.standing_still RANK FOLDER ADDRESS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
from ray.experimental import internal_kv

from glmae_ray.jobs import hang
from glmae_ray.ranks import Ranks
from glmae_ray.watch import Event


def main(rank: int, folder: Path, address: str) -> None:
    """Take three steps, then stand still."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ranks = Ranks.join(local_rank=rank, timeout_s=600)

    def put(key: bytes, value: bytes, _: bool, **__: bytes) -> None:
        (folder / key.decode().replace("|", "-")).write_bytes(value)

    def read(key: bytes, **_: bytes) -> bytes | None:
        path = folder / key.decode().replace("|", "-")
        return path.read_bytes() if path.exists() else None

    def tell(event: Event) -> None:
        (folder / f"event-{rank}.json").write_text(json.dumps([event.line, event.facts]))

    internal_kv._internal_kv_put, internal_kv._internal_kv_get = put, read
    watch = hang.HangWatch("run", ranks=ranks, limit_s=3.0, tell=tell)
    for step in range(1, 4):
        ranks.each(step)
        watch.beat(step)
    if rank == 0:
        ranks.each(4)
    time.sleep(600)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
