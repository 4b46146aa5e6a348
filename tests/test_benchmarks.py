"""The benchmark of the operators: its checks can fail, and it runs whole at tiny sizes, with no peer installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_operators  # noqa: E402
from harness import clock, report  # noqa: E402
from harness.worker import Refused, Worker, once  # noqa: E402
from operators import cases, measure, sides  # noqa: E402
from operators.cases import ENTRANTS, OPERATORS, OURS  # noqa: E402
from operators.inputs import TOLERANCE, allocate, errors  # noqa: E402
from operators.measure import Run  # noqa: E402
from peers import install  # noqa: E402

SHAPES = {
    "token_log_probs": {"N": 5, "V": 33},
    "linear_token_log_probs": {"N": 5, "H": 7, "V": 33},
    "gae": {"B": 3, "T": 17},
    "clipped_policy_loss": {"N": 200},
    "clipped_value_loss": {"N": 200},
    "sample_tokens": {"B": 5, "V": 33},
}
SAMPLING = [{"B": 40, "V": 1000}, {"B": 40, "V": 1000, "top_k": 50}, {"B": 40, "V": 1000, "top_p": 0.9}]
PEERS = [
    ("token_log_probs", cases.CROSS_ENTROPY),
    ("token_log_probs", cases.GATHER),
    ("linear_token_log_probs", cases.UNFUSED),
    ("gae", cases.TRL_LOOP),
    ("gae", cases.SCAN),
    ("clipped_policy_loss", cases.EAGER),
    ("clipped_value_loss", cases.EAGER),
    ("sample_tokens", cases.MULTINOMIAL),
    *((operator, OURS) for operator in SHAPES),
]


def case_of(operator: str, dtype: str = "float32", passes: str | None = None, **more: object) -> cases.Case:
    passes = passes or (cases.FORWARD if operator in ("gae", "sample_tokens") else cases.BOTH)
    return cases.Case(operator, SHAPES[operator], dtype, passes, (), **more)


@pytest.mark.parametrize(("operator", "name"), PEERS)
def test_right_results_pass_the_check(operator: str, name: str) -> None:
    run = Run(name, case_of(operator), "cpu", seed=3)
    assert run.errors and max(run.errors.values()) < TOLERANCE["float32"], run.errors


@pytest.mark.parametrize("operator", SHAPES)
def test_a_wrong_result_and_a_wrong_gradient_are_found(operator: str) -> None:
    inputs = allocate(case_of(operator), "cpu")
    inputs.draw(0)
    forward = sides.ours(inputs)
    outputs = forward()
    trained = [name for name in outputs if outputs[name].requires_grad]
    incoming = [inputs.incoming(name) for name in trained]
    gradients = torch.autograd.grad([outputs[name] for name in trained], inputs.leaves, incoming) if trained else ()
    assert max(errors(inputs, outputs, gradients).values()) < TOLERANCE["float32"]
    for name in outputs:
        value = outputs[name].detach()
        wrong = {**outputs, name: value.logical_not() if value.dtype == torch.bool else 1.001 * value}
        assert max(errors(inputs, wrong, gradients).values()) > TOLERANCE["float32"], name
        if value.is_floating_point():
            missing = {**outputs, name: torch.full_like(value, torch.nan)}
            assert not max(errors(inputs, missing, gradients).values()) <= TOLERANCE["float32"], name
    for number, gradient in enumerate(gradients):
        wrong = tuple(1.001 * gradient if at == number else other for at, other in enumerate(gradients))
        assert max(errors(inputs, outputs, wrong).values()) > TOLERANCE["float32"], number


@pytest.mark.parametrize("shape", SAMPLING)
@pytest.mark.parametrize("name", [OURS, cases.MULTINOMIAL])
def test_sampling_is_checked_with_its_filters(shape: dict[str, float], name: str) -> None:
    case = cases.Case("sample_tokens", shape, "float32", cases.FORWARD, ())
    inputs = allocate(case, "cpu")
    inputs.draw(1)
    outputs = getattr(sides, ENTRANTS[name].function)(inputs)()
    assert max(errors(inputs, outputs, ()).values()) < TOLERANCE["float32"]
    # Another filter's result, and a token that no filter keeps.
    for other in SAMPLING:
        if other != shape:
            inputs.case = cases.Case("sample_tokens", other, "float32", cases.FORWARD, ())
            assert max(errors(inputs, outputs, ()).values()) > TOLERANCE["float32"]
    if len(shape) > 2:
        inputs.case = case
        wrong = {**outputs, "tokens": inputs["logits"].argmin(-1)}
        assert errors(inputs, wrong, ())["tokens"] > TOLERANCE["float32"]


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "trl_loop", lambda inputs: lambda: {"returns": inputs["rewards"] + 1})
    case = {"operator": "gae", "shape": {"B": 2, "T": 4}, "dtype": "float32", "passes": cases.FORWARD, "peers": ()}
    greeting, answer = measure.serve(cases.TRL_LOOP, "cpu", str(torch.get_num_threads()))
    assert greeting == {"version": f"torch {torch.__version__}"}
    refused = answer(do="prepare", case=case, seed=0)["refused"]
    assert refused.startswith("wrong: relative error against float64: returns")


def test_bytes_and_products_by_hand() -> None:
    shape = {"N": 4, "V": 10}
    # float32: 160 bytes of logits read; 4 tokens of 8 bytes in, 4 numbers of 4 bytes out for each of 4 rows.
    assert cases.bytes_moved(cases.Case("token_log_probs", shape, "float32", cases.FORWARD, ())) == 160 + 4 * 24
    # Backward: logits read, the gradient written, and for each row its token, 3 kept numbers and 2 gradients.
    assert cases.bytes_moved(cases.Case("token_log_probs", shape, "float32", cases.BACKWARD, ())) == 320 + 4 * 28
    assert cases.bytes_moved(cases.Case("gae", {"B": 2, "T": 3}, "float32", cases.FORWARD, ())) == 6 * 17
    # Sampling: the logits and a draw of 8 bytes in, a token of 8 bytes and two numbers of 4 out, for each of 4 rows.
    sampling = cases.Case("sample_tokens", {"B": 4, "V": 10, "top_k": 3}, "bfloat16", cases.FORWARD, ())
    assert cases.bytes_moved(sampling) == 4 * (20 + 24)
    head = {"N": 2, "H": 3, "V": 5}
    four = cases.work(cases.Case("linear_token_log_probs", head, "float32", cases.BOTH, ()), "cpu")
    three = cases.work(cases.Case("linear_cross_entropy", head, "float32", cases.BOTH, ()), "cpu")
    assert (four, three) == ({"flops": 240.0, "products": 4}, {"flops": 180.0, "products": 3})
    # Three on the CPU alone, and in 16 bits only where all rows are one tile.
    for dtype, rows, device, count in (
        ("bfloat16", 256, "cpu", 3),
        ("bfloat16", 257, "cpu", 4),
        ("float32", 257, "cpu", 3),
        ("float32", 2, "cuda", 4),
    ):
        assert cases.products(case_of_head(dtype, rows), device) == count


def case_of_head(dtype: str, rows: int) -> cases.Case:
    return cases.Case("linear_cross_entropy", {"N": rows, "H": 3, "V": 5}, dtype, cases.BOTH, ())


def test_cross_entropy_of_bf16_logits_passes_the_check_of_bf16() -> None:
    case = cases.Case("token_log_probs", {"N": 16, "V": 4096}, "bfloat16", cases.BOTH, ())
    direct, upcast = (Run(name, case, "cpu", seed=3) for name in (cases.BF16_CROSS_ENTROPY, cases.CROSS_ENTROPY))
    assert max(direct.errors.values()) < TOLERANCE["bfloat16"], direct.errors
    assert direct.errors["loss"] > upcast.errors["loss"]  # it does not take the loss in float32


def test_the_recorded_command_holds_no_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = str(ROOT / "benchmarks" / "a.json"), "--json=/elsewhere/b.json"
    monkeypatch.setattr(sys, "argv", ["bench_operators.py", "--json", inside, outside, "--seed=3"])
    command = report.about("cpu", 1)["command"]
    assert command == "python benchmarks/bench_operators.py --json benchmarks/a.json --json=b.json --seed=3"


def test_a_first_call_and_a_peak_are_measured_after_the_kept_memory_is_given_back() -> None:
    order: list[str] = []
    times = clock.first_calls(lambda: order.append("call"), 3, lambda: order.append("release"))
    assert len(times) == 3 and order == ["release", "call"] * 3
    order.clear()
    clock.peak_mb(lambda: order.append("call"), "cpu", lambda: order.append("release"))
    assert order in (["release", "call"], [])  # none where there is no resident set to read


class StandIn:
    """Enough of torch.cuda for the clock's host side: what is captured is run, and run again at a replay."""

    L2_cache_size = 1 << 12

    def __init__(self, *_: object, **__: object) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def elapsed_time(self, _: object) -> float:
        return 3.0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def record(self) -> None: ...


@pytest.fixture
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device name that is not "cpu", for tensors that are on the CPU all the same."""
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    for name in ("synchronize", "graph_pool_handle", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr("harness.clock.FLUSHED", 8)
    return "cpu:0"


@pytest.mark.parametrize("passes", [cases.FORWARD, cases.BACKWARD, cases.BOTH])
@pytest.mark.parametrize("operator", SHAPES)
def test_the_gpus_side_of_the_clock_on_a_stand_in(operator: str, passes: str, gpu_stand_in: str) -> None:
    without_gradient = operator in ("gae", "sample_tokens") and passes != cases.FORWARD
    if without_gradient or (operator, passes) == ("linear_token_log_probs", cases.BACKWARD):
        return  # not among the cases
    for name in (OURS, cases.LIMIT):
        run = Run(name, case_of(operator, passes=passes), gpu_stand_in, seed=0)
        graphed = operator in ("gae", "clipped_policy_loss", "clipped_value_loss")
        assert isinstance(run.call, clock.Graph) == graphed
        assert run.calls > 1 if graphed else run.calls == 1
        assert clock.peak_mb(run.single, gpu_stand_in, lambda: None) == 0.0
        run.draw(1)
        if graphed:
            before = [graph.replays for graph in run.call.graphs]
            run.call()
            counted = [False, True] if passes == cases.BACKWARD and name == OURS else [True] * len(before)
            assert [graph.replays - count == 1 for graph, count in zip(run.call.graphs, before, strict=True)] == counted
        assert clock.timed(run.call, 4, gpu_stand_in) == [3.0] * 4


def test_goals() -> None:
    case = case_of("gae", goals={cases.LIMIT: 2.0, cases.TRL_LOOP: 100.0, cases.VERL_LOOP: 10.0}, memory_goal=1.0)
    times = {OURS: [1.0] * 4, cases.LIMIT: [0.6] * 4, cases.TRL_LOOP: [99.0] * 4}
    case = cases.replace(case, peers=(cases.TRL_LOOP, cases.VERL_LOOP))
    row = measure.as_row(case, "cpu", times, {OURS: 0.5, cases.TRL_LOOP: 3.0}, {}, {cases.VERL_LOOP: "not installed"})
    met = {goal["against"]: goal["met"] for goal in row["goals"]}
    assert met == {cases.LIMIT: True, cases.TRL_LOOP: False, cases.VERL_LOOP: None, "memory": True}
    shown = "\n".join(bench_operators.section(row))
    assert "at least 100.0x: missed" in shown and "at most 2.00x: met" in shown and "not installed" in shown


def assert_published(results: dict) -> None:
    """The form that readers of the JSON rely on; details lie beside, as many as rows."""
    for name in ("rows", "sweeps"):
        for row in results[name]:
            assert list(row) == ["operator", "shape", "dtype", "pass", "ours_ms", "limit_ms", "peers"]
            assert isinstance(row["shape"], dict) and all(isinstance(ms, float) for ms in row["peers"].values())
    assert len(results["details"]) == len(results["rows"])
    assert len(results["sweep_details"]) == len(results["sweeps"])
    for details in results["details"] + results["sweep_details"]:
        assert {"ours_mb", "peers_mb", "samples", "errors", "goals"} <= set(details)


def test_the_json_has_rows_of_seven_keys_and_the_details_beside(tmp_path: Path) -> None:
    times = {OURS: [1.0] * 4, cases.LIMIT: [0.5] * 4, cases.TRL_LOOP: [2.0] * 4}
    case = cases.replace(case_of("gae"), peers=(cases.TRL_LOOP,))
    row = measure.as_row(case, "cpu", times, {OURS: 0.5, cases.TRL_LOOP: 3.0}, {}, {})
    about = {**report.about("cpu", 1), "quick": True, "peers": {}}
    results = {"about": about, "rows": [row], "missing": {}, "sweeps": [row, row]}
    bench_operators.write(results, tmp_path / "found.json", [])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert_published(found)
    assert {**found["rows"][0], **found["details"][0]} == row and found["sweep_details"] == found["details"] * 2
    assert bench_operators.title(row) in (tmp_path / "found.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("operators_*.json")), ids=lambda p: p.name
)
def test_the_committed_results_have_that_form(path: Path) -> None:
    assert_published(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("table", [cases.cpu_cases(), cases.cuda_cases(), cases.sweeps("cpu"), cases.sweeps("cuda")])
def test_every_row_can_be_built(table: list[cases.Case]) -> None:
    for case in table:
        assert case.operator in OPERATORS and set(case.goals) <= {*case.peers, cases.LIMIT}
        for name in (OURS, cases.LIMIT, *case.peers):
            entrant = ENTRANTS[name]
            assert callable(getattr(cases if name == cases.LIMIT else sides, entrant.function)), (case, name)
            if entrant.folder is not None:
                assert (ROOT / "benchmarks" / "peers" / f"{entrant.folder}.txt").exists()
        assert next(iter(cases.work(case, "cpu").values())) > 0
    if table[0].memory_goal is None and not any(case.goals for case in table):
        assert len({bench_operators._points(table_rows(table, "gae"), "T")[0]["shape"]["B"]}) == 1


def table_rows(table: list[cases.Case], operator: str) -> list[dict]:
    return [{"shape": case.shape} for case in table if case.operator == operator]


def test_a_peer_that_cannot_be_installed_is_named_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "INSTALLED", tmp_path / "peers")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    reason = install.install("cce")
    assert reason.startswith("ERROR: ") and "cut-cross-entropy" in reason
    assert install.missing(ENTRANTS[cases.CCE].folder) == f"not installed: {reason}"
    assert list((tmp_path / "peers").iterdir()) == [tmp_path / "peers" / "cce.failed"]


@pytest.fixture
def no_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody has run peers/install.py."""
    monkeypatch.setattr(install, "INSTALLED", tmp_path / "peers")
    monkeypatch.setattr("harness.worker.INSTALLED", tmp_path / "peers")


def test_a_run_writes_what_it_measured_names_missing_peers_and_ends_with_their_exit_code(
    tmp_path: Path, no_peer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row and two points of a plot, three processes: ours, the limit, and a peer that is there."""
    target = tmp_path / "out" / "small.json"
    row = cases.Case("token_log_probs", {"N": 1024, "V": 4096}, "float32", cases.BOTH, (cases.GATHER, cases.CCE))
    points = [cases.replace(row, shape={**row.shape, "N": count}, peers=()) for count in (512, 1024)]
    compiled = cases.replace(
        row, operator="gae", shape={"B": 128, "T": 128}, passes=cases.FORWARD, peers=(cases.COMPILED_LOOP,)
    )
    monkeypatch.setattr(cases, "cpu_cases", lambda: [row, compiled])
    monkeypatch.setattr(cases, "sweeps", lambda device: points)
    options = ["--quick", "--threads", "1", "--only", "token_log_probs", "gae", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["bench_operators.py", *options])
    assert bench_operators.main() == 3
    said = capsys.readouterr()
    results = json.loads(target.read_text(encoding="utf-8"))
    page = target.with_suffix(".md").read_text(encoding="utf-8")

    assert_published(results)
    assert [row["shape"] for row in results["rows"]] == [{"N": 16, "V": 64}, {"B": 2, "T": 2}]
    assert [list(row["peers"]) for row in results["rows"]] == [[cases.GATHER], []]
    for bare, details in zip(results["rows"], results["details"], strict=True):
        row = {**bare, **details}
        assert row["ours_ms"] > 0 and row["limit_ms"] > 0 and all(ms > 0 for ms in row["peers"].values())
        assert all(count >= 20 for count in row["samples"].values())
        assert max(row["errors"]["ours"].values()) < TOLERANCE[row["dtype"]]
        assert (row.get("first_call_ms", 0.0) > 0) == (row["operator"] == "token_log_probs")
        assert bench_operators.title(row) in page and bench_operators.title(row) in said.out
    assert results["missing"][cases.CCE] == "not installed: python benchmarks/peers/install.py cce"
    assert set(results["missing"]) == {cases.CCE, *cases.COMPILES}  # these are left out by --quick, and not asked for
    assert said.err.splitlines()[-1] == f"asked for, and could not run: {cases.CCE}"
    assert cases.CCE in page and f"missing: {cases.CCE}: not installed" in said.out
    assert [row["shape"]["N"] for row in results["sweeps"]] == [8, 16]
    facts = results["about"]
    assert facts["torch"] == torch.__version__ and facts["command"].startswith("python benchmarks/bench_operators.py")
    pytest.importorskip("matplotlib", reason="the plots need the extra `plot`")
    assert len(list(target.parent.glob("*.png"))) == page.count("![") == 1


@pytest.mark.parametrize(
    ("not_timed", "missing", "code"),
    [
        ({}, {}, 0),
        ({}, {cases.LIGER: "not installed"}, 3),
        ({}, {cases.COMPILED: bench_operators.LEFT_OUT}, 0),
        ({cases.CCE: "OutOfMemoryError: so much"}, {}, 3),  # it was there, and could not run
        ({OURS: "wrong", cases.CCE: "wrong"}, {cases.LIGER: "not installed"}, 1),
    ],
)
def test_the_exit_code(not_timed: dict, missing: dict, code: int) -> None:
    rows = [{"not_timed": {}}, {"not_timed": {**not_timed, **missing}}]
    assert bench_operators.exit_code({"rows": rows, "sweeps": [], "missing": missing}) == code


@pytest.mark.parametrize("script", ["bench_operators", "bench_training", "demo_against_trl"])
def test_the_help_says_what_the_exit_codes_mean(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert report.CODES in capsys.readouterr().out


def test_a_peers_list_has_what_pandas_imports() -> None:
    """pip is told not to follow dependencies, for torch must stay: a list has to be whole."""
    for path in (ROOT / "benchmarks" / "peers").glob("*.txt"):
        names = set(path.read_text(encoding="utf-8").splitlines())
        assert "pandas" not in names or names >= {"python-dateutil", "pytz", "six", "tzdata"}, path


def test_a_process_is_asked_and_says_why_it_cannot_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "side.py").write_text(
        "import os, time\n"
        "def answer(what):\n"
        "    print('noise')\n"
        "    if what == 'end': os._exit(7)\n"
        "    if what == 'sleep': time.sleep(60)\n"
        "    return {'threads': os.environ['OMP_NUM_THREADS'], 'half': 1 / what}\n"
        "def serve(): return {'version': '1'}, answer\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("side", threads=3, limit=20.0)
    assert worker.greet() == {"version": "1"} and worker.ask(what=2) == {"threads": "3", "half": 0.5}
    with pytest.raises(Refused, match=r"^ZeroDivisionError: division by zero$"):
        worker.ask(what=0)
    assert worker.alive and worker.ask(what=4)["half"] == 0.25
    with pytest.raises(Refused, match=r"its process ended \(7\): noise"):
        worker.ask(what="end")
    assert not worker.alive
    with pytest.raises(Refused, match=r"no answer within 2 s"):
        once("side", {"what": "sleep"}, threads=1, limit=2.0)
    with pytest.raises(Refused, match=r"install\.py nobody"):
        Worker("side", threads=1, folder="nobody")
