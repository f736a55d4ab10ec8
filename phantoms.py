"""Synthetic breast ultrasound: a data set that is always there, of lesions whose class shows in the signs that
radiologists go by, with masks.

    from phantoms import phantoms
    pixels, labels, masks = phantoms(n=64, size=128, seed=0)  # uint8 (64, 1, 128, 128), 0 or 1, bool (64, 128, 128)
    print(f"{labels.float().mean():.0%} malignant, the lesions cover {masks.float().mean():.0%} of the pictures")

The same n, size and seed give the same pictures; another size gives others."""

import math
from functools import partial

import torch
import torch.nn.functional as F


def phantoms(n=800, size=128, seed=0):
    """n phantoms: pixels uint8 (n, 1, size, size), labels int64 (n,), 40 % malignant (1), and the lesions' masks bool
    (n, size, size). n and size are at least 1, else ValueError.

    Layers (skin, fat, glandular tissue, muscle), acoustic shadows and fat lobules that mean nothing, and one lesion
    whose signs follow the BI-RADS lexicon (ACR 2013), each drawn by itself and overlapping between the classes:

        sign          benign                       malignant
        shape         oval                         irregular
        margin        smooth                       lobulated, spiculated, with a blurred edge
        orientation   wider than tall              taller than wide
        posterior     enhancement                  shadow

    Speckle is the magnitude of a complex Gaussian field seen through the beam (Wagner et al. 1983), log-compressed.
    Where the lesion lies, its size, its darkness and the gain say nothing, so a linear model on the pixels is lost."""
    if n < 1 or size < 1:
        raise ValueError(f"{n} phantoms of {size} pixels: give at least 1 of each")
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 5 < 2).long()[torch.randperm(n, generator=generator)]
    parts = [phantom_batch(chunk, size, generator) for chunk in labels.split(64)]
    pixels, masks = (torch.cat(p) for p in zip(*parts, strict=True))
    return pixels, labels, masks


def phantom_batch(labels, size, generator):
    """The phantoms of one batch of labels: pixels uint8 (N, 1, S, S), masks bool (N, S, S)."""
    uniform, sign = partial(draw_uniform, len(labels), generator), partial(draw_sign, labels, generator)
    axis = (torch.arange(size) + 0.5) / size
    y, x = axis[None, :, None], axis[None, None, :]
    echo = draw_tissue(y, x, uniform)
    echo, mask = draw_lesion(echo, y, x, uniform, sign)
    level = echo + draw_speckle(len(labels), size, y, generator)
    level = level - 0.5 * level.mean(2, keepdim=True)  # time-gain compensation: the scanner evens out the depths ...
    level = level - uniform(-6, 10) * (y - 0.5) + uniform(-7, 3)  # ... and the operator turns the knobs
    return (((level + 30) / 48).clamp(0, 1) * 255).round().to(torch.uint8)[:, None], mask


def draw_uniform(n, generator, low, high):
    """Uniform numbers (n, 1, 1), one an image."""
    return low + (high - low) * torch.rand(n, 1, 1, generator=generator)


def draw_sign(labels, generator, benign, malignant, spread):
    """A BI-RADS sign (N, 1, 1): its mean depends on the class, and the classes overlap."""
    mean = torch.where(labels == 1, malignant, benign)[:, None, None]
    return mean + spread * torch.randn(len(labels), 1, 1, generator=generator)


def draw_tissue(y, x, uniform):
    """Echo strength (N, S, S) of the tissue, in dB: wavy layers from the skin down to the muscle, shadows, lobules.
    y, x: the pixels' places in [0, 1]."""
    wave = sum(
        a * torch.sin(2 * math.pi * f * x + p)
        for a, f, p in (
            (uniform(0, 0.03), uniform(0.3, 1), uniform(0, 6.3)),
            (uniform(0, 0.015), uniform(1, 3), uniform(0, 6.3)),
        )
    )
    fat, muscle = uniform(0.12, 0.35) + wave, uniform(0.7, 0.95) + wave
    streaks = torch.sin(2 * math.pi * (uniform(4, 9) * (y + wave) + uniform(0, 1))) * uniform(0.5, 3)
    echo = torch.where(y > fat, uniform(-4, 1) + streaks, -9.0)
    echo = torch.where(y > muscle, uniform(-10, -5) + 3 * torch.sin(2 * math.pi * 20 * (y + wave)), echo)
    echo = torch.where(y < uniform(0.02, 0.05), 4.0, echo)
    for _ in range(3):  # fat lobules: dark and oval like a lesion, faint
        across = ((x - uniform(0, 1)) / uniform(0.05, 0.15)) ** 2
        distance = across + ((y - uniform(0.1, 0.9)) / uniform(0.03, 0.08)) ** 2
        echo = echo - uniform(0, 5) * torch.sigmoid(6 * (1 - distance))
    for _ in range(4):  # shadows of ligaments and ribs: dark stripes that mean nothing
        stripe = torch.sigmoid((uniform(0.01, 0.06) - (x - uniform(0, 1) - uniform(-0.2, 0.2) * y).abs()) * 80)
        stripe = stripe * torch.sigmoid((y - uniform(0.05, 0.7)) * 30)
        echo = echo - uniform(-6, 10) * stripe
    return echo


def draw_lesion(echo, y, x, uniform, sign):
    """The tissue with a lesion in it, and with what the lesion does to the sound: (echo (N, S, S), mask (N, S, S))."""
    # A closed curve r(angle) around its centre.
    area = uniform(0.09, 0.19)
    aspect = torch.exp(sign(0.36, -0.14, 0.17)).clamp(0.45, 2.5)  # width over height
    rx, ry = area * aspect.sqrt(), area / aspect.sqrt()
    cx, cy = uniform(0.15, 0.85), uniform(0.22, 0.75)
    tilt = uniform(-0.25, 0.25)
    dx, dy = (x - cx) * tilt.cos() + (y - cy) * tilt.sin(), (y - cy) * tilt.cos() - (x - cx) * tilt.sin()
    angle = torch.atan2(dy / ry, dx / rx)
    lobes, spicules = sign(0.03, 0.09, 0.025).clamp(min=0), sign(0.01, 0.11, 0.035).clamp(min=0)
    edge = 1 + lobes * sum(torch.sin(k * angle + uniform(0, 6.3)) for k in (2, 3, 4)) / 1.5
    edge = edge + spicules * torch.sin(torch.round(uniform(7, 12)) * angle + uniform(0, 6.3)).clamp(min=0)
    radius = torch.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    mask = radius < edge
    softness = sign(0.03, 0.13, 0.03).clamp(0.01, 0.3)  # an indistinct margin
    inside = torch.sigmoid((edge - radius) / softness)
    echo = torch.lerp(echo, uniform(-20, -12) + 0 * echo, inside)

    # What the sound that crossed the lesion does behind it: the sum over the path gives the shape of the shadow.
    path = (mask.float().cumsum(1) / y.shape[1] / (2 * ry)).clamp(max=1.2)
    behind = path * torch.sigmoid((y - cy) * 20) * (~mask)
    return echo + sign(1.5, -3.0, 2.5) * behind, mask


def draw_speckle(n, size, y, generator):
    """Speckle (n, S, S) in dB, seen through a beam that is wider than its pulse is long, and widens with depth."""
    field, beam = torch.randn(n, 2, size, size, generator=generator), size / 128
    narrow = blur_anisotropic(field, 0.6 * beam, 0.9 * beam)
    wide = blur_anisotropic(field, 0.7 * beam, 1.8 * beam)
    return 10 * torch.log10(torch.lerp(narrow, wide, y[:, None]).square().sum(1) + 1e-3)


def blur_anisotropic(field, sigma_y, sigma_x):
    """Blur (N, C, H, W) by one Gaussian, then scale it back to unit variance."""
    for sigma, dim in ((sigma_y, 2), (sigma_x, 3)):
        t = torch.arange(-6, 7)
        kernel = torch.exp(-(t**2) / (2 * sigma**2))
        kernel = (kernel / kernel.norm()).reshape(1, 1, *((-1, 1) if dim == 2 else (1, -1)))
        pad = (0, 0, 6, 6) if dim == 2 else (6, 6, 0, 0)
        n, c, h, w = field.shape
        field = F.conv2d(F.pad(field.reshape(n * c, 1, h, w), pad, mode="replicate"), kernel).reshape(n, c, h, w)
    return field
