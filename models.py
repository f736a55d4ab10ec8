"""Networks: what looks at the pixels. Nothing here knows a data set.

DNet      backbone -> feature pyramid -> every cell: lesion or not, and the box      where is it, what is its outline?
CNet      backbone -> pooled embedding (+ patient data) -> logits                    benign or malignant?
          with a shared trunk it holds a D-Net, and looks at what lies inside of the outline: one pass finds and names
Ensemble  members' probabilities, weighted and calibrated; their disagreement is the uncertainty

model = load("runs/busi/model.pt")  # an Ensemble; the file alone says how to build it
answer = model.look(images)         # .boxes (N, 4) in [0, 1], .found.outlines (N, h, w), .opinions (M, V, N, K) ...
probabilities = model(images)       # (N, K)
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import saliency
from augment import VIEWS, crop, crop_regions, place, tta_views
from backbones import ATTENTION, build_backbone, convolution, feature_pyramid, standardise, texture
from files import read_checkpoint, reason, save_checkpoint
from losses import cell_centres, two_logits
from readers import InputError

DISCLAIMER = "For research and education, not for diagnosis."


def choose_device(name):
    """torch.device of "auto", "cpu", "cuda" ... InputError where there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("nothing can be computed there")
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu or auto")
    try:
        torch.Generator(device)  # each training needs one; an index too high, or a kind not built in, has none
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not on this machine ({reason(e)}); use --device cpu or auto") from None
    return device


def choose_amp(mode, device):
    """Whether to compute in bfloat16. auto: on GPUs that have it. Not on CPUs, not even on those that multiply it twice
    as fast: in a small trial it cost accuracy in every fold."""
    if mode != "auto":
        return mode == "on"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# ---------------------------------------------------------------------------------------------------------------------
# D-Net: where is the lesion, and what is its outline?


class Found(NamedTuple):
    """What detectors say of N images: of every cell, how likely it is lesion, and where that lesion's sides are."""

    outlines: torch.Tensor  # (N, h, w) probabilities
    cells: torch.Tensor  # (N, 4, h, w) boxes in [0, 1]
    sure: torch.Tensor | None = None  # (N,) of several detectors the mean of their scores; None: of one

    def scores(self):
        """How sure (N,) it is that there is a lesion at all: the outline's largest probability. Of several detectors the
        mean of theirs: the largest of a mean outline is smaller, and a threshold set for one would not fit it."""
        return self.outlines.amax((1, 2)) if self.sure is None else self.sure

    def boxes(self):
        """The box (N, 4) of the likeliest lesion: the mean of its cells' boxes, weighted by the outline. Its cells: those
        around the likeliest, connected, with half of its probability at least."""
        return self.boxes_of(self.likeliest().flatten(1))

    def likeliest(self):
        """The cells (N, h, w) bool of the likeliest lesion, see boxes."""
        parts = label_parts(self.outlines >= self.outlines.amax((1, 2), keepdim=True) / 2)
        top = parts.flatten(1).gather(1, self.outlines.flatten(1).argmax(1, keepdim=True))
        return parts == top[:, :, None]

    def boxes_of(self, chosen):
        """The mean box (N, 4) of the cells that are chosen (N, h * w), weighted by the outline."""
        weights = self.outlines.flatten(1) * chosen
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        return (self.cells.flatten(2) * weights[:, None]).sum(2).clamp(0, 1)

    def refined(self, near, regions):
        """The same on a map twice as fine, with what a closer look at regions (N, 4) saw there: `near`, Found in the
        coordinates of the regions. That there is a lesion, and where, stays what the whole picture says: what a doubtful
        look saw is raised to it, or another place would be the likeliest. NaN in the whole's boxes is not covered up."""
        h, w = (2 * side for side in self.outlines.shape[-2:])
        start, extent = regions[:, :2, None, None], (regions[:, 2:] - regions[:, :2])[:, :, None, None]
        cells = near.cells * extent.repeat(1, 2, 1, 1) + start.repeat(1, 2, 1, 1)
        x, y = cell_centres(h, w, regions.device)
        places = torch.stack([x.expand(h, w), y.expand(h, w)])
        places = 2 * (places - start) / extent - 1  # (N, 2, h, w), in [-1, 1] inside of the region
        inside = (places.abs() <= 1).all(1) & self.cells.isfinite().flatten(1).all(1)[:, None, None]
        fine = torch.cat([near.outlines[:, None], cells], 1)
        fine = F.grid_sample(fine, places.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
        coarse = torch.cat([self.outlines[:, None], self.cells], 1)
        coarse = F.interpolate(coarse, size=(h, w), mode="nearest")  # a smoother one would take other lesions' tops off
        seen = (fine[:, 0] * inside).amax((1, 2)).clamp(min=1e-12)
        raised = fine[:, 0] * (self.outlines.amax((1, 2)) / seen).clamp(min=1)[:, None, None]
        outlines = torch.where(inside, raised, coarse[:, 0])
        return Found(outlines, torch.where(inside[:, None], fine[:, 1:], coarse[:, 1:]), self.scores())

    def at(self, i):
        """Of image i alone."""
        return Found(self.outlines[i, None], self.cells[i, None], self.scores()[i, None])

    def lesions(self, threshold):
        """All lesions of a single image, the likeliest first: their boxes, a list of (4,). A lesion is a connected part of
        the outline (above a half, or the threshold if that is lower) whose largest probability, on the scale of the
        image's score, reaches the threshold, as that score does. A closer look that was surer lowers no other."""
        scale = max(1.0, float(self.scores() / self.outlines.max().clamp(min=1e-12)))
        parts, found = label_parts(self.outlines >= min(0.5, threshold) / scale).flatten(1), []
        for part in parts.unique().tolist() if float(self.scores()) >= threshold else ():
            score = scale * float((self.outlines.flatten(1) * (parts == part)).max())
            if part and score >= threshold:
                found.append((score, self.boxes_of(parts == part)[0]))
        return [box for _, box in sorted(found, key=lambda pair: -pair[0])]


def label_parts(masks):
    """Connected parts (8 neighbours) of masks (N, h, w) bool: a number (N, h, w) for each, 0 outside. The largest number
    spreads through its part until nothing changes. A number names a cell of the part, whose own may be larger by then:
    to take that over is a long way in one step."""
    labels = torch.arange(1, masks[0].numel() + 1, dtype=torch.float, device=masks.device).view(masks.shape[1:]) * masks
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * masks
        named = spread.flatten(1).gather(1, (spread.flatten(1).long() - 1).clamp(min=0))
        spread = named.view_as(spread) * masks
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


class DNet(nn.Module):
    """Detector: images (N, C, S, S) -> logits of the outline (N, h, w), every cell's box (N, 4, h, w) in [0, 1].

    The backbone's maps of stride 4 and more are merged top-down (Lin et al., FPN, 2017); every cell of the finest tells
    whether it is lesion, and its distances to the lesion's four sides (Tian et al., FCOS, 2019). No anchors are needed,
    and the outline, which every segmentation data set has, teaches features that travel to other scanners."""

    def __init__(self, model="mobilenet_v2", channels=1, normalise="image", weights="none", width=96):
        super().__init__()
        self.config = {"model": model, "channels": channels, "normalise": normalise, "width": width}
        self.features, self.deepest = build_backbone(model, channels, weights)
        with torch.no_grad():  # the maps' widths, by a look
            maps = feature_pyramid(self.features.eval(), torch.zeros(1, channels, 128, 128))
        self.features.train()
        maps = [m for m in maps if m.shape[-1] <= 32]
        self.lateral = nn.ModuleList(nn.Conv2d(m.shape[1], width, 1) for m in maps)
        self.smooth = nn.ModuleList(nn.Sequential(*convolution(width, width)) for _ in maps)
        self.head = nn.Conv2d(width, 5, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():  # first outlines are faint; softplus(-1.3) = 0.24: first boxes are about half the image
            self.head.bias.copy_(torch.tensor([-2.0, -1.3, -1.3, -1.3, -1.3]))

    def pyramid(self, images):
        """The backbone's deepest map (N, C, h, w) and the merged ones (N, width, h, w), finest first."""
        maps = feature_pyramid(self.features, standardise(images, self.config["normalise"]))[-len(self.lateral) :]
        merged = [self.lateral[-1](maps[-1])]
        for lateral, own in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            merged.append(lateral(own) + F.interpolate(merged[-1], size=own.shape[-2:], mode="nearest"))
        return maps[-1], [smooth(m) for smooth, m in zip(self.smooth, reversed(merged), strict=True)]

    def read(self, finest):
        """What the finest merged map says, see forward."""
        out = self.head(finest).float()
        reach = 1e-3 + F.softplus(out[:, 1:])  # left, top, right, bottom of the cell's centre: always positive
        x, y = cell_centres(*out.shape[-2:], out.device)
        return out[:, 0], torch.stack([x - reach[:, 0], y - reach[:, 1], x + reach[:, 2], y + reach[:, 3]], 1)

    def forward(self, images):
        return self.read(self.pyramid(images)[1][0])

    def find(self, images):
        """As forward, but the outline as probabilities: Found."""
        logits, cells = self(images)
        return Found(logits.sigmoid(), cells)


class VotingDNet(DNet):
    """D-Net as model files of version 1 hold it: from the three coarsest maps, unsmoothed, and every cell's vote for the
    box has a weight, which says little of an outline. It predicts; it is not trained any more."""

    def __init__(self, model="mobilenet_v2", channels=1, normalise="image", weights="none", width=96):
        super().__init__(model, channels, normalise, weights, width)
        with torch.no_grad():
            maps = feature_pyramid(self.features.eval(), torch.zeros(1, channels, 128, 128))[-3:]
        self.lateral = nn.ModuleList(nn.Conv2d(m.shape[1], width, 1) for m in maps)
        self.smooth = nn.ModuleList(nn.Identity() for _ in maps)
        self.head = nn.Sequential(*convolution(width, width), *convolution(width, width), nn.Conv2d(width, 5, 1))

    def find(self, images):
        votes, cells = self(images)
        share = votes.flatten(1).softmax(1)
        box = (cells.flatten(2) * share[:, None]).sum(2)
        return Found(share.view_as(votes), box[:, :, None, None].expand_as(cells))


# ---------------------------------------------------------------------------------------------------------------------
# C-Net: benign or malignant?


class CNet(nn.Module):
    """Classifier. Two classes: one logit (N, 1), of the positive class; K classes: K logits (N, K).

    meta: number of metadata columns, 0 for images alone. attention: of ATTENTION, before the pooling. roi: "none" if it
    was trained on whole images, "mask" or "dnet" if on crops. trunk: "own", or "shared": its backbone is that of a D-Net
    of its own, and beside the pooled deepest map the head sees the means of D-Net's maps of stride 4 and 16 over the
    outline. `config` holds the arguments that build it again."""

    def __init__(
        self,
        model="mobilenet_v2",
        classes=2,
        channels=1,
        meta=0,
        dropout=0.2,
        normalise="image",
        roi="none",
        attention="none",
        weights="none",
        trunk="own",
    ):
        super().__init__()
        if model == "none" and not meta:
            raise InputError("--model none sees no image; it needs patient data, --meta-columns")
        self.config = {"model": model, "classes": classes, "channels": channels, "meta": meta, "dropout": dropout}
        self.config |= {"normalise": normalise, "roi": roi, "attention": attention, "trunk": trunk}
        if trunk == "shared":
            self.dnet = DNet(model, channels, normalise, weights)
            self.width = self.dnet.deepest
        else:
            self.features, self.width = build_backbone(model, channels, weights)
        self.attention = ATTENTION[attention](self.width)
        if trunk == "shared":
            self.width += 2 * self.dnet.config["width"]
        if meta:
            self.meta = nn.Sequential(nn.Linear(meta, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.width += 32
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.width, 1 if classes == 2 else classes)
        nn.init.zeros_(self.head.bias)

    @property
    def shared(self):
        return self.config["trunk"] == "shared"

    @property
    def backbone(self):
        return self.dnet.features if self.shared else self.features

    @functools.cached_property
    def stages(self):
        """{pixels a cell: (number of the backbone's last layer at that resolution, whether its map has both signs)}, by
        a look."""
        shape, strides = (1, self.config["channels"], 128, 128), {}
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.head.weight)
        with saliency.evaluating(self.backbone):
            for i, layer in enumerate(self.backbone):
                x = layer(x)
                cell = 2 ** round(math.log2(128 / x.shape[-1]))  # without padding 128 / 16 cells are but 7
                strides[cell] = i, bool((x < 0).any())
        return strides

    def layer_of(self, stride, positive=False):
        """The backbone's last layer with that many pixels a cell, or the next fewer: what Grad-CAM and its kin look at. All
        evidence comes through it, but for what a shared trunk's head sees inside of the outline: on that an answer hangs
        to 1 to 9 %, and a map of what lies there would look right whatever the network goes by.

        positive: where that map has both signs, as at the end of MobileNetV2's stages, the activation that the next
        layer begins with, if it has one: of what is below 0 a channel's weight does not tell what it is for."""
        number, signed = self.stages[max(s for s in self.stages if s <= stride)]
        after = self.backbone[number + 1 : number + 2] if positive and signed else nn.Sequential()
        activations = (m for m in after.modules() if isinstance(m, (nn.ReLU, nn.ReLU6, nn.SiLU)))
        return next(activations, self.backbone[number])

    def see(self, images, meta=None):
        """The penultimate embedding (N, width): pooled features, and the metadata branch where there is one; and, of a
        shared trunk, D-Net's logits of the outline and cells' boxes, else None."""
        found = None
        if self.shared:
            maps, merged = self.dnet.pyramid(images)
            found = self.dnet.read(merged[0])
            inside = found[0].detach().sigmoid()[:, None]  # the class is not to bend the outline
            parts = [self.attention(maps).mean((2, 3))]
            for m in (merged[0], merged[min(2, len(merged) - 1)]):
                weights = F.adaptive_avg_pool2d(inside, m.shape[-2:]) + 1e-4  # where nothing is found: the plain mean
                parts.append((m * (weights / weights.sum((2, 3), keepdim=True))).sum((2, 3)))
        else:
            parts = [self.attention(self.features(standardise(images, self.config["normalise"]))).mean((2, 3))]
        if self.config["meta"]:
            if meta is None:
                raise InputError("this model was trained with patient metadata: give it")
            parts.append(self.meta(meta))
        return torch.cat(parts, 1), found

    def embed(self, images, meta=None):
        return self.see(images, meta)[0]

    def classify(self, embeddings):
        return self.head(self.dropout(embeddings))

    def forward(self, images, meta=None):
        return self.classify(self.embed(images, meta))


def same_classes(known, found):
    """Whether a model that knows these classes can answer for data of those. Of two the positive has to be the same, the
    negative's name is free (it may be merged: benign+normal); of more all."""
    return len(known) == len(found) and (known == found if len(known) > 2 else known[1:] == found[1:])


def to_probabilities(logits):
    """(N, 1) logits of the positive class, or (N, K): probabilities (N, 2) or (N, K). In float64: in float32 all logits
    above 17 are 1.0, and their order is lost (MPS has no float64)."""
    return two_logits(logits.float() if logits.device.type == "mps" else logits.double()).softmax(1)


def finite(values):
    """What networks answered, if it is numbers: a training that diverges can end in NaN though its loss was one."""
    if not values.isfinite().all():
        raise InputError("the network's answers are not finite: try a lower --lr; or its model file is damaged")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The whole model: members, D-Net, and everything that predicting needs


def average(found):
    """The mean of what several detectors have Found."""
    side = found[0].outlines.shape[-2:]
    outlines = [F.interpolate(f.outlines[:, None], size=side, mode="bilinear")[:, 0] for f in found]
    cells = [F.interpolate(f.cells, size=side, mode="bilinear") for f in found]
    sure = torch.stack([f.scores() for f in found]).mean(0)
    return Found(torch.stack(outlines).mean(0), torch.stack(cells).mean(0), sure)


class Answer(NamedTuple):
    """All that an Ensemble says of N images in one pass."""

    opinions: torch.Tensor  # (M, V, N, K) probabilities: of every member, of every view at every scale (V)
    boxes: torch.Tensor | None  # (N, 4): found, or as the caller gave them
    found: Found | None
    traits: list  # [(N, D)] of the first view: each member's embedding's direction, and the texture: see strangeness
    embeddings: list | None = None  # [(V, N, D)] of each member, of the first scale, where they are asked for


# Pixels a cell of the maps that are looked at, and whether they are to be positive, see CNet.layer_of: the deepest have
# 4 x 4 cells at 128 pixels, larger than most lesions. What weighs each place by itself may look at finer ones, as
# Layer-CAM's authors do, and at either sign.
CAM_LAYERS = {"gradcam": (16, True), "gradcam++": (16, True), "layercam": (8, False)}


class Ensemble(nn.Module):
    """Weighted mean of the members' probabilities, softened by one temperature. One member is the common case.

    dnets: the detectors that stand by themselves; members with a shared trunk bring their own.

    info: "classes", "size" (what C-Net and D-Net see), "load_size" (what the file is letterboxed to), "channels",
    "equalise" (CLAHE), "window" (see pictures.read_frames) or None, "margin" of the crops, "meta_spec", "temperature",
    "threshold" and the "views" of an image that both were set for, "lesion_threshold" (of the outline's largest
    probability: below it no lesion is said to be found), "made", and "familiar", see familiar, where it is known."""

    def __init__(self, members, weights=None, dnets=(), **info):
        super().__init__()
        self.members, self.dnets = nn.ModuleList(members), nn.ModuleList(dnets)
        self.weights = torch.tensor([1.0] * len(members) if weights is None else weights, dtype=torch.float32)
        usual = {"temperature": 1.0, "threshold": 0.5, "views": 1, "margin": 0.25, "equalise": False}
        usual |= {"lesion_threshold": 0.0, "window": None}
        self.info = usual | {"meta_spec": [], "made": {}} | info

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def finders(self):
        """The D-Nets: those that stand by themselves, and those of members that look at the whole."""
        return [*self.dnets, *(m.dnet for m in self.members if m.shared and m.config["roi"] == "none")]

    @property
    def needs_boxes(self):
        """Whether a member sees crops around boxes that nobody here finds: the caller has to give them."""
        return not self.finders and any(m.config["roi"] != "none" for m in self.members)

    @property
    def tells_outlines(self):
        return any(not isinstance(dnet, VotingDNet) for dnet in self.finders)

    def locate(self, images, known=None):
        """The lesions' boxes (N, 4) in [0, 1] by D-Net, as crops are made around them: `look` draws them finer. Without
        a D-Net those that are `known`, if they are needed, or None."""
        if not self.finders:
            return known if self.needs_boxes else None
        x = crop(images, None, self.info["size"])
        return average([dnet.find(x) for dnet in self.finders]).boxes()

    def regions(self, member, boxes):
        """Where a member looks: the crops (N, 4) around the boxes if it was trained on crops, None = the whole."""
        if member.config["roi"] == "none":
            return None
        if boxes is None:  # a network of crops would answer on whole pictures, and wrongly
            raise InputError(
                "this model sees crops around the lesion: it needs boxes, or a D-Net (train with --roi dnet)"
            )
        return crop_regions(boxes, self.info["margin"])

    def combine(self, probabilities):
        """(M, N, K) -> (N, K): weighted mean, then the temperature: p^(1/T), which for one member is logits / T."""
        weights = (self.weights / self.weights.sum()).to(probabilities.device)
        mean = (probabilities * weights[:, None, None]).sum(0)
        return (mean.clamp(min=1e-30).log() / self.info["temperature"]).softmax(1)

    def forward(self, images, boxes=None, meta=None):
        """Probabilities (N, K): the answer, from as many views as it was calibrated for."""
        return self.combine(self.look(images, boxes, meta).opinions.mean(1))

    def look(self, images, boxes=None, meta=None, views=None, scales=(1.0,), keep=False):
        """Answer of images (N, C, L, L). boxes (N, 4): what crops are made around; None: what is found. Members that see
        the whole come first: those that hold a D-Net find the lesion in the pass that names it, and those on crops that
        hold one then draw it finer. keep: the embeddings too."""
        views, n, size = views or self.info["views"], len(images), self.info["size"]
        take = crop if views == 1 else functools.partial(tta_views, views=views)
        meta = None if meta is None else meta.repeat(views, 1)
        found, near, around = [dnet.find(crop(images, None, size)) for dnet in self.dnets], [], boxes
        first = 1.0 if 1.0 in scales else scales[0]  # of the picture as it was trained on, where it is looked at so
        opinions, traits, kept = [[] for _ in self.members], [None] * len(self.members), [None] * len(self.members)
        for i, member in sorted(enumerate(self.members), key=lambda pair: pair[1].config["roi"] != "none"):
            if member.config["roi"] != "none" and around is None and found:
                around = average(found).boxes()
            regions = self.regions(member, around)
            for scale in scales:
                embeddings, own = member.see(take(images, regions, round(size * scale)), meta)
                opinions[i].append(to_probabilities(member.classify(embeddings)).unflatten(0, (views, n)))
                if scale == first:  # an embedding's length tells of the contrast, not of the kind
                    traits[i] = F.normalize(embeddings[:n].float(), dim=1)
                    kept[i] = embeddings.float().unflatten(0, (views, n)).cpu() if keep else None
                if own and scale == first and member.config["roi"] != "mask":  # which was shown where the lesion is
                    seen = Found(own[0][:n].sigmoid(), own[1][:n])  # by the first view, the picture as it is
                    (found if regions is None else near).append(seen)
        found = average(found) if found else None
        found = found.refined(average(near), crop_regions(around, self.info["margin"])) if found and near else found
        boxes = found.boxes() if boxes is None and found else boxes
        opinions = [torch.cat(o) for o in opinions]
        traits = [t.cpu().double() for t in (*traits, texture(crop(images, None, size)))]
        opinions = torch.stack(opinions) if opinions else torch.zeros(0, views, n, 0)
        return Answer(opinions, boxes, found, traits, kept if keep else None)

    def strangeness(self, traits):
        """(N,) how far from the pictures of training: above 1 is farther than 99 % of the validation images. Zeros where
        the model does not tell: of an older version, trained on everything (--refit), or adapted to other pictures."""
        known = self.info.get("familiar")
        return distance(traits, known) if known else torch.zeros(len(traits[0]))

    def conclude(self, opinions):
        """From opinions (M, V, N, K): calibrated probabilities (N, K), and the uncertainty (N,), their standard deviation (of
        the class where they differ most; 0 for one opinion)."""
        return self.combine(opinions.mean(1)).cpu(), opinions.flatten(0, 1).std(0, correction=0).amax(1).cpu()

    def explain(self, images, method="gradcam", target=None, meta=None, boxes=None, **options):
        """Maps (N, L, L) of letterboxed images (N, C, L, L): those of the members, put back where each looked and
        weighted by their votes. See `member_maps`."""
        return sum(self.member_maps(images, method, target, meta, boxes, **options))

    def member_maps(self, images, method="gradcam", target=None, meta=None, boxes=None, **options):
        """Yield the summands of `explain`, one a member. method: of saliency.METHODS or BASELINES; target: class index, (N,),
        or None = the likeliest; boxes: D-Net's, found here if not given."""
        function = {**saliency.METHODS, **saliency.BASELINES}[method]
        with torch.no_grad():
            boxes = self.locate(images) if boxes is None else boxes
            target = self(images, boxes, meta).argmax(1) if target is None else target
        for member, vote in zip(self.members, (self.weights / self.weights.sum()).tolist(), strict=True):
            layer = {"layer": member.layer_of(*CAM_LAYERS[method])} if method in saliency.CAMS else {}
            regions = self.regions(member, boxes)
            x = crop(images, regions, self.info["size"])
            own = function(WithPatients(member, meta), x, target, **layer, **options)
            yield vote * place(own, regions, images.shape[-1])


def familiar(train, val, axes=16):
    """What the traits [(N, D)] of pictures are like, see Answer: for each a mean, the main axes and the variances
    along them and, the last, across them (Tipping & Bishop, Probabilistic PCA, 1999). A few numbers for a model file:
    the spread is that of training, and how much of it is too much is learnt on validation, which no network has fitted."""

    def limit(distances):
        return distances.quantile(0.99).square().clamp(min=1e-6)

    known = []
    for x, held_out in zip(train, val, strict=True):
        kept = min(axes, len(x) // 4, x.shape[1] - 1)
        _, s, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        variances = s.square() / max(1, len(x) - 1) + 1e-9
        rest = variances[kept:].sum() / (x.shape[1] - kept)
        one = {"mean": x.mean(0), "axes": directions[:kept], "variances": torch.cat([variances[:kept], rest[None]])}
        one["variances"] *= limit(distance([held_out], [one]))  # so that the traits weigh alike
        known.append(one)
    joint = limit(distance(val, known))
    return [{k: (v * joint if k == "variances" else v).float().clone() for k, v in one.items()} for one in known]


def distance(traits, known):
    """(N,) Mahalanobis distances of traits [(N, D)], together, to what is `familiar`."""
    total = 0
    for x, one in zip(traits, known, strict=True):
        mean, axes, variances = (one[k].double() for k in ("mean", "axes", "variances"))
        along = (x - mean) @ axes.T
        across = ((x - mean).square().sum(1) - along.square().sum(1)).clamp(min=0)
        total = total + (along.square() / variances[:-1]).sum(1) + across / variances[-1]
    return total.sqrt()


class WithPatients(nn.Module):
    """A C-Net that holds the data (N, M) of its patients: a network of images alone, of N or of k N (k times the N)."""

    def __init__(self, net, meta=None):
        super().__init__()
        self.net, self.patients = net, meta

    def forward(self, images):
        meta = self.patients
        return self.net(images, None if meta is None else meta.repeat(len(images) // len(meta), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Files

FORMAT, VERSION = "miniCADx model", 2


def check_tensors(found, wanted):
    """ValueError unless the state_dict `found` has the tensors of `wanted`, each of its shape and type, and whole: a tensor
    without strides claims more than its file holds, and load_state_dict(assign=True) takes any type."""
    for name, own in wanted.items():
        value = found[name]
        check_memory({name: value})
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(own.shape)} {own.dtype}")
    if more := found.keys() - wanted.keys():
        raise ValueError(f"{min(more, key=str)} has no place")


def save(path, model):
    """One file that suffices to predict. model: Ensemble."""
    content = {"format": FORMAT, "version": VERSION, "weights": model.weights, **model.info}
    for name in ("members", "dnets"):
        content[name] = [{"config": net.config, "state": net.state_dict()} for net in getattr(model, name)]
    if any(isinstance(dnet, VotingDNet) for dnet in model.dnets):  # as version 1 had it: one, of folds always the same
        content["dnet"] = content.pop("dnets")[0]
    save_checkpoint(path, content)


def load_classifier(path, device="cpu"):
    """`load`, for those who need an answer: InputError if the file holds a D-Net alone."""
    model = load(path, device)
    if not len(model.members):
        raise InputError(f"{path}: a D-Net alone, it finds lesions and names none; train without --nets dnet")
    return model


def load(path, device="cpu"):
    """An Ensemble in eval mode from a file of `save`, or from the model.pt of a run folder.

    InputError if it is none, damaged, or of a newer version."""
    path = model_file(path)
    content = read_checkpoint(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a model file of this project (a bare state_dict goes to --weights)")
    version = content.pop("version", None)
    if type(version) is not int or version > VERSION:
        raise InputError(f"{path}: model file of version {version}, this program knows up to {VERSION}; update it")
    try:
        check_info(content)
        old = content.pop("dnet", None)  # version 1 had one, of another design
        dnets = [rebuild(VotingDNet, old)] if old else [rebuild(DNet, d) for d in content.pop("dnets", [])]
        members = [rebuild(CNet, m) for m in content.pop("members")]
        check_familiar(content, members)
        model = Ensemble(members, content.pop("weights").tolist(), dnets, **content)
        check_nets(model)
    except Exception as e:  # anything can stand anywhere
        raise InputError(f"{path}: a model file with parts missing or not fitting ({reason(e)})") from e
    return model.eval().to(device)


def check_info(content):
    """ValueError unless what a model file says of itself can be: it may come from a stranger."""

    def encodes(s):  # see data.encode_meta
        if "levels" in s:
            return type(s["column"]) is str and all(type(level) is str for level in s["levels"])
        return type(s["column"]) is str and math.isfinite(s["mean"]) and 0 < s["sd"] < math.inf

    rules = {
        "classes": lambda v: type(v) is list and len(set(v)) == len(v) > 1 and all(type(c) is str and c for c in v),
        "size": lambda v: type(v) is int and 1 <= v <= 4096,
        "load_size": lambda v: type(v) is int and 1 <= v <= 8192,
        "channels": lambda v: type(v) is int and v in (1, 3),
        "views": lambda v: type(v) is int and 1 <= v <= len(VIEWS),
        "equalise": lambda v: type(v) is bool,
        "window": lambda v: v is None or (len(v) == 2 and -math.inf < v[0] < v[1] < math.inf),
        "temperature": lambda v: type(v) in (int, float) and 0 < v < math.inf,
        **dict.fromkeys(("threshold", "margin", "lesion_threshold"), lambda v: type(v) in (int, float) and 0 <= v < math.inf),
        "meta_spec": lambda v: type(v) is list and all(map(encodes, v)),
        "made": lambda v: type(v) is dict and all(type(part) in (str, int, bool, type(None)) for part in v.values()),
        "seen": lambda v: v.keys() == {"train", "val", "test"} and all(t.dtype == torch.long and t.dim() == 1 for t in v.values()),
    }  # fmt: skip
    for key, fits in rules.items():
        if key in content and not fits(content[key]):
            raise ValueError(f"{key}: {str(content[key])[:60]}")
    if missing := {"classes", "size", "load_size", "channels"} - content.keys():
        raise ValueError(f"no {min(missing)}")


def check_nets(model):
    """ValueError unless the networks of a model file fit one another, its votes, and what it says of itself."""
    info, votes = model.info, model.weights
    known = votes.shape == (len(model.members),) and (votes.isfinite() & (votes >= 0)).all()
    if not known or (len(votes) and not votes.sum() > 0):
        raise ValueError(f"weights: {votes.tolist()} of {len(model.members)} members")
    meta = sum(1 + (len(s["levels"]) if "levels" in s else 1) for s in info["meta_spec"])
    known = {"channels": [info["channels"]], "classes": [len(info["classes"])], "meta": [0, meta]}
    known |= {"normalise": ["image", "fixed"], "roi": ["none", "mask", "dnet"]}
    if not all(0 <= net.config["dropout"] <= 1 for net in model.members):  # nn.Dropout takes NaN
        raise ValueError("dropout is no share")
    for net in (*model.members, *model.dnets):
        for key, fit in known.items():
            if net.config.get(key, fit[-1]) not in fit:
                raise ValueError(f"{key}: {net.config[key]} of a network, not {fit[-1]}")


def check_familiar(info, members):
    """ValueError unless what a file says of familiar pictures, see familiar, fits its members and the texture."""
    if not (known := info.get("familiar")):
        return
    side = min(info["size"], 16)
    widths = [*(m.width for m in members), texture(torch.zeros(1, info.get("channels", 1), side, side)).shape[1]]
    for said, width in zip(known, widths, strict=True):
        mean, axes, variances = said["mean"], said["axes"], said["variances"]
        check_memory(dict(said))
        fits = mean.shape == (width,) and axes.shape == (len(axes), width) and variances.shape == (len(axes) + 1,)
        if not fits or not (variances > 0).all():
            raise ValueError("what is familiar does not fit the members")


def check_memory(tensors):
    """ValueError where one of {name: tensor} has no strides, and claims more than its file holds."""
    for name, value in tensors.items():
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{name} is larger than its memory")


def rebuild(network, saved):
    """A network from its configuration and state. Built without memory first: drawing weights that the state then
    replaces would take longer than the prediction. Older files name D-Net's design, of which one is left; what a file
    says of weights to start from is not followed."""
    with torch.device("meta"):
        net = network(**{k: v for k, v in saved["config"].items() if k not in ("design", "weights")})
    check_tensors(saved["state"], net.state_dict())
    net.load_state_dict(saved["state"], assign=True)
    return net


def model_file(path=None):
    """The file of a --model: itself, or model.pt in a run folder; None: the one under runs/ that was written last."""
    if path:
        return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    found = sorted(Path("runs").glob("**/model.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("no model under runs/: train one (python train.py), or name a file with --model")
    return found[-1]
