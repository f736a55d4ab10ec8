"""REPORT"""

import itertools
import json
import math
from pathlib import Path

import torch

import metrics
import plots
from models import read_checkpoint, write_atomically
from readers import InputError


def write_report(images, results, args, folder, seconds, splits, other=None):
    """report.json, report.png and mistakes.png of one run, or of all folds and repeats pooled, compared with the
    results of an `other` run, see compare. Returns the dict."""
    rows = torch.cat([r["rows"] for r in results])
    labels, groups = images.labels[rows], images.groups[rows]
    probabilities, threshold, iou = pooled(images, results)
    classify = probabilities is not None
    boxes = torch.cat([r["boxes"] for r in results]) if results[0]["boxes"] is not None else None
    test = metrics.with_intervals(probabilities, labels, groups, threshold, iou)
    report = {
        "data": {
            "source": images.source,
            "images": len(images),
            "size": args.size,
            "classes": images.classes,
            "placeholder_boxes": images.placeholder_boxes,
        },
        "splits": splits,
        "model": describe_model(args),
        "seconds": round(seconds, 1),
        "test": test,
        "threshold": [r["threshold"] for r in results],
        "temperature": [r["temperature"] for r in results],
        "weights": [r["weights"] for r in results],
        "validation": {k: [r[k] for r in results if k in r] for k in ("val_auc", "val_iou")},
    }
    if classify and len(images.classes) == 2:  # what most papers call accuracy: without a chosen threshold
        hits = [(r["probabilities"][:, 1] >= 0.5).long() == images.labels[r["rows"]] for r in results]
        report["accuracy_at_half"] = [float(h.double().mean()) for h in hits]
    if classify and len(results[0]["members"]) > 1:
        report["members"] = describe_members(images, results, args)
    if len(results) > 1:
        runs = [point_metrics(images, r) for r in results]
        report["runs"] = runs
        values = {k: torch.tensor([run[k] for run in runs]) for k in runs[0]}
        report["mean"] = {k: {"mean": float(v.mean()), "sd": float(v.std())} for k, v in values.items()}
    if other:
        report["against"] = {"run": args.against, **compare(images, other, results)}
    write_atomically(Path(folder) / "report.json", json.dumps(clean(report), indent=1).encode())

    note = "   PLACEHOLDER BOXES: localisation means nothing" if images.placeholder_boxes else ""
    panels = []
    if classify:
        panels += [
            roc_panel(probabilities, labels, images.classes, test),
            confusion_panel(probabilities, labels, threshold, images.classes),
            calibration_panel(probabilities, labels, test),
        ]
    panels.append(training_panel(results[0]["histories"]))
    plots.save_png(
        plots.page(panels, min(2, len(panels)), f"{images.source}: {report['model']}, {len(rows)} test images{note}"),
        Path(folder) / "report.png",
    )
    if classify:
        plots.save_png(
            mistakes_sheet(images, rows, probabilities, threshold, boxes, note), Path(folder) / "mistakes.png"
        )
    return report


def pooled(images, results):
    """Several runs together: probabilities (N, K) or None, the threshold (N,) that each image is held against (its
    run's), and the IoU (N,) or None."""
    probabilities = thresholds = iou = None
    if results[0]["probabilities"] is not None:
        probabilities = torch.cat([r["probabilities"] for r in results])
        counts = torch.tensor([len(r["probabilities"]) for r in results])
        thresholds = torch.tensor([0.5 if r["threshold"] is None else r["threshold"] for r in results])
        thresholds = thresholds.repeat_interleave(counts)
    if results[0]["boxes"] is not None:
        iou = torch.cat([metrics.paired_iou(r["boxes"], images.boxes[r["rows"]]) for r in results])
        iou = iou if iou.isfinite().any() else None
    return probabilities, thresholds, iou


def describe_members(images, results, args):
    """What each member of the ensemble would do by itself, with a temperature and a threshold of its own: its AUC on
    validation (mean of the runs), the test metrics, pooled, and how the ensemble changes them."""
    names = itertools.product((args.ensemble or args.model).split(","), args.roi.split(","))
    members = []
    for i, (backbone, roi) in enumerate(names):
        alone = [{"rows": r["rows"], "boxes": None, **r["members"][i]} for r in results]
        probabilities, threshold, _ = pooled(images, alone)
        rows = torch.cat([r["rows"] for r in alone])
        members.append(
            {
                "model": backbone,
                "roi": roi,
                "val_auc": sum(r["val_auc"] for r in alone) / len(alone),
                "test": metrics.with_intervals(probabilities, images.labels[rows], images.groups[rows], threshold),
                "ensemble": compare(images, alone, results)["test"],
            }
        )
    return members


def describe_model(args):
    return (args.ensemble or args.model) + ("" if args.roi == "none" else f", roi {args.roi}")


def clean(value):
    """NaN is no JSON: null."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def point_metrics(images, result):
    """The metrics of one run without intervals: {name: number}."""
    probabilities, threshold, iou = pooled(images, [result])
    values = metrics.measure(probabilities, images.labels[result["rows"]], threshold, iou)
    return {k: float(v) for k, v in values.items()}


def finished_run(folder, images, runs):
    """The results of a finished run on the test images of `runs`, see plan. Raises InputError where it has others."""
    results = []
    for name, _, _, test, _ in runs:
        file, report = (Path(folder) / name / f for f in ("test.pt", "report.json"))
        if not file.is_file():
            raise InputError(
                f"--against {folder}: no {file} there; give the folder of a finished run, of as many folds"
            )
        results.append(read_checkpoint(file, str(file)))
        data = json.loads(report.read_text())["data"]
        same = torch.equal(results[-1]["rows"], test) and data["images"] == len(images)
        if not same or data["classes"] != images.classes:
            raise InputError(f"--against {folder}: {name or 'it'} has other test images or classes: nothing to compare")
    return results


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
        print(
            f"{name:18s} {m['before']:.3f}    {m['after']:.3f}   {m['value']:+.3f} [{m['low']:+.3f}, {m['high']:+.3f}]"
        )
    if "flipped" in change:
        print(f"{change['flipped']} test images got another answer, {change['righted']} of them the right one")


def interval(m):
    return f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"


def roc_panel(probabilities, labels, classes, test):
    curves = {}
    for k in range(len(classes))[1 if len(classes) == 2 else 0 :]:
        curves[classes[k]] = [v.tolist() for v in metrics.roc_curve(probabilities[:, k], labels == k)]
    return plots.line_chart(
        curves, f"ROC: AUC {interval(test['auc'])}", "1 - specificity", "sensitivity", (0, 1), (0, 1), diagonal=True
    )


def confusion_panel(probabilities, labels, threshold, classes):
    title = "Confusion" + (" at the validation threshold" if len(classes) == 2 else "")
    return plots.confusion_chart(
        metrics.confusion(metrics.decide(probabilities, threshold), labels, len(classes)), classes, title
    )


def calibration_panel(probabilities, labels, test):
    predicted, true, bins = metrics.calibration_bins(probabilities, labels)
    points = [(predicted[bins == b].mean(), true[bins == b].mean()) for b in range(metrics.BINS) if (bins == b).any()]
    return plots.line_chart(
        {"test": list(zip(*points, strict=True))},
        f"Calibration: ECE {interval(test['ece'])}",
        "predicted",
        "observed",
        (0, 1),
        (0, 1),
        diagonal=True,
        points=True,
    )


def training_panel(histories):
    curves = {}
    for history in histories:
        key = next(k for k in ("val_auc", "val_iou") if k in history[0])
        curves[f"{history[0]['net']} {key}"] = ([h["epoch"] for h in history], [h[key] for h in history])
    return plots.line_chart(curves, "Training", "epoch", "validation", y_range=(0, 1))


def mistakes_sheet(images, rows, probabilities, threshold, boxes, note, most=20):
    """The wrongest first: those that gave the true class the least probability."""
    labels = images.labels[rows]
    wrong = torch.nonzero(metrics.decide(probabilities, threshold) != labels)[:, 0]
    wrong = wrong[probabilities[wrong, labels[wrong]].argsort()][:most]
    captions = []
    for i in wrong.tolist():
        shown = images.classes[labels[i]]
        captions.append(
            f"{Path(images.names[rows[i]]).name[-26:]}\n{shown[:16]}: p {float(probabilities[i, labels[i]]):.3f}"
        )
    return plots.contact_sheet(
        [images.pixels[rows[i]].cpu() for i in wrong.tolist()],
        captions,
        None if boxes is None else boxes[wrong],
        images.boxes[rows[wrong]],
        title=f"The worst {len(wrong)} errors: truth and its probability (boxes: blue true, orange D-Net){note}",
    )


def print_report(report):
    print("\ntest, with 95 % intervals resampled by group:")
    for name, m in report["test"].items():
        spread = (
            f"   runs {report['mean'][name]['mean']:.3f} +- {report['mean'][name]['sd']:.3f}"
            if "mean" in report
            else ""
        )
        values = [float("nan") if v is None else v for v in (m["value"], m["low"], m["high"])]
        print(f"  {name:18s} {values[0]:.3f}  [{values[1]:.3f}, {values[2]:.3f}]{spread}")
    members = report.get("members", [])
    best = max((m["val_auc"] for m in members), default=None)
    for m in members:
        star = "   best on validation" if m["val_auc"] == best else ""
        values = ", ".join(f"{name} {interval(m['test'][name])}" for name in ("auc", "sensitivity", "specificity"))
        print(f"  member {m['model']}, roi {m['roi']}: {values}{star}")
        change = m["ensemble"]["auc"]
        print(f"    the ensemble's auc is {change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] to it")
    if "accuracy_at_half" in report:
        values = torch.tensor(report["accuracy_at_half"])
        spread = f" +- {values.std():.3f} (sd of the runs)" if len(values) > 1 else ""
        print(f"  accuracy at a threshold of 0.5: {values.mean():.3f}{spread}")
    if report["data"]["placeholder_boxes"]:
        print("  placeholder boxes: iou and iou_at_50 say nothing about lesions")
    if "against" in report:
        print(f"\nbefore: {report['against']['run']}, after: this run")
        print_change(report["against"])
