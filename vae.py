"""Stage 0: pixels <-> latents. The KL autoencoder, reading images, the latent cache.

    python vae.py encode --data SRC --vae vae.pt --out DIR    encode images once, for train.py

SRC is a folder of class folders of images (JPEG, PNG, WebP ...), or an .npz of uint8 images and
labels. TransDiff never sees a pixel: it is trained on, and draws, the latents of this autoencoder
(Section 3.1). The paper's is LDM's KL-16, whose parameter names are kept, so that the released file
loads as it is. demo/train_vae.py trains one on your own images.

Under torchrun each process encodes a part of the images. A killed command resumes when repeated.
"""

import fnmatch
import functools
import hashlib
import json
import math
import os
import time
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO, RANK, UserError, atomic_write, attention, bounded
from model import fetch_released, load_file, make_parser, missing_parts, part_paths, pick_device
from model import read_weights, run_main, say, sha256_prefix, shorten, start_parts
from model import user_file, wait_until, write_json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

DEMO_DATA = DEMO / "fashion_mnist_10k.npz"
DEMO_VAE = DEMO / "vae.pt"
RELEASED_SCALE = 0.2325  # 1 / standard deviation of the released VAE's latents on ImageNet
torch.backends.cudnn.allow_tf32 = False  # convolutions in TF32 would change pixels and FID

# -------------------------------------------------------------------------------- the autoencoder
conv1 = functools.partial(nn.Conv2d, kernel_size=1)
conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


def norm(channels):
    # 32 groups as in LDM, but at least 4 channels each: groups of one would remove a map's mean.
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1 = norm(cin)
        self.conv1 = conv3(cin, cout)
        self.norm2 = norm(cout)
        self.conv2 = conv3(cout, cout)
        self.nin_shortcut = conv1(cin, cout) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q = conv1(channels, channels)
        self.k = conv1(channels, channels)
        self.v = conv1(channels, channels)
        self.proj_out = conv1(channels, channels)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, HW, C]
        h = attention(q, k, v, heads=1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def sequence(**modules):
    return nn.Sequential(OrderedDict(modules))


def middle(channels):
    return sequence(
        block_1=ResnetBlock(channels, channels),
        attn_1=AttnBlock(channels),
        block_2=ResnetBlock(channels, channels),
    )


def resnet_blocks(cin, cout, count):
    blocks = [ResnetBlock(cout, cout) for _ in range(count - 1)]
    return nn.Sequential(ResnetBlock(cin, cout), *blocks)


class AttnLevel(nn.Module):
    """Residual blocks, each with attention after it: the encoder's last level."""

    def __init__(self, cin, cout, count):
        super().__init__()
        self.block = resnet_blocks(cin, cout, count)
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(count))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return x


def encoder(channels, multipliers, blocks, z_channels):
    """[B, 3, H, W] -> [B, 2 z_channels, H / f, W / f], f = 2 ** (levels - 1)."""
    levels = []
    cin = channels
    for multiplier in multipliers[:-1]:
        cout = channels * multiplier
        # LDM pads right and bottom only.
        down = sequence(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2))
        levels.append(sequence(block=resnet_blocks(cin, cout, blocks), downsample=down))
        cin = cout
    top = channels * multipliers[-1]
    levels.append(AttnLevel(cin, top, blocks))
    return sequence(
        conv_in=conv3(3, channels),
        down=nn.Sequential(*levels),
        mid=middle(top),
        norm_out=norm(top),
        silu=nn.SiLU(),
        conv_out=conv3(top, 2 * z_channels),
    )


def decoder(channels, multipliers, blocks, z_channels):
    """[B, z_channels, h, w] -> [B, 3, f h, f w]. One block per level more than the encoder."""
    levels = {}
    cin = top = channels * multipliers[-1]
    for i in reversed(range(len(multipliers))):  # LDM counts levels from the pixels
        cout = channels * multipliers[i]
        level = sequence(block=resnet_blocks(cin, cout, blocks + 1))
        if i > 0:
            level.upsample = sequence(enlarge=nn.Upsample(scale_factor=2.0), conv=conv3(cout, cout))
        levels[str(i)] = level
        cin = cout
    return sequence(
        conv_in=conv3(z_channels, top),
        mid=middle(top),
        up=sequence(**levels),
        norm_out=norm(cin),
        silu=nn.SiLU(),
        conv_out=conv3(cin, 3),
    )


class AutoencoderKL(nn.Module):
    """LDM's KL autoencoder (Rombach et al. 2022), always in float32.

    The paper's: AutoencoderKL(128, (1, 1, 2, 2, 4), blocks=2, z_channels=16), 256 px -> 16 x 16.
    """

    def __init__(self, channels, multipliers, blocks, z_channels):
        super().__init__()
        self.encoder = encoder(channels, multipliers, blocks, z_channels)
        self.decoder = decoder(channels, multipliers, blocks, z_channels)
        self.quant_conv = conv1(2 * z_channels, 2 * z_channels)
        self.post_quant_conv = conv1(z_channels, z_channels)
        self.z_channels = z_channels
        self.factor = 2 ** (len(multipliers) - 1)

    def encode(self, x):
        """x [B, 3, H, W] in [-1, 1] -> mean, logvar, each [B, z, H / factor, W / factor]."""
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """z [B, z, h, w], unscaled -> x [B, 3, factor h, factor w] in about [-1, 1]."""
        with torch.autocast(z.device.type, enabled=False):
            return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean, logvar):
    """A draw of the latents, unscaled; mean, logvar [..., z, h, w], as `encode` returns them."""
    mean = mean.float()
    return mean + (0.5 * logvar.float()).exp() * torch.randn_like(mean)


def arch_from_shapes(state):
    """Arguments of AutoencoderKL for these weights."""
    firsts = fnmatch.filter(state, "encoder.down.*.block.0.conv1.weight")
    channels = len(state["encoder.conv_in.weight"])
    return dict(
        channels=channels,
        multipliers=[len(state[name]) // channels for name in firsts],
        blocks=len(fnmatch.filter(state, "encoder.down.0.block.*.conv1.weight")),
        z_channels=len(state["post_quant_conv.weight"]),
    )


def load_vae(path, device="cpu", model=None):
    """AutoencoderKL of our file, of the release's or of LDM's: eval mode, gradients off.

    path   a file, or "kl16": the released one, fetched once
    model  TransDiff: refuse a VAE that is not the one of its latents
    Besides its weights it has scale (1 / standard deviation of its latents), image_size (that of
    its training), path and digest (of its file, recorded with the latents it makes).
    """
    path = fetch_released("vae") if path == "kl16" else Path(path)
    ckpt = load_file(path)
    with user_file(path, f"VAE, it has {shorten(list(ckpt))}"), torch.device("meta"):
        state = read_weights(ckpt, "model", "state_dict")
        if any("down_blocks" in name for name in state):
            raise ValueError("it has diffusers' names; give the file in LDM's names")
        # Without LDM's discriminator.
        state = {k: v for k, v in state.items() if not k.startswith("loss.")}
        vae = AutoencoderKL(**arch_from_shapes(state))
        vae.load_state_dict(state, assign=True)
    vae.scale = ckpt.get("scale", RELEASED_SCALE)  # a file without it is the release's, or LDM's
    vae.image_size = ckpt.get("image_size", 256)
    vae.path = path
    vae.digest = sha256_prefix(path.read_bytes())
    if model:
        expected = model.info.get("vae_digest", vae.digest)  # released models do not name theirs
        if vae.digest != expected or vae.z_channels != model.config.latent_channels:
            raise UserError(f"{path}: not the VAE of this model's latents; name that with --vae")
    return vae.to(device).eval().requires_grad_(False)


def latents_to_images(vae, latents):
    """Scaled latents [..., z, h, w], as TransDiff draws them -> uint8 images [..., H, W, 3]."""
    z = latents.float().flatten(0, -4) / vae.scale
    x = torch.cat([vae.decode(part) for part in z.split(16)])
    if not x.isfinite().all():
        raise UserError(f"{vae.path}, or the model: gives pixels that are not finite")
    images = to_uint8(x)
    return images.reshape(*latents.shape[:-3], *images.shape[1:])


def to_uint8(x):
    """x [B, 3, H, W] in [-1, 1] -> uint8 numpy [B, H, W, 3]."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images, device="cpu"):
    """uint8 [B, H, W, 3], tensor or array -> float [B, 3, H, W] in [-1, 1] on the device."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images, path):
    """Write uint8 images [rows, columns, H, W, 3] as one PNG, small ones enlarged."""
    zoom = max(1, 64 // images.shape[2])
    tiles = F.pad(torch.from_numpy(images), (0, 0, 1, 1, 1, 1), value=255)  # white lines
    grid = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy()
    picture = ImageOps.scale(Image.fromarray(grid), zoom, Image.Resampling.NEAREST)
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


# -------------------------------------------------------------------------------- reading images
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff".split()
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes: long texts and colour profiles are no error


def read_image(path):
    """RGB PIL image of a file of any mode.

    Upright by EXIF, transparency on black, the first frame of an animation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of large images
        with user_file(path, "image"):
            image = Image.open(path)
            image.load()
        try:
            image.getexif()  # keeps the orientation
            image.info.pop("exif", None)  # exif_transpose would write it back: odd entries fail
            image = ImageOps.exif_transpose(image)
        except NameError:
            raise  # a defect in the code
        except Exception:  # damaged metadata; the pixels are sound
            pass
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: 32-bit grey has no fixed white; convert it to 8 or 16 bits")
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips, and does not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return image.convert("RGB")


def crop(image, width, height):
    """The middle of a PIL image."""
    x = (image.width - width) // 2
    y = (image.height - height) // 2
    return image.crop((x, y, x + width, y + height))


def center_crop(image, size):
    """PIL image -> uint8 [size, size, 3], as ADM crops (Dhariwal & Nichol 2021): halve by box
    filter while twice too large, then bicubic, then the centre square. An image over 8 times as
    long as wide is cropped first, to save memory."""
    longest = 8 * min(image.size)
    image = crop(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    image = ImageOps.cover(image, (size, size), Image.Resampling.BICUBIC)
    return np.array(crop(image, size, size))


def walk(folder, left_out, parents=()):
    """Paths of all images below a folder, sorted; counts the others in `left_out`, by reason.

    Links are followed. A file that cannot be read counts as an image: its reader names it.
    """
    parents = (*parents, os.path.realpath(folder))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith((".", "@", "__MACOSX")):
            left_out["hidden or of a system, as @eaDir"] += 1
        elif os.path.realpath(path) in parents:
            left_out["links to a folder above"] += 1
        elif os.path.isdir(path):
            yield from walk(path, left_out, parents)
        elif suffix not in SUFFIXES:
            left_out[f"not images by their suffix {suffix!r}"] += 1
        elif os.path.exists(path) and not os.path.isfile(path):
            left_out["pipes or devices"] += 1
        else:
            yield path


class Images(Dataset):
    """Images of a folder or an .npz: item i is uint8 [H, W, 3].

    path      folder of class folders (not labelled: of images, at any depth), or .npz of uint8
              images and labels
    size      pixels: crop every image to size x size; None: take them as they are, all of one size
    labelled  for training: an image that cannot be read becomes NaN, float32; else it is an error
    It has labels, int64 [N]; classes, their names; names, CLASS/FILE or CLASS/NUMBER of each image;
    shape, (H, W); files, what it is read from; path.
    """

    def __init__(self, path, size=None, labelled=True):
        self.path = Path(path)
        self.size = size
        self.labelled = labelled
        self.images = None  # of an .npz
        if self.path.is_dir():
            self.list_folder()
        elif self.path.suffix == ".npz":
            self.read_npz()
        else:
            raise UserError(f"{path}: no such folder or .npz of images")
        self.shape = (size, size) if size else self.read(0).size[::-1]

    def list_folder(self):
        path = self.path
        folders = [path]
        left_out = Counter()
        parents = ()
        if self.labelled:
            folders = []
            parents = (os.path.realpath(path),)
            for entry in sorted(path.glob("[!.@]*")):
                if entry.is_dir():
                    folders.append(entry)
                elif entry.suffix.lower() in SUFFIXES:
                    left_out["images beside the class folders"] += 1
        self.files = []
        self.labels = []
        for label, folder in enumerate(folders):
            files = list(walk(folder, left_out, parents))
            if not files:
                raise UserError(f"{folder}: no images in this folder; remove it or fill it")
            self.files += files
            self.labels += [label] * len(files)
        if not self.files:
            raise UserError(f"{path}: no class folders; expected {path}/<class>/<image>")
        left_out = [f"{count} {reason}" for reason, count in left_out.items()]
        if left_out:
            say(f"{path}: left out: {'; '.join(left_out)}")
        self.labels = np.array(self.labels)
        self.classes = [f.name.encode(errors="backslashreplace").decode() for f in folders]
        self.names = [os.path.relpath(file, path) for file in self.files]

    def read_npz(self):
        path = self.path
        self.files = [path]
        names = "images arr_0 labels arr_1 classes".split()
        with user_file(path, ".npz of images"), np.load(path) as data:
            arrays = {k: data[k] for k in names if k in data}
            has = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items()) or data.files
        images = arrays.get("images", arrays.get("arr_0", np.zeros(0)))
        images = images[..., None] if images.ndim == 3 else images
        sound = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
        if not sound or images.size == 0 or images.max() == 1:
            raise UserError(
                f"{path}: has {has}; expected images (or arr_0), uint8 [N, H, W, 3], 0 to 255"
            )
        self.images = np.broadcast_to(images, (*images.shape[:3], 3))
        labels = arrays.get("labels", arrays.get("arr_1", np.zeros(0))).reshape(-1)
        one_each = labels.dtype.kind in "iu" and len(labels) == len(images)
        last = int(labels.max()) if one_each else -1
        classes = arrays.get("classes", np.arange(min(last + 1, 2**20))).reshape(-1)  # else ids
        labelled_well = one_each and 0 <= labels.min() <= last < len(classes)
        if self.labelled and not labelled_well:
            raise UserError(
                f"{path}: has {has}; expected labels (or arr_1), an integer from 0 for each image, "
                "and below len(classes)"
            )
        if not labelled_well:
            labels = np.zeros(len(images))
            classes = np.array([""])
        self.labels = labels.astype(np.int64)
        self.classes = classes.astype(str).tolist()
        self.names = [f"{self.classes[k]}/{i}" for i, k in enumerate(self.labels)]

    def read(self, i):
        if self.images is None:
            return read_image(self.files[i])
        return Image.fromarray(self.images[i])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        try:
            image = self.read(i)
        except (UserError, OSError):  # OSError: no permission, a link to nothing
            if self.labelled:
                return np.full((*self.shape, 3), np.nan, np.float32)
            raise
        if self.size:
            return center_crop(image, self.size)
        if image.size != self.shape[::-1]:
            raise UserError(
                f"{self.files[i]}: is {image.height} x {image.width} px, others are {self.shape}; "
                "--image-size N crops all to N x N"
            )
        return np.array(image)


def images_digest(images):
    """Hash of the classes and of the path, size and time of change of each file."""
    stats = [os.stat(file) for file in images.files if os.path.exists(file)]
    contents = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    return sha256_prefix(ascii((images.classes, images.names, contents)).encode())


def open_images_and_vae(data, vae_path, device, size=None):
    """(images, VAE) of --data and --vae; other images than the bundled ones need their own VAE."""
    if not vae_path and Path(data).resolve() != DEMO_DATA.resolve():
        raise UserError(
            f"--vae: name the VAE for {data}: kl16, or one that demo/train_vae.py has made"
        )
    vae = load_vae(vae_path or DEMO_VAE, device)
    size = size or vae.image_size
    if size % vae.factor:
        raise UserError(f"--image-size {size}: must be a multiple of {vae.factor} for {vae.path}")
    return Images(data, size), vae


# -------------------------------------------------------------------------------- the latent cache
# DIR/settings.json  what it is made from; written first
# DIR/00000.npy ...  float16 [1024, 2, 2 z, h, w]: mean and log-variance of each crop ([:, 0]) and
#                    of its mirror image ([:, 1]), NaN where the image cannot be read
# DIR/names.json     CLASS/FILE of each image; of an .npz CLASS/NUMBER
# DIR/labels.npy     int64 [N]; -1 where the image cannot be read
# DIR/vae.pt         the VAE
# DIR/cache.json     as settings.json, `images` being a hash of the latents; written last
PART = 1024
HEADER = 128  # bytes of NumPy's header in a part


@torch.inference_mode()
def encode_moments(vae, images, device):
    """uint8 images [B, H, W, 3] -> float16 moments [B, 2, 2 z, h, w] of them and their mirrors."""
    x = from_uint8(images, device)
    views = [torch.cat(vae.encode(view), dim=1) for view in (x, x.flip(-1))]
    moments = torch.stack(views, dim=1).half().cpu().numpy()
    sound = np.isfinite(images).all((1, 2, 3))  # an image that cannot be read is NaN
    if not np.isfinite(moments[sound]).all():
        raise UserError(f"{vae.path}: this VAE gives latents that are not finite in float16")
    return moments


def encode_images(images, vae, out, workers=0, device="cpu"):
    """Encode images into the cache folder `out`; each process makes every WORLD-th part.

    An unfinished cache is resumed, by any number of processes.
    """
    out = Path(out)
    side = images.shape[0] // vae.factor
    record = dict(
        shape=[len(images), 2, 2 * vae.z_channels, side, side],
        scale=vae.scale,
        info=dict(classes=images.classes, vae_digest=vae.digest, images=images_digest(images)),
    )
    twice = [name for name, count in Counter(images.classes).items() if count > 1]
    if twice:
        raise UserError(f"{images.path}: two classes have the name {shorten(twice)}; rename one")
    if out.resolve().is_relative_to(images.path.resolve()):
        raise UserError(f"{out}: lies in the folder of images {images.path}; give another --out")
    lock_file = start_parts(out, record)  # noqa: F841 - until this function returns
    batch_size = max(1, min(32, 32 * 256**2 // math.prod(images.shape)))  # 6 GB
    paths = part_paths(out, -(-len(images) // PART))
    for i in tqdm(missing_parts(paths), unit="part", desc=f"encoding to {out}", disable=RANK > 0):
        part = Subset(images, range(i * PART, min(len(images), (i + 1) * PART)))
        loader = DataLoader(part, batch_size, num_workers=workers, collate_fn=np.stack)
        moments = np.concatenate([encode_moments(vae, batch, device) for batch in loader])
        atomic_write(paths[i], lambda f: np.save(f, moments))
    complete = out / "cache.json"
    if RANK > 0 or complete.exists():
        return wait_until(complete.exists, complete)

    wait_until(lambda: all(path.exists() for path in paths), f"the other parts of {out}")
    readable = []
    content = hashlib.sha256()  # of the latents: a copy of the images elsewhere gives the same
    for path in paths:
        moments = np.load(path)
        readable.append(np.isfinite(moments[:, 0, 0, 0, 0]))
        content.update(moments)
    readable = np.concatenate(readable)
    record["info"]["images"] = content.hexdigest()[:16]
    for i in np.flatnonzero(~readable):
        print(f"left out, not readable: {images.names[i]!r}")  # !r: a name may not be UTF-8
    if not readable.any():
        raise UserError(f"{images.path}: none of its {len(images)} images can be read")
    chosen = np.random.default_rng(0).choice(np.flatnonzero(readable), 16)
    originals = np.stack([images[i] for i in chosen])
    error = show_reconstructions(originals, vae, out / "reconstructions.png", device)
    labels = np.where(readable, images.labels, -1)
    atomic_write(out / "labels.npy", lambda f: np.save(f, labels))
    vae_bytes = vae.path.read_bytes()
    atomic_write(out / "vae.pt", lambda f: f.write(vae_bytes))
    write_json(out / "names.json", images.names)
    write_json(complete, record)
    print(
        f"wrote {readable.sum():,} of {len(images):,} images to {out}; "
        f"classes: {shorten(images.classes)}"
    )
    print(f"scale of the latents {vae.scale:.4f}")
    if side % 8 and side not in (2, 4, 6):
        rule = "an even side up to 16 (XS: 8), above it a multiple of 8 (XS: of 4)"
        print(f"latents of {side} x {side}: MRAR needs {rule}")
    print(f"mean error of the VAE {error:.3f} of 2, see {out}/reconstructions.png")
    if error > 0.1:
        print(
            "warning: images will be blurred (0.02 is sharp); go on with demo/train_vae.py --init"
        )


@torch.inference_mode()
def show_reconstructions(originals, vae, path, device):
    """Draw uint8 images [N, H, W, 3] over their reconstructions.

    Returns the mean error in units of [-1, 1].
    """
    batches = from_uint8(originals, device).split(4)
    decoded = np.concatenate([to_uint8(vae.decode(vae.encode(x)[0])) for x in batches])
    save_grid(np.stack([originals, decoded]), path)
    return np.abs(originals / 127.5 - decoded / 127.5).mean()


def growing_scales(latents):
    """Chains of scale AR (Table 4): one image at 1/8, 1/4, 1/2 and all of its resolution.

    The paper does not describe them. Here: average pooling, then bilinear upsampling.

    latents  [B, 1, C, H, W]
    Returns [B, 4, C, H, W].
    """
    x = latents[:, 0]
    side = x.shape[-1]
    scales = [F.adaptive_avg_pool2d(x, -(-side // n)) for n in (8, 4, 2, 1)]
    return torch.stack([F.interpolate(s, size=side, mode="bilinear") for s in scales], dim=1)


class LatentCache:
    """A cache folder: `labels`, `latent_shape` (z, h, w), and what cache.json has."""

    def __init__(self, path):
        self.path = Path(path)
        complete = self.path / "cache.json"
        if not complete.exists():
            raise UserError(
                f"{path}: not there, not a latent cache, or an unfinished one; name one with "
                f"--data, or make it: python vae.py encode --data SRC --vae F --out {path}"
            )
        with user_file(path, "latent cache"):
            record = json.loads(complete.read_text())
            num_images, _, channels, *side = record["shape"]
            self.latent_shape = (channels // 2, *side)
            self.scale = record["scale"]
            self.info = record["info"]  # a checkpoint records it: classes, vae_digest, images
            self.classes = self.info["classes"]
            self.labels = np.load(self.path / "labels.npy")
            self.row_shape = (channels, *side)
            if num_images != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels, {num_images} images")
            self.parts = part_paths(self.path, -(-num_images // PART))
            for i, part in enumerate(self.parts):
                rows = min(PART, num_images - i * PART)
                if part.stat().st_size != HEADER + 4 * rows * math.prod(self.row_shape):
                    raise ValueError(f"{part} has another size")

    def names(self):
        """CLASS/FILE of each image; of an .npz CLASS/NUMBER."""
        return json.loads((self.path / "names.json").read_text())

    def moments(self, indices, flips):
        """float16 [..., 2 z, h, w] of the images `indices` [...]; flips [...]: 1 = mirrored."""
        size = 2 * math.prod(self.row_shape)  # bytes
        rows = bytearray()
        for i, flip in zip(indices.flat, flips.flat):
            with open(self.parts[i // PART], "rb", buffering=0) as file:
                file.seek(HEADER + size * (2 * (i % PART) + flip))
                rows += file.read(size)
        return np.frombuffer(rows, np.float16).reshape(*indices.shape, *self.row_shape)

    def latents(self, moments, device, chains):
        """Latents [B, refs, C, H, W] on the device, drawn from a batch of moments; chains: the
        flag of finetune_mrar.py."""
        mean, logvar = moments.to(device, non_blocking=True).chunk(2, dim=2)
        x = sample_posterior(mean, logvar) * self.scale
        return growing_scales(x) if chains == "scales" else x


def encode_once(data, vae_path, init, folder, workers, device):
    """Path of a latent cache: `data` itself, or a new one in `folder` of the images `data`.

    init  Checkpoint that will be trained on them, or None: refuse the latents of another VAE
    """
    path = Path(data)
    if (path / "settings.json").exists() or not path.exists():
        if vae_path and path.exists():
            raise UserError(f"--data {path}: is a cache; leave out --vae")
        digest = LatentCache(path).info["vae_digest"]
    else:
        images, vae = open_images_and_vae(data, vae_path, device)
        digest = vae.digest
        cache_id = sha256_prefix((images_digest(images) + digest).encode())
        path = folder / f"latents-{path.stem}-{images.shape[0]}-{cache_id}"
    if init and init.entries.get("vae_digest", digest) != digest:
        raise UserError(f"--init {init.path}: was trained on the latents of another VAE")
    if not (path / "cache.json").exists():
        encode_images(images, vae, path, workers, device)
    say(f"latents from {path}, of {time.ctime((path / 'cache.json').stat().st_mtime)}")
    cache = LatentCache(path)
    encoded = cache.info["images"]
    if init and init.entries.get("images", encoded) != encoded:
        say(f"{init.path}: was trained on other images than these")
    if init and init.config.latent_channels != cache.latent_shape[0]:
        raise UserError(
            f"--init {init.path}: was trained on latents of {init.config.latent_channels} "
            f"channels, {path} has {cache.latent_shape[0]}: encode with its VAE (released: kl16)"
        )
    if init and "vae_digest" not in init.entries and cache.scale != RELEASED_SCALE:
        say(f"{init.path}: was trained on latents of kl16, these are of another VAE: --vae kl16")
    return path


def main():
    parser = make_parser(__doc__, torchrun=True)
    add = parser.add_argument
    add("command", choices=["encode"])
    add("--data", default=str(DEMO_DATA), help="images (default: %(default)s)")
    add(
        "--vae",
        help="VAE; kl16: the released one, fetched once (default: the bundled one for its images)",
    )
    add("--out", default="runs/latents", help="folder to write or resume (default: %(default)s)")
    add("--image-size", type=bounded(int, 1), help="pixels (default: those of the VAE's training)")
    add(
        "--workers", type=bounded(int, 0), default=0, help="processes that read images (default: 0)"
    )
    args = parser.parse_args()
    device = pick_device(args.device)
    images, vae = open_images_and_vae(args.data, args.vae, device, args.image_size)
    encode_images(images, vae, args.out, args.workers, device)


if __name__ == "__main__":
    run_main(main, "; to continue, repeat the command")
