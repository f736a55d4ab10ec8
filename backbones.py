"""Backbones: from a name to features with their weights, to maps at every resolution, and what goes before and after.

features, width = build_backbone("resnet18", channels=1, weights="imagenet")   # or none, or a state_dict file
maps = feature_pyramid(features, standardise(images, "image"))                 # finest first
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from augment import to_float
from files import parts_of, read_checkpoint
from readers import InputError

RESNETS = ["resnet18", "resnet34", "resnet50"]
OTHERS = ["efficientnet_b0", "efficientnet_b1", "densenet121", "convnext_tiny", "mobilenet_v2", "alexnet", "vgg16"]
BACKBONES = ["small_cnn", *RESNETS, *OTHERS]


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


def torchvision_state(name, state):
    """The backbone in the state_dict of a network ("features.0. ...", "dnet.features.0. ..." of a shared trunk) as a
    state_dict with torchvision's own names, which `load_weights` reads. A grey stem is given three channels that sum to
    it."""
    with torch.device("meta"):
        prefixes = list(backbone_parts(name, whole_network(name)))
    own = {}
    for key, value in state.items():
        first, _, rest = key.removeprefix("dnet.").partition(".")
        i, _, rest = rest.partition(".")
        if first == "features" and int(i) < len(prefixes):  # DenseNet's features have a ReLU more
            own[f"{prefixes[int(i)]}.{rest}"] = value.detach().cpu().clone()
    stem = next(k for k, v in own.items() if v.ndim == 4)
    if own[stem].shape[1] == 1:
        own[stem] = own[stem].repeat(1, 3, 1, 1) / 3
    return own


HEADS = ("classifier", "fc")  # of a whole network, which a backbone does not want


def share_weights(backbones, weights):
    """--weights as these backbones take it: one file goes to those that it fits, and that the others start from none is
    said. What is no file, or fits all or none of them, is left as it is."""
    if not Path(weights).is_file():
        return weights
    state, fits = read_state(weights), {}
    for name in [b for b in backbones if b in BACKBONES]:
        with torch.device("meta"):
            own = {n: p for n, p in whole_network(name).named_parameters() if n.split(".")[0] not in HEADS}
        fits[name] = 2 * len(fitting(state, own)) > len(own)  # a first layer alone may fit by chance
    if len(set(fits.values())) < 2:
        return weights
    good, others = (", ".join(name for name in fits if fits[name] is yes) for yes in (True, False))
    print(f"weights {weights}: it fits {good}; from none: {others}")
    return ",".join(f"{name}={weights if fits[name] else 'none'}" for name in fits)


def read_state(path):
    """A state_dict file; of a model file of ours the trunk of its first network. Raises InputError if it is neither."""
    state = read_checkpoint(path, f"--weights {path}")
    if isinstance(state, dict) and "format" in state:
        with parts_of(path, "train it again, or take another"):
            first = [*state["members"], *state.get("dnets", [])][0]
            return torchvision_state(first["config"]["model"], first["state"])
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"--weights {path}: holds no state_dict")
    return {str(k): v for k, v in state.items()}


def fitting(state, own):
    """Those of the tensors {name: tensor} that have a name and a shape in `own`."""
    return {k: v for k, v in state.items() if k in own and isinstance(v, torch.Tensor) and v.shape == own[k].shape}


def load_weights(net, path):
    """Load a state_dict file into `net`, and say what did not fit. Raises InputError if nothing does."""
    state, own = read_state(path), net.state_dict()
    fits = fitting(state, own)
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
        keys = {k for k in keys if k.split(".")[0] not in HEADS}
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


def texture(images):
    """What a picture is like before any network: numbers (N, C + 6) of float images (N, C, S, S). Each channel's mean,
    the contrast, its skewness, and the share of it that lies between neighbours at four resolutions (S < 16: fewer)."""
    mean, spread = images.mean((2, 3)), images.std((1, 2, 3)) + 0.01
    skewness = (((images - mean[:, :, None, None]) / spread[:, None, None, None]) ** 3).mean((1, 2, 3))
    found = [*mean.T, spread.log(), skewness]
    for _ in range(min(4, int(math.log2(images.shape[-1])))):
        steps = images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))
        found.append((steps / spread + 1e-3).log())
        images = F.avg_pool2d(images, 2)
    return torch.stack(found, 1)


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
