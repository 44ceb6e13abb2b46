"""A run that goes on with another number of workers, in every ZeRO stage."""

from __future__ import annotations

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from glmae_ray.engine import Engine
from glmae_ray.loop import mean_over_workers, train_steps
from glmae_ray.paths import UNFINISHED, names_in
from glmae_ray.universal import SAVED, UNIVERSAL, read_rest, to_universal
from tests.conftest import tiny_config
from tests.test_engine_and_loop import (
    batches,
    build_engine,
    in_own_process,
    save,
    share_all_weights,
)

pytestmark = pytest.mark.slow

RUN = ["steps=12", "global_batch=6", "optim.base_lr=0.1", "optim.warmup_steps=1"]
STAGES = ["0", "1", "2", "3"]


class Leg(NamedTuple):
    """Some steps of a run.

    Attributes:
        name: Also of the folder in which it saves.
        workers: How many train.
        begin: Steps done before.
        end: Steps done after.
        save: Steps done when it saves.
        loads: The leg whose folder it loads first, and that leg's number of workers.
    """

    name: str
    workers: int
    begin: int
    end: int
    save: int
    loads: tuple[str, int] = ("", 0)


WHOLE = Leg("whole", 2, 0, 12, 4)
FEWER = Leg("fewer", 1, 4, 8, 8, ("whole", 2))
BACK = Leg("back", 2, 8, 12, 12, ("fewer", 1))
MORE = Leg("more", 3, 4, 8, 8, ("whole", 2))


def train(words: list[str], folder: str) -> dict[str, Any]:
    """Go one leg in every stage of `folder/leg.json`; what was found, by stage."""
    settings = json.loads(Path(folder, "leg.json").read_text())
    share_all_weights()
    found = {}
    for stage in settings["stages"]:
        cfg = tiny_config(*words, f"engine.zero_stage={stage}")
        found[stage] = _train(build_engine(cfg), Leg(*settings["leg"]), Path(folder, stage), cfg)
    return found


def _train(engine: Engine, leg: Leg, folder: Path, cfg: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": []}
    before, saved_workers = leg.loads
    if before:
        if engine.zero_stage:
            with pytest.raises(FileNotFoundError) as refused:
                engine.load(folder, saved_workers=saved_workers)
            found["refused"] = str(refused.value)
        engine.load(folder / before, saved_workers=saved_workers)
        found["loaded"] = contents(engine)
    for info in train_steps(engine, batches(cfg), cfg=cfg, start=leg.begin):
        found["losses"].append(mean_over_workers(info.outputs)["loss"])
        if info.step == leg.save:
            save(engine, folder / leg.name)
            found["saved"] = contents(engine)
        if info.step == leg.end:
            break
    found["end"] = contents(engine)
    if before:
        engine.load(folder / before, saved_workers=saved_workers)
    else:
        engine.load(folder / leg.name)
    found["rewound"] = contents(engine)
    return found


def contents(engine: Engine) -> dict[str, list[float]]:
    """For every tensor two numbers that are others if it is; then steps, weight decay, scale."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine._optimizer.optimizer if engine.zero_stage else engine._optimizer
    if engine.zero_stage in (1, 2):
        # Else `safe_get_full_optimizer_state` misses the moments of the second group.
        engine._optimizer._hp_optimizer_states_linked = False
        engine._optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, weight in engine.module.named_parameters():
        if not weight.requires_grad:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            of = optimizer.state.get(weight)
            moment = of[key] if of else safe_get_full_optimizer_state(weight, key)
            found[f"{name} {key}"] = _number(moment)
        if engine.zero_stage:
            found[f"{name} float32"] = _number(safe_get_full_fp32_param(weight))
    with engine.whole_parameters():
        found |= {name: _number(value) for name, value in engine.module.state_dict().items()}
    found["steps"] = sorted({float(state["step"]) for state in optimizer.state.values()})
    found["decay"] = [group["weight_decay"] for group in optimizer.param_groups]
    found["scale"] = list(engine._scale.state_dict().values()) if engine._scale else []
    return found


def _number(value: torch.Tensor) -> list[float]:
    assert value.dtype == torch.float32
    numbers = value.detach().double().flatten()
    places = torch.arange(1, 1 + len(numbers), dtype=torch.double)
    return [float(numbers @ places), float(numbers @ numbers)]


def go(folder: Path, leg: Leg, stages: list[str], *words: str) -> dict[str, dict[str, Any]]:
    """Convert what a leg loads, and go it."""
    before = leg.loads[0]
    if before:
        converted = [folder / stage / before for stage in stages if stage != "0"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(to_universal, converted, converted))
    (folder / "leg.json").write_text(json.dumps({"stages": stages, "leg": leg}))
    return in_own_process(
        [*RUN, f"resources.workers={leg.workers}", *words],
        folder,
        function="tests.test_universal.train",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run: 12 steps on 2 workers, with a checkpoint after 4."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def legs(run) -> dict[str, dict[str, dict[str, Any]]]:
    """What was found on every leg: 12 steps on 2 workers, then, from its 4th, on 1, 2 and 3."""
    found = {leg.name: go(run, leg, STAGES) for leg in (WHOLE, FEWER, BACK)}
    return found | {MORE.name: go(run, MORE, ["3"])}


CHANGED = [*((leg, stage) for leg in (FEWER, BACK) for stage in STAGES), (MORE, "3")]


@pytest.mark.parametrize(("leg", "stage"), CHANGED)
def test_what_another_number_of_workers_loads_is_what_was_saved(legs, leg, stage):
    before, _ = leg.loads
    assert legs[leg.name][stage]["loaded"] == legs[before][stage]["saved"]


@pytest.mark.parametrize(("leg", "stage"), CHANGED)
def test_a_run_goes_on_with_another_number_of_workers_as_if_nothing_had_happened(legs, leg, stage):
    losses = legs["whole"][stage]["losses"][leg.begin : leg.end]
    assert legs[leg.name][stage]["losses"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_teacher_and_centre_end_where_those_of_an_undisturbed_run_end(legs, stage):
    end, whole = legs["back"][stage]["end"], legs["whole"][stage]["end"]
    frozen = [name for name in whole if name.startswith(("teacher", "center"))]
    assert len(frozen) == 38
    for name in frozen:
        assert end[name][1] == pytest.approx(whole[name][1], rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize(("leg", "stage"), [*((WHOLE, stage) for stage in STAGES), *CHANGED])
def test_a_run_loads_again_in_its_middle(legs, leg, stage):
    found = legs[leg.name][stage]
    assert found["rewound"] == found.get("loaded", found["saved"])
    assert found["rewound"] != found["end"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_without_what_another_number_of_workers_needs_nothing_is_loaded(run, legs, stage):
    made = run / stage / UNIVERSAL
    assert legs["fewer"][stage]["refused"].startswith(f"{made}: not there")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_changes_its_number_of_workers_too(tmp_path, precision):
    word = f"engine.precision={precision}"
    legs = {leg.name: go(tmp_path, leg, STAGES, word) for leg in (WHOLE, FEWER, BACK, MORE)}
    for leg, stage in itertools.product((FEWER, BACK, MORE), STAGES):
        found, (before, _) = legs[leg.name][stage], leg.loads
        assert found["loaded"] == legs[before][stage]["saved"]
        losses = legs["whole"][stage]["losses"][leg.begin : leg.end]
        assert found["losses"] == pytest.approx(losses, rel=0.02)


@pytest.fixture
def saved(run, legs, tmp_path) -> Path:
    """A checkpoint of stage 1 by two workers, and what was made of it for one."""
    return shutil.copytree(run / "1" / "whole", tmp_path / "step [4] (a+b)")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


WEIGHT = "zero/encoder.cls_token/fp32.pt"


@pytest.mark.parametrize("harm", [Path.unlink, _cut, _flip])
@pytest.mark.parametrize("name", [WEIGHT, "rest.pt", "files.json"])
def test_a_folder_that_is_not_as_it_was_made_is_not_loaded(saved, harm, name):
    read_rest(saved)
    harm(saved / UNIVERSAL / name)
    with pytest.raises(FileNotFoundError, match="not there, or not as to_universal has made it"):
        read_rest(saved)


def test_it_is_made_anew_over_one_that_is_there_and_what_was_killed(saved):
    rest = read_rest(saved)
    (saved / UNIVERSAL / WEIGHT).unlink()
    (saved / f"{UNIVERSAL}.killed{UNFINISHED}" / UNIVERSAL).mkdir(parents=True)
    names = names_in(saved / UNIVERSAL / "zero")
    to_universal(saved, saved)
    again = read_rest(saved)
    assert set(again) == set(rest)
    assert all(torch.equal(again[name], rest[name]) for name in rest)
    assert names_in(saved / UNIVERSAL / "zero") == names
    assert names_in(saved) == {"engine", UNIVERSAL}


def _no_step(file: Path) -> None:
    states = torch.load(file, weights_only=False)
    torch.save(states | {"skipped_steps": states["global_steps"]}, file)


@pytest.mark.parametrize(
    ("stage", "name", "harm", "error"),
    [
        ("1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", Path.unlink, "rank_1_mp_rank_00_optim"),
        ("3", "zero_pp_rank_1_mp_rank_00_model_states.pt", Path.unlink, "rank_1_mp_rank_00_model"),
        ("3", "zero_pp_rank_0_mp_rank_00_model_states.pt", Path.unlink, "rank_0_mp_rank_00_model"),
        ("2", "zero_pp_rank_1_mp_rank_00_optim_states.pt", _cut, "DeepSpeed cannot convert it: "),
        ("1", "mp_rank_00_model_states.pt", _no_step, "no step was taken"),
    ],
)
def test_nothing_is_made_of_what_is_not_whole(run, legs, tmp_path, stage, name, harm, error):
    shutil.copytree(run / stage / "whole" / SAVED, tmp_path / SAVED)
    harm(tmp_path / SAVED / name)
    with pytest.raises((FileNotFoundError, RuntimeError), match=error):
        to_universal(tmp_path, tmp_path / "out")
    assert names_in(tmp_path / "out") == set()
