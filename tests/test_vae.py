"""Every kind of image and data set, the latent cache, the VAE; fixtures for other tests too."""

import json
import os
import pickle
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, forks, run_script
from in_process import run_in_process
from PIL import Image, ImageOps, PngImagePlugin

from model import UserError
from vae import DEMO_DATA, DEMO_VAE, AutoencoderKL, LatentCache, center_crop
from vae import Images, encode_images, from_uint8, images_digest, latents_to_images, load_vae
from vae import open_images_and_vae, read_image, sample_posterior, to_uint8

SMALL = dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8)  # of 32 px, as the demo's
TINY = dict(channels=4, multipliers=(1, 1), blocks=1, z_channels=2)  # of 4 px


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run("sample.py --n 2", expect=0) runs it in this process, in tmp_path; returns (out, err)."""
    monkeypatch.chdir(tmp_path)

    def call(line, expect=0):
        capfd.readouterr()
        run_in_process(line, expect)
        return capfd.readouterr()

    return call


@pytest.fixture
def refused(run, tmp_path):
    """refused("sample.py --n 0") returns the one line of a command that has to change no file."""

    def call(line):
        seen = lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
        before = seen()
        message = run(line, expect=2).err.strip().splitlines()[-1]
        assert len(message) < 500 and message.startswith(line.split()[0])
        assert seen() == before, "the command has changed a file"
        return message

    return call


@pytest.fixture
def start(tmp_path):
    """start("vae.py ...", rank, world) starts a command as torchrun does; returns the process."""
    processes = []

    def call(line, rank, world):
        script, *flags = line.split()
        env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        logs = [tmp_path / f"{len(processes)}.{name}" for name in ("out", "err")]
        args = ([str(ROOT / script), *flags], tmp_path, env, *logs)
        processes.append(forks.Process(target=run_script, args=args))
        processes[-1].start()
        return processes[-1]

    yield call
    for process in processes:
        process.kill()


def run_together(start, line, world):
    processes = [start(line, rank, world) for rank in range(world)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * world


def wait_for_parts(folder, count):
    deadline = time.monotonic() + 100
    while len(list(folder.glob("*.npy"))) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def new_vae(arch, seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(**arch).eval().requires_grad_(False)


def save_vae(path, arch, image_size, seed=0, scale=1.0):
    """Write an untrained VAE, as demo/train_vae.py writes a trained one."""
    weights = new_vae(arch, seed).state_dict()
    torch.save(dict(model=weights, scale=scale, image_size=image_size), path)


def save_small_vae(path, seed=0):
    save_vae(path, SMALL, 32, seed)


def gradient(height, width):
    """RGB image: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x / max(1, width - 1)
    green = 255 * y / max(1, height - 1)
    return np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_images(root, names, size=8):
    """Write a picture of its own to each of these paths."""
    for i, name in enumerate(names):
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(size, size, 3, seed=i)).save(Path(root, name))


def mean_error(image, expected):
    return np.abs(np.asarray(image).astype(int) - expected).mean()


# ------------------------------------------------------------------------------------ one image
@pytest.mark.parametrize("suffix", "jpg JPEG jpe jfif png webp bmp tif tiff".split())
def test_formats_are_read_as_they_were_saved(tmp_path, suffix):
    (tmp_path / "c").mkdir()
    options = dict(lossless=True) if suffix == "webp" else dict(quality=95)
    Image.fromarray(gradient(32, 32)).save(tmp_path / "c" / f"a.{suffix}", **options)
    assert mean_error(Images(tmp_path, 32)[0], gradient(32, 32)) < 3


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert mean_error(read_image(tmp_path / name), np.array([255, 0, 0])) < 3


def test_modes_are_converted_to_rgb(tmp_path):
    """Grey, 16-bit grey, palette, CMYK keep their brightness; what is transparent is black."""
    rgb = Image.fromarray(gradient(32, 32))
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    grey16 = Image.fromarray(ramp.astype(np.uint16) * 257)
    alpha = np.repeat(np.uint8([0, 255]), 16)[:, None].repeat(32, axis=1)  # the lower half
    half_transparent = rgb.convert("RGBA")
    half_transparent.putalpha(Image.fromarray(alpha))
    transparent = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    transparent.putpalette([200, 100, 50] * 256)
    transparent.info["transparency"] = 0
    cases = [
        ("grey.png", Image.fromarray(ramp), ramp[..., None].repeat(3, 2), 0),
        ("grey16.png", grey16, ramp[..., None].repeat(3, 2), 0),
        ("grey16.tif", grey16, ramp[..., None].repeat(3, 2), 0),
        ("palette.png", rgb.quantize(256), gradient(32, 32), 6),
        ("cmyk.jpg", rgb.convert("CMYK"), gradient(32, 32), 12),
        ("alpha.png", half_transparent, gradient(32, 32) * (alpha[..., None] > 0), 0),
        ("transparent.png", transparent, np.zeros((32, 32, 3)), 0),
    ]
    for name, image, expected, tolerance in cases:
        image.save(tmp_path / name, quality=95)
        assert mean_error(read_image(tmp_path / name), expected) <= tolerance, name


@pytest.mark.parametrize("dtype,white", [(np.int32, 65535), (np.float32, 1), (np.float32, 255)])
def test_grey_of_32_bits_has_no_fixed_white_and_is_not_guessed(tmp_path, dtype, white):
    ramp = np.linspace(0, white, 32)[None].repeat(32, axis=0)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: .*convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_images_are_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if name == "a.webp" else {}
    Image.fromarray(gradient(24, 32)).save(tmp_path / name, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    assert mean_error(read_image(tmp_path / name), np.asarray(upright)) == 0
    if orientation == 6:  # rotate by 90 degrees clockwise
        assert mean_error(upright, np.rot90(gradient(24, 32), -1)) < 3


def exif_block(*entries):
    """An EXIF block of (tag, type, count, value or offset)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


TURNED = (0x0112, 3, 1, 6)  # the sound orientation "rotate by 90 degrees clockwise"
NOTE = (0x927C, 7, 0xFFFFFFF, 0xFFFFFFF)  # a maker's note outside


@pytest.mark.parametrize("block,turned", [
    (b"Exif\0\0", False),
    (b"Exif\0\0not a tiff header", False),
    (exif_block(TURNED)[:-10], False),  # cut
    (exif_block((0x0112, 2, 4, 0x636261)), False),  # an orientation in letters
    (exif_block((0x0112, 3, 200, 0xFFFFFFF)), False),  # an orientation of many numbers
    (exif_block(NOTE, TURNED), True),
    (exif_block(TURNED, NOTE), True),
    (exif_block(TURNED, (0x0100, 77, 1, 0)), True),  # an unknown type
    (exif_block((0x8825, 2, 4, 0x636261), TURNED), True),  # a pointer to GPS in letters
])  # fmt: skip
def test_pixels_and_a_sound_orientation_are_read_of_odd_exif_blocks(tmp_path, block, turned):
    expected = np.rot90(gradient(24, 32), -1) if turned else gradient(24, 32)
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(gradient(24, 32)).save(tmp_path / name, exif=block, quality=95)
        assert mean_error(read_image(tmp_path / name), expected) < 9


def test_long_texts_and_colour_profiles_of_png_are_read(tmp_path):
    text, itxt = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * 2_000_000, zip=True)
    itxt.add_itxt("parameters", "x" * 2_000_000, zip=True)
    for extra in (dict(pnginfo=text), dict(pnginfo=itxt), dict(icc_profile=bytes(2_000_000))):
        Image.fromarray(gradient(24, 32)).save(tmp_path / "a.png", **extra)
        assert np.array_equal(read_image(tmp_path / "a.png"), gradient(24, 32))


def test_crop_keeps_the_centre_and_the_proportions():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # the centre square is white
    assert center_crop(Image.fromarray(wide), 32)[:, 1:-1].min() > 250
    square = Image.fromarray(noise(48, 48, 3))
    bicubic = square.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(square, 32), bicubic)
    tall = wide.transpose(1, 0, 2).copy()
    assert center_crop(Image.fromarray(tall), 32)[1:-1].min() > 250
    for height, width in ((33, 500), (500, 33), (32, 32), (31, 90), (7, 7)):
        assert center_crop(Image.fromarray(gradient(height, width)), 32).shape == (32, 32, 3)


def test_crop_halves_by_box_filter_as_adm_does():
    """A checkerboard, twice too large: a box filter leaves grey, sampling black or white."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    cropped = center_crop(Image.fromarray(np.stack([board] * 3, -1)), 32)
    assert np.unique(cropped).tolist() in ([127], [128])


# ------------------------------------------------------------------------------------ folders
def test_a_folder_is_a_tree_of_classes(tmp_path):
    save_images(tmp_path, ["b/1.png", "b/deep/0.png", "a/x.png", "b/.hidden.png", ".git/x.png"])
    images = Images(tmp_path, 32)
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 1, 1]
    assert images.names == ["a/x.png", "b/1.png", "b/deep/0.png"]
    assert images[0].shape == (32, 32, 3)  # a small image is enlarged
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images in this folder"):
        Images(tmp_path, 32)
    with pytest.raises(UserError, match="empty: no class folders; expected .*empty/<class>"):
        Images(tmp_path / "empty", 32)


def test_links_are_followed_at_any_depth_and_loops_are_not(tmp_path):
    """Training, which reads class folders, and fid.py, which does not, see the same images."""
    root, other = tmp_path / "root", tmp_path / "other"
    save_images(root, ["a/0.png", "b/deep/1.png"])
    save_images(other, ["2.png", "deeper/3.png", "4.png"])
    for name, target in (
        ("c", other),  # a class
        ("b/deep/link", other / "deeper"),  # below a class
        ("a/one.png", other / "4.png"),  # an image
        ("a/gone.png", other / "gone.png"),
        ("a/up", root),
        ("b/deep/again", root / "b"),
        ("../other/deeper/back", other),
        ("a/itself.png", root / "a/itself.png"),
        ("itself", root / "itself"),
    ):
        (root / name).symlink_to(target)
    images = Images(root, 8)
    expected = ["a/0.png", "a/gone.png", "a/itself.png", "a/one.png", "b/deep/1.png"]
    expected += ["b/deep/link/3.png", "b/deep/link/back/2.png", "b/deep/link/back/4.png"]
    expected += ["c/2.png", "c/4.png", "c/deeper/3.png"]
    assert sorted(images.names) == expected and images.classes == ["a", "b", "c"]
    assert Images(root, 8, labelled=False).files == images.files


def test_the_digest_changes_with_the_images(tmp_path):
    """By it train.py knows whether the latents that it has are those of the images."""
    names, folder, npz = ["a/0.png", "a/1.png", "b/0.png"], tmp_path / "t", tmp_path / "s.npz"
    digest = lambda path, **options: images_digest(Images(path, 8, **options))
    save_images(folder, names)
    seen = [digest(folder), digest(folder, labelled=False)]
    assert digest(folder) == seen[0]
    save_images(folder, names[::-1])  # others, under the same names
    seen.append(digest(folder))
    (folder / "a" / "1.png").rename(folder / "b" / "1.png")
    seen.append(digest(folder))
    for seed in (0, 1):
        np.savez(npz, images=noise(3, 8, 8, 3, seed=seed), labels=[0, 0, 1])
        seen.append(digest(npz))
    assert len(set(seen)) == 6


# ------------------------------------------------------------------------------------ .npz
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (32, 32, 3), (64, 96, 3)])
def test_npz_images_follow_the_rule_of_image_files(tmp_path, shape):
    array = noise(5, *shape)
    np.savez(tmp_path / "s.npz", images=array, labels=np.arange(5) % 2)
    rgb = np.broadcast_to(array.reshape(5, *shape[:2], -1), (5, *shape[:2], 3))
    images = Images(tmp_path / "s.npz", 32)
    for i in range(5):
        assert np.array_equal(images[i], center_crop(Image.fromarray(rgb[i].copy()), 32))
    images = Images(tmp_path / "s.npz")  # as they are
    assert images.shape == shape[:2] and np.array_equal(images[4], rgb[4])


PIXELS = noise(6, 8, 8, 3)
LABELS = np.arange(6) % 3


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])  # ours, ADM's
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], LABELS.astype(">i8")])
@pytest.mark.parametrize("pixels", [PIXELS, 0 * PIXELS], ids=["noise", "black"])
def test_integer_labels_of_any_form_are_read(tmp_path, names, labels, pixels):
    np.savez(tmp_path / "s.npz", **dict(zip(names, (pixels, labels))))
    images = Images(tmp_path / "s.npz", 8)
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.labels.dtype == np.int64
    assert images.classes == ["0", "1", "2"] and np.array_equal(images[5], pixels[5])


def test_labels_of_a_byte_may_be_255(tmp_path):
    labels = np.array([255] * 6, np.uint8)
    np.savez(tmp_path / "s.npz", images=PIXELS, labels=labels)
    images = Images(tmp_path / "s.npz", 8)
    assert images.labels.tolist() == [255] * 6 and len(images.classes) == 256


@pytest.mark.parametrize("arrays", [
    {},
    dict(labels=LABELS.astype(float)),
    dict(labels=np.eye(3, dtype=int)[LABELS]),  # one-hot
    dict(labels=LABELS - 1),
    dict(labels=np.array(list("abcabc"))),
    dict(labels=LABELS.astype(np.uint64) + np.uint64(2**63)),  # beyond 64 bits with sign
    dict(labels=LABELS, classes=np.array(["a", "b"])),  # fewer than the labels
])  # fmt: skip
def test_other_labels_are_refused_where_they_are_needed_and_only_there(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", images=PIXELS, **arrays)
    images = Images(tmp_path / "s.npz", 8, labelled=False)
    assert len(images) == 6 and np.array_equal(images[5], PIXELS[5])
    with pytest.raises(UserError, match="s.npz: has images uint8 .*expected labels .or arr_1"):
        Images(tmp_path / "s.npz", 8)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("arrays,has", [
    (dict(x_train=PIXELS, y_train=LABELS), "['x_train', 'y_train']"),
    (dict(images=(PIXELS / 255).astype(np.float32)), "images float32 (6, 8, 8, 3)"),
    (dict(arr_0=PIXELS.transpose(0, 3, 1, 2)), "arr_0 uint8 (6, 3, 8, 8)"),
    (dict(images=noise(6, 8, 8, 4)), "images uint8 (6, 8, 8, 4)"),  # with alpha
    (dict(images=PIXELS // 128), "images uint8 (6, 8, 8, 3)"),  # 0 and 1
    (dict(images=PIXELS[:0]), "images uint8 (0, 8, 8, 3)"),
])  # fmt: skip
def test_other_images_are_refused_by_what_the_file_has(tmp_path, arrays, has, labelled):
    np.savez(tmp_path / "s.npz", **arrays)
    message = f"s.npz: has {has}; expected images (or arr_0), uint8 [N, H, W, 3], 0 to 255"
    with pytest.raises(UserError, match=re.escape(message)):
        Images(tmp_path / "s.npz", 8, labelled)


def test_bytes_to_floats_and_back_is_exact():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(from_uint8(x)), x)
    assert from_uint8(x).aminmax() == (-1, 1)


# ------------------------------------------------------------------------------------ the VAE
def test_the_shape_of_a_vae_is_read_off_its_weights(tmp_path):
    save_vae(tmp_path / "v.pt", TINY, 48, scale=0.7)
    vae = load_vae(tmp_path / "v.pt")
    assert (vae.scale, vae.image_size, vae.factor, vae.z_channels) == (0.7, 48, 2, 2)
    mean, logvar = vae.encode(torch.zeros(1, 3, 8, 8))
    assert mean.shape == logvar.shape == (1, 2, 4, 4) and vae.decode(mean).shape == (1, 3, 8, 8)
    vae.quant_conv.bias[2:] = torch.tensor([-1e3, 1e3])
    assert vae.encode(torch.zeros(1, 3, 8, 8))[1].aminmax() == (-30, 20)


def test_the_file_of_the_papers_vae_loads_with_the_weights_of_its_loss(tmp_path):
    with torch.device("meta"):
        state = AutoencoderKL(128, (1, 1, 2, 2, 4), 2, 16).state_dict()
    state = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}  # takes no memory
    state["loss.logvar"] = torch.zeros(())
    state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    torch.save(dict(state_dict=state, epoch=3, global_step=9), tmp_path / "ldm.ckpt")
    vae = load_vae(tmp_path / "ldm.ckpt")
    assert (vae.scale, vae.image_size, vae.factor, vae.z_channels) == (0.2325, 256, 16, 16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_vae_that_others_saved_has_the_pixels_of_ours(tmp_path, prefix):
    """Bare weights, in half precision, with prefixes and with weights of a loss."""
    saved = {prefix + k: v.half() for k, v in new_vae(TINY).state_dict().items()}
    saved[f"{prefix}loss.logvar"] = torch.zeros(())
    x = from_uint8(noise(1, 8, 8, 3))
    expected = new_vae(TINY).encode(x)[0]
    for ckpt in (saved, dict(model=saved), dict(state_dict=saved, epoch=3)):
        torch.save(ckpt, tmp_path / "v.pt")
        mean = load_vae(tmp_path / "v.pt").encode(x)[0]
        torch.testing.assert_close(mean, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("ckpt,message", [
    (dict(arch="resnet50", state_dict={}), "arch, state_dict (no 'encoder.conv_in.weight')"),
    ({f"layer{i}.0.conv.weight": torch.zeros(1) for i in range(99)}, "layer0.0.conv.weight, layer"),
    (dict(model={**new_vae(TINY).state_dict(), "extra": torch.zeros(1)}), "model (Error"),
])  # fmt: skip
def test_files_of_other_weights_are_not_a_vae(tmp_path, ckpt, message):
    torch.save(ckpt, tmp_path / "f.pt")
    message = re.escape(f"f.pt: not a usable VAE, it has {message}")
    with pytest.raises(UserError, match=f"{message}.{{,500}}$"):  # one line
        load_vae(tmp_path / "f.pt")


@pytest.mark.weights
def test_the_vae_runs_in_float32_under_autocast():
    vae = load_vae(DEMO_VAE)
    x = from_uint8(Images(DEMO_DATA, 32).images[:4].copy())
    mean, logvar = vae.encode(x)
    images = latents_to_images(vae, mean * vae.scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        for given, expected in zip(vae.encode(x), (mean, logvar)):
            assert torch.equal(given, expected)
        assert np.array_equal(latents_to_images(vae, mean * vae.scale), images)
    assert mean_error(images, to_uint8(x)) < 6


# ------------------------------------------------------------------------------------ the cache
def test_the_cache_holds_the_moments_of_the_crop_and_of_its_mirror_image(tmp_path, garments):
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    save_small_vae(tmp_path / "vae.pt")
    images, vae = Images(tmp_path / "s.npz", 32), load_vae(tmp_path / "vae.pt")
    vae.scale = 0.5
    encode_images(images, vae, tmp_path / "cache")

    cache = LatentCache(tmp_path / "cache")
    assert np.array_equal(cache.labels, images.labels) and cache.classes == images.classes
    assert cache.scale == 0.5 and cache.latent_shape == (8, 8, 8)
    moments = cache.moments(np.array([[0, 33], [59, 33]]), np.array([[0, 1], [1, 0]]))
    assert moments.shape == (2, 2, 16, 8, 8) and moments.dtype == np.float16
    for (i, flip), given in zip([(0, 0), (33, 1), (59, 1), (33, 0)], moments.reshape(4, 16, 8, 8)):
        x = from_uint8(images[i][None])
        expected = torch.cat(vae.encode(x.flip(-1) if flip else x), dim=1)[0]
        torch.testing.assert_close(torch.tensor(given).float(), expected, atol=2e-3, rtol=2e-3)
    pickled = pickle.dumps(cache)  # as a loader's worker gets it, which maps the files itself
    assert len(pickled) < 5000 and pickle.loads(pickled).latent_shape == (8, 8, 8)


def test_the_posterior_is_drawn_from_torchs_seed_with_the_mean_and_variance_of_the_moments():
    mean, logvar = torch.tensor([3.0, -2.0]), torch.tensor([-2.0, 0.0])
    moments = [x.half()[None, :, None, None].expand(20_000, 2, 2, 1) for x in (mean, logvar)]
    torch.manual_seed(0)
    draws = sample_posterior(*moments)
    assert draws.shape == (20_000, 2, 2, 1) and draws.dtype == torch.float32
    torch.testing.assert_close(draws.mean((0, 2, 3)), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var((0, 2, 3)).log(), logvar, atol=0.05, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(sample_posterior(*moments), draws)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with vae.pt and photos/ of 2,060 images of 4 px: three parts; three are broken."""
    folder = tmp_path_factory.mktemp("many")
    save_images(folder / "photos", [f"class {i % 3}/{i:04}.png" for i in range(2060)], size=4)
    for name in ("class 0/0003.png", "class 1/1024.png", "class 2/2057.png"):
        (folder / "photos" / name).write_bytes(b"broken")
    save_vae(folder / "vae.pt", TINY, 4)
    return folder


@pytest.fixture
def photos(many, tmp_path, monkeypatch):
    """The same folder under another name, as the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "vae.pt"):
        Path(name).symlink_to(many / name)


ENCODE = "vae.py encode --data photos --vae vae.pt --out"


@pytest.fixture(scope="module")
def whole(many):
    """The files of the cache that one process writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(many)
        run_in_process(f"{ENCODE} whole")
    return files_of(many / "whole")


def files_of(cache):
    return {path.name: path.read_bytes() for path in Path(cache).iterdir() if path.name != "lock"}


def test_an_unreadable_image_keeps_its_row_with_label_minus_1(photos, whole, many):
    cache, images = LatentCache(many / "whole"), Images("photos", 4)
    names = json.loads(whole["names.json"])
    left_out = [names[i] for i in np.flatnonzero(cache.labels < 0)]
    assert left_out == ["class 0/0003.png", "class 1/1024.png", "class 2/2057.png"]
    rows = np.flatnonzero(cache.labels >= 0)
    assert np.array_equal(cache.labels[rows], images.labels[rows])
    rows, vae = rows[::50], load_vae("vae.pt")
    expected = torch.cat(vae.encode(from_uint8(np.stack([images[i] for i in rows]))), dim=1)
    given = torch.tensor(cache.moments(rows, np.zeros_like(rows))).float()
    torch.testing.assert_close(given, expected, atol=5e-3, rtol=5e-3)


def test_two_processes_write_the_same_bytes_as_one(photos, start, whole):
    run_together(start, f"{ENCODE} cache", 2)
    assert files_of("cache") == whole


def test_a_killed_encoding_is_resumed_by_more_processes(photos, start, whole, run, refused):
    """Process 0 of 2 makes parts 0 and 2, and waits for part 1, which never comes."""
    process = start(f"{ENCODE} cache", rank=0, world=2)
    wait_for_parts(Path("cache"), 2)
    assert "cache: another command writes to it" in run(f"{ENCODE} cache", expect=2).err
    process.kill()
    process.join()
    made = {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.npy")}
    assert {path.name for path in made} == {"00000.npy", "00002.npy"}

    assert "cache: not there, not a latent cache, or" in refused("train.py --data cache --out x")
    other = f"{ENCODE} cache --image-size 8"
    assert "cache: is of other inputs or settings; give another --out" in refused(other)

    run_together(start, f"{ENCODE} cache", 3)
    run_in_process(f"{ENCODE} cache")  # of a complete cache: the same again
    assert files_of("cache") == whole
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in made.items())
    assert "cache: is of other inputs or settings" in refused(other)


@pytest.mark.weights
def test_the_mean_error_of_a_good_vae_is_printed_without_a_warning(tmp_path, garments, run):
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    out, _ = run(f"vae.py encode --data s.npz --vae {DEMO_VAE} --out cache")
    assert "cache/reconstructions.png" in out and "warning" not in out
    error = float(re.search(r"mean error of the VAE (\S+) of 2", out)[1])
    vae = load_vae(DEMO_VAE)
    images = garments[0][:, :, :, None].repeat(3, 3)
    decoded = to_uint8(vae.decode(vae.encode(from_uint8(images))[0]))
    # The command measures 16 of them.
    assert error == pytest.approx(np.abs(images / 127.5 - decoded / 127.5).mean(), rel=0.3)


@pytest.mark.weights
def test_the_bundled_images_bring_their_vae_however_their_path_is_written(monkeypatch):
    monkeypatch.chdir(DEMO_DATA.parent)
    images, vae = open_images_and_vae(DEMO_DATA.name, None, "cpu")
    assert len(images) == 10_000 and vae.path == DEMO_VAE


def test_a_class_without_readable_images_is_not_drawn_and_none_is_an_error(tmp_path, run):
    save_images(tmp_path, [f"photos/{c}/{i}.png" for c in "abc" for i in range(4)], size=32)
    for path in tmp_path.glob("photos/b/*.png"):
        os.truncate(path, 100)
    save_small_vae(tmp_path / "vae.pt")
    run(f"{ENCODE} cache")
    out, _ = run("train.py --data cache --steps 1 --batch-size 4 --sample-every 0")
    assert "1 of 3 classes have no images: b\n" in out
    draw = "sample.py --ckpt runs/train --steps 1 --refs 1 --out"
    message = "--class b: this model was trained on the classes a, c"
    assert message in run(f"{draw} b.png --class b", expect=2).err
    assert "(a, c; refs 1" in run(f"{draw} x.png --n 1").out
    run(f"{draw} s.npz --num 4")
    assert np.load("s.npz")["arr_1"].tolist() == [0, 2, 0, 2]

    for path in tmp_path.glob("photos/*/*.png"):
        os.truncate(path, 100)
    out, err = run(f"{ENCODE} none", expect=2)
    assert "vae.py: photos: none of its 12 images can be read" in err
    assert out.count("left out, not readable: ") == 12 and not Path("none/cache.json").exists()
