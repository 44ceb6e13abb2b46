"""Where ranks on one machine meet: torch's store, on the loopback address only.

Ray Train's listens on all addresses of the machine of rank 0, and torch has no setting for it.
"""

from __future__ import annotations

import os
import socket

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from ray.train.v2._internal.execution.worker_group import ExecutionGroup
from torch.distributed import TCPStore

_HOST = "127.0.0.1"
_stores: list[TCPStore] = []  # of this process; one that is forgotten ends


def torch_config() -> TorchConfig:
    """Ray's own, but where the cluster keeps to this machine's loopback address."""
    return _OnLoopback() if ray.util.get_node_ip_address() == _HOST else TorchConfig()


class _OnLoopback(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: ExecutionGroup, backend_config: TorchConfig) -> None:
        """As Ray's, with a store of ours in the process of rank 0."""
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        port = worker_group.execute_single(0, _open_store)
        worker_group.execute(_find_store, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        joined = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend,
                world_rank=rank,
                world_size=size,
                init_method="env://",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        ray.get(joined)


def _open_store() -> int:
    """Its port."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        _HOST,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
    _stores.append(store)
    return port


def _find_store(port: int) -> None:
    """Have torch use the store that is there, also in rank 0."""
    os.environ |= {
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
