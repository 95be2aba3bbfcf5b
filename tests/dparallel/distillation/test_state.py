"""The state of a training is the same under every layout: real DeepSpeed engines on a model of four matrices.

AdamW of torch, in one process and undivided, is the oracle.
"""

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dparallel.config.experiment import OptimizerConfig
from dparallel.distillation import engine, state
from dparallel.distillation.optimizer import learning_rate_factor
from tests.dparallel.distillation.conftest import FORK, training_config

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_ratio=0.2, betas=(0.8, 0.95), weight_decay=0.25
)
TRAIN_STEPS, DONE = 20, 7
CPU = {"offload_optimizer": {"device": "cpu"}}
TORCH_ON_CPU = {"zero_force_ds_cpu_optimizer": False}
COMPILED = ("stage 2, compiled optimizer", "stage 3, compiled optimizer")
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 1, float32 gradients": {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage 2": {},
    "stage 2, round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "stage 2, offloaded": {"zero_optimization": {"stage": 2, **CPU}, **TORCH_ON_CPU},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "stage 3, small groups": {"zero_optimization": {"stage": 3, "sub_group_size": 10}},
    "stage 3, offloaded": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU},
        **TORCH_ON_CPU,
    },
    "stage 2, compiled optimizer": {"zero_optimization": {"stage": 2, **CPU}},
    "stage 3, compiled optimizer": {"zero_optimization": {"stage": 3, **CPU}},
}


class Toy(nn.Module):
    """A frozen matrix beside trained ones; two of them cannot be divided evenly by two processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.a = nn.Linear(7, 3, bias=False)  # 21 weights
        self.b = nn.Linear(3, 5, bias=False)
        self.c = nn.Linear(5, 1)  # a bias of one weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.frozen(x) + self.b(self.a(x))))


def toy_state() -> dict[str, Tensor]:
    """A state as after some train steps, with weights that bf16 does not represent exactly."""
    torch.manual_seed(1)
    made = {}
    for name, weight in state.trained_weights(Toy()):
        made[f"{name}/weight"] = torch.randn(weight.shape)
        made[f"{name}/exp_avg"] = 0.1 * torch.randn(weight.shape)
        made[f"{name}/exp_avg_sq"] = 0.1 * torch.rand(weight.shape) + 0.01
    return made


def inputs(train_step: int) -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(train_step))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


def by_torch(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """The state after `steps` more train steps and their learning rates, by torch's AdamW."""
    model, begun, rates = Toy(), toy_state(), []
    named = dict(state.trained_weights(model))
    adamw = torch.optim.AdamW(
        named.values(), betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay, foreach=False
    )
    for name, weight in named.items():
        weight.data.copy_(begun[f"{name}/weight"])
        moments = {part: begun[f"{name}/{part}"] for part in state.MOMENTS}
        adamw.state[weight] = {"step": torch.tensor(float(DONE)), **moments}
    for train_step in range(DONE, DONE + steps):
        (group,) = adamw.param_groups
        group["lr"] = OPTIMIZER.learning_rate * learning_rate_factor(OPTIMIZER, train_step, TRAIN_STEPS)
        rates.append(group["lr"])
        adamw.zero_grad()
        loss(model, inputs(train_step)).backward()
        nn.utils.clip_grad_norm_(named.values(), OPTIMIZER.max_grad_norm)
        adamw.step()
    ended = {}
    for name, weight in named.items():
        ended[f"{name}/weight"] = weight.detach()
        ended |= {f"{name}/{part}": adamw.state[weight][part] for part in state.MOMENTS}
    return ended, rates


def resume(
    file: Path, process: engine.Process, deepspeed: dict, dtype: torch.dtype
) -> engine.DeepSpeedEngine:
    config = training_config(deepspeed=deepspeed, optimizer=OPTIMIZER)
    settings = engine.deepspeed_config(config, process.count, 8 // process.count, 1, dtype)
    return engine.start_engine(Toy().to(dtype), OPTIMIZER, TRAIN_STEPS, settings, DONE, file)


def check_round_trip(file: Path, process: engine.Process, deepspeed: dict, dtype: torch.dtype) -> None:
    """What was loaded is gathered to the bit, also before the first train step of the launch."""
    resumed = resume(file, process, deepspeed, dtype)
    gathered = state.gather(resumed, kept=True)
    expected = toy_state()
    assert gathered.keys() == expected.keys()
    for name, whole in gathered.items():
        assert whole.dtype == torch.float32
        assert torch.equal(whole, expected[name]), name
    assert state.gather(resumed, kept=False) == {}
    resumed.destroy()


def check_steps(file: Path, process: engine.Process, deepspeed: dict) -> None:
    """Three train steps are those of torch's AdamW, with its learning rates to the bit."""
    resumed, rates = resume(file, process, deepspeed, torch.float32), []
    expected, expected_rates = by_torch(steps=3)
    for train_step in range(DONE, DONE + 3):
        rates += resumed.get_lr()
        own = inputs(train_step).chunk(process.count)[process.rank]
        resumed.backward(loss(resumed, own))
        resumed.step()
    assert rates == expected_rates
    assert resumed.global_steps == DONE + 3
    # A few float32 roundings (6e-8) of values below 3, in sums whose order differs.
    torch.testing.assert_close(state.gather(resumed, kept=True), expected, atol=1e-6, rtol=1e-5)
    resumed.destroy()


def in_processes(count: int, folder: Path, what: Callable[[engine.Process], None]) -> None:
    """Run `what` in forked processes that communicate, and fail with what they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        warnings.filterwarnings("ignore", category=FutureWarning)  # as in `dparallel.distillation.__main__`
        code = 1
        with (folder / f"{rank}.output").open("w", encoding="utf-8", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = output
            try:
                process = engine.launched_process()
                engine.join(process)
                what(process)
                engine.leave()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)  # without what other tests' libraries do at exit

    started = [FORK.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=100)
    outputs = [(folder / f"{rank}.output").read_text(encoding="utf-8") for rank in range(count)]
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, "\n".join(outputs)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(toy_state(), tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


def check_layouts(file: Path, processes: int, names: Iterable[str]) -> None:
    def check(process: engine.Process) -> None:
        for name in names:
            print(name)
            check_round_trip(file, process, LAYOUTS[name], torch.bfloat16)
            check_steps(file, process, LAYOUTS[name])

    in_processes(processes, file.parent, check)


@pytest.mark.slow
def test_two_processes_load_the_state_and_step_as_torch_does(file: Path) -> None:
    check_layouts(file, 2, ["stage 2", "stage 2, round robin", "stage 2, offloaded", "stage 3"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_layout_loads_the_state_and_steps_as_torch_does(file: Path, processes: int) -> None:
    check_layouts(file, processes, [name for name in LAYOUTS if name not in COMPILED])


BUILT = list(Path(os.environ.get("TORCH_EXTENSIONS_DIR", "none")).rglob("cpu_adam.so"))


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="DeepSpeed's CPU optimizer is not built under TORCH_EXTENSIONS_DIR")
@pytest.mark.parametrize("processes", [1, 2])
def test_deepspeeds_optimizer_for_the_cpu_loads_the_state_and_steps_as_torch_does(
    file: Path, processes: int
) -> None:
    check_layouts(file, processes, COMPILED)


def test_the_weights_of_the_student_are_those_of_the_state_rounded(file: Path) -> None:
    student = Toy().to(torch.bfloat16)
    frozen = student.frozen.weight.clone()
    state.load_weights(student, file)
    for name, weight in state.trained_weights(student):
        assert torch.equal(weight, load_file(file)[f"{name}/weight"].to(torch.bfloat16))
    assert torch.equal(student.frozen.weight, frozen)
