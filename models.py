"""Networks: what looks at the pixels. Nothing here knows a data set.

CNet      backbone -> pooled embedding (+ patient data) -> logits       benign or malignant?
DNet      backbone -> feature pyramid -> every cell votes for a box     where is the lesion?
Ensemble  members' probabilities, weighted and calibrated; their disagreement is the uncertainty

model = load("runs/busi/model.pt")            # an Ensemble with its D-Net; the file alone says how to build it
boxes = model.locate(images)                  # (N, 4) in [0, 1], None without a D-Net
probabilities = model(images, boxes)           # (N, K)
"""

import contextlib
import functools
import io
import math
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import saliency
from augment import VIEWS, crop, crop_regions, place, to_float, tta_views
from losses import cell_centres, two_logits
from readers import InputError

RESNETS = ["resnet18", "resnet34", "resnet50"]
OTHERS = ["efficientnet_b0", "efficientnet_b1", "densenet121", "convnext_tiny", "mobilenet_v2", "alexnet", "vgg16"]
BACKBONES = ["small_cnn", *RESNETS, *OTHERS]

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
        torch.Generator(
            device
        )  # as each training needs one; an index too high, or a kind that was not built in, has none
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
# Backbones


def convolution(inputs, outputs, side=3, stride=1, groups=1):
    """The layers of a convolution with BatchNorm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def small_cnn():
    """A CNN of our own, 0.2 million parameters, for small data and small machines. Its convolutions are separable: each
    channel 3x3 by itself, then all 1x1 (Howard et al., MobileNets, 2017): about 1/8 of the work."""
    widths = [(32, 64, 1), (64, 96, 2), (96, 96, 1), (96, 160, 2), (160, 160, 1), (160, 256, 2), (256, 256, 1)]
    blocks = [convolution(3, 32, stride=2)]
    for inputs, outputs, stride in widths:
        blocks.append((*convolution(inputs, inputs, 3, stride, groups=inputs), *convolution(inputs, outputs, 1)))
    return nn.Sequential(*(nn.Sequential(*layers) for layers in blocks))


class Blind(nn.Module):
    """Sees nothing: maps of no channels. What is left of C-Net then is its metadata branch."""

    def forward(self, x):
        return x[:, :0]


def whole_network(name, weights=None):
    """The network of that name, head and all. weights: "DEFAULT" has torchvision download its own."""
    if name == "small_cnn":
        net = nn.Module()
        net.features = small_cnn()
        return net
    import torchvision  # here and not above: small_cnn starts without it

    return torchvision.models.get_model(name, weights=weights)


def backbone_parts(name, net):
    """{their own names in a whole network: the modules} that a backbone is made of."""
    if name in RESNETS:
        return {n: m for n, m in net.named_children() if n not in ("avgpool", "fc")}
    return {f"features.{n}": m for n, m in net.features.named_children()}


def build_backbone(name, channels=3, weights="none"):
    """(features, width): a Sequential from images (N, channels, S, S) to maps (N, width, s, s). "none" sees nothing.

    weights: "none", "imagenet" (torchvision downloads its own), or a file: a state_dict with torchvision's names; or one of
    these for each backbone, as in "resnet18=FILE,mobilenet_v2=none"."""
    if name == "none":
        return nn.Sequential(Blind()), 0
    if name not in BACKBONES:
        raise InputError(f"--model {name}: no such network (there are: {', '.join(BACKBONES)})")
    if "=" in weights and not Path(weights).exists():  # A=W,B=W: each backbone its own
        chosen = dict(pair.partition("=")[::2] for pair in weights.split(","))
        if name not in chosen:
            raise InputError(f"--weights {weights}: says nothing of {name}; add {name}=FILE, imagenet or none")
        weights = chosen[name]
    if (name, weights) == ("small_cnn", "imagenet"):
        why = "small_cnn is our own, torchvision has no weights for it; use none or a file"
        raise InputError(f"--weights imagenet: {why}")
    try:
        net = whole_network(name, "DEFAULT" if weights == "imagenet" else None)
    except OSError as e:
        raise InputError(f"--weights imagenet: download failed ({e}); give --weights FILE, or none") from e
    if weights not in ("none", "imagenet"):
        load_weights(net, weights)
    features = nn.Sequential(*backbone_parts(name, net).values())
    if name == "densenet121":
        features.append(nn.ReLU())  # torchvision's own has it outside of its features
    width = [m.weight.shape[0] for m in features.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][-1]
    if channels == 1:
        fold_stem(features)
    elif channels != 3:
        raise InputError(f"images of {channels} channels: only 1 (grey) and 3 (colour) are known")
    return features, width


def fold_stem(features):
    """Let an RGB network take grey images: sum the first convolution's weights over its input channels.

    A grey image copied three times meets w_r*x + w_g*x + w_b*x = (w_r + w_g + w_b)*x: the same output for a third of
    the input, and no copy is made."""
    name, conv = next((n, m) for n, m in features.named_modules() if isinstance(m, nn.Conv2d))
    grey = nn.Conv2d(1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)
    grey.weight, grey.bias = nn.Parameter(conv.weight.detach().sum(1, keepdim=True)), conv.bias
    features.set_submodule(name, grey)


def torchvision_state(name, features):
    """The state of a backbone as a state_dict with torchvision's own names, which `load_weights` reads. A grey stem
    is given three channels that sum to it."""
    with torch.device("meta"):
        prefixes = backbone_parts(name, whole_network(name))
    parts = zip(prefixes, features, strict=False)  # DenseNet's features have a ReLU more
    state = {f"{prefix}.{k}": v.detach().cpu().clone() for prefix, part in parts for k, v in part.state_dict().items()}
    stem = next(k for k, v in state.items() if v.ndim == 4)
    if state[stem].shape[1] == 1:
        state[stem] = state[stem].repeat(1, 3, 1, 1) / 3
    return state


def load_weights(net, path):
    """Load a state_dict file into `net`, and say what did not fit. Raises InputError if nothing does."""
    state = read_checkpoint(path, f"--weights {path}")
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"--weights {path}: holds no state_dict")
    own, state = net.state_dict(), {str(k): v for k, v in state.items()}
    fits = {k: v for k, v in state.items() if k in own and isinstance(v, torch.Tensor) and v.shape == own[k].shape}
    for name, value in fits.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or not value.isfinite().all():
            raise InputError(f"--weights {path}: {name} holds NaN, infinity, or no plain numbers; take another file")
    if not fits:
        names = f"first: {next(iter(state))}; wanted: {next(iter(own))}"
        raise InputError(f"--weights {path}: not one of its {len(state)} tensors fits this network ({names})")
    net.load_state_dict(fits, strict=False)
    misfits = {
        "missing in the file": own.keys() - fits.keys(),
        "in the file but not fitting": state.keys() - fits.keys(),
    }
    for what, keys in misfits.items():
        keys = {k for k in keys if k.split(".")[0] not in ("classifier", "fc")}  # the head is not wanted
        if keys:
            print(f"weights {path}: {len(keys)} {what}: {', '.join(sorted(keys)[:4])}{' ...' if len(keys) > 4 else ''}")


def feature_pyramid(features, x):
    """Run a Sequential and keep its last map at each resolution, finest first."""
    maps = []
    for layer in features:
        x = layer(x)
        if maps and maps[-1].shape[-2:] == x.shape[-2:]:
            maps.pop()
        maps.append(x)
    return maps


def standardise(images, normalise):
    """First step of every network, so that nobody can forget it. images: uint8, or float in [0, 1], (N, C, S, S).

    "image": by each image's own mean and spread, which takes out the scanner's gain; "fixed": the same for all,
    for colours that mean something (stains, skin)."""
    x = to_float(images)
    if normalise == "fixed":
        return (x - 0.45) / 0.226
    spread, mean = torch.std_mean(x, (1, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (spread + 0.02)  # 0.02: a blank image stays blank instead of becoming amplified noise


# ---------------------------------------------------------------------------------------------------------------------
# Attention: what a network may put between backbone and pooling. All start as the identity, or close to it


class SqueezeExcitation(nn.Module):
    """A gate in (0, 2) for each channel, from the pooled map (Hu et al., Squeeze-and-Excitation Networks, 2018)."""

    def __init__(self, width, reduction=16):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, width // reduction), nn.ReLU(), nn.Linear(width // reduction, width))
        nn.init.zeros_(self.gate[-1].weight)
        nn.init.zeros_(self.gate[-1].bias)

    def forward(self, maps):
        return maps * (2 * self.gate(maps.mean((2, 3))).sigmoid())[:, :, None, None]


class AttentionCondenser(nn.Module):
    """Attention over places and channels jointly, on a condensed map (Wong et al., TinySpeech, 2020; the Cancer-Net
    family): condense by max-pooling, embed by a grouped and a pointwise convolution, expand to the full map again, and
    weigh the input by that: V + s * V * sigmoid(A), s learnt."""

    def __init__(self, width, reduction=8, groups=8):
        super().__init__()
        middle = max(groups, width // reduction // groups * groups)
        self.embed = nn.Sequential(
            nn.Conv2d(width, middle, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(middle, middle, 1), nn.ReLU()
        )
        self.expand = nn.Conv2d(middle, width, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, maps):
        condensed = F.max_pool2d(maps, 2, ceil_mode=True)
        attention = F.interpolate(self.expand(self.embed(condensed)), size=maps.shape[-2:], mode="nearest")
        return maps + self.scale * maps * attention.sigmoid()


ATTENTION = {"none": nn.Identity, "se": SqueezeExcitation, "condenser": AttentionCondenser}

# ---------------------------------------------------------------------------------------------------------------------
# C-Net: benign or malignant?


class CNet(nn.Module):
    """Classifier. Two classes: one logit (N, 1), of the positive class; K classes: K logits (N, K).

    meta: number of metadata columns, 0 for images alone. attention: of ATTENTION, before the pooling. roi: "none" if it
    was trained on whole images, "mask" or "dnet" if on crops. `config` holds the arguments that build it again."""

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
    ):
        super().__init__()
        if model == "none" and not meta:
            raise InputError("--model none sees no image; it needs patient data, --meta-columns")
        self.config = {"model": model, "classes": classes, "channels": channels, "meta": meta, "dropout": dropout}
        self.config |= {"normalise": normalise, "roi": roi, "attention": attention}
        self.features, self.width = build_backbone(model, channels, weights)
        self.attention = ATTENTION[attention](self.width)
        if meta:
            self.meta = nn.Sequential(nn.Linear(meta, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.width += 32
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.width, 1 if classes == 2 else classes)
        nn.init.zeros_(self.head.bias)

    def embed(self, images, meta=None):
        """Penultimate embedding (N, width): pooled features, and the metadata branch where there is one."""
        return self.pool(self.features(standardise(images, self.config["normalise"])), meta)

    def pool(self, maps, meta=None):
        """The embedding (N, width) of feature maps (N, C, h, w)."""
        x = self.attention(maps).mean((2, 3))
        if not self.config["meta"]:
            return x
        if meta is None:
            raise InputError("this model was trained with patient metadata: give it")
        return torch.cat([x, self.meta(meta)], 1)

    def classify(self, embeddings):
        return self.head(self.dropout(embeddings))

    def forward(self, images, meta=None):
        return self.classify(self.embed(images, meta))


def to_probabilities(logits):
    """(N, 1) logits of the positive class, or (N, K): probabilities (N, 2) or (N, K), in float32."""
    return two_logits(logits.float()).softmax(1)


def finite(values):
    """What networks answered, if it is numbers: a training that diverges can end in NaN though its loss was one."""
    if not values.isfinite().all():
        raise InputError("the network's answers are not finite: try a lower --lr; or its model file is damaged")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# D-Net: where is the lesion?


class DNet(nn.Module):
    """Detector of the one lesion: images (N, C, S, S) -> boxes (N, 4), x_min < x_max and y_min < y_max in [0, 1].

    The three coarsest maps are merged top-down (Lin et al., FPN, 2017); every cell of the finest predicts its distances
    to the four sides (Tian et al., FCOS, 2019) and a score, and the box is the mean of all votes under the softmax of
    the scores. It is differentiable, needs no anchors, and knows WHERE each feature is."""

    def __init__(self, model="mobilenet_v2", channels=1, normalise="image", weights="none", width=96):
        super().__init__()
        self.config = {"model": model, "channels": channels, "normalise": normalise, "width": width}
        self.features, _ = build_backbone(model, channels, weights)
        with torch.no_grad():  # the maps' widths, by a look
            maps = feature_pyramid(self.features.eval(), torch.zeros(1, channels, 128, 128))[-3:]
        self.features.train()
        self.lateral = nn.ModuleList(nn.Conv2d(m.shape[1], width, 1) for m in maps)
        self.head = nn.Sequential(*convolution(width, width), *convolution(width, width), nn.Conv2d(width, 5, 1))
        nn.init.normal_(self.head[-1].weight, std=0.01)
        nn.init.constant_(self.head[-1].bias, -1.3)  # softplus(-1.3) = 0.24: the first boxes are about half the image

    def vote(self, images):
        """Every cell's box (N, 4, h, w) and the log of its weight in the mean (N, h, w)."""
        maps = feature_pyramid(self.features, standardise(images, self.config["normalise"]))[-3:]
        *finer, merged = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for finer_map in reversed(finer):
            merged = finer_map + F.interpolate(merged, size=finer_map.shape[-2:], mode="nearest")
        out = self.head(merged).float()
        n, _, h, w = out.shape
        reach = 1e-3 + F.softplus(out[:, 1:])  # left, top, right, bottom of the cell's centre: always positive
        x, y = cell_centres(h, w, out.device)
        boxes = torch.stack([x - reach[:, 0], y - reach[:, 1], x + reach[:, 2], y + reach[:, 3]], 1)
        return boxes, out[:, 0].flatten(1).log_softmax(1).view(n, h, w)

    def forward(self, images):
        boxes, log_weights = self.vote(images)
        return (boxes * log_weights.exp()[:, None]).sum((2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The whole model: members, D-Net, and everything that predicting needs


class Ensemble(nn.Module):
    """Weighted mean of the members' probabilities, softened by one temperature. One member is the common case.

    info: "classes", "size" (what C-Net and D-Net see), "load_size" (what the file is letterboxed to), "channels",
    "equalise" (CLAHE), "margin" of the crops, "meta_spec", "temperature", "threshold" and the "views" of an image that
    both were set for, "made"."""

    def __init__(self, members, weights=None, dnet=None, **info):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.dnet = dnet
        self.weights = torch.tensor([1.0] * len(members) if weights is None else weights, dtype=torch.float32)
        usual = {"temperature": 1.0, "threshold": 0.5, "views": 1, "margin": 0.25, "equalise": False}
        self.info = usual | {"meta_spec": [], "made": {}} | info

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def needs_boxes(self):
        """Whether a member sees crops around boxes that nobody here finds: the caller has to give them."""
        return self.dnet is None and any(m.config["roi"] != "none" for m in self.members)

    def locate(self, images, known=None):
        """The lesions' boxes (N, 4) in [0, 1] by D-Net; without one those that are `known`, if they are needed, or None."""
        if self.dnet is None:
            return known if self.needs_boxes else None
        return self.dnet(crop(images, None, self.info["size"])).clamp(0, 1)

    def regions(self, member, boxes):
        """Where a member looks: the crops (N, 4) around the boxes if it was trained on crops, None = the whole."""
        if member.config["roi"] == "none":
            return None
        if boxes is None:  # a network of crops would answer on whole pictures, and wrongly
            raise InputError(
                "this model sees crops around the lesion: it needs boxes, or a D-Net (train with --roi dnet)"
            )
        return crop_regions(boxes, self.info["margin"])

    def member_probabilities(self, images, boxes=None, meta=None, look=crop, scale=1.0):
        """(M, N, K) probabilities, each member by itself, before the temperature.

        boxes (N, 4): what the crops are made around. look(images, regions, size): what a member gets to see; more
        views than one are a larger N. scale: of the size."""
        size = round(self.info["size"] * scale)
        looks = (look(images, self.regions(m, boxes), size) for m in self.members)
        return torch.stack([to_probabilities(m(x, meta)) for m, x in zip(self.members, looks, strict=True)])

    def combine(self, probabilities):
        """(M, N, K) -> (N, K): weighted mean, then the temperature: p^(1/T), which for one member is logits / T."""
        weights = (self.weights / self.weights.sum()).to(probabilities.device)
        mean = (probabilities * weights[:, None, None]).sum(0)
        return ((mean + 1e-12).log() / self.info["temperature"]).softmax(1)

    def forward(self, images, boxes=None, meta=None):
        """Probabilities (N, K): the answer, from as many views as it was calibrated for."""
        return self.combine(self.opinions(images, boxes, meta).mean(1))

    def opinions(self, images, boxes=None, meta=None, views=None, scales=(1.0,)):
        """Probabilities (M, V, N, K): of every member, of every view at every scale (V), of every image. `conclude`
        makes one answer of them."""
        views = views or self.info["views"]
        meta = None if meta is None else meta.repeat(views, 1)
        look = crop if views == 1 else functools.partial(tta_views, views=views)
        found = [self.member_probabilities(images, boxes, meta, look, scale) for scale in scales]
        return torch.cat([p.unflatten(1, (views, len(images))) for p in found], 1)

    def conclude(self, opinions):
        """From opinions (M, V, N, K): calibrated probabilities (N, K), and the uncertainty (N,), their standard deviation (of
        the class where they differ most; 0 for one opinion)."""
        return self.combine(opinions.mean(1)).cpu(), opinions.flatten(0, 1).std(0, correction=0).amax(1).cpu()

    def explain(self, images, method="gradcam", target=None, meta=None, boxes=None, **options):
        """Maps (N, L, L) of letterboxed images (N, C, L, L): those of the members, put back where each looked and
        weighted by their votes. See `member_maps`."""
        return sum(self.member_maps(images, method, target, meta, boxes, **options))

    def member_maps(self, images, method="gradcam", target=None, meta=None, boxes=None, **options):
        """The summands of `explain`, one a member. method: of saliency.METHODS or BASELINES; target: class index, (N,),
        or None = the likeliest; boxes: D-Net's, found here if not given."""
        function, maps = {**saliency.METHODS, **saliency.BASELINES}[method], []
        with torch.no_grad():
            boxes = self.locate(images) if boxes is None else boxes
            target = self(images, boxes, meta).argmax(1) if target is None else target
        for member, vote in zip(self.members, (self.weights / self.weights.sum()).tolist(), strict=True):
            layer = {"layer": member.features} if method in saliency.CAMS else {}
            regions = self.regions(member, boxes)
            x = crop(images, regions, self.info["size"])
            own = function(WithPatients(member, meta), x, target, **layer, **options)
            maps.append(vote * place(own, regions, images.shape[-1]))
        return maps


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

FORMAT, VERSION = "miniCADx model", 1


def write_atomically(path, data):
    """Write bytes beside `path`, then move them over it: a kill at any moment leaves a whole file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):  # its folder may be none
            part.unlink()
        advice = "what was there before is whole; make room and try again"
        raise InputError(f"{path} can't be written ({e.strerror or e}); {advice}") from e


def save_checkpoint(path, content):
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path, what=None):
    """torch.load(weights_only=True) on the CPU. InputError in one line, of `what` (the path), when it is missing or no
    such file."""
    what = what or path
    if not Path(path).is_file():
        raise InputError(f"{what}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats and odd tensors: what is read is checked by who asked
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler raises whatever comes to its mind on broken files
        raise InputError(f"{what}: not a PyTorch file, or damaged, or it holds more than tensors ({reason(e)})") from e


def reason(error):
    """The first line of an exception, or its kind, for an InputError that stands for it."""
    return next(iter(str(error).splitlines()), "")[:100] or type(error).__name__


@contextlib.contextmanager
def parts_of(path, advice):
    """What a file of ours holds is looked at in here: what is missing or of another kind was damaged there, and the
    InputError says so, with advice."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # anything can stand anywhere
        raise InputError(f"{path}: damaged, parts are missing or do not fit ({reason(e)}); {advice}") from e


def check_tensors(found, wanted):
    """ValueError unless the state_dict `found` has the tensors of `wanted`, each of its shape and type, and whole: a tensor
    without strides claims more than its file holds, and load_state_dict(assign=True) takes any type."""
    for name, own in wanted.items():
        value = found[name]
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{name} is larger than its memory")
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(own.shape)} {own.dtype}")
    if more := found.keys() - wanted.keys():
        raise ValueError(f"{min(more, key=str)} has no place")


def save(path, model):
    """One file that suffices to predict. model: Ensemble."""
    content = {"format": FORMAT, "version": VERSION, "weights": model.weights, **model.info}
    nets = [net and {"config": net.config, "state": net.state_dict()} for net in (*model.members, model.dnet)]
    save_checkpoint(path, content | {"members": nets[:-1], "dnet": nets[-1]})


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
        dnet, members = content.pop("dnet"), [rebuild(CNet, m) for m in content.pop("members")]
        model = Ensemble(members, content.pop("weights").tolist(), dnet and rebuild(DNet, dnet), **content)
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
        "temperature": lambda v: type(v) in (int, float) and 0 < v < math.inf,
        **dict.fromkeys(("threshold", "margin"), lambda v: type(v) in (int, float) and 0 <= v < math.inf),
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
    for net in (*model.members, *([model.dnet] if model.dnet else [])):
        for key, fit in known.items():
            if net.config.get(key, fit[-1]) not in fit:
                raise ValueError(f"{key}: {net.config[key]} of a network, not {fit[-1]}")


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
