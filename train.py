"""Train a detector (D-Net) and a classifier (C-Net), choose the threshold on validation, report on test with intervals.

    python train.py                                        phantoms: about a minute on two CPU cores, no data needed
    python train.py --data BUSI --positive malignant       real images; any layout that readers.py knows
    python train.py --data BUSI --positive malignant --folds 5        cross-validation by groups, one pooled report
    python train.py @recipes/busi.args --data BUSI         the options of a published result
    python train.py --resume runs/busi                     after a kill at any moment
    torchrun --standalone --nproc_per_node=4 train.py --data BUSI     the same by four processes, a GPU or a core each

    report, folder = train.main(["--data", "BUSI", "--positive", "malignant"])       # the same from Python

A run folder holds config.json, log.jsonl (a line an epoch), last.pt (to resume), model.pt (to predict), report.json,
report.png and mistakes.png; that of --folds ends with all folds as one model.pt. The chapters: one training loop for all
networks, one run, the folds and the command line. What is chosen on validation, and by the folds, stands in judge.py."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import backbones
import files
import metrics
import models
import plots
import transfer
from augment import augment, crop_regions
from data import fit_meta, meta_for, partition
from devices import ahead, draw_batches, fetch, gather, mean, merge, near, rank, share, smallest, together, world
from judge import (
    EVAL_BATCH,
    calibrate,
    cross_fit,
    judge_found,
    lesion_threshold,
    locate,
    look_at,
    opinion,
    pool_folds,
    predict,
)
from losses import class_weights, classification_loss, detection_loss, distillation_loss, ellipses, evidence_loss
from options import Interrupt, Stopped, claim, parse, prepare_folder, run_jobs, run_main, stop
from pictures import parse_window
from readers import InputError
from report import check_history, finished_run, print_report, read_result, write_report

# ---------------------------------------------------------------------------------------------------------------------
# The training loop, one for both networks


class State:
    """All that the next epoch of a network depends on, to the bit (on the CPU). It lies in last.pt, and log.jsonl tells
    the same to a reader; if the folder holds a state of this name, it is taken up from there.

    parts: {name: what has a state_dict, or None}. best: the tensors that validated best; history: a dict an epoch."""

    def __init__(self, name, folder, generator, parts, tensorboard=False):
        self.name, self.generator, self.parts = name, generator, parts
        self.last, self.log = Path(folder) / "last.pt", Path(folder) / "log.jsonl"
        self.best, self.best_score, self.history, self.saved_at, self.board = None, None, [], time.time(), None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # only here: a package that most do without

            self.board = SummaryWriter(str(Path(folder) / "tensorboard"))
        saved = files.read_checkpoint(self.last) if self.last.exists() else None
        with files.parts_of(self.last, "remove it, and the network is trained from its first epoch"):
            if saved and saved["name"] == name:
                self.take(saved)
                print(f"resuming {name} after epoch {len(self.history)}")
        self.saved = len(self.history)
        lines = self.log.read_text(errors="replace").splitlines(keepends=True) if self.log.exists() else []
        lines = [line for line in lines if line.endswith("}\n") and f'"net": "{name}"' not in line]
        lines += [json.dumps(h) + "\n" for h in self.history]  # without what came after the save
        files.write_atomically(self.log, "".join(lines).encode())

    def take(self, saved):
        """Go on from what `save` kept. Raises what it likes where that does not fit."""
        models.check_tensors(saved["net"], self.parts["net"].state_dict())
        if saved["best"] is not None:  # none yet, of the first few epochs
            models.check_tensors(saved["best"], self.parts["net"].state_dict())
        for key, part in self.parts.items():
            if part is not None:
                part.load_state_dict(saved[key])
        for p, own in self.parts["optimizer"].state.items():
            if any(v.shape not in (p.shape, ()) or not v.isfinite().all() for v in own.values()):
                raise ValueError("a moment of the optimizer is of another shape, or not finite")
        self.best, self.best_score, self.history = saved["best"], saved["best_score"], saved["history"]
        check_history(self.history)
        epochs = [h["epoch"] for h in self.history]
        whole = any(h["best"] for h in self.history) == (self.best is not None) == (self.best_score is not None)
        if not whole or not all(map(math.isfinite, self.best_score or [])) or epochs != [*range(1, len(epochs) + 1)]:
            raise ValueError("the history is not whole")
        torch.set_rng_state(saved["torch_rng"])
        device, kind = self.generator.device, saved.get("device", "cuda" if saved["cuda_rng"] else "cpu")
        if device.type != kind:  # which draws other numbers: those that the seed and the epoch give
            print(f"{self.name} was saved on another kind of device ({kind}): it goes on with other random numbers")
            self.generator.manual_seed(self.generator.initial_seed() + len(self.history))
            return
        self.generator.set_state(saved["generator"])
        if saved["cuda_rng"]:
            torch.cuda.set_rng_state(saved["cuda_rng"][0], device)

    def add(self, epoch):
        self.history.append(epoch)
        with open(self.log, "a") as file:
            file.write(json.dumps(epoch) + "\n")
        if self.board:
            for key in (k for k, v in epoch.items() if isinstance(v, float)):
                self.board.add_scalar(f"{self.name}/{key}", epoch[key], epoch["epoch"])
            self.board.flush()

    def save(self):
        content = {key: part and part.state_dict() for key, part in self.parts.items()}
        content |= {k: getattr(self, k) for k in ("name", "best", "best_score", "history")}
        device = self.generator.device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else None
        content |= {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda}
        content |= {"generator": self.generator.get_state(), "device": device.type}
        files.save_checkpoint(self.last, content)
        self.saved, self.saved_at = len(self.history), time.time()


def train_epoch(
    net, optimizer, scheduler, loss_of, inputs, rows, args, generator, sample_weights=None, averaged=None, views=1
):
    """One pass over `rows`, or --steps-per-epoch steps: draw, augment, forward, backward, step, all on the device, which
    no step waits for. Returns the mean loss.

    inputs: (pixels, masks, boxes, regions) of ALL images; pixels and masks (or None) may stay on the CPU (a set larger
    than the device), boxes and regions (or None) lie where the network is, and so do rows. loss_of(net, x, boxes,
    masks, rows) -> scalar. views: so many augmentations of each image in a batch, one after another.
    Raises FloatingPointError, at its end, where a loss or a gradient was not finite: from that step on none has touched
    the weights or the optimizer's moments."""
    pixels, masks, boxes, regions = inputs
    device = next(net.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=models.choose_amp(args.amp, device))

    def make(total, where, index, here):
        x, mask = (fetch(v, index, here, device) for v in (pixels, masks))
        box, region = (None if v is None else v[index] for v in (boxes, regions))
        draws = generator if world() == 1 else (generator, total, where)
        return index, *augment(x, args.augment, box, region, args.size, draws, mask)

    net.train()
    if world() > 1:  # each process drops out by itself, again so after a resume
        torch.manual_seed(generator.initial_seed() + scheduler.last_epoch * world() + rank())
    drawn = draw_batches(rows, args.batch, generator, sample_weights, args.steps_per_epoch)
    sizes, places, batches = zip(*(share(batch, views) for batch in drawn), strict=True)
    on_cpu, values, bad = torch.cat(batches).cpu().split(list(map(len, batches))), [], torch.zeros((), device=device)
    for index, x, box, mask in ahead(make, list(zip(sizes, places, batches, on_cpu, strict=True)), device):
        with autocast:
            loss = loss_of(net, x.contiguous(memory_format=torch.channels_last), box, mask, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)  # times 1 where it is not longer
        values.append(loss.detach())
        bad = torch.maximum(bad, 1 - (norm + values[-1]).isfinite().float())
        optimizer.found_inf = bad  # what is 1 here AdamW leaves everything as it was for
        optimizer.step()
        scheduler.step()
        if averaged is not None:
            update_average(averaged, net, min(args.ema, 1 - 1 / (1 + 0.2 * scheduler.last_epoch)))
    merge(net)
    merge(averaged)
    *values, bad = mean(torch.stack([*values, bad])).tolist()  # the only wait
    if bad:
        raise FloatingPointError
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


@torch.no_grad()
def update_average(averaged, net, decay):
    """Exponential moving average of weights and BatchNorm statistics (Polyak & Juditsky 1992), not of counters."""
    mine, theirs = list(averaged.state_dict().values()), list(net.state_dict().values())
    floats = [i for i, t in enumerate(mine) if t.is_floating_point()]
    torch._foreach_lerp_([mine[i] for i in floats], [theirs[i] for i in floats], 1 - decay)


def build_optimizer(net, args, steps):
    """AdamW (Loshchilov & Hutter 2019), decay on matrices alone; linear warm-up, then cosine to zero."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    warm = max(1, round(steps * args.warmup))

    def factor(step):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        return (step + 1) / warm if step < warm else cosine

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


SMOOTH = 5  # epochs at most, and a fifth of all at most, that a validation score is averaged over


def fit(net, images, rows, loss_of, validate, args, *, name, folder, seed, regions=None, masks=None, boxes=None, sample_weights=None, views=1):  # fmt: skip
    """Train `net` and return its best state by validation and the history (a list of dicts, one an epoch).

    regions, masks, boxes: of all images, as the loss needs them; sample_weights, views: see train_epoch.

    validate(net) -> {"score": [first, second, ...], ...}: the higher list is better; the rest is logged. The score of
    an epoch is the mean over the last few: on a small validation split a single one is luck. The first epochs, which
    have fewer before them, don't take part: their means scatter more, and the best of many would often be theirs.
    None: there is nothing to choose by, and the last epoch is kept."""
    device = models.choose_device(args.device)
    if not smallest(len(rows), args.batch, args.steps_per_epoch):
        raise InputError(f"--batch {args.batch}: too few of the {len(rows)} images for {world()} processes")
    net = net.to(device, memory_format=torch.channels_last)
    net, loss_of = together(net, loss_of, twice=bool(vars(args).get("attend")))
    steps = args.epochs * (args.steps_per_epoch or math.ceil(len(rows) / args.batch))
    optimizer, scheduler = build_optimizer(net, args, steps)
    averaged = copy.deepcopy(net).eval() if args.ema else None
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    rows, boxes, regions = (None if v is None else v.to(device) for v in (rows, boxes, regions))
    inputs = (images.pixels, masks, boxes, regions)
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "averaged": averaged}
    state = State(name, folder, generator, parts, args.tensorboard)

    def over():
        best_epoch = max((h["epoch"] for h in state.history if h["best"]), default=math.inf)
        return len(state.history) == args.epochs or 0 < args.patience <= len(state.history) - best_epoch

    first, start = len(state.history), time.time()
    while not over():
        epoch, began, lr = len(state.history) + 1, time.time(), scheduler.get_last_lr()[0]
        try:
            loss = train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator, sample_weights, averaged, views)  # fmt: skip
        except FloatingPointError:  # the epoch has changed the network already, so its state is not saved
            kept = f"the state after epoch {state.saved} is kept in {state.last}"
            kept = kept if state.saved else "nothing was saved yet"
            raise InputError(f"{name}, epoch {epoch}: the loss is not finite; {kept}. Try a lower --lr, or --amp off") from None  # fmt: skip
        kept = net if averaged is None else averaged
        found = validate(kept.eval()) if validate else {"score": [epoch]}
        raw = found.pop("score")
        better = is_better(state, raw, kept, min(SMOOTH, 1 + args.epochs // 5))
        rounded = {"loss": round(loss, 5), **{k: round(v, 5) for k, v in found.items()}}
        seconds = round(time.time() - began, 2)
        state.add({"net": name, "epoch": epoch, **rounded, "score": raw, "best": better, "lr": lr, "seconds": seconds})
        left = (time.time() - start) / (epoch - first) * (args.epochs - epoch)
        values = "  ".join(f"{k} {v:.3f}" for k, v in found.items()) + (" *" if better else "  ")
        print(f"{name:22s} epoch {epoch:3d}/{args.epochs}  loss {loss:.4f}  {values} {left:4.0f} s left", flush=True)
        asked = any(gather(Interrupt.asked))  # of one, and all stop
        if time.time() - state.saved_at >= args.save_seconds or over() or asked:
            state.save()
        if asked and not over():
            raise Stopped
    return state.best, state.history


def is_better(state, raw, net, window):
    """Whether the mean score of this and the epochs before, `window` in all, is the best so far; its weights are then
    kept: a copy, not an alias."""
    recent = [*(h["score"] for h in state.history), raw][-window:]
    score = [sum(values) / window for values in zip(*recent, strict=True)]
    if len(recent) < window or (state.best_score is not None and score <= state.best_score):
        return False
    state.best_score, state.best = score, {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
    return True


# ---------------------------------------------------------------------------------------------------------------------
# One run: D-Net, C-Net members, calibration, test; and the teacher, whose soft answers are learnt beside the labels


def one_run(images, train, val, test, args, folder, seed, teacher=None):
    """Train on the rows `train`, choose on `val`; write model.pt, and what happened on `test` as test.pt, a dict of
    tensors, into `folder`. Only when the model is finished are the test images looked at."""
    unlabelled = None if teacher is None else torch.nonzero(images.labels < 0)[:, 0]
    model, look, histories = train_model(images, train, val, args, folder, seed, teacher, unlabelled)
    result = {"rows": test, "probabilities": None, "threshold": None, "boxes": None}
    on_test = look_at(model, images, test, look)
    if on_test.found:
        result |= judge_found(on_test.found, images, test)
    if len(model.members):
        on_val, result["opinions"] = predict(model, images, val, look), on_test.opinions.mean(1)
        result |= opinion(model, result["opinions"], on_val, images.labels[val])
        result["members"] = []
        for i, member in enumerate(model.members):
            alone = models.Ensemble([member], **model.info)
            calibrate(alone, on_val[i, None], images.labels[val], args)
            result["members"].append(opinion(alone, result["opinions"][i, None], on_val[i, None], images.labels[val]))
    for history in histories:
        if "val_iou" in history[0] and "val_iou" not in result:  # of the epoch that was kept
            result["val_iou"] = [h["val_iou"] for h in history if h["best"]][-1]
    result["lesion_threshold"] = model.info["lesion_threshold"]
    result.update(temperature=model.info["temperature"], weights=model.weights.tolist(), histories=histories)
    pictures = images.pictures()  # so that nobody takes for new what it has met, nor what its --from has
    before = [v for split, v in model.info.get("seen", {}).items() if split != "test"]
    seen = {"train": torch.cat([pictures[train], *before]), "val": pictures[val], "test": pictures[test]}
    model.info["seen"] = seen
    models.save(Path(folder) / "model.pt", model)
    files.save_checkpoint(Path(folder) / "test.pt", result)
    for path in Path(folder).glob("[cd]net*.pt"):
        path.unlink()


def train_model(images, train, val, args, folder, seed, teacher=None, unlabelled=None, start=None):
    """(Ensemble, the boxes that its crops are made from or None, histories). The steps are the story of the whole
    project: find the lesion, look at it, name it, calibrate the answer.

    An empty `val`: nothing is chosen or calibrated, the last epoch is kept. teacher (N, K): soft answers for all
    images, to learn beside the labels, also on the rows `unlabelled`. start: the Ensemble whose weights to go on from."""
    device, start = models.choose_device(args.device), start or transfer.load_start(args)
    spec = start.info["meta_spec"] if start else fit_meta(images, train)  # on whose scale its weights are
    pixels, masks = near(images.pixels, device), near(images.masks, device)
    images = dataclasses.replace(images, pixels=pixels, masks=masks, meta=meta_for(images, spec), meta_spec=spec)
    info, histories = model_info(images, args, seed), []
    info |= {"seen": start.info["seen"]} if start is not None and "seen" in start.info else {}
    if args.learn == "head":
        model, look = transfer.learn_head(images, train, info, args, start)
    else:
        trunk, dnets = choose_trunk(images, train, val, args, start), []
        if trunk == "own":
            dnets, histories = train_dnet(images, train, val, info, args, folder, seed, start)
        members, look, more = train_members(
            images, train, val, trunk, dnets, info, args, folder, seed, teacher, unlabelled, start
        )
        model, histories = models.Ensemble(members, dnets=dnets, **info), histories + more
    if len(val):
        answer = look_at(model, images, val, look)
        model.info["lesion_threshold"] = lesion_threshold(answer.found and answer.found.scores(), images, val, args)
        if len(model.members):
            calibrate(model, answer.opinions.mean(1), images.labels[val], args)
            some = train[:: math.ceil(len(train) / MOST_FAMILIAR)]
            known = look_at(model, images, some, look, views=1).traits
            model.info["familiar"] = models.familiar(known, answer.traits)
    return model, look, histories


MOST_FAMILIAR = 1000  # training images that tell what is familiar; of more every so manieth


def choose_trunk(images, train, val, args, start=None):
    """Whether C-Net and D-Net share their features: "shared" where that is wanted, lesions are known, and a member sees
    the whole, else "own"; with a `start`, an Ensemble, as it does."""
    if start is not None:
        return "shared" if any(m.shared for m in start.members) else "own"
    boxed = images.boxes[:, 0].isfinite()
    known = boxed[train].any() and (not len(val) or boxed[val].any())
    sees = "none" not in (args.model, *(args.ensemble or args.model).split(","))
    whole = args.nets == "both" and sees and "none" in args.roi.split(",")
    return "shared" if args.trunk == "shared" and known and whole else "own"


def model_info(images, args, seed):
    """What a model file says of itself, see models.Ensemble."""
    made = {"data": images.source, "placeholder_boxes": images.placeholder_boxes, "seed": seed, "torch": str(torch.__version__)}  # fmt: skip
    made |= {"from": path} if (path := vars(args).get("from")) else {}
    info = {"classes": images.classes, "size": args.size, "load_size": images.pixels.shape[-1]}
    info |= {"channels": images.pixels.shape[1], "equalise": args.clahe, "margin": args.margin, "views": args.views}
    return info | {"window": parse_window(args.window), "meta_spec": images.meta_spec, "made": made}


def network_options(images, args):
    """What C-Net and D-Net are built alike with."""
    channels = images.pixels.shape[1]
    normalise = ("image" if channels == 1 else "fixed") if args.normalise == "auto" else args.normalise
    return {"channels": channels, "normalise": normalise, "weights": args.weights}


def train_or_reload(build, images, rows, loss_of, validate, args, name, folder, seed, start=None, **more):
    """(a network in its best state, its history), from what `build` makes, or from `start`, a network like it. What an
    earlier start of this run finished lies in a file of its own and is taken from there."""
    path = Path(folder) / f"{name.replace(' ', '_')}.pt"
    torch.manual_seed(seed)
    net = build()
    if path.exists():
        done = files.read_checkpoint(path)
        with files.parts_of(path, "remove it, and the network is trained again"):
            models.check_tensors(done["state"], net.state_dict())
            check_history(done["history"])
    else:
        if start is not None:
            net.load_state_dict(start.state_dict())
        least = smallest(len(rows), args.batch, args.steps_per_epoch) if world() > 1 else len(rows)
        check_size(net, args.size, images.meta, least == 1)
        best, history = fit(net, images, rows, loss_of, validate, args, name=name, folder=folder, seed=seed, **more)
        done = {"state": best, "history": history}
        files.save_checkpoint(path, done)
    net.load_state_dict(done["state"])
    return net.eval().to(models.choose_device(args.device), memory_format=torch.channels_last), done["history"]


def train_dnet(images, train, val, info, args, folder, seed, start=None):
    """([D-Net], [its history]) from the images whose lesions are known, or ([], []) where it is not wanted or can't be."""
    boxed, choose = images.boxes[:, 0].isfinite(), len(val) > 0
    if args.nets == "cnet" or args.model == "none":
        return [], []
    if not boxed[train].any() or (choose and not boxed[val].any()):
        which = "validation" if boxed[train].any() else "training"
        message = f"no boxes in the {which} images: D-Net can't be trained"
        if args.nets == "dnet" or "dnet" in args.roi:
            raise InputError(f"{message}; give masks or boxes, or --dummy-boxes for central placeholders")
        print(message)
        return [], []
    device = models.choose_device(args.device)
    train, found_loss = train[images.outlined[train]], finding_loss(images, device)
    watched = eval_rows(val[boxed[val]], args, seed)

    def loss_of(net, x, boxes, masks, rows):
        return found_loss(*net(x), boxes, masks, rows)

    def validate(net):
        found = locate(models.Ensemble([], dnets=[net], **info), images, watched)
        iou = float(metrics.paired_iou(found, images.boxes[watched]).mean())
        return {"score": [iou], "val_iou": iou}

    build = functools.partial(models.DNet, args.model, **network_options(images, args))
    validate = validate if choose else None  # an older design is not gone on with
    start = next((d for d in start.dnets if not isinstance(d, models.VotingDNet)), None) if start else None
    lesions = {"masks": images.masks, "boxes": images.boxes}
    net, history = train_or_reload(
        build, images, train, loss_of, validate, args, "dnet", folder, seed, start, **lesions
    )
    return [net], [history]


def finding_loss(images, device):
    """The detector's loss of a batch: loss(logits, cells, boxes, masks, rows), see losses.detection_loss. The outline is
    the mask, where there is only a box the ellipse in it. Of several lesions the box would be that of none: not taught."""
    n, masks, known = len(images), images.masks, images.outlined.to(device)
    drawn, parted = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for index in torch.arange(n).split(256) if masks is not None else ():
        small = F.adaptive_max_pool2d(masks[index].float()[:, None], 64)[:, 0].cpu() > 0
        parts = models.label_parts(small).flatten(1)
        least, most = torch.where(parts > 0, parts, 64**2 + 1).amin(1), parts.amax(1)
        drawn[index], parted[index] = most > 0, (most > least) & (most > 0)
    drawn, parted = drawn.to(device), parted.to(device)

    def loss(logits, cells, boxes, masks, rows):
        outlines = ellipses(boxes, *logits.shape[-2:])
        if masks is not None:
            small = F.adaptive_avg_pool2d(masks, logits.shape[-2:])
            outlines = torch.where(drawn[rows, None, None], small, outlines)
        outlines = torch.where(known[rows, None, None], outlines, math.nan)
        return detection_loss(logits, cells, outlines, torch.where(parted[rows, None], math.nan, boxes))

    return loss


def eval_rows(val, args, seed):
    """The validation images that every epoch is judged by."""
    if not args.eval_steps:
        return val
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed))
    return val[order[: args.eval_steps * EVAL_BATCH]]


def choose_look(images, train, model, args):
    """The boxes (N, 4) that C-Net's crops are made from, or None where it sees the whole. model: it has the D-Net."""
    if args.roi == "none":
        return None
    known = images.boxes[:, 0].isfinite()
    if "mask" in args.roi:
        return images.boxes
    look, rows = locate(model, images, torch.arange(len(images))), train[known[train]]
    look[rows] = images.boxes[rows]  # D-Net has learnt these by heart; the augmentation's shifts stand for its errors
    return look


def train_members(
    images, train, val, trunk, dnets, info, args, folder, seed, teacher=None, unlabelled=None, start=None
):
    """(C-Net members, the boxes that crops are made around or None, their histories), one after another: first those that
    see the whole, as with a shared trunk they find what the others look at. See train_model."""
    if args.nets == "dnet":
        return [], None, []
    device, shared = models.choose_device(args.device), trunk == "shared"
    rows, *drawing = draw_by(images, train, unlabelled, args)
    if args.attend and not tells_beside(images)[rows].any():
        print(f"--attend does nothing here: none of these {len(rows)} images tells what is beside the point")
    known = (images.labels, images.meta, teacher, *drawing)
    labels, meta, teacher, weights, drawn = (None if v is None else v.to(device) for v in known)
    found_loss, look = finding_loss(images, device) if shared else None, None
    lesions = {"masks": with_marks(images, args, device), "boxes": images.boxes} if shared or args.attend else {}

    def loss_of(net, x, boxes, masks, rows):
        masks, beside = beside_the_point(x, boxes, masks) if args.attend else (masks, None)
        embeddings, found = net.see(x.requires_grad_(args.attend > 0), None if meta is None else meta[rows])
        logits, own = net.classify(embeddings), labels[rows]
        loss = 0.0 if found is None else found_loss(*found, boxes, masks, rows)
        loss = loss + args.attend * evidence_loss(logits, x, beside) if args.attend else loss
        if teacher is None:
            return loss + classification_loss(logits, own, weights, args.label_smoothing)
        soft, temperature = teacher[rows], args.distill_temperature
        return loss + distillation_loss(logits, own, soft, args.alpha, temperature, weights, args.label_smoothing)

    watched = eval_rows(val, args, seed)

    def validate(net):
        answer = look_at(models.Ensemble([net], **info), images, watched, look, views=1)  # an epoch: a quick look
        p = answer.opinions[0, 0]
        area = float(metrics.evaluate(p, images.labels[watched])["auc"].nan_to_num(0.5))  # a part may lack a class
        nll = float(F.nll_loss((p + 1e-12).log(), images.labels[watched]))
        result = {"score": [area, -nll], "val_auc": area, "val_loss": nll}  # equal AUC: the better likelihood
        if answer.found:
            iou = float(metrics.paired_iou(answer.found.boxes(), images.boxes[watched]).nanmean().nan_to_num(0.0))
            result |= {"val_iou": iou, "score": [area + iou, -nll]}  # it names and it finds
        return result

    same = network_options(images, args) | {"dropout": args.dropout, "attention": args.attention, "trunk": trunk}
    same |= {"classes": len(images.classes), "meta": 0 if meta is None else meta.shape[1]}
    wanted, trained = itertools.product((args.ensemble or args.model).split(","), args.roi.split(",")), {}
    for i, (backbone, roi) in sorted(enumerate(wanted), key=lambda member: member[1][1] != "none"):
        if roi != "none" and look is None:
            whole = models.Ensemble([net for net, _ in trained.values()], dnets=dnets, **info)
            look = choose_look(images, train, whole, args)
        trained[i] = train_or_reload(
            functools.partial(models.CNet, backbone, roi=roi, **same), images, rows, loss_of,
            validate if len(val) else None, args, f"cnet{i + 1} {backbone}", folder, seed + 1000 * i,
            start and start.members[i], sample_weights=drawn,
            regions=None if roi == "none" else crop_regions(look, args.margin), **lesions,
        )  # fmt: skip
    nets, histories = zip(*(trained[i] for i in range(len(trained))), strict=True)
    return list(nets), look, list(histories)


def with_marks(images, args, device):
    """The masks that move with the images: the lesions' (N, H, W) or None; with --attend and marks both (N, 2, H, W)."""
    if not args.attend or images.beside is None:
        return images.masks
    lesions = torch.zeros_like(images.beside) if images.masks is None else images.masks.cpu()
    return near(torch.stack([lesions, images.beside], 1), device)


def tells_beside(images):
    """bool (N,): of which images it is known what is beside the point, see beside_the_point; a placeholder tells nothing."""
    lesions = images.boxes[:, 0].isfinite() & (not images.placeholder_boxes)
    return lesions if images.beside is None else images.beside.flatten(1).any(1)


def beside_the_point(x, boxes, masks):
    """Of a batch: the lesions' masks, and where no evidence should be (N, h, w): as marked, else far from the lesion. What
    lies around it tells too: its margin, its shadow's beginning. Where no lesion is known all may tell."""
    if masks is not None and masks.dim() == 4:
        return masks.unbind(1)
    far = 1 - ellipses(boxes, *x.shape[-2:], grown=1.5)
    return masks, far * boxes[:, :1, None].isfinite()


def draw_by(images, train, unlabelled, args):
    """What C-Net learns from: its rows, the weights (K,) of the classes in the loss, and those (rows,) by which images
    are drawn; None = alike."""
    classes, labels = len(images.classes), images.labels[train]
    weights, drawn = class_weights(labels, classes, args.pos_weight), None
    if args.balanced_sampler:
        weights, drawn = None, class_weights(labels, classes, "auto")[labels]
    if unlabelled is None or not len(unlabelled):
        return train, weights, drawn
    drawn = torch.ones(len(train)) if drawn is None else drawn  # half of every batch has labels, however few there are
    others = torch.full((len(unlabelled),), float(drawn.sum()) / len(unlabelled))
    return torch.cat([train, unlabelled]), weights, torch.cat([drawn, others])


def check_size(net, size, meta, alone=False):
    """A network that shrinks small images to nothing says so before training; or to one pixel, where there is but one
    image to learn from, as BatchNorm needs two values."""
    try:
        with torch.no_grad():
            one = [torch.zeros(1, net.config["channels"], size, size)]
            copy.deepcopy(net).train(alone)(*one, *([] if isinstance(net, models.DNet) or meta is None else [meta[:1]]))
    except (RuntimeError, ValueError) as e:
        small = f"--size {size} is too small for {net.config['model']}{' and a single image' if alone else ''}"
        raise InputError(f"{small} ({files.reason(e)}); use a larger --size") from None


# ---------------------------------------------------------------------------------------------------------------------
# Folds, repeats, and the command line


def check_split(images, rows, what):
    """InputError unless there are two classes, and images of each in the split."""
    if len(images.classes) < 2:
        found = f"one class only ({images.classes[0]})" if images.classes else "no labels"
        raise InputError(f"--data {images.source}: {found}: nothing to learn; at least two are needed")
    for label, name in enumerate(images.classes):
        if label not in images.labels[rows]:
            missing = f"the {what} split has no {name!r} image ({len(rows)} images)"
            raise InputError(f"{missing}; add some, or let the splits be drawn (leave the source's out)")


def plan(images, args):
    """The runs to make: (folder name, train, val, test rows, seed)."""
    labelled = torch.nonzero(images.labels >= 0)[:, 0]
    check_split(images, labelled, "whole")

    def divide(rows, shares, seed):
        return partition(images.labels[rows], images.groups[rows], shares, seed)

    runs = []
    for seed in range(args.seed, args.seed + args.repeats):
        prefix = f"seed{seed}" if args.repeats > 1 else ""
        if args.folds == 1:
            runs.append((prefix, *(images.rows(split) for split in ("train", "val", "test")), seed))
            continue
        fold = divide(labelled, [1] * args.folds, seed)
        for k in range(args.folds):
            rest, name = labelled[fold != k], f"{prefix}{'-' if prefix else ''}fold{k + 1}"
            is_val = divide(rest, [7, 1], seed) == 1
            runs.append((name, rest[~is_val], rest[is_val], labelled[fold == k], seed))
    if args.label_fraction < 1:
        shares = [args.label_fraction, 1 - args.label_fraction]
        runs = [(name, train[divide(train, shares, rest[-1]) == 0], *rest) for name, train, *rest in runs]
    for name, *parts, _ in runs:
        for rows, what in zip(parts, ("train", "val", "test"), strict=True):
            check_split(images, rows, f"{name} {what}".strip())
    return runs


def check_networks(images, args):
    """Build every network once: what can't be built, or is too deep for the images, is said before a run begins."""
    for backbone in {args.model, *(args.ensemble or args.model).split(",")}:
        if backbone == "none" and (images.meta is None or args.nets == "dnet"):
            raise InputError(
                "--model none sees no image; it needs patient data, --meta-columns, and a C-Net to learn them"
            )
    members, detects = (args.ensemble or args.model).split(","), args.nets != "cnet" and args.model != "none"
    names = dict.fromkeys([args.model] * detects + members * (args.nets != "dnet"))
    args.weights = backbones.share_weights(names, args.weights)
    same, meta = network_options(images, args), 0 if images.meta is None else images.meta.shape[1]
    for backbone in names:
        check_size(models.CNet(backbone, meta=meta, **same), args.size, images.meta)
    if detects and images.boxes.isfinite().any():
        check_size(models.DNet(args.model, **same), args.size, None)


def check_attend(images, rows, args):
    """InputError where --attend would do nothing: of no image in `rows` it is known what is beside the point."""
    if args.attend and not tells_beside(images)[rows].any():
        where = f"nothing in the training images of {images.source} tells what is beside the point"
        raise InputError(f"--attend: {where}; give masks, boxes, or a column not_this")


def prepare(args):
    """(images, the runs to make, the results to compare with or None). Whatever can be wrong is said here, before a run
    folder is made."""
    images, start = transfer.load_with_start(args)
    if args.learn == "head" and (start is None or args.teacher):
        raise InputError("--learn head: give the model whose trunk it is with --from, and no --teacher")
    if start is not None and args.nets != "both":
        raise InputError(f"--from: the networks are those of that model; leave out --nets {args.nets}")
    runs = plan(images, args)
    learnt, val, test = (torch.cat([run[k] for run in runs]) for k in (1, 2, 3))
    check_attend(images, learnt, args)
    if start is None:
        check_networks(images, args)
        transfer.check_weights(images, test, args)
    else:
        transfer.check_unseen(start, images, test, args, val)
    if "mask" in args.roi and images.boxes.isnan().all():
        raise InputError("--roi mask: this data has neither masks nor boxes")
    for run in runs if args.teacher else []:
        transfer.load_teacher(images, args, run[0], run[3])
    return images, runs, finished_run(args.against, images, runs) if args.against else None


def make_runs(images, runs, args, folder):
    """The results of all runs, each trained in a folder of its own, or read where an earlier start finished it."""
    left = [(run, args, folder) for run in runs if not (folder / run[0] / "test.pt").exists()]
    for _ in run_jobs(make_run, left, images, args, args.workers):
        pass
    results = [read_result(folder / run[0] / "test.pt", images, run[3]) for run in runs]
    results = cross_fit(images, results, args)
    for run, result in zip(runs, results, strict=True):
        if run[0] and not (folder / run[0] / "report.json").exists():
            seconds = sum(h["seconds"] for history in result["histories"] for h in history)
            write_report(images, [result], args, folder / run[0], seconds, count_splits([run]))
    return results


def make_run(images, run, args, folder):
    name, train, val, test, seed = run
    if name:
        print(f"\n{name}: {', '.join(f'{n} {what}' for what, n in count_splits([run]).items())}", flush=True)
    (folder / name).mkdir(parents=True, exist_ok=True)
    one_run(images, train, val, test, args, folder / name, seed, transfer.teach(images, args, name, test))


def finish_folds(images, runs, results, args, folder):
    """What the folds of the first seed come to: runs/NAME/model.pt, an Ensemble of them all, and with --refit
    refit/model.pt, trained once more on all of their images. Both have the temperature and the thresholds that the
    out-of-fold answers set."""
    names = [run[0] for run in runs[: args.folds]]
    parts = [models.load(folder / name) for name in names]
    pooled = pool_folds(images, parts, results[: args.folds], args)
    models.save(folder / "model.pt", pooled)
    print(f"{folder / 'model.pt'}: all folds together; its own figures can only be measured on other images")
    if args.refit and not (folder / "refit" / "model.pt").exists():
        rows, nothing = torch.cat([r["rows"] for r in results[: args.folds]]), torch.zeros(0, dtype=torch.long)
        (folder / "refit").mkdir(exist_ok=True)
        model, _, _ = train_model(images, rows, nothing, args, folder / "refit", args.seed)
        set_here = ("temperature", "threshold", "lesion_threshold", "seen")
        model.info |= {key: pooled.info[key] for key in set_here if key in pooled.info}
        models.save(folder / "refit" / "model.pt", model)
        for path in (folder / "refit").glob("[cdl]*.pt"):
            path.unlink()


def count_splits(runs):
    return {what: sum(len(run[i]) for run in runs) for i, what in ((1, "train"), (2, "val"), (3, "test"))}


def main(argv=None):
    """Train as the command line `argv` says. Returns the report, see report.py, and the run folder."""
    args = parse(argv)
    models.choose_device(args.device)
    done = Path(args.resume or ".") / "report.json"
    if args.resume and not args.against and done.exists():
        print(f"{args.resume} is complete:")
        with files.parts_of(done, "remove it, and --resume writes it again"):
            report = json.loads(done.read_text())
            print_report(report)
        print(models.DISCLAIMER)
        return report, Path(args.resume)
    images, runs, other = prepare(args)
    folder, start = prepare_folder(args, images), time.time()
    print(f"run folder: {folder}")
    try:
        with claim(folder, not args.resume), Interrupt() if args.workers == 1 else contextlib.nullcontext():
            results = make_runs(images, runs, args, folder)
            if args.folds > 1:
                finish_folds(images, runs, results, args, folder)
    except (Stopped, KeyboardInterrupt):
        stop("train.py", folder)
    seconds = sum(h["seconds"] for r in results for history in r["histories"] for h in history)
    report = write_report(images, results, args, folder, seconds, count_splits(runs), other)
    print_report(report)
    print(f"\n{folder}: model.pt, report.json, report.png, mistakes.png   ({time.time() - start:.0f} s)")
    rows, example = results[0]["rows"], folder / "example.png"  # a test image, to try the next command on at once
    plots.save_png(plots.to_rgb(images.pixels[int(rows[images.labels[rows].argmax()])]), example)
    if args.nets != "dnet":
        model = folder / ("." if args.folds > 1 else runs[0][0]) / "model.pt"
        print(f"try: python infer.py {example} --model {model}")
    print(models.DISCLAIMER)
    return report, folder


if __name__ == "__main__":
    run_main(main)
