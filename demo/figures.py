"""Draw what the semantic features hold: Figures 1 and 5 of the paper, and S of Eq. 14.

    python demo/figures.py fusion --class trouser bag
        columns: A, B, and half of the features of each (Figure 5)
    python demo/figures.py features --class 0 1 5 8 9
        columns: the first features alone (Figure 1)
    python demo/figures.py similarity --class trouser
        S of one class: -1 blue, 0 white, 1 red

All images of a row start from the same noise. Guidance is that of the last image, against the null
class without references.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, UserError, atomic_write, bounded, checkpoint_path  # noqa: E402
from model import class_index, load_checkpoint, make_parser, per_image_noise  # noqa: E402
from model import pick_device, run_main  # noqa: E402
from vae import DEMO_VAE, latents_to_images, load_vae, save_grid  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageOps  # noqa: E402

from diversity import chain_features, similarity  # noqa: E402


def encode_last(model, labels, seed):
    """Draw the references of the last images; return its c, [N, cond_tokens, width]."""
    noise_sampler = per_image_noise(seed, range(len(labels)))
    chain = model.sample(labels, model.config.refs - 1, noise_sampler=noise_sampler)
    return model.encode(labels, chain)


def decode_last(model, vae, c, seed):
    """Decode conditions c [N, K, width], any K; returns uint8 images [N, H, W, 3]."""
    cfg = np.ravel(model.sampling.cfg)[-1].item()
    null = torch.full((len(c),), model.config.num_classes, device=c.device)
    noise_sampler = per_image_noise(seed, range(len(c)))
    noise = noise_sampler(torch.empty(len(c), *model.config.latent_shape, device=c.device))
    c_null = model.encode(null)
    latents = model.decode(c, noise, c_null, noise_sampler, cfg=cfg)
    return latents_to_images(vae, latents)


def fuse(model, labels, seed):
    """c of class A, of class B, and the first half of A's with the second half of B's.

    labels  int64 [2 N]: those of A, then those of B
    """
    a, b = (encode_last(model, y, seed) for y in labels.chunk(2))
    half = a.shape[1] // 2
    return a, b, torch.cat([a[:, :half], b[:, half:]], dim=1)


def draw_heatmap(S, refs, path):
    """Write S [K, K] as a PNG of at least 512 px; black lines between the images."""
    zoom = -(-512 // len(S))
    grey = Image.fromarray(((S + 1) * 127.5).round().byte().numpy())
    picture = ImageOps.colorize(grey, black=(30, 60, 160), mid="white", white=(180, 20, 30))
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for k in range(1, refs):
        line = k * picture.width // refs
        draw.line([line, 0, line, picture.width], "black")
        draw.line([0, line, picture.width, line], "black")
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add("figure", choices=["fusion", "features", "similarity"])
    add(
        "--class",
        nargs="+",
        dest="classes",
        metavar="CLASS",
        default=["0", "1"],
        help="indices or names (default: 0 1); similarity: the first",
    )
    add("--counts", nargs="+", type=count, help="of features (default: an eighth to all)")
    add("--n", type=count, default=4, help="images of each class (default: 4)")
    add("--seed", type=bounded(int, 0), default=0, help="(default: 0)")
    add("--steps", type=count, help="of the sampler (default: the model's)")
    add("--ckpt", default=DEMO_MODEL, help="run, or file (default: the bundled model)")
    add("--out", help="picture to write (default: runs/FIGURE.png)")
    args = parser.parse_args()
    if args.figure == "fusion" and len(args.classes) != 2:
        raise UserError("--class: fusion is of two classes")
    args.out = args.out or f"runs/{args.figure}.png"
    return args


@torch.inference_mode()
def main():
    args = parse()
    device = pick_device(args.device)
    path = checkpoint_path(args.ckpt)
    model = load_checkpoint(path, device)
    model.sampling = model.sampling.replace(steps=args.steps)
    classes = [class_index("--class", word, model) for word in args.classes]
    labels = torch.tensor(classes, device=device)
    if args.figure == "similarity":
        S = similarity(chain_features(model, labels[:1], args.seed))[0]
        draw_heatmap(S, model.config.refs, args.out)
    else:
        beside = path.parent / "vae.pt"
        vae = load_vae(beside if beside.exists() else DEMO_VAE, device, model)
        labels = labels.repeat_interleave(args.n)
        if args.figure == "fusion":
            columns = fuse(model, labels, args.seed)
        else:
            c = encode_last(model, labels, args.seed)
            counts = args.counts or [c.shape[1] // k for k in (8, 4, 2, 1)]
            if max(counts) > c.shape[1]:
                raise UserError(f"--counts: the model has {c.shape[1]} features, not more")
            columns = [c[:, :k] for k in counts]
        images = [decode_last(model, vae, c, args.seed) for c in columns]
        save_grid(np.stack(images, axis=1), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
