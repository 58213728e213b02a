"""Eq. 13-15, the features that they compare, and diversity.py as a user runs it."""

import csv
import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_model import ONE_STEP, SMALL, build

import diversity
from diversity import chain_features, mean_abs_offdiagonal, similarity
from model import SAMPLING


def test_equations_13_to_15_by_hand():
    A = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [1.0, 1.0]])
    h = 0.5**0.5
    S = torch.tensor([[1, 0, -1, h], [0, 1, 0, h], [-1, 0, 1, -h], [h, h, -h, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity(A), S)
    assert mean_abs_offdiagonal(S).item() == pytest.approx((0 + 1 + h + 0 + h + h) / 6)  # 6 pairs


def test_equal_features_have_similarity_1_and_orthogonal_ones_0():
    assert mean_abs_offdiagonal(similarity(torch.ones(5, 3))).item() == pytest.approx(1)
    assert mean_abs_offdiagonal(similarity(torch.eye(5))).item() == pytest.approx(0, abs=1e-12)


def test_features_are_of_the_whole_chain_and_without_the_second_positions():
    model, labels = build(SMALL), torch.tensor([0, 3])
    f = chain_features(model, labels, seed=0)
    assert f.shape == (2, SMALL.cond_tokens, SMALL.width)
    assert torch.equal(f, chain_features(model, labels, seed=0)) and not torch.allclose(
        f, chain_features(model, labels, seed=1)
    )
    with torch.no_grad():  # changes c, and so the references that are drawn, but not the features of image 0
        model.cond_positions += 1
    torch.testing.assert_close(chain_features(model, labels, seed=0)[:, :4], f[:, :4])


def test_the_features_of_a_class_do_not_depend_on_the_others_of_its_batch():
    model = build(SMALL)
    both, alone = (chain_features(model, torch.tensor(labels), seed=0) for labels in ([0, 3], [3]))
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=1e-3)


def test_features_of_a_one_step_model_are_the_same_for_every_seed():
    model = build(ONE_STEP)
    assert torch.equal(
        chain_features(model, torch.tensor([2]), seed=0), chain_features(model, torch.tensor([2]), seed=5)
    )


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """table(*flags) runs diversity.py in this process, in an empty folder, and returns the rows on its stdout."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["diversity.py", *flags])
        diversity.main()
        return list(csv.DictReader(capsys.readouterr().out.splitlines()))

    return call


def test_a_table_has_a_row_for_each_checkpoint(tmp_path, table):
    models, paths = [build(ONE_STEP, seed) for seed in (0, 1)], [str(tmp_path / name) for name in ("1.pt", "2.pt")]
    for step, (model, path) in enumerate(zip(models, paths)):
        torch.save(dict(model=model.state_dict(), config=dataclasses.asdict(ONE_STEP), step=step), path)
    rows = table("--ckpt", *paths, "--batch-size", "2")
    assert [row["step"] for row in rows] == ["0", "1"] and [row["checkpoint"] for row in rows] == paths
    for row, model in zip(rows, models):
        S = similarity(model.ar(torch.arange(5)).detach())
        values = mean_abs_offdiagonal(S)
        assert float(row["released"]) == pytest.approx(S.mean().item(), abs=1e-4)
        assert float(row["similarity"]) == pytest.approx(values.mean().item(), abs=1e-4)
        assert float(row["over_classes"]) == pytest.approx(values.std(correction=0).item(), abs=1e-4)
        assert float(row["over_seeds"]) == 0


def test_the_bundled_model_has_a_row_for_each_class_and_a_heatmap(tmp_path, table, monkeypatch):
    monkeypatch.setitem(SAMPLING["XS"], "steps", 3)  # to be quick
    monkeypatch.setattr(diversity, "DEMO_MODEL", ROOT / "demo" / "mrar.pt")  # its path is relative to another folder
    rows = table("--seeds", "2", "--per-class", "--heatmap", "trouser", "--out", "new/S.png")
    assert len(rows) == 11 and rows[2]["checkpoint"].strip() == "trouser"
    values = [float(row["similarity"]) for row in rows]
    assert all(0 < v < 1 for v in values) and values[0] == pytest.approx(np.mean(values[1:]), abs=1e-3)
    assert float(rows[0]["over_seeds"]) > 0  # of MRAR: the references are drawn
    picture = np.asarray(Image.open(tmp_path / "new" / "S.png"))
    assert picture.shape == (512, 512, 3) and (picture[4, 4] == [180, 20, 30]).all()  # the diagonal is 1
