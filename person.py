"""A person in the loop: which images of a pool to label next, and what is learnt from the answers.

    python al_loop.py suggest --model runs/busi --pool scans/ --query 20 --out to_label      a list to fill in, and a sheet
    python al_loop.py learn --from runs/busi --labels to_label/to_label.csv                  where the model is from elsewhere
    python al_loop.py learn --labels to_label/to_label.csv --data BUSI --positive malignant  where its own images are here

Without the old images the last layer alone is learnt, in seconds, pulled towards the old one (transfer.py); with them all
is trained again. Either way it says what changed on labels that were not learnt from, with intervals."""

import csv
import dataclasses
import io
import json
import math
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
import transfer
from grouping import near_duplicates
from heads import STRENGTH
from pictures import letterbox, origin, original_box, parse_window, read_image
from query import STRATEGIES, Context, candidates
from readers import COLUMNS, InputError, read_csv
from report import clean, compare, print_change

# ---------------------------------------------------------------------------------------------------------------------
# Asking a model which images it wants to know


@torch.no_grad()
def sample_dropout(member, embeddings, generator, passes=20):
    """Probabilities (V, P, K) under as many dropout masks (Gal & Ghahramani 2016). C-Net drops only before its last
    layer, so that the backbone need not run again."""
    keep, answers = 1 - member.dropout.p, []
    for _ in range(passes):
        mask = (torch.rand(embeddings.shape, generator=generator) < keep) / keep
        answers.append(models.to_probabilities(member.head(embeddings * mask.to(embeddings.device))))
    return torch.stack(answers).cpu()


def ask(strategy, model, images, pool, labelled, free, k, generator, boxes=None):
    """The k images, as indices into `pool`, that a strategy would have labelled next."""
    seen = judge.look_at(model, images, pool, boxes, views=1, keep=True)  # no augmentation
    embeddings = seen.embeddings[0][0].to(model.device)
    return choose(strategy, model, embeddings, seen.opinions[:, 0], labelled, free, k, generator)


def choose(strategy, model, embeddings, members, labelled, free, k, generator, pull=STRENGTH):
    """As `ask`, of a pool whose embeddings (P, D) by the first member and members' probabilities (M, P, K) are known."""
    if strategy == "committee" and len(members) < 2:
        raise InputError("committee: the model is one network, a committee needs members; train with --ensemble A,B")
    if strategy == "bald" and not model.members[0].dropout.p:
        raise InputError("bald: the model was trained without --dropout, its answers can't be sampled")
    sampled = sample_dropout(model.members[0], embeddings, generator) if strategy == "bald" else None
    context = Context(embeddings, model.combine(members), labelled, free, generator, members, sampled, pull)
    return STRATEGIES[strategy](context, k)


# ---------------------------------------------------------------------------------------------------------------------
# suggest writes a list, the person fills it in, learn trains with the answers

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
    boxes = judge.locate(model, images, everything)
    picks = ask(args.strategy, model, images, everything, labelled, free, args.query, generator, boxes)
    title = f"{args.strategy}: {args.query} of {len(free)} images to label"
    write_sheet(out, images, picks, model if args.show_guess else None, boxes, title)
    file, classes = out / "to_label.csv", ", ".join(model.info["classes"])
    box = "box (x_min y_min x_max y_max in pixels) where you can"
    print(f"{file}: fill in the column label with {classes}, and {box}")
    print(f"{out / 'to_label.png'}: the same images, numbered")
    print(f"then: python al_loop.py learn --from {args.model} --labels {file}   (or with the old images: --data ...)")
    print(models.DISCLAIMER)
    return file


def read_pool(args, info):
    """The pool and what is labelled as one ImageSet, as a model of this info sees it; the rows that need no label, which
    are the labelled ones and those that the model has met; and how many of the pool it has met."""
    same = {k: info[k] for k in ("channels", "equalise", "window")} | {"cache": args.cache, "skip_bad": True}
    sources = [args.pool, *args.labelled]
    loaded = (data.load(source, info["load_size"], **same, log=lambda _: None) for source in sources)
    images, *more = (dataclasses.replace(some, masks=None, beside=None) for some in loaded)  # of no use here, and large
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
    guesses, found = [["", "", ""]] * len(picks), None
    if model is not None:
        guesses, found = read_guesses(model, images, picks, boxes)
    file, captions = io.StringIO(), []
    table = csv.writer(file, lineterminator="\n")
    table.writerow(HEADER)
    for number, (i, guess) in enumerate(zip(picks.tolist(), guesses, strict=True), 1):
        path = Path(images.names[i])
        table.writerow([number, str(path.resolve()), *guess, "", "", images.group_names[i]])
        captions.append(f"{number}: {path.name[-24:]}" + (f"\n{guess[0][:14]}?  p {guess[1]}" if model else ""))
    pixels = [images.pixels[i] for i in picks.tolist()]
    if found is not None:
        found[[k for k, guess in enumerate(guesses) if not guess[2]]] = math.nan
    sheet = plots.contact_sheet(pixels, captions, found, title=title + ("" if found is None else " (D-Net's box)"))
    files.write_atomically(out / "to_label.csv", file.getvalue().encode(errors="surrogateescape"))  # bytes of names
    plots.save_png(sheet, out / "to_label.png")


def read_guesses(model, images, picks, boxes):
    """What the model thinks of these images, as words: [class, probability (of the positive class, of more than two of
    the likeliest), box in the picture's pixels or ""] each; and these boxes (N, 4) in [0, 1], or None."""
    info, guesses, said = model.info, [], judge.look_at(model, images, picks, boxes)
    found = said.found.boxes() if said.found else None if boxes is None else boxes[picks].clone()
    probabilities = model.combine(said.opinions.mean(1))
    sure = [found is not None] * len(picks)  # that there is a lesion at all
    if said.found:
        sure = (said.found.scores() >= info["lesion_threshold"]).tolist()
    answers = metrics.decide(probabilities, info["threshold"])
    for k, (i, answer, p, lesion) in enumerate(zip(picks.tolist(), answers.tolist(), probabilities, sure, strict=True)):
        box, asked = "", 1 if len(p) == 2 else answer
        if lesion:
            picture = read_image(images.names[i], info["channels"])
            placement = letterbox(picture, info["load_size"])[1]
            corners = original_box(found[k].tolist(), placement, info["load_size"], origin(picture))
            box = " ".join(f"{v:.0f}" for v in corners)
        guesses.append([info["classes"][answer], f"{p[asked]:.3f}", box])
    return guesses, found


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


def all_answers(args, classes):
    """The Entry objects of all files of --labels, a picture that stands in several rows once."""
    first, entries = {}, [e for path in args.labels for e in read_answers(path, classes, args.partial)]
    for e in entries:
        one = first.setdefault(Path(e.image).resolve(), e)
        if one.label != e.label:
            raise InputError(f"--labels: {e.image} has two labels; correct one of its rows")
        if not (one.masks or one.box):  # who told more came later
            one.masks, one.box = e.masks, e.box
        one.beside = list(dict.fromkeys([*one.beside, *e.beside]))
    if len(first) < len(entries):
        print(f"{len(entries) - len(first)} rows name a picture again: it is learnt from once, with what all rows mark")
    return list(first.values())


def answered(entries, info, args):
    """What read_answers gave as an ImageSet, as a model of this info sees it, every image a group; and its entries."""
    how = (info["load_size"], info["channels"], info["equalise"], args.cache, args.skip_bad)
    pixels, masks, beside, boxes, thumbnails, kept = data.decode(entries, *how, window=info["window"])
    entries = [entries[i] for i in kept]
    meta = data.encode_meta([{}] * len(entries), None, info["meta_spec"])[0] if info["meta_spec"] else None
    return data.ImageSet(
        pixels, torch.tensor([e.label for e in entries]), boxes, masks, torch.arange(len(entries)),
        ["train"] * len(entries), meta, [e.image for e in entries], info["classes"], outlined=boxes[:, 0].isfinite(),
        thumbnails=thumbnails, group_names=["" if args.split_by_image else e.group for e in entries],
        meta_spec=info["meta_spec"], beside=beside,
    ), entries  # fmt: skip


def add_answers(images, entries, args):
    """The ImageSet with the answered images joined to it, and their rows. Those that show the same as an image of the
    validation or test split, or are of its group (patient, lesion), are left out: the test would be none any more."""
    info = {"classes": images.classes, "load_size": images.pixels.shape[-1], "channels": images.pixels.shape[1]}
    info |= {
        "equalise": args.clahe,
        "window": parse_window(args.window),
        "meta_spec": images.meta_spec if images.meta is not None else [],
    }
    new, entries = answered(entries, info, args)
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
    what = "Learn from the answers of a person, and print what changed."
    parser = options.train_parser(what, prog="al_loop.py learn", answers=ANSWERS)
    args = options.parse(argv, parser)
    if not args.labels:
        raise InputError("learn: give the filled-in to_label.csv with --labels")
    if vars(args)["from"]:
        idle = [k for k, v in vars(args).items() if k not in HEEDED and v != parser.get_default(k)]
        if idle:
            said = ", ".join(f"--{k}".replace("_", "-") for k in idle)
            raise InputError(f"learn --from: {said} mean nothing here; leave them out")
        return learn_here(args)
    if args.folds > 1 or args.repeats > 1 or args.nets == "dnet" or args.against or args.workers > 1:
        raise InputError(
            "learn: --folds, --repeats, --against, --workers and --nets dnet mean nothing here; leave them out"
        )
    images = options.load_images(args)
    train.check_networks(images, args)
    entries = all_answers(args, images.classes)
    more, rows = add_answers(images, entries, args)
    ((_, fixed, val, test, seed),) = train.plan(images, args)
    added = ", ".join(f"{int((more.labels[rows] == k).sum())} {name}" for k, name in enumerate(images.classes))
    print(f"{len(rows)} answers: {added}")
    train.check_attend(more, torch.cat([fixed, rows]), args)
    folder = options.prepare_folder(args, more, "learn-")
    runs = [("before", fixed, val, test, seed), ("after", torch.cat([fixed, rows]), val, test, seed)]
    try:
        with options.claim(folder, not args.resume), options.Interrupt():
            before, after = train.make_runs(more, runs, args, folder)
    except (options.Stopped, KeyboardInterrupt):
        options.stop("al_loop.py learn", folder)
    change = compare(more, [before], [after])
    files.write_atomically(folder / "change.json", json.dumps(clean(change), indent=1).encode())
    print()
    print_change(change)
    print(f"\n{folder}: before/model.pt, after/model.pt, change.json")
    print(models.DISCLAIMER)
    return change, folder


LEAST = 5  # groups of each class, one for each fold
HEEDED = {"labels", "partial", "from", "learn", "pull", "seed", "threshold_by", "target_sensitivity"}  # of the options
HEEDED |= {"split_by_image", "skip_bad", "cache", "runs", "name", "device"}


def learn_here(args):
    """Learn the last layer of --from anew from the answers alone: the images that it was trained on need not be here. As
    learn, but what changed is told by cross-fitting over the answers, which are those of images that were chosen."""
    model = models.load_classifier(vars(args)["from"], models.choose_device(args.device))
    entries = all_answers(args, model.info["classes"])
    images, entries = answered(entries, model.info, args)
    rows = torch.arange(len(images))
    if "seen" in model.info and (known := transfer.met(model, images, rows)):
        raise InputError(
            f"--from {vars(args)['from']}: it has met {known} of the {len(rows)} answered images, so they can't tell what it "
            "is worth; give the model before it, with the files of all answers, or new answers alone"
        )
    images.groups = data.find_groups(entries, images.labels, images.classes, images.thumbnails, args.split_by_image)
    tell_twins(images)
    counts = [len(images.groups[images.labels == k].unique()) for k in range(len(images.classes))]
    missing = [f"{LEAST - n} of {name}" for n, name in zip(counts, images.classes, strict=True) if n < LEAST]
    if missing:
        raise InputError(
            f"--labels: {LEAST} patients of each class are needed to set a threshold; label {' and '.join(missing)} more"
        )
    before = {"rows": rows, "boxes": None, "threshold": model.info["threshold"]}
    before["probabilities"] = model.combine(judge.predict(model, images, rows))
    new, results = transfer.learn_labels(model, images, rows, args)
    results = judge.fit_by_others(images, results, args)
    args.data, args.model = args.labels[0], model.members[0].config["model"]
    folder = options.prepare_folder(args, images, "learn-")
    new.info["made"] = new.info["made"] | {"from": str(vars(args)["from"]), "labels": len(rows)}
    models.save(folder / "model.pt", new)
    order = torch.cat([r["rows"] for r in results])
    change = compare(images, [{k: v if k in ("boxes", "threshold") else v[order] for k, v in before.items()}], results)
    files.write_atomically(folder / "change.json", json.dumps(clean(change), indent=1).encode())
    print(
        f"{len(rows)} answers: {', '.join(f'{int((images.labels == k).sum())} {n}' for k, n in enumerate(images.classes))}"
    )
    print("cross-fitted: each answer judged by a layer and a threshold that did not know it")
    print_change(change)
    if change["test"]["auc"]["low"] <= 0 <= change["test"]["auc"]["high"]:
        print(f"so {len(rows)} labels can't tell whether it ranks better than before")
    print(f"\n{folder}: model.pt, change.json\n{models.DISCLAIMER}")
    return change, folder


def tell_twins(images):
    """Say which answers show the same under two names of patients: one of the names, or of the labels, may be wrong."""
    if images.thumbnails is None:
        return
    for i, j in near_duplicates(images.thumbnails).tolist():
        if images.groups[i] != images.groups[j]:
            print(f"{images.names[i]} and {images.names[j]} look the same, but are of two patients")
