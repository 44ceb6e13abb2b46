"""What runs one trial inside a Tune function: the finetuning job, and its Dice told to Tune."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune

from glmae_ray import checkpoint
from glmae_ray.beside import beside
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_search import SearchConfig, Tree
from glmae_ray.errors import StoppedError
from glmae_ray.jobs import finetune
from glmae_ray.jobs.forking import fork
from glmae_ray.jobs.run_folder import CONFIG
from glmae_ray.jobs.stopping import ask_to_stop, stop_requested
from glmae_ray.jobs.trials import figures, next_run_of, place_of, run_of
from glmae_ray.paths import read_file, to_place

_LOOK_S = 0.5
_MARK = "reported.json"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a run tells off the screen, where trials run beside each other."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


class Mark(NamedTuple):
    """What a trial hands to Tune as its checkpoint: where it stood. The real one is in its run.

    Attributes:
        trial: Its name; pbt gives a trial that of a better one, from which it is to go on.
        step: That was reported.
    """

    trial: str
    step: int


def run_trial(config: dict[str, Any], *, cfg: SearchConfig, makers: int | None) -> None:
    """Run a trial to its end, or on from where it was interrupted; a Tune function.

    Args:
        config: Tune's; `trial` has the sample.
        cfg: The search.
        makers: Of views, at most.

    Raises:
        StoppedError: The search was asked to stop; the state is saved. To Tune it is no result.
    """
    if name := stop_requested(cfg.run):
        raise StoppedError(signal.Signals[name])
    # Not of `config`, which pbt replaces with that of another trial.
    name, sample = tune.get_context().get_trial_name(), config["trial"]["sample"]
    mark = _mark()
    run = _run(cfg, name, sample, mark)
    told = _Told(cfg, name, run, after=mark.step if mark else 0)
    pipeline = run.pipeline.model_copy(update={"makers": makers})
    run = run.model_copy(update={"pipeline": pipeline})
    while not _leg(run, told):
        if stop_requested(cfg.run):
            raise StoppedError(signal.SIGTERM)
        if cfg.schedule != "pbt":
            return  # it is behind
        # Tune may pause the trial now, and nothing of it runs.
        told.rest(is_complete=False)
    told.rest(is_complete=True)


def _leg(run: FinetuneConfig, told: _Told) -> bool:
    """Train until the end, or until somebody asks to stop; whether it was the end."""
    try:
        with _quiet(), beside(told.follow, name="told"):
            finetune.run(run)
    except StoppedError:
        return False
    return True


def _run(cfg: SearchConfig, name: str, sample: Tree, mark: Mark | None) -> FinetuneConfig:
    """The run of the trial, begun from another trial's checkpoint where that is to be."""
    search = to_place(cfg.run)
    run = cfg.trial(sample, run=str(run_of(search, name)))
    if mark is None or mark.trial == name or not _differs(run, sample):
        return run
    old, child = run_of(search, name), next_run_of(search, name)
    fork(lambda: run_of(search, mark.trial), child, changes=sample)
    for left in checkpoint.complete(old):
        checkpoint.remove(left.place)
    return cfg.trial(sample, run=str(child))


def _differs(run: FinetuneConfig, sample: Tree) -> bool:
    """Whether the run in a trial's folder was begun with another sample."""
    before, now = json.loads(read_file(to_place(run.run) / CONFIG) or b"{}"), run.model_dump()
    return any(_at(before, name) != _at(json.loads(json.dumps(now)), name) for name in sample)


def _at(tree: Tree, name: str) -> Any:
    value: Any = tree
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mark() -> Mark | None:
    given = tune.get_checkpoint()
    if given is None:
        return None
    with given.as_directory() as folder:
        return Mark(**json.loads((Path(folder) / _MARK).read_text(encoding="utf-8")))


class _Told:
    """Reports each new held-out Dice of a run, and hands a wish to stop on to its workers.

    Of pbt, which may have the trial go on from another's checkpoint, only when the run rests: it
    stops at every judgement.
    """

    def __init__(self, cfg: SearchConfig, name: str, run: FinetuneConfig, *, after: int) -> None:
        self._cfg, self._name, self._step = cfg, name, after
        self._run, self._steps = to_place(run.run), run.steps
        self._trial = str(place_of(to_place(cfg.run), name))  # by which a scheduler asks

    def follow(self, stop: threading.Event) -> None:
        """Report as long as the run goes on; its last step not before it has left its files."""
        while not stop.wait(_LOOK_S):
            wish = stop_requested(self._cfg.run) or stop_requested(self._trial)
            if wish:
                ask_to_stop(str(self._run), wish)
            elif self._cfg.schedule != "pbt":
                self.rest(is_complete=False)
            elif self._is_due():
                ask_to_stop(str(self._run), "SIGTERM")

    def _is_due(self) -> bool:
        """Whether a judgement of pbt is, after which the run is not at its end."""
        every = self._cfg.judge_every
        due = (self._step // every + 1) * every
        return due < self._steps and due in figures(self._run).dice

    def rest(self, *, is_complete: bool) -> None:
        """Report what is new."""
        found = figures(self._run)
        for step, dice in sorted(found.dice.items()):
            if step <= self._step or (step >= self._steps and not is_complete):
                continue
            self._step = step
            with tempfile.TemporaryDirectory() as folder:
                mark = json.dumps(Mark(self._name, step)._asdict())
                (Path(folder) / _MARK).write_text(mark, encoding="utf-8")
                record = {"dice": dice, "step": step, "seconds": found.seconds}
                record["is_last"] = step >= self._steps
                tune.report(record, checkpoint=tune.Checkpoint.from_directory(folder))
