"""Images in: everything between files on a disk and a batch of pixels that a network can learn from.

    images = load("BUSI", size=128, positive="malignant")     # any layout of readers.py, or None: phantoms
    rows = images.rows("train")                               # indices, not copies
    pixels, boxes = images.pixels[rows[:32]], images.boxes[rows[:32]]

Three promises. The aspect ratio is KEPT (letterbox): "taller than wide" is a sign of malignancy. Malignant is the
positive class whatever number the source gave it, and the counts are printed at every load so that a flip is seen.
Images of one patient, one lesion, or near-duplicates of each other share a group, and a group is never split.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from augment import clahe
from phantoms import phantoms
from readers import InputError, find_entries, natural, one_line

warnings.simplefilter("error", Image.DecompressionBombWarning)  # refused in read_image, instead of eating the memory


@dataclasses.dataclass
class ImageSet:
    """N images in memory (or memory-mapped), and all that is known of them: the one thing that travels between files."""

    pixels: torch.Tensor  # uint8 (N, C, S, S); C = 1 for grey, 3 for colour; letterboxed
    labels: torch.Tensor  # int64 (N,), index into `classes`; -1 = not labelled
    boxes: torch.Tensor  # float32 (N, 4), x_min, y_min, x_max, y_max in [0, 1] of the square; NaN = no box known
    masks: torch.Tensor | None  # bool (N, S, S), lesion pixels
    groups: torch.Tensor  # int64 (N,)
    splits: list[str]  # "train", "val", "test", or "" (in no split: the pool)
    meta: torch.Tensor | None  # float32 (N, M), standardised patient data; missing = 0 and a missing-indicator column
    names: list[str]  # file path, or file.npz#index
    classes: list[str]  # of two classes the LAST is the positive one
    meta_columns: list[str] = dataclasses.field(default_factory=list)  # the M columns of `meta`
    meta_spec: list[dict] = dataclasses.field(default_factory=list)  # how to encode a new patient: see encode_meta
    outlined: torch.Tensor | None = None  # bool (N,): it is known where the lesion is, or that there is none
    placeholder_boxes: bool = False  # the boxes are dummies: every report says so
    source: str = ""
    thumbnails: torch.Tensor | None = None  # uint8 (N, 1, 28, 28): what near-duplicates are found by; None: too many
    group_names: list[str] = dataclasses.field(default_factory=list)  # the source's words for patients, lesions; or ""

    def __len__(self):
        return len(self.labels)

    def rows(self, split):
        """Indices (int64) of the LABELLED images in a split."""
        rows = [i for i, s in enumerate(self.splits) if s == split and self.labels[i] >= 0]
        return torch.tensor(rows, dtype=torch.long)

    def take(self, rows):
        """The ImageSet of these rows (int64) alone."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {k: v[rows] for k, v in parts.items() if isinstance(v, torch.Tensor)}
        lists = {k: [parts[k][i] for i in rows.tolist()] for k in ("splits", "names", "group_names")}
        return dataclasses.replace(self, **tensors, **lists)

    def pictures(self):
        """int64 (N,): a hash of what each image shows, whatever its name. A model file remembers those that it has met."""
        shown = self.pixels if self.thumbnails is None else self.thumbnails
        found = (hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in shown)
        return torch.tensor([int.from_bytes(d, "big", signed=True) for d in found], dtype=torch.long)

    def fingerprint(self):
        """A word that changes when an image, its place, its label, its group or its split does."""
        told = [self.pictures().tolist(), self.labels.tolist(), self.groups.tolist(), self.splits, self.classes]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    def summary(self):
        """Counts per class and split, one line each: a flipped label is seen here first."""
        n, c, s, _ = self.pixels.shape
        colour = "grey" if c == 1 else "colour"
        lines = [f"{self.source}: {n} images, {s}x{s} px, {colour}, {len(self.groups.unique())} groups"]
        for split in ("train", "val", "test", ""):
            labels = self.labels[[i for i, x in enumerate(self.splits) if x == split]].tolist()
            counts = [f"{labels.count(k)} {name}" for k, name in enumerate(self.classes)]
            counts += [f"{labels.count(-1)} not labelled"] if -1 in labels else []
            if labels:
                lines.append(f"  {split or 'pool':5s} {len(labels):6d}: {', '.join(counts)}")
        if len(self.classes) == 2:
            lines.append(f"  positive class: {self.classes[-1]}   (wrong? --positive NAME)")
        with_box = int(self.boxes[:, 0].isfinite().sum())
        lines.append(f"  boxes: {with_box}{' PLACEHOLDERS, not lesions' if self.placeholder_boxes else ''}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# One image


FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")  # EPS, of any name, would start Ghostscript


@contextlib.contextmanager
def open_image(source):
    """A file, or uint8 (H, W) or (H, W, 3), as a PIL image; of a file nothing but its header is read yet."""
    if isinstance(source, np.ndarray):
        yield Image.fromarray(source)
    elif isinstance(source, (str, Path)):
        with open(source, "rb") as file:  # a TIFF that Pillow opens by its name is mapped into memory, and that
            yield Image.open(file, formats=FORMATS)  # scrambles what its EXIF turns by a quarter
    else:
        yield Image.open(source, formats=FORMATS)


def read_image(path, channels):
    """An image file of FORMATS, or array as open_image takes it, as an upright 8-bit PIL image: "L" for channels=1, "RGB" for 3.

    EXIF rotation is applied, transparency is laid on black, 16-bit and float images are scaled by their own range.
    Raises InputError (one line) when the file is missing, truncated, no image, or a decompression bomb."""
    if isinstance(path, (str, Path)) and not os.path.exists(path):
        raise InputError("no such file")
    try:
        with open_image(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # the filter of warnings is not ours alone
                raise Image.DecompressionBombError
            image.load()
            return to_mode(image, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise InputError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, refused") from e
    except Image.UnidentifiedImageError as e:
        raise InputError(f"not an image, or none of {', '.join(FORMATS)}") from e
    except InputError:
        raise
    except Exception as e:  # Pillow's decoders raise whatever comes to their mind on broken files
        raise InputError(f"damaged: {str(e) or type(e).__name__}") from e


def to_mode(image, channels):
    """A PIL image of any mode, turned upright as its EXIF says, as 8-bit "L" (channels=1) or "RGB" (channels=3)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit, float: no fixed white, so use their own range
        if not np.isfinite(np.asarray(image)).all():
            raise InputError("it holds NaN or infinity")
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        values -= low  # in place: a picture may be large, and there is one in every thread
        values *= 255 / max(high - low, 1e-12)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")  # greys by one way, whoever asks
    return image.convert("L" if channels == 1 else "RGB")


def letterbox(image, size):
    """Fit a PIL image into a square, aspect ratio kept; the bars take the image's own mean.

    With bars of the mean, an image standardised by its own mean has bars of 0, which is what a convolution pads with.
    Returns uint8 (C, size, size) and the placement (scale_x, scale_y, left, top): x_square = x * scale_x + left."""
    width, height = image.size
    scale = size / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=3.0))  # antialiased
    small = small.reshape(h, w, -1).transpose(2, 0, 1)
    left, top = (size - w) // 2, (size - h) // 2
    square = np.rint(small.mean((1, 2), keepdims=True)).astype(np.uint8).repeat(size, 1).repeat(size, 2)
    square[:, top : top + h, left : left + w] = small
    return square, (w / width, h / height, left, top)


def thumbnail(image):
    """What near-duplicates are found by: uint8 (1, 28, 28), grey, squashed into the square, so that one picture cut in
    two ways still lies feature upon feature. Made of the file and nothing else: no option of a run may change its splits.
    28 px are the smallest images that are published (MedMNIST), so nothing is enlarged."""
    return np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR, reducing_gap=3.0))[None]


def original_box(box, placement, side, size):
    """A box in [0, 1] of a letterboxed square of `side` pixels, in the pixels of the original image of `size` (w, h)."""
    sx, sy, left, top = placement
    corners = (np.array(box) * side - [left, top, left, top]) / [sx, sy, sx, sy]
    return corners.clip(0, [*size, *size]).tolist()


def letterboxed_box(box, placement, side):
    """The reverse: a box in an original image's pixels, in [0, 1] of the square. InputError if it is none."""
    box = np.array(box, float)
    if box.shape != (4,) or not ((box[:2] < box[2:]).all() and (box >= 0).all()):
        raise InputError(f"box {box.tolist()}: give x_min, y_min, x_max, y_max in the image's pixels")
    sx, sy, left, top = placement
    return ((box * [sx, sy, sx, sy] + [left, top, left, top]) / side).clip(0, 1).tolist()


def box_of(mask):
    """Bounding box of a mask (H, W) as x_min, y_min, x_max, y_max in pixel edges; NaN where the mask is empty."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return np.full(4, np.nan, np.float32)
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Labels and patient data: from the source's words to numbers

POSITIVE_WORDS = ("malignant", "cancer", "carcinoma", "idc", "tumor", "tumour", "melanoma", "positive", "abnormal", "1")
MISSING = {"", "na", "nan", "none", "null", "unknown", "?"}


def resolve_classes(words, positive=None, drop=()):
    """Class names in the project's order, and each image's index into them (-1 not labelled, None dropped).

    positive: names of the source (a list, or one string with commas) that together are the positive class; all others
    become the negative one. Without it, two classes are ordered by their names: malignant, cancer, 1 ... come last."""
    found = sorted({w for w in words if w}, key=natural)
    for name in drop:
        if name not in found:
            raise InputError(f"--drop-class {name}: no such class (there are: {', '.join(found)})")
    found = [w for w in found if w not in drop]
    if positive:
        wanted = positive.split(",") if isinstance(positive, str) else [str(p) for p in positive]
        wanted = [next((w for w in found if w.lower() == name.strip().lower()), name) for name in wanted]
        for name in wanted:
            if name not in found:
                raise InputError(f"--positive {name}: no such class (there are: {', '.join(found)})")
        index = {w: int(w in wanted) for w in found}
        classes = ["+".join(w for w in found if index[w] == k) for k in (0, 1)]
        if not classes[0]:
            raise InputError(f"--positive {','.join(wanted)}: no negative class is left")
    else:
        classes = sorted(found, key=lambda w: w.lower() in POSITIVE_WORDS)  # stable: the rest keep their order
        index = {w: i for i, w in enumerate(classes)}
    return classes, [-1 if not w else index.get(w) for w in words]


def encode_meta(rows, columns, spec=None):
    """Patient data as numbers. rows: dicts of strings. Returns float32 (N, M), the M column names, and the spec.

    A numeric column becomes (value - mean) / sd and a missing-indicator; a category one column a level and a
    missing-indicator; what is missing is 0 everywhere but in its indicator. Give the `spec` of a trained model to
    encode new patients as it learnt them; an unknown category or an impossible number is then an InputError."""
    if spec is None:
        spec = []
        for column in columns:
            values = [r[column] for r in rows if r[column].lower() not in MISSING]
            try:
                numbers = np.array([float(v) for v in values])
            except ValueError:
                numbers = np.array([])
            if not (np.abs(numbers) < 1e30).all():  # beyond, the spread overflows, and nothing is left of the others
                raise InputError(f"{column}: a cell is infinite; leave it empty where the number is not known")
            if len(numbers):
                spec.append({"column": column, "mean": float(numbers.mean()), "sd": float(numbers.std()) or 1.0})
            else:  # words, or nothing at all
                spec.append({"column": column, "levels": sorted(set(values))})
    coded = []  # (name, values) of each of the M columns
    for s in spec:
        column = s["column"]
        values = [str(r.get(column, "")).strip() for r in rows]
        missing = np.array([v.lower() in MISSING for v in values])
        if "levels" in s:
            if unknown := sorted({v for v in values if v.lower() not in MISSING} - set(s["levels"])):
                known = ", ".join(s["levels"])
                raise InputError(f"{column}={unknown[0]}: a value not seen in training (known: {known})")
            coded += [(f"{column}={level}", [v == level for v in values]) for level in s["levels"]]
        else:
            try:
                numbers = np.array([0.0 if m else float(v) for v, m in zip(values, missing, strict=True)])
            except ValueError as e:
                raise InputError(f"{column}: {e}") from e
            if not np.isfinite(numbers).all():
                raise InputError(f"{column}={values[int(np.isfinite(numbers).argmin())]}: give a finite number")
            coded.append((column, np.where(missing, 0.0, (numbers - s["mean"]) / s["sd"])))
        coded.append((f"{column} missing", missing))
    names, parts = zip(*coded, strict=True)
    return torch.tensor(np.stack(parts, 1).astype(np.float32)), list(names), spec


def fit_meta(images, rows):
    """The spec of encode_meta with the means and spreads of these rows alone: what is tested must not set its own scale."""
    spec = []
    for s in images.meta_spec:
        if "mean" in s:
            known = images.meta[rows, images.meta_columns.index(f"{s['column']} missing")] == 0
            values = images.meta[rows, images.meta_columns.index(s["column"])][known].double() * s["sd"] + s["mean"]
            if len(values):
                s = s | {"mean": float(values.mean()), "sd": float(values.std(correction=0)) or 1.0}
        spec.append(s)
    return spec


def meta_for(images, spec):
    """images.meta (N, M), or None, as a model of this spec has learnt to read it: on its own scale."""
    if images.meta is None or spec == images.meta_spec:
        return images.meta
    meta = images.meta.clone()
    for own, other in zip(images.meta_spec, spec, strict=True):
        if "mean" in own:
            k = images.meta_columns.index(own["column"])
            there = meta[:, images.meta_columns.index(f"{own['column']} missing")] == 0
            values = (meta[:, k].double() * own["sd"] + own["mean"] - other["mean"]) / other["sd"]
            meta[:, k] = torch.where(there, values, 0.0).float()
    return meta


def parse_meta(text):
    """{"age": "55", "sex": "female"} from "age=55,sex=female"; None from None."""
    return dict(pair.partition("=")[::2] for pair in text.split(",")) if text else None


# ---------------------------------------------------------------------------------------------------------------------
# Groups and splits

MOST_COMPARED = 20_000  # images among which near-duplicates are looked for: the cost grows with the square


def near_duplicates(thumbnails):
    """Pairs (P, 2) of images that show the same picture, indices i < j. thumbnails: uint8 (N, 1, T, T), see thumbnail.

    Two look alike if their thumbnails, one of them perhaps mirrored, correlate by 0.95, and are the same if their fine
    features, laid upon each other, do so by 0.8. Measured on HAM10000, where most pictures are a dark spot on skin: of
    2,737 pairs that look alike 124 are of one lesion; 278 have the same fine features, 113 of them of one lesion; the
    largest group falls from 675 images to 60. On BUSI 4 of 166 pairs go: one of two patients, three of one lesion in
    another moment. Features of larger thumbnails (32 and 48 px) did not tell the pairs apart any better."""
    pairs, mirrored = look_alikes(thumbnails)
    fine, same = fine_features(thumbnails), [torch.zeros(0, dtype=torch.bool)]
    parts = list(zip(pairs.split(64), mirrored.split(64), strict=True))
    for part, turned in progress(parts, "comparing, 64 pairs each", len(parts)):
        i, j = part.T
        a, b = fine[i], torch.where(turned[:, None, None], fine[j].flip(2), fine[j])
        same.append(torch.maximum(aligned_similarity(a, b), aligned_similarity(b, a)) >= 0.8)
    return pairs[torch.cat(same)]


def look_alikes(thumbnails, threshold=0.95):
    """Pairs (P, 2), i < j, whose thumbnails, one of them perhaps mirrored, correlate by `threshold`, and whether they do
    so better mirrored (P,). Costs N^2 / 2 correlations, in blocks."""
    thumbs = thumbnails.float() - thumbnails.float().mean((2, 3), keepdim=True)
    flipped = F.normalize(thumbs.flip(3).flatten(1), dim=1)
    thumbs = F.normalize(thumbs.flatten(1), dim=1)
    pairs, mirrored = [], []
    for start in range(0, len(thumbs), 2048):
        block = thumbs[start : start + 2048]
        straight, turned = block @ thumbs[start:].T, block @ flipped[start:].T
        i, j = torch.nonzero(torch.maximum(straight, turned).triu(1) >= threshold, as_tuple=True)
        pairs.append(torch.stack([i + start, j + start], 1))
        mirrored.append((turned > straight)[i, j])
    return torch.cat(pairs), torch.cat(mirrored)


def fine_features(thumbnails):
    """(N, T, T): each pixel less the mean of the 5 x 5 around it, over the spread there, so that what thousands of
    pictures share (the rim of a lens, skin that darkens to the edge) counts no more than any other place."""

    def around(x):
        return F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)

    fine = thumbnails.float() - around(thumbnails.float())
    return (fine / (around(fine.square()).sqrt() + 3))[:, 0]  # 3 grey levels: where nothing is, no noise is enlarged


def aligned_similarity(a, b):
    """Cosine (P,) of the images a (P, T, T) and of b, stretched and moved so that it fits best: of one picture that was
    cut in two ways, a tenth at each side, all features lie elsewhere. Rows and columns are fitted in turns, twice."""
    size, ends = a.shape[-1], torch.arange(-3, 4)
    place, (low, high) = torch.arange(size), torch.cartesian_prod(ends, ends).T[:, :, None]
    source = (low + place * (1 + (high - low) / (size - 1))).clamp(0, size - 1)  # low, high: what either end moves by
    stretches = (1 - (source[..., None] - place).abs()).clamp(min=0)  # (49, T, T), of linear interpolation
    for _ in range(4):
        stretched = stretches @ b[:, None]
        similarity, best = F.cosine_similarity(a[:, None].flatten(2), stretched.flatten(2), dim=2).max(1)
        b = torch.gather(stretched, 1, best[:, None, None, None].expand(-1, 1, size, size))[:, 0]
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    return similarity


def merge_groups(groups, pairs):
    """Give both images of every pair one group (union-find). groups: int64 (N,); returns the same, numbered from 0."""
    parent = list(range(int(groups.max()) + 1)) if len(groups) else []

    def root(g):
        while parent[g] != g:
            parent[g] = g = parent[parent[g]]
        return g

    groups = groups.tolist()
    for i, j in pairs.tolist():
        a, b = root(groups[i]), root(groups[j])
        parent[max(a, b)] = min(a, b)
    return torch.unique(torch.tensor([root(g) for g in groups], dtype=torch.long), return_inverse=True)[1]


def partition(labels, groups, shares, seed):
    """Divide images into parts of the given shares: int64 (N,), the part of each. Stratified, and no group is split.

    Groups are dealt the largest first, each to the part that then lacks most of its classes; those whose sizes are alike
    (to a factor of 2) in random order. By the very size, the seed would move hardly a group: the parts of two seeds
    shared 41 % of the IDC images where chance gives 20 %."""
    shares = torch.tensor(shares, dtype=torch.double) / sum(shares)
    kinds, labels = torch.unique(labels, return_inverse=True)
    names, groups = torch.unique(groups, return_inverse=True)
    counts = torch.zeros(len(names), len(kinds), dtype=torch.double)
    counts.index_put_((groups, labels), torch.ones(len(labels), dtype=torch.double), accumulate=True)
    target = shares[:, None] * counts.sum(0)
    filled = torch.zeros_like(target)
    part = torch.zeros(len(counts), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    order, ties = torch.randperm(len(counts), generator=generator), 1e-6 * torch.rand(target.shape, generator=generator)
    order = order[torch.argsort(counts[order].sum(1).log2().floor(), descending=True, stable=True)]
    for g in order.tolist():
        lack = (target - filled) / target.clamp(min=1e-9) + ties  # relative, so that small parts get theirs
        part[g] = (lack * (counts[g] > 0)).sum(1).argmax()
        filled[part[g]] += counts[g]
    return part[groups]


def find_groups(entries, labels, classes, thumbnails, split_by_image, log=print):
    """The group (N,) of each image: the source's patients or lesions, else the near-duplicates that the thumbnails show."""
    if split_by_image:
        log("SPLIT BY IMAGE: patients, lesions and near-duplicates may lie on both sides; the result claims too much")
        return torch.arange(len(entries))
    words = [e.group or f"image {i}" for i, e in enumerate(entries)]
    groups = torch.from_numpy(np.unique(words, return_inverse=True)[1])
    if all(e.group for e in entries):
        return groups  # a source that names patients or lesions knows better than a thumbnail
    if thumbnails is None:
        log(f"more than {MOST_COMPARED:,} images: near-duplicates are not looked for")
        return groups
    pairs = near_duplicates(thumbnails)
    known = torch.tensor([bool(e.group) for e in entries])
    pairs = pairs[~known[pairs].all(1)]  # two patients that look alike are two patients
    groups = merge_groups(groups, pairs)
    if len(pairs):
        share = f"share a group, the largest of {groups.bincount().max()} images"
        log(f"{len(pairs)} near-duplicate pairs {share}")
    opposite = [(i, j) for i, j in pairs.tolist() if labels[i] != labels[j] and min(labels[i], labels[j]) >= 0]
    if opposite:
        both = " and ".join(f"{entries[k].name} ({classes[labels[k]]})" for k in opposite[0])
        log(f"  {len(opposite)} of these pairs have OPPOSITE LABELS, as {both}")
    if crossing := sum(entries[i].split != entries[j].split for i, j in pairs.tolist()):
        log(f"  {crossing} of these pairs cross the source's own splits, which are kept")
    return groups


def complete_splits(splits, labels, groups, seed):
    """Keep the source's splits and make those that it lacks: 70/10/20 where it has none, else 1/8 of train for val
    and 1/5 of train for test. Images without a label stay in no split."""
    splits = [s if label >= 0 else "" for s, label in zip(splits, labels.tolist(), strict=True)]
    labelled = torch.nonzero(labels >= 0)[:, 0]
    present = {splits[i] for i in labelled.tolist()}

    def deal(rows, names, shares):
        for i, p in zip(rows.tolist(), partition(labels[rows], groups[rows], shares, seed).tolist(), strict=True):
            splits[i] = names[p]

    if present == {""}:
        deal(labelled, ["train", "val", "test"], [0.7, 0.1, 0.2])
    else:
        for name, share in (("test", 0.2), ("val", 0.125)):
            train = torch.tensor([i for i, s in enumerate(splits) if s == "train"], dtype=torch.long)
            if name not in present and len(train):
                deal(train, ["train", name], [1 - share, share])
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, cached


def decode_entry(entry, size, channels, equalise):
    """What is kept of one entry, see kept_files. InputError: it can't be read, or its mask or box can't be its own."""
    image = read_image(entry.image, channels)
    pixels, (sx, sy, left, top) = letterbox(image, size)
    if equalise:
        pixels = clahe(torch.from_numpy(pixels)[None])[0].numpy()
    lesion, mask = np.zeros(image.size[::-1], bool), np.zeros((size, size), bool)
    for path in entry.masks:
        m = read_image(path, 1)
        if m.size != image.size:
            raise InputError(f"its mask {path} is {m.size[0]}x{m.size[1]}, the image {image.size[0]}x{image.size[1]}")
        top_value = m.getextrema()[1]
        if top_value == 1:  # written as 0 and 1
            m = m.point(lambda v: 255 * v)
        elif 1 < top_value <= 127:
            raise InputError(f"its mask {path} goes from 0 to {top_value}; write 0 and 255, or 0 and 1")
        lesion |= np.asarray(m) > 127
        w, h = max(1, round(m.width * sx)), max(1, round(m.height * sy))
        mask[top : top + h, left : left + w] |= np.asarray(m.resize((w, h), Image.Resampling.BILINEAR)) > 127
    if entry.box is not None and not lies_inside(entry.box, image.size):
        pixel_size = f"{image.width}x{image.height}"
        raise InputError(f"its box {entry.box} is no x_min, y_min, x_max, y_max in its {pixel_size} pixels")
    box = box_of(lesion) if entry.box is None else np.array(entry.box, np.float32)
    box = np.clip((box * [sx, sy, sx, sy] + [left, top, left, top]) / size, 0, 1).astype(np.float32)
    return {"pixels.u8": pixels, "masks.u8": mask, "boxes.f32": box, "thumbs.u8": thumbnail(image)}


def lies_inside(box, size):
    """Whether x_min, y_min, x_max, y_max are in order and inside an image of `size` (w, h), a pixel's rounding allowed, if
    something of the box is left in it."""
    ends = zip(box[:2], box[2:], size, strict=True)
    return all(-1 <= low < high <= side + 1 and low < side and high > 0 for low, high, side in ends)


def box_hint(entries, box_format):
    """What to say of boxes that are not what --box-format says: whether all of them would be right in the other one."""
    name, sign = ("xywh", 1) if box_format == "xyxy" else ("xyxy", -1)
    boxed = [e for e in entries if e.box is not None]
    try:
        for e in boxed:
            x, y, a, b = e.box
            with open_image(e.image) as image:
                if not lies_inside((x, y, a + sign * x, b + sign * y), image.size):
                    return ""
    except Exception:  # see read_image
        return ""
    return f"; all {len(boxed)} boxes make sense as {name}: give --box-format {name}"


def looks_grey(entries):
    """Whether most of a sample of images hold no colour (ultrasound is often saved as RGB, with a coloured mark)."""
    coloured = []
    for entry in entries[:: max(1, len(entries) // 32)]:
        try:
            pixels = np.asarray(read_image(entry.image, 3).resize((32, 32))).astype(int)
        except InputError:
            continue  # a bad file is reported when all are decoded
        coloured.append((pixels.max(2) - pixels.min(2)).mean() > 8)
    return sum(coloured) <= len(coloured) / 2


def progress(items, what, total):
    """Pass `items` on, and say on a line of stderr what, how far, time left. Silent where nobody watches."""
    start, shown = time.time(), 0.0
    for done, item in enumerate(items, 1):
        now = time.time()
        if sys.stderr.isatty() and (now - shown > 0.2 or done == total):
            shown, end = now, "\n" if done == total else ""
            left = (now - start) / done * (total - done)
            print(f"\r{what} {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)
        yield item


def kept_files(entries, size, channels):
    """What is kept of each image, {file of the cache: (type, shape)}: masks and thumbnails only where they are used."""
    files = {"pixels.u8": (np.uint8, (channels, size, size)), "boxes.f32": (np.float32, (4,))}
    if any(e.masks for e in entries):
        files["masks.u8"] = (bool, (size, size))
    if len(entries) <= MOST_COMPARED:
        files["thumbs.u8"] = (np.uint8, (1, 28, 28))
    return files


def decode(entries, size, channels, equalise=False, cache=None, skip_bad=False, box_format="xyxy"):
    """Decode all entries in threads: (pixels uint8 (N, C, S, S), masks bool (N, S, S) or None, boxes (N, 4), thumbnails
    uint8 (N, 1, 28, 28) or None where there are too many to compare, kept rows).

    With a `cache` folder the result is memory-mapped from there: the second start is immediate, and a set larger than
    memory works. The key is the files' names, sizes and times, and the size. All bad files are reported at once."""
    layout, work, folder = kept_files(entries, size, channels), (entries, size, channels, equalise), None
    if cache and not isinstance(entries[0].image, np.ndarray):
        folder = Path(cache) / cache_key(*work)
    files = {name: io.BytesIO() for name in layout}  # stay empty where there is a cache
    if folder and is_whole(folder, layout):
        kept, bad = json.loads((folder / "cache.json").read_text()).values()
    else:
        kept, bad = fill_cache(folder, layout, skip_bad, work) if folder else decode_into(files, *work)
    if bad and not skip_bad:
        hint = box_hint(entries, box_format) if any(": its box" in line for line in bad) else ""
        which = f"{len(bad)} of {len(entries)} images can't be read (--skip-bad goes on without them){hint}:"
        raise InputError("\n  ".join([which, *bad]))
    if not kept:
        raise InputError("no readable image is left")
    for line in bad:
        print(f"skipped {one_line(line)}")
    tensors = {}
    for name, (kind, shape) in layout.items():
        source = np.memmap(folder / name, kind, "c") if folder else np.frombuffer(files[name].getbuffer(), kind)
        tensors[name] = torch.from_numpy(source.reshape(-1, *shape))  # "c": the file is never written
    return *map(tensors.get, ("pixels.u8", "masks.u8", "boxes.f32", "thumbs.u8")), kept


def cache_key(entries, size, channels, equalise):
    """Names the folder of a decoded data set: another file, size or time of a file is another folder."""
    key = hashlib.sha256(json.dumps(["v4", size, channels, equalise]).encode())
    for e in entries:
        for p in [e.image, *e.masks]:
            stat = os.stat(p) if os.path.exists(p) else None
            key.update(json.dumps([os.path.abspath(p), stat and [stat.st_size, stat.st_mtime_ns], e.box]).encode())
    return key.hexdigest()[:16]


def is_whole(folder, layout):
    """Whether a folder of the cache holds all that it should: a disk that was full, or a copy that was cut, leaves less."""
    try:
        n = len(json.loads((folder / "cache.json").read_text())["kept"])
        sizes = {name: n * np.dtype(kind).itemsize * math.prod(shape) for name, (kind, shape) in layout.items()}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def fill_cache(folder, layout, skip_bad, work):
    """Decode into a folder beside `folder`, which gets its name when it is whole: (kept rows, bad files)."""
    try:
        shutil.rmtree(folder, ignore_errors=True)  # if there is one, it is damaged
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".part", dir=folder.parent, ignore_cleanup_errors=True) as part:
            files = {name: open(Path(part, name), "wb") for name in layout}
            kept, bad = decode_into(files, *work)
            for file in files.values():
                file.close()
            if kept and (skip_bad or not bad):
                Path(part, "cache.json").write_text(json.dumps({"kept": kept, "bad": bad}))
                try:
                    os.rename(part, folder)
                except OSError:
                    if not (folder / "cache.json").exists():  # else another process was faster: the same content
                        raise
    except OSError as e:
        cure = "make room or name another folder with --cache"
        raise InputError(f"the cache {folder.parent} can't be written ({e}); {cure}") from e
    return kept, bad


def decode_into(files, entries, size, channels, equalise):
    """Decode in threads, in pieces, so that a large set never waits in memory as a whole: (kept rows, bad files)."""

    def attempt(entry):
        try:
            return decode_entry(entry, size, channels, equalise)
        except InputError as e:
            return f"{entry.name}: {e}"

    kept, bad = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = (pool.map(attempt, entries[i : i + 1024]) for i in range(0, len(entries), 1024))
        for i, result in enumerate(progress(itertools.chain.from_iterable(pieces), "decoding", len(entries))):
            if isinstance(result, str):
                bad.append(result)
                continue
            kept.append(i)
            for name, file in files.items():
                file.write(result[name].tobytes())
    return kept, bad


def load(
    source=None, size=128, *, positive=None, drop=(), channels=None, equalise=False, columns=None, cache="runs/cache",
    skip_bad=False, split_by_image=False, seed=0, dummy_boxes=False, box_format="xyxy", meta_spec=None, log=print,
):  # fmt: skip
    """Any data set as an ImageSet, split and grouped. See readers.py for the layouts.

    source: a path, "breastmnist", or None for the phantoms. size: S in pixels. positive, drop: see resolve_classes.
    channels: 1, 3, or None to look. equalise: CLAHE. columns: {"image": "image_id", "meta": ["age"], ...} for a CSV.
    split_by_image: every image is a group of its own, to show what that would wrongly claim.
    dummy_boxes: give every image without a box the central placeholder box. box_format: what the source's four numbers
    are, "xyxy" or "xywh" (x, y, width, height). meta_spec: of a model that is to read the patient data, see encode_meta.
    Raises InputError."""
    if source is None or source == "phantoms":
        images = phantom_set(size=size, seed=seed)
        images.splits = complete_splits(images.splits, images.labels, images.groups, seed)
        log(images.summary())
        return images
    entries = find_entries(source, columns or {}, Path("data"))
    classes, index = resolve_classes([e.label for e in entries], positive, drop)
    entries = [dataclasses.replace(e, label=i) for e, i in zip(entries, index, strict=True) if i is not None]
    for e in entries if box_format == "xywh" else ():
        e.box = e.box and (e.box[0], e.box[1], e.box[0] + e.box[2], e.box[1] + e.box[3])
    if not entries:
        raise InputError(f"--data {source}: no image is left")
    channels = channels or (1 if looks_grey(entries) else 3)
    pixels, masks, boxes, thumbnails, kept = decode(entries, size, channels, equalise, cache, skip_bad, box_format)
    entries = [entries[i] for i in kept]
    labels = torch.tensor([e.label for e in entries])
    native = max(entries[0].image.shape[:2]) if isinstance(entries[0].image, np.ndarray) else size
    if native < size:
        log(f"{source}: {native}-pixel images, enlarged to {size}: no detail is gained")
    groups = find_groups(entries, labels, classes, thumbnails, split_by_image, log)
    rows = [e.row for e in entries]
    meta, meta_columns, spec = encode_meta(rows, list(rows[0]), meta_spec) if rows[0] else (None, [], [])
    unknown = boxes[:, 0].isnan() & dummy_boxes
    boxes[unknown] = torch.tensor([0.25, 0.25, 0.75, 0.75])
    images = ImageSet(
        pixels, labels, boxes, masks, groups, complete_splits([e.split for e in entries], labels, groups, seed), meta,
        [e.name for e in entries], classes, meta_columns, spec,
        torch.tensor([bool(e.masks) for e in entries]) | boxes[:, 0].isfinite(), bool(unknown.any()), str(source), thumbnails,
        ["" if split_by_image else e.group for e in entries],
    )  # fmt: skip
    log(images.summary())
    return images


def phantom_set(n=800, size=128, seed=0):
    """The phantoms of phantoms.py as an ImageSet, every image a group of its own, in no split yet."""
    pixels, labels, masks = phantoms(n, size, seed)
    return ImageSet(
        pixels, labels, torch.from_numpy(np.stack([box_of(m) for m in masks.numpy()])) / size, masks, torch.arange(n),
        [""] * n, None, [f"phantom#{i}" for i in range(n)], ["benign", "malignant"], outlined=torch.ones(n, dtype=torch.bool), source="phantoms",
        group_names=[""] * n,
        thumbnails=torch.from_numpy(np.stack([thumbnail(Image.fromarray(p[0])) for p in pixels.numpy()])),
    )  # fmt: skip


def join(a, b):
    """Two ImageSets of one size, channels and classes as one; a patient of both, and near-duplicates over both, share a
    group. What describes the set as a whole is that of `a`; metadata and masks are kept where both have them."""
    b = dataclasses.replace(b, groups=b.groups + (int(a.groups.max()) + 1 if len(a) else 0))
    both = {}
    for name in ("pixels", "labels", "boxes", "masks", "groups", "meta", "outlined", "thumbnails"):
        x, y = getattr(a, name), getattr(b, name)
        both[name] = None if x is None or y is None else torch.cat([x, y])
    both |= {name: getattr(a, name) + getattr(b, name) for name in ("splits", "names", "group_names")}
    first, known = {}, torch.tensor([bool(word) for word in both["group_names"]], dtype=torch.bool)
    pairs = [(first.setdefault(word, i), i) for i, word in enumerate(both["group_names"]) if word]
    pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    if both["thumbnails"] is not None and len(a) + len(b) <= MOST_COMPARED:
        alike = near_duplicates(both["thumbnails"])
        across = (alike < len(a)).sum(1) == 1  # within one set two patients that look alike are two, see find_groups
        pairs = torch.cat([pairs, alike[across | ~known[alike].all(1)]])
    both["groups"] = merge_groups(both["groups"], pairs)
    return dataclasses.replace(a, **both)
