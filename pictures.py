"""One picture: from a file, of any kind that hospitals keep, to 8 bits that are upright, and into a square.

    picture = read_image("scan.dcm", channels=1)              # PIL, "L"; of a clip the first frame
    for number, picture in read_frames("clip.gif", 3):        # from 1, as viewers count
        print(origin(picture).frames, origin(picture).window)
    square, placement = letterbox(picture, 128)               # the aspect ratio kept

Of a DICOM file that tells the regions of its ultrasound picture these are read, and the text around is cut off; all
places (boxes, masks) are told in the pixels of the whole frame nonetheless, see Origin. What has more than 8 bits has no
fixed white: a DICOM file's own window is taken, else the values' own range, picture by picture, unless a window is given."""

import contextlib
import dataclasses
import io
import math
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import dicom
from readers import InputError

warnings.simplefilter("error", Image.DecompressionBombWarning)  # refused in read_frames, instead of eating the memory

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")  # EPS, of any name, would start Ghostscript
MOVING = ("PNG", "TIFF", "GIF", "WEBP")  # of which one file may hold several frames


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a picture is a part of, see origin."""

    size: tuple[int, int]  # of the picture
    whole: tuple[int, int]  # (w, h) of the frame in the file
    corner: tuple[int, int] = (0, 0)  # (left, top) of the picture in it
    window: tuple[float, float] | None = None  # the values that became black and white; None: 8 bits, as they are
    frames: int = 1  # in the file
    seconds: float | None = None  # from one frame to the next


def origin(image):
    """The Origin of a PIL image that read_frames has made; of any other: it is the whole."""
    found = image.info.get(Origin)  # no word, so that no file can bring one along
    return found if found and found.size == image.size else Origin(image.size, image.size)


def parse_window(text):
    """(low, high) from "LOW,HIGH", or as it is; None from None. InputError for what is no window."""
    try:
        low, high = map(float, text.split(",") if isinstance(text, str) else text or (0, 1))
    except (ValueError, TypeError):
        low = high = math.nan
    if not (-1e30 < low < high < 1e30):
        raise InputError(f"--window {text}: give the values that become black and white, as in --window=-160,240")
    return (low, high) if text else None


@contextlib.contextmanager
def open_image(source):
    """A file, or uint8 (H, W) or (H, W, 3), as a PIL image; of a file nothing but its header is read yet."""
    if isinstance(source, np.ndarray):
        yield Image.fromarray(source)
    elif isinstance(source, (str, Path)):
        with open(source, "rb") as file:  # a TIFF that Pillow opens by its name is mapped into memory, and that
            yield Image.open(file, formats=FORMATS)  # scrambles what its EXIF turns by a quarter
    else:
        yield Image.open(source, formats=FORMATS)


def read_image(source, channels, window=None, number=1):
    """One frame of a file or array, see read_frames."""
    with contextlib.closing(read_frames(source, channels, window, number)) as frames:
        for _, picture in frames:
            return picture
    raise InputError(f"no frame {number}; it has fewer")


def count_frames(source):
    """How many frames a file or array has. InputError as by read_frames."""
    with one_line_of_why(), open_frames(source) as (count, _):
        return count


def read_frames(source, channels, window=None, first=1, every=1):
    """Yield (number, picture) of every so many-th frame, from the `first`, of DICOM, GIF, TIFF, animated PNG and WEBP; a
    picture is a clip of one. source: a path, an open file, uint8 (H, W) or (H, W, 3). The picture is an upright 8-bit PIL
    image: "L" for channels=1, "RGB" for 3.

    EXIF rotation is applied, transparency is laid on black; pages of a TIFF in another size than the first are none of
    its frames. window: (low, high), the values that become black and white where there are more than 8 bits.
    Raises InputError (one line) when the file is missing, truncated, no image, or a decompression bomb."""
    with one_line_of_why(), open_frames(source) as (count, read):
        for number, image, known in read(range(first - 1, count, every), window):
            picture = to_mode(image, channels, window)
            picture.info[Origin] = dataclasses.replace(origin(picture), frames=count, **known)
            yield number + 1, picture


@contextlib.contextmanager
def one_line_of_why():
    """What goes wrong in here with a file as an InputError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise InputError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, refused") from e
    except Image.UnidentifiedImageError as e:
        raise InputError(f"not an image, or none of {', '.join(FORMATS)}, DICOM") from e
    except dicom.Refused as e:
        raise InputError(str(e)) from e
    except InputError:
        raise
    except Exception as e:  # Pillow's decoders raise whatever comes to their mind on broken files
        raise InputError(f"damaged: {str(e) or type(e).__name__}") from e


@contextlib.contextmanager
def open_frames(source):
    """(how many frames, a function from their numbers, counted from 0, and a window to (number, PIL image, what is known
    of its Origin) of each)."""
    if isinstance(source, (str, Path)):
        if not os.path.exists(source):
            raise InputError("no such file")
        with open(source, "rb") as file, open_frames(file) as opened:
            yield opened
        return
    if hasattr(source, "read") and not (hasattr(source, "seekable") and source.seekable()):
        source = io.BytesIO(source.read())
    if hasattr(source, "read") and dicom.is_dicom(source):
        header = dicom.read_header(source)
        yield dicom.count_frames(header), lambda *which: dicom_frames(source, header, *which)
        return
    with open_image(source) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # the filter of warnings is not ours alone
            raise Image.DecompressionBombError
        pages = pages_of(image)
        yield len(pages), lambda numbers, _: pillow_frames(image, pages, numbers)


def pages_of(image):
    """The places of the frames in a file that Pillow has opened."""
    count = getattr(image, "n_frames", 1) if image.format in MOVING else 1
    if image.format != "TIFF" or count == 1:
        return range(count)
    sizes = []
    for page in range(count):
        image.seek(page)
        sizes.append(image.size)
    return [page for page, size in enumerate(sizes) if size == sizes[0]]


def pillow_frames(image, pages, numbers):
    for number in numbers:
        if len(pages) > 1:
            image.seek(pages[number])
        image.load()
        step = image.info.get("duration", 0) if len(pages) > 1 else 0
        yield number, image, {"seconds": step / 1000} if isinstance(step, (int, float)) and step > 0 else {}


def dicom_frames(file, header, numbers, window):
    part, known = dicom.region(header), {"seconds": dicom.seconds(header)}
    left, top, right, bottom = part or (0, 0, header.Columns, header.Rows)
    known |= {"whole": (header.Columns, header.Rows), "corner": (left, top)}
    for number, (values, ends, units) in zip(numbers, dicom.read_frames(file, header, numbers, window), strict=True):
        values = values[top:bottom, left:right]
        values = values if ends is None else stretch(values, *ends)
        yield number, Image.fromarray(np.ascontiguousarray(values)), known | {"window": units}


def stretch(values, black, white):
    """Numbers of any kind and shape as uint8: what is `black` as 0, what is `white` as 255."""
    if not np.isfinite([black, white]).all() or not np.isfinite(values).all():
        raise InputError("it holds NaN or infinity")
    result, kind = np.empty(values.shape, np.uint8), np.float32 if values.dtype.itemsize <= 2 else np.float64
    for start in range(0, len(values), 1024):  # a picture may be large, and there is one in every thread
        part = np.subtract(values[start : start + 1024], black, dtype=kind)
        part *= 255 / ((white - black) or 1e-12)
        result[start : start + 1024] = part.clip(0, 255, out=part).round(out=part)
    return result


def to_mode(image, channels, window=None):
    """A PIL image of any mode, turned upright as its EXIF says, as 8-bit "L" (channels=1) or "RGB" (channels=3)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit, float
        values = np.asarray(image)
        seen = window or (values.min().item(), values.max().item())
        image = Image.fromarray(stretch(values, *seen))
        image.info[Origin] = Origin(image.size, image.size, window=seen)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")  # greys by one way, whoever asks
    return image.convert("L" if channels == 1 else "RGB")


def fit(size, side):
    """(left, top, w, h): where a picture of `size` (w, h) lies in the letterboxed square of `side` pixels."""
    scale = side / max(size)
    w, h = (max(1, round(length * scale)) for length in size)
    return (side - w) // 2, (side - h) // 2, w, h


def letterbox(image, size):
    """Fit a PIL image into a square, aspect ratio kept; the bars take the image's own mean.

    With bars of the mean, an image standardised by its own mean has bars of 0, which is what a convolution pads with.
    Returns uint8 (C, size, size) and the placement (scale_x, scale_y, left, top): x_square = x * scale_x + left."""
    left, top, w, h = fit(image.size, size)
    small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=3.0))  # antialiased
    small = small.reshape(h, w, -1).transpose(2, 0, 1)
    square = np.rint(small.mean((1, 2), keepdims=True)).astype(np.uint8).repeat(size, 1).repeat(size, 2)
    square[:, top : top + h, left : left + w] = small
    return square, (w / image.width, h / image.height, left, top)


def thumbnail(image):
    """What near-duplicates are found by: uint8 (1, 28, 28), grey, squashed into the square, so that one picture cut in
    two ways still lies feature upon feature. Made of the file and nothing else: no option of a run may change its splits.
    28 px are the smallest images that are published (MedMNIST), so nothing is enlarged."""
    return np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BILINEAR, reducing_gap=3.0))[None]


def original_box(box, placement, side, about):
    """A box in [0, 1] of a letterboxed square of `side` pixels, in the pixels of the file's whole frame; about: the Origin
    of the picture, in which the box ends."""
    sx, sy, left, top = placement
    corners = (np.array(box) * side - [left, top, left, top]) / [sx, sy, sx, sy]
    return (corners.clip(0, about.size * 2) + about.corner * 2).tolist()


def letterboxed_box(box, placement, side, about):
    """The reverse: a box in the pixels of the whole frame, in [0, 1] of the square. InputError if it is none."""
    box = np.array(box, float)
    if box.shape != (4,) or not ((box[:2] < box[2:]).all() and (box >= 0).all()):
        raise InputError(f"box {box.tolist()}: give x_min, y_min, x_max, y_max in the image's pixels")
    sx, sy, left, top = placement
    return (((box - about.corner * 2) * [sx, sy, sx, sy] + [left, top, left, top]) / side).clip(0, 1).tolist()


def own_part(mask, about):
    """Of a mask (h, w) of the whole frame what lies in the picture of this Origin."""
    left, top = about.corner
    return mask[top : top + about.size[1], left : left + about.size[0]]


def box_of(mask):
    """Bounding box of a mask (H, W) as x_min, y_min, x_max, y_max in pixel edges; NaN where the mask is empty."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return np.full(4, np.nan, np.float32)
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)
