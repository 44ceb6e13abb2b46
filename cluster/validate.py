"""`python -m cluster.validate FILE...`: whether files for a cluster would make one that works.

    kubectl kustomize cluster/kubernetes/job | python -m cluster.validate -
    python -m cluster.validate cluster/aws.yaml

Nothing is asked of any cluster or cloud. Exit code 0: no mistake was found; 2: some were, a line
each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster import kuberay, launcher, rayjob
from cluster.reading import Manifest

KINDS = {"RayCluster": kuberay.mistakes, "RayJob": rayjob.mistakes}


def mistakes(text: str) -> Iterator[str]:
    """What is wrong with the text of a file, a line each."""
    try:
        documents = [document for document in yaml.safe_load_all(text) if document]
    except yaml.YAMLError as error:
        yield f"is not YAML: {' '.join(str(error).split())}"
        return
    if odd := [document for document in documents if not isinstance(document, dict)]:
        yield f"holds {odd[0]!r}, which is no object of Kubernetes and no cluster of `ray up`"
    elif launchers := [document for document in documents if "cluster_name" in document]:
        for document in launchers:
            yield from launcher.mistakes(document)
    else:
        yield from _of_kubernetes(Manifest(documents))


def _of_kubernetes(manifest: Manifest) -> Iterator[str]:
    found = [one for one in manifest.documents if one.get("kind") in KINDS]
    if not found:
        yield "has no RayCluster, no RayJob and no `cluster_name` of `ray up`"
    for document in found:
        where = f"{document['kind']} {_name(document)}"
        yield from (f"{where}: {line}" for line in KINDS[document["kind"]](document, manifest))
    yield from manifest.open_secrets()


def _name(document: dict[str, Any]) -> str:
    return str(document.get("metadata", {}).get("name", "without a name"))


def main(argv: list[str] | None = None) -> int:
    """Check the files that are named; `-` is standard input."""
    parser = argparse.ArgumentParser(prog="python -m cluster.validate", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    count = 0
    for name in parser.parse_args(argv).files:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        lines = list(mistakes(text))
        print(*(f"{name}: {line}" for line in lines), sep="\n", end="\n" * bool(lines))
        count += len(lines)
        if not lines:
            print(f"{name}: no mistake found")
    return 2 if count else 0


if __name__ == "__main__":
    sys.exit(main())
