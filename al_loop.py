"""Active learning: with how few labels does a detector become good, and which images should a person label next?

    python al_loop.py --strategies random,coreset --repeats 3            phantoms: no data needed, 25 minutes of one core
    python al_loop.py @recipes/al-busi.args --data BUSI                  the options of a published result
    python al_loop.py --resume runs/al-BUSI                              after a kill at any moment
    python al_loop.py --learn head --from runs/busi --strategies all --data BUSBRA.csv     a new hospital: seconds a chain
    python al_loop.py suggest -h, learn -h                               a person in the loop, see person.py

The loop: train on the labelled images, look at all others, choose the next ones to label, and again; each round from
the initial weights, always tested on the same images, which are never queried. The strategies and
k-center lie in query.py. The chapters: a chain of rounds, what the chains show, the command line. With --learn head the
network is frozen, and only its last layer is learnt (transfer.py): that takes no time, so that fifty seeds are usual.

What keeps it honest: labels and boxes of the pool are hidden until they are paid for. Nothing is chosen on a validation
split, whose labels nobody would have counted: every training runs to its last epoch. All strategies share start sets
and seeds, so they are compared in pairs; every curve has a band, every ratio an interval."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

import files
import metrics
import models
import options
import plots
import train
import transfer
from grouping import partition
from judge import locate, look_at, predict
from person import ask, choose, learn, suggest
from query import COLD, STRATEGIES, Context, candidates
from readers import InputError
from report import clean, describe_model

# ---------------------------------------------------------------------------------------------------------------------
# One chain: a strategy, a seed, and its rounds


def reveal(images, rows):
    """The ImageSet as one knows it who has labelled only `rows`: every other label, box and mark is hidden."""
    labels, boxes = torch.full_like(images.labels, -1), torch.full_like(images.boxes, math.nan)
    labels[rows], boxes[rows] = images.labels[rows], images.boxes[rows]
    known = torch.isin(torch.arange(len(images)), rows)
    masks, beside = (m if m is None else m & known[:, None, None] for m in (images.masks, images.beside))
    shown = {"labels": labels, "boxes": boxes, "masks": masks, "beside": beside, "outlined": images.outlined & known}
    return dataclasses.replace(images, **shown)


def first_labels(images, pool, groups, seed, args):
    """Indices into the pool of the start set, the same for every strategy; chosen, if not at random, on the embeddings
    of the initial network: there is no label to learn from yet."""
    generator, nothing = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    free = candidates(groups, nothing, args.start)
    if args.start_by == "random":
        return STRATEGIES["random"](Context(None, None, nothing, free, generator), args.start)
    return ask(args.start_by, initial_model(images, args, seed), images, pool, nothing, free, args.start, generator)


def initial_model(images, args, seed):
    """An Ensemble of the first member as it is before any training, its last layer of zeros."""
    torch.manual_seed(seed)
    same = {**train.network_options(images, args), "meta": 0 if images.meta is None else images.meta.shape[1]}
    net = models.CNet((args.ensemble or args.model).split(",")[0], len(images.classes), dropout=args.dropout, **same)
    torch.nn.init.zeros_(net.head.weight)
    return models.Ensemble([net.eval().to(models.choose_device(args.device))], **train.model_info(images, args, seed))


def self_teacher(before, known, rows, args):
    """Soft answers (N, K) of the last round's C-Net on the images `rows`; what it is not asked stays undecided."""
    boxes = None if args.roi == "none" else locate(before, known, torch.arange(len(known)))
    answers = torch.full((len(known), len(known.classes)), 1 / len(known.classes))
    answers[rows] = before.combine(predict(before, known, rows, boxes)).float()
    return answers


def assess(model, images, test, look):
    """{"auc"} of C-Net, and {"iou", "iou_at_50"} where there is a D-Net, on the test images."""
    said = look_at(model, images, test, look)
    answers = model.combine(said.opinions.mean(1))
    result = {"auc": metrics.evaluate(answers, images.labels[test])["auc"]}
    if said.found:
        iou = metrics.paired_iou(models.finite(said.found.boxes()), images.boxes[test])
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


def embed_once(images, args, folder):
    """All that chains of --learn head need of the networks, in a file of the run folder: the only forward pass."""
    model = transfer.load_start(args) or initial_model(images, args, args.seed)
    seen = look_at(model, images, torch.arange(len(images)), keep=True)
    models.save(folder / "start.pt", model)
    files.save_checkpoint(folder / "embeddings.pt", {"embeddings": seen.embeddings})


@functools.lru_cache(1)
def embedded(folder):
    """What embed_once wrote: the model, its last layers, and the embeddings [(V, N, D)] of all images."""
    model = models.load(folder / "start.pt")
    return model, transfer.heads_of(model), files.read_checkpoint(folder / "embeddings.pt")["embeddings"]


def divide(images, seed, args):
    """(pool, test) rows of a seed's chains: the splits of the images, or with --redraw a test split of its own."""
    if not args.redraw:
        return images.rows("train"), images.rows("test")
    known = torch.nonzero(images.labels >= 0)[:, 0]
    is_test = partition(images.labels[known], images.groups[known], [1, TESTED], seed) == 1
    return known[~is_test], known[is_test]


TESTED = 0.25  # as many tested as learnt from


def run_head_chain(images, strategy, seed, args, folder):
    """As run_chain, where only the last layer is learnt. It takes a second or few, and is kept when it is whole."""
    file, (model, old, embeddings), began = folder / f"{strategy}-{seed}.json", embedded(folder), time.time()
    (pool, test), nothing = divide(images, seed, args), torch.empty(0, dtype=torch.long)
    groups = torch.arange(len(pool)) if args.ignore_groups else images.groups[pool]
    labelled, generator = torch.arange(len(pool)), torch.Generator().manual_seed(seed)
    first, last, rounds, teacher = embeddings[0][:, pool].mean(0), 0 if strategy == "all" else args.rounds, [], 0
    if file.exists():
        with files.parts_of(file, "remove it, and this chain is made again"):
            rounds = json.loads(file.read_text())
            check_chain(rounds, None, len(pool), args, strategy)
            return {"strategy": strategy, "seed": seed, "rounds": rounds}
    if strategy != "all":
        free = candidates(groups, nothing, args.start)
        labelled = STRATEGIES["random"](Context(None, None, nothing, free, generator), args.start)
    for number in range(last + 1):
        rows, layers = pool[labelled], old
        others = pool[~torch.isin(pool, rows)] if args.distill == "pool" else rows
        if len(rows) and len(others) and number and args.distill != "none":  # the teacher: all rounds before, together
            layers = transfer.distil(old, teacher / number, embeddings, rows, images.labels[rows], others, args)
        elif len(rows):
            layers = transfer.refit(old, embeddings, rows, images.labels[rows], len(images.classes), args.pull)
        opinions = transfer.answers(layers, embeddings, torch.cat([pool, test]))
        of_pool, of_test = opinions.split([len(pool), len(test)], 1)
        auc = metrics.evaluate(model.combine(of_test), images.labels[test])["auc"]
        new = rows[rounds[-1]["labels"] if rounds else 0 :]
        result = {"labels": len(rows), "picks": [images.names[i] for i in new.tolist()], "auc": float(auc)}
        if number < last:
            free = candidates(groups, labelled, args.query)
            generator = torch.Generator().manual_seed(1000 * seed + number + 1)
            now = transfer.with_heads(model, layers) if strategy == "bald" else model
            picks = choose(strategy, now, first, of_pool, labelled, free, args.query, generator, args.pull)
            labelled = torch.cat([labelled, picks])
            if args.distill != "none":
                teacher = teacher + model.combine(transfer.answers(layers, embeddings, torch.arange(len(images))))
        rounds.append(result | {"seconds": round(time.time() - began, 1)})
        began = time.time()
    files.write_atomically(file, json.dumps(rounds).encode())
    return {"strategy": strategy, "seed": seed, "rounds": rounds}


def check_chain(rounds, labelled, pool, args, strategy):
    """ValueError, or what it likes, unless a chain can go on from there, see run_chain; labelled None: it is whole."""
    counts = [pool] if strategy == "all" else [args.start + i * args.query for i in range(args.rounds + 1)]
    if labelled is None and len(rounds) != len(counts):
        raise ValueError("not all of its rounds")
    if labelled is not None:
        if labelled.dtype != torch.long or not 0 <= labelled.min() <= labelled.max() < pool:
            raise ValueError("what is labelled lies outside of the pool")
        if len(labelled) != len(labelled.unique()) or len(labelled) != counts[min(len(rounds), len(counts) - 1)]:
            raise ValueError("what was bought last is missing, or bought twice")
    if [r["labels"] for r in rounds] != counts[: len(rounds)]:
        raise ValueError("the numbers of labels are not those of this run")
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


def compare(curves, full, labels, replicates=2000, overlap=0.0):
    """Each strategy against random, from AUC curves {name: (R, T)} of the same R seeds, full (R,) and labels (T,).

    {name: {"area": mean, "gain": paired difference to random, its t interval and p, "needed": {share: {"labels",
    "ratio", "low", "high"}}}}; the last share, "random", is what random reaches in the end. The ratio is that of the mean
    curves' labels, its interval a bootstrap over the seeds (pairs kept); a curve that does not get there is counted as
    one query after its last round, and its labels are None. overlap: see metrics.mean_interval."""
    drawn = torch.randint(len(full), (replicates, len(full)), generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([torch.arange(len(full))[None], drawn])  # the first is no resample
    goals = {f"{share:.2f}": share * full[drawn].mean(1) for share in SHARES}
    goals["random"] = curves["random"][drawn].mean(1)[:, -1]
    end, quantiles, table = float(2 * labels[-1] - labels[-2]), torch.tensor([0.025, 0.975], dtype=torch.double), {}
    for name, curve in curves.items():
        gains = area(curve, labels) - area(curves["random"], labels)
        mean, low, high, p = metrics.mean_interval(gains, overlap=overlap)
        row = {"area": float(area(curve, labels).mean()), "gain": mean, "low": low, "high": high, "needed": {}}
        tests = max(1, len(curves) - 1)  # Bonferroni: so many strategies were tried
        row["p"] = min(1.0, p * tests) if math.isfinite(p) else math.nan
        for what, goal in goals.items():
            own, chance = (labels_to_reach(c[drawn].mean(1), labels, goal) for c in (curve, curves["random"]))
            ratios = own.clamp(max=end) / chance.clamp(max=end)
            low, high = torch.quantile(ratios[1:], quantiles).tolist() if len(full) > 1 else (math.nan, math.nan)
            ratio = float(ratios[0])
            if own[0] == chance[0] == math.inf:  # neither gets there
                ratio = low = high = math.nan
            needed = {"labels": float(own[0]) if own[0] < math.inf else None, "ratio": ratio, "low": low, "high": high}
            row["needed"][what] = needed
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
    if other.get("redraw", False) != args.redraw:
        raise InputError(f"--against {args.against}: one of the two runs was made with --redraw: nothing to compare")
    pool, test = divide(images, min(c["seed"] for c in other["chains"]), args)
    own = {"classes": images.classes, "pool": len(pool), "test": len(test)}
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
    overlap = TESTED * report["redraw"]
    intervals = {n: metrics.mean_interval(v, overlap=overlap) for n, v in gains.items()}
    return {n: dict(zip(("gain", "low", "high", "p"), v, strict=True)) for n, v in intervals.items()}


def write_al_report(images, chains, args, folder, other=None):
    """al.json and curves.png from the chains; other: see finished_loop. Returns the report."""
    chains = sorted(chains, key=lambda c: c["seed"])  # workers finish in any order
    by_name = {n: [c["rounds"] for c in chains if c["strategy"] == n] for n in [*args.strategies, "all"]}
    labels = [r["labels"] for r in by_name["random"][0]]
    pool, test = divide(images, args.seed, args)
    about = {"source": images.source, "classes": images.classes, "size": args.size, "pool": len(pool)}
    about |= {"test": len(test), "placeholder_boxes": images.placeholder_boxes}
    seconds = round(sum(r["seconds"] for c in chains for r in c["rounds"]), 1)
    report = {"data": about, "model": describe_model(args), "distill": args.distill, "seconds": seconds}
    report |= {"redraw": args.redraw, "labels": labels, "chains": chains}
    overlap = TESTED * args.redraw
    columns = []
    for metric, title in (("auc", "test AUC"), ("iou", "mean IoU of D-Net's boxes")):
        if not all(metric in r for c in chains for r in c["rounds"]):
            continue
        values = {n: [[r[metric] for r in rounds] for rounds in repeats] for n, repeats in by_name.items()}
        curves = {n: torch.tensor(v, dtype=torch.double) for n, v in values.items()}
        points = {n: [metrics.mean_interval(v, overlap=overlap)[:3] for v in curve.T] for n, curve in curves.items()}
        names = ("mean", "low", "high")
        report[metric] = {n: [dict(zip(names, v, strict=True)) for v in some] for n, some in points.items()}
        columns.append(curve_panels(points, labels, title))
        full = curves.pop("all")[:, 0]
        if metric == "auc":
            report["table"] = compare(curves, full, torch.tensor(labels, dtype=torch.double), overlap=overlap)
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
    titles = [*(f"{100 * s:.0f} %" for s in SHARES), "random's last"]
    print(f"{'':15s} mean AUC" + "".join(f"{title:>30s}" for title in titles))
    for name, row in report["table"].items():
        cells = [needed_text(needed, report["labels"][-1]) for needed in row["needed"].values()]
        print(f"{name:15s} {row['area']:.4f}  " + "".join(f"{cell:>30s}" for cell in cells))
    for line in report["words"]:
        print(line)
    tested = report["data"]["test"]
    if report["redraw"]:
        print("(p and intervals of AUC: over test splits that overlap, corrected; those of the ratios are not)")
    else:
        print(f"(intervals and p: over seeds, on one split; that the {tested} test images are a sample is not in them)")
    for name, row in report.get("against", {}).items():
        print(f"{name}: mean AUC against its own in the other run {gain_text(row)}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line of the loop

# fmt: off
LOOP = [
    ("strategies", "random,coreset", "A,B", f"all, or some of: {', '.join(STRATEGIES)}"),
    ("start", 20, (0, options.MANY), "labels before the first query; 0 with --from: the model as it comes"),
    ("query", 20, (1, options.MANY), "labels bought in each round"),
    ("rounds", 8, (1, options.MANY), "queries after the start set"),
    ("start-by", "random", list(COLD), "who chooses the start set, alike for all"),
    ("committee", 3, (2, 100), "networks that vote for the strategy committee; one is judged"),
    ("ignore-groups", False, None, "offer near-duplicates of labelled images too"),
    ("redraw", False, None, "with --learn head: every seed draws a test split of its own, a fifth of the groups"),
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
    parser = build_parser()
    args = options.parse(argv, parser)
    if args.learn == "head" and not args.resume:  # chains of seconds; and what comes from elsewhere knows something
        parser.set_defaults(repeats=50, **({"start": 0} if vars(args)["from"] else {}))
        args = options.parse(argv, parser)
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
    if not args.start and not (args.learn == "head" and vars(args)["from"]):
        raise InputError("--start 0 asks a model that comes from elsewhere: give --learn head and --from MODEL")
    if args.learn == "head" and (args.warm_start or args.start_by != "random" or "committee" in args.strategies):
        raise InputError("--learn head: --warm-start, --start-by and committee are of whole networks; leave them out")
    if args.redraw and args.learn != "head":
        raise InputError("--redraw goes with --learn head: a chain of whole networks takes too long for many splits")
    if vars(args)["from"] and args.learn != "head":
        raise InputError(
            "--from: in the loop it goes with --learn head; every chain of whole networks begins from --weights"
        )
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
    images, start = transfer.load_with_start(args)
    train.check_split(images, images.rows("test"), "test")
    tested = torch.nonzero(images.labels >= 0)[:, 0] if args.redraw else images.rows("test")
    if start is not None:
        transfer.check_unseen(start, images, tested, args)
    seeds = range(args.seed, args.seed + args.repeats)
    most = min(len(divide(images, seed, args)[0]) for seed in (seeds if args.redraw else seeds[:1]))
    if args.start + args.rounds * args.query > most:
        asked = f"--start {args.start} + --rounds {args.rounds} x --query {args.query}"
        raise InputError(f"{asked}: more than the pool of {most} images")
    if start is None:
        train.check_attend(images, images.rows("train"), args)
        train.check_networks(images, args)
        transfer.check_weights(images, tested, args)
    other = finished_loop(images, args) if args.against else None
    folder = options.prepare_folder(args, images, "al-")
    print(f"run folder: {folder}")
    jobs = [(name, seed, args, folder) for seed in seeds for name in ["all", *args.strategies]]
    chains, began, chain, by_hand = [], time.time(), run_chain, args.workers == 1
    if args.learn == "head":
        chain, by_hand = run_head_chain, False
        if not args.redraw:  # of all labels there is one fit, whatever the seed
            jobs = [j for j in jobs if j[0] != "all" or j[1] == args.seed]
    try:
        with options.claim(folder, not args.resume), options.Interrupt() if by_hand else contextlib.nullcontext():
            if args.learn == "head" and not (folder / "embeddings.pt").exists():
                embed_once(images, args, folder)
            for done in options.run_jobs(chain, jobs, images, args, args.workers):
                chains.append(done)
                left = (time.time() - began) / len(chains) * (len(jobs) - len(chains))
                left = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
                print(f"{len(chains)} of {len(jobs)} chains, about {left} left", flush=True)
    except (options.Stopped, KeyboardInterrupt):
        options.stop("al_loop.py", folder)
    if args.learn == "head" and not args.redraw:
        full = next(c for c in chains if c["strategy"] == "all")
        chains += [full | {"seed": seed} for seed in seeds if seed != args.seed]
    report = write_al_report(images, chains, args, folder, other)
    print_al_report(report)
    print(f"\n{folder}: al.json, curves.png   ({time.time() - began:.0f} s)")
    print(models.DISCLAIMER)
    return report, folder


if __name__ == "__main__":
    options.run_main(main)
