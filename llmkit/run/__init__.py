"""One run around a model: LightningCLI, saving, signals, progress, throughput, reports."""
