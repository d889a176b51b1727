"""How exactly ovqk reads each causal architecture that transformers has: tiny random models against their own modules.

    python scripts/architectures.py [--write] [--only NAME ...]

Each architecture of transformers' causal language models is shrunk generically (4 layers of width 48, 4 heads over 2
KV heads), saved as a Hugging Face directory and opened by ovqk, in workers with a time limit for each. What ovqk
reads is compared, in float64, with what hooks on the Hugging Face model see. `--write` writes docs/architectures.md.
"""

import argparse
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ovqk.block_probes import BlockActivations, CannotRunError, Recorder, find_blocks, first_tensor, record_activations  # noqa: E402
from ovqk.checkpoints import open_checkpoint  # noqa: E402
from ovqk.config import ModelConfig, Source  # noqa: E402
from ovqk.errors import UserError  # noqa: E402
from ovqk.sources import open_weights  # noqa: E402
from ovqk.vocabulary import Block0  # noqa: E402
from ovqk.weights import (  # noqa: E402
    WeightSource,
    apply_norm,
    fold_embeddings,
    fold_layer,
    fold_mlp,
    fold_reads,
    keys,
    normalise,
    queries,
)

LENGTH = 15
SECONDS = 120
"""For one architecture."""
RIGHT = 1e-4
"""Largest relative difference that is called right; float32 weights and activations of ovqk reach 1e-6."""

SHRUNK: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 48),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "v_head_dim"), 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "word_embed_proj_dim": 48,
    "rotary_dim": 4,
    "dtype": "float32",
}
"""What each key of a config is set to, if the architecture's own config has it."""
MULTIPLIERS = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
YARN = {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 24},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8},
    "stablelm": {"partial_rotary_factor": 0.5},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"head_dim": 24, "num_heads": 4},
}
"""What single architectures need besides."""
TOO_LARGE = {
    "blt": "its patcher and its coders have settings of their own",
    "phi4_multimodal": "a model of more than text",
}
"""What cannot be shrunk by the settings above, and is too large to be made as it is."""
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, with biases of attention": {"attention_bias": True},
    "llama, YaRN": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **YARN}},
    "granite, with multipliers": {**MULTIPLIERS, "attention_multiplier": 0.02, "logits_scaling": 8.0},
    "granitemoe, with multipliers": {**MULTIPLIERS, "attention_multiplier": 0.02, "logits_scaling": 8.0},
    "cohere, with query and key norms": {"use_qk_norm": True},
    "stablelm, parallel with query and key norms": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "falcon, one after the other with ALiBi": {"alibi": True, "parallel_attn": False, "bias": True},
    "falcon, several KV heads": {"new_decoder_architecture": True},
    "glm4_moe, with query and key norms": {"use_qk_norm": True},
    "phi, with query and key norms": {"qk_layernorm": True},
    "gpt_neox, one after the other": {"use_parallel_residual": False},
    "gemma4_text, heads of one shape": {"per_layer_config": {}},
    "opt, post-norm": {"do_layer_norm_before": False},
}
"""Settings of single architectures that change what a head reads or writes, by `architecture, what is set`."""
KEPT_BY_PATTERN = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Lists with an entry for each layer, of which the first are kept."""
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "resid_out", "wo", "o", "proj", "linear_attn", "out")
"""Names of the output projection, in the order tried."""


@dataclasses.dataclass
class Row:
    """One architecture: how it is read, why not, and the largest relative differences."""

    name: str
    read: str = ""
    why: str = ""
    scores: float | None = None
    writes: float | None = None
    block0: float | None = None
    logits: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether a number that ovqk gives differs from the model's own."""
        numbers = (self.scores, self.writes, self.block0, self.logits)
        return any(number is not None and not number < RIGHT for number in numbers)


def shrunk_model(name: str, directory: Path) -> nn.Module:
    """Make a tiny random model of an architecture and save it as a Hugging Face directory.

    Raises:
        Exception: whatever transformers raises if the architecture cannot be shrunk so.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if name in TOO_LARGE:
        raise ValueError(TOO_LARGE[name])
    variant = VARIANTS.get(name, {})
    name = name.split(",")[0]
    kind = CONFIG_MAPPING[name]
    default = kind()
    if default.get_text_config() is not default:
        raise ValueError("a model of more than text")
    known = default.to_dict()
    renamed = {value: key for key, value in getattr(kind, "attribute_map", {}).items()}
    overrides = {key: value for key, value in SHRUNK.items() if key in known and key not in renamed.values()}
    overrides |= {key: known[key][:4] for key in KEPT_BY_PATTERN if isinstance(known.get(key), list)}
    if not isinstance(known.get("sliding_window", 0), int):
        overrides.pop("sliding_window", None)
    config = kind(**overrides | OWN.get(name, {}) | variant)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else 0.2 * noise)
    model.eval().save_pretrained(directory)
    return model


def difference(mine: Tensor, own: Tensor) -> float:
    """The largest difference, relative to the largest entry of the second."""
    if mine.shape != own.shape:
        return float("inf")
    return float((mine - own).abs().max() / own.abs().max().clamp_min(1e-12))


def without_slopes(x: Tensor, visible: Tensor) -> Tensor:
    """Scores less each row's mean and each head's slope by offset, which ALiBi adds, over the visible entries."""
    positions = torch.arange(x.shape[-1])
    ramp = (positions[:, None] - positions).to(x).expand_as(x)

    def centred(y: Tensor) -> Tensor:
        y = torch.where(visible, y, 0)
        return torch.where(visible, y - y.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1), 0)

    x, ramp = centred(x), centred(ramp)
    return x - ramp * (x * ramp).sum((-2, -1), keepdim=True) / ramp.square().sum((-2, -1), keepdim=True)


@torch.no_grad()
def compare(source: WeightSource, model: nn.Module) -> dict[str, float | None]:
    """Compare what ovqk reads with what a model of float64 computes.

    Returns:
        `scores`, `writes`, `block0`, `logits`: the largest relative difference over layers; None if ovqk gives none.
    """
    facts, tokens = source.architecture, torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(5))
    found: dict[str, float | None] = dict.fromkeys(("scores", "writes", "block0", "logits"))
    if not source.foldable:
        return found
    activations = record_activations(model, tokens, facts.n_layers, seed=9)
    scores, writes = [], []
    for layer, block in enumerate(activations.blocks):
        scores.append(compare_scores(source, layer, block))
        writes.append(compare_writes(source, model, layer, tokens))
    found |= {"scores": max(scores), "writes": max(writes)}
    embeddings = source.embeddings()
    if embeddings.W_E is None:
        return found
    if embeddings.W_U is not None:
        folded = fold_embeddings(embeddings, facts)
        final = activations.last_stream
        assert final is not None and folded.W_U is not None
        kind = "none" if embeddings.final_norm is None else embeddings.final_norm.kind
        W_U = folded.W_U if isinstance(folded.W_U, Tensor) else folded.W_U[:].T
        mine = normalise(final.double(), kind, facts.norm_eps) @ W_U.double()
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[operator, union-attr]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        own = activations.outputs[id(head)] if capped or activations.logits is None else activations.logits
        own = own.double()
        found["logits"] = difference(mine - mine.mean(0), own - own.mean(0))
    mlp = source.first_mlp()
    if not isinstance(mlp, str):
        found["block0"] = compare_block0(source, model)
    return found


def compare_scores(source: WeightSource, layer: int, block: BlockActivations) -> float:
    """Each head's scores before the softmax, every query with every key, through the folded weights."""
    facts, weights = source.architecture, fold_layer(source.layer(layer), source.architecture)
    x = normalise(block.stream.double(), facts.norm, facts.norm_eps)
    q, k = queries(weights, x), keys(weights, x)[facts.kv_of_head]
    scale = facts.attention_scale or facts.d_head**-0.5
    mine = torch.zeros(facts.n_heads, LENGTH, LENGTH, dtype=torch.float64)
    for offset in range(LENGTH):
        turned = q[:, offset:]
        if weights.rotary is not None:
            cos, sin = weights.rotary.angles(torch.tensor([offset]))
            turned = weights.rotary.rotate(turned, cos.double(), sin.double())
        products = (turned * k[:, : LENGTH - offset]).sum(-1) * scale
        mine.diagonal(-offset, dim1=-2, dim2=-1).copy_(products)
    below = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if block.queries is not None and block.keys is not None and block.scaling is not None:
        group = facts.n_heads // block.keys.shape[0]
        own = block.queries @ block.keys.repeat_interleave(group, 0).mT * block.scaling
        return difference(mine * below, own * below)
    assert block.logits is not None
    visible = below & (block.logits.amax(0) > -1e4)
    return difference(without_slopes(mine, visible), without_slopes(block.logits, visible))


def output_projection(attention: nn.Module, width: int, d_model: int) -> nn.Module:
    """The module that maps the heads' outputs, side by side, to the residual stream."""
    named = [
        (name.rsplit(".", 1)[-1], module)
        for name, module in attention.named_modules()
        if sorted(getattr(getattr(module, "weight", None), "shape", ())) == sorted((width, d_model))
    ]
    for wanted in OUTPUTS:
        for name, module in named:
            if name == wanted:
                return module
    raise LookupError(f"no output projection among {[name for name, _ in named]}")


def compare_writes(source: WeightSource, model: nn.Module, layer: int, tokens: Tensor) -> float:
    """What each head adds to the stream: the block with one head let through, the rest of the block silenced."""
    facts, weights = source.architecture, source.layer(layer)
    module = find_blocks(model, facts.n_layers)[layer]
    recorder = Recorder(len(tokens))
    with recorder.watch(model, find_blocks(model, facts.n_layers)):
        model(input_ids=tokens[None], use_cache=False)
    call = recorder.calls[layer]
    stream = torch.randn(call.stream.shape, generator=torch.Generator().manual_seed(layer), dtype=call.stream.dtype)
    watched = Recorder(len(tokens))
    with watched.watch(module, [module]):
        call.run(module, stream, {})
    attention, block = watched.attention_child, watched.block
    assert attention is not None
    output = output_projection(attention, facts.n_heads * facts.d_head, facts.d_model)
    pattern = block.pattern
    if pattern is None:
        assert block.logits is not None
        pattern = block.logits.softmax(-1)
    x = apply_norm(weights.norm, stream[0].double(), facts.norm_eps)
    values = torch.einsum("pd,hdx->hpx", x, weights.W_V.double()) + weights.b_V.double()[:, None]
    z = pattern.double() @ values[facts.kv_of_head]
    inside = {id(each) for each in attention.modules()}
    zeros = {
        f"{name}.{key}": torch.zeros_like(parameter)
        for name, child in module.named_modules()
        if name and id(child) not in inside and "norm" not in type(child).__name__.lower()
        for key, parameter in child.named_parameters(recurse=False)
    }

    def written(head: int | None) -> Tensor:
        kept = torch.zeros(facts.n_heads, facts.d_head, dtype=stream.dtype)
        if head is not None:
            kept[head] = 1
        handle = output.register_forward_pre_hook(lambda _, args: (args[0] * kept.flatten(), *args[1:]))
        try:
            returned = first_tensor(call.run(module, stream, zeros))
        finally:
            handle.remove()
        assert returned is not None
        return (returned - stream)[0].double()

    bias = getattr(output, "bias", None)
    b_O = torch.zeros(facts.d_model) if bias is None else bias
    worst, nothing = 0.0, written(None)
    for head in range(facts.n_heads):
        mine, own = z[head] @ weights.W_O[head].double(), written(head)
        if weights.post_norm is not None:
            mine = apply_norm(weights.post_norm, mine + b_O, facts.norm_eps)
        else:
            own = own - nothing  # the output's bias, and what norms behind a silenced MLP add
        worst = max(worst, difference(mine, own))
    return worst


def compare_block0(source: WeightSource, model: nn.Module) -> float:
    """Block 0 as an effective embedding, against the block itself on one token alone, without values' biases."""
    facts = source.architecture
    raw, weights = source.embeddings(), source.layer(0)
    assert raw.W_E is not None
    W_E = raw.W_E[:].to(next(model.parameters()).dtype)
    folded_layer, mlp = fold_reads(weights, facts), source.first_mlp()
    assert not isinstance(mlp, str)
    folded = fold_embeddings(raw, facts).W_E
    assert folded is not None
    as64 = {"layer": _double(folded_layer), "mlp": _double(fold_mlp(mlp, facts))}
    mine = Block0(as64["layer"], as64["mlp"], facts).rows(folded[:].double())
    block = find_blocks(model, facts.n_layers)[0]
    width = facts.n_heads * facts.d_head
    holding = (child for name, child in block.named_children() if "att" in name.lower() and "norm" not in name.lower())
    output = output_projection(nn.ModuleList(holding), width, facts.d_model)
    b_V = fold_layer(dataclasses.replace(weights, post_norm=None), facts).b_V.double()[facts.kv_of_head]
    bias = getattr(output, "bias", None)
    constant = torch.einsum("hx,hxd->d", b_V, module_output(output, facts.n_heads))
    constant = constant + (0 if bias is None else bias)
    seen: list[Tensor] = []

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (W_E[:, None], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": W_E[:, None]}

    handles = [
        block.register_forward_pre_hook(give, with_kwargs=True),
        output.register_forward_hook(lambda _, __, out: out - constant),
        block.register_forward_hook(lambda _, __, out: seen.append(_first(out))),
    ]
    try:
        model(input_ids=torch.arange(len(W_E))[:, None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    own = seen[0][:, 0]
    return difference(mine, own - own.mean(-1, keepdim=True) if facts.norm == "layernorm" else own)


def module_output(output: Any, n_heads: int) -> Tensor:
    """The output projection's own matrix, [head, d_head, d_model]."""
    weight: Tensor = output.weight
    matrix = weight if type(output).__name__ == "Conv1D" else weight.T
    return matrix.reshape(n_heads, -1, matrix.shape[-1])


def _first(output: Any) -> Tensor:
    found = first_tensor(output)
    assert found is not None
    return found


def _double(weights: Any) -> Any:
    """A dataclass of weights with its tensors in float64; parts that are None or no tensors as they are."""
    changes = {}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.double()
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _double(value)
    return dataclasses.replace(weights, **changes)


def compare_in_float64(source: WeightSource, directory: Path) -> dict[str, float | None]:
    """Compare with the model in float64; in float32 if its own code does not run in float64."""
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager", dtype=dtype
        ).eval()
        try:
            return compare(source, model)
        except CannotRunError:
            if dtype == torch.float32:
                raise
    raise AssertionError("not reached")


def examine(name: str) -> Row:
    """Make one architecture, open it and compare it."""
    row = Row(name)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "m"
        try:
            shrunk_model(name, directory)
            print(f"MADE {name}", flush=True)
        except Exception as error:  # of any architecture's own code
            message = " ".join(str(error).split())
            row.read, row.why = "not shrunk", f"{type(error).__name__}: {message}"[:240]
            return row
        config = ModelConfig(name="tiny", source=Source.local, path=str(directory))
        try:
            source = open_weights(open_checkpoint(config), config)
        except UserError as error:
            row.read, row.why = "refused", str(error).replace(f"model.path={directory}: ", "")
            return row
        row.read = {"families": "natively", "bridge": "through the bridge"}[source.loaded_by]
        row.notes = tuple(note for note in source.notes if not note.startswith("read through"))
        if not source.foldable:
            row.read += ", raw"
        elif source.no_vocabulary is not None:
            row.why = f"no vocabulary: {source.no_vocabulary}"
        for key, value in compare_in_float64(source, directory).items():
            setattr(row, key, value)
    return row


# --- many of them, in workers with a time limit ------------------------------------------------------------------


def work() -> None:
    """Examine the architectures named on standard input, one JSON line each."""
    import traceback
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        name = line.strip()
        try:
            row = examine(name)
        except Exception:  # a defect, of ovqk or of this script: the table must show it
            row = Row(name, "TRACEBACK", traceback.format_exc(limit=-2))
        print("ROW " + json.dumps(dataclasses.asdict(row)), flush=True)


def examine_all(names: list[str]) -> list[Row]:
    """Examine architectures in a worker process, which is replaced if one takes too long."""
    rows: list[Row] = []
    waiting = list(names)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        ) as worker:
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True).start()
            assert worker.stdin is not None
            while waiting:
                name = waiting.pop(0)
                row, made = None, False
                try:
                    worker.stdin.write(name + "\n")
                    worker.stdin.flush()
                    row, made = _next_row(lines, time.monotonic() + SECONDS)
                except BrokenPipeError:
                    pass
                late = Row(name, "TRACEBACK" if made else "not shrunk", f"no answer within {SECONDS} s")
                rows.append(row or late)
                print(_shown(rows[-1]), flush=True)
                if row is None:
                    break
            worker.kill()
    return rows


def _forward(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _next_row(lines: "queue.Queue[str]", until: float) -> tuple[Row | None, bool]:
    """The next row, None if it is late, and whether the tiny model was made."""
    made = False
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None, made
        if not line:
            return None, made
        made |= line.startswith("MADE ")
        if line.startswith("ROW "):
            fields = json.loads(line[4:])
            return Row(**fields | {"notes": tuple(fields["notes"])}), made


def _shown(row: Row) -> str:
    numbers = [
        f"{value:.0e}" if value is not None else "-" for value in (row.scores, row.writes, row.block0, row.logits)
    ]
    return f"{'WRONG ' if row.wrong else ''}{row.name}: {row.read} {' '.join(numbers)} {row.why}"


HEADING = """# Which architectures are read, and how exactly

Every architecture of transformers {version} that is a causal language model, as a tiny random model (4 layers of width
48, 4 heads, 2 KV heads where the architecture has them), opened by ovqk and compared in float64 with what hooks on the
Hugging Face model see. `python scripts/architectures.py --write` makes this page anew.

- **scores**: each head's scores before the softmax, every query with every key, positions included.
- **writes**: what each head adds to the residual stream, with every norm and multiplier behind the output projection.
- **block 0**: the first block as the effective embedding of later layers.
- **logits**: what the unembedding makes of the last residual stream, with every multiplier and before any cap.

Numbers are the largest difference over all layers and heads, relative to the largest entry; ovqk holds weights in
float32, so 1e-6 is exact. A dash: ovqk gives no such number, and says so. *Raw* means that the residual spectra of the
stored weights are given and nothing else, because ovqk's form did not reproduce the model; the record's notes say why.
"""


def page(rows: list[Row], version: str) -> str:
    """docs/architectures.md."""
    text = [HEADING.format(version=version)]
    read = [row for row in rows if row.read.startswith(("natively", "through"))]
    text += [f"\n## Read ({len(read)})\n", "| architecture | read | scores | writes | block 0 | logits | remarks |"]
    text.append("|---|---|---|---|---|---|---|")
    for row in read:
        numbers = [
            f"{value:.0e}" if value is not None else "-" for value in (row.scores, row.writes, row.block0, row.logits)
        ]
        remarks = "; ".join([*([row.why] if row.why else []), *row.notes])
        text.append(f"| {row.name} | {row.read} | {' | '.join(numbers)} | {_cell(remarks)} |")
    for kind, title in (
        ("refused", "Refused, with this message"),
        ("not shrunk", "Not examined: not shrunk generically"),
    ):
        these = [row for row in rows if row.read == kind]
        text += [f"\n## {title} ({len(these)})\n", "| architecture | reason |", "|---|---|"]
        text += [f"| {row.name} | {_cell(row.why)} |" for row in these]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Examine the architectures; exit with 1 if one is read wrongly or ends in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    parser.add_argument("--only", nargs="*", help="these model types alone")
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = examine_all(arguments.only or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS}))
    if arguments.write:
        (ROOT / "docs" / "architectures.md").write_text(page(rows, transformers.__version__))
    bad = [row for row in rows if row.wrong or row.read == "TRACEBACK"]
    for row in bad:
        print(_shown(row))
    print(f"{len(rows)} architectures, {len(bad)} of them wrong or ending in a traceback")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
