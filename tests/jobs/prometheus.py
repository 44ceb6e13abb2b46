"""What a Prometheus would read of a node of Ray."""

from __future__ import annotations

import time
import urllib.request
from typing import NamedTuple

import ray
from prometheus_client.parser import text_string_to_metric_families


class Figure(NamedTuple):
    """One time series, now."""

    name: str
    labels: dict[str, str]
    value: float


def endpoint() -> str:
    """That of the one node of the cluster that this process has joined."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape(url: str) -> str:
    """The text of an endpoint."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def figures(url: str, *, wait_for: str, **labels: str) -> list[Figure]:
    """Ours that have these labels, once there is one of a name: Ray sends every ten seconds."""
    until = time.monotonic() + 120
    while True:
        families = list(text_string_to_metric_families(scrape(url)))
        found = [Figure(s.name, s.labels, s.value) for f in families for s in f.samples]
        ours = [
            f
            for f in found
            if f.name.startswith("ray_glmae_") and labels.items() <= f.labels.items()
        ]
        if any(f.name == wait_for for f in ours):
            return ours
        assert time.monotonic() < until, f"{url}: no {wait_for} of {labels}"
        time.sleep(0.5)


def total(found: list[Figure], name: str, **labels: str) -> float:
    """Sum over the series of a name that have these labels."""
    return sum(f.value for f in found if f.name == name and labels.items() <= f.labels.items())
