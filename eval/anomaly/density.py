"""A density of normal images: a mixture of Gaussians on features of the latent and of the reconstruction."""

from typing import Any

import numpy as np

from latent_ae.config import UserError

COMPONENTS = 32
"""Largest number of principal components of the latents."""
IMAGES_PER_COMPONENT = 8
"""Fewest images for each of them."""
REGULARISATION = 1e-3
"""Added to the variances of the standardised features."""
RESTARTS = 3
LARGEST = 1e6
"""Largest standardised feature, which also replaces features that are not finite."""


class Mixture:
    """Minus the log-density of images under a mixture of Gaussians, which is fitted to normal images afterwards.

    The features are principal components of the flattened latents and the two of `reconstruction_features`, each
    centred and scaled to a deviation of 1. DAGMM trains mixture and autoencoder together, as the settings `density` of
    the training do; here the autoencoder is what it is.

    Args:
        components: Number of Gaussians, each with a full covariance.
        seed: Seed of the fit.

    Raises:
        UserError: If scikit-learn is not installed.
    """

    def __init__(self, components: int, seed: int):
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            advice = "pip install '.[anomaly]' in the checkout"
            raise UserError(f"mixture: scikit-learn is not installed: {advice}") from error
        self.components = components
        self.model: Any = GaussianMixture(
            components, covariance_type="full", reg_covar=REGULARISATION, n_init=RESTARTS, random_state=seed
        )

    def fit(self, latents: np.ndarray, errors: np.ndarray) -> None:
        """Fit principal components, scales and mixture.

        Args:
            latents: (N, D) flattened latents of normal images.
            errors: (N, 2) of `reconstruction_features`.

        Raises:
            UserError: If there are too few images, or the model gives values that are not finite.
        """
        needed = 2 * self.components
        if len(latents) < needed:
            raise UserError(
                f"mixture: {self.components} Gaussians need {needed} normal images to fit, and there are "
                f"{len(latents)}: give more, or fewer Gaussians"
            )
        if not (np.isfinite(latents).all() and np.isfinite(errors).all()):
            raise UserError(
                "mixture: the model gives values that are not finite for normal images, to which no density can be "
                "fitted; mixture=0 leaves this score out"
            )
        self.mean = latents.mean(0)
        count = max(1, min(COMPONENTS, len(latents) // IMAGES_PER_COMPONENT, latents.shape[1]))
        _, _, directions = np.linalg.svd(latents - self.mean, full_matrices=False)
        self.directions = directions[:count]
        features = self._features(latents, errors)
        self.centre, scale = features.mean(0), features.std(0)
        self.scale = np.where(scale > 0, scale, 1.0)
        self.model.fit((features - self.centre) / self.scale)

    def energies(self, latents: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Return minus the log-density in nats, (N,), of latents, (N, D), and features of reconstructions, (N, 2)."""
        with np.errstate(invalid="ignore"):  # a model may give values that are not finite
            features = (self._features(latents, errors) - self.centre) / self.scale
        features = np.nan_to_num(features, nan=LARGEST).clip(-LARGEST, LARGEST)
        energies: np.ndarray = -self.model.score_samples(features)
        return energies

    def _features(self, latents: np.ndarray, errors: np.ndarray) -> np.ndarray:
        return np.concatenate([(latents - self.mean) @ self.directions.T, errors], 1)
