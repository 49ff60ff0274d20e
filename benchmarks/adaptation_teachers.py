"""Parts of adaptation_study.py: collections with BM25, an encoder, teachers that rank documents for an anchor."""

import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

STOP = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there "
    "these they this to was will with what which how can has have from its were been between than may "
    "also where when who does do we using used use".split()
)


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
        rare = [sorted(set(self.words[i]), key=lambda w: (-self.rarity[self.number[w]], w))[:12] for i in self.held]
        self.keywords = [" ".join(rng.sample(found, min(5, len(found)))) for found in rare]

    def _index(self) -> None:
        self.words = [words(text) for text in self.texts]
        lengths = np.array([len(found) for found in self.words], float)
        self.number: dict[str, int] = {}
        row, column, value, counts = [], [], [], []
        for i, found in enumerate(self.words):
            norm = 1.2 * (0.25 + 0.75 * lengths[i] / lengths.mean())
            for word in dict.fromkeys(found):
                f = found.count(word)
                row.append(i)
                column.append(self.number.setdefault(word, len(self.number)))
                value.append(2.2 * f / (f + norm))
                counts.append(f)
        matrix = sp.csr_matrix((value, (row, column)), shape=(len(self.texts), len(self.number)))
        holders = np.bincount(matrix.indices, minlength=len(self.number))
        self.rarity = np.log(1 + (len(self.texts) - holders + 0.5) / (holders + 0.5))
        self._by_word = (matrix @ sp.diags(self.rarity)).T.tocsr()
        self._counts = sp.csr_matrix((counts, (row, column)), shape=matrix.shape, dtype=np.float32)

    def bm25(self, texts: list[str]) -> np.ndarray:
        """Scores of texts with all documents."""
        pairs = [(i, self.number[w]) for i, text in enumerate(texts) for w in words(text) if w in self.number]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        query = sp.csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(texts), len(self.number)))
        return np.asarray((query @ self._by_word).toarray(), dtype=np.float32)

    def bm25_of(self, best_QK: np.ndarray) -> np.ndarray:
        """Scores of the words of K documents together with all documents."""
        chosen = np.zeros((len(best_QK), len(self.texts)), np.float32)
        np.put_along_axis(chosen, best_QK, 1, axis=1)
        return np.asarray((sp.csr_matrix(chosen) @ self._counts @ self._by_word).toarray(), dtype=np.float32)


class Teacher:
    """Ranks the documents for an anchor, without labels."""

    def __init__(self, c: Collection, base: "Model", base_ND: Tensor, idea: dict[str, Any]) -> None:
        self.c, self.base, self.idea = c, base, idea
        self.documents_ND, self.landmarks_LD = base_ND, None
        if smooth := idea.get("smooth"):
            self.documents_ND = smoothed(base_ND, smooth)
        if idea.get("ranks"):  # agreement of two rows' ranks of a thousand landmarks (RankEncoder, arXiv 2409.04701)
            picked = torch.randperm(len(base_ND), generator=torch.Generator().manual_seed(0))[:1000]
            self.landmarks_LD = base_ND[picked.to(base_ND.device)]
            self.documents_ND = self._ranks(base_ND)

    def _ranks(self, z_BD: Tensor) -> Tensor:
        assert self.landmarks_LD is not None
        ranks_BL = (z_BD @ self.landmarks_LD.T).argsort(1).argsort(1).float()
        return F.normalize(ranks_BL - ranks_BL.mean(1, keepdim=True), dim=-1)

    def __call__(self, anchors: list[str], own: Tensor | None = None) -> Tensor:
        """Score B anchors with all N documents; the own ones, where they are given, have -1."""
        z_BD = self.base.encode(anchors)
        if self.landmarks_LD is not None:
            z_BD = self._ranks(z_BD)
        score_BN = z_BD @ self.documents_ND.T
        if weight := self.idea.get("weight"):
            score_BN = score_BN + weight * self._shares(self.c.bm25(anchors), own)
        score_BN = without(score_BN, own)
        if feedback := self.idea.get("feedback"):
            best_BK = score_BN.topk(3).indices.cpu().numpy()
            score_BN = without(score_BN + feedback * self._shares(self.c.bm25_of(best_BK), own), own)
        return score_BN

    def _shares(self, words_BN: np.ndarray, own: Tensor | None) -> Tensor:
        words = torch.tensor(words_BN, device=self.base.device)
        if own is not None:
            words.scatter_(1, own[:, None], 0.0)
        return words / words.amax(1, keepdim=True).clamp(min=1e-6)


def without(score_BN: Tensor, own: Tensor | None) -> Tensor:
    """The scores, -1 for the own documents."""
    return score_BN if own is None else score_BN.scatter(1, own[:, None], -1.0)


def smoothed(base_ND: Tensor, share: float) -> Tensor:
    """Each document moved towards the mean of its ten nearest."""
    mean_ND = torch.empty_like(base_ND)
    for at in range(0, len(base_ND), 1024):
        score = base_ND[at : at + 1024] @ base_ND.T
        score[torch.arange(len(score)), torch.arange(at, at + len(score))] = -1
        mean_ND[at : at + 1024] = base_ND[score.topk(10).indices].mean(1)
    return F.normalize((1 - share) * base_ND + share * mean_ND, dim=-1)


class Model:
    """An encoder with mean pooling, and its tokenizer."""

    def __init__(self, path: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = AutoModel.from_pretrained(path, dtype=torch.float32).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.rows: dict[str, list[int]] = {}  # without special tokens

    def embed(self, texts: list[str], length: int) -> Tensor:
        """Unit vectors."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.rows]:
            self.rows.update(zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = [[first, *self.rows[text][: length - 2], last] for text in texts]
        features = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
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


def ndcg(best: list[int], right: dict[int, int]) -> float:
    gained = sum(right.get(i, 0) / math.log2(at + 2) for at, i in enumerate(best))
    return gained / sum(g / math.log2(at + 2) for at, g in enumerate(sorted(right.values(), reverse=True)[:10]))
