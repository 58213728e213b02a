"""Stage 4: how good are the samples? FID, Inception Score, precision and recall (the measures of Table 1).

    python fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz     against ADM's reference batch, as the paper does
    python fid.py --samples train/ --image-size 256 --save-stats stats.npz        statistics of a source, once; then --ref stats.npz
    python fid.py --train-net features.pt --data SRC                              a small network for images that are not ImageNet's
    python fid.py --samples samples.npz --ref SRC --net features.pt               distances in that network's features (not FID)

Samples and reference: a folder of images, or an .npz of uint8 images (arr_0 or images). Under torchrun the images are split over the processes.
"""
import argparse
import datetime
import hashlib
import io
import json
import os
import sys
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from vae import DEMO_DATA, IMAGES, center_crop, check_out, fetch, image_files, open_source, pick_device, positive, read_image, run, whole, write_whole

INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


# ---------------------------------------------------------------------------------------------- the measures


def statistics(features, desc="statistics", block=4096):
    """Mean [D] and unbiased covariance [D, D] (N - 1, as np.cov), float64, of features [N, D] of any float type.

    Block by block by the update of Chan, Golub and LeVeque (1983), so that no float64 copy of the features is needed, nor is
    anything lost to cancellation where the mean is large beside the spread.
    """
    n, mean, m2 = 0, torch.zeros(features.shape[1], dtype=torch.float64), torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in tqdm(features.split(block), desc=desc, unit="block", disable=len(features) <= block):
        x = part.double()
        b, center = len(x), x.mean(0)
        x -= center
        delta = center - mean
        m2.addmm_(x.T, x).add_(torch.outer(delta, delta), alpha=n * b / (n + b))
        mean += delta * (b / (n + b))
        n += b
    return mean, m2 / (n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017); mu [D], sigma [D, D] symmetric, float64 tensors.

    The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2), that is, the squared singular values of
    S1^(1/2) S2^(1/2). Singular values, unlike the square roots of eigenvalues near 0, keep full precision when the covariances
    are singular (fewer images than features), so identical sets are at distance 0.
    """

    with tqdm(total=3, unit="decomposition", desc="Frechet distance", disable=len(mu1) < 1000) as bar:

        def half(sigma):  # [D, D], half @ half.T = sigma; rotating the symmetric root leaves the singular values alone
            values, vectors = torch.linalg.eigh(sigma)
            bar.update()
            return vectors * values.clamp_min(0).sqrt()

        cross = torch.linalg.svdvals(half(sigma1).T @ half(sigma2)).sum()
        bar.update()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp_min(0).item()


def inception_score(probabilities, splits=10):
    """exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016) of class probabilities [N, K]: mean and population std over `splits` parts.

    In torch-fidelity's order: shuffled by RandomState(2020), since samples come sorted by class, and a part has to hold all of them.
    """
    n = len(probabilities)
    shuffled = probabilities[torch.from_numpy(np.random.RandomState(2020).permutation(n))]
    scores = []
    for i in range(splits):
        p = shuffled[i * n // splits : (i + 1) * n // splits].double()
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # xlogy: 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples, reference, k=3, device="cpu"):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [N, D] and [M, D], N, M > k: shares in [0, 1].

    A set's manifold is the union of balls about its points, each reaching to its k-th nearest other point. Precision is the share of
    samples in the reference's manifold, recall the share of the reference in the samples'.
    """
    device = device if torch.device(device).type == "cuda" else "cpu"
    center = reference.mean(0, dtype=torch.float64)  # distances do not depend on it, their rounding error does
    a, b = (x.to(torch.float64, copy=True).sub_(center).to(device) for x in (samples, reference))
    slack = 1e-12 * max(x.square().sum(1).max() for x in (a, b))  # that error: copies of an image lie in each other's balls, of radius 0 or not

    def distances(x, y):  # (rows, |x|^2 + |y|^2 - 2 x.y [rows, len(y)]), block by block
        y2, step = y.square().sum(1), max(1, 2**24 // len(y))
        for i in range(0, len(x), step):
            rows = slice(i, min(i + step, len(x)))
            yield rows, torch.addmm(y2, x[rows], y.T, alpha=-2).add_(x[rows].square().sum(1, keepdim=True))
            bar.update(rows.stop - i)

    def radii(x):
        squares = torch.empty(len(x), dtype=x.dtype, device=device)
        for rows, d in distances(x, x):
            d[:, rows].fill_diagonal_(torch.inf)  # a point is not its own neighbour
            squares[rows] = d.topk(k, largest=False).values[:, -1]
        return squares + slack

    with tqdm(total=2 * len(a) + len(b), unit="row", desc="precision and recall") as bar:
        radii_a, radii_b = radii(a), radii(b)
        precise, recalled = 0, torch.zeros(len(b), dtype=torch.bool, device=device)
        for rows, d in distances(a, b):
            precise += (d <= radii_b).any(1).sum().item()
            recalled |= (d <= radii_a[rows, None]).any(0)
    return precise / len(a), recalled.double().mean().item()


# ---------------------------------------------------------------------------------------------- images

Images = namedtuple("Images", "path count size files key")  # size (H, W) of the first; files of a folder, or key: the array of an .npz


def npy_header(f):
    """(shape, dtype) of the .npy stream f, which is left at its first number."""
    version = np.lib.format.read_magic(f)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
    if fortran and len(shape) > 1:
        raise ValueError("an array is in Fortran order")
    return shape, dtype


def find_images(path):
    """Images of a folder (any depth, by sorted path) or an .npz; count 0 for an .npz without images. Raises ValueError if it is neither."""
    path = Path(path)
    if path.is_dir():
        files = image_files(path)
        if not files:
            raise ValueError(f"{path}: no images in this folder ({' '.join(IMAGES)})")
        return Images(path, len(files), read_sized(files[0]).shape[:2], files, None)
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path}: no such images; expected a folder of images, or an .npz of uint8 images (arr_0) or statistics (mu, sigma)")
    try:
        with zipfile.ZipFile(path) as z:
            names = [n.removesuffix(".npy") for n in z.namelist()]
            key = next((k for k in ("arr_0", "images") if k in names), None)
            if key is None:
                return Images(path, 0, None, None, None)
            with z.open(f"{key}.npy") as f:
                shape, dtype = npy_header(f)
    except Exception as e:  # zipfile, zlib and numpy raise a dozen types, depending on which byte is wrong
        raise ValueError(f"{path}: not a readable .npz ({type(e).__name__}: {e})") from None
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)) or 0 in shape:
        raise ValueError(f"{path}: images are {dtype} {shape}, expected uint8 [N, H, W, 3]")
    return Images(path, shape[0], shape[1:3], None, key)


def read_sized(path, size=None, crop=False):
    """uint8 [H, W, 3] of an image file, cropped by vae.center_crop if it is not of `size` (H, W) and `crop` allows it."""
    image = read_image(path)
    if size is None or image.size == size[::-1]:
        return np.asarray(image)
    if not crop:
        raise ValueError(f"{path}: is {image.height} x {image.width} px, others are {size[0]} x {size[1]}; --image-size N crops all of them to N x N")
    return center_crop(image, size[0])


def batches(images, size, crop, batch_size, rank=0, world=1):
    """Every world-th batch from number `rank` on, uint8 [<= batch_size, H, W, 3]. Images not of `size` (H, W) are cropped or padded as in training.

    An .npz is read front to back, never whole: 50,000 images of 256 px are 10 GB. Raises ValueError for an unreadable image.
    """
    starts = range(rank * batch_size, images.count, world * batch_size)
    if images.files:
        with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
            for i in starts:
                yield np.stack(list(pool.map(lambda f: read_sized(f, size, crop), images.files[i : i + batch_size])))
    elif images.size != size and max(images.size) <= size[0]:
        source = open_source(images.path, size[0])  # pads
        for i in starts:
            yield np.stack([source[j] for j in range(i, min(i + batch_size, images.count))])
    else:
        try:
            with zipfile.ZipFile(images.path) as z, z.open(f"{images.key}.npy") as f:
                shape, _ = npy_header(f)
                for i in range(0, images.count, batch_size):
                    n = min(batch_size, images.count - i)
                    rows = np.frombuffer(f.read(n * int(np.prod(shape[1:]))), np.uint8).reshape(n, *shape[1:3], -1)
                    if i not in starts:
                        continue
                    rows = np.broadcast_to(rows, (*rows.shape[:3], 3))
                    yield rows if images.size == size else np.stack([center_crop(Image.fromarray(row.copy()), size[0]) for row in rows])
        except Exception as e:
            raise ValueError(f"{images.path}: not a readable .npz ({type(e).__name__}: {e})") from None


def load_statistics(path, network):
    """(mu [D], sigma [D, D]) of an .npz, float64 tensors, or None if it has none. Raises ValueError if they are of another network."""
    try:
        with np.load(path, allow_pickle=False) as data:
            if "mu" not in data or "sigma" not in data:
                return None
            mu, sigma = (torch.from_numpy(data[k].astype(np.float64)) for k in ("mu", "sigma"))
            made_by = str(data["network"]) if "network" in data else network  # ADM's files do not say: Inception
    except Exception as e:
        raise ValueError(f"{path}: not a readable .npz ({type(e).__name__}: {e})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} are not the finite statistics [D], [D, D] of features")
    if made_by != network:
        raise ValueError(f"{path}: statistics of the features of another network; make them anew with --save-stats and this --net")
    return mu, sigma


# ---------------------------------------------------------------------------------------------- the network


def load_net(path, device, size):
    """The TorchScript network in eval mode and its number of features, tried on a black image of `size` (H, W). Runs the code in the file.

    Raises ValueError if it is no TorchScript file, or cannot be called as a Classifier (below) can.
    """
    if not Path(path).is_file():
        raise ValueError(f"--net {path}: no such file; --train-net makes one")
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"--net {path}: not a TorchScript file ({str(e).strip().splitlines()[0].split('. ')[0]})") from None
    try:
        with torch.inference_mode():
            image = torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)
            features, probabilities = net(image, return_features=True), net(image, no_output_bias=True)
    except RuntimeError as e:
        raise ValueError(f"--net {path}: needs net(x, return_features=True) and net(x, no_output_bias=True) for uint8 x [N, 3, H, W]: {str(e).strip().splitlines()[-1]}") from None
    if features.ndim != 2 or probabilities.ndim != 2:
        raise ValueError(f"--net {path}: gives features {list(features.shape)} and probabilities {list(probabilities.shape)} of an image, expected [1, D] and [1, K]")
    return net, features.shape[1]


def embed(net, images, size, crop, batch_size, device, classify):
    """Float32 [N, D] features and, with `classify`, [N, K] class probabilities beside them, of all images in order: on the CPU of rank 0, None elsewhere.

    Batch i is rank i % world's, and the last is filled up with black images: the network sees the same batches whatever the number of
    processes, so the numbers are the same. Raises ValueError for features that are not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch_size, rows = min(batch_size, images.count), []
    mine = batches(images, size, crop, batch_size, rank, world)
    bar = tqdm(total=images.count, unit="image", desc=f"features of {images.path}", disable=rank > 0)
    with bar, torch.inference_mode(), torch.jit.optimized_execution(False):  # else TorchScript spends its first calls on measuring itself
        for first in range(0, images.count, batch_size * world):
            batch = np.zeros((batch_size, *size, 3), np.uint8)
            found = next(mine, batch[:0])
            batch[: len(found)] = found
            x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
            out = net(x, return_features=True).float()
            if classify:  # the Inception file gives either, so twice the work
                out = torch.cat([out, net(x, no_output_bias=True).float()], dim=1)
            parts = [out]
            if world > 1:
                parts = [torch.empty_like(out) for _ in range(world)] if rank == 0 else None
                dist.gather(out, parts)
            if rank == 0:
                rows += [p.cpu() for p in parts]
            bar.update(min(batch_size * world, images.count - first))
    if rank > 0:
        return None
    rows = torch.cat(rows)[: images.count]
    if not rows.isfinite().all():
        raise ValueError(f"{images.path}: the network's answer to image {(~rows.isfinite()).any(1).nonzero()[0].item()} is not finite")
    return rows


class Conv(nn.Conv2d):
    """3 x 3, whose weights may be kept in float16: half the file, computed in float32."""

    def forward(self, x):
        return F.conv2d(x, self.weight.float(), None, padding=1)


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> class probabilities [N, K], or features [N, 64]. The call is the one of NVIDIA's Inception file; the head has no bias to leave out."""

    classes: List[str]

    def __init__(self, classes):
        super().__init__()
        self.classes, layers, cin = classes, [], 3
        for cout in (32, 32, 0, 64, 64, 0, 96):
            layers += [Conv(cin, cout, 3, bias=False), nn.BatchNorm2d(cout), nn.ReLU()] if cout else [nn.MaxPool2d(2)]
            cin = cout or cin
        self.trunk, self.features, self.head = nn.Sequential(*layers), nn.Linear(cin, 64), nn.Linear(64, len(classes), bias=False)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        x = x.float() / 127.5 - 1
        if x.shape[2] != 32 or x.shape[3] != 32:
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        features = self.features(self.trunk(x).mean((2, 3)))
        return features if return_features else self.head(features.relu()).softmax(1)


def train_net(path, data, steps, seed, device, batch_size=128, lr=4e-3):
    """Train a Classifier of an image source at 32 px and write it to `path` as TorchScript (about 0.3 MB): the --net for samples of such images.

    AdamW, learning rate up and down by straight lines, label smoothing 0.05, mirror images and shifts by up to 1 px. Every fifth image is
    held out to tell the accuracy on unseen ones. `seed` gives the same file again on the same machine.
    """
    source = open_source(data, 32)
    images = torch.from_numpy(np.stack([source[i] for i in tqdm(range(len(source)), desc=f"reading {data}", unit="image")]))  # [N, 32, 32, 3]
    labels, held = torch.from_numpy(source.labels), torch.arange(len(images)) % 5 == 0
    train_images, train_labels = images[~held], labels[~held]
    if not len(train_images):
        raise ValueError(f"--data {data}: {len(images)} images are too few to train on")
    torch.manual_seed(seed)
    net = Classifier(source.classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    rise = max(1, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / rise, (steps - i) / (steps - rise + 1)))
    order = torch.cat([torch.randperm(len(train_images)) for _ in range(-(-steps * batch_size // len(train_images)))])
    bar = tqdm(range(steps), unit="step", desc=f"network on {data}")
    for step in bar:
        picks = order[step * batch_size : (step + 1) * batch_size]
        n, (dy, dx), mirror = len(picks), torch.randint(-1, 2, (2, len(picks), 1)), torch.rand(len(picks), 1) < 0.5
        y, x = (torch.arange(32) + dy).clamp(0, 31), (torch.arange(32) + dx).clamp(0, 31)  # [n, 32], the edge repeated
        batch = train_images[picks][torch.arange(n)[:, None, None], y[:, :, None], torch.where(mirror, 31 - x, x)[:, None]]
        logits = net.head(net(batch.permute(0, 3, 1, 2).to(device), return_features=True).relu())
        loss = F.cross_entropy(logits, train_labels[picks].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    net.cpu().eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, Conv):
            m.weight.data = m.weight.data.half()
    with torch.inference_mode():
        guesses = torch.cat([net(x.permute(0, 3, 1, 2)).argmax(1) for x in images[held].split(256)])
    whole, lean = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(net), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(lean, "w") as new:
        for item in old.infolist():
            if not item.filename.endswith(".debug_pkl"):  # these hold where the sources lie on this machine
                new.writestr(item, old.read(item))
    write_whole(path, lambda f: f.write(lean.getvalue()))
    print(f"wrote {path}: {(guesses == labels[held]).double().mean():.2%} of {int(held.sum()):,} unseen images classified rightly ({len(source.classes)} classes, {steps} steps)")


# ---------------------------------------------------------------------------------------------- command


def evaluate(args):
    if not args.samples or not (args.ref or args.save_stats):
        raise ValueError("give --samples and --ref (or --save-stats to write the samples' statistics), or --train-net")
    for flag, path in (("--json", args.json), ("--save-stats", args.save_stats)):
        if path:
            check_out(flag, path)
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise ValueError(f"--save-stats {args.save_stats}: must end in .npz")
    samples, reference = find_images(args.samples), find_images(args.ref) if args.ref else None
    if samples.count < 2:
        raise ValueError(f"--samples {args.samples}: {samples.count} images (arr_0), expected 2 or more")
    size = (args.image_size, args.image_size) if args.image_size else samples.size
    if reference and reference.count and reference.size != size and size[0] != size[1]:
        raise ValueError(f"--ref {args.ref}: images of {reference.size[0]} x {reference.size[1]} px, the samples have {size[0]} x {size[1]}; --image-size N crops both to N x N")

    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))  # one downloads, the others wait
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # its rounding shows in FID

    net_path = args.net
    if net_path is None:
        if world > 1 and local > 0:
            dist.barrier()  # one process of each machine downloads
        net_path = fetch(INCEPTION, Path(torch.hub.get_dir()) / "transdiff" / Path(INCEPTION).name)
        if world > 1 and local == 0:
            dist.barrier()
    try:
        net, width = load_net(net_path, device, size)
    except ValueError as e:
        raise ValueError(e if args.net else f"{e}; remove the file to fetch it again") from None
    network = hashlib.sha256(Path(net_path).read_bytes()).hexdigest()
    known = load_statistics(args.ref, network) if args.ref and not reference.files else None
    if known is None and args.ref and reference.count < 2:
        raise ValueError(f"--ref {args.ref}: has neither images (arr_0, 2 or more) nor statistics (mu, sigma)")
    if known and len(known[0]) != width:
        raise ValueError(f"--ref {args.ref}: statistics of {len(known[0])} features, but {net_path} gives {width}; they are of another network")

    answers = embed(net, samples, size, bool(args.image_size), args.batch_size, device, classify=True)
    reference_features = embed(net, reference, size, size[0] == size[1], args.batch_size, device, classify=False) if args.ref and reference.count else None
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    features, probabilities = answers[:, :width], answers[:, width:]

    result, notes = {}, []
    mu, sigma = statistics(features, f"statistics of {args.samples}")
    if args.save_stats:
        write_whole(args.save_stats, lambda f: np.savez(f, mu=mu.numpy(), sigma=sigma.numpy(), network=np.array(network)))
        notes.append(f"wrote the statistics of {args.samples} to {args.save_stats}")
    if args.ref:
        result["fid"] = frechet_distance(mu, sigma, *(known or statistics(reference_features, f"statistics of {args.ref}")))
    if samples.count >= 10:
        result["inception_score"], result["inception_score_std"] = inception_score(probabilities)
    else:
        notes.append("no Inception Score: it needs 10 samples or more")
    if args.ref and reference_features is None:
        notes.append(f"no precision and recall: {args.ref} has statistics alone, and they need reference images")
    elif args.ref and min(samples.count, reference.count) < 4:
        notes.append("no precision and recall: they need 4 images or more on both sides")
    elif args.ref:
        result["precision"], result["recall"] = precision_recall(features, reference_features, device=device)
    if samples.key and hasattr(net, "classes"):  # of --train-net; another network's classes are not known to be the samples'
        with np.load(samples.path, allow_pickle=False) as data:
            labels = next((data[k] for k in ("arr_1", "labels") if k in data), None)
        if labels is not None and labels.shape == (samples.count,) and labels.min() >= 0 and labels.max() < len(net.classes):
            result["accuracy"] = float((probabilities.argmax(1).numpy() == labels).mean())

    of = f" ({Path(args.net).name})" if args.net else ""
    print(f"{args.samples} ({samples.count:,} images, {size[0]} x {size[1]} px)" + (f" against {args.ref}" + (f" ({reference.count:,} images)" if reference.count else "") if args.ref else ""))
    names = dict(fid=f"Frechet distance{of}" if of else "FID", inception_score=f"Inception Score{of}", precision="precision", recall="recall", accuracy="accuracy")
    for key in (k for k in names if k in result):
        print(f"  {names[key]:{max(map(len, names.values()))}}  {result[key]:10.4f}" + (f" +- {result['inception_score_std']:.4f}" if key == "inception_score" else ""))
    print(*notes, sep="\n", end="\n" if notes else "")
    if samples.count < 10_000:
        print(f"fid.py: warning: {samples.count:,} samples; with fewer than 10,000 the distance is biased upwards, so compare it at equal numbers only", file=sys.stderr)
    if args.json:
        write_whole(args.json, lambda f: f.write(json.dumps(result, indent=1).encode()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A TorchScript file is a program: loading one runs it. The network is this project's only exception to loading weights alone, so take --net from those you trust.",
    )  # fmt: skip
    add = parser.add_argument
    add("--samples", metavar="S", help="images: a folder (any depth), or F.npz with arr_0 uint8 [N, H, W, 3], as sample.py writes")
    add("--ref", metavar="R", help="what to compare with: likewise, ADM's reference batch (its mu, sigma serve FID), or statistics of --save-stats; images of another size are cropped or padded to the samples' as in training")
    add("--net", metavar="FILE", help="feature network, TorchScript, of --train-net or any with the same call (default: NVIDIA's Inception, fetched once to torch's hub folder)")
    add("--json", metavar="FILE", help="also write the numbers there: fid, inception_score, inception_score_std, precision, recall, accuracy")
    add("--save-stats", metavar="F.npz", help="write mean and covariance of the samples' features: a --ref for later")
    add("--image-size", type=positive, metavar="N", help="crop samples and reference to N x N (default: the samples as they are)")
    add("--batch-size", type=positive, default=64, help="images at once on each process (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--train-net", metavar="FILE", help="train a small classifier on --data and write it there; nothing else is done")
    add("--data", metavar="SRC", help=f"of --train-net: folder of class folders, or .npz of images and labels (default: {DEMO_DATA})")
    add("--steps", type=positive, default=1000, help="of --train-net (default: 1000, two minutes on two cores)")
    add("--seed", type=whole, default=0, help="of --train-net (default: 0)")
    args = parser.parse_args()
    if not args.train_net:
        return evaluate(args)
    if args.samples or args.ref:
        raise ValueError("--train-net takes --data, --steps, --seed and --device, and no --samples or --ref")
    check_out("--train-net", args.train_net)
    train_net(args.train_net, args.data or DEMO_DATA, args.steps, args.seed, pick_device(args.device))


if __name__ == "__main__":
    run(main)
