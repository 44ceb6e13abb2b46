"""The model card of an export: what the weights are, of which data, by which settings, how good.

Whatever nobody stated is "not stated". Names of cases, people and folders stay out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from glmae_ray import __version__
from glmae_ray.config import ExportConfig
from glmae_ray.paths import Place, read_file, to_place

CARD = "README.md"
_SILENT = "not stated"
# Of a run's config, what is about paths and machines and not about the weights.
_PRIVATE = ("store", "run", "init", "targets", "ray", "resources", "pipeline", "log", "save")
_FIGURES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm)"}


def model_card(cfg: ExportConfig, facts: Mapping[str, Any], *, files: Iterable[str]) -> str:
    """The card as Markdown with the header that the Hugging Face Hub reads.

    Args:
        cfg: Names the run, the weights and the licences.
        facts: Beside the weights.
        files: That lie beside the card, relative to it.
    """
    records = {
        name: _read(to_place(cfg.run) / f"{name}.json")
        for name in ("config", "cases", "summary", "evaluation")
    }
    parts = [
        _header(cfg, facts),
        [
            f"# {_title(facts)}",
            "",
            f"Made by glmae-ray {__version__}, step {_said(facts, 'step')}.",
        ],
        ["## Input", *_input(facts)],
        ["## Files", *(f"- `{name}`" for name in files)],
        ["## Data", *_data(cfg, records["cases"], facts)],
        ["## Figures", *_figures(cfg, records)],
        ["## Settings", *_settings(records["config"])],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _header(cfg: ExportConfig, facts: Mapping[str, Any]) -> list[str]:
    tasks = {"segmentation": "image-segmentation", "classification": "image-classification"}
    fields: dict[str, Any] = {"library_name": "glmae-ray"}
    if cfg.licence:
        fields["license"] = cfg.licence
    fields["pipeline_tag"] = tasks.get(facts.get("task", ""), "image-feature-extraction")
    fields["tags"] = ["medical-imaging", "gl-mae", "vision-transformer", "3d"]
    return ["---", yaml.safe_dump(fields, sort_keys=False).strip(), "---"]


def _title(facts: Mapping[str, Any]) -> str:
    names = ", ".join([*facts.get("structures", ()), *facts.get("classes", ())])
    titles = {
        "segmentation": f"UNETR on a GL-MAE encoder: {names}",
        "classification": f"Classifier on a GL-MAE encoder: {names}",
    }
    return titles.get(facts.get("task", ""), "GL-MAE encoder of 3-D scans")


def _input(facts: Mapping[str, Any]) -> list[str]:
    """What the network has to be given."""
    lines = [
        f"- axes: {facts['axes']}; of a MONAI bundle X, Y, Z",
        f"- channels: {facts['channels']}",
        f"- modality: {', '.join(facts.get('modality', ())) or _SILENT}",
        f"- patch: {facts['patch']}; width {facts['width']}, depth {facts['depth']}, "
        f"heads {facts['heads']}",
    ]
    if "crops" not in facts:
        return [
            *lines,
            f"- window: {_said(facts, 'window')}",
            f"- spacing: {_said(facts, 'spacing_mm')}",
        ]
    crops = facts["crops"]
    spacing = "as acquired" if crops["spacing"] is None else f"{crops['spacing']} mm (Z, Y, X)"
    kind = crops["intensity"] or "window for CT, else percentiles"
    return [
        *lines,
        f"- size of a window: {crops['size']} voxels (Z, Y, X), overlap "
        f"{facts['inference']['overlap']}",
        f"- spacing: {spacing}",
        f"- intensities: {kind}; the window is {crops['window']}",
    ]


def _data(cfg: ExportConfig, cases: dict[str, Any], facts: Mapping[str, Any]) -> list[str]:
    counts = [f"{len(cases[part])} for {part}" for part in ("train", "val") if part in cases]
    origin = facts.get("origin") or {}
    encoder = PurePath(origin["source"]).name if "source" in origin else "first weights at random"
    return [
        f"- cases: {', '.join(counts) or _SILENT}",
        f"- the encoder started from: {encoder}, SHA-256 {origin.get('sha256', _SILENT)}",
        f"- licence of the data: {cfg.data_licence or _SILENT}",
        f"- licence of the weights: {cfg.licence or _SILENT}",
    ]


def _figures(cfg: ExportConfig, records: Mapping[str, dict[str, Any]]) -> list[str]:
    """Of the weights that are exported; the others' mean beside it, where there is one."""
    evaluation, summary = records["evaluation"], records["summary"]
    if not evaluation:
        kept = {k: summary[k] for k in ("loss", "val_reconstruction", "val") if k in summary}
        text = ["From `summary.json`:", "```json", json.dumps(kept, indent=2), "```"]
        return ["Not evaluated on labelled cases.", *(text if kept else ())]
    # The weights that were evaluated first are at the top of the file.
    reports = {evaluation.get("weights", "last"): evaluation}
    reports |= {name: evaluation[name] for name in ("last", "best") if name in evaluation}
    if cfg.weights not in reports:
        lines = [f"The {cfg.weights} weights were not evaluated."]
    else:
        lines = _table(reports.pop(cfg.weights), split=evaluation.get("evaluated", {}).get("split"))
    for name, report in reports.items():
        lines += ["", f"Mean of the {name} weights: {_row(report['mean'])}."]
    if "best" in (cfg.weights, *reports):
        lines.append("The best step was chosen on the validation cases, which flatters there.")
    return lines


def _table(report: Mapping[str, Any], *, split: str | None) -> list[str]:
    """A line for the mean, with its intervals, and one for each structure."""
    figures = list(report["mean"])
    intervals = report.get("intervals", {}).get("mean", {})
    mean = [_number(report["mean"][name], intervals.get(name)) for name in figures]
    rows = {"mean": mean} | {
        structure: [_number(row.get(name)) for name in figures]
        for structure, row in report.get("structures", {}).items()
    }
    of_split = f" of the split {split}" if split else ""
    return [
        f"Cases{of_split}: {len(report.get('cases', ()))}; in brackets 95 % intervals.",
        "",
        "| | " + " | ".join(_FIGURES.get(name, name) for name in figures) + " |",
        "|---" * (1 + len(figures)) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]


def _row(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{_FIGURES.get(n, n)} {_number(value)}" for n, value in figures.items())


def _number(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    ends = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{value:.3f}{ends}"


def _settings(config: Mapping[str, Any]) -> list[str]:
    kept = {name: value for name, value in config.items() if name not in _PRIVATE}
    if not kept:
        return [_SILENT.capitalize() + "."]
    return ["```yaml", yaml.safe_dump(kept, sort_keys=False).strip(), "```"]


def _said(facts: Mapping[str, Any], name: str) -> str:
    return str(facts.get(name, _SILENT))


def _read(place: Place) -> dict[str, Any]:
    """A record of the run's folder; empty where there is none."""
    content = read_file(place)
    return json.loads(content) if content else {}
