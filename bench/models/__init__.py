"""The models that benchmarks train and run: a GPT, its data, its attentions."""
