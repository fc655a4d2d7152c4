"""Two classifiers of features: multinomial logistic regression, fitted to its optimum, and nearest neighbours."""

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_STEPS = 500
GRADIENT = 1e-7
"""Largest entry of the gradient at which the optimum counts as reached."""
BLOCK = 1024
"""Number of rows classified at a time."""


def logistic_regression(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Minimise mean cross-entropy + l2 / 2 |W|^2 over weights W and a bias without penalty, by L-BFGS in float64.

    If D > N the weights are sought among combinations of the rows of x, where the optimum is (the representer theorem;
    Schoelkopf, Herbrich, Smola 2001), after a rotation that does not change the penalty.

    Args:
        x: (N, D) features.
        y: (N,) integers from 0 to classes - 1.
        classes: Number of classes.
        l2: Weight of the penalty.
        start: Where to begin, like the result. The problem is convex, so this changes the time only.

    Returns:
        (D + 1, classes) float64, the bias last: logits are x @ W[:-1] + W[-1].
    """
    x = x.double()
    if x.shape[1] <= x.shape[0]:
        return _fit(x, y, classes, l2, start)
    # x = u diag(s) v^T; rows of x are in the span of v, in which their coordinates are u diag(s)
    values, u = torch.linalg.eigh(x @ x.T)
    kept = values > values[-1] * len(x) * torch.finfo(torch.float64).eps
    s, u = values[kept].sqrt(), u[:, kept]
    v = x.T @ (u / s)
    inner = None if start is None else torch.cat([v.T @ start[:-1], start[-1:]])
    fitted = _fit(u * s, y, classes, l2, inner)
    return torch.cat([v @ fitted[:-1], fitted[-1:]])


def _fit(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None) -> Tensor:
    weights = x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MOST_STEPS,
        tolerance_grad=GRADIENT,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.addmm(weights[-1], x, weights[:-1]), y) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def nearest(x: Tensor, y: Tensor, classes: int, queries: Tensor, neighbours: tuple[int, ...]) -> dict[int, Tensor]:
    """Classify queries by the majority of their k nearest rows of x (Euclidean distance), for several k.

    Of classes with equally many rows, that of the nearest row wins; k above N counts as N.

    Args:
        x: (N, D) features.
        y: (N,) integers from 0 to classes - 1.
        classes: Number of classes.
        queries: (M, D) features.
        neighbours: The values of k.

    Returns:
        (M,) integers for each k.
    """
    winners: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    most = min(max(neighbours), len(x))
    norms = x.square().sum(1)
    for part in queries.split(BLOCK):
        distances = norms - 2 * part @ x.T  # plus the query's own norm, which is the same for all rows
        ranked = y[distances.topk(most, largest=False).indices]
        for k in neighbours:
            near = ranked[:, :k]
            votes = F.one_hot(near, classes).to(x.dtype)
            # bonuses break ties only: all of them together are less than a vote
            bonus = torch.linspace(0.5, 0, near.shape[1], dtype=x.dtype, device=x.device) / near.shape[1] ** 2
            first = torch.zeros_like(votes[:, 0]).scatter_reduce_(1, near, bonus.expand_as(near), "amax")
            winners[k].append((votes.sum(1) + first).argmax(1))
    return {k: torch.cat(parts) for k, parts in winners.items()}
