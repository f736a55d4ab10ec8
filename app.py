"""The page and the service: a picture dropped in a browser, or sent by a program, and an answer that can be looked into.

    pip install gradio                                  once; it brings FastAPI and uvicorn
    python app.py                                       the newest model under runs/; if there is none, it is trained first
    python app.py --model runs/busi --port 8000
    python app.py --host 0.0.0.0 --auth radiologist:password.txt

The page is at http://127.0.0.1:7860, the service (see service.py) at /v1/predict and /docs of the same. Nothing leaves this
machine: no statistics, no share link, no font or script from elsewhere. What a person marks and corrects is kept in a
folder that `python train.py --data feedback` and `al_loop.py learn --labels feedback` read."""

import contextlib
import csv
import datetime
import hashlib
import html
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

import plots
from answers import verdict, write_answers
from augment import VIEWS
from files import write_atomically
from infer import BreastCancerDetector
from metrics import interval_text
from models import DISCLAIMER
from options import WINDOW, build_parser, run_main
from pictures import origin, own_part, parse_window, read_image
from readers import InputError, one_line, read_table
from report import describe_map, explain_steps, recommended_method
from saliency import METHODS
from service import (
    LOCAL,
    Guard,
    Look,
    Worker,
    ask_files,
    build_service,
    describe_model,
    file_hash,
    in_order,
    keep_sweeping,
    private_folder,
    serve,
)

# fmt: off
APP = [
    ("model", None, "MODEL", "model file or run folder; default: the newest under runs/, else that of the phantoms is trained"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda"),
    WINDOW,
    ("host", "127.0.0.1", "HOST", "address to listen on; other than this machine's own only with --auth or --open"),
    ("port", 7860, (0, 65535), "0 = any that is free"),
    ("auth", None, "USER:FILE", "ask for this user and the password that the file holds"),
    ("open", False, None, "let anyone who reaches --host in, without a password"),
    ("max-mb", 20.0, (0.001, 1e5), "largest request of the service, and picture of the page"),
    ("max-megapixels", 25.0, (0.001, 1e5), "largest picture, as each takes memory by its pixels, however small its file"),
    ("queue", 32, (1, 1e6), "requests that may wait; more are told to come back"),
    ("keep-minutes", 10.0, (0.01, 1e5), "how long a picture of the page lies in the temporary folder"),
    ("read-seconds", 60.0, (0.1, 1e5), "how long a request may take to arrive"),
    ("feedback", "feedback", "DIR", "folder of what people mark and correct"),
]
# fmt: on


def read_login(text):
    """The user and the password of a USER:FILE, as in dr:word; None of None."""
    if text is None:
        return None
    user, _, file = text.partition(":")
    if not user or not Path(file).is_file():
        raise InputError(f"--auth {text}: give USER:FILE, a name and a file that holds the password")
    password = Path(file).read_text().strip()
    if not password:
        raise InputError(f"--auth {text}: the file is empty; write the password into it")
    return f"{user}:{password}"


def listen(host, port):
    """A listening socket. InputError where the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        raise InputError(
            f"--host {host} --port {port}: {e.strerror}; give another --port, or 0 for a free one"
        ) from None


def ready_detector(model, device, window=None):
    """The detector of --model; where none is named and there is none, that of the phantoms is trained."""
    how = {"device": device, "window": parse_window(window)}
    try:
        return BreastCancerDetector(model, **how)
    except InputError:
        if model or list(Path("runs").glob("**/model.pt")):
            raise
    import train

    print("no model under runs/: training one on phantoms, which takes about a minute or two")
    return BreastCancerDetector(train.main(["--device", device])[1], **how)


def main(argv=None):
    """Serve until Ctrl-C or SIGTERM."""
    args = build_parser({"options of app.py": APP}, __doc__.split("\n\n")[0]).parse_args(argv)
    login = read_login(args.auth)
    if args.host not in LOCAL and not (login or args.open):
        raise InputError(f"--host {args.host}: anyone there could ask; give --auth USER:FILE, or say --open")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the package gradio is not installed: pip install 'gradio>=6'")
    detector = ready_detector(args.model, args.device, args.window)
    listener, (folder, lock) = listen(args.host, args.port), private_folder()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    try:
        app = build_app(detector, args, folder, login)
        threading.Thread(target=keep_sweeping, args=(folder, args.keep_minutes * 60), daemon=True).start()
        name = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{detector.describe()}\nhttp://{name}:{listener.getsockname()[1]}   (the service: /docs; Ctrl-C stops)")
        print(DISCLAIMER, flush=True)
        serve(app, listener, args.read_seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def build_app(detector, args, folder, login):
    """The ASGI application: page and service behind the guard. Temporary files of all parts lie in `folder`."""
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir, Image.MAX_IMAGE_PIXELS = str(folder), round(args.max_megapixels * 1e6)
    import gradio as gr  # not before, as it makes its folder at once

    worker, most = Worker(detector, args.queue), round(args.max_mb * 1e6)
    page = build_page(gr, worker, args, folder, login)
    app = gr.mount_gradio_app(
        build_service(worker, folder), page, "/", args.host, args.port, [], False, max_file_size=most, show_error=True,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    hosts = None if args.host not in LOCAL or login else LOCAL
    return Guard(app, hosts, login, most, most * args.queue, args.read_seconds, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Feedback: what a person says of a picture, as a data set

COLUMNS = ["image", "label", "mask", "box", "not_this", "who", "when", "model", "said", "probability"]
LESION, BESIDE = (0, 200, 83), (213, 0, 0)  # what is painted green is lesion, what is red is beside the point


def filled(mask):
    """A mask (h, w) with all that its strokes enclose: whoever draws an outline means what lies in it."""
    h, w = mask.shape
    scale = min(1, 254 / max(h, w))  # coarse enough for a flood in Python
    shape = max(1, round(h * scale)), max(1, round(w * scale))
    coarse = F.pad(F.adaptive_max_pool2d(torch.from_numpy(mask).float()[None], shape), (1, 1, 1, 1))[0].bool()
    flood = Image.fromarray(coarse.numpy()).convert("L")
    ImageDraw.floodfill(flood, (0, 0), 128)
    holes = flood.point(lambda v: 255 * (v == 0)).filter(ImageFilter.MaxFilter(3))  # up to the stroke, which is wider
    holes = holes.crop((1, 1, shape[1] + 1, shape[0] + 1)).resize((w, h))
    return mask | (np.asarray(holes) > 127)


def painted(drawing, picture):
    """(lesion, beside the point): masks bool (h, w) of a picture, None where nothing is painted. drawing: what the page's
    editor gives, layers of green and red paint over the picture. InputError where it shows another one: a browser that
    is slow to change it must not put one patient's lesion into another's picture."""
    green = red = False
    for layer in (drawing or {}).get("layers") or []:
        pixels = np.asarray(layer.convert("RGBA")).astype(int)
        there = pixels[..., 3] > 127
        green, red = (
            green | (there & (pixels[..., 1] > pixels[..., 0])),
            red | (there & (pixels[..., 1] <= pixels[..., 0])),
        )
    if np.any(green | red):
        under, shown = drawing.get("background"), to_paint(picture)
        if under is None or np.abs(tiny(under) - tiny(shown)).mean() > 8:
            raise InputError("the picture that was painted on is not the one chosen; choose it again, and paint anew")
    masks = []
    for mask in (green, red):
        large = Image.fromarray(filled(mask)).resize(picture.size, Image.Resampling.NEAREST) if np.any(mask) else None
        masks.append(None if large is None else np.asarray(large))
    return masks


def tiny(picture):
    """What a picture shows, coarse, to tell it from others: (32, 32)."""
    return np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), float)


def read_box(text, picture):
    """Four numbers x_min, y_min, x_max, y_max in the whole frame's pixels, as answers have them, in the picture's own; or
    None of an empty text."""
    if not (text or "").strip():
        return None
    try:
        box = [float(v) for v in re.split(r"[\s,;]+", text.strip())]
    except ValueError:
        box = []
    own, size = own_box(box, picture) if len(box) == 4 else [math.nan] * 4, picture.size
    if not (0 <= own[0] < own[2] <= size[0] and 0 <= own[1] < own[3] <= size[1]):
        left, top = origin(picture).corner
        raise InputError(
            f"box {text!r}: give x_min y_min x_max y_max, inside {left} {top} {left + size[0]} {top + size[1]}"
        )
    return own


def write_feedback(folder, picture, label, lesion=None, beside=None, box=None, who="", answer=None, model=""):
    """Add one row to folder/feedback.csv, see COLUMNS, and its picture and masks beside it; returns how many rows there
    are. Nothing is ever changed or removed; a kill leaves whole files. The picture is named by what it shows, and nothing
    of its file but its pixels is kept. lesion, beside: bool (h, w) of the picture's own pixels, or None; what is "beside the
    point" has a mask of its own (not_this), which says where no evidence should be."""
    grey = np.ptp(np.asarray(picture, np.uint8), axis=2).max() == 0
    picture, answer = picture.convert("L") if grey else picture, answer or {}
    shown = hashlib.sha256(np.asarray(picture).tobytes() + repr(picture.size).encode()).hexdigest()[:16]
    row = {
        "image": f"pictures/{shown}.png",
        "label": label,
        "box": " ".join(f"{v:g}" for v in box or []),
        "model": model,
    }
    row |= {"who": one_line(who or "").lstrip("=+-@ ")[:80]}  # a spreadsheet would take =... for a formula
    row |= {"said": answer.get("prediction"), "probability": answer.get("probability")}
    with alone_in(folder) as folder:
        when, table, text = datetime.datetime.now(datetime.timezone.utc), folder / "feedback.csv", io.StringIO()
        if not (folder / row["image"]).exists():
            plots.save_png(picture, folder / row["image"])
        for kind, mask in (("mask", lesion), ("not_this", beside)):
            if mask is not None and mask.any():
                row[kind] = f"{kind}/{shown}_{when:%Y%m%dT%H%M%S%f}.png"
                plots.save_png(Image.fromarray(mask), folder / row[kind])
        rows, header = read_table(table) if table.exists() else ([], [])
        writer = csv.DictWriter(text, list(dict.fromkeys([*header, *COLUMNS])), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(old for _, old in rows), row | {"when": when.isoformat(timespec="milliseconds")}])
        write_atomically(table, text.getvalue().encode())
    return len(rows) + 1


@contextlib.contextmanager
def alone_in(folder):
    """The folder as a Path, made if it is missing, with one writer at a time, of all processes."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as e:
        raise InputError(f"{folder} can't be written ({e.strerror}); give another --feedback") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:
            pass  # Windows has no such locks
        yield folder


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows

SHOWN, PAINTED = 1024, 640  # longest side of a picture on the page, and least of one to paint on
QUIET = {"api_visibility": "private"}  # of an event: programs have /v1
SAFE = ["download", "fullscreen"]  # of a picture: gradio's third button would share it
CSS = """
#use { position: fixed; top: 0; left: 0; right: 0; z-index: 50; padding: .5em 1em; background: var(--background-fill-primary);
  border-bottom: 1px solid var(--border-color-primary); }
#use h1 { display: inline; font-size: 1.2em; margin-right: 1em; }
.scale { position: relative; height: 1.4em; margin: 2em 0 2.2em; border-radius: .4em; border: 1px solid var(--border-color-primary);
  background: linear-gradient(90deg, #56B4E9 0%, var(--background-fill-secondary) 50%, #D55E00 100%); }
.scale span { position: absolute; white-space: nowrap; transform: translateX(-50%); font-size: .85em; }
.scale i { position: absolute; top: -.3em; bottom: -.3em; width: 3px; margin-left: -1px; background: var(--body-text-color); }
.scale i.limit { width: 0; background: none; border-left: 3px dashed var(--body-text-color); }
.refer { border-left: .4em solid #E69F00; padding: .3em .8em; margin: .5em 0; }
:root { --block-info-text-color: var(--body-text-color); }
#gallery .grid-wrap { overflow-x: hidden; padding-top: 2.5em; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }
html { scroll-padding-top: 5em; }
.gradio-container { padding-top: 3.5em !important; max-width: 1300px !important; margin: 0 auto !important; }
"""
HEAD = f"<div><h1>miniCADx</h1><strong>{DISCLAIMER}</strong></div>"
HOW = {
    "gradcam": "where the network's deepest features spoke for the answer; coarse",
    "gradcam++": "the same, weighted so that several places count",
    "layercam": "the same, place by place",
    "ig": "integrated gradients: pixels whose sum is the score",
    "smoothgrad": "what the score is sensitive to, for or against",
    "occlusion": "what is lost when a patch is covered; slow",
    "rise": "what is gained when a part is seen; slow",
}


def answer_html(item, info):
    """The answer to one picture in words, on a scale, and the reason to refer."""
    answer, name = item["answer"], html.escape(item["name"])
    if answer["error"]:
        return f'<p><strong>{name}</strong></p><p class="refer">no answer: {html.escape(answer["error"])}</p>'
    words = f"<p>{name}</p><h2>{html.escape(', '.join(verdict(answer, info)))}</h2>"
    if len(info["classes"]) == 2:
        words += scale_html(answer["probability"], info["threshold"], info["classes"])
    else:
        each = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])
        words += "<p>" + ", ".join(f"{html.escape(c)} {p:.3f}" for c, p in each) + "</p>"
    if answer["refer"]:
        words += f'<p class="refer"><strong>Refer to a radiologist:</strong> {html.escape(answer["reason"])}.</p>'
    else:
        words += "<p>No reason to refer was found. That is no promise.</p>"
    if answer["box"]:
        box, more = " ".join(f"{v:.0f}" for v in answer["box"]), len(answer["boxes"] or []) - 1
        words += f"<p>Lesion: box {box} (x_min y_min x_max y_max, pixels){f', and {more} more' if more > 0 else ''}"
        if outline := answer["outline"]:
            words += f"; {outline['area']:.1%} of the picture, width over height {outline['width_over_height']:.2f}"
            words += f", irregularity {outline['irregularity']:.2f}"
        words += ".</p>"
    elif answer["lesion_score"] is not None:
        words += "<p>No lesion was found.</p>"
    if clip := answer["clip"]:
        first, last = clip["stretch"]
        words += (
            f"<p>A clip: {clip['looked_at']} of its {clip['frames']} frames were looked at, the most suspicious are "
        )
        words += f"{first} to {last}; shown is frame {answer['frame']}.</p>"
    return words + f"<p>Uncertainty {answer['uncertainty']:.3f} (how far views and members differ).</p>"


def scale_html(p, threshold, classes):
    """A probability on a scale of 0 to 1, with the threshold marked."""
    told = f"probability of {html.escape(classes[1])} {p:.3f}, threshold {threshold:.3f}"

    def at(v):
        return f"left:{100 * v:.1f}%"

    def text(v):  # kept inside the scale at its ends
        return f"left:{min(max(100 * v, 8), 92):.1f}%"

    return (
        f'<div class="scale" role="img" aria-label="{told}"><i style="{at(p)}"></i><i class="limit" style="{at(threshold)}"></i>'
        f'<span style="{text(p)};top:-1.7em">p = {p:.3f}</span>'
        f'<span style="{text(threshold)};bottom:-1.7em">threshold {threshold:.3f}</span></div>'
    )


def card_text(detector):
    """The model's own card, as Markdown."""
    told = describe_model(detector)
    members = ", ".join(f"{m['model']}{'' if m['roi'] == 'none' else ' on crops'}" for m in told["members"])
    trained, test = told["trained_on"], told["test"]
    lines = [
        f"**{told['model']}** (file {told['hash']}): {members}, {told['size']} px, classes {', '.join(told['classes'])}."
    ]
    count = f", {trained['images']} images" if trained["images"] else ""
    lines += [f"**Trained on** {trained['data']}{count}."]
    if trained["data"] == "phantoms":
        lines += ["**These are phantoms, synthetic pictures: an answer on a real picture means nothing.**"]
    if trained["placeholder_boxes"]:
        lines += ["**Its boxes were placeholders: where it says a lesion lies means nothing.**"]
    if test:
        lines += ["**How good it is** on held-out images, with 95 % intervals:", "| | |\n|-|-|"]
        lines[-1] += "".join(f"\n| {name.replace('_', ' ')} | {interval_text(m)} |" for name, m in test.items())
        if told["runs"] > 1:
            lines += [f"These are of {told['runs']} runs, each on the images that it never saw."]
    else:
        lines += ["**How good it is** is not known: no report.json lies beside the model."]
    if len(told["classes"]) == 2:
        lines += [
            f"{told['classes'][1]} is said from a probability of {told['threshold']:.3f} on, as validation set it."
        ]
    lines += [
        f"**What it must not be used for**: {DISCLAIMER} Not for screening, triage, treatment or any other decision about a "
        "patient; not for pictures of another kind, organ or scanner than those of training, on which the figures above "
        "say nothing. An answer without a reason to refer can be wrong."
    ]
    return "\n\n".join(lines)


def shrunk(picture):
    """As it is, or so much smaller that its longest side has SHOWN pixels."""
    small = picture.copy()
    small.info = {}  # it stands for itself, wherever in its frame it lay
    small.thumbnail((SHOWN, SHOWN))
    return small


def to_paint(picture):
    """A picture large enough to paint on, and no larger than is shown."""
    small = shrunk(picture)
    scale = max(1, PAINTED / max(small.size))
    return small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))


def open_again(item):
    """A picture of the page, RGB; of a clip the frame that the answer is of. InputError where its time is over."""
    if not Path(item["path"]).exists():
        raise InputError("this picture was removed after its time; drop it again")
    return read_image(item["path"], 3, item["window"], item["answer"]["frame"] or 1)


def own_box(box, picture):
    """A box in the whole frame's pixels, see pictures.Origin, in those of the picture, which may be a part of it; or None."""
    return box and (np.asarray(box) - origin(picture).corner * 2).tolist()


def draw_item(item, picture, heat=None, caption="", opacity=0.75):
    """Box and outline, and a map, over a picture of the page."""
    answer, small = item["answer"], shrunk(picture)
    box = answer["box"] and [v * small.width / picture.width for v in own_box(answer["box"], picture)]
    return plots.overlay(small, box, caption, heat, mask=item["mask"], opacity=opacity)


def keep_answer(path, answer, meta, window):
    """What the page remembers of a picture; no more of its outline than is shown."""
    mask, item = answer.pop("mask", None), {"path": path, "name": one_line(Path(path).name), "meta": meta}
    item |= {"answer": answer, "window": window, "mask": None}
    if mask is not None:
        mask = Image.fromarray(own_part(mask, origin(open_again(item)))).convert("L")
        item["mask"] = np.asarray(shrunk(mask)) > 127
    return item


def look_at(worker, paths, how, meta):
    """What the page remembers of these pictures, which are looked at now."""
    jobs = ask_files(worker, paths, how, [meta] * len(paths))
    answers = in_order(jobs, [job.result() for _, job in jobs])
    return [keep_answer(p, a, meta, worker.detector.window) for p, a in zip(paths, answers, strict=True)]


def likeliest_first(items):
    """The highest probability first, what has no answer last."""
    return sorted(
        items, key=lambda item: -1 if item["answer"]["error"] else item["answer"]["probability"], reverse=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build_page(gr, worker, args, folder, login):
    """The page, a gradio Blocks; gr is gradio."""
    detector = worker.detector
    with gr.Blocks(title="miniCADx", analytics_enabled=False, fill_width=True) as page:
        state = gr.State({}, time_to_live=args.keep_minutes * 60)
        gr.HTML(HEAD, elem_id="use")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                asked = ask_part(gr, detector)
            with gr.Column(scale=3, min_width=300):
                seen = answer_part(gr, detector.info)
        with gr.Accordion("Teach it: mark, correct, send", open=False, elem_id="teach"):
            taught = teach_part(gr, detector.info, login)
        with gr.Accordion(
            "The model: what it was trained on, how good it is, what it is not for", open=False, elem_id="card"
        ):
            gr.Markdown(card_text(detector))
        wire_answers(gr, worker, folder, state, asked, seen, taught)
        wire_teaching(gr, detector, args.feedback, state, taught)
    page.queue(api_open=False, max_size=args.queue, default_concurrency_limit=8)
    return page


def ask_part(gr, detector):
    """What can be asked: the controls, each of which says what it does."""
    info, part = detector.info, SimpleNamespace(threshold=None, patient={})
    method, note = recommended_method(detector.path)
    part.files = gr.File(
        label="Pictures: drop one or several here",
        file_count="multiple", height=140, elem_id="files",
    )  # fmt: skip
    for s in info["meta_spec"]:
        column = s["column"]
        about = {"label": column, "info": "of the patient; leave it empty where it is not known"}
        if "levels" in s:
            part.patient[column] = gr.Dropdown(["", *s["levels"]], value="", **about)
        else:
            about["info"] += f" (in training {s['mean']:.3g} +- {s['sd']:.2g})"
            part.patient[column] = gr.Textbox("", **about)
    with gr.Row():
        part.ask = gr.Button("Look", variant="primary", elem_id="ask")
        part.stop = gr.Button("Stop", variant="stop", elem_id="stop")
    part.method = gr.Dropdown(
        [(f"{name}: {HOW[name]}", name) for name in METHODS], value=method, label="Map", elem_id="method",
        info=f"how the picture's evidence is shown; {note or 'the one recommended for this model'}",
    )  # fmt: skip
    part.opacity = gr.Slider(
        0, 1, 0.75, step=0.05, label="Opacity of the map", info="0 shows box and outline alone", elem_id="opacity"
    )
    with gr.Accordion("How the picture is looked at", open=False):
        part.tta = gr.Slider(
            1, len(VIEWS), info["views"], step=1, label="Views", elem_id="views",
            info=f"turned and cut anew, their mean is the answer; it was calibrated for {info['views']}",
        )  # fmt: skip
        part.scales = gr.CheckboxGroup(
            [0.75, 1.0, 1.25, 1.5], value=[1.0], label="Scales", elem_id="scales",
            info="resolutions of each view; it was calibrated for 1 alone",
        )  # fmt: skip
        if len(info["classes"]) == 2:
            part.threshold = gr.Slider(
                0.001, 0.999, own_threshold(info), step=0.001, label="Threshold", elem_id="threshold",
                info=f"{info['classes'][1]} is said from here on: lower finds more and alarms more; validation set {info['threshold']:.3f}",
            )  # fmt: skip
    return part


def own_threshold(info):
    """The model's threshold as the page's control can show it."""
    return min(max(round(info["threshold"], 3), 0.001), 0.999)


def answer_part(gr, info):
    part = SimpleNamespace()
    part.words = gr.HTML("<p>Drop a picture, and the answer stands here.</p>", elem_id="answer")
    with gr.Row():
        part.plain = gr.Image(
            label="The picture, untouched",
            interactive=False,
            format="png",
            min_width=240,
            buttons=SAFE,
            elem_id="plain",
        )
        part.drawn = gr.Image(
            label="Box, outline, map", interactive=False, format="png", min_width=240, buttons=SAFE, elem_id="drawn"
        )
    part.gallery = gr.Gallery(
        label="All pictures, the highest probability first; choose one", columns=3,
        object_fit="contain", height="auto", format="png",
        allow_preview=False, interactive=False, buttons=[], visible=False, elem_id="gallery",
    )  # fmt: skip
    part.table = gr.DownloadButton("Take the answers home (CSV)", visible=False, elem_id="csv")
    return part


def teach_part(gr, info, login):
    part = SimpleNamespace()
    colours = {name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in (("lesion", LESION), ("beside", BESIDE))}
    gr.Markdown(
        "Paint **green** where the lesion is (an outline will do), and **red** over what is beside the point: callipers, "
        "letters, a part of the map that should not count. Or type boxes. Then say what it is, and who says so."
    )
    part.editor = gr.ImageEditor(
        label="Paint here", type="pil", sources=(), transforms=(), layers=False, image_mode="RGBA", elem_id="editor",
        brush=gr.Brush(8, [*colours.values()], colours["lesion"], "fixed"), height=480, format="png", buttons=[],
    )  # fmt: skip
    part.editor.blob_storage = Few()
    corners = "x_min y_min x_max y_max in the picture's pixels; instead of paint"
    with gr.Row():
        part.lesion = gr.Textbox(label="Box of the lesion", info=corners, elem_id="lesion-box")
        part.beside = gr.Textbox(label="Box of what is beside the point", info=corners, elem_id="beside-box")
    with gr.Row():
        part.label = gr.Radio(info["classes"], label="What it is", info="as a biopsy or you say", elem_id="label")
        part.who = gr.Textbox(
            login.partition(":")[0] if login else "", label="Who says so", info="a name or initials", elem_id="who"
        )
    part.send = gr.Button("Write it down", elem_id="send")
    part.said = gr.HTML(elem_id="said")
    return part


class Few(dict):
    """Of what browsers send and never ask for again no more than the last 32 are kept."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        for old in list(self)[:-32]:
            del self[old]


@contextlib.contextmanager
def told(gr):
    """An InputError in here is told on the page."""
    try:
        yield
    except InputError as e:
        raise gr.Error(html.escape(str(e).removeprefix("--")), print_exception=False) from None


def wire_answers(gr, worker, folder, state, asked, seen, taught):
    """What happens when pictures come, another one is chosen, or another map."""
    detector, chosen = worker.detector, [seen.words, seen.plain, seen.drawn, taught.editor]
    settings = [asked.files, asked.tta, asked.scales, *(asked.patient.values())]
    settings += [asked.threshold] if asked.threshold else []

    def look(given, progress=gr.Progress()):  # noqa: B008  gradio finds it by its default
        items = []
        with told(gr):
            paths, how, meta = read_asked(given, asked, detector.info)
            for start in range(0, len(paths), 8):
                progress((start, len(paths)), desc="looking", unit="pictures")
                how.of(detector)
                items += look_at(worker, paths[start : start + 8], how, meta)
                yield dict.fromkeys([state, seen.gallery, seen.table], gr.skip())  # here it can be stopped
        new = {"items": likeliest_first(items), "chosen": 0, "info": how.of(detector).info} if items else {}
        several = len(items) > 1
        tiles = [(gallery_tile(item), gallery_words(item)) for item in new["items"]] if several else []
        table = write_table(new["items"], folder) if items else None
        yield {
            state: new, seen.gallery: gr.Gallery(tiles, visible=several, selected_index=None),
            seen.table: gr.DownloadButton(value=table, visible=bool(items)),
        }  # fmt: skip

    def show(kept):
        if not kept:
            return "<p>Drop a picture, and the answer stands here.</p>", None, None, None
        item = kept["items"][kept["chosen"]]
        words = answer_html(item, kept["info"])
        if item["answer"]["error"]:
            return words, None, None, None
        with told(gr):
            picture = open_again(item)
        plain, page = plots.overlay(shrunk(picture), caption="untouched\n"), draw_item(item, picture, caption="\n")
        return words, plain, page, {"background": to_paint(picture), "layers": [], "composite": None}

    def draw_map(kept, method, opacity, progress=gr.Progress()):  # noqa: B008
        yield from map_pages(gr, worker, kept, method, opacity, progress)

    def choose(kept, event: gr.SelectData):
        return kept and kept | {"chosen": event.index}

    inputs, outputs = [state, asked.method, asked.opacity], [state, seen.gallery, seen.table]
    events = [
        trigger(look, set(settings), outputs, show_progress_on=seen.words, **QUIET)
        for trigger in (asked.ask.click, asked.files.upload)
    ]
    events.append(seen.gallery.select(choose, state, state, **QUIET))
    for first in tuple(events):
        shown = first.then(show, state, chosen, **QUIET)
        events += [shown, shown.then(draw_map, inputs, seen.drawn, **QUIET)]
    for trigger in (asked.method.change, asked.opacity.release):
        events += [trigger(draw_map, inputs, seen.drawn, trigger_mode="always_last", **QUIET)]
    asked.stop.click(None, cancels=events, **QUIET)


def read_asked(given, asked, info):
    """(paths, the Look, the patient's data or None) of the values of the page's controls, {control: value}."""
    limit = given[asked.threshold] if asked.threshold else None
    limit = None if limit == own_threshold(info) else limit
    meta = {column: str(given[field] or "").strip() for column, field in asked.patient.items()}
    look = Look(given[asked.tta], tuple(sorted(given[asked.scales])), limit, masks=True)
    paths = given[asked.files] or []
    if not all(os.path.exists(p) for p in paths):
        raise InputError("these pictures were removed after their time; drop them again")
    return paths, look, {k: v for k, v in meta.items() if v} or None


def map_pages(gr, worker, kept, method, opacity, progress):
    """Yield nothing new after each of the networks, then the page with the map; None where there is no picture."""
    item, detector = kept["items"][kept["chosen"]] if kept else None, worker.detector
    if not item or item["answer"]["error"]:
        yield None
        return
    with told(gr):
        picture, asked_for, count = open_again(item), (kept["chosen"], method), len(detector.model.members)
        if kept.get("map", (None,))[0] != asked_for:  # another opacity asks the model for nothing
            steps = map_steps(detector, item, method)
            for number in range(count):
                progress((number, count), desc=method, unit="networks")
                heat = worker.run(next, steps).result()
                yield gr.skip()  # here it can be stopped, and others' pictures get their turn
            kept["map"] = asked_for, heat
    yield draw_item(item, picture, kept["map"][1], describe_map(method, item["answer"]["prediction"]), opacity)


def map_steps(detector, item, method):
    """Yield the map (h, w) of a picture of the page, for the class that was said, after each of the networks."""
    info = detector.info
    picture, target = open_again(item), info["classes"].index(item["answer"]["prediction"])
    picture = picture.convert("L") if info["channels"] == 1 else picture
    for heat, *_ in explain_steps(detector.model, picture, method, target, item["meta"]):
        yield heat


def gallery_tile(item):
    return Image.new("RGB", (320, 240), "grey") if item["answer"]["error"] else tile(item)


def tile(item):
    picture = open_again(item)
    box, small = own_box(item["answer"]["box"], picture), picture.copy()
    small.thumbnail((320, 320))
    return plots.draw_box(small, box and [v * small.width / picture.width for v in box], "#56B4E9")


def gallery_words(item):
    answer = item["answer"]
    if answer["error"]:
        return f"{item['name']}: no answer"
    return f"{answer['probability']:.3f} {answer['prediction']}{', refer' if answer['refer'] else ''}: {item['name']}"


def write_table(items, folder):
    """The CSV to take home."""
    path = Path(tempfile.mkdtemp(dir=folder), "answers.csv")
    write_answers(path, [item["answer"] | {"image": item["name"]} for item in items])
    return str(path)


def wire_teaching(gr, detector, folder, state, taught):
    """What happens when feedback is sent."""
    model = file_hash(detector.path)

    def write(kept, drawing, lesion, beside, label, who):
        with told(gr):
            if not kept or kept["items"][kept["chosen"]]["answer"]["error"]:
                raise InputError("there is no picture to speak of; drop one")
            if not label:
                raise InputError("say what it is")
            item = kept["items"][kept["chosen"]]
            picture = open_again(item)
            (green, red), box, other = painted(drawing, picture), read_box(lesion, picture), read_box(beside, picture)
            if other:
                red = np.zeros(picture.size[::-1], bool) if red is None else red.copy()
                x0, y0, x1, y1 = map(round, other)
                red[y0:y1, x0:x1] = True
            count = write_feedback(folder, picture, label, green, red, box, who, item["answer"], model)
        kinds = {"a lesion": green is not None or box, "a place beside the point": red is not None}
        marked = " and ".join(kind for kind, there in kinds.items() if there)
        return f"<p>Written down: {html.escape(label)}{marked and ', with '}{marked}; {count} in all. Thank you.</p>"

    fields = [state, taught.editor, taught.lesion, taught.beside, taught.label, taught.who]
    taught.send.click(write, fields, taught.said, **QUIET)


if __name__ == "__main__":
    run_main(main)
