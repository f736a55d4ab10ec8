"""DICOM files: from a file to the pixels that a viewer would show, and of its header nothing but what is named here.

    header = read_header("clip.dcm")                          # rows, palette, regions ...: no name, no date, no address
    for values, window in read_frames("clip.dcm", header):    # (rows, columns) or (rows, columns, 3)
        print(values.dtype, window)                           # None: 8 bits as they are; else what is (black, white)
    print(patient(header))                                    # {"group": the hashed PatientID, "age": "45", "laterality": "L"}

Needs pydicom (3 or newer), which brings what it can decode: uncompressed, RLE, JPEG and JPEG 2000 of 8 bits; the rest
with pylibjpeg. Errors are ValueErrors of one line, and never in the words of pydicom: it quotes what the header holds.
A hash keeps a PatientID from the eye, not from who can try all IDs; take it for a pseudonym."""

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
    logging.getLogger("pydicom").disabled = True  # see the warnings above
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
    with told_as("a DICOM file whose pixels are written in a way that pydicom does not know"):
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
    if rows * columns > Image.MAX_IMAGE_PIXELS or rows * columns * samples * bits / 8 > 4 * Image.MAX_IMAGE_PIXELS:
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
    """Yield (values, (black, white) or None) of each frame, or of those of these numbers, counted from 0, one at a time:
    values (rows, columns) or (rows, columns, 3), None where they are uint8 as they are to be shown. window: (low, high) in
    the units after the modality transformation, in place of the file's own; what has 8 bits and no such units is left."""
    from pydicom.pixels import iter_pixels

    with told_as(f"a DICOM file whose pixels are missing, cut off or damaged, or need another decoder: {MORE}"):
        for values in iter_pixels(file, indices=numbers):
            if header.PhotometricInterpretation.startswith("MONO"):
                yield show_greys(values, header, window)
            else:
                yield show_colours(values, header)


def show_colours(values, header):
    from pydicom.pixels import apply_color_lut

    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        bits = 8 * values.dtype.itemsize
    else:
        bits = int(header.get("BitsStored") or header.BitsAllocated)
    return values[..., :3], None if bits == 8 and values.dtype == np.uint8 else (0, 2**bits - 1)


def show_greys(values, header, window):
    """Stored values by the modality transformation, then the window, then white for black if that is how it is meant
    (PS3.4 N.2). Without any window the values' own range is stretched, unless they have 8 bits, whose white is known."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    units, bits = values, int(header.get("BitsStored") or 8 * values.dtype.itemsize)
    if header.get("ModalityLUTSequence"):
        units = apply_modality_lut(values, header)
    elif (line := (number(header, "RescaleSlope", 1), number(header, "RescaleIntercept", 0))) != (1, 0):
        units = values.astype(np.float32 if values.itemsize <= 2 else np.float64) * line[0] + line[1]
    plain = units is values and values.dtype.kind == "u" and bits <= 8
    centre, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    if window and not plain:
        black, white = window
    elif header.get("VOILUTSequence"):
        units = apply_voi(units, header)
        black, white = 0, 2 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif width > 0 and math.isfinite(centre):
        black, white = centre - width / 2, centre + width / 2
        function = header.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            units, black, white = 1 / (1 + np.exp(-4 * (units - centre) / width)), 0, 1
        elif function == "LINEAR":
            white = max(white - 1, black)
    else:
        black, white = (0, 2**bits - 1) if plain else (units.min().item(), units.max().item())
    if header.PhotometricInterpretation == "MONOCHROME1":
        black, white = white, black
    return units, None if units.dtype == np.uint8 and (black, white) == (0, 255) else (black, white)


def number(header, name, default=math.nan):
    """A number of the header, the first where there are several."""
    value = header.get(name)
    value = value[0] if hasattr(value, "__len__") and not isinstance(value, str) and len(value) else value
    return default if value in (None, "") or hasattr(value, "__len__") else float(value)
