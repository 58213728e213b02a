"""sample.py on the bundled weights, and the download of the released ones from a server of our own."""
import http.server
import sys
import threading

import numpy as np
import pytest
from golden import write_released
from PIL import Image

import sample
from vae import DEMO_DATA, run


def test_the_readmes_first_command_draws_trousers(tmp_path, command):
    out, _ = command("sample.py --class 1 --refs 4")
    picture = np.asarray(Image.open(tmp_path / "runs" / "samples.png").convert("L"))
    assert "8 images (trouser; refs 4" in out and picture.shape == ((32 + 4) * 2, (8 * 34 + 2) * 2)
    data = np.load(DEMO_DATA)
    means = np.stack([data["images"][data["labels"] == k].mean(0) for k in range(10)])
    means = means.reshape(10, -1) - means.reshape(10, -1).mean(1, keepdims=True)
    images = np.stack([picture[4 + 4 : 4 + 60 : 2, 4 + 68 * i + 4 : 4 + 68 * i + 60 : 2] for i in range(8)]).reshape(8, -1)
    likeness = (images - images.mean(1, keepdims=True)) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert (likeness.argmax(1) == 1).sum() >= 6  # nearest class by correlation with the mean garment


def test_image_i_is_a_function_of_seed_and_i(tmp_path, command):
    flags = "sample.py --class 2 7 --n 3 --steps 3 --refs 2 --dtype fp32 --out"
    command(f"{flags} a.npz")
    command(f"{flags} b.npz --batch-size 4")
    command(f"{flags} c.npz --seed 1")
    a, b, c = (np.load(tmp_path / f"{x}.npz")["arr_0"].astype(int) for x in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).mean() > 5
    assert len(np.unique(a.reshape(6, -1), axis=0)) == 6


def test_a_sampler_without_noise(tmp_path, command):
    """No s1 and no s2 to speak of; guidance in an interval is another picture, and the paper's sampler yet another."""
    flags = "sample.py --class 2 --n 2 --steps 3 --refs 1 --out"
    for name, more in (("a", ""), ("b", "--s1 0.5 --s2 0"), ("c", "--cfg-interval 0.9 1")):
        command(f"{flags} {name}.npz --sampler adams-bashforth {more}")
    command(f"{flags} d.npz")
    a, b, c, d = (np.load(tmp_path / f"{x}.npz")["arr_0"] for x in "abcd")
    assert np.array_equal(a, b) and not np.array_equal(a, c) and not np.array_equal(a, d)


def test_several_processes_draw_no_pictures(command):
    _, err = command("sample.py --show-chain", expect=2, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert "several processes draw into an .npz only" in err
    _, err = command("sample.py --num 10 --out x.npz", expect=2, env={"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0"})
    assert "they must be on one machine" in err


def test_show_chain(tmp_path, command):
    command("sample.py --class bag --n 2 --refs 3 --steps 2 --show-chain --out chain.png")
    assert Image.open(tmp_path / "chain.png").size == ((3 * 34 + 2) * 2, (2 * 34 + 2) * 2)


KILL_AT_THE_FOURTH_BATCH = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import sample
pixels, count = sample.pixels, iter(range(9))
sample.pixels = lambda *a: os.kill(os.getpid(), 9) if next(count) == 3 else pixels(*a)
sample.main()
"""


def test_balanced_samples_are_the_same_bytes_from_one_process_and_from_two_and_after_a_kill(tmp_path, command):
    flags = "sample.py --num 60 --batch-size 8 --steps 2 --refs 2 --out"
    command(f"{flags} one.npz")
    arrays = np.load(tmp_path / "one.npz")
    assert arrays["arr_0"].shape == (60, 32, 32, 3) and arrays["arr_1"].tolist() == list(range(10)) * 6
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518", "--")
    command(f"{flags} two.npz", launcher=launcher, env={"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()

    (tmp_path / "stop.py").write_text(KILL_AT_THE_FOURTH_BATCH)
    command(f"{flags} three.npz", expect=-9, launcher=(sys.executable, "stop.py"))
    assert not (tmp_path / "three.npz").exists() and np.load(tmp_path / "three.npz.partial" / "done.npy").tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    _, err = command(f"{flags} three.npz --seed 1", expect=2)
    assert "three.npz.partial: unfinished samples of another model or other settings" in err
    command(f"{flags} three.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "three.npz").read_bytes() and not (tmp_path / "three.npz.partial").exists()


def test_fusion_and_feature_count(tmp_path, command):
    """Columns of --fuse: A, B, A's first half with B's second. All of the features is the image itself."""
    def columns(name, n):
        picture = np.asarray(Image.open(tmp_path / name).convert("L")).astype(int)[4 : 4 + 64 : 2, ::2]
        return [picture[:, 2 + 34 * i : 34 + 34 * i] for i in range(n)]

    flags = "--n 1 --steps 4 --dtype fp32"
    command(f"sample.py --fuse trouser bag {flags} --out ab.png")
    command(f"sample.py --fuse bag trouser {flags} --fuse-half second --out ba.png")
    a, b, ab = columns("ab.png", 3)
    b2, a2, ba = columns("ba.png", 3)
    assert np.array_equal(a, a2) and np.array_equal(b, b2) and np.array_equal(ab, ba)
    assert min(np.abs(ab - a).mean(), np.abs(ab - b).mean()) > 1  # it is neither
    out, _ = command(f"sample.py --features 64,256 --class trouser {flags} --out f.png")
    assert "the first 16, 64 of 64 features" in out
    few, every = columns("f.png", 2)
    assert np.array_equal(every, a) and np.abs(few - every).mean() > 1


@pytest.mark.parametrize("flags,message", [
    ("--num 15 --out x.npz", "--num 15: must be a multiple of the 10 classes, e.g. 20"),
    ("--num 20", "must end in .npz"),
    ("--fuse 1 2 --show-chain", "different pictures"),
    ("--features 2,256", "each from 4 to 256"),
    ("--class 10", "--class 10: this model has classes 0 to 9: t-shirt, trouser"),
    ("--class hat", "--class hat"),
    ("--refs 5", "--refs 5: this model draws chains of 1 to 4 images"),
    ("--ckpt nothing.pt", "nothing.pt"),
    ("--ckpt {vae}", "is it a VAE?"),
    ("--vae {model}", "is it a TransDiff model?"),
    ("--out picture.jpg", "--out picture.jpg: must end in .png or .npz here"),
    ("--n 0", "at least 1"),
    ("--pretrained B --ckpt x", "give one"),
])  # fmt: skip
def test_errors(flags, message, tmp_path, monkeypatch, capsys):
    """One line, status 2, nothing written. (In this process, to save the seconds of starting one.)"""
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.format(vae=sample.DEMO_VAE.resolve(), model=sample.DEMO_MODEL.resolve()).split()])
    monkeypatch.setattr(sample, "DEMO_MODEL", sample.DEMO_MODEL.resolve())
    monkeypatch.setattr(sample, "DEMO_VAE", sample.DEMO_VAE.resolve())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(sample.main)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ --pretrained


@pytest.fixture
def hub(tmp_path):
    """A server of the released layout; .cut makes it drop the connection after so many bytes, .ranges collects what was asked for."""
    files = {f"{folder}/checkpoint-last.pth": write_released(kind, tmp_path / f"{kind}.pth").read_bytes() for folder, kind in (("transdiff_b", "one_step"), ("transdiff_b_mrar", "mrar"), ("vae", "vae"))}

    files["transdiff_l_mrar/checkpoint-last.pth"] = b"<html>please log in</html>"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            prefix = "/zhendch/Transdiff/resolve/main/"
            body = files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
            if body is None:
                return self.send_error(404)
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            first = int(asked[6:-1]) if asked else 0
            if first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first : first + server.cut] if server.cut else body[first:])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.cut = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "TORCH_HOME": str(tmp_path / "home")}
    yield server
    server.shutdown()


def test_pretrained_fetches_resumes_and_draws(tmp_path, command, hub):
    hub.cut = 1_000_000
    _, err = command("sample.py --pretrained B-mrar", expect=2, env=hub.env)
    assert "run it again to go on" in err and "checkpoint-last.pth" in err
    hub.cut = None
    out, _ = command("sample.py --pretrained B-mrar --class 1 --n 1 --refs 2 --steps 1 --out x.npz", env=hub.env)
    assert hub.ranges == [None, "bytes=1000000-", None]  # the model in two goes, then the VAE
    assert "cfg 1.3, s1 0.87, s2 0.91" in out and np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 256, 256, 3)
    command("sample.py --pretrained B-mrar --class 1 --n 1 --refs 1 --steps 1", env=hub.env)
    assert len(hub.ranges) == 3  # from the cache
    # killed between the last byte and the rename: all is there, and the server has no more to send
    whole = tmp_path / "home" / "hub" / "transdiff" / "vae" / "checkpoint-last.pth"
    whole.rename(f"{whole}.part")
    command("sample.py --pretrained B-mrar --class 1 --n 1 --refs 1 --steps 1", env=hub.env)
    assert whole.exists()


def test_a_download_of_something_else_is_named_with_the_remedy(command, hub, tmp_path):
    _, err = command("sample.py --pretrained L-mrar", expect=2, env=hub.env)
    assert "L-mrar" not in err and "transdiff_l_mrar/checkpoint-last.pth: not a readable checkpoint" in err and "remove the file to fetch it again" in err


def test_no_network_is_one_line(command, tmp_path):
    _, err = command("sample.py --pretrained H", expect=2, env={"HF_ENDPOINT": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)})
    assert len(err.strip().splitlines()) == 1 and "could not fetch" in err and "put the file at" in err
