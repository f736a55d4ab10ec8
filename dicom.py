"""DICOM files: from a file to the pixels that a viewer would show, and of its header nothing but what is named here.

    header = read_header("clip.dcm")                          # rows, palette, regions ...: no name, no date, no address
    for values, ends, units in read_frames("clip.dcm", header):
        print(values.shape, ends)                             # None: 8 bits as they are; else what is (black, white)
    print(patient(header))                                    # {"group": the hashed PatientID, "age": "45", "laterality": "L"}

Needs pydicom (3 or newer), which decodes uncompressed pixels, RLE, and with Pillow JPEG of 8 bits and JPEG 2000; with
pylibjpeg the rest. Pixels are taken to be square: what the header says of their size is not read. Errors are ValueErrors
of one line, and never in the words of pydicom: it quotes what the header holds. A hash keeps a PatientID from the eye, not from
who can try all IDs; take it for a pseudonym."""

import contextlib
import hashlib
import logging
import math
import warnings

import numpy as np
from PIL import Image

PICTURE = ("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns")
PICTURE += ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "FrameTime", "SequenceOfUltrasoundRegions")
GREYS = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
GREYS += ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
PALETTE = tuple(f"{c}PaletteColorLookupTable{end}" for c in ("Red", "Green", "Blue") for end in ("Descriptor", "Data"))
PALETTE += tuple(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue"))
PATIENT = ("PatientID", "PatientAge", "Laterality", "ImageLaterality")
KINDS = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
YEARS = {"Y": 1, "M": 12, "W": 52, "D": 365}  # of an age as in 045Y
MORE = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

warnings.filterwarnings("ignore", module=r"pydicom|dicom$")  # they quote values


def is_dicom(file):
    """Whether a file (a path, or one that is open and can be rewound) has DICOM's magic. False where there is none."""
    if hasattr(file, "read"):
        file.seek(0)
        head = file.read(132)
        file.seek(0)
        return head[128:] == b"DICM"
    try:
        with open(file, "rb") as opened:
            return is_dicom(opened)
    except OSError:
        return False


@contextlib.contextmanager
def told_as(message):
    """Whatever pydicom raises in here, on files that are none as the standard wants them, is a ValueError of these words."""
    try:
        yield
    except Refused:
        raise
    except Exception as e:
        raise Refused(message) from e


class Refused(ValueError):
    """In our own words, so nothing of a header is in it."""


def read_header(file):
    """What is named above of a file (path or open), as a pydicom Dataset; checked, as it may claim anything."""
    try:
        import pydicom
    except ImportError:
        raise Refused("a DICOM file, and pydicom is not installed: pip install pydicom") from None
    logging.getLogger("pydicom").propagate = False  # see the warnings above
    with told_as("a DICOM file whose header is damaged"):
        if not hasattr(file, "read"):
            with open(file, "rb") as opened:
                return read_header(opened)
        check_syntax(file)
        file.seek(0)
        named = [*PICTURE, *GREYS, *PALETTE, *PATIENT]
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=named)
        check_claims(header)
    return header


def check_syntax(file):
    """Refuse what can't be decoded here, and what is deflated as a whole: a small file could fill the memory."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.pixels import get_decoder
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    read_preamble(file, False)
    first = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    syntax = first.TransferSyntaxUID
    if syntax == DeflatedExplicitVRLittleEndian:
        raise Refused("a DICOM file that is deflated as a whole, refused; save it uncompressed")
    how = "in a way" if syntax.name == syntax else f"as {syntax.name},"  # of its own words nothing is repeated
    with told_as(f"a DICOM file written {how} that pydicom does not know; save it as JPEG or uncompressed"):
        decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise Refused(f"a DICOM file compressed as {syntax.name}: {MORE}")


def check_claims(header):
    """Refuse numbers of rows, frames, bits that no picture has, before anything is read or allocated by them."""
    if not {"Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"} <= set(header.dir()):
        raise Refused("a DICOM file without a picture in it")
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel") or 1)
    bits, kind = int(header.BitsAllocated), str(header.PhotometricInterpretation)
    if min(rows, columns) < 1 or count_frames(header) < 1:
        raise Refused(f"a DICOM file of {count_frames(header)} frames of {columns} x {rows} pixels")
    if rows * columns > Image.MAX_IMAGE_PIXELS or rows * columns * samples * bits / 8 > 3 * Image.MAX_IMAGE_PIXELS:
        raise Refused(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, refused")
    if kind not in KINDS or samples != (1 if kind.startswith(("MONO", "PALETTE")) else 3):
        what = kind if kind in KINDS else "colours that are none of " + ", ".join(KINDS)
        raise Refused(f"a DICOM file of {samples} samples a pixel and {what}")
    if bits not in (1, 8, 16, 32, 64) or not 1 <= int(header.get("BitsStored") or bits) <= bits:
        raise Refused(f"a DICOM file of {bits} bits a pixel, of which {header.get('BitsStored')} are used")


def count_frames(header):
    frames = header.get("NumberOfFrames")
    return 1 if frames is None else int(frames)


def seconds(header):
    """From one frame to the next, or None where the file does not say."""
    with told_as("a DICOM file whose header is damaged"):
        step = float(header.get("FrameTime") or 0) / 1000
    return step if 0 < step < math.inf else None


def patient(header):
    """{"group": a hash of the PatientID, "age": in years, "laterality": L or R} as words; "" = not known."""
    told = {"group": "", "age": "", "laterality": ""}
    with told_as("a DICOM file whose header is damaged"):
        if number := str(header.get("PatientID") or "").strip():
            told["group"] = hashlib.blake2b(number.encode(errors="replace"), digest_size=8).hexdigest()
        age = str(header.get("PatientAge") or "").strip().upper()
        if age[:-1].isdecimal() and age[-1] in YEARS:
            told["age"] = f"{int(age[:-1]) / YEARS[age[-1]]:.3g}"
        side = str(header.get("ImageLaterality") or header.get("Laterality") or "").strip().upper()
        told["laterality"] = side if side in ("L", "R") else ""
    return told


def region(header):
    """Where the ultrasound picture lies in the frame: x_min, y_min, x_max, y_max in pixels, the box around all regions
    that show tissue in two dimensions (PS3.3 C.8.5.5), so that the text around them is cut off; None: not known. Regions
    that lie nowhere are passed over."""
    found = []
    with told_as("a DICOM file whose regions are damaged"):
        for part in header.get("SequenceOfUltrasoundRegions") or []:
            x0, y0 = part.RegionLocationMinX0, part.RegionLocationMinY0
            x1, y1 = part.RegionLocationMaxX1 + 1, part.RegionLocationMaxY1 + 1  # they belong to it
            box = [max(x0, 0), max(y0, 0), min(x1, header.Columns), min(y1, header.Rows)]
            if part.get("RegionSpatialFormat") == 1 and box[0] < box[2] and box[1] < box[3]:
                found.append(box)
    if not found:
        return None
    low, high = np.min(found, 0).tolist(), np.max(found, 0).tolist()
    return tuple(low[:2] + high[2:])


def read_frames(file, header, numbers=None, window=None):
    """Yield (values, ends, units) of each frame, or of those of these numbers, counted from 0, one at a time: values
    (rows, columns) or (rows, columns, 3); ends: those that are (black, white), None: they are uint8 as they are to be
    shown; units: the same after the modality transformation. window: (low, high) in these units, in place of the file's
    own; what has 8 bits and no such units has none."""
    from pydicom.pixels import iter_pixels

    numbers = range(count_frames(header)) if numbers is None else numbers
    with told_as(f"a DICOM file whose pixels are missing, cut off or damaged, or need another decoder: {MORE}"):
        frames = iter_pixels(file, indices=numbers, raw=True)
        for _ in numbers:
            values = next(frames)
            if header.PhotometricInterpretation.startswith("MONO"):
                yield show_greys(values, header, window)
            else:
                yield show_colours(values, header), None, None


def show_colours(values, header):
    from pydicom.pixels import apply_color_lut

    bits = int(header.get("BitsStored") or header.BitsAllocated)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        bits = 8 * values.dtype.itemsize
    values = in_bytes(values[..., :3], bits)
    if header.PhotometricInterpretation.startswith(
        "YBR_FULL"
    ):  # as in JPEG; YBR_ICT and YBR_RCT are undone by decoders
        values = np.asarray(Image.fromarray(values, "YCbCr").convert("RGB"))
    return values


def in_bytes(values, bits):
    """Whole numbers from 0 to what these bits hold, as uint8."""
    if bits == 8 and values.dtype == np.uint8:
        return values
    scaled = np.multiply(values, 255 / (2**bits - 1), dtype=np.float32)
    return scaled.clip(0, 255, out=scaled).round(out=scaled).astype(np.uint8)


def show_greys(values, header, window):
    """Stored values by the modality transformation, then the window, then white for black if that is how it is meant
    (PS3.4 N.2). Without any window the values' own range is taken, unless they have 8 bits, whose white is known. What is
    linear is done to the ends and not to the values, which may be many."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    bits, inverted = header.get("BitsStored") or header.BitsAllocated, header.PhotometricInterpretation == "MONOCHROME1"
    slope, intercept = number(header, "RescaleSlope", 1) or 1, number(header, "RescaleIntercept", 0)
    plain = (slope, intercept) == (1, 0) and values.dtype.kind == "u" and bits <= 8
    if header.get("ModalityLUTSequence"):
        values, slope, intercept, plain = apply_modality_lut(values, header), 1, 0, False
    centre, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    function, shown = header.get("VOILUTFunction") or "LINEAR", None
    if window and not plain:
        black, white = window
    elif table := header.get("VOILUTSequence"):
        shown = in_bytes(apply_voi((values * slope + intercept).astype(int), header), int(table[0].LUTDescriptor[2]))
    elif width > 0 and function == "SIGMOID":
        shown = in_bytes(255 / (1 + np.exp(((centre - intercept - values * slope) * 4 / width).clip(-99, 99))), 8)
    elif width > 0:
        black, white = centre - width / 2, centre + width / 2
        white = white if function == "LINEAR_EXACT" else max(white - 1, black)
    elif plain:
        shown = in_bytes(values, bits)
    else:
        black, white = sorted(v.item() * slope + intercept for v in (values.min(), values.max()))
    if shown is not None:
        return 255 - shown if inverted else shown, None, None
    units = (white, black) if inverted else (black, white)
    return values, tuple((v - intercept) / slope for v in units), units


def number(header, name, default=math.nan):
    """A number of the header, the first where there are several; of one that no greys can have NaN."""
    value = header.get(name)
    value = value[0] if hasattr(value, "__len__") and not isinstance(value, str) and len(value) else value
    value = default if value in (None, "") or hasattr(value, "__len__") else float(value)
    return value if abs(value) < 1e30 else math.nan
