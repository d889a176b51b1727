"""Roles, nulls, verdicts, directions, kinds of composition and metrics as a person reads them.

The terminal, the report page, the figures and W&B all take their words from here. Tables keep the names that stand on
the left of each mapping.
"""

from collections.abc import Iterable, Mapping

from ovqk.metrics import METRICS

ROLES = {"s_inhibition": "S-inhibition"}
"""Roles that are not read as their name with spaces for underscores."""
NULLS = {
    "layer": "other heads of its layers",
    "layer_all": "the same, claimed ones too",
    "depth": "heads of nearby layers",
    "spectrum": "same spectrum, random frames",
    "token": "other words",
    "token_pairs": "random pairs of other words",
}
"""Null -> the label of a row in a figure."""
AGAINST = {
    "layer": "the unclaimed heads of the same layers",
    "depth": "the unclaimed heads of nearby layers",
    "spectrum": "heads of the same singular values between random frames",
    "token": "other words",
    "token_pairs": "random pairs of other words",
}
"""Null -> the same in a sentence that says what a head was compared with."""
VERDICTS = {
    "corroborated": "corroborated",
    "partial": "partial",
    "unsupported": "unsupported",
    "contradicted": "contradicted",
    "untestable": "untestable",
    "out_of_scope": "out of scope",
}
"""Verdict -> its name, in the order of how much it says."""
FLAGS = {
    "partial (consistent)": "the head stands out only against random heads with its own singular values",
    "partial (mixed)": "another prediction of the role is significant the other way",
    "contradicted (spectrum)": (
        "it is significantly on the wrong side of random heads with its own singular values, and of nothing else"
    ),
}
"""Verdict with a flag -> what the flag says."""
ON_PROMPTS = {
    "realised": "realised",
    "partial": "partly realised",
    "not_realised": "not realised",
    "opposite": "the opposite",
    "sensitive": "sensitive",
    "untestable": "untestable",
    "out_of_scope": "out of scope",
    "not_chosen": "not chosen",
}
"""Verdict on what a head does on prompts -> its name."""
READINGS = {
    "linked": "does what its weights say",
    "unlinked": "does it, weights agree, no link shown",
    "could": "could, does not here",
    "unranked": "does it as its weights say, like others",
    "indirect": "does it, not by the direct path",
    "neither": "neither",
    "undecided": "undecided",
}
"""Verdict of the weights and verdict on prompts, read together -> in words."""
PROMPT_COLUMNS = {
    "attention": "attention",
    "attention_control": "control",
    "write_share": "write",
    "write_link": "write link",
    "score_link": "score link",
    "effect": "effect",
    "effect_mean_replacement": "by mean",
}
"""Quantity on prompts -> the head of its column in a table of heads."""
PROMPT_TOGETHER = {
    "effect": "effect_together",
    "effect_mean_replacement": "effect_together_mean_replacement",
}
"""Quantity on prompts -> the column of joint.parquet that has it for all heads of a role at once."""
PROMPT_SHARES = ("write_share", "effect", "effect_mean_replacement")
"""Those that are read in percent."""
PROMPT_LEGEND = (
    "attention, control: from the role's query to its source, and to a token of the same kind. write: onto the role's "
    "words at the end of the text, as a share of the mean logit difference. write link: share of the write's "
    "variance that attention times the weights' own account explains. score link: share of what the source's score "
    "exceeds other tokens' by that comes from the two tokens themselves. effect: share of what the counterfactual "
    "prompt takes away that is lost if the head puts out what it does there; by mean: what it does there on average. "
    "In a role's row: the effect of all its heads at once."
)
"""How to read these columns."""
PROMPT_DECIDES = {
    "attention": "attention",
    "write": "write",
    "effect": "effect",
    "repeats": "attention on random repeats",
}
"""Deciding quantity on prompts -> its name in reasons."""
PROMPT_BARS = {
    "attention": {
        "attention": "{source}",
        "attention_control": "{control}: control",
        "attention_counterfactual": "on the counterfactual",
        "sink": "first token",
    },
    "repeats": {"repeats": "{repeats}", "repeats_control": "other tokens: control"},
    "write": {"write": "the whole write", "write_from_source": "from {source} alone"},
    "effect": {
        "effect": "replaced by its own",
        "effect_mean_replacement": "replaced by the mean",
        "effect_restored": "restored",
    },
}
"""Kind of quantity -> quantity on prompts -> the label of its bar; in braces labels of the role's tokens."""
REPEATS = {
    "previous": "to the token before",
    "same": "to its first occurrence",
    "next": "to the token after that",
}
"""Place in random repeats -> in words."""
PROMPT_KINDS = {
    "attention": "Attention from {query}",
    "repeats": "Attention on random tokens that come twice",
    "write": "Write onto {answer} minus {other} (logits)",
    "effect": "Effect on {into} (share)",
}
"""Kind of quantity on prompts -> the title of its picture."""
PROMPT_QUANTITIES = {
    "write": "write onto {answer} minus {other} (logits)",
    "attention": "attention from {query} to {source} minus to {control}",
    "effect_first_order": "first-order effect (share)",
}
"""Quantity on prompts that every head has -> the title of its axis."""
RANKED = {"spearman": "Spearman", "split_half": "split-half", "effect_together": "effect of its heads together"}
"""Statistic of a role, beside the AUC by which weights rank heads -> its name."""
FOUND = {
    "both": "claimed and measured",
    "measured": "measured, not claimed",
    "claimed": "claimed, not measured",
    "neither": "other heads",
}
"""Whether a head is claimed for a role and measured in it -> in words."""
CHOSEN = "chosen, not confirmed"
"""A head that is neither claimed nor measured, and was looked at for being chosen on the other half."""
ARROWS = {"high": "↑", "low": "↓"}
"""Predicted direction -> its sign."""
MODES = {"q": "Q: into queries", "k": "K: into keys", "v": "V: into values"}
"""Kind of composition -> what a sender writes into."""

PARTS = {"position": "key position", "content": "key content", "both": "both"}
"""Part of the key -> the shares of the score's variance that come from it."""


def role(name: str) -> str:
    """Return a role as a person reads it: `name_mover` is "name mover"."""
    return ROLES.get(name, name.replace("_", " "))


def short_roles(names: Iterable[str]) -> dict[str, str]:
    """Return role -> a few letters for it in a picture, all different: `name_mover` is NM, `induction` is Ind."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        words = name.split("_")
        short = "".join(word[:1].upper() for word in words) if len(words) > 1 else name[:3].capitalize()
        number = 2
        unique = short
        while unique in found.values():
            unique, number = f"{short}{number}", number + 1
        found[name] = unique
    return found


def null(name: str) -> str:
    """Return a null as the label of a row in a figure."""
    return NULLS.get(name, name)


def verdict(name: str, flags: str | None = None) -> str:
    """Return a verdict with its flags, if it has any, in brackets."""
    said = VERDICTS.get(name, name)
    return f"{said} ({flags})" if flags else said


def metric(name: str) -> str:
    """Return the title of a metric of heads or of pairs of heads."""
    return METRICS[name].title


def predicted(name: str, direction: str) -> str:
    """Return a metric's title and the sign of the predicted direction."""
    return f"{metric(name)} {ARROWS[direction]}"


def found(claimed: bool, measured: bool) -> str:
    """Return the key of `FOUND` for a head."""
    return "both" if claimed and measured else "claimed" if claimed else "measured" if measured else "neither"


def counts(by_verdict: Mapping[str, int], names: Mapping[str, str]) -> str:
    """Return how many heads have each verdict, in the order of the verdicts' names: `3 realised, 1 sensitive`."""
    return ", ".join(f"{by_verdict[verdict]} {name}" for verdict, name in names.items() if by_verdict.get(verdict))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


CYCLE_PARTS = {"embedding": "embedding", "unembedding": "unembedding", "ov": "OV", "key": "keys"}
"""Part of a model that is looked at by frequency -> its name."""
