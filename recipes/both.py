"""BUSI and BUS-BRA as one set, five folds that split no patient and no near-duplicates: what does each learn from the
other?

    python recipes/both.py data/BUSI data/BUSBRA/bus_data.csv both.csv        writes the table of both
    python train.py @recipes/busi.args --roi none --data both.csv --epochs 15 --name both
    python recipes/both.py runs/both        the figures by hospital, each fold judged at the thresholds of the others"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ridge import BUSBRA

import metrics
from judge import cross_fit
from options import load_images
from readers import find_entries
from report import args_of, pooled, read_result


def write_table(busi, busbra, path):
    entries = find_entries(busi, {}, Path()) + find_entries(busbra, BUSBRA, Path())
    rows = [
        (Path(e.image).resolve(), e.label, e.group, ";".join(str(Path(m).resolve()) for m in e.masks)) for e in entries
    ]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "group", "mask"), *rows])
    print(f"{path}: {len(rows)} images")


def by_hospital(run, cache="runs/cache"):
    args = args_of(Path(run))
    args.cache = cache
    images = load_images(args)
    results = [read_result(Path(run) / f"fold{k + 1}" / "test.pt", images) for k in range(args.folds)]
    results = cross_fit(images, results, args)
    rows, (p, threshold, found) = torch.cat([r["rows"] for r in results]), pooled(images, results)
    named = torch.tensor([bool(name) for name in images.group_names])[rows]  # BUS-BRA tells its patients
    for hospital, here in (("BUSI", ~named), ("BUS-BRA", named)):
        of = rows[here]
        lesions = {name: values[here] for name, values in found.items() if values[here].isfinite().any()}
        measured = metrics.with_intervals(p[here], images.labels[of], images.groups[of], threshold[here], lesions)
        print(f"\n{hospital}, {len(of)} images")
        for name, m in measured.items():
            print("  {:18s} {value:.3f} [{low:.3f}, {high:.3f}]".format(name, **m))


if __name__ == "__main__":
    (write_table if len(sys.argv) == 4 else by_hospital)(*sys.argv[1:])
