"""Stage 3: draw images of classes (Algorithms 1 and 2, Appendix C).

python sample.py --class 1 --refs 4                    the bundled model: trousers, each the last
                                                       image of a chain of 4
python sample.py --class trouser bag --show-chain      every image, one chain per row (Figure 2)
python sample.py --pretrained B-mrar --class 207 360   the authors' weights, fetched once
torchrun --nproc_per_node 8 -- sample.py --num 50000 --ckpt RUN --out samples.npz    for fid.py
"""

import argparse
import shutil
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, RANK, WORLD, UserError, atomic_write, autocast, bounded, cast_weights
from model import checkpoint_path, class_index, fetch_released, load_checkpoint, make_parser
from model import missing_parts, part_paths, per_image_noise, pick_device, pick_dtype, run_main
from model import shorten, start_parts, wait_until
from vae import DEMO_VAE, latents_to_images, load_vae, save_grid

import numpy as np
import torch
from tqdm import tqdm


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add(
        "--class",
        nargs="+",
        dest="classes",
        metavar="CLASS",
        help="indices or names; a class named twice is drawn twice as often (default: ten; with "
        "--num, all)",
    )
    add("--n", type=count, default=8, help="images of each class (default: 8)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--num", type=count, help="images in all, the classes in turn, to an .npz")
    mode.add_argument("--show-chain", action="store_true", help="draw every image, a chain per row")
    add("--refs", type=count, help="images in the chain, the last is the result (default: all)")
    # Settings of the sampler; the default is what the model carries.
    add(
        "--steps", type=count, help="of the sampler, for each image (default: the model's settings)"
    )
    add(
        "--cfg",
        nargs="+",
        type=bounded(float, 0),
        help="guidance scale, one or one per image; 1 is none, 0 with --cfg-below 1 draws without "
        "a class",
    )
    add("--cfg-below", type=bounded(float, 0, 1), help="guide only at t up to this; t = 1 is noise")
    add(
        "--null-refs",
        action=argparse.BooleanOptionalAction,
        help="the null class sees the references too",
    )
    add("--s1", type=bounded(float, 0), help="scale of the drift, Eq. 18")
    add("--s2", type=bounded(float, 0), help="scale of the noise, Eq. 18")
    add(
        "--sampler",
        choices=["euler-maruyama", "adams-bashforth"],
        help="the paper's, or one without noise",
    )
    add("--seed", type=bounded(int, 0), default=0, help="image i depends on it and i (default: 0)")
    add("--batch-size", type=count, default=64, help="images drawn at once (default: 64)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", default=DEMO_MODEL, help="run, or file (default: the bundled)")
    released = "B L H B-mrar L-mrar H-mrar L-512".split()
    weights.add_argument("--pretrained", choices=released, help="the authors' weights and VAE")
    add("--vae", help="VAE of the model (default: vae.pt beside it, else the bundled one)")
    add("--out", help="F.png, or F.npz: arr_0 images, arr_1 labels (default: runs/samples.*)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where it is fast)")
    args = parser.parse_args()
    check_output(args)
    return args


def check_output(args):
    """Resolve --out; refuse a suffix that does not fit, and an .npz that is there already."""
    if args.show_chain and WORLD > 1:
        raise UserError("--show-chain: draws a picture; run it without torchrun")
    suffixes = [".png", ".npz"]
    if args.num or WORLD > 1:
        suffixes = [".npz"]
    if args.show_chain:
        suffixes = [".png"]
    args.out = Path(args.out or "runs/samples" + suffixes[0])
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: must end in {' or '.join(suffixes)} here")
    if RANK == 0 and args.out.suffix == ".npz" and args.out.exists():
        raise UserError(f"--out {args.out}: is there already; remove it or give another")


def load(args, device):
    """(model, vae), as --pretrained or --ckpt and --vae name them."""
    if args.pretrained:
        path = fetch_released(f"transdiff_{args.pretrained.lower().replace('-', '_')}")
        vae_path = "kl16"
    else:
        path = checkpoint_path(args.ckpt)
        beside = path.parent / "vae.pt"
        vae_path = beside if beside.exists() else DEMO_VAE
    model = load_checkpoint(path, device)
    # write_npz records it: a set begun with another checkpoint is refused.
    args.written = args.pretrained or path.stat().st_mtime_ns
    args.refs = args.refs or model.config.refs
    model.sampling = model.merge_settings({k: getattr(args, k) for k in model.sampling})
    return cast_weights(model, args.dtype), load_vae(args.vae or vae_path, device, model)


def choose_classes(args, model):
    """Indices of the classes to draw."""
    if args.classes:
        return [class_index("--class", word, model) for word in args.classes]
    classes = [k for k in range(model.config.num_classes) if k not in model.info["empty"]]
    return classes if args.num else classes[:10]


def draw(model, vae, labels, first, args, on_step=None):
    """Draw a chain for each label. They are numbered from `first` on; the seed and the number fix
    the noise.

    Returns the last images, uint8 [B, H, W, 3]; with --show-chain all, [B, refs, H, W, 3].
    """
    noise_sampler = per_image_noise(args.seed, range(first, first + len(labels)))
    chain = model.sample(labels, args.refs, noise_sampler=noise_sampler, on_step=on_step)
    return latents_to_images(vae, chain if args.show_chain else chain[:, -1])


def write_npz(model, vae, labels, args):
    """Draw the last image of each chain into args.out, in ADM's format: arr_0 uint8 [N, H, W, 3],
    arr_1 int64 [N], and the names of the classes.

    Each process draws every WORLD-th batch; an unfinished set is resumed, by any number of them.
    """
    partial = Path(f"{args.out}.partial")
    batches = labels.split(args.batch_size)
    paths = part_paths(partial, len(batches))
    mine = missing_parts(paths)
    if RANK > 0 and (not mine or args.out.exists()):  # nothing to do, or rank 0 has finished
        return
    start_parts(partial, dict(vars(args), vae_digest=vae.digest))
    for i in tqdm(mine, unit="batch", disable=RANK > 0):
        images = draw(model, vae, batches[i], i * args.batch_size, args)
        atomic_write(paths[i], lambda f: np.save(f, images))
    if RANK == 0:
        wait_until(lambda: all(path.exists() for path in paths))
        images = np.concatenate([np.load(path) for path in paths])
        names = np.array(model.info["classes"])
        arrays = dict(arr_0=images, arr_1=labels.cpu().numpy(), classes=names)
        atomic_write(args.out, lambda f: np.savez(f, **arrays))
        shutil.rmtree(partial, ignore_errors=True)  # NFS keeps the lock's file until the exit


def draw_picture(model, vae, labels, args):
    """Draw the images and write them as one PNG: a class per row, or a chain per row."""
    on_step = tqdm(unit="step", delay=1).update  # an early error prints no bar
    size = args.batch_size
    batches = enumerate(labels.split(size))
    images = np.concatenate([draw(model, vae, y, i * size, args, on_step) for i, y in batches])
    if not args.show_chain:
        images = images.reshape(-1, args.n, *images.shape[1:])
    save_grid(images, args.out)


def main():
    args = parse()
    device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, device)
    model, vae = load(args, device)
    classes = choose_classes(args, model)
    names = [model.info["classes"][k] for k in classes]
    labels = torch.tensor(classes, device=device)
    if args.num:
        labels = labels[torch.arange(args.num) % len(labels)]
    else:
        labels = labels.repeat_interleave(args.n)
    with torch.inference_mode(), autocast(device, args.dtype):
        if args.out.suffix == ".npz":
            write_npz(model, vae, labels, args)
        else:
            draw_picture(model, vae, labels, args)
    if RANK == 0:
        settings = ", ".join(f"{k} {v}" for k, v in model.sampling.items())
        tqdm.write(f"wrote {args.out} ({shorten(names)}; refs {args.refs}, {settings})")


if __name__ == "__main__":
    run_main(main)
