"""Train a small classifier whose features replace Inception's in fid.py, for images that are not
like ImageNet's.

    python demo/train_features.py --out demo/features.pt
        as bundled, on the bundled images
    python demo/train_features.py --data SRC --out runs/features.pt
        SRC as for vae.py, at 32 px
    python fid.py --samples samples.npz --ref SRC --net runs/features.pt
        distances in its features (not FID)

It has 64 features. Every fifth image is held out; the last line has the accuracy on those. The file
is TorchScript, of about 0.3 MB, with the interface of NVIDIA's Inception file.
"""

import io
import sys
import zipfile
from pathlib import Path
from typing import List

sys.path.insert(0, str(Path(__file__).parent.parent))
# model comes before torch: it sets how OpenMP's threads wait.
from model import UserError, atomic_write, bounded, make_parser, pick_device, run_main  # noqa: E402
from vae import DEMO_DATA, Images  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402


class Conv(nn.Conv2d):
    """3 x 3 convolution in float32. Its weights may be float16, which halves the file."""

    def forward(self, x):
        return F.conv2d(x, self.weight.float(), None, padding=1)


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> class probabilities [N, K], or features [N, 64 width].

    The head has no bias: no_output_bias is there because fid.py calls Inception with it.
    """

    classes: List[str]

    def __init__(self, classes, width=1.0):
        super().__init__()
        self.classes = classes
        layers = []
        cin = 3
        for channels in (32, 32, 0, 64, 64, 0, 96):
            if channels == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                cout = int(width * channels)
                layers += [Conv(cin, cout, 3, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
                cin = cout
        self.trunk = nn.Sequential(*layers)
        self.features = nn.Linear(cin, int(width * 64))
        self.head = nn.Linear(int(width * 64), len(classes), bias=False)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        x = x.float() / 127.5 - 1
        if x.shape[2] != 32 or x.shape[3] != 32:
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        features = self.features(self.trunk(x).mean((2, 3)))
        return features if return_features else self.head(features.relu()).softmax(1)


def read(path):
    """(images uint8 [N, 3, 32, 32], labels [N], class names) of all images that can be read."""
    data = Images(path, 32)
    loader = DataLoader(data, batch_size=256, collate_fn=np.stack)
    batches = tqdm(loader, unit="batch", desc=f"reading {path}")
    images = torch.cat([torch.from_numpy(batch) for batch in batches])
    readable = images[:, 0, 0, 0].isfinite()  # an image that cannot be read is NaN
    labels = torch.from_numpy(data.labels)[readable]
    if len(labels) < 2:
        raise UserError(f"--data {path}: {len(labels)} readable images are not enough to train on")
    return images[readable].byte().permute(0, 3, 1, 2), labels, data.classes


def augment(images, mirror):
    """Shift images [N, 3, 32, 32] by up to 1 pixel, repeating the edge; mirror half of them."""
    n = len(images)
    dy, dx = torch.randint(-1, 2, (2, n, 1))
    y = (torch.arange(32) + dy).clamp(0, 31)  # [N, 32]
    x = (torch.arange(32) + dx).clamp(0, 31)
    if mirror:
        x = torch.where(torch.rand(n, 1) < 0.5, 31 - x, x)
    image = torch.arange(n)[:, None, None]
    return images[image, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)


def train_net(net, images, labels, args, device, lr=4e-3):
    """AdamW with label smoothing; the learning rate rises over a quarter of the steps and falls."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    warmup = max(1, args.steps // 4)
    epochs = -(-args.steps * args.batch_size // len(images))
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    batches = order[: args.steps * args.batch_size].split(args.batch_size)
    bar = tqdm(batches, unit="step", desc="classifier")
    for step, indices in enumerate(bar):
        fall = (args.steps - step) / (args.steps - warmup + 1)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, fall)
        x = augment(images[indices], args.mirror).to(device)
        y = labels[indices].to(device)
        features = net(x, return_features=True)
        loss = F.cross_entropy(net.head(features.relu()), y, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def save_net(net, path):
    """Write TorchScript: convolutions in float16, no entries that hold paths of this machine."""
    for m in net.modules():
        if isinstance(m, Conv):
            m.weight.data = m.weight.data.half()
    complete = io.BytesIO()
    stripped = io.BytesIO()
    torch.jit.save(torch.jit.script(net), complete)
    with zipfile.ZipFile(complete) as old, zipfile.ZipFile(stripped, "w") as new:
        for item in old.infolist():
            if not item.filename.endswith(".debug_pkl"):
                new.writestr(item, old.read(item))
    atomic_write(path, lambda f: f.write(stripped.getvalue()))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add("--data", default=str(DEMO_DATA), help="images (default: %(default)s)")
    add("--out", default="runs/features.pt", help="file to write (default: %(default)s)")
    add("--steps", type=count, default=1000, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=bounded(int, 2), default=128, help="images (default: %(default)s)")
    add("--width", type=bounded(float, 0.1), default=1.0, help="times the channels (default: 1)")
    add("--no-mirror", dest="mirror", action="store_false", help="train no mirror images")
    add("--seed", type=bounded(int, 0), default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    device = pick_device(args.device)

    images, labels, classes = read(args.data)
    held_out = torch.arange(len(images)) % 5 == 0
    torch.manual_seed(args.seed)
    net = Classifier(classes, args.width).to(device)
    train_net(net, images[~held_out], labels[~held_out], args, device)
    net.cpu().eval().requires_grad_(False)
    save_net(net, args.out)

    guesses = torch.cat([net(x).argmax(1) for x in images[held_out].split(256)])
    accuracy = (guesses == labels[held_out]).double().mean()
    number = f"{accuracy:.2%} of {len(guesses):,}"
    print(f"wrote {args.out}: {number} held-out images classified correctly")


if __name__ == "__main__":
    run_main(main)
