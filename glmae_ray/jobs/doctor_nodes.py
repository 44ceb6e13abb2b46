"""The nodes of a cluster as `glmae doctor` sees them, and what is wrong with them; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from glmae_ray.jobs.findings import Finding
from glmae_ray.jobs.node_look import MISSING, OURS
from glmae_ray.jobs.text import in_bytes

# Workers of one run exchange pickles and tensors by these; Ray itself refuses the first two.
_SAME = {"python", "ray", OURS, "torch", "deepspeed"}
_CLOCK_S = 2.0  # what a record of one node may stand before that of another; our decision
_FULL = 0.95  # of a disk: RAY_local_fs_capacity_threshold
_OPEN_FILES = 8192  # what Ray asks for
_ALONE = ("127.0.0.1", "::1")  # Ray listens here only; with any other address everywhere
_SHOWN = 5  # addresses in a line


@dataclass(frozen=True)
class Look:
    """What a node says of itself; sizes in bytes.

    Attributes:
        versions: Of Python and packages; `missing` where one is not installed.
        source: A digest of this project's code there, empty where it is not installed.
        token: Whether Ray asks for a token there.
        store_folder: Where the object store lies.
        spill_folder: Where objects go that find no room in it.
        spill_bytes: Size of the disk of that folder.
        spill_free: What is free of it.
        open_files: How many a process may have open.
    """

    versions: Mapping[str, str]
    source: str
    token: bool
    store_folder: str
    spill_folder: str
    spill_bytes: int
    spill_free: int
    open_files: int


@dataclass(frozen=True)
class NodeFacts:
    """A node that Ray counts as alive.

    Attributes:
        address: Of the node.
        cpus: That Ray has there.
        gpus: That Ray has there.
        memory: For tasks, in bytes.
        object_store: In bytes.
        labels: By which tasks find it, without Ray's own.
        look: What it says of itself; None where it said nothing.
        trouble: Why it said nothing.
        ahead_s: How far its clock is ahead of the one here, give or take `doubt_s`; None where
            it was not told.
        doubt_s: Half of the time between question and answer.
    """

    address: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory: int = 0
    object_store: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    look: Look | None = None
    trouble: str = ""
    ahead_s: float | None = None
    doubt_s: float = 0.0


def judge(
    nodes: Sequence[NodeFacts], *, versions: Mapping[str, str], source: str
) -> Iterator[Finding]:
    """What is wrong with nodes, and what to do; a line a subject where nothing is.

    Args:
        nodes: All of the cluster.
        versions: Those of this process, which a run would send its code from.
        source: The digest of this project's code here.
    """
    for node in nodes:
        if node.look is None:
            line = f"{node.address}: {node.trouble}, though Ray counts it as alive; see the logs "
            yield Finding("reason", f"{line}of Ray there, or end its Ray")
    looks = {node.address: node.look for node in nodes if node.look is not None}
    if not looks:
        return
    yield from _versions({address: look.versions for address, look in looks.items()}, versions)
    yield from _source({address: look.source for address, look in looks.items()}, source)
    yield from _clocks(nodes)
    yield from _object_stores(nodes)
    yield from _open_files({address: look.open_files for address, look in looks.items()})
    yield from _authentication({address: look.token for address, look in looks.items()})


def at(addresses: Sequence[str]) -> str:
    """Addresses for a line, which names a few of many."""
    shown, more = sorted(addresses)[:_SHOWN], len(addresses) - _SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def counted(nodes: Collection[object]) -> str:
    """Their number, as a line has it."""
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"


def _versions(there: Mapping[str, Mapping[str, str]], here: Mapping[str, str]) -> Iterator[Finding]:
    """Whether what runs there is what runs here."""
    same = True
    for name, version in here.items():
        others: dict[str, list[str]] = {}
        for address, found in there.items():
            if found[name] != version:
                others.setdefault(found[name], []).append(address)
        for other, addresses in sorted(others.items()):
            same = False
            # A build for GPUs beside one without, as on a head that has none, is the same torch.
            alike = _public(other) == _public(version)
            grave = other == MISSING or (name in _SAME and not alike)
            yield Finding(
                "reason" if grave else "advice",
                f"{name}: {other} on {at(addresses)}, {version} here; install the same everywhere: "
                "one image, or one constraints.txt",
            )
    if same:
        every = ", ".join(f"{name} {version}" for name, version in here.items())
        yield Finding("fact", f"versions: those of here on {counted(there)}: {every}")


def _public(version: str) -> str:
    return version.partition("+")[0]


def _source(there: Mapping[str, str], here: str) -> Iterator[Finding]:
    """Whether the project's code is the same, which has one version for many commits."""
    other = [address for address, source in there.items() if source and source != here]
    if other:
        yield Finding(
            "advice",
            f"{OURS}: its code on {at(other)} is not that of here, and runs there; install one "
            "commit everywhere, or send yours along: ray job submit --working-dir",
        )


def _clocks(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    told = {
        node.address: (node.ahead_s, node.doubt_s) for node in nodes if node.ahead_s is not None
    }
    off = [
        f"{address} ({ahead_s:+.1f} s)"
        for address, (ahead_s, doubt_s) in told.items()
        if abs(ahead_s) - doubt_s > _CLOCK_S
    ]
    if off:
        yield Finding(
            "advice",
            f"clocks: {at(off)} are off from the one here; events of a run stand in their order, "
            "and S3 refuses 15 minutes: have chrony or another NTP client set them",
        )
    elif told:
        most = max(abs(ahead_s) + doubt_s for ahead_s, doubt_s in told.values())
        yield Finding("fact", f"clocks: within {most:.2f} s of the one here")


def _object_stores(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Where the objects of nodes lie, and whether those that find no room have another place."""
    found = [(node, node.look) for node in nodes if node.look is not None]
    slow = [node.address for node, look in found if look.store_folder != "/dev/shm"]
    full = [node.address for node, look in found if look.spill_free < _kept(look)]
    small = [
        node.address
        for node, look in found
        if 0 <= look.spill_free - _kept(look) < node.object_store
    ]
    if slow:
        yield Finding(
            "advice",
            f"object store: that of {at(slow)} lies on a disk, as /dev/shm was too small when Ray "
            "started; give containers more of it (docker --shm-size, an emptyDir of medium Memory)",
        )
    move = "make room, or start Ray with --object-spilling-directory=FOLDER"
    if full:
        line = f"spill space: the disk of {at(full)} is full to Ray, which leaves {1 - _FULL:.0%} "
        yield Finding("advice", f"{line}of it free: objects that find no memory are lost; {move}")
    if small:
        line = f"spill space: {at(small)} has less than a whole object store takes"
        yield Finding("advice", f"{line}; {move}")
    if not (slow or full or small):
        size = sum(node.object_store for node in nodes)
        least = min(look.spill_free - _kept(look) for _, look in found)
        line = f"object store: {in_bytes(size)} on {counted(nodes)}, all in memory"
        yield Finding("fact", f"{line}; spill space of {in_bytes(least)} or more on each")


def _kept(look: Look) -> float:
    """Bytes of a disk that Ray leaves free."""
    return (1 - _FULL) * look.spill_bytes


def _open_files(there: Mapping[str, int]) -> Iterator[Finding]:
    if few := [address for address, files in there.items() if 0 <= files < _OPEN_FILES]:
        least = min(there[address] for address in few)
        yield Finding(
            "advice",
            f"open files: {least} at most on {at(few)}; Ray asks for {_OPEN_FILES}: ulimit -n "
            "65536 before ray start",
        )


def _authentication(there: Mapping[str, bool]) -> Iterator[Finding]:
    """Whether whoever reaches the cluster can do there what they like."""
    without = [address for address, token in there.items() if not token]
    if not without:
        yield Finding("fact", "authentication: by token")
    elif exposed := [address for address in without if address not in _ALONE]:
        yield Finding(
            "advice",
            f"authentication: none on {at(exposed)}; whoever reaches them runs what they like: "
            "make a token (ray get-auth-token --generate), copy it to all nodes, and start Ray "
            "with RAY_AUTH_MODE=token",
        )
    else:
        yield Finding("fact", "authentication: none; only this machine reaches the cluster")
