"""Images in: everything between files on a disk and a batch of pixels that a network can learn from.

    images = load("BUSI", size=128, positive="malignant")     # any layout of the table below, or None: phantoms
    rows = images.rows("train")                               # indices, not copies
    batch, boxes = augment(images.pixels[rows[:32]], strength=1.0, boxes=images.boxes[rows[:32]])

What `load` understands (each by one short reader below):

    nothing               the built-in phantoms, synthetic breast ultrasound
    breastmnist           the original file, downloaded and checked
    FILE.npz              {train,val,test}_images, _labels, optionally _bboxes in pixels; or the train_* keys alone
    FOLDER/CLASS/*.png    one folder a class, with NAME_mask.png, NAME_mask_1.png beside an image where there are masks
    FOLDER/training_set/CLASS/*, FOLDER/testing_set/CLASS/*
    FOLDER/PATIENT/0/*, FOLDER/PATIENT/1/*                    (IDC histopathology; a patient is never split)
    FILE.csv              one row an image; flags name the columns
    FOLDER/*.png          no labels: a pool to predict on

Three promises. The aspect ratio is KEPT (letterbox): "taller than wide" is a sign of malignancy. Malignant is the
positive class whatever number the source gave it, and the counts are printed at every load so that a flip is seen.
Images of one patient, one lesion, or near-duplicates of each other share a group, and a group is never split.
"""

import concurrent.futures
import csv
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

warnings.simplefilter("error", Image.DecompressionBombWarning)  # refused in read_image, instead of eating the memory


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what to do. A bug is never this."""


def run_main(main):
    """Call `main`; a user's mistake is one line on stderr and exit code 1, a bug keeps its traceback."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {e.filename or 'a file'} can't be written ({e.strerror})", file=sys.stderr)
        sys.exit(1)


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu or auto")
    return device


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
    placeholder_boxes: bool = False  # the boxes are dummies: every report says so
    source: str = ""
    thumbnails: torch.Tensor | None = None  # uint8 (N, 1, 28, 28): what near-duplicates are found by; None: too many

    def __len__(self):
        return len(self.labels)

    def rows(self, split):
        """Indices (int64) of the LABELLED images in a split."""
        return torch.tensor(
            [i for i, s in enumerate(self.splits) if s == split and self.labels[i] >= 0], dtype=torch.long
        )

    def summary(self):
        """Counts per class and split, one line each: a flipped label is seen here first."""
        n, c, s, _ = self.pixels.shape
        lines = [
            f"{self.source}: {n} images, {s}x{s} px, {'grey' if c == 1 else 'colour'}, {len(self.groups.unique())} groups"
        ]
        for split in ("train", "val", "test", ""):
            labels = self.labels[[i for i, x in enumerate(self.splits) if x == split]]
            if not len(labels):
                continue
            unlabelled = int((labels < 0).sum())
            counts = [f"{int((labels == k).sum())} {name}" for k, name in enumerate(self.classes)]
            counts += [f"{unlabelled} not labelled"] if unlabelled else []
            lines.append(f"  {split or 'pool':5s} {len(labels):6d}: {', '.join(counts)}")
        if len(self.classes) == 2:
            lines.append(f"  positive class: {self.classes[-1]}   (wrong? --positive NAME)")
        with_box = int(self.boxes[:, 0].isfinite().sum())
        lines.append(f"  boxes: {with_box}{' PLACEHOLDERS, not lesions' if self.placeholder_boxes else ''}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# One image


def read_image(path, channels):
    """Any image file as an upright 8-bit PIL image, "L" for channels=1 or "RGB" for 3.

    EXIF rotation is applied, transparency is laid on black, 16-bit and float images are scaled by their own range.
    Raises InputError (one line) when the file is missing, truncated, no image, or a decompression bomb."""
    if isinstance(path, (str, Path)) and not os.path.exists(path):
        raise InputError("no such file")
    try:
        with Image.open(path) as image:
            image.load()
            return to_mode(ImageOps.exif_transpose(image), channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise InputError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, refused") from e
    except Image.UnidentifiedImageError as e:
        raise InputError("not an image") from e
    except (OSError, SyntaxError, ValueError, EOFError) as e:  # what Pillow's decoders raise on broken files
        raise InputError(f"damaged: {e}") from e


def to_mode(image, channels):
    """A PIL image of any mode as 8-bit "L" (channels=1) or "RGB" (channels=3)."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit, float: no fixed white, so use their own range
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
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
    square = np.empty((len(small), size, size), np.uint8)
    square[:] = np.rint(small.mean((1, 2))).astype(np.uint8)[:, None, None]
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
    corners = ((v * side - o) / s for v, o, s in zip(box, (left, top) * 2, (sx, sy) * 2, strict=True))
    return [min(max(v, 0.0), float(most)) for v, most in zip(corners, tuple(size) * 2, strict=True)]


def clahe(images, tiles=8, clip=2.0):
    """Contrast-limited adaptive histogram equalisation of a batch (Zuiderveld, Graphics Gems IV, 1994).

    images: uint8 (N, C, H, W); each channel by itself. tiles x tiles histograms are clipped at `clip` times the mean
    bin, what was cut off is spread over all bins, and each pixel interpolates the four nearest tiles' mappings."""
    n, c, h, w = images.shape
    th, tw = math.ceil(h / tiles), math.ceil(w / tiles)
    x = F.pad(images.float(), (0, tw * tiles - w, 0, th * tiles - h), mode="replicate").long()
    x = x.reshape(n * c, tiles, th, tiles, tw)
    tile = torch.arange(n * c * tiles * tiles, device=x.device).reshape(n * c, tiles, 1, tiles, 1)
    histogram = (
        torch.bincount((tile * 256 + x).flatten(), minlength=n * c * tiles * tiles * 256).float().reshape(-1, 256)
    )
    limit = max(1.0, clip * th * tw / 256)
    clipped = histogram.clamp(max=limit)
    clipped += (histogram - clipped).sum(1, keepdim=True) / 256
    mapping = (clipped.cumsum(1) * (255 / (th * tw))).clamp(max=255).flatten()

    def neighbours(length, step):  # the two tile centres around each pixel, and the weight of the second
        position = ((torch.arange(length, device=x.device) + 0.5) / step - 0.5).clamp(0, tiles - 1)
        first = position.floor().long()
        return first, (first + 1).clamp(max=tiles - 1), position - first

    (y0, y1, fy), (x0, x1, fx) = neighbours(h, th), neighbours(w, tw)
    value = images.reshape(n * c, h, w).long()
    image = torch.arange(n * c, device=x.device)[:, None, None]

    def mapped(ty, tx):
        return mapping[((image * tiles + ty[:, None]) * tiles + tx) * 256 + value]

    upper = torch.lerp(mapped(y0, x0), mapped(y0, x1), fx)
    lower = torch.lerp(mapped(y1, x0), mapped(y1, x1), fx)
    return torch.lerp(upper, lower, fy[:, None]).round().to(torch.uint8).reshape(n, c, h, w)


def box_of(mask):
    """Bounding box of a mask (H, W) as x_min, y_min, x_max, y_max in pixel edges; NaN where the mask is empty."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return np.full(4, np.nan, np.float32)
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Readers: each finds images and what is known of them, and decodes nothing


@dataclasses.dataclass
class Entry:
    """One image as a reader found it."""

    image: str | np.ndarray  # a path, or uint8 (H, W) or (H, W, 3)
    name: str
    label: str = ""  # the source's own word for the class; "" = not labelled
    masks: list[str] = dataclasses.field(default_factory=list)
    box: tuple | None = None  # x_min, y_min, x_max, y_max in pixels of the original image
    group: str = ""  # patient or lesion; "" = not known
    split: str = ""
    row: dict | None = None  # patient metadata as the source wrote it


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
MASK = re.compile(r"(.*)_mask(_\d+)?$")
POSITIVE_WORDS = ("malignant", "cancer", "carcinoma", "idc", "tumor", "tumour", "melanoma", "positive", "abnormal", "1")
SPLIT_WORDS = {"": "", "train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val"}
BREASTMNIST = "https://zenodo.org/records/10519652/files/breastmnist.npz?download=1"
BREASTMNIST_MD5 = "750601b1f35ba3300ea97c75c52ff8f6"


def natural(text):
    """Sort key that puts "image (9)" before "image (10)"."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(text))]


def image_files(folder):
    return sorted(
        (p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()), key=natural
    )


def subfolders(folder):
    return sorted((p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural)


def read_images(folder, **known):
    """The images of one folder, with their masks. NAME_mask.png belongs to NAME.png and is no image of its own."""
    files = image_files(folder)
    stems = {p.stem for p in files}
    masks = {}
    for p in files:
        if (m := MASK.match(p.stem)) and m[1] in stems:
            masks.setdefault(m[1], []).append(str(p))
    taken = {m for found in masks.values() for m in found}
    return [Entry(str(p), str(p), masks=masks.get(p.stem, []), **known) for p in files if str(p) not in taken]


def read_class_folders(folder, split=""):
    """CLASS/*.png (BUSI). The label is the folder's name."""
    return [e for sub in subfolders(folder) for e in read_images(sub, label=sub.name, split=split)]


def read_split_folders(folder):
    """training_set/CLASS/* and testing_set/CLASS/*. The split is the source's."""
    return read_class_folders(Path(folder) / "training_set", "train") + read_class_folders(
        Path(folder) / "testing_set", "test"
    )


def read_patients(folder):
    """PATIENT/0/* and PATIENT/1/* (Cruz-Roa et al. 2014): 1 is invasive ductal carcinoma. The group is the patient."""
    entries = []
    for patient in subfolders(folder):
        found = [
            e
            for name, label in (("0", "no IDC"), ("1", "IDC"))
            if (patient / name).is_dir()
            for e in read_images(patient / name, label=label, group=patient.name)
        ]
        if not found:
            raise InputError(
                f"{patient}: a patient folder without patches; remove it, or put its images under 0/ and 1/"
            )
        entries += found
    return entries


def read_npz(path):
    """MedMNIST's layout. Which number is malignant is the SOURCE's convention: in BreastMNIST 0 is malignant."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except ValueError as e:
        raise InputError(f"{path}: holds pickled objects or is damaged, refused ({e}); save plain arrays") from e
    except Exception as e:  # zipfile and numpy raise a family of their own on files that are no npz
        raise InputError(f"{path}: not an npz file ({e})") from e
    malignant_is_zero = (
        Path(path).name.startswith("breastmnist") or hashlib.md5(Path(path).read_bytes()).hexdigest() == BREASTMNIST_MD5
    )
    word = {-1: "", **({0: "malignant", 1: "benign"} if malignant_is_zero else {})}
    entries = []
    splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
    if not splits:
        raise InputError(f"{path}: no key train_images (found: {', '.join(arrays) or 'nothing'})")
    for split in splits:
        images = arrays[f"{split}_images"]
        labels = arrays.get(f"{split}_labels")
        boxes = arrays.get(f"{split}_bboxes")
        if labels is None:
            raise InputError(f"{path}: {split}_images has no {split}_labels beside it")
        labels = labels.reshape(len(labels), -1)
        if labels.shape[1] != 1:
            raise InputError(f"{path}: {split}_labels has {labels.shape[1]} columns, one class an image is needed")
        for key, values in (("labels", labels), ("bboxes", boxes)):
            if values is not None and len(values) != len(images):
                raise InputError(f"{path}: {len(images)} {split}_images but {len(values)} {split}_{key}")
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3))
        ):
            raise InputError(
                f"{path}: {split}_images is {images.dtype} {images.shape}, not uint8 (N, H, W) or (N, H, W, 3)"
            )
        images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        for i, (image, label) in enumerate(zip(images, labels[:, 0], strict=True)):
            box = None if boxes is None or not np.isfinite(boxes[i]).all() else tuple(float(v) for v in boxes[i])
            name = f"{path}#{i}" if splits == ["train"] else f"{path}#{split}/{i}"
            entries.append(
                Entry(
                    image,
                    name,
                    word.get(int(label), str(int(label))),
                    box=box,
                    split="" if splits == ["train"] else split,
                )
            )
    return entries


def read_csv(path, columns):
    """One row an image. `columns` names the columns: image, label, group, split, mask, box, meta (see COLUMNS).

    The image column holds a path, absolute or relative to the CSV, or a bare name or id that is looked up, with or
    without its ending, in the CSV's folder and below."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: not a CSV in UTF-8 ({e})") from e
    # A column that is not named is looked for under its own name; patient data have to be asked for.
    columns = {**columns, "box": columns["box"] or (["box"] if "box" in header else []), "meta": columns["meta"] or []}
    for k in ("image", "label", "group", "split", "mask"):
        columns[k] = columns[k] or (k if k in header else None)
    wanted = [columns[k] for k in ("image", "label", "group", "split", "mask") if columns[k]]
    wanted += [*columns["box"], *columns["meta"]]
    for name in wanted:
        if name not in header:
            raise InputError(f"{path}: no column {name!r} (its columns: {', '.join(header)})")
    if columns["image"] is None:
        raise InputError(
            f"{path}: no column 'image'; name the one that holds the file names with --image-column (its columns: {', '.join(header)})"
        )
    root = Path(path).parent
    index = {}

    def find(value):
        if (root / value).is_file():
            return str(root / value)
        if not index:
            for folder, _, files in os.walk(root):
                for file in files:
                    if Path(file).suffix.lower() in IMAGE_SUFFIXES:
                        index.setdefault(file, f"{folder}/{file}")
                        index.setdefault(Path(file).stem, f"{folder}/{file}")
        return index.get(value) or index.get(Path(value).name) or str(root / value)  # the last: missing, said later

    entries = []
    for line, row in enumerate(rows, 2):
        get = {k: (row.get(v) or "").strip() if isinstance(v, str) else "" for k, v in columns.items()}
        if not get["image"]:
            raise InputError(f"{path}, line {line}: no image named")
        split = SPLIT_WORDS.get(get["split"].lower())
        if split is None:
            raise InputError(f"{path}, line {line}: split {get['split']!r} is none of train, val, test")
        numbers = re.findall(r"[^\s,;\[\]()]+", " ".join((row.get(c) or "") for c in columns["box"]))
        try:
            box = tuple(float(v) for v in numbers) or None
        except ValueError:
            box = ()
        if box is not None and (len(box) != 4 or not (box[0] < box[2] and box[1] < box[3])):
            raise InputError(f"{path}, line {line}: box {' '.join(numbers)!r} is not x_min y_min x_max y_max in pixels")
        masks = [find(m.strip()) for m in get["mask"].split(";") if m.strip()]
        entries.append(
            Entry(
                find(get["image"]),
                get["image"],
                get["label"],
                masks,
                box,
                get["group"],
                split,
                {c: (row.get(c) or "").strip() for c in columns["meta"]} or None,
            )
        )
    return entries


COLUMNS = {"image": None, "label": None, "group": None, "split": None, "mask": None, "box": None, "meta": None}


def download_breastmnist(folder):
    """The original BreastMNIST file (Yang et al. 2023, CC BY 4.0), its MD5 checked."""
    path = Path(folder) / "breastmnist.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            with urllib.request.urlopen(BREASTMNIST, timeout=60) as response, open(part, "wb") as file:
                shutil.copyfileobj(response, file)
        except OSError as e:
            raise InputError(
                f"breastmnist: download failed ({e}); fetch {BREASTMNIST} yourself and give its path to --data"
            ) from e
        os.replace(part, path)
    if hashlib.md5(path.read_bytes()).hexdigest() != BREASTMNIST_MD5:
        raise InputError(
            f"{path}: not the original BreastMNIST file (its MD5 is not {BREASTMNIST_MD5}); remove it and try again"
        )
    return path


def find_entries(source, columns, folder):
    """Choose the reader by what lies there."""
    if source == "breastmnist":
        source = download_breastmnist(folder)
    path = Path(source)
    if not path.exists():
        raise InputError(f"--data {source}: no such file or folder")
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".csv":
        return read_csv(path, {**COLUMNS, **columns})
    if not path.is_dir():
        raise InputError(f"--data {source}: neither a folder, nor .npz, nor .csv")
    names = {p.name for p in subfolders(path)}
    if {"training_set", "testing_set"} <= names:
        return read_split_folders(path)
    if any((path / name / label).is_dir() for name in names for label in "01"):
        return read_patients(path)
    if any(image_files(path / name) for name in names):
        return read_class_folders(path)
    if image_files(path):
        return read_images(path)
    tables = sorted(path.glob("*.csv"))
    hint = (
        f"; it holds {tables[0].name}: give that file"
        if tables
        else "; expected CLASS/*.png, PATIENT/0 and PATIENT/1, or images"
    )
    raise InputError(f"--data {source}: no images found in it{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Labels and patient data: from the source's words to numbers


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
        for name in wanted:
            if name not in found:
                raise InputError(f"--positive {name}: no such class (there are: {', '.join(found)})")
        rest = [w for w in found if w not in wanted]
        if not rest:
            raise InputError(f"--positive {','.join(wanted)}: no negative class is left")
        classes = ["+".join(rest), "+".join(w for w in found if w in wanted)]
        index = {w: int(w in wanted) for w in found}
    else:
        classes = sorted(found, key=lambda w: w.lower() in POSITIVE_WORDS)  # stable: the rest keep their order
        index = {w: i for i, w in enumerate(classes)}
    return classes, [-1 if not w else index.get(w) for w in words]


MISSING = {"", "na", "nan", "none", "null", "unknown", "?"}


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
                spec.append(
                    {"column": column, "mean": float(numbers.mean()), "sd": float(numbers.std()) or 1.0}
                    if len(numbers)
                    else {"column": column, "levels": []}
                )
            except ValueError:
                spec.append({"column": column, "levels": sorted(set(values))})
    names, parts = [], []
    for s in spec:
        column = s["column"]
        values = [str(r.get(column, "")).strip() for r in rows]
        missing = np.array([v.lower() in MISSING for v in values])
        if "levels" in s:
            unknown = sorted({v for v, m in zip(values, missing, strict=True) if not m and v not in s["levels"]})
            if unknown:
                raise InputError(
                    f"{column}={unknown[0]}: a value not seen in training (known: {', '.join(s['levels'])})"
                )
            parts += [np.array([v == level for v in values]) for level in s["levels"]]
            names += [f"{column}={level}" for level in s["levels"]]
        else:
            try:
                numbers = np.array([0.0 if m else float(v) for v, m in zip(values, missing, strict=True)])
            except ValueError as e:
                raise InputError(f"{column}: {e}") from e
            parts.append(np.where(missing, 0.0, (numbers - s["mean"]) / s["sd"]))
            names.append(column)
        parts.append(missing)
        names.append(f"{column} missing")
    return torch.tensor(np.stack(parts, 1).astype(np.float32)), names, spec


def parse_meta(text):
    """{"age": "55", "sex": "female"} from "age=55,sex=female"; None from None."""
    return dict(pair.partition("=")[::2] for pair in text.split(",")) if text else None


# ---------------------------------------------------------------------------------------------------------------------
# Groups and splits


MOST_COMPARED = 20_000  # images among which near-duplicates are looked for: the cost grows with the square


def near_duplicates(thumbnails, threshold=0.95):
    """Pairs of images that show the same picture: (P, 2) indices i < j, and their similarity (P,).

    Two images are near-duplicates if the correlation of their thumbnails, or of one with the other's mirror image,
    reaches `threshold`. Costs N^2 / 2 correlations, in blocks. thumbnails: uint8 (N, 1, T, T), see thumbnail."""
    thumbs = thumbnails.float()
    thumbs = thumbs - thumbs.mean((2, 3), keepdim=True)
    mirrored = F.normalize(thumbs.flip(3).flatten(1), dim=1)
    thumbs = F.normalize(thumbs.flatten(1), dim=1)
    pairs, similarity = [], []
    for start in range(0, len(thumbs), 2048):
        block = thumbs[start : start + 2048]
        score = torch.maximum(block @ thumbs[start:].T, block @ mirrored[start:].T).triu(1)
        i, j = torch.nonzero(score >= threshold, as_tuple=True)
        pairs.append(torch.stack([i + start, j + start], 1))
        similarity.append(score[i, j])
    return torch.cat(pairs), torch.cat(similarity)


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

    Groups are dealt in random order, the largest first, each to the part that then lacks most of its classes."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor(shares, dtype=torch.double) / sum(shares)
    _, classes = torch.unique(labels, return_inverse=True)
    _, groups = torch.unique(groups, return_inverse=True)
    counts = torch.zeros(
        int(groups.max()) + 1 if len(groups) else 0, int(classes.max()) + 1 if len(classes) else 0, dtype=torch.double
    )
    counts.index_put_((groups, classes), torch.ones(len(labels), dtype=torch.double), accumulate=True)
    total = counts.sum(0)
    target = shares[:, None] * total
    filled = torch.zeros_like(target)
    part = torch.zeros(len(counts), dtype=torch.long)
    order = torch.randperm(len(counts), generator=generator)
    order = order[torch.argsort(counts[order].sum(1), descending=True, stable=True)]
    for g in order.tolist():
        lack = ((target - filled) / target.clamp(min=1e-9) * (counts[g] > 0)).sum(
            1
        )  # relative, so that small parts get theirs
        part[g] = lack.argmax()
        filled[part[g]] += counts[g]
    return part[groups]


def complete_splits(splits, labels, groups, seed):
    """Keep the source's splits and make those that it lacks: 70/10/20 where it has none, else 1/8 of train for val
    and 1/5 of train for test. Images without a label stay in no split."""
    splits = list(splits)
    labelled = torch.tensor([i for i in range(len(splits)) if labels[i] >= 0], dtype=torch.long)
    present = {splits[i] for i in labelled.tolist()}

    def deal(rows, names, shares):
        for i, p in zip(rows.tolist(), partition(labels[rows], groups[rows], shares, seed).tolist(), strict=True):
            splits[i] = names[p]

    if present == {""}:
        deal(labelled, ["train", "val", "test"], [0.7, 0.1, 0.2])
    elif present:
        for name, share in (("test", 0.2), ("val", 0.125)):
            train = torch.tensor([i for i in labelled.tolist() if splits[i] == "train"], dtype=torch.long)
            if name not in present and len(train):
                deal(train, ["train", name], [1 - share, share])
    return [s if labels[i] >= 0 else "" for i, s in enumerate(splits)]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, cached


def decode_entry(entry, size, channels, equalise):
    """One entry as uint8 (C, S, S), its mask bool (S, S), its box float32 (4,) in [0, 1] of the square, its thumbnail."""
    if isinstance(entry.image, np.ndarray):
        image = to_mode(Image.fromarray(entry.image), channels)
    else:
        image = read_image(entry.image, channels)
    pixels, (sx, sy, left, top) = letterbox(image, size)
    if equalise:
        pixels = clahe(torch.from_numpy(pixels)[None])[0].numpy()
    mask = np.zeros((size, size), bool)
    box = np.full(4, np.nan, np.float32)
    for path in entry.masks:
        m = read_image(path, 1)
        if m.size != image.size:
            raise InputError(f"its mask {path} is {m.size[0]}x{m.size[1]}, the image {image.size[0]}x{image.size[1]}")
        b = box_of(np.asarray(m) > 127)
        box = np.concatenate([np.fmin(box[:2], b[:2]), np.fmax(box[2:], b[2:])])
        w, h = max(1, round(m.width * sx)), max(1, round(m.height * sy))
        mask[top : top + h, left : left + w] |= np.asarray(m.resize((w, h), Image.Resampling.BILINEAR)) > 127
    if entry.box is not None:
        box = np.array(entry.box, np.float32)
    box = np.clip((box * [sx, sy, sx, sy] + [left, top, left, top]) / size, 0, 1).astype(np.float32)
    return pixels, mask, box, thumbnail(image)


def looks_grey(entries):
    """Whether most of a sample of images hold no colour (ultrasound is often saved as RGB, with a coloured mark)."""
    coloured, seen = 0, 0
    for entry in entries[:: max(1, len(entries) // 32)]:
        try:
            image = Image.fromarray(entry.image) if isinstance(entry.image, np.ndarray) else read_image(entry.image, 3)
        except InputError:
            continue  # a bad file is reported when all are decoded
        pixels = np.asarray(image.convert("RGB").resize((32, 32))).astype(int)
        seen += 1
        coloured += (pixels.max(2) - pixels.min(2)).mean() > 8
    return coloured <= seen / 2


class Progress:
    """One line on stderr that is rewritten: what, how far, time left. Silent where nobody watches."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.shown = what, total, time.time(), 0.0

    def __call__(self, done):
        now = time.time()
        if sys.stderr.isatty() and (now - self.shown > 0.2 or done == self.total):
            self.shown = now
            left = (now - self.start) / max(done, 1) * (self.total - done)
            print(
                f"\r{self.what} {done}/{self.total}, {left:.0f} s left ",
                end="\n" if done == self.total else "",
                file=sys.stderr,
                flush=True,
            )


def decode(entries, size, channels, equalise=False, cache=None, skip_bad=False):
    """Decode all entries in threads: (pixels uint8 (N, C, S, S), masks bool (N, S, S) or None, boxes (N, 4), thumbnails
    uint8 (N, 1, 28, 28) or None where there are too many to compare, kept rows).

    With a `cache` folder the result is memory-mapped from there: the second start is immediate, and a set larger than
    memory works. The key is the files' names, sizes and times, and the size. All bad files are reported at once."""
    shape, masked = (channels, size, size), any(e.masks for e in entries)
    folder, masks = None, None
    if cache and not isinstance(entries[0].image, np.ndarray):
        key = hashlib.sha256(json.dumps(["v2", size, channels, equalise]).encode())
        for e in entries:
            for p in [e.image, *e.masks]:
                stat = os.stat(p) if os.path.exists(p) else None
                key.update(json.dumps([os.path.abspath(p), stat and [stat.st_size, stat.st_mtime_ns], e.box]).encode())
        folder = Path(cache) / key.hexdigest()[:16]
    if folder and (folder / "cache.json").exists():
        kept, bad = json.loads((folder / "cache.json").read_text()).values()
    else:
        kept, bad, boxes, thumbs = [], [], [], []
        part = Path(f"{folder}.{os.getpid()}.part") if folder else None

        def attempt(entry):
            try:
                return decode_entry(entry, size, channels, equalise)
            except InputError as e:
                return f"{entry.name}: {e}"

        try:
            if part:
                part.mkdir(parents=True)
                pixel_file, mask_file = open(part / "pixels.u8", "wb"), open(part / "masks.u8", "wb")
            else:
                pixels = np.empty((len(entries), *shape), np.uint8)
                masks = np.empty((len(entries), size, size), bool) if masked else None
            progress = Progress("decoding", len(entries))
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                for start in range(0, len(entries), 1024):  # in pieces: a large set never waits in memory as a whole
                    for i, result in enumerate(pool.map(attempt, entries[start : start + 1024]), start):
                        progress(i + 1)
                        if isinstance(result, str):
                            bad.append(result)
                            continue
                        kept.append(i)
                        boxes.append(result[2])
                        if len(entries) <= MOST_COMPARED:
                            thumbs.append(result[3])
                        if part:
                            pixel_file.write(result[0].tobytes())
                            mask_file.write(result[1].tobytes() if masked else b"")
                        else:
                            pixels[len(kept) - 1] = result[0]
                            if masked:
                                masks[len(kept) - 1] = result[1]
            boxes = np.array(boxes, np.float32).reshape(-1, 4)
            thumbs = np.array(thumbs, np.uint8)
            if part:
                pixel_file.close()
                mask_file.close()
                np.save(part / "boxes.npy", boxes)
                np.save(part / "thumbs.npy", thumbs)
                if kept and not (bad and not skip_bad):
                    (part / "cache.json").write_text(json.dumps({"kept": kept, "bad": bad}))
                    try:
                        os.rename(part, folder)
                    except OSError:
                        if not (folder / "cache.json").exists():  # else another process was faster: the same content
                            raise
        except OSError as e:
            raise InputError(
                f"the cache {cache} can't be written ({e}); make room or name another folder with --cache"
            ) from e
        finally:
            if part:
                shutil.rmtree(part, ignore_errors=True)
    if bad and not skip_bad:
        raise InputError(
            f"{len(bad)} of {len(entries)} images can't be read (--skip-bad goes on without them):\n  "
            + "\n  ".join(bad)
        )
    if not kept:
        raise InputError("no readable image is left")
    for line in bad:
        print(f"skipped {line}")
    if folder:
        pixels = np.memmap(
            folder / "pixels.u8", np.uint8, "c", shape=(len(kept), *shape)
        )  # "c": no write reaches the file
        masks = np.memmap(folder / "masks.u8", bool, "c", shape=(len(kept), size, size)) if masked else None
        boxes, thumbs = np.load(folder / "boxes.npy"), np.load(folder / "thumbs.npy")
    masks = None if masks is None else torch.from_numpy(masks[: len(kept)])
    thumbs = torch.from_numpy(thumbs) if len(thumbs) else None
    return torch.from_numpy(pixels[: len(kept)]), masks, torch.from_numpy(boxes), thumbs, kept


def load(
    source=None,
    size=128,
    *,
    positive=None,
    drop=(),
    channels=None,
    equalise=False,
    columns=None,
    cache="runs/cache",
    skip_bad=False,
    split_by_image=False,
    seed=0,
    dummy_boxes=False,
    log=print,
):
    """Any data set as an ImageSet, split and grouped. See the top of the file for the layouts.

    source: a path, "breastmnist", or None for the phantoms. size: S in pixels. positive, drop: see resolve_classes.
    channels: 1, 3, or None to look. equalise: CLAHE. columns: {"image": "image_id", "meta": ["age"], ...} for a CSV.
    split_by_image: every image is a group of its own, to show what that would wrongly claim.
    dummy_boxes: give every image without a box the central placeholder box. Raises InputError."""
    if source is None or source == "phantoms":
        images = phantoms(size=size, seed=seed)
        images.splits = complete_splits(images.splits, images.labels, images.groups, seed)
        log(images.summary())
        return images
    entries = find_entries(source, columns or {}, Path("data"))
    classes, index = resolve_classes([e.label for e in entries], positive, drop)
    entries = [dataclasses.replace(e, label=i) for e, i in zip(entries, index, strict=True) if i is not None]
    if not entries:
        raise InputError(f"--data {source}: no image is left")
    channels = channels or (1 if looks_grey(entries) else 3)
    pixels, masks, boxes, thumbnails, kept = decode(entries, size, channels, equalise, cache, skip_bad)
    entries = [entries[i] for i in kept]
    labels = torch.tensor([e.label for e in entries])
    native = max(entries[0].image.shape[:2]) if isinstance(entries[0].image, np.ndarray) else size
    if native < size:
        log(f"{source}: {native}-pixel images, enlarged to {size}: no detail is gained")

    words = [e.group or f"image {i}" for i, e in enumerate(entries)]
    groups = torch.from_numpy(np.unique(words, return_inverse=True)[1].reshape(-1))
    splits = [e.split for e in entries]
    if split_by_image:
        groups = torch.arange(len(entries))
        log(
            "SPLIT BY IMAGE: patients, lesions and near-duplicates may lie on both sides, so the result claims too much"
        )
    elif thumbnails is None:
        log(f"more than {MOST_COMPARED:,} images: near-duplicates are not looked for")
    elif not any(e.group for e in entries):  # a source that names patients or lesions knows better than a thumbnail
        pairs, similarity = near_duplicates(thumbnails)
        groups = merge_groups(groups, pairs)
        if len(pairs):
            log(f"{len(pairs)} near-duplicate pairs (thumbnail correlation >= 0.95) share a group")
        for (i, j), s in zip(pairs.tolist(), similarity.tolist(), strict=True):
            if labels[i] != labels[j] and min(labels[i], labels[j]) >= 0:
                log(
                    f"  OPPOSITE LABELS, correlation {s:.3f}: {entries[i].name} ({classes[labels[i]]}), {entries[j].name} ({classes[labels[j]]})"
                )
        if crossing := sum(splits[i] != splits[j] for i, j in pairs.tolist()):
            log(f"  {crossing} of these pairs cross the source's own splits, which are kept")
    meta, meta_columns, spec = None, [], []
    if entries[0].row is not None:
        meta, meta_columns, spec = encode_meta([e.row for e in entries], list(entries[0].row))
    unknown = ~boxes[:, 0].isfinite()
    if dummy_boxes:
        boxes[unknown] = torch.tensor([0.25, 0.25, 0.75, 0.75])
    images = ImageSet(
        pixels,
        labels,
        boxes,
        masks,
        groups,
        complete_splits(splits, labels, groups, seed),
        meta,
        [e.name for e in entries],
        classes,
        meta_columns,
        spec,
        dummy_boxes and bool(unknown.any()),
        str(source),
        thumbnails,
    )
    log(images.summary())
    return images


def join(a, b):
    """Two ImageSets of one size, channels and classes as one; near-duplicates over both share a group. What describes
    the set as a whole is that of `a`; metadata and masks are kept where both have them."""
    offset = int(a.groups.max()) + 1 if len(a) else 0
    both = {
        name: torch.cat([getattr(a, name), getattr(b, name)])
        if getattr(a, name) is not None and getattr(b, name) is not None
        else None
        for name in ("masks", "meta", "thumbnails")
    }
    compared = both["thumbnails"] is not None and len(a) + len(b) <= MOST_COMPARED
    pairs = near_duplicates(both["thumbnails"])[0] if compared else torch.empty(0, 2, dtype=torch.long)
    return dataclasses.replace(
        a,
        pixels=torch.cat([a.pixels, b.pixels]),
        labels=torch.cat([a.labels, b.labels]),
        boxes=torch.cat([a.boxes, b.boxes]),
        groups=merge_groups(torch.cat([a.groups, b.groups + offset]), pairs),
        splits=a.splits + b.splits,
        names=a.names + b.names,
        **both,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Resampling and augmentation: whole batches on the device, one grid_sample a batch


def crop_regions(boxes, margin=0.25):
    """Square regions around boxes: (N, 4) in [0, 1], the box's longer side plus `margin` of it on each side.

    Where no box is known (NaN) the region is the whole image. A region may reach over the edge."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=0.05) * (0.5 + margin)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device)
    return torch.where(boxes[:, :1].isfinite(), torch.cat([centre - half, centre + half], 1), whole)


def region_matrices(regions):
    """Affine matrices (N, 2, 3) that map the output square [-1, 1]^2 onto regions (N, 4) given in [0, 1]."""
    centre = regions[:, :2] + regions[:, 2:] - 1
    half = regions[:, 2:] - regions[:, :2]
    return torch.cat([torch.diag_embed(half), centre[:, :, None]], 2)


def to_float(images):
    """uint8 pixels as float32 in [0, 1]; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def warp(images, matrices, size, displacement=None):
    """Resample a batch once: (N, C, S, S) -> float32 (N, C, size, size); outside the image is the image's own mean.

    matrices: (N, 2, 3), output to input coordinates in [-1, 1]; displacement: (N, size, size, 2) added to the grid."""
    images = to_float(images)
    mean = images.mean((2, 3), keepdim=True)
    grid = F.affine_grid(matrices, (len(images), 1, size, size), align_corners=False)
    if displacement is not None:
        grid = grid + displacement
    return F.grid_sample(images - mean, grid, mode="bilinear", padding_mode="zeros", align_corners=False).add_(mean)


def crop(images, regions, size):
    """Cut square regions (N, 4), or the whole (None), out of a batch: float32 (N, C, size, size) in [0, 1]."""
    if regions is None and images.shape[-1] == size:
        return to_float(images)
    return warp(images, region_matrices(whole_regions(images) if regions is None else regions), size)


def whole_regions(images):
    """The region (N, 4) of each image that is all of it."""
    return torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=images.device).expand(len(images), 4)


def spline_basis(size, knots, device):
    """(size, knots) cubic B-spline weights: a smooth curve through few random numbers is one small product."""
    t = torch.linspace(0, knots - 1, size, device=device)[:, None] - torch.arange(knots, device=device)
    a = t.abs()
    weights = torch.where(a < 1, 2 / 3 - a**2 + a**3 / 2, (2 - a).clamp(min=0) ** 3 / 6)
    return weights / weights.sum(1, keepdim=True)


# What strength 1 means. Each image draws its own value, uniformly up to these; `strength` scales them all.
ROTATE = 12.0  # degrees
SCALE = 0.25  # log of the zoom
SHIFT = 0.10  # of the side
ELASTIC = 0.04  # of the half side, on a 5 x 5 lattice of cubic B-splines (Rueckert et al. 1999)
GAMMA = 0.5  # log of the exponent
GAIN = 0.25  # log
DEPTH_GAIN = 0.35  # log, a smooth curve over depth: the scanner's time-gain compensation
SPECKLE = 0.20  # standard deviation, multiplicative
BLUR = 1.5  # sigma in pixels at 128 px, on a third of the images
CUTOUT = 0.3  # side, on a third of the images
STAIN = 0.2  # log of each stain's strength
STAIN_SHIFT = 0.05  # of each stain's optical density
# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston 2001)
STAINS = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1)


def augment(images, strength=1.0, boxes=None, regions=None, size=None, generator=None):
    """Augment a whole batch where it lies: (images float32 (N, C, size, size) in [0, 1], boxes (N, 4) or None).

    images: uint8 or float (N, C, S, S). regions: crop these squares first (see crop_regions). Flip, rotation, scale,
    shift, elastic deformation and the crop are folded into ONE resampling; then come intensity, blur and cutout. Grey is
    ultrasound, where depth has a meaning: flips are left-right only, and gain, gamma, depth gain and speckle vary.
    Colour is a tissue slide or skin, which have no up: all eight flips and quarter turns, and the stains vary (Tellez
    et al. 2018), which never turns a colour into one that the stains can't mix. strength 0 only crops and resizes.
    A box follows as the ellipse inscribed in it, which is what a lesion is, so that rotations don't inflate it."""
    n, c, _, side = images.shape
    size = size or side
    device = images.device
    base = region_matrices(whole_regions(images) if regions is None else regions)
    if strength == 0:
        return warp(images, base, size), None if boxes is None else move_boxes(boxes, base)
    u = torch.rand(n, 20, generator=generator, device=device)  # one draw; a column a parameter
    signed = (2 * u - 1) * strength

    angle, zoom = signed[:, 0] * math.radians(ROTATE), torch.exp(signed[:, 1] * SCALE)
    if c == 3:
        angle = angle + (u[:, 19] * 4).floor() * (math.pi / 2)
    flip = torch.where(u[:, 2] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack([torch.stack([cos * flip, -sin], 1), torch.stack([sin * flip, cos], 1)], 1)
    half = base[:, :, :2]
    matrices = torch.cat([half @ turn, base[:, :, 2:] + half @ (2 * SHIFT * signed[:, 3:5, None])], 2)
    basis = spline_basis(size, 5, device)
    lattice = (2 * torch.rand(n, 2, 5, 5, generator=generator, device=device) - 1) * (2 * ELASTIC * strength)
    displacement = (basis @ lattice @ basis.T).permute(0, 2, 3, 1) * half[:, None, None, 0, 0, None]
    x = warp(images, matrices, size, displacement)

    if c == 3:
        x = change_stains(x, torch.exp(signed[:, 5:8] * STAIN), signed[:, 8:11] * STAIN_SHIFT).clamp_(0, 1)
    else:
        depth = spline_basis(size, 4, device) @ signed[:, 8:12, None] * DEPTH_GAIN + signed[:, None, 5:6] * GAIN
        x = x.clamp_(min=1e-4).pow_(torch.exp(signed[:, 6] * GAMMA)[:, None, None, None]).mul_(depth.exp()[:, None])
        sigma = u[:, 7, None, None, None] * (SPECKLE * strength)
        x = x.addcmul_(x * torch.randn(n, 1, size, size, generator=generator, device=device), sigma).clamp_(0, 1)
    chosen = torch.nonzero(u[:, 12] < strength / 3)[:, 0]
    if len(chosen):
        x[chosen] = blur(x[chosen], u[chosen, 13] * BLUR * strength * size / 128)
    centre, extent = u[:, 14:16], u[:, 16:18] * (CUTOUT * min(strength, 2) / 2) * (u[:, 18:19] < 1 / 3)
    axis = (torch.arange(size, device=device) + 0.5) / size
    inside = (axis - centre[:, :, None]).abs() < extent[:, :, None]  # (N, 2, size): x, y
    hole = inside[:, 1, :, None] & inside[:, 0, None, :]
    x = torch.where(hole[:, None], x.mean((2, 3), keepdim=True), x)
    return x, None if boxes is None else move_boxes(boxes, matrices)


def change_stains(images, scale, shift):
    """Colours (N, 3, H, W) in [0, 1] whose stains, unmixed in optical density, are scaled and shifted, each (N, 3)."""
    stains = STAINS.to(images.device)
    mix = torch.linalg.inv(stains) @ (scale[:, :, None] * stains)  # unmix, scale and mix again is one 3 x 3 product
    density = -images.clamp(min=1 / 255).log().flatten(2)
    changed = mix.mT @ density + (shift @ stains)[:, :, None]
    return torch.exp(-changed).view_as(images)


def move_boxes(boxes, matrices):
    """Where boxes (N, 4) in [0, 1] lie after `warp` by these matrices: the bounds of the moved inscribed ellipse."""
    linear = torch.linalg.inv(matrices[:, :, :2])
    centre = (linear @ ((boxes[:, :2] + boxes[:, 2:] - 1)[:, :, None] - matrices[:, :, 2:]))[:, :, 0]
    extent = (linear * (boxes[:, None, 2:] - boxes[:, None, :2])).norm(dim=2)
    return (torch.cat([centre - extent, centre + extent], 1) / 2 + 0.5).clamp(0, 1)


def blur(images, sigma):
    """Gaussian blur of (N, C, H, W) with each image's own sigma (N,) in pixels: a grouped convolution a side."""
    n, c, h, w = images.shape
    radius = min(4, max(h, w) - 1)
    t = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-(t**2) / (2 * sigma[:, None].clamp(min=0.05) ** 2), 1).repeat_interleave(c, 0)
    x = F.pad(images.reshape(1, n * c, h, w), (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=n * c).reshape(n, c, h, w)


# ---------------------------------------------------------------------------------------------------------------------
# Phantoms: the data set that is always there


def phantoms(n=800, size=128, seed=0):
    """Synthetic breast ultrasound with masks: an ImageSet of n images, 40 % malignant. Seeded; needs no file.

    Layers (skin, fat, glandular tissue, muscle), acoustic shadows and fat lobules that mean nothing, and one lesion
    whose signs follow the BI-RADS lexicon (ACR 2013), each drawn by itself and overlapping between the classes:

        sign          benign                       malignant
        shape         oval                         irregular
        margin        smooth                       lobulated, spiculated, with a blurred edge
        orientation   wider than tall              taller than wide
        posterior     enhancement                  shadow

    Speckle is the magnitude of a complex Gaussian field seen through the beam (Wagner et al. 1983), log-compressed.
    Where the lesion lies, its size, its darkness and the gain say nothing, so a linear model on the pixels is lost."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 5 < 2).long()[torch.randperm(n, generator=generator)]
    parts = [phantom_batch(chunk, size, generator) for chunk in labels.split(64)]
    pixels, masks = (torch.cat(p) for p in zip(*parts, strict=True))
    boxes = torch.from_numpy(np.stack([box_of(m) for m in masks.numpy()])) / size
    return ImageSet(
        pixels,
        labels,
        boxes,
        masks,
        torch.arange(n),
        [""] * n,
        None,
        [f"phantom#{i}" for i in range(n)],
        ["benign", "malignant"],
        source="phantoms",
        thumbnails=torch.from_numpy(np.stack([thumbnail(Image.fromarray(p[0])) for p in pixels.numpy()])),
    )


def phantom_batch(labels, size, generator):
    """The phantoms of one batch of labels: pixels uint8 (N, 1, S, S), masks bool (N, S, S)."""
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    def sign(benign, malignant, spread):  # a BI-RADS sign: its mean depends on the class, and the classes overlap
        mean = torch.where(labels == 1, malignant, benign)[:, None, None]
        return mean + spread * torch.randn(n, 1, 1, generator=generator)

    axis = (torch.arange(size) + 0.5) / size
    y, x = axis[None, :, None], axis[None, None, :]

    # Echo strength of the tissue, in dB: wavy layers from the skin down to the muscle.
    wave = sum(
        a * torch.sin(2 * math.pi * f * x + p)
        for a, f, p in (
            (uniform(0, 0.03), uniform(0.3, 1), uniform(0, 6.3)),
            (uniform(0, 0.015), uniform(1, 3), uniform(0, 6.3)),
        )
    )
    fat, muscle = uniform(0.12, 0.35) + wave, uniform(0.7, 0.95) + wave
    echo = torch.full((n, size, size), -9.0) + 0 * y
    streaks = torch.sin(2 * math.pi * (uniform(4, 9) * (y + wave) + uniform(0, 1))) * uniform(0.5, 3)
    echo = torch.where(y > fat, uniform(-4, 1) + streaks, echo)
    echo = torch.where(y > muscle, uniform(-10, -5) + 3 * torch.sin(2 * math.pi * 20 * (y + wave)), echo)
    echo = torch.where(y < uniform(0.02, 0.05), 4.0, echo)
    for _ in range(3):  # fat lobules: dark and oval like a lesion, faint
        distance = ((x - uniform(0, 1)) / uniform(0.05, 0.15)) ** 2 + (
            (y - uniform(0.1, 0.9)) / uniform(0.03, 0.08)
        ) ** 2
        echo = echo - uniform(0, 5) * torch.sigmoid(6 * (1 - distance))
    for _ in range(4):  # shadows of ligaments and ribs: dark stripes that mean nothing
        stripe = torch.sigmoid(
            (uniform(0.01, 0.06) - (x - uniform(0, 1) - uniform(-0.2, 0.2) * y).abs()) * 80
        ) * torch.sigmoid((y - uniform(0.05, 0.7)) * 30)
        echo = echo - uniform(-6, 10) * stripe

    # The lesion, as a closed curve r(angle) around its centre.
    area = uniform(0.09, 0.19)
    aspect = torch.exp(sign(0.36, -0.14, 0.17)).clamp(0.45, 2.5)  # width over height
    rx, ry = area * aspect.sqrt(), area / aspect.sqrt()
    cx, cy = uniform(0.15, 0.85), uniform(0.22, 0.75)
    tilt = uniform(-0.25, 0.25)
    dx, dy = (x - cx) * tilt.cos() + (y - cy) * tilt.sin(), (y - cy) * tilt.cos() - (x - cx) * tilt.sin()
    angle = torch.atan2(dy / ry, dx / rx)
    lobes, spicules = sign(0.03, 0.09, 0.025).clamp(min=0), sign(0.01, 0.11, 0.035).clamp(min=0)
    edge = 1 + lobes * sum(torch.sin(k * angle + uniform(0, 6.3)) for k in (2, 3, 4)) / 1.5
    edge = edge + spicules * torch.sin(torch.round(uniform(7, 12)) * angle + uniform(0, 6.3)).clamp(min=0)
    radius = torch.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    mask = radius < edge
    softness = sign(0.03, 0.13, 0.03).clamp(0.01, 0.3)  # an indistinct margin
    inside = torch.sigmoid((edge - radius) / softness)
    echo = torch.lerp(echo, uniform(-20, -12) + 0 * echo, inside)

    # What the sound that crossed the lesion does behind it: the sum over the path gives the shape of the shadow.
    path = (mask.float().cumsum(1) / size / (2 * ry)).clamp(max=1.2)
    behind = path * torch.sigmoid((y - cy) * 20) * (~mask)
    echo = echo + sign(1.5, -3.0, 2.5) * behind

    # Speckle, seen through a beam that is wider than its pulse is long, and widens with depth.
    field = torch.randn(n, 2, size, size, generator=generator)
    beam = size / 128
    narrow = blur_anisotropic(field, 0.6 * beam, 0.9 * beam)
    wide = blur_anisotropic(field, 0.7 * beam, 1.8 * beam)
    speckle = torch.lerp(narrow, wide, y[:, None]).square().sum(1)
    level = echo + 10 * torch.log10(speckle + 1e-3)
    level = level - 0.5 * level.mean(2, keepdim=True)  # time-gain compensation: the scanner evens out the depths ...
    level = level - uniform(-6, 10) * (y - 0.5) + uniform(-7, 3)  # ... and the operator turns the knobs
    pixels = (level + 30) / 48
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)[:, None], mask


def blur_anisotropic(field, sigma_y, sigma_x):
    """Blur (N, C, H, W) by one Gaussian, then scale it back to unit variance."""
    for sigma, dim in ((sigma_y, 2), (sigma_x, 3)):
        t = torch.arange(-6, 7)
        kernel = torch.exp(-(t**2) / (2 * sigma**2))
        kernel = (kernel / kernel.norm()).reshape(1, 1, *((-1, 1) if dim == 2 else (1, -1)))
        pad = (0, 0, 6, 6) if dim == 2 else (6, 6, 0, 0)
        n, c, h, w = field.shape
        field = F.conv2d(F.pad(field.reshape(n * c, 1, h, w), pad, mode="replicate"), kernel).reshape(n, c, h, w)
    return field
