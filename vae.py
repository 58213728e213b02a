"""Stage 0: pixels <-> latents. KL autoencoder, reading images, the latent cache.

    python vae.py train  --data SRC --out vae.pt            train an autoencoder (L1 + KL) on your own images
    python vae.py encode --data SRC --vae vae.pt --out DIR  encode the images once; train.py reads DIR from then on

SRC is a folder of class folders of images (JPEG, PNG, WebP ...), or an .npz of uint8 images and labels. TransDiff never
sees a pixel: it is trained on, and draws, the latents of this autoencoder (Section 3.1). The paper's is LDM's KL-16,
whose parameter names are kept, so that the released file loads as it is.

The last section is shared by all scripts: writing files, arguments, devices, error messages, pictures.
"""

import argparse
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm

from model import attention, load_file, printable, readable

DEMO = Path(__file__).parent / "demo"
DEMO_DATA, DEMO_VAE, DEMO_MODEL = DEMO / "fashion_mnist_10k.npz", DEMO / "vae.pt", DEMO / "mrar.pt"
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
RELEASED_SCALE = 0.2325  # 1 / standard deviation of the released VAE's latents on ImageNet; not in its file
ARCHS = {  # kl16: the paper's, 256 px -> 16 x 16 x 16; small: the demo's, 32 px -> 8 x 8 x 8
    "kl16": dict(channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=16),
    "small": dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8),
}


# ---------------------------------------------------------------------------------------------- the autoencoder
conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


def norm(channels):
    # 32 groups as in LDM, but at least 4 channels each: groups of one would remove a map's mean, the brightness
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), conv3(cin, cout)
        self.norm2, self.conv2 = norm(cout), conv3(cout, cout)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        h = attention(*(f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v)), heads=1)  # [B, HW, C]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def sequence(**modules):
    return nn.Sequential(OrderedDict(modules))


def middle(channels):
    block_1, block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return sequence(block_1=block_1, attn_1=AttnBlock(channels), block_2=block_2)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if `attention`, then a change of resolution."""

    def __init__(self, cin, cout, blocks, attention=False, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout) if attention else nn.Identity() for _ in range(blocks))
        self.downsample, self.upsample = downsample or nn.Identity(), upsample or nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def encoder(channels, multipliers, blocks, z_channels):
    """[B, 3, H, W] -> [B, 2 z_channels, H / f, W / f], f = 2 ** (levels - 1). Attention at the last level."""
    levels, cin = [], channels
    for i, cout in enumerate(channels * m for m in multipliers):
        last = i == len(multipliers) - 1  # LDM pads right and bottom only
        down = sequence(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2))
        levels.append(Level(cin, cout, blocks, attention=last, downsample=None if last else down))
        cin = cout
    ends = dict(norm_out=norm(cin), silu=nn.SiLU(), conv_out=conv3(cin, 2 * z_channels))
    return sequence(conv_in=conv3(3, channels), down=nn.Sequential(*levels), mid=middle(cin), **ends)


def decoder(channels, multipliers, blocks, z_channels):
    """[B, z_channels, h, w] -> [B, 3, f h, f w]. One block a level more than the encoder; no attention in levels."""
    levels, cin = {}, channels * multipliers[-1]
    for i in reversed(range(len(multipliers))):  # LDM counts levels from the pixels: up.0 runs last
        cout = channels * multipliers[i]
        up = sequence(enlarge=nn.Upsample(scale_factor=2.0), conv=conv3(cout, cout))
        levels[str(i)] = Level(cin, cout, blocks + 1, upsample=up if i > 0 else None)
        cin = cout
    ends = dict(norm_out=norm(cin), silu=nn.SiLU(), conv_out=conv3(cin, 3))
    top = channels * multipliers[-1]
    return sequence(conv_in=conv3(z_channels, top), mid=middle(top), up=sequence(**levels), **ends)


class AutoencoderKL(nn.Module):
    """LDM's KL autoencoder (Rombach et al. 2022). `scale` is 1 / standard deviation of its latents."""

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=16):
        super().__init__()
        self.encoder = encoder(channels, multipliers, blocks, z_channels)
        self.decoder = decoder(channels, multipliers, blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.z_channels, self.factor = z_channels, 2 ** (len(multipliers) - 1)
        self.scale, self.image_size, self.path, self.digest = RELEASED_SCALE, 256, "", ""

    def encode(self, x):
        """x [B, 3, H, W] in [-1, 1] -> mean, logvar, each [B, z, H / factor, W / factor]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """z [B, z, h, w], unscaled -> x [B, 3, factor h, factor w] in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean, logvar, noise):
    """mean, logvar, noise, each [..., z, h, w] -> latents [..., z, h, w]; noise standard normal."""
    return mean + (0.5 * logvar).exp() * noise


def load_vae(path, device="cpu"):
    """AutoencoderKL of our file or the released one (fetched for path "kl16"), float32, eval mode, gradients off."""
    path = fetch_released("vae") if path == "kl16" else path
    ckpt = load_file(path)
    with readable(path, "VAE"):
        state = {k: v.float() for k, v in ckpt["model"].items()}
        levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
        blocks = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block."))
        channels = len(state["encoder.conv_in.weight"])
        multipliers = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // channels for i in range(levels)]
        with torch.device("meta"):
            vae = AutoencoderKL(channels, multipliers, blocks, len(state["post_quant_conv.weight"]))
        vae.load_state_dict(state, strict=True, assign=True)
        vae.scale, vae.image_size = float(ckpt.get("scale", RELEASED_SCALE)), int(ckpt.get("image_size", 256))
    vae.path, vae.digest = str(path), sha256_prefix(Path(path).read_bytes())  # recorded with the latents it makes
    return vae.to(device).eval().requires_grad_(False)


def latents_to_images(vae, latents):
    """Scaled latents [N, z, h, w], as TransDiff draws them -> uint8 images [N, H, W, 3], decoded in float32."""
    with torch.autocast(latents.device.type, enabled=False):  # bf16 would change a third of the pixels by a level
        x = torch.cat([vae.decode(z / vae.scale) for z in latents.float().split(16)])
    if not torch.isfinite(x).all():
        raise ValueError("the sampler gave values that are not finite; try --dtype fp32, or a smaller --cfg")
    return to_uint8(x)


def to_uint8(x):
    """x [B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3]."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images):
    """uint8 [B, H, W, 3], tensor or array -> float [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------- images
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_image(path):
    """RGB PIL image of a file of any mode: upright by EXIF, transparency on black, first frame of an animation."""
    with readable(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of large images
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop (Dhariwal & Nichol 2021): halve by box filter while twice too large, then bicubic, centre square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = ImageOps.cover(image, (size, size), Image.Resampling.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((x, y, x + size, y + size)))


def image_files(root):
    """Paths of the images under a folder, at any depth, sorted; hidden files and folders are left out."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if not d.startswith(".")]
        paths += [os.path.join(folder, f) for f in files if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."]
    return sorted(filter(os.path.isfile, paths), key=os.fsencode)


def read_folder(root, labelled):
    """(paths below root as bytes [N], labels [N], class names); labelled: the classes are the sorted subfolders."""
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if labelled else [""]
    paths = [image_files(root / name) for name in names]
    empty = [name for name, files in zip(names, paths) if not files]
    if empty:
        raise ValueError(f"{root / empty[0]}: no images in this folder; remove it or fill it")
    if not names:
        raise ValueError(f"{root}: no class folders with images; expected {root}/<class>/<image>")
    labels = np.repeat(np.arange(len(names)), [len(files) for files in paths])
    items = np.array([os.fsencode(os.path.relpath(p, root)) for files in paths for p in files])
    return items, labels, [printable(name) for name in names]


def read_npz(path, labelled):
    """(images uint8 [N, H, W, 1 or 3], labels [N], names) of an .npz: images or arr_0, labels or arr_1, classes."""
    with readable(path, ".npz of images"), np.load(path, allow_pickle=False) as data:
        images = data["images" if "images" in data else "arr_0"]
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]")
        key = "labels" if "labels" in data else "arr_1"
        labels = data[key] if labelled or key in data else np.zeros(len(images), np.int64)
        names = data["classes"] if "classes" in data else np.arange(labels.max() + 1)
        one_each = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
        if not (one_each and 0 <= labels.min() <= labels.max() < len(names)):
            expected = f"integers from 0 to {len(names) - 1}, one for each of {len(images)} images"
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected {expected}")
    return images, labels.astype(np.int64), [str(name) for name in names]


class Images(torch.utils.data.Dataset):
    """Images of a folder or an .npz: item i is uint8 [H, W, 3].

    path      folder of class folders (not labelled: of images, at any depth), or .npz of uint8 images and labels
    size      pixels: crop every image to size x size; None: take them as they are, all of one size
    labelled  have `labels`, int64 [N], and `classes`, their names
    skip_bad  an image that cannot be read is NaN, float32; otherwise it is a ValueError
    """

    def __init__(self, path, size=None, labelled=True, skip_bad=False):
        self.path, self.size, self.skip_bad = Path(path), size, skip_bad
        self.folder = self.path.is_dir()
        if not self.folder and not (self.path.suffix == ".npz" and self.path.is_file()):
            raise ValueError(f"{path}: no such folder or .npz of images")
        self.items, self.labels, self.classes = (read_folder if self.folder else read_npz)(self.path, labelled)
        self.shape = (size, size) if size else self.open(0).size[::-1]
        # file names of a folder, checksums of an .npz: a file replaced under its name is not noticed
        contents = self.items.tobytes() if self.folder else [m.CRC for m in zipfile.ZipFile(path).infolist()]
        self.digest = sha256_prefix(repr((self.classes, contents)).encode())

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return str(self.path / os.fsdecode(self.items[i])) if self.folder else f"image {i} of {self.path}"

    def open(self, i):
        if self.folder:
            return read_image(self.name(i))
        return Image.fromarray(np.broadcast_to(self.items[i], (*self.items.shape[1:3], 3)).copy())

    def __getitem__(self, i):
        try:
            image = self.open(i)
        except ValueError as e:
            if self.skip_bad:
                return np.full((*self.shape, 3), np.nan, np.float32)
            raise ValueError(f"{e}; remove it (vae.py encode can leave it out: --skip-bad)") from None
        if self.size:
            return center_crop(image, self.size)
        if image.size != self.shape[::-1]:
            sizes = f"{image.height} x {image.width} px, others are {self.shape[0]} x {self.shape[1]}"
            raise ValueError(f"{self.name(i)}: is {sizes}; --image-size N crops all of them to N x N")
        return np.array(image)


def open_images(args, device):
    """(Images, VAE) of --data and --vae; other images than the bundled ones need a VAE of their own."""
    if not args.vae and args.data != str(DEMO_DATA) and Path(args.data).exists():
        raise ValueError(f"--vae: name the VAE for {args.data}: kl16, or one that python vae.py train has made")
    vae = load_vae(args.vae or DEMO_VAE, device)
    return Images(args.data, args.image_size or vae.image_size, skip_bad=getattr(args, "skip_bad", False)), vae


# ---------------------------------------------------------------------------------------------- the latent cache
# DIR/moments.bin  float16 [N, 2, 2 z, h, w]: mean and log-variance of the crop ([:, 0]) and its mirror image ([:, 1])
# DIR/labels.npy   int64 [N]; -1: an image that could not be read (--skip-bad)
# DIR/cache.json   shape of moments.bin, classes (names), scale, image_size, vae_digest
# DIR/vae.pt       the VAE


@torch.inference_mode()
def encode_moments(vae, images, device, dtype):
    """Images uint8 [B, H, W, 3] -> float16 [B, 2, 2 z, h, w], the moments of the images and their mirror images."""
    x = from_uint8(images).to(device)
    with autocast(device, dtype):
        views = [torch.cat(vae.encode(view), dim=1) for view in (x, x.flip(-1))]
    moments = torch.stack(views, dim=1).to("cpu", torch.float16)
    if moments.isinf().any():  # an image that could not be read is NaN
        raise ValueError(f"{vae.path}: gives latents that are not finite in float16; is it the right VAE, and trained?")
    return moments.numpy()


def encode_images(images, vae, out, batch_size=32, workers=0, device="cpu", dtype=torch.float32):
    """Encode images into the cache folder `out`, written as OUT.partial, renamed when complete; run again to resume."""
    out, partial, size = Path(out), Path(f"{out}.partial"), images.shape[0]
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or give another --out")
    if size % vae.factor:
        raise ValueError(f"--image-size {size}: must be a multiple of {vae.factor} for {vae.path}")
    shape = (len(images), 2, 2 * vae.z_channels, size // vae.factor, size // vae.factor)
    settings = dict(shape=shape, classes=images.classes, scale=vae.scale, vae_digest=vae.digest, image_size=size)
    settings |= dict(images=images.digest, batch_size=batch_size, dtype=str(dtype))
    keep_settings(partial / "cache.json", settings)
    print(f"{len(images):,} images of {len(images.classes)} classes: {shorten(images.classes)}")
    with open(partial / "moments.bin", "ab") as f:
        batch_bytes = 2 * batch_size * math.prod(shape[1:])
        done = f.tell() // batch_bytes
        f.truncate(done * batch_bytes)
        rest = torch.utils.data.Subset(images, range(done * batch_size, len(images)))
        loader = torch.utils.data.DataLoader(rest, batch_size, num_workers=workers, collate_fn=np.stack)
        for batch in tqdm(loader, initial=done, total=done + len(loader), unit="batch", desc=f"encoding to {out}"):
            f.write(encode_moments(vae, batch, device, dtype).tobytes())
            f.flush()
            os.fsync(f.fileno())
    moments = np.memmap(partial / "moments.bin", np.float16, "r", shape=shape)
    readable = np.isfinite(moments[:, 0, 0, 0, 0])
    if not readable.any():
        raise ValueError(f"{images.path}: none of its {len(images)} images can be read")
    atomic_write(partial / "labels.npy", lambda f: np.save(f, np.where(readable, images.labels, -1)))
    shutil.copy(vae.path, partial / "vae.pt")
    error = show_reconstructions(images, vae, partial / "reconstructions.png", device, np.flatnonzero(readable))
    print(f"mean error of the VAE {error:.3f} of 2; originals over reconstructions: {out}/reconstructions.png")
    partial.rename(out)
    print(f"wrote {readable.sum():,} of {len(images):,} images to {out}")
    for i in np.flatnonzero(~readable):
        print(f"  left out, not readable: {printable(images.name(i))}")


@torch.inference_mode()
def show_reconstructions(images, vae, path, device, indices):
    """Draw 16 of the images `indices` over their reconstructions; returns the mean error in units of [-1, 1]."""
    originals = np.stack([images[i] for i in indices[np.linspace(0, len(indices) - 1, 16).astype(int)]])
    batches = from_uint8(originals).to(device).split(4)
    decoded = np.concatenate([to_uint8(vae.decode(vae.encode(x)[0])) for x in batches])
    save_grid(np.concatenate([originals[:8], decoded[:8], originals[8:], decoded[8:]]), path, columns=8)
    return np.abs(originals / 127.5 - decoded / 127.5).mean()


class LatentCache:
    """A cache folder: `moments` and `labels` as above, memory-mapped, `latent_shape` (z, h, w), and cache.json."""

    def __init__(self, path):
        self.path = path = Path(path)
        if not (path / "cache.json").exists():
            raise ValueError(f"{path}: not a latent cache; make, or finish, it: vae.py encode --data SRC --out {path}")
        with readable(path, "latent cache"):
            record = json.loads((path / "cache.json").read_text())
            self.classes, self.scale, self.image_size = record["classes"], record["scale"], record["image_size"]
            self.vae_digest, shape = record["vae_digest"], tuple(record["shape"])
            self.info = dict(classes=self.classes, vae_digest=self.vae_digest, num_images=shape[0])
            if (path / "moments.bin").stat().st_size != 2 * math.prod(shape) or shape[1] != 2 or shape[2] % 2:
                raise ValueError("moments.bin does not have the size that cache.json tells")
            self.moments = np.memmap(path / "moments.bin", np.float16, "r", shape=shape)
            self.latent_shape = shape[2] // 2, *shape[3:]
            self.labels = y = np.load(path / "labels.npy", allow_pickle=False)
            if y.shape != shape[:1] or y.dtype != np.int64 or y.min() < -1 or y.max() >= len(self.classes):
                raise ValueError("labels.npy does not fit the latents and classes of cache.json")

    def __reduce__(self):
        return LatentCache, (self.path,)  # a loader's worker maps the file itself


# ---------------------------------------------------------------------------------------------- commands
def train(args):
    """Train an autoencoder by L1 + KL: LDM's losses without the perceptual and GAN terms. Run again to resume."""
    if Path(args.out).exists() or Path(args.out).suffix == ".png":
        raise ValueError(f"--out {args.out}: is there already, or is a picture's name; give another")
    device, kl16 = pick_device(args.device), args.arch == "kl16"
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    images = Images(args.data, args.image_size or (256 if kl16 else 32))
    vae = AutoencoderKL(**ARCHS[args.arch]).to(device)
    if images.shape[0] % vae.factor:
        raise ValueError(f"--image-size {images.shape[0]}: must be a multiple of {vae.factor} for --arch {args.arch}")
    peak_lr, warmup = args.lr or (1e-4 if kl16 else 4e-3), min(100, args.steps // 10 + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), peak_lr, betas=(0.9, 0.99), weight_decay=0.0)
    partial = Path(f"{args.out}.partial")
    flags = {k: v for k, v in vars(args).items() if k not in ("function", "device", "workers")}
    first = resume(partial, vae, optimizer, flags) if partial.exists() else 0
    order = torch.utils.data.RandomSampler(images, num_samples=args.steps * args.batch_size)
    order = torch.tensor(list(order)).split(args.batch_size)[first:]
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=args.workers)
    bar = tqdm(loader, unit="step", desc=f"VAE on {args.data}", initial=first, total=args.steps)
    for step, batch in enumerate(bar, first):
        torch.manual_seed(derive_seed(args.seed, step))  # a resumed run draws the same numbers
        x = from_uint8(batch).to(device)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        with autocast(device, dtype):
            mean, logvar = (m.float() for m in vae.encode(x))
            y = vae.decode(sample_posterior(mean, logvar, torch.randn_like(mean))).float()
        l1 = (y - x).abs().mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / x.numel()
        optimizer.zero_grad(set_to_none=True)
        (l1 + args.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / warmup) * cosine
        optimizer.step()
        if step % 100 == 99:
            bar.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.3f}")
            state = dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, flags=flags)
            atomic_write(partial, lambda f: torch.save(state, f))
    save_vae(vae.eval().requires_grad_(False), images, args.out, device)
    partial.unlink(missing_ok=True)


def resume(partial, vae, optimizer, flags):
    """Load an unfinished training of the same flags; returns its next step."""
    with readable(partial, "unfinished VAE"):
        state = load_file(partial)
        if state["flags"] != flags:
            raise ValueError("of other flags: finish it with those, or remove it")
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


@torch.inference_mode()
def save_vae(vae, images, out, device):
    """Write the VAE in float16 with the scale of its latents, and a picture of reconstructions beside it."""
    z = []  # posterior samples of up to 512 images, spread over the data
    for part in torch.linspace(0, len(images) - 1, min(512, len(images))).long().split(32):
        mean, logvar = vae.encode(from_uint8(np.stack([images[i] for i in part])).to(device))
        z.append(sample_posterior(mean, logvar, torch.randn_like(mean)).double().flatten())
    vae.scale, vae.image_size = 1 / torch.cat(z).std().item(), images.shape[0]
    if not math.isfinite(vae.scale):
        raise ValueError(f"the training diverged, {out} is not written; try a smaller --lr")
    ckpt = dict(model={k: v.half() for k, v in vae.state_dict().items()}, scale=vae.scale, image_size=vae.image_size)
    atomic_write(out, lambda f: torch.save(ckpt, f))
    picture = Path(out).with_suffix(".png")
    show_reconstructions(images, vae, picture, device, np.arange(len(images)))
    print(f"wrote {out}, scale of the latents {vae.scale:.4f}; originals over reconstructions in {picture}")


def encode(args):
    """Encode images into a latent cache, with a picture of reconstructions beside originals."""
    device = pick_device(args.device)
    images, vae = open_images(args, device)
    encode_images(images, vae, args.out, args.batch_size, args.workers, device, pick_dtype(args.dtype, device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train | encode")
    for function in (train, encode):
        p = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        p.set_defaults(function=function)
        add = p.add_argument
        add("--data", default=str(DEMO_DATA), help="folder of class folders, or .npz (default: %(default)s)")
        add("--image-size", type=bounded(int, 1), help="pixels (default: 32, with kl16 256; of encode the VAE's own)")
        add("--batch-size", type=bounded(int, 1), default=32, help="images (default: 32)")
        add("--workers", type=bounded(int, 0), default=0, help="processes that read images (default: 0, this one)")
        add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
        if function is train:
            add("--out", default="runs/vae.pt", help="file to write (default: %(default)s)")
            add("--arch", choices=ARCHS, default="small", help="kl16: the paper's; small: the demo's (default)")
            add("--steps", type=bounded(int, 1), default=5000, help="optimiser steps (default: 5000)")
            add("--lr", type=bounded(float, 0), help="peak learning rate, cosine to 0 (default: 4e-3, with kl16 1e-4)")
            add("--kl-weight", type=bounded(float, 0), default=2e-3, help="weight of the KL term (default: 2e-3)")
            add("--seed", type=bounded(int, 0), default=0, help="(default: 0)")
            add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where the hardware has it)")
        else:
            add("--vae", help="VAE; kl16: the released one, fetched once (default: the bundled one for its own images)")
            add("--out", default="runs/latents", help="cache folder to write or resume (default: %(default)s)")
            add("--skip-bad", action="store_true", help="leave out images that cannot be read, and print their names")
            add("--dtype", choices=["bf16", "fp32"], default="fp32", help="of the encoder (default: fp32)")
    args = parser.parse_args()
    args.function(args)


# ---------------------------------------------------------------------------------------------- shared by all scripts
def atomic_write(path, data):
    """Write `data`, bytes or a function of the open file: PATH is replaced only once the new file is complete."""
    path, tmp = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            f.write(data) if isinstance(data, bytes) else data(f)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of a full disk
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise OSError(getattr(e, "errno", errno.EIO), f"could not be written ({reason})", str(path)) from None
    finally:
        tmp.unlink(missing_ok=True)


def keep_settings(path, settings):
    """Write the settings of an unfinished result to the JSON file `path`; refuse to continue one of other settings."""
    text = json.dumps(settings).encode()
    if path.exists() and path.read_bytes() != text:
        raise ValueError(f"{path.parent}: unfinished, of other inputs or settings; finish it with those, or remove it")
    atomic_write(path, text)


def fetch(url, path):
    """Download `url`, a checkpoint, to `path` unless it is there; only a complete file takes that name."""
    while LOCAL_RANK > 0 and not path.exists():  # rank 0 of each machine fetches it
        time.sleep(1)
    if not path.exists():
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, part)
            zipfile.ZipFile(part).close()
        except Exception as e:  # of the network, of the disk, or of a file that was cut
            raise OSError(f"could not fetch {url} ({e}); repeat the command, or put the file at {path}") from None
        part.rename(path)
    return path


def fetch_released(name):
    """Path of a file of the authors' repository, in torch's hub folder. HF_ENDPOINT names a mirror."""
    folder = name if name == "vae" else f"transdiff_{name.lower().replace('-', '_')}"
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{host}/zhendch/Transdiff/resolve/main/{folder}/checkpoint-last.pth"
    return fetch(url, Path(torch.hub.get_dir()) / "transdiff" / folder / "checkpoint-last.pth")


def class_index(flag, word, names, num_classes):
    """Index of a class given as index or name, in upper or lower case."""
    lower = [name.casefold() for name in names]
    if word in names or word.casefold() in lower:
        return names.index(word) if word in names else lower.index(word.casefold())
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    raise ValueError(f"{flag} {word}: this model has classes {shorten([f'0 to {num_classes - 1}', *names])}")


def shorten(names, n=20):
    return ", ".join(names[:n]) + " ..." * (len(names) > n)


def sha256_prefix(data):
    return hashlib.sha256(data).hexdigest()[:16]


def derive_seed(*numbers):
    """One seed, below 2^63, from several integers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def per_image_noise(seed, indices, device):
    """noise_sampler(x) whose row i is a function of (seed, indices[i]) alone, whatever else is in the batch."""
    generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]

    def noise_sampler(x):  # drawn on the CPU: the same on every machine
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise

    return noise_sampler


def pick_device(name=None):
    """torch.device of --device; default: a GPU if there is one, under torchrun one for each process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: is not available ({str(e).splitlines()[0].split(',')[0][:200]})") from None


def pick_dtype(name, device):
    """torch.dtype of --dtype; default: bf16, or fp32 on hardware that would emulate bf16."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name or ("bf16" if native else "fp32")]


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def cast_weights(module, dtype):
    """Convert once the weights that autocast would convert at every call; the results are the same."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.to(dtype)
    return module


def bounded(kind, low, high=2**62):
    """argparse type: an int or float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low} and at most {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def error_line(e):
    """One line for an error that a user can mend; None for a defect."""
    text = (str(e).strip() or type(e).__name__).splitlines()
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):
        return "out of memory; lower --batch-size, or in training raise --accumulate"
    if isinstance(e, RuntimeError) and "DataLoader" in str(e):
        return "a process that reads data died or hangs (out of memory?); lower --workers"
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({' '.join(text)[:200]}); --no-compile runs without it"
    if isinstance(e, OSError):
        return f"{e.filename}: {e.strerror}" if e.filename else text[-1]
    if isinstance(e, ValueError):  # a loader's worker puts its traceback before the message
        return text[-1].removeprefix("ValueError: ")


def run_main(main):
    """Run main(); an expected error becomes one line on stderr and exit status 2."""
    argparse.ArgumentParser.print_usage = lambda *_: None  # a wrong flag is one line; --help has the usage
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit ends the loader's workers, a kill does not
    try:
        return main()
    except KeyboardInterrupt:
        line, status = "interrupted; repeat the command to continue", 130
    except Exception as e:
        line, status = error_line(e), 2
        if line is None:
            raise
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


def save_grid(images, path, columns, rows=(), heads=(), pad=2):
    """Write uint8 images [N, H, W, 3] as one PNG, row by row, with names of the rows and heads over the columns."""
    n, h, w = images.shape[:3]
    num_rows, zoom, font = -(-n // columns), max(1, 64 // h), ImageFont.load_default(14)
    cells = np.pad(images, ((0, num_rows * columns - n), (pad, 0), (pad, 0), (0, 0)), constant_values=255)
    grid = cells.reshape(num_rows, columns, h + pad, w + pad, 3).swapaxes(1, 2).reshape(num_rows * (h + pad), -1, 3)
    left, top = max([0, *(6 + int(font.getlength(name)) for name in rows)]), 20 * bool(heads)
    picture = Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1))
    picture = ImageOps.expand(picture, (left, top, pad * zoom, pad * zoom), "white")
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(rows):
        draw.text((left, top + (i + 0.5) * zoom * (h + pad)), name, "black", font, "rm")
    for i, name in enumerate(heads):
        draw.text((left + (i + 0.5) * zoom * (w + pad), top), name, "black", font, "md")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


if __name__ == "__main__":
    run_main(main)
