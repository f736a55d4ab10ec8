"""Learning without labels: a backbone that knows the images before anyone has labelled one, SimCLR or BYOL.

    python pretrain.py --data FOLDER --method byol                           any layout that data.py reads; minutes to hours
    python train.py --data FOLDER --weights runs/pretrain-FOLDER-small_cnn/backbone.pt

Two augmentations of one image should be embedded alike. SimCLR also pushes all other images away; BYOL has a slowly
moving copy of itself as its target instead. No label is learnt from, and images of the test split are left out, so that
a test stays one (with the same --data, --positive, --drop-class and --seed, and without --folds). What is saved is a
state_dict with torchvision's own names: a file for --weights."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import options
import train
from backbones import BACKBONES, build_backbone, standardise, torchvision_state
from devices import everyone, near, world
from files import save_checkpoint
from models import choose_device
from readers import InputError


class Projected(nn.Module):
    """Backbone, pooling and projector: images (N, C, S, S) to (N, 128)."""

    def __init__(self, model, channels, normalise, weights):
        super().__init__()
        self.normalise = normalise
        self.features, width = build_backbone(model, channels, weights)
        self.projector = mlp(width, 2 * width, 128)

    def forward(self, images):
        return self.projector(self.features(standardise(images, self.normalise)).mean((2, 3)))


def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class SimCLR(nn.Module):
    """Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020."""

    def __init__(self, args, **options):
        super().__init__()
        self.online, self.temperature = Projected(args.model, **options), args.temperature

    def loss(self, a, b):
        loss = nt_xent(*map(everyone, (self.online(a), self.online(b))), self.temperature)
        return world() * loss - (world() - 1) * loss.detach()  # each process has the gradient of its own images alone


def nt_xent(a, b, temperature):
    """Normalised temperature-scaled cross-entropy of two views' projections (N, D): each of the 2 N has to find its
    other view among the 2 N - 1 others."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(a)))


class BYOL(nn.Module):
    """Grill et al., Bootstrap Your Own Latent, 2020: predict, from one view, what a moving average of oneself makes of
    the other view."""

    def __init__(self, args, **options):
        super().__init__()
        self.online, self.decay = Projected(args.model, **options), args.decay
        self.predictor = mlp(128, 256, 128)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def loss(self, a, b):
        train.update_average(self.target, self.online, self.decay)  # of the weights as the last step left them
        one = regression(self.predictor(self.online(a)), self.target(b))
        return (one + regression(self.predictor(self.online(b)), self.target(a))) / 2


def regression(predicted, target):
    """Mean squared distance of the normalised vectors (N, D): 2 - 2 cos."""
    return (2 - 2 * F.cosine_similarity(predicted.float(), target.float())).mean()


METHODS = {"simclr": SimCLR, "byol": BYOL}
PRETRAIN = {
    "data": options.DATA,
    "model": [
        ("model", "small_cnn", "NAME", f"backbone: {', '.join(BACKBONES)}"),
        ("weights", "none", "W", "start from none, imagenet, or a state_dict file"),
        ("normalise", "auto", ["auto", "image", "fixed"], "as train.py, and the same there"),
    ],
    "learning": [
        ("method", "simclr", list(METHODS), "what two views of an image are asked for"),
        ("temperature", 0.2, (1e-6, 100), "of simclr's softmax"),
        ("decay", 0.99, (0, 1), "of byol's target, a moving average of the network"),
        *options.OPTIMISER,
        ("seed", 0, (0, 2**31), "of the split, weights, shuffling and augmentation"),
    ],
    "run": options.RUN,
}


def build_parser():
    p = options.build_parser(PRETRAIN, __doc__.split("\n\n")[0])
    p.set_defaults(epochs=100, batch=64, lr=1e-3, ema=0.0, patience=0, roi="none", ensemble=None, nets="cnet")
    return p


def main(argv=None):
    args = options.parse(argv, build_parser())
    device = choose_device(args.device)
    if args.model == "none":
        raise InputError("--model none has nothing to learn")
    images = options.load_images(args)
    train.check_networks(images, args)
    rows = torch.tensor([i for i, split in enumerate(images.splits) if split != "test"])
    torch.manual_seed(args.seed)
    net = METHODS[args.method](args, **train.network_options(images, args))
    folder = options.prepare_folder(args, images, "pretrain-")
    print(f"run folder: {folder}; {len(rows)} images, the test split left out")
    images.pixels, same = near(images.pixels, device), {"name": args.method, "folder": folder, "seed": args.seed}

    def loss_of(net, x, boxes, masks, index):
        return net.loss(*x.chunk(2))

    try:
        with options.claim(folder, not args.resume), options.Interrupt():
            best, history = train.fit(net, images, rows, loss_of, None, args, views=2, **same)
    except (options.Stopped, KeyboardInterrupt):
        options.stop("pretrain.py", folder)
    net.load_state_dict(best)
    save_checkpoint(folder / "backbone.pt", torchvision_state(args.model, net.online.state_dict()))
    print(f"\n{folder / 'backbone.pt'}: loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}")
    print(f"then: python train.py --model {args.model} --weights {folder / 'backbone.pt'} ...")


if __name__ == "__main__":
    options.run_main(main)
