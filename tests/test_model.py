"""model.py: masks, the chain, the loss, samplers, guidance, checkpoints; and warm starts.

At the end what model.py has for all scripts: names of classes, noise, errors.
"""

import dataclasses
import math
import sys
import unicodedata

import pytest
import torch

from model import DEMO_MODEL, SIZES, Config, DiT, Sampling, TransDiff, UserError, adams_bashforth
from model import add_noise, attention_masks, cast_weights, class_index
from model import euler_maruyama, load_checkpoint, patchify, per_image_noise, read_checkpoint
from model import run_main, timestep_embedding
from train import warm_start
from vae import DEMO_VAE, load_vae

# Every field that the demo changes differs from its ImageNet value, and no two lengths are equal.
shape = dict(width=32, heads=2, ar_depth=3, dit_depth=2, num_classes=5, refs=4)
tokens = dict(cond_tokens=16, class_tokens=3, latent_channels=6, latent_size=8)
SMALL = Config(**shape, **tokens, dropout=0.0)
ONE_STEP = dataclasses.replace(SMALL, refs=1)


def build(config, seed=0):
    """A model in eval mode. Every weight is random: no zero initialisation hides a path."""
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


def gradients(model, *losses):
    """[the sum of the losses, the gradient of every parameter]."""
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return [sum(loss.detach() for loss in losses), *(p.grad for p in model.parameters())]


def decoder_inputs(model):
    """A list that gets (x, t) of every later call of the decoder."""
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    return seen


def encoder_batches(model):
    """A list that gets the batch size of every later call of the AR Transformer."""
    seen = []
    model.ar.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


# -------------------------------------------------------------------------------- masks
def test_masks_are_those_of_figure_3():
    config = Config(32, 2, 1, 1, refs=4, cond_tokens=4, class_tokens=2, latent_size=2)
    ar, cross = attention_masks(config)
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
@pytest.mark.parametrize("refs", [1, 4, 16, 64])
def test_masks_fit_every_number_of_references(size, refs):
    config = dataclasses.replace(SIZES[size], refs=refs)
    ar, cross = attention_masks(config)
    n = config.tokens_per_image
    assert n * refs == config.cond_tokens
    assert cross.sum(1).tolist() == [n * (k + 1) for k in range(refs)]
    # A mask token attends to class and mask tokens.
    assert ar[config.class_tokens + n - 1].sum() == config.class_tokens + n
    assert ar[-1].all() and ar[0, config.class_tokens :].all() == (refs == 1)


def test_one_step_attention_is_bidirectional():
    model = build(ONE_STEP)
    before = model.encode(torch.tensor([2]))
    with torch.no_grad():
        model.ar.positions[:, -1] += 1  # only the last token of the input changes
    assert (model.encode(torch.tensor([2])) != before).any(-1).all()  # every token of c changes


@pytest.mark.parametrize("refs", [4, 16])
def test_an_image_changes_later_conditions_and_no_earlier_one(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    n = model.config.tokens_per_image
    latents, labels = random_chains(model.config)
    c = model.encode(labels, latents[:, :-1])
    for k in range(refs - 1):
        changed = latents[:, :-1].clone()
        changed[:, k] += torch.randn_like(changed[:, k])
        differs = (model.encode(labels, changed) != c).any(-1)
        assert not differs[:, : n * (k + 1)].any(), f"x_{k} reached c_{k} or an earlier one"
        assert differs[:, n * (k + 1) :].all(), f"x_{k} did not reach all of c_{k + 1} ..."


def test_a_part_of_the_chain_has_the_same_conditions_as_the_whole_chain():
    model = build(SMALL)
    latents, labels = random_chains(SMALL)
    full = model.encode(labels, latents[:, :3])
    for k in range(4):
        part = model.encode(labels, latents[:, :k] if k else None)
        torch.testing.assert_close(part, full[:, : 4 * (k + 1)])


def test_patches_are_in_the_order_channel_row_column():
    latents, _ = random_chains(SMALL, B=1)
    tokens = patchify(latents[:, :2], SMALL.patch)  # 4 per image: a 2 x 2 grid of 4 x 4 patches
    assert tokens.shape == (1, 8, 6 * 16)
    assert torch.equal(tokens[0, 4 + 1], latents[0, 1, :, :4, 4:].flatten())  # image 1, upper right


# -------------------------------------------------------------------------------- the loss
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
            x = latents[:, k]
            eps = noise[:, draw]
            t_ = t[:, draw, None, None, None]
            v = model.velocity((1 - t_) * x + t_ * eps, t[:, draw], c)
            losses.append((v - (eps - x)).square().mean())
    together = model.loss(latents, labels, t=t, noise=noise, batch_mul=batch_mul)
    torch.testing.assert_close(together, torch.stack(losses).mean())


@pytest.mark.parametrize("refs", [1, 4])
def test_a_batch_split_in_two_has_the_gradient_of_the_whole(refs):
    """So micro-batches, and ranks, change the memory and the time of a step and nothing else."""
    model = build(dataclasses.replace(SMALL, refs=refs, label_drop_prob=0.0)).train()
    latents, labels = random_chains(model.config, B=8)
    t, noise = random_draws(model.config, B=8, batch_mul=2)
    inputs = (latents, labels, t, noise)
    whole = gradients(model, model.loss(*inputs, batch_mul=2))
    halves = zip(*(x.chunk(2) for x in inputs))
    parts = gradients(model, *(model.loss(*half, batch_mul=2) / 2 for half in halves))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_loss_of_each_draw_is_the_velocitys_error_for_it():
    model = build(SMALL)
    latents, labels = random_chains(SMALL)
    t, noise = random_draws(SMALL)
    losses = model.loss(latents, labels, t, noise, reduce=False)
    x_t = add_noise(latents, noise, t)
    for k in range(4):
        c = model.encode(labels, latents[:, :k])
        v = model.velocity(x_t[:, k], t[:, k], c)
        expected = (v - (noise - latents)[:, k]).square().mean((1, 2, 3))
        torch.testing.assert_close(losses[:, k], expected)


@pytest.mark.parametrize("refs", [1, 4])
def test_every_image_and_draw_has_its_own_t_and_noise(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    latents, labels = random_chains(model.config)
    seen = decoder_inputs(model)
    model.loss(torch.zeros_like(latents), labels, batch_mul=3)  # of black latents x_t = t noise
    x_t, t = seen[0]
    count = 3 * refs * 3
    assert t.shape == (3, refs * 3) and len(t.unique()) == count
    noise = (x_t / t[..., None, None, None]).flatten(0, 1).flatten(1)
    distances = torch.cdist(noise, noise) + 100 * torch.eye(count)
    assert distances.min() > 1


def test_the_loss_draws_logit_normal_t_unless_told_otherwise():
    model = build(SMALL)
    latents, labels = random_chains(SMALL, B=5)
    seen = decoder_inputs(model)
    with torch.no_grad():
        model.loss(latents, labels, batch_mul=100)
        model.loss(latents, labels, batch_mul=100, t_distribution="uniform")
    (_, normal), (_, uniform) = seen  # 2000 draws each
    logits = normal.logit()
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.02
    assert 0 < uniform.min() and uniform.max() < 1
    with pytest.raises(UserError, match="t normal: must be logit-normal or uniform"):
        model.loss(latents, labels, t_distribution="normal")


def test_the_loss_is_a_function_of_torchs_seed():
    """train.py seeds it from (seed, step, rank), so that a resumed run draws the same numbers."""
    model = build(dataclasses.replace(SMALL, dropout=0.1, label_drop_prob=0.5)).train()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(model.loss(*random_chains(SMALL), batch_mul=2).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("label_drop_prob", [0.0, 1.0])
def test_each_class_is_encoded_once_where_a_one_step_batch_is_larger(label_drop_prob):
    """With the loss and the gradients of image by image, the null class among the classes."""
    config = dataclasses.replace(ONE_STEP, num_classes=2, label_drop_prob=label_drop_prob)
    model = build(config).train()
    latents, _ = random_chains(config, B=6)
    labels = torch.tensor([0, 1, 2, 0, 2, 1])  # 2 is the null class
    t, noise = random_draws(config, B=6)
    encoded = encoder_batches(model)
    together = gradients(model, model.loss(latents, labels, t, noise))
    images = zip(*(x.split(1) for x in (latents, labels, t, noise)))
    one_by_one = gradients(model, *(model.loss(*image) / 6 for image in images))
    assert encoded == [3, 1, 1, 1, 1, 1, 1]
    for a, b in zip(together, one_by_one):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("refs,dropout", [(1, 0.1), (4, 0.0)])
def test_each_image_is_encoded_by_itself_under_dropout_and_with_references(refs, dropout):
    config = dataclasses.replace(SMALL, num_classes=2, refs=refs, dropout=dropout)
    model = build(config).train()
    encoded = encoder_batches(model)
    model.loss(*random_chains(config, B=6))
    assert encoded == [6]


def test_each_label_is_dropped_by_itself_with_the_configured_probability_in_training_only():
    torch.manual_seed(0)
    labels = torch.arange(10_000) % SMALL.num_classes
    dropped = build(dataclasses.replace(SMALL, label_drop_prob=0.2)).drop_labels(labels)
    null = dropped == SMALL.num_classes
    assert abs(null.float().mean() - 0.2) < 0.02
    assert torch.equal(dropped[~null], labels[~null])

    model = build(dataclasses.replace(SMALL, label_drop_prob=1.0))
    latents, labels = random_chains(SMALL)
    t, noise = random_draws(SMALL)
    with_label = model.loss(latents, labels, t, noise)
    without_label = model.loss(latents, torch.full_like(labels, 5), t, noise)
    assert with_label != without_label
    model.train()
    assert torch.equal(model.loss(latents, labels, t, noise), without_label)


@pytest.mark.parametrize("part", ["self-attention", "cross-attention", "mlp"])
def test_dropout_of_one_half_twice_leaves_a_quarter_and_in_training_only(part):
    """Attention weights, of one key each, and the projection; both layers of the MLP."""
    block = build(dataclasses.replace(SMALL, dropout=0.5)).decoder.blocks[0]
    x = torch.rand(2000, 1, 32) + 1
    last, forward = {
        "self-attention": (block.attn1.proj, block.attn1),
        "cross-attention": (block.attn2.proj, lambda x: block.attn2(x, x, x)),
        "mlp": (block.mlp.fc2, block.mlp),
    }[part]
    torch.nn.init.eye_(last.weight)
    torch.nn.init.zeros_(last.bias)
    assert (forward(x) != 0).all()
    block.train()
    assert (forward(x) != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_a_new_model_predicts_velocity_0_and_has_the_initial_weights_of_the_release():
    """Xavier-uniform matrices, embeddings of std 0.02, tables of std 1 / sqrt(width)."""
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SMALL, width=64))
    latents, labels = random_chains(SMALL)
    assert not model.velocity(latents[:, 0], torch.rand(3), model.encode(labels)).any()
    bound = (6 / (64 + 3 * 64)) ** 0.5
    qkv = model.ar.blocks[0].attn.qkv
    assert 0.99 * bound < qkv.weight.abs().max() <= bound and not qkv.bias.any()
    assert qkv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    ar, decoder = model.ar, model.decoder
    for p in (ar.positions, ar.mask_tokens, model.cond_positions, decoder.positions):
        assert p.std().item() == pytest.approx(0.02, rel=0.1)
    assert ar.class_embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert decoder.blocks[0].scale_shift_table.std().item() == pytest.approx(1 / 8, rel=0.2)


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
        latents = torch.empty(3, refs, *model.config.latent_shape)
        labels = torch.zeros(3, dtype=torch.int64)
        noise = torch.empty(3, *model.config.latent_shape)
    model.loss(latents, labels, batch_mul=2).backward()
    c = model.encode(labels)
    for sampler in ("euler-maruyama", "adams-bashforth"):
        assert model.decode(c, noise, c, steps=2, sampler=sampler).is_meta


def test_timestep_embedding_is_cosines_then_sines():
    e = timestep_embedding(torch.tensor([0.25]))[0]
    assert e.shape == (256,)
    assert e[0] == pytest.approx(math.cos(250), abs=1e-4)
    assert e[128] == pytest.approx(math.sin(250), abs=1e-4)
    assert e[1] == pytest.approx(math.cos(250 * 10000 ** (-1 / 128)), abs=1e-4)


# -------------------------------------------------------------------------------- the samplers
def gaussian_velocity(mean, std):
    """Exact velocity E[eps - x | x_t] of data N(mean, std^2)."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2  # of x_t = (1 - t) x + t eps
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    return velocity


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.5), (-0.7, 0.75)])
def test_euler_maruyama_returns_gaussian_data(mean, std):
    torch.manual_seed(0)
    x = euler_maruyama(gaussian_velocity(mean, std), torch.randn(200_000), steps=500)
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    # The last step has no noise, which narrows the data by up to 2 %.
    assert 0.975 * std < x.std().item() < 1.01 * std


def test_euler_maruyama_evaluates_once_per_step_and_draws_noise_between_steps():
    times = []
    draws = []
    velocity = lambda x, t: times.append(t) or 0 * x
    noise_sampler = lambda x: draws.append(x) or 0 * x
    euler_maruyama(velocity, torch.ones(2), steps=5, noise_sampler=noise_sampler)
    assert times == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04]) and len(draws) == 4
    assert all(type(t) is float for t in times)  # a tensor would make a GPU wait


def test_one_step_of_euler_maruyama_goes_from_noise_to_image():
    x = torch.tensor([2.0, -1.0])
    # At t = 1 the drift is v - w s / 2 = v + x, and dt = -1: the result is x - (v + x) = -v.
    assert torch.equal(euler_maruyama(lambda x, t: 0.5 * x, x, steps=1, s1=0.1), -0.5 * x)


def test_s1_and_s2_scale_every_step_but_the_last():
    x = torch.tensor([0.4])
    v = torch.tensor([0.3])
    n = torch.tensor([1.7])
    out = euler_maruyama(lambda x, t: v, x, steps=2, s1=0.9, s2=0.8, noise_sampler=lambda x: n)

    def drift(x, t):
        return v - t * (-(x + (1 - t) * v) / t)

    middle = x + 0.9 * drift(x, 1.0) * -0.96 + 0.8 * math.sqrt(2.0) * math.sqrt(0.96) * n
    torch.testing.assert_close(out, middle + drift(middle, 0.04) * -0.04)


@pytest.mark.parametrize("mean,std", [(1.5, 0.5), (-0.7, 0.3)])
def test_adams_bashforth_is_of_second_order(mean, std):
    """The flow of Gaussian data is x_0 = mean + std x_1. Half the step: a quarter of the error."""
    exact = gaussian_velocity(mean, std)
    times = []

    def velocity(x, t):
        times.append(t)
        return exact(x, t)

    errors = []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (40, 80, 160):
        times.clear()
        out = adams_bashforth(velocity, x, steps)
        errors.append((out - (mean + std * x)).abs().max().item())
        assert len(times) == steps and times[0] == 1 and min(times) > 0  # training has no t = 0
    assert errors[0] < 0.05
    assert 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5


# -------------------------------------------------------------------------------- guidance, chains
LABEL = torch.tensor([4])
NOISE = torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(3))


def test_guidance_evaluates_the_decoder_a_second_time_and_only_below_cfg_below():
    model = build(SMALL)
    seen = decoder_inputs(model)
    settings = dict(refs=1, steps=4, sampler="adams-bashforth")
    model.sample(LABEL, cfg=1.0, **settings)
    assert [t.item() for _, t in seen] == [1, 0.75, 0.5, 0.25]
    seen.clear()
    model.sample(LABEL, cfg=1.5, cfg_below=0.5, **settings)
    assert [t.item() for _, t in seen] == [1, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_cfg_below_0_is_no_guidance_and_1_is_guidance_at_every_t():
    model = build(SMALL)
    settings = dict(steps=4, s2=0, noise=NOISE)
    none, low, full = (model.sample(LABEL, cfg=2, cfg_below=t, **settings) for t in (0, 0.5, 1))
    assert torch.equal(none, model.sample(LABEL, cfg=1, **settings))
    assert torch.equal(full, model.sample(LABEL, cfg=2, **settings))
    assert not torch.allclose(low, none) and not torch.allclose(low, full)


def guided(model, c, c_null, cfg):
    """One step from NOISE to an image by hand: drifts v + x at t = 1, mixed."""
    drift, drift_null = (model.velocity(NOISE, torch.ones(1), x) + NOISE for x in (c, c_null))
    return NOISE - (drift_null + cfg * (drift - drift_null))


def test_guidance_mixes_the_drifts_by_each_images_cfg_and_keeps_the_references():
    """The null class's branch has the references of the class's branch."""
    model = build(SMALL)
    null = torch.tensor([5])
    cfgs = [2.5, 0.5, 1.7]
    images = model.sample(LABEL, refs=3, steps=1, cfg=cfgs, noise=NOISE)
    for k, cfg in enumerate(cfgs):
        references = images[:, :k] if k else None
        c_null = model.encode(null, references)
        expected = guided(model, model.encode(LABEL, references), c_null, cfg)
        torch.testing.assert_close(images[:, k], expected, atol=1e-4, rtol=1e-4)
        if k:  # without the references the null class's condition would differ
            assert not torch.allclose(c_null[:, -4:], model.encode(null)[:, -4:], atol=1e-2)


def test_without_null_refs_the_null_class_has_no_references():
    model = build(SMALL)
    images = model.sample(LABEL, refs=2, steps=1, cfg=2.5, null_refs=False, noise=NOISE)
    c_null = model.encode(torch.tensor([5]))
    expected = guided(model, model.encode(LABEL, images[:, :1]), c_null, 2.5)
    torch.testing.assert_close(images[:, 1], expected, atol=1e-4, rtol=1e-4)


def test_a_condition_is_computed_once_for_all_steps_and_draws():
    model = build(SMALL)
    encoded = encoder_batches(model)
    model.sample(LABEL, steps=7, cfg=1.5)
    assert len(encoded) == 8  # 4 images, each with both branches of guidance
    model.loss(*random_chains(SMALL), batch_mul=5)
    assert len(encoded) == 9


def test_a_chain_goes_on_from_its_references_and_a_shorter_one_is_its_start():
    model = build(SMALL)
    settings = dict(steps=4, s2=0, noise=NOISE)
    full = model.sample(LABEL, **settings)
    assert full.shape == (1, 4, 6, 8, 8)
    torch.testing.assert_close(model.sample(LABEL, refs=2, **settings), full[:, :2])
    torch.testing.assert_close(model.sample(LABEL, references=full[:, :2], **settings), full)
    others = model.sample(LABEL, references=torch.randn(1, 2, 6, 8, 8), **settings)
    assert not torch.allclose(others[:, 2], full[:, 2])


def test_one_number_of_guidance_is_that_of_every_image():
    settings = dict(steps=4, s2=0, noise=NOISE)
    same, listed = (build(SMALL).sample(LABEL, cfg=cfg, **settings) for cfg in (2.0, [2.0] * 4))
    torch.testing.assert_close(listed, same)


@pytest.mark.parametrize("wrong,message", [
    (dict(sampler="adams-bashforth", s1=0.9), "s1: adams-bashforth has none"),
    (dict(sampler="adams-bashforth", s1=0.9, s2=0.9), "s1, s2: adams-bashforth has none"),
    (dict(labels=torch.tensor([0, 5])), "labels .0, 5.: must be 0 to 4"),
    (dict(labels=torch.tensor([-1])), "labels .-1.: must be 0 to 4"),
    (dict(refs=5), "refs 5: this model draws chains of 1 to 4 images"),
    (dict(refs=-1), "refs -1: this model draws chains of 1 to 4 images"),
    (dict(cfg=[1.0, 2.0]), "cfg .1.0, 2.0.: give one number, or one for each of 4 images"),
])  # fmt: skip
def test_what_sample_would_silently_ignore_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        build(SMALL).sample(**{"labels": LABEL, "steps": 1, **wrong})


def test_another_sampler_brings_its_own_steps_and_settings():
    model = build(SMALL)
    model.sampling = Sampling("adams-bashforth", steps=2)
    with pytest.raises(UserError, match="adams-bashforth has none"):
        model.sample(LABEL, s1=0.9)
    replace = model.sampling.replace
    assert replace(sampler="adams-bashforth", cfg=2.0).steps == 2
    assert replace(sampler="euler-maruyama", s1=0.9).steps == 100
    assert replace(sampler="euler-maruyama", s1=0.9, steps=3).steps == 3
    assert Sampling().replace(sampler="adams-bashforth").steps == 8
    with pytest.raises(TypeError, match="step"):
        model.sample(LABEL, step=5)


def test_the_images_of_a_chain_start_from_the_same_noise():
    model = build(SMALL)
    seen = decoder_inputs(model)
    model.sample(LABEL, steps=1, cfg=1.0, noise=NOISE)
    assert len(seen) == 4 and all(torch.equal(x[:, 0], NOISE) for x, _ in seen)


def test_adams_bashforth_samples_depend_on_the_first_noise_only():
    model = build(SMALL)
    settings = dict(steps=3, cfg=1.5, sampler="adams-bashforth")
    a, b = (model.sample(LABEL, noise=NOISE, **settings) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (1, 4, 6, 8, 8)
    assert not torch.allclose(a, model.sample(LABEL, noise=-NOISE, **settings))


def test_weights_cast_once_give_the_samples_of_autocast_and_the_loss_is_float32():
    models = (build(SMALL), cast_weights(build(SMALL), "bf16"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert models[0].loss(*random_chains(SMALL)).dtype == torch.float32
        a, b = (model.sample(LABEL, steps=2, cfg=1.5, s2=0, noise=NOISE) for model in models)
    assert torch.equal(a, b)


def test_references_at_512_px():
    """32 x 32 latents, 256 condition tokens, refs 4: references enter in 4 x 4 patches."""
    config = Config(32, 2, 1, 1, num_classes=3, refs=4, latent_size=32)
    assert config.patch == 4 and config.tokens_per_image == 64
    model = build(config)
    chains, labels = random_chains(config, B=1)
    assert model.encode(labels, chains[:, :3]).shape == (1, 256, 32)
    assert model.sample(labels, steps=1, cfg=1.3).shape == (1, 4, 16, 32, 32)
    assert model.loss(chains, labels).isfinite()


@pytest.mark.parametrize("change,message", [
    (dict(refs=3), "refs 3: cond_tokens 16 / refs has to be a square"),
    (dict(cond_tokens=12), "refs 4: cond_tokens 12 / refs has to be a square"),
    (dict(latent_size=7), "the side of the latents, 7, a multiple of its root 2"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


# -------------------------------------------------------------------------------- warm start
def save(model, path, **entries):
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config, **entries), path)
    return path


def start(model, path, classes="abcde"):
    """As train.py's --init PATH."""
    warm_start(model, read_checkpoint(path), list(classes))


def test_mrar_starts_from_every_weight_of_a_one_step_model(tmp_path):
    one_step = build(ONE_STEP)
    mrar = build(SMALL, seed=9)
    new = mrar.state_dict()["ar.reference_proj.weight"].clone()
    start(mrar, save(one_step, tmp_path / "one.pt"))
    theirs = one_step.state_dict()
    ours = mrar.state_dict()
    for name in theirs:
        if name != "ar.mask_tokens":
            assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["ar.mask_tokens"], theirs["ar.mask_tokens"].expand(1, 4, -1))
    assert set(ours) - set(theirs) == {"ar.reference_proj.weight", "ar.reference_proj.bias"}
    assert torch.equal(ours["ar.reference_proj.weight"], new)


def test_a_model_of_256_px_starts_one_of_512_px_with_interpolated_positions(tmp_path):
    small = build(ONE_STEP)
    large = build(dataclasses.replace(ONE_STEP, latent_size=16), seed=9)
    with torch.no_grad():  # a ramp down the rows
        ramp = torch.arange(8.0).repeat_interleave(8)
        small.decoder.positions.copy_(ramp[None, :, None].expand(1, 64, 32))
    start(large, save(small, tmp_path / "small.pt"))
    ramp = large.decoder.positions.detach().view(16, 16, 32)
    assert ramp.std(1).max() < 1e-5  # constant along each row
    torch.testing.assert_close(ramp[4:12, 0, 0], torch.arange(4, 12) / 2 - 0.25, atol=0.05, rtol=0)
    assert torch.equal(large.ar.positions, small.ar.positions)


@pytest.mark.parametrize("theirs,classes,rows", [
    ("ant bee cat dog eel", "bee cat cow dog ant", [1, 2, None, 3, 0]),
    ("", "a b c d e", [0, 1, 2, 3, 4]),  # without names: all, if the counts agree
    ("", "a b c d e f g", [None] * 7),
])  # fmt: skip
def test_class_embeddings_are_matched_by_name_not_by_their_place(
    theirs, classes, rows, tmp_path, capsys
):
    old = build(ONE_STEP)
    classes = classes.split()
    model = build(dataclasses.replace(ONE_STEP, num_classes=len(classes)), seed=9)
    new = model.ar.class_embedding.weight.detach().clone()
    entries = dict(classes=theirs.split()) if theirs else {}
    start(model, save(old, tmp_path / "old.pt", **entries), classes)
    for k, row in enumerate(rows):
        expected = new[k] if row is None else old.ar.class_embedding.weight[row]
        assert torch.equal(model.ar.class_embedding.weight[k], expected)
    assert torch.equal(model.ar.null_class, old.ar.null_class)
    unknown = ", ".join(name for name, row in zip(classes, rows) if row is None)
    line = f"{tmp_path}/old.pt: class embeddings matched by name; new: {unknown}\n"
    assert capsys.readouterr().out == (line if unknown else "")


def test_a_start_from_weights_of_another_shape_is_refused(tmp_path):
    path = save(build(ONE_STEP), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match="narrow.pt: not a usable start of this model .*size misma"):
        start(build(dataclasses.replace(ONE_STEP, width=64)), path)


# -------------------------------------------------------------------------------- checkpoints
def test_our_checkpoints_load_as_a_file_and_as_the_folder_of_a_run(tmp_path):
    model = build(SMALL)
    save(model.half(), tmp_path / "ema.pt", classes=list("abcde"))
    for path in (tmp_path / "ema.pt", str(tmp_path / "ema.pt"), tmp_path, str(tmp_path)):
        loaded = load_checkpoint(path)
        assert loaded.config == SMALL and loaded.info["classes"] == list("abcde")
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        for name, p in loaded.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, model.state_dict()[name].float())


def test_decode_takes_the_settings_that_a_model_carries(tmp_path):
    model = build(SMALL)
    model.sampling = Sampling("adams-bashforth", steps=3, s1=1.0, s2=1.0)
    c = model.encode(LABEL)
    x = model.decode(c, NOISE, **dataclasses.asdict(model.sampling))
    assert torch.equal(x, model.decode(c, NOISE))
    states = []
    model.decode(c, NOISE, on_step=lambda t, x_t: states.append(x_t))
    assert torch.equal(states[0], NOISE) and len(states) == 3
    with pytest.raises(UserError, match="s1: adams-bashforth has none"):
        model.decode(c, NOISE, s1=0.5)


def test_a_buffer_that_is_not_saved_does_not_hinder_loading(tmp_path, monkeypatch):
    """A student's rotary table, say."""
    init = DiT.__init__

    def with_table(self, config):
        init(self, config)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(DiT, "__init__", with_table)
    model = build(SMALL)
    loaded = load_checkpoint(save(model, tmp_path / "ema.pt"))
    assert loaded.decoder.table.tolist() == [0, 1, 2]
    assert torch.equal(loaded.cond_positions, model.cond_positions)


def test_a_checkpoint_has_the_number_of_images_of_each_class(tmp_path):
    model = build(SMALL)
    counts = lambda **entries: load_checkpoint(save(model, tmp_path / "m.pt", **entries)).info[
        "counts"
    ]
    assert counts() == [1, 1, 1, 1, 1]
    assert counts(counts=[7, 0, 2, 3, 1]) == [7, 0, 2, 3, 1]


def test_a_checkpoint_carries_its_sampling_settings(tmp_path):
    model = build(SMALL)
    settings = dict(sampler="adams-bashforth", steps=3, cfg=1.7, cfg_below=0.6, null_refs=False)
    loaded = load_checkpoint(save(model, tmp_path / "ema.pt", sampling=settings))
    calls = []
    ours = loaded.sample(LABEL, noise=NOISE, on_step=lambda t, x_t: calls.append(t))
    assert calls == [1, 1 - 1 / 3, 1 - 2 / 3] * SMALL.refs  # t of every step
    assert torch.equal(ours, model.sample(LABEL, noise=NOISE, **settings))
    # None, as of a flag that was not given, is the model's setting too.
    assert torch.equal(ours, loaded.sample(LABEL, noise=NOISE, steps=None, cfg=None))
    assert not torch.allclose(ours, loaded.sample(LABEL, noise=NOISE, cfg=1.0))


@pytest.mark.parametrize("size,refs,latent_size,cfg,s1,s2", [
    ("B", 1, 16, 1.30, 0.87, 0.91),
    ("B", 4, 16, 1.30, 0.87, 0.91),
    ("L", 1, 16, 1.30, 0.89, 0.95),
    ("L", 4, 16, 1.30, 0.925, 0.95),
    ("L", 1, 32, 1.30, 0.87, 0.87),
    ("H", 1, 16, 1.23, 0.87, 0.93),
    ("H", 4, 16, 1.28, 0.87, 0.91),
])  # fmt: skip
def test_a_file_without_settings_gets_the_published_ones(size, refs, latent_size, cfg, s1, s2):
    with torch.device("meta"):
        model = TransDiff(dataclasses.replace(SIZES[size], refs=refs, latent_size=latent_size))
    assert model.sampling == Sampling("euler-maruyama", 100, cfg, 1.0, True, s1, s2)


@pytest.mark.parametrize("width,heads", [(64, 1), (160, 5)])  # 160: XS
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_weights_with_prefixes_of_ddp_and_torch_compile_load(prefix, width, heads, tmp_path):
    """The shapes of the weights give the configuration, but for the heads."""
    model = build(dataclasses.replace(SMALL, width=width, heads=heads))
    weights = {prefix + name: p for name, p in model.state_dict().items()}
    weights = {k.replace("decoder.", "decoder._orig_mod."): p for k, p in weights.items()}
    torch.save(weights, tmp_path / "x.pt")
    loaded = load_checkpoint(tmp_path / "x.pt")
    ours, theirs = (m.sample(LABEL, steps=1, s2=0, noise=NOISE) for m in (loaded, model))
    assert torch.equal(ours, theirs)


def test_refs_64_with_one_token_per_image_is_not_taken_for_one_step(tmp_path):
    config = dataclasses.replace(SMALL, refs=64, cond_tokens=64)
    assert load_checkpoint(save(build(config), tmp_path / "ema.pt")).config == config


@pytest.mark.parametrize("content,message", [
    ({"epoch": 3, "optimizer": {}}, "TransDiff model, it has epoch, optimizer"),
    ({"model": {}}, "TransDiff model, it has model"),
    ({"model": {"a": torch.ones(1)}, "args": {}}, "TransDiff model, it has model, args"),
    ({"state_dict": {}}, "TransDiff model, it has state_dict"),
    ([1, 2], "checkpoint .it holds a list"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_by_what_it_has(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt: not a usable {message}"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_of_an_edited_config_is_a_traceback(tmp_path):
    """A field that Config has not (any more) is a mistake in the code, not in the file."""
    config = dict(dataclasses.asdict(SMALL), qk_norm=True)
    torch.save(dict(model=build(SMALL).state_dict(), config=config), tmp_path / "x.pt")
    with pytest.raises(TypeError, match="qk_norm"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.weights
def test_a_vae_of_other_latents_than_the_models_is_refused(tmp_path):
    model = load_checkpoint(DEMO_MODEL)
    load_vae(DEMO_VAE, model=model)
    other = torch.load(DEMO_VAE, weights_only=True)
    other["scale"] *= 2
    torch.save(other, tmp_path / "other.pt")
    load_vae(tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: not the VAE of this model's latents; name"):
        load_vae(tmp_path / "other.pt", model=model)
    # A released model does not name its VAE: the channels have to agree.
    with pytest.raises(UserError, match="not the VAE of this model's latents"):
        load_vae(DEMO_VAE, model=build(SMALL))


# -------------------------------------------------------------------------------- for all scripts
NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("word,classes,empty,index", [
    ("bag", ["shirt", "bag"], [], 1),
    ("Bag", ["bag", "Bag"], [], 1),
    ("1", ["shirt", "bag"], [], 1),  # no name is a number: an index
    (NFD, ["bar", NFC], [], 1),
    (NFC, ["bar", NFD], [], 1),
    ("4", ["01", "02", "03", "04"], [], 3),  # folders of numbers: by their value
    ("10", ["1", "10", "11", "2"], [], 1),
    ("2", ["2", "1", "many"], [], 0),  # a name before an index
    ("3", None, [], 3),  # of a model without names
    ("5", None, [], None),
    ("trousers", ["shirt", "bag"], [], None),
    ("2", ["shirt", "bag"], [], None),
    ("Bag", ["shirt", "bag"], [], None),
    ("-1", ["shirt", "bag"], [], None),
    ("0", ["01", "02"], [], None),  # all names are numbers: an index would be mistaken for one
    ("shirt", ["bag", "shirt", "coat"], [1], None),  # had no images to be trained on
    ("1", ["bag", "shirt", "coat"], [1], None),
])  # fmt: skip
def test_a_class_is_named_in_any_unicode_form_or_by_its_index(word, classes, empty, index):
    """Another one is refused with the names of those that there are."""
    model = build(ONE_STEP)
    if classes:
        model.info.update(classes=classes, counts=[k not in empty for k in range(len(classes))])
    if index is not None:
        assert class_index(word, model) == index
        return
    names = model.info["classes"]
    trained = ", ".join(name for k, name in enumerate(names) if k not in empty)
    message = f"--class {word}: this model was trained on the classes {trained}$"
    with pytest.raises(UserError, match=message):
        class_index(word, model)


def test_the_noise_of_an_image_is_the_same_in_every_batch_and_on_its_device():
    x = torch.empty(3, 6, 8, 8)
    together = per_image_noise(0, [3, 4, 5])
    alone = per_image_noise(0, [5])
    draws = [together(x) for _ in range(2)]
    assert all(torch.equal(noise[2:], alone(x[:1])) for noise in draws)  # draw after draw
    draws.append(per_image_noise(1, [3, 4, 5])(x))
    assert len(torch.cat(draws).flatten(1).unique(dim=0)) == 9
    assert per_image_noise(0, [3])(x[:1].to("meta")).is_meta  # any device, not only CUDA


@pytest.fixture
def fail(monkeypatch):
    """fail(error) runs a script mine.py whose main() raises this error."""
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(error):
        def main():
            raise error

        run_main(main)

    return call


@pytest.mark.parametrize("error,status,line", [
    (UserError("photos: no such folder"), 2, "photos: no such folder"),
    (OSError(2, "No such file or directory", "gone.pt"), 2, "gone.pt: No such file or directory"),
    (MemoryError(), 2, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_a_mistake_in_the_input_is_one_line(error, status, line, fail, capsys):
    with pytest.raises(SystemExit) as e:
        fail(error)
    assert e.value.code == status
    assert capsys.readouterr().err.splitlines() == [f"mine.py: {line}"]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError, NameError, AssertionError])
def test_a_mistake_in_the_code_is_a_traceback(kind, fail):
    with pytest.raises(kind, match="of the reader's edit"):
        fail(kind("of the reader's edit"))
