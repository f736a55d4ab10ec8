"""Why did a network answer so? Saliency maps for ANY image classifier, baselines, and how good a map is.

    model = torchvision.models.resnet18(weights=None)
    images = torch.rand(2, 3, 96, 128)  # (N, C, H, W), as the model takes them
    heat = grad_cam(model, images)  # (2, 96, 128): evidence for the predicted classes
    heat = grad_cam(model, images, target=7, layer="layer3")  # for class 7, seen at another layer
    shares = energy_inside(heat, masks=torch.rand(2, 96, 128) > 0.5)  # (2,), of the evidence in the lesions

`model` is any nn.Module from images to logits (N, K), (N, 1) or (N,). A map is RAW, in units of the class score: where
there is no evidence it is all zero, and stays so. The score of a class is its logit; a single logit stands for two
classes, +logit for class 1 and -logit for class 0. No method changes a `.grad`, a mode (all look in eval mode) or the
random state, or leaves a hook. What is not understood is a ValueError.

A network with a second input (patient data) goes in as a small module that holds it. The methods that ask about many
versions of a batch of N ask for k N at once, version by version, so it repeats its own: `meta.repeat(len(x) // N, 1)`."""

import contextlib
import copy
import weakref

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The score of a class, and where to look


@contextlib.contextmanager
def evaluating(model):
    """Eval mode and no gradients inside, every module's own mode again outside, whatever happens."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def logits_of(model, images):
    """(N, K) or (N, 1), in float32."""
    logits = model(images)
    if not isinstance(logits, torch.Tensor) or logits.dim() not in (1, 2) or len(logits) != len(images):
        what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the model gives {what} for {len(images)} images: wrap it so that it gives logits (N, K)")
    return logits.float().reshape(len(images), -1)


def resolve_target(logits, target):
    """The classes (N,) asked for. target: None (the predicted ones), a class index, or one for each image (N,)."""
    if target is None:
        return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    target, classes = torch.as_tensor(target, device=logits.device), max(2, logits.shape[1])
    if target.is_floating_point() or target.shape not in ((), (len(logits),)):
        raise ValueError(
            f"target of {target.dtype} and shape {tuple(target.shape)}: give a class, or one an image (N,)"
        )
    if not ((target >= 0) & (target < classes)).all():
        raise ValueError(f"target {target.tolist()}: the model's classes are 0 ... {classes - 1}")
    return target.long().expand(len(logits))


def class_score(logits, target):
    """Score (N,) of the classes `target` (N,): the logit, of one's own sign where one logit stands for two classes."""
    if logits.shape[1] == 1:
        return logits[:, 0] * (2.0 * target - 1)
    return logits.gather(1, target[:, None])[:, 0]


def prepare(model, images, target):
    """Float images, detached, and the classes (N,), decided once on the images as they are."""
    if images.dim() != 4 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} and shape {tuple(images.shape)}: give floats (N, C, H, W)")
    with evaluating(model):
        x = images.detach().clone()
        return x, resolve_target(logits_of(model, x), target)


def find_layer(model, layer, images):
    """A module by itself, by its dotted name, or (None) the last one that gives a map of more than one place."""
    if layer is None:
        return last_map(model, images)
    if isinstance(layer, nn.Module):
        return layer
    names = dict(model.named_modules())
    if layer not in names:
        raise ValueError(f"layer {layer!r}: no such module; there are {', '.join(n for n in names if n)}")
    return names[layer]


LAST = weakref.WeakKeyDictionary()  # what last_map has found: {model: {(H, W): module}}


def last_map(model, images):
    """The last module to give a map (N, C, h, w) with h * w > 1, global poolings aside. It is looked for once a network
    and size of images, by a forward pass of one image."""
    found = LAST.setdefault(model, {})
    known = found.get(images.shape[-2:])
    if known is not None and known() is not None and any(known() is m for m in model.modules()):
        return known()
    last = []

    def look(module, _, output):
        pools = isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
        if isinstance(output, torch.Tensor) and output.dim() in (3, 4) and output[0].numel() > 1 and not pools:
            places = output.shape[1] if output.dim() == 3 else output.shape[2:].numel()
            last[:] = [(module, output.dim())] if places > 1 else last

    hooks = [m.register_forward_hook(look) for m in model.modules() if m is not model]
    try:
        with evaluating(model):
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not last or last[0][1] == 3:
        raise ValueError(
            "the last maps of this network are tokens, or there are none: name a `layer` (of a transformer the input "
            "of its last attention, as in 'encoder.layers.encoder_layer_11.ln_1') and give `reshape` (see grad_cam)"
        )
    found[images.shape[-2:]] = weakref.ref(last[0][0])
    return last[0][0]


def activations_and_gradients(model, images, target=None, layer=None, reshape=None):
    """A and dScore/dA, (N, C, h, w) each, at a layer (see grad_cam): one forward pass, of which gradients are recorded
    behind the layer alone, and a backward pass that stops there."""
    layer, leaves = find_layer(model, layer, images), []

    def cut(module, _, output):
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"layer: it gives a {type(output).__name__}, no tensor; name another one")
        torch.set_grad_enabled(True)  # until the `with` below ends
        leaves[:] = [output.detach().requires_grad_()]
        return leaves[0].clone()  # an in-place ReLU behind it must not write into A itself

    hook = layer.register_forward_hook(cut)
    try:
        with evaluating(model):
            logits = logits_of(model, images)
            if not leaves:
                raise ValueError("layer: the forward pass does not come through it")
            score = class_score(logits, resolve_target(logits.detach(), target)).sum()
            (gradients,) = torch.autograd.grad(score, leaves, allow_unused=True) if score.requires_grad else [None]
    finally:
        hook.remove()
    if gradients is None:
        raise ValueError("layer: the logits do not depend on what it gives; name another one")
    reshape = reshape or (lambda x: x)
    maps, gradients = reshape(leaves[0].detach()).float(), reshape(gradients).float()
    if maps.dim() != 4 or len(maps) != len(images):
        raise ValueError(f"layer: its output {tuple(maps.shape)} is no map (N, C, h, w); give `reshape` for tokens")
    return maps, gradients


def enlarge(maps, images):
    """(N, h, w) -> (N, H, W) of the images, bilinear."""
    return F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Methods that read the network's inside


def grad_cam(model, images, target=None, layer=None, reshape=None):
    """Maps (N, H, W) >= 0: channels weighted by their mean gradient (Selvaraju et al., Grad-CAM, 2017).

    images (N, C, H, W); target: None (the predicted classes), a class, or one an image (N,). layer: a module or its
    dotted name; default: the last one that gives a map. reshape: for a layer that gives tokens (N, T, D), a function
    to (N, D, h, w), as in `lambda t: t[:, 1:].mT.unflatten(2, (14, 14))`."""
    maps, gradients = activations_and_gradients(model, images, target, layer, reshape)
    return enlarge((gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(), images)


def grad_cam_pp(model, images, target=None, layer=None, reshape=None):
    """Maps >= 0: positive gradients, weighted so that each occurrence counts (Chattopadhay et al., Grad-CAM++, 2018).
    Arguments as of `grad_cam`."""
    maps, gradients = activations_and_gradients(model, images, target, layer, reshape)
    denominator = 2 + maps.sum((2, 3), keepdim=True) * gradients  # the gradient's square cancels: it may underflow
    alpha = torch.where(denominator.abs() > 1e-12, 1 / denominator, torch.zeros_like(gradients))
    weights = (alpha * gradients.relu()).sum((2, 3), keepdim=True)
    return enlarge((weights * maps).sum(1).relu(), images)


def layer_cam(model, images, target=None, layer=None, reshape=None):
    """Maps >= 0: each position weighted by its own positive gradient (Jiang et al., Layer-CAM, 2021). Arguments as of
    `grad_cam`."""
    maps, gradients = activations_and_gradients(model, images, target, layer, reshape)
    return enlarge((gradients.relu() * maps).sum(1).relu(), images)


def input_gradient(model, images, target=None):
    """dScore/dImage (N, C, H, W)."""
    with evaluating(model), torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = logits_of(model, x.clone())
        score = class_score(logits, resolve_target(logits.detach(), target)).sum()
        return torch.autograd.grad(score, x)[0]


def integrated_gradients(model, images, target=None, steps=32):
    """Signed maps that sum to score(image) - score(blank image of the same mean) (Sundararajan et al. 2017).

    The straight path from the blank image, by the midpoint rule."""
    x, target = prepare(model, images, target)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    total = sum(input_gradient(model, blank + (x - blank) * ((i + 0.5) / steps), target) for i in range(steps))
    return ((x - blank) * total / steps).sum(1)


def smooth_grad(model, images, target=None, samples=16, noise=0.1, seed=0):
    """Maps >= 0: size of the gradient, averaged over noisy copies (Smilkov et al. 2017). It tells what the score is
    sensitive to, not what speaks for it. noise: standard deviation, in the images' units."""
    x, target = prepare(model, images, target)
    generator, total = torch.Generator(x.device).manual_seed(seed), 0.0
    for _ in range(samples):
        noisy = x + noise * torch.randn(x.shape[1:], generator=generator, device=x.device)  # the same for every image
        total = total + input_gradient(model, noisy, target)
    return (total / samples).abs().sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Methods that only ask the network questions


def scores_seen(model, x, target, seen, batch=64):
    """Scores (M, N) of images x (N, C, H, W) seen through masks (M, H, W): 1 as they are, 0 blanked to their mean."""
    blank, scores = x.mean((2, 3), keepdim=True), []
    with evaluating(model):
        for masks in seen.split(max(1, batch // len(x))):
            shown = torch.lerp(blank, x, masks[:, None, None].to(x)).flatten(0, 1)
            scores.append(class_score(logits_of(model, shown), target.repeat(len(masks))).view(-1, len(x)))
    return torch.cat(scores)


def occlusion(model, images, target=None, window=0.25, stride=0.125):
    """Signed maps: how much the score falls when a window is blanked, averaged over the windows that cover a pixel
    (Zeiler & Fergus 2014). window and stride as shares of the sides."""
    x, target = prepare(model, images, target)
    windows = []  # on either axis: (positions, side), 1 where covered
    for side in x.shape[-2:]:
        width, step = max(1, round(window * side)), max(1, round(stride * side))
        starts = torch.tensor(sorted({*range(0, side - width, step), side - width}), device=x.device)[:, None]
        axis = torch.arange(side, device=x.device)
        windows.append(((axis >= starts) & (axis < starts + width)).float())
    covered = (windows[0][:, None, :, None] * windows[1][:, None]).flatten(0, 1)
    whole = scores_seen(model, x, target, torch.ones(1, *x.shape[-2:], device=x.device))
    falls = whole - scores_seen(model, x, target, 1 - covered)
    return torch.einsum("mn,mhw->nhw", falls, covered) / covered.sum(0)


def rise(model, images, target=None, masks=128, cells=7, seed=0):
    """Signed maps: covariance of the score with a pixel being seen, over random soft masks (Petsiuk et al. 2018), in
    units of the score: what seeing the pixel adds on average. cells: of a mask, along the longer side."""
    x, target = prepare(model, images, target)
    (h, w), side = x.shape[-2:], max(x.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.rand(masks, 1, cells + 1, cells + 1, generator=generator) < 0.5).float()
    large = F.interpolate(grid, size=(side + side // cells,) * 2, mode="bilinear", align_corners=False)
    shifts = torch.randint(0, side // cells + 1, (masks, 2), generator=generator).tolist()
    seen = torch.stack([m[0, t : t + h, s : s + w] for m, (t, s) in zip(large, shifts, strict=True)]).to(x.device)
    scores, centred = scores_seen(model, x, target, seen), seen - seen.mean(0)
    variance = centred.square().mean(0).clamp(min=1e-6)
    return torch.einsum("mn,mhw->nhw", scores - scores.mean(0), centred) / masks / variance


METHODS = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_pp,
    "layercam": layer_cam,
    "ig": integrated_gradients,
    "smoothgrad": smooth_grad,
    "occlusion": occlusion,
    "rise": rise,
}
CAMS = ("gradcam", "gradcam++", "layercam")  # those that take a layer
CLASSLESS = ("smoothgrad",)  # those whose map says what the score is sensitive to, and nothing for or against a class
UNITS = {
    "gradcam": "logit",
    "gradcam++": "logit",
    "layercam": "logit",
    "ig": "logit a pixel",
    "smoothgrad": "|dlogit/dgrey|",
    "occlusion": "logit lost when covered",
    "rise": "logit gained when seen",
}

# ---------------------------------------------------------------------------------------------------------------------
# Baselines that a map must beat, and the check that it listens to the network. Images in [0, 1]


def random_map(model, images, target=None, seed=0):
    """Smooth noise >= 0."""
    coarse = torch.rand(len(images), 8, 8, generator=torch.Generator().manual_seed(seed))
    return enlarge(coarse.to(images.device), images)


def centre_map(model, images, target=None):
    """A Gaussian in the middle, sigma a quarter of the sides: people hold the probe so that the lesion is there."""
    down, across = (
        torch.exp(-(((torch.arange(n, device=images.device) + 0.5) / n - 0.5) ** 2) / (2 * 0.25**2))
        for n in images.shape[-2:]
    )
    return (down[:, None] * across).expand(len(images), -1, -1)


def intensity_map(model, images, target=None):
    """The image's own brightness."""
    return images.mean(1)


def darkness_map(model, images, target=None):
    """One minus the brightness: in ultrasound the stronger rival, since lesions are dark."""
    return 1 - images.mean(1)


BASELINES = {"random": random_map, "centre": centre_map, "intensity": intensity_map, "darkness": darkness_map}


def randomised(model, seed=0):
    """A copy with freshly drawn weights (Adebayo et al., Sanity checks for saliency maps, 2018): by each module's own
    `reset_parameters`, else normal, of the same mean and spread."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            else:
                for p in module.parameters(recurse=False):
                    p.copy_(torch.randn_like(p) * p.std(correction=0) + p.mean())
    return model


def correlation(a, b):
    """Pearson correlation (N,) of maps (N, H, W) with maps; 0 where one is constant."""
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


def deletion_insertion(model, images, maps, target, steps=16, blurred=None):
    """Areas (N,), (N,) under the class probability while the pixels go away (small is good) or come (large is good),
    the strongest first (Petsiuk et al. 2018). What is gone is the image's mean; what has not come yet is `blurred`,
    by default the mean of 9 x 9 pixels."""
    x, target = prepare(model, images, target)
    n, _, h, w = x.shape
    rank = maps.flatten(1).argsort(1, descending=True).argsort(1).reshape(n, 1, h, w).float() / (h * w)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    blurred = F.avg_pool2d(x, 9, 1, 4, count_include_pad=False) if blurred is None else blurred
    areas = []
    for strongest, rest in ((blank, x), (x, blurred)):
        curve = []
        with evaluating(model):
            for share in torch.linspace(0, 1, steps + 1).tolist():
                logits = logits_of(model, torch.where(rank < share, strongest, rest))
                logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
                curve.append(logits.softmax(1).gather(1, target[:, None])[:, 0])
        areas.append(torch.trapezoid(torch.stack(curve), dim=0) / steps)
    return areas
