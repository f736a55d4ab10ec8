"""Use a trained model: where is the lesion, how likely is it malignant, how sure is that?

    python infer.py image.png                                   the newest model under runs/
    python infer.py scans/ more.png --model runs/busi/model.pt --save-overlay out/
    python infer.py scans/ --json > results.jsonl               one JSON object a line
    python infer.py clip.dcm --every 2 --save-overlay out/      a clip: its most suspicious stretch, and an animation
    python infer.py --model runs/busi --evaluate                what more views are worth, on the held-out images

    from infer import BreastCancerDetector
    BreastCancerDetector("runs/busi/model.pt").predict("image.png")["probability"]

An image is letterboxed, D-Net gives the box, C-Net looks at the whole or at the crop (as it was trained), at several
views at once (test-time augmentation); the mean is calibrated and held against the validation threshold. What is near
the threshold, or where members and views disagree, is to be referred to a radiologist."""

import contextlib
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from answers import (
    KEYS,
    MOST_SIGMA,
    answer,
    describe_lesions,
    in_pixels,
    oddities,
    sentence,
    unlike,
    verdict,
    write_answers,
)
from augment import VIEWS, clahe
from data import encode_meta, meta_for, parse_meta
from files import write_atomically
from models import DISCLAIMER, choose_device, load_classifier, model_file
from options import THEIRS, WINDOW, build_parser, images_elsewhere, run_main
from pictures import (
    Origin,
    count_frames,
    letterbox,
    letterboxed_box,
    origin,
    parse_window,
    read_frames,
    read_image,
    stretch,
    to_mode,
)
from readers import (
    COLUMNS,
    MASK,
    InputError,
    header_data,
    image_files,
    natural,
    one_line,
    read_csv,
    read_table,
    stem,
    table_of,
    walk,
)


def check_views(views, scales, size):
    """Both, scales as a tuple. size: what the networks were trained at. InputError for what is out of range."""
    scales = (scales,) if isinstance(scales, (int, float)) else tuple(scales)
    if views not in range(1, len(VIEWS) + 1):
        raise InputError(f"--tta {views}: give 1 to {len(VIEWS)} views")
    if not scales or not all(0.25 <= s <= 4 for s in scales):
        raise InputError(f"--scales {' '.join(map(str, scales))}: give one or more of 0.25 to 4")
    if round(size * min(scales)) < 16:
        raise InputError(f"--scales {min(scales)}: of {size} pixels fewer than 16 are left; give {16 / size:g} or more")
    return views, scales


class BreastCancerDetector:
    """A model file, ready to predict. model: path, or None for the newest under runs/. device: auto, cpu, cuda.
    tta: number of views, 1 to 8, None = as many as the model was calibrated for. scales: of the resolution that C-Net
    sees, every view at each (multi-scale inference). window: (low, high), the values that become black and white in
    pictures of more than 8 bits; None: those of training, see pictures.read_frames.
    Raises InputError if the file is missing, damaged, or no model."""

    def __init__(self, model=None, device="auto", tta=None, scales=(1.0,), window=None):
        self.path = model_file(model)
        self.device = choose_device(device)
        self.model = load_classifier(self.path, self.device)
        self.info = self.model.info
        self.tta, self.scales = check_views(self.info["views"] if tta is None else tta, scales, self.info["size"])
        self.window = parse_window(window or self.info["window"])

    def predict(self, images, meta=None, boxes=None, masks=False):
        """A dict for one image, a list of dicts for several. An image is a path, bytes, an open file, a PIL image, an
        array uint8 (H, W) or (H, W, 3), or float in [0, 1], or a tensor (C, H, W); several are any iterable of those, an
        array (N, H, W) or (N, H, W, 3), or a tensor (N, C, H, W). InputError for what is none of these. meta: {"age":
        55, ...}, one dict for all or a list of them; what is not given counts as missing. boxes: where the lesion is, four
        numbers in the image's pixels, or a list of such; default: D-Net looks. masks: add the key "mask", the outline of all
        lesions, bool (h, w) of the image's own pixels, or None.

        Keys: image, prediction, probability (of the positive class, the last of the model's classes; of more than two
        classes: of the predicted one), confidence (the probability of the prediction), probabilities, uncertainty
        (standard deviation over members and views), box (x_min, y_min, x_max, y_max in the image's own pixels, or None),
        refer, reason (why to refer, or None), lesion_score (how sure it is that there is a lesion at all: below the model's
        threshold box is None), boxes (of all lesions, the likeliest first), outline (area, width_over_height and
        irregularity of the likeliest, see answers.describe_outline), window (the values that became black and white where
        the picture has more than 8 bits, or None), frame and clip (None: see predict_clip; of a file with several frames
        the first is looked at, and referred), error (None, or one line of why there is no answer, and the rest None)."""
        images, alone = one_by_one(images)
        metas = meta if isinstance(meta, (list, tuple)) else [meta] * len(images)
        boxes = [None] * len(images) if boxes is None else [boxes] if alone else list(boxes)
        if not len(images) == len(metas) == len(boxes):
            raise InputError(f"{len(metas)} patients' data and {len(boxes)} boxes for {len(images)} images")
        if 0 < sum(box is None for box in boxes) < len(boxes):
            raise InputError("boxes: give one for every image, or none at all")
        metas, results = list(map(self.patient, images, metas)), []
        for start in range(0, len(images), 32):  # a batch on the device while memory stays bounded
            results += self._predict_batch(*(v[start : start + 32] for v in (images, metas, boxes)), masks)
        return results[0] if alone else results

    def predict_clip(self, file, meta=None, every=1, watch=None):
        """(answers to every so many-th frame, answer to the clip) of a file, see predict. The clip's answer is that of its
        best frame, but for what the smoothed probabilities say, see clips.summary; "frame" is a frame's number, from 1, and
        the best one's; "clip" is None in a frame's answer, else {"frames": in the file, "looked_at", "stretch": [first,
        last]}. watch(answer, picture) is called with each frame as it comes. InputError where there is no frame at all."""
        answers, broken, count = [], None, 0
        with contextlib.closing(read_frames(file, 3, self.window, every=every)) as frames:
            while broken is None:
                batch = []
                try:
                    for number, picture in itertools.islice(frames, 32):
                        batch.append((number, picture))
                except InputError as e:
                    broken = str(e)
                if not batch:
                    break
                count = origin(batch[0][1]).frames
                if count > MOST_FRAMES * every:
                    enough = math.ceil(count / MOST_FRAMES)
                    raise InputError(f"{file}: {count} frames; look at fewer with --every {enough}")
                for (number, picture), said in zip(batch, self.predict([p for _, p in batch], meta), strict=True):
                    answers.append(said | {"image": str(file), "frame": number})
                    if watch:
                        watch(answers[-1], picture)
        if not answers:
            raise InputError(f"{file}: {broken}")
        return answers, self._conclude(answers, count, broken)

    def _conclude(self, answers, count, broken):
        """The answer to a clip of `count` frames from those to its frames. broken: why it ended too early, or None."""
        from clips import summary  # here and not above: a plain prediction starts without it

        good = [a for a in answers if a["error"] is None]
        if not good:
            return answers[0] | {"frame": None}
        said = summary(good, self.info["threshold"])
        best = good[said["best"]]
        reasons = best["reason"].split("; ") if best["reason"] else []
        if broken or len(good) < len(answers):
            reasons.append(f"only {len(good)} of its {count} frames could be read" + (f" ({broken})" if broken else ""))
        result = best | answer(said["probabilities"], said["uncertainty"], self.info, reasons)
        own = sum(a["prediction"] == self.info["classes"][-1] for a in good)
        if len(said["probabilities"]) == 2 and own and result["prediction"] == self.info["classes"][0]:
            why = f"{own} of its frames reach the threshold, if only by themselves"
            result |= {"refer": True, "reason": f"{result['reason']}; {why}" if result["reason"] else why}
        result["reason"] = "; ".join(dict.fromkeys((result["reason"] or "").split("; "))) or None  # each once
        stretch_seen = [good[said[end]]["frame"] for end in ("first", "last")]
        return result | {"clip": {"frames": count, "looked_at": len(answers), "stretch": stretch_seen}}

    def patient(self, image, meta=None):
        """What is known of a picture's patient: what a DICOM file tells, if the model asks for it, and over it `meta`."""
        asked = {s["column"] for s in self.info["meta_spec"]} & {"age", "laterality"}
        told = header_data(image) if asked else {}
        return {c: told[c] for c in asked if told.get(c)} | dict(meta or {})

    def adapt(self, images, metas=None):
        """Take BatchNorm's means and spreads from these images, and their patients' data where the model reads them, see
        `adapt` below."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            opened = list(pool.map(self._open, images))
        good = [i for i, o in enumerate(opened) if o["error"] is None]
        pixels = torch.from_numpy(np.stack([opened[i]["pixels"] for i in good])) if good else torch.zeros(0)
        patients, _ = self._patients(metas or [None] * len(images))
        patients = None if patients is None else patients[good]
        adapt(self.model, clahe(pixels) if good and self.info["equalise"] else pixels, None, patients)

    @torch.inference_mode()
    def _predict_batch(self, images, metas, boxes, masks):
        info = self.info
        patients, strange = self._patients(metas)
        with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
            opened = list(pool.map(self._open, images))
        keys = [*KEYS, "mask"] if masks else KEYS
        results = [dict.fromkeys(keys) | {"image": o["image"], "error": o["error"]} for o in opened]
        good = [i for i, result in enumerate(results) if result["error"] is None]
        if not good:
            return results
        pixels = torch.from_numpy(np.stack([opened[i]["pixels"] for i in good])).to(self.device)
        pixels = clahe(pixels) if info["equalise"] else pixels
        given = boxes[0] is not None
        if given:
            where = [(opened[i]["placement"], info["load_size"], opened[i]["origin"]) for i in good]
            boxes = [letterboxed_box(boxes[i], *place) for i, place in zip(good, where, strict=True)]
            boxes = torch.tensor(boxes, device=self.device)
        patients = None if patients is None else patients[good]
        said = self.model.look(pixels, boxes if given else None, patients, self.tta, self.scales)
        probabilities, uncertainty = self.model.conclude(said.opinions)
        far = self.model.strangeness(said.traits)
        for k, i in enumerate(good):
            reasons, doubt = opened[i]["reasons"] + strange[i] + unlike(float(far[k]), info), float(uncertainty[k])
            if said.boxes is not None and not said.boxes[k].isfinite().all():
                doubt = math.nan  # a D-Net that answers NaN is damaged, whatever C-Net says
            results[i] |= answer(probabilities[k].tolist(), doubt, info, reasons)
            results[i]["window"] = opened[i]["origin"].window
            if results[i]["error"] is not None:
                continue
            if said.found is not None and not given and self.model.tells_outlines:
                results[i] |= describe_lesions(said.found.at(k), opened[i], info, masks)
            else:  # given by the caller, or by a D-Net that tells no outlines, or none
                boxes = [] if said.boxes is None else [in_pixels(said.boxes[k], opened[i], info["load_size"])]
                results[i] |= {"box": next(iter(boxes), None), "boxes": boxes}
        return results

    def _patients(self, metas):
        """Data (N, M) of N patients, or None where the model knows none; and what is strange about each, lists of words."""
        spec, strange = self.info["meta_spec"], [[] for _ in metas]
        if not spec:
            if any(metas):
                raise InputError("--meta: this model was trained on images alone")
            return None, strange
        rows, known = [{str(k): str(v) for k, v in (meta or {}).items()} for meta in metas], {s["column"] for s in spec}
        if unknown := {k for row in rows for k in row} - known:
            raise InputError(f"--meta {min(unknown)}: the model knows {', '.join(sorted(known))}")
        coded, names, _ = encode_meta(rows, None, spec)
        for s in (s for s in spec if "mean" in s):
            for i in (coded[:, names.index(s["column"])].abs() > MOST_SIGMA).nonzero()[:, 0].tolist():
                strange[i].append(f"{s['column']}={rows[i][s['column']]} is far from what training saw")
        return coded.to(self.device), strange

    def _open(self, image):
        """One image as a dict: image (its name or None), pixels (letterboxed), placement, origin, reasons, error."""
        opened = {"image": str(image) if isinstance(image, (str, Path)) else None, "error": None}
        image = array_image(image, self.window) if isinstance(image, (np.ndarray, torch.Tensor)) else image
        try:
            if isinstance(image, Image.Image):
                picture = to_mode(image, 3, self.window)
            else:
                picture = read_image(io.BytesIO(image) if isinstance(image, bytes) else image, 3, self.window)
            about, channels = origin(picture), self.info["channels"]
            opened |= {"origin": about, "reasons": oddities(picture, channels)}
            if about.frames > 1 and not isinstance(image, Image.Image):
                opened["reasons"].append(
                    f"it is a clip of {about.frames} frames, of which only the first was looked at"
                )
            picture = picture.convert("L") if channels == 1 else picture  # greys come back as they were
            opened["pixels"], opened["placement"] = letterbox(picture, self.info["load_size"])
        except InputError as e:
            opened["error"] = str(e)
        except Exception as e:  # a PIL image that is cut off, of no pixels, of a mode that can't be converted ...
            opened["error"] = one_line(f"no image that can be read ({str(e) or type(e).__name__})")
        return opened

    def describe(self):
        """Where the model comes from, in one line."""
        made, warning = self.info["made"], ""
        counts = Counter(m.config["model"] for m in self.model.members)
        members = "+".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items())
        if made.get("data") == "phantoms":
            warning = "; trained on PHANTOMS, its answer on a real picture means nothing"
        if (self.tta, self.scales) != (self.info["views"], (1.0,)):
            calibrated = f"{self.info['views']} view{'s' if self.info['views'] > 1 else ''} at scale 1"
            warning += f"; temperature and threshold were set for {calibrated}, with others they mean something else"
        if self.window != parse_window(self.info["window"]):
            warning += "; the --window is another than in training"
        warning += "; PLACEHOLDER BOXES" if made.get("placeholder_boxes") else ""
        return f"model {self.path}: {members} of {made.get('data')}, {self.info['size']} px{warning}"


def one_by_one(images):
    """(list of images, whether there is but one). A batch as an array or a tensor is taken apart."""
    if isinstance(images, torch.Tensor) and images.dim() == 4:
        return list(images), False
    if isinstance(images, np.ndarray) and (images.ndim == 4 or (images.ndim == 3 and images.shape[2] not in (1, 3, 4))):
        return list(images), False
    single = (str, Path, bytes, Image.Image, np.ndarray, torch.Tensor)
    if isinstance(images, single) or hasattr(images, "read"):
        return [images], True
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise InputError(f"{type(images).__name__} is no image: give a path, a PIL image, an array or a list of them")
    images = list(images)
    for i, image in enumerate(images):
        if not (isinstance(image, single) or hasattr(image, "read")):
            raise InputError(f"image {i} is a {type(image).__name__}: give a path, a PIL image or an array")
    return images, False


def array_image(array, window=None):
    """An array (H, W), (H, W, C) or a tensor (C, H, W) as a PIL image. Integers in 0 ... 255 are taken as they are, floats
    in [0, 1] and bools are scaled; anything else goes by its own range. With a window (low, high) only bytes and bools are
    taken as they are."""
    if isinstance(array, torch.Tensor):  # channels first
        array = array.detach().cpu().float() if array.dtype == torch.bfloat16 else array.detach().cpu()
        array = array.permute(1, 2, 0) if array.dim() == 3 else array
    array = np.asarray(array)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"{array.shape} is no image: give an array (H, W) or (H, W, 3), or a tensor (C, H, W)")
    kind = array.dtype.kind
    if kind not in "buif" or not np.isfinite(array).all():
        raise InputError(f"an array of {array.dtype} is no image" if kind not in "buif" else "it holds NaN or infinity")
    low, high, seen = float(array.min()), float(array.max()), None
    if kind == "b" or (kind == "f" and low >= 0 and high <= 1 and not window):
        low, high = 0.0, 1.0
    elif array.dtype == np.uint8 or (kind in "ui" and low >= 0 and high <= 255 and not window):
        low, high = 0.0, 255.0
    else:
        low, high = seen = window or (low, high)
    array = stretch(array, low, high)
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else np.ascontiguousarray(array)
    image = Image.fromarray(array)
    image.info[Origin] = Origin(image.size, image.size, window=seen)
    return image


def collect(paths, columns=(), image_column=None):
    """[(file, patient data or None)]. Files as they are; of a folder all images in it and below, but not the masks beside
    them; of a CSV (see readers.read_csv), and of a folder of feedback, its images, with those of the columns that it has."""
    files = []
    for path in map(table_of, paths):
        if path.suffix.lower() == ".csv":
            told = [c for c in columns if c in read_table(path)[1]]
            entries = read_csv(path, COLUMNS | {"image": image_column, "meta": told})
            if not entries:
                raise InputError(f"{path}: no image in this table")
            files += [(e.image, e.row) for e in entries]
            continue
        found = [path]
        if path.is_dir():
            found = [p for folder, _ in walk(path) for p in image_files(folder)]
            stems = {(p.parent, stem(p)) for p in found}
            found = [p for p in found if not ((m := MASK.match(stem(p))) and (p.parent, m[1]) in stems)]
            if not found:
                raise InputError(f"{path}: no image in this folder")
        files += [(str(p), None) for p in sorted(found, key=natural)]
    return files


# fmt: off
INFER = [
    ("model", None, "MODEL", "model file or run folder; default: the newest under runs/"),
    ("tta", None, (1, len(VIEWS)), "views of each image; default: as many as the model was calibrated for"),
    ("scales", [1.0], (0.25, 4), "resolutions of each view, 1 = as trained"),
    ("meta", None, "A=X,B=Y", "patient data for a model trained with it, as in age=55,sex=female"),
    ("image-column", None, "NAME", "of a .csv of images and their patients' data; default: 'image'"),
    ("json", False, None, "one JSON object a line on stdout, nothing else"),
    ("csv", None, "FILE", "write the answers as a table too"),
    ("save-overlay", None, "DIR", "write each picture with its box and answer into DIR; of a clip its best frame, and an animation"),
    ("every", 1, (1, 1e9), "of a clip (DICOM, GIF, TIFF ...) look at every so many-th frame"),
    WINDOW,
    ("save-mask", None, "DIR", "write the outline of the lesions of each picture into DIR, white on black"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda"),
    ("evaluate", False, None, "what --tta and --scales are worth on the held-out images of a run folder"),
    ("test", None, "DATA", "another labelled data set: write a report of what the model reaches there, with the threshold that it brings"),
    ("out", None, "DIR", "with --test: folder of the report; default: beside the model"),
    ("adapt", False, None, "take BatchNorm's means and spreads from the pictures at hand: an answer then depends on its neighbours"),
    ("data", None, "PATH", "with --evaluate: where the run's images lie, if not where they lay at training"),
    ("cache", "runs/cache", "DIR", "with --evaluate: folder of decoded images"),
]
# fmt: on


MOST_FRAMES = 10_000  # of a clip that are looked at: their answers are kept until its own is told
LEAST_ADAPTED = 32  # pictures: of fewer the means and spreads are luck


@torch.no_grad()
def adapt(model, pixels, boxes=None, meta=None, batch=64):
    """Give all BatchNorm layers of a model the means and spreads of these pictures (N, C, L, L) in place of those of
    training (Schneider et al. 2020): another scanner's greys, without one label. boxes (N, 4), meta (N, M): for a model
    that needs them. What was familiar in training says nothing of the changed network, and is forgotten."""
    if len(pixels) < LEAST_ADAPTED:
        raise InputError(
            f"--adapt: {len(pixels)} pictures, give {LEAST_ADAPTED} or more; they are to stand for their scanner"
        )
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    try:
        count = math.ceil(len(pixels) / batch)
        for rows in torch.arange(len(pixels)).tensor_split(count):  # of one size, as all weigh alike
            parts = (None if v is None else v[rows].to(model.device) for v in (pixels, boxes, meta))
            model.look(*parts, views=1)
    finally:
        model.eval()
    model.info["familiar"] = None


def test(args):
    """What the model reaches on another labelled data set, as a report like a run's. Returns it."""
    from report import print_report, test_elsewhere

    model = load_classifier(args.model, choose_device(args.device))
    info = model.info
    model.info = info | {"views": check_views(args.tta or info["views"], args.scales, info["size"])[0]}
    images = images_elsewhere(info, args, "test")
    if tuple(args.scales) != (1.0,):
        raise InputError("--test looks at pictures at scale 1; leave --scales out")
    if args.adapt:
        boxes = images.boxes if model.needs_boxes else None
        adapt(model, images.pixels, boxes, meta_for(images, info["meta_spec"]))
    run = Path(model_file(args.model)).parent
    folder = Path(args.out or run / f"test-{Path(args.test).stem}")
    report = test_elsewhere(model, images, folder)
    print_report(report)
    print(f"{folder}: report.json, report.png, mistakes.png\n{DISCLAIMER}")
    return report


def predict_files(args):
    """The answers to all pictures that the command line names, told and drawn one by one as they come."""
    meta = parse_meta(args.meta)
    detector = BreastCancerDetector(args.model, args.device, args.tta, args.scales, args.window)
    if args.save_mask and not detector.model.tells_outlines:
        raise InputError(
            f"--save-mask: {detector.path} tells no outlines; train with masks or boxes, and without --nets cnet"
        )
    known = [s["column"] for s in detector.info["meta_spec"]]
    files = collect(args.images, known, args.image_column)
    patients = [detector.patient(file, (meta or {}) | (own or {})) for file, own in files]
    if args.adapt:
        detector.adapt([file for file, _ in files], patients)
    names, results = overlay_names([file for file, _ in files]), []
    if not args.json:
        print(detector.describe())
        if missing := [c for c in known if not any(c in p for p in patients)]:
            print(f"not given, so counted as missing: {', '.join(missing)}")
    drawn = bool(args.save_mask or args.save_overlay)
    for clip, rows in itertools.groupby(range(len(files)), lambda i: is_clip(files[i][0])):
        while batch := list(itertools.islice(rows, 1 if clip else 32)):
            parts = [[v[i] for i in batch] for v in ([file for file, _ in files], patients, names)]
            if clip:
                results += watch_clip(detector, *(part[0] for part in parts), args)
                continue
            for result, patient, name in zip(detector.predict(*parts[:2], masks=drawn), *parts[1:], strict=True):
                tell(result, detector, name, args, patient)
                results.append(result)
    return results


def is_clip(file):
    try:
        return Path(file).is_file() and count_frames(file) > 1  # a pipe is read once
    except InputError:  # said when it is read
        return False


def tell(result, detector, name, args, patient, picture=None):
    """Print and draw an answer as the command line asks for. picture: see save_overlay."""
    mask = result.pop("mask", None)
    print(json.dumps(result) if args.json else sentence(result, detector.info), flush=True)
    if args.save_overlay and result["error"] is None:
        save_overlay(result, detector, Path(args.save_overlay) / f"{name}_overlay.png", patient, mask, picture)
    if args.save_mask and mask is not None:
        import plots

        plots.save_png(Image.fromarray(mask), Path(args.save_mask) / f"{name}_mask.png")


def watch_clip(detector, file, patient, name, args):
    """The answers to a clip's frames, told as they come where it is --json, and the clip's, told and drawn: its best
    frame, and an animation of all."""
    import clips

    panels, pace = [], clips.SECONDS

    def watch(result, picture):
        nonlocal pace
        about = origin(picture)
        step = math.ceil(about.frames / args.every / clips.MOST_DRAWN)
        if args.json:
            print(json.dumps(result), flush=True)
        if args.save_overlay and result["error"] is None and (result["frame"] - 1) // args.every % step == 0:
            said = f"frame {result['frame']} of {about.frames}: {verdict(result, detector.info)[0]}"
            panels.append(clips.panel(picture, result, said))
            pace = (about.seconds or clips.SECONDS) * args.every * step

    try:
        answers, clip = detector.predict_clip(file, patient, args.every, watch)
    except InputError as e:
        answers, clip = [], dict.fromkeys(KEYS) | {"image": file, "error": str(e)}
    picture = None
    if clip["error"] is None and (args.save_overlay or args.save_mask):
        _, picture = next(read_frames(file, detector.info["channels"], detector.window, first=clip["frame"]))
        clip["mask"] = detector.predict(picture, patient, masks=True)["mask"]
    tell(clip, detector, name, args, patient, picture)
    if panels:
        clips.save_gif(panels, Path(args.save_overlay) / f"{name}_overlay.gif", pace)
    return [*answers, clip]


def main(argv=None):
    """Predict as the command line says: the JSON of the answers goes to stdout; see BreastCancerDetector for Python."""
    p = build_parser({"options of infer.py": INFER, "the data of --test": THEIRS}, __doc__.split("\n\n")[0])
    p.add_argument("images", nargs="*", help="image files and folders")
    args = p.parse_args(argv)
    for_pictures = args.images or args.json or args.csv or args.meta or args.save_overlay or args.save_mask
    if args.evaluate:
        from report import clean

        if for_pictures or args.adapt or args.test or args.window:
            raise InputError("--evaluate takes the held-out images of the run, and no images or options for them")
        run = Path(args.model or model_file().parent)
        table = evaluate(run, args.tta, args.scales, args.data, args.cache, choose_device(args.device))
        out = (run if run.is_dir() else run.parent) / "views.json"
        write_atomically(out, json.dumps(clean(table), indent=1).encode())
        print(f"{out}\n{DISCLAIMER}")
        return
    if args.test:
        if for_pictures:
            raise InputError("--test takes a labelled data set, and no pictures or options for them beside it")
        return test(args)
    if not args.images:
        raise InputError("give an image, --evaluate, or --test (see -h)")
    results = predict_files(args)
    if args.csv:
        write_answers(args.csv, results)
    if not args.json:
        print(DISCLAIMER)
    if any(result["error"] for result in results):
        raise SystemExit(1)


def overlay_names(files):
    """A file name for each picture: its path below the folder that all share, so that A/1.png, A/1.bmp and B/1.png stay
    three; a number where two would still be one."""
    paths, names, taken = [os.path.abspath(f) for f in files], [], set()
    shared = os.path.commonpath([os.path.dirname(p) for p in paths])
    for path in paths:
        stem = "_".join(Path(os.path.relpath(path, shared)).parts)
        numbered = (f"{stem}{'' if n == 1 else f'_{n}'}" for n in itertools.count(1))
        names.append(next(n for n in numbered if n.lower() not in taken))
        taken.add(names[-1].lower())
    return names


def save_overlay(result, detector, path, meta=None, mask=None, picture=None):
    """The picture with its box, its answer, and the map of what spoke for it, by the method recommended for the model.
    picture: as of read_frames, of the model's channels, if it is not the file's first."""
    import plots  # here and not above: a plain prediction starts without them
    from report import describe_map, explain_picture, recommended_method

    info, (method, note) = detector.info, recommended_method(detector.path)
    picture = picture or read_image(result["image"], info["channels"], detector.window)
    heat, _, _, target = explain_picture(detector.model, picture, method, None, meta)
    lines = [*verdict(result, info), *(["refer"] if result["refer"] else [])]
    lines += [f"frame {result['frame']} of {result['clip']['frames']}"] if result["clip"] else []
    lines += [f"{describe_map(method, info['classes'][target])}{note and '; '}{note}", DISCLAIMER]
    plots.save_png(plots.overlay(picture, result["box"], "\n".join(lines), heat, mask=mask), path)


# ---------------------------------------------------------------------------------------------------------------------
# What more views are worth


def verdicts(model, opinions, far):
    """What the opinions (M, V, N, K) and the strangeness (N,) come to: probabilities (N, K), thresholds (N,), who is
    referred (N,), and who for being unlike the pictures of training (N,)."""
    probabilities, uncertainty = model.conclude(opinions)
    reasons = [unlike(f, model.info) for f in far.tolist()]
    each = zip(probabilities.tolist(), uncertainty.tolist(), reasons, strict=True)
    referred = torch.tensor([answer(p, u, model.info, why)["refer"] for p, u, why in each])
    strange = torch.tensor([bool(why) for why in reasons])
    return probabilities, torch.full((len(far),), model.info["threshold"]), referred.double(), strange.double()


def worth(weights, labels, first, probabilities, threshold, referred, strange):
    """{metric: (B,)} of one setting beside the probabilities of the `first`, see evaluate. weights (B, N) or None."""
    import metrics

    values = metrics.evaluate(probabilities, labels, threshold, weights)
    wrong = (metrics.decide(probabilities, threshold) != labels).double()
    weights = torch.ones(1, len(labels), dtype=torch.double) if weights is None else weights.double()
    return {
        "auc": values["auc"],
        "change": values["auc"] - metrics.evaluate(first, labels, threshold, weights)["auc"],
        "sensitivity": values["sensitivity"],
        "specificity": values["specificity"],
        "balanced_accuracy": values["balanced_accuracy"],
        "referred": weights @ referred / weights.sum(1),
        "caught": weights @ (referred * wrong) / (weights @ wrong),
        "unlike": weights @ strange / weights.sum(1),
    }


def evaluate(run, views, scales, data_path, cache, device):
    """{setting: {metric: {"value", "low", "high"}}}: one view, `views`, and those at `scales`, on images that the run's
    models never saw. "change": of the AUC against one view, in pairs; "referred": the share of the images; "caught":
    the share of the wrong answers that are among them; "unlike": the share of the images, all of them true ones, that are
    referred as unlike those of training."""
    from judge import look_at  # here and not above: a plain prediction starts without them
    from metrics import evidence, interval_text, resample
    from report import held_out

    images, pairs = held_out(run, data_path, cache)
    rows = torch.cat([rows for _, rows in pairs])
    views, scales = check_views(views or pairs[0][0].info["views"], scales, pairs[0][0].info["size"])
    looked = tuple(dict.fromkeys((1.0, *scales)))  # scale by scale, `views` each; the first is the picture as it is
    found = []
    for model, own in pairs:
        boxes = images.boxes if model.needs_boxes else None
        said = look_at(model.to(device), images, own, boxes, views=views, scales=looked)
        found.append((model, said.opinions, model.strangeness(said.traits)))
    table, first, groups = {}, None, images.groups[rows]
    known = evidence(images.labels[rows], len(images.classes), groups)
    known |= dict.fromkeys(("referred", "unlike"), len(groups.unique()))
    for k, s in dict.fromkeys([(1, (1.0,)), (views, (1.0,)), (views, scales)]):
        kept = [looked.index(scale) * views + i for scale in s for i in range(k)]
        judged = zip(*(verdicts(model, opinions[:, kept], far) for model, opinions, far in found), strict=True)
        probabilities, threshold, referred, strange = (torch.cat(column) for column in judged)
        first = probabilities if first is None else first
        measure = partial(
            worth, labels=images.labels[rows], first=first,
            probabilities=probabilities, threshold=threshold, referred=referred, strange=strange,
        )  # fmt: skip
        name = f"{k} view{'s' if k > 1 else ''}" + ("" if s == (1.0,) else f" x {', '.join(f'{v:g}' for v in s)}")
        table[name] = resample(measure, groups, known)
        if len(table) == 1:
            print(f"{len(rows)} held-out images\n{'':24s}" + "".join(f"{m:>22s}" for m in table[name]))
        cells = [interval_text(m) for m in table[name].values()]
        print(f"{name:24s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)
    return table


if __name__ == "__main__":
    run_main(main)
