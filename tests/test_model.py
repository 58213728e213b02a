"""The method: masks, the chain, the loss, the samplers, guidance, warm start, checkpoints."""

import dataclasses
import math

import pytest
import torch

from model import SAMPLING, SIZES, Config, TransDiff, adams_bashforth, attention, attention_masks, euler_maruyama
from model import load_checkpoint, load_state, sampling_settings, t_from_normal, timestep_embedding
from train import warm_start
from vae import cast_weights

# Every field that the demo changes differs from its ImageNet value, and no two lengths are equal.
SMALL = Config(
    width=32,
    heads=2,
    ar_depth=3,
    dit_depth=2,
    num_classes=5,
    refs=4,
    cond_tokens=16,
    class_tokens=3,
    latent_channels=6,
    latent_size=8,
    dropout=0.0,
)
ONE_STEP = dataclasses.replace(SMALL, refs=1)


def build(config, seed=0):
    """A model in eval mode. Every weight is random, so that no zero initialisation hides a path."""
    torch.manual_seed(seed)
    model = TransDiff(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def random_chains(config, B=3, seed=1):
    """(latents [B, refs, C, H, W], labels [B])."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(B, config.refs, *config.latent_shape, generator=generator)
    return latents, torch.arange(B) % config.num_classes


def random_draws(config, B=3, batch_mul=1, seed=2):
    """t [B, M] and noise [B, M, C, H, W] of the loss, M = refs batch_mul."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(B, config.refs * batch_mul, generator=generator)
    return t, torch.randn(*t.shape, *config.latent_shape, generator=generator)


def gradients(model, loss):
    """[the loss, the gradient of every parameter]."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters()]


# ------------------------------------------------------------------------------------------ masks


def test_masks_are_those_of_figure_3():
    ar, cross = attention_masks(Config(32, 2, 1, 1, refs=4, cond_tokens=4, class_tokens=2, latent_size=2))
    assert ar.int().tolist() == [
        [1, 1, 0, 0, 0, 0],  # class
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # mask -> c_0
        [1, 1, 1, 1, 0, 0],  # x_0  -> c_1
        [1, 1, 1, 1, 1, 0],  # x_1  -> c_2
        [1, 1, 1, 1, 1, 1],  # x_2  -> c_3
    ]
    assert cross.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("size", ["B", "XS"])
@pytest.mark.parametrize("refs", [4, 16, 64])
def test_masks_fit_every_number_of_references(size, refs):
    config = dataclasses.replace(SIZES[size], refs=refs)
    ar, cross = attention_masks(config)
    n = config.tokens_per_image
    assert n * refs == config.cond_tokens and cross.shape == (refs, config.cond_tokens)
    assert cross.sum(1).tolist() == [n * (k + 1) for k in range(refs)]
    assert ar[config.class_tokens + n - 1].sum() == config.class_tokens + n  # a mask token sees class and mask tokens
    assert ar[-1].all() and not ar[0, config.class_tokens :].any()


def test_one_step_attention_is_bidirectional():
    ar, cross = attention_masks(ONE_STEP)
    assert ar.all() and cross.all() and cross.shape == (1, 16)
    model = build(ONE_STEP)
    before = model.encode(torch.tensor([2]))
    with torch.no_grad():
        model.ar.positions[:, -1] += 1  # only the last token of the input changes
    assert (model.encode(torch.tensor([2])) != before).any(-1).all()  # every token of c changes


@pytest.mark.parametrize("mask", [None, torch.ones(16, 16, dtype=torch.bool).tril()], ids=["all", "masked"])
def test_the_two_ways_to_compute_attention_agree(mask):
    """On a CPU, bf16 takes the plain formula and float32 the fused kernel."""
    q, k, v = torch.randn(3, 2, 16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, fused = attention(q, k, v, 4, mask), attention(q.float(), k.float(), v.float(), 4, mask)
    torch.testing.assert_close(plain.float(), fused, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("refs", [4, 16])
def test_an_image_changes_later_conditions_and_no_earlier_one(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    n = model.config.tokens_per_image
    latents, labels = random_chains(model.config)
    c = model.encode(labels, latents[:, :-1])
    for k in range(refs - 1):
        changed = latents[:, :-1].clone()
        changed[:, k] += torch.randn_like(changed[:, k])
        c2 = model.encode(labels, changed)
        assert torch.equal(c2[:, : n * (k + 1)], c[:, : n * (k + 1)]), f"x_{k} reached c_{k} or an earlier one"
        assert (c2[:, n * (k + 1) :] != c[:, n * (k + 1) :]).any(-1).all(), f"x_{k} did not reach all of c_{k + 1} ..."


def test_a_part_of_the_chain_has_the_same_conditions_as_the_whole_chain():
    model = build(SMALL)
    latents, labels = random_chains(SMALL)
    full = model.encode(labels, latents[:, :3])
    for k in range(4):
        torch.testing.assert_close(model.encode(labels, latents[:, :k] if k else None), full[:, : 4 * (k + 1)])


def test_patches_are_in_the_order_channel_row_column():
    model = build(SMALL)  # 4 tokens an image: a 2 x 2 grid of 4 x 4 patches
    latents, _ = random_chains(SMALL, B=1)
    tokens = model.ar.patchify(latents[:, :2])
    assert tokens.shape == (1, 8, 6 * 16)
    assert torch.equal(tokens[0, 4 + 1], latents[0, 1, :, :4, 4:].flatten())  # image 1, upper right


# ------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("refs,batch_mul", [(1, 1), (1, 3), (4, 1), (4, 3), (16, 1)])
def test_the_loss_of_chains_is_the_mean_over_images_and_draws(refs, batch_mul):
    """Eq. 8 written as a loop: one image of the chain and one draw of (t, noise) at a time."""
    model = build(dataclasses.replace(SMALL, refs=refs))
    latents, labels = random_chains(model.config)
    t, noise = random_draws(model.config, batch_mul=batch_mul)
    losses = []
    for k in range(refs):
        c = model.encode(labels, latents[:, :k] if k else None)
        for draw in range(batch_mul * k, batch_mul * (k + 1)):
            x, t_k, eps = latents[:, k], t[:, draw], noise[:, draw]
            x_t = (1 - t_k)[:, None, None, None] * x + t_k[:, None, None, None] * eps
            losses.append((model.velocity(x_t, t_k, c) - (eps - x)).square().mean())
    together = model.loss(latents, labels, t=t, noise=noise, batch_mul=batch_mul)
    torch.testing.assert_close(together, torch.stack(losses).mean())


@pytest.mark.parametrize("refs", [1, 4])
def test_every_image_and_draw_has_its_own_t_and_noise(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    latents, labels = random_chains(model.config)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    model.loss(torch.zeros_like(latents), labels, batch_mul=3)  # of black latents x_t = t noise
    (x_t, t), count = seen[0], 3 * refs * 3
    assert len(t.unique()) == count
    assert len((x_t / t[:, None, None, None]).flatten(1).unique(dim=0)) == count


def test_distributions_of_t():
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    logits, uniform = t_from_normal(normal).logit(), t_from_normal(normal, "uniform")
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.02
    assert 0 < uniform.min() and uniform.max() < 1


def test_the_loss_draws_logit_normal_t_by_default():
    model = build(SMALL)
    latents, labels = random_chains(SMALL, B=5)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        model.loss(latents, labels, batch_mul=100)
    logits = seen[0].logit()  # of 2000 draws
    assert abs(logits.mean()) < 0.08 and abs(logits.std() - 1) < 0.08


def test_a_class_encoded_once_for_several_images_gives_the_same_loss_and_gradients():
    """With more images than classes, the model encodes the classes; with fewer, the images."""
    model = build(dataclasses.replace(ONE_STEP, num_classes=2))
    latents, labels = random_chains(model.config, B=6)
    t, noise = random_draws(model.config, B=6)
    drop = torch.tensor([False, False, True, False, True, False])
    together = gradients(model, model.loss(latents, labels, t, noise, drop=drop))
    one_by_one = [
        model.loss(*(v[i : i + 1] for v in (latents, labels, t, noise)), drop=drop[i : i + 1]) for i in range(6)
    ]
    for a, b in zip(together, gradients(model, torch.stack(one_by_one).mean())):
        torch.testing.assert_close(a, b)


def test_labels_are_dropped_in_training_only():
    model = build(dataclasses.replace(SMALL, label_drop_prob=1.0))
    latents, labels = random_chains(SMALL)
    t, noise = random_draws(SMALL)
    null = torch.full_like(labels, SMALL.num_classes)
    with_label, without_label = (model.loss(latents, y, t, noise) for y in (labels, null))
    assert with_label != without_label
    model.train()
    assert torch.equal(model.loss(latents, labels, t, noise), without_label)
    assert torch.equal(model.loss(latents, labels, t, noise, drop=torch.zeros(3, dtype=torch.bool)), with_label)
    drop = torch.tensor([False, True, False])
    some_null = torch.where(drop, null, labels)
    assert torch.equal(
        model.loss(latents, labels, t, noise, drop=drop), model.eval().loss(latents, some_null, t, noise)
    )


def test_dropout_is_active_in_training_only():
    model = build(dataclasses.replace(SMALL, dropout=0.5, label_drop_prob=0.0))
    latents, labels = random_chains(SMALL)
    t, noise = random_draws(SMALL)
    assert model.loss(latents, labels, t, noise) == model.loss(latents, labels, t, noise)
    model.train()
    assert model.loss(latents, labels, t, noise) != model.loss(latents, labels, t, noise)


@pytest.mark.parametrize("refs", [1, 4])
def test_every_parameter_has_a_gradient(refs):
    """DistributedDataParallel refuses parameters that the loss does not reach."""
    model = build(dataclasses.replace(SMALL, refs=refs, label_drop_prob=0.5)).train()
    torch.manual_seed(1)
    model.loss(*random_chains(model.config, B=8)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("refs", [1, 4])
def test_loss_and_samplers_never_wait_for_the_device(refs):
    """On the meta device .item() is an error, and so is a tensor left on the CPU."""
    with torch.device("meta"):
        model = TransDiff(dataclasses.replace(SMALL, refs=refs)).train()
        latents, labels = torch.empty(3, refs, *model.config.latent_shape), torch.zeros(3, dtype=torch.int64)
    model.loss(latents, labels, batch_mul=2).backward()
    for sampler in ("euler-maruyama", "adams-bashforth"):
        assert model.sample(labels, steps=2, sampler=sampler).is_meta


def test_timestep_embedding_is_cosines_then_sines():
    e = timestep_embedding(torch.tensor([0.25]))[0]
    assert e.shape == (256,)
    assert e[0] == pytest.approx(math.cos(250), abs=1e-4) and e[128] == pytest.approx(math.sin(250), abs=1e-4)
    assert e[1] == pytest.approx(math.cos(250 * 10000 ** (-1 / 128)), abs=1e-4)


# ------------------------------------------------------------------------------------------ the samplers


def gaussian_velocity(mean, std):
    """Exact velocity E[eps - x | x_t] of data N(mean, std^2)."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2  # of x_t = (1 - t) x + t eps
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    return velocity


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.5), (-0.7, 0.75)])
def test_euler_maruyama_returns_gaussian_data(mean, std):
    torch.manual_seed(0)
    x = euler_maruyama(gaussian_velocity(mean, std), torch.randn(200_000), steps=500, s1=1.0, s2=1.0)
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert 0.975 * std < x.std().item() < 1.01 * std  # the last step has no noise, which narrows the data by up to 2 %


def test_euler_maruyama_evaluates_once_a_step_and_draws_noise_between_steps():
    times, draws = [], []

    def velocity(x, t):
        times.append(t)
        return torch.zeros_like(x)

    euler_maruyama(velocity, torch.ones(2), steps=5, noise_sampler=lambda x: draws.append(1) or torch.zeros_like(x))
    assert times == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04]) and len(draws) == 4
    assert all(type(t) is float for t in times)  # a tensor would make a GPU wait


def test_one_step_of_euler_maruyama_goes_from_noise_to_image():
    x = torch.tensor([2.0, -1.0])
    # At t = 1 the drift is v - w s / 2 = v + x, and dt = -1: the result is x - (v + x) = -v.
    assert torch.equal(euler_maruyama(lambda x, t: 0.5 * x, x, steps=1, s1=0.1), -0.5 * x)


def test_s1_and_s2_scale_every_step_but_the_last():
    x, v, n = torch.tensor([0.4]), torch.tensor([0.3]), torch.tensor([1.7])
    out = euler_maruyama(lambda x, t: v, x, steps=2, s1=0.9, s2=0.8, noise_sampler=lambda x: n)
    drift = lambda x, t: v - t * (-(x + (1 - t) * v) / t)  # noqa: E731
    middle = x + 0.9 * drift(x, 1.0) * -0.96 + 0.8 * math.sqrt(2.0) * math.sqrt(0.96) * n
    torch.testing.assert_close(out, middle + drift(middle, 0.04) * -0.04)


@pytest.mark.parametrize("mean,std", [(1.5, 0.5), (-0.7, 0.3)])
def test_adams_bashforth_is_of_second_order(mean, std):
    """The flow of Gaussian data is x_0 = mean + std x_1. Half the step gives a quarter of the error."""
    velocity, times, errors = gaussian_velocity(mean, std), [], []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (40, 80, 160):
        times.clear()
        out = adams_bashforth(lambda x, t: times.append(t) or velocity(x, t), x, steps)
        errors.append((out - (mean + std * x)).abs().max().item())
        assert len(times) == steps and times[0] == 1 and min(times) > 0  # training has no t = 0
    assert errors[0] < 0.05 and 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5


# ------------------------------------------------------------------------------------------ guidance and the chain


def test_guidance_evaluates_the_decoder_a_second_time_and_only_below_cfg_below():
    model, labels, times = build(SMALL), torch.tensor([0, 1]), []
    model.decoder.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1].item()))
    settings = dict(refs=1, steps=4, sampler="adams-bashforth")
    model.sample(labels, cfg=1.0, **settings)
    assert times == [1, 0.75, 0.5, 0.25]
    times.clear()
    model.sample(labels, cfg=1.5, cfg_below=0.5, **settings)
    assert times == [1, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_cfg_below_0_is_no_guidance_and_1_is_guidance_at_every_t():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    none, low, full = (model.sample(labels, steps=4, s2=0, cfg=2, cfg_below=t, noise=noise) for t in (0, 0.5, 1))
    assert torch.equal(none, model.sample(labels, steps=4, s2=0, cfg=1, noise=noise))
    assert torch.equal(full, model.sample(labels, steps=4, s2=0, cfg=2, noise=noise))
    assert not torch.allclose(low, none) and not torch.allclose(low, full)


def test_without_null_refs_the_null_class_has_no_references():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    images = model.sample(labels, refs=2, steps=1, cfg=2.5, null_refs=False, noise=noise)
    c, c_null = model.encode(labels, images[:, :1]), model.encode(torch.tensor([5]))
    d, d_null = (model.velocity(noise, torch.ones(1), c) + noise for c in (c, c_null))
    torch.testing.assert_close(images[:, 1], noise - (d_null + 2.5 * (d - d_null)), atol=1e-4, rtol=1e-4)


def test_guidance_mixes_the_drifts_and_keeps_the_references():
    """One step by hand: the null class's branch has the references of the class's branch."""
    model, labels, null = build(SMALL), torch.tensor([0, 3]), torch.tensor([5, 5])
    noise = torch.randn(2, 6, 8, 8)
    images = model.sample(labels, refs=3, steps=1, cfg=2.5, noise=noise)
    for k in range(3):
        references = images[:, :k] if k else None
        d, d_null = (model.velocity(noise, torch.ones(2), model.encode(y, references)) + noise for y in (labels, null))
        expected = noise - (d_null + 2.5 * (d - d_null))
        torch.testing.assert_close(images[:, k], expected, atol=1e-4, rtol=1e-4)
        if k:  # without the references the null class's condition would differ
            c, without = model.encode(null, references), model.encode(null)
            assert not torch.allclose(c[:, -4:], without[:, -4:], atol=1e-2)


def test_a_condition_is_computed_once_for_all_steps_and_draws():
    model, calls = build(SMALL), []
    model.ar.register_forward_pre_hook(lambda *_: calls.append("condition"))
    for block in model.decoder.blocks:
        block.attn2.wk.register_forward_pre_hook(lambda *_: calls.append("keys"))
    model.sample(torch.tensor([0]), steps=7, cfg=1.5)
    # 4 images, each with both branches of guidance
    assert calls.count("condition") == 8 and calls.count("keys") == 8 * SMALL.dit_depth
    calls.clear()
    model.loss(*random_chains(SMALL), batch_mul=5)
    assert calls.count("condition") == 1 and calls.count("keys") == SMALL.dit_depth


def test_a_shorter_chain_is_the_start_of_a_longer_one():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    full = model.sample(labels, steps=4, s2=0, noise=noise)
    assert full.shape == (1, 4, 6, 8, 8)
    torch.testing.assert_close(model.sample(labels, refs=2, steps=4, s2=0, noise=noise), full[:, :2])
    with pytest.raises(ValueError, match="chains of 1 to 4"):
        model.sample(labels, refs=5, steps=1)
    with pytest.raises(ValueError, match="at most 3"):
        model.encode(labels, torch.zeros(1, 4, 6, 8, 8))


def test_references_start_the_chain():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    kwargs = dict(steps=4, s2=0, noise=noise)
    full = model.sample(labels, **kwargs)
    torch.testing.assert_close(model.sample(labels, references=full[:, :2], **kwargs), full)
    others = model.sample(labels, references=torch.randn(1, 2, 6, 8, 8), **kwargs)
    assert not torch.allclose(others[:, 2], full[:, 2])


def test_guidance_may_differ_from_image_to_image():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    kwargs = dict(steps=4, s2=0, noise=noise)
    same, first = model.sample(labels, cfg=2.0, **kwargs), model.sample(labels, cfg=[1.0, 2.0, 2.0, 2.0], **kwargs)
    torch.testing.assert_close(model.sample(labels, cfg=[2.0] * 4, **kwargs), same)
    torch.testing.assert_close(first[:, :1], model.sample(labels, refs=1, cfg=1.0, **kwargs))
    assert not torch.allclose(first[:, 0], same[:, 0])
    with pytest.raises(ValueError, match="takes a cfg for each"):
        model.sample(labels, cfg=[1.0, 2.0], **kwargs)


@pytest.mark.parametrize("wrong", [dict(sampler="euler"), dict(steps=0)])
def test_an_unknown_sampler_or_no_steps_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a sampler"):
        build(SMALL).sample(torch.tensor([4]), **wrong)


def test_the_images_of_a_chain_start_from_the_same_noise():
    model, labels, noise = build(SMALL), torch.tensor([4]), torch.randn(1, 6, 8, 8)
    starts = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0]))
    model.sample(labels, steps=1, cfg=1.0, noise=noise)
    assert len(starts) == 4 and all(torch.equal(x, noise) for x in starts)


def test_adams_bashforth_samples_depend_on_the_first_noise_only():
    model, labels, noise = build(SMALL), torch.tensor([0, 1]), torch.randn(2, 6, 8, 8)
    settings = dict(steps=3, cfg=1.5, noise=noise, sampler="adams-bashforth")
    a, b = (model.sample(labels, s1=s1, **settings) for s1 in (1.0, 0.5))
    assert torch.equal(a, b) and a.shape == (2, 4, 6, 8, 8)


def test_samples_have_the_published_settings_by_default():
    model, labels, noise, times = build(ONE_STEP), torch.tensor([0]), torch.randn(1, 6, 8, 8), []
    published = SAMPLING["other"]
    a, b = (model.sample(labels, noise=noise, noise_sampler=torch.ones_like, **s) for s in ({}, published))
    assert torch.equal(a, b)
    model.decoder.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1]))
    model.sample(labels, steps=None, cfg=1.0)  # None, as of a flag that was not given, is the default
    assert len(times) == published["steps"]


@pytest.mark.parametrize("size,refs,latent_size,name", [
    ("B", 1, 16, "B"),
    ("L", 1, 32, "L-512"), ("L", 4, 16, "L-mrar"), ("H", 4, 16, "H-mrar"), ("B", 4, 16, "B"), ("XS", 4, 8, "XS"),
])  # fmt: skip
def test_published_settings_are_found_by_the_shape_of_the_model(size, refs, latent_size, name):
    assert sampling_settings(dataclasses.replace(SIZES[size], refs=refs, latent_size=latent_size)) == SAMPLING[name]


def test_weights_cast_once_give_the_samples_of_autocast():
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 6, 8, 8)
    models = build(SMALL), cast_weights(build(SMALL), torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        a, b = (model.sample(labels, steps=2, cfg=1.5, s2=0, noise=noise) for model in models)
    assert torch.equal(a, b)


def test_references_at_512_px():
    """32 x 32 latents, 256 condition tokens, refs 4: references enter in 4 x 4 patches."""
    config = Config(32, 2, 1, 1, num_classes=3, refs=4, latent_size=32)
    assert config.patch == 4 and config.tokens_per_image == 64
    model = build(config)
    assert model.encode(torch.tensor([1]), torch.randn(1, 3, 16, 32, 32)).shape == (1, 256, 32)
    assert model.sample(torch.tensor([1]), steps=1, cfg=1.3).shape == (1, 4, 16, 32, 32)
    assert model.loss(torch.randn(2, 4, 16, 32, 32), torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize("change", [dict(refs=3), dict(cond_tokens=18), dict(latent_size=7), dict(heads=5)])
def test_sizes_that_do_not_fit_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        dataclasses.replace(SMALL, **change)


# ------------------------------------------------------------------------------------------ warm start


def save(model, path, **entries):
    torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(model.config), **entries), path)
    return path


def test_mrar_starts_from_every_weight_of_a_one_step_model(tmp_path, capsys):
    one_step, mrar = build(ONE_STEP), build(SMALL, seed=9)
    new = mrar.state_dict()["ar.reference_proj.weight"].clone()
    warm_start(mrar, save(one_step, tmp_path / "one.pt"))
    theirs, ours = one_step.state_dict(), mrar.state_dict()
    for name in theirs:
        if name != "ar.mask_tokens":
            assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["ar.mask_tokens"], theirs["ar.mask_tokens"].expand(1, 4, -1))
    assert set(ours) - set(theirs) == {"ar.reference_proj.weight", "ar.reference_proj.bias"}
    assert torch.equal(ours["ar.reference_proj.weight"], new)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "mask embedding copied into 4 mask tokens" in lines[0]


def test_a_model_of_256_px_starts_one_of_512_px_with_interpolated_positions(tmp_path, capsys):
    small, large = build(ONE_STEP), build(dataclasses.replace(ONE_STEP, latent_size=16), seed=9)
    with torch.no_grad():  # a ramp down the rows
        small.decoder.positions.copy_(torch.arange(8.0).repeat_interleave(8)[None, :, None].expand(1, 64, 32))
    warm_start(large, save(small, tmp_path / "small.pt"))
    ramp = large.decoder.positions.detach().view(16, 16, 32)
    assert ramp.std(1).max() < 1e-5  # constant along each row
    torch.testing.assert_close(ramp[4:12, 0, 0], torch.arange(4, 12) / 2 - 0.25, atol=0.05, rtol=0)
    assert torch.equal(large.state_dict()["ar.positions"], small.state_dict()["ar.positions"])
    assert "decoder positions interpolated, latents 8 -> 16" in capsys.readouterr().out


def test_a_model_of_other_classes_keeps_its_new_class_embeddings(tmp_path, capsys):
    old, model = build(ONE_STEP), build(dataclasses.replace(ONE_STEP, num_classes=7), seed=9)
    new = model.state_dict()["ar.class_embedding.weight"].clone()
    warm_start(model, save(old, tmp_path / "old.pt"))
    assert torch.equal(model.ar.class_embedding.weight, new) and torch.equal(model.ar.null_class, old.ar.null_class)
    assert "5 -> 7 classes" in capsys.readouterr().out


def test_a_start_from_weights_of_another_shape_is_refused(tmp_path):
    path = save(build(ONE_STEP), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="narrow.pt: weights of another shape: width 32, not 64"):
        warm_start(build(dataclasses.replace(ONE_STEP, width=64)), path)


# ------------------------------------------------------------------------------------------ checkpoints


def test_our_checkpoints_load(tmp_path):
    model = build(SMALL)
    loaded = load_checkpoint(save(model.half(), tmp_path / "ema.pt", classes=list("abcde")))
    assert loaded.config == SMALL and loaded.info["classes"] == list("abcde") and not loaded.training
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, model.state_dict()[name].float()), name


def test_refs_64_with_one_token_an_image_is_not_taken_for_one_step(tmp_path):
    config = dataclasses.replace(SMALL, refs=64, cond_tokens=64)
    assert load_checkpoint(save(build(config), tmp_path / "ema.pt")).config == config


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {"a": torch.ones(1)}}, [1, 2], {"state_dict": {}}])
def test_files_of_something_else_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not a readable TransDiff model"):
        load_state(tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a readable checkpoint"):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "proof").exists()
