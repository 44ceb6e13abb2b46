"""GLMAE: masked local and global views in, the four loss terms out, in one forward.

Letters: B samples, V views of a kind, N tokens, K kept and M masked tokens, P voxel values of a
patch, E embedding. All computation happens inside `forward`, because autocast and ZeRO act there.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmae_ray import losses
from glmae_ray.config import LossConfig, ModelConfig
from glmae_ray.config_data import ViewsConfig
from glmae_ray.models.augmenting import augment
from glmae_ray.models.compiling import compile_blocks
from glmae_ray.models.decoder import Decoder
from glmae_ray.models.head import ProjectionHead
from glmae_ray.models.masking import Masks, draw_masks
from glmae_ray.models.view_patches import ViewPatches
from glmae_ray.models.vit3d import Encoder, unpatchify

Batch = dict[str, Tensor]


class Reconstruction(NamedTuple):
    """Volumes (B, V, C, Z, Y, X) in [0, 1] for a picture; what was masked is NaN."""

    original: Tensor
    masked: Tensor
    reconstructed: Tensor


class GLMAE(nn.Module):
    """Student, momentum teacher, decoder and heads; only what the loss weights call for exists.

    The masked global view hides patches of the very crop that the teacher sees intact; the teacher
    is the moving average of student encoder and head, sees nothing but intact global views and
    receives no gradient (grade V: first-hand). That a centre is kept, and how, is grade D, ours.
    docs/method.md has every item with its grade, value and test.
    """

    center: Tensor
    center_started: Tensor
    teacher_sum: Tensor
    teacher_views: Tensor

    def __init__(self, *, model: ModelConfig, views: ViewsConfig, loss: LossConfig) -> None:
        """Build the student, and the parts that a term of weight above 0 needs."""
        super().__init__()
        self.patch, self.views, self.loss = model.patch, views, loss
        self.encoder = Encoder(
            channels=model.channels,
            patch=model.patch,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            recompute=model.activation_checkpointing,
        )
        if loss.reconstructed:
            values = self.encoder.patch_embed.proj.weight[0].numel()
            self.decoder = Decoder(model, values=values)
        if loss.uses_teacher:
            self.head = ProjectionHead(model)
            self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
            self.register_buffer("center", torch.zeros(model.prototypes))
            self.register_buffer("center_started", torch.zeros(()))
            self.register_buffer("teacher_sum", torch.zeros(model.prototypes), persistent=False)
            self.register_buffer("teacher_views", torch.zeros(()), persistent=False)
        if model.compile:
            compile_blocks(self)

    def forward(
        self,
        batch: Batch,
        *,
        task: str = "objective",
        teacher_temperature: float = 0.07,
        weight: float = 1.0,
    ) -> Batch | dict[str, Reconstruction]:
        """Run one of three tasks on a batch.

        Args:
            batch: `global` and `local` int16 (B, V, C, Z, Y, X); `global_seeds` and
                `local_seeds` int64 (B, V); `window` float32 (B, C, 2), the values that become
                0 and 1. Only the kinds that the loss uses are needed.
            task: `objective` gives the total under `loss` and every term and monitor by name,
                on augmented views where the config asks for them;
                `held_out` gives sums of reconstruction error, of the error of predicting each
                patch's mean, and the number of views; `picture` gives a Reconstruction a kind.
            teacher_temperature: Sharpness of the teacher, for `objective`.
            weight: What the batch counts: for `objective` in the centre (see
                `PretrainConfig.weight_of`), for `held_out` in the sums.
        """
        if task == "objective":
            return self._objective(batch, teacher_temperature, weight)
        if task == "held_out":
            return {kind: weight * sums for kind, sums in self._held_out(batch).items()}
        return {kind: self._picture(batch, kind) for kind in self.loss.reconstructed}

    def _objective(self, batch: Batch, teacher_temperature: float, weight: float) -> Batch:
        cfg = self.loss
        terms: Batch = {}
        monitors: Batch = {}
        cls: dict[str, Tensor] = {}
        views = {kind: self._views(batch, kind, augmented=True) for kind in cfg.kinds}
        for kind in cfg.masked_kinds:
            masks = self._masks(batch, kind, views[kind])
            z_BKE = self._encode(views[kind], masks)
            cls[kind] = z_BKE[:, 0].unflatten(0, (views[kind].samples, -1))
            if kind in cfg.reconstructed:
                rebuilt = self._rebuild(z_BKE, views[kind], masks)
                terms[f"r{kind[0]}"] = losses.reconstruction_loss(*rebuilt).mean()
        if cfg.uses_teacher:
            teacher_BVK = self._teach(views["global"], teacher_temperature, weight)
            consistency, monitors = self._consistency(teacher_BVK, cls)
            terms |= consistency
        weighted = {name: getattr(cfg, f"w_{name}") * term for name, term in terms.items()}
        outputs = {f"loss_{name}": term.detach() for name, term in terms.items()}
        outputs |= {f"weighted_{name}": term.detach() for name, term in weighted.items()}
        outputs |= {f"cls_std_{kind}": _spread(value) for kind, value in cls.items()}
        return {"loss": torch.stack(list(weighted.values())).sum(), **outputs, **monitors}

    def _views(self, batch: Batch, kind: str, *, augmented: bool = False) -> ViewPatches:
        """The views of one kind, still raw."""
        views, windows_BVC2 = batch[kind], batch["window"].unsqueeze(1)
        if augmented:
            seeds = batch[f"{kind}_seeds"]
            views, windows_BVC2 = augment(views, windows_BVC2, seeds_BV=seeds, cfg=self.views)
        windows_BVC2 = windows_BVC2.expand(-1, views.shape[1], -1, -1).to(self.encoder.cls_token)
        return ViewPatches(
            views.flatten(0, 1), windows_BVC2.flatten(0, 1), self.patch, samples=len(views)
        )

    def _masks(self, batch: Batch, kind: str, views: ViewPatches) -> Masks:
        seeds = batch[f"{kind}_seeds"].flatten()
        return draw_masks(seeds, tokens=math.prod(views.grid), ratio=self.views.mask_ratio)

    def _encode(self, views: ViewPatches, masks: Masks) -> Tensor:
        return self.encoder(views.at(masks.kept_BK), grid=views.grid, kept_BK=masks.kept_BK)

    def _decode(self, z_BKE: Tensor, views: ViewPatches, masks: Masks) -> Tensor:
        return self.decoder(z_BKE, masks=masks, grid=views.grid)

    def _rebuild(self, z_BKE: Tensor, views: ViewPatches, masks: Masks) -> tuple[Tensor, Tensor]:
        """What is predicted of the hidden patches, and what is there, both (B, M, P)."""
        target, _ = losses.standardise(views.at(masks.hidden_BM))
        return self._decode(z_BKE, views, masks), target

    def _teach(self, views: ViewPatches, temperature: float, weight: float) -> Tensor:
        """Teacher probabilities of the intact global views, (B, V, prototypes)."""
        with torch.inference_mode():
            z = self.teacher_encoder(views.all(), grid=views.grid, only_cls=True)
            logits = self.teacher_head(z[:, 0]).unflatten(0, (views.samples, -1))
            self.teacher_sum.add_(logits.sum(dim=(0, 1)), alpha=weight)
            self.teacher_views += weight * logits.shape[0] * logits.shape[1]
            taught = losses.teacher_probabilities(logits, self.center, temperature)
        return taught.clone()  # what inference mode makes cannot be saved for a backward pass

    def _consistency(self, teacher_BVK: Tensor, cls: dict[str, Tensor]) -> tuple[Batch, Batch]:
        """The consistency terms, and what tells a collapse: entropies, divergence, centre."""
        terms: Batch = {}
        entropy = losses.entropy(teacher_BVK)
        monitors: Batch = {"teacher_entropy": entropy, "center_norm": self.center.norm()}
        for name, kind, cross_entropy in (
            ("gg", "global", losses.same_view_cross_entropy),
            ("gl", "local", losses.every_pair_cross_entropy),
        ):
            if not getattr(self.loss, f"w_{name}"):
                continue
            logits = self.head(cls[kind])
            student = losses.student_log_probabilities(logits, self.loss.student_temperature)
            terms[name] = cross_entropy(teacher_BVK, student)
            monitors[f"student_entropy_{kind}"] = losses.entropy(student.detach().exp())
            # H(t, s) = H(t) + KL(t || s), so the divergence needs no second pass.
            monitors[f"kl_{name}"] = terms[name].detach() - entropy
        return terms, monitors

    @torch.no_grad()
    def update_teacher(self, momentum: float, *, skipped: Tensor | None = None) -> None:
        """Move teacher and centre after an optimizer step.

        The centre is a moving average of the teacher's mean output over the whole global batch:
        all ranks and all accumulated forwards of the step, so it does not depend on how the
        batch was divided. A collective call where torch.distributed runs.

        Args:
            momentum: Share of the teacher that stays.
            skipped: Scalar on the device; 1: forget the outputs and move nothing. None: 0.
        """
        if not self.loss.uses_teacher:
            return
        if skipped is None:
            skipped = torch.zeros_like(self.center_started)
        teacher, student = self.teacher_and_student()
        # A weight on the device: 0 where the step was skipped, and no look at it.
        torch._foreach_lerp_(teacher, student, [(1 - skipped) * (1 - momentum)] * len(teacher))
        total = torch.cat([self.teacher_sum, self.teacher_views[None]])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        # From 0 the centre would lag behind what all outputs share, and a sharp teacher would
        # take that for an answer; so the first step's mean replaces it.
        weight = 1 - self.loss.center_momentum * self.center_started
        moved = self.center.lerp(total[:-1] / total[-1], weight)
        self.center.copy_(torch.where(skipped > 0, self.center, moved))  # sums may be NaN
        self.center_started.copy_(torch.maximum(self.center_started, 1 - skipped))
        self.teacher_sum.zero_()
        self.teacher_views.zero_()

    def teacher_and_student(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of the teacher and, in the same order, those it follows."""
        teacher: list[Tensor] = [
            *self.teacher_encoder.parameters(),
            *self.teacher_head.parameters(),
        ]
        student: list[Tensor] = [*self.encoder.parameters(), *self.head.parameters()]
        return teacher, student

    def _held_out(self, batch: Batch) -> Batch:
        sums: Batch = {}
        for kind in self.loss.reconstructed:
            views = self._views(batch, kind)
            masks = self._masks(batch, kind, views)
            predicted, target = self._rebuild(self._encode(views, masks), views, masks)
            error = losses.reconstruction_loss(predicted, target)
            trivial = losses.reconstruction_loss(torch.zeros_like(target), target)
            sums[kind] = torch.stack([error.sum(), trivial.sum(), error.new_tensor(len(error))])
        return sums

    def _picture(self, batch: Batch, kind: str) -> Reconstruction:
        """De-normalise each predicted patch with its own mean and deviation, and put it back."""
        views = self._views(batch, kind)
        masks = self._masks(batch, kind, views)
        original, hidden = views.all(), views.at(masks.hidden_BM)
        _, statistics = losses.standardise(hidden)
        predicted = self._decode(self._encode(views, masks), views, masks)
        restored = losses.at_least_float32(predicted) * statistics.deviation + statistics.mean
        where = masks.hidden_BM.unsqueeze(-1).expand_as(hidden)
        versions = (
            original,
            original.scatter(1, where, torch.full_like(hidden, torch.nan)),
            original.scatter(1, where, restored.clamp(0, 1)),
        )
        volumes = (unpatchify(v, grid=views.grid, patch=self.patch) for v in versions)
        return Reconstruction(*(v.unflatten(0, (views.samples, -1)) for v in volumes))


def _spread(cls_BVE: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of CLS features over views; 0: collapse."""
    return cls_BVE.detach().float().flatten(0, 1).std(dim=0, correction=0).mean()
