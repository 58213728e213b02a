"""TransDiff: an AR Transformer writes semantic features c, a diffusion Transformer (DiT) decodes
c into an image.

Read from top to bottom beside "Marrying Autoregressive Transformer and Diffusion with
Multi-Reference Autoregression":

    Config, SIZES               Appendix B
    attention_masks             Section 3.2, Figure 3 (d) and (e)
    ARTransformer               Eq. 6, 9, 11
    DiT                         Eq. 3 (the velocity psi) and Eq. 7 (the diffusion decoder)
    euler_maruyama              Appendix C, Eq. 16-18
    adams_bashforth             ours: a sampler without noise, for few steps
    SAMPLERS, Sampling          settings of the sampler; the released ones of each model
    draw_t, add_noise           the distribution of t in Eq. 5; Eq. 4
    TransDiff.encode, loss      Eq. 5, 8, 10, 12
    TransDiff.decode, sample    Eq. 7, Algorithms 1 and 2
    checkpoints                 our files and the released ones
    running it                  devices, seeds, files and errors: nothing about the method

Eq. 13-15 are in diversity.py, the recipe of Appendix B in train.py; Eq. 1 and 2 are background.

One idea unifies 1-step AR and MRAR: a chain of `refs` images of one class shares a condition c of
`cond_tokens` tokens, cond_tokens / refs per image: c_0, c_1, ... Image k is decoded from c_0 to
c_k. `refs` counts the images; the last is the result, those before it are its references. refs = 1
is 1-step AR ("0 references" in the paper), refs = 4 is the paper's MRAR.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Before torch: OpenMP threads that wait shall not spin for long. With two programs on the same
# cores this is 8 times as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402


class UserError(ValueError):
    """A mistake in the input. The message is one line: the file or flag, and the remedy."""


@dataclass(frozen=True)
class Config:
    """Shape of the model; the defaults are TransDiff-B, 1-step AR, on ImageNet at 256 px."""

    width: int = 768
    heads: int = 12
    ar_depth: int = 24  # blocks of the AR Transformer
    dit_depth: int = 12  # blocks of the DiT decoder
    num_classes: int = 1000
    refs: int = 1  # images in a chain: 1 (1-step AR), 4 (MRAR), 16 or 64
    # Length of c over the chain: h w of Eq. 9; 256 at 512 px too, as released.
    cond_tokens: int = 256
    class_tokens: int = 64  # copies of the class embedding at the start of the input
    latent_channels: int = 16
    latent_size: int = 16  # side of the square latent: 16 at 256 px, 32 at 512 px
    dropout: float = 0.1  # of attention weights, output projections and both MLP layers
    label_drop_prob: float = 0.1  # probability of training a chain with the null class

    def __post_init__(self):
        if self.refs == 1:
            return
        side = math.isqrt(self.cond_tokens // max(1, self.refs))
        if self.refs * side**2 != self.cond_tokens or self.latent_size % side:
            raise UserError(
                f"refs {self.refs}: cond_tokens {self.cond_tokens} / refs has to be a square, and "
                f"the side of the latents, {self.latent_size}, a multiple of its root {side}"
            )

    @property
    def tokens_per_image(self):
        return self.cond_tokens // self.refs

    @property
    def patch(self):
        """Side of a reference's patches, f of Eq. 11: for refs = 4, 2 at 256 px and 4 at 512 px."""
        return self.latent_size // math.isqrt(self.tokens_per_image)

    @property
    def latent_shape(self):
        return self.latent_channels, self.latent_size, self.latent_size


SIZES = {
    # Ours, for the bundled images of 32 px.
    "XS": Config(
        width=160,
        heads=5,
        ar_depth=3,
        dit_depth=4,
        num_classes=10,
        cond_tokens=64,
        class_tokens=16,
        latent_channels=8,
        latent_size=8,
        dropout=0.0,
    ),
    # Ours, for some thousands of images on one GPU. A fresh model takes what belongs to the data
    # (classes, latents, length of c) from the data.
    "S": Config(width=384, heads=6, ar_depth=12, dit_depth=6),
    # Appendix B; the heads are the release's.
    "B": Config(width=768, heads=12, ar_depth=24, dit_depth=12),
    "L": Config(width=1024, heads=16, ar_depth=32, dit_depth=16),
    "H": Config(width=1280, heads=16, ar_depth=40, dit_depth=20),
}


LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def attention_masks(config, device=None):
    """Attention masks of Figure 3, bool, True = may attend. Print them for Config(..., refs=4).

    Returns ar [S, S] for the AR Transformer, S = class_tokens + cond_tokens, and
    cross [refs, cond_tokens] for the decoder: row k allows c_0 ... c_k, from which image k is
    decoded.
    """
    images = torch.arange(config.refs, device=device)
    image_of_token = images.repeat_interleave(config.tokens_per_image)  # of each token of c
    cross = images[:, None] >= image_of_token[None, :]

    #   input   [class] [mask] [x_0] [x_1] ...
    #   block     -1      0      1     2
    #   output     -     c_0    c_1   c_2
    block = torch.cat([images.new_full((config.class_tokens,), -1), image_of_token])
    ar = block[:, None] >= block[None, :]  # Figure 3 (e), block-causal (the paper: "causal")
    if config.refs == 1:
        # Figure 3 (d): bidirectional. The paper's mask of zeros is added to the scores.
        ar = torch.ones_like(ar)
    return ar, cross


def attention(q, k, v, heads, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v of each head.

    q        [B, Q, D]
    k, v     [B, K, D]
    mask     bool [Q, K], True = may attend
    dropout  probability that a weight is dropped
    Returns [B, Q, D].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, d]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x [B, N, D], mask bool [N, N] -> [B, N, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        dropout = self.dropout.p if self.training else 0.0
        return self.dropout(self.proj(attention(q, k, v, self.heads, mask, dropout)))


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, width)
        self.wv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, c):
        """c [B, K, D] -> keys, values, each [B, K, D]."""
        return self.wk(c), self.wv(c)

    def forward(self, x, keys, values, mask=None):
        """x [B, Q, D] against keys, values [B, K, D]; mask bool [Q, K] -> [B, Q, D]."""
        dropout = self.dropout.p if self.training else 0.0
        x = attention(self.wq(x), keys, values, self.heads, mask, dropout)
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))


class ARBlock(nn.Module):
    """Pre-LN Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn = SelfAttention(config)
        self.norm2 = LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def patchify(latents, patch):
    """Cut latents into patches (f x f in Eq. 11), each in the order channel, row, column.

    latents  [B, k, C, H, W]
    Returns [B, k (H / patch) (W / patch), C patch patch].
    """
    x = F.pixel_unshuffle(latents, patch).flatten(3)  # [B, k, C patch patch, tokens]
    # For k = 1 this is a view, and a Linear may round differently on a view: hence the copy.
    return x.transpose(2, 3).flatten(1, 2).contiguous()


class ARTransformer(nn.Module):
    """Class and references -> semantic features (Eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.class_embedding = nn.Embedding(config.num_classes, width)
        self.null_class = nn.Parameter(torch.empty(1, width))  # for guidance: no class
        # The paper repeats one embedding m. For MRAR the release, and we, learn several.
        num_masks = 1 if config.refs == 1 else config.tokens_per_image
        self.mask_tokens = nn.Parameter(torch.empty(1, num_masks, width))
        length = config.class_tokens + config.cond_tokens
        self.positions = nn.Parameter(torch.empty(1, length, width))
        if config.refs > 1:
            self.reference_proj = nn.Linear(config.latent_channels * config.patch**2, width)
        self.norm_in = LayerNorm(width)
        self.blocks = nn.ModuleList(ARBlock(config) for _ in range(config.ar_depth))
        self.norm_out = LayerNorm(width)

    def forward(self, labels, references=None):
        """Features before the second position embedding.

        labels      int64 [B] in [0, num_classes]; num_classes is the null class
        references  latents [B, k, C, H, W], k < refs; None: k = 0
        Returns [B, (k + 1) tokens_per_image, D].
        """
        config = self.config
        embeddings = torch.cat([self.class_embedding.weight, self.null_class])
        class_token = F.embedding(labels, embeddings)[:, None]
        class_tokens = class_token.expand(-1, config.class_tokens, -1)  # C of Eq. 9
        mask_tokens = self.mask_tokens.expand(len(labels), config.tokens_per_image, -1)
        inputs = [class_tokens, mask_tokens]  # Eq. 9: [C, Mask]
        if references is not None and references.shape[1]:
            patches = patchify(references.to(self.positions.dtype), config.patch)
            inputs.append(self.reference_proj(patches))  # Eq. 11: [C, Mask, x_0, x_1, ...]
        x = torch.cat(inputs, dim=1)
        S = x.shape[1]
        x = self.norm_in(x + self.positions[:, :S])

        mask = None  # refs = 1 needs none, and the faster kernels apply
        if config.refs > 1:
            mask, _ = attention_masks(config, x.device)
            mask = mask[:S, :S]
        for block in self.blocks:
            x = block(x, mask)
        # Keep the outputs of mask and references; drop those of the class tokens.
        return self.norm_out(x)[:, config.class_tokens :]


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Self-attention and MLP modulated by the timestep, plain cross-attention to c between them.

    A condition c has M noisy images x_t: batch_mul draws of t for each image of a chain, those of
    image 0 first. Self-attention is within an x_t. Cross-attention joins the x_t of a condition to
    one query sequence, so that they share its keys and values:

        x        [B M, N, D]   | x_t 0 |  | x_t 1 |  ...  | x_t M-1 |     N tokens each
        queries  [B, M N, D]   | x_t 0 | x_t 1 | ... | x_t M-1 |
        keys     [B, K, D]     | c_0 | c_1 | ... |
    """

    def __init__(self, config):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.width))
        self.norm1 = LayerNorm(config.width)
        self.attn1 = SelfAttention(config)
        self.norm2 = LayerNorm(config.width)
        self.attn2 = CrossAttention(config)
        self.norm3 = LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, modulation, keys, values, mask):
        """x [B M, N, D], modulation [B M, 6, D] or [1, 6, D], mask bool [M N, K] -> like x."""
        table = self.scale_shift_table + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # each [B M, 1, D]
        x = x + gate1 * self.attn1(modulate(self.norm1(x), shift1, scale1))
        queries = self.norm2(x).reshape(len(keys), -1, x.shape[-1])
        x = x + self.attn2(queries, keys, values, mask).reshape(x.shape)
        return x + gate2 * self.mlp(modulate(self.norm3(x), shift2, scale2))


def timestep_embedding(t):
    """t [B] in [0, 1] -> [B, 256]: cosines, then sines, of 1000 t 10000^(-i / 128)."""
    i = torch.arange(128, device=t.device)
    frequencies = 10000 ** (-i / 128)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """The diffusion decoder: velocity of x_t given t and c. One token per latent position.

    The paper says "DiT" and "condition"; how c and t enter is the release's: c by cross-attention.
    """

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.input_proj = nn.Linear(config.latent_channels, width)
        self.positions = nn.Parameter(torch.empty(1, config.latent_size**2, width))
        self.cond_proj = nn.Linear(width, width)
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        # Unlike in the cited DiT, one modulation serves all blocks: each adds its own table.
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.dit_depth))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.norm_out = LayerNorm(width, elementwise_affine=False)
        self.output_proj = nn.Linear(width, config.latent_channels)

    def keys_values(self, c):
        """c [B, K, D] -> (keys, values) of every block: once per condition, not per step."""
        c = self.cond_proj(c)
        return [block.attn2.keys_values(c) for block in self.blocks]

    def forward(self, x, t, keys_values, cross_mask=None):
        """Velocity of M noisy images per condition.

        x            [B, M, C, H, W]
        t            [B, M] in [0, 1], or [1, 1] where all images have one t
        keys_values  of c [B, K, D]
        cross_mask   bool [refs, K], M a multiple of refs; None: every image attends to all of c
        Returns [B, M, C, H, W].
        """
        dtype = self.positions.dtype
        temb = self.time_mlp(timestep_embedding(t.flatten()).to(dtype))  # [B M, D]
        modulation = self.modulation(F.silu(temb)).unflatten(1, (6, -1))
        tokens = x.to(dtype).flatten(0, 1).flatten(2).transpose(1, 2)  # [B M, N, C]
        h = self.input_proj(tokens) + self.positions  # [B M, N, D]
        mask = None
        if cross_mask is not None:
            queries_per_row = x.shape[1] * h.shape[1] // len(cross_mask)
            mask = cross_mask.repeat_interleave(queries_per_row, dim=0)  # [M N, K]
        for block, (keys, values) in zip(self.blocks, keys_values):
            h = block(h, modulation, keys, values, mask)
        table = self.scale_shift_table + temb[:, None]
        shift, scale = table.chunk(2, dim=1)
        v = self.output_proj(modulate(self.norm_out(h), shift, scale))
        return v.transpose(1, 2).reshape(x.shape)


def euler_maruyama(velocity, x, steps=100, s1=1.0, s2=1.0, noise_sampler=None):
    """Integrate the reverse SDE (Eq. 16) from t = 1 to t = 0, with the scaling factors of Eq. 18.

    With diffusion w(t) = 2 t, score s = -(x + (1 - t) v) / t and drift d = v - w s / 2 (by Eq. 4
    and 5, x + (1 - t) v estimates eps, and the score of x_t given the image is -eps / t):
        x <- x + s1 d dt + s2 sqrt(w |dt|) n    for t on linspace(1, 0.04, steps), dt < 0
    w is sigma^2 of Eq. 16, so its noise is sqrt(w) dW, as in the release; Eq. 17 and 18 write
    sqrt(sigma) instead. The last step, from t = 0.04 to 0, has neither s1 nor noise: as in the
    release, not in the paper.

    velocity       velocity(x, t) -> like x, t a float in [0, 1]; called `steps` times
    x              standard normal, any shape
    steps          at least 1
    noise_sampler  noise_sampler(x) -> standard normal like x; called `steps` - 1 times
                   (default: torch.randn_like)
    """
    noise_sampler = noise_sampler or torch.randn_like
    times = torch.linspace(1.0, 0.04, steps, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:] + [0.0]):
        dt = t_next - t
        w = 2 * t
        v = velocity(x, t)
        score = -(x + (1 - t) * v) / t
        drift = v - 0.5 * w * score  # the bracket of Eq. 16
        if t_next == 0.0:
            return x + drift * dt
        x = x + s1 * drift * dt + s2 * math.sqrt(w * -dt) * noise_sampler(x)


def adams_bashforth(velocity, x, steps=8, **unused):
    """Integrate the flow dx/dt = v (Eq. 3) without noise, to second order; ours, for few steps.

    unused  s1, s2 and noise_sampler: it has neither scales nor noise
    """
    v_last = None
    for i in range(steps):
        v = velocity(x, 1 - i / steps)
        v_middle = v if v_last is None else 1.5 * v - 0.5 * v_last  # at the middle of the step
        x = x - v_middle / steps
        v_last = v
    return x


# A sampler is called with the velocity, x, and steps, s1, s2, noise_sampler.
SAMPLERS = {"euler-maruyama": euler_maruyama, "adams-bashforth": adams_bashforth}


@dataclass(frozen=True)
class Sampling:
    """What decides a sample beside weights and noise. The defaults are the released settings of B.

    Every model has one, and checkpoints carry it.
    """

    sampler: str = "euler-maruyama"  # a name in SAMPLERS
    steps: int = 100  # evaluations of the velocity per image
    cfg: float = 1.30  # guidance scale, 1 = none; a list has one number for each image of a chain
    # Guide at t <= cfg_below; the release guides at every t (guidance in an interval: Kynkaanniemi
    # et al. 2024).
    cfg_below: float = 1.0
    null_refs: bool = True  # the null class sees the references too, as in the release
    s1: float = 0.87  # scale of the drift, Eq. 18
    s2: float = 0.91  # scale of the noise, Eq. 18

    def replace(self, **given):
        """Sampling with the settings that are not None. Another sampler brings its own steps."""
        given = {k: v for k, v in given.items() if v is not None}
        new = dataclasses.replace(self, **given)
        takes = inspect.signature(SAMPLERS[new.sampler]).parameters
        unused = [k for k in ("s1", "s2") if k not in takes and vars(new)[k] != vars(self)[k]]
        if unused:
            raise UserError(f"{', '.join(unused)}: {new.sampler} has none; name another sampler")
        if new.sampler != self.sampler and "steps" not in given:
            return dataclasses.replace(new, steps=takes["steps"].default)
        return new


RELEASED_SAMPLING = {  # (width, refs, latent_size), where it is not that of B
    (1024, 1, 16): Sampling(s1=0.89, s2=0.95),
    (1024, 4, 16): Sampling(s1=0.925, s2=0.95),
    (1024, 1, 32): Sampling(s2=0.87),
    (1280, 1, 16): Sampling(cfg=1.23, s2=0.93),
    (1280, 4, 16): Sampling(cfg=1.28),
}


def draw_t(shape, distribution="logit-normal", device=None):
    """Times in [0, 1): "logit-normal" as in the release, or "uniform" (Eq. 5)."""
    if distribution == "logit-normal":
        return torch.randn(shape, device=device).sigmoid()
    if distribution == "uniform":
        return torch.rand(shape, device=device)
    raise UserError(f"t {distribution}: must be logit-normal or uniform")


def add_noise(x, eps, t):
    """x_t = (1 - t) x + t eps (Eq. 4): x, eps [B, M, C, H, W], t [B, M]."""
    t = t[..., None, None, None]
    return (1 - t) * x + t * eps


class TransDiff(nn.Module):
    """AR Transformer + DiT, trained jointly (Section 3.1). config.refs: 1-step AR or MRAR.

    As in the release: gates that do not start at zero (unlike the cited DiT), a block-causal mask
    (the paper writes "causal"), and c of `width` numbers per token (the paper: d f f).

    sampling  the Sampling that fits these weights
    info      of a checkpoint: step, classes (names), counts (images of each class in the training
              set, 0: never trained), vae_digest, chains (the flag)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = (config.width, config.refs, config.latent_size)
        self.sampling = RELEASED_SAMPLING.get(shape, Sampling())
        classes = [str(k) for k in range(config.num_classes)]
        self.info = dict(classes=classes, counts=[1] * config.num_classes)
        self.ar = ARTransformer(config)
        self.cond_positions = nn.Parameter(torch.empty(1, config.cond_tokens, config.width))
        self.decoder = DiT(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        embeddings = ("positions", "mask_tokens", "null_class", "class_embedding.weight")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        for name, p in self.named_parameters():
            if name.endswith("scale_shift_table"):
                p.normal_(std=self.config.width**-0.5)
            elif name.endswith(embeddings):
                p.normal_(std=0.02)
        self.decoder.output_proj.weight.zero_()

    def encode(self, labels, references=None):
        """Condition c (Eq. 10, 12): the AR Transformer's features plus a second position embedding
        (the release's; not in the paper).

        labels      int64 [B] in [0, num_classes]; num_classes is the null class
        references  latents [B, k, C, H, W] of images 0 ... k - 1, k < refs; None: k = 0
        Returns c [B, (k + 1) cond_tokens / refs, width], that is c_0 ... c_k.
        """
        features = self.ar(labels, references)
        return features + self.cond_positions[:, : features.shape[1]]

    def velocity(self, x, t, c):
        """psi of Eq. 3. For use from outside: loss and decode compute keys_values once.

        x    x_t [B, C, H, W]
        t    [B] in [0, 1], 1 = noise
        c    [B, K, width]
        Returns the velocity [B, C, H, W].
        """
        keys_values = self.decoder.keys_values(c)
        return self.decoder(x[:, None], t[:, None], keys_values)[:, 0]

    def keys_values(self, labels, references=None):
        """Keys and values of c in every block of the decoder; arguments as of encode."""
        config = self.config
        if config.refs == 1 and config.dropout == 0 and len(labels) > config.num_classes:
            # 1-step AR without dropout: c depends on the class alone, so encode each class once.
            classes = torch.arange(config.num_classes + 1, device=labels.device)
            of_classes = self.decoder.keys_values(self.encode(classes))
            return [(k[labels], v[labels]) for k, v in of_classes]
        return self.decoder.keys_values(self.encode(labels, references))

    def drop_labels(self, labels):
        """Replace each label by the null class with probability label_drop_prob."""
        drop = torch.rand(len(labels), device=labels.device) < self.config.label_drop_prob
        return torch.where(drop, self.config.num_classes, labels)

    def loss(
        self,
        latents,
        labels,
        t=None,
        noise=None,
        batch_mul=1,
        t_distribution="logit-normal",
        reduce=True,
    ):
        """Rectified-flow loss (Eq. 8): mean over the images of the chains and `batch_mul` draws of
        (t, noise) for each; without `reduce` that of each draw, [B, M].

        latents  [B, refs, C, H, W]: chains of real images of one class, scaled to unit variance
        labels   int64 [B]; in training some become the null class, for guidance
        t        [B, M] in [0, 1], M = refs batch_mul, the draws of image 0 first; None: drawn
        noise    [B, M, C, H, W]; None: standard normal
        """
        if self.training:
            labels = self.drop_labels(labels)
        keys_values = self.keys_values(labels, references=latents[:, :-1])  # real images
        x = latents.repeat_interleave(batch_mul, dim=1)  # [B, M, C, H, W]
        t = draw_t(x.shape[:2], t_distribution, x.device) if t is None else t
        eps = torch.randn_like(x) if noise is None else noise
        x_t = add_noise(x, eps, t)  # Eq. 4

        cross_mask = None
        if self.config.refs > 1:
            _, cross_mask = attention_masks(self.config, x.device)  # image k: c_0 ... c_k
        v = self.decoder(x_t, t, keys_values, cross_mask)
        error = (v.float() - (eps - x)).square()  # Eq. 5, 8
        return error.mean() if reduce else error.mean((2, 3, 4))  # mean, not the sum of Eq. 5

    # DistributedDataParallel wraps forward. A subclass with its own loss repeats this line.
    forward = loss

    @torch.no_grad()
    def decode(self, c, noise, c_null=None, noise_sampler=None, on_step=None, **settings):
        """Diff(c, eps) of Eq. 7: one image for each condition.

        c              [B, K, width], K up to cond_tokens
        noise          [B, C, H, W], standard normal
        c_null         [B, K', width], condition of the null class (default: no guidance)
        noise_sampler  of euler_maruyama
        on_step        on_step(t, x_t), called before each step of the sampler
        settings       of Sampling; those that are absent or None are taken from self.sampling
        Returns latents [B, C, H, W].
        """
        s = self.sampling.replace(**settings)
        keys_values = self.decoder.keys_values(c)
        null_keys_values = None if c_null is None else self.decoder.keys_values(c_null)

        def guided_velocity(x, t):
            if on_step:
                on_step(t, x)
            x = x[:, None]
            t_ = torch.full((1, 1), t, device=x.device)
            v = self.decoder(x, t_, keys_values)[:, 0].float()
            if c_null is None or t > s.cfg_below:
                return v
            v_null = self.decoder(x, t_, null_keys_values)[:, 0].float()
            return v_null + s.cfg * (v - v_null)  # the drift is affine in v: this mixes drifts

        sampler = SAMPLERS[s.sampler]
        return sampler(
            guided_velocity, noise, steps=s.steps, s1=s.s1, s2=s.s2, noise_sampler=noise_sampler
        )

    @torch.no_grad()
    def sample(
        self,
        labels,
        refs=None,
        noise=None,
        references=None,
        noise_sampler=None,
        on_step=None,
        **settings,
    ):
        """Algorithms 1 and 2: draw a chain image by image; the last image is the result.

        Fed back is the latent of the image (Eq. 11), as in the release; Algorithm 2 says c_k.

        labels      int64 [B] in [0, num_classes)
        refs        length of the chain, 0 to config.refs (default: config.refs)
        noise       [B, C, H, W], standard normal: every image of a chain starts from it, as in the
                    release (default: drawn by the noise_sampler)
        references  latents [B, k, C, H, W], k < refs: the first images of the chains
        noise_sampler, on_step, settings    of decode
        Returns the chain [B, refs, C, H, W].
        """
        config = self.config
        refs = config.refs if refs is None else refs
        s = self.sampling.replace(**settings)
        cfgs = np.ravel(s.cfg).tolist()
        if len(cfgs) == 1:
            cfgs = cfgs * refs
        chain = references
        if chain is None:  # no images yet
            chain = torch.empty(len(labels), 0, *config.latent_shape, device=labels.device)
        if not 0 <= refs <= config.refs:
            raise UserError(
                f"refs {refs}: this model draws chains of 1 to {config.refs} images; "
                "finetune_mrar.py trains one for longer chains"
            )
        if 0 < refs <= chain.shape[1] or s.steps < 1:
            raise UserError(f"{chain.shape[1]} references, refs {refs}, steps {s.steps}: no image")
        if len(cfgs) != refs:
            raise UserError(f"cfg {cfgs}: give one number, or one for each of {refs} images")
        if not 0 <= labels.min() <= labels.max() < config.num_classes:
            raise UserError(f"labels {labels.tolist()}: must be 0 to {config.num_classes - 1}")
        if noise is None:
            randn = noise_sampler or torch.randn_like
            noise = randn(chain.new_empty(len(labels), *config.latent_shape))
        null = torch.full_like(labels, config.num_classes)

        for k in range(chain.shape[1], refs):
            c = self.encode(labels, chain)  # lines 2-7 and 10 of Algorithm 2: c_0 ... c_k
            c_null = None
            if cfgs[k] != 1:
                c_null = self.encode(null, chain if s.null_refs else None)
            settings["cfg"] = cfgs[k]
            x = self.decode(c, noise, c_null, noise_sampler, on_step, **settings)  # line 11
            chain = torch.cat([chain, x[:, None]], dim=1)  # line 8
        return chain


# -------------------------------------------------------------------------------- checkpoints

RELEASED_NAMES = {  # prefixes of the released files' names -> ours; the first match wins
    "fake_latent": "ar.null_class",
    "mask_token": "ar.mask_tokens",
    "encoder_pos_embed_learned": "ar.positions",
    "class_emb.": "ar.class_embedding.",
    "z_proj.": "ar.reference_proj.",
    "z_proj_ln.": "ar.norm_in.",
    "encoder_blocks.": "ar.blocks.",
    "encoder_norm.": "ar.norm_out.",
    "diffusion_pos_embed_learned": "cond_positions",
    "diffdecoder.net.diffusion_pos_embed_learned": "decoder.positions",
    "diffdecoder.net.time_embed.time_embedder.linear_1.": "decoder.time_mlp.0.",
    "diffdecoder.net.time_embed.time_embedder.linear_2.": "decoder.time_mlp.2.",
    "diffdecoder.net.time_embed.time_proj.": "decoder.modulation.",
    "diffdecoder.net.cond_embed.": "decoder.cond_proj.",
    "diffdecoder.net.res_blocks.": "decoder.blocks.",
    "diffdecoder.net.final_layer.scale_shift_table": "decoder.scale_shift_table",
    "diffdecoder.net.final_layer.linear.": "decoder.output_proj.",
    "diffdecoder.net.": "decoder.",
}


def load_file(path):
    """Contents of a checkpoint on the CPU; weights only: no code in it is run."""
    with user_file(path, "checkpoint"):
        zipped = zipfile.is_zipfile(path)
        # torch.load does not compare the checksums.
        if zipped and RANK == 0 and zipfile.ZipFile(path).testzip():
            raise ValueError("damaged: a checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the released files
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(ckpt, dict):
            raise ValueError(f"it holds a {type(ckpt).__name__}, not a dict of weights")
        return ckpt


def read_weights(ckpt, *names):
    """Float32 weights of a loaded checkpoint, from the first of these entries that it has.

    Prefixes of DDP and torch.compile are taken off. A file of bare weights has no such entry.
    """
    weights = next((ckpt[name] for name in names if ckpt.get(name)), ckpt)
    strip = lambda name: name.removeprefix("module.").replace("_orig_mod.", "")
    return {strip(name): v.float() for name, v in weights.items() if torch.is_tensor(v)}


def config_from_shapes(state):
    """Config of weights under our names. Heads: those of SIZES, else width / 64."""
    width = state["ar.null_class"].shape[1]
    num_masks = state["ar.mask_tokens"].shape[1]
    cond_tokens = state["cond_positions"].shape[1]
    return Config(
        width=width,
        heads={160: 5, 1280: 16}.get(width, width // 64),
        ar_depth=len(fnmatch.filter(state, "ar.blocks.*.norm1.weight")),
        dit_depth=len(fnmatch.filter(state, "decoder.blocks.*.norm1.weight")),
        num_classes=len(state["ar.class_embedding.weight"]),
        refs=1 if num_masks == 1 else cond_tokens // num_masks,
        cond_tokens=cond_tokens,
        class_tokens=state["ar.positions"].shape[1] - cond_tokens,
        latent_channels=state["decoder.input_proj.weight"].shape[1],
        latent_size=math.isqrt(state["decoder.positions"].shape[1]),
    )


RELEASED = {  # names of the authors' models, their folders
    name: f"transdiff_{name.lower().replace('-', '_')}"
    for name in "B L H B-mrar L-mrar H-mrar L-512".split()
}


def checkpoint_path(path, name="ema.pt"):
    """The file that `path` names; of a run's folder its ema.pt; a name in RELEASED: fetched."""
    path = Path(path)
    if str(path) in RELEASED and not path.exists():
        return fetch_released(RELEASED[str(path)])
    return path / name if path.is_dir() else path


@dataclass
class Checkpoint:
    """A model's checkpoint. `weights` are float32, under our names; `entries` is the whole file."""

    path: Path
    config: Config
    weights: dict
    entries: dict


def read_checkpoint(path, ema=True):
    """Checkpoint of a file, ours or the release's."""
    entries = load_file(path)
    weights = read_weights(entries, "model_ema" if ema else "model", "model")
    for theirs, ours in RELEASED_NAMES.items():
        for name in [k for k in weights if k.startswith(theirs)]:
            weights[ours + name.removeprefix(theirs)] = weights.pop(name)
    if "config" in entries:
        config = Config(**entries["config"])
    else:
        with user_file(path, f"TransDiff model, it has {shorten(list(entries))}"):
            config = config_from_shapes(weights)
    if config.refs == 1:  # the released 1-step files hold a projection that 1-step AR never uses
        weights.pop("ar.reference_proj.weight", None)
        weights.pop("ar.reference_proj.bias", None)
    return Checkpoint(path, config, weights, entries)


def load_checkpoint(path, device="cpu", ema=True):
    """TransDiff of a checkpoint, ours or the release's: float32, eval mode, gradients off.

    path  a file, or the folder of a run
    ema   take the EMA weights where the file has both
    Raises UserError (a ValueError) if the file is not a TransDiff model, OSError if it cannot be
    opened.
    """
    ckpt = read_checkpoint(checkpoint_path(path), ema)
    with torch.device("meta"):
        model = TransDiff(ckpt.config)
    if any(buffer.is_meta for buffer in model.buffers()):  # no file may hold its values
        model = TransDiff(ckpt.config)
    with user_file(path, "TransDiff model"):
        model.load_state_dict(ckpt.weights, assign=True)
    info = "step classes vae_digest counts chains".split()
    model.info.update({k: v for k, v in ckpt.entries.items() if k in info})
    model.sampling = dataclasses.replace(model.sampling, **ckpt.entries.get("sampling", {}))
    return model.to(device).eval().requires_grad_(False)


# -------------------------------------------------------------------------------- running it
# Nothing below is about the method: errors, files, processes, devices and seeds of all scripts.

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL = DEMO / "mrar.pt"
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
NVIDIA_DRIVER = "/dev/nvidiactl"  # exists where NVIDIA's driver is loaded


@contextlib.contextmanager
def user_file(path, kind):
    """Turn what a library raises while it reads a user's file into a UserError that names it."""
    try:
        yield
    except (NameError, AttributeError, ImportError, AssertionError):
        raise  # a defect in the code, not in the file
    except Exception as e:
        if isinstance(e, OSError) and e.filename:  # no such file, no permission
            raise
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, KeyError):
            reason = f"no {reason}"
        raise UserError(f"{path}: not a usable {kind} ({reason[:200]})") from e


def run_main(main, interrupted="", out_of_memory=""):
    """Run main(). A user's mistake becomes one line on stderr and exit status 2.

    interrupted, out_of_memory  remedies to add to these two lines
    """
    # Without a terminal, or with an ASCII one, printing must not fail.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # An exit, unlike a kill, ends the processes that read data too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = 2
    try:
        if WORLD > 1 and "RANK" not in os.environ:
            raise UserError("WORLD_SIZE is set, RANK is not: start with torchrun, or unset it")
        return main()
    except KeyboardInterrupt:
        line = "interrupted" + interrupted
        status = 130
    except (UserError, OSError) as e:
        line = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        # A process that reads data puts its traceback before the message.
        line = line.splitlines()[-1].removeprefix("model.UserError: ")
    except (MemoryError, RuntimeError) as e:
        if "DataLoader worker" in str(e):
            line = "a process that reads data died (out of memory?); lower --workers"
        elif isinstance(e, RuntimeError) and not re.search("(of|allocate) memory", str(e)):
            raise
        else:  # of a GPU, of a CPU, of Python
            line = "out of memory" + out_of_memory
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


def atomic_write(path, write):
    """Call write(file) on a new file that replaces `path` only once it is complete.

    A link keeps its place, its target is replaced. A pipe or device is written to.
    """
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file()
    tmp = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target if special else tmp, "wb") as f:
            write(f)
            f.flush()
            if not special:
                os.fsync(f.fileno())
                tmp.replace(target)
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of a full disk
        reason = str(e).splitlines()[0]
        raise OSError(f"{path}: could not be written ({reason})") from e
    finally:
        if tmp.exists():
            tmp.unlink()


def write_json(path, data):
    atomic_write(path, lambda f: f.write(json.dumps(data, indent=1).encode()))


def lock(folder):
    """Refuse a folder that another command writes to. Closing the returned file ends the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except (BlockingIOError, PermissionError):  # depends on the system
        raise UserError(f"{folder}: another command writes to it; wait or change --out") from None
    except OSError:
        pass  # a file system without locks
    return file


def wait_until(condition, what):
    """Wait for other processes, until condition() is true; say for what, and end with torchrun."""
    start = time.monotonic()
    parent = os.getppid()
    while not condition():
        time.sleep(0.2)
        if os.getppid() != parent:
            raise UserError(f"torchrun ended while this process waited for {what}")
        if time.monotonic() > start + 10:
            print(f"process {RANK} waits for {what}", file=sys.stderr)
            start = math.inf


def start_parts(folder, settings):
    """Create a folder for a result in parts, or reopen it; refuse one of other settings.

    Returns the lock of the folder, on rank 0.
    """
    path = folder / "settings.json"
    text = json.dumps(settings, indent=1)  # as write_json does
    held = None
    if RANK == 0:
        held = lock(folder)
        if not list(folder.glob("*.npy")):  # new, or a command that failed before its first part
            write_json(path, settings)
        if path.read_text() != text:
            raise UserError(
                f"{folder}: is of other inputs or settings; give another --out, or remove it"
            )
    # Rank 0 may not have written it yet, or will refuse it.
    wait_until(lambda: path.exists() and path.read_text() == text, f"process 0 to write {path}")
    return held


def part_paths(folder, count):
    return [folder / f"{i:05d}.npy" for i in range(count)]


def missing_parts(paths):
    """Indices of this process's parts (RANK, RANK + WORLD, ...) that do not exist yet."""
    return [i for i in range(RANK, len(paths), WORLD) if not paths[i].exists()]


def fetch(url, name):
    """Path of a file in torch's hub folder; the first process of each machine downloads it."""
    path = Path(torch.hub.get_dir(), "transdiff", name)
    if LOCAL_RANK > 0:
        wait_until(path.exists, path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
            zipfile.ZipFile(path).close()  # an error if the connection was cut
        except Exception as e:  # of the network, of the disk, or not a checkpoint
            path.unlink(missing_ok=True)
            raise OSError(f"could not fetch {url} ({e}); put the file at {path}") from e
    return path


def fetch_released(name):
    """Path of a file of the authors' repository, in torch's hub folder. HF_ENDPOINT: a mirror."""
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{host}/zhendch/Transdiff/resolve/main/{name}/checkpoint-last.pth"
    return fetch(url, f"{name}.pth")


def say(line):
    """Print a line, of one process alone."""
    if RANK == 0:
        print(line)


def shorten(names):
    more = " ..." if len(names) > 20 else ""
    return ", ".join(map(str, names[:20])) + more


def class_index(word, model):
    """Index of a class of the model, given as its name or as its index.

    Names that are numbers are compared as numbers: of folders 01 ... 10, 1 is the first.
    """

    def fold(text):
        return int(text) if text.isdecimal() else unicodedata.normalize("NFC", text)

    names = model.info["classes"]
    counts = model.info["counts"]
    choices = [fold(name) for name in names]
    if not all(map(str.isdecimal, names)):  # else an index would be mistaken for a name
        choices += range(len(names))  # hence the remainder below
    key = fold(word)
    index = choices.index(key) % len(names) if key in choices else None
    if index is None or not counts[index]:
        trained = [name for name, count in zip(names, counts) if count]
        raise UserError(f"--class {word}: this model was trained on the classes {shorten(trained)}")
    return index


def sha256_prefix(data):
    return hashlib.sha256(data).hexdigest()[:16]


def derive_seed(*numbers):
    """One seed, below 2^63, from several integers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def per_image_noise(seed, indices):
    """noise_sampler(x) whose row i, at its n-th call, depends on (seed, indices[i], n) alone."""
    generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]

    def noise_sampler(x):
        rows = [torch.randn(x.shape[1:], generator=g) for g in generators]
        return torch.stack(rows).to(x.device)  # drawn on the CPU: the same on every machine

    return noise_sampler


def pick_device(name=None):
    """torch.device of --device; default: a GPU if there is one, under torchrun one per process.

    Also sets which attention kernels torch may take there.
    """
    has_cuda = torch.cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not (name or has_cuda or hidden) and torch.version.cuda and os.path.exists(NVIDIA_DRIVER):
        raise UserError(
            f"this machine has an NVIDIA GPU, but its driver does not serve the CUDA "
            f"{torch.version.cuda} of this PyTorch: update the driver, install a PyTorch for its "
            "CUDA, or give --device cpu"
        )
    name = name or ("cuda" if has_cuda else "cpu")
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    with user_file(f"--device {name}", "device"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention may round the dropout rate and give NaN gradients under a mask.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:  # else the formula computes bf16 in float32
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return device


def pick_dtype(device, width):
    """Default of --dtype: bf16 where the hardware is fast at it. On a CPU with AVX512-bf16 but no
    AMX that is so for wide models alone: XS trains half as fast as in fp32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported()
        native = native or (torch.cpu._is_avx512_bf16_supported() and width >= 512)
    return "bf16" if native else "fp32"


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def cast_weights(module, dtype):
    """Convert once the weights that autocast would convert at every call; the results are equal."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and dtype == "bf16":
            m.bfloat16()
    return module


def bounded(kind, low, high=2**62):
    """argparse type: an int or float from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high:g}")
        return value

    return number


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage too
        raise UserError(message)


def make_parser(doc, torchrun=False):
    """Parser with the flags of all scripts; torchrun: whether several processes share the work."""
    if WORLD > 1 and not torchrun:
        raise UserError("runs as one process: start it without torchrun")
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps ... (default: a GPU if there is one)"
    )
    return parser
