"""The score of FactorVAE, and DCI: disentanglement, completeness and informativeness."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_ae.config import UserError
from latent_ae.progress import progress_bar

VOTES, TEST_VOTES, IMAGES_OF_A_VOTE = 10_000, 5_000, 64
"""The FactorVAE score learns from so many votes, is tested with so many, and takes so many images for each, as in
Locatello et al. 2019."""
DCI_IMAGES, DCI_TEST_IMAGES = 10_000, 5_000
"""Largest numbers of images that DCI fits its trees to and tests them with (Locatello et al. 2019)."""
MOST_WORK = 1500
"""Largest product of dimensions and values of all factors for which DCI is measured unasked. Its time grows with it:
one tree of ten dimensions takes 10 ms for 4,096 images, and each value has 100 trees."""
EXTRA = "scikit-learn is not installed: pip install '.[factors]' in the checkout"


def factor_vae_score(codes: np.ndarray, factors: np.ndarray, active: Sequence[int] | np.ndarray, seed: int) -> float:
    """Return the accuracy with which the steadiest dimension tells which factor was held (Kim and Mnih 2018, 4.).

    A vote takes a factor and a value of it at random, and 64 images that have this value. Its dimension is the one
    whose variance over these images, relative to that over all images, is the smallest. A classifier that gives each
    dimension the factor for which it was most often chosen among 10,000 votes is tested with 5,000 others. By chance
    the accuracy is about one over the number of factors.

    Args:
        codes: (N, D) numbers.
        factors: (N, K) integers from 0 on.
        active: The dimensions that may be chosen; with none the score is 0, as nothing is represented.
        seed: Seed of the choices.
    """
    if not len(active):
        return 0.0
    rng = np.random.default_rng(seed)
    codes = codes[:, active].astype(np.float64)
    spread = codes.var(0)
    rows = [[np.flatnonzero(column == value) for value in range(column.max() + 1)] for column in factors.T]
    counts = np.zeros((2, codes.shape[1], factors.shape[1]), np.int64)
    for part, number in enumerate((VOTES, TEST_VOTES)):
        for factor in rng.integers(0, factors.shape[1], number):
            held = rows[factor][rng.integers(0, len(rows[factor]))]
            chosen = codes[held[rng.integers(0, len(held), IMAGES_OF_A_VOTE)]]
            counts[part, np.argmin(chosen.var(0) / spread), factor] += 1
    guesses = counts[0].argmax(1)
    return float(counts[1][np.arange(len(guesses)), guesses].sum() / TEST_VOTES)


def dci(
    codes: np.ndarray,
    factors: np.ndarray,
    names: Sequence[str],
    active: Sequence[int] | np.ndarray,
    seed: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Return disentanglement, completeness and informativeness (Eastwood and Williams 2018), JSON-ready.

    Gradient-boosted trees with scikit-learn's default settings predict each factor from the dimensions, as in Locatello
    et al. 2019. Informativeness is their accuracy on images that they were not fitted to, as a mean over factors; the
    other two are of how much each dimension matters for each factor. Dimensions that are not active matter for none.

    Args:
        codes: (N, D) numbers.
        factors: (N, K) integers from 0 on.
        names: Names of the K factors.
        active: The dimensions that the trees see.
        seed: Seed of the choice of images and of the trees.
        progress: Show a progress bar.

    Raises:
        UserError: If scikit-learn is not installed, or the images for the trees have one value of a factor.
    """
    try:
        from sklearn.ensemble import GradientBoostingClassifier
    except ImportError as error:
        raise UserError(f"dci: {EXTRA}") from error
    order = np.random.default_rng(seed).permutation(len(codes))
    count = min(DCI_IMAGES, 2 * len(codes) // 3)
    fitted, tested = order[:count], order[count : count + DCI_TEST_IMAGES]
    importance = np.zeros((codes.shape[1], factors.shape[1]))
    accuracy = {}
    with progress_bar("factors: DCI", len(names), "factor", disable=not progress) as bar:
        for k, name in enumerate(names):
            if len(np.unique(factors[fitted, k])) < 2:
                raise UserError(f"dci: the {count:,} images for its trees have one value of {name}: give more images")
            trees = GradientBoostingClassifier(random_state=seed)
            trees.fit(codes[fitted][:, active], factors[fitted, k])
            importance[active, k] = trees.feature_importances_
            accuracy[name] = float(trees.score(codes[tested][:, active], factors[tested, k]))
            bar.update()
    return {
        "disentanglement": concentration(importance),
        "completeness": concentration(importance.T),
        "informativeness": float(np.mean(list(accuracy.values()))),
        "accuracy": accuracy,
        "importance": importance[active].tolist(),
    }


def concentration(importance: np.ndarray) -> float:
    """Return how far each row of a matrix is one entry: 1 - H(row) / ln(columns), weighted by the rows' sums.

    Of the importance of dimensions (rows) for factors it is DCI's disentanglement; of the transpose, completeness.

    Args:
        importance: Non-negative, (rows, columns).
    """
    sums = importance.sum(1)
    if importance.shape[1] < 2 or not sums.any():
        return float(sums.any())
    shares = importance[sums > 0] / sums[sums > 0, None]
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    each = 1 + (shares * logs).sum(1) / np.log(importance.shape[1])
    return float((each * sums[sums > 0]).sum() / sums.sum())
