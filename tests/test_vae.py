"""Images and latents: reading every kind of image and data set, the latent cache, the VAE and its commands."""

import json
import pickle
import re
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT
from in_process import run_in_process
from PIL import Image

from model import atomic_write
from vae import DEMO_DATA, DEMO_VAE, AutoencoderKL, Images, LatentCache, center_crop
from vae import encode_images, from_uint8, load_vae, sample_posterior, to_uint8

SMALL = dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8)  # AutoencoderKL's


def gradient(height, width):
    """RGB image: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / max(1, width - 1), 255 * y / max(1, height - 1), np.full((height, width), 60)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def mean_error(image, expected):
    return np.abs(image.astype(int) - expected).mean()


def small_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(**SMALL).eval().requires_grad_(False)


def save_small_vae(path, seed=0):
    """Write an untrained VAE of 32 px, as demo/train_vae.py writes one."""
    state = dict(model=small_vae(seed).state_dict(), arch=SMALL, scale=1.0, image_size=32)
    torch.save(state, path)


# ------------------------------------------------------------------------------------------ reading images


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp"])
def test_formats_are_read_as_they_were_saved(tmp_path, name):
    (tmp_path / "c").mkdir()
    options = dict(lossless=True) if name.endswith("webp") else dict(quality=95)
    Image.fromarray(gradient(32, 32)).save(tmp_path / "c" / name, **options)
    assert mean_error(Images(tmp_path, 32)[0], gradient(32, 32)) < 3


def test_modes_are_converted_to_rgb(tmp_path):
    """Grey, 16-bit grey, palette, alpha, CMYK and a transparent palette keep their brightness."""
    folder = tmp_path / "c"
    folder.mkdir()
    rgb = Image.fromarray(gradient(32, 32))
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(grey).save(folder / "0grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1grey16.png")
    rgb.quantize(256).save(folder / "2palette.png")
    half_transparent = rgb.convert("RGBA")
    half_transparent.putalpha(Image.fromarray((np.mgrid[0:32, 0:32][0] >= 16).astype(np.uint8) * 255))
    half_transparent.save(folder / "3alpha.png")
    rgb.convert("CMYK").save(folder / "4cmyk.jpg", quality=95)
    transparent = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    transparent.putpalette([200, 100, 50] * 256)
    transparent.save(folder / "5transparent.png", transparency=0)

    images = Images(tmp_path, 32)
    items = [images[i] for i in range(len(images))]
    assert len(items) == 6 and all(x.shape == (32, 32, 3) and x.dtype == np.uint8 for x in items)
    for item in items[:2]:
        assert np.abs(item.astype(int) - grey[..., None]).max() <= 1
    assert mean_error(items[2], gradient(32, 32)) < 6
    assert items[3][:16].max() == 0 and np.array_equal(items[3][16:], gradient(32, 32)[16:])  # transparent is black
    assert mean_error(items[4], gradient(32, 32)) < 12
    assert items[5].max() == 0


def test_exif_orientation_is_applied(tmp_path):
    (tmp_path / "c").mkdir()
    image, exif = Image.fromarray(gradient(32, 32)), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "c" / "a.png", exif=exif)
    assert np.array_equal(Images(tmp_path, 32)[0], np.rot90(gradient(32, 32), -1))


def test_crop_keeps_the_centre_and_the_proportions():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # the centre square is white
    assert center_crop(Image.fromarray(wide), 32)[:, 1:-1].min() > 250
    for height, width in ((33, 500), (500, 33), (32, 32), (31, 90), (7, 7)):
        assert center_crop(Image.fromarray(gradient(height, width)), 32).shape == (32, 32, 3)


def test_crop_halves_by_box_filter_as_adm_does():
    """A one-pixel checkerboard, twice too large: a box filter leaves grey, sampling would leave black or white."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    cropped = center_crop(Image.fromarray(np.stack([board] * 3, -1)), 32)
    assert np.unique(cropped).tolist() in ([127], [128])


def test_a_folder_is_a_tree_of_classes(tmp_path):
    for path in ("b/1.png", "b/deep/0.png", "a/x.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient(8, 8)).save(tmp_path / path)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("not an image")
    (tmp_path / ".git").mkdir()
    images = Images(tmp_path, 32)
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 1, 1]
    assert images[0].shape == (32, 32, 3)  # a small image is enlarged
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        Images(tmp_path, 32)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (20, 28, 3), (64, 96, 3)])
def test_npz_images_follow_the_rule_of_image_files(tmp_path, shape):
    """They are cropped and resized by center_crop to the size asked for; grey images become RGB."""
    array = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=array, labels=np.arange(5) % 2)
    rgb = np.broadcast_to(array.reshape(5, *shape[:2], -1), (5, *shape[:2], 3))
    images = Images(tmp_path / "s.npz", 32)
    assert all(np.array_equal(images[i], center_crop(Image.fromarray(rgb[i].copy()), 32)) for i in range(5))


def test_images_of_the_size_asked_for_or_of_no_size_are_unchanged(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=array, labels=np.zeros(3, int))
    for size in (32, None):
        images = Images(tmp_path / "s.npz", size)
        assert images.shape == (32, 32) and all(np.array_equal(images[i], array[i]) for i in range(3))


def test_bundled_images_have_a_black_margin_of_two_pixels():
    images = Images(DEMO_DATA, 32)
    assert len(images) == 10_000 and images.classes[1] == "trouser"
    assert np.bincount(images.labels).tolist() == [1000] * 10
    inside = np.zeros((32, 32), bool)
    inside[2:-2, 2:-2] = True
    assert images.items.shape[1:3] == (32, 32) and images.items[:, ~inside].max() == 0
    assert images.items[:100, 2].max() > 0  # some garments touch the edge of the original image


def test_adms_names_of_arrays_are_read(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=gradient(64, 96)[None], arr_1=np.array([3]))
    images = Images(tmp_path / "s.npz", 32)
    assert images.labels.tolist() == [3] and images.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "arrays",
    [
        dict(images=np.zeros((2, 8, 8), np.uint8)),
        dict(images=np.zeros((2, 8, 8)), labels=np.zeros(2, int)),
        dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(3, int)),
    ],
    ids=["no labels", "float images", "labels of another length"],
)
def test_an_npz_of_other_arrays_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match="s.npz: not a readable .npz of images"):
        Images(tmp_path / "s.npz", 32)


def test_bytes_to_floats_and_back_is_exact():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(from_uint8(x)), x)
    assert from_uint8(x).aminmax() == (-1, 1)


# ------------------------------------------------------------------------------------------ the cache


def test_the_cache_holds_the_moments_of_the_crop_and_of_its_mirror_image(tmp_path, garments):
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    save_small_vae(tmp_path / "vae.pt")
    images, vae = Images(tmp_path / "s.npz", 32), load_vae(tmp_path / "vae.pt")
    vae.scale = 0.5
    encode_images(images, vae, tmp_path / "cache", batch_size=7)
    assert (tmp_path / "cache" / "reconstructions.png").exists() and not (tmp_path / "cache.partial").exists()

    cache = LatentCache(tmp_path / "cache")
    assert isinstance(cache.moments, np.memmap)
    assert cache.moments.shape == (60, 2, 16, 8, 8) and cache.moments.dtype == np.float16
    assert np.array_equal(cache.labels, images.labels) and cache.classes == images.classes
    assert cache.scale == 0.5 and cache.latent_shape == (8, 8, 8)
    for i, flip in ((0, 0), (33, 1)):
        x = from_uint8(images[i][None])
        mean, logvar = vae.encode(x.flip(-1) if flip else x)
        noise = torch.randn(1, 8, 8, 8)
        expected = (mean + (0.5 * logvar).exp() * noise) * 0.5
        moments = torch.tensor(cache.moments[i : i + 1, flip]).chunk(2, dim=1)
        torch.testing.assert_close(sample_posterior(*moments, noise) * cache.scale, expected, atol=2e-3, rtol=2e-3)

    pickled = pickle.dumps(cache)  # as a loader's worker gets it, which maps the file itself
    assert len(pickled) < 1000 and np.array_equal(pickle.loads(pickled).moments, cache.moments)
    with pytest.raises(ValueError, match="exists already"):
        encode_images(images, vae, tmp_path / "cache")


def test_an_incomplete_cache_is_refused(tmp_path):
    cache = tmp_path / "c"
    cache.mkdir()
    with pytest.raises(ValueError, match="vae.py encode"):
        LatentCache(cache)
    np.zeros((3, 2, 4, 2, 2), np.float16).tofile(cache / "moments.bin")
    np.save(cache / "labels.npy", np.array([0, 1]))
    record = dict(shape=[3, 2, 4, 2, 2], classes=["a", "b"], scale=1.0, image_size=32, vae_digest="")
    (cache / "cache.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="c: not a readable latent cache .*labels.npy"):
        LatentCache(cache)
    np.save(cache / "labels.npy", np.array([0, 1, 1]))
    assert len(LatentCache(cache).labels) == 3


# ------------------------------------------------------------------------------------------ the autoencoder


@pytest.mark.skip
def test_the_shape_of_a_vae_is_read_off_its_weights(tmp_path, arch):
    with torch.device("meta"):
        vae = AutoencoderKL(**ARCHS[arch])
    vae = vae.to_empty(device="cpu")
    torch.save(dict(model=vae.state_dict(), scale=0.7, image_size=48), tmp_path / "v.pt")
    loaded = load_vae(tmp_path / "v.pt")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in vae.parameters()]
    assert (loaded.scale, loaded.image_size, loaded.factor) == (0.7, 48, 16 if arch == "kl16" else 4)


def test_files_of_other_weights_are_not_a_vae(tmp_path):
    torch.save(dict(model={"ar.positions": torch.zeros(1)}), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: not a readable VAE"):
        load_vae(tmp_path / "model.pt")
    torch.save(dict(model=small_vae().state_dict() | {"extra.weight": torch.zeros(1)}), tmp_path / "extra.pt")
    with pytest.raises(ValueError, match="extra.pt: not a readable VAE .*extra.weight"):
        load_vae(tmp_path / "extra.pt")


def test_scaled_latents_have_unit_variance(tmp_path, garments):
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    images = Images(tmp_path / "s.npz", 32)
    save_vae(small_vae(), images, tmp_path / "v.pt", "cpu")
    vae = load_vae(tmp_path / "v.pt")
    mean, logvar = vae.encode(from_uint8(np.stack([images[i] for i in range(60)])))
    latents = vae.scale * sample_posterior(mean, logvar, torch.randn_like(mean))
    assert latents.std().item() == pytest.approx(1, rel=0.02)


# ------------------------------------------------------------------------------------------ files and pictures


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "f"
    atomic_write(path, b"old")

    def write_half(f):
        f.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, write_half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    atomic_write(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------ the commands


def test_an_unreadable_image_is_named_also_by_a_worker(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree" / "c").mkdir(parents=True)
    Image.fromarray(gradient(40, 40)).save("tree/c/0.png")
    (tmp_path / "tree" / "c" / "1.jpg").write_bytes(b"not a picture")
    save_small_vae("v.pt")
    for workers in (0, 1):
        run_in_process(f"vae.py encode --data tree --vae v.pt --out cache --workers {workers}", expect=2)
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("vae.py: tree/c/1.jpg: not a readable image")
        assert not (tmp_path / "cache").exists()


# python SCRIPT vae.py train ...: killed after the first checkpoint, which is after step 100.
KILL_TRAINING = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import vae
atomic_write = vae.atomic_write
vae.atomic_write = lambda *args: atomic_write(*args) or os.kill(os.getpid(), 9)
vae.run_main(vae.main)
"""


def test_a_vae_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path, command, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ARCHS, "small", dict(channels=4, multipliers=(1, 1), blocks=1, z_channels=2))
    np.savez("s.npz", images=np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8), labels=[0] * 20)
    flags = "train --data s.npz --image-size 4 --steps 102 --batch-size 2 --out"
    run_in_process(f"vae.py {flags} whole.pt")
    small = 'vae.ARCHS["small"] = dict(channels=4, multipliers=(1, 1), blocks=1, z_channels=2)\nvae.run_main'
    (tmp_path / "kill.py").write_text(KILL_TRAINING.replace("vae.run_main", small))
    command([tmp_path / "kill.py", ROOT / "vae.py", *flags.split(), "killed.pt"], expect=-signal.SIGKILL)
    assert (tmp_path / "killed.pt.partial").exists() and not (tmp_path / "killed.pt").exists()
    run_in_process(f"vae.py {flags} killed.pt --seed 1", expect=2)
    assert "killed.pt.partial: not a readable unfinished VAE (of other flags" in capsys.readouterr().err
    run_in_process(f"vae.py {flags} killed.pt")
    a, b = (load_file(f"{name}.pt")["model"] for name in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path / "killed.pt.partial").exists()
    capsys.readouterr()
    for out in ("whole.pt", "picture.png"):
        run_in_process(f"vae.py {flags} {out}", expect=2)
        assert f"--out {out}: is there already, or is a picture's name" in capsys.readouterr().err


def test_images_of_your_own_need_a_vae_of_their_own(tmp_path, garments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", images=garments[0], labels=garments[1])
    for line in ("vae.py encode --data s.npz --out cache", "train.py --data s.npz"):
        run_in_process(line, expect=2)
        assert "--vae: name the VAE for s.npz" in capsys.readouterr().err
    run_in_process(f"vae.py encode --data s.npz --vae {DEMO_VAE} --out cache")
    out = capsys.readouterr().out
    assert "60 images of 10 classes: 0, 1, 2" in out and "cache/reconstructions.png" in out
    error = float(re.search(r"mean error of the VAE (\S+) of 2", out)[1])
    images, vae = garments[0][:, :, :, None].repeat(3, 3), load_vae(DEMO_VAE)
    decoded = to_uint8(vae.decode(vae.encode(from_uint8(images))[0]))
    assert error == pytest.approx(np.abs(images / 127.5 - decoded / 127.5).mean(), rel=0.3)  # of 16 of the images


@pytest.mark.parametrize("word,index", [("Straße", 0), ("STRASSE", 0), ("CAFÉ", 1), ("a", 2), ("A", 3), ("4", 4)])
def test_classes_are_found_whatever_their_case(word, index):
    assert class_index("--class", word, ["straße", "Café", "a", "A", "e"], 5) == index


def test_train_and_encode(tmp_path, garments, command):
    """Train a VAE on a folder of images and encode the folder with it, as a user does."""
    for i, (image, label) in enumerate(zip(*garments)):
        (tmp_path / "tree" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "tree" / f"class {label}" / f"{i}.png")
    out, _ = command("vae.py train --data tree --out own.pt --steps 4 --batch-size 8")
    vae = load_vae(tmp_path / "own.pt")
    assert f"scale of the latents {vae.scale:.4f}" in out and (tmp_path / "own.png").exists()
    out, _ = command("vae.py encode --data tree --vae own.pt --out cache")
    assert "wrote 60 of 60 images to cache" in out
    cache = LatentCache(tmp_path / "cache")
    assert cache.classes[3] == "class 3" and cache.scale == vae.scale and np.isfinite(cache.moments).all()
    _, err = command("vae.py encode --data nothing --vae own.pt --out c2", expect=2)
    assert "nothing: no such folder" in err
    _, err = command("vae.py encode --data tree --vae own.pt --out c2 --image-size 30", expect=2)
    assert "multiple of 4" in err
