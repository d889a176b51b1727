"""Tiny models of any architecture of transformers, read through the bridge and analysed without a task."""

from ovqk.analyse import analyse
from ovqk.weights.types import OpenedModel
from support.commands import compose
from support.models import bridged, randomise

LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def make(model_type, directory, **keys):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **keys)
    model = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    model.save_pretrained(directory)
    return model


def analysed(directory, read=bridged):
    return analyse(OpenedModel(read(directory), "m"), compose("task=none", "model=local", f"model.path={directory}"))
