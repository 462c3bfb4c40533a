"""The LightningModule: a head, a network built from plugins, and how both are trained."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from llmkit import registry
from llmkit.checkpoint.content import Stored, check_section, compression, refusing, restore_tokenizer, section
from llmkit.checkpoint.weights import check_class, check_shapes, unfit
from llmkit.contracts import Attention, Batch, Feedforward, Head, Norm, Position, Role, Tokenizer
from llmkit.errors import Problem, UserError, blame, note
from llmkit.hf import start as hf
from llmkit.lightning import align_logged_step, batches_begun, build_first, global_seed, logs_this_step
from llmkit.model import mup
from llmkit.model.average import Averaged
from llmkit.model.backbone import Backbone
from llmkit.model.compressed import Chain, check_trainable, rebuild
from llmkit.model.groups import freeze as freeze_parts
from llmkit.model.groups import fused_maps, parameter_groups, parameter_kinds, trained_share
from llmkit.model.initial import Draws, restarted, seed_device
from llmkit.model.loading import Loadable
from llmkit.model.lora import adapt
from llmkit.model.optim import Muon
from llmkit.model.parts import OptimizerFactory, Parts, SchedulerFactory
from llmkit.model.resume import apply_changes, stored_settings
from llmkit.model.sharding import shard
from llmkit.model.step import OptimizerStep
from llmkit.model.teacher import Teacher
from llmkit.model.use import with_length
from llmkit.model.vectors import begin_with_vectors
from llmkit.ops.distillation import Distillation
from llmkit.ops.lora import LoRA
from llmkit.sequence import DecodingOptions


class LanguageModel(Averaged, Loadable):
    """A language model of any head and attention variant.

    Plugins are given as factories: a class, a functools.partial of one, or ``llmkit.plugin("attention", "lstm")``.

    Args:
        head: the task: what is read, the loss, the metrics, the prediction.
        attention: the variant that mixes information along the sequence.
        cross_attention: reads the encoder in an encoder-decoder; None: the attention variant if it can, else the
            default one.
        position: how the network knows the order of positions.
        feedforward: the per-position network of each layer.
        norm: the normalisation.
        dim: width.
        num_layers: depth; in an encoder-decoder, of each side.
        decoder_layers: depth of the decoder of an encoder-decoder; None: ``num_layers``.
        context: most positions of one sequence.
        dropout: dropout on the embeddings and each residual branch.
        norm_first: norm before each part (pre-norm) rather than after the residual (post-norm).
        tie_embeddings: use the embedding matrix as the output matrix.
        embedding_norm: a norm after the embeddings and positions.
        token_types: how many types of tokens have an embedding (2: which text of a pair a token is in); 0: none.
        output_bias: a learned number is added to the score of each token.
        separate_positions: each side of an encoder-decoder has positions of its own, and its own norm after them.
        embedding_scale: what the embeddings are multiplied by before positions are added.
        output_scale: what the last hidden states are multiplied by before they are scored.
        vocab_size: rows of the embedding; None: as many as the tokenizer has ids, which is the least.
        gradient_checkpointing: compute each layer again for its gradient: less memory, about a third more time.
        compile: compile training steps (no others) with torch.compile; "reduce-overhead": as CUDA graphs too, on a GPU.
        optimizer: builds the optimizer from parameter groups; None: AdamW.
        scheduler: builds the schedule from the optimizer, stepped every optimizer step; None: warmup and cosine. An
            argument called ``total_steps`` that was left open is set to the run's number of steps.
        freeze: parts that training leaves as they are: ``embedding``, ``encoder.0``, or a range, ``encoder.0-3``.
        lora: train the network through low-rank adapters of some linear maps instead of its weights, which stay as they
            are; the head is trained as a whole.
        distill: a trained model of any variant and size that this one learns from too; neither its checkpoints nor
            their use need it. None: learns from the data alone.
        layer_decay: what the learning rate is multiplied by for each step down from the head: the last layer once,
            the embeddings once more than the first.
        ema: decay of a moving average of the weights, 0.999, say: validation, checkpoints and the final model have the
            average, while training continues from the weights themselves; None: no average.
        mup_base_dim: maximal update parametrization (Yang et al. 2022, arXiv:2203.03466) relative to this width: a
            learning rate that was found there suits other widths; None: standard parametrization.
        decoding: how text is generated by test, predict and infer; None: the head's own default.
        max_bad_steps: the run stops after this many steps in a row whose loss or gradient is NaN or infinite. None of
            them changes the weights.
        init_from: a checkpoint (of a run folder: its best one) whose tokenizer, and weights where name and shape fit, a
            new run begins with, or a model of Hugging Face, ``hf:NAME_OR_FOLDER[@REVISION]``. It may be of another
            head. A run that is resumed does not read it, and the model that comes out does not need it.
        adapter: a folder, or a name on the hub, with an adapter of peft for the model of Hugging Face that
            ``init_from`` names: with ``lora`` the adapters begin with it, else it is merged into the weights.
        word_vectors: a text file of word vectors (GloVe's format) that the embedding of a new run begins with; for the
            tokenizer ``word``, mostly. ``dim`` has to be their width.
    """

    def __init__(
        self,
        head: Callable[[], Head] | None = None,
        attention: Callable[[int, Role], Attention] | None = None,
        cross_attention: Callable[[int, Role], Attention] | None = None,
        position: Callable[[int, int], Position] | None = None,
        feedforward: Callable[[int], Feedforward] | None = None,
        norm: Callable[[int], Norm] | None = None,
        dim: int = 256,
        num_layers: int = 4,
        decoder_layers: int | None = None,
        context: int = 256,
        dropout: float = 0.0,
        norm_first: bool = True,
        tie_embeddings: bool = True,
        embedding_norm: bool = False,
        token_types: int = 0,
        output_bias: bool = False,
        separate_positions: bool = False,
        embedding_scale: float = 1.0,
        output_scale: float = 1.0,
        vocab_size: int | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | Literal["reduce-overhead"] = False,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        freeze: list[str] | None = None,
        lora: LoRA | None = None,
        distill: Distillation | None = None,
        layer_decay: float = 1.0,
        ema: float | None = None,
        mup_base_dim: int | None = None,
        decoding: DecodingOptions | None = None,
        max_bad_steps: int = 5,
        init_from: str | None = None,
        adapter: str | None = None,
        word_vectors: str | None = None,
    ) -> None:
        super().__init__()
        self.parts = Parts(locals())
        self.head: Head = self.parts.build("head")
        if decoding is not None:
            # A checkpoint has plain data.
            given = DecodingOptions(**decoding) if isinstance(decoding, Mapping) else decoding
            self.head.decoding = with_length(given, self.head.decoding)
        self.uses_muon = registry.target_of(self.parts.factories["optimizer"]) is Muon
        self.spec: dict[str, Any] = {**self.parts.spec, "decoding": dataclasses.asdict(self.head.decoding)}
        self.net: Backbone | None = None
        self.kinds: dict[str, str] = {}
        self.lr_scales: dict[str, float] = {}
        self.tokenizer: Tokenizer | None = None
        self.head_ready = False
        self.config: dict[str, Any] = {}
        self.source = "the checkpoint"
        self.val_metrics, self.test_metrics = nn.ModuleDict(), nn.ModuleDict()
        self.results: dict[str, Tensor] = {}
        self.last_loss = torch.tensor(float("nan"))
        self._step = OptimizerStep(max_bad_steps)
        self._stored_step, self._stored_settings = dict[str, Any](), dict[str, Any]()
        self._initial: Stored | None = None
        self.compression: Chain = []
        self.word_vectors = word_vectors
        self.teacher: Teacher | None = None
        if init_from is not None or adapter is not None:
            with blame("model.init_from"):
                self._initial, self.tokenizer = hf.starting_point(init_from, adapter, apart=lora is not None)
        if isinstance(self._initial, hf.Published):
            mup.check_published(self._initial.part["model"], self.spec)
        elif self._initial is not None:
            self.compression = compression(self._initial.part)
            check_trainable(self.compression, "model.init_from", init_from)
        self.parts.try_out(self.head.topology)

    # Construction

    def configure_callbacks(self) -> list[pl.Callback]:
        """Have the network built before the callbacks of the trainer are set up."""
        build_first(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Take tokenizer and label names from the data module, unless a checkpoint brought them."""
        data = getattr(self.trainer, "datamodule", None)
        self.check_tokenizer(getattr(data, "tokenizer_class", None))
        if self.tokenizer is None:
            if data is None or getattr(data, "tokenizer", None) is None:
                raise UserError("the model has no tokenizer: train with llmkit.DataModule, or load a checkpoint")
            self.tokenizer = data.tokenizer
        self.head_ready = True
        if stage == "fit":
            self.load_teacher()

    def load_teacher(self) -> None:
        """Load the model that this one learns from, if there is one. Raises UserError when it cannot be read."""
        if self.spec["distill"] is not None and self.teacher is None:
            self.teacher = Teacher.load(Distillation(**self.spec["distill"]), type(self).load, self.global_rank)
            self.spec["distill"] = self.teacher.described()

    def check_tokenizer(self, configured: type | None) -> None:
        """Raise UserError when the data's configured tokenizer is of another class than that of ``init_from``."""
        if self._initial is not None and isinstance(configured, type):  # of another callable the class is not known
            check_class(self._initial, type(self.tokenizer), configured)

    def configure_model(self) -> None:
        """Build network, head and metrics, once their sizes are known."""
        if self.net is not None:
            return
        if isinstance(self._initial, hf.Published):  # before memory is taken for sizes that no weight confirms
            hf.check_fits_network(self.meta_network().state_dict(), self._initial)
        with restarted():
            self.net = self._new_network()
            with Draws().named("head"):
                base = self._base()
                self._build_head(self.head)
        if base is not None:
            mup.scale_initial(self.head, base["head"])
        self.net.quieten(self.head.scored_share)
        rebuild(self.net, self.head, self.compression)
        if self._initial is not None:
            taken = hf.begin(self.state_dict(), self.spec, self._initial)
            if self.global_rank == 0:
                note(taken)
        with restarted():
            adapt(self.net, self.spec["lora"], Draws())
        if isinstance(self._initial, hf.Published) and self._initial.adapter is not None:
            self._initial.adapter.begin(self.net)
        self._initial = None
        if self.spec["freeze"] and (frozen := freeze_parts(self, self.spec["freeze"])) and self.global_rank == 0:
            note(f"model.freeze: {frozen:,} parameters stay as they are")
        if self.spec["lora"] and self.global_rank == 0:
            note(f"model.lora: trains {trained_share(self)}")
        begin_with_vectors(self.net, self._trained_tokenizer, self.word_vectors, self.global_rank)
        self.val_metrics = self.parts.metrics(self.head, "validation")
        self.test_metrics = self.parts.metrics(self.head, "test")
        self.kinds = parameter_kinds(self, hidden=self.uses_muon)
        self.lr_scales = {} if base is None else mup.lr_scales(mup.growth(self, base), self.kinds, self.uses_muon)
        if self.spec["compile"]:
            self.net.compile(mode=None if self.spec["compile"] is True else self.spec["compile"])
        if self.device_mesh is not None:
            shard(self.net, self.head, self.device_mesh)

    def meta_network(self, adapted: bool = False) -> Backbone:
        """Return the whole network without memory (on the meta device), however the weights of this one are sharded."""
        with torch.device("meta"):
            return adapt(self._new_network(), self.spec["lora"] if adapted else None, Draws())

    def _new_network(self) -> Backbone:
        return self.parts.backbone(self.head.topology, self._vocab_size)

    @property
    def _vocab_size(self) -> int:
        return self.parts.vocab_size(self._trained_tokenizer)

    def _build_head(self, head: Head, dim: int | None = None) -> None:
        head.set_tokenizer(self._trained_tokenizer)
        head.build(self.spec["dim"] if dim is None else dim, self._vocab_size)

    def _base(self) -> nn.ModuleDict | None:
        """Return network and head at the base width of muP; None: there is none, or it is the width."""
        dim = self.spec["mup_base_dim"]
        if dim is None or dim == self.spec["dim"]:
            return None
        head, state = copy.deepcopy(self.head), torch.get_rng_state()
        self._build_head(head, dim)
        torch.set_rng_state(state)
        return nn.ModuleDict({"net": self.parts.base_backbone(head.topology, self._vocab_size), "head": head})

    # Training

    def on_fit_start(self) -> None:
        """Take the teacher, which is not part of the model, to its device and precision."""
        super().on_fit_start()
        if self.teacher is not None:
            self.teacher.check(self)
            self.teacher.model.to(device=self.device, dtype=self.dtype)

    def on_train_start(self) -> None:
        """Resume the optimizer step that the checkpoint was saved in, with the settings of now."""
        apply_changes(self.trainer, self.parts, self._stored_settings, self.groups())
        self._step.restore(self, self._stored_step)
        self._stored_step, self._stored_settings = {}, {}
        super().on_train_start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make the randomness of each step a function of seed, step and process, so that resuming is exact."""
        align_logged_step(self.trainer)
        seed_device(hash((global_seed(), batches_begun(self.trainer), self.global_rank)) % 2**63, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, or what adds up to the mean of a step of several batches."""
        self._step.batch = batch
        teacher, head = self.teacher, self.head
        summed = head.loss(self.network, batch) if teacher is None else teacher.loss(head, self.network, batch)
        loss, self.last_loss = self._step.loss(self, summed)
        # One self.log costs more than a small training step, so it is called only when its value will be written.
        if logs_this_step(self.trainer):
            self.log("train_loss", self.last_loss)
            group = self.trainer.optimizers[0].param_groups[0]
            self.log("lr", group["lr"] / group.get("lr_scale", 1.0))
        return loss

    def groups(self) -> list[dict[str, Any]]:
        """Return the groups of parameters that the optimizer gets."""
        maps = fused_maps(self) if self.uses_muon else None
        return parameter_groups(self, self.kinds, maps, self.spec["layer_decay"], self.lr_scales)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over parameter groups and its schedule, stepped every optimizer step."""
        if self.uses_muon and isinstance(self.trainer.strategy, FSDPStrategy):
            raise UserError(Problem("model.optimizer", "muon needs whole matrices: use adamw, or DDP instead of FSDP"))
        optimizer = self.parts.optimizer(self.groups())
        total = self.trainer.estimated_stepping_batches
        if total in (float("inf"), -1):  # -1: a stream, whose end Lightning does not know
            raise UserError(Problem("trainer.max_steps", "must be set: the schedule has to know how long the run is"))
        scheduler = self.parts.schedule(optimizer, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Complete the step's gradient and clip it, by its norm as torch does, or by value as Lightning does."""
        by_value = gradient_clip_algorithm == "value"
        self._step.finish(self, optimizer, None if by_value else gradient_clip_val)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Checkpoints

    def restore(self, stored: Stored) -> None:
        """Take over the tokenizer, label names and config that a checkpoint carries.

        Raises UserError when they are not what the classes wrote, or the weights are of other shapes than the model's.
        """
        where, part = f"checkpoint {stored.path}", stored.part
        self.tokenizer = restore_tokenizer(part, where)
        with refusing(f"{where}: its head_info does not fit {type(self.head).__name__}"):
            self.head.set_info(part["head_info"])
            if json.dumps(self.head.info()) != json.dumps(part["head_info"]):
                raise UserError("it comes back as something else")
        self.head_ready = True
        self.config, self.source = part["config"], where
        self.compression = compression(part)
        self._check_weights(stored)

    def _check_weights(self, stored: Stored) -> None:
        """Compare a checkpoint's weights with those of the whole model without memory. Raises UserError."""
        with refusing(f"checkpoint {stored.path} describes no model"):
            net, head, known = self.meta_network(adapted=True), copy.deepcopy(self.head), True
            try:
                with torch.device("meta"):
                    self._build_head(head)
            except NotImplementedError:  # an operation that needs memory: loading the head's weights will say
                head, known = copy.deepcopy(self.head), False
                if self.compression:
                    self._build_head(head)
            rebuild(net, head, self.compression)
            own = {f"net.{name}": value for name, value in net.state_dict().items()}
            own |= {f"head.{name}": value for name, value in head.state_dict().items()} if known else {}
        check_shapes(own, stored)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in all that is needed to use the model without its config file, and a step that is not done yet."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["step"] = self._step.state(self)
        checkpoint["llmkit"] = section(self.spec, self._trained_tokenizer, self.head, self.config, self.compression)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. Raises UserError, in one line, when they are of another model."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise unfit(self.source, error) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not ours or of a newer format; remember the step that it is in the middle of."""
        check_section(checkpoint, "the checkpoint")
        self._stored_step = checkpoint.get("step") or {}
        super().on_load_checkpoint(checkpoint)
        self._stored_settings = stored_settings(self.trainer, self.spec, checkpoint)


load = LanguageModel.load
