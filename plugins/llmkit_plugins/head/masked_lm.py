"""Masked language modelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.losses import linear_cross_entropy, rows_at_once
from llmkit.ops.metrics import Mean, MeanLoss, MeanScore, Perplexity
from llmkit.ops.sampling import scrambled
from llmkit.ops.writing import special_ids
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of

MASK = "[MASK]"
"""Marks a token to guess in a text."""

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token and a random token; the others stay as they are."""


class MaskedLM(Head):
    """Masked language model: guesses hidden tokens of a text from both sides; pretrains an encoder.

    Devlin et al. 2019, arXiv:1810.04805. Each token is chosen with probability ``mask_rate``; special ones, the unknown
    token among them, never are. Of the chosen tokens 80 % become the mask token, 10 % a random token, and 10 % stay;
    the loss is that of guessing the chosen ones. In training the choice is random; in evaluation it is a function of
    the document's tokens alone, so that results can be compared.

    To ask it, write ``[MASK]`` in a text; each one is answered with the best ``decoding.top_k`` tokens.

    Args:
        mask_rate: share of the tokens that are chosen.
        transform: whether states go through a linear layer, GELU and a layer norm before they are scored (the paper's
            code does that).
        norm_eps: added to the variance in that layer norm.
    """

    topology = "encoder"
    layout = "blocks"
    inputs = ("text",)
    texts = ("text",)
    decoding = DecodingOptions(temperature=0.0, top_k=5)

    mask_id: Tensor
    pad_id: Tensor
    special_ids: Tensor
    text_ids: Tensor

    def __init__(self, mask_rate: float = 0.15, transform: bool = False, norm_eps: float = 1e-12) -> None:
        super().__init__()
        if not 0 < mask_rate <= 1:
            raise UserError(f"masked_lm: mask_rate must be above 0 and at most 1, got {mask_rate}")
        self.mask_rate = self.scored_share = mask_rate
        self.transform, self.norm_eps = transform, norm_eps
        self.dense: nn.Module = nn.Identity()

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the layers between states and scores."""
        if self.transform:
            linear = nn.Linear(dim, dim)
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.dense = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(dim, self.norm_eps))

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take the ids of the mask, of padding, of all special tokens, and of all others."""
        special = special_ids(tokenizer)
        ids = {
            "mask_id": tokenizer.mask_id,
            "pad_id": tokenizer.pad_id,
            "special_ids": sorted(special),
            "text_ids": [number for number in range(tokenizer.vocab_size) if number not in special],
        }
        for name, value in ids.items():  # buffers move with the head; the checkpoint has the tokenizer already
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` of each text, whole: the data layer cuts them into blocks, prediction keeps the start."""
        ids = encode_masked(rows["text"], tokenizer)
        return {"ids": ids, "truncated": [int(len(row) > max_length) for row in ids]}

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T) of separate texts and segments (B, T) where padded."""
        before, _, after = tokenizer.around
        rows = [[*before, *feature["ids"], *after] for feature in features]
        batch = {"ids": padded(rows, tokenizer.pad_id)}
        segments = segments_of([len(row) for row in rows])
        return batch if segments is None else {**batch, "segments": segments}

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed cross-entropy of the chosen tokens."""
        hidden_ND, tokens_N = self._chosen(net, batch)
        return linear_cross_entropy(hidden_ND, net.output_weight_VD, tokens_N, bias_V=net.output_bias_V)

    def _chosen(self, net: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hide tokens; return the network's states at the chosen places, (N, D), and the tokens there, (N,)."""
        ids_BT, seq = batch["ids"], self._sequence(batch)
        if self.training:
            draws_3BT = torch.rand((3, *ids_BT.shape), dtype=torch.float32, device=ids_BT.device)
        else:
            draws_3BT = fixed_draws(ids_BT, seq)
        given_BT, chosen_BT = self.hide(ids_BT, draws_3BT)
        # Only chosen places are multiplied with the vocabulary, which is worth waiting for their number on a GPU.
        places_N = chosen_BT.flatten().nonzero()[:, 0]
        return self.dense(net.encode(given_BT, seq).x_BSD.flatten(0, 1)[places_N]), ids_BT.flatten()[places_N]

    def hide(self, ids_BT: Tensor, draws_3BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids with chosen tokens hidden, and which were chosen, both (B, T).

        Args:
            ids_BT: token ids; those of special tokens are never chosen.
            draws_3BT: numbers in [0, 1), (3, B, T): what chooses a token, what becomes of it, and the random token.
        """
        chosen_BT = (draws_3BT[0] < self.mask_rate) & ~torch.isin(ids_BT, self.special_ids)
        random_BT = self.text_ids[(draws_3BT[2] * len(self.text_ids)).long()]
        instead_BT = torch.where(draws_3BT[1] < MASKED + RANDOM, random_BT, ids_BT)
        instead_BT = torch.where(draws_3BT[1] < MASKED, self.mask_id, instead_BT)
        return torch.where(chosen_BT, instead_BT, ids_BT), chosen_BT

    def _sequence(self, batch: Batch) -> Sequence:
        """Return the sequence of a batch. The last block of a split is padded without segments."""
        ids_BT, segments_BT = batch["ids"], batch.get("segments")
        if segments_BT is None and bool((ids_BT == self.pad_id).any()):
            segments_BT = (ids_BT != self.pad_id).long()
        return Sequence.of(ids_BT, segments_BT)

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, perplexity and accuracy of the chosen tokens, and the share of unknown ones among all."""
        return {"loss": MeanLoss(), "perplexity": Perplexity(), "accuracy": MeanScore(), "unknown_share": Mean()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        hidden_ND, tokens_N = self._chosen(net, batch)
        weight_VD = net.output_weight_VD
        loss = linear_cross_entropy(hidden_ND, weight_VD, tokens_N, bias_V=net.output_bias_V)
        metrics["loss"].update(loss)
        metrics["perplexity"].update(loss)
        ids_BT = batch["ids"]
        metrics["unknown_share"].update((ids_BT == tokenizer.unk_id).sum(), (ids_BT != self.pad_id).sum())
        rows = rows_at_once(weight_VD)
        for states, tokens in zip(hidden_ND.split(rows), tokens_N.split(rows), strict=True):
            best = _scores(net, states).argmax(-1)
            metrics["accuracy"].update((best == tokens).sum(), len(tokens))

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return ``text``, with the best token at each mask, and ``masks``: the best tokens with their probabilities.

        Raises UserError for a text without ``[MASK]``.
        """
        batch = {name: batch[name][:, : net.max_length] for name in ("ids", "segments") if name in batch}
        ids_BT, mask_BT = batch["ids"], batch["ids"] == self.mask_id
        counts = mask_BT.sum(1).tolist()
        if 0 in counts:
            text = tokenizer.decode(ids_BT[counts.index(0)].tolist())
            raise UserError(
                f"masked_lm: there is no {MASK} in the text (its first {net.max_length} tokens): {text[:60]!r}. "
                f"Write {MASK} for each token to guess."
            )
        states_ND = self.dense(net.encode(ids_BT, self._sequence(batch)).x_BSD[mask_BT])
        scores_NV = _scores(net, states_ND).float()
        scores_NV[:, self.special_ids] = -torch.inf
        best = scores_NV.softmax(-1).topk(min(max(1, options.top_k), len(self.text_ids)))
        names = tokenizer.decode_batch(best.indices.reshape(-1, 1).tolist())
        width = best.indices.shape[1]
        guesses = [
            {"token": name, "probability": p} for name, p in zip(names, best.values.flatten().tolist(), strict=True)
        ]
        masks = iter([guesses[start : start + width] for start in range(0, len(guesses), width)])
        texts = tokenizer.decode_batch(ids_BT.masked_scatter(mask_BT, best.indices[:, 0]).tolist())
        return [
            {"text": text, "masks": [next(masks) for _ in range(count)]}
            for text, count in zip(texts, counts, strict=True)
        ]

    def show(self, answer: dict[str, Any]) -> str:
        """Return the text with its masks filled, and below it a line for each mask."""
        lines = [
            ", ".join(f"{guess['token']!r} {guess['probability']:.3f}" for guess in guesses)
            for guesses in answer["masks"]
        ]
        return "\n  ".join([answer["text"], *lines])

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return the beginning of a validation text, and the same with every eighth token guessed."""
        ids_BT = batch["ids"][:1, :32]
        # Of a packed row its first document.
        real_BT = batch["segments"][:1, :32] == 1 if "segments" in batch else ids_BT != self.pad_id
        ids_BT = ids_BT[real_BT][None]
        mask_BT = (torch.arange(ids_BT.shape[1], device=ids_BT.device) % 8 == 4)[None]
        mask_BT[:, -1] = True  # never none, so that all processes of a sharded network do the same
        given: Batch = {"ids": torch.where(mask_BT, self.mask_id, ids_BT)}
        answer = self.predict(net, given, tokenizer, self.decoding)[0]
        return f"{tokenizer.decode(ids_BT[0].tolist())}\n  -> {answer['text']}"


def _scores(net: Network, states_ND: Tensor) -> Tensor:
    """Return the scores over the vocabulary, (N, V)."""
    bias_V, dtype = net.output_bias_V, states_ND.dtype
    return F.linear(states_ND, net.output_weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))


def fixed_draws(ids_BT: Tensor, seq: Sequence) -> Tensor:
    """Return numbers in [0, 1) that depend only on a document's tokens and the place in it, (3, B, T).

    The rest of the row or the batch does not change them.
    """
    places_BT = seq.positions_BT.expand_as(ids_BT)
    segments_BT = torch.ones_like(ids_BT) if seq.segments_BT is None else seq.segments_BT
    tokens_BT = scrambled(scrambled(ids_BT) + places_BT)
    sums = tokens_BT.new_zeros(len(ids_BT), int(segments_BT.max()) + 1).scatter_add_(1, segments_BT, tokens_BT)
    documents_BT = sums.gather(1, segments_BT)
    keys_BT = scrambled(documents_BT + places_BT)
    draws = [scrambled(keys_BT + number) >> 40 & 0xFFFFFF for number in range(3)]
    return torch.stack(draws).float() / 2**24


def encode_masked(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of texts in which ``[MASK]`` stands for the mask token.

    What follows a mask is encoded as inside a text. A space before it is left out where the tokenizer takes spaces for
    the beginning of the next token (``bpe``, ``unigram``), which is the one to guess.
    """
    return _encode_masked(texts, tokenizer) if any(MASK in text for text in texts) else tokenizer.encode_batch(texts)


def _encode_masked(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    # A newline stands in for the text before: no tokenizer merges it with what follows.
    line, space = tokenizer.encode_batch(["\n", "\n "])
    rows = []
    for text in texts:
        words = tokenizer.encode_batch([f"\n {word}" for word in text.replace(MASK, " ").split()])
        glued = any(word[: len(space)] != space for word in words)
        *parts, end = text.split(MASK)
        first, *others = [*(part.removesuffix(" ") if glued else part for part in parts), end]
        row = tokenizer.encode(first)
        for ids in tokenizer.encode_batch([f"\n{part}" for part in others]):
            row += [tokenizer.mask_id, *ids[len(line) :]]
        rows.append(row)
    return rows
