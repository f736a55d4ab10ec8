"""Pictures, with Pillow alone: line and bar charts, confusion matrix, contact sheet, a heat map and a box over an image.

Each function returns a PIL image; `page` lays several side by side. Charts are drawn at twice their size and scaled
down, which is all the antialiasing that a line needs. The colours are Okabe and Ito's, told apart by everyone."""

import dataclasses
import functools
import io
import itertools

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from files import write_atomically
from models import DISCLAIMER
from pictures import origin, own_part

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D"]
GREY, LIGHT = "#555555", "#DDDDDD"
SCALE = 2


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def fitted(text, width, size):
    """A text, or as much of its beginning as fits into so many pixels."""
    cuts = [text, *(text[:n] + ".." for n in range(len(text) - 1, 0, -1)), ""]
    return next(cut for cut in cuts if font(size).getlength(cut) <= width)


def save_png(image, path):
    """Write a picture so that a kill never leaves half of it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def page(images, columns=2, title=""):
    """Lay pictures of one size in a grid, a title above, the disclaimer below."""
    w, h = images[0].size
    top = 40 if title else 0
    wide = max(w * columns, *(32 + round(font(n).getlength(text)) for n, text in ((18, title), (11, DISCLAIMER))))
    sheet = Image.new("RGB", (wide, top + h * -(-len(images) // columns) + 24), "white")
    ImageDraw.Draw(sheet).text((16, sheet.height - 20), DISCLAIMER, GREY, font(11))
    for i, image in enumerate(images):
        sheet.paste(image, (w * (i % columns), top + h * (i // columns)))
    ImageDraw.Draw(sheet).text((16, 12), title, "black", font(18))
    return sheet


@dataclasses.dataclass
class Series:
    """What a chart draws under one name: x and y (N,), points that are not finite left out. "" is not listed.

    low, high (N,): a band behind the line, or error bars at dots. dots: no line; texts: what stands beside each dot.
    style: a colour's name, or a number that looks alike in every chart (colours, then the same ones dashed); default:
    the place among the series."""

    name: str
    x: list
    y: list
    low: list = None
    high: list = None
    dots: bool = False
    texts: list = ()
    style: int | str = None

    @property
    def colour(self):
        return self.style if isinstance(self.style, str) else COLOURS[self.style % len(COLOURS)]


DIAGONAL = Series("", [0, 1], [0, 1], style="#AAAAAA")


def line_chart(series, title="", x_label="", y_label="", x_range=None, y_range=None, x_axis="linear", size=(520, 400)):
    """A chart of some Series. Ranges default to the data's own; what lies above or below is drawn at the edge.
    x_axis: "linear", "log", "whole" (ticks at whole numbers alone), or the ticks themselves."""
    free = itertools.count()
    series = [dataclasses.replace(s, style=next(free) if s.style is None else s.style) for s in series]
    x_range = x_range or data_range(s.x for s in series)
    y_range = y_range or data_range(v for s in series for v in (s.y, s.low, s.high) if v is not None)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(image)
    left, right, bottom = 70 * SCALE, image.width - 20 * SCALE, image.height - 50 * SCALE
    draw.text((left, 12 * SCALE), fitted(title, right - left, 15 * SCALE), "black", font(15 * SCALE))
    top = list_names(draw, series, left, right)
    draw.text(((left + right) / 2, image.height - 8 * SCALE), x_label, GREY, font(12 * SCALE), anchor="mb")
    side = Image.new("RGB", (bottom - top, 18 * SCALE), "white")
    ImageDraw.Draw(side).text((side.width / 2, 0), y_label, GREY, font(12 * SCALE), anchor="ma")
    image.paste(side.rotate(90, expand=True), (4 * SCALE, top))
    place = draw_axes(draw, (left, top, right, bottom), x_range, y_range, x_axis)
    for one in series:
        if one.low is not None:
            draw_spread(image, one, place)
    for one in series:
        draw_series(draw, one, place, right)
    return image.resize(size, Image.Resampling.LANCZOS)


def data_range(columns):
    """(smallest, largest) of the finite numbers, never equal."""
    values = np.concatenate([np.asarray(v, float) for v in columns] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    room = 0 if high > low else abs(low) / 2 or 0.5
    return low - room, high + room


def list_names(draw, series, left, right):
    """The names in rows above the chart, each beside a piece of its line. Returns where the chart may begin."""
    x, y = left, 44 * SCALE
    for one in (s for s in series if s.name):
        key = (16 if one.dots else 26) * SCALE
        name = fitted(one.name, right - left - key, 12 * SCALE)
        width = key + font(12 * SCALE).getlength(name)
        if x > left and x + width > right:
            x, y = left, y + 18 * SCALE
        if one.dots:
            dot(draw, x + 5 * SCALE, y, one.colour)
        else:
            stroke(draw, [(x, y), (x + 20 * SCALE, y)], one)
        draw.text((x + key, y), name, "black", font(12 * SCALE), anchor="lm")
        x += width + 14 * SCALE
    return y + 14 * SCALE if x > left else 40 * SCALE


def draw_axes(draw, box, x_range, y_range, x_axis):
    """Grid and ticks. Returns place(x, y): the pixels [(x, y), ...] of points."""
    left, top, right, bottom = box
    warp, pad = np.log10 if x_axis == "log" else np.asarray, 8 * SCALE
    (x0, x1), (y0, y1) = warp(np.asarray(x_range, float)), y_range

    def place(x, y):
        x, y = warp(np.asarray(x, float)), np.clip(np.asarray(y, float), y0, y1)
        x = left + pad + (x - x0) / (x1 - x0) * (right - left - 2 * pad)
        y = bottom - pad - (y - y0) / (y1 - y0) * (bottom - top - 2 * pad)
        return [*zip(x.tolist(), y.tolist(), strict=True)]

    for tick in nice_ticks(*x_range, x_axis) if isinstance(x_axis, str) else x_axis:
        ((x, _),) = place([tick], [y0])
        mantissa, exponent = f"{tick:e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}" if x_axis == "log" and tick < 0.01 else f"{tick:g}"
        draw.line([(x, top), (x, bottom)], LIGHT, SCALE)
        draw.text((x, bottom + 5 * SCALE), text, GREY, font(12 * SCALE), anchor="ma")
    for tick in nice_ticks(y0, y1):
        ((_, y),) = place([x_range[0]], [tick])
        draw.line([(left, y), (right, y)], LIGHT, SCALE)
        draw.text((left - 6 * SCALE, y), f"{tick:g}", GREY, font(12 * SCALE), anchor="rm")
    return place


def draw_spread(image, one, place):
    """From low to high, half transparent: error bars at dots (or a single point), else a band."""
    x, low, high = (np.asarray(v, float) for v in (one.x, one.low, one.high))
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    shade = Image.new("L", image.size)
    if one.dots or len(x) == 1:
        for ends in zip(place(x, low), place(x, high), strict=True):
            ImageDraw.Draw(shade).line(ends, 140, 2 * SCALE)
    elif len(x):
        ImageDraw.Draw(shade).polygon(place([*x, *x[::-1]], [*high, *low[::-1]]), fill=36)
    image.paste(one.colour, (0, 0), shade)


def draw_series(draw, one, place, right):
    """The line, or dots with their texts: below and to the right, or above and to the left where there is no room."""
    known = np.isfinite(np.asarray(one.y, float))
    points = place(np.asarray(one.x, float)[known], np.asarray(one.y, float)[known])
    if not one.dots and len(points) > 1:
        return stroke(draw, points, one)
    for x, y in points:
        dot(draw, x, y, one.colour)
    for (x, y), text in zip(points, map(str, itertools.compress(one.texts, known)), strict=False):
        fits = x + 6 * SCALE + font(12 * SCALE).getlength(text) < right + 20 * SCALE
        at, anchor = ((x + 6 * SCALE, y + 3 * SCALE), "la") if fits else ((x - 6 * SCALE, y - 3 * SCALE), "rd")
        draw.text(at, text, "black", font(12 * SCALE), anchor, stroke_width=2 * SCALE, stroke_fill="white")


def dot(draw, x, y, colour):
    """With a white edge, so that dots that touch can be counted."""
    r = 4.5 * SCALE
    draw.ellipse([x - r, y - r, x + r, y + r], colour, "white", SCALE)


def stroke(draw, points, one):
    """A line through pixels, dashed where the colours are used up."""
    if isinstance(one.style, str) or one.style < len(COLOURS):
        return draw.line(points, one.colour, 2 * SCALE, joint="curve")
    x, y = np.asarray(points).T
    along = np.concatenate([[0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    for start in np.arange(0, along[-1], 9 * SCALE):
        piece = np.linspace(start, min(start + 5 * SCALE, along[-1]), 6)
        pixels = zip(np.interp(piece, along, x), np.interp(piece, along, y), strict=True)
        draw.line([*pixels], one.colour, 2 * SCALE)


def nice_ticks(low, high, axis="linear"):
    """About five round numbers in a range. axis "whole": whole numbers; "log": as in 1e-4, 3e-4, 1e-3, if it holds such."""
    if axis == "log":
        powers = 10 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = np.outer(powers, steps).ravel()
            ticks = ticks[(ticks > low * (1 - 1e-9)) & (ticks < high * (1 + 1e-9))]
            if len(ticks) > 2:
                return ticks
    raw = max((high - low) / 6, axis == "whole")
    magnitude = 10 ** np.floor(np.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    return np.round(np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step, 10) + 0.0  # no -0


def confusion_chart(counts, classes, title="", size=(520, 400)):
    """counts (K, K), row = truth. A cell is as dark as its share of its row."""
    counts = np.asarray(counts)
    k = len(classes)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top = 130, 85
    cell_w, cell_h = (size[0] - left - 20) / k, (size[1] - top - 30) / k
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i in range(k):
        x, y = left + (i + 0.5) * cell_w, top + (i + 0.5) * cell_h
        draw.text((left - 8, y), fitted(classes[i], left - 24, 13), "black", font(13), anchor="rm")
        draw.text((x, top - 10), fitted(classes[i], cell_w - 4, 13), "black", font(13), anchor="ms")
        for j in range(k):
            shade = tuple(round(255 + (c - 255) * shares[i, j]) for c in (0, 114, 178))
            x, y = left + j * cell_w, top + i * cell_h
            draw.rectangle([x, y, x + cell_w - 2, y + cell_h - 2], fill=shade)
            text = f"{counts[i, j]}\n{shares[i, j]:.1%}" if k < 5 else f"{counts[i, j]}"
            colour = "white" if shares[i, j] > 0.5 else "black"
            middle = x + cell_w / 2 - 1, y + cell_h / 2 - 1
            draw.multiline_text(middle, text, colour, font(16 if k < 5 else 12), anchor="mm", align="center")
    draw.text((16, 12), fitted(title, size[0] - 32, 15), "black", font(15))
    draw.text((left + k * cell_w / 2, 50), "predicted", GREY, font(12), anchor="mm")
    draw.text((16, top - 22), "truth", GREY, font(12))
    return image


def to_rgb(pixels):
    """uint8 (C, S, S) as a PIL image."""
    pixels = np.asarray(pixels)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")


def draw_box(image, box, colour="#E69F00", width=2):
    """Draw x_min, y_min, x_max, y_max (pixels of `image`) on a PIL image, in place. None and NaN draw nothing."""
    if box is not None and np.isfinite(np.asarray(box, float)).all():
        ImageDraw.Draw(image).rectangle([float(v) for v in box], outline=colour, width=width)
    return image


def contact_sheet(pixels, captions, boxes=None, truths=None, columns=5, side=200, title=""):
    """Thumbnails with captions. pixels: uint8 (C, S, S) each; boxes and truths (4,) each in [0, 1], or None:
    the predicted box is orange, the true one blue."""
    tiles, lines = [], max((caption.count("\n") + 1 for caption in captions), default=1)
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        tile = Image.new("RGB", (side + 8, side + 12 + 16 * lines), "white")
        picture = to_rgb(image).resize((side, side))
        for some, colour in ((truths, "#56B4E9"), (boxes, "#E69F00")):
            if some is not None:
                draw_box(picture, np.asarray(some[i], float) * side, colour)
        tile.paste(picture, (4, 4))
        caption = "\n".join(fitted(line, side, 12) for line in caption.split("\n"))
        ImageDraw.Draw(tile).multiline_text((4, side + 7), caption, "black", font(12), spacing=2)
        tiles.append(tile)
    if not tiles:
        tiles = [Image.new("RGB", (side * 2, side), "white")]
        ImageDraw.Draw(tiles[0]).text((20, side / 2), "nothing to show", "black", font(14))
    return page(tiles, min(columns, len(tiles)), title)


# Inferno by five of its colours: from dark to light in a straight line, so it reads the same for every eye and in grey.
INFERNO = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)


def colour_map(values):
    """(...) in [0, 1] as uint8 (..., 3)."""
    values = np.clip(np.asarray(values, float), 0, 1)
    stops = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(values, stops, INFERNO[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def colour_bar(height, top):
    """A bar from 0 to `top` with numbers, 64 px wide."""
    bar = Image.new("RGB", (64, height), "white")
    ramp = colour_map(np.linspace(1, 0, max(1, height - 24)))[:, None].repeat(12, 1)
    bar.paste(Image.fromarray(ramp), (6, 12))
    draw = ImageDraw.Draw(bar)
    for share in (0, 0.5, 1):
        draw.text((22, 12 + (height - 24) * (1 - share)), f"{top * share:.2g}", "black", font(11), anchor="lm")
    return bar


def overlay(image, box=None, caption="", heat=None, top=None, mask=None, opacity=0.75):
    """A PIL image with a box (in pixels of the frame it is a part of, see pictures.Origin) and a caption below, drawn so that
    the shorter side has 320 px, as far as the longer one then has no more than 960; smaller ones are enlarged, larger ones
    stay.

    heat: (h, w) of any size, raw; laid over the picture, of `opacity` where it is strongest, with a colour bar that tells its
    numbers, from 0 to `top` (default: its own largest). Negative values are not drawn, and a map without positive ones
    is said to hold no evidence. mask: bool (h, w) of the whole frame, whose edge is drawn. The sheet is as wide without a
    heat map, so that both lie in one page."""
    scale, about = max(1.0, min(320 / min(image.size), 960 / max(image.size))), origin(image)
    w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture, bar = image.convert("RGB").resize((w, h)), None
    high = 0.0 if heat is None else float(np.max(heat))
    if high > 0:
        top = top or high
        strength = Image.fromarray(np.asarray(heat, np.float32) / top).resize((w, h), Image.Resampling.BILINEAR)
        strength = np.asarray(strength).clip(0, 1)
        alpha = Image.fromarray((strength**0.7 * 255 * opacity).astype(np.uint8))
        picture.paste(Image.fromarray(colour_map(strength)), (0, 0), alpha)
        bar = colour_bar(max(h, 80), top)
    draw_box(
        picture,
        None if box is None else (np.asarray(box, float) - about.corner * 2) * scale,
        "#56B4E9",
        max(2, w // 200),
    )
    if mask is not None:
        inside = (
            Image.fromarray(own_part(np.asarray(mask), about)).convert("L").resize((w, h), Image.Resampling.BILINEAR)
        )
        inside = inside.point(lambda v: 255 * (v > 127))
        edge = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(3)))
        picture.paste("#F0E442", (0, 0), edge)
    if heat is not None and high <= 0:
        words = {"fill": "white", "font": font(14), "anchor": "mm", "stroke_width": 2, "stroke_fill": "black"}
        ImageDraw.Draw(picture).text((w / 2, h / 2), "no positive evidence", **words)
    wide, high = max(w, 320), max(h, 80)
    sheet = Image.new("RGB", (wide + 64, high + 10 + 18 * (caption.count("\n") + 1)), "white")
    sheet.paste(picture, ((wide - w) // 2, (high - h) // 2))
    if bar:
        sheet.paste(bar, (wide, 0))
    caption = "\n".join(fitted(line, wide + 52, 13) for line in caption.split("\n"))
    ImageDraw.Draw(sheet).multiline_text((6, high + 4), caption, "black", font(13))
    return sheet


def heat_panel(heat, title, top, box=None, side=320):
    """A map (h, w) by itself, NaN grey, on the common scale 0 ... top, with a box in [0, 1] and a colour bar."""
    heat = np.asarray(heat)
    colours = colour_map(np.nan_to_num(heat) / max(top, 1e-30))
    colours = np.where(np.isnan(heat)[..., None], 128, colours)  # not known: grey
    picture = Image.fromarray(colours.astype(np.uint8)).resize((side, side))
    draw_box(picture, None if box is None else np.asarray(box) * side, "#56B4E9")
    panel = Image.new("RGB", (side + 80, side + 40), "white")
    panel.paste(picture, (8, 32))
    panel.paste(colour_bar(side, top), (side + 12, 32))
    ImageDraw.Draw(panel).text((8, 8), title, "black", font(14))
    return panel


def bar_chart(groups, labels, title="", size=(900, 420)):
    """groups: {name: [(value, low, high), ...]}, one a label. Bars with their intervals; a line at 1."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, bottom, top = 60, size[1] - 60, 40
    highest = max([v for cells in groups.values() for c in cells for v in c if np.isfinite(v)] + [1.0]) * 1.05

    def y(value):
        return bottom - value / highest * (bottom - top)

    for tick in {*nice_ticks(0, highest), 1.0}:
        draw.line([(left, y(tick)), (size[0] - 20, y(tick))], GREY if tick == 1 else LIGHT)
        draw.text((left - 6, y(tick)), f"{tick:g}", GREY, font(12), anchor="rm")
    slot = (size[0] - left - 20) / len(labels)
    width = slot * 0.8 / len(groups)
    for i, (name, cells) in enumerate(groups.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((left + 10 + i * (size[0] - left) / len(groups), size[1] - 22), name, colour, font(13))
        for j, (value, low, high) in enumerate(cells):
            if np.isfinite(value):
                x = left + j * slot + slot * 0.1 + i * width
                draw.rectangle([x, y(value), x + width - 3, bottom], fill=colour)
                draw.line([(x + width / 2, y(low)), (x + width / 2, y(high))], "black", 2)
    for j, label in enumerate(labels):
        draw.text((left + (j + 0.5) * slot, bottom + 8), label, "black", font(13), anchor="ma")
    draw.text((16, 10), title, "black", font(15))
    return image
