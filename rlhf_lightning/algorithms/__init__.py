"""Pure functions of tensors: the mathematics of RLHF, with no model, no trainer and no tokenizer."""
