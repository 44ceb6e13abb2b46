"""Export a finetuned module: files for us, a MONAI bundle, ONNX."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, get_args

from glmae_ray.config import ExportConfig, ExportFormat, SegmenterFormat
from glmae_ray.errors import UserError
from glmae_ray.jobs.formats import Prepared, fitting
from glmae_ray.models.encoder_formats import publish_facts, publish_weights
from glmae_ray.models.finetuning import Finetuning
from glmae_ray.models.monai_bundle import WEIGHTS, bundle_files, deviations
from glmae_ray.models.onnx_file import CLOSE, as_onnx, difference, missing_packages
from glmae_ray.models.segmenter_files import FILES, load_segmenter
from glmae_ray.paths import Place, names_in, publish, to_place

FORMATS: tuple[SegmenterFormat, ...] = get_args(SegmenterFormat)
BUNDLE = "monai_bundle"  # the folder
ONNX = "model.onnx"
# Fields of the config that are about an encoder's formats.
_OTHERS = ("grid", "channels", "positions", "part", "axes", "heads", "file_grid")


def is_finetuned(cfg: ExportConfig) -> bool:
    """Whether `run` is the folder of a finetuned run."""
    return FILES["last"] in names_in(to_place(cfg.run))


def prepare(cfg: ExportConfig, formats: Iterable[ExportFormat] | None) -> Prepared:
    """Load the module of a finetuned run.

    Args:
        cfg: Where it is, which weights, where to write.
        formats: Of `FORMATS`; None: every one that the module fits.

    Raises:
        UserError: The weights cannot be loaded, do not fit a format, or would be written over.
    """
    module, facts = load_segmenter(cfg.run, which=cfg.weights)
    chosen, lines = fitting(formats, known=FORMATS, obstacles=_obstacles(facts))
    if "segmenter" in chosen and to_place(cfg.out) == to_place(cfg.run):
        raise UserError(f"out: {cfg.out} is where the segmenter comes from; name another folder")
    lines.append(f"{cfg.weights} weights of {cfg.run}: {facts['task']}, step {facts['step']}")
    if formats is None:
        unused = [name for name in _OTHERS if name in cfg.model_fields_set]
        lines += [f"{name}: has no effect on a finetuned run's own formats" for name in unused]
    if "monai_bundle" in chosen:
        lines += [f"{BUNDLE}: {line}" for line in deviations(facts)]
    out = to_place(cfg.out)
    writers = {
        "segmenter": functools.partial(_write_segmenter, out, module, facts),
        "monai_bundle": functools.partial(_write_bundle, out, module, facts),
        "onnx": functools.partial(_write_onnx, out, module, facts),
    }
    return Prepared(lines=lines, facts=facts, writers={name: writers[name] for name in chosen})


def _obstacles(facts: dict[str, Any]) -> dict[ExportFormat, str]:
    obstacles: dict[ExportFormat, str] = {}
    modalities, intensity = facts["modality"], facts["crops"]["intensity"]
    if facts["task"] != "segmentation":
        obstacles["monai_bundle"] = f"it is for segmentation, this run does {facts['task']}"
    elif intensity is None and "CT" in modalities and len(modalities) > 1:
        names = " and ".join(modalities)
        obstacles["monai_bundle"] = f"one mapping of intensities does not do for {names}"
    if missing := missing_packages():
        obstacles["onnx"] = f"needs {', '.join(missing)}: pip install 'glmae-ray[onnx]'"
    return obstacles


def _write_segmenter(out: Place, module: Finetuning, facts: dict[str, Any]) -> list[str]:
    """As in a run's folder, the only weights there whichever they are of the run."""
    place = out / FILES["last"]
    publish_weights(place, module.state_dict(), facts=facts)
    return [place.name, place.with_suffix(".json").name]


def _write_bundle(out: Place, module: Finetuning, facts: dict[str, Any]) -> list[str]:
    files = bundle_files(module, facts)
    for path, content in files.items():
        publish(out.joinpath(BUNDLE, *path.split("/")), content)
    return [f"{BUNDLE}/{path}" for path in {WEIGHTS: None, **files}]


def _write_onnx(out: Place, module: Finetuning, facts: dict[str, Any]) -> list[str]:
    data = as_onnx(module, facts=facts)
    apart = difference(data, module, facts=facts)
    if not apart <= CLOSE:
        raise RuntimeError(f"onnx: its outputs are {apart:.1e} from torch's, more than {CLOSE:g}")
    place = out / ONNX
    publish(place, data)
    publish_facts(place, facts | {"onnx_differs_by": apart})
    return [place.name, place.with_suffix(".json").name]
