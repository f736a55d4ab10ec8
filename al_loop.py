"""Active learning: with how few labels does a detector become good, and which images should a person label next?

    python al_loop.py --strategies random,coreset --repeats 3            phantoms: no data needed, 25 minutes of one core
    python al_loop.py @recipes/al-busi.args --data BUSI                  the options of a published result
    python al_loop.py --resume runs/al-BUSI                              after a kill at any moment
    python al_loop.py suggest --model runs/busi/model.pt --pool FOLDER --query 20 --out to_label
    python al_loop.py learn --labels to_label/to_label.csv --data BUSI --positive malignant

The loop: train on the labelled images, look at all others, choose the next ones to label, and again; each round from
the initial weights, always tested on the same images, which are never queried. The strategies and
k-center lie in query.py. The chapters: a chain of rounds, what the chains show, the command line, a person in the loop.

What keeps it honest: labels and boxes of the pool are hidden until they are paid for. Nothing is chosen on a validation
split, whose labels nobody would have counted: every training runs to its last epoch. All strategies share start sets
and seeds, so they are compared in pairs; every curve has a band, every ratio an interval."""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

import data
import files
import judge
import metrics
import models
import options
import plots
import train
from augment import crop
from pictures import letterbox, origin, original_box, parse_window, read_image
from query import COLD, STRATEGIES, Context, candidates
from readers import COLUMNS, InputError, read_csv
from report import clean, describe_model, print_change
from report import compare as compare_models

# ---------------------------------------------------------------------------------------------------------------------
# One chain: a strategy, a seed, and its rounds


def reveal(images, rows):
    """The ImageSet as one knows it who has labelled only `rows`: every other label and box is hidden."""
    labels, boxes = torch.full_like(images.labels, -1), torch.full_like(images.boxes, math.nan)
    labels[rows], boxes[rows] = images.labels[rows], images.boxes[rows]
    known = torch.isin(torch.arange(len(images)), rows)
    masks = None if images.masks is None else images.masks & known[:, None, None]
    return dataclasses.replace(images, labels=labels, boxes=boxes, masks=masks, outlined=images.outlined & known)


@torch.no_grad()
def observe(model, images, rows, boxes=None, batch=64):
    """Embeddings (P, D) of the first member and the members' probabilities (M, P, K), on the CPU, in one pass."""
    embeddings, probabilities, patients = [], [], data.meta_for(images, model.info["meta_spec"])
    for index in rows.split(batch):
        pixels = images.pixels[index].to(model.device)
        meta, around = (None if v is None else v[index].to(model.device) for v in (patients, boxes))
        found = [m.embed(crop(pixels, model.regions(m, around), model.info["size"]), meta) for m in model.members]
        embeddings.append(found[0].float().cpu())
        heads = zip(model.members, found, strict=True)
        probabilities.append(torch.stack([models.to_probabilities(m.classify(e)) for m, e in heads]).cpu())
    return models.finite(torch.cat(embeddings)), models.finite(torch.cat(probabilities, 1))


@torch.no_grad()
def sample_dropout(member, embeddings, generator, passes=20):
    """Probabilities (V, P, K) under as many dropout masks (Gal & Ghahramani 2016). C-Net drops only before its last
    layer, so that the backbone need not run again."""
    keep, device = 1 - member.dropout.p, next(member.parameters()).device
    answers = []
    for _ in range(passes):
        mask = (torch.rand(embeddings.shape, generator=generator) < keep) / keep
        answers.append(models.to_probabilities(member.head((embeddings * mask).to(device))).cpu())
    return torch.stack(answers)


def ask(strategy, model, images, pool, labelled, free, k, generator, boxes=None):
    """The k images, as indices into `pool`, that a strategy would have labelled next."""
    embeddings, members = observe(model, images, pool, boxes)
    if strategy == "committee" and len(members) < 2:
        raise InputError("committee: the model is one network, a committee needs members; train with --ensemble A,B")
    if strategy == "bald" and not model.members[0].dropout.p:
        raise InputError("bald: the model was trained without --dropout, its answers can't be sampled")
    sampled = sample_dropout(model.members[0], embeddings, generator) if strategy == "bald" else None
    context = Context(embeddings, model.combine(members), labelled, free, generator, members, sampled)
    return STRATEGIES[strategy](context, k)


def first_labels(images, pool, groups, seed, args):
    """Indices into the pool of the start set, the same for every strategy; chosen, if not at random, on the embeddings
    of the initial network: there is no label to learn from yet."""
    generator, nothing = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    free = candidates(groups, nothing, args.start)
    if args.start_by == "random":
        return STRATEGIES["random"](Context(None, None, nothing, free, generator), args.start)
    torch.manual_seed(seed)
    same = {**train.network_options(images, args), "meta": 0 if images.meta is None else images.meta.shape[1]}
    net = models.CNet((args.ensemble or args.model).split(",")[0], len(images.classes), **same)
    model = models.Ensemble([net.eval().to(models.choose_device(args.device))], **train.model_info(images, args, seed))
    return ask(args.start_by, model, images, pool, nothing, free, args.start, generator)


def self_teacher(before, known, rows, args):
    """Soft answers (N, K) of the last round's C-Net on the images `rows`; what it is not asked stays undecided."""
    boxes = None if args.roi == "none" else train.locate(before, known, torch.arange(len(known)))
    answers = torch.full((len(known), len(known.classes)), 1 / len(known.classes))
    answers[rows] = before.combine(train.predict(before, known, rows, boxes)).float()
    return answers


def assess(model, images, test, look):
    """{"auc"} of C-Net, and {"iou", "iou_at_50"} where there is a D-Net, on the test images."""
    answers = model.combine(train.predict(model, images, test, look))
    result = {"auc": metrics.evaluate(answers, images.labels[test])["auc"]}
    if model.finders:
        iou = metrics.paired_iou(train.locate(model, images, test), images.boxes[test])
        result |= metrics.means(metrics.localisation(iou))
    return {name: float(value) for name, value in result.items()}


def run_chain(images, strategy, seed, args, folder):
    """All rounds of one strategy and seed, or with strategy "all" the one training on the whole pool. Returns
    {"strategy", "seed", "rounds": [{"labels", "picks", "auc", "iou", "seconds", ...}]}.

    The state is saved after every round; a chain that was killed goes on from there to the same result."""
    pool, test, folder = images.rows("train"), images.rows("test"), Path(folder) / f"{strategy}-{seed}"
    groups = torch.arange(len(pool)) if args.ignore_groups else images.groups[pool]
    rounds, labelled, last = [], torch.arange(len(pool)), 0 if strategy == "all" else args.rounds
    if (folder / "state.pt").exists():
        state, advice = files.read_checkpoint(folder / "state.pt"), "remove it, and this chain begins again"
        with files.parts_of(folder / "state.pt", advice):
            rounds, labelled = state["rounds"], state["labelled"]
            check_chain(rounds, labelled, len(pool), args, strategy)
    elif strategy != "all":
        labelled = first_labels(images, pool, groups, seed, args)
    own = (args.ensemble or args.model).split(",")
    asked = own * args.committee if strategy == "committee" and len(own) == 1 else own
    judged = len(own) * len(args.roi.split(","))  # of a committee that was only trained to be asked, one is judged
    follows = args.warm_start or args.distill != "none"  # every round needs the model of the last one
    for number in range(len(rounds), last + 1):
        began, rows, before, teacher, unlabelled = time.time(), pool[labelled], None, None, None
        known = reveal(images, rows)
        if number and follows:
            before = models.load(folder / f"round{number - 1}.pt", models.choose_device(args.device))
        if number and args.distill != "none":
            if args.distill == "pool":
                unlabelled = pool[~torch.isin(pool, rows)]
            one = models.Ensemble(before.members[:judged], dnets=before.dnets, **before.info)
            teacher = self_teacher(one, known, rows if unlabelled is None else pool, args)
        settings = argparse.Namespace(**{**vars(args), "ensemble": ",".join(asked if number < last else own)})
        work = folder / f"round{number}"
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "output.txt", "a") as file, contextlib.redirect_stdout(file):
            start = before if args.warm_start else None
            model, look, _ = train.train_model(known, rows, pool[:0], settings, work, seed, teacher, unlabelled, start)
        new = rows[rounds[-1]["labels"] if rounds else 0 :]
        result = {"labels": len(rows), "picks": [images.names[i] for i in new.tolist()]}
        result |= assess(models.Ensemble(model.members[:judged], dnets=model.dnets, **model.info), images, test, look)
        if number < last:
            free = candidates(groups, labelled, args.query)
            generator = torch.Generator().manual_seed(1000 * seed + number + 1)
            picks = ask(strategy, model, known, pool, labelled, free, args.query, generator, look)
            labelled = torch.cat([labelled, picks])
            if follows:
                models.save(folder / f"round{number}.pt", model)
        rounds.append(result | {"seconds": round(time.time() - began, 1)})
        files.save_checkpoint(folder / "state.pt", {"rounds": rounds, "labelled": labelled})
        shutil.rmtree(work)
        (folder / f"round{number - 1}.pt").unlink(missing_ok=True)
        values = "  ".join(f"{k} {result[k]:.3f}" for k in ("auc", "iou") if k in result)
        print(f"{strategy:10s} seed {seed}  {len(rows):5d} labels  {values}  {time.time() - began:.0f} s", flush=True)
    return {"strategy": strategy, "seed": seed, "rounds": rounds}


def check_chain(rounds, labelled, pool, args, strategy):
    """ValueError, or what it likes, unless a chain can go on from there; see run_chain."""
    counts = [pool] if strategy == "all" else [args.start + i * args.query for i in range(args.rounds + 1)]
    if labelled.dtype != torch.long or not 0 <= labelled.min() <= labelled.max() < pool:
        raise ValueError("what is labelled lies outside of the pool")
    if len(labelled) != len(labelled.unique()) or [r["labels"] for r in rounds] != counts[: len(rounds)]:
        raise ValueError("the numbers of labels are not those of this run")
    if len(labelled) != counts[min(len(rounds), len(counts) - 1)]:
        raise ValueError("what was bought last is missing")
    judged = all(0 <= r[k] <= 1 for r in rounds for k in ("auc", "iou") if k in r)
    if not judged or not all(r["seconds"] >= 0 and isinstance(name, str) for r in rounds for name in r["picks"]):
        raise ValueError("a result is none")


# ---------------------------------------------------------------------------------------------------------------------
# What the chains show: curves, labels needed, and whether a strategy is worth its name

SHARES = (0.90, 0.95, 0.99)  # of the full-data AUC


def labels_to_reach(curves, labels, goal):
    """How many labels (B,) each curve (B, T) over `labels` (T,) first needs to reach `goal` (a number, or (B,)), between
    two rounds by a straight line. inf where it never does."""
    goal = torch.as_tensor(goal, dtype=torch.double).expand(len(curves))[:, None]
    above = curves >= goal
    i = above.int().argmax(1, keepdim=True)  # the first round that is above
    before = (i - 1).clamp(min=0)
    low, high = curves.gather(1, before), curves.gather(1, i)
    share = ((goal - low) / (high - low)).nan_to_num(0).clamp(0, 1)
    reached = labels[before] + share * (labels[i] - labels[before])
    return torch.where(above.any(1), reached[:, 0], math.inf)


def area(curves, labels):
    """Mean height (R,) of learning curves (R, T) over the labels (T,): the area under the curve over its width."""
    return torch.trapezoid(curves, labels, dim=1) / (labels[-1] - labels[0])


def compare(curves, full, labels, replicates=2000):
    """Each strategy against random, from AUC curves {name: (R, T)} of the same R seeds, full (R,) and labels (T,).

    {name: {"area": mean, "gain": paired difference to random, its t interval and p, "needed": {share: {"labels",
    "ratio", "low", "high"}}}}. The ratio is that of the mean curves' labels, its interval a bootstrap over the seeds
    (pairs kept); a curve that does not get there is counted as one query after its last round, and its labels are None."""
    drawn = torch.randint(len(full), (replicates, len(full)), generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([torch.arange(len(full))[None], drawn])  # the first is no resample
    end, quantiles, table = float(2 * labels[-1] - labels[-2]), torch.tensor([0.025, 0.975], dtype=torch.double), {}
    for name, curve in curves.items():
        mean, low, high, p = metrics.mean_interval(area(curve, labels) - area(curves["random"], labels))
        row = {"area": float(area(curve, labels).mean()), "gain": mean, "low": low, "high": high, "needed": {}}
        tests = max(1, len(curves) - 1)  # Bonferroni: so many strategies were tried
        row["p"] = min(1.0, p * tests) if math.isfinite(p) else math.nan
        for share in SHARES:
            goal = share * full[drawn].mean(1)
            own, chance = (labels_to_reach(c[drawn].mean(1), labels, goal) for c in (curve, curves["random"]))
            ratios = own.clamp(max=end) / chance.clamp(max=end)
            low, high = torch.quantile(ratios[1:], quantiles).tolist() if len(full) > 1 else (math.nan, math.nan)
            ratio = float(ratios[0])
            if own[0] == chance[0] == math.inf:  # neither gets there
                ratio = low = high = math.nan
            needed = {"labels": float(own[0]) if own[0] < math.inf else None, "ratio": ratio, "low": low, "high": high}
            row["needed"][f"{share:.2f}"] = needed
        table[name] = row
    return table


def verdict(name, row):
    """One strategy against random, in words."""
    words = "better than random" if row["gain"] > 0 else "WORSE than random"
    if not row["p"] < 0.05:  # also where one repeat gives no p
        words = "no better than random could be shown on this data"
    return f"{name}: {words} ({gain_text(row, ' of mean AUC')})"


def gain_text(row, what=""):
    """As in "+0.0120 [+0.0010, +0.0230], p 0.036"; one seed has neither interval nor p."""
    p = f", p {row['p']:.3f}" if math.isfinite(row["p"]) else ""
    return metrics.interval_text({"value": row["gain"], **row}, "+.4f") + what + p


def finished_loop(images, args):
    """The al.json of the run that --against names. Asked before any training: InputError where nothing can be compared."""
    file = Path(args.against) / "al.json"
    if not file.is_file():
        raise InputError(f"--against {args.against}: no al.json there; give the folder of a finished run")
    with files.parts_of(file, "give the folder of another run"):
        return matching_loop(json.loads(file.read_text()), images, args)


def matching_loop(other, images, args):
    """The al.json `other`, if it can be compared with what is asked for."""
    if not {c["seed"] for c in other["chains"]} & set(range(args.seed, args.seed + args.repeats)):
        raise InputError(f"--against {args.against}: no seed in common: nothing to compare")
    own = {"classes": images.classes, "pool": len(images.rows("train")), "test": len(images.rows("test"))}
    if any(other["data"][k] != v for k, v in own.items()):
        raise InputError(f"--against {args.against}: it has other classes, or another pool or test split")
    if other["labels"] != list(range(args.start, args.start + args.rounds * args.query + 1, args.query)):
        raise InputError(f"--against {args.against}: its rounds have other numbers of labels")
    options.check_against(args.against, images)
    for chain in other["chains"]:
        curve, count = [r["auc"] for r in chain["rounds"]], 1 if chain["strategy"] == "all" else len(other["labels"])
        if not isinstance(chain["strategy"], str) or len(curve) != count or not all(0 <= v <= 1 for v in curve):
            raise ValueError("a chain is no curve")
    return other


def compare_runs(report, other):
    """Each strategy's mean AUC in one al.json against its own in another, with the same seeds and numbers of labels:
    {strategy: {"gain", "low", "high", "p"}}, paired over the seeds. It tells what distillation, or the groups, are worth."""
    own, others = (
        {(c["strategy"], c["seed"]): [r["auc"] for r in c["rounds"]] for c in some["chains"] if c["strategy"] != "all"}
        for some in (report, other)
    )
    gains, labels = {}, torch.tensor(report["labels"], dtype=torch.double)
    for strategy, seed in sorted(own.keys() & others.keys()):
        pair = torch.tensor([others[strategy, seed], own[strategy, seed]], dtype=torch.double)
        gains.setdefault(strategy, []).append(float(area(pair, labels).diff()))
    return {n: dict(zip(("gain", "low", "high", "p"), metrics.mean_interval(v), strict=True)) for n, v in gains.items()}


def write_al_report(images, chains, args, folder, other=None):
    """al.json and curves.png from the chains; other: see finished_loop. Returns the report."""
    chains = sorted(chains, key=lambda c: c["seed"])  # workers finish in any order
    by_name = {n: [c["rounds"] for c in chains if c["strategy"] == n] for n in [*args.strategies, "all"]}
    labels = [r["labels"] for r in by_name["random"][0]]
    about = {"source": images.source, "classes": images.classes, "size": args.size, "pool": len(images.rows("train"))}
    about |= {"test": len(images.rows("test")), "placeholder_boxes": images.placeholder_boxes}
    seconds = round(sum(r["seconds"] for c in chains for r in c["rounds"]), 1)
    report = {"data": about, "model": describe_model(args), "distill": args.distill, "seconds": seconds}
    report |= {"labels": labels, "chains": chains}
    columns = []
    for metric, title in (("auc", "test AUC"), ("iou", "mean IoU of D-Net's boxes")):
        if not all(metric in r for c in chains for r in c["rounds"]):
            continue
        values = {n: [[r[metric] for r in rounds] for rounds in repeats] for n, repeats in by_name.items()}
        curves = {n: torch.tensor(v, dtype=torch.double) for n, v in values.items()}
        points = {n: [metrics.mean_interval(v)[:3] for v in curve.T] for n, curve in curves.items()}
        names = ("mean", "low", "high")
        report[metric] = {n: [dict(zip(names, v, strict=True)) for v in some] for n, some in points.items()}
        columns.append(curve_panels(points, labels, title))
        full = curves.pop("all")[:, 0]
        if metric == "auc":
            report["table"] = compare(curves, full, torch.tensor(labels, dtype=torch.double))
            report["words"] = [verdict(n, row) for n, row in report["table"].items() if n != "random"]
    if other:
        report["against"] = compare_runs(report, other)
    files.write_atomically(folder / "al.json", json.dumps(clean(report), indent=1).encode())
    seeds = f"mean of {args.repeats} seeds with its 95 % t band" if args.repeats > 1 else "one seed"
    note = f"{Path(images.source).name}: {report['model']}, {seeds}"
    note += "   PLACEHOLDER BOXES: localisation means nothing" if images.placeholder_boxes else ""
    panels = [panel for row in zip(*columns, strict=True) for panel in row]
    wide = len(columns) if len(columns) > 1 else min(3, len(panels))
    plots.save_png(plots.page(panels, wide, note), folder / "curves.png")
    return report


def curve_panels(points, x, title):
    """Charts of one metric: all means together, then each strategy beside random, with their bands. points: {strategy:
    [(mean, low, high), ...]}, with the full-data line under "all". A strategy looks alike in all of them."""
    full = plots.Series("all labels", [x[0], x[-1]], [points["all"][0][0]] * 2, style="black")
    styles = {n: i - 1 if i else "#888888" for i, n in enumerate(points) if n != "all"}
    curves = [plots.Series(n, x, *zip(*points[n], strict=True), style=style) for n, style in styles.items()]
    low, high = plots.data_range(s.y for s in [*curves, full])
    room = 0.3 * (high - low) + 0.01
    span = (max(0.0, low - room), min(1.0, high + room))  # bands that reach further are cut

    def chart(some, name):
        return plots.line_chart([*some, full], name, "labels", title, None, span, "whole")

    pairs = [chart([curves[0], one], f"{title}: {one.name}") for one in curves[1:]]
    return pairs if len(pairs) == 1 else [chart([dataclasses.replace(c, low=None) for c in curves], title), *pairs]


def needed_text(needed, most):
    """As in "84  0.72 [0.55, 0.93]": labels, and the ratio to random's with its interval where there is one."""
    text = f"> {most}" if needed["labels"] is None else f"{needed['labels']:.0f}"
    if math.isfinite(needed["ratio"]):
        text += f"  {needed['ratio']:.2f}"
    return text + (f" [{needed['low']:.2f}, {needed['high']:.2f}]" if math.isfinite(needed["low"]) else "")


def print_al_report(report):
    full = report["auc"]["all"][0]
    print(f"\nfull data: AUC {metrics.interval_text({'value': full['mean'], **full})}")
    print("labels needed for a share of it, and as a ratio to random's [95 %, bootstrap over the seeds]")
    print(f"{'':11s} mean AUC" + "".join(f"{f'{100 * s:.0f} %':>30s}" for s in SHARES))
    for name, row in report["table"].items():
        cells = [needed_text(row["needed"][f"{share:.2f}"], report["labels"][-1]) for share in SHARES]
        print(f"{name:11s} {row['area']:.4f}  " + "".join(f"{cell:>30s}" for cell in cells))
    for line in report["words"]:
        print(line)
    tested = report["data"]["test"]
    print(f"(intervals and p: over seeds, on one split; that the {tested} test images are a sample is not in them)")
    for name, row in report.get("against", {}).items():
        print(f"{name}: mean AUC against its own in the other run {gain_text(row)}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line of the loop

# fmt: off
LOOP = [
    ("strategies", "random,coreset", "A,B", f"all, or some of: {', '.join(STRATEGIES)}"),
    ("start", 20, (1, options.MANY), "labels before the first query"),
    ("query", 20, (1, options.MANY), "labels bought in each round"),
    ("rounds", 8, (1, options.MANY), "queries after the start set"),
    ("start-by", "random", list(COLD), "who chooses the start set, alike for all"),
    ("committee", 3, (2, 100), "networks that vote for the strategy committee; one is judged"),
    ("ignore-groups", False, None, "offer near-duplicates of labelled images too"),
    ("warm-start", False, None, "go on from the last round's weights, not from the first"),
    ("distill", "none", ["none", "labelled", "pool"], "self-distillation: the last round's C-Net teaches the next on the labelled images, or on the whole pool"),
]
# fmt: on


def build_parser():
    what = __doc__.split("\n\n")[0] + " Also: al_loop.py suggest -h, al_loop.py learn -h."
    p = options.train_parser(what, **{"active learning": LOOP})
    p.set_defaults(steps_per_epoch=5)  # rounds of few and of many labels train alike
    return p


def parse(argv=None):
    args = options.parse(argv, build_parser())
    if isinstance(args.strategies, str):
        args.strategies = list(STRATEGIES) if args.strategies == "all" else args.strategies.split(",")
    args.strategies = list(dict.fromkeys(["random", *args.strategies]))
    for name in args.strategies:
        if name not in STRATEGIES:
            raise InputError(f"--strategies {name}: no such strategy (there are: {', '.join(STRATEGIES)})")
    if "bald" in args.strategies and not args.dropout:
        raise InputError("--strategies bald draws its committee by dropout: give a --dropout above 0")
    if args.folds > 1 or args.teacher or "mask" in args.roi:
        raise InputError("--folds, --teacher and --roi mask have no meaning in the loop; leave them out")
    if args.nets == "dnet":
        raise InputError("--nets dnet: there is no C-Net, whose embeddings and answers choose the images")
    return args


def main(argv=None):
    """The loop, or suggest or learn, as the command line says. The loop returns its report and the run folder."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["suggest"], ["learn"]):
        return {"suggest": suggest, "learn": learn}[argv[0]](argv[1:])
    args = parse(argv)
    models.choose_device(args.device)
    images = options.load_images(args)
    train.check_split(images, images.rows("test"), "test")
    if args.start + args.rounds * args.query > (most := len(images.rows("train"))):
        asked = f"--start {args.start} + --rounds {args.rounds} x --query {args.query}"
        raise InputError(f"{asked}: more than the pool of {most} images")
    train.check_networks(images, args)
    other = finished_loop(images, args) if args.against else None
    folder = options.prepare_folder(args, images, "al-")
    print(f"run folder: {folder}")
    seeds = range(args.seed, args.seed + args.repeats)
    jobs = [(name, seed, args, folder) for seed in seeds for name in ["all", *args.strategies]]
    chains, start = [], time.time()
    try:
        with (
            options.claim(folder, not args.resume),
            train.Interrupt() if args.workers == 1 else contextlib.nullcontext(),
        ):
            for chain in options.run_jobs(run_chain, jobs, images, args, args.workers):
                chains.append(chain)
                left = (time.time() - start) / len(chains) * (len(jobs) - len(chains))
                left = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
                print(f"{len(chains)} of {len(jobs)} chains, about {left} left", flush=True)
    except (train.Stopped, KeyboardInterrupt):
        options.stop("al_loop.py", folder)
    report = write_al_report(images, chains, args, folder, other)
    print_al_report(report)
    print(f"\n{folder}: al.json, curves.png   ({time.time() - start:.0f} s)")
    print(models.DISCLAIMER)
    return report, folder


# ---------------------------------------------------------------------------------------------------------------------
# A person in the loop: suggest writes a list, the person fills it in, learn trains with the answers

# probability: of the positive class, as everywhere; with more than two classes of the suggested one.
HEADER = ["number", "image", "suggested_label", "probability", "suggested_box", "label", "box", "group"]

# fmt: off
SUGGEST = [
    ("model", None, "MODEL", "model file or run folder; needed"),
    ("pool", None, "DIR", "images without labels (labels in it are not looked at); needed"),
    ("labelled", [], "DATA ...", "what has labels already, folders or filled-in CSVs: never suggested, and coreset keeps away from it"),
    ("query", 20, (1, options.MANY), "how many images"),
    ("strategy", "coreset", list(STRATEGIES), "how they are chosen"),
    ("out", "to_label", "DIR", "folder for to_label.csv and to_label.png; never written over"),
    ("show-guess", False, None, "show what the model thinks, too: it leads the one who labels"),
    ("seed", 0, (0, 2**31), "of the strategies that draw"),
    ("cache", "runs/cache", "DIR", "folder of decoded images"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda"),
]
ANSWERS = [
    ("labels", None, "CSV ...", "filled-in files of suggest; they are only read"),
    ("partial", False, None, "learn from the rows that have a label, pass over the others"),
]
# fmt: on


def suggest(argv):
    """Write to_label.csv and to_label.png: the images of --pool that the strategy picks, with the model's own opinion.
    Returns the path of the CSV."""
    what = "Choose the images of a pool that a person should label next: a CSV to fill in, and a contact sheet."
    args = options.build_parser({"suggest": SUGGEST}, what, prog="al_loop.py suggest").parse_args(argv)
    if not (args.model and args.pool):
        raise InputError("suggest: give --model and --pool (see -h)")
    out = Path(args.out)
    if (out / "to_label.csv").exists():
        raise InputError(f"--out {out}: holds a to_label.csv, which may have answers; give another folder")
    model = models.load_classifier(args.model, models.choose_device(args.device))
    images, labelled, met = read_pool(args, model.info)
    if met:
        print(f"{met} images of the pool are left out: the model was trained, validated or tested on them")
    free = candidates(images.groups, labelled, args.query)
    if args.query > len(free):
        raise InputError(f"--query {args.query}: the pool {args.pool} has {len(free)} images without a label")
    everything, generator = torch.arange(len(images)), torch.Generator().manual_seed(args.seed)
    boxes = train.locate(model, images, everything)
    picks = ask(args.strategy, model, images, everything, labelled, free, args.query, generator, boxes)
    title = f"{args.strategy}: {args.query} of {len(free)} images to label"
    write_sheet(out, images, picks, model if args.show_guess else None, boxes, title)
    file, classes = out / "to_label.csv", ", ".join(model.info["classes"])
    box = "box (x_min y_min x_max y_max in pixels) where you can"
    print(f"{file}: fill in the column label with {classes}, and {box}")
    print(f"{out / 'to_label.png'}: the same images, numbered")
    print(f"then: python al_loop.py learn --labels {file} --data ...")
    print(models.DISCLAIMER)
    return file


def read_pool(args, info):
    """The pool and what is labelled as one ImageSet, as a model of this info sees it; the rows that need no label, which
    are the labelled ones and those that the model has met; and how many of the pool it has met."""
    same = {k: info[k] for k in ("channels", "equalise", "window")} | {"cache": args.cache, "skip_bad": True}
    sources = [args.pool, *args.labelled]
    images, *more = (data.load(source, info["load_size"], **same, log=lambda _: None) for source in sources)
    count, spec = len(images), info["meta_spec"]
    if not Path(images.names[0]).is_file():
        raise InputError(f"--pool {args.pool}: its images are no files, which a table could name; save each as a file")
    for labelled in more:
        answered = torch.nonzero(labelled.labels >= 0)[:, 0]  # of a half-filled CSV the others still wait
        images = data.join(images, labelled.take(answered) if len(answered) else labelled)
    paths = [Path(name).resolve() for name in images.names]
    known = set(paths[count:])
    seen = torch.cat([*info.get("seen", {}).values(), torch.zeros(0, dtype=torch.long)])
    met = torch.isin(images.pictures()[:count], seen)
    rows = [*range(count, len(images)), *(i for i in range(count) if paths[i] in known or met[i])]
    # what is known of the patients of the labelled images is forgotten: of the pool's nothing is known
    images.meta_spec, images.meta = spec, data.encode_meta([{}] * len(images), None, spec)[0] if spec else None
    return images, torch.tensor(rows, dtype=torch.long), int(met.sum())


def write_sheet(out, images, picks, model, boxes, title):
    """to_label.csv, to be filled in, and to_label.png, the same images numbered. model: whose guess and box (of all
    images, or None) are shown; None: nobody's, for who labels is not to be led."""
    guesses = [["", "", ""]] * len(picks) if model is None else read_guesses(model, images, picks, boxes)
    file, captions = io.StringIO(), []
    table = csv.writer(file, lineterminator="\n")
    table.writerow(HEADER)
    for number, (i, guess) in enumerate(zip(picks.tolist(), guesses, strict=True), 1):
        path = Path(images.names[i])
        table.writerow([number, str(path.resolve()), *guess, "", "", images.group_names[i]])
        captions.append(f"{number}: {path.name[-24:]}" + (f"\n{guess[0][:14]}?  p {guess[1]}" if model else ""))
    pixels = [images.pixels[i] for i in picks.tolist()]
    found = None if model is None or boxes is None else boxes[picks].clone()
    if found is not None:
        found[[k for k, guess in enumerate(guesses) if not guess[2]]] = math.nan
    sheet = plots.contact_sheet(pixels, captions, found, title=title + ("" if found is None else " (D-Net's box)"))
    files.write_atomically(out / "to_label.csv", file.getvalue().encode(errors="surrogateescape"))  # bytes of names
    plots.save_png(sheet, out / "to_label.png")


def read_guesses(model, images, picks, boxes):
    """What the model thinks of these images, as words: [class, probability (of the positive class, of more than two of
    the likeliest), box in the picture's pixels or ""] each."""
    info, guesses, said = model.info, [], judge.look_at(model, images, picks, boxes)
    probabilities = model.combine(said.opinions.mean(1))
    sure = [boxes is not None] * len(picks)  # that there is a lesion at all
    if said.found:
        sure = (said.found.scores() >= info["lesion_threshold"]).tolist()
    answers = metrics.decide(probabilities, info["threshold"])
    for i, answer, p, lesion in zip(picks.tolist(), answers.tolist(), probabilities, sure, strict=True):
        box, asked = "", 1 if len(p) == 2 else answer
        if lesion:
            picture = read_image(images.names[i], info["channels"])
            placement = letterbox(picture, info["load_size"])[1]
            corners = original_box(boxes[i].tolist(), placement, info["load_size"], origin(picture))
            box = " ".join(f"{v:.0f}" for v in corners)
        guesses.append([info["classes"][answer], f"{p[asked]:.3f}", box])
    return guesses


def read_answers(path, classes, partial=False):
    """What a person wrote into a to_label.csv: Entry objects whose label is an index into `classes`. A class that was
    merged (benign+normal) may be named by its parts. partial: pass over rows without a label. InputError names the row."""
    words = {part.lower(): k for k, name in enumerate(classes) for part in [name, *name.split("+")]}
    entries = []
    for entry in read_csv(path, COLUMNS):
        where = f"{path}, row {entry.line} ({Path(entry.name).name})"
        if not Path(entry.image).is_file():
            raise InputError(f"{where}: the image is not there any more; put it back, or correct its path")
        if entry.box and not entry.label:
            raise InputError(f"{where}: a box but no label; fill it in")
        if entry.label and entry.label.lower() not in words:
            raise InputError(f"{where}: label {entry.label!r} is none of {', '.join(words)}")
        entries.append(dataclasses.replace(entry, label=words.get(entry.label.lower())))
    empty = [entry.line for entry in entries if entry.label is None]
    if empty and not partial:
        rows = f"{len(empty)} rows ({', '.join(map(str, empty[:8]))}{' ...' if len(empty) > 8 else ''})"
        raise InputError(f"{path}: no label in {rows}; fill them in, or learn from the others with --partial")
    if len(empty) == len(entries):
        raise InputError(f"{path}: no row has a label")
    return [entry for entry in entries if entry.label is not None]


def add_answers(images, entries, args):
    """The ImageSet with the answered images joined to it, and their rows. Those that show the same as an image of the
    validation or test split, or are of its group (patient, lesion), are left out: the test would be none any more."""
    _, channels, _, size = images.pixels.shape
    work = (entries, size, channels, args.clahe, args.cache, args.skip_bad)
    pixels, masks, boxes, thumbnails, kept = data.decode(*work, window=parse_window(args.window))
    entries = [entries[i] for i in kept]
    if masks is None and images.masks is not None:  # so that the others keep theirs
        masks = torch.zeros(len(entries), size, size, dtype=torch.bool)
    meta = None if images.meta is None else data.encode_meta([{}] * len(entries), None, images.meta_spec)[0]
    new = data.ImageSet(
        pixels, torch.tensor([e.label for e in entries]), boxes, masks, torch.arange(len(entries)),
        ["train"] * len(entries), meta, [e.image for e in entries], images.classes, outlined=boxes[:, 0].isfinite(),
        thumbnails=thumbnails, group_names=["" if args.split_by_image else e.group for e in entries],
    )  # fmt: skip
    everything = data.join(images, new)
    groups, rows, relatives = everything.groups.tolist(), [], 0
    held_out = {group for group, split in zip(groups, everything.splits, strict=True) if split in ("val", "test")}
    known = {Path(images.names[i]).resolve() for i in torch.nonzero(images.labels >= 0)[:, 0].tolist()}
    for i, entry in enumerate(entries, len(images)):
        if groups[i] in held_out and everything.group_names[i]:
            relatives += 1
        elif groups[i] in held_out:
            print(f"left out {entry.image}: it shows the same as an image of the validation or test split")
        elif Path(entry.image).resolve() in known:
            print(f"left out {entry.image}: it has a label in --data")
        else:
            rows.append(i)
    if relatives:
        print(f"{relatives} answers are left out: their groups have images in the validation or test split")
    if not rows:
        raise InputError("--labels: no image is left to learn from")
    return everything, torch.tensor(rows)


def learn(argv):
    """Train without and with the answers, alike in all else, and compare the two on the same test images. Returns the
    change, see report.compare, and the run folder."""
    what = "Train again with the answers of a person, and print what changed on the test split."
    args = options.parse(argv, options.train_parser(what, prog="al_loop.py learn", answers=ANSWERS))
    if not args.labels:
        raise InputError("learn: give the filled-in to_label.csv with --labels")
    if args.folds > 1 or args.repeats > 1 or args.nets == "dnet" or args.against or args.workers > 1:
        raise InputError(
            "learn: --folds, --repeats, --against, --workers and --nets dnet mean nothing here; leave them out"
        )
    images = options.load_images(args)
    train.check_networks(images, args)
    entries = [e for path in args.labels for e in read_answers(path, images.classes, args.partial)]
    more, rows = add_answers(images, entries, args)
    ((_, fixed, val, test, seed),) = train.plan(images, args)
    added = ", ".join(f"{int((more.labels[rows] == k).sum())} {name}" for k, name in enumerate(images.classes))
    print(f"{len(rows)} answers: {added}")
    train.check_networks(images, args)
    folder = options.prepare_folder(args, more, "learn-")
    runs = [("before", fixed, val, test, seed), ("after", torch.cat([fixed, rows]), val, test, seed)]
    try:
        with options.claim(folder, not args.resume), train.Interrupt():
            before, after = train.make_runs(more, runs, args, folder)
    except (train.Stopped, KeyboardInterrupt):
        options.stop("al_loop.py learn", folder)
    change = compare_models(more, [before], [after])
    files.write_atomically(folder / "change.json", json.dumps(clean(change), indent=1).encode())
    print()
    print_change(change)
    print(f"\n{folder}: before/model.pt, after/model.pt, change.json")
    print(models.DISCLAIMER)
    return change, folder


if __name__ == "__main__":
    options.run_main(main)
