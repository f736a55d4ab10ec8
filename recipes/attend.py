"""Does telling a network where not to look move its evidence, and what does that cost? In pairs, on BUSI's held-out folds.

    python recipes/attend.py data/BUSI runs/busi out        about an hour of a core; what is done is not done again

Every fold's whole-picture network of the run of recipes/busi.args is trained on for three epochs, in three ways that differ
in --attend alone: not at all; far from the lesion (masks teach); on the burnt-in callipers and letters (a column not_this, as
people's feedback has it; here the marks are found by a rule). Then, on the images that neither training has seen: AUC, and
the evidence by integrated gradients and by occlusion, inside the lesion and on the marks."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metrics
import models
import train
from data import load
from explain import interval, lesion_masks
from saliency import energy_inside

SETTINGS = {"epochs": 3, "batch": 16, "lr": 1e-4, "ema": 0.99, "views": 1, "positive": "malignant"}
WAYS = {"none": ["--attend", "0"], "far": ["--attend", "1"], "marks": ["--attend", "1"]}
MAPS = {"ig": {"steps": 8}, "occlusion": {"stride": 0.25}}
MEASURES = [f"{method}, {place}" for method in MAPS for place in ("lesion", "marks")]


def burnt_in(grey, side=17):
    """bool (h, w): callipers and letters, which are brighter than what lies around them, both across and down, as streaks
    of tissue are not."""
    x, reach = torch.from_numpy(grey).float()[None, None], side // 2
    across = F.pad(x, (reach, reach, 0, 0), mode="replicate").unfold(3, side, 1).median(-1).values
    down = F.pad(x, (0, 0, reach, reach), mode="replicate").unfold(2, side, 1).median(-1).values
    above = x - torch.maximum(across, down)
    sure = F.max_pool2d(((x > 200) & (above > 90)).float(), 5, 1, 2)
    marks = (x > 130) & (above > 50) & (sure > 0)
    return F.max_pool2d(marks.float(), 5, 1, 2)[0, 0].bool().numpy()


def write_tables(images, split, out, fold):
    """Two tables of the images with this fold's splits, without and with the marks: their paths."""
    rows, paths = [], []
    for name, label, part in zip(images.names, images.labels.tolist(), split, strict=True):
        path = Path(name)
        marks = out / "marks" / f"{path.stem}_mask.png"
        if not marks.exists():
            marks.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(burnt_in(np.array(Image.open(path).convert("L")))).save(marks)
        masks = ";".join(map(str, sorted(path.parent.glob(f"{path.stem}_mask*.png"))))
        masks = masks if path.parent.name != "normal" else ""
        row = {"image": str(path.resolve()), "label": images.classes[label], "mask": masks, "split": part}
        rows.append(row | {"not_this": str(marks.resolve())})
    for kind in ("plain", "marks"):
        columns = [c for c in rows[0] if kind == "marks" or c != "not_this"]
        paths.append(out / f"{kind}{fold}.csv")
        with open(paths[-1], "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return paths


def measure(model, images, rows, batch=32):
    """{measure: (N,)} on the images `rows`: the probability, and evidence in the lesion and on the marks, as multiples of
    their shares of the area."""
    found = {}
    for index in rows.split(batch):
        x, lesions, marks = images.pixels[index], lesion_masks(images, index), images.beside[index]
        with torch.no_grad():
            p = model(x)
        found.setdefault("probability", []).append(p)
        for method, how in MAPS.items():
            maps = model.explain(x, method, p.argmax(1), **how).abs()
            for place, where in (("lesion", lesions), ("marks", marks)):
                area = where.float().mean((1, 2))
                share = torch.where(area > 0, energy_inside(maps, where) / area.clamp(min=1e-9), torch.nan)
                found.setdefault(f"{method}, {place}", []).append(share)
    return {k: torch.cat(v) for k, v in found.items()}


def main(data, run, out, folds=5):
    out = Path(out)
    how = {"positive": "malignant", "cache": out / "cache", "log": lambda _: None}
    out.mkdir(parents=True, exist_ok=True)
    images, told = load(data, 128, **how), {way: [] for way in WAYS}
    order, pictures = [], images.pictures()
    for fold in range(1, folds + 1):
        whole = models.load(Path(run) / f"fold{fold}" / "model.pt")
        parts = {k: torch.isin(pictures, v) for k, v in whole.info["seen"].items()}
        split = ["test" if t else "val" if v else "train" for t, v in zip(parts["test"], parts["val"], strict=True)]
        plain, marked = write_tables(images, split, out, fold)
        info = {k: v for k, v in whole.info.items() if k != "familiar"} | {"load_size": 128}
        start = models.Ensemble([m for m in whole.members if m.config["roi"] == "none"], **info)
        models.save(out / f"start{fold}.pt", start)
        seen = load(marked, 128, **how)
        rows = seen.rows("test")
        order.append(images.groups[rows])
        for way, attend in WAYS.items():
            name = f"{way}{fold}"
            if not (out / name / "model.pt").exists():
                table = marked if way == "marks" else plain
                where = ["--data", table, "--from", out / f"start{fold}.pt", "--runs", out, "--cache", out / "cache"]
                settings = [f"--{k}={v}" for k, v in SETTINGS.items()]
                train.main([*settings, *attend, *map(str, where), "--name", name, "--seed", str(fold)])
            found = out / name / "measured.pt"
            if not found.exists():
                torch.save(measure(models.load(out / name), seen, rows) | {"label": seen.labels[rows]}, found)
            told[way].append(torch.load(found, weights_only=True))
    told = {way: {k: torch.cat([t[k] for t in parts]) for k in parts[0]} for way, parts in told.items()}
    groups, table, none = torch.cat(order), {}, told["none"]
    for way, values in told.items():
        before, after = ((v["probability"], 0.5, None) for v in (none, values))
        change = metrics.change_with_intervals(before, after, values["label"], groups)["auc"]
        table[way] = {"auc": [change["after"], change["value"], change["low"], change["high"]]}
        for k in MEASURES:
            moved = (0.0, 0.0, 0.0) if way == "none" else interval(values[k] - none[k], groups)
            table[way][k] = [interval(values[k], groups)[0], *moved]
        for k, cell in table[way].items():
            print(f"{way:6s} {k:18s}" + " {:.3f}, change {:+.3f} [{:+.3f}, {:+.3f}]".format(*cell))
    (out / "attend.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))  # the last, if there: so many of the five folds
