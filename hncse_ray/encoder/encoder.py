"""The sentence encoder: backbone, pooling, head; and bulk encoding of text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hncse_ray.config import Pooling
from hncse_ray.corpus.batches import pad_rows
from hncse_ray.encoder.packing import Packing, allow_packing, pack_rows

Progress = Callable[[int, int], None]
TokenRows = Sequence[NDArray[np.integer]]


class SentenceEncoder(nn.Module):
    """A transformers backbone with pooling and an optional head; its output is unit-norm.

    Args:
        backbone: any bidirectional transformers encoder.
        tokenizer: its fast tokenizer.
        pooling: how the token states ``[B, L, D]`` become one vector; not ``auto``.
        head: a dense layer followed by tanh after pooling (SimCSE, arXiv 2104.08821, section 6.3), or None.
        head_in_training_only: leave the head out when not training, as SimCSE does at test time.
        max_length: tokens kept of a text when encoding, special tokens included.
        autocast: the dtype of the autocast used in training; None = fp32.

    Attributes:
        inference_autocast: the same when not training; fp32 unless a caller sets it.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        pooling: Pooling,
        head: nn.Linear | None = None,
        head_in_training_only: bool = True,
        max_length: int = 512,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.head_in_training_only = head_in_training_only
        self.max_length = max_length
        self.autocast = autocast
        self.inference_autocast: torch.dtype | None = None
        self._can_pack = allow_packing(backbone)
        # The backbone's own pooler (BERT has one) is not part of any pooling here. It stays, so that what is saved
        # is a complete model, but it gets no gradient, and DDP must not wait for one.
        if (pooler := getattr(backbone, "pooler", None)) is not None:
            pooler.requires_grad_(False)

    @property
    def dimension(self) -> int:
        """Width D of the embeddings."""
        return int(self.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    @property
    def packs(self) -> bool:
        """Whether :meth:`packed_tensors` may be used: the architecture allows it, and the device gains by it."""
        return self._can_pack and self.device.type == "cpu"

    @property
    def uses_head(self) -> bool:
        """Whether the head takes part in the present mode."""
        return self.head is not None and (self.training or not self.head_in_training_only)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Embed token rows, padded (:meth:`batch_tensors`) or packed (:meth:`packed_tensors`).

        Args:
            input_ids: ``[B, L]`` int64; packed ``[1, T]``.
            attention_mask: ``[B, L]``, 1 = token, 0 = padding; None = no row is padded.
            packing: how B rows lie in ``[1, T]``; None = they are not packed.

        Returns:
            ``[B, D]`` fp32, rows of unit norm.
        """
        needs_layers = self.pooling in ("first_last_mean", "last_two_mean")
        dtype = self.autocast if self.training else self.inference_autocast
        packed = {} if packing is None else {"position_ids": packing.position_ids, "packing": packing}
        with torch.autocast(device_type=input_ids.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=needs_layers,
                return_dict=True,
                **packed,
            )
            layers = output.hidden_states if needs_layers else (output.last_hidden_state,)
            if packing is None:
                pooled_BD = _pool(layers, attention_mask, self.pooling)
            else:
                runs = zip(*(packing.split(layer) for layer in layers), strict=True)
                pooled_BD = torch.cat([_pool(run, None, self.pooling) for run in runs])[packing.place_N]
            if self.uses_head:
                assert self.head is not None
                pooled_BD = torch.tanh(self.head(pooled_BD))
        return F.normalize(pooled_BD.float(), dim=-1)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> list[NDArray[np.int32]]:
        """Turn texts into token rows, special tokens included, cut at ``max_length`` (default: the encoder's)."""
        rows: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), 10_000):
            encoded = self.tokenizer(
                list(texts[start : start + 10_000]),
                truncation=True,
                max_length=max_length or self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            rows.extend(np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"])
        return rows

    def encode(
        self, texts: Sequence[str], *, batch_size: int = 128, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Embed texts in fp32, without dropout, sorted by length so that little is padded, or nothing (packed).

        Args:
            texts: N strings.
            batch_size: texts in one forward pass.
            progress: called with (texts done, N) after each batch.

        Returns:
            ``[N, D]`` float32, unit-norm rows, in the order of ``texts``.
        """
        rows = self.tokenize(texts)
        out_ND = np.zeros((len(rows), self.dimension), dtype=np.float32)
        done = 0
        for index in length_batches(rows, batch_size):
            out_ND[index] = self.encode_rows([rows[i] for i in index])
            done += len(index)
            if progress is not None:
                progress(done, len(rows))
        return out_ND

    @torch.no_grad()
    def encode_rows(self, rows: TokenRows) -> NDArray[np.float32]:
        """Embed one batch of token rows as :meth:`encode` does; ``[B, D]`` float32 on the CPU."""
        was_training = self.training
        self.eval()
        try:
            vectors_BD: Tensor = self(*(self.packed_tensors(rows) if self.packs else self.batch_tensors(rows)))
            return vectors_BD.cpu().numpy()
        finally:
            self.train(was_training)

    def batch_tensors(self, rows: TokenRows) -> tuple[Tensor, Tensor | None]:
        """Pad token rows to ``[B, L]`` on the encoder's device; the mask is None where nothing is padded."""
        ids, mask = pad_rows(rows, pad_id=int(self.tokenizer.pad_token_id))
        ids_BL = torch.from_numpy(ids).to(self.device, non_blocking=True)
        return ids_BL, None if mask.all() else torch.from_numpy(mask).to(self.device, non_blocking=True)

    def packed_tensors(self, rows: TokenRows) -> tuple[Tensor, None, Packing]:
        """Lay token rows behind each other, ``[1, T]``; only where :attr:`packs`."""
        ids_1T, packing = pack_rows(self.backbone, rows)
        return ids_1T, None, packing


def length_batches(rows: TokenRows, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of batches of rows sorted by length, longest first.

    The batches depend on the rows alone: however they are shared out over processes, each batch, and so each
    vector, comes out the same.
    """
    order = np.argsort([-len(row) for row in rows], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of everything that decides which token ids a text gets, but for the length."""
    state = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    state.no_truncation()
    state.no_padding()
    return hashlib.sha256(state.to_str().encode()).hexdigest()


def _pool(layers: Sequence[Tensor], mask_BL: Tensor | None, pooling: Pooling) -> Tensor:
    """Reduce hidden states (each ``[B, L, D]``) to ``[B, D]``."""
    if pooling in ("cls", "cls_before_head"):
        return layers[-1][:, 0]
    if pooling == "mean":
        states_BLD = layers[-1]
    elif pooling == "first_last_mean":  # the embedding layer's output and the last layer's, as SimCSE's avg_first_last
        states_BLD = (layers[0] + layers[-1]) / 2
    elif pooling == "last_two_mean":
        states_BLD = (layers[-1] + layers[-2]) / 2
    else:
        raise ValueError(f"pooling {pooling!r} must be resolved before the encoder is built")
    if mask_BL is None:
        return states_BLD.float().mean(dim=1)
    weights_BL1 = mask_BL.unsqueeze(-1).float()
    return (states_BLD.float() * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
