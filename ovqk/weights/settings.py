"""A checkpoint's settings: its config.json in ovqk's terms, by the row in the table that reads it."""

from typing import Any

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError
from ovqk.weights.allowed import is_integer, is_number
from ovqk.weights.family import ATTENTION_READS, MLP_PARTS, Family
from ovqk.weights.rotary import Rotary
from ovqk.weights.rotations import completed, no_rotation, read_rotations
from ovqk.weights.types import Architecture

SEES_ALL = ("full_attention", "global")
"""Layer kinds without a window."""
CAPPED = {
    "attn_logit_softcapping": "scores are capped at {:g} before the softmax",
    "final_logit_softcapping": "logits are capped at {:g}",
}
"""Key in config.json for a cap -> what it caps, in words for the record."""
WINDOWED = ("sliding_attention", "local")
"""Layer kinds in which a query sees the last tokens alone."""


class Settings:
    """The settings in config.json, completed with the model type's defaults."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        """Read the settings.

        Raises:
            UserError: a key is missing or is not as it should be; or it turns on something that ovqk does not read.
        """
        self.label, self.family = checkpoint.label, family
        self.config, full = completed(checkpoint, family)
        self._model_type = type(full)  # None's own, if config.json tells everything
        self.architecture = self._read_architecture()
        self._kinds = self._read_kinds()
        self._width = self._read_window()
        self.rotations, self._rotation_notes = read_rotations(checkpoint, family, self.architecture, full)
        self._check_rotations()

    def has_bias(self, part: str) -> bool:
        """Return whether the model has a bias there, whatever the checkpoint stores.

        Raises:
            UserError: config.json's key for it is neither true nor false.
        """
        if part in ("embedding", "positions", "query_norm", "key_norm"):
            return False
        if part.endswith("norm"):
            return self.family.norm_bias
        family = self.family
        said = {"output": family.output_bias}
        said |= dict.fromkeys(ATTENTION_READS, family.read_bias) | dict.fromkeys(MLP_PARTS, family.mlp_bias)
        key = said[part]
        return self._flag(key) if isinstance(key, str) else key

    def window(self, layer: int) -> int | None:
        """Return how many tokens back a query in this layer sees, itself included; None for all."""
        return None if self._kind(layer) in SEES_ALL else self._width

    def rotary(self, layer: int) -> Rotary | None:
        """Return how queries and keys are rotated in this layer; None if the model has no rotary positions."""
        if not self.rotations:
            return None
        if not self._rotates(layer):
            return no_rotation()
        return self.rotations.get(self._kind(layer), self.rotations.get(None))

    def multiplier(self, key: str | None) -> float:
        """Return the number that config.json gives under a key; 1 if there is no key.

        Raises:
            UserError: it gives none, or 0.
        """
        number = 1.0 if key is None else self.config.get(key)
        if not is_number(number) or not number:
            raise UserError(f"{self.label}: config.json must give '{key}' as a number other than 0.")
        return float(number)

    def notes(self) -> list[str]:
        """Say which parts of the model are not in the formulas: notes for the record."""
        notes = [*self.family.notes]
        keys = (self.family.embedding_multiplier, self.family.residual_multiplier)
        factors = [f"{key}={self.multiplier(key):g}" for key in keys if self.multiplier(key) != 1]
        if factors:
            notes.append(f"in embeddings and in what heads and MLPs write, raw or folded: {', '.join(factors)}")
        if self.architecture.qk_norm:
            notes.append(
                "queries and keys are normalised: QK spectra are of the weights with the norms' gains, "
                "un-normalised; readouts and shares normalise"
            )
        for key in self.family.caps:
            if cap := self.config.get(key):
                notes.append(f"{CAPPED[key].format(cap)}, which is not part of any metric")
        if self.architecture.post_norm:
            notes.append("a norm follows attention: its gain is in W_OV, what it divides by is not")
        if any(rotary.scale != 1 for rotary in self.rotations.values()):
            notes.append("the rotary scaling also multiplies the scores; the factor is in W_QK")
        still = [str(layer) for layer in range(self.architecture.n_layers) if not self._rotates(layer)]
        if self.rotations and still:
            notes.append(f"layers without positions: {', '.join(still)}; they are rotated by no angle")
        return notes + self._rotation_notes

    # --- keys -------------------------------------------------------------------------------------------------

    def _read(self, name: str, default: Any = None) -> Any:
        for key in self.family.keys.get(name, ()):
            if self.config.get(key) is not None:
                return self.config[key]
        return default

    def _positive(self, name: str, default: int | None = None) -> int:
        number = self._read(name, default)
        if not is_integer(number) or number < 1:
            key = self.family.keys.get(name, (name,))[0]
            raise UserError(f"{self.label}: config.json must give '{key}' as a positive integer, not {number!r}.")
        return number

    def _name(self, name: str) -> str | None:
        text = self._read(name)
        if not isinstance(text, str | None):
            raise UserError(
                f"{self.label}: config.json must give '{self.family.keys[name][0]}' as a text, not {text!r}."
            )
        return text

    def _flag(self, key: str, default: bool = False) -> bool:
        flag = self.config.get(key, default)
        if not isinstance(flag, bool | None):
            raise UserError(f"{self.label}: config.json must give '{key}' as true or false, not {flag!r}.")
        return bool(flag)

    def _is_read(self, key: str) -> bool:
        """Return whether transformers has this key for the model type: in another's config.json it means nothing."""
        return hasattr(self._model_type, key)

    # --- the architecture -------------------------------------------------------------------------------------

    def _read_architecture(self) -> Architecture:
        family, label = self.family, self.label
        for key in family.refused:
            if self.config.get(key):
                raise UserError(
                    f"{label}: config.json sets {key}={self.config[key]}, which ovqk does not read; allowed: unset."
                )
        n_heads, d_model = self._positive("n_heads"), self._positive("d_model")
        d_head = self._positive("d_head", d_model // n_heads)
        n_kv_heads = family.kv_heads or self._positive("n_kv_heads", n_heads)
        given = [self.config[key] for key in family.keys.get("norm_eps", ()) if key in self.config]
        norm_eps = given[0] if given else 1e-5
        if not is_number(norm_eps) or norm_eps < 0:
            raise UserError(
                f"{label}: config.json must give '{family.keys['norm_eps'][0]}' as a number that is finite and not "
                f"negative, not {norm_eps!r}."
            )
        if n_heads % n_kv_heads:
            raise UserError(
                f"{label}: config.json gives {n_heads} heads over {n_kv_heads} KV heads, which does not divide."
            )
        return Architecture(
            family=family.name,
            n_layers=self._positive("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_head,
            n_ctx=None if self._read("n_ctx") is None else self._positive("n_ctx"),
            norm=family.norm,
            norm_eps=float(norm_eps),
            positions=family.positions,
            tied=self._flag("tie_word_embeddings", family.tied_by_default),
            activation=self._name("activation"),
            attention_scale=self._read_attention_scale(),
            post_norm="post_norm" in family.tensors,
            qk_norm=family.query_key_norm is not None,
            parallel=self._flag(family.parallel) if isinstance(family.parallel, str) else family.parallel,
        )

    def _read_attention_scale(self) -> float | None:
        """Return the factor that multiplies scores; None for 1 / sqrt(d_head)."""
        family = self.family
        if family.score_multiplier is not None:
            return self.multiplier(family.score_multiplier)
        scale = self.config.get(family.scale) if isinstance(family.scale, str) else family.scale
        if scale is None:
            return None
        if not is_number(scale) or scale <= 0:
            raise UserError(
                f"{self.label}: config.json must give '{family.scale}' as a positive number, not {scale!r}."
            )
        return float(scale) ** -0.5

    # --- layers -----------------------------------------------------------------------------------------------

    def _read_kinds(self) -> list[str]:
        """Return each layer's kind if the config tells the layers apart, else []."""
        if not (self._is_read("layer_types") or self._is_read("attention_types")):
            return []
        key = "layer_types" if self._is_read("layer_types") else "attention_layers"  # GPT-Neo's, from its pattern
        kinds, n_layers = self.config.get(key) or [], self.architecture.n_layers
        if not isinstance(kinds, list) or len(kinds) not in (0, n_layers):
            raise UserError(f"{self.label}: config.json must give '{key}' as a list of {n_layers} kinds, one a layer.")
        if unknown := [kind for kind in kinds if kind not in (*SEES_ALL, *WINDOWED)]:
            raise UserError(
                f"{self.label}: config.json gives the kind {unknown[0]!r} in '{key}'; allowed: "
                f"{', '.join((*SEES_ALL, *WINDOWED))}."
            )
        return kinds

    def _kind(self, layer: int) -> str | None:
        return self._kinds[layer] if self._kinds else None

    def _read_window(self) -> int | None:
        """Return the tokens that a layer with a window sees; None if no layer has one."""
        used = not self._is_read("use_sliding_window") or self._flag("use_sliding_window")
        return self._positive("window") if used and self._read("window") else None

    def _rotates(self, layer: int) -> bool:
        """Return whether a layer has rotary positions, in a model that does."""
        rule = self.family.rotated
        if rule == "no_rope_layers":
            marks = self.config["no_rope_layers"]
            return layer >= len(marks) or bool(marks[layer])
        if rule == "windowed_or_every" and self._read("window") is None:
            return True
        return rule == "every" or self.window(layer) is not None

    def _check_rotations(self) -> None:
        """Check that every layer that is rotated has a rotation.

        Raises:
            UserError: the settings name layer kinds that this model does not have.
        """
        for layer in range(self.architecture.n_layers if self.rotations else 0):
            kind = self._kind(layer)
            if self._rotates(layer) and kind not in self.rotations and None not in self.rotations:
                given = ", ".join(map(str, self.rotations))
                raise UserError(
                    f"{self.label}: config.json gives rotary settings for {given}, and layer {layer} is of the kind "
                    f"{kind}; allowed: settings for each kind of layer, or one for all."
                )
