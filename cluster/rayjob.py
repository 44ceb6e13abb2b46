"""What KubeRay wants of a RayJob, and whether its command fits the cluster it would run on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.kuberay import KUEUE, name_mistakes, spec_mistakes, unknown_fields
from cluster.reading import Group, Manifest, Spec, groups
from glmae_ray.cli import VERBS
from glmae_ray.config_loading import load
from glmae_ray.config_train import JobConfig, TrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.profiles import PROFILES

FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy"),
    *("entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId"),
    *("managedBy", "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"),
    *("suspend", "ttlSecondsAfterFinished"),
}
_PATHS = ("store", "run", "out")  # what has to be there when the cluster is gone


def mistakes(document: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    """Lines about a RayJob."""
    spec, metadata = document.get("spec") or {}, document.get("metadata", {})
    yield from name_mistakes(document)
    yield from unknown_fields(spec, FIELDS, "spec")
    yield from _end_mistakes(spec, metadata)
    cluster = spec.get("rayClusterSpec")
    if cluster is None and not spec.get("clusterSelector"):
        yield "rayClusterSpec: missing, and so is clusterSelector"
    if cluster is not None:
        yield from spec_mistakes(cluster, metadata, manifest)
    yield from entrypoint_mistakes(str(spec.get("entrypoint", "")), cluster, manifest)


def _end_mistakes(spec: Spec, metadata: Spec) -> Iterator[str]:
    ends = spec.get("shutdownAfterJobFinishes")
    if ends and "deletionRules" in (spec.get("deletionStrategy") or {}):
        yield "deletionStrategy.deletionRules: not with shutdownAfterJobFinishes"
    if not ends and spec.get("ttlSecondsAfterFinished"):
        yield "ttlSecondsAfterFinished: does nothing without shutdownAfterJobFinishes: true"
    if not ends and (spec.get("suspend") or KUEUE in metadata.get("labels", {})):
        yield "shutdownAfterJobFinishes: has to be true, or the job cannot be suspended"
    if spec.get("entrypointNumGpus"):
        yield "entrypointNumGpus: the driver needs none, and would take it from training"
    for name in ("backoffLimit", "activeDeadlineSeconds"):
        if int(spec.get(name, 1)) < 0:
            yield f"{name}: {spec[name]} is negative"


def entrypoint_mistakes(entrypoint: str, cluster: Spec | None, manifest: Manifest) -> Iterator[str]:
    """Lines about the command, as its own reader sees it and against the cluster."""
    command, *words = shlex.split(entrypoint) or [""]
    if command != "glmae" or not words or words[0] not in VERBS:
        yield f"entrypoint: {entrypoint!r} is not glmae and one of {', '.join(VERBS)}"
        return
    try:
        cfg = load(VERBS[words[0]][0], words[1:])
    except UserError as error:
        yield from (f"entrypoint: {line}" for line in error.lines)
        return
    found = groups(cluster) if cluster else []
    yield from _path_mistakes(cfg, found)
    if isinstance(cfg, TrainConfig) and cluster:
        yield from _profile_mistakes(cfg, found, manifest)
        yield from _room_mistakes(
            cfg, found[1:], scales=bool(cluster.get("enableInTreeAutoscaling"))
        )


def _path_mistakes(cfg: JobConfig, found: Sequence[Group]) -> Iterator[str]:
    for name in _PATHS:
        place = getattr(cfg, name, None)
        if not place or "://" in place:
            continue
        if not place.startswith("/"):
            yield f"entrypoint: {name}={place}: has to be a whole path or a URL"
            continue
        blind = [group.name for group in found if not any(_holds(m, place) for m in group.mounts)]
        if blind:
            yield f"entrypoint: {name}={place}: lies in no volume of {', '.join(blind)}"


def _holds(mount: str, place: str) -> bool:
    return place == mount or place.startswith(mount.rstrip("/") + "/")


def _profile_mistakes(
    cfg: TrainConfig, found: Sequence[Group], manifest: Manifest
) -> Iterator[str]:
    profile = cfg.resources.profile
    env = found[0].environment(manifest)
    for name, value in PROFILES[profile].start.items():
        if env.get(name) != value:
            yield (
                f"entrypoint: resources.profile={profile} wants {name}={value} where nodes start; "
                f"they have {env.get(name)}"
            )
    if not PROFILES[profile].start:
        yield f"entrypoint: resources.profile={profile} is for one machine; cluster or spot"


def _room_mistakes(cfg: TrainConfig, found: Sequence[Group], *, scales: bool) -> Iterator[str]:
    if scales != cfg.resources.autoscales:
        wanted = str(scales).lower()
        yield f"entrypoint: resources.autoscales={wanted} belongs to enableInTreeAutoscaling"
    gpus = sum(group.gpus * group.most for group in found)
    if cfg.resources.gpu is not False and gpus and cfg.resources.most > gpus:
        most = cfg.resources.most
        yield f"entrypoint: resources.workers: {most} need a GPU each; there are {gpus}"
    labels = cfg.pipeline.labels
    places = [group for group in found if group.most and labels.items() <= _labels(group).items()]
    if labels and not places:
        yield f"entrypoint: pipeline.labels: no group of workers has the labels {labels}"


def _labels(group: Group) -> dict[str, str]:
    return dict(group.spec.get("labels") or {})
