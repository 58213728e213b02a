"""Stage 3: draw images of classes (Algorithms 1 and 2, Appendix C).

    python sample.py --class 1 --refs 4              the bundled model: trousers, the last image of chains of 4
    python sample.py --class trouser bag --show-chain    every image of the chain, a chain a row (Figure 2's idea)
    python sample.py --pretrained B-mrar --class 207 360 the authors' weights, fetched on first use, at their published settings
"""
import argparse
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import SAMPLING, load_checkpoint
from vae import DEMO, DEMO_VAE, autocast, load_vae, pick_device, pick_dtype, run, save_grid, seed_of, to_uint8, write_whole

DEMO_MODEL = DEMO / "mrar.pt"
RELEASED = {  # --pretrained: folder of the authors' repository
    "B": "transdiff_b", "L": "transdiff_l", "H": "transdiff_h",
    "B-mrar": "transdiff_b_mrar", "L-mrar": "transdiff_l_mrar", "H-mrar": "transdiff_h_mrar", "L-512": "transdiff_l_512",
}  # fmt: skip


def fetch(folder):
    """Path of FOLDER/checkpoint-last.pth of the released weights in the cache folder, downloaded if it is not there.

    A download that was cut goes on where it stopped. HF_ENDPOINT names another host, as for other tools of that hub.
    Raises OSError if the server cannot be reached or sends something else.
    """
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/zhendch/Transdiff/resolve/main/{folder}/checkpoint-last.pth"
    path = Path(torch.hub.get_dir()) / "transdiff" / folder / "checkpoint-last.pth"
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
            total = have + int(response.headers.get("Content-Length", 0))
            with open(part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=f"{folder}") as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if part.stat().st_size != total:
            raise OSError("the connection closed early")
    except (urllib.error.URLError, OSError) as e:
        raise OSError(f"--pretrained: could not fetch {url} ({getattr(e, 'reason', e)}); run it again to go on, or put the file at {path}") from None
    part.rename(path)
    return path


def class_indices(words, names, num_classes):
    """Indices of classes given as indices or names. Raises ValueError for one that the model does not have."""
    indices = []
    for word in words:
        if word in names:
            indices.append(names.index(word))
        elif word.isdecimal() and int(word) < num_classes:
            indices.append(int(word))
        else:
            known = f": {', '.join(names)}" if len(names) <= 20 else ""
            raise ValueError(f"--class {word}: this model has classes 0 to {num_classes - 1}{known}")
    return indices


def released_name(config):
    """Which of the released models a file of that shape is, for its published settings; XS for anything else."""
    size = {768: "B", 1024: "L", 1280: "H"}.get(config.width, "XS")
    return "L-512" if size == "L" and config.latent_size == 32 else size if config.refs == 1 else f"{size}-mrar"


def per_image_noise(seed, indices, device):
    """noise_sampler(x) whose row i is a function of (seed, indices[i]) alone, whatever else is in the batch."""
    generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(device)


def draw(model, vae, labels, refs, args, device, dtype):
    """uint8 images [N, refs, H, W, 3] of labels [N]: every image of each chain."""
    images, evaluations = [], args.steps - 1
    with torch.inference_mode(), tqdm(total=len(labels), unit="image") as bar:
        for first in range(0, len(labels), args.batch_size):
            batch = torch.tensor(labels[first : first + args.batch_size], device=device)
            randn = per_image_noise(args.seed, range(first, first + len(batch)), device)

            def noise_sampler(x):  # called once a step, so the bar moves within a batch
                bar.update(len(batch) / (refs * evaluations + 1))
                return randn(x)

            with autocast(device, dtype):
                chain = model.sample(batch, refs, args.steps, args.cfg, args.s1, args.s2, noise_sampler=noise_sampler, fresh_noise=args.fresh_noise)
                x = torch.cat([vae.decode(z / vae.scale).float() for z in chain.flatten(0, 1).split(16)])
            if not torch.isfinite(x).all():
                raise ValueError(f"the sampler gave values that are not finite; try --dtype fp32, or another --cfg ({args.cfg})")
            images.append(to_uint8(x).reshape(len(batch), refs, *x.shape[2:], 3))
            bar.n = first + len(batch)
            bar.refresh()
    return np.concatenate(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class", nargs="+", dest="classes", metavar="CLASS", help="indices or names (default: the model's first ten)")
    add("--n", type=int, default=8, help="images of each class (default: 8)")
    add("--refs", type=int, help="images in the chain, up to the model's; the last is the result (default: the model's)")
    add("--show-chain", action="store_true", help="draw every image of each chain, a chain a row")
    add("--steps", type=int, help="network evaluations an image (default: 25 for XS, 100 for the paper's sizes)")
    add("--cfg", type=float, help="guidance scale, 1 = none (default: the published one of the model's size)")
    add("--s1", type=float, help="scale of the drift, Eq. 18 (default: likewise)")
    add("--s2", type=float, help="scale of the noise, Eq. 18 (default: likewise)")
    add("--fresh-noise", action="store_true", help="start each image of a chain from noise of its own, not from the chain's one noise")
    add("--seed", type=int, default=0, help="image i is a function of the seed and i (default: 0)")
    add("--batch-size", type=int, default=64, help="images drawn at once (default: 64)")
    add("--ckpt", help=f"model: a run's ema.pt or last.pt, or a released file (default: {DEMO_MODEL})")
    add("--vae", help="VAE that made the model's latents (default: the one that the model names)")
    add("--pretrained", choices=RELEASED, help="the authors' weights and VAE, fetched once to torch's hub folder")
    add("--out", default="runs/samples.png", help="F.png: a picture; F.npz: arr_0 uint8 [N, H, W, 3], arr_1 labels [N] (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of the arithmetic (default: bf16 where the hardware has it)")
    args = parser.parse_args()
    if args.pretrained and args.ckpt:
        raise ValueError("--ckpt and --pretrained both name a model; give one")
    if Path(args.out).suffix not in (".png", ".npz") or args.show_chain and args.out.endswith(".npz"):
        raise ValueError(f"--out {args.out}: must end in .png{'' if args.show_chain else ' or .npz'}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    model = load_checkpoint(fetch(RELEASED[args.pretrained]) if args.pretrained else args.ckpt or DEMO_MODEL, device)
    vae_path = Path(args.vae or (fetch("vae") if args.pretrained else model.info.get("vae", "")))
    if vae_path.name == DEMO_VAE.name and not args.vae and not vae_path.is_file():
        vae_path = DEMO_VAE  # named relative to the folder that the model was trained in
    if not vae_path.is_file():
        raise ValueError(f"--vae {vae_path}: no such file; name the VAE that made this model's latents")
    vae = load_vae(vae_path, device)
    if vae.z_channels != model.config.latent_channels:
        raise ValueError(f"--vae {vae_path}: has {vae.z_channels} latent channels, the model {model.config.latent_channels}")
    refs = args.refs or model.config.refs
    if not 1 <= refs <= model.config.refs:
        raise ValueError(f"--refs {refs}: this model draws chains of 1 to {model.config.refs} images")
    for name, value in SAMPLING[args.pretrained or model.info.get("size") or released_name(model.config)].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.n < 1 or args.steps < 1 or args.batch_size < 1:
        raise ValueError("--n, --steps and --batch-size must be at least 1")

    names = model.info.get("classes", [])
    classes = class_indices(args.classes, names, model.config.num_classes) if args.classes else list(range(min(10, model.config.num_classes)))
    labels = [k for k in classes for _ in range(args.n)]
    images = draw(model, vae, labels, refs, args, device, dtype)
    if args.out.endswith(".npz"):
        write_whole(args.out, lambda f: np.savez(f, arr_0=images[:, -1], arr_1=np.array(labels)))
    elif args.show_chain:
        save_grid(images.reshape(-1, *images.shape[2:]), args.out, columns=refs)
    else:
        save_grid(images[:, -1], args.out, columns=args.n)
    print(f"wrote {len(labels)} images ({', '.join(names[k] if names else str(k) for k in classes)}; refs {refs}, {args.steps} steps, cfg {args.cfg}, s1 {args.s1}, s2 {args.s2}) to {args.out}")


if __name__ == "__main__":
    run(main)
