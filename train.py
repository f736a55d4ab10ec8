"""Train a detector (D-Net) and a classifier (C-Net), choose the threshold on validation, report on test with intervals.

    python train.py                                        phantoms: about a minute on two CPU cores, no data needed
    python train.py --data BUSI --positive malignant       real images; any layout that data.py reads
    python train.py --data BUSI --positive malignant --folds 5        cross-validation by groups, one pooled report
    python train.py @recipes/busi.args --data BUSI         the options of a published result
    python train.py --resume runs/busi                     after a kill at any moment

A run folder holds config.json, log.jsonl (a line an epoch), last.pt (to resume), model.pt (to predict), report.json,
report.png and mistakes.png. The chapters: arguments, losses, one training loop for both networks, calibration on
validation, one run, the report, the folds."""

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import metrics
import plots
from data import InputError, augment, choose_device, crop_regions, load, partition, run_main
from models import (
    ATTENTION,
    BACKBONES,
    DISCLAIMER,
    CNet,
    DNet,
    Ensemble,
    build_backbone,
    cell_centres,
    load_classifier,
    read_checkpoint,
    save,
    save_checkpoint,
    two_logits,
    write_atomically,
)

# ---------------------------------------------------------------------------------------------------------------------
# Arguments

PHANTOM_DEFAULTS = {
    "model": "small_cnn",
    "weights": "none",
    "size": 64,
    "epochs": 24,
    "batch": 32,
    "lr": 3e-3,
    "augment": 0.5,
}


SEARCH_OVER = [
    "lr=1e-4:3e-3",
    "weight-decay=1e-3:0.1",
    "size=64,96,128",
    "augment=0:1.5",
    "label-smoothing=0:0.2",
    "dropout=0:0.5",
]
EVAL_BATCH = 64  # images a step when nothing is learnt


class OptionFile(argparse.ArgumentParser):
    """argparse, with @file: options as on the command line, over any number of lines, # starts a comment."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        raise InputError(f"{message} (see -h)")


def build_parser():
    p = OptionFile(
        description=__doc__.split("\n\n")[0],
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_arguments(p)
    g = p.add_argument_group("model")
    g.add_argument(
        "--nets",
        choices=["both", "cnet", "dnet"],
        default="both",
        help="what to train; both trains D-Net only where boxes are known",
    )
    g.add_argument(
        "--model",
        default="mobilenet_v2",
        help=f"backbone of both networks: {', '.join(BACKBONES)}; none: patient data alone",
    )
    g.add_argument(
        "--ensemble",
        metavar="A,B,C",
        help="C-Net members' backbones, trained one after another, weighted on validation; D-Net keeps --model",
    )
    g.add_argument(
        "--weights",
        default="imagenet",
        metavar="W",
        help="start from imagenet (a download by torchvision), none, or a state_dict file",
    )
    g.add_argument("--dnet-design", choices=["votes", "pooled"], default="votes", help="D-Net head, see models.py")
    g.add_argument(
        "--attention", choices=list(ATTENTION), default="none", help="between C-Net's backbone and its pooling"
    )
    g.add_argument("--dropout", type=float, default=0.2, help="before C-Net's last layer")
    g.add_argument(
        "--normalise",
        choices=["auto", "image", "fixed"],
        default="auto",
        help="each image by its own mean and spread, or all alike; auto: image for grey, fixed for colour",
    )
    g.add_argument(
        "--roi",
        default="none",
        metavar="A,B",
        help="what C-Net sees: none (the whole), mask (a crop around the true lesion: an upper bound), dnet (around D-Net's box); none,dnet: a member for each",
    )
    g.add_argument("--margin", type=float, default=0.25, help="around the crop, as a share of the lesion's longer side")
    g = p.add_argument_group("learning")
    add_optimiser_arguments(g)
    g.add_argument(
        "--eval-steps",
        type=int,
        default=0,
        metavar="N",
        help=f"validate an epoch on N batches of {EVAL_BATCH}, always the same; 0 = on all. Threshold and temperature see all",
    )
    g.add_argument(
        "--label-smoothing", type=float, default=0.05, help="share of the label that is spread over the classes"
    )
    g.add_argument(
        "--pos-weight",
        default="auto",
        help="weight of the positive class in the loss: auto (classes weigh alike), none, or a number",
    )
    g.add_argument(
        "--balanced-sampler", action="store_true", help="draw every class equally often instead of weighting the loss"
    )
    g.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="decay of the weights' moving average, which is then validated and kept; 0 = off",
    )
    g.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after so many epochs without a better validation; 0 = never: the cosine needs its end",
    )
    g = p.add_argument_group("search")
    g.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="try N random settings on folds of train and val, successive halving up to --epochs, and write best.args",
    )
    g.add_argument(
        "--search-over",
        nargs="+",
        default=SEARCH_OVER,
        metavar="NAME=RANGE",
        help="LOW:HIGH (by ratios where HIGH is 10 times LOW or more), or A,B,C",
    )
    g.add_argument("--search-folds", type=int, default=3, help="each setting is judged by its mean over so many folds")
    g = p.add_argument_group("distillation")
    g.add_argument(
        "--teacher",
        metavar="MODEL",
        help="model file, or run folder of the same --folds, whose soft answers C-Net learns beside the labels",
    )
    g.add_argument(
        "--alpha", type=float, default=0.5, help="share of the labels in the loss, the rest is the teacher's"
    )
    g.add_argument("--distill-temperature", type=float, default=2.0, help="softens teacher and student, T")
    g = p.add_argument_group("protocol")
    g.add_argument("--seed", type=int, default=0, help="of splits, weights, shuffling and augmentation")
    g.add_argument(
        "--folds",
        type=int,
        default=1,
        help="cross-validation by groups over all labelled images; the source's splits are then not used",
    )
    g.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="the whole with seeds SEED, SEED+1, ... on the same splits (with --folds: on new folds)",
    )
    g.add_argument(
        "--threshold-by",
        choices=["sensitivity", "balance"],
        default="sensitivity",
        help="chosen on validation: reach --target-sensitivity, or the best balanced accuracy",
    )
    g.add_argument(
        "--target-sensitivity",
        type=float,
        default=0.95,
        help="the threshold is the largest that reaches it on validation",
    )
    g.add_argument(
        "--label-fraction",
        type=float,
        default=1.0,
        help="learn from this share of the training split alone, drawn by the seed, no group divided",
    )
    g = add_run_arguments(p)
    g.add_argument(
        "--against", metavar="DIR", help="a finished run to compare this one with, in pairs; with --resume too"
    )
    return p


def add_optimiser_arguments(g):
    g.add_argument("--epochs", type=int, default=30, help="passes over the training images, of each network")
    g.add_argument("--batch", type=int, default=16, help="images a step")
    g.add_argument(
        "--steps-per-epoch",
        type=int,
        default=0,
        metavar="N",
        help="an epoch is N steps, however many images there are; 0 = one pass over them",
    )
    g.add_argument(
        "--lr", type=float, default=3e-4, help="peak learning rate of AdamW: linear warm-up, then cosine to 0"
    )
    g.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    g.add_argument("--weight-decay", type=float, default=0.02, help="on matrices, not on biases and norms")
    g.add_argument("--clip", type=float, default=5.0, help="largest norm of the gradient")
    g.add_argument(
        "--augment",
        type=float,
        default=1.0,
        help="strength of the augmentation, 0 = none (what 1 means stands in data.py)",
    )
    g.add_argument(
        "--amp", choices=["auto", "on", "off"], default="auto", help="bfloat16 autocast; auto: on GPUs that have it"
    )


def add_run_arguments(p):
    g = p.add_argument_group("run")
    g.add_argument("--runs", default="runs", help="folder of the run folders")
    g.add_argument("--name", help="of the run folder; default: from data and model")
    g.add_argument("--resume", metavar="DIR", help="go on with a run that was stopped, with its own options")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--workers", type=int, default=1, help="processes of --search and of al_loop.py")
    g.add_argument(
        "--tensorboard", action="store_true", help="write what log.jsonl holds for TensorBoard too, into the run folder"
    )
    g.add_argument(
        "--save-seconds", type=float, default=30, help="least time between two saves of last.pt; 0 = every epoch"
    )
    return g


def add_data_arguments(p):
    g = p.add_argument_group("data")
    g.add_argument("--data", help="folder, .npz, .csv or breastmnist (see data.py); default: the built-in phantoms")
    g.add_argument("--size", type=int, default=128, help="side of the square that the networks see, in pixels")
    g.add_argument(
        "--positive", metavar="A,B", help="class or classes that are positive; all others become the negative one"
    )
    g.add_argument("--drop-class", nargs="+", default=[], metavar="A", help="leave these classes out")
    g.add_argument("--channels", type=int, choices=[1, 3], help="grey or colour; default: look")
    g.add_argument("--clahe", action="store_true", help="even out the contrast of every image (CLAHE) when it is read")
    g.add_argument(
        "--split-by-image",
        action="store_true",
        help="forget patients, lesions and near-duplicates: only to show what such a split would wrongly claim",
    )
    g.add_argument("--skip-bad", action="store_true", help="go on without images that can't be read")
    g.add_argument(
        "--dummy-boxes",
        action="store_true",
        help="give images without a box a central placeholder; every report then says so",
    )
    g.add_argument("--cache", default="runs/cache", help="folder of decoded images")
    for name in ("image", "label", "group", "split", "mask"):
        g.add_argument(
            f"--{name}-column", metavar="NAME", help=f"column of a .csv; default: {name!r} where there is one"
        )
    g.add_argument(
        "--box-columns",
        nargs="+",
        metavar="NAME",
        help="one column with four numbers, or four: x_min y_min x_max y_max in pixels",
    )
    g.add_argument(
        "--meta-columns", nargs="+", metavar="NAME", help="patient metadata that C-Net gets beside the image"
    )


def parse(argv=None, parser=None):
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        config = Path(args.resume) / "config.json"
        if not config.is_file():
            raise InputError(f"--resume {args.resume}: no config.json there, so nothing to resume; check the path")
        stored = json.loads(config.read_text())["args"]
        if getattr(args, "against", None):  # a finished run may be compared afterwards
            stored["against"] = args.against
        return argparse.Namespace(**{**vars(args), **stored, "resume": args.resume})
    if args.data in (None, "phantoms"):
        parser.set_defaults(**PHANTOM_DEFAULTS)
        args = parser.parse_args(argv)
    for name, low, high in (
        ("size", 16, 4096),
        ("epochs", 1, 1e9),
        ("batch", 2, 1e9),
        ("steps_per_epoch", 0, 1e9),
        ("eval_steps", 0, 1e9),
        ("alpha", 0, 1),
        ("distill_temperature", 0.01, 1e4),
        ("folds", 1, 1e9),
        ("repeats", 1, 1e9),
        ("lr", 1e-12, 1e3),
        ("target_sensitivity", 0, 1),
        ("label_fraction", 1e-6, 1),
        ("search", 0, 1e6),
        ("search_folds", 2, 1e3),
        ("workers", 1, 1e3),
        ("label_smoothing", 0, 0.99),
        ("dropout", 0, 0.99),
        ("ema", 0, 0.99999),
        ("augment", 0, 3),
    ):
        if name in args and not low <= getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name):g}: must lie in {low:g} ... {high:g}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard: the package is not installed: pip install tensorboard; or leave it out, log.jsonl holds the same"
        )
    if "pos_weight" not in args:  # pretrain.py: no labels, no heads
        return args
    if args.pos_weight not in ("auto", "none"):
        try:
            float(args.pos_weight)
        except ValueError:
            raise InputError(f"--pos-weight {args.pos_weight}: give auto, none, or a number") from None
    if args.roi not in ("none", "mask", "dnet", "none,mask", "none,dnet"):
        raise InputError(f"--roi {args.roi}: give none, mask, dnet, or none,dnet for a member on each")
    if args.nets == "dnet" and args.roi != "none":
        raise InputError("--roi is what C-Net sees; with --nets dnet there is none")
    if args.search and args.against:
        raise InputError("--against compares on the test split, which --search does not touch; leave it out")
    return args


def choose_amp(mode, device):
    """Whether to compute in bfloat16. auto: on GPUs that have it. Not on CPUs, not even on those that multiply it twice
    as fast: in a small trial it cost accuracy in every fold."""
    if mode != "auto":
        return mode == "on"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def load_images(args, log=print):
    """The data set that the arguments name. With an ROI it is read at twice the size, so that a crop is sharp."""
    columns = {name: getattr(args, f"{name}_column") for name in ("image", "label", "group", "split", "mask")}
    columns |= {"box": args.box_columns, "meta": args.meta_columns}
    return load(
        args.data,
        args.size * (1 if args.roi == "none" else 2),
        positive=args.positive,
        drop=args.drop_class,
        channels=args.channels,
        equalise=args.clahe,
        columns=columns,
        cache=args.cache,
        skip_bad=args.skip_bad,
        split_by_image=args.split_by_image,
        seed=args.seed,
        dummy_boxes=args.dummy_boxes,
        log=log,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses

VOTING = 0.5  # weight of a cell's cross-entropy beside its box loss


def classification_loss(logits, labels, weights=None, smoothing=0.0):
    """Mean cross-entropy: binary for one logit (N, 1), over classes for (N, K). labels (N,).

    weights (K,): of each class. smoothing: share of the label spread over the classes (Szegedy et al. 2016)."""
    logits = logits.float()
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    target = labels.float() * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
    if weights is None:
        return loss.mean()
    return (loss * weights[labels]).sum() / weights[labels].sum()


def class_weights(labels, classes, pos_weight):
    """(K,) weights of the loss. auto: inverse frequency; a number: of the last (positive) class against the others."""
    if pos_weight == "none":
        return None
    if pos_weight == "auto":
        counts = (
            torch.bincount(labels, minlength=classes).float().clamp(min=1)
        )  # a class that is not there weighs no more
        return counts.sum() / (classes * counts)
    return torch.cat([torch.ones(classes - 1), torch.tensor([float(pos_weight)])])


def distillation_loss(logits, labels, teacher, alpha, temperature, weights=None, smoothing=0.0):
    """alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), both softened by T (Hinton et al. 2015).

    logits (N, 1) or (N, K); labels (N,), -1 where only the teacher knows; teacher (N, K) its probabilities, softened
    here to p^(1/T). T^2 keeps the gradient's size whatever T is. weights and smoothing: of the labels' part alone."""
    soft = ((teacher + 1e-12).log() / temperature).softmax(1)
    student = (two_logits(logits.float()) / temperature).log_softmax(1)
    loss = (1 - alpha) * temperature**2 * F.kl_div(student, soft, reduction="batchmean")
    known = labels >= 0
    if alpha > 0 and known.any():
        loss = loss + alpha * classification_loss(logits[known], labels[known], weights, smoothing)
    return loss


def box_loss(predicted, true):
    """Loss (N,) of boxes (N, 4): smooth L1, a gentle pull near the right place, + GIoU (Rezatofighi et al. 2019),
    which knows the direction from afar."""
    from torchvision.ops import generalized_box_iou_loss

    return 4 * F.smooth_l1_loss(predicted, true, beta=0.05, reduction="none").mean(1) + generalized_box_iou_loss(
        predicted, true
    )


def detection_loss(dnet, images, true):
    """Loss of D-Net on a batch with its boxes (N, 4). In the design "votes" every cell near the lesion's centre has to
    know the box by itself, and to vote: its box loss and the cross-entropy of its weight, under a Gaussian of a sixth
    of the lesion's sides (Zhou et al., CenterNet, 2019). It fits faster than a loss of the mean box alone."""
    if dnet.config["design"] != "votes":
        return box_loss(dnet(images), true).mean()
    boxes, log_weights = dnet.vote(images)
    n, h, w = log_weights.shape
    x, y = cell_centres(h, w, log_weights.device)
    centre, sides = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]).clamp(min=0.02)
    away = ((x - centre[:, 0, None, None]) / sides[:, 0, None, None]) ** 2
    away = away + ((y - centre[:, 1, None, None]) / sides[:, 1, None, None]) ** 2
    near = (-18 * away).flatten(1).softmax(1)  # exp(-d^2 / (2 / 36))
    each = box_loss(boxes.flatten(2).mT.reshape(-1, 4), true.repeat_interleave(h * w, 0)).view(n, h * w)
    return (near * (each - VOTING * log_weights.flatten(1))).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, one for both networks


class Stopped(Exception):
    """Ctrl-C: the state of the last whole epoch is saved."""


class Interrupt:
    """The first Ctrl-C lets the epoch end and be saved; the second one stops at once."""

    asked = False

    def __enter__(self):
        Interrupt.asked = False
        self.before = signal.signal(signal.SIGINT, self.handle)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def handle(self, *_):
        Interrupt.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing this epoch, then saving (Ctrl-C again: stop at once)", flush=True)


def draw_batches(rows, batch, generator, weights=None, steps=0):
    """Split the rows, shuffled (or drawn by `weights`, with replacement), into batches of nearly equal size:
    no last batch of one image, which BatchNorm could not take. steps: so many batches, from as many shuffles as that
    takes; 0 = one shuffle."""
    count = steps * batch or len(rows)
    if weights is None:
        shuffles = range(math.ceil(count / len(rows)))
        order = torch.cat([torch.randperm(len(rows), generator=generator, device=rows.device) for _ in shuffles])[
            :count
        ]
    else:
        order = torch.multinomial(weights, count, replacement=True, generator=generator)
    return rows[order].tensor_split(steps or math.ceil(count / batch))


def train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator, sample_weights=None, averaged=None):
    """One pass over `rows`, or --steps-per-epoch steps: draw, augment, forward, backward, step, all on the device.
    Returns the mean loss.

    inputs: (pixels, boxes, regions) of ALL images; pixels may stay on the CPU (a set larger than the device), boxes
    and regions (or None) lie where the network is, and so do rows. loss_of(net, x, boxes, rows) -> scalar.
    Raises FloatingPointError before a loss or gradient that is not finite can touch the weights."""
    pixels, boxes, regions = inputs
    device = next(net.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=choose_amp(args.amp, device))
    net.train()
    total, seen = 0.0, 0
    for index in draw_batches(rows, args.batch, generator, sample_weights, args.steps_per_epoch):
        x, box = augment(
            pixels[index.to(pixels.device)].to(device, non_blocking=True),
            args.augment,
            None if boxes is None else boxes[index],
            None if regions is None else regions[index],
            args.size,
            generator,
        )
        with autocast:
            loss = loss_of(net, x.contiguous(memory_format=torch.channels_last), box, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError
        if norm > args.clip:
            torch.nn.utils.clip_grads_with_norm_(net.parameters(), args.clip, norm)
        optimizer.step()
        scheduler.step()
        if averaged is not None:
            update_average(averaged, net, min(args.ema, 1 - 1 / (1 + 0.2 * scheduler.last_epoch)))
        total, seen = total + value * len(index), seen + len(index)
    return total / seen


@torch.no_grad()
def update_average(averaged, net, decay):
    """Exponential moving average of weights and BatchNorm statistics (Polyak & Juditsky 1992); counters are copied."""
    mine, theirs = list(averaged.state_dict().values()), list(net.state_dict().values())
    floats = [i for i, t in enumerate(mine) if t.is_floating_point()]
    torch._foreach_lerp_([mine[i] for i in floats], [theirs[i] for i in floats], 1 - decay)


def build_optimizer(net, args, steps):
    """AdamW (Loshchilov & Hutter 2019), decay on matrices alone; linear warm-up, then cosine to zero."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        fused=True,
    )
    warm = max(1, round(steps * args.warmup))

    def factor(step):
        return (
            (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        )

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


SMOOTH = 5  # epochs that a validation score is averaged over


def fit(net, images, rows, loss_of, validate, args, *, name, folder, seed, regions=None, sample_weights=None):
    """Train `net` and return its best state by validation and the history (a list of dicts, one an epoch).

    validate(net) -> {"score": [first, second, ...], ...}: the higher list is better; the rest is logged. The score of
    an epoch is the mean over the last few: on a small validation split a single one is luck. None: there is nothing to
    choose by, and the last epoch is kept. Every epoch can be resumed bit for bit (CPU): last.pt holds every tensor and
    random state that the next one depends on."""
    device = choose_device(args.device)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(
        net, args, args.epochs * (args.steps_per_epoch or math.ceil(len(rows) / args.batch))
    )
    averaged = copy.deepcopy(net).eval() if args.ema else None
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    best, best_score, history, rows = None, None, [], rows.to(device)
    inputs = images.pixels, images.boxes.to(device), None if regions is None else regions.to(device)
    last, log = Path(folder) / "last.pt", Path(folder) / "log.jsonl"
    saved = read_checkpoint(last, str(last)) if last.exists() else None
    if saved and saved["name"] == name:
        for part, state in zip(
            (net, optimizer, scheduler, averaged),
            (saved["net"], saved["optimizer"], saved["scheduler"], saved["averaged"]),
            strict=True,
        ):
            if part is not None:
                part.load_state_dict(state)
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch_rng"])
        if saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        best, best_score, history = saved["best"], saved["best_score"], saved["history"]
        print(f"resuming {name} after epoch {len(history)}")
    lines = [line for line in (log.read_text().splitlines() if log.exists() else []) if line.endswith("}")]
    lines = [line for line in lines if json.loads(line)["net"] != name] + [json.dumps(h) for h in history]
    write_atomically(log, "".join(f"{line}\n" for line in lines).encode())  # without what came after the save

    def save_state():
        save_checkpoint(
            last,
            {
                "name": name,
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "averaged": averaged and averaged.state_dict(),
                "generator": generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if device.type == "cuda" else None,
                "best": best,
                "best_score": best_score,
                "history": history,
                "epoch": len(history),
            },
        )

    def over():
        best_epoch = max((h["epoch"] for h in history if h["best"]), default=0)
        return len(history) == args.epochs or 0 < args.patience <= len(history) - best_epoch

    board = None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # only here: a package that most do without

        board = SummaryWriter(str(Path(folder) / "tensorboard"))
    first, saved_at, start = len(history), time.time(), time.time()
    while not over():
        epoch, began = len(history) + 1, time.time()
        lr = scheduler.get_last_lr()[0]
        try:
            loss = train_epoch(
                net, optimizer, scheduler, loss_of, inputs, rows, args, generator, sample_weights, averaged
            )
        except FloatingPointError:
            save_state()
            raise InputError(
                f"{name}, epoch {epoch}: the loss is not finite; the last good state is kept in {last}. Try a lower --lr, or --amp off"
            ) from None
        kept = averaged if averaged is not None else net
        kept.eval()
        found = validate(kept) if validate else {"score": [epoch]}
        raw = found.pop("score")
        recent = [*(h["score"] for h in history), raw][-SMOOTH:]
        score = [sum(values) / len(recent) for values in zip(*recent, strict=True)]
        if best_score is None or score > best_score:
            best_score = score
            best = {k: v.detach().cpu().clone() for k, v in kept.state_dict().items()}  # a copy, not an alias
        history.append(
            {
                "net": name,
                "epoch": epoch,
                "loss": round(loss, 5),
                **{k: round(v, 5) for k, v in found.items()},
                "score": raw,
                "best": score == best_score,
                "lr": lr,
                "seconds": round(time.time() - began, 2),
            }
        )
        with open(log, "a") as file:
            file.write(json.dumps(history[-1]) + "\n")
        if board:
            for key, value in {"loss": loss, "lr": lr, **found}.items():
                board.add_scalar(f"{name}/{key}", value, epoch)
            board.flush()
        left = (time.time() - start) / (epoch - first) * (args.epochs - epoch)
        values = "  ".join(f"{k} {v:.3f}" for k, v in found.items()) + (" *" if score == best_score else "  ")
        print(f"{name:22s} epoch {epoch:3d}/{args.epochs}  loss {loss:.4f}  {values} {left:4.0f} s left", flush=True)
        if time.time() - saved_at >= args.save_seconds or over() or Interrupt.asked:
            save_state()
            saved_at = time.time()
        if Interrupt.asked and not over():
            raise Stopped
    if board:
        board.close()
    return best, history


# ---------------------------------------------------------------------------------------------------------------------
# Predicting, and what is chosen on validation


@torch.no_grad()
def predict(model, images, rows, boxes=None, batch=EVAL_BATCH):
    """Members' probabilities (M, N, K) of the images in `rows`, on the CPU. boxes (all images, 4): the crops."""
    parts = []
    for index in rows.cpu().split(batch):
        x = images.pixels[index.to(images.pixels.device)].to(model.device)
        meta = None if images.meta is None else images.meta[index].to(model.device)
        parts.append(
            model.member_probabilities(x, None if boxes is None else boxes[index].to(model.device), meta).cpu()
        )
    return torch.cat(parts, 1)


@torch.no_grad()
def locate(model, images, rows, batch=EVAL_BATCH):
    """D-Net's boxes (N, 4) of the images in `rows`, on the CPU."""
    return torch.cat(
        [
            model.locate(images.pixels[i.to(images.pixels.device)].to(model.device)).cpu()
            for i in rows.cpu().split(batch)
        ]
    )


def member_weights(probabilities, labels, steps=20):
    """Votes (M,) of the members, from validation: a few steps of EM for the mixture's likelihood (Dempster et al.
    1977), from equal votes. Few, because a small validation split can't tell good members apart, and then equal is best."""
    own = probabilities[:, torch.arange(len(labels)), labels].double()
    votes = torch.full((len(own),), 1 / len(own), dtype=torch.double)
    for _ in range(steps):
        share = votes[:, None] * own
        votes = (share / share.sum(0)).mean(1)
    return votes.tolist()


def calibrate(model, probabilities, labels, args):
    """Set votes, temperature and threshold of the model from validation alone. probabilities (M, N, K)."""
    model.weights = torch.tensor(member_weights(probabilities, labels), dtype=torch.float32)
    model.info["temperature"] = 1.0
    model.info["temperature"] = metrics.fit_temperature(model.combine(probabilities), labels)
    if len(model.info["classes"]) == 2:
        scores = model.combine(probabilities)[:, 1]
        if args.threshold_by == "balance":
            model.info["threshold"] = metrics.threshold_for_balance(scores, labels)
        else:
            model.info["threshold"] = metrics.threshold_for_sensitivity(scores, labels, args.target_sensitivity)


# ---------------------------------------------------------------------------------------------------------------------
# One run: D-Net, C-Net members, calibration, test


def load_teacher(images, args, part):
    """The Ensemble of --teacher, checked against the data. A run folder's model for the same part (fold, seed) is
    taken, so that the teacher of a fold has not seen that fold's test images either."""
    path = Path(args.teacher) / part / "model.pt" if Path(args.teacher).is_dir() else Path(args.teacher)
    teacher = load_classifier(path, choose_device(args.device))
    for what, own, wanted in (
        ("classes", teacher.info["classes"], images.classes),
        ("channels", teacher.info["channels"], images.pixels.shape[1]),
        ("patient data", teacher.info["meta_spec"], images.meta_spec),
    ):
        if own != wanted:
            raise InputError(f"--teacher {path}: its {what} {own} are not those of the data, {wanted}")
    return teacher


def teach(images, args, part, seed):
    """The teacher's soft answers (N, K) on all images, or None without --teacher."""
    if not args.teacher:
        return None
    teacher = load_teacher(images, args, part)
    made, rows = teacher.info["made"], torch.arange(len(images))
    if (made.get("data"), made.get("seed")) != (images.source, seed):
        print(
            f"the teacher was trained on {made.get('data')}, seed {made.get('seed')}: other splits, so it may know images of this test split"
        )
    boxes = None if teacher.dnet is None else locate(teacher, images, rows)
    return teacher.combine(predict(teacher, images, rows, boxes))


def check_split(images, rows, what):
    counts = torch.bincount(images.labels[rows], minlength=len(images.classes))
    for name, count in zip(images.classes, counts.tolist(), strict=True):
        if not count:
            raise InputError(
                f"the {what} split has no {name!r} image ({len(rows)} images); add some, or let the splits be drawn (leave the source's out)"
            )


def one_run(images, train, val, test, args, folder, seed, teacher=None):
    """Train on the rows `train`, choose on `val`, and return what happened on `test`: a dict of tensors.

    Writes model.pt and test.pt into `folder`. Only when the model is finished is the test split opened."""
    unlabelled = torch.nonzero(images.labels < 0)[:, 0]
    model, look, histories = train_model(
        images, train, val, args, folder, seed, teacher, unlabelled if teacher is not None else None
    )
    boxes = None if model.dnet is None else locate(model, images, test)
    result = {"rows": test, "probabilities": None, "threshold": None, "boxes": boxes}
    if len(model.members):
        on_test, on_val = (predict(model, images, rows, look) for rows in (test, val))
        result |= opinion(model, on_test, on_val, images.labels[val])
        result["members"] = []
        for i, member in enumerate(model.members):
            alone = Ensemble([member], **model.info)
            calibrate(alone, on_val[i, None], images.labels[val], args)
            result["members"].append(opinion(alone, on_test[i, None], on_val[i, None], images.labels[val]))
    if model.dnet is not None:
        result["val_iou"] = max(h["val_iou"] for h in histories[0])
    result.update(temperature=model.info["temperature"], weights=model.weights.tolist(), histories=histories)
    save(Path(folder) / "model.pt", model)
    save_checkpoint(Path(folder) / "test.pt", result)
    for path in [*Path(folder).glob("cnet*.pt"), Path(folder) / "dnet.pt"]:
        path.unlink(missing_ok=True)
    return result


def opinion(model, on_test, on_val, labels):
    """What a calibrated model says on test (M, N, K), with what it was judged by on validation."""
    return {
        "probabilities": model.combine(on_test),
        "threshold": model.info["threshold"] if len(model.info["classes"]) == 2 else None,
        "val_auc": float(metrics.evaluate(model.combine(on_val), labels)["auc"]),
    }


def train_model(images, train, val, args, folder, seed, teacher=None, unlabelled=None, start=None):
    """(Ensemble, the boxes that its crops are made from or None, histories). The steps are the story of the whole
    project: find the lesion, look at it, name it, calibrate the answer.

    An empty `val`: nothing is chosen or calibrated, the last epoch is kept. teacher (N, K): soft answers for all
    images, to learn beside the labels, also on the rows `unlabelled`. start: an Ensemble whose weights to go on from."""
    device = choose_device(args.device)
    if device.type == "cuda" and images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = dataclasses.replace(images, pixels=images.pixels.to(device))
    info = model_info(images, args, seed)
    dnet, histories = train_dnet(images, train, val, info, args, folder, seed, start)
    boxes = None
    if dnet is not None and "dnet" in args.roi:
        boxes = locate(Ensemble([], dnet=dnet, **info), images, torch.arange(len(images)))
    look = choose_look(images, train, boxes, args)
    members, more = train_members(images, train, val, look, info, args, folder, seed, teacher, unlabelled, start)
    model = Ensemble(members, dnet=dnet, **info)
    if members and len(val):
        calibrate(model, predict(model, images, val, look), images.labels[val], args)
    return model, look, histories + more


def model_info(images, args, seed):
    """What a model file says of itself, see models.Ensemble."""
    made = {
        "data": images.source,
        "placeholder_boxes": images.placeholder_boxes,
        "seed": seed,
        "torch": str(torch.__version__),
    }
    return {
        "classes": images.classes,
        "size": args.size,
        "load_size": images.pixels.shape[-1],
        "channels": images.pixels.shape[1],
        "equalise": args.clahe,
        "margin": args.margin,
        "meta_spec": images.meta_spec,
        "made": made,
    }


def network_options(images, args):
    """What C-Net and D-Net are built alike with."""
    channels = images.pixels.shape[1]
    normalise = ("image" if channels == 1 else "fixed") if args.normalise == "auto" else args.normalise
    return {"channels": channels, "normalise": normalise, "weights": args.weights}


def train_or_reload(build, images, rows, loss_of, validate, args, name, folder, seed, **more):
    """The best state of one network, and its history. A network that an earlier start of this run finished lies in a
    file of its own and is taken from there."""
    path = Path(folder) / f"{name.replace(' ', '_')}.pt"
    torch.manual_seed(seed)
    net = build()
    if path.exists():
        done = read_checkpoint(path, str(path))
    else:
        check_size(net, args.size, images.meta)
        best, history = fit(net, images, rows, loss_of, validate, args, name=name, folder=folder, seed=seed, **more)
        done = {"state": best, "history": history}
        save_checkpoint(path, done)
    net.load_state_dict(done["state"])
    return net.eval().to(choose_device(args.device), memory_format=torch.channels_last), done["history"]


def train_dnet(images, train, val, info, args, folder, seed, start=None):
    """(D-Net, [its history]) from the images that have a box, or (None, []) where it is not wanted or can't be."""
    boxed, choose = images.boxes[:, 0].isfinite(), len(val) > 0
    train, val = train[boxed[train]], val[boxed[val]]
    if args.nets == "cnet" or args.model == "none":
        return None, []
    if not len(train) or (choose and not len(val)):
        message = f"no boxes in the {'training' if not len(train) else 'validation'} images: D-Net can't be trained"
        if args.nets == "dnet" or "dnet" in args.roi:
            raise InputError(f"{message}; give masks or boxes, or --dummy-boxes for central placeholders")
        print(message)
        return None, []

    def loss_of(net, x, boxes, rows):
        return detection_loss(net, x, boxes)

    watched = eval_rows(val, args, seed)

    def validate(net):
        found = locate(Ensemble([], dnet=net, **info), images, watched)
        iou = float(metrics.paired_iou(found, images.boxes[watched]).mean())
        return {"score": [iou], "val_iou": iou}

    def build():
        net = DNet(args.model, design=args.dnet_design, **network_options(images, args))
        if start is not None and start.dnet is not None:
            net.load_state_dict(start.dnet.state_dict())
        return net

    net, history = train_or_reload(
        build, images, train, loss_of, validate if choose else None, args, "dnet", folder, seed
    )
    return net, [history]


def eval_rows(val, args, seed):
    """The validation images that every epoch is judged by."""
    if not args.eval_steps:
        return val
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed))
    return val[order[: args.eval_steps * EVAL_BATCH]]


def choose_look(images, train, boxes, args):
    """The boxes (N, 4) that C-Net's crops are made from, or None where it sees the whole. boxes: D-Net's."""
    if args.roi == "none":
        return None
    known = images.boxes[:, 0].isfinite()
    if "mask" in args.roi:
        if not known.any():
            raise InputError("--roi mask: this data has neither masks nor boxes")
        return images.boxes
    if boxes is None:
        raise InputError("--roi dnet needs D-Net: leave out --nets cnet, or use --roi none")
    look, rows = boxes.clone(), train[known[train]]
    look[rows] = images.boxes[rows]  # D-Net has learnt these by heart; the augmentation's shifts stand for its errors
    return look


def train_members(images, train, val, look, info, args, folder, seed, teacher=None, unlabelled=None, start=None):
    """(C-Net members, their histories), one after another. See train_model."""
    if args.nets == "dnet":
        return [], []
    classes, device = len(images.classes), choose_device(args.device)
    labels, meta = images.labels.to(device), None if images.meta is None else images.meta.to(device)
    weights, drawn = class_weights(images.labels[train], classes, args.pos_weight), None
    if args.balanced_sampler:
        weights, drawn = None, class_weights(images.labels[train], classes, "auto")[images.labels[train]].to(device)
    weights = None if weights is None else weights.to(device)
    rows, teacher = train, None if teacher is None else teacher.to(device)
    if unlabelled is not None and len(unlabelled):  # half of every batch has labels, however few there are
        rows = torch.cat([train, unlabelled])
        drawn = torch.ones(len(train), device=device) if drawn is None else drawn
        others = torch.full((len(unlabelled),), float(drawn.sum()) / len(unlabelled), device=device)
        drawn = torch.cat([drawn, others])

    def loss_of(net, x, boxes, rows):
        logits = net(x, None if meta is None else meta[rows])
        if teacher is None:
            return classification_loss(logits, labels[rows], weights, args.label_smoothing)
        return distillation_loss(
            logits, labels[rows], teacher[rows], args.alpha, args.distill_temperature, weights, args.label_smoothing
        )

    watched = eval_rows(val, args, seed)

    def validate(net):
        p = predict(Ensemble([net], **info), images, watched, look)[0]
        area = float(metrics.evaluate(p, images.labels[watched])["auc"].nan_to_num(0.5))  # a part may lack a class
        nll = float(F.nll_loss((p + 1e-12).log(), images.labels[watched]))
        return {"score": [area, -nll], "val_auc": area, "val_loss": nll}  # equal AUC: the better likelihood

    members, histories = [], []
    wanted = itertools.product((args.ensemble or args.model).split(","), args.roi.split(","))
    for i, (backbone, roi) in enumerate(wanted):

        def build(i=i, backbone=backbone, roi=roi):
            columns = 0 if meta is None else meta.shape[1]
            options = network_options(images, args)
            options |= {"meta": columns, "dropout": args.dropout, "attention": args.attention}
            net = CNet(backbone, classes, roi=roi, **options)
            if start is not None:
                net.load_state_dict(start.members[i].state_dict())
            return net

        net, history = train_or_reload(
            build, images, rows, loss_of, validate if len(val) else None, args, f"cnet{i + 1} {backbone}", folder, seed + 1000 * i,
            regions=None if roi == "none" else crop_regions(look, args.margin), sample_weights=drawn,
        )  # fmt: skip
        members.append(net)
        histories.append(history)
    return members, histories


def check_size(net, size, meta):
    """A network that shrinks small images to nothing says so before training."""
    try:
        with torch.no_grad():
            image = torch.zeros(1, net.config["channels"], size, size)
            copy.deepcopy(net).eval()(*([image] if isinstance(net, DNet) or meta is None else [image, meta[:1]]))
    except RuntimeError as e:
        raise InputError(
            f"--size {size} is too small for {net.config['model']} ({str(e).splitlines()[0][:90]}); use a larger --size"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The report


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


# ---------------------------------------------------------------------------------------------------------------------
# Search: many settings for a short time, the better third for longer, and so on (successive halving, Jamieson &
# Talwalkar 2016, over random settings, Bergstra & Bengio 2012). The test split is not touched

HALVING = 3


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
        u = float(torch.rand((), generator=generator, dtype=torch.double))
        if isinstance(values, list):
            setting[key] = values[int(u * len(values))]
            continue
        low, high = values
        value = low * (high / low) ** u if by_ratio(values) else low + (high - low) * u
        setting[key] = round(value) if isinstance(low, int) else float(f"{value:.3g}")
    return setting


def by_ratio(values):
    """Whether a range is wide enough to be drawn, and shown, by its logarithm."""
    return isinstance(values, tuple) and 0 < 10 * values[0] <= values[1]


def try_setting(images, number, setting, epochs, fold, args, folder):
    """Train one setting on all folds but one, without choosing an epoch, and judge it on that one: {"trial", "epochs",
    "fold", "score"}, AUC, or IoU for a D-Net alone. A setting that can't be trained scores nothing."""
    done = Path(folder) / f"trial{number}-{epochs}-{fold}.json"
    if done.exists():
        return json.loads(done.read_text())
    args = argparse.Namespace(**{**vars(args), **setting, "epochs": epochs, "save_seconds": math.inf})
    if "size" in setting:
        images = load_images(args, log=lambda _: None)
    rows = torch.cat([images.rows("train"), images.rows("val")])
    part = partition(images.labels[rows], images.groups[rows], [1] * args.search_folds, args.seed)
    result = {"trial": number, "epochs": epochs, "fold": fold, **setting, "score": math.nan}
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        with open(work / "output.txt", "w") as file, contextlib.redirect_stdout(file):
            model, look, _ = train_model(images, rows[part != fold], rows[:0], args, work, args.seed)
        held_out = rows[part == fold]
        if model.members:
            answers = model.combine(predict(model, images, held_out, look))
            result["score"] = float(metrics.evaluate(answers, images.labels[held_out])["auc"])
        else:
            found = metrics.paired_iou(locate(model, images, held_out), images.boxes[held_out])
            result["score"] = float(metrics.localisation(found)["iou"])
    except InputError as e:
        if "loss is not finite" not in str(e):
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_atomically(done, json.dumps(clean(result)).encode())
    return result


def search(images, args, folder):
    """Successive halving; writes search.csv, search.png and best.args into the run folder."""
    ranges = search_ranges(args)
    args = argparse.Namespace(**{**vars(args), "nets": "dnet" if args.nets == "dnet" else "cnet"})
    generator = torch.Generator().manual_seed(args.seed)
    settings = [draw_setting(ranges, generator) for _ in range(args.search)]
    stages = 1 + int(math.log(args.search, HALVING)) if args.search > 1 else 1
    alive, tried, start = list(range(args.search)), [], time.time()
    for stage in range(stages):
        epochs = max(1, round(args.epochs / HALVING ** (stages - 1 - stage)))
        jobs = [(i, settings[i], epochs, f, args, folder) for i in alive for f in range(args.search_folds)]
        scores = {i: [] for i in alive}
        for result in run_jobs(try_setting, jobs, images, args, args.workers):
            value = result["score"]
            scores[result["trial"]].append(math.nan if value is None else value)
            finished = scores[result["trial"]]
            if len(finished) == args.search_folds:
                print(f"{epochs:4d} epochs  trial {result['trial']:3d}  {describe(settings[result['trial']])}  {sum(finished) / len(finished):.4f}", flush=True)  # fmt: skip
        rows = [
            {"trial": i, "epochs": epochs, **settings[i], "mean": sum(v) / len(v), "sd": float(torch.tensor(v).std())}
            for i, v in scores.items()
        ]
        rows.sort(key=lambda r: -r["mean"] if math.isfinite(r["mean"]) else math.inf)
        tried += rows
        alive = [r["trial"] for r in rows[: max(1, len(rows) // HALVING)]]
    best = rows[0]
    if not math.isfinite(best["mean"]):
        raise InputError("--search: not one setting could be trained; try lower learning rates")
    lines = [",".join(tried[0]), *(",".join(str(v) for v in row.values()) for row in tried)]
    write_atomically(folder / "search.csv", "".join(f"{line}\n" for line in lines).encode())
    panels, means = [], [r["mean"] for r in tried if math.isfinite(r["mean"])]
    room = max(means) - min(means) + 0.01
    span = (max(0.0, min(means) - 0.4 * room), min(1.0, max(means) + 0.1 * room))  # the names stand below the dots
    for key, values in ranges.items():
        label, some = f"log10 {key}" if by_ratio(values) else key, {}
        for row in tried:
            xs, ys = some.setdefault(f"{row['epochs']} epochs", ([], []))
            xs.append(math.log10(row[key]) if by_ratio(values) else row[key])
            ys.append(row["mean"])
        panels.append(plots.line_chart(some, key, label, "score", None, span, points=True, lines=False))
    title = f"{images.source}: {describe_model(args)}, {args.search} settings, mean of {args.search_folds} folds of train and val"
    plots.save_png(plots.page(panels, min(3, len(panels)), title), folder / "search.png")
    write_best(folder / "best.args", settings[best["trial"]], best, args)
    print(f"\nbest: {describe(settings[best['trial']])}: {best['mean']:.4f} +- {best['sd']:.4f} over the folds")
    print("chosen as the best of many, so it flatters itself; the test split was not touched")
    print(f"{folder}: search.csv, search.png, best.args   ({time.time() - start:.0f} s)")
    print(f"then: python train.py @{folder / 'best.args'}")


def describe(setting):
    return "  ".join(f"{k} {v:g}" for k, v in setting.items())


def write_best(path, setting, best, args):
    """An option file: what the user set, and over it the best setting."""
    parser = build_parser()
    values = {**vars(args), **setting}
    lines = [f"# --search {args.search}: {best['mean']:.4f} +- {best['sd']:.4f}, mean of {args.search_folds} folds"]
    for action in parser._actions:
        value = values.get(action.dest)
        skipped = ("search", "search_over", "search_folds", "name", "runs", "resume", "workers", "help")
        if action.dest in skipped or value == action.default:
            continue
        given = value if isinstance(value, list) else [] if value is True else [value]
        lines.append(" ".join([action.option_strings[-1], *(shlex.quote(str(v)) for v in given)]))
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Folds, repeats, and the command line


def plan(images, args):
    """The runs to make: (folder name, train, val, test rows, seed)."""
    labelled = torch.nonzero(images.labels >= 0)[:, 0]
    runs = []
    for seed in range(args.seed, args.seed + args.repeats):
        prefix = f"seed{seed}" if args.repeats > 1 else ""
        if args.folds == 1:
            runs.append((prefix, images.rows("train"), images.rows("val"), images.rows("test"), seed))
            continue
        fold = partition(images.labels[labelled], images.groups[labelled], [1] * args.folds, seed)
        for k in range(args.folds):
            rest = labelled[fold != k]
            is_val = partition(images.labels[rest], images.groups[rest], [7, 1], seed) == 1
            runs.append(
                (f"{prefix}{'-' if prefix else ''}fold{k + 1}", rest[~is_val], rest[is_val], labelled[fold == k], seed)
            )
    if args.label_fraction < 1:
        shares = [args.label_fraction, 1 - args.label_fraction]
        for i, (name, train, val, test, seed) in enumerate(runs):
            kept = partition(images.labels[train], images.groups[train], shares, seed) == 0
            runs[i] = name, train[kept], val, test, seed
    for name, train, val, test, _ in runs:
        for rows, what in ((train, "train"), (val, "val"), (test, "test")):
            check_split(images, rows, f"{name} {what}".strip())
    return runs


def prepare_folder(args, prefix=""):
    """The run folder, with its config. An existing run is never written over."""
    if args.resume:
        return Path(args.resume)
    members = "ensemble" if args.ensemble else args.model
    source = "phantoms" if args.data in (None, "phantoms") else f"{Path(args.data).stem}-{members}"
    name = args.name or prefix + source
    folder = Path(args.runs) / name
    if folder.exists():
        if args.name:
            raise InputError(
                f"--name {args.name}: {folder} exists; choose another name, or go on with --resume {folder}"
            )
        number = 2
        while (folder := Path(args.runs) / f"{name}-{number}").exists():
            number += 1
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    config = {
        "args": {k: v for k, v in vars(args).items() if k != "resume"},
        "commit": commit or None,
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    write_atomically(folder / "config.json", json.dumps(config, indent=1).encode())
    return folder


def run_jobs(function, jobs, images, args, workers):
    """Yield function(images, *job) of every job, as they finish: one after another, or in `workers` processes, which
    read the images by themselves and share the cores, or have a GPU each where there are several."""
    if workers <= 1:
        for job in jobs:
            yield function(images, *job)
        return
    context = torch.multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with context.Pool(workers, start_worker, (args, workers, number)) as pool:
        yield from pool.imap_unordered(do_job, [(function, job) for job in jobs])


def start_worker(args, workers, number):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with number.get_lock():
        rank, number.value = number.value, number.value + 1
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank % torch.cuda.device_count())
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    do_job.images = load_images(args, log=lambda _: None)


def do_job(task):
    function, job = task
    return function(do_job.images, *job)


def write_example(images, results, folder):
    """A test image as a picture file, so that the next command can be tried at once."""
    test = results[0]["rows"]
    row = int(test[images.labels[test].argmax()])
    path = Path(folder) / "example.png"
    plots.save_png(plots.to_rgb(images.pixels[row]), path)
    return path


def main(argv=None):
    args = parse(argv)
    choose_device(args.device)
    if args.resume and not args.against and (Path(args.resume) / "report.json").exists():
        print(f"{args.resume} is complete:")
        print_report(json.loads((Path(args.resume) / "report.json").read_text()))
        print(DISCLAIMER)
        return
    images = load_images(args)
    if len(images.classes) < 2:
        raise InputError(
            f"--data {args.data}: {'one class only (' + images.classes[0] + ')' if images.classes else 'no labels'}: nothing to learn; at least two are needed"
        )
    runs = plan(images, args)
    for backbone in {args.model, *(args.ensemble or args.model).split(",")}:
        build_backbone(
            backbone, images.pixels.shape[1], args.weights
        )  # a wrong name or file is said before a run begins
    for run in runs if args.teacher else []:
        load_teacher(images, args, run[0])
    other = finished_run(args.against, images, runs) if args.against else None
    if args.search:
        search_ranges(args)
    folder = prepare_folder(args, "search-" if args.search else "")
    print(f"run folder: {folder}")
    if args.search:
        try:
            return search(images, args, folder)
        except KeyboardInterrupt:
            print(f"stopped; go on with: python train.py --resume {folder}")
            sys.exit(130)
    start, results = time.time(), []
    try:
        with Interrupt():
            for name, train, val, test, seed in runs:
                part = folder / name if name else folder
                part.mkdir(parents=True, exist_ok=True)
                if (part / "test.pt").exists():
                    results.append(read_checkpoint(part / "test.pt", str(part / "test.pt")))
                    continue
                if name:
                    print(f"\n{name}: {len(train)} train, {len(val)} val, {len(test)} test")
                results.append(one_run(images, train, val, test, args, part, seed, teach(images, args, name, seed)))
                if name:
                    write_report(
                        images,
                        results[-1:],
                        args,
                        part,
                        time.time() - start,
                        {"train": len(train), "val": len(val), "test": len(test)},
                    )
    except (Stopped, KeyboardInterrupt):
        print(f"stopped; go on with: python train.py --resume {folder}")
        sys.exit(130)
    seconds = sum(h["seconds"] for r in results for history in r["histories"] for h in history)
    splits = {what: sum(len(run[i]) for run in runs) for i, what in ((1, "train"), (2, "val"), (3, "test"))}
    report = write_report(images, results, args, folder, seconds, splits, other)
    print_report(report)
    model = folder / (runs[0][0] or ".") / "model.pt"
    print(f"\n{folder}: model.pt, report.json, report.png, mistakes.png   ({time.time() - start:.0f} s)")
    example = write_example(images, results, folder)
    if args.nets != "dnet":
        print(f"try: python infer.py {example} --model {model}")
    print(DISCLAIMER)


if __name__ == "__main__":
    run_main(main)
