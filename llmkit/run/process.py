"""A process is left as it was found: another run in it begins as in a new one."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmkit.lightning import SEED_VARIABLES

VARIABLES = (*SEED_VARIABLES, "CUBLAS_WORKSPACE_CONFIG", "MLFLOW_TRACKING_URI")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]

LOGGERS = ("lightning.pytorch", "lightning.fabric")


@contextmanager
def as_found() -> Iterator[None]:
    """Put back at the end of the block what a run changes in a process, and Lightning and its loggers leave so.

    These are handlers of signals, which would hold on to every trainer, environment variables, the switches for
    deterministic kernels, filters of warnings, and how much Lightning logs.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: not set from Python
                    signal.signal(number, handler)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
