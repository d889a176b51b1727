"""The schema of conf/, with every key that a user can set, its type and its default.

Hydra merges the YAML files and the command line into these dataclasses, so an unknown key or a value of the
wrong type is refused before any work is done.
"""

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Circuit(StrEnum):
    """One of a head's two circuits.

    Its members are strings, because they begin metrics' names and are keys that a user types. A table holds the plain
    string, `circuit.value`.
    """

    ov = "ov"
    """W_V W_O, which maps the residual stream at the source to the output at the destination."""
    qk = "qk"
    """W_Q W_K^T, a bilinear form on the residual streams at destination and source, which scores attention."""


CIRCUITS = tuple(Circuit)


class Source(Enum):
    """The origin of a model's files."""

    bundled = "bundled"
    local = "local"
    package = "package"
    hub = "hub"


class Processing(Enum):
    """The weights that residual-space metrics are computed from (definitions: section 1)."""

    folded = "folded"
    raw = "raw"


class Embedding(Enum):
    """The effective embedding that heads are read through (definitions: section 1)."""

    by_layer = "by_layer"
    """`token` for layer 0 and `block0` for the layers after it."""
    token = "token"
    block0 = "block0"
    stream = "stream"
    """`token` for layer 0, and for the layers after it what the running model has there for a word alone."""

    def kind(self, layer: int) -> Literal["token", "block0", "stream"]:
        """Return the effective embedding that a layer is read through."""
        if self is Embedding.token or (layer == 0 and self is not Embedding.block0):
            return "token"
        return "stream" if self is Embedding.stream else "block0"


class VariableKind(Enum):
    """The kind of causal variable that a task reads (definitions: section 5)."""

    set = "set"
    contrast = "contrast"
    relation = "relation"
    """Pairs of words, a source and a target, such as a country and its capital."""


class Direction(Enum):
    """The side of its nulls on which a prediction expects the metric."""

    high = "high"
    low = "low"


class Device(Enum):
    """The device that computes products."""

    cpu = "cpu"
    cuda = "cuda"
    auto = "auto"
    """`cuda` if the machine has one, else `cpu`."""


class TrackingMode(Enum):
    """The extent to which W&B is used."""

    none = "none"
    offline = "offline"
    online = "online"


@dataclass
class ModelConfig:
    """One model: the place of its weights, and the model whose claims apply to it."""

    name: str = MISSING
    source: Source = MISSING
    path: str | None = None
    """`local`: a Hugging Face directory, a GGUF file, or one safetensors file of TransformerLens names."""
    package: str | None = None
    """`package`: the installed Python package that holds the weights, as NAME==VERSION."""
    file: str | None = None
    """`package`: the GGUF file's path inside the package."""
    sha256: str | None = None
    """`package`: the file's SHA-256; another file is refused."""
    repo: str | None = None
    """`hub`: the repository, as owner/name."""
    revision: str = "main"
    """`hub`: branch, tag or commit; the commit it resolved to is in the record."""
    checkpoint: int | None = None
    """`hub`: the step of training to read, if the repository keeps earlier ones; the last unless set."""
    checkpoints: str | None = None
    """`hub`: the revision's name for a step of training, with `{checkpoint}` in the step's place."""
    claims: str | None = None
    """The model whose claimed heads apply; none unless set. `local`: any model that the checkpoint is a copy of."""
    n_ctx: int | None = None
    """Context length, if the checkpoint does not say."""
    causal: bool | None = None
    """Causal attention, if the checkpoint does not say."""
    attn_coeff: float = 1.0
    """The softmax's share of attention, in [0, 1]: the rest is 1 for every key (Zhong et al. 2023, "attention rate").
    Only for files of TransformerLens names, which do not say."""
    trust_remote_code: bool = False
    """Run code from the checkpoint's repository; needs a `revision` that is a full commit."""


@dataclass
class VariableConfig:
    """A causal variable of a task: a set of words, a contrast between two sets, or a relation between words."""

    kind: VariableKind = MISSING
    words: str | None = None
    """`set`: the word set."""
    read: list[str] = field(default_factory=list)
    """`contrast`: [minus, plus] word sets that are read, index-aligned. `relation`: a set of sources for each kind."""
    write: list[str] = field(default_factory=list)
    """`contrast`: [minus, plus] word sets that are written, index-aligned. `relation`: each source's target."""


@dataclass
class CycleConfig:
    """A task's words that form a cycle: the residues modulo a number (definitions: section 5)."""

    modulus: int = MISSING
    """The number of residues."""
    operator: str = "+"
    """The answer to residues a and b: `+` for a + b, `-` for a - b, modulo `modulus`."""
    first: int = 0
    """The token of residue 0; the others follow it. For models without a tokenizer."""
    words: str | None = None
    """A word set in task.words, residue by residue, instead of `first`."""
    between: int | None = None
    """The token between a and b, such as "+"; unless set, there is none."""
    query: int | None = None
    """The token after b at which the answer is read, such as "="; unless set, it is read at b."""


@dataclass
class PredictionConfig:
    """A role's prediction about one metric."""

    metric: str = MISSING
    direction: Direction = Direction.high
    first_layer: str | None = None
    """The metric that replaces it in layer 0, if another does."""
    direct_only: bool = False
    """With learned positions, test layer 0 alone: later layers see positions through earlier heads."""
    exploratory: bool = False
    """Reported, never part of a verdict."""
    ranks: bool = False
    """Candidates are ranked by it instead of the primary, and by their worst place if several metrics rank. It says
    nothing about verdicts, and counts only if all metrics that rank have values."""
    partners: list[str] = field(default_factory=list)
    """For a composition: the roles whose claimed heads the head composes with."""


class Repeats(StrEnum):
    """The place that a role's heads attend to on repeated random tokens, from a token of the second copy."""

    previous = "previous"
    """To the token before."""
    same = "same"
    """To the same token's first occurrence."""
    next = "next"
    """To the token after that."""


@dataclass
class AttentionConfig:
    """The attention that a role's heads show on prompts: from a query token to a source token.

    Tokens are labels of the task's prompts; "S1+1" and "S1-1" are the ones after and before a label.
    """

    query: str = MISSING
    source: str = MISSING
    control: str = MISSING
    """A token of the same kind, to which the head should attend less."""
    beyond: list[str] = field(default_factory=lambda: ["control", "counterfactual"])
    """Attentions that it must exceed: to the `control`, and to the same place on the `counterfactual` prompt."""


@dataclass
class WriteConfig:
    """What a role's heads write at END: their effect on one word's logit minus another's."""

    answer: str = "ANSWER"
    """ANSWER, FOIL or a label, whose word is meant."""
    other: str = "FOIL"
    sign: int = 1
    """1 if the head raises the difference, -1 if it lowers it."""


@dataclass
class EffectConfig:
    """The loss if a head's output at its query, or at END, is replaced by its output on the counterfactual prompt."""

    sign: int = 1
    """1 if the head raises the measured quantity, -1 if it lowers it."""
    into: str | None = None
    """Measure the attention of this role's heads, to `source` minus `control`; unless set, the logit difference."""
    source: str | None = None
    """With `into`: the receivers' own source unless set; `control` likewise."""
    control: str | None = None
    given: str | None = None
    """Measure the effect with this role's heads replaced, minus the effect without."""


@dataclass
class RoleActivationsConfig:
    """The behaviour that a role's heads must show on prompts (definitions: section 7)."""

    attention: AttentionConfig | None = None
    write: WriteConfig | None = None
    effect: EffectConfig | None = None
    decides: list[str] = MISSING
    """The ones among `attention`, `write`, `effect` and `repeats` that a head must show to have the role."""
    repeats: Repeats | None = None
    """The place that the heads attend to on repeated random tokens."""


@dataclass
class RoleConfig:
    """A role in the task's circuit; its first prediction is the primary one."""

    predictions: list[PredictionConfig] = field(default_factory=list)
    activations: RoleActivationsConfig | None = None


@dataclass
class ClaimsConfig:
    """The claimed heads of one model: role -> ["layer.head", ...]."""

    source: str = MISSING
    reliability: str = MISSING
    """`published`, `measured` (on prompts, as `model.claims=measured` does) or `unreliable`."""
    roles: dict[str, list[Any]] = field(default_factory=dict)
    """Not list[str]: an unquoted 9.10 must be refused and not become "9.1"."""
    shape: list[int] = field(default_factory=list)
    """The model's [layers, heads in a layer]; a copy with another shape is refused. Empty: not checked."""
    evidence: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Role -> head -> numbers; for readers, and for no test."""
    note: str | None = None
    places: dict[str, str] = field(default_factory=dict)
    """Role -> the section, table or figure of the source that names its heads; for readers, no number depends on it."""
    revision: str | None = None
    """The model's revision that the source is about; for readers."""


@dataclass
class TaskConfig:
    """One task: its words, prompts, causal variables, and the circuits claimed for it."""

    name: str = MISSING
    title: str = MISSING
    version: int = 1
    words: dict[str, list[str]] = field(default_factory=dict)
    continuations: list[str] = field(default_factory=list)
    """Word sets whose words go on with a text, without a leading space: the "32" of "1732"."""
    prompts: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, VariableConfig] = field(default_factory=dict)
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    claims: dict[str, ClaimsConfig] = field(default_factory=dict)
    cycle: CycleConfig | None = None


@dataclass
class AnalysisConfig:
    """The circuits that are decomposed, and the way they are."""

    name: str = MISSING
    circuits: list[str] = MISSING
    """Any of `ov`, `qk`."""
    embedding: Embedding = Embedding.by_layer
    """The embedding that task readouts read words through; `stream` runs the model on single words."""
    offsets: list[int] = field(default_factory=lambda: [0])
    """Rotary models: the offsets (query position - key position) at which QK spectra are computed."""
    components: int = 3
    """Leading components of each circuit whose tokens are read out (directions.parquet); 0 for none."""
    directions_embedding: Embedding = Embedding.token
    """The embedding that components read tokens through (directions.parquet); `embedding` is for task readouts."""
    rare_tokens: bool = False
    """List special and hardly trained tokens in directions.parquet too (docs/method.md)."""
    diagonals: bool = False
    """Rank tokens' own entries in the full circuits: ov_diagonal_* and qk_diagonal_first."""
    pairs: bool = False
    """Compose all pairs of heads (composition.parquet, virtual_heads.parquet), not only those that claims name."""
    activations: bool = False
    """Run the model on the task's prompts too (activations.parquet, roles.parquet, joint.parquet)."""


@dataclass
class ActivationsConfig:
    """The measurement that runs the model on the task's prompts (definitions: section 7)."""

    prompts: int = 256
    """Prompts drawn, half of them to choose heads and half to test them; each with its counterfactual."""
    batch: int = 32
    """Prompts that run together."""
    screened: int = 20
    """Heads patched because of a large first-order effect, besides those that are claimed or meet a role's rule."""


@dataclass
class NullsConfig:
    """The ensembles that claims are tested against."""

    draws: int = 999
    """Surrogates for each head (spectrum) and for each word set (token)."""
    resamples: int = 1000
    """How often a word set is drawn with replacement, for the 95 % interval of means over its words."""
    subsamples: int = 200
    """How often 80 % of a subspace's words are drawn without replacement, for the interval of subspace metrics."""


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: TrackingMode = MISSING
    project: str = "ovqk"
    entity: str | None = None


@dataclass
class Config:
    """One cell, and how to run it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    nulls: NullsConfig = field(default_factory=NullsConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    processing: Processing = Processing.folded
    seed: int = 0
    results_dir: str = "results"
    sweep: str | None = None
    """The sweep's name, which groups its W&B runs; unless set, it is made of the keys that the sweep varies."""
    objective: str | None = None
    """The key of the summary that a sweeper such as Optuna's gets for each cell, as `role/induction/effect`."""
    force: bool = False
    device: Device = Device.cpu
    hub_timeout: float = 60.0
    """Seconds without any data from the hub before the download is given up."""
    cache: bool = True
    """Keep a model's decomposition, which depends on no task, for cells of other tasks."""
    cache_dir: str | None = None
    """The user's cache folder unless set."""
    cache_gb: float = 5.0
    """Gigabytes that the cache may have; beyond them, the entries that were unused the longest are removed."""


def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml extends."""
    ConfigStore.instance().store(name="schema", node=Config)
