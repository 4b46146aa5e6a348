"""A custom engine: responses come from a copy of the policy, as from a serving engine such as vLLM or SGLang.

    python -m rlhf_lightning fit --config ppo.yaml --model.engine examples.own_engine.CopyEngine \
        --model.engine.folder runs/sft/model

A transformers model does here, prompt by prompt, what a serving engine does. It keeps its own weights, which
``receive`` replaces. It draws tokens with its own random numbers, and ``generate`` returns their log-probs.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import gathered
from rlhf_lightning.rollout import Responses, RolloutEngine, Sampling
from rlhf_lightning.rollout.engine import Progress


class CopyEngine(RolloutEngine):
    """Answers with a model of its own.

    Args:
        folder: a model of the policy's architecture; its weights do not matter.
    """

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def receive(self, policy: Policy) -> None:
        """Take the weights, one whole tensor at a time, also if the policy is sharded."""
        own = dict(self.model.named_parameters())
        for name, tensor in gathered(policy.model):
            own[name].data.copy_(tensor)

    def generate(
        self, policy: Policy, prompts: PromptBatch, sampling: Sampling, progress: Progress | None = None
    ) -> Responses:
        """One response to every prompt; log-probs are those of the distribution that was sampled from."""
        rows, width = len(prompts), sampling.max_new_tokens
        ids = torch.arange(self.model.get_output_embeddings().weight.shape[0], device=prompts.tokens.device)
        without_token = ids[policy.vocabulary.strangers(ids)].tolist()  # rows of the head without a token
        tokens, log_probs = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width)
        lengths, truncated = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
        for row in range(rows):
            prompt = prompts.tokens[row : row + 1, : prompts.lengths[row]].cpu()
            answer = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=width,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                suppress_tokens=without_token or None,
                eos_token_id=list(sampling.eos_ids),
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            found = answer.sequences[0, prompt.shape[1] :]
            lengths[row] = len(found)
            tokens[row, : len(found)] = found
            scores = torch.cat(answer.scores).log_softmax(dim=-1)
            log_probs[row, : len(found)] = scores.gather(1, found[:, None])[:, 0]
            truncated[row] = int(found[-1]) not in sampling.eos_ids
        device = prompts.tokens.device
        return Responses(tokens.to(device), log_probs.to(device), lengths.to(device), truncated.to(device))
