"""What Ray's cluster launcher and our profiles want of a file for `ray up`."""

from __future__ import annotations

import copy
import itertools
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.kuberay import option_mistakes
from glmae_ray.jobs.profiles import PROFILES

Spec = Mapping[str, Any]

_STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
_CREDENTIALS = ("aws_credentials", "gcp_credentials", "aws_access_key_id", "aws_secret_access_key")


def mistakes(document: Spec) -> Iterator[str]:
    """Lines about a file for `ray up`."""
    try:
        validate_config(prepare_config(copy.deepcopy(dict(document))))
    except Exception as error:  # of any kind: it reads without looking
        yield f"Ray's launcher cannot read it: {' '.join(str(error).split())[:300]}"
        return
    yield from _credential_mistakes(document)
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if name not in document:
            yield f"{name}: left out, Ray's own would install a nightly build of Ray"
    yield from _machine_mistakes(document)
    for name in _STARTS:
        yield from (f"{name}: {line}" for line in _start_mistakes(document, name))


def _credential_mistakes(document: Spec) -> Iterator[str]:
    text = yaml.safe_dump(dict(document))
    for name in _CREDENTIALS:
        if name in text:
            yield f"{name}: no credentials in files; the environment, a login or a role gives them"
    groups = document["provider"].get("security_group", {}).get("IpPermissions", [])
    for rule in groups:
        for block in rule.get("IpRanges", []):
            if block.get("CidrIp") == "0.0.0.0/0":
                yield "security_group: 0.0.0.0/0 lets all of the internet knock; name your network"
    if "~/.ray/auth_token" not in document.get("file_mounts", {}):
        yield "file_mounts: ~/.ray/auth_token is not taken along, without which no node joins"


def _machine_mistakes(document: Spec) -> Iterator[str]:
    types: Mapping[str, Spec] = document.get("available_node_types", {})
    if _is_spot(types.get(document.get("head_node_type", ""), {})):
        yield "head_node_type: is a spot machine; with the head goes the cluster"
    gpus = {name: one for name, one in types.items() if one["resources"].get("GPU")}
    spot = [name for name, one in gpus.items() if _is_spot(one)]
    for name in set(gpus) - set(spot):
        for cheap in spot:
            if gpus[name]["resources"] != gpus[cheap]["resources"]:
                yield f"{name}: resources differ from {cheap}'s, and priority decides among equals"
            elif gpus[name].get("priority", 0) >= gpus[cheap].get("priority", 0):
                yield f"{name}: priority has to be less than {cheap}'s to be the second choice"


def _is_spot(one: Spec) -> bool:
    config = one.get("node_config", {})
    market = config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or config.get("scheduling", {}).get("provisioningModel") == "SPOT"


def _start_mistakes(document: Spec, name: str) -> Iterator[str]:
    found = [command for command in document.get(name, []) if "ray start" in command]
    if len(found) != 1:
        yield f"has {len(found)} commands with `ray start`, not one"
        return
    words = shlex.split(found[0].replace(";", " ; "))
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in options:
        yield from option_mistakes(option.removeprefix("--"))
    exported = dict(
        after.split("=", 1)
        for word, after in itertools.pairwise(words)
        if word == "export" and "=" in after
    )
    if exported.pop("RAY_AUTH_MODE", None) != "token":
        yield "RAY_AUTH_MODE=token is not exported, and whoever reaches the head owns it"
    if exported not in [dict(profile.start) for profile in PROFILES.values() if profile.start]:
        yield f"exports {exported}, which is the environment of no profile; docs/running.md"
    wanted = "--autoscaling-config" if name.startswith("head") else "--block"
    if wanted not in options:
        yield f"ray start lacks {wanted}"
