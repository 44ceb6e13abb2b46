"""GLMAE: masked local and global views in, the four loss terms out, in one forward.

Letters: B samples, V views of a kind, N tokens, K kept and M masked tokens, P voxel values of a
patch, E embedding. All computation happens inside `forward`, because autocast and ZeRO act there.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmae_ray import losses
from glmae_ray.config import LossConfig, ModelConfig
from glmae_ray.config_data import ViewsConfig
from glmae_ray.models.augmenting import augment
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import (
    Block,
    Encoder,
    Grid,
    gather_tokens,
    initialise,
    patch_grid,
    patchify,
    sincos_positions,
    unpatchify,
)

Batch = dict[str, Tensor]


class Decoder(nn.Module):
    """Rebuilds the hidden patches of a view; one decoder serves global and local views."""

    def __init__(self, cfg: ModelConfig, *, values: int) -> None:
        """Build from the encoder's width down to `values` numbers a patch."""
        super().__init__()
        width = cfg.decoder_width
        self.embed = nn.Linear(cfg.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads=cfg.decoder_heads) for _ in range(cfg.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, values)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, z_BKE: Tensor, *, kept_BK: Tensor, hidden_BM: Tensor, grid: Grid) -> Tensor:
        """Predict the standardised voxels of the hidden patches, (B, M, P).

        Args:
            z_BKE: The encoder's output, CLS first, then the kept patches.
            kept_BK: Their numbers.
            hidden_BM: The numbers of the patches to predict.
            grid: Patches along Z, Y, X.
        """
        x = self.embed(z_BKE)
        b, _, d = x.shape
        tokens = kept_BK.shape[1] + hidden_BM.shape[1]
        # 0 is CLS, so patch n sits at n + 1.
        where = F.pad(kept_BK + 1, (1, 0)).unsqueeze(-1).expand(-1, -1, d)
        full = self.mask_token.to(x.dtype).expand(b, 1 + tokens, d).scatter(1, where, x)
        full = full + sincos_positions(grid, d, x.device)
        for block in self.blocks:
            full = block(full)
        return self.predict(self.norm(gather_tokens(full, hidden_BM + 1)))


class ProjectionHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised prototypes (the form of DINO's head)."""

    def __init__(self, cfg: ModelConfig) -> None:
        """Build width -> hidden -> hidden -> bottleneck -> prototypes."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(cfg.width, cfg.head_hidden),
            nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_hidden),
            nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_bottleneck),
        )
        initialise(self)
        self.prototypes = Prototypes(cfg.head_bottleneck, cfg.prototypes, bias=False)

    def forward(self, cls: Tensor) -> Tensor:
        """Map CLS features (..., E) to logits (..., prototypes), each within [-1, 1]."""
        return self.prototypes(F.normalize(losses.at_least_float32(self.mlp(cls)), dim=-1))


class Prototypes(nn.Linear):
    """A linear layer whose rows count by their direction only."""

    def forward(self, x: Tensor) -> Tensor:
        """Cosine of the unit vectors x (..., bottleneck) to each prototype, in float32."""
        # A bfloat16 cosine is off by 0.004; a temperature of 0.04 would make that 0.1.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, F.normalize(self.weight, dim=-1))


class MaskedViews(NamedTuple):
    """One kind of view of a batch, the views of all samples in one row."""

    patches_BNP: Tensor  # [0, 1] float32
    kept_BK: Tensor
    hidden_BM: Tensor
    grid: Grid
    samples: int


class Reconstruction(NamedTuple):
    """Volumes (B, V, C, Z, Y, X) in [0, 1] for a picture; what was masked is NaN."""

    original: Tensor
    masked: Tensor
    reconstructed: Tensor


class GLMAE(nn.Module):
    """Student, momentum teacher, decoder and heads; only what the loss weights call for exists.

    From METHOD.md: the masked global view hides patches of the very crop that the teacher sees
    intact; the teacher is the moving average of student encoder and head, sees nothing but
    intact global views and receives no gradient [verified: the paper's method figure].
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

    def forward(
        self, batch: Batch, *, task: str = "objective", teacher_temperature: float = 0.07
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
        """
        if task == "objective":
            return self._objective(batch, teacher_temperature)
        if task == "held_out":
            return self._held_out(batch)
        return {kind: self._picture(self._masked(batch, kind)) for kind in self.loss.reconstructed}

    def _objective(self, batch: Batch, teacher_temperature: float) -> Batch:
        cfg = self.loss
        terms: Batch = {}
        monitors: Batch = {}
        cls: dict[str, Tensor] = {}
        masked = {kind: self._masked(batch, kind, augmented=True) for kind in cfg.kinds}
        for kind in cfg.masked_kinds:
            z_BKE = self._encode(masked[kind])
            cls[kind] = z_BKE[:, 0].reshape(masked[kind].samples, -1, z_BKE.shape[-1])
            if kind in cfg.reconstructed:
                terms[f"r{kind[0]}"] = self._reconstruction_error(z_BKE, masked[kind]).mean()
        if cfg.uses_teacher:
            teacher_BVK = self._teach(masked["global"], teacher_temperature)
            consistency, monitors = self._consistency(teacher_BVK, cls)
            terms |= consistency
        weighted = {name: getattr(cfg, f"w_{name}") * term for name, term in terms.items()}
        outputs = {f"loss_{name}": term.detach() for name, term in terms.items()}
        outputs |= {f"weighted_{name}": term.detach() for name, term in weighted.items()}
        outputs |= {f"cls_std_{kind}": _spread(value) for kind, value in cls.items()}
        return {"loss": torch.stack(list(weighted.values())).sum(), **outputs, **monitors}

    def _masked(self, batch: Batch, kind: str, *, augmented: bool = False) -> MaskedViews:
        """Cut the views of one kind into patches and mask them."""
        volumes = self._volumes(batch, kind, augmented=augmented)
        patches = patchify(volumes, self.patch)
        seeds = batch[f"{kind}_seeds"].flatten()
        kept, hidden = draw_masks(seeds, tokens=patches.shape[1], ratio=self.views.mask_ratio)
        grid = patch_grid(list(volumes.shape[2:]), self.patch)
        return MaskedViews(patches, kept, hidden, grid, samples=len(batch[kind]))

    def _volumes(self, batch: Batch, kind: str, *, augmented: bool) -> Tensor:
        """Cast and window the views of one kind: (B V, C, Z, Y, X) in [0, 1]."""
        views, windows_BVC2 = batch[kind], batch["window"].unsqueeze(1)
        if augmented:
            seeds = batch[f"{kind}_seeds"]
            views, windows_BVC2 = augment(views, windows_BVC2, seeds_BV=seeds, cfg=self.views)
        low, high = windows_BVC2[..., None, None, None, :].unbind(-1)
        unit = (views.to(self.encoder.cls_token.dtype) - low) / (high - low)
        return unit.clamp(0, 1).flatten(0, 1)

    def _encode(self, views: MaskedViews) -> Tensor:
        visible = gather_tokens(views.patches_BNP, views.kept_BK)
        return self.encoder(visible, grid=views.grid, kept_BK=views.kept_BK)

    def _decode(self, z_BKE: Tensor, views: MaskedViews) -> Tensor:
        return self.decoder(
            z_BKE, kept_BK=views.kept_BK, hidden_BM=views.hidden_BM, grid=views.grid
        )

    def _reconstruction_error(self, z_BKE: Tensor, views: MaskedViews) -> Tensor:
        target, _ = losses.standardise(gather_tokens(views.patches_BNP, views.hidden_BM))
        return losses.reconstruction_loss(self._decode(z_BKE, views), target)

    @torch.no_grad()
    def _teach(self, views: MaskedViews, temperature: float) -> Tensor:
        """Teacher probabilities of the intact global views, (B, V, prototypes)."""
        z = self.teacher_encoder(views.patches_BNP, grid=views.grid)
        logits = self.teacher_head(z[:, 0]).reshape(views.samples, -1, len(self.center))
        self.teacher_sum += logits.sum(dim=(0, 1))
        self.teacher_views += logits.shape[0] * logits.shape[1]
        return losses.teacher_probabilities(logits, self.center, temperature)

    def _consistency(self, teacher_BVK: Tensor, cls: dict[str, Tensor]) -> tuple[Batch, Batch]:
        """The consistency terms, and what tells a collapse: entropies, divergence, centre."""
        cfg = self.loss
        terms: Batch = {}
        monitors: Batch = {}
        entropy = losses.entropy(teacher_BVK)
        if cfg.w_gg > 0:
            student = losses.student_log_probabilities(
                self.head(cls["global"]), cfg.student_temperature
            )
            terms["gg"] = losses.same_view_cross_entropy(teacher_BVK, student)
            monitors["student_entropy"] = losses.entropy(student.detach().exp())
        if cfg.w_gl > 0:
            student = losses.student_log_probabilities(
                self.head(cls["local"]), cfg.student_temperature
            )
            terms["gl"] = losses.every_pair_cross_entropy(teacher_BVK, student)
        monitors["teacher_entropy"] = entropy
        monitors["center_norm"] = self.center.norm()
        # H(t, s) = H(t) + KL(t || s), so the divergence needs no second pass.
        monitors |= {f"kl_{name}": term.detach() - entropy for name, term in terms.items()}
        return terms, monitors

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move teacher and centre after an optimizer step.

        The centre is a moving average of the teacher's mean output over the whole global batch:
        all ranks and all accumulated forwards of the step, so it does not depend on how the
        batch was divided. A collective call where torch.distributed runs.
        """
        if not self.loss.uses_teacher:
            return
        torch._foreach_lerp_(*self.teacher_and_student(), 1 - momentum)
        total = torch.cat([self.teacher_sum, self.teacher_views[None]])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        # From 0 the centre would lag behind what all outputs share, and a sharp teacher would
        # take that for an answer; so the first step's mean replaces it.
        weight = 1 - self.loss.center_momentum * self.center_started
        self.center.lerp_(total[:-1] / total[-1], weight)
        self.center_started.fill_(1)
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
            views = self._masked(batch, kind)
            target, _ = losses.standardise(gather_tokens(views.patches_BNP, views.hidden_BM))
            error = losses.reconstruction_loss(self._decode(self._encode(views), views), target)
            trivial = losses.reconstruction_loss(torch.zeros_like(target), target)
            sums[kind] = torch.stack([error.sum(), trivial.sum(), error.new_tensor(len(error))])
        return sums

    def _picture(self, views: MaskedViews) -> Reconstruction:
        """De-normalise each predicted patch with its own mean and deviation, and put it back."""
        hidden = gather_tokens(views.patches_BNP, views.hidden_BM)
        _, statistics = losses.standardise(hidden)
        predicted = losses.at_least_float32(self._decode(self._encode(views), views))
        restored = predicted * statistics.deviation + statistics.mean
        where = views.hidden_BM.unsqueeze(-1).expand_as(hidden)
        originals = views.patches_BNP
        versions = (
            originals,
            originals.scatter(1, where, torch.full_like(hidden, torch.nan)),
            originals.scatter(1, where, restored.clamp(0, 1)),
        )
        volumes = (unpatchify(v, grid=views.grid, patch=self.patch) for v in versions)
        return Reconstruction(*(v.reshape(views.samples, -1, *v.shape[1:]) for v in volumes))


def _spread(cls_BVE: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of CLS features over views; 0: collapse."""
    return cls_BVE.detach().float().flatten(0, 1).std(dim=0, correction=0).mean()
