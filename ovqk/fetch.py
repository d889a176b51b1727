"""A command that fetches a model's files in advance, for machines and cells without a network: `ovqk fetch MODEL`.

    python -m ovqk.fetch MODEL [KEY=VALUE ...]

MODEL is a name in conf/model or OWNER/NAME on the hub. Only the files that ovqk reads are fetched, into the hub's own
cache, and cells find them there, also with HF_HUB_OFFLINE=1.
"""

import argparse
from collections.abc import Sequence

from ovqk.config.command_line import model_argument, tool
from ovqk.errors import one_message
from ovqk.interrupts import raise_if_remembered


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch a model's files, and list them."""
    parser = argparse.ArgumentParser(
        prog=tool("fetch"), description="Fetch a model's files for cells without a network."
    )
    parser.add_argument("model", help="a name of conf/model, or OWNER/NAME on the hub")
    parser.add_argument(
        "choices", nargs="*", default=[], metavar="KEY=VALUE", help="such as model.revision=v1, hub_timeout=300"
    )
    asked = parser.parse_args(arguments)

    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.config.choices import chosen
    from ovqk.weights.families import tensors_read
    from ovqk.weights.readers import open_weights

    raise_if_remembered()
    config = chosen(model_argument(asked.model), *asked.choices)
    checkpoint = open_checkpoint(config.model, config.hub_timeout, tensors_read)
    sizes = open_weights(checkpoint, config.model).architecture
    commit = f", commit {checkpoint.revision}" if checkpoint.revision else ""
    print(f"{checkpoint.label}: {sizes.n_layers} layers of {sizes.n_heads} heads{commit}, in {checkpoint.directory}")


if __name__ == "__main__":
    main()
