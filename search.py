"""Search: which settings learn best? Many for a short time, the better third for longer, and so on.

    python search.py 30 --data BUSI --positive malignant --workers 2      30 random settings
    python train.py @runs/search-BUSI-mobilenet_v2/best.args              what it found, on the test split
    python search.py --resume runs/search-BUSI-mobilenet_v2               after a kill at any moment

Random settings (Bergstra & Bengio 2012), successive halving (Jamieson & Talwalkar 2016) up to --epochs. Each setting is
judged by its mean over folds of train and val that split no group; the test split is not touched. Writes search.csv,
search.png and best.args into the run folder. All options of train.py hold for every training."""

import argparse
import contextlib
import io
import json
import math
import shlex
import shutil
import tempfile
import time
from pathlib import Path

import torch

import metrics
import plots
from data import partition
from files import parts_of, write_atomically
from models import choose_device
from options import claim, load_images, parse, prepare_folder, run_main, stop, train_parser
from readers import InputError
from report import clean, describe_model
from train import check_attend, check_split, locate, predict, prepare, run_jobs, train_model

HALVING = 3
# fmt: off
OVER = ["lr=1e-4:3e-3", "weight-decay=1e-3:0.1", "size=64,96,128", "augment=0:1.5", "label-smoothing=0:0.2", "dropout=0:0.5"]
SEARCH = [
    ("search-over", OVER, "NAME=RANGE ...", "LOW:HIGH (by ratios where HIGH is 10 times LOW or more), or A,B,C"),
    ("search-folds", 3, (2, 1000), "each setting is judged by its mean over so many folds"),
]
# fmt: on


def build_parser():
    p = train_parser(__doc__.split("\n\n")[0], search=SEARCH)
    p.add_argument("settings", type=int, nargs="?", help="how many settings to try")
    return p


def search_ranges(args):
    """{option: (low, high) or [choices]} from NAME=RANGE. InputError for an unknown name, or a range with nothing in it."""
    ranges = {}
    for text in args.search_over:
        name, _, values = text.partition("=")
        key = name.strip().replace("-", "_")
        if not isinstance(getattr(args, key, None), (int, float)) or isinstance(getattr(args, key), bool):
            raise InputError(f"--search-over {text}: no option --{name} that takes a number")
        kind = type(getattr(args, key))
        try:
            found = [kind(float(v)) for v in values.replace(":", ",").split(",") if v.strip()]
        except ValueError:
            raise InputError(f"--search-over {text}: give LOW:HIGH or A,B,C in numbers") from None
        if not found or (":" in values and not (len(found) == 2 and found[0] < found[1])):
            raise InputError(f"--search-over {text}: an empty range; give LOW:HIGH with LOW < HIGH, or A,B,C")
        ranges[key] = tuple(found) if ":" in values else found
    return ranges


def draw_setting(ranges, generator):
    """One random setting: {option: value}."""
    setting = {}
    for key, values in ranges.items():
        u, low, high = float(torch.rand((), generator=generator, dtype=torch.double)), values[0], values[-1]
        value = low * (high / low) ** u if by_ratio(values) else low + (high - low) * u
        value = round(value) if isinstance(low, int) else float(f"{value:.3g}")
        setting[key] = values[int(u * len(values))] if isinstance(values, list) else value
    return setting


def by_ratio(values):
    """Whether a range is wide enough to be drawn, and shown, by its logarithm."""
    return isinstance(values, tuple) and 0 < 10 * values[0] <= values[1]


def search_folds(images, args):
    """The rows of train and val, and in which of --search-folds each lies. No group is divided."""
    rows = torch.cat([images.rows("train"), images.rows("val")])
    return rows, partition(images.labels[rows], images.groups[rows], [1] * args.search_folds, args.seed)


def try_setting(images, number, setting, epochs, fold, args, folder):
    """Train one setting on all folds but one, without choosing an epoch, and judge it on that one: {"trial", "epochs",
    "fold", "score"}, AUC, or IoU for a D-Net alone. A setting that can't be trained scores nothing."""
    done = Path(folder) / f"trial{number}-{epochs}-{fold}.json"
    if done.exists():
        with parts_of(done, "remove it, and this trial is made again"):
            result = json.loads(done.read_text())
            score, same = result["score"], {"trial": number, "epochs": epochs, "fold": fold, **setting}
            if not (score is None or 0 <= score <= 1) or any(result[k] != v for k, v in same.items()):
                raise ValueError("of another trial")
            return same | {"score": score}
    spared = args.nets == "both" and args.trunk == "own" and "dnet" not in args.roi  # a D-Net that nobody would ask
    nets = "cnet" if spared else args.nets
    args = argparse.Namespace(**{**vars(args), **setting, "nets": nets, "epochs": epochs, "save_seconds": math.inf})
    if "size" in setting:
        images = load_images(args, log=lambda _: None)
    rows, part = search_folds(images, args)
    result = {"trial": number, "epochs": epochs, "fold": fold, **setting, "score": math.nan}
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work, contextlib.redirect_stdout(io.StringIO()):
            model, look, _ = train_model(images, rows[part != fold], rows[:0], args, work, args.seed)
        rows = rows[part == fold]
        if model.members:
            found = metrics.evaluate(model.combine(predict(model, images, rows, look)), images.labels[rows])["auc"]
        else:
            found = metrics.paired_iou(locate(model, images, rows), images.boxes[rows]).nanmean()
        result["score"] = float(found)
    except InputError as e:  # of the training
        if "not finite" not in str(e):
            raise
    write_atomically(done, json.dumps(clean(result)).encode())
    return result


def search(images, ranges, args, folder):
    """The best setting of args.settings random ones, as a row of the table: {"trial", "epochs", option: value ..., "mean",
    "sd"}. Writes search.csv, search.png and best.args into the run folder."""
    generator = torch.Generator().manual_seed(args.seed)
    settings = [draw_setting(ranges, generator) for _ in range(args.settings)]
    stages = 1 + int(math.log(args.settings + 0.5, HALVING))  # + 0.5: log(243, 3) is 4.999...
    alive, tried = list(range(args.settings)), []
    for stage in range(stages):
        epochs = max(1, round(args.epochs / HALVING ** (stages - 1 - stage)))
        jobs = [(i, settings[i], epochs, fold, args, folder) for i in alive for fold in range(args.search_folds)]
        scores = {i: [] for i in alive}
        for result in run_jobs(try_setting, jobs, images, args, args.workers):
            i, score = result["trial"], result["score"]
            scores[i].append(math.nan if score is None else score)
            if len(scores[i]) == args.search_folds:
                mean = sum(scores[i]) / args.search_folds
                print(f"{epochs:4d} epochs  trial {i:3d}  {describe(settings[i])}  {mean:.4f}", flush=True)
        rows = []
        for i, v in scores.items():
            spread = {"mean": sum(v) / len(v), "sd": float(torch.tensor(v).std())}
            rows.append({"trial": i, "epochs": epochs, **settings[i], **spread})
        rows.sort(key=lambda r: -r["mean"] if math.isfinite(r["mean"]) else math.inf)
        tried += rows
        alive = [r["trial"] for r in rows[: max(1, len(rows) // HALVING)]]
    best = rows[0]
    if not math.isfinite(best["mean"]):
        raise InputError("not one setting could be trained; try lower learning rates")
    lines = [",".join(tried[0]), *(",".join(map(str, row.values())) for row in tried)]
    write_atomically(folder / "search.csv", "".join(f"{line}\n" for line in lines).encode())
    draw_search(images, ranges, tried, args, folder / "search.png")
    write_best(folder / "best.args", settings[best["trial"]], best, args)
    return best


def draw_search(images, ranges, tried, args, path):
    """A panel an option: each setting's mean score and its sd over the folds."""
    panels, y_label = [], f"mean {'IoU' if args.nets == 'dnet' else 'AUC'} of {args.search_folds} folds, with its sd"
    for key, values in ranges.items():
        axis = "log" if by_ratio(values) else "whole" if isinstance(values[0], int) else "linear"
        axis = values if isinstance(values, list) else axis
        series = []
        for epochs in dict.fromkeys(row["epochs"] for row in tried):
            rows = [r for r in tried if r["epochs"] == epochs]
            points = [(r[key], r["mean"], r["mean"] - r["sd"], min(r["mean"] + r["sd"], 1)) for r in rows]
            name = f"{epochs} epoch{'s' if epochs > 1 else ''}"
            series.append(plots.Series(name, *zip(*points, strict=True), dots=True))
        title = f"{key}: the best has {rows[0][key]:g}"
        panels.append(plots.line_chart(series, title, key, y_label, plots.data_range([values]), x_axis=axis))
    title = f"{Path(images.source).name}: {describe_model(args)}, {args.settings} settings, judged on train and val"
    plots.save_png(plots.page(panels, min(3, len(panels)), title), path)


def describe(setting):
    return "  ".join(f"{k} {v:g}" for k, v in setting.items())


def write_best(path, setting, best, args):
    """An option file: what the user set, and over it the best setting."""
    skipped = ("settings", "search_over", "search_folds", "name", "runs", "resume", "workers", "help")
    score = f"{best['mean']:.4f} +- {best['sd']:.4f}"
    lines = [f"# of {args.settings} settings: {score}, mean of {args.search_folds} folds"]
    for action in build_parser()._actions:
        key, value = action.dest, {**vars(args), **setting}.get(action.dest)
        if key in skipped or (value == action.default and key not in setting):
            continue
        given = value if isinstance(value, list) else [] if value is True else [value]
        joint = " " if isinstance(value, list) or not given else "="  # --window -160,240 would begin like an option
        lines.append(joint.join([action.option_strings[-1], " ".join(shlex.quote(str(v)) for v in given)]).strip())
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def main(argv=None):
    """Search as the command line says. Returns the best row of the table, see search, and the run folder."""
    args = parse(argv, build_parser())
    if args.against:
        raise InputError("--against compares on the test split, which a search does not touch; leave it out")
    if not args.settings or args.settings < 1:
        raise InputError("say how many settings to try: python search.py 30 --data ...")
    choose_device(args.device)
    images, ranges = prepare(args)[0], search_ranges(args)
    rows, part = search_folds(images, args)
    for fold in range(args.search_folds):
        check_split(images, rows[part == fold], f"search's fold {fold + 1}")
    check_attend(images, rows, argparse.Namespace(attend=max(ranges.get("attend", [0.0]))))
    folder, start = prepare_folder(args, images, "search-"), time.time()
    print(f"run folder: {folder}")
    try:
        with claim(folder, not args.resume):
            for part in folder.glob("tmp*"):  # of a search that was killed
                shutil.rmtree(part)
            best = search(images, ranges, args, folder)
    except KeyboardInterrupt:
        stop("search.py", folder)
    print(f"\nbest: {describe({k: best[k] for k in ranges})}: {best['mean']:.4f} +- {best['sd']:.4f} over the folds")
    print("chosen as the best of many, so it flatters itself; the test split was not touched")
    print(f"{folder}: search.csv, search.png, best.args   ({time.time() - start:.0f} s)")
    print(f"then: python train.py @{folder / 'best.args'}")
    return best, folder


if __name__ == "__main__":
    run_main(main)
