"""What `glmae doctor` says of nodes, from a table of what they said."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from glmae_ray.jobs import node_look
from glmae_ray.jobs.doctor_nodes import Look, NodeFacts, judge
from glmae_ray.paths import to_place

GB = 10**9
VERSIONS = {
    **{"python": "3.11.7", "glmae-ray": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cu128"},
    "zarr": "3.1.0",
}
LOOK = Look(
    versions=VERSIONS,
    source="a",
    token=True,
    store_folder="/dev/shm",
    spill_folder="/tmp/ray",
    spill_bytes=100 * GB,
    spill_free=50 * GB,
    open_files=65536,
)


def node(number, **said):
    there = NodeFacts(f"10.0.0.{number}", cpus=4, object_store=4 * GB, ahead_s=0.01, doubt_s=0.01)
    return replace(there, look=replace(LOOK, **said))


def with_version(number, name, version):
    return node(number, versions={**VERSIONS, name: version})


def said(*nodes, source="a"):
    found = list(judge(nodes, versions=VERSIONS, source=source))
    return {kind: [f.line for f in found if f.kind == kind] for kind in ("advice", "reason")}, found


def test_nodes_that_are_alike_are_facts_only():
    wrong, found = said(node(1), node(2))
    assert wrong == {"advice": [], "reason": []}
    assert [finding.line for finding in found] == [
        "versions: those of here on 2 nodes: python 3.11.7, glmae-ray 0.1.0, ray 2.60.0, torch "
        "2.13.0+cu128, zarr 3.1.0",
        "clocks: within 0.02 s of the one here",
        "object store: 8.00 GB on 2 nodes, all in memory; spill space of 45.00 GB or more on each",
        "authentication: by token",
    ]


@pytest.mark.parametrize(
    ("name", "version", "kind"),
    [
        ("ray", "2.59.0", "reason"),
        ("python", "3.11.9", "reason"),
        ("glmae-ray", "0.0.9", "reason"),
        ("torch", "2.12.0+cu128", "reason"),
        ("torch", "2.13.0+cpu", "advice"),  # a head without GPUs
        ("zarr", "3.0.0", "advice"),
        ("zarr", "missing", "reason"),
    ],
)
def test_another_version_is_named_with_its_nodes(name, version, kind):
    wrong, _ = said(node(1), with_version(3, name, version), with_version(2, name, version))
    assert [(k, line) for k, lines in wrong.items() for line in lines] == [
        (
            kind,
            f"{name}: {version} on 10.0.0.2, 10.0.0.3, {VERSIONS[name]} here; install the same "
            "everywhere: one image, or one constraints.txt",
        )
    ]


def test_two_other_versions_are_two_lines():
    wrong, _ = said(with_version(1, "ray", "2.58.0"), with_version(2, "ray", "2.59.0"))
    assert [line.split(",")[0] for line in wrong["reason"]] == [
        "ray: 2.58.0 on 10.0.0.1",
        "ray: 2.59.0 on 10.0.0.2",
    ]


def test_other_code_of_the_same_version_is_told():
    wrong, _ = said(node(1), node(2, source="b"))
    (line,) = wrong["advice"]
    assert line.startswith("glmae-ray: its code on 10.0.0.2 is not that of here")
    assert said(node(1, source=""))[0]["advice"] == []  # not installed: its version says so


def test_a_node_that_says_nothing_is_a_reason_beside_what_the_others_say():
    silent = NodeFacts("10.0.0.9", cpus=4, trouble="no answer within 60 s")
    wrong, found = said(node(1), silent)
    assert wrong["reason"] == [
        "10.0.0.9: no answer within 60 s, though Ray counts it as alive; see the logs of Ray "
        "there, or end its Ray"
    ]
    assert any(finding.line.startswith("versions: ") for finding in found)
    assert len(said(silent)[1]) == 1


def test_a_clock_that_is_off_is_told_where_the_way_there_does_not_explain_it():
    off = replace(node(1), ahead_s=-3.2, doubt_s=0.1)
    far = replace(node(2), ahead_s=3.2, doubt_s=2.0)
    wrong, _ = said(off, far, node(3))
    (line,) = wrong["advice"]
    assert line.startswith("clocks: 10.0.0.1 (-3.2 s) are off")
    assert "chrony" in line


def test_an_object_store_on_a_disk_and_a_disk_without_room():
    disk = node(1, store_folder="/tmp")
    full = node(2, spill_free=4 * GB)
    small = node(3, spill_free=8 * GB)  # of which Ray leaves 5
    wrong, _ = said(disk, full, small)
    first, second, third = wrong["advice"]
    assert first.startswith("object store: that of 10.0.0.1 lies on a disk")
    assert second.startswith("spill space: the disk of 10.0.0.2 is full to Ray")
    assert third.startswith("spill space: 10.0.0.3 has less than a whole object store")
    assert "--object-spilling-directory" in second
    assert "--object-spilling-directory" in third


def test_few_open_files_are_told():
    wrong, _ = said(node(1, open_files=1024), node(2, open_files=-1))
    (line,) = wrong["advice"]
    assert line.startswith("open files: 1024 at most on 10.0.0.1;")


def test_a_cluster_without_a_token_is_told_where_others_reach_it():
    wrong, _ = said(*(node(number, token=False) for number in range(1, 9)))
    (line,) = wrong["advice"]
    assert line.startswith(
        "authentication: none on 10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4, 10.0.0.5 and 3 more;"
    )
    assert "RAY_AUTH_MODE=token" in line
    alone = replace(node(1, token=False), address="127.0.0.1")
    assert said(alone)[0]["advice"] == []


def test_what_nodes_see_of_a_place_and_cannot_do_there(tmp_path):
    from glmae_ray.jobs.asking import Answer
    from glmae_ray.jobs.doctor_storage import judge_place

    answers = {
        "10.0.0.1": Answer(("x", "")),
        "10.0.0.2": Answer(("", "")),
        "10.0.0.3": Answer(("x", "Permission denied")),
        "10.0.0.4": Answer(None, "no answer within 60 s"),
    }

    def lines(place, answers):
        found = judge_place("run", place, answers, here="x", done="read and written")
        return [(finding.kind, finding.line) for finding in found]

    start = f"run: {tmp_path} cannot be read and written from"
    assert lines(tmp_path, answers) == [
        (
            "reason",
            f"run: {tmp_path} is not the same folder on 10.0.0.2 as here; give one on a disk that "
            "all nodes share, or s3://BUCKET/FOLDER",
        ),
        ("reason", f"{start} 10.0.0.3: Permission denied"),
        ("reason", f"{start} 10.0.0.4: no answer within 60 s"),
    ]
    ((kind, line),) = lines(to_place("s3://bucket/run"), {"10.0.0.2": Answer(("", ""))})
    assert kind == "reason"
    assert line.endswith("give all nodes the same AWS_ENDPOINT_URL")
    assert lines(tmp_path, {"10.0.0.1": answers["10.0.0.1"]}) == [
        ("fact", f"run: {tmp_path} can be read and written from 1 node, as from here")
    ]


def test_a_node_without_this_project_can_say_so(tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(node_look)
    (tmp_path / "task").write_bytes(cloudpickle.dumps((node_look.versions, node_look.source)))
    code = (
        "import pickle, sys; sys.modules['glmae_ray'] = None\n"
        "with open(sys.argv[1], 'rb') as file: versions, source = pickle.load(file)\n"
        "sys.stdout.buffer.write(pickle.dumps((versions(['numpy', 'no-such']), source())))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "task")]
    done = subprocess.run(command, check=True, capture_output=True)
    versions, source = pickle.loads(done.stdout)
    assert versions["glmae-ray"] == versions["no-such"] == node_look.MISSING
    assert versions["numpy"] != node_look.MISSING
    assert source == ""
    assert node_look.source() == node_look.source() != ""
