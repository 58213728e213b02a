"""sample.py on the bundled weights, and the download of the released ones from a local server."""

import http.server
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden import write_released
from in_process import run_in_process
from PIL import Image

import sample
from model import load_checkpoint, sampling_settings
from vae import latents_to_images, load_vae, per_image_noise

MODEL, VAE = ROOT / "demo" / "mrar.pt", ROOT / "demo" / "vae.pt"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("sample.py --n 2", expect=0) runs it in this process, in an empty folder, and returns (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "DEMO_MODEL", MODEL)  # the default paths are relative to the folder of the import
    monkeypatch.setattr(sample, "DEMO_VAE", VAE)

    def call(line, expect=0):
        run_in_process(line, expect)
        return capsys.readouterr()

    return call


def columns(path, n):
    """The pictures in the last row of a grid of n columns of 32 px images, in grey, int [32, 32] each."""
    row = np.asarray(Image.open(path).convert("L")).astype(int)[-68:-4:2, ::-1][:, ::2][:, ::-1]  # enlarged twice
    return [row[:, row.shape[1] - 34 * (n - i) : row.shape[1] - 34 * (n - i) + 32] for i in range(n)]


# ------------------------------------------------------------------------------------------ pictures


def test_the_first_command_of_the_readme_draws_trousers(tmp_path, command):
    """Most of the 8 images correlate best with the mean image of their class."""
    out, _ = command("sample.py --class 1 --refs 4")
    path = tmp_path / "runs" / "samples.png"
    assert "runs/samples.png (trouser; refs 4" in out and Image.open(path).size[1] == (32 + 4) * 2
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    means = np.stack([data["images"][data["labels"] == k].mean(0).ravel() for k in range(10)])
    images = np.stack([image.ravel() for image in columns(path, 8)])
    correlation = np.corrcoef(images, means)[:8, 8:]
    assert (correlation.argmax(1) == 1).sum() >= 6


def test_image_i_is_a_function_of_the_seed_and_i(run):
    flags = "sample.py --class 2 7 --n 3 --steps 3 --refs 2 --dtype fp32 --out"
    run(f"{flags} a.npz")
    run(f"{flags} b.npz --batch-size 4")
    run(f"{flags} c.npz --seed 1")
    a, b, c = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).mean() > 5
    assert len(np.unique(a.reshape(6, -1), axis=0)) == 6


def test_references_start_every_chain(run):
    run("sample.py --class bag --n 2 --refs 1 --steps 2 --out ref.png")
    draw = "sample.py --class bag --n 2 --refs 3 --steps 2 --show-chain"
    run(f"{draw} --out plain.png")
    run(f"{draw} --references ref.png --out chain.png")
    (first, second, _), (reference, follower, _) = columns("plain.png", 3), columns("chain.png", 3)
    assert not np.array_equal(first, reference) and not np.array_equal(second, follower)
    assert (
        "--refs 3, 3 --references: this model draws"
        in run(f"{draw} --references {'ref.png ' * 3} --out x.png", expect=2)[1]
    )
    assert "ref.pn:" in run(f"{draw} --references ref.pn --out x.png", expect=2)[1]


def test_show_chain_draws_a_chain_in_each_row(run):
    run("sample.py --class bag --n 2 --refs 3 --steps 2 --show-chain --out chain.png")
    assert Image.open("chain.png").size[1] == (2 * 34 + 2) * 2 + 20  # the heads are 20 pixels high


def test_fuse_decodes_the_first_half_of_one_class_with_the_second_half_of_another(run):
    run("sample.py --fuse trouser bag --n 1 --refs 2 --steps 3 --dtype fp32 --out fused.png")
    model, vae = load_checkpoint(MODEL), load_vae(VAE)
    kwargs = sampling_settings(model.config) | dict(steps=3)

    def features(label):
        label, randn = torch.tensor([label]), per_image_noise(0, range(1), torch.device("cpu"))
        return model.encode(label, model.sample(label, 1, noise_sampler=randn, **kwargs))

    def picture(c):
        randn = per_image_noise(0, range(1), torch.device("cpu"))
        noise = randn(torch.empty(1, *model.config.latent_shape))
        c_null, settings = model.encode(torch.tensor([10])), {k: v for k, v in kwargs.items() if k != "null_refs"}
        image = latents_to_images(vae, model.decode(c, noise, c_null, noise_sampler=randn, **settings))[0]
        return np.asarray(Image.fromarray(image).convert("L")).astype(int)

    with torch.inference_mode():
        trouser, bag = features(1), features(8)
        half = trouser.shape[1] // 2
        expected = [picture(c) for c in (trouser, bag, torch.cat([trouser[:, :half], bag[:, half:]], dim=1))]
    for image, reference in zip(columns("fused.png", 3), expected):
        assert np.abs(image - reference).max() <= 2
    assert min(np.abs(expected[2] - expected[k]).mean() for k in (0, 1)) > 1


def test_features_decodes_the_first_of_them(run):
    """All of the features give the image itself."""
    flags = "--n 1 --refs 4 --steps 3 --dtype fp32"
    run(f"sample.py --features 16 64 --class trouser {flags} --out features.png")
    run(f"sample.py --fuse trouser bag {flags} --out fused.png")
    few, every = columns("features.png", 2)
    assert np.array_equal(every, columns("fused.png", 3)[0]) and np.abs(few - every).mean() > 1


# ------------------------------------------------------------------------------------------ large sets

KILL_AT_THE_FOURTH_BATCH = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import sample
latents_to_images, batches = sample.latents_to_images, iter(range(9))
sample.latents_to_images = lambda *args: os.kill(os.getpid(), 9) if next(batches) == 3 else latents_to_images(*args)
sample.main()
"""


def test_a_balanced_set_has_the_same_bytes_from_one_process_from_two_and_after_a_kill(tmp_path, command, run):
    flags = "--num 40 --batch-size 8 --steps 2 --refs 2 --out"
    run(f"sample.py {flags} one.npz")
    arrays = np.load("one.npz")
    assert arrays["arr_0"].shape == (40, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == list(range(10)) * 4
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--")
    command(f"sample.py {flags} two.npz", launcher=launcher)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()

    (tmp_path / "kill.py").write_text(KILL_AT_THE_FOURTH_BATCH)
    argv = [tmp_path / "kill.py", ROOT / "sample.py", *flags.split(), "killed.npz"]
    command(argv, expect=-signal.SIGKILL)
    partial = tmp_path / "killed.npz.partial"
    done = list(partial.glob("*.npy"))
    assert len(done) == 3 and not (tmp_path / "killed.npz").exists()
    _, err = run(f"sample.py {flags} killed.npz --seed 1", expect=2)
    assert "killed.npz.partial: unfinished, of other inputs or settings" in err
    run(f"sample.py {flags} killed.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "killed.npz").read_bytes() and not partial.exists()


@pytest.mark.parametrize("flags,message", [
    ("--features 8 --out x.npz", "must end in .png here"),
    ("--n 1", "must end in .npz here"),
])  # fmt: skip
def test_several_processes_draw_only_sets(flags, message, run, monkeypatch):
    monkeypatch.setattr(sample, "WORLD", 2)
    assert message in run(f"sample.py {flags}", expect=2)[1]


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("flags,message", [
    ("--num 15 --out x.npz", "--num 15: must be a multiple of the 10 classes"),
    ("--num 20 --out x.png", "must end in .npz"),
    ("--fuse 1 2 --show-chain", "--show-chain: not allowed with argument --fuse"),
    ("--features 2 256", "decoded from 64"),
    ("--class 10", "--class 10: this model has classes 0 to 9, t-shirt, trouser"),
    ("--class hat", "--class hat"),
    ("--refs 5", "--refs 5, 0 --references: this model draws chains of 1 to 4 images"),
    ("--ckpt nothing.pt", "nothing.pt"),
    (f"--ckpt {VAE}", "vae.pt: not a readable TransDiff model"),
    (f"--vae {MODEL}", "mrar.pt: not a readable VAE"),
    ("--out picture.jpg", "--out picture.jpg: must end in .png or .npz here"),
    ("--n 0", "at least 1"),
    ("--pretrained B --ckpt x", "--ckpt: not allowed with argument --pretrained"),
])  # fmt: skip
def test_errors_are_one_line_and_nothing_is_written(flags, message, tmp_path, run):
    _, err = run(f"sample.py {flags}", expect=2)
    assert message in err.strip().splitlines()[-1] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ --pretrained


@pytest.fixture(scope="module")
def released_files(tmp_path_factory):
    """Contents of the released files, small, by their paths; that of L-mrar is a web page."""
    folder, files = tmp_path_factory.mktemp("released"), {}
    for name, kind in (("transdiff_b", "one_step"), ("transdiff_b_mrar", "mrar"), ("vae", "vae")):
        files[f"{name}/checkpoint-last.pth"] = write_released(kind, folder / f"{kind}.pth").read_bytes()
    return files | {"transdiff_l_mrar/checkpoint-last.pth": b"<html>please log in</html>"}


@pytest.fixture
def hub(tmp_path, released_files, monkeypatch):
    """A server of the released files, where --pretrained looks for them.

    hub.cut       close the connection after so many bytes of the body
    hub.requests  number of files sent so far
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            prefix = "/zhendch/Transdiff/resolve/main/"
            body = released_files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
            if body is None:
                return self.send_error(404)
            server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cut = 0, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()


def test_pretrained_fetches_once_and_draws(run, hub):
    hub.cut = 1_000_000
    _, err = run("sample.py --pretrained B-mrar", expect=2)
    assert "not a zip file" in err and "repeat the command" in err and "checkpoint-last.pth" in err
    hub.cut = None
    draw = "sample.py --pretrained B-mrar --class 1 --n 1 --refs 1 --steps 1"
    run(f"{draw} --out x.npz")
    assert hub.requests == 3  # the model twice, then the VAE
    assert np.load("x.npz")["arr_0"].shape == (1, 256, 256, 3)
    run(draw)
    assert hub.requests == 3


def test_a_download_of_something_else_is_not_kept(run, hub, tmp_path):
    _, err = run("sample.py --pretrained L-mrar", expect=2)
    assert "transdiff_l_mrar/checkpoint-last.pth" in err and "not a zip file" in err.splitlines()[-1]
    assert not list((tmp_path / "home").rglob("checkpoint-last.pth"))


def test_no_network_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _, err = run("sample.py --pretrained H", expect=2)
    assert len(err.strip().splitlines()) == 1 and "could not fetch" in err and "put the file at" in err
