"""Models with a known answer and comparisons with other code, for the tests and for `scripts/`; not in the wheel.

planted             small transformers in memory, with heads planted by hand
null_models         random and planted models, and how often the tests err on them
tiny_architectures  tiny random models of transformers' architectures
module_comparison   a checkpoint as ovqk reads it, compared with the model's own modules
materialised        a module's W_QK and W_OV, from its outputs
metric_ranks        how well a weight metric ranks the heads that have a role in the running model
random_checkpoints  checkpoints shaped like known models, for benchmarks
language            the synthetic language that the bundled models are trained on (its words: `language_words`)
"""
