"""Makes released_small.npz and released_small_shapes.json with the authors' released code.

Run it in a checkout of github.com/TransDiff/TransDiff, whose folder `models` it imports:

    cd TransDiff
    PYTHONPATH=. python path/to/tests/make_golden.py --out released_small.npz

It writes both files, the second beside the first, and prints how far they are from those in tests/
(--compare FILE: from others): for each result the largest difference, divided by the largest value.

It was run with the release's commit 0081b3a379a9429f946e434d3de53740c6c7dcf7 on a CPU, with torch
2.13.0, numpy 2.4.6, scipy 1.17.1, diffusers 0.39.0, transformers 4.46.3, timm 1.0.31 and
torchvision 0.28.0 (timm imports it; nothing of it is used). This project needs the last four for
nothing else, so they are not in requirements.txt.

The models are the release's, at a small size: width 128, 2 heads, 4 AR blocks, 2 decoder blocks, 10
classes; the VAE is full-size. Names and shapes of the weights are read off its modules. golden.py
makes weights and inputs from names, so nothing here is random. What is changed, from outside:

- torch.bfloat16 is float32. The release casts the input of the modulation's linear layer to
  bfloat16 and makes MRAR's attention mask in it; without autocast, float32 weights take neither.
- .cuda() does nothing, so a CPU is enough.
- t and the noise of losses and samples are the inputs of golden.py, instead of random draws.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from golden import SHAPES, released_state, tensor
from models import transdiff, transdiff_mrar, vae  # the release's

LABELS = torch.tensor([1, 7])
T = torch.tensor([0.3, 0.7])
X = tensor("x", 2, 16, 16, 16)
NOISE = tensor("noise", 2, 16, 16, 16)
LATENTS = tensor("latents", 2, 4, 16, 16, 16)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
parser.add_argument("--compare", type=Path, default=Path(__file__).with_name("released_small.npz"))
args = parser.parse_args()

torch.bfloat16 = torch.float32
torch.Tensor.cuda = lambda self: self
torch.set_grad_enabled(False)
shapes, outcomes = {}, {}


def shapes_file(path):
    return path.with_name(f"{path.stem}_shapes.json")


def load(kind, model):
    """The release's model with the weights of golden.py, by the model's own names and shapes."""
    shapes[kind] = {name: list(w.shape) for name, w in model.state_dict().items()}
    SHAPES[kind] = shapes[kind]  # released_state reads them there
    model.load_state_dict(released_state(kind))
    return model.eval()


def load_transdiff(kind, module, img_size=256):
    sizes = dict(encoder_embed_dim=128, encoder_depth=2, encoder_num_heads=2)  # 2 x 2 blocks
    sizes |= dict(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=2)
    sizes |= dict(class_num=10, img_size=img_size, diffusion_batch_mul=1)
    norm_layer = partial(torch.nn.LayerNorm, eps=1e-6)  # as in the release's three sizes
    model = load(kind, module.Transdiff(norm_layer=norm_layer, **sizes))
    model.diffdecoder.sample_logit_normal = lambda size: T  # t of the loss
    return model


def tokens(x):
    return model.patchify(x, hw=x.shape[-1], patch_size=1)


def velocity(x, c):
    v = model.diffdecoder.net(tokens(x), c, 1000 * T)
    return model.unpatchify(v, hw=x.shape[-1], patch_size=1)


def encode(class_embedding):
    """c of 1-step AR; the image tokens given to it are replaced by the mask embedding."""
    c, _ = model.forward_encoder(torch.zeros(len(class_embedding), 256, 16), class_embedding)
    return c


def sample(steps, cfg, s1, s2, draws=None):
    """A sample that starts at NOISE. draws: the noise of each step, which matters if s2 > 0."""
    start = patch(f"{model.__module__}.randn_tensor", return_value=tokens(NOISE))
    noise = patch("torch.randn_like", side_effect=draws or torch.zeros_like)
    with start, noise:
        return model.samples(LABELS, steps, cfg, scale_0=s1, scale_1=s2)


model = load_transdiff("one_step", transdiff)
outcomes["one_step.c"] = encode(model.class_emb(LABELS))
outcomes["one_step.c_null"] = encode(model.fake_latent)
outcomes["one_step.v"] = velocity(X, outcomes["one_step.c"])
with patch("torch.randn_like", side_effect=tokens(NOISE).split(1)):  # one call per image
    outcomes["one_step.loss"] = model(LATENTS[:, 0], LABELS)[None]
outcomes["one_step.sample"] = sample(steps=8, cfg=1.3, s1=0.87, s2=0)
outcomes["one_step.sample_cfg1"] = sample(steps=5, cfg=1.0, s1=1, s2=0)
draws = [tokens(tensor(f"step{i}", 2, 16, 16, 16)) for i in range(5)]
outcomes["one_step.sample_s2"] = sample(steps=6, cfg=1.3, s1=0.89, s2=0.95, draws=draws)

model = load_transdiff("one_step_512", transdiff, img_size=512)
x512 = tensor("x512", 2, 16, 32, 32)
outcomes["one_step_512.v"] = velocity(x512, encode(model.class_emb(LABELS)))

# The release's forward takes the four images of a chain; c and the losses are read inside it.
model = load_transdiff("mrar", transdiff_mrar)
forward_loss = model.forward_loss
conditions, losses = [], []  # of images 0, 1, 2, 3


def record(z, target):
    conditions.append(z)
    losses.append(forward_loss(z, target))
    return losses[-1]


model.forward_loss = record
with patch("torch.randn_like", side_effect=tokens(NOISE).split(1) * 4):
    model(*LATENTS.unbind(1), LABELS)
outcomes["mrar.c"] = conditions[3]
for i in range(4):
    outcomes[f"mrar.v{i}"] = velocity(X, conditions[i])
outcomes["mrar.loss"] = torch.stack(losses)
outcomes["mrar.sample"] = sample(steps=6, cfg=1.3, s1=0.87, s2=0)

model = load("vae", vae.AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4)))
outcomes["vae.moments"] = model.encode(tensor("img", 1, 3, 64, 64).clamp(-1, 1)).parameters
outcomes["vae.decode"] = model.decode(tensor("zdec", 1, 16, 4, 4))

theirs = dict(np.load(args.compare))  # read first: --out may be the same file
their_shapes = shapes_file(args.compare).read_text()
outcomes = {name: value.numpy() for name, value in outcomes.items()}
np.savez_compressed(args.out, **outcomes)
shapes_file(args.out).write_text(json.dumps(shapes, separators=(",", ":")))

print(f"names and shapes of the weights equal: {shapes == json.loads(their_shapes)}")
print(f"names of the results equal: {outcomes.keys() == theirs.keys()}\n")
for name, ours in outcomes.items():
    error = np.abs(ours - theirs[name]).max() / np.abs(theirs[name]).max()
    print(f"{name:22}{error:.1e}")
