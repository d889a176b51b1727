"""The cost of running a model on a task's prompts, beside one forward pass over the clean prompts.

    python scripts/bench.py --what activations --path MODEL [--task ioi] [--prompts 256] [--threads 1]

MODEL is a Hugging Face directory or a GGUF file. Loading the model is not counted, and reading the prompts is.
Times are of the processor, over all threads, so that other processes do not count.
"""

import time
from pathlib import Path
from typing import Any

import torch


def measure_activations(path: Path, task: str, prompts: int) -> dict[str, float]:
    """Return processor seconds of one forward pass and of all that activations take, and the peak resident MB."""
    from bench import compose_cell, open_model

    from ovqk.activations.forward import RunningModel
    from ovqk.activations.judge import judge_activations
    from ovqk.activations.one_block import OneBlock
    from ovqk.activations.stage import ActivationTables, Runner
    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.records.record import peak_memory
    from ovqk.structure.layer import Layer
    from ovqk.structure.model import Model
    from ovqk.tasks.claims import resolve_claims
    from ovqk.tasks.task_readout import TaskReadout
    from ovqk.tasks.tokenizer import load_tokenizer, start_tokens
    from ovqk.weights.types import OpenedModel

    asked = (f"task={task}", "analysis=activations", f"activations.prompts={prompts}")
    config = compose_cell("model=local", f'model.path="{path}"', *asked)
    checkpoint, source = open_checkpoint(config.model), open_model(config)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    model = Model.read(OpenedModel(source, path.name, tokenizer), config)
    running = RunningModel.load(checkpoint, config.model, model.device)
    runner = Runner(lambda device: running, start_tokens(tokenizer, checkpoint), lambda: OneBlock(checkpoint))
    claims = resolve_claims(config.task, config.model, source.architecture)
    seconds: dict[str, float] = {}

    def steps(count: int, what: str) -> Any:
        started = time.process_time()
        yield from range(count)
        seconds[what] = seconds.get(what, 0.0) + time.process_time() - started

    model.vocabulary  # noqa: B018  # read before the clock starts, as every cell reads it
    started = time.process_time()
    stage = ActivationTables(model, runner, claims, steps, TaskReadout.read(model).readout)
    for index in range(source.architecture.n_layers):
        stage.visit(Layer(model, index))
    judge_activations(stage.measured, stage.claimed, stage.links)
    everything = time.process_time() - started
    with torch.no_grad():
        passes = []
        for _ in range(2):
            started = time.process_time()
            for batch in stage.prompts.batches:
                running.model(input_ids=batch.tokens, use_cache=False, logits_to_keep=1)
            passes.append(time.process_time() - started)
    return {
        "everything": everything,
        "forward": min(passes),
        "replacements": float(len(stage.measured.effects)),
        "peak_mb": peak_memory() / 2**20,
    } | seconds
