"""Pictures, with Pillow alone: line and bar charts, confusion matrix, contact sheet, a heat map and a box over an image.

Each function returns a PIL image; `page` lays several side by side. Charts are drawn at twice their size and scaled
down, which is all the antialiasing that a line needs. The colours are Okabe and Ito's, told apart by everyone."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models import DISCLAIMER, write_atomically

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#000000"]
GREY, LIGHT = "#555555", "#DDDDDD"
SCALE = 2


def font(size):
    return ImageFont.load_default(size)


def save_png(image, path):
    """Write a picture so that a kill never leaves half of it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def page(images, columns=2, title=""):
    """Lay pictures of one size in a grid, a title above, the disclaimer below."""
    w, h = images[0].size
    top = 40 if title else 0
    sheet = Image.new("RGB", (w * columns, top + h * -(-len(images) // columns) + 24), "white")
    ImageDraw.Draw(sheet).text((16, sheet.height - 20), DISCLAIMER, GREY, font(11))
    for i, image in enumerate(images):
        sheet.paste(image, (w * (i % columns), top + h * (i // columns)))
    ImageDraw.Draw(sheet).text((16, 12), title, "black", font(18))
    return sheet


def line_chart(
    series,
    title="",
    x_label="",
    y_label="",
    x_range=None,
    y_range=None,
    diagonal=False,
    size=(520, 400),
    points=False,
    lines=True,
    bands=None,
):
    """series: {name: (xs, ys)}. Ranges default to the data's own. NaN breaks a line. points: dots too; lines: not only.
    bands: {name: (xs, lows, highs)}, shaded behind the line of that name."""
    width, height = size[0] * SCALE, size[1] * SCALE
    left, right, top, bottom = 70 * SCALE, 20 * SCALE, 40 * SCALE, 50 * SCALE
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    series = {n: (np.asarray(x, float), np.asarray(y, float)) for n, (x, y) in series.items() if len(x)}
    every_x = np.concatenate([x for x, _ in series.values()]) if series else np.array([0.0, 1])
    every_y = np.concatenate([y[np.isfinite(y)] for _, y in series.values()] or [np.array([0.0, 1])])
    x0, x1 = x_range or (every_x.min(), every_x.max())
    y0, y1 = y_range or (every_y.min(initial=0), every_y.max(initial=1e-9))
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + 1

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (width - left - right), height - bottom - (y - y0) / (y1 - y0) * (
            height - top - bottom
        )

    small = font(12 * SCALE)
    for tick in nice_ticks(x0, x1):
        x, y = place(tick, y0)
        draw.line([(x, y), (x, top)], LIGHT, SCALE)
        draw.text((x, y + 5 * SCALE), f"{tick:g}", GREY, small, anchor="ma")
    for tick in nice_ticks(y0, y1):
        x, y = place(x0, tick)
        draw.line([(x, y), (width - right, y)], LIGHT, SCALE)
        draw.text((x - 6 * SCALE, y), f"{tick:g}", GREY, small, anchor="rm")
    if diagonal:
        draw.line([place(x0, y0), place(x1, y1)], GREY, SCALE)
    for i, name in enumerate(series):
        if name in (bands or {}):
            xs, lows, highs = (np.asarray(v, float) for v in bands[name])
            edge = [*zip(xs, highs, strict=True), *zip(xs[::-1], lows[::-1], strict=True)]
            shade = Image.new("L", image.size)
            ImageDraw.Draw(shade).polygon([place(x, np.clip(y, y0, y1)) for x, y in edge], fill=36)
            image.paste(COLOURS[i % len(COLOURS)], (0, 0), shade)
    for i, (xs, ys) in enumerate(series.values()):
        colour = COLOURS[i % len(COLOURS)]
        dots = [place(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        if lines:
            draw.line(dots, colour, 2 * SCALE, joint="curve")
        if points or len(dots) == 1:
            for x, y in dots:
                draw.ellipse([x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE], fill=colour)
    for i, name in enumerate(series):  # last, with a white edge, so that no line or dot hides a name
        corner = width - right - 8 * SCALE, height - bottom - (len(series) - i) * 18 * SCALE
        draw.text(corner, name, COLOURS[i % len(COLOURS)], font(13 * SCALE), "ra", stroke_width=3 * SCALE, stroke_fill="white")  # fmt: skip
    draw.text((left, 12 * SCALE), title, "black", font(15 * SCALE))
    draw.text(((left + width - right) / 2, height - 8 * SCALE), x_label, GREY, small, anchor="mb")
    side = Image.new("RGB", (height - top - bottom, 18 * SCALE), "white")
    ImageDraw.Draw(side).text((side.width / 2, 0), y_label, GREY, small, anchor="ma")
    image.paste(side.rotate(90, expand=True), (4 * SCALE, top))
    return image.resize(size, Image.Resampling.LANCZOS)


def nice_ticks(low, high):
    """About five round numbers in a range."""
    raw = (high - low) / 6
    magnitude = 10 ** np.floor(np.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    return np.round(np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step, 10) + 0.0  # no -0


def confusion_chart(counts, classes, title="", size=(520, 400)):
    """counts (K, K), row = truth. A cell is as dark as its share of its row."""
    counts = np.asarray(counts)
    k = len(classes)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top = 150, 85
    cell_w, cell_h = (size[0] - left - 20) / k, (size[1] - top - 30) / k
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def short(name):
        return name if len(name) < 18 else name[:16] + ".."

    for i in range(k):
        draw.text((left - 8, top + (i + 0.5) * cell_h), short(classes[i]), "black", font(13), anchor="rm")
        draw.text(
            (left + (i + 0.5) * cell_w, top - 8), short(classes[i]), "black", font(13 if k < 4 else 10), anchor="mb"
        )
        for j in range(k):
            shade = tuple(round(255 + (c - 255) * shares[i, j]) for c in (0, 114, 178))
            box = [left + j * cell_w, top + i * cell_h, left + (j + 1) * cell_w - 2, top + (i + 1) * cell_h - 2]
            draw.rectangle(box, fill=shade)
            text = f"{counts[i, j]}\n{shares[i, j]:.1%}" if k < 5 else f"{counts[i, j]}"
            draw.multiline_text(
                ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
                text,
                "white" if shares[i, j] > 0.5 else "black",
                font(16 if k < 5 else 12),
                anchor="mm",
                align="center",
            )
    draw.text((16, 12), title, "black", font(15))
    draw.text((left + (size[0] - left - 20) / 2, 50), "predicted", GREY, font(12), anchor="mm")
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
    tiles = []
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        tile = Image.new("RGB", (side + 8, side + 44), "white")
        picture = to_rgb(image).resize((side, side))
        for some, colour in ((truths, "#56B4E9"), (boxes, "#E69F00")):
            if some is not None:
                draw_box(picture, np.asarray(some[i], float) * side, colour)
        tile.paste(picture, (4, 4))
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


def overlay(image, box=None, caption="", heat=None):
    """A PIL image with a box (its own pixels) and a caption below, at least 320 px wide so that it can be read.

    heat: (h, w) of any size, raw; laid over the picture, opaque where it is strong, with a colour bar that tells its
    numbers. Negative values are not drawn, and a map without positive ones is said to hold no evidence."""
    scale = max(1.0, 320 / image.width)
    size = round(image.width * scale), max(1, round(image.height * scale))
    picture, bar = image.convert("RGB").resize(size), None
    if heat is not None:
        heat = np.asarray(heat, np.float32)
        top = float(heat.max())
        if top > 0:
            strength = np.asarray(Image.fromarray(heat / top).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
            opacity = Image.fromarray((strength**0.7 * 190).astype(np.uint8))
            picture.paste(Image.fromarray(colour_map(strength)), (0, 0), opacity)
            bar = colour_bar(size[1], top)
        else:
            caption += "\nthe map holds no positive evidence"
    draw_box(picture, None if box is None else np.asarray(box, float) * scale, "#56B4E9", max(2, size[0] // 200))
    lines = caption.count("\n") + 1
    sheet = Image.new("RGB", (size[0] + (0 if heat is None else 64), size[1] + 8 + 18 * lines), "white")
    sheet.paste(picture, (0, 0))
    if bar:
        sheet.paste(bar, (size[0], 0))
    ImageDraw.Draw(sheet).multiline_text((6, size[1] + 4), caption, "black", font(13))
    return sheet


def heat_panel(heat, title, top, box=None, side=320):
    """A map (h, w) by itself, on the common scale 0 ... top, with a box in [0, 1] and a colour bar."""
    picture = Image.fromarray(colour_map(np.asarray(heat) / max(top, 1e-30))).resize((side, side))
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

    for tick in nice_ticks(0, highest):
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
