"""Alignment of latents to the features of a vision model (VA-VAE, Yao et al. 2025)."""

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(
    projected: Tensor, features: Tensor, cosine_margin: float, distance_margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """VA-VAE's marginal cosine and marginal distance matrix terms (Yao et al. 2025, eq. 2 and 3); and the mean cosine.

    Of projected latents and a vision model's features, both N x C x h x w. Cosine: the mean over samples and positions
    of relu(1 - margin - cos(z, f)). Distance: the mean over samples and pairs of positions i, j of
    relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).
    """
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (projected, features))
    cosines = (z * f).sum(1)
    distances = (z.mT @ z - f.mT @ f).abs()
    cosine = F.relu(1.0 - cosine_margin - cosines).mean()
    return cosine, F.relu(distances - distance_margin).mean(), cosines.detach().mean()
