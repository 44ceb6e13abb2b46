"""What finetuning leaves: the weights of encoder and head, and all that inference has to know.

Safetensors with the facts in the header and, for people, beside as JSON. Of a run folder they are
`segmenter.safetensors`, after the last step, and `segmenter_best.safetensors`, after the step
that was best on the validation cases. The header is what is read. Among the facts are those of
an encoder's file, so `init=RUN/segmenter.safetensors` starts from the finetuned encoder.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch

from glmae_ray.config_finetune import (
    CropsConfig,
    FinetuneConfig,
    HeadConfig,
    InferenceConfig,
)
from glmae_ray.config_model import ModelConfig
from glmae_ray.errors import UserError
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.finetuning import SHAPE, Finetuning, shape_of
from glmae_ray.models.vit3d import Encoder, patch_grid
from glmae_ray.models.weight_files import FORMAT, read_safetensors
from glmae_ray.paths import Place, read_file, to_place
from glmae_ray.seeing import Learned

Which = Literal["last", "best"]

FILES: dict[Which, str] = {
    "last": "segmenter.safetensors",
    "best": "segmenter_best.safetensors",
}


def segmenter_facts(
    cfg: FinetuneConfig,
    module: Finetuning,
    *,
    names: tuple[str, ...],
    modality: list[str],
    learned: Learned,
    step: int,
    weights: Which = "last",
    **more: Any,
) -> dict[str, Any]:
    """All that inference has to know of a finetuned module, as JSON.

    Args:
        cfg: The run.
        module: With the run's weights.
        names: Structures in the order of outputs 1, 2, ..., or all classes.
        modality: Of the cases it was trained on, each once.
        learned: How those lay.
        step: Steps done.
        weights: Whether these are the last or the best.
        **more: `val`, figures on the validation cases, and `origin`, where the encoder comes
            from; None where they are left out.
    """
    segments = cfg.task == "segmentation"
    grid = patch_grid(list(cfg.crops.size), module.encoder.patch)
    return encoder_facts(module.encoder) | {
        "task": cfg.task,
        "structures": list(names) if segments else [],
        "classes": [] if segments else list(names),
        "model": ModelConfig.model_validate(shape_of(module.encoder)).model_dump(mode="json"),
        "head": cfg.head.model_dump(mode="json"),
        "crops": cfg.crops.model_dump(mode="json"),
        "inference": cfg.inference.model_dump(mode="json"),
        "grid": {"crop": list(grid)},
        "modality": sorted(modality),
        "learned": learned.as_dict(),
        "step": step,
        "weights": weights,
        "val": None,
        "origin": None,
        **more,
    }


def publish_segmenter(run: Place, module: Finetuning, *, facts: dict[str, Any]) -> None:
    """Write the weights and their facts into a run folder, under the name of `facts["weights"]`.

    Raises:
        UserError: The object store refuses.
        OSError: It cannot be written.
    """
    publish_weights(run / FILES[facts["weights"]], module.state_dict(), facts=facts)


def read_facts(run: Place, *, which: Which = "last") -> dict[str, Any] | None:
    """What a run folder's segmenter says of itself; None where there is none."""
    about = read_file((run / FILES[which]).with_suffix(".json"))
    return None if about is None else json.loads(about)


def load_segmenter(run: str | Place, *, which: Which = "last") -> tuple[Finetuning, dict[str, Any]]:
    """Build the module of a finetuned run from its folder, in evaluation mode, on the CPU.

    Returns:
        The module, and the facts as `segmenter_facts` gives them.

    Raises:
        UserError: No such file, one of another kind or format, or weights that do not fit it.
    """
    place = to_place(run) / FILES[which]
    found = read_safetensors(place)
    if found is None:
        raise UserError(f"{run}: has no {place.name}, which glmae finetune writes")
    tensors, facts = found
    if "head" not in facts or facts.get("format") != FORMAT:
        said = f"format {facts.get('format')}" if "head" in facts else "no head"
        raise UserError(f"{place}: has {said}; this version reads segmenters of format {FORMAT}")
    if "learned" not in facts:
        line = "an earlier version wrote it, without how the cases lay that it was trained on"
        raise UserError(f"{place}: {line}; give glmae finetune again, in a new folder")
    module = _build(facts, tensors)
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"{place}: does not fit what it says of itself: {_line(error)}") from None
    return module.eval(), facts


def _build(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Finetuning:
    """The module without weights, on the device `meta`."""
    model = ModelConfig.model_validate(facts["model"])
    cfg = FinetuneConfig(
        # Stand-ins: a module has nothing of these.
        store="",
        run="",
        init="",
        steps=1,
        global_batch=1,
        targets="",
        task=facts["task"],
        model=model,
        head=HeadConfig.model_validate(facts["head"]),
        crops=CropsConfig.model_validate(facts["crops"]),
        inference=InferenceConfig.model_validate(facts["inference"]),
    )
    outputs = 1 + len(facts["structures"]) if facts["structures"] else len(facts["classes"])
    with torch.device("meta"):  # no weights are drawn that the file's would replace
        encoder = Encoder(**model.model_dump(include=set(SHAPE)))
        if grid := facts["position_grid"]:
            table = tensors["network.encoder.pos_embed"]
            encoder.adopt_positions(table[0], grid=tuple(grid))
        return Finetuning(cfg, encoder, outputs, facts["channels"])


def _line(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200]
