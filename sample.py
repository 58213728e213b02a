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
from model import (
    DEMO_MODEL,
    RANK,
    RELEASED,
    SAMPLERS,
    WORLD,
    UserError,
    atomic_write,
    autocast,
    bounded,
    cast_weights,
    checkpoint_path,
    class_index,
    fetch_released,
    load_checkpoint,
    make_parser,
    missing_parts,
    part_paths,
    per_image_noise,
    pick_device,
    pick_dtype,
    run_main,
    sha256_prefix,
    shorten,
    start_parts,
    wait_until,
)
from vae import DEMO_VAE, latents_to_images, load_vae, save_grid

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


def parse():
    parser = make_parser(__doc__, torchrun=True)
    add = parser.add_argument
    count = bounded(int, 1)
    # What to draw.
    add(
        "--class",
        nargs="+",
        dest="classes",
        metavar="CLASS",
        help="indices or names; a class named twice is drawn twice as often (default: ten; with "
        "--num, all)",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--n", type=count, help="images of each class (default: 8)")
    amount.add_argument("--num", type=count, help="images in all, in a set: an .npz or a folder")
    add(
        "--balanced",
        action=argparse.BooleanOptionalAction,
        help="--num: equally many of each class, else in the proportions of the training set "
        "(default: for 1,000 classes, as ImageNet is measured)",
    )
    add("--show-chain", action="store_true", help="draw every image, a chain per row")
    add("--refs", type=count, help="images in the chain, the last is the result (default: all)")
    add("--seed", type=bounded(int, 0), default=0, help="image i depends on it and i (default: 0)")
    # Settings of the sampler; the default is what the model carries.
    add("--sampler", choices=SAMPLERS, help="euler-maruyama: the paper's; the other has no noise")
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
    # The model, the result, the machine.
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", default=DEMO_MODEL, help="run, or file (default: the bundled)")
    weights.add_argument("--pretrained", choices=RELEASED, help="the authors' weights and VAE")
    add("--vae", help="VAE of the model (default: vae.pt beside it, else the bundled one)")
    add(
        "--out",
        help="F.png; F.npz: arr_0 images, arr_1 labels; or FOLDER/: CLASS/NUMBER.png "
        "(default: runs/samples.*)",
    )
    add("--batch-size", type=count, default=64, help="images drawn at once (default: 64)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where it is fast)")
    return parser.parse_args()


def in_turn(weights, num):
    """`num` indices in proportion to the weights, in turn; 0 1 2 0 1 2 ... if these are equal.

    Item j of index i comes at time (j + 1/2) / weights[i]: Webster's method.
    """
    most = int(num * weights.max() / weights.sum()) + 2
    times = (np.arange(most)[:, None] + 0.5) / weights
    return np.argsort(times, axis=None, kind="stable")[:num] % len(weights)


def main():
    args = parse()
    device = pick_device(args.device)

    # -------- the result: a picture or a set, which is an .npz or a folder
    must_be_set = args.num or WORLD > 1
    text = args.out or ("runs/samples.npz" if must_be_set else "runs/samples.png")
    out = Path(text)
    is_set = out.suffix == ".npz" or text.endswith("/")
    if args.show_chain and (must_be_set or is_set):
        raise UserError("--show-chain: draws a picture; run it without torchrun and --num")
    if not is_set and (must_be_set or out.suffix != ".png"):
        raise UserError(f"--out {text}: must end in .npz or /, or in .png for a picture")
    if RANK == 0 and is_set and out.exists():
        raise UserError(f"--out {out}: is there already; remove it or give another")

    # -------- model and VAE
    path = checkpoint_path(args.ckpt)
    if args.pretrained:
        path = fetch_released(RELEASED[args.pretrained])
    beside = path.parent / "vae.pt"
    vae_path = "kl16" if args.pretrained else beside if beside.exists() else DEMO_VAE
    model = load_checkpoint(path, device)
    given = {k: getattr(args, k) for k in vars(model.sampling)}
    model.sampling = model.sampling.replace(**given)
    refs = args.refs or model.config.refs
    vae = load_vae(args.vae or vae_path, device, model)
    dtype = args.dtype or pick_dtype(device, model.config.width)
    cast_weights(model, dtype)

    # -------- labels
    counts = np.array(model.info["counts"])
    if args.classes:
        classes = [class_index(word, model) for word in args.classes]
    else:
        classes = np.flatnonzero(counts)[: None if args.num else 10]
    names = np.array(model.info["classes"])
    labels = np.array(classes)
    if args.num:
        balanced = len(counts) == 1000 if args.balanced is None else args.balanced
        weights = np.ones(len(classes)) if balanced else counts[classes]
        labels = labels[in_turn(weights, args.num)]
    else:
        labels = labels.repeat(args.n or 8)

    # -------- draw, batch by batch
    batches = torch.from_numpy(labels).to(device).split(args.batch_size)
    mine = range(len(batches))
    if is_set:
        # Each process draws every WORLD-th batch; any number of them can resume an
        # unfinished set, if all that decides the images is the same.
        partial = Path(f"{out}.partial")
        paths = part_paths(partial, len(batches))
        mine = missing_parts(paths)
        if RANK > 0 and (not mine or out.exists()):  # nothing to do, or rank 0 has finished
            return
        inputs = dict(
            labels=sha256_prefix(labels),
            weights=sha256_prefix(path.read_bytes()),
            vae=vae.digest,
            sampling=vars(model.sampling),
            refs=refs,
            seed=args.seed,
            batch_size=args.batch_size,
            dtype=dtype,
        )
        lock_file = start_parts(partial, inputs)  # noqa: F841 - until main returns
    images = []
    on_step = lambda t, x_t: bar.update()
    total = len(mine) * refs * model.sampling.steps
    bar = tqdm(total=total, unit="step", delay=1, disable=RANK > 0)  # an early error prints no bar
    for i in mine:
        first = i * args.batch_size  # the seed and the number of a chain fix its noise
        noise_sampler = per_image_noise(args.seed, range(first, first + len(batches[i])))
        with torch.inference_mode(), autocast(device, dtype):
            chain = model.sample(batches[i], refs, noise_sampler=noise_sampler, on_step=on_step)
            part = latents_to_images(vae, chain if args.show_chain else chain[:, -1])
        if is_set:
            atomic_write(paths[i], lambda f: np.save(f, part))
        else:
            images.append(part)
    bar.close()
    if RANK > 0:
        return

    # -------- write
    if is_set:
        wait_until(lambda: all(path.exists() for path in paths), f"the other parts of {partial}")
        images = np.concatenate([np.load(path, mmap_mode="r") for path in paths])
        if out.suffix == ".npz":  # ADM's format, and the names of the classes
            atomic_write(out, lambda f: np.savez(f, arr_0=images, arr_1=labels, classes=names))
        else:
            for i, label in enumerate(labels):
                path = partial / "images" / names[label] / f"{i:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[i]).save(path)
            (partial / "images").rename(out)
        shutil.rmtree(partial, ignore_errors=True)  # NFS keeps the lock's file until the exit
    else:
        images = np.concatenate(images)
        if not args.show_chain:
            images = images.reshape(len(classes), -1, *images.shape[1:])  # a class per row
        save_grid(images, out)
    settings = ", ".join(f"{k} {v}" for k, v in vars(model.sampling).items())
    print(f"wrote {out} ({shorten(names[classes])}; refs {refs}, {settings})")


if __name__ == "__main__":
    run_main(main, "; to continue --num, repeat the command", "; lower --batch-size")
