"""Out of here: a model as one ONNX file, for programs that know neither PyTorch nor this project.

    python export.py runs/busi                                        runs/busi/model.onnx; how to feed it: docs/onnx.md
    python export.py runs/busi --check data/BUSI --positive malignant       what it is worth and costs, beside PyTorch
    python export.py runs/busi --int8 data/BUSI --check data/BUSI --positive malignant     and model.int8.onnx

The file holds all that models.Ensemble does with letterboxed pictures: contrast, views, D-Net, the crops around what it
found, all members, temperature. Before it is written, onnxruntime has to answer like PyTorch on a few pictures."""

import functools
import importlib.util
import json
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import metrics
import models
from augment import VIEWS, clahe
from data import encode_meta, meta_for
from files import write_atomically
from judge import EVAL_BATCH
from options import DATA, THEIRS, build_parser, images_elsewhere, run_main
from phantoms import phantoms
from readers import InputError
from transfer import learnt

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SAME = 1e-4  # numbers that differ by less, relative above 1, are called equal
CALIBRATED = 200  # pictures that the ranges of int8 are read off
# fmt: off
EXPORT = [
    ("to", "onnx", ["onnx"], "kind of file"),
    ("out", None, "FILE", "where to; default: model.onnx beside the model. Of int8: FILE with .int8.onnx at its end"),
    ("tta", None, (1, len(VIEWS)), "views of each image; default: as many as the model was calibrated for"),
    ("scales", [1.0], (0.25, 4), "resolutions of each view, 1 = as trained"),
    ("int8", None, "DATA", f"write a second file whose convolutions compute in 8 bits, their ranges read off {CALIBRATED} pictures of this set: of those that the model learnt from, where it has some"),
    ("check", None, "DATA", "a labelled set, or phantoms: AUC and time of one picture of PyTorch and of the files, on what the model has not learnt from"),
    *(line for line in DATA if line[0] in ("image-column", "cache")),
]
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# The network as the file holds it


class Answering(nn.Module):
    """An Ensemble from uint8 pictures (N, C, L, L) to {name: tensor} of all that it tells of them. boxes (N, 4): where a
    model sees crops and finds no lesions itself; patients (N, M): their data, see data.encode_meta."""

    def __init__(self, model, views=None, scales=(1.0,)):
        super().__init__()
        self.model, self.views, self.scales = model, views or model.info["views"], tuple(scales)

    def forward(self, images, boxes=None, patients=None):
        model, told = self.model, {}
        images = clahe(images) if model.info["equalise"] else images
        said = model.look(images, boxes, patients, self.views, self.scales)
        if len(model.members):
            told["probabilities"], told["uncertainty"] = model.conclude(said.opinions)
            if model.info.get("familiar"):
                told["strangeness"] = model.strangeness(said.traits).float()
        if model.finders:
            told["box"] = said.boxes
        if model.tells_outlines:
            told["lesion_score"] = said.found.scores()
            told["outline"] = F.interpolate(said.found.outlines[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
        return told


@functools.cache  # once, and not when this file is imported: it takes seconds
def teach_graphs():
    """Let graphs hold models.label_parts, whose length no value may decide there: as a loop."""
    from torch._higher_order_ops import while_loop

    @torch.compiler.substitute_in_graph(models.label_parts)
    def label_parts(masks):
        inside = masks[:, None].float()
        labels = torch.arange(1, masks[0].numel() + 1, dtype=torch.float).view(masks.shape[1:]) * inside

        def changed(before, labels):
            return (labels - before).max() > 0  # they only grow

        def spread(before, labels):
            return labels.clone(), F.max_pool2d(labels, 3, 1, 1) * inside

        return while_loop(changed, spread, (torch.zeros_like(labels), labels))[1][:, 0].long()


def affine_grid(theta, size, align_corners):
    """torch's as ONNX's own: taken apart, as it is by default, it takes a third of all the time."""
    from onnxscript import opset20 as op

    shape = op.Concat(op.Shape(theta, start=0, end=1), op.Constant(value_ints=[1, *size[-2:]]), axis=0)
    return op.AffineGrid(theta, shape, align_corners=int(align_corners))


def patient_columns(model):
    """The names of the M numbers that a model wants of a patient: of none, []."""
    reads = any(member.config["meta"] for member in model.members)
    return encode_meta([{}], None, model.info["meta_spec"])[1] if reads else []


def examples(model, n=8):
    """{input: tensor} of n phantoms, the last two blank, as `model` takes them; patients and boxes at random."""
    info, generator = model.info, torch.Generator().manual_seed(0)
    pixels = phantoms(n, info["load_size"], seed=0)[0]
    pixels[-2:] = torch.tensor([0, 90], dtype=torch.uint8)[:, None, None, None]
    feed = {"images": pixels.expand(-1, info["channels"], -1, -1).contiguous()}
    if model.needs_boxes:
        feed["boxes"] = (torch.rand(n, 4, generator=generator) + torch.tensor([0, 0, 1, 1])) / 2
        feed["boxes"][-1] = math.nan
    if columns := patient_columns(model):
        feed["patients"] = torch.randn(n, len(columns), generator=generator)
    return feed


def to_onnx(answering):
    """The onnx.ModelProto of an Answering, its words in the metadata, of the machine that wrote it not one."""
    teach_graphs()
    feed = examples(answering.model)
    shapes = {name: {0: torch.export.Dim("N")} for name in feed}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        graph = torch.export.export(answering, (), feed, dynamic_shapes=shapes, strict=True)
        names = {"input_names": list(feed), "output_names": list(answering(**feed))}
        table = {torch.ops.aten.affine_grid_generator.default: affine_grid}
        proto = torch.onnx.export(
            graph, **names, dynamic_shapes=shapes, opset_version=20, custom_translation_table=table, verbose=False
        ).model_proto
    about = describe(answering)
    for graph in (proto.graph, *(a.g for node in proto.graph.node for a in node.attribute if a.HasField("g"))):
        for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
            del part.metadata_props[:]  # paths and lines of source
    del proto.metadata_props[:]
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return proto


def describe(answering):
    """{key: text, or what JSON can hold}: what must be known to feed the file and to read its answers."""
    model, info = answering.model, answering.model.info
    about = {"format": models.FORMAT, "classes": info["classes"]}
    about |= {"size": info["load_size"], "channels": info["channels"], "window": info["window"]}
    about |= {"views": answering.views, "scales": answering.scales, "temperature": info["temperature"]}
    about |= {"threshold": info["threshold"], "lesion_threshold": info["lesion_threshold"]}
    if columns := patient_columns(model):
        about |= {"patients": columns, "patients_spec": info["meta_spec"]}
    made = {k: Path(str(v)).name if k in ("data", "from") else v for k, v in info["made"].items()}  # not where they lay
    return about | {"made": made, "disclaimer": models.DISCLAIMER}


# ---------------------------------------------------------------------------------------------------------------------
# onnxruntime, and the same in 8 bits


def session(content):
    """{input: tensor} -> {output: tensor} by onnxruntime on the CPU, on as many cores as PyTorch takes. content: bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runtime = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    names = [output.name for output in runtime.get_outputs()]

    def answer(**feed):
        values = runtime.run(names, {name: tensor.numpy() for name, tensor in feed.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return answer


def quantise(content, batches):
    """The same file (bytes) with convolutions in 8 bits: static quantisation (Jacob et al. 2018), a scale for each channel
    of the weights, the ranges of the maps as they are on these batches, of {input: tensor}. Depthwise convolutions stay as
    they are: in 8 bits those of MobileNetV2 cost AUC, and time too."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        left = iter(batches)

        def get_next(self):
            feed = next(self.left, None)
            return feed and {name: tensor.numpy() for name, tensor in feed.items()}

    with tempfile.TemporaryDirectory() as folder:
        plain, out = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        plain.write_bytes(content)
        quant_pre_process(str(plain), str(plain), skip_symbolic_shape=True)
        nodes = onnx.load(plain).graph.node
        kept = [node.name for node in nodes if any(a.name == "group" and a.i > 1 for a in node.attribute)]
        kinds = {"op_types_to_quantize": ["Conv"], "activation_type": quantization.QuantType.QUInt8}
        quantization.quantize_static(plain, out, Reader(), nodes_to_exclude=kept, per_channel=True, **kinds)
        return out.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What it is worth


def differences(found, wanted):
    """{output: (N,)} how far the answers to each picture are from those that are wanted, relative above 1."""
    gaps = {k: (found[k].double() - v).abs() / v.double().abs().clamp(min=1) for k, v in wanted.items()}
    return {name: gap.reshape(len(gap), -1).amax(1) for name, gap in gaps.items()}


def feeds(model, images, rows, batch=EVAL_BATCH):
    """Yield {input: tensor} of the images in `rows`, as `model` takes them, batch by batch."""
    patients = meta_for(images, model.info["meta_spec"]) if patient_columns(model) else None
    for index in rows.split(batch):
        known = {"images": images.pixels, "boxes": images.boxes if model.needs_boxes else None, "patients": patients}
        yield {name: values[index] for name, values in known.items() if values is not None}


def clock(engines, feed, runs=30):
    """{name: seconds [runs]} of the engines on one input, in turn."""
    seconds = {name: [] for name in engines}
    for k in range(runs + 3):  # the first warm up
        for name, answer in engines.items():
            began = time.perf_counter()
            answer(**feed)
            seconds[name] += [time.perf_counter() - began] if k >= 3 else []
    return seconds


@torch.inference_mode()
def compare(engines, model, images, rows):
    """What each of the engines {name: function from inputs to outputs} reaches on the images in `rows`: {name: {"test":
    metrics, "change": of them against the first engine, in pairs, "seconds": of one picture, [runs], "differences":
    {output: (N,)} from the first, see differences}}."""
    labels, groups, boxes = images.labels[rows], images.groups[rows], images.boxes[rows]
    seconds, first = clock(engines, next(feeds(model, images, rows, 1))), None
    told, far, table = {name: [] for name in engines}, {name: [] for name in engines}, {}
    for batch in feeds(model, images, rows):
        answers = {name: answer(**batch) for name, answer in engines.items()}
        for name, said in answers.items():  # outlines are too large to be kept
            told[name].append({key: said[key] for key in ("probabilities", "box") if key in said})
            far[name].append(differences(said, next(iter(answers.values()))))
    for name, said in told.items():
        said = joined(said)
        iou = metrics.paired_iou(said["box"], boxes) if "box" in said and boxes.isfinite().any() else None
        said = said.get("probabilities"), model.info["threshold"], iou
        first = first or said
        test = metrics.with_intervals(said[0], None if said[0] is None else labels, groups, *said[1:])
        change = metrics.change_with_intervals(first, said, labels, groups)
        table[name] = {"test": test, "change": change, "seconds": seconds[name], "differences": joined(far[name])}
    return table


def joined(parts):
    """One dict of tensors from those of batches."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def print_table(table):
    """What `compare` found. A box may differ by more than rounding where a cell's probability is just half of the largest:
    on one side it belongs to the lesion, on the other it does not."""
    first = next(iter(table.values()))
    kept = [name for name in ("auc", "iou") if name in first["test"]]
    print(f"{'':18s}{''.join(f'{name:24s}' for name in kept)}one picture, {torch.get_num_threads()} threads")
    for name, row in table.items():
        cells = "".join(f"{metrics.interval_text(row['test'][k]):24s}" for k in kept)
        low, *_, high = times = sorted(1000 * s for s in row["seconds"])
        print(f"{name:18s}{cells}{statistics.median(times):.1f} ms [{low:.1f}, {high:.1f}]")
    for name, row in list(table.items())[1:]:
        changes = ", ".join(f"{k} {metrics.interval_text(row['change'][k], '+.3f')}" for k in kept)
        print(f"{name} against {next(iter(table))}: {changes}; at most, and in how many pictures above {SAME:g}:")
        print("  " + ", ".join(f"{k} {v.max():.0e} {int((v > SAME).sum())}" for k, v in row["differences"].items()))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def write_files(answering, out, calibration):
    """{name of the engine: function} of the files that are written to `out`: float32, and int8 where `calibration`, a list
    of inputs, is given. InputError, and nothing is written, where float32 does not answer like PyTorch."""
    content, feed = to_onnx(answering).SerializeToString(), examples(answering.model)
    engines = {"onnxruntime": session(content)}
    with torch.inference_mode():
        gaps = differences(engines["onnxruntime"](**feed), answering(**feed))
    wrong = [
        k for k, gap in gaps.items() if not gap.sort().values[-2] <= 10 * SAME
    ]  # -2: see print_table; NaN is wrong too
    if wrong:
        advice = "try another version of it; or the model is damaged"
        raise InputError(f"{out}: not written: here onnxruntime's {', '.join(wrong)} differ from PyTorch's; {advice}")
    files = {out: content}
    if calibration:
        files[out.with_suffix(".int8.onnx")] = quantise(content, calibration)
        engines["onnxruntime, int8"] = session(list(files.values())[1])
    for path, part in files.items():
        write_atomically(path, part)
        print(f"{path}: {len(part) / 1e6:.1f} MB")
    return engines


def calibration_rows(images, info):
    """Some rows of the images at random: of those that the model has learnt from, if there are any."""
    met = learnt(images, info)
    rows = torch.nonzero(met if met.any() else ~met)[:, 0]
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:CALIBRATED]]


def main(argv=None):
    """Export as the command line says. Returns what --check found, see compare, or None."""
    tables = {"options of export.py": EXPORT, "the data of --int8 and --check": THEIRS}
    p = build_parser(tables, __doc__.split("\n\n")[0])
    p.add_argument("model", nargs="?", help="model file or run folder; default: the newest under runs/")
    args = p.parse_args(argv)
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"not installed: {', '.join(missing)}; pip install {' '.join(PACKAGES)}")
    path = models.model_file(args.model)
    model = models.load(path)
    answering = Answering(model, args.tta, args.scales).eval()
    bare = model.info | {"equalise": False}  # as the file takes them: it evens out the contrast by itself
    if (answering.views, answering.scales) != (model.info["views"], (1.0,)):
        print(
            f"temperature and threshold were set for {model.info['views']} views at scale 1; with others they mean something else"
        )
    calibration, used, table = None, torch.zeros(0, dtype=torch.long), None
    if args.int8:
        images = images_elsewhere(bare, args, "int8")
        rows = calibration_rows(images, model.info)
        calibration, used = feeds(model, images, rows, 16), images.take(rows).pictures()
    if args.check:
        images = images_elsewhere(bare, args, "check")
        new = (images.labels >= 0) & ~learnt(images, model.info) & ~torch.isin(images.pictures(), used)
        if not new.any():
            raise InputError(f"--check {args.check}: no labelled image is left that the model has not learnt from")
    engines = write_files(answering, Path(args.out or path.with_name("model.onnx")), calibration)
    print("how to feed it: docs/onnx.md")
    if args.check:
        known = "seen" in model.info and (images.thumbnails is not None or not model.info["equalise"])
        print(f"{int(new.sum())} labelled pictures{', none of which the model has learnt from' if known else ''}")
        table = compare({"PyTorch": answering} | engines, model, images, torch.nonzero(new)[:, 0])
        print_table(table)
    print(models.DISCLAIMER)
    return table


if __name__ == "__main__":
    run_main(main)
