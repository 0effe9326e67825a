"""The datamodule's own loader: order of an epoch, buffers, decrypting threads, device copies."""
