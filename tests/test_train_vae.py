"""demo/train_vae.py and demo/train_features.py: networks of one's own images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vae import run  # noqa: F401

import train_features
import train_vae
from model import load_file
from vae import from_uint8, load_vae, sample_posterior

TINY = "train_vae.py --data s.npz --image-size 4 --batch-size 2"  # latents of 1 x 1: fast


@pytest.fixture
def noise(tmp_path):
    """s.npz: 20 images of 4 x 4 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=images, labels=np.zeros(20, int))


def weights(path):
    return torch.cat([p.flatten().float() for p in load_file(path)["model"].values()])


def test_a_vae_that_was_stopped_and_resumed_equals_one_that_was_not(run, noise, monkeypatch):
    """Ctrl-C comes after the checkpoint of step 5."""
    monkeypatch.setattr(train_vae, "SAVE_EVERY", 5)
    run(f"{TINY} --steps 8 --out whole.pt")
    write = train_vae.atomic_write

    def write_and_stop(path, f):
        write(path, f)
        raise KeyboardInterrupt

    stopped = f"{TINY} --steps 8 --out stopped.pt"
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "atomic_write", write_and_stop)
        assert "train_vae.py: interrupted" in run(stopped, expect=130).err
    assert not Path("stopped.pt").exists()
    err = run(f"{stopped} --seed 1", expect=2).err
    assert "stopped.pt.partial: unfinished, of other images or flags" in err
    err = run(stopped).err
    assert "5/8" in err and "0/8" not in err.replace("5/8", "")
    assert not Path("stopped.pt.partial").exists()
    assert torch.equal(weights("whole.pt"), weights("stopped.pt"))
    assert load_vae("whole.pt").scale == load_vae("stopped.pt").scale


def test_init_goes_on_from_a_finished_vae(run, noise):
    run(f"{TINY} --steps 2 --out first.pt")
    run("train_vae.py --data s.npz --init first.pt --steps 1 --lr 0.00001 --out next.pt")
    first = weights("first.pt")
    assert 0 < (first - weights("next.pt")).abs().max() < 1e-3
    assert load_vae("next.pt").image_size == 4
    run(f"{TINY} --seed 1 --steps 1 --lr 0.00001 --out other.pt")
    assert (first - weights("other.pt")).abs().max() > 0.1


def test_no_mirror_trains_no_mirror_images(run, monkeypatch):
    left = np.tile(np.uint8([255, 255, 0, 0]), (8, 4, 1))  # its left half is white
    np.savez("s.npz", images=left, labels=np.zeros(8, int))
    seen = []
    losses = train_vae.losses
    monkeypatch.setattr(train_vae, "losses", lambda vae, x: seen.append(x) or losses(vae, x))
    for flags, expected in (("--no-mirror --out a.pt", {1.0}), ("--out b.pt", {1.0, -1.0})):
        run(f"{TINY} --steps 8 {flags}")
        assert set(torch.cat(seen)[:, 0, 0, 0].tolist()) == expected


def test_a_trained_vae_says_what_it_is(command, tmp_path, garments):
    """Its latents have unit variance once scaled, and its picture and mean error are written."""
    for i, (image, label) in enumerate(zip(*garments)):
        (tmp_path / "tree" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "tree" / f"class {label}" / f"{i}.png")
    (tmp_path / "tree" / "class 0" / "bad.png").write_bytes(b"not an image")
    out, err = command(f"demo/train_vae.py --data tree --out own.pt --steps 4 --batch-size 8")
    vae = load_vae(tmp_path / "own.pt")
    assert f"scale of the latents {vae.scale:.4f}" in out and "mean error" in out
    assert "l1=" in err and Image.open(tmp_path / "own.png").size[0] > 500
    assert vae.image_size == 32 and vae.factor == 4 and vae.z_channels == 8
    images = from_uint8(np.repeat(garments[0][..., None], 3, axis=-1))
    latents = vae.scale * sample_posterior(*vae.encode(images))
    assert latents.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("flags,message", [
    ("--lr 1e9 --steps 9", "the training diverged; remove v.pt.partial, try a smaller --lr"),
    ("--image-size 6", "--image-size 6: must be a multiple of 4"),
    ("--out s.npz", "--out s.npz: is there already"),
    ("--out v.png", "--out v.png: is the name of the picture"),
    ("--init s.npz", "s.npz: not a usable"),
    ("--data nothing", "nothing: no such folder or .npz"),
    ("--steps 0", "argument --steps: 0: must be from 1"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(run, noise, flags, message):
    assert message in run(f"{TINY} --out v.pt {flags}", expect=2).err.splitlines()[-1]
    assert not Path("v.pt").exists()


@pytest.mark.parametrize("flags,expected", [("--no-mirror", {255}), ("", {0, 255})])
def test_a_classifier_of_no_mirror_images_leaves_out_unreadable_ones(
    tmp_path, monkeypatch, capsys, flags, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree" / "left").mkdir(parents=True)
    left = np.repeat(np.uint8([[255, 0]]), 16, axis=1).repeat(32, axis=0)  # its left half is white
    for i in range(10):
        Image.fromarray(left).save(tmp_path / "tree" / "left" / f"{i}.png")
    (tmp_path / "tree" / "left" / "bad.png").write_bytes(b"not an image")
    seen = []
    augment = train_features.augment

    def record(images, mirror):
        seen.append(augment(images, mirror))
        return seen[-1]

    monkeypatch.setattr(train_features, "augment", record)
    line = f"train_features.py --data tree --steps 4 --batch-size 8 --out f.pt {flags}"
    monkeypatch.setattr(sys, "argv", line.split())
    train_features.main()
    assert set(torch.cat(seen)[:, 0, :, :8].flatten().tolist()) == expected
    assert "of 2 held-out images" in capsys.readouterr().out
