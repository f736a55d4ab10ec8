"""The service: pictures over HTTP, answers as JSON. app.py starts it, and puts the page on the same server.

    curl -F files=@image.png http://127.0.0.1:7860/v1/predict           the JSON of infer.py, a list
    curl -F file=@image.png -F method=gradcam http://127.0.0.1:7860/v1/explain > why.png

One thread owns the model and takes what waits, up to 32 pictures that are asked alike, in one pass. What is refused
is refused before it is read: strangers, pages of other hosts, too much, too slow. A picture lies in a folder that this
user alone can read, no longer than its answer takes, or --keep-minutes where the page still shows it."""

import asyncio
import base64
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import hmac
import html
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from data import parse_meta
from explain import draw
from files import parts_of
from infer import check_views, is_clip
from models import DISCLAIMER
from pictures import count_frames, read_image
from readers import InputError, one_line
from report import explain_picture, recommended_method
from saliency import CLASSLESS, METHODS

BATCH = 32  # pictures in one pass
MOST_FRAMES = 256  # of a clip that are looked at, evenly
LOCAL = ("127.0.0.1", "localhost", "::1")


class NoPicture(InputError):
    """What came is no picture, or none that can be read."""


class Full(InputError):
    """Too much waits already."""


# ---------------------------------------------------------------------------------------------------------------------
# The worker


@dataclasses.dataclass(frozen=True)
class Look:
    """How pictures are looked at; those that are asked alike go through the model together."""

    tta: int | None = None  # views; None: as many as the model was calibrated for
    scales: tuple = (1.0,)
    threshold: float | None = None  # None: the model's own
    masks: bool = False

    def of(self, detector):
        """The detector that looks so; it shares the networks. InputError where the model can't."""
        other, info = copy.copy(detector), detector.info
        if self.threshold is not None and len(info["classes"]) > 2:
            raise InputError(f"threshold: the model knows {len(info['classes'])} classes, and the likeliest is said")
        other.tta, other.scales = check_views(
            info["views"] if self.tta is None else self.tta, self.scales, info["size"]
        )
        other.info = info if self.threshold is None else info | {"threshold": self.threshold}
        return other

    def at_once(self, detector):
        """How many pictures go through the model together: fewer where each is looked at more often, or larger."""
        looks = (self.tta or detector.info["views"]) * sum(s * s for s in self.scales)
        return max(1, min(BATCH, round(BATCH * max(5, detector.info["views"]) / looks)))


class Worker:
    """The one thread that uses the model. ask: pictures to predict, which are batched; run: anything else, in turn.
    Both return a concurrent.futures.Future, or raise Full where `most` jobs wait already."""

    def __init__(self, detector, most=32):
        self.detector, self.most = detector, most
        self.waiting, self.news = collections.deque(), threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def ask(self, paths, look=None, metas=None):
        """The answers to some pictures, see BreastCancerDetector.predict. metas: a dict or None for each."""
        return self.put(look or Look(), list(zip(paths, metas or [None] * len(paths), strict=True)))

    def run(self, function, *args):
        return self.put(None, functools.partial(function, *args))

    def put(self, look, what):
        with self.news:
            if len(self.waiting) >= self.most:
                raise Full(f"{self.most} requests wait already; try again in a moment")
            self.waiting.append((look, what, Future()))
            self.news.notify()
            return self.waiting[-1][2]

    def work(self):
        while True:
            with self.news:
                self.news.wait_for(lambda: self.waiting)
                batch = self.take()
            self.answer([job for job in batch if job[2].set_running_or_notify_cancel()])

    def take(self):
        """The job that waits longest, and those after it that are asked alike, as long as all their pictures fit."""
        batch = [self.waiting.popleft()]
        look, room = batch[0][0], 0 if batch[0][0] is None else BATCH - len(batch[0][1])
        for job in [job for job in self.waiting if job[0] == look] if room > 0 else ():
            if len(job[1]) <= room:
                self.waiting.remove(job)
                batch.append(job)
                room -= len(job[1])
        return batch

    def answer(self, batch):
        try:
            if not batch:
                return
            look = batch[0][0]
            if look is None:
                return batch[0][2].set_result(batch[0][1]())
            pictures = [picture for _, own, _ in batch for picture in own]
            detector, most, answers = look.of(self.detector), look.at_once(self.detector), []
            for start in range(0, len(pictures), most):
                paths, metas = map(list, zip(*pictures[start : start + most], strict=True))
                answers += detector.predict(paths, metas, masks=look.masks)
            answers = iter(answers)
            for _, own, future in batch:
                future.set_result([next(answers) for _ in own])
        except Exception as e:  # of one alone it is its own; the others' answers do not suffer from it
            if len(batch) == 1:
                batch[0][2].set_exception(e)
            for job in batch if len(batch) > 1 else ():
                self.answer([job])


def ask_files(worker, paths, look, metas=None):
    """[(rows, future of their answers)] of files: the pictures together, each clip by itself, see predict_clip."""
    metas = metas or [None] * len(paths)
    clips = [i for i, path in enumerate(paths) if is_clip(path)]
    still = [i for i in range(len(paths)) if i not in clips]
    jobs = [([i], worker.run(look_at_clip, worker.detector, look, paths[i], metas[i])) for i in clips]
    if still:
        jobs.append((still, worker.ask([paths[i] for i in still], look, [metas[i] for i in still])))
    return jobs


def in_order(jobs, answers):
    """The answers of each of these jobs, see ask_files, in the order of the files."""
    found = {}
    for (rows, _), some in zip(jobs, answers, strict=True):
        found |= dict(zip(rows, some, strict=True))
    return [found[i] for i in sorted(found)]


def look_at_clip(detector, look, path, meta):
    """[the answer to a clip]."""
    detector = look.of(detector)
    answer = detector.predict_clip(path, meta, math.ceil(count_frames(path) / MOST_FRAMES))[1]
    if look.masks:
        picture = read_image(path, 3, detector.window, answer["frame"] or 1)
        answer["mask"] = None if answer["error"] else detector.predict(picture, meta, masks=True)["mask"]
    return [answer]


# ---------------------------------------------------------------------------------------------------------------------
# The folder of the pictures


def private_folder():
    """(folder, lock): a new folder among the system's temporary ones that this user alone can read. It is locked as long as
    the lock, an open file, lives; folders that a killed process has left behind are removed here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return Path(tempfile.mkdtemp(prefix="minicadx-")), open(os.devnull)
    for old in Path(tempfile.gettempdir()).glob("minicadx-*/.lock"):
        with contextlib.suppress(OSError), open(old) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent)
    folder = Path(tempfile.mkdtemp(prefix="minicadx-"))
    lock = open(folder / ".part", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return (folder / ".part").rename(
        folder / ".lock"
    ).parent, lock  # named when it is locked, so that nobody removes it


def files_in(folder):
    """[(path, its os.stat_result)] of a folder and below, without the lock; what goes meanwhile is left out."""
    found = []
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.name != ".lock" and path.is_file():
                found.append((path, path.stat()))
    return found


def sweep(folder, seconds):
    """Remove what has lain in the folder for longer, and the folders in it that this leaves empty."""
    for path, stat in files_in(folder):
        if time.time() - max(stat.st_mtime, stat.st_ctime) > seconds:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds others still
                path.parent.rmdir()


def keep_sweeping(folder, seconds):
    while folder.exists():
        with contextlib.suppress(OSError):
            sweep(folder, seconds)
        time.sleep(min(10, seconds / 4))


def keep_upload(upload, folder):
    """An upload as a file of its own folder, whatever its name leads to: the path."""
    name = re.sub(r"[^\w.() +-]", "_", re.split(r"[/\\]", upload.filename or "")[-1])[-60:].lstrip(".") or "picture"
    path = Path(tempfile.mkdtemp(dir=folder), name)
    with open(path, "wb") as file:
        shutil.copyfileobj(upload.file, file, 1 << 20)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask, and how much

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)  # a browser that reads this asks no other host for anything


async def say(send, status, error, *headers):
    """Send an error as JSON, and hang up: what else was on its way is not read."""
    head = [(b"content-type", b"application/json"), (b"connection", b"close"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


async def drop(receive, seconds=2):
    """Read the rest of a request and forget it: who still sends when a connection is closed does not see the answer."""
    more, until = True, time.monotonic() + seconds
    with contextlib.suppress(asyncio.TimeoutError):
        while more:
            message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
            more = message.get("more_body", False)


class Guard:
    """Around an ASGI application: refuses who has no password, a page of another host, what is too large (413) or too
    slow (408), and more at once than fits (503).

    hosts: the names that a request may call this host, None = any (so that no foreign name is made to lead here: DNS
    rebinding). login: "user:password" or None. most: bytes of a request; room: bytes of all that are on their way, and of the
    pictures in `folder`; seconds: that a request may take to arrive."""

    def __init__(self, app, hosts, login, most, room, seconds, folder):
        self.app, self.hosts, self.login, self.most, self.room = app, hosts, login, most, room
        self.seconds, self.folder, self.held = seconds, folder, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks over web sockets
            return await send({"type": "websocket.close"})
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        page = scope["path"].endswith("/upload")  # of several pictures, each of which the page's own limit holds for
        most = self.room if page else self.most
        if refusal := self.refuse(scope, headers, most, page):
            if refusal[0] == 401:
                await asyncio.sleep(1)  # so that guessing takes its time
            if refusal[0] == 413 and int(headers["content-length"]) <= 2 * most and "expect" not in headers:
                await drop(receive)
            return await say(send, *refusal)
        await self.pass_on(scope, receive, send, most)

    def refuse(self, scope, headers, most, page):
        """(status, error, headers ...) of a request that is not even read, or None."""
        host = headers.get("host", "")
        if self.hosts is not None and re.sub(r":\d*$", "", host).strip("[]").lower() not in self.hosts:
            return 403, f"this service answers on {', '.join(self.hosts)} alone"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("//")[2].lower() != host.lower():
            return 403, "a page of another host may not ask here"
        if self.login and scope["path"] != "/health" and not self.knows(headers.get("authorization", "")):
            return 401, "give user and password", (b"www-authenticate", b'Basic realm="miniCADx", charset="UTF-8"')
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            return 413, f"more than {most / 1e6:g} MB"
        if page and sum(stat.st_size for _, stat in files_in(self.folder)) > self.room:
            return 503, "too many pictures are kept already; try again in some minutes", (b"retry-after", b"60")
        return None

    def knows(self, authorization):
        kind, _, word = authorization.partition(" ")
        try:
            given = base64.b64decode(word)
        except ValueError:
            given = b""
        return kind.lower() == "basic" and hmac.compare_digest(given, self.login.encode())

    async def pass_on(self, scope, receive, send, most):
        """Let the application answer, who reads no more than `most` bytes, in no more than self.seconds."""
        got, whole, refusal, began = 0, scope["method"] in ("GET", "HEAD"), None, False
        until = time.monotonic() + self.seconds

        async def limited():
            nonlocal got, whole, refusal
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
            except asyncio.TimeoutError:
                refusal = 408, f"the request took longer than {self.seconds:g} s to arrive"
                return {"type": "http.disconnect"}
            count = len(message.get("body", b""))
            whole = not message.get("more_body", False)
            got, self.held = got + count, self.held + count
            if got > most:
                refusal = 413, f"more than {most / 1e6:g} MB"
            elif self.held > self.room:
                refusal = 503, "too much is being sent at once; try again in a moment", (b"retry-after", b"1")
            return {"type": "http.disconnect"} if refusal else message

        async def answer(message):
            nonlocal began
            if refusal and not began:
                began = True
                return await say(send, *refusal)
            if refusal:
                return
            if message["type"] == "http.response.start":
                began = True
                head = [(k, v) for k, v in message["headers"] if k.lower() != b"content-security-policy"]
                head += [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                head += [(b"referrer-policy", b"same-origin")]
                if "/assets/" not in scope["path"]:
                    head = [
                        *((k, v) for k, v in head if k.lower() != b"cache-control"),
                        (b"cache-control", b"no-store"),
                    ]
                message = message | {"headers": head}
            await send(message)

        try:
            await self.app(scope, limited, answer)
        except Exception:
            if not refusal:
                raise
        finally:
            self.held -= got
        if refusal and not began:
            await say(send, *refusal)


# ---------------------------------------------------------------------------------------------------------------------
# What is told of the model


@functools.cache
def file_hash(path):
    """Which model it was: the first 16 letters of its file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def describe_model(detector):
    """The model's card, as JSON: what it is, what it was trained on, how good it is on images that it never saw (its
    run's report.json, None where it has none; of several runs, folds, those of each on the images that it never saw), which
    map to trust."""
    info, file = detector.info, Path(detector.path).resolve().with_name("report.json")
    report = {}
    if file.is_file():
        with parts_of(file, "move it away, and the model is served without its figures"):
            report = json.loads(file.read_text())
            report = {"images": report["data"]["images"], **{k: report.get(k) for k in ("splits", "test", "runs")}}
    told = {
        k: info[k]
        for k in ("classes", "threshold", "temperature", "lesion_threshold", "views", "size", "channels", "window")
    }
    members = [{k: m.config[k] for k in ("model", "roi")} for m in detector.model.members]
    method, note = recommended_method(detector.path)
    patients = [{k: s[k] for k in ("column", "levels", "mean", "sd") if k in s} for s in info["meta_spec"]]
    trained = {"data": Path(str(info["made"].get("data"))).name}  # where it lay is nobody's business
    trained |= {"placeholder_boxes": bool(info["made"].get("placeholder_boxes"))}
    trained |= {k: report.get(k) for k in ("images", "splits")}
    found = any((detector.model.finders, detector.model.tells_outlines))
    return {
        "model": file.parent.name, "hash": file_hash(detector.path), "members": members, **told, "finds_lesions": found,
        "patient_data": patients, "trained_on": trained, "test": report.get("test"), "runs": len(report.get("runs") or [0]),
        "methods": list(METHODS), "recommended_method": method, "note": note, "use": DISCLAIMER,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# REST


def is_unreadable(answer):
    """Whether it is the picture's fault that there is no answer; the model's own faults come with a reason."""
    return answer["error"] is not None and answer["reason"] is None


def explained(detector, path, look, method, target, meta, form):
    """The bytes of a picture's map: the page of explain.py as PNG, or the map itself as a .npy, float32 (h, w); of a clip
    that of its best frame."""
    answer = look_at_clip(detector, look, path, meta)[0] if is_clip(path) else look.of(detector).predict(path, meta)
    if answer["error"] is not None:
        raise NoPicture(answer["error"]) if is_unreadable(answer) else RuntimeError(answer["error"])
    method, note = (method, "") if method else recommended_method(detector.path)
    out, shown, frame = io.BytesIO(), target or answer["prediction"], answer["frame"] or 1
    picture = read_image(path, detector.info["channels"], detector.window, frame)
    if form == "npy":
        shown = detector.info["classes"].index(shown)
        np.save(out, explain_picture(detector.model, picture, method, shown, meta)[0].astype(np.float32))
    else:
        shown = None if method in CLASSLESS else shown
        draw(detector.model, picture, Path(path).name, [method], meta, shown, note, frame).save(out, "PNG")
    return out.getvalue()


def check_target(target, method, detector):
    known = detector.info["classes"]
    if target is not None and target not in known:
        raise InputError(f"target {one_line(target)!r}: the model knows {', '.join(known)}")
    if target is not None and (method or recommended_method(detector.path)[0]) in CLASSLESS:
        raise InputError(f"target: the map of {method} has no class, it shows what the score is sensitive to")


def read_look(tta, scales, threshold, detector):
    """The Look that form fields ask for. InputError for what can't be."""
    try:
        scales = tuple(float(s) for s in re.split(r"[\s,]+", scales.strip()))
    except ValueError:
        raise InputError(f"scales {one_line(scales)!r}: give numbers, as in 1,1.25") from None
    if len(scales) > 8:
        raise InputError(f"scales: {len(scales)} of them; give 8 or fewer")
    look = Look(tta, scales, threshold)
    look.of(detector)
    return look


def error_handlers(app):
    """Every error is one line of JSON with the code that says whose fault it is."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    codes = {NoPicture: 415, Full: 503, InputError: 422}

    async def known(request, e):
        code = next(code for kind, code in codes.items() if isinstance(e, kind))
        return JSONResponse({"error": str(e).removeprefix("--")}, code, {"Retry-After": "1"} if code == 503 else None)

    async def wrong(request, e):
        told = (f"{'.'.join(map(str, one['loc'][1:])) or 'the request'}: {one['msg']}" for one in e.errors())
        return JSONResponse({"error": one_line("; ".join(told))}, 422)

    async def http(request, e):
        return JSONResponse({"error": str(e.detail)}, e.status_code, e.headers)

    async def bug(request, e):
        return JSONResponse({"error": "a fault of this program, or its model is damaged; its log says more"}, 500)

    for kind, handler in (
        (InputError, known),
        (RequestValidationError, wrong),
        (HTTPException, http),
        (Exception, bug),
    ):
        app.add_exception_handler(kind, handler)


def build_service(worker, folder):
    """The FastAPI application, see the top of the file. Its routes: /v1/predict, /v1/explain, /v1/model, /health, /docs."""
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse

    app = FastAPI(title="miniCADx", version="1", description=DISCLAIMER, docs_url=None, redoc_url=None)
    error_handlers(app)
    picture_routes(app, worker, folder)

    @app.get("/v1/model", summary="What the model is, what it was trained on, how good it is, what it is not for")
    async def model():
        return describe_model(worker.detector)

    @app.get("/health", summary="Whether the service answers, and how many requests wait")
    async def health():
        return {"status": "ok", "waiting": len(worker.waiting)}

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs():
        return docs_page(app.openapi())

    return app


@contextlib.asynccontextmanager
async def kept(uploads, folder):
    """The uploads as paths of files, as long as the context lasts."""
    paths = []
    try:
        for upload in uploads:
            paths.append(await asyncio.to_thread(keep_upload, upload, folder))
        yield [str(p) for p in paths]
    finally:
        for path in paths:
            shutil.rmtree(path.parent, ignore_errors=True)


def picture_routes(app, worker, folder):
    """/v1/predict and /v1/explain."""
    from fastapi import File, Form, UploadFile
    from fastapi.responses import Response

    detector, patient = worker.detector, "patient data, as in age=55,sex=female"
    views = "views of a picture, 1 to 8; default: as many as the model was calibrated for"
    above = "of two classes: from where on the positive is said; default: the model's own"
    Threshold = Annotated[float | None, Form(gt=0, lt=1, description=above)]
    Method = Annotated[Literal[(*METHODS,)] | None, Form(description="default: what is recommended for the model")]
    Target = Annotated[str | None, Form(description="the class whose evidence is shown; default: the predicted")]
    Kind = Annotated[Literal["png", "npy"], Form(description="png: a page to look at; npy: the raw map")]

    @app.post("/v1/predict", summary="The answers to one or several pictures: a list of what infer.py --json prints")
    async def predict(
        files: Annotated[list[UploadFile], File(description="pictures, or clips")],
        tta: Annotated[int | None, Form(description=views)] = None,
        scales: Annotated[str, Form(description="resolutions of each view, as in 1,1.25")] = "1",
        threshold: Threshold = None,
        meta: Annotated[list[str], Form(description=f"{patient}: once for all, or one for each file")] = (),
    ):
        look, metas = read_look(tta, scales, threshold, detector), [parse_meta(m) for m in meta]
        if len(metas) not in (0, 1, len(files)):
            raise InputError(f"meta: {len(metas)} patients for {len(files)} files; give one, or one for each")
        async with kept(files, folder) as paths:
            metas = metas * len(paths) if len(metas) == 1 else metas or None
            jobs = await asyncio.to_thread(ask_files, worker, paths, look, metas)
            answers = in_order(jobs, [await asyncio.wrap_future(job) for _, job in jobs])
        if all(map(is_unreadable, answers)):
            raise NoPicture("; ".join(f"{Path(a['image']).name}: {a['error']}" for a in answers))
        return [a | {"image": Path(a["image"]).name} for a in answers]

    @app.post("/v1/explain", summary="Why: the picture beside its map (PNG), or the map itself (npy: float32, h x w)")
    async def explain(
        file: Annotated[UploadFile, File(description="a picture, or a clip")],
        method: Method = None,
        target: Target = None,
        format: Kind = "png",
        threshold: Threshold = None,
        meta: Annotated[str, Form(description=patient)] = "",
    ):
        look = read_look(None, "1", threshold, detector)
        check_target(target, method, detector)
        async with kept([file], folder) as (path,):
            job = worker.run(explained, detector, path, look, method, target, parse_meta(meta), format)
            content = await asyncio.wrap_future(job)
        return Response(content, media_type="image/png" if format == "png" else "application/octet-stream")


def docs_page(schema):
    """The OpenAPI description as a page with a form a route, which needs no script from elsewhere."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            content = told.get("requestBody", {}).get("content", {})
            fields = []
            for kind in content.values():
                body = schema["components"]["schemas"][kind["schema"]["$ref"].rpartition("/")[2]]
                for name, field in body["properties"].items():
                    fields.append(docs_field(name, field, name in body.get("required", [])))
            form = f'action="{path}" method="{method}" enctype="{next(iter(content), "")}" target="_blank"'
            told = html.escape(told["summary"])
            parts.append(
                f"<h2>{method.upper()} {path}</h2><p>{told}</p><form {form}>{''.join(fields)}<button>Send</button></form>"
            )
    codes = "408 too slow, 413 too large, 415 no picture, 422 a wrong option, 503 too much waits, 500 a fault of ours"
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    )
    style += "label{display:block;margin:.6em 0}small{opacity:.75}input,select{font:inherit;max-width:100%}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>miniCADx: the service</title><style>{style}</style><h1>miniCADx: the service</h1><p>{DISCLAIMER}</p>"
        f'<p>As OpenAPI: <a href="/openapi.json">/openapi.json</a>. An error is {{"error": "..."}}: {codes}.</p>{"".join(parts)}'
    )


def docs_field(name, field, required):
    kinds = [field, *field.get("anyOf", [])]
    choices = next((k["enum"] for k in kinds if "enum" in k), None)
    told = f"<small>{html.escape(field.get('description', ''))}</small>"
    needed = " required" if required else ""
    if choices:
        options = "".join(f"<option>{c}</option>" for c in ([] if "default" in field else [""]) + choices)
        return f'<label><b>{name}</b> <select name="{name}">{options}</select> {told}</label>'
    if "file" in name:
        many = " multiple" if field.get("type") == "array" else ""
        return f'<label><b>{name}</b> <input type="file" name="{name}"{many}{needed}> {told}</label>'
    return f'<label><b>{name}</b> <input name="{name}" value="{html.escape(str(field.get("default") or ""))}"> {told}</label>'


# ---------------------------------------------------------------------------------------------------------------------
# The server


def serve(app, listener, seconds):
    """Answer on a listening socket until SIGINT or SIGTERM. seconds: that a request's head may take to arrive."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Hasty(H11Protocol):
        """Hangs up on who sends no whole request: uvicorn by itself would wait forever."""

        def connection_made(self, transport):
            super().connection_made(transport)
            self.loop.call_later(seconds, self.hang_up, None)

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:  # a part of a head alone
                self.loop.call_later(seconds, self.hang_up, self.cycle)

        def hang_up(self, cycle):
            if self.cycle is cycle:  # no request has begun since
                self.transport.close()

    config = uvicorn.Config(
        app, http=Hasty, ws="none", log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=900, timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
