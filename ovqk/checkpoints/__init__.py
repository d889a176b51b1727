"""Checkpoints on disk, in a package or on the hub, as named tensors with settings and a digest; no architecture."""
