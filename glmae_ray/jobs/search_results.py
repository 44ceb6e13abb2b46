"""What a search leaves: a table of its trials, the best config, two pictures."""

from __future__ import annotations

import importlib.util
import io
import json
from typing import Any, NamedTuple

import yaml

from glmae_ray.config_search import SearchConfig, Tree
from glmae_ray.jobs.forking import FORK
from glmae_ray.jobs.trials import Figures, Trial, figures, read_trials, run_of
from glmae_ray.paths import Place, publish, read_file, to_place
from glmae_ray.search_pictures import draw_importance, draw_parallel
from glmae_ray.store.index import write_rows

TABLE, BEST = "trials.parquet", "best.yaml"
_FEW = 4  # trials, with fewer of which a picture says nothing


class Measured(NamedTuple):
    """A trial with what it measured."""

    trial: Trial
    found: Figures


def measured(cfg: SearchConfig) -> list[Measured]:
    """All trials that were begun, in order."""
    search = to_place(cfg.run)
    return [
        Measured(trial, figures(run_of(search, name)))
        for name, trial in read_trials(search).items()
    ]


def best_of(all_of_them: list[Measured]) -> Measured | None:
    """The trial with the highest Dice after its last step, of those that finished.

    Not the highest on the way, which flatters.
    """
    finished = [one for one in all_of_them if one.trial.state == "finished" and one.found.dice]
    return max(finished, key=lambda one: one.found.last or 0.0, default=None)


def leave_table(cfg: SearchConfig) -> None:
    """Write trials.parquet and, once a trial has finished, best.yaml."""
    search, found = to_place(cfg.run), measured(cfg)
    front = _front(cfg, found)
    columns = {name: _column([one.trial.sample.get(name) for one in found]) for name in cfg.spaces}
    rows = [
        {
            "trial": one.trial.name,
            **{name: column[number] for name, column in columns.items()},
            "state": one.trial.state,
            "dice_best": one.found.best,
            "dice_last": one.found.last,
            "step": one.found.step,
            "seconds": one.found.seconds,
            "is_best": one.trial.name in front,
            "reason": one.trial.reason,
            "run": str(run_of(search, one.trial.name)),
        }
        for number, one in enumerate(found)
    ]
    write_rows(search / TABLE, rows)
    if best := best_of(found):
        publish(search / BEST, _best_text(cfg, best))


def leave_pictures(cfg: SearchConfig) -> str | None:
    """Write pictures/; what is to be said of them."""
    found = [one for one in measured(cfg) if one.found.dice]
    if len(found) < _FEW:
        return f"pictures: none, fewer than {_FEW} trials have a Dice"
    # All are compared after the last step that all of them have seen.
    step = min(one.found.step for one in found)
    values = [one.found.dice[max(s for s in one.found.dice if s <= step)] for one in found]
    columns = {name: _column([one.trial.sample[name] for one in found]) for name in cfg.spaces}
    logs = {name for name, space in cfg.spaces.items() if space.kind == "loguniform"}
    _save(cfg, "parallel", draw_parallel(columns, values, logs=logs))
    if importlib.util.find_spec("optuna") is None:
        return "pictures: importance.png needs Optuna: pip install glmae-ray[tune]"
    from glmae_ray.jobs.optuna_trials import importances

    samples = [one.trial.sample for one in found]
    shares = importances(cfg.spaces, list(zip(samples, values, strict=True)))
    title = f"PED-ANOVA of the Dice after step {step}, {len(found)} trials"
    _save(cfg, "importance", draw_importance(shares, title=title))
    return None


def _save(cfg: SearchConfig, name: str, figure: Any) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    publish(to_place(cfg.run) / "pictures" / f"{name}.png", png.getvalue())


def _front(cfg: SearchConfig, found: list[Measured]) -> set[str]:
    """Trials that none beats: one, or those with another balance of Dice and seconds."""
    best = best_of(found)
    if best is None:
        return set()
    if cfg.objective == "dice":
        return {best.trial.name}
    points = {
        one.trial.name: (one.found.last or 0.0, -one.found.seconds)
        for one in found
        if one.trial.state == "finished" and one.found.dice
    }
    return {
        name
        for name, point in points.items()
        if not any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )
    }


def _column(values: list[Any]) -> list[Any]:
    """Values as one type: numbers, words or booleans; what is mixed or a list becomes JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str}):
        return values
    return [None if value is None else json.dumps(value) for value in values]


def _best_text(cfg: SearchConfig, best: Measured) -> str:
    trial, found = best
    tree: Tree = cfg.trial_tree(trial.sample, run="")
    fields = {name: value for name, value in tree.items() if name not in ("store", "run")}
    run: Place = run_of(to_place(cfg.run), trial.name)
    lines = [
        f"# glmae finetune {to_place(cfg.run) / BEST} store={cfg.store} run=RUN",
        f"# Trial {trial.name}: Dice {found.last:.4f} after step {found.step}, in {run}",
    ]
    if read_file(run / FORK) is not None:
        lines.append("# Its fields changed on the way: they are those at its end; see fork.json.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(fields, sort_keys=False)
