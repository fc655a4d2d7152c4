"""Distances between two sets of feature vectors: Fréchet (such as FID), kernel (KID, CMMD), precision and recall."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

GROUPS = 10
"""Number of groups of images; each is left out once to estimate how much a Fréchet distance varies with the images."""
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
"""The defaults of torch-fidelity."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3
"""Neighbours of precision and recall, as Kynkäänniemi et al. (2019) advise."""
BLOCK = 1024
"""Number of feature vectors between which distances are in memory at a time."""


@dataclass(frozen=True)
class Gaussian:
    """Running float64 sums of feature vectors, from which their mean and covariance follow.

    The size is the same for ten images and for a million. Adding two objects merges two sets; subtracting one removes a
    subset.
    """

    count: int
    total: np.ndarray
    """(D,)"""
    products: np.ndarray
    """(D, D): sum of outer products."""

    @staticmethod
    def of(features: np.ndarray) -> "Gaussian":
        """Return the sums of `features`, (N, D) of any float type."""
        x = features.astype(np.float64)
        return Gaussian(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: "Gaussian") -> "Gaussian":
        return Gaussian(self.count + other.count, self.total + other.total, self.products + other.products)

    def __sub__(self, other: "Gaussian") -> "Gaussian":
        return Gaussian(self.count - other.count, self.total - other.total, self.products - other.products)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean, (D,), and the unbiased covariance, (D, D), float64. Needs a count of at least 2."""
        mean = self.total / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(
    mean_a: np.ndarray,
    covariance_a: np.ndarray,
    mean_b: np.ndarray,
    covariance_b: np.ndarray,
    *,
    quick: bool = False,
) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982; as FID: Heusel et al. 2017).

    |a - b|^2 + tr A + tr B - 2 tr (A B)^(1/2), float64. The last term is the sum of the singular values of F^T G with
    A = F F^T and B = G G^T, so it stays real, and exact to rounding, for singular covariances too.

    Args:
        mean_a: (D,).
        covariance_a: (D, D), symmetric and positive semidefinite.
        mean_b: (D,).
        covariance_b: (D, D).
        quick: Compute the singular values from the eigenvalues of the product with its transpose. This takes a third of
            the time, but eigenvalues below 1e-8 of the largest are lost in rounding.
    """
    product = _factor(covariance_a).T @ _factor(covariance_b)
    if quick:
        cross = np.sqrt(np.linalg.eigvalsh(product.T @ product).clip(min=0)).sum()
    else:
        cross = np.linalg.svd(product, compute_uv=False).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F F^T = covariance."""
    try:
        return np.linalg.cholesky(covariance)  # a tenth of the time of eigenvectors
    except np.linalg.LinAlgError:  # singular: some features are constant, or as good as
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(min=0))


def frechet_of_features(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of features that fit into memory.

    With fewer vectors than dimensions it uses N x M products of the centred features. That is faster, and more exact
    than going through covariances, because no root of a rounding error is taken.

    Args:
        a: (N, D) features of any float type.
        b: (M, D) features.

    Raises:
        ValueError: If a set has fewer than two vectors.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("two images or more are needed")
    if max(len(a), len(b)) > a.shape[1]:
        return frechet_distance(*Gaussian.of(a).moments(), *Gaussian.of(b).moments())
    roots = [(x.astype(np.float64) - x.mean(0, dtype=np.float64)) / np.sqrt(len(x) - 1) for x in (a, b)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(difference @ difference + sum(np.square(root).sum() for root in roots) - 2 * cross)


def jackknife_interval(value: float, without_one_group: Sequence[float]) -> list[float]:
    """Return a 95 % confidence interval, [low, high], around `value` (delete-a-group jackknife).

    A bootstrap would not do: it repeats images, and a Fréchet distance of repeated images is biased upwards by more
    than the width of the interval. The spread of G groups has G - 1 degrees of freedom, hence Student's quantile.

    Args:
        value: The statistic of all images.
        without_one_group: The same statistic with each of the G groups left out.
    """
    left_out = np.asarray(without_one_group)
    groups = len(left_out)
    error = float(np.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum()))
    half = student_quantile(groups - 1) * error
    return [value - half, value + half]


@cache
def student_quantile(freedom: int) -> float:
    """Return the t that |T| exceeds with probability 5 %, for Student's T with `freedom` (>= 1) degrees of freedom."""
    # with t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1) on [0, pi / 2]
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95 * below[-1], below, angles)))


def kernel_distance(
    read_a: Callable[[np.ndarray], np.ndarray],
    read_b: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = KID_SEED,
    paired: bool = False,
) -> tuple[float, float]:
    """Return KID (Binkowski et al. 2018) and its standard deviation over subsets.

    KID is the mean over random subsets of the unbiased squared MMD with the kernel (x.y / D + 1)^3. The subsets are
    those of torch-fidelity for the same seed. torch-fidelity needs at least `subset_size` images; here a smaller set is
    used whole, once. Only one subset is in memory at a time.

    Where image i of one set was made from image i of the other, the sets are not independent, and comparing i with i
    lowers the distance by about 2 / N of the kernel's range. A set that is used whole leaves these pairs out. Random
    subsets keep them, as torch-fidelity does; their bias is small, since they are of more than `subset_size` images.

    Args:
        read_a: Returns the features of the given row numbers of the first set, (n, D) float32.
        read_b: The same for the second set.
        count: Number of images in each set.
        subsets: Number of random subsets.
        subset_size: Images per subset.
        seed: Seed of the subsets.
        paired: Whether image i of the second set was made from image i of the first.
    """
    if count <= subset_size:  # every subset would be the whole set
        rows = np.arange(count)
        return squared_mmd(read_a(rows), read_b(rows), paired=paired), 0.0
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows_a = rng.choice(count, subset_size, replace=False)
        rows_b = rng.choice(count, subset_size, replace=False)
        values.append(squared_mmd(read_a(rows_a), read_b(rows_b)))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(a: np.ndarray, b: np.ndarray, *, paired: bool = False) -> float:
    """Return the squared maximum mean discrepancy of two sets, with the kernel (x.y / D + 1)^3, without bias.

    Gretton et al. 2012: eq. 3 for independent sets, and eq. 4 for pairs, which is 0 for equal sets.

    Args:
        a: (N, D) float32 features, N >= 2.
        b: (N, D) features; there must be as many as in `a`.
        paired: Whether row i of `b` depends on row i of `a`; these pairs are then left out.
    """
    count = len(a)
    inside = [_kernel(x, x) for x in (a, b)]
    within = sum(float((kernel.sum() - np.trace(kernel)) / (count * (count - 1))) for kernel in inside)
    across = _kernel(a, b)
    if not paired:
        return within - 2 * float(across.mean())
    return within - 2 * float((across.sum() - np.trace(across)) / (count * (count - 1)))


def mmd_without_groups(a: np.ndarray, b: np.ndarray, groups: int) -> list[float]:
    """Return `squared_mmd` of pairs with each group of them left out: one value per group.

    Args:
        a: (N, D) float32 features.
        b: (N, D) features.
        groups: Number of groups G; pair i belongs to group i mod G.
    """
    count, values = len(a), []
    # sums between groups of each kernel, diagonals apart: no kernel is computed twice
    order = np.argsort(np.arange(count) % groups, kind="stable")
    sizes = np.bincount(np.arange(count) % groups)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        kernel = _kernel(x[order], y[order])
        np.fill_diagonal(kernel, 0.0)
        return np.add.reduceat(np.add.reduceat(kernel, starts, 0), starts, 1)

    difference = between(a, a) + between(b, b) - 2 * between(a, b)
    for group in range(groups):
        kept = np.arange(groups) != group
        n = count - sizes[group]
        values.append(float(difference[kept][:, kept].sum() / (n * (n - 1))))
    return values


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # float32 products, as torch-fidelity; sums in float64, where KID is a small difference of large numbers
    return ((x @ y.T / x.shape[1] + 1) ** 3).astype(np.float64)


def gaussian_distance(a: np.ndarray, b: np.ndarray, groups: int) -> tuple[float, list[float]]:
    """Return CMMD (Jayasumana et al. 2024) of two sets, and the same with each group of pairs left out.

    It is 1000 times the biased squared maximum mean discrepancy, which counts each vector with itself, with the kernel
    exp(-|x - y|^2 / (2 sigma^2)), sigma = 10 (google-research/google-research, cmmd/distance.py). Computed in float64,
    because the kernel of vectors of unit length is nearly 1 everywhere. The time grows with the square of N.

    Args:
        a: (N, D) float32 features; those of CMMD have unit length.
        b: (N, D) features.
        groups: Number of groups G, at most N; pair i belongs to group i mod G.

    Returns:
        The distance, and one value for each group (empty for one group, which is all).
    """
    count = len(a)
    difference = _kernel_sums(a, a, groups) + _kernel_sums(b, b, groups) - 2 * _kernel_sums(a, b, groups)
    left_out = []
    for group in range(groups if groups > 1 else 0):
        kept = np.arange(groups) != group
        number = count - len(range(group, count, groups))
        left_out.append(float(CMMD_SCALE * difference[kept][:, kept].sum() / number**2))
    return float(CMMD_SCALE * difference.sum() / count**2), left_out


def _kernel_sums(x: np.ndarray, y: np.ndarray, groups: int) -> np.ndarray:
    """Return the sums of the Gaussian kernel minus 1 between the groups of x and those of y, (groups, groups).

    The ones cancel in a discrepancy; without them nothing is lost in rounding.
    """
    sums = np.zeros((groups, groups))
    for first in range(0, len(x), BLOCK):
        u = x[first : first + BLOCK].astype(np.float64)
        own = np.eye(groups)[np.arange(first, first + len(u)) % groups]
        for second in range(0, len(y), BLOCK):
            v = y[second : second + BLOCK].astype(np.float64)
            squares = np.square(u).sum(1)[:, None] + np.square(v).sum(1) - 2 * u @ v.T
            kernel = np.expm1(squares.clip(min=0) / (-2 * CMMD_SIGMA**2))
            sums += own.T @ kernel @ np.eye(groups)[np.arange(second, second + len(v)) % groups]
    return sums


def precision_recall(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019) with 3 neighbours, as torch-fidelity has them.

    Around each vector of a set lies the ball that reaches its third nearest neighbour in the set. Precision is the
    share of `b` within the balls of `a`, recall the share of `a` within the balls of `b`. The time grows with N x M.

    Args:
        a: (N, D) float32 features of originals.
        b: (M, D) features of what is compared with them.

    Raises:
        ValueError: If a set has no more vectors than neighbours.
    """
    if min(len(a), len(b)) <= NEIGHBOURS:
        raise ValueError(f"{NEIGHBOURS + 1} images or more are needed")
    from torch_fidelity.metric_prc import calculate_precision_recall_part  # here: importing it takes seconds

    made, originals = torch.from_numpy(b), torch.from_numpy(a)
    precision, recall = calculate_precision_recall_part(made, originals, NEIGHBOURS, BLOCK)
    return float(precision), float(recall)
