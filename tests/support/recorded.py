"""A model run with the inputs of its layers and the scores of its softmaxes recorded, and compared with ovqk's."""

import json

import torch

from ovqk.weights.folding import fold_layer
from ovqk.weights.norms import normalise
from ovqk.weights.types import keys, queries, score_scale

LENGTH = 11


@torch.no_grad()
def run_recorded(directory, whole=None):
    """The model's residual stream before each layer, and the scores it hands to each softmax, before any mask."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import repeat_kv

    scores = []

    def probe(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        found = query @ repeat_kv(key, groups).mT * scaling
        scores.append(found[0])
        mask = torch.ones(found.shape[-2:], dtype=torch.bool).tril()
        pattern = found.masked_fill(~mask, -torch.inf).softmax(-1)
        return (pattern @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register("probe", probe)
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    own_method = kind in ("gptj", "gpt_neo")
    implementation = "eager" if own_method or kind == "falcon" else "probe"
    model = (whole or AutoModelForCausalLM).from_pretrained(directory, attn_implementation=implementation).eval()
    if own_method:
        for module in model.modules():
            if hasattr(module, "_attn"):
                scale = getattr(module, "scale_attn", 1.0)

                def method(query, key, value, attention_mask=None, own=module._attn, scale=scale):
                    scores.append((query @ key.mT / scale)[0])
                    return own(query, key, value, attention_mask)

                module._attn = method
    if kind == "falcon":  # whose attention is a method without parts: queries and keys are taken where they are rotated
        from transformers.models.falcon import modeling_falcon

        rotate = modeling_falcon.apply_rotary_pos_emb

        def method(*arguments):
            query, key = rotate(*arguments)
            scores.append((query @ key.mT / query.shape[-1] ** 0.5)[0])
            return query, key

        modeling_falcon.apply_rotary_pos_emb = method
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (1, LENGTH))
    try:
        streams = model(tokens, output_hidden_states=True).hidden_states
    finally:
        if kind == "falcon":
            modeling_falcon.apply_rotary_pos_emb = rotate
    return tokens[0], [stream[0] for stream in streams], scores


def check_scores(source, streams, scores) -> None:
    facts = source.architecture
    for layer in range(facts.n_layers):
        weights = fold_layer(source.layer(layer), facts)
        x = normalise(streams[layer], facts.norm, facts.norm_eps)
        q, k = queries(weights, x), keys(weights, x)[facts.kv_of_head]
        for D in range(LENGTH):
            turned = q[:, D:]
            if weights.rotary is not None:
                turned = weights.rotary.rotate(turned, *weights.rotary.angles(torch.tensor([D])))
            mine = (turned * k[:, : LENGTH - D]).sum(-1) * score_scale(weights, facts)
            own = scores[layer].diagonal(-D, dim1=-2, dim2=-1)
            assert (mine - own).abs().max() < 1e-4 * max(1.0, own.abs().max().item()), (layer, D)
