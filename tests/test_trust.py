"""What goes wrong for users: it ends in one line that says what to do, or in the right result."""

import dataclasses
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_vae import files_of, refused, run, save_small_vae  # noqa: F401

import train
from model import SIZES, TransDiff, UserError, atomic_write, load_checkpoint, load_file, lock
from vae import PART, Images, LatentCache, center_crop, encode_images
from vae import from_uint8, load_vae, read_image

DEMO = ROOT / "demo"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with source.npz of 40 images, vae.pt, cache/ and run/ema.pt, an untrained model."""
    folder = tmp_path_factory.mktemp("encoded")
    images = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    names = list("abcd")
    np.savez(folder / "source.npz", images=images, labels=np.arange(40) % 4, classes=names)
    save_small_vae(folder / "vae.pt")
    vae = load_vae(folder / "vae.pt")
    encode_images(Images(folder / "source.npz", 32), vae, folder / "cache")
    config = dataclasses.replace(SIZES["XS"], num_classes=4)
    info = dict(config=dataclasses.asdict(config), step=1, classes=names, vae_digest=vae.digest)
    (folder / "run").mkdir()
    shutil.copy(folder / "vae.pt", folder / "run")
    weights = {k: v.half() for k, v in TransDiff(config).state_dict().items()}
    torch.save(dict(info, model=weights), folder / "run" / "ema.pt")
    return folder


@pytest.fixture
def small(encoded, tmp_path, monkeypatch):
    """A copy of `encoded`, as the current folder."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def odd_images(root):
    """Make a class of unusual images and one of broken ones, of odd names; returns the broken."""
    good, bad = root / os.fsdecode(b"good \xff\xfe"), root / "\x1b[31mbad\n"
    good.mkdir(parents=True)
    bad.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    rgb.convert("CMYK").save(good / "cmyk.jpg")
    Image.new("RGB", (1, 1), "red").save(good / "pixel.png")
    Image.new("RGB", (20_000, 50), "blue").save(good / "strip.png")
    rgb.save(good / "häßlich 画像 🙂.PNG")
    rgb.save(good / f"{'long' * 60}.png")
    # These are not images, and are passed over.
    rgb.save(good / ".hidden.png")
    (good / "notes.txt").write_text("not an image")
    (bad / "more.txt").write_text("not an image")
    os.mkfifo(good / "pipe.jpg")
    # These cannot be read, except for fine.png.
    jpeg = (good / "cmyk.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("this is no picture")
    Image.fromarray(noise[..., 0].astype(np.float32)).save(bad / "float.tif")
    # Of 60,000 x 60,000 pixels, by its header.
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zipfile.crc32(header).to_bytes(4, "big")
    (bad / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    rgb.save(bad / "fine.png")
    return ["bomb.png", "cut.jpg", "empty.jpg", "float.tif", "text.jpg"]


def test_unusual_images_are_encoded_and_broken_ones_are_named(tmp_path, run):
    broken = odd_images(tmp_path / "photos")
    save_small_vae(tmp_path / "vae.pt")
    out, _ = run("vae.py encode --data photos --vae vae.pt --out cache")
    assert "photos: left out: 2 not images by their suffix '.txt'; 1 hidden" in out
    assert "wrote 6 of 11 images to cache; classes: " in out
    named = [line for line in out.splitlines() if line.startswith("left out, not readable: ")]
    assert [line.split("/")[-1].strip("'") for line in named] == broken
    assert float(re.search(r"mean error of the VAE (\S+) of 2", out)[1]) > 0.1
    assert "warning: images will be blurred" in out  # the VAE is not trained
    assert Image.open("cache/reconstructions.png").width > 500

    cache, images = LatentCache("cache"), Images("photos", 32)
    readable = np.flatnonzero(cache.labels >= 0)
    assert cache.classes == ["\x1b[31mbad\n", "good \\udcff\\udcfe"]
    assert cache.labels[readable].tolist() == [0] + [1] * 5
    pixels = from_uint8(np.stack([images[i] for i in readable]))  # reads them all
    expected = torch.cat(load_vae("vae.pt").encode(pixels), dim=1)
    moments = torch.tensor(cache.moments(readable, 0 * readable)).float()
    torch.testing.assert_close(moments, expected, atol=5e-3, rtol=5e-3)
    run("vae.py encode --data photos --vae vae.pt --out again --workers 1")
    assert files_of("again") == files_of("cache")
    # Training never reads the others: their moments are not numbers.
    run("train.py --data cache --steps 2 --batch-size 6 --sample-every 1")
    assert "\\udcff" in run("sample.py --ckpt runs/train --class 1 --n 1 --steps 1").out


@pytest.mark.parametrize("name,damage,message", [
    ("cache.json", Path.unlink, "cache: not there, not a latent cache, or an unfinished one"),
    ("cache.json", lambda path: path.write_text("[]"), "cache: not a usable latent cache"),
    ("labels.npy", Path.unlink, "labels.npy"),
    ("labels.npy", lambda path: os.truncate(path, 0), "cache: not a usable latent cache"),
    ("00000.npy", Path.unlink, "cache/00000.npy"),
    ("00000.npy", lambda path: os.truncate(path, 1000), "00000.npy has another size"),
])  # fmt: skip
def test_damaged_caches_are_refused(name, damage, message, small, run):
    damage(Path("cache", name))
    err = run("train.py --data cache --steps 1 --out run", expect=2).err
    assert message in err.splitlines()[-1] and not Path("run/last.pt").exists()


# ------------------------------------------------------------------------------------ checkpoints
class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def change(state, **weights):
    return dict(state, model={**state["model"], **weights})


# What bad.pt holds, from the bytes and the content of a sound file.
@pytest.mark.parametrize("make,message", [
    (lambda data, _: data[: len(data) // 2], "not a usable checkpoint"),
    (lambda data, _: data[:9999] + bytes([data[9999] ^ 4]) + data[10000:], "a checksum is wrong"),
    (lambda data, _: b"", "not a usable checkpoint"),
    (lambda data, _: pickle.dumps(dict(model=Trap())), "not a usable checkpoint"),
    (lambda _, state: [torch.zeros(3)], "it holds a list, not a dict of weights"),
    (lambda _, state: dict(state_dict={}, epoch=3), "it has state_dict, epoch"),
    (lambda _, state: change(state, surplus=torch.zeros(1)), "surplus"),
    (lambda _, state: change(state, cond_positions=torch.zeros(1, 64, 96)), "cond_positions"),
    (lambda _, state: change(state, **{"\x1b[31m" + "x" * 10**6: torch.zeros(1)}), "not a usable"),
    (lambda _, state: {**state, "config": {**state["config"], "ar_depth": 9}}, "not a usable"),
])  # fmt: skip
def test_damaged_and_foreign_checkpoints_are_refused(make, message, small, refused):
    content = make(Path("run/ema.pt").read_bytes(), load_file("run/ema.pt"))
    if isinstance(content, bytes):
        Path("bad.pt").write_bytes(content)
    else:
        torch.save(content, "bad.pt")
    error = refused("sample.py --ckpt bad.pt")
    assert message in error and "bad.pt: " in error and not Path("trapped").exists()


# ------------------------------------------------------------------------------------ flags
DRAW = "sample.py --class 1 --n 1 --refs 1 --steps 1"
ENCODE = "vae.py encode --out x --vae vae.pt"
MEASURE = f"fid.py --samples source.npz --net {DEMO}/features.pt"


@pytest.mark.weights
@pytest.mark.parametrize("line,message", [
    ("sample.py --class 1000", "--class 1000: this model was trained on the classes t-shirt, tr"),
    ("sample.py --refs 16", "refs 16: this model draws chains of 1 to 4 images"),
    ("sample.py --ckpt run/ema.pt --refs 4", "refs 4: this model draws chains of 1 to 1 images"),
    ("sample.py --steps 2.5", "--steps: invalid number value: '2.5'"),
    ("sample.py --n 99999999999999999999", "--n: 99999999999999999999: must be from 1"),
    ("sample.py --n 2 --num 20", "--num: not allowed with argument --n"),
    ("sample.py --num 20 --out x.png", "must end in .npz"),
    ("sample.py --num 20 --show-chain", "--show-chain: draws a picture; run it without torchrun"),
    ("sample.py --cfg nan", "--cfg: nan: must be from 0"),
    ("sample.py --s1 0 --s2 0", "s1, s2: adams-bashforth has none"),
    ("sample.py --device tpu", "--device tpu: not a usable device"),
    ("sample.py --num 10 --out source.npz", "--out source.npz: is there already; remove it or"),
    ("sample.py --out picture.jpg", "--out picture.jpg: must end in .npz or /, or in .png"),
    (f"{DRAW} --out folder.png", "folder.png: could not be written ([Errno 21] Is a directory"),
    (f"{DRAW} --out file/x.png", "file/x.png: could not be written ([Errno 17] File exists"),
    ("sample.py --ckpt folder.png", "folder.png/ema.pt: No such file or directory"),
    ("sample.py --ckpt vae.pt", "vae.pt: not a usable TransDiff model"),
    ("sample.py --ckpt run/ema.pt --vae run/ema.pt", "run/ema.pt: not a usable VAE"),
    ("sample.py --pretrained B --ckpt x", "--ckpt: not allowed with argument --pretrained"),
    ("train.py --warmup 100", "--warmup: 100: must be from 0 to 1"),
    ("train.py --out file --data cache", "file: File exists"),
    (f"train.py --data cache --init {DEMO}/mrar.pt", "was trained on the latents of another VAE"),
    ("vae.py encode --data source.npz", "--vae: name the VAE for source.npz: kl16, or one that"),
    (f"{ENCODE} --data source.npz --image-size 31", "--image-size 31: must be a multiple of 4"),
    (f"{ENCODE} --data gone", "gone: no such folder or .npz of images"),
    (f"{ENCODE} --data source.npz --vae source.npz", "source.npz: not a usable checkpoint"),
    ("diversity.py --seeds 0", "--seeds: 0: must be from 1"),
    (f"{MEASURE} --ref gone.npz", "gone.npz: No such file or directory"),
])  # fmt: skip
def test_wrong_flags_are_refused(line, message, small, refused):
    (small / "folder.png").mkdir()
    (small / "file").write_text("")
    assert message in refused(line)


# ------------------------------------------------------------------------------------ the machine
def test_a_full_disk_is_one_line_and_the_command_resumes_with_room(small, run, command):
    def run_on_small_disk(kilobytes, line):
        _, err = command(line, expect=2, file_size=1024 * kilobytes)
        return err.strip().splitlines()[-1]

    encode = "vae.py encode --data source.npz --vae vae.pt --out new"
    assert "new/00000.npy: could not be written (" in run_on_small_disk(50, encode)
    run(encode)
    assert files_of("new")["00000.npy"] == files_of("cache")["00000.npy"]

    run("train.py --data cache --steps 2 --batch-size 4 --sample-every 0 --cooldown 0")
    before = Path("runs/train/last.pt").read_bytes()
    error = run_on_small_disk(1000, "train.py --resume --steps 3")
    assert "runs/train/" in error and "could not be written (" in error
    assert Path("runs/train/last.pt").read_bytes() == before
    run("train.py --resume --steps 3")

    draw = "sample.py --ckpt run/ema.pt --num 40 --steps 1 --out s.npz"
    message = "s.npz.partial/00000.npy: could not be written ("
    assert message in run_on_small_disk(50, draw) and not Path("s.npz").exists()
    run(draw)
    assert np.load("s.npz")["arr_0"].shape == (40, 32, 32, 3)
    assert not list(small.rglob("*.tmp"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "f"
    atomic_write(path, lambda f: f.write(b"old"))

    def write_half(f):
        f.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="f: could not be written .disk full"):
        atomic_write(path, write_half)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    with open(path, "rb") as reader:
        atomic_write(path, lambda f: f.write(b"new"))
        assert reader.read() == b"old"  # whoever reads the old file is not disturbed
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks_can_be_written_to(monkeypatch, tmp_path):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre answers

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("line,dataset", [
    ("train.py --data cache --steps 9 --batch-size 4 --workers 1", train.Chains),
    ("vae.py encode --data source.npz --vae vae.pt --out new --workers 1", Images),
])  # fmt: skip
def test_a_reader_that_is_killed_is_one_line(line, dataset, small, run, monkeypatch):
    kill = lambda self, i: os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(dataset, "__getitem__", kill)
    assert "a process that reads data died (out of memory?); lower" in run(line, expect=2).err


# ------------------------------------------------------------------------------------ limits
@pytest.mark.parametrize("labels", [[0] * 5, list(range(300)), [0, 0, 1]])
def test_one_class_many_classes_and_a_class_of_one_image(labels, tiny, tmp_path, run, monkeypatch):
    """Also with a batch that is larger than the data set."""
    monkeypatch.setattr(train, "OUR_SAMPLING", train.OUR_SAMPLING.replace(steps=2))  # to save time
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=images, labels=labels)
    save_small_vae(tmp_path / "v.pt")
    run("train.py --data s.npz --vae v.pt --steps 2 --batch-size 12 --sample-every 2")
    assert Path("runs/train/samples-0000002.png").exists()
    run(f"sample.py --ckpt runs/train/ema.pt --class {max(labels)} --n 1 --steps 1")
    if len(set(labels)) > 1:
        err = run("finetune_mrar.py --data s.npz --vae v.pt --steps 1", expect=2).err
        assert "no class has 4 images to train on" in err


def test_chains_of_64(tiny, tmp_path, run):
    images = np.random.default_rng(0).integers(0, 255, (128, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=images, labels=np.arange(128) % 2)
    save_small_vae(tmp_path / "v.pt")
    flags = "--data s.npz --vae v.pt --steps 1 --batch-size 2 --sample-every 0"
    run(f"train.py {flags}")
    run(f"finetune_mrar.py {flags} --refs 64")
    assert "refs 64" in run("sample.py --ckpt runs/mrar/ema.pt --class 1 --n 1 --steps 1").out


def synthetic_cache(path, n):
    """Make a cache of n images of the XS shape that takes no disk: sparse files of zeros."""
    path.mkdir()
    shape = (2, 16, 8, 8)
    for i in range(-(-n // PART)):
        rows = min(PART, n - i * PART)
        np.lib.format.open_memmap(path / f"{i:05d}.npy", "w+", np.float16, (rows, *shape))
    np.save(path / "labels.npy", np.arange(n) % 1000)
    info = dict(classes=[str(i) for i in range(1000)], vae_digest="", images="")
    (path / "cache.json").write_text(json.dumps(dict(shape=(n, *shape), scale=1.0, info=info)))


@pytest.mark.slow
@pytest.mark.parametrize("refs", [1, 4])
def test_a_million_images_take_little_more_time_and_memory_than_ten_thousand(tmp_path, refs):
    """Memory without the pages of the files, which the system may take back: labels, order."""

    def megabytes():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    results = {}
    for n in (10_000, 1_000_000):
        synthetic_cache(tmp_path / str(n), n)
        before, began = megabytes(), time.process_time()
        cache = LatentCache(tmp_path / str(n))
        images, _ = train.split(cache, 0)
        chains = train.Chains(cache, images, refs=refs, batch_size=256, seed=0)
        for step in range(20):
            chains[step]
        results[n] = time.process_time() - began, megabytes() - before
    print(results)
    assert results[1_000_000][0] < results[10_000][0] + 20
    assert results[1_000_000][1] < max(0, results[10_000][1]) + 100


# ----------------------------------------------------------------------------------- fuzz and kills
def corrupt(data, rng):
    """Change bytes in one way: flip bits; overwrite, cut off, remove, double or zero a piece."""
    n = rng.choice([1, 4, 50, 1000])
    near_end = rng.randrange(min(len(data), 400))
    at = rng.choice([rng.randrange(len(data)), near_end, len(data) - 1 - near_end])
    before, piece, after = data[:at], data[at : at + n], data[at + n :]
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    others = rng.randbytes(len(piece)), b"", piece + piece, bytes(len(piece))
    return rng.choice([bytes(flipped), before, *(before + other + after for other in others)])


def fuzz(path, read, rounds):
    """read(path) succeeds, or refuses in one line that names the file, or the folder of a cache."""
    rng, sound = random.Random(path.name), path.read_bytes()
    for i in range(rounds):
        path.write_bytes(corrupt(sound, rng))
        try:
            read(path)
        except (UserError, OSError) as e:
            assert len(str(e).splitlines()) == 1, (i, str(e))
            assert str(path) in str(e) or f"{path.parent}: " in str(e), (i, str(e))
    path.write_bytes(sound)


@pytest.mark.parametrize("rounds", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_corrupted_files_are_refused_or_read_correctly(small, rounds):
    before = sorted(small.rglob("*"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker"})
    for kind in ("jpg", "png", "webp", "gif", "tif"):
        path = small / f"image.{kind}"
        image.save(path, exif=exif)
        fuzz(path, lambda path: center_crop(read_image(path), 32), rounds)
        path.unlink()
    for name in ("00000.npy", "labels.npy", "cache.json"):
        read = lambda path: LatentCache(path.parent).moments(np.arange(40), np.zeros(40, int))
        fuzz(small / "cache" / name, read, rounds)
    for path, load in ((small / "run" / "ema.pt", load_checkpoint), (small / "vae.pt", load_vae)):
        expected = {k: v.clone() for k, v in load(path).state_dict().items()}

        def load_and_compare(path):
            state = load(path).state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in state.items()), "other weights"

        fuzz(path, load_and_compare, rounds)

    read_all = lambda images: [images[i] for i in range(len(images))]
    path = small / "source.npz"
    fuzz(path, lambda path: read_all(Images(path, labelled=False)), rounds)
    for save in (np.savez, np.savez_compressed):
        save(path, **np.load(path))
        fuzz(path, lambda path: read_all(Images(path, 32)), rounds)
    assert sorted(small.rglob("*")) == before, "a file was written"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encode", "train"])
def test_ten_kills_of_encoding_and_training(small, kind):
    """At random moments. Each finished run equals one that was left alone."""
    rng = random.Random(0)
    images = np.random.default_rng(0).integers(0, 255, (4000, 32, 32, 3), dtype=np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(4000) % 4)
    first, again = "vae.py encode --data many.npz --vae vae.pt", ""
    if kind == "train":
        every = "--save-every 5 --log-every 5 --sample-every 0"
        first = f"train.py --data cache --steps 150 --batch-size 8 {every}"
        again = "train.py --resume"

    def start(out):
        script, *flags = (again if Path(out, "last.pt").exists() else first).split()
        argv = [sys.executable, ROOT / script, *flags, "--out", out]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=open("err", "w"))

    def result(folder):
        if kind == "encode":
            return files_of(folder)
        return {k: v.tolist() for k, v in load_file(Path(folder, "last.pt"))["model"].items()}

    def compare():
        killed = result("killed")
        assert all(killed[name] == data for name, data in result("whole").items())

    began = time.time()
    assert start("whole").wait() == 0
    seconds = time.time() - began
    kills = 0
    while kills < 10:
        process = start("killed")
        try:
            early, late = rng.uniform(2.0, 5.0), rng.uniform(0.3 * seconds, seconds)
            process.wait(late if kills % 2 else early)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            kills += 1
        process.wait()
        err = Path("err").read_text()
        assert process.returncode in (0, -9, -15, -2, 130, 143), err
        assert "Traceback" not in err or process.returncode < 0, err
        # Finished, perhaps killed just after that: compare, and start anew.
        if process.returncode == 0 or Path("killed", "cache.json").exists():
            compare()
            shutil.rmtree("killed")
        for path in Path("killed").glob("*.pt"):
            load_file(path)
    assert start("killed").wait() == 0
    compare()
