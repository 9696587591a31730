"""One step of learning: forward, backward, the gradients' mean over all ranks, the update.

Owns the model and all that changes with it: optimizer, scaler, moving average. Needs a process
group; every rank calls the same methods in the same order.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpu_service.training.settings import Settings
from gpu_service.training.task import Task, Tensors

_LAST_RATE = 1e-3  # share of the peak at which the learning rate ends
_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A model that learns. `steps` is how many there will be, for the learning rate."""

    def __init__(self, *, task: Task, settings: Settings, device: torch.device, steps: int) -> None:
        self.task, self.settings, self.device, self._steps = task, settings, device, steps
        self.model = task.build().to(device)
        if settings.sync_batch_norm:
            self.model = _with_sync_batch_norm(self.model)
        self.average = averaged(self.model, settings.ema) if settings.ema else None
        if settings.compile:
            self.model.compile()
        self.parallel = wrap(task.whole(self.model), settings, device)
        self.optimizer = optimizer(self.parallel, settings)
        # Keeps the small gradients of fp16 from becoming zero; does nothing otherwise.
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.parallel.train()  # type: ignore[no-untyped-call]

    def step(self, inputs: Tensors, targets: Tensors, *, weight: float, number: int) -> Any:
        """Learn from this rank's share [n, …] of a batch; `number` counts steps from 0.

        `weight` is each sample's: ranks / samples of the whole batch. Returns the weighted sum of
        the losses, a tensor on the device: its mean over the ranks is the batch's mean loss.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self._steps, self.settings)
        total = torch.zeros((), device=self.device)
        parts = self._parts(inputs, targets)
        for number_of_part, (some_inputs, some_targets) in enumerate(parts, start=1):
            # Gradients add up on this rank, and travel once, with the last part.
            last = number_of_part == len(parts)
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                with self._autocast():
                    losses = self.task.losses(self.parallel, some_inputs, some_targets)
                loss = losses.sum() * weight
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._update()
        return total

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the state_dict to serve."""
        return {name: value.detach().clone() for name, value in self.served().state_dict().items()}

    def served(self) -> nn.Module:
        """The model to evaluate: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that `restore` needs, as named tensors and as facts for JSON.

        Every rank must call it. With ZeRO, rank 0 alone has the whole of the optimizer's.
        """
        if self.settings.zero:
            self.optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
            if dist.get_rank() != 0:
                return {}, {}
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{name}": v for name, v in self.average.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return tensors, {"scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to what `state` returned, on any rank, with any number of ranks."""
        self.model.load_state_dict(_under("model.", tensors))
        if self.average is not None:
            self.average.load_state_dict(_under("ema.", tensors))
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        parameters = list(self.model.parameters())
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = _laid_out_like(parameters[int(index)], value)
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        group["params"] = list(range(len(parameters)))
        self.optimizer.load_state_dict({"state": state, "param_groups": [group]})

    def efficiency(self) -> float:
        """The share of a step that is not spent waiting for the other ranks' gradients, 0 to 1."""
        # DDP samples these times, in ns, in any case.
        times = self.parallel._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        forward, backward, communication, overlap = (
            times.get(f"avg_{part}_time", 0)
            for part in (
                "forward_compute",
                "backward_compute",
                "backward_comm",
                "backward_compute_comm_overlap",
            )
        )
        compute = forward + backward
        return compute / (compute + max(0, communication - overlap)) if compute else 1.0

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.settings.precision
        return torch.autocast(self.device.type, _AUTOCAST[kind], enabled=kind != "fp32")

    def _parts(self, inputs: Tensors, targets: Tensors) -> list[tuple[Tensors, Tensors]]:
        tensors = [tensor.chunk(self.settings.accumulate) for tensor in (*inputs, *targets)]
        return [self.task.divide(part) for part in zip(*tensors, strict=True)]

    def _update(self) -> None:
        if self.settings.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parallel.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)


def wrap(model: nn.Module, settings: Settings, device: torch.device) -> DistributedDataParallel:
    """`model` so that `backward` leaves in each gradient the mean over all ranks."""
    parallel = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the communication buffers: no copies
        # Every step uses every parameter: nothing to search for. Not with no_sync (torch 2.13).
        static_graph=settings.accumulate == 1 and not settings.deterministic,
        # DDP sorts its buckets anew after its first step: a resumed run of three and more ranks
        # would add in another order than one that was never interrupted. Not with this.
        find_unused_parameters=settings.deterministic and dist.get_world_size() > 2,
    )
    if settings.compress == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return parallel


def optimizer(parallel: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; with ZeRO, each rank keeps the state of a part of the parameters."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "fused": True,
    }
    if settings.zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow, and rarely needed

        return ZeroRedundancyOptimizer(
            parallel.parameters(), optimizer_class=torch.optim.AdamW, **options
        )
    return torch.optim.AdamW(parallel.parameters(), **options)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows it: the exponential moving average of its weights."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """That of a step, from 0 on: a straight rise to the peak, then half a cosine down.

    A function of the step alone: no scheduler has a state that could be lost.
    """
    rise = round(settings.warmup * steps)
    if step < rise:
        return settings.learning_rate * (step + 1) / rise
    part = (step - rise) / max(1, steps - rise)
    share = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * part)) / 2
    return settings.learning_rate * share


@contextlib.contextmanager
def determinism(settings: Settings) -> Iterator[None]:
    """Only algorithms that give the same bits each time, where the settings ask for it."""
    if not settings.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _with_sync_batch_norm(model: nn.Module) -> nn.Module:
    changed: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return changed


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in the parameter's memory format, which the fused optimizer takes for granted."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
