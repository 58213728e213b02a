"""Stage 3: draw images of classes (Algorithms 1 and 2, Appendix C).

python sample.py --class 1 --refs 4                    the bundled model: trousers, the last images of chains of 4
python sample.py --class trouser bag --show-chain      every image of the chain, one chain a row (Figure 2)
python sample.py --pretrained B-mrar --class 207 360   the authors' weights, fetched once, at their published settings
python sample.py --fuse trouser bag                    features of two classes in one image (Figures 1 and 5)
python sample.py --features 8 16 32 64                 the same noise, decoded from the first features alone (Figure 1)
python sample.py --class bag --references a.png b.png  chains that start with images of yours
torchrun --nproc_per_node 8 -- sample.py --num 50000 --ckpt CKPT --out samples.npz      balanced classes, for fid.py
"""

import argparse
import datetime
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import load_checkpoint, sampling_settings
from vae import DEMO_MODEL, DEMO_VAE, RANK, WORLD, atomic_write, autocast, bounded, cast_weights, center_crop
from vae import class_index, fetch_released, from_uint8, keep_settings, latents_to_images, load_vae, per_image_noise
from vae import pick_device, pick_dtype, read_image, run_main, save_grid, sha256_prefix, shorten


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, bounded(int, 1)
    add("--class", nargs="+", dest="classes", metavar="CLASS", help="indices or names (default: ten; with --num, all)")
    add("--n", type=count, default=8, help="images of each class (default: 8)")
    mode, weights = (parser.add_mutually_exclusive_group().add_argument for _ in range(2))
    mode("--num", type=count, help="images in all, the classes in turn, written to an .npz")
    add("--refs", type=count, help="images in the chain; the last is the result (default: the model's)")
    mode("--show-chain", action="store_true", help="draw every image of each chain, one chain a row")
    mode("--fuse", nargs=2, metavar=("A", "B"), help="columns A, B, and A's first half of features with B's second")
    mode("--features", nargs="+", type=count, metavar="K", help="columns decoded from the first K features")
    add("--references", nargs="+", metavar="IMAGE", help="images that start every chain, cropped as in training")
    setting = parser.add_argument_group("sampling (default: the model's settings in model.SAMPLING)").add_argument
    setting("--steps", type=count, help="of the sampler, for each image")
    setting("--cfg", nargs="+", type=bounded(float, 0), help="guidance scale, 1 = none; one, or one for each image")
    setting("--cfg-below", type=bounded(float, 0, 1), help="guide where t, 1 = noise, is at most this")
    setting("--null-refs", action=argparse.BooleanOptionalAction, help="guide against null with the references")
    setting("--s1", type=bounded(float, 0), help="scale of the drift, Eq. 18")
    setting("--s2", type=bounded(float, 0), help="scale of the noise, Eq. 18")
    setting("--sampler", choices=["euler-maruyama", "adams-bashforth"], help="the paper's, or one without noise")
    add("--seed", type=bounded(int, 0), default=0, help="image i is a function of the seed and i (default: 0)")
    add("--batch-size", type=count, default=64, help="images drawn at once (default: 64)")
    weights("--ckpt", help="model: a run's folder, ema.pt, last.pt, or a released file (default: the bundled model)")
    weights("--pretrained", choices="B L H B-mrar L-mrar H-mrar L-512".split(), help="the authors' weights and VAE")
    add("--vae", help="VAE that made the model's latents (default: vae.pt beside the model, else the bundled one)")
    add("--out", help="F.png, or F.npz: arr_0 images, arr_1 labels (default: runs/samples.png, with --num .npz)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of autocast (default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: with --num on CUDA)")
    args = parser.parse_args()
    args.out = args.out or ("runs/samples.npz" if args.num else "runs/samples.png")
    if args.fuse and args.classes:
        raise ValueError("--fuse names the classes; leave out --class")
    if args.references and (args.fuse or args.features):
        raise ValueError("--references: start chains that are drawn whole; leave out --fuse and --features")
    columns = args.show_chain or args.fuse or args.features
    suffixes = [".png"] if columns else [".npz"] if args.num or WORLD > 1 else [".png", ".npz"]
    if Path(args.out).suffix not in suffixes:
        raise ValueError(f"--out {args.out}: must end in {' or '.join(suffixes)} here")
    if args.out.endswith(".npz") and Path(args.out).exists():
        raise ValueError(f"--out {args.out}: is there already; remove it or give another")
    return args


def load(args, device, dtype):
    """(model, vae), as --pretrained or --ckpt and --vae name them; resolves args.refs and args.sampling."""
    if args.pretrained:
        args.ckpt, args.vae = fetch_released(args.pretrained), args.vae or fetch_released("vae")
    args.ckpt = Path(args.ckpt or DEMO_MODEL)
    args.ckpt = args.ckpt / "ema.pt" if args.ckpt.is_dir() else args.ckpt
    model = load_checkpoint(args.ckpt, device)
    beside = args.ckpt.parent / "vae.pt"
    vae = load_vae(args.vae or (beside if beside.exists() else DEMO_VAE), device)
    same_vae = vae.digest == model.info.get("vae_digest", vae.digest)  # released files do not name theirs
    if not same_vae or vae.z_channels != model.config.latent_channels:
        raise ValueError(f"--vae {vae.path}: not the VAE of this model's latents; give that one")
    args.refs = args.refs or model.config.refs
    if not len(args.references or []) < args.refs <= model.config.refs:
        given = f"--refs {args.refs}, {len(args.references or [])} --references"
        raise ValueError(f"{given}: this model draws chains of 1 to {model.config.refs} images, the last of them new")
    args.cfg = args.cfg and (args.cfg if len(args.cfg) > 1 else args.cfg[0])
    given = {k: vars(args)[k] for k in ("steps", "cfg", "cfg_below", "null_refs", "s1", "s2", "sampler")}
    given = {k: v for k, v in given.items() if v is not None}
    args.sampling = dict(sampler="euler-maruyama") | sampling_settings(model.config) | given
    if args.sampling["sampler"] == "adams-bashforth" and {"s1", "s2"} & set(given):
        raise ValueError("--s1, --s2: this sampler has no noise to scale; add --sampler euler-maruyama --steps 25")
    return cast_weights(model, dtype), vae


def choose_labels(args, model):
    """The class of each image, and of --fuse both classes, from the flags."""
    names, num_classes = model.info.get("classes", []), model.config.num_classes
    flag, words = ("--fuse", args.fuse) if args.fuse else ("--class", args.classes or [])
    classes = [class_index(flag, word, names, num_classes) for word in words]
    classes = classes or list(range(num_classes if args.num else min(10, num_classes)))
    if args.num and args.num % len(classes):
        raise ValueError(f"--num {args.num}: must be a multiple of the {len(classes)} classes")
    labels = classes * (args.num // len(classes)) if args.num else [k for k in classes for _ in range(args.n)]
    return labels, [names[k] if names else str(k) for k in classes]


def count_steps(model, total):
    """Progress bar in sampler steps; the two decoder calls of a guided step share one tensor t and count once."""
    bar, last = tqdm(total=total, unit="step", disable=RANK > 0), [None]

    def after_call(decoder, inputs, velocity):
        bar.update(inputs[1] is not last[0])
        last[0] = inputs[1]

    model.decoder.register_forward_hook(after_call)


def draw_chains(model, vae, labels, args, device, batches=None):
    """Yield (b, chains uint8 [B, refs, H, W, 3]) of batch b of `labels` [N], for all batches or those given.

    Batches are cut by index: what is in one depends on neither the number of processes nor what was drawn before.
    """
    size, references = args.batch_size, None
    batches = range(-(-len(labels) // size)) if batches is None else batches
    if args.references:  # the posterior means, of images cropped as in training
        crops = [center_crop(read_image(path), vae.factor * model.config.latent_size) for path in args.references]
        mean, _ = vae.encode(from_uint8(np.stack(crops)).to(device))
        references = (mean.float() * vae.scale).expand(size, -1, -1, -1, -1)
    count_steps(model, len(batches) * (args.refs - len(args.references or [])) * args.sampling["steps"])
    for b in batches:
        batch = labels[b * size : (b + 1) * size]
        n = len(batch)
        y = torch.tensor(batch + batch[-1:] * (size - n), device=device)  # full: another size would compile anew
        randn = per_image_noise(args.seed, range(b * size, (b + 1) * size), device)
        chain = model.sample(y, args.refs, None, randn, references, **args.sampling)[:n]
        chain = chain if args.show_chain else chain[:, -1:]
        images = latents_to_images(vae, chain.flatten(0, 1))
        yield b, images.reshape(*chain.shape[:2], *images.shape[1:])


def write_npz(model, vae, labels, args, device):
    """Draw the last image of each chain into args.out, ADM's arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N].

    Batch b is a file in OUT.partial, drawn by rank b % WORLD_SIZE; run again to resume.
    """
    partial, num_batches = Path(f"{args.out}.partial"), -(-len(labels) // args.batch_size)
    settings = {k: vars(args)[k] for k in ("seed", "batch_size", "refs", "dtype")}
    settings |= dict(args.sampling, labels=labels, vae=vae.digest)
    settings["references"] = [sha256_prefix(Path(path).read_bytes()) for path in args.references or []]
    settings["model"] = [args.ckpt.stat().st_size, args.ckpt.stat().st_mtime_ns]
    if RANK == 0:
        keep_settings(partial / "run.json", settings)
    if WORLD > 1:
        dist.barrier()  # the others do not start on a set of other settings
    files = [partial / f"{b:06d}.npy" for b in range(num_batches)]
    mine = [b for b in range(RANK, num_batches, WORLD) if not files[b].exists()]
    for b, chains in draw_chains(model, vae, labels, args, device, mine):
        atomic_write(files[b], lambda f: np.save(f, chains[:, -1]))
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        images = np.concatenate([np.load(file) for file in files])
        atomic_write(args.out, lambda f: np.savez(f, arr_0=images, arr_1=np.array(labels, np.int64)))
        shutil.rmtree(partial)


def decode_conditions(model, vae, labels, parts, args, device):
    """Figures 1 and 5: decode parts of the features with the same noise -> uint8 images [N, len(parts), H, W, 3].

    labels  lists of N classes: c of each is that of the last image of a chain drawn for it
    parts   functions of the list of those c that return the c to decode; guidance is against null without references
    """
    N, conditions, images, settings = len(labels[0]), [], [], dict(args.sampling)
    cfg = np.ravel(settings.pop("cfg"))[-1].item()  # of the last image
    settings.pop("null_refs", None)
    count_steps(model, (len(labels) * (args.refs - 1) + len(parts)) * settings["steps"])
    for y in labels:
        y, randn = torch.tensor(y, device=device), per_image_noise(args.seed, range(N), device)
        chain = model.sample(y, args.refs - 1, noise_sampler=randn, **args.sampling) if args.refs > 1 else None
        conditions.append(model.encode(y, chain))
    c_null = model.encode(torch.full_like(y, model.config.num_classes)) if cfg != 1 else None
    for part in parts:
        randn = per_image_noise(args.seed, range(N), device)
        noise = randn(torch.empty(N, *model.config.latent_shape))
        x = model.decode(part(conditions), noise, c_null, cfg, noise_sampler=randn, **settings)
        images.append(latents_to_images(vae, x))
    return np.stack(images, axis=1)


def draw_picture(model, vae, labels, names, args, device):
    """Draw the images and write them as one PNG with the names of its rows and columns."""
    tokens, each = model.config.tokens_per_image * args.refs, np.repeat(names, args.n)
    if args.fuse:
        half, a, b = tokens // 2, labels[: args.n], labels[args.n :]
        parts = [lambda c: c[0], lambda c: c[1], lambda c: torch.cat([c[0][:, :half], c[1][:, half:]], dim=1)]
        images = decode_conditions(model, vae, [a, b], parts, args, device)
        rows, heads = (), [*names, "fused"]
    elif args.features:
        if max(args.features) > tokens:
            raise ValueError(f"--features: the last image is decoded from {tokens}; give numbers up to that")
        parts = [lambda c, k=k: c[0][:, :k] for k in args.features]
        images = decode_conditions(model, vae, [labels], parts, args, device)
        rows, heads = each, [f"first {k}" for k in args.features]
    else:
        images = np.concatenate([chains for _, chains in draw_chains(model, vae, labels, args, device)])
        rows, heads = (each, [f"image {k}" for k in range(args.refs)]) if args.show_chain else (names, ())
    columns = images.shape[1] if len(heads) else args.n
    save_grid(images.reshape(-1, *images.shape[2:]), args.out, columns, rows, heads)


def main():
    args = parse()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype)
    if WORLD > 1:  # for its barriers alone
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    model, vae = load(args, device, dtype)
    labels, names = choose_labels(args, model)
    args.batch_size = min(args.batch_size, len(labels))
    if args.compile or args.compile is None and args.num and device.type == "cuda":
        model.decoder, vae.decoder = torch.compile(model.decoder), torch.compile(vae.decoder)
    with torch.inference_mode(), autocast(device, dtype):
        if args.out.endswith(".npz"):
            write_npz(model, vae, labels, args, device)
        else:
            draw_picture(model, vae, labels, names, args, device)
    if RANK == 0:
        settings = ", ".join(f"{k} {v}" for k, v in {"refs": args.refs, **args.sampling}.items())
        tqdm.write(f"wrote {args.out} ({shorten(names)}; {settings})")


if __name__ == "__main__":
    run_main(main)
