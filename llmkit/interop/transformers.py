"""llmkit's models as models of transformers: importing this module registers them with its Auto classes.

``llmkit.hf.export`` writes the folders that ``AutoModelForCausalLM.from_pretrained`` reads then. Their config.json
describes the model as a checkpoint does, and names classes of installed plugins only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

from llmkit.hf.folder import Config
from llmkit.hf.own import CODE, OWN, code, described
from llmkit.model.backbone import Backbone
from llmkit.model.language_model import LanguageModel
from llmkit.ops.decoding import Decoder, kept_from
from llmkit.sequence import Memory, Sequence, padded, segments_of


class LlmkitConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The config.json of a folder; ``llmkit`` is the description of the model as a checkpoint carries it."""

    model_type = OWN
    llmkit: dict[str, Any] | None = None
    vocab_size: int = 0
    tie_word_embeddings: bool = False
    is_encoder_decoder: bool = False
    use_cache: bool = True

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: saving would copy this module into the folder, which imports it from llmkit instead."""


class DecodingCache:
    """What ``generate`` hands from step to step: the decoding states, and the texts so far.

    A text that outgrows the context continues with its last half, as when llmkit generates.

    Args:
        net: the network.
        memory: the encoder's output, for an encoder-decoder.
    """

    is_compileable = False

    def __init__(self, net: Backbone, memory: Memory | None = None) -> None:
        self.net, self.memory = net, memory
        self.decoder: Decoder | None = None
        self.ids_BT, self.real_BT = torch.empty(0, 0), torch.empty(0, 0)
        self.starts: list[int] = []  # of what the network still sees of each text

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns it has seen."""
        return self.ids_BT.shape[1]

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep the given rows, in that order (beam search)."""
        self.ids_BT, self.real_BT = self.ids_BT[rows], self.real_BT[rows]
        self.starts = [self.starts[row] for row in rows.tolist()]
        if self.decoder is not None:
            self.decoder.reorder(rows)

    def decode(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Return the hidden states of new columns, (B, T, D), or of the last one alone, (B, 1, D), when cut.

        Args:
            ids_BT: token ids, padded anywhere.
            real_BT: which of them are not padding.
        """
        first, most = self.decoder is None, self.net.max_length
        self.ids_BT = ids_BT if first else torch.cat([self.ids_BT, ids_BT], 1)
        self.real_BT = real_BT if first else torch.cat([self.real_BT, real_BT], 1)
        if self.decoder is None and ids_BT.shape[1] <= most:
            self.decoder, self.starts = Decoder(self.net, len(ids_BT), most, self.memory), [0] * len(ids_BT)
        elif self.decoder is None or self.decoder.columns + ids_BT.shape[1] >= most:
            return self._begin(first)
        hidden_BTD, _ = self.decoder.states(ids_BT, None if bool(real_BT.all()) else real_BT.long())
        return hidden_BTD[:, -ids_BT.shape[1] :]

    def _begin(self, first: bool) -> Tensor:
        """Read again what is kept of each text; returns the state of its last token, (B, 1, D)."""
        texts = [ids_T[real_T].tolist() for ids_T, real_T in zip(self.ids_BT, self.real_BT, strict=True)]
        if first:
            self.starts = [max(0, len(text) - self.net.max_length) for text in texts]
        else:
            both = zip(self.starts, texts, strict=True)
            self.starts = [kept_from(start, len(text), self.net) for start, text in both]
        kept = [text[start:] for start, text in zip(self.starts, texts, strict=True)]
        self.decoder = Decoder(self.net, len(kept), self.net.max_length, self.memory)
        segments_BT, device = segments_of([len(text) for text in kept]), self.ids_BT.device
        segments_BT = None if segments_BT is None else segments_BT.to(device)
        hidden_BTD, last_B = self.decoder.states(padded(kept, 0).to(device), segments_BT)
        return hidden_BTD[:, -1:] if last_B is None else hidden_BTD[torch.arange(len(kept)), last_B][:, None]


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """Build on the CPU in float32 though ``from_pretrained`` asks for half precision or no memory.

    What a network holds besides its weights (tables of positions) is computed then, and loses nothing.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


class LlmkitModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A network and its head. Raises UserError for a config that describes none, or needs a plugin that is missing."""

    config_class = LlmkitConfig
    base_model_prefix = "net"

    def __init__(self, config: LlmkitConfig) -> None:
        super().__init__(config)
        facts = Config(config.name_or_path or "the config", {OWN: config.llmkit, "vocab_size": config.vocab_size})
        part = described(facts)
        with _in_float32():
            model = LanguageModel.described(part, facts.where)
            self.net = model.parts.backbone(model.head.topology, config.vocab_size)
            self.head: Any = model.head
            self.head.set_info(part["head_info"])
            self.head.build(model.spec["dim"], config.vocab_size)
        for weight in self.parameters():
            weight.data = weight.to(torch.get_default_dtype())
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the network drew its weights when it was built."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.net.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        assert isinstance(value, nn.Embedding)
        self.net.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output matrix where it is one of its own."""
        return self.net.output

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """Return the scores over the vocabulary, (B, T, V)."""
        return F.linear(hidden_BTD, self.net.output_weight_VD, self.net.output_bias_V)

    def encode(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Memory:
        """Return what the encoder makes of ids."""
        return self.net.encode(ids_BT, Sequence.of(ids_BT, segments(mask_BT)))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the model as transformers does, and the file that makes ``trust_remote_code`` work."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, CODE).write_text(code(type(self).__name__), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: saving would copy this module into the folder, which imports it from llmkit instead."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def segments(mask_BT: Tensor | None) -> Tensor | None:
    """Return an attention mask as segments; None: there is no padding."""
    return None if mask_BT is None or bool(mask_BT.all()) else (mask_BT > 0).long()


class LlmkitForCausalLM(LlmkitModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A decoder. Positions follow from the attention mask."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the scores, (B, T, V), and with ``use_cache`` the cache. Raises ValueError beyond the context."""
        cache: Any = DecodingCache(self.net) if use_cache and past_key_values is None else past_key_values
        hidden_BTD = decoded(self.net, input_ids, attention_mask, cache, logits_to_keep)
        logits_BTV = self.scores(hidden_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache)


def decoded(
    net: Backbone, ids_BT: Tensor, mask_BT: Tensor | None, cache: DecodingCache | None, keep: int, memory: Any = None
) -> Tensor:
    """Return the hidden states of the last ``keep`` columns; 0: of all. Raises ValueError beyond the context."""
    if cache is not None:
        real_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT[:, -ids_BT.shape[1] :]
        hidden_BTD = cache.decode(ids_BT, real_BT > 0)
    elif ids_BT.shape[1] <= net.max_length:
        hidden_BTD = net.decode(ids_BT, Sequence.of(ids_BT, segments(mask_BT)), memory=memory)
    else:
        hidden_BTD = ids_BT.new_empty(0, 0)
    if hidden_BTD.shape[1] < (keep or ids_BT.shape[1]):
        raise ValueError(f"the text has {ids_BT.shape[1]} tokens, and the context of the model is {net.max_length}")
    return hidden_BTD[:, -keep:]


class LlmkitForMaskedLM(LlmkitModel):  # type: ignore[no-untyped-call]
    """An encoder that guesses hidden tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> MaskedLMOutput:
        """Return the scores, (B, T, V)."""
        logits_BTV = self.scores(self.head.dense(self.encode(input_ids, attention_mask).x_BSD))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits_BTV)


class LlmkitForSequenceClassification(LlmkitModel):  # type: ignore[no-untyped-call]
    """A classifier of texts or pairs, or a regression, whose output is in the unit of its scores."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the scores of the labels, (B, labels)."""
        batch, segments_BT = {"ids": input_ids}, segments(attention_mask)
        if token_type_ids is not None:
            batch["types"] = token_type_ids
        if segments_BT is not None:  # the head's texts are padded at the right
            order_BT = segments_BT.argsort(dim=-1, descending=True, stable=True)
            batch = {name: value.gather(1, order_BT) for name, value in {**batch, "segments": segments_BT}.items()}
        logits = self.head.scores(self.net, batch)
        if self.config.problem_type == "regression":
            info = self.head.info()
            logits = info["mean"] + info["deviation"] * logits
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Encoder(nn.Module):
    """The encoder of an encoder-decoder, as ``generate`` calls it."""

    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, model: LlmkitForSeq2SeqLM) -> None:
        super().__init__()
        self.encode = model.encode

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Return the hidden states, (B, S, D)."""
        return BaseModelOutput(last_hidden_state=self.encode(input_ids, attention_mask).x_BSD)


class LlmkitForSeq2SeqLM(LlmkitModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """An encoder-decoder."""

    def __init__(self, config: LlmkitConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are what the decoder writes: they are not shifted

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """Return the encoder."""
        return Encoder(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Return the scores of the target, (B, T, V); without its ids they follow from the labels."""
        if encoder_outputs is None:
            assert input_ids is not None, "it needs input_ids or encoder_outputs"
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        x_BSD: Tensor = encoder_outputs[0]
        shape_BS = torch.empty(x_BSD.shape[:2], device=x_BSD.device)
        memory = Memory(x_BSD, Sequence.of(shape_BS, segments(attention_mask)))
        if decoder_input_ids is None:
            assert labels is not None, "it needs decoder_input_ids or labels"
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
        cache: Any = DecodingCache(self.net, memory) if use_cache and past_key_values is None else past_key_values
        hidden_BTD = decoded(self.net, decoder_input_ids, decoder_attention_mask, cache, logits_to_keep, memory)
        logits_BTV, loss = self.scores(hidden_BTD), None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits_BTV, past_key_values=cache, encoder_last_hidden_state=encoder_outputs[0]
        )


AutoConfig.register(OWN, LlmkitConfig)
AutoModelForCausalLM.register(LlmkitConfig, LlmkitForCausalLM)
AutoModelForMaskedLM.register(LlmkitConfig, LlmkitForMaskedLM)
AutoModelForSeq2SeqLM.register(LlmkitConfig, LlmkitForSeq2SeqLM)
AutoModelForSequenceClassification.register(LlmkitConfig, LlmkitForSequenceClassification)
