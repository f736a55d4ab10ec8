"""How far do three numbers of the outline (area, width over height, irregularity: answers.describe_outline) tell malignant
from benign in a hospital that nothing was learnt from: read off as a doctor drew it, and as the network did?

    python recipes/outlines.py runs/busi data/BUSI data/BUSBRA/bus_data.csv      four minutes of a core

A logistic regression on BUSI's lesions, at home over the run's own folds; the network's outlines are of images that it
had not learnt from, and of a picture's one view."""

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
from judge import look_at
from report import held_out


def numbers(masks):
    """Their logarithms (N, 3), of masks [(S, S) bool]; NaN where there is no outline."""
    told = [describe_outline(mask, mask.shape) for mask in masks]
    values = [list(t.values()) if t else [torch.nan] * 3 for t in told]
    return (torch.tensor(values, dtype=torch.double) + torch.tensor([0, 0, 0.01])).log()


def main(run, home, elsewhere, cache="runs/cache"):
    images, pairs = held_out(run, home, cache)
    side = images.pixels.shape[-1]
    there = load(elsewhere, side, positive="malignant", channels=1, columns=BUSBRA, box_format="xywh", cache=cache)
    p, fold = torch.zeros(len(images), dtype=torch.double), torch.zeros(len(images), dtype=torch.long)
    drawn, far = [None] * len(images), []
    for k, (model, rows) in enumerate(pairs):
        answer = look_at(model, images, rows, views=1)
        p[rows], fold[rows] = model.combine(answer.opinions[:, 0])[:, 1], k
        for i, row in enumerate(rows.tolist()):
            drawn[row] = outlines_on(answer.found.at(i), (side, side), side)[1]
        far.append(look_at(model, there, torch.arange(len(there)), views=1))
    q = torch.stack([m.combine(a.opinions[:, 0])[:, 1] for (m, _), a in zip(pairs, far, strict=True)]).mean(0)
    found = models.average([a.found for a in far])
    seen = [outlines_on(found.at(i), (side, side), side)[1] for i in range(len(there))]
    doctor = numbers(images.masks.numpy()), numbers(there.masks.numpy())
    network = numbers(drawn), numbers(seen)
    logits = [torch.logit(v.clamp(1e-6, 1 - 1e-6))[:, None] for v in (p, q)]
    lesion, first = doctor[0].isfinite().all(1), None
    for what, (x, y) in {
        "the network's answer": logits,
        "the doctor's outline": doctor,
        "the network's outline": network,
        "the network's answer and its outline": [torch.cat(pair, 1) for pair in zip(logits, network, strict=True)],
    }.items():
        x, labels, part = x[lesion], images.labels[lesion], fold[lesion]
        x, y = (torch.where(v.isfinite(), v, x.nanmean(0)) for v in (x, y))  # no outline: as an average one
        spread, mean = torch.std_mean(x, 0)
        x, y, own = (x - mean) / spread, (y - mean) / spread, torch.zeros(len(x), 2, dtype=torch.double)
        for k in part.unique().tolist():
            own[part == k] = heads.probabilities(x[part == k], heads.fit(x[part != k], labels[part != k]))
        both = {"home": (own, labels, images.groups[lesion])}
        both["there"] = heads.probabilities(y, heads.fit(x, labels)), there.labels, there.groups
        first = first or both
        for place, (answers, *truth) in both.items():
            value = metrics.with_intervals(answers, *truth)["auc"]
            change = metrics.change_with_intervals((first[place][0], 0.5, None), (answers, 0.5, None), *truth)["auc"]
            print("{:38s} {:5s} AUC {value:.3f} [{low:.3f}, {high:.3f}]".format(what, place, **value), end=", ")
            print("in pairs {value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**change))


if __name__ == "__main__":
    main(*sys.argv[1:])
