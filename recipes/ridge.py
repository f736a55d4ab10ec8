"""A last layer fitted anew on frozen features (ridge; Kirichenko et al., Last Layer Re-Training, 2022): what is it worth, at
home and in a hospital that the run has not seen?

    python recipes/ridge.py runs/busi data/BUSI data/BUSBRA/bus_data.csv      three minutes of a core

Every fold's last layers are fitted from nothing on the embeddings of what the fold has learnt from, at several strengths;
one view of a picture. Changes of the AUC are in pairs, against the layers that training has left."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import heads
import metrics
import models
from data import load
from judge import look_at
from report import held_out

BUSBRA = {"image": "ID", "label": "Pathology", "group": "Case", "mask": "Mask", "box": ["BBOX"]}
STRENGTHS = (0.3, 3, 30, 300)


def combine(votes, opinions, classes):
    return models.Ensemble([], votes, classes=classes).combine(opinions)


def main(run, home, elsewhere, cache="runs/cache"):
    images, pairs = held_out(run, home, cache)
    size, pictures = images.pixels.shape[-1], images.pictures()
    how = {"columns": BUSBRA, "box_format": "xywh"} if elsewhere.endswith(".csv") else {}
    there = load(elsewhere, size, positive="malignant", channels=images.pixels.shape[1], cache=cache, **how)
    before, after, everyone = {"home": [], "there": []}, {}, torch.arange(len(there))
    for model, rows in pairs:
        seen = model.info["seen"]
        known = torch.nonzero(torch.isin(pictures, torch.cat([seen["train"], seen["val"]])))[:, 0]
        learnt, labels = look_at(model, images, known, views=1, keep=True), images.labels[known]
        asked = {"home": look_at(model, images, rows, views=1, keep=True)}
        asked["there"] = look_at(model, there, everyone, views=1, keep=True)
        for place, answer in asked.items():
            before[place].append(combine(model.weights.tolist(), answer.opinions[:, 0], images.classes))
        for strength in STRENGTHS:
            layers = [heads.fit(e[0], labels, strength=strength) for e in learnt.embeddings]
            for place, answer in asked.items():
                opinions = [heads.probabilities(e[0], h) for e, h in zip(answer.embeddings, layers, strict=True)]
                p = combine(model.weights.tolist(), torch.stack(opinions), images.classes)
                after.setdefault((place, strength), []).append(p)
    rows = torch.cat([rows for _, rows in pairs])
    truth = {"home": (images.labels[rows], images.groups[rows]), "there": (there.labels, there.groups)}
    merge = {"home": torch.cat, "there": lambda parts: torch.stack(parts).mean(0)}  # all folds together
    for (place, strength), parts in sorted(after.items()):
        old, new = ((merge[place](some), 0.5, None) for some in (before[place], parts))
        m = metrics.change_with_intervals(old, new, *truth[place])["auc"]
        print(
            "{} {:5g}  {before:.4f} -> {after:.4f}  {value:+.4f} [{low:+.4f}, {high:+.4f}]".format(place, strength, **m)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
