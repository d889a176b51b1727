"""A whole cell beside its floor: what a user waits for, with and without a task, and where the time goes."""

from collections.abc import Callable
from typing import Any

from bench_operations import cell_operations, processor_rate, product_rate

from ovqk.plan import Sizes


def report_task(
    name: str,
    sizes: Sizes,
    n_ctx: int,
    measured: Callable[[str], dict[str, Any]],
    made: Callable[[str], dict[str, Any]],
) -> None:
    """Measure the cells of task=none and task=ioi on one checkpoint, beside their floors, and print.

    Args:
        name: the checkpoint's.
        sizes: its sizes.
        n_ctx: positions in its context.
        measured: runs a way (`ioi/3`) in a process of its own, several times, and returns the fastest run.
        made: counts the operations of the products that a way makes, and the complex pairs that it lists.
    """
    best, counted, parts = {}, {}, dict[str, float]()
    for task in ("none", "ioi"):
        way = f"{task}/{sizes.components}"
        best[task] = found = measured(way)
        done = made(way)
        counted[task], parts = done["operations"], cell_operations(sizes, n_ctx, done["pairs"])
        operations, rate = sum(parts.values()) + counted[task] - counted["none"], product_rate()
        floor, busy = operations / rate, operations / processor_rate()
        print(
            f"{name} task={task}: {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of processor time); peak "
            f"{found['peak_mb']:.0f} MB; floor {floor:.2f} s ({operations:.3g} operations at {rate / 1e9:.0f} GFLOP/s; "
            f"made: {counted[task]:.3g}): {found['seconds'] / floor:.2f} x; in processor time floor {busy:.2f} s: "
            f"{found['cpu_seconds'] / busy:.2f} x",
            flush=True,
        )
        spent = found["parts"] | {"the rest": found["seconds"] - sum(found["parts"].values())}
        largest = sorted(spent.items(), key=lambda part: -part[1])
        print("    time: " + ", ".join(f"{what} {took:.2f} s" for what, took in largest if took > 0.01), flush=True)
    needed = sorted(parts.items(), key=lambda part: -part[1])
    print("    floor of task=none: " + ", ".join(f"{what} {count / rate:.2f} s" for what, count in needed if count))
    wall, cpu = (best["ioi"][kind] / best["none"][kind] for kind in ("seconds", "cpu_seconds"))
    print(f"{name} task=ioi / task=none: {wall:.2f} x ({cpu:.2f} x of processor time)", flush=True)


def sizes_of_model(config: Any, components: int) -> tuple[Sizes, int]:
    """The sizes of a checkpoint on disk, and how many positions its context has (0 if it does not say)."""
    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.plan import sizes_of
    from ovqk.weights.readers import open_weights

    checkpoint = open_checkpoint(config.model)
    source = open_weights(checkpoint, config.model)
    return sizes_of(source, checkpoint.shapes, components), source.architecture.n_ctx or 0
