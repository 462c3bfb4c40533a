"""The network, the LightningModule around it, and how it is optimized."""
