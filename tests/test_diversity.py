"""Eq. 13-15, the features that they compare, and diversity.py as a user runs it."""

import csv
import dataclasses

import pytest
import torch
from test_model import ONE_STEP, SMALL, build
from test_vae import refused, run  # noqa: F401

from diversity import chain_features, mean_abs_offdiagonal, similarity


def test_equations_13_to_15_by_hand():
    A = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [1.0, 1.0]])
    h = 0.5**0.5
    S = torch.tensor([[1, 0, -1, h], [0, 1, 0, h], [-1, 0, 1, -h], [h, h, -h, 1]]).double()
    torch.testing.assert_close(similarity(A), S, atol=1e-7, rtol=0)  # h is float32 in S
    assert mean_abs_offdiagonal(S).item() == pytest.approx((0 + 1 + h + 0 + h + h) / 6)  # 6 pairs
    assert mean_abs_offdiagonal(similarity(torch.ones(5, 3))).item() == pytest.approx(1)


def quick_mrar():
    model = build(SMALL)
    model.sampling = model.sampling.replace(steps=5)
    return model


def test_features_are_of_the_whole_chain_and_without_the_second_positions():
    model, labels = quick_mrar(), torch.tensor([0, 3])
    features = chain_features(model, labels, seed=0)
    assert features.shape == (2, SMALL.cond_tokens, SMALL.width)
    assert torch.equal(features, chain_features(model, labels, seed=0))
    assert not torch.allclose(features, chain_features(model, labels, seed=1))
    with torch.no_grad():  # changes c and so the references, but not the features of image 0
        model.cond_positions += 1
    after = chain_features(model, labels, seed=0)
    torch.testing.assert_close(after[:, :4], features[:, :4])
    assert not torch.allclose(after[:, 4:], features[:, 4:])


def test_the_features_of_a_class_do_not_depend_on_the_others_of_its_batch():
    model = quick_mrar()
    both, alone = (chain_features(model, torch.tensor(y), seed=0) for y in ([0, 3], [3]))
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=1e-3)


def test_features_of_a_one_step_model_are_the_same_for_every_seed():
    model, label = build(ONE_STEP), torch.tensor([2])
    first, second = (chain_features(model, label, seed) for seed in (0, 5))
    assert torch.equal(first, second)


@pytest.fixture
def table(run):
    """table(flags) runs diversity.py and returns the rows of the table on its stdout."""
    return lambda flags: list(csv.DictReader(run(f"diversity.py {flags}").out.splitlines()))


def save(model, path, **others):
    """Write a checkpoint of the model, as train.py does."""
    path.parent.mkdir(exist_ok=True)
    config = dataclasses.asdict(model.config)
    torch.save(dict(model=model.state_dict(), config=config, **others), path)


def test_a_table_has_a_row_for_each_checkpoint_or_folder_of_a_run(tmp_path, table):
    models = [build(ONE_STEP, seed) for seed in (0, 1)]
    save(models[0], tmp_path / "run" / "ema.pt", step=7)
    save(models[1], tmp_path / "ema-9.pt", step=9)
    rows = table("--ckpt run ema-9.pt")
    assert [row["step"] for row in rows] == ["7", "9"]
    assert [row["checkpoint"] for row in rows] == ["run", "ema-9.pt"]
    for row, model in zip(rows, models):
        features = model.ar(torch.arange(5)).detach()
        S = similarity(features)
        values = mean_abs_offdiagonal(S)
        centred = mean_abs_offdiagonal(similarity(features - features.mean((0, 1))))
        assert float(row["centred"]) == pytest.approx(centred.mean().item(), abs=1e-4)
        assert float(row["released"]) == pytest.approx(S.mean().item(), abs=1e-4)
        assert float(row["similarity"]) == pytest.approx(values.mean().item(), abs=1e-4)


def test_the_numbers_of_mrar_are_means_over_chains_of_several_seeds(tmp_path, table):
    model = quick_mrar()
    save(model, tmp_path / "ema.pt", sampling=dataclasses.asdict(model.sampling))
    (row,) = table("--ckpt ema.pt --seeds 3")
    S = torch.stack([similarity(chain_features(model, torch.arange(5), k)) for k in range(3)])
    values = mean_abs_offdiagonal(S)
    expected = dict(similarity=values.mean(), released=S.mean())
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value.item(), abs=1e-4)


def test_centred_does_not_see_a_vector_that_all_features_share(tmp_path, table):
    model = build(ONE_STEP)
    save(model, tmp_path / "ema.pt")
    with torch.no_grad():
        model.ar.norm_out.bias += 30 * torch.randn(ONE_STEP.width)
    save(model, tmp_path / "shared.pt")
    before, after = table("--ckpt ema.pt shared.pt")
    assert float(after["similarity"]) > 0.9 > float(before["similarity"])
    assert float(after["centred"]) == pytest.approx(float(before["centred"]), abs=2e-3)


def test_to_the_decoder_a_vector_that_all_of_c_shares_is_a_bias():
    """Added to all keys it leaves the softmax as it is: the reason for `centred`."""
    model = build(ONE_STEP)
    c = model.encode(torch.arange(5)).detach()
    shared = 10 * torch.randn(ONE_STEP.width)
    x = torch.randn(5, *ONE_STEP.latent_shape)
    t = torch.full((5,), 0.5)
    with torch.no_grad():
        after = model.velocity(x, t, c + shared)
        assert not torch.allclose(model.velocity(x, t, c), after, atol=1e-2)
        for block in model.decoder.blocks:
            block.attn2.wv.bias += block.attn2.wv.weight @ model.decoder.cond_proj.weight @ shared
        torch.testing.assert_close(model.velocity(x, t, c), after, atol=1e-4, rtol=1e-4)


def test_a_missing_checkpoint_is_refused_in_one_line(refused):
    assert "gone.pt: No such file" in refused("diversity.py --ckpt gone.pt")
