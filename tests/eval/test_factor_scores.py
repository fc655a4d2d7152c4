"""FactorVAE's score and DCI: codes whose scores are known, and the arithmetic of disentanglement_lib written out."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

from latent_ae.config import UserError
from latent_ae_eval.factors.measure import _no_dci
from latent_ae_eval.factors.scores import EXTRA, concentration, dci, factor_vae_score
from latent_ae_eval.factors.settings import FactorsSettings

COUNTS = (3, 4, 5)
ALL = np.array(list(itertools.product(*map(range, COUNTS))))
MANY = np.tile(ALL, (10, 1))
NAMES = ["shape", "x", "y"]


def test_a_dimension_for_each_factor_has_every_score_of_one() -> None:
    codes = np.stack([5.0 - MANY[:, 2], 100.0 * MANY[:, 0], 0.01 * MANY[:, 1]], 1)
    assert factor_vae_score(codes, MANY, range(3), 0) == 1.0
    found = dci(codes, MANY, NAMES, range(3), 0)
    for key in ("disentanglement", "completeness", "informativeness"):
        assert found[key] == pytest.approx(1.0), key
    assert np.argmax(found["importance"], 0).tolist() == [1, 2, 0]


def test_the_score_of_factor_vae_where_dimensions_mix_or_say_nothing() -> None:
    rng = np.random.default_rng(0)
    # x + y and x - y: whichever is held, both dimensions vary alike
    square = np.tile(np.array(list(itertools.product(range(8), range(8)))), (10, 1))
    mixed = np.stack([square.sum(1), square[:, 0] - square[:, 1]], 1)
    assert factor_vae_score(mixed, square, range(2), 0) == pytest.approx(0.5, abs=0.03)
    noise = rng.normal(size=(len(MANY), 4))
    assert factor_vae_score(noise, MANY, range(4), 0) == pytest.approx(1 / 3, abs=0.04)
    # one dimension wins every vote, and tells one factor of three
    assert factor_vae_score(noise, MANY, [2], 0) == pytest.approx(1 / 3, abs=0.02)
    assert factor_vae_score(noise, MANY, [], 0) == 0.0
    # a dimension that is not active cannot be chosen
    codes = np.concatenate([MANY.astype(float), np.zeros((len(MANY), 1))], 1)
    assert factor_vae_score(codes, MANY, range(3), 0) == 1.0
    # one factor has a dimension, which wins half of the other votes, too: 1/3 + 1/6
    half = np.stack([MANY[:, 0], rng.normal(size=len(MANY))], 1)
    assert factor_vae_score(half, MANY, range(2), 0) == pytest.approx(1 / 2, abs=0.05)


def test_the_score_of_factor_vae_is_that_of_disentanglement_lib() -> None:
    """Its loops over votes, with other random numbers: 1,500 votes to fit, 1,500 to test."""
    rng = np.random.default_rng(1)
    codes = MANY @ rng.normal(size=(3, 3)) + rng.normal(size=(len(MANY), 3))
    variances = np.var(codes, axis=0, ddof=1)

    def vote() -> tuple[int, int]:
        factor = rng.integers(3)
        held = MANY[rng.integers(len(MANY)), factor]
        same = codes[MANY[:, factor] == held]
        local = np.var(same[rng.integers(len(same), size=64)], axis=0, ddof=1)
        return int(np.argmin(local / variances)), int(factor)

    votes, test = np.zeros((3, 3)), np.zeros((3, 3))
    for table in (votes, test):
        for _ in range(1500):
            table[vote()] += 1
    theirs = test[np.arange(3), np.argmax(votes, axis=1)].sum() / test.sum()
    assert 0.4 < theirs < 0.95
    assert factor_vae_score(codes, MANY, range(3), 0) == pytest.approx(theirs, abs=0.04)


def test_concentration_is_one_minus_the_entropy_of_shares() -> None:
    importance = np.random.default_rng(0).random((4, 3))
    for matrix in (importance, importance.T):
        each = [1 - entropy(row, base=matrix.shape[1]) for row in matrix]
        expected = np.average(each, weights=matrix.sum(1))
        assert concentration(matrix) == pytest.approx(expected)
    assert concentration(np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]])) == pytest.approx(1 / 5)
    assert concentration(np.array([[3.0], [1.0]])) == 1.0 and concentration(np.zeros((2, 3))) == 0.0


def test_dci_tells_shared_dimensions_from_scattered_factors() -> None:
    both = dci((10.0 * MANY[:, [0]] + MANY[:, [1]]), MANY[:, :2], NAMES[:2], [0], 0)
    assert both["disentanglement"] < 0.01 and both["completeness"] == 1 and both["informativeness"] == 1
    twice = dci(
        np.stack([MANY[:, 0] // 2, MANY[:, 0] % 2, MANY[:, 1]], 1).astype(float), MANY[:, :2], NAMES[:2], range(3), 0
    )
    assert twice["disentanglement"] > 0.95 and 0.5 < twice["completeness"] < 0.85
    values = np.random.default_rng(0).normal(size=(len(MANY), 2))
    noise = dci(values, MANY[:, :2], NAMES[:2], range(2), 0)
    assert noise["informativeness"] == pytest.approx((1 / 3 + 1 / 4) / 2, abs=0.1)
    assert noise == dci(values, MANY[:, :2], NAMES[:2], range(2), 0)
    # of ten dimensions two are active, each of which tells half: 1 - ln 2 / ln 10, as if the trees had left out eight
    few = dci(
        np.concatenate([np.stack([MANY[:, 0] // 2, MANY[:, 0] % 2], 1), np.zeros((len(MANY), 8))], 1),
        MANY[:, :1],
        NAMES[:1],
        [0, 1],
        0,
    )
    shares = np.array(few["importance"])[:, 0]
    assert few["completeness"] == pytest.approx(1 - entropy(shares) / np.log(10)) and len(shares) == 2


def test_dci_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _no_dci(FactorsSettings(), 15, 100) == ""
    assert "16 active dimensions" in _no_dci(FactorsSettings(), 16, 100)
    assert not _no_dci(FactorsSettings(dci=True), 33, 100)
    assert _no_dci(FactorsSettings(dci=True), 0, 100) == "no dimension is active"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert _no_dci(FactorsSettings(), 3, 100) == EXTRA


def test_dci_asks_for_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    codes: Any = MANY.astype(float)
    with pytest.raises(UserError, match=r"dci: scikit-learn is not installed: pip install '.\[factors\]' in"):
        dci(codes, MANY, NAMES, range(3), 0)
