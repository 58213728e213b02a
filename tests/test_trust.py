"""What goes wrong for users: each case ends in one line that says what to do, or in the right result."""

import dataclasses
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
from test_vae import save_small_vae

import diversity
import sample
import train
from model import SAMPLING, SIZES, TransDiff, load_checkpoint, load_file
from vae import (
    AutoencoderKL,
    Images,
    LatentCache,
    center_crop,
    encode_images,
    from_uint8,
    load_vae,
    read_image,
)

DEMO = ROOT / "demo"


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused("sample.py --n 0") runs a command in this process, in tmp_path, and returns its message.

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
    """A folder with source.npz of 40 images, vae.pt, cache/ and run/ema.pt, an untrained model of them."""
    folder = tmp_path_factory.mktemp("encoded")
    images = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "source.npz", images=images, labels=np.arange(40) % 4, classes=np.array(list("abcd")))
    save_small_vae(folder / "vae.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the cache records the path of the VAE
        vae = load_vae("vae.pt")
        encode_images(Images("source.npz", 32), vae, "cache")
    config = dataclasses.replace(SIZES["XS"], num_classes=4)
    info = dict(config=dataclasses.asdict(config), step=1, classes=list("abcd"), vae_digest=vae.digest)
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


# ------------------------------------------------------------------------------------------ images


def odd_images(root):
    """Make a class folder of unusual images and one of broken images; returns the names of the broken ones."""
    good, bad = root / "good", root / "bad"
    good.mkdir(parents=True), bad.mkdir()
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
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])  # 60,000 x 60,000 pixels
    checksum = zipfile.crc32(header).to_bytes(4, "big")
    (bad / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + checksum)
    rgb.save(bad / "fine.png")
    return ["bomb.png", "cut.jpg", "empty.jpg", "text.jpg"]


def test_unusual_images_are_encoded_and_broken_ones_are_named(tmp_path, capsys, monkeypatch):
    broken = odd_images(tmp_path / "photos")
    save_small_vae(tmp_path / "vae.pt")
    line = "vae.py encode --data photos --vae vae.pt --out cache --batch-size 4"
    monkeypatch.chdir(tmp_path)
    run_in_process(line, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "photos/bad/bomb.png: not a readable image" in error and "--skip-bad" in error
    assert not Path("cache").exists()
    run_in_process(f"{line} --skip-bad")  # resumes
    out = capsys.readouterr().out.splitlines()
    assert "wrote 12 of 16 images to cache" in out[-5] and [Path(line).name for line in out[-4:]] == broken
    assert all("left out, not readable: photos/bad" in line for line in out[-4:])

    cache, images = LatentCache("cache"), Images("photos", 32)
    readable = [i for i in range(len(images)) if Path(images.name(i)).name not in broken]
    assert cache.classes == ["bad", "good"] and np.flatnonzero(cache.labels >= 0).tolist() == readable
    assert cache.labels[readable].tolist() == [0] + [1] * 11
    expected = torch.cat(load_vae("vae.pt").encode(from_uint8(np.stack([images[i] for i in readable]))), dim=1)
    torch.testing.assert_close(torch.tensor(cache.moments[readable, 0]).float(), expected, atol=5e-3, rtol=5e-3)
    run_in_process("train.py --data cache --steps 2 --batch-size 12 --sample-every 0")  # never reads the others


def test_folders_without_images_are_named(tmp_path, refused):
    (tmp_path / "photos" / "none").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "none.png")
    save_small_vae(tmp_path / "vae.pt")
    line = "vae.py encode --vae vae.pt --out cache --data"
    assert "photos/none: no images in this folder; remove it or fill it" in refused(f"{line} photos")
    message = "no class folders with images; expected photos/none/<class>/<image>"
    assert message in refused(f"{line} photos/none")


# python SCRIPT vae.py encode ...: killed after three batches.
KILL_ENCODING = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import vae
encode_moments, batches = vae.encode_moments, iter(range(9))
vae.encode_moments = lambda *args: os.kill(os.getpid(), 9) if next(batches) == 3 else encode_moments(*args)
vae.run_main(vae.main)
"""


def test_an_encoding_that_was_killed_and_resumed_gives_the_same_bytes(tmp_path, command, monkeypatch, capsys):
    """There is an unreadable image before the kill and one after it."""
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        path = Path("photos", f"class {i % 3}", f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    for name in ("class 0/03.png", "class 2/20.png"):
        Path("photos", name).write_bytes(b"broken")
    save_small_vae("vae.pt")
    Path("kill.py").write_text(KILL_ENCODING)
    flags = "encode --data photos --vae vae.pt --skip-bad --batch-size"
    run_in_process(f"vae.py {flags} 4 --out whole")
    command([tmp_path / "kill.py", ROOT / "vae.py", *flags.split(), "4", "--out", "killed"], expect=-signal.SIGKILL)
    assert not Path("killed").exists() and Path("killed.partial/moments.bin").stat().st_size == 12 * 2 * 2 * 16 * 64
    with open("killed.partial/moments.bin", "ab") as f:
        f.write(b"a part of the next batch")
    run_in_process(f"vae.py {flags} 5 --out killed", expect=2)
    assert "killed.partial: unfinished, of other inputs or settings" in capsys.readouterr().err
    run_in_process("train.py --data killed", expect=2)
    assert "killed: not a latent cache; make, or finish, it" in capsys.readouterr().err
    shutil.copytree("killed.partial", "cut.partial")
    os.truncate("cut.partial/moments.bin", 1000)
    for name in ("killed", "cut"):
        run_in_process(f"vae.py {flags} 4 --out {name}")
        assert not Path(f"{name}.partial").exists()
        assert_same_bytes("whole", name, ["moments.bin", "labels.npy", "cache.json", "reconstructions.png", "vae.pt"])


def assert_same_bytes(a, b, names):
    for name in names:
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name


# ------------------------------------------------------------------------------------------ caches


def test_damaged_caches_are_refused_at_the_start(small, refused):
    train = "train.py --data cache --steps 1"
    shutil.copytree("cache", "sound")

    def check(message, name, damage, flags=""):
        shutil.rmtree("cache")
        shutil.copytree("sound", "cache")
        damage(Path("cache") / name)
        error = refused(train + flags)
        assert message in error and "cache" in error

    def edit_array(change):
        return lambda path: np.save(path, change(np.load(path)))

    def edit_moments(change):
        def edit(path):
            moments = np.fromfile(path, np.float16).reshape(40, 2, 16, 8, 8)
            change(moments).tofile(path)

        return edit

    check("not a latent cache", "cache.json", Path.unlink)
    check("not a readable latent cache", "cache.json", lambda path: path.write_text("{"))
    check("labels.npy", "labels.npy", Path.unlink)
    check("not a readable latent cache", "moments.bin", lambda path: path.write_bytes(path.read_bytes()[:-100]))
    check("not a readable latent cache", "moments.bin", edit_moments(lambda a: a[:-1]))
    check("not a readable latent cache", "moments.bin", edit_moments(lambda a: a.astype(np.float32)))
    check("not a readable latent cache", "labels.npy", edit_array(lambda a: a[:-1]))
    check("not a readable latent cache", "labels.npy", edit_array(lambda a: a + 1))
    check("not a readable latent cache", "labels.npy", edit_array(lambda a: a - 2))
    save_small_vae("other.pt", seed=1)
    check("cache: latents of another --vae", "cache.json", lambda path: None, " --vae other.pt")
    assert "trained on latents of another VAE" in refused(f"{train} --init {DEMO}/mrar.pt")


# ------------------------------------------------------------------------------------------ checkpoints


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
    check("not a readable checkpoint")
    Path("bad.pt").write_bytes(sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :])
    check("damaged: a checksum is wrong")
    Path("bad.pt").write_bytes(b"")
    check("not a readable checkpoint")
    torch.save(Trap(), "bad.pt")
    check("not a readable checkpoint")
    Path("bad.pt").write_bytes(pickle.dumps(dict(model=Trap())))
    check("not a readable checkpoint")
    check("not a readable checkpoint", "sample.py --ckpt run/ema.pt --vae bad.pt")
    check("not a readable checkpoint", "train.py --data cache --init bad.pt")
    assert not Path("trapped").exists()

    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, "bad.pt")
    check("not a readable TransDiff model")
    save_with(lambda weights: weights.pop("cond_positions"))
    check("cond_positions")
    save_with(lambda weights: weights.update(surplus=torch.zeros(1)))
    check("surplus")
    save_with(lambda weights: weights.update(cond_positions=torch.zeros(1, 64, 96)))
    check("cond_positions")
    save_with(lambda weights: None, config={**state["config"], "heads": "many"})
    check("not a readable TransDiff model")
    save_with(lambda weights: None, config={**state["config"], "refs": 3})
    check("refs 3")
    for change in (dict(heads=0), dict(width=-160), dict(num_classes=None), dict(ar_depth=9), dict(other=1)):
        save_with(lambda weights: None, config={**state["config"], **change})
        check("not a readable TransDiff model")
    save_with(lambda weights: weights.update({"\x1b[31m" + "x" * 10**6: torch.zeros(1)}))
    check("not a readable TransDiff model")
    assert "this model draws chains of 1 to 1 images" in refused("sample.py --ckpt run/ema.pt --refs 4")
    assert "run/ema.pt: not a readable VAE" in refused("sample.py --ckpt run/ema.pt --vae run/ema.pt")
    assert "vae.pt: not a readable TransDiff model" in refused("sample.py --ckpt vae.pt")


# ------------------------------------------------------------------------------------------ flags

DRAW = "sample.py --class 1 --n 1 --refs 1 --steps 1"
FLAGS = [
    ("sample.py --class 1000", "--class 1000: this model has classes 0 to 9"),
    ("sample.py --class trousers", "trouser"),
    ("sample.py --class -1", "--class"),
    ("sample.py --refs 16", "--refs 16, 0 --references: this model draws chains of 1 to 4 images"),
    ("sample.py --steps 0", "--steps: 0: must be at least 1"),
    ("sample.py --steps 2.5", "--steps: invalid int value: '2.5'"),
    ("sample.py --n 0", "--n: 0: must be at least 1"),
    ("sample.py --n 99999999999999999999", "--n"),
    ("sample.py --cfg -1", "--cfg: -1: must be at least 0"),
    ("sample.py --cfg nan", "--cfg: nan: must be"),
    ("sample.py --cfg inf", "--cfg: inf: must be"),
    ("sample.py --cfg much", "--cfg: invalid float value: 'much'"),
    ("sample.py --s1 nan", "--s1"),
    ("sample.py --s2 -0.1", "--s2"),
    ("sample.py --seed -1", "--seed: -1: must be at least 0"),
    ("sample.py --features 1,x", "--features"),
    ("sample.py --batch-size 0", "--batch-size"),
    ("sample.py --dtype fp16", "--dtype"),
    ("sample.py --device tpu", "--device tpu"),
    ("sample.py --out .", "--out .: must end in"),
    (f"{DRAW} --out folder.png", "folder.png: could not be written (Is a directory)"),
    (f"{DRAW} --out file/x.png", "Not a directory"),
    ("sample.py --ckpt folder.png", "folder.png"),
    ("sample.py --num 12 --out x.npz", "--num 12: must be a multiple of the 10 classes"),
    ("finetune_mrar.py --refs 3", "--refs"),
    ("finetune_mrar.py --init gone.pt", "--init gone.pt: no such file"),
    ("train.py --batch-size 0", "--batch-size"),
    ("train.py --steps 3 --epochs 2", "--epochs: not allowed with argument --steps"),
    ("train.py --lr nan", "--lr"),
    ("train.py --lr -1", "--lr"),
    ("train.py --warmup 100", "--warmup: 100: must be at least 0 and at most 1"),
    ("train.py --ema 1.5", "--ema"),
    ("train.py --workers -1", "--workers"),
    ("train.py --seed one", "--seed: invalid int value: 'one'"),
    ("train.py --resume --out nothing", "nothing/last.pt"),
    ("train.py --out file --data cache", "file/vae.pt.tmp: Not a directory"),
    ("train.py --data file", "file"),
    ("train.py --data nowhere", "nowhere: not a latent cache"),
    ("train.py --batch-size 8 --accumulate 3 --data cache", "a multiple of 1 processes x --accumulate 3"),
    ("train.py --image-size 64 --data cache", "cache: latents of another --vae or --image-size"),
    ("vae.py encode --out cache --data source.npz --vae vae.pt", "cache: exists already"),
    ("vae.py encode --out x --data source.npz --vae vae.pt --image-size 31", "--image-size 31: must be a multiple"),
    ("vae.py encode --out x --vae vae.pt --data gone", "gone: no such folder"),
    ("vae.py encode --out x --vae vae.pt --data vae.pt", "vae.pt: no such folder"),
    ("vae.py train --steps 0", "--steps"),
    ("vae.py train --out folder.png", "--out folder.png: is there already"),
    ("vae.py train --lr inf", "--lr"),
    ("diversity.py --seeds 0", "--seeds"),
    ("diversity.py --heatmap hat", "--heatmap hat: this model has classes 0 to 9, t-shirt"),
    ("diversity.py --seeds 1 --heatmap bag --out folder.png", "Is a directory"),
    ("fid.py", "required: --samples"),
    ("fid.py --samples source.npz", "--ref: give a reference"),
    ("fid.py --samples source.npz --ref gone.npz", "gone.npz"),
    ("fid.py --samples source.npz --ref source.npz --batch-size -3", "--batch-size"),
]  # fmt: skip


@pytest.mark.parametrize("line,message", FLAGS)
def test_wrong_flags_are_refused(line, message, small, refused, monkeypatch):
    (small / "folder.png").mkdir()
    (small / "file").write_text("")
    for module in (sample, diversity):  # the default paths are relative to the folder of the import
        monkeypatch.setattr(module, "DEMO_MODEL", DEMO / "mrar.pt")
    monkeypatch.setattr(sample, "DEMO_VAE", DEMO / "vae.pt")
    assert message in refused(line)


# ------------------------------------------------------------------------------------------ the machine

# python SCRIPT LIMIT sample.py ...: no file may grow beyond LIMIT bytes.
SMALL_DISK = """
import os, resource, sys
limit = int(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import train, vae, sample
script = {"train.py": train, "vae.py": vae, "sample.py": sample}[os.path.basename(sys.argv[0])]
vae.run_main(script.main)
"""


def test_a_full_disk_is_one_line_and_the_command_resumes_with_room(small, command):
    (small / "full.py").write_text(SMALL_DISK)

    def run_on_small_disk(limit, line):
        script, *flags = line.split()
        _, err = command([small / "full.py", limit, ROOT / script, *flags], expect=2)
        return err.strip().splitlines()[-1]

    encode = "vae.py encode --data source.npz --vae vae.pt --out new"
    assert "File too large" in run_on_small_disk(50_000, encode) and not Path("new").exists()
    run_in_process(encode)
    assert_same_bytes("new", "cache", ["moments.bin"])

    run_in_process("train.py --data cache --steps 2 --batch-size 4 --save-every 1 --sample-every 0 --cooldown 0")
    before = Path("runs/train/last.pt").read_bytes()
    error = run_on_small_disk(1_000_000, "train.py --resume --steps 3")
    assert "runs/train/" in error and "could not be written" in error
    assert Path("runs/train/last.pt").read_bytes() == before and not list(Path("runs/train").glob("*.tmp"))
    run_in_process("train.py --resume --steps 3")

    draw = "sample.py --ckpt run/ema.pt --num 40 --steps 1 --out s.npz"
    error = run_on_small_disk(50_000, draw)
    assert "s.npz.partial/" in error and "could not be written" in error and not Path("s.npz").exists()
    run_in_process(draw)
    assert np.load("s.npz")["arr_0"].shape == (40, 32, 32, 3)


def test_ctrl_c_is_one_line(small, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: signal.raise_signal(signal.SIGINT))
    run_in_process("vae.py train --data source.npz", expect=130)
    err = capsys.readouterr().err
    assert "vae.py: interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("line,dataset", [
    ("train.py --data cache --steps 9 --batch-size 4 --workers 1", train.Chains),
    ("vae.py encode --data source.npz --vae vae.pt --out new --workers 1", Images),
])  # fmt: skip
def test_a_reader_that_is_killed_is_one_line(line, dataset, small, monkeypatch, capfd):
    monkeypatch.setattr(dataset, "__getitem__", lambda self, i: os.kill(os.getpid(), signal.SIGKILL))
    run_in_process(line, expect=2)
    assert "a process that reads data died or hangs" in capfd.readouterr().err


def test_pipes_are_not_images_and_odd_names_are_printable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["line\nbreak", "\x1b[31mred", os.fsdecode(b"\xff\xfe")]
    for name in names:
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(Path("photos", name, "a.png"))
    os.mkfifo("photos/line\nbreak/pipe.jpg")
    save_small_vae("vae.pt")
    run_in_process("vae.py encode --data photos --vae vae.pt --out cache")
    assert len(LatentCache("cache").labels) == 3
    run_in_process("train.py --data cache --steps 1 --batch-size 3")
    run_in_process("sample.py --ckpt runs/train --class 1 --n 1 --steps 1")
    out = capsys.readouterr().out
    assert "line\\nbreak" in out and "\\udcff" in out and "\x1b" not in out


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "labels", [[0] * 5, list(range(300)), [0, 0, 1]], ids=["one class", "300 classes", "one image"]
)
def test_one_class_many_classes_and_a_class_of_one_image(labels, tmp_path, monkeypatch, capsys):
    """Also with a batch that is larger than the data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SAMPLING["XS"], "steps", 2)  # instead of 25, to save time
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 32, 32), dtype=np.uint8)
    np.savez("s.npz", images=images, labels=labels)
    save_small_vae("v.pt")
    run_in_process("train.py --data s.npz --vae v.pt --steps 2 --batch-size 12 --sample-every 2")
    assert Path("runs/train/samples-0000002.png").exists()
    run_in_process(f"sample.py --ckpt runs/train/ema.pt --class {max(labels)} --n 1 --steps 1")
    if len(set(labels)) > 1:
        run_in_process("finetune_mrar.py --data s.npz --vae v.pt --steps 1", expect=2)
        assert "classes have fewer than 4 images: 0, 1" in capsys.readouterr().err


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
    """Make a cache of n images of the XS shape that takes no disk: moments.bin is a sparse file of zeros."""
    path.mkdir()
    shape = (n, 2, 16, 8, 8)
    with open(path / "moments.bin", "wb") as f:
        f.truncate(2 * int(np.prod(shape)))
    np.save(path / "labels.npy", np.arange(n) % 1000)
    classes = [str(i) for i in range(1000)]
    record = dict(shape=shape, classes=classes, scale=1.0, image_size=32, vae_digest="")
    (path / "cache.json").write_text(json.dumps(record))


# python -c CODE ROOT CACHE REFS prints the seconds of start-up and 20 batches, and the KB of memory that they take.
MEASURE_LOADING = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import train, vae
start = time.time()
chains = train.Chains(vae.LatentCache(sys.argv[2]), int(sys.argv[3]), 256, 0)
for step in range(20):
    chains[step]
print(time.time() - start, re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("refs", [1, 4])
def test_a_million_images_take_little_more_time_and_memory_than_ten_thousand(tmp_path, refs):
    """Memory without the pages of the file, which the system may take back: labels and order, 8 bytes an image each."""
    results = {}
    for n in (10_000, 1_000_000):
        synthetic_cache(tmp_path / str(n), n)
        argv = [sys.executable, "-c", MEASURE_LOADING, ROOT, tmp_path / str(n), str(refs)]
        seconds, kilobytes = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        results[n] = float(seconds), int(kilobytes) / 1000
    print(results)
    assert results[1_000_000][0] < results[10_000][0] + 20
    assert results[1_000_000][1] < results[10_000][1] + 100  # MB


# ------------------------------------------------------------------------------------------ fuzz and kills


def corrupt(data, rng):
    """Change bytes in one way: bits flipped, a piece overwritten, cut off, removed, doubled or filled with zeros."""
    data, kind, n = bytearray(data), rng.randrange(6), rng.choice([1, 4, 50, 1000])
    near_end = min(len(data), 400)
    at = rng.choice([rng.randrange(len(data)), rng.randrange(near_end), len(data) - 1 - rng.randrange(near_end)])
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

    read() has to succeed or to raise a ValueError or OSError of one line that names the file (of a cache: the folder).
    """
    rng, refusals, sound = random.Random(seed), 0, path.read_bytes()
    for i in range(rounds):
        path.write_bytes(corrupt(sound, rng))
        try:
            read()
        except (ValueError, OSError) as e:
            assert len(str(e).splitlines()) == 1, (i, str(e))
            assert str(path) in str(e) or f"{path.parent}: " in str(e), (i, str(e))
            refusals += 1
    path.write_bytes(sound)
    return refusals


def fuzz_everything(folder, rounds):
    refusals, before = {}, sorted(folder.rglob("*"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind, options in (("jpg", dict(exif=exif)), ("png", {}), ("webp", {}), ("gif", {}), ("tif", {})):
        path = folder / f"image.{kind}"
        image.save(path, **options)
        refusals[kind] = fuzz(path, lambda p=path: center_crop(read_image(p), 32), rounds, 1)
        path.unlink()

    def read_cache():
        cache = LatentCache(folder / "cache")
        assert np.isfinite(cache.moments).all() and len(cache.labels) == len(cache.moments)

    for name in ("moments.bin", "labels.npy", "cache.json"):
        refusals[name] = fuzz(folder / "cache" / name, read_cache, rounds, 2)
    for name, load in (("run/ema.pt", load_checkpoint), ("vae.pt", load_vae)):
        expected = load(folder / name).state_dict()

        def load_and_compare(path=folder / name, load=load, expected=expected):
            assert all(torch.equal(v, expected[k]) for k, v in load(path).state_dict().items()), "other weights"

        refusals[name] = fuzz(folder / name, load_and_compare, rounds, 3)

    def read_all(images):
        return [images[i] for i in range(len(images))]

    path = folder / "source.npz"
    refusals["npz"] = fuzz(path, lambda: read_all(Images(path, 32)), rounds, 4)
    refusals["npz without labels"] = fuzz(path, lambda: read_all(Images(path, labelled=False)), rounds, 5)
    np.savez_compressed(path, **np.load(path))
    refusals["compressed npz"] = fuzz(path, lambda: read_all(Images(path, 32)), rounds, 6)
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
    """20 times SIGKILL, SIGTERM or SIGINT at random moments; each finished run equals one that was left alone."""
    rng = random.Random(0)
    images = np.random.default_rng(0).integers(0, 255, (4000, 32, 32, 3), dtype=np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(4000) % 4)
    first = again = "vae.py encode --data many.npz --vae vae.pt --out"
    if kind == "train":
        every = "--save-every 5 --log-every 5 --sample-every 0"
        first, again = f"train.py --data cache --steps 300 --batch-size 8 {every} --out", "train.py --resume --out"

    def start(line, out):
        script, *flags = line.split()
        argv = [sys.executable, ROOT / script, *flags, out]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def start_or_resume():
        return start(again if Path("killed", "last.pt").exists() else first, "killed")

    def compare():
        if kind == "encode":
            return assert_same_bytes("whole", "killed", ["moments.bin", "labels.npy", "cache.json"])
        whole, killed = (load_file(Path(folder, "last.pt"))["model"] for folder in ("whole", "killed"))
        assert all(torch.equal(v, killed[k]) for k, v in whole.items())

    began = time.time()
    process = start(first, "whole")
    process.communicate()
    seconds, kills = time.time() - began, 0
    assert process.returncode == 0
    while kills < 20:
        process = start_or_resume()
        try:
            process.wait(rng.uniform(0.3 * seconds, seconds) if kills % 2 else rng.uniform(2.0, 5.0))
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            kills += 1
        err = process.communicate()[1]
        assert process.returncode in (0, -9, -15, -2, 130, 143), err
        assert "Traceback" not in err or process.returncode < 0, err
        if process.returncode == 0:  # finished: compare, and start anew
            compare()
            shutil.rmtree("killed")
        for path in Path("killed").glob("*.pt"):
            load_file(path)
    process = start_or_resume()
    process.communicate()
    assert process.returncode == 0
    compare()
