"""Images in, latents out: every kind of image, both kinds of source, the cache, and the VAE's own commands."""
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vae import ARCHS, DEMO_DATA, AutoencoderKL, ImageFolder, LatentCache, center_crop, encode_source, from_uint8, latent_std, load_vae, open_source, posterior, to_uint8, write_whole


def gradient(h, w):
    """RGB: red grows to the right, green downwards."""
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([255 * x / max(1, w - 1), 255 * y / max(1, h - 1), np.full((h, w), 60)], axis=-1).astype(np.uint8)


def small_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(**ARCHS["small"]).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name,save", [
    ("a.jpg", dict(quality=95)), ("a.JPEG", dict(quality=95)), ("a.png", {}), ("a.webp", dict(lossless=True)),
])  # fmt: skip
def test_formats(tmp_path, name, save):
    (tmp_path / "c").mkdir()
    Image.fromarray(gradient(32, 32)).save(tmp_path / "c" / name, **save)
    error = np.abs(ImageFolder(tmp_path, 32)[0].astype(int) - gradient(32, 32))
    assert error.mean() < 3, "not the picture that was saved"


def test_modes(tmp_path):
    """Grey, 16-bit grey, palette, palette with transparency, alpha, CMYK: all come out RGB, with the brightness that was meant."""
    folder = tmp_path / "c"
    folder.mkdir()
    rgb = Image.fromarray(gradient(32, 32))
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(grey).save(folder / "0grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1grey16.png")
    rgb.quantize(256).save(folder / "2palette.png")
    half = rgb.convert("RGBA")
    half.putalpha(Image.fromarray((np.mgrid[0:32, 0:32][0] >= 16).astype(np.uint8) * 255))
    half.save(folder / "3alpha.png")
    rgb.convert("CMYK").save(folder / "4cmyk.jpg", quality=95)
    transparent = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    transparent.putpalette([200, 100, 50] * 256)
    transparent.save(folder / "5transparent.png", transparency=0)
    items = list(ImageFolder(tmp_path, 32)[i] for i in range(6))
    assert all(x.shape == (32, 32, 3) and x.dtype == np.uint8 for x in items)
    for i in (0, 1):
        assert np.abs(items[i].astype(int) - grey[..., None]).max() <= 1
    assert np.abs(items[2].astype(int) - gradient(32, 32)).mean() < 6
    assert items[3][:16].max() == 0 and np.array_equal(items[3][16:], gradient(32, 32)[16:])  # transparent is black
    assert np.abs(items[4].astype(int) - gradient(32, 32)).mean() < 12
    assert items[5].max() == 0


def test_exif_rotation(tmp_path):
    (tmp_path / "c").mkdir()
    image, exif = Image.fromarray(gradient(32, 32)), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "c" / "a.png", exif=exif)
    assert np.array_equal(ImageFolder(tmp_path, 32)[0], np.rot90(gradient(32, 32), -1))


def test_crop_keeps_the_centre_and_the_proportions():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # the centre square is white
    assert center_crop(Image.fromarray(wide), 32)[:, 1:-1].min() > 250
    for h, w in ((33, 500), (500, 33), (32, 32), (31, 90), (7, 7)):
        assert center_crop(Image.fromarray(gradient(h, w)), 32).shape == (32, 32, 3)


def test_crop_halves_by_box_as_adm_does():
    """A one-pixel checkerboard, twice too large: the box filter leaves grey, sampling would leave black or white."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    assert np.unique(center_crop(Image.fromarray(np.stack([board] * 3, -1)), 32)).tolist() in ([127], [128])


def test_folder_is_a_tree_of_classes(tmp_path):
    for path in ("b/1.png", "b/deep/0.png", "a/x.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient(8, 8)).save(tmp_path / path)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("not an image")
    (tmp_path / ".git").mkdir()
    source = ImageFolder(tmp_path, 32)
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 1, 1]
    assert source[0].shape == (32, 32, 3)  # a small image in a folder is enlarged
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        ImageFolder(tmp_path, 32)


@pytest.mark.parametrize("border,shape", [(0, (28, 28)), (255, (28, 28, 1)), (77, (20, 28, 3))])
def test_small_npz_images_are_padded_not_enlarged(tmp_path, border, shape):
    images = np.full((5, *shape), border, np.uint8)
    images[:, 5:-5, 5:-5] = 130
    np.savez(tmp_path / "s.npz", images=images, labels=np.arange(5) % 2)
    source = open_source(tmp_path / "s.npz", 32)
    x, y = source[0], (32 - shape[0]) // 2
    assert x.shape == (32, 32, 3) and (x[:y] == border).all() and (x[:, :2] == border).all() and (x[-y:] == border).all()
    assert np.array_equal(x[y : y + shape[0], 2:30], np.broadcast_to(images[0].reshape(*shape[:2], -1), (*shape[:2], 3)))


def test_bundled_images_get_a_black_margin_even_where_a_garment_touches_the_edge():
    source = open_source(DEMO_DATA, 32)
    assert len(source) == 10_000 and source.classes[1] == "trouser" and np.bincount(source.labels).tolist() == [1000] * 10
    touching = next(i for i in range(100) if source.images[i][0].max() > 0)
    assert source[touching][:2].max() == 0 and source[touching][2].max() > 0


def test_large_npz_images_are_cropped_and_adm_names_are_known(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=gradient(64, 96)[None], arr_1=np.array([3]))
    source = open_source(tmp_path / "s.npz", 32)
    assert np.array_equal(source[0], center_crop(Image.fromarray(gradient(64, 96)), 32))
    assert source.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("arrays", [dict(images=np.zeros((2, 8, 8), np.uint8)), dict(images=np.zeros((2, 8, 8)), labels=np.zeros(2, int)), dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(3, int))])
def test_npz_that_is_no_source(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match="s.npz"):
        open_source(tmp_path / "s.npz", 32)


def test_pixels_round_trip():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(from_uint8(x)), x)
    assert from_uint8(x).aminmax() == (-1, 1)


# ------------------------------------------------------------------------------------------ the cache


def test_cache_holds_the_moments_of_the_crop_and_of_its_mirror_image(tmp_path, garments):
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    source, vae = open_source(tmp_path / "s.npz", 32), small_vae()
    vae.scale = 0.5
    encode_source(source, vae, tmp_path / "cache", batch_size=7)
    cache = LatentCache(tmp_path / "cache")
    assert isinstance(cache.moments, np.memmap) and cache.moments.shape == (60, 2, 16, 8, 8) and cache.moments.dtype == np.float16
    assert np.array_equal(cache.labels, source.labels) and cache.classes == source.classes and cache.scale == 0.5 and cache.latent_shape == (8, 8, 8)
    assert (tmp_path / "cache" / "reconstructions.png").exists() and not (tmp_path / "cache.partial").exists()
    for i, flip in ((0, 0), (33, 1)):
        x = from_uint8(source[i][None])
        mean, logvar = vae.encode(x.flip(-1) if flip else x)
        noise = torch.randn(1, 8, 8, 8)
        expected = (mean + (0.5 * logvar).exp() * noise) * 0.5
        torch.testing.assert_close(posterior(torch.tensor(cache.moments[i : i + 1, flip]), noise) * cache.scale, expected, atol=2e-3, rtol=2e-3)
    assert len(pickle.dumps(cache)) < 1000 and np.array_equal(pickle.loads(pickle.dumps(cache)).moments, cache.moments)  # a worker maps it too
    with pytest.raises(ValueError, match="exists already"):
        encode_source(source, vae, tmp_path / "cache")


def test_half_a_cache_is_no_cache(tmp_path):
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="vae.py encode"):
        LatentCache(tmp_path / "c")
    np.save(tmp_path / "c" / "moments.npy", np.zeros((3, 2, 4, 2, 2), np.float16))
    np.save(tmp_path / "c" / "labels.npy", np.array([0, 1]))
    (tmp_path / "c" / "meta.json").write_text(json.dumps(dict(classes=["a", "b"], scale=1.0, image_size=32, vae="v", vae_digest="")))
    with pytest.raises(ValueError, match="do not belong together"):
        LatentCache(tmp_path / "c")


# ------------------------------------------------------------------------------------------ the autoencoder


@pytest.mark.parametrize("arch", ["small", "kl16"])
def test_shapes_are_read_off_a_file(tmp_path, arch):
    with torch.device("meta"):
        vae = AutoencoderKL(**ARCHS[arch])
    vae = vae.to_empty(device="cpu")
    torch.save(dict(model=vae.state_dict(), scale=0.7, image_size=48), tmp_path / "v.pt")
    loaded = load_vae(tmp_path / "v.pt")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in vae.parameters()]
    assert (loaded.scale, loaded.image_size, loaded.factor) == (0.7, 48, 16 if arch == "kl16" else 4)


def test_wrong_vae_files(tmp_path):
    torch.save(dict(model={"ar.positions": torch.zeros(1)}), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a VAE checkpoint"):
        load_vae(tmp_path / "model.pt")
    state = small_vae().state_dict()
    torch.save(dict(model=state | {"extra.weight": torch.zeros(1)}), tmp_path / "extra.pt")
    with pytest.raises(ValueError, match="not an LDM autoencoder"):
        load_vae(tmp_path / "extra.pt")


def test_scale_makes_unit_variance(tmp_path, garments):
    """latent_std is the standard deviation of posterior samples over every element; scale = 1 / it."""
    np.savez(tmp_path / "s.npz", images=garments[0], labels=garments[1])
    source, vae = open_source(tmp_path / "s.npz", 32), small_vae()
    std = latent_std(vae, source, "cpu")
    mean, logvar = vae.encode(from_uint8(np.stack([source[i] for i in range(60)])))
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    assert std == pytest.approx(z.std().item(), rel=0.02)


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "f"
    write_whole(path, lambda f: f.write(b"old"))

    def half(f):
        f.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_whole(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_bad_image_is_named_from_a_worker_too(tmp_path, command):
    (tmp_path / "tree" / "c").mkdir(parents=True)
    Image.fromarray(gradient(40, 40)).save(tmp_path / "tree" / "c" / "0.png")
    (tmp_path / "tree" / "c" / "1.jpg").write_bytes(b"not a picture")
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "v.pt")
    for workers in (0, 1):
        _, err = command(f"vae.py encode --data tree --vae v.pt --out cache --workers {workers}", expect=2)
        assert err.strip().splitlines()[-1].startswith("vae.py: tree/c/1.jpg: cannot be read as an image")
        assert not (tmp_path / "cache").exists()


def test_commands(tmp_path, garments, command):
    """Train a VAE and encode with it, on a folder of images, as a user does."""
    for i, (image, label) in enumerate(zip(*garments)):
        (tmp_path / "tree" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "tree" / f"class {label}" / f"{i}.png")
    out, _ = command("vae.py train --data tree --out own.pt --steps 4 --batch-size 8")
    assert "latent standard deviation" in out and (tmp_path / "own.png").exists()
    vae = load_vae(tmp_path / "own.pt")
    assert f"scale {vae.scale:.4f}" in out
    out, _ = command("vae.py encode --data tree --vae own.pt --out cache")
    assert "60 images of 10 classes to cache" in out
    cache = LatentCache(tmp_path / "cache")
    assert cache.classes[3] == "class 3" and cache.scale == vae.scale and np.isfinite(np.asarray(cache.moments)).all()
    _, err = command("vae.py encode --data nothing --vae own.pt --out c2", expect=2)
    assert "nothing: no such image source" in err
    _, err = command("vae.py encode --data tree --vae own.pt --out c2 --image-size 30", expect=2)
    assert "multiple of 4" in err
