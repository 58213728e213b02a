"""Train a small classifier whose features replace Inception's in fid.py, for images that are not like ImageNet's.

    python demo/train_features.py --out demo/features.pt                  as bundled, on the bundled images
    python demo/train_features.py --data SRC --out runs/features.pt       SRC as for vae.py, at 32 px
    python fid.py --samples samples.npz --ref SRC --net runs/features.pt  distances in its features (not FID)

It has 64 features. Every fifth image is held out; the last line has the accuracy on those. The file is TorchScript, of
about 0.3 MB, and is called like NVIDIA's Inception file.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path
from typing import List

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from vae import DEMO_DATA, Images, atomic_write, bounded, pick_device, run_main  # noqa: E402


class Conv(nn.Conv2d):
    """3 x 3 convolution in float32. Its weights may be float16, which halves the file."""

    def forward(self, x):
        return F.conv2d(x, self.weight.float(), None, padding=1)


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> class probabilities [N, K], or features [N, 64 width]. The head has no bias."""

    classes: List[str]

    def __init__(self, classes, width=1.0):
        super().__init__()
        self.classes, layers, cin = classes, [], 3
        for cout in (int(width * channels) for channels in (32, 32, 0, 64, 64, 0, 96)):
            layers += [Conv(cin, cout, 3, bias=False), nn.BatchNorm2d(cout), nn.ReLU()] if cout else [nn.MaxPool2d(2)]
            cin = cout or cin
        self.trunk, self.features = nn.Sequential(*layers), nn.Linear(cin, int(width * 64))
        self.head = nn.Linear(int(width * 64), len(classes), bias=False)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        x = x.float() / 127.5 - 1
        if x.shape[2] != 32 or x.shape[3] != 32:
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        features = self.features(self.trunk(x).mean((2, 3)))
        return features if return_features else self.head(features.relu()).softmax(1)


def augment(images):
    """Shift images [N, 3, 32, 32] by up to 1 pixel, repeating the edge, and mirror half of them."""
    n = len(images)
    (dy, dx), mirror = torch.randint(-1, 2, (2, n, 1)), torch.rand(n, 1) < 0.5
    y, x = (torch.arange(32) + dy).clamp(0, 31), (torch.arange(32) + dx).clamp(0, 31)  # [N, 32]
    x = torch.where(mirror, 31 - x, x)
    return images[torch.arange(n)[:, None, None], :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)


def train_net(net, images, labels, steps, batch_size, device, lr=4e-3):
    """AdamW with label smoothing; the learning rate rises linearly for a quarter of the steps, then decays linearly."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    warmup = max(1, steps // 4)
    scale = lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup + 1))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    epochs = -(-steps * batch_size // len(images))
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])[: steps * batch_size]
    bar = tqdm(order.split(batch_size), unit="step", desc="classifier")
    for step, indices in enumerate(bar):
        features = net(augment(images[indices]).to(device), return_features=True)
        loss = F.cross_entropy(net.head(features.relu()), labels[indices].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def save_net(net, path):
    """Write TorchScript, convolutions in float16, without the entries that hold paths of this machine."""
    for m in net.modules():
        if isinstance(m, Conv):
            m.weight.data = m.weight.data.half()
    complete, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(net), complete)
    with zipfile.ZipFile(complete) as old, zipfile.ZipFile(stripped, "w") as new:
        for item in old.infolist():
            if not item.filename.endswith(".debug_pkl"):
                new.writestr(item, old.read(item))
    atomic_write(path, stripped.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=str(DEMO_DATA), help="folder of class folders, or .npz (default: %(default)s)")
    add("--out", default="runs/features.pt", help="file to write (default: %(default)s)")
    add("--steps", type=bounded(int, 1), default=1000, help="optimiser steps (default: 1000)")
    add("--batch-size", type=bounded(int, 2), default=128, help="images (default: 128)")
    add("--width", type=bounded(float, 0.1), default=1.0, help="times the channels and features (default: 1)")
    add("--seed", type=bounded(int, 0), default=0, help="(default: 0)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    args = parser.parse_args()
    device, data = pick_device(args.device), Images(args.data, 32)
    if len(data) < 2:
        raise ValueError(f"--data {args.data}: one image is not enough to train on")
    batches = DataLoader(data, batch_size=256)
    images = torch.cat(list(tqdm(batches, unit="batch", desc=f"reading {args.data}"))).permute(0, 3, 1, 2)
    labels, held_out = torch.from_numpy(data.labels), torch.arange(len(images)) % 5 == 0
    torch.manual_seed(args.seed)
    net = Classifier(data.classes, args.width).to(device)
    train_net(net, images[~held_out], labels[~held_out], args.steps, args.batch_size, device)
    net.cpu().eval().requires_grad_(False)
    save_net(net, args.out)
    guesses = torch.cat([net(x).argmax(1) for x in images[held_out].split(256)])
    accuracy = (guesses == labels[held_out]).double().mean()
    print(f"wrote {args.out}: {accuracy:.2%} of {len(guesses):,} held-out images classified correctly")


if __name__ == "__main__":
    run_main(main)
