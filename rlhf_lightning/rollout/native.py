"""The native engine's decode loop: a prefill, then one token a step for all rows that have not ended.

A row's response depends only on its own tokens and draws (`Sampling.draws`), not on the other rows.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import InputError, out_of_memory
from rlhf_lightning.models.layers import computed_in, nearly_equal
from rlhf_lightning.models.loading import check_length
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import is_sharded, unsharded
from rlhf_lightning.rollout.cache import SlotCache, slot_attention_in
from rlhf_lightning.rollout.decoding import Decode, Decoding
from rlhf_lightning.rollout.engine import Progress, Responses, RolloutEngine, Sampling, ready_to_decode
from rlhf_lightning.rollout.graphs import StepGraphs, can_capture

_WINDOWED = {"full_attention", "sliding_attention"}  # layers whose caches hold only keys and values
# Steps that are not recorded differ in size, and cuDNN's attention would make a plan for every size.
_OF_ANY_SIZE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_PATIENCE = 8  # steps between two checks for rows that have ended, if a check makes the GPU wait


class NativeEngine(RolloutEngine):
    """This library's own loop over the policy's forward pass, for models whose caches hold only keys and values.

    Args:
        prefill_tokens: most padded prompt tokens in one forward pass; it bounds the memory and changes no result.
        cuda_graphs: on a GPU, replay recorded steps, which saves kernel launches. Not for sharded models. Except under
            autocast, the cache and the steps' buffers then stay on the GPU from one rollout to the next.
        compile_steps: let torch.compile fuse a step's many small kernels; this slows the first rollout down. Not for
            sharded weights, nor under autocast, which would cast all weights in every step.
    """

    exact = True

    def __init__(
        self, prefill_tokens: PositiveInt = 8192, cuda_graphs: bool = True, compile_steps: bool = False
    ) -> None:
        self.prefill_tokens = prefill_tokens
        self.cuda_graphs = cuda_graphs
        self.compile_steps = compile_steps
        self._checked: weakref.WeakSet[Policy] = weakref.WeakSet()
        self._graphs: StepGraphs | None = None
        self._compiled: tuple[Policy, Decode] | None = None

    def generate(
        self, policy: Policy, prompts: PromptBatch, sampling: Sampling, progress: Progress | None = None
    ) -> Responses:
        """See `RolloutEngine`.

        Raises:
            InputError: the model's cache holds more than keys and values (the message names the other engine), or
                ``compile_steps`` is set under autocast or for sharded weights.
        """
        count = len(prompts)
        longest = int(prompts.lengths.max()) if count else 0
        check_length(policy.model, longest + sampling.max_new_tokens, policy.model.name_or_path or "model")
        # Lightning validates in inference mode, and tensors made in that mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad(), unsharded(policy), ready_to_decode(policy):
            self.check(policy)
            kernels: AbstractContextManager[Any] = nullcontext()
            if self.cuda_graphs and can_capture(policy):
                graphs = self._graphs_for(policy, count, longest, sampling)
                decoding, advance, patience = graphs.decoding, graphs.advance, _PATIENCE
            else:
                decoding = Decoding(count, longest + sampling.max_new_tokens, sampling, next(policy.parameters()))
                advance, patience, kernels = decoding.advance, 1, sdpa_kernel(_OF_ANY_SIZE)
            decoding.prefill(policy, prompts, sampling, self.prefill_tokens)
            decode = self._step_of(policy)
            with slot_attention_in(policy.model), kernels:
                while decoding.rows and decoding.steps < sampling.max_new_tokens:
                    if progress is not None:
                        progress(decoding.steps, sampling.max_new_tokens)
                    if decoding.steps % patience == 0 and not decoding.leave():
                        break
                    advance(decode, decoding.rows, decoding.longest)
                    decoding.steps += 1
            if progress is not None:
                progress(sampling.max_new_tokens, sampling.max_new_tokens)
        return decoding.responses(count)

    def check(self, policy: Policy) -> None:
        """Raises an InputError if this loop cannot run the policy (ready to decode). Each policy is tried only once."""
        if policy not in self._checked:
            check_decodes(policy)
            self._checked.add(policy)

    def _graphs_for(self, policy: Policy, rows: int, longest: int, sampling: Sampling) -> StepGraphs:
        """The graphs of earlier rollouts if they fit this one, else new ones."""
        if self._graphs is not None and self._graphs.fits(policy, rows, longest, sampling):
            return self._graphs
        self._graphs = None  # frees the memory of the old ones first
        graphs = StepGraphs(policy, rows, longest, sampling)
        # Autocast's copies of the weights live for one rollout only, so the graphs that read them cannot live longer.
        if not torch.is_autocast_enabled(graphs.decoding.row.device.type):
            self._graphs = graphs
        return graphs

    def _step_of(self, policy: Policy) -> Decode:
        """The function that makes a step: ``policy.decode``, compiled if ``compile_steps`` is set."""
        if not self.compile_steps:
            return policy.decode
        if is_sharded(policy) or torch.is_autocast_enabled(next(policy.parameters()).device.type):
            raise InputError(
                "model.engine.compile_steps: works neither under autocast nor with sharded weights; set "
                "trainer.precision bf16-true or 32-true and a strategy that does not shard, or leave it off"
            )
        if self._compiled is None or self._compiled[0] is not policy:
            self._compiled = policy, torch.compile(policy.decode, fullgraph=True, dynamic=True)

        def step(*inputs: Any, **attention: Any) -> Tensor:
            assert self._compiled is not None
            try:
                return self._compiled[1](*inputs, **attention)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"{type(policy.model).__name__}: its decode step can't be compiled ({reason}); decoding goes on "
                    "without, more slowly",
                    stacklevel=2,
                )
                self._compiled = policy, policy.decode
                return policy.decode(*inputs, **attention)

        return step


def check_decodes(policy: Policy) -> None:
    """Raises an InputError if a few tokens get other log-probs with a `SlotCache` than without a cache."""
    model, name = policy.model, type(policy.model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    advice = "set model.engine to rlhf_lightning.rollout.TransformersEngine"
    if not getattr(model, "_supports_attention_backend", False) or model._is_stateful or not kinds <= _WINDOWED:
        raise InputError(
            f"{name}: this library's decode loop caches only keys and values, and this model's cache or attention "
            f"needs something else; {advice}"
        )
    device = next(policy.parameters()).device
    tokens = torch.arange(min(5, config.vocab_size), device=device).flip(0)[None]
    count = tokens.shape[1]
    positions, one = torch.arange(count, device=device)[None], torch.ones(1, dtype=torch.int64, device=device)
    expected = policy(tokens, count * one, one).log_probs[0, 1:]
    found, cache = [], SlotCache(1, count, device)
    try:
        found.append(policy.decode(tokens[:, :2], positions[:, :2], cache.prefill(0), one))
        with slot_attention_in(model):
            for place in range(2, count - 1):
                cache.lengths[:] = place
                now = slice(place, place + 1)
                found.append(policy.decode(tokens[:, now], positions[:, now], cache.step(1, place + 1), slots=cache))
    # A model may raise anything if its cache is not of the class that it expects.
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: this library's decode loop cannot run it ({reason}); {advice}") from error
    got = torch.cat(found).log_softmax(dim=1).gather(1, tokens[0, 2:, None])[:, 0]
    if bool(expected.isfinite().all()) and not nearly_equal(got, expected, computed_in(policy)):
        raise InputError(f"{name}: this library's decode loop gives other log-probs; {advice}")
