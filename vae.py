"""Stage 0: pixels <-> latents. KL autoencoder, reading images, the latent cache.

    python vae.py train  --data SRC --out vae.pt            train an autoencoder (L1 + KL) on your own images
    python vae.py encode --data SRC --vae vae.pt --out DIR  encode a source once; train.py reads DIR ever after

SRC is a class-per-folder tree of images (JPEG, PNG, WebP) or an .npz of uint8 images and labels. TransDiff itself never sees
a pixel: it is trained on, and draws, the latents of this autoencoder (Section 3.1: "a VAE to project images into a continuous
latent space"). The paper's is LDM's KL-16, whose parameter names are kept, so that the released file loads as it is.
"""
import argparse
import difflib
import errno
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from model import load_file

DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))  # relative: it is recorded in caches and checkpoints
DEMO_DATA, DEMO_VAE, DEMO_MODEL = DEMO / "fashion_mnist_10k.npz", DEMO / "vae.pt", DEMO / "mrar.pt"
RELEASED_SCALE = 0.2325  # 1 / standard deviation of the released VAE's latents on ImageNet; its file does not say so
ARCHS = {  # of vae.py train --arch: kl16 is the paper's (256 px -> 16 x 16 x 16), small is the demo's (32 px -> 8 x 8 x 8)
    "kl16": dict(channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=16),
    "small": dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8),
}


# ---------------------------------------------------------------------------------------------- the autoencoder


def norm(channels):
    # LDM's 32 groups; a level of fewer than 128 channels has groups of 4 instead, since one-channel groups would
    # normalise each map's mean (the brightness) away
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, HW, C]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # LDM pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, 2 z_channels, H / f, W / f], f = 2 ** (levels - 1). Attention at the last level."""

    def __init__(self, channels, multipliers, blocks, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        cin = channels
        for i, m in enumerate(multipliers):
            level, last = nn.Module(), i == len(multipliers) - 1
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                level.block.append(ResnetBlock(cin, channels * m))
                cin = channels * m
                if last:
                    level.attn.append(AttnBlock(cin))
            if not last:
                level.downsample = Downsample(cin)
            self.down.append(level)
        self.mid = Mid(cin)
        self.norm_out, self.conv_out = norm(cin), nn.Conv2d(cin, 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[j](h)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, f h, f w]. One block a level more than the encoder, no attention in the levels."""

    def __init__(self, channels, multipliers, blocks, z_channels):
        super().__init__()
        cin = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(z_channels, cin, 3, padding=1)
        self.mid = Mid(cin)
        levels = []
        for i, m in reversed(list(enumerate(multipliers))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(blocks + 1):
                level.block.append(ResnetBlock(cin, channels * m))
                cin = channels * m
            if i > 0:
                level.upsample = Upsample(cin)
            levels.insert(0, level)  # LDM counts levels from the pixels: up.0 runs last
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(cin), nn.Conv2d(cin, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            for block in self.up[i].block:
                h = block(h)
            if i > 0:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """LDM's KL autoencoder (Rombach et al. 2022) under LDM's parameter names.

    `scale` is 1 / standard deviation of its latents: TransDiff works on `scale * z`, which has unit variance.
    `image_size` is the size in pixels that it was trained at; any multiple of `factor` works.
    """

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=16):
        super().__init__()
        self.encoder = Encoder(channels, multipliers, blocks, z_channels)
        self.decoder = Decoder(channels, multipliers, blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.z_channels, self.factor = z_channels, 2 ** (len(multipliers) - 1)
        self.scale, self.image_size, self.path, self.digest = RELEASED_SCALE, 256, "", ""

    def encode(self, x):
        """x [B, 3, H, W] in [-1, 1] -> mean, logvar, each [B, z, H / factor, W / factor]; logvar clipped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """z [B, z, h, w], unscaled -> x [B, 3, factor h, factor w] in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def load_vae(path, device="cpu"):
    """AutoencoderKL from our file or the released one, float32, eval mode; its shape is read off the weights.

    Raises ValueError if the file is not a VAE checkpoint, or its weights do not fit strictly; OSError if it cannot be read.
    """
    ckpt = load_file(path)
    state = ckpt.get("model") if isinstance(ckpt, dict) else None
    if not isinstance(state, dict) or "quant_conv.weight" not in state or "encoder.conv_in.weight" not in state:
        raise ValueError(f"{path}: not a VAE checkpoint (expected {{'model': ...}} with LDM's names); is it a TransDiff model?")
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    blocks = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block."))
    multipliers = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // channels for i in range(levels)]
    vae = AutoencoderKL(channels, multipliers, blocks, state["post_quant_conv.weight"].shape[0])
    try:
        vae.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: not an LDM autoencoder: {str(e).splitlines()[1].strip()}") from None
    vae.scale, vae.image_size = float(ckpt.get("scale", RELEASED_SCALE)), int(ckpt.get("image_size", 256))
    vae.path, vae.digest = str(path), digest(Path(path).read_bytes())  # recorded with the latents it makes
    return vae.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- images


def pixels(vae, latents):
    """Scaled latents [N, z, h, w], as TransDiff draws them -> uint8 images [N, H, W, 3]. Raises ValueError if they are not finite, rather than draw black."""
    x = torch.cat([vae.decode(z / vae.scale).float() for z in latents.split(16)])
    if not torch.isfinite(x).all():
        raise ValueError("the sampler gave values that are not finite; try --dtype fp32, or a smaller --cfg")
    return to_uint8(x)


def to_uint8(x):
    """x [B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3]."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images):
    """uint8 [B, H, W, 3], tensor or array -> float [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images, path, columns, pad=2, zoom=None):
    """Write uint8 images [N, H, W, 3] as one PNG, row by row, `pad` white pixels apart; small ones are enlarged to be seen."""
    n, h, w = images.shape[:3]
    rows = -(-n // columns)
    grid = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        grid[y : y + h, x : x + w] = image
    zoom = zoom or max(1, 64 // h)
    picture = Image.fromarray(grid).resize((grid.shape[1] * zoom, grid.shape[0] * zoom), Image.Resampling.NEAREST)
    write_whole(path, lambda f: picture.save(f, format="PNG"))


def to_rgb(image):
    """PIL image of any mode -> RGB, upright by its EXIF tag, transparency on black (what a decoder that drops alpha would show)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def read_image(path):
    """RGB PIL image of a file of any mode, upright; the first frame of an animation. Raises ValueError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of images that are large but not refused
            with Image.open(path) as image:
                return to_rgb(image)
    except Exception as e:  # Pillow raises a dozen types, depending on which byte is wrong
        raise ValueError(f"{path}: cannot be read as an image ({str(e) or type(e).__name__})") from None


def center_crop(image, size):
    """ADM's crop (Dhariwal & Nichol 2021): halve by box filter while twice too large, bicubic to size, cut the centre square."""
    long, short = max(image.size), min(image.size)
    if long > 16 * short:  # a strip of 20,000 x 50 px would be enlarged to gigabytes, only to cut out its middle
        x, y = ((side - min(side, 16 * short)) // 2 for side in image.size)
        image = image.crop((x, y, image.width - x, image.height - y))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((max(size, round(image.width * ratio)), max(size, round(image.height * ratio))), Image.Resampling.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((x, y, x + size, y + size)))


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def image_files(root):
    """Paths of the images under a folder, at any depth, sorted. Hidden files and folders, and files of other kinds, are passed over."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if not d.startswith(".")]
        found += [os.path.join(folder, f) for f in files if f.lower().endswith(IMAGES) and not f.startswith(".")]
    return sorted(found, key=os.fsencode)


class ImageFolder(torch.utils.data.Dataset):
    """DIR/<class>/**/<image>: the classes are the sorted folder names, as in ImageNet."""

    def __init__(self, root, size):
        self.root, self.size, paths, labels = str(root), size, [], []
        above = Path(os.path.realpath(root), "x").parents  # a link to one of these would lead round in a circle
        self.classes = sorted(d.name for d in os.scandir(root) if os.path.isdir(d) and not d.name.startswith(".") and Path(os.path.realpath(d)) not in above)
        for label, name in enumerate(self.classes):
            found = image_files(os.path.join(root, name))
            if not found:
                raise ValueError(f"{os.path.join(root, name)}: no images in this class folder; remove it or fill it")
            paths += [os.fsencode(os.path.relpath(p, root)) for p in found]
            labels += [label] * len(found)
        if not paths:
            raise ValueError(f"{root}: no class folders with images; expected {root}/<class>/<image>, an image being one of {' '.join(IMAGES)}")
        self.paths, self.labels = np.array(paths), np.array(labels)  # arrays, not lists: 40 bytes an image for ImageNet
        self.digest = digest(str(self.classes).encode() + self.paths.tobytes())

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return center_crop(read_image(os.path.join(self.root, os.fsdecode(self.paths[i]))), self.size)


class NpzImages(torch.utils.data.Dataset):
    """.npz of uint8 images [N, H, W] or [N, H, W, 1 or 3] (`images` or `arr_0`) and labels [N] (`labels` or `arr_1`).

    The whole array is held in memory: a large data set belongs in a folder. Larger images are cropped as ADM does; smaller ones are padded, not enlarged, with the colour that their corners mostly have.
    """

    def __init__(self, path, size):
        try:
            data = np.load(path, allow_pickle=False)
            images = data["images" if "images" in data else "arr_0"]
            labels = data["labels" if "labels" in data else "arr_1"]
            names = data["classes"] if "classes" in data else None
        except Exception as e:  # numpy, zipfile and zlib raise a dozen types, depending on which byte is wrong
            raise ValueError(f"{path}: needs uint8 images (images or arr_0) and labels (labels or arr_1): {e}") from None
        if 0 in images.shape:
            raise ValueError(f"{path}: no images in it ({images.shape})")
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
            raise ValueError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            wanted = f"expected a whole number >= 0 for each of {len(images)} images"
            raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, {wanted}")
        self.images, self.labels, self.size = images, labels.astype(np.int64), size
        self.classes = [str(n) for n in names] if names is not None else [str(i) for i in range(labels.max() + 1)]
        if labels.max() >= len(self.classes):
            raise ValueError(f"{path}: a label is {labels.max()}, but classes names only {len(self.classes)}")
        self.digest = digest(np.ascontiguousarray(images).tobytes() + self.labels.tobytes() + str(self.classes).encode())
        corners = images[:1000, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(-1, 1 if images.ndim == 3 else images.shape[3])
        colours, counts = np.unique(corners, axis=0, return_counts=True)
        self.border = colours[counts.argmax()]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i] if self.images.ndim == 4 else self.images[i][..., None]
        h, w = image.shape[:2]
        if max(h, w) > self.size:
            return center_crop(Image.fromarray(np.broadcast_to(image, (h, w, 3)).copy()), self.size)
        out = np.empty((self.size, self.size, 3), np.uint8)
        out[:] = self.border
        y, x = (self.size - h) // 2, (self.size - w) // 2
        out[y : y + h, x : x + w] = image
        return out


def open_source(path, size):
    """ImageFolder or NpzImages of `path`, each item uint8 [size, size, 3]. Raises ValueError if it is neither, or empty."""
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path, size)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, size)
    raise ValueError(f"{path}: no such image source; expected a folder of class folders, or an .npz of images and labels")


# ---------------------------------------------------------------------------------------------- the latent cache
#
# DIR/moments.npy  float16 [N, 2, 2 z, h, w]: mean and log-variance of the centre crop ([:, 0]) and of its mirror image ([:, 1])
# DIR/labels.npy   int64 [N]
# DIR/meta.json    classes (names), scale, image_size, vae (its file), vae_digest
# DIR/skipped.txt  images that could not be read, a line each, if --skip-bad passed over any
#
# moments.npy is written front to back and memory-mapped in training, so neither end holds more than a batch of it.


class Checked(torch.utils.data.Dataset):
    """A source whose unreadable images are their error messages, so that a loader's worker survives them."""

    def __init__(self, source, start):
        self.source, self.start = source, start

    def __len__(self):
        return len(self.source) - self.start

    def __getitem__(self, i):
        try:
            return self.source[self.start + i]
        except ValueError as e:
            return str(e)


def encode_source(source, vae, out, batch_size=32, workers=0, device="cpu", dtype=torch.float32, skip_bad=False):
    """Encode every image of `source` into the cache folder `out`, which appears whole, at the end. Killed and called again, it goes on.

    Returns the messages of the images that skip_bad passed over. Raises ValueError if `out` is there already, or OUT.partial is of another run, or
    at the first image that cannot be read.
    """
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or give another --out")
    if source.size % vae.factor:
        raise ValueError(f"--image-size {source.size}: must be a multiple of {vae.factor} for {vae.path}")
    meta = dict(classes=source.classes, scale=vae.scale, image_size=source.size, vae=vae.path, vae_digest=vae.digest)
    identity = dict(meta, images=source.digest, batch_size=batch_size, dtype=str(dtype))
    done = dict(identity, next=0, skipped=[])  # images before `next` are in moments.npy or in skipped: [index, message]
    if (partial / "done.json").exists():
        done = json.loads((partial / "done.json").read_text())
        if {k: done[k] for k in identity} != identity:
            raise ValueError(f"{partial}: unfinished latents of other images or settings; finish them, remove the folder, or give another --out")
    partial.mkdir(parents=True, exist_ok=True)
    h = source.size // vae.factor
    row = (2, 2 * vae.z_channels, h, h)
    loader = torch.utils.data.DataLoader(Checked(source, done["next"]), batch_size, num_workers=workers, collate_fn=list)

    def header():  # of as many bytes whatever N is: numpy leaves room for it to grow
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=(done["next"] - len(done["skipped"]), *row)))

    def save():
        f.flush()
        os.fsync(f.fileno())
        write_whole(partial / "done.json", lambda g: g.write(json.dumps(done).encode()))

    with open(partial / "moments.npy", "r+b" if done["next"] else "wb") as f, torch.inference_mode():
        header()
        f.seek(2 * math.prod(row) * (done["next"] - len(done["skipped"])), os.SEEK_CUR)
        f.truncate()
        saved = time.time()
        with tqdm(total=len(source), initial=done["next"], unit="image", desc=f"encoding to {out}") as bar:
            for batch in loader:
                bad = [[done["next"] + i, x] for i, x in enumerate(batch) if isinstance(x, str)]
                if bad and not skip_bad:
                    save()
                    raise ValueError(bad[0][1] + ("; --skip-bad goes on without such images" if isinstance(source, ImageFolder) else ""))
                if len(bad) < len(batch):
                    x = from_uint8(np.stack([x for x in batch if not isinstance(x, str)])).to(device)
                    with autocast(device, dtype):
                        pair = [torch.cat(vae.encode(view), dim=1) for view in (x, x.flip(-1))]
                    moments = torch.stack(pair, dim=1).to("cpu", torch.float16)
                    if not moments.isfinite().all():
                        raise ValueError(f"{vae.path}: gives latents that are not finite in float16, of an image from {done['next']} on; is it the right VAE, and trained?")
                    f.write(moments.numpy().tobytes())
                done["next"] += len(batch)
                done["skipped"] += bad
                bar.update(len(batch))
                if time.time() - saved > 10:
                    save()
                    saved = time.time()
        header()
        save()
    skipped = [i for i, _ in done["skipped"]]
    if len(skipped) == len(source):
        raise ValueError(f"none of the {len(source)} images could be read; the first: {done['skipped'][0][1]}")
    np.save(partial / "labels.npy", np.delete(source.labels, skipped))
    if skipped:
        (partial / "skipped.txt").write_text("".join(f"{message}\n" for _, message in done["skipped"]))
    show_reconstructions(source, vae, partial / "reconstructions.png", device, skipped)
    (partial / "meta.json").write_text(json.dumps(meta))
    partial.rename(out)
    (out / "done.json").unlink()
    return [message for _, message in done["skipped"]]


class LatentCache:
    """A cache folder, memory-mapped: `moments` [N, 2, 2 z, h, w] float16, `labels` [N], and `classes`, `scale`, `image_size`, `vae`, `vae_digest`.

    Raises ValueError if the folder is not a whole cache, or holds latents that are not finite: all are looked at up to 256 MiB, of more an even sample.
    """

    def __init__(self, path, check=True):
        self.path = path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text())
            self.moments = np.load(path / "moments.npy", mmap_mode="r", allow_pickle=False)
            self.labels = np.load(path / "labels.npy", allow_pickle=False)
            self.classes, self.scale, self.image_size = meta["classes"], float(meta["scale"]), int(meta["image_size"])
            self.vae, self.vae_digest = str(meta["vae"]), str(meta["vae_digest"])
        except Exception as e:  # json and numpy raise a dozen types, depending on which byte is wrong
            why = "it is unfinished: give the command that began it again" if Path(f"{path}.partial").exists() else f"{type(e).__name__}: {e}"
            raise ValueError(f"{path}: not a latent cache ({why}); make one with python vae.py encode --data SRC --vae VAE --out {path}") from None
        m, y = self.moments, self.labels
        fits = m.ndim == 5 and m.shape[1] == 2 and m.dtype == np.float16 and m.shape[2] % 2 == 0 and m.shape[3] == m.shape[4] and m.size > 0
        if not fits or y.shape != m.shape[:1] or y.dtype != np.int64 or y.min() < 0 or y.max() >= len(self.classes) or not 0 < self.scale < math.inf:
            what = f"moments {m.dtype} {m.shape}, labels {y.dtype} {y.shape} of {len(self.classes)} classes, scale {self.scale}"
            raise ValueError(f"{path}: {what} do not belong together; encode again")
        self.latent_shape = (m.shape[2] // 2, *m.shape[3:])
        if not check:
            return
        part = -(-min(len(m), 2**28 * len(m) // m.nbytes) // 256)  # so many stretches of 256 images, evenly spread
        for start in np.linspace(0, max(0, len(m) - 256), part + 1).astype(int):
            fine = np.isfinite(m[start : start + 256]).all((1, 2, 3, 4))
            if not fine.all():
                raise ValueError(f"{path}: the latents of image {start + fine.argmin()} are not finite; encode again")

    def __reduce__(self):
        return LatentCache, (self.path, False)  # a loader's worker maps the file itself, rather than being sent its contents

    def __len__(self):
        return len(self.labels)


def posterior(moments, noise):
    """Sample of the autoencoder's posterior, mean + std * noise: moments [..., 2 z, h, w] of any float type, noise [..., z, h, w] standard normal."""
    mean, logvar = moments.float().chunk(2, dim=-3)
    return mean + (0.5 * logvar).exp() * noise


# ---------------------------------------------------------------------------------------------- shared by every script


def write_whole(path, write):
    """Call write(file) on PATH.tmp and rename it to PATH: PATH is the old file or the whole new one, never a part. Raises OSError, naming PATH."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of a full disk
        tmp.unlink(missing_ok=True)
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
        raise OSError(getattr(e, "errno", None) or errno.EIO, f"could not be written ({reason}); what was there is as it was", str(path)) from None
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def check_out(flag, path, folder=False):
    """Raise ValueError, before any work is done, if `path` cannot become a file (or a folder)."""
    path = Path(path)
    if path.is_dir() and not folder or path.is_file() and folder:
        raise ValueError(f"{flag} {path}: is a {'file' if folder else 'folder'}, expected the name of a {'folder' if folder else 'file'}")
    place = next(p for p in [*([path] if folder else []), *path.absolute().parents] if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{flag} {path}: {place} is not a folder that can be written to; give another")


def fetch(url, path):
    """`path`, downloaded from `url` if it is not there. A download that was cut goes on where it stopped.

    Raises OSError if the server cannot be reached, or sends less than it announced.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.status != 206:  # the server does not resume: from the start
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if total and part.stat().st_size != total:
            raise OSError("the connection closed early")
    except (OSError, http.client.HTTPException) as e:
        nothing_left = getattr(e, "code", 0) == 416  # either all is there and only missed its rename, or it is no part of that file
        if not nothing_left or e.headers.get("Content-Range") != f"bytes */{have}":
            if nothing_left:
                part.unlink()
            raise OSError(f"could not fetch {url} ({getattr(e, 'reason', e)}); run it again to go on, or put the file at {path}") from None
    part.rename(path)
    return path


def class_index(flag, word, names, num_classes):
    """Index of a class given as index or name. Raises ValueError, with the nearest names, for one that the model does not have."""
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    near = difflib.get_close_matches(word, names)
    known = f": {', '.join(names)}" if 0 < len(names) <= 20 else f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{flag} {word}: this model has classes 0 to {num_classes - 1}{known}")


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def seed_of(*numbers):
    """One seed of several whole numbers >= 0. (63 bits, of which torch's generators use 32 on a CPU, all on a GPU.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def pick_device(name=None):
    """--device, or a GPU if there is one: under torchrun each process its own. Raises ValueError for a device that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {name}: is not to be had here ({str(e).splitlines()[0].split(',')[0][:200]})") from None


def pick_dtype(name, device):
    """--dtype: bf16 unless it would be emulated (a CPU without bfloat16 instructions), where float32 is faster."""
    if name is None:
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def cast_weights(module, dtype):
    """Keep the weights of products and convolutions in the dtype that autocast would otherwise cast them to at every call; the results are the same."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.to(dtype)
    return module


def compiled(module, trial, **options):
    """torch.compile(module, **options), tried by trial(it); where that fails (no C++ compiler, say), a line to say so and the module as it is."""
    fast = torch.compile(module, **options)
    try:
        trial(fast)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of a dozen types, by the place where it fails
        reason = " ".join(str(e).split("\n\n")[0].split())[:200]  # what follows is advice on debugging
        print(f"{Path(sys.argv[0]).name}: warning: torch.compile failed, so it goes on without, slower; --no-compile does not try ({type(e).__name__}: {reason})", file=sys.stderr)
        trial(module)
        return module
    return fast


def run(main):
    """Run main(); an expected error (bad input, a full disk) becomes one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        print(f"{Path(sys.argv[0]).name}: the GPU's memory is full; a smaller --batch-size, or --accumulate N in training, needs less", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as e:
        line = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else (str(e).strip() or type(e).__name__).splitlines()[-1]
        line += "; make room, then give the command again (in training with --resume)" if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        line = line.removeprefix("ValueError: ")  # what a loader's worker raises comes wrapped in its traceback
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------- commands


def show_reconstructions(source, vae, path, device="cpu", skipped=()):
    """Rows of 8 originals, each over its reconstruction from the posterior mean: 16 images spread over the source, but for those `skipped`."""
    rest = np.delete(np.arange(len(source)), list(skipped))
    images = np.stack([source[rest[i]] for i in np.linspace(0, len(rest) - 1, 16).astype(int)])
    with torch.inference_mode():
        decoded = np.concatenate([to_uint8(vae.decode(vae.encode(x)[0])) for x in from_uint8(images).to(device).split(4)])
    save_grid(np.concatenate([images[:8], decoded[:8], images[8:], decoded[8:]]), path, columns=8)


def train(args):
    """Train an autoencoder by L1 + KL; the KL (to a unit Gaussian) is LDM's, summed over the latent and weighed against a sum over pixels."""
    check_out("--out", args.out)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    source = open_source(args.data, args.image_size or (256 if args.arch == "kl16" else 32))
    lr = args.lr or (1e-4 if args.arch == "kl16" else 4e-3)
    vae = AutoencoderKL(**ARCHS[args.arch]).to(device)
    if source.size % vae.factor:
        raise ValueError(f"--image-size {source.size}: must be a multiple of {vae.factor} for --arch {args.arch}")
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = min(100, args.steps // 10 + 1)
    # a cosine to 0 does what averaging the weights would
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * i / args.steps)))
    sampler = torch.utils.data.RandomSampler(source, num_samples=args.steps * args.batch_size)  # one permutation after another
    loader = torch.utils.data.DataLoader(source, args.batch_size, sampler=sampler, num_workers=args.workers)
    with tqdm(loader, unit="step", desc=f"VAE on {args.data}") as bar:
        for images in bar:
            x = from_uint8(images).to(device)
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
            with autocast(device, dtype):
                mean, logvar = (m.float() for m in vae.encode(x))
                y = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
            l1 = (y - x).abs().mean()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / x.numel()
            optimizer.zero_grad(set_to_none=True)
            (l1 + args.kl_weight * kl).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if bar.n % 20 == 0:
                bar.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.3f}")
    vae.eval().requires_grad_(False)
    vae.scale, vae.image_size = 1 / latent_std(vae, source, device), source.size
    if not np.isfinite(vae.scale):
        raise ValueError(f"the training diverged, {args.out} is not written; try a smaller --lr than {lr}")
    print(f"latent standard deviation {1 / vae.scale:.4f}, scale {vae.scale:.4f}")
    state = {k: v.half() for k, v in vae.state_dict().items()}  # rounding far below the reconstruction's own error
    write_whole(args.out, lambda f: torch.save(dict(model=state, scale=vae.scale, image_size=source.size), f))
    picture = Path(args.out).with_suffix(".png")
    show_reconstructions(source, vae, picture, device)
    print(f"wrote {args.out}; originals over reconstructions in {picture}")


@torch.inference_mode()
def latent_std(vae, source, device, n=2048):
    """Standard deviation of posterior samples, over every element, of up to n images spread over the source."""
    picks = np.linspace(0, len(source) - 1, min(n, len(source))).astype(int)
    total = total2 = count = 0
    for i in range(0, len(picks), 32):
        mean, logvar = vae.encode(from_uint8(np.stack([source[j] for j in picks[i : i + 32]])).to(device))
        z = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).double()
        total, total2, count = total + z.sum().item(), total2 + z.square().sum().item(), count + z.numel()
    return (total2 / count - (total / count) ** 2) ** 0.5


def encode(args):
    """Encode a source into a latent cache, with a picture of reconstructions beside originals."""
    check_out("--out", args.out, folder=True)
    device = pick_device(args.device)
    vae = load_vae(args.vae, device)
    source = open_source(args.data, args.image_size or vae.image_size)
    skipped = encode_source(source, vae, args.out, args.batch_size, args.workers, device, pick_dtype(args.dtype, device), args.skip_bad)
    print(f"wrote {len(source) - len(skipped):,} images of {len(source.classes)} classes to {args.out}; originals over reconstructions in {args.out}/reconstructions.png")
    if skipped:
        print(f"{len(skipped):,} images could not be read and are not in it; {args.out}/skipped.txt lists them")


def whole(text, least=0):
    """argparse type of whole numbers from 0 (seeds, workers) to what fits in 63 bits."""
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {least}")
    return int(text)


def positive(text):
    """argparse type of counts and sizes, from 1."""
    return whole(text, least=1)


def number(least, most=math.inf):
    """argparse type of finite numbers from `least` to `most`."""

    def parse(text):
        if not least <= float(text) <= most or math.isinf(float(text)):
            raise argparse.ArgumentTypeError(f"{text}: must be a number " + (f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"))
        return float(text)

    parse.__name__ = "number"  # argparse names the type where float(text) fails
    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train | encode")
    for name, function in (("train", train), ("encode", encode)):
        p = commands.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        p.set_defaults(function=function)
        add = p.add_argument
        add("--data", default=str(DEMO_DATA), help="folder of class folders, or .npz (default: %(default)s)")
        add("--image-size", type=positive, help="pixels (default: when training 32 for small, 256 for kl16; when encoding the VAE's own)")
        add("--batch-size", type=positive, default=32, help="images (default: 32)")
        add("--workers", type=whole, default=0, help="processes that read images (default: 0, this one)")
        add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
        if function is train:
            add("--out", default="runs/vae.pt", help="file to write (default: %(default)s)")
            add("--arch", choices=ARCHS, default="small", help="kl16: the paper's; small: the demo's (default)")
            add("--steps", type=positive, default=5000, help="optimiser steps (default: 5000)")
            add("--lr", type=number(0), help="peak learning rate; cosine to 0 (default: 4e-3 for small, 1e-4 for kl16)")
            add("--kl-weight", type=number(0), default=2e-3, help="weight of the KL term (default: 2e-3)")
            add("--seed", type=whole, default=0, help="(default: 0)")
            add("--dtype", choices=["bf16", "fp32"], help="of autocast; weights stay float32 (default: bf16 where the hardware has it)")
        else:
            add("--vae", default=str(DEMO_VAE), help="VAE file, ours or the released one (default: %(default)s)")
            add("--out", default="runs/latents", help="cache folder to write; what was begun there is gone on with (default: %(default)s)")
            add("--skip-bad", action="store_true", help="list images that cannot be read in OUT/skipped.txt and go on (default: stop at the first)")
            add("--dtype", choices=["bf16", "fp32"], default="fp32", help="of the encoder's arithmetic; the moments are kept for good (default: fp32)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    run(main)
