"""Manifests for KubeRay: the shipped ones are right, and wrong ones are found before they run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from cluster.validate import main, mistakes
from glmae_ray.jobs.profiles import PROFILES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
KUBECTL = shutil.which("kubectl")

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")

Documents = list[dict[str, Any]]


def render(folder: Path) -> str:
    command = [str(KUBECTL), "kustomize", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def with_options(folder: Path, kind: str, *options: str) -> str:
    """What a user's copy of `kind` gives that names these options."""
    shutil.copytree(FOLDER, folder)
    path = folder / kind / "kustomization.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["components"] = [f"../options/{option}" for option in options]
    path.write_text(yaml.safe_dump(tree))
    return render(folder / kind)


@pytest.fixture(scope="module")
def job() -> str:
    return render(FOLDER / "job")


@pytest.fixture(scope="module")
def cluster() -> str:
    return render(FOLDER / "cluster")


def one(text: str, kind: str) -> dict[str, Any]:
    (found,) = [d for d in yaml.safe_load_all(text) if d["kind"] == kind]
    return found


def kinds(text: str) -> set[str]:
    return {document["kind"] for document in yaml.safe_load_all(text)}


def test_the_manifests_are_right(job, cluster, tmp_path, capsys):
    for name, text in (("job", job), ("cluster", cluster)):
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path / "job"), str(tmp_path / "cluster")]) == 0
    assert capsys.readouterr().out.count("no mistake found") == 2
    assert kinds(job) == {"ConfigMap", "PersistentVolumeClaim", "RayJob"}
    assert kinds(cluster) == {"ConfigMap", "PersistentVolumeClaim", "RayCluster"}


def test_a_job_s_cluster_is_the_one_that_stays(job, cluster):
    assert one(job, "RayJob")["spec"]["rayClusterSpec"] == one(cluster, "RayCluster")["spec"]


@pytest.mark.parametrize("options", [["disk"], ["s3"], ["s3", "spot"], ["disk", "kueue"]])
def test_options_go_together(options, tmp_path):
    text = with_options(tmp_path / "mine", "cluster", *options)
    assert list(mistakes(text)) == []
    pods = [group["template"]["spec"] for group in groups_of(one(text, "RayCluster")["spec"])]
    assert all(("volumes" in pod) == ("disk" in options) for pod in pods)
    assert all((pod.get("serviceAccountName") == "glmae") == ("s3" in options) for pod in pods)


def test_a_job_in_a_queue_of_kueue(tmp_path):
    text = with_options(tmp_path / "mine", "job", "disk", "kueue")
    # What the comment in job/kustomization.yaml says has to be changed with it.
    for old, new in (("profile=spot", "profile=cluster"), ("resources.autoscales=true", "")):
        text = text.replace(old, new)
    assert list(mistakes(text)) == []
    document = one(text, "RayJob")
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "glmae"}
    spec = document["spec"]["rayClusterSpec"]
    assert not spec["enableInTreeAutoscaling"]
    assert {g["groupName"]: g.get("replicas") for g in spec["workerGroupSpecs"]} == {
        "gpu": 4, "gpu-spot": None, "makers": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "profile"), [(["disk"], "cluster"), (["disk", "spot"], "spot")]
)
def test_nodes_start_in_the_environment_of_a_profile(options, profile, tmp_path):
    text = with_options(tmp_path / "mine", "cluster", *options)
    assert one(text, "ConfigMap")["data"] == dict(PROFILES[profile].start)
    for group in groups_of(one(text, "RayCluster")["spec"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": "glmae-profile"}}]
        assert "env" not in container


def test_versions_are_those_of_the_constraints(cluster):
    constraints = (ROOT / "constraints.txt").read_text()
    version = re.search(r"^ray==(.*)$", constraints, re.MULTILINE)[1]
    assert one(cluster, "RayCluster")["spec"]["rayVersion"] == version == ray.__version__


# What Ray's autoscaler makes of it


Launch = Callable[..., dict[str, int]]


@pytest.fixture
def launched(cluster) -> Launch:
    """Which nodes Ray's autoscaler would start, from the head alone."""
    tree = _derive_autoscaling_config_from_ray_cr(one(cluster, "RayCluster"))
    types = AutoscalingConfig(tree, skip_content_hash=True)

    def launch(bundle: dict[str, float], *, times: int, pool: str = "", failed: str = ""):
        labels = [[("pool", LabelSelectorOperator.LABEL_OPERATOR_IN, [pool])]] if pool else None
        requests = [ResourceRequestUtil.make(bundle, label_selectors=labels)] * times
        request = SchedulingRequest(
            node_type_configs=types.get_node_type_configs(),
            max_num_nodes=types.get_max_num_nodes(),
            disable_launch_config_check=True,
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            recoverable_resource_availabilities={failed: 0.0} if failed else {},
        )
        reply = ResourceDemandScheduler().schedule(request)
        assert not reply.infeasible_resource_requests
        return {found.instance_type: found.count for found in reply.to_launch}

    return launch


def test_ray_starts_spot_machines_first(launched):
    assert launched({"CPU": 1, "GPU": 1}, times=3) == {"gpu-spot": 3}


def test_ray_starts_others_where_there_are_no_spot_machines(launched):
    assert launched({"CPU": 1, "GPU": 1}, times=3, failed="gpu-spot") == {"gpu": 3}


def test_ray_starts_nodes_for_makers_by_their_label(launched):
    assert launched({"CPU": 1}, times=20, pool="cpu") == {"makers": 2}


# Mistakes: each is one in a manifest that is right otherwise, and gives one line.

Change = Callable[[dict[str, Any]], None]


def worker(number: int, change: Change) -> Change:
    return lambda spec: change(spec["workerGroupSpecs"][number])


def pod(number: int, change: Change) -> Change:
    return worker(number, lambda group: change(group["template"]["spec"]))


def container(number: int, change: Change) -> Change:
    return pod(number, lambda found: change(found["containers"][0]))


def env(name: str, value: str) -> Change:
    return lambda found: found.update(env=[{"name": name, "value": value}])


OF_THE_CLUSTER: dict[str, Change] = {
    "spec: KubeRay has no field rayVerson; rayVersion?": lambda s: s.update(rayVerson="2.60.0"),
    "rayVersion: 2.41.0, the project's is": lambda s: s.update(rayVersion="2.41.0"),
    "authOptions.mode: without token": lambda s: s.pop("authOptions"),
    "autoscalerOptions.version: has to be v2": lambda s: s["autoscalerOptions"].pop("version"),
    "env RAY_enable_autoscaler_v2: KubeRay wants": lambda s: env("RAY_enable_autoscaler_v2", "1")(
        s["headGroupSpec"]["template"]["spec"]["containers"][0]
    ),
    "head: rayStartParams: num-cpus: 0 has to be a text": lambda s: s["headGroupSpec"].update(
        rayStartParams={"num-cpus": 0}
    ),
    "head: rayStartParams: ray start has no --num-cpu; --num-cpus?": lambda s: s[
        "headGroupSpec"
    ].update(rayStartParams={"num-cpu": "0"}),
    "gpu: KubeRay has no field maxReplica": worker(0, lambda g: g.update(maxReplica=3)),
    "gpu: minReplicas: 9 is more than maxReplicas 8": worker(0, lambda g: g.update(minReplicas=9)),
    "gpu: replicas: 9 is not between 0 and 8": worker(0, lambda g: g.update(replicas=9)),
    "makers: rayStartParams: labels: KubeRay takes them": worker(
        2, lambda g: g.update(rayStartParams={"labels": "pool=cpu"})
    ),
    "gpu: restartPolicy: has to be Never": pod(0, lambda p: p.update(restartPolicy="Always")),
    "gpu: terminationGracePeriodSeconds: KubeRay sets none": pod(
        0, lambda p: p.pop("terminationGracePeriodSeconds")
    ),
    "gpu: terminationGracePeriodSeconds: 20 is less than 30": pod(
        0, lambda p: p.update(terminationGracePeriodSeconds=20)
    ),
    "head: terminationGracePeriodSeconds: 30 is less than 325": lambda s: s["headGroupSpec"][
        "template"
    ]["spec"].update(terminationGracePeriodSeconds=30),
    "gpu: tolerations: nodes with GPUs are tainted": pod(0, lambda p: p.pop("tolerations")),
    "gpu: securityContext: wants runAsNonRoot": pod(0, lambda p: p.pop("securityContext")),
    "image: all nodes need the same": container(0, lambda c: c.update(image="another")),
    "gpu: env: is that of no profile": container(0, lambda c: c.pop("envFrom")),
    "gpu: env: RAY_TRAIN_COLLECTIVE_TIMEOUT_S would win": container(
        0, env("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "60")
    ),
    "AWS_SECRET_ACCESS_KEY has its value in the file": container(
        0, env("AWS_SECRET_ACCESS_KEY", "x")
    ),
    "gpu-spot: priority decides between equal nodes only": container(
        1, lambda c: c["resources"]["limits"].update(cpu="8")
    ),
    "Ray's autoscaler cannot read it: ValueError: ": worker(
        2, lambda g: g.update(labels={"pool": "not allowed!"})
    ),
    "two groups have the same groupName": worker(1, lambda g: g.update(groupName="gpu")),
}


def mistakes_after(change: Change, text: str, kind: str) -> list[str]:
    """What is found once the spec of the only object of a kind has been changed."""
    documents = list(yaml.safe_load_all(text))
    (document,) = [d for d in documents if d["kind"] == kind]
    change(document["spec"])
    return list(mistakes(yaml.safe_dump_all(documents)))


@pytest.mark.parametrize("line", OF_THE_CLUSTER)
def test_a_mistake_in_a_cluster_is_found(line, cluster):
    found = mistakes_after(OF_THE_CLUSTER[line], cluster, "RayCluster")
    assert any(line in one for one in found), found
    assert len(found) <= 2, found


def word(old: str, new: str) -> Change:
    return lambda spec: spec.update(entrypoint=spec["entrypoint"].replace(old, new))


OF_THE_JOB: dict[str, Change] = {
    "entrypoint: 'python train.py' is not glmae": lambda s: s.update(entrypoint="python train.py"),
    "entrypoint: resources.profil: unknown key": word("resources.profile", "resources.profil"),
    "entrypoint: run=runs/first: has to be a whole path": word(
        "/mnt/glmae/runs/first", "runs/first"
    ),
    "entrypoint: store=/data/ct: lies in no volume of head": word(
        "/mnt/glmae/stores/ct", "/data/ct"
    ),
    "entrypoint: resources.profile=cluster wants": word("profile=spot", "profile=cluster"),
    "entrypoint: resources.autoscales=true belongs to": word("resources.autoscales=true", ""),
    "entrypoint: resources.workers: 32 need a GPU each; there are 16": word(
        "[2,8]", "32 engine.micro_batch=1"
    ),
    "entrypoint: pipeline.labels: no group of workers has": word("pool=cpu", "pool=cheap"),
    "deletionStrategy.deletionRules: not with": lambda s: s.update(
        deletionStrategy={"deletionRules": []}
    ),
    "ttlSecondsAfterFinished: does nothing without": lambda s: s.pop("shutdownAfterJobFinishes"),
    "entrypointNumGpus: the driver needs none": lambda s: s.update(entrypointNumGpus=1),
    "rayClusterSpec: missing": lambda s: s.pop("rayClusterSpec"),
    "spec: KubeRay has no field entryPoint; entrypoint?": lambda s: s.update(entryPoint="glmae"),
}


@pytest.mark.parametrize("line", OF_THE_JOB)
def test_a_mistake_in_a_job_is_found(line, job):
    found = mistakes_after(OF_THE_JOB[line], job, "RayJob")
    assert any(line in one for one in found), found


def test_a_name_that_kuberay_refuses_is_found(job):
    (line,) = mistakes(job.replace("name: glmae-pretrain", f"name: {'g' * 48}"))
    assert "metadata.name" in line


def test_kueue_does_not_take_a_cluster_that_scales(cluster):
    documents = list(yaml.safe_load_all(cluster))
    (document,) = [d for d in documents if d["kind"] == "RayCluster"]
    document["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "glmae"}
    (line,) = mistakes(yaml.safe_dump_all(documents))
    assert "Kueue (kueue.x-k8s.io/queue-name) admits clusters of a fixed size" in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "is not YAML"),
        ("- a", "holds ['a'], which is no object of Kubernetes"),
        ("kind: Pod\nmetadata: {name: a}", "has no RayCluster, no RayJob and no `cluster_name`"),
        ("", "has no RayCluster"),
    ],
)
def test_what_is_no_manifest_is_told(text, line):
    assert any(one.startswith(line) for one in mistakes(text))


def test_mistakes_are_printed_with_their_file_and_the_exit_code_is_2(cluster):
    command = [sys.executable, "-m", "cluster.validate", "-"]
    broken = cluster.replace("restartPolicy: Never", "restartPolicy: Always", 1)
    done = subprocess.run(command, input=broken, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("-: RayCluster glmae: ")
    assert "restartPolicy" in line
    assert done.stderr == ""


def groups_of(spec: dict[str, Any]) -> Documents:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
