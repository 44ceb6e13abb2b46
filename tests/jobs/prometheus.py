"""What a Prometheus would read of a node of Ray."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
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


def figures(url: str, *, until: Callable[[list[Figure]], bool], **labels: str) -> list[Figure]:
    """Ours that have these labels, once they are as they should be: Ray sends every 10 s."""
    end = time.monotonic() + 120
    while True:
        found = [
            Figure(sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(scrape(url))
            for sample in family.samples
            if sample.name.startswith("ray_glmae_") and labels.items() <= sample.labels.items()
        ]
        if until(found):
            return found
        assert time.monotonic() < end, found
        time.sleep(0.5)


def total(found: list[Figure], name: str, **labels: str) -> float:
    """Sum over the series of a name that have these labels."""
    return sum(f.value for f in found if f.name == name and labels.items() <= f.labels.items())
