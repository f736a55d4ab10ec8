"""What a run has reached: report.json, report.png, mistakes.png, and its comparison with another run in pairs.

    report, folder = train.main(["--data", "BUSI", "--folds", "5", "--against", "runs/old"])
    report["test"]["auc"]  ->  {"value": 0.938, "low": 0.913, "high": 0.959}

Several runs (folds, repeats) are pooled: each answer is held against the threshold of its own run, which comes from
validation. Nothing is chosen here."""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import metrics
import plots
from augment import blur, clahe
from data import encode_meta
from files import parts_of, read_checkpoint, write_atomically
from judge import cross_fit, judge_found, look_at
from models import finite, load_classifier
from options import check_against, load_images, saved_args, train_parser
from pictures import fit, letterbox, origin, original_box
from readers import InputError, natural
from saliency import CLASSLESS, METHODS, UNITS

VALIDATION = {"val_auc": "val AUC", "val_iou": "val IoU"}


def write_report(images, results, args, folder, seconds, splits, other=None):
    """report.json, report.png and mistakes.png of one run, or of all folds and repeats pooled, compared with the
    results of an `other` run, see compare. Returns the dict."""
    rows = torch.cat([r["rows"] for r in results])
    labels, (probabilities, threshold, iou) = images.labels[rows], pooled(images, results)
    data = {"source": images.source, "images": len(images), "size": args.size, "classes": images.classes}
    report = {
        "data": data | {"placeholder_boxes": images.placeholder_boxes},
        "splits": splits,
        "model": describe_model(args),
        "seconds": round(seconds, 1),
        "test": metrics.with_intervals(probabilities, labels, images.groups[rows], threshold, iou),
        **{k: [r[k] for r in results] for k in ("threshold", "temperature", "weights")},
        "validation": {k: [r[k] for r in results if k in r] for k in VALIDATION},
    }
    if probabilities is not None and len(images.classes) == 2:  # what most papers call accuracy: no threshold is chosen
        hits = [(r["probabilities"][:, 1] >= 0.5).long() == images.labels[r["rows"]] for r in results]
        report["accuracy_at_half"] = [float(h.double().mean()) for h in hits]
    if probabilities is not None and len(results[0]["members"]) > 1:
        report["members"] = describe_members(images, results, args)
    if len(results) > 1:
        answers = [(images.labels[r["rows"]], *pooled(images, [r])) for r in results]
        runs = [metrics.measure(p, labels, threshold, iou) for labels, p, threshold, iou in answers]
        report["runs"] = [{k: float(v) for k, v in run.items()} for run in runs]
        values = {k: torch.tensor([run[k] for run in report["runs"]]) for k in runs[0]}
        report["mean"] = {k: {"mean": float(v.mean()), "sd": float(v.std())} for k, v in values.items()}
    if other:
        report["against"] = {"run": args.against, **compare(images, other, results)}
    write_atomically(Path(folder) / "report.json", json.dumps(clean(report), indent=1).encode())
    draw_report(images, results, report, Path(folder))
    return report


def draw_report(images, results, report, folder):
    """report.png, and mistakes.png where there is a classifier."""
    rows, classes = torch.cat([r["rows"] for r in results]), images.classes
    labels, (probabilities, threshold, _) = images.labels[rows], pooled(images, results)
    note = "   PLACEHOLDER BOXES: localisation means nothing" if images.placeholder_boxes else ""
    runs = f", {len(results)} runs" if len(results) > 1 else ""
    panels = []
    if results[0]["histories"]:
        panels = [training_panel(results[0]["histories"], "Training" + (" of the first run" if runs else ""))]
    if probabilities is not None:
        none = torch.full((len(rows), 4), math.nan)
        boxes = none if results[0]["boxes"] is None else torch.cat([r["boxes"] for r in results])
        plots.save_png(mistakes_sheet(images, rows, probabilities, threshold, boxes, note), folder / "mistakes.png")
        counts = metrics.confusion(metrics.decide(probabilities, threshold), labels, len(classes))
        panels = [
            roc_panel(probabilities, labels, threshold, classes, report["test"]["auc"]),
            plots.confusion_chart(counts, classes, "Confusion" + " at the validation threshold" * (len(classes) == 2)),
            calibration_panel(probabilities, labels, classes, report["test"]["ece"]),
            *panels,
        ]
    title = f"{Path(images.source).name}: {report['model']}, {len(rows.unique())} test images{runs}{note}"
    plots.save_png(plots.page(panels, min(2, len(panels)), title), folder / "report.png")


def pooled(images, results):
    """Several runs together: probabilities (N, K) or None, the threshold (N,) that each image is held against (its
    run's), and how lesions were found: {metric: (N,)}, NaN where an image tells nothing of it, or None."""
    probabilities = thresholds = None
    if results[0]["probabilities"] is not None:
        probabilities = torch.cat([r["probabilities"] for r in results])
        thresholds = torch.tensor([0.5 if r["threshold"] is None else r["threshold"] for r in results])
        thresholds = thresholds.repeat_interleave(torch.tensor([len(r["rows"]) for r in results]))
    if results[0]["boxes"] is None:
        return probabilities, thresholds, None
    parts = [found_values(images, r) for r in results]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = {name: values for name, values in found.items() if values.isfinite().any()}
    return probabilities, thresholds, found or None


def found_values(images, result):
    """{metric: (N,)} of one run: IoU of the box, Dice of the outline, whether a lesion is said to be found where there is
    one, and (a false alarm) where there is none."""
    rows, boxes = result["rows"], images.boxes[result["rows"]]
    values = metrics.localisation(metrics.paired_iou(result["boxes"], boxes))
    if "scores" in result:  # else of an older version
        said, there = (result["scores"] >= result["lesion_threshold"]).double(), boxes[:, 0].isfinite()
        values |= {"dice": result["dice"].double(), "lesions_found": torch.where(there, said, math.nan)}
        values["false_alarms"] = torch.where(images.outlined[rows] & ~there, said, math.nan)
    return values


def describe_members(images, results, args):
    """What each member of the ensemble would do by itself, with a temperature and a threshold of its own: its AUC on
    validation (mean of the runs), the test metrics, pooled, and how the ensemble changes them."""
    names, members = itertools.product((args.ensemble or args.model).split(","), args.roi.split(",")), []
    for i, (backbone, roi) in enumerate(names):
        alone = [{"rows": r["rows"], "boxes": None, **r["members"][i]} for r in results]
        probabilities, threshold, _ = pooled(images, alone)
        rows = torch.cat([r["rows"] for r in alone])
        test = metrics.with_intervals(probabilities, images.labels[rows], images.groups[rows], threshold)
        val_auc, change = sum(r["val_auc"] for r in alone) / len(alone), compare(images, alone, results)["test"]
        members.append({"model": backbone, "roi": roi, "val_auc": val_auc, "test": test, "ensemble": change})
    return members


def describe_model(args):
    return (args.ensemble or args.model) + ("" if args.roi == "none" else f", roi {args.roi}")


def clean(value):
    """As JSON gives it back, NaN as null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def finished_run(folder, images, runs):
    """The results of a finished run on the test images of `runs`, see plan. Raises InputError where it has others."""
    results = []
    for name, _, _, test, _ in runs:
        file, report = (Path(folder) / name / f for f in ("test.pt", "report.json"))
        if not file.is_file():
            raise InputError(f"--against {folder}: no {file}; give the folder of a finished run, of as many folds")
        with parts_of(report, "give the folder of another run"):
            data = json.loads(report.read_text())["data"]
            same = torch.equal(read_checkpoint(file)["rows"], test) and data["images"] == len(images)
            if not same or data["classes"] != images.classes:
                raise InputError(
                    f"--against {folder}: {name or 'it'} has other test images or classes: nothing to compare"
                )
        results.append(read_result(file, images, test))
    check_against(folder, images)
    return cross_fit(images, results, args_of(folder))


def args_of(folder):
    """The options of a run folder, or None: those that its version did not know yet have their defaults."""
    config, parser = Path(folder) / "config.json", train_parser()
    if not config.is_file():
        return None
    return argparse.Namespace(**vars(parser.parse_args([])) | saved_args(config, parser))


def read_result(file, images, test=None):
    """The dict of a run's test.pt, checked: it is what one_run in train.py writes of the rows `test` (None: of any)."""
    result = read_checkpoint(file)
    with parts_of(file, "remove it and model.pt beside it, and --resume trains this part again"):
        p, boxes, rows = result["probabilities"], result["boxes"], result["rows"]
        test = rows if test is None else test
        if rows.dtype != torch.long or rows.dim() != 1 or rows.min() < 0:
            raise ValueError("rows are none")
        if not torch.equal(rows, test) or (p is None and boxes is None):
            raise ValueError("not of this test split")
        if boxes is not None and (boxes.shape != (len(test), 4) or boxes.dtype != torch.float32):
            raise ValueError("no boxes")
        for part in [] if p is None else [result, *result["members"]]:
            p, limit, _ = part["probabilities"], part["threshold"], float(part["val_auc"])
            known = p.shape == (len(test), len(images.classes)) and p.is_floating_point()
            if not (known and 0 <= p.min() <= p.max() <= 1 and (limit is None if p.shape[1] > 2 else 0 <= limit <= 1)):
                raise ValueError("no probabilities or no threshold")
        if not math.isfinite(result["temperature"] + sum(result["weights"]) + result.get("val_iou", 0.0)):
            raise ValueError("not finite")
        for history in result["histories"]:
            check_history(history)
    return result


def check_history(history):
    """Raises what it likes unless this is a network's history: a dict an epoch, see train.fit."""
    for epoch in history:
        numbers = [epoch["epoch"], epoch["loss"], epoch["lr"], epoch["seconds"], *epoch["score"]]
        if not (type(epoch["best"]) is bool and isinstance(epoch["net"], str) and all(map(math.isfinite, numbers))):
            raise ValueError("no history of a training")


def compare(images, before, after):
    """{"test": {metric: {"before", "after", "value", "low", "high"}}, "flipped", "righted"} of the results of two models
    (or of two sets of folds) on the same test images, in pairs. flipped: how many answers differ; righted: how many of
    these are right now."""
    rows = torch.cat([r["rows"] for r in before])
    labels, old, new = images.labels[rows], pooled(images, before), pooled(images, after)
    change = {"test": metrics.change_with_intervals(old, new, labels, images.groups[rows])}
    if old[0] is not None and new[0] is not None:
        was, now = (metrics.decide(probabilities, threshold) for probabilities, threshold, _ in (old, new))
        change |= {"flipped": int((was != now).sum()), "righted": int(((was != now) & (now == labels)).sum())}
    return change


def print_change(change):
    print(f"{'test':18s} before   after   change [95 %, in pairs, resampled by group]")
    for name, m in change["test"].items():
        print(f"{name:18s} {'    '.join(numbers(m, 'before', 'after'))}   {change_text(m)}")
    if "flipped" in change:
        print(f"{change['flipped']} test images got another answer, {change['righted']} of them the right one")


def change_text(m):
    """As in +0.003 [-0.003, +0.010]."""
    return metrics.interval_text(m, "+.3f")


def numbers(m, *names, form=".3f"):
    """As texts. What JSON has as null is NaN again."""
    return [format(math.nan if m[name] is None else m[name], form) for name in names]


def roc_panel(probabilities, labels, threshold, classes, auc):
    """A curve a class (of two: the positive one), and a dot where the answers stand: at the runs' own thresholds, pooled."""
    said, two, series = metrics.decide(probabilities, threshold), len(classes) == 2, [plots.DIAGONAL]
    low, high = (f"{float(t):.{2 if 0.01 <= t <= 0.99 else 4}f}" for t in (threshold.min(), threshold.max()))
    limit = f"threshold {low}" if low == high else f"the runs' thresholds, {low} to {high}"
    for k in range(1 if two else 0, len(classes)):
        truth = labels == k
        if 0 < truth.sum() < len(truth):
            name = classes[k] if two else f"{classes[k]} {float(metrics.auc(probabilities[:, k], truth)):.3f}"
            at = [(said[rows] == k).double().mean()[None] for rows in (~truth, truth)]
            series.append(plots.Series(name, *metrics.roc_curve(probabilities[:, k], truth), style=k))
            series.append(plots.Series(limit if two else "", *at, dots=True, style=k))
    x_label = "1 - specificity" + ("" if two else "     (dots: the likeliest class is said)")
    title = f"ROC: {'' if two else 'mean '}AUC {metrics.interval_text(auc)}"
    return plots.line_chart(series, title, x_label, "sensitivity")


def calibration_panel(probabilities, labels, classes, ece):
    predicted, true, bins = metrics.calibration_bins(probabilities, labels)
    counts = bins.bincount(minlength=metrics.BINS)
    x, y = (bins.bincount(v, metrics.BINS) / counts for v in (predicted, true))  # NaN in empty bins: no dot
    dots = plots.Series("bins, with the number of images", x, y, dots=True, texts=counts.tolist())
    name = classes[1] if len(classes) == 2 else "the likeliest class"
    title, x_label = f"Calibration: ECE {metrics.interval_text(ece)}", f"predicted probability of {name}"
    return plots.line_chart([plots.DIAGONAL, dots], title, x_label, "observed share")


def training_panel(histories, title):
    curves, shown = [], {}
    for history in histories:
        key = next(k for k in VALIDATION if k in history[0])
        shown[VALIDATION[key]] = epochs, values = [h["epoch"] for h in history], [h[key] for h in history]
        curves.append(plots.Series(f"{history[0]['net']}: {VALIDATION[key]}", epochs, values))
    return plots.line_chart(curves, title, "epoch", ", ".join(shown), y_range=(0, 1), x_axis="whole")


def mistakes_sheet(images, rows, probabilities, threshold, boxes, note, most=20):
    """The wrongest first: those that gave the true class the least probability."""
    labels, said, two = images.labels[rows], metrics.decide(probabilities, threshold), len(images.classes) == 2
    wrong = torch.nonzero(said != labels)[:, 0]
    count, wrong = len(wrong), wrong[probabilities[wrong, labels[wrong]].argsort()][:most]
    names, captions = [c[:16] for c in images.classes], []
    for i in wrong.tolist():
        answer, truth, p, limit = said[i], labels[i], probabilities[i], threshold[i]
        words = f"said {names[answer]} {p[answer]:.2f}\ntruth {names[truth]} {p[truth]:.2f}"
        if two:
            digits = 2 if f"{p[1]:.2f}" != f"{limit:.2f}" else 4
            words = f"said {names[answer]} {p[1]:.{digits}f}, threshold {limit:.{digits}f}\ntruth {names[truth]}"
        captions.append(f"{Path(images.names[rows[i]]).name[-30:]}\n{words}")
    pixels = [images.pixels[i].cpu() for i in rows[wrong].tolist()]
    true, found = images.boxes[rows[wrong]], boxes[wrong]
    drawn = ", ".join(words for words, b in (("true blue", true), ("D-Net's orange", found)) if b.isfinite().any())
    told = f", with the probability of {images.classes[1]}" if two else ", with the probabilities"
    title = f"The worst {len(wrong)} of {count} errors{told}{f' (boxes: {drawn})' if drawn else ''}{note}"
    return plots.contact_sheet(pixels, captions, found, true, side=228, title=title)


def print_report(report):
    print("\ntest, with 95 % intervals resampled by group:")
    for name, m in report["test"].items():
        spread = "   runs " + " +- ".join(numbers(report["mean"][name], "mean", "sd")) if "mean" in report else ""
        print(f"  {name:18s} {metrics.interval_text(m)}{spread}")
    members = report.get("members", [])
    best = max((m["val_auc"] for m in members), default=None)
    for m in members:
        star = "   best on validation" if m["val_auc"] == best else ""
        words = (f"{k} {metrics.interval_text(m['test'][k])}" for k in ("auc", "sensitivity", "specificity"))
        print(f"  member {m['model']}, roi {m['roi']}: {', '.join(words)}{star}")
        print(f"    the ensemble's auc is {change_text(m['ensemble']['auc'])} to it")
    if "accuracy_at_half" in report:
        values = torch.tensor(report["accuracy_at_half"])
        spread = f" +- {values.std():.3f} (sd of the runs)" if len(values) > 1 else ""
        print(f"  accuracy at a threshold of 0.5: {values.mean():.3f}{spread}")
    if report["data"]["placeholder_boxes"]:
        print("  placeholder boxes: iou and iou_at_50 say nothing about lesions")
    if "against" in report:
        print(f"\nbefore: {report['against']['run']}, after: this run")
        print_change(report["against"])


# ---------------------------------------------------------------------------------------------------------------------
# What a finished run is asked: which images it never saw, which map to trust, and that map of one picture


def held_out(model_path, data_path, cache, device="cpu"):
    """(images, [(model, rows)]): the models of a run, each with the test rows that it never saw.

    model_path: a run folder (all its folds) or a model.pt in one. The data options are the run's own; data_path
    replaces the path alone."""
    path = Path(model_path)
    folder = path if path.is_dir() else path.parent
    files = [f.with_name("model.pt") for f in sorted(folder.rglob("test.pt"), key=natural)] if path.is_dir() else [path]
    args = args_of(folder) or args_of(folder.parent)
    if args is None or not files or not all(f.is_file() and f.with_name("test.pt").is_file() for f in files):
        raise InputError(f"--model {model_path}: no run of train.py, so it is not known which images are held out")
    args.data, args.cache = data_path or args.data, cache
    images, some = load_images(args), [load_classifier(file, device) for file in files]
    results = [read_result(file.with_name("test.pt"), images) for file in files]
    for model, rows in ((model, result["rows"]) for model, result in zip(some, results, strict=True)):
        if int(rows.max()) >= len(images) or not same_pictures(images, rows, model.info.get("seen")):
            raise InputError(f"--data {args.data}: it has changed, its images are not those that {folder} held out")
    if len(results) == args.folds * args.repeats:
        results = cross_fit(images, results, args)
    for model, result in zip(some, results, strict=True):
        model.info |= {k: result[k] for k in ("temperature", "threshold") if result[k] is not None}  # as in the report
    return images, [(model, result["rows"]) for model, result in zip(some, results, strict=True)]


def test_elsewhere(model, images, folder):
    """The report of a model on all labelled images of another set, with the threshold that it brings along; written into
    `folder` like a run's. What the model has met before is left out, and said."""
    rows, began = torch.nonzero(images.labels >= 0)[:, 0], time.time()
    seen = torch.cat([*model.info.get("seen", {}).values(), torch.zeros(0, dtype=torch.long)])
    new = rows[~torch.isin(images.take(rows).pictures(), seen)]
    if len(new) < len(rows):
        print(f"{len(rows) - len(new)} of the {len(rows)} images are left out: the model has met them")
    if not len(new):
        raise InputError("--test: no labelled image is left that the model has not met")
    boxes = images.boxes if model.needs_boxes else None
    answer = look_at(model, images, new, boxes)
    result = {
        "rows": new,
        "probabilities": model.combine(answer.opinions.mean(1)),
        "boxes": None,
        "members": [],
        "histories": [],
    }
    if answer.found:
        kept = judge_found(answer.found, images, new)
        result |= kept if model.tells_outlines else {"boxes": kept["boxes"]}
    result |= {k: model.info[k] for k in ("temperature", "threshold", "lesion_threshold")}
    result["weights"] = model.weights.tolist()
    names, rois = ([m.config[k] for m in model.members] for k in ("model", "roi"))
    args = argparse.Namespace(
        **{k: ",".join(dict.fromkeys(v)) for k, v in (("ensemble", names), ("roi", rois))}, size=model.info["size"]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return write_report(images, [result], args, folder, time.time() - began, {"test": len(new)})


def same_pictures(images, rows, seen):
    """Whether these rows show what the model's test split did; older models don't know."""
    return seen is None or torch.equal(images.take(rows).pictures(), seen["test"])


def recommended_method(model_path):
    """(method, a note for the caption): what `explain.py --evaluate` recommended for the run of a model file; where it
    recommended none or never ran, integrated gradients, whose map sums to the score."""
    for folder in Path(model_path).resolve().parents[:2]:
        if (file := folder / "explain.json").is_file():
            with parts_of(file, "let explain.py --evaluate write it again, or give explain.py a --method"):
                method = json.loads(file.read_text())["recommended"]
                if method is not None and method not in METHODS:
                    raise ValueError(f"there is no method {method!r}")
            return (method, "") if method else ("ig", "no method is recommended for this model")
    return "ig", "not evaluated on this model"


SPARSE = ("ig", "smoothgrad")  # single pixels: smoothed, so that they can be seen


def explain_picture(model, picture, method, target=None, meta=None):
    """(map on the picture (h, w), box in the whole frame's pixels or None, probabilities (K,), the class explained) of a PIL
    image of the model's channels. target: index of a class, None = the predicted one."""
    *_, last = explain_steps(model, picture, method, target, meta)
    return last


def explain_steps(model, picture, method, target=None, meta=None):
    """Yield what explain_picture returns, after each member: the map is that of the members so far."""
    info = model.info
    pixels, placement = letterbox(picture, info["load_size"])
    x = torch.from_numpy(pixels)[None].to(model.device)
    x = clahe(x) if info["equalise"] else x
    patient = encode_meta([meta or {}], None, info["meta_spec"])[0].to(x.device) if info["meta_spec"] else None
    with torch.no_grad():
        boxes, said = model.locate(x), model.look(x, None, patient)
        p = finite(model.combine(said.opinions.mean(1)))[0].tolist()
    if target is None:
        target = int(p[1] >= info["threshold"]) if len(p) == 2 else int(np.argmax(p))
    box = None
    if boxes is not None:  # as the answer has it: the members' crops are made around a coarser one
        box = original_box(said.boxes[0].tolist(), placement, info["load_size"], origin(picture))
    (left, top, w, h), total = fit(picture.size, info["load_size"]), 0.0  # without the bars
    for part in model.member_maps(x, method, target, patient, boxes):
        total = heat = total + part
        if method in SPARSE:
            heat = blur(total[None], torch.full((1,), info["load_size"] / 40, device=x.device))[0]
        yield heat[0, top : top + h, left : left + w].cpu().numpy(), box, p, target


def describe_map(method, label):
    """What a map shows, in two lines."""
    what = "what the score is sensitive to" if method in CLASSLESS else f"evidence for {label}"
    return f"{method}{' (smoothed)' if method in SPARSE else ''}: {what}\nin {UNITS[method]}"
