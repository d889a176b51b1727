"""The config files. In an installed ovqk they are a package: `pkg://ovqk.conf` in the search path of a Hydra app."""
