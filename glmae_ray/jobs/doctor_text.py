"""The facts of `glmae doctor` as text for people; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmae_ray.jobs.text import in_bytes, named, table, times, wrapped

_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MARK = 9  # columns of what a line is
_MEANINGS = {
    "weights": "float32",
    "gradients": "",
    "moments": "AdamW's two",
    "master": "the optimizer's copy of its share",
    "teacher": "float32",
    "batch": "int16 views",
    "activations": "kept for the backward pass",
    "transient": "the largest that comes and goes",
    "buffers": "of ZeRO",
    "peak": "the most at a time",
}


def machine_lines(facts: Mapping[str, Any]) -> str:
    """Text of what `machine_facts` gives."""
    gpus = [f"{gpu['name']} ({in_bytes(gpu['memory'])})" for gpu in facts["gpus"]]
    lines = [
        *named("python", f"{facts['python']} on {facts['system']}"),
        *named("CPUs", str(facts["cpus"])),
        *named("memory", in_bytes(facts["memory"])),
        *named("GPUs", ", ".join(gpus) or "none"),
    ]
    for name, version in facts["packages"].items():
        lines += named(name, version)
    return "\n".join(lines)


def run_lines(facts: Mapping[str, Any]) -> str:
    """Text of what `cost_facts` gives."""
    batch, engine = facts["batch"], facts["engine"]
    title = (
        f"memory of each device at a micro-batch of {batch['micro_batch']}, "
        f"{engine['precision']}, ZeRO {engine['zero_stage']}"
    )
    return "\n".join(
        [
            *named("steps", f"{facts['steps']:,}"),
            *named("step", _step(batch)),
            "",
            *_parameters(facts["parameters"]),
            "",
            *_views(facts["views"]),
            "",
            *_operations(facts["flops"]),
            "",
            title,
            *_memory(facts["memory"]),
        ]
    )


def cluster_lines(cluster: Mapping[str, Any]) -> str:
    """Text of an address and nodes, as JSON has them."""
    heads = ["node", "CPUs", "GPUs", "memory", "object store", "spill space", "clock", "labels"]
    rows = [heads, *(_node(node) for node in cluster["nodes"])]
    return "\n".join([*named("cluster", cluster["address"]), *(table(rows) if rows[1:] else [])])


def _node(node: Mapping[str, Any]) -> list[str]:
    """The row of a node; what it did not tell is a dash."""
    look, ahead_s = node["look"], node["ahead_s"]
    return [
        node["address"],
        f"{node['cpus']:g}",
        f"{node['gpus']:g}",
        in_bytes(node["memory"]),
        in_bytes(node["object_store"]),
        "-" if look is None else in_bytes(look["spill_free"]),
        "-" if ahead_s is None else f"{ahead_s:+.2f} s",
        " ".join(f"{name}={value}" for name, value in node["labels"].items()) or "-",
    ]


def found_lines(facts: Mapping[str, Any]) -> str:
    """Text of what was found; reasons are told elsewhere."""
    lines = []
    for mark, block in (("ok", facts["facts"]), ("warning", facts["advice"])):
        for line in block:
            lines += wrapped(f"{mark:{_MARK}}", line, hang=_MARK)
    return "\n".join(lines)


def _step(batch: Mapping[str, int]) -> str:
    each = f"{batch['accumulation']} x {batch['micro_batch']}"
    return f"{batch['samples']:,} samples = {batch['workers']} x {each} (workers x micro-batches)"


def _parameters(counts: Mapping[str, int]) -> list[str]:
    rows = [["parameters", ""], *([part, f"{count:,}"] for part, count in counts.items())]
    return _indented(rows)


def _views(kinds: Mapping[str, Any]) -> list[str]:
    rows = [["views", "a sample", "voxels", "grid", "tokens", "kept", "hidden"]]
    for kind, figures in kinds.items():
        sizes = [times(figures["size"]), times(figures["grid"])]
        counts = [str(figures[name]) for name in ("tokens", "kept", "hidden")]
        rows.append([kind, str(figures["views"]), *sizes, *counts])
    return _indented(rows)


def _operations(flops: Mapping[str, Any]) -> list[str]:
    sample = flops["sample"]
    rows = [["operations", "", ""]]
    for part, count in sample.items():
        rows.append([part, _flop(count), f"{count / sum(sample.values()):.1%}"])
    rows.append(["a sample", _flop(sum(sample.values())), ""])
    rows += [["a step", _flop(flops["step"]), ""], ["the run", _flop(flops["run"]), ""]]
    return _indented(rows)


def _memory(sizes: Mapping[str, int]) -> list[str]:
    shown = {name: size for name, size in sizes.items() if size}
    rows = table([[name, in_bytes(size)] for name, size in shown.items()])
    return [f"{row}  {_MEANINGS[name]}".rstrip() for row, name in zip(rows, shown, strict=True)]


def _indented(rows: list[list[str]]) -> list[str]:
    """A table whose first line is its title, further left than the others."""
    return table([rows[0], *(["  " + first, *others] for first, *others in rows[1:])], indent="")


def _flop(count: int) -> str:
    for unit, prefix in _UNITS:
        if count >= unit:
            return f"{count / unit:.2f} {prefix}FLOP"
    return f"{count} FLOP"
