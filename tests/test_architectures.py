"""Architectures as scripts/architectures.py examines them: a fast part; docs/architectures.md has them all."""

import dataclasses

import pytest
import torch
from support import ROOT
from support.models import opened
from support.scripts import script

from ovqk.testing.materialised import compare_materialised
from ovqk.testing.tiny_architectures import BESIDE_PICTURES, VARIANTS, shrunk_model
from ovqk.weights.types import score_scale

architectures = script("architectures")
RIGHT, Row, examine = architectures.RIGHT, architectures.Row, architectures.examine
next_row, page = architectures.next_row, architectures.page
pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = {
    "glm4": "a norm follows the attention and another the MLP",
    "granite, with multipliers": "multipliers behind attention, MLP and embedding, and of the scores",
    "cohere, with query and key norms": "a LayerNorm of each head's own, and neighbours turned together",
    "stablelm, parallel with query and key norms": "a LayerNorm for each head, part of which is rotated",
    "falcon": "one key and value head in a parallel block",
    "bloom": "ALiBi, and a norm behind the embedding",
    "opt": "learned positions, queries scaled before the product",
    "exaone4": "no norm before attention, one layer without positions",
    "qwen3_moe": "query and key norms and experts",
    "gpt_oss": "sinks",
    "phimoe, LongRoPE": "a factor on cosines that the module does not store",
    "qwen2_vl": "a text model beside one for pictures",
    "llama4_text": "norms of queries and keys behind their rotation, in some layers",
}


@pytest.mark.parametrize("name", list(EXACT))
def test_every_number_of_an_architecture_is_the_models_own(name) -> None:
    row = examine(name)
    assert row.read in ("natively", "through the bridge"), row
    assert None not in (row.w_qk, row.w_ov, row.scores, row.writes, row.logits)
    assert not row.wrong, row
    unread = ("phimoe, LongRoPE", "qwen3_moe", "gpt_oss", "llama4_text", "stablelm, parallel with query and key norms")
    assert row.block0 is not None or name in unread, row


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "laguna"])
def test_an_architecture_that_no_form_reproduces_is_raw_with_the_reason(name) -> None:
    row = examine(name)
    assert row.read == "through the bridge, raw"
    assert any(note.startswith("layer 0: ") and note.endswith("raw weights only") for note in row.notes)


class Moved:
    """A source in whose layers a number stands in another place than in the model."""

    def __init__(self, source, **factors) -> None:
        self.source, self.factors = source, factors

    def __getattr__(self, name):
        return getattr(self.source, name)

    def layer(self, index):
        weights = self.source.layer(index)
        return dataclasses.replace(
            weights,
            W_Q=weights.W_Q * self.factors.get("query", 1.0),
            W_O=weights.W_O * self.factors.get("output", 1.0),
            W_V=weights.W_V / self.factors.get("output", 1.0) * self.factors.get("value", 1.0),
            attention_scale=score_scale(weights, self.source.architecture) / self.factors.get("query", 1.0),
        )


@pytest.mark.parametrize("name", ["llama, YaRN", pytest.param("gpt_neo", marks=pytest.mark.slow)])
def test_a_number_in_the_wrong_place_shows_in_the_whole_matrices(name, tmp_path) -> None:
    """W_QK times a number and the scale of the scores over it give the model's scores, and another W_QK."""
    from transformers import AutoModelForCausalLM

    shrunk_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64).eval()
    source = opened(tmp_path)
    moved = {"query": {"w_qk"}, "value": {"w_ov"}, "output": set()}  # the last changes no head's product
    for place, off in moved.items() if name.startswith("llama") else (("value", {"w_ov"}),):
        found = compare_materialised(Moved(source, **{place: 1.001}), model)
        assert {key for key, value in found.items() if not value < RIGHT} == off, place
        assert all(abs(found[key] - 0.001) < 1e-5 for key in off)


def test_a_number_that_is_off_is_wrong_and_a_missing_one_is_not() -> None:
    assert not Row("x", scores=RIGHT / 2, writes=None).wrong
    assert Row("x", w_qk=2 * RIGHT).wrong and Row("x", w_ov=2 * RIGHT).wrong
    assert Row("x", scores=RIGHT / 2, writes=2 * RIGHT).wrong
    assert Row("x", logits=float("nan")).wrong


def test_the_page_holds_every_architecture_of_transformers_and_none_that_is_wrong() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    lines = (ROOT / "docs" / "architectures.md").read_text().splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| architecture")]
    names = {row[0].removeprefix("| ") for row in cells}
    assert names == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *BESIDE_PICTURES, *VARIANTS}
    read = [row for row in cells if row[1].startswith(("natively", "through"))]
    numbers = [float(cell) for row in read for cell in row[2:8] if cell != "-"]
    assert len(numbers) > 400 and max(numbers) < RIGHT
    made = page([Row("x", "refused", "because | so")], "5")
    assert "| x | because \\| so |\n\n## Not examined" in made


def test_a_worker_that_ends_without_an_answer_gives_no_row() -> None:
    import queue
    import time

    lines: queue.Queue[str] = queue.Queue()
    lines.put("MADE x\n")
    lines.put("")
    assert next_row(lines, time.monotonic() + 5) == (None, True)
