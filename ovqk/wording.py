"""Roles, nulls, verdicts, directions, composition kinds and metrics as a person reads them.

The terminal, the report page, the figures and W&B all take their words from here, and records take the sentences for
verdicts. Tables keep the names that stand on the left in each mapping.
"""

from collections.abc import Iterable, Mapping

from ovqk.metrics import METRICS

ROLES = {"s_inhibition": "S-inhibition"}
"""Roles that are not simply read as their name with spaces in place of underscores."""
NULLS = {
    "layer": "other heads of its layers",
    "layer_all": "the same, claimed ones too",
    "depth": "heads of nearby layers",
    "spectrum": "same spectrum, random frames",
    "token": "other words",
    "token_pairs": "random pairs of other words",
}
"""Null -> its row's label in a figure."""
AGAINST = {
    "layer": "the unclaimed heads of the same layers",
    "depth": "the unclaimed heads of nearby layers",
    "spectrum": "heads of the same singular values between random frames",
    "token": "other words",
    "token_pairs": "random pairs of other words",
}
"""Null -> its name in a sentence that says with what a head was compared."""
VERDICTS = {
    "corroborated": "corroborated",
    "partial": "partial",
    "consistent": "consistent only",
    "unsupported": "unsupported",
    "contradicted": "contradicted",
    "untestable": "untestable",
    "out_of_scope": "out of scope",
}
"""Verdict -> its name; the verdicts that say most come first."""
FLAGS = {
    "partial": "it stands out under some of the nulls that count, not only spectrum, and not under all",
    "unsupported": "it stands out under none of the nulls that count",
    "consistent only": "the head stands out against nothing but random heads with its own singular values",
    "partial (mixed)": "another prediction of the role is significant the other way",
    "consistent only (mixed)": "another prediction of the role is significant the other way",
    "unsupported (spectrum)": (
        "it is significantly on the wrong side of random heads with its own singular values, and of nothing else"
    ),
}
"""Verdict, perhaps with a flag -> what it says, if its name does not."""
ALONE = "on its own it cannot get below"
"""How a recorded reason begins to say what q a head or role can have at best, if no other is as significant."""
BESIDE_OTHERS = "; beside others that stand out as much, q may be less"
"""The other half of such a reason: a q may stand below the bound that holds alone."""
MEANS = {
    "corroborated": "The weights could do this: {claim}.",
    "partial": "Some evidence that the weights could do this: {claim}.",
    "consistent": "Consistent with the claim and no more, since any trained head may pass: {claim}.",
    "unsupported": "The weights do not single this out: {claim}.",
    "contradicted": "The weights point the other way: {claim}.",
}
"""Verdict -> the sentence in a record that says what the weights establish."""
AGAINST_SPECTRUM = (
    "The weights do not single this out, and point the other way against heads of the same spectrum only, which any "
    "trained head may: {claim}."
)
"""The same for `unsupported (spectrum)`."""
NOT_ESTABLISHED = (
    "It does not establish that the model does this on task inputs, nor that the head is necessary: it is a statement "
    "about the direct path through the weights."
)
"""The limits that every verdict on weights has."""
NOT_INDEPENDENT = (
    " Heads that were found by what they write are no independent evidence of what they write: consistent with it."
)
"""A further limit, if the metric is about what a head writes."""
RANKED_BY = {
    "ov_task_auc": "share of the task's other words that the head raises less than the word attended to; 0.5 by chance",
    "ov_task_transfer": "1 if reading a side of the contrast writes that side as strongly as the head can; 0 by chance",
    "ov_task_read": "how well the head reads the contrast, over a random direction; 1 by chance",
    "ov_relation_score": (
        "share of the task's word pairs whose target is among the ten tokens that attending to the source raises most "
        "(of words with themselves: the first)"
    ),
    "ov_relation_suppress": "the same share, of the tokens that it lowers most",
    "ov_relation_first": "share of the task's word pairs whose target is raised most of all words of its kind",
    "ov_copying_block0": "1 if attending to a token, as block 0 leaves it, raises its own logit, -1 if it lowers it",
    "qk_task_auc": "share of the task's other words that a word looks for less than for itself; 0.5 by chance",
    "qk_composed_margin": (
        "how far a token's score with itself, moved by an earlier head, stands above those with other tokens, in "
        "standard deviations"
    ),
    "qk_simulated_previous": "attention to the token before, simulated on random tokens",
    "q_composition": "how strongly the head's queries read what its partners write, from 0 to 1",
}
"""Metric that ranks candidates -> what it measures; other metrics are told by their legend or formula."""
CANDIDATES_WORTH = (
    "What a place is worth: of the first three heads for a role, 20% had it on prompts in four small models, and 43% "
    "if any head had it (docs/evidence.md)."
)
"""What a user may expect of candidates: measured precision, with its source."""
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
"""Verdict on a head's behaviour on prompts -> its name."""
READINGS = {
    "linked": "does what its weights say",
    "unlinked": "does it, weights agree, no link shown",
    "could": "could, does not here",
    "unranked": "does it as its weights say, like others",
    "indirect": "does it, not by the direct path",
    "neither": "neither",
    "undecided": "undecided",
}
"""Verdict from weights and verdict on prompts, read together -> in words."""
PROMPT_COLUMNS = {
    "attention": "attention",
    "attention_control": "control",
    "write_share": "write",
    "write_link": "write link",
    "score_link": "score link",
    "effect": "effect",
    "effect_mean_replacement": "by mean",
}
"""Quantity on prompts -> its column's title in a table about heads."""
PROMPT_TOGETHER = {
    "effect": "effect_together",
    "effect_mean_replacement": "effect_together_mean_replacement",
}
"""Quantity on prompts -> joint.parquet's column that has it for all of a role's heads at once."""
PROMPT_SHARES = ("write_share", "effect", "effect_mean_replacement")
"""Quantities that are read in percent."""
PROMPT_LEGEND = (
    "attention, control: from the role's query to its source, and to a token of the same kind. write: onto the role's "
    "words at the end of the text, as a share of the mean logit difference. write link: how much of the write's "
    "variance is explained by attention times the weights' own account. score link: the source's score exceeds other "
    "tokens' scores; the share of the excess that comes from the two tokens themselves. effect: the counterfactual "
    "prompt takes away a part of the logit difference; the share of that part which is lost if the head's output is "
    "replaced by its output there; by mean: replaced by its mean output there. "
    "In a role's row: the effect of all its heads at once."
)
"""How to read these columns."""
PROMPT_DECIDES = {
    "attention": "attention",
    "write": "write",
    "effect": "effect",
    "repeats": "attention on random repeats",
}
"""Quantity on prompts that decides -> its name in reasons."""
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
"""Kind of quantity -> quantity on prompts -> its bar's label; labels for the role's tokens stand in braces."""
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
"""Kind of quantity on prompts -> its picture's title."""
PROMPT_QUANTITIES = {
    "write": "write onto {answer} minus {other} (logits)",
    "attention": "attention from {query} to {source} minus to {control}",
    "effect_first_order": "first-order effect (share)",
}
"""Quantity on prompts that every head has -> its axis's title."""
RANKED = {"spearman": "Spearman", "split_half": "split-half", "effect_together": "effect of its heads together"}
"""A role's statistic, besides the AUC by which weights rank heads -> its name."""
FOUND = {
    "both": "claimed and measured",
    "measured": "measured, not claimed",
    "claimed": "claimed, not measured",
    "neither": "other heads",
}
"""Whether a head is claimed for a role and measured in it -> in words."""
CHOSEN = "chosen, not confirmed"
"""A head that is neither claimed nor measured, and was tested because it was chosen on the other half."""
ARROWS = {"high": "↑", "low": "↓"}
"""Predicted direction -> its sign."""
MODES = {"q": "Q: into queries", "k": "K: into keys", "v": "V: into values"}
"""Composition kind -> the receiver's input that a sender writes."""

PARTS = {"position": "key position", "content": "key content", "both": "both"}
"""Part of the key -> the shares that it has in the score's variance."""

SUMMED = {"qk_symmetry": "Symmetry, summed W_QK", "qk_directionality": "Directionality, summed W_QK"}
"""Metric about a layer's summed W_QK -> its title."""
SPACES = {"vocab": "between tokens", "residual": "in the residual stream"}
"""Space in which a circuit's eigenvalues are -> in words."""
ENDS = {
    "ov": {"vocab": ("suppresses", "copies")},
    "qk": {"vocab": ("avoids it", "same token")},
}
"""Circuit -> space -> what eigenvalues on the left and on the right mean."""
NO_ENDS = ("opposite", "same direction")
"""The same for spaces in which they have no meaning of their own."""
SIDES = {"sender": "Reads from", "receiver": "Is read by"}
"""Which end of a composition the other head is -> the title of such pairs."""
VERBS = {"ov": ("reads", "writes"), "qk": ("query", "key")}
"""Circuit -> how a singular component treats the tokens at its two ends."""
CLUSTER = "cluster of {size}: only their span means something"
"""Components with values so near each other that none is determined alone."""
CLUSTER_NOTE = (
    "A cluster: the components' values lie within 10 % of each other, one after the other. Then only the space that "
    "they span together is determined. Any mixture of them would do as well, so a grey list is no finding."
)
"""The same where token lists stand in a table."""
RANKS = "mean rank within layers"
"""The axis for a role's test against other heads."""
CANNOT, REPORTED = "cannot reach p ≤ 0.05", "reported only"
"""A test that can never be significant, and one that does not decide."""
PANELS = {
    "eigenvalues": "eigenvalues",
    "singular": "singular values",
    "symmetry": "Symmetry and position",
    "shares": "Shares of the score's variance",
    "offsets": "Score by offset",
    "profile": "Among the model's heads",
}
"""Panel about one head -> its title, after the circuit's name if it has one."""
AXES = {
    "component": "component k",
    "singular": "σₖ / σ₁",
    "symmetry": "QK symmetry",
    "share": "positional share",
    "offset": "offset back from the query",
    "score": "mean score",
    "energy": "90 % of energy",
}
"""Axis or mark in such a panel -> its title."""


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
    """Return a null as a row's label in a figure."""
    return NULLS.get(name, name)


def ranked_by(metric: str) -> str:
    """Return what a metric measures, for a table of candidates that it ranks."""
    row = METRICS[metric]
    return RANKED_BY.get(metric) or row.legend or f"{row.title}, {row.formula}"


def verdict(name: str, flags: str | None = None) -> str:
    """Return a verdict with its flags, if it has any, in brackets."""
    said = VERDICTS.get(name, name)
    return f"{said} ({flags})" if flags else said


def reason(recorded: str) -> str:
    """Return a verdict's recorded reason; if it gives the least q alone, with what q may be beside others."""
    return f"{recorded}{BESIDE_OTHERS}" if ALONE in recorded else recorded


def metric(name: str) -> str:
    """Return a metric's title, for heads or for pairs."""
    return METRICS[name].title


def predicted(name: str, direction: str) -> str:
    """Return a metric's title and its predicted direction's sign."""
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


PATTERNS = {"ov_aligned": "OV aligned", "qk_simple": "QK simple", "ov_flat": "OV flat", "both_align": "both align"}
"""Pattern of a claimed head -> its name."""
CYCLE_PARTS = {
    "embedding": "embedding",
    "unembedding": "unembedding",
    "neurons": "neurons to logits",
    "ov": "OV",
    "ov_neurons": "OV to neurons",
    "key": "keys",
}
"""Model part that is analysed by frequency -> its name."""
CYCLE_CLAIMS = {
    "embedding": "is sparse in Fourier space",
    "unembedding": "is sparse in Fourier space",
    "key": "is keyed on one frequency",
    "neurons": "is sparse in Fourier space",
    "ov": "moves the frequency that the head is keyed on",
    "ov_neurons": "writes the frequency that the head is keyed on into the neurons",
}
"""Part -> the claim that its verdict is about."""
