"""At which maps should Grad-CAM and Layer-CAM look? And how much of the answer of a shared trunk comes from where?

    python recipes/strides.py runs/busi data/BUSI 40      ten minutes of a core

Stages of the backbone, through which all evidence comes, against the maps inside of the outline, which only look so."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from augment import crop
from explain import draw_rows, evaluate, lesion_images, print_table
from report import held_out

STAGE = models.CNet.layer_of
LAYERS = {f"backbone, stride {s}": lambda net, s=s: STAGE(net, s) for s in (8, 16, 32)}
LAYERS |= {f"the same after the next layer's ReLU, stride {s}": lambda net, s=s: STAGE(net, s, True) for s in (8, 16)}
LAYERS |= {f"in the outline, stride {4 * 4**k}": lambda net, k=k: net.dnet.smooth[2 * k] for k in (0, 1)}


@torch.no_grad()
def shares(model, member, images, rows):
    """Of the logit's variance over images: what comes from the pooled deepest map, and from the outline's at 4 and 16."""
    x = images.pixels[rows]
    embeddings = member.embed(crop(x, model.regions(member, model.locate(x)), model.info["size"]))
    widths = [member.dnet.deepest, *[member.dnet.config["width"]] * 2]
    parts = zip(embeddings.split(widths, 1), member.head.weight.split(widths, 1), strict=True)
    parts = torch.cat([part @ weight.T for part, weight in parts], 1)
    total = parts.sum(1)
    return [float(torch.cov(torch.stack([part, total]))[0, 1] / total.var()) for part in parts.T]


def main(run, data, most, cache="runs/cache"):
    images, pairs = held_out(run, data, cache)
    for fold, (model, rows) in enumerate(pairs, 1):
        for member in model.members:
            told = ", ".join(f"{share:.2f}" for share in shares(model, member, images, rows))
            print(f"fold {fold}, {member.config['roi']}: deepest map, outline at stride 4, at 16: {told}")
    pairs = draw_rows(lesion_images(images, pairs), int(most))
    for name, layer in LAYERS.items():
        models.CNet.layer_of = lambda net, *where, layer=layer: layer(net)
        print(f"\n{name}")
        print_table(*evaluate(images, pairs, ["gradcam", "layercam"], log=lambda _: None))


if __name__ == "__main__":
    main(*sys.argv[1:])
