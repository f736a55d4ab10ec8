"""A model of elsewhere and a few labels from here: embeddings once, then a last layer in milliseconds.

    seen = look_at(model, images, everything, keep=True)              # the only forward pass
    heads = refit(heads_of(model), seen.embeddings, rows, labels)     # one a member, pulled towards the old ones
    opinions = answers(heads, seen.embeddings, others)                # (M, N, K)
    model, results = learn_labels(model, images, rows, args)          # a model.pt like any other, and what it is worth

What the fine-tuning of a whole network does in minutes, a convex fit does at once, and at sixty labels no worse by what
RESULTS.md could show: so that a threshold can be cross-fitted, and a query strategy judged by fifty seeds."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F

import heads
import models
import options
from files import read_checkpoint
from grouping import partition
from judge import judge_by, locate, look_at, predict
from pictures import parse_window
from readers import InputError
from report import same_pictures

FOLDS = 5  # of the cross-fitting over what is labelled


def heads_of(model):
    """[(weight (K', D), bias (K'))] of the members."""
    return [(m.head.weight.detach().cpu(), m.head.bias.detach().cpu()) for m in model.members]


@torch.no_grad()
def with_heads(model, layers):
    """The model with these last layers."""
    model = copy.deepcopy(model)
    for member, (weight, bias) in zip(model.members, layers, strict=True):
        member.head.weight.copy_(weight)
        member.head.bias.copy_(bias)
    return model


def refit(old, embeddings, rows, targets, classes=2, strength=heads.STRENGTH, weights=None):
    """The last layers, see heads.fit, of members with these embeddings [(V, N, D)], learnt from the images in `rows`, each
    by the mean of its views. targets: (len(rows),) or (len(rows), K)."""
    means, how = [e[:, rows].mean(0) for e in embeddings], (classes, strength, weights)
    if len({m.shape for m in means}) > 1:
        return [heads.fit(m, targets, layer, *how) for m, layer in zip(means, old, strict=True)]
    return list(zip(*heads.fit(torch.stack(means), targets, [torch.stack(part) for part in zip(*old, strict=True)], *how), strict=True))  # fmt: skip


def answers(layers, embeddings, rows):
    """The members' probabilities (M, len(rows), K), each the mean over the views of an image."""
    some = zip(embeddings, layers, strict=True)
    return torch.stack([heads.probabilities(e[:, rows], layer).mean(0) for e, layer in some])


def learn_labels(model, images, rows, args):
    """(The model with last layers learnt from the labels of the images in `rows`; what it is worth, as results of folds).

    There is no validation split to spend: temperature and threshold come from answers to labels that were not learnt,
    of FOLDS groupwise folds. In the results each fold is held against what the others' answers set, see judge.cross_fit.
    The labels of chosen images are those of hard ones: a sensitivity among them is lower than it is among all."""
    seen, old, labels = look_at(model, images, rows, keep=True), heads_of(model), images.labels[rows]
    everyone, classes, results = torch.arange(len(rows)), len(images.classes), []
    fold = partition(labels, images.groups[rows], [1] * FOLDS, args.seed)
    for k in fold.unique().tolist():
        known, asked = everyone[fold != k], everyone[fold == k]
        layers = refit(old, seen.embeddings, known, labels[known], classes, args.pull)
        opinions = answers(layers, seen.embeddings, asked)
        result = {"rows": rows[asked], "opinions": opinions, "weights": model.weights.tolist(), "members": []}
        results.append(result | {"boxes": None})
    new = with_heads(model, refit(old, seen.embeddings, everyone, labels, classes, args.pull))
    judged = judge_by(images, results, results, args)
    new.info |= {k: judged[k] for k in ("temperature", "threshold") if judged[k] is not None}
    if known := new.info.get("familiar"):  # what was labelled here is unlike nothing any more
        far = models.distance(seen.traits, known).quantile(0.99).clamp(min=1).square().float()
        new.info["familiar"] = [one | {"variances": one["variances"] * far} for one in known]
    if "seen" in new.info:
        pictures = images.take(rows).pictures()
        new.info["seen"] = new.info["seen"] | {"train": torch.cat([new.info["seen"]["train"], pictures])}
    return new, results


def distil(old, teacher, embeddings, rows, labels, others, args):
    """As refit, from the labels of `rows` and a teacher's answers (N, K) on the `others`, softened by
    --distill-temperature. The labels have --alpha of the weight, however many the others are."""
    classes = teacher.shape[1]
    soft = (teacher[others].clamp(min=1e-12).log() / args.distill_temperature).softmax(1)
    targets = torch.cat([F.one_hot(labels, classes).to(soft), soft])
    share = (1 - args.alpha) * len(rows) / max(1, len(others))
    weights = torch.cat([torch.full((len(rows),), args.alpha), torch.full((len(others),), share)])
    return refit(old, embeddings, torch.cat([rows, others]), targets, classes, args.pull, weights)


# ---------------------------------------------------------------------------------------------------------------------
# --from and --learn head: what a run or a loop starts with


def load_start(args):
    """The Ensemble of --from, or None without it."""
    path = vars(args)["from"]
    if not path:
        return None
    start = models.load_classifier(path, models.choose_device(args.device))
    start.info["views"] = args.views
    return start


def load_with_start(args):
    """(the images, the Ensemble of --from or None), the options set to how that model was made. InputError where the
    images' classes are others than it knows."""
    if (start := load_start(args)) is None:
        return options.load_images(args), None
    info, nets = start.info, [m.config for m in start.members]
    rois = list(dict.fromkeys(net["roi"] for net in nets))
    made = {"roi": ",".join(rois), "ensemble": ",".join(net["model"] for net in nets[:: len(rois)])}
    made |= {k: nets[0][k] for k in ("dropout", "attention", "normalise")}
    made |= {"model": start.dnets[0].config["model"] if len(start.dnets) else nets[0]["model"], "weights": "none"}
    made |= {"size": info["size"], "clahe": info["equalise"], "channels": info["channels"], "margin": info["margin"]}
    made |= {"window": info["window"] and ",".join(map(str, info["window"]))}
    made |= {"meta_columns": [s["column"] for s in info["meta_spec"]] or None}
    usual = options.train_parser()
    usual.set_defaults(**(options.PHANTOM_DEFAULTS if args.data in (None, "phantoms") else {}))
    given = [k for k, v in made.items() if vars(args)[k] not in (v, usual.get_default(k))]
    if given:
        print(f"--from {vars(args)['from']}: of its own, not as given: --{' --'.join(given).replace('_', '-')}")
    vars(args).update(made)
    images = options.load_images(args, meta_spec=info["meta_spec"] or None)
    if not models.same_classes(info["classes"], images.classes):
        raise InputError(
            f"--from {vars(args)['from']}: it knows {info['classes']}, the data has {images.classes}; name them alike "
            "(--positive, --drop-class), or take its trunk alone: --weights"
        )
    images.classes = info["classes"]
    return images, start


def learnt(images, info, splits=("train", "val")):
    """bool (N,): which of the images show what the model of this `info` learnt from, or was chosen by."""
    seen = [info["seen"][split] for split in splits] if "seen" in info else [torch.zeros(0, dtype=torch.long)]
    return torch.isin(images.pictures(), torch.cat(seen))


def met(model, images, rows, splits=("train", "val")):
    """How many of the images in `rows` the model has learnt from, see learnt."""
    return int(learnt(images.take(rows), model.info, splits).sum())


def check_unseen(start, images, test, args, val=None):
    """InputError where the model of --from has met images that are to test what it learns here, or learnt from those that
    are to set its threshold."""
    if "seen" not in start.info:
        print(f"--from {vars(args)['from']}: of an older version, which did not note what it learnt from")
    elif known := met(start, images, test):
        raise InputError(
            f"--from {vars(args)['from']}: it learnt from {known} of the {len(test)} test images; take other images to test"
        )
    elif val is not None and (known := met(start, images, val, ("train",))):
        raise InputError(
            f"--from {vars(args)['from']}: it learnt from {known} of the {len(val)} validation images, which are to set the "
            "threshold; divide the data as for that model (--seed, or a column of splits)"
        )


def check_weights(images, test, args):
    """InputError where a model file of --weights has met test images: its trunk has learnt their labels."""
    for path in {part.split("=")[-1] for part in args.weights.split(",")}:
        content = read_checkpoint(path, f"--weights {path}") if Path(path).is_file() else None
        noted = isinstance(content, dict) and "format" in content and "seen" in content
        if noted and (known := met(models.load(path), images, test)):
            raise InputError(
                f"--weights {path}: it learnt from {known} of the {len(test)} test images; take other images to test"
            )


def learn_head(images, rows, info, args, start):
    """(The model `start` with last layers learnt from the images in `rows`, the boxes that its crops are made from)."""
    boxes, labels = images.boxes if start.needs_boxes else None, images.labels[rows]
    seen = look_at(start, images, rows, boxes, keep=True)
    layers = refit(heads_of(start), seen.embeddings, torch.arange(len(rows)), labels, len(images.classes), args.pull)
    model = with_heads(start, layers)
    model.info["made"] = info["made"]
    return model, boxes


# ---------------------------------------------------------------------------------------------------------------------
# --teacher: a model whose soft answers are learnt beside the labels


def load_teacher(images, args, part, test):
    """The Ensemble of --teacher, checked against the data. A run folder's model for the same part (fold, seed) is
    taken: a teacher that has learnt from an image of this part's `test` would tell its pupil the answer."""
    path = Path(args.teacher) / part / "model.pt" if Path(args.teacher).is_dir() else Path(args.teacher)
    teacher = models.load_classifier(path, models.choose_device(args.device))
    own = {"classes": images.classes, "channels": images.pixels.shape[1], "meta_spec": images.meta_spec}
    own |= {"equalise": args.clahe, "window": parse_window(args.window)}
    found, wanted = (
        {"classes": info["classes"], "channels": info["channels"]}
        | {"greys (--clahe, --window)": (info["equalise"], info["window"] and tuple(info["window"]))}
        | {"patient data": [(s["column"], s.get("levels")) for s in info["meta_spec"]]}
        for info in (teacher.info, own)
    )
    for what, value in wanted.items():
        if found[what] != value:
            raise InputError(f"--teacher {path}: its {what} {found[what]} are not those of the data, {value}")
    if "seen" not in teacher.info:
        print(f"--teacher {path}: of an older version, which did not note what it learnt from; it may know test images")
    elif not same_pictures(images, test, teacher.info["seen"]) and (known := met(teacher, images, test)):
        advice = "train it with the same --data, --folds and --seed, and give its run folder"
        raise InputError(f"--teacher {path}: it learnt from {known} of the {len(test)} test images; {advice}")
    return teacher


def teach(images, args, part, test):
    """The teacher's soft answers (N, K) on all images, or None without --teacher."""
    if not args.teacher:
        return None
    teacher, rows = load_teacher(images, args, part, test), torch.arange(len(images))
    return teacher.combine(predict(teacher, images, rows, locate(teacher, images, rows))).float()
