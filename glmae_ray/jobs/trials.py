"""The trials of a search on disk: a file for each, and its run folder with what it measured.

RUN/trials/0003.json   what trial 3 tries and what became of it
RUN/trials/0003/       its finetuning run
RUN/trials/0003-1/     the run that took its place when pbt had it go on from another trial

They alone say what is left to do. Of Ray Tune's own state nothing is needed to go on: Ray 2.60
writes it ten seconds late, and what its schedulers have seen not at all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from glmae_ray.config_search import SearchConfig, Tree
from glmae_ray.paths import Place, names_in, publish, read_file
from glmae_ray.tracking import read_metrics

TRIALS = "trials"  # folder in the run folder
_SUFFIX = ".json"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: Its number, with zeros in front.
        sample: What it tries, by dotted name.
        state: `running` is also one that a kill or a signal interrupted.
        reason: Why it was stopped, or failed.
    """

    name: str
    sample: Tree
    state: State = "running"
    reason: str = ""


class Figures(NamedTuple):
    """What the run of a trial has measured.

    Attributes:
        dice: Held-out mean by step.
        seconds: Of training, validation and saving, without the start of the workers.
        is_complete: Whether it has done all its steps, and left what it is for.
    """

    dice: dict[int, float]
    seconds: float
    is_complete: bool

    @property
    def last(self) -> float | None:
        """After its last step so far."""
        return self.dice[max(self.dice)] if self.dice else None

    @property
    def best(self) -> float | None:
        """The highest of all."""
        return max(self.dice.values(), default=None)

    @property
    def step(self) -> int:
        """After which it was measured last."""
        return max(self.dice, default=0)


def name_of(number: int) -> str:
    """Name of trial `number`, from 0."""
    return f"{number:04d}"


def read_trials(search: Place) -> dict[str, Trial]:
    """All trials of a search that were begun, in order."""
    names = sorted(n.removesuffix(_SUFFIX) for n in names_in(search / TRIALS) if _SUFFIX in n)
    found = {name: read_file(place_of(search, name)) for name in names}
    return {name: Trial(**json.loads(raw)) for name, raw in found.items() if raw is not None}


def place_of(search: Place, name: str) -> Place:
    """The file of a trial."""
    return search / TRIALS / f"{name}{_SUFFIX}"


def write_trial(search: Place, trial: Trial) -> None:
    """Write down a trial, in place of what was known of it."""
    publish(place_of(search, trial.name), json.dumps(asdict(trial), indent=1) + "\n")


def generations(search: Place, name: str) -> list[Place]:
    """The runs of a trial that have begun, the one that counts last."""
    found, number = [], 0
    while read_file((place := _generation(search, name, number)) / "config.json") is not None:
        found.append(place)
        number += 1
    return found


def run_of(search: Place, name: str) -> Place:
    """The folder of the run that a trial is."""
    begun = generations(search, name)
    return begun[-1] if begun else _generation(search, name, 0)


def next_run_of(search: Place, name: str) -> Place:
    """The folder of the run that would take its place."""
    return _generation(search, name, len(generations(search, name)))


def _generation(search: Place, name: str, number: int) -> Place:
    return search / TRIALS / (f"{name}-{number}" if number else name)


def figures(run: Place) -> Figures:
    """What a finetuning run has measured so far."""
    records = read_metrics(run)
    dice = {r["step"]: float(r["val"]["mean"]) for r in records if "val" in r}
    config, summary = read_file(run / "config.json"), read_file(run / "summary.json")
    is_complete = bool(
        config and summary and json.loads(summary)["steps"] >= json.loads(config)["steps"]
    )
    seconds = sum(r.get("interval_s", 0.0) + r.get("aside_s", 0.0) for r in records)
    return Figures(dice, seconds, is_complete)


def ended(cfg: SearchConfig, search: Place, trial: Trial) -> Trial:
    """A trial that has come to an end without an error, by itself or because it was stopped."""
    found = figures(run_of(search, trial.name))
    if found.is_complete:
        return replace(trial, state="finished", reason="")
    return replace(trial, state="stopped", reason=f"{cfg.schedule}: behind after step {found.step}")


def told(trial: Trial, found: Figures) -> str:
    """A trial in one line."""
    values = " ".join(f"{name}={short(value)}" for name, value in trial.sample.items())
    if trial.state == "failed":
        return f"trial {trial.name}: failed: {trial.reason}; {values}"
    dice = "-" if found.last is None else f"{found.last:.4f} (best {found.best:.4f})"
    line = f"trial {trial.name}: {trial.state} after step {found.step}, Dice {dice}"
    return f"{line}, {found.seconds:.0f} s; {values}"


def short(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
