"""Which way of adapting an encoder to a corpus pays where people search? A study of single ideas, in plain PyTorch.

It decided what was built: all-MiniLM-L6-v2, six judged collections, a few minutes of one GPU. Each idea trains for 100
steps unless it says otherwise; test nDCG@10 is compared with the untouched model's. Nothing of hncse_ray is used, so
that an idea takes a line here; ``adaptation.py`` measures what was built of them.

    python benchmarks/adaptation_study.py run --model MODEL --data DOMAINS --out FILE --ideas title+cloze list@0,1,2
    python benchmarks/adaptation_study.py teachers --model MODEL --data DOMAINS
    python benchmarks/adaptation_study.py table FILE... --out result.json --picture label_free.svg

Words: an anchor asks (a title, a sentence of a document, keywords, a crop, or the document itself), its document
answers. A teacher scores an anchor with a document by the cosine under the untouched model, plus ``weight`` times BM25
over the best BM25 of the anchor. ``smooth`` moves each document's vector towards the mean of its ten nearest;
``feedback`` adds BM25 asked by the words of the three documents that are best so far (Lavrenko and Croft 2001 is the
idea's source), the anchor's own left out. The lists of ``list`` are the documents of the batch and three further ones
an anchor, from ranks 1-5, 6-30 and 31-200 of the teacher. ``own`` says whether the anchor's own document is in its
list: then BM25 knows it by the anchor's own words.

Scores without labels are written beside: ``cloze``, ``keywords`` and ``title`` ask documents that training did not see
for themselves (MRR); ``follows ...`` is the nDCG@10 of their sentences, or of their keywords, where the ten best of a
fixed ranking, the own document left out, count as right.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from adaptation_teachers import Collection, Model, Teacher, ndcg, without
from hardware import provenance
from scipy.stats import spearmanr
from torch import Tensor

COLLECTIONS = ("cran", "cisi", "med", "cacm", "npl", "lisa")
EVERY = {"title": 1, "cloze": 2, "keywords": 1}
PSEUDO = "follows best, gaps"  # what hncse_ray scores by: its suite pseudo-relevance
ASKING = {"title": 1, "cloze": 2}
LIST: dict[str, Any] = {"batch": 32, "bands": 3, "contrast": 0.0, "weight": 0.3}
BEST: dict[str, Any] = {**LIST, "smooth": 0.5, "feedback": 0.3}
IDEAS: dict[str, dict[str, Any]] = {
    "simcse": {"views": {"document": 1}},
    "title": {"views": {"title": 1}},
    "crop": {"views": {"crop": 1}},
    "cloze": {"views": {"cloze": 1}},
    "keywords": {"views": {"keywords": 1}},
    "title+cloze": {"views": ASKING},
    "all": {"views": EVERY},
    "cloze, agreement": {"views": {"cloze": 1}, "agreement": 10},
    "cloze, mask": {"views": {"cloze": 1}, "mask": 0.6},
    "cloze, walk": {"views": {"cloze": 1}, "walk": True},
    "cloze, hard": {"views": {"cloze": 1}, "hard": 1},
    "list, own, all": {"views": EVERY, "own": True, **LIST},
    "list, own, all, 300 steps": {"views": EVERY, "own": True, "steps": 300, **LIST},
    "margins, own, all": {"views": EVERY, "own": True, "margins": True, **LIST},
    "margins, own": {"views": ASKING, "own": True, "margins": True, **LIST},
    "margins, own, strong": {
        "views": ASKING, "own": True, "margins": True, **LIST, "weight": 0.5, "lr": 5e-5, "steps": 150,
    },
    "list": {"views": ASKING, **LIST},
    "margins": {"views": ASKING, "margins": True, **LIST},
    "list, contrast": {"views": ASKING, **LIST, "contrast": 0.5, "mask": 0.6},
    "list, ranks": {"views": ASKING, **LIST, "ranks": True},
    "list, smooth": {"views": ASKING, **LIST, "smooth": 0.5},
    "list, feedback": {"views": ASKING, **LIST, "feedback": 0.3},
    "best": {"views": ASKING, **BEST},
    "best, 300 steps": {"views": ASKING, **BEST, "steps": 300},
    "best, 300 steps, 5e-5": {"views": ASKING, **BEST, "steps": 300, "lr": 5e-5},
    "best, 5e-5": {"views": ASKING, **BEST, "lr": 5e-5},
    "best, batch 64": {"views": ASKING, **BEST, "batch": 64},
    "best, 9 a list": {"views": ASKING, **BEST, "bands": 9},
    "best, keywords": {"views": EVERY, **BEST},
    "best, walk": {"views": ASKING, **BEST, "walk": True},
    "best, margins": {"views": ASKING, **BEST, "margins": True},
    "best, sharp": {"views": ASKING, **BEST, "temperature": 0.02},
    "best, soft": {"views": ASKING, **BEST, "temperature": 0.1},
    "best, contrast": {"views": ASKING, **BEST, "contrast": 0.5, "mask": 0.6},
    "best, bm25 0.5": {"views": ASKING, **BEST, "weight": 0.5},
}  # fmt: skip


def ask(c: Collection, i: int, kinds: dict[str, float], rng: random.Random) -> tuple[str, str]:
    """An anchor and what it belongs to; the document twice where it does not do for the kind."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    found, whole = c.sentences[i], c.texts[i]
    if kind == "title" and c.titles[i] and c.bodies[i]:
        return c.titles[i], c.bodies[i]
    if kind == "cloze" and len(found) >= 2:
        at = rng.randrange(len(found))
        rest = " ".join(s for k, s in enumerate(found) if k != at or rng.random() < 0.1)
        return found[at], f"{c.titles[i]}. {rest}" if c.titles[i] else rest
    if kind == "keywords" and c.words[i]:
        known = list(dict.fromkeys(c.words[i]))
        order = sorted(range(len(known)), key=lambda j: rng.gauss(0, 1) - c.rarity[c.number[known[j]]])
        return " ".join(known[j] for j in sorted(order[: rng.randint(4, 10)])), whole
    if kind == "crop" and len(whole.split()) >= 16:
        parts = whole.split()
        size = [max(8, int(len(parts) * rng.uniform(0.1, 0.5))) for _ in range(2)]
        start = [rng.randrange(len(parts) - n + 1) for n in size]
        first, second = (" ".join(parts[a : a + n]) for a, n in zip(start, size, strict=True))
        return first, second
    return whole, whole


def draw(
    c: Collection, size: int, idea: dict[str, Any], base_ND: Tensor, order: list[int], rng: random.Random
) -> list[int]:
    """The rows of a batch: at random, or a walk to the best of a random thousand that restarts one time in ten."""
    if not idea.get("walk"):
        if len(order) < size:
            order[:] = rng.sample(c.trained, len(c.trained))
        return [order.pop() for _ in range(size)]
    found: list[int] = []
    here = rng.choice(c.trained)
    while len(found) < size:
        if here not in found:
            found.append(here)
        others = [i for i in rng.sample(c.trained, min(1000, len(c.trained) // 2)) if i not in found]
        best = int((base_ND[others] @ base_ND[here]).argmax())
        here = rng.choice(c.trained) if rng.random() < 0.1 else others[best]
    return found


def train(c: Collection, path: str, base: Model, base_ND: Tensor, idea: dict[str, Any], seed: int) -> tuple[Model, Any]:
    """Train a copy of the base by an idea."""
    torch.manual_seed(seed)
    rng, model, order = random.Random(seed), Model(path), list[int]()
    model.rows = base.rows
    teacher = Teacher(c, base, base_ND, idea) if "bands" in idea else None
    model.net.train()
    steps, size = idea.get("steps", 100), idea.get("batch", 64)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=idea.get("lr", 2e-5), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 10) * (1 - s / steps))
    losses, eye = [], torch.arange(size, device=model.device)
    for _ in range(steps):
        ids = draw(c, size, idea, base_ND, order, rng)
        pairs = [ask(c, i, idea["views"], rng) for i in ids]
        own = torch.tensor(ids, device=model.device)
        if "agreement" in idea:  # a pair is kept if the base finds the document among the nearest of the anchor
            near_BN = base.encode([anchor for anchor, _ in pairs]) @ base_ND.T
            rank = (near_BN > near_BN[eye, own][:, None]).sum(1).tolist()
            pairs = [
                p if r < idea["agreement"] else (c.texts[i],) * 2 for p, r, i in zip(pairs, rank, ids, strict=True)
            ]
        anchors, targets = [a for a, _ in pairs], [t for _, t in pairs]
        columns, teacher_BC = list(ids), None
        if teacher:
            columns, teacher_BC = teach(teacher, anchors, ids, rng)
            targets += [c.texts[i] for i in columns[size:]]
        z_BD, z_CD = model.embed(anchors, 160), model.embed(targets, 160)
        student_BC = z_BD @ z_CD.T
        loss = torch.zeros((), device=model.device)
        if idea.get("contrast", 1.0):
            logits = student_BC / 0.05
            if "mask" in idea:
                near = base_ND[own] @ base_ND[columns].T > idea["mask"]
                near[eye, eye] = False
                logits = logits.masked_fill(near, -1e4)
            if "hard" in idea:  # the nearest below 0.7, as the base has it
                score_BN = base_ND[own] @ base_ND.T
                score_BN = score_BN.masked_fill(score_BN > 0.7, -1)
                negatives_BD = base_ND[score_BN.argmax(1)]
                logits = torch.cat([logits, (z_BD * negatives_BD).sum(1, keepdim=True) / 0.05], 1)
            loss = loss + idea.get("contrast", 1.0) * F.cross_entropy(logits, eye)
        if teacher_BC is not None:
            loss = loss + imitate(student_BC, teacher_BC, eye, idea)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return model, {"loss at first": float(np.mean(losses[:10])), "loss at last": float(np.mean(losses[-10:]))}


def teach(teacher: Teacher, anchors: list[str], ids: list[int], rng: random.Random) -> tuple[list[int], Tensor]:
    """The columns, those of the batch first, and the teacher's scores with them."""
    own = None if teacher.idea.get("own") else torch.tensor(ids, device=teacher.base.device)
    teacher_BN = teacher(anchors, own)
    best = teacher_BN.topk(min(200, teacher_BN.shape[1])).indices.tolist()
    each = teacher.idea["bands"] // 3
    further = [row[rng.randrange(a, min(b, len(row)))] for row in best for a, b in ((0, 5), (5, 30), (30, 200)) * each]
    columns = [*ids, *(i for i in dict.fromkeys(further) if i not in ids)]
    return columns, teacher_BN[:, columns]


def imitate(student_BC: Tensor, teacher_BC: Tensor, eye: Tensor, idea: dict[str, Any]) -> Tensor:
    """The divergence of the softmax of both, or the squared difference of their margins."""
    own, margins, temperature = idea.get("own", False), idea.get("margins"), idea.get("temperature", 0.05)
    kept = torch.ones_like(student_BC, dtype=torch.bool)
    if not own:
        kept[eye, eye] = False
    if margins:
        if own:
            difference = student_BC - student_BC[eye, eye][:, None] - teacher_BC + teacher_BC[eye, eye][:, None]
            return 20 * difference.pow(2).mean()
        count = kept.sum(1, keepdim=True)
        difference = (student_BC - teacher_BC) * kept
        difference = (difference - difference.sum(1, keepdim=True) / count) * kept
        return 20 * difference.pow(2).sum() / count.sum()
    wanted = (teacher_BC / temperature).masked_fill(~kept, -1e4).softmax(1)
    found = (student_BC / temperature).masked_fill(~kept, -1e4).log_softmax(1)
    return F.kl_div(found, wanted, reduction="batchmean")


class Scored:
    """Scores a model on the judged queries of a collection, and without labels."""

    def __init__(self, c: Collection, base: Model, base_ND: Tensor) -> None:
        self.c, self.held = c, torch.tensor(c.held, device=base.device)
        self.right = {}
        for name, idea in (("words", {"weight": 1000.0}), ("base and words", {"weight": 0.3}), ("best", BEST)):
            teacher = Teacher(c, base, base_ND, idea)
            for asked in ("gaps", "keywords"):
                best = teacher(getattr(c, asked), self.held).topk(10).indices.tolist()
                self.right[f"follows {name}, {asked}"] = asked, [dict.fromkeys(row, 1) for row in best]

    def __call__(self, model: Model, powers: tuple[float, ...]) -> dict[str, Any]:
        """What queries earn by nDCG@10, and the label-free scores, whitened by each power."""
        c = self.c
        titles, bodies = ([texts[i] for i in c.held if c.titles[i] and c.bodies[i]] for texts in (c.titles, c.bodies))
        titled = self.held[[bool(c.titles[i] and c.bodies[i]) for i in c.held]]
        asked = {"documents": c.texts, "gapped": c.gapped, "gaps": c.gaps, "keywords": c.keywords, **c.queries}
        plain = {name: model.encode(texts) for name, texts in asked.items()}
        if titles:
            plain |= {"title": model.encode(titles), "bodies": model.encode(bodies)}
        mean_D = plain["documents"].mean(0)
        variance_D, directions_DD = torch.linalg.eigh(torch.cov((plain["documents"] - mean_D).T.double()))
        found: dict[str, Any] = {}
        for power in powers:
            vectors = plain
            if power:
                scale_DD = ((directions_DD * variance_D.clamp(min=1e-9) ** -power) @ directions_DD.T).float()
                vectors = {name: F.normalize((x - mean_D) @ scale_DD, dim=-1) for name, x in plain.items()}
            documents_ND = vectors["documents"]
            row: dict[str, Any] = {}
            for split in ("dev", "test"):
                best = (vectors[split] @ documents_ND.T).topk(10).indices.tolist()
                row[split] = [round(ndcg(b, right), 4) for b, right in zip(best, c.right[split], strict=True)]
            row["cloze"] = own_rank(vectors["gaps"], documents_ND, self.held, vectors["gapped"])
            row["keywords"] = own_rank(vectors["keywords"], documents_ND, self.held)
            row["title"] = own_rank(vectors["title"], documents_ND, titled, vectors["bodies"]) if titles else None
            for name, (kind, right) in self.right.items():
                best = without(vectors[kind] @ documents_ND.T, self.held).topk(10).indices.tolist()
                row[name] = float(np.mean([ndcg(b, r) for b, r in zip(best, right, strict=True)]))
            found[f"{power:g}"] = row
        return found


def own_rank(asking_QD: Tensor, documents_ND: Tensor, own: Tensor, instead_QD: Tensor | None = None) -> float:
    """The mean reciprocal rank of the own documents, which may be replaced by other vectors."""
    searched_ND = documents_ND.clone()
    if instead_QD is not None:
        searched_ND[own] = instead_QD
    near_QN = asking_QD @ searched_ND.T
    rank_Q = (near_QN > near_QN.gather(1, own[:, None])).sum(1) + 1
    return float((1 / rank_Q).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Single ideas of adaptation.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train by ideas")
    run.add_argument("--ideas", nargs="+", default=list(IDEAS), help="in this order; IDEA@0,1,2 names seeds")
    run.add_argument("--out", type=Path, required=True, help="a file, one result a line; more are added to it")
    run.add_argument("--workers", type=int, default=1, help="processes")
    run.add_argument("--minutes", type=float, default=600, help="begin nothing after so long")
    run.add_argument("--steps", type=int, help="of every idea, instead of its own")
    teachers = commands.add_parser("teachers", help="rank the judged queries by the teachers, without training")
    for command in (run, teachers):
        command.add_argument("--model", required=True)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--collections", nargs="+", default=list(COLLECTIONS))
    table = commands.add_parser("table", help="print what results say")
    table.add_argument("files", type=Path, nargs="+")
    table.add_argument("--out", type=Path)
    table.add_argument("--picture", type=Path, help="SVG of the test gain over the label-free score, a point a row")
    args = parser.parse_args()
    if args.command == "table":
        tabulate(args.files, args.out, args.picture)
    elif args.command == "teachers":
        rank_by_teachers(args.model, args.data, args.collections)
    else:
        run_ideas(args)


def run_ideas(args: argparse.Namespace) -> None:
    """Train by each idea on each collection, several at a time."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    named = [name.partition("@") for name in ["base", *args.ideas]]
    wanted = [
        (c, i, int(seed)) for i, _, seeds in named for seed in (seeds or "0").split(",") for c in args.collections
    ]
    for task in [*wanted, *[None] * args.workers]:
        tasks.put(task)
    until = time.time() + 60 * args.minutes
    workers = [
        context.Process(target=work, args=(tasks, results, args.model, args.data, args.steps, args.workers, until))
        for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    left = len(workers)
    with args.out.open("a", encoding="utf-8") as file:
        while left:
            row = results.get()
            left -= row is None
            if row is not None:
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(
                    *row["task"],
                    f"{row['seconds']:.0f} s",
                    f"{np.mean(row['found']['1']['0']['test']):.4f}",
                    flush=True,
                )


def work(tasks: Any, results: Any, path: str, data: Path, steps: int | None, workers: int, until: float) -> None:
    """Take tasks until there are none."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    known: dict[str, tuple[Collection, Model, Tensor, Scored]] = {}
    while (task := tasks.get()) is not None and time.time() < until:
        name, idea, seed = task
        if name not in known:
            c, base = Collection(data / name), Model(path)
            base_ND = base.encode(c.texts)
            known[name] = c, base, base_ND, Scored(c, base, base_ND)
        c, base, base_ND, score = known[name]
        started = time.perf_counter()
        if idea == "base":
            found: dict[str, Any] = {"1": score(base, (0.0, 0.0625, 0.125, 0.25))}
        else:
            model, told = train(c, path, base, base_ND, IDEAS[idea] | ({"steps": steps} if steps else {}), seed)
            found = {"train_seconds": time.perf_counter() - started, **told, "1": score(model, (0.0, 0.125))}
            with torch.no_grad():
                for own, untouched in zip(model.net.parameters(), base.net.parameters(), strict=True):
                    own.lerp_(untouched, 0.5)
            found["0.5"] = score(model, (0.0,))
        row = {"task": task, "seconds": time.perf_counter() - started, "found": found}
        results.put(row | provenance(torch.device(base.device)))
    results.put(None)


def rank_by_teachers(path: str, data: Path, collections: list[str]) -> None:
    """Print what teachers earn on the judged queries over the cosine alone."""
    both = {"weight": 0.3}
    kinds: dict[str, dict[str, Any]] = {
        "cosine": {},
        "bm25": {"weight": 1000.0},
        "both": both,
        "both, smooth": {**both, "smooth": 0.5},
        "both, feedback": {**both, "feedback": 0.3},
        "best": BEST,
        "ranks and bm25": {**both, "ranks": True},
    }
    changes: dict[str, dict[str, list[np.ndarray]]] = {}
    for name in collections:
        c, base = Collection(data / name), Model(path)
        base_ND = base.encode(c.texts)
        for kind, idea in kinds.items():
            teacher = Teacher(c, base, base_ND, idea)
            for split in ("dev", "test"):
                best = teacher(c.queries[split]).topk(10).indices.tolist()
                earned = np.array([ndcg(b, right) for b, right in zip(best, c.right[split], strict=True)])
                changes.setdefault(kind, {}).setdefault(split, []).append(earned)
    print(f"{'':16}", *collections, "mean (test), mean (dev)")
    for kind, earned in changes.items():
        test, dev = (
            [(a - b).mean() for a, b in zip(earned[split], changes["cosine"][split], strict=True)]
            for split in ("test", "dev")
        )
        print(f"{kind:16}", *(f"{x:+.3f}" for x in test), f"{np.mean(test):+.3f} {np.mean(dev):+.3f}")


def tabulate(files: list[Path], out: Path | None, picture: Path | None) -> None:
    """Print and write mean changes of test nDCG@10 against the base, and how label-free scores follow them."""
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    base = {row["task"][0]: row["found"]["1"]["0"] for row in rows if row["task"][1] == "base"}
    rng, table, points = np.random.default_rng(0), {}, []
    by: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        name, idea, _ = row["task"]
        for share in ("1", "0.5"):
            for power, found in row["found"].get(share, {}).items():
                if (idea, share, power) != ("base", "1", "0"):
                    by.setdefault(f"{idea} | {share}, {power}", {}).setdefault(name, []).append(found)
    for method, found in by.items():
        change = {
            split: {c: np.mean([r[split] for r in seeds], axis=0) - base[c][split] for c, seeds in found.items()}
            for split in ("test", "dev")
        }
        for c, seeds in found.items():
            point = {"collection": c, "method": method, "test": float(change["test"][c].mean())}
            point["labelled dev"] = float(change["dev"][c].mean())
            for name, value in base[c].items():
                if isinstance(value, float):
                    point[name] = float(np.mean([r[name] for r in seeds])) - value
            points.append(point)
        queries = np.concatenate(list(change["test"].values()))
        drawn = queries[rng.integers(0, len(queries), (5000, len(queries)))].mean(1)
        interval = (queries.mean(), *np.percentile(drawn, [2.5, 97.5]))
        row = {"seeds": max(len(seeds) for seeds in found.values())}
        for split, changed in change.items():
            row[f"{split}, collections"] = {c: round(float(v.mean()), 4) for c, v in changed.items()}
            row[f"{split}, mean"] = round(float(np.mean([v.mean() for v in changed.values()])), 4)
        table[method] = row | {"test, over all queries": [round(float(x), 4) for x in interval]}
    for name, row in table.items():
        each = " ".join(f"{c} {v:+.3f}" for c, v in row["test, collections"].items())
        means = f"mean {row['test, mean']:+.3f} dev {row['dev, mean']:+.3f}"
        print(f"{name:34} {each} | {means}", row["test, over all queries"])
    names = [name for name in points[0] if name not in ("collection", "method", "test")]
    follows = {}
    for name in names:
        both = [(p[name], p["test"], p["labelled dev"]) for p in points if p.get(name) is not None]
        score, test, dev = zip(*both, strict=True)
        with_test, with_dev = (float(spearmanr(score, labelled).statistic) for labelled in (test, dev))
        follows[name] = {"test": with_test, "labelled dev": with_dev, "points": len(both)}
        print(f"{name:34} Spearman with test {with_test:+.2f}, with dev {with_dev:+.2f}, {len(both)} points")
    if picture:
        draw_points(points, follows[PSEUDO]["test"], picture)
    if out:
        first = {k: v for k, v in rows[0].items() if k not in ("task", "found", "seconds")}
        result = {**first, "changes": table, "label_free": {"spearman": follows, "points": points}}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def draw_points(points: list[dict[str, Any]], spearman: float, path: Path) -> None:
    """Draw each method on each collection: the gain on judged queries over that of the score without labels."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in COLLECTIONS:
        own = [p for p in points if p["collection"] == name]
        axes.scatter([p[PSEUDO] for p in own], [p["test"] for p in own], s=14, label=name, alpha=0.8)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.axvline(0, color="grey", linewidth=0.6)
    axes.set_xlabel("change of pseudo-relevance nDCG@10, no labels needed")
    axes.set_ylabel("change of nDCG@10, judged test queries")
    axes.set_title(f"Spearman {spearman:.2f} over {len(points)} points", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
