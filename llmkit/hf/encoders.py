"""Bidirectional architectures: BERT, RoBERTa, DistilBERT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llmkit.hf.architecture import Architecture, Settings, Task
from llmkit.hf.mapping import Weight, linear


class Bert(Architecture):
    """BERT (Devlin et al. 2018, arXiv:1810.04805)."""

    prefix = "bert."
    unused = r"(embeddings\.position_ids|embeddings\.token_type_ids)"
    copies: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    of_heads = r"(cls|pooler|classifier|qa_outputs)\..*"
    skip = 0
    """Rows at the start of the position table that no position has."""

    @property
    def _eps(self) -> float:
        return self.config.number("layer_norm_eps", 1e-12)

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        if c.get("position_embedding_type") not in (None, "absolute"):
            raise c.refuse("with relative positions is not supported")
        if c.flag("is_decoder") or c.flag("add_cross_attention"):
            raise c.refuse("as a decoder is not supported")
        if not c.flag("tie_word_embeddings", True):
            raise c.refuse("with an output matrix of its own is not supported")
        return {
            "attention": {
                **{"name": "multi_head", "num_heads": c.size("num_attention_heads")},
                **{"qk_norm": False, "bias": True},
            },
            "position": {"name": "learned"},
            "feedforward": self.feedforward(str(c.get("hidden_act") or "gelu"), c.size("intermediate_size"), bias=True),
            "norm": {"name": "layer", "eps": self._eps, "bias": True},
            "norm_first": False,
            "embedding_norm": True,
            "token_types": c.size("type_vocab_size", 2),
            "dim": c.size("hidden_size"),
            "num_layers": c.layers("num_hidden_layers"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": True,
            "context": c.size("max_position_embeddings") - self.skip,
        }

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield Weight("embedding.weight", ("embeddings.word_embeddings.weight",))
        yield Weight("position.table.weight", ("embeddings.position_embeddings.weight",), skip=self.skip)
        yield Weight("token_types.weight", ("embeddings.token_type_embeddings.weight",))
        yield from linear("embedding_norm", "embeddings.LayerNorm")
        for i in range(self.config.layers("num_hidden_layers")):
            ours, theirs = f"encoder.{i}", f"encoder.layer.{i}"
            projections = (f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
            yield from linear(f"{ours}.attention.qkv", *projections)
            yield from linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
            yield from linear(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
            yield from linear(f"{ours}.feedforward.inner", f"{theirs}.intermediate.dense")
            yield from linear(f"{ours}.feedforward.out", f"{theirs}.output.dense")
            yield from linear(f"{ours}.feedforward_norm", f"{theirs}.output.LayerNorm")

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        masked = self._masked_lm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
        pooler = (*linear("head.pooler", "pooler.dense"),)
        return {
            "BertForMaskedLM": masked,
            "BertForPreTraining": masked,
            "BertForSequenceClassification": self._classification(*pooler, *linear("head.classifier", "classifier")),
        }

    def _masked_lm(self, dense: str, norm: str, bias: str = "cls.predictions.bias") -> Task:
        if self.config.get("hidden_act", "activation") not in (None, "gelu"):
            raise self.config.refuse("with another activation than gelu in its head is not supported")
        weights = (*linear("head.dense.0", dense), *linear("head.dense.2", norm), Weight("net.output_bias", (bias,)))
        return Task({"name": "masked_lm", "transform": True, "norm_eps": self._eps}, {"output_bias": True}, weights)

    def _classification(self, *weights: Weight) -> Task:
        several = self.config.get("problem_type") == "multi_label_classification"
        head = {"name": "multi_label" if several else "classification", "pool": "pooler"}
        return Task(head, weights=weights, info={"labels": list(self.config.labels())})


class Roberta(Bert):
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): its positions count from the id of padding plus one."""

    prefix = "roberta."
    copies: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    of_heads = r"(lm_head|pooler|classifier|qa_outputs)\..*"

    @property
    def skip(self) -> int:  # type: ignore[override]
        """Rows at the start of the position table that no position has."""
        padding = self.config.content.get("pad_token_id", 1)
        return (padding if type(padding) is int and 0 <= padding < 100 else 1) + 1

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        pooler = (*linear("head.pooler", "classifier.dense"), *linear("head.classifier", "classifier.out_proj"))
        return {
            "RobertaForMaskedLM": self._masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
            "RobertaForSequenceClassification": self._classification(*pooler),
        }


class DistilBert(Bert):
    """DistilBERT (Sanh et al. 2019, arXiv:1910.01108): a BERT without token types and pooler."""

    prefix = "distilbert."
    copies: ClassVar[dict[str, str]] = {"vocab_projector.weight": "embeddings.word_embeddings.weight"}
    of_heads = r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\..*"

    @property
    def _eps(self) -> float:
        return 1e-12

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        if not c.flag("tie_word_embeddings", True):
            raise c.refuse("with an output matrix of its own is not supported")
        return {
            "attention": {"name": "multi_head", "num_heads": c.size("n_heads"), "qk_norm": False, "bias": True},
            "position": {"name": "learned"},
            "feedforward": self.feedforward(str(c.get("activation") or "gelu"), c.size("hidden_dim"), bias=True),
            "norm": {"name": "layer", "eps": self._eps, "bias": True},
            "norm_first": False,
            "embedding_norm": True,
            "dim": c.size("dim"),
            "num_layers": c.layers("n_layers"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": True,
            "context": c.size("max_position_embeddings"),
        }

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield Weight("embedding.weight", ("embeddings.word_embeddings.weight",))
        yield Weight("position.table.weight", ("embeddings.position_embeddings.weight",))
        yield from linear("embedding_norm", "embeddings.LayerNorm")
        for i in range(self.config.layers("n_layers")):
            ours, theirs = f"encoder.{i}", f"transformer.layer.{i}"
            yield from linear(f"{ours}.attention.qkv", *(f"{theirs}.attention.{name}_lin" for name in "qkv"))
            yield from linear(f"{ours}.attention.out", f"{theirs}.attention.out_lin")
            yield from linear(f"{ours}.attention_norm", f"{theirs}.sa_layer_norm")
            yield from linear(f"{ours}.feedforward.inner", f"{theirs}.ffn.lin1")
            yield from linear(f"{ours}.feedforward.out", f"{theirs}.ffn.lin2")
            yield from linear(f"{ours}.feedforward_norm", f"{theirs}.output_layer_norm")

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"DistilBertForMaskedLM": self._masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")}
