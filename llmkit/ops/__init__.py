"""What plugins build with: losses, decoding, metrics, and kernels with a plain reference each."""
