"""Draw the attention masks (Figure 3), the sampler's path, and what the semantic features hold:
Figures 1 and 5 of the paper, and S of Eq. 14.

    python demo/figures.py masks
        columns: chains of 1, 4 and 16 images; no model is loaded
    python demo/figures.py fusion --class trouser bag
        columns: A, B, and half of the features of each (Figure 5)
    python demo/figures.py features --class 0 1 5 8 9
        columns: the first features alone (Figure 1)
    python demo/figures.py steps --class trouser bag
        columns: x_t at each step of the sampler, from noise to the image
    python demo/figures.py similarity --class trouser
        S of one class: -1 blue, 0 white, 1 red; right: of its features less their mean over (up to
        64) classes and positions

All images of a row start from the same noise. Guidance is that of the last image, against the null
class without references.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import DEMO_MODEL, SIZES, UserError, atomic_write, attention_masks  # noqa: E402
from model import bounded, checkpoint_path, class_index, load_checkpoint, make_parser  # noqa: E402
from model import per_image_noise, pick_device, run_main  # noqa: E402
from vae import DEMO_VAE, latents_to_images, load_vae, save_grid  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402

from diversity import chain_features, similarity  # noqa: E402


def encode_last(model, labels, seed):
    """Draw the references of the last images; return its c, [N, cond_tokens, width]."""
    noise_sampler = per_image_noise(seed, range(len(labels)))
    chain = model.sample(labels, model.config.refs - 1, noise_sampler=noise_sampler)
    return model.encode(labels, chain)


def decode_last(model, c, seed, on_step=None):
    """Decode conditions c [N, K, width], any K; returns latents [N, C, H, W]."""
    cfg = np.ravel(model.sampling.cfg)[-1].item()
    null = torch.full((len(c),), model.config.num_classes, device=c.device)
    noise_sampler = per_image_noise(seed, range(len(c)))
    noise = noise_sampler(torch.empty(len(c), *model.config.latent_shape, device=c.device))
    c_null = model.encode(null)
    return model.decode(c, noise, c_null, noise_sampler, on_step, cfg=cfg)


def fuse(model, labels, seed):
    """c of class A, of class B, and the first half of A's with the second half of B's.

    labels  int64 [2 N]: those of A, then those of B
    """
    a, b = (encode_last(model, y, seed) for y in labels.chunk(2))
    half = a.shape[1] // 2
    return a, b, torch.cat([a[:, :half], b[:, half:]], dim=1)


def heatmap(S, refs):
    """Picture of S [K, K], at least 512 px; black lines between the images."""
    zoom = -(-512 // len(S))
    grey = Image.fromarray(((S + 1) * 127.5).round().byte().numpy())
    picture = ImageOps.colorize(grey, black=(30, 60, 160), mid="white", white=(180, 20, 30))
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for k in range(1, refs):
        line = k * picture.width // refs
        draw.line([line, 0, line, picture.width], "black")
        draw.line([0, line, picture.width, line], "black")
    return picture


def draw_similarity(features, of_classes, refs, path):
    """Write S of the features [1, K, D] of a class; right: less the mean of those of all classes
    [N, K, D]."""
    centred = features - of_classes.mean((0, 1))
    maps = [heatmap(similarity(x)[0], refs) for x in (features, centred)]
    side = maps[0].width
    picture = Image.new("RGB", (2 * side + 16, side), "white")
    picture.paste(maps[0], (0, 0))
    picture.paste(maps[1], (side + 16, 0))
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def draw_mask(picture, left, top, title, mask, blocks, shades):
    """Draw a mask [N, N] on a picture, 3 pixels for 4 tokens: a row per query, a column per key.

    blocks  {label of its rows: tokens} of each block
    shades  color of the keys of each block where a query may attend; the rest is light grey
    """
    colors = np.repeat(shades[: len(blocks)], list(blocks.values()), axis=0)
    pixels = np.where(mask.numpy()[..., None], colors, 235).astype(np.uint8)
    side = 3 * len(mask) // 4
    tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(tile, (left, top))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    draw.text((left, top - 5), title, "black", font, "ls")
    edge = 0
    for label, tokens in blocks.items():
        height = 3 * tokens // 4
        draw.text((left - 4, top + edge + height / 2), label, "black", font, "rm")
        edge += height
        draw.line([left + edge, top, left + edge, top + side], "white")
        draw.line([left, top + edge, left + side, top + edge], "white")


def draw_masks(lengths, path):
    """Write the masks of size B for chains of these lengths: above ar, below cross."""
    picture = Image.new("RGB", (314 * len(lengths), 490), "white")
    grey, dark, light = (120, 120, 120), (31, 95, 168), (128, 178, 226)
    for column, refs in enumerate(lengths):
        config = dataclasses.replace(SIZES["B"], refs=refs)
        ar, cross = attention_masks(config)
        tokens = config.tokens_per_image
        shades = [grey] + [dark, light] * refs
        left = 314 * column + 70
        blocks = {"class": config.class_tokens, "mask -> c_0": tokens}
        blocks.update({f"x_{k - 1} -> c_{k}": tokens for k in range(1, refs)})
        draw_mask(picture, left, 22, f"chain of {refs}: AR Transformer", ar, blocks, shades)
        # Below the tokens that write c: the outputs of the class tokens are dropped.
        left += 3 * config.class_tokens // 4
        blocks = {f"image {k}": tokens for k in range(refs)}
        cross = cross.repeat_interleave(tokens, dim=0)
        title = f"decoder: keys of c_0 ... c_{refs - 1}" if refs > 1 else "decoder: keys of c_0"
        draw_mask(picture, left, 292, title, cross, blocks, shades[1:])
    picture = picture.quantize(64)
    atomic_write(path, lambda f: picture.save(f, "PNG", optimize=True))


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add("figure", choices=["fusion", "features", "steps", "similarity", "masks"])
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
    if args.figure == "masks":
        draw_masks([1, 4, 16], args.out)
        print(f"wrote {args.out}")
        return
    device = pick_device(args.device)
    path = checkpoint_path(args.ckpt)
    model = load_checkpoint(path, device)
    model.sampling = model.sampling.replace(steps=args.steps)
    classes = [class_index(word, model) for word in args.classes]
    labels = torch.tensor(classes, device=device)
    if args.figure == "similarity":
        trained = torch.tensor(model.info["counts"], device=device).nonzero()[:64, 0]
        features = chain_features(model, torch.cat([labels[:1], trained]), args.seed)
        draw_similarity(features[:1], features[1:], model.config.refs, args.out)
    else:
        beside = path.parent / "vae.pt"
        vae = load_vae(beside if beside.exists() else DEMO_VAE, device, model)
        labels = labels.repeat_interleave(args.n)
        if args.figure == "fusion":
            conditions = fuse(model, labels, args.seed)
        else:
            c = encode_last(model, labels, args.seed)
            counts = args.counts or [c.shape[1] // k for k in (8, 4, 2, 1)]
            if max(counts) > c.shape[1]:
                raise UserError(f"--counts: the model has {c.shape[1]} features, not more")
            conditions = [c[:, :k] for k in counts]
        if args.figure == "steps":
            columns = []
            x = decode_last(model, c, args.seed, lambda t, x_t: columns.append(x_t))
            columns.append(x)
        else:
            columns = [decode_last(model, c, args.seed) for c in conditions]
        images = [latents_to_images(vae, x) for x in columns]
        save_grid(np.stack(images, axis=1), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
