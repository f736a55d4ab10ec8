"""All tests: `pytest test_all.py`, a few minutes on two CPU cores, no data needed.

Against independent oracles (counting pairs, brute force, loops over pixels, uninterrupted runs), on awkward inputs,
and through the command lines. With DATA=/path/to/data the real files are read too (breastmnist.npz, BUSI/, IDC/,
HAM10000/). The order is that of the house: data, models, metrics, plots, train, explain, infer, al_loop."""

import argparse
import ast
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: for tiny networks a second thread costs more than it brings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

import al_loop
import augment
import bench
import data
import explain
import infer
import losses
import metrics
import models
import phantoms
import plots
import pretrain
import query
import readers
import report
import saliency
import search
import train
from options import parse, run_main
from readers import InputError

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


HALF = [torch.float16, torch.bfloat16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def box_of(mask):
    """The box of a mask (H, W), in [0, 1]."""
    ys, xs = (torch.nonzero(mask.any(d))[:, 0] for d in (1, 0))
    (h, w) = mask.shape
    return torch.tensor([xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h])


def lesions(n, h, w, seed=0):
    """Bright ellipses on black, uint8 (n, 1, h, w), and their boxes."""
    g = seeded(seed)
    centre, radius = 0.35 + 0.3 * torch.rand(n, 2, generator=g), 0.08 + 0.12 * torch.rand(n, 2, generator=g)
    y, x = ((torch.arange(side) + 0.5) / side for side in (h, w))
    dx, dy = x - centre[:, 0, None, None], y[:, None] - centre[:, 1, None, None]
    inside = (dx / radius[:, 0, None, None]) ** 2 + (dy / radius[:, 1, None, None]) ** 2 < 1
    return inside[:, None].to(torch.uint8) * 255, torch.cat([centre - radius, centre + radius], 1)


def switch_off(monkeypatch, *kept):
    names = ["GAMMA", "GAIN", "DEPTH_GAIN", "SPECKLE", "BLUR", "CUTOUT", "ROTATE", "SCALE", "SHIFT", "ELASTIC"]
    for name in {*names, "STAIN", "STAIN_SHIFT"} - set(kept):
        monkeypatch.setattr(augment, name, 0.0)


def test_warp_by_the_identity_and_by_a_flip_is_exact():
    x = torch.rand(3, 2, 17, 23)
    whole = augment.region_matrices(torch.tensor([[0.0, 0, 1, 1]]).expand(3, 4))
    torch.testing.assert_close(augment.warp(x, whole, None), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.warp(x, whole * torch.tensor([-1.0, 1, 1]), None), x.flip(3), atol=1e-5, rtol=0)
    normalised = x * 7 - 3  # any floats
    torch.testing.assert_close(augment.warp(normalised, whole, None), normalised, atol=1e-4, rtol=0)


def test_crop_is_slicing_and_outside_is_the_mean():
    x = torch.rand(2, 1, 32, 64)
    region = torch.tensor([[0.25, 0.5, 0.5, 0.75], [-0.5, -0.5, 0.0, 0.0]])
    torch.testing.assert_close(augment.crop(x, region, (8, 16))[0], x[0, :, 16:24, 16:32], atol=1e-5, rtol=0)
    out = augment.crop(x[1:], region[1:], 16)
    torch.testing.assert_close(out[0, :, :15, :15], x[1].mean().expand(1, 15, 15), atol=1e-5, rtol=0)
    whole = augment.crop((x * 255).to(torch.uint8), None, (32, 64))
    assert torch.equal(whole, (x * 255).to(torch.uint8) / 255)


def test_crop_regions_are_square_and_hold_the_box():
    boxes = torch.tensor([[0.2, 0.4, 0.6, 0.5], [math.nan] * 4, [0.5, 0.5, 0.5, 0.5]])
    expected = torch.tensor([[0.1, 0.15, 0.7, 0.75], [0, 0, 1, 1], [0.4625, 0.4625, 0.5375, 0.5375]])
    torch.testing.assert_close(augment.crop_regions(boxes, margin=0.25), expected)


def test_maps_of_crops_are_put_back_where_they_were_cut():
    maps, regions = torch.rand(2, 40, 60), torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.5, 0.0, 1.0, 0.5]])
    crops = augment.cut(maps, regions, (20, 30))
    torch.testing.assert_close(crops[0], maps[0, 10:30, 15:45], atol=1e-4, rtol=0)
    back = augment.place(crops, regions, (40, 60))
    torch.testing.assert_close(back[0, 11:29, 16:44], maps[0, 11:29, 16:44], atol=1e-4, rtol=0)
    assert (back[0, :9] == 0).all()
    assert (back[1, 22:] == 0).all()
    assert torch.equal(augment.place(maps, None, None), maps)
    assert augment.cut(maps, torch.tensor([[0.4, 0.2, 0.4, 0.8]] * 2), 8).isfinite().all()  # a box of no width
    with pytest.raises(ValueError, match="region 0"):
        augment.place(maps, torch.tensor([[0.4, 0.2, 0.4, 0.8]] * 2), 8)


def test_blur_is_a_gaussian_of_each_images_own_sigma():
    x = torch.zeros(2, 2, 21, 25)
    x[:, :, 10, 12] = 1
    out = augment.blur(x, torch.tensor([0.7, 1.3]))
    t = torch.arange(-4, 5)
    for i, sigma in enumerate((0.7, 1.3)):
        line = torch.exp(-(t**2) / (2 * sigma**2))
        kernel = line[:, None] * line
        torch.testing.assert_close(out[i, 1, 6:15, 8:17], kernel / kernel.sum(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# augment.py: augmentation


@pytest.mark.parametrize("crop_first", [False, True])
@pytest.mark.parametrize("shape", [(96, 96), (64, 128)])
def test_boxes_follow_the_augmented_lesion(monkeypatch, crop_first, shape):
    switch_off(monkeypatch, "ROTATE", "SCALE", "SHIFT", "ELASTIC")
    pixels, boxes = lesions(64, *shape)
    regions = augment.crop_regions(boxes, 1.0) if crop_first else None
    out, moved = augment.augment(pixels, 1.0, boxes, regions, generator=seeded())
    assert out.shape == pixels.shape
    # The background is not black after the warp (the bars are the mean), so the lesion is what is far above it.
    found = torch.stack([box_of(o[0] > 0.6) for o in out])
    iou = metrics.paired_iou(found, moved)
    assert iou.median() > 0.85  # the elastic part moves the edge a little, and a box does not know of it
    assert iou.min() > 0.6
    still = augment.move_boxes(boxes, augment.base_matrices(pixels, regions))
    assert metrics.paired_iou(found, still).mean() < iou.mean() - 0.1  # and the images did move


def test_what_is_not_square_turns_without_shear(monkeypatch):
    """A disc in pixels stays one: its width and height, in pixels, stay equal in every aspect ratio of the batch."""
    switch_off(monkeypatch, "ROTATE")
    monkeypatch.setattr(augment, "ROTATE", 45.0)
    for h, w in ((64, 128), (128, 64), (96, 96)):
        y, x = torch.arange(h)[:, None] + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2
        bar = ((x.abs() < 24) & (y.abs() < 4)).to(torch.uint8).mul(255).expand(16, 1, h, w)
        out = augment.augment(bar, 1.0, generator=seeded())[0][:, 0] > 0.6
        for mask in out:  # the bar's second moments are those of the bar, whatever its angle
            py, px = torch.nonzero(mask).float().T
            spread = torch.linalg.eigvalsh(torch.cov(torch.stack([px, py])))
            torch.testing.assert_close(spread.sqrt(), torch.tensor([8.0, 48.0]) / 12**0.5, atol=0.4, rtol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_resamples_once_is_seeded_and_stays_in_range(monkeypatch, channels):
    calls, sample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    pixels, boxes = lesions(16, 48, 80)
    pixels = pixels.expand(-1, channels, -1, -1)
    out, _ = augment.augment(pixels, 2.0, boxes, generator=seeded(3))
    assert len(calls) == 1
    assert out.dtype == torch.float32
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(out, augment.augment(pixels, 2.0, boxes, generator=seeded(3))[0])
    assert torch.equal(out, augment.augment(pixels / 255, 2.0, generator=seeded(3))[0])  # floats are the same images
    assert not torch.equal(out, augment.augment(pixels, 2.0, boxes, generator=seeded(4))[0])
    none, unmoved = augment.augment(pixels, 0, boxes)
    torch.testing.assert_close(none, pixels / 255, atol=1e-5, rtol=0)
    torch.testing.assert_close(unmoved, boxes, atol=1e-5, rtol=0)


PARTS = ["GAMMA", "GAIN", "DEPTH_GAIN", "SPECKLE", "BLUR", "CUTOUT", "ROTATE", "SCALE", "SHIFT", "ELASTIC"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_augmentation_does_something(monkeypatch, part):
    pixels = torch.randint(60, 190, (24, 1, 64, 96), generator=seeded()).to(torch.uint8)

    def change(*kept):
        with monkeypatch.context() as m:
            switch_off(m, *kept)
            out = augment.augment(pixels, 1.0, generator=seeded())[0]
        plain = pixels / 255
        return torch.minimum((out - plain).abs().mean((1, 2, 3)), (out - plain.flip(3)).abs().mean((1, 2, 3)))

    assert change().max() < 1e-3  # all off: the image or its mirror image
    assert (change(part) > 1e-3).sum() >= 3


def test_the_elastic_part_moves_what_its_comment_says():
    """In shares of the side: never above ELASTIC along an axis, 0.012 as root mean square, in both aspect ratios."""
    base = torch.eye(2, 3).expand(1000, 2, 3)
    moved = augment.random_displacement(base, torch.ones(1000), (48, 80), 1.0, seeded()) / 2  # the grid's side is 2
    assert 0.03 < float(moved.abs().max()) <= augment.ELASTIC
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.012, abs=5e-4)
    assert moved.shape == (1000, 48, 80, 2)
    narrow = augment.region_matrices(torch.tensor([[0.2, 0.2, 0.4, 0.8]]).expand(1000, 4))  # of the region's own sides
    moved = (
        augment.random_displacement(narrow, torch.full((1000,), 3.0), (8, 8), 1.0, seeded()).abs().amax((0, 1, 2)) / 2
    )
    torch.testing.assert_close(moved / torch.tensor([0.2, 0.6]), torch.tensor([0.035, 0.035]), atol=0.005, rtol=0)


def test_colour_has_no_up_and_grey_has():
    """A bright bar at the top edge: in ultrasound it stays on top; on a slide it turns to every side, and where the
    slide is not square to the two that keep its outline."""
    for channels, width, sides in ((1, 32, 1), (3, 32, 4), (3, 48, 2)):
        images = torch.full((200, channels, 32, width), 90, dtype=torch.uint8)
        images[:, :, :6] = 220
        out = augment.augment(images, 0.3, generator=seeded())[0].mean(1)
        edges = [out[:, 2:5], out[:, -5:-2], out[:, :, 2:5], out[:, :, -5:-2]]
        assert len(torch.stack([e.mean((1, 2)) for e in edges]).argmax(0).unique()) == sides


def test_changing_stains_scales_each_by_itself():
    amounts = torch.rand(5, 3, 4, 4, generator=seeded()) * 0.5
    scale, shift = torch.rand(5, 3) + 0.5, torch.rand(5, 3) * 0.1

    def mixed(amounts):
        return torch.exp(-torch.einsum("nshw,sc->nchw", amounts, augment.STAINS))

    expected = mixed(amounts * scale[:, :, None, None] + shift[:, :, None, None])
    found = augment.change_stains(mixed(amounts), scale, shift)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    same = augment.change_stains(mixed(amounts), torch.ones(5, 3), torch.zeros(5, 3))
    torch.testing.assert_close(same, mixed(amounts))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_comes_back_as_it_came_and_close_to_float32(dtype):
    x, boxes = (
        torch.rand(4, 1, 48, 64, generator=seeded()).to(dtype),
        torch.tensor([[0.2, 0.3, 0.5, 0.7]] * 4).to(dtype),
    )
    regions, coarse = augment.crop_regions(boxes), 2 * torch.finfo(dtype).eps
    for function in (
        lambda v, b: augment.augment(v, 1.0, b, generator=seeded())[0],
        lambda v, b: augment.augment(v, 1.0, b, generator=seeded())[1],
        lambda v, b: augment.tta_views(v, views=8),
        lambda v, b: augment.tta_views(v, regions, 16, views=3),
        lambda v, b: augment.crop(v, regions, (20, 30)),
        lambda v, b: augment.clahe(v),
        lambda v, b: augment.blur(v, torch.ones(4)),
        lambda v, b: augment.cut(v[:, 0], regions, 9),
    ):
        half, full = function(x, boxes), function(x.float(), boxes.float())
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), full, atol=coarse, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_on_a_device_no_value_is_waited_for(channels):
    """A meta tensor has shapes but no values: whoever asks for one, as a sync on a GPU does, gets an error."""
    x, boxes = torch.rand(4, channels, 32, 48, device="meta"), torch.rand(4, 4, device="meta")
    out, moved = augment.augment(x, 1.0, boxes, augment.crop_regions(boxes), (16, 24))
    assert out.shape == (4, channels, 16, 24)
    assert moved.shape == (4, 4)
    assert augment.augment(x, 0, boxes)[0].shape == x.shape
    assert augment.tta_views(x, augment.crop_regions(boxes), 8, 3).shape == (12, channels, 8, 8)
    teacher = torch.rand(4, 3, device="meta")
    losses.distillation_loss(teacher, torch.zeros(4, dtype=torch.long, device="meta"), teacher, 0.0, 2.0)


def test_off_the_cpu_all_images_are_blurred_and_the_same_third_taken(monkeypatch):
    x, u = torch.rand(12, 1, 24, 24, generator=seeded()), torch.rand(12, 20, generator=seeded(1))
    expected = augment.random_blur(x.clone(), u, 1.0)
    assert 0 < int((expected != x).any(3).any(2).sum()) < 12

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(augment, "blur", lambda images, sigma, real=augment.blur: real(torch.Tensor(images), sigma))
    found = augment.random_blur(x.clone().as_subclass(Elsewhere), u, 1.0).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)


GREY, BOX = torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.tensor([[0.1, 0.2, 0.6, 0.7]] * 2)


def first(change):
    """BOX whose first one is changed."""
    boxes = BOX.clone()
    boxes[0] = torch.tensor(change)
    return boxes


def distil(n, k, teacher):
    return losses.distillation_loss(torch.zeros(n, k), torch.zeros(n).long(), teacher, 0.5, 2.0)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: augment.augment(GREY.float() + 200), r"from 200 to 200: give uint8, or floats in \[0, 1\]"),
        (lambda: augment.augment(GREY.float() - 0.5), "from -0.5"),
        (lambda: augment.augment(GREY.float() * math.nan), "nan"),
        (lambda: augment.tta_views(GREY.float() + 2), "from 2 to 2"),
        (lambda: augment.clahe(GREY.float() + 2), "from 2 to 2"),
        (lambda: augment.augment(GREY.long()), "int64: give uint8"),
        (lambda: augment.augment(GREY.expand(2, 2, 16, 16)), "1 or 3"),
        (lambda: augment.augment(GREY[0]), r"shape \(1, 16, 16\)"),
        (lambda: augment.augment(GREY[:0]), r"shape \(0, 1, 16, 16\)"),
        (lambda: augment.augment(GREY, -1.0), "strength -1"),
        (lambda: augment.augment(GREY, 1.0, BOX * 16), r"box 0 is \(1.6, 3.2, 9.6, 11.2\)"),
        (lambda: augment.augment(GREY, 0, first([-0.2, 0.2, 0.6, 0.7])), "box 0"),
        (lambda: augment.augment(GREY, 0, first([0.2, 0.2, 0.6, 1.3])), "box 0"),
        (lambda: augment.crop_regions(first([0.6, 0.2, 0.1, 0.7])), "box 0"),
        (lambda: augment.augment(GREY, 1.0, first([0.1, math.nan, 0.6, 0.7])), "four NaN"),
        (lambda: augment.augment(GREY, 1.0, BOX[:1]), r"give floats \(2, 4\)"),
        (lambda: augment.augment(GREY, 1.0, BOX.long()), "int64"),
        (lambda: augment.augment(GREY, 1.0, regions=BOX[:1]), r"give floats \(2, 4\)"),
        (lambda: augment.crop(GREY, first([0.5, 0.5, 0.5, 0.7]), 8), "region 0 .* x_min < x_max"),
        (lambda: augment.tta_views(GREY, first([math.nan] * 4)), "region 0 is .nan"),
        (lambda: augment.crop(GREY, BOX, 0), "size 0"),
        (lambda: augment.tta_views(GREY, views=9), "9 views: give 1 to 8"),
        (lambda: augment.tta_views(GREY, views=0), "0 views"),
        (lambda: augment.cut(GREY[:, 0], None, 8), "maps of shape"),
        (lambda: distil(2, 3, torch.eye(3)[:2, :2]), r"\(2, 3\)"),
        (lambda: distil(2, 1, torch.ones(2, 1)), r"\(2, 2\)"),
        (lambda: distil(2, 2, torch.eye(2)[:1]), r"\(2, 2\)"),
        (lambda: distil(2, 2, torch.tensor([[1.0, 0], [-1, 2]])), "row 1"),
        (lambda: distil(2, 2, torch.ones(2, 2)), "softmax"),
        (lambda: distil(1, 2, torch.tensor([[math.nan, 1]])), "nan"),
        (lambda: phantoms.phantoms(0), "at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_value_error_that_says_so(call, why):
    with pytest.raises(ValueError, match=why):
        call()


def test_what_is_odd_but_right_passes():
    """Boxes of no width, NaN beside boxes, boxes that were moved out of the picture and come again, rounded floats."""
    boxes = torch.tensor(
        [[math.nan] * 4, [1.0, 0.3, 1.0, 0.3], [0.0, 0, 1, 1], [0.3, 0.2, 0.3, 0.9], [-5e-4, 0, 1.0005, 1]]
    )
    x = torch.rand(5, 1, 16, 24) * 1.0005
    for seed in range(8):
        x, boxes = augment.augment(x, 2.0, boxes, augment.crop_regions(boxes), generator=seeded(seed))
        assert boxes[0].isnan().all()
        assert boxes[1:].isfinite().all()
        assert ((boxes[1:] >= 0) & (boxes[1:] <= 1)).all()


# ---------------------------------------------------------------------------------------------------------------------
# augment.py: test-time augmentation and contrast


@pytest.mark.parametrize(("h", "w"), [(32, 32), (32, 64)])
def test_views_are_one_batch_and_the_first_is_the_picture(h, w):
    x = torch.rand(3, 1, h, w)
    views = augment.tta_views(x, views=5)
    assert views.shape == (15, 1, h, w)
    torch.testing.assert_close(views[:3], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(views[3:6], x.flip(3), atol=1e-5, rtol=0)
    zoomed = augment.crop(x, torch.tensor([[0.05, 0.05, 0.95, 0.95]]).expand(3, 4), None)
    torch.testing.assert_close(views[6:9], zoomed, atol=1e-5, rtol=0)
    regions = torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(3, 4)
    cropped = augment.tta_views(x, regions, (h // 2, w // 2), 2)
    torch.testing.assert_close(cropped[3:], x[:, :, h // 4 : -h // 4, w // 4 : -w // 4].flip(3), atol=1e-5, rtol=0)


def test_clahe_of_one_tile_without_a_limit_is_histogram_equalisation():
    x = torch.randint(30, 90, (2, 1, 16, 24), dtype=torch.uint8, generator=seeded())
    out = augment.clahe(x, tiles=1, clip=1e9)
    for image, result in zip(x, out, strict=True):
        for v in image.unique():
            expected = 255 * (image <= v).sum().item() / image.numel()
            assert abs(result[image == v].float() - expected).max() <= 0.51
    counts = torch.bincount(x[0].flatten(), minlength=256).float()  # with a limit, by hand
    limit = 2.0 * x[0].numel() / 256
    counts = counts.clamp(max=limit) + (counts - limit).clamp(min=0).sum() / 256
    expected = (counts.cumsum(0) / x[0].numel() * 255)[x[0].long()]
    assert (augment.clahe(x, tiles=1, clip=2.0)[0] - expected).abs().max() <= 0.51


def test_clahe_raises_local_contrast_leaves_blank_images_blank_and_takes_floats():
    noise = torch.randint(0, 8, (64, 64), generator=seeded())
    x = (torch.linspace(100, 130, 64).expand(64, 64) + noise)[None, None].to(torch.uint8)
    even = augment.clahe(x)
    assert even.float().std() > 1.3 * x.float().std()
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(augment.clahe(ramp / 255), augment.clahe(ramp) / 255)
    assert torch.equal(augment.clahe((ramp / 255).half()), (augment.clahe(ramp) / 255).half())
    blank = augment.clahe(torch.full((1, 3, 33, 47), 90, dtype=torch.uint8))
    assert blank.shape == (1, 3, 33, 47)
    assert blank.unique().numel() == 1


# ---------------------------------------------------------------------------------------------------------------------
# losses.py


def test_losses_by_hand():
    z, y = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([1, 0, 1])
    p = torch.sigmoid(z[:, 0])
    plain = -torch.where(y == 1, p.log(), (1 - p).log())
    torch.testing.assert_close(losses.classification_loss(z, y), plain.mean())
    w = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(losses.classification_loss(z, y, w), (plain * w[y]).sum() / w[y].sum())
    soft = y * 0.9 + 0.05
    smooth = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    torch.testing.assert_close(losses.classification_loss(z, y, smoothing=0.1), smooth)
    both = losses.two_logits(z)  # two logits of which one is 0 are one logit
    torch.testing.assert_close(losses.classification_loss(both, y, w), losses.classification_loss(z, y, w))
    labels = torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(losses.class_weights(labels, 2, "auto"), torch.tensor([4 / 6, 2.0]))
    assert losses.class_weights(labels, 3, "auto").isfinite().all()  # a class that is not there
    assert losses.class_weights(labels, 2, "none") is None
    assert losses.class_weights(labels, 2, "2.5").tolist() == [1.0, 2.5]


@pytest.mark.parametrize("classes", [2, 4])
def test_distillation_is_the_weighted_sum_of_label_and_teacher(classes):
    logits = torch.randn(6, 1 if classes == 2 else classes, generator=seeded(), requires_grad=True)
    labels, teacher = torch.randint(classes, (6,)), torch.rand(6, classes, generator=seeded(1)).softmax(1)
    hard = losses.classification_loss(logits, labels, smoothing=0.1)
    torch.testing.assert_close(losses.distillation_loss(logits, labels, teacher, 1.0, 3.0, smoothing=0.1), hard)
    soft = 0.0  # by hand, image by image
    for z, t in zip(losses.two_logits(logits), teacher, strict=True):
        t = t ** (1 / 3) / (t ** (1 / 3)).sum()
        s = (z / 3).exp() / (z / 3).exp().sum()
        soft += 9 * (t * (t / s).log()).sum() / 6
    for known in (6, 2, 0):  # an image without a label learns from the teacher alone
        some = torch.where(torch.arange(6) < known, labels, -1)
        hard = losses.classification_loss(logits[:known], labels[:known]) if known else 0.0
        found = losses.distillation_loss(logits, some, teacher, 0.3, 3.0)
        torch.testing.assert_close(found, 0.3 * hard + 0.7 * soft)


@pytest.mark.parametrize("classes", [2, 4])
def test_at_high_temperature_distillation_matches_logits(classes):
    """Hinton et al. 2015, eq. 4: as T grows the gradient tends to (z - v) / (N K), for logits of mean 0."""
    z, v = torch.randn(2, 5, classes, generator=seeded(), dtype=torch.double)
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    given = (z[:, 1:] - z[:, :1] if classes == 2 else z).requires_grad_()
    loss = losses.distillation_loss(given, torch.zeros(5).long(), v.softmax(1), 0.0, 500.0)
    (gradient,) = torch.autograd.grad(loss, given)
    expected = (z - v) / (5 * classes)
    torch.testing.assert_close(gradient, expected[:, 1:] if classes == 2 else expected, atol=2e-3, rtol=0.02)


@pytest.mark.parametrize("dtype", HALF)
def test_distillation_takes_half_precision(dtype):
    teacher, logits = torch.randn(2, 9, 5, generator=seeded()).mul(3).to(dtype)
    teacher, labels = teacher.softmax(1), torch.zeros(9).long()
    found = losses.distillation_loss(logits, labels, teacher, 0.5, 2.0)
    torch.testing.assert_close(found, losses.distillation_loss(logits.float(), labels, teacher.float(), 0.5, 2.0))


def test_the_detection_loss_falls_to_its_least_at_the_true_box():
    true = torch.tensor([[0.2, 0.3, 0.6, 0.8]])
    assert float(losses.box_loss(true, true)) == pytest.approx(0, abs=1e-6)
    found = [float(losses.box_loss(true + shift, true)) for shift in (0.05, 0.1, 0.3, 0.9)]
    assert found == sorted(found)
    # touching boxes of equal size: IoU 0, no gap in the hull, so GIoU 0; smooth L1 of 0.5 in two of four corners
    beside = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    assert float(losses.box_loss(*beside)) == pytest.approx(1 + 4 * (0.5 - 0.025) / 2, abs=1e-5)

    def voting(y, x, true):
        scores = torch.zeros(1, 10, 10)
        scores[0, y, x] = 5
        boxes = torch.tensor([[0.2, 0.3, 0.6, 0.8]])[..., None, None].expand(1, 4, 10, 10)
        return float(losses.detection_loss(boxes, scores.flatten(1).log_softmax(1).view(1, 10, 10), true))

    # the box is right both times, but the centre cell should be the one that votes for it
    assert voting(5, 3, true) < voting(0, 9, true)
    nothing_left = torch.tensor([[1.0, 0.3, 1.0, 0.3]])  # a lesion that the augmentation moved out of the frame
    assert math.isfinite(voting(0, 0, nothing_left))


# ---------------------------------------------------------------------------------------------------------------------
# phantoms.py


def test_phantoms_are_seeded_and_have_one_lesion_each():
    (pixels, labels, masks), again, other = (phantoms.phantoms(70, 48, seed) for seed in (3, 3, 4))
    assert (pixels.shape, pixels.dtype, masks.shape, masks.dtype) == (
        (70, 1, 48, 48),
        torch.uint8,
        (70, 48, 48),
        torch.bool,
    )
    assert all(torch.equal(a, b) for a, b in zip((pixels, labels, masks), again, strict=True))
    assert not torch.equal(pixels, other[0])
    assert labels.sum() == 28  # 40 %
    share = masks.float().mean((1, 2))
    assert ((share > 0.005) & (share < 0.25)).all()


def test_phantoms_show_the_signs_of_their_class():
    """Benign lesions are wider than tall and bright behind, malignant ones less so, as BI-RADS says."""
    pixels, labels, masks = phantoms.phantoms(200, 64, 0)
    boxes = torch.stack([box_of(m) for m in masks])
    aspect = ((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])).log()
    below = (masks.cumsum(1) > 0) & ~masks & (masks.any(1, keepdim=True))  # under the lesion, in its columns
    beside = ~masks.any(1, keepdim=True) & (below.any(2, keepdim=True))  # the same depths, in other columns

    def mean(where):
        return (pixels[:, 0] * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)

    shadow = mean(below) - mean(beside)
    for sign in (aspect, shadow):
        benign, malignant = sign[labels == 0], sign[labels == 1]
        assert benign.mean() - malignant.mean() > 0.7 * sign.std()
        assert benign.min() < malignant.max()  # and the classes overlap


# ---------------------------------------------------------------------------------------------------------------------
# query.py: k-center


def brute_k_center(points, k, centers):
    """The definition, in float64, from the full table of distances."""
    points, taken = points.double(), []
    if centers is None or not len(centers):
        if k == 0:
            return [], None
        taken = [int((points - points.mean(0)).square().sum(1).argmin())]
        centers = points[taken]
    nearest = (points[:, None] - centers.double()[None]).square().sum(2).amin(1)
    while len(taken) < k:
        left = nearest.clone()
        left[taken] = -1
        taken.append(int(left.argmax()))
        nearest = torch.minimum(nearest, (points - points[taken[-1]]).square().sum(1))
    return taken, float(nearest.amax()) ** 0.5


def plain_k_center(points, k, centers):
    """The algorithm as everybody writes it: one pass of direct differences a pick, in the numbers' own precision."""
    taken, distance = [], torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    while len(taken) < k:
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
        new = torch.cdist(points, points[taken[-1:]], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distance = torch.minimum(distance, new)
    return taken, float(distance.amax())


def test_k_center_is_the_brute_force_choice_on_hundreds_of_sets_with_duplicates():
    generator = torch.Generator().manual_seed(0)

    def below(n):
        return int(torch.randint(n, (1,), generator=generator))

    for trial in range(200):
        n, d = (1 + below(300), 1 + below(5)) if trial % 10 else (1200 + below(300), 128)  # the latter in work sets
        points = torch.randint(0, 4 if trial % 2 else 1000, (n, d), generator=generator).float()  # ties, exact copies
        points[below(n) :] = points[below(n)]
        centers = None if trial % 3 == 0 else torch.randint(0, 4, (below(5), d), generator=generator).float()
        k = below(n + 1) if d < 128 else below(40)
        picks, radius = query.k_center_greedy(points, k, centers)
        expected, expected_radius = brute_k_center(points, k, centers)
        assert picks.tolist() == expected, trial
        assert expected_radius is None or radius == pytest.approx(expected_radius, rel=1e-5), trial


@pytest.mark.parametrize("shape", [(2000, 3), (1500, 300), (4000, 128)])
def test_k_center_on_floats_equals_the_plain_algorithm_to_the_bit(shape):
    generator = torch.Generator().manual_seed(shape[1])
    gauss = torch.randn(shape, generator=generator)
    clusters = 50 * gauss[torch.randint(20, (len(gauss),), generator=generator)] + 0.01 * gauss
    half_copies = gauss[torch.randint(len(gauss) // 2, (len(gauss),), generator=generator)]
    corners = torch.randint(0, 2, shape, generator=generator).float()  # many at the same distance
    for name, x in {"far": gauss + 100, "clusters": clusters, "copies": half_copies, "corners": corners}.items():
        for centers in (x[:100] + 0.01, x[5:6]):
            picks, radius = query.k_center_greedy(x, 120, centers)
            plain, plain_radius = plain_k_center(x, 120, centers)
            assert picks.tolist() == plain, name
            assert radius == plain_radius, name


def test_k_center_on_awkward_sets():
    k_center = query.k_center_greedy
    same = torch.full((500, 8), 0.1)
    picks, radius = k_center(same, 500)  # one point, 500 times
    assert picks.tolist() == list(range(500))
    assert radius == 0
    assert k_center(same, 3, same[:1])[0].tolist() == [0, 1, 2]
    many = torch.full((1100, 256), 0.1)  # too many for a plain loop
    many[7] = 3
    assert k_center(many, 1100, many[:1])[0].tolist() == [7, *range(7), *range(8, 1100)]
    corners = torch.eye(600)  # everyone as far from everyone: ties beyond the work set
    assert k_center(corners, 600, corners[:1])[0].tolist() == [*range(1, 600), 0]
    picks, radius = k_center(torch.zeros(0, 4), 0)
    assert (picks.tolist(), picks.dtype, radius) == ([], torch.long, 0.0)
    near = torch.tensor([[1000.0, 1000.0], [1000.0001, 1000.0], [1000.0, 1000.0]])
    assert sorted(k_center(near, 3)[0].tolist()) == [0, 1, 2]
    for k in (-1, 5):
        with pytest.raises(ValueError, match="of 4 points"):
            k_center(torch.rand(4, 2), k)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN"):
            k_center(torch.tensor([[0.0], [bad]]), 1)
        with pytest.raises(ValueError, match="NaN"):
            k_center(torch.rand(3, 1), 1, torch.tensor([[bad]]))
    for points, centers in ((torch.rand(4), None), (torch.rand(4, 2), torch.rand(3, 3))):
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            k_center(points, 1, centers)
    doubles = torch.rand(50, 3, dtype=torch.double)
    assert k_center(doubles, 5)[0].tolist() == brute_k_center(doubles, 5, None)[0]


def test_k_center_takes_finite_numbers_of_any_size():
    """Squares of these overflow or vanish; a power of two changes nothing but the radius."""
    generator = torch.Generator().manual_seed(0)
    x, biggest = torch.randn(1500, 100, generator=generator), {torch.float32: 126, torch.float64: 1022}
    for dtype, most in biggest.items():
        points = x.to(dtype)
        for centers in (None, points[:7] + 0.5):
            expected, radius = query.k_center_greedy(points, 40, centers)
            for power in (most - 3, 70, -50, 20 - most):
                shift = torch.tensor(2.0, dtype=dtype) ** power
                picks, there = query.k_center_greedy(points * shift, 40, None if centers is None else centers * shift)
                assert torch.equal(picks, expected), (dtype, power)
                assert there == pytest.approx(radius * 2.0**power, rel=1e-6), (dtype, power)
    assert query.k_center_greedy(torch.tensor([[3e38], [-3e38], [0.0]]), 3)[0].tolist() == [2, 0, 1]
    assert query.k_center_greedy(torch.tensor([[1e-44], [4e-45], [0.0]]), 3)[0].tolist() == [1, 0, 2]


def test_query_takes_arrays_lists_half_precision_and_leaves_gradients_alone(recwarn):
    x = torch.randint(0, 60, (40, 6), generator=torch.Generator().manual_seed(0))
    expected = query.k_center_greedy(x.float(), 9, x[:3].float())
    forms = [x, x.tolist(), x.numpy(), x.half(), x.bfloat16(), x.numpy().astype(np.float16), x.double().numpy()]
    for form in [*forms, x.float().requires_grad_()]:
        picks, radius = query.k_center_greedy(form, 9, form[:3])
        assert torch.equal(picks, expected[0])
        assert radius == pytest.approx(expected[1], rel=1e-6)
        p = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(1)).softmax(2)
        given = (p[0], list(range(5)), np.arange(5, 40), torch.Generator().manual_seed(2), p.requires_grad_(), p)
        reference = (p[0].detach(), torch.arange(5), torch.arange(5, 40), torch.Generator().manual_seed(2), p, p)
        context, plain = query.Context(form, *given), query.Context(x.float(), *reference)
        assert not context.embeddings.requires_grad
        assert not context.probabilities.requires_grad
        for name, strategy in query.STRATEGIES.items():
            assert torch.equal(strategy(context, 6), strategy(plain, 6)), name
    assert not recwarn.list


def test_k_center_measures_few_distances(monkeypatch):
    """The hardest case, isotropic Gaussians: what is measured by direct differences, beside what a plain loop would."""
    x, measured = torch.randn(5000, 256, generator=torch.Generator().manual_seed(0)), [0]
    before = query.direct

    def count(a, b):
        out = before(a, b)
        measured[0] += out.numel()
        return out

    monkeypatch.setattr(query, "direct", count)
    picks, _ = query.k_center_greedy(x, 100, x[:100] + 0.01)
    assert picks.tolist() == plain_k_center(x, 100, x[:100] + 0.01)[0]
    assert measured[0] < 0.02 * len(x) * 200


def test_k_center_needs_little_memory():
    """At 40,000 x 256 (41 MB): a table of all pairs would be 6.4 GB, one of all points against the picks 16 MB."""
    code = (
        "import re, torch, query; x = torch.randn(40_000, 256, generator=torch.Generator().manual_seed(0));"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"  # ru_maxrss is inherited
        "query.k_center_greedy(x[:1000], 5); before = peak(); query.k_center_greedy(x, 100);"
        "query.k_center_greedy(x, 100, x[:100] + 1); print((peak() - before) / 1024)"
    )
    assert float(run("-c", code).stdout) < 60


# ---------------------------------------------------------------------------------------------------------------------
# query.py: strategies


def toy_context(**more):
    """Six images: two near each other and labelled; one sure and far; two unsure; a copy of a labelled one."""
    embeddings = torch.tensor([[0.0, 1.0], [0.1, 1.0], [9.0, 0.0], [1.0, 2.0], [1.0, 2.5], [0.0, 1.0]])
    positive = torch.tensor([0.0, 0.1, 0.99, 0.5, 0.35, 0.02])
    p = torch.stack([1 - positive, positive], 1)
    return query.Context(embeddings, p, [0, 1], [2, 3, 4, 5], torch.Generator().manual_seed(0), **more)


def test_each_strategy_chooses_what_it_should_on_a_toy_pool():
    context = toy_context()
    assert query.query_entropy(context, 2).tolist() == [3, 4]
    assert query.query_coreset(context, 3).tolist() == [2, 4, 3]
    assert sorted(query.query_random(context, 4).tolist()) == [2, 3, 4, 5]
    # gradient: (p - one-hot) x embedding; by hand: 2 -> 0.01 * 9, 3 -> 0.5 * 2.2, 4 -> 0.35 * 2.7, 5 -> 0.02 * 1
    assert query.query_badge(context, 1).tolist() == [3]
    opinions = torch.tensor([[0.5, 0.5, 0.9, 0.5, 0.2, 0.0], [0.5, 0.5, 0.9, 0.5, 0.8, 0.0]])
    members = torch.stack([1 - opinions, opinions], 2)
    assert query.query_committee(toy_context(members=members), 1).tolist() == [4]  # 3 is unsure, but all agree
    assert query.query_bald(toy_context(sampled=members), 1).tolist() == [4]


def test_typiclust_takes_the_typical_image_of_the_largest_cluster_without_a_label():
    generator = torch.Generator().manual_seed(0)
    angle = torch.cat([at + 0.02 * torch.randn(n, generator=generator) for at, n in ((0, 30), (1.5, 20), (3, 10))])
    x = torch.stack([angle.cos(), angle.sin()], 1)
    picks = query.query_typiclust(query.Context(x, None, [0], torch.arange(1, 60), generator), 2).tolist()
    assert 30 <= picks[0] < 50  # the cluster of 30 has a label
    assert 50 <= picks[1] < 60
    assert (angle[picks[0]] - angle[30:50].median()).abs() < 0.02
    first = query.query_typiclust(query.Context(x, None, [], torch.arange(60), generator), 3).tolist()
    assert sorted(0 if i < 30 else 1 if i < 50 else 2 for i in first) == [0, 1, 2]  # a cold start: one of each cluster


def test_k_means_is_lloyds_algorithm_from_the_seeds_of_k_means_plus_plus():
    """Against the same from the full tables of distances, with the same draws: copies, and nearly the same points."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = F.normalize(torch.randn(300, 40, generator=generator) + 3, dim=1)
        x[200:] = x[:100] + (seed % 2) * 1e-4
        k = 30 + 40 * seed

        def distance_to(i, x=x):
            return (x - x[i]).square().sum(1)

        draws = torch.Generator().manual_seed(seed)
        first = int(torch.randint(len(x), (1,), generator=draws))
        centers = x[query.spread(distance_to, first, k, draws)]
        for _ in range(20):
            expected = torch.cdist(x, centers).argmin(1)
            for c in range(k):
                if (expected == c).any():
                    centers[c] = x[expected == c].mean(0)
        found = query.k_means(x, k, torch.Generator().manual_seed(seed))
        assert (found == expected).double().mean() > 0.99  # float32: a mean in another order rounds otherwise


def test_mutual_information_is_the_mean_divergence_from_the_consensus():
    p = torch.rand(5, 40, 3, generator=torch.Generator().manual_seed(0)).softmax(2)
    mean = p.mean(0, keepdim=True)
    divergence = (p * (p / mean).log()).sum(2).mean(0)
    torch.testing.assert_close(query.mutual_information(p), divergence, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 5])
def test_badge_measures_the_gradients_of_the_last_layer(classes, monkeypatch):
    """Squared distances against those of the gradients that autograd gives for the predicted label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 7, generator=generator)
    weight = torch.randn(classes, 7, generator=generator, requires_grad=True)
    logits = x @ weight.T
    gradients = []
    for z in logits:
        loss = F.cross_entropy(z[None], z.argmax()[None])
        gradients.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten())
    gradients = torch.stack(gradients)
    seen = {}

    def record(distance_to, first, k, generator):
        seen.update(distances=torch.stack([distance_to(i) for i in range(12)]), first=first)
        return torch.arange(k)

    monkeypatch.setattr(query, "spread", record)
    query.query_badge(query.Context(x, logits.softmax(1), [], torch.arange(12), generator), 3)
    torch.testing.assert_close(seen["distances"], torch.cdist(gradients, gradients).square(), atol=1e-4, rtol=1e-3)
    assert seen["first"] == int(gradients.norm(dim=1).argmax())


def test_spread_draws_by_squared_distance_and_never_twice():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    generator = torch.Generator().manual_seed(0)

    def distance_to(i):
        return (x - x[i]).square().sum(1)

    second = [int(query.spread(distance_to, 0, 2, generator)[1]) for _ in range(4000)]
    assert second.count(2) / 4000 == pytest.approx(0.9, abs=0.02)  # 9 : 1
    copies = torch.zeros(6, 2)
    picks = query.spread(lambda i: (copies - copies[i]).square().sum(1), 2, 6, generator)
    assert sorted(picks.tolist()) == list(range(6))


def test_every_strategy_returns_distinct_unlabelled_images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 9, generator=generator)
    x[30:] = x[:30]  # exact copies
    p = torch.rand(4, 60, 3, generator=generator).softmax(2)
    labelled, unlabelled = torch.arange(0, 60, 4), torch.tensor([i for i in range(60) if i % 4])
    for name, strategy in query.STRATEGIES.items():
        for k in (1, 7, len(unlabelled)):
            contexts = [query.Context(x, p.mean(0), labelled, unlabelled, None, p, p) for _ in range(2)]
            for context in contexts:
                context.generator = torch.Generator().manual_seed(k)
            picks, again = (strategy(context, k) for context in contexts)
            assert picks.dtype == torch.long, name
            assert len(set(picks.tolist())) == k, name
            assert set(picks.tolist()) <= set(unlabelled.tolist()), name
            assert torch.equal(again, picks), name


def test_one_image_of_each_unlabelled_group_is_offered():
    groups = torch.tensor([7, 3, 3, 7, 5, 5, 9])
    assert query.candidates(groups, torch.tensor([1]), 2).tolist() == [0, 4, 6]  # 2 shows what 1 shows
    assert query.candidates(groups, torch.tensor([1]), 4).tolist() == [0, 2, 3, 4, 5, 6]  # too few groups: all
    assert query.candidates(groups, torch.empty(0, dtype=torch.long), 3).tolist() == [0, 1, 4, 6]


def test_the_example_of_query_runs_as_printed():
    example = [line[4:] for line in query.__doc__.splitlines() if line.startswith("    ")]
    room = {}
    exec("\n".join(example), room)
    assert len(example) == 5
    assert room["picks"].shape == (20,)
    assert (room["picks"] >= 10).all()


# ---------------------------------------------------------------------------------------------------------------------
# data.py: one image


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (50, 50), (1, 1), (3, 200), (20_000, 30)])
def test_letterbox_keeps_the_aspect_ratio_and_pads_with_the_mean(width, height):
    image = picture(width, height)
    square, (sx, sy, left, top) = data.letterbox(image, 64)
    assert square.shape == (1, 64, 64)
    w, h = round(width * sx), round(height * sy)
    assert max(w, h) == 64
    assert abs(w / h - width / height) <= max(1, width / height) / min(w, h)  # up to the rounding of the short side
    content = square[0, top : top + h, left : left + w]
    outside = np.ones((64, 64), bool)
    outside[top : top + h, left : left + w] = False
    assert (square[0][outside] == round(float(content.mean()))).all()
    assert abs(float(square.mean()) - float(content.mean())) <= 0.5


def test_letterbox_places_points_where_it_says():
    image = Image.new("L", (200, 100))
    ImageDraw.Draw(image).rectangle([120, 40, 139, 59], fill=255)
    square, (sx, sy, left, top) = data.letterbox(image, 100)
    ys, xs = np.nonzero(square[0] > 200)
    assert xs.min() == pytest.approx(120 * sx + left, abs=1)
    assert xs.max() + 1 == pytest.approx(140 * sx + left, abs=1)
    assert ys.min() == pytest.approx(40 * sy + top, abs=1)


def awkward_images(folder):
    """Files of every mode that a user may have; the left half is dark, the right half bright."""
    base = np.zeros((20, 30), np.uint8)
    base[:, 15:] = 200
    grey = Image.fromarray(base)
    rgb = grey.convert("RGB")
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(base > 0, 255, 0).astype(np.uint8)))
    hidden = Image.fromarray(np.full((20, 30, 4), 255, np.uint8))  # white behind full transparency must not be seen
    hidden.putalpha(Image.fromarray(np.where(base > 0, 200, 0).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(base)))
    files = {}
    for name, image, options in [
        ("grey.png", grey, {}),
        ("rgb.png", rgb, {}),
        ("rgba.png", rgba, {}),
        ("hidden.png", hidden, {}),
        ("palette.png", rgb.quantize(8), {}),
        ("palette_transparent.png", rgb.quantize(8), {"transparency": rgb.quantize(8).getpixel((0, 0))}),
        ("cmyk.jpg", rgb.convert("CMYK"), {"quality": 95}),
        ("sixteen.png", Image.fromarray(base.astype(np.uint16) * 10), {}),
        ("float.tif", Image.fromarray(base.astype(np.float32) / 255), {}),
        ("bilevel.png", grey.convert("1"), {}),
        ("exif.jpg", turned, {"exif": exif, "quality": 95}),
    ]:
        image.save(folder / name, **options)
        files[name] = folder / name
    return files


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_mode_is_read_upright_with_its_contrast(tmp_path, channels):
    for name, path in awkward_images(tmp_path).items():
        image = data.read_image(path, channels)
        assert image.mode == ("L" if channels == 1 else "RGB"), name
        assert image.size == (30, 20), name
        values = np.asarray(image).reshape(20, 30, -1).astype(int)
        assert values[:, 17:].mean() - values[:, :13].mean() > 120, name


def bad_files(folder):
    good = folder / "good.png"
    picture().save(good)
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(good.read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(folder / "bomb.png")
    good.unlink()
    return {"text.png": "not an image", "cut.png": "damaged", "empty.jpg": "not an image", "bomb.png": "million pixels"}


def test_bad_files_say_what_is_wrong(tmp_path):
    for name, why in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=why):
            data.read_image(tmp_path / name, 1)
    with pytest.raises(InputError, match="no such file"):
        data.read_image(tmp_path / "nowhere.png", 1)


def test_join_groups_near_duplicates_over_both_sets():
    a, b = data.phantom_set(8, 32, seed=1), data.phantom_set(6, 32, seed=2)
    b.thumbnails[4] = a.thumbnails[2].flip(2)  # the mirror image of one of a's
    both = data.join(a, b)
    assert len(both) == 14
    assert both.groups[12] == both.groups[2]
    assert len(both.groups.unique()) == 13
    assert torch.equal(both.pixels[8:], b.pixels)
    assert torch.equal(both.labels, torch.cat([a.labels, b.labels]))
    assert torch.equal(both.masks[8:], b.masks)
    assert both.names == a.names + b.names
    b.masks = b.thumbnails = None  # of too many images
    assert data.join(a, b).masks is None
    assert len(data.join(a, b).groups.unique()) == 14


# ---------------------------------------------------------------------------------------------------------------------
# data.py: readers


def test_class_folders_with_masks(tmp_path):
    class_folders(tmp_path, {"benign": 4, "malignant": 3, "normal": 2})
    second = Image.new("L", (60, 40))
    ImageDraw.Draw(second).rectangle([50, 30, 54, 34], fill=255)
    second.save(tmp_path / "benign" / "benign (2)_mask_1.png")
    images = quiet_load(tmp_path, 60, positive="malignant")
    assert len(images) == 9
    assert images.classes == ["benign+normal", "malignant"]
    assert images.labels.tolist() == [0] * 4 + [1] * 3 + [0] * 2
    assert not any("_mask" in Path(n).name for n in images.names)
    assert images.boxes[7:].isnan().all()  # normal: all-black masks, so no lesion and no box
    for i in range(7):  # the box is that of the union of the masks
        np.testing.assert_allclose(images.boxes[i] * 60, data.box_of(images.masks[i].numpy()), atol=1.01)
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
    with pytest.raises(InputError, match="no such class"):
        order(["a", "b"], positive="z")
    with pytest.raises(InputError, match="no such class"):
        order(["a", "b"], drop=["z"])
    with pytest.raises(InputError, match="no negative class"):
        order(["a", "b"], positive="a,b")


def test_source_splits_are_kept_and_a_missing_one_is_made(tmp_path):
    class_folders(tmp_path / "training_set", {"benign": 40, "malignant": 24})
    class_folders(tmp_path / "testing_set", {"benign": 5, "malignant": 5})
    images = quiet_load(tmp_path, 32)
    counts = {s: images.splits.count(s) for s in ("train", "val", "test")}
    assert counts["test"] >= 10  # all of testing_set; its near-duplicates in training_set do not move
    assert counts["val"] == pytest.approx(8, abs=2)
    assert all(("testing_set" in n) == (s == "test") for n, s in zip(images.names, images.splits, strict=True))


def test_patients_are_groups(tmp_path):
    for patient in ("8863", "10256", "9"):
        for label in "01":
            (tmp_path / patient / label).mkdir(parents=True)
            for i in range(3):
                picture(50, 50 if i else 31, int(patient) + i, "RGB").save(
                    tmp_path / patient / label / f"{patient}_idx5_x{i}_y1_class{label}.png"
                )
    images = quiet_load(tmp_path, 50)
    assert images.classes == ["no IDC", "IDC"]
    assert images.pixels.shape == (18, 3, 50, 50)
    assert len(images.groups.unique()) == 3
    for g in images.groups.unique():
        assert len({images.splits[i] for i in torch.nonzero(images.groups == g)[:, 0].tolist()}) == 1
    (tmp_path / "77").mkdir()
    with pytest.raises(InputError, match=r"77.*without patches"):
        quiet_load(tmp_path, 50)


def write_npz(path, n=20, positive=1, **more):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 4 == 0).astype(np.uint8)[:, None] ^ (1 - positive)
    arrays.update(more)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_npz_splits_boxes_and_the_flipped_labels_of_breastmnist(tmp_path):
    boxes = np.tile(np.array([7.0, 14, 21, 28]), (20, 1))
    boxes[3] = np.nan
    images = quiet_load(write_npz(tmp_path / "any.npz", train_bboxes=boxes), 28)
    assert (images.classes, images.splits.count("val")) == (["0", "1"], 10)
    np.testing.assert_allclose(images.boxes[0], [0.25, 0.5, 0.75, 1.0])
    assert images.boxes[3].isnan().all()
    assert images.boxes[20:].isnan().all()
    assert images.names[20].endswith("any.npz#val/0")
    flipped = quiet_load(write_npz(tmp_path / "breastmnist_28.npz", positive=0), 28)
    assert flipped.classes == ["benign", "malignant"]
    assert torch.equal(flipped.labels, images.labels)  # 0 is malignant there, and malignant is the positive class here
    again = quiet_load(tmp_path / "any.npz", 28, positive="0")
    assert torch.equal(again.labels, 1 - images.labels)


def test_npz_with_train_keys_alone_is_split(tmp_path):
    none = {f"{s}_{k}": None for s in ("val", "test") for k in ("images", "labels")}
    images = quiet_load(write_npz(tmp_path / "t.npz", n=100, **none), 28)
    for split, count in (("train", 70), ("val", 10), ("test", 20)):
        assert images.splits.count(split) == pytest.approx(count, abs=1)
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
    ]:
        with pytest.raises(InputError, match=why):
            quiet_load(write_npz(tmp_path / "x.npz", **change), 28)
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    with pytest.raises(InputError, match="no key train_images"):
        quiet_load(tmp_path / "y.npz", 28)
    (tmp_path / "z.npz").write_bytes(b"PK no zip")
    with pytest.raises(InputError, match=r"z.npz"):
        quiet_load(tmp_path / "z.npz", 28)


def write_csv(folder, rows, header="image,label,group,split,mask,age,sex,x_min,y_min,x_max,y_max"):
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "table.csv"


def test_csv_with_every_column(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(4):
        picture(40, 40, i).save(tmp_path / "deep" / f"ISIC_{i}.jpg")
    mask = Image.new("L", (40, 40))
    ImageDraw.Draw(mask).rectangle([10, 10, 19, 29], fill=255)
    mask.save(tmp_path / "m.png")
    table = write_csv(
        tmp_path,
        [
            "ISIC_0,mel,a,train,m.png,50,male,,,,",
            "ISIC_1.jpg,nv,a,train,,70,female,4,8,12,20",
            "deep/ISIC_2.jpg,nv,b,validation,,,male,,,,",
            "ISIC_3,,b,test,,60,unknown,,,,",
        ],
    )
    images = quiet_load(
        table, 40, positive="mel", columns={"meta": ["age", "sex"], "box": ["x_min", "y_min", "x_max", "y_max"]}
    )
    assert images.labels.tolist() == [1, 0, 0, -1]
    assert images.splits == ["train", "train", "val", ""]  # what has no label is in no split
    assert images.groups[0] == images.groups[1] != images.groups[2]
    np.testing.assert_allclose(images.boxes[0] * 40, [10, 10, 20, 30], atol=1e-4)
    np.testing.assert_allclose(images.boxes[1] * 40, [4, 8, 12, 20], atol=1e-4)
    assert images.meta_columns == ["age", "age missing", "sex=female", "sex=male", "sex missing"]
    sd = np.std([50, 70, 60])
    np.testing.assert_allclose(
        images.meta, [[-10 / sd, 0, 0, 1, 0], [10 / sd, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], atol=1e-6
    )
    new, _, _ = data.encode_meta([{"age": "50", "sex": "male"}, {}], None, images.meta_spec)
    np.testing.assert_allclose(new, [[-10 / sd, 0, 0, 1, 0], [0, 1, 0, 0, 1]], atol=1e-6)
    with pytest.raises(InputError, match="sex=robot: a value not seen in training"):
        data.encode_meta([{"sex": "robot"}], None, images.meta_spec)


def test_boxes_as_corner_and_size_are_told_apart(tmp_path):
    """As BUS-BRA has them: x, y, width, height, some of which pass for two corners."""
    for i in range(4):
        picture(40, 40, i).save(tmp_path / f"{i}.png")
    rows = [f'{i},{"ab"[i % 2]},"{b}"' for i, b in enumerate(["2,3,20,30", "8,20,9,10", "20,3,8,30", "1,1,39,39"])]
    table = write_csv(tmp_path, rows, header="image,label,BBOX")
    with pytest.raises(
        InputError, match=r"2 of 4 images can't be read.*all 4 boxes make sense as xywh: give --box-format xywh"
    ):
        quiet_load(table, 32, columns={"box": ["BBOX"]})
    images = quiet_load(table, 32, columns={"box": ["BBOX"]}, box_format="xywh")
    np.testing.assert_allclose(images.boxes[:2] * 40, [[2, 3, 22, 33], [8, 20, 17, 30]], atol=1e-4)
    args = parse(["--data", str(table), "--box-columns", "BBOX", "--box-format", "xywh", "--cache", str(tmp_path)])
    assert torch.equal(train.load_images(args, log=lambda _: None).boxes, images.boxes)


def test_csv_mistakes_name_the_column_or_the_line(tmp_path):
    for i in range(3):
        picture(40, 40, i).save(tmp_path / f"{i}.png")
    table = write_csv(tmp_path, ["0,a,,,,,,,,,", "1,b,,,,,,,,,"])
    for columns, why in [({"group": "lesion"}, "no column 'lesion'"), ({"meta": ["weight"]}, "no column 'weight'")]:
        with pytest.raises(InputError, match=why):
            quiet_load(table, 32, columns=columns)
    box = {"box": ["x_min", "y_min", "x_max", "y_max"]}
    for row, why in [
        ("1,b,,nowhere,,,,,,,", "line 3: split"),
        ("1,b,,,,,,9,9,3,3", r"1: its box \(9.0, 9.0, 3.0, 3.0\) is no x_min, y_min, x_max, y_max in its 40x40 pixels"),
        (",b,,,,,,,,,", "line 3: no image"),
    ]:
        with pytest.raises(InputError, match=why):
            quiet_load(write_csv(tmp_path, ["0,a,,,,,,,,,", row]), 32, columns=box)
    with pytest.raises(InputError, match="--image-column"):
        quiet_load(write_csv(tmp_path, ["0,a"], header="file,label"), 32)
    with pytest.raises(InputError, match=r"gone: no such file"):
        quiet_load(write_csv(tmp_path, ["0,a,,,,,,,,,", "gone,b,,,,,,,,,"]), 32)


def test_a_folder_without_labels_is_a_pool(tmp_path):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    images = quiet_load(tmp_path, 32)
    assert images.labels.tolist() == [-1] * 3
    assert images.splits == [""] * 3
    assert "3 not labelled" in images.summary()


def test_sources_that_are_not_there(tmp_path):
    for source, why in [(tmp_path / "no", "no such file"), (tmp_path, "no images found")]:
        with pytest.raises(InputError, match=why):
            quiet_load(source, 32)
    (tmp_path / "HAM_metadata.csv").write_text("a\n")
    with pytest.raises(InputError, match=r"HAM_metadata.csv: give that file"):
        quiet_load(tmp_path, 32)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match="neither a folder"):
        quiet_load(tmp_path / "x.txt", 32)


def test_all_bad_images_are_listed_at_once_or_skipped(tmp_path, capsys):
    class_folders(tmp_path)
    bad = bad_files(tmp_path / "benign")
    small = Image.new("L", (10, 10))
    small.save(tmp_path / "malignant" / "malignant (1)_mask.png")  # a mask of another size than its image
    with pytest.raises(InputError) as e:
        quiet_load(tmp_path, 32)
    assert "5 of 24 images can't be read" in str(e.value)
    assert all(name in str(e.value) for name in bad)
    assert "its mask" in str(e.value)
    for cache in (None, tmp_path / "cache"):
        images = quiet_load(tmp_path, 32, skip_bad=True, cache=cache)
        assert len(images) == 19
        assert images.labels.sum() == 7
    assert "skipped" in capsys.readouterr().out


def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "set")
    first = quiet_load(source, 32, cache=tmp_path / "cache")
    with monkeypatch.context() as m:
        m.setattr(data, "decode_entry", lambda *_: pytest.fail("decoded again"))
        second = quiet_load(source, 32, cache=tmp_path / "cache")
    plain = quiet_load(source, 32)
    for images in (second, plain):
        assert torch.equal(first.pixels, images.pixels)
        assert torch.equal(first.masks, images.masks)
        assert torch.equal(first.boxes.nan_to_num(-1), images.boxes.nan_to_num(-1))
    changed = next((source / "benign").glob("*(3).png"))
    Image.new("L", (60, 40), 77).save(changed)
    third = quiet_load(source, 32, cache=tmp_path / "cache")
    assert (third.pixels[third.names.index(str(changed))] == 77).all()
    assert not list((tmp_path / "cache").glob("*.part"))
    (tmp_path / "pool").mkdir()
    picture().save(tmp_path / "pool" / "i.png")
    for _ in range(2):  # a source without masks costs no room for them
        assert quiet_load(tmp_path / "pool", 32, cache=tmp_path / "plain").masks is None
    assert sum(p.stat().st_size for p in (tmp_path / "plain").rglob("masks.u8")) == 0


def test_a_cache_that_can_not_be_written_is_one_line(tmp_path):
    source = class_folders(tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache"):
        quiet_load(source, 32, cache=tmp_path / "file")


def test_dummy_boxes_are_said_to_be_dummies(tmp_path):
    images = quiet_load(write_npz(tmp_path / "a.npz"), 28, dummy_boxes=True)
    assert images.boxes.isfinite().all()
    assert "PLACEHOLDERS" in images.summary()


# ---------------------------------------------------------------------------------------------------------------------
# data.py: groups and splits


def test_near_duplicates_are_found_and_named(tmp_path):
    for name in ("benign", "malignant"):
        (tmp_path / name).mkdir()
        for i in range(12):
            picture(80, 60, seed=i + 50 * (name == "malignant")).save(tmp_path / name / f"{i}.png")
    original = Image.open(tmp_path / "benign" / "0.png")
    Image.fromarray((np.asarray(original) * 0.7 + 20).astype(np.uint8)).save(tmp_path / "benign" / "brighter.png")
    original.resize((160, 120)).save(tmp_path / "benign" / "larger.jpg", quality=60)
    original.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "malignant" / "mirrored.png")
    said = []
    images = quiet_load(tmp_path, 64, log=said.append)
    index = {Path(n).name: i for i, n in enumerate(images.names)}
    same = [index[n] for n in ("brighter.png", "larger.jpg", "mirrored.png")] + [0]
    assert len(images.groups[same].unique()) == 1
    assert len(images.groups.unique()) == len(images) - 3
    opposite = [line for line in said if "OPPOSITE" in line]
    assert len(opposite) == 3
    assert all("mirrored.png" in line for line in opposite)


def test_near_duplicates_against_brute_force():
    thumbs = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    thumbs[7], thumbs[30] = thumbs[2], thumbs[5].flip(2)
    pairs, similarity = data.near_duplicates(thumbs, threshold=0.3)
    x = thumbs.double().flatten(1).numpy()
    mirrored = thumbs.flip(3).double().flatten(1).numpy()
    expected = {}
    for i in range(40):
        for j in range(i + 1, 40):
            value = max(np.corrcoef(x[i], x[j])[0, 1], np.corrcoef(x[i], mirrored[j])[0, 1])
            if value >= 0.3:
                expected[i, j] = value
    assert {tuple(p) for p in pairs.tolist()} == set(expected)
    np.testing.assert_allclose(similarity, list(expected.values()), atol=1e-5)


def test_no_option_that_changes_the_pixels_changes_the_splits(tmp_path):
    """Else a teacher, a search over sizes or pretrained weights would have seen what is a test image elsewhere."""
    for name, few in (("benign", 0), ("malignant", 40)):
        (tmp_path / name).mkdir()
        for i in range(40):
            sketch = picture(90, 70, seed=few + i)
            sketch.save(tmp_path / name / f"{i}.png")
            if i % 4 == 0:  # the same a little cut at the bottom, noisy, of another format
                cut = np.asarray(sketch.crop((0, 0, 90, 66))).astype(float)
                cut += np.random.default_rng(i).normal(0, 10, cut.shape)
                Image.fromarray(cut.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i} again.jpg", quality=40)
    first = quiet_load(tmp_path, 16)
    assert len(first.groups.unique()) == 80
    for options in (
        {"size": 61},
        {"size": 16, "equalise": True},
        {"size": 128, "channels": 3, "cache": tmp_path / "c"},
    ):
        other = quiet_load(tmp_path, **options)
        assert torch.equal(other.groups, first.groups)
        assert other.splits == first.splits


@pytest.mark.parametrize("seed", range(20))
def test_partition_is_stratified_and_splits_no_group(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(300, generator=generator) < 0.3).long()
    groups = torch.randint(0, 120, (300,), generator=generator)
    part = data.partition(labels, groups, [0.7, 0.1, 0.2], seed)
    assert torch.equal(part, data.partition(labels, groups, [0.7, 0.1, 0.2], seed))
    assert not torch.equal(part, data.partition(labels, groups, [0.7, 0.1, 0.2], seed + 1))
    for g in groups.unique():
        assert len(part[groups == g].unique()) == 1
    for k, share in enumerate((0.7, 0.1, 0.2)):
        for c in (0, 1):
            assert float((part[labels == c] == k).float().mean()) == pytest.approx(share, abs=0.05)


def test_merge_groups_is_transitive():
    groups = data.merge_groups(torch.arange(6), torch.tensor([[0, 3], [3, 5], [1, 2]]))
    assert groups[0] == groups[3] == groups[5]
    assert groups[1] == groups[2]
    assert len(groups.unique()) == 3


# ---------------------------------------------------------------------------------------------------------------------
# data.py: resampling and augmentation


# ---------------------------------------------------------------------------------------------------------------------
# data.py: phantoms


def test_phantoms_are_seeded_and_their_boxes_hold_their_masks():
    a, b, c = data.phantom_set(20, 64, 3), data.phantom_set(20, 64, 3), data.phantom_set(20, 64, 4)
    assert torch.equal(a.pixels, b.pixels)
    assert not torch.equal(a.pixels, c.pixels)
    assert a.labels.sum() == 8
    for mask, box in zip(a.masks, a.boxes, strict=True):
        np.testing.assert_allclose(box * 64, data.box_of(mask.numpy()))


@pytest.mark.parametrize("size", [32, 64])
def test_a_linear_model_on_the_phantoms_pixels_is_lost(size):
    images = quiet_load(None, size)
    x = images.pixels.flatten(1).float() / 255
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    train_rows, test_rows = images.rows("train"), torch.cat([images.rows("val"), images.rows("test")])
    best = 0.0
    for decay in (1e-3, 1e-1, 10.0):  # the best of three is generous to the linear model
        w = torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100)

        def closure(w=w, optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x[train_rows] @ w, images.labels[train_rows].float())
            (loss + decay * w @ w / len(train_rows)).backward()
            return loss

        optimizer.step(closure)
        best = max(best, float(metrics.auc((x[test_rows] @ w).detach(), images.labels[test_rows])))
    assert best < 0.75


# ---------------------------------------------------------------------------------------------------------------------
# models.py


@pytest.mark.parametrize("name", models.BACKBONES)
def test_every_backbone_makes_both_networks_and_takes_grey_images_unchanged(name):
    torch.manual_seed(0)
    features, width = models.build_backbone(name, channels=3)
    features.eval()
    grey = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        copied = features(grey.expand(-1, 3, -1, -1))
        models.fold_stem(features)
        torch.testing.assert_close(features(grey), copied, atol=1e-4, rtol=1e-3)
    assert copied.shape[1] == width
    net = models.CNet.__new__(models.CNet)  # the classifier around the same features
    models.CNet.__init__(net, name, classes=2, channels=1)
    net.eval()
    assert net(grey).shape == (2, 1)
    assert net.embed(grey).shape == (2, width)
    box = models.DNet(name, channels=1).eval()(grey)
    assert box.shape == (2, 4)
    assert (box[:, :2] < box[:, 2:]).all()


def test_logits_classes_and_metadata():
    x, meta = torch.rand(3, 3, 32, 32), torch.randn(3, 5)
    assert models.CNet("small_cnn", 7, 3)(x).shape == (3, 7)
    net = models.CNet("small_cnn", 2, 3, meta=5).eval()
    assert net(x, meta).shape == (3, 1)
    assert not torch.allclose(net(x, meta), net(x, meta + 1))
    with pytest.raises(InputError, match="metadata"):
        net(x)
    p = models.to_probabilities(torch.tensor([[0.3], [-2.0]]))
    torch.testing.assert_close(p[:, 1], torch.sigmoid(torch.tensor([0.3, -2.0])))
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    with pytest.raises(InputError, match="no such network"):
        models.CNet("resnet19")
    with pytest.raises(InputError, match="2 channels"):
        models.CNet("small_cnn", channels=2)


def test_every_network_standardises_each_image_by_itself():
    x = torch.rand(2, 1, 16, 16)
    a, b = models.standardise(x, "image"), models.standardise(x * 0.5 + 0.2, "image")
    torch.testing.assert_close(a, b, atol=0.2, rtol=0.1)  # gain and offset are gone, up to the guard for blank images
    assert models.standardise(torch.full((1, 1, 4, 4), 7, dtype=torch.uint8), "image").abs().max() < 1e-3
    torch.testing.assert_close(models.standardise(x, "fixed"), (x - 0.45) / 0.226)


def test_boxes_are_ordered_by_construction():
    torch.manual_seed(0)
    net = models.DNet("small_cnn", channels=1)
    for p in net.head.parameters():  # whatever the weights
        torch.nn.init.normal_(p, std=3.0)
    box = net(torch.rand(16, 1, 64, 64))
    assert (box[:, :2] < box[:, 2:]).all()


def test_feature_pyramid_ends_in_the_features():
    features, _ = models.build_backbone("small_cnn", 1)
    features.eval()
    x = torch.rand(1, 1, 64, 64)
    maps = models.feature_pyramid(features, x)
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(set(sides), reverse=True)
    torch.testing.assert_close(maps[-1], features(x))


def test_ensemble_by_hand():
    torch.manual_seed(0)
    members = [models.CNet("small_cnn", 2, 1).eval() for _ in range(3)]
    ensemble = models.Ensemble(members, [0.5, 0.3, 0.2], classes=["a", "b"], size=32)
    x = torch.rand(4, 1, 32, 32)
    p = [torch.sigmoid(m(x)[:, 0]) for m in members]
    mean = 0.5 * p[0] + 0.3 * p[1] + 0.2 * p[2]
    torch.testing.assert_close(ensemble(x)[:, 1], mean, atol=1e-6, rtol=0)
    ensemble.info["temperature"] = 2.0
    expected = torch.sigmoid(torch.log(mean / (1 - mean)) / 2)
    torch.testing.assert_close(ensemble(x)[:, 1], expected, atol=1e-6, rtol=0)
    found, spread = ensemble.conclude(ensemble.opinions(x, views=1))
    torch.testing.assert_close(found[:, 1], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(spread, torch.stack(p).std(0, correction=0))


def small_model(**info):
    torch.manual_seed(0)
    classes = info.pop("classes", ["benign", "malignant"])
    roi = info.pop("roi", "none")
    members = [models.CNet("small_cnn", len(classes), 1, roi=roi) for _ in range(2)]
    for m in members:  # untrained logits would all be alike
        torch.nn.init.normal_(m.head.weight, std=1.0)
    return models.Ensemble(
        members, [0.7, 0.3], models.DNet("small_cnn", 1), classes=classes, size=32, load_size=32, channels=1, **info
    ).eval()


@pytest.mark.parametrize("kind", ["se", "condenser"])
def test_attention_starts_as_the_identity_and_learns(kind):
    torch.manual_seed(0)
    module = models.ATTENTION[kind](64)
    maps = torch.randn(2, 64, 5, 3, requires_grad=True)
    torch.testing.assert_close(module(maps), maps)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (module(maps) - 2 * maps.detach().relu()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    if kind == "se":  # by hand: one gate a channel
        gates = module(maps) / maps
        torch.testing.assert_close(gates, gates[:, :, :1, :1].expand_as(gates), atol=1e-4, rtol=1e-4)
    else:  # V + s V sigmoid(A), A the same over each condensed 2 x 2 block
        gates = ((module(maps) / maps - 1) / module.scale).detach()
        assert ((gates > -1e-3) & (gates < 1 + 1e-3)).all()
        torch.testing.assert_close(gates[:, :, 0, 0], gates[:, :, 1, 1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", list(models.ATTENTION))
def test_attention_is_saved_and_explained(tmp_path, kind):
    torch.manual_seed(0)
    net = models.CNet("small_cnn", attention=kind).eval()
    with torch.no_grad():
        for p in net.attention.parameters():
            p.normal_(std=0.3)
        net.head.weight.normal_()
    models.save(tmp_path / "m.pt", models.Ensemble([net], classes=["a", "b"], size=32, load_size=32, channels=1))
    again = models.load(tmp_path / "m.pt").members[0]
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(again(x), net(x))
    maps = net.features(models.standardise(x, "image")).detach().requires_grad_()  # Grad-CAM by hand, through it
    gradient = torch.autograd.grad(net.head(net.attention(maps).mean((2, 3))).sum(), maps)[0]
    by_hand = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).relu()
    large = F.interpolate(by_hand.detach()[:, None], size=(32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(saliency.grad_cam(net, x, 1, net.features), large, atol=1e-5, rtol=1e-4)


def test_a_network_that_sees_nothing_needs_patient_data():
    with pytest.raises(InputError, match="needs patient data"):
        models.CNet("none")
    torch.manual_seed(0)
    net = models.CNet("none", meta=3).eval()
    meta = torch.rand(4, 3)
    a, b = (net(torch.rand(4, 1, 32, 32), meta) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, net(torch.rand(4, 1, 32, 32), 1 - meta))


def test_a_model_file_suffices_to_predict(tmp_path):
    model = small_model(temperature=1.7, threshold=0.2, roi="dnet", classes=["a", "b", "c"])
    models.save(tmp_path / "m.pt", model)
    torch.load(tmp_path / "m.pt", weights_only=True)
    again = models.load(tmp_path / "m.pt")
    models.save(tmp_path / "run" / "model.pt", model)
    assert models.load(tmp_path / "run").info == model.info
    assert again.info == model.info
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x, again.locate(x)), model(x, model.locate(x)))
    assert not again.training


def test_what_is_no_model_file_is_said_to_be_none(tmp_path):
    models.save(tmp_path / "m.pt", small_model())
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:1000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    torch.save(argparse.Namespace(x=1), tmp_path / "object.pt")
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.save({**content, "version": 99}, tmp_path / "newer.pt")
    torch.save({k: v for k, v in content.items() if k != "members"}, tmp_path / "less.pt")
    for name, why in [
        ("cut", "damaged"),
        ("text", "damaged"),
        ("state", "not a model file"),
        ("object", "more than tensors"),
        ("newer", "version 99"),
        ("less", "parts missing"),
        ("nowhere", "no such file"),
    ]:
        with pytest.raises(InputError, match=why) as e:
            models.load(tmp_path / f"{name}.pt")
        assert "\n" not in str(e.value)


def test_weights_from_a_file(tmp_path, capsys):
    torch.manual_seed(1)
    source = torch.nn.Module()
    source.features = models.small_cnn()
    torch.save({**source.state_dict(), "classifier.weight": torch.zeros(3)}, tmp_path / "w.pth")
    net = models.CNet("small_cnn", 2, 3, weights=str(tmp_path / "w.pth"))
    for a, b in zip(source.features.state_dict().values(), net.features.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "1 in the file but not fitting: classifier.weight" in capsys.readouterr().out
    state = source.state_dict()
    state.pop("features.0.0.weight")
    torch.save(state, tmp_path / "w.pth")
    models.CNet("small_cnn", 2, 3, weights=str(tmp_path / "w.pth"))
    assert "1 missing in the file: features.0.0.weight" in capsys.readouterr().out
    torch.save({"x": torch.zeros(1)}, tmp_path / "none.pth")
    with pytest.raises(InputError, match="not one of its 1 tensors fits"):
        models.CNet("small_cnn", weights=str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match="no such file"):
        models.CNet("small_cnn", weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(InputError, match="small_cnn is our own"):
        models.CNet("small_cnn", weights="imagenet")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "last.pt"
    models.write_atomically(path, b"old")
    (tmp_path / "last.pt.part").symlink_to("/dev/full")  # every write to it fails: no space left on device
    with pytest.raises(InputError, match="No space left"):
        models.write_atomically(path, b"new" * 100_000)
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------------------------
# metrics.py


@pytest.mark.parametrize("seed", range(30))
def test_auc_is_the_share_of_ordered_pairs(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(4, 40)
    scores = rng.integers(0, 6, n) / 5  # many ties
    labels = rng.integers(0, 2, n)
    labels[:2] = [0, 1]
    pairs = [
        (s > t) + 0.5 * (s == t)
        for s, y in zip(scores, labels, strict=True)
        if y
        for t, z in zip(scores, labels, strict=True)
        if not z
    ]
    value = metrics.auc(torch.tensor(scores), torch.tensor(labels))
    assert float(value) == pytest.approx(np.mean(pairs))
    fpr, tpr = metrics.roc_curve(torch.tensor(scores), torch.tensor(labels))
    assert float(torch.trapezoid(tpr, fpr)) == pytest.approx(np.mean(pairs))
    counts = rng.integers(0, 4, n)
    counts[:2] = 1
    drawn = np.repeat(np.arange(n), counts)  # a weight of 3 is the image three times
    weighted = metrics.auc(torch.tensor(scores), torch.tensor(labels), torch.tensor(counts)[None])
    plain = metrics.auc(torch.tensor(scores[drawn]), torch.tensor(labels[drawn]))
    assert float(weighted) == pytest.approx(float(plain))


def test_the_threshold_is_the_largest_that_reaches_the_sensitivity():
    rng = np.random.default_rng(0)
    for target in (0.5, 0.8, 0.95, 1.0):
        for _ in range(20):
            scores, labels = torch.tensor(rng.random(30).round(2)), torch.tensor(rng.integers(0, 2, 30))
            if not labels.any():
                continue
            candidates = [t for t in scores.tolist() if (scores[labels == 1] >= t).float().mean() >= target - 1e-9]
            assert metrics.threshold_for_sensitivity(scores, labels, target) == max(candidates)


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_by_counting(classes):
    rng = np.random.default_rng(classes)
    p = torch.tensor(rng.dirichlet(np.ones(classes), 50))
    y = torch.tensor(rng.integers(0, classes, 50))
    found = {k: float(v) for k, v in metrics.evaluate(p, y, 0.3).items()}
    said = (p[:, 1] >= 0.3).long() if classes == 2 else p.argmax(1)
    ratios = {"sensitivity": [], "specificity": [], "f1": [], "auc": []}
    for c in range(classes):
        tp = sum(int(a == c and b == c) for a, b in zip(said, y, strict=True))
        fp = sum(int(a == c and b != c) for a, b in zip(said, y, strict=True))
        fn = sum(int(a != c and b == c) for a, b in zip(said, y, strict=True))
        tn = 50 - tp - fp - fn
        ratios["sensitivity"].append(tp / (tp + fn))
        ratios["specificity"].append(tn / (tn + fp))
        ratios["f1"].append(2 * tp / (2 * tp + fp + fn))
        ratios["auc"].append(float(metrics.auc(p[:, c], y == c)))
    for name, values in ratios.items():
        assert found[name] == pytest.approx(values[1] if classes == 2 else np.mean(values)), name
    assert found["accuracy"] == pytest.approx(float((said == y).double().mean()))
    assert found["balanced_accuracy"] == pytest.approx(np.mean(ratios["sensitivity"]))
    predicted, true = (p[:, 1], y == 1) if classes == 2 else (p.max(1).values, p.argmax(1) == y)
    error = 0.0
    for b in range(metrics.BINS):
        inside = (predicted * metrics.BINS).long() == b
        if inside.any():
            error += float(inside.double().mean()) * abs(float(true[inside].double().mean() - predicted[inside].mean()))
    assert found["ece"] == pytest.approx(error)
    assert metrics.confusion(said, y, classes).sum() == 50


def test_the_bootstrap_draws_whole_groups():
    groups = torch.tensor([5, 5, 5, 2, 9, 9])
    weights = metrics.bootstrap_weights(groups, 500)
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert torch.equal(weights[:, 4], weights[:, 5])
    assert (weights[:, [0, 3, 4]].sum(1) == 3).all()  # three groups are drawn each time
    assert float(weights.mean()) == pytest.approx(1, abs=0.1)


def test_intervals_have_the_textbook_width_and_grow_with_groups(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    right = torch.rand(400, generator=generator) < 0.8
    p = torch.where(right, y, 1 - y).double() * 0.8 + 0.1
    p = torch.stack([1 - p, p], 1)
    m = metrics.with_intervals(p, y, torch.arange(400))["accuracy"]
    assert m["low"] < m["value"] < m["high"]
    normal = 2 * 1.96 * math.sqrt(m["value"] * (1 - m["value"]) / 400)
    assert m["high"] - m["low"] == pytest.approx(normal, rel=0.15)
    double = metrics.with_intervals(p.repeat(2, 1), y.repeat(2), torch.arange(400).repeat(2))["accuracy"]
    assert double["high"] - double["low"] == pytest.approx(normal, rel=0.15)  # copies of an image are no new evidence
    monkeypatch.setattr(metrics, "WEIGHTS_AT_ONCE", 400 * 300)  # as of a large split: in seven parts
    assert metrics.with_intervals(p, y, torch.arange(400))["accuracy"] == m


def binomial_tail(k, n, p):
    """P(X >= k), by adding."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_the_interval_of_a_share_is_clopper_and_pearsons():
    for k, n in ((0, 5), (3, 10), (33, 34), (34, 34), (150, 160)):
        low, high = metrics.share_interval(k / n, n)
        assert low == 0 if k == 0 else binomial_tail(k, n, low) == pytest.approx(0.025, rel=1e-6)
        assert high == 1 if k == n else 1 - binomial_tail(k + 1, n, high) == pytest.approx(0.025, rel=1e-6)
    found = metrics.with_intervals([[0.1, 0.9]] * 34 + [[0.9, 0.1]] * 34, [1] * 34 + [0] * 34)
    assert metrics.interval_text(found["sensitivity"]) == "1.000 [0.897, 1.000]"
    assert metrics.interval_text(found["auc"]) == "1.000 [0.897, 1.000]"
    paired = metrics.with_intervals([[0.1, 0.9]] * 34 + [[0.9, 0.1]] * 34, [1] * 34 + [0] * 34, [*range(17)] * 4)
    assert paired["sensitivity"]["low"] == pytest.approx(
        0.025 ** (1 / 17)
    )  # two images a patient tell no more than one


@pytest.mark.parametrize("n", [20, 34, 160])
@pytest.mark.parametrize("size", [1, 3])
def test_intervals_hold_their_level_near_the_edge(monkeypatch, n, size):
    """Shares p of n groups of `size` images that share their fate: at least 93 % of 80 intervals hold p, also at 1."""
    monkeypatch.setattr(metrics, "REPLICATES", 300)
    generator, groups = torch.Generator().manual_seed(n), torch.arange(n).repeat_interleave(size)
    for p in (0.9, 0.97, 1.0):
        held, width = 0, 0.0
        for _ in range(80):
            good = (torch.rand(n, generator=generator) < p).double().repeat_interleave(size)

            def share(weights, good=good):
                return {"x": good.mean()[None] if weights is None else (weights.double() @ good) / weights.sum(1)}

            m = metrics.resample(share, groups, {"x": n})["x"]
            held, width = held + (m["low"] <= p <= m["high"]), width + (m["high"] - m["low"]) / 80
        assert held / 80 >= 0.93, (p, held)
        exact = sum(binomial_tail(k, n, p) - binomial_tail(k + 1, n, p) for k in range(n + 1))
        assert exact == pytest.approx(1)
        low, high = metrics.share_interval(round(p * n) / n, n)
        assert width < 1.5 * (high - low)


def test_too_few_say_so_and_a_missing_class_is_nan():
    found = metrics.with_intervals([[0.5, 0.5], [0.2, 0.8]], [0, 1])
    assert {metrics.interval_text(m)[6:] for m in found.values()} == {"(too few)"}
    assert metrics.interval_text({"value": None, "low": None, "high": None}) == "nan (too few)"
    benign = metrics.with_intervals([[0.9, 0.1]] * 8, [0] * 8)
    assert math.isnan(benign["auc"]["value"])
    assert math.isnan(benign["sensitivity"]["low"])
    assert benign["specificity"]["low"] == pytest.approx(0.025 ** (1 / 8))
    assert math.isnan(metrics.threshold_for_sensitivity([0.1, 0.2], [0, 0], 0.9))
    assert math.isnan(metrics.threshold_for_balance([0.1, 0.2], [0, 0]))
    assert metrics.roc_curve([0.1, 0.2], [0, 0])[1][1:].isnan().all()
    assert math.isnan(metrics.fit_temperature(torch.zeros(0, 2), []))


def test_pairs_without_a_difference_leave_something_open():
    p, labels = [[1 - x, x] for x in (0.1, 0.2, 0.3, 0.6, 0.7, 0.8) * 5], [0, 0, 0, 1, 1, 1] * 5
    same = metrics.change_with_intervals((p, 0.5, None), (p, 0.5, None), labels)
    assert same["sensitivity"]["high"] == -same["sensitivity"]["low"] == pytest.approx(1 - 0.025 ** (1 / 15))
    assert (same["auc"]["before"], same["auc"]["after"], same["auc"]["value"]) == (1, 1, 0)


def test_arrays_and_lists_are_taken_and_what_does_not_fit_is_said():
    generator = np.random.default_rng(0)
    p, labels = generator.random((40, 2), np.float32), generator.integers(0, 2, 40)
    p /= p.sum(1, keepdims=True)
    groups = [f"patient {i // 2:02d}" for i in range(40)]
    expected = metrics.with_intervals(torch.from_numpy(p), torch.from_numpy(labels), torch.arange(40) // 2)
    assert metrics.with_intervals(p, labels, groups) == expected
    for wrong, why in [
        (lambda: metrics.with_intervals(p, labels[:9]), "labels of shape"),
        (lambda: metrics.with_intervals(p, labels + 1), "from 0 to 1"),
        (lambda: metrics.with_intervals(p[:, :1], labels), "a column a class"),
        (lambda: metrics.with_intervals(p, labels, groups[:3]), "3 groups for 40 images"),
        (lambda: metrics.with_intervals(p * np.nan, labels), "holds NaN"),
        (lambda: metrics.auc(p[:, 1], labels, torch.ones(40)), r"must be \(B, 40\)"),
        (lambda: metrics.paired_iou(torch.ones(3, 4), torch.ones(2, 4)), "must both be"),
        (lambda: metrics.threshold_for_sensitivity(p[:, 1], labels, 1.5), r"in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=why):
            wrong()


def test_iou_by_counting_pixels():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 10, (50, 2, 2))
    boxes = torch.tensor(np.concatenate([low, low + rng.integers(1, 10, (50, 2, 2))], 2)).float()
    for a, b in boxes:
        grids = []
        for x0, y0, x1, y1 in (a.long().tolist(), b.long().tolist()):
            grid = np.zeros((20, 20), bool)
            grid[y0:y1, x0:x1] = True
            grids.append(grid)
        expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
        assert float(metrics.paired_iou(a[None], b[None])) == pytest.approx(expected)
    found = metrics.localisation(torch.tensor([0.4, 0.8, math.nan]))
    assert (float(found["iou"]), float(found["iou_at_50"])) == pytest.approx((0.6, 0.5))


def test_the_temperature_that_was_put_in_is_found():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert metrics.fit_temperature((logits * 2.5).softmax(1), labels) == pytest.approx(2.5, rel=0.05)
    assert metrics.fit_temperature(logits.softmax(1), labels) == pytest.approx(1.0, rel=0.05)


def test_the_t_interval_is_that_of_the_tables():
    # quantiles and tail areas as printed in tables of Student's t
    for n, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)):
        values = torch.arange(n).double()
        mean, low, high, _ = metrics.mean_interval(values)
        error = float(values.std()) / math.sqrt(n)
        assert mean == pytest.approx(float(values.mean()))
        assert (high - mean) / error == pytest.approx(quantile, abs=6e-4)
        assert (mean - low) / error == pytest.approx(quantile, abs=6e-4)
        shifted = values - values.mean() + quantile * error  # just at the edge: p is 0.05
        assert metrics.mean_interval(shifted)[3] == pytest.approx(0.05, abs=1e-4)
    assert metrics.mean_interval([0.0, 0.0, 0.0]) == (0, 0, 0, 1)
    assert metrics.mean_interval([0.5, 0.5])[3] == 0
    assert all(math.isnan(v) for v in metrics.mean_interval([0.3])[1:])


# ---------------------------------------------------------------------------------------------------------------------
# plots.py


def test_ticks_are_round_and_inside():
    assert plots.nice_ticks(0, 1).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in [(0.87, 0.99), (-3, 41), (1e-6, 5e-6)]:
        ticks = plots.nice_ticks(low, high)
        assert 3 <= len(ticks) <= 11
        assert ticks.min() >= low - 1e-9
        assert ticks.max() <= high + 1e-9


def blue_of(chart):
    """Where a chart is drawn in the first colour."""
    return (abs(np.asarray(chart).astype(int) - [0, 114, 178]).sum(2) < 90).nonzero()


def test_a_chart_draws_its_line_where_the_data_is():
    chart = plots.line_chart([plots.Series("", [0, 1], [0.5, 0.5])], y_range=(0, 1), x_range=(0, 1))
    rows, columns = blue_of(chart)
    assert np.median(rows) == pytest.approx((40 + 400 - 50) / 2, abs=3)  # half way between top and bottom of the axes
    assert columns.max() - columns.min() > 380
    dots = blue_of(plots.line_chart([plots.Series("", [0, 1], [0.5, 0.5], dots=True)], y_range=(0, 1), x_range=(0, 1)))
    assert ((dots[1] < 100) | (dots[1] > 400)).all()  # no line between the dots
    log = plots.line_chart([plots.Series("", [1e-4, 1e-3, 1e-2], [0, 1, 0], dots=True)], x_axis="log")
    middle = blue_of(log)[1][blue_of(log)[0] < 100]
    assert np.median(middle) == pytest.approx((70 + 500) / 2, abs=3)
    for series in ([], [plots.Series("nan", [1, 2], [math.nan, 1.0])], [plots.Series("one", [1], [2])]):
        assert plots.line_chart(series).size == (520, 400)


def test_a_band_shades_what_lies_between_its_bounds():
    line = plots.Series("", [0, 10], [0.5, 0.5])
    banded = dataclasses.replace(line, low=[0.4, 0.4], high=[0.6, 0.6])
    with_band, without = (np.asarray(plots.line_chart([s], y_range=(0, 1))).astype(int) for s in (banded, line))
    rows = np.flatnonzero((with_band != without).any(2).sum(1) > 200)
    top, bottom = 40 + 8, 400 - 50 - 8  # where y is 1 and 0
    assert rows.min() == pytest.approx(bottom - 0.6 * (bottom - top), abs=2)
    assert rows.max() == pytest.approx(bottom - 0.4 * (bottom - top), abs=2)


@pytest.mark.parametrize("size", [(60, 40), (20, 300), (4000, 40), (1, 1), (1500, 1000)])
def test_overlays_can_be_read_whatever_the_picture(size):
    image, heat = Image.new("L", size, 90), np.zeros((4, 6), np.float32)
    heat[1:3, 2:4] = 2.0
    shown, plain, empty = (plots.overlay(image, [0, 0, *size], "caption", h) for h in (heat, None, -heat))
    assert shown.size == plain.size == empty.size  # so that they lie in one page
    assert shown.width >= 320 + 64
    assert shown.height >= 80
    assert max(shown.size) <= max(*size, 960) + 64 + 28
    pictures = [np.asarray(i)[:-28, :-64].astype(int) for i in (shown, plain, empty)]
    assert abs(pictures[0] - pictures[1]).sum() > 0
    assert (pictures[2] != pictures[1]).any()  # it says that there is none
    common = plots.overlay(image, None, "", heat, top=20.0)
    alone = plots.overlay(image, None, "", heat)
    assert (np.asarray(common)[:-28, :-64] != np.asarray(alone)[:-28, :-64]).any()


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


@pytest.mark.parametrize(("n", "batch"), [(33, 32), (65, 32), (5, 32), (64, 32), (97, 16)])
def test_batches_hold_every_row_once_and_never_one_alone(n, batch):
    rows = torch.arange(100, 100 + n)
    batches = train.draw_batches(rows, batch, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == rows.tolist()
    assert 1 < min(map(len, batches)) <= max(map(len, batches)) <= batch
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_the_balanced_sampler_draws_classes_alike():
    labels = (torch.arange(1000) % 10 == 0).long()
    weights = (1 / torch.bincount(labels).double())[labels]
    drawn = torch.cat(train.draw_batches(torch.arange(1000), 32, torch.Generator().manual_seed(0), weights))
    assert float(labels[drawn].float().mean()) == pytest.approx(0.5, abs=0.05)


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
    votes = train.member_weights(torch.stack([good, poor]), labels)
    assert votes[0] > 0.9
    assert sum(votes) == pytest.approx(1)
    assert train.member_weights(torch.stack([good, good]), labels) == pytest.approx([0.5, 0.5])


TINY = ["--size", "32", "--model", "small_cnn", "--weights", "none", "--epochs", "3", "--save-seconds", "0"]


def quick(folder, *options, data_folder=None, script=train):
    """One training in this process. Returns (run folder, what it printed, what it returned)."""
    out = io.StringIO()
    source = ["--data", str(data_folder)] if data_folder else []
    with contextlib.redirect_stdout(out):
        result, run_folder = script.main(
            [*source, *TINY, "--runs", str(folder), "--cache", str(folder / "cache"), *options]
        )
    return run_folder, out.getvalue(), result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("set"), {"benign": 40, "malignant": 28, "normal": 12})


def states(path):
    content = torch.load(path, weights_only=True)
    nets = [m["state"] for m in content["members"]] + ([content["dnet"]["state"]] if content["dnet"] else [])
    return [v for net in nets for v in net.values()]


def same_model(a, b):
    return all(torch.equal(x, y) for x, y in zip(states(a), states(b), strict=True))


def test_an_epoch_of_steps_draws_that_many_full_batches():
    rows, generator = torch.arange(10, 17), torch.Generator().manual_seed(0)
    batches = train.draw_batches(rows, 4, generator, steps=5)
    assert [len(b) for b in batches] == [4] * 5
    counts = torch.bincount(torch.cat(batches))[10:]
    assert set(counts.tolist()) <= {2, 3}  # whole shuffles: nobody is drawn twice before all were drawn once
    weighted = train.draw_batches(rows, 4, generator, torch.tensor([0, 0, 0, 1.0, 0, 0, 0]), steps=3)
    assert torch.cat(weighted).tolist() == [13] * 12


def test_the_report_tells_what_each_member_does_alone(tmp_path, folders):
    folder, said, _ = quick(tmp_path, "--positive", "malignant", "--ensemble", "small_cnn,small_cnn,small_cnn", "--nets", "cnet", "--folds", "2", "--name", "e", data_folder=folders)  # fmt: skip
    members = json.loads((folder / "report.json").read_text())["members"]
    args = parse(["--data", str(folders), "--positive", "malignant", "--size", "32", "--folds", "2"])
    images = quiet_load(folders, 32, positive="malignant")
    for i, member in enumerate(members):
        scores, labels, hits = [], [], []
        for name, _, val, test, _ in train.plan(images, args):
            model = models.load(folder / name)
            alone = models.Ensemble([model.members[i]], **model.info)
            train.calibrate(alone, train.predict(alone, images, val), images.labels[val], args)
            scores.append(alone.combine(train.predict(alone, images, test))[:, 1])
            labels.append(images.labels[test])
            hits.append(scores[-1][labels[-1] == 1] >= alone.info["threshold"])
        expected = {"auc": metrics.auc(torch.cat(scores), torch.cat(labels)), "sensitivity": torch.cat(hits).float().mean()}  # fmt: skip
        for what, value in expected.items():
            assert member["test"][what]["value"] == pytest.approx(float(value), abs=1e-6)
        assert member["test"]["auc"]["low"] <= member["test"]["auc"]["value"] <= member["test"]["auc"]["high"]
        together = json.loads((folder / "report.json").read_text())["test"]["auc"]["value"]
        assert member["ensemble"]["auc"]["value"] == pytest.approx(together - member["test"]["auc"]["value"])
    assert len({m["test"]["auc"]["value"] for m in members}) > 1
    assert said.count("member small_cnn, roi none: auc") >= 3
    assert "best on validation" in said


def test_two_runs_are_compared_in_pairs(tmp_path, folders):
    options = ["--positive", "malignant", "--folds", "2", "--nets", "both"]
    one, _, _ = quick(tmp_path, *options, "--name", "one", data_folder=folders)
    two, said, _ = quick(
        tmp_path, *options, "--epochs", "3", "--against", str(one), "--name", "two", data_folder=folders
    )
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    change = reports[1]["against"]
    assert change["run"] == str(one)
    assert set(change["test"]) == set(reports[0]["test"])
    images, answers = quiet_load(folders, 32, positive="malignant"), []
    for folder in (one, two):
        found = [torch.load(folder / f"fold{k}" / "test.pt", weights_only=True) for k in (1, 2)]
        rows = torch.cat([r["rows"] for r in found])
        answers.append(torch.cat([(r["probabilities"][:, 1] >= r["threshold"]).long() for r in found]))
    assert change["flipped"] == int((answers[0] != answers[1]).sum())
    assert change["righted"] == int(((answers[0] != answers[1]) & (answers[1] == images.labels[rows])).sum())
    hits = (answers[1] == images.labels[rows]).double() - (answers[0] == images.labels[rows]).double()
    names, owner = torch.unique(images.groups[rows], return_inverse=True)
    rng, draws = np.random.default_rng(0), []
    for _ in range(2000):  # the interval by another generator, group by group
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[owner.numpy()]
        draws.append(float((hits.numpy() * drawn).sum() / drawn.sum()))
    for metric, m in change["test"].items():
        before, after = (r["test"][metric]["value"] for r in reports)
        assert (m["before"], m["after"], m["value"]) == pytest.approx((before, after, after - before))
    m = change["test"]["accuracy"]
    assert (m["low"], m["high"]) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    assert f"before: {one}, after: this run" in said
    out = io.StringIO()
    with contextlib.redirect_stdout(out):  # afterwards, of two finished runs; a run is no better than itself
        train.main(["--resume", str(one), "--against", str(one)])
    change = json.loads((one / "report.json").read_text())["against"]
    assert change["flipped"] == 0
    assert {(m["low"], m["value"], m["high"]) for m in change["test"].values()} == {(0.0, 0.0, 0.0)}
    for wrong, why in [
        (["--against", str(tmp_path / "nowhere")], "give the folder of a finished run"),
        (["--against", str(one), "--seed", "1"], "has other test images or classes"),
    ]:
        with pytest.raises(InputError, match=why):
            quick(tmp_path, *options, *wrong, data_folder=folders)


def test_an_ensemble_teaches_one_small_model(tmp_path, folders):
    quick(tmp_path, "--positive", "malignant", "--ensemble", "small_cnn,small_cnn", "--folds", "2", "--nets", "cnet", "--name", "teacher", data_folder=folders)  # fmt: skip
    options = ["--positive", "malignant", "--folds", "2", "--nets", "cnet", "--teacher", str(tmp_path / "teacher")]
    student, said, _ = quick(tmp_path, *options, "--alpha", "0.2", "--distill-temperature", "3", "--name", "student", data_folder=folders)  # fmt: skip
    assert "may know images" not in said
    other, _, _ = quick(tmp_path, *options, "--alpha", "1", "--name", "other", data_folder=folders)
    plain, _, _ = quick(tmp_path, *options[:-2], "--name", "plain", data_folder=folders)
    assert len(models.load(student / "fold1").members) == 1
    assert not same_model(student / "fold1" / "model.pt", plain / "fold1" / "model.pt")
    assert same_model(other / "fold1" / "model.pt", plain / "fold1" / "model.pt")  # alpha 1: the labels alone
    base = ["--data", folders, *TINY, "--nets", "cnet", "--runs", tmp_path, "--cache", tmp_path / "cache"]
    teacher = tmp_path / "teacher" / "fold1" / "model.pt"
    wrong = call(train, *base, "--teacher", teacher)
    assert "its classes ['benign+normal', 'malignant'] are not those of the data" in error_of(wrong)
    warned = call(train, *base, "--positive", "malignant", "--seed", "5", "--teacher", teacher)
    assert "it may know images of this test split" in warned.stdout
    assert "no such file" in error_of(call(train, *base, "--teacher", tmp_path / "nowhere.pt"))


def test_the_teacher_also_teaches_on_images_without_labels(tmp_path, folders):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--nets", "cnet", "--steps-per-epoch", "3"])
    train_rows, val = images.rows("train"), images.rows("val")
    labelled, rest = train_rows[:20], train_rows[20:]
    images.labels[rest] = -1
    drawn = []

    original = train.draw_batches

    def recorded(rows, batch, generator, weights=None, steps=0):
        batches = original(rows, batch, generator, weights, steps)
        drawn.append(torch.cat(batches))
        return batches

    teacher = torch.full((len(images), 2), 0.5)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "draw_batches", recorded)
        train.train_model(images, labelled, val, args, tmp_path, 0, teacher, rest)
    share = torch.isin(torch.cat(drawn), labelled).double().mean()
    assert 0.35 < share < 0.65  # half of what is drawn has a label


def test_without_validation_the_last_epoch_is_kept(tmp_path, folders):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--nets", "cnet"])
    with contextlib.redirect_stdout(io.StringIO()):
        model, _, histories = train.train_model(images, images.rows("train"), images.rows("val")[:0], args, tmp_path, 0)
    last = torch.load(tmp_path / "last.pt", weights_only=True)["net"]
    assert all(torch.equal(v, last[k]) for k, v in model.members[0].state_dict().items())
    assert histories[0][-1]["best"]
    assert model.info["temperature"] == 1
    assert model.info["threshold"] == 0.5


def test_a_run_folder_holds_what_the_design_says(tmp_path, folders):
    folder, said, returned = quick(tmp_path, "--positive", "malignant", "--name", "a", data_folder=folders)
    files = "config.json log.jsonl last.pt model.pt report.json report.png mistakes.png test.pt example.png"
    assert {p.name for p in folder.iterdir()} == set(files.split())
    report = json.loads((folder / "report.json").read_text())
    assert report == returned
    names = "auc accuracy sensitivity specificity balanced_accuracy f1 ece iou iou_at_50"
    assert set(report["test"]) == set(names.split())
    assert all(set(m) == {"value", "low", "high"} for m in report["test"].values())
    assert sum(report["splits"].values()) == 80
    kept = torch.load(folder / "test.pt", weights_only=True)
    labels = quiet_load(folders, 32, positive="malignant").labels[kept["rows"]]
    right = [int(p >= 0.5) == int(y) for p, y in zip(kept["probabilities"][:, 1], labels, strict=True)]
    assert report["accuracy_at_half"] == [pytest.approx(np.mean(right))]
    assert {"data", "splits", "model", "seconds"} <= set(report)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(h["net"], h["epoch"]) for h in log] == [(n, e) for n in ("dnet", "cnet1 small_cnn") for e in (1, 2, 3)]
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["epochs"] == 3
    assert config["versions"]["torch"]
    assert "positive class: malignant" in said
    assert said.rstrip().endswith(models.DISCLAIMER)
    assert f"python infer.py {folder}/example.png --model {folder}/model.pt" in said
    with pytest.raises(InputError, match=r"exists; choose another name"):
        quick(tmp_path, "--name", "a")
    assert "is complete" in resumed(folder)


def resumed(folder):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main(["--resume", str(folder)])
    return out.getvalue()


@pytest.mark.parametrize("options", [[], ["--ema", "0.9", "--balanced-sampler"]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, folders, options):
    whole, _, _ = quick(tmp_path, "--name", "whole", *options, data_folder=folders)
    real, calls = train.train_epoch, []

    def dies_in_the_fifth_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # the second epoch of C-Net
            raise KeyError("as good as a kill")
        return real(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(train, "train_epoch", dies_in_the_fifth_epoch)
        with pytest.raises(KeyError):
            quick(tmp_path, "--name", "cut", *options, data_folder=folders)
    assert "resuming cnet1 small_cnn after epoch 1" in resumed(tmp_path / "cut")
    assert same_model(whole / "model.pt", tmp_path / "cut" / "model.pt")

    def without_times(folder):
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [{k: v for k, v in h.items() if k != "seconds"} for h in lines]

    assert without_times(whole) == without_times(tmp_path / "cut")
    a, b = (json.loads((f / "report.json").read_text()) for f in (whole, tmp_path / "cut"))
    assert a["test"] == b["test"]


def start(folder, *options):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--runs", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_killed_and_stopped_by_ctrl_c_the_result_is_the_same(tmp_path, folders):
    whole, _, _ = quick(tmp_path, "--name", "whole", "--epochs", "6", data_folder=folders)
    process = start(
        tmp_path, "--data", str(folders), "--cache", str(tmp_path / "cache"), "--name", "cut", "--epochs", "6"
    )
    for line in process.stdout:
        if "epoch   2/6" in line:
            process.send_signal(signal.SIGKILL)  # in the midst of an epoch, or of a save
            break
    process.wait()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), "--resume", str(tmp_path / "cut")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    said = ""
    for line in process.stdout:
        said += line
        if "epoch   4/6" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert f"stopped; go on with: python train.py --resume {tmp_path / 'cut'}" in said
    resumed(tmp_path / "cut")
    assert same_model(whole / "model.pt", tmp_path / "cut" / "model.pt")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
    real = train.classification_loss
    calls = []

    def explodes(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) > 25 else 1)

    monkeypatch.setattr(train, "classification_loss", explodes)
    with pytest.raises(
        InputError, match=r"epoch 2: the loss is not finite; the state after epoch 1 is kept in .*last.pt"
    ):
        quick(tmp_path, "--name", "x", "--nets", "cnet")
    saved = torch.load(tmp_path / "x" / "last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in saved["net"].values())
    assert len(saved["history"]) == 1


def test_best_is_a_copy_and_not_the_last(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(train, "SMOOTH", 1)
    weights = []

    def fit_with_scores(*args, **kwargs):
        def validate(net):
            weights.append({k: v.clone() for k, v in net.state_dict().items()})
            return {"score": [next(scores)], "val_auc": 0.0}

        return real(*args[:4], validate, *args[5:], **kwargs)

    real = train.fit
    monkeypatch.setattr(train, "fit", fit_with_scores)
    folder, _, _ = quick(tmp_path, "--name", "x", "--nets", "cnet")
    kept = torch.load(folder / "model.pt", weights_only=True)["members"][0]["state"]
    assert all(torch.equal(kept[k], weights[1][k]) for k in kept)
    assert not all(torch.equal(kept[k], weights[2][k]) for k in kept)


def test_training_stops_early_without_patience_left(tmp_path):
    folder, _, _ = quick(tmp_path, "--name", "x", "--nets", "cnet", "--epochs", "40", "--patience", "2", "--lr", "1e-9")
    assert len((folder / "log.jsonl").read_text().splitlines()) < 12


def test_folds_cover_every_image_once_and_repeats_have_a_spread(tmp_path, folders):
    folder, said, _ = quick(
        tmp_path, "--folds", "3", "--name", "f", "--epochs", "1", "--positive", "malignant", data_folder=folders
    )
    results = [torch.load(folder / f"fold{k}" / "test.pt", weights_only=True) for k in (1, 2, 3)]
    assert sorted(torch.cat([r["rows"] for r in results]).tolist()) == list(range(80))
    report = json.loads((folder / "report.json").read_text())
    assert report["splits"]["test"] == 80
    aucs = [json.loads((folder / f"fold{k}" / "report.json").read_text())["test"]["auc"]["value"] for k in (1, 2, 3)]
    assert report["mean"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
    assert report["mean"]["auc"]["sd"] == pytest.approx(np.std(aucs, ddof=1))
    assert "+-" in said
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--folds", "3"])
    for _, *parts, _ in train.plan(images, args):
        together = torch.cat(parts)
        assert sorted(together.tolist()) == list(range(80))
        for g in images.groups.unique():
            assert sum(bool((images.groups[p] == g).any()) for p in parts) == 1
    folder, _, _ = quick(tmp_path, "--repeats", "2", "--name", "r", "--epochs", "1", "--nets", "cnet")
    report = json.loads((folder / "report.json").read_text())
    assert [p.name for p in sorted(folder.glob("seed*"))] == ["seed0", "seed1"]
    assert len(report["runs"]) == 2
    assert not same_model(folder / "seed0" / "model.pt", folder / "seed1" / "model.pt")


@pytest.mark.parametrize("roi", ["mask", "none,dnet"])
def test_an_ensemble_on_crops_of_three_classes(tmp_path, folders, roi):
    options = ["--ensemble", "small_cnn,small_cnn", "--roi", roi, "--margin", "0.5", "--name", "e"]
    folder, _, _ = quick(tmp_path, *options, data_folder=folders)
    model = models.load(folder / "model.pt")
    assert len(model.members) == 2 * len(roi.split(","))
    assert float(model.weights.sum()) == pytest.approx(1)
    assert (model.info["size"], model.info["load_size"]) == (32, 64)
    assert {m.config["roi"] for m in model.members} == set(roi.split(","))
    assert model.info["classes"] == ["benign", "normal", "malignant"]
    report = json.loads((folder / "report.json").read_text())
    assert report["test"]["auc"]["value"] is not None
    result = infer.BreastCancerDetector(folder / "model.pt").predict(next((folders / "normal").glob("*(1).png")))
    assert set(result["probabilities"]) == {"benign", "normal", "malignant"}


def test_metadata_alone_can_carry_the_answer(tmp_path):
    rows = []
    for i in range(60):
        picture(32, 32, i).save(tmp_path / f"{i}.png")
        rows.append(f"{i},{'nv' if i % 2 else 'mel'},,,,{30 + i % 7},{'female' if i % 2 else 'male'},,,,")
    table = write_csv(tmp_path, rows)
    options = "--name m --meta-columns age sex --positive mel --epochs 15 --lr 3e-3"
    folder, _, _ = quick(tmp_path, *options.split(), data_folder=table)
    assert json.loads((folder / "report.json").read_text())["test"]["auc"]["value"] > 0.9  # a dozen images
    image = tmp_path / "0.png"
    p = {
        sex: infer.BreastCancerDetector(folder / "model.pt").predict(image, {"sex": sex})["probability"]
        for sex in ("male", "female")
    }
    assert p["male"] > p["female"]
    model = folder / "model.pt"
    assert "counted as missing" not in call(infer, image, "--model", model, "--meta", "age=31,sex=male").stdout
    assert "counted as missing: age, sex" in call(infer, image, "--model", model).stdout
    assert "the model knows age, sex" in error_of(call(infer, image, "--model", model, "--meta", "shoe=44"))
    assert "not seen in training" in error_of(call(infer, image, "--model", model, "--meta", "sex=x"))


def test_data_without_boxes(tmp_path):
    source = write_npz(tmp_path / "a.npz", n=40)
    folder, said, _ = quick(tmp_path, "--name", "c", "--epochs", "1", data_folder=source)
    assert "D-Net can't be trained" in said
    assert "iou" not in json.loads((folder / "report.json").read_text())["test"]
    with pytest.raises(InputError, match="no boxes"):
        quick(tmp_path, "--name", "d", "--nets", "dnet", data_folder=source)
    with pytest.raises(InputError, match="no boxes"):
        quick(tmp_path, "--name", "e", "--roi", "dnet", data_folder=source)
    with pytest.raises(InputError, match="neither masks nor boxes"):
        quick(tmp_path, "--name", "g", "--roi", "mask", data_folder=source)
    folder, said, _ = quick(tmp_path, "--name", "f", "--epochs", "1", "--dummy-boxes", data_folder=source)
    assert "placeholder boxes" in said
    assert json.loads((folder / "report.json").read_text())["data"]["placeholder_boxes"]
    assert "PLACEHOLDER BOXES" in infer.BreastCancerDetector(folder / "model.pt").describe()


def test_a_detector_alone(tmp_path):
    folder, _, _ = quick(tmp_path, "--name", "d", "--nets", "dnet", "--epochs", "1")
    assert set(json.loads((folder / "report.json").read_text())["test"]) == {"iou", "iou_at_50"}
    with pytest.raises(InputError, match="a D-Net alone"):
        infer.BreastCancerDetector(folder / "model.pt")


# ---------------------------------------------------------------------------------------------------------------------
# train.py: the command line


def test_mistakes_on_the_command_line_are_one_line(tmp_path, folders):
    one = class_folders(tmp_path / "one", {"benign": 6})
    lonely = write_npz(tmp_path / "no_positive.npz", val_labels=np.zeros(10, np.uint8))
    text = tmp_path / "text.pt"
    text.write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for options, why in [
        (["--data", tmp_path / "nowhere"], "no such file or folder"),
        (["--data", one], "one class only"),
        (["--data", lonely], "the val split has no '1' image"),
        (["--data", folders, "--positive", "x"], "no such class"),
        (["--resume", tmp_path / "nowhere"], "nothing to resume"),
        (["--model", "resnet19"], "no such network"),
        (["--weights", text], "not a PyTorch file"),
        (["--weights", "imagenet"], "no weights for it"),
        (["--epochs", "0"], "--epochs: 0: must lie in"),
        (["--epochs", "many"], "no whole number"),
        (["--pos-weight", "x"], "--pos-weight x"),
        (["--fold", "5"], "unrecognized arguments"),
        (["@nowhere.args"], "nowhere.args"),
        (["--nets", "dnet", "--roi", "dnet"], "there is none"),
        (["--nets", "cnet", "--roi", "dnet"], "needs D-Net"),
        (["--roi", "lesion"], "--roi lesion"),
        (["--model", "alexnet", "--size", "16"], "too small for alexnet"),
        (["--device", "toaster"], "no such device"),
    ] + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA device")]):
        command = [HERE / "train.py", "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", *options]
        out = io.StringIO()  # in this process: seventeen starts of Python would take a minute
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as e:
            run_main(lambda command=command: train.main([str(c) for c in command[1:]]))
        assert e.value.code == 1, options
        assert len(out.getvalue().splitlines()) == 1, out.getvalue()
        assert why in out.getvalue(), options
    assert set(before) <= set(tmp_path.rglob("*"))


def test_option_files_hold_comments_and_many_options_a_line(tmp_path):
    (tmp_path / "x.args").write_text("# a recipe\n--epochs 7 --lr 0.5   # fast\n\n--model resnet18\n--weights none\n")
    args = parse([f"@{tmp_path / 'x.args'}", "--lr", "0.1", "--data", "somewhere"])
    assert (args.epochs, args.lr, args.model, args.weights) == (7, 0.1, "resnet18", "none")


def test_patient_data_alone_and_attention_through_the_command_line(tmp_path):
    rows = [f"{i},{'nv' if i % 2 else 'mel'},,,,{30 + i % 7},{'female' if i % 2 else 'male'},,,," for i in range(60)]
    for i in range(60):
        picture(32, 32, i).save(tmp_path / f"{i}.png")
    table = write_csv(tmp_path, rows)
    options = ["--positive", "mel", "--meta-columns", "age", "sex", "--epochs", "20", "--lr", "1e-2"]
    folder, _, _ = quick(tmp_path, *options, "--model", "none", "--name", "blind", data_folder=table)
    assert json.loads((folder / "report.json").read_text())["test"]["auc"]["value"] == 1  # the sex tells all
    detector = infer.BreastCancerDetector(folder / "model.pt", "cpu")
    answers = [detector.predict(tmp_path / f"{i}.png", {"age": 33, "sex": "male"}) for i in (0, 1)]
    assert answers[0]["probability"] == answers[1]["probability"] > 0.5
    assert "needs patient data" in error_of(run(HERE / "train.py", "--data", table, *TINY, "--model", "none"))
    folder, _, _ = quick(tmp_path, "--attention", "se", "--name", "se", data_folder=table)
    assert models.load(folder).members[0].config["attention"] == "se"


def test_search_halves_resumes_and_its_best_can_be_used(tmp_path, folders):
    options = ["4", "--positive", "malignant", "--search-folds", "2", "--epochs", "3", "--search-over"]
    options += ["lr=1e-4:1e-2", "size=32,40", "dropout=0:0.5", "--workers", "1", "--name", "s"]
    folder, _, row = quick(tmp_path, *options, data_folder=folders, script=search)
    with open(folder / "search.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epochs"]) for r in rows] == [1, 1, 1, 1, 3]
    first = sorted(rows[:4], key=lambda r: -float(r["mean"]))
    assert rows[4]["trial"] == first[0]["trial"] == str(row["trial"])  # the best of the short trainings went on
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
    kept = {p: p.stat().st_mtime_ns for p in sorted(folder.glob("trial*.json"))[::2]}
    for path in set(folder.glob("trial*.json")) - set(kept):
        path.unlink()
    table = (folder / "search.csv").read_text()
    (folder / "search.csv").unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        search.main(["--resume", str(folder)])
    assert (folder / "search.csv").read_text() == table
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert not list(folder.glob("tmp*"))


def test_search_refuses_what_can_not_be_searched(folders):
    for over, why in [
        (["--search-over", "lr=1e-2:1e-4"], "an empty range"),
        (["--search-over", "lr="], "an empty range"),
        (["--search-over", "luck=1:2"], "no option --luck that takes a number"),
        (["--search-over", "model=1:2"], "no option --model that takes a number"),
        (["--search-over", "lr=a:b"], "in numbers"),
        (["--against", "x"], "which a search does not touch"),
    ]:
        with pytest.raises(InputError, match=why):
            search.main(["2", "--data", str(folders), *TINY, *over])
    with pytest.raises(InputError, match="how many settings"):
        search.main(["--data", str(folders)])


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

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch, value))

        def flush(self):
            pass

        close = flush

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("options.importlib.util.find_spec", lambda name: name)
    folder, _, _ = quick(tmp_path, "--tensorboard", "--nets", "cnet", "--name", "t", data_folder=folders)
    assert written[0] == str(folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert ("cnet1 small_cnn/val_auc", line["epoch"], pytest.approx(line["val_auc"], abs=1e-5)) in written
        assert ("cnet1 small_cnn/loss", line["epoch"], pytest.approx(line["loss"], abs=1e-5)) in written
    monkeypatch.setattr("options.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        parse(["--tensorboard"])


def test_a_share_of_the_labels_is_drawn_by_group_and_class(folders):
    images = quiet_load(folders, 32, positive="malignant")
    whole = train.plan(images, parse(["--data", "x"]))[0]
    some = train.plan(images, parse(["--data", "x", "--label-fraction", "0.25"]))[0]
    assert set(some[1].tolist()) < set(whole[1].tolist())
    assert len(some[1]) == pytest.approx(len(whole[1]) / 4, abs=2)
    assert torch.equal(some[3], whole[3])
    positive = [float(images.labels[rows].double().mean()) for rows in (some[1], whole[1])]
    assert positive[0] == pytest.approx(positive[1], abs=0.08)


def test_a_split_by_image_says_so_and_divides_groups(tmp_path):
    for patient in range(6):
        for label in "01":
            (tmp_path / "set" / f"p{patient}" / label).mkdir(parents=True)
            for i in range(5):
                name = f"{patient}_{label}_{i}.png"
                picture(20, 20, 100 * patient + i).save(tmp_path / "set" / f"p{patient}" / label / name)
    said = []
    honest = data.load(tmp_path / "set", 20, cache=None, log=said.append)
    wrong = data.load(tmp_path / "set", 20, cache=None, split_by_image=True, log=said.append)
    assert "claims too much" in "".join(said)

    def crossing(images):
        splits = {}
        for name, split in zip(images.names, images.splits, strict=True):
            splits.setdefault(Path(name).parent.parent, set()).add(split)
        return sum(len(s) > 1 for s in splits.values())

    assert crossing(honest) == 0
    assert crossing(wrong) > 0
    args = parse(["--data", str(tmp_path / "set"), "--split-by-image", "--cache", str(tmp_path / "c")])
    assert len(train.load_images(args, log=lambda _: None).groups.unique()) == 60


def test_validation_can_be_a_fixed_part():
    args = parse(["--eval-steps", "2"])
    val = torch.arange(1000, 2000)
    some = train.eval_rows(val, args, 3)
    assert len(some) == 2 * train.EVAL_BATCH
    assert set(some.tolist()) <= set(val.tolist())
    assert torch.equal(some, train.eval_rows(val, args, 3))
    assert torch.equal(train.eval_rows(val, parse([]), 3), val)


def test_the_balanced_threshold_has_the_best_balanced_accuracy(tmp_path, folders):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 12, (40,), generator=generator) / 11
        labels = torch.randint(0, 2, (40,), generator=generator)
        found = metrics.threshold_for_balance(scores, labels)

        def balance(t, scores=scores, labels=labels):
            said = (scores >= t).long()
            return ((said[labels == 1] == 1).double().mean() + (said[labels == 0] == 0).double().mean()) / 2

        assert balance(found) == pytest.approx(max(float(balance(t)) for t in torch.linspace(-0.05, 1.05, 200)))
    folder, _, _ = quick(tmp_path, "--nets", "cnet", "--threshold-by", "balance", "--positive", "malignant", "--name", "b", data_folder=folders)  # fmt: skip
    other, _, _ = quick(tmp_path, "--nets", "cnet", "--positive", "malignant", "--name", "s", data_folder=folders)
    thresholds = [json.loads((f / "report.json").read_text())["threshold"] for f in (folder, other)]
    assert thresholds[0] != thresholds[1]


def test_every_recipe_is_understood():
    recipes = sorted((HERE / "recipes").glob("*.args"))
    assert recipes
    for recipe in recipes:
        (al_loop if recipe.name.startswith("al-") else train).parse([f"@{recipe}", "--data", "somewhere"])


def test_no_option_goes_untested():
    """Every option that -h shows stands in this file, outside this test."""
    source = Path(__file__).read_text()
    modules = (train, search, explain, infer, al_loop, pretrain, bench)
    for module, *command in [*((m,) for m in modules), (al_loop, "suggest"), (al_loop, "learn")]:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            module.main([*command, "-h"])
        options = sorted(set(re.findall(r"--[a-z][a-z-]+", shown.getvalue())) - {"--help"})
        assert options
        for option in options:
            assert re.search(rf'[" ]{option}[" ]', source), f"{module.__name__} {command} {option}"


def test_the_remaining_options_do_what_they_say(tmp_path, folders):
    def images_of(source, options):
        args = parse(["--data", str(source), *TINY, *options.split(), "--cache", str(tmp_path / "c")])
        return train.load_images(args, log=lambda _: None)

    images = images_of(folders, "--channels 3 --clahe --drop-class normal --seed 3")
    assert images.pixels.shape == (68, 3, 32, 32)
    assert images.classes == ["benign", "malignant"]
    plain = images_of(folders, "--channels 3")
    assert not torch.equal(images.pixels, plain.pixels[:68])  # CLAHE
    assert images.splits != plain.splits[:68]  # another seed
    rows = [f"{n},{c},g{n // 2},train,m" for n, c in enumerate("abab")]
    for n in range(4):
        picture(seed=n).save(tmp_path / f"{n}.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "m.png")
    table = write_csv(tmp_path, rows, header="file,what,who,where,lesion")
    names = "--image-column file --label-column what --group-column who --split-column where --mask-column lesion"
    images = images_of(table, names)
    assert images.boxes.isfinite().all()
    assert len(images.groups.unique()) == 2
    (tmp_path / "boxes.csv").write_text('image,label,where\n0,a,1 2 30 20\n1,b,"[2, 3, 9, 9]"\n')
    images = images_of(tmp_path / "boxes.csv", "--box-columns where")
    np.testing.assert_allclose(images.boxes[0], np.array([1, 2 + 10, 30, 20 + 10]) / 60, atol=0.5 / 32)
    (folders / "benign" / "broken.png").write_text("x")
    try:
        assert len(images_of(folders, "--skip-bad")) == 80
    finally:
        (folders / "benign" / "broken.png").unlink()


def test_options_reach_the_networks_and_the_optimizer(tmp_path):
    options = "--dropout 0.5 --normalise fixed --batch 64 --warmup 0.5 --weight-decay 0.3 --clip 0.01 --augment 0"
    options += " --label-smoothing 0.2 --pos-weight 3 --amp on --target-sensitivity 0.5 --device cpu"
    folder, _, _ = quick(tmp_path, "--name", "o", "--nets", "cnet", "--epochs", "2", *options.split())
    model = models.load(folder / "model.pt")
    assert model.members[0].config["dropout"] == 0.5
    assert model.members[0].config["normalise"] == "fixed"
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert {g["weight_decay"] for g in saved["optimizer"]["param_groups"]} == {0.3, 0.0}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[1]["lr"] > log[0]["lr"]  # half of the steps are warm-up
    low = json.loads((folder / "report.json").read_text())["test"]["sensitivity"]["value"]
    assert low < 0.9  # a target of 0.5 gives away sensitivity


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
    cam, plus, layer = torch.zeros(3, *maps.shape[2:]), torch.zeros(3, *maps.shape[2:]), torch.zeros(3, *maps.shape[2:])
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
    for model, layer, why in [
        (net, "nowhere", "no such module; there are features, features.0"),
        (net, torch.nn.ReLU(), "does not come through it"),
        (net, "head", "is no map"),
        (net, net, "do not depend|is no map"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2)), None, "name a `layer`"),
        (torch.nn.Identity(), "", "wrap it so that it gives logits"),
    ]:
        with pytest.raises(ValueError, match=why):
            saliency.grad_cam(model, x, 1, layer)
    assert saliency.last_map(parallel, x) is parallel[0]
    assert saliency.grad_cam(parallel, x).shape == (2, 64, 48)
    for target, why in ((2, r"classes are 0 \.\.\. 1"), ([0, 1, 0], "one an image"), (0.5, "one an image")):
        with pytest.raises(ValueError, match=why):
            saliency.grad_cam(net, x, target)
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
    with pytest.raises(ValueError, match="give `reshape`"):
        saliency.grad_cam(net, x)
    with pytest.raises(ValueError, match="give `reshape`"):
        saliency.grad_cam(net, x, 1, "norm")
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
        total, count = torch.zeros(16, 24), torch.zeros(16, 24)
        for top in (0, 4, 8):
            for left in (0, 6, 12):
                hidden = x[i].clone()
                hidden[:, top : top + 8, left : left + 12] = x[i].mean()
                fall = score(x[i, None]) - score(hidden[None])
                total[top : top + 8, left : left + 12] += fall
                count[top : top + 8, left : left + 12] += 1
        torch.testing.assert_close(found[i], total / count, atol=1e-6, rtol=1e-4)
    copies = []
    noise = torch.Generator().manual_seed(3)
    for _ in range(5):
        noisy = (x + 0.1 * torch.randn(1, 16, 24, generator=noise)).requires_grad_()
        copies.append(torch.autograd.grad(net(noisy)[:, -1].sum(), noisy)[0])
    found = saliency.smooth_grad(net, x, max(1, classes - 1), samples=5, seed=3)
    torch.testing.assert_close(found, torch.stack(copies).mean(0).abs()[:, 0])
    # of a linear score, RISE is the regression of the score on each pixel's being seen: with many masks its own weight
    # times what the pixel differs from the mean, smeared over the cells. So the two agree in sum and in place.
    line = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 24, 1, bias=False))
    torch.nn.init.zeros_(line[1].weight)
    line[1].weight.data.view(16, 24)[:8, :8] = 1.0
    bright = torch.zeros(1, 1, 16, 24)
    bright[0, 0, :8, :8] = 1.0
    heat = saliency.rise(line, bright, 1, masks=400, cells=3)[0]
    assert heat[:8, :8].mean() > 4 * heat[8:, 8:].abs().mean()


@pytest.mark.parametrize("classes", [2, 3])
def test_integrated_gradients_sum_to_the_difference_of_the_scores(classes):
    net, x = explained_net(classes), torch.rand(3, 1, 32, 32)
    blank = x.mean((2, 3), keepdim=True).expand_as(x)
    maps = saliency.integrated_gradients(net, x, target=1, steps=200)
    target = torch.ones(3, dtype=torch.long)
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
    net = explained_net()
    torch.nn.init.zeros_(net.head.weight)
    maps = saliency.grad_cam(net, torch.rand(2, 1, 32, 32), 1)
    assert (maps == 0).all()
    assert (saliency.energy_inside(maps, torch.ones(2, 32, 32, dtype=torch.bool)) == 0).all()
    assert (saliency.pointing_game(maps, torch.ones(2, 32, 32, dtype=torch.bool)) == 0).all()


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
    options = {"rise": {"masks": 8}, "ig": {"steps": 2}, "smoothgrad": {"samples": 2}}.get(name, {})
    wrong, seeds = torch.rand(2, 5, 32, 32), torch.get_rng_state()
    first = saliency.METHODS[name](net, x, 1, **options)
    assert not first.requires_grad
    with pytest.raises(RuntimeError):  # in the midst of a forward pass
        saliency.METHODS[name](net, wrong, 1, **options)
    assert look() == then
    assert torch.equal(torch.get_rng_state(), seeds)
    assert x.grad is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # BatchNorm's statistics too


def test_a_thousand_calls_hold_no_memory():
    import gc

    net, x = explained_net(), torch.rand(1, 1, 32, 32)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    saliency.grad_cam(net, x, 1)
    before = tensors()
    for _ in range(1000):
        saliency.grad_cam(net, x, 1)
    assert tensors() <= before


@pytest.mark.parametrize("name", saliency.METHODS)
def test_maps_of_a_batch_equal_those_of_its_images(name):
    net, x = explained_net(), torch.rand(3, 1, 32, 32)
    options = {"rise": {"masks": 16}, "ig": {"steps": 4}, "smoothgrad": {"samples": 3}}.get(name, {})
    together = saliency.METHODS[name](net, x, **options)
    alone = torch.cat([saliency.METHODS[name](net, one[None], **options) for one in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-3)
    assert together.shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "vgg16", "swin_t"])
def test_grad_cam_of_torchvision_networks_by_their_own_parts(name):
    """Against the network cut by hand, at another size than it was made for, and not square."""
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, weights=None), torch.rand(1, 3, 64, 96)
    cuts = {
        "resnet18": lambda m: net.fc(m.mean((2, 3))),
        "mobilenet_v2": lambda m: net.classifier(m.mean((2, 3))),
        "densenet121": lambda m: net.classifier(m.relu().mean((2, 3))),
        "convnext_tiny": lambda m: net.classifier(m.mean((2, 3), keepdim=True)),
        "vgg16": lambda m: net.classifier(net.avgpool(m).flatten(1)),
        "swin_t": lambda m: net.head(m.mean((2, 3))),
    }
    net.eval()
    if name == "swin_t":
        maps = net.permute(net.norm(net.features(x)))
    else:
        parts = list(net.children())[:-2] if name == "resnet18" else [net.features]
        maps = torch.nn.Sequential(*parts)(x)
    maps = maps.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(cuts[name](maps)[:, 7].sum(), maps)
    expected = (gradients.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu()
    net.train()
    found = saliency.grad_cam(net, x, 7)
    torch.testing.assert_close(found, F.interpolate(expected[:, None], size=(64, 96), mode="bilinear")[:, 0])
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_the_map_of_every_backbone_is_that_of_its_features(backbone):
    torch.manual_seed(0)
    net, x = models.CNet(backbone, 2, 1), torch.rand(1, 1, 64, 64)
    maps = saliency.grad_cam(net, x, 1, net.features) + saliency.grad_cam(net, x, 0, net.features)
    assert maps.shape == (1, 64, 64)
    assert maps.max() > 0
    ours = models.Ensemble([net.eval()], classes=["benign", "malignant"], size=64, load_size=64)
    torch.testing.assert_close(ours.explain(x, "gradcam", 1), saliency.grad_cam(net, x, 1, net.features))


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
        options = {"rise": {"masks": 70}, "ig": {"steps": 3}, "smoothgrad": {"samples": 3}}.get(name, {})
        return saliency.METHODS[name](models.WithPatients(net, meta), x, 1, **options)

    alone = torch.cat([look(x[i, None], meta[i, None]) for i in range(2)])
    torch.testing.assert_close(look(x, meta), alone, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(look(x, meta.flip(0)), alone, rtol=0.1)


@pytest.fixture(scope="module")
def planted():
    """Images whose class is a bright square or none, a network that has learnt it, and where the squares are."""
    generator = torch.Generator().manual_seed(0)
    n, size = 192, 48
    x, masks = (
        0.4 + 0.08 * torch.randn(n, 1, size, size, generator=generator),
        torch.zeros(n, size, size, dtype=torch.bool),
    )
    labels = torch.arange(n) % 2
    for i in torch.nonzero(labels)[:, 0].tolist():
        top, left = torch.randint(4, 32, (2,), generator=generator).tolist()
        masks[i, top : top + 12, left : left + 12] = True
    x = (x + 0.5 * masks[:, None]).clamp(0, 1)
    torch.manual_seed(0)
    net = models.CNet("small_cnn", 2, 1, normalise="fixed")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(n, generator=generator).split(32):
            loss = losses.classification_loss(net(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        assert float(metrics.auc(net(x)[:, 0], labels)) == 1.0
    rows = torch.nonzero(labels)[:16, 0]
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
    diameter = (data.box_of((inside | ring).numpy())[2] - data.box_of((inside | ring).numpy())[0]) / 64
    assert diameter == pytest.approx(0.2 * 1.5, abs=2.01 / 64)  # a quarter of a diameter on each side
    assert torch.nonzero(behind)[:, 0].min() > torch.nonzero(inside)[:, 0].max()
    assert torch.nonzero(before)[:, 0].max() < torch.nonzero(inside)[:, 0].min()
    shares, per_area = explain.evidence_shares(torch.ones(2, 64, 64), regions)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    torch.testing.assert_close(per_area[0], torch.ones(5))
    assert explain.evidence_shares(torch.zeros(2, 64, 64), regions)[0].isnan().all()


def test_the_atlas_lays_lesions_on_each_other():
    maps, boxes = (
        torch.zeros(3, 60, 60),
        torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.6, 0.5, 0.8, 0.7], [0.4, 0.4, 0.6, 0.6]]),
    )
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
        fresh = [
            not torch.equal(a, b)
            for a, b in zip(before, other.parameters(), strict=True)
            if a.numel() > 1 and a.std() > 0.01
        ]
        assert all(fresh)
        assert len(fresh) > 5


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
    assert "the model knows benign, malignant, normal; or give all" in error_of(
        call(explain, *base, "--target", "cyst")
    )
    said = error_of(call(explain, *base, "--target", "normal", "--method", "smoothgrad"))
    assert "the map of smoothgrad has no class" in said
    call(explain, *base[:-2])  # no method was asked for, and none evaluated
    assert Image.open(tmp_path / "o.png").width == wide
    assert report.recommended_method(tmp_path / "m.pt") == ("ig", "not evaluated on this model")
    (tmp_path / "explain.json").write_text('{"recommended": "rise"}')
    assert report.recommended_method(tmp_path / "m.pt") == ("rise", "")


def test_explanations_from_the_command_line(tmp_path, folders, capsys):
    folder, _, _ = quick(
        tmp_path,
        "--folds",
        "2",
        "--name",
        "f",
        "--epochs",
        "1",
        "--roi",
        "none,dnet",
        "--positive",
        "malignant",
        data_folder=folders,
    )
    common = ["--model", str(folder), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    explain.main([*common, "--evaluate", "--most", "6"])
    report = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert set(report["measures"]) == {*saliency.METHODS, *saliency.BASELINES}
    assert set(report["measures"]["ig"]) == set(explain.MEASURES)
    assert report["images"] == 6
    assert report["why"]
    explain.main([*common, "--hotspots", "--ring", "0.5", "--method", "layercam", "--most", "100"])
    table = (tmp_path / "out" / "hotspots.csv").read_text().splitlines()
    assert {line.split(" (")[0] for line in table[1:]} >= {"benign+normal", "malignant"}
    assert len(table) % len(explain.REGIONS) == 1
    rows = (tmp_path / "out" / "suspects.csv").read_text().splitlines()
    assert len(rows) == 1 + 68  # every lesion once; normal images have none
    near = [float(r.split(",")[3]) for r in rows[1:] if "nan" not in r]
    assert near == sorted(near)  # the shortcut suspects first
    assert Image.open(tmp_path / "out" / "atlas.png").size[0] > 600
    image, model = next((folders / "benign").glob("*(2).png")), folder / "fold1" / "model.pt"
    explain.main(
        [str(image), "--model", str(model), "--method", "all", "--out", str(tmp_path / "all.png"), "--device", "cpu"]
    )
    explain.main([str(image), "--model", str(model), "--out", str(tmp_path / "one.png")])
    assert Image.open(tmp_path / "all.png").size > Image.open(tmp_path / "one.png").size
    said = capsys.readouterr().out
    assert said.count(models.DISCLAIMER) == 4
    for options, why in [
        (["--method", "x"], "argument --method: invalid choice"),
        ([], "give an image"),
        (["--evaluate", "--model", str(tmp_path)], "no run of train.py"),
        (["nowhere.png", "--model", str(model)], "no such file"),
        (["--hotspots", "--model", str(folder), "--data", str(tmp_path / "no")], "no such file or folder"),
    ]:
        with pytest.raises(InputError, match=re.escape(why)):
            explain.main(options)


@pytest.fixture(scope="session")
def phantom_run(stranger):
    """The folder in which the stranger ran it, and what it printed."""
    folder, process = stranger
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder, said


def test_the_first_command_keeps_its_promise(phantom_run):
    folder, said = phantom_run
    report = json.loads((folder / "runs" / "phantoms" / "report.json").read_text())
    assert report["test"]["auc"]["value"] >= 0.95
    assert report["test"]["iou"]["value"] >= 0.60
    assert re.search(r"auc +0\.\d+ +\[0\.\d+, [01]\.\d+\]", said)
    command = re.search(r"try: python (infer\.py .*)", said)[1].split()
    answer = run(HERE / command[0], *command[1:], cwd=folder)
    assert answer.returncode == 0
    assert re.search(r"example\.png: (benign|malignant), p\(malignant\) = 0\.\d+", answer.stdout)
    assert answer.stdout.rstrip().endswith(models.DISCLAIMER)
    assert "PHANTOMS" in answer.stdout


# ---------------------------------------------------------------------------------------------------------------------
# infer.py


@pytest.fixture(scope="module")
def detector(phantom_run):
    return infer.BreastCancerDetector(phantom_run[0] / "runs" / "phantoms" / "model.pt")


KEYS = ["image", "prediction", "probability", "confidence", "probabilities", "uncertainty", "box", "refer", "error"]


def test_every_kind_of_input_gives_the_same_answer(tmp_path, detector):
    pixels = data.phantom_set(3, 64, seed=9).pixels[0, 0].numpy()
    path = tmp_path / "p.png"
    Image.fromarray(pixels).save(path)
    first = detector.predict(str(path))
    assert list(first) == KEYS
    assert first["error"] is None
    assert first["confidence"] == pytest.approx(first["probabilities"][first["prediction"]])
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    many = detector.predict(
        [path, Image.fromarray(pixels), pixels, pixels[:, :, None], pixels / 255, np.stack([pixels] * 3, 2)]
    )
    for other in many:
        assert {**other, "image": None} == {**first, "image": None}


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
    image = picture(48, 48, 3)
    image.save(tmp_path / "i.png")
    array = np.asarray(image)
    expected = detector.predict(image)
    tensor = torch.from_numpy(array.copy())
    with open(tmp_path / "i.png", "rb") as file:
        for form in [
            tmp_path / "i.png", file, (tmp_path / "i.png").read_bytes(), array, array.astype(np.int32),
            array.astype(np.uint16), array / 255, np.stack([array] * 3, 2), tensor, tensor[None], tensor.expand(3, 48, 48),
        ]:  # fmt: skip
            found = detector.predict(form)
            for key in ("probability", "uncertainty", "box"):
                assert found[key] == pytest.approx(expected[key], abs=1e-3), (key, type(form))
    batches = [np.stack([array] * 5), np.stack([np.stack([array] * 3, 2)] * 2), tensor.expand(2, 1, 48, 48)]
    for batch in [*batches, (one for one in [array, array])]:
        found = detector.predict(batch)
        assert len(found) == (2 if batch is not batches[0] else 5)
        assert all(r["probability"] == pytest.approx(expected["probability"], abs=1e-5) for r in found)


def test_pictures_of_one_name_get_overlays_of_their_own(tmp_path):
    files = ["A/us/1.png", "A/us/1.bmp", "B/us/1.png", "B/us/1.png", "A/us_1.png"]
    names = list(infer.overlay_names([str(tmp_path / f) for f in files]))
    assert names == [f"{n}_overlay.png" for n in ("A_us_1.png", "A_us_1.bmp", "B_us_1.png", "B_us_1.png_2", "A_us_1.png_2")]  # fmt: skip
    assert list(infer.overlay_names(["x/one.png"])) == ["one.png_overlay.png"]


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


def test_boxes_are_in_the_pixels_of_the_original(detector):
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
    assert infer.answer([0.8, 0.2], 0.0, info)["prediction"] == "malignant"
    assert infer.answer([0.81, 0.19], 0.0, info)["prediction"] == "benign"
    assert infer.answer([0.75, 0.25], 0.0, info)["refer"]  # near the threshold
    assert not infer.answer([0.3, 0.7], 0.0, info)["refer"]
    assert not infer.answer([0.95, 0.05], 0.0, info)["refer"]
    assert infer.answer([0.3, 0.7], 0.3, info)["refer"]  # the opinions differ


def test_the_command_line_answers_what_it_can(tmp_path, phantom_run):
    model = phantom_run[0] / "runs" / "phantoms" / "model.pt"
    scans = tmp_path / "scans"
    (scans / "deep").mkdir(parents=True)
    good = awkward_images(scans)
    Image.new("L", (1, 1), 9).save(scans / "one.png")
    Image.new("L", (20_000, 40), 9).save(scans / "deep" / "wide.png")
    picture().save(scans / "deep" / "wide_mask.png")  # a mask is no picture to diagnose
    bad = bad_files(scans)
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
    one = run(HERE / "infer.py", scans / "grey.png", "--model", model, "--tta", "1", "--device", "cpu")
    assert one.returncode == 0
    assert "uncertainty 0.000" in one.stdout
    for options, why in [
        (["--tta", "0"], "must lie in 1 ... 8"),
        (["--model", tmp_path / "x.pt"], "no such file"),
        (["--meta", "a=1"], "images alone"),
    ]:
        assert why in error_of(call(infer, scans / "grey.png", "--model", model, *options))
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in error_of(run(HERE / "infer.py", tmp_path / "empty", "--model", model))
    assert "no model under runs/" in error_of(run(HERE / "infer.py", scans / "grey.png", cwd=tmp_path))


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
    said = call(infer, tmp_path / "i.png", "--model", tmp_path / "m.pt", "--tta", "1", "--scales", "0.75", "1", "1.25", "--json")  # fmt: skip
    assert json.loads(said.stdout)["probability"] == together["probability"]
    wrong = call(infer, tmp_path / "i.png", "--model", tmp_path / "m.pt", "--scales", "0")
    assert "--scales: 0: must lie in 0.25 ... 4" in error_of(wrong)


def test_the_worth_of_views_is_that_of_the_detectors_answers(tmp_path, folders):
    folder, _, _ = quick(tmp_path, "--positive", "malignant", "--nets", "cnet", "--folds", "2", "--name", "v", data_folder=folders)  # fmt: skip
    said = run(
        HERE / "infer.py", "--model", folder, "--evaluate", "--tta", "3", "--scales", "1", "1.5",
        "--data", folders, "--cache", tmp_path / "cache", "--device", "cpu",
    ).stdout  # fmt: skip
    table = json.loads((folder / "views.json").read_text())
    assert list(table) == ["1 view", "3 views", "3 views x 1, 1.5"]
    report = json.loads((folder / "report.json").read_text())
    images = quiet_load(folders, 32, positive="malignant")
    base = None
    for (name, row), (views, scales) in zip(table.items(), [(1, [1.0]), (3, [1.0]), (3, [1.0, 1.5])], strict=True):
        answers, labels = [], []
        for fold in ("fold1", "fold2"):
            rows = torch.load(folder / fold / "test.pt", weights_only=True)["rows"]
            detector = infer.BreastCancerDetector(folder / fold, "cpu", views, scales)
            answers += detector.predict([images.names[i] for i in rows.tolist()])
            labels += images.labels[rows].tolist()
        scores = torch.tensor([a["probability"] for a in answers])
        wrong = [(a["prediction"] == "malignant") != bool(y) for a, y in zip(answers, labels, strict=True)]
        area = float(metrics.auc(scores, torch.tensor(labels)))
        base = area if base is None else base
        referred = [a["refer"] for a in answers]
        caught = sum(r and w for r, w in zip(referred, wrong, strict=True)) / sum(wrong)
        recall = [1 - np.mean([w for w, y in zip(wrong, labels, strict=True) if y == c]) for c in (0, 1)]
        expected = {
            "auc": area,
            "change": area - base,
            "balanced_accuracy": sum(recall) / 2,
            "referred": sum(referred) / len(referred),
            "caught": caught,
        }
        for what, value in expected.items():
            assert row[what]["value"] == pytest.approx(value, abs=0.01), (name, what)  # the answers are rounded
        assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"]
        assert f"{row['auc']['value']:.3f} [" in said
    assert table["1 view"]["auc"]["value"] == pytest.approx(report["test"]["auc"]["value"], abs=2e-3)
    assert table["1 view"]["change"] == {"value": 0, "low": 0, "high": 0}
    assert "give an image, or --evaluate" in error_of(run(HERE / "infer.py", "--model", folder))
    for options, why in [
        (["--model", str(tmp_path)], "no run of train.py"),
        (["--model", str(folder), "i.png"], "takes the held-out images"),
        (["--model", str(folder), "--scales", "9"], "--scales: 9: must lie in"),
    ]:
        with pytest.raises(InputError, match=why):
            infer.main(["--evaluate", *options])


def test_prediction_imports_no_more_than_it_needs(tmp_path, phantom_run):
    model = phantom_run[0] / "runs" / "phantoms" / "model.pt"
    code = f"import sys, infer; infer.main(['{model.parent}/example.png', '--model', '{model}']); print(sorted(sys.modules))"
    loaded = run("-c", code).stdout
    for name in ("'train'", "'plots'", "'metrics'", "'torchvision'", "'PIL.ImageDraw'"):
        assert name not in loaded, name


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


@pytest.mark.parametrize("name", models.BACKBONES)
def test_a_backbone_is_saved_under_torchvisions_names(tmp_path, name, capsys):
    torch.manual_seed(0)
    features, _ = models.build_backbone(name, 1)
    torch.save(models.torchvision_state(name, features), tmp_path / "b.pt")
    loaded, _ = models.build_backbone(name, 1, str(tmp_path / "b.pt"))
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), features.eval()(x), atol=1e-4, rtol=1e-4)
    assert "not fitting" not in capsys.readouterr().out


@pytest.mark.parametrize("method", list(pretrain.METHODS))
def test_pretraining_sees_no_label_and_no_test_image(tmp_path, folders, method, monkeypatch):
    options = ["--data", str(folders), "--size", "32", "--epochs", "2", "--batch", "16", "--steps-per-epoch", "3"]
    options += ["--method", method, "--temperature", "0.3", "--decay", "0.9", "--save-seconds", "0"]
    options += ["--runs", str(tmp_path), "--cache", str(tmp_path / "c")]
    honest = train.load_images

    def poisoned(args, log=print):
        images = honest(args, log)
        images.labels[:] = -1
        test = [i for i, s in enumerate(images.splits) if s == "test"]
        assert test
        images.pixels = images.pixels.clone()
        images.pixels[test] = 255
        return images

    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.main([*options, "--name", "a"])
        monkeypatch.setattr("options.load_images", poisoned)
        pretrain.main([*options, "--name", "b"])
        monkeypatch.setattr("options.load_images", honest)
    a, b = (torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab")
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    _, said, _ = quick(tmp_path, "--weights", str(tmp_path / "a" / "backbone.pt"), "--nets", "cnet", "--name", "t", data_folder=folders)  # fmt: skip
    assert "not fitting" not in said
    # killed after the first epoch, it ends with the same weights
    (tmp_path / "k").mkdir()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "k" / "config.json").write_text(json.dumps(config))
    with contextlib.redirect_stdout(io.StringIO()), monkeypatch.context() as patch:
        original = train.train_epoch

        def interrupted(*more, **options):
            train.Interrupt.asked = True
            return original(*more, **options)

        patch.setattr(train, "train_epoch", interrupted)
        with pytest.raises(SystemExit):
            pretrain.main(["--resume", str(tmp_path / "k")])
        patch.undo()
        pretrain.main(["--resume", str(tmp_path / "k")])
    killed = torch.load(tmp_path / "k" / "backbone.pt", weights_only=True)
    assert all(torch.equal(v, killed[k]) for k, v in a.items())


def test_pretraining_makes_two_views_of_an_image_alike(tmp_path):
    """Without a label: at which rank, among 64 new phantoms, the other view of an image comes. By chance it is 32."""
    options = ["--size", "32", "--epochs", "12", "--lr", "3e-3", "--runs", str(tmp_path), "--name", "p"]
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.main(options)
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
    assert rank[1] < rank[0] / 3
    assert rank[1] < 6


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: k-center


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: strategies


def test_monte_carlo_dropout_is_dropout():
    torch.manual_seed(0)
    member = models.CNet("small_cnn", 2, 1, dropout=0.4).eval()
    torch.nn.init.normal_(member.head.weight)
    x = torch.rand(6, member.width)
    ours = al_loop.sample_dropout(member, x, torch.Generator().manual_seed(0), 4000)
    with torch.no_grad():
        member.dropout.train()
        theirs = torch.stack([models.to_probabilities(member.classify(x)) for _ in range(4000)])
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.02, rtol=0)


def test_the_pool_is_seen_as_it_is_by_every_member(tmp_path):
    """No augmentation, no dropout, no batch statistics: embeddings and answers image by image."""
    torch.manual_seed(0)
    model = small_model(roi="dnet")
    images = data.phantom_set(9, 32)
    rows, boxes = torch.tensor([8, 0, 3]), torch.rand(9, 4).sort(1).values
    embeddings, probabilities = al_loop.observe(model, images, rows, boxes, batch=2)
    assert embeddings.shape == (3, model.members[0].width)
    with torch.no_grad():
        for i, row in enumerate(rows.tolist()):
            pixels = images.pixels[row : row + 1]
            region = augment.crop_regions(boxes[row : row + 1], model.info["margin"])
            expected = model.members[0].embed(augment.crop(pixels, region, 32))[0]
            torch.testing.assert_close(embeddings[i], expected, atol=1e-5, rtol=1e-4)
            each = model.member_probabilities(pixels, boxes[row : row + 1])[:, 0]
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
    needed = table["better"]["needed"]["0.90"]
    assert needed["low"] <= needed["ratio"] <= needed["high"] < 1
    assert needed["ratio"] == pytest.approx(40 / 60, abs=0.1)
    assert table["random"]["needed"]["0.95"]["ratio"] == 1
    assert table["worse"]["needed"]["0.99"]["labels"] is None


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: the loop, as it is called

LOOP = ["--size", "32", "--model", "small_cnn", "--weights", "none", "--epochs", "2", "--steps-per-epoch", "2"]
LOOP += ["--batch", "8", "--lr", "3e-3", "--start", "8", "--query", "4", "--rounds", "2"]


def loop(folder, *options, data_folder):
    """One active-learning run in this process. Returns (al.json, what it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        al_loop.main(["--data", str(data_folder), "--positive", "malignant", *LOOP, "--runs", str(folder), "--cache", str(folder / "cache"), *options])  # fmt: skip
    name = options[options.index("--name") + 1]
    return json.loads((folder / name / "al.json").read_text()), out.getvalue()


def without_times(report):
    return json.loads(re.sub(r'"seconds": [\d.]+', '"seconds": 0', json.dumps(report)))


def test_the_loop_reports_every_round_of_every_strategy(tmp_path, folders):
    report, said = loop(tmp_path, "--strategies", "all", "--repeats", "2", "--name", "a", data_folder=folders)
    assert report["labels"] == [8, 12, 16]
    pool = {n for n, s in zip(*(lambda i: (i.names, i.splits))(quiet_load(folders, 32, positive="malignant")), strict=True) if s == "train"}  # fmt: skip
    chains = {(c["strategy"], c["seed"]): c["rounds"] for c in report["chains"]}
    assert set(chains) == {(s, r) for s in [*al_loop.STRATEGIES, "all"] for r in (0, 1)}
    for (strategy, seed), rounds in chains.items():
        picked = [name for r in rounds for name in r["picks"]]
        assert len(set(picked)) == len(picked) == rounds[-1]["labels"]
        assert set(picked) <= pool  # never the test split
        if strategy != "all":
            assert rounds[0]["picks"] == chains["random", seed][0]["picks"]  # the same start set ...
            assert rounds[0]["auc"] == chains["random", seed][0]["auc"]  # ... and the same training on it
    assert chains["random", 0][0]["picks"] != chains["random", 1][0]["picks"]
    assert len(chains["all", 0][0]["picks"]) == len(pool)
    assert set(report["table"]) == set(al_loop.STRATEGIES)
    assert len(report["words"]) == 6
    assert "labels needed" in said
    assert Image.open(tmp_path / "a" / "curves.png").size == (1040, 40 + 7 * 400 + 24)
    assert all("iou" in r for rounds in chains.values() for r in rounds)


def test_the_labels_of_the_pool_stay_hidden_until_they_are_bought(tmp_path, folders, monkeypatch):
    """Every label and box that was never bought is changed: not one pick and not one result may differ."""
    options = ("--strategies", "coreset,badge,committee", "--committee", "2", "--distill", "pool")
    first, _ = loop(tmp_path, *options, "--name", "a", data_folder=folders)
    bought = {(c["strategy"], name) for c in first["chains"] for r in c["rounds"] for name in r["picks"]}
    original, seen = train.train_model, []

    def watched(images, rows, *more, **options):
        known = torch.zeros(len(images), dtype=torch.bool)
        known[rows] = True
        assert (images.labels[~known] == -1).all()
        assert images.boxes[~known].isnan().all()
        assert images.masks is None
        seen.append(int(known.sum()))
        return original(images, rows, *more, **options)

    monkeypatch.setattr(train, "train_model", watched)
    honest = train.load_images

    def poisoned(args, log=print):
        images = honest(args, log)
        rest = [i for i in images.rows("train").tolist() if not any((s, images.names[i]) in bought for s in STRATEGY)]
        assert rest
        images.labels[rest] = 1 - images.labels[rest]
        images.boxes[rest] = torch.tensor([0.0, 0.0, 0.1, 0.1])
        return images

    for name in ("coreset", "badge", "committee"):
        STRATEGY = {name, "random"}
        monkeypatch.setattr("options.load_images", poisoned)
        second, _ = loop(tmp_path, *options[:1], name, *options[2:], "--name", f"b-{name}", data_folder=folders)
        for told in (first, second):
            told["picked"] = {c["strategy"]: without_times(c) for c in told["chains"]}
        assert second["picked"][name] == first["picked"][name]
        assert second["picked"]["all"] != first["picked"]["all"]  # where the labels are bought, they count
    assert {8, 12, 16} < set(seen)


def test_a_killed_loop_ends_with_the_same_result(tmp_path, folders):
    command = [HERE / "al_loop.py", "--data", folders, "--positive", "malignant", *LOOP, "--strategies", "coreset"]
    command += ["--distill", "labelled", "--warm-start", "--runs", tmp_path, "--cache", tmp_path / "cache", "--name"]
    assert run(*command, "whole").returncode == 0
    process = subprocess.Popen(list(map(str, [sys.executable, *command, "killed"])), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"coreset +seed 0 +12 labels", line):
            process.kill()
            break
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "killed" / "al.json").exists()
    result = run(HERE / "al_loop.py", "--resume", tmp_path / "killed")
    assert result.returncode == 0, result.stderr
    assert " 8 labels" not in result.stdout  # what was done is not done again
    whole, resumed = (json.loads((tmp_path / n / "al.json").read_text())["chains"] for n in ("whole", "killed"))
    assert without_times(resumed) == without_times(whole)


def test_workers_give_the_result_of_one(tmp_path, folders):
    one, _ = loop(tmp_path, "--strategies", "entropy", "--name", "one", "--nets", "cnet", data_folder=folders)
    command = ["--data", folders, "--positive", "malignant", *LOOP, "--strategies", "entropy", "--nets", "cnet"]
    result = run(HERE / "al_loop.py", *command, "--runs", tmp_path, "--name", "two", "--workers", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "al.json").read_text())
    picks = [{c["strategy"]: [r["picks"] for r in c["rounds"]] for c in report["chains"]} for report in (one, two)]
    assert picks[0]["random"] == picks[1]["random"]
    assert picks[0]["all"] == picks[1]["all"]
    assert {c["strategy"] for c in two["chains"]} == {"all", "random", "entropy"}


def test_warm_start_and_cold_start(tmp_path, folders):
    options = ("--strategies", "random", "--nets", "cnet", "--start-by", "typiclust", "--ignore-groups")
    cold, _ = loop(tmp_path, *options, "--name", "cold", data_folder=folders)
    warm, _ = loop(tmp_path, *options, "--warm-start", "--name", "warm", data_folder=folders)
    by_chance, _ = loop(tmp_path, *options[:4], "--name", "chance", data_folder=folders)
    first, second = ({c["strategy"]: c["rounds"] for c in r["chains"]}["random"] for r in (cold, warm))
    assert first[0]["picks"] == second[0]["picks"] != {c["strategy"]: c["rounds"] for c in by_chance["chains"]}["random"][0]["picks"]  # fmt: skip
    assert first[0]["auc"] == second[0]["auc"]
    assert [r["auc"] for r in first[1:]] != [r["auc"] for r in second[1:]]


def test_a_run_is_compared_with_another_seed_by_seed(tmp_path, folders):
    options = ("--strategies", "coreset", "--repeats", "2", "--nets", "cnet")
    plain, _ = loop(tmp_path, *options, "--name", "plain", data_folder=folders)
    other, _ = loop(tmp_path, *options, "--distill", "pool", "--alpha", "0.1", "--name", "d", data_folder=folders)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):  # afterwards, of two finished runs
        al_loop.main(["--resume", str(tmp_path / "d"), "--against", str(tmp_path / "plain")])
    report = json.loads((tmp_path / "d" / "al.json").read_text())
    assert report["chains"] == other["chains"]
    means = []
    for some in (other, plain):
        chains = [[r["auc"] for r in c["rounds"]] for c in some["chains"] if c["strategy"] == "coreset"]
        means.append([(a / 2 + b + c / 2) / 2 for a, b, c in chains])  # trapezoids over 8, 12, 16 labels
    expected = sum(a - b for a, b in zip(*means, strict=True)) / 2
    assert report["against"]["coreset"]["gain"] == pytest.approx(expected)
    assert set(report["against"]) == {"random", "coreset"}
    assert "coreset: mean AUC against its own in the other run" in out.getvalue()
    before = set(tmp_path.iterdir())
    for against, wrong, why in (
        ("nowhere", [], "no al.json there"),
        ("plain", ["--query", "3"], "other numbers of labels"),
        ("plain", ["--seed", "7"], "no seed in common"),
        ("plain", ["--drop-class", "normal"], "other classes"),
        ("plain", ["--nets", "dnet"], "no C-Net"),
    ):
        with pytest.raises(InputError, match=why):
            loop(tmp_path, "--nets", "cnet", "--against", str(tmp_path / against), *wrong, data_folder=folders)
    assert set(tmp_path.iterdir()) == before  # nothing was begun


def test_what_the_loop_refuses(folders):
    for options, why in [
        (["--strategies", "coreset,luck"], "--strategies luck: no such strategy"),
        (["--start", "500"], "more than the pool"),
        (["--query", "0"], "--query: 0: must lie in"),
        (["--committee", "1"], "--committee: 1: must lie in"),
        (["--folds", "3"], "--folds"),
        (["--strategies", "bald", "--dropout", "0"], "--dropout above 0"),
    ]:
        with pytest.raises(InputError, match=why):
            al_loop.main(["--data", str(folders), "--positive", "malignant", *LOOP, *options])
    assert "no such strategy" in error_of(run(HERE / "al_loop.py", *LOOP, "--strategies", "luck"))


# ---------------------------------------------------------------------------------------------------------------------
# al_loop.py: a person in the loop


@pytest.fixture(scope="module")
def helper(tmp_path_factory, folders):
    """A small model of `folders`, and a pool of new images."""
    folder = tmp_path_factory.mktemp("helper")
    quick(folder, "--positive", "malignant", "--name", "m", data_folder=folders)
    pool = folder / "pool"
    pool.mkdir()
    for i in range(14):
        image = picture(70, 50, 1000 + i)
        ImageDraw.Draw(image).ellipse([20, 10, 44, 34], fill=250 if i % 2 else 5)
        image.save(pool / f"new {i}.png")
    Image.open(pool / "new 3.png").save(pool / "copy of 3.png")
    Image.open(folders / "benign" / "benign (1).png").save(pool / "old.png")
    return folder


def suggestion(helper, out, *options):
    result = call(al_loop, "suggest", "--model", helper / "m", "--pool", helper / "pool", "--query", "5", "--out", out, "--cache", helper / "cache", "--device", "cpu", *options)  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(out / "to_label.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", list(al_loop.STRATEGIES))
def test_suggest_lists_what_to_label(tmp_path, helper, folders, strategy):
    if strategy == "committee":
        result = call(al_loop, "suggest", "--model", helper / "m", "--pool", helper / "pool", "--strategy", strategy, "--query", "3", "--out", tmp_path)  # fmt: skip
        assert "a committee needs members" in error_of(result)
        return
    rows = suggestion(helper, tmp_path / "out", "--strategy", strategy, "--seed", "4", "--labelled", folders)
    names = [Path(r["image"]).name for r in rows]
    assert len(set(names)) == 5
    assert "old.png" not in names  # shows what a labelled image shows
    assert not {"new 3.png", "copy of 3.png"} <= set(names)
    detector = infer.BreastCancerDetector(helper / "m" / "model.pt", "cpu", tta=1)
    for number, row in enumerate(rows, 1):
        answer = detector.predict(row["image"])
        assert row["number"] == str(number)
        assert row["suggested_label"] == answer["prediction"]
        assert float(row["probability"]) == pytest.approx(answer["probability"], abs=6e-4)
        assert [float(v) for v in row["suggested_box"].split()] == pytest.approx(answer["box"], abs=0.51)
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
        writer = csv.DictWriter(file, al_loop.HEADER)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_learn_trains_with_the_answers_and_says_what_changed(tmp_path, helper, folders):
    rows = suggestion(helper, tmp_path / "out")
    answers = fill_in(tmp_path / "out" / "to_label.csv", rows, label={0: ""}, box={0: ""})
    written = answers.read_bytes()
    command = [
        "--labels",
        answers,
        "--partial",
        "--data",
        folders,
        "--positive",
        "malignant",
        *TINY,
        "--runs",
        tmp_path,
    ]
    result = run(HERE / "al_loop.py", "learn", *command, "--name", "l", "--cache", tmp_path / "c")
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
    again = run(
        HERE / "al_loop.py", "suggest", "--model", helper / "m", "--pool", helper / "pool", "--out", answers.parent
    )
    assert "may have answers" in error_of(again)
    assert answers.read_bytes() == written
    # what was answered is not asked again
    more = suggestion(helper, tmp_path / "more", "--labelled", answers)
    assert not {r["image"] for r in more} & {r["image"] for r in rows}


def test_learn_names_the_row_that_it_can_not_use(tmp_path, helper, folders):
    rows = suggestion(helper, tmp_path / "out")
    base = ["--data", folders, "--positive", "malignant", *TINY, "--runs", tmp_path, "--cache", tmp_path / "c"]
    for columns, why in [
        ({"label": {2: ""}, "box": {2: ""}}, "no label in 1 rows (4)"),
        ({"label": {1: ""}}, "row 3"),
        ({"label": {0: "cancer?"}}, "row 2"),
        ({"image": {4: str(tmp_path / "gone.png")}}, "row 6 (gone.png): the image is not there any more"),
        ({"box": {3: "1 2 3"}}, "line 5: box '1 2 3'"),
    ]:
        answers = fill_in(tmp_path / "answers.csv", rows)
        if "image" not in columns:
            fill_in(answers, rows, **columns)
        else:
            answers.write_text(answers.read_text().replace(rows[4]["image"], columns["image"][4]))
        with pytest.raises(InputError, match=re.escape(why)):
            al_loop.main(["learn", "--labels", str(answers), *map(str, base)])
    images = quiet_load(folders, 32, positive="malignant")
    fill_in(answers, rows, label={2: ""}, box={2: ""})
    entries = al_loop.read_answers(answers, images.classes, partial=True)
    assert len(entries) == 4
    assert "give the filled-in to_label.csv" in error_of(run(HERE / "al_loop.py", "learn", *base))


def test_an_answer_that_shows_a_test_image_is_left_out(tmp_path, folders, capsys):
    images = quiet_load(folders, 32, positive="malignant")
    args = parse(["--data", str(folders), *TINY, "--cache", str(tmp_path)])
    test, known = (images.names[int(images.rows(s)[0])] for s in ("test", "train"))
    Image.open(test).save(tmp_path / "copy.png")
    picture(70, 50, 777).save(tmp_path / "new.png")
    entries = [readers.Entry(str(p), str(p), 1) for p in (tmp_path / "copy.png", known, tmp_path / "new.png")]
    more, rows = al_loop.add_answers(images, entries, args)
    assert [more.names[i] for i in rows] == [str(tmp_path / "new.png")]
    assert more.labels[rows].tolist() == [1]
    said = capsys.readouterr().out
    assert "copy.png: it shows the same as an image of the validation or test split" in said
    assert f"{known}: it has a label in --data" in said


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_benchmark_prints_ours_the_floor_and_the_ratio(tmp_path):
    source = class_folders(tmp_path)
    options = ["--quick", "--runs", "1", "--device", "cpu", "--data", source, "--weights", "none"]
    result = run(HERE / "bench.py", *options)
    assert result.returncode == 0, result.stderr
    assert "second start: 20 images" in result.stdout
    for line in ("epoch, resnet18", "Grad-CAM, mobilenet_v2", "k-center, resnet18"):
        assert re.search(rf"{line}.*ours +\d+\.\d+ s   floor +\d+\.\d+ s   ratio \d+\.\d+", result.stdout)


def test_the_benchmark_weighs_model_files(tmp_path):
    spec = [{"column": "age", "mean": 50.0, "sd": 10.0}]
    nets = [models.CNet("small_cnn", 3, 1, meta=2), models.CNet("small_cnn", 3, 1, meta=2)]
    classes = ["a", "b", "c"]
    ensemble = models.Ensemble(nets, dnet=models.DNet("small_cnn", 1), classes=classes, size=32, load_size=32, channels=1, meta_spec=spec)  # fmt: skip
    models.save(tmp_path / "m.pt", ensemble)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench.main(["--models", str(tmp_path / "m.pt"), "--runs", "1", "--device", "cpu"])
    weights = sum(v.numel() for net in (*nets, ensemble.dnet) for v in net.parameters())
    size = (tmp_path / "m.pt").stat().st_size
    assert f"3 networks, {weights / 1e6:.1f} M weights, {size / 1e6:.1f} MB" in out.getvalue()
    assert re.search(r"32 answers .*ours +\d+\.\d+ s   floor", out.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# The house: what may import what, rooms of one sitting, files to copy whole, a README that runs

FLOORS = [
    ["augment", "losses", "query", "saliency", "metrics", "phantoms"],
    ["readers"],
    ["data"],
    ["models"],
    ["plots"],
    ["options"],
    ["report"],
    ["train"],
    ["infer", "explain", "al_loop", "search", "pretrain"],
    ["bench"],
]


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
        allowed = {"torch", "torchvision"} if name in FLOORS[0] else packages
        foreign = {m for m in found - set(floor) if m not in sys.stdlib_module_names}
        assert foreign <= allowed, (name, foreign)


def test_rooms_of_one_sitting():
    for name, tree in sources().items():
        assert len((HERE / f"{name}.py").read_text().splitlines()) <= 750, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (name, node.name)
    assert len(Path(__file__).read_text().splitlines()) < 3000
    assert len((HERE / "README.md").read_text().splitlines()) < 170


def alone(folder, name, code):
    """Run code in a fresh process beside a copy of one file, with no way to the project."""
    shutil.copy(HERE / f"{name}.py", folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", FLOORS[0])
def test_a_file_of_the_ground_floor_works_alone_on_a_torchvision_network(tmp_path, name):
    """What its own docstring shows runs as printed, and it meets a network that is none of ours."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))
    example = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert len(example.splitlines()) >= 3
    code = f"import torch, torchvision\nfrom {name} import *\n{example}\n" + textwrap.dedent("""
        torch.manual_seed(0)
        net, images = torchvision.models.resnet18(weights=None).eval(), torch.rand(4, 3, 64, 96)
    """)
    code += {
        "augment": "assert net(augment(images)[0]).shape == (4, 1000); assert len(net(tta_views(images, views=3))) == 12",
        "losses": "loss = distillation_loss(net(images), torch.arange(4), net(images).softmax(1).detach(), 0.5, 2.0)\nloss.backward()",
        "query": "e = net(images).detach()\nassert len(set(k_center_greedy(e, 3)[0].tolist())) == 3",
        "saliency": "assert grad_cam(net, images).shape == (4, 64, 96); assert rise(net, images, masks=4).shape == (4, 64, 96)",
        "metrics": "p = net(images).softmax(1)[:, :2]\nassert 0 <= with_intervals(p / p.sum(1, True), [0, 1, 1, 0])['auc']['value'] <= 1",
        "phantoms": "pixels, labels, masks = phantoms(4, 64)\nassert net(pixels.float().expand(-1, 3, -1, -1)).shape == (4, 1000)",
    }[name]
    done = alone(
        tmp_path,
        name,
        code
        + "\nimport sys\nassert not {'numpy.random.mtrand', 'data', 'models'} - {'numpy.random.mtrand'} & set(sys.modules)",
    )
    assert done.returncode == 0, done.stderr


def readme_blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_every_python_block_of_the_readme_runs_as_printed(tmp_path):
    blocks = readme_blocks("python")
    assert len(blocks) >= 5
    result = run("-c", "\n".join(blocks), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[2, 64, 64]" in result.stdout


def test_the_readme_speaks_of_options_and_files_that_are_there():
    text = (HERE / "README.md").read_text()
    told = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    tables = "".join((HERE / f"{name}.py").read_text() for name in ("options", "infer", "explain", "al_loop"))
    known = set(re.findall(r'\("([a-z][a-z-]*)", ', tables))
    assert told <= known, told - known
    for name in re.findall(r"`([\w/]+\.(?:py|md|args|txt))`", text) + re.findall(r"\]\(([\w/.]+)\)", text):
        assert (HERE / name).is_file(), name
    assert sum(p.stat().st_size for p in (HERE / "docs").glob("*.png")) < 400_000


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
    assert len(data.near_duplicates(images.thumbnails)[0]) > 150
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


@needs_data
def test_real_weights_fit_the_network(capsys):
    models.CNet("mobilenet_v2", weights=str(DATA / "weights" / "mobilenet_v2-features.pth"))
    assert "2 missing in the file: classifier.1.bias, classifier.1.weight" in capsys.readouterr().out
