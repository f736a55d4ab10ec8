"""Clips: what the answers to many frames come to, and how they are shown. Knows no network: the answers are handed in.

    said = summary(answers, threshold=0.3)                # answers: dicts of infer.py, of the frames that were looked at
    print(said["first"], said["best"], said["last"])      # places among them

A lesion stays in sight for a while, an artefact flickers: so the probabilities are averaged over neighbours in time before
the largest is looked for. The threshold was set for single pictures; the largest of many passes it more often, also where
nothing is. How much more often is not known, as there were no clips to measure it on."""

import io

import numpy as np
from PIL import Image

import plots
from files import write_atomically
from models import DISCLAIMER

SMOOTH = 5  # frames that were looked at, over which probabilities are averaged
NEAR_ODDS = 2.0  # to the stretch belong frames whose odds lie within this factor of the largest
MOST_DRAWN = 300  # frames of the animation
SECONDS = 0.1  # from one frame to the next, where the file does not say


def smooth(values):
    """(T, ...) averaged over SMOOTH neighbours in time, over those that there are at the ends."""
    values, reach = np.asarray(values, float), SMOOTH // 2
    return np.stack([values[max(0, t - reach) : t + reach + 1].mean(0) for t in range(len(values))])


def summary(answers, threshold=None):
    """Of the answers to T frames in a row: "probabilities" (K,) and "uncertainty", smoothed, where the suspicion is
    largest; the places "first" and "last" of the stretch around it; and "best", of the frame in there that shows it best.

    The suspicion is the probability of the last of two classes (the positive one), of more classes that of the one that
    becomes the surest. The stretch is as long as the smoothed suspicion stays at the threshold (of two classes) or above,
    or its odds within NEAR_ODDS of the largest."""
    alone = np.array([list(a["probabilities"].values()) for a in answers])
    smoothed = smooth(alone)
    k = 1 if alone.shape[1] == 2 else int(smoothed.max(0).argmax())
    peak = int(smoothed[:, k].argmax())
    odds = smoothed[:, k] / (1 - smoothed[:, k]).clip(1e-12)
    level = odds[peak] / NEAR_ODDS
    if threshold is not None and alone.shape[1] == 2:
        level = min(level, threshold / max(1 - threshold, 1e-12))
    below = np.flatnonzero(odds < level)
    first, last = below[below < peak].max(initial=-1) + 1, below[below > peak].min(initial=len(odds)) - 1
    best = first + alone[first : last + 1, k].argmax()
    said = {"first": int(first), "last": int(last), "best": int(best), "probabilities": smoothed[peak].tolist()}
    return said | {"uncertainty": float(smooth([a["uncertainty"] for a in answers])[peak])}


def panel(picture, answer, caption):
    """One frame of the animation: at most 480 px, with 256 colours."""
    sheet = plots.overlay(picture, answer["box"], f"{caption}\n{DISCLAIMER}")
    sheet.thumbnail((480, 480))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def save_gif(panels, path, seconds):
    """Write panels as an animation of so many seconds a frame, over and over."""
    buffer, (first, *others) = io.BytesIO(), panels
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=max(20, round(1000 * seconds)), loop=0)
    write_atomically(path, buffer.getvalue())
