"""What a model says of an image set, and what is chosen by that: votes, temperature, thresholds; folds made one model.

    answer = look_at(model, images, images.rows("test"))    # models.Answer of the rows, on the CPU
    calibrate(model, predict(model, images, rows), images.labels[rows], args)     # from validation alone
    results = cross_fit(images, results, args)              # of folds: each judged by what the others say
    model = pool_folds(images, parts, results, args)        # all folds' members as one Ensemble

On a dozen cancers of one validation split a threshold is a matter of luck. The folds of a cross-validation have answered
for every labelled image without having learnt from it: these answers set the threshold of the ensemble of all folds."""

import copy
import math

import torch
import torch.nn.functional as F

import metrics
import models
from data import fit_meta, meta_for
from devices import shared

EVAL_BATCH = 64  # images a step when nothing is learnt


@torch.no_grad()
def look_at(model, images, rows, boxes=None, batch=EVAL_BATCH, views=None, scales=(1.0,), keep=False):
    """The models.Answer of the images in `rows`, on the CPU. boxes (all images, 4): what the crops are made around; None:
    what is found. views, scales and keep: see Ensemble.look."""
    patients = meta_for(images, model.info["meta_spec"])

    def look(rows):
        parts = []
        for index in rows.cpu().split(batch):
            x = images.pixels[index.to(images.pixels.device)].to(model.device)
            meta, around = (None if v is None else v[index].to(model.device) for v in (patients, boxes))
            parts.append(model.look(x, around, meta, views, scales, keep))
        return join(parts)

    parts = shared(look, rows)
    answer = parts[0] if len(parts) == 1 else join(parts)
    models.finite(answer.opinions)
    return answer


def join(parts):
    """The models.Answer of all images, on the CPU, from those of some, in order."""
    opinions = torch.cat([p.opinions for p in parts], 2).cpu()
    boxes = None if parts[0].boxes is None else torch.cat([p.boxes for p in parts]).cpu()
    found = parts[0].found and models.Found(*(torch.cat(v).cpu() for v in zip(*(p.found for p in parts), strict=True)))
    kept = [torch.cat(column) for column in zip(*(p.traits for p in parts), strict=True)]
    embeddings = None
    if parts[0].embeddings is not None:
        embeddings = [torch.cat(some, 1) for some in zip(*(p.embeddings for p in parts), strict=True)]
    return models.Answer(opinions, boxes, found, kept, embeddings)


def predict(model, images, rows, boxes=None, batch=EVAL_BATCH):
    """Members' probabilities (M, N, K) of the images in `rows`, the mean over as many views as info says."""
    return look_at(model, images, rows, boxes, batch).opinions.mean(1)


@torch.no_grad()
def locate(model, images, rows, batch=EVAL_BATCH):
    """The boxes (N, 4) of the images in `rows` that the model goes by, on the CPU, or None; see Ensemble.locate."""

    def find(rows):
        found = []
        for index in rows.cpu().split(batch):
            x = images.pixels[index.to(images.pixels.device)].to(model.device)
            found.append(model.locate(x, images.boxes[index].to(model.device)))
        return None if found[0] is None else torch.cat(found).cpu()

    found = shared(find, rows)
    found = None if found[0] is None else torch.cat(found)
    return models.finite(found) if model.finders else found


def judge_found(found, images, rows):
    """What is kept of what D-Net Found: boxes (N, 4), scores (N,), and Dice (N,) of the outline with the lesion's mask,
    NaN where there is none."""
    dice = torch.full((len(rows),), math.nan)
    for k in range(0, len(rows) if images.masks is not None else 0, EVAL_BATCH):
        part = slice(k, k + EVAL_BATCH)
        true = images.masks[rows[part]]
        said = F.interpolate(found.outlines[part, None], size=true.shape[-2:], mode="bilinear")[:, 0] >= 0.5
        both, sizes = (true & said).sum((1, 2)), true.sum((1, 2)) + said.sum((1, 2))
        dice[part] = torch.where(true.any(2).any(1), 2 * both / sizes.clamp(min=1), math.nan)
    return {"boxes": found.boxes(), "scores": found.scores(), "dice": dice}


def member_weights(probabilities, labels, steps=20):
    """Votes (M,) of the members, from validation: a few steps of EM for the mixture's likelihood (Dempster et al.
    1977), from equal votes. Few, as a small validation split can't tell good members apart, and then equal is best."""
    own = probabilities[:, torch.arange(len(labels)), labels].double().clamp(min=1e-30)  # 0 from all would be 0 / 0
    votes = torch.full((len(own),), 1 / len(own), dtype=torch.double)
    for _ in range(steps):
        share = votes[:, None] * own
        votes = (share / share.sum(0)).mean(1)
    return votes.tolist()


def calibrate(model, probabilities, labels, args):
    """Set votes, temperature and threshold of the model from validation alone. probabilities (M, N, K)."""
    model.weights = torch.tensor(member_weights(probabilities, labels), dtype=torch.float32)
    set_threshold(model, probabilities, labels, args)


def set_threshold(model, probabilities, labels, args):
    """Temperature and threshold of a model from its members' answers (M, N, K) to images of these labels."""
    model.info["temperature"] = 1.0
    model.info["temperature"] = metrics.fit_temperature(model.combine(probabilities), labels)
    if len(model.info["classes"]) == 2:
        model.info["threshold"] = choose_threshold(model.combine(probabilities)[:, 1], labels, args)


def choose_threshold(scores, labels, args):
    """As --threshold-by says: the largest that reaches --target-sensitivity, or that of the best balanced accuracy."""
    if args.threshold_by == "balance":
        return metrics.threshold_for_balance(scores, labels)
    return metrics.threshold_for_sensitivity(scores, labels, args.target_sensitivity)


def opinion(model, on_test, on_val, labels):
    """What a calibrated model says on test (M, N, K), with what it was judged by on validation."""
    return {
        "probabilities": model.combine(on_test),
        "threshold": model.info["threshold"] if len(model.info["classes"]) == 2 else None,
        "val_auc": float(metrics.evaluate(model.combine(on_val), labels)["auc"]),
    }


NO_LESION = 0.25  # the lesion threshold where no image is without a lesion: a cell has to be that sure


def lesion_threshold(scores, images, rows, args):
    """Above what score (N,) a lesion is said to be found, see choose_threshold."""
    told = images.outlined[rows]
    there = images.boxes[rows, 0].isfinite()[told].long()
    if scores is None or there.all() or not there.any():
        return NO_LESION
    return choose_threshold(scores[told], there, args)


# ---------------------------------------------------------------------------------------------------------------------
# Folds: judged by each other, and made one


def out_of_fold(results):
    """The answers (N, K) of all folds, each for the images that it has not learnt from, and their rows (N,). As the votes
    of its own members say, before any temperature."""
    answers = [models.Ensemble([], r["weights"]).combine(r["opinions"]) for r in results]
    return torch.cat(answers), torch.cat([r["rows"] for r in results])


def cross_fit(images, results, args):
    """The results of all folds, see fit_by_others, seed by seed; of a run without folds as they are."""
    if args.folds == 1 or "opinions" not in results[0]:  # of a D-Net alone, or of an older version
        return results
    chunks = [results[k : k + args.folds] for k in range(0, len(results), args.folds)]
    return [judged for chunk in chunks for judged in fit_by_others(images, chunk, args)]


def fit_by_others(images, results, args):
    """The results of the folds of one cross-validation, with temperature and threshold of each from the out-of-fold
    answers of the others, for the whole and for each member: what the pooled threshold of pool_folds is worth."""
    fitted = []
    for i, result in enumerate(results):
        others = results[:i] + results[i + 1 :]
        judged = judge_by(images, [result], others, args)
        if not math.isfinite(judged["threshold"] or 0.0):
            return results  # the others lack a class
        members = []
        for k, member in enumerate(result["members"]):
            alone = [r | {"opinions": r["opinions"][k, None], "weights": [1.0]} for r in (result, *others)]
            members.append(member | judge_by(images, alone[:1], alone[1:], args))
        fitted.append(result | judged | {"members": members})
    return fitted


def judge_by(images, own, others, args):
    """{"probabilities", "temperature", "threshold", and "lesion_threshold" where a D-Net was trained} of the answers of
    `own`, as the answers of `others` set them."""
    answers, rows = out_of_fold(others)
    judge = models.Ensemble([], [1.0], classes=images.classes)
    set_threshold(judge, answers[None], images.labels[rows], args)
    probabilities = judge.combine(out_of_fold(own)[0][None])
    threshold = judge.info["threshold"] if len(images.classes) == 2 else None
    judged = {"probabilities": probabilities, "temperature": judge.info["temperature"], "threshold": threshold}
    return judged | judge_lesions(images, others, args)


def judge_lesions(images, results, args):
    """{"lesion_threshold"} by the scores of all folds that have trained a D-Net; {} where none has."""
    found = [r for r in results if "scores" in r]
    if not found:
        return {}
    scores, rows = (torch.cat([r[key] for r in found]) for key in ("scores", "rows"))
    return {"lesion_threshold": lesion_threshold(scores, images, rows, args)}


def pool_folds(images, parts, results, args):
    """One Ensemble of all members of the folds' models `parts`: each fold has one vote, divided as its own validation
    says; temperature and thresholds come from the out-of-fold answers of all labelled images. What it reaches can only be
    measured on other images, as there are none here that it has not learnt from."""
    rows = torch.cat([r["rows"] for r in results])
    spec = fit_meta(images, rows)
    members = [rescale_patients(m, part.info["meta_spec"], spec) for part in parts for m in part.members]
    weights = torch.cat([part.weights / part.weights.sum() for part in parts]) / len(parts)
    info = parts[0].info | {"meta_spec": spec, "familiar": pool_familiar(parts)}
    model = models.Ensemble(members, weights.tolist(), [d for part in parts for d in part.dnets], **info)
    judged = judge_by(images, results, results, args) if members else judge_lesions(images, results, args)
    set_here = ("temperature", "threshold", "lesion_threshold")
    model.info |= {key: judged[key] for key in set_here if judged.get(key) is not None}
    nothing = torch.zeros(0, dtype=torch.long)
    own = images.pictures()[rows]
    earlier = torch.cat([nothing, *(part.info["seen"]["train"] for part in parts if "seen" in part.info)]).unique()
    own = torch.cat([own, earlier[~torch.isin(earlier, own)]])  # of a model that they began with
    model.info["seen"] = {"train": own, "val": nothing, "test": nothing}
    return model


def pool_familiar(parts):
    """What is familiar to all folds: a picture's squared distance is the mean of theirs. None where one does not tell."""
    known = [part.info.get("familiar") for part in parts]
    if not all(known):
        return None
    members = [one | {"variances": one["variances"] * len(parts)} for fold in known for one in fold[:-1]]
    return [*members, known[0][-1]]  # the texture is the pictures' own: about the same in every fold


def rescale_patients(member, own, spec):
    """A C-Net that read numbers of patients on a scale of its `own`, as one that reads them on that of another spec:
    x -> (s x + m - m') / s' goes into the first layer, for those who are not missing."""
    member, k = copy.deepcopy(member), 0
    for old, new in zip(own, spec, strict=True):
        if "mean" in old:
            layer, slope, shift = member.meta[0], new["sd"] / old["sd"], (new["mean"] - old["mean"]) / old["sd"]
            with torch.no_grad():
                layer.bias += layer.weight[:, k] * shift
                layer.weight[:, k + 1] -= layer.weight[:, k] * shift  # the column that says "missing"
                layer.weight[:, k] *= slope
        k += 1 + len(old.get("levels", " "))
    return member
