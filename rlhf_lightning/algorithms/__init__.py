"""The mathematics of RLHF as pure functions of tensors, without model, trainer or tokenizer."""
