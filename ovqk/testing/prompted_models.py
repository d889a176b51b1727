"""Models that run on prompts: heads planted in attention-only models, and transformers at random initialisation.

In a planted model a previous-token head, an induction head and a copy head are built by hand; all others are random.
The stream has three parts: the token's one-hot row, the position's, and a copy of the token before, which the
previous-token head writes and the induction head looks up.

    run_model    everything that is measured and judged about a model on the induction task
    planted_run  which heads are found in one planted model
    untrained    p-values in one untrained model, for heads claimed at random
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ovqk.activations.batches import Prompts, read_prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.judge import Judged, judge_activations
from ovqk.activations.links import WriteLinks
from ovqk.activations.measure import check_activations, chosen_heads, measure
from ovqk.activations.peers import grids, head_peers, role_peers
from ovqk.activations.roles import Measured
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import (
    AttentionConfig,
    Config,
    ModelConfig,
    RoleActivationsConfig,
    RoleConfig,
    Source,
    WriteConfig,
)
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.testing.planted import base_config
from ovqk.testing.tiny_architectures import randomise
from ovqk.weights.readers import open_weights
from ovqk.weights.types import Head, OpenedModel

POSITIONS, HEADS, LAYERS = 24, 4, 2
MANY = 24
"""How many heads a layer holds, so that one head can stand out among them."""
WORDS = 40
SHARP, NOISE = 40.0, 0.1
COPYING = "copying"
"""A planted copy head's role: it looks at the token before the source, which is END's own, and copies it."""


@dataclass
class Ran:
    """A model with everything that was measured about it."""

    prompts: Prompts
    measured: Measured
    judged: Judged


# --- the task ------------------------------------------------------------------------------------------------


def induction_cell(seed: int, prompts: int) -> Config:
    """Return a cell for the induction task with few words."""
    config = copy.deepcopy(base_config("induction"))
    config.seed, config.activations.prompts = seed, prompts
    return with_few_words(config)


def with_few_words(config: Config) -> Config:
    """Leave the task only its first words."""
    config.task.words["content"] = config.task.words["content"][:WORDS]
    return config


def with_copying(config: Config) -> Config:
    """Add the copy-head role to the task."""
    acts = RoleActivationsConfig(
        attention=AttentionConfig("END", "PREVIOUS", "SOURCE"),
        write=WriteConfig("PREVIOUS", "FOIL"),
        decides=["attention", "write"],
    )
    config.task.roles[COPYING] = RoleConfig(predictions=[], activations=acts)
    return config


def tokenizer_of(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer for whole words; id 0 is an unknown word."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


# --- models --------------------------------------------------------------------------------------------------


def write_model(
    file: Path, n_tokens: int, seed: int, planted: Sequence[Head] | None, heads: int = HEADS, layers: int = LAYERS
) -> None:
    """Save an attention-only model.

    Args:
        file: the file to write.
        n_tokens: the vocabulary's size.
        seed: the seed for the random heads.
        planted: a previous-token head, an induction head in a later layer, and possibly a copy head; None for none.
        heads, layers: how many heads a layer has, and how many layers there are.
    """
    generator = torch.Generator().manual_seed(seed)
    d_model = 2 * n_tokens + POSITIONS
    token, position, before = (
        slice(0, n_tokens), slice(n_tokens, n_tokens + POSITIONS), slice(n_tokens + POSITIONS, d_model)
    )  # fmt: skip
    tensors = {}
    for layer in range(layers):
        for part in "QKVO":
            shape = (heads, n_tokens, d_model) if part == "O" else (heads, d_model, n_tokens)
            weight = NOISE * torch.randn(shape, generator=generator) / n_tokens**0.5
            tensors[f"blocks.{layer}.attn.W_{part}"] = weight
    tensors["embed.W_E"] = torch.eye(n_tokens, d_model)
    tensors["pos_embed.W_pos"] = torch.eye(POSITIONS, d_model).roll(n_tokens, 1)
    tensors["unembed.W_U"] = torch.eye(n_tokens, d_model).T.contiguous()

    def of(head: Head, part: str) -> torch.Tensor:
        return tensors[f"blocks.{head[0]}.attn.W_{part}"][head[1]]

    for head in planted or ():
        for part in "QKVO":
            of(head, part)[:] = 0
    same = torch.eye(n_tokens)
    if planted:
        previous, induction, *copying = planted
        shift = torch.eye(POSITIONS).roll(-1, 1)  # position i asks for i - 1
        shift[0] = 0
        of(previous, "Q")[position, :POSITIONS] = SHARP * shift
        of(previous, "K")[position, :POSITIONS] = torch.eye(POSITIONS)
        of(previous, "V")[token] = same
        of(previous, "O")[:, before] = same
        of(induction, "Q")[token] = SHARP * same
        of(induction, "K")[before] = same
        for head in (induction, *copying):
            of(head, "V")[token] = same
            of(head, "O")[:, token] = 4 * same
        for head in copying:
            of(head, "Q")[token] = SHARP * same
            of(head, "K")[token] = same
    save_file(tensors, file)


COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 8, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 8, "n_inner": 32, "n_positions": 32}),
    "rotary, grouped queries": ("llama", COMMON | {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 8}),
    "rotary, parallel": ("gpt_neox", COMMON | {"num_hidden_layers": 4, "rotary_pct": 0.5}),
}
"""Shape -> transformers' name for the architecture, and its sizes: 32 or 48 heads."""


def untrained_model(directory: Path, shape: str, n_tokens: int, seed: int) -> None:
    """Save a transformer with random weights and biases, and gains that are random around 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = UNTRAINED[shape]
    quiet = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes | quiet, vocab_size=n_tokens)
    plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    randomise(plain, seed).save_pretrained(directory)


# --- runs ----------------------------------------------------------------------------------------------------


def run_model(file: Path, config: Config, claimed: Mapping[str, Sequence[Head]] | None = None) -> Ran:
    """Measure and judge a model that `write_model` saved, or a transformers model in a directory."""
    words, claims = config.task.words["content"], claimed or {}
    config.model = ModelConfig(
        name=file.name.removesuffix(".safetensors"), source=Source.local, path=str(file),
        causal=None if file.is_dir() else True,
    )  # fmt: skip
    checkpoint = open_checkpoint(config.model)
    tokenizer = tokenizer_of(words)
    model = Model.read(OpenedModel(open_weights(checkpoint, config.model), "planted", tokenizer), config)
    asked = config.activations
    prompts = read_prompts(config.task, tokenizer, [], asked.prompts, config.seed, asked.batch)
    running = RunningModel.load(checkpoint, config.model, torch.device("cpu"))
    roles = check_activations(config.task)
    measured = measure(
        running, model, prompts, roles, claims, asked.screened, config.seed, lambda count, what: range(count)
    )
    links = WriteLinks(model, prompts, measured.observed, roles)
    for index in range(model.architecture.n_layers):
        links.visit(Layer(model, index))
    return Ran(prompts, measured, judge_activations(measured, claims, links))


def places(seed: int, heads: int = HEADS) -> dict[str, Head]:
    """Return role -> its planted head: previous-token in layer 0, induction in layer 1, a copy head in either."""
    previous, induction = seed % heads, seed // heads % heads
    copying = ((previous + 1) % heads, (induction + 1) % heads)[seed % 2]
    return {"previous_token": (0, previous), "induction": (1, induction), COPYING: (seed % 2, copying)}


def planted_run(cell: tuple[int, int]) -> pd.DataFrame:
    """Measure and judge one planted model.

    Args:
        cell: heads in a layer, and the seed.

    Returns:
        A row for each planted head. Columns role, measured, verdict, head_p (the largest p against other heads),
        role_p, others (heads without the role that are measured in it), heads and seed.
    """
    heads, seed = cell
    torch.set_num_threads(1)
    config, planted = with_copying(induction_cell(seed, 2 * PROMPTS)), places(seed, heads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        write_model(file, WORDS + 1, seed, list(planted.values()), heads)
        judged = run_model(file, config).judged
    rows = {(row["role"], row["layer"], row["head"]): row for row in judged.roles.to_dict("records")}
    found = []
    for role, head in planted.items():
        row = rows.get((role, *head), {})
        p = [row.get(f"{quantity}_peers_p", np.nan) for quantity in ("attention", "write")]
        others = [other for other in judged.measured[role] if other != head]
        found.append(
            {"role": role, "measured": head in judged.measured[role], "verdict": row.get("verdict", "not chosen")}
            | {"head_p": np.nanmax(p) if len(row) else 1.0, "role_p": judged.peers[role].p, "others": len(others)}
        )
    return pd.DataFrame(found).assign(heads=heads, seed=seed)


PROMPTS = 64
"""How many prompts an untrained model gets; a planted one gets twice as many."""
PLACES = {
    "attention, counterfactual": ("induction", "attention"),
    "write": ("induction", "write"),
    "effect": ("induction", "effect"),
    "effect, mean": ("induction", "effect_mean"),
    "effect on attention": ("previous_token", "effect"),
    "effect on attention, mean": ("previous_token", "effect_mean"),
    "attention, control": ("previous_token", "attention"),
}
"""Name of a p-value on prompts -> the role and the column that it belongs to."""
NO_NULL = "attention, control"
"""The p-value in PLACES that need not keep its level: random models may look more at one place than at another."""


def untrained(cell: tuple[str, int]) -> pd.DataFrame:
    """Run one untrained model, with two heads claimed at random for each of two roles.

    Earlier occurrences mean nothing to it, and answers and foils are drawn alike, so no quantity has a side. Each model
    gives one p-value of each kind, for the role's first head, so that the values are independent.

    Args:
        cell: a key in UNTRAINED, and the seed for the weights, the prompts, and the claims.

    Returns:
        Columns quantity, p, p_opposite (nan if there is none), is_null, shape, seed, chosen (heads that the choosing
        half gives a role) and heads (all heads times roles).
    """
    shape, seed = cell
    torch.set_num_threads(1)
    config = induction_cell(seed, PROMPTS)
    config.activations.screened = 0
    roles = config.task.roles
    assert roles["induction"].activations is not None and roles["induction"].activations.attention is not None
    roles["induction"].activations.attention.beyond = ["counterfactual"]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        untrained_model(directory, shape, WORDS + 1, seed)
        layers, heads = (UNTRAINED[shape][1][name] for name in _sizes(shape))
        drawn = np.random.default_rng(seed).choice(layers * heads, 4, replace=False)
        places = [(int(place) // heads, int(place) % heads) for place in drawn]
        claimed = {"induction": sorted(places[:2]), "previous_token": sorted(places[2:])}
        measured = run_model(directory, config, claimed).measured
    rows = {role: measured.rows(role, "testing") for role in claimed}
    found: list[dict[str, Any]] = []
    for name, (role, column) in PLACES.items():
        layer, head = claimed[role][0]
        row = rows[role][(rows[role]["layer"] == layer) & (rows[role]["head"] == head)].iloc[0]
        found.append({"quantity": name, "p": row[f"{column}_p"], "p_opposite": row.get(f"{column}_p_opposite", np.nan)})
    taken, groups = {head for some in claimed.values() for head in some}, measured.kv_of_head
    for role, own in claimed.items():
        for quantity, grid in grids(measured.roles[role], rows[role]).items():
            one = head_peers({quantity: grid}, own[0], taken, groups)[quantity]
            found.append({"quantity": f"peers of a head: {quantity}, {role}", "p": one.p, "p_opposite": one.p_opposite})
            both = role_peers({quantity: grid}, own, taken - set(own), groups, seed)
            found.append({"quantity": f"peers of a role: {quantity}, {role}", "p": both.p, "p_opposite": np.nan})
    chosen = sum(len(chosen_heads(measured, role)) for role in claimed)
    found_in = {"shape": shape, "seed": seed, "chosen": chosen, "heads": 2 * layers * heads}
    rows_of = pd.DataFrame(found)
    return rows_of.assign(is_null=rows_of["quantity"] != NO_NULL, **found_in)


def _sizes(shape: str) -> tuple[str, str]:
    return ("n_layer", "n_head") if UNTRAINED[shape][0] == "gpt2" else ("num_hidden_layers", "num_attention_heads")
