"""Eq. 13-15, and diversity.py as a user runs it."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import SMALL, build

from diversity import cosine_similarity, features, similarity


def test_equations_13_to_15_by_hand():
    A = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [1.0, 1.0]])
    S = similarity(A)
    h = 0.5**0.5
    torch.testing.assert_close(S, torch.tensor([[1, 0, -1, h], [0, 1, 0, h], [-1, 0, 1, -h], [h, h, -h, 1]], dtype=torch.float64))
    assert cosine_similarity(S).item() == pytest.approx((0 + 1 + h + 0 + h + h) / 6)  # mean of |S_ij| over the 6 pairs
    assert cosine_similarity(S, released=True).item() == pytest.approx((4 + 2 * (0 - 1 + h + 0 + h - h)) / 16)


def test_extremes():
    assert cosine_similarity(similarity(torch.ones(5, 3))).item() == pytest.approx(1)
    assert cosine_similarity(similarity(torch.eye(5))).item() == pytest.approx(0, abs=1e-12)


def test_features_are_the_output_before_the_second_positions_of_the_whole_chain():
    settings, labels = dict(steps=2, cfg=1.5, s1=1.0, s2=1.0), torch.tensor([0, 3])
    model = build(SMALL)
    f = features(model, labels, 0, settings)
    assert f.shape == (2, SMALL.cond_tokens, SMALL.width)
    assert torch.equal(f, features(model, labels, 0, settings)) and not torch.allclose(f, features(model, labels, 1, settings))
    with torch.no_grad():
        model.cond_positions += 1  # changes c, and so the references that are drawn, but not image 0's features
    torch.testing.assert_close(features(model, labels, 0, settings)[:, :4], f[:, :4])


def test_one_step_features_have_no_noise_in_them():
    import dataclasses

    model = build(dataclasses.replace(SMALL, refs=1))
    assert torch.equal(features(model, torch.tensor([2]), 0, {}), features(model, torch.tensor([2]), 5, {}))


def test_command(tmp_path, command):
    out, _ = command("diversity.py --seeds 2 --per-class --csv d.csv --heatmap trouser --out S.png")
    rows = list(csv.DictReader(open(tmp_path / "d.csv")))
    assert len(rows) == 11 and rows[2]["checkpoint"].strip() == "trouser" and "i != j" in out
    values = [float(r["similarity"]) for r in rows]
    assert all(0 < v < 1 for v in values) and values[0] == pytest.approx(np.mean(values[1:]), abs=1e-3)
    assert float(rows[0]["over_seeds"]) > 0  # MRAR's features hold the references, which are drawn
    picture = np.asarray(Image.open(tmp_path / "S.png"))
    assert picture.shape == (512, 512, 3) and (picture[4, 4] == [180, 20, 30]).all()  # the diagonal is 1
