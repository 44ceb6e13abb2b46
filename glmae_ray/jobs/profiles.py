"""Named profiles: how patient a run is, and how often its workers may fail, on which machines.

`resources.profile` names one. It owns the environment variables by which Ray is told, so that
nobody has to know them; one that the user exports wins. docs/running.md says what follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Environment = Mapping[str, str]

# Of Ray Train, which sends these from the driver on to its controller and to the workers.
POLL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
SILENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
PLACING = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
NOTICE = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
COLLECTIVE = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Of Ray itself, read where a node starts: the first four on the head, which asks the others
# whether they live, and where jobs are stopped; the last on the node that leaves.
NODE_PERIOD = "RAY_health_check_period_ms"
NODE_TIMEOUT = "RAY_health_check_timeout_ms"
NODE_TRIES = "RAY_health_check_failure_threshold"
JOB_STOP = "RAY_JOB_STOP_WAIT_TIME_S"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Limits and patience.

    Attributes:
        driver: Environment of the driver.
        start: Environment of `ray start`, on every node.
        max_failures: Worker groups that may fail; -1: any number. `resources.max_failures` wins.
        max_preemption_failures: Nodes that may leave after a notice, which is no failure.
        controller_failure_limit: Starts of a worker group that may fail, over a whole run.
        relax_collectives_on_preemption: Whether Ray's own barriers leave out ranks whose node
            leaves.
        preemption_grace_s: How long the other workers go on when a node has left after a notice.
        elastic_resize_monitor_interval_s: How often Ray looks whether there is room for more.
            `resources.resize_s` wins.
        hang_s: A step that takes longer hangs. `resources.hang_s` wins.
        wait_s: How long a run waits for nodes on which its workers fit, before it ends.
    """

    driver: Environment
    start: Environment = field(default_factory=dict)
    max_failures: int
    elastic_resize_monitor_interval_s: float
    hang_s: float
    wait_s: float
    # Someone else wants the machine: no reason to give up.
    max_preemption_failures: int = -1
    # Ray counts over the whole run, in which many starts find no room; `wait_s` bounds each wait.
    controller_failure_limit: int = -1
    # Every rank writes a part of each checkpoint: none is complete without those that leave.
    relax_collectives_on_preemption: bool = False
    # What a node has not written before it leaves is lost: nothing to wait for.
    preemption_grace_s: float = 0.0


def _environment(**values: float) -> Environment:
    return MappingProxyType({name: f"{value:g}" for name, value in values.items()})


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # One machine, someone beside it: no node comes or goes, and a bug should be seen soon.
        "local": Profile(
            driver=_environment(
                **{
                    POLL: 1,  # one machine answers at once
                    SILENCE: 300,  # a machine that swaps is silent for minutes
                    PLACING: 30,  # no node will come; another try costs nothing
                    COLLECTIVE: 3600,  # after hang_s, which names the rank
                }
            ),
            max_failures=3,  # memory may have been short for a moment; a bug fails every time
            elastic_resize_monitor_interval_s=10,  # workers fit as soon as another job has ended
            hang_s=1800,  # a step on two cores may take minutes
            wait_s=120,  # another job may be ending; after that nothing changes
        ),
        # Machines of one's own: some fail, and come back.
        "cluster": Profile(
            driver=_environment(
                **{
                    POLL: 2,  # as Ray: hundreds of workers answer within it
                    SILENCE: 120,  # reading a checkpoint of many GB holds Python for seconds
                    # A drained node cost 27 s with 15, 72 s with Ray's 60: so long it waits for a
                    # place on the node that is gone.
                    PLACING: 15,
                    NOTICE: 2,  # of the 30 s for which `ray start` drains
                    COLLECTIVE: 1800,  # after hang_s, which names the rank
                }
            ),
            start=_environment(
                **{
                    # A machine that loses its power is dead to Ray after 28 s, not 65 s; one that
                    # is only busy has four tries.
                    NODE_PERIOD: 2000,
                    NODE_TIMEOUT: 5000,
                    NODE_TRIES: 4,
                    # `ray job stop` kills after 3 s of its own: no checkpoint of many GB is written
                    # by then. A run that has saved ends at once.
                    JOB_STOP: 300,
                    DRAIN: 25,  # Kubernetes kills after 30 s
                }
            ),
            max_failures=20,  # a node a day in a run of weeks; a bug ends it within half an hour
            elastic_resize_monitor_interval_s=60,  # each change costs a start of the workers
            hang_s=600,  # ten times a slow step with its validation and checkpoint
            wait_s=3600,  # a node reboots in minutes, a queue or an autoscaler takes longer
        ),
        # Machines that are taken away at any time, and given again some time.
        "spot": Profile(
            driver=_environment(
                **{
                    POLL: 1,  # each second counts of the thirty that some clouds give
                    SILENCE: 60,  # a machine that is taken without a notice is only silent
                    # The first start after a loss may still count on the node that is gone, and
                    # wait for a place there; where there is room, one is found within a second.
                    PLACING: 5,
                    NOTICE: 1,  # the rest of the notice is for the checkpoint
                    COLLECTIVE: 1800,  # after hang_s, which names the rank
                }
            ),
            start=_environment(
                **{
                    NODE_PERIOD: 1000,  # a machine that is gone is dead to Ray after 20 s
                    NODE_TIMEOUT: 3000,
                    NODE_TRIES: 5,
                    JOB_STOP: 300,  # as for a cluster
                    DRAIN: 25,  # of the 30 s that Google, Azure and Kubernetes give
                }
            ),
            max_failures=500,  # a machine that goes without a notice is a failure to Ray
            elastic_resize_monitor_interval_s=120,  # machines come one by one: take a few at once
            hang_s=600,  # as for a cluster
            wait_s=12 * 3600,  # capacity may come back in the night, and waiting is free
        ),
    }
)


def apply(profile: Profile, *, starts_ray: bool = False, hang_s: float | None = None) -> None:
    """Set a profile's environment; what is set already stays. Before Ray is imported.

    Args:
        profile: Which.
        starts_ray: Also what is for `ray start`, as this process starts a Ray of its own.
        hang_s: That the run has in place of the profile's: Ray's own collectives wait longer.
    """
    for name, value in [*profile.driver.items(), *(profile.start.items() if starts_ray else ())]:
        if name == COLLECTIVE and hang_s is not None:
            value = f"{max(float(value), 2 * hang_s):g}"
        os.environ.setdefault(name, value)
    if starts_ray:
        # No node comes or goes; each of Ray's processes takes a hundredth of a core by waiting.
        os.environ.setdefault(WATCHER, "0")


def exports(profile: Profile) -> Iterator[str]:
    """Lines for a shell that starts Ray on a node."""
    for name, value in profile.start.items():
        yield f"export {name}={value}"
