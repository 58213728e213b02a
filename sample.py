"""Stage 3: draw images of classes (Algorithms 1 and 2, Appendix C).

    python sample.py --class 1 --refs 4              the bundled model: trousers, the last image of chains of 4
    python sample.py --class trouser bag --show-chain    every image of the chain, a chain a row (Figure 2's idea)
    python sample.py --pretrained B-mrar --class 207 360     the authors' weights, fetched on first use, at their published settings
    python sample.py --fuse trouser bag                      semantic features of two classes in one image (Figures 1 and 5)
    python sample.py --features 32,64,128,256                the same noise decoded from the first so many features (Figure 1)
    torchrun --nproc_per_node 8 -- sample.py --num 50000 --ckpt CKPT --out samples.npz    balanced classes, for FID; the bare --
                                                             keeps torchrun from taking --num for a flag of its own
"""
import argparse
import datetime
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import load_checkpoint, sampling_settings
from vae import DEMO_MODEL, DEMO_VAE, autocast, cast_weights, check_out, class_index, compiled, digest, fetch, load_vae, number
from vae import pick_device, pick_dtype, pixels, positive, run, save_grid, seed_of, whole, write_whole

RELEASED = {  # --pretrained: folder of the authors' repository
    "B": "transdiff_b", "L": "transdiff_l", "H": "transdiff_h",
    "B-mrar": "transdiff_b_mrar", "L-mrar": "transdiff_l_mrar", "H-mrar": "transdiff_h_mrar", "L-512": "transdiff_l_512",
}  # fmt: skip


def fetch_released(folder):
    """Path of FOLDER/checkpoint-last.pth of the authors' repository, fetched once to torch's hub folder. HF_ENDPOINT names a mirror."""
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/zhendch/Transdiff/resolve/main/{folder}/checkpoint-last.pth"
    return fetch(url, Path(torch.hub.get_dir()) / "transdiff" / folder / "checkpoint-last.pth")


def per_image_noise(seed, indices, device):
    """noise_sampler(x) whose row i is a function of (seed, indices[i]) alone, whatever else is in the batch."""
    generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]

    def noise_sampler(x):  # drawn on the CPU, so that every machine draws the same, while a GPU is still busy with the step before
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        return noise.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else noise

    return noise_sampler


def draw(model, vae, labels, refs, args, device, dtype, batches=None):
    """Yield (first index, uint8 images [b, k, H, W, 3]) for batches of `labels` [N], all or those given; k = refs with --show-chain, else 1, the last.

    Batches are cut by index, so what is in one depends on neither the number of processes nor what was drawn before.
    """
    size = args.batch_size
    batches = range(-(-len(labels) // size)) if batches is None else batches
    total = sum(len(labels[b * size : (b + 1) * size]) for b in batches)
    with tqdm(total=total, unit="image", unit_scale=True, disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for done, b in enumerate(batches):
            batch = torch.tensor(labels[b * size : (b + 1) * size], device=device)
            randn = per_image_noise(args.seed, range(b * size, b * size + len(batch)), device)

            def noise_sampler(x):  # called about once a step, so the bar moves within a batch
                bar.update(len(batch) / (refs * args.steps + refs))
                return randn(x)

            with torch.inference_mode(), autocast(device, dtype):
                chain = model.sample(batch, refs, noise_sampler=noise_sampler, fresh_noise=args.fresh_noise, **settings(args))
                kept = chain if args.show_chain else chain[:, -1:]
                images = pixels(vae, kept.flatten(0, 1)).reshape(*kept.shape[:2], model.config.latent_size * vae.factor, -1, 3)
            bar.n = sum(len(labels[i * size : (i + 1) * size]) for i in batches[: done + 1])
            bar.refresh()
            yield b * size, images


def settings(args):
    """Keyword arguments of TransDiff.decode and sample."""
    return dict(steps=args.steps, cfg=args.cfg, s1=args.s1, s2=args.s2, sampler=args.sampler, cfg_interval=tuple(args.cfg_interval))


def write_npz(model, vae, labels, refs, args, device, dtype, identity):
    """Draw the last image of each chain into args.out in ADM's convention: arr_0 uint8 [N, H, W, 3], arr_1 int64 [N].

    Ranks draw every WORLD_SIZE-th batch into one memory-mapped array in OUT.partial, where a byte a batch tells what is done: a run
    that was killed goes on from there. `identity` tells the run; another run's partial folder is a ValueError.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    partial, side = Path(f"{args.out}.partial"), model.config.latent_size * vae.factor
    if rank == 0 and not (partial / "run.json").exists():
        partial.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(partial / "arr_0.npy", "w+", np.uint8, (len(labels), side, side, 3)).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, where later it would end the process
            with open(partial / "arr_0.npy", "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
        np.save(partial / "arr_1.npy", np.array(labels, np.int64))
        np.save(partial / "done.npy", np.zeros(-(-len(labels) // args.batch_size), np.uint8))
        write_whole(partial / "run.json", lambda f: f.write(json.dumps(identity).encode()))
    if world > 1:
        dist.barrier()
    if json.loads((partial / "run.json").read_text()) != identity:
        raise ValueError(f"{partial}: unfinished samples of another model or other settings; finish them, remove the folder, or give another --out")
    images, done = (np.load(partial / name, mmap_mode="r+") for name in ("arr_0.npy", "done.npy"))
    mine = [b for b in range(rank, len(done), world) if not done[b]]
    for first, drawn in draw(model, vae, labels, refs, args, device, dtype, mine):
        images[first : first + len(drawn)] = drawn[:, -1]
        images.flush()
        done[first // args.batch_size] = 1
        done.flush()
    if world > 1:
        dist.barrier()
    if rank:
        return

    def assemble(f):  # what np.savez writes, but streamed, and with no clock in it: the same run gives the same bytes
        with zipfile.ZipFile(f, "w") as archive:
            for name in ("arr_0.npy", "arr_1.npy"):
                with open(partial / name, "rb") as source, archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                    shutil.copyfileobj(source, entry, 1 << 20)

    write_whole(args.out, assemble)
    shutil.rmtree(partial)


def decode_parts(model, vae, labels, refs, parts, args, device, dtype):
    """Figures 1 and 5: decode parts of the semantic features with the same noise -> uint8 images [len(parts), N, H, W, 3].

    labels: lists of N classes, e.g. [A ...] and [B ...]; c of each is that of the last image of a chain drawn for it. A part is a function of
    the list of those c [N, K, width] that returns the c to decode.
    """
    N, conditions, nulls = len(labels[0]), [], []
    with torch.inference_mode(), autocast(device, dtype):
        for y in labels:
            y = torch.tensor(y, device=device)
            randn = per_image_noise(args.seed, range(N), device)
            chain = model.sample(y, refs - 1, noise_sampler=randn, **settings(args)) if refs > 1 else None
            conditions.append(model.encode(y, chain))
            nulls.append(model.encode(torch.full_like(y, model.config.num_classes), chain))
        images = []
        for part in tqdm(parts, unit="part"):
            randn = per_image_noise(args.seed, range(N), device)
            noise = randn(torch.empty(N, model.config.latent_channels, model.config.latent_size, model.config.latent_size))
            images.append(pixels(vae, model.decode(part(conditions), noise, part(nulls), noise_sampler=randn, **settings(args))))
    return np.stack(images)


def counts(text):
    """argparse type of --features."""
    return [positive(k) for k in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class", nargs="+", dest="classes", metavar="CLASS", help="indices or names (default: the model's first ten; with --num, all)")
    add("--n", type=positive, default=8, help="images of each class (default: 8)")
    add("--num", type=positive, help="images in all, as many of each class, the classes in turn; --out must end in .npz")
    add("--refs", type=positive, help="images in the chain, up to the model's; the last is the result (default: the model's)")
    add("--show-chain", action="store_true", help="draw every image of each chain, a chain a row")
    add("--fuse", nargs=2, metavar=("A", "B"), help="draw A, B, and half of A's features with half of B's, side by side")
    add("--fuse-half", choices=["first", "second"], default="first", help="the half that A gives, 128 of 256 features in the paper's sizes (default: first)")
    add("--features", type=counts, metavar="K,K,...", help="draw each image from its first K of 256 features (of fewer, the same share), side by side")
    add("--steps", type=positive, help="network evaluations an image (default: 25 for XS, 100 for the paper's sizes)")
    add("--cfg", type=number(0), help="guidance scale, 1 = none (default: the published one of the model's size)")
    add("--cfg-interval", type=number(0, 1), nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="guide for t from LO to HI alone, 1 = noise; elsewhere one evaluation instead of two (default: 0 1)")
    add("--s1", type=number(0), help="scale of the drift, Eq. 18 (default: likewise)")
    add("--s2", type=number(0), help="scale of the noise, Eq. 18 (default: likewise)")
    add("--sampler", choices=["euler-maruyama", "adams-bashforth"], default="euler-maruyama", help="the paper's, or one without noise (no s1, s2) for few steps (default: %(default)s)")
    add("--fresh-noise", action="store_true", help="start each image of a chain from noise of its own, not from the chain's one noise")
    add("--seed", type=whole, default=0, help="image i is a function of the seed and i (default: 0)")
    add("--batch-size", type=positive, default=64, help="images drawn at once (default: 64)")
    add("--ckpt", help=f"model: a run's ema.pt or last.pt, or a released file (default: {DEMO_MODEL})")
    add("--vae", help="VAE that made the model's latents (default: the one that the model names)")
    add("--pretrained", choices=RELEASED, help="the authors' weights and VAE, fetched once to torch's hub folder")
    add("--out", default="runs/samples.png", help="F.png: a picture; F.npz: arr_0 uint8 [N, H, W, 3], arr_1 labels [N] (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of the arithmetic (default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile, with CUDA graphs for batches of 8 or less; a minute before the first image (default: with --num on CUDA)")
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.pretrained and args.ckpt:
        raise ValueError("--ckpt and --pretrained both name a model; give one")
    kinds = [name for name in ("num", "show_chain", "fuse", "features") if getattr(args, name)]
    if len(kinds) > 1:
        raise ValueError(f"--{kinds[0].replace('_', '-')} and --{kinds[1].replace('_', '-')} ask for different pictures; give one")
    suffixes = [".npz"] if args.num else [".png"] if kinds else [".npz"] if world > 1 else [".png", ".npz"]
    if Path(args.out).suffix not in suffixes:
        raise ValueError(f"--out {args.out}: must end in {' or '.join(suffixes)} here")
    check_out("--out", args.out)
    if world > 1 and not args.out.endswith(".npz"):
        raise ValueError(f"--out {args.out}: several processes draw into an .npz only; pictures are drawn without torchrun")
    if world != int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        raise ValueError("torchrun --nnodes: the processes write one file together, so they must be on one machine; give each machine its own --seed and --out instead")
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # for its barrier alone: ranks meet when the first and the last are done
    dtype = pick_dtype(args.dtype, device)

    if args.pretrained and world > 1:
        if int(os.environ["RANK"]) == 0:
            fetch_released(RELEASED[args.pretrained]), fetch_released("vae")
        dist.barrier()
    ckpt = fetch_released(RELEASED[args.pretrained]) if args.pretrained else Path(args.ckpt or DEMO_MODEL)
    try:
        model = cast_weights(load_checkpoint(ckpt, device), dtype)
    except ValueError as e:
        raise ValueError(f"{e}; remove the file to fetch it again" if args.pretrained else e) from None
    vae_path = Path(args.vae or (fetch_released("vae") if args.pretrained else model.info.get("vae", "")))
    if not vae_path.is_file() and not args.vae and digest(DEMO_VAE.read_bytes()) == model.info.get("vae_digest"):
        vae_path = DEMO_VAE  # the model names it by its path from the folder that it was trained in
    if not vae_path.is_file():
        raise ValueError(f"--vae {vae_path}: no such file; name the VAE that made this model's latents")
    vae = cast_weights(load_vae(vae_path, device), dtype)
    if not args.vae and model.info.get("vae_digest", vae.digest) != vae.digest:
        raise ValueError(f"--vae: {vae_path} is no longer the file that made this model's latents; if it will do all the same, name it")
    if vae.z_channels != model.config.latent_channels:
        raise ValueError(f"--vae {vae_path}: has {vae.z_channels} latent channels, the model {model.config.latent_channels}")
    refs = model.config.refs if args.refs is None else args.refs
    if not 1 <= refs <= model.config.refs:
        raise ValueError(f"--refs {refs}: this model draws chains of 1 to {model.config.refs} images")
    for name, value in sampling_settings(model.config, args.pretrained or model.info.get("size")).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    names, num_classes = model.info.get("classes", []), model.config.num_classes
    first_ten = range(num_classes if args.num else min(10, num_classes))
    classes = [class_index("--fuse" if args.fuse else "--class", word, names, num_classes) for word in args.fuse or args.classes or []] or list(first_ten)
    if args.num and args.num % len(classes):
        raise ValueError(f"--num {args.num}: must be a multiple of the {len(classes)} classes, e.g. {-(-args.num // len(classes)) * len(classes)}")
    labels = classes * (args.num // len(classes)) if args.num else [k for k in classes for _ in range(args.n)]

    if args.compile or args.compile is None and args.num and device.type == "cuda":

        def trial(decoder):
            model.decoder = decoder
            with torch.inference_mode(), autocast(device, dtype):
                model.sample(torch.tensor(labels[: args.batch_size], device=device), min(2, refs), **dict(settings(args), steps=3))  # as far as a graph's replay

        # CUDA graphs copy c's keys and values at every step, so they pay where launching kernels takes longer than running them
        compiled(model.decoder, trial, mode="reduce-overhead" if min(args.batch_size, len(labels)) <= 8 else "default")

    tokens = model.config.tokens_per_image * refs  # what an image of this place in the chain is decoded from
    if args.fuse:
        half, (a, b) = tokens // 2, (0, 1) if args.fuse_half == "first" else (1, 0)
        parts = [lambda c: c[0], lambda c: c[1], lambda c: torch.cat([c[a][:, :half], c[b][:, half:]], dim=1)]
        images = decode_parts(model, vae, [[k] * args.n for k in classes], refs, parts, args, device, dtype)
    elif args.features:
        first = [k * tokens // 256 for k in args.features]
        if not all(1 <= k <= tokens for k in first):
            raise ValueError(f"--features {','.join(map(str, args.features))}: of 256, and this image has {tokens}, so each from {-(-256 // tokens)} to 256")
        parts = [lambda c, k=k: c[0][:, :k] for k in first]
        images = decode_parts(model, vae, [labels], refs, parts, args, device, dtype)
        print(f"columns: the first {', '.join(map(str, first))} of {tokens} features")
    if args.fuse or args.features:
        save_grid(images.swapaxes(0, 1).reshape(-1, *images.shape[2:]), args.out, columns=len(images))
    elif args.out.endswith(".npz"):
        identity = dict(settings(args), cfg_interval=list(args.cfg_interval), fresh_noise=args.fresh_noise, seed=args.seed, batch_size=args.batch_size, refs=refs, labels=len(labels), classes=classes, model=[ckpt.name, ckpt.stat().st_size, ckpt.stat().st_mtime_ns], vae=vae.digest, dtype=str(dtype))
        write_npz(model, vae, labels, refs, args, device, dtype, identity)
    else:
        chains = np.concatenate([images for _, images in draw(model, vae, labels, refs, args, device, dtype)])
        if args.show_chain:
            save_grid(chains.reshape(-1, *chains.shape[2:]), args.out, columns=refs)
        else:
            save_grid(chains[:, -1], args.out, columns=args.n)
    shown = ", ".join(names[k] if names else str(k) for k in classes[:10]) + (" ..." if len(classes) > 10 else "")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"wrote {len(labels)} images ({shown}; refs {refs}, {args.steps} steps, cfg {args.cfg}, s1 {args.s1}, s2 {args.s2}) to {args.out}")


if __name__ == "__main__":
    run(main)
