"""Measure which heads of a model play which role on a task: activations only, never the weights' circuits.

    python scripts/measure_roles.py ovqk/bundled/mini-attn --task TASK.yaml --out CLAIMS.yaml

The task file gives `words` and `prompts`; the prompts measured are those `ovqk.prompts` draws from it. One rule
serves every head of every model. A head has a role where all of these hold, means being over prompts:

    attention    from the role's query token to its source is at least 0.3: no more than three
                 places can be looked at as much
    control      that attention exceeds the attention to a matched token (another name, noun or neighbour)
    effect       is at least 5 % of the model's mean logit difference (answer minus foil), in the role's
                 direction: less than that, in a model of tens of heads, is one share among many
    significance the effect is on that side of zero in 99.9 % of 2,000 bootstrap resamples of the prompts

The effect of a role that writes the answer is direct: the head's output at END through the final norm (its scale
frozen) onto the unembedding of answer minus foil. The effect of a role that serves other heads is that of
ablation: the logit difference lost when the head's output at the query token is replaced by its mean over the
prompts of the same group (same template, both orders, all words) there. Only there, because a head may do other
work at other tokens.

Further conditions of single roles:

    name_mover        its direct effect is on IO minus another name of the context (OTHER), not minus S1: a head
                      that moves both names of the sentence, and leaves it to others to keep S down, is one too.
                      Its effect on IO minus S1 stands beside it as direct_effect
    copy_suppression  looks at S2 and lowers the logit of that very name, compared with OTHER's
    s_inhibition      ablation lowers the name movers' attention to IO minus S1 by at least 0.05
    backup_name_mover no name mover, but meets the name mover's rule once all name movers are ablated, with a
                      direct effect that has grown
    agreement_output  has no attention condition: the number may have been moved to any token by then
    agreement_reader  the query is END or the attractor, whichever attends to the subject more
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from language import END_OF_TEXT
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.tasks.prompts import Prompt, known_words, sample_prompts, start_tokens, token_positions
from ovqk.tasks.words import load_tokenizer
from ovqk.weights.types import Head

LEAST_ATTENTION = 0.3
LEAST_SHARE = 0.05
LEAST_MEDIATED = 0.05
BOOTSTRAPS = 2000
QUANTILE = 0.001


@dataclass(frozen=True)
class Rule:
    """Attention from one of `queries` to `source`, more than to `control`, and an effect with `sign`.

    A label may be moved: "S1+1" is the token after S1. The direct effect is on the logit of the first token
    of `contrast` minus that of the second, each a label, the answer or the foil.
    """

    role: str
    effect: str
    queries: tuple[str, ...] = ("END",)
    source: str | None = None
    control: str | None = None
    sign: int = 1
    contrast: tuple[str, str] = ("ANSWER", "FOIL")


RULES = {
    "ioi": [
        Rule("name_mover", "direct", source="IO", control="OTHER", contrast=("ANSWER", "OTHER")),
        Rule("negative_name_mover", "direct", source="IO", control="OTHER", sign=-1, contrast=("ANSWER", "OTHER")),
        Rule("copy_suppression", "direct", source="S2", control="OTHER", sign=-1, contrast=("FOIL", "OTHER")),
        Rule("s_inhibition", "ablation", source="S2", control="OTHER"),
        Rule("duplicate_token", "ablation", ("S2",), "S1", "IO"),
        Rule("induction", "ablation", ("S2",), "S1+1", "IO+1"),
        Rule("previous_token", "ablation", ("S1+1",), "S1", "S1-1"),
    ],
    "sva": [
        Rule("agreement_output", "direct"),
        Rule("agreement_reader", "ablation", ("END", "ATTRACTOR"), "SUBJECT", "ATTRACTOR"),
    ],
    "induction": [
        Rule("induction", "direct", source="SOURCE", control="SOURCE+1"),
        Rule("previous_token", "ablation", ("SOURCE",), "PREVIOUS", "PREVIOUS-1"),
    ],
}


@dataclass
class Batch:
    """Prompts as one right-padded batch (a causal model never sees the padding)."""

    tokens: torch.Tensor  # [prompt, position]
    positions: list[dict[str, int]]  # label -> token, for each prompt
    answers: torch.Tensor
    foils: torch.Tensor
    groups: torch.Tensor  # [prompt]: the index of the prompt's group

    def at(self, label: str) -> torch.Tensor:
        """The position of a label, or of "label+1" or "label-1", in every prompt."""
        for mark, step in (("+1", 1), ("-1", -1)):
            if label.endswith(mark):
                return self.at(label.removesuffix(mark)) + step
        return torch.tensor([places[label] for places in self.positions])

    def word(self, name: str) -> torch.Tensor:
        """The token of the answer, of the foil, or at a label, in every prompt."""
        if name in ("ANSWER", "FOIL"):
            return self.answers if name == "ANSWER" else self.foils
        return self.tokens[torch.arange(len(self.tokens)), self.at(name)]


@dataclass
class Run:
    """One forward pass: the logit difference [prompt], patterns [layer][prompt, head, query, key], z, norm scale."""

    difference: torch.Tensor
    patterns: list[torch.Tensor]
    outputs: list[torch.Tensor]  # [layer][prompt, position, head, d_head]
    scale: torch.Tensor


@dataclass
class Evidence:
    """What was measured of one head for one role; effects in logits, shares of the mean logit difference."""

    head: Head
    values: dict[str, float] = field(default_factory=dict)


def word_token(tokenizer: Any, word: str) -> int | None:
    """The id of a word inside a text, where it is one known token."""
    ids = tokenizer.encode(" " + word, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def own_start(name: str, tokenizer: Any) -> list[int]:
    """The tokens that stand before each text of this model: those that its tokenizer puts there by itself.

    The models of `train.py` read a prompt that begins a text after <eos>, which their tokenizer files do not say.
    TransformerLens would put a start token before the texts of GPT-2, too, which has seen none.
    """
    if tokenizer.bos_token == END_OF_TEXT and isinstance(tokenizer.backend_tokenizer.model, WordLevel):
        return [tokenizer.bos_token_id]
    source = Source.local if Path(name).is_dir() else Source.hub
    checkpoint = open_checkpoint(ModelConfig(name=Path(name).name, source=source, path=name, repo=name))
    loaded = load_tokenizer(checkpoint)
    if loaded is None:
        raise ValueError(f"{name}: no tokenizer files")
    return start_tokens(loaded, checkpoint)


def spelled(start: list[int], tokenizer: Any) -> str:
    """The start tokens as the printed header and the claims' source have them."""
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(start)))
    return f"after {names}" if start else "without a start token"


def encode(model: TransformerBridge, prompts: list[Prompt], start: list[int]) -> Batch:
    """Tokenise with the model's own start tokens in front, and find the labelled tokens."""
    tokenizer = model.tokenizer
    rows, positions = [], []
    for prompt in prompts:
        encoded = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
        rows.append(torch.tensor(start + encoded["input_ids"]))
        offsets = [(0, 0)] * len(start) + [tuple(span) for span in encoded["offset_mapping"]]
        positions.append(token_positions(prompt, offsets))
    names = sorted({prompt.group for prompt in prompts})
    return Batch(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        positions,
        torch.tensor([word_token(tokenizer, prompt.answer) for prompt in prompts]),
        torch.tensor([word_token(tokenizer, prompt.foil) for prompt in prompts]),
        torch.tensor([names.index(prompt.group) for prompt in prompts]),
    )


@torch.inference_mode()
def run(model: TransformerBridge, batch: Batch, hooks: list[tuple[str, Callable]] | None = None) -> Run:
    """Forward pass with the heads' patterns and outputs kept."""
    layers = range(model.cfg.n_layers)
    wanted = [f"blocks.{layer}.attn.hook_{what}" for what in ("pattern", "z") for layer in layers]
    wanted.append("ln_final.hook_scale")
    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any, name: str) -> None:  # the hook's own name may be an alias's target
        kept[name] = value.detach()

    keepers = [(name, functools.partial(keep, name=name)) for name in wanted]
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=[*(hooks or []), *keepers])
    every = torch.arange(len(batch.tokens))
    last = logits[every, batch.at("END")]
    difference = last[every, batch.answers] - last[every, batch.foils]
    patterns = [kept[f"blocks.{layer}.attn.hook_pattern"] for layer in layers]
    outputs = [kept[f"blocks.{layer}.attn.hook_z"] for layer in layers]
    return Run(difference, patterns, outputs, kept["ln_final.hook_scale"][every, batch.at("END")])


def group_means(outputs: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Each prompt's row replaced by the mean of its group, position by position."""
    means = torch.stack([outputs[groups == group].mean(0) for group in range(int(groups.max()) + 1)])
    return means[groups]


def ablate(clean: Run, batch: Batch, heads: list[Head], query: str) -> list[tuple[str, Callable]]:
    """Hooks that replace the outputs of `heads` at a label by their group means there."""
    every, at = torch.arange(len(batch.tokens)), batch.at(query)

    def replace(value: torch.Tensor, hook: Any, head: int, means: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[every, at, head] = means[every, at, head]
        return value

    hooks: list[tuple[str, Callable]] = []
    for layer, head in heads:
        means = group_means(clean.outputs[layer], batch.groups)
        hooks.append((f"blocks.{layer}.attn.hook_z", functools.partial(replace, head=head, means=means)))
    return hooks


def direct_effect(
    model: TransformerBridge,
    batch: Batch,
    result: Run,
    head: Head,
    contrast: tuple[str, str] = ("ANSWER", "FOIL"),
) -> torch.Tensor:
    """The head's own part of a logit difference [prompt]: output at END, final norm frozen, unembedding."""
    layer, index = head
    every = torch.arange(len(batch.tokens))
    written = result.outputs[layer][every, batch.at("END"), index] @ model.W_O[layer, index].detach()
    if str(model.cfg.normalization_type).startswith("LN"):  # a root-mean-square norm takes out no mean
        written = written - written.mean(-1, keepdim=True)
    normalised = written / result.scale * model.ln_final.weight.detach()
    unembedding = model.W_U.detach()
    plus, minus = (unembedding[:, batch.word(name)].T for name in contrast)
    return (normalised * (plus - minus)).sum(-1)


def attention(batch: Batch, result: Run, head: Head, query: str, key: str) -> float:
    every = torch.arange(len(batch.tokens))
    return result.patterns[head[0]][every, head[1], batch.at(query), batch.at(key)].mean().item()


def significant(effect: torch.Tensor, sign: int) -> bool:
    """Whether the mean has the sign in all but QUANTILE of the bootstrap resamples."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(effect), (BOOTSTRAPS, len(effect)), generator=generator)
    return bool((sign * effect[rows].mean(-1)).quantile(QUANTILE) > 0)


class Measurement:
    """All runs of one model on one task's prompts, shared by the rules."""

    def __init__(self, model: TransformerBridge, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.clean = run(model, batch)
        self.total = self.clean.difference.mean().item()
        if self.total <= 0:
            raise ValueError(f"the model does not solve the task (logit difference {self.total:.2f}): no roles")
        self.heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]

    def without(self, heads: list[Head], query: str = "END") -> Run:
        """The run with these heads mean-ablated at a label."""
        return run(self.model, self.batch, ablate(self.clean, self.batch, heads, query))

    def apply(self, rule: Rule, head: Head, result: Run | None = None) -> Evidence | None:
        """The evidence where the head meets the rule (in another run than the clean one, if given)."""
        result = result or self.clean
        evidence, query = Evidence(head), rule.queries[0]
        if rule.source is not None and rule.control is not None:
            looks = {query: attention(self.batch, result, head, query, rule.source) for query in rule.queries}
            query = max(looks, key=looks.__getitem__)
            control = attention(self.batch, result, head, query, rule.control)
            if looks[query] < LEAST_ATTENTION or looks[query] <= control:
                return None
            evidence.values[f"attention_{query}_to_{rule.source}"] = looks[query]
            evidence.values[f"attention_{query}_to_{rule.control}"] = control
        direct = direct_effect(self.model, self.batch, result, head)
        own = direct_effect(self.model, self.batch, result, head, rule.contrast)
        lost = self.clean.difference - self.without([head], query).difference
        effect = own if rule.effect == "direct" else lost
        if rule.sign * effect.mean().item() < LEAST_SHARE * self.total or not significant(effect, rule.sign):
            return None
        evidence.values |= {
            "direct_effect": direct.mean().item(),
            "ablation_effect": lost.mean().item(),
        }
        if rule.contrast != ("ANSWER", "FOIL"):
            plus, minus = (name.lower() for name in rule.contrast)
            evidence.values[f"direct_effect_{plus}_minus_{minus}"] = own.mean().item()
        evidence.values[f"{rule.effect}_share"] = effect.mean().item() / self.total
        return evidence


def measure(measurement: Measurement, task: str) -> dict[str, list[Evidence]]:
    """The heads of every role of the task; an empty list says that the role was looked for and not found."""
    found: dict[str, list[Evidence]] = {}
    for rule in RULES[task]:
        found[rule.role] = [e for head in measurement.heads if (e := measurement.apply(rule, head)) is not None]
    if task == "ioi":
        movers = [evidence.head for evidence in found["name_mover"]]
        found["s_inhibition"] = [e for e in found["s_inhibition"] if _mediated(measurement, e, movers)]
        found["backup_name_mover"] = _backups(measurement, movers)
    return found


def _mediated(measurement: Measurement, evidence: Evidence, movers: list[Head]) -> bool:
    """Whether ablating the head lowers the name movers' attention to IO minus S1, by how much at most."""

    def preference(result: Run, mover: Head) -> float:
        to_io, to_s1 = (attention(measurement.batch, result, mover, "END", name) for name in ("IO", "S1"))
        return to_io - to_s1

    ablated = measurement.without([evidence.head])
    falls = [preference(measurement.clean, mover) - preference(ablated, mover) for mover in movers]
    evidence.values["name_mover_preference_lost"] = max(falls, default=0.0)
    return evidence.values["name_mover_preference_lost"] >= LEAST_MEDIATED


def _backups(measurement: Measurement, movers: list[Head]) -> list[Evidence]:
    """Heads that meet the name mover's rule only with the name movers ablated."""
    without = measurement.without(movers)
    backups = []
    for head in measurement.heads:
        evidence = None if head in movers else measurement.apply(RULES["ioi"][0], head, without)
        rule, key = RULES["ioi"][0], "direct_effect_answer_minus_other"
        clean = direct_effect(measurement.model, measurement.batch, measurement.clean, head, rule.contrast)
        if evidence is not None and evidence.values[key] > clean.mean().item():
            evidence.values[key + "_before"] = clean.mean().item()
            backups.append(evidence)
    return backups


def claims(found: Mapping[str, list[Evidence]], source: str) -> dict[str, Any]:
    """The claims entry of a task file: roles with heads, and each head's evidence."""
    evidence: dict[str, dict[str, float]] = {}
    for entries in found.values():
        for entry in entries:
            values = {name: round(value, 3) for name, value in entry.values.items()}
            evidence.setdefault(name_of(entry.head), {}).update(values)
    roles = {role: [name_of(entry.head) for entry in entries] for role, entries in found.items() if entries}
    return {"source": source, "reliability": "measured", "roles": roles, "evidence": evidence}


def name_of(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def prepare(model: TransformerBridge, task: Mapping[str, Any], count: int, seed: int, start: list[int]) -> Measurement:
    """Sample the task's prompts from the words the model knows, and run them after the start tokens."""
    known = known_words(task["words"], task["prompts"], lambda word: word_token(model.tokenizer, word) is not None)
    return Measurement(model, encode(model, sample_prompts(known, task["prompts"], count, seed), start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a Hugging Face name")
    parser.add_argument("--task", type=Path, required=True, help="a task file; its stem is the task's name")
    parser.add_argument("--count", type=int, default=800, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the claims here")
    arguments = parser.parse_args()
    model = TransformerBridge.boot_transformers(arguments.model, device="cpu")
    task = yaml.safe_load(arguments.task.read_text())
    start = own_start(arguments.model, model.tokenizer)
    measurement = prepare(model, task, arguments.count, arguments.seed, start)
    found = measure(measurement, arguments.task.stem)

    difference = measurement.clean.difference
    after = spelled(start, model.tokenizer)
    print(f"{arguments.task.stem}: {arguments.count} prompts {after},")
    above = (difference > 0).float().mean()
    print(f"logit difference {measurement.total:.2f} on average, answer above foil in {above:.1%}")
    for role, entries in found.items():
        print(f"{role}: {'not found' if not entries else ''}")
        for entry in entries:
            print(f"  {name_of(entry.head)}  " + "  ".join(f"{k} {v:.2f}" for k, v in entry.values.items()))
    if arguments.out:
        source = f"scripts/measure_roles.py, {arguments.count} prompts {after}, seed {arguments.seed}"
        content = {"claims": {Path(arguments.model).name: claims(found, source)}}
        arguments.out.write_text(yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    main()
