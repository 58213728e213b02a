"""Stage 3: draw images of classes (Algorithms 1 and 2, Appendix C).

python sample.py --class 1 --refs 4                    the bundled model: trousers, each the last
                                                       image of a chain of 4
python sample.py --class trouser bag --show-chain      every image, one chain per row (Figure 2)
python sample.py --pretrained B-mrar --class 207 360   the authors' weights, fetched once
python sample.py --fuse trouser bag                    features of two classes (Figures 1 and 5)
python sample.py --features 8 16 32 64                 the first features alone (Figure 1)
torchrun --nproc_per_node 8 -- sample.py --num 50000 --ckpt RUN --out samples.npz    for fid.py
"""

import argparse
import shutil
from pathlib import Path

# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, RANK, WORLD, UserError, atomic_write, autocast, bounded, cast_weights
from model import checkpoint_path, class_index, fetch_released, load_checkpoint, make_parser
from model import missing_parts, part_paths, per_image_noise, pick_device, pick_dtype, run_main
from model import shorten, start_parts, wait_for
from vae import DEMO_VAE, latents_to_images, load_vae, save_grid

import numpy as np
import torch
from tqdm import tqdm

SETTINGS = "steps cfg cfg_below null_refs s1 s2 sampler".split()


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add(
        "--class",
        nargs="+",
        dest="classes",
        metavar="CLASS",
        help="indices or names; a class "
        "named twice is drawn twice as often (default: ten; with --num, all)",
    )
    add("--n", type=count, default=8, help="images of each class (default: 8)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--num", type=count, help="images in all, the classes in turn, to an .npz")
    mode.add_argument("--show-chain", action="store_true", help="draw every image, a chain per row")
    mode.add_argument(
        "--fuse",
        nargs=2,
        metavar=("A", "B"),
        help="columns A, B, and A's first half " "of features with B's second",
    )
    mode.add_argument(
        "--features",
        nargs="+",
        type=count,
        metavar="K",
        help="columns decoded from " "the first K features",
    )
    add("--refs", type=count, help="images in the chain, the last is the result (default: all)")
    group = parser.add_argument_group("sampling (default: the settings that the model carries)")
    setting = group.add_argument
    setting("--steps", type=count, help="of the sampler, for each image")
    setting(
        "--cfg",
        nargs="+",
        type=bounded(float, 0),
        help="guidance scale, one or one per image; 1 is none, "
        "0 with --cfg-below 1 draws without a class",
    )
    setting(
        "--cfg-below", type=bounded(float, 0, 1), help="guide where t, 1 = noise, is at most this"
    )
    setting(
        "--null-refs",
        action=argparse.BooleanOptionalAction,
        help="the null class sees the " "references too",
    )
    setting("--s1", type=bounded(float, 0), help="scale of the drift, Eq. 18")
    setting("--s2", type=bounded(float, 0), help="scale of the noise, Eq. 18")
    setting(
        "--sampler",
        choices=["euler-maruyama", "adams-bashforth"],
        help="the paper's, or one " "without noise",
    )
    add("--seed", type=bounded(int, 0), default=0, help="image i depends on it and i (default: 0)")
    add("--batch-size", type=count, default=64, help="images drawn at once (default: 64)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--ckpt",
        default=DEMO_MODEL,
        help="model: a run's folder, ema.pt, last.pt "
        "or a released file (default: the bundled model)",
    )
    released = "B L H B-mrar L-mrar H-mrar L-512".split()
    weights.add_argument("--pretrained", choices=released, help="the authors' weights and VAE")
    add("--vae", help="VAE of the model (default: vae.pt beside it, else the bundled one)")
    add("--out", help="F.png, or F.npz: arr_0 images, arr_1 labels (default: runs/samples.png)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where it is native)")
    add("--compile", action="store_true", help="torch.compile the decoders, for large --num")
    args = parser.parse_args()
    check_output(args)
    return args


def check_output(args):
    """Resolve --out; refuse a suffix that does not fit, and results that are there already."""
    suffixes = [".png", ".npz"]
    if args.num or WORLD > 1:
        suffixes = [".npz"]
    if args.show_chain or args.fuse or args.features:
        suffixes = [".png"]
    args.out = Path(args.out or "runs/samples" + suffixes[0])
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: must end in {' or '.join(suffixes)} here")
    if RANK == 0 and args.out.suffix == ".npz" and args.out.exists():
        raise UserError(f"--out {args.out}: is there already; remove it or give another")
    if args.fuse and args.classes:
        raise UserError("--fuse names the classes; leave out --class")


def load(args, device, dtype):
    """(model, vae), as --pretrained or --ckpt and --vae name them."""
    if args.pretrained:
        path = fetch_released(f"transdiff_{args.pretrained.lower().replace('-', '_')}")
        vae_path = args.vae or "kl16"
    else:
        path = checkpoint_path(args.ckpt)
        beside = path.parent / "vae.pt"
        vae_path = args.vae or (beside if beside.exists() else DEMO_VAE)
    model = load_checkpoint(path, device)
    model.info["file"] = (path.stat().st_size, path.stat().st_mtime_ns)
    args.refs = args.refs or model.config.refs
    given = {name: getattr(args, name) for name in SETTINGS}
    if args.cfg and len(args.cfg) == 1:
        given["cfg"] = args.cfg[0]
    elif args.cfg and len(args.cfg) != args.refs:
        raise UserError(f"--cfg: give one number, or one for each of {args.refs} images")
    model.sampling = model.merge_settings(given)
    return cast_weights(model, dtype), load_vae(vae_path, device, model)


def choose_classes(args, model):
    """Indices of the classes to draw, and of --fuse both classes."""
    flag, words = ("--fuse", args.fuse) if args.fuse else ("--class", args.classes)
    if words:
        return [class_index(flag, word, model) for word in words]
    empty = model.info.get("empty", [])
    classes = [k for k in range(model.config.num_classes) if k not in empty]
    return classes if args.num else classes[:10]


def draw(model, vae, labels, first, args, on_step):
    """Draw the chains of `labels`, images `first` ... of the seed -> uint8 [B, refs, H, W, 3]."""
    noise_sampler = per_image_noise(args.seed, range(first, first + len(labels)))
    chain = model.sample(labels, args.refs, noise_sampler=noise_sampler, on_step=on_step)
    chain = chain if args.show_chain else chain[:, -1:]
    images = latents_to_images(vae, chain.flatten(0, 1))
    return images.reshape(*chain.shape[:2], *images.shape[1:])


def write_npz(model, vae, labels, names, args):
    """Draw the last image of each chain into args.out, in ADM's format: arr_0 uint8 [N, H, W, 3],
    arr_1 int64 [N], and the names of the classes.

    Each process draws every WORLD-th batch; an unfinished set is resumed, by any number of them.
    """
    size = args.batch_size
    partial = Path(f"{args.out}.partial")
    batches = labels.split(size)
    if RANK >= len(batches):  # nothing to do
        return
    settings = dict(
        model.sampling,
        refs=args.refs,
        seed=args.seed,
        batch_size=size,
        dtype=args.dtype,
        labels=labels.tolist(),
        vae=vae.digest,
        model=model.info["file"],
    )
    start_parts(partial, settings)
    paths = part_paths(partial, len(batches))
    mine = missing_parts(paths)
    total = len(mine) * args.refs * model.sampling["steps"]
    bar = tqdm(total=total, unit="step", disable=RANK > 0)
    for i in mine:
        images = draw(model, vae, batches[i], i * size, args, bar.update)
        atomic_write(paths[i], lambda f: np.save(f, images[:, -1]))
    if RANK == 0:
        wait_for(paths)
        images = np.concatenate([np.load(path) for path in paths])
        arrays = dict(arr_0=images, arr_1=labels.cpu().numpy(), classes=np.array(names))
        atomic_write(args.out, lambda f: np.savez(f, **arrays))
        shutil.rmtree(partial)


def features(model, labels, args, on_step):
    """Draw chains and return c of their last images, [N, refs tokens_per_image, width]."""
    chain = None
    if args.refs > 1:
        noise_sampler = per_image_noise(args.seed, range(len(labels)))
        chain = model.sample(labels, args.refs - 1, noise_sampler=noise_sampler, on_step=on_step)
    return model.encode(labels, chain)


def decode_parts(model, vae, parts, args, on_step):
    """Decode each condition of the list `parts` with the same noise (Figures 1 and 5).

    Guidance is that of the last image, against the null class without references.
    Returns uint8 images [N, len(parts), H, W, 3].
    """
    N = len(parts[0])
    device = parts[0].device
    settings = {k: v for k, v in model.sampling.items() if k != "null_refs"}
    if isinstance(settings["cfg"], list):
        settings["cfg"] = settings["cfg"][-1]
    null = torch.full((N,), model.config.num_classes, device=device)
    c_null = None if settings["cfg"] == 1 else model.encode(null)
    images = []
    for c in parts:
        noise_sampler = per_image_noise(args.seed, range(N))
        noise = noise_sampler(torch.empty(N, *model.config.latent_shape, device=device))
        settings.update(noise_sampler=noise_sampler, on_step=on_step)
        images.append(latents_to_images(vae, model.decode(c, noise, c_null, **settings)))
    return np.stack(images, axis=1)


def draw_picture(model, vae, labels, names, args):
    """Draw the images and write them as one PNG with the names of its rows and columns."""
    tokens = model.config.tokens_per_image * args.refs
    bar = tqdm(unit="step")
    rows = np.repeat(names, args.n)
    if args.fuse:
        a, b = (features(model, y, args, bar.update) for y in labels.chunk(2))
        fused = torch.cat([a[:, : tokens // 2], b[:, tokens // 2 :]], dim=1)
        images = decode_parts(model, vae, [a, b, fused], args, bar.update)
        rows = []
        heads = [*names, "fused"]
    elif args.features:
        if max(args.features) > tokens:
            raise UserError(f"--features: the last image is decoded from {tokens}; give up to that")
        c = features(model, labels, args, bar.update)
        parts = [c[:, :k] for k in args.features]
        images = decode_parts(model, vae, parts, args, bar.update)
        heads = [f"first {k}" for k in args.features]
    else:
        size = args.batch_size
        batches = enumerate(labels.split(size))
        images = [draw(model, vae, y, i * size, args, bar.update) for i, y in batches]
        images = np.concatenate(images)
        heads = [f"image {k}" for k in range(args.refs)]
    columns = images.shape[1]
    if columns == 1:  # the images of a class in a row, instead of those of a chain
        columns = args.n
        rows = names
        heads = []
    save_grid(images.reshape(-1, *images.shape[2:]), args.out, columns, rows, heads)


def main():
    args = parse()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype)
    model, vae = load(args, device, dtype)
    classes = choose_classes(args, model)
    names = model.info.get("classes") or [str(k) for k in range(model.config.num_classes)]
    chosen = [names[k] for k in classes]
    labels = torch.tensor(classes, device=device)
    if args.num:
        if args.num % len(classes):
            raise UserError(f"--num {args.num}: must be a multiple of the {len(classes)} classes")
        labels = labels.repeat(args.num // len(classes))
    else:
        labels = labels.repeat_interleave(args.n)
    if args.compile:
        model.decoder = torch.compile(model.decoder)
        vae.decoder = torch.compile(vae.decoder)
    with torch.inference_mode(), autocast(device, dtype):
        if args.out.suffix == ".npz":
            write_npz(model, vae, labels, names, args)
        else:
            draw_picture(model, vae, labels, chosen, args)
    if RANK == 0:
        settings = ", ".join(f"{k} {v}" for k, v in {"refs": args.refs, **model.sampling}.items())
        tqdm.write(f"wrote {args.out} ({shorten(chosen)}; {settings})")


if __name__ == "__main__":
    run_main(main)
