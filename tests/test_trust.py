"""What goes wrong for users: every case ends in one line that says what to do, or in the right result. The long campaigns are marked slow."""
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
from PIL import Image
from test_vae import small_vae

import diversity
import fid
import finetune_mrar
import sample
import train
import vae
from model import SIZES, TransDiff, load_checkpoint, load_file
from vae import LatentCache, encode_source, load_vae, open_source, run

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
MAINS = {"vae.py": vae.main, "train.py": train.main, "finetune_mrar.py": finetune_mrar.main, "sample.py": sample.main, "fid.py": fid.main, "diversity.py": diversity.main}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused("sample.py --n 0") runs a command in this process, in an empty folder, and returns the one line it must end in; status 2, no file written."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        words = line if isinstance(line, list) else line.split()
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        with pytest.raises(SystemExit) as stop:
            run(MAINS[words[0]])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and len(message) < 500, message
        assert sorted(tmp_path.rglob("*")) == before, "it left something behind"
        return message

    return call


@pytest.fixture
def small(tmp_path):
    """A folder with source.npz of 40 images, vae.pt, cache/ and run/ema.pt, an untrained model of it."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "source.npz", images=rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8), labels=np.arange(40) % 4, classes=np.array(list("abcd")))
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "vae.pt")
    os.chdir(tmp_path)
    encoder = load_vae("vae.pt")
    encode_source(open_source("source.npz", 32), encoder, "cache")
    config = dataclasses.replace(SIZES["XS"], num_classes=4)
    info = dict(config=dataclasses.asdict(config), size="XS", step=1, classes=list("abcd"), vae="vae.pt", vae_digest=encoder.digest)
    (tmp_path / "run").mkdir()
    torch.save(dict(info, model={k: v.half() for k, v in TransDiff(config).state_dict().items()}), tmp_path / "run" / "ema.pt")
    yield tmp_path
    os.chdir(ROOT)


# ------------------------------------------------------------------------------------------ images


def odd_images(root):
    """A class folder of images that are unusual and one of images that are broken; returns the names of the broken ones."""
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
    rgb.save(good / ".hidden.png")
    (good / "notes.txt").write_text("not an image")
    (good / "round").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / ".cache").mkdir()
    jpeg = (good / "plain.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("this is no picture")
    bomb = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    (bad / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + bomb + zipfile.crc32(bomb).to_bytes(4, "big"))
    rgb.save(bad / "fine.png")
    return ["bomb.png", "cut.jpg", "empty.jpg", "text.jpg"]


def test_unusual_images_are_encoded_and_broken_ones_named(tmp_path, command, refused):
    broken = odd_images(tmp_path / "photos")
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "vae.pt")
    line = "vae.py encode --data photos --vae vae.pt --out cache --batch-size 4"
    _, err = command(line, expect=2)
    assert "photos/bad/bomb.png: cannot be read as an image" in err and "--skip-bad goes on" in err and not (tmp_path / "cache").exists()
    out, _ = command(f"{line} --skip-bad")  # goes on from there
    assert "4 images could not be read" in out
    cache, skipped = LatentCache(tmp_path / "cache"), (tmp_path / "cache" / "skipped.txt").read_text().splitlines()
    assert [Path(s.split(":")[0]).name for s in skipped] == broken
    assert cache.classes == ["bad", "good"] and cache.labels.tolist() == [0] + [1] * 11  # nothing lost, nothing twice
    source = open_source(tmp_path / "photos", 32)
    fine = [i for i, p in enumerate(source.paths) if os.path.basename(os.fsdecode(p)) not in broken]
    expected = torch.cat(load_vae(tmp_path / "vae.pt").encode(vae.from_uint8(np.stack([source[i] for i in fine]))), dim=1)
    torch.testing.assert_close(torch.tensor(cache.moments[:, 0]).float(), expected, atol=5e-3, rtol=5e-3)

    (tmp_path / "photos" / "none").mkdir()
    assert "photos/none: no images in this class folder; remove it or fill it" in refused(line.replace("cache", "other"))
    assert "no class folders with images; expected photos/good/<class>/<image>" in refused("vae.py encode --data photos/good --vae vae.pt --out other")


ENCODE = """
import itertools, os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import vae
vae.time.time = itertools.count(step=60).__next__  # save after every batch
saves, write = itertools.count(1), vae.write_whole
def write_whole(path, f):
    write(path, f)
    if "done.json" in str(path) and next(saves) == 3:
        os.kill(os.getpid(), 9)
vae.write_whole = write_whole
vae.run(vae.main)
"""


def test_encoding_goes_on_where_it_was_killed(tmp_path, command):
    """Byte for byte what it would have been, with an unreadable image on either side of the kill."""
    for i in range(30):
        path = tmp_path / "photos" / f"class {i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    for name in ("class 0/03.png", "class 2/20.png"):
        (tmp_path / "photos" / name).write_bytes(b"broken")
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "vae.pt")
    (tmp_path / "kill.py").write_text(ENCODE)
    line = "vae.py encode --data photos --vae vae.pt --batch-size 4 --skip-bad --out"
    command(f"{line} whole")
    command(f"{line} killed", expect=-9, launcher=(sys.executable, "kill.py"))
    assert not (tmp_path / "killed").exists() and json.loads((tmp_path / "killed.partial" / "done.json").read_text())["next"] == 12
    with open(tmp_path / "killed.partial" / "moments.npy", "ab") as f:
        f.write(b"half a batch that was written after the last save")
    _, err = command(f"{line.replace('--batch-size 4', '--batch-size 5')} killed", expect=2)
    assert "killed.partial: unfinished latents of other images or settings" in err
    _, err = command("train.py --data killed", expect=2)
    assert "it is unfinished" in err
    command(f"{line} killed")
    assert not (tmp_path / "killed.partial").exists()
    for name in ("moments.npy", "labels.npy", "meta.json", "skipped.txt", "reconstructions.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------ caches


def test_caches_that_are_refused_at_the_start(small, refused):
    line = "train.py --data cache --steps 1"
    shutil.copytree("cache", "sound")

    def spoil(message, name, change, flags=""):
        shutil.rmtree("cache")
        shutil.copytree("sound", "cache")
        change(Path("cache") / name)
        said = refused(line + flags)
        assert message in said and "cache" in said

    def array(change):
        def edit(path):
            a = np.load(path).copy()
            np.save(path, change(a))

        return edit

    def poison(a):
        a[33, 1, 0, 0, 0] = np.nan
        return a

    spoil("not a latent cache", "meta.json", Path.unlink)
    spoil("not a latent cache", "meta.json", lambda p: p.write_text("{"))
    spoil("not a latent cache", "labels.npy", Path.unlink)
    spoil("not a latent cache", "moments.npy", lambda p: p.write_bytes(p.read_bytes()[:-100]))
    spoil("do not belong together", "moments.npy", array(lambda a: a[:-1]))
    spoil("do not belong together", "moments.npy", array(lambda a: a.astype(np.float32)))
    spoil("do not belong together", "labels.npy", array(lambda a: a + 1))
    spoil("do not belong together", "labels.npy", array(lambda a: a - 1))
    spoil("the latents of image 33 are not finite", "moments.npy", array(poison))
    torch.save(dict(model=small_vae(1).state_dict(), scale=1.0, image_size=32), "other.pt")
    spoil("is not the VAE that made the latents", "meta.json", lambda p: None, " --vae other.pt")
    assert "was trained on latents of another VAE" in refused(f"{line} --init {DEMO}/mrar.pt --data cache")


# ------------------------------------------------------------------------------------------ checkpoints


class Trap:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_checkpoints_that_are_refused(small, refused):
    state = load_file("run/ema.pt")

    def changed(change, **more):
        model = dict(state["model"])
        change(model)
        torch.save(dict(state, model=model, **more), "bad.pt")

    def says(message, command="sample.py --ckpt bad.pt"):
        said = refused(command)
        assert message in said and "bad.pt" in said

    raw = Path("run/ema.pt").read_bytes()
    Path("bad.pt").write_bytes(raw[: len(raw) // 2])
    says("not a readable checkpoint")
    Path("bad.pt").write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :])
    says("it is damaged")
    Path("bad.pt").write_bytes(b"")
    says("not a readable checkpoint")
    torch.save(Trap(), "bad.pt")
    says("not a readable checkpoint")
    Path("bad.pt").write_bytes(pickle.dumps(dict(model=Trap())))
    says("not a readable checkpoint")
    says("not a readable checkpoint", "sample.py --ckpt run/ema.pt --vae bad.pt")
    says("not a readable checkpoint", "train.py --data cache --init bad.pt")
    assert not Path("trapped").exists()
    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, "bad.pt")
    says("not a TransDiff checkpoint")
    changed(lambda m: m.pop("cond_positions"))
    says("weights do not fit TransDiff")
    changed(lambda m: m.update(surplus=torch.zeros(1)))
    says("weights do not fit TransDiff")
    changed(lambda m: m.update(cond_positions=torch.zeros(1, 64, 96)))
    says("weights do not fit TransDiff")
    changed(lambda m: None, config={**state["config"], "heads": "many"})
    says("not a TransDiff model")
    changed(lambda m: None, config={**state["config"], "refs": 3})
    says("refs 3: must be 1, 4, 16 or 64")
    changed(lambda m: None)  # sound, but 1-step
    assert "--refs 4: this model draws chains of 1 to 1 images" in refused("sample.py --ckpt bad.pt --refs 4")
    assert "is it a TransDiff model?" in refused("sample.py --ckpt run/ema.pt --vae run/ema.pt")
    assert "is it a VAE?" in refused("sample.py --ckpt vae.pt")


# ------------------------------------------------------------------------------------------ flags

FLAGS = [
    ("sample.py --class 1000", "--class 1000: this model has classes 0 to 9"),
    ("sample.py --class trousers", "trouser"),
    ("sample.py --class -1", "--class"),
    ("sample.py --refs 16", "--refs 16: this model draws chains of 1 to 4 images"),
    ("sample.py --steps 0", "--steps: 0: must be a whole number of at least 1"),
    ("sample.py --steps 2.5", "--steps"),
    ("sample.py --n 0", "--n: 0: must be"),
    ("sample.py --n 99999999999999999999", "--n"),
    ("sample.py --cfg -1", "--cfg: -1: must be a number of at least 0"),
    ("sample.py --cfg nan", "--cfg: nan: must be a number"),
    ("sample.py --cfg inf", "--cfg: inf: must be a number"),
    ("sample.py --cfg much", "--cfg: invalid number value: 'much'"),
    ("sample.py --s1 nan", "--s1"),
    ("sample.py --s2 -0.1", "--s2"),
    ("sample.py --seed -1", "--seed: -1: must be a whole number of at least 0"),
    ("sample.py --cfg-interval 0.2 1.2", "--cfg-interval: 1.2: must be a number from 0 to 1"),
    ("sample.py --batch-size 0", "--batch-size"),
    ("sample.py --dtype fp16", "--dtype"),
    ("sample.py --device tpu", "--device tpu"),
    ("sample.py --out .", "--out .: must end in"),
    ("sample.py --out folder.png", "--out folder.png: is a folder, expected the name of a file"),
    ("sample.py --out file/x.png", "is not a folder that can be written to"),
    ("sample.py --ckpt folder.png", "folder.png"),
    ("sample.py --num 12 --out x.npz", "--num 12: must be a multiple of the 10 classes, e.g. 20"),
    ("finetune_mrar.py --refs 3", "--refs"),
    ("finetune_mrar.py --init gone.pt", "--init gone.pt: no such file"),
    ("train.py --batch-size 0", "--batch-size"),
    ("train.py --steps 3 --epochs 2", "--steps and --epochs both"),
    ("train.py --lr nan", "--lr"),
    ("train.py --lr -1", "--lr"),
    ("train.py --warmup 100", "--warmup: 100: must be a number from 0 to 1"),
    ("train.py --ema 1.5", "--ema"),
    ("train.py --clip -1", "--clip"),
    ("train.py --workers -1", "--workers"),
    ("train.py --seed one", "--seed"),
    ("train.py --resume --out nothing", "nothing/last.pt"),
    ("train.py --out file", "--out file: is a file, expected the name of a folder"),
    ("train.py --data file", "file"),
    ("train.py --data nowhere", "nowhere: not a latent cache"),
    ("train.py --batch-size 8 --accumulate 3 --data cache", "must be a multiple of 1 processes x --accumulate 3, e.g. 9"),
    ("train.py --image-size 64 --data cache", "--image-size 64: the latents in cache are of 32 px images"),
    ("vae.py encode --out cache --data source.npz --vae vae.pt", "cache: exists already"),
    ("vae.py encode --out x --data source.npz --vae vae.pt --image-size 31", "--image-size 31: must be a multiple of 4"),
    ("vae.py encode --out x --vae vae.pt --data gone", "gone: no such image source"),
    ("vae.py encode --out x --vae vae.pt --data vae.pt", "vae.pt: no such image source"),
    ("vae.py train --steps 0", "--steps"),
    ("vae.py train --out folder.png", "is a folder"),
    ("vae.py train --lr inf", "--lr"),
    ("diversity.py --seeds 0", "--seeds"),
    ("diversity.py --heatmap hat", "--heatmap hat: this model has classes 0 to 9: t-shirt"),
    ("diversity.py --csv folder.png", "is a folder"),
    ("fid.py", "give --samples and --ref"),
    ("fid.py --samples source.npz --ref gone.npz", "gone.npz"),
    ("fid.py --samples source.npz --ref source.npz --batch-size -3", "--batch-size"),
    ("fid.py --samples source.npz --ref source.npz --json folder.png", "is a folder"),
]


@pytest.mark.parametrize("line,message", FLAGS)
def test_flags_that_are_refused(line, message, small, refused, monkeypatch):
    (small / "folder.png").mkdir()
    (small / "file").write_text("")
    for module in (sample, diversity):
        monkeypatch.setattr(module, "DEMO_MODEL", DEMO / "mrar.pt")
    monkeypatch.setattr(sample, "DEMO_VAE", DEMO / "vae.pt")
    assert message in refused(line)


# ------------------------------------------------------------------------------------------ the machine

SMALL_DISK = """
import os, resource, sys
sys.argv = sys.argv[1:]
limit = int(sys.argv.pop(0))
sys.path.insert(0, os.path.dirname(sys.argv[0]))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import train, vae, sample
vae.run({"train.py": train.main, "vae.py": vae.main, "sample.py": sample.main}[os.path.basename(sys.argv[0])])
"""


def test_a_full_disk(small, command):
    """No file may be larger than the limit. One line, status 2; what was there stays, and with room the command goes on."""
    (small / "full.py").write_text(SMALL_DISK)
    full = lambda limit: (sys.executable, "full.py", str(limit))  # noqa: E731
    _, err = command("vae.py encode --data source.npz --vae vae.pt --out new", launcher=full(50_000), expect=2)
    assert "vae.py: " in err and "File too large" in err and not (small / "new").exists()
    command("vae.py encode --data source.npz --vae vae.pt --out new")
    assert (small / "new" / "moments.npy").read_bytes() == (small / "cache" / "moments.npy").read_bytes()

    command("train.py --data cache --steps 2 --batch-size 4 --save-every 1 --sample-every 0 --cooldown 0")
    before = Path("runs/train/last.pt").read_bytes()
    _, err = command("train.py --resume --steps 3", launcher=full(1_000_000), expect=2)
    assert "train.py: runs/train/last.pt: could not be written" in err and "what was there is as it was" in err
    assert Path("runs/train/last.pt").read_bytes() == before and not list(Path("runs/train").glob("*.tmp"))
    command("train.py --resume --steps 3")

    _, err = command("sample.py --ckpt run/ema.pt --num 40 --steps 1 --out s.npz", launcher=full(50_000), expect=2)
    assert "File too large" in err and not Path("s.npz").exists()
    command("sample.py --ckpt run/ema.pt --num 40 --steps 1 --out s.npz")
    assert np.load("s.npz")["arr_0"].shape == (40, 32, 32, 3)


def test_interrupted_is_one_line(small):
    process = subprocess.Popen([sys.executable, ROOT / "vae.py", "train", "--data", "source.npz"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "step" not in process.stderr.read(1) + process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("vae.py: interrupted") and "Traceback" not in err


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("labels", [[0] * 5, list(range(300)), [0, 0, 1]])
def test_one_class_many_classes_and_a_class_of_one_image(labels, tmp_path, command):
    """With a batch larger than the data set, too."""
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", images=images, labels=labels)
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "v.pt")
    command("train.py --data s.npz --vae v.pt --steps 2 --batch-size 400 --sample-every 2")
    last = max(labels)
    command(f"sample.py --ckpt runs/train/ema.pt --class {last} --n 1 --steps 1")
    if len(set(labels)) > 1:
        _, err = command("finetune_mrar.py --data s.npz --vae v.pt --steps 1", expect=2)
        assert "have fewer than 4 images, so no chain of --refs 4: 0, 1" in err


def test_chains_of_64(tmp_path, command, garments):
    np.savez(tmp_path / "s.npz", images=np.repeat(garments[0], 11, axis=0), labels=np.repeat(garments[1], 11))
    torch.save(dict(model=small_vae().state_dict(), scale=1.0, image_size=32), tmp_path / "v.pt")
    command("train.py --data s.npz --vae v.pt --steps 1 --batch-size 2 --sample-every 0")
    command("finetune_mrar.py --data s.npz --vae v.pt --steps 1 --batch-size 2 --sample-every 0 --refs 64")
    out, _ = command("sample.py --ckpt runs/mrar/ema.pt --class 1 --n 1 --steps 1")
    assert "refs 64" in out


def synthetic_cache(path, n):
    """A cache of n images of the XS shape that takes no disk: a sparse file of zeros."""
    path.mkdir()
    with open(path / "moments.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=(n, 2, 16, 8, 8)))
        f.truncate(f.tell() + n * 2 * 16 * 64 * 2)
    np.save(path / "labels.npy", np.arange(n) % 1000)
    meta = dict(classes=[str(i) for i in range(1000)], scale=1.0, image_size=32, vae="", vae_digest="")
    (path / "meta.json").write_text(json.dumps(meta))


MEMORY = "import sys; sys.path.insert(0, {root!r}); import re, time, vae, train; t = time.time(); c = train.Chains(vae.LatentCache({path!r}), {refs}, 256, 0); [c.batch(s) for s in range(20)]; print(time.time() - t, re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])"


@pytest.mark.slow
@pytest.mark.parametrize("refs", [1, 4])
def test_a_million_images_cost_no_more_memory_than_their_labels(tmp_path, refs):
    """Start-up and 20 steps, of 10,000 and of 1,000,000 images: seconds, and memory but for the pages of the file, which the machine may take back."""
    results = {}
    for n in (10_000, 1_000_000):
        synthetic_cache(tmp_path / str(n), n)
        code = MEMORY.format(root=str(ROOT), path=str(tmp_path / str(n)), refs=refs)
        seconds, peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        results[n] = float(seconds), int(peak) / 1000
    print(results)
    assert results[1_000_000][0] < results[10_000][0] + 10
    assert results[1_000_000][1] < results[10_000][1] + 100  # MB: labels and order, 8 bytes an image each, a few times over


# ------------------------------------------------------------------------------------------ fuzz and kills


def corrupt(data, rng):
    """One of: bits flipped, a run overwritten, cut off, a piece taken out, doubled, or filled with zeros."""
    data, kind = bytearray(data), rng.randrange(6)
    at = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 400)), len(data) - 1 - rng.randrange(min(len(data), 400))])
    n = rng.choice([1, 4, 50, 1000])
    if kind == 0:
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + n] = rng.randbytes(len(data[at : at + n]))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + n]
    elif kind == 4:
        data[at:at] = data[at : at + n]
    else:
        data[at : at + n] = bytes(len(data[at : at + n]))
    return bytes(data)


def fuzz(path, sound, read, rounds, seed):
    """Corrupt the file `rounds` times; read() must raise ValueError of one line, or OSError, or succeed. Returns the number of refusals."""
    rng, refusals = random.Random(seed), 0
    for i in range(rounds):
        path.write_bytes(corrupt(sound, rng))
        try:
            read()
        except (ValueError, OSError) as e:
            assert len(str(e).splitlines()) == 1 and (str(path) in str(e) or f"{path.parent}: " in str(e)), (i, str(e))  # a cache is named as a folder
            refusals += 1
    path.write_bytes(sound)
    return refusals


def fuzz_everything(folder, rounds):
    counts, before = {}, sorted(p for p in folder.rglob("*"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind, options in (("jpg", dict(exif=exif)), ("png", {}), ("webp", {}), ("gif", {}), ("tif", {})):
        path = folder / f"image.{kind}"
        image.save(path, **options)
        counts[kind] = fuzz(path, path.read_bytes(), lambda p=path: vae.center_crop(vae.read_image(p), 32), rounds, 1)
        path.unlink()
    for name in ("moments.npy", "labels.npy", "meta.json"):
        path = folder / "cache" / name

        def read():
            cache = LatentCache(folder / "cache")
            assert np.isfinite(cache.moments).all() and len(cache.labels) == len(cache.moments)

        counts[name] = fuzz(path, path.read_bytes(), read, rounds, 2)
    for name, read in (("run/ema.pt", load_checkpoint), ("vae.pt", load_vae)):
        path = folder / name
        sound = path.read_bytes()
        expected = read(path).state_dict()

        def read_and_compare(path=path, read=read, expected=expected):
            assert all(torch.equal(v, expected[k]) for k, v in read(path).state_dict().items()), "other weights than were saved"

        counts[name] = fuzz(path, sound, read_and_compare, rounds, 3)
    path = folder / "source.npz"
    counts["fid npz"] = fuzz(path, path.read_bytes(), lambda: sum(len(b) for b in fid.batches(fid.find_images(path), (32, 32), False, 16)), rounds, 5)
    counts["npz"] = fuzz(path, path.read_bytes(), lambda: open_source(path, 32)[0], rounds, 4)
    assert sorted(p for p in folder.rglob("*")) == before, "a file was written"
    return counts


def test_corrupted_files_are_refused_or_read_rightly(small):
    fuzz_everything(small, rounds=12)


@pytest.mark.slow
def test_many_corrupted_files(small):
    print(fuzz_everything(small, rounds=500))


@pytest.mark.slow
def test_random_kills_of_training_and_of_encoding(small):
    """20 of each, at random moments, of SIGKILL, SIGTERM and SIGINT; begun again until done, each ends in the bytes of a run that was left alone."""
    rng = random.Random(0)
    images = np.random.default_rng(0).integers(0, 255, (4000, 32, 32, 3), dtype=np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(4000) % 4)
    encode = "vae.py encode --data many.npz --vae vae.pt --out"
    teach = "train.py --data cache --steps 300 --batch-size 8 --save-every 5 --log-every 5 --sample-every 0 --out"

    def start(line):
        return subprocess.Popen([sys.executable, str(ROOT / line.split()[0]), *line.split()[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    for line, again, finished, same in ((encode, encode, lambda d: d.exists(), ("moments.npy", "labels.npy", "meta.json")), (teach, "train.py --resume --out", None, ())):
        began = time.time()
        assert start(f"{line} whole-{line[:3]}").wait() == 0
        seconds, kills, name = time.time() - began, 0, f"killed-{line[:3]}"
        while kills < 20:
            resumable = Path(name, "last.pt").exists()
            process = start(f"{again if resumable or line == encode else line} {name}")
            try:
                process.wait(rng.uniform(0.3 * seconds, seconds) if kills % 2 else rng.uniform(2.0, 5.0))
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                kills += 1
            err = process.communicate()[1]
            assert process.returncode in (0, -9, -15, -2, 130, 143), err
            assert "Traceback" not in err or process.returncode < 0, err
            if process.returncode == 0:  # done: once more from the start
                compare(f"whole-{line[:3]}", name, same)
                shutil.rmtree(name)
            for path in Path(name).glob("*.pt"):
                load_file(path)
        process = start(f"{again if Path(name, 'last.pt').exists() or line == encode else line} {name}")
        assert process.wait() == 0
        compare(f"whole-{line[:3]}", name, same)


def compare(whole, killed, names):
    for name in names:
        assert Path(whole, name).read_bytes() == Path(killed, name).read_bytes(), name
    if not names:
        a, b = (load_file(Path(d, "last.pt")) for d in (whole, killed))
        assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
