"""The training loop of latent-ae."""
