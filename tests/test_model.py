"""The laws of the method: masks, the chain, the loss, guidance, the sampler, warm start."""
import dataclasses
import math

import pytest
import torch

from model import SIZES, Config, TransDiff, adams_bashforth, attention_masks, euler_maruyama, load_checkpoint, load_state, timestep_embedding, warm_start
from vae import cast_weights

# every field that the demo changes is away from its ImageNet value, and no two lengths are the same
SMALL = Config(32, 2, 3, 2, num_classes=5, refs=4, cond_tokens=16, class_tokens=3, latent_channels=6, latent_size=8, dropout=0.0)


def build(config, seed=0):
    """A model with every weight drawn, so that no zero initialisation hides a path; eval mode."""
    torch.manual_seed(seed)
    model = TransDiff(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def chain(config, B=3, refs=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    return torch.randn(B, refs or config.refs, *shape, generator=g), torch.arange(B) % config.num_classes


# ------------------------------------------------------------------------------------------ masks


def test_masks_as_a_reader_would_draw_them():
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


@pytest.mark.parametrize("size,refs", [("B", 4), ("B", 16), ("B", 64), ("XS", 4), ("XS", 16), ("XS", 64)])
def test_masks_at_every_refs(size, refs):
    config = dataclasses.replace(SIZES[size], refs=refs)
    ar, cross = attention_masks(config)
    n = config.tokens_per_image
    assert n * refs == config.cond_tokens and cross.shape == (refs, config.cond_tokens)
    assert cross.sum(1).tolist() == [n * (k + 1) for k in range(refs)]
    assert ar[config.class_tokens + n - 1].sum() == config.class_tokens + n  # the last mask token sees class and mask
    assert ar[-1].all() and not ar[0, config.class_tokens :].any()


def test_one_step_sees_everything():
    ar, cross = attention_masks(dataclasses.replace(SMALL, refs=1))
    assert ar.all() and cross.all() and cross.shape == (1, 16)
    # and in the model: c depends on a weight that only the last position feels
    model = build(dataclasses.replace(SMALL, refs=1))
    before = model.encode(torch.tensor([2]))
    with torch.no_grad():
        model.ar.positions[:, -1] += 1
    after = model.encode(torch.tensor([2]))
    assert (before != after).any(-1).all()  # every token of c saw it


@pytest.mark.parametrize("refs", [4, 16])
def test_a_later_block_cannot_change_an_earlier_c(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    n = model.config.tokens_per_image
    latents, labels = chain(model.config)
    c = model.encode(labels, latents[:, :-1])
    for k in range(refs - 1):
        changed = latents[:, :-1].clone()
        changed[:, k] += torch.randn_like(changed[:, k])
        c2 = model.encode(labels, changed)
        assert torch.equal(c2[:, : n * (k + 1)], c[:, : n * (k + 1)]), f"x_{k} reached c_{k} or earlier"
        assert (c2[:, n * (k + 1) :] != c[:, n * (k + 1) :]).any(-1).all(), f"x_{k} did not reach all of c_{k + 1}"


def test_a_prefix_of_the_chain_gives_the_same_c():
    model = build(SMALL)
    latents, labels = chain(SMALL)
    whole = model.encode(labels, latents[:, :3])
    for k in range(4):
        torch.testing.assert_close(model.encode(labels, latents[:, :k] if k else None), whole[:, : 4 * (k + 1)])


def test_patches_are_channel_row_column():
    model = build(SMALL)  # 4 tokens an image: a 2 x 2 grid of 4 x 4 patches
    latents, _ = chain(SMALL, B=1)
    tokens = model.ar.patchify(latents[:, :2])
    assert tokens.shape == (1, 8, 6 * 16)
    assert torch.equal(tokens[0, 4 + 1], latents[0, 1, :, :4, 4:].flatten())  # image 1, upper right


# ------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("refs", [1, 4, 16])
def test_batched_chain_loss_is_the_loop_over_images(refs):
    model = build(dataclasses.replace(SMALL, refs=refs))
    latents, labels = chain(model.config)
    t, noise = torch.tensor([0.1, 0.5, 0.9]), chain(model.config, refs=1, seed=2)[0][:, 0]
    losses = []
    for k in range(refs):
        c = model.encode(labels, latents[:, :k] if k else None)
        x = latents[:, k]
        x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
        losses.append((model.velocity(x_t, t, c) - (noise - x)).square().mean())
    torch.testing.assert_close(model.loss(latents, labels, t=t, noise=noise), torch.stack(losses).mean())


@pytest.mark.parametrize("refs", [1, 4])
def test_repeats_are_independent_draws_of_each_image(refs):
    """loss(repeats) is the mean over its draws of (t, eps): replay the generator, one image and one draw at a time."""
    model = build(dataclasses.replace(SMALL, refs=refs))
    latents, labels = chain(model.config)
    torch.manual_seed(5)
    together = model.loss(latents, labels, repeats=3)
    torch.manual_seed(5)
    t = torch.randn(3, 3 * refs).sigmoid()
    eps = torch.randn(3, 3 * refs, 6, 8, 8)
    assert len(t.unique()) == t.numel()
    alone = []
    for k in range(refs):
        c = model.encode(labels, latents[:, :k] if k else None)
        for r in range(3):
            tk, ek, x = t[:, 3 * k + r], eps[:, 3 * k + r], latents[:, k]
            x_t = (1 - tk)[:, None, None, None] * x + tk[:, None, None, None] * ek
            alone.append((model.velocity(x_t, tk, c) - (ek - x)).square().mean())
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_classes_encoded_once_give_the_same_loss_and_gradient():
    """More images than classes: c comes from one pass over the classes. Dropout on, at a rate of nothing, takes the other path."""
    model = build(dataclasses.replace(SMALL, refs=1, num_classes=2, label_dropout=0.0))
    latents, labels = chain(model.config, B=6)
    grads = []
    for dropout in (0.0, 1e-30):
        plain = TransDiff(dataclasses.replace(model.config, dropout=dropout)).train()
        plain.load_state_dict(model.state_dict())
        torch.manual_seed(3)
        t, noise = torch.rand(6), torch.randn(6, 6, 8, 8)
        loss = plain.loss(latents, labels, t=t, noise=noise)
        loss.backward()
        grads.append([loss.detach()] + [p.grad for p in plain.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_distribution_of_t(monkeypatch):
    model = build(SMALL)
    seen = []
    decoder = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x, t, *rest: seen.append(t) or decoder(x, t, *rest))
    latents, labels = chain(SMALL, B=5)
    for distribution in ("logit-normal", "uniform"):
        torch.manual_seed(0)
        model.loss(latents, labels, repeats=200, t_distribution=distribution)
    logits, uniform = seen[0].logit(), seen[1]  # 4000 draws each
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.02


def test_label_dropout_is_for_training_alone():
    config = dataclasses.replace(SMALL, label_dropout=1.0)
    model = build(config)
    latents, labels = chain(config)
    t, noise = torch.full((3,), 0.5), torch.zeros(3, 6, 8, 8)
    null = torch.full_like(labels, config.num_classes)
    labelled, unlabelled = (model.loss(latents, y, t=t, noise=noise) for y in (labels, null))
    assert labelled != unlabelled
    assert torch.equal(model.train().loss(latents, labels, t=t, noise=noise), unlabelled)


def test_dropout_reaches_training_and_only_training():
    model = build(dataclasses.replace(SMALL, dropout=0.5, label_dropout=0.0))
    latents, labels = chain(SMALL)
    fixed = dict(t=torch.full((3,), 0.5), noise=torch.zeros(3, 6, 8, 8))
    assert model.loss(latents, labels, **fixed) == model.loss(latents, labels, **fixed)
    model.train()
    assert model.loss(latents, labels, **fixed) != model.loss(latents, labels, **fixed)


@pytest.mark.parametrize("refs", [1, 4])
def test_every_parameter_gets_a_gradient(refs):
    """DistributedDataParallel objects to parameters that the loss does not reach."""
    config = dataclasses.replace(SMALL, refs=refs, label_dropout=0.5)
    model = build(config).train()
    torch.manual_seed(1)
    latents, labels = chain(config, B=8)
    model.loss(latents, labels).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_timestep_embedding():
    e = timestep_embedding(torch.tensor([0.25]))[0]
    assert e.shape == (256,) and e[0] == pytest.approx(math.cos(250), abs=1e-4) and e[128] == pytest.approx(math.sin(250), abs=1e-4)
    assert e[1] == pytest.approx(math.cos(250 * 10000 ** (-1 / 128)), abs=1e-4)


# ------------------------------------------------------------------------------------------ the sampler


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.5), (-0.7, 0.75)])
def test_a_gaussian_goes_through_the_sampler(mean, std):
    """Data N(mean, std^2): the exact velocity is linear in x, and the SDE must return the data. The last, drift-only step narrows it by up to 2 %."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2  # of x_t = (1 - t) x + t eps
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)  # E[eps - x | x_t]

    torch.manual_seed(0)
    x = euler_maruyama(velocity, torch.randn(200_000), steps=500, s1=1.0, s2=1.0)
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert 0.975 * std < x.std().item() < 1.01 * std


def test_sampler_counts_and_times():
    times, draws = [], []

    def velocity(x, t):
        times.append(t)
        return torch.zeros_like(x)

    euler_maruyama(velocity, torch.ones(2), steps=5, noise_sampler=lambda x: draws.append(1) or torch.zeros_like(x))
    assert [round(t.item(), 4) for t in times] == [1.0, 0.76, 0.52, 0.28, 0.04] and len(draws) == 4
    assert all(t.ndim == 0 for t in times)


def test_one_step_goes_from_noise_to_image_at_once():
    x = torch.tensor([2.0, -1.0])
    # drift = v - w s / 2 = v + x at t = 1, and dt = -1: x - v - x
    assert torch.equal(euler_maruyama(lambda x, t: 0.5 * x, x, steps=1, s1=0.1, noise_sampler=None), -0.5 * x)


def test_s1_and_s2_scale_drift_and_noise_but_not_the_last_step():
    x, v, n = torch.tensor([0.4]), torch.tensor([0.3]), torch.tensor([1.7])
    out = euler_maruyama(lambda x, t: v, x, steps=2, s1=0.9, s2=0.8, noise_sampler=lambda x: n)
    drift = lambda x, t: v - t * (-(x + (1 - t) * v) / t)  # noqa: E731
    middle = x + 0.9 * drift(x, 1.0) * -0.96 + 0.8 * math.sqrt(2.0) * math.sqrt(0.96) * n
    torch.testing.assert_close(out, middle + drift(middle, 0.04) * -0.04)


@pytest.mark.parametrize("mean,std", [(1.5, 0.5), (-0.7, 0.3)])
def test_adams_bashforth_is_of_second_order(mean, std):
    """The flow of a Gaussian is known: x_0 = mean + std x_1. Half the step, a quarter of the error; Euler would have half."""

    def velocity(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    x, calls = torch.linspace(-2, 2, 9, dtype=torch.float64), []
    errors = []
    for steps in (40, 80, 160):
        calls.clear()
        out = adams_bashforth(lambda x, t: calls.append(t) or velocity(x, t.double()), x, steps)
        errors.append((out - (mean + std * x)).abs().max().item())
        assert len(calls) == steps and calls[0] == 1 and all(t.ndim == 0 and t > 0 for t in calls)  # never at t = 0, where no t is drawn in training
    assert errors[0] < 0.05 and 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5


# ------------------------------------------------------------------------------------------ guidance and the chain


@pytest.fixture
def evaluations(monkeypatch):
    """(batch, t) of every call of the decoder."""
    from model import DiT

    calls, forward = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, *rest: calls.append((len(x), t)) or forward(self, x, t, *rest))
    return calls


def test_guidance_of_one_costs_one_evaluation_a_step(evaluations):
    model, labels = build(SMALL), torch.tensor([0, 1])
    model.sample(labels, refs=2, steps=3, cfg=1.0)
    assert [n for n, _ in evaluations] == [2] * 6
    evaluations.clear()
    model.sample(labels, refs=2, steps=3, cfg=1.5)
    assert [n for n, _ in evaluations] == [4] * 6  # both branches in one batch


def test_guidance_in_an_interval(evaluations):
    """Both branches where t is in it, one elsewhere; all of it is plain guidance, none of it is none."""
    model, labels, noise = build(SMALL), torch.tensor([0, 1]), torch.randn(2, 6, 8, 8)

    def draw(**how):
        torch.manual_seed(0)
        return model.sample(labels, refs=1, steps=5, noise=noise, **how)

    draw(cfg=1.5, cfg_interval=(0.2, 0.8))
    assert [n for n, _ in evaluations] == [2, 4, 4, 4, 2]  # t = 1, .76, .52, .28, .04
    assert torch.equal(draw(cfg=1.5), draw(cfg=1.5, cfg_interval=(0.0, 1.0)))
    torch.testing.assert_close(draw(cfg=1.5, cfg_interval=(0.9, 0.95)), draw(cfg=1.0))
    assert not torch.allclose(draw(cfg=1.5, cfg_interval=(0.2, 0.8)), draw(cfg=1.5))


def test_adams_bashforth_needs_no_noise_but_the_first():
    model, labels, noise = build(SMALL), torch.tensor([0, 1]), torch.randn(2, 6, 8, 8)
    a, b = (model.sample(labels, steps=3, cfg=1.5, s1=s, noise=noise, noise_sampler=None, sampler="adams-bashforth") for s in (1.0, 0.5))
    assert torch.equal(a, b) and a.shape == (2, 4, 6, 8, 8)


def test_weights_cast_once_are_the_weights_that_autocast_casts():
    model, labels, noise = build(SMALL), torch.tensor([0, 1]), torch.randn(2, 6, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        a, b = (m.sample(labels, steps=2, cfg=1.5, s2=0, noise=noise) for m in (model, cast_weights(build(SMALL), torch.bfloat16)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("refs", [1, 4])
def test_gradient_checkpointing_changes_nothing_but_memory(refs):
    config = dataclasses.replace(SMALL, refs=refs, dropout=0.3)
    model, grads, kept = build(config).train(), [], []
    latents, labels = chain(config)
    for checkpointing in (False, True):
        model.ar.grad_checkpointing = model.decoder.grad_checkpointing = checkpointing
        saved = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss = model.loss(latents, labels, repeats=2)
        loss.backward()
        kept.append(sum(saved))
        grads.append([loss.detach()] + [p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert kept[1] < kept[0] / 3


def test_guidance_mixes_the_drifts_and_keeps_the_references():
    """One step by hand: the unconditional branch has the null class and the same references."""
    model, labels, null = build(SMALL), torch.tensor([0, 3]), torch.tensor([5, 5])
    noise = torch.randn(2, 6, 8, 8)
    chain = model.sample(labels, refs=3, steps=1, cfg=2.5, noise=noise)
    for k in range(3):
        refs = chain[:, :k] if k else None
        t = torch.ones(2)
        d, d_null = (model.velocity(noise, t, model.encode(y, refs)) + noise for y in (labels, null))
        expected = noise - (d_null + 2.5 * (d - d_null))
        torch.testing.assert_close(chain[:, k], expected, atol=1e-4, rtol=1e-4)
        if k:  # it matters: without the references the branch would be another
            assert not torch.allclose(model.encode(null, refs)[:, -4:], model.encode(null)[:, -4:], atol=1e-2)


def test_condition_is_computed_once_an_image_not_once_a_step(monkeypatch):
    from model import ARTransformer, CrossAttention

    model, count = build(SMALL), {"ar": 0, "kv": 0}
    ar, kv = ARTransformer.forward, CrossAttention.keys_values
    monkeypatch.setattr(ARTransformer, "forward", lambda *a: count.__setitem__("ar", count["ar"] + 1) or ar(*a))
    monkeypatch.setattr(CrossAttention, "keys_values", lambda *a: count.__setitem__("kv", count["kv"] + 1) or kv(*a))
    model.sample(torch.tensor([0]), steps=7, cfg=1.5)
    assert count == {"ar": 8, "kv": 4 * SMALL.dit_depth}  # both branches of guidance pass the AR Transformer; their keys come in one batch
    count.update(ar=0, kv=0)
    model.loss(*chain(SMALL), repeats=5)
    assert count == {"ar": 1, "kv": SMALL.dit_depth}


def test_the_chain_stops_early_and_shares_its_noise():
    model, labels = build(SMALL), torch.tensor([4])
    noise = torch.randn(1, 6, 8, 8)
    whole = model.sample(labels, steps=4, s2=0, noise=noise)
    assert whole.shape == (1, 4, 6, 8, 8)
    torch.testing.assert_close(model.sample(labels, refs=2, steps=4, s2=0, noise=noise), whole[:, :2])
    fresh = model.sample(labels, steps=4, s2=0, noise=noise, fresh_noise=True)
    assert torch.equal(fresh[:, 0], whole[:, 0]) and not torch.allclose(fresh[:, 1], whole[:, 1])
    with pytest.raises(ValueError, match="chains of 1 to 4"):
        model.sample(labels, refs=5, steps=1)
    with pytest.raises(ValueError, match="at most 3"):
        model.encode(labels, torch.zeros(1, 4, 6, 8, 8))


def test_512_px_with_references_runs():
    """32 x 32 latents, 256 condition tokens, refs 4: references enter in 4 x 4 patches."""
    config = Config(32, 2, 1, 1, num_classes=3, refs=4, latent_size=32)
    assert config.patch == 4 and config.tokens_per_image == 64
    model = build(config)
    assert model.encode(torch.tensor([1]), torch.randn(1, 3, 16, 32, 32)).shape == (1, 256, 32)
    assert model.sample(torch.tensor([1]), steps=1, cfg=1.3).shape == (1, 4, 16, 32, 32)
    assert model.loss(torch.randn(2, 4, 16, 32, 32), torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize("change,message", [(dict(refs=3), "refs 3"), (dict(cond_tokens=18), "cond_tokens 18"), (dict(latent_size=7), "latent_size 7"), (dict(heads=5), "heads 5")])
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# ------------------------------------------------------------------------------------------ warm start


def test_one_step_to_mrar_keeps_every_weight_with_a_counterpart():
    one = build(dataclasses.replace(SMALL, refs=1))
    mrar = build(SMALL, seed=9)
    fresh = mrar.state_dict()["ar.reference_proj.weight"].clone()
    notes = warm_start(mrar, one.config, one.state_dict())
    theirs, ours = one.state_dict(), mrar.state_dict()
    for name in theirs:
        if name != "ar.mask_tokens":
            assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["ar.mask_tokens"], theirs["ar.mask_tokens"].expand(1, 4, -1))
    assert set(ours) - set(theirs) == {"ar.reference_proj.weight", "ar.reference_proj.bias"}
    assert torch.equal(ours["ar.reference_proj.weight"], fresh)
    assert len(notes) == 1 and "refs 4" in notes[0]


def test_256_to_512_px_interpolates_the_positions():
    small, large = dataclasses.replace(SMALL, refs=1), dataclasses.replace(SMALL, refs=1, latent_size=16)
    one, big = build(small), build(large, seed=9)
    with torch.no_grad():
        one.decoder.positions.copy_(torch.arange(8.0).repeat_interleave(8)[None, :, None].expand(1, 64, 32))  # a ramp down the rows
    warm_start(big, small, one.state_dict())
    ramp = big.decoder.positions.view(16, 16, 32)
    assert ramp.std(1).max() < 1e-5  # constant along each row
    torch.testing.assert_close(ramp[4:12, 0, 0], torch.arange(4, 12) / 2 - 0.25, atol=0.05, rtol=0)
    assert torch.equal(big.state_dict()["ar.positions"], one.state_dict()["ar.positions"])


def test_warm_start_onto_other_classes_and_refusal():
    one = build(dataclasses.replace(SMALL, refs=1))
    other = build(dataclasses.replace(SMALL, refs=1, num_classes=7), seed=9)
    assert "5 -> 7 classes" in warm_start(other, one.config, one.state_dict())[0]
    assert torch.equal(other.ar.null_class, one.ar.null_class)
    with pytest.raises(ValueError, match="width 32 against 64"):
        warm_start(build(dataclasses.replace(SMALL, width=64)), one.config, one.state_dict())


def test_our_files_load(tmp_path):
    model = build(SMALL)
    state = {k: v.half() for k, v in model.state_dict().items()}
    torch.save(dict(model=state, config=dataclasses.asdict(SMALL), classes=list("abcde")), tmp_path / "ema.pt")
    loaded = load_checkpoint(tmp_path / "ema.pt")
    assert loaded.config == SMALL and loaded.info["classes"] == list("abcde") and not loaded.training
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, state[name].float()), name


def test_refs_64_with_one_token_an_image_is_not_taken_for_one_step(tmp_path):
    config = dataclasses.replace(SMALL, refs=64, cond_tokens=64)
    model = build(config)
    torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(config)), tmp_path / "ema.pt")
    assert load_checkpoint(tmp_path / "ema.pt").config.refs == 64


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {"a": torch.ones(1)}}, [1, 2], {"state_dict": {}}])
def test_other_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not a TransDiff"):
        load_state(tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a readable checkpoint"):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
