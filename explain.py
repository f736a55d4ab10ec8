"""Showing why: where in the picture does the answer come from, and how far is that map to be trusted?

    python explain.py image.png --model runs/busi/fold1/model.pt --method gradcam --out why.png
    python explain.py image.png --method all --out page.png      every method side by side
    python explain.py --model runs/busi --evaluate               each method against the lesions, on the held-out images
    python explain.py --model runs/busi --hotspots               where the evidence lies: lesion, ring, shadow, text ...

Every method has one signature, `method(net, images, target=None, **options)`, and returns RAW maps (N, S, S) in units of
the class score: a map with no evidence is all zero, and is said to be so. The score of a class is its logit; for a
single logit it is +logit for the positive class and -logit for the other. Nothing is hooked: the features are a
Sequential, so they are run up to the layer, and the backward pass stops there."""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (
    InputError,
    blur,
    choose_device,
    clahe,
    crop,
    encode_meta,
    letterbox,
    original_box,
    parse_meta,
    read_image,
    region_matrices,
    run_main,
    to_float,
)
from models import DISCLAIMER, load_classifier, newest_model, standardise, to_probabilities, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# The score, and a look at the features


@contextlib.contextmanager
def evaluating(net):
    """Eval mode inside, every module's own mode again outside, whatever happens."""
    training = [m for m in net.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def class_score(logits, target):
    """Score (N,) of the classes `target` (N,): the logit, of one's own sign where one logit stands for two classes."""
    if logits.shape[1] == 1:
        return logits[:, 0] * (2.0 * target - 1)
    return logits.gather(1, target[:, None])[:, 0]


def resolve_target(logits, target):
    """target: None (the predicted class), a class index, or one for each image (N,)."""
    if target is None:
        return to_probabilities(logits.detach()).argmax(1)
    target = torch.as_tensor(target, device=logits.device)
    classes = max(2, logits.shape[1])
    if not ((target >= 0) & (target < classes)).all():
        raise InputError(f"target {target.tolist()}: the model's classes are 0 ... {classes - 1}")
    return target.expand(len(logits))


def layer_index(net, layer):
    """Position of a layer in net.features: None is the last; a number counts from either end; or a child's name."""
    names = [name for name, _ in net.features.named_children()]
    if layer is None:
        return len(names) - 1
    if str(layer) in names:
        return names.index(str(layer))
    try:
        return range(len(names))[int(layer)]
    except (ValueError, IndexError):
        raise InputError(f"layer {layer}: no such layer (0 ... {len(names) - 1}, or -1 from the end)") from None


def activations_and_gradients(net, images, target, layer=None, meta=None):
    """A and dScore/dA (N, C, h, w) at a layer. One forward pass and a backward pass that stops at A; autograd.grad
    leaves every .grad of the network as it is."""
    layers, cut = list(net.features), layer_index(net, layer) + 1
    with evaluating(net):
        with torch.no_grad():
            maps = standardise(images, net.config["normalise"])
            for step in layers[:cut]:
                maps = step(maps)
        with torch.enable_grad():
            x = maps = maps.detach().requires_grad_()
            for i, step in enumerate(layers[cut:]):
                x = step(x.clone() if i == 0 else x)  # an in-place ReLU must not write into A itself
            logits = net.classify(net.pool(x, meta)).float()
            score = class_score(logits, resolve_target(logits, target)).sum()
            (gradients,) = torch.autograd.grad(score, maps)
    return maps.detach(), gradients


def enlarge(maps, size):
    """(N, h, w) -> (N, size, size), bilinear."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Methods that read the network's inside


def grad_cam(net, images, target=None, layer=None, meta=None):
    """Maps >= 0: channels weighted by their mean gradient (Selvaraju et al., Grad-CAM, 2017)."""
    maps, gradients = activations_and_gradients(net, images, target, layer, meta)
    weights = gradients.mean((2, 3), keepdim=True)
    return enlarge((weights * maps).sum(1).relu(), images.shape[-1])


def grad_cam_pp(net, images, target=None, layer=None, meta=None):
    """Maps >= 0: positive gradients, weighted so that each occurrence counts (Chattopadhay et al., Grad-CAM++, 2018)."""
    maps, gradients = activations_and_gradients(net, images, target, layer, meta)
    square, cube = gradients**2, gradients**3
    denominator = 2 * square + maps.sum((2, 3), keepdim=True) * cube
    alpha = torch.where(denominator.abs() > 1e-12, square / denominator, torch.zeros_like(square))
    weights = (alpha * gradients.relu()).sum((2, 3), keepdim=True)
    return enlarge((weights * maps).sum(1).relu(), images.shape[-1])


def layer_cam(net, images, target=None, layer=None, meta=None):
    """Maps >= 0: each position weighted by its own positive gradient (Jiang et al., Layer-CAM, 2021)."""
    maps, gradients = activations_and_gradients(net, images, target, layer, meta)
    return enlarge((gradients.relu() * maps).sum(1).relu(), images.shape[-1])


def input_gradient(net, images, target, meta=None):
    """dScore/dImage (N, C, S, S)."""
    with evaluating(net), torch.enable_grad():
        x = to_float(images).detach().clone().requires_grad_()
        logits = net(x, meta).float()
        (gradient,) = torch.autograd.grad(class_score(logits, resolve_target(logits, target)).sum(), x)
    return gradient


def fixed_target(net, images, target, meta):
    """The classes (N,), decided once on the picture itself, for methods that then change it."""
    with evaluating(net), torch.no_grad():
        return resolve_target(net(images, meta), target)


def integrated_gradients(net, images, target=None, steps=32, meta=None):
    """Signed maps that sum to score(image) - score(blank image of the same mean) (Sundararajan et al. 2017).

    The straight path from the blank image, by the midpoint rule."""
    target, x = fixed_target(net, images, target, meta), to_float(images).detach()
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    total = sum(input_gradient(net, blank + (x - blank) * ((i + 0.5) / steps), target, meta) for i in range(steps))
    return ((x - blank) * total / steps).sum(1)


def smooth_grad(net, images, target=None, samples=16, noise=0.1, seed=0, meta=None):
    """Maps >= 0: size of the gradient, averaged over noisy copies (Smilkov et al. 2017). noise: of the grey range."""
    target, x = fixed_target(net, images, target, meta), to_float(images).detach()
    generator = torch.Generator(x.device).manual_seed(seed)
    total = 0.0
    for _ in range(samples):
        noisy = x + noise * torch.randn(x.shape[1:], generator=generator, device=x.device)  # the same for every image
        total = total + input_gradient(net, noisy, target, meta)
    return (total / samples).abs().sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Methods that only ask the network questions


@torch.no_grad()
def scores_of(net, images, target, meta=None, batch=64):
    """Class scores of many images, in batches. meta is that of the images."""
    parts = []
    with evaluating(net):
        for rows in torch.arange(len(images)).split(batch):
            logits = net(images[rows], None if meta is None else meta[rows]).float()
            parts.append(class_score(logits, target[rows]))
    return torch.cat(parts)


def occlusion(net, images, target=None, window=0.25, stride=0.125, meta=None):
    """Signed maps: how much the score falls when a window is blanked, averaged over the windows that cover a pixel
    (Zeiler & Fergus 2014). window and stride as shares of the side."""
    target, x = fixed_target(net, images, target, meta), to_float(images).detach()
    size = x.shape[-1]
    width, step = max(1, round(window * size)), max(1, round(stride * size))
    starts = sorted({*range(0, size - width, step), size - width})
    masks = torch.zeros(len(starts) ** 2, size, size, device=x.device)
    for k, (top, left) in enumerate((t, s) for t in starts for s in starts):
        masks[k, top : top + width, left : left + width] = 1
    whole = scores_of(net, x, target, meta)
    maps = []
    for i in range(len(x)):
        blank = x[i].mean((1, 2), keepdim=True)
        covered = torch.where(masks[:, None] > 0, blank, x[i])
        falls = whole[i] - scores_of(net, covered, target[i].expand(len(masks)), repeat_meta(meta, i, len(masks)))
        maps.append((falls[:, None, None] * masks).sum(0) / masks.sum(0))
    return torch.stack(maps)


def rise(net, images, target=None, masks=128, cells=7, seed=0, meta=None):
    """Signed maps: covariance of the score with a pixel being seen, over random soft masks (Petsiuk et al. 2018), in
    units of the score: what seeing the pixel adds on average."""
    target, x = fixed_target(net, images, target, meta), to_float(images).detach()
    size = x.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.rand(masks, 1, cells + 1, cells + 1, generator=generator) < 0.5).float()
    large = F.interpolate(grid, size=(size + size // cells,) * 2, mode="bilinear", align_corners=False)
    shifts = torch.randint(0, size // cells + 1, (masks, 2), generator=generator).tolist()
    seen = torch.stack([m[0, t : t + size, s : s + size] for m, (t, s) in zip(large, shifts, strict=True)]).to(x.device)
    centred = seen - seen.mean(0)
    variance = centred.square().mean(0).clamp(min=1e-6)
    maps = []
    for i in range(len(x)):
        blank = x[i].mean((1, 2), keepdim=True)
        shown = torch.lerp(blank.expand_as(x[i]), x[i], seen[:, None])
        score = scores_of(net, shown, target[i].expand(masks), repeat_meta(meta, i, masks))
        maps.append(((score - score.mean())[:, None, None] * centred).mean(0) / variance)
    return torch.stack(maps)


def repeat_meta(meta, i, n):
    return None if meta is None else meta[i].expand(n, -1)


METHODS = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_pp,
    "layercam": layer_cam,
    "ig": integrated_gradients,
    "smoothgrad": smooth_grad,
    "occlusion": occlusion,
    "rise": rise,
}

# ---------------------------------------------------------------------------------------------------------------------
# Baselines that a map must beat, and the check that it listens to the network


def random_map(net, images, target=None, seed=0, meta=None):
    """Smooth noise >= 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(images), 8, 8, generator=generator).to(images.device)
    return enlarge(coarse, images.shape[-1])


def centre_map(net, images, target=None, meta=None):
    """A Gaussian in the middle, sigma a quarter of the side: people hold the probe so that the lesion is there."""
    axis = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1] - 0.5
    bump = torch.exp(-(axis**2) / (2 * 0.25**2))
    return (bump[:, None] * bump).expand(len(images), -1, -1)


def intensity_map(net, images, target=None, meta=None):
    """The image's own brightness."""
    return to_float(images).mean(1)


def darkness_map(net, images, target=None, meta=None):
    """One minus the brightness: in ultrasound the stronger rival, since lesions are dark."""
    return 1 - to_float(images).mean(1)


BASELINES = {"random": random_map, "centre": centre_map, "intensity": intensity_map, "darkness": darkness_map}


def randomised(net, seed=0):
    """A copy with freshly drawn weights (Adebayo et al., Sanity checks for saliency maps, 2018)."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


def correlation(a, b):
    """Pearson correlation (N,) of maps (N, S, S) with maps; 0 where one is constant."""
    a, b = ((m - m.mean((1, 2), keepdim=True)).flatten(1) for m in (a, b))
    return (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# How good is a map


def energy_inside(maps, masks):
    """Share (N,) of the positive evidence that lies inside the masks; 0 where a map has no positive evidence."""
    positive = maps.relu()
    total = positive.sum((1, 2))
    return torch.where(total > 0, (positive * masks).sum((1, 2)) / total.clamp(min=1e-30), 0.0)


def pointing_game(maps, masks):
    """1 where the strongest pixel lies inside the mask, else 0 (Zhang et al. 2016). A blank map points nowhere: 0."""
    flat = maps.flatten(1)
    top = flat.argmax(1, keepdim=True)
    return (masks.flatten(1).float().gather(1, top)[:, 0]) * (flat.amax(1) > flat.amin(1))


def best_iou(maps, masks, thresholds=20):
    """IoU (N,) of {map >= t} with the mask at each map's best t: how well its shape fits, whatever its scale."""
    positive, masks = maps.relu(), masks.float()
    top = positive.amax((1, 2), keepdim=True)
    best = torch.zeros(len(maps), device=maps.device)
    for t in torch.linspace(0.05, 0.95, thresholds).tolist():
        region = ((positive >= t * top) & (top > 0)).float()
        inter = (region * masks).sum((1, 2))
        best = torch.maximum(best, inter / ((region + masks).clamp(max=1).sum((1, 2))).clamp(min=1))
    return best


def deletion_insertion(net, images, maps, target, steps=16, meta=None):
    """Areas (N,), (N,) under the class probability while the pixels go away (small is good) or come (large is good),
    the strongest first (Petsiuk et al. 2018). What is gone is the image's mean; what has not come yet is a blur."""
    x = to_float(images)
    n, _, h, w = x.shape
    rank = maps.flatten(1).argsort(1, descending=True).argsort(1).reshape(n, 1, h, w).float() / (h * w)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    blurred = blur(x, torch.full((n,), 8.0, device=x.device))
    areas = []
    for strongest, rest in ((blank, x), (x, blurred)):
        curve = []
        for share in torch.linspace(0, 1, steps + 1).tolist():
            shown = torch.where(rank < share, strongest, rest)
            with evaluating(net), torch.no_grad():
                curve.append(to_probabilities(net(shown, meta)).gather(1, target[:, None])[:, 0])
        areas.append(torch.trapezoid(torch.stack(curve), dim=0) / steps)
    return areas


# ---------------------------------------------------------------------------------------------------------------------
# A whole model: its members' maps, in the place where each of them looked


def place(maps, regions, size):
    """Maps (N, s, s) of crops, back in the whole image: (N, size, size), zero outside the crop. None = the whole."""
    if regions is None:
        return enlarge(maps, size)
    matrices = region_matrices(regions)
    linear = torch.linalg.inv(matrices[:, :, :2])
    inverse = torch.cat([linear, -linear @ matrices[:, :, 2:]], 2)
    grid = F.affine_grid(inverse, (len(maps), 1, size, size), align_corners=False)
    return F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def explain(model, images, method="gradcam", target=None, meta=None, boxes=None, **options):
    """Maps (N, L, L) of an Ensemble on letterboxed images uint8 (N, C, L, L): members' maps, weighted as their votes.

    target: class index, (N,), or None = the likeliest. boxes: D-Net's, found here if not given."""
    return torch.stack(member_maps(model, images, method, target, meta, boxes, **options)).sum(0)


def member_maps(model, images, method="gradcam", target=None, meta=None, boxes=None, **options):
    """The summands of `explain`, one a member."""
    function = {**METHODS, **BASELINES}[method]
    with torch.no_grad():
        boxes = model.locate(images) if boxes is None else boxes
        if target is None:
            target = model(images, boxes, meta).argmax(1)
    votes = model.weights / model.weights.sum()
    maps = []
    for member, vote in zip(model.members, votes.tolist(), strict=True):
        regions = model.regions(member, boxes)
        x = crop(images, regions, model.info["size"])
        maps.append(vote * place(function(member, x, target, meta=meta, **options), regions, images.shape[-1]))
    return maps


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
    common square, and scaled to mean 1, so that every image counts alike. The box is the middle third."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * 1.5
    matrices = region_matrices(torch.cat([centre - half, centre + half], 1))
    grid = F.affine_grid(matrices, (len(maps), 1, side, side), align_corners=False)
    cut = F.grid_sample(maps.relu()[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]
    mean = cut.mean((1, 2), keepdim=True)
    return (cut / mean.clamp(min=1e-30)).sum(0) / (mean > 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# A data set: only images that the model has not learnt from


def held_out(model_path, data_path, cache):
    """(images, [(model, rows)]): the models of a run, each with the test rows that it never saw.

    model_path: a run folder (all its folds) or a model.pt in one. The data options are the run's own; data_path
    replaces the path alone."""
    import train  # here and not above: a picture is explained without it

    path = Path(model_path)
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.rglob("model.pt")) if path.is_dir() else [path]
    config = next((f / "config.json" for f in (folder, folder.parent) if (f / "config.json").is_file()), None)
    if config is None or not files or not all(f.with_name("test.pt").is_file() for f in files):
        raise InputError(f"--model {model_path}: no run of train.py, so it is not known which images are held out")
    defaults = vars(train.build_parser().parse_args([]))  # for a run of an older version, which knew fewer options
    args = argparse.Namespace(**{**defaults, **json.loads(config.read_text())["args"]})
    args.data, args.cache = data_path or args.data, cache
    images = train.load_images(args)
    pairs = []
    for file in files:
        rows = torch.load(file.with_name("test.pt"), weights_only=True)["rows"]
        if int(rows.max()) >= len(images):
            raise InputError(f"--data {args.data}: not the images that {folder} was trained on")
        pairs.append((load_classifier(file), rows))
    return images, pairs


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
                measure_batch(columns, name, model, blind, images, index)
        found[name] = {m: torch.cat(v) for m, v in columns.items() if v}
        log(f"  {name}")
    return found, groups


def measure_batch(columns, name, model, blind, images, index):
    x, masks = images.pixels[index], lesion_masks(images, index)
    meta = None if images.meta is None else images.meta[index]
    with torch.no_grad():
        boxes = model.locate(x)
        target = model(x, boxes, meta).argmax(1)
    parts = member_maps(model, x, name, target, meta, boxes)
    maps = torch.stack(parts).sum(0)
    inside = energy_inside(maps, masks)
    columns["energy"].append(inside)
    columns["energy/area"].append(inside / masks.float().mean((1, 2)))
    columns["pointing"].append(pointing_game(maps, masks))
    columns["IoU"].append(best_iou(maps, masks))
    votes = model.weights / model.weights.sum()
    areas = 0.0
    for member, vote in zip(model.members, votes, strict=True):  # each member sees its own part of the whole map
        regions = model.regions(member, boxes)
        look = crop(x, regions, model.info["size"])
        own = enlarge(maps, model.info["size"]) if regions is None else crop_map(maps, regions, model.info["size"])
        areas = areas + vote * torch.stack(deletion_insertion(member, look, own, target, meta=meta))
    columns["deletion"].append(areas[0])
    columns["insertion"].append(areas[1])
    if len(parts) > 1:
        pairs = [correlation(a, b) for i, a in enumerate(parts) for b in parts[:i]]
        columns["agreement"].append(torch.stack(pairs).mean(0))
    columns["randomised"].append(correlation(maps, explain(blind, x, name, target, meta, boxes)))


def crop_map(maps, regions, size):
    grid = F.affine_grid(region_matrices(regions), (len(maps), 1, size, size), align_corners=False)
    return F.grid_sample(maps[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]


def interval(values, groups):
    """(mean, low, high) with a 95 % interval from resampled groups; NaN values are left out."""
    from metrics import bootstrap_weights

    known = values.isfinite()
    values, groups = values[known].double(), groups[known]
    if not len(values):
        return math.nan, math.nan, math.nan
    weights = bootstrap_weights(groups).double()
    draws = (weights @ values) / weights.sum(1)
    return (float(values.mean()), *torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist())


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
    low = interval(found[best]["energy/area"], groups)
    why = f"{best}: its energy inside the lesion is {low[0]:.2f} [{low[1]:.2f}, {low[2]:.2f}] times the lesion's share of the area, the most of the methods that beat all baselines"
    return best, "; ".join([why, *reasons])


def print_table(found, groups):
    """Print the table of methods and measures; return it as {method: {measure: [mean, low, high]}}."""
    table = {name: {m: interval(v, groups) for m, v in row.items()} for name, row in found.items()}
    shown = [m for m in MEASURES if any(m in row for row in table.values())]
    print(f"{'':12s}" + "".join(f"{m:>22s}" for m in shown))
    for name, row in table.items():
        cells = [f"{row[m][0]:.2f} [{row[m][1]:.2f}, {row[m][2]:.2f}]" if m in row else "" for m in shown]
        print(f"{name:12s}" + "".join(f"{c:>22s}" for c in cells))
    return table


def predicted_maps(images, pairs, method, batch=32):
    """(rows, maps, predicted classes) of all held-out lesions: each map is the evidence for what was predicted."""
    found = []
    for model, rows in pairs:
        for index in rows.split(batch):
            x, meta = images.pixels[index], None if images.meta is None else images.meta[index]
            with torch.no_grad():
                boxes = model.locate(x)
                p = model(x, boxes, meta)
            predicted = (p[:, 1] >= model.info["threshold"]).long() if p.shape[1] == 2 else p.argmax(1)
            found.append((index, explain(model, x, method, predicted, meta, boxes), predicted))
    return (torch.cat(column) for column in zip(*found, strict=True))


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_atomically(path, text.getvalue().encode())


def hotspots(images, pairs, method, out, ring):
    """Where the evidence for the predicted class lies. Writes into `out`: hotspots.csv and hotspots.png (by class and by
    right and wrong), suspects.csv (every image, the least evidence near the lesion first) and atlas.png."""
    import plots

    out = Path(out)
    rows, maps, predicted = predicted_maps(images, pairs, method)
    boxes, labels, groups = images.boxes[rows], images.labels[rows], images.groups[rows]
    masks = None if images.masks is None else images.masks[rows]
    shares, per_area = evidence_shares(maps, lesion_regions(boxes, maps.shape[-1], masks, ring))

    kinds = {name: labels == k for k, name in enumerate(images.classes)}
    kinds |= {"right": predicted == labels, "wrong": predicted != labels}
    kinds = {f"{kind} ({int(chosen.sum())})": chosen for kind, chosen in kinds.items() if chosen.any()}
    table = {kind: [interval(per_area[c, r], groups[c]) for r in range(len(REGIONS))] for kind, c in kinds.items()}
    print(f"evidence per area ({method}; 1 = as much as anywhere), mean [95 % interval by group]:")
    print(f"{'':24s}" + "".join(f"{r:>22s}" for r in REGIONS))
    for kind, cells in table.items():
        print(f"{kind[:23]:24s}" + "".join(f"{f'{c[0]:.2f} [{c[1]:.2f}, {c[2]:.2f}]':>22s}" for c in cells))
    lines = [[kind, r, *cell] for kind, cells in table.items() for r, cell in zip(REGIONS, cells, strict=True)]
    write_csv(out / "hotspots.csv", ["images", "region", "evidence per area", "low", "high"], lines)
    chart = plots.bar_chart(table, REGIONS, f"Evidence per area, {method}")
    plots.save_png(plots.page([chart], 1), out / "hotspots.png")

    mean = {k: atlas(maps[labels == k], boxes[labels == k]) for k in labels.unique().tolist()}
    top, third = max(float(m.max()) for m in mean.values()), [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    panels = [
        plots.heat_panel(m, f"{images.classes[k]} ({int((labels == k).sum())})", top, third) for k, m in mean.items()
    ]
    title = "Atlas: the evidence around the lesion (box), 1 = the mean"
    plots.save_png(plots.page(panels, len(panels), title), out / "atlas.png")

    near = shares[:, 0] + shares[:, 1]
    order = torch.where(near.isfinite(), near, 2.0).argsort().tolist()  # the shortcut suspects first, blank maps last
    names = [
        [images.names[r], images.classes[y], images.classes[p]] for r, y, p in zip(rows, labels, predicted, strict=True)
    ]
    header = ["image", "class", "predicted", *(f"{r} share" for r in REGIONS), *(f"{r} per area" for r in REGIONS)]
    write_csv(out / "suspects.csv", header, [[*names[i], *shares[i].tolist(), *per_area[i].tolist()] for i in order])
    suspects, blank = [i for i in order if near[i] < 0.5], int((~near.isfinite()).sum())
    print(
        f"{len(suspects)} of {len(rows)} images have more than half of their evidence away from the lesion and its ring"
    )
    print(f"{blank} maps hold no positive evidence")
    for i in suspects[:10]:
        print(f"  {near[i]:.2f}  {names[i][0]} ({names[i][1]}, predicted {names[i][2]})")


# ---------------------------------------------------------------------------------------------------------------------
# One picture, and the command line


def explain_file(model, path, methods, meta=None, target=None):
    """(PIL image, maps {method: (L, L)}, box in pixels or None, placement, caption) of an image file.
    target: index of the class whose evidence is asked for, None = the predicted one."""
    info = model.info
    try:
        picture = read_image(path, info["channels"])
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    pixels, placement = letterbox(picture, info["load_size"])
    x = torch.from_numpy(pixels)[None].to(model.device)
    x = clahe(x) if info["equalise"] else x
    patient = encode_meta([meta or {}], None, info["meta_spec"])[0].to(x.device) if info["meta_spec"] else None
    with torch.no_grad():
        boxes = model.locate(x)
        p = model(x, boxes, patient)[0]
    two = len(info["classes"]) == 2
    if target is None:
        target = int(p[1] >= info["threshold"]) if two else int(p.argmax())
    maps = {name: explain(model, x, name, target, patient, boxes)[0].cpu() for name in methods}
    box = None if boxes is None else original_box(boxes[0].tolist(), placement, info["load_size"], picture.size)
    asked = len(p) - 1 if two else target
    caption = f"evidence for {info['classes'][target]}\np({info['classes'][asked]}) = {float(p[asked]):.3f}"
    return picture, maps, box, placement, caption


def unletterbox(heat, placement, size):
    """A map (L, L) on the picture itself: the bars are cut off. size (width, height) of the picture."""
    sx, sy, left, top = placement
    w, h = max(1, round(size[0] * sx)), max(1, round(size[1] * sy))
    return np.asarray(heat)[top : top + h, left : left + w]


def draw(model, path, methods, meta=None, target=None):
    """The picture of the explanation, a PIL image; several methods, and with target "all" the classes, side by side."""
    import plots

    classes, tiles = model.info["classes"], []
    if target not in (None, "all", *classes):
        raise InputError(f"--target {target}: the model knows {', '.join(classes)}; or give all")
    wanted = range(len(classes)) if target == "all" else [None if target is None else classes.index(target)]
    for one in wanted:
        picture, maps, box, placement, caption = explain_file(model, path, methods, meta, one)
        last = f"\n{DISCLAIMER}" if len(maps) * len(wanted) == 1 else ""  # a page carries its own
        tiles += [
            plots.overlay(picture, box, f"{name}: {caption}{last}", unletterbox(heat, placement, picture.size))
            for name, heat in maps.items()
        ]
    return tiles[0] if len(tiles) == 1 else plots.page(tiles, min(4, len(tiles)))


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    p.add_argument("image", nargs="?", help="a picture to explain")
    p.add_argument("--model", help="model file; with --evaluate and --hotspots a run folder, with all its folds")
    p.add_argument("--method", default="gradcam", help=f"{', '.join(METHODS)}, or all")
    p.add_argument(
        "--target", metavar="CLASS", help="the class whose evidence is shown, or all; default: the predicted"
    )
    p.add_argument("--out", help="the picture to write; with --evaluate and --hotspots a folder (default: the run's)")
    p.add_argument(
        "--evaluate", action="store_true", help="hold every method against the lesions of the held-out images"
    )
    p.add_argument(
        "--most", type=int, default=120, help="with --evaluate and --hotspots: at most so many lesions, drawn at random"
    )
    p.add_argument("--hotspots", action="store_true", help="where the evidence lies, by class and by right and wrong")
    p.add_argument("--ring", type=float, default=0.25, help="width of the ring around the lesion, in its diameters")
    p.add_argument("--data", help="where the run's images lie, if not where they lay when it was trained")
    p.add_argument("--cache", default="runs/cache", help="folder of decoded images")
    p.add_argument("--meta", metavar="A=X,B=Y", help="patient data for a model trained with it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda: for a picture")
    args = p.parse_args(argv)
    if args.method not in METHODS and args.method != "all":
        raise InputError(f"--method {args.method}: give {', '.join(METHODS)}, or all")
    methods = list(METHODS) if args.method == "all" else [args.method]
    if args.image:
        import plots

        meta = parse_meta(args.meta)
        out = Path(args.out or f"{Path(args.image).stem}_{'all' if len(methods) > 1 else methods[0]}.png")
        model = load_classifier(args.model or newest_model(), choose_device(args.device))
        plots.save_png(draw(model, args.image, methods, meta, args.target), out)
        print(f"{out}\n{DISCLAIMER}")
        return
    if not (args.evaluate or args.hotspots):
        raise InputError("give an image, or --evaluate, or --hotspots (see -h)")
    run = Path(args.model or newest_model().parent)
    images, pairs = held_out(run, args.data, args.cache)
    pairs = draw_rows(lesion_images(images, pairs), args.most)
    out = Path(args.out) if args.out else (run if run.is_dir() else run.parent)
    if args.evaluate:
        found, groups = evaluate(images, pairs)
        table = print_table(found, groups)
        best, why = recommend(found, groups)
        print(f"recommended: {why}")
        report = {"images": len(groups), "measures": table, "recommended": best, "why": why}
        write_atomically(out / "explain.json", json.dumps(report, indent=1).encode())
    if args.hotspots:
        hotspots(images, pairs, methods[0], out, args.ring)
    print(f"{out}\n{DISCLAIMER}")


if __name__ == "__main__":
    run_main(main)
