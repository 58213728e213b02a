"""The released implementation's weights and inputs.

They are random numbers derived from their names, so no file holds them.
"""

import json
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
OUTCOMES = np.load(HERE / "released_small.npz")  # float32 results of the authors' released code
SHAPES = json.loads((HERE / "released_small_shapes.json").read_text())


def generator(name):
    return np.random.default_rng(zlib.crc32(("public:" + name).encode()))


def weight(key, shape):
    """Weight `key` of the released implementation, float32, of about the scale of a trained one."""
    w = generator(key).standard_normal(shape, dtype=np.float32)
    if key.endswith("bias"):
        return 0.02 * w
    if len(shape) == 1:
        return 1 + 0.05 * w
    if any(part in key for part in ("pos_embed", "fake_latent", "mask_token", "class_emb")):
        return 0.2 * w
    if "scale_shift_table" in key:
        return 0.1 * w
    return w / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def tensor(name, *shape):
    """Input `name`, standard normal float32."""
    return torch.from_numpy(generator("input." + name).standard_normal(shape, dtype=np.float32))


def released_state(kind):
    """State dict under the released names; kind "one_step", "one_step_512", "mrar" or "vae"."""
    return {
        k: torch.from_numpy(np.asarray(weight(k, s), dtype=np.float32))
        for k, s in SHAPES[kind].items()
    }


def write_released(kind, path):
    """Write a file in the released format.

    The weights above are its EMA weights; those under `model` are zero.
    """
    state = released_state(kind)
    if kind == "vae":
        torch.save({"model": state}, path)
        return path
    zero = {k: torch.zeros_like(v) for k, v in state.items()}
    args = Namespace(lr=8e-4, bf16=False)
    others = {"optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": args}
    torch.save({"model": zero, "model_ema": state, **others}, path)
    return path


def assert_close(name, ours):
    """Compare with the released result `name`, to 1e-4 of its largest value."""
    theirs = OUTCOMES[name]
    error = np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max()
    assert error < 1e-4, f"{name}: relative error {error:.2e}"
