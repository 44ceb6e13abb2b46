"""GL-MAE as a user would compose it from MONAI's blocks: one call a view, an EMA copy, a DINO head.

The mathematics are the same as ours: with the same weights and masks losses and gradients agree
(tests/test_step_benchmark.py). MONAI's `MaskedAutoEncoderViT` is subclassed only for what it does
not return: the CLS features, and an encoding of the complete view.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from glmae_ray.config import LossConfig, ModelConfig
from glmae_ray.config_data import ViewsConfig

Grid = tuple[int, int, int]


class ViewAutoEncoder(MaskedAutoEncoderViT):
    """MONAI's masked autoencoder for views of one size; also gives what the teacher needs."""

    def forward_with_cls(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted voxels of all patches, the mask (1: hidden), and the CLS features."""
        z, selected, mask = self._masking(self.patch_embedding(x))
        z = self.blocks(torch.cat((self.cls_token.expand(z.shape[0], -1, -1), z), dim=1))
        y = self.decoder_embed(z)
        tokens = self.mask_tokens.repeat(y.shape[0], mask.shape[1], 1)
        tokens[torch.arange(y.shape[0]).unsqueeze(-1), selected] = y[:, 1:, :]
        tokens = tokens + self.decoder_pos_embedding
        y = self.decoder_blocks(torch.cat([y[:, :1, :], tokens], dim=1))
        return self.decoder_pred(y)[:, 1:, :], mask, z[:, 0]

    def encode_complete(self, x: Tensor) -> Tensor:
        """CLS features of the complete view."""
        z = self.patch_embedding(x)
        return self.blocks(torch.cat((self.cls_token.expand(z.shape[0], -1, -1), z), dim=1))[:, 0]


class DinoHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised prototypes."""

    def __init__(self, model: ModelConfig) -> None:
        """Build the head of `model`."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(model.width, model.head_hidden),
            nn.GELU(),
            nn.Linear(model.head_hidden, model.head_hidden),
            nn.GELU(),
            nn.Linear(model.head_hidden, model.head_bottleneck),
        )
        last = nn.Linear(model.head_bottleneck, model.prototypes, bias=False)
        self.last = weight_norm(last)
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the prototypes."""
        return self.last(F.normalize(self.mlp(x), dim=-1))


class ComposedGLMAE(nn.Module):
    """All of GL-MAE from MONAI's blocks; `forward` gives the loss, `update` moves the teacher."""

    def __init__(self, *, model: ModelConfig, views: ViewsConfig, loss: LossConfig) -> None:
        """Build one autoencoder a size of view; both share all weights."""
        super().__init__()
        self.loss, self.patch = loss, model.patch
        self.local = autoencoder(model, views.local_size, ratio=views.mask_ratio)
        self.glob = autoencoder(model, views.global_size, ratio=views.mask_ratio)
        for shared in ("blocks", "decoder_embed", "decoder_blocks", "decoder_pred"):
            setattr(self.glob, shared, getattr(self.local, shared))
        self.glob.patch_embedding.patch_embeddings = self.local.patch_embedding.patch_embeddings
        self.glob.cls_token, self.glob.mask_tokens = self.local.cls_token, self.local.mask_tokens
        self.head = DinoHead(model)
        self.teacher = copy.deepcopy(self.glob).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, model.prototypes))

    def forward(
        self, global_views: list[Tensor], local_views: list[Tensor], *, tau: float
    ) -> Tensor:
        """The total loss of one batch; a list has one (B, C, Z, Y, X) tensor in [0, 1] a view."""
        cfg = self.loss
        with torch.no_grad():
            logits = [self.teacher_head(self.teacher.encode_complete(x)) for x in global_views]
            targets = [F.softmax((part - self.center) / tau, dim=-1) for part in logits]
            self.seen = torch.cat(logits).mean(dim=0, keepdim=True)
        errors_g, students_g = self._student(self.glob, global_views)
        errors_l, students_l = self._student(self.local, local_views)
        gg = [_cross_entropy(t, s) for t, s in zip(targets, students_g, strict=True)]
        gl = [_cross_entropy(t, s) for t in targets for s in students_l]
        return (
            cfg.w_rl * torch.stack(errors_l).mean()
            + cfg.w_rg * torch.stack(errors_g).mean()
            + cfg.w_gg * torch.stack(gg).mean()
            + cfg.w_gl * torch.stack(gl).mean()
        )

    def _student(
        self, autoencoder: ViewAutoEncoder, views: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        errors, logs = [], []
        for x in views:
            predicted, mask, cls = autoencoder.forward_with_cls(x)
            errors.append(masked_error(predicted, mask, x, self.patch))
            logs.append(F.log_softmax(self.head(cls) / self.loss.student_temperature, dim=-1))
        return errors, logs

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Moving averages of the weights and of the centre."""
        for mine, its in ((self.glob, self.teacher), (self.head, self.teacher_head)):
            for student, teacher in zip(mine.parameters(), its.parameters(), strict=True):
                teacher.mul_(momentum).add_(student.detach(), alpha=1 - momentum)
        keep = self.loss.center_momentum
        self.center.mul_(keep).add_(self.seen, alpha=1 - keep)


def autoencoder(model: ModelConfig, size: Grid, *, ratio: float) -> ViewAutoEncoder:
    """MONAI's autoencoder with the numbers of `model`."""
    return ViewAutoEncoder(
        in_channels=model.channels,
        img_size=size,
        patch_size=model.patch,
        hidden_size=model.width,
        mlp_dim=4 * model.width,
        num_layers=model.depth,
        num_heads=model.heads,
        masking_ratio=ratio,
        decoder_hidden_size=model.decoder_width,
        decoder_mlp_dim=4 * model.decoder_width,
        decoder_num_layers=model.decoder_depth,
        decoder_num_heads=model.decoder_heads,
        qkv_bias=True,
    )


def masked_error(predicted: Tensor, mask: Tensor, x: Tensor, patch: Grid) -> Tensor:
    """MAE's loss: mean squared error to the standardised patches, over the hidden ones."""
    b, c, *sides = x.shape
    (z, y, w), (pz, py, pw) = [s // p for s, p in zip(sides, patch, strict=True)], patch
    target = x.reshape(b, c, z, pz, y, py, w, pw)
    target = target.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, z * y * w, -1)
    mean = target.mean(dim=-1, keepdim=True)
    target = (target - mean) / (target.var(dim=-1, keepdim=True, correction=0) + 1e-6).sqrt()
    error = (predicted - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def _cross_entropy(target: Tensor, log_student: Tensor) -> Tensor:
    return -(target * log_student).sum(dim=-1).mean()
