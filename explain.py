"""Showing why: where in the picture does the answer come from, and how far is that map to be trusted?

    python explain.py image.png --model runs/busi/fold1/model.pt --out why.png      the map of the recommended method
    python explain.py image.png --method all --out page.png      every method side by side
    python explain.py --model runs/busi --evaluate               each method against the lesions, on the held-out images
    python explain.py --model runs/busi --hotspots               where the evidence lies: lesion, ring, shadow, text ...

The methods themselves stand in saliency.py. Here they are held against the lesions of images that the model never saw,
which says what to recommend for it (explain.json, which this script and infer.py then follow), and drawn: each map in
its own unit, one scale a method on a page, beside the untouched picture."""

import copy
import csv
import io
import json
import math
from pathlib import Path

import torch

import plots
from augment import blur, crop, cut
from data import meta_for, parse_meta
from files import write_atomically
from metrics import interval_text, resample
from models import DISCLAIMER, WithPatients, choose_device, finite, load_classifier, model_file
from options import WINDOW, build_parser, run_main
from pictures import origin, parse_window, read_image
from readers import InputError
from report import clean, describe_map, explain_picture, held_out, recommended_method
from saliency import (
    BASELINES,
    CLASSLESS,
    METHODS,
    best_iou,
    correlation,
    deletion_insertion,
    energy_inside,
    pointing_game,
    randomised,
)

# ---------------------------------------------------------------------------------------------------------------------
# Digital biomarkers: where does the evidence lie?

REGIONS = ["inside", "ring", "behind", "before", "elsewhere"]


def lesion_regions(boxes, size, masks=None, ring=0.25):
    """(N, 5, size, size) bool: inside the lesion, in the ring around it, behind it, before it, elsewhere.

    boxes (N, 4) in [0, 1]; masks (N, size, size), or None: the ellipse in the box. ring: width in lesion diameters.
    Behind (deeper: acoustic shadow or enhancement) and before (towards the skin) are the columns under and over the
    lesion, beyond the ring. The five add up to the whole image."""
    axis = (torch.arange(size, device=boxes.device) + 0.5) / size
    centre, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(min=0.5 / size)
    dx = (axis[None, None, :] - centre[:, 0, None, None]) / radius[:, 0, None, None]
    dy = (axis[None, :, None] - centre[:, 1, None, None]) / radius[:, 1, None, None]
    distance = (dx**2 + dy**2).sqrt()
    inside = distance <= 1 if masks is None else masks
    around = (distance <= 1 + 2 * ring) & ~inside
    column = (dx.abs() <= 1) & ~inside & ~around
    behind, before = column & (dy > 0), column & (dy < 0)
    return torch.stack([inside, around, behind, before, ~(inside | around | behind | before)], 1)


def evidence_shares(maps, regions):
    """(shares, concentrations), each (N, 5): of the positive evidence in each region, and that divided by the region's
    share of the area (1 = as much as anywhere). NaN where a map has no positive evidence, or a region no area."""
    positive = maps.relu()[:, None]
    total = positive.sum((2, 3))
    shares = torch.where(total > 0, (positive * regions).sum((2, 3)) / total.clamp(min=1e-30), math.nan)
    area = regions.float().mean((2, 3))
    return shares, torch.where(area > 0, shares / area.clamp(min=1e-9), math.nan)


def atlas(maps, boxes, side=96):
    """The mean map around the lesion (side, side): each map is cut to three times its lesion's box, stretched onto a
    common square, and scaled to mean 1, so that every image counts alike. The box is the middle third. A place that
    only some of the images reach is the mean of those; NaN where none does."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * 1.5
    regions = torch.cat([centre - half, centre + half], 1)
    evidence, covered = (cut(m, regions, side) for m in (maps.relu(), torch.ones_like(maps)))
    mean = evidence.sum((1, 2), keepdim=True) / covered.sum((1, 2), keepdim=True)
    counted = covered * (mean > 0)
    return (evidence / mean.clamp(min=1e-30)).sum(0) / counted.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# A data set: only images that the model has not learnt from


def lesion_images(images, pairs):
    """[(model, rows)] with the rows that have a lesion. Raises InputError if there is none."""
    known = images.boxes[:, 0].isfinite()
    pairs = [(model, rows[known[rows]]) for model, rows in pairs]
    if not any(len(rows) for _, rows in pairs):
        raise InputError("no held-out image has a lesion box or mask: there is nothing to hold the maps against")
    return pairs


def draw_rows(pairs, most, seed=0):
    """At most so many rows in all, drawn at random over the models."""
    owner = torch.cat([torch.full((len(rows),), k) for k, (_, rows) in enumerate(pairs)])
    chosen = torch.zeros(len(owner), dtype=torch.bool)
    chosen[torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))[:most]] = True
    return [(model, rows[chosen[owner == k]]) for k, (model, rows) in enumerate(pairs) if chosen[owner == k].any()]


def lesion_masks(images, rows):
    """Lesion pixels (N, L, L): the masks, else the ellipses in the boxes."""
    if images.masks is not None:
        return images.masks[rows]
    return lesion_regions(images.boxes[rows], images.pixels.shape[-1])[:, 0]


MEASURES = ["energy", "energy/area", "pointing", "IoU", "deletion", "insertion", "agreement", "randomised"]


def evaluate(images, pairs, methods=None, batch=16, log=print):
    """{method: {measure: (N,) tensor}} over all held-out lesions, methods and baselines, and the groups (N,)."""
    found, groups = {}, torch.cat([images.groups[rows] for _, rows in pairs])
    for name in methods or [*METHODS, *BASELINES]:
        columns = {m: [] for m in MEASURES}
        for model, rows in pairs:
            blind = copy.deepcopy(model)
            blind.members = torch.nn.ModuleList(randomised(m, i) for i, m in enumerate(model.members))
            for index in rows.split(batch):
                for measure, values in measure_batch(name, model, blind, images, index).items():
                    columns[measure].append(values.cpu())
        found[name] = {m: torch.cat(v) for m, v in columns.items() if v}
        log(f"  {name}")
    return found, groups


def batch_of(images, index, model):
    """Pixels, boxes and patient data (or None) of the images `index`, where the model is."""
    parts = (images.pixels, images.boxes, meta_for(images, model.info["meta_spec"]))
    return [None if part is None else part[index].to(model.device) for part in parts]


def measure_batch(name, model, blind, images, index):
    """{measure: (N,)} of one method on the images `index`. blind: the model with random weights."""
    x, known, meta = batch_of(images, index, model)
    masks = lesion_masks(images, index).to(x.device)
    with torch.no_grad():
        boxes = model.locate(x, known)
        target = model(x, boxes, meta).argmax(1)
    parts = list(model.member_maps(x, name, target, meta, boxes))
    maps = sum(parts)
    inside = energy_inside(maps, masks)
    found = {"energy": inside, "energy/area": inside / masks.float().mean((1, 2))}
    found |= {"pointing": pointing_game(maps, masks), "IoU": best_iou(maps, masks)}
    size, areas = model.info["size"], 0.0
    for member, vote in zip(model.members, model.weights / model.weights.sum(), strict=True):
        regions = model.regions(member, boxes)  # each member sees its own part of the whole map
        look, own = crop(x, regions, size), cut(maps, regions, size)
        start = blur(look, torch.full((len(look),), 8.0, device=look.device))
        pair = deletion_insertion(WithPatients(member, meta), look, own, target, blurred=start)
        areas = areas + vote * torch.stack(pair)
    found |= {"deletion": areas[0], "insertion": areas[1]}
    if len(parts) > 1:
        pairs = [correlation(a, b) for i, a in enumerate(parts) for b in parts[:i]]
        found["agreement"] = torch.stack(pairs).mean(0)
    return found | {"randomised": correlation(maps, blind.explain(x, name, target, meta, boxes))}


def interval(values, groups):
    """(mean, low, high) with a 95 % interval from resampled groups; NaN values are left out."""
    known = values.isfinite()
    values, groups = values[known].double(), groups[known]
    if not len(values):
        return math.nan, math.nan, math.nan

    def mean(weights):
        return {"mean": values.mean()[None] if weights is None else (weights.double() @ values) / weights.sum(1)}

    shares = {"mean": len(groups.unique())} if ((values == 0) | (values == 1)).all() else None
    return tuple(resample(mean, groups, shares)["mean"].values())


BLIND = 0.5  # a method whose maps correlate more than this with those of random weights does not look at the model


def recommend(found, groups):
    """(method or None, why): the most energy per area among the methods that see the model and beat every baseline on
    the same images (the paired difference's interval lies above 0)."""
    best, reasons = None, []
    for name in (n for n in found if n in METHODS):
        if float(found[name]["randomised"].mean()) > BLIND:
            reasons.append(
                f"{name} is blind to the model (its map with random weights correlates {found[name]['randomised'].mean():.2f})"
            )
            continue
        rivals = [b for b in found if b in BASELINES]
        lost = [b for b in rivals if interval(found[name]["energy/area"] - found[b]["energy/area"], groups)[1] <= 0]
        if lost:
            reasons.append(f"{name} does not beat {', '.join(lost)}")
        elif best is None or found[name]["energy/area"].mean() > found[best]["energy/area"].mean():
            best = name
    if best is None:
        return None, "no method can be recommended on these images: " + "; ".join(reasons)
    share = cell_text(interval(found[best]["energy/area"], groups))
    why = f"{best}: its energy inside the lesion is {share} times the lesion's share of the area, the most of the methods that beat all baselines"
    return best, "; ".join([why, *reasons])


def cell_text(cell):
    """A mean with its interval (mean, low, high), in two digits; "-" where there was nothing to take the mean of."""
    if math.isnan(cell[0]):
        return "-"
    return interval_text(dict(zip(("value", "low", "high"), cell, strict=True)), ".2f")


def print_table(found, groups):
    """Print the table of methods and measures; return it as {method: {measure: [mean, low, high]}}."""
    table = {name: {m: interval(v, groups) for m, v in row.items()} for name, row in found.items()}
    shown = [m for m in MEASURES if any(m in row for row in table.values())]
    print(f"{'':12s}" + "".join(f"{m:>22s}" for m in shown))
    for name, row in table.items():
        cells = [cell_text(row[m]) if m in row else "" for m in shown]
        print(f"{name:12s}" + "".join(f"{c:>22s}" for c in cells))
    return table


def predicted_maps(images, pairs, method, batch=32):
    """(rows, maps, predicted classes) of all held-out lesions: each map is the evidence for what was predicted."""
    found = []
    for model, rows in pairs:
        for index in rows.split(batch):
            x, known, meta = batch_of(images, index, model)
            with torch.no_grad():
                boxes = model.locate(x, known)
                p = finite(model(x, boxes, meta))
            predicted = (p[:, 1] >= model.info["threshold"]).long() if p.shape[1] == 2 else p.argmax(1)
            found.append((index, model.explain(x, method, predicted, meta, boxes).cpu(), predicted.cpu()))
    return (torch.cat(column) for column in zip(*found, strict=True))


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))  # names as their bytes are


def hotspots(images, pairs, method, out, ring):
    """Where the evidence for the predicted class lies. Writes into `out`: hotspots.csv and hotspots.png (by class and by
    right and wrong), suspects.csv (every image, the least evidence near the lesion first) and atlas.png."""
    out = Path(out)
    rows, maps, predicted = predicted_maps(images, pairs, method)
    boxes, labels = images.boxes[rows], images.labels[rows]
    masks = None if images.masks is None else images.masks[rows]
    regions = lesion_regions(boxes, maps.shape[-1], masks, ring)
    shares, per_area = evidence_shares(maps, regions)
    write_kinds(images, rows, predicted, per_area, method, out)
    write_suspects(images, rows, predicted, shares, per_area, regions, out)
    mean = {k: atlas(maps[labels == k], boxes[labels == k]) for k in labels.unique().tolist()}
    top, third = max(float(m.nan_to_num().max()) for m in mean.values()), [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    panels = [
        plots.heat_panel(m, f"{images.classes[k]} ({int((labels == k).sum())})", top, third) for k, m in mean.items()
    ]
    title = f"Atlas of {method}: the evidence around the lesion (box), 1 = the mean"
    plots.save_png(plots.page(panels, len(panels), title), out / "atlas.png")


def write_kinds(images, rows, predicted, per_area, method, out):
    """Evidence per area in each region, by class and by right and wrong: printed, hotspots.csv, hotspots.png."""
    labels, groups = images.labels[rows], images.groups[rows]
    kinds = {name: labels == k for k, name in enumerate(images.classes)}
    kinds |= {"right": predicted == labels, "wrong": predicted != labels}
    kinds = {f"{kind} ({int(chosen.sum())})": chosen for kind, chosen in kinds.items() if chosen.any()}
    table = {kind: [interval(per_area[c, r], groups[c]) for r in range(len(REGIONS))] for kind, c in kinds.items()}
    print(f"evidence per area ({method}; 1 = as much as anywhere), mean [95 % interval by group]:")
    print(f"{'':24s}" + "".join(f"{r:>22s}" for r in REGIONS))
    for kind, cells in table.items():
        print(f"{kind[:23]:24s}" + "".join(f"{cell_text(c):>22s}" for c in cells))
    lines = [[kind, r, *cell] for kind, cells in table.items() for r, cell in zip(REGIONS, cells, strict=True)]
    write_csv(out / "hotspots.csv", ["images", "region", "evidence per area", "low", "high"], lines)
    chart = plots.bar_chart(table, REGIONS, f"Evidence per area, {method} (1 = as much as anywhere)")
    plots.save_png(plots.page([chart], 1), out / "hotspots.png")


def write_suspects(images, rows, predicted, shares, per_area, regions, out):
    """suspects.csv: the images by their evidence per area in lesion and ring, the least first, for that may be a
    shortcut; blank maps last. By area, since by share small lesions would always come first."""
    near = shares[:, :2].sum(1) / regions[:, :2].float().mean((2, 3)).sum(1)
    order = torch.where(near.isfinite(), near, math.inf).argsort().tolist()
    classes = images.classes
    names = [[images.names[r], classes[images.labels[r]], classes[p]] for r, p in zip(rows, predicted, strict=True)]
    header = ["image", "class", "predicted", "near the lesion per area"]
    header += [*(f"{r} share" for r in REGIONS), *(f"{r} per area" for r in REGIONS)]
    lines = [[*names[i], float(near[i]), *shares[i].tolist(), *per_area[i].tolist()] for i in order]
    write_csv(out / "suspects.csv", header, lines)
    suspects, blank = [i for i in order if near[i] < 1], int((~near.isfinite()).sum())
    print(
        f"{len(suspects)} of {len(rows)} images have less evidence per area in the lesion and its ring than elsewhere"
    )
    print(f"{blank} maps hold no positive evidence")
    for i in suspects[:10]:
        print(f"  {near[i]:.2f}  {names[i][0]} ({names[i][1]}, predicted {names[i][2]})")


# ---------------------------------------------------------------------------------------------------------------------
# One picture, and the command line


def draw(model, picture, name, methods, meta=None, target=None, note="", frame=1):
    """The picture of the explanation, a PIL image: the untouched picture (of pictures.read_image), then a map a method; with
    target "all" a row a class. One scale a method."""
    classes = model.info["classes"]
    if target not in (None, "all", *classes):
        raise InputError(f"--target {target}: the model knows {', '.join(classes)}; or give all")
    if target and (free := [m for m in methods if m in CLASSLESS]):
        raise InputError(
            f"--target: the map of {', '.join(free)} has no class, it shows what the score is sensitive to"
        )
    wanted = range(len(classes)) if target == "all" else [None if target is None else classes.index(target)]
    frames = origin(picture).frames
    name += f", frame {frame} of {frames}" if frames > 1 else ""
    found = [[explain_picture(model, picture, m, t, meta) for m in methods] for t in wanted]
    tops = [max(float(row[i][0].max()) for row in found) for i in range(len(methods))]
    tiles = []
    for row in found:
        _, box, p, shown = row[0]
        k = len(p) - 1 if len(p) == 2 else shown
        tiles.append(plots.overlay(picture, box, f"{name}\np({classes[k]}) = {p[k]:.3f}"))
        for method, top, (heat, *_) in zip(methods, tops, row, strict=True):
            tiles.append(
                plots.overlay(picture, box, f"{describe_map(method, classes[shown])}{note and '; '}{note}", heat, top)
            )
    columns = len(methods) + 1 if len(found) > 1 else min(4, len(tiles))
    return plots.page(tiles, columns, "" if len(tiles) < 3 else "Every method has its own scale")


# fmt: off
OPTIONS = [
    ("model", None, "MODEL", "model file; with --evaluate and --hotspots a run folder, with all its folds"),
    ("method", None, [*METHODS, "all"], "the map; default: what --evaluate recommended for the model, else ig"),
    ("target", None, "CLASS", "the class whose evidence is shown, or all; default: the predicted"),
    ("out", None, "PATH", "the picture to write; with --evaluate and --hotspots a folder; default: the run's"),
    ("evaluate", False, None, "hold every method against the lesions of the held-out images"),
    ("most", 120, (1, 1e9), "with --evaluate and --hotspots: at most so many lesions, drawn at random"),
    ("hotspots", False, None, "where the evidence lies, by class and by right and wrong"),
    ("ring", 0.25, (0, 10), "width of the ring around the lesion, in its diameters"),
    ("data", None, "PATH", "where the run's images lie, if not where they lay when it was trained"),
    ("cache", "runs/cache", "DIR", "folder of decoded images"),
    ("frame", 1, (1, 1e9), "of a clip, the one that is shown"),
    WINDOW,
    ("meta", None, "A=X,B=Y", "patient data for a model trained with it"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda"),
]
# fmt: on


def main(argv=None):
    """Explain a picture (returns its page, a PIL image), or evaluate a run (returns what explain.json holds)."""
    p = build_parser({"options of explain.py": OPTIONS}, __doc__.split("\n\n")[0])
    p.add_argument("image", nargs="?", help="a picture to explain")
    args = p.parse_args(argv)
    if args.image and (args.evaluate or args.hotspots):
        raise InputError("--evaluate and --hotspots take the held-out images of the run, and no picture")
    if not args.image and (args.window or args.frame > 1):
        raise InputError("--window and --frame are of a picture; the images of a run are read as its config.json says")
    if not (args.image or args.evaluate or args.hotspots):
        raise InputError("give an image, or --evaluate, or --hotspots (see -h)")
    if not args.image:
        return explain_run(args)
    if Path(args.image).is_dir():
        raise InputError(f"{args.image}: a folder; give one picture, or --evaluate for the images of a run")
    file = model_file(args.model)
    method, note = recommended_method(file) if args.method is None else (args.method, "")
    methods = [m for m in METHODS if not (args.target and m in CLASSLESS)] if method == "all" else [method]
    meta, model = parse_meta(args.meta), load_classifier(file, choose_device(args.device))
    window = parse_window(args.window or model.info["window"])
    try:
        picture = read_image(args.image, model.info["channels"], window, args.frame)
    except InputError as e:
        raise InputError(f"{args.image}: {e}") from e
    sheet = draw(model, picture, Path(args.image).name, methods, meta, args.target, note, args.frame)
    out = Path(args.out or f"{Path(args.image).stem}_{method}.png")
    plots.save_png(sheet, out)
    print(f"{out}\n{DISCLAIMER}")
    return sheet


def explain_run(args):
    """--evaluate and --hotspots: what explain.json holds, or None."""
    run = Path(args.model or model_file().parent)
    images, pairs = held_out(run, args.data, args.cache, choose_device(args.device))
    pairs, report = draw_rows(lesion_images(images, pairs), args.most), None
    folder = run if run.is_dir() else run.parent
    out = Path(args.out or folder)
    if args.evaluate:
        found, groups = evaluate(images, pairs)
        table = print_table(found, groups)
        best, why = recommend(found, groups)
        print(f"recommended: {why}")
        report = {"images": len(groups), "measures": table, "recommended": best, "why": why}
        write_atomically(out / "explain.json", json.dumps(clean(report), indent=1).encode())
    if args.hotspots:
        method, note = (args.method, "") if args.method else recommended_method(folder / "model.pt")
        if method == "all":
            raise InputError("--hotspots follows one method: give one, or leave --method out")
        print(f"{method}: {note}" if note else method)
        hotspots(images, pairs, method, out, args.ring)
    print(f"{out}\n{DISCLAIMER}")
    return report


if __name__ == "__main__":
    run_main(main)
