"""Does a run that loses workers, nodes and its driver end as one that is left alone?

    python -m benchmarks.chaos [--quick] --out FILE.json

A real Ray cluster on loopback addresses: a head without CPUs and up to three nodes, each with
room for one worker and one maker of views. `glmae pretrain` of a tiny model with
`resources.workers=[1,3]` runs there in a process of its own while events come in a seeded random
order, each once the run has done a few steps since the last:

  worker killed   SIGKILL of one training process
  node killed     SIGKILL of all that runs on a node; Ray is not told
  node drained    a notice as of a spot instance, and the same SIGKILL when its time is over
  node added      a node joins, and the run takes it in
  driver killed   SIGKILL of `glmae pretrain`, then the same command again

After the last event the run is asked to stop, so that no machine is too fast for the events. It has
to save and leave, with each step in metrics.jsonl once and with the loss of a run of one worker
that nothing happened to, and each sample of the plan consumed once in the history that survives.
Outage: from the event to the end of the next sitting's first step. Standstill: from the end of the
last step before to the same. Repeated: steps that were done and lost. Others: cores that the rest
of the machine kept busy in the meantime; a restart is work of the CPU for the most part, so that
with much above 0 a figure says little.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._chaos_storm import Storm
from benchmarks._report import arguments, environment, report
from glmae_ray.jobs.profiles import PROFILES
from glmae_ray.phantoms import write_cohort
from tests.jobs.loopback_cluster import LoopbackCluster
from tests.jobs.watched_run import WatchedRun, repeated_steps, wrong_steps

_PACKAGES = ["torch", "ray", "deepspeed", "numpy"]
_SEED = 6
_MOST_OUTAGE_S, _TOLERANCE = 40.0, 1e-4
_MOST_WORKERS, _CPUS, _CPUS_PER_WORKER = 3, 3, 2
_GLOBAL_BATCH = 12
_RESIZE_S = 5  # between looks for room for more
_ENDLESS = 100_000  # steps: no machine gets there before the last event
_LEAVE_S = 600.0
_STEPS_BETWEEN = (12, 24)  # events, fewest and most

_EVENTS = {
    "worker killed": 3,
    "node killed": 2,
    "node drained": 2,
    "node added": 3,
    "driver killed": 2,
}
_QUICK = dict.fromkeys(_EVENTS, 1)

_WORDS = (
    *("model.preset=tiny", "model.patch=8", "model.width=48", "model.depth=2", "model.heads=2"),
    *("model.decoder_width=48", "model.decoder_depth=1", "model.decoder_heads=2"),
    *("model.head_hidden=64", "model.head_bottleneck=16", "model.prototypes=64"),
    *("views.global_count=2", "views.global_size=[64,48,48]"),
    *("views.local_count=4", "views.local_size=[32,24,24]"),
    *("optim.base_lr=0.01", "optim.warmup_steps=10", f"steps={_ENDLESS}"),
    *("engine.precision=float32", "engine.micro_batch=2"),
    *("save.every_steps=10", "validation.every_steps=1000", "validation.samples=3"),
    *("log.pictures=false", "log.tensorboard=false", f"global_batch={_GLOBAL_BATCH}"),
)

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    rng = random.Random(_SEED)
    kinds = order(rng, _QUICK if args.quick else _EVENTS)
    at = thresholds(rng, len(kinds))
    with tempfile.TemporaryDirectory(prefix="glmae-chaos-") as name:
        folder = Path(name)
        words = (*_WORDS, f"store={make_store(folder)}")
        stormy, rows = run_through_storm(folder, words, kinds=kinds, at=at)
        calm = run_alone(folder, words, steps=stormy.look().step)
        ratios, faults = judge(stormy, calm, rows=rows)
    report("chaos", rows=rows, ratios=ratios, facts=facts, out=args.out)
    if faults:
        sys.exit("\n".join(faults))


def order(rng: random.Random, counts: Mapping[str, int]) -> list[str]:
    """A random order in which a node is there to be lost, and room for one that comes."""
    kinds = list(Counter(counts).elements())
    while True:
        rng.shuffle(kinds)
        nodes = [_MOST_WORKERS]
        for kind in kinds:
            change = {"node killed": -1, "node drained": -1, "node added": 1}.get(kind, 0)
            nodes.append(nodes[-1] + change)
        if all(1 <= number <= _MOST_WORKERS for number in nodes):
            return kinds


def thresholds(rng: random.Random, count: int) -> list[int]:
    """Steps before which the events do not come."""
    steps = [rng.randint(*_STEPS_BETWEEN) for _ in range(count)]
    return [sum(steps[: number + 1]) for number in range(count)]


def make_store(folder: Path) -> Path:
    """Phantom people, by the command itself."""
    write_cohort(folder / "phantoms", people=12, seed=0)
    store = folder / "store"
    words = [f"source={folder / 'phantoms'}", f"store={store}"]
    command = [sys.executable, "-m", "glmae_ray.cli", "ingest", *words]
    subprocess.run(command, check=True, env=_without_cluster(), stdout=subprocess.DEVNULL)
    return store


def run_alone(folder: Path, words: Sequence[str], *, steps: int) -> WatchedRun:
    """So many steps, or a few more, of a run of one worker that nothing happens to."""
    run = WatchedRun(folder / "alone", words=words, env=_without_cluster())
    run.start()
    run.wait_for(step=steps, timeout_s=3600)
    leave(run)
    return run


def leave(run: WatchedRun) -> None:
    """Have a run save and end."""
    status = run.leave(timeout_s=_LEAVE_S)
    if status != 128 + signal.SIGTERM:
        sys.exit(f"exit status {status}: {run.said()[-3000:]}")


def run_through_storm(
    folder: Path, words: Sequence[str], *, kinds: Sequence[str], at: Sequence[int]
) -> tuple[WatchedRun, list[Row]]:
    """The same run on a cluster while events come.

    Args:
        folder: For the run folder.
        words: Of the command.
        kinds: Of the events, in their order.
        at: Steps before which they do not come.

    Returns:
        The run, which has left; a row an event.
    """
    elastic = [f"resources.workers=[1,{_MOST_WORKERS}]", "resources.profile=spot"]
    elastic += [f"resources.cpus_per_worker={_CPUS_PER_WORKER}", f"resources.resize_s={_RESIZE_S}"]
    spot = PROFILES["spot"].start  # as docs/running.md has it set where nodes start
    with LoopbackCluster(nodes=_MOST_WORKERS, cpus=_CPUS, env=spot) as cluster:
        run = WatchedRun(folder / "storm", words=[*words, *elastic], env=cluster.environment)
        with Storm(cluster, run, rng=random.Random(_SEED)) as storm:
            rows = []
            for kind, step in zip(kinds, at, strict=True):
                storm.wait_for_calm(step)
                rows.append(storm.happen(kind))
                print(rows[-1], flush=True)
            storm.wait_for_calm(at[-1] + _STEPS_BETWEEN[1])
            leave(run)
    repeated = repeated_steps(run.run)
    for row in rows:
        first, last = row.pop("sittings")
        row["repeated"] = sum(repeated[sitting] for sitting in range(first + 1, last + 1))
    return run, rows


def judge(
    stormy: WatchedRun, calm: WatchedRun, *, rows: Sequence[Row]
) -> tuple[dict[str, float], list[str]]:
    """What a run has to keep through all events: numbers for the report, and what is broken."""
    calm_losses, got = dict(calm.losses()), stormy.losses()
    steps = stormy.look().step
    faults = []
    if [step for step, _ in got] != list(range(1, steps + 1)):
        faults.append(f"metrics.jsonl has the steps {[step for step, _ in got]}")
    deviation = max(abs(loss / calm_losses[step] - 1) for step, loss in got)
    if deviation > _TOLERANCE:
        faults.append(f"a loss differs by {deviation:.2g} from that of the run left alone")
    wrong = wrong_steps(stormy.run, steps=steps, global_batch=_GLOBAL_BATCH)
    faults += [f"step {step} {what}" for step, what in wrong.items()]
    outage = max(row["outage, s"] for row in rows if row["event"] == "node killed")
    if outage > _MOST_OUTAGE_S:
        faults.append(f"a node's loss cost {outage:.0f} s")
    return {
        f"outage after a node's loss, worst, s / {_MOST_OUTAGE_S:g} s": outage / _MOST_OUTAGE_S,
        f"deviation of a loss, largest / {_TOLERANCE:g}": deviation / _TOLERANCE,
        "steps logged once / steps": len({step for step, _ in got}) / max(len(got), steps),
        "steps whose samples were consumed once / steps": 1 - len(wrong) / steps,
    }, faults


def _without_cluster() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"}


if __name__ == "__main__":
    main()
