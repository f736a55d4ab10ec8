"""BreastMNIST with the outlines that it was published without. It is BUSI, cut to the central square and shrunk to 28
pixels, so BUSI's masks fit it; and a network that learnt from BUSI has learnt its test images.

    python recipes/breastmnist.py data/breastmnist.npz data/BUSI breastmnist28        half a minute
    python train.py @recipes/breastmnist.args --data breastmnist28/breastmnist.csv

--data breastmnist downloads the file. Writes a table of its images in their official split, with a mask where the BUSI
folder has the picture; and busi.csv, the rest of BUSI: what neither is, nor looks like, a validation or test image of
BreastMNIST."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from both import write_table

from grouping import near_duplicates
from readers import Entry, find_entries

SAME = 0.99  # correlation; of 621 of BUSI's images the least alike has 0.9988 with its own, few others reach 0.95


def shrink(path):
    """A picture as BreastMNIST's authors shrank it: uint8 (28, 28)."""
    image = Image.open(path).convert("L")
    (w, h), side = image.size, min(image.size)
    left, top = (w - side) // 2, (h - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((28, 28), Image.BILINEAR))


def standard(images):
    """Rows (N, 784) of mean 0 and length 1, whose products are correlations."""
    x = torch.from_numpy(images).double().flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def main(breastmnist, busi, out):
    out, entries = Path(out).resolve(), find_entries(busi, {}, Path())
    known = np.stack([shrink(e.image) for e in entries])
    with np.load(breastmnist) as file:
        parts = {s: (file[f"{s}_images"], file[f"{s}_labels"][:, 0]) for s in ("train", "val", "test")}
    images, labels = (np.concatenate([part[k] for part in parts.values()]) for k in (0, 1))
    splits = [s for s, (part, _) in parts.items() for _ in part]
    alike, source = (standard(images) @ standard(known).T).max(1)
    source = [int(i) if a > SAME else None for a, i in zip(alike, source, strict=True)]

    out.mkdir(parents=True, exist_ok=True)
    table = []
    for i, (image, label, split) in enumerate(zip(images, labels, splits, strict=True)):
        name, masks = out / f"{i}.png", []
        Image.fromarray(image).save(name)
        if source[i] is not None:
            union = np.maximum.reduce([shrink(m) for m in entries[source[i]].masks])
            masks = [out / f"{i}_mask.png"]
            Image.fromarray(np.where(union > 127, 255, 0).astype(np.uint8)).save(masks[0])
        label = "benign" if label else "malignant"  # there 0 is malignant
        table.append(Entry(name, str(name), label, masks, split=split))
    write_table(out / "breastmnist.csv", table)

    pairs = near_duplicates(torch.from_numpy(np.concatenate([known, images]))[:, None])
    asked = torch.tensor([False] * len(known) + [split != "train" for split in splits])
    met = set(pairs[asked[pairs].any(1)].flatten().tolist())
    rest = [e for k, e in enumerate(entries) if k not in met]
    write_table(out / "busi.csv", rest)
    print(
        f"{sum(bool(e.masks) for e in table)} of {len(table)} have a mask; of BUSI {len(rest)} of {len(entries)} are left"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
