"""Explains a measurement of latents in plain words: what each finding is, whether it is normal, and what to do."""

from collections.abc import Iterator, Mapping
from typing import Any

from latent_ae.report.page import Finding, State

FEW_VALUES = 100_000
NOISY, VERY_NOISY = 0.1, 0.5
"""Fractions of the latents' variance that is posterior noise: more than usual, and a problem."""
UNEVEN = 4.0
"""Largest ratio of two channels' standard deviations that is fine."""
MANY_OUTLIERS = 1e-4
GAUSSIAN, SKEWED = 0.05, 0.2
"""1-Wasserstein distances: a logistic's is 0.06, a uniform's and a Laplace's 0.15, an exponential's 0.31."""
FLATTER = 0.5
"""Largest difference between the slopes of the latents' and the images' spectra that is fine."""
FOLLOWS, LOOSE = 1.0, 3.0
"""Loss of PSNR in dB from changing the latents instead of the image: none to speak of, and a usual one."""
POOR = 20.0
"""PSNR in dB below which a reconstruction hardly resembles its image."""
COLLAPSE = "Posterior collapse"
ROBUST_SIGMA, ROBUST_DB = 0.1, 3.0


def findings(result: Mapping[str, Any]) -> list[Finding]:
    """Return the findings on a result of `evaluate_latents` (without its findings)."""
    health, latents = result["health"], result["latents"]
    sentences = [*_information(health)]
    if sentences[0].name != COLLAPSE:  # the rest means nothing for latents that are noise
        sentences += [_scale(health, latents), _rank(health), _outliers(health), _shape(health)]
        sentences += [*_spectrum(health), *_transforms(health), *_noise(health)]
    if latents["count"] < FEW_VALUES or result["data"]["num_images"] < 50:
        count = result["data"]["num_images"]
        text = (
            f"{f'{count:,} images' if count != 1 else 'One image'} gave {latents['count']:,} latent values: enough for "
            "a first look; tails, covariance and rank need hundreds of images."
        )
        sentences.append(Finding("Sample", "look", text))
    return sentences


def _information(health: Mapping[str, Any]) -> Iterator[Finding]:
    channels, dead = health["channels"], health["dead_channels"]
    alive = len(channels) - len(dead)
    if "kl_nats_per_dim" not in health:
        if dead:
            text = f"{_named(dead)} constant over all images and carry no information; fewer channels would do."
            yield Finding("Dead channels", "problem", text)
        else:
            yield Finding("Dead channels", "fine", f"None of {len(channels)}: every channel varies with the image.")
        return
    per_dim, per_image = health["kl_nats_per_dim"], health["kl_nats_per_image"]
    bits = per_image / 0.6931471805599453
    size = f"{bits / 8192:,.1f} KiB" if bits >= 8192 else f"{bits / 8:,.0f} bytes"
    amount = f"{per_dim:.3g} nats per latent value, {per_image:,.0f} per image ({size} at most)"
    if not alive:
        yield Finding(
            COLLAPSE,
            "problem",
            f"In every channel the posterior ignores the image ({per_dim:.2g} nats per value): latents are noise, and "
            "nothing can be reconstructed or generated from them. Lower loss.kl, or warm it up, and train again from "
            "before the collapse.",
        )
        return
    yield Finding(
        "Information",
        "fine",
        f"{amount}. First stages for diffusion are trained with a tiny KL weight, so several nats per value are "
        "normal; near 0 would be a collapse.",
    )
    if dead:
        yield Finding(
            "Dead channels",
            "problem",
            f"{_named(dead)} dead: under 1 % of the variance there depends on the image, and a diffusion model "
            f"would spend capacity on noise. Lower loss.kl, or train with model.latent_channels={alive}.",
        )
    else:
        yield Finding("Dead channels", "fine", f"None of {len(channels)}: every channel depends on the image.")
    share = health["noise_share"]
    spread = health["posterior_std"]
    text = f"The posterior's standard deviation is {spread:.3g}; its variance is {100 * share:.2f} % of the latents'. "
    if share < NOISY:
        yield Finding("Posterior noise", "fine", text + "Samples and means are nearly the same, as is usual.")
    else:
        state: State = "look" if share < VERY_NOISY else "problem"
        text += "That is more than usual: samples differ visibly from means. "
        yield Finding("Posterior noise", state, text + "Intended by a strong KL term; otherwise lower loss.kl.")


def _scale(health: Mapping[str, Any], latents: Mapping[str, Any]) -> Finding:
    stds = [row["std"] for row in health["channels"]]
    text = (
        f"Overall mean {latents['mean']:.3g} and standard deviation {latents['std']:.3g}: scaling_factor "
        f"{latents['scaling_factor']:.4g}, shift_factor {latents['shift_factor']:.3g}."
    )
    if len(stds) == 1:
        return Finding("Scale", "fine", text)
    ratio = max(stds) / min(stds) if min(stds) > 0 else float("inf")
    text += " The widest channel spreads "
    text += f"{ratio:.3g} times as far as the narrowest" if ratio < float("inf") else "far, and another not at all"
    if ratio <= UNEVEN:
        return Finding("Scale", "fine", text + ", so one factor for all serves well.")
    text += (
        ". With one factor for all, the narrow ones are below a diffusion model's noise most of the time; latents_mean "
        "and latents_std scale each channel separately (latent-ae export --latents-mean-std, or your own loader)."
    )
    return Finding("Scale", "look", text)


def _rank(health: Mapping[str, Any]) -> Finding:
    rank, size = health["effective_rank"], len(health["channels"])
    text = f"The channels' variance lies in {rank:.2f} of {size} independent directions (entropy of their covariance)"
    if rank > 0.5 * size:
        return Finding("Effective rank", "fine", text + ". That is more than half of what it could be.")
    text += ", less than half of what it could be: channels repeat one another, or a few carry most of the variance. "
    return Finding("Effective rank", "look", text + "Fewer latent channels might do as well.")


def _outliers(health: Mapping[str, Any]) -> Finding:
    worst = max(health["channels"], key=lambda row: row["outliers"])
    text = (
        f"{_one_in(health['outliers'])} more than five standard deviations from the mean of all values (of a Gaussian "
        f"one in 1,744,278); the farthest lies {health['farthest_stds']:.1f} of them away. "
    )
    if worst["outliers"] <= MANY_OUTLIERS:
        return Finding("Outliers", "fine", text + "Nothing to do.")
    text += (
        f"By its channel's own mean and standard deviation, {_one_in(worst['outliers']).lower()} so far off in channel "
        f"{worst['channel']}, the most of all channels. Rare large values are hard for a diffusion model and for half "
        "precision: look for flat or unusual images among the data, and train longer."
    )
    return Finding("Outliers", "look", text)


def _one_in(share: float) -> str:
    return f"One value in {1 / share:,.0f} lies" if share else "No value lies"


def _shape(health: Mapping[str, Any]) -> Finding:
    distance = health["wasserstein_1"]
    known = [row for row in health["channels"] if row["wasserstein_1"] is not None]
    if distance is None or not known:
        return Finding("Distance from a Gaussian", "problem", "All values are equal: there is no distribution.")
    worst = max(known, key=lambda row: row["wasserstein_1"])
    text = (
        f"The values' 1-Wasserstein distance from a Gaussian of their mean and spread is {distance:.3f} of that "
        f"spread over all channels together, and {worst['wasserstein_1']:.3f} at most, in channel {worst['channel']} "
        "(a uniform's or a Laplace's is 0.15). Scaled, the channels' mean and covariance are "
        f"{health['frechet_to_normal']:.3g} from N(0, I) (Fréchet). "
    )
    if worst["wasserstein_1"] <= GAUSSIAN:
        return Finding("Distance from a Gaussian", "fine", text + "Close to Gaussian.")
    if worst["wasserstein_1"] <= SKEWED:
        text += "Not Gaussian, as is usual: each posterior may be, their mixture over images is not. Nothing to do."
        return Finding("Distance from a Gaussian", "fine", text)
    text += "Far from it, by separate peaks or heavy tails, which a diffusion model needs more capacity for."
    return Finding("Distance from a Gaussian", "look", text)


def _spectrum(health: Mapping[str, Any]) -> Iterator[Finding]:
    latents, images = health["spectrum"]["latents"], health["spectrum"]["images"]
    if latents["slope"] is None or images["slope"] is None:
        yield Finding("Spectrum", "look", "The latents' grid is too small for a spectrum; use a larger crop_px.")
        return
    text = (
        f"Power goes as the frequency to the power {latents['slope']:.2f} in latents and {images['slope']:.2f} in "
        f"images; {100 * latents['high_share']:.1f} % and {100 * images['high_share']:.1f} % of it lie in the upper "
        "half of the frequencies (of white noise 75 %). "
    )
    if latents["slope"] <= images["slope"] + FLATTER:
        yield Finding("Spectrum", "fine", text + "Latents are as smooth as images, which diffusion models learn well.")
    else:
        yield Finding(
            "Spectrum",
            "look",
            text + "Latents are rougher than images, as is common: much fine detail is packed into single values. A "
            "diffusion model finds that harder; fewer latent channels, or a regulariser of scale equivariance, make "
            "them smoother.",
        )


def _transforms(health: Mapping[str, Any]) -> Iterator[Finding]:
    known = [row for row in health.get("transforms", ()) if None not in row.values()]
    if not known:
        return
    gaps = {row["transform"]: row["psnr_in_images"] - row["psnr_in_latents"] for row in known}
    losses = "; ".join(
        f"{row['transform']}: {row['psnr_in_latents']:.1f} dB, against {row['psnr_in_images']:.1f} dB" for row in known
    )
    text = f"Decoding changed latents, against reconstructing changed images: {losses}. "
    worst = max(gaps.values())
    if min(row["psnr_in_images"] for row in known) < POOR:
        text += "With reconstructions that poor this says nothing about the latents: improve those first."
        yield Finding("Scaling and rotating", "look", text)
    elif worst < FOLLOWS:
        yield Finding("Scaling and rotating", "fine", text + "Latents follow the image.")
    else:
        state: State = "fine" if worst < LOOSE else "look"
        text += f"The largest loss is {worst:.1f} dB. " + (
            "That is small for a first stage that was not trained for it."
            if state == "fine"
            else "That is common; with a regulariser of equivariance (EQ-VAE) diffusion models train faster."
        )
        yield Finding("Scaling and rotating", state, text)


def _noise(health: Mapping[str, Any]) -> Iterator[Finding]:
    rows = {row["sigma"]: row["psnr"] for row in health.get("noise", ()) if row["psnr"] is not None}
    if 0.0 not in rows or ROBUST_SIGMA not in rows:
        return
    loss = max(0.0, rows[0.0] - rows[ROBUST_SIGMA])
    text = (
        f"Noise of a tenth of the latents' standard deviation costs {loss:.1f} dB of {rows[0.0]:.1f} dB. A diffusion "
        "model's latents are never exact, and this is what its errors cost. "
    )
    if loss <= ROBUST_DB:
        yield Finding("Noise on latents", "fine", text + "The decoder is robust to it.")
    else:
        cure = "The decoder depends on exact values: a larger loss.kl or latent noise in training makes it more robust."
        yield Finding("Noise on latents", "look", text + cure)


def _named(channels: list[int]) -> str:
    names = ", ".join(map(str, channels[:20])) + (" ..." if len(channels) > 20 else "")
    return f"Channel {names} is" if len(channels) == 1 else f"Channels {names} are"
