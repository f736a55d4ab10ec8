"""What makes answers travel to another hospital's scanners? Changes of BUSI's recipe, each against it in pairs.

    python recipes/scanners.py imagenet data/BUSI data/BUSBRA/bus_data.csv 0 recipe mixstyle amplitudes

The weights to start from, as --weights takes them, two data sets, a seed, and what to try, of TRIALS: each is compared with
the first. Two halves of BUSI by groups (--folds 2), each learnt by one network that sees the whole picture; both together
then look at BUS-BRA, which nothing learns from. One view of a picture. Ten minutes of a core each, 192 px 25; a run that
is there is not made again."""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ridge import BUSBRA

import metrics
import models
import train
from backbones import feature_pyramid
from data import load
from judge import look_at
from report import held_out

RECIPE = "--positive malignant --model mobilenet_v2 --size 128 --epochs 40 --batch 16 --lr 5e-4 --ema 0.99 --dropout 0.3 --folds 2"


def mixed_pyramid(features, x):
    """feature_pyramid that, in half of the steps of training, gives each picture's maps of stride 4 and 8 the means and
    spreads of a mixture with another picture's (MixStyle, Zhou et al. 2021; its alpha)."""
    if not features.training or torch.rand(()) < 0.5:
        return feature_pyramid(features, x)
    layers = [*features]
    layers.insert(7, mix_style)  # after MobileNetV2's last of stride 8
    layers.insert(4, mix_style)  # and of stride 4
    return feature_pyramid(layers, x)


def mix_style(x):
    spread, mean = (v.detach() for v in torch.std_mean(x, (2, 3), keepdim=True))
    share, other = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1, 1)), torch.randperm(len(x))
    new_spread, new_mean = (share * v + (1 - share) * v[other] for v in (spread, mean))
    return (x - mean) / (spread + 1e-6) * new_spread + new_mean


def mixed_amplitudes(*args, augment=train.augment):
    """augment, then half of the pictures take over up to all of another one's spectrum of amplitudes, and keep their
    own phase (Xu et al., A Fourier-based framework for domain generalization, 2021)."""
    x, *rest = augment(*args)
    spectrum, other = torch.fft.rfft2(x), torch.randperm(len(x))
    share = torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
    own = spectrum.abs()
    mixed = torch.polar(own + share * (own[other] - own), spectrum.angle())
    return torch.fft.irfft2(mixed, s=x.shape[-2:]).clamp(0, 1), *rest


class InsideCNet(models.CNet):
    """A C-Net whose deepest map too is pooled by the outline alone."""

    def see(self, images, meta=None):
        if not self.shared:
            return super().see(images, meta)
        maps, merged = self.dnet.pyramid(images)
        found, parts = self.dnet.read(merged[0]), []
        inside = found[0].detach().sigmoid()[:, None]
        for m in (self.attention(maps), merged[0], merged[2]):
            weights = F.adaptive_avg_pool2d(inside, m.shape[-2:]) + 1e-4
            parts.append((m * (weights / weights.sum((2, 3), keepdim=True))).sum((2, 3)))
        return torch.cat(parts, 1), found


TRIALS = {  # name: more options, what is changed in the program
    "recipe": ("", contextlib.nullcontext),
    "mixstyle": ("", lambda: patch.object(models, "feature_pyramid", mixed_pyramid)),
    "amplitudes": ("", lambda: patch.object(train, "augment", mixed_amplitudes)),
    "weighted": ("", lambda: patch.object(models, "CNet", InsideCNet)),
    "smooth": ("--weight-decay 0.2 --label-smoothing 0.2", contextlib.nullcontext),
    "160px": ("--size 160", contextlib.nullcontext),
    "192px": ("--size 192", contextlib.nullcontext),
}


def answers(run, argv, home, elsewhere, cache):
    """{"home", "there": (probabilities, IoU, labels, groups)}, and the AUCs there of each half's network alone."""
    if not (run / "report.json").exists():
        train.main([*argv, *(["--resume", str(run)] if run.exists() else ["--name", run.name])])
    images, pairs = held_out(str(run), home, cache)
    how = {"positive": "malignant", "channels": 1, "columns": BUSBRA, "box_format": "xywh", "cache": cache}
    there, rows = load(elsewhere, pairs[0][0].info["load_size"], **how), torch.cat([rows for _, rows in pairs])
    near = [look_at(model, images, rows, views=1) for model, rows in pairs]
    far = [look_at(model, there, torch.arange(len(there)), views=1) for model, _ in pairs]
    p, boxes = torch.cat([a.opinions[0, 0] for a in near]), torch.cat([a.boxes for a in near])
    q, away = torch.stack([a.opinions[0, 0] for a in far]).mean(0), models.average([a.found for a in far]).boxes()
    order, alone = rows.argsort(), [float(metrics.auc(a.opinions[0, 0, :, 1], there.labels)) for a in far]
    found = {"home": (p[order], metrics.paired_iou(boxes[order], images.boxes[rows[order]]), images.labels[rows[order]], images.groups[rows[order]])}  # fmt: skip
    return found | {"there": (q, metrics.paired_iou(away, there.boxes), there.labels, there.groups)}, alone


def main(weights, home, elsewhere, seed, *trials, cache="runs/cache"):
    first = None
    for name in trials:
        run, (options, change) = Path(f"runs/scanners-{name}-{seed}"), TRIALS[name]
        kept = run / "answers.pt"
        with change():
            if not kept.exists():
                argv = [*RECIPE.split(), *options.split(), "--weights", weights, "--data", home, "--seed", seed]
                torch.save(answers(run, argv, home, elsewhere, cache), kept)
        found, alone = torch.load(kept)
        first = first or found
        told = []
        for place, (p, iou, labels, groups) in found.items():
            before = first[place]
            m = metrics.change_with_intervals((before[0], 0.5, before[1]), (p, 0.5, iou), labels, groups)
            told += [
                "{} {} {after:.3f}, {value:+.3f} [{low:+.3f}, {high:+.3f}]".format(place, k, **m[k])
                for k in ("auc", "iou")
            ]
        print(f"== {name}, seed {seed}: {'; '.join(told)}; AUCs there alone {alone[0]:.3f}, {alone[1]:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
