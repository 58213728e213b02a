"""fid.py: closed forms, the definitions in float64, the command with a tiny random network."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from PIL import Image
from scipy.spatial.distance import cdist
from test_sample import serve  # noqa: F401
from test_vae import refused, run  # noqa: F401
from torch import nn

import fid
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
def measure(run, tmp_path):
    """measure(flags) runs fid.py in an empty folder; returns its JSON and what it printed."""

    def call(flags):
        printed = run(f"fid.py {flags} --json out/numbers.json")
        return json.loads((tmp_path / "out" / "numbers.json").read_text()), printed

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


def statistics(features):
    return fid.mean_and_covariance(len(features), features.sum(0), features.T @ features)


def test_the_measures_agree_with_their_definitions_to_one_millionth():
    """Of float64 features. Of 83 samples the parts of the score differ in size."""
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2, size=(83, 16)), rng.gamma(2.2, size=(61, 16))
    p = rng.dirichlet([0.2] * 5, size=83)
    stats = [statistics(torch.tensor(x)) for x in (a, b)]
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
    mu, sigma = statistics(features.double())
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
    x = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    copies = x.repeat(5, 1)[torch.randperm(100)], x.repeat(7, 1)  # their balls have radius 0
    assert fid.precision_recall(*copies) == (1, 1)
    half_missing = torch.cat([a + 0.01, a + 100])
    assert fid.precision_recall(a, half_missing) == (1, 0.5)
    line = torch.arange(4.0).double()[:, None]  # the ball of 3 reaches to 6, but for rounding
    assert [fid.precision_recall(0 * line + 6 + x, line)[0] for x in (1e-6, 1e-3)] == [1, 0]
    a, b = a.double() + 1e6, b.double() + 1e6  # far from the origin
    expected = brute_precision_recall(a.numpy(), b.numpy())
    assert fid.precision_recall(a, b) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("counts,spread", [((83, 61), 64), ((12, 10), 30)])
def test_the_command_gives_what_the_definitions_say(tmp_path, measure, net, counts, spread):
    """Fewer images than features have singular covariances."""
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


def test_statistics_are_saved_and_reused_for_images_of_their_size(tmp_path, measure, refused, net):
    images, others = noise_images(50, 0), noise_images(40, 1)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "r.npz", arr_0=others)
    direct, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    alone, _ = measure(f"--samples r.npz --net {net} --save-stats stats.npz")
    assert "frechet_distance" not in alone and "score" in alone
    reused, _ = measure(f"--samples s.npz --ref stats.npz --net {net}")
    assert reused.pop("reference") == "stats.npz" and direct.pop("reference") == "r.npz"
    assert all(reused.pop(key) == direct.pop(key) for key in ("network", "samples"))
    del direct["precision"], direct["recall"]  # they need the images
    assert reused == pytest.approx(direct, rel=1e-9)
    sigma = np.cov(features_and_probabilities(net, others)[0], rowvar=False)
    saved = np.load(tmp_path / "stats.npz")["sigma"]
    np.testing.assert_allclose(saved, sigma, rtol=1e-4, atol=1e-9)

    small = f"--samples r.npz --image-size 16 --net {net}"
    error = refused(f"fid.py {small} --ref stats.npz")
    assert re.search(r"stats.npz: .*\(20, 20\) px, not of .*\(16, 16\) px", error)
    measure(f"{small} --save-stats small.npz")
    assert measure(f"{small} --ref small.npz")[0]["frechet_distance"] < 1e-6


def test_the_statistics_of_adms_batches_are_used(tmp_path, measure, refused, net, monkeypatch):
    """They are of more images than the batch has: in the features of Inception, not cropped."""
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
        error = refused(f"fid.py --samples r.npz --ref adm.npz {flags}")
        assert "adm.npz: statistics of other features, not of" in error


def test_a_folder_gives_the_numbers_of_an_npz(tmp_path, measure, refused, net):
    images = noise_images(30, 0)
    np.savez(tmp_path / "s.npz", arr_0=images, labels=np.eye(30))  # no labels are needed
    np.savez(tmp_path / "r.npz", arr_0=noise_images(20, 1))
    for i, image in enumerate(images):  # some at the top, some two folders down
        path = tmp_path / "tree" / ("." if i < 9 else f"class {i % 3}/more") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "tree" / "notes.txt").write_text("not an image")
    a, _ = measure(f"--samples s.npz --ref r.npz --net {net}")
    b, printed = measure(f"--samples tree --ref r.npz --net {net} --workers 1")
    assert "30 images" in printed.out and "1 not images by their suffix '.txt'" in printed.out
    for key in ("frechet_distance", "precision", "recall"):  # the score depends on the order
        assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert measure(f"--samples s.npz --ref tree --net {net}")[0]["frechet_distance"] < 1e-5

    Image.fromarray(noise_images(1, 9, size=40)[0]).save(tmp_path / "tree" / "large.png")
    message = "large.png: is 40 x 40 px, others are (20, 20); --image-size N crops all"
    assert message in refused(f"fid.py --samples tree --ref r.npz --net {net}")
    got, _ = measure(f"--samples tree --ref r.npz --net {net} --image-size 16")
    assert got["num_samples"] == 31


@pytest.mark.parametrize("size", [47, 12], ids=["larger", "smaller"])
def test_the_reference_gets_the_size_of_the_samples_as_in_training(tmp_path, measure, net, size):
    source = noise_images(12, 0, size=size)
    np.savez(tmp_path / "source.npz", images=source, labels=np.zeros(12, int))
    crops = [center_crop(Image.fromarray(x), 20) for x in source]
    np.savez(tmp_path / "s.npz", arr_0=np.stack(crops))
    got, _ = measure(f"--samples s.npz --ref source.npz --net {net}")
    assert got["frechet_distance"] < 1e-6 and got["precision"] == got["recall"] == 1


@pytest.mark.parametrize("flags,message", [
    ("--samples one.npz --ref s.npz", "one.npz: has 1 images; 10 or more are needed"),
    ("--samples wide.npz --ref s.npz", "--ref s.npz: (20, 20) px, the samples (15, 20)"),
    ("--samples s.npz --ref other.npz", "other.npz: has ['something']; expected images"),
    ("--samples s.npz --ref foreign.npz", "foreign.npz: statistics of 0123, not of"),
    ("--samples cut.npz --ref s.npz", "cut.npz: not a usable .npz of images"),
    ("--samples s.npz --net cut.npz", "cut.npz: not a usable TorchScript feature network"),
    ("--samples s.npz --net flatten.pt", "flatten.pt: not a usable TorchScript feature network"),
])  # fmt: skip
def test_wrong_inputs_are_refused(flags, message, tmp_path, run, refused, net):
    """The message advises no flags of other scripts."""
    good = noise_images(12, 0)
    np.savez(tmp_path / "s.npz", arr_0=good)
    np.savez(tmp_path / "one.npz", arr_0=good[:1])
    np.savez(tmp_path / "wide.npz", arr_0=good[:, :15])
    np.savez(tmp_path / "other.npz", something=good)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(16), sigma=np.eye(16), network="0123")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:5000])
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "flatten.pt"))
    known = re.findall(r"--[a-z-]+", run("fid.py --help").out)
    error = refused(f"fid.py --net {net} {flags}")
    assert message in error and set(re.findall(r"--[a-z-]+", error)) <= set(known)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_by_any_process(tmp_path, net, refused, workers):
    (tmp_path / "s").mkdir()
    for i, image in enumerate(noise_images(12, 0)):
        Image.fromarray(image).save(tmp_path / "s" / f"{i:02}.png")
    os.truncate(tmp_path / "s" / "07.png", 100)
    error = refused(f"fid.py --samples s --ref s --net {net} --workers {workers}")
    assert re.fullmatch(r"fid.py: s/07.png: not a usable image \(.+\)", error)


# ------------------------------------------------------------------------------------ networks
def test_inception_is_fetched_once_for_the_fid(tmp_path, measure, net, serve, monkeypatch):
    server = serve({"/inception.pt": net.read_bytes()})
    monkeypatch.setattr(fid, "INCEPTION", f"{server.url}/inception.pt")
    np.savez(tmp_path / "s.npz", arr_0=noise_images(12, 0))
    for _ in range(2):
        got, printed = measure("--samples s.npz --ref s.npz")
        assert {"fid", "inception_score", "precision", "recall"} < set(got)
        assert "  fid " in printed.out and "in the features of Inception" in printed.out
    assert server.requests == ["/inception.pt"]


NAMES = ["trouser", "bag"]


@pytest.fixture(scope="module")
def two_classes():
    """200 bundled images, labels 0 and 1, names of the classes; the network has them as 1 and 8."""
    data = np.load(ROOT / "demo" / "fashion_mnist_10k.npz")
    picks = np.flatnonzero((data["labels"] == 1) | (data["labels"] == 8))[::10]
    labels = (data["labels"][picks] == 8).astype(int)
    return dict(images=data["images"][picks], labels=labels, classes=NAMES)


@pytest.mark.parametrize("names,flip,accuracy", [
    (NAMES, 0, 1),
    (NAMES[::-1], 1, 1),  # the same classes, in another order
    (NAMES, 1, 0),  # trousers are called bags
    ([*NAMES, "dog"], 0, 1),  # sample.py writes the names of all classes of the model
    (["cat", "dog"], 0, None),
    (["trouser", "dog"], 0, None),
    ([0, 1], 0, None),
])  # fmt: skip
def test_accuracy_is_of_known_names(tmp_path, measure, two_classes, names, flip, accuracy):
    images, labels = two_classes["images"], two_classes["labels"]
    np.savez(tmp_path / "s.npz", images=images, labels=abs(labels - flip), classes=names)
    got, printed = measure(f"--samples s.npz --save-stats x.npz --net {ROOT}/demo/features.pt")
    line = re.search(r"features.pt was trained on t-shirt, trouser, .*, ankle boot", printed.out)
    if accuracy is None:
        assert "accuracy" not in got and line
    else:
        assert abs(got["accuracy"] - accuracy) < 0.03 and not line
        assert f"{got['accuracy']:.4f}" in printed.out


@pytest.mark.skipif(os.sep == "\\", reason="separates folders there")
def test_a_backslash_in_the_name_of_a_class_is_a_letter():
    assert fid.class_names(SimpleNamespace(names=["a\\b/0.png"])) == ["a\\b"]


@pytest.mark.parametrize("labels,line", [
    ([0, 1] * 6, None),
    ([0] * 9 + [1] * 3, "cat is 75.0% of the samples, 50.0% of the reference"),
    ([0, 1] * 60 + [2], "fox is 0.8% of the samples, 0.0% of the reference"),
])  # fmt: skip
def test_sets_whose_classes_differ_are_named(labels, line, tmp_path, measure, net):
    """A folder of class folders against an .npz with the names of its classes."""
    images = noise_images(12, seed=0)
    for i, image in enumerate(images):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    arrays = dict(arr_0=images[np.arange(len(labels)) % 12], arr_1=np.array(labels))
    np.savez(tmp_path / "s.npz", **arrays, classes=np.array(["cat", "dog", "fox"]))
    _, printed = measure(f"--samples s.npz --ref photos --net {net}")
    assert line in printed.err if line else "the sets differ" not in printed.err
    np.savez(tmp_path / "without.npz", arr_0=images)
    _, printed = measure(f"--samples s.npz --ref without.npz --net {net}")
    assert "the sets differ" not in printed.err


def test_train_features_makes_a_network_for_other_images(tmp_path, command, measure, two_classes):
    np.savez(tmp_path / "two.npz", **two_classes)
    train = "demo/train_features.py --data two.npz --batch-size 16"
    out, _ = command(f"{train} --out new/a.pt --steps 40")
    assert float(re.search(r"([\d.]+)% of 40 held-out images", out)[1]) > 85
    net = torch.jit.load(tmp_path / "new" / "a.pt")
    x = torch.zeros(2, 3, 50, 40, dtype=torch.uint8)
    assert net(x, return_features=True).shape == (2, 64)
    assert torch.allclose(net(x).sum(1), torch.ones(2))
    rgb = two_classes["images"][..., None].repeat(3, axis=3)
    labels = 1 - two_classes["labels"]  # of another order of the names
    np.savez(tmp_path / "s.npz", arr_0=rgb, arr_1=labels, classes=NAMES[::-1])
    got, printed = measure("--samples s.npz --ref two.npz --net new/a.pt")
    assert got["accuracy"] > 0.85 and got["frechet_distance"] < 1e-6 and got["precision"] == 1
    assert "was trained on" not in printed.out

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command(f"{train} --steps 1 --out {name}.pt --seed {seed}")
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
