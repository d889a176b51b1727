"""The mathematics of W_QK and W_OV: Gram matrices, spectra, positions, alignment, composition."""
