"""Join the Ray that is named, or start one on this machine for as long as a job lasts."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from glmae_ray.config import RayConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.machine import cpus_here

_KNOCK_S = 10.0
_LOOPBACK = "127.0.0.1"


@contextmanager
def ray_session(cfg: RayConfig) -> Iterator[None]:
    """Have Ray inside; a Ray that was already there stays, one that was started here stops.

    Raises:
        UserError: The named cluster does not answer, or does not let us in.
    """
    # Hospital machines call nobody. Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if address := cfg.address or os.environ.get("RAY_ADDRESS"):
        _join(address)
    else:
        _start_here()
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        _knock(address)
    except OSError as error:
        raise UserError(f"ray.address: {address} does not answer ({error})") from None
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, AuthenticationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"ray.address: {address} cannot be joined ({reason}); it takes a node of that cluster "
            "on this machine, the same Ray and Python, and its token (RAY_AUTH_MODE=token, "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token)"
        ) from None


def _knock(address: str) -> None:
    """Raise an OSError where no one listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def _start_here() -> None:
    import ray

    # The cluster of one process that goes with it: its token concerns nobody.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Two logical CPUs at least: a trainer and its reader share even a single core.
    cpus = max(2, cpus_here())
    with _on_loopback():
        ray.init(
            address="local",  # not the cluster that somebody else has started on this machine
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that starts inside, and what runs in it, listen where only this machine knocks.

    Ray looks for an address that other machines reach, but where it takes itself for one that has
    no clusters, as by default on macOS.
    """
    from ray._private import ray_constants

    interfaces = psutil.net_if_addrs().items()
    name = next(name for name, found in interfaces if _LOOPBACK in {a.address for a in found})
    inherited = {
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "GLOO_SOCKET_IFNAME": name,
        "NCCL_SOCKET_IFNAME": name,
    }
    before = {name: os.environ.get(name) for name in inherited}
    has_clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ |= inherited
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = has_clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
