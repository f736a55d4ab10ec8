"""What would better outlines and boxes be worth in a hospital that nothing was learnt from?

    python recipes/outlines.py runs/busi data/BUSI data/BUSBRA/bus_data.csv      ten minutes of a core

Three numbers of the outline (area, width over height, irregularity: answers.describe_outline) tell malignant from benign, read
off as a doctor drew it, or as the network did: a logistic regression on BUSI's lesions, at home over the run's own folds.
And the members that see crops answer from crops around what a first look found, what was then drawn finer, and a doctor's
box. The networks' outlines are of images that they had not learnt from; one view of a picture; AUCs, changes in pairs."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ridge import BUSBRA

import heads
import metrics
import models
from answers import describe_outline, outlines_on
from data import load
from judge import locate, look_at
from report import held_out


def numbers(masks):
    """Logarithms (N, 3) of masks [(S, S) bool]; NaN where there is no outline."""
    told = [describe_outline(mask, mask.shape) for mask in masks]
    values = [list(t.values()) if t else [torch.nan] * 3 for t in told]
    return (torch.tensor(values, dtype=torch.double) + torch.tensor([0, 0, 0.01])).log()


def outlines(found, side):
    """[(S, S) bool] of the likeliest lesions."""
    return [outlines_on(found.at(i), (side, side), side)[1] for i in range(len(found.outlines))]


def cropped(model, images, rows, boxes):
    """What the members that see crops say (N, 2) of the images in `rows`, around these of all images' boxes."""
    opinions = look_at(model, images, rows, boxes, views=1).opinions[:, 0]
    return opinions[[m.config["roi"] != "none" for m in model.members]].mean(0)


def regression(x, y, labels, part):
    """Probabilities at home (N, 2), each part's by the others, and there, of measures x at home and y there."""
    x, y = (torch.where(v.isnan(), x.nanmean(0), v) for v in (x, y))
    spread, mean = torch.std_mean(x, 0)
    x, y, own = (x - mean) / spread, (y - mean) / spread, torch.zeros(len(x), 2, dtype=torch.double)
    for k in part.unique().tolist():
        own[part == k] = heads.probabilities(x[part == k], heads.fit(x[part != k], labels[part != k]))
    return own, heads.probabilities(y, heads.fit(x, labels))


def main(run, home, elsewhere, cache="runs/cache"):
    images, pairs = held_out(run, home, cache)
    side, boxes = images.pixels.shape[-1], ("first look", "finer", "doctor's")
    there = load(elsewhere, side, positive="malignant", channels=1, columns=BUSBRA, box_format="xywh", cache=cache)
    n, everyone, far, drawn = len(images), torch.arange(len(there)), [], [None] * len(images)
    p, part = torch.zeros(n, 2, dtype=torch.double), torch.zeros(n, dtype=torch.long)
    crops = {name: (torch.zeros(n, 2, dtype=torch.double), []) for name in boxes}
    for k, (model, rows) in enumerate(pairs):
        near, away = look_at(model, images, rows, views=1), look_at(model, there, everyone, views=1)
        p[rows], part[rows] = model.combine(near.opinions[:, 0]), k
        far.append((model.combine(away.opinions[:, 0]), away.found))
        for row, outline in zip(rows.tolist(), outlines(near.found, side), strict=True):
            drawn[row] = outline
        finer = torch.full((n, 4), torch.nan).index_copy(0, rows, near.boxes)
        own = zip(boxes, (locate(model, images, torch.arange(n)), finer, images.boxes), strict=True)
        others = (locate(model, there, everyone), away.boxes, there.boxes)
        for (name, here), other in zip(own, others, strict=True):
            crops[name][0][rows] = cropped(model, images, rows, here)
            crops[name][1].append(cropped(model, there, everyone, other))
    q, found = torch.stack([q for q, _ in far]).mean(0), models.average([f for _, f in far])
    doctor = [numbers(v.masks.numpy()) for v in (images, there)]
    network = [numbers(v) for v in (drawn, outlines(found, side))]
    logits = [torch.logit(v[:, 1:].clamp(1e-6, 1 - 1e-6)) for v in (p, q)]
    measures = {"the answer": logits, "the doctor's outline": doctor, "the network's outline": network}
    measures["the answer and the network's outline"] = [
        torch.cat(pair, 1) for pair in zip(logits, network, strict=True)
    ]
    lesion = doctor[0].isfinite().all(1)
    truth = (images.labels[lesion], images.groups[lesion]), (there.labels, there.groups)
    said = {name: regression(x[lesion], y, truth[0][0], part[lesion]) for name, (x, y) in measures.items()}
    tell(said, truth)
    tell(
        {f"crops, {name} box": (here[lesion], torch.stack(others).mean(0)) for name, (here, others) in crops.items()},
        truth,
    )


def tell(said, truth):
    """Print the AUCs of {name: answers at home and there}, and their changes to the first."""
    first = next(iter(said.values()))
    for name, both in said.items():
        for place, before, p, (labels, groups) in zip(("home", "there"), first, both, truth, strict=True):
            value = metrics.with_intervals(p, labels, groups)["auc"]
            change = metrics.change_with_intervals((before, 0.5, None), (p, 0.5, None), labels, groups)["auc"]
            print("{:38s} {:5s} {value:.3f} [{low:.3f}, {high:.3f}]".format(name, place, **value), end=", ")
            print("in pairs {value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**change))


if __name__ == "__main__":
    main(*sys.argv[1:])
