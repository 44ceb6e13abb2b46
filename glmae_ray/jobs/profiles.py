"""Stand-in until the profiles land."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    max_failures: int = 3
    controller_failure_limit: int = -1
    max_preemption_failures: int = -1
    relax_collectives_on_preemption: bool = False
    preemption_grace_s: float = 0.0
    elastic_resize_monitor_interval_s: float = 10.0
    hang_s: float = 600.0


PROFILES = {
    "local": Profile(),
    "cluster": Profile(max_failures=20),
    "spot": Profile(max_failures=1000),
}
