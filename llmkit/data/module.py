"""The DataModule: settings to loaders, by way of the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from llmkit import registry
from llmkit.contracts import Head, Stage, Tokenizer
from llmkit.data import cache, identity
from llmkit.data.balance import Balanced
from llmkit.data.batches import EvaluationOrder, Loader, Position, TrainingOrder, world
from llmkit.data.corpus import Columns, Corpus, Reader
from llmkit.data.examples import Examples, Features, note_features
from llmkit.data.fingerprints import Fingerprints, shared_rows
from llmkit.data.learn import learn_head, train_tokenizer
from llmkit.data.opening import Format, Options
from llmkit.data.parts import Shares, checked_limits
from llmkit.data.prepare import Encoder, with_text
from llmkit.data.progress import Step
from llmkit.data.rows import OnBadRow, Skipped
from llmkit.data.sources import datasets
from llmkit.data.stream import HELD_OUT, SAMPLE, Stream, take
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
            (line n of each file is row n); ``{name: mqar, pairs: 8}``: a plugin. With ``source``: the name of a split.
        validation: the same; without it a share of ``train`` is set aside. ``{length: 256}``: changes a plugin's.
        test: the same for testing.
        predict: the same for predicting; only the head's inputs are read, and rows keep their order.
        source: a data set for Hugging Face ``datasets``: its name on the hub, or a folder. The splits default to
            ``train``, ``validation`` and ``test``, where it has them.
        subset: which configuration of ``source``.
        format: how files are read; ``auto`` goes by the suffix, that of a compressed file before ``.gz``, ``.bz2``,
            ``.xz``, ``.zst`` or ``.zip``; other files are text, or ``lines`` with a ``pattern``. Cells of CSV
            and TSV are strings; TSV has no quoting. JSON: one object per line, or one list.
            ``conll``: a word per line with its tag, an empty line after each sentence; the columns are lists.
            ``squad``: questions about paragraphs in SQuAD's JSON, with the columns of the hub's ``squad``.
        pattern: regular expression that a whole line of format ``lines`` or ``conll`` must match; its named groups are
            the columns. Without it, column ``tokens`` is the first field of a ``conll`` line, ``tags`` the last one.
        delimiter: the character between the cells of CSV; None: a comma.
        column_names: the columns of CSV or TSV files without a header.
        columns: the column of each of the head's fields; default: the field's name. ``translation.en`` is the value
            ``en`` of a column that holds mappings. A list of columns: a text of them all, one below the other. A
            mapping under the name of a split (``test: {text: body}``): other columns in that split.
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
            the end of each text if they are few or of very different sizes. A row whose label only rows set aside
            would have stays in the training part. 0: no validation.
        test_share: share of ``train`` set aside as ``test``, in the same way.
        folds: cut ``train`` into this many random parts of equal size, one of which is ``test``: for data that are
            scored by cross-validation.
        fold: which of the ``folds``, from 0.
        limit: the most rows (or documents that are joined) of each split that are used, or of those in a mapping
            (``{train: 1000}``): random ones, and a larger limit adds to them. All rows are predicted.
        tokenizer: builds the tokenizer; it is trained on the training part, unless it is pretrained.
        pack: documents of a head that joins its rows, or examples of ``completion``, share rows, and none sees another.
        streaming: tokenize ``train`` while it is read, not ahead; set ``trainer.max_steps``. Tokenizer and labels are
            then learned from the first 10,000 rows (20 million characters). Without ``validation`` the first 1,000
            rows (2 million characters) are set aside before that; their labels are learned too.
        shuffle_buffer: rows (or blocks) of a stream that are shuffled together.
        batch_size: rows of a batch.
        batch_tokens: most tokens of a batch, including padding; replaces ``batch_size`` in training and evaluation.
        balance: how evenly the classes of a classifier are trained on: training rows are drawn with replacement, a
            class of n rows in proportion to n ** (1 - balance). 1: all equally often; 0: each row once an epoch.
        num_workers: worker processes of each loader (a hub stream is read by at most one).
        seed: seed of the order of training data; None: that of ``seed_everything``.
        cache_dir: folder of the cache; default $LLMKIT_CACHE, else ~/.cache/llmkit.

    Raises:
        UserError: data that is missing, is malformed or lacks the head's fields.
    """

    allow_zero_length_dataloader_with_multiple_devices = True  # fewer rows than ranks are no reason to stop

    def __init__(
        self,
        train: str | list[str] | dict[str, Any] | None = None,
        validation: str | list[str] | dict[str, Any] | None = None,
        test: str | list[str] | dict[str, Any] | None = None,
        predict: str | list[str] | dict[str, Any] | None = None,
        source: str | None = None,
        subset: str | None = None,
        format: Format = "auto",
        pattern: str | None = None,
        delimiter: str | None = None,
        column_names: list[str] | None = None,
        columns: Columns | None = None,
        encoding: str = "utf-8",
        on_bad_row: OnBadRow = "error",
        documents: Literal["file", "line", "every_line"] = "file",
        validation_share: float = 0.1,
        test_share: float = 0.0,
        folds: int | None = None,
        fold: int = 0,
        limit: int | dict[str, int] | None = None,
        tokenizer: Callable[[], Tokenizer] | None = None,
        pack: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 4096,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        balance: float = 0.0,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("batch_size", "batch_tokens", "shuffle_buffer", "num_workers"):
            value, least = self.arguments[name], int(name != "num_workers")
            if value is not None and value < least:
                raise UserError(Problem(f"data.{name}", f"must be at least {least}, got {value}"))
        shares = Shares.checked(validation_share, test_share, folds, fold, has_test=test is not None)
        limits = checked_limits(limit)
        if not 0 <= balance <= 1:
            raise UserError(Problem("data.balance", f"must be from 0 to 1, got {balance}"))
        if streaming and (balance or shares.cut_test or limits):
            key = "balance" if balance else "limit" if limits else "folds" if folds else "test_share"
            raise UserError(Problem(f"data.{key}", "cannot be combined with data.streaming"))
        self._folder = cache.root(cache_dir)
        given = datasets({"train": train, "validation": validation, "test": test, "predict": predict})
        options = Options(format, pattern, column_names, encoding, delimiter)
        self._corpus = Corpus(
            given, source, subset, options, on_bad_row, columns, documents, shares, limits, streaming, self._folder
        )
        self._factory, self.balance = tokenizer, balance
        self.pack, self.streaming, self.shuffle_buffer = pack, streaming, shuffle_buffer
        self.batch_size, self.batch_tokens, self.num_workers = batch_size, batch_tokens, num_workers
        self._head: Head | None = None
        self._tokenizer: Tokenizer | None = None
        self._context, self._head_ready, self._learned = 0, False, False
        self._splits: dict[tuple[Stage, int, int | None], Blocks | Examples] = {}
        self._position: Position | None = None
        self.blank_rows: list[int] = []
        """The numbers of the rows to predict that have no text: they get no answer, and keep their place."""
        self._entries: dict[Stage, Path] = {}  # the folders in the cache of those splits
        self._noted: set[str] = set()  # the notes about rows so far

    def bind(self, head: Head, context: int, tokenizer: Tokenizer | None = None, head_ready: bool = False) -> None:
        """Set what the data is prepared for. ``setup`` calls it with the trainer's module's attributes of these names.

        Args:
            head: encodes and collates rows.
            context: most tokens of one row.
            tokenizer: a trained one, from a checkpoint; None: build and train the configured one.
            head_ready: the head has been restored from a checkpoint and need not learn from the training rows.
        """
        if self.pack and head.layout != "blocks" and not getattr(head, "packs", False):
            text = f"is for completion and heads that join their rows, and {type(head).__name__} does not"
            raise UserError(Problem("data.pack", text))
        self._head, self._context, self._tokenizer, self._head_ready = head, context, tokenizer, head_ready
        self._learned, self._splits, self._entries = False, {}, {}

    @property
    def seed(self) -> int:
        """The seed of the order of training data: where none was given, that of ``seed_everything``."""
        given: int | None = self.arguments["seed"]
        return global_seed() if given is None else given

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
        if world()[0] == 0:
            self._note_duplicates()

    def _note_duplicates(self) -> None:
        """Note the rows of validation and test that are in the training part too."""
        train = self._entries.get("train")
        if train is None and "test" in self._entries and self._corpus.has("train") and not self.streaming:
            with suppress(UserError):  # files that are not there any more
                key = self._key("train", self._corpus.reader("train", self.head))
                train = self._folder / key if key else None
        for text in shared_rows(train, self._entries, self.head.inputs) if train else ():
            self._note_once(text)

    def _note_once(self, text: str) -> None:
        """Print a note: training and validation rows from the same files skip the same ones."""
        if world()[0] == 0 and text not in self._noted:
            note(text)
        self._noted.add(text)

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
            reader = labelled = self._corpus.reader("train", head)
            if self.streaming:
                read = reader.read
                reader = reader._replace(read=lambda: take(read(), SAMPLE), identity=[*reader.identity, SAMPLE])
                # Labels of the rows set aside at the start too: a head refuses rows whose label it does not know.
                most = (HELD_OUT[0] + SAMPLE[0], HELD_OUT[1] + SAMPLE[1])
                labelled = reader._replace(read=lambda: take(read(skip=0), most), identity=[*reader.identity, most])
            if untrained:
                train_tokenizer(self._tokenizer, self._factory, head, reader, self._folder)
            if unlearned:
                learn_head(head, labelled, self._folder)
        self._learned = True

    def split(self, stage: Stage) -> Blocks | Examples:
        """Return the prepared rows of a stage."""
        key = (stage, self.batch_size, self.batch_tokens)  # sizes that Lightning's Tuner may change
        if key not in self._splits:
            self._learn()
            self._splits[key] = self._prepare(stage)
        return self._splits[key]

    def _prepare(self, stage: Stage) -> Blocks | Examples:
        head, tokenizer = self.head, self.tokenizer
        reader = self._corpus.reader(stage, head)
        encoder = Encoder(head, tokenizer, self._context, reader.joins)

        def write(folder: Path) -> None:
            blank: list[int] = []
            refused = Skipped(reader.source.key, reader.skipped.policy)
            rows = Fingerprints(head.inputs)
            with Step(f"encoding data.{stage}") as step:
                groups = encoder.groups(rows.of(with_text(reader.read(), blank)), refused, step.advance)
                first = list(islice(groups, 1))
                if not first:
                    raise reader.empty(refused if refused.count else reader.skipped)
                if reader.joins:
                    write_tokens(folder, chain.from_iterable(chain(first, groups)), tokenizer, self.pack, reader.joins)
                else:
                    Features.of(chain(first, groups)).write(folder)
            rows.write(folder)
            summaries = [skipped.summary(reader.skipped.seen) for skipped in (reader.skipped, refused)]
            cache.write_text(folder / "skipped.json", json.dumps([text for text in summaries if text]))
            if stage == "predict":
                cache.write_text(folder / "blank.json", json.dumps(blank))

        path = cache.entry(self._folder, self._key(stage, reader), write)
        self._entries[stage] = path
        if stage == "predict":
            self.blank_rows = json.loads((path / "blank.json").read_text())
        for summary in json.loads((path / "skipped.json").read_text()):
            self._note_once(f"{reader.source.key}: {summary}")
        limit = self._corpus.limits.get(stage)
        if limit and world()[0] == 0:
            note(f"data.{stage}: at most {limit:,} rows are used (data.limit)")
        if not reader.joins:
            features = Features.read(path)
            if world()[0] == 0:
                note_features(head, features, self._context, stage)
            return Examples(features, head, tokenizer, self.batch_size, self.batch_tokens, self._context * self.pack)
        tokens = read_tokens(path)
        if tokens.targets == 0:
            raise UserError(Problem(reader.source.key, f"fewer than two tokens in {', '.join(reader.source.names)}"))
        return (Packed if self.pack else Blocks)(tokens, self._context, self._rows_of_a_batch, tokenizer.pad_id)

    def _key(self, stage: Stage, reader: Reader) -> str | None:
        """Return the name of a split in the cache; None for one that is not kept."""
        head = self.head
        used = [identity.of(head, self._folder), identity.of_trained(self.tokenizer, self._folder)]
        settings = [head.info(), self._context, stage == "predict" and "blank", reader.joins, self.pack, head.inputs]
        return reader.cache_key(used, settings)

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
            plan = Balanced.of(split, self.balance).training_order if self.balance else split.training_order
            order = TrainingOrder(plan, split.num_batches, split.training_rows, self.seed, overfit)
            if isinstance(split, Examples) and split.batch_tokens is not None:
                accumulated = getattr(self.trainer, "accumulate_grad_batches", 1)
                self._note_once(split.step_note(len(order), accumulated, world()[1]))
            loader = Loader(split, self.num_workers, sampler=order)
            position.length = len(order)
        loader.position = position
        return loader

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
