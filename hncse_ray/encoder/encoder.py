"""The sentence encoder: a SentenceTransformer whose token rows are packed where that gives the same vectors."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hncse_ray.config import Precision, Side
from hncse_ray.corpus.batches import pad_rows
from hncse_ray.encoder.adapters import has_adapters
from hncse_ray.encoder.attention import use_packed_attention
from hncse_ray.encoder.first_token import drop_unpooled_tokens
from hncse_ray.encoder.hardware import autocast_dtype, ready_for, to_device
from hncse_ray.encoder.head import HEAD, TrainingHead
from hncse_ray.encoder.lengths import TokenRows, attention_reach, first_position, length_batches, length_limit, passes
from hncse_ray.encoder.quiet import quiet
from hncse_ray.encoder.texts import list_of_texts
from hncse_ray.errors import DataError, ModelError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_PROBES = (
    "One.",
    "A second text of a few more words.",
    "The third is longer than both of the others: it goes on and on.",
)
_TOLERANCE = 1e-4  # of coordinates of unit-norm vectors in fp32
_CHUNK = 10_000  # texts tokenised at a time
_TOKENISING = threading.Lock()  # a fast tokenizer is changed by every call, and refuses two at a time


class SentenceEncoder(nn.Module):
    """A SentenceTransformer, fed with token rows.

    The model's folder says what its stages, prompts and pooling are, and sentence-transformers computes them. Rows go
    through it packed, ``[1, T]``, if three probes get the same vectors that way as padded; else padded.

    Args:
        model: a transformer, its pooling and what follows.
        name: what the user calls it, for errors.
        max_length: tokens kept of a text when encoding, special tokens included; default: the model's limit.
        precision: of training.
        inference_precision: of vectors that are handed out.

    Attributes:
        autocast: the dtype of the autocast used in training; None = fp32.
        precision: what it is and why, to be shown once.
        length_limit: how many tokens a text may have for the model's positions, its tokenizer and its folder.
        inference_autocast: the same when not training.
        packs: whether rows are packed.

    Raises:
        ModelError: the model gives other vectors for token rows than for texts, or none that are numbers.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        name: str,
        max_length: int | None = None,
        precision: Precision = "auto",
        inference_precision: Precision = "fp32",
    ) -> None:
        if not isinstance(model, SentenceTransformer):
            raise TypeError(f"model is of type {type(model).__name__}; load one by its name with load_encoder")
        super().__init__()
        self.model = model
        self.name = name
        self.autocast: torch.dtype | None = None
        self.inference_autocast: torch.dtype | None = None
        self.packs = False
        self._first_position = first_position(self.backbone)
        self._reach = attention_reach(self.backbone)
        self.length_limit = length_limit(model, self._first_position)
        if max_length is not None and max_length > self.length_limit:
            raise ModelError(f"it takes {self.length_limit} tokens at most, not the {max_length} asked for", name,
                             "Lower encoder.inference_max_length")  # fmt: skip
        model.max_seq_length = max_length or self.length_limit
        self._probe()
        self.autocast, self.precision = self._choose_precision(precision)
        self.inference_autocast, _ = self._choose_precision(inference_precision)

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer."""
        backbone = self.model.transformers_model
        assert backbone is not None  # a model without one is refused when it is loaded
        return backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformer's tokenizer."""
        tokenizer: PreTrainedTokenizerFast = self.model.tokenizer
        return tokenizer

    @property
    def dimension(self) -> int:
        """Width D of the embeddings."""
        width = self.model.get_embedding_dimension()
        assert width is not None
        return width

    @property
    def max_length(self) -> int:
        """Tokens kept of a text when encoding, special tokens included."""
        length = self.model.max_seq_length
        assert length is not None
        return length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def forward(self, features: dict[str, Any]) -> Tensor:
        """Embed what :meth:`features` returned; ``[B, D]`` fp32, unit norm, in the order of its rows."""
        return F.normalize(self.embed(features), dim=-1)

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Embed in the same way, without making the vectors unit norm where the model's own stages do not."""
        features = dict(features)
        order_B = features.pop("order", None)
        dtype = self.autocast if self.training else self.inference_autocast
        transformer, *stages = self.model
        with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            features = transformer(features)
        if "token_embeddings" in features:
            features["token_embeddings"] = features["token_embeddings"].float()
        for stage in stages:  # in fp32: they cost next to nothing, and similarities need the digits
            features = stage(features)
        vectors_BD: Tensor = features["sentence_embedding"][..., : self.model.truncate_dim].float()
        return vectors_BD if order_B is None else vectors_BD[order_B]

    def features(self, rows: TokenRows, *, side: Side | None = None, pack: bool | None = None) -> dict[str, Any]:
        """Lay token rows out for the model, on its device; see :meth:`layout`."""
        return self.placed(self.layout(rows, side=side, pack=pack))

    def placed(self, layout: dict[str, Any]) -> dict[str, Any]:
        """Return what :meth:`layout` has laid out on the model's device."""
        return {k: to_device(v, self.device) if isinstance(v, Tensor) else v for k, v in layout.items()}

    def layout(self, rows: TokenRows, *, side: Side | None = None, pack: bool | None = None) -> dict[str, Any]:
        """Lay token rows out in the host's memory; from any thread.

        Args:
            rows: B token rows of :meth:`tokenize`, none empty.
            side: which the rows are, where the model leaves prompts out of its pooling.
            pack: whether to pack them; default: where the model can.

        Returns:
            Packed: ``input_ids``, ``position_ids`` and ``seq_idx`` ``[1, T]``, shortest row first, where rows begin
            (``cu_seq_lens_q/k``), the longest (``max_length_q/k``), and ``order`` ``[B]``, the place of each row among
            the packed. Padded: ``input_ids`` and ``attention_mask`` ``[B, L]``.
        """
        lengths_B = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        features: dict[str, Any] = {"modality": self._modality}
        if length := self.unpooled_prompt(side):
            features["prompt_length"] = length
        if (self.packs if pack is None else pack) and lengths_B.max() <= self._reach:
            order_B = np.argsort(lengths_B, kind="stable")
            bounds = np.concatenate([[0], np.cumsum(lengths_B[order_B])]).astype(np.int32)
            row_T = np.repeat(np.arange(len(rows)), lengths_B[order_B])
            arrays: dict[str, NDArray[Any]] = {
                "input_ids": np.concatenate([rows[i] for i in order_B])[None].astype(np.int64),
                "position_ids": (np.arange(bounds[-1]) - bounds[row_T] + self._first_position)[None],
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "seq_idx": row_T[None],  # else the pooling would have to ask the GPU how many tokens there are
                "order": np.argsort(order_B, kind="stable"),
            }
            features |= {"max_length_q": int(lengths_B.max()), "max_length_k": int(lengths_B.max())}
        else:
            ids_BL, mask_BL = pad_rows(rows, pad_id=int(self.tokenizer.pad_token_id), side=self.tokenizer.padding_side)
            arrays = {"input_ids": ids_BL, "attention_mask": mask_BL}
        return features | {name: ready_for(array, self.device) for name, array in arrays.items()}

    def prompt(self, side: Side | None) -> str:
        """Return what is put before a text: of a side as ``encode_query`` and ``encode_document`` choose it."""
        if side not in (None, *get_args(Side)):
            raise ValueError(f"side is {side!r}; choose from {', '.join(map(repr, get_args(Side)))} and None")
        prompts = self.model.prompts
        names = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}[side]
        for name in (*names, self.model.default_prompt_name):
            if name in prompts:
                return prompts[name] or ""
        return ""

    def unpooled_prompt(self, side: Side | None) -> int:
        """Return how many tokens at the beginning of a row the pooling leaves out: those of its side's prompt, or 0."""
        pooled = all(stage.include_prompt for stage in self.model if isinstance(stage, Pooling))
        if pooled or not (prompt := self.prompt(side)):
            return 0
        with _TOKENISING:
            return int(self.model.preprocess(["text"], prompt=prompt).get("prompt_length", 0))

    def tokenize(
        self, texts: Sequence[str], max_length: int | None = None, *, side: Side | None = None
    ) -> list[NDArray[np.int32]]:
        """Turn texts into token rows as the model's own folder says, prompt and special tokens included.

        Args:
            texts: N strings.
            max_length: tokens kept of each; default: the encoder's.
            side: whose prompt they get; None: the model's default, if it has one.

        Raises:
            TypeError: ``texts`` is no list of texts.
            DataError: a text has no token.
        """
        rows = self.token_rows(texts := list_of_texts(texts), max_length, side=side)
        if empty := [i for i, row in enumerate(rows) if not len(row)]:
            raise DataError(f"text {empty[0] + 1} of {len(rows)} has no token ({texts[empty[0]]!r})", self.name,
                            "Leave out empty texts, and those of characters that cannot be seen")  # fmt: skip
        return rows

    def token_rows(
        self, texts: Sequence[str], max_length: int | None = None, *, side: Side | None = None
    ) -> list[NDArray[np.int32]]:
        """Turn texts into token rows as :meth:`tokenize` does; those of a text without tokens are empty."""
        max_length = self.max_length if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; give 1 or more")
        max_length = min(max_length, self.length_limit)
        rows: list[NDArray[np.int32]] = []
        leave_out: dict[str, Any] = dict.fromkeys(("padding", "return_attention_mask", "return_token_type_ids"), False)
        how: Any = {"common": {"return_tensors": None}, "text": leave_out | {"max_length": max_length}}
        for start in range(0, len(texts), _CHUNK):
            chunk, prompt = list(texts[start : start + _CHUNK]), self.prompt(side) or None
            with _TOKENISING:
                encoded = self.model.preprocess(chunk, prompt=prompt, processing_kwargs=how, task=side)
            rows += [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        return rows

    def tokenizer_digest(self) -> str:
        """Return the SHA-256 of everything that decides which token ids a text gets, but for the length."""
        state = type(self.tokenizer.backend_tokenizer).from_str(self.tokenizer.backend_tokenizer.to_str())
        state.no_truncation()
        state.no_padding()
        prompts = [self.prompt(side) for side in (None, "query", "document")]
        template = self.tokenizer.chat_template if self._modality == "message" else None
        return hashlib.sha256(json.dumps([state.to_str(), prompts, template]).encode()).hexdigest()

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        side: Side | None = None,
        batch_size: int = 128,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Embed texts in fp32, without dropout: the vectors that ``SentenceTransformer.encode`` gives.

        Args:
            texts: N strings, or one.
            side: whose prompt they get; see :meth:`prompt`.
            batch_size: texts in one forward pass, fewer of long ones.
            progress: called with (texts done, N) after each batch.

        Returns:
            ``[N, D]`` float32 in the order of ``texts``, ``[D]`` of a single string; unit norm only where the model
            has a Normalize stage.

        Raises:
            TypeError: ``texts`` is no text and no list of texts.
            ValueError: there is no such side, or a batch is of no text.
            DataError: a text has no token.
            ModelError: the vectors are not numbers.
        """
        if isinstance(texts, str):
            vector_D: NDArray[np.float32] = self.encode([texts], side=side)[0]
            return vector_D
        rows = self.tokenize(texts, side=side)
        out_ND = np.zeros((len(rows), self.dimension), dtype=np.float32)
        done = 0
        for index in length_batches(rows, batch_size):
            out_ND[index] = self.encode_rows([rows[i] for i in index], side=side)
            done += len(index)
            if progress is not None:
                progress(done, len(rows))
        return out_ND

    @torch.no_grad()
    def encode_rows(self, rows: TokenRows, *, side: Side | None = None, unit_norm: bool = False) -> NDArray[np.float32]:
        """Embed one batch of token rows as :meth:`encode` does; ``[B, D]`` float32 on the CPU.

        Raises:
            ModelError: the vectors are not numbers.
        """
        was_training = self.training
        self.eval()
        try:
            embed = self if unit_norm else self.embed
            parts = [embed(self.features(rows[part], side=side)).cpu().numpy() for part in passes(rows)]
        finally:
            self.train(was_training)
        vectors_BD = np.concatenate(parts)
        if not np.isfinite(vectors_BD).all():
            raise ModelError("its vectors are not numbers (NaN or infinite)", self.name, "Its weights are damaged")
        return vectors_BD

    def keep_head(self, always: bool = True) -> None:
        """Have a head for training work at inference too, as for an index that must see what the objective sees."""
        for stage in self.model:
            if isinstance(stage, TrainingHead):
                stage.always = always

    def trained(self) -> dict[str, Tensor]:
        """Return what training changes, where it is: all weights, or adapters and head where the rest stands still."""
        return {
            name: value.detach()
            for name, value in self.state_dict().items()
            if not has_adapters(self.model) or "lora_" in name or name.startswith(f"model.{HEAD}.")
        }

    def weights(self) -> dict[str, Tensor]:
        """Copy to the CPU what training changes."""
        return {name: value.to("cpu", copy=True).contiguous() for name, value in self.trained().items()}

    def seen_rounded(self) -> set[str]:
        """Name the weights that training itself sees in the autocast's dtype only: nothing hangs on their other digits.

        Under autocast a linear layer multiplies by weights and adds biases that are rounded first; tables, norms and
        what follows the transformer are computed in fp32.
        """
        if self.autocast is None:
            return set()
        linear = {module for module in self.model[0].modules() if isinstance(module, nn.Linear)}
        others = {p for module in self.modules() if module not in linear for p in module.parameters(recurse=False)}
        own = {p for module in linear for p in module.parameters(recurse=False)} - others
        return {name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter in own}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take what :meth:`weights` of the same kind of encoder returned.

        Raises:
            ModelError: they are of another kind.
        """
        missing, unexpected = self.load_state_dict(dict(weights), strict=False)
        if unexpected or (missing and not has_adapters(self.model)):
            raise ModelError(f"does not have the weights {min([*unexpected, *missing])!r} that were to be loaded",
                             self.name, "They are of another model, other settings or another version")  # fmt: skip

    def save(self, folder: str | Path, *, readme: str) -> None:
        """Write the model as sentence-transformers does: adapters merged, and without what is for training only.

        Args:
            folder: an existing, empty folder; the caller makes the write atomic.
            readme: the text of README.md.
        """
        exported: Any = copy.copy(self.model)  # with the same weights
        exported._modules = {k: v for k, v in self.model.named_children() if not isinstance(v, TrainingHead)}
        if has_adapters(exported):
            exported[0] = copy.deepcopy(exported[0])
            exported[0].model = exported[0].model.merge_and_unload()
        with quiet():
            exported.save_pretrained(str(folder), create_model_card=False)
        (Path(folder) / "README.md").write_text(readme, encoding="utf-8")

    @property
    def _modality(self) -> str:
        """How the first stage is fed: chat models get texts as messages."""
        return "message" if "message" in getattr(self.model[0], "modality_config", {}) else "text"

    @torch.no_grad()
    def _probe(self) -> None:
        """See whether token rows give the vectors of the texts, padded and packed."""
        self.eval()
        texts: dict[str, Any] = self.model.preprocess(list(_PROBES), prompt=self.prompt(None) or None)
        wanted, rows = self(self.placed(texts)), self.tokenize(_PROBES)
        if not wanted.isfinite().all():
            raise ModelError("its vectors are not numbers (NaN or infinite)", self.name, "Its weights are damaged")
        if not self._gives(wanted, rows, pack=False):
            raise ModelError("it needs more than token ids to give its vectors, which is not supported", self.name)
        takes_rows = use_packed_attention(self.backbone)
        rows = [row[: int(min(len(row), self._reach))] for row in rows]
        wanted = self(self.features(rows, pack=False))
        self.packs = takes_rows and self._gives(wanted, rows, pack=True)
        logger.debug("rows of %s are %s", self.name, "packed" if self.packs else "padded")
        hooks = drop_unpooled_tokens(self.model) if self.packs else []
        if hooks and not self._gives(wanted, rows, pack=True):
            for hook in hooks:
                hook.remove()

    def _gives(self, wanted: Tensor, rows: TokenRows, *, pack: bool) -> bool:
        try:
            return torch.allclose(wanted, self(self.features(rows, pack=pack)), rtol=0, atol=_TOLERANCE)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.debug("%s does not take %s rows: %s", self.name, "packed" if pack else "padded", error)
            return False

    @torch.no_grad()
    def _choose_precision(self, precision: Precision) -> tuple[torch.dtype | None, str]:
        """Choose a dtype that the hardware has and the model runs in: not all code bears autocast."""
        dtype, reason = autocast_dtype(precision, self.device)
        if dtype is None:
            return dtype, reason
        self.inference_autocast = dtype
        try:
            self(self.features(self.tokenize(_PROBES)))
        except RuntimeError as error:
            if precision != "auto":
                raise ModelError(f"it does not run under bf16 autocast ({error})", self.name,
                                 "Set encoder.precision=fp32") from error  # fmt: skip
            return None, "fp32 (the model does not run under autocast)"
        return dtype, reason
