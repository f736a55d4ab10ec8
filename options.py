"""What can be said on the command line: one line an option, shared by all scripts; and the run folder that keeps it.

    args = parse(["--data", "BUSI", "--epochs", "3"])       # of train.py; its defaults, checked
    args = parse(argv, build_parser(MORE, "what it does"))  # another script's: the same options and some more

A line of a table is (name, default, kind, help). The kind says what may be given: (low, high) a number between them
(several where the default is a list), [a, b] one of these, "FILE" any text (-h calls it so), "NAME ..." several of them,
None a switch."""

import argparse
import atexit
import contextlib
import errno
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import devices
from augment import VIEWS
from backbones import ATTENTION, BACKBONES
from data import load
from files import parts_of, reason, write_atomically
from heads import STRENGTH
from models import choose_device, same_classes
from pictures import parse_window
from readers import InputError

MANY = 1e9
# fmt: off
DATA = [
    ("data", None, "PATH", "folder, .npz, .csv or breastmnist (see readers.py); default: the built-in phantoms"),
    ("size", 128, (16, 4096), "side of the square that the networks see, in pixels"),
    ("positive", None, "A,B", "class or classes that are positive; all others become the negative one"),
    ("drop-class", [], "A ...", "leave these classes out"),
    ("channels", None, [1, 3], "grey or colour; default: look"),
    ("clahe", False, None, "even out the contrast of every image (CLAHE) when it is read"),
    ("window", None, "LOW,HIGH", "the values that become black and white in images of more than 8 bits; default: a DICOM file's own window, else each image's own range"),
    ("split-by-image", False, None, "forget patients, lesions and near-duplicates: to show what such a split would wrongly claim"),
    ("skip-bad", False, None, "go on without images that can't be read"),
    ("dummy-boxes", False, None, "give images without a box a central placeholder; every report then says so"),
    ("cache", "runs/cache", "DIR", "folder of decoded images"),
    ("image-column", None, "NAME", "column of a .csv that names the file; default: 'image' where there is one"),
    ("label-column", None, "NAME", "likewise; default: 'label'"),
    ("group-column", None, "NAME", "likewise, of the patient or lesion; default: 'group'"),
    ("split-column", None, "NAME", "likewise, train, val or test; default: 'split'"),
    ("mask-column", None, "NAME", "likewise, the file of the lesion's mask; default: 'mask'"),
    ("box-format", "xyxy", ["xyxy", "xywh"], "what the four numbers of a box are: two corners, or a corner, width and height; in pixels"),
    ("box-columns", None, "NAME ...", "one column with four numbers, or four columns"),
    ("meta-columns", None, "NAME ...", "patient metadata that C-Net gets beside the image"),
]
WINDOW = ("window", None, "LOW,HIGH", "the values that become black and white in pictures of more than 8 bits; default: as in training")
THEIRS = ("positive", "drop-class", "skip-bad", "label-column", "group-column", "mask-column", "box-format", "box-columns")
THEIRS = [line for line in DATA if line[0] in THEIRS]  # how a set lies that a finished model is to look at
MODEL = [
    ("nets", "both", ["both", "cnet", "dnet"], "what to train; both trains D-Net only where boxes are known"),
    ("model", "mobilenet_v2", "NAME", f"backbone of both networks: {', '.join(BACKBONES)}; none: patient data alone"),
    ("ensemble", None, "A,B,C", "C-Net members' backbones, trained one after another, weighted on validation; D-Net keeps --model"),
    ("trunk", "shared", ["shared", "own"], "one backbone that finds, outlines and names, where lesions are known; or D-Net and C-Net each with its own"),
    ("weights", "imagenet", "W", "start from imagenet (a download by torchvision), none, or a state_dict file (members that it does not fit: none); or A=W,B=W for members' own"),
    ("from", None, "MODEL", "start from this model file or run folder, of the same classes: its networks, size, greys (as --channels, --clahe and --window) and crops"),
    ("learn", "all", ["all", "head"], "all weights, or C-Net's last layer alone: on frozen embeddings, in seconds, pulled towards what it starts from"),
    ("pull", STRENGTH, (1e-6, MANY), "strength of that pull, see heads.fit; more: nearer to what it starts from"),
    ("attention", "none", list(ATTENTION), "between C-Net's backbone and its pooling"),
    ("dropout", 0.2, (0, 0.99), "before C-Net's last layer"),
    ("normalise", "auto", ["auto", "image", "fixed"], "each image by its own mean and spread, or all alike; auto: image for grey, fixed for colour"),
    ("roi", "none", "A,B", "what C-Net sees: none (the whole), mask (a crop around the true lesion: an upper bound), dnet (around D-Net's box); none,dnet: a member for each"),
    ("margin", 0.25, (0, 10), "around the crop, as a share of the lesion's longer side"),
]
OPTIMISER = [
    ("epochs", 30, (1, MANY), "passes over the training images, of each network"),
    ("batch", 16, (2, MANY), "images a step"),
    ("steps-per-epoch", 0, (0, MANY), "an epoch is N steps, however many images there are; 0 = one pass over them"),
    ("lr", 3e-4, (1e-12, 1e3), "peak learning rate of AdamW: linear warm-up, then cosine to 0"),
    ("warmup", 0.1, (0, 1), "share of the steps"),
    ("weight-decay", 0.02, (0, 10), "on matrices, not on biases and norms"),
    ("clip", 5.0, (1e-6, MANY), "largest norm of the gradient"),
    ("augment", 1.0, (0, 3), "strength of the augmentation, 0 = none (what 1 means stands in augment.py)"),
    ("amp", "auto", ["auto", "on", "off"], "bfloat16 autocast; auto: on GPUs that have it"),
]
LEARNING = [
    *OPTIMISER,
    ("eval-steps", 0, (0, MANY), "validate an epoch on N batches, always the same; 0 = on all. Threshold and temperature see all"),
    ("attend", 0.0, (0, MANY), "weight of C-Net's evidence (input gradient) beside the point in the loss: in what feedback marks as not_this; in a set without such marks, far from the lesion. A step takes several times as long"),
    ("label-smoothing", 0.05, (0, 0.99), "share of the label that is spread over the classes"),
    ("pos-weight", "auto", "W", "weight of the positive class in the loss: auto (classes weigh alike), none, or a number"),
    ("balanced-sampler", False, None, "draw every class equally often instead of weighting the loss"),
    ("ema", 0.0, (0, 0.99999), "decay of the weights' moving average, which is then validated and kept; 0 = off"),
    ("patience", 0, (0, MANY), "stop after so many epochs without a better validation; 0 = never: the cosine needs its end"),
]
DISTILLATION = [
    ("teacher", None, "MODEL", "model file, or run folder of the same --folds, whose soft answers C-Net learns beside the labels"),
    ("alpha", 0.5, (0, 1), "share of the labels in the loss, the rest is the teacher's"),
    ("distill-temperature", 2.0, (0.01, 1e4), "softens teacher and student, T"),
]
PROTOCOL = [
    ("seed", 0, (0, 2**31), "of splits, weights, shuffling and augmentation"),
    ("folds", 1, (1, MANY), "cross-validation by groups over all labelled images; the source's splits are then not used"),
    ("refit", False, None, "with --folds: train once more on all images, into NAME/refit, with the thresholds that the folds set"),
    ("repeats", 1, (1, MANY), "the whole with seeds SEED, SEED+1, ... on the same splits (with --folds: on new folds)"),
    ("threshold-by", "sensitivity", ["sensitivity", "balance"], "chosen on validation: reach --target-sensitivity, or the best balanced accuracy"),
    ("views", 5, (1, len(VIEWS)), "looks at an image (test-time augmentation): temperature, threshold and report are made with them, and infer.py takes them"),
    ("target-sensitivity", 0.95, (0, 1), "the threshold is the largest that reaches it on validation"),
    ("label-fraction", 1.0, (1e-6, 1), "learn from this share of the training split alone, drawn by the seed, no group divided; validation keeps all its labels"),
]
RUN = [
    ("runs", "runs", "DIR", "folder of the run folders"),
    ("name", None, "NAME", "of the run folder; default: from data and model"),
    ("resume", None, "DIR", "go on with a run that was stopped, with its own options; a --device beside it is followed"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda, cuda:1 ..."),
    ("workers", 1, (1, 1000), "processes: of the folds and repeats of train.py, of search.py, of al_loop.py"),
    ("timeout", 600.0, (1, MANY), "with torchrun: seconds after which a process that does not answer is given up"),
    ("tensorboard", False, None, "write what log.jsonl holds for TensorBoard too, into the run folder"),
    ("save-seconds", 30.0, (0, MANY), "least time between two saves of last.pt; 0 = every epoch"),
]
# fmt: on
TRAIN = {"data": DATA, "model": MODEL, "learning": LEARNING, "distillation": DISTILLATION, "protocol": PROTOCOL}
TRAIN["run"] = [*RUN, ("against", None, "DIR", "a finished run to compare this one with, in pairs; with --resume too")]
# What a data set as small and as simple as the phantoms needs: a minute instead of ten.
PHANTOM_DEFAULTS = dict(model="small_cnn", weights="none", size=64, epochs=36, batch=32, lr=3e-3, augment=0.5)


class OptionFile(argparse.ArgumentParser):
    """argparse, with @file: options as on the command line, over any number of lines, # starts a comment."""

    def convert_arg_line_to_args(self, line):
        if "\0" in line:
            raise ValueError("bytes of zero")
        return shlex.split(line, comments=True)

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except InputError:
            raise
        except (ValueError, RecursionError) as e:  # no text, a quotation that never ends, a file that names itself
            files = " ".join(a for a in (sys.argv[1:] if args is None else args) if a.startswith("@"))
            raise InputError(f"{files}: not a file of options ({reason(e)}); correct it") from None

    def error(self, message):
        raise InputError(f"{message} (see -h)")


def build_parser(tables, description, **more):
    """A parser of the options in `tables`, {title of the group: [lines]}."""
    p = OptionFile(description=description, fromfile_prefix_chars="@", allow_abbrev=False, **more)
    for title, lines in tables.items():
        group = p.add_argument_group(title)
        for name, default, kind, text in lines:
            group.add_argument(f"--{name}", **argument(default, kind, text))
    return p


def argument(default, kind, text):
    """One line of a table, see the top of the file, as argparse wants it."""
    shown = "" if default is None or default is False or default == [] else " (default: %(default)s)"
    how = {"default": default, "help": text.replace("%", "%%") + shown}
    if kind is None:
        return how | {"action": "store_true"}
    if isinstance(kind, tuple):
        number = int if default is None else type(default[0] if isinstance(default, list) else default)
        how |= {"nargs": "+"} if isinstance(default, list) else {}
        return how | {"type": between(*kind, number), "metavar": "N" if number is int else "X"}
    if isinstance(kind, list):
        return how | {"choices": kind, "type": type(kind[0])}
    return how | {"metavar": kind.removesuffix(" ...")} | ({"nargs": "+"} if kind.endswith(" ...") else {})


def between(low, high, number):
    """A type for argparse: an int or a float that lies between."""

    def read(text):
        try:
            value = number(text)
        except ValueError:
            advice = "; give files before the options" if os.path.exists(text) else ""
            kind = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}{advice}") from None
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text}: must lie in {low:g} ... {high:g}")
        return value

    return read


def parse(argv=None, parser=None):
    """The options of `parser` (that of train.py), checked. With --resume they are the run's own, but for --against and
    --device."""
    parser = parser or train_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if not (Path(args.resume) / "config.json").is_file():
            raise InputError(f"--resume {args.resume}: no config.json there, so nothing to resume; check the path")
        given = {k: v for k in ("resume", "against", "device") if (v := vars(args).get(k)) != parser.get_default(k)}
        args = argparse.Namespace(**vars(args) | saved_args(Path(args.resume) / "config.json", parser) | given)
    elif args.data in (None, "phantoms"):
        parser.set_defaults(**PHANTOM_DEFAULTS)
        args = parser.parse_args(argv)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        advice = "pip install tensorboard; or leave it out, log.jsonl holds the same"
        raise InputError(f"--tensorboard: the package is not installed: {advice}")
    if "pos_weight" in args and args.pos_weight not in ("auto", "none"):
        try:
            float(args.pos_weight)
        except ValueError:
            raise InputError(f"--pos-weight {args.pos_weight}: give auto, none, or a number") from None
    if args.roi not in ("none", "mask", "dnet", "none,mask", "none,dnet"):
        raise InputError(f"--roi {args.roi}: give none, mask, dnet, or none,dnet for a member on each")
    if "nets" in args and args.nets == "cnet" and "dnet" in args.roi:
        raise InputError("--roi dnet needs D-Net: leave out --nets cnet, or use --roi none")
    if "nets" in args and args.nets == "dnet" and args.roi != "none":
        raise InputError("--roi is what C-Net sees; with --nets dnet there is none")
    for name, value in (("model", "none"), ("nets", "dnet")):
        if vars(args).get("attend") and vars(args).get(name) == value:
            raise InputError(f"--attend moves the evidence of a C-Net that sees pixels; leave out --{name} {value}")
    check_learn(args, parser)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        devices.start(choose_device(args.device), args.timeout)
    return args


def check_learn(args, parser):
    """InputError for options that what is learnt, --learn, would pass over. Those of a run that is resumed were checked
    when it was started; `al_loop.py learn --from` has a list of its own."""
    if args.resume or "learn" not in args or (vars(args).get("labels") and vars(args)["from"]):
        return
    head = args.learn == "head"
    why = "--learn head is a convex fit without epochs" if head else "the pull is that of --learn head"
    for name in [line[0] for line in LEARNING] if head else ["pull"]:
        if vars(args)[key := name.replace("-", "_")] != parser.get_default(key):
            raise InputError(f"--{name}: {why}; leave it out")


def saved_args(config, parser):
    """{name: value} of the options that a config.json keeps, each one that `parser` would take."""
    with parts_of(config, "take it from a copy, or start a new run"):
        saved = json.loads(Path(config).read_text())["args"]
        for action in parser._actions:
            value = saved.get(action.dest)
            if value is None or value == action.default:
                continue
            if isinstance(value, list) and action.nargs is None and action.type is None:
                value = saved[action.dest] = ",".join(value)  # al_loop.py keeps its strategies as a list
            several = action.nargs == "+"
            if value == []:
                raise ValueError(f"{action.dest}: nothing")
            for v in value if several else [value]:
                fits = isinstance(v, bool) if action.nargs == 0 else v == parser._get_value(action, str(v))
                if not fits or (action.choices and v not in action.choices) or isinstance(value, list) != several:
                    raise ValueError(f"{action.dest}: {v}")
        return saved


def train_parser(description="Train a detector (D-Net) and a classifier (C-Net).", prog=None, **more):
    """The parser of train.py, which other scripts build upon with `more` groups."""
    return build_parser(TRAIN | more, description, prog=prog)


def load_images(args, log=print, **more):
    """The data set that the arguments name. With an ROI it is read at twice the size, so that a crop is sharp."""
    columns = {name: getattr(args, f"{name}_column") for name in ("image", "label", "group", "split", "mask")}
    columns |= {"box": args.box_columns, "meta": args.meta_columns}
    same = {name: getattr(args, name) for name in ("positive", "channels", "cache", "skip_bad", "split_by_image", "seed", "dummy_boxes", "box_format")}  # fmt: skip
    size = args.size * (1 if args.roi == "none" else 2)
    how = {"equalise": args.clahe, "window": parse_window(args.window)}
    with devices.first_of_machine():
        return load(args.data, size, drop=args.drop_class, columns=columns, log=log, **how, **same, **more)


def images_elsewhere(info, args, option):
    """The data set that an option names, read as the model of this `info` has learnt to read: its size, colours, contrast,
    patient data and classes. args: also those of THEIRS."""
    path, known = getattr(args, option), info["classes"]
    if path not in ("breastmnist", "phantoms") and not Path(path).exists():
        raise InputError(f"--{option} {path}: no such file or folder")
    told = {"data": path, "size": info["load_size"], "clahe": info["equalise"], "channels": info["channels"]}
    told |= {"roi": "none", "split_by_image": False, "seed": 0, "dummy_boxes": False, "split_column": None}
    told |= {
        "meta_columns": [s["column"] for s in info["meta_spec"]],
        "window": vars(args).get("window") or info["window"],
    }
    images = load_images(argparse.Namespace(**vars(args) | told), meta_spec=info["meta_spec"] or None)
    if info["meta_spec"] and images.meta is None:
        raise InputError(f"--{option} {path}: the model has learnt with patient data, and it has none")
    if images.pixels.shape[1] != info["channels"]:  # phantoms are grey, whoever asks
        raise InputError(f"--{option} {path}: its pictures are grey, the model's are in colour")
    if images.classes and not same_classes(known, images.classes):
        raise InputError(f"--{option} {path}: its classes are {images.classes}, the model's {known}; see --positive")
    return images


def began_with(folder, images, drawn=False):
    """Whether a run began with these images, labels, groups and splits, with `drawn` also with these boxes and masks;
    True where it is too old to have noted them."""
    config = Path(folder) / "config.json"
    noted = json.loads(config.read_text()) if config.is_file() else {}
    same = noted.get("images") in (None, images.fingerprint())
    return same and (not drawn or noted.get("drawn") in (None, images.drawn()))


def check_against(folder, images):
    """InputError where the run that --against names saw other pictures: rows of one number would be paired that show
    different things. Of too many images no word is kept that outlives a --size, so they pass."""
    if images.thumbnails is not None and not began_with(folder, images):
        why = "another --size makes other phantoms, another --seed other splits"
        raise InputError(
            f"--against {folder}: its images, labels, groups or splits are others ({why}): nothing to compare"
        )


def prepare_folder(args, images, prefix=""):
    """The run folder, see make_folder. Of several processes the first alone writes there: the others, which do the same
    on their way, have a copy that nobody sees."""
    folder = make_folder(args, images, prefix) if devices.rank() == 0 else None
    folder = devices.gather(folder)[0]
    if devices.rank():
        own = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        atexit.register(own.cleanup)
        folder = Path(shutil.copytree(folder, Path(own.name) / folder.name))
    devices.gather(None)  # before the first one writes again
    return folder


def make_folder(args, images, prefix):
    """The run folder, with its config. An existing run is never written over; one that is resumed must find the images
    that it began with, as what it has learnt so far speaks of them by their number."""
    if args.resume:
        if not began_with(args.resume, images, drawn=True):
            raise InputError(f"--resume {args.resume}: --data {args.data} has changed since (images, labels, groups, splits, "
                             "boxes or masks); put back what it was, or start a new run")  # fmt: skip
        return Path(args.resume)
    members = "ensemble" if args.ensemble else args.model
    source = "phantoms" if args.data in (None, "phantoms") else f"{Path(args.data).stem}-{members}"
    name = args.name or prefix + source
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"--name {name}: it leads out of the folder of --runs; give a name, and the folder to --runs")
    for number in itertools.count(1):
        folder = Path(args.runs) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if args.name:
                advice = f"choose another name, or go on with --resume {folder}"
                raise InputError(f"--name {args.name}: {folder} exists; {advice}") from None
        except OSError as e:
            raise InputError(f"{folder} can't be made ({e.strerror}); give another --runs or --name") from None
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    config = {
        "args": {k: v for k, v in vars(args).items() if k != "resume"},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "command": sys.argv,
        "images": images.fingerprint(),
        "drawn": images.drawn(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    try:
        write_atomically(folder / "config.json", json.dumps(config, indent=1).encode())
    except InputError:
        folder.rmdir()
        raise
    return folder


@contextlib.contextmanager
def claim(folder, new=False):
    """Work in a run folder alone. The lock is the system's: it goes when the process ends, however that happens. A new
    folder that an InputError leaves with nothing learnt goes, so that the corrected command can have its name."""
    try:
        with open(Path(folder) / "config.json") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass  # Windows has no such locks
            except BlockingIOError:
                raise InputError(f"{folder}: another process works in it; wait for it, or stop it") from None
            yield
    except InputError:
        files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != "config.json")
        if new and not any(p.stat().st_size for p in files):
            shutil.rmtree(folder)
        raise


def run_jobs(function, jobs, images, args, workers):
    """Yield function(images, *job) of every job, as they finish: one after another, or in `workers` processes, which
    read the images by themselves and share the cores, or have a GPU each where there are several."""
    if devices.world() > 1 and workers > 1:
        raise InputError("--workers beside torchrun: give one of them")
    if workers <= 1:
        for job in jobs:
            yield function(images, *job)
        return
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, start_worker, (args, workers, context.Value("i", 0), images.meta_spec, images.classes)
    )
    try:
        for finished in as_completed([pool.submit(do_job, function, *job) for job in jobs]):
            yield finished.result()
    except BrokenExecutor:
        raise InputError("a worker died (out of memory?); what is finished is kept: --resume, perhaps with fewer --workers") from None  # fmt: skip
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in torch.multiprocessing.active_children():
            worker.terminate()
            worker.join()


def start_worker(args, workers, number, spec, classes):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    with number.get_lock():
        rank, number.value = number.value, number.value + 1
    if args.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        torch.cuda.set_device(rank % torch.cuda.device_count())  # of those that the user lets us see
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    do_job.images = load_images(args, log=lambda _: None, meta_spec=spec or None)  # of --from, maybe
    do_job.images.classes = classes


def do_job(function, *job):
    return function(do_job.images, *job)


class Stopped(Exception):
    """Ctrl-C: the state of the last whole epoch is saved."""


class Interrupt:
    """The first Ctrl-C lets the epoch end and be saved; the second one stops at once."""

    asked = False

    def __enter__(self):
        Interrupt.asked = False
        self.before = signal.signal(signal.SIGINT, self.handle)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def handle(self, *_):
        Interrupt.asked = True
        if devices.world() > 1:  # torchrun passes on what the terminal has sent already, and kills after 30 seconds
            print("\nfinishing this epoch, then saving", flush=True)
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing this epoch, then saving (Ctrl-C again: stop at once)", flush=True)


def stop(script, folder):
    """What a script says after Ctrl-C."""
    print(f"stopped; go on with: python {script} --resume {folder}")
    sys.exit(130)


def run_main(main):
    """Call `main`; a user's mistake is one line on stderr and exit code 1, a bug keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may be of bytes that no terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except InputError as e:
        said, code = f"error: {e}", 1
    except KeyboardInterrupt:
        said, code = "stopped", 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        said, code = f"error: {e.filename or 'a file'} can't be written ({e.strerror})", 1
    except RuntimeError as e:
        if not (said := devices.lost(e)):
            raise
        said, code = f"error: {said}; --resume goes on from what was saved", 1
    print(f"process {devices.rank()}: " * (devices.rank() > 0) + said, file=sys.stderr)
    sys.exit(code)
