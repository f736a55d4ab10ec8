"""Images in: everything between files on a disk and a batch of pixels that a network can learn from.

    images = load("BUSI", size=128, positive="malignant")     # any layout of readers.py, or None: phantoms
    rows = images.rows("train")                               # indices, not copies
    pixels, boxes = images.pixels[rows[:32]], images.boxes[rows[:32]]

Three promises. The aspect ratio is KEPT (letterbox): "taller than wide" is a sign of malignancy. Malignant is the
positive class whatever number the source gave it, and the counts are printed at every load so that a flip is seen.
Images of one patient, one lesion, or near-duplicates of each other share a group, and a group is never split.
"""

import concurrent.futures
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
from PIL import Image

from augment import clahe
from grouping import merge_groups, near_duplicates, partition
from phantoms import phantoms
from pictures import box_of, fit, letterbox, open_image, origin, own_part, read_image, thumbnail
from readers import InputError, find_entries, natural, one_line


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
    beside: torch.Tensor | None = None  # bool (N, S, S), what a person called beside the point: no evidence
    placeholder_boxes: bool = False  # the boxes are dummies: every report says so
    source: str = ""
    thumbnails: torch.Tensor | None = None  # uint8 (N, 1, 28, 28): what near-duplicates are found by; None: not known
    group_names: list[str] = dataclasses.field(default_factory=list)  # the source's words for patients, lesions; or ""

    def __len__(self):
        return len(self.labels)

    def rows(self, split):
        """Indices (int64) of the LABELLED images in a split."""
        found = enumerate(zip(self.splits, self.labels.tolist(), strict=True))
        return torch.tensor([i for i, (s, label) in found if s == split and label >= 0], dtype=torch.long)

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

    def drawn(self):
        """A word that changes when a box, a lesion's mask (a black one tells that there is none), or one of what is beside
        the point does."""
        word = hashlib.blake2b(self.boxes.numpy().tobytes() + self.outlined.numpy().tobytes(), digest_size=8)
        for masks in (self.masks, self.beside):
            for part in () if masks is None else masks.split(256):
                word.update(part.numpy().tobytes())
            word.update(b"and")
        return word.hexdigest()

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
        if self.beside is not None:
            lines.append(f"  marked as beside the point: {int(self.beside.flatten(1).any(1).sum())}")
        return "\n".join(lines)


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


def find_groups(entries, labels, classes, thumbnails, split_by_image, log=print):
    """The group (N,) of each image: the source's patients or lesions, else the near-duplicates that the thumbnails show."""
    if split_by_image:
        log("SPLIT BY IMAGE: patients, lesions and near-duplicates may lie on both sides; the result claims too much")
        return torch.arange(len(entries))
    words = [e.group or f"image {i}" for i, e in enumerate(entries)]
    groups = torch.from_numpy(np.unique(words, return_inverse=True)[1])
    if all(e.group for e in entries):
        return groups  # a source that names patients or lesions knows better than a thumbnail
    pairs = near_duplicates(thumbnails, progress)
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


def decode_entry(entry, size, channels, equalise, window=None):
    """What is kept of one entry, see kept_files. InputError: it can't be read, or its mask or box can't be its own."""
    image = read_image(entry.image, channels, window)
    about, (pixels, (sx, sy, left, top)) = origin(image), letterbox(image, size)
    if equalise:
        pixels = clahe(torch.from_numpy(pixels)[None])[0].numpy()
    lesion, mask = read_masks(entry.masks, image, about, size)
    box = box_of(lesion) if entry.box is None else np.array(entry.box, np.float32) - about.corner * 2
    if entry.box is not None and not lies_inside(box.tolist(), image.size):
        seen = f"{about.whole[0]}x{about.whole[1]} pixels"
        seen += f", of which {image.width}x{image.height} from {about.corner} are seen" if any(about.corner) else ""
        raise InputError(f"its box {entry.box} is no x_min, y_min, x_max, y_max in its {seen}")
    box = np.clip((box * [sx, sy, sx, sy] + [left, top, left, top]) / size, 0, 1).astype(np.float32)
    notes = np.array([*(about.window or [math.nan] * 2), about.frames], np.float32)
    plain = read_image(entry.image, channels) if window and about.window else image
    found = {"pixels.u8": pixels, "masks.u8": mask, "boxes.f32": box, "thumbs.u8": thumbnail(plain), "notes.f32": notes}
    beside = read_masks(entry.beside, image, about, size)[1] if entry.beside else np.zeros((size, size), bool)
    return found | {"beside.u8": beside}


def read_masks(paths, image, about, size):
    """The union of mask files (bool) as the image is seen, in its own pixels and letterboxed to (size, size)."""
    whole, square = np.zeros(image.size[::-1], bool), np.zeros((size, size), bool)
    for path in paths:
        try:
            m = read_image(path, 1)
        except InputError as e:
            raise InputError(f"its mask {path}: {e}") from e
        if m.size != about.whole:
            raise InputError(f"its mask {path} is {m.width}x{m.height}, the image {about.whole[0]}x{about.whole[1]}")
        top_value = m.getextrema()[1]
        if top_value == 1:  # written as 0 and 1
            m = m.point(lambda v: 255 * v)
        elif 1 < top_value <= 127:
            raise InputError(f"its mask {path} goes from 0 to {top_value}; write 0 and 255, or 0 and 1")
        values = own_part(np.asarray(m), about)
        whole |= values > 127
        x, y, w, h = fit(image.size, size)
        small = np.array(Image.fromarray(values).resize((w, h), Image.Resampling.BILINEAR)) > 127
        if not small.any():  # strokes thinner than half a pixel of the square: where they run
            rows, columns = np.nonzero(values > 127)
            small[rows * h // image.height, columns * w // image.width] = True
        square[y : y + h, x : x + w] |= small
    return whole, square


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
    """What is kept of each image, {file of the cache: (type, shape)}: masks of either kind only where there are any."""
    files = {"pixels.u8": (np.uint8, (channels, size, size)), "boxes.f32": (np.float32, (4,))}
    files["thumbs.u8"] = (np.uint8, (1, 28, 28))
    for name, some in (("masks.u8", "masks"), ("beside.u8", "beside")):
        if any(getattr(e, some) for e in entries):
            files[name] = (bool, (size, size))
    return files | {"notes.f32": (np.float32, (3,))}  # the values that became black and white, or NaN; and the frames


def decode(
    entries, size, channels, equalise=False, cache=None, skip_bad=False, box_format="xyxy", window=None, log=print
):
    """Decode all entries in threads: (pixels uint8 (N, C, S, S), masks and what is beside the point bool (N, S, S) or None,
    boxes (N, 4), thumbnails uint8 (N, 1, 28, 28), kept rows).

    With a `cache` folder the result is memory-mapped from there: the second start is immediate, and a set larger than
    memory works. The key is the files' names, sizes and times (or the pixels, where there are no files), and how they are
    decoded. All bad files are reported at once."""
    layout, work, folder = kept_files(entries, size, channels), (entries, size, channels, equalise, window), None
    if cache:
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
        source = map_file(folder / name, kind) if folder else np.frombuffer(files[name].getbuffer(), kind)
        tensors[name] = torch.from_numpy(source.reshape(-1, *shape))
    if "beside.u8" in tensors and not tensors["beside.u8"].any():  # empty marks are none
        del tensors["beside.u8"]
    wide, clips = int(tensors["notes.f32"][:, 0].isfinite().sum()), int((tensors["notes.f32"][:, 2] > 1).sum())
    if wide:
        fixed = window and f"{window[0]:g} is black and {window[1]:g} white"
        own = "each by its own range or its file's window"
        log(f"{wide} images of more than 8 bits: {fixed or own} (--window)")
    if clips:
        log(f"{clips} clips: of each the first frame is taken")
    return *map(tensors.get, ("pixels.u8", "masks.u8", "beside.u8", "boxes.f32", "thumbs.u8")), kept


def map_file(path, kind):
    """A file as an array that takes no memory before it is read; what is written to it stays in memory, where that can
    hold the whole, and else is not allowed."""
    try:
        return np.memmap(path, kind, "c")
    except OSError:  # so large a map must not be one that could be written to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return np.memmap(path, kind, "r")


def cache_key(entries, size, channels, equalise, window):
    """Names the folder of a decoded data set: another file, size or time of a file is another folder."""
    key = hashlib.sha256(json.dumps(["v6", size, channels, equalise, window]).encode())
    for e in entries:
        if isinstance(e.image, np.ndarray):
            key.update(json.dumps([e.image.shape, e.box]).encode() + e.image.tobytes())
            continue
        key.update(json.dumps([len(e.masks), len(e.beside)]).encode())  # so that no mask passes for the next image
        for p in [e.image, *e.masks, *e.beside]:
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


def decode_into(files, entries, size, channels, equalise, window):
    """Decode in threads, in pieces, so that a large set never waits in memory as a whole: (kept rows, bad files)."""

    def attempt(entry):
        try:
            return decode_entry(entry, size, channels, equalise, window)
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
    skip_bad=False, split_by_image=False, seed=0, dummy_boxes=False, box_format="xyxy", meta_spec=None, window=None, log=print,
):  # fmt: skip
    """Any data set as an ImageSet, split and grouped. See readers.py for the layouts.

    source: a path, "breastmnist", or None for the phantoms. size: S in pixels. positive, drop: see resolve_classes.
    channels: 1, 3, or None to look. equalise: CLAHE. columns: {"image": "image_id", "meta": ["age"], ...} for a CSV.
    split_by_image: every image is a group of its own, to show what that would wrongly claim.
    dummy_boxes: give every image without a box the central placeholder box. box_format: what the source's four numbers
    are, "xyxy" or "xywh" (x, y, width, height). meta_spec: of a model that is to read the patient data, see encode_meta.
    window: (low, high), see pictures.read_frames.
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
    work = (entries, size, channels, equalise, cache, skip_bad, box_format, window, log)
    pixels, masks, beside, boxes, thumbnails, kept = decode(*work)
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
        torch.tensor([bool(e.masks) for e in entries]) | boxes[:, 0].isfinite(), beside, bool(unknown.any()), str(source), thumbnails,
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
    group. What describes the set as a whole is that of `a`; metadata is kept where both have it, masks where one has."""
    b = dataclasses.replace(b, groups=b.groups + (int(a.groups.max()) + 1 if len(a) else 0))
    both = {}
    for name in ("pixels", "labels", "boxes", "masks", "beside", "groups", "meta", "outlined", "thumbnails"):
        x, y = getattr(a, name), getattr(b, name)
        if name in ("masks", "beside") and (x is None) != (y is None):
            both_of = ((x, a), (y, b))
            x, y = (torch.zeros(len(s), *s.pixels.shape[2:], dtype=torch.bool) if m is None else m for m, s in both_of)
        both[name] = None if x is None or y is None else torch.cat([x, y])
    both |= {name: getattr(a, name) + getattr(b, name) for name in ("splits", "names", "group_names")}
    first, known = {}, torch.tensor([bool(word) for word in both["group_names"]], dtype=torch.bool)
    pairs = [(first.setdefault(word, i), i) for i, word in enumerate(both["group_names"]) if word]
    pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    if both["thumbnails"] is not None:
        alike = near_duplicates(both["thumbnails"], progress)
        across = (alike < len(a)).sum(1) == 1  # within one set two patients that look alike are two, see find_groups
        pairs = torch.cat([pairs, alike[across | ~known[alike].all(1)]])
    both["groups"] = merge_groups(both["groups"], pairs)
    return dataclasses.replace(a, **both)
