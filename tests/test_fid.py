"""fid.py: closed forms, a float64 reference written from the definitions, and the command with a
tiny random network."""

import http.server
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from in_process import run_in_process
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn

import fid
from model import UserError
from vae import center_crop

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Tiny(nn.Module):
    """Images of any size -> 16 features, 5 classes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 5, stride=3), nn.Linear(16, 5)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = self.conv(x.float() / 127.5 - 1).relu().mean((2, 3))
        if return_features:
            return features
        logits = 60 * ((features - features.mean(1, keepdim=True)) @ self.head.weight.t())
        return (logits if no_output_bias else logits + self.head.bias).softmax(1)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "tiny.pt"
    torch.manual_seed(0)
    torch.jit.script(Tiny().eval()).save(str(path))
    return path


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """measure(flags) runs fid.py in this process, in an empty folder, and returns its JSON and what
    it printed."""
    monkeypatch.chdir(tmp_path)

    def call(flags):
        monkeypatch.setattr(sys, "argv", ["fid.py", *f"{flags} --json out/numbers.json".split()])
        fid.main()
        return json.loads((tmp_path / "out" / "numbers.json").read_text()), capsys.readouterr()

    return call


def noise_images(n, seed, spread=64, size=20):
    """uint8 [n, size, size, 3]. Brightness and contrast vary, so that features differ."""
    rng = np.random.default_rng(seed)
    brightness = 128 + rng.normal(0, spread, (n, 1, 1, 3))
    x = brightness + rng.normal(0, 1, (n, size, size, 3)) * rng.uniform(0, 90, (n, 1, 1, 1))
    return x.clip(0, 255).astype(np.uint8)


def features_and_probabilities(net, images):
    """Float64 results of the network, called directly."""
    module, x = torch.jit.load(str(net)), torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        outputs = module(x, return_features=True), module(x, no_output_bias=True)
    return [output.double().numpy() for output in outputs]


def brute_precision_recall(a, b):
    def part_inside(x, y):  # the part of x that is in a ball around a point of y
        radii = np.array([sorted(np.delete(row, i))[2] for i, row in enumerate(cdist(y, y))])
        return np.mean([(row <= radii).any() for row in cdist(x, y)])

    return part_inside(a, b), part_inside(b, a)


def brute_frechet_distance(a, b):
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)


def brute_inception_score(p):
    """Mean of exp(E KL(p(y|x) || p(y))) over the ten parts of torch-fidelity."""
    p = p[np.random.RandomState(2020).permutation(len(p))]
    scores = []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        kl = [sum(q * np.log(q / m) for q, m in zip(row, part.mean(0))) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores)


# ------------------------------------------------------------------------------------ the measures


def test_frechet_distance_of_gaussians_in_closed_form():
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    # These do not commute. The trace of the root of a 2 x 2 matrix:
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    mu1, mu2 = np.array([1.0, 2.0]), np.array([4.0, -2.0])
    distance = fid.frechet_distance(*map(torch.tensor, (mu1, a, mu2, b)))
    assert distance == pytest.approx(25 + np.trace(a + b) - 2 * cross, rel=1e-12)

    u, v = np.random.default_rng(0).normal(size=(2, 50))  # rank one: tr sqrt(u u^T v v^T) = |u.v|
    zero = torch.zeros(50, dtype=torch.float64)
    uu, vv = (torch.tensor(np.outer(x, x)) for x in (u, v))
    distance = fid.frechet_distance(zero, uu, zero, vv)
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-6)


def test_the_measures_agree_with_their_definitions_to_one_millionth():
    """Of float64 features. Of 83 samples the parts of the score differ in size."""
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2, size=(83, 16)), rng.gamma(2.2, size=(61, 16))
    p = rng.dirichlet([0.2] * 5, size=83)
    stats = [fid.mean_and_covariance(torch.tensor(x)) for x in (a, b)]
    distance = fid.frechet_distance(*stats[0], *stats[1])
    assert distance == pytest.approx(brute_frechet_distance(a, b), rel=1e-6)
    score = fid.inception_score(torch.tensor(p))
    assert score > 1.5 and score == pytest.approx(brute_inception_score(p), rel=1e-6)
    measures = fid.precision_recall(torch.tensor(a), torch.tensor(b))
    assert 0 < min(measures) and max(measures) < 1
    assert measures == pytest.approx(brute_precision_recall(a, b), abs=1e-12)


@pytest.mark.parametrize("n", [30, 1000])
def test_identical_sets_have_distance_zero(n):
    features = torch.randn(n, 200, generator=torch.Generator().manual_seed(0)).relu()
    mu, sigma = fid.mean_and_covariance(features)
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6 * sigma.trace()
    assert fid.frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(200, rel=1e-6)


def test_inception_score_of_certain_predictions():
    every_class = torch.eye(8).repeat(1000, 1)  # each as often: the score is the number of classes
    assert fid.inception_score(every_class) == pytest.approx(8, rel=0.01)
    assert fid.inception_score(every_class[:1].repeat(100, 1)) == 1.0


def test_precision_and_recall():
    a, b = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (150, 130))
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, a + 100) == (0, 0)
    half_missing = torch.cat([a + 0.01, a + 100])
    assert fid.precision_recall(a, half_missing) == (1, 0.5)
    a, b = a + 1000, b + 1000
    expected = brute_precision_recall(a.numpy(), b.numpy())
    assert fid.precision_recall(a, b) == pytest.approx(expected, abs=1e-12)


def test_copies_of_an_image_are_in_each_others_manifold():
    x = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    # 5 copies of each: the balls have radius 0.
    assert fid.precision_recall(x.repeat(5, 1)[torch.randperm(100)], x.repeat(7, 1)) == (1, 1)


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "counts,spread", [((83, 61), 64), ((12, 10), 30)], ids=["many", "fewer than features"]
)
def test_the_command_gives_what_the_definitions_say(tmp_path, measure, net, counts, spread):
    """Few images have singular covariances."""
    images, others = (noise_images(n, seed, spread) for seed, n in enumerate(counts))
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez_compressed(tmp_path / "r.npz", arr_0=others)
    got, printed = measure(f"--samples s.npz --ref r.npz --net {net}")

    (a, p), (b, _) = (features_and_probabilities(net, x) for x in (images, others))
    assert got["frechet_distance"] == pytest.approx(brute_frechet_distance(a, b), rel=1e-4)
    assert got["score"] == pytest.approx(brute_inception_score(p), rel=1e-5)
    measures = got["precision"], got["recall"]
    assert measures == pytest.approx(brute_precision_recall(a, b), abs=1e-12)
    numbers = {"frechet_distance", "score", "precision", "recall"}
    assert set(got) == numbers | {"network", "samples", "reference", "num_samples"}
    # FID and the Inception Score are of Inception's features.
    assert "fid " not in printed.out and "inception" not in printed.out.lower()
    assert f"{got['frechet_distance']:.4f}" in printed.out and "fewer than 10,000" in printed.err


def test_statistics_are_saved_and_reused(tmp_path, measure, net):
    images, others = noise_images(50, 0), noise_images(40, 1)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=others)
    direct, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    alone, _ = measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    assert "frechet_distance" not in alone and "score" in alone
    reused, _ = measure(f"--samples s.npz --ref stats.npz --net {net}")
    assert reused.pop("reference") == "stats.npz" and direct.pop("reference") == "r.npz"
    assert reused.pop("network") == direct.pop("network")
    assert reused.pop("samples") == direct.pop("samples")
    del direct["precision"], direct["recall"]  # they need the images
    assert reused == pytest.approx(direct, rel=1e-9)
    sigma = np.cov(features_and_probabilities(net, others)[0], rowvar=False)
    np.testing.assert_allclose(
        np.load(tmp_path / "stats.npz")["sigma"], sigma, rtol=1e-4, atol=1e-9
    )


def test_statistics_of_another_size_are_refused(tmp_path, measure, net):
    np.savez(tmp_path / "large.npz", arr_0=noise_images(20, 0, size=32))
    measure(f"--samples large.npz --net {net} --save-stats stats.npz")
    small = "--samples large.npz --image-size 16"
    with pytest.raises(UserError, match=r"stats.npz: .*\(32, 32\) px, not of .*\(16, 16\) px"):
        measure(f"{small} --ref stats.npz --net {net}")
    measure(f"{small} --net {net} --save-stats small.npz")
    assert measure(f"{small} --ref small.npz --net {net}")[0]["frechet_distance"] < 1e-6


def test_the_statistics_in_a_reference_batch_come_before_those_of_its_images(
    tmp_path, measure, net, monkeypatch
):
    """ADM's reference batches hold both; their statistics are of more images than the batch has.

    ADM's do not say whose features they are of: Inception's, of images as they are."""
    np.savez(tmp_path / "r.npz", arr_0=noise_images(40, 1))
    measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    stats = np.load(tmp_path / "stats.npz")
    shifted = dict(mu=stats["mu"] + 10, sigma=stats["sigma"], mu_s=np.zeros(3))
    np.savez(tmp_path / "adm.npz", arr_0=noise_images(40, 1), **shifted)
    monkeypatch.setattr(fid, "fetch", lambda url, name: net)  # in the place of Inception
    got, _ = measure("--samples r.npz --ref adm.npz")
    assert got["fid"] == pytest.approx(16 * 100, rel=1e-9)
    assert got["precision"] == got["recall"] == 1
    for flags in (f"--net {net}", "--image-size 20"):
        with pytest.raises(UserError, match="adm.npz: statistics of other features, not of"):
            measure(f"--samples r.npz --ref adm.npz {flags}")


def test_a_folder_gives_the_numbers_of_an_npz(tmp_path, measure, net):
    images = noise_images(30, 0)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=noise_images(20, 1))
    for i, image in enumerate(images):  # some at the top, some two folders down
        path = tmp_path / "tree" / ("." if i < 9 else f"class {i % 3}/more") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "tree" / "notes.txt").write_text("not an image")
    a, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    b, printed = measure(f"--samples tree --ref r.npz --net {net} --workers 1")
    assert "30 images" in printed.out
    for key in (
        "frechet_distance",
        "precision",
        "recall",
    ):  # the Inception Score depends on the order
        assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert measure(f"--samples s.npz --ref tree --net {net}")[0]["frechet_distance"] < 1e-5

    Image.fromarray(noise_images(1, 9, size=40)[0]).save(tmp_path / "tree" / "large.png")
    message = r"large.png: is 40 x 40 px, others are \(20, 20\); --image-size N crops all"
    with pytest.raises(UserError, match=message):
        measure(f"--samples tree --ref r.npz --net {net}")
    _, printed = measure(f"--samples tree --ref r.npz --net {net} --image-size 16")
    assert "31 images of (16, 16) px" in printed.out


def test_suffixes_and_links_do_not_change_what_is_measured(tmp_path, measure, net):
    """`plain` has 12 files in two folders. `linked` has the same: one folder as a link, which holds
    a link back to itself, the other with the suffixes that Windows and cameras give."""
    for i, image in enumerate(noise_images(12, 0)):
        path = tmp_path / "plain" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "linked" / "b").mkdir(parents=True)
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "plain" / "a")
    (tmp_path / "plain" / "a" / "loop").symlink_to(tmp_path / "plain" / "a")
    suffixes = [".jfif", ".jpe", ".JPG", ".jpeg", ".JFIF", ".jpg"]
    for path, suffix in zip(sorted((tmp_path / "plain" / "b").iterdir()), suffixes):
        shutil.copy(path, tmp_path / "linked" / "b" / f"{path.stem}{suffix}")
    for name in ("1.heic", "2.heic", "notes.txt"):
        (tmp_path / "linked" / "b" / name).write_text("left out")
    got, printed = measure(f"--samples linked --ref plain --net {net}")
    assert got["num_samples"] == 12
    assert got["frechet_distance"] < 1e-6 and got["precision"] == got["recall"] == 1
    (line,) = [line for line in printed.out.splitlines() if "left out" in line]
    assert "linked" in line and "'.heic': 2" in line and "'.txt': 1" in line


@pytest.mark.parametrize("form", ["float", "one-hot", "column", "text", "too few"])
def test_the_labels_of_an_npz_are_not_needed(tmp_path, measure, net, form):
    images, labels = noise_images(12, 0), np.arange(12) % 3
    forms = {"float": labels.astype(float), "one-hot": np.eye(3, dtype=int)[labels]}
    forms.update({"column": labels[:, None], "text": labels.astype(str), "too few": labels[:5]})
    np.savez(tmp_path / "s.npz", images=images, labels=forms[form])
    np.savez(tmp_path / "r.npz", arr_0=images)
    assert measure(f"--samples s.npz --ref r.npz --net {net}")[0]["frechet_distance"] < 1e-6


@pytest.mark.parametrize("size", [47, 12], ids=["larger", "smaller"])
def test_the_reference_gets_the_size_of_the_samples_as_in_training(tmp_path, measure, net, size):
    source = noise_images(12, 0, size=size)
    np.savez(tmp_path / "source.npz", images=source, labels=np.zeros(12, int))
    crops = [center_crop(Image.fromarray(x), 20) for x in source]
    np.savez(tmp_path / "s.npz", arr_0=np.stack(crops))
    got, _ = measure(f"--samples s.npz --ref source.npz --net {net}")
    assert got["frechet_distance"] < 1e-6 and got["precision"] == got["recall"] == 1


def test_grey_images_are_measured_as_rgb(tmp_path, measure, net):
    grey = noise_images(12, 0)[..., 0]
    np.savez(tmp_path / "grey.npz", images=grey)
    np.savez(tmp_path / "rgb.npz", arr_0=grey[..., None].repeat(3, axis=3))
    got, _ = measure(f"--samples rgb.npz --ref grey.npz --net {net}")
    assert got["frechet_distance"] < 1e-6


NOT_A_NET = "not a usable TorchScript feature network"
WRONG_INPUTS = [
    ("--samples gone.npz --ref s.npz", "No such file or directory: .gone.npz"),
    ("--samples s.npz --ref gone", "gone: no such folder or .npz"),
    ("--samples one.npz --ref s.npz", "one.npz: has 1 images; 10 or more are needed"),
    ("--samples s.npz --ref one.npz", "one.npz: has 1 images"),
    ("--samples wide.npz --ref s.npz", r"--ref s.npz: \(20, 20\) px, the samples \(15, 20\)"),
    ("--samples float.npz --ref s.npz", "float.npz: has arr_0 float64 .*; expected .*uint8"),
    ("--samples black.npz --ref s.npz", "black.npz: has arr_0 uint8 .*; expected .*0 to 255"),
    ("--samples other.npz --ref s.npz", r"other.npz: has \['something'\]; expected images"),
    ("--samples s.npz --ref other.npz", r"other.npz: has \['something'\]; expected images"),
    ("--samples s.npz --ref inception.npz", "inception.npz: statistics of other features, not of"),
    ("--samples s.npz --ref foreign.npz", "foreign.npz: statistics of 0123, not of"),
    ("--samples cut.npz --ref s.npz", "cut.npz: not a usable .npz of images"),
    ("--samples s.npz --ref cut.npz", "cut.npz: not a usable .npz"),
    ("--samples empty --ref s.npz", "empty: no images in this folder"),
    ("--samples bad --ref s.npz", "bad/x.png: not a usable image"),
    ("--samples s.npz --ref s.npz --net gone.pt", f"gone.pt: {NOT_A_NET}"),
    ("--samples s.npz --ref s.npz --net net.txt", f"net.txt: {NOT_A_NET}"),
    ("--samples s.npz --ref s.npz --net weights.pt", f"weights.pt: {NOT_A_NET}"),
    ("--samples s.npz --ref s.npz --net flatten.pt", f"flatten.pt: {NOT_A_NET}"),
]


@pytest.fixture(scope="module")
def wrong_inputs(tmp_path_factory):
    """Folder with the good images s.npz, and with the files that WRONG_INPUTS names."""
    folder, good = tmp_path_factory.mktemp("inputs"), noise_images(12, 0)
    np.savez(folder / "s.npz", arr_0=good)
    np.savez(folder / "one.npz", arr_0=good[:1])
    np.savez(folder / "wide.npz", arr_0=good[:, :15])
    np.savez(folder / "float.npz", arr_0=good.astype(float))
    np.savez(folder / "black.npz", arr_0=good // 255)
    np.savez(folder / "other.npz", something=good)
    np.savez(folder / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "foreign.npz", mu=np.zeros(16), sigma=np.eye(16), network="0123")
    (folder / "cut.npz").write_bytes((folder / "s.npz").read_bytes()[:5000])
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "x.png").write_text("no picture")
    (folder / "net.txt").write_text("no network")
    torch.save({"weights": torch.zeros(3)}, folder / "weights.pt")
    torch.jit.script(nn.Flatten()).save(str(folder / "flatten.pt"))
    return folder


@pytest.fixture
def flags_of_the_command(capsys):
    run_in_process("fid.py --help")
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize("flags,message", WRONG_INPUTS)
def test_wrong_inputs_are_refused_in_one_line_that_advises_only_flags_of_fid(
    flags, message, wrong_inputs, measure, monkeypatch, net, flags_of_the_command
):
    monkeypatch.chdir(wrong_inputs)
    with pytest.raises((UserError, OSError), match=message) as error:
        measure(flags if "--net" in flags else f"{flags} --net {net}")
    line = str(error.value)
    assert len(line.splitlines()) == 1 and len(line) < 500
    assert set(re.findall(r"--[a-z-]+", line)) <= flags_of_the_command


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_by_whichever_process_reads_it(
    tmp_path, net, monkeypatch, capsys, workers
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for i, image in enumerate(noise_images(12, 0)):
        Image.fromarray(image).save(tmp_path / "s" / f"{i:02}.png")
    (tmp_path / "s" / "07.png").write_bytes((tmp_path / "s" / "07.png").read_bytes()[:100])
    run_in_process(f"fid.py --samples s --ref s --net {net} --workers {workers}", expect=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"fid.py: s/07.png: not a usable image \(.+\)", line)


# ------------------------------------------------------------------------------------ networks


def test_a_network_that_cannot_be_fetched_is_one_line(tmp_path, command):
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    proxy = {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    proxy["TORCH_HOME"] = str(tmp_path / "home")
    _, err = command("fid.py --samples s.npz --ref s.npz", expect=2, env=proxy)
    assert len(err.strip().splitlines()) == 1 and "metrics/inception-2015-12-05.pt" in err
    assert re.search(r"put the file at \S+home/hub/transdiff/inception-2015-12-05.pt", err)


def test_the_inception_file_is_fetched_once_and_its_distance_is_called_fid(
    tmp_path, measure, net, monkeypatch
):
    body, requests = net.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fid, "INCEPTION", f"http://127.0.0.1:{server.server_port}/inception.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    for _ in range(2):
        got, printed = measure("--samples s.npz --ref s.npz")
        assert {"fid", "inception_score", "precision", "recall"} < set(got)
        assert "  fid " in printed.out and "in the features of Inception" in printed.out
    assert requests == ["/inception.pt"]
    server.shutdown()


@pytest.fixture(scope="module")
def trousers_and_bags():
    """200 bundled images of two classes: images uint8 [200, 32, 32], labels 0 and 1, and the names
    of the classes. The bundled network has these classes as 1 and 8."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.flatnonzero((data["labels"] == 1) | (data["labels"] == 8))[::10]
    labels = (data["labels"][picks] == 8).astype(int)
    classes = np.array(["trouser", "bag"])
    return dict(images=data["images"][picks], labels=labels, classes=classes)


BUNDLED = f"--samples s.npz --save-stats x.npz --net {ROOT / 'demo' / 'features.pt'}"


@pytest.mark.parametrize("swapped", [False, True])
def test_accuracy_is_of_classes_by_their_names(tmp_path, measure, trousers_and_bags, swapped):
    data = dict(trousers_and_bags)
    if swapped:
        data.update(labels=1 - data["labels"], classes=data["classes"][::-1])
    np.savez(tmp_path / "s.npz", **data)
    got, printed = measure(BUNDLED)
    assert got["accuracy"] > 0.97 and f"{got['accuracy']:.4f}" in printed.out
    data["labels"] = 1 - data["labels"]  # trousers are now called bags
    np.savez(tmp_path / "s.npz", **data)
    assert measure(BUNDLED)[0]["accuracy"] < 0.03


@pytest.mark.parametrize("names", [["cat", "dog"], ["trouser", "dog"], None])
def test_there_is_no_accuracy_of_classes_that_the_network_does_not_know(
    tmp_path, measure, trousers_and_bags, names
):
    data = dict(trousers_and_bags)
    del data["classes"]
    np.savez(tmp_path / "s.npz", **data, **(dict(classes=np.array(names)) if names else {}))
    got, printed = measure(BUNDLED)
    assert "accuracy" not in got and "accuracy" not in printed.out


def test_classes_without_samples_need_not_be_known(tmp_path, measure, trousers_and_bags):
    """sample.py writes the names of all classes of the model."""
    classes = np.append(trousers_and_bags["classes"], "dog")
    np.savez(tmp_path / "s.npz", **{**trousers_and_bags, "classes": classes})
    assert measure(BUNDLED)[0]["accuracy"] > 0.97


def test_a_line_says_what_the_network_was_trained_on(tmp_path, measure, trousers_and_bags):
    """Unless all classes of the samples are among those."""
    line = r"features.pt was trained on t-shirt, trouser, .*, ankle boot; of other images"
    np.savez(tmp_path / "s.npz", images=trousers_and_bags["images"])
    assert re.search(line, measure(BUNDLED)[1].out)
    np.savez(tmp_path / "s.npz", **trousers_and_bags)
    assert not re.search(line, measure(BUNDLED)[1].out)


def test_train_features_makes_a_network_for_other_images(
    tmp_path, command, measure, trousers_and_bags
):
    np.savez(tmp_path / "two.npz", **trousers_and_bags)
    train = "demo/train_features.py --data two.npz --out new/a.pt --steps 40 --batch-size 16"
    out, _ = command(train)
    assert "wrote new/a.pt" in out
    assert float(re.search(r"([\d.]+)% of 40 held-out images", out)[1]) > 85
    assert (tmp_path / "new" / "a.pt").stat().st_size < 500_000
    net = torch.jit.load(tmp_path / "new" / "a.pt")
    x = torch.zeros(2, 3, 50, 40, dtype=torch.uint8)
    assert net(x, return_features=True).shape == (2, 64)
    assert torch.allclose(net(x).sum(1), torch.ones(2))

    rgb = trousers_and_bags["images"][..., None].repeat(3, axis=3)
    labels = 1 - trousers_and_bags["labels"]  # of another order of the names
    np.savez(tmp_path / "s.npz", arr_0=rgb, arr_1=labels, classes=np.array(["bag", "trouser"]))
    got, printed = measure("--samples s.npz --ref two.npz --net new/a.pt")
    assert got["accuracy"] > 0.85 and got["frechet_distance"] < 1e-6 and got["precision"] == 1
    assert "was trained on" not in printed.out


def test_train_features_writes_the_same_file_for_the_same_seed(
    tmp_path, command, trousers_and_bags
):
    np.savez(tmp_path / "two.npz", **trousers_and_bags)
    train = "demo/train_features.py --data two.npz --steps 1 --batch-size 16"
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command(f"{train} --out {name}.pt --seed {seed}")
    a, b, c = ((tmp_path / f"{name}.pt").read_bytes() for name in "abc")
    assert a == b != c


def test_train_features_tells_left_from_right_without_mirror_images(tmp_path, command, measure):
    """Trained on mirror images too, the network is sure of neither class of arrows."""
    left = np.zeros((32, 32), np.uint8)
    left[15:17, 6:26] = 255
    for i in range(8):
        left[15 - i, 6 + i] = left[16 + i, 6 + i] = 255
    images = np.stack([left, left[:, ::-1]] * 80)
    np.savez(tmp_path / "s.npz", images=images, labels=np.arange(160) % 2)
    scores = []
    for flags in ("", "--no-mirror"):
        command(f"demo/train_features.py --data s.npz --steps 30 --batch-size 16 {flags}")
        got, _ = measure("--samples s.npz --save-stats x.npz --net runs/features.pt")
        scores.append(got["score"])
    assert scores[0] < 1.2 and scores[1] > 1.5  # of 2 classes: 1 is unsure, 2 is sure
