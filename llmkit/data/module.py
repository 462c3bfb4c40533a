"""The DataModule: settings to loaders, by way of the cache."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from tqdm import tqdm  # type: ignore[import-untyped]

from llmkit import registry
from llmkit.contracts import Head, Stage, Tokenizer
from llmkit.data import cache
from llmkit.data.batches import EvaluationOrder, Loader, Position, TrainingOrder, world
from llmkit.data.corpus import Corpus
from llmkit.data.examples import Examples, Features, note_truncated
from llmkit.data.formats import Format, Options
from llmkit.data.learn import learn_head, train_tokenizer
from llmkit.data.prepare import Encoder
from llmkit.data.rows import OnBadRow, Skipped
from llmkit.data.sources import Files
from llmkit.data.stream import SAMPLE, Stream, take
from llmkit.data.tokens import Blocks, Packed, read_tokens, write_tokens
from llmkit.errors import Problem, UserError, blame, note
from llmkit.lightning import global_seed

STAGES: dict[str | None, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class DataModule(pl.LightningDataModule):
    """Rows from files or the hub, tokenized once, cached by content, served in finished batches.

    Args:
        train: training data: a file, a glob pattern, a list of them, or ``{field: file}`` for parallel line files
            (line n of each file is row n). With ``source``: the name of a split.
        validation: the same for validation; without it a share of ``train`` is set aside.
        test: the same for testing.
        predict: the same for predicting; only the head's inputs are read, and rows keep their order.
        source: a data set for Hugging Face ``datasets``: its name on the hub, or a folder. The splits default to
            ``train``, ``validation`` and ``test``, where it has them.
        subset: which configuration of ``source``.
        format: how files are read; ``auto`` goes by the suffix (unknown ones are text), or is ``lines`` with a
            ``pattern``. Cells of CSV and TSV are strings; TSV has no quoting. JSON: one object per line, or one list.
            ``conll``: a word per line with its tag, an empty line after each sentence; the columns are lists.
            ``squad``: questions about paragraphs in SQuAD's JSON, with the columns of the hub's ``squad``.
        pattern: regular expression that a whole line of format ``lines`` or ``conll`` must match; its named groups are
            the columns. Without it, column ``tokens`` is the first field of a ``conll`` line, ``tags`` the last one.
        column_names: the columns of CSV or TSV files without a header.
        columns: the column of each of the head's fields; default: the field's name.
        encoding: encoding of text files.
        on_bad_row: what to do with a row that cannot be used: a line that is not JSON, is invalid in the encoding or
            does not match the pattern; a table's row with too few or too many cells; a missing column; an empty (null)
            cell; a value that should be text but is not; a row that the head refuses. ``error`` stops and names file
            and row; ``skip`` leaves out these rows (or, of a text file that is one document, these lines) and reports
            how many there were. A file that cannot be read at all is always an error.
        documents: what a document is in a text file, for a head that joins its rows: the file (line ends kept), each
            non-empty line, or every line, of which an empty one is an end of a document alone. For other heads each
            non-empty line is a row.
        validation_share: share of ``train`` set aside when there is no ``validation``: random documents or rows, or
            the end of the text if there is only one. 0: no validation.
        tokenizer: builds the tokenizer; it is trained on the training part, unless it is pretrained.
        pack: for a head that joins its rows: each document begins with ``bos`` and does not see the others.
        streaming: tokenize ``train`` while it is read, not ahead; set ``trainer.max_steps``. Tokenizer and labels are
            then learned from the first 10,000 rows (20 million characters). Without ``validation`` the first 1,000
            rows (2 million characters) are set aside before that.
        shuffle_buffer: rows (or blocks) of a stream that are shuffled together.
        batch_size: rows of a batch.
        batch_tokens: most tokens of a batch, including padding; replaces ``batch_size`` in training and evaluation.
        num_workers: worker processes of each loader (a hub stream is read by at most one).
        seed: seed of the order of training data; None: that of ``seed_everything``.
        cache_dir: folder of the cache; default $LLMKIT_CACHE, else ~/.cache/llmkit.

    Raises:
        UserError: data that is missing, is malformed or lacks the head's fields.
    """

    allow_zero_length_dataloader_with_multiple_devices = True  # fewer rows than ranks are no reason to stop

    def __init__(
        self,
        train: str | list[str] | dict[str, str] | None = None,
        validation: str | list[str] | dict[str, str] | None = None,
        test: str | list[str] | dict[str, str] | None = None,
        predict: str | list[str] | dict[str, str] | None = None,
        source: str | None = None,
        subset: str | None = None,
        format: Format = "auto",
        pattern: str | None = None,
        column_names: list[str] | None = None,
        columns: dict[str, str] | None = None,
        encoding: str = "utf-8",
        on_bad_row: OnBadRow = "error",
        documents: Literal["file", "line", "every_line"] = "file",
        validation_share: float = 0.1,
        tokenizer: Callable[[], Tokenizer] | None = None,
        pack: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 4096,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "batch_tokens": batch_tokens, "shuffle_buffer": shuffle_buffer}
        for name, value in {**sizes, "num_workers": num_workers}.items():
            least = int(name in sizes)
            if value is not None and value < least:
                raise UserError(Problem(f"data.{name}", f"must be at least {least}, got {value}"))
        if not 0 <= validation_share < 1:
            raise UserError(Problem("data.validation_share", f"must be 0 or more and below 1, got {validation_share}"))
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise UserError(Problem("data.encoding", f"{error}")) from error
        self._folder = cache.root(cache_dir)
        given: dict[Stage, Files] = {"train": train, "validation": validation, "test": test, "predict": predict}
        options = Options(format, pattern, column_names, encoding)
        self._corpus = Corpus(
            given, source, subset, options, on_bad_row, columns, documents, validation_share, streaming, self._folder
        )
        self._factory = tokenizer
        self.pack, self.streaming, self.shuffle_buffer = pack, streaming, shuffle_buffer
        self.batch_size, self.batch_tokens, self.num_workers = batch_size, batch_tokens, num_workers
        # Lightning leaves the seed of seed_everything in the environment.
        self.seed = global_seed() if seed is None else seed
        self._head: Head | None = None
        self._context = 0
        self._tokenizer: Tokenizer | None = None
        self._head_ready = self._learned = False
        self._splits: dict[Stage, Blocks | Examples] = {}
        self._position: Position | None = None
        self._noted: set[str] = set()  # the notes about skipped rows so far

    def bind(self, head: Head, context: int, tokenizer: Tokenizer | None = None, head_ready: bool = False) -> None:
        """Set what the data is prepared for. ``setup`` calls it with the trainer's module's attributes of these names.

        Args:
            head: encodes and collates rows.
            context: most tokens of one row.
            tokenizer: a trained one, from a checkpoint; None: build and train the configured one.
            head_ready: the head has been restored from a checkpoint and need not learn from the training rows.
        """
        if self.pack and head.layout != "blocks":
            text = f"is for heads that join their rows, and {type(head).__name__} does not"
            raise UserError(Problem("data.pack", text))
        self._head, self._context, self._tokenizer, self._head_ready = head, context, tokenizer, head_ready
        self._learned, self._splits = False, {}

    @property
    def head(self) -> Head:
        """The head this data is for. Raises RuntimeError before ``bind``."""
        if self._head is None:
            raise RuntimeError("call bind(head, context) before using the data")
        return self._head

    @property
    def tokenizer_class(self) -> type | None:
        """The class of the configured tokenizer, if one is configured."""
        return None if self._factory is None else registry.target_of(self._factory)

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer. Raises RuntimeError before ``setup``."""
        if not self._learned or self._tokenizer is None:
            raise RuntimeError("call setup() before using the tokenizer")
        return self._tokenizer

    def prepare_data(self) -> None:
        """Fill the cache with everything that the stage needs."""
        state = self.trainer.state.fn if self.trainer else None
        self.setup(None if state is None else str(state.value))

    def setup(self, stage: str | None = None) -> None:
        """Load tokenizer, labels and the splits of a stage (None: all); create what is not in the cache yet."""
        module: Any = getattr(self.trainer, "lightning_module", None)
        if getattr(module, "head", self._head) is not self._head:
            self.bind(module.head, module.context, module.tokenizer, module.head_ready)
        self._learn()
        for name in STAGES.get(stage, ("train", "validation", "test", "predict")):
            if self._corpus.has(name) and not (name == "train" and self.streaming):
                self.split(name)

    def bytes_per_token(self, stage: Stage) -> float:
        """Return the UTF-8 bytes of text for each target of a split; NaN where rows are not joined to a stream."""
        split = None if stage == "train" and self.streaming else self.split(stage)
        return split.bytes_per_token if isinstance(split, Blocks) else float("nan")

    def _learn(self) -> None:
        """Train or load the tokenizer, and let the head learn its labels."""
        if self._learned:
            return
        head = self.head
        if self._tokenizer is None:
            with blame("data.tokenizer"):
                self._tokenizer = (self._factory or registry.resolve("tokenizer", None))()
        untrained = not self._tokenizer.trained
        unlearned = not self._head_ready and type(head).learn is not Head.learn
        if untrained or unlearned:
            reader = self._corpus.reader("train", head)
            if self.streaming:
                read = reader.read
                reader = reader._replace(read=lambda: take(read(), SAMPLE), identity=[*reader.identity, SAMPLE])
            if untrained:
                train_tokenizer(self._tokenizer, self._factory, head, reader, self._folder)
            if unlearned:
                learn_head(head, reader, self._folder)
        self._learned = True

    def split(self, stage: Stage) -> Blocks | Examples:
        """Return the prepared rows of a stage."""
        if stage not in self._splits:
            self._learn()
            self._splits[stage] = self._prepare(stage)
        return self._splits[stage]

    def _prepare(self, stage: Stage) -> Blocks | Examples:
        head, tokenizer = self.head, self.tokenizer
        reader = self._corpus.reader(stage, head)
        encoder = Encoder(head, tokenizer, self._context, reader.joins)

        def write(folder: Path) -> None:
            refused = Skipped(reader.source.key, reader.skipped.policy)
            with tqdm(desc=f"encoding {stage}", unit=" rows", delay=2, disable=None, leave=False) as bar:
                groups = encoder.groups(reader.read(), refused, bar.update)
                first = list(islice(groups, 1))
                if not first:
                    raise reader.empty(refused if refused.count else reader.skipped)
                if reader.joins:
                    write_tokens(folder, chain.from_iterable(chain(first, groups)), tokenizer, self.pack, reader.joins)
                else:
                    Features.of(chain(first, groups)).write(folder)
            summaries = [skipped.summary(reader.skipped.seen) for skipped in (reader.skipped, refused)]
            cache.write_text(folder / "skipped.json", json.dumps([text for text in summaries if text]))

        used = [cache.identity(head, self._folder), head.info(), self._context]
        state = [cache.identity(tokenizer, self._folder)[:2], tokenizer.to_state()]
        key = cache.digest([stage == "predict", reader.joins, self.pack, reader.identity, used, state])
        path = cache.entry(self._folder, key, write)
        for summary in json.loads((path / "skipped.json").read_text()):
            text = f"{reader.source.key}: {summary}"
            # Once: training and validation rows from the same files skip the same ones.
            if world()[0] == 0 and text not in self._noted:
                note(text)
            self._noted.add(text)
        if not reader.joins:
            features = Features.read(path)
            if world()[0] == 0:
                note_truncated(
                    head, features.values.get("truncated"), features.count, self._context, f" in data.{stage}"
                )
            return Examples(features, head, tokenizer, self.batch_size, self.batch_tokens)
        tokens = read_tokens(path)
        if tokens.targets == 0:
            raise UserError(Problem(reader.source.key, f"fewer than two tokens in {', '.join(reader.source.names)}"))
        kind = Packed if self.pack else Blocks
        return kind(tokens, self._context, self._rows_of_a_batch, tokenizer.pad_id)

    @property
    def _rows_of_a_batch(self) -> int:
        """Rows of a batch of blocks."""
        return self.batch_size if self.batch_tokens is None else max(1, self.batch_tokens // self._context)

    # Loaders

    def train_dataloader(self) -> Loader:
        """Return the loader of training batches, which begins at the current position of training."""
        position = self._training_position()
        if self.streaming:
            loader = self._stream()
            position.length = None
        else:
            split = self.split("train")
            overfit = bool(getattr(self.trainer, "overfit_batches", 0))
            order = TrainingOrder(split.training_order, split.num_batches, split.training_rows, self.seed, overfit)
            self._note_rows(split)
            loader = Loader(split, self.num_workers, sampler=order)
            position.length = len(order)
        loader.position = position
        return loader

    def _note_rows(self, split: Blocks | Examples) -> None:
        """Note, once, how many rows ``batch_tokens`` comes to: texts may be far shorter than one expects."""
        if not isinstance(split, Examples) or split.batch_tokens is None:
            return
        rows, batches = split.training_rows / split.num_batches, split.num_batches
        text = (
            f"data.batch_tokens {split.batch_tokens:,}: a batch holds {rows:,.0f} rows on average, "
            f"an epoch {batches:,} batch{'es' * (batches > 1)}"
        )
        if world()[0] == 0 and text not in self._noted:
            note(text)
        self._noted.add(text)

    def _training_position(self) -> Position:
        if self._position is None or self.trainer is None or self._position.trainer is not self.trainer:
            self._position = Position(self.trainer)
        return self._position

    def state_dict(self) -> dict[str, int]:
        """Return the position of training, for the checkpoint."""
        return {} if self._position is None else self._position.state()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the position that ``state_dict`` returned. (Lightning does not always restore a loader's own.)"""
        self._training_position().resume(**state)

    def _stream(self) -> Loader:
        reader = self._corpus.reader("train", self.head)
        reader.check()
        rank, size = world()
        if size > 1 and self.trainer and self.trainer.max_steps == -1:
            raise UserError(Problem("trainer.max_steps", "is needed with data.streaming and several processes"))
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError(Problem("trainer.overfit_batches", "cannot be combined with data.streaming"))
        stream = Stream(
            reader.read, reader.skipped, Encoder(self.head, self.tokenizer, self._context, reader.joins),
            self._rows_of_a_batch if reader.joins else self.batch_size, self.batch_tokens, self.pack,
            self.shuffle_buffer, self.seed, rank, size, endless=size > 1,
        )  # fmt: skip
        # ``datasets`` would divide its files among several workers a second time.
        workers = min(self.num_workers, 1) if self._corpus.source is not None else self.num_workers
        return Loader(stream, workers)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return the loader of the validation split, or an empty list without one."""
        return self._evaluation("validation") if self._corpus.has("validation") else []

    def test_dataloader(self) -> Loader:
        """Return the loader of the test split."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Loader:
        """Return the loader of the rows to predict, in their order."""
        split = self.split("predict")
        assert isinstance(split, Examples)
        return Loader(split, self.num_workers, sampler=EvaluationOrder(split.reading_order, spread=False))

    def _evaluation(self, stage: Stage) -> Loader:
        split = self.split(stage)
        return Loader(split, self.num_workers, sampler=EvaluationOrder(split.evaluation_order))
