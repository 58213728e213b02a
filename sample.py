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
    mode.add_argument("--fuse", nargs=2, help="columns A, B, and half of the features of each")
    mode.add_argument("--features", nargs="+", type=count, help="columns of the first K features")
    add("--refs", type=count, help="images in the chain, the last is the result (default: all)")
    group = parser.add_argument_group("sampling (default: the settings that the model carries)")
    setting = group.add_argument
    setting("--steps", type=count, help="of the sampler, for each image")
    setting(
        "--cfg",
        nargs="+",
        type=bounded(float, 0),
        help="guidance scale, one or one per image; 1 is none, 0 with --cfg-below 1 draws without "
        "a class",
    )
    setting("--cfg-below", type=bounded(float, 0, 1), help="guide at t (1: noise) up to this")
    setting(
        "--null-refs",
        action=argparse.BooleanOptionalAction,
        help="the null class sees the references too",
    )
    setting("--s1", type=bounded(float, 0), help="scale of the drift, Eq. 18")
    setting("--s2", type=bounded(float, 0), help="scale of the noise, Eq. 18")
    samplers = ["euler-maruyama", "adams-bashforth"]
    setting("--sampler", choices=samplers, help="the paper's, or one without noise")
    add("--seed", type=bounded(int, 0), default=0, help="image i depends on it and i (default: 0)")
    add("--batch-size", type=count, default=64, help="images drawn at once (default: 64)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", default=DEMO_MODEL, help="run, or file (default: the bundled)")
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
    model.info["written"] = path.stat().st_mtime_ns
    args.refs = args.refs or model.config.refs
    given = {name: getattr(args, name) for name in model.sampling}
    if args.cfg and len(args.cfg) == 1:
        given["cfg"] = args.cfg[0]
    elif args.cfg and len(args.cfg) != args.refs:
        raise UserError(f"--cfg: give one number, or one for each of {args.refs} images")
    model.sampling = model.merge_settings(given)
    return cast_weights(model, args.dtype), load_vae(args.vae or vae_path, device, model)


def choose_classes(args, model):
    """Indices of the classes to draw, and of --fuse both classes."""
    flag = "--fuse" if args.fuse else "--class"
    words = args.fuse or args.classes
    if words:
        return [class_index(flag, word, model) for word in words]
    classes = [k for k in range(model.config.num_classes) if k not in model.info["empty"]]
    return classes if args.num else classes[:10]


def draw(model, vae, labels, first, args, on_step=None):
    """Draw the chains of `labels`, images `first` ... of the seed.

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
    start_parts(partial, dict(vars(args), written=model.info["written"], vae_digest=vae.digest))
    for i in tqdm(mine, unit="batch", disable=RANK > 0):
        images = draw(model, vae, batches[i], i * args.batch_size, args)
        atomic_write(paths[i], lambda f: np.save(f, images))
    if RANK == 0:
        wait_for(paths)
        images = np.concatenate([np.load(path) for path in paths])
        names = np.array(model.info["classes"])
        arrays = dict(arr_0=images, arr_1=labels.cpu().numpy(), classes=names)
        atomic_write(args.out, lambda f: np.savez(f, **arrays))
        shutil.rmtree(partial)


def encode_last(model, labels, args, on_step):
    """Draw the references of the last images; return its c, [N, refs tokens_per_image, width]."""
    noise_sampler = per_image_noise(args.seed, range(len(labels)))
    chain = model.sample(labels, args.refs - 1, noise_sampler=noise_sampler, on_step=on_step)
    return model.encode(labels, chain)


def decode_last(model, vae, c, args, on_step):
    """Decode conditions c [N, K, width], any K, always from the same noise (Figures 1 and 5).

    Guidance is that of the last image, against the null class without references.
    Returns uint8 images [N, H, W, 3].
    """
    settings = dict(model.sampling, on_step=on_step)
    del settings["null_refs"]
    settings["cfg"] = np.ravel(settings["cfg"])[-1].item()
    null = torch.full((len(c),), model.config.num_classes, device=c.device)
    noise_sampler = per_image_noise(args.seed, range(len(c)))
    noise = noise_sampler(torch.empty(len(c), *model.config.latent_shape, device=c.device))
    c_null = model.encode(null)
    latents = model.decode(c, noise, c_null, noise_sampler=noise_sampler, **settings)
    return latents_to_images(vae, latents)


def conditions(model, labels, names, args, on_step):
    """{name of a column: c} of --features (Figure 1) or --fuse (Figure 5)."""
    if args.features:
        most = model.config.tokens_per_image * args.refs
        if max(args.features) > most:
            raise UserError(f"--features: the last image is decoded from {most}, not more")
        c = encode_last(model, labels, args, on_step)
        return {f"first {k}": c[:, :k] for k in args.features}
    a, b = (encode_last(model, y, args, on_step) for y in labels.chunk(2))
    half = a.shape[1] // 2
    fused = torch.cat([a[:, :half], b[:, half:]], dim=1)
    return {names[0]: a, names[1]: b, "fused": fused}


def draw_picture(model, vae, labels, names, args):
    """Draw the images and write them as one PNG with the names of its rows and columns."""
    on_step = tqdm(unit="step").update
    rows = np.repeat(names, args.n)
    if args.fuse or args.features:
        columns = conditions(model, labels, names, args, on_step)
        images = [decode_last(model, vae, c, args, on_step) for c in columns.values()]
        save_grid(np.stack(images, axis=1), args.out, [] if args.fuse else rows, columns)
        return
    size = args.batch_size
    batches = enumerate(labels.split(size))
    images = np.concatenate([draw(model, vae, y, i * size, args, on_step) for i, y in batches])
    if args.show_chain:
        save_grid(images, args.out, rows, [f"image {k}" for k in range(args.refs)])
    else:  # the images of a class in a row
        save_grid(images.reshape(-1, args.n, *images.shape[1:]), args.out, names)


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
    if args.compile:
        model.decoder = torch.compile(model.decoder)
        vae.decoder = torch.compile(vae.decoder)
    with torch.inference_mode(), autocast(device, args.dtype):
        if args.out.suffix == ".npz":
            write_npz(model, vae, labels, args)
        else:
            draw_picture(model, vae, labels, names, args)
    if RANK == 0:
        settings = ", ".join(f"{k} {v}" for k, v in model.sampling.items())
        tqdm.write(f"wrote {args.out} ({shorten(names)}; refs {args.refs}, {settings})")


if __name__ == "__main__":
    run_main(main)
