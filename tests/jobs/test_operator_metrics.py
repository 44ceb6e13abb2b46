"""What operators are shown: the figures at a node's real endpoint, and a dashboard of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ray.dashboard.modules.metrics import dashboards
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.metrics import Counter, Histogram, Metric

from glmae_ray.jobs.operator_metrics import OperatorMetrics
from glmae_ray.jobs.saving import Saved
from tests.conftest import tiny_config
from tests.jobs.fakes import step_info
from tests.jobs.prometheus import endpoint, figures, total
from tests.models.finetunes import finetune_config

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "glmae.json"


def exported() -> dict[str, set[str]]:
    """Series of ours as Ray names them -> labels of ours."""
    found = {}
    for metric in vars(OperatorMetrics(tiny_config(), rank=0)).values():
        if isinstance(metric, Metric):
            info = metric.info
            name, labels = f"ray_{info['name']}", set(info["tag_keys"])
            assert isinstance(metric, Counter) == name.endswith("_total")
            if isinstance(metric, Histogram):
                found |= {f"{name}_{part}": labels for part in ("count", "sum")}
                found[f"{name}_bucket"] = labels | {"le"}
            else:
                found[name] = labels
    return found


def ray_s_own() -> set[str]:
    """Series that Ray's agents export or its own dashboards show."""
    panels = [path.read_text() for path in Path(dashboards.__file__).parent.glob("*_panels.py")]
    return {f"ray_{name}" for name in METRICS_GAUGES} | set(
        re.findall(r"\bray_\w+", " ".join(panels))
    )


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return variables + [t["expr"] for p in board["panels"] for t in p.get("targets", [])]


def test_the_dashboard_uses_series_and_labels_that_there_are():
    ours, theirs = exported(), ray_s_own()
    used = set()
    for query in queries():
        names = set(re.findall(r"\bray_\w+", query))
        assert names, query
        used |= names
        assert names <= ours.keys() | theirs, query
        if names <= ours.keys():
            by = re.findall(r"\bby \(([^)]*)\)", query)
            labels = {label.strip() for group in by for label in group.split(",")}
            labels |= set(re.findall(r"(\w+)=~?\"", query))
            assert labels <= set.intersection(*(ours[name] for name in names)), query
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in used}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in ours} <= shown


def test_the_dashboard_asks_for_its_source_and_each_panel_takes_it():
    board = json.loads(DASHBOARD.read_text())
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "verb", "run"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.ray
def test_what_a_worker_counts_is_at_the_endpoint_of_its_node(local_ray):
    cfg = finetune_config("run=runs/counted", "global_batch=4", "steps=30")
    first, second = (OperatorMetrics(cfg, rank=rank) for rank in range(2))
    for metrics in (first, second):
        metrics.begin(0)
        metrics.begin(2)
        metrics.step(step_info(7))
        metrics.saved(Saved(0.5, None))
        metrics.saved(Saved(0.25, 3.0))
        metrics.event("stand_in")
    first.logged({"loss": 0.75, "skipped_steps": 0})
    first.logged({"loss": 0.5, "skipped_steps": 3})

    found = figures(
        endpoint(),
        until=lambda found: {f.name for f in found} == exported().keys(),
        verb="finetune",
        run="counted",
    )
    assert {(f.name, f.value) for f in found if "rank" not in f.labels} == {
        ("ray_glmae_samples_total", 4),
        ("ray_glmae_skipped_samples_total", 12),
        ("ray_glmae_restarts_total", 1),
        ("ray_glmae_checkpoints_total", 2),
        ("ray_glmae_checkpoint_seconds_total", 0.75),
        ("ray_glmae_checkpoint_write_seconds", 3),
        ("ray_glmae_step", 7),
        ("ray_glmae_planned_steps", 30),
        ("ray_glmae_loss", 0.5),
    }
    for rank in "01":
        seconds = total(found, "ray_glmae_step_seconds_total", rank=rank)
        assert seconds == pytest.approx(step_info(7).step_s)
        waited = total(found, "ray_glmae_data_wait_seconds_total", rank=rank)
        assert waited == pytest.approx(step_info(7).wait_s)
        assert total(found, "ray_glmae_step_duration_seconds_bucket", rank=rank, le="0.1") == 1
        assert total(found, "ray_glmae_events_total", rank=rank, kind="stand_in") == 1
