"""Pictures of the semantic features: demo/figures.py."""

import dataclasses

import numpy as np
import pytest
import torch
from in_process import run_in_process
from PIL import Image
from test_model import ONE_STEP, build
from test_sample import MODEL, VAE, columns

from diversity import similarity
from figures import heatmap
from model import SIZES, attention_masks, load_checkpoint, per_image_noise
from vae import latents_to_images, load_vae


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("fusion ...", expect=0) runs demo/figures.py in an empty folder; returns its stderr."""
    monkeypatch.chdir(tmp_path)

    def call(flags, expect=0):
        run_in_process(f"figures.py {flags}", expect)
        return capsys.readouterr().err

    return call


@pytest.mark.weights
def test_fusion_decodes_half_of_the_features_of_each_class(run):
    run("fusion --class trouser bag --n 1 --steps 3 --out fused.png")
    model, vae = load_checkpoint(MODEL), load_vae(VAE)
    model.sampling = model.sampling.replace(steps=3)

    def features(label):
        label = torch.tensor([label])
        chain = model.sample(label, 3, noise_sampler=per_image_noise(0, [0]))
        return model.encode(label, chain)

    def picture(c):
        noise = per_image_noise(0, [0])(torch.empty(1, *model.config.latent_shape))
        c_null = model.encode(torch.tensor([10]))
        image = latents_to_images(vae, model.decode(c, noise, c_null))[0]
        return np.asarray(Image.fromarray(image).convert("L")).astype(int)

    with torch.inference_mode():
        trouser, bag = features(1), features(8)
        half = trouser.shape[1] // 2
        fused = torch.cat([trouser[:, :half], bag[:, half:]], dim=1)
        expected = [picture(c) for c in (trouser, bag, fused)]
    for image, reference in zip(columns("fused.png", 3), expected):
        assert np.abs(image - reference).max() <= 2
    assert min(np.abs(expected[2] - expected[k]).mean() for k in (0, 1)) > 1


@pytest.mark.weights
def test_features_decodes_the_first_of_them(run):
    """All of the features give the image itself."""
    run("features --counts 16 64 --class trouser --n 1 --steps 3 --out features.png")
    run("fusion --class trouser bag --n 1 --steps 3 --out fused.png")
    first_16, all_64 = columns("features.png", 2)
    assert np.array_equal(all_64, columns("fused.png", 3)[0])
    assert np.abs(first_16 - all_64).mean() > 1


@pytest.mark.weights
def test_steps_go_from_noise_to_the_image(run):
    run("steps --class trouser --n 1 --steps 3 --out steps.png")
    run("features --counts 64 --class trouser --n 1 --steps 3 --out features.png")
    *way, last = columns("steps.png", 4)
    (image,) = columns("features.png", 1)
    assert np.array_equal(last, image)
    distances = [np.abs(x - image).mean() for x in way]
    assert distances[0] > distances[1] > distances[2] > 1


def dark_lines(picture):
    """Positions of the columns, and of the rows, of a picture [N, N, 3] that are black."""
    black = picture.max(-1) == 0
    return [np.flatnonzero(black.all(axis)).tolist() for axis in (0, 1)]


@pytest.mark.weights
def test_the_heatmap_marks_the_blocks_of_the_images(run):
    run("similarity --class trouser --steps 2 --out new/S.png")
    both = np.asarray(Image.open("new/S.png"))
    assert both.shape == (512, 2 * 512 + 16, 3)
    for picture in (both[:, :512], both[:, -512:]):  # 4 images of 16 tokens, of 8 pixels each
        assert dark_lines(picture) == [[128, 256, 384]] * 2
    diagonal = picture[np.arange(4, 512, 8), np.arange(4, 512, 8)]
    assert (diagonal == [180, 20, 30]).all()  # S_ii is 1


def test_the_heatmap_of_a_one_step_model_is_one_block(run):
    model = build(ONE_STEP)
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config), "ema.pt")
    run("similarity --ckpt ema.pt --class 3 --out S.png")
    both = np.asarray(Image.open("S.png"))
    features = model.ar(torch.arange(5)).detach()
    for picture, x in (
        (both[:, :512], features),
        (both[:, -512:], features - features.mean((0, 1))),
    ):
        assert picture.shape == (512, 512, 3) and dark_lines(picture) == [[], []]
        S = similarity(x[3]).numpy()
        green = picture[16::32, 16::32, 1]  # 255, white, at 0; 20, red, at 1; 60, blue, at -1
        np.testing.assert_allclose(green, np.where(S > 0, 255 - 235 * S, 255 + 195 * S), atol=3)


def test_negative_similarity_is_blue():
    picture = np.asarray(heatmap(torch.tensor([[1.0, -1.0], [-1.0, 0.0]]), 1)).astype(int)
    assert np.abs(picture[128::256, 128::256] - [
        [[180, 20, 30], [30, 60, 160]],
        [[30, 60, 160], [255, 255, 255]],
    ]).max() <= 2  # fmt: skip


@pytest.mark.weights
@pytest.mark.parametrize("flags,message", [
    ("fusion --class bag", "--class: fusion is of two classes"),
    ("features --counts 2 256", "--counts: the model has 64 features, not more"),
    ("similarity --class hat", "--class hat: this model was trained on the classes t-shirt, "),
    ("fusion --ckpt gone.pt", "gone.pt: No such file or directory"),
])  # fmt: skip
def test_wrong_flags_are_refused_in_one_line(flags, message, run, tmp_path):
    assert message in run(f"{flags} --steps 1 --out S.png", expect=2).strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_masks_draws_those_of_chains_of_1_4_and_16(run):
    """3 pixels stand for 4 tokens; the shades are those of the keys, light grey is not allowed."""
    run("masks --out masks.png")
    picture = np.asarray(Image.open("masks.png").convert("RGB"))
    for column, refs in enumerate([1, 4, 16]):
        config = dataclasses.replace(SIZES["B"], refs=refs)
        ar, cross = attention_masks(config)
        cross = cross.repeat_interleave(config.tokens_per_image, dim=0)
        left = 314 * column + 70
        for mask, x, y in ((ar, left, 22), (cross, left + 48, 292)):
            cells = picture[y + 1 : y + 3 * len(mask) // 4 : 3, x + 1 : x + 3 * len(mask) // 4 : 3]
            allowed = (cells != 235).any(-1)  # at the middle of a cell there is no line
            assert np.array_equal(allowed, mask[::4, ::4])
            for key, shades in enumerate(cells.swapaxes(0, 1)):
                block = (4 * key - (64 if mask is ar else 0)) // config.tokens_per_image
                shade = [(31, 95, 168), (128, 178, 226)][block % 2]
                shade = (120, 120, 120) if mask is ar and key < 16 else shade
                assert (shades[allowed[:, key]] == shade).all()
