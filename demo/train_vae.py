"""Train a small KL autoencoder on your own images, for `vae.py encode --vae OUT`.

    python demo/train_vae.py --data SRC --out runs/photos-vae.pt           32 px -> 8 x 8 x 8
    python demo/train_vae.py --data SRC --arch kl16 --out runs/kl16.pt     256 px -> 16 x 16 x 16
    python demo/train_vae.py --init runs/photos-vae.pt --out runs/better.pt    go on from a VAE

The paper takes LDM's autoencoder as it is; this is no part of it. SRC as for vae.py. Losses are L1
and KL: LDM's without the perceptual and the GAN terms. `l1` in the progress bar is the mean error
in units of [-1, 1]: 0.02 is sharp. OUT has weights in float16, `image_size` and the scale of the
latents; a picture of originals over reconstructions is written beside it.

OUT.partial holds one checkpoint, renewed every 100 steps. A stopped command resumes when repeated.
"""

import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import UserError, atomic_write, bounded, derive_seed, load_file, lock  # noqa: E402
from model import make_parser, pick_device, run_main  # noqa: E402
from vae import DEMO_DATA, AutoencoderKL, from_uint8, images_digest, load_vae  # noqa: E402
from vae import Images, sample_posterior, show_reconstructions  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler  # noqa: E402
from tqdm import tqdm  # noqa: E402

ARCHS = {  # arguments of AutoencoderKL: the demo's, and the paper's
    "small": dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8),
    "kl16": dict(channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=16),
}
SAVE_EVERY = 100  # steps


def build(args, device):
    """AutoencoderKL to train, with its `image_size`: new, or as --init has it."""
    if args.init:
        vae = load_vae(args.init)
    else:
        torch.manual_seed(args.seed)
        vae = AutoencoderKL(**ARCHS[args.arch])
        vae.image_size = 256 if args.arch == "kl16" else 32
    vae.image_size = args.image_size or vae.image_size
    if vae.image_size % vae.factor:
        raise UserError(f"--image-size {vae.image_size}: must be a multiple of {vae.factor}")
    return vae.to(device).requires_grad_()


def losses(vae, x):
    """L1 and KL of images x [B, 3, H, W]: LDM's losses without the perceptual and GAN terms."""
    mean, logvar = vae.encode(x)
    y = vae.decode(sample_posterior(mean, logvar))
    l1 = (y - x).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / x.numel()
    return l1, kl


def train(vae, images, args, partial, device):
    """Train the VAE, from the checkpoint in the folder `partial` if there is one."""
    lock(partial)
    peak_lr = args.lr or (1e-4 if vae.factor == 16 else 4e-3)
    warmup = min(100, args.steps // 10 + 1)
    optimizer = torch.optim.AdamW(
        vae.parameters(), peak_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    flags = dict(vars(args), images=images_digest(images), device=None, workers=None)
    last = partial / "last.pt"
    first = resume(last, flags, vae, optimizer) if last.exists() else 0

    # Shuffled epochs in a row. Images that cannot be read are NaN.
    generator = torch.Generator().manual_seed(args.seed)
    order = RandomSampler(images, num_samples=args.steps * args.batch_size, generator=generator)
    batches = torch.tensor(list(order)).split(args.batch_size)[first:]
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=args.workers, collate_fn=np.stack
    )
    bar = tqdm(loader, unit="step", desc=f"VAE on {images.path}", initial=first, total=args.steps)
    for step, batch in enumerate(bar, first):
        # Seeds mirroring and the posterior: a resumed run draws the same.
        torch.manual_seed(derive_seed(args.seed, step))
        x = from_uint8(batch, device)
        x = x[x[:, 0, 0, 0].isfinite()]
        if len(x) == 0:
            continue
        if args.mirror:
            mirrored = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)

        optimizer.zero_grad()
        l1, kl = losses(vae, x)
        if not kl.isfinite():
            bar.close()
            raise UserError(f"the training diverged; remove {partial}, try a smaller --lr")
        (l1 + args.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / warmup) * cosine
        optimizer.step()

        bar.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            state = dict(flags=flags, step=step + 1)
            state.update(model=vae.state_dict(), optimizer=optimizer.state_dict())
            atomic_write(last, lambda f: torch.save(state, f))


def resume(last, flags, vae, optimizer):
    """Load an unfinished training of the same flags; returns its next step."""
    state = load_file(last)
    if state["flags"] != flags:
        rest = "of other images or flags; finish it with those, or remove it"
        raise UserError(f"{last.parent}: unfinished, {rest}")
    vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@torch.inference_mode()
def save_vae(vae, images, out, device):
    """Write the VAE with the scale of its latents, and a picture of reconstructions beside it."""
    # Readable ones of up to 512 images, spread over the data.
    chosen = np.linspace(0, len(images) - 1, min(512, len(images))).astype(int)
    originals = [images[i] for i in chosen]
    originals = [image for image in originals if image.dtype == np.uint8]
    if not originals:
        raise UserError(f"{images.path}: none of {len(chosen)} of its images can be read")
    originals = np.stack(originals)
    torch.manual_seed(0)
    latents = []
    for x in torch.from_numpy(originals).split(16):
        latents.append(sample_posterior(*vae.encode(from_uint8(x, device))))
    scale = 1 / torch.cat(latents).std().item()

    weights = {k: v.half() for k, v in vae.state_dict().items()}
    ckpt = dict(model=weights, scale=scale, image_size=vae.image_size)
    atomic_write(out, lambda f: torch.save(ckpt, f))
    picture = out.with_suffix(".png")
    error = show_reconstructions(originals[:: len(originals) // 16 + 1], vae, picture, device)
    print(f"wrote {out}, scale of the latents {scale:.4f}")
    print(f"mean error {error:.3f} of 2 (0.02 is sharp), see {picture}")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add("--data", default=str(DEMO_DATA), help="images (default: %(default)s)")
    add("--out", default="runs/vae.pt", help="file to write (default: %(default)s)")
    add("--arch", choices=ARCHS, default="small", help="kl16: the paper's (default: %(default)s)")
    add("--init", help="go on from this VAE, with its arch; kl16: the released one")
    add("--image-size", type=count, help="pixels (default: 32, kl16 256, or that of --init)")
    add("--steps", type=count, default=5000, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=count, default=32, help="images (default: %(default)s)")
    add("--lr", type=bounded(float, 0), help="peak, cosine to 0 (default: 4e-3, kl16 1e-4)")
    add("--kl-weight", type=float, default=2e-3, help="of the KL term (default: %(default)s)")
    add("--no-mirror", dest="mirror", action="store_false", help="train no mirror images")
    add("--seed", type=bounded(int, 0), default=0, help="(default: %(default)s)")
    add("--workers", type=bounded(int, 0), default=0, help="processes that read images")
    args = parser.parse_args()
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: is there already; remove it or give another")
    if out.suffix == ".png":
        raise UserError(f"--out {out}: is the name of the picture; end the VAE's in .pt")
    device = pick_device(args.device)
    vae = build(args, device)
    images = Images(args.data, vae.image_size)

    partial = Path(f"{out}.partial")
    train(vae, images, args, partial, device)
    save_vae(vae, images, out, device)
    shutil.rmtree(partial)


if __name__ == "__main__":
    run_main(main, "; to continue, repeat the command", "; lower --batch-size")
