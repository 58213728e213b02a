"""Images and latents: reading every kind of image and data set, the latent cache, the VAE."""

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
from vae import encode_images, from_uint8, images_digest, latents_to_images, load_vae, open_images
from vae import open_images_and_vae, read_image
from vae import sample_posterior, to_uint8

SMALL = dict(channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=8)  # of 32 px, as the demo's
TINY = dict(channels=4, multipliers=(1, 1), blocks=1, z_channels=2)  # of 4 px


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


@pytest.mark.parametrize(
    "name", "a.jpg a.JPEG a.jpe a.jfif a.png a.webp a.bmp a.tif a.tiff".split()
)
def test_formats_are_read_as_they_were_saved(tmp_path, name):
    (tmp_path / "c").mkdir()
    options = dict(lossless=True) if name.endswith("webp") else dict(quality=95)
    Image.fromarray(gradient(32, 32)).save(tmp_path / "c" / name, **options)
    assert mean_error(open_images(tmp_path, 32)[0], gradient(32, 32)) < 3


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert mean_error(read_image(tmp_path / name), np.array([255, 0, 0])) < 3


def test_modes_are_converted_to_rgb(tmp_path):
    """Grey, 16-bit grey, palette, alpha, CMYK and a transparent palette keep their brightness."""
    folder = tmp_path / "c"
    folder.mkdir()
    rgb = Image.fromarray(gradient(32, 32))
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(grey).save(folder / "0grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1grey16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "2grey16.tif")
    rgb.quantize(256).save(folder / "3palette.png")
    half_transparent = rgb.convert("RGBA")
    lower_half = np.repeat(np.uint8([0, 255]), 16)[:, None].repeat(32, axis=1)
    half_transparent.putalpha(Image.fromarray(lower_half))
    half_transparent.save(folder / "4alpha.png")
    rgb.convert("CMYK").save(folder / "5cmyk.jpg", quality=95)
    transparent = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    transparent.putpalette([200, 100, 50] * 256)
    transparent.save(folder / "6transparent.png", transparency=0)

    images = open_images(tmp_path, 32)
    items = [images[i] for i in range(len(images))]
    assert len(items) == 7 and all(x.shape == (32, 32, 3) and x.dtype == np.uint8 for x in items)
    for item in items[:3]:
        assert np.abs(item.astype(int) - grey[..., None]).max() <= 1
    assert mean_error(items[3], gradient(32, 32)) < 6
    assert items[4][:16].max() == 0  # transparent is black
    assert np.array_equal(items[4][16:], gradient(32, 32)[16:])
    assert mean_error(items[5], gradient(32, 32)) < 12
    assert items[6].max() == 0


@pytest.mark.parametrize("dtype,white", [(np.int32, 65535), (np.float32, 1), (np.float32, 255)])
def test_grey_of_32_bits_has_no_fixed_white_and_is_not_guessed(tmp_path, dtype, white):
    ramp = np.linspace(0, white, 32)[None].repeat(32, axis=0)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: not a usable image .*convert it to 8 or 16 bits"):
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


def exif_block(*entries, tail=b""):
    """An EXIF block of (tag, type, count, value or offset)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    count = struct.pack("<H", len(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + count + packed + b"\0\0\0\0" + tail


TURNED = (0x0112, 3, 1, 6)  # the sound orientation "rotate by 90 degrees clockwise"
DAMAGED_EXIF = {
    "nothing": b"Exif\0\0",
    "nothing but the byte order": b"Exif\0\0II",
    "another byte order": b"Exif\0\0XX*\0\x08\0\0\0",
    "no TIFF header": b"Exif\0\0not a tiff header",
    "two headers": b"Exif\0\0" + exif_block(),
    "a pointer to nowhere": b"Exif\0\0II*\0\xff\xff\0\0",
    "a pointer to itself": b"Exif\0\0II*\0\0\0\0\0",
    "more entries than bytes": exif_block(TURNED)[:-10],
    "an orientation in letters": exif_block((0x0112, 2, 4, 0x636261)),
    "an orientation out of range": exif_block((0x0112, 3, 1, 99)),
    "an orientation of many numbers": exif_block((0x0112, 3, 200, 0xFFFFFFF)),
    "an orientation that is a fraction of zero": exif_block((0x0112, 5, 1, 26), tail=bytes(8)),
}
ODD_ENTRIES = {
    "a fraction outside": (0x0100, 5, 1, 0xFFFFFFF),
    "an unknown type": (0x0100, 77, 1, 0),
    "a maker's note outside": (0x927C, 7, 0xFFFFFFF, 0xFFFFFFF),
    "a pointer to EXIF outside": (0x8769, 4, 1, 0xFFFFFFF),
    "a pointer to GPS in letters": (0x8825, 2, 4, 0x636261),
    "a resolution that is a fraction of zero": (0x011A, 5, 1, 38),
    "text of no encoding": (0x010F, 2, 4, 0xFFFFFFFF),
}


def save_with_exif(path, block):
    """Write gradient(24, 32) as a JPEG with this EXIF block."""
    Image.fromarray(gradient(24, 32)).save(path, quality=95)
    data = path.read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    path.write_bytes(data[:2] + segment + data[2:])


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_pixels_are_read_whatever_the_exif_block_holds(tmp_path, kind):
    save_with_exif(tmp_path / "a.jpg", DAMAGED_EXIF[kind])
    Image.fromarray(gradient(24, 32)).save(tmp_path / "a.png", exif=DAMAGED_EXIF[kind])
    Image.fromarray(gradient(24, 32)).save(tmp_path / "a.webp", exif=DAMAGED_EXIF[kind])
    for name in ("a.jpg", "a.png", "a.webp"):
        assert mean_error(read_image(tmp_path / name), gradient(24, 32)) < 9


PILLOW_STOPS = pytest.mark.xfail(strict=True, reason="Pillow reads no entry after this one")


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_an_odd_entry_after_the_orientation_does_not_keep_it_from_being_applied(tmp_path, kind):
    block = exif_block(TURNED, ODD_ENTRIES[kind], tail=bytes(8))
    save_with_exif(tmp_path / "a.jpg", block)
    assert mean_error(read_image(tmp_path / "a.jpg"), np.rot90(gradient(24, 32), -1)) < 3


@pytest.mark.parametrize(
    "kind", [pytest.param("a fraction outside", marks=PILLOW_STOPS), *list(ODD_ENTRIES)[1:]]
)
def test_an_odd_entry_before_the_orientation_does_not_keep_it_from_being_applied(tmp_path, kind):
    block = exif_block(ODD_ENTRIES[kind], TURNED, tail=bytes(8))
    save_with_exif(tmp_path / "a.jpg", block)
    assert mean_error(read_image(tmp_path / "a.jpg"), np.rot90(gradient(24, 32), -1)) < 3


def test_long_texts_and_colour_profiles_of_png_are_read(tmp_path):
    image = Image.fromarray(gradient(24, 32))
    text = "x" * 2_000_000
    for method in ("add_text", "add_itxt"):
        info = PngImagePlugin.PngInfo()
        getattr(info, method)("parameters", text, zip=True)
        image.save(tmp_path / f"{method}.png", pnginfo=info)
    image.save(tmp_path / "profile.png", icc_profile=bytes(2_000_000))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 3
    for path in paths:
        assert np.array_equal(read_image(path), gradient(24, 32))


# ------------------------------------------------------------------------------------ crops


def test_crop_keeps_the_centre_and_the_proportions():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # the centre square is white
    assert center_crop(Image.fromarray(wide), 32)[:, 1:-1].min() > 250
    for height, width in ((33, 500), (500, 33), (32, 32), (31, 90), (7, 7)):
        assert center_crop(Image.fromarray(gradient(height, width)), 32).shape == (32, 32, 3)


def test_crop_halves_by_box_filter_as_adm_does():
    """A checkerboard, twice too large: a box filter leaves grey, sampling black or white."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    cropped = center_crop(Image.fromarray(np.stack([board] * 3, -1)), 32)
    assert np.unique(cropped).tolist() in ([127], [128])


# ------------------------------------------------------------------------------------ folders


def names_of(images, root):
    return [os.path.relpath(path, root) for path in images.files]


def test_a_folder_is_a_tree_of_classes(tmp_path):
    save_images(tmp_path, ["b/1.png", "b/deep/0.png", "a/x.png", "b/.hidden.png", ".git/x.png"])
    images = open_images(tmp_path, 32)
    assert images.classes == ["a", "b"] and images.labels.tolist() == [0, 1, 1]
    assert names_of(images, tmp_path) == ["a/x.png", "b/1.png", "b/deep/0.png"]
    assert images[0].shape == (32, 32, 3)  # a small image is enlarged
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images in this folder; remove it or fill it"):
        open_images(tmp_path, 32)
    with pytest.raises(UserError, match="empty: no class folders; expected .*empty/<class>/<image"):
        open_images(tmp_path / "empty", 32)


def test_files_of_other_suffixes_are_counted_in_one_line(tmp_path, capsys):
    save_images(tmp_path, ["a/0.jpg", "b/0.jpg"])
    for name in ("a/0.heic", "b/1.heic", "b/1.avif", "b/no suffix", "b/Thumbs.db", "b/.hidden"):
        (tmp_path / name).write_bytes(b"")
    assert len(open_images(tmp_path, 8)) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: left out, not images by their suffix: ")
    counts = {"'.heic': 2", "'.avif': 1", "'': 1", "'.db': 1"}
    assert set(re.search("{(.*)}", line)[1].split(", ")) == counts


def test_links_are_followed_at_any_depth_and_loops_are_not(tmp_path):
    """Training, which reads class folders, and fid.py, which does not, see the same images."""
    root, other = tmp_path / "root", tmp_path / "other"
    save_images(root, ["a/0.png", "b/deep/1.png"])
    save_images(other, ["2.png", "deeper/3.png", "4.png"])
    (root / "c").symlink_to(other)  # a class
    (root / "b" / "deep" / "link").symlink_to(other / "deeper")  # below a class
    (root / "a" / "one.png").symlink_to(other / "4.png")  # an image
    (root / "a" / "gone.png").symlink_to(other / "gone.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "deep" / "again").symlink_to(root / "b")
    (other / "deeper" / "back").symlink_to(other)
    (root / "a" / "itself.png").symlink_to(root / "a" / "itself.png")
    (root / "a" / "itself").symlink_to(root / "a" / "itself")
    (root / "itself").symlink_to(root / "itself")
    images = open_images(root, 8)
    expected = ["a/0.png", "a/one.png", "b/deep/1.png", "b/deep/link/3.png"]
    expected += ["c/2.png", "c/4.png", "c/deeper/3.png"]
    in_the_loop = ["b/deep/link/back/2.png", "b/deep/link/back/4.png"]
    assert sorted(names_of(images, root)) == sorted(expected + in_the_loop)
    assert images.classes == ["a", "b", "c"]
    assert open_images(root, 8, labelled=False).files == images.files


def test_the_digest_changes_with_the_images(tmp_path):
    """By it train.py knows whether the latents that it has are those of the images."""
    names = ["a/0.png", "a/1.png", "b/0.png"]
    save_images(tmp_path / "t", names)
    seen = [images_digest(open_images(tmp_path / "t", 8))]
    assert images_digest(open_images(tmp_path / "t", 8)) == seen[0]
    seen.append(images_digest(open_images(tmp_path / "t", 8, labelled=False)))
    save_images(tmp_path / "t", names[::-1])  # others, under the same names
    seen.append(images_digest(open_images(tmp_path / "t", 8)))
    (tmp_path / "t" / "a" / "1.png").rename(tmp_path / "t" / "b" / "1.png")
    seen.append(images_digest(open_images(tmp_path / "t", 8)))
    for seed in (0, 1):
        np.savez(tmp_path / "s.npz", images=noise(3, 8, 8, 3, seed=seed), labels=[0, 0, 1])
        seen.append(images_digest(open_images(tmp_path / "s.npz", 8)))
    assert len(set(seen)) == 6


# ------------------------------------------------------------------------------------ .npz


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (20, 28, 3), (64, 96, 3)])
def test_npz_images_follow_the_rule_of_image_files(tmp_path, shape):
    """They are cropped and resized to the size asked for; grey images become RGB."""
    array = noise(5, *shape)
    np.savez(tmp_path / "s.npz", images=array, labels=np.arange(5) % 2)
    rgb = np.broadcast_to(array.reshape(5, *shape[:2], -1), (5, *shape[:2], 3))
    images = open_images(tmp_path / "s.npz", 32)
    for i in range(5):
        assert np.array_equal(images[i], center_crop(Image.fromarray(rgb[i].copy()), 32))


def test_images_of_the_size_asked_for_or_of_no_size_are_unchanged(tmp_path):
    array = noise(3, 32, 32, 3)
    np.savez(tmp_path / "s.npz", images=array, labels=np.zeros(3, int))
    for size in (32, None):
        images = open_images(tmp_path / "s.npz", size)
        assert images.shape == (32, 32)
        assert all(np.array_equal(images[i], array[i]) for i in range(3))


def test_bundled_images_have_a_black_margin_of_two_pixels():
    images = open_images(DEMO_DATA, 32)
    assert len(images) == 10_000 and images.classes[1] == "trouser"
    assert np.bincount(images.labels).tolist() == [1000] * 10
    inside = np.zeros((32, 32), bool)
    inside[2:-2, 2:-2] = True
    assert images.images.shape[1:3] == (32, 32) and images.images[:, ~inside].max() == 0
    assert images.images[:100, 2].max() > 0  # some garments touch the edge of the original image


PIXELS = noise(6, 8, 8, 3)
LABELS = np.arange(6) % 3
LABELS_OF_SOME_FORM = {
    "integers": LABELS,
    "a column": LABELS[:, None],
    "bytes": LABELS.astype(np.uint8),
    "big-endian": LABELS.astype(">i8"),
}
LABELS_OF_NO_USE = {
    "none": None,
    "floats": LABELS.astype(float),
    "one-hot": np.eye(3, dtype=int)[LABELS],
    "another length": LABELS[:-1],
    "negative": LABELS - 1,
    "text": np.array(list("abcabc")),
    "identifiers": LABELS + 10**11,
    "beyond 64 bits with sign": LABELS.astype(np.uint64) + np.uint64(2**63),
}


def save_npz(path, **arrays):
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize("form", LABELS_OF_SOME_FORM)
def test_integer_labels_of_any_form_are_read(tmp_path, form):
    save_npz(tmp_path / "s.npz", images=PIXELS, labels=LABELS_OF_SOME_FORM[form])
    images = open_images(tmp_path / "s.npz", 8)
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.labels.dtype == np.int64
    assert images.classes == ["0", "1", "2"]


def test_adms_names_of_arrays_are_read(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=gradient(64, 96)[None], arr_1=np.array([3]))
    images = open_images(tmp_path / "s.npz", 32)
    assert images.labels.tolist() == [3] and images.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("form", LABELS_OF_NO_USE)
def test_other_labels_are_refused_where_they_are_needed_and_only_there(tmp_path, form):
    save_npz(tmp_path / "s.npz", images=PIXELS, labels=LABELS_OF_NO_USE[form])
    images = open_images(tmp_path / "s.npz", 8, labelled=False)
    assert len(images) == 6 and np.array_equal(images[5], PIXELS[5])
    with pytest.raises(UserError, match="s.npz: has images uint8 .*expected labels .or arr_1"):
        open_images(tmp_path / "s.npz", 8)


@pytest.mark.parametrize(
    "classes", [np.array(["a", "b"]), np.array("a")], ids=["fewer than the labels", "no list"]
)
def test_names_of_classes_that_do_not_fit_the_labels_are_refused(tmp_path, classes):
    save_npz(tmp_path / "s.npz", images=PIXELS, labels=LABELS, classes=classes)
    with pytest.raises(UserError, match=r"classes <U1 \(.*expected labels .*below len\(classes\)"):
        open_images(tmp_path / "s.npz", 8)
    assert len(open_images(tmp_path / "s.npz", 8, labelled=False)) == 6


FLOATS = (PIXELS / 255).astype(np.float32)
IMAGES_OF_NO_USE = {
    "other names": (dict(x_train=PIXELS, y_train=LABELS), "has ['x_train', 'y_train']"),
    "floats": (dict(images=FLOATS), "has images float32 (6, 8, 8, 3)"),
    "channels first": (dict(arr_0=PIXELS.transpose(0, 3, 1, 2)), "has arr_0 uint8 (6, 3, 8, 8)"),
    "one image": (dict(images=PIXELS[0, :, :, 0]), "has images uint8 (8, 8)"),
    "with alpha": (dict(images=noise(6, 8, 8, 4)), "has images uint8 (6, 8, 8, 4)"),
    "0 and 1": (dict(images=PIXELS // 128), "uint8 [N, H, W, 3], 0 to 255"),
}


@pytest.mark.parametrize("kind", IMAGES_OF_NO_USE)
@pytest.mark.parametrize("labelled", [True, False])
def test_other_images_are_refused_by_what_the_file_has_and_what_is_expected(
    tmp_path, kind, labelled
):
    arrays, has = IMAGES_OF_NO_USE[kind]
    np.savez(tmp_path / "s.npz", labels=LABELS, **arrays)
    if kind == "other names":
        np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError) as e:
        open_images(tmp_path / "s.npz", 8, labelled)
    assert f"{tmp_path}/s.npz: " in str(e.value) and has in str(e.value)
    assert "expected images (or arr_0), uint8 [N, H, W, 3], 0 to 255" in str(e.value)


def test_black_images_are_images(tmp_path):
    np.savez(tmp_path / "s.npz", images=0 * PIXELS, labels=LABELS)
    assert open_images(tmp_path / "s.npz", 8)[5].max() == 0


def test_an_npz_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "s.npz", images=PIXELS[:0], labels=LABELS[:0])
    with pytest.raises(UserError, match="s.npz: "):
        open_images(tmp_path / "s.npz", 8)


def test_bytes_to_floats_and_back_is_exact():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(from_uint8(x)), x)
    assert from_uint8(x).aminmax() == (-1, 1)


# ------------------------------------------------------------------------------------ the VAE


def weights_of_the_papers_vae():
    """Weights of KL-16's shapes, all zero, that take no memory."""
    with torch.device("meta"):
        state = AutoencoderKL(128, (1, 1, 2, 2, 4), 2, 16).state_dict()
    return {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}


def test_the_shape_of_a_vae_is_read_off_its_weights(tmp_path):
    save_vae(tmp_path / "v.pt", TINY, 48, scale=0.7)
    vae = load_vae(tmp_path / "v.pt")
    assert (vae.scale, vae.image_size, vae.factor, vae.z_channels) == (0.7, 48, 2, 2)
    with torch.inference_mode():
        mean, logvar = vae.encode(torch.zeros(1, 3, 8, 8))
        assert mean.shape == logvar.shape == (1, 2, 4, 4)
        assert vae.decode(mean).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_ldms_files_load_with_the_weights_of_its_loss_and_with_prefixes(tmp_path, prefix):
    state = weights_of_the_papers_vae()
    state["loss.logvar"] = torch.zeros(())
    state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    state = {prefix + k: v for k, v in state.items()}
    torch.save(dict(state_dict=state, epoch=3, global_step=9), tmp_path / "ldm.ckpt")
    vae = load_vae(tmp_path / "ldm.ckpt")
    assert (vae.scale, vae.image_size, vae.factor, vae.z_channels) == (0.2325, 256, 16, 16)


def test_a_vae_that_others_saved_has_the_pixels_of_ours(tmp_path):
    """Bare weights, in half precision, with prefixes and with weights of a loss."""
    saved = {"_orig_mod." + k: v.half() for k, v in new_vae(TINY).state_dict().items()}
    saved["_orig_mod.loss.logvar"] = torch.zeros(())
    x = from_uint8(noise(1, 8, 8, 3))
    expected = new_vae(TINY).encode(x)[0]
    for i, ckpt in enumerate((saved, dict(model=saved), dict(state_dict=saved, epoch=3))):
        torch.save(ckpt, tmp_path / f"{i}.pt")
        mean = load_vae(tmp_path / f"{i}.pt").encode(x)[0]
        torch.testing.assert_close(mean, expected, atol=5e-3, rtol=5e-3)


def test_files_of_other_weights_are_not_a_vae(tmp_path):
    weights = new_vae(TINY).state_dict()

    def check(message, ckpt):
        torch.save(ckpt, tmp_path / "f.pt")
        with pytest.raises(UserError) as e:
            load_vae(tmp_path / "f.pt")
        assert f"{tmp_path}/f.pt: not a usable VAE, it has {message}" in str(e.value)
        assert len(str(e.value)) < 600 and "\n" not in str(e.value)

    missing = "(no 'encoder.conv_in.weight')"
    check(f"model {missing}", dict(model={"ar.positions": torch.zeros(1)}))
    others = {f"layer{i}.0.conv.weight": torch.zeros(1) for i in range(99)}
    check(f"arch, state_dict {missing}", dict(arch="resnet50", state_dict=others))
    check("layer0.0.conv.weight, layer1.0.conv.weight, ", others)
    check("model (Error", dict(model={**weights, "extra": torch.zeros(1)}))
    assert '"extra"' in str(pytest.raises(UserError, load_vae, tmp_path / "f.pt").value)


def test_the_vae_runs_in_float32_under_autocast():
    vae = load_vae(DEMO_VAE)
    x = from_uint8(open_images(DEMO_DATA, 32).images[:4].copy())
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
    images, vae = open_images(tmp_path / "s.npz", 32), load_vae(tmp_path / "vae.pt")
    vae.scale = 0.5
    encode_images(images, vae, tmp_path / "cache")

    cache = LatentCache(tmp_path / "cache")
    assert np.array_equal(cache.labels, images.labels) and cache.classes == images.classes
    assert cache.scale == 0.5 and cache.latent_shape == (8, 8, 8)
    moments = cache.moments(np.array([[0, 33], [59, 33]]), np.array([[0, 1], [1, 0]]))
    assert moments.shape == (2, 2, 16, 8, 8) and moments.dtype == np.float16
    chosen = [(0, 0, moments[0, 0]), (33, 1, moments[0, 1])]
    chosen += [(59, 1, moments[1, 0]), (33, 0, moments[1, 1])]
    for i, flip, given in chosen:
        x = from_uint8(images[i][None])
        expected = torch.cat(vae.encode(x.flip(-1) if flip else x), dim=1)[0]
        torch.testing.assert_close(torch.tensor(given).float(), expected, atol=2e-3, rtol=2e-3)
    pickled = pickle.dumps(cache)  # as a loader's worker gets it, which maps the files itself
    assert len(pickled) < 5000 and pickle.loads(pickled).latent_shape == (8, 8, 8)


def test_the_posterior_is_drawn_from_torchs_seed_with_the_mean_and_variance_of_the_moments():
    mean, logvar = torch.tensor([3.0, -2.0]), torch.tensor([-2.0, 0.0])
    moments = torch.cat([mean, logvar]).half()[None, :, None, None].expand(20_000, 4, 2, 1)
    torch.manual_seed(0)
    draws = sample_posterior(moments)
    assert draws.shape == (20_000, 2, 2, 1) and draws.dtype == torch.float32
    torch.testing.assert_close(draws.mean((0, 2, 3)), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var((0, 2, 3)).log(), logvar, atol=0.05, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(sample_posterior(moments), draws)


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


@pytest.fixture
def start(photos, tmp_path):
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


def test_an_unreadable_image_keeps_its_row_with_label_minus_1(photos, whole, many):
    assert sorted(whole) == [
        "00000.npy", "00001.npy", "00002.npy",
        "cache.json", "labels.npy", "names.json", "reconstructions.png", "settings.json", "vae.pt",
    ]  # fmt: skip
    cache, images = LatentCache(many / "whole"), open_images("photos", 4)
    left_out = [Path(images.name(i)).name for i in np.flatnonzero(cache.labels < 0)]
    assert left_out == ["0003.png", "1024.png", "2057.png"]
    rest = cache.labels >= 0
    assert np.array_equal(cache.labels[rest], images.labels[rest])
    rows = np.flatnonzero(rest)[::50]
    vae = load_vae("vae.pt")
    expected = torch.cat(vae.encode(from_uint8(np.stack([images[i] for i in rows]))), dim=1)
    given = torch.tensor(cache.moments(rows, np.zeros_like(rows))).float()
    torch.testing.assert_close(given, expected, atol=5e-3, rtol=5e-3)


def test_two_processes_write_the_same_bytes_as_one(start, whole):
    run_together(start, f"{ENCODE} cache", 2)
    assert files_of("cache") == whole


def test_a_killed_encoding_is_resumed_by_another_number_of_processes(start, whole, command):
    """Process 0 of 2 makes parts 0 and 2, and waits for part 1, which never comes."""
    process = start(f"{ENCODE} cache", rank=0, world=2)
    deadline = time.monotonic() + 100
    while len(list(Path("cache").glob("*.npy"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)

    _, err = command(f"{ENCODE} cache", expect=2)
    assert "cache: another command writes to it" in err
    process.kill()
    process.join()
    made = {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.npy")}
    assert {path.name for path in made} == {"00000.npy", "00002.npy"}

    _, err = command("train.py --data cache", expect=2)
    assert "cache: not there, not a latent cache, or an unfinished one: python vae.py encode" in err
    _, err = command(f"{ENCODE} cache --image-size 8", expect=2)
    assert "cache: is of other inputs or settings; give another --out" in err

    run_together(start, f"{ENCODE} cache", 3)
    assert files_of("cache") == whole
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in made.items())
    command(f"{ENCODE} cache")  # of a complete cache: the same again
    assert files_of("cache") == whole
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in made.items())
    _, err = command(f"{ENCODE} cache --image-size 8", expect=2)
    assert "cache: is of other inputs or settings" in err


# ------------------------------------------------------------------------------------ the command


def test_encode_names_what_it_left_out_and_says_how_good_the_vae_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images("tree", ["a/0.png", "b/1.png", "b/2.png"], size=40)
    for name in ("a/0.jpg", "b/1.jpg"):
        Path("tree", name).write_bytes(b"not a picture")
    Image.fromarray(np.ones((40, 40), np.float32)).save("tree/b/float.tif")
    save_small_vae("v.pt")
    caches = []
    for workers in (0, 1):
        run_in_process(f"vae.py encode --data tree --vae v.pt --out {workers} --workers {workers}")
        out = capsys.readouterr().out
        for name in ("a/0.jpg", "b/1.jpg", "b/float.tif"):
            assert f"left out, not readable: 'tree/{name}'\n" in out
        assert f"wrote 3 of 6 images to {workers}; classes: a, b\n" in out
        assert "scale of the latents 1.0000, from its file\n" in out
        assert float(re.search(r"mean error of the VAE (\S+) of 2", out)[1]) > 0.1
        assert (
            "warning: images will be blurred (0.02 is sharp); go on with demo/train_vae.py" in out
        )
        caches.append(files_of(str(workers)))
    assert caches[0] == caches[1]


def test_the_mean_error_of_a_good_vae_is_printed_without_a_warning(
    tmp_path, garments, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", images=garments[0], labels=garments[1])
    run_in_process(f"vae.py encode --data s.npz --vae {DEMO_VAE} --out cache")
    out = capsys.readouterr().out
    assert "cache/reconstructions.png" in out and "warning" not in out
    error = float(re.search(r"mean error of the VAE (\S+) of 2", out)[1])
    vae = load_vae(DEMO_VAE)
    images = garments[0][:, :, :, None].repeat(3, 3)
    decoded = to_uint8(vae.decode(vae.encode(from_uint8(images))[0]))
    # The command measures 16 of them.
    assert error == pytest.approx(np.abs(images / 127.5 - decoded / 127.5).mean(), rel=0.3)


def test_images_of_your_own_need_a_vae_of_their_own(tmp_path, garments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", images=garments[0], labels=garments[1])
    for line in ("vae.py encode --data s.npz --out cache", "train.py --data s.npz"):
        run_in_process(line, expect=2)
        error = capsys.readouterr().err
        assert "--vae: name the VAE for s.npz: kl16, or one that demo/train_vae.py" in error


def test_the_bundled_images_bring_their_vae_however_their_path_is_written(monkeypatch):
    monkeypatch.chdir(DEMO_DATA.parent)
    images, vae = open_images_and_vae(DEMO_DATA.name, None, "cpu")
    assert len(images) == 10_000 and vae.path == DEMO_VAE


def test_encode_says_where_the_scale_is_from_and_which_sizes_mrar_needs(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save(new_vae(TINY).state_dict(), "bare.pt")
    np.savez("s.npz", images=PIXELS, labels=LABELS)
    encode = "vae.py encode --data s.npz --vae bare.pt"
    for size, fits in ((16, True), (20, False)):
        run_in_process(f"{encode} --image-size {size} --out {size}")
        out = capsys.readouterr().out
        assert "scale of the latents 0.2325, from the release: its file has none\n" in out
        side = size // 2
        assert (f"latents of {side} x {side}: MRAR needs a multiple of 4 (XS)" in out) == (not fits)


def test_none_readable_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tree/a").mkdir(parents=True)
    for i in range(3):
        Path(f"tree/a/{i}.jpg").write_bytes(b"\xff\xd8\xff cut")
    save_small_vae("v.pt")
    run_in_process("vae.py encode --data tree --vae v.pt --out cache", expect=2)
    captured = capsys.readouterr()
    assert "vae.py: tree: none of its 3 images can be read" in captured.err
    assert captured.out.count("left out, not readable: 'tree/a/") == 3
    assert not Path("cache/cache.json").exists()


def test_a_class_whose_files_are_all_unreadable_is_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images("photos", [f"{c}/{i}.png" for c in "ac" for i in range(4)], size=32)
    Path("photos/b").mkdir()
    Path("photos/b/0.jpg").write_bytes(b"\xff\xd8\xff cut")
    save_small_vae("vae.pt")
    run_in_process(f"{ENCODE} cache")
    run_in_process("train.py --data cache --steps 1 --batch-size 4 --sample-every 0")
    assert "1 of 3 classes have no images: b\n" in capsys.readouterr().out
    draw = "sample.py --ckpt runs/train --steps 1 --refs 1 --out"
    run_in_process(f"{draw} b.png --n 1 --class b", expect=2)
    error = capsys.readouterr().err
    assert "--class b: this model was trained on the classes a, c" in error
    run_in_process(f"{draw} s.npz --num 4")
    assert np.load("s.npz")["arr_1"].tolist() == [0, 2, 0, 2]


def test_encode_by_the_command_line(tmp_path, command):
    save_images(tmp_path / "tree", [f"class {i % 3}/{i}.png" for i in range(6)], size=32)
    save_small_vae(tmp_path / "own.pt")
    out, err = command("vae.py encode --data tree --vae own.pt --out cache")
    assert "wrote 6 of 6 images to cache" in out and "1/1" in err
    assert LatentCache(tmp_path / "cache").classes == ["class 0", "class 1", "class 2"]
    assert Image.open(tmp_path / "cache" / "reconstructions.png").width > 500
    for flags, message in (
        ("--data nothing", "nothing: no such folder or .npz of images"),
        ("--image-size 30", "--image-size 30: must be a multiple of 4 for own.pt"),
        ("--vae nothing", "nothing: No such file"),
    ):
        _, err = command(f"vae.py encode --data tree --vae own.pt --out c2 {flags}", expect=2)
        assert message in err and not (tmp_path / "c2").exists()
