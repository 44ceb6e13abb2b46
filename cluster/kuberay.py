"""What KubeRay 1.7, Ray and our profiles want of a RayCluster.

KubeRay refuses some mistakes, passes others on to pods that never start, and drops fields that
it does not know. Ray's own reader for its autoscaler comes last, on what is left.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.scripts.scripts import start

from cluster.reading import Group, Manifest, Spec, groups
from glmae_ray.jobs.profiles import DRAIN, JOB_STOP, PROFILES

KUEUE = "kueue.x-k8s.io/queue-name"
_V2 = "RAY_enable_autoscaler_v2"
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS 1035
_LONGEST = {"RayCluster": 63, "RayJob": 47}
_END_S = 5  # from the end of a drain to that of the pod

FIELDS = {
    "spec": {
        *(
            "authOptions",
            "autoscalerOptions",
            "enableInTreeAutoscaling",
            "gcsFaultToleranceOptions",
        ),
        *("headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend"),
        *("upgradeStrategy", "workerGroupSpecs"),
    },
    "autoscalerOptions": {
        *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources"),
        *("securityContext", "upscalingMode", "version", "volumeMounts"),
    },
    "head": {
        *("enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType"),
        "template",
    },
    "worker": {
        *("groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts"),
        *("priority", "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend"),
        "template",
    },
}
START_OPTIONS = {
    option.removeprefix("--") for parameter in start.params for option in parameter.opts
}


def mistakes(document: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    """Lines about a RayCluster."""
    yield from name_mistakes(document)
    yield from spec_mistakes(document.get("spec") or {}, document.get("metadata", {}), manifest)


def name_mistakes(document: Mapping[str, Any]) -> Iterator[str]:
    """Whether its version and name are such that KubeRay takes it."""
    kind, name = document["kind"], str(document.get("metadata", {}).get("name", ""))
    if document.get("apiVersion") != "ray.io/v1":
        yield f"apiVersion: {document.get('apiVersion')}, KubeRay 1.7 has ray.io/v1"
    if not _LABEL.fullmatch(name) or len(name) > _LONGEST[kind]:
        yield (
            f"metadata.name: {name!r} has to be lower-case letters, digits and -, from a letter "
            f"on, {_LONGEST[kind]} at most"
        )


def spec_mistakes(spec: Spec, metadata: Spec, manifest: Manifest) -> Iterator[str]:
    """Lines about a cluster's spec, of a RayCluster or within a RayJob."""
    yield from unknown_fields(spec, FIELDS["spec"], "spec")
    options = spec.get("autoscalerOptions") or {}
    yield from unknown_fields(options, FIELDS["autoscalerOptions"], "autoscalerOptions")
    yield from _version_mistakes(spec)
    yield from _autoscaler_mistakes(spec, metadata)
    for group in groups(spec):
        yield from (f"{group.name}: {line}" for line in _group_mistakes(group, spec, manifest))
    yield from _common_mistakes(groups(spec), manifest)
    yield from _priority_mistakes(groups(spec))
    yield from _unreadable(spec, metadata)


def unknown_fields(node: Spec, known: set[str], where: str) -> Iterator[str]:
    """Fields that the operator would drop without a word."""
    for name in node:
        if name not in known:
            yield f"{where}: KubeRay has no field {name}{_meant(name, known)}"


def option_mistakes(name: str) -> Iterator[str]:
    """Whether `ray start` has an option, given without its dashes."""
    if name not in START_OPTIONS:
        yield f"ray start has no --{name}{_meant(name, START_OPTIONS, dashes='--')}"


def _meant(name: str, known: Collection[str], *, dashes: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; {dashes}{near[0]}?" if near else ""


def _version_mistakes(spec: Spec) -> Iterator[str]:
    if spec.get("rayVersion") != ray.__version__:
        yield f"rayVersion: {spec.get('rayVersion')}, the project's is {ray.__version__}"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode: without token, whoever reaches the head runs what they like there"


def _autoscaler_mistakes(spec: Spec, metadata: Spec) -> Iterator[str]:
    scales, options = spec.get("enableInTreeAutoscaling"), spec.get("autoscalerOptions")
    head, *_ = groups(spec)
    listed = {one.get("name") for one in head.container.get("env", [])}
    if scales and (options or {}).get("version") != "v2":
        yield "autoscalerOptions.version: has to be v2; v1 knows no priority and no labels"
    if not scales and options:
        yield "autoscalerOptions: does nothing without enableInTreeAutoscaling: true"
    if _V2 in listed:
        yield f"head: env {_V2}: KubeRay wants autoscalerOptions.version: v2 in its place"
    if scales and KUEUE in metadata.get("labels", {}):
        yield f"enableInTreeAutoscaling: Kueue ({KUEUE}) admits clusters of a fixed size"
    if scales and spec.get("suspend"):
        yield "suspend: not with enableInTreeAutoscaling"


def _group_mistakes(group: Group, spec: Spec, manifest: Manifest) -> Iterator[str]:
    kind = "head" if group.is_head else "worker"
    yield from unknown_fields(group.spec, FIELDS[kind], group.name)
    yield from _start_mistakes(group)
    if not group.container:
        yield "template.spec.containers: has to have the container in which Ray runs"
        return
    if spec.get("enableInTreeAutoscaling") and group.pod.get("restartPolicy") != "Never":
        yield "restartPolicy: has to be Never: autoscaler v2 takes a pod for one node of Ray"
    if not _is_unprivileged(group):
        yield "securityContext: wants runAsNonRoot: true and allowPrivilegeEscalation: false"
    if not group.is_head:
        yield from _size_mistakes(group)
    yield from _grace_mistakes(group, manifest)


def _start_mistakes(group: Group) -> Iterator[str]:
    params = group.spec.get("rayStartParams") or {}
    for name, value in params.items():
        yield from (f"rayStartParams: {line}" for line in option_mistakes(name))
        if not isinstance(value, str):
            yield f'rayStartParams: {name}: {value!r} has to be a text: "{value}"'
    if "labels" in params:
        yield "rayStartParams: labels: KubeRay takes them from the group's own field labels"
    if group.spec.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
        params
    ):
        yield "resources: stated in rayStartParams as well; KubeRay takes one of them"


def _is_unprivileged(group: Group) -> bool:
    pod, own = group.pod.get("securityContext", {}), group.container.get("securityContext", {})
    both = {**pod, **own}
    return both.get("runAsNonRoot") is True and both.get("allowPrivilegeEscalation") is False


def _size_mistakes(group: Group) -> Iterator[str]:
    least, most = int(group.spec.get("minReplicas", 0)), group.most
    if least > most:
        yield f"minReplicas: {least} is more than maxReplicas {most}"
    elif not least <= int(group.spec.get("replicas", least)) <= most:
        yield f"replicas: {group.spec['replicas']} is not between {least} and {most}"
    if group.gpus and not group.pod.get("tolerations"):
        yield "tolerations: nodes with GPUs are tainted nvidia.com/gpu on most clouds"


def _grace_mistakes(group: Group, manifest: Manifest) -> Iterator[str]:
    """Kubernetes kills what has not ended by then."""
    env = group.environment(manifest)
    needed = float(env.get(DRAIN, 0)) + _END_S
    stops = "preStop" in group.container.get("lifecycle", {})
    if stops:
        needed += float(env.get(JOB_STOP, 0)) - _END_S
    grace = group.pod.get("terminationGracePeriodSeconds")
    if grace is None:
        yield f"terminationGracePeriodSeconds: KubeRay sets none (kuberay 5004); {needed:g} or more"
    elif grace < needed:
        names = f"{JOB_STOP} and {DRAIN}" if stops else f"{DRAIN} and {_END_S}"
        yield f"terminationGracePeriodSeconds: {grace} is less than {needed:g}, {names}"


def _common_mistakes(found: list[Group], manifest: Manifest) -> Iterator[str]:
    if len(images := {group.container.get("image") for group in found}) > 1:
        yield f"image: all nodes need the same, here are {sorted(map(str, images))}"
    if len({group.name for group in found}) < len(found):
        yield "workerGroupSpecs: two groups have the same groupName"
    starts = {name: dict(profile.start) for name, profile in PROFILES.items() if profile.start}
    known = {variable for start in starts.values() for variable in start}
    for group in found:
        env = group.environment(manifest)
        if {name: value for name, value in env.items() if name in known} not in starts.values():
            yield f"{group.name}: env: is that of no profile ({', '.join(starts)}); docs/running.md"
        for name in sorted(set(env) & {v for p in PROFILES.values() for v in p.driver}):
            yield f"{group.name}: env: {name} would win over resources.profile of every run"


def _priority_mistakes(found: list[Group]) -> Iterator[str]:
    """Ray compares how well a node is used first, and priorities only where that is equal."""
    ranked = [group for group in found if not group.is_head and group.gpus]
    if any("priority" in group.spec for group in ranked):
        for group in ranked[1:]:
            if group.limits != ranked[0].limits:
                yield (
                    f"{group.name}: priority decides between equal nodes only, and its limits "
                    f"{group.limits} are not those of {ranked[0].name} {ranked[0].limits}"
                )


def _unreadable(spec: Spec, metadata: Spec) -> Iterator[str]:
    """Whether Ray's autoscaler can read it: resources, labels, priorities."""
    named = {"name": metadata.get("name", ""), "namespace": metadata.get("namespace", "default")}
    try:
        autoscaling_config._derive_autoscaling_config_from_ray_cr({"metadata": named, "spec": spec})
    except Exception as error:  # of any kind: it reads without looking
        yield f"Ray's autoscaler cannot read it: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
