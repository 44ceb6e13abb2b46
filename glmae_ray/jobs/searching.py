"""Ray Tune around the trials of a search: what is tried next, who goes on, what is told."""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from glmae_ray.config_search import SearchConfig, Tree
from glmae_ray.jobs.concurrency import Room
from glmae_ray.jobs.stopping import ask_to_stop, fit_or_stop, stop_requested
from glmae_ray.jobs.text import last_line
from glmae_ray.jobs.training import storage
from glmae_ray.jobs.trials import (
    Trial,
    ended,
    figures,
    place_of,
    read_trials,
    run_of,
    told,
    write_trial,
)
from glmae_ray.paths import Place, to_place

_NAME = "tune"  # of Tune's folder in the run folder: curves for TensorBoard, nothing to go on from
_KEEP = 3  # of ASHA: one of so many goes on


def search(
    cfg: SearchConfig, todo: Sequence[Trial], share: Room, *, after_each: Callable[[], None]
) -> None:
    """Run trials to the end of the search.

    Args:
        cfg: The search.
        todo: Trials that are known and not over; Optuna chooses the others.
        share: How many at a time, and what each may take.
        after_each: Called when a trial is over.

    Raises:
        StoppedError: A signal came; trials that ran saved their state.
    """
    from glmae_ray.jobs.trial_run import run_trial  # brings torch with it

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, cfg=cfg, makers=share.makers)

    # Tables and the screen are ours; of Tune are only the curves for TensorBoard.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    random.seed(cfg.seed)  # of pbt
    watcher = Watcher(cfg, after_each)
    tuner = tune.Tuner(
        # Its workers and makers take the CPUs, which `room` counts. Tune takes no request for
        # nothing: it is a byte.
        tune.with_resources(trial, {"memory": 1}),
        tune_config=tune.TuneConfig(
            max_concurrent_trials=share.trials,
            scheduler=_scheduler(cfg),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            **_algorithm(cfg, todo),
        ),
        param_space=None if cfg.algorithm == "optuna" else _points(todo),
        run_config=tune.RunConfig(
            name=_NAME,
            failure_config=tune.FailureConfig(max_failures=cfg.retries),
            callbacks=[watcher, TBXLoggerCallback()],
            stop=watcher,
            verbose=0,
            **storage(cfg.run),
        ),
    )
    with warnings.catch_warnings():
        # A trial is a run with workers of its own: it leaves no actor that could be used again.
        warnings.filterwarnings("ignore", message="Consider boosting PBT")
        fit_or_stop(tuner.fit, run=cfg.run)


class Watcher(tune.Callback, tune.Stopper):
    """Writes down what becomes of trials, and ends the search when it is asked to stop."""

    def __init__(self, cfg: SearchConfig, after_each: Callable[[], None]) -> None:
        """Watch a search."""
        self._cfg, self._after_each = cfg, after_each
        self._running: set[str] = set()

    @property
    def _search(self) -> Place:
        return to_place(self._cfg.run)

    def on_trial_start(self, *, trial: TuneTrial, **_: Any) -> None:
        """See Tune's `Callback`."""
        write_trial(self._search, _trial(trial))
        self._running.add(str(trial))

    def on_trial_complete(self, *, trial: TuneTrial, **_: Any) -> None:
        """See Tune's `Callback`."""
        self._over(ended(self._cfg, self._search, _trial(trial)))

    def on_trial_recover(self, *, trial: TuneTrial, **_: Any) -> None:
        """See Tune's `Callback`."""
        if stop_requested(self._cfg.run):
            self._running.discard(str(trial))
            return
        left = self._cfg.retries + 1 - trial.run_metadata.num_failures
        print(f"trial {trial}: {_reason(trial)}; {left} more tries", flush=True)

    def on_trial_error(self, *, trial: TuneTrial, **_: Any) -> None:
        """See Tune's `Callback`."""
        self._over(replace(_trial(trial), state="failed", reason=_reason(trial)))

    def _over(self, trial: Trial) -> None:
        self._running.discard(trial.name)
        if trial.state != "finished" and stop_requested(self._cfg.run):
            return  # it is to go on
        write_trial(self._search, trial)
        print(told(trial, figures(run_of(self._search, trial.name))), flush=True)
        self._after_each()

    def __call__(self, _: str, result: dict[str, Any]) -> bool:
        """Whether a trial has done its steps: no scheduler has to look at it any more."""
        return bool(result["is_last"])

    def stop_all(self) -> bool:
        """Whether the search was asked to stop, and those that ran have saved."""
        return not self._running and stop_requested(self._cfg.run) is not None


class Politely(FIFOScheduler):
    """Has trials that another scheduler stops save and end by themselves.

    Tune would kill the trial's actor, and Ray Train's workers with it. What they hold of the
    cluster is then given back by a helper that needs Ray's dashboard, and does not look for it
    where several Rays run on a machine; the next trial would wait for ever.
    """

    def __init__(self, inner: TrialScheduler, ask: Callable[[str], None]) -> None:
        """Do as `inner` says; `ask` takes the name of a trial that is to end."""
        super().__init__()
        self._inner, self._ask, self._asked = inner, ask, set[str]()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """See Tune's `TrialScheduler`."""
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """See Tune's `TrialScheduler`."""
        if trial.trial_id in self._asked:
            return TrialScheduler.CONTINUE
        decision: str = self._inner.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        self._asked.add(trial.trial_id)
        self._ask(str(trial))
        return TrialScheduler.CONTINUE

    def on_trial_complete(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> None:
        """See Tune's `TrialScheduler`."""
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """See Tune's `TrialScheduler`."""
        self._inner.on_trial_remove(tune_controller, trial)


def _trial(trial: TuneTrial) -> Trial:
    return Trial(str(trial), trial.config["trial"]["sample"])


def _reason(trial: TuneTrial) -> str:
    """What a trial said last, from the file on this machine: Tune copies it away later."""
    file = trial.pickled_error_file
    if file is None or not Path(file).exists():
        return "it ended without a word"
    return last_line(pickle.loads(Path(file).read_bytes()))


def _name(trial: TuneTrial) -> str:
    return str(trial.config["trial"]["name"])


def _points(todo: Sequence[Trial]) -> dict[str, Any]:
    points = [{"name": trial.name, "sample": trial.sample} for trial in todo]
    return {"trial": tune.grid_search(points)}


def _algorithm(cfg: SearchConfig, todo: Sequence[Trial]) -> dict[str, Any]:
    if cfg.algorithm == "random":
        return {"num_samples": 1}
    from glmae_ray.jobs.optuna_trials import OptunaTrials

    known = read_trials(to_place(cfg.run))
    over = [trial for trial in known.values() if trial.state != "running"]
    left = cfg.count - len(over)
    return {"num_samples": left, "search_alg": OptunaTrials(cfg, over=over, todo=todo)}


def _scheduler(cfg: SearchConfig) -> TrialScheduler | None:
    steps, every = cfg.example.steps, cfg.judge_every
    if cfg.schedule == "asha":
        scheduler: TrialScheduler = ASHAScheduler(
            "step", "dice", "max", max_t=steps, grace_period=every, reduction_factor=_KEEP
        )
    elif cfg.schedule == "median":
        # Without a slice of time a trial would pause, and start again, until there are enough.
        scheduler = MedianStoppingRule(
            "step", "dice", "max", grace_period=every, min_time_slice=math.inf
        )
    elif cfg.schedule == "pbt":
        return PopulationBasedTraining(
            "step",
            "dice",
            "max",
            perturbation_interval=every,
            hyperparam_mutations={"trial": {"sample": _mutations(cfg)}},
            custom_explore_fn=lambda config: _inside(cfg, config),
        )
    else:
        return None
    _recall(cfg, scheduler)
    search = to_place(cfg.run)
    return Politely(scheduler, lambda name: ask_to_stop(str(place_of(search, name)), "SIGTERM"))


def _recall(cfg: SearchConfig, scheduler: TrialScheduler) -> None:
    """Show a scheduler the trials that were over before this start of the search."""
    search = to_place(cfg.run)
    for trial in read_trials(search).values():
        if trial.state in ("finished", "stopped"):
            known = TuneTrial("known", stub=True, trial_id=f"before-{trial.name}")
            results = [
                {"step": step, "dice": dice}
                for step, dice in sorted(figures(run_of(search, trial.name)).dice.items())
            ]
            scheduler.on_trial_add(None, known)
            for result in results[:-1]:
                scheduler.on_trial_result(None, known, result)
            if results:
                scheduler.on_trial_complete(None, known, results[-1])


def _mutations(cfg: SearchConfig) -> dict[str, Any]:
    """Lists, along which pbt goes to a neighbour, and draws from ranges."""
    draws: dict[str, Any] = {}
    for name, space in cfg.spaces.items():
        if space.is_listed:
            draws[name] = list(space.values)
        else:
            # Tune's own scheduler draws from the module's state, too.
            draws[name] = lambda space=space: space.draw(random.Random(random.random()))
    return draws


def _inside(cfg: SearchConfig, config: dict[str, Any]) -> dict[str, Any]:
    """What pbt has multiplied by 0.8 or 1.2, back inside its range."""
    sample: Tree = config["trial"]["sample"]
    kept = {
        name: value if (space := cfg.spaces[name]).is_listed else space.inside(value)
        for name, value in sample.items()
    }
    return {**config, "trial": {**config["trial"], "sample": kept}}
