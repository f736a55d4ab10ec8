"""Readers: from a path to entries, one short reader a layout. Nothing is decoded here; data.py does that.

    entries = find_entries("BUSI", {}, "data")

What lies there decides which reader is taken:

    nothing               the built-in phantoms, synthetic breast ultrasound (data.py)
    breastmnist           the original file, downloaded and checked
    FILE.npz              {train,val,test}_images, _labels, optionally _bboxes in pixels; or the train_* keys alone
    FOLDER/CLASS/*.png    one folder a class, with NAME_mask.png, NAME_mask_1.png beside an image where there are masks
    FOLDER/train/CLASS/*, FOLDER/val/CLASS/*, FOLDER/test/CLASS/*     (or training_set, testing_set)
    FOLDER/PATIENT/0/*, FOLDER/PATIENT/1/*                    (IDC histopathology; a patient is never split)
    FILE.csv              one row an image; flags name the columns
    FOLDER/feedback.csv   the same, of a folder that app.py writes
    FOLDER/*.png          no labels: a pool to predict on

Where *.png stands any image may lie, DICOM files too, also under names without an ending. The patient that a DICOM file
names (hashed) is its group, where the source tells no other."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np

import dicom


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what to do; of several things wrong at once
    a line each, all but the first indented by two. A bug is never this."""

    def __init__(self, message):
        super().__init__("\n  ".join(map(one_line, message.split("\n  "))))


def one_line(text):
    """A text that quotes names and cells as they came, fit for a terminal: nothing in it starts a line, moves the cursor,
    or fills the screen."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-150:]}"


@dataclasses.dataclass(slots=True)
class Entry:
    """One image as a reader found it."""

    image: str | np.ndarray  # a path, or uint8 (H, W) or (H, W, 3)
    name: str
    label: str = ""  # the source's own word for the class; "" = not labelled
    masks: list[str] = dataclasses.field(default_factory=list)
    beside: list[str] = dataclasses.field(default_factory=list)  # masks of what a person called beside the point
    box: tuple | None = None  # x_min, y_min, x_max, y_max in pixels of the original image
    group: str = ""  # patient or lesion; "" = not known
    split: str = ""
    row: dict | None = None  # patient metadata as the source wrote it
    line: int = 0  # where a CSV names it


DICOM_SUFFIXES = {".dcm", ".dicom"}
IMAGE_SUFFIXES = DICOM_SUFFIXES | {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
MASK = re.compile(r"(.*)_mask(_\d+)?$")
SPLIT_WORDS = {"": "", "train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val"}
SPLIT_FOLDERS = {f"{word}{end}": split for word, split in SPLIT_WORDS.items() if word for end in ("", "_set")}
BREASTMNIST = "https://zenodo.org/records/10519652/files/breastmnist.npz?download=1"
BREASTMNIST_BYTES = 559_580
BREASTMNIST_MD5 = "750601b1f35ba3300ea97c75c52ff8f6"


def natural(text):
    """Sort key that puts "image (9)" before "image (10)"; of two numbers the longer is the larger, as int takes few."""
    parts = enumerate(re.split(r"(\d+)", str(text)))
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part.lower() for i, part in parts]


def is_image(path):
    """Whether a file's name has the ending of an image, or has none, or a number's (1.2.840.1), and it is DICOM inside. The
    list of contents of a medium is no image."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return path.is_file()
    unnamed = not suffix or suffix[1:].isdecimal()
    return unnamed and path.name.upper() != "DICOMDIR" and path.is_file() and dicom.is_dicom(path)


def image_files(folder):
    return sorted(filter(is_image, Path(folder).iterdir()), key=natural)


def stem(path):
    """The name without its ending, if that is one."""
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def header_data(image):
    """{"group", "age", "laterality"} of what a DICOM file tells of its patient, see dicom.patient; {} for any other image,
    and for a file that can't be read: that is said when it is decoded."""
    if not isinstance(image, (str, Path)) or Path(image).suffix.lower() in IMAGE_SUFFIXES - DICOM_SUFFIXES:
        return {}
    with contextlib.suppress(dicom.Refused):
        return dicom.patient(dicom.read_header(image)) if dicom.is_dicom(image) else {}
    return {}


def walk(folder):
    """All folders in a folder and below, itself first, through links too, each once: (path, names of its files)."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()  # a link in a circle
            continue
        seen.add(real)
        yield path, files


def subfolders(folder):
    return sorted((p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural)


def read_images(folder, **known):
    """The images of one folder, with their masks. NAME_mask.png belongs to NAME.png and is no image of its own."""
    files = image_files(folder)
    stems = {stem(p) for p in files}
    masks = {}
    for p in files:
        if (m := MASK.match(stem(p))) and m[1] in stems:
            masks.setdefault(m[1], []).append(str(p))
    taken = {m for found in masks.values() for m in found}
    return [Entry(str(p), str(p), masks=masks.get(stem(p), []), **known) for p in files if str(p) not in taken]


def read_class_folders(folder, split=""):
    """CLASS/*.png (BUSI). The label is the folder's name."""
    return [e for sub in subfolders(folder) for e in read_images(sub, label=sub.name, split=split)]


def read_split_folders(folder):
    """SPLIT/CLASS/*, as in training_set, testing_set, or train, val, test. The split is the source's."""
    entries = []
    for sub in subfolders(folder):
        if sub.name.lower() not in SPLIT_FOLDERS:
            raise InputError(f"{sub}: beside folders of splits, but no split itself; move it elsewhere")
        if image_files(sub):
            raise InputError(f"{sub}: a split holds a folder for each class, but here lie images; sort them by class")
        entries += read_class_folders(sub, SPLIT_FOLDERS[sub.name.lower()])
    return entries


def read_patients(folder):
    """PATIENT/0/* and PATIENT/1/* (Cruz-Roa et al. 2014): 1 is invasive ductal carcinoma. The group is the patient."""
    entries = []
    for patient in subfolders(folder):
        before = len(entries)
        for name, label in (("0", "no IDC"), ("1", "IDC")):
            if (patient / name).is_dir():
                entries += read_images(patient / name, label=label, group=patient.name)
        if len(entries) == before:
            raise InputError(f"{patient}: a patient folder without patches; remove it, or put images under 0/ and 1/")
    return entries


def read_npz(path):
    """MedMNIST's layout. Which number is malignant is the SOURCE's convention: in BreastMNIST 0 is malignant."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file.files
            wanted = {f"{split}_{key}" for split in ("train", "val", "test") for key in ("images", "labels", "bboxes")}
            arrays = {k: np.asarray(file[k]) for k in found if k in wanted}  # the others may be of any size
    except ValueError as e:
        raise InputError(f"{path}: holds pickled objects or is damaged, refused ({e}); save plain arrays") from e
    except Exception as e:  # zipfile and numpy raise a family of their own on files that are no npz
        raise InputError(f"{path}: not an npz file ({e})") from e
    word = {-1: ""}
    if Path(path).name.startswith("breastmnist") or is_breastmnist(path):
        word |= {0: "malignant", 1: "benign"}
    entries = []
    splits = [s for s in ("train", "val", "test") if f"{s}_images" in arrays]
    if not splits:
        raise InputError(f"{path}: no key train_images (found: {', '.join(found) or 'nothing'})")
    for split in splits:
        images, labels, boxes = npz_split(path, split, arrays)
        known, prefix = ("", "") if splits == ["train"] else (split, f"{split}/")  # train alone is no split
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            box = None if boxes is None or not np.isfinite(boxes[i]).all() else tuple(map(float, boxes[i]))
            label = word.get(int(label), str(int(label)))
            entries.append(Entry(image, f"{path}#{prefix}{i}", label, box=box, split=known))
    return entries


def npz_split(path, split, arrays):
    """Images (N, H, W) or (N, H, W, 3), labels (N,), boxes (N, 4) or None of one split, checked."""
    images, labels, boxes = (arrays.get(f"{split}_{key}") for key in ("images", "labels", "bboxes"))
    if labels is None:
        raise InputError(f"{path}: {split}_images has no {split}_labels beside it")
    if 0 in images.shape[1:]:
        raise InputError(f"{path}: {split}_images is {images.shape}: no pixels")
    found = f"{images.dtype} {images.shape}"
    if images.shape[3:] == (1,):
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
        raise InputError(f"{path}: {split}_images is {found}, not uint8 (N, H, W) or (N, H, W, 3)")
    if boxes is not None and (boxes.shape[1:] != (4,) or boxes.dtype.kind not in "iuf"):
        raise InputError(f"{path}: {split}_bboxes is {boxes.dtype} {boxes.shape}, not four numbers an image")
    labels = labels.reshape(-1, 1) if labels.size == len(images) or labels.ndim < 2 else labels
    if len(labels) == len(images) and labels.shape[1:] != (1,):
        raise InputError(f"{path}: {split}_labels has {labels[0].size} columns, one class an image is needed")
    for key, values in (("labels", labels), ("bboxes", boxes)):
        if values is not None and len(values) != len(images):
            raise InputError(f"{path}: {len(images)} {split}_images but {len(values)} {split}_{key}")
    if labels.dtype.kind not in "iufb" or not (np.isfinite(labels) & (labels == np.trunc(labels.astype(float)))).all():
        raise InputError(f"{path}: {split}_labels are no whole numbers; -1 = not labelled")
    return images, labels[:, 0], boxes


COLUMNS = dict.fromkeys(("image", "label", "group", "split", "mask", "not_this", "box", "meta"))


def table_of(path):
    """A folder of feedback, see app.py, stands for the table in it; anything else for itself."""
    table = Path(path) / "feedback.csv"
    return table if table.is_file() else Path(path)


def read_csv(path, columns):
    """One row an image. `columns` names the columns: image, label, group, split, mask, box, meta (see COLUMNS); not_this, as
    app.py writes it, is of masks of what is beside the point.

    The image column holds a path, absolute or relative to the CSV, or a bare name or id that is looked up, with or
    without its ending, in the CSV's folder and below."""
    path = table_of(path)
    rows, header = read_table(path)
    columns = choose_columns(path, columns, header)
    find, entries = finder(Path(path).parent), []
    for line, row in rows:
        where = f"{path}, line {line}"
        get = {k: row[v] if isinstance(v, str) else "" for k, v in columns.items()}
        if not get["image"]:
            raise InputError(f"{where}: no image named")
        split = SPLIT_WORDS.get(get["split"].lower())
        if split is None:
            raise InputError(f"{where}: split {get['split']!r} is none of train, val, test")
        numbers = re.findall(r"[^\s,;\[\]()]+", " ".join(row[c] for c in columns["box"]))
        try:
            box = tuple(float(v) for v in numbers) or None
        except ValueError:
            box = ()
        if box is not None and len(box) != 4:
            raise InputError(f"{where}: box {' '.join(numbers)!r} is not four numbers")
        masks, beside = (
            [find(m.strip(), where, True) for m in get[k].split(";") if m.strip()] for k in ("mask", "not_this")
        )
        if both := set(masks) & set(beside):
            raise InputError(f"{where}: {both.pop()} can't be both its mask and not_this")
        meta = {c: row[c] for c in columns["meta"]} or None
        image = find(get["image"], where, False)
        entries.append(Entry(image, image, get["label"], masks, beside, box, get["group"], split, meta, line))
    return entries


def read_table(path):
    """(rows, header) of a CSV as spreadsheets write it: commas, semicolons or tabs; UTF-8, UTF-16 or Latin-1. A row is
    (its line in the file, where it may follow upon blank ones, {column: cell})."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise InputError(f"{path}: not a CSV, it holds bytes of zero")
    first = text.splitlines()[0] if text else ""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), restval="")
        rows = [(reader.line_num, {k: v.strip() for k, v in row.items() if k is not None}) for row in reader]
        return rows, reader.fieldnames or []
    except csv.Error as e:
        raise InputError(f"{path}: not a CSV ({e})") from e


def choose_columns(path, columns, header):
    """The columns to read: those that were named, else those of the right name. Patient data have to be asked for."""
    single = ("image", "label", "group", "split", "mask", "not_this")
    columns = columns | {k: columns[k] or (k if k in header else None) for k in single}
    columns |= {"box": columns["box"] or (["box"] if "box" in header else []), "meta": columns["meta"] or []}
    there = f"(its columns: {', '.join(header)})"
    for name in [*(columns[k] for k in single if columns[k]), *columns["box"], *columns["meta"]]:
        if header.count(name) != 1:
            how_many = "more than one" if name in header else "no"
            raise InputError(f"{path}: {how_many} column {name!r} {there}")
    if columns["image"] is None:
        raise InputError(f"{path}: no column 'image'; name the one of the file names with --image-column {there}")
    return columns


def finder(root):
    """A function from a path, file name or id in a CSV to the file. A name with a folder is looked for there alone, one
    without in `root` and below, each with or without its ending. What is named like a mask, or lies in a folder of masks,
    is never taken for an image. A name that fits two files is an InputError."""

    @functools.cache
    def index(folder):
        """{name, or name without its ending: files} of the root and below, or of another folder by itself."""
        found = {}
        for path, files in walk(folder) if folder == root else [(folder, os.listdir(folder))]:
            for file in filter(is_image, (Path(path) / f for f in files)):
                for key in {file.name, stem(file)}:
                    found.setdefault(key, []).append(file)
        return found

    def of_masks(folder):
        return folder != root and "mask" in folder.name.lower()

    def find(value, where, mask):
        path = root / value
        if os.path.isfile(path):  # Path.is_file raises an OSError on a name that is too long
            return str(path)
        files = index(path.parent).get(path.name, []) if os.path.isdir(path.parent) else []
        fit = [p for p in sorted(files) if bool(MASK.match(stem(p)) or of_masks(p.parent)) == mask]
        fit = fit or (files if mask else [])
        if len(fit) > 1:
            raise InputError(f"{where}: {value!r} may be {fit[0]} or {fit[1]}; name it with its folder and ending")
        return str(fit[0] if fit else path)  # the last: missing, said later

    return find


def is_breastmnist(path):
    """Whether a file is the original one, by its MD5; one of another size, which may be large, is not read."""
    path = Path(path)
    return path.stat().st_size == BREASTMNIST_BYTES and hashlib.md5(path.read_bytes()).hexdigest() == BREASTMNIST_MD5


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
            cure = f"fetch {BREASTMNIST} yourself and give its path to --data"
            raise InputError(f"breastmnist: download failed ({e}); {cure}") from e
        os.replace(part, path)
    if not is_breastmnist(path):
        why = f"its MD5 is not {BREASTMNIST_MD5}"
        raise InputError(f"{path}: not the original BreastMNIST file ({why}); remove it and try again")
    return path


def find_entries(source, columns, folder):
    """The entries of a source, with what DICOM files tell of their patients where the source itself does not: the group,
    and in folders the patient data that columns["meta"] asks for."""
    entries, wanted = read_source(source, columns, folder), columns.get("meta") or []
    told = [header_data(e.image) for e in entries]
    for entry, known in zip(entries, told, strict=True):
        entry.group = entry.group or known.get("group", "")
    if wanted and Path(source).is_dir():
        if unknown := [c for c in wanted if c not in ("age", "laterality") or not any(told)]:
            raise InputError(
                f"--meta-columns {unknown[0]}: in a folder only DICOM files tell patient data, age and laterality"
            )
        for entry, known in zip(entries, told, strict=True):
            entry.row = {column: known.get(column, "") for column in wanted}
    return entries


def read_source(source, columns, folder):
    """Choose the reader by what lies there."""
    if source == "breastmnist":
        source = download_breastmnist(folder)
    path = table_of(source)
    if not path.exists():
        raise InputError(f"--data {source}: no such file or folder")
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path, {**COLUMNS, **columns})
    if not path.is_dir():
        raise InputError(f"--data {source}: neither a folder, nor .npz, nor .csv")
    folders = subfolders(path)
    if any(p.name.lower() in SPLIT_FOLDERS for p in folders):
        return read_split_folders(path)
    if any((p / label).is_dir() for p in folders for label in "01"):
        return read_patients(path)
    if any(image_files(p) for p in folders):
        return read_class_folders(path)
    if image_files(path):
        return read_images(path)
    hint = "expected CLASS/*.png, PATIENT/0 and PATIENT/1, or images"
    if tables := sorted(path.glob("*.csv")):
        hint = f"it holds {tables[0].name}: give that file"
    raise InputError(f"--data {source}: no images found in it; {hint}")
