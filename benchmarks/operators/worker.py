"""The process of one entrant: it builds a case, is checked, and runs when it is asked to.

    python -m operators.worker NAME DEVICE THREADS

Questions come as lines of JSON on the standard input, answers go as lines of JSON to the standard output: ``{"do":
"prepare", "case": ..., "seed": ...}``, ``{"do": "memory"}``, ``{"do": "time", "seed": ..., "samples": ...}``, ``{"do":
"first calls", "samples": ...}``, ``{"do": "drop"}``. An answer with the key ``refused`` says why this entrant cannot
take part in the case.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators import clock
from operators.cases import BACKWARD, BOTH, FORWARD, LIMIT, TRL_LOOP, VERL_LOOP, Case
from operators.entrants import ENTRANTS, OURS
from operators.inputs import TOLERANCE, Inputs, allocate, errors
from operators.limits import bytes_moved, limit

WARM_UP = 2
LOOPS = (TRL_LOOP, VERL_LOOP)  # thousands of launches: on a GPU they are timed as they are used, not in a graph


class Run:
    """One case of one entrant: ``call`` is what is timed, ``calls`` how often it does the work."""

    def __init__(self, name: str, case: Case, device: str, seed: int) -> None:
        self.case, self.device, self.calls = case, device, 1
        self.inputs: list[Inputs] = []
        self.errors: dict[str, float] = {}
        self.renew: Callable[[], object] = lambda: None  # what must be done again once the inputs have changed
        small = not ("V" in case.shape or name in LOOPS)
        copies = clock.graph_copies(bytes_moved(case)) if device != "cpu" and small else 0
        if name == LIMIT:
            self.single = limit(case, device)
            copied = [limit(case, device) for _ in range(copies)]
            self.call = self._graph([lambda: [copy() for copy in copied]], [True], copies) if copies else self.single
            return
        build = ENTRANTS[name].builder(case.operator)
        self.inputs = [allocate(case, device) for _ in range(max(1, copies))]
        self.draw(seed)
        forwards = [build(inputs) for inputs in self.inputs]
        self._check(forwards[0], seed)
        self.single = self._single(forwards[0])
        self.call = self._graphed(forwards) if copies else self.single

    def draw(self, seed: int) -> None:
        for number, inputs in enumerate(self.inputs):
            inputs.draw(1000 * seed + number)
        self.renew()

    def _check(self, forward: Callable[[], dict[str, Tensor]], seed: int) -> None:
        inputs = self.inputs[0]
        outputs = forward()
        gradients = () if self.case.passes == FORWARD or not inputs.leaves else self._gradients(inputs, outputs)
        if any(
            gradient.data_ptr() == leaf.data_ptr() for gradient, leaf in zip(gradients, inputs.leaves, strict=False)
        ):
            gradients = tuple(gradient.clone() for gradient in gradients)  # made in place of the logits
        self.draw(seed)  # for the same reason
        self.errors = errors(inputs, outputs, gradients)

    @staticmethod
    def _gradients(inputs: Inputs, outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        trained = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad}
        incoming = tuple(inputs.incoming(name) for name in trained)
        return torch.autograd.grad(tuple(trained.values()), inputs.leaves, incoming)

    def _single(self, forward: Callable[[], dict[str, Tensor]]) -> Callable[[], object]:
        """The case's pass as one call that returns what it leaves behind."""
        inputs = self.inputs[0]
        if self.case.passes == FORWARD:
            return lambda: tuple(forward().values())
        # The incoming gradients are made beforehand: they are the loss's part.
        kept = forward()
        names = [name for name, tensor in kept.items() if tensor.requires_grad]
        incoming = tuple(inputs.incoming(name) for name in names)

        def gradients(outputs: dict[str, Tensor], retain: bool) -> tuple[Tensor, ...]:
            trained = tuple(outputs[name] for name in names)
            return torch.autograd.grad(trained, inputs.leaves, incoming, retain_graph=retain)

        if self.case.passes == BACKWARD:
            self.renew = lambda: kept.update(forward())  # autograd refuses inputs that changed since the forward
            return lambda: gradients(kept, True)

        def both() -> tuple[Tensor, ...]:
            outputs = forward()
            return (*gradients(outputs, False), *outputs.values())

        kept = {}
        return both

    def _graphed(self, forwards: list[Callable[[], dict[str, Tensor]]]) -> clock.Graph:
        kept: list[dict[str, Tensor]] = []
        # On a stream of its own first, as capture asks for: compilation, autotuning and lazy set-up happen here.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                for inputs, forward in zip(self.inputs, forwards, strict=True):
                    outputs = forward()
                    if self.case.passes != FORWARD:
                        self._gradients(inputs, outputs)
        torch.cuda.current_stream().wait_stream(stream)
        stages: list[Callable[[], object]] = [lambda: kept.extend(forward() for forward in forwards)]
        if self.case.passes != FORWARD:
            names = [name for name, tensor in outputs.items() if tensor.requires_grad]
            # Of its own for each copy: one for all would stay in the L2 cache.
            incoming = [tuple(inputs.incoming(name) for name in names) for inputs in self.inputs]

            def backward() -> list[tuple[Tensor, ...]]:
                return [
                    torch.autograd.grad(tuple(made[name] for name in names), inputs.leaves, given)
                    for made, inputs, given in zip(kept, self.inputs, incoming, strict=True)
                ]

            stages.append(backward)
        counted = {FORWARD: [True], BACKWARD: [False, True], BOTH: [True, True]}[self.case.passes]
        graph = self._graph(stages, counted, len(forwards))
        graph.results.append(kept)
        return graph

    def _graph(self, stages: list[Callable[[], object]], counted: list[bool], copies: int) -> clock.Graph:
        self.calls = copies
        for _ in range(WARM_UP):
            self.single()
        torch.cuda.synchronize()
        graph = clock.Graph(stages, counted)
        eager = self.renew
        self.renew = lambda: (eager(), graph.replay_all())
        return graph


def answer(name: str, device: str, question: dict[str, Any], run: Run | None) -> tuple[dict[str, Any], Run | None]:
    """Does what is asked; the answer, and the case now held."""
    if question["do"] == "drop":
        return {}, None
    if question["do"] == "prepare":
        case = Case(**question["case"])
        run = Run(name, case, device, question["seed"])
        worst = max(run.errors.values(), default=0.0)
        if not worst <= TOLERANCE[case.dtype]:
            found = ", ".join(f"{tensor} {error:.2g}" for tensor, error in run.errors.items())
            return {"refused": f"wrong: relative error against float64: {found}"}, None
        estimate = clock.timed(run.call, 1, device)[0] / run.calls
        return {"errors": run.errors, "estimate_ms": estimate}, run
    assert run is not None, "nothing is prepared"
    if question["do"] == "memory":
        return {"mb": clock.peak_mb(run.single, device, _release(name))}, run
    if question["do"] == "first calls":
        return {"ms": clock.first_calls(run.call, question["samples"], _release(name))}, run
    run.draw(question["seed"])
    return {"ms": [ms / run.calls for ms in clock.timed(run.call, question["samples"], device)]}, run


def _release(name: str) -> Callable[[], object]:
    """What gives back the memory that the entrant keeps between calls: peers keep none on a CPU."""
    if name != OURS:
        return lambda: None
    from operators.ours import release_kept_memory

    return release_kept_memory


def main() -> None:
    name, device, threads = sys.argv[1:]
    # The answers' channel is ours alone: whatever a peer prints goes to the standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        version = ENTRANTS[name].version()
    except importlib.metadata.PackageNotFoundError as error:
        return say({"refused": str(error)})
    say({"version": version})
    run = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            message, run = answer(name, device, question, run)
        except Exception as error:  # a peer may fail in any way; the benchmark goes on without it and says so
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            message, run = {"refused": f"{type(error).__name__}: {first_line}"}, None
        gc.collect()
        if device != "cpu" and question["do"] in ("prepare", "drop"):
            torch.cuda.empty_cache()  # the truth in float64 is large, and there are others on this GPU
        say(message)
    return None


if __name__ == "__main__":
    main()
