"""All tests: `pytest test_all.py`, eight minutes on two CPU cores, no data needed; `-k "not slow"`: fewer.

Against independent oracles (counting pairs, brute force, loops over pixels, uninterrupted runs), on awkward inputs,
and through the command lines. With DATA=/path/to/data the real files are read too (breastmnist.npz, BUSI/, IDC/,
HAM10000/). The order is that of the house, from the ground floor up; then the faults that strangers found."""

import argparse
import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: for tiny networks a second thread costs more than it brings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import al_loop
import answers
import app
import augment
import backbones
import bench
import clips
import data
import devices
import explain
import export
import files
import grouping
import heads
import infer
import judge
import losses
import metrics
import models
import person
import phantoms
import plots
import pretrain
import query
import readers
import report
import saliency
import search
import service
import train
import transfer
from options import check_against, load_images, parse, prepare_folder, run_jobs, run_main
from pictures import Origin, origin, read_frames
from readers import InputError
from report import clean

HERE = Path(__file__).parent
DATA = Path(os.environ["DATA"]) if os.environ.get("DATA") else None
needs_data = pytest.mark.skipif(DATA is None, reason="real data: set DATA to its folder")


def run(*command, **more):
    """A command line as a user calls it."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=600, **more
    )


@pytest.fixture(scope="session", autouse=True)
def stranger(request, tmp_path_factory):
    """`python train.py`, letter by letter, which a stranger runs first: on the second core, beside the other tests."""
    if not any("phantom_run" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder, pipe = tmp_path_factory.mktemp("stranger"), subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, HERE / "train.py"], cwd=folder, stdout=pipe, stderr=pipe, text=True
    ) as first:
        yield folder, first
        first.kill()


def call(script, *options):
    """The same in this process, with its exit code, for what a fresh one would not prove better: torch alone takes
    seconds to start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(lambda: script.main([str(o) for o in options]))
        except SystemExit as e:
            code = e.code
    return subprocess.CompletedProcess(options, code, out.getvalue(), err.getvalue())


def error_of(result):
    """The one line on stderr of a command that the user got wrong."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def picture(width=60, height=40, seed=0, mode="L"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    # smooth, so that a thumbnail of it keeps its content
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, *shape[2:]), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder, counts=None, width=60, height=40):
    """CLASS/i.png with a bright or dark blob that tells the class, and masks."""
    seed = 0
    for name, count in (counts or {"benign": 12, "malignant": 8}).items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            image, mask = picture(width, height, seed), Image.new("L", (width, height))
            if name != "normal":
                box = [10 + seed % 9, 8 + seed % 7, 30 + seed % 9, 24 + seed % 7]
                ImageDraw.Draw(mask).ellipse(box, fill=255)
                ImageDraw.Draw(image).ellipse(box, fill=250 if name == "malignant" else 5)
            image.save(folder / name / f"{name} ({i + 1}).png")
            mask.save(folder / name / f"{name} ({i + 1})_mask.png")
    return folder


def quiet_load(*args, **kwargs):
    return data.load(*args, **{"cache": None, "log": lambda _: None, **kwargs})


# ---------------------------------------------------------------------------------------------------------------------
# augment.py, losses.py, phantoms.py

GREY, BOX = torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.tensor([[0.1, 0.2, 0.6, 0.7]] * 2)
HALF = [torch.float16, torch.bfloat16]
PARTS = [name for name, value in vars(augment).items() if isinstance(value, float)]  # what strength 1 means


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def boxes_of(masks):
    """The boxes of masks (N, H, W), in [0, 1]."""
    return (torchvision.ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])) / torch.tensor(masks.shape[:0:-1] * 2)


def lesions(n, h, w):
    """Bright ellipses on black, uint8 (n, 1, h, w), and their boxes."""
    draws = torch.rand(n, 2, 2, generator=seeded())
    centre, radius = 0.35 + 0.3 * draws[:, 0], 0.08 + 0.12 * draws[:, 1]
    pixel = torch.stack(torch.meshgrid(*((torch.arange(s) + 0.5) / s for s in (w, h)), indexing="xy"), 2)
    inside = ((pixel - centre[:, None, None]) / radius[:, None, None]).square().sum(3) < 1
    return inside[:, None].to(torch.uint8) * 255, torch.cat([centre - radius, centre + radius], 1)


def switch_off(monkeypatch, *kept):
    for name in set(PARTS) - set(kept):
        monkeypatch.setattr(augment, name, 0.0)


def test_warp_and_crop_are_slicing_outside_is_the_mean_and_regions_are_square():
    x = torch.rand(2, 2, 32, 64) * 7 - 3  # any floats
    odd, whole = x[:, :, :17, :23], augment.region_matrices(torch.tensor([[0.0, 0, 1, 1]] * 2))
    close(augment.warp(odd, whole, None), odd, 5e-5)
    close(augment.warp(odd, whole * torch.tensor([-1.0, 1, 1]), None), odd.flip(3), 5e-5)
    out = augment.crop(x, torch.tensor([[0.25, 0.5, 0.5, 0.75], [-0.5, -0.5, 0.0, 0.0]]), (8, 16))
    close(out[0], x[0, :, 16:24, 16:32], 5e-5)
    close(out[1], x[1].mean((1, 2))[:, None, None].expand(2, 8, 16))
    pixels = (x * 30).to(torch.uint8)
    assert torch.equal(augment.crop(pixels, None, (32, 64)), pixels / 255)
    boxes = torch.tensor([[0.2, 0.4, 0.6, 0.5], [math.nan] * 4, [0.5, 0.5, 0.5, 0.5]])
    expected = torch.tensor([[0.1, 0.15, 0.7, 0.75], [0, 0, 1, 1], [0.4625, 0.4625, 0.5375, 0.5375]])
    close(augment.crop_regions(boxes, margin=0.25), expected)


def test_maps_of_crops_are_put_back_where_they_were_cut():
    maps, regions = torch.rand(2, 40, 60), torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.5, 0.0, 1.0, 0.5]])
    crops = augment.cut(maps, regions, (20, 30))
    close(crops[0], maps[0, 10:30, 15:45], 1e-4)
    back = augment.place(crops, regions, (40, 60))
    close(back[0, 11:29, 16:44], maps[0, 11:29, 16:44], 1e-4)
    assert not back[0, :9].any()
    assert not back[1, 22:].any()
    assert torch.equal(augment.place(maps, None, None), maps)
    assert augment.cut(maps, torch.tensor([[0.4, 0.2, 0.4, 0.8]] * 2), 8).isfinite().all()  # a box of no width


def test_blur_is_a_gaussian_of_each_images_own_sigma():
    x, sigma, t = torch.zeros(2, 2, 21, 25), torch.tensor([0.7, 1.3]), torch.arange(-4, 5)
    x[:, :, 10, 12] = 1
    line = torch.exp(-(t**2) / (2 * sigma[:, None] ** 2))
    kernel = line[:, :, None] * line[:, None]
    close(augment.blur(x, sigma)[:, 1, 6:15, 8:17], kernel / kernel.sum((1, 2), keepdim=True), 1e-6)


@pytest.mark.parametrize("crop_first", [False, True])
@pytest.mark.parametrize("shape", [(96, 96), (64, 128)])
def test_boxes_follow_the_augmented_lesion(monkeypatch, crop_first, shape):
    switch_off(monkeypatch, "ROTATE", "SCALE", "SHIFT", "ELASTIC")
    pixels, boxes = lesions(64, *shape)
    regions = augment.crop_regions(boxes, 1.0) if crop_first else None
    masks = pixels[:, 0] > 99
    out, moved, outlines = augment.augment(pixels, 1.0, boxes, regions, generator=seeded(), masks=masks)
    assert out.shape == pixels.shape
    found = boxes_of(out[:, 0] > 0.6)  # the background is no longer black (the bars are the mean), but far below
    assert metrics.paired_iou(boxes_of(outlines > 0.5), found).median() > 0.95
    iou = metrics.paired_iou(found, moved)
    assert iou.nanmedian() > 0.92
    assert iou[iou.isfinite()].min() > 0.6
    still = augment.move_boxes(boxes, augment.base_matrices(pixels, regions))
    assert metrics.paired_iou(found, still).mean() < iou.mean() - 0.1  # and the images did move


def test_several_masks_an_image_move_as_each_by_itself():
    pixels, boxes = lesions(6, 40, 56)
    masks = torch.stack([pixels[:, 0] > 99, torch.rand(6, *pixels.shape[2:]) > 0.8], 1)
    both = augment.augment(pixels, 1.0, boxes, None, (32, 48), seeded(), masks)
    for m in (0, 1):
        alone = augment.augment(pixels, 1.0, boxes, None, (32, 48), seeded(), masks[:, m])
        assert torch.equal(both[2][:, m], alone[2])
        assert torch.equal(both[0], alone[0])
    assert both[2].shape == (6, 2, 32, 48)
    for wrong in (masks[:, :, 1:], masks[1:], masks[:, :0], masks[0, 0], masks[:, :, None]):
        with pytest.raises(ValueError, match="masks of shape"):
            augment.augment(pixels, 1.0, boxes, masks=wrong)


def test_a_lesion_that_leaves_the_picture_is_not_taught():  # 28
    boxes = torch.tensor([[0.0, 0.4, 0.2, 0.6], [0.4, 0.4, 0.6, 0.6], [0.9, 0.9, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    shifted = torch.eye(2, 3).repeat(4, 1, 1)
    shifted[:, 0, 2] = 0.36  # 0.18 of the width to the left
    moved = augment.move_boxes(boxes, shifted)
    close(moved[1:], boxes[1:] - torch.tensor([0.18, 0, 0.18, 0]))
    assert moved[0].isnan().all()
    assert not losses.ellipses(moved, 9, 9)[0].any()


def test_what_is_not_square_turns_without_shear(monkeypatch):
    """The second moments of a bar, in pixels, stay its own whatever its angle, in every aspect ratio."""
    switch_off(monkeypatch)
    monkeypatch.setattr(augment, "ROTATE", 45.0)
    for h, w in ((64, 128), (128, 64), (96, 96)):
        y, x = torch.arange(h)[:, None] + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2
        bar = ((x.abs() < 24) & (y.abs() < 4)).to(torch.uint8).mul(255).expand(16, 1, h, w)
        for mask in augment.augment(bar, 1.0, generator=seeded())[0][:, 0] > 0.6:
            spread = torch.linalg.eigvalsh(torch.cov(torch.nonzero(mask).float().T)).sqrt()
            torch.testing.assert_close(spread, torch.tensor([8.0, 48.0]) / 12**0.5, atol=0.4, rtol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_resamples_once_is_seeded_and_stays_in_range(monkeypatch, channels):
    calls, sample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    pixels, boxes = lesions(16, 48, 80)
    pixels = pixels.expand(-1, channels, -1, -1)
    out, _, masks = augment.augment(pixels, 2.0, generator=seeded(3), masks=pixels[:, 0] > 99)
    assert (len(calls), out.dtype, masks.shape) == (1, torch.float32, (16, 48, 80))
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(out, augment.augment(pixels / 255, 2.0, generator=seeded(3))[0])  # floats are the same images
    assert not torch.equal(out, augment.augment(pixels, 2.0, boxes, generator=seeded(4))[0])
    none, unmoved, masks = augment.augment(pixels, 0, boxes, masks=pixels[:, 0] > 99)
    close(masks, (pixels[:, 0] > 99).float())
    close(none, pixels / 255)
    close(unmoved, boxes)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_augmentation_does_something(monkeypatch, part):
    pixels = torch.randint(60, 190, (24, 3 if "STAIN" in part else 1, 64, 96), generator=seeded()).to(torch.uint8)
    mirrored, changes = [(pixels / 255).flip(dims) for dims in ((), (3,), (2,), (2, 3))], []
    for kept in ((), (part,)):
        with monkeypatch.context() as m:
            switch_off(m, *kept)
            out = augment.augment(pixels, 1.0, generator=seeded())[0]
        changes.append(torch.stack([(out - x).abs().mean((1, 2, 3)) for x in mirrored]).amin(0))
    assert changes[0].max() < 1e-3  # all off: the image or its mirror image
    assert (changes[1] > 1e-3).sum() >= 3


def test_the_elastic_part_moves_what_its_comment_says():
    """In shares of the side: never above ELASTIC along an axis, 0.012 as root mean square, in both aspect ratios."""
    base, ratio = torch.eye(2, 3).expand(1000, 2, 3), torch.ones(1000)
    moved = augment.random_displacement(base, ratio, (48, 80), 1.0, seeded()) / 2  # the grid's side is 2
    assert moved.shape == (1000, 48, 80, 2)
    assert 0.03 < float(moved.abs().max()) <= augment.ELASTIC
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.012, abs=5e-4)
    narrow = augment.region_matrices(torch.tensor([[0.2, 0.2, 0.4, 0.8]] * 1000))  # of the region's own sides
    moved = augment.random_displacement(narrow, 3 * ratio, (8, 8), 1.0, seeded()).abs().amax((0, 1, 2)) / 2
    close(moved / torch.tensor([0.2, 0.6]), torch.full((2,), 0.035), 0.005)


def test_colour_has_no_up_and_grey_has():
    """A bright bar on top stays there in ultrasound; on a slide all turns occur that keep the outline."""
    for channels, width, sides in ((1, 32, 1), (3, 32, 4), (3, 48, 2)):
        images = torch.full((200, channels, 32, width), 90, dtype=torch.uint8)
        images[:, :, :6] = 220
        out = augment.augment(images, 0.3, generator=seeded())[0].mean(1)
        edges = [out[:, 2:5], out[:, -5:-2], out[:, :, 2:5], out[:, :, -5:-2]]
        assert len(torch.stack([e.mean((1, 2)) for e in edges]).argmax(0).unique()) == sides


def test_changing_stains_scales_each_by_itself():
    amounts = torch.rand(5, 3, 4, 4, generator=seeded()) * 0.5
    scale, shift = torch.rand(5, 3) + 0.5, torch.rand(5, 3) * 0.1
    pair = (amounts, amounts * scale[:, :, None, None] + shift[:, :, None, None])
    before, after = (torch.exp(-torch.einsum("nshw,sc->nchw", a, augment.STAINS)) for a in pair)
    close(augment.change_stains(before, scale, shift), after)
    close(augment.change_stains(before, torch.ones(5, 3), torch.zeros(5, 3)), before)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_comes_back_as_it_came_and_close_to_float32(dtype):
    x, boxes = torch.rand(2, 1, 48, 64, generator=seeded()).to(dtype), BOX.to(dtype)
    regions = augment.crop_regions(boxes)

    def everything(x, boxes):
        views = [augment.tta_views(x, views=8), augment.tta_views(x, regions, 16, views=3)]
        crops = [augment.crop(x, regions, (20, 30)), augment.cut(x[:, 0], regions, 9)]
        changed = [augment.clahe(x), augment.blur(x, torch.ones(2))]
        return [*augment.augment(x, 1.0, boxes, generator=seeded())[:2], *views, *crops, *changed]

    for half, full in zip(everything(x, boxes), everything(x.float(), boxes.float()), strict=True):
        assert half.dtype == dtype
        close(half.float(), full, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [1, 3])
def test_on_a_device_no_value_is_waited_for(channels):
    """A meta tensor has shapes but no values: whoever asks for one, as a sync on a GPU does, gets an error."""
    x, boxes = torch.rand(4, channels, 32, 48, device="meta"), torch.rand(4, 4, device="meta")
    out, moved, _ = augment.augment(x, 1.0, boxes, augment.crop_regions(boxes), (16, 24), masks=x[:, 0])
    assert (out.shape, moved.shape) == ((4, channels, 16, 24), (4, 4))
    assert augment.augment(x, 0, boxes)[0].shape == x.shape
    assert augment.tta_views(x, augment.crop_regions(boxes), 8, 3).shape == (12, channels, 8, 8)
    losses.distillation_loss(boxes, torch.zeros(4, dtype=torch.long, device="meta"), boxes, 0.5, 2.0)


def test_off_the_cpu_all_images_are_blurred_and_the_same_third_taken(monkeypatch):
    x, u = torch.rand(12, 1, 24, 24, generator=seeded()), torch.rand(12, 20, generator=seeded(1))
    expected = augment.random_blur(x.clone(), u, 1.0)
    assert 0 < int((expected != x).any(3).any(2).sum()) < 12

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(augment, "blur", lambda images, sigma, real=augment.blur: real(torch.Tensor(images), sigma))
    found = augment.random_blur(x.clone().as_subclass(Elsewhere), u, 1.0).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)


def test_what_is_odd_but_right_passes():
    """Boxes of no width, NaN beside boxes, boxes that were moved out of the picture and come again, rounded floats."""
    odd = [[0.0, 0, 1, 1], [1.0, 0.3, 1.0, 0.3], [0.3, 0.2, 0.3, 0.9], [-5e-4, 0, 1.0005, 1], [math.nan] * 4]
    x, boxes = torch.rand(5, 1, 16, 24) * 1.0005, torch.tensor(odd)
    for seed in range(8):
        x, boxes, _ = augment.augment(x, 2.0, boxes, augment.crop_regions(boxes), generator=seeded(seed))
        assert boxes[4].isnan().all()
        assert ((boxes[:4] >= 0) & (boxes[:4] <= 1)).all()


@pytest.mark.parametrize(("h", "w"), [(32, 32), (32, 64)])
def test_views_are_one_batch_and_the_first_is_the_picture(h, w):
    x = torch.rand(3, 1, h, w)
    views = augment.tta_views(x, views=5)
    assert views.shape == (15, 1, h, w)
    zoomed = augment.crop(x, torch.tensor([[0.05, 0.05, 0.95, 0.95]] * 3), None)
    close(views[:9], torch.cat([x, x.flip(3), zoomed]))
    cropped = augment.tta_views(x, torch.tensor([[0.25, 0.25, 0.75, 0.75]] * 3), (h // 2, w // 2), 2)
    close(cropped[3:], x[:, :, h // 4 : -h // 4, w // 4 : -w // 4].flip(3))


def test_clahe_equalises_tile_by_tile_up_to_a_limit_and_takes_floats():
    x = torch.randint(30, 90, (2, 1, 16, 24), dtype=torch.uint8, generator=seeded())
    flat = x.flatten(1)
    expected = 255 * (flat[:, :, None] >= flat[:, None]).float().mean(2)  # without a limit: the share of what is below
    assert (augment.clahe(x, tiles=1, clip=1e9).flatten(1) - expected).abs().max() <= 0.51
    counts, limit = torch.bincount(flat[0], minlength=256).float(), 2.0 * 16 * 24 / 256  # with one, by hand
    counts = counts.clamp(max=limit) + (counts - limit).clamp(min=0).sum() / 256
    expected = (counts.cumsum(0) / (16 * 24) * 255)[x[0].long()]
    assert (augment.clahe(x, tiles=1, clip=2.0)[0] - expected).abs().max() <= 0.51
    x = (torch.linspace(100, 130, 64) + torch.randint(0, 8, (1, 1, 64, 64), generator=seeded())).to(torch.uint8)
    assert augment.clahe(x).float().std() > 1.3 * x.float().std()  # local contrast
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(augment.clahe(ramp / 255), augment.clahe(ramp) / 255)
    assert torch.equal(augment.clahe((ramp / 255).half()), (augment.clahe(ramp) / 255).half())
    blank = augment.clahe(torch.full((1, 3, 33, 47), 90, dtype=torch.uint8))
    assert (blank.shape, len(blank.unique())) == ((1, 3, 33, 47), 1)


def test_losses_by_hand():
    z, y, w = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 3.0])
    p, soft = torch.sigmoid(z[:, 0]), y * 0.9 + 0.05
    plain = -torch.where(y == 1, p.log(), (1 - p).log())
    weighted = (plain * w[y]).sum() / w[y].sum()
    close(losses.classification_loss(z, y), plain.mean())
    close(losses.classification_loss(z, y, w), weighted)
    close(losses.classification_loss(losses.two_logits(z), y, w), weighted)  # of two logits one is 0: they are one
    close(losses.classification_loss(z, y, smoothing=0.1), -(soft * p.log() + (1 - soft) * (1 - p).log()).mean())
    labels = torch.tensor([0, 0, 0, 1])
    close(losses.class_weights(labels, 2, "auto"), torch.tensor([4 / 6, 2.0]))
    assert losses.class_weights(labels, 3, "auto").isfinite().all()  # a class that is not there
    assert losses.class_weights(labels, 2, "none") is None
    assert losses.class_weights(labels, 2, "2.5").tolist() == [1.0, 2.5]


@pytest.mark.parametrize("classes", [2, 4])
def test_distillation_is_the_weighted_sum_of_label_and_teacher(classes):
    logits = torch.randn(6, 1 if classes == 2 else classes, generator=seeded(), requires_grad=True)
    labels, teacher = torch.randint(classes, (6,)), torch.rand(6, classes, generator=seeded(1)).softmax(1)
    hard = losses.classification_loss(logits, labels, smoothing=0.1)
    close(losses.distillation_loss(logits, labels, teacher, 1.0, 3.0, smoothing=0.1), hard)
    s, t = (losses.two_logits(logits) / 3).exp(), teacher ** (1 / 3)  # by hand
    s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    soft = 9 * (t * (t / s).log()).sum() / 6
    for known in (6, 2, 0):  # an image without a label learns from the teacher alone
        some = torch.where(torch.arange(6) < known, labels, -1)
        hard = losses.classification_loss(logits[:known], labels[:known]) if known else 0.0
        close(losses.distillation_loss(logits, some, teacher, 0.3, 3.0), 0.3 * hard + 0.7 * soft)
    for dtype in HALF:  # is taken as float32
        z, t = (3 * logits).to(dtype), teacher.to(dtype)
        expected = losses.distillation_loss(z.float(), labels, t.float(), 0.5, 2.0)
        assert torch.equal(losses.distillation_loss(z, labels, t, 0.5, 2.0), expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_at_high_temperature_distillation_matches_logits(classes):
    """Hinton et al. 2015, eq. 4: as T grows the gradient tends to (z - v) / (N K), for logits of mean 0."""
    z, v = torch.randn(2, 5, classes, generator=seeded(), dtype=torch.double)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    given = (z[:, 1:] - z[:, :1] if classes == 2 else z).requires_grad_()
    loss = losses.distillation_loss(given, torch.zeros(5).long(), v.softmax(1), 0.0, 500.0)
    expected = ((z - v) / (5 * classes))[:, -given.shape[1] :]
    torch.testing.assert_close(torch.autograd.grad(loss, given)[0], expected, atol=2e-3, rtol=0.02)


def test_the_detection_loss_falls_to_its_least_at_the_true_box():
    true = torch.tensor([[0.2, 0.3, 0.6, 0.8]])
    found = [float(losses.box_loss(true + shift, true)) for shift in (0, 0.05, 0.1, 0.3, 0.9)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0, abs=1e-6)
    # touching boxes of equal size: IoU 0, no gap in the hull, so GIoU 0; smooth L1 of 0.5 in two of four corners
    beside = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    assert float(losses.box_loss(*beside)) == pytest.approx(1 + 4 * (0.5 - 0.025) / 2, abs=1e-5)
    cells, outline = true[..., None, None].expand(1, 4, 10, 10), losses.ellipses(true, 10, 10)
    least = losses.detection_loss(20 * (outline - 0.5), cells, outline, true)
    assert float(least) == pytest.approx(0, abs=0.01)
    away = torch.where(outline[:, None] > 0, cells, cells + 0.3)  # outside of the lesion no box is taught
    close(losses.detection_loss(20 * (outline - 0.5), away, outline, true), least)
    for worse in (
        (-20 * (outline - 0.5), cells),
        (20 * (outline.roll(2, 2) - 0.5), cells),
        (20 * (outline - 0.5), cells + 0.1),
    ):
        assert losses.detection_loss(*worse, outline, true) > least + 0.2


def test_what_is_not_known_teaches_no_outline_and_no_box():
    """The loss of a batch is that of its parts: unknown images add nothing, lesion-free ones no box and no Dice."""
    logits, cells, nan = torch.randn(4, 6, 6, generator=seeded()), torch.rand(4, 4, 6, 6).sort(1)[0], math.nan
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.8], [nan] * 4, [nan] * 4, [0.4, 0.4, 0.9, 0.6]])
    outlines = losses.ellipses(boxes, 6, 6)
    assert not outlines[1:3].any()
    outlines[2] = nan
    cross = [F.binary_cross_entropy_with_logits(logits[i], outlines[i]) for i in (0, 1, 3)]
    p, expected = logits.sigmoid(), sum(cross) / 3
    for i in (0, 3):
        cut = outlines[i].bool()
        expected = expected + (1 - (2 * p[i][cut].sum() + 1) / (p[i].sum() + cut.sum() + 1)) / 3
        expected = expected + losses.box_loss(cells[i][:, cut].T, boxes[i].expand(int(cut.sum()), 4)).mean() / 2
    torch.testing.assert_close(losses.detection_loss(logits, cells, outlines, boxes), expected)
    nobody = losses.detection_loss(logits, cells, torch.full_like(outlines, nan), boxes)
    assert nobody == 0


def test_an_ellipse_fills_its_box():
    box = torch.tensor([[0.1, 0.2, 0.7, 0.6]])
    drawn = losses.ellipses(box, 200, 300)[0] > 0
    close(torch.tensor(data.box_of(drawn.numpy())) / torch.tensor([300, 200, 300, 200]), box[0], 0.006)
    assert float(drawn.float().mean()) == pytest.approx(math.pi / 4 * 0.6 * 0.4, rel=0.01)


def test_phantoms_are_seeded_and_have_one_lesion_each_that_shows_the_signs_of_its_class():
    """Benign lesions are wider than tall and bright behind, malignant ones less so, as BI-RADS says."""
    (pixels, labels, masks), again, other = (phantoms.phantoms(150, 64, seed) for seed in (3, 3, 4))
    assert (pixels.shape, pixels.dtype) == ((150, 1, 64, 64), torch.uint8)
    assert (masks.shape, masks.dtype) == ((150, 64, 64), torch.bool)
    assert all(torch.equal(a, b) for a, b in zip((pixels, labels, masks), again, strict=True))
    assert not torch.equal(pixels, other[0])
    assert labels.sum() == 60  # 40 %
    share = masks.float().mean((1, 2))
    assert ((share > 0.005) & (share < 0.25)).all()
    width, height = (boxes_of(masks)[:, 2:] - boxes_of(masks)[:, :2]).T
    below = (masks.cumsum(1) > 0) & ~masks  # under the lesion, in its columns
    beside = ~masks.any(1, keepdim=True) & below.any(2, keepdim=True)  # the same depths, in other columns
    under, aside = ((pixels[:, 0] * m).sum((1, 2)) / m.sum((1, 2)).clamp(min=1) for m in (below, beside))
    for sign in ((width / height).log(), under - aside):
        benign, malignant = sign[labels == 0], sign[labels == 1]
        assert benign.mean() - malignant.mean() > 0.7 * sign.std()
        assert benign.min() < malignant.max()  # and the classes overlap


# ---------------------------------------------------------------------------------------------------------------------
# query.py

k_center = query.k_center_greedy


def distances(a, b):
    """Without products: by hand in float64, in float32 with the bits that query.py promises."""
    if a.dtype == torch.double:
        return (a[:, None] - b).square().sum(2).sqrt()
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def plain_k_center(points, k, centers):
    """The algorithm as everybody writes it: a pass over all points a pick, in the numbers' own precision."""
    taken = []
    if not len(centers):
        centers = points.mean(0, keepdim=True)
        taken = [int(distances(points, centers).argmin())][:k]
        centers = points[taken] if k else centers
    nearest = distances(points, centers).amin(1)
    while len(taken) < k:
        nearest[taken] = -1.0
        taken.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances(points, points[taken[-1:]])[:, 0])
    return taken, float(nearest.amax())


def test_k_center_is_the_choice_by_hand_on_a_hundred_sets_with_duplicates():
    rng = np.random.default_rng(0)
    for trial in range(120):
        n, d = rng.integers((1, 1), (301, 6)) if trial % 10 else (rng.integers(1200, 1500), 128)  # or work sets
        points = torch.tensor(rng.integers(0, 4 if trial % 4 < 2 else 1000, (n, d))).float()  # ties, exact copies
        points[rng.integers(n) :] = points[rng.integers(n)].clone()
        centers = torch.tensor(rng.integers(0, 4, (max(0, rng.integers(-3, 5)), d))).float()
        k = int(rng.integers(n + 1 if d < 128 else 40))
        picks, radius = k_center(points, k, centers)
        expected, farthest = plain_k_center(points.double(), k, centers.double())
        assert (picks.tolist(), radius) == (expected, pytest.approx(farthest, rel=1e-5)), trial


@pytest.mark.parametrize("shape", [(2000, 3), (1500, 300), (4000, 128)])
def test_k_center_on_floats_equals_the_plain_algorithm_to_the_bit(shape):
    generator = seeded(shape[1])
    gauss, corners = torch.randn(shape, generator=generator), torch.randint(0, 2, shape, generator=generator).float()
    some = torch.randint(shape[0] // 2, shape[:1], generator=generator)  # half of them, more than once
    clusters = 50 * gauss[some % 20] + 0.01 * gauss
    for name, x in {"far": gauss + 100, "clusters": clusters, "copies": gauss[some], "ties": corners}.items():
        for centers in (x[:100] + 0.01, x[5:6]):
            picks, radius = k_center(x, 60, centers)
            assert (picks.tolist(), radius) == plain_k_center(x, 60, centers), name


def test_k_center_on_awkward_sets():
    same, many, corners = torch.full((500, 8), 0.1), torch.full((600, 256), 0.1), torch.eye(600)
    many[7] = 3
    near, doubles = torch.tensor([[1000.0], [1000.0001], [1000.0]]), torch.rand(50, 3, dtype=torch.double)
    for points, k, centers, expected in (
        (same, 500, None, [*range(500)]),  # one point, 500 times
        (same, 3, same[:1], [0, 1, 2]),
        (many, 600, many[:1], [7, *range(7), *range(8, 600)]),  # too many for a plain loop
        (corners, 600, corners[:1], [*range(1, 600), 0]),  # everyone as far from everyone: ties beyond the work set
        (near, 3, None, [0, 1, 2]),
        (doubles, 5, None, plain_k_center(doubles, 5, doubles[:0])[0]),
        (torch.tensor([[3e38], [-3e38], [0.0]]), 3, None, [2, 0, 1]),
        (torch.tensor([[1e-44], [4e-45], [0.0]]), 3, None, [1, 0, 2]),
        (torch.zeros(0, 4), 0, None, []),
    ):
        picks, radius = k_center(points, k, centers)
        assert (picks.tolist(), picks.dtype) == (expected, torch.long)
        assert radius == 0 or k < len(points)


def test_k_center_takes_finite_numbers_of_any_size():  # 34
    """Squares of these overflow or vanish; a power of two changes nothing but the radius."""
    x = torch.randn(1500, 100, generator=seeded())
    for points, most in ((x, 126), (x.double(), 1022)):
        for centers in (points[:0], points[:7] + 0.5):
            expected, radius = k_center(points, 40, centers)
            for power in (most - 3, 70, -50, 20 - most):
                factor = torch.tensor(2.0, dtype=points.dtype) ** power
                picks, there = k_center(points * factor, 40, centers * factor)
                assert torch.equal(picks, expected), (most, power)
                assert there == pytest.approx(radius * 2.0**power, rel=1e-6), (most, power)


def test_query_takes_arrays_lists_half_precision_and_leaves_gradients_alone(recwarn):
    x = torch.randint(0, 60, (40, 6), generator=seeded())
    p = torch.rand(2, 40, 3, generator=seeded(1)).softmax(2)
    expected, radius = k_center(x.float(), 9, x[:3].float())
    labelled, rest, strategies = torch.arange(5), torch.arange(5, 40), query.STRATEGIES.values()
    plain = query.Context(x.float(), p[0], labelled, rest, seeded(2), p, p)
    chosen = [strategy(plain, 6).tolist() for strategy in strategies]
    forms = [x, x.tolist(), x.numpy(), x.half(), x.bfloat16(), x.numpy().astype(np.float16), x.double().numpy()]
    for form in [*forms, x.float().requires_grad_()]:
        picks, found = k_center(form, 9, form[:3])
        assert (picks.tolist(), found) == (expected.tolist(), pytest.approx(radius, rel=1e-6))
        traced = p.clone().requires_grad_()
        context = query.Context(form, traced[0], labelled.tolist(), rest.numpy(), seeded(2), traced, traced)
        assert not any(value.requires_grad for value in (context.embeddings, context.probabilities, context.members))
        assert [strategy(context, 6).tolist() for strategy in strategies] == chosen
    assert not recwarn.list


def test_k_center_measures_few_distances(monkeypatch):
    """The hardest case, isotropic Gaussians: what is measured by direct differences, beside what a plain loop would."""
    x, measured, before = torch.randn(5000, 256, generator=seeded()), [], query.direct
    monkeypatch.setattr(query, "direct", lambda a, b: measured.append(len(a) * b.shape[-2]) or before(a, b))
    picks, _ = k_center(x, 100, x[:100] + 0.01)
    assert picks.tolist() == plain_k_center(x, 100, x[:100] + 0.01)[0]
    assert sum(measured) < 0.02 * len(x) * 200


def test_k_center_needs_little_memory_slow():
    """At 40,000 x 256 (41 MB): a table of all pairs would be 6.4 GB, one of all points against the picks 16 MB."""
    code = (
        "import torch, query; x, k_center = torch.randn(40_000, 256), query.k_center_greedy; k_center(x[:1000], 5);"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"  # ru_maxrss is inherited
        "before = peak(); k_center(x, 100); k_center(x, 100, x[:100] + 1); print((peak() - before) / 1024)"
    )
    assert float(run("-c", code).stdout) < 60


SHARDED = """
import sys, torch, query
import torch.distributed as dist

def cases():
    draw = torch.Generator().manual_seed(0)
    gauss, some = torch.randn(4000, 128, generator=draw), torch.randint(2000, (4000,), generator=draw)
    corners, same = torch.randint(0, 2, (3000, 64), generator=draw).float(), torch.ones(5000, 40)
    far = torch.cat([gauss[:1000] + 100, gauss[:2000]])
    few = torch.randint(0, 3, (40, 3), generator=draw).float()
    for name, x, k, m in (
        ("labelled", gauss[100:], 60, gauss[:100]), ("none labelled", gauss, 60, None), ("no pick", gauss, 0, None),
        ("copies", gauss[some], 60, gauss[:7] + 0.1), ("ties", corners, 60, corners[:1]), ("all but one", few, 39, few[:2]),
        ("all", few, 40, None), ("alike", same, 30, None), ("far", far, 50, None), ("large", gauss * 2.0**120, 40, gauss[:3]),
        ("float64", gauss.double(), 40, None), ("half", gauss.half(), 40, gauss[:3]), ("two", few[:2], 2, None),
    ):
        yield name, x, k, m

def work(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/met{world}", rank=rank, world_size=world)
    sent, gather = [], dist.all_gather
    dist.all_gather = lambda table, own: sent.append(own.numel()) or gather(table, own)
    for i, (name, x, k, m) in enumerate(cases()):
        cut = [len(x) // 3, len(x) - 5 if len(x) > 5 else 1] if i % 3 else [0, 0]  # uneven; or all with the last
        own = x.tensor_split(cut[-(world - 1):])[rank]
        sent.clear()
        picks, radius = query.k_center_greedy(own, k, m, sharded=True)
        expected, there = query.k_center_greedy(x, k, m)
        assert (picks.tolist(), radius) == (expected.tolist(), there), (name, rank, picks, expected)
        assert sent[2:] == [x.shape[1] + 2] * (k + 1), name  # beside the counts and the sums, a row a pick
    fine, bad = torch.rand(9, 4), torch.full((9, 4), torch.nan if rank else 1.0)
    for why, x, k, m in (("NaN", bad, 1, None), ("same on every", fine, 1 + rank, None), ("k = 99", fine[:0], 99, None),
        ("same on every", fine, 1, torch.ones(1, 4) * rank)):
        try:
            query.k_center_greedy(x, k, m, sharded=True)
        except ValueError as e:
            assert why in str(e), e
        else:
            raise AssertionError(why)

if __name__ == "__main__":
    for world in (2, 3):
        torch.multiprocessing.start_processes(work, (world, sys.argv[1]), world, start_method="fork")
    print("alike")
"""


def test_k_center_over_two_and_three_ranks_picks_what_one_does(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = run(tmp_path / "sharded.py", tmp_path)
    assert done.stdout == "alike\n", done.stderr


def test_k_center_on_a_file_in_memory_that_does_not_grow_with_it(tmp_path):
    """120,000 x 256 of float16 (61 MB, 123 as floats): what is neither of the file nor of the O(N) bounds is a few MB."""
    x = torch.randn(120_000, 256, generator=seeded()).half()
    (tmp_path / "x.f16").write_bytes(x.numpy().tobytes())
    code = (
        "import torch, query; own = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) / 1024;"
        f"x = torch.from_file({str(tmp_path / 'x.f16')!r}, size=120_000 * 256, dtype=torch.half).view(-1, 256);"
        "query.k_center_greedy(x[:1000], 5); before = own(); most = [];"
        "query.direct = lambda a, b, f=query.direct: most.append(own()) or f(a, b);"
        "print(query.k_center_greedy(x, 30, x[:9].float() + 1)[0].tolist(), max(most) - before)"
    )
    picks, grown = run("-c", code).stdout.rsplit(" ", 1)
    assert json.loads(picks) == k_center(x.float(), 30, x[:9].float() + 1)[0].tolist()
    assert float(grown) < 60


def test_typiclust_draws_from_a_cluster_that_is_too_large_and_takes_so_many_clusters_at_most(monkeypatch):
    monkeypatch.setattr(query, "MOST_MEMBERS", 40)
    monkeypatch.setattr(query, "MOST_CLUSTERS", 3)
    x = torch.cat([0.1 * torch.randn(200, 8, generator=seeded(i)) + 9 * torch.eye(8)[i] for i in range(3)])
    context = query.Context(x, None, torch.arange(150), torch.arange(150, 600), seeded())
    picks = query.query_typiclust(context, 130)
    assert len(picks.unique()) == 130
    assert (picks // 200).bincount().tolist() == [0, 65, 65]  # the first has labels; of 40 drawn there are more to come
    assert picks.min() >= 150
    typical = torch.cdist(x[200:400], x[200:400]).topk(21, largest=False).values.mean(1)
    assert (typical < typical[int(picks[picks // 200 == 1][0]) - 200]).double().mean() < 0.25


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_strategies_choose_on_the_tensors_own_device():
    x, p = torch.randn(2000, 64, generator=seeded()), torch.rand(3, 2000, 4, generator=seeded(1)).softmax(2)
    labelled, free = torch.arange(50), torch.arange(50, 2000)
    for name, strategy in query.STRATEGIES.items():
        here, there = (
            strategy(query.Context(x.to(d), p[0].to(d), labelled, free, seeded(2), p.to(d), p.to(d)), 20)
            for d in ("cpu", "cuda")
        )
        assert (there.device.type, len(there.unique())) == ("cpu", 20), name
        if name not in ("badge", "typiclust"):  # which draw by other means there
            assert torch.equal(here, there), name


@needs_cuda
def test_k_center_on_a_gpu_waits_for_no_pick(recwarn):
    x = torch.randn(3000, 96, generator=seeded())
    waits = []
    for k in (5, 50):
        expected, radius = k_center(x, k, x[:5] + 0.5)
        given, centers = x.cuda(), x[:5].cuda() + 0.5
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            picks, there = k_center(given, k, centers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(w.message) for w in recwarn.list))
        assert picks.device.type == "cuda"
        assert (picks.tolist(), there) == (expected.tolist(), pytest.approx(radius, rel=1e-5))
    assert waits[0] == waits[1] > 0


def test_each_strategy_chooses_what_it_should_on_a_toy_pool():
    """Six images: two near each other and labelled; one sure and far; two unsure; a copy of a labelled one."""
    embeddings = torch.tensor([[0.0, 1.0], [0.1, 1.0], [9.0, 0.0], [1.0, 2.0], [1.0, 2.5], [0.0, 1.0]])
    opinions = [[0.0, 0.1, 0.99, 0.5, 0.35, 0.02], [0.5, 0.5, 0.9, 0.5, 0.2, 0], [0.5, 0.5, 0.9, 0.5, 0.8, 0]]
    p = torch.tensor([[[1 - x, x] for x in each] for each in opinions])
    context = query.Context(embeddings, p[0], [0, 1], [2, 3, 4, 5], seeded())
    assert query.query_entropy(context, 2).tolist() == [3, 4]
    assert query.query_coreset(context, 3).tolist() == [2, 4, 3]
    assert sorted(query.query_random(context, 4).tolist()) == [2, 3, 4, 5]
    # gradient: (p - one-hot) x embedding; by hand: 2 -> 0.01 * 9, 3 -> 0.5 * 2.2, 4 -> 0.35 * 2.7, 5 -> 0.02 * 1
    assert query.query_badge(context, 1).tolist() == [3]
    for choose, told in ((query.query_committee, {"members": p[1:]}), (query.query_bald, {"sampled": p[1:]})):
        assert choose(dataclasses.replace(context, **told), 1).tolist() == [4]  # 3 is unsure, but all agree
    p = torch.rand(5, 40, 3, generator=seeded()).softmax(2)  # against the mean divergence from the consensus
    close(query.mutual_information(p), (p * (p / p.mean(0)).log()).sum(2).mean(0), 1e-6)


def test_typiclust_takes_the_typical_image_of_the_largest_cluster_without_a_label():
    generator = seeded()
    angle = torch.cat([at + 0.02 * torch.randn(n, generator=generator) for at, n in ((0, 30), (1.5, 20), (3, 10))])
    x = torch.stack([angle.cos(), angle.sin()], 1)
    picks = query.query_typiclust(query.Context(x, None, [0], torch.arange(1, 60), generator), 2).tolist()
    assert 30 <= picks[0] < 50 <= picks[1]  # the cluster of 30 has a label
    assert (angle[picks[0]] - angle[30:50].median()).abs() < 0.02
    first = query.query_typiclust(query.Context(x, None, [], torch.arange(60), generator), 3)
    assert sorted((angle[first] / 1.5).round().tolist()) == [0, 1, 2]  # a cold start: one of each cluster


def test_k_means_is_lloyds_algorithm_from_the_seeds_of_k_means_plus_plus():
    """Against the same from the full tables of distances, with the same draws: copies, and nearly the same points."""
    for seed in range(4):
        x = F.normalize(torch.randn(300, 40, generator=seeded(seed)) + 3, dim=1)
        x[200:] = x[:100] + (seed % 2) * 1e-4
        k, draws, table = 30 + 60 * seed, seeded(seed), distances(x, x).square()
        first = int(torch.randint(len(x), (1,), generator=draws))
        centers = x[query.spread(lambda i, table=table: table[i], first, k, draws)]
        for _ in range(20):
            expected = torch.cdist(x, centers).argmin(1)
            for c in expected.unique():
                centers[c] = x[expected == c].mean(0)
        found = query.k_means(x, k, seeded(seed))
        assert (found == expected).double().mean() > 0.99  # float32: a mean in another order rounds otherwise


@pytest.mark.parametrize("classes", [2, 5])
def test_badge_measures_the_gradients_of_the_last_layer(classes, monkeypatch):
    x, weight = torch.randn(12, 7, generator=seeded()), torch.randn(classes, 7, generator=seeded(1), requires_grad=True)
    logits = x @ weight.T
    each = F.cross_entropy(logits, logits.argmax(1), reduction="none")
    gradients = torch.stack([torch.autograd.grad(e, weight, retain_graph=True)[0].flatten() for e in each])
    seen = []
    record = lambda away, first, k, _: seen.extend([first, *map(away, range(12))]) or torch.arange(k)  # noqa: E731
    monkeypatch.setattr(query, "spread", record)
    query.query_badge(query.Context(x, logits.softmax(1), [], torch.arange(12), None), 3)
    measured, expected = torch.stack(seen[1:]), distances(gradients, gradients).square()
    torch.testing.assert_close(measured, expected, atol=1e-4, rtol=1e-3)
    assert seen[0] == int(gradients.norm(dim=1).argmax())


def test_spread_draws_by_squared_distance_and_never_twice():
    generator = seeded()
    table = torch.tensor([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]])
    second = [int(query.spread(table.__getitem__, 0, 2, generator)[1]) for _ in range(2000)]
    assert second.count(2) / 2000 == pytest.approx(0.9, abs=0.02)  # 9 : 1
    picks = query.spread(lambda i: torch.zeros(6), 2, 6, generator)  # copies
    assert sorted(picks.tolist()) == list(range(6))


def test_draws_are_in_proportion_where_multinomial_takes_no_more():
    weights, draws = torch.zeros(2**24 + 9, dtype=torch.double), seeded()
    weights[5], weights[-4] = 1, 3
    found = [query.draw(weights, draws) for _ in range(24)]
    assert set(found) == {5, 2**24 + 5}
    assert found.count(5) < 12


def test_every_strategy_returns_distinct_unlabelled_images():
    x = torch.randn(30, 9, generator=seeded(1)).repeat(2, 1)  # exact copies
    p = torch.rand(4, 60, 3, generator=seeded(2)).softmax(2)
    labelled, free = torch.arange(0, 60, 4), torch.tensor([i for i in range(60) if i % 4])
    for name, strategy in query.STRATEGIES.items():
        for k in (1, 7, len(free)):
            picks, again = (strategy(query.Context(x, p.mean(0), labelled, free, seeded(k), p, p), k) for _ in range(2))
            assert (picks.dtype, len(picks), len(picks.unique())) == (torch.long, k, k), name
            assert torch.isin(picks, free).all(), name
            assert torch.equal(again, picks), name


def test_one_image_of_each_unlabelled_group_is_offered():
    groups, labelled = torch.tensor([7, 3, 3, 7, 5, 5, 9]), torch.tensor([1])
    assert query.candidates(groups, labelled, 2).tolist() == [0, 4, 6]  # 2 shows what 1 shows
    assert query.candidates(groups, labelled, 4).tolist() == [0, 2, 3, 4, 5, 6]  # too few groups: all
    assert query.candidates(groups, labelled[:0], 3).tolist() == [0, 1, 4, 6]


BAD = (math.nan, math.inf, -math.inf)


def second(*corners):
    return torch.tensor([[0.1, 0.2, 0.6, 0.7], corners])


def distil(n, k, teacher):
    return losses.distillation_loss(torch.zeros(n, k), torch.zeros(n).long(), torch.tensor(teacher), 0.5, 2.0)


REFUSED = {
    augment.augment: [(r"from 200 to 200: give uint8, or floats in \[0, 1\]", GREY + 200.0), ("from -0.5", GREY - 0.5),
        ("nan", GREY * math.nan), ("int64: give uint8", GREY.long()), ("1 or 3", GREY.expand(2, 2, 16, 16)),
        (r"shape \(1, 16, 16\)", GREY[0]), (r"shape \(0, 1, 16, 16\)", GREY[:0]), ("strength -1", GREY, -1.0),
        (r"box 0 is \(1.6, 3.2, 9.6, 11.2\)", GREY, 1.0, BOX * 16), ("box 1", GREY, 0, second(-0.2, 0.2, 0.6, 0.7)),
        ("box 1", GREY, 0, second(0.2, 0.2, 0.6, 1.3)), ("four NaN", GREY, 1.0, second(0.1, math.nan, 0.6, 0.7)),
        (r"give floats \(2, 4\)", GREY, 1.0, BOX[:1]), (r"give floats \(2, 4\)", GREY, 1.0, None, BOX[:1]),
        ("int64", GREY, 1.0, BOX.long())],
    augment.tta_views: [("from 2 to 2", GREY + 2.0), (r"region 1 is \(nan", GREY, second(*[math.nan] * 4)),
        ("9 views: give 1 to 8", GREY, None, None, 9), ("0 views", GREY, None, None, 0)],
    augment.crop: [("region 1 .* x_min < x_max", GREY, second(0.5, 0.5, 0.5, 0.7), 8), ("size 0", GREY, BOX, 0)],
    augment.crop_regions: [("box 1", second(0.6, 0.2, 0.1, 0.7))], augment.clahe: [("from 2 to 2", GREY + 2.0)],
    augment.cut: [("maps of shape", GREY[:, 0], None, 8)], phantoms.phantoms: [("at least 1", 0)],
    augment.place: [("region 1", GREY[:, 0].float(), second(0.4, 0.2, 0.4, 0.8), 8)],
    distil: [(r"\(2, 3\)", 2, 3, [[1.0, 0]] * 2), (r"\(2, 2\)", 2, 1, [[1.0], [1]]), (r"\(2, 2\)", 2, 2, [[1.0, 0]]),
        ("row 1", 2, 2, [[1.0, 0], [-1, 2]]), ("softmax", 2, 2, [[1.0, 1], [1, 1]]), ("nan", 1, 2, [[math.nan, 1]])],
    grouping.near_duplicates: [(r"\(N, 1, T, T\)", torch.zeros(2, 1, 28, 32)), (r"\(N, 1, T, T\)", GREY[0])],
    k_center: [*[("of 4 points", torch.rand(4, 2), k) for k in (-1, 5)],
        *[("NaN", torch.tensor([[0.0], [bad]]), 1) for bad in BAD],
        *[("NaN", torch.rand(3, 1), 1, torch.tensor([[bad]])) for bad in BAD],
        (r"\(N, D\)", torch.rand(4), 1), (r"\(N, D\)", torch.rand(4, 2), 1, torch.rand(3, 3))],
}  # fmt: skip


@pytest.mark.parametrize("case", [(function, *case) for function, cases in REFUSED.items() for case in cases])
def test_what_does_not_fit_is_a_value_error_that_says_so(case):
    function, why, *given = case
    with pytest.raises(ValueError, match=why):
        function(*given)


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def refused(why, function, *args, **more):
    """The words in which the user is told what is wrong."""
    with pytest.raises(InputError, match=why) as e:
        function(*args, **more)
    return str(e.value)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (1, 1), (3, 200), (20_000, 30)])
def test_letterbox_keeps_the_aspect_ratio_and_pads_with_the_mean(size):
    square, (sx, sy, left, top) = data.letterbox(picture(*size), 64)
    w, h = round(size[0] * sx), round(size[1] * sy)
    assert (square.shape, max(w, h)) == ((1, 64, 64), 64)
    ratio = size[0] / size[1]
    assert abs(w / h - ratio) <= max(1, ratio) / min(w, h)  # up to the rounding of the short side
    outside = np.ones((64, 64), bool)
    outside[top : top + h, left : left + w] = False
    assert (square[0][outside] == round(float(square[0][~outside].mean()))).all()


def test_letterbox_places_points_where_it_says():
    image = Image.new("L", (200, 100))
    ImageDraw.Draw(image).rectangle([120, 40, 139, 59], fill=255)
    square, (sx, sy, left, top) = data.letterbox(image, 100)
    ys, xs = np.nonzero(square[0] > 200)
    found, expected = (xs.min(), xs.max() + 1, ys.min()), (120 * sx + left, 140 * sx + left, 40 * sy + top)
    assert found == pytest.approx(expected, abs=1)


def awkward_images(folder):
    """Files of every mode that a user may have; the left half is dark, the right half bright."""
    base = np.zeros((20, 30), np.uint8)
    base[:, 15:] = 200
    grey = Image.fromarray(base)
    rgb, exif = grey.convert("RGB"), Image.Exif()
    palette = rgb.quantize(8)
    rgba, hidden = rgb.convert("RGBA"), Image.new("RGBA", (30, 20), "white")
    rgba.putalpha(grey.point(lambda v: 255 * (v > 0)))
    hidden.putalpha(grey)  # white behind full transparency must not be seen
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    files = {"grey.png": grey, "rgb.png": rgb, "rgba.png": rgba, "hidden.png": hidden, "bilevel.png": grey.convert("1")}
    files |= {"palette.png": palette, "palette_transparent.png": palette, "cmyk.jpg": rgb.convert("CMYK")}
    files["sixteen.png"] = Image.fromarray(base.astype(np.uint16) * 10)
    files["float.tif"] = Image.fromarray(base.astype(np.float32) / 255)
    files["exif.jpg"] = Image.fromarray(np.ascontiguousarray(np.rot90(base)))
    options = {"palette_transparent.png": {"transparency": palette.getpixel((0, 0))}, "exif.jpg": {"exif": exif}}
    for name, image in files.items():
        image.save(folder / name, **options.get(name, {}))
    return list(files)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_image_mode_is_read_upright_with_its_contrast(tmp_path, channels, mode):
    for name in awkward_images(tmp_path):
        image = data.read_image(tmp_path / name, channels)
        assert (image.mode, image.size) == (mode, (30, 20)), name
        values = np.asarray(image).reshape(20, 30, -1).astype(int)
        assert values[:, 17:].mean() - values[:, :13].mean() > 120, name


def bad_files(folder):
    picture().save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "bomb.png").write_bytes(b"P4 20000 20000\n")  # what Pillow goes by is the content, not the name
    return {"text.png": "not an image", "cut.png": "damaged", "empty.jpg": "not an image", "bomb.png": "million pixels"}


def test_bad_files_say_what_is_wrong(tmp_path):
    for name, why in [*bad_files(tmp_path).items(), ("nowhere.png", "no such file")]:
        refused(why, data.read_image, tmp_path / name, 1)


def test_join_groups_near_duplicates_over_both_sets():
    a, b = data.phantom_set(8, 32, seed=1), data.phantom_set(6, 32, seed=2)
    b.thumbnails[4] = a.thumbnails[2].flip(2)  # the mirror image of one of a's
    both = data.join(a, b)
    np.testing.assert_allclose(both.boxes[9] * 32, data.box_of(both.masks[9].numpy()))
    assert both.groups[12] == both.groups[2]
    assert len(both.groups.unique()) == 13
    assert torch.equal(both.pixels[8:], b.pixels)
    assert torch.equal(both.masks[8:], b.masks)
    assert torch.equal(both.labels, torch.cat([a.labels, b.labels]))
    assert both.names == a.names + b.names
    b.masks = b.thumbnails = None  # of too many images
    a.beside = torch.ones_like(a.masks)
    both = data.join(a, b)
    assert torch.equal(both.masks[:8], a.masks)  # where one has no masks, the other keeps its own
    assert not both.masks[8:].any()
    assert both.beside.flatten(1).all(1).tolist() == [True] * 8 + [False] * 6
    assert len(both.groups.unique()) == 14


def test_class_folders_with_masks(tmp_path):
    class_folders(tmp_path, {"benign": 4, "malignant": 3, "normal": 2})
    second = Image.new("L", (60, 40))
    ImageDraw.Draw(second).rectangle([50, 30, 54, 34], fill=255)
    second.save(tmp_path / "benign" / "benign (2)_mask_1.png")
    images = quiet_load(tmp_path, 60, positive="malignant")
    assert images.classes == ["benign+normal", "malignant"]
    assert images.labels.tolist() == [0] * 4 + [1] * 3 + [0] * 2
    assert not any("_mask" in Path(n).name for n in images.names)
    assert images.boxes[7:].isnan().all()  # normal: all-black masks, so no lesion and no box
    for box, mask in zip(images.boxes[:7], images.masks.numpy(), strict=False):  # it is that of the union of the masks
        np.testing.assert_allclose(box * 60, data.box_of(mask), atol=1.01)
    assert images.boxes[1, 2] * 60 == pytest.approx(55, abs=1)  # and it reaches the second lesion


def test_classes_are_ordered_and_chosen():
    order = data.resolve_classes
    assert order(["malignant", "benign"])[0] == ["benign", "malignant"]
    assert order(["0", "1", "1"]) == (["0", "1"], [0, 1, 1])
    assert order(["0", "1", "1"], positive="0") == (["1", "0"], [1, 0, 0])
    assert order(["normal", "malignant", "benign"])[0] == ["benign", "normal", "malignant"]
    assert order(["mel", "nv", "bcc", ""], positive="mel,bcc") == (["nv", "bcc+mel"], [1, 0, 1, -1])
    assert order(["a", "b", "c"], drop=["b"]) == (["a", "c"], [0, None, 1])
    assert order(["10", "9", "2"])[0] == ["2", "9", "10"]
    refused("--positive z: no such class", order, ["a", "b"], positive="z")
    refused("--drop-class z: no such class", order, ["a", "b"], drop=["z"])
    refused("no negative class", order, ["a", "b"], positive="a,b")


def test_source_splits_are_kept_and_a_missing_one_is_made(tmp_path):
    class_folders(tmp_path / "training_set", {"benign": 40, "malignant": 24})
    class_folders(tmp_path / "testing_set", {"benign": 5, "malignant": 5})
    images = quiet_load(tmp_path, 32)
    assert images.splits.count("val") == pytest.approx(8, abs=2)
    # all of testing_set; its near-duplicates in training_set do not move
    assert all(("testing_set" in n) == (s == "test") for n, s in zip(images.names, images.splits, strict=True))


def test_patients_are_groups(tmp_path):
    for patient in ("8863", "10256", "9"):
        for label in "01":
            (tmp_path / patient / label).mkdir(parents=True)
            for i in range(3):
                path = tmp_path / patient / label / f"{patient}_idx5_x{i}_y1_class{label}.png"
                picture(50, 50 if i else 31, int(patient) + i, "RGB").save(path)
    images = quiet_load(tmp_path, 50)
    assert images.classes == ["no IDC", "IDC"]
    assert images.pixels.shape == (18, 3, 50, 50)
    assert len(images.groups.unique()) == 3
    assert len({*zip(images.groups.tolist(), images.splits, strict=True)}) == 3  # each in one split
    (tmp_path / "77").mkdir()
    refused(r"77.*without patches", quiet_load, tmp_path, 50)


def write_npz(path, n=20, positive=1, **more):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 4 == 0).astype(np.uint8)[:, None] ^ (1 - positive)
    np.savez(path, **{k: v for k, v in (arrays | more).items() if v is not None})
    return path


def test_npz_splits_boxes_and_the_flipped_labels_of_breastmnist(tmp_path):
    boxes = np.tile(np.array([7.0, 14, 21, 28]), (20, 1))
    boxes[3] = np.nan
    images = quiet_load(write_npz(tmp_path / "any.npz", train_bboxes=boxes), 28)
    assert (images.classes, images.splits.count("val")) == (["0", "1"], 10)
    np.testing.assert_allclose(images.boxes[0], [0.25, 0.5, 0.75, 1.0])
    assert images.boxes[[3, *range(20, 40)]].isnan().all()
    assert images.names[20].endswith("any.npz#val/0")
    flipped = quiet_load(write_npz(tmp_path / "breastmnist_28.npz", positive=0), 28)
    assert flipped.classes == ["benign", "malignant"]
    assert torch.equal(flipped.labels, images.labels)  # 0 is malignant there, and malignant is the positive class here
    again = quiet_load(tmp_path / "any.npz", 28, positive="0", dummy_boxes=True)
    assert torch.equal(again.labels, 1 - images.labels)
    assert again.boxes.isfinite().all()
    assert "PLACEHOLDERS" in again.summary()


def test_npz_with_train_keys_alone_is_split(tmp_path):
    none = {f"{s}_{k}": None for s in ("val", "test") for k in ("images", "labels")}
    images = quiet_load(write_npz(tmp_path / "t.npz", n=100, **none), 28)
    assert [*map(images.splits.count, ("train", "val", "test"))] == pytest.approx([70, 10, 20], abs=1)
    assert images.names[5].endswith("t.npz#5")
    labels = np.array([[-1]] + [[i % 2] for i in range(99)])
    images = quiet_load(write_npz(tmp_path / "t.npz", n=100, **{**none, "train_labels": labels}), 28)
    assert (images.labels[0], images.splits[0], images.classes) == (-1, "", ["0", "1"])


def test_npz_that_can_not_be_trusted_is_refused(tmp_path):
    for change, why in [
        ({"train_labels": None}, "no train_labels"),
        ({"train_labels": np.zeros(7, int)}, "20 train_images but 7 train_labels"),
        ({"train_bboxes": np.zeros((3, 4))}, "20 train_images but 3 train_bboxes"),
        ({"train_images": np.zeros((20, 28, 28))}, "not uint8"),
        ({"train_labels": np.zeros((20, 14), int)}, "14 columns"),
        ({"train_images": np.array([{}] * 20, dtype=object)}, "pickled"),
        ({"train_labels": np.array([0.0] * 19 + [np.inf])}, "no whole numbers"),
    ]:
        refused(why, quiet_load, write_npz(tmp_path / "x.npz", **change), 28)
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    refused("no key train_images", quiet_load, tmp_path / "y.npz", 28)
    (tmp_path / "z.npz").write_bytes(b"PK no zip")
    refused(r"z.npz", quiet_load, tmp_path / "z.npz", 28)
    with zipfile.ZipFile(write_npz(tmp_path / "raw.npz", val_images=None), "a") as file:
        file.writestr("val_images", b"no array")
    refused("not uint8", quiet_load, tmp_path / "raw.npz", 28)


def test_what_an_error_quotes_stays_on_its_line_and_the_longest_number_is_one(tmp_path):
    odd = "\x1b[2J\n" + "x" * 5000  # would clear the screen
    (tmp_path / "a.csv").write_text(f'"image","{odd}"\na,b\n')
    with pytest.raises(InputError, match="no column 'label'") as told:
        quiet_load(tmp_path / "a.csv", columns={"label": "label"})
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 600
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)  # as a worker hands it on
    assert infer.sentence({"image": odd, "error": "no such file"}, None).isprintable()
    assert sorted(["9" * 5000, "10", "9", "009"], key=readers.natural) == ["9", "009", "10", "9" * 5000]


CORNERS = ["x_min", "y_min", "x_max", "y_max"]


def write_csv(folder, rows, header="image,label,group,split,mask,age,sex,x_min,y_min,x_max,y_max"):
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "table.csv"


@pytest.fixture
def pictures(tmp_path):
    """A folder of 0.png ... 3.png."""
    for i in range(4):
        picture(40, 40, i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_csv_with_every_column(pictures):
    (pictures / "deep").mkdir()
    for i in range(4):
        (pictures / f"{i}.png").rename(pictures / "deep" / f"ISIC_{i}.png")
    mask = Image.new("L", (40, 40))
    ImageDraw.Draw(mask).rectangle([10, 10, 19, 29], fill=255)
    mask.save(pictures / "m.png")
    rows = ["ISIC_0,mel,a,train,m.png,50,male,,,,", "ISIC_1.png,nv,a,train,,70,female,4,8,12,20"]
    rows += ["deep/ISIC_2.png,nv,b,validation,,,male,,,,", "ISIC_3,,b,test,,60,unknown,,,,"]
    columns = {"meta": ["age", "sex"], "box": CORNERS}
    images = quiet_load(write_csv(pictures, rows), 40, positive="mel", columns=columns)
    assert images.labels.tolist() == [1, 0, 0, -1]
    assert images.splits == ["train", "train", "val", ""]  # what has no label is in no split
    assert images.groups[0] == images.groups[1] != images.groups[2]
    np.testing.assert_allclose(images.boxes[:2] * 40, [[10, 10, 20, 30], [4, 8, 12, 20]], atol=1e-4)
    assert images.meta_columns == ["age", "age missing", "sex=female", "sex=male", "sex missing"]
    sd = np.std([50, 70, 60])
    coded = [[-10 / sd, 0, 0, 1, 0], [10 / sd, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(images.meta, coded, atol=1e-6)
    new, _, _ = data.encode_meta([{"age": "50", "sex": "male"}, {}], None, images.meta_spec)
    np.testing.assert_allclose(new, [coded[0], [0, 1, 0, 0, 1]], atol=1e-6)
    why = "sex=robot: a value not seen in training"
    refused(why, data.encode_meta, [{"sex": "robot"}], None, images.meta_spec)


def test_boxes_as_corner_and_size_are_told_apart(pictures):
    """As BUS-BRA has them: x, y, width, height, some of which pass for two corners."""
    rows = [f'{i},{"ab"[i % 2]},"{b}"' for i, b in enumerate(["2,3,20,30", "8,20,9,10", "20,3,8,30", "1,1,39,39"])]
    table = write_csv(pictures, rows, header="image,label,BBOX")
    why = r"2 of 4 images can't be read.*all 4 boxes make sense as xywh: give --box-format xywh"
    refused(why, quiet_load, table, 32, columns={"box": ["BBOX"]})
    options = f"--data {table} --box-columns BBOX --box-format xywh --cache {pictures}".split()
    images = load_images(parse(options), log=lambda _: None)
    np.testing.assert_allclose(images.boxes[:2] * 40, [[2, 3, 22, 33], [8, 20, 17, 30]], atol=1e-4)


def test_csv_mistakes_name_the_column_or_the_line(pictures):
    first, box = "0,a,,,,,,,,,", {"box": CORNERS}
    for second, why, columns in [
        ("1,b,,,,,,,,,", "no column 'lesion'", {"group": "lesion"}),
        ("1,b,,,,,,,,,", "no column 'weight'", {"meta": ["weight"]}),
        ("1,b,,nowhere,,,,,,,", "line 3: split", box),
        (
            "1,b,,,,,,9,9,3,3",
            r"1.png: its box \(9.0, 9.0, 3.0, 3.0\) is no x_min, y_min, x_max, y_max in its 40x40",
            box,
        ),
        ("1,b,,,,,,-1,0,0,5", r"its box \(-1.0, 0.0, 0.0, 5.0\) is no", box),  # nothing of it lies inside
        (",b,,,,,,,,,", "line 3: no image", box),
        ("gone,b,,,,,,,,,", "gone: no such file", {}),
    ]:
        refused(why, quiet_load, write_csv(pictures, [first, second]), 32, columns=columns)
    refused("--image-column", quiet_load, write_csv(pictures, ["0,a"], header="file,label"), 32)


def test_a_folder_without_labels_is_a_pool(pictures):
    for _ in range(2):
        images = quiet_load(pictures, 32, cache=pictures / "c")
    assert images.labels.tolist() == [-1] * 4
    assert images.splits == [""] * 4
    assert "4 not labelled" in images.summary()
    assert images.masks is None
    assert not [*pictures.rglob("masks.u8")]  # a source without masks costs no room for them


def test_sources_that_are_not_there(tmp_path):
    refused("no such file", quiet_load, tmp_path / "no", 32)
    refused("no images found", quiet_load, tmp_path, 32)
    (tmp_path / "HAM_metadata.csv").write_text("a\n")
    refused(r"HAM_metadata.csv: give that file", quiet_load, tmp_path, 32)
    (tmp_path / "x.txt").write_text("")
    refused("neither a folder", quiet_load, tmp_path / "x.txt", 32)


def test_all_bad_images_are_listed_at_once_or_skipped(tmp_path, capsys):
    class_folders(tmp_path)
    bad = bad_files(tmp_path / "benign")
    Image.new("L", (10, 10)).save(tmp_path / "malignant" / "malignant (1)_mask.png")  # not of its image's size
    said = refused("5 of 24 images can't be read", quiet_load, tmp_path, 32)
    assert all(words in said for words in [*bad, "its mask"])
    for cache in (None, tmp_path / "cache"):
        images = quiet_load(tmp_path, 32, skip_bad=True, cache=cache)
        assert (len(images), images.labels.sum()) == (19, 7)
        assert capsys.readouterr().out.count("skipped") == 5


def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "set")
    first = quiet_load(source, 32, cache=tmp_path / "cache")
    with monkeypatch.context() as m:
        m.setattr(data, "decode_entry", lambda *_: pytest.fail("decoded again"))
        second = quiet_load(source, 32, cache=tmp_path / "cache")
    for images in (second, quiet_load(source, 32)):
        assert torch.equal(first.pixels, images.pixels)
        assert torch.equal(first.masks, images.masks)
        assert torch.equal(first.boxes.nan_to_num(-1), images.boxes.nan_to_num(-1))
    changed = next((source / "benign").glob("*(3).png"))
    Image.new("L", (60, 40), 77).save(changed)
    third = quiet_load(source, 32, cache=tmp_path / "cache")
    assert (third.pixels[third.names.index(str(changed))] == 77).all()
    assert not list((tmp_path / "cache").glob("*.part"))
    refused("--cache", quiet_load, source, 32, cache=changed)  # a file, no folder


def test_a_cache_larger_than_the_memory_is_read(tmp_path):
    """Sparse files, as if so many pictures had been decoded. The system lends no memory of its own for so large a map."""
    picture().save(tmp_path / "a.png")
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    side, n = 4096, 1 + 2 * most // (3 * 4096**2)
    entries = [readers.Entry(str(tmp_path / "a.png"), "a")] * n
    folder = tmp_path / "cache" / data.cache_key(entries, side, 3, False, None)
    folder.mkdir(parents=True)
    for name, (kind, shape) in data.kept_files(entries, side, 3).items():
        with open(folder / name, "wb") as file:
            file.truncate(n * np.dtype(kind).itemsize * math.prod(shape))
    (folder / "cache.json").write_text(json.dumps({"kept": list(range(n)), "bad": []}))
    pixels, _, _, boxes, *_ = data.decode(entries, side, 3, cache=tmp_path / "cache")
    assert pixels.shape == (n, 3, side, side)
    assert not pixels[n - 1, :, 9, 9].any()
    boxes[0] = 1.0  # those of placeholder boxes are written, in memory
    assert not (folder / "boxes.f32").read_bytes().strip(b"\0")


def test_near_duplicates_are_found_and_named(tmp_path):
    for name, first in (("benign", 0), ("malignant", 50)):
        (tmp_path / name).mkdir()
        for i in range(12):
            picture(80, 60, seed=first + i).save(tmp_path / name / f"{i}.png")
    original = Image.open(tmp_path / "benign" / "0.png")
    original.point(lambda v: v * 0.7 + 20).save(tmp_path / "benign" / "brighter.png")
    original.resize((160, 120)).save(tmp_path / "benign" / "larger.jpg", quality=60)
    original.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "malignant" / "mirrored.png")
    said = []
    images = quiet_load(tmp_path, 64, log=said.append)
    index = {Path(n).name: i for i, n in enumerate(images.names)}
    same = [index[n] for n in ("brighter.png", "larger.jpg", "mirrored.png")] + [0]
    assert len(images.groups[same].unique()) == 1
    assert len(images.groups.unique()) == len(images) - 3
    (told,) = [line for line in said if "OPPOSITE" in line]
    assert "3 of these pairs have OPPOSITE LABELS" in told
    assert "mirrored.png" in told


def test_pictures_of_one_kind_are_no_near_duplicates_and_a_cut_one_is():  # 26
    """A dark spot on skin is what all of them show: only what is fine tells one from another."""
    y, x = np.mgrid[-1:1:96j, -1:1:128j]
    thumbs = []
    for i in range(16):
        coarse = np.random.default_rng(i).integers(0, 256, (14, 18), dtype=np.uint8)
        texture = np.asarray(Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC), float)
        spot = Image.fromarray((180 - 120 * np.exp(-4 * (x**2 + y**2)) + texture / 12).astype(np.uint8))
        thumbs.append(data.thumbnail(spot))
        if i < 4:  # one picture cut in two ways, the second turned round as well
            cut = spot.crop((0, 4 + i % 3, 128 - i % 5, 88)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            thumbs.append(data.thumbnail(cut))
    thumbs = torch.from_numpy(np.stack(thumbs))
    assert len(grouping.look_alikes(thumbs)[0]) == 20 * 19 / 2
    assert data.near_duplicates(thumbs).tolist() == [[i, i + 1] for i in range(0, 8, 2)]
    again = data.near_duplicates(thumbs.flip(0)).tolist()  # whichever comes first
    assert sorted([19 - j, 19 - i] for i, j in again) == [[i, i + 1] for i in range(0, 8, 2)]


def test_near_duplicates_against_brute_force_and_merged_transitively():
    thumbs = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    thumbs[7], thumbs[30] = thumbs[2], thumbs[5].flip(2)
    pairs, mirrored = grouping.look_alikes(thumbs, threshold=0.3)
    table = np.corrcoef(torch.cat([thumbs, thumbs.flip(3)]).double().flatten(1).numpy())[:40]
    straight, turned = table[:, :40], table[:, 40:]
    expected = np.argwhere(np.triu(np.maximum(straight, turned), 1) >= 0.3)
    assert pairs.tolist() == expected.tolist()
    assert mirrored.tolist() == (turned > straight)[tuple(expected.T)].tolist()
    groups = data.merge_groups(torch.arange(6), torch.tensor([[0, 3], [3, 5], [1, 2]]))
    assert groups.tolist() == [0, 1, 1, 0, 2, 0]


def altered_phantoms(n, copies, size=64):
    """Thumbnails (n + copies): phantoms, and of the first of them a darker, cut, mirrored, coarse or noisy copy."""
    pixels, rng, more = phantoms.phantoms(n, size)[0], np.random.default_rng(0), []
    for i, image in enumerate(Image.fromarray(p[0].numpy()) for p in pixels[:copies]):
        flipped, noise = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rng.normal(0, 8, (size, size))
        more.append((
            image.point(lambda v: v * 0.7), flipped.crop((0, 0, size - 2, size - i % 3)), flipped,
            image.resize((20, 20)).resize((size, size)), Image.fromarray((np.asarray(flipped) + noise).clip(0, 255).astype(np.uint8)),
        )[i % 5])  # fmt: skip
    return torch.from_numpy(
        np.stack([data.thumbnail(p) for p in [*(Image.fromarray(p[0].numpy()) for p in pixels), *more]])
    )


def test_near_duplicates_by_hashes_are_those_of_the_full_search(monkeypatch):
    thumbs = altered_phantoms(900, 200)
    order = torch.randperm(len(thumbs), generator=seeded())
    thumbs = thumbs[order]
    for found, full in zip(grouping.hashed_look_alikes(thumbs), grouping.look_alikes(thumbs), strict=True):
        assert len(found) > 100
        assert torch.equal(found, full)  # pairs in the same order, and which of them are mirrored
    full = data.near_duplicates(thumbs)
    monkeypatch.setattr(grouping, "MOST_COMPARED", 1000)
    assert torch.equal(data.near_duplicates(thumbs), full)
    planted = order[full].sort(1).values
    assert (planted[:, 1] - planted[:, 0] == 900).all()
    for few in (thumbs[:0], thumbs[:1], thumbs[:2], torch.full((300, 1, 28, 28), 9, dtype=torch.uint8)):  # blank
        assert grouping.hashed_look_alikes(few)[0].shape == (0, 2)
    same = torch.cat([thumbs[:50], thumbs[3:4].expand(2000, -1, -1, -1), thumbs[3:4].flip(3)])
    pairs, mirrored = grouping.hashed_look_alikes(same, most=5)  # of thousands alike not all pairs, but a single group
    groups = data.merge_groups(torch.arange(len(same)), pairs)
    assert len(pairs) <= 5 * len(same)
    assert (groups[50:] == groups[3]).all()
    assert mirrored.tolist() == (pairs[:, 1] == len(same) - 1).tolist()


def plain_partition(labels, groups, shares, seed):
    """The same by a table of counts, an operation on all parts and classes a group."""
    shares = torch.tensor(shares, dtype=torch.double) / sum(shares)
    counts = torch.zeros(int(groups.max()) + 1, int(labels.max()) + 1, dtype=torch.double)
    counts.index_put_((groups, labels), torch.ones(len(labels), dtype=torch.double), accumulate=True)
    target, draw = shares[:, None] * counts.sum(0), torch.Generator().manual_seed(seed)
    filled, part = torch.zeros_like(target), torch.zeros(len(counts), dtype=torch.long)
    order, ties = torch.randperm(len(counts), generator=draw), 1e-6 * torch.rand(target.shape, generator=draw)
    for g in order[torch.argsort(counts[order].sum(1).log2().floor(), descending=True, stable=True)].tolist():
        part[g] = (((target - filled) / target.clamp(min=1e-9) + ties) * (counts[g] > 0)).sum(1).argmax()
        filled[part[g]] += counts[g]
    return part[groups]


def test_partition_is_that_of_the_plain_table_to_the_image():
    generator = seeded()
    for trial in range(60):
        n, classes, most = (
            int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((1, 400), (1, 8), (1, 400))
        )
        labels, groups = (
            torch.randint(v, (n,), generator=generator).unique(return_inverse=True)[1] for v in (classes, most)
        )
        shares = ([0.7, 0.1, 0.2], [1] * 5, [7, 1], [0.25, 0.75])[trial % 4]
        assert torch.equal(
            data.partition(labels, groups, shares, trial), plain_partition(labels, groups, shares, trial)
        )
    assert not len(data.partition(labels[:0], groups[:0], [1, 1], 0))


def test_no_option_that_changes_the_pixels_changes_the_splits(tmp_path):
    """Else a teacher, a search over sizes or pretrained weights would have seen what is a test image elsewhere."""
    for name, few in (("benign", 0), ("malignant", 40)):
        (tmp_path / name).mkdir()
        for i in range(40):
            sketch = picture(90, 70, seed=few + i)
            sketch.save(tmp_path / name / f"{i}.png")
            if i % 4 == 0:  # the same a little cut at the bottom, noisy, of another format
                cut = np.asarray(sketch.crop((0, 0, 90, 66))) + np.random.default_rng(i).normal(0, 10, (66, 90))
                Image.fromarray(cut.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i} again.jpg", quality=40)
    first = quiet_load(tmp_path, 16)
    assert len(first.groups.unique()) == 80
    for size, options in ((61, {}), (16, {"equalise": True}), (128, {"channels": 3, "cache": tmp_path / "c"})):
        other = quiet_load(tmp_path, size, **options)
        assert torch.equal(other.groups, first.groups)
        assert other.splits == first.splits


@pytest.mark.parametrize("seed", range(20))
def test_partition_is_stratified_and_splits_no_group(seed):
    generator, shares = torch.Generator().manual_seed(seed), [0.7, 0.1, 0.2]
    labels = (torch.rand(300, generator=generator) < 0.3).long()
    groups = torch.randint(0, 120, (300,), generator=generator)
    part, again, other = (data.partition(labels, groups, shares, s) for s in (seed, seed, seed + 1))
    assert torch.equal(part, again)
    assert not torch.equal(part, other)
    assert len(torch.stack([groups, part], 1).unique(dim=0)) == len(groups.unique())
    for c in (0, 1):
        found = [float((part[labels == c] == k).float().mean()) for k in range(3)]
        assert found == pytest.approx(shares, abs=0.05)


def test_another_seed_makes_other_folds_of_patients_of_distinct_sizes():  # 22
    sizes = torch.tensor([round(10 * 1.07**i) for i in range(60)])
    groups = torch.arange(60).repeat_interleave(sizes)
    labels = (torch.rand(len(groups), generator=seeded()) < 0.4).long()
    folds = torch.stack([data.partition(labels, groups, [1] * 5, seed) for seed in range(8)])
    counts = torch.stack([fold.bincount(minlength=5) for fold in folds])
    assert (counts / len(groups) - 0.2).abs().max() < 0.03
    same = [float((a == b).float().mean()) for a, b in itertools.combinations(folds, 2)]
    assert 0.15 < np.mean(same) < 0.3  # chance: 0.2
    assert not (folds == folds[0]).all(0).any()  # nobody is always in the same


@pytest.mark.parametrize("size", [32, 64])
def test_a_linear_model_on_the_phantoms_pixels_is_lost_slow(size):
    images = quiet_load(None, size)
    x, rows = images.pixels.flatten(1).float() / 255, images.rows("train")
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    rest, known = torch.cat([images.rows("val"), images.rows("test")]), images.labels[rows] - 0.4
    products, ridge = x @ x[rows].T, size**2 * torch.eye(len(rows))  # ridge regression in its dual form
    weights = [torch.linalg.solve(products[rows] + decay * ridge, known) for decay in (0.001, 0.1, 1, 10)]
    assert max(float(metrics.auc(products[rest] @ w, images.labels[rest])) for w in weights) < 0.75


# ---------------------------------------------------------------------------------------------------------------------
# models.py


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_every_backbone_makes_both_networks_and_takes_grey_images_unchanged_slow(monkeypatch, name):
    torch.manual_seed(0)
    whole, grey = backbones.whole_network(name), torch.rand(2, 1, 96, 96)
    monkeypatch.setattr(backbones, "whole_network", lambda *_: whole)  # to draw its weights takes longest: once
    features, width = backbones.build_backbone(name, channels=3)
    with torch.no_grad():
        copied = features.eval()(grey.expand(-1, 3, -1, -1))
        net = models.CNet(name, classes=2, channels=1).eval()  # the classifier around the same features
        maps = backbones.feature_pyramid(net.features, grey)
        torch.testing.assert_close(maps[-1], copied, atol=1e-3 * float(copied.abs().max()), rtol=1e-3)
        assert copied.shape[1] == width
        assert net(grey).shape == (2, 1)
        assert net.embed(grey).shape == (2, width)
        dnet = models.DNet(name, channels=1).eval()
        for p in dnet.head.parameters():  # boxes are ordered by construction, whatever the weights
            torch.nn.init.normal_(p, std=3.0)
        logits, cells = dnet(grey)
        assert logits.shape[1:] == cells.shape[2:] == (maps[0].shape[-1],) * 2 or logits.shape[-1] <= 64
        box = dnet.find(grey).boxes()
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(set(sides), reverse=True)
    assert box.shape == (2, 4)
    assert (box[:, :2] < box[:, 2:]).all()


def test_logits_classes_and_metadata():
    x, meta = torch.rand(3, 3, 32, 32), torch.randn(3, 5)
    assert models.CNet("small_cnn", 7, 3)(x).shape == (3, 7)
    net = models.CNet("small_cnn", 2, 3, meta=5).eval()
    assert net(x, meta).shape == (3, 1)
    assert not torch.allclose(net(x, meta), net(x, meta + 1))
    refused("metadata", net, x)
    blind = models.CNet("none", channels=3, meta=5).eval()
    assert torch.equal(blind(x, meta), blind(1 - x, meta))
    assert not torch.allclose(blind(x, meta), blind(x, meta + 1))
    refused("needs patient data", models.CNet, "none")
    p = models.to_probabilities(torch.tensor([[0.3], [-2.0]]))
    torch.testing.assert_close(p[:, 1], torch.sigmoid(torch.tensor([[0.3], [-2.0]]).double())[:, 0])
    torch.testing.assert_close(p.sum(1), torch.ones(2).double())
    refused("no such network", models.CNet, "resnet19")
    refused("2 channels", models.CNet, "small_cnn", channels=2)


def test_every_network_standardises_each_image_by_itself():
    x = torch.rand(2, 1, 16, 16)
    a, b = backbones.standardise(x, "image"), backbones.standardise(x * 0.5 + 0.2, "image")
    torch.testing.assert_close(a, b, atol=0.2, rtol=0.1)  # gain and offset are gone, up to the guard for blank images
    assert backbones.standardise(torch.full((1, 1, 4, 4), 7, dtype=torch.uint8), "image").abs().max() < 1e-3
    torch.testing.assert_close(backbones.standardise(x, "fixed"), (x - 0.45) / 0.226)


def test_ensemble_by_hand():
    torch.manual_seed(0)
    members = [models.CNet("small_cnn", 2, 1).eval() for _ in range(3)]
    ensemble, x = models.Ensemble(members, [0.5, 0.3, 0.2], classes=["a", "b"], size=32), torch.rand(4, 1, 32, 32)
    for m in members:  # untrained logits would all be alike
        torch.nn.init.normal_(m.head.bias)
    p = torch.stack([torch.sigmoid(m(x)[:, 0].double()) for m in members])
    mean = torch.tensor([0.5, 0.3, 0.2]).double() @ p
    torch.testing.assert_close(ensemble(x)[:, 1], mean, atol=1e-6, rtol=0)
    ensemble.info["temperature"] = 2.0
    expected = torch.sigmoid(torch.log(mean / (1 - mean)) / 2)
    found, spread = ensemble.conclude(ensemble.look(x, views=1).opinions)
    for answer in (ensemble(x), found):
        torch.testing.assert_close(answer[:, 1], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(spread, p.std(0, correction=0))


def small_model(classes=("benign", "malignant"), roi="none", **info):
    torch.manual_seed(0)
    members = [models.CNet("small_cnn", len(classes), 1, roi=roi) for _ in range(2)]
    for m in members:  # untrained logits would all be alike
        torch.nn.init.normal_(m.head.weight, std=1.0)
    info |= {"classes": list(classes), "size": 32, "load_size": 32, "channels": 1}
    return models.Ensemble(members, [0.7, 0.3], [models.DNet("small_cnn", 1)], **info).eval()


@pytest.mark.parametrize("kind", ["se", "condenser"])
def test_attention_starts_as_the_identity_and_learns(kind):
    torch.manual_seed(0)
    module, maps = backbones.ATTENTION[kind](64), torch.randn(2, 64, 5, 3)
    torch.testing.assert_close(module(maps), maps)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (module(maps) - 2 * maps.relu()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    gates = module(maps) / maps
    if kind == "se":  # by hand: one gate a channel
        torch.testing.assert_close(gates, gates[:, :, :1, :1].expand_as(gates), atol=1e-4, rtol=1e-4)
    else:  # V + s V sigmoid(A), A the same over each condensed 2 x 2 block
        gates = (gates - 1) / module.scale
        assert ((gates > -1e-3) & (gates < 1 + 1e-3)).all()
        torch.testing.assert_close(gates[:, :, 0, 0], gates[:, :, 1, 1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", list(backbones.ATTENTION))
def test_attention_is_saved_and_explained(tmp_path, kind):
    torch.manual_seed(0)
    net = models.CNet("small_cnn", attention=kind).eval()
    for p in [*net.attention.parameters(), net.head.weight]:
        torch.nn.init.normal_(p, std=0.5)
    models.save(tmp_path / "m.pt", models.Ensemble([net], classes=["a", "b"], size=32, load_size=32, channels=1))
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(models.load(tmp_path / "m.pt").members[0](x), net(x))
    maps = net.features(backbones.standardise(x, "image")).detach().requires_grad_()  # Grad-CAM by hand, through it
    gradient = torch.autograd.grad(net.head(net.attention(maps).mean((2, 3))).sum(), maps)[0]
    by_hand = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().detach()
    large = F.interpolate(by_hand, size=(32, 32), mode="bilinear")[:, 0]
    most = float(large.amax())  # tiny: no fixed tolerance would notice anything
    assert most > 0
    torch.testing.assert_close(saliency.grad_cam(net, x, 1, net.features), large, atol=1e-4 * most, rtol=1e-4)


def test_a_model_file_suffices_to_predict(tmp_path):
    model, x = small_model("abc", "dnet", temperature=1.7, threshold=0.2), torch.rand(2, 1, 32, 32)
    models.save(tmp_path / "run" / "model.pt", model)
    torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    for path in (tmp_path / "run" / "model.pt", tmp_path / "run"):
        again = models.load(path)
        assert again.info == model.info
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(x, again.locate(x)), model(x, model.locate(x)))


def test_what_is_no_model_file_is_said_to_be_none(tmp_path):
    models.save(tmp_path / "m.pt", small_model())
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    (tmp_path / "cut").write_bytes((tmp_path / "m.pt").read_bytes()[:1000])
    (tmp_path / "text").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "state")
    torch.save(argparse.Namespace(x=1), tmp_path / "object")
    torch.save({**content, "version": 99}, tmp_path / "newer")
    torch.save({k: v for k, v in content.items() if k != "members"}, tmp_path / "less")
    words = {"cut": "damaged", "text": "damaged", "state": "not a model file", "object": "more than tensors"}
    words |= {"newer": "version 99", "less": "parts missing", "nowhere": "no such file"}
    for name, why in words.items():
        assert "\n" not in refused(why, models.load, tmp_path / name)


def test_weights_from_a_file(tmp_path, capsys):
    source = torch.nn.Module()
    source.features = backbones.small_cnn()
    state, weights = source.state_dict(), str(tmp_path / "w.pth")
    torch.save({**state, "classifier.weight": torch.zeros(3)}, weights)
    net = models.CNet("small_cnn", 2, 3, weights=weights)
    assert all(torch.equal(v, state[f"features.{k}"]) for k, v in net.features.state_dict().items())
    assert "classifier" not in capsys.readouterr().out  # a head, which is not wanted
    state.pop("features.0.0.weight")
    torch.save(state, weights)
    models.CNet("small_cnn", 2, 3, weights=weights)
    assert "1 missing in the file: features.0.0.weight" in capsys.readouterr().out
    torch.save({"x": torch.zeros(1)}, weights)
    refused("not one of its 1 tensors fits", models.CNet, "small_cnn", weights=weights)
    refused("no such file", models.CNet, "small_cnn", weights=f"{weights}.nowhere")
    refused("small_cnn is our own", models.CNet, "small_cnn", weights="imagenet")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "last.pt"
    files.write_atomically(path, b"old")
    (tmp_path / "last.pt.part").symlink_to("/dev/full")  # every write to it fails: no space left on device
    refused("No space left", files.write_atomically, path, b"new" * 100_000)
    refused("Not a directory", files.write_atomically, Path("/dev/null/x/y"), b"new")
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------------------------
# metrics.py


def test_auc_is_the_share_of_ordered_pairs():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = rng.integers(4, 40)
        scores, labels, counts = rng.integers(0, 6, n) / 5, rng.integers(0, 2, n), rng.integers(0, 4, n)  # many ties
        labels[:2], counts[:2] = [0, 1], 1
        s, t = scores[labels == 1][:, None], scores[labels == 0][None]
        share = ((s > t) + 0.5 * (s == t)).mean()
        assert float(metrics.auc(scores, labels)) == pytest.approx(share)
        assert float(torch.trapezoid(*metrics.roc_curve(scores, labels)[::-1])) == pytest.approx(share)
        drawn, groups = np.repeat(np.arange(n), counts), rng.integers(0, 3, n)  # a weight of 3 is the image three times
        weighted = metrics.auc(scores, labels, counts[None])
        assert float(weighted) == pytest.approx(float(metrics.auc(scores[drawn], labels[drawn])))
        of_groups = torch.tensor([[1.0, 2, 1], [3, 1, 4]])
        by_group = metrics.auc(scores, labels, of_groups.double(), torch.tensor(groups))
        assert torch.equal(metrics.auc(scores, labels, of_groups[:, groups]), by_group)


def test_the_threshold_is_the_largest_that_reaches_the_sensitivity():
    rng = np.random.default_rng(0)
    for target in (0.5, 0.8, 0.95, 1.0) * 20:
        scores, labels = rng.random(30).round(2), rng.integers(0, 2, 30)
        candidates = [t for t in scores if (scores[labels == 1] >= t).mean() >= target - 1e-9]
        assert metrics.threshold_for_sensitivity(scores, labels, target) == max(candidates)


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_by_counting(classes):
    rng = np.random.default_rng(classes)
    p, y = rng.dirichlet(np.ones(classes), 50), rng.integers(0, classes, 50)
    found = {k: float(v) for k, v in metrics.evaluate(p, y, 0.3).items()}
    said = (p[:, 1] >= 0.3).astype(int) if classes == 2 else p.argmax(1)
    each = []
    for c in range(classes):
        tp, fp, fn = (int(((said == c) == a)[(y == c) == b].sum()) for a, b in ((1, 1), (1, 0), (0, 1)))
        specificity, f1 = (50 - tp - fp - fn) / (50 - tp - fn), 2 * tp / (2 * tp + fp + fn)
        each.append([tp / (tp + fn), specificity, f1, float(metrics.auc(p[:, c], y == c))])
    expected = each[1] if classes == 2 else np.mean(each, 0)
    assert [found[k] for k in ("sensitivity", "specificity", "f1", "auc")] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((said == y).mean())
    assert found["balanced_accuracy"] == pytest.approx(np.mean(each, 0)[0])
    predicted, true = (p[:, 1], y == 1) if classes == 2 else (p.max(1), said == y)
    bins = (predicted * metrics.BINS).astype(int)
    gaps = [(bins == b).mean() * abs((true - predicted)[bins == b].mean()) for b in np.unique(bins)]
    assert found["ece"] == pytest.approx(sum(gaps))
    counts = [[((y == a) & (said == b)).sum() for b in range(classes)] for a in range(classes)]
    assert metrics.confusion(said, y, classes).tolist() == counts


def test_arrays_lists_and_halves_are_taken():
    rng = np.random.default_rng(0)
    p = (rng.dirichlet(np.ones(2), 60) * 64).round() / 64  # what bfloat16 holds too
    y, groups, iou = rng.integers(0, 2, 60), rng.integers(0, 20, 60), rng.random(60)
    report = metrics.with_intervals
    expected = report(torch.tensor(p), torch.tensor(y), torch.tensor(groups), 0.4, torch.tensor(iou))
    names = [f"patient {g:02d}" for g in groups]
    assert report(p.tolist(), y.tolist(), names, [0.4] * 60, iou.tolist()) == expected
    mirrored = p[:, ::-1].copy()[:, ::-1], y[::-1].astype(np.int32).copy()[::-1]  # negative strides
    assert report(*mirrored, groups.tolist(), np.full(60, 0.4), iou) == expected
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        half = report(torch.tensor(p).to(kind).requires_grad_(), y, groups, 0.4, iou)
        assert all(half[k] == pytest.approx(m, abs=1e-6) for k, m in expected.items())
    with torch.inference_mode():
        assert report(torch.tensor(p), torch.tensor(y), groups, 0.4, torch.tensor(iou)) == expected
        assert "auc" in metrics.change_with_intervals((torch.tensor(p), 0.4, None), (torch.tensor(p), 0.5, None), y)
    assert report(p, y) == report(p, y, np.arange(60))
    said = (p[:, 1] >= 0.4).tolist()
    assert metrics.decide(p.tolist(), 0.4).tolist() == metrics.decide(p, np.float64(0.4)).tolist() == said
    assert metrics.fit_temperature(p, y) == metrics.fit_temperature(p.tolist(), y.tolist())


def test_metrics_of_what_does_not_fit_are_value_errors():
    for wrong, why in [
        (lambda: metrics.auc([0.1, 0.2], [0, 1, 1]), r"labels of shape \(3,\)"),
        (lambda: metrics.auc([0.1, 0.2], [0, 2]), "0 to 1"),
        (lambda: metrics.auc([[0.1], [0.2]], [0, 1]), "scores of shape"),
        (lambda: metrics.auc([0.1, math.nan], [0, 1]), "scores: NaN"),
        (lambda: metrics.auc([0.1, 0.2], [0, 1], torch.ones(2)), r"weights of shape .* must be \(B, 2\)"),
        (lambda: metrics.roc_curve([0.1], [0, 1]), "labels of shape"),
        (lambda: metrics.threshold_for_balance([0.1, 0.2], [0, -1]), "0 to 1"),
        (lambda: metrics.threshold_for_sensitivity([0.1, 0.2], [0, 0.5], 0.9), "whole numbers"),
        (lambda: metrics.evaluate([[0.5, 0.5]], [-1]), "0 to 1; leave out images without a label"),
        (lambda: metrics.evaluate([0.5, 0.5], [0, 1]), "probabilities of shape"),
        (lambda: metrics.evaluate([[0.5], [0.5]], [0, 1]), "column a class"),
        (lambda: metrics.evaluate([[-2.0, 3.0]], [1]), r"in \[0, 1\]"),
        (lambda: metrics.evaluate([[math.nan, 0.5]], [1]), "probabilities: NaN"),
        (lambda: metrics.evaluate([[0.5, 0.5]], [1], [0.5, 0.5]), "threshold of shape"),
        (lambda: metrics.evaluate([[0.5, 0.5]], [1], math.nan), "threshold: NaN"),
        (lambda: metrics.confusion([0, 1], [0, 3], 3), "0 to 2"),
        (lambda: metrics.confusion([0, 1], [0], 3), "predicted of shape"),
        (lambda: metrics.with_intervals([[0.5, 0.5]] * 3, [0, 1, 1], [1, 2]), "2 groups for 3 images"),
        (lambda: metrics.with_intervals([[0.5, 0.5]] * 3, [0, 1, 1], iou=[0.5] * 4), "4 images, 3"),
        (lambda: metrics.fit_temperature([[0.5, 0.5]], [0, 1]), "labels of shape"),
        (lambda: metrics.paired_iou([[0, 0, 1, 1]], [[0, 0, 1]]), "must both be"),
    ]:
        with pytest.raises(ValueError, match=why):
            wrong()


def test_a_class_without_images_gives_nan():
    for labels in ([0, 0, 0], [1, 1, 1], []):
        scores, without = torch.linspace(0.2, 0.8, len(labels)), [c not in labels for c in (0, 1)]
        report = metrics.with_intervals(torch.stack([1 - scores, scores], 1), labels)
        assert all(math.isnan(v) for k in ("auc", "balanced_accuracy") for v in report[k].values())
        assert math.isfinite(report["accuracy"]["low"]) == (len(labels) == 3)
        assert math.isnan(metrics.threshold_for_balance(scores, labels))
        assert math.isnan(metrics.threshold_for_sensitivity(scores, labels, 0.9)) == without[1]
        assert [bool(rate[1:].isnan().all()) for rate in metrics.roc_curve(scores, labels)] == without
    found = metrics.evaluate(torch.eye(3), [0, 1, 1])  # class 2 has none: no macro mean, but an accuracy
    assert found["sensitivity"].isnan()
    assert float(found["accuracy"]) == pytest.approx(2 / 3)
    assert math.isnan(metrics.fit_temperature(torch.zeros(0, 2), []))
    nowhere = metrics.with_intervals(None, None, iou=[math.nan] * 4)
    assert all(math.isnan(v) for m in nowhere.values() for v in m.values())


def bootstrap_weights(groups, replicates=metrics.REPLICATES):
    """How often each image is drawn, in the draws that the intervals make."""
    index = metrics.group_index(groups, len(groups))
    return metrics.drawn_groups(int(index.max()) + 1, replicates, torch.Generator().manual_seed(0))[:, index]


def test_the_bootstrap_draws_whole_groups():
    weights = bootstrap_weights([5, 5, 5, 2, 9, 9], 500)
    assert torch.equal(weights, weights[:, [0, 0, 0, 3, 4, 4]])
    assert (weights[:, [0, 3, 4]].sum(1) == 3).all()  # three groups are drawn each time
    assert float(weights.mean()) == pytest.approx(1, abs=0.1)


def test_intervals_have_the_textbook_width_and_grow_with_groups(monkeypatch):
    y = torch.arange(400) % 2
    right = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.8
    p = torch.where(right, y, 1 - y).double() * 0.8 + 0.1
    p = torch.stack([1 - p, p], 1)
    m = metrics.with_intervals(p, y)["accuracy"]
    normal = 1.96 * math.sqrt(m["value"] * (1 - m["value"]) / 400)
    assert [m["value"] - m["low"], m["high"] - m["value"]] == pytest.approx([normal] * 2, rel=0.2)
    double = metrics.with_intervals(p.repeat(2, 1), y.repeat(2), torch.arange(400).repeat(2))["accuracy"]
    assert double == pytest.approx(m)  # copies of an image are no new evidence
    monkeypatch.setattr(metrics, "WEIGHTS_AT_ONCE", 400 * 300)  # as of a large split: in seven parts
    assert metrics.with_intervals(p, y)["accuracy"] == m


def test_far_from_the_edge_the_interval_is_the_percentile_bootstrap():
    rng = np.random.default_rng(0)
    y, groups, iou = rng.integers(0, 3, 300), rng.integers(0, 120, 300), rng.random(300)
    p = torch.tensor(rng.normal(size=(300, 3)) + np.eye(3)[y]).softmax(1)
    draws = metrics.measure(p, y, iou=iou, weights=bootstrap_weights(groups))
    report = metrics.with_intervals(p, y, groups, iou=iou)
    plain = metrics.resample(lambda w: metrics.measure(p, y, iou=iou, weights=w), groups)
    for name in draws.keys() - {"ece"}:
        ends = np.quantile(draws[name].numpy(), [0.025, 0.975])
        for found, error in ((report, 1e-6), (plain, 1e-9)):  # the first is summed by group, in float32
            assert [found[name]["low"], found[name]["high"]] == pytest.approx(ends, abs=error)


def chance(hits, n, p):
    return math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)


def clopper_pearson(hits, n):
    """By bisection on the binomial tail, the upper end by the misses."""

    def least(hits):
        low, high = 0.0, 1.0
        for _ in range(40):
            p = (low + high) / 2
            low, high = (low, p) if sum(chance(x, n, p) for x in range(hits, n + 1)) > 0.025 else (p, high)
        return low

    return least(hits), 1 - least(n - hits)


@pytest.mark.parametrize("n", [20, 34, 160])
def test_a_share_is_covered_up_to_the_edge(n):
    def interval(hits, size=1):
        found = torch.tensor([1.0] * hits + [0.0] * (n - hits)).repeat_interleave(size)
        m = metrics.with_intervals(None, None, torch.arange(n).repeat_interleave(size), iou=found)["iou_at_50"]
        assert m["low"] <= m["value"] <= m["high"]
        return m["low"], m["high"]

    assert interval(n) == pytest.approx(clopper_pearson(n, n))  # 34 of 34: [0.897, 1.000]
    assert interval(0) == pytest.approx(clopper_pearson(0, n))
    for hits in (n, n - 2):
        assert interval(hits, 5) == pytest.approx(interval(hits), abs=1e-6)  # five images that share their fate are one
    for p in (0.9, 0.97, 1.0):  # each outcome that may be met: no simulation needed
        rows = [(chance(x, n, p), *interval(x), *clopper_pearson(x, n)) for x in range(n + 1) if chance(x, n, p) > 1e-5]
        assert sum(c for c, low, high, _, _ in rows if low <= p <= high) >= 0.94
        exact = sum(c * (top - bottom) for c, _, _, bottom, top in rows)
        assert 0.85 * exact < sum(c * (high - low) for c, low, high, _, _ in rows) < 1.1 * exact


def test_coverage_by_simulation(monkeypatch):
    monkeypatch.setattr(metrics, "REPLICATES", 200)
    g = torch.Generator().manual_seed(0)

    def of(p, y, name):
        return metrics.with_intervals(torch.stack([1 - p, p], 1), y)[name]

    def two_classes(name, positives, negatives, hit):  # all answers at 0.1 and 0.9
        y = torch.arange(positives + negatives) < positives
        right = torch.rand(len(y), generator=g) < hit
        return of((y == right).double() * 0.8 + 0.1, y, name)

    def clustered():  # 34 patients of 1 to 8 images that share their fate
        groups = torch.arange(34).repeat_interleave(torch.randint(1, 9, (34,), generator=g))
        found = (torch.rand(34, generator=g) < 0.97)[groups]
        return metrics.with_intervals(None, None, groups, iou=found.double())["iou_at_50"]

    def binormal():
        y = torch.arange(68) % 2
        return of((torch.randn(68, generator=g) + 3 * y).sigmoid(), y, "auc")

    def calibrated():  # its true ECE is 0, what is measured is noise
        p = torch.rand(100, generator=g)
        return of(p, torch.rand(100, generator=g) < p, "ece")

    def righted(share):
        before = (torch.rand(34, generator=g) >= share).double()
        return metrics.change_with_intervals((None, 0.5, before), (None, 0.5, torch.ones(34)), None)["iou_at_50"]

    area = float(torch.special.ndtr(torch.tensor(3 / math.sqrt(2))))
    for truth, least, widest, draw in (
        (0.97, 0.91, 0.25, clustered),
        (area, 0.91, 0.11, binormal),
        (0.0, 0.91, 0.3, calibrated),
        (0.97, 0.91, 0.12, lambda: two_classes("balanced_accuracy", 34, 300, 0.97)),  # the positives' one or no miss
        (2 * 33 / (2 * 33 + 2), 0.91, 0.17, lambda: two_classes("f1", 34, 34, 33 / 34)),
        (0.03, 0.93, 2, lambda: righted(0.03)),
        (0.1, 0.93, 2, lambda: righted(0.1)),
    ):
        found = [draw() for _ in range(60)]
        assert all(m["low"] <= m["value"] <= m["high"] for m in found)
        assert np.mean([m["low"] <= truth <= m["high"] for m in found]) >= least, draw
        assert np.mean([m["high"] - m["low"] for m in found]) < widest, draw


def test_no_metric_is_certain_at_the_edge():
    y, one = torch.arange(68) % 2, 1 - 0.025 ** (1 / 34)
    p = torch.stack([1 - y, y], 1).double()
    report = metrics.with_intervals(p, y, iou=torch.ones(68))
    assert metrics.interval_text(report["sensitivity"]) == "1.000 [0.897, 1.000]"
    assert all(m["value"] == 1 == m["high"] and 0.85 < m["low"] < 0.97 for k, m in report.items() if k != "ece")
    assert report["ece"]["value"] == report["ece"]["low"] == 0
    assert report["auc"]["low"] == pytest.approx(1 - one / 2)
    own = metrics.resample(lambda w: metrics.evaluate(p, y, 0.5, w), torch.arange(68), metrics.evidence(y, 2))
    assert all(m == pytest.approx(report[k], abs=1e-6) for k, m in own.items())  # as infer.py: a measure of its own
    paired = metrics.with_intervals(p, y, torch.arange(68) // 4)  # two images a patient tell no more than one
    assert paired["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / 17))
    many = metrics.with_intervals(torch.eye(3).repeat(20, 1), torch.arange(60) % 3)
    assert many["sensitivity"]["low"] == pytest.approx(1 - (1 - 0.025 ** (1 / 20)) / 3)  # one class may hide all errors
    p = p * 0.8 + 0.1
    change = metrics.change_with_intervals((p, 0.5, None), (p, 0.6, None), y)  # none was seen, some may be
    for m in change.values():
        assert (m["value"], m["low"], m["before"]) == (0, -m["high"], m["after"])
        assert 0.02 < m["high"] < 0.11
    assert metrics.interval_text(change["sensitivity"], "+.3f") == f"+0.000 [{-one:+.3f}, {one:+.3f}]"


def test_too_few_groups_say_nothing():
    p, y = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    reports = [metrics.change_with_intervals((p, 0.5, None), (p, 0.6, None), y)]
    for times in (1, 30):  # 2 images, or 60 of 2 patients
        reports.append(metrics.with_intervals(p.repeat(times, 1), y.repeat(times), torch.arange(2).repeat(times)))
    assert {metrics.interval_text(m)[6:] for report in reports for m in report.values()} == {"(too few)"}
    three = metrics.with_intervals(p[[0] * 50 + [1] * 2], [0] * 50 + [1] * 2)  # two cancers: nothing of the sensitivity
    assert all(math.isnan(three[k]["low"]) for k in ("sensitivity", "auc"))
    assert three["specificity"]["low"] == pytest.approx(0.025 ** (1 / 50))
    for parts, low in ((None, 1), ({"a": 1}, 0.025 ** (1 / 9))):  # without parts: plain percentiles
        m = metrics.resample(lambda w: {"a": torch.ones(1) if w is None else w.sum(1) / w.sum(1)}, range(9), parts)["a"]
        assert (m["low"], m["high"]) == pytest.approx((low, 1))
    assert metrics.interval_text({"value": None, "low": None, "high": None}) == "nan (too few)"
    assert metrics.interval_text({"value": 0.9414, "low": 0.893, "high": 0.9707}) == "0.941 [0.893, 0.971]"


def test_the_example_of_metrics_runs_as_printed(capsys):
    example = "\n".join(re.findall(r"^    (.*)$", metrics.__doc__, re.M))
    exec(example, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (.*)$", example, re.M)[1]


def test_iou_by_counting_pixels():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 10, (50, 2, 2))
    for pair in np.concatenate([low, low + rng.integers(1, 10, (50, 2, 2))], 2):
        a, b = np.zeros((2, 20, 20), bool)
        for grid, (x0, y0, x1, y1) in zip((a, b), pair, strict=True):
            grid[y0:y1, x0:x1] = True
        found = metrics.paired_iou(pair[:1].tolist(), pair[1:].astype(np.float32))
        assert float(found) == pytest.approx((a & b).sum() / (a | b).sum())
    found = metrics.means(metrics.localisation([0.4, 0.8, math.nan]))
    assert (float(found["iou"]), float(found["iou_at_50"])) == pytest.approx((0.6, 0.5))


def test_the_temperature_that_was_put_in_is_found():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(10_000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for t in (2.5, 1.0):
        assert metrics.fit_temperature((logits * t).softmax(1), labels) == pytest.approx(t, rel=0.05)


def test_the_t_interval_is_that_of_the_tables():
    # quantiles and tail areas as printed in tables of Student's t
    for n, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)):
        values = torch.arange(n).double()
        mean, low, high, _ = metrics.mean_interval(values)
        error = float(values.std()) / math.sqrt(n)
        assert mean == pytest.approx(float(values.mean()))
        assert [(high - mean) / error, (mean - low) / error] == pytest.approx([quantile] * 2, abs=6e-4)
        shifted = values - values.mean() + quantile * error  # just at the edge: p is 0.05
        assert metrics.mean_interval(shifted)[3] == pytest.approx(0.05, abs=1e-4)
    assert metrics.mean_interval([0.0, 0.0, 0.0]) == (0, 0, 0, 1)
    assert metrics.mean_interval([0.5, 0.5])[3] == 0
    assert all(math.isnan(v) for v in metrics.mean_interval([0.3])[1:])
    (mean, low, high, _), (same, lower, higher, _) = (metrics.mean_interval([1.0, 2, 4], overlap=o) for o in (0, 0.25))
    assert (mean, (higher - lower) / (high - low)) == (same, pytest.approx(math.sqrt(1 + 3 * 0.25)))


# ---------------------------------------------------------------------------------------------------------------------
# plots.py


def test_ticks_are_round_and_inside():
    assert plots.nice_ticks(0, 1).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in [(0.87, 0.99), (-3, 41), (1e-6, 5e-6)]:
        ticks = plots.nice_ticks(low, high)
        assert 3 <= len(ticks) <= 11
        assert ((ticks >= low - 1e-9) & (ticks <= high + 1e-9)).all()


def blue_of(*series, **options):
    """Where a chart is drawn in the first colour: rows, columns."""
    chart = np.asarray(plots.line_chart([*series], **options)).astype(int)
    return (abs(chart - [0, 114, 178]).sum(2) < 90).nonzero()


def test_a_chart_draws_its_line_where_the_data_is():
    line, ranges = plots.Series("", [0, 1], [0.5, 0.5]), {"x_range": (0, 1), "y_range": (0, 1)}
    rows, columns = blue_of(line, **ranges)
    assert np.median(rows) == pytest.approx((40 + 400 - 50) / 2, abs=3)  # half way between top and bottom of the axes
    assert np.ptp(columns) > 380
    _, columns = blue_of(dataclasses.replace(line, dots=True), **ranges)
    assert ((columns < 100) | (columns > 400)).all()  # no line between the dots
    rows, columns = blue_of(plots.Series("", [1e-4, 1e-3, 1e-2], [0, 1, 0], dots=True), x_axis="log")
    assert np.median(columns[rows < 100]) == pytest.approx((70 + 500) / 2, abs=3)
    for series in ([], [plots.Series("nan", [1, 2], [math.nan, 1.0])], [plots.Series("one", [1], [2])]):
        assert plots.line_chart(series).size == (520, 400)


def test_a_band_shades_what_lies_between_its_bounds():
    line = plots.Series("", [0, 10], [0.5, 0.5])
    banded = dataclasses.replace(line, low=[0.4, 0.4], high=[0.6, 0.6])
    with_band, without = (np.asarray(plots.line_chart([s], y_range=(0, 1))) for s in (banded, line))
    rows = np.flatnonzero((with_band != without).any(2).sum(1) > 200)
    top, bottom = 40 + 8, 400 - 50 - 8  # where y is 1 and 0
    assert [rows.min(), rows.max()] == pytest.approx([bottom - y * (bottom - top) for y in (0.6, 0.4)], abs=2)


@pytest.mark.parametrize("size", [(60, 40), (20, 300), (4000, 40), (1, 1), (1500, 1000)])
def test_overlays_can_be_read_whatever_the_picture(size):
    image, heat = Image.new("L", size, 90), np.zeros((4, 6), np.float32)
    heat[1:3, 2:4] = 2.0
    heats = ((heat, None), (None, None), (-heat, None), (heat, 20.0))
    sheets = [plots.overlay(image, [0, 0, *size], "caption", h, top) for h, top in heats]
    assert len({s.size for s in sheets}) == 1  # so that they lie in one page
    width, height = sheets[0].size
    assert width >= 320 + 64
    assert height >= 80
    assert max(width, height) <= max(*size, 960) + 64 + 28
    shown, plain, empty, common = (np.asarray(s)[:-28, :-64] for s in sheets)
    assert (shown != plain).any()
    assert (empty != plain).any()  # it says that there is none
    assert (common != shown).any()


def test_boxes_and_sheets():
    image = plots.draw_box(Image.new("RGB", (100, 80)), [10, 20, 50, 60])
    assert image.getpixel((10, 40)) == (0xE6, 0x9F, 0x00)
    assert image.getpixel((30, 40)) == (0, 0, 0)
    assert np.asarray(plots.draw_box(Image.new("RGB", (9, 9)), [math.nan] * 4)).sum() == 0
    sheet = plots.contact_sheet([np.full((1, 8, 8), 9, np.uint8)] * 7, ["x"] * 7, columns=5, side=50)
    assert sheet.size[0] == 58 * 5
    assert plots.contact_sheet([], []).size[0] > 0
    assert plots.confusion_chart(torch.tensor([[5, 1], [0, 9]]), ["benign", "malignant"]).size == (520, 400)


# ---------------------------------------------------------------------------------------------------------------------
# train.py: losses and the loop


@pytest.mark.parametrize(("n", "batch"), [(33, 32), (65, 32), (5, 32), (64, 32), (97, 16), (5, 2), (3, 2), (7, 3)])
def test_batches_hold_every_row_once_and_never_one_alone(n, batch):  # 34
    rows = torch.arange(100, 100 + n)
    batches = train.draw_batches(rows, batch, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == rows.tolist()
    sizes = [len(b) for b in batches]
    assert min(sizes) > 1
    assert max(sizes) - 1 <= min(sizes)
    assert max(sizes) <= max(batch, 3)  # an odd count in twos


def test_the_balanced_sampler_draws_classes_alike():
    labels = (torch.arange(1000) % 10 == 0).long()
    images, args = argparse.Namespace(classes=["a", "b"], labels=labels), parse(["--balanced-sampler"])
    rows, in_the_loss, weights = train.draw_by(images, torch.arange(1000), None, args)
    drawn = torch.cat(train.draw_batches(rows, 32, torch.Generator().manual_seed(0), weights))
    assert float(labels[drawn].float().mean()) == pytest.approx(0.5, abs=0.05)
    assert in_the_loss is None


def test_an_epoch_of_steps_draws_that_many_full_batches():
    rows, generator = torch.arange(10, 17), torch.Generator().manual_seed(0)
    batches = train.draw_batches(rows, 4, generator, steps=5)
    assert [len(b) for b in batches] == [4] * 5
    counts = torch.bincount(torch.cat(batches))[10:]
    assert set(counts.tolist()) <= {2, 3}  # whole shuffles: nobody is drawn twice before all were drawn once
    weighted = train.draw_batches(rows, 4, generator, torch.tensor([0, 0, 0, 1.0, 0, 0, 0]), steps=3)
    assert torch.cat(weighted).tolist() == [13] * 12


def test_the_average_of_the_weights_by_hand():
    net, averaged = models.CNet("small_cnn"), models.CNet("small_cnn")
    before = {k: v.clone() for k, v in averaged.state_dict().items()}
    train.update_average(averaged, net, 0.9)
    for k, v in averaged.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(v, 0.9 * before[k] + 0.1 * net.state_dict()[k])


def test_votes_favour_the_better_member():
    labels = torch.tensor([0, 1] * 20)
    good = torch.where(labels[:, None] == torch.arange(2), 0.9, 0.1)
    poor = torch.full((40, 2), 0.5)
    votes = judge.member_weights(torch.stack([good, poor]), labels)
    assert votes[0] > 0.9
    assert sum(votes) == pytest.approx(1)
    assert judge.member_weights(torch.stack([good, good]), labels) == pytest.approx([0.5, 0.5])


TINY = ["--size", "32", "--model", "small_cnn", "--weights", "none", "--epochs", "3", "--save-seconds", "0"]


def quick(folder, *options, data_folder=None, script=train):
    """One training in this process, an option being one or several words. Returns (run folder, what it printed, what it
    returned)."""
    out = io.StringIO()
    where = [*(["--data", str(data_folder)] if data_folder else []), *TINY, "--runs", str(folder)]
    with contextlib.redirect_stdout(out):
        words = [word for option in options for word in option.split(" ")]
        result, run_folder = script.main([*where, "--cache", str(folder / "cache"), *words])
    return run_folder, out.getvalue(), result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("set"), {"benign": 40, "malignant": 28, "normal": 12})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folders):
    return quick(tmp_path_factory.mktemp("whole"), "--positive malignant --name whole", data_folder=folders)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, folders):
    """Two folds of D-Net and two members."""
    options = "--positive malignant --ensemble small_cnn,small_cnn --folds 2 --name e"
    return quick(tmp_path_factory.mktemp("ensemble"), options, data_folder=folders)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_model(a, b):
    one, two = (models.load(folder).state_dict() for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_report_tells_what_each_member_does_alone_slow(folders, ensemble):
    folder, said, report = ensemble
    args = parse(["--data", str(folders), "--positive", "malignant", "--size", "32", "--folds", "2"])
    images = quiet_load(folders, 32, positive="malignant")
    for i, member in enumerate(report["members"]):
        scores, labels, hits = [], [], []
        for name, _, val, test, _ in train.plan(images, args):
            model = models.load(folder / name)
            alone = models.Ensemble([model.members[i]], **model.info)
            judge.calibrate(alone, train.predict(alone, images, val), images.labels[val], args)
            other = torch.load(folder / f"fold{3 - len(scores) - 1}" / "test.pt", weights_only=True)  # of two folds
            judge.set_threshold(alone, other["opinions"][i, None], images.labels[other["rows"]], args)
            scores.append(alone.combine(train.predict(alone, images, test))[:, 1])
            labels.append(images.labels[test])
            hits.append(scores[-1][labels[-1] == 1] >= alone.info["threshold"])
        auc, found = metrics.auc(torch.cat(scores), torch.cat(labels)), member["test"]["auc"]
        assert found["value"] == pytest.approx(float(auc), abs=2e-3)
        assert member["test"]["sensitivity"]["value"] == pytest.approx(float(torch.cat(hits).float().mean()), abs=1e-6)
        assert found["low"] <= found["value"] <= found["high"]
        assert member["ensemble"]["auc"]["value"] == pytest.approx(report["test"]["auc"]["value"] - found["value"])
    assert len({m["test"]["auc"]["value"] for m in report["members"]}) == 2
    assert said.count("member small_cnn, roi none: auc") >= 2
    assert "best on validation" in said


def test_two_runs_are_compared_in_pairs_slow(tmp_path, folders, ensemble):
    one, _, before = ensemble
    options = "--positive malignant --folds 2 --epochs 1 --threshold-by balance --against"
    two, said, after = quick(tmp_path, options, str(one), "--name two", data_folder=folders)
    assert f"before: {one}, after: this run" in said
    change, images, answers = after["against"], quiet_load(folders, 32, positive="malignant"), []
    assert change["run"] == str(one)
    assert set(change["test"]) == set(before["test"])
    for metric, m in change["test"].items():
        a, b = before["test"][metric]["value"], after["test"][metric]["value"]
        assert (m["before"], m["after"], m["value"]) == pytest.approx((a, b, b - a))
    for folder, by in ((one, "sensitivity"), (two, "balance")):
        found = [torch.load(folder / f"fold{k}" / "test.pt", weights_only=True) for k in (1, 2)]
        args = parse(["--folds", "2", "--threshold-by", by])
        found = judge.cross_fit(images, found, args)
        answers.append(torch.cat([(r["probabilities"][:, 1] >= r["threshold"]).long() for r in found]))
    assert change["flipped"] == int((answers[0] != answers[1]).sum())
    assert change["test"]["auc"]["value"] != 0
    with contextlib.redirect_stdout(io.StringIO()):  # afterwards, of two finished runs; a run is no better than itself
        change = train.main(["--resume", str(two), "--against", str(two)])[0]["against"]
    assert report_of(two)["against"] == change
    assert change["flipped"] == 0
    assert {(m["value"], m["low"] + m["high"]) for m in change["test"].values()} == {(0.0, 0.0)}


def test_an_ensemble_teaches_one_small_model_slow(tmp_path, folders, whole, ensemble):
    def learn(name, *options):
        same = f"--positive malignant --nets cnet --epochs 1 --name {name}"
        return quick(tmp_path, same, *options, data_folder=folders)[:2]

    student, _ = learn("folds", f"--teacher {ensemble[0]} --folds 2")
    assert len(models.load(student / "fold1").members) == 1
    plain, _ = learn("plain")
    student, said = learn("student", f"--teacher {whole[0]} --alpha 0.2 --distill-temperature 3")
    assert "older version" not in said
    assert not same_model(student, plain)
    content = torch.load(whole[0] / "model.pt", weights_only=True)
    del content["seen"]
    torch.save(content, tmp_path / "old.pt")
    other, said = learn("other", f"--teacher {tmp_path / 'old.pt'} --alpha 1")
    assert "of an older version, which did not note what it learnt from" in said
    assert same_model(other, plain)  # alpha 1: the labels alone


def test_the_teacher_also_teaches_on_images_without_labels(tmp_path, folders, monkeypatch, capsys):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--nets", "cnet", "--steps-per-epoch", "3"])
    labelled, rest = images.rows("train").tensor_split([20])
    val, drawn, original = images.rows("val"), [], train.draw_batches
    images.labels[rest] = -1

    def recorded(*args):
        drawn.extend(original(*args))
        return drawn[-3:]

    monkeypatch.setattr(train, "draw_batches", recorded)
    teacher = torch.full((len(images), 2), 0.5)
    train.train_model(images, labelled, val, args, tmp_path, 0, teacher, rest)
    share = torch.isin(torch.cat(drawn), labelled).double().mean()
    assert 0.35 < share < 0.65  # half of what is drawn has a label


def test_without_validation_the_last_epoch_is_kept(tmp_path, folders, capsys):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--nets", "cnet"])
    model, _, histories = train.train_model(images, images.rows("train"), images.rows("val")[:0], args, tmp_path, 0)
    last = torch.load(tmp_path / "last.pt", weights_only=True)["net"]
    assert all(torch.equal(v, last[k]) for k, v in model.members[0].state_dict().items())
    assert histories[0][-1]["best"]
    assert (model.info["temperature"], model.info["threshold"]) == (1, 0.5)


def test_a_run_folder_holds_what_the_design_says(folders, whole):
    folder, said, report = whole
    files = "config.json log.jsonl last.pt model.pt report.json report.png mistakes.png test.pt example.png"
    assert {p.name for p in folder.iterdir()} == set(files.split())
    assert report_of(folder) == clean(report)
    names = (
        "auc accuracy sensitivity specificity balanced_accuracy f1 ece iou iou_at_50 dice lesions_found false_alarms"
    )
    assert set(report["test"]) == set(names.split())
    assert all(set(m) == {"value", "low", "high"} for m in report["test"].values())
    assert sum(report["splits"].values()) == 80
    kept = torch.load(folder / "test.pt", weights_only=True)
    labels = quiet_load(folders, 32, positive="malignant").labels[kept["rows"]]
    right = [int(p >= 0.5) == int(y) for p, y in zip(kept["probabilities"][:, 1], labels, strict=True)]
    assert report["accuracy_at_half"] == [pytest.approx(np.mean(right))]
    assert {"data", "splits", "model", "seconds"} <= set(report)
    epochs = [(h["net"], h["epoch"]) for h in log_of(folder)]
    assert epochs == [("cnet1 small_cnn", e) for e in (1, 2, 3)]
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["epochs"] == 3
    assert config["versions"]["torch"]
    assert "positive class: malignant" in said
    assert said.rstrip().endswith(models.DISCLAIMER)
    assert f"python infer.py {folder}/example.png --model {folder}/model.pt" in said
    assert "is complete" in call(train, "--resume", folder).stdout


def same_run(a, b):
    """Weights, test and log of two runs, times aside."""
    logs = [[{k: v for k, v in epoch.items() if k != "seconds"} for epoch in log_of(folder)] for folder in (a, b)]
    return same_model(a, b) and logs[0] == logs[1] and report_of(a)["test"] == report_of(b)["test"]


def cut_after_one_epoch(monkeypatch, *how, **more):
    """What `quick` does, killed in its second epoch."""
    real, calls = train.train_epoch, []

    def dies_in_the_second_epoch(*args):
        calls.append(real(*args))
        if len(calls) == 2:
            raise KeyError("as good as a kill")
        return calls[-1]

    with monkeypatch.context() as m:
        m.setattr(train, "train_epoch", dies_in_the_second_epoch)
        with pytest.raises(KeyError):
            quick(*how, **more)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, folders):
    options = "--nets cnet --epochs 2 --ema 0.9 --balanced-sampler --name"
    quick(tmp_path, options, "whole", data_folder=folders)
    cut_after_one_epoch(monkeypatch, tmp_path, options, "cut", data_folder=folders)
    assert "resuming cnet1 small_cnn after epoch 1" in call(train, "--resume", tmp_path / "cut").stdout
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_and_stopped_by_ctrl_c_the_result_is_the_same_slow(tmp_path, monkeypatch, folders, whole):
    options = ["--data", folders, *TINY, "--positive", "malignant", "--runs", tmp_path, "--cache", tmp_path / "cache"]
    command = [sys.executable, HERE / "train.py", *options, "--name", "cut"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any("cnet1" in line and "epoch   1/3" in line for line in process.stdout)
        process.kill()  # in the midst of an epoch, or of a save
    cut, real = tmp_path / "cut", train.train_epoch

    def ctrl_c(net, *args):
        if isinstance(net, models.CNet):
            signal.raise_signal(signal.SIGINT)
        return real(net, *args)

    with monkeypatch.context() as m:
        m.setattr(train, "train_epoch", ctrl_c)
        stopped = call(train, "--resume", cut)
    assert stopped.returncode == 130
    assert f"stopped; go on with: python train.py --resume {cut}" in stopped.stdout
    assert re.search("resuming cnet1 small_cnn after epoch [12]", call(train, "--resume", cut).stdout)
    assert same_run(whole[0], cut)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch, folders):
    real, calls = train.classification_loss, []

    def explodes(*args):
        calls.append(args)
        return real(*args) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(train, "classification_loss", explodes)
    why = r"epoch 2: the loss is not finite; the state after epoch 1 is kept in .*last.pt"
    with pytest.raises(InputError, match=why):
        quick(tmp_path, "--name x --nets cnet", data_folder=folders)
    saved = torch.load(tmp_path / "x" / "last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in saved["net"].values())
    assert len(saved["history"]) == 1


def test_best_is_a_copy_and_not_the_last(tmp_path, monkeypatch, folders):
    scores, weights, real = iter([0.5, 0.9, 0.1]), [], train.fit

    def validate(net):
        weights.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"score": [next(scores)], "val_auc": 0.0}

    monkeypatch.setattr(train, "SMOOTH", 1)
    monkeypatch.setattr(train, "fit", lambda *args, **more: real(*args[:4], validate, *args[5:], **more))
    folder, _, _ = quick(tmp_path, "--name x --nets cnet", data_folder=folders)
    kept = models.load(folder).members[0].state_dict()
    assert [all(torch.equal(kept[k], state[k]) for k in kept) for state in weights] == [False, True, False]


def test_on_a_plateau_no_epoch_is_favoured():  # 29
    net, chosen = torch.nn.Linear(1, 1), []
    for run in range(400):
        state, noise = (
            argparse.Namespace(best=None, best_score=None, history=[]),
            torch.rand(24, generator=seeded(run)),
        )
        kept = [e for e in range(24) if train_says_better(state, float(noise[e]), net, 5)]
        chosen.append(kept[-1] + 1)
        assert kept[-1] == max(range(4, 24), key=lambda e: float(noise[e - 4 : e + 1].double().mean()))
    shares = torch.tensor(chosen).bincount(minlength=25) / 400
    assert shares[:5].sum() == 0
    assert shares.max() < 0.12  # it was 0.22 for the first


def train_says_better(state, score, net, window):
    better = train.is_better(state, [score], net, window)
    state.history.append({"score": [score]})
    return better


def test_the_reported_validation_is_that_of_the_kept_epoch(tmp_path, folders):  # 29
    folder, _, _ = quick(tmp_path, "--name x --epochs 6 --nets dnet --lr 3e-2", data_folder=folders)
    (history,) = torch.load(folder / "test.pt", weights_only=True)["histories"]
    kept = [h for h in history if h["best"]][-1]
    assert report_of(folder)["validation"]["val_iou"] == [kept["val_iou"]]


def test_patients_are_standardised_by_training_rows_alone():  # 29
    rows = [{"age": age, "sex": sex} for age, sex in zip(["20", "", "40", "60", "1000"], "fmfmf", strict=True)]
    meta, columns, spec = data.encode_meta(rows, ["age", "sex"])
    images = dataclasses.replace(
        quiet_load(None, 16).take(torch.arange(5)), meta=meta, meta_columns=columns, meta_spec=spec
    )
    own = data.fit_meta(images, torch.tensor([0, 1, 2, 3]))
    assert (own[0]["mean"], own[0]["sd"]) == pytest.approx((40, np.std([20, 40, 60])), abs=1e-3)
    expected = data.encode_meta(rows, ["age", "sex"], own)[0]
    torch.testing.assert_close(data.meta_for(images, own), expected, atol=1e-4, rtol=1e-5)
    assert data.meta_for(images, spec) is meta
    assert data.fit_meta(images, torch.tensor([1]))[0] == spec[0]  # nobody's age is known


def test_training_stops_early_without_patience_left(tmp_path, folders):
    options = "--name x --nets cnet --epochs 40 --patience 2 --lr 1e-9"
    assert 2 < len(log_of(quick(tmp_path, options, data_folder=folders)[0])) < 12


def test_folds_cover_every_image_once_and_repeats_have_a_spread(tmp_path, folders, ensemble):
    folder, said, report = ensemble
    results = [torch.load(folder / f"fold{k}" / "test.pt", weights_only=True) for k in (1, 2)]
    assert sorted(torch.cat([r["rows"] for r in results]).tolist()) == list(range(80))
    assert report["splits"]["test"] == 80
    aucs = [report_of(folder / f"fold{k}")["test"]["auc"]["value"] for k in (1, 2)]
    assert report["mean"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
    assert report["mean"]["auc"]["sd"] == pytest.approx(np.std(aucs, ddof=1))
    assert "+-" in said
    images = quiet_load(folders, 32, positive="malignant")
    for _, *parts, _ in train.plan(images, parse(["--folds", "3"])):
        assert sorted(torch.cat(parts).tolist()) == list(range(80))
        for g in images.groups.unique():
            assert sum(bool((images.groups[p] == g).any()) for p in parts) == 1
    folder, _, report = quick(tmp_path, "--repeats 2 --name r --epochs 1 --nets cnet", data_folder=folders)
    assert [p.name for p in sorted(folder.glob("seed*"))] == ["seed0", "seed1"]
    assert len(report["runs"]) == 2
    assert not same_model(folder / "seed0", folder / "seed1")


@pytest.mark.parametrize("roi", ["mask", "none,dnet"])
def test_an_ensemble_on_crops_of_three_classes_slow(tmp_path, folders, roi):
    options = "--ensemble small_cnn,small_cnn --margin 0.5 --epochs 1 --name e --roi"
    folder, _, report = quick(tmp_path, options, roi, data_folder=folders)
    model, classes = models.load(folder / "model.pt"), ["benign", "normal", "malignant"]
    assert len(model.members) == 2 * len(roi.split(","))
    assert float(model.weights.sum()) == pytest.approx(1)
    assert (model.info["size"], model.info["load_size"]) == (32, 64)
    assert {m.config["roi"] for m in model.members} == set(roi.split(","))
    assert model.info["classes"] == classes
    assert report["test"]["auc"]["value"] is not None
    result = infer.BreastCancerDetector(folder / "model.pt").predict(next((folders / "normal").glob("*(1).png")))
    assert list(result["probabilities"]) == classes


def test_metadata_alone_can_carry_the_answer_slow(tmp_path):
    rows = []
    for i in range(60):
        picture(32, 32, i).save(tmp_path / f"{i}.png")
        rows.append(f"{i},{'nv' if i % 2 else 'mel'},,,,{30 + i % 7},{'female' if i % 2 else 'male'},,,,")
    table, answers = write_csv(tmp_path, rows), {}
    options = "--meta-columns age sex --positive mel --epochs 15 --lr 1e-2"
    for name, least in (("small_cnn", 0.9), ("none", 1)):  # of a dozen images
        folder, _, report = quick(tmp_path, options, f"--model {name} --name {name}", data_folder=table)
        assert report["test"]["auc"]["value"] >= least  # the sex tells all
        model, image = folder / "model.pt", tmp_path / "0.png"
        detector = infer.BreastCancerDetector(model, "cpu")
        patients = [(0, "male"), (0, "female"), (1, "male")]
        answers[name] = [detector.predict(tmp_path / f"{i}.png", {"sex": sex})["probability"] for i, sex in patients]
        assert answers[name][0] > answers[name][1]
    assert answers["none"][0] == answers["none"][2] > 0.5
    assert answers["small_cnn"][0] != answers["small_cnn"][2]
    assert "counted as missing" not in call(infer, image, "--model", model, "--meta", "age=31,sex=male").stdout
    assert "counted as missing: age, sex" in call(infer, image, "--model", model).stdout
    assert "the model knows age, sex" in error_of(call(infer, image, "--model", model, "--meta", "shoe=44"))
    assert "not seen in training" in error_of(call(infer, image, "--model", model, "--meta", "sex=x"))


def test_data_without_boxes(tmp_path):
    source = write_npz(tmp_path / "a.npz", n=40)
    _, said, report = quick(tmp_path, "--name c --epochs 1", data_folder=source)
    assert "D-Net can't be trained" in said
    assert "iou" not in report["test"]
    folder, said, report = quick(tmp_path, "--name f --epochs 1 --dummy-boxes", data_folder=source)
    assert "placeholder boxes" in said
    assert report["data"]["placeholder_boxes"]
    assert "PLACEHOLDER BOXES" in infer.BreastCancerDetector(folder / "model.pt").describe()


def test_a_detector_alone(tmp_path, folders):
    folder, _, report = quick(tmp_path, "--name d --nets dnet --epochs 1", data_folder=folders)
    assert set(report["test"]) == {"iou", "iou_at_50", "dice", "lesions_found", "false_alarms"}
    with pytest.raises(InputError, match="a D-Net alone"):
        infer.BreastCancerDetector(folder / "model.pt")


# ---------------------------------------------------------------------------------------------------------------------
# No waiting for the device. `-k cuda`: what needs a GPU; the others hold on the CPU what one would be waited for

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


class Waits(TorchDispatchMode):
    """Notes what a GPU would be waited for: a value that is read, a size that hangs on values, a copy from elsewhere."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "linalg_inv")

    def __init__(self):
        super().__init__()
        self.found, self.on = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        name = function.overloadpacket.__name__  # a number on the CPU goes along with a kernel's call, but for a copy
        places = {t.device.type for t in tensors if t.dim() or name in ("_to_copy", "copy_")}
        picks = name.startswith("index") and any(getattr(t, "dtype", None) == torch.bool for t in tree_leaves(args[1]))
        if self.on and (len(places) > 1 or picks or name.startswith(self.ASKS)):
            self.found.append(name)
        return out


def test_who_waits_is_found_out():
    x, chosen = torch.rand(4), torch.tensor([True, False, True, False])
    for ask in (lambda: float(x[0]), lambda: x[chosen], lambda: x.to("meta"), lambda: torch.linalg.inv(x.view(2, 2))):
        with Waits() as waits:
            ask()
        assert waits.found
    with Waits() as waits:
        (x[torch.tensor([2, 0])] * 2).sum()
    assert not waits.found


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_copies_nothing_to_the_device_at_a_step(channels):
    x, boxes = torch.rand(4, channels, 32, 48, device="meta"), torch.rand(4, 4, device="meta")
    for _ in range(2):  # its small tables go there at the first step
        with Waits() as waits:
            augment.augment(x, 1.0, boxes, augment.crop_regions(boxes), (16, 24), masks=x[:, 0])
            augment.tta_views(x, augment.crop_regions(boxes), 8, 3)
    assert waits.found == []


STEPS = ["--nets both --positive malignant", "--trunk own --ema 0.9", "--ensemble small_cnn,small_cnn --roi none,dnet"]
STEPS += ["--balanced-sampler --nets cnet --steps-per-epoch 2", "--teacher T --nets cnet --positive malignant"]
STEPS += ["--method simclr --batch 16", "--method byol --batch 16"]


@pytest.mark.parametrize("options", STEPS)
def test_no_step_reads_a_value_or_picks_rows_by_one(tmp_path, monkeypatch, folders, whole, options):
    """Steps as train.py and pretrain.py make them; augmentation, which looks at values on the CPU alone, see above."""
    waits = Waits()

    def watched(make, batches, device):
        for batch in batches:
            waits.on = False
            now = make(*batch)
            waits.on = True
            yield now
        waits.on = False

    monkeypatch.setattr(train, "ahead", watched)
    monkeypatch.setattr(losses, "check_teacher", lambda *_: None)  # as well
    waits.on, script = False, pretrain if "--method" in options else train
    options = options.replace("T ", f"{whole[0]} ")
    where = ["--data", folders, *TINY, "--runs", tmp_path, "--cache", tmp_path / "c", "--device", "cpu"]
    with waits:
        said = call(script, *where, *options.split(), "--epochs", "1")
    assert (said.returncode, waits.found) == (0, []), said.stderr


def small_training(device, seed=0):
    """(net, its average, and the arguments of train_epoch after it) for 24 phantoms in 6 steps."""
    args = parse(["--batch", "4", "--size", "32", "--ema", "0.9", "--amp", "off", "--lr", "1e-2"])
    torch.manual_seed(seed)
    net, images = models.CNet("small_cnn", dropout=0.0).to(device), data.phantom_set(24, 32)
    inputs = (images.pixels.to(device), None, None, None)
    rows, generator = torch.arange(24, device=device), torch.Generator(device).manual_seed(seed)
    optimizer, scheduler = train.build_optimizer(net, args, 60)
    return net, copy.deepcopy(net).eval(), optimizer, scheduler, inputs, rows, args, generator, images.labels.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_from_a_step_that_is_not_finite_on_nothing_is_touched(device, broken):
    net, averaged, optimizer, scheduler, inputs, rows, args, generator, labels = small_training(device)
    seen = []

    def loss_of(net, x, boxes, masks, index):
        seen.append(copy.deepcopy([*net.parameters(), *(v for p in optimizer.state.values() for v in p.values())]))
        loss = losses.classification_loss(net(x), labels[index])
        if len(seen) == 3:  # sqrt(0): a value of 0 whose gradient is infinite, times 0: NaN
            loss = loss * math.nan if broken == "loss" else loss + (0 * net.head.weight).sum().abs().sqrt()
        return loss

    with pytest.raises(FloatingPointError):
        train.train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator, None, averaged)
    after = [*net.parameters(), *(v for p in optimizer.state.values() for v in p.values())]
    assert len(seen) == 6
    assert not all(map(torch.equal, seen[1][: len(seen[0])], seen[2]))
    assert all(map(torch.equal, seen[2], after))
    assert all(p.isfinite().all() for p in averaged.parameters())


def test_an_epoch_is_its_steps_one_by_one():
    """Against the loop as everybody writes it: a value read and compared at each step, clipping by a branch."""
    net, _, optimizer, scheduler, inputs, rows, args, generator, labels = small_training("cpu")
    args.clip = 15.0  # some steps are clipped, some not
    twin, own = copy.deepcopy(net), seeded()
    plain, total, clipped = torch.optim.AdamW(train.build_optimizer(twin, args, 60)[0].param_groups, fused=True), 0.0, 0
    twin.train()
    for step, index in enumerate(train.draw_batches(rows, 4, own)):
        x = augment.augment(inputs[0][index], args.augment, size=32, generator=own)[0]
        loss = losses.classification_loss(twin(x), labels[index])
        plain.zero_grad()
        loss.backward()
        norm = float(torch.stack([p.grad.norm() for p in twin.parameters()]).norm())
        if norm > 15:
            clipped += 1
            for p in twin.parameters():
                p.grad *= 15 / norm
        for group in plain.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 6  # a warm-up of 6 steps
        plain.step()
        total += loss.item() * len(index)
    mean = train.train_epoch(
        net, optimizer, scheduler, lambda net, x, b, m, i: losses.classification_loss(net(x), labels[i]),
        inputs, rows, args, generator,
    )  # fmt: skip
    assert 0 < clipped < 6
    assert mean == pytest.approx(total / 24, rel=1e-5)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        close(a, b, 2e-5)


def test_rows_without_a_label_have_no_part_in_the_loss():
    for classes, smoothing in ((1, 0.0), (1, 0.1), (3, 0.0), (3, 0.1)):
        logits = torch.randn(6, classes, generator=seeded(), requires_grad=True)
        labels, weights = torch.tensor([0, -1, 1, 1, -1, 0]), torch.tensor([0.5, 2.0, 1.0])[: max(2, classes)]
        for w in (None, weights):
            known, found = labels >= 0, losses.classification_loss(logits, labels, w, smoothing)
            close(found, losses.classification_loss(logits[known], labels[known], w, smoothing))
            if classes > 1:
                close(found, F.cross_entropy(logits[known], labels[known], w, label_smoothing=smoothing))
            none = losses.classification_loss(logits, torch.full((6,), -1), w, smoothing)
            assert none == 0
            assert not torch.autograd.grad(none, logits)[0].any()


def test_boxes_are_held_together_as_torchvision_does():
    a, b = (torch.rand(200, 4, generator=seeded(s)) * 2 for s in (0, 1))
    a[:100], b[:100] = (
        a[:100].view(-1, 2, 2).sort(1).values.flatten(1),
        b[:100].view(-1, 2, 2).sort(1).values.flatten(1),
    )
    a.requires_grad_()
    near = F.smooth_l1_loss(a, b, beta=0.05, reduction="none").mean(1)
    expected, found = 4 * near + torchvision.ops.generalized_box_iou_loss(a, b), losses.box_loss(a, b)
    close(found, expected)
    close(*(torch.autograd.grad(v[:100].sum(), a)[0] for v in (found, expected)), 1e-4)


def test_off_the_cpu_matrices_are_inverted_in_closed_form():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    m = torch.randn(50, 2, 2, dtype=torch.double, generator=seeded())
    close(augment.inverse(m.as_subclass(Elsewhere)).as_subclass(torch.Tensor), torch.linalg.inv(m), 1e-8)
    assert torch.equal(augment.inverse(m), torch.linalg.inv(m))


def test_workers_share_the_gpus_that_the_user_left_visible(monkeypatch):
    """A worker takes one of those that PyTorch sees, whatever CUDA_VISIBLE_DEVICES calls them; or the one that was named."""
    import options

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(options, "load_images", lambda *_, **__: argparse.Namespace())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    number = torch.multiprocessing.get_context("spawn").Value("i", 0)
    for device in ("auto", "cuda", "cuda", "cuda:1", "cpu"):
        options.start_worker(argparse.Namespace(device=device), 4, number, [], ["a", "b"])
    assert taken == [0, 1, 0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def cut_on_another_device(tmp_path, monkeypatch, folders, *options):
    cut_after_one_epoch(
        monkeypatch, tmp_path, "--name x --positive malignant --epochs 6", *options, data_folder=folders
    )
    return tmp_path / "x"  # of the first epoch, before any is taken for the best


def test_a_run_goes_on_on_a_device_of_another_kind(tmp_path, monkeypatch, folders):
    """A file of a GPU, as far as its random states tell."""
    folder = cut_on_another_device(tmp_path, monkeypatch, folders, "--device cpu")
    saved = torch.load(folder / "last.pt", weights_only=True)
    state = torch.zeros(16, dtype=torch.uint8)
    for older in (True, False):
        content = saved | {"generator": state, "cuda_rng": [state]} | ({} if older else {"device": "cuda"})
        if older:
            del content["device"]
        shutil.copytree(folder, tmp_path / f"{older}")
        torch.save(content, tmp_path / f"{older}" / "last.pt")
        said = call(train, "--resume", tmp_path / f"{older}", "--device", "cpu")
        assert "another kind of device (cuda): it goes on with other random numbers" in said.stdout
        assert said.returncode == 0, said.stderr
        assert [h["epoch"] for h in log_of(tmp_path / f"{older}")] == [1, 2, 3, 4, 5, 6]


@needs_cuda
@pytest.mark.parametrize(("one", "other"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_cuda_and_cpu_take_up_each_others_runs(tmp_path, monkeypatch, folders, one, other):
    folder = cut_on_another_device(tmp_path, monkeypatch, folders, f"--device {one}")
    said = call(train, "--resume", folder, "--device", other)
    assert said.returncode == 0, said.stderr
    assert "resuming cnet1 small_cnn after epoch 1" in said.stdout
    assert ("other random numbers" in said.stdout) == (one != other)
    assert [h["epoch"] for h in log_of(folder)] == [1, 2, 3, 4, 5, 6]


@needs_cuda
@pytest.mark.parametrize("amp", ["on", "off"])
def test_cuda_learns_the_phantoms_and_the_cpu_gives_the_same_answers(tmp_path, amp):
    folder, _, report = quick(tmp_path, f"--device cuda --amp {amp} --epochs 12 --lr 3e-3 --name p --batch 32")
    assert report["test"]["auc"]["value"] > 0.8
    images = data.phantom_set(20, 32, seed=5)
    there, here = (train.look_at(models.load(folder, d), images, torch.arange(20)) for d in ("cuda", "cpu"))
    close(there.opinions, here.opinions, 0.02)  # convolutions in TF32
    close(there.found.outlines, here.found.outlines, 0.05)
    said = call(infer, folder / "example.png", "--model", folder, "--device", "cuda", "--json")
    assert 0 <= json.loads(said.stdout)["probability"] <= 1


@needs_cuda
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("options", STEPS)
def test_cuda_is_not_waited_for_inside_an_epoch(tmp_path, monkeypatch, folders, whole, options, far):
    """PyTorch itself raises at whatever waits, from the first step to the last; far: the pixels stay on the CPU."""
    real, steps = train.ahead, []

    def guarded(make, batches, device):
        try:
            for now in real(make, batches, device):
                torch.cuda.set_sync_debug_mode("error")
                steps.append(now)
                yield now
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "ahead", guarded)
    if far:
        monkeypatch.setattr(train, "near", lambda table, device: table)
        monkeypatch.setattr(pretrain, "near", lambda table, device: table)
    script, options = pretrain if "--method" in options else train, options.replace("T ", f"{whole[0]} ")
    where = ["--data", folders, *TINY, "--runs", tmp_path, "--cache", tmp_path / "c", "--device", "cuda"]
    said = call(script, *where, *options.split(), "--epochs", "2")
    assert said.returncode == 0, said.stderr
    assert len(steps) > 3


@needs_cuda
def test_cuda_gets_the_rows_that_were_asked_for_while_it_is_busy():
    table, device = (
        torch.randint(0, 256, (500, 1, 64, 64), dtype=torch.uint8, generator=seeded()),
        torch.device("cuda:0"),
    )
    batches, busy = torch.randint(0, 500, (60, 32), generator=seeded()), torch.randn(2000, 2000, device=device)
    for where in (table, devices.near(table, device)):

        def make(index, here, where=where):
            return index, devices.fetch(where, index, here, device).float() * 2, None

        found = []
        for _, x, none in devices.ahead(make, [(b.to(device), b) for b in batches], device):
            busy = busy @ busy / 50  # so that the copies are far ahead of the steps
            found.append(x.sum((1, 2, 3)) + 0 * busy[0, 0].nan_to_num(0, 0, 0))
            assert none is None
        assert torch.equal(torch.stack(found).cpu(), 2 * table[batches].float().sum((2, 3, 4)))


@needs_cuda
def test_cuda_picks_what_the_cpu_picks():
    for n, d, k in ((50, 8, 50), (3000, 32, 200), (5000, 128, 300), (2000, 512, 40)):
        x = torch.randn(n + 10, d, generator=seeded())
        for centers in (None, x[:10]):
            here, there = (k_center(v[10:], k, None if centers is None else centers.to(v)) for v in (x, x.cuda()))
            assert there[0].device.type == "cuda"
            assert there[0].tolist() == here[0].tolist()
            assert there[1] == pytest.approx(here[1], rel=1e-5)
    x, p = torch.randn(400, 64, generator=seeded()), torch.rand(400, 3, generator=seeded(1)).softmax(1).double()
    for name in ("coreset", "badge", "typiclust"):
        picks = [
            query.STRATEGIES[name](query.Context(v, p, torch.arange(9), torch.arange(9, 400), seeded()), 12).tolist()
            for v in (x, x.cuda())
        ]
        assert picks[0] == picks[1], name


@needs_cuda
def test_cuda_serves_every_script(tmp_path, folders):
    report, _ = loop(tmp_path, "al", "--strategies all --dropout 0.3 --rounds 1 --device cuda --distill pool", folders)
    assert {c["strategy"] for c in report["chains"]} >= set(query.STRATEGIES)
    options = "--positive malignant --folds 2 --workers 2 --name f --roi none,dnet --epochs 1 --device cuda"
    folder, _, _ = quick(tmp_path, options, data_folder=folders)
    cache = ["--cache", tmp_path / "cache", "--device", "cuda"]
    pool = class_folders(tmp_path / "pool", {"new": 6}, 70, 50)
    suggest = ["suggest", "--model", folder, "--pool", pool, "--query", "3", "--out", tmp_path / "l"]
    image = next((folders / "benign").glob("*(2).png"))
    drawn = ["--save-overlay", tmp_path / "o", "--save-mask", tmp_path / "m", "--device", "cuda"]
    for script, *options in (
        (explain, "--model", folder, *cache, "--evaluate", "--hotspots", "--most", "6", "--out", tmp_path / "out"),
        (explain, image, "--model", folder, "--method", "all", "--out", tmp_path / "all.png", "--device", "cuda"),
        (al_loop, *suggest, *cache),
        (infer, "--model", folder, "--evaluate", *cache),
        (infer, image, "--model", folder, *drawn),
        (bench, "--quick", "--runs", "1", "--device", "cuda"),
    ):
        said = call(script, *options)
        assert said.returncode == 0, (options, said.stderr)
    table = json.loads((tmp_path / "out" / "explain.json").read_text())["measures"]
    assert set(table) == {*saliency.METHODS, *saliency.BASELINES}


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: what torchrun starts


def free_port():
    """One that no client is given while it waits for its server: below those that the system picks from."""
    for port in range(20000 + os.getpid() % 12000, 32768):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def processes(script, *options, count=2):
    """As torchrun starts them, without torchrun, which takes as long as they do."""
    port, started = free_port(), []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(HERE), **{k: str(v) for k, v in place.items()}}
        command = [sys.executable, *(["-c", script] if "\n" in script else [HERE / script]), *map(str, options)]
        started.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment))
    return started


def ended(started):
    """[(exit code, stdout, stderr)]."""
    said = [p.communicate(timeout=300) for p in started]
    return [(p.returncode, *text) for p, text in zip(started, said, strict=True)]


def test_a_part_of_a_batch_is_augmented_as_it_would_be_in_the_whole():
    x, boxes = torch.randint(0, 256, (7, 3, 24, 32), dtype=torch.uint8, generator=seeded()), BOX[:1].repeat(7, 1)
    for images in (x, x[:, :1]):
        whole = augment.augment(images, 1.0, boxes, generator=seeded(3), masks=images[:, 0] > 99)
        rows = torch.tensor([6, 2, 3])
        own = augment.augment(
            images[rows], 1.0, boxes[rows], generator=(seeded(3), 7, rows), masks=images[rows, 0] > 99
        )
        for part, all_rows in zip(own, whole, strict=True):
            close(part, all_rows[rows], 1e-5)


@pytest.mark.parametrize(("n", "count", "views"), [(7, 2, 1), (7, 3, 2), (4, 4, 1), (8, 1, 2)])
def test_every_image_of_a_batch_has_one_process(monkeypatch, n, count, views):
    batch, found = torch.arange(100, 100 + n), []
    monkeypatch.setattr(devices, "world", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(devices, "rank", lambda rank=rank: rank)
        total, where, rows = devices.share(batch, views)
        kept = n if views == 1 else n // count * count  # with views in equal parts
        assert (total, rows.tolist()) == (kept * views, batch[:kept].repeat(views)[where].tolist())
        halves = rows.chunk(views)
        assert all(torch.equal(half, halves[0]) for half in halves)  # both views of an image are with one process
        found.append(where)
    assert sorted(torch.cat(found).tolist()) == list(range(kept * views))
    for size, steps in ((4, 0), (9, 0), (6, 5)):
        sizes = [len(b) // count for b in devices.draw_batches(torch.arange(37), size, seeded(), steps=steps)]
        assert min(sizes) == devices.smallest(37, size, steps)
    args, images = parse(["--batch", "3"]), data.phantom_set(9, 32)
    monkeypatch.setattr(devices, "world", lambda: 4)
    monkeypatch.setattr(train, "world", lambda: 4)
    with pytest.raises(InputError, match="--batch 3: too few of the 9 images for 4 processes"):
        train.fit(models.CNet("small_cnn"), images, torch.arange(9), None, None, args, name="x", folder=".", seed=0)


def test_answers_in_parts_are_the_answers(monkeypatch, folders, ensemble):
    images, model = quiet_load(folders, 32, positive="malignant"), models.load(ensemble[0] / "fold1")
    rows, everything = torch.tensor([5, 0, 9, 70, 33]), []
    for parts in (1, 2, 3):
        monkeypatch.setattr(judge, "shared", lambda f, rows, n=parts: [f(part) for part in rows.tensor_split(n)])
        answer, boxes = judge.look_at(model, images, rows, batch=2, keep=True), judge.locate(model, images, rows)
        everything.append([answer.opinions, *answer.found, *answer.traits, *answer.embeddings, boxes])
    for other in everything[1:]:
        for a, b in zip(everything[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


PARTS_OF_LOSSES = """
import torch, devices, losses
devices.start(torch.device("cpu"), 60)
torch.manual_seed(0)
logits, labels, teacher = torch.randn(7, 3), torch.tensor([0, -1, 2, 1, -1, -1, 2]), torch.rand(7, 3).softmax(1)
weights, boxes = torch.tensor([1.0, 2.0, 0.5]), torch.rand(7, 4).view(7, 2, 2).sort(1).values.flatten(1)
boxes[[0, 4, 5, 6]] = torch.nan  # the second process has no box at all
outlines, cells, drawn = losses.ellipses(boxes, 6, 6), torch.rand(7, 4, 6, 6).sort(1).values, torch.randn(7, 6, 6)
outlines[2] = torch.nan

def loss(net, rows):
    z = net(logits[rows])
    a = losses.distillation_loss(z, labels[rows], teacher[rows], 0.4, 2.0, weights, 0.1)
    b = losses.classification_loss(z[:, :1], labels[rows].clamp(max=1), weights[:2])
    return a + b + losses.detection_loss(drawn[rows] * z.mean(1)[:, None, None], cells[rows], outlines[rows], boxes[rows])

net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).eval(), torch.nn.Linear(4, 3))
_, shared = devices.together(net, loss)
mine = shared(net, devices.part(torch.arange(7)))
mine.backward()
print(float(devices.mean(mine.detach())))
for i in range(devices.world()):
    if devices.gather(i * 10 + devices.rank()) != [i * 10, i * 10 + 1]:
        raise SystemExit("gathered in another order")
own, gradients = losses.pooled, [p.grad.clone() for p in net.parameters()]
losses.pooled = lambda count, least: count.clamp(min=least)
net.zero_grad()
whole = loss(net, torch.arange(7))
whole.backward()
print(float(whole.detach()), all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(gradients, net.parameters())))
net[1].running_mean += devices.rank()
devices.merge(net)
print(float(net[1].running_mean[0]))
"""


PARTS_OF_SIMCLR = """
import argparse, torch, devices, pretrain
devices.start(torch.device("cpu"), 60)
torch.manual_seed(0)
net = pretrain.SimCLR(argparse.Namespace(model="small_cnn", temperature=0.3), channels=1, normalise="image", weights="none")
net.online, (a, b) = torch.nn.Linear(5, 4), torch.randn(2, 6, 5)
_, shared = devices.together(net, lambda net, rows: net.loss(a[rows], b[rows]))
loss = shared(net, devices.part(torch.arange(6)))
loss.backward()
own = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
whole = pretrain.nt_xent(net.online(a), net.online(b), 0.3)
whole.backward()
print(abs(float((loss - whole).detach())) < 1e-5, all(torch.allclose(g, p.grad, atol=1e-6) for g, p in zip(own, net.parameters())))
"""


def test_each_of_two_processes_tells_an_image_from_all_others():
    (code, out, err), (other, silent, _) = ended(processes(PARTS_OF_SIMCLR))
    assert (code, other, out, silent) == (0, 0, "True True\n", ""), err


def test_losses_and_gradients_of_parts_are_those_of_the_whole():
    """Also where one process has no box, and more images without a label than the other."""
    (code, out, err), (other, silent, _) = ended(processes(PARTS_OF_LOSSES))
    assert (code, other, silent) == (0, 0, ""), err
    mean, whole, same, running = out.split()
    assert float(mean) == pytest.approx(float(whole), rel=1e-6)
    assert (float(running), same) == (0.5, "True")


SHARED = ["--size", "64", "--model", "alexnet", "--weights", "none", "--nets", "cnet", "--dropout", "0"]
SHARED += [
    "--positive",
    "malignant",
    "--batch",
    "15",
    "--epochs",
    "2",
    "--lr",
    "1e-4",
]  # 55 images: 4 batches of 13 or 14


def test_two_processes_learn_what_one_learns_slow(tmp_path, folders):
    """A network without BatchNorm or dropout, to rounding; augmentation and the classes' weights are on."""
    where = ["--data", folders, "--runs", tmp_path, "--cache", tmp_path / "cache"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, HERE / "train.py", *where, *SHARED, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("epoch   1/2") == done.stdout.count("run folder") == 1
    )  # the first alone prints, and writes
    assert call(train, *where, *SHARED, "--name", "one").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "one", "two"]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)
    one, two = (models.load(tmp_path / name).members[0].state_dict() for name in ("one", "two"))
    for name, value in one.items():
        close(value, two[name], 2e-4)


def test_processes_share_every_training_slow(tmp_path, folders):
    """BatchNorm, a moving average, crops, parts that no loss asks for; active learning and pretraining."""
    where = ["--data", folders, *TINY, "--runs", tmp_path, "--cache", tmp_path / "cache"]
    options = "--ema 0.9 --ensemble small_cnn,small_cnn --roi none,dnet --epochs 1 --name a --folds 2"
    both = ended(processes("train.py", *where, *options.split()))
    assert [code for code, *_ in both] == [0, 0], both
    assert both[1][1:] == ("", "")
    model = models.load(tmp_path / "a" / "fold1")
    torch.manual_seed(0)
    same = train.network_options(quiet_load(folders, 32), parse([*TINY, "--data", str(folders)]))
    first = models.CNet("small_cnn", classes=3, trunk="shared", **same).state_dict()
    found = model.members[0].state_dict()
    kept = [k for k, v in first.items() if v.dim() > 1 and torch.equal(v, found[k])]
    assert all(k.startswith("dnet.smooth.1.") for k in kept), kept
    both = ended(processes("pretrain.py", *where, "--batch", "15", "--name", "p"))
    assert [code for code, *_ in both] == [0, 0], both
    assert (tmp_path / "p" / "backbone.pt").exists()
    options = [*where, *LOOP, "--rounds", "1", "--name", "l", "--strategies", "coreset"]
    both = ended(processes("al_loop.py", *options))
    assert [code for code, *_ in both] == [0, 0], both
    assert len(json.loads((tmp_path / "l" / "al.json").read_text())["chains"]) == 3


@pytest.mark.parametrize("how", ["killed", "stopped", "ctrl-c", "nan", "workers"])
def test_all_processes_end_together_slow(tmp_path, folders, how):
    options = ["--data", folders, *TINY, "--nets", "cnet", "--positive", "malignant", "--runs", tmp_path, "--name", "x"]
    options += ["--cache", tmp_path / "cache", "--epochs", "300", "--timeout", "4"]
    options += {"nan": ["--lr", "1000"], "workers": ["--workers", "2"]}.get(how, [])
    started = processes("train.py", *options)
    if how in ("killed", "stopped", "ctrl-c"):
        assert any("epoch   2/300" in line for line in started[0].stdout)
        sent = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "ctrl-c": signal.SIGINT}[how]
        started[1].send_signal(sent)
    (code, out, err), *_ = ended(started[:1])
    if how == "stopped":
        started[1].kill()
    ((other, silent, theirs),) = ended(started[1:])
    assert silent == ""
    if how == "ctrl-c":
        assert (code, other, err) == (130, 130, "")
        assert "stopped; go on with" in out
        config = json.loads((tmp_path / "x" / "config.json").read_text())
        config["args"]["epochs"] = len(log_of(tmp_path / "x")) + 1
        (tmp_path / "x" / "config.json").write_text(json.dumps(config))
        both = ended(processes("train.py", "--resume", tmp_path / "x"))
        assert [code for code, *_ in both] == [0, 0], both
        assert "resuming cnet1 small_cnn after epoch" in both[0][1]
        return
    why = {"nan": "not finite", "workers": "--workers beside torchrun"}
    assert code == 1
    assert why.get(how, "process 1 of 2 has died or hangs; --resume goes on") in err.splitlines()[-1]
    if how in why:
        assert other == 1
        assert theirs.startswith("process 1: error: ")


# ---------------------------------------------------------------------------------------------------------------------
# The shared trunk, outlines, folds made one


def test_parts_of_a_mask_by_flood_fill():
    masks = torch.rand(6, 13, 17, generator=seeded()) < 0.35
    for mask, found in zip(masks.numpy(), models.label_parts(masks).numpy(), strict=True):
        assert ((found > 0) == mask).all()
        left, parts = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
        while left:
            todo, part = [left.pop()], set()
            while todo:
                y, x = todo.pop()
                part.add((y, x))
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                todo += near
            parts += 1
            assert len({found[cell] for cell in part}) == 1
        assert len(np.unique(found[mask])) == parts


def test_the_box_is_that_of_the_likeliest_lesion_and_all_are_listed():
    outlines, cells = torch.full((1, 8, 8), 0.01), torch.zeros(1, 4, 8, 8)
    outlines[0, 1:3, 1:3], outlines[0, 5:7, 4:7], outlines[0, 7, 0] = 0.9, 0.7, 0.2
    outlines[0, 1, 1] = 0.95
    cells[0, :, :4], cells[0, :, 4:] = torch.tensor([0.1, 0.1, 0.4, 0.4])[:, None, None], 0.5
    found = models.Found(outlines, cells)
    close(found.boxes(), torch.tensor([[0.1, 0.1, 0.4, 0.4]]))
    assert float(found.scores()) == pytest.approx(0.95)
    assert [b.tolist() for b in found.at(0).lesions(0.6)] == [pytest.approx([0.1, 0.1, 0.4, 0.4]), [0.5] * 4]
    assert len(found.at(0).lesions(0.8)) == 1
    assert found.at(0).lesions(0.99) == []
    other = models.Found(outlines.flip(2), cells)  # another detector, as sure, of another place
    both = models.average([found, other])
    assert float(both.scores()) == pytest.approx(0.95)  # though no cell of the mean outline is
    assert float(both.outlines.max()) < 0.8
    assert len(both.at(0).lesions(0.9)) >= 1


def shared_model(**info):
    torch.manual_seed(0)
    members = [
        models.CNet("small_cnn", 2, 1, roi=roi, trunk="shared", meta=info.pop("meta", 0)) for roi in ("none", "dnet")
    ]
    about = {"classes": ["benign", "malignant"], "size": 32, "load_size": 64, "channels": 1} | info
    return models.Ensemble(members, [0.6, 0.4], **about).eval()


def test_one_pass_of_a_shared_trunk_finds_and_names(monkeypatch, tmp_path):
    model, x, passes = shared_model(views=3), torch.rand(5, 1, 64, 64, generator=seeded()), []
    monkeypatch.setattr(models, "standardise", lambda *a, real=models.standardise: passes.append(len(a[0])) or real(*a))
    answer = model.look(x)
    assert passes == [15, 15]  # each member once, all views in one batch
    regions = augment.crop_regions(model.locate(x), 0.25)
    crops = augment.tta_views(x, regions, 32, 3)
    near = model.members[1].dnet.find(crops[:5])  # by the first view, the crop as it is
    close(answer.boxes, model.members[0].dnet.find(augment.crop(x, None, 32)).refined(near, regions).boxes())
    close(answer.found.scores(), model.members[0].dnet.find(augment.crop(x, None, 32)).scores())
    close(answer.opinions[1].flatten(0, 1), models.to_probabilities(model.members[1](crops)))
    net, small = model.members[0], augment.crop(x, None, 32)
    maps, merged = net.dnet.pyramid(small)
    p = net.dnet.read(merged[0])[0].sigmoid()[:, None]
    coarse = F.adaptive_avg_pool2d(p, merged[2].shape[-2:])
    means = [(m * (w + 1e-4)).sum((2, 3)) / (w + 1e-4).sum((2, 3)) for m, w in ((merged[0], p), (merged[2], coarse))]
    torch.testing.assert_close(net.embed(small), torch.cat([maps.mean((2, 3)), *means], 1), atol=1e-4, rtol=1e-4)
    models.save(tmp_path / "m.pt", model)
    again = models.load(tmp_path / "m.pt")
    assert torch.equal(again(x), model(x))
    assert again.tells_outlines
    assert not again.needs_boxes


def test_a_closer_look_draws_the_lesion_finer():
    """Against planes, which bilinear interpolation keeps: what the crop says of (u, v) is told where (u, v) lies."""
    regions = torch.tensor([[0.25, 0.125, 0.75, 0.625], [-0.25, 0.5, 0.25, 1.0]])  # the second reaches over the edge
    v, u = torch.meshgrid(*[(torch.arange(16) + 0.5) / 16] * 2, indexing="ij")
    near = models.Found((0.5 + 0.3 * u - 0.2 * v).expand(2, 16, 16), torch.tensor([0.25, 0.25, 0.75, 1.0]).view(1, 4, 1, 1).expand(2, 4, 16, 16))  # fmt: skip
    whole = models.Found(torch.full((2, 16, 16), 0.1), torch.rand(2, 4, 16, 16, generator=seeded()))
    found = whole.refined(near, regions)
    assert found.outlines.shape == (2, 32, 32)
    assert torch.equal(found.scores(), whole.scores())
    for n, (left, top, right, bottom) in enumerate(regions.tolist()):
        for row, column in itertools.product(range(32), range(32)):
            x, y = (column + 0.5) / 32, (row + 0.5) / 32
            if not (left <= x <= right and top <= y <= bottom):
                assert found.outlines[n, row, column] == pytest.approx(0.1)
                continue
            u, v = ((a - low) / (high - low) for a, low, high in ((x, left, right), (y, top, bottom)))
            u, v = (min(max(a, 0.5 / 16), 1 - 0.5 / 16) for a in (u, v))
            assert found.outlines[n, row, column] == pytest.approx(0.5 + 0.3 * u - 0.2 * v, abs=1e-5)
            box = [left + 0.25 * (right - left), top + 0.25 * (bottom - top), left + 0.75 * (right - left), bottom]
            assert found.cells[n, :, row, column].tolist() == pytest.approx(box, abs=1e-5)
    close(found.boxes()[0], torch.tensor([0.375, 0.25, 0.625, 0.625]))


def test_a_doubtful_closer_look_moves_the_lesion_nowhere_else():
    """Whatever the crop says: the likeliest lesion is where it was looked for, and the others are as likely as they were."""
    outlines, cells = torch.full((1, 16, 16), 0.02), torch.zeros(1, 4, 16, 16)
    outlines[0, 2:6, 2:6], outlines[0, 10:14, 10:14], outlines[0, 2:6, 10:14] = 0.9, 0.4, 0.3
    outlines[0, 12, 12] = 0.6  # a single cell: that it is drawn on a finer map does not lower it
    cells[0] = torch.tensor([0.625, 0.625, 0.875, 0.875])[:, None, None]
    cells[0, :, :8, :8] = torch.tensor([0.125, 0.125, 0.375, 0.375])[:, None, None]
    whole, regions = models.Found(outlines, cells), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    for sure in (0.05, 0.5, 0.8, 0.999):
        seen = torch.full((1, 16, 16), sure / 100)
        seen[0, 4:12, 4:12] = sure
        found = whole.refined(models.Found(seen, torch.tensor([0.25, 0.25, 0.75, 0.75]).view(1, 4, 1, 1).expand(1, 4, 16, 16)), regions)  # fmt: skip
        close(found.boxes(), torch.tensor([[0.125, 0.125, 0.375, 0.375]]))
        for threshold in (0.25, 0.5, 0.58, 0.7, 0.95):
            assert len(found.lesions(threshold)) == len(whole.lesions(threshold))
        assert float(found.outlines[0].max()) == pytest.approx(max(sure, 0.9), abs=1e-3)  # and what was found is drawn


def test_a_closer_look_does_not_cover_up_a_damaged_detector():
    model, x = shared_model(), torch.rand(2, 1, 64, 64, generator=seeded())
    with torch.no_grad():
        model.members[0].dnet.head.bias[1:] = math.nan  # it draws an outline, and its boxes are none
    answer = model.look(x)
    assert answer.opinions.isfinite().all()
    assert answer.boxes.isnan().all()


def test_who_was_shown_the_lesion_does_not_draw_it():
    """Crops around true boxes (--roi mask) know where the lesion is: what they find must not be judged as found."""
    model, x = shared_model(), torch.rand(3, 1, 64, 64, generator=seeded())
    model.members[1].config["roi"] = "mask"
    boxes = torch.tensor([[0.2, 0.2, 0.4, 0.4]] * 3)
    close(model.look(x, boxes).found.boxes(), model.locate(x))


def test_all_programs_tell_the_box_of_the_answer(tmp_path):
    """The finer one, where members look closer: infer.py, the page of explain.py, the list of suggest, the curve of al_loop."""
    model, image = shared_model(), picture(60, 48, 3)
    image.save(tmp_path / "a.png")
    model.info["lesion_threshold"] = 0.0
    models.save(tmp_path / "m.pt", model)
    told = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu").predict(tmp_path / "a.png")["box"]
    assert report.explain_picture(model, image, "gradcam")[1] == pytest.approx(told, abs=0.06)
    picture(60, 48, 4).save(tmp_path / "b.png")
    (tmp_path / "t.csv").write_text("image,label\na.png,benign\nb.png,malignant\n")
    images, rows = quiet_load(tmp_path / "t.csv", 64), torch.arange(2)
    coarse, fine = model.locate(images.pixels), model.look(images.pixels).boxes
    assert (coarse - fine).abs().max() > 0.02  # else this would show nothing
    guesses, found = person.read_guesses(model, images, rows, coarse)
    close(found, fine)
    assert [float(v) for v in guesses[0][2].split()] == pytest.approx(told, abs=0.51)
    images.boxes = fine
    assert al_loop.assess(model, images, rows, coarse)["iou"] == pytest.approx(1, abs=1e-4)


def test_an_older_files_detector_votes_as_it_did(tmp_path):
    """Version 1: the box is the mean of all cells' under the softmax of their votes."""
    torch.manual_seed(0)
    dnet, members = models.VotingDNet("small_cnn", 1), [models.CNet("small_cnn", 2, 1)]
    model = models.Ensemble(members, classes=["a", "b"], size=32, load_size=32, channels=1)
    models.save(tmp_path / "new.pt", model)
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    content |= {"version": 1, "dnet": {"config": dnet.config, "state": dnet.state_dict()}}
    for key in ("dnets", "lesion_threshold"):
        del content[key]
    torch.save(content, tmp_path / "old.pt")
    old, x = models.load(tmp_path / "old.pt"), torch.rand(3, 1, 32, 32, generator=seeded())
    maps = backbones.feature_pyramid(old.dnets[0].features, backbones.standardise(x, "image"))[-3:]
    merged = old.dnets[0].lateral[2](maps[2])
    for k in (1, 0):
        merged = old.dnets[0].lateral[k](maps[k]) + F.interpolate(merged, size=maps[k].shape[-2:])
    votes, cells = old.dnets[0].read(merged)
    expected = (cells.flatten(2) * votes.flatten(1).softmax(1)[:, None]).sum(2).clamp(0, 1)
    close(old.locate(x), expected)
    assert not old.tells_outlines
    answer = infer.BreastCancerDetector(tmp_path / "old.pt", "cpu").predict(picture(32, 32, 0))
    assert answer["outline"] is None
    assert len(answer["box"]) == 4
    said = error_of(call(infer, "--model", tmp_path / "old.pt", "--save-mask", tmp_path, HERE / "docs" / "answer.png"))
    assert "tells no outlines" in said


@pytest.mark.parametrize("classes", [1, 3])
def test_evidence_beside_the_point_by_hand(classes):
    """Of logits sum(w x^2) the input gradient is 2 w x: the loss is known without a backward pass through the images."""
    w = torch.rand(classes, 1, 4, 5, generator=seeded(), dtype=torch.double).requires_grad_()
    x, beside = torch.rand(6, 1, 4, 5, generator=seeded(), dtype=torch.double), torch.zeros(6, 4, 5)
    beside[0, :2], beside[1, 0, 0], beside[2] = 1, 0.5, 1  # 3 to 5: nothing is beside the point

    def loss(w):
        images = x.clone().requires_grad_()
        return losses.evidence_loss(torch.einsum("nchw,kchw->nk", images**2, w).double(), images, beside)

    z = torch.einsum("nchw,kchw->nk", x**2, w)
    slopes = torch.ones(6, 1) if classes == 1 else 1 - classes * z.softmax(1)  # of the summed log-probabilities
    energy = (torch.einsum("nk,kchw->nchw", slopes.double(), w) * 2 * x).square()[:, 0]
    share = (energy * beside).sum((1, 2)) / energy.sum((1, 2)) / beside.mean((1, 2)).clamp(min=0.01)
    close(loss(w).detach().double(), share[:3].mean().detach())
    close(torch.autograd.grad(loss(w), w)[0], torch.autograd.grad(share[:3].mean(), w)[0])
    beside[:] = 0
    assert float(loss(w).detach()) == 0
    assert torch.equal(torch.autograd.grad(loss(w), w)[0], torch.zeros_like(w))


def test_what_lies_far_from_a_lesion_is_beside_the_point():
    boxes = torch.tensor([[0.4, 0.4, 0.6, 0.7], [math.nan] * 4])
    x, masks = torch.zeros(2, 1, 100, 100), torch.ones(2, 100, 100)
    same, far = train.beside_the_point(x, boxes, masks)
    assert same is masks
    assert not far[1].any()  # where no lesion is known all may tell
    assert not far[0, 40:70, 40:60].any()  # the box, and its corners
    assert far[0, :30].all()
    assert far[0, :, 70:].all()
    lesion, marked = train.beside_the_point(x, boxes, torch.stack([masks, masks * 0.5], 1))
    assert torch.equal(lesion, masks)
    assert torch.equal(marked, masks * 0.5)


def test_attend_turns_a_network_away_from_what_feedback_marks_slow(tmp_path):
    """A letter in the corner gives the class away, and so does the lesion, less plainly. Who is told not to read looks at
    the lesion more."""
    corner, lesion = np.zeros((2, 48, 48), bool)
    corner[2:14, 2:14], lesion[20:36, 18:38] = True, True
    for i in range(48):
        kind, generator = i % 2, np.random.default_rng(i)
        pixels = generator.integers(60, 140, (48, 48)).astype(np.uint8)
        pixels[lesion] = generator.integers(60, 160, lesion.sum()) + (20 if kind else 0)
        pixels[corner] = 250 if kind else 20
        app.write_feedback(
            tmp_path / "f", Image.fromarray(pixels).convert("RGB"), ["benign", "malignant"][kind], lesion, corner
        )
    seen = quiet_load(tmp_path / "f", 32)
    assert seen.beside.flatten(1).any(1).all()
    assert not (seen.beside & seen.masks).any()
    read, common = {}, "--nets cnet --batch 8 --lr 3e-3 --epochs 12 --augment 0.3"
    for weight in (0, 1):
        folder, said, _ = quick(tmp_path, f"--name w{weight} --attend {weight} {common}", data_folder=tmp_path / "f")
        assert "marked as beside the point: 48" in said
        model = models.load(folder)
        x = seen.pixels.float() / 255
        maps = saliency.input_gradient(model.members[0], x, torch.ones(48, dtype=torch.long)).square().sum(1)
        read[weight] = [float(saliency.energy_inside(maps, where).mean()) for where in (seen.beside, seen.masks)]
    assert read[1][0] < read[0][0] / 2, read
    assert read[1][1] > read[0][1], read


def test_options_that_what_is_learnt_would_pass_over():
    head = ["--learn", "head", "--from", "m.pt"]
    for more in (["--epochs", "9"], ["--lr", "0.1"], ["--ema", "0.5"], ["--augment", "0"]):
        refused(f"{more[0]}: --learn head", parse, [*head, *more])
        refused(f"{more[0]}: --learn head", al_loop.parse, [*head, *more])
    refused("the pull is that of --learn head", parse, ["--pull", "2"])
    refused("the pull is that of --learn head", parse, ["--data", "x", "--pull", "2"])
    assert parse([*head, "--pull", "2"]).pull == 2


def test_attend_says_where_it_has_no_meaning(tmp_path):
    class_folders(tmp_path / "d", {"benign": 9, "malignant": 9})
    for path in (tmp_path / "d").rglob("*_mask.png"):
        path.unlink()
    for more, why in (
        ("--nets dnet", "leave out --nets dnet"),
        ("--learn head", "--attend: --learn head is a convex fit"),
        ("--model none", "leave out --model none"),
        ("", "tells what is beside the point"),
        ("--dummy-boxes", "tells what is beside the point"),
    ):
        where = ["--data", str(tmp_path / "d"), "--runs", str(tmp_path), "--cache", str(tmp_path / "c")]
        refused(why, train.main, [*where, "--weights", "none", "--attend", "1", *more.split()])


def test_a_persons_answers_may_bring_the_only_marks(tmp_path, monkeypatch):
    class_folders(tmp_path / "d", {"benign": 9, "malignant": 9})
    for path in (tmp_path / "d").rglob("*_mask.png"):
        path.unlink()
    corner, seen = np.zeros((40, 60), bool), []
    corner[:9, :9] = True

    def make_runs(images, *_):
        seen.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_runs", make_runs)
    where = ["--data", str(tmp_path / "d"), "--runs", str(tmp_path), "--cache", str(tmp_path / "c"), "--size", "32"]
    where += ["--model", "small_cnn", "--weights", "none", "--attend", "1"]
    for name, beside in (("plain", None), ("marked", corner)):
        app.write_feedback(tmp_path / name, picture(60, 40, 99).convert("RGB"), "benign", beside=beside)
    refused("tells what is beside the point", al_loop.main, ["learn", "--labels", str(tmp_path / "plain"), *where])
    with pytest.raises(SystemExit):
        al_loop.main(["learn", "--labels", str(tmp_path / "marked"), *where])
    assert seen[0].beside.flatten(1).any(1).tolist() == [False] * 18 + [True]


def marked_table(folder, name, marks, masks=""):
    """A CSV of 24 pictures in all splits; marks: of each the cell of not_this, by its number and split."""
    lines = []
    for i in range(24):
        image = picture(60, 40, i + 1)
        image.paste(250 if i % 2 else 5, (15, 10, 40, 25))
        image.save(folder / f"i{i}.png")
        split = ["train", "train", "train", "train", "val", "val", "test", "test"][i % 8]
        lines.append(f"i{i}.png,{['benign', 'malignant'][i % 2]},{split},{masks},{marks(i, split)}")
    (folder / f"{name}.csv").write_text("\n".join(["image,label,split,mask,not_this", *lines]) + "\n")
    return folder / f"{name}.csv"


def test_attend_without_a_mark_to_learn_from_is_refused_and_feedback_may_bring_the_first(tmp_path):
    corner = np.zeros((40, 60), bool)
    Image.fromarray(corner).save(tmp_path / "none_mask.png")
    corner[:8, :8] = True
    Image.fromarray(corner).save(tmp_path / "corner_mask.png")
    empty = marked_table(tmp_path, "empty", lambda i, split: "none_mask.png")
    assert quiet_load(empty, 32).beside is None
    tests = marked_table(tmp_path, "tests", lambda i, split: "corner_mask.png" if split == "test" else "")
    for path in (empty, tests):
        refused("nothing in the training images", quick, tmp_path, "--attend 1", data_folder=path)
    for i in range(4):
        image = picture(60, 40, 100 + i, "RGB")
        app.write_feedback(tmp_path / "f", image, ["benign", "malignant"][i % 2], None, corner if i < 2 else None)
    options = ["--attend 1 --name learn --labels", str(tmp_path / "f")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        where = ["--data", str(empty), *TINY, "--runs", str(tmp_path), "--cache", str(tmp_path / "cache")]
        al_loop.main(["learn", *where, *" ".join(options[:1]).split(), options[1]])
    assert out.getvalue().count("--attend does nothing here: none of these 12 images") == 1  # before the answers


def test_what_the_pool_marks_is_hidden_until_it_is_paid_for():
    images = data.phantom_set(6, 32)
    images.beside = ~images.masks
    known = al_loop.reveal(images, torch.tensor([1, 4]))
    for name in ("masks", "beside"):
        assert getattr(known, name).flatten(1).any(1).tolist() == [False, True, False, False, True, False]
        assert torch.equal(getattr(known, name)[[1, 4]], getattr(images, name)[[1, 4]])


def test_strokes_thinner_than_a_pixel_of_the_square_stay_where_they_run(tmp_path):
    picture(800, 600).save(tmp_path / "a.png")
    strokes = np.zeros((600, 800), np.uint8)
    strokes[300, 400] = strokes[100, 200:264] = 255
    Image.fromarray(strokes).save(tmp_path / "s_mask.png")
    (tmp_path / "t.csv").write_text("image,label,not_this\na.png,benign,s_mask.png\n")
    rows, columns = torch.nonzero(quiet_load(tmp_path / "t.csv", 32).beside[0]).T.tolist()
    assert [*zip(rows, columns, strict=True)] == [(8, 8), (8, 9), (8, 10), (16, 16)]  # 25 px a cell, bars of 4


def test_a_mask_is_not_what_is_beside_the_point(tmp_path):
    picture(40, 30).save(tmp_path / "a.png")
    Image.new("L", (40, 30), 255).save(tmp_path / "l_mask.png")
    (tmp_path / "t.csv").write_text("image,label,mask,not_this\na.png,benign,l_mask.png,l_mask.png\n")
    refused("line 2: .*can't be both", quiet_load, tmp_path / "t.csv", 40)


def test_the_cache_tells_the_next_image_from_a_mask(tmp_path):
    for i, name in enumerate(("a", "b", "m")):
        picture(40, 30, i).save(tmp_path / f"{name}.png")
    for lines, count in (("a.png,x,m.png\nb.png,y,", 2), ("a.png,x,\nm.png,x,\nb.png,y,", 3)):
        (tmp_path / "t.csv").write_text(f"image,label,mask\n{lines}\n")
        assert len(quiet_load(tmp_path / "t.csv", 40, cache=tmp_path / "cache")) == count


def test_what_several_rows_of_a_picture_mark_is_learnt(tmp_path):
    image, corner, lesion = picture(60, 40, 1, "RGB"), *np.zeros((2, 40, 60), bool)
    corner[:8, :8] = lesion[20:30, 20:30] = True
    for what in ((None, None), (lesion, None), (None, corner), (None, corner)):
        app.write_feedback(tmp_path, image, "benign", *what)
    (entry,) = person.all_answers(argparse.Namespace(labels=[tmp_path], partial=False), ["benign", "malignant"])
    assert (len(entry.masks), len(entry.beside)) == (1, 2)


def test_stages_of_a_network_without_padding_and_gradients_that_underflow():
    assert [*models.CNet("alexnet").stages] == [4, 8, 16, 32]  # of 128 pixels it makes 31, 15, 7, 3
    for scale in (1.0, 1e-9):
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        torch.nn.init.constant_(net[0].weight, 0.1)
        last = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(last.weight, scale)
        assert saliency.grad_cam_pp(net.append(last), torch.rand(1, 1, 16, 16), 1, "0").max() > 0


def test_the_cache_tells_a_mask_from_what_is_beside_the_point(tmp_path):
    picture(40, 30).save(tmp_path / "a.png")
    for name, part in (("l_mask.png", slice(0, 10)), ("n_mask.png", slice(20, 30))):
        mask = np.zeros((30, 40), np.uint8)
        mask[part] = 255
        Image.fromarray(mask).save(tmp_path / name)
    found = {}
    for columns in ("l_mask.png;n_mask.png,", "l_mask.png,n_mask.png", "n_mask.png,l_mask.png", "l_mask.png,"):
        (tmp_path / "t.csv").write_text(f"image,label,mask,not_this\na.png,benign,{columns}\n")
        images = quiet_load(tmp_path / "t.csv", 40, cache=tmp_path / "cache")
        beside = None if images.beside is None else int(images.beside.sum())
        found[columns] = int(images.masks.sum()), beside
    assert list(found.values()) == [(800, None), (400, 400), (400, 400), (400, None)]
    (tmp_path / "t.csv").write_text("image,label,mask,not_this\na.png,benign,l_mask.png,gone.png\n")
    refused("gone.png", quiet_load, tmp_path / "t.csv", 40)


def test_what_a_detector_learns_from_masks_boxes_and_neither():
    images = data.phantom_set(5, 32)
    images.masks[1] = False
    images.masks[1, 2:6, 2:6] = images.masks[1, 20:30, 20:30] = True  # two lesions: an outline, but the box of none
    images.masks[2:] = False  # 2: a box alone; 3: no lesion; 4: not known
    images.boxes[3:] = math.nan
    images.outlined[4] = False
    taught, rows = {}, torch.arange(5)

    def kept(logits, cells, outlines, boxes):
        taught.update(outlines=outlines, boxes=boxes)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "detection_loss", kept)
        loss = train.finding_loss(images, torch.device("cpu"))
        loss(torch.zeros(5, 8, 8), None, images.boxes, images.masks.float(), rows)
    close(taught["outlines"][:2], F.avg_pool2d(images.masks[:2].float(), 4))
    assert torch.equal(taught["outlines"][2:4], losses.ellipses(images.boxes[2:4], 8, 8))
    assert not taught["outlines"][3].any()
    assert taught["outlines"][4].isnan().all()
    assert taught["boxes"].isfinite().all(1).tolist() == [True, False, True, False, False]


def fold_results(sizes=(40, 30, 50), members=2):
    """Answers of folds to images of random labels, as test.pt holds them, and the ImageSet."""
    n, generator = sum(sizes), seeded()
    images = dataclasses.replace(data.phantom_set(n, 8), labels=(torch.rand(n, generator=generator) < 0.4).long())
    results = []
    for rows in torch.arange(n).split(sizes):
        logits = torch.randn(members, len(rows), generator=generator) + 1.5 * images.labels[rows]
        opinions = torch.stack([-logits, logits], 2).softmax(2)
        alone = [{"probabilities": o, "threshold": 0.5, "val_auc": 0.9} for o in opinions]
        results.append({"rows": rows, "opinions": opinions, "weights": [0.7, 0.3], "members": alone})
        results[-1] |= {"probabilities": opinions[0], "threshold": 0.5, "temperature": 1.0, "boxes": None}
    return images, results


def test_each_fold_is_judged_by_the_answers_of_the_others():
    images, results = fold_results()
    args = parse(["--folds", "3"])
    raw = [0.7 * r["opinions"][0] + 0.3 * r["opinions"][1] for r in results]
    for i, judged in enumerate(judge.cross_fit(images, results, args)):
        others = torch.cat([p for k, p in enumerate(raw) if k != i])
        labels = torch.cat([images.labels[r["rows"]] for k, r in enumerate(results) if k != i])
        t = metrics.fit_temperature(others, labels)
        positive = (others.log() / t).softmax(1)[labels == 1, 1].sort(descending=True).values
        limit = float(positive[math.ceil(0.95 * len(positive) - 1e-9) - 1])
        assert (judged["temperature"], judged["threshold"]) == (
            pytest.approx(t, rel=1e-3),
            pytest.approx(limit, rel=1e-3),
        )
        torch.testing.assert_close(judged["probabilities"], (raw[i].log() / t).softmax(1), atol=1e-3, rtol=1e-3)
        assert judged["members"][0]["threshold"] not in (0.5, judged["threshold"])
        assert judged["members"][0]["val_auc"] == 0.9
    assert judge.cross_fit(images, results, parse([])) is results  # no folds
    one_class = dataclasses.replace(images, labels=images.labels * (torch.arange(120) < 40))
    assert judge.cross_fit(one_class, results, args)[0]["threshold"] == 0.5  # the others hold no cancer


def test_a_change_in_pairs_by_multinomials():
    images, before = fold_results()
    images.groups = torch.arange(120) // 2
    noise = torch.randn(120, generator=seeded(3))
    after = [
        r
        | {"probabilities": (r["probabilities"].log() + noise[r["rows"], None] * torch.tensor([1.0, -1.0])).softmax(1)}
        for r in before
    ]
    change = report.compare(images, before, after)
    answers = [torch.cat([(r["probabilities"][:, 1] >= 0.5).long() for r in runs]) for runs in (before, after)]
    flipped, right = answers[0] != answers[1], [a == images.labels for a in answers]
    assert change["flipped"] == int(flipped.sum()) > 0
    assert change["righted"] == int((flipped & right[1]).sum())
    hits = np.bincount(images.groups, right[1].double() - right[0].double())  # of each group
    drawn = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 2000)
    bounds = np.quantile(drawn @ hits / 120, [0.025, 0.975])
    m = change["test"]["accuracy"]
    assert (m["low"], m["high"]) == pytest.approx(bounds, abs=0.03)


def test_folds_made_one_read_every_patient_on_one_scale():
    net = models.CNet("small_cnn", 2, 1, meta=5).eval()
    own = [{"column": "age", "mean": 40.0, "sd": 10.0}, {"column": "sex", "levels": ["f", "m"]}]
    new = [{"column": "age", "mean": 55.0, "sd": 20.0}, own[1]]
    rows = [{"age": "30", "sex": "f"}, {"age": "", "sex": "m"}, {"age": "80", "sex": ""}]
    x = torch.rand(3, 1, 16, 16)
    before, after = (data.encode_meta(rows, None, spec)[0] for spec in (own, new))
    close(judge.rescale_patients(net, own, new)(x, after), net(x, before))
    assert not torch.allclose(net(x, after), net(x, before))


def test_all_folds_are_one_model_and_workers_change_nothing_slow(tmp_path, folders, ensemble):
    options = "--positive malignant --ensemble small_cnn,small_cnn --folds 2 --name w --workers 2 --refit"
    folder, said, report = quick(tmp_path, options, data_folder=folders)
    for name in ("fold1", "fold2"):
        assert same_model(folder / name, ensemble[0] / name)
    assert clean(report["test"]) == clean(ensemble[2]["test"])
    model, parts = models.load(folder), [models.load(folder / f"fold{k}") for k in (1, 2)]
    images = quiet_load(folders, 32, positive="malignant")
    x = images.pixels[:6]
    votes = [p.weights / p.weights.sum() / 2 for p in parts]
    expected = sum((w[:, None, None] * p.look(x).opinions.mean(1)).sum(0) for w, p in zip(votes, parts, strict=True))
    close(((expected + 1e-12).log() / model.info["temperature"]).softmax(1), model(x))
    results = [torch.load(folder / f"fold{k}" / "test.pt", weights_only=True) for k in (1, 2)]
    scores = torch.cat([model_of(p, r) for p, r in zip(parts, results, strict=True)])
    labels = images.labels[torch.cat([r["rows"] for r in results])]
    scores = ((scores + 1e-12).log() / model.info["temperature"]).softmax(1)[:, 1]
    positive = scores[labels == 1].sort(descending=True).values
    assert model.info["threshold"] == pytest.approx(float(positive[math.ceil(0.95 * len(positive)) - 1]), rel=1e-4)
    assert sorted(model.info["seen"]["train"].tolist()) == sorted(images.pictures().tolist())
    refit = models.load(folder / "refit")
    assert {k: refit.info[k] for k in ("threshold", "temperature")} == {
        k: model.info[k] for k in ("threshold", "temperature")
    }
    assert f"--model {folder}/model.pt" in said
    assert call(infer, folder / "example.png", "--model", folder).returncode == 0


def model_of(part, result):
    weights = part.weights / part.weights.sum()
    return (weights[:, None, None] * result["opinions"]).sum(0)


def test_an_own_trunk_trains_two_networks_as_before(tmp_path, folders):
    folder, _, _ = quick(tmp_path, "--trunk own --name o --epochs 1", data_folder=folders)
    model = models.load(folder)
    assert ([m.shared for m in model.members], len(model.dnets)) == ([False], 1)
    assert [h["net"] for h in log_of(folder)] == ["dnet", "cnet1 small_cnn"]


def test_an_outline_is_told_in_numbers_and_drawn_in_the_pictures_own_pixels(tmp_path, monkeypatch):
    y, x = np.indices((60, 120))
    disc = (y - 30) ** 2 + (x - 60) ** 2 < 400
    told = answers.describe_outline(disc, (240, 60))  # of a picture that is twice as wide as the mask
    assert told["area"] == pytest.approx(math.pi * 400 / 7200, rel=0.02)
    assert told["width_over_height"] == pytest.approx(2, rel=0.02)
    assert told["irregularity"] < 0.03
    star = disc & ~((np.abs(y - 30) > 4) & (np.abs(x - 60) > 4))
    assert answers.describe_outline(star, (120, 60))["irregularity"] > 0.4
    assert answers.describe_outline(np.zeros((5, 5), bool), (5, 5)) is None
    both = shared_model()
    model = models.Ensemble([both.members[0]], **both.info).eval()  # of one that sees the whole: no closer look
    outlines = torch.full((1, 16, 16), 0.01)
    outlines[0, 6:10, 2:6] = 0.9
    found = models.Found(outlines, torch.tensor([0.125, 0.375, 0.375, 0.625])[None, :, None, None].expand(1, 4, 16, 16))
    monkeypatch.setattr(models, "average", lambda _: found)
    models.save(tmp_path / "m.pt", model)
    picture(120, 60, 1).save(tmp_path / "p.png")
    out = tmp_path / "out"
    said = call(
        infer,
        tmp_path / "p.png",
        "--model",
        tmp_path / "m.pt",
        "--save-mask",
        out,
        "--json",
        "--csv",
        tmp_path / "a.csv",
    )
    answer = json.loads(said.stdout)
    assert answer["box"] == pytest.approx(
        [15, 15, 45, 45], abs=0.2
    )  # of a square of 120, with bars of 30 above and below
    assert answer["boxes"] == [answer["box"]]
    assert answer["lesion_score"] == pytest.approx(0.9)
    assert answer["outline"]["width_over_height"] == pytest.approx(1, abs=0.15)
    mask = np.asarray(Image.open(out / "p.png_mask.png"))
    assert mask.shape == (60, 120)
    assert data.box_of(mask > 0) == pytest.approx([15, 15, 45, 45], abs=3)
    row = next(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert float(row["irregularity"]) == answer["outline"]["irregularity"]
    given = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu").predict(
        tmp_path / "p.png", None, [5, 5, 20, 20], masks=True
    )
    assert (given["box"], given["outline"], given["lesion_score"], given["mask"]) == ([5, 5, 20, 20], None, None, None)
    faint = found._replace(outlines=outlines * 0.4 / 0.9)
    told = infer.describe_lesions(
        faint,
        {"placement": (64 / 120, 32 / 60, 0, 16), "origin": Origin((120, 60), (120, 60))},
        {"load_size": 64, "lesion_threshold": 0.3},
        True,
    )
    assert told["box"] == pytest.approx([15, 15, 45, 45], abs=0.2)  # what is found is drawn, however faint
    assert data.box_of(told["mask"]) == pytest.approx([15, 15, 45, 45], abs=5)
    small = torch.full((1, 16, 16), 0.05)
    small[0, 8, 4] = 0.52  # a cell, whose top is a half no more where it is drawn
    about = {"placement": (64 / 120, 32 / 60, 0, 16), "origin": Origin((120, 60), (120, 60))}
    told = infer.describe_lesions(
        found._replace(outlines=small), about, {"load_size": 64, "lesion_threshold": 0.3}, True
    )
    assert told["outline"] is not None
    assert data.box_of(told["mask"]) == pytest.approx([30, 30, 37.5, 37.5], abs=5)
    model.info["lesion_threshold"] = 0.95  # less sure than that: no lesion is said to be found
    models.save(tmp_path / "m.pt", model)
    answer = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu").predict(tmp_path / "p.png", masks=True)
    assert (answer["box"], answer["boxes"], answer["outline"], answer["mask"].any()) == (None, [], None, False)


def test_another_hospitals_set_is_tested_with_the_threshold_that_the_model_brings(tmp_path, folders, whole):
    other = class_folders(tmp_path / "other", {"benign": 9, "malignant": 6}, width=44, height=66)
    old = next((folders / "benign").glob("*(1).png"))
    shutil.copy(old, other / "benign" / "again.png")
    command = [
        "--model",
        whole[0],
        "--test",
        other,
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "out",
        "--positive",
        "malignant",
    ]
    said = call(infer, *command)
    assert "1 of the 16 images are left out: the model has met them" in said.stdout
    report, detector = report_of(tmp_path / "out"), infer.BreastCancerDetector(whole[0], "cpu")
    files = sorted(other.glob("*/*).png"))
    answers = detector.predict(files)
    true = ["malignant" in f.name for f in files]
    hits = [a["prediction"] == "malignant" for a, t in zip(answers, true, strict=True) if t]
    assert report["test"]["sensitivity"]["value"] == pytest.approx(np.mean(hits))
    assert report["test"]["auc"]["value"] == pytest.approx(
        float(metrics.auc([a["probability"] for a in answers], [int(t) for t in true])), abs=0.02
    )
    assert {"iou", "dice"} <= set(report["test"])
    assert "give 32 or more" in error_of(call(infer, *command, "--adapt"))
    assert "its classes are" in error_of(call(infer, *command[:-1], "benign"))
    assert "--test nowhere: no such file" in error_of(call(infer, "--model", whole[0], "--test", "nowhere"))
    assert "and no pictures or options for them" in error_of(call(infer, old, *command))
    assert "and no pictures or options for them" in error_of(call(infer, *command, "--csv", tmp_path / "t.csv"))
    assert "no images or options for them" in error_of(call(infer, "--model", whole[0], "--evaluate", "--adapt"))


def test_what_adapts_reads_patients_and_weighs_pictures_alike(monkeypatch):
    spec, sizes = [{"column": "age", "mean": 50.0, "sd": 10.0}], []
    net = models.CNet("small_cnn", 2, 1, meta=2)
    model = models.Ensemble([net], classes=["a", "b"], size=32, load_size=32, channels=1, meta_spec=spec, familiar=[1])
    monkeypatch.setattr(
        model, "look", lambda x, *rest, real=model.look, **more: sizes.append(len(x)) or real(x, *rest, **more)
    )
    infer.adapt(model.eval(), torch.rand(65, 1, 32, 32), None, torch.zeros(65, 2))
    assert sizes == [33, 32]
    assert model.info["familiar"] is None
    with pytest.raises(InputError, match="patient metadata"):
        infer.adapt(model, torch.rand(40, 1, 32, 32))
    assert not any(m.training for m in model.modules())


def test_the_order_of_scales_changes_nothing_but_the_order():
    model, x = shared_model(), torch.rand(2, 1, 64, 64, generator=seeded())
    one, two = model.look(x, scales=(1.0, 0.5)), model.look(x, scales=(0.5, 1.0))
    close(one.boxes, two.boxes)
    assert all(map(torch.equal, one.traits, two.traits))


def test_a_member_that_sees_nothing_shares_no_trunk():
    images, rows = data.phantom_set(8, 16), torch.arange(8)
    for ensemble, trunk in (("small_cnn,small_cnn", "shared"), ("small_cnn,none", "own"), ("none", "own")):
        assert train.choose_trunk(images, rows, rows, parse(["--ensemble", ensemble])) == trunk


def test_batch_norm_takes_the_means_of_the_pictures_at_hand(folders, whole):
    model, x = models.load(whole[0]), torch.rand(64, 1, 32, 32, generator=seeded())
    infer.adapt(model, x, batch=64)
    layer, seen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)), []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.look(x, views=1)
    torch.testing.assert_close(layer.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.running_var, seen[0].var((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert not any(m.training for m in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# train.py: the command line


def test_mistakes_on_the_command_line_are_one_line(tmp_path, folders, whole, ensemble):
    one, unknown = class_folders(tmp_path / "one", {"benign": 6}), tmp_path / "nowhere"
    boxless = write_npz(tmp_path / "boxless.npz", n=40)
    lonely = write_npz(tmp_path / "no_positive.npz", val_labels=np.zeros(10, np.uint8))
    (tmp_path / "text.pt").write_text("x")
    teacher, learner = whole[0] / "model.pt", ensemble[0] / "fold1"
    tested, other = (set(torch.load(f / "test.pt")["rows"].tolist()) for f in (whole[0], learner))
    base = ["--data", folders, *TINY, "--runs", tmp_path / "runs", "--cache", tmp_path / "cache"]
    for script, options, why in [
        (train, f"--data {unknown}", "no such file or folder"),
        (train, f"--data {one}", "one class only"),
        (train, f"--data {lonely}", "the val split has no '1' image"),
        (train, "--positive x", "no such class"),
        (train, f"--resume {unknown}", "nothing to resume"),
        (train, f"--runs {whole[0].parent} --name whole", "exists; choose another name"),
        (train, "--model resnet19", "no such network"),
        (train, "--model none --name f", "needs patient data"),
        (train, "--model none --nets dnet --name f", "needs patient data"),
        (train, "--name ../f", "leads out of the folder of --runs"),
        (train, f"--name {'f' * 300}", "can't be made (File name too long)"),
        *([] if torch.backends.mps.is_available() else [(train, "--device mps", "not on this machine")]),
        (train, f"--weights {tmp_path / 'text.pt'}", "not a PyTorch file"),
        (train, "--weights imagenet", "no weights for it"),
        (train, "--epochs 0", "--epochs: 0: must lie in"),
        (train, "--epochs many", "no whole number"),
        (train, "--pos-weight x", "--pos-weight x"),
        (train, "--fold 5", "unrecognized arguments"),
        (train, "@nowhere.args", "nowhere.args"),
        (train, "--nets dnet --roi dnet", "there is none"),
        (train, "--nets cnet --roi dnet --name a", "needs D-Net"),
        (train, f"--data {boxless} --nets dnet --name b", "no boxes"),
        (train, f"--data {boxless} --roi dnet --name c", "no boxes"),
        (train, f"--data {boxless} --roi mask --name d", "neither masks nor boxes"),
        (train, f"--data {boxless} --roi none,mask --name d", "neither masks nor boxes"),
        (train, "--model alexnet --size 16 --name e", "too small for alexnet"),
        (train, "--ensemble small_cnn,alexnet --size 16 --name g", "too small for alexnet"),
        (train, "--ensemble small_cnn,resnet19 --name g", "no such network"),
        (train, "--folds 2 --nets cnet --roi none,dnet --name g", "needs D-Net"),
        (search, "2 --nets cnet --roi dnet --search-folds 2 --name g", "needs D-Net"),
        (search, "2 --search-over size=2,4 --model alexnet --search-folds 2 --name g", "too small for alexnet"),
        (search, f"2 --data {boxless} --search-over attend=0:1 --search-folds 2 --name g", "beside the point"),
        (al_loop, f"--data {boxless} --roi dnet --rounds 1 --start 9 --query 1 --name g", "no boxes"),
        (al_loop, "--ensemble small_cnn,alexnet --size 16 --rounds 1 --name g", "too small for alexnet"),
        (al_loop, "--nets cnet --roi dnet --rounds 1 --start 9 --query 1 --workers 2 --name g", "needs D-Net"),
        (pretrain, "--model alexnet --size 16 --name g", "too small for alexnet"),
        (train, "--roi lesion", "--roi lesion"),
        (train, "--device toaster", "no such device"),
        *([] if torch.cuda.is_available() else [(train, "--device cuda", "no CUDA device")]),
        (train, f"--teacher {unknown}.pt", "no such file"),
        (train, f"--teacher {teacher}", "its classes ['benign+normal', 'malignant'] are not those of the data"),
        (
            train,
            f"--positive malignant --teacher {learner}/model.pt",
            f"{len(tested - other)} of the {len(tested)} test",
        ),
        (train, f"--against {unknown}", "give the folder of a finished run"),
        (train, f"--positive malignant --folds 2 --seed 1 --against {ensemble[0]}", "other test images or classes"),
        (search, "2 --search-over lr=1e-2:1e-4", "an empty range"),
        (search, "2 --search-over lr=", "an empty range"),
        (search, "2 --search-over luck=1:2", "no option --luck that takes a number"),
        (search, "2 --search-over model=1:2", "no option --model that takes a number"),
        (search, "2 --search-over lr=a:b", "in numbers"),
        (search, "2 --against x", "which a search does not touch"),
        (al_loop, f"--data {one}", "one class only"),
        (search, "2 --search-folds 500", "search's fold"),
        (train, "--lr 1000 --epochs 1 --nets cnet", "not finite"),
        (search, "--size 32", "how many settings"),
    ]:
        result = call(script, *base, *options.split())
        assert why in error_of(result), options
        assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not [*(tmp_path / "runs").iterdir()]  # the corrected command can have the name


def test_option_files_hold_comments_and_many_options_a_line(tmp_path):
    (tmp_path / "x.args").write_text("# a recipe\n--epochs 7 --lr 0.5   # fast\n\n--model resnet18\n--weights none\n")
    args = parse([f"@{tmp_path / 'x.args'}", "--lr", "0.1", "--data", "somewhere"])
    assert (args.epochs, args.lr, args.model, args.weights) == (7, 0.1, "resnet18", "none")
    for text in (b"\xff\xfe", b'--name "x', f"@{tmp_path / 'bad.args'}".encode(), b"--name \0"):
        (tmp_path / "bad.args").write_bytes(text + b"\n")
        refused("bad.args: not a file of options", parse, [f"@{tmp_path / 'bad.args'}"])
    recipes = sorted((HERE / "recipes").glob("*.args"))
    assert recipes
    for recipe in recipes:
        (al_loop if recipe.name.startswith("al-") else train).parse([f"@{recipe}", "--data", "somewhere"])


def test_search_halves_resumes_and_its_best_can_be_used_slow(tmp_path, folders):
    options = "4 --positive malignant --search-folds 2 --search-over lr=1e-4:1e-2 size=32,40 dropout=0:0.5 --workers 1"
    folder, _, row = quick(tmp_path, options, "--name s", data_folder=folders, script=search)
    with open(folder / "search.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epochs"]) for r in rows] == [1, 1, 1, 1, 3]
    first = max(rows[:4], key=lambda r: float(r["mean"]))
    assert rows[4]["trial"] == first["trial"] == str(row["trial"])  # the best of the short trainings went on
    for row in rows:
        assert 1e-4 <= float(row["lr"]) <= 1e-2
        assert row["size"] in ("32", "40")
        assert 0 <= float(row["dropout"]) <= 0.5
    assert len({r["lr"] for r in rows}) == 4
    best = parse([f"@{folder / 'best.args'}"])  # of train.py
    assert (best.lr, best.size, best.dropout) == (float(rows[4]["lr"]), int(rows[4]["size"]), float(rows[4]["dropout"]))
    assert (best.data, best.positive) == (str(folders), "malignant")
    assert Image.open(folder / "search.png").width == 3 * 520
    # a search that was killed: some trials are gone, the rest is not done again
    trials, table = sorted(folder.glob("trial*.json")), (folder / "search.csv").read_text()
    kept = {p: p.stat().st_mtime_ns for p in trials[::2]}
    for path in (*trials[1::2], folder / "search.csv"):
        path.unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        search.main(["--resume", str(folder)])
    assert (folder / "search.csv").read_text() == table
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert not list(folder.glob("tmp*"))


def test_the_best_of_a_search_with_the_recipe_has_boxes_slow(tmp_path, folders):  # 14
    recipe = f"@{HERE / 'recipes' / 'busi.args'} --model small_cnn --size 32 --epochs 1 --folds 1"
    one, _, _ = quick(tmp_path, "2 --search-folds 2 --search-over lr=1e-4:1e-2", recipe, "--name s", data_folder=folders, script=search)  # fmt: skip
    options = ["@" + str(one / "best.args"), "--runs", tmp_path, "--cache", tmp_path / "cache", "--name", "best"]
    assert call(train, *options).returncode == 0
    some = infer.BreastCancerDetector(tmp_path / "best", "cpu")
    assert [m.config["roi"] for m in some.model.members] == ["none", "dnet"]
    some.info["lesion_threshold"] = 0.0  # one epoch finds nothing for sure
    box = some.predict(next((folders / "malignant").glob("*(1).png")))["box"]
    assert 0 <= box[0] < box[2] <= 60
    assert 0 <= box[1] < box[3] <= 40


def test_search_draws_by_ratios_and_by_steps():
    argv = ["--search-over", "lr=1e-4:1e-1", "epochs=2:9", "dropout=0.1:0.4"]
    ranges = search.search_ranges(parse(argv, search.build_parser()))
    generator = torch.Generator().manual_seed(0)
    drawn = [search.draw_setting(ranges, generator) for _ in range(3000)]
    assert sum(s["lr"] < 1e-2 for s in drawn) / 3000 == pytest.approx(2 / 3, abs=0.03)  # by ratios
    assert sum(s["dropout"] < 0.2 for s in drawn) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert {s["epochs"] for s in drawn} == set(range(2, 10))


def test_tensorboard_writes_the_log_or_says_how_to_get_it(tmp_path, folders, monkeypatch):
    written = []

    def writer(folder):
        return argparse.Namespace(add_scalar=lambda *values: written.append((folder, *values)), flush=lambda: None)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", argparse.Namespace(SummaryWriter=writer))
    monkeypatch.setattr("options.importlib.util.find_spec", lambda name: name)
    run_folder, _, _ = quick(tmp_path, "--tensorboard --nets cnet --epochs 2 --name t", data_folder=folders)
    for line in log_of(run_folder):
        for key in ("val_auc", "loss"):
            value = pytest.approx(line[key], abs=1e-5)
            assert (f"{run_folder}/tensorboard", f"cnet1 small_cnn/{key}", value, line["epoch"]) in written
    monkeypatch.setattr("options.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        parse(["--tensorboard"])


def test_a_share_of_the_labels_is_drawn_by_group_and_class(folders):
    images = quiet_load(folders, 32, positive="malignant")
    every, some = (train.plan(images, parse(["--label-fraction", share]))[0] for share in ("1", "0.25"))
    assert set(some[1].tolist()) < set(every[1].tolist())
    assert len(some[1]) == pytest.approx(len(every[1]) / 4, abs=2)
    assert torch.equal(some[3], every[3])
    positive = [float(images.labels[rows].double().mean()) for rows in (some[1], every[1])]
    assert positive[0] == pytest.approx(positive[1], abs=0.08)


def test_a_split_by_image_says_so_and_divides_groups(tmp_path):
    for patient in range(6):
        for label in "01":
            folder = tmp_path / "set" / f"p{patient}" / label
            folder.mkdir(parents=True)
            for i in range(5):
                picture(20, 20, 100 * patient + i).save(folder / f"{patient}_{label}_{i}.png")
    said = []
    source = {"source": tmp_path / "set", "size": 20, "cache": None, "log": said.append}
    honest, wrong = (data.load(**source, split_by_image=by_image) for by_image in (False, True))
    assert "claims too much" in "".join(said)

    def crossing(images):
        return len({(Path(n).parent.parent, s) for n, s in zip(images.names, images.splits, strict=True)}) - 6

    assert crossing(honest) == 0
    assert crossing(wrong) > 0
    args = parse(["--data", str(tmp_path / "set"), "--split-by-image", "--cache", str(tmp_path / "c")])
    assert len(load_images(args, log=lambda _: None).groups.unique()) == 60


def test_validation_can_be_a_fixed_part():
    val, args = torch.arange(1000, 2000), parse(["--eval-steps", "2"])
    some = train.eval_rows(val, args, 3)
    assert len(set(some.tolist()) & set(val.tolist())) == len(some) == 2 * train.EVAL_BATCH
    assert torch.equal(some, train.eval_rows(val, args, 3))
    assert torch.equal(train.eval_rows(val, parse([]), 3), val)


def test_the_balanced_threshold_has_the_best_balanced_accuracy():
    generator, args = torch.Generator().manual_seed(0), parse(["--threshold-by", "balance"])
    model = models.Ensemble([], classes=["a", "b"])
    for _ in range(30):
        p = torch.randint(0, 12, (40,), generator=generator) / 11
        labels = torch.randint(0, 2, (40,), generator=generator)
        judge.calibrate(model, torch.stack([1 - p, p], 1)[None], labels, args)
        scores = model.combine(torch.stack([1 - p, p], 1)[None])[:, 1]

        def balance(t, scores=scores, labels=labels):
            return float(((scores >= t)[labels == 1].double().mean() + (scores < t)[labels == 0].double().mean()) / 2)

        assert balance(model.info["threshold"]) == max(map(balance, [*scores.unique(), 2]))


def test_no_option_goes_untested():
    """Every option that -h shows stands in this file, outside this test."""
    source, modules = Path(__file__).read_text(), (train, search, explain, infer, al_loop, pretrain, bench, app)
    for module, *command in [*((m,) for m in modules), (al_loop, "suggest"), (al_loop, "learn")]:
        options = set(re.findall(r"--[a-z][a-z-]+", call(module, *command, "-h").stdout)) - {"--help"}
        assert options
        for option in sorted(options):
            assert re.search(rf'[" ]{option}[" ]', source), f"{module.__name__} {command} {option}"


def test_the_remaining_options_do_what_they_say(tmp_path, folders):
    def images_of(source, options):
        args = parse(["--data", str(source), *TINY, *options.split(), "--cache", str(tmp_path / "c")])
        return load_images(args, log=lambda _: None)

    images = images_of(folders, "--channels 3 --clahe --drop-class normal --seed 3")
    assert images.pixels.shape == (68, 3, 32, 32)
    assert images.classes == ["benign", "malignant"]
    plain = images_of(folders, "--channels 3")
    assert not torch.equal(images.pixels, plain.pixels[:68])  # CLAHE
    assert images.splits != plain.splits[:68]  # another seed
    for n in range(4):
        picture(seed=n).save(tmp_path / f"{n}.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "m.png")
    rows = [f"{n},{c},g{n // 2},train,m" for n, c in enumerate("abab")]
    names = "--image-column file --label-column what --group-column who --split-column where --mask-column lesion"
    images = images_of(write_csv(tmp_path, rows, header="file,what,who,where,lesion"), names)
    assert images.boxes.isfinite().all()
    assert len(images.groups.unique()) == 2
    table = write_csv(tmp_path, ["0,a,1 2 30 20", '1,b,"[2, 3, 9, 9]"'], header="image,label,where")
    images = images_of(table, "--box-columns where")
    np.testing.assert_allclose(images.boxes[0], np.array([1, 2 + 10, 30, 20 + 10]) / 60, atol=0.5 / 32)
    shutil.copytree(folders, tmp_path / "bad")
    (tmp_path / "bad" / "benign" / "broken.png").write_text("x")
    assert len(images_of(tmp_path / "bad", "--skip-bad")) == 80


def test_options_reach_the_networks_and_the_optimizer(tmp_path, folders):
    options = "--dropout 0.5 --normalise fixed --batch 64 --warmup 0.5 --weight-decay 0.3 --clip 0.01 --augment 0"
    options += " --label-smoothing 0.2 --pos-weight 3 --amp on --target-sensitivity 0.5 --device cpu --attention se"
    options += " --views 2 --positive malignant --nets cnet --epochs 2 --steps-per-epoch 4 --name o"
    folder, _, _ = quick(tmp_path, options, data_folder=folders)
    model = models.load(folder / "model.pt")
    config = model.members[0].config
    assert (config["dropout"], config["normalise"], config["attention"]) == (0.5, "fixed", "se")
    assert model.info["views"] == 2
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert {g["weight_decay"] for g in saved["optimizer"]["param_groups"]} == {0.3, 0.0}
    log = log_of(folder)
    assert log[1]["lr"] > log[0]["lr"]  # half of the steps are warm-up
    images = quiet_load(folders, 32, positive="malignant")
    rows = images.rows("val")[images.labels[images.rows("val")] == 1]
    positive = model.combine(train.predict(model, images, rows))[:, 1].sort(descending=True).values
    assert model.info["threshold"] == pytest.approx(float(positive[math.ceil(len(rows) / 2) - 1]), abs=1e-6)
    assert positive[-1] < model.info["threshold"]  # a target of 0.5 gives away sensitivity


# ---------------------------------------------------------------------------------------------------------------------
# saliency.py and explain.py


def explained_net(classes=2, **options):
    torch.manual_seed(0)
    net = models.CNet("small_cnn", classes, 1, **options)
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return net.eval()


def by_hooks(net, x, target):
    """Activations of the last layer and the score's gradients there, the way most people get them."""
    kept = {}
    handle = net.features.register_forward_hook(lambda _, __, out: kept.update(maps=out) or out.retain_grad())
    logits = net(x)
    handle.remove()
    score = logits[:, target] if logits.shape[1] > 1 else logits[:, 0] * (1 if target else -1)
    score.sum().backward()
    return kept["maps"].detach().double(), kept["maps"].grad.double()


@pytest.mark.parametrize(("classes", "target"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_cams_by_hand(classes, target):
    net, x = explained_net(classes), torch.rand(3, 1, 48, 48)
    maps, gradients = by_hooks(net, x, target)
    cam, plus, layer = torch.zeros(3, 3, *maps.shape[2:])
    for n in range(3):
        for c in range(maps.shape[1]):
            a, g = maps[n, c], gradients[n, c]
            cam[n] += g.mean() * a
            layer[n] += g.clamp(min=0) * a
            bottom = 2 * g**2 + a.sum() * g**3
            alpha = torch.where(bottom.abs() > 1e-12, g**2 / bottom, 0.0)
            plus[n] += (alpha * g.clamp(min=0)).sum() * a
    for method, expected in ((saliency.grad_cam, cam), (saliency.grad_cam_pp, plus), (saliency.layer_cam, layer)):
        large = F.interpolate(expected.clamp(min=0)[:, None], size=(48, 48), mode="bilinear")[:, 0]
        torch.testing.assert_close(method(net, x, target, net.features), large.float(), atol=1e-5, rtol=1e-3)


def test_a_named_layer_is_the_one_that_is_used():
    net, x = explained_net(), torch.rand(2, 1, 64, 48)
    for layer, side in (("features.0", 32), (net.features[3], 16), (net.features, 4), (None, 4)):
        maps, gradients = saliency.activations_and_gradients(net, x, 1, layer)
        assert maps.shape == gradients.shape == (2, maps.shape[1], side, side * 3 // 4)
    parallel = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for model, layer, target, why in [
        (net, "nowhere", 1, "no such module; there are features, features.0"),
        (net, torch.nn.ReLU(), 1, "does not come through it"),
        (net, "head", 1, "is no map"),
        (net, net, 1, "do not depend|is no map"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2)), None, 1, "name a `layer`"),
        (torch.nn.Identity(), "", 1, "wrap it so that it gives logits"),
        *((net, None, target, "one an image") for target in ([0, 1, 0], 0.5)),
        (net, None, 2, r"classes are 0 \.\.\. 1"),
    ]:
        with pytest.raises(ValueError, match=why):
            saliency.grad_cam(model, x, target, layer)
    assert saliency.last_map(parallel, x) is parallel[0]
    assert saliency.grad_cam(parallel, x).shape == (2, 64, 48)
    with pytest.raises(ValueError, match="give floats"):
        saliency.integrated_gradients(net, (x * 255).byte())


def test_the_default_layer_is_looked_for_again_where_the_network_or_the_size_changed():
    net = torch.nn.Sequential(*[torch.nn.Conv2d(1, 4, 3, 2, 1), torch.nn.Conv2d(4, 4, 3, 2, 1)], torch.nn.Flatten())
    net.append(torch.nn.LazyLinear(2))
    assert saliency.last_map(net, torch.rand(1, 1, 16, 16)) is net[1]
    net[1] = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, 2, 1), torch.nn.ReLU(inplace=True))
    assert saliency.last_map(net, torch.rand(1, 1, 16, 16)) is net[1]
    small = torch.nn.Sequential(net[0], net[1], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert saliency.last_map(small, torch.rand(1, 1, 16, 16)) is small[1]
    assert saliency.last_map(small, torch.rand(1, 1, 3, 3)) is small[0]  # there the second gives 1 x 1


def test_in_place_layers_and_inference_mode_change_nothing():
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)]
    tail = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)]
    written, plain = (torch.nn.Sequential(*body, torch.nn.ReLU(inplace=place), *tail) for place in (True, False))
    x = torch.rand(2, 1, 12, 16)
    for method in (saliency.grad_cam, saliency.grad_cam_pp, saliency.layer_cam):
        expected = method(plain, x, 1, "1")
        assert torch.equal(method(written, x, 1, "1"), expected)
        with torch.inference_mode():
            assert torch.equal(method(written, x, 1, "1"), expected)
    with torch.no_grad():
        assert torch.equal(saliency.integrated_gradients(written, x), saliency.integrated_gradients(plain, x))


class Tokens(torch.nn.Module):
    """A small transformer: patches of 8 pixels, a token for the class before them."""

    def __init__(self):
        super().__init__()
        self.patches, self.start = torch.nn.Conv2d(1, 16, 8, 8), torch.nn.Parameter(torch.randn(1, 1, 16))
        self.block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.norm, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = self.norm(torch.cat([self.start.expand(len(x), 1, 16), x], 1))
        return self.head(self.block(x)[:, 0])


def test_tokens_are_reshaped_and_the_other_methods_need_nothing():
    torch.manual_seed(0)
    net, x = Tokens().eval(), torch.rand(2, 1, 24, 32)
    for layer in (None, "norm"):
        with pytest.raises(ValueError, match="give `reshape`"):
            saliency.grad_cam(net, x, 1, layer)
    kept = {}
    hook = net.norm.register_forward_hook(lambda _, __, out: kept.update(out=out) or out.retain_grad())
    net(x)[:, 1].sum().backward()
    hook.remove()
    expected = torch.zeros(2, 3, 4)  # token by token, feature by feature
    weights = kept["out"].grad[:, 1:].mean(1)
    for t in range(12):
        expected[:, t // 4, t % 4] = (weights * kept["out"][:, t + 1].detach()).sum(1)
    maps = saliency.grad_cam(net, x, 1, "norm", lambda t: t[:, 1:].mT.unflatten(2, (3, 4)))
    torch.testing.assert_close(maps, F.interpolate(expected.relu()[:, None], size=(24, 32), mode="bilinear")[:, 0])
    for name in ("ig", "smoothgrad", "occlusion", "rise"):
        assert saliency.METHODS[name](net, x).abs().max() > 0


@pytest.mark.parametrize("classes", [1, 3])
def test_occlusion_rise_and_smoothgrad_by_loops(classes):
    """On an image that is not square, against a loop over windows, masks and copies; the network a weighted sum."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 24, classes), torch.nn.Tanh())
    x = torch.rand(2, 1, 16, 24)

    @torch.no_grad()
    def score(images):
        return net(images)[:, -1]

    found = saliency.occlusion(net, x, max(1, classes - 1), window=0.5, stride=0.25)
    for i in range(2):
        total, count = torch.zeros(2, 16, 24)
        for top, left in [(t, s) for t in (0, 4, 8) for s in (0, 6, 12)]:
            window, hidden = (slice(top, top + 8), slice(left, left + 12)), x[i].clone()
            hidden[0][window] = x[i].mean()
            total[window] += score(x[i, None]) - score(hidden[None])
            count[window] += 1
        torch.testing.assert_close(found[i], total / count, atol=1e-6, rtol=1e-4)
    copies, noise = [], torch.Generator().manual_seed(3)
    for _ in range(5):
        noisy = (x + 0.1 * torch.randn(1, 16, 24, generator=noise)).requires_grad_()
        copies.append(torch.autograd.grad(net(noisy)[:, -1].sum(), noisy)[0])
    found = saliency.smooth_grad(net, x, max(1, classes - 1), samples=5, seed=3)
    torch.testing.assert_close(found, torch.stack(copies).mean(0).abs()[:, 0])
    # of a linear score, RISE is the regression of the score on each pixel's being seen: with many masks its own weight
    # times what the pixel differs from the mean, smeared over the cells. So the two agree in sum and in place.
    line = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 24, 1, bias=False))
    bright = torch.zeros(1, 1, 16, 24)
    bright[0, 0, :8, :8] = 1.0
    line[1].weight.data = bright.view(1, -1).clone()
    heat = saliency.rise(line, bright, 1, masks=400, cells=3)[0]
    assert heat[:8, :8].mean() > 4 * heat[8:, 8:].abs().mean()


@pytest.mark.parametrize("classes", [2, 3])
def test_integrated_gradients_sum_to_the_difference_of_the_scores(classes):
    net, x, target = explained_net(classes), torch.rand(3, 1, 32, 32), torch.ones(3, dtype=torch.long)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    maps = saliency.integrated_gradients(net, x, target=1, steps=50)
    with torch.no_grad():
        expected = saliency.class_score(net(x), target) - saliency.class_score(net(blank), target)
    torch.testing.assert_close(maps.sum((1, 2)), expected, atol=0.02, rtol=0.02)


def test_the_negative_class_of_a_single_logit_has_its_own_evidence():
    net, x = explained_net(), torch.rand(2, 1, 32, 32)
    for name in ("ig", "occlusion", "rise"):  # signed: the other direction is the other sign
        a, b = (saliency.METHODS[name](net, x, t) for t in (0, 1))
        torch.testing.assert_close(a, -b, atol=1e-5, rtol=1e-3)
        assert a.abs().max() > 0
    maps, gradients = saliency.activations_and_gradients(net, x, 1)
    raw = (gradients.mean((2, 3), keepdim=True) * maps).sum(1)
    torch.testing.assert_close(saliency.grad_cam(net, x, 0), saliency.enlarge((-raw).relu(), x))
    torch.testing.assert_close(saliency.grad_cam(net, x, 1), saliency.enlarge(raw.relu(), x))
    likeliest = (torch.sigmoid(net(x)[:, 0]) > 0.5).long()
    torch.testing.assert_close(saliency.grad_cam(net, x), saliency.grad_cam(net, x, likeliest))


def test_no_evidence_is_a_blank_map():
    net, everywhere = explained_net(), torch.ones(2, 32, 32, dtype=torch.bool)
    torch.nn.init.zeros_(net.head.weight)
    maps = saliency.grad_cam(net, torch.rand(2, 1, 32, 32), 1)
    for values in (maps, saliency.energy_inside(maps, everywhere), saliency.pointing_game(maps, everywhere)):
        assert (values == 0).all()


def explanation(name, net, x, target=None):
    """A method's map, from few passes; of RISE's masks more than one batch."""
    few = {"rise": {"masks": 70}, "ig": {"steps": 3}, "smoothgrad": {"samples": 3}}
    return saliency.METHODS[name](net, x, target, **few.get(name, {}))


@pytest.mark.parametrize("name", saliency.METHODS)
def test_an_explanation_leaves_no_trace(name):
    net = explained_net(dropout=0.5)
    net.train()
    net.features[2].eval()  # mixed modes, as a frozen BatchNorm has
    net.features[0][0].weight.requires_grad_(False)
    net.head.weight.grad = torch.full_like(net.head.weight, 7.0)
    x = torch.rand(2, 1, 32, 32, requires_grad=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def look():
        return (
            [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.sum().item() for p in net.parameters()],
            [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()],
            torch.is_grad_enabled(),
        )

    then = look()
    wrong, seeds = torch.rand(2, 5, 32, 32), torch.get_rng_state()
    assert not explanation(name, net, x, 1).requires_grad
    with pytest.raises(RuntimeError):  # in the midst of a forward pass
        explanation(name, net, wrong, 1)
    assert look() == then
    assert torch.equal(torch.get_rng_state(), seeds)
    assert x.grad is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # BatchNorm's statistics too


def test_many_calls_hold_no_memory():
    import gc

    net, x = explained_net(), torch.rand(1, 1, 32, 32)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    saliency.grad_cam(net, x, 1)
    before = tensors()
    for _ in range(100):
        saliency.grad_cam(net, x, 1)
    assert tensors() <= before


@pytest.mark.parametrize("name", saliency.METHODS)
def test_maps_of_a_batch_equal_those_of_its_images(name):
    net, x = explained_net(), torch.rand(3, 1, 32, 32)
    together = explanation(name, net, x)
    alone = torch.cat([explanation(name, net, one[None]) for one in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-3)
    assert together.shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "alexnet", "swin_t"])
def test_grad_cam_of_torchvision_networks_by_their_own_parts(name):
    """Against the network cut by hand, at another size than it was made for, and not square."""
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, weights=None).eval(), torch.rand(1, 3, 96, 128)
    rest = {
        "resnet18": lambda m: net.fc(m.mean((2, 3))),
        "mobilenet_v2": lambda m: net.classifier(m.mean((2, 3))),
        "densenet121": lambda m: net.classifier(m.relu().mean((2, 3))),
        "convnext_tiny": lambda m: net.classifier(m.mean((2, 3), keepdim=True)),
        "alexnet": lambda m: net.classifier(net.avgpool(m).flatten(1)),
        "swin_t": lambda m: net.head(m.mean((2, 3))),
    }[name]
    if name == "swin_t":
        maps = net.permute(net.norm(net.features(x)))
    else:
        parts = list(net.children())[:-2] if name == "resnet18" else [net.features]
        maps = torch.nn.Sequential(*parts)(x)
    maps = maps.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(rest(maps)[:, 7].sum(), maps)
    expected = (gradients.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu()
    found = saliency.grad_cam(net.train(), x, 7)
    torch.testing.assert_close(found, F.interpolate(expected[:, None], size=(96, 128), mode="bilinear")[:, 0])
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_the_map_of_every_backbone_is_that_of_its_features_slow(backbone):
    torch.manual_seed(0)
    net, x = models.CNet(backbone, 2, 1), torch.rand(1, 1, 64, 64)
    layer = net.layer_of(16, positive=True)
    maps = saliency.grad_cam(net, x, 1, layer) + saliency.grad_cam(net, x, 0, layer)
    assert maps.shape == (1, 64, 64)
    assert maps.max() > 0
    ours = models.Ensemble([net.eval()], classes=["benign", "malignant"], size=64, load_size=64)
    torch.testing.assert_close(ours.explain(x, "gradcam", 1), saliency.grad_cam(net, x, 1, layer))
    # all evidence comes through it: without its output no picture is told from another
    for blind in (layer, net.layer_of(16)):
        hook = blind.register_forward_hook(lambda module, _, output: torch.zeros_like(output))
        with torch.no_grad():
            changed = [net(x), net(x.flip(3) * 0.5)]
        hook.remove()
        assert torch.equal(*changed)
    # and a channel is evidence or not: none is below 0, where the next layer rectifies (no layer of ConvNeXt does)
    lowest = []
    hook = layer.register_forward_hook(lambda module, _, output: lowest.append(float(output.detach().min())))
    net.embed(x)
    hook.remove()
    assert lowest[0] >= (-math.inf if backbone == "convnext_tiny" else -0.28)  # SiLU's least


class Weighed(torch.nn.Module):
    """Patient data weigh the channels, so that they change every map."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(1, 2, 5, padding=2)

    def forward(self, x, meta):
        return (self.features(x).relu().mean((2, 3)) * meta).sum(1)


@pytest.mark.parametrize("name", saliency.METHODS)
def test_patients_go_with_their_images(name):
    torch.manual_seed(0)
    net, x, meta = Weighed(), torch.rand(2, 1, 24, 32), torch.tensor([[3.0, 0.5], [0.5, 3.0]])

    def look(x, meta):
        return explanation(name, models.WithPatients(net, meta), x, 1)

    alone = torch.cat([look(x[i, None], meta[i, None]) for i in range(2)])
    torch.testing.assert_close(look(x, meta), alone, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(look(x, meta.flip(0)), alone, rtol=0.1)


@pytest.fixture(scope="module")
def planted():
    """Images whose class is a bright square or none, a network that has learnt it, and where the squares are."""
    generator, n = torch.Generator().manual_seed(0), 96
    x, masks = 0.4 + 0.08 * torch.randn(n, 1, 48, 48, generator=generator), torch.zeros(n, 48, 48, dtype=torch.bool)
    labels = torch.arange(n) % 2
    for i in torch.nonzero(labels)[:, 0].tolist():
        top, left = torch.randint(4, 32, (2,), generator=generator).tolist()
        masks[i, top : top + 12, left : left + 12] = True
    x = (x + 0.5 * masks[:, None]).clamp(0, 1)
    torch.manual_seed(0)
    net = models.CNet("small_cnn", 2, 1, normalise="fixed")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(16):
        for rows in torch.randperm(n, generator=generator).split(32):
            loss = losses.classification_loss(net(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        assert float(metrics.auc(net(x)[:, 0], labels)) == 1.0
    rows = torch.nonzero(labels)[:8, 0]
    return net, x[rows], masks[rows]


@pytest.mark.parametrize("name", saliency.METHODS)
def test_every_method_finds_the_planted_square(planted, name):
    net, x, masks = planted
    maps = saliency.METHODS[name](net, x, 1, **({"layer": net.features[3]} if "cam" in name else {}))  # 12 x 12 cells
    share = masks.float().mean((1, 2))
    ratio = (saliency.energy_inside(maps, masks) / share).mean()
    for baseline in (saliency.random_map, saliency.centre_map):
        assert ratio > 1.5 * (saliency.energy_inside(baseline(net, x), masks) / share).mean()
    assert ratio > 2


def test_deletion_falls_sooner_along_the_right_map(planted):
    net, x, masks = planted
    target = torch.ones(len(x), dtype=torch.long)
    right = saliency.deletion_insertion(net, x, masks.float(), target)
    wrong = saliency.deletion_insertion(net, x, 1 - masks.float(), target)
    assert right[0].mean() < wrong[0].mean() - 0.1
    assert right[1].mean() > wrong[1].mean() + 0.1


def test_measures_of_a_map_by_hand():
    maps, masks = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:4, 2:6] = True
    maps[0, 2, 2], maps[0, 7, 7], maps[0, 0, 0] = 3.0, 1.0, -5.0  # negative evidence is none
    maps[1] = masks[1].float()
    assert saliency.energy_inside(maps, masks).tolist() == [0.75, 1.0]
    assert saliency.pointing_game(maps, masks).tolist() == [1.0, 1.0]
    assert saliency.best_iou(maps, masks).tolist() == pytest.approx([1 / 8, 1.0])
    a, b = torch.rand(4, 8, 8), torch.rand(4, 8, 8)
    expected = [np.corrcoef(p.flatten(), q.flatten())[0, 1] for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(saliency.correlation(a, b), expected, atol=1e-6)


def test_regions_cover_the_image_once_and_behind_is_deeper():
    boxes = torch.tensor([[0.4, 0.3, 0.6, 0.5], [0.0, 0.0, 0.2, 0.9]])
    for masks in (None, torch.rand(2, 64, 64) < 0.1):
        regions = explain.lesion_regions(boxes, 64, masks)
        assert (regions.sum(1) == 1).all()
    regions = explain.lesion_regions(boxes, 64)
    inside, ring, behind, before, _ = regions[0]
    np.testing.assert_allclose(data.box_of(inside.numpy()) / 64, boxes[0], atol=1.01 / 64)
    left, _, right, _ = data.box_of((inside | ring).numpy())
    assert (right - left) / 64 == pytest.approx(0.2 * 1.5, abs=2.01 / 64)  # a quarter of a diameter on each side
    assert torch.nonzero(behind)[:, 0].min() > torch.nonzero(inside)[:, 0].max()
    assert torch.nonzero(before)[:, 0].max() < torch.nonzero(inside)[:, 0].min()
    shares, per_area = explain.evidence_shares(torch.ones(2, 64, 64), regions)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    torch.testing.assert_close(per_area[0], torch.ones(5))
    assert explain.evidence_shares(torch.zeros(2, 64, 64), regions)[0].isnan().all()


def test_the_atlas_lays_lesions_on_each_other():
    boxes = torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.6, 0.5, 0.8, 0.7], [0.4, 0.4, 0.6, 0.6]])
    maps = torch.zeros(3, 60, 60)
    for k in range(2):  # evidence in the boxes alone; the third map is blank and must not dilute the mean
        x0, y0, x1, y1 = (boxes[k] * 60).round().int().tolist()
        maps[k, y0:y1, x0:x1] = 5.0 + k
    mean = explain.atlas(maps, boxes, side=90)
    assert float(mean.mean()) == pytest.approx(1, abs=0.01)
    assert float(mean[32:58, 32:58].mean()) == pytest.approx(9, rel=0.1)
    assert float(mean[:24].sum()) == 0
    edge = torch.tensor([[0.0, 0.0, 0.3, 0.3], [0.2, 0.0, 0.6, 0.1]])  # two thirds of what is cut lie outside
    flat = explain.atlas(torch.ones(2, 60, 60), edge)
    assert flat.isnan().any()
    torch.testing.assert_close(flat[flat.isfinite()], torch.ones_like(flat[flat.isfinite()]))


def test_members_maps_are_weighted_by_their_votes():
    model = small_model()
    x = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    a, b = (saliency.grad_cam(m, x / 255, 1, m.features) for m in model.members)
    torch.testing.assert_close(model.explain(x, "gradcam", 1), 0.7 * a + 0.3 * b)


def test_the_recommendation_needs_to_see_the_model_and_to_beat_every_baseline():
    groups = torch.arange(50)

    def row(level, randomised=0.0):
        return {"energy/area": level + 0.1 * torch.rand(50), "randomised": torch.full((50,), randomised)}

    found = {"ig": row(3), "gradcam": row(5), "rise": row(9, randomised=0.9), "centre": row(2), "random": row(1)}
    best, why = explain.recommend(found, groups)
    assert best == "gradcam"
    assert "rise is blind to the model" in why
    found["centre"] = row(6)
    best, why = explain.recommend(found, groups)
    assert best is None
    assert "gradcam does not beat centre" in why


def test_randomised_weights_are_new_and_the_old_ones_stay():
    for net in (explained_net(), Tokens()):
        before, seeds = [p.clone() for p in net.parameters()], torch.get_rng_state()
        other = saliency.randomised(net)
        assert torch.equal(torch.get_rng_state(), seeds)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        pairs = [(a, b) for a, b in zip(before, other.parameters(), strict=True) if a.numel() > 1 and a.std() > 0.01]
        assert not any(torch.equal(a, b) for a, b in pairs)
        assert len(pairs) > 5


def test_the_evidence_for_each_class_is_shown(tmp_path):
    model, image = small_model(classes=["benign", "malignant", "normal"]), picture(50, 40, 1)
    models.save(tmp_path / "m.pt", model)
    image.save(tmp_path / "i.png")
    maps = [report.explain_picture(model, image, "occlusion", k)[0] for k in range(3)]
    assert not np.array_equal(maps[0], maps[1])
    predicted = int(model(torch.from_numpy(data.letterbox(image, 32)[0])[None]).argmax())
    heat, box, p, target = report.explain_picture(model, image, "occlusion")
    np.testing.assert_array_equal(heat, maps[predicted])
    assert (len(box), target, len(p)) == (4, predicted, 3)
    base = [tmp_path / "i.png", "--model", tmp_path / "m.pt", "--out", tmp_path / "o.png", "--method", "gradcam"]
    assert call(explain, *base, "--target", "normal").returncode == 0
    wide, high = Image.open(tmp_path / "o.png").size
    assert call(explain, *base, "--target", "all").returncode == 0
    assert Image.open(tmp_path / "o.png").width == wide  # a row a class: the picture, its map
    assert Image.open(tmp_path / "o.png").height > 2.7 * high
    for options, why in [
        (["--target", "cyst"], "the model knows benign, malignant, normal; or give all"),
        (["--target", "normal", "--method", "smoothgrad"], "the map of smoothgrad has no class"),
    ]:
        assert why in error_of(call(explain, *base, *options))
    call(explain, *base[:-2])  # no method was asked for, and none evaluated
    assert Image.open(tmp_path / "o.png").width == wide
    assert report.recommended_method(tmp_path / "m.pt") == ("ig", "not evaluated on this model")
    (tmp_path / "explain.json").write_text('{"recommended": "rise"}')
    assert report.recommended_method(tmp_path / "m.pt") == ("rise", "")


@pytest.fixture(scope="module")
def two_folds(tmp_path_factory, folders):
    """A run of two folds, each of a D-Net and two C-Nets, and the options that name its cache."""
    folder = tmp_path_factory.mktemp("folds")
    options = "--positive malignant --folds 2 --name f --lr 1e-2 --views 3 --roi none,dnet"
    return quick(folder, *options.split(), data_folder=folders)[0], ["--cache", str(folder / "cache")]


def test_explanations_from_the_command_line_slow(tmp_path, folders, two_folds):
    (folder, cache), out = two_folds, tmp_path / "out"
    image, model = next((folders / "benign").glob("*(2).png")), folder / "fold1" / "model.pt"
    common = ["--model", folder, *cache, "--out", out]
    for options in (
        [*common, "--evaluate", "--most", "6"],
        [*common, "--hotspots", "--ring", "0.5", "--method", "layercam", "--most", "100"],
        [image, "--model", model, "--method", "all", "--out", tmp_path / "all.png", "--device", "cpu"],
        [image, "--model", model, "--out", tmp_path / "one.png"],
    ):
        said = call(explain, *options)
        assert said.returncode == 0, said.stderr
        assert said.stdout.count(models.DISCLAIMER) == 1
    report = json.loads((out / "explain.json").read_text())
    assert set(report["measures"]) == {*saliency.METHODS, *saliency.BASELINES}
    assert set(report["measures"]["ig"]) == set(explain.MEASURES)
    assert report["images"] == 6
    assert report["why"]
    table = (out / "hotspots.csv").read_text().splitlines()
    assert {line.split(" (")[0] for line in table[1:]} >= {"benign+normal", "malignant"}
    assert len(table) % len(explain.REGIONS) == 1
    rows = (out / "suspects.csv").read_text().splitlines()
    assert len(rows) == 1 + 68  # every lesion once; normal images have none
    near = [float(r.split(",")[3]) for r in rows[1:] if "nan" not in r]
    assert near == sorted(near)  # the shortcut suspects first
    assert Image.open(out / "atlas.png").width > 600
    assert Image.open(tmp_path / "all.png").size > Image.open(tmp_path / "one.png").size
    for options, why in [
        (["--method", "x"], "argument --method: invalid choice"),
        ([], "give an image"),
        (["--evaluate", "--model", tmp_path], "no run of train.py"),
        (["nowhere.png", "--model", model], "no such file"),
        (["--hotspots", "--model", folder, "--data", tmp_path / "no"], "no such file or folder"),
    ]:
        assert why in error_of(call(explain, *options))


@pytest.fixture(scope="session")
def phantom_run(stranger):
    """The folder in which the stranger ran it, and what it printed."""
    folder, process = stranger
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder, said


# ---------------------------------------------------------------------------------------------------------------------
# infer.py


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Of one small untrained network and a D-Net."""
    path, model = tmp_path_factory.mktemp("detector") / "m.pt", small_model()
    torch.nn.init.normal_(model.members[0].head.weight, std=1e5)  # untrained features are tiny
    models.save(path, models.Ensemble(model.members[:1], dnets=model.dnets, **model.info))
    return infer.BreastCancerDetector(path)


KEYS = ["image", "prediction", "probability", "confidence", "probabilities"]
KEYS += [
    "uncertainty",
    "box",
    "refer",
    "reason",
    "error",
    "lesion_score",
    "boxes",
    "outline",
    "window",
    "frame",
    "clip",
]


def test_what_is_no_image_is_refused_at_once(detector):
    for wrong, why in [
        (np.zeros((2, 3, 4, 5)), "no image"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.zeros((0, 4)), "no image"),
        (np.array([["a"]]), "no image"),
        (torch.zeros(2, 5, 6), "no image"),
        ([picture(), None], "image 1 is a NoneType"),
        (7, "int is no image"),
        ({"a": 1}, "dict is no image"),
    ]:
        with pytest.raises(InputError, match=why):
            detector.predict(wrong)
    assert detector.predict([]) == []


def test_one_picture_in_every_form_has_one_answer(detector, tmp_path):
    image, path = picture(48, 48, 3), tmp_path / "i.png"
    image.save(path)
    expected, other = detector.predict(str(path)), detector.predict(picture(48, 48, 4))
    assert abs(expected["probability"] - other["probability"]) > 0.01  # the network sees what it is shown
    assert list(expected) == KEYS
    assert (expected["image"], expected["error"]) == (str(path), None)
    assert expected["confidence"] == pytest.approx(expected["probabilities"][expected["prediction"]])
    assert sum(expected["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    array = np.asarray(image)
    tensor, rgb = torch.from_numpy(array.copy()), np.stack([array] * 3, 2)
    with open(path, "rb") as file:
        forms = [
            path, file, path.read_bytes(), image, array, array[:, :, None], array.astype(np.int32),
            array.astype(np.uint16), array / 255, rgb, tensor, tensor[None], tensor.expand(3, 48, 48),
        ]  # fmt: skip
        found = [*detector.predict(forms), *map(detector.predict, forms[2:])]
    batches = [np.stack([array] * 5), np.stack([rgb] * 2), tensor.expand(2, 1, 48, 48), (one for one in [array, array])]
    for batch, count in zip(batches, (5, 2, 2, 2), strict=True):
        answers = detector.predict(batch)
        assert len(answers) == count
        found += answers
    for one in found:
        for key in KEYS[1:]:
            same = (
                pytest.approx(expected[key], abs=1e-5)
                if key not in ("prediction", "reason", "boxes", "outline")
                else expected[key]
            )
            assert one[key] == same, key


def test_pictures_of_one_name_get_overlays_of_their_own(tmp_path):
    files = ["A/us/1.png", "A/us/1.bmp", "B/us/1.png", "B/us/1.png", "A/us_1.png"]
    names = list(infer.overlay_names([str(tmp_path / f) for f in files]))
    assert names == ["A_us_1.png", "A_us_1.bmp", "B_us_1.png", "B_us_1.png_2", "A_us_1.png_2"]
    assert list(infer.overlay_names(["x/one.png"])) == ["one.png"]


def test_sentences_say_the_probability_that_decided():
    two = {"classes": ["benign", "malignant"], "threshold": 0.032}
    said = infer.sentence({"image": "i", "error": None, "box": None, **infer.answer([0.95, 0.05], 0, two)}, two)
    assert said.startswith("i: malignant, p(malignant) = 0.050, at or above the threshold 0.032, uncertainty")
    assert "confidence" not in said
    said = infer.verdict(infer.answer([1 - 0.03197, 0.03197], 0, two), two)
    assert said == ["benign, p(malignant) = 0.031970", "below the threshold 0.032000"]
    many = {"classes": ["akiec", "nv", "vasc"]}
    found = infer.answer([0.6, 0.256, 0.144], 0, many)
    assert found["probability"] == found["confidence"] == 0.6
    assert infer.verdict(found, many) == ["akiec, p(akiec) = 0.600"]


def test_a_batch_equals_its_images_one_by_one(tmp_path):
    models.save(tmp_path / "m.pt", small_model(roi="dnet", threshold=0.4))
    some = infer.BreastCancerDetector(tmp_path / "m.pt", tta=5)
    pixels = [np.asarray(picture(50 + 7 * s, 40, s)) for s in range(5)]
    for together, alone in zip(some.predict(pixels), [some.predict(p) for p in pixels], strict=True):
        assert together["probability"] == pytest.approx(alone["probability"], abs=1e-5)
        assert together["box"] == pytest.approx(alone["box"], abs=0.2)
    x = torch.from_numpy(np.stack([data.letterbox(Image.fromarray(p), 32)[0] for p in pixels]))
    model = models.load(tmp_path / "m.pt")
    with torch.no_grad():  # the mean of five views, one after another
        boxes = model.locate(x)
        views = augment.tta_views(x, augment.crop_regions(boxes, 0.25), 32).split(5)
        opinions = torch.stack([torch.stack([models.to_probabilities(m(v)) for m in model.members]) for v in views])
        expected = model.combine(opinions.mean(0))[:, 1]
    assert [r["probability"] for r in some.predict(pixels)] == pytest.approx(expected.tolist(), abs=1e-5)
    spread = opinions.flatten(0, 1)[:, :, 1].std(0, correction=0)
    assert [r["uncertainty"] for r in some.predict(pixels)] == pytest.approx(spread.tolist(), abs=1e-5)


def test_what_is_not_clear_is_referred():
    info = {"classes": ["benign", "malignant"], "threshold": 0.2}
    for p, spread, prediction, refer in [
        (0.2, 0.0, "malignant", True),
        (0.19, 0.0, "benign", True),
        (0.25, 0.0, "malignant", True),  # near the threshold
        (0.7, 0.0, "malignant", False),
        (0.05, 0.0, "benign", False),
        (0.7, 0.3, "malignant", True),  # the opinions differ
    ]:
        found = infer.answer([1 - p, p], spread, info)
        assert (found["prediction"], found["refer"]) == (prediction, refer)
    sure = [
        infer.answer(p, 0.0, info)["probability"]
        for p in models.to_probabilities(torch.tensor([[16.0], [22.0]])).tolist()
    ]
    assert 0.9999998 < sure[0] < sure[1] < 1  # 34: what a script reads keeps the order too


def test_the_command_line_answers_what_it_can_slow(tmp_path, detector, monkeypatch):
    model, scans = detector.path, tmp_path / "scans"
    (scans / "deep").mkdir(parents=True)
    good = awkward_images(scans)
    Image.new("L", (1, 1), 9).save(scans / "one.png")
    Image.new("L", (20_000, 40), 9).save(scans / "deep" / "wide.png")
    picture().save(scans / "deep" / "wide_mask.png")  # a mask is no picture to diagnose
    bad = bad_files(scans)
    (tmp_path / "empty").mkdir()
    command = [scans, tmp_path / "nowhere.png", "--model", model, "--json", "--save-overlay", tmp_path / "out"]
    result = run(HERE / "infer.py", *command)
    assert result.returncode == 1  # some could not be read
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(list(a) == KEYS for a in answers)
    by_name = {Path(a["image"]).name: a for a in answers}
    assert {n for n, a in by_name.items() if a["error"]} == {*bad, "nowhere.png"}
    assert {n for n, a in by_name.items() if a["error"] is None} == {*good, "one.png", "wide.png"}
    assert by_name["nowhere.png"]["error"] == "no such file"
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == len(good) + 2
    one = call(infer, scans / "grey.png", "--model", model, "--tta", "1", "--device", "cpu")
    assert one.returncode == 0
    assert "uncertainty 0.000" in one.stdout
    for image, options, why in [
        ("scans/grey.png", ["--tta", "0"], "must lie in 1 ... 8"),
        ("scans/grey.png", ["--model", tmp_path / "x.pt"], "no such file"),
        ("scans/grey.png", ["--meta", "a=1"], "images alone"),
        ("empty", [], "no image in this folder"),
    ]:
        assert why in error_of(call(infer, tmp_path / image, "--model", model, *options))
    monkeypatch.chdir(tmp_path)
    assert "no model under runs/" in error_of(call(infer, scans / "grey.png"))


def test_multi_scale_inference_is_the_mean_over_resolutions(tmp_path):
    model = small_model()
    for member in model.members:
        torch.nn.init.normal_(member.head.weight, std=1e3)  # untrained features are tiny
    models.save(tmp_path / "m.pt", model)
    image = picture(50, 40, 3)
    image.save(tmp_path / "i.png")
    alone = [infer.BreastCancerDetector(tmp_path / "m.pt", "cpu", 1, [s]).predict(image) for s in (0.75, 1.0, 1.25)]
    assert len({a["probability"] for a in alone}) == 3
    together = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu", 1, [0.75, 1.0, 1.25]).predict(image)
    assert together["probability"] == pytest.approx(sum(a["probability"] for a in alone) / 3, abs=2e-6)
    assert together["uncertainty"] > 0
    command = [tmp_path / "i.png", "--model", tmp_path / "m.pt"]
    said = call(infer, *command, "--tta", "1", "--scales", "0.75", "1", "1.25", "--json")
    assert json.loads(said.stdout)["probability"] == together["probability"]
    assert "--scales: 0: must lie in 0.25 ... 4" in error_of(call(infer, *command, "--scales", "0"))
    assert "fewer than 16 are left; give 0.5 or more" in error_of(call(infer, *command, "--scales", "1", "0.4"))
    models.save(tmp_path / "s.pt", shared_model())  # its pyramid needs all of its levels, of the smallest picture too
    assert infer.BreastCancerDetector(tmp_path / "s.pt", "cpu", scales=[0.5]).predict(image)["error"] is None


def test_the_worth_of_views_is_that_of_the_detectors_answers_slow(tmp_path, folders, two_folds):
    folder, cache = two_folds
    options = ["--tta", "3", "--scales", "1", "1.5", "--device", "cpu", "--data", folders, *cache]
    said = call(infer, "--model", folder, "--evaluate", *options).stdout
    table = json.loads((folder / "views.json").read_text())
    assert list(table) == ["1 view", "3 views", "3 views x 1, 1.5"]
    images, base = quiet_load(folders, 32, positive="malignant"), None
    for (name, row), (views, scales) in zip(table.items(), [(1, [1.0]), (3, [1.0]), (3, [1.0, 1.5])], strict=True):
        answers, labels = [], []
        results = [torch.load(folder / fold / "test.pt", weights_only=True) for fold in ("fold1", "fold2")]
        for fold, result in enumerate(judge.cross_fit(images, results, parse(["--folds", "2"])), 1):
            rows, detector = result["rows"], infer.BreastCancerDetector(folder / f"fold{fold}", "cpu", views, scales)
            detector.info.update({k: result[k] for k in ("temperature", "threshold")})  # as in the report
            answers += detector.predict([images.names[i] for i in rows.tolist()])
            labels += images.labels[rows].tolist()
        wrong = np.array([(a["prediction"] == "malignant") != y for a, y in zip(answers, labels, strict=True)])
        refer, labels = np.array([a["refer"] for a in answers]), torch.tensor(labels)
        expected = {
            "auc": float(metrics.auc(torch.tensor([a["probability"] for a in answers]), labels)),
            "balanced_accuracy": 1 - np.mean([wrong[labels == c].mean() for c in (0, 1)]),
            "referred": refer.mean(),
            "caught": refer[wrong].mean(),
            "unlike": np.mean(["it is unlike" in (a["reason"] or "") for a in answers]),  # 2
        }
        base = base or expected["auc"]
        for what, value in {**expected, "change": expected["auc"] - base}.items():
            assert row[what]["value"] == pytest.approx(value, abs=0.01), (name, what)  # the answers are rounded
        assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"]
        assert f"{row['auc']['value']:.3f} [" in said
    report = json.loads((folder / "report.json").read_text())
    # the report was made with --views 3
    assert table["3 views"]["auc"]["value"] == pytest.approx(report["test"]["auc"]["value"], abs=2e-3)
    assert table["1 view"]["change"] == {"value": 0, "low": 0, "high": 0}
    for options, why in [
        (["--model", folder], "give an image, --evaluate, or --test"),
        (["--evaluate", "--model", tmp_path], "no run of train.py"),
        (["--evaluate", "--model", folder, "i.png"], "takes the held-out images"),
        (["--evaluate", "--model", folder, "--scales", "9"], "--scales: 9: must lie in"),
    ]:
        assert why in error_of(call(infer, *options))


def test_prediction_imports_no_more_than_it_needs_slow(tmp_path, detector):
    picture().save(tmp_path / "i.png")
    options = [f"{tmp_path}/i.png", "--model", str(detector.path)]
    code = f"import sys, infer; infer.main({options}); print(sorted(sys.modules))"
    loaded = run("-c", code).stdout
    assert "'infer'" in loaded
    for name in ("'train'", "'plots'", "'metrics'", "'torchvision'", "'PIL.ImageDraw'"):
        assert name not in loaded, name


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as hospitals keep them: dicom.py, pictures.py, clips.py

needs_pydicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pip install pydicom")
SECRETS = ["Geheim^Nora", "PID-4711", "19700203", "Dr^Wer", "ACC-99", "Nowhere Clinic"]


def dicom_bytes(frames, kind="MONOCHROME2", bits=None, compress=None, streams=None, **header):
    """A DICOM file of arrays (h, w) or (h, w, 3), with a header full of what is nobody's business. streams: the frames'
    bytes, to stand there as JPEG."""
    import pydicom

    frames, ds = [np.asarray(f) for f in frames], pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit if streams else pydicom.uid.ExplicitVRLittleEndian
    header |= {"PixelData": pydicom.encaps.encapsulate(streams)} if streams else {}
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.3.1", "1.2.826.0.1.3680043.8.498.1"
    secret = zip(("PatientName", "PatientID", "PatientBirthDate", "ReferringPhysicianName"), SECRETS, strict=False)
    told = dict(secret) | {"AccessionNumber": "ACC-99", "InstitutionName": "Nowhere Clinic"}
    bits, samples = bits or 8 * frames[0].itemsize, frames[0].shape[2:] or (1,)
    told |= {"Rows": frames[0].shape[0], "Columns": frames[0].shape[1], "SamplesPerPixel": samples[0]}
    told |= {"BitsAllocated": 8 * frames[0].itemsize, "BitsStored": bits, "HighBit": bits - 1}
    told |= {"PhotometricInterpretation": kind, "PixelRepresentation": int(frames[0].dtype.kind == "i")}
    told |= {"NumberOfFrames": len(frames)} if len(frames) > 1 else {}
    told |= {"PlanarConfiguration": 0} if samples[0] > 1 else {}
    for key, value in (told | {"PixelData": b"".join(f.tobytes() for f in frames)} | header).items():
        if value is not None:
            setattr(ds, key, value)
    if compress:
        ds.compress(compress)
    elif len(ds.get("PixelData", b"")) % 2:
        ds.PixelData += b"\0"
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def regions(*boxes, form=1):
    """SequenceOfUltrasoundRegions; a box is x0, y0, x1, y1, which belong to it."""
    import pydicom

    found = []
    for box in boxes:
        part = pydicom.Dataset()
        part.RegionSpatialFormat, part.RegionDataType = form, 1
        part.RegionLocationMinX0, part.RegionLocationMinY0, part.RegionLocationMaxX1, part.RegionLocationMaxY1 = box
        found.append(part)
    return pydicom.Sequence(found)


def lut(first, bits, values):
    """A lookup table as an item of a sequence."""
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", np.array(values, np.uint16).tobytes())
    return pydicom.Sequence([item])


def seen(content, channels=1, window=None):
    image = data.read_image(io.BytesIO(content), channels, window)
    return np.asarray(image), origin(image)


def by_the_standard(x, c, w, function):
    """One value by PS3.3 C.11.2.1.2 and C.11.2.1.3, as 0 ... 255."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(-4 * (x - c) / w))
    if function == "LINEAR":
        c, w = c - 0.5, w - 1
    return 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


@needs_pydicom
def test_dicom_greys_are_shown_as_the_standard_says():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (6, 9), dtype=np.uint8)
    pixels, about = seen(dicom_bytes([grey]))
    assert np.array_equal(pixels, grey)
    assert about == Origin((9, 6), (9, 6))
    assert np.array_equal(seen(dicom_bytes([grey], "MONOCHROME1"))[0], 255 - grey)
    assert np.array_equal(seen(dicom_bytes([grey % 16], bits=4))[0], grey % 16 * 17)
    assert np.array_equal(seen(dicom_bytes([grey.astype(np.uint16)], bits=8))[0], grey)
    wide = rng.integers(-900, 1200, (6, 9), dtype=np.int16)
    line = {"RescaleSlope": "1.5", "RescaleIntercept": "-20"}
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID", None):
        header = {**line, "WindowCenter": ["40", "1"], "WindowWidth": ["400", "2"]}
        header |= {"VOILUTFunction": function} if function else {}
        expected = [
            [by_the_standard(1.5 * v - 20, 40, 400, function or "LINEAR") for v in row] for row in wide.tolist()
        ]
        pixels, about = seen(dicom_bytes([wide], **header))
        np.testing.assert_allclose(pixels, expected, atol=0.51)
        assert about.window == {"SIGMOID": None, "LINEAR_EXACT": (-160, 240)}.get(function, (-160, 239))
        np.testing.assert_allclose(
            seen(dicom_bytes([wide], "MONOCHROME1", **header))[0], 255 - np.array(expected), atol=0.51
        )
    units = wide * 1.5 - 20
    pixels, about = seen(dicom_bytes([wide], **line))  # no window: its own range
    np.testing.assert_allclose(pixels, (units - units.min()) / np.ptp(units) * 255, atol=0.51)
    assert about.window == (units.min(), units.max())
    pixels, about = seen(dicom_bytes([wide], **header), window=(-100, 300))  # one that is given goes before the file's
    np.testing.assert_allclose(pixels, (units + 100).clip(0, 400) / 400 * 255, atol=0.51)
    assert about.window == (-100, 300)
    assert np.array_equal(seen(dicom_bytes([grey]), window=(0, 4000))[0], grey)  # 8 bits have a white of their own
    down = seen(dicom_bytes([wide], RescaleSlope="-2", RescaleIntercept="0"))[0]
    np.testing.assert_allclose(down, (wide.max() - wide.astype(float)) / np.ptp(wide.astype(float)) * 255, atol=0.51)
    table = [7, 100, 900, 1023, 0]
    pixels = seen(
        dicom_bytes([np.array([[0, 10, 11, 12, 13, 14, 200]], np.uint16)], bits=12, VOILUTSequence=lut(10, 10, table))
    )[0]
    np.testing.assert_allclose(pixels, np.array([[7, 7, 100, 900, 1023, 0, 0]]) / 1023 * 255, atol=0.51)
    modality = {
        "ModalityLUTSequence": lut(0, 16, [5, 3, 9, 1]),
        "WindowCenter": "5",
        "WindowWidth": "8",
        "VOILUTFunction": "LINEAR_EXACT",
    }
    pixels = seen(dicom_bytes([np.array([[0, 1, 2, 3]], np.uint16)], bits=2, **modality))[0]
    np.testing.assert_allclose(pixels, np.array([[4, 2, 8, 0]]) / 8 * 255, atol=0.51)


@needs_pydicom
def test_dicom_colours_and_compressions_are_those_that_were_written():
    from pydicom.uid import RLELossless

    rgb = np.asarray(picture(20, 14, 3, "RGB"))
    planar = np.ascontiguousarray(rgb.transpose(2, 0, 1)).tobytes()
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    for content in (
        dicom_bytes([rgb], "RGB"),
        dicom_bytes([rgb], "RGB", PixelData=planar, PlanarConfiguration=1),
        dicom_bytes([rgb.astype(np.uint16) * 257], "RGB"),
        dicom_bytes([rgb], "RGB", compress=RLELossless),
        dicom_bytes([ybr], "YBR_FULL"),
    ):
        np.testing.assert_allclose(seen(content, 3)[0].astype(int), rgb, atol=4)
    colours = np.random.default_rng(1).integers(0, 256, (3, 8), dtype=np.uint8)
    index = np.random.default_rng(2).integers(0, 12, (5, 6), dtype=np.uint8)
    palette = {"PixelData": index.tobytes()}
    for name, row in zip(("Red", "Green", "Blue"), colours, strict=True):
        palette |= {
            f"{name}PaletteColorLookupTableDescriptor": [8, 2, 8],
            f"{name}PaletteColorLookupTableData": row.tobytes(),
        }
    shown = seen(dicom_bytes([index], "PALETTE COLOR", **palette), 3)[0]
    expected = [[colours[:, min(max(v - 2, 0), 7)].tolist() for v in row] for row in index.tolist()]
    assert np.array_equal(shown, expected)


@needs_pydicom
def test_the_files_that_pydicom_ships_are_pictures_or_one_line():
    import pydicom

    folder, read = Path(pydicom.__file__).parent / "data/test_files", {}
    for path in sorted(folder.glob("*.dcm")):
        with contextlib.suppress(InputError):  # its message is a line, or it would be none
            image = data.read_image(path, 3)
            read[path.name] = np.asarray(image), origin(image)
    assert len(read) > 40  # what Pillow and numpy alone decode
    small = [pixels for name, (pixels, _) in read.items() if name.startswith("MR_small")]
    assert len(small) >= 6
    assert all(np.array_equal(pixels, small[0]) for pixels in small)  # one picture in many encodings
    ds = pydicom.dcmread(folder / "MR_small.dcm")
    c, w = float(ds.WindowCenter), float(ds.WindowWidth)
    expected = [[by_the_standard(v, c, w, "LINEAR") for v in row] for row in ds.pixel_array.tolist()]
    np.testing.assert_allclose(small[0][:, :, 0], expected, atol=0.51)
    same = [pixels for name, (pixels, _) in read.items() if name.startswith("SC_rgb_rle")]
    assert all(np.array_equal(pixels, same[0]) for pixels in same)  # of 8, 16 and 32 bits, of one and two frames
    for name in (
        "SC_rgb_rle.dcm",
        *(name for name in read if name.startswith(("SC_rgb_dcmtk", "SC_rgb_jpeg", "SC_ybr"))),
    ):
        own = pydicom.pixels.pixel_array(folder / name).astype(int)
        np.testing.assert_allclose(read[name][0], own, atol=2, err_msg=name)  # their conversion from YBR is another
    pixels, about = read["examples_ybr_color.dcm"]  # an ultrasound clip with a frame of text
    assert about == Origin((236, 209), (320, 240), (84, 31), None, 30, about.seconds)
    whole = pydicom.pixels.pixel_array(folder / "examples_ybr_color.dcm", index=0)
    np.testing.assert_allclose(pixels.astype(int), whole[31:240, 84:320], atol=2)
    assert read["examples_palette.dcm"][1].corner == (120, 60)  # the other region is an electrocardiogram
    assert "compressed as JPEG-LS" in refused("pylibjpeg", data.read_image, folder / "JPEGLSNearLossless_08.dcm", 1)
    assert "without a picture" in refused("DICOM", data.read_image, folder / "reportsi.dcm", 1)
    assert "deflated" in refused("DICOM", data.read_image, folder / "image_dfl.dcm", 1)


def hostile_dicom():
    grey, whole = np.full((8, 8), 7, np.uint8), dicom_bytes([np.full((8, 8), 7, np.uint8)])
    files = {
        "giga": (dicom_bytes([grey], Rows=60000, Columns=60000), "million pixels"),
        "giga frames": (dicom_bytes([grey], Rows=9000, Columns=9000, SamplesPerPixel=3, PhotometricInterpretation="RGB", BitsAllocated=16), "million pixels"),
        "no rows": (dicom_bytes([grey], Rows=0), "8 x 0 pixels"),
        "no frames": (dicom_bytes([grey], NumberOfFrames=0), "0 frames"),
        "fewer frames": (dicom_bytes([grey], NumberOfFrames=-3), "-3 frames"),
        "12 bits": (dicom_bytes([grey], BitsAllocated=12), "12 bits"),
        "too many bits": (dicom_bytes([grey], BitsStored=16), "of which 16 are used"),
        "no pixels": (dicom_bytes([grey], PixelData=None), "pixels are missing"),
        "no header": (dicom_bytes([grey], Rows=None), "without a picture"),
        "few pixels": (dicom_bytes([grey], Rows=80), "cut off"),
        "three greys": (dicom_bytes([grey], SamplesPerPixel=3), "3 samples"),
        "odd colours": (dicom_bytes([grey], PhotometricInterpretation="GEHEIM NORA"), "none of MONOCHROME1"),
        "no window": (dicom_bytes([grey.astype(np.uint16)], RescaleSlope="1e300"), "NaN"),
        "unknown": (whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.4711.1.99.1\0"), "in a way that pydicom does not know"),
        "cut in the magic": (whole[:131], "not an image"),
    }  # fmt: skip
    jpip = dicom_bytes([grey], streams=[b"1234"]).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.94")
    files["JPIP"] = (jpip, "written as JPIP Referenced, that pydicom does not know")
    files["no JPEG"] = (dicom_bytes([grey], streams=[b"Geheim 4711" * 9]), "cut off or damaged")
    files |= {
        f"cut {n}": (whole[:n], "damaged|without a picture|cut off") for n in (134, 140, 200, 300, 500, len(whole) - 40)
    }
    return files


@needs_pydicom
def test_hostile_dicom_is_one_line_and_takes_no_memory(tmp_path, detector, monkeypatch):
    files = hostile_dicom()
    heard, handler = [], logging.Handler()  # caplog would listen to pydicom's own logger as well
    monkeypatch.setattr(handler, "emit", heard.append)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    tracemalloc.start()
    for name, (content, why) in files.items():
        (tmp_path / f"{name}.dcm").write_bytes(content)
        said = refused(why, data.read_image, tmp_path / f"{name}.dcm", 1)
        assert "\n" not in said
        assert not any(secret.lower() in said.lower() for secret in [*SECRETS, "geheim", "4711"]), said
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert not [r for r in heard if r.name.startswith("pydicom")]  # it would log what it can't decode
    answers = detector.predict(sorted(tmp_path.glob("*.dcm")))  # the others would have had theirs
    assert all(a["error"] and a["prediction"] is None for a in answers)
    many = dicom_bytes([np.zeros((8, 8), np.uint8)], NumberOfFrames=2**31 - 1)
    (tmp_path / "many.dcm").write_bytes(many)
    refused("2147483647 frames; look at fewer with --every 214749", detector.predict_clip, tmp_path / "many.dcm")
    _, clip = detector.predict_clip(tmp_path / "many.dcm", every=2**30)
    assert "only 1 of its 2147483647 frames could be read" in clip["reason"]


def test_without_pydicom_one_line_says_how_to_get_it(tmp_path, monkeypatch, detector):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    picture(40, 40).save(tmp_path / "b.png")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    said = call(infer, tmp_path, "--model", detector.path)
    assert (said.returncode, said.stdout.count("p(malignant)")) == (1, 1)
    assert "a.dcm: error: a DICOM file, and pydicom is not installed: pip install pydicom\n" in said.stdout
    said = call(train, "--data", tmp_path, "--runs", tmp_path / "r", "--cache", tmp_path / "c")
    assert "pip install pydicom" in said.stderr
    assert error_of(said).startswith("error: 1 of 2 images can't be read")


@needs_pydicom
def test_dicom_files_lie_in_folders_under_any_name(tmp_path):
    grey = np.asarray(picture(60, 40, 1))
    names = ["a/1.dcm", "a/IM0002", "a/1.2.840.113.3", "b/4.DICOM", "b/5.png"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = dicom_bytes(
            [np.roll(grey, 7 * i)], PatientID=f"P{i}", PatientAge=f"0{40 + i}Y", ImageLaterality="LR"[i % 2]
        )
        picture(60, 40, 9).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_bytes(content)
    (tmp_path / "a/DICOMDIR").write_bytes(dicom_bytes([grey], PixelData=None))
    (tmp_path / "a/README").write_text("no image")
    mask = Image.new("L", (60, 40))
    ImageDraw.Draw(mask).rectangle([10, 10, 29, 19], fill=255)
    mask.save(tmp_path / "a/IM0002_mask.png")
    mask.save(tmp_path / "a/1.2.840.113.3_mask.png")
    entries = readers.find_entries(tmp_path, {"meta": ["age", "laterality"]}, tmp_path)
    assert {Path(e.image).relative_to(tmp_path).as_posix() for e in entries} == set(names)
    assert {Path(e.image).name for e in entries if e.masks} == {"IM0002", "1.2.840.113.3"}
    told = {Path(e.image).relative_to(tmp_path).as_posix(): (e.row, e.group) for e in entries}
    assert told["a/IM0002"][0] == {"age": "41", "laterality": "R"}
    assert told["b/5.png"] == ({"age": "", "laterality": ""}, "")
    assert len({group for _, group in told.values()}) == 5
    assert not any(f"P{i}" in group for _, group in told.values() for i in range(5))
    assert [Path(f).name for f, _ in infer.collect([tmp_path])] == [
        "1.2.840.113.3",
        "1.dcm",
        "IM0002",
        "4.DICOM",
        "5.png",
    ]
    (tmp_path / "t.csv").write_text("image,label,group\nIM0002,x,\n1.dcm,y,mine\n")
    a, b = readers.find_entries(tmp_path / "t.csv", {}, tmp_path)
    assert (a.group, b.group) == (told["a/IM0002"][1], "mine")
    refused("sex: in a folder only DICOM", readers.find_entries, tmp_path, {"meta": ["sex"]}, tmp_path)
    (tmp_path / "odd").write_bytes(dicom_bytes([grey], PatientAge="018M", PatientID="  ", Laterality="B"))
    assert readers.header_data(tmp_path / "odd") == {"group": "", "age": "1.5", "laterality": ""}


@needs_pydicom
def test_the_text_around_an_ultrasound_picture_is_cut_off_and_places_are_those_of_the_whole(tmp_path, detector):
    inner = np.asarray(picture(80, 60, 3))
    whole = np.full((100, 140), 255, np.uint8)
    whole[25:85, 30:110] = inner
    both = regions((30, 25, 69, 84), (70, 25, 109, 84))  # two halves
    both.extend([*regions((0, 90, 139, 99), form=3), *regions((50, 50, 40, 40), (900, 0, 999, 9))])  # a curve; nowhere
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / "us.dcm"
    path.write_bytes(dicom_bytes([whole], SequenceOfUltrasoundRegions=both))
    pixels, about = seen(path.read_bytes())
    assert np.array_equal(pixels, inner)
    assert (about.size, about.whole, about.corner) == ((80, 60), (140, 100), (30, 25))
    frames = dicom_bytes([whole], SequenceOfUltrasoundRegions=regions((0, 90, 139, 99), form=3))
    assert np.array_equal(seen(frames)[0], whole)  # no region of tissue: the whole
    mine, plain = detector.predict(path, masks=True), detector.predict(inner, masks=True)
    assert mine["probability"] == plain["probability"]
    assert mine["box"] == pytest.approx([v + d for v, d in zip(plain["box"], (30, 25) * 2, strict=True)], abs=0.11)
    given = detector.predict(path, boxes=[40, 30, 80, 70])
    assert given["probability"] == detector.predict(inner, boxes=[10, 5, 50, 45])["probability"]
    assert given["box"] == [40, 30, 80, 70]
    shown = plots.overlay(data.read_image(path, 1), [40, 30, 80, 70], "x", mask=whole < 128)
    assert np.array_equal(shown, plots.overlay(Image.fromarray(inner), [10, 5, 50, 45], "x", mask=inner < 128))
    mask = np.zeros((100, 140), np.uint8)
    mask[35:65, 40:80] = 255
    Image.fromarray(mask).save(tmp_path / "x" / "us_mask.png")
    Image.fromarray(inner).save(tmp_path / "x" / "plain.png")
    Image.fromarray(mask[25:85, 30:110]).save(tmp_path / "x" / "plain_mask.png")
    for format, box in (("xyxy", "40 35 80 65"), (None, None)):
        if format:
            (tmp_path / "t.csv").write_text(f"image,label,box\nx/plain.png,a,10 10 50 40\nx/us.dcm,b,{box}\n")
        images = quiet_load(tmp_path / "t.csv" if format else tmp_path, 64)
        assert torch.equal(images.pixels[0], images.pixels[1])
        close(images.boxes[0], images.boxes[1], 1e-6)
        close(images.boxes[0], torch.tensor([10, 10 + 10, 50, 40 + 10]) / 80, 0.01)
    assert torch.equal(images.masks[0], images.masks[1])
    (tmp_path / "t.csv").write_text("image,label,box\nx/us.dcm,a,1 1 20 20\nx/plain.png,b,\n")
    refused(r"140x100 pixels, of which 80x60 from \(30, 25\) are seen", quiet_load, tmp_path / "t.csv", 64)


@needs_pydicom
def test_a_model_of_outlines_draws_them_in_the_whole_frame(tmp_path):
    torch.manual_seed(0)
    models.save(tmp_path / "m.pt", shared_model())
    whole = np.full((100, 140), 255, np.uint8)
    whole[25:85, 30:110] = np.asarray(picture(80, 60, 3))
    (tmp_path / "us.dcm").write_bytes(dicom_bytes([whole], SequenceOfUltrasoundRegions=regions((30, 25, 109, 84))))
    some = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu")
    mine, plain = (some.predict(x, masks=True) for x in (tmp_path / "us.dcm", whole[25:85, 30:110]))
    assert mine["mask"].shape == (100, 140)
    assert plain["mask"].any()
    assert np.array_equal(mine["mask"][25:85, 30:110], plain["mask"])
    assert mine["mask"].sum() == plain["mask"].sum()
    assert mine["outline"] == plain["outline"]
    said = call(
        infer,
        tmp_path / "us.dcm",
        "--model",
        tmp_path / "m.pt",
        "--save-overlay",
        tmp_path / "o",
        "--save-mask",
        tmp_path / "o",
    )
    assert said.returncode == 0, said.stderr
    assert Image.open(tmp_path / "o" / "us.dcm_mask.png").size == (140, 100)


def hidden_in(folder, words):
    """The files in a folder that hold one of these words, zip archives and JSON as they are."""
    return [p for p in folder.rglob("*") if p.is_file() and any(w.encode() in p.read_bytes() for w in words)]


@needs_pydicom
def test_nothing_personal_leaves_a_dicom_file_slow(tmp_path, caplog, recwarn):
    """Through training, prediction and active learning; the header also holds values that pydicom warns of."""
    words, scans = [*SECRETS, "Geheim", "4711"], tmp_path / "scans"
    for name, tone in (("benign", 60), ("malignant", 190)):
        (scans / name).mkdir(parents=True)
        for i in range(12):
            grey = (np.asarray(picture(60, 40, i)) // 4 + tone - 30).astype(np.uint8)
            told = {"PatientID": f"PID-4711-{name}-{i // 2}", "PatientAge": f"0{40 + i + (tone > 99) * 20}Y"}
            content = dicom_bytes([grey], **told)
            content = content.replace(b"ACC-99", b"A\\\xff-99") if i % 2 else content  # no text of its character set
            (scans / name / f"{i}.dcm").write_bytes(content)
    caplog.set_level(0)
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    options = [
        "--size",
        "32",
        "--epochs",
        "1",
        "--model",
        "small_cnn",
        "--weights",
        "none",
        "--nets",
        "cnet",
        "--cache",
        cache,
    ]
    said = [call(train, "--data", scans, "--runs", runs, "--name", "m", "--meta-columns", "age", *options)]
    assert "24 images" in said[0].stdout, said[0].stderr
    assert "12 groups" in said[0].stdout
    one = scans / "benign/3.dcm"
    (tmp_path / "pool").mkdir()
    for i in range(6):
        content = dicom_bytes([np.asarray(picture(60, 40, 90 + i))], PatientID=f"PID-4711-{i}")
        (tmp_path / "pool" / f"{i}.dcm").write_bytes(content)
    said += [call(infer, scans, "--model", runs / "m", "--csv", tmp_path / "a.csv", "--save-overlay", tmp_path / "o")]
    command = [one, "--json", "--model", runs / "m"]
    said += [call(infer, *command), call(infer, *command, "--meta", "age=43")]
    assert said[2].stdout == said[3].stdout  # the age is read, where the model asks for it
    assert call(infer, *command, "--meta", "age=83").stdout != said[2].stdout
    command = ["suggest", "--pool", tmp_path / "pool", "--model", runs / "m", "--query", "4", "--cache", cache]
    said += [call(al_loop, *command, "--out", tmp_path / "label")]
    assert all(s.returncode == 0 for s in said), [s.stderr for s in said]
    spoken = "".join(s.stdout + s.stderr for s in said) + caplog.text + "".join(str(w.message) for w in recwarn)
    assert not any(w in spoken for w in words)
    assert {p.suffix for p in hidden_in(tmp_path, words)} == {".dcm"}
    (label,) = (tmp_path / "label").glob("*.csv")
    groups = [row["group"] for row in csv.DictReader(label.read_text().splitlines())]
    assert all(re.fullmatch("[0-9a-f]{16}", g) for g in groups)


def test_wide_pictures_say_what_is_done_and_take_a_window(tmp_path, detector):
    base = np.asarray(picture(60, 40, 3)).astype(np.uint16) * 9 + 500
    Image.fromarray(base).save(tmp_path / "w.png")
    Image.fromarray(base.astype(np.float32)).save(tmp_path / "f.tif")
    picture(60, 40, 3).save(tmp_path / "n.png")
    said = [json.loads(line) for line in call(infer, tmp_path, "--model", detector.path, "--json").stdout.splitlines()]
    assert [s["window"] for s in said] == [[base.min(), base.max()], None, [base.min(), base.max()]]
    assert (
        f", black is {base.min()} and white {base.max()}"
        in call(infer, tmp_path / "w.png", "--model", detector.path).stdout
    )
    shown = ((base.astype(float) - 600) / 1000).clip(0, 1) * 255
    for name in ("w.png", "f.tif"):
        np.testing.assert_allclose(data.read_image(tmp_path / name, 1, (600, 1600)), shown, atol=0.51)
    assert np.array_equal(data.read_image(tmp_path / "n.png", 1, (600, 1600)), picture(60, 40, 3))
    command = ["--model", detector.path, "--window", "600,1600"]
    said = [json.loads(line) for line in call(infer, tmp_path, "--json", *command).stdout.splitlines()]
    assert [s["window"] for s in said] == [[600, 1600], None, [600, 1600]]
    assert "the --window is another than in training" in call(infer, tmp_path / "n.png", *command).stdout
    windowed = infer.BreastCancerDetector(detector.path, window=(600, 1600))
    for form in (base, base.astype(np.int32), base.astype(float), Image.fromarray(base), tmp_path / "w.png"):
        found = windowed.predict(form)
        assert found["probability"] == pytest.approx(said[2]["probability"], abs=1e-6)
        assert found["window"] == (600, 1600)
    assert windowed.predict(np.asarray(picture(60, 40, 3)))["window"] is None
    for wrong in ("5", "5,5", "9,1", "a,b", "nan,1", "0,inf", "1,2,3"):
        assert "--window" in error_of(call(infer, tmp_path, "--model", detector.path, f"--window={wrong}"))
    assert call(infer, tmp_path / "w.png", "--model", detector.path, "--window=-10,900").returncode == 0


def test_a_model_takes_the_window_of_its_training_along_slow(tmp_path):
    for name, top in (("a", 900), ("b", 1900)):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(10):
            wide = np.asarray(picture(40, 40, i + top)).astype(float) / 255 * top
            Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "d" / name / f"{i}.png")
    cache, options = (
        ["--cache", tmp_path / "c"],
        ["--size", "32", "--epochs", "1", "--model", "small_cnn", "--weights", "none"],
    )
    options += ["--data", tmp_path / "d", "--runs", tmp_path / "r", *cache]
    said = call(train, "--name", "own", *options)
    assert "20 images of more than 8 bits: each by its own range or its file's window (--window)" in said.stdout, (
        said.stderr
    )
    said = call(train, "--name", "given", "--window", "0,2000", *options)
    assert "20 images of more than 8 bits: 0 is black and 2000 white (--window)" in said.stdout, said.stderr
    assert models.load_classifier(tmp_path / "r/given/model.pt", "cpu").info["window"] == (0, 2000)
    assert len(list((tmp_path / "c").iterdir())) == 2
    one = tmp_path / "d/a/0.png"
    own, given = (
        json.loads(call(infer, one, "--model", tmp_path / "r" / n, "--json").stdout) for n in ("own", "given")
    )
    assert given["window"] == [0, 2000]
    assert own["window"][1] <= 900
    report = call(infer, "--test", tmp_path / "d", "--model", tmp_path / "r/given", "--out", tmp_path / "t", *cache)
    assert "0 is black and 2000 white" in report.stdout, report.stderr
    images = [quiet_load(tmp_path / "d", 32, window=w) for w in (None, (0, 2000))]
    assert not torch.equal(images[0].pixels, images[1].pixels)
    assert torch.equal(images[0].thumbnails, images[1].thumbnails)  # no option changes the splits
    assert images[0].splits == images[1].splits
    bad = models.Ensemble(
        [models.CNet("small_cnn", 2, 1)], classes=["a", "b"], size=32, load_size=32, channels=1, window=[5, 1]
    )
    models.save(tmp_path / "bad.pt", bad)
    refused("window", models.load_classifier, tmp_path / "bad.pt", "cpu")


# Clips


def moving(count=12, size=(60, 40)):
    """Frames of a picture that brightens and darkens."""
    base = np.asarray(picture(*size, 5)).astype(float)
    return [Image.fromarray((base * (0.4 + 0.05 * i)).clip(0, 255).astype(np.uint8)) for i in range(count)]


def save_clip(path, frames, **more):
    if path.suffix == ".dcm":
        path.write_bytes(dicom_bytes(frames, **more))
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], **more)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", pytest.param(".dcm", marks=needs_pydicom)])
def test_every_frame_of_a_clip_is_read_in_turn(tmp_path, suffix, detector):
    frames = moving()
    path = save_clip(tmp_path / f"c{suffix}", frames)
    found = list(pictures_of(path))
    assert [n for n, _ in found] == list(range(1, 13))
    for (_, image), frame in zip(found, frames, strict=True):
        assert np.array_equal(image, frame)
        assert origin(image).frames == 12
    assert [n for n, _ in pictures_of(path, first=3, every=4)] == [3, 7, 11]
    assert np.array_equal(next(pictures_of(path, first=8))[1], frames[7])
    assert np.array_equal(data.read_image(path, 1), frames[0])
    assert next(pictures_of(path))[1].mode == "L"
    answers, clip = detector.predict_clip(path, every=5)
    for one, alone in zip(answers, detector.predict(frames[::5]), strict=True):
        assert one == alone | {"image": str(path), "frame": one["frame"]}
    assert [a["frame"] for a in answers] == [1, 6, 11]
    assert clip["clip"]["frames"] == 12
    assert clip["clip"]["looked_at"] == 3
    first = detector.predict(path)
    assert first["probability"] == detector.predict(frames[0])["probability"]
    assert first["refer"]
    assert "a clip of 12 frames, of which only the first was looked at" in first["reason"]


def pictures_of(path, **more):
    return read_frames(path, 1, **more)


def test_pages_of_other_sizes_and_second_pictures_of_a_photo_are_no_frames(tmp_path):
    save_clip(tmp_path / "pyramid.tif", [picture(60, 40), picture(30, 20), picture(15, 10)])
    assert [n for n, _ in pictures_of(tmp_path / "pyramid.tif")] == [1]
    picture(60, 40).save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[picture(60, 40, 2)])
    assert [n for n, _ in pictures_of(tmp_path / "photo.jpg")] == [1]
    cut = save_clip(tmp_path / "cut.gif", moving()).read_bytes()
    (tmp_path / "cut.gif").write_bytes(cut[: len(cut) // 2])
    with contextlib.suppress(InputError):  # what is whole is read, or it is said
        assert 0 < len(list(pictures_of(tmp_path / "cut.gif"))) < 12


def test_the_suspicious_stretch_is_that_of_a_loop():
    def answer_of(*p):
        return {"probabilities": dict(enumerate(p)), "uncertainty": p[-1] / 10}

    rng = np.random.default_rng(0)
    for threshold in (0.2, 0.6, 0.95):
        for count in (1, 2, 3, 7, 60):
            p = (rng.random(count) ** 3).tolist()
            said = clips.summary([answer_of(1 - v, v) for v in p], threshold)
            smoothed = [np.mean(p[max(0, t - 2) : t + 3]) for t in range(count)]
            peak = int(np.argmax(smoothed))
            assert said["probabilities"] == pytest.approx([1 - smoothed[peak], smoothed[peak]])
            odds = [v / (1 - v) for v in smoothed]
            level, first, last = min(odds[peak] / 2, threshold / (1 - threshold)), peak, peak
            while first and odds[first - 1] >= level:
                first -= 1
            while last < count - 1 and odds[last + 1] >= level:
                last += 1
            assert (said["first"], said["last"]) == (first, last)
            assert said["best"] == first + int(np.argmax(p[first : last + 1]))
            assert said["uncertainty"] == pytest.approx(np.mean(p[max(0, peak - 2) : peak + 3]) / 10)
    flash = [0.1] * 20
    flash[4] = 0.99  # for one frame; then a lesion that stays
    flash[11:17] = [0.6, 0.7, 0.9, 0.8, 0.7, 0.6]
    said = clips.summary([answer_of(1 - v, v) for v in flash], 0.5)
    assert (said["first"], said["best"], said["last"]) == (12, 13, 15)
    sure = clips.summary([answer_of(0, 1.0)] * 9, 0.5)
    assert (sure["first"], sure["last"]) == (0, 8)
    three = [answer_of(0.5, 0.3, 0.2)] * 6 + [answer_of(0.1, 0.8, 0.1)] * 6
    said = clips.summary(three, 0.5)
    assert (said["first"], said["last"]) == (7, 11)
    assert said["probabilities"] == pytest.approx([0.1, 0.8, 0.1])


def test_a_clip_on_the_command_line(tmp_path, detector):
    path, out = save_clip(tmp_path / "c.gif", moving(), duration=40), tmp_path / "out"
    picture(50, 40, 1).save(tmp_path / "a.png")
    picture(50, 40, 2).save(tmp_path / "z.png")
    command = [tmp_path, "--model", detector.path, "--every", "2"]
    said = call(infer, *command, "--json", "--csv", tmp_path / "t.csv", "--save-overlay", out)
    assert said.returncode == 0, said.stderr
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert [(Path(r["image"]).name, r["frame"], bool(r["clip"])) for r in lines[:-2]] == [
        ("a.png", None, False), *(("c.gif", n, False) for n in range(1, 12, 2)),
    ]  # fmt: skip
    clip = lines[-2]
    answers, expected = detector.predict_clip(path, every=2)
    assert lines[1:-2] == json.loads(json.dumps(answers))
    assert clip == json.loads(json.dumps(expected))
    assert clip["clip"] == {"frames": 12, "looked_at": 6, "stretch": clip["clip"]["stretch"]}
    first, last = clip["clip"]["stretch"]
    assert first <= clip["frame"] <= last
    best = next(a for a in answers if a["frame"] == clip["frame"])
    assert best["box"] == clip["box"]
    assert best["probability"] == max(a["probability"] for a in answers if first <= a["frame"] <= last)
    assert sorted(p.name for p in out.iterdir()) == [
        "a.png_overlay.png",
        "c.gif_overlay.gif",
        "c.gif_overlay.png",
        "z.png_overlay.png",
    ]
    with Image.open(out / "c.gif_overlay.gif") as animation:
        assert animation.n_frames == 6
        assert animation.info["duration"] == 80  # at the clip's own pace
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["frame"] for row in rows] == ["", "1", "3", "5", "7", "9", "11", str(clip["frame"]), ""]
    assert (rows[-2]["first"], rows[-2]["last"]) == (str(first), str(last))
    told = call(infer, path, *command[1:]).stdout
    assert len(told.splitlines()) == 3  # the model, the clip, the disclaimer
    assert f", frames {first} to {last} of 12, best {clip['frame']}" in told
    assert "--every: 0: must lie in" in error_of(call(infer, *command[:-1], "0"))


@needs_pydicom
def test_a_clip_that_breaks_off_is_judged_as_far_as_it_goes_and_referred(tmp_path, detector):
    whole = dicom_bytes(moving(8))
    (tmp_path / "c.dcm").write_bytes(whole[: -60 * 40 * 3])
    answers, clip = detector.predict_clip(tmp_path / "c.dcm")
    assert len(answers) == 5
    assert clip["refer"]
    assert "only 5 of its 8 frames could be read (a DICOM file whose pixels are missing, cut off" in clip["reason"]
    streams = []
    for frame in moving(3):
        streams.append(io.BytesIO())
        frame.save(streams[-1], "JPEG")
    (tmp_path / "j.dcm").write_bytes(dicom_bytes(moving(6), streams=[s.getvalue() for s in streams]))
    answers, clip = detector.predict_clip(tmp_path / "j.dcm")  # it claims 6
    alone = detector.predict([Image.open(s) for s in streams])
    assert [a["probability"] for a in answers] == [a["probability"] for a in alone]
    assert "only 3 of its 6 frames" in clip["reason"]
    (tmp_path / "n.dcm").write_bytes(whole[: -60 * 40 * 8])
    said = call(infer, tmp_path / "n.dcm", "--json", "--model", detector.path)
    assert said.returncode == 1
    (line,) = map(json.loads, said.stdout.splitlines())
    assert "cut off" in line["error"]
    assert line["prediction"] is None


def test_a_single_suspicious_frame_is_never_smoothed_away_in_silence(detector, monkeypatch, tmp_path):
    path = save_clip(tmp_path / "c.gif", moving())
    p = [0.05] * 12
    p[6] = 0.9

    def predict(images, meta=None):
        found = [
            infer.answer([1 - p[len(said) + i], p[len(said) + i]], 0.01, detector.info) for i in range(len(images))
        ]
        said.extend(found)
        return [dict.fromkeys(infer.KEYS) | f for f in found]

    said = []
    monkeypatch.setattr(detector, "predict", predict)
    monkeypatch.setitem(detector.info, "threshold", 0.5)
    _, clip = detector.predict_clip(path)
    assert clip["prediction"] == "benign"
    assert clip["frame"] == 7
    assert clip["refer"]
    assert "1 of its frames reach the threshold, if only by themselves" in clip["reason"]


def test_clips_in_a_folder_that_trains_are_told_of(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(40, 40, i + 9 * (name == "b")).save(tmp_path / name / f"{i}.png")
    save_clip(tmp_path / "a" / "c.gif", moving())
    images = data.load(tmp_path, 32, cache=tmp_path / "cache")
    data.load(tmp_path, 32, cache=tmp_path / "cache")  # from the cache too
    assert capsys.readouterr().out.count("1 clips: of each the first frame is taken") == 2
    assert len(images) == 9


# export.py

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.PACKAGES),
    reason="pip install onnx onnxscript onnxruntime",
)
AGE_AND_SEX = [{"column": "age", "mean": 55.0, "sd": 12.0}, {"column": "sex", "levels": ["female", "male"]}]


def lively(model, patients=None):
    """The same untrained model with norms that fit phantoms and larger heads: outlines of many parts, answers that differ."""
    pixels = phantoms.phantoms(32, model.info["load_size"], 1)[0].expand(-1, model.info["channels"], -1, -1)
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]] * 32) if model.needs_boxes else None
    infer.adapt(model, pixels, boxes, patients)
    for name, values in model.named_parameters():
        if name.endswith("head.weight"):
            spread = (0.7 if "dnet" in name else 0.15) / values[0].numel() ** 0.5
            torch.nn.init.normal_(values, std=spread, generator=seeded(len(values)))
    return model


def spiral(side):
    """The longest way that a lesion of one cell's width can take, bool (side, side)."""
    mask, (y, x), (down, right), length = torch.zeros(side, side, dtype=torch.bool), (0, -1), (0, 1), side
    while length > 0:
        for _ in range(length):
            y, x = y + down, x + right
            mask[y, x] = True
        down, right = right, -down
        length -= 2 if down else 0
    return mask


def answers_of(content, **feed):
    return {name: value.double() for name, value in export.session(content)(**feed).items()}


@needs_onnx
def test_a_file_finds_the_parts_of_a_mask_however_long_their_way():
    class Parts(torch.nn.Module):
        def forward(self, masks):
            return models.label_parts(masks)

    masks = torch.rand(6, 16, 16, generator=seeded()) < torch.tensor([0.2, 0.3, 0.4, 0.5, 0.0, 1.0])[:, None, None]
    masks = torch.cat([masks, spiral(16)[None], ~spiral(16)[None]])
    export.teach_graphs()
    graph = torch.export.export(Parts(), (masks,), dynamic_shapes=({0: torch.export.Dim("N")},), strict=True)
    file = torch.onnx.export(graph, verbose=False, input_names=["masks"], output_names=["parts"]).model_proto
    for chosen in (masks, masks[6:7], masks[[4]]):
        found = answers_of(file.SerializeToString(), masks=chosen)["parts"]
        assert torch.equal(found, models.label_parts(chosen).double())
    assert models.label_parts(masks[6:7]).unique().numel() == 2  # one way from end to end


@pytest.fixture(scope="module")
def exported():
    """A model with everything: two members, one sees crops around what the other finds, CLAHE, patients, three views, a
    temperature; and its file."""
    model = shared_model(
        views=3, meta=5, equalise=True, meta_spec=AGE_AND_SEX, temperature=1.4, threshold=0.31, lesion_threshold=0.4,
        made={"data": "/home/someone/BUSI"},
    )  # fmt: skip
    lively(model, torch.randn(32, 5, generator=seeded()))
    traits = [torch.randn(40, t.shape[1], generator=seeded()).double() for t in model.look(*everything(2)).traits]
    model.info["familiar"] = models.familiar(traits, traits)
    answering = export.Answering(model).eval()
    return answering, export.to_onnx(answering)


def everything(n):
    """Pictures, no boxes, patients."""
    pixels, patients = phantoms.phantoms(n, 64, 5)[0], torch.randn(n, 5, generator=seeded())
    pixels[n // 2], pixels[-1] = 0, 200  # blank
    return pixels, None, patients


@needs_onnx
def test_a_file_answers_like_the_model_whatever_the_batch(exported):
    answering, file = exported
    content, (pixels, _, patients) = file.SerializeToString(), everything(9)
    with torch.inference_mode():
        said = answering.model.look(pixels := augment.clahe(pixels), None, patients)
        wanted = dict(zip(("probabilities", "uncertainty"), answering.model.conclude(said.opinions), strict=True))
        wanted |= {"strangeness": answering.model.strangeness(said.traits), "box": said.found.boxes()}
    wanted |= {"lesion_score": said.found.scores()}
    wanted["outline"] = F.interpolate(said.found.outlines[:, None], size=(64, 64), mode="bilinear")[:, 0]
    assert wanted["probabilities"][:, 1].std() > 0.003
    assert (said.found.outlines[:7] > said.found.scores()[:7, None, None] / 2).float().mean() < 0.9
    pixels = everything(9)[0]
    for rows in (torch.arange(9), torch.tensor([3]), torch.tensor([8, 0, 3, 3, 1, 4, 7])):
        found = answers_of(content, images=pixels[rows], patients=patients[rows])
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            # a crop that lies 1e-6 elsewhere moves what this untrained network draws in it by 5e-4
            atol = 2e-3 if name in ("box", "outline") else 1e-4
            close(found[name], value[rows].double(), atol * max(1.0, float(value.abs().max())))


@needs_onnx
def test_a_file_tells_how_to_feed_it_and_nothing_of_the_machine_that_wrote_it(exported):
    _, file = exported
    about = {p.key: p.value for p in file.metadata_props}
    assert {k: json.loads(about[k]) for k in ("classes", "size", "channels", "views", "scales", "temperature")} == {
        "classes": ["benign", "malignant"], "size": 64, "channels": 1, "views": 3, "scales": [1.0], "temperature": 1.4
    }  # fmt: skip
    assert (json.loads(about["threshold"]), json.loads(about["lesion_threshold"])) == (0.31, 0.4)
    assert (about["disclaimer"], json.loads(about["made"])) == (models.DISCLAIMER, {"data": "BUSI"})
    assert about["window"] == "null"
    assert [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in file.graph.input] == [
        ["N", 1, 64, 64], ["N", 5]
    ]  # fmt: skip
    content = file.SerializeToString()
    assert not any(str(word).encode() in content for word in (HERE, "site-packages", "stack_trace", ".py"))
    namespace = {"np": np}
    exec(documented_code()[1], namespace)
    for patient in ({"age": 67, "sex": "male"}, {"age": 20}, {}):
        coded, names, _ = data.encode_meta([{k: str(v) for k, v in patient.items()}], None, AGE_AND_SEX)
        assert names == json.loads(about["patients"])
        assert np.array_equal(namespace["encode"](patient, json.loads(about["patients_spec"])), coded.numpy())


@needs_onnx
def test_a_file_refuses_what_is_no_picture_of_its_kind(exported):
    content, (pixels, _, patients) = exported[1].SerializeToString(), everything(2)
    bad = [pixels[:, :, :32], pixels[:, :, :, :, None], pixels.repeat(1, 3, 1, 1), pixels[0], pixels / 255]
    for feed in (
        *({"images": x, "patients": patients} for x in bad),
        {"images": pixels},
        {"images": pixels, "patients": patients[:, :4]},
    ):
        with pytest.raises(Exception, match=r"images|patients|uint8"):  # onnxruntime's own, of several kinds
            export.session(content)(**feed)


def documented_code():
    return re.findall(r"```python\n(.*?)```", (HERE / "docs" / "onnx.md").read_text(), re.DOTALL)


KINDS = {  # what one file or another has: inputs, outputs
    "a detector alone": ({"images"}, {"box", "lesion_score", "outline"}),
    "crops around given boxes": ({"images", "boxes"}, {"probabilities", "uncertainty"}),
    "three classes in colour": ({"images"}, {"probabilities", "uncertainty"}),
    "an older detector": ({"images"}, {"probabilities", "uncertainty", "box"}),
}


@needs_onnx
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_kinds_answer_like_their_models_slow(kind):
    torch.manual_seed(0)
    about = {"classes": ["a", "b", "c"] if "three" in kind else ["a", "b"], "size": 32, "load_size": 40}
    about |= {"channels": 3 if "colour" in kind else 1, "views": 1 if "three" in kind else 2}
    roi = "mask" if "crops" in kind else "none"
    member = models.CNet("small_cnn", len(about["classes"]), about["channels"], roi=roi, attention="condenser")
    found = {"a detector alone": [models.DNet("small_cnn")], "an older detector": [models.VotingDNet("small_cnn")]}
    model = lively(models.Ensemble([] if "alone" in kind else [member], None, found.get(kind, []), **about).eval())
    answering = export.Answering(model, scales=(1.5, 1.0) if "three" in kind else (1.0,)).eval()
    content, feed = export.to_onnx(answering).SerializeToString(), export.examples(model, 5)
    assert (set(feed), set(answering(**feed))) == KINDS[kind]
    for rows in (slice(0, 5), slice(2, 3)):
        feed = {name: values[rows] for name, values in feed.items()}
        for name, gap in export.differences(export.session(content)(**feed), answering(**feed)).items():
            assert gap.max() < 1e-4, name


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    """A run folder with a small model that has met the first and the last hundred of the phantoms."""
    folder = tmp_path_factory.mktemp("export")
    model = lively(models.Ensemble([models.CNet("small_cnn", 2, 1, trunk="shared")], **SMALL))
    pictures = data.phantom_set(size=32).pictures()
    model.info["seen"] = {"train": pictures[:100], "val": pictures[-100:], "test": pictures[:0]}
    models.save(folder / "model.pt", model)
    return folder


SMALL = {
    "classes": ["benign", "malignant"],
    "size": 32,
    "load_size": 32,
    "channels": 1,
    "views": 2,
    "lesion_threshold": 0.01,
}


@needs_onnx
def test_the_command_line_writes_both_files_checks_them_and_the_page_says_how_to_use_them(export_folder, tmp_path):
    said = call(export, export_folder, "--int8", "phantoms", "--check", "phantoms")
    assert said.returncode == 0, said.stderr
    assert "600 labelled pictures, none of which the model has learnt from" in said.stdout
    rows = re.findall(
        r"^(PyTorch|onnxruntime|onnxruntime, int8) +([01]\.\d{3}) \[.* (\d+\.\d) ms \[", said.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["PyTorch", "onnxruntime", "onnxruntime, int8"]
    assert rows[0][1] == rows[1][1]
    worst = [float(v) for v in re.findall(r"[a-z_]+ (\d+e[+-]\d+) \d+", said.stdout.split("against PyTorch")[1])]
    assert len(worst) == 5
    assert max(worst) <= 1e-4
    whole, small = (export_folder / name for name in ("model.onnx", "model.int8.onnx"))
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    x = data.phantom_set(40, 32, seed=9).pixels
    exact, coarse = (answers_of(p.read_bytes(), images=x)["outline"] for p in (whole, small))
    assert 0 < (exact - coarse).abs().max() < 0.2
    assert torch.corrcoef(torch.stack([exact.flatten(), coarse.flatten()]))[0, 1] > 0.9

    detector = infer.BreastCancerDetector(export_folder)
    (tmp_path / "use.py").write_text(documented_code()[0])
    for mode, size in (("L", (50, 31)), ("RGB", (20, 64)), ("L", (32, 32))):
        picture(*size, 7, mode).save(tmp_path / "a.png")
        told, wanted = run(tmp_path / "use.py", whole, tmp_path / "a.png"), detector.predict(tmp_path / "a.png")
        words = told.stdout.split()
        assert words[0] == wanted["prediction"], told.stderr
        assert float(words[2]) == pytest.approx(wanted["probability"], abs=1e-4)
        assert [float(v) for v in words[4:]] == pytest.approx(wanted["box"], abs=0.11)


def test_what_is_checked_is_what_a_picture_in_a_file_gets(tmp_path, monkeypatch):
    """Contrast is evened out once, the views are those that were asked for: as infer.py answers to the same files."""
    files = class_folders(tmp_path / "set", {"benign": 7, "malignant": 5})
    model = lively(models.Ensemble([models.CNet("small_cnn", 2, 1)], **SMALL | {"equalise": True}))
    models.save(tmp_path / "model.pt", model)
    monkeypatch.setattr(export, "PACKAGES", ())
    monkeypatch.setattr(export, "write_files", lambda *a: {})
    asked, fed = [], []
    clock = {"PyTorch": [0.1, 0.2]}
    monkeypatch.setattr(export, "clock", lambda engines, feed: asked.append(engines["PyTorch"]) or clock)
    monkeypatch.setattr(export, "feeds", lambda *a, real=export.feeds: (fed.append(f["images"]) or f for f in real(*a)))
    said = call(export, tmp_path / "model.pt", "--check", files, "--tta", 3, "--cache", tmp_path / "cache")
    assert "12 labelled pictures\n" in said.stdout, said.stderr
    assert "were set for 2 views" in said.stdout
    paths = sorted(p for p in files.rglob("*.png") if "mask" not in p.name)
    detector = infer.BreastCancerDetector(tmp_path / "model.pt", tta=3)
    wanted = torch.tensor([r["probability"] for r in detector.predict(paths)])
    with torch.inference_mode():
        found = asked[0](images=fed[-1])["probabilities"][:, 1]
    close(found.sort().values, wanted.sort().values.double(), 1e-6)


@needs_onnx
def test_what_export_refuses(export_folder, tmp_path, monkeypatch):
    out = tmp_path / "x.onnx"
    assert "--check nowhere: no such file" in error_of(call(export, export_folder, "--check", "nowhere", "--out", out))
    three = class_folders(tmp_path / "three", {"a": 3, "b": 3, "malignant": 3})
    said = error_of(call(export, export_folder, "--check", three, "--cache", tmp_path, "--out", out))
    assert "its classes are ['a', 'b', 'malignant']" in said
    model = models.load(export_folder)
    model.info["seen"]["train"] = data.phantom_set(size=32).pictures()
    models.save(tmp_path / "all.pt", model)
    said = error_of(call(export, tmp_path / "all.pt", "--check", "phantoms", "--out", out))
    assert "no labelled image is left" in said
    models.save(tmp_path / "colour.pt", models.Ensemble([models.CNet("small_cnn", 2, 3)], **SMALL | {"channels": 3}))
    assert "in colour" in error_of(call(export, tmp_path / "colour.pt", "--int8", "phantoms", "--out", out))
    monkeypatch.setattr(export, "to_onnx", lambda answering: argparse.Namespace(SerializeToString=lambda: b""))
    wrong = export.Answering(models.load(export_folder)).eval()
    monkeypatch.setattr(
        export, "session", lambda content: lambda **feed: {k: v + 0.01 for k, v in wrong(**feed).items()}
    )
    assert "differ from PyTorch's" in error_of(call(export, export_folder, "--out", out))
    assert not out.exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript onnxruntime" in error_of(call(export, export_folder))


# service.py and app.py: pictures over HTTP, the page, feedback

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
drives = shutil.which("chromium") and shutil.which("chromedriver") and importlib.util.find_spec("selenium")
needs_browser = pytest.mark.skipif(not drives, reason="chromium, chromium-driver and selenium are not all installed")


class Slowly:
    """A detector that notes which pictures came together, and answers their names."""

    def __init__(self):
        self.info, self.seen = {"classes": ["benign", "malignant"], "views": 1, "size": 32, "threshold": 0.5}, []

    def predict(self, paths, metas, masks=False):
        if "bad" in paths:
            raise InputError("bad")
        self.seen.append((self.tta, paths))
        return [f"{path} {meta}" for path, meta in zip(paths, metas, strict=True)]


def holding(worker):
    """A function that lets a worker go on, which does nothing until then."""
    let, began = threading.Event(), threading.Event()
    worker.run(lambda: (began.set(), let.wait(30)))
    assert began.wait(30)
    return let.set


def test_what_waits_is_answered_together_in_passes_of_32():
    detector = Slowly()
    worker = service.Worker(detector, most=100)
    release = holding(worker)
    looks = [service.Look(), service.Look(tta=2)]
    jobs = [worker.ask([f"{i}a", f"{i}b"], looks[i % 2], [{"age": i}, None]) for i in range(40)]
    large, last = worker.ask([str(i) for i in range(70)]), worker.run(lambda: len(detector.seen))
    release()
    for i, job in enumerate(jobs):
        assert job.result(30) == [f"{i}a {{'age': {i}}}", f"{i}b None"]
    assert len(large.result(30)) == 70
    assert [(tta, len(paths)) for tta, paths in detector.seen] == [
        (1, 32),
        (2, 32),
        (1, 8),
        (2, 8),
        (1, 32),
        (1, 32),
        (1, 6),
    ]
    assert last.result(30) == 7
    release = holding(worker)
    first = worker.ask(["x"])
    assert first.cancel()
    release()
    assert worker.ask(["y"]).result(30) == ["y None"]  # who went away leaves the others their answers


def test_one_bad_request_spoils_no_other_and_a_full_queue_is_said():
    worker = service.Worker(Slowly(), most=3)
    release = holding(worker)
    good, bad, other = worker.ask(["a"]), worker.ask(["bad"]), worker.ask(["b"])
    for more in (lambda: worker.ask(["c"]), lambda: worker.run(print)):
        with pytest.raises(service.Full, match="3 requests wait"):
            more()
    release()
    assert (good.result(30), other.result(30)) == (["a None"], ["b None"])
    with pytest.raises(InputError, match="bad"):
        bad.result(30)
    info = argparse.Namespace(info={"views": 5})
    for look, most in (
        (service.Look(), 32),
        (service.Look(1), 32),
        (service.Look(8, (4.0,)), 1),
        (service.Look(5, (1.0, 2.0)), 6),
    ):
        assert look.at_once(info) == most
    with pytest.raises(InputError, match="3 classes"):
        service.Look(threshold=0.5).of(argparse.Namespace(info={"classes": [0, 1, 2], "views": 1}))


def form(fields=(), files=(), boundary=b"line"):
    """(body, headers) of multipart/form-data. files: [(field, file name, bytes)]."""
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields]
    for field, name, content in files:
        head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return body, {"content-type": "multipart/form-data; boundary=line", "content-length": str(len(body))}


def ask(app, method, path, body=b"", headers=None, piece=65536, silent=False):
    """(status, headers, body, bytes that were read) of one request to an ASGI application. silent: half of the body never
    comes."""
    pieces, said, read = [body[i : i + piece] for i in range(0, len(body), piece)] or [b""], [], 0
    pieces = pieces[: len(pieces) // 2] if silent else pieces
    waiting = iter(pieces)

    async def receive():
        nonlocal read
        if (part := next(waiting, None)) is None:
            await asyncio.sleep(30)
            return {"type": "http.disconnect"}
        read += len(part)
        return {"type": "http.request", "body": part, "more_body": silent or part is not pieces[-1]}

    async def send(message):
        said.append(message)

    headers = {"host": "localhost:7860"} | (headers or {})
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "scheme": "http",
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("localhost", 7860),
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    with contextlib.suppress(RuntimeError):  # a bug is answered, and then told to the log
        asyncio.run(app(scope, receive, send))
    start, *rest = said
    content = b"".join(m.get("body", b"") for m in rest)
    return start["status"], {k.decode().lower(): v.decode() for k, v in start["headers"]}, content, read


def post(app, path, fields=(), files=(), **more):
    """(status, JSON or bytes) of a form."""
    body, headers = form(fields, files)
    status, told, content, _ = ask(app, "POST", path, body, headers | more)
    return status, json.loads(content) if told["content-type"] == "application/json" else content


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def served(detector, tmp_path):
    """The service with a guard of 100 kB, its worker, and its folder."""
    worker = service.Worker(detector, 2)
    guarded = service.Guard(
        service.build_service(worker, tmp_path), service.LOCAL, None, 100_000, 1_000_000, 5, tmp_path
    )
    return guarded, worker, tmp_path


@needs_gradio
def test_the_map_of_a_clip_is_that_of_its_best_frame(served, detector, tmp_path):
    app, _, _ = served
    frames = [picture(60, 40, i) for i in range(5)]
    path = save_clip(tmp_path / "c.tif", frames)
    best, sent = detector.predict_clip(path)[1], [("file", "c.tif", path.read_bytes())]
    shown = detector.info["classes"].index(best["prediction"])
    heats = [report.explain_picture(detector.model, frame, "ig", shown)[0] for frame in frames]
    status, content = post(app, "/v1/explain", [("method", "ig"), ("format", "npy")], sent)
    assert status == 200
    found = np.load(io.BytesIO(content))
    assert [np.allclose(found, heat, atol=1e-5) for heat in heats] == [i + 1 == best["frame"] for i in range(5)]
    assert post(app, "/v1/explain", [("method", "ig")], sent)[0] == 200


def test_a_frame_of_a_clip_and_a_window_are_explained(tmp_path, detector, monkeypatch):
    frames, drawn, draw = [picture(60, 40, i) for i in range(3)], [], explain.draw
    path, model = str(save_clip(tmp_path / "c.gif", frames)), ["--model", str(detector.path), "--method", "ig"]
    monkeypatch.setattr(explain, "draw", lambda model, shown, *args: drawn.append(shown) or draw(model, shown, *args))
    for i in (1, 3):
        explain.main([path, *model, "--frame", str(i), "--out", str(tmp_path / f"{i}.png")])
        assert np.array_equal(drawn.pop(), frames[i - 1])
    refused("no frame 4", explain.main, [path, *model, "--frame", "4"])
    for more in (["--frame", "2"], ["--window", "0,9"]):
        refused("are of a picture", explain.main, ["--evaluate", *model, *more])
    wide = np.linspace(0, 60_000, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "w.png")
    out = [str(tmp_path / "w.png"), *model, "--out", str(tmp_path / "o.png")]
    explain.main(out)
    explain.main([*out, "--window", "30000,60000"])
    values = [np.asarray(image).astype(float) for image in drawn]
    np.testing.assert_allclose(values[1], (wide / 30_000.0 - 1).clip(0) * 255, atol=0.51)
    np.testing.assert_allclose(values[0], wide / 60_000.0 * 255, atol=0.51)
    refused("give the values", explain.main, [*out, "--window", "9"])


def test_the_steps_of_a_map_add_up_to_it(ensemble):
    model = models.load(ensemble[0])
    image = picture(60, 40, 3)
    steps = [heat for heat, *_ in report.explain_steps(model, image, "gradcam", 1)]
    assert len(steps) == len(model.members) > 1
    assert np.array_equal(steps[-1], report.explain_picture(model, image, "gradcam", 1)[0])
    x = torch.from_numpy(data.letterbox(image, model.info["load_size"])[0])[None]
    parts = [p[0] for p in model.member_maps(x, "gradcam", 1)]
    left, top, w, h = data.fit(image.size, model.info["load_size"])
    for k, step in enumerate(steps, 1):
        np.testing.assert_allclose(step, sum(parts[:k])[top : top + h, left : left + w].numpy(), atol=1e-6)


@needs_gradio
def test_the_service_says_what_infer_says_and_keeps_nothing(served, detector):
    app, _, folder = served
    images = [picture(48, 48, 3), picture(80, 40, 4)]
    files = [
        ("files", "../../a.png", as_png(images[0])),
        ("files", "b c.png", as_png(images[1])),
        ("files", "c.png", b"no"),
    ]
    status, answers = post(app, "/v1/predict", [("tta", 2), ("scales", "1, 1.25"), ("threshold", 0.3)], files)
    assert (status, [a["image"] for a in answers]) == (200, ["a.png", "b c.png", "c.png"])
    other = service.Look(2, (1.0, 1.25), 0.3).of(detector)
    for image, said in zip(images, answers[:2], strict=True):
        expected = other.predict(image) | {"image": said["image"]}
        assert list(said) == KEYS
        assert said["probability"] == pytest.approx(expected["probability"], abs=1e-6)
        assert (said["prediction"], said["refer"]) == (expected["prediction"], expected["refer"])
    assert "not an image" in answers[2]["error"]
    assert not list(folder.iterdir())
    assert detector.info["threshold"] == 0.5
    status, model = ask(app, "GET", "/v1/model")[::2]
    model = json.loads(model)
    assert (status, model["classes"], model["test"]) == (200, ["benign", "malignant"], None)
    assert model["hash"] == hashlib.sha256(Path(detector.path).read_bytes()).hexdigest()[:16]
    assert json.loads(ask(app, "GET", "/health")[2]) == {"status": "ok", "waiting": 0}


@needs_gradio
def test_each_error_of_the_service_has_its_own_code(served, detector, monkeypatch):
    app, worker, folder = served
    good, bad = ("files", "a.png", as_png(picture(48, 48))), ("files", "b.png", b"\x89PNG\r\n\x1a\nno")
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, "PNG")
    for code, why, fields, sent in [
        (415, "b.png: not an image|b.png: damaged", [], [bad]),
        (415, "h.png: more than", [], [("files", "h.png", huge.getvalue())]),
        (415, "empty", [], [("files", "empty", b"")]),
        (422, "files: Field required", [], []),
        (422, "tta 9: give 1 to 8", [("tta", 9)], [good]),
        (422, "tta: .*integer", [("tta", "many")], [good]),
        (422, "scales 'a'", [("scales", "a")], [good]),
        (422, "scales nan", [("scales", "nan")], [good]),
        (422, "scales: 9 of them", [("scales", "1 " * 9)], [good]),
        (422, "threshold: ", [("threshold", "2")], [good]),
        (422, "threshold: ", [("threshold", "nan")], [good]),
        (422, "trained on images alone", [("meta", "age=5")], [good]),
        (422, "2 patients for 1", [("meta", "age=5"), ("meta", "age=6")], [good]),
        (413, "more than 0.1 MB", [], [("files", "a.png", bytes(100_000))]),
    ]:
        status, said = post(app, "/v1/predict", fields, sent)
        assert (status, list(said)) == (code, ["error"]), said
        assert re.search(why, said["error"]), said
    one = [("file", "a.png", good[2])]
    for code, fields, sent in [
        (415, [], [("file", "a.png", b"no")]), (422, [("method", "guess")], one), (422, [("target", "cat")], one),
        (422, [("method", "smoothgrad"), ("target", "benign")], one), (422, [("format", "gif")], one), (422, [], []),
    ]:  # fmt: skip
        assert post(app, "/v1/explain", fields, sent)[0] == code, (fields, sent)
    assert ask(app, "GET", "/v1/predict")[0] == 405
    assert ask(app, "GET", "/nowhere")[0] == 404
    assert ask(app, "POST", "/v1/predict", b"{", {"content-type": "multipart/form-data"})[0] in (400, 422)
    release = holding(worker)
    worker.ask(["a"]), worker.ask(["b"])
    body, headers = form([], [good])
    status, told, content, _ = ask(app, "POST", "/v1/predict", body, headers)
    assert (status, told["retry-after"]) == (503, "1")
    assert "wait already" in json.loads(content)["error"]
    release()

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(detector.model, "look", broken)
    status, said = post(app, "/v1/predict", [], [good])
    assert (status, "fault of this program" in said["error"]) == (500, True)
    assert not list(folder.iterdir())


@needs_gradio
def test_the_service_explains_as_explain_does(served, detector):
    app, _, _ = served
    image = picture(64, 40, 5)
    for method in ("gradcam", "ig"):
        answer = detector.predict(image)
        status, content = post(
            app, "/v1/explain", [("method", method), ("format", "npy")], [("file", "a.png", as_png(image))]
        )
        expected = report.explain_picture(
            detector.model, image, method, detector.info["classes"].index(answer["prediction"])
        )
        assert status == 200
        np.testing.assert_allclose(np.load(io.BytesIO(content)), expected[0], atol=1e-5)
        status, page = post(app, "/v1/explain", [("method", method)], [("file", "a.png", as_png(image))])
        assert (status, Image.open(io.BytesIO(page)).format) == (200, "PNG")
    maps = [
        np.load(io.BytesIO(post(app, "/v1/explain", [("format", "npy"), ("method", "ig"), ("target", t)], [("file", "a", as_png(image))])[1]))
        for t in detector.info["classes"]
    ]  # fmt: skip
    assert maps[0].max() > 0
    np.testing.assert_allclose(maps[0], -maps[1], atol=1e-4)


@needs_gradio
@needs_pydicom
def test_the_service_and_the_page_take_dicom_files_and_clips(served, detector):
    app_, _, folder = served
    frames, still = [picture(48, 48, seed) for seed in (3, 4, 5)], picture(48, 48, 6)
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    whole = np.zeros((100, 140), np.uint8)
    whole[25:85, 30:110] = np.asarray(picture(80, 60, 7))  # the rest is a frame of text
    scan = dicom_bytes([whole], SequenceOfUltrasoundRegions=regions((30, 25, 109, 84)))
    names, contents = ["c.gif", "a.png", "us.dcm"], [gif.getvalue(), as_png(still), scan]
    sent = [("files", name, content) for name, content in zip(names, contents, strict=True)]
    status, said = post(app_, "/v1/predict", [], sent)
    assert (status, [a["image"] for a in said]) == (200, names)
    (folder / "f").mkdir()
    for name, content in zip(names, contents, strict=True):
        (folder / "f" / name).write_bytes(content)
    paths = [str(folder / "f" / name) for name in names]
    expected = [detector.predict_clip(paths[0])[1], *detector.predict(paths[1:])]
    for one, other in zip(said, expected, strict=True):
        assert {k: one[k] for k in ("prediction", "refer", "frame", "clip")} == {
            k: other[k] for k in ("prediction", "refer", "frame", "clip")
        }
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    assert (said[0]["clip"]["frames"], said[1]["clip"], said[0]["frame"]) == (3, None, expected[0]["frame"])
    worker = service.Worker(detector)
    jobs = service.ask_files(worker, paths, service.Look(masks=True))
    found = service.in_order(jobs, [job.result(60) for _, job in jobs])
    items = [app.keep_answer(path, one, None, None) for path, one in zip(paths, found, strict=True)]
    best = np.asarray(frames[expected[0]["frame"] - 1].convert("RGB"))
    assert np.abs(np.asarray(app.open_again(items[0])).astype(int) - best).mean() < 3  # a GIF has few greys
    assert "3 of its 3 frames" in app.answer_html(items[0], detector.info)
    part = app.open_again(items[2])
    assert np.array_equal(np.asarray(part)[..., 0], whole[25:85, 30:110])
    assert items[2]["mask"].shape == (60, 80)
    assert app.read_box("40 30 60 50", part) == [10, 5, 30, 25]
    with pytest.raises(InputError, match="inside 30 25 110 85"):
        app.read_box("0 0 60 50", part)
    items[2]["answer"] |= {"box": [40.0, 30.0, 60.0, 50.0]}
    drawn = np.asarray(app.draw_item(items[2] | {"mask": None}, part)).astype(int)
    blue = (drawn[..., 2] > 200) & (drawn[..., 0] < 120)
    scale = 320 / 60
    assert data.box_of(blue) == pytest.approx(np.array([10, 5, 30, 25]) * scale, abs=4)
    assert [*app.map_steps(detector, items[2], "gradcam")][-1].max() >= 0
    app.write_feedback(folder / "told", part, "benign", items[2]["mask"], who="A", answer=items[2]["answer"])
    kept = b"".join(p.read_bytes() for p in (folder / "told").rglob("*") if p.is_file()) + json.dumps(said).encode()
    assert not [secret for secret in SECRETS if secret.encode() in kept]


@needs_gradio
def test_the_docs_are_one_page_that_asks_nobody_else(served):
    app, _, _ = served
    status, _, page, _ = ask(app, "GET", "/docs")
    schema = json.loads(ask(app, "GET", "/openapi.json")[2])
    assert status == 200
    assert set(schema["paths"]) == {"/v1/predict", "/v1/explain", "/v1/model", "/health"}
    for path in schema["paths"]:
        assert f'action="{path}"' in page.decode()
    assert not re.search(r'(src|href)="(https?:)?//', page.decode())
    assert page.count(b'type="file"') == 2
    assert b"<option>layercam</option>" in page


async def read_all(scope, receive, send):
    """An application that reads what comes, and says how much that was."""
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("gone")
        count, more = count + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(count).encode()})


def test_the_guard_reads_no_further_than_it_must(tmp_path):
    guard = service.Guard(read_all, service.LOCAL, None, 1000, 1500, 0.3, tmp_path)
    status, headers, body, read = ask(guard, "POST", "/", bytes(1000))
    assert (status, body, read) == (200, b"1000", 1000)
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert ask(guard, "POST", "/", bytes(1001), {"content-length": "1001", "expect": "100-continue"})[::3] == (413, 0)
    assert ask(guard, "POST", "/", bytes(2001), {"content-length": "2001"})[::3] == (413, 0)
    assert ask(guard, "POST", "/", bytes(1500), {"content-length": "1500"})[::3] == (413, 1500)  # forgotten
    status, headers, body, read = ask(guard, "POST", "/", bytes(100_000), piece=100)  # no length is told
    assert (status, read, headers["connection"]) == (413, 1100, "close")
    assert json.loads(body) == {"error": "more than 0.001 MB"}
    began = time.time()
    assert ask(guard, "POST", "/", bytes(900), piece=100, silent=True)[0] == 408
    assert time.time() - began < 5
    guard.held = 1000  # others are sending
    assert ask(guard, "POST", "/", bytes(900))[0] == 503
    assert guard.held == 1000
    (tmp_path / "a").write_bytes(bytes(1501))
    assert ask(guard, "POST", "/gradio_api/upload", bytes(900))[::3] == (503, 0)
    assert ask(guard, "GET", "/")[0] == 200


def test_the_guard_lets_nobody_in_who_should_not_be(tmp_path):
    guard = service.Guard(read_all, service.LOCAL, None, 1000, 1000, 5, tmp_path)
    for host in ("localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:1"):
        assert ask(guard, "GET", "/", headers={"host": host})[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:7860", ""):  # DNS rebinding
        assert ask(guard, "GET", "/", headers={"host": host})[0] == 403
    for site, code in (
        ("http://localhost:7860", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("https://localhost", 403),
    ):
        assert ask(guard, "POST", "/", headers={"origin": site})[0] == code
    guard = service.Guard(read_all, None, "dr:sécret", 1000, 1000, 5, tmp_path)
    words = ["", "Basic", "Basic !!", "Basic ZHI6", "Bearer " + base64.b64encode("dr:sécret".encode()).decode()]
    for word in words:
        status, headers, _, _ = ask(guard, "GET", "/v1/model", headers={"authorization": word, "host": "any"})
        assert (status, headers["www-authenticate"].startswith("Basic")) == (401, True)
    word = "Basic " + base64.b64encode("dr:sécret".encode()).decode()
    assert ask(guard, "GET", "/v1/model", headers={"authorization": word})[0] == 200
    assert ask(guard, "GET", "/health")[0] == 200


def test_pictures_lie_in_a_private_folder_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, lock = service.private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in (
        "../../x.png",
        "/etc/passwd",
        "..\\..\\y.png",
        "..",
        ".lock",
        "",
        None,
        "a\0b\n.png",
        "é" * 300 + ".dcm",
    ):
        path = service.keep_upload(argparse.Namespace(filename=name, file=io.BytesIO(b"1")), folder)
        assert path.resolve().parent.parent == folder.resolve()
        assert not path.name.startswith(".")
        assert path.suffix == Path((name or "").replace("\\", "/")).suffix.replace("\0", "_") or name in (
            "..",
            ".lock",
            "/etc/passwd",
        )
    assert {p.name for p in tmp_path.iterdir()} == {folder.name}
    service.sweep(folder, 60)
    assert len(service.files_in(folder)) == 9
    service.sweep(folder, -1)
    assert [p.name for p in folder.iterdir()] == [".lock"]
    second, _other = service.private_folder()  # leaves the first alone, whose lock is held
    assert folder.exists()
    lock.close()
    third, _another = service.private_folder()  # as after a kill
    assert (folder.exists(), second.exists(), third.exists()) == (False, True, True)


def test_strokes_become_masks_of_the_picture_that_was_painted_on():
    image = picture(300, 200, 1).convert("RGB")
    shown = app.to_paint(image)
    assert shown.size == (640, 427)
    layer = Image.new("RGBA", shown.size)
    ImageDraw.Draw(layer).ellipse([100, 100, 300, 250], outline=(*app.LESION, 255), width=12)
    ImageDraw.Draw(layer).rectangle([500, 20, 560, 60], fill=(*app.BESIDE, 255))
    ImageDraw.Draw(layer).line([400, 300, 500, 300], fill=(*app.LESION, 255), width=9)  # encloses nothing
    lesion, beside = app.painted({"background": shown, "layers": [layer], "composite": None}, image)
    true, scale = Image.new("1", shown.size), 300 / 640
    ImageDraw.Draw(true).ellipse([100, 100, 300, 250], fill=1)
    ImageDraw.Draw(true).line([400, 300, 500, 300], fill=1, width=9)
    true = np.asarray(true.resize(image.size))
    assert lesion.shape == beside.shape == (200, 300)
    assert (lesion & true).sum() / (lesion | true).sum() > 0.97
    assert data.box_of(beside) == pytest.approx(np.array([500, 20, 561, 61]) * scale, abs=1.5)
    assert app.painted({"background": None, "layers": [Image.new("RGBA", shown.size)]}, image) == [None, None]
    assert app.painted(None, image) == [None, None]
    for background in (None, app.to_paint(picture(300, 200, 2))):
        with pytest.raises(InputError, match="not the one chosen"):
            app.painted({"background": background, "layers": [layer]}, image)
    whole = app.filled(np.ones((5, 700), bool))
    assert whole.all()
    assert not app.filled(np.zeros((9, 9), bool)).any()
    for wrong in ("1 2 3", "a b c d", "5 5 5 9", "0 0 301 20", "-1 0 5 5", "nan 0 5 5"):
        with pytest.raises(InputError, match="give x_min"):
            app.read_box(wrong, image)
    assert app.read_box("1, 2.5; 30 40", image) == [1, 2.5, 30, 40]
    assert app.read_box("  ", image) is None


def test_feedback_is_a_data_set_that_trains(tmp_path):
    folder, mask = tmp_path / "feedback", np.zeros((40, 60), bool)
    mask[10:20, 15:45] = True
    for i in range(12):
        label = ["benign", "malignant"][i % 2]
        lesion, box = (mask, None) if i < 4 else (None, [1, 2, 30, 20.5]) if i < 6 else (None, None)
        beside = np.roll(mask, 15, 0) if i == 1 else None
        who, answer = '=cmd "x",\n', {"prediction": "benign", "probability": 0.25}
        count = app.write_feedback(
            folder, picture(60, 40, i).convert("RGB"), label, lesion, beside, box, who, answer, "abc"
        )
        assert count == i + 1
    colour = picture(60, 40, 99, "RGB")
    before = {p: p.read_bytes() for p in folder.rglob("*.png")}
    app.write_feedback(folder, colour, "benign")
    app.write_feedback(folder, picture(60, 40, 0).convert("RGB"), "malignant", who="B")  # of another opinion
    assert all(p.read_bytes() == content for p, content in before.items())
    table = (folder / "feedback.csv").read_text().splitlines()  # a person adds a column of her own
    (folder / "feedback.csv").write_text(
        "\n".join(f"{line},{'biopsy' if i == 0 else 'B1'}" for i, line in enumerate(table))
    )
    app.write_feedback(folder, colour, "benign")
    with open(folder / "feedback.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows.pop()["biopsy"] == ""
    assert {row["biopsy"] for row in rows} == {"B1"}
    (folder / "feedback.csv").write_text("\n".join(table))
    assert list(csv.DictReader(table).fieldnames) == app.COLUMNS
    assert (rows[0]["who"], rows[0]["said"], rows[0]["model"]) == ('cmd "x",\\n', "benign", "abc")
    assert (rows[13]["image"], rows[13]["label"], rows[0]["label"]) == (rows[0]["image"], "malignant", "benign")
    assert np.array_equal(np.asarray(Image.open(folder / rows[1]["not_this"])) > 0, np.roll(mask, 15, 0))
    assert np.array_equal(np.asarray(Image.open(folder / rows[12]["image"])), np.asarray(colour))
    images = quiet_load(folder, 64)
    assert (len(images), images.classes) == (14, ["benign", "malignant"])
    assert [int(v) for v in images.labels] == [["benign", "malignant"].index(r["label"]) for r in rows]
    assert images.outlined.tolist() == [True] * 6 + [False] * 8
    assert images.masks.flatten(1).any(1).tolist() == [True] * 4 + [False] * 10
    assert images.groups[0] == images.groups[13]
    assert quiet_load(folder / "feedback.csv", 64).names == images.names
    assert torch.nonzero(images.beside.flatten(1).any(1))[:, 0].tolist() == [1]
    assert [p for p, _ in infer.collect([folder])] == images.names  # and none of its masks
    entries = person.read_answers(folder, ["benign", "malignant"])
    assert [e.label for e in entries] == images.labels.tolist()
    assert [len(e.masks) for e in entries] == [1] * 4 + [0] * 10


def test_train_and_learn_take_the_folder_of_feedback_slow(tmp_path, folders):
    for i in range(24):
        kind, image, mask = i % 2, picture(60, 40, 500 + i), np.zeros((40, 60), bool)
        mask[10:30, 15:45] = True
        ImageDraw.Draw(image).rectangle([15, 10, 44, 29], fill=250 if kind else 5)
        app.write_feedback(tmp_path / "f", image.convert("RGB"), ["benign", "malignant"][kind], mask, who="A")
    run_folder, said, _ = quick(tmp_path, "--name trained", data_folder=tmp_path / "f")
    assert "24 images" in said
    assert "boxes: 24" in said
    assert (run_folder / "model.pt").exists()
    where = [
        "--data",
        folders,
        "--runs",
        tmp_path,
        "--cache",
        tmp_path / "cache",
        "--positive",
        "malignant",
        "--name",
        "l",
    ]
    result = call(al_loop, "learn", "--labels", tmp_path / "f", *where, *TINY)
    assert result.returncode == 0, result.stderr
    assert re.search(r"24 answers: 12 benign.*, 12 malignant", result.stdout)


def write_some(folder, seed):
    for i in range(8):
        app.write_feedback(
            folder, picture(40, 40, seed + i).convert("RGB"), "benign", np.ones((40, 40), bool), who=str(seed)
        )


def test_feedback_of_three_processes_at_once_and_a_kill_loses_nothing_slow(tmp_path):
    code = "import sys, test_all; test_all.write_some(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path / "feedback")]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    workers = [subprocess.Popen([*command, str(n)], env=environment) for n in (100, 200, 300)]
    table = tmp_path / "feedback" / "feedback.csv"
    deadline = time.time() + 100
    while not table.exists() and time.time() < deadline:
        time.sleep(0.002)
    workers[0].kill()
    assert [w.wait(100) for w in workers[1:]] == [0, 0]
    workers[0].wait(100)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for seed in ("200", "300"):
        assert sum(row["who"] == seed for row in rows) == 8
    for row in rows:
        for name in (row["image"], row["mask"]):
            assert Image.open(table.parent / name).size == (40, 40)
    count = len(rows)
    assert app.write_feedback(table.parent, picture(40, 40, 7).convert("RGB"), "benign") == count + 1  # no lock is left


def test_the_page_says_names_and_numbers_as_they_are(detector):
    item = {"name": "<img src=x>.png", "answer": detector.predict(picture(48, 48, 3)), "mask": None}
    words = app.answer_html(item, detector.info)
    assert "<img" not in words
    assert infer.verdict(item["answer"], detector.info)[0] in words
    assert f"left:{100 * detector.info['threshold']:.1f}%" in words
    if item["answer"]["refer"]:
        assert item["answer"]["reason"] in html.unescape(words)
    broken = {"name": "b", "answer": detector.predict(b"no")}
    assert "no answer: not an image" in app.answer_html(broken, detector.info)
    sure = {"name": "c", "answer": item["answer"] | {"probability": 2.0}}
    assert [i["name"] for i in app.likeliest_first([broken, item, sure])] == ["c", item["name"], "b"]
    three = detector.info | {"classes": ["a", "b", "c"]}
    told = item["answer"] | {"prediction": "b", "probabilities": {"a": 0.2, "b": 0.5, "c": 0.3}}
    assert "b 0.500, c 0.300, a 0.200" in app.answer_html({"name": "x", "answer": told}, three)
    card = app.card_text(detector)
    assert models.DISCLAIMER in card
    assert "is not known" in card
    heat = np.linspace(0, 1, 64).reshape(8, 8)
    sheets = [np.asarray(plots.overlay(picture(), None, "", heat, opacity=o)).astype(int) for o in (0, 0.5, 1)]
    plain = np.asarray(plots.overlay(picture())).astype(int)
    changes = [np.abs(sheet - plain)[:320, :400].mean() for sheet in sheets]
    assert changes[0] < changes[1] < changes[2]


def patients_model(path):
    """Of three classes and two patient data, as a detector."""
    torch.manual_seed(0)
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}, {"column": "sex", "levels": ["female", "male"]}]
    info = {"classes": ["a", "b", "c"], "size": 32, "load_size": 32, "channels": 1, "meta_spec": spec}
    models.save(path, models.Ensemble([models.CNet("small_cnn", 3, 1, meta=5)], **info).eval())
    return infer.BreastCancerDetector(path)


@needs_gradio
def test_the_page_of_a_model_of_patients_and_three_classes(tmp_path, monkeypatch):
    import gradio

    detector = patients_model(tmp_path / "m.pt")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    args = argparse.Namespace(keep_minutes=1.0, feedback=str(tmp_path / "feedback"), queue=2)
    worker = service.Worker(detector)
    blocks = app.build_page(gradio, worker, args, tmp_path, None)
    parts = {c["props"].get("label"): c["props"] for c in blocks.get_config_file()["components"]}
    assert [value for value, _ in parts["sex"]["choices"]] == ["", "female", "male"]
    assert "50 +- 10" in parts["age"]["info"]
    assert [value for value, _ in parts["What it is"]["choices"]] == ["a", "b", "c"]
    assert "Threshold" not in parts
    assert parts["Views"]["value"] == detector.info["views"]
    image, given = (
        tmp_path / "i.png",
        {"f": [str(tmp_path / "i.png")], "v": 2, "s": [1.25, 1.0], "age": " 60", "sex": None},
    )
    picture(40, 30).save(image)
    controls = argparse.Namespace(files="f", tta="v", scales="s", threshold=None, patient={"age": "age", "sex": "sex"})
    paths, look, meta = app.read_asked(given, controls, detector.info)
    assert (paths, look, meta) == ([str(image)], service.Look(2, (1.0, 1.25), None, True), {"age": "60"})
    (answer,) = worker.ask(paths, look, [meta]).result(60)
    assert answer["probabilities"] == look.of(detector).predict(image, meta)["probabilities"]
    steps = app.map_steps(detector, app.keep_answer(str(image), answer, meta, None), "gradcam")
    assert [heat.shape for heat in steps] == [(24, 32)] * len(detector.model.members)
    image.unlink()
    with pytest.raises(InputError, match="drop them again"):
        app.read_asked(given, controls, detector.info)
    guarded = service.Guard(service.build_service(worker, tmp_path), service.LOCAL, None, 10**6, 10**6, 5, tmp_path)
    two = [("files", name, as_png(picture(40, 30))) for name in ("a", "b")]
    status, both = post(guarded, "/v1/predict", [("meta", "age=20"), ("meta", "sex=male,age=80")], two)
    assert (status, both[0]["probabilities"] != both[1]["probabilities"]) == (200, True)
    for options, why in (
        ([("meta", "sex=x")], "sex=x"),
        ([("meta", "race=x")], "race"),
        ([("threshold", "0.5")], "3 classes"),
    ):
        status, said = post(guarded, "/v1/predict", options, two)
        assert (status, why in said["error"]) == (422, True)
        status, said = post(guarded, "/v1/explain", options, [("file", *two[0][1:])])
        assert (status, why in said["error"]) == (422, True)


@needs_gradio
def test_app_refuses_to_be_open_by_mistake(detector, tmp_path, monkeypatch):
    for options, why in [
        (("--host", "0.0.0.0"), "anyone there could ask"),
        (("--host", "0.0.0.0", "--auth", "dr"), "--auth dr: give USER:FILE"),
        (("--auth", f"dr:{tmp_path}/none"), "give USER:FILE"),
        (("--model", tmp_path / "none.pt"), "none.pt"),
    ]:
        assert why in error_of(call(app, *options))
    (tmp_path / "empty").write_text("\n")
    assert "the file is empty" in error_of(call(app, "--auth", f"dr:{tmp_path}/empty"))
    (tmp_path / "word").write_text("sécret\n")
    assert app.read_login(f"dr:{tmp_path}/word") == "dr:sécret"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as if nothing were installed
    assert "pip install 'gradio" in error_of(call(app, "--model", detector.path))


def test_without_a_model_app_trains_that_of_the_phantoms_first(detector, tmp_path, monkeypatch):
    asked = []

    def trains(options):
        asked.append(options)
        (tmp_path / "runs" / "phantoms").mkdir(parents=True)
        shutil.copy(detector.path, tmp_path / "runs" / "phantoms" / "model.pt")
        return {}, Path("runs/phantoms")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "main", trains)
    for _ in range(2):  # once, then it is there
        assert Path(app.ready_detector(None, "cpu").path) == Path("runs/phantoms/model.pt")
    assert asked == [["--device", "cpu"]]
    (tmp_path / "runs" / "phantoms" / "model.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        app.ready_detector(None, "cpu")
    assert app.ready_detector(detector.path, "cpu", "10,90").window == (10, 90)
    with pytest.raises(InputError, match="give the values"):  # said before anything is trained
        app.ready_detector(None, "cpu", "90,10")


@needs_gradio
def test_the_service_says_that_a_port_is_taken(detector):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: " in error_of(call(app, "--model", detector.path, "--port", port))


@contextlib.contextmanager
def started(folder, *options):
    """app.py as a user starts it: its URL, its process, its working folder, the folder of its temporary files."""
    (folder / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "app.py", "--port", 0, *options]
    with subprocess.Popen(
        [*map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        assert process.poll() is None, "".join(lines)
        yield found[0], process, folder, folder / "tmp"
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 143
        assert not list((folder / "tmp").iterdir())  # nothing is left behind


@pytest.fixture(scope="module")
def page(detector, tmp_path_factory):
    small = ["--max-mb", 1, "--max-megapixels", 0.5, "--read-seconds", 3, "--queue", 40]
    with started(tmp_path_factory.mktemp("page"), "--model", detector.path, *small) as page:
        yield page


def fetch(url, fields=(), files=(), method=None):
    """(status, body) over the network."""
    body, headers = form(fields, files) if files else (None, {})
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


@needs_gradio
def test_the_service_stays_up_whatever_comes_slow(page, detector):
    url, process, folder, temporary = page
    port = int(url.rpartition(":")[2])
    (private,) = (p for p in temporary.iterdir() if p.name.startswith("minicadx"))
    assert private.stat().st_mode & 0o777 == 0o700
    good = ("files", "../../../a.png", as_png(picture(48, 48, 3)))
    hanging = []
    for start in (
        b"",
        b"POST /v1/predict HT",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n"
        b"Content-Type: multipart/form-data; boundary=line\r\n\r\n--line",
    ) * 5:
        hanging.append(socket.create_connection(("127.0.0.1", port)))
        hanging[-1].sendall(start)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: fetch(f"{url}/v1/predict", [], [good]), range(60)))
    expected = detector.predict(picture(48, 48, 3))["probability"]
    assert {status for status, _ in answers} == {200}
    for _, body in answers:
        (answer,) = json.loads(body)
        assert answer["image"] == "a.png"
        assert answer["probability"] == pytest.approx(expected, abs=1e-5)
    for connection in hanging:  # those that sent half are told, the others hung up on
        connection.settimeout(20)
        said = connection.recv(10_000)
        assert said == b"" or b" 408 " in said.split(b"\r\n")[0]
        connection.close()
    raw = socket.create_connection(("127.0.0.1", port), 20)
    raw.sendall(b"nonsense\r\n\r\n")
    assert b" 400 " in raw.recv(1000)
    raw.close()
    hostile = [(name, content) for name, content in bad_contents() if len(content) < 1e6]
    codes = {name: fetch(f"{url}/v1/predict", [], [("files", name, content)])[0] for name, content in hostile}
    assert set(codes.values()) == {415}, codes
    assert fetch(f"{url}/gradio_api/file=/etc/passwd")[0] in (403, 404)
    assert fetch(f"{url}/gradio_api/file={detector.path}")[0] in (403, 404)
    assert json.loads(fetch(f"{url}/health")[1]) == {"status": "ok", "waiting": 0}
    assert process.poll() is None
    assert {p.name for p in folder.iterdir()} <= {"tmp", "feedback"}
    assert [p.name for p in temporary.iterdir() if p != private] == []
    assert service.files_in(private) == []


@needs_gradio
def test_the_service_that_is_open_to_all_forgets_pictures_in_time_slow(tmp_path):
    patients_model(tmp_path / "m.pt")
    options = [
        "--model",
        "m.pt",
        "--host",
        "0.0.0.0",
        "--open",
        "--keep-minutes",
        0.05,
        "--feedback",
        "told",
        "--device",
        "cpu",
    ]
    with started(tmp_path, *options) as (url, _, _, temporary):
        local = url.replace("0.0.0.0", "127.0.0.1")
        (private,) = (p for p in temporary.iterdir() if p.name.startswith("minicadx"))
        status, paths = fetch(f"{local}/gradio_api/upload", [], [("files", "../../a.png", as_png(picture()))])
        (path,) = json.loads(paths)
        assert (status, Path(path).name, private in Path(path).parents) == (200, "a.png", True)
        deadline = time.time() + 20
        while Path(path).exists():
            assert time.time() < deadline
            time.sleep(0.2)
        request = urllib.request.Request(f"{local}/v1/model", headers={"Host": "another.example"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.loads(response.read())["classes"] == ["a", "b", "c"]


def bad_contents():
    """(name, bytes) that are no picture, or one that would fill the memory."""
    png = as_png(picture(48, 48))
    yield "empty.png", b""
    yield "text.png", b"<script>alert(1)</script>"
    yield "half.png", png[: len(png) // 2]
    yield "flipped.png", png[:40] + bytes(b ^ 255 for b in png[40:60]) + png[60:]
    yield "eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    yield "huge.png", buffer.getvalue()
    yield "large.png", as_png(Image.new("RGB", (1000, 501)))
    yield "svg.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    yield "cut.dcm", bytes(128) + b"DICM" + bytes(50)
    yield "zip.dcm", b"PK\x03\x04" + bytes(100)


def open_browser(folder, width=1300):
    """Headless Chromium that logs what it asks the network for."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--window-size={width},1900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


class Surfer:
    """What a person does with the page, by CSS selectors."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        self.wait(lambda: self.all(selector), selector)
        return self.all(selector)[0]

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector)

    def wait(self, condition, what="", seconds=60):
        deadline = time.time() + seconds
        while not condition():
            assert time.time() < deadline, f"{what}: {self.text('body')}"
            time.sleep(0.1)

    def settled(self, selector, seconds=2):
        """The picture of an element, when it has been the same for so long."""
        script, seen = "return document.querySelector(arguments[0])?.src", [None, 0]

        def still():
            now = self.driver.execute_script(script, selector)
            seen[:] = [now, seen[1] if now == seen[0] else time.time()]
            return now and time.time() - seen[1] > seconds

        self.wait(still, selector)
        return seen[0]

    def click(self, selector):
        self.driver.execute_script("arguments[0].click()", self.find(selector))

    def asked(self):
        """All URLs that the browser has asked for."""
        log = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"}


@needs_gradio
@needs_browser
def test_a_person_uses_the_page_slow(page, detector, tmp_path):
    from selenium.webdriver import ActionChains

    url, process, folder, _ = page
    images = {f"{name} & co.png": picture(120, 90, seed) for name, seed in (("a", 3), ("b", 4), ("c", 5))}
    for name, image in images.items():
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    with contextlib.closing(open_browser(tmp_path / "downloads")) as driver:
        driver.close = driver.quit
        person = Surfer(driver)
        driver.get(url)
        files = "\n".join(str(tmp_path / name) for name in (*images, "notes.txt"))
        person.find("#files input[type=file]").send_keys(files)
        person.wait(lambda: "p(malignant)" in person.text("#answer") and len(person.all("#gallery button")) == 4)
        answers = {name: detector.predict(image.convert("L")) for name, image in images.items()}
        order = sorted(answers, key=lambda name: -answers[name]["probability"])
        assert order[0] in person.text("#answer")
        for key in (f"{answers[order[0]]['probability']:.3f}", f"threshold {detector.info['threshold']:.3f}"):
            assert key in person.text("#answer")
        person.wait(lambda: person.all("#drawn img") and person.all("#plain img"))
        first = person.find("#drawn img").get_attribute("src")
        person.driver.execute_script("arguments[0].click()", person.all("#gallery button")[2])
        person.wait(
            lambda: order[2] in person.text("#answer") and person.find("#drawn img").get_attribute("src") != first
        )
        second = person.settled("#drawn img")  # first box and outline alone, then the map
        person.find("#method input").click()

        def named(start):
            return [o for o in person.all("[role=option]") if o.text.strip("✓ \n").startswith(start)]

        person.wait(lambda: named("gradcam:"))
        named("gradcam:")[0].click()
        person.wait(lambda: person.find("#drawn img").get_attribute("src") != second, "another map")
        person.click("#csv")
        person.wait(lambda: (tmp_path / "downloads" / "answers.csv").exists())
        with open(tmp_path / "downloads" / "answers.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [*order, "notes.txt"]
        assert float(rows[0]["probability"]) == pytest.approx(answers[order[0]]["probability"], abs=1e-5)
        person.click("#teach button")
        person.wait(lambda: person.all("#editor canvas"))
        time.sleep(2)  # the picture comes up
        canvas = person.find("#editor canvas")
        strokes = (
            ActionChains(driver)
            .scroll_to_element(canvas)
            .move_to_element_with_offset(canvas, -40, -30)
            .click_and_hold()
        )
        for x, y in ((80, 0), (0, 60), (-80, 0), (0, -60)):
            strokes = strokes.move_by_offset(x, y)
        strokes.release().perform()
        person.click("#send")
        person.wait(lambda: "say what it is" in person.text("body"))
        person.click("#label label:nth-of-type(2) input")
        person.find("#who textarea, #who input").send_keys("Dr A")
        person.find("#beside-box textarea, #beside-box input").send_keys("1 2 30 20")
        person.click("#send")
        person.wait(lambda: "1 in all" in person.text("#said"))
        driver.get(f"{url}/docs")  # its forms ask, too
        person.find("form input[type=file]").send_keys(str(tmp_path / order[0]))
        person.click("form button")
        person.wait(lambda: len(driver.window_handles) == 2)
        driver.switch_to.window(driver.window_handles[1])
        person.wait(lambda: '"prediction":' in person.text("body"))
        assert {u.split("/")[2] for u in person.asked() if u.startswith(("http", "ws"))} == {url[7:]}
        with open(folder / "feedback" / "feedback.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        assert (row["label"], row["who"], row["model"]) == ("malignant", "Dr A", service.file_hash(detector.path))
        kept = Image.open(folder / "feedback" / row["image"])
        assert np.array_equal(np.asarray(kept), np.asarray(images[order[2]]))
        mask = np.asarray(Image.open(folder / "feedback" / row["mask"]))
        x0, y0, x1, y1 = data.box_of(mask > 0)
        assert x0 < 60 < x1  # around the middle, and filled
        assert y0 < 45 < y1
        assert mask[45, 60]
        assert data.box_of(np.asarray(Image.open(folder / "feedback" / row["not_this"])) > 0).tolist() == [1, 2, 30, 20]
    assert process.poll() is None


@needs_gradio
@needs_browser
def test_the_page_works_by_keyboard_alone_on_a_narrow_screen_slow(page, tmp_path):
    url, _, _, _ = page
    picture(120, 90, 3).save(tmp_path / "a.png")
    with contextlib.closing(open_browser(tmp_path)) as driver:
        driver.close = driver.quit
        size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        person = Surfer(driver)
        driver.get(url)
        person.find("#files input[type=file]").send_keys(str(tmp_path / "a.png"))
        person.wait(lambda: "p(malignant)" in person.text("#answer") and person.all("#drawn img"))
        met, active = [], lambda: driver.switch_to.active_element
        where = "return [...document.querySelectorAll('[id]')].filter(e => e.contains(document.activeElement)).map(e => e.id)"
        for _ in range(60):
            active().send_keys("\ue004")
            met += driver.execute_script(where)
            if active().tag_name == "button" and "Teach" in active().text and "send" not in met:
                active().send_keys("\ue007")  # opens it
                time.sleep(1)
        for wanted in (
            "files",
            "ask",
            "stop",
            "method",
            "opacity",
            "csv",
            "teach",
            "lesion-box",
            "label",
            "who",
            "send",
            "card",
        ):
            assert wanted in met, (wanted, met)
        driver.execute_script("window.scrollTo(0, 2000)")
        bar = driver.execute_script(
            "const r = document.querySelector('#use').getBoundingClientRect(); return [r.top, r.bottom]"
        )
        assert bar[0] == 0 < bar[1] < 120  # the line about research is always in sight
        assert models.DISCLAIMER in person.text("#use")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 400


# ---------------------------------------------------------------------------------------------------------------------
# pretrain.py


def test_nt_xent_is_the_loss_of_its_paper():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    z = [*a, *b]
    total = 0.0
    for i in range(8):  # Chen et al. 2020, eq. 1, pair by pair
        cosine = [math.exp(float(F.cosine_similarity(z[i], z[k], 0)) / 0.3) for k in range(8)]
        total -= math.log(cosine[(i + 4) % 8] / (sum(cosine) - cosine[i])) / 8
    assert float(pretrain.nt_xent(a, b, 0.3)) == pytest.approx(total, rel=1e-5)


def test_byol_moves_its_target_slowly_and_sends_it_no_gradient():
    torch.manual_seed(0)
    args = pretrain.build_parser().parse_args(["--decay", "0.9"])
    net = pretrain.BYOL(args, channels=1, normalise="image", weights="none")
    with torch.no_grad():
        for p in net.online.parameters():
            p.add_(0.1)
    before = [p.clone() for p in net.target.parameters()]
    a, b = torch.rand(2, 4, 1, 32, 32)
    net.loss(a, b).backward()
    for old, p, online in zip(before, net.target.parameters(), net.online.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, 0.9 * old + 0.1 * online.detach())
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    expected = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
    torch.testing.assert_close(pretrain.regression(x, y), expected)


@pytest.mark.parametrize(
    "name", ["small_cnn", "resnet18", "densenet121", "efficientnet_b0", "alexnet"]
)  # one of a kind
def test_a_backbone_is_saved_under_torchvisions_names_slow(tmp_path, name, capsys):
    torch.manual_seed(0)
    features, _ = backbones.build_backbone(name, 1)
    torch.save(
        backbones.torchvision_state(name, {f"features.{k}": v for k, v in features.state_dict().items()}),
        tmp_path / "b.pt",
    )
    loaded, _ = backbones.build_backbone(name, 1, str(tmp_path / "b.pt"))
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), features.eval()(x), atol=1e-4, rtol=1e-4)
    assert "not fitting" not in capsys.readouterr().out


@pytest.mark.parametrize("method", list(pretrain.METHODS))
def test_pretraining_sees_no_label_and_no_test_image_slow(tmp_path, folders, method, monkeypatch):
    options = "--batch 16 --steps-per-epoch 3 --epochs 2 --temperature 0.3 --decay 0.9 --method"
    command = ["--data", folders, *TINY, *options.split(), method, "--runs", tmp_path, "--cache", tmp_path / "c"]
    honest, epoch = load_images, train.train_epoch

    def backbone(name):
        return list(torch.load(tmp_path / name / "backbone.pt", weights_only=True).values())

    def poisoned(*args):
        images = honest(*args)
        images.labels[:] = -1
        images.pixels = images.pixels.clone()
        images.pixels[[split == "test" for split in images.splits]] = 255
        assert (images.pixels == 255).all((1, 2, 3)).sum() > 5
        return images

    def interrupted(*args):
        train.Interrupt.asked = True
        return epoch(*args)

    assert call(pretrain, *command, "--name", "a").returncode == 0
    with monkeypatch.context() as m:
        m.setattr("options.load_images", poisoned)
        assert call(pretrain, *command, "--name", "b").returncode == 0
    assert all(map(torch.equal, backbone("a"), backbone("b")))
    weights = tmp_path / "a" / "backbone.pt"
    _, said, _ = quick(tmp_path, f"--weights {weights} --nets cnet --epochs 1 --name t", data_folder=folders)
    assert "not fitting" not in said
    with monkeypatch.context() as m:  # stopped after the first epoch, it ends with the same weights
        m.setattr(train, "train_epoch", interrupted)
        assert call(pretrain, *command, "--name", "k").returncode == 130
    assert f"resuming {method} after epoch 1" in call(pretrain, "--resume", tmp_path / "k").stdout
    assert all(map(torch.equal, backbone("a"), backbone("k")))


def test_pretraining_makes_two_views_of_an_image_alike_slow(tmp_path):
    """Without a label: at which rank, among 64 new phantoms, the other view of an image comes. By chance it is 32."""
    options = "--size 32 --epochs 2 --steps-per-epoch 30 --lr 2e-2 --temperature 0.1 --name p"
    assert call(pretrain, *options.split(), "--runs", tmp_path).returncode == 0
    images = data.phantom_set(64, 32, seed=9)
    views = [augment.augment(images.pixels, 0.5, generator=torch.Generator().manual_seed(s))[0] for s in (0, 1)]
    rank = []
    for weights in ("none", str(tmp_path / "p" / "backbone.pt")):
        torch.manual_seed(0)
        net = models.CNet("small_cnn", weights=weights).eval()
        with torch.no_grad():
            a, b = (F.normalize(e - e.mean(0), dim=1) for e in map(net.embed, views))
        similarity = a @ b.T
        rank.append(float((similarity >= similarity.diag()[:, None]).sum(1).double().mean()))
    assert rank[1] < min(rank[0] / 3, 6)


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: strategies


def test_monte_carlo_dropout_is_dropout():
    torch.manual_seed(0)
    member = models.CNet("small_cnn", 2, 1, dropout=0.4).eval()
    torch.nn.init.normal_(member.head.weight)
    x = torch.rand(6, member.width)
    ours = person.sample_dropout(member, x, torch.Generator().manual_seed(0), 4000)
    with torch.no_grad():
        member.dropout.train()
        theirs = torch.stack([models.to_probabilities(member.classify(x)) for _ in range(4000)])
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.02, rtol=0)


def test_the_pool_is_seen_as_it_is_by_every_member(tmp_path):
    """No augmentation, no dropout, no batch statistics: embeddings and answers image by image."""
    model, images = small_model(roi="dnet"), data.phantom_set(9, 32)
    rows, boxes = torch.tensor([8, 0, 3]), torch.rand(9, 4).sort(1).values
    seen = judge.look_at(model, images, rows, boxes, batch=2, views=1, keep=True)
    embeddings, probabilities = seen.embeddings[0][0], seen.opinions[:, 0]
    assert embeddings.shape == (3, model.members[0].width)
    with torch.no_grad():
        for i, row in enumerate(rows.tolist()):
            pixels = images.pixels[row : row + 1]
            region = augment.crop_regions(boxes[row : row + 1], model.info["margin"])
            expected = model.members[0].embed(augment.crop(pixels, region, 32))[0]
            torch.testing.assert_close(embeddings[i], expected, atol=1e-5, rtol=1e-4)
            each = model.look(pixels, boxes[row : row + 1]).opinions[:, 0, 0]
            torch.testing.assert_close(probabilities[:, i], each, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: what the chains show


def test_labels_needed_are_read_off_the_curve():
    labels = torch.tensor([20.0, 40.0, 80.0], dtype=torch.double)
    curves = torch.tensor([[0.5, 0.7, 0.9], [0.8, 0.8, 0.8], [0.5, 0.6, 0.7], [0.5, 0.9, 0.6]], dtype=torch.double)
    needed = al_loop.labels_to_reach(curves, labels, 0.8)
    assert needed.tolist() == pytest.approx([60, 20, math.inf, 35])
    assert al_loop.area(curves, labels).tolist() == pytest.approx(
        [(0.6 * 20 + 0.8 * 40) / 60, 0.8, (0.55 * 20 + 0.65 * 40) / 60, (0.7 * 20 + 0.75 * 40) / 60]
    )


def test_the_verdict_tells_a_better_strategy_from_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20, 200, 20).double()
    rise = 0.9 - 0.3 * torch.exp(-labels / 60)
    noise = 0.02 * torch.randn(5, 1, generator=generator, dtype=torch.double)  # shared by a pair: the seed's luck
    curves = {
        "random": rise + noise,
        "better": 0.9 - 0.3 * torch.exp(-labels / 40) + noise + 0.002 * torch.randn(5, 9, generator=generator),
        "same": rise + noise + 0.01 * torch.randn(5, 9, generator=generator),
        "worse": rise - 0.05 + noise,
    }
    table = al_loop.compare(curves, torch.full((5,), 0.9, dtype=torch.double), labels)
    assert "better: better than random" in al_loop.verdict("better", table["better"])
    assert "no better than random" in al_loop.verdict("same", table["same"])
    assert "WORSE" in al_loop.verdict("worse", table["worse"])
    one = al_loop.compare({n: c[:1] for n, c in curves.items()}, torch.full((1,), 0.9, dtype=torch.double), labels)
    assert al_loop.verdict("worse", one["worse"]).endswith("shown on this data (-0.0500 (too few) of mean AUC)")
    needed = table["better"]["needed"]["0.90"]
    assert needed["low"] <= needed["ratio"] <= needed["high"] < 1
    assert needed["ratio"] == pytest.approx(40 / 60, abs=0.1)
    assert table["random"]["needed"]["0.95"]["ratio"] == 1
    assert table["worse"]["needed"]["0.99"]["labels"] is None


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: the loop, as it is called

LOOP = ["--positive", "malignant", "--views", "1", "--size", "32", "--model", "small_cnn", "--weights", "none"]
LOOP += ["--epochs", "2", "--steps-per-epoch", "1", "--batch", "8", "--lr", "3e-3"]
LOOP += ["--start", "8", "--query", "4", "--rounds", "2"]


def loop(folder, name, options, data_folder):
    """One active-learning run in this process. Returns (al.json, what it printed)."""
    where = ["--data", data_folder, "--runs", folder, "--cache", folder / "cache", "--name", name]
    result = call(al_loop, *where, *LOOP, *options.split())
    assert result.returncode == 0, result.stderr
    return json.loads((folder / name / "al.json").read_text()), result.stdout


def chains_of(report):
    """{(strategy, seed): rounds}"""
    return {(c["strategy"], c["seed"]): c["rounds"] for c in report["chains"]}


def without_times(report):
    return json.loads(re.sub(r'"seconds": [\d.]+', '"seconds": 0', json.dumps(report)))


def test_the_loop_reports_every_round_of_every_strategy_slow(tmp_path, folders):
    report, said = loop(tmp_path, "a", "--strategies all --repeats 2 --epochs 1", folders)
    assert report["labels"] == [8, 12, 16]
    images, chains = quiet_load(folders, 32, positive="malignant"), chains_of(report)
    pool = {images.names[i] for i in images.rows("train").tolist()}
    assert set(chains) == {(s, r) for s in [*al_loop.STRATEGIES, "all"] for r in (0, 1)}
    for (strategy, seed), rounds in chains.items():
        picked = [name for r in rounds for name in r["picks"]]
        assert len(set(picked)) == len(picked) == rounds[-1]["labels"]
        assert set(picked) <= pool  # never the test split
        if strategy != "all":
            for key in ("picks", "auc"):  # the same start set, and the same training on it
                assert rounds[0][key] == chains["random", seed][0][key]
    assert chains["random", 0][0]["picks"] != chains["random", 1][0]["picks"]
    assert len(chains["all", 0][0]["picks"]) == len(pool)
    assert set(report["table"]) == set(al_loop.STRATEGIES)
    assert len(report["words"]) == len(al_loop.STRATEGIES) - 1
    assert "labels needed" in said
    assert Image.open(tmp_path / "a" / "curves.png").size == (1040, 40 + len(al_loop.STRATEGIES) * 400 + 24)
    assert all("iou" in r for rounds in chains.values() for r in rounds)


def test_the_labels_of_the_pool_stay_hidden_until_they_are_bought_slow(tmp_path, folders, monkeypatch):
    """Every label and box that was never bought is changed: not one pick and not one result may differ."""
    options = "--committee 2 --distill pool --epochs 1 --strategies coreset,badge,committee"
    first = chains_of(without_times(loop(tmp_path, "a", options, folders)[0]))
    training, honest, seen = train.train_model, load_images, set()

    def watched(images, rows, *more, **options):
        known = torch.isin(torch.arange(len(images)), rows)
        assert (images.labels[~known] == -1).all()
        assert images.boxes[~known].isnan().all()
        assert not images.masks[~known].any()
        assert not images.outlined[~known].any()
        seen.add(int(known.sum()))
        return training(images, rows, *more, **options)

    def poisoned(args, log=print):
        images = honest(args, log)
        bought = {n for (strategy, _), rounds in first.items() if strategy != "all" for r in rounds for n in r["picks"]}
        rest = [i for i in images.rows("train").tolist() if images.names[i] not in bought]
        assert rest
        images.labels[rest] = 1 - images.labels[rest]
        images.boxes[rest] = torch.tensor([0.0, 0.0, 0.1, 0.1])
        return images

    monkeypatch.setattr(train, "train_model", watched)
    monkeypatch.setattr("options.load_images", poisoned)
    second = chains_of(without_times(loop(tmp_path, "b", options, folders)[0]))
    assert second.pop(("all", 0)) != first.pop(("all", 0))  # where the labels are bought, they count
    assert second == first
    assert {8, 12, 16} < seen


def test_a_killed_loop_ends_with_the_same_result_slow(tmp_path, folders):
    options = "--strategies coreset --distill labelled --warm-start"
    whole, _ = loop(tmp_path, "whole", options, folders)
    command = [HERE / "al_loop.py", "--data", folders, *LOOP, *options.split(), "--runs", tmp_path, "--name", "killed"]
    command = [*command, "--cache", tmp_path / "cache"]
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if re.match(r"coreset +seed 0 +12 labels", line):
                process.kill()
                break
    assert not (tmp_path / "killed" / "al.json").exists()
    result = call(al_loop, "--resume", tmp_path / "killed")
    assert result.returncode == 0, result.stderr
    assert " 8 labels" not in result.stdout  # what was done is not done again
    resumed = json.loads((tmp_path / "killed" / "al.json").read_text())
    assert without_times(resumed["chains"]) == without_times(whole["chains"])


def test_workers_give_the_result_of_one_slow(tmp_path, folders):
    options = "--strategies entropy --nets cnet"
    one, two = (chains_of(loop(tmp_path, n, f"{options} --workers {n}", folders)[0]) for n in "12")
    assert set(one) == set(two) == {(s, 0) for s in ("all", "random", "entropy")}
    for strategy in ("all", "random"):
        assert [r["picks"] for r in one[strategy, 0]] == [r["picks"] for r in two[strategy, 0]]


def test_warm_start_and_cold_start_slow(tmp_path, folders):
    options = "--strategies random --nets cnet"
    cold, warm, by_chance = (
        chains_of(loop(tmp_path, name, f"{options} {more}", folders)[0])["random", 0]
        for name, more in [
            ("cold", "--start-by typiclust --ignore-groups"),
            ("warm", "--start-by typiclust --ignore-groups --warm-start"),
            ("chance", ""),
        ]
    )
    assert cold[0]["picks"] == warm[0]["picks"] != by_chance[0]["picks"]
    assert cold[0]["auc"] == warm[0]["auc"]
    assert [r["auc"] for r in cold[1:]] != [r["auc"] for r in warm[1:]]


def test_a_run_is_compared_with_another_seed_by_seed_slow(tmp_path, folders):
    options = "--strategies coreset --repeats 2 --nets cnet"
    plain, _ = loop(tmp_path, "plain", options, folders)
    other, _ = loop(tmp_path, "d", f"{options} --distill pool --alpha 0.1", folders)
    said = call(al_loop, "--resume", tmp_path / "d", "--against", tmp_path / "plain").stdout  # of two finished runs
    report = json.loads((tmp_path / "d" / "al.json").read_text())
    assert report["chains"] == other["chains"]
    gains = []
    for seed in (0, 1):  # trapezoids over 8, 12, 16 labels
        a, b = ([r["auc"] for r in chains_of(some)["coreset", seed]] for some in (other, plain))
        gains.append(sum(w * (x - y) for w, x, y in zip((0.25, 0.5, 0.25), a, b, strict=True)))
    assert report["against"]["coreset"]["gain"] == pytest.approx(sum(gains) / 2)
    assert set(report["against"]) == {"random", "coreset"}
    assert "coreset: mean AUC against its own in the other run" in said
    assert "intervals and p: over seeds, on one split" in said  # 31
    before = set(tmp_path.iterdir())
    for against, wrong, why in (
        ("nowhere", "", "no al.json there"),
        ("plain", "--query 3", "other numbers of labels"),
        ("plain", "--seed 7", "no seed in common"),
        ("plain", "--drop-class normal", "other classes"),
        ("plain", "--nets dnet", "no C-Net"),
    ):
        options = ["--nets", "cnet", "--against", tmp_path / against, *wrong.split(), "--runs", tmp_path]
        assert why in error_of(call(al_loop, "--data", folders, *LOOP, *options, "--cache", tmp_path / "cache"))
    assert set(tmp_path.iterdir()) == before  # nothing was begun


def test_what_the_loop_refuses(folders):
    for options, why in [
        ("--strategies coreset,luck", "--strategies luck: no such strategy"),
        ("--start 500", "more than the pool"),
        ("--query 0", "--query: 0: must lie in"),
        ("--committee 1", "--committee: 1: must lie in"),
        ("--folds 3", "--folds"),
        ("--strategies bald --dropout 0", "--dropout above 0"),
    ]:
        assert why in error_of(call(al_loop, "--data", folders, *LOOP, *options.split()))


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: a person in the loop


@pytest.fixture(scope="module")
def helper(tmp_path_factory, folders):
    """A small model of `folders`, and a pool of new images."""
    folder = tmp_path_factory.mktemp("helper")
    quick(folder, "--positive", "malignant", "--name", "m", "--lr", "1e-2", data_folder=folders)
    pool = folder / "pool"
    pool.mkdir()
    for i in range(14):
        image = picture(70, 50, 1000 + i)
        ImageDraw.Draw(image).ellipse([20, 10, 44, 34], fill=250 if i % 2 else 5)
        image.save(pool / f"new {i}.png")
    Image.open(pool / "new 3.png").save(pool / "copy of 3.png")
    Image.open(folders / "benign" / "benign (1).png").save(pool / "old.png")
    return folder


def suggest(helper, out, *options):
    paths = ["--model", helper / "m", "--pool", helper / "pool", "--out", out, "--cache", helper / "cache"]
    return call(al_loop, "suggest", *paths, *options)


def suggestion(helper, out, *options):
    result = suggest(helper, out, "--query", "5", "--device", "cpu", "--show-guess", *options)
    assert result.returncode == 0, result.stderr
    return list(csv.DictReader((out / "to_label.csv").read_text().splitlines()))


@pytest.mark.parametrize("strategy", list(al_loop.STRATEGIES))
def test_suggest_lists_what_to_label_slow(tmp_path, helper, folders, strategy):
    asked = ["--strategy", strategy]
    if strategy == "committee":
        assert "a committee needs members" in error_of(suggest(helper, tmp_path, "--query", "3", *asked))
        return
    rows = suggestion(helper, tmp_path / "out", *asked, "--seed", "4", "--labelled", folders)
    names = [Path(r["image"]).name for r in rows]
    assert len(set(names)) == 5
    assert "old.png" not in names  # shows what a labelled image shows
    assert not {"new 3.png", "copy of 3.png"} <= set(names)
    detector = infer.BreastCancerDetector(helper / "m" / "model.pt", "cpu")
    for number, row in enumerate(rows, 1):
        answer = detector.predict(row["image"])
        assert row["number"] == str(number)
        assert row["suggested_label"] == answer["prediction"]
        assert float(row["probability"]) == pytest.approx(answer["probability"], abs=6e-4)
        assert [float(v) for v in row["suggested_box"].split()] == pytest.approx(answer["box"] or [], abs=0.51)
        assert row["label"] == row["box"] == ""
    assert Image.open(tmp_path / "out" / "to_label.png").width > 800


def fill_in(path, rows, **columns):
    """Write a person's answers: the truth (bright is malignant), and a box for every other image."""
    rows = [dict(r) for r in rows]
    for i, row in enumerate(rows):
        bright = np.asarray(Image.open(row["image"]))[22, 32] > 128
        row["label"] = "malignant" if bright else "Benign"  # a part of "benign+normal", in any case
        row["box"] = "20 10 45 35" if i % 2 else ""
        for name, values in columns.items():
            row[name] = values.get(i, row[name])
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, person.HEADER)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_learn_trains_with_the_answers_and_says_what_changed_slow(tmp_path, helper, folders):
    rows = suggestion(helper, tmp_path / "out")
    answers = fill_in(tmp_path / "out" / "to_label.csv", rows, label={0: ""}, box={0: ""})
    written = answers.read_bytes()
    where = ["--data", folders, "--runs", tmp_path, "--cache", tmp_path / "c", "--name", "l"]
    result = call(al_loop, "learn", "--labels", answers, "--partial", *where, *TINY, "--positive", "malignant")
    assert result.returncode == 0, result.stderr
    assert answers.read_bytes() == written
    change = json.loads((tmp_path / "l" / "change.json").read_text())
    before, after = (torch.load(tmp_path / "l" / part / "test.pt", weights_only=True) for part in ("before", "after"))
    assert torch.equal(before["rows"], after["rows"])
    images = quiet_load(folders, 32, positive="malignant")
    assert before["rows"].tolist() == images.rows("test").tolist()
    area = [float(metrics.evaluate(r["probabilities"], images.labels[r["rows"]])["auc"]) for r in (before, after)]
    assert change["test"]["auc"]["value"] == pytest.approx(area[1] - area[0])
    assert change["test"]["auc"]["low"] <= change["test"]["auc"]["value"] <= change["test"]["auc"]["high"]
    assert change["righted"] <= change["flipped"]
    count = int(re.search(r"(\d+) answers", result.stdout)[1])
    assert f"before: {len(images.rows('train'))} train," in result.stdout
    assert f"after: {len(images.rows('train')) + count} train," in result.stdout
    assert models.load(tmp_path / "l" / "after").info["classes"] == ["benign+normal", "malignant"]
    assert "may have answers" in error_of(suggest(helper, answers.parent))
    assert answers.read_bytes() == written
    # what was answered is not asked again
    more = suggestion(helper, tmp_path / "more", "--labelled", answers)
    assert not {r["image"] for r in more} & {r["image"] for r in rows[1:]}


def test_learn_names_the_row_that_it_can_not_use(tmp_path, helper, folders):
    rows, answers = suggestion(helper, tmp_path / "out"), tmp_path / "answers.csv"
    base = ["--data", folders, "--positive", "malignant", *TINY, "--runs", tmp_path, "--cache", tmp_path / "c"]
    for columns, why in [
        ({"label": {2: ""}, "box": {2: ""}}, "no label in 1 rows (4)"),
        ({"label": {1: ""}}, "row 3"),
        ({"label": {0: "cancer?"}}, "row 2"),
        ({"image": {4: str(tmp_path / "gone.png")}}, "row 6 (gone.png): the image is not there any more"),
        ({"box": {3: "1 2 3"}}, "line 5: box '1 2 3'"),
    ]:
        fill_in(answers, rows, **columns)
        assert why in error_of(call(al_loop, "learn", "--labels", answers, *base))
    fill_in(answers, rows, label={2: ""}, box={2: ""})
    classes = quiet_load(folders, 32, positive="malignant").classes
    assert len(person.read_answers(answers, classes, partial=True)) == 4
    assert "give the filled-in to_label.csv" in error_of(call(al_loop, "learn", *base))
    said = error_of(call(al_loop, "learn", "--labels", answers, *base, "--ensemble", "x,y", "--partial", "--name", "x"))
    assert "no such network" in said
    assert not (tmp_path / "x").exists()


def test_an_answer_that_shows_a_test_image_is_left_out(tmp_path, folders, capsys):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--cache", str(tmp_path)])
    test, known = (images.names[int(images.rows(s)[0])] for s in ("test", "train"))
    Image.open(test).save(tmp_path / "copy.png")
    picture(70, 50, 777).save(tmp_path / "new.png")
    entries = [readers.Entry(str(p), str(p), 1) for p in (tmp_path / "copy.png", known, tmp_path / "new.png")]
    more, rows = person.add_answers(images, entries, args)
    assert [more.names[i] for i in rows] == [str(tmp_path / "new.png")]
    assert more.labels[rows].tolist() == [1]
    said = capsys.readouterr().out
    assert "copy.png: it shows the same as an image of the validation or test split" in said
    assert f"{known}: it has a label in --data" in said


def grouped_set(folder):
    """A CSV with names relative to it, two images a patient, a split of its own; and 3 more images of patient `v`."""
    lines = ["image,label,group,split"]
    for i in range(24):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        picture(60, 40, 300 + i).save(folder / "pictures" / f"{i}.png")
        split = "test" if i < 4 else "val" if i < 8 else "train"
        lines += [f"pictures/{i}.png,{'ab'[i % 2]},p{i // 4},{split}"]
    (folder / "set.csv").write_text("\n".join(lines) + "\n")
    (folder / "pool.csv").write_text("image,group\n" + "".join(f"pictures/more{i}.png,p{i}\n" for i in range(6)))
    for i in range(6):
        picture(60, 40, 400 + i).save(folder / "pictures" / f"more{i}.png")
    return folder / "set.csv", folder / "pool.csv"


def test_answers_keep_their_patients_and_their_files(tmp_path, capsys, monkeypatch):  # 27
    (tmp_path / "deep").mkdir()
    source, pool = grouped_set(tmp_path / "deep")
    monkeypatch.chdir(tmp_path)  # the names in the tables are relative to the tables, not to here
    images = quiet_load(source, 32)
    assert all(Path(name).is_file() for name in images.names)
    out = tmp_path / "out"
    models.save(tmp_path / "m.pt", small_model(("a", "b")))
    options = ["--model", tmp_path / "m.pt", "--strategy", "random", "--cache", tmp_path / "c", "--out", out]
    result = call(al_loop, "suggest", "--pool", pool, "--query", "6", *options)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((out / "to_label.csv").read_text().splitlines()))
    assert sorted(row["group"] for row in rows) == [f"p{i}" for i in range(6)]
    assert all(Path(row["image"]).is_file() for row in rows)
    rows.append({**rows[0], "image": str((source.parent / "pictures" / "20.png").resolve()), "group": "p5"})
    with open(tmp_path / "answers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, person.HEADER)
        writer.writeheader()
        writer.writerows({**row, "label": "a"} for row in rows)
    entries = person.read_answers(tmp_path / "answers.csv", images.classes)
    args = parse(["--data", str(source), *TINY, "--cache", str(tmp_path / "c")])
    more, rows = person.add_answers(images, entries, args)
    said = capsys.readouterr().out
    assert "2 answers are left out: their groups have images in the validation or test split" in said  # p0 and p1
    assert "20.png: it has a label in --data" in said
    assert sorted(more.group_names[i] for i in rows.tolist()) == ["p2", "p3", "p4", "p5"]
    for i in rows.tolist():  # an answered patient is the one of --data
        family = torch.nonzero(more.groups == more.groups[i])[:, 0].tolist()
        assert {more.group_names[k] for k in family} == {more.group_names[i]}
        assert min(family) < 24
    np.savez(tmp_path / "p.npz", train_images=np.zeros((3, 28, 28), np.uint8), train_labels=[-1] * 3)
    options[-1] = tmp_path / "elsewhere"
    assert "its images are no files" in error_of(call(al_loop, "suggest", "--pool", tmp_path / "p.npz", *options))


def test_two_sets_share_their_patients_and_no_look_alike_patients():  # 27
    a, b = data.phantom_set(6, 32, seed=1), data.phantom_set(6, 32, seed=2)
    a.group_names, b.group_names = ["p", "q", "", "", "r", ""], ["", "p", "s", "", "t", "t"]
    a.thumbnails[1] = a.thumbnails[0]  # two patients that look alike, said the source of both
    b.thumbnails[2] = a.thumbnails[4]  # over two sources it may be one under two names
    b.thumbnails[3] = a.thumbnails[5]
    groups = data.join(a, b).groups.tolist()
    assert groups[0] == groups[7] != groups[1]
    assert groups[4] == groups[8]
    assert groups[5] == groups[9]
    assert groups[10] == groups[11]
    assert len(set(groups)) == 8


def test_lines_are_counted_as_the_file_has_them(tmp_path):  # after blank lines too
    picture().save(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text("image,label,box\n\n\n0.png,a,\n\n0.png,a,1 2 3\n")
    refused("line 6: box '1 2 3'", quiet_load, tmp_path / "t.csv", 32)
    (tmp_path / "t.csv").write_text("image,label\n\n0.png,a\n\n\n0.png,\n")
    refused(r"no label in 1 rows \(6\)", person.read_answers, tmp_path / "t.csv", ["a", "b"])
    (tmp_path / "t.csv").write_text("image,label\n\n0.png,a\n\n\n0.png,c\n")
    refused("row 6", person.read_answers, tmp_path / "t.csv", ["a", "b"])


# ---------------------------------------------------------------------------------------------------------------------
# heads.py, transfer.py: a last layer learnt on frozen embeddings, and who lives on it


def penalised(head, start, x, targets, strength, weights):
    """What heads.fit minimises, written down in D dimensions."""
    (weight, bias), (old, old_bias) = head, start
    mean = x.mean(0)
    scale = (x - mean).square().sum(1).mean().sqrt()
    change = (weight - old) * scale, bias - old_bias + (weight - old) @ mean
    logits = x @ weight.T + bias
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
    cross = -(weights[:, None] * targets * logits.log_softmax(1)).sum()
    return cross + strength / 2 * sum(c.square().sum() for c in change)


@pytest.mark.parametrize(("classes", "n", "d"), [(2, 30, 80), (2, 90, 20), (5, 40, 60), (2, 3, 7)])
def test_a_head_is_where_the_gradient_of_the_full_problem_is_zero(classes, n, d):
    torch.manual_seed(n)
    outputs = 1 if classes == 2 else classes
    x, strength = torch.randn(n, d, dtype=torch.double) * 3 + 1, 0.3
    targets, weights = torch.rand(n, classes, dtype=torch.double).softmax(1), torch.rand(n, dtype=torch.double) + 0.1
    start = (torch.randn(outputs, d, dtype=torch.double) / d, torch.randn(outputs, dtype=torch.double))
    head = heads.fit(x, targets, start, classes, strength, weights)
    free = [t.clone().requires_grad_() for t in head]
    gradients = torch.autograd.grad(penalised(free, start, x, targets, strength, weights), free)
    assert max(float(g.abs().max()) for g in gradients) < 1e-3 * n
    other = torch.randn(n, d, dtype=torch.double)  # of another network, in the same call
    both = heads.fit(torch.stack([other, x]), targets, [torch.stack([s, s]) for s in start], classes, strength, weights)
    torch.testing.assert_close([part[1] for part in both], list(head), atol=1e-3, rtol=1e-3)
    best = float(penalised(head, start, x, targets, strength, weights))
    for _ in range(20):
        other = [t + 0.01 * torch.randn_like(t) for t in head]
        assert float(penalised(other, start, x, targets, strength, weights)) > best


def test_a_head_keeps_to_what_it_starts_from_as_strongly_as_is_said():
    torch.manual_seed(0)
    x, labels = torch.randn(40, 30), torch.arange(40) % 2
    start = (torch.randn(1, 30), torch.randn(1))
    kept = heads.fit(x, labels, start, strength=1e7)
    torch.testing.assert_close(kept[0], start[0].double(), atol=1e-4, rtol=0)
    moved = [float((heads.fit(x, labels, start, strength=s)[0] - start[0]).norm()) for s in (10, 1, 0.1)]
    assert moved == sorted(moved)
    one = heads.fit(x, labels)
    again = heads.fit(x.repeat(3, 1), labels.repeat(3), weights=torch.full((120,), 1 / 3))  # the same, thrice a third
    torch.testing.assert_close(one[0], again[0], atol=1e-4, rtol=0)
    hard = heads.fit(x, F.one_hot(labels, 2))
    torch.testing.assert_close(one[0], hard[0])
    copies = heads.fit(x[:1].repeat(8, 1), torch.arange(8) % 2)  # one picture of both labels
    torch.testing.assert_close(heads.probabilities(x[:1], copies)[0, 1], torch.tensor(0.5, dtype=torch.double))
    for bad in ((x, labels[:-1]), (x[:0], labels[:0]), (x * math.nan, labels), (x, F.one_hot(labels, 3))):
        with pytest.raises(ValueError, match=r"embeddings|strength"):
            heads.fit(*bad)


def test_copies_of_one_picture_teach_nothing_about_others():
    """Their embeddings differ by rounding alone; made as long as those of pictures, that would answer 0 or 1 everywhere."""
    torch.manual_seed(0)
    x, start = torch.rand(50, 300), (torch.randn(1, 300) / 30, torch.zeros(1))
    copies = x[:1] * (1 + 1e-7 * torch.randn(5, 300))
    p = heads.probabilities(x, heads.fit(copies, torch.tensor([0, 1, 0, 1, 1]), start))
    assert (p > 0.01).all()


def test_margins_lead_and_clusters_share_the_picks():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.9, 0.1, 0.0], [0.34, 0.33, 0.33]])
    torch.testing.assert_close(query.margins(p), torch.tensor([0.2, 0.05, 0.8, 0.01]))
    context = query.Context(None, p, torch.tensor([3]), torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0))
    assert query.query_margin(context, 2).tolist() == [1, 0]
    x = torch.cat([torch.randn(30, 8) * 0.01 + torch.eye(8)[0], torch.randn(30, 8) * 0.01 + torch.eye(8)[1]])
    lead = torch.cat([torch.linspace(0.01, 0.02, 30), torch.linspace(0.03, 0.04, 30)])  # the first thirty are less sure
    p = torch.stack([0.5 - lead / 2, 0.5 + lead / 2], 1)
    context = query.Context(x, p, torch.empty(0, dtype=torch.long), torch.arange(60), torch.Generator().manual_seed(0))
    assert (query.query_margin(context, 4) < 30).all()
    picks = query.query_cluster_margin(context, 6)
    assert len(picks.unique()) == 6
    assert (picks >= 30).sum() >= 2


def test_laplace_picks_what_settles_the_pool_most_by_brute_force():
    """Against the posterior's covariance as a matrix of D x D, inverted anew for every candidate and every pick."""
    torch.manual_seed(1)
    x, p = torch.randn(14, 5), torch.rand(14).clamp(0.05, 0.95)
    labelled, free, pull = torch.tensor([0, 5, 7]), torch.tensor([1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13]), 0.7
    context = query.Context(x, torch.stack([1 - p, p], 1), labelled, free, torch.Generator().manual_seed(0), pull=pull)
    picks = query.query_laplace(context, 4).tolist()
    known = x[labelled]
    f = (x - known.mean(0)) / (known - known.mean(0)).square().sum(1).mean().sqrt()
    f, slope = torch.cat([f, torch.ones(14, 1)], 1).double(), (p * (1 - p)).double()

    def unsettled(told):
        precision = pull * torch.eye(6, dtype=torch.double) + (f[told].T * slope[told]) @ f[told]
        return float((slope[free].square() * (f[free] @ precision.inverse() * f[free]).sum(1)).sum())

    told, expected = labelled.tolist(), []
    for _ in range(4):
        best = min((i for i in free.tolist() if i not in expected), key=lambda i: unsettled([*told, i]))
        told, expected = [*told, best], [*expected, best]
    assert picks == expected
    nothing = query.Context(x, torch.stack([1 - p, p], 1), labelled[:0], free, torch.Generator().manual_seed(0))
    assert len(set(query.query_laplace(nothing, 11).tolist())) == 11


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A run on phantoms, and a CSV of other phantoms with patients, two images each: another hospital."""
    folder = tmp_path_factory.mktemp("elsewhere")
    options = ["--size", "32", "--epochs", "3", "--steps-per-epoch", "8", "--lr", "3e-3", "--views", "1"]
    assert call(train, *options, "--runs", folder, "--name", "home").returncode == 0
    pixels, labels, _ = phantoms.phantoms(120, 32, seed=77)
    lines = ["image,label,group"]
    for i, (p, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        Image.fromarray(p[0].numpy()).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{['benign', 'malignant'][label]},p{i // 2}")
    (folder / "there.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_head_learnt_by_train_is_the_one_that_fit_gives_slow(tmp_path, elsewhere):
    where = ["--runs", tmp_path, "--cache", tmp_path / "c", "--data", elsewhere / "there.csv", "--views", "1"]
    result = call(train, *where, "--from", elsewhere / "home", "--learn", "head", "--pull", "0.1", "--name", "h")
    assert result.returncode == 0, result.stderr
    home, model = models.load(elsewhere / "home"), models.load(tmp_path / "h")
    images = quiet_load(elsewhere / "there.csv", 32)
    rows = images.rows("train")
    seen = judge.look_at(home, images, rows, keep=True)
    weight, bias = heads.fit(seen.embeddings[0][0], images.labels[rows], transfer.heads_of(home)[0])
    torch.testing.assert_close(model.members[0].head.weight.double(), weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.members[0].head.bias.double(), bias, atol=1e-4, rtol=1e-3)
    for name, value in home.members[0].state_dict().items():
        assert name.startswith("head.") or torch.equal(value, model.members[0].state_dict()[name])
    assert model.info["made"]["from"] == str(elsewhere / "home")
    assert not torch.isin(images.take(images.rows("test")).pictures(), model.info["seen"]["train"]).any()
    # all of it: the first epoch begins where the other ended, at a learning rate of nothing it stays there
    fine = ["--epochs", "1", "--steps-per-epoch", "2", "--lr", "1e-12", "--ema", "0"]
    assert call(train, *where, "--from", elsewhere / "home", *fine, "--name", "f").returncode == 0
    fine = models.load(tmp_path / "f")
    torch.testing.assert_close(fine.members[0].head.weight, home.members[0].head.weight, atol=1e-6, rtol=0)
    assert fine.info["made"]["from"] == str(elsewhere / "home")
    for later in (model, fine):  # what it came from has not forgotten what it met
        assert torch.isin(home.info["seen"]["train"], later.info["seen"]["train"]).all()
    # its trunk: a model file is weights like any others
    assert call(train, *where, "--size", "32", "--model", "small_cnn", "--weights", elsewhere / "home" / "model.pt", *fine_options(), "--name", "t").returncode == 0  # fmt: skip
    trunk = models.load(tmp_path / "t").members[0].state_dict()
    for name, value in home.members[0].state_dict().items():
        if "features" in name and value.is_floating_point() and "running" not in name:
            other = trunk.get(name, trunk.get(name.removeprefix("dnet.")))
            torch.testing.assert_close(other, value, atol=1e-6, rtol=0)
    for options, why in [
        (["--learn", "head"], "give the model whose trunk it is with --from"),
        (["--from", elsewhere / "home", "--positive", "benign"], "it knows"),
        (["--from", tmp_path / "gone"], "no such file"),
        (["--from", tmp_path / "h", "--learn", "head", "--folds", "2"], "it learnt from"),
    ]:
        assert why in error_of(call(train, *where, *options, "--name", "bad"))
    assert not (tmp_path / "bad").exists()


def fine_options():
    return ["--epochs", "1", "--steps-per-epoch", "2", "--lr", "1e-12"]


def test_the_loop_of_heads_is_a_loop_of_fits_slow(tmp_path, elsewhere):
    where = ["--runs", tmp_path, "--cache", tmp_path / "c", "--data", elsewhere / "there.csv", "--views", "1"]
    loop = ["--learn", "head", "--from", elsewhere / "home", "--query", "4", "--rounds", "3"]
    names = "random,entropy,margin,cluster_margin,laplace,coreset,badge,typiclust,bald"
    result = call(al_loop, *where, *loop, "--strategies", names, "--repeats", "2", "--name", "a")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "a" / "al.json").read_text())
    assert report["labels"] == [0, 4, 8, 12]
    images, home = quiet_load(elsewhere / "there.csv", 32), models.load(elsewhere / "home")
    assert list(report["auc"]) == ["random", *names.split(",")[1:], "all"]
    rows = images.rows("test")
    by_name = {n: i for i, n in enumerate(images.names)}
    everyone = judge.look_at(home, images, torch.arange(len(images)), keep=True).embeddings[0][0]
    for chain in report["chains"]:
        told = []
        for part in chain["rounds"]:
            told += [by_name[name] for name in part["picks"]]
            assert (
                part["labels"] == len(told) == len({images.group_names[i] for i in told}) or chain["strategy"] == "all"
            )
            head = transfer.heads_of(home)[0]
            if told:
                head = heads.fit(everyone[told], images.labels[told], head)
            p = heads.probabilities(everyone[rows], head)
            assert part["auc"] == pytest.approx(float(metrics.evaluate(p, images.labels[rows])["auc"]), abs=0.01)
    # killed and gone on with: the same; compared with itself: no difference; cold: from nothing
    kept = (tmp_path / "a" / "badge-1.json").read_bytes()
    (tmp_path / "a" / "badge-1.json").unlink()
    assert call(al_loop, "--resume", tmp_path / "a").returncode == 0
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in json.loads(text)] for text in (kept, (tmp_path / "a" / "badge-1.json").read_bytes())]  # fmt: skip
    assert strip[0] == strip[1]
    soft = [*loop, "--repeats", "2", "--strategies", "random", "--distill", "pool", "--against", tmp_path / "a"]
    result = call(al_loop, *where, *soft, "--name", "b")
    assert "random: mean AUC against its own in the other run" in result.stdout
    cold = (
        "--learn head --model small_cnn --weights none --size 32 --start 4 --query 4 --rounds 1 --repeats 2 --name cold"
    )
    assert call(al_loop, *where, *cold.split(), "--strategies", "random").returncode == 0
    assert (
        call(al_loop, *where, *loop, "--strategies", "laplace", "--redraw", "--repeats", "3", "--name", "d").returncode
        == 0
    )
    args = al_loop.parse(["--data", str(elsewhere / "there.csv"), *map(str, loop), "--redraw"])
    pools = [al_loop.divide(images, seed, args) for seed in range(3)]
    assert len({tuple(test.tolist()) for _, test in pools}) == 3
    for chain in json.loads((tmp_path / "d" / "al.json").read_text())["chains"]:
        pool, test = pools[chain["seed"]]
        assert len(pool) + len(test) == 120
        assert not set(images.groups[pool].tolist()) & set(images.groups[test].tolist())
        assert {by_name[name] for part in chain["rounds"] for name in part["picks"]} <= set(pool.tolist())
    for options, why in [
        (["--start", "0"], "--start 0 asks a model that comes from elsewhere"),
        (["--from", elsewhere / "home"], "it goes with --learn head"),
        ([*loop, "--warm-start"], "leave them out"),
        (["--redraw"], "--redraw goes with --learn head"),
        ([*loop, "--redraw", "--repeats", "2", "--against", tmp_path / "a"], "was made with --redraw"),
        ([*loop, "--strategies", "committee"], "leave them out"),
    ]:
        assert why in error_of(call(al_loop, *where, *options, "--name", "bad"))


def answer_sheet(path, folder, rows, **changed):
    """A filled-in to_label.csv of these images of `elsewhere`."""
    truth = {r["image"]: r for r in csv.DictReader((folder / "there.csv").read_text().splitlines())}
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, person.HEADER)
        table.writeheader()
        for n, i in enumerate(rows):
            one = {
                "number": n,
                "image": folder / f"{i}.png",
                "label": truth[f"{i}.png"]["label"],
                "group": f"p{i // 2}",
            }
            table.writerow({**dict.fromkeys(person.HEADER, ""), **one, **changed.get(str(i), {})})
    return path


def test_a_person_adapts_a_model_without_its_old_images_slow(tmp_path, elsewhere):
    """Three commands: suggest, (label), learn. The threshold is cross-fitted, the next suggestion asks other patients."""
    where, home = ["--runs", tmp_path, "--cache", tmp_path / "c"], elsewhere / "home"
    sheet = answer_sheet(tmp_path / "a.csv", elsewhere, range(0, 120, 2))
    result = call(al_loop, "learn", "--from", home, "--labels", sheet, *where, "--name", "l")
    assert result.returncode == 0, result.stderr
    assert "60 answers" in result.stdout
    assert "cross-fitted" in result.stdout
    change = json.loads((tmp_path / "l" / "change.json").read_text())
    assert change["test"]["auc"]["low"] <= change["test"]["auc"]["value"] <= change["test"]["auc"]["high"]
    assert "can't tell" in result.stdout or not change["test"]["auc"]["low"] <= 0 <= change["test"]["auc"]["high"]
    new, old = models.load(tmp_path / "l"), models.load(home)
    assert new.info["made"]["from"] == str(home)
    assert new.info["made"]["labels"] == 60
    images = quiet_load(elsewhere / "there.csv", 32)
    assert torch.isin(images.take(torch.arange(0, 120, 2)).pictures(), new.info["seen"]["train"]).all()
    # the out-of-fold answers, again by hand: a fold's layer has not met its labels
    args = parse(["--data", "x", "--views", "1"])
    rows = torch.arange(0, 120, 2)
    some = images.take(rows)
    _, results = transfer.learn_labels(old, some, torch.arange(60), args)
    seen = judge.look_at(old, some, torch.arange(60), keep=True).embeddings
    for r in results:
        known = torch.tensor([i for i in range(60) if i not in r["rows"].tolist()])
        layer = transfer.refit(transfer.heads_of(old), seen, known, some.labels[known])
        torch.testing.assert_close(r["opinions"], transfer.answers(layer, seen, r["rows"]), atol=1e-4, rtol=1e-3)
        assert not set(some.groups[known].tolist()) & set(some.groups[r["rows"]].tolist())
    out = tmp_path / "next"
    result = call(al_loop, "suggest", "--model", tmp_path / "l", "--pool", elsewhere / "there.csv", "--query", "5", "--out", out, "--cache", tmp_path / "c")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"learn --from {tmp_path / 'l'}" in result.stdout
    asked = {int(Path(r["image"]).stem) for r in csv.DictReader((out / "to_label.csv").read_text().splitlines())}
    assert not asked & set(range(0, 120, 2))


def test_no_label_that_a_model_has_learnt_tells_what_it_is_worth_slow(tmp_path, elsewhere):
    """Not by learning from the same file twice, nor in a second step, nor on a validation split; nor the same row twice."""
    where, home = ["--runs", tmp_path, "--cache", tmp_path / "c"], elsewhere / "home"
    sheet, step = answer_sheet(tmp_path / "a.csv", elsewhere, range(0, 80, 2)), ["--learn", "head", "--views", "1"]
    result = call(al_loop, "learn", "--from", home, "--labels", sheet, sheet, *where, "--name", "l")
    assert "40 rows name a picture again" in result.stdout
    assert "40 answers" in result.stdout
    again = call(al_loop, "learn", "--from", tmp_path / "l", "--labels", sheet, *where, "--name", "bad")
    assert "has met 40 of the 40 answered images" in error_of(again)
    opposite = answer_sheet(tmp_path / "b.csv", elsewhere, [0], **{"0": {"label": "malignant"}})
    kept = opposite.read_text()
    opposite.write_text(kept.replace("malignant", "benign") + kept.splitlines()[1] + "\n")
    assert "has two labels" in error_of(call(al_loop, "learn", "--from", home, "--labels", opposite, *where))
    said = error_of(call(al_loop, "learn", "--from", home, "--labels", sheet, *where, "--size", "48", "--epochs", "9"))
    assert "--size, --epochs mean nothing here" in said
    assert call(train, *where, "--data", elsewhere / "there.csv", "--from", home, *step, "--name", "h").returncode == 0
    first, old = models.load(tmp_path / "h").info["seen"], models.load(home).info["seen"]
    assert torch.isin(torch.cat([old["train"], old["val"]]), first["train"]).all()  # what came before is known still
    rows = list(csv.DictReader((elsewhere / "there.csv").read_text().splitlines()))
    images = quiet_load(elsewhere / "there.csv", 32)
    turned = {"train": "val", "val": "train", "test": "test"}  # it has learnt from what is now to set the threshold
    lines = [f"{elsewhere / r['image']},{r['label']},{r['group']},{turned[s]}" for r, s in zip(rows, images.splits, strict=True)]  # fmt: skip
    (tmp_path / "turned.csv").write_text("\n".join(["image,label,group,split", *lines]) + "\n")
    turned = call(train, *where, "--data", tmp_path / "turned.csv", "--from", tmp_path / "h", *step, "--name", "bad")
    assert "validation images, which are to set the threshold" in error_of(turned)
    result = call(train, *where, "--data", elsewhere / "there.csv", "--from", home, *step, "--nets", "dnet")
    assert "leave out --nets dnet" in error_of(result)
    result = call(
        train, *where, "--data", elsewhere / "there.csv", "--from", home, *step, "--size", "64", "--name", "s"
    )
    assert "of its own, not as given: --size" in result.stdout
    assert models.load(tmp_path / "s").info["size"] == 32
    swapped = {",val": ",test", ",test": ",val"}
    text = re.sub(",(val|test)$", lambda m: swapped[m[0]], (tmp_path / "turned.csv").read_text(), flags=re.M)
    (tmp_path / "turned.csv").write_text(text)
    trunk = ["--data", tmp_path / "turned.csv", "--weights", tmp_path / "h" / "model.pt", "--model", "small_cnn"]
    loop = ["--rounds", "1", "--start", "4", "--query", "2"]  # a trunk that has learnt from test images
    for script, options in ((train, []), (al_loop, loop)):
        said = error_of(call(script, *where, *trunk, "--size", "32", *options, "--name", "bad"))
        assert "--weights" in said
        assert "it learnt from" in said
    assert not (tmp_path / "bad").exists()


def test_the_pool_of_a_loop_is_that_of_its_seeds(tmp_path, elsewhere):
    where = ["--runs", tmp_path, "--cache", tmp_path / "c", "--data", elsewhere / "there.csv", "--views", "1"]
    loop = ["--learn", "head", "--from", elsewhere / "home", "--redraw", "--repeats", "2", "--strategies", "random"]
    result = call(al_loop, *where, *loop, "--rounds", "1", "--query", "90", "--name", "r")
    assert result.returncode == 0, result.stderr  # more than the 82 of the source's own split
    report = json.loads((tmp_path / "r" / "al.json").read_text())
    assert report["data"]["pool"] + report["data"]["test"] == 120
    assert report["data"]["pool"] > 90
    assert "more than the pool" in error_of(call(al_loop, *where, *loop, "--rounds", "1", "--query", "110"))


def test_patient_data_and_members_of_other_kinds_go_on_elsewhere_slow(tmp_path, elsewhere):
    where, epochs = ["--runs", tmp_path, "--cache", tmp_path / "c", "--views", "1"], fine_options()
    rows = list(csv.DictReader((elsewhere / "there.csv").read_text().splitlines()))

    def table(path, sides):
        lines = [f"{elsewhere / r['image']},{r['label']},{r['group']},{20 + i},{sides[i % len(sides)]}" for i, r in enumerate(rows)]  # fmt: skip
        path.write_text("\n".join(["image,label,group,age,side", *lines]) + "\n")
        return path

    made = call(train, *where, *epochs, "--data", table(tmp_path / "m.csv", ["left", "right"]), "--meta-columns", "age", "side", "--size", "32", "--model", "small_cnn", "--weights", "none", "--name", "m")  # fmt: skip
    assert made.returncode == 0, made.stderr
    home = models.load(tmp_path / "m")
    home.info.pop("seen")  # so that the same pictures may stand for those of another hospital
    models.save(tmp_path / "m.pt", home)
    one_side = table(tmp_path / "one.csv", ["left"])  # a level less than the model knows, in worker processes too
    result = call(train, *where, *epochs, "--data", one_side, "--from", tmp_path / "m.pt", "--folds", "2", "--workers", "2", "--name", "f")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert models.load(tmp_path / "f" / "fold1").info["meta_spec"] == home.info["meta_spec"]
    sheet = answer_sheet(tmp_path / "a.csv", elsewhere, range(0, 80, 2))
    result = call(al_loop, "learn", "--from", tmp_path / "m.pt", "--labels", sheet, *where[:4], "--name", "l")
    assert result.returncode == 0, result.stderr
    # a D-Net of another backbone than C-Net's or of the first version, and a C-Net of crops that nobody finds
    nets = {"member": models.CNet("small_cnn", 2, 1), "crops": models.CNet("small_cnn", 2, 1, roi="mask")}
    info = {"classes": ["benign", "malignant"], "size": 32, "load_size": 64, "channels": 1}
    models.save(tmp_path / "d.pt", models.Ensemble([nets["member"]], dnets=[models.DNet("resnet18", 1)], **info))
    models.save(tmp_path / "c.pt", models.Ensemble([nets["crops"]], **info))
    models.save(tmp_path / "v.pt", models.Ensemble([nets["member"]], dnets=[models.VotingDNet("small_cnn", 1)], **info))
    for name, options in (("d", epochs), ("c", ["--learn", "head"]), ("v", ["--learn", "head"])):
        result = call(
            train, *where, "--size", "32", "--from", tmp_path / f"{name}.pt", *options, "--name", f"of-{name}"
        )
        assert result.returncode == 0, result.stderr


def test_learning_from_answers_waits_for_enough_of_each_class(tmp_path, elsewhere):
    where, home = ["--runs", tmp_path, "--cache", tmp_path / "c", "--name", "l"], elsewhere / "home"
    truth = [r["label"] for r in csv.DictReader((elsewhere / "there.csv").read_text().splitlines())]
    benign = [i for i in range(0, 120, 2) if truth[i] == "benign"][:3]
    sheet = answer_sheet(tmp_path / "a.csv", elsewhere, benign)
    said = error_of(call(al_loop, "learn", "--from", home, "--labels", sheet, *where))
    assert "label 2 of benign and 5 of malignant more" in said
    answer_sheet(sheet, elsewhere, range(0, 40, 2), **{"4": {"label": ""}})
    assert "no label in 1 rows (4)" in error_of(call(al_loop, "learn", "--from", home, "--labels", sheet, *where))
    answer_sheet(sheet, elsewhere, range(0, 40, 2), **{"4": {"label": "cyst"}})
    assert "label 'cyst' is none of benign, malignant" in error_of(call(al_loop, "learn", "--from", home, "--labels", sheet, *where))  # fmt: skip
    assert "leave them out" in error_of(
        call(al_loop, "learn", "--from", home, "--labels", sheet, "--data", elsewhere, *where)
    )
    assert not (tmp_path / "l").exists()
    shutil.copy(elsewhere / "0.png", tmp_path / "twin.png")
    answer_sheet(sheet, elsewhere, range(0, 60, 2), **{"4": {"image": tmp_path / "twin.png"}})
    result = call(al_loop, "learn", "--from", home, "--labels", sheet, *where)
    assert re.search(r"0.png and .*twin.png look the same, but are of two patients", result.stdout), result.stdout
    assert (tmp_path / "l" / "model.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_benchmark_prints_ours_the_floor_and_the_ratio_slow(tmp_path):
    source = class_folders(tmp_path)
    options = ["--quick", "--runs", "1", "--device", "cpu", "--weights", "none"]
    result = call(bench, "--data", source, *options)
    assert result.returncode == 0, result.stderr
    assert "second start: 20 images" in result.stdout
    for line in ("epoch, resnet18", "Grad-CAM, mobilenet_v2", "k-center, resnet18"):
        assert re.search(rf"{line}.*ours +\d+\.\d+ s   floor +\d+\.\d+ s   ratio \d+\.\d+", result.stdout)


def test_the_benchmark_of_many_rows_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(bench, "--rows", "3000", "--pictures", "600", "--device", "cpu").stdout
    assert re.search(
        r"on a file, 3000 x 128, k = 200: ours \d+\.\d s   floor \d+ s   ratio \d+\.\d+   \(wall clock\)", said
    )
    assert re.search(r"\d+ MB beside the file of 1 MB", said)
    for step in ("first load", "second load", "an epoch", "20 to label, coreset", "20 to label, typiclust"):
        assert re.search(rf"600 pictures, {step} +\d+\.\d s of a core, +\d+\.\d s, +\d+ MB more", said), said
    assert not list(tmp_path.iterdir())


@needs_gradio
def test_the_benchmark_of_the_service_counts_answers_of_good_and_hostile_clients_slow(tmp_path):
    models.save(tmp_path / "m.pt", small_model())
    result = run(HERE / "bench.py", "--service", tmp_path / "m.pt", "--quick", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "pictures/s" in line]
    assert [line[13:26] for line in lines] == ["batches of  1", "batches of  1", "batches of 32", "batches of 32"]
    for line in lines:
        assert float(re.search(r": ([\d.]+) pictures/s", line)[1]) > 0
        assert re.search(r"codes \{200: \d+\}", line)  # whatever the others send
    assert set(re.findall(r"(\d+): \d+", lines[3].rpartition("and")[2])) <= {"413", "415"}


def test_the_benchmark_times_an_epoch_for_processes_to_share(capsys, monkeypatch):
    bench.main(["--sharing", "--quick"])
    assert float(capsys.readouterr().out) > 0
    took, asked = iter([0.8, 0.5, 1.2]), []  # two processes, two threads, one thread

    def timed(command, env, **_):
        asked.append((command[command.index("--nproc_per_node") + 1], env["OMP_NUM_THREADS"]))
        return argparse.Namespace(stdout=f"{next(took)}\n")

    monkeypatch.setattr(bench.subprocess, "run", timed)
    bench.main(["--processes", "2", "--quick", "--runs", "1"])
    assert asked == [("2", "1"), ("1", "2"), ("1", "1")]
    assert "ideal 0.600 s   efficiency 0.75, of threads 1.20" in capsys.readouterr().out


def test_the_benchmark_weighs_model_files(tmp_path):
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}]
    nets = [models.CNet("small_cnn", 3, 1, meta=2) for _ in range(2)]
    about = {"classes": ["a", "b", "c"], "size": 32, "load_size": 32, "channels": 1, "meta_spec": spec}
    ensemble = models.Ensemble(nets, dnets=[models.DNet("small_cnn", 1)], **about)
    models.save(tmp_path / "m.pt", ensemble)
    said = call(bench, "--models", tmp_path / "m.pt", "--runs", "1", "--device", "cpu").stdout
    weights = sum(v.numel() for net in (*nets, *ensemble.dnets) for v in net.parameters())
    size = (tmp_path / "m.pt").stat().st_size
    assert f"3 networks, {weights / 1e6:.1f} M weights, {size / 1e6:.1f} MB" in said
    assert re.search(r"32 answers .*ours +\d+\.\d+ s   floor", said)


def test_the_benchmark_times_a_clip(tmp_path):
    models.save(tmp_path / "m.pt", small_model())
    clip = save_clip(tmp_path / "c.gif", moving())
    said = call(bench, "--clip", clip, "--models", tmp_path / "m.pt", "--runs", "1", "--device", "cpu")
    for views in (1, 5):
        line = rf"12 frames, .*m.pt, 32 px, views: {views} .*ours +\d+\.\d+ s   floor.*\n +\d+\.\d frames a second"
        assert re.search(line, said.stdout), said.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The faults that a careful stranger found, by the numbers of their list where no test above holds them


def test_what_is_reported_is_what_is_delivered(tmp_path, folders):  # 1, 10, 12, 23
    folder, _, result = quick(tmp_path, "--views", "3", "--positive", "malignant", "--name", "a", data_folder=folders)
    images = quiet_load(folders, 32, positive="malignant")
    tested = torch.load(folder / "test.pt", weights_only=True)
    some = infer.BreastCancerDetector(folder, "cpu")
    answers = some.predict([images.names[i] for i in tested["rows"].tolist()])
    assert some.tta == 3
    assert [a["probability"] for a in answers] == pytest.approx(tested["probabilities"][:, 1].tolist(), abs=1e-5)
    said = [a["prediction"] == images.classes[images.labels[i]] for a, i in zip(answers, tested["rows"], strict=True)]
    assert np.mean(said) == pytest.approx(result["test"]["accuracy"]["value"])
    assert "they mean something else" in infer.BreastCancerDetector(folder, "cpu", tta=2).describe()
    path = images.names[int(tested["rows"][0])]
    shown = report.explain_picture(some.model, data.read_image(path, 1), "gradcam")[2]
    assert shown[1] == pytest.approx(answers[0]["probability"], abs=1e-5)
    seen = some.info["seen"]
    assert [len(seen[k]) for k in ("train", "val", "test")] == [result["splits"][k] for k in ("train", "val", "test")]
    assert torch.equal(images.pictures()[tested["rows"]], seen["test"])
    old = small_model()
    models.save(tmp_path / "old.pt", old)
    assert infer.BreastCancerDetector(tmp_path / "old.pt", "cpu").tta == 1  # what older files were calibrated for


def test_a_folder_that_changed_is_not_taken_for_the_old_one(tmp_path, folders):  # 23
    own = tmp_path / "set"
    shutil.copytree(folders, own)
    folder, _, _ = quick(tmp_path, "--name", "a", "--nets", "cnet", "--epochs", "1", data_folder=own)
    config = json.loads((folder / "config.json").read_text())
    picture(60, 40, 999).save(own / "benign" / "benign (0).png")  # the first now: every other row moves by one
    for script, options in ((infer, ["--evaluate"]), (explain, ["--evaluate"])):
        said = error_of(call(script, "--model", folder, "--cache", tmp_path / "cache", *options))
        assert "has changed" in said
    (folder / "report.json").unlink()
    assert "has changed since" in error_of(call(train, "--resume", folder))
    assert config["images"] != quiet_load(own, 32).fingerprint()
    (own / "benign" / "benign (0).png").unlink()
    mask = own / "benign" / "benign (3)_mask.png"
    other = Image.open(mask).transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # the same pictures, another lesion in one
    other.save(mask)
    assert "boxes or masks" in error_of(call(train, "--resume", folder))
    untold = quiet_load(own, 32)
    told = dataclasses.replace(untold, outlined=~untold.outlined)  # a black mask came: no lesion, not one unknown
    assert told.drawn() != untold.drawn()
    teacher = ["--teacher", folder, "--folds", "2", "--nets", "cnet", "--data", folders, *TINY, "--runs", tmp_path]
    said = error_of(call(train, *teacher, "--teacher", folder / "model.pt"))
    assert re.search(r"it learnt from [1-9]\d* of the 40 test images; train it with the same", said)


def test_only_runs_on_the_same_pictures_are_compared(tmp_path, folders):  # 31
    own = tmp_path / "set"
    shutil.copytree(folders, own)
    folder, _, _ = quick(tmp_path, "--name", "a", "--nets", "cnet", "--epochs", "1", data_folder=own)
    check_against(folder, quiet_load(own, 48, channels=3))  # files look alike at every size
    images = quiet_load(own, 32)
    picture(60, 40, 999).save(images.names[int(images.rows("test")[0])])  # as many as before, of the same names
    options = [
        "--data",
        own,
        *TINY,
        "--runs",
        tmp_path,
        "--cache",
        tmp_path / "c",
        "--nets",
        "cnet",
        "--against",
        folder,
    ]
    assert "its images, labels, groups or splits are others" in error_of(call(train, *options))
    (small, large), args = (quiet_load(None, size) for size in (16, 24)), parse(["--runs", str(tmp_path)])
    folder = prepare_folder(args, small)
    check_against(folder, small)
    refused("another --size makes other phantoms", check_against, folder, large)
    counts = {k: len(small.rows(split)) for k, split in (("pool", "train"), ("test", "test"))}
    loop = {
        "data": {"classes": small.classes, **counts},
        "labels": [20, 40],
        "chains": [{"seed": 0, "strategy": "random", "rounds": [{"auc": 0.5}] * 2}],
    }
    (folder / "al.json").write_text(json.dumps(loop))
    args = argparse.Namespace(against=str(folder), start=20, query=20, rounds=1, seed=0, repeats=1, redraw=False)
    assert al_loop.finished_loop(small, args) == loop
    refused("another --size makes other phantoms", al_loop.finished_loop, large, args)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Image.new("L", (90, 60), 100), "it is blank"),
        (lambda: picture(9, 30), "it has only 9 x 30 pixels"),
        (lambda: picture(400, 40), "it is 10 times as long as wide"),
        (lambda: picture(60, 50, mode="RGB"), "it is in colour"),
    ],
)
def test_a_picture_that_can_not_be_judged_is_referred(make, why):  # 2
    assert any(why in reason for reason in infer.oddities(make().convert("RGB"), 1))
    assert infer.oddities(picture(60, 50).convert("RGB"), 1) == []
    assert infer.oddities(picture(60, 50, mode="RGB"), 3) == []


def test_strangeness_is_the_mahalanobis_distance_in_shares_of_validations():  # 2
    mix = torch.randn(6, 6, generator=seeded()).double()
    train_set, val, new = (torch.randn(n, 6, generator=seeded(n)).double() @ mix for n in (500, 800, 2000))
    known = models.familiar([train_set], [val])
    found = models.distance([new], known)
    away = new - train_set.mean(0)
    expected = (away @ torch.linalg.inv(torch.cov(train_set.T)) * away).sum(1).sqrt()
    torch.testing.assert_close(found / found[0], expected / expected[0], atol=0, rtol=1e-3)
    assert 0.005 < float((found > 1).double().mean()) < 0.02  # above 1 lies one of a hundred
    # two traits together still refer one of a hundred, and a flat direction that is left tells
    flat = [torch.cat([x, 1e-4 * x[:, :1].square()], 1) for x in (train_set, val, new)]
    known = models.familiar(*([x, y] for x, y in zip((train_set, val), flat, strict=False)))
    assert 0.004 < float((models.distance([new, flat[2]], known) > 1).double().mean()) < 0.025
    off = flat[2].clone()
    off[:, 6] += 0.1
    assert (models.distance([new, off], known) > 1).all()
    assert all(t.dtype == torch.float32 for one in known for t in one.values())


def odd_pictures(size=64):
    """{what: uint8 (N, 1, size, size)} that show no tissue: noise, and a colour gradient of a photo turned grey."""
    noise = torch.randint(0, 256, (20, 1, size, size), generator=seeded(), dtype=torch.uint8)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    skies = torch.stack([0.3 * share * x + 0.59 * y + 0.11 * (1 - x) for share in torch.linspace(0, 1, 9)])
    return {"noise": noise, "gradient": (255 * skies[:, None]).byte()}


def test_a_picture_unlike_those_of_training_is_referred(tmp_path, whole, monkeypatch):  # 2
    why, path = "it is unlike the pictures that the model has learnt from", whole[0] / "model.pt"
    some, calls, honest = infer.BreastCancerDetector(path, "cpu"), [], models.CNet.see
    monkeypatch.setattr(models.CNet, "see", lambda self, *a: calls.append(0) or honest(self, *a))
    for pixels in odd_pictures(32).values():
        calls.clear()
        for result in some.predict(list(pixels[:, 0].numpy())):
            assert result["refer"]
            assert why in result["reason"]
        assert len(calls) == len(some.model.members)  # from the pass that predicts
    x = torch.rand(3, 1, 32, 32)
    assert all(backbones.texture(torch.rand(2, 3, s, s)).isfinite().all() for s in (4, 15, 16, 50))
    with torch.no_grad():  # whatever the number of views, the picture as it is
        one, five = (some.model.strangeness(some.model.look(x, views=n).traits) for n in (1, 5))
    close(one, five)
    content = torch.load(path, weights_only=True)
    known = content.pop("familiar")
    assert sum(t.numel() * 4 for one in known for t in one.values()) < 1e5
    torch.save(content, tmp_path / "old.pt")
    old = infer.BreastCancerDetector(tmp_path / "old.pt", "cpu").predict(odd_pictures(32)["noise"])
    assert not any(why in (result["reason"] or "") for result in old)


def test_the_reason_to_refer_is_told_and_nothing_but_numbers_comes_out(detector):  # 2, 32
    result = detector.predict(Image.new("L", (90, 60), 100))
    assert result["refer"]
    assert result["reason"].startswith("it is blank")
    found = infer.answer([math.nan, math.nan], 0.0, {"classes": ["benign", "malignant"], "threshold": 0.5})
    assert found["refer"]
    assert "not a finite number" in found["error"]
    for net in ("dnets", "members"):
        broken = copy.copy(detector)
        broken.model = copy.deepcopy(detector.model)
        next(getattr(broken.model, net).parameters()).data.fill_(math.nan)
        found = broken.predict(picture(90, 60))
        assert "not a finite number" in found["error"]
        assert (found["refer"], found["box"], found["probability"]) == (True, None, None)
    with pytest.raises(InputError, match="finite"):
        data.encode_meta([{"age": "inf"}], None, [{"column": "age", "mean": 50.0, "sd": 9.0}])
    for age in ("inf", "1e308"):  # the square of the second is infinite
        with pytest.raises(InputError, match="a cell is infinite"):
            data.encode_meta([{"age": age}, {"age": "3"}], ["age"])


def test_patients_and_boxes_come_with_their_pictures(tmp_path):  # 13, 30
    torch.manual_seed(0)
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}]
    net = models.CNet("small_cnn", 2, 1, meta=2, roi="mask").eval()
    torch.nn.init.normal_(net.head.weight)
    model = models.Ensemble([net], classes=["benign", "malignant"], size=32, load_size=32, channels=1, meta_spec=spec)
    models.save(tmp_path / "m.pt", model)
    some = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu")
    shots = [picture(60, 50, i) for i in range(3)]
    for ask in (some.predict, lambda shots, meta: report.explain_picture(model, shots[0], "ig", None, meta)):
        with pytest.raises(InputError, match="it needs boxes"):
            ask(shots, {"age": 50})
    with pytest.raises(InputError, match="one for every image, or none"):
        some.predict(shots, None, [None, [5, 5, 30, 30], np.array([5, 5, 30, 30])])
    known = torch.rand(2, 4)
    assert model.locate(torch.rand(2, 1, 32, 32), known) is known
    boxes, metas = [[5, 5, 30, 30], [20, 10, 55, 45], [0, 0, 60, 50]], [{"age": 20}, {"age": 80}, {}]
    together = some.predict(shots, metas, boxes)
    alone = [some.predict(*one) for one in zip(shots, metas, boxes, strict=True)]
    assert [r["probability"] for r in together] == pytest.approx([r["probability"] for r in alone], abs=1e-5)
    assert [r["box"] for r in together] == [pytest.approx(b, abs=0.11) for b in boxes]
    assert some.predict(shots[0], {"age": 80}, boxes[0])["probability"] != pytest.approx(alone[0]["probability"])
    assert "age=5000 is far from what training saw" in some.predict(shots[0], {"age": 5000}, boxes[0])["reason"]
    for wrong in ([3, 3, 2, 9], [1, 2, 3], [-1, 0, 5, 5]):
        with pytest.raises(InputError, match="x_min, y_min, x_max, y_max"):
            some.predict(shots[0], None, wrong)
    with pytest.raises(InputError, match="2 patients' data and 3 boxes for 3 images"):
        some.predict(shots, metas[:2], boxes)


def test_a_table_of_patients_goes_in_and_one_of_answers_comes_out(tmp_path):  # 13
    torch.manual_seed(0)
    net = models.CNet("small_cnn", 2, 1, meta=2).eval()
    torch.nn.init.normal_(net.head.weight)
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}]
    model = models.Ensemble([net], classes=["benign", "malignant"], size=32, load_size=32, channels=1, meta_spec=spec)
    models.save(tmp_path / "m.pt", model)
    for i in range(3):
        picture(60, 50, i).save(tmp_path / f"{i}.png")
    (tmp_path / "in.csv").write_text("file;age\n0.png;20\n1.png;80\n2.png;\n")
    result = call(infer, tmp_path / "in.csv", "--image-column", "file", "--model", tmp_path / "m.pt", "--csv", tmp_path / "out.csv")  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    some = infer.BreastCancerDetector(tmp_path / "m.pt", "cpu")
    for i, (row, meta) in enumerate(zip(rows, ({"age": 20}, {"age": 80}, {}), strict=True)):
        expected = some.predict(tmp_path / f"{i}.png", meta)
        assert float(row["probability"]) == pytest.approx(expected["probability"], abs=1e-5)
        assert Path(row["image"]).name == f"{i}.png"
    (tmp_path / "empty.csv").write_text("image\n")
    for table, why in (("empty.csv", "no image in this table"), ("nowhere.csv", "no such file")):
        assert why in error_of(call(infer, tmp_path / table, "--model", tmp_path / "m.pt"))
    said = error_of(call(infer, "--model", tmp_path / "m.pt", "--scales", "0.75", "1", tmp_path / "0.png"))
    assert "give files before the options" in said  # 20
    assert "a folder; give one picture" in error_of(call(explain, tmp_path, "--model", tmp_path / "m.pt"))


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux alone")
def test_a_name_of_any_bytes_is_one(tmp_path, detector, monkeypatch):
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in" / os.fsdecode(b"\xff\n.png"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    options = [tmp_path / "in", "--model", detector.path, "--csv", tmp_path / "a.csv"]
    run_main(lambda: infer.main([*map(str, options)]))
    sys.stdout.flush()
    assert rb"\udcff\n.png: " in sys.stdout.buffer.getvalue()
    assert b"\xff\n.png" in (tmp_path / "a.csv").read_bytes()


def test_who_labels_is_not_led_by_the_models_guess(tmp_path, helper):  # 10, 11
    assert suggest(helper, tmp_path, "--query", "5").returncode == 0
    for row in csv.DictReader((tmp_path / "to_label.csv").read_text().splitlines()):
        assert row["suggested_label"] == row["suggested_box"] == row["probability"] == row["label"] == ""
        assert Path(row["image"]).name != "old.png"  # one of the training folder, that nobody named as labelled


def test_a_half_filled_sheet_labels_only_what_has_an_answer(tmp_path, helper):  # 27
    rows = suggestion(helper, tmp_path / "a")
    rows[0]["label"] = "benign"
    with open(tmp_path / "half.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    more = suggestion(
        helper, tmp_path / "b", "--labelled", tmp_path / "half.csv", "--query", "13", "--strategy", "random"
    )
    names = {Path(row["image"]).name for row in more}
    assert Path(rows[0]["image"]).name not in names
    assert {Path(row["image"]).name for row in rows[1:]} <= names | {"copy of 3.png", "new 3.png"}


def test_a_model_of_patients_suggests_without_knowing_them(tmp_path, helper):
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}]
    net = models.CNet("small_cnn", 2, 1, meta=2)
    model = models.Ensemble([net], classes=["a", "b"], size=32, load_size=32, channels=1, meta_spec=spec)
    models.save(tmp_path / "m.pt", model)
    options = ["--pool", helper / "pool", "--query", "3", "--out", tmp_path / "out", "--cache", tmp_path / "c"]
    assert call(al_loop, "suggest", "--model", tmp_path / "m.pt", *options).returncode == 0
    assert len((tmp_path / "out" / "to_label.csv").read_text().splitlines()) == 4


def test_answers_without_masks_cost_the_others_none_of_theirs(tmp_path, folders):
    images, args = quiet_load(folders, 32, positive="malignant"), parse(["--cache", str(tmp_path / "c")])
    picture(60, 40, 77).save(tmp_path / "a.png")
    entry = readers.Entry(str(tmp_path / "a.png"), "a.png", label=1, box=(5, 5, 30, 30))
    with contextlib.redirect_stdout(io.StringIO()):
        both, rows = person.add_answers(images, [entry], args)
    assert torch.equal(both.masks[: len(images)], images.masks)
    assert rows.tolist() == [len(images)]
    assert (both.masks[-1].any(), both.outlined[-1], both.boxes[-1].isfinite().all()) == (False, True, True)


def test_links_are_followed_once(tmp_path):  # 16
    class_folders(tmp_path / "real", {"benign": 2, "malignant": 2})
    (tmp_path / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real", target_is_directory=True)
    assert len(infer.collect([tmp_path / "linked"])) == 4
    (tmp_path / "t.csv").write_text("image,label\nbenign (1),a\nmalignant (2),b\n")
    (tmp_path / "real" / "loop").unlink()
    assert len(quiet_load(tmp_path / "t.csv", 32)) == 2


@pytest.mark.parametrize(
    ("encoding", "comma"), [("utf-8", ";"), ("utf-8-sig", ","), ("latin-1", ";"), ("utf-16", "\t"), ("utf-8", "\t")]
)
def test_tables_as_spreadsheets_write_them(tmp_path, encoding, comma):  # 18
    for i in range(4):
        picture(40, 40, i).save(tmp_path / f"{i}.png")
    lines = ["image,label,note", *(f"{i}.png,{'Größe' if i % 2 else 'Sick Patients'},ü" for i in range(4))]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).replace(",", comma).encode(encoding))
    images = quiet_load(tmp_path / "t.csv", 32, positive="sick patients")
    assert images.classes[-1] == "Sick Patients"
    assert images.labels.tolist() == [1, 0, 1, 0]


def test_names_of_splits_are_no_patients(tmp_path):  # 24
    for split, n in (("train", 3), ("val", 2), ("test", 2)):
        for label in "01":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(n):
                picture(40, 40, hash((split, label, i)) % 9999).save(tmp_path / split / label / f"{i}.png")
    images = quiet_load(tmp_path, 32)
    assert images.classes == ["0", "1"]
    assert [images.splits.count(s) for s in ("train", "val", "test")] == [6, 4, 4]
    assert len(images.groups.unique()) > 3


def test_a_table_never_takes_another_file(tmp_path):  # 25
    for name in ("a/0.png", "images/X1.jpg", "masks/X1.png", "a/twice.png", "b/twice.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(40, 40, len(name)).save(tmp_path / name)

    def found(name):
        (tmp_path / "t.csv").write_text(f"image,label\n{name},x\n")
        return Path(readers.read_csv(tmp_path / "t.csv", readers.COLUMNS)[0].image).relative_to(tmp_path).as_posix()

    assert found("X1") == "images/X1.jpg"
    assert found("a/twice.png") == "a/twice.png"
    assert found("b/0.png") == "b/0.png"  # missing, which is said when it is read
    with pytest.raises(InputError, match=r"twice.png' may be .*a/twice.png or .*b/twice.png"):
        found("twice.png")


def test_masks_of_ones_and_a_single_patient_named(tmp_path):  # 26
    class_folders(tmp_path / "m", {"benign": 4, "malignant": 4})
    for path in (tmp_path / "m").rglob("*_mask.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 127).astype(np.uint8)).save(path)
    assert quiet_load(tmp_path / "m", 32).masks.flatten(1).any(1).all()
    for i in range(5):
        picture(40, 40, min(i, 3)).save(tmp_path / f"{i}.png")  # 3 and 4 are one picture
    (tmp_path / "t.csv").write_text("image,label,group\n0,a,p\n1,b,\n2,a,\n3,b,\n4,b,\n")
    groups = quiet_load(tmp_path / "t.csv", 32).groups.tolist()
    assert groups[3] == groups[4]
    assert len(set(groups)) == 4


def test_one_file_has_one_answer_however_it_is_opened(tmp_path, detector):  # 33
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(80, 50, 5).save(tmp_path / "turned.jpg", exif=exif)
    by_path = detector.predict(tmp_path / "turned.jpg")["probability"]
    with Image.open(tmp_path / "turned.jpg") as image:
        assert detector.predict(image)["probability"] == by_path
    picture(80, 50, 5).save(tmp_path / "turned.tif", exif=exif)  # Pillow would map it into memory by its name
    upright = np.asarray(picture(80, 50, 5).transpose(Image.Transpose.ROTATE_270))
    for source in (tmp_path / "turned.tif", io.BytesIO((tmp_path / "turned.tif").read_bytes())):
        assert np.array_equal(data.read_image(source, 1), upright)
    picture(80, 50, mode="RGB").save(tmp_path / "script.png", "EPS")  # Pillow has Ghostscript run what is in it
    assert detector.predict(tmp_path / "script.png")["error"].startswith("not an image, or none of PNG")
    bad = Image.fromarray(np.full((20, 20), np.nan, np.float32))
    bad.save(tmp_path / "nan.tif")
    results = detector.predict(
        [tmp_path / "nan.tif", picture(40, 40), Image.new("LAB", (30, 30)), Image.new("L", (0, 4))]
    )
    assert [r["error"] is None for r in results] == [False, True, True, False]
    assert sorted(["b10", "b²", "b9"], key=readers.natural)  # a digit that is no decimal


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "m.pt"
    models.save(path, small_model())
    return path


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "3"}, "version 3"), ({"version": None}, "version None"), ({"size": "big"}, "size: big"),
        ({"classes": None}, "classes: None"), ({"threshold": math.nan}, "threshold: nan"), ({"views": 99}, "views: 99"),
        ({"dropout": 5}, "dropout probability"), ({"stride": 0}, "is larger than its memory"), ({"lost": 0}, "no size"),
        ({"classes": ["a", "b", "c"]}, "classes: 2"), ({"classes": ["a", "a"]}, "classes:"), ({"size": True}, "size: True"),
        ({"weights": torch.ones(1)}, "of 2 members"), ({"weights": torch.tensor([0.5, math.nan])}, "of 2 members"),
        ({"temperature": 0.0}, "temperature"), ({"channels": 3}, "channels: 1"), ({"made": {"data": [1]}}, "made:"),
        ({"meta_spec": [{"column": "age", "mean": 1.0, "sd": 0.0}]}, "meta_spec:"), ({"seen": {"test": 1}}, "seen:"),
        ({"config": {"normalise": "x"}}, "normalise: x"), ({"config": {"dropout": math.nan}}, "dropout"),
        ({"state": torch.Tensor.double}, "float64"), ({"state": torch.Tensor.to_sparse}, "not fitting"),
        ({"familiar": [{k: torch.ones(2, 7) for k in ("mean", "axes", "variances")}] * 3}, "what is familiar does not"),
        ({"familiar": 7}, "not fitting"),
    ],
)  # fmt: skip
def test_a_strangers_model_file_is_checked_before_it_is_built(tmp_path, saved_model, change, why):  # 41
    content = torch.load(saved_model, weights_only=True)
    if "dropout" in change:
        content["members"][0]["config"] |= change
    elif "stride" in change:
        content["members"][0]["state"]["head.weight"] = torch.zeros(1).expand(50_000, 100_000)
    elif "state" in change:
        content["members"][0]["state"]["head.weight"] = change["state"](content["members"][0]["state"]["head.weight"])
    elif "config" in change:
        content["members"][0]["config"] |= change["config"]
    elif "lost" in change:
        del content["size"]
    else:
        content |= change
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=re.escape(why)):
        models.load(tmp_path / "bad.pt")


def test_a_model_file_names_no_other_file(tmp_path, saved_model, monkeypatch):  # 41
    content = torch.load(saved_model, weights_only=True)
    content["members"][0]["config"]["weights"] = "/etc/passwd"
    torch.save(content, tmp_path / "odd.pt")
    monkeypatch.setattr(backbones, "load_weights", None)  # never followed
    models.load(tmp_path / "odd.pt")


def test_an_npz_gives_only_what_is_asked_of_it(tmp_path, monkeypatch):  # 41
    images = np.zeros((2, 8, 8), np.uint8)
    np.savez_compressed(
        tmp_path / "a.npz", train_images=images, train_labels=np.arange(2), other=np.zeros((1 << 20, 8))
    )
    loaded, honest = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: loaded.append(key) or honest(self, key))
    assert len(readers.read_npz(tmp_path / "a.npz")) == 2
    assert "other" not in loaded


def test_each_member_has_weights_of_its_own(tmp_path):  # 17
    torch.manual_seed(0)
    nets = {name: torchvision.models.get_model(name, weights=None) for name in ("resnet18", "mobilenet_v2")}
    for name, net in nets.items():
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    both = ",".join(f"{name}={tmp_path / name}.pt" for name in nets)
    for name, net in nets.items():
        features, _ = backbones.build_backbone(name, 3, both)
        first = next(p for p in net.parameters() if p.dim() == 4)
        assert torch.equal(next(p for p in features.parameters() if p.dim() == 4), first)
    refused("says nothing of alexnet; add alexnet=FILE", backbones.build_backbone, "alexnet", 3, both)


def test_one_file_of_weights_goes_to_the_members_that_it_fits(tmp_path, folders, capsys):  # 17
    torch.manual_seed(0)
    file, net = tmp_path / "resnet18.pt", torchvision.models.get_model("resnet18", weights=None)
    torch.save(net.state_dict(), file)
    shared = backbones.share_weights(["resnet18", "mobilenet_v2", "none"], str(file))
    assert shared == f"resnet18={file},mobilenet_v2=none"
    assert capsys.readouterr().out == f"weights {file}: it fits resnet18; from none: mobilenet_v2\n"
    assert torch.equal(backbones.build_backbone("resnet18", 3, shared)[0][0].weight, net.conv1.weight)
    for names in (["resnet18"], ["mobilenet_v2"], ["resnet19"]):  # all or none: as it is, and then it is said
        assert backbones.share_weights(names, str(file)) == str(file)
    # of small_cnn a few layers have the shapes of mobilenet_v2's, which is no fit
    torch.save(torchvision.models.get_model("mobilenet_v2", weights=None).state_dict(), tmp_path / "m.pt")
    assert "small_cnn=none" in backbones.share_weights(["small_cnn", "mobilenet_v2"], str(tmp_path / "m.pt"))
    options = ["--ensemble", "resnet18,small_cnn", "--nets", "cnet", "--size", "32", "--data", folders]
    args = parse(list(map(str, [*options, "--model", "small_cnn", "--weights", file, "--cache", tmp_path / "c"])))
    capsys.readouterr()
    train.prepare(args)
    assert capsys.readouterr().out.count("from none: small_cnn") == 1
    assert args.weights == f"resnet18={file},small_cnn=none"  # what config.json keeps, for --resume


def test_votes_survive_a_probability_of_zero():  # 34
    own = torch.tensor([[[1.0, 0.0], [0.4, 0.6]], [[1.0, 0.0], [0.1, 0.9]]])
    votes = judge.member_weights(own, torch.tensor([1, 1]))
    assert all(math.isfinite(v) for v in votes)
    assert sum(votes) == pytest.approx(1)


def test_numbers_that_make_no_sense_are_refused_by_name():  # 34
    for option, value in (("margin", "-0.6"), ("warmup", "5"), ("clip", "0"), ("device", "meta"), ("views", "9")):
        with pytest.raises(InputError, match=f"--{option}.*{value}"):
            train.main([f"--{option}", value])


@pytest.mark.parametrize("temperature", [0.25, 1.0, 8.0])
def test_large_logits_keep_their_order(temperature):  # 34
    generator = seeded()
    labels = torch.randint(0, 2, (400,), generator=generator)
    logits = 16 + 3 * torch.rand(400, generator=generator) + 3 * torch.rand(400, generator=generator) * labels
    expected = float(metrics.auc(logits, labels))
    members = models.to_probabilities(logits[:, None])[None]
    model = models.Ensemble([torch.nn.Identity()], classes=["benign", "malignant"], size=32, temperature=temperature)
    p = model.combine(members)
    assert 0.7 < expected < 0.95
    assert float(metrics.evaluate(p, labels)["auc"]) == pytest.approx(expected, abs=1e-9)
    judge.calibrate(model, members, labels, parse(["--threshold-by", "balance"]))
    found = metrics.evaluate(model.combine(members), labels, model.info["threshold"])
    assert float(found["auc"]) == pytest.approx(expected, abs=1e-9)
    assert float(found["balanced_accuracy"]) > 0.7  # in float32 no threshold parted them


def dies(images):
    """A job whose process is killed, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_ends_the_work_with_a_hint_slow(tmp_path, folders):  # 36
    args = parse(["--data", str(folders), "--size", "32", "--cache", str(tmp_path)])
    with pytest.raises(InputError, match=r"a worker died .*--resume"):
        list(run_jobs(dies, [()] * 3, load_images(args, log=lambda _: None), args, 2))


def test_two_processes_can_not_share_a_run(tmp_path):  # 37
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import options, sys, time\nwith options.claim(sys.argv[1]):\n    print('mine', flush=True)\n    time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=environment) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process works in it"), train.claim(tmp_path):
            pass
        other.kill()  # the system gives the lock back
        other.wait()
    with train.claim(tmp_path):
        pass


def test_a_report_that_was_not_written_is_written_by_resume(tmp_path, folders):  # 38
    options = ["--folds", "2", "--name", "a", "--nets", "cnet", "--epochs", "1"]
    folder, _, _ = quick(tmp_path, *options, data_folder=folders)
    before = (folder / "fold2" / "report.json").read_text()
    (folder / "fold2" / "report.json").unlink()
    (folder / "report.json").unlink()
    assert call(train, "--resume", folder).returncode == 0
    after = json.loads((folder / "fold2" / "report.json").read_text())
    assert after["test"] == json.loads(before)["test"]
    error_of(call(al_loop, "--strategies", "bald", "--dropout", "0", "--runs", tmp_path / "none"))
    assert al_loop.parse(["--strategies", "coreset,coreset"]).strategies == ["random", "coreset"]
    assert not (tmp_path / "none").exists()


def spoilt(path, change):
    """Write a file of a run again after change(what it holds)."""
    content = torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())
    change(content)
    torch.save(content, path) if path.suffix == ".pt" else path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("config.json", lambda c: c["args"].update(lr="much"), "'much' is no number"),
        ("config.json", lambda c: c["args"].update(size=8), "8: must lie in"),
        ("config.json", lambda c: c["args"].update(nets="all"), "nets: all"),
        ("config.json", lambda c: c["args"].update(drop_class="x"), "drop_class: x"),
        ("config.json", lambda c: c["args"].update(meta_columns=[]), "meta_columns: nothing"),
        ("config.json", lambda c: c.update(args=[]), "do not fit"),
        ("report.json", lambda c: c["test"].pop("auc") and c["test"].update(auc={}), "'value'"),
        ("test.pt", lambda c: c.update(rows=c["rows"] + 1), "not of this test split"),
        ("test.pt", lambda c: c["probabilities"].fill_(math.nan), "no probabilities"),
        ("test.pt", lambda c: c["histories"][0][0].update(score="x"), "do not fit"),
    ],
)
def test_a_damaged_run_is_not_gone_on_with(tmp_path, whole, name, change, why):
    run = shutil.copytree(whole[0], tmp_path / "r")
    if name == "test.pt":
        (run / "report.json").unlink()
    spoilt(run / name, change)
    said = error_of(call(train, "--resume", run))
    assert f"{run / name}: damaged" in said
    assert why in said


def test_a_damaged_state_is_not_gone_on_with(tmp_path):
    net = torch.nn.Linear(2, 1)
    optimizer, scheduler = train.build_optimizer(net, parse(["--warmup", "0.5"]), 9)
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "averaged": None}
    state = train.State("n", tmp_path, seeded(), parts)
    for _ in range(2):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        epoch = {"net": "n", "epoch": len(state.history) + 1, "loss": 1.0, "lr": 0.1, "seconds": 0.0, "score": [0.5]}
        state.add(epoch | {"best": train.is_better(state, [0.5], net, 1)})
    state.save()
    assert train.State("n", tmp_path, seeded(), parts).history == state.history
    for change, why in [
        (lambda c: c["history"].pop(0), "the history is not whole"),
        (lambda c: c["history"][1].update(score=["x"]), "do not fit"),
        (lambda c: c["net"].popitem(), "do not fit"),
        (lambda c: c["best"].update(weight=torch.ones(3)), "do not fit"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(math.inf), "not finite"),
        (lambda c: c.pop("name"), "do not fit"),
    ]:
        state.save()
        spoilt(tmp_path / "last.pt", change)
        refused(rf"last.pt: damaged.*{why}.*remove it", train.State, "n", tmp_path, seeded(), parts)


def test_what_another_script_left_is_checked_too(tmp_path):
    (tmp_path / "explain.json").write_text('{"recommended": "tea leaves"}')
    refused("no method 'tea leaves'", report.recommended_method, tmp_path / "model.pt")
    (tmp_path / "trial0-1-0.json").write_text('{"trial": 0, "epochs": 1, "fold": 0, "lr": 0.1, "score": "high"}')
    refused("trial0-1-0.json: damaged", search.try_setting, None, 0, {"lr": 0.1}, 1, 0, None, tmp_path)
    args = argparse.Namespace(start=2, query=2, rounds=2)
    rounds, labelled = [{"labels": 2, "auc": 0.5, "seconds": 1.0, "picks": ["a"]}], torch.arange(4)
    al_loop.check_chain(rounds, labelled, 9, args, "random")
    for bad in ([rounds, labelled + 6], [rounds, labelled // 2], [rounds, labelled[:3]], [[], labelled], [rounds * 2, labelled]):  # fmt: skip
        with pytest.raises(ValueError, match=r"labels|bought|pool"):
            al_loop.check_chain(*bad, 9, args, "random")


def test_a_damaged_cache_is_written_again(tmp_path, folders):  # 39
    first = quiet_load(folders, 32, cache=tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        again = quiet_load(folders, 32, cache=tmp_path)
        assert torch.equal(again.pixels, first.pixels)
        assert torch.equal(again.boxes.nan_to_num(), first.boxes.nan_to_num())


def test_a_bad_epoch_is_not_saved_slow(tmp_path, monkeypatch):  # 35
    good, calls = train.classification_loss, []

    def breaks(*args, **kwargs):
        calls.append(0)
        return good(*args, **kwargs) * (math.nan if len(calls) > 14 else 1)

    monkeypatch.setattr(train, "classification_loss", breaks)
    options = ["--nets", "cnet", *TINY, "--epochs", "4", "--batch", "64", "--name", "a", "--runs", str(tmp_path)]
    said = error_of(call(train, *options))
    assert "the state after epoch 1 is kept" in said
    saved = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert len(saved["history"]) == 1
    monkeypatch.undo()
    assert call(train, "--resume", tmp_path / "a").returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The house: what may import what, rooms of one sitting, files to copy whole, a README that runs

FLOORS = [
    ["augment", "heads", "losses", "query", "saliency", "metrics", "phantoms", "grouping"],
    ["dicom", "devices"],
    ["readers"],
    ["pictures", "files"],
    ["data"],
    ["backbones"],
    ["models"],
    ["plots", "answers"],
    ["clips"],
    ["options"],
    ["judge"],
    ["report"],
    ["transfer"],
    ["train"],
    ["person"],
    ["infer", "explain", "al_loop", "search", "pretrain", "export"],
    ["service"],
    ["app"],
    ["bench"],
]
EXTRAS = {  # optional packages, each imported where it is needed alone
    "service": {"fastapi", "starlette", "uvicorn"},
    "app": {"gradio"},
    "export": {"onnx", "onnxruntime", "onnxscript"},
    "dicom": {"pydicom"},
}


def sources():
    return {p.stem: ast.parse(p.read_text()) for p in HERE.glob("*.py") if p.stem != "test_all"}


def imports_of(tree):
    """Names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_a_file_imports_only_files_on_floors_below():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    files = sources()
    assert set(files) == set(floor)
    packages = {"torch", "torchvision", "numpy", "PIL"}
    for name, tree in files.items():
        found = imports_of(tree)
        ours = found & set(floor)
        assert all(floor[other] < floor[name] for other in ours), (name, ours)
        allowed = {"torch", "torchvision"} if name in FLOORS[0] else packages | EXTRAS.get(name, set())
        foreign = {m for m in found - set(floor) if m not in sys.stdlib_module_names}
        assert foreign <= allowed, (name, foreign)
        at_once = imports_of(ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], []))
        assert not at_once & EXTRAS.get(name, set()), name


def test_rooms_of_one_sitting():
    for name, tree in sources().items():
        assert len((HERE / f"{name}.py").read_text().splitlines()) <= 750, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (name, node.name)
    assert len((HERE / "README.md").read_text().splitlines()) < 170


USES = {  # on a network that is none of ours, beside what each file's own docstring shows
    "augment": "assert net(augment(images)[0]).shape == (4, 9); assert len(net(tta_views(images, views=3))) == 12",
    "losses": "distillation_loss(net(images), torch.arange(4), torch.full((4, 9), 1 / 9), 0.5, 2.0).backward()",
    "query": "assert len(set(k_center_greedy(net(images), 3)[0].tolist())) == 3",
    "saliency": "assert grad_cam(net, images).shape == rise(net, images, masks=4).shape == (4, 64, 96)",
    "metrics": "assert 0 <= with_intervals(net(images)[:, :2].softmax(1).tolist(), [0, 1, 1, 0])['auc']['value'] <= 1",
    "heads": "assert probabilities(net(images), fit(net(images), [0, 1, 1, 0])).shape == (4, 2)",
    "grouping": "assert near_duplicates((255 * images[:, :1, :, :64]).byte()).shape == (0, 2)",
    "phantoms": "assert net(phantoms(4, 64)[0].float().expand(-1, 3, -1, -1)).shape == (4, 9)",
}


def test_files_of_the_ground_floor_work_alone_on_a_torchvision_network_slow(tmp_path):
    """Each in a folder of its own, in a process that has no way to the project; what its docstring shows runs as printed."""
    code = ["import sys, torch, torchvision", "net = torchvision.models.resnet18(num_classes=9).eval()"]
    for name in FLOORS[0]:
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
        text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))
        example = [line[4:] for line in text.splitlines() if line.startswith("    ")]
        assert len(example) >= 3
        own = ["import torch, torchvision", f"from {name} import *", *example, f"from {name} import *"]
        own += ["images = torch.rand(4, 3, 64, 96)", USES[name]]
        code += [f"sys.path.insert(0, {str(tmp_path / name)!r})", f"exec({chr(10).join(own)!r}, {{'net': net}})"]
        code += ["del sys.path[0]", f"del sys.modules[{name!r}]", "net.zero_grad()"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def readme_blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_every_python_block_of_the_readme_runs_as_printed_slow(tmp_path, monkeypatch, capsys):
    blocks = readme_blocks("python")
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    assert "[2, 64, 64]" in capsys.readouterr().out


def test_the_readme_speaks_of_options_and_files_that_are_there():
    text = (HERE / "README.md").read_text()
    told = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", text)) - {"standalone", "nproc_per_node"}  # of torchrun
    scripts = ("options", "infer", "explain", "al_loop", "person", "export", "app")
    tables = "".join((HERE / f"{name}.py").read_text() for name in scripts)
    known = set(re.findall(r'\("([a-z][a-z0-9-]*)", ', tables))
    assert told <= known, told - known
    for name in re.findall(r"`([\w/]+\.(?:py|md|args|txt))`", text) + re.findall(r"\]\(([\w/.]+)\)", text):
        assert (HERE / name).is_file(), name
    assert sum(p.stat().st_size for p in (HERE / "docs").glob("*.png")) < 400_000


# ---------------------------------------------------------------------------------------------------------------------
# What a stranger runs first, which has been running beside the tests above


def test_the_first_command_keeps_its_promise_slow(phantom_run):
    folder, said = phantom_run
    test = json.loads((folder / "runs" / "phantoms" / "report.json").read_text())["test"]
    assert test["auc"]["value"] >= 0.95
    assert test["iou"]["value"] >= 0.60
    assert re.search(r"auc +0\.\d+ +\[0\.\d+, [01]\.\d+\]", said)
    command = re.search(r"try: python (infer\.py .*)", said)[1].split()
    answer = run(HERE / command[0], *command[1:], cwd=folder)
    assert answer.returncode == 0
    assert re.search(r"example\.png: (benign|malignant), p\(malignant\) = [01]\.\d+", answer.stdout)
    assert answer.stdout.rstrip().endswith(models.DISCLAIMER)
    assert "PHANTOMS" in answer.stdout


def test_boxes_are_in_the_pixels_of_the_original_slow(phantom_run):
    detector = infer.BreastCancerDetector(phantom_run[0] / "runs" / "phantoms" / "model.pt")
    images = data.phantom_set(12, 64, seed=7)
    for pixels, box in zip(images.pixels, images.boxes, strict=True):
        image = Image.fromarray(pixels[0].numpy()).resize((256, 256))
        wide = Image.new("L", (400, 256), int(pixels.float().mean()))
        wide.paste(image, (100, 0))
        found = torch.tensor(detector.predict(wide)["box"])[None]
        true = (box * 256 + torch.tensor([100, 0, 100, 0]))[None]
        assert (found[0, :2] < found[0, 2:]).all()
        assert found.max() <= 400
        if metrics.paired_iou(found, true) > 0.5:
            break
    else:
        pytest.fail("no box lies where its lesion is")


def test_what_is_no_phantom_is_referred_slow(phantom_run):  # 2
    run_folder = phantom_run[0] / "runs" / "phantoms"
    model, odd = models.load(run_folder), odd_pictures()
    assert (run_folder / "model.pt").stat().st_size < 4e6

    def unlike(pixels):
        with torch.no_grad():
            return (model.strangeness(model.look(pixels, views=1).traits) > answers.MOST_STRANGE).double().mean()

    fresh = data.phantom_set(200, 64, seed=99).pixels  # which no network has met
    assert unlike(fresh) < 0.05
    odd["inverted"] = 255 - fresh
    for folder in ("BUSI/malignant", "BUSBRA/Images") if DATA else ():
        files = [p for p in sorted((DATA / folder).glob("*.png")) if "mask" not in p.name][:20]
        odd[folder] = torch.from_numpy(np.stack([data.letterbox(Image.open(p).convert("L"), 64)[0] for p in files]))
    for what, pixels in odd.items():
        assert unlike(pixels) == 1, what


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@needs_data
def test_breastmnist_counts_pin_the_positive_class():
    images = quiet_load(DATA / "breastmnist.npz", 28)
    counts = [[int((images.labels[images.rows(s)] == c).sum()) for c in (0, 1)] for s in ("train", "val", "test")]
    assert images.classes == ["benign", "malignant"]
    assert counts == [[399, 147], [57, 21], [114, 42]]


@needs_data
def test_busi_masks_boxes_and_near_duplicates():
    said = []
    images = quiet_load(DATA / "BUSI", 128, positive="malignant", log=said.append)
    assert (len(images), int(images.labels.sum())) == (621, 168)
    assert int(images.boxes[:, 0].isfinite().sum()) == 515
    assert (images.masks.flatten(1).any(1) == images.boxes[:, 0].isfinite()).all()
    assert images.pixels.shape[1] == 1
    pairs = data.near_duplicates(images.thumbnails)
    assert len(pairs) > 160
    assert torch.equal(grouping.hashed_look_alikes(images.thumbnails)[0], grouping.look_alikes(images.thumbnails)[0])
    assert sum("OPPOSITE LABELS" in line for line in said) >= 1
    for g in images.groups.unique():
        assert len({images.splits[i] for i in torch.nonzero(images.groups == g)[:, 0].tolist()}) == 1
    three = quiet_load(DATA / "BUSI", 64)
    assert three.classes == ["benign", "normal", "malignant"]
    assert torch.bincount(three.labels).tolist() == [347, 106, 168]


@needs_data
def test_idc_patients():
    images = quiet_load(DATA / "IDC", 50)
    assert (len(images), len(images.groups.unique()), images.pixels.shape[1]) == (7402, 200, 3)
    assert int(images.labels.sum()) == 2019


@needs_data
def test_ham10000_lesions_and_metadata():
    columns = {"image": "image_id", "label": "dx", "group": "lesion_id", "meta": ["age", "sex", "localization"]}
    images = quiet_load(DATA / "HAM10000" / "HAM10000_metadata.csv", 32, columns=columns)
    assert len(images) == 8028
    assert torch.bincount(images.labels).sum() == 8028
    assert len(images.classes) == 7
    missing = images.meta[:, images.meta_columns.index("age missing")]
    assert 0 < missing.sum() < 100
    assert (images.meta[missing == 1, 0] == 0).all()
    assert float(images.meta[missing == 0, 0].std()) == pytest.approx(1, abs=0.01)
    pairs = data.near_duplicates(images.thumbnails)  # 26, as if the lesions were not known
    assert len(pairs) < 400
    hashed = grouping.hashed_look_alikes(images.thumbnails)[0]  # where most pictures look alike, a few may be missed
    assert len(torch.cat([pairs, hashed]).unique(dim=0)) - len(hashed) < 0.02 * len(pairs)
    assert (images.groups[pairs[:, 0]] == images.groups[pairs[:, 1]]).sum() > 100
    assert data.merge_groups(torch.arange(8028), pairs).bincount().max() < 100


@needs_data
def test_real_weights_fit_the_network(capsys):
    models.CNet("mobilenet_v2", weights=str(DATA / "weights" / "mobilenet_v2-features.pth"))
    assert "missing" not in capsys.readouterr().out  # the head, which the file lacks, is not wanted
