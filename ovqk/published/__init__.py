"""Published statements about QK and OV weights, computed again: `ovqk published`."""
