"""Random checkpoints with the shapes of known models and a synthetic tokenizer, for `scripts/bench.py`.

    python -m ovqk.testing.random_checkpoints gemma-3-270m /tmp/gemma-3-270m

A checkpoint is a Hugging Face directory with the tensors that ovqk reads: attention in every layer, block 0's MLP,
norms and embeddings. Its tokenizer is a byte-level BPE; its vocabulary is invented words and the words of ovqk's tasks.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from ovqk.config.place import CONF

TASKS = CONF / "task"
SPACE = "Ġ"  # a space, as byte-level BPE spells it
LEADING_SPACE = 0.6  # the share of tokens that begin with a space
TITLE_CASE = 0.3  # the share of tokens that begin with a capital letter
COMMONER = 100  # one token in this many comes before all task words, which are not the most frequent ones


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        family: `gpt2`, `llama` or `gemma3_text`.
        n_kv_heads: None for as many as there are heads.
        d_mlp: None for four times d_model.
    """

    family: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_vocab: int
    tied: bool
    dtype: torch.dtype = torch.float32
    n_kv_heads: int | None = None
    d_mlp: int | None = None

    @property
    def width(self) -> int:
        """All heads' dimensions in a layer together."""
        return self.n_heads * self.d_head

    @property
    def kv_width(self) -> int:
        """All KV heads' dimensions in a layer together."""
        return (self.n_kv_heads or self.n_heads) * self.d_head

    @property
    def mlp_width(self) -> int:
        """An MLP's hidden dimensions."""
        return self.d_mlp or 4 * self.d_model


SHAPES = {
    "gpt2-small": Shape("gpt2", 12, 12, 768, 64, 50257, True),
    "gpt2-medium": Shape("gpt2", 24, 16, 1024, 64, 50257, True),
    "gpt2-xl": Shape("gpt2", 48, 25, 1600, 64, 50257, True),
    "llama-7b": Shape("llama", 32, 32, 4096, 128, 32000, False, torch.bfloat16, d_mlp=11008),
    "smollm2-135m": Shape("llama", 30, 9, 576, 64, 49152, True, n_kv_heads=3, d_mlp=1536),
    "gemma-3-270m": Shape("gemma3_text", 18, 4, 640, 256, 262144, True, torch.bfloat16, n_kv_heads=1, d_mlp=2048),
}


Normal = Callable[..., Tensor]
"""Returns a normal tensor with this size, in the checkpoint's dtype."""


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a random checkpoint with this shape, a shard for each layer, unless the folder already holds one."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (0.02 * torch.randn(size, generator=generator)).to(shape.dtype)

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, Tensor], file: str) -> None:
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    gpt2 = shape.family == "gpt2"
    for layer in range(shape.n_layers):
        tensors = _gpt2_layer(shape, layer, normal) if gpt2 else _llama_layer(shape, layer, normal)
        save(tensors, f"layer-{layer:03d}.safetensors")
    save(_gpt2_rest(shape, normal) if gpt2 else _llama_rest(shape, normal), "embeddings.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = synthetic_tokenizer(shape.n_vocab, task_words())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_gpt2_config(shape) if gpt2 else _llama_config(shape)))


def _gpt2_layer(shape: Shape, layer: int, normal: Normal) -> dict[str, Tensor]:
    d, width, hidden, at = shape.d_model, shape.width, shape.mlp_width, f"transformer.h.{layer}."
    tensors = {
        f"{at}attn.c_attn.weight": normal(d, 3 * width),
        f"{at}attn.c_attn.bias": normal(3 * width),
        f"{at}attn.c_proj.weight": normal(width, d),
        f"{at}attn.c_proj.bias": normal(d),
        f"{at}ln_1.weight": 1 + normal(d),
        f"{at}ln_1.bias": normal(d),
    }
    if layer == 0:
        tensors |= {f"{at}mlp.c_fc.weight": normal(d, hidden), f"{at}mlp.c_fc.bias": normal(hidden)}
        tensors |= {f"{at}mlp.c_proj.weight": normal(hidden, d), f"{at}mlp.c_proj.bias": normal(d)}
        tensors |= {f"{at}ln_2.weight": 1 + normal(d), f"{at}ln_2.bias": normal(d)}
    return tensors


def _gpt2_rest(shape: Shape, normal: Normal) -> dict[str, Tensor]:
    d = shape.d_model
    rest = {"transformer.wte.weight": normal(shape.n_vocab, d), "transformer.wpe.weight": normal(1024, d)}
    return rest | {"transformer.ln_f.weight": 1 + normal(d), "transformer.ln_f.bias": normal(d)}


def _gpt2_config(shape: Shape) -> dict[str, object]:
    config: dict[str, object] = {"model_type": "gpt2", "n_layer": shape.n_layers, "n_head": shape.n_heads}
    config |= {"n_embd": shape.d_model, "n_positions": 1024, "vocab_size": shape.n_vocab}
    return config | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def _llama_layer(shape: Shape, layer: int, normal: Normal) -> dict[str, Tensor]:
    d, hidden, at = shape.d_model, shape.mlp_width, f"model.layers.{layer}."
    gemma = shape.family == "gemma3_text"
    one = 0 if gemma else 1  # Gemma's gains are stored less 1
    widths = {"q": shape.width, "k": shape.kv_width, "v": shape.kv_width}
    tensors = {f"{at}self_attn.{name}_proj.weight": normal(width, d) for name, width in widths.items()}
    tensors |= {f"{at}self_attn.o_proj.weight": normal(d, shape.width)}
    norms = ["input_layernorm"] + ["post_attention_layernorm"] * (gemma or layer == 0)
    if gemma:
        tensors |= {f"{at}self_attn.{name}_norm.weight": normal(shape.d_head) for name in "qk"}
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * (layer == 0)
    tensors |= {f"{at}{norm}.weight": one + normal(d) for norm in norms}
    if layer == 0:
        tensors |= {f"{at}mlp.{name}_proj.weight": normal(hidden, d) for name in ("gate", "up")}
        tensors |= {f"{at}mlp.down_proj.weight": normal(d, hidden)}
    return tensors


def _llama_rest(shape: Shape, normal: Normal) -> dict[str, Tensor]:
    d, one = shape.d_model, 0 if shape.family == "gemma3_text" else 1
    rest = {"model.embed_tokens.weight": normal(shape.n_vocab, d), "model.norm.weight": one + normal(d)}
    return rest if shape.tied else rest | {"lm_head.weight": normal(shape.n_vocab, d)}


def _llama_config(shape: Shape) -> dict[str, object]:
    config: dict[str, object] = {"model_type": shape.family, "num_hidden_layers": shape.n_layers}
    config |= {"num_attention_heads": shape.n_heads, "num_key_value_heads": shape.n_kv_heads or shape.n_heads}
    config |= {"hidden_size": shape.d_model, "head_dim": shape.d_head, "intermediate_size": shape.mlp_width}
    config |= {"vocab_size": shape.n_vocab, "tie_word_embeddings": shape.tied, "rms_norm_eps": 1e-6}
    if shape.family != "gemma3_text":
        return config | {"hidden_act": "silu", "max_position_embeddings": 4096}
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(shape.n_layers)]
    rotary = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512, "layer_types": kinds}
    scale = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": shape.d_head}
    return config | rotary | scale | {"max_position_embeddings": 32768}


# --- tokenizer -----------------------------------------------------------------------------------------------


def task_words() -> list[str]:
    """Return every word in conf/task's tasks, once each."""
    tasks = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml")))
    words = (str(word) for task in tasks for some in (task.get("words") or {}).values() for word in some)
    return list(dict.fromkeys(words))


def synthetic_tokenizer(n_tokens: int, words: Sequence[str]) -> dict[str, object]:
    """Return a byte-level BPE's tokenizer.json with these words as one token each, with a space before them.

    Its first tokens are the 256 bytes; the others are invented words of 2 to 11 letters. If the vocabulary has no room
    for the bytes and twice the words, all its tokens are invented.
    """
    rng = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    given = [f"{SPACE}{word}" for word in words if word.isascii() and word.isalpha()]
    if n_tokens < len(tokens) + 2 * len(given):
        tokens, given = [], []
    places = dict(zip(_ranks(rng, n_tokens, len(given)), given, strict=True))
    taken = {*tokens, *given}
    while len(tokens) < n_tokens:
        token = places.get(len(tokens)) or _invented(rng, taken)
        taken.add(token)
        tokens.append(token)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": True}  # a word that is a token is it
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": pieces, "decoder": pieces, "model": model}


def _ranks(rng: random.Random, n_tokens: int, count: int) -> list[int]:
    """Return different ids, uniform on a logarithmic scale, as word frequencies are."""
    lowest, found = math.log(max(257, n_tokens // COMMONER)), dict[int, None]()
    while len(found) < count:
        found[int(math.exp(rng.uniform(lowest, math.log(n_tokens))))] = None
    return list(found)


def _invented(rng: random.Random, taken: set[str]) -> str:
    """Return a token that is not taken yet."""
    while True:
        word = "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 11)))
        word = word.capitalize() if rng.random() < TITLE_CASE else word
        token = f"{SPACE}{word}" if rng.random() < LEADING_SPACE else word
        if token not in taken:
            return token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make_checkpoint(SHAPES[arguments.shape], arguments.folder)


if __name__ == "__main__":
    main()
