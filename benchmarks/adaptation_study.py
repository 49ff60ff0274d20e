"""Which way of adapting an encoder to a corpus pays where people search? A study of single ideas, in plain PyTorch.

It decided what was built: all-MiniLM-L6-v2, six judged collections, one seed, a few minutes of one GPU. Each idea
trains for 100 steps unless it says otherwise; test nDCG@10 is compared with the untouched model's. Nothing of hncse_ray
is used, so that an idea takes a line here; ``adaptation.py`` measures what was built of them.

    python benchmarks/adaptation_study.py --model MODEL --data DOMAINS --out FOLDER --ideas title+cloze list
    python benchmarks/adaptation_study.py --table FOLDER --out result.json

Words: an anchor asks (a title, a sentence of a document, keywords, a crop, or the document itself), its document
answers. A teacher scores an anchor with a document by the cosine under the untouched model, plus ``weight`` times BM25
over the best BM25 of the anchor. The lists of ``list`` are the documents of the batch and three further ones an anchor,
from ranks 1-5, 6-30 and 31-200 of the teacher. ``own`` says whether the anchor's own document is in its list: then BM25
knows it by the anchor's own words.
"""

import argparse
import csv
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hardware import provenance
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

COLLECTIONS = ("cran", "cisi", "med", "cacm", "npl", "lisa")
STOP = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there "
    "these they this to was will with what which how can has have from its were been between than may "
    "also where when who does do we using used use".split()
)
EVERY = {"title": 1, "cloze": 2, "keywords": 1}
ASKING = {"title": 1, "cloze": 2}
LIST: dict[str, Any] = {"batch": 32, "bands": 3, "contrast": 0.0, "weight": 0.3}
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
}  # fmt: skip


def words(text: str) -> list[str]:
    """Words without the commonest, plurals cut."""
    found = [w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in STOP and len(w) > 1]
    found = [w[:-3] + "y" if w.endswith("ies") and len(w) > 5 else w for w in found]
    return [w[:-1] if w.endswith("s") and not w.endswith("ss") and len(w) > 3 else w for w in found]


def sentences(text: str) -> list[str]:
    """Sentences of four words and more; of text without ends of sentences runs of a dozen words."""
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if len(part.split()) >= 4]
    parts = text.split()
    if len(found) < 2 and len(parts) >= 16:
        found = [" ".join(parts[at : at + 12]) for at in range(0, len(parts) - 5, 12)]
    return found


class Collection:
    """Documents, judged queries, BM25, and documents held out for the label-free score."""

    def __init__(self, folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
        place = {row["_id"]: at for at, row in enumerate(rows)}
        self.titles = [(row.get("title") or "").strip() for row in rows]
        self.bodies = [(row.get("text") or "").strip() for row in rows]
        ends = (".", "!", "?")
        self.texts = [
            f"{t if t.endswith(ends) else t + '.'} {b}".strip() if t else b
            for t, b in zip(self.titles, self.bodies, strict=True)
        ]
        self.sentences = [sentences(body) for body in self.bodies]
        asked = {}
        for line in (folder / "queries.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            asked[row["_id"]] = row["text"]
        self.queries: dict[str, list[str]] = {}
        self.right: dict[str, list[dict[int, int]]] = {}
        for split in ("dev", "test"):
            right: dict[str, dict[int, int]] = {}
            with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    if int(row["score"]) > 0:
                        right.setdefault(row["query-id"], {})[place[row["corpus-id"]]] = int(row["score"])
            self.queries[split], self.right[split] = [asked[q] for q in right], list(right.values())
        self._index()
        rng = random.Random(7)
        able = [i for i, found in enumerate(self.sentences) if len(found) >= 3]
        rng.shuffle(able)
        self.held = sorted(able[: min(300, len(able) // 5)])
        self.trained = sorted(set(range(len(rows))) - set(self.held))
        self.gaps = [rng.choice(self.sentences[i]) for i in self.held]
        self.gapped = [self.texts[i].replace(gap, " ") for i, gap in zip(self.held, self.gaps, strict=True)]

    def _index(self) -> None:
        self.words = [words(text) for text in self.texts]
        lengths = np.array([len(found) for found in self.words], float)
        self.number: dict[str, int] = {}
        row, column, value = [], [], []
        for i, found in enumerate(self.words):
            norm = 1.2 * (0.25 + 0.75 * lengths[i] / lengths.mean())
            for word in dict.fromkeys(found):
                f = found.count(word)
                row.append(i)
                column.append(self.number.setdefault(word, len(self.number)))
                value.append(2.2 * f / (f + norm))
        matrix = sp.csr_matrix((value, (row, column)), shape=(len(self.texts), len(self.number)))
        holders = np.bincount(matrix.indices, minlength=len(self.number))
        self.rarity = np.log(1 + (len(self.texts) - holders + 0.5) / (holders + 0.5))
        self._by_word = (matrix @ sp.diags(self.rarity)).T.tocsr()

    def bm25(self, texts: list[str]) -> np.ndarray:
        """Scores of texts with all documents."""
        pairs = [(i, self.number[w]) for i, text in enumerate(texts) for w in words(text) if w in self.number]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        query = sp.csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(texts), len(self.number)))
        return np.asarray((query @ self._by_word).toarray(), dtype=np.float32)


class Model:
    """An encoder with mean pooling, and its tokenizer."""

    def __init__(self, path: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = AutoModel.from_pretrained(path, dtype=torch.float32).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def embed(self, texts: list[str], length: int) -> Tensor:
        """Unit vectors."""
        features = self.tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        features = features.to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            state = self.net(**features).last_hidden_state.float()
        mask = features["attention_mask"].unsqueeze(-1)
        return F.normalize((state * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors of many texts, without dropout."""
        was, order = self.net.training, sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        self.net.eval()
        parts = [self.embed([texts[i] for i in order[at : at + 256]], 256) for at in range(0, len(order), 256)]
        self.net.train(was)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(self.device)]


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
        if "bands" in idea:
            columns, teacher_BC = teach(c, base, base_ND, anchors, ids, idea, rng)
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
            loss = loss + imitate(student_BC, teacher_BC, eye, own=idea.get("own", False), margins=idea.get("margins"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return model, {"loss at first": float(np.mean(losses[:10])), "loss at last": float(np.mean(losses[-10:]))}


def teach(
    c: Collection,
    base: Model,
    base_ND: Tensor,
    anchors: list[str],
    ids: list[int],
    idea: dict[str, Any],
    rng: random.Random,
) -> tuple[list[int], Tensor]:
    """The columns, those of the batch first, and the teacher's scores with them."""
    words_BN = torch.tensor(c.bm25(anchors), device=base.device)
    eye, own = torch.arange(len(ids)), torch.tensor(ids)
    if not idea.get("own"):
        words_BN[eye, own] = 0
    teacher_BN = base.encode(anchors) @ base_ND.T
    teacher_BN = teacher_BN + idea["weight"] * words_BN / words_BN.amax(1, keepdim=True).clamp(min=1e-6)
    if not idea.get("own"):
        teacher_BN[eye, own] = -1
    best = teacher_BN.topk(min(200, teacher_BN.shape[1])).indices.tolist()
    further = [row[rng.randrange(a, min(b, len(row)))] for row in best for a, b in ((0, 5), (5, 30), (30, 200))]
    columns = [*ids, *(i for i in dict.fromkeys(further) if i not in ids)]
    return columns, teacher_BN[:, columns]


def imitate(student_BC: Tensor, teacher_BC: Tensor, eye: Tensor, *, own: bool, margins: bool | None) -> Tensor:
    """The divergence of the softmax of both, or the squared difference of their margins."""
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
    wanted = (teacher_BC / 0.05).masked_fill(~kept, -1e4).softmax(1)
    found = (student_BC / 0.05).masked_fill(~kept, -1e4).log_softmax(1)
    return F.kl_div(found, wanted, reduction="batchmean")


def score(model: Model, c: Collection, powers: tuple[float, ...]) -> dict[str, Any]:
    """What queries earn by nDCG@10, and the label-free MRR, whitened by each power."""
    plain = {"documents": model.encode(c.texts), "gapped": model.encode(c.gapped), "gaps": model.encode(c.gaps)}
    plain |= {split: model.encode(queries) for split, queries in c.queries.items()}
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
        held = torch.tensor(c.held, device=documents_ND.device)
        searched_ND = documents_ND.clone()
        searched_ND[held] = vectors["gapped"]
        near_QN = vectors["gaps"] @ searched_ND.T
        rank = (near_QN > near_QN.gather(1, held[:, None])).sum(1) + 1
        row["cloze"] = float((1 / rank).float().mean())
        found[f"{power:g}"] = row
    return found


def ndcg(best: list[int], right: dict[int, int]) -> float:
    gained = sum(right.get(i, 0) / math.log2(at + 2) for at, i in enumerate(best))
    return gained / sum(g / math.log2(at + 2) for at, g in enumerate(sorted(right.values(), reverse=True)[:10]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Single ideas of adaptation.")
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--collections", nargs="+", default=list(COLLECTIONS))
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every idea, instead of its own")
    parser.add_argument("--table", type=Path, help="print what a folder of results says")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.table:
        tabulate(args.table, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.collections:
        c, base = Collection(args.data / name), Model(args.model)
        base_ND = base.encode(c.texts)
        found: dict[str, Any] = {"base": {"0": score(base, c, (0.0, 0.0625, 0.125, 0.25))}}
        for idea in args.ideas:
            started = time.perf_counter()
            settings = IDEAS[idea] | ({"steps": args.steps} if args.steps else {})
            model, told = train(c, args.model, base, base_ND, settings, args.seed)
            seconds = time.perf_counter() - started
            row = {"1": score(model, c, (0.0, 0.125))}
            with torch.no_grad():
                for own, untouched in zip(model.net.parameters(), base.net.parameters(), strict=True):
                    own.lerp_(untouched, 0.5)
            found[idea] = row | {"0.5": score(model, c, (0.0, 0.125)), "seconds": seconds, **told}
            print(
                name,
                idea,
                f"{seconds:.0f} s",
                {k: f"{np.mean(v['0']['test']):.4f}" for k, v in row.items()},
                flush=True,
            )
        result = {"collection": name, "seed": args.seed, **provenance(torch.device(base.device)), "ideas": found}
        (args.out / f"{name}-{args.seed}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def tabulate(folder: Path, out: Path | None) -> None:
    """Print and write mean changes of test nDCG@10 against the base, with their intervals."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rng, table = np.random.default_rng(0), {}
    for idea in dict.fromkeys(idea for result in results for idea in result["ideas"]):
        for share in ("0",) if idea == "base" else ("1", "0.5"):
            for power in ("0", "0.0625", "0.125", "0.25") if idea == "base" else ("0", "0.125"):
                rows = {
                    r["collection"]: r["ideas"] for r in results if power in r["ideas"].get(idea, {}).get(share, {})
                }
                change = {
                    c: np.subtract(ideas[idea][share][power]["test"], ideas["base"]["0"]["0"]["test"])
                    for c, ideas in rows.items()
                }
                if not change:
                    continue
                queries = np.concatenate(list(change.values()))
                drawn = queries[rng.integers(0, len(queries), (5000, len(queries)))].mean(1)
                table[f"{idea} | {share}, {power}"] = {
                    "collections": {c: round(float(v.mean()), 4) for c, v in change.items()},
                    "mean": round(float(np.mean([v.mean() for v in change.values()])), 4),
                    "over all queries": [
                        round(float(x), 4) for x in (queries.mean(), *np.percentile(drawn, [2.5, 97.5]))
                    ],
                }
    for name, row in table.items():
        print(f"{name:40}", *(f"{c} {v:+.3f}" for c, v in row["collections"].items()), f"| mean {row['mean']:+.3f}",
              row["over all queries"])  # fmt: skip
    if out:
        first = {k: v for k, v in results[0].items() if k not in ("collection", "ideas")}
        out.write_text(json.dumps(first | {"changes": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
