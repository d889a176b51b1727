"""One model, layer by layer, without a task: spectra, positions, lists of tokens, and the cache for them."""
