"""A finetuned segmenter as a MONAI bundle that runs without glmae-ray.

The bundle holds our own network, as source: with MONAI's `UNETR` class CLS token, eps and patches
other than 16 would be lost, and with them the outputs.
"""

from __future__ import annotations

import inspect
import io
import json
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch

from glmae_ray import __version__
from glmae_ray.models import bundle_scripts, unetr, vit3d
from glmae_ray.models.finetuning import Finetuning, shape_of

SOURCES: tuple[ModuleType, ...] = (vit3d, unetr, bundle_scripts)
WEIGHTS = "models/model.pt"  # where MONAI's tools look for it
_IMPORT = "from glmae_ray.models."


def bundle_files(module: Finetuning, facts: dict[str, Any]) -> dict[str, bytes | str]:
    """Every file of the bundle by its path: configs, weights and source.

    Args:
        module: Of the task `segmentation`.
        facts: As `segmenter_facts` gives them.
    """
    buffer = io.BytesIO()
    torch.save({name: p.detach().cpu() for name, p in module.state_dict().items()}, buffer)
    files: dict[str, bytes | str] = {
        "configs/metadata.json": _json(metadata(facts)),
        "configs/inference.json": _json(inference_config(module, facts)),
        "docs/README.md": _readme(facts),
        WEIGHTS: buffer.getvalue(),
        "scripts/__init__.py": f'"""Source of glmae-ray {__version__}, Apache-2.0."""\n',
    }
    for source in SOURCES:
        name = source.__name__.rpartition(".")[2]
        files[f"scripts/{name}.py"] = inspect.getsource(source).replace(_IMPORT, "from .")
    return files


def deviations(facts: dict[str, Any]) -> list[str]:
    """In what MONAI's transforms before and after the network are not ours, a line each."""
    lines = []
    if kind_of_intensity(facts) != "window":
        lines.append(
            "intensities: statistics are of the whole scan in MONAI's transforms, of its "
            "foreground box in glmae-ray"
        )
    if facts["crops"]["spacing"] is not None:
        lines.append(
            "spacing: MONAI's Spacingd resamples without the smoothing against aliases that "
            "glmae-ray has"
        )
    return lines


def kind_of_intensity(facts: dict[str, Any]) -> str:
    """How intensities are mapped: window, percentiles or zscore."""
    default = "window" if facts["modality"] == ["CT"] else "percentiles"
    return facts["crops"]["intensity"] or default


def metadata(facts: dict[str, Any]) -> dict[str, Any]:
    """The bundle's `metadata.json`, by MONAI's specification."""
    names = ["background", *facts["structures"]]
    is_ct = facts["modality"] == ["CT"]
    image = _tensor(facts, [f"channel {n}" for n in range(facts["channels"])]) | {
        "format": "hounsfield" if is_ct else "magnitude",
        "modality": "/".join(facts["modality"]),
        "value_range": [] if kind_of_intensity(facts) == "zscore" else [0, 1],
    }
    pred = _tensor(facts, names) | {"format": "segmentation", "value_range": []}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/"
        "0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by glmae-ray {__version__}, step {facts['step']}"},
        "monai_version": monai.__version__.split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.2.0"},
        "name": "glmae-ray segmenter",
        "task": f"segmentation of {', '.join(facts['structures'])}",
        "description": "UNETR on a GL-MAE encoder",
        "authors": "not stated",
        "copyright": "not stated",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def _tensor(facts: dict[str, Any], channels: list[str]) -> dict[str, Any]:
    return {
        "type": "image",
        "num_channels": len(channels),
        "spatial_shape": facts["crops"]["size"][::-1],
        "dtype": "float32",
        "is_patch_data": True,
        "channel_def": {str(n): name for n, name in enumerate(channels)},
    }


def inference_config(module: Finetuning, facts: dict[str, Any]) -> dict[str, Any]:
    """The bundle's `inference.json`: files of a folder into label maps on their own grids."""
    load = "torch.load(@ckpt_path, map_location=@device, weights_only=True)"
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "ckpt_path": f"$@bundle_root + '/{WEIGHTS}'",
        "files": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "scripts.bundle_scripts.Segmenter",
            **network_arguments(module, facts),
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(facts)},
        "datalist": "$[{'image': path} for path in @files]",
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": facts["crops"]["size"][::-1],
            "sw_batch_size": facts["inference"]["batch"],
            "overlap": facts["inference"]["overlap"],
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing()},
        "evaluator": {
            "_target_": "scripts.bundle_scripts.Evaluator",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "initialize": [f"$@network_def.load_state_dict({load})"],
        "run": ["$@evaluator.run()"],
    }


def network_arguments(module: Finetuning, facts: dict[str, Any]) -> dict[str, Any]:
    """Of the bundle's `Segmenter`, as JSON values."""
    return {
        "encoder": shape_of(module.encoder),
        "size": facts["crops"]["size"],
        "outputs": 1 + len(facts["structures"]),
        "feature_size": facts["head"]["feature_size"],
        "position_grid": facts["position_grid"],
    }


def _preprocessing(facts: dict[str, Any]) -> list[dict[str, Any]]:
    crops = facts["crops"]
    low, high = crops["window"]
    unit = {"b_min": 0.0, "b_max": 1.0, "clip": True}
    mapping = {
        "window": {"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high, **unit},
        "percentiles": {
            "_target_": "ScaleIntensityRangePercentilesd",
            "lower": 0.5,
            "upper": 99.5,
            "channel_wise": True,
            **unit,
        },
        "zscore": {"_target_": "NormalizeIntensityd", "channel_wise": True},
    }[kind_of_intensity(facts)]
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "ensure_channel_first": True},
        {"_target_": "Orientationd", "axcodes": "RAS"},
    ]
    if crops["spacing"] is not None:
        steps.append({"_target_": "Spacingd", "pixdim": crops["spacing"][::-1]})
    steps += [mapping, {"_target_": "EnsureTyped", "device": "@device"}]
    return [{**step, "keys": "image"} for step in steps]


def _postprocessing() -> list[dict[str, Any]]:
    return [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "orig_keys": "image",
            "transform": "@preprocessing",
            "nearest_interp": False,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "",
            "output_dtype": "$torch.uint8",
            "separate_folder": False,
            "resample": False,
        },
    ]


def _readme(facts: dict[str, Any]) -> str:
    lines = [
        "# A segmenter of glmae-ray as a MONAI bundle",
        "",
        "```sh",
        'pip install "monai[fire,nibabel]"',
        "python -m monai.bundle run --config_file configs/inference.json \\",
        "    --dataset_dir FOLDER_OF_NII_GZ --output_dir LABELS",
        "```",
        "",
        "Labels: " + ", ".join(f"{n} {name}" for n, name in enumerate(facts["structures"], 1)),
        "",
        "The network and its weights are those of the run: equal windows give equal outputs. "
        "Neither glmae-ray nor ignite is needed.",
        *("", *(f"- {line}" for line in deviations(facts))),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
