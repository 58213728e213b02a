"""Results of the authors' released code.

Every entry of released_small.npz, to 1e-4 of its largest value.
"""

import dataclasses

import pytest
import torch
from golden import OUTCOMES, assert_close, released_state, tensor, write_released

from model import SIZES, Sampling, TransDiff, load_checkpoint
from vae import load_vae

pytestmark = pytest.mark.weights

LABELS = torch.tensor([1, 7])
T = torch.tensor([0.3, 0.7])
X = tensor("x", 2, 16, 16, 16)
NOISE = tensor("noise", 2, 16, 16, 16)
X512 = tensor("x512", 2, 16, 32, 32)
LATENTS = tensor("latents", 2, 4, 16, 16, 16)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return lambda kind: load_checkpoint(write_released(kind, folder / f"{kind}.pth"))


def test_one_step_condition_velocity_and_loss(load):
    model = load("one_step")
    assert (model.config.refs, model.config.num_classes, model.config.heads) == (1, 10, 2)
    c = model.encode(LABELS)
    assert_close("one_step.c", c)
    assert_close("one_step.c_null", model.encode(torch.tensor([10])))
    assert_close("one_step.v", model.velocity(X, T, c))
    loss = model.loss(LATENTS[:, :1], LABELS, T[:, None], NOISE[:, None])
    assert_close("one_step.loss", loss[None])


def test_one_step_samples(load):
    model = load("one_step")
    guided = model.sample(LABELS, steps=8, cfg=1.3, s1=0.87, s2=0, noise=NOISE)
    assert_close("one_step.sample", guided[:, -1])
    plain = model.sample(LABELS, steps=5, cfg=1, s1=1, s2=0, noise=NOISE)
    assert_close("one_step.sample_cfg1", plain[:, -1])
    draws = (tensor(f"step{i}", 2, 16, 16, 16) for i in range(5))
    settings = dict(steps=6, cfg=1.3, s1=0.89, s2=0.95)
    x = model.sample(LABELS, noise=NOISE, noise_sampler=lambda x: next(draws), **settings)
    assert_close("one_step.sample_s2", x[:, -1])
    assert next(draws, None) is None  # all draws are used, one less than steps


def test_a_released_file_has_the_published_sampling_settings(load):
    for kind in ("one_step", "mrar"):
        assert load(kind).sampling == Sampling("euler-maruyama", 100, 1.3, 1.0, True, 0.87, 0.91)


def test_one_step_at_512_px(load):
    model = load("one_step_512")
    assert (model.config.latent_size, model.config.cond_tokens) == (32, 256)
    assert_close("one_step_512.v", model.velocity(X512, T, model.encode(LABELS)))


def test_mrar_condition_velocity_and_loss(load):
    model = load("mrar")
    assert model.config.refs == 4
    c = model.encode(LABELS, LATENTS[:, :3])
    assert_close("mrar.c", c)
    for i in range(4):
        assert_close(f"mrar.v{i}", model.velocity(X, T, c[:, : 64 * (i + 1)]))
    t = T[:, None].expand(2, 4)  # the release draws t and noise once per chain
    noise = NOISE[:, None].expand_as(LATENTS)
    loss = model.loss(LATENTS, LABELS, t, noise).item()
    assert loss == pytest.approx(OUTCOMES["mrar.loss"].mean(), rel=1e-4)


def test_mrar_sample(load):
    chain = load("mrar").sample(LABELS, steps=6, cfg=1.3, s1=0.87, s2=0, noise=NOISE)
    assert chain.shape == (2, 4, 16, 16, 16)
    assert_close("mrar.sample", chain[:, -1])


def test_vae(tmp_path):
    vae = load_vae(write_released("vae", tmp_path / "vae.pth"))
    assert (vae.z_channels, vae.factor, vae.scale) == (16, 16, 0.2325)
    with torch.inference_mode():
        mean, logvar = vae.encode(tensor("img", 1, 3, 64, 64).clamp(-1, 1))
        assert_close("vae.moments", torch.cat([mean, logvar], dim=1))
        assert_close("vae.decode", vae.decode(tensor("zdec", 1, 16, 4, 4)))


@pytest.mark.parametrize("kind", ["one_step", "one_step_512", "mrar"])
def test_bfloat16_and_plain_weights_load(kind, tmp_path):
    """Files of the bf16 recipe hold bfloat16.

    `model` is loaded where there is no model_ema, and with ema=False.
    """
    state = {k: v.bfloat16() for k, v in released_state(kind).items()}
    torch.save({"model": state}, tmp_path / "plain.pth")
    ours = load_checkpoint(tmp_path / "plain.pth", ema=True).state_dict()["ar.positions"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, state["encoder_pos_embed_learned"].float())
    without_ema = load_checkpoint(write_released(kind, tmp_path / "both.pth"), ema=False)
    assert not without_ema.state_dict()["ar.positions"].any()


@pytest.mark.parametrize("size,refs,released", [
    ("B", 1, 289_959_184), ("B", 4, 290_044_432), ("L", 1, 682_519_568), ("L", 4, 682_633_232),
    ("H", 1, 1_327_891_216), ("H", 4, 1_328_033_296),
])  # fmt: skip
def test_parameter_counts(size, refs, released):
    with torch.device("meta"):
        model = TransDiff(dataclasses.replace(SIZES[size], refs=refs))
    count = sum(p.numel() for p in model.parameters())
    # The released 1-step models have a projection of references that they never use; ours do not.
    unused = 0 if refs > 1 else 17 * model.config.width
    assert count + unused == released
    assert abs(count - released) < 1e-4 * released
