"""Files that can be trusted: written whole or not at all, and believed of what they hold only what was looked at.

write_atomically(path, data)              bytes, beside their place and then moved over it
save_checkpoint(path, {"a": tensor})      the same of what torch.save takes
content = read_checkpoint(path)           tensors, numbers and words; what could run as a program is refused
with parts_of(path, "train it again"):    a part that is missing in there becomes an InputError with this advice
    rows = content["rows"]
"""

import contextlib
import io
import os
import warnings
from pathlib import Path

import torch

from readers import InputError


def write_atomically(path, data):
    """Write bytes beside `path`, then move them over it: a kill at any moment leaves a whole file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):  # its folder may be none
            part.unlink()
        advice = "what was there before is whole; make room and try again"
        raise InputError(f"{path} can't be written ({e.strerror or e}); {advice}") from e


def save_checkpoint(path, content):
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path, what=None):
    """torch.load(weights_only=True) on the CPU. InputError in one line, of `what` (the path), when it is missing or no
    such file."""
    what = what or path
    if not Path(path).is_file():
        raise InputError(f"{what}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats and odd tensors: what is read is checked by who asked
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler raises whatever comes to its mind on broken files
        raise InputError(f"{what}: not a PyTorch file, or damaged, or it holds more than tensors ({reason(e)})") from e


def reason(error):
    """The first line of an exception, or its kind, for an InputError that stands for it."""
    return next(iter(str(error).splitlines()), "")[:100] or type(error).__name__


@contextlib.contextmanager
def parts_of(path, advice):
    """What a file of ours holds is looked at in here: what is missing or of another kind was damaged there, and the
    InputError says so, with advice."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # anything can stand anywhere
        raise InputError(f"{path}: damaged, parts are missing or do not fit ({reason(e)}); {advice}") from e
