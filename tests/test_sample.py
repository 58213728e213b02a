"""sample.py on the bundled weights, and the download of the released ones from a local server."""

import dataclasses
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden import write_released
from in_process import run_in_process
from PIL import Image
from test_vae import SMALL, refused, run, run_together, save_vae, start, wait_for_parts  # noqa: F401

import sample
from model import SIZES, TransDiff, load_checkpoint, load_file
from vae import latents_to_images, load_vae

RELEASED = "/zhendch/Transdiff/resolve/main"
pytestmark = pytest.mark.weights

MODEL, VAE = ROOT / "demo" / "mrar.pt", ROOT / "demo" / "vae.pt"


def columns(path, n):
    """The n pictures in the last row of a grid, grey: 32 px, drawn twice as large, in frames."""
    grid = np.asarray(Image.open(path).convert("L")).astype(int)[::2, ::2]
    return [grid[-33:-1, 34 * i + 1 : 34 * i + 33] for i in range(n)]


# ------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("flags,refs", [
    ("--class 1 --refs 4", 4),  # the first command of the README
    (f"--class trouser --ckpt {ROOT}/demo/1step.pt", 1),
])  # fmt: skip
def test_the_bundled_models_draw_trousers(flags, refs, tmp_path, command):
    """Most of the 8 images correlate best with the mean image of their class."""
    out, _ = command(f"sample.py {flags}")
    path = tmp_path / "runs" / "samples.png"
    assert f"runs/samples.png (trouser; refs {refs}" in out
    assert Image.open(path).size == (8 * 34 * 2, 34 * 2)
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    means = [data["images"][data["labels"] == k].mean(0).ravel() for k in range(10)]
    images = [image.ravel() for image in columns(path, 8)]
    correlation = np.corrcoef(images, means)[:8, 8:]
    assert (correlation.argmax(1) == 1).sum() >= 6


def test_image_i_is_a_function_of_the_seed_and_i_and_the_sampler(run):
    flags = "sample.py --class 2 7 --n 3 --steps 3 --refs 2 --dtype fp32 --out"
    run(f"{flags} a.npz")
    run(f"{flags} b.npz --batch-size 4")
    run(f"{flags} c.npz --seed 1")
    run(f"{flags} d.npz --sampler euler-maruyama")
    run(f"{flags} e.npz --sampler euler-maruyama --s2 0.5")
    a, b, c, d, e = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abcde")
    assert min(np.abs(a - d).mean(), np.abs(d - e).mean()) > 1
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).mean() > 5
    assert len(np.unique(a.reshape(6, -1), axis=0)) == 6


def test_show_chain_draws_a_chain_in_each_row(run):
    run("sample.py --class bag --n 2 --refs 3 --steps 2 --show-chain --out chain.png")
    assert Image.open("chain.png").size == (3 * 34 * 2, 2 * 34 * 2)
    run("sample.py --class bag --n 2 --refs 3 --steps 2 --out last.png")
    assert np.array_equal(columns("chain.png", 3)[2], columns("last.png", 2)[1])


def test_cfg_0_draws_without_a_class(run):
    flags = "--n 2 --refs 1 --dtype fp32 --cfg-below 1"
    for name in ("bag", "trouser"):
        run(f"sample.py --class {name} {flags} --cfg 0 --out {name}-0.npz")
        run(f"sample.py --class {name} {flags} --cfg 1 --out {name}-1.npz")
    without, trouser = (np.load(f"trouser-{cfg}.npz")["arr_0"].astype(int) for cfg in (0, 1))
    assert np.array_equal(without, np.load("bag-0.npz")["arr_0"])
    assert np.abs(trouser - np.load("bag-1.npz")["arr_0"]).mean() > 5


def test_cfg_is_one_number_or_one_for_each_image(run):
    flags = "--class bag --n 1 --refs 3 --steps 3 --dtype fp32 --show-chain --out"
    run(f"sample.py --cfg 1 {flags} same.png")
    run(f"sample.py --cfg 1 1 4 {flags} last.png")
    same, last = columns("same.png", 3), columns("last.png", 3)
    assert np.array_equal(same[:2], last[:2]) and np.abs(same[2] - last[2]).mean() > 1


def test_a_class_named_twice_is_drawn_twice_as_often(run):
    draw = "sample.py --class bag bag 1 --num 6 --steps 1 --out s.npz"
    run(f"{draw} --refs 5", expect=2)  # what it leaves needs no clearing up
    run(f"{draw} --refs 1")
    arrays = np.load("s.npz")
    assert arrays["arr_1"].tolist() == [8, 8, 1, 8, 8, 1] and len(arrays["classes"]) == 10
    assert arrays["classes"][arrays["arr_1"]].tolist() == ["bag", "bag", "trouser"] * 2


def save_model_of(counts, path):
    torch.save({**load_file(MODEL), "counts": counts}, path)


def test_a_set_has_the_proportions_of_the_training_set(run):
    """As near as whole numbers can be, also for the first images of a set."""
    counts = [100, 300, 0, 50, 50, 0, 0, 0, 0, 0]
    save_model_of(counts, "own.pt")
    run("sample.py --ckpt own.pt --num 20 --refs 1 --steps 1 --out a.npz")
    labels = np.load("a.npz")["arr_1"]
    assert np.bincount(labels, minlength=10).tolist() == [4, 12, 0, 2, 2, 0, 0, 0, 0, 0]
    assert np.bincount(labels[:10], minlength=10).tolist() == [2, 6, 0, 1, 1, 0, 0, 0, 0, 0]
    run("sample.py --ckpt own.pt --num 20 --refs 1 --steps 1 --balanced --out b.npz")
    assert np.load("b.npz")["arr_1"].tolist() == [0, 1, 3, 4] * 5
    run("sample.py --ckpt own.pt --num 6 --class 3 1 --refs 1 --steps 1 --out c.npz")
    assert sorted(np.load("c.npz")["arr_1"]) == [1] * 5 + [3]


def test_a_model_without_its_vae_beside_it_is_said_in_words_of_the_command(run):
    """No flag is blamed that was not given."""
    torch.save({**load_file(MODEL), "vae_digest": "another"}, "ema.pt")
    err = run("sample.py --ckpt ema.pt --n 1", expect=2).err
    assert "not the VAE of this model's latents; name that with --vae" in err


def test_imagenet_is_drawn_in_equal_numbers(run):
    """Any model of 1,000 classes is."""
    config = dataclasses.replace(SIZES["XS"], num_classes=1000, width=32, heads=1)
    model = TransDiff(config)
    entries = dict(config=dataclasses.asdict(config), counts=[1, 999, *[0] * 998])
    torch.save(dict(entries, model=model.state_dict()), "ema.pt")
    run(f"sample.py --ckpt ema.pt --vae {VAE} --num 4 --steps 1 --cfg 1 --out s.npz")
    assert np.load("s.npz")["arr_1"].tolist() == [0, 1, 0, 1]
    weights = np.random.default_rng(0).integers(732, 1301, 1000)
    assert sample.in_turn(np.ones(1000), 50_000).tolist() == [*range(1000)] * 50
    assert sample.in_turn(np.array([5, 1]), 4).tolist() == [0, 0, 1, 0]  # shares of 3.3 and 0.7
    assert sample.in_turn(np.array([8, 1]), 4).tolist() == [0, 0, 0, 0]  # 3.6 and 0.4
    drawn = np.bincount(sample.in_turn(weights, 50_000))
    assert np.abs(drawn - 50_000 * weights / weights.sum()).max() < 1


def test_the_folder_of_a_run_stands_for_its_model_and_vae(run, tmp_path):
    """Only the VAE beside the model fits: it is another than the bundled one."""
    (tmp_path / "run").mkdir()
    vae = load_file(VAE)
    torch.save({**vae, "scale": 0.5 * vae["scale"]}, tmp_path / "run" / "vae.pt")
    digest = load_vae(tmp_path / "run" / "vae.pt").digest
    torch.save({**load_file(MODEL), "vae_digest": digest}, tmp_path / "run" / "ema.pt")
    draw = "sample.py --class bag --n 1 --refs 1 --steps 1 --out"
    run(f"{draw} folder.npz --ckpt run")
    run(f"{draw} file.npz --ckpt run/ema.pt")
    assert np.array_equal(np.load("folder.npz")["arr_0"], np.load("file.npz")["arr_0"])


# ------------------------------------------------------------------------------------ large sets
DRAW_SET = "sample.py --num 40 --batch-size 8 --steps 2 --refs 2 --out"  # 5 parts


@pytest.fixture(scope="module")
def balanced_set(tmp_path_factory):
    """Bytes of the set that DRAW_SET draws in one process."""
    path = tmp_path_factory.mktemp("set") / "one.npz"
    run_in_process(f"{DRAW_SET} {path}")
    return path.read_bytes()


def test_two_processes_write_the_same_balanced_set_as_one(start, balanced_set, tmp_path):
    run_together(start, f"{DRAW_SET} two.npz", 2)
    assert (tmp_path / "two.npz").read_bytes() == balanced_set
    assert not (tmp_path / "two.npz.partial").exists()
    arrays = np.load(tmp_path / "two.npz")
    assert arrays["arr_0"].shape == (40, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == list(range(10)) * 4


def test_a_killed_set_is_resumed(start, run, refused, balanced_set, tmp_path, monkeypatch):
    """Process 0 of 2 draws parts 0, 2 and 4, and waits for the others, which never come."""
    partial = tmp_path / "s.npz.partial"
    process = start(f"{DRAW_SET} s.npz", rank=0, world=2)
    wait_for_parts(partial, 3)
    message = "s.npz.partial: another command writes to it"
    assert message in run(f"{DRAW_SET} s.npz", expect=2).err
    process.kill()
    process.join()
    parts = {path.name for path in partial.glob("*.npy")}
    assert parts == {"00000.npy", "00002.npy", "00004.npy"} and not (tmp_path / "s.npz").exists()

    message = "s.npz.partial: is of other inputs or settings"
    assert message in refused(f"{DRAW_SET} s.npz --seed 1")
    drawn = []
    count = lambda vae, latents: drawn.append(len(latents)) or latents_to_images(vae, latents)
    monkeypatch.setattr(sample, "latents_to_images", count)
    run(f"{DRAW_SET} s.npz")
    assert drawn == [8, 8]  # the two parts that were missing
    assert (tmp_path / "s.npz").read_bytes() == balanced_set and not partial.exists()


# ------------------------------------------------------------------------------------ --pretrained
@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve({"/path": bytes}) starts a server: its url, the requests, where to cut files off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in server.files:
                return self.send_error(404)
            server.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.files[self.path])))
            self.end_headers()
            self.wfile.write(server.files[self.path][: server.cut])

        def log_message(self, *args):
            pass

    def call(files):
        server.files = files
        return server

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.requests, server.cut = f"http://127.0.0.1:{server.server_port}", [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield call
    server.shutdown()


@pytest.fixture(scope="module")
def released_files(tmp_path_factory):
    """The released files, small, by their paths; that of L-mrar is a web page."""
    folder, files = tmp_path_factory.mktemp("released"), {}
    for name, kind in (("transdiff_b_mrar", "mrar"), ("vae", "vae")):
        path = write_released(kind, folder / f"{kind}.pth")
        files[f"{RELEASED}/{name}/checkpoint-last.pth"] = path.read_bytes()
    files[f"{RELEASED}/transdiff_l_mrar/checkpoint-last.pth"] = b"<html>please log in</html>"
    return files


@pytest.fixture
def hub(serve, released_files, monkeypatch):
    server = serve(released_files)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


def test_pretrained_fetches_once_and_draws(run, hub):
    Path("B-mrar").mkdir()  # is not meant
    draw = "sample.py --pretrained B-mrar --class 1 --n 1 --refs 1 --steps 1"
    run(f"{draw} --out x.npz")
    assert len(hub.requests) == 2  # the model and the VAE
    assert np.load("x.npz")["arr_0"].shape == (1, 256, 256, 3)
    run(f"{draw} --class hat", expect=2)  # is noticed after both files are loaded
    assert len(hub.requests) == 2


def test_stage_2_starts_from_a_released_model_by_its_name(run, hub, garments):
    """On images of one's own: its size and positions; a line, since the VAE is another."""
    save_vae("vae.pt", dict(SMALL, z_channels=16), 32)
    np.savez("photos.npz", images=garments[0][:8], labels=np.arange(8) // 4)
    run("vae.py encode --data photos.npz --vae vae.pt --image-size 64 --out cache")
    flags = "--data cache --steps 1 --batch-size 1 --lr 0 --dtype fp32 --sample-every 0"
    out = run(f"finetune_mrar.py --init B-mrar {flags}").out
    assert "was trained on latents of kl16, these are of another VAE" in out
    assert len(hub.requests) == 1
    ours, theirs = (load_checkpoint(path) for path in ("runs/mrar/last.pt", "B-mrar"))
    assert ours.config == dataclasses.replace(theirs.config, num_classes=2)
    assert torch.equal(ours.decoder.positions, theirs.decoder.positions)
    save_vae("other.pt", SMALL, 32)
    run("vae.py encode --data photos.npz --vae other.pt --out other")
    err = run("finetune_mrar.py --init B-mrar --data other --steps 1 --out new", expect=2).err
    assert "was trained on latents of 16 channels, other has 8: encode with its VAE" in err


@pytest.mark.parametrize("name,cut,message", [
    ("B-mrar", 1_000_000, "/transdiff_b_mrar/checkpoint-last.pth ("),
    ("L-mrar", None, "/transdiff_l_mrar/checkpoint-last.pth (File is not a zip file)"),
    ("H", None, "/transdiff_h/checkpoint-last.pth (HTTP Error 404"),
])  # fmt: skip
def test_a_download_that_failed_is_not_kept(name, cut, message, run, hub, tmp_path):
    hub.cut = cut
    err = run(f"sample.py --pretrained {name}", expect=2).err.strip().splitlines()[-1]
    assert "could not fetch" in err and message in err
    assert not list((tmp_path / "home").rglob("*.pth"))


@pytest.mark.parametrize("line", ["sample.py --pretrained H", "fid.py --samples s.npz"])
def test_no_network_is_one_line(line, command, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.full((12, 8, 8, 3), 9, np.uint8))
    env = dict(https_proxy="http://127.0.0.1:9", no_proxy="", TORCH_HOME=str(tmp_path / "home"))
    _, err = command(line, expect=2, env=env)
    assert len(err.strip().splitlines()) == 1 and "could not fetch https://" in err
    assert f"put the file at {tmp_path}/home/hub/transdiff/" in err
