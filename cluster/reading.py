"""Manifests of Kubernetes as the rules read them: groups of nodes, their environment, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]

_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Manifest:
    """All objects of a file, some of which name others."""

    documents: Sequence[dict[str, Any]]

    def config_map(self, name: str) -> dict[str, str] | None:
        """Data of a ConfigMap; None where the file has none of this name."""
        for one in self.documents:
            if one.get("kind") == "ConfigMap" and one["metadata"]["name"] == name:
                return dict(one.get("data", {}))
        return None

    def open_secrets(self) -> Iterator[str]:
        """Credentials that anybody reads who reads the file."""
        for one in self.documents:
            name = f"{one.get('kind')} {one.get('metadata', {}).get('name')}"
            if one.get("kind") == "Secret" and (one.get("data") or one.get("stringData")):
                yield f"{name}: holds a secret; make it with kubectl create secret, not in a file"
            for key in _open_keys(one):
                yield f"{name}: {key} has its value in the file; take it from a Secret or a role"


def _open_keys(node: Any) -> Iterator[str]:
    """Names of variables with a value that look like credentials, anywhere below."""
    if isinstance(node, list):
        for below in node:
            yield from _open_keys(below)
    elif isinstance(node, dict):
        name = node.get("name")
        if isinstance(name, str) and node.get("value") and _SECRET.search(name):
            yield name
        data = node.get("data") if node.get("kind") == "ConfigMap" else None
        yield from (key for key in data or {} if _SECRET.search(key))
        for below in node.values():
            yield from _open_keys(below)


@dataclass(frozen=True)
class Group:
    """Pods of one kind: the head, or a group of workers.

    Attributes:
        name: `head`, or that of the group.
        spec: As the file has it.
        is_head: Whether it is the head.
    """

    name: str
    spec: Spec
    is_head: bool

    @property
    def pod(self) -> Spec:
        """Its pod's spec; empty where there is none."""
        return self.spec.get("template", {}).get("spec", {})

    @property
    def container(self) -> Spec:
        """The first, in which Ray runs; empty where there is none."""
        return next(iter(self.pod.get("containers") or []), {})

    @property
    def most(self) -> int:
        """Pods at most."""
        return int(self.spec.get("maxReplicas", 0))

    @property
    def limits(self) -> dict[str, str]:
        """What a pod may use, as text."""
        limits = self.container.get("resources", {}).get("limits", {})
        return {name: str(amount) for name, amount in limits.items()}

    @property
    def gpus(self) -> int:
        """Of a pod."""
        return int(self.limits.get("nvidia.com/gpu", 0))

    @property
    def mounts(self) -> list[str]:
        """Folders of a pod that lie elsewhere."""
        return [str(mount.get("mountPath")) for mount in self.container.get("volumeMounts", [])]

    def environment(self, manifest: Manifest) -> dict[str, str]:
        """Variables of `ray start` whose values the file has."""
        found: dict[str, str] = {}
        for source in self.container.get("envFrom", []):
            found |= manifest.config_map(source.get("configMapRef", {}).get("name", "")) or {}
        listed = self.container.get("env", [])
        return found | {one["name"]: one["value"] for one in listed if "value" in one}


def groups(spec: Spec) -> list[Group]:
    """The head, then the groups of workers."""
    workers = spec.get("workerGroupSpecs") or []
    named = [Group(str(one.get("groupName", "without a name")), one, False) for one in workers]
    return [Group("head", spec.get("headGroupSpec") or {}, True), *named]
