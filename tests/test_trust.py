"""What goes wrong for users: each case ends in one line that says what to do, or in the right
result."""

import dataclasses
import errno
import json
import os
import pickle
import random
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
from in_process import run_in_process
from PIL import Image
from test_vae import files_of, save_small_vae

import train
from model import SIZES, TransDiff, UserError, atomic_write, load_checkpoint, load_file, lock
from vae import PART, AutoencoderKL, ImageArray, LatentCache, center_crop, encode_images
from vae import from_uint8, load_vae, open_images, open_part, read_image

DEMO = ROOT / "demo"


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused("sample.py --n 0") runs a command in this process, in tmp_path; returns its message.

    The command has to exit with status 2, end with one short line, and write no file.
    """
    monkeypatch.chdir(tmp_path)

    def call(line):
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        run_in_process(line, expect=2)
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert len(message) < 500, message
        assert sorted(tmp_path.rglob("*")) == before, "the command left a file behind"
        return message

    return call


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with source.npz of 40 images, vae.pt, cache/ and run/ema.pt, an untrained model."""
    folder = tmp_path_factory.mktemp("encoded")
    images = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    names = list("abcd")
    np.savez(folder / "source.npz", images=images, labels=np.arange(40) % 4, classes=names)
    save_small_vae(folder / "vae.pt")
    vae = load_vae(folder / "vae.pt")
    encode_images(open_images(folder / "source.npz", 32), vae, folder / "cache")
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


# ------------------------------------------------------------------------------------ images


def odd_images(root):
    """Make a class folder of unusual images and one of broken ones; returns the broken names."""
    good, bad = root / "good", root / "bad"
    good.mkdir(parents=True)
    bad.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb = rgba.convert("RGB")
    rgb.save(good / "plain.jpg")
    rgb.convert("CMYK").save(good / "cmyk.jpg")
    Image.fromarray((noise[..., 0].astype(np.uint16) * 257)).save(good / "grey16.png")
    rgba.quantize(16).save(good / "palette.png", transparency=3)
    rgb.save(good / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(good / "animated.webp", save_all=True, append_images=[rgb.rotate(90)])
    Image.new("RGB", (1, 1), "red").save(good / "pixel.png")
    Image.new("RGB", (20_000, 50), "blue").save(good / "strip.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(good / "turned.JPG", exif=exif)
    rgb.save(good / "häßlich 画像 🙂.png")
    rgb.save(good / f"{'long' * 60}.png")
    # These are not images, and are passed over.
    rgb.save(good / ".hidden.png")
    (good / "notes.txt").write_text("not an image")
    (good / "round").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / ".cache").mkdir()
    # These cannot be read, except for fine.png.
    jpeg = (good / "plain.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("this is no picture")
    # Of 60,000 x 60,000 pixels, by its header.
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    checksum = zipfile.crc32(header).to_bytes(4, "big")
    chunk = (13).to_bytes(4, "big") + header + checksum
    (bad / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (bad / os.fsdecode(b"not utf-8 \xff\xfe.png")).write_bytes(b"")
    rgb.save(bad / "fine.png")
    return ["bomb.png", "cut.jpg", "empty.jpg", "not utf-8 \\udcff\\udcfe.png", "text.jpg"]


def test_unusual_images_are_encoded_and_broken_ones_are_named(tmp_path, capsys, monkeypatch):
    broken = odd_images(tmp_path / "photos")
    save_small_vae(tmp_path / "vae.pt")
    monkeypatch.chdir(tmp_path)
    run_in_process("vae.py encode --data photos --vae vae.pt --out cache")
    out = capsys.readouterr().out
    assert "photos: left out, not images by their suffix: {'.txt': 1}" in out
    assert "wrote 12 of 17 images to cache" in out
    named = [line for line in out.splitlines() if line.startswith("left out, not readable: ")]
    assert [line.split("bad/")[1].strip("'") for line in named] == broken

    cache, images = LatentCache("cache"), open_images("photos", 32)
    readable = np.flatnonzero(cache.labels >= 0)
    assert cache.classes == ["bad", "good"] and cache.labels[readable].tolist() == [0] + [1] * 11
    pixels = from_uint8(np.stack([images[i] for i in readable]))  # reads them all
    expected = torch.cat(load_vae("vae.pt").encode(pixels), dim=1)
    moments = torch.tensor(cache.moments(readable, 0 * readable)).float()
    torch.testing.assert_close(moments, expected, atol=5e-3, rtol=5e-3)
    # Training never reads the others: their moments are not numbers.
    run_in_process("train.py --data cache --steps 2 --batch-size 12 --sample-every 0")


# ------------------------------------------------------------------------------------ caches


def test_damaged_caches_are_refused(small, refused):
    shutil.copytree("cache", "sound")

    def check(message, name, damage):
        shutil.rmtree("cache")
        shutil.copytree("sound", "cache")
        damage(Path("cache", name))
        error = refused("train.py --data cache --steps 1 --out run")
        assert message in error and "cache" in error
        assert not Path("run/last.pt").exists()

    def edit(change):
        return lambda path: np.save(path, change(np.load(path)))

    check(
        "not there, not a latent cache, or an unfinished one: python vae.py",
        "cache.json",
        Path.unlink,
    )
    check("not a usable latent cache", "cache.json", lambda path: path.write_text("{"))
    check("not a usable latent cache", "cache.json", lambda path: path.write_text("[]"))
    check("labels.npy", "labels.npy", Path.unlink)
    check("not a usable latent cache", "labels.npy", lambda path: path.write_bytes(b""))
    check("00000.npy", "00000.npy", Path.unlink)


def test_a_cache_that_was_cut_is_one_line(small, capsys):
    os.truncate("cache/00000.npy", 1000)
    run_in_process("train.py --data cache --steps 1", expect=2)
    assert "train.py: cache/00000.npy: not a usable latent cache" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ checkpoints


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_damaged_and_foreign_checkpoints_are_refused(small, refused):
    state = load_file("run/ema.pt")

    def save_with(change, **others):
        weights = dict(state["model"])
        change(weights)
        torch.save(dict(state, model=weights, **others), "bad.pt")

    def check(message, command="sample.py --ckpt bad.pt"):
        error = refused(command)
        assert message in error and "bad.pt" in error

    sound = Path("run/ema.pt").read_bytes()
    middle = len(sound) // 2
    Path("bad.pt").write_bytes(sound[:middle])
    check("not a usable checkpoint")
    Path("bad.pt").write_bytes(sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :])
    check("damaged: a checksum is wrong")
    Path("bad.pt").write_bytes(b"")
    check("not a usable checkpoint")
    torch.save(Trap(), "bad.pt")
    check("not a usable checkpoint")
    Path("bad.pt").write_bytes(pickle.dumps(dict(model=Trap())))
    check("not a usable checkpoint")
    check("not a usable checkpoint", "sample.py --ckpt run/ema.pt --vae bad.pt")
    check("not a usable checkpoint", "train.py --data cache --init bad.pt")
    assert not Path("trapped").exists()

    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}, "epoch": 3}, "bad.pt")
    check("not a usable TransDiff model, it has state_dict, epoch")
    torch.save([torch.zeros(3)], "bad.pt")
    check("it holds a list, not a dict of weights")
    save_with(lambda weights: weights.pop("cond_positions"))
    check("cond_positions")
    save_with(lambda weights: weights.update(surplus=torch.zeros(1)))
    check("surplus")
    save_with(lambda weights: weights.update(cond_positions=torch.zeros(1, 64, 96)))
    check("cond_positions")
    save_with(lambda weights: None, config={**state["config"], "ar_depth": 9})
    check("not a usable TransDiff model")
    save_with(lambda weights: weights.update({"\x1b[31m" + "x" * 10**6: torch.zeros(1)}))
    check("not a usable TransDiff model")
    assert "this model draws chains of 1 to 1 images" in refused(
        "sample.py --ckpt run/ema.pt --refs 4"
    )
    assert "run/ema.pt: not a usable VAE" in refused("sample.py --ckpt run/ema.pt --vae run/ema.pt")
    assert "vae.pt: not a usable TransDiff model" in refused("sample.py --ckpt vae.pt")


# ------------------------------------------------------------------------------------ flags

DRAW = "sample.py --class 1 --n 1 --refs 1 --steps 1"
ENCODE = "vae.py encode --out x --vae vae.pt"
MEASURE = f"fid.py --samples source.npz --net {DEMO}/features.pt"
FLAGS = [
    ("sample.py --class 1000", "--class 1000: this model was trained on the classes t-shirt, tr"),
    ("sample.py --class trousers", "--class trousers: this model was trained on the classes t-sh"),
    ("sample.py --class -1", "--class"),
    ("sample.py --refs 16", "refs 16: this model draws chains of 1 to 4 images"),
    ("sample.py --steps 0", "--steps: 0: must be from 1"),
    ("sample.py --steps 2.5", "--steps: invalid number value: '2.5'"),
    ("sample.py --n 0", "--n: 0: must be from 1"),
    ("sample.py --n 99999999999999999999", "--n: 99999999999999999999: must be from 1"),
    ("sample.py --cfg -1", "--cfg: -1: must be from 0"),
    ("sample.py --cfg nan", "--cfg: nan: must be from 0"),
    ("sample.py --cfg inf", "--cfg: inf: must be from 0"),
    ("sample.py --cfg much", "--cfg: invalid number value: 'much'"),
    ("sample.py --cfg 2 2", "cfg [2.0, 2.0]: give one number, or one for each of 4 images"),
    ("sample.py --cfg-below 2", "--cfg-below: 2: must be from 0 to 1"),
    ("sample.py --s1 nan", "--s1: nan: must be from 0"),
    ("sample.py --s2 -0.1", "--s2: -0.1: must be from 0"),
    ("sample.py --seed -1", "--seed: -1: must be from 0"),
    ("sample.py --batch-size 0", "--batch-size: 0: must be from 1"),
    ("sample.py --dtype fp16", "--dtype: invalid choice: 'fp16'"),
    ("sample.py --device tpu", "--device tpu: not a usable device"),
    ("sample.py --out .", "--out .: must end in"),
    (f"{DRAW} --out folder.png", "folder.png: could not be written ([Errno 21] Is a directory"),
    (f"{DRAW} --out file/x.png", "file/x.png: could not be written ([Errno 17] File exists"),
    ("sample.py --ckpt folder.png", "folder.png/ema.pt: No such file or directory"),
    ("finetune_mrar.py --refs 3", "--refs: invalid choice: 3"),
    ("finetune_mrar.py --init gone.pt", "--init gone.pt: not there; run train.py first"),
    ("finetune_mrar.py --init vae.pt", "vae.pt: not a usable TransDiff model"),
    ("train.py --batch-size 0", "--batch-size: 0: must be from 1"),
    ("train.py --lr nan", "--lr: nan: must be from 0"),
    ("train.py --lr -1", "--lr: -1: must be from 0"),
    ("train.py --warmup 100", "--warmup: 100: must be from 0 to 1"),
    ("train.py --ema 1.5", "--ema: 1.5: must be from 0 to 1"),
    ("train.py --workers -1", "--workers: -1: must be from 0"),
    ("train.py --seed one", "--seed: invalid number value: 'one'"),
    ("train.py --resume --out nothing", "nothing/last.pt: No such file or directory"),
    ("train.py --out file --data cache", "file: File exists"),
    ("train.py --data file --vae vae.pt", "file: no such folder or .npz of images"),
    ("train.py --data nowhere", "nowhere: not there, not a latent cache, or an unfinished one"),
    ("train.py --data cache --batch-size 8 --accumulate 3", "a multiple of 1 processes x --accum"),
    ("train.py --data cache --vae vae.pt", "cache: is a cache; leave out --vae"),
    (f"train.py --data cache --init {DEMO}/mrar.pt", "was trained on the latents of another VAE"),
    ("vae.py", "the following arguments are required: command"),
    ("vae.py train --data source.npz", "invalid choice: 'train'"),
    (f"{ENCODE} --data source.npz --image-size 64 --out cache", "cache: is of other inputs or set"),
    (f"{ENCODE} --data source.npz --image-size 31", "--image-size 31: must be a multiple of 4"),
    (f"{ENCODE} --data gone", "gone: no such folder or .npz of images"),
    (f"{ENCODE} --data vae.pt", "vae.pt: no such folder or .npz of images"),
    (f"{ENCODE} --data source.npz --vae run/ema.pt", "run/ema.pt: not a usable VAE, it has"),
    (f"{ENCODE} --data source.npz --vae source.npz", "source.npz: not a usable checkpoint"),
    ("diversity.py --seeds 0", "--seeds: 0: must be from 1"),
    ("figures.py similarity --class bag --steps 1 --out folder.png", "could not be written ([Errno"),
    ("fid.py", "required: --samples"),
    (f"{MEASURE} --ref gone.npz", "gone.npz: No such file or directory"),
    (f"{MEASURE} --ref source.npz --workers -3", "--workers: -3: must be from 0"),
]  # fmt: skip


@pytest.mark.parametrize("line,message", FLAGS)
def test_wrong_flags_are_refused(line, message, small, refused):
    (small / "folder.png").mkdir()
    (small / "file").write_text("")
    assert message in refused(line)


# ------------------------------------------------------------------------------------ the machine

# python SCRIPT LIMIT sample.py ...: no file may grow beyond LIMIT bytes.
SMALL_DISK = """
import os, resource, sys
limit = int(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
script = __import__(os.path.basename(sys.argv[0])[:-3])
script.run_main(script.main)
"""


def test_a_full_disk_is_one_line_and_the_command_resumes_with_room(small, command):
    (small / "full.py").write_text(SMALL_DISK)

    def run_on_small_disk(limit, line):
        script, *flags = line.split()
        _, err = command([small / "full.py", limit, ROOT / script, *flags], expect=2)
        return err.strip().splitlines()[-1]

    encode = "vae.py encode --data source.npz --vae vae.pt --out new"
    error = run_on_small_disk(50_000, encode)
    assert "new/00000.npy: could not be written (" in error
    run_in_process(encode)
    assert files_of("new")["00000.npy"] == files_of("cache")["00000.npy"]

    steps = "--batch-size 4 --save-every 1 --sample-every 0 --cooldown 0"
    run_in_process(f"train.py --data cache --steps 2 {steps}")
    before = Path("runs/train/last.pt").read_bytes()
    error = run_on_small_disk(1_000_000, "train.py --resume --steps 3")
    assert "runs/train/" in error and "could not be written (" in error
    assert Path("runs/train/last.pt").read_bytes() == before
    run_in_process("train.py --resume --steps 3")

    draw = "sample.py --ckpt run/ema.pt --num 40 --steps 1 --out s.npz"
    error = run_on_small_disk(50_000, draw)
    assert "s.npz.partial/00000.npy: could not be written (" in error
    assert not Path("s.npz").exists()
    run_in_process(draw)
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


def test_ctrl_c_is_one_line(small, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: signal.raise_signal(signal.SIGINT))
    run_in_process("vae.py encode --data source.npz --vae vae.pt --out new", expect=130)
    err = capsys.readouterr().err
    assert "vae.py: interrupted" in err and "Traceback" not in err


def test_a_file_system_without_locks_can_be_written_to(monkeypatch, tmp_path):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre answers

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("line,dataset", [
    ("train.py --data cache --steps 9 --batch-size 4 --workers 1", train.Chains),
    ("vae.py encode --data source.npz --vae vae.pt --out new --workers 1", ImageArray),
])  # fmt: skip
def test_a_reader_that_is_killed_is_one_line(line, dataset, small, monkeypatch, capfd):
    kill = lambda self, i: os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(dataset, "__getitem__", kill)
    run_in_process(line, expect=2)
    assert "a process that reads data died (out of memory?); lower --w" in capfd.readouterr().err


def test_pipes_are_not_images_and_odd_names_stop_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["line\nbreak", "\x1b[31mred", os.fsdecode(b"\xff\xfe")]
    for name in names:
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(Path("photos", name, "a.png"))
    os.mkfifo("photos/line\nbreak/pipe.jpg")
    save_small_vae("vae.pt")
    run_in_process("vae.py encode --data photos --vae vae.pt --out cache")
    assert len(LatentCache("cache").labels) == 3
    run_in_process("train.py --data cache --steps 1 --batch-size 3 --sample-every 1")
    run_in_process("sample.py --ckpt runs/train --class 1 --n 1 --steps 1")
    assert "\\udcff" in capsys.readouterr().out  # of the name that is not UTF-8


# ------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "labels", [[0] * 5, list(range(300)), [0, 0, 1]], ids=["one class", "300 classes", "one image"]
)
def test_one_class_many_classes_and_a_class_of_one_image(labels, tmp_path, monkeypatch, capsys):
    """Also with a batch that is larger than the data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "XS_SAMPLING", train.XS_SAMPLING.replace(steps=2))  # to save time
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 32, 32), dtype=np.uint8)
    np.savez("s.npz", images=images, labels=labels)
    save_small_vae("v.pt")
    run_in_process("train.py --data s.npz --vae v.pt --steps 2 --batch-size 12 --sample-every 2")
    assert Path("runs/train/samples-0000002.png").exists()
    run_in_process(f"sample.py --ckpt runs/train/ema.pt --class {max(labels)} --n 1 --steps 1")
    if len(set(labels)) > 1:
        run_in_process("finetune_mrar.py --data s.npz --vae v.pt --steps 1", expect=2)
        error = capsys.readouterr().err
        assert "no class has 4 images to train on" in error


def test_chains_of_64(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (128, 32, 32), dtype=np.uint8)
    np.savez("s.npz", images=images, labels=np.arange(128) % 2)
    save_small_vae("v.pt")
    flags = "--data s.npz --vae v.pt --steps 1 --batch-size 2 --sample-every 0"
    run_in_process(f"train.py {flags}")
    run_in_process(f"finetune_mrar.py {flags} --refs 64")
    run_in_process("sample.py --ckpt runs/mrar/ema.pt --class 1 --n 1 --steps 1")
    assert "refs 64" in capsys.readouterr().out


def synthetic_cache(path, n):
    """Make a cache of n images of the XS shape that takes no disk: sparse files of zeros."""
    path.mkdir()
    shape = (2, 16, 8, 8)
    for i in range(-(-n // PART)):
        rows = min(PART, n - i * PART)
        np.lib.format.open_memmap(path / f"{i:05d}.npy", "w+", np.float16, (rows, *shape))
    np.save(path / "labels.npy", np.arange(n) % 1000)
    info = dict(classes=[str(i) for i in range(1000)], vae_digest="", images="")
    record = dict(shape=(n, *shape), scale=1.0, info=info)
    (path / "cache.json").write_text(json.dumps(record))


# python -c CODE ROOT CACHE REFS prints the seconds of start-up and 20 batches, and their KB.
MEASURE_LOADING = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import train, vae
start = time.time()
cache = vae.LatentCache(sys.argv[2])
images, _ = train.split(cache.labels, 0)
chains = train.Chains(cache, images, refs=int(sys.argv[3]), batch_size=256, seed=0)
for step in range(20):
    chains[step]
print(time.time() - start, re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("refs", [1, 4])
def test_a_million_images_take_little_more_time_and_memory_than_ten_thousand(tmp_path, refs):
    """Memory without the pages of the files, which the system may take back: labels, order."""
    results = {}
    for n in (10_000, 1_000_000):
        synthetic_cache(tmp_path / str(n), n)
        argv = [sys.executable, "-c", MEASURE_LOADING, ROOT, tmp_path / str(n), str(refs)]
        result = subprocess.run(argv, capture_output=True, text=True, check=True)
        seconds, kilobytes = result.stdout.split()
        results[n] = float(seconds), int(kilobytes) / 1000
    print(results)
    assert results[1_000_000][0] < results[10_000][0] + 20
    assert results[1_000_000][1] < results[10_000][1] + 100  # MB


# ----------------------------------------------------------------------------------- fuzz and kills


def corrupt(data, rng):
    """Change bytes in one way: flip bits; overwrite, cut off, remove, double or zero a piece."""
    data = bytearray(data)
    kind = rng.randrange(6)
    n = rng.choice([1, 4, 50, 1000])
    near_end = rng.randrange(min(len(data), 400))
    at = rng.choice([rng.randrange(len(data)), near_end, len(data) - 1 - near_end])
    piece = data[at : at + n]
    if kind == 0:
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + n] = rng.randbytes(len(piece))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + n]
    elif kind == 4:
        data[at:at] = piece
    else:
        data[at : at + n] = bytes(len(piece))
    return bytes(data)


def fuzz(path, read, rounds, seed):
    """Corrupt the file `rounds` times and read it; returns the number of refusals.

    read() has to succeed, or to raise a UserError or OSError of one line that names the file, or
    the folder of the cache.
    """
    rng = random.Random(seed)
    refusals = 0
    sound = path.read_bytes()
    for i in range(rounds):
        path.write_bytes(corrupt(sound, rng))
        open_part.cache_clear()
        try:
            read()
        except (UserError, OSError) as e:
            assert len(str(e).splitlines()) == 1, (i, str(e))
            assert str(path) in str(e) or f"{path.parent}: " in str(e), (i, str(e))
            refusals += 1
    path.write_bytes(sound)
    return refusals


def fuzz_everything(folder, rounds):
    refusals = {}
    before = sorted(folder.rglob("*"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    for kind in ("jpg", "png", "webp", "gif", "tif"):
        path = folder / f"image.{kind}"
        image.save(path, exif=exif)
        refusals[kind] = fuzz(path, lambda: center_crop(read_image(path), 32), rounds, 1)
        path.unlink()

    def read_cache():
        cache = LatentCache(folder / "cache")
        cache.moments(np.arange(40), np.zeros(40, int))

    for name in ("00000.npy", "labels.npy", "cache.json"):
        refusals[name] = fuzz(folder / "cache" / name, read_cache, rounds, 2)
    for name, load in (("run/ema.pt", load_checkpoint), ("vae.pt", load_vae)):
        expected = load(folder / name).state_dict()
        expected = {k: v.clone() for k, v in expected.items()}

        def load_and_compare():
            state = load(folder / name).state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in state.items()), "other weights"

        refusals[name] = fuzz(folder / name, load_and_compare, rounds, 3)

    def read_all(images):
        return [images[i] for i in range(len(images))]

    path = folder / "source.npz"
    refusals["npz"] = fuzz(path, lambda: read_all(open_images(path, 32)), rounds, 4)
    read_unlabelled = lambda: read_all(open_images(path, labelled=False))
    refusals["npz without labels"] = fuzz(path, read_unlabelled, rounds, 5)
    np.savez_compressed(path, **np.load(path))
    refusals["compressed npz"] = fuzz(path, lambda: read_all(open_images(path, 32)), rounds, 6)
    assert sorted(folder.rglob("*")) == before, "a file was written"
    return refusals


def test_corrupted_files_are_refused_or_read_correctly(small):
    fuzz_everything(small, rounds=12)


@pytest.mark.slow
def test_many_corrupted_files(small):
    print(fuzz_everything(small, rounds=500))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encode", "train"])
def test_random_kills_of_encoding_and_training(small, kind):
    """Ten times SIGKILL, SIGTERM or SIGINT at random moments.

    Each finished run equals one that was left alone.
    """
    rng = random.Random(0)
    images = np.random.default_rng(0).integers(0, 255, (4000, 32, 32, 3), dtype=np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(4000) % 4)
    first = again = "vae.py encode --data many.npz --vae vae.pt --out"
    if kind == "train":
        every = "--save-every 5 --log-every 5 --sample-every 0"
        first = f"train.py --data cache --steps 150 --batch-size 8 {every} --out"
        again = "train.py --resume --out"

    def start(line, out):
        script, *flags = line.split()
        argv = [sys.executable, ROOT / script, *flags, out]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def start_or_resume():
        return start(again if Path("killed", "last.pt").exists() else first, "killed")

    def compare():
        if kind == "encode":
            whole, killed = (files_of(folder) for folder in ("whole", "killed"))
            assert all(killed[name] == data for name, data in whole.items())
            return
        whole, killed = (
            load_file(Path(folder, "last.pt"))["model"] for folder in ("whole", "killed")
        )
        assert all(torch.equal(v, killed[k]) for k, v in whole.items())

    began = time.time()
    process = start(first, "whole")
    process.communicate()
    seconds = time.time() - began
    kills = 0
    assert process.returncode == 0
    while kills < 10:
        process = start_or_resume()
        try:
            early, late = rng.uniform(2.0, 5.0), rng.uniform(0.3 * seconds, seconds)
            process.wait(late if kills % 2 else early)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            kills += 1
        err = process.communicate()[1]
        assert process.returncode in (0, -9, -15, -2, 130, 143), err
        assert "Traceback" not in err or process.returncode < 0, err
        # Finished, perhaps killed just after that: compare, and start anew.
        if process.returncode == 0 or Path("killed", "cache.json").exists():
            compare()
            shutil.rmtree("killed")
        if kind == "train":
            for path in Path("killed").glob("*.pt"):
                load_file(path)
    process = start_or_resume()
    process.communicate()
    assert process.returncode == 0
    compare()
