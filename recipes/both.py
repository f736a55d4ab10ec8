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


def write_table(path, entries):
    """A CSV as readers.read_csv takes it, wherever it lies."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "label", "group", "split", "mask"))
        for e in entries:
            masks = ";".join(str(Path(m).resolve()) for m in e.masks)
            table.writerow((Path(e.image).resolve(), e.label, e.group, e.split, masks))
    print(f"{path}: {len(entries)} images")


def by_hospital(run, cache="runs/cache"):
    args = args_of(Path(run))
    args.cache = cache
    images = load_images(args)
    files = sorted(Path(run).glob("fold*/test.pt"))  # of the folds that there are
    args.folds, results = len(files), [read_result(file, images) for file in files]
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
    if len(sys.argv) == 4:
        busi, busbra, path = sys.argv[1:]
        write_table(path, find_entries(busi, {}, Path()) + find_entries(busbra, BUSBRA, Path()))
    else:
        by_hospital(*sys.argv[1:])
