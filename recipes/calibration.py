"""Calibration in a hospital that a model has not seen, before any of its labels and after 60 of them.

    python recipes/calibration.py runs/busi data/BUSBRA/bus_data.csv      three minutes of a core

30 draws of 60 images of random patients: last layers and temperature are learnt from them as `al_loop.py learn --from` does,
or the temperature alone, and judged on the images of all other patients; one view of a picture."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ridge import BUSBRA

import metrics
import models
import transfer
from data import load
from grouping import partition
from judge import look_at

LABELS, DRAWS = 60, 30


def tempered(votes, opinions, labels):
    """An Ensemble without networks whose temperature is set by these opinions (M, N, K)."""
    model = models.Ensemble([], votes, classes=["benign", "malignant"])
    model.info["temperature"] = metrics.fit_temperature(model.combine(opinions), labels)
    return model


def main(run, elsewhere, cache="runs/cache"):
    model = models.load(run)
    how = {"positive": "malignant", "channels": 1, "cache": cache, "columns": BUSBRA, "box_format": "xywh"}
    images, old, votes = (
        load(elsewhere, model.info["load_size"], **how),
        transfer.heads_of(model),
        model.weights.tolist(),
    )
    seen = look_at(model, images, torch.arange(len(images)), views=1, keep=True)
    opinions, labels, groups, found = seen.opinions[:, 0], images.labels, images.groups, []
    for seed in range(DRAWS):
        order = groups.unique()[torch.randperm(len(groups.unique()), generator=torch.Generator().manual_seed(seed))]
        rows = torch.cat([torch.nonzero(groups == g)[:, 0] for g in order])[:LABELS]
        others = torch.nonzero(~torch.isin(groups, groups[rows]))[:, 0]
        fold = partition(labels[rows], groups[rows], [1] * transfer.FOLDS, seed)
        own = torch.zeros(len(old), LABELS, 2, dtype=torch.double)
        for k in fold.unique().tolist():
            layers = transfer.refit(old, seen.embeddings, rows[fold != k], labels[rows[fold != k]])
            own[:, fold == k] = transfer.answers(layers, seen.embeddings, rows[fold == k])
        layers = transfer.refit(old, seen.embeddings, rows, labels[rows])
        learnt = transfer.answers(layers, seen.embeddings, others)
        said = {
            "as it came": model.combine(opinions[:, others]),
            "temperature learnt": tempered(votes, opinions[:, rows], labels[rows]).combine(opinions[:, others]),
            "last layers and temperature learnt": tempered(votes, own, labels[rows]).combine(learnt),
        }
        found.append([float(metrics.evaluate(p, labels[others])["ece"]) for p in said.values()])
    for name, values in zip(said, torch.tensor(found).T, strict=True):
        print(f"{name:35s} calibration error {float(values.mean()):.3f}, sd of the draws {float(values.std()):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
