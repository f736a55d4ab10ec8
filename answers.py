"""Answers: from what the networks say of a picture to what a person reads: words, reasons to refer, lesions, a table.

    print(sentence(predicted, info))                        # predicted: a dict of infer.py, info: the model's
    write_answers("answers.csv", [predicted])

What is near the threshold, where members and views disagree, and what the model can't judge is to be referred to a
radiologist, and says why. A class is never given without its probability."""

import csv
import io
import math

import numpy as np
import torch.nn.functional as F
from PIL import Image

from files import write_atomically
from pictures import box_of, fit, original_box
from readers import one_line

KEYS = (
    "image", "prediction", "probability", "confidence", "probabilities", "uncertainty", "box", "refer", "reason", "error",
    "lesion_score", "boxes", "outline", "window", "frame", "clip",
)  # fmt: skip
DIGITS = 12  # of a probability in JSON and CSV: with fewer, large logits would all be 1.0 there
REFER_ODDS = 2.0  # refer when the odds lie within this factor of the threshold's
REFER_UNCERTAINTY = 0.15  # or when the opinions' standard deviation is above this
LEAST_SIDE, MOST_ASPECT = 16, 8  # or when the picture has fewer pixels on a side, or is longer in shares of its width
LEAST_SPREAD, MOST_COLOUR = 1.0, 16  # or its greys spread less, or its colours differ more, in levels of 255
MOST_STRANGE = 1.05  # or it is so much farther from those of training than 99 % of the validation images are
MOST_SIGMA = 5  # or when a patient's number is so many standard deviations from the mean of training


def answer(probabilities, uncertainty, info, reasons=()):
    """One image's K probabilities and uncertainty in words: the dict's part that needs no picture. reasons: why to refer
    that are known already. What is not finite is an error, and is referred."""
    classes, p, reasons = info["classes"], probabilities[-1], list(reasons)
    if not np.isfinite([*probabilities, uncertainty]).all():
        why = "the network's answer is not a finite number"
        return {"refer": True, "reason": why, "error": f"{why}: the model is damaged, or its patient data are extreme"}
    if len(classes) == 2:
        predicted = int(p >= info["threshold"])
        near = abs(log_odds(p) - log_odds(info["threshold"])) < math.log(REFER_ODDS)
    else:
        predicted = int(np.argmax(probabilities))
        best, second = sorted(probabilities)[:-3:-1]
        near = best < REFER_ODDS * second
    if near:
        reasons.append("the probability is near the threshold" if len(classes) == 2 else "two classes are near")
    if uncertainty > REFER_UNCERTAINTY:
        reasons.append("its views or members differ")
    return {
        "prediction": classes[predicted],
        "probability": round(p if len(classes) == 2 else probabilities[predicted], DIGITS),
        "confidence": round(probabilities[predicted], DIGITS),
        "probabilities": {c: round(v, DIGITS) for c, v in zip(classes, probabilities, strict=True)},
        "uncertainty": round(uncertainty, 6),
        "refer": bool(reasons),
        "reason": "; ".join(reasons) or None,
    }


def log_odds(p):
    p = min(max(p, 1e-12), 1 - 1e-12)
    return math.log(p / (1 - p))


def oddities(picture, channels):
    """Why a picture (PIL, RGB) is none that a model of so many channels can judge: a list of reasons, mostly empty."""
    short, long = sorted(picture.size)
    values = np.stack(picture.reduce(max(1, long // 256)).split()).astype(
        np.float32
    )  # (3, h, w): over a last axis of 3 is slow
    checks = {
        f"it has only {picture.width} x {picture.height} pixels": short < LEAST_SIDE,
        f"it is {long / short:.0f} times as long as wide": long > MOST_ASPECT * short,
        "it is blank": values.mean(0).std() < LEAST_SPREAD,
        "it is in colour, and the model has learnt from grey pictures": (
            channels == 1 and np.ptp(values, axis=0).mean() > MOST_COLOUR
        ),
    }
    return [reason for reason, found in checks.items() if found]


def unlike(strangeness, info):
    """The reason to refer a picture that is so far from those of training, see Ensemble.strangeness: a list, mostly empty."""
    what = "it, or its patient's data, is" if info["meta_spec"] else "it is"
    return [f"{what} unlike the pictures that the model has learnt from"] if strangeness > MOST_STRANGE else []


def in_pixels(box, opened, side):
    """A box (4,) in [0, 1] of the square of `side` pixels, in a picture's own; opened: see BreastCancerDetector._open."""
    return [round(v, 1) for v in original_box(box.tolist(), opened["placement"], side, opened["origin"])]


def describe_lesions(found, opened, info, masks):
    """What there is to say of the lesions of one picture: the dict's keys box, boxes, lesion_score, outline, and with
    masks the key mask. found: models.Found of it alone; opened: see BreastCancerDetector._open."""
    score, side = float(found.scores()), info["load_size"]
    told, sure = {"lesion_score": round(score, 6), "boxes": []}, score >= info["lesion_threshold"]
    about = opened["origin"]
    whole, likeliest = outlines_on(found, about.size, side)
    if sure:
        lesions = [found.boxes()[0], *found.lesions(info["lesion_threshold"])[1:]]
        told["boxes"] = [in_pixels(box, opened, side) for box in lesions]
        told |= {"box": told["boxes"][0], "outline": describe_outline(likeliest, about.size)}
    if masks:
        frame = Image.new("1", about.whole)
        frame.paste(Image.fromarray(whole & sure).resize(about.size), about.corner)
        told["mask"] = np.asarray(frame)
    return told


def outlines_on(found, size, side):
    """What is lesion in a picture of `size` (w, h), bool (h, w), as large as it lies in the square of `side` pixels,
    without the bars: all lesions, and the likeliest alone. The edge is where the
    outline falls to a half, or to half of its largest, if that is less than a half: what was found is drawn."""
    left, top, w, h = fit(size, side)
    part = np.s_[top : top + h, left : left + w]
    near = F.max_pool2d(found.likeliest()[:, None].float(), 3, 1, 1)  # its own cells and those around
    smooth = F.interpolate(found.outlines[:, None], size=(side, side), mode="bilinear")[0, 0]
    most = float(smooth.max())  # of what is drawn: a small lesion's 0.52 is less between the cells
    smooth, near = smooth >= (0.5 if most > 0.5 else most / 2), F.interpolate(near, size=(side, side))[0, 0] > 0
    return smooth[part].cpu().numpy(), (smooth & near)[part].cpu().numpy()


def describe_outline(mask, picture):
    """What a radiologist reads off an outline (h, w), or None for an empty one: its area as a share of the picture's, its
    width over its height (below 1 it is taller than wide), and how irregular it is: 1 - IoU with the ellipse that has
    its second moments."""
    y, x = np.nonzero(mask)
    if len(x) < 4:
        return None
    points = np.stack([x, y]).astype(float)
    grid = np.indices(mask.shape)[::-1].reshape(2, -1) - points.mean(1, keepdims=True)
    spread = np.linalg.inv(np.cov(points) + 0.1 * np.eye(2))  # 0.1: pixels are squares, not points
    ellipse = ((spread @ grid) * grid).sum(0).reshape(mask.shape) <= 4  # a filled ellipse's axes: two deviations
    box = box_of(mask) * np.tile([picture[0] / mask.shape[1], picture[1] / mask.shape[0]], 2)
    return {
        "area": round(float(mask.mean()), 4),
        "width_over_height": round(float((box[2] - box[0]) / (box[3] - box[1])), 3),
        "irregularity": round(float(1 - (mask & ellipse).sum() / (mask | ellipse).sum()), 3),
    }


def sentence(result, info):
    """One line for a person."""
    image = one_line(str(result["image"]))
    if result["error"]:
        return f"{image}: error: {result['error']}"
    box = f", box {' '.join(f'{v:.0f}' for v in result['box'])}" if result["box"] else ""
    refer = f"  -> refer to a radiologist: {result['reason']}" if result["refer"] else ""
    seen = ", black is {:g} and white {:g}".format(*result["window"]) if result.get("window") else ""
    if clip := result.get("clip"):
        seen += ", frames {} to {} of {}, best {}".format(*clip["stretch"], clip["frames"], result["frame"])
    return f"{image}: {', '.join(verdict(result, info))}, uncertainty {result['uncertainty']:.3f}{box}{seen}{refer}"


def verdict(result, info):
    """As in ["malignant, p(malignant) = 0.705", "at or above the threshold 0.662"]."""
    if len(info["classes"]) > 2:
        return [f"{result['prediction']}, p({result['prediction']}) = {result['probability']:.3f}"]
    positive, p, threshold = info["classes"][1], result["probability"], info["threshold"]
    side = "at or above" if result["prediction"] == positive else "below"
    digits = 3 if f"{p:.3f}" != f"{threshold:.3f}" else 6
    said = f"{result['prediction']}, p({positive}) = {p:.{digits}f}"
    return [said, f"{side} the threshold {threshold:.{digits}f}"]


def write_answers(path, results):
    """The answers as a CSV, the box as four columns, the outline as three, the window and a clip's stretch as two."""
    told = [k for k in KEYS if k not in ("probabilities", "box", "boxes", "outline", "window", "clip")]
    corners, shape = ["x_min", "y_min", "x_max", "y_max"], ["area", "width_over_height", "irregularity"]
    lines = [[*told, *corners, *shape, "black", "white", "first", "last"]]
    for r in results:
        outline, pair = r["outline"] or {}, [None] * 2
        stretch_seen = r["clip"]["stretch"] if r["clip"] else pair
        numbers = [*(r["box"] or pair * 2), *(outline.get(k) for k in shape), *(r["window"] or pair), *stretch_seen]
        lines.append([r[k] for k in told] + numbers)
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))  # names as their bytes are
