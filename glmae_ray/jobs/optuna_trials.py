"""Optuna as the one who chooses trials: TPE on what the trials before it measured.

It is told of all trials anew at each start of a search; nothing of Optuna's own is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from glmae_ray.config_search import SearchConfig, Tree
from glmae_ray.errors import UserError
from glmae_ray.jobs.trials import Figures, Trial, ended, figures, name_of, run_of, write_trial
from glmae_ray.paths import to_place
from glmae_ray.search_space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)


class OptunaTrials(Searcher):
    """Gives Tune trials that were interrupted, then those that Optuna chooses."""

    def __init__(self, cfg: SearchConfig, *, over: Sequence[Trial], todo: Sequence[Trial]) -> None:
        """Tell Optuna what is known.

        Args:
            cfg: The search.
            over: Trials that are.
            todo: Trials that were interrupted.
        """
        super().__init__("dice", "max")
        self._cfg, self._search = cfg, to_place(cfg.run)
        self._space = distributions(cfg.spaces)
        weighs = cfg.objective == "dice_and_seconds"
        self._study = optuna.create_study(
            directions=["maximize", "minimize"] if weighs else ["maximize"],
            # Another seed at each start: the same would choose again what it chose at first.
            sampler=optuna.samplers.TPESampler(seed=cfg.seed + len(over) + len(todo)),
        )
        for trial in over:
            self._study.add_trial(_frozen(cfg, trial, figures(run_of(self._search, trial.name))))
        for trial in todo:
            self._study.enqueue_trial(_encoded(self._space, trial.sample))
        self._again = [trial.name for trial in todo]
        self._next = len(over) + len(todo)
        self._open: dict[str, tuple[optuna.Trial, Trial]] = {}  # by Tune's id

    def suggest(self, trial_id: str) -> Tree | str | None:
        """See Tune's `Searcher`; samples whose fields do not fit each other are written off."""
        while self._again or self._next < self._cfg.count:
            asked = self._study.ask(self._space)
            trial = Trial(self._name(), _decoded(self._space, asked.params))
            try:
                self._cfg.trial(trial.sample, run=self._cfg.run)
            except UserError as error:
                write_trial(self._search, Trial(trial.name, trial.sample, "failed", str(error)))
                self._study.tell(asked, state=TrialState.FAIL)
                continue
            self._open[trial_id] = asked, trial
            return {"trial": {"name": trial.name, "sample": trial.sample}}
        return Searcher.FINISHED

    def _name(self) -> str:
        if self._again:
            return self._again.pop(0)
        self._next += 1
        return name_of(self._next - 1)

    def on_trial_complete(self, trial_id: str, *_: Any, error: bool = False, **__: Any) -> None:
        """See Tune's `Searcher`."""
        asked, trial = self._open.pop(trial_id)
        if error:
            self._study.tell(asked, state=TrialState.FAIL)
            return
        found = figures(run_of(self._search, trial.name))
        done = _frozen(self._cfg, ended(self._cfg, self._search, trial), found)
        if len(self._study.directions) == 1:
            for step, dice in done.intermediate_values.items():
                asked.report(dice, step)
        is_complete = done.state == TrialState.COMPLETE
        self._study.tell(asked, done.values if is_complete else None, state=done.state)

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for it; nothing is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def importances(spaces: Mapping[str, Space], measured: Sequence[tuple[Tree, float]]) -> Tree:
    """How much each field matters for the figure: PED-ANOVA, shares that sum to 1.

    Args:
        spaces: The fields.
        measured: Samples, and the figure of each of which more is better.
    """
    space = distributions(spaces)
    study = optuna.create_study(direction="maximize")
    for sample, value in measured:
        params = _encoded(space, sample)
        study.add_trial(create_trial(params=params, distributions=space, value=value))
    evaluator = PedAnovaImportanceEvaluator()
    return get_param_importances(study, evaluator=evaluator, params=list(space))


def distributions(spaces: Mapping[str, Space]) -> dict[str, BaseDistribution]:
    """The same as Optuna says it; listed values as JSON, as it takes no lists among them."""
    found: dict[str, BaseDistribution] = {}
    for name, space in spaces.items():
        if space.is_listed:
            found[name] = CategoricalDistribution([json.dumps(value) for value in space.values])
            continue
        low, high, *step = space.values
        if space.kind == "randint":
            found[name] = IntDistribution(low, high - 1)
        elif space.kind == "quniform":
            found[name] = FloatDistribution(low, space.inside(high), step=step[0])
        else:
            found[name] = FloatDistribution(low, high, log=space.kind == "loguniform")
    return found


def _encoded(space: Mapping[str, BaseDistribution], sample: Tree) -> Tree:
    return {
        name: json.dumps(value) if isinstance(space[name], CategoricalDistribution) else value
        for name, value in sample.items()
    }


def _decoded(space: Mapping[str, BaseDistribution], params: Tree) -> Tree:
    return {
        name: json.loads(value) if isinstance(space[name], CategoricalDistribution) else value
        for name, value in params.items()
    }


def _frozen(cfg: SearchConfig, trial: Trial, found: Figures) -> FrozenTrial:
    """A trial that is over, as Optuna takes it: one that was stopped is pruned."""
    space = distributions(cfg.spaces)
    state, values = TrialState.FAIL, None
    if trial.state == "finished" and found.last is not None:
        state, values = TrialState.COMPLETE, [found.last]
        if cfg.objective == "dice_and_seconds":
            values.append(found.seconds)
    elif trial.state == "stopped":
        state = TrialState.PRUNED
    return create_trial(
        state=state,
        values=values,
        params=_encoded(space, trial.sample),
        distributions=space,
        intermediate_values=found.dice,
    )
