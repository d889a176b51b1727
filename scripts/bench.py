"""Measure ovqk's speed and memory as ratios to other ways of computing the same, in one run.

    python scripts/bench.py --shapes gpt2-small,gpt2-medium --threads 2      # spectra, against (a), (b) and (c)
    python scripts/bench.py --shapes gpt2-small --what composition
    python scripts/bench.py --shapes llama-7b --what cell                    # makes a checkpoint of 4.8 GB first
    python scripts/bench.py --shapes smollm2-135m,gemma-3-270m --what task   # task=none and ioi, with directions
    python scripts/bench.py --what task --path DIR                           # the same, on a real model (or GGUF file)
    python scripts/bench.py --shapes gpt2-small --what diagonals --threads 1 # ranks of diagonals beside the spectra
    python scripts/bench.py --shapes gpt2-small --what profile
    python scripts/bench.py --what sweep                                     # cells a minute over one model
    python scripts/bench.py --what startup --repeats 8

What is compared with, for the eigen- and singular values of every head's QK and OV, in residual space and over the
full vocabulary:

(a) d x d     every head's matrix formed, d x d decompositions of it; for the full vocabulary one shared Gram
(b) TL        TransformerLens's FactoredMatrix, also for W_E W_V W_O W_U; `composition_scores` for composition
(c) floor     the operations of the matrix products that the best known formulas need, at the rate of one large
              float32 product measured in this run; no decomposition is counted (`bench_operations.py`). What a task
              adds is counted as torch counts the products that it makes, with as many draws as it takes

(a) and (b) are measured on some heads (`--sample`) and scaled to all of them. Checkpoints are random, of the shape
named (`ovqk.testing.random_checkpoints`). Cells are run in processes of their own, whose peak resident memory is
given above that of a process which has imported the same modules and done nothing.
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as ovqk sets it where it is imported first

import torch
from bench_diagonals import report_diagonals
from bench_operations import (
    product_rate,
    products_done,
    sizes_of_shape,
    spectra_operations,
    split_times,
)
from bench_task import report_task, sizes_of_model

from ovqk.plan import plan_of
from ovqk.testing.random_checkpoints import SHAPES, Shape, make_checkpoint

# --- ovqk ----------------------------------------------------------------------------------------------------


def open_model(config: Any) -> Any:
    """The weights that a cell reads."""
    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.weights.readers import open_weights

    return open_weights(open_checkpoint(config.model), config.model)


def cell_config(folder: Path, device: str = "cpu", task: str = "none", components: int = 0) -> Any:
    """`run.py model=local`, without directions unless components are asked for."""
    return compose_cell(
        "model=local", f'model.path="{folder}"', f"task={task}", f"analysis.components={components}", f"device={device}"
    )


def compose_cell(*overrides: str) -> Any:
    """The cell that `run.py` would compute with these overrides."""
    from hydra import compose, initialize_config_dir

    from ovqk.config.resolve import resolve
    from ovqk.config.schema import register

    register()
    root = Path(__file__).resolve().parents[1]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        return resolve(compose("config", overrides=[*overrides, "tracking=none"]))


def spectra_alone(config: Any) -> int:
    """Eigen- and singular values of every head, both circuits, both spaces; from the files on."""
    from ovqk.structure.layer import Layer
    from ovqk.structure.model import Model
    from ovqk.structure.stages import spectrum
    from ovqk.weights.types import OpenedModel

    source = open_model(config)
    model = Model.read(OpenedModel(source, "bench"), config)
    count = 0
    for index in range(source.architecture.n_layers):
        layer = Layer(model, index)
        for circuit in model.circuits:
            _, lines = spectrum(model, circuit, layer.maps(circuit, model.folds))
            count += sum(values.numel() for *_, values in lines)
    return count


def whole_cell(config: Any) -> int:
    """Every stage of `analyse`, from the files on."""
    from ovqk.analyse import analyse
    from ovqk.weights.types import OpenedModel

    opened = OpenedModel(open_model(config), "bench")
    return len(analyse(opened, config).tables["heads"])


def cell_tables(config: Any) -> Any:
    """Every stage of `analyse`, from the files on, with the tokenizer and the task's words; return the tables."""
    from ovqk.analyse import analyse
    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.tasks.tokenizer import load_tokenizer
    from ovqk.weights.readers import open_weights
    from ovqk.weights.types import OpenedModel

    checkpoint = open_checkpoint(config.model)
    opened = OpenedModel(open_weights(checkpoint, config.model), "bench", load_tokenizer(checkpoint))
    return analyse(opened, config).tables


def whole_cell_with_words(config: Any) -> int:
    """The same, as a way that is measured; return the number of heads."""
    return len(cell_tables(config)["heads"])


def counted(config: Any) -> dict[str, float]:
    """The operations in the products that such a cell makes, and the complex pairs that it lists."""
    found: list[Any] = []
    operations = products_done(lambda: found.append(cell_tables(config)))
    listed = found[0].get("directions")
    if listed is None:
        return {"operations": operations, "pairs": 0}
    pairs = listed[listed["value_im"] > 0][["layer", "head", "circuit", "component"]].drop_duplicates()
    return {"operations": operations, "pairs": len(pairs)}


def cached(folder: Path) -> tuple[float, float]:
    """Seconds of a cell with directions whose structure is computed and kept, and of the same cell once more."""
    from ovqk.analyse import analyse
    from ovqk.structure.cache import StructureCache
    from ovqk.weights.types import OpenedModel

    config = cell_config(folder)
    config.analysis.components = 3
    opened = OpenedModel(open_model(config), "bench")
    with tempfile.TemporaryDirectory() as place:
        cache = StructureCache(Path(place), 5.0, "bench")

        def once() -> object:
            return analyse(opened, config, cache=cache)

        return seconds(once), seconds(once)


# --- the other ways ------------------------------------------------------------------------------------------


def naive(folder: Path, shape: Shape, sample: int) -> dict[str, float]:
    """Seconds of d x d decompositions, scaled from `sample` heads of layer 0 to all."""
    layer, W_E, W_U = in_memory(folder)
    gram_in, cross = (W_E - W_E.mean(0)).T @ W_E, W_U.T @ (W_E - W_E.mean(0))
    root_in = torch.linalg.cholesky(gram_in + 1e-6 * gram_in.diagonal().mean() * torch.eye(shape.d_model)).mT
    W_U_centred = W_U - W_U.mean(0)
    gram_out = W_U_centred.T @ W_U_centred
    root_out = torch.linalg.cholesky(gram_out + 1e-6 * gram_out.diagonal().mean() * torch.eye(shape.d_model)).mT
    heads = shape.n_layers * shape.n_heads
    found = dict.fromkeys(("residual", "vocabulary"), 0.0)
    for head in range(sample):
        for left, right, gram, out in (
            (layer.W_Q[head], layer.W_K[head].T, gram_in, root_in),
            (layer.W_V[head], layer.W_O[head], cross, root_out),
        ):
            started = time.perf_counter()
            matrix = left @ right
            torch.linalg.svdvals(matrix)
            torch.linalg.eigvals(matrix)
            middle = time.perf_counter()
            torch.linalg.eigvals(matrix @ gram)
            torch.linalg.svdvals(root_in @ matrix @ out.T)
            found["residual"] += (middle - started) * heads / sample
            found["vocabulary"] += (time.perf_counter() - middle) * heads / sample
    return found


def transformer_lens(folder: Path, shape: Shape, sample: int) -> dict[str, float]:
    """Seconds of FactoredMatrix's eigen- and singular values, scaled from `sample` heads of layer 0 to all."""
    from transformer_lens import FactoredMatrix

    layer, W_E, W_U = in_memory(folder)
    heads = shape.n_layers * shape.n_heads
    found = dict.fromkeys(("residual", "vocabulary"), 0.0)
    for left, right in ((layer.W_Q[:sample], layer.W_K[:sample].mT), (layer.W_V[:sample], layer.W_O[:sample])):
        started = time.perf_counter()
        circuit = FactoredMatrix(left, right)
        circuit.svd()
        circuit.eigenvalues  # noqa: B018 (a property that computes)
        found["residual"] += (time.perf_counter() - started) * heads / sample
    for left, right, out in ((layer.W_Q, layer.W_K.mT, W_E), (layer.W_V, layer.W_O, W_U)):
        started = time.perf_counter()
        circuit = FactoredMatrix(W_E @ left[0], right[0] @ out.T)
        circuit.eigenvalues  # noqa: B018
        circuit.svd()
        found["vocabulary"] += (time.perf_counter() - started) * heads
    return found


def in_memory(folder: Path) -> Any:
    """Layer 0's folded weights, W_E and W_U^T as tensors."""
    from ovqk.weights.folding import fold_embeddings, fold_layer

    source = open_model(cell_config(folder))
    folded = fold_embeddings(source.embeddings(), source.architecture)
    assert folded.W_E is not None and folded.W_U is not None
    W_U = folded.W_U.T if isinstance(folded.W_U, torch.Tensor) else folded.W_U[:]
    return fold_layer(source.layer(0), source.architecture), folded.W_E[:], W_U


def composition_seconds(folder: Path, shape: Shape) -> dict[str, float]:
    """All pairs, Q, K and V: ovqk on all layers; TransformerLens's on one pair of layers, scaled to all pairs."""
    from transformer_lens import FactoredMatrix
    from transformer_lens.utilities.matrix import composition_scores

    from ovqk.circuits.composition import MODES, LayerCircuits, received
    from ovqk.config.schema import Circuit
    from ovqk.structure.layer import Layer
    from ovqk.structure.model import Model
    from ovqk.weights.types import OpenedModel

    config = cell_config(folder)
    source = open_model(config)
    model = Model.read(OpenedModel(source, "bench"), config)
    layers = [Layer(model, index) for index in range(shape.n_layers)]
    started = time.perf_counter()
    circuits = [LayerCircuits.of(x.decomposition(Circuit.ov, True), x.decomposition(Circuit.qk, True)) for x in layers]
    for index in range(1, shape.n_layers):
        for mode in MODES:
            received(circuits, index, mode)
    ours = time.perf_counter() - started
    one, other = layers[0].folded, layers[1].folded
    left = FactoredMatrix(one.W_V, one.W_O)
    theirs = 0.0
    for right in (
        FactoredMatrix(other.W_Q, other.W_K.mT),
        FactoredMatrix(other.W_K, other.W_Q.mT),
        FactoredMatrix(other.W_V, other.W_O),
    ):
        theirs += seconds(partial(composition_scores, left, right))
    return {"ours": ours, "transformer_lens": theirs * shape.n_layers**2}


# --- running -------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def child(
    name: str, folder: Path, threads: int, device: str, hoard: bool = True, count: bool = False
) -> dict[str, Any]:
    """One way of ovqk's in a process of its own: seconds, and peak memory above the imports, in MB.

    With `count` the operations in the products that it makes, and the complex pairs that it lists, instead.

    Without `hoard` the C library gives large blocks back at once: what it keeps for later, up to some 150 MB and as
    it happens, is then not in the peak.
    """
    environment = os.environ if hoard else os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--threads", str(threads)]
    command += ["--count"] * count
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_child(name: str, folder: Path, device: str, count: bool) -> None:
    """Print what `child` reads: of the way and its number of components, `ioi/3`."""
    import ovqk.analyse  # noqa: F401 (what a cell imports)

    what, _, components = name.partition("/")
    config = cell_config(folder, device, task="ioi" if what == "ioi" else "none", components=int(components or 0))
    if count:
        print(json.dumps(counted(config)))
        return
    base, processor = peak_memory(), time.process_time()
    with split_times() as parts:
        took = seconds(lambda: WAYS[what](config))
    found = {"seconds": took, "cpu_seconds": time.process_time() - processor, "parts": parts}
    print(json.dumps(found | {"above_mb": peak_memory() - base, "peak_mb": peak_memory()}))


def peak_memory() -> float:
    """Peak resident MB of this process; Linux's own count starts anew with a program, getrusage's does not."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


WAYS: dict[str, Callable[[Any], int]] = {
    "spectra": spectra_alone,
    "cell": whole_cell,
    "none": whole_cell_with_words,
    "ioi": whole_cell_with_words,
}


def report_cells(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure task=none and task=ioi on one checkpoint, and print."""
    threads, device = arguments.threads, arguments.device
    sizes, n_ctx = sizes_of_model(cell_config(folder), arguments.components)

    def measured(way: str) -> dict[str, Any]:
        return min(
            (child(way, folder, threads, device) for _ in range(arguments.repeats)), key=lambda run: run["seconds"]
        )

    report_task(name, sizes, n_ctx, measured, lambda way: child(way, folder, 1, device, count=True))


def report(name: str, shape: Shape, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure one shape, and print."""
    what = arguments.what
    if what == "composition":
        found = composition_seconds(folder, shape)
        ours, theirs = found["ours"], found["transformer_lens"]
        print(f"{name} composition: {ours:.2f} s; TransformerLens {theirs:.1f} s: {theirs / ours:.0f} x")
        return
    if what == "cache":
        first, again = cached(folder)
        print(f"{name} cell with directions: {first:.2f} s; from the cache {again:.2f} s: {again / first:.1%}")
        return
    if what == "diagonals":
        report_diagonals(name, cell_config(folder, arguments.device), arguments.repeats)
        return
    if what == "profile":
        profile = cProfile.Profile()
        profile.runcall(WAYS["spectra"], cell_config(folder))
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    sizes = sizes_of_shape(shape)
    operations = spectra_operations(sizes) if what == "spectra" else plan_of(sizes).total
    runs = [child(what, folder, arguments.threads, arguments.device) for _ in range(arguments.repeats)]
    best = min(runs, key=lambda run: run["seconds"])
    rate = product_rate()
    floor = operations / rate
    memory = f"peak {best['peak_mb']:.0f} MB, {best['above_mb']:.0f} MB above the imports"
    bound = f"floor {floor:.2f} s ({operations:.3g} operations at {rate / 1e9:.0f} GFLOP/s)"
    print(f"{name} {what}: {best['seconds']:.2f} s; {memory}; {bound}: {best['seconds'] / floor:.2f} x", flush=True)
    if what == "spectra" and arguments.sample:
        for title, function in (("d x d", naive), ("TransformerLens", transformer_lens)):
            found = function(folder, shape, arguments.sample)
            total = sum(found.values())
            parts = ", ".join(f"{part} {value:.1f} s" for part, value in found.items())
            print(f"{name} {title}: {total:.1f} s ({parts}): {total / best['seconds']:.0f} x", flush=True)


def report_activations(path: Path, task: str, prompts: int) -> None:
    """Measure what running a model on prompts takes, beside one forward pass over them, and print."""
    from bench_activations import measure_activations

    found = measure_activations(path, task, prompts)
    total, once = found.pop("everything"), found.pop("forward")
    replacements, peak = int(found.pop("replacements")), found.pop("peak_mb")
    parts = ", ".join(f"{what} {value:.1f} s" for what, value in found.items())
    print(
        f"{path.name} {task}, {prompts} prompts, processor time: {total:.1f} s ({parts}; {replacements} replacements); "
        f"one forward pass {once:.2f} s: {total / once:.1f} x; peak {peak:.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="gpt2-small", help=f"of {', '.join(SHAPES)}")
    kinds = [
        "spectra",
        "cell",
        "task",
        "composition",
        "cache",
        "profile",
        "startup",
        "sweep",
        "activations",
        "diagonals",
    ]
    parser.add_argument("--what", default="spectra", choices=kinds)
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument(
        "--path",
        type=Path,
        help="for --what task, diagonals and activations: a Hugging Face directory or a GGUF file instead of shapes",
    )
    parser.add_argument("--components", type=int, default=3, help="for --what task: listed for each circuit; 0: none")
    parser.add_argument("--task", default="ioi", help="for --what activations")
    parser.add_argument("--prompts", type=int, default=256, help="for --what activations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=4, help="heads that the other ways are measured on; 0: none")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept; else a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what in ("startup", "sweep"):
        import bench_sweeps as sweeps

        if arguments.what == "sweep":
            sweeps.report_sweep(sweeps.MODEL, sweeps.TASKS, sweeps.ANALYSES)
        else:
            sweeps.report_start_up(arguments.repeats)
        return
    if arguments.child:
        run_child(arguments.child, arguments.folder, arguments.device, arguments.count)
        return
    if arguments.what == "activations":
        if not arguments.path:
            parser.error("--what activations needs --path: random weights do no task")
        report_activations(arguments.path, arguments.task, arguments.prompts)
        return
    if arguments.path:
        if arguments.what == "diagonals":
            report_diagonals(arguments.path.name, cell_config(arguments.path, arguments.device), arguments.repeats)
            return
        if arguments.what != "task":
            parser.error("--path is for --what task, diagonals and activations")
        report_cells(arguments.path.name, arguments.path, arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.shapes.split(","):
            shape = SHAPES[name]
            if arguments.layers:
                shape, name = replace(shape, n_layers=arguments.layers), f"{name}-{arguments.layers}-layers"
            folder = (arguments.folder or Path(temporary)) / name
            make_checkpoint(shape, folder)
            if arguments.what == "task":
                report_cells(name, folder, arguments)
            else:
                report(name, shape, folder, arguments)


if __name__ == "__main__":
    main()
