"""Rotary settings of every family, in every form that config.json has for them, against transformers' own modules."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.models import KINDS, local, make, opened
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.checkpoints.tensors import SafetensorsFiles
from ovqk.errors import UserError
from ovqk.weights.families import family_of
from ovqk.weights.readers import open_weights
from ovqk.weights.rotations import completed, read_rotations
from ovqk.weights.types import Architecture

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans

DROPPED = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
FORMS = {
    "nothing": {},
    "theta at the top": {"rope_theta": 500.0},
    "scaling null": {"rope_theta": 500.0, "rope_scaling": None},
    "theta inside a default scaling": {
        "rope_theta": 9.0, "rope_scaling": {"rope_type": "default", "rope_theta": 500.0},
    },
    "theta inside a default scaling alone": {"rope_scaling": {"type": "default", "rope_theta": 500.0}},
    "new, and a stale theta": {"rope_theta": 9.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "new without a type": {"rope_parameters": {"rope_theta": 500.0}},
    "linear by type": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama3": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3, new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    "yarn": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn, its length at the top": {
        "rope_theta": 500.0, "original_max_position_embeddings": 4, "rope_scaling": {"type": "yarn", **YARN},
    },
    "yarn, new, every key": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, **YARN,
        },
    },
    "yarn with a factor of attention": {"rope_scaling": {"type": "yarn", "attention_factor": 1.3, **YARN}},
    "dynamic": {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "partial at the top": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "partial inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "partial and linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.5},
    },
    "longrope": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.1], "long_factor": [3.0], "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
}  # fmt: skip
TYPES = sorted({kind.split("-")[0] for kind in KINDS} - {"gpt2", "gpt_neo", "gptj", "opt"})


def read(config: dict):
    """ovqk's rotations of a config.json, and the notes on them."""
    checkpoint = Checkpoint("a config", Path(), config, SafetensorsFiles({}, {}, {}), "")
    family = family_of(config)
    keys, full = completed(checkpoint, family)
    heads, width = keys["num_attention_heads"], keys["hidden_size"]
    d_head = keys.get("head_dim") or width // heads
    facts = Architecture(family.name, 2, heads, heads, width, d_head, 16, family.norm, 1e-5, "rotary")
    return read_rotations(checkpoint, family, facts, full)


def own_rotations(config: dict):
    """The frequencies and the factor that transformers' own module has, by kind of layer."""
    full = AutoConfig.for_model(**json.loads(json.dumps(config)))
    module = importlib.import_module(MODEL_MAPPING[type(full)].__module__)
    rotary = next(getattr(module, name) for name in dir(module) if name.endswith("RotaryEmbedding"))(full)
    if hasattr(rotary, "inv_freq"):
        return {None: (rotary.inv_freq, rotary.attention_scaling)}
    return {
        kind: (getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
        for kind in rotary.layer_types
    }


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rotation_that_transformers_gives(kind, form) -> None:
    config = {key: value for key, value in KINDS[kind].items() if key not in DROPPED}
    config |= {"model_type": kind, "rms_norm_eps": 1e-6, "hidden_act": "silu"} | json.loads(json.dumps(FORMS[form]))
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    try:
        own = own_rotations(config)
    except Exception as error:  # transformers raises many kinds
        with pytest.raises(UserError):
            read(config)
        assert form != "nothing", error
        return
    partial = family_of(config).partial_rotary
    if not partial and any(2 * len(frequencies) != d_head for frequencies, _ in own.values()):
        with pytest.raises(UserError, match=r"allowed for model_type=.*: all of a head"):  # nor does transformers run
            read(config)
        return
    mine, notes = read(config)
    assert mine.keys() == own.keys()
    for of, (frequencies, factor) in own.items():
        assert torch.allclose(mine[of].inverse_frequencies, frequencies, rtol=1e-6, atol=0), of
        assert mine[of].scale == pytest.approx(factor**2, rel=1e-6)
        assert mine[of].interleaved == family_of(config).interleaved
    if None not in mine:  # of settings by kind of layer, transformers takes less from the top
        return
    assert any("no longer than" in note for note in notes) == (form in ("dynamic", "longrope"))
    ignored = not partial and form in ("partial at the top", "partial inside")
    assert any("partial_rotary_factor=0.5, which transformers does not read" in note for note in notes) == ignored


@pytest.mark.parametrize("kind", TYPES)
def test_rotations_by_kind_of_layer_are_read_of_modules_that_have_them_and_refused_of_others(kind) -> None:
    kinds = {"full_attention": {"rope_type": "linear", "rope_theta": 77.0, "factor": 4.0}}
    kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": 500.0}
    config = {key: value for key, value in KINDS[kind].items() if key not in DROPPED}
    config |= {"model_type": kind, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": kinds}
    module = importlib.import_module(MODEL_MAPPING[type(AutoConfig.for_model(kind))].__module__)
    rotary = next(getattr(module, name) for name in dir(module) if name.endswith("RotaryEmbedding"))
    has_kinds = "layer_type" in inspect.signature(rotary.forward).parameters
    assert family_of(config).rotations_by_kind == has_kinds
    if not has_kinds:
        with pytest.raises(UserError, match=r"'rope_parameters' by kind of layer .* allowed: settings for all of them"):
            read(config)


def test_a_plain_llama_is_read_without_transformers() -> None:
    """Its import takes seconds."""
    config = {"model_type": "llama", "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    code = (
        "import sys; from pathlib import Path; from ovqk.checkpoints.checkpoint import Checkpoint; "
        "from ovqk.checkpoints.tensors import SafetensorsFiles; "
        "from ovqk.weights.families import family_of; from ovqk.weights.rotations import completed, read_rotations; "
        "from ovqk.weights.types import Architecture; "
        f"config = {config}; checkpoint = Checkpoint('x', Path(), config, SafetensorsFiles({{}}, {{}}, {{}}), ''); "
        "family = family_of(config); keys, full = completed(checkpoint, family); "
        "facts = Architecture('llama', 2, 4, 4, 32, 8, 16, 'rmsnorm', 1e-6, 'rotary'); "
        "read_rotations(checkpoint, family, facts, full); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_a_default_that_config_json_leaves_out_is_the_model_types_own() -> None:
    """Llama's norm has 1e-6 where nothing is said, and not the 1e-5 of others."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    checkpoint = Checkpoint("a config", Path(), config, SafetensorsFiles({}, {}, {}), "")
    keys, _ = completed(checkpoint, family_of(config))
    assert (keys["rms_norm_eps"], keys["hidden_act"], keys["max_position_embeddings"]) == (1e-6, "silu", 2048)


NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("llama", {"rope_scaling": "linear"}, "'rope_scaling' as 'linear'; allowed: an object, or null"),
        ("llama", {"rope_parameters": [1]}, r"'rope_parameters' as \[1\]; allowed: an object, or null"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "'rope_scaling.factor' as '4'; allowed: a finite",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": NAN}},
            "'rope_scaling.factor' as nan; allowed: a finite",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "as -2.0; allowed: a finite number above 0"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "by 'linear' and does not give 'rope_scaling.factor'"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "does not give 'rope_scaling.low_freq_factor'"),
        ("llama", {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": NAN}}, "attention_factor' as nan"),
        ("llama", {"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "a"}}, "beta_fast' as 'a'; allowed: a finite"),
        ("llama", {"rope_scaling": {"type": 7, "factor": 2.0}}, "'rope_scaling.type' as 7; allowed: a string"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2, 3], "long_factor": [1], "factor": 2.0}},
            "3 numbers in 'short_factor' of its rotary settings; allowed: 4, one for each pair",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 0], "long_factor": [1], "factor": 2.0}},
            r"short_factor' as \[1, 0\]; allowed: a list of finite numbers above 0",
        ),
        ("llama", {"rope_theta": "10000"}, "'rope_theta' as '10000'; allowed: a finite number above 0"),
        ("qwen3", {"rope_theta": -5}, "'rope_theta' as -5; allowed: a finite number above 0"),
        ("llama", {"rope_theta": 0}, "'rope_theta' as 0; allowed: a finite number above 0"),
        ("llama", {"rope_theta": None}, "'rope_theta' as None; allowed: a finite number above 0"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
            "'rope_parameters.full_attention.rope_theta' as 'x'",
        ),
        ("gemma3_text", {"rope_local_base_freq": -1}, "'rope_local_base_freq' as -1; allowed: a finite number above 0"),
        (
            "phi",
            {"partial_rotary_factor": 1.5},
            "'partial_rotary_factor' as 1.5; allowed: a number above 0 and up to 1",
        ),
        ("phi", {"partial_rotary_factor": 0}, "'partial_rotary_factor' as 0; allowed: a number above 0 and up to 1"),
        ("gpt_neox", {"rotary_pct": "a"}, "'rotary_pct' as 'a'; allowed: a number above 0 and up to 1"),
        ("gpt_neox", {"rotary_emb_base": -10}, "'rotary_emb_base' as -10; allowed: a finite number above 0"),
        ("qwen3", {"layer_types": ["full_attention"]}, "'layer_types' 1 long; allowed: an entry for each of the 3"),
        ("qwen3", {"layer_types": "full_attention"}, "'layer_types' as 'full_attention'; allowed: a list of strings"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' 2 long; allowed: an entry for each of the 3"),
        (
            "mistral",
            {"sliding_window": "4096"},
            "'sliding_window' as '4096'; allowed: an integer of 0 or more, or null",
        ),
        ("qwen3", {"head_dim": 8.0}, "'head_dim' as 8.0; allowed: an integer above 0, or null"),
        ("qwen3", {"hidden_size": "24"}, "'hidden_size' is '24'; allowed: an integer"),
        ("gptj", {"rotary_dim": 3}, "'rotary_dim' as 3; allowed: an even integer above 0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_message(tiny, kind, keys, message, tmp_path) -> None:
    """It names the key and what is allowed; some gave another rotation without a word."""
    config = json.loads((tiny(kind) / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    (tmp_path / "config.json").write_text(json.dumps(kept | keys))
    (tmp_path / "model.safetensors").symlink_to(tiny(kind) / "model.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        open_weights(open_checkpoint(local(tmp_path)), local(tmp_path))
    for word in ("unsupported operand", "not supported between", "could not convert", "TypeError", "object has no"):
        assert word not in str(raised.value)


def test_keys_that_a_scaling_lacks_are_named(tmp_path) -> None:
    make("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters", None)
    scaling = {"type": "su", "long_factor": [1.0] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(UserError, match="short_factor"):
        opened(tmp_path)
