"""Profiles: variables that Ray knows, a user's own that win, and a page that says the same."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import ray
from ray._private import ray_constants
from ray.dashboard.modules.job import job_supervisor
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from glmae_ray.config_run import ResourcesConfig
from glmae_ray.jobs import profiles
from glmae_ray.jobs.profiles import COLLECTIVE, DRAIN, PROFILES, WATCHER, apply, exports

DOCUMENT = Path(__file__).parents[2] / "docs" / "running.md"
ALL = pytest.mark.parametrize("name", list(PROFILES))


@pytest.fixture(autouse=True)
def _environment_as_before(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(WATCHER, None)
    for profile in PROFILES.values():
        for variable in (*profile.driver, *profile.start):
            os.environ.pop(variable, None)


def test_the_config_knows_the_profiles_and_takes_the_local_one():
    field = ResourcesConfig.model_fields["profile"]
    assert set(get_args(field.annotation)) == set(PROFILES)
    assert field.default == "local"


@ALL
def test_ray_train_sends_every_variable_of_the_driver_on(name):
    assert set(PROFILES[name].driver) <= ENV_VARS_TO_PROPAGATE


@ALL
def test_ray_reads_every_variable_of_a_node(name):
    # What Ray's servers read is compiled into them, as RAY_ and the name of the setting.
    server = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    compiled = server.read_bytes()
    python = inspect.getsource(ray_constants) + inspect.getsource(job_supervisor)
    for variable in PROFILES[name].start:
        assert variable.encode() + b"\0" in compiled or f'"{variable}"' in python, variable


@ALL
def test_ray_takes_the_limits(name):
    profile = PROFILES[name]
    known = {field.name for field in dataclasses.fields(FailureConfig)}
    limits = {
        *("max_failures", "max_preemption_failures", "controller_failure_limit"),
        *("relax_collectives_on_preemption", "preemption_grace_s"),
    }
    assert limits <= known
    FailureConfig(**{limit: getattr(profile, limit) for limit in limits})
    interval = profile.elastic_resize_monitor_interval_s
    ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=interval)


@ALL
def test_times_are_in_the_order_in_which_they_have_to_pass(name):
    profile = PROFILES[name]
    driver = {variable: float(value) for variable, value in profile.driver.items()}
    # A hang is named by the run's own watch before anything of Ray's gives up.
    assert driver[profiles.SILENCE] < profile.hang_s < driver[COLLECTIVE]
    assert driver[profiles.POLL] < driver[profiles.SILENCE]
    # Each wait has several tries to place the workers.
    assert profile.wait_s >= 4 * driver[profiles.PLACING]
    if DRAIN in profile.start:
        assert driver[profiles.NOTICE] < float(profile.start[DRAIN]) / 5
        assert float(profile.start[DRAIN]) < 30  # of a pod's grace period


def test_more_of_what_comes_and_goes_is_borne_from_profile_to_profile():
    limits = [profile.max_failures for profile in PROFILES.values()]
    waits = [profile.wait_s for profile in PROFILES.values()]
    assert list(PROFILES) == ["local", "cluster", "spot"]
    assert limits == sorted(set(limits))
    assert waits == sorted(set(waits))


@ALL
def test_what_the_user_exports_wins(name):
    profile = PROFILES[name]
    first, *others = profile.driver
    os.environ[first] = "from the user"
    apply(profile)
    assert os.environ[first] == "from the user"
    for variable in others:
        assert os.environ[variable] == profile.driver[variable]
    assert not set(profile.start) & set(os.environ)


def test_a_ray_that_is_started_here_gets_what_is_for_nodes():
    apply(PROFILES["spot"], starts_ray=True)
    for variable, value in PROFILES["spot"].start.items():
        assert os.environ[variable] == value


def test_only_a_ray_that_is_started_here_has_nobody_who_looks_for_nodes_that_leave():
    assert WATCHER in ENV_VARS_TO_PROPAGATE
    apply(PROFILES["spot"])
    assert WATCHER not in os.environ
    apply(PROFILES["spot"], starts_ray=True)
    assert os.environ[WATCHER] == "0"


def test_collectives_of_ray_wait_longer_than_a_hang_that_is_stated():
    apply(PROFILES["cluster"], hang_s=60)
    assert os.environ[COLLECTIVE] == PROFILES["cluster"].driver[COLLECTIVE]
    del os.environ[COLLECTIVE]
    apply(PROFILES["cluster"], hang_s=7200)
    assert os.environ[COLLECTIVE] == "14400"


def test_profiles_are_known_without_ray_and_torch():
    script = (
        "import sys, glmae_ray.jobs.profiles; assert not {'ray', 'torch'} & set(sys.modules), 'ray'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@ALL
def test_the_page_about_running_has_the_values(name):
    text = DOCUMENT.read_text(encoding="utf-8")
    for line in exports(PROFILES[name]):
        assert line in text, line
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6]
    column = 1 + list(PROFILES).index(name)
    cells = {row.split("|")[1].strip(" `"): row.split("|")[1 + column].strip() for row in rows}
    profile = PROFILES[name]
    for variable in (profiles.POLL, profiles.SILENCE, profiles.PLACING, profiles.NOTICE):
        assert cells[variable] == profile.driver.get(variable, "-"), variable
    assert cells[COLLECTIVE] == profile.driver[COLLECTIVE]
    for limit in ("max_failures", "hang_s", "wait_s", "elastic_resize_monitor_interval_s"):
        assert cells[limit] == f"{getattr(profile, limit):g}", limit
