"""How large a quantity on prompts must be to count (definitions: section 7)."""

LEAST_SHARE = 0.05
"""The least write or effect, as a share of the mean logit difference or the receivers' change in attention."""
LEAST_ATTENTION = 0.1
"""The least attention to the source, as a share of the attention that does not go to the first token."""
LEAST_ATTENTION_ALONE = 0.5
"""The same for a role that attention alone decides, on prompts or on random repeats."""
ROUNDING = 1e-4
"""The largest change, as a share of the logit difference's mean size (or of the receivers' attention), that is none.

A head that is replaced by its own output changes SmolLM2's logit difference by 4e-6 of it, and the bundled models' by
5e-7 (`replaced_by_itself`, ioi). If a model's own such change is larger than this share, that takes its place."""
