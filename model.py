"""TransDiff: an AR Transformer that writes semantic features c, and a diffusion Transformer (DiT) that decodes c into an image.

Read from top to bottom beside "Marrying Autoregressive Transformer and Diffusion with Multi-Reference Autoregression":

    Config, SIZES               Appendix B
    attention_masks             Section 3.2, Figure 3 (d) and (e)
    ARTransformer               Eq. 6, 9, 11
    DiT                         Eq. 7 (the diffusion decoder)
    euler_maruyama              Appendix C, Eq. 16-18
    TransDiff.encode / loss     Eq. 4, 5, 8, 10, 12
    TransDiff.decode, sample    Eq. 7, Algorithms 1 and 2
    load_checkpoint, warm_start our files and the released ones

One idea unifies 1-step AR and MRAR: a chain of `refs` images of one class, whose condition is `cond_tokens` tokens long, shared
evenly by the images. refs = 1 is 1-step AR ("0 references"), refs = 4 is the paper's MRAR. Nothing else differs.
"""
import argparse
import dataclasses
import math
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The model's shape; defaults are TransDiff-B, 1-step, on ImageNet at 256 px. Raises ValueError if the sizes do not fit together."""

    width: int = 768
    heads: int = 12
    ar_depth: int = 24  # blocks of the AR Transformer
    dit_depth: int = 12  # blocks of the DiT decoder
    num_classes: int = 1000
    refs: int = 1  # images in a chain: 1 (1-step AR), 4, 16 or 64 (MRAR)
    cond_tokens: int = 256  # length of c over the whole chain
    class_tokens: int = 64  # copies of the class embedding in front
    latent_channels: int = 16
    latent_size: int = 16  # side of the square latent: 16 at 256 px, 32 at 512 px
    dropout: float = 0.1  # on attention weights, output projections and both MLP layers, training only
    label_dropout: float = 0.1  # share of chains trained with the null class, for guidance

    def __post_init__(self):
        if self.refs not in (1, 4, 16, 64):
            raise ValueError(f"refs {self.refs}: must be 1, 4, 16 or 64, so that an image's share of c is a square of tokens")
        side = math.isqrt(self.tokens_per_image)
        if self.refs > 1 and (self.cond_tokens % self.refs or side * side != self.tokens_per_image or self.latent_size % side):
            raise ValueError(f"cond_tokens {self.cond_tokens} / refs {self.refs} must be a square of tokens, its side a divisor of latent_size {self.latent_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")

    @property
    def tokens_per_image(self):
        return self.cond_tokens // self.refs

    @property
    def patch(self):
        """Side of the patches in which a reference enters the AR Transformer (the paper's f, at 256 px)."""
        return self.latent_size // math.isqrt(self.tokens_per_image)


SIZES = {  # Appendix B; XS is ours, for the bundled 32 px demo
    "XS": Config(160, 5, 3, 4, num_classes=10, cond_tokens=64, class_tokens=16, latent_channels=8, latent_size=8, dropout=0.0),
    "B": Config(768, 12, 24, 12),
    "L": Config(1024, 16, 32, 16),
    "H": Config(1280, 16, 40, 20),
}

SAMPLING = {  # the published settings of each model, and ours for XS; -mrar is refs > 1
    "XS": dict(steps=25, cfg=2.0, s1=1.0, s2=1.0),
    "XS-mrar": dict(steps=25, cfg=2.0, s1=1.0, s2=1.0),
    "B": dict(steps=100, cfg=1.30, s1=0.87, s2=0.91),
    "L": dict(steps=100, cfg=1.30, s1=0.89, s2=0.95),
    "H": dict(steps=100, cfg=1.23, s1=0.87, s2=0.93),
    "B-mrar": dict(steps=100, cfg=1.30, s1=0.87, s2=0.91),
    "L-mrar": dict(steps=100, cfg=1.30, s1=0.925, s2=0.95),
    "H-mrar": dict(steps=100, cfg=1.28, s1=0.87, s2=0.91),
    "L-512": dict(steps=100, cfg=1.30, s1=0.87, s2=0.87),
}


def sampling_settings(config, size=None):
    """steps, cfg, s1, s2 for a model: SAMPLING of its name, or, of a file that does not tell one, of the released model of its shape (else XS)."""
    name = {768: "B", 1024: "L", 1280: "H"}.get(config.width, "XS")
    shape = name if config.refs == 1 else f"{name}-mrar"
    if config.latent_size == 32 and size in (None, "L") and shape == "L":
        return SAMPLING["L-512"]
    return SAMPLING.get(size) or SAMPLING[shape]


def attention_masks(config, device=None):
    """What sees what; True = visible. Print it for Config(..., refs=4).

    Returns
      ar     bool [S, S], S = class_tokens + cond_tokens: row i may attend to the True columns. refs = 1: everything sees everything
             (Figure 3 d). Otherwise block-causal (Figure 3 e): the blocks are [class] [mask] [x_0] [x_1] ..., and a token sees its own
             block and every earlier one.
      cross  bool [refs, cond_tokens]: the tokens of c that the decoder of image k sees, which is c_0 ... c_k: just what the block that
             wrote c_k was allowed to see.
    """
    place = torch.arange(-config.class_tokens, config.cond_tokens, device=device)
    block = place.div(config.tokens_per_image, rounding_mode="floor").clamp_min(-1)  # -1: class, 0: mask, k: x_(k - 1)
    ar = block[:, None] >= block[None, :] if config.refs > 1 else torch.ones(len(block), len(block), dtype=torch.bool, device=device)
    cross = ar[config.class_tokens :: config.tokens_per_image, config.class_tokens :]
    return ar, cross


# ---------------------------------------------------------------------------------------------- shared layers


def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(d)) v over [B, heads, N, d]; mask bool, True = visible, None = all visible."""
    if q.is_cuda or k.shape[-2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # on a CPU in bfloat16 the plain formula is 3 to 5 times as fast as the fused kernel for 64 keys; for long ones its memory would hurt
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)  # [..., N, D] -> [..., heads, N, D / heads]


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask=None):
        """x [B, N, D], mask bool [N, N] (True = visible; None = all) -> [B, N, D]."""
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(x).chunk(3, dim=-1))
        x = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def keys_values(self, c):
        """c [B, K, D] -> keys and values, [B, heads, K, D / heads] each: they depend on neither t nor the noise."""
        return split_heads(self.wk(c), self.heads), split_heads(self.wv(c), self.heads)

    def forward(self, x, keys, values, mask=None):
        """x [B, Q, D] against keys, values [B, heads, K, D / heads]; mask bool [Q, K] -> [B, Q, D]."""
        q = split_heads(self.wq(x), self.heads)
        x = attention(q, keys, values, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


def run_block(block, recompute, *inputs):
    """block(*inputs); with `recompute` its activations are not kept for the backward pass but computed again there (gradient checkpointing)."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def layer_norm(width, affine=True):
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


# ---------------------------------------------------------------------------------------------- AR Transformer


class ARBlock(nn.Module):
    """Pre-LN Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = layer_norm(config.width), SelfAttention(config)
        self.norm2, self.mlp = layer_norm(config.width), MLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """Class and references -> semantic features (Eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpointing = config, False
        self.class_embedding = nn.Embedding(config.num_classes, config.width)
        self.null_class = nn.Parameter(torch.empty(1, config.width))  # stands for the class where guidance drops it
        self.mask_tokens = nn.Parameter(torch.empty(1, 1 if config.refs == 1 else config.tokens_per_image, config.width))
        self.positions = nn.Parameter(torch.empty(1, config.class_tokens + config.cond_tokens, config.width))
        if config.refs > 1:
            self.reference_proj = nn.Linear(config.latent_channels * config.patch**2, config.width)
        self.norm_in = layer_norm(config.width)
        self.blocks = nn.ModuleList(ARBlock(config) for _ in range(config.ar_depth))
        self.norm_out = layer_norm(config.width)

    def forward(self, labels, references=None):
        """labels [B] (num_classes = null), references [B, k, C, H, W], k < refs -> features [B, (k + 1) cond_tokens / refs, D]."""
        cfg, B = self.config, len(labels)
        table = torch.cat([self.class_embedding.weight, self.null_class])
        c = F.embedding(labels, table)[:, None].expand(-1, cfg.class_tokens, -1)  # C of Eq. 9: one embedding, 64 times
        mask = self.mask_tokens.expand(B, cfg.tokens_per_image, -1)
        x = torch.cat([c, mask], dim=1)  # Eq. 9: [C, Mask]
        if references is not None and references.shape[1]:
            x = torch.cat([x, self.reference_proj(self.patchify(references)).to(x.dtype)], dim=1)  # Eq. 11: [C, Mask, x_0, x_1, ...]
        x = self.norm_in(x + self.positions[:, : x.shape[1]])
        visible = None
        if cfg.refs > 1:  # refs = 1 is all visible: no mask is that mask, and the faster attention kernels take it
            visible = attention_masks(cfg, x.device)[0][: x.shape[1], : x.shape[1]]
        for block in self.blocks:
            x = run_block(block, self.grad_checkpointing, x, visible)
        return self.norm_out(x)[:, cfg.class_tokens :]

    def patchify(self, references):
        """[B, k, C, H, W] -> [B, k tokens_per_image, C p p], each patch in the order channel, row, column."""
        B, k, C, H, W = references.shape
        p = self.config.patch
        x = references.reshape(B, k, C, H // p, p, W // p, p)
        # contiguous: the sum that makes a token is then rounded alike whatever slice of a larger tensor the references are
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, k * (H // p) * (W // p), C * p * p).contiguous()


# ---------------------------------------------------------------------------------------------- DiT decoder


class DiTBlock(nn.Module):
    """Self-attention and MLP modulated by the timestep, plain cross-attention to c between them."""

    def __init__(self, config):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.width))
        self.norm1, self.attn1 = layer_norm(config.width), SelfAttention(config)
        self.norm2, self.attn2 = layer_norm(config.width), CrossAttention(config)
        self.norm3, self.mlp = layer_norm(config.width), MLP(config)

    def forward(self, x, modulation, keys, values, mask):
        """x [B M, N, D]: M images for each of B conditions; modulation [B M or 1, 6, D]; keys, values [B, heads, K, D / heads]; mask bool [M N, K]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation)[:, :, None].unbind(1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        together = self.norm2(x).reshape(len(keys), -1, x.shape[-1])  # the M images of a condition share its keys: their tokens are one long query
        x = x + self.attn2(together, keys, values, mask).reshape(x.shape)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


def timestep_embedding(t, dim=256):
    """t [B] in [0, 1] -> [B, dim]: cosines, then sines, of 1000 t at frequencies 10000^(-i / (dim / 2))."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """The diffusion decoder: velocity of x_t given t and c. One token for each position of the latent."""

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpointing = config, False
        self.input_proj = nn.Linear(config.latent_channels, config.width)
        self.positions = nn.Parameter(torch.empty(1, config.latent_size**2, config.width))
        self.cond_proj = nn.Linear(config.width, config.width)
        self.time_mlp = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.modulation = nn.Linear(config.width, 6 * config.width)  # one for all blocks; each adds its own table
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.dit_depth))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))
        self.norm_out = layer_norm(config.width, affine=False)
        self.output_proj = nn.Linear(config.width, config.latent_channels)

    def keys_values(self, c):
        """c [B, K, D] -> for every block its cross-attention's (keys, values): once an image, not once a step or a draw."""
        c = self.cond_proj(c)
        return [block.attn2.keys_values(c) for block in self.blocks]

    def forward(self, x, t, keys_values, mask=None):
        """x [B M, C, H, W], t [B M] or [1] in [0, 1], keys_values of c [B, K, D], mask bool [M, K] -> velocity [B M, C, H, W]."""
        shape, n = x.shape, x.shape[-1] * x.shape[-2]
        temb = self.time_mlp(timestep_embedding(t))
        modulation = self.modulation(F.silu(temb)).unflatten(-1, (6, -1))
        if mask is not None:
            mask = mask.repeat_interleave(n, dim=0)
        x = self.input_proj(x.flatten(2).transpose(1, 2)) + self.positions
        for block, (keys, values) in zip(self.blocks, keys_values):
            x = run_block(block, self.grad_checkpointing, x, modulation, keys, values, mask)
        shift, scale = (self.scale_shift_table + temb[:, None])[:, :, None].unbind(1)
        x = self.output_proj(self.norm_out(x) * (1 + scale) + shift)
        return x.transpose(1, 2).reshape(shape)


# ---------------------------------------------------------------------------------------------- sampler


def euler_maruyama(velocity, x, steps=100, s1=1.0, s2=1.0, noise_sampler=None):
    """Integrate the reverse SDE (Eq. 16) from noise at t = 1 to an image at t = 0 with the scaling factors of Eq. 18.

    With diffusion w(t) = 2 t, score s = -(x + (1 - t) v) / t and drift d = v - w s / 2:
        x <- x + s1 d dt + s2 sqrt(w |dt|) n    for t on linspace(1, 0.04, steps), and a last step from 0.04 to 0 by drift alone.
    The paper writes sigma^2 in the drift but sqrt(sigma) in the noise; the release, and we, use w and sqrt(w). Its last step has neither s1 nor noise.

    velocity(x, t) -> like x, t a 0-d tensor in [0, 1], on the CPU, so that looking at it stops no GPU; called `steps` times. noise_sampler(x) -> like x, called `steps` - 1 times.
    x [...] standard normal. steps = 1 goes from 1 to 0 at once.
    """
    noise_sampler = noise_sampler or torch.randn_like
    times = torch.linspace(1.0, 0.04, steps, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:] + [0.0]):
        dt, w = t_next - t, 2 * t
        v = velocity(x, torch.tensor(t))
        score = -(x + (1 - t) * v) / t
        drift = v - 0.5 * w * score
        if t_next == 0.0:
            return x + drift * dt
        x = x + s1 * drift * dt + s2 * math.sqrt(w * -dt) * noise_sampler(x)


def adams_bashforth(velocity, x, steps=25):
    """Integrate the flow dx/dt = v (Eq. 3) from noise at t = 1 to an image at t = 0 without noise: not in the paper; for few steps.

    The two-step method of Adams and Bashforth, second order at one evaluation a step: x <- x + dt (3 v - v_before) / 2; the first step is Euler's.
    velocity as for euler_maruyama; x [...] standard normal.
    """
    before = None
    for i in range(steps):
        v = velocity(x, torch.tensor(1 - i / steps))
        x = x - (v if before is None else 1.5 * v - 0.5 * before) / steps
        before = v
    return x


# ---------------------------------------------------------------------------------------------- TransDiff


def t_of(normal, distribution="logit-normal"):
    """Standard normal draws -> t in [0, 1]: "logit-normal", sigmoid(N(0, 1)), the release's choice, or "uniform", Eq. 5's."""
    return normal.sigmoid() if distribution == "logit-normal" else torch.special.ndtr(normal)


class TransDiff(nn.Module):
    """AR Transformer + DiT, trained jointly (Section 3.1). `refs` in the config makes it 1-step AR or MRAR."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ar = ARTransformer(config)
        self.cond_positions = nn.Parameter(torch.empty(1, config.cond_tokens, config.width))  # added to the features: c
        self.decoder = DiT(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("scale_shift_table"):
                p.normal_(std=self.config.width**-0.5)
            elif name.endswith(("positions", "mask_tokens", "null_class", "class_embedding.weight")):
                p.normal_(std=0.02)
        nn.init.zeros_(self.decoder.output_proj.weight)

    def encode(self, labels, references=None):
        """c (Eq. 10, 12), as the decoder gets it: the AR Transformer's features plus the second position embedding.

        labels [B] int64 in [0, num_classes], num_classes = null; references [B, k, C, H, W] latents of images 0 ... k - 1, k < refs
        -> c [B, (k + 1) cond_tokens / refs, width]. Raises ValueError if there are too many references.
        """
        if references is not None and references.shape[1] >= self.config.refs:
            raise ValueError(f"{references.shape[1]} references: a model of refs {self.config.refs} takes at most {self.config.refs - 1}")
        features = self.ar(labels, references)
        return features + self.cond_positions[:, : features.shape[1]]

    def velocity(self, x, t, c):
        """x [B, C, H, W] = x_t, t [B] in [0, 1] (1 = noise), c [B, K, width] -> velocity [B, C, H, W] (psi of Eq. 3)."""
        return self.decoder(x, t, self.decoder.keys_values(c))

    def loss(self, latents, labels, t=None, noise=None, repeats=1, t_distribution="logit-normal", dropped=None):
        """Rectified-flow loss over every image of the chain (Eq. 8): mean of |(eps - x) - velocity(x_t, t, c)|^2, a scalar.

        latents [B, refs, C, H, W]: a chain of real images of one class, scaled to unit variance; labels [B].
        Each image is decoded `repeats` times, for as many draws of (t, eps), from one computation of c. t ~ sigmoid(N(0, 1)), the release's choice, or
        t_distribution="uniform" (Eq. 5). What is random can be given instead: t [B, M] and noise [B, M, C, H, W], M = refs repeats, the draws of image 0
        first, or t [B] and noise [B, C, H, W], which every image of a chain then uses; dropped bool [B]: chains that get the null class.
        """
        cfg, (B, R) = self.config, latents.shape[:2]
        if dropped is None and self.training and cfg.label_dropout:
            dropped = torch.rand(B, device=labels.device) < cfg.label_dropout
        if dropped is not None:
            labels = torch.where(dropped, cfg.num_classes, labels)
        if R == 1 and cfg.num_classes < B and not (self.training and cfg.dropout):
            # without references c is a function of the class alone: encode each class once, then give every image its class's keys and values
            c = self.encode(torch.arange(cfg.num_classes + 1, device=labels.device))
            keys_values = [(k.index_select(0, labels), v.index_select(0, labels)) for k, v in self.decoder.keys_values(c)]
        else:
            c = self.encode(labels, latents[:, :-1])  # teacher forcing: the references are real images
            keys_values = self.decoder.keys_values(c)

        if t is None:
            t = t_of(torch.randn(B, R * repeats, device=latents.device), t_distribution)
        elif t.ndim == 1:
            t, noise = t[:, None].expand(-1, R), noise[:, None].expand_as(latents)
        M = t.shape[1]
        x = latents.repeat_interleave(M // R, dim=1)  # [B, M, C, H, W]
        eps = torch.randn_like(x) if noise is None else noise
        cross = attention_masks(cfg, c.device)[1].repeat_interleave(M // R, dim=0) if R > 1 else None  # [M, cond_tokens]
        x_t = (1 - t[..., None, None, None]) * x + t[..., None, None, None] * eps  # Eq. 4
        v = self.decoder(x_t.flatten(0, 1), t.flatten(), keys_values, cross).view_as(x)
        return (v.float() - (eps - x)).square().mean()  # Eq. 5

    forward = loss  # DistributedDataParallel wraps forward

    @torch.no_grad()
    def decode(self, c, noise, c_null=None, steps=100, cfg=1.0, s1=1.0, s2=1.0, noise_sampler=None, sampler="euler-maruyama", cfg_interval=(0.0, 1.0)):
        """Diff(c, eps) of Eq. 7: an image for each c [B, K, width] and noise [B, C, H, W] -> latents [B, C, H, W].

        cfg is the guidance scale; 1 = none, and then one evaluation a step instead of two. Else c_null [B, K, width] is the condition of the
        null class, and t in cfg_interval is guided, t elsewhere not (Kynkaanniemi et al. 2024). K may be any part of the chain's cond_tokens: the
        decoder takes what it is given. sampler "euler-maruyama" is the paper's; "adams-bashforth" has no noise, and no use for s1, s2.
        """
        B, (lo, hi) = len(c), cfg_interval
        keys_values = self.decoder.keys_values(c if cfg == 1 else torch.cat([c, c_null]))
        conditional = [(k[:B], v[:B]) for k, v in keys_values]

        def velocity(x, t):
            guided, t = cfg != 1 and lo <= t <= hi, torch.full((1,), t.item(), device=x.device)
            if not guided:
                return self.decoder(x, t, conditional).to(torch.float32, copy=True)
            # the drift x + (2 - t) v is affine in v, so mixing velocities is mixing drifts: d_null + cfg (d - d_null)
            v, v_null = self.decoder(torch.cat([x, x]), t, keys_values).float().chunk(2)
            return v_null + cfg * (v - v_null)

        if sampler == "adams-bashforth":
            return adams_bashforth(velocity, noise, steps)
        return euler_maruyama(velocity, noise, steps, s1, s2, noise_sampler)

    @torch.no_grad()
    def sample(self, labels, refs=None, steps=100, cfg=1.0, s1=1.0, s2=1.0, noise=None, noise_sampler=None, fresh_noise=False, sampler="euler-maruyama", cfg_interval=(0.0, 1.0)):
        """Algorithms 1 and 2: draw the chain image by image -> latents [B, refs, C, H, W]; the last image is the result.

        labels [B]; refs <= config.refs stops the chain early. What is fed back as x_k is the image's latent (Eq. 11), not c_k
        (Algorithm 2), as in the release. Under guidance (cfg, see decode) the unconditional branch has the null class but the same
        references. noise [B, C, H, W] starts every image of the chain, unless fresh_noise draws one for each by noise_sampler.
        Raises ValueError if refs does not fit the model.
        """
        refs = self.config.refs if refs is None else refs
        if not 1 <= refs <= self.config.refs:
            raise ValueError(f"refs {refs}: this model draws chains of 1 to {self.config.refs} images")
        B, size = len(labels), self.config.latent_size
        noise_sampler = noise_sampler or torch.randn_like
        if noise is None:
            noise = noise_sampler(torch.empty(B, self.config.latent_channels, size, size, device=labels.device))
        chain = noise[:, None][:, :0]
        for k in range(refs):
            c = self.encode(labels, chain)
            c_null = self.encode(torch.full_like(labels, self.config.num_classes), chain) if cfg != 1 else None
            start = noise_sampler(noise) if fresh_noise and k else noise
            x = self.decode(c, start, c_null, steps, cfg, s1, s2, noise_sampler, sampler, cfg_interval)
            chain = torch.cat([chain, x[:, None]], dim=1)
        return chain


# ---------------------------------------------------------------------------------------------- checkpoints

RELEASED_NAMES = (  # the released files' names -> ours; first match wins
    ("fake_latent", "ar.null_class"),
    ("mask_token", "ar.mask_tokens"),
    ("encoder_pos_embed_learned", "ar.positions"),
    ("class_emb.", "ar.class_embedding."),
    ("z_proj.", "ar.reference_proj."),
    ("z_proj_ln.", "ar.norm_in."),
    ("encoder_blocks.", "ar.blocks."),
    ("encoder_norm.", "ar.norm_out."),
    ("diffusion_pos_embed_learned", "cond_positions"),
    ("diffdecoder.net.diffusion_pos_embed_learned", "decoder.positions"),
    ("diffdecoder.net.time_embed.time_embedder.linear_1.", "decoder.time_mlp.0."),
    ("diffdecoder.net.time_embed.time_embedder.linear_2.", "decoder.time_mlp.2."),
    ("diffdecoder.net.time_embed.time_proj.", "decoder.modulation."),
    ("diffdecoder.net.cond_embed.", "decoder.cond_proj."),
    ("diffdecoder.net.res_blocks.", "decoder.blocks."),
    ("diffdecoder.net.final_layer.scale_shift_table", "decoder.scale_shift_table"),
    ("diffdecoder.net.final_layer.linear.", "decoder.output_proj."),
    ("diffdecoder.net.", "decoder."),
)


def our_name(name):
    return next((ours + name[len(theirs) :] for theirs, ours in RELEASED_NAMES if name.startswith(theirs)), name)


def load_file(path):
    """A checkpoint's contents, on the CPU, weights only: no code in it is run. argparse.Namespace alone is let through, since the released files hold one.

    Raises OSError if the file cannot be opened, ValueError if it is not a checkpoint.
    """
    with open(path, "rb"):
        pass  # or an OSError that names it
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("it is damaged, a checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen types here, depending on which byte is wrong
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'cut short'})") from None


def config_of(state):
    """Config of a state dict under our names, read off its shapes. The heads are in no shape: 16 at width 1280, else width / 64."""
    width, mask_tokens = state["ar.null_class"].shape[1], state["ar.mask_tokens"].shape[1]
    cond_tokens = state["cond_positions"].shape[1]
    return Config(
        width=width,
        heads=16 if width == 1280 else width // 64,
        ar_depth=1 + max(int(k.split(".")[2]) for k in state if k.startswith("ar.blocks.")),
        dit_depth=1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.blocks.")),
        num_classes=len(state["ar.class_embedding.weight"]),
        refs=1 if mask_tokens == 1 else cond_tokens // mask_tokens,
        cond_tokens=cond_tokens,
        class_tokens=state["ar.positions"].shape[1] - cond_tokens,
        latent_channels=state["decoder.input_proj.weight"].shape[1],
        latent_size=math.isqrt(state["decoder.positions"].shape[1]),
    )


def load_state(path, ema=True):
    """(config, state dict under our names in float32, the file's other entries) of a checkpoint, ours or the release's.

    Raises ValueError if it is neither, OSError if it cannot be opened.
    """
    ckpt = load_file(path)
    state = ckpt.get("model") if isinstance(ckpt, dict) else None
    if ema and state is not None:
        state = ckpt.get("model_ema") or state
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a TransDiff checkpoint (expected a dict with 'model', and 'model_ema' if there is one)")
    state = {our_name(k): v.float() for k, v in state.items()}
    if "ar.mask_tokens" not in state or "decoder.positions" not in state:
        raise ValueError(f"{path}: not a TransDiff model (no AR Transformer and decoder in it); is it a VAE?")
    if state["ar.mask_tokens"].shape[1] == 1 and "config" not in ckpt:
        # the release's 1-step files carry the reference projection, which 1-step AR never uses (and DDP would object to)
        state = {k: v for k, v in state.items() if not k.startswith("ar.reference_proj.")}
    try:
        config = Config(**ckpt["config"]) if "config" in ckpt else config_of(state)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise ValueError(f"{path}: not a TransDiff model: {e}") from None
    return config, state, {k: ckpt[k] for k in ("size", "step", "classes", "vae", "vae_digest") if k in ckpt}


def load_checkpoint(path, device="cpu", ema=True):
    """TransDiff of a checkpoint, ours (last.pt, ema.pt) or the release's, float32, eval mode, gradients off.

    ema prefers the averaged weights where the file has both. Raises ValueError if the file is no TransDiff model, OSError if it cannot be opened.
    """
    config, state, info = load_state(path, ema)
    with torch.device("meta"):
        model = TransDiff(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: weights do not fit TransDiff: {str(e).splitlines()[1].strip()}") from None
    model.info = info  # of our files: size, step, classes (names), vae (the file its latents came from), vae_digest
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def warm_start(model, config, state, path="checkpoint"):
    """Fill `model` from the weights of another shape (`config`, `state` as from load_state) and return a line for each thing converted.

    1-step -> MRAR: the mask embedding is copied into each mask token, every position is kept, the reference projection is new.
    256 -> 512 px: the decoder's positions are interpolated. Another number of classes: the class embeddings are new.
    Raises ValueError for any other difference.
    """
    new, notes, state = model.config, [], dict(state)
    if config.refs == 1 and new.refs > 1:
        state["ar.mask_tokens"] = state["ar.mask_tokens"].expand(-1, new.tokens_per_image, -1)
        notes.append(f"1-step -> refs {new.refs}: mask embedding copied into {new.tokens_per_image} mask tokens, reference projection new")
    if config.latent_size != new.latent_size and config.refs == new.refs == 1:
        grid = state["decoder.positions"].unflatten(1, (config.latent_size, -1)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new.latent_size, new.latent_size), mode="bicubic", align_corners=False)
        state["decoder.positions"] = grid.flatten(2).transpose(1, 2)
        notes.append(f"latents {config.latent_size} -> {new.latent_size}: decoder positions interpolated")
    if config.num_classes != new.num_classes:
        del state["ar.class_embedding.weight"]
        notes.append(f"{config.num_classes} -> {new.num_classes} classes: class embeddings new")
    fresh = {"ar.class_embedding.weight"} if config.num_classes != new.num_classes else set()
    fresh |= {"ar.reference_proj.weight", "ar.reference_proj.bias"} if config.refs == 1 else set()
    own = model.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in fresh and (k not in own or k not in state or own[k].shape != state[k].shape)]
    if wrong:
        differ = [f"{f.name} {getattr(config, f.name)} against {getattr(new, f.name)}" for f in dataclasses.fields(Config) if getattr(config, f.name) != getattr(new, f.name)]
        raise ValueError(f"{path}: weights of another shape: {', '.join(differ) or sorted(wrong)[0]}")
    model.load_state_dict(state, strict=False)
    return notes
