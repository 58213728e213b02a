"""TransDiff: an AR Transformer writes semantic features c, a diffusion Transformer (DiT) decodes c into an image.

Read from top to bottom beside "Marrying Autoregressive Transformer and Diffusion with Multi-Reference Autoregression":

    Config, SIZES               Appendix B (SAMPLING: the settings of the release)
    attention_masks             Section 3.2, Figure 3 (d) and (e)
    ARTransformer               Eq. 6, 9, 11
    DiT                         Eq. 3 (the velocity psi) and Eq. 7 (the diffusion decoder)
    euler_maruyama              Appendix C, Eq. 16-18
    TransDiff.encode, loss      Eq. 4, 5, 8, 10, 12
    TransDiff.decode, sample    Eq. 7, Algorithms 1 and 2
    load_checkpoint             our files and the released ones

One idea unifies 1-step AR and MRAR: a chain of `refs` images of one class shares a condition c of `cond_tokens` tokens,
cond_tokens / refs for each image. refs = 1 is 1-step AR ("0 references" in the paper), refs = 4 is the paper's MRAR.
"""

import argparse
import contextlib
import functools
import math
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    """Shape of the model; the defaults are TransDiff-B, 1-step AR, on ImageNet at 256 px."""

    width: int = 768
    heads: int = 12
    ar_depth: int = 24  # blocks of the AR Transformer
    dit_depth: int = 12  # blocks of the DiT decoder
    num_classes: int = 1000
    refs: int = 1  # images in a chain, refs - 1 of them references: 1 (1-step AR), 4 (MRAR), 16 or 64 (our guess)
    cond_tokens: int = 256  # length of c over the whole chain; 256 also at 512 px, where Eq. 9 has h w = 1,024
    class_tokens: int = 64  # copies of the class embedding at the start of the input
    latent_channels: int = 16
    latent_size: int = 16  # side of the square latent: 16 at 256 px, 32 at 512 px
    dropout: float = 0.1  # of attention weights, output projections and both MLP layers
    label_drop_prob: float = 0.1  # probability of training a chain with the null class, for guidance

    def __post_init__(self):
        if self.refs not in (1, 4, 16, 64) or self.width % self.heads:
            raise ValueError(f"refs {self.refs} must be 1, 4, 16 or 64; heads {self.heads} must divide {self.width}")
        side = math.isqrt(self.tokens_per_image)
        if self.refs > 1 and (self.refs * side**2 != self.cond_tokens or self.latent_size % side):
            raise ValueError(
                f"refs {self.refs}: not with cond_tokens {self.cond_tokens}, latent_size {self.latent_size}"
            )

    @property
    def tokens_per_image(self):
        return self.cond_tokens // self.refs

    @property
    def patch(self):  # references enter in patches of patch x patch: the paper's f (2 for refs = 4; 4 at 512 px)
        return self.latent_size // math.isqrt(self.tokens_per_image)

    @property
    def latent_shape(self):
        return self.latent_channels, self.latent_size, self.latent_size


SIZES = {  # Appendix B: width, heads, AR blocks, DiT blocks; XS is ours, for the bundled 32 px images
    "XS": Config(160, 5, 3, 4, 10, cond_tokens=64, class_tokens=16, latent_channels=8, latent_size=8, dropout=0.0),
    "B": Config(768, 12, 24, 12),
    "L": Config(1024, 16, 32, 16),
    "H": Config(1280, 16, 40, 20),
}

SAMPLING = {  # the release's settings of each model, ours for XS; -mrar: refs > 1, where they differ
    "XS": dict(steps=8, cfg=2.25, cfg_below=0.65, null_refs=False, sampler="adams-bashforth"),
    "B": dict(steps=100, cfg=1.30, s1=0.87, s2=0.91),
    "L": dict(steps=100, cfg=1.30, s1=0.89, s2=0.95),
    "H": dict(steps=100, cfg=1.23, s1=0.87, s2=0.93),
    "L-512": dict(steps=100, cfg=1.30, s1=0.87, s2=0.87),
    "other": dict(steps=25, cfg=2.0, s1=1.0, s2=1.0),
    "L-mrar": dict(steps=100, cfg=1.30, s1=0.925, s2=0.95),
    "H-mrar": dict(steps=100, cfg=1.28, s1=0.87, s2=0.91),
}


def sampling_settings(config):
    """SAMPLING of the published model of this width."""
    name = {160: "XS", 768: "B", 1024: "L", 1280: "H"}.get(config.width, "other")
    variant = name + ("-mrar" if config.refs > 1 else "-512" if config.latent_size == 32 else "")
    return SAMPLING.get(variant, SAMPLING[name])


def attention_masks(config, device=None):
    """Attention masks of Figure 3, bool, True = may attend. Print them for Config(..., refs=4).

    Returns ar [S, S] for the AR Transformer, S = class_tokens + cond_tokens, and cross [refs, cond_tokens] for the
    decoder: row k allows c_0 ... c_k, from which image k is decoded.
    """
    images = torch.arange(config.refs, device=device)
    image_of_token = images.repeat_interleave(config.tokens_per_image)  # the image that each token of c belongs to
    cross = images[:, None] >= image_of_token[None, :]

    # The input is [class] [mask] [x_0] [x_1] ...: block -1, 0, 1, 2, ... The output of block k >= 0 is c_k.
    block = torch.cat([images.new_full((config.class_tokens,), -1), image_of_token])
    ar = block[:, None] >= block[None, :]  # Figure 3 (e): a token attends to its own block and every earlier one
    if config.refs == 1:
        ar = torch.ones_like(ar)  # Figure 3 (d): bidirectional (the paper's zeros are added to the scores)
    return ar, cross


LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def attention(q, k, v, heads, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v: q [B, Q, D], k, v [B, K, D], mask bool [Q, K], True = may attend -> [B, Q, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, d]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 512:  # here faster than the fused kernel
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        x = F.dropout(scores.softmax(dim=-1), dropout) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask=None):
        """x [B, N, D], mask bool [N, N] -> [B, N, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.dropout(self.proj(attention(q, k, v, self.heads, mask, self.dropout.p * self.training)))


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x, keys, values, mask=None):
        """x [B, Q, D] against keys, values [B, K, D]; mask bool [Q, K] -> [B, Q, D]."""
        x = attention(self.wq(x), keys, values, self.heads, mask, self.dropout.p * self.training)
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class ARBlock(nn.Module):
    """Pre-LN Transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = LayerNorm(config.width), SelfAttention(config)
        self.norm2, self.mlp = LayerNorm(config.width), MLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """Class and references -> semantic features (Eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes, config.width)
        self.null_class = nn.Parameter(torch.empty(1, config.width))  # replaces the class where guidance drops it
        # The paper repeats one embedding m; the release, and we, learn one for each mask token of MRAR.
        self.mask_tokens = nn.Parameter(torch.empty(1, config.tokens_per_image if config.refs > 1 else 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, config.class_tokens + config.cond_tokens, config.width))
        if config.refs > 1:
            self.reference_proj = nn.Linear(config.latent_channels * config.patch**2, config.width)
        self.norm_in = LayerNorm(config.width)
        self.blocks = nn.ModuleList(ARBlock(config) for _ in range(config.ar_depth))
        self.norm_out = LayerNorm(config.width)

    def forward(self, labels, references=None):
        """labels [B], num_classes = null; references [B, k, C, H, W], k < refs -> [B, (k + 1) tokens_per_image, D]."""
        config = self.config
        embedding = F.embedding(labels, torch.cat([self.class_embedding.weight, self.null_class]))
        class_tokens = embedding[:, None].expand(-1, config.class_tokens, -1)  # C of Eq. 9: one embedding, 64 times
        mask_tokens = self.mask_tokens.expand(len(labels), config.tokens_per_image, -1)
        inputs = [class_tokens, mask_tokens]  # Eq. 9: [C, Mask]
        if references is not None and references.shape[1]:
            inputs.append(self.reference_proj(self.patchify(references)))  # Eq. 11: [C, Mask, x_0, x_1, ...]
        x = torch.cat(inputs, dim=1)
        S = x.shape[1]
        x = self.norm_in(x + self.positions[:, :S])
        # refs = 1 needs no mask, and the faster kernels apply
        mask = attention_masks(config, x.device)[0][:S, :S] if config.refs > 1 else None
        for block in self.blocks:
            x = block(x, mask)
        return self.norm_out(x)[:, config.class_tokens :]

    def patchify(self, references):
        """[B, k, C, H, W] -> [B, k tokens_per_image, C p p], each patch in the order channel, row, column."""
        x = F.pixel_unshuffle(references, self.config.patch).flatten(3)  # [B, k, C p p, tokens_per_image]
        return x.transpose(2, 3).flatten(1, 2).contiguous()  # contiguous also for k = 1, a view: every k rounds alike


class DiTBlock(nn.Module):
    """Self-attention and MLP modulated by the timestep, plain cross-attention to c between them.

    B conditions, M noisy images for each (several draws of t, several images of a chain), N tokens an image:
      x             [B M, N, D]
      modulation    [B M, 6, D], or [1, 6, D] where all images have one t
      keys, values  [B, K, D], of c [B, K, D]
      mask          bool [M N, K]: the images of one condition share its keys, so their tokens are one query sequence
    """

    def __init__(self, config):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.width))
        self.norm1, self.attn1 = LayerNorm(config.width), SelfAttention(config)
        self.norm2, self.attn2 = LayerNorm(config.width), CrossAttention(config)
        self.norm3, self.mlp = LayerNorm(config.width), MLP(config)

    def forward(self, x, modulation, keys, values, mask):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation)[:, :, None].unbind(1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        queries = self.norm2(x).reshape(len(keys), -1, x.shape[-1])  # [B, M N, D]
        x = x + self.attn2(queries, keys, values, mask).reshape(x.shape)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


def timestep_embedding(t, dim=256):
    """t [B] in [0, 1] -> [B, dim]: cosines, then sines, of 1000 t at frequencies 10000^(-i / (dim / 2))."""
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * i / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """The diffusion decoder: velocity of x_t given t and c. One token for each position of the latent."""

    def __init__(self, config):
        super().__init__()
        self.input_proj = nn.Linear(config.latent_channels, config.width)
        self.positions = nn.Parameter(torch.empty(1, config.latent_size**2, config.width))
        self.cond_proj = nn.Linear(config.width, config.width)
        self.time_mlp = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.modulation = nn.Linear(config.width, 6 * config.width)  # one for all blocks; each adds its own table
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.dit_depth))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))
        self.norm_out = LayerNorm(config.width, elementwise_affine=False)
        self.output_proj = nn.Linear(config.width, config.latent_channels)

    def keys_values(self, c):
        """c [B, K, D] -> (keys, values) of every block: computed once a condition, not once a step or a draw of t."""
        c = self.cond_proj(c)
        return [(block.attn2.wk(c), block.attn2.wv(c)) for block in self.blocks]

    def forward(self, x, t, keys_values, mask=None):
        """x [B M, C, H, W], t [B M] or [1] in [0, 1], keys_values of c, mask bool [M, K] -> velocity [B M, C, H, W]."""
        shape, N = x.shape, x.shape[-1] * x.shape[-2]
        temb = self.time_mlp(timestep_embedding(t))
        modulation = self.modulation(F.silu(temb)).unflatten(-1, (6, -1))
        if mask is not None:
            mask = mask.repeat_interleave(N, dim=0)
        x = self.input_proj(x.flatten(2).transpose(1, 2)) + self.positions
        for block, (keys, values) in zip(self.blocks, keys_values):
            x = block(x, modulation, keys, values, mask)
        shift, scale = (self.scale_shift_table + temb[:, None])[:, :, None].unbind(1)
        x = self.output_proj(self.norm_out(x) * (1 + scale) + shift)
        return x.transpose(1, 2).reshape(shape)


def euler_maruyama(velocity, x, steps=100, s1=1.0, s2=1.0, noise_sampler=None):
    """Integrate the reverse SDE (Eq. 16) from noise at t = 1 to an image at t = 0, with the scaling factors of Eq. 18.

    With diffusion w(t) = 2 t, score s = -(x + (1 - t) v) / t and drift d = v - w s / 2 (by Eq. 4 and 5, x + (1 - t) v
    estimates eps, and the score of x_t given the image is -eps / t):
        x <- x + s1 d dt + s2 sqrt(w |dt|) n    for t on linspace(1, 0.04, steps), dt < 0
    w is sigma^2 of Eq. 16, so its noise is sqrt(w) dW, as in the release; Eq. 17 and 18 write sqrt(sigma) instead.
    The last step, from t = 0.04 to 0, has neither s1 nor noise: as in the release, not in the paper.

    velocity       velocity(x, t) -> like x, t a float in [0, 1]; called `steps` times
    x              standard normal, any shape
    noise_sampler  noise_sampler(x) -> standard normal like x; called `steps` - 1 times (default: torch.randn_like)
    """
    noise_sampler = noise_sampler or torch.randn_like
    times = torch.linspace(1.0, 0.04, steps, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:] + [0.0]):
        dt, w = t_next - t, 2 * t
        v = velocity(x, t)
        score = -(x + (1 - t) * v) / t
        drift = v - 0.5 * w * score
        if t_next == 0.0:
            return x + drift * dt
        x = x + s1 * drift * dt + s2 * math.sqrt(w * -dt) * noise_sampler(x)


def adams_bashforth(velocity, x, steps=25):
    """Integrate the flow dx/dt = v (Eq. 3) without noise: second order, one evaluation a step; ours, for few steps."""
    v_last = None
    for i in range(steps):
        v = velocity(x, 1 - i / steps)
        x = x - (v if v_last is None else 1.5 * v - 0.5 * v_last) / steps
        v_last = v
    return x


def t_from_normal(normal, distribution="logit-normal"):
    """Standard normal draws -> t in [0, 1]: "logit-normal" as the release, or "uniform" (Eq. 5), by the normal CDF."""
    return normal.sigmoid() if distribution == "logit-normal" else torch.special.ndtr(normal)


class TransDiff(nn.Module):
    """AR Transformer + DiT, trained jointly (Section 3.1). `refs` in the config makes it 1-step AR or MRAR.

    As in the release: one modulation for all blocks and gates not zero at the start (unlike the cited DiT), a
    block-causal mask (the paper writes "causal"), and c of `width` numbers a token (the paper: d f f).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ar = ARTransformer(config)
        self.cond_positions = nn.Parameter(torch.empty(1, config.cond_tokens, config.width))
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
        """Condition c (Eq. 10, 12): the AR Transformer's features plus a second position embedding.

        labels      int64 [B] in [0, num_classes]; num_classes is the null class
        references  latents [B, k, C, H, W] of images 0 ... k - 1, k < refs; None: k = 0
        Returns c [B, (k + 1) cond_tokens / refs, width], that is c_0 ... c_k.
        """
        if references is not None and references.shape[1] >= self.config.refs:
            raise ValueError(f"{references.shape[1]} references: the model takes at most {self.config.refs - 1}")
        features = self.ar(labels, references)
        return features + self.cond_positions[:, : features.shape[1]]

    def velocity(self, x, t, c):
        """psi of Eq. 3: x_t [B, C, H, W], t [B] in [0, 1] (1 = noise), c [B, K, width] -> velocity [B, C, H, W]."""
        return self.decoder(x, t, self.decoder.keys_values(c))

    def loss(self, latents, labels, t=None, noise=None, batch_mul=1, drop=None):
        """Rectified-flow loss (Eq. 8): mean over every image of the chain and `batch_mul` draws of (t, noise) for each.

        latents  [B, refs, C, H, W]: chains of real images of one class, scaled to unit variance
        labels   int64 [B]
        t        [B, M] in [0, 1], M = refs batch_mul, the draws of image 0 first; None: logit-normal
        noise    [B, M, C, H, W]; None: standard normal
        drop     bool [B]: chains that get the null class; None: label_drop_prob of them in training, none in eval mode
        """
        config, (B, R) = self.config, latents.shape[:2]
        x = latents.repeat_interleave(batch_mul, dim=1)  # [B, M, C, H, W]
        t = t_from_normal(torch.randn(x.shape[:2], device=x.device)) if t is None else t
        eps = torch.randn_like(x) if noise is None else noise
        if drop is None and self.training:
            drop = torch.rand(B, device=x.device) < config.label_drop_prob
        if drop is not None:
            labels = torch.where(drop, config.num_classes, labels)

        keys_values = self.encode_keys_values(labels, latents[:, :-1])  # teacher forcing: real images as references
        mask = attention_masks(config, x.device)[1].repeat_interleave(batch_mul, dim=0) if R > 1 else None
        t_ = t[..., None, None, None]
        x_t = (1 - t_) * x + t_ * eps  # Eq. 4
        v = self.decoder(x_t.flatten(0, 1), t.flatten(), keys_values, mask).view_as(x)
        return (v.float() - (eps - x)).square().mean()  # Eq. 5

    forward = loss  # DistributedDataParallel wraps forward

    def encode_keys_values(self, labels, references):
        """Keys and values of c; without dropout (XS) a large 1-step batch encodes each class once."""
        classes = torch.arange(self.config.num_classes + 1, device=labels.device)
        if references.shape[1] or self.config.dropout or len(labels) < len(classes):
            return self.decoder.keys_values(self.encode(labels, references))
        keys_values = self.decoder.keys_values(self.encode(classes))
        return [(k.index_select(0, labels), v.index_select(0, labels)) for k, v in keys_values]

    @torch.no_grad()
    def decode(self, c, noise, c_null=None, cfg=1.0, cfg_below=1.0, steps=100, sampler="euler-maruyama", **settings):
        """Diff(c, eps) of Eq. 7: one image for each condition.

        c          [B, K, width], K up to cond_tokens
        noise      [B, C, H, W], standard normal
        c_null     [B, K', width]: condition of the null class, for guidance (default: none, half the work)
        cfg        guidance scale at t <= cfg_below (Kynkaanniemi et al. 2024); the release guides at every t
        sampler    "euler-maruyama", the paper's, or "adams-bashforth", which has no noise
        settings   of euler_maruyama: s1, s2, noise_sampler
        Returns latents [B, C, H, W].
        """
        if sampler not in ("euler-maruyama", "adams-bashforth") or steps < 1:
            raise ValueError(f"sampler {sampler}, steps {steps}: expected a sampler named above and 1 step or more")
        keys_values = self.decoder.keys_values(c)
        null_keys_values = None if c_null is None else self.decoder.keys_values(c_null)

        def velocity(x, t):
            t_tensor = torch.full((1,), t, device=x.device)
            v = self.decoder(x, t_tensor, keys_values).float()
            if c_null is None or t > cfg_below:
                return v
            v_null = self.decoder(x, t_tensor, null_keys_values).float()
            return v_null + cfg * (v - v_null)  # the drift is affine in v, so mixing velocities is mixing drifts

        if sampler == "adams-bashforth":
            return adams_bashforth(velocity, noise, steps)
        return euler_maruyama(velocity, noise, steps, **settings)

    @torch.no_grad()
    def sample(self, labels, refs=None, noise=None, noise_sampler=None, references=None, **settings):
        """Algorithms 1 and 2: draw a chain image by image -> latents [B, refs, C, H, W]; the last image is the result.

        What is fed back is the image's latent (Eq. 11), as in the release; Algorithm 2 says c_k.

        labels         int64 [B]
        refs           length of the chain, at most config.refs (default: all)
        noise          [B, C, H, W], standard normal: every image of a chain starts from it, as in the release
        noise_sampler  as for euler_maruyama
        references     latents [B, k, C, H, W], k < refs: the first images of the chain (default: none, all are drawn)
        settings       steps, cfg (a number, or one for each image), cfg_below, sampler, s1, s2, as for decode;
                       null_refs: give the null class the references too, as the release does (defaults: SAMPLING)
        """
        config, noise_sampler = self.config, noise_sampler or torch.randn_like
        refs = refs or config.refs
        settings = sampling_settings(config) | {k: v for k, v in settings.items() if v is not None}
        cfg, null_refs = settings.pop("cfg"), settings.pop("null_refs", True)
        cfg = cfg if isinstance(cfg, (list, tuple)) else [cfg] * refs
        if not 1 <= refs <= config.refs or len(cfg) < refs:
            expected = f"chains of 1 to {config.refs}, and takes a cfg for each image"
            raise ValueError(f"refs {refs}, cfg {cfg}: the model draws {expected}")
        if noise is None:
            noise = noise_sampler(torch.empty(len(labels), *config.latent_shape, device=labels.device))
        null = torch.full_like(labels, config.num_classes)
        chain = noise[:, None][:, :0] if references is None else references  # no images yet: [B, 0, C, H, W]
        for k in range(chain.shape[1], refs):
            c = self.encode(labels, chain)
            c_null = self.encode(null, chain if null_refs else None) if cfg[k] != 1 else None
            x = self.decode(c, noise, c_null, cfg[k], noise_sampler=noise_sampler, **settings)
            chain = torch.cat([chain, x[:, None]], dim=1)
        return chain


# ---------------------------------------------------------------------------------------------- checkpoints

RELEASED_NAMES = (  # prefixes of the released files' names -> ours; the first match wins
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


@contextlib.contextmanager
def readable(path, kind):
    """Turn whatever a damaged or foreign file raises in the body into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.filename:  # no such file, no permission: the error names the file itself
            raise
        reason = printable(" ".join(str(e).split()).split(". ")[0][:200]) or type(e).__name__
        raise ValueError(f"{path}: not a readable {kind} ({reason})") from None


def printable(text):
    """`text` with line breaks, terminal escapes and bytes that are not UTF-8 escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def load_file(path):
    """Contents of a checkpoint on the CPU, memory-mapped; weights only, so no code in it is run."""
    with readable(path, "checkpoint"):
        zipped = zipfile.is_zipfile(path)
        if zipped and zipfile.ZipFile(path).testzip():  # torch.load does not compare the checksums
            raise ValueError("damaged: a checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released files hold one
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def config_from_shapes(state):
    """Config of a state dict under our names. Heads are in no shape: 16 at width 1280, else width / 64."""
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
    """(config, float32 state dict under our names, the file's other entries) of a checkpoint, ours or the release's."""
    ckpt = load_file(path)
    with readable(path, "TransDiff model"):
        state = ckpt["model_ema" if ema and ckpt.get("model_ema") else "model"]
        for theirs, ours in RELEASED_NAMES:
            state = {ours + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in state.items()}
        state = {k: v.float() for k, v in state.items()}
        if "config" in ckpt:
            config = Config(**ckpt["config"])
        else:
            config = config_from_shapes(state)
            if config.refs == 1:  # the released 1-step files hold a projection that 1-step AR never uses
                state = {k: v for k, v in state.items() if not k.startswith("ar.reference_proj.")}
        info = {k: ckpt[k] for k in ("step", "classes", "vae_digest") if k in ckpt}
    return config, state, info


def load_checkpoint(path, device="cpu", ema=True):
    """TransDiff of a checkpoint, ours (last.pt, ema.pt) or the release's: float32, eval mode, gradients off.

    ema   take the EMA weights where the file has both
    model.info has step, classes (names) and vae_digest of our files. Raises ValueError if the file is not a
    TransDiff model, OSError if it cannot be opened.
    """
    config, state, info = load_state(path, ema)
    with readable(path, "TransDiff model"):
        with torch.device("meta"):
            model = TransDiff(config)
        model.load_state_dict(state, strict=True, assign=True)
    model.info = info
    return model.to(device).eval().requires_grad_(False)
