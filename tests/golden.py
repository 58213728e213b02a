"""The released implementation's weights and inputs, regenerated from their names (no file holds them)."""
import json
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
OUTCOMES = np.load(HERE / "released_small.npz")  # what the authors' released code returned for them, float32
SHAPES = json.loads((HERE / "released_small_shapes.json").read_text())


def generator(name):
    return np.random.default_rng(zlib.crc32(("public:" + name).encode()))


def weight(key, shape):
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
    return torch.from_numpy(generator("input." + name).standard_normal(shape, dtype=np.float32))


def released_state(kind):
    return {k: torch.from_numpy(np.asarray(weight(k, s), dtype=np.float32)) for k, s in SHAPES[kind].items()}


def write_released(kind, path):
    """A file in the released format: the EMA weights are the golden ones, `model` is something else, and a Namespace rides along."""
    state = released_state(kind)
    if kind == "vae":
        torch.save({"model": state}, path)
        return path
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"model": other, "model_ema": state, "optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": Namespace(lr=8e-4, bf16=False)}, path)
    return path


def assert_close(name, ours):
    theirs = OUTCOMES[name]
    error = np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max()
    assert error < 1e-4, f"{name}: relative error {error:.2e}"
