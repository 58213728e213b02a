"""The study of the paper's claims, demo/claims.py: a tiny run of all of it."""

import csv
import math

import pytest

ARGV = "demo/claims.py --quick --out study"


@pytest.fixture
def study(command, tmp_path):
    """The text of claims.csv, and what the command printed."""
    out, _ = command(ARGV)
    return (tmp_path / "study" / "claims.csv").read_text(), out


def test_every_claim_has_finite_figures_and_a_second_run_adds_nothing(study, command, tmp_path):
    text, printed = study
    rows = list(csv.DictReader(text.splitlines()))
    claims = ["mrar", "references", "autoguidance", "interval", "noise", "samplers", "s1_s2", "t", "steps", "refs"]
    assert list(dict.fromkeys(row["claim"] for row in rows)) == claims
    assert all(math.isfinite(float(row["value"])) for row in rows)

    # both networks measure the same sets
    measured = [(row["network"], row["claim"], row["setting"]) for row in rows if row["metric"] == "distance"]
    first, second = ({row[1:] for row in measured if row[0] == name} for name in ("features.pt", "features-2.pt"))
    assert first == second and ("mrar", "MRAR, cfg 2, image 3") in first

    # the best of a grid is its minimum
    grid = {
        row["setting"]: float(row["value"])
        for row in rows
        if row["claim"] == "mrar" and row["network"] == "features.pt" and row["metric"] == "distance"
    }
    assert grid["MRAR, best cfg, image 3"] == min(grid["MRAR, cfg 1, image 3"], grid["MRAR, cfg 2, image 3"])

    # the printed table has every setting of every claim
    assert all(f"| {row['setting']} |" in printed for row in rows)

    files = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "study").glob("*.json"))
    command(ARGV)
    assert (tmp_path / "study" / "claims.csv").read_text() == text
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "study").glob("*.json")) == files
