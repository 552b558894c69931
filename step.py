"""One optimizer step of a rank: what train.py repeats, and what bench/step.py measures.

    step.backward(tokens)      forward and backward of every micro-batch; gradients add up in float32
    step.update(lr)            the norm of all gradients, clipping, AdamW
    loader.next()                meanwhile the next batch was read, and copied to the device

The host only queues work for the device. It never waits in here: also the clipping, and that nothing is updated where a
gradient is not finite, are decided on the device. The caller waits once a step, when it reads loss and norm.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kernels.backend import triton_runs
from model import Pythia
from parallel.gradients import Gradients
from runtime.metrics import StepTimer
from runtime.ranks import Dist

LAUNCH_BOUND = 200_000_000  # parameters: up to here a GPU is done with a kernel before the host has queued the next


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with Pythia's constants; biases and LayerNorms, the one-dimensional parameters, are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Step:
    """The step of a model whose gradients `gradients` adds up, over micro-steps and ranks."""

    def __init__(self, model: Pythia, gradients: Gradients, optimizer: torch.optim.AdamW, ranks: Dist):
        self.model, self.gradients, self.optimizer, self.ranks = model, gradients, optimizer, ranks
        sharded, small = isinstance(model, FSDPModule), model.config.parameters < LAUNCH_BOUND
        self.rounded = RoundedWeights([] if sharded else list(model.blocks), model.compute_dtype)
        # The definition of the loss asks the device something in its middle, which no graph can.
        kernels = triton_runs(torch.empty(0, dtype=model.compute_dtype, device=ranks.device))
        graph = ranks.device.type == "cuda" and kernels and small and not sharded
        self.graph = MicroStepGraph(self._micro_step) if graph else None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.weight = torch.ones((), device=ranks.device)  # of the loss of a micro-batch in what is differentiated
        self.timer = StepTimer(ranks.device)

    def forward_backward(self, tokens: Tensor, scale: float = 1.0) -> None:
        """Add up loss and gradients, `scale` times, of tokens [micro_steps, micro_batch, seq_len + 1] of this rank."""
        self.micro_steps, self.scale = len(tokens) * self.ranks.world_size, scale
        self.weight.fill_(scale / self.micro_steps)
        self.loss_sum.zero_()
        self.timer.start()
        with self.rounded:
            for i, micro_batch in enumerate(tokens, start=1):
                (self.graph or self._micro_step)(micro_batch, last=i == len(tokens))
        if self.graph:
            self.timer.lap()

    def _micro_step(self, tokens: Tensor, last: bool) -> None:
        self.gradients.set_sync(last)
        loss = self.model(tokens[:, :-1], tokens[:, 1:])
        if last:
            self.timer.lap()  # from here on ranks wait for each other
        loss.backward(self.weight)
        self.gradients.accumulate(last)
        self.loss_sum += loss.detach()

    def update(self, lr: float) -> Tensor:
        """Clip the global norm of the gradients to 1 and update, unless loss or norm is not finite.

        Returns [2] float64: the mean loss of the batch in nats, and the norm of its gradients before clipping.
        """
        sums = self.ranks.all_reduce(torch.stack((self.loss_sum, self.gradients.squared_norm())))
        loss, norm = sums[0] / self.micro_steps, sums[1].sqrt() / self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # By these two, which are GradScaler's way in, fused AdamW divides gradients as it reads them, and does nothing.
        self.optimizer.grad_scale = (self.scale * (norm + 1e-6).clamp(min=1)).float()
        self.optimizer.found_inf = (loss + norm).isfinite().logical_not().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        return torch.stack((loss, norm))

    def compute_seconds(self) -> float:
        """From the start of the step until ranks have to wait for each other. To be asked after loss and norm."""
        return self.timer.seconds()[0]


class RoundedWeights:
    """The weights of products, rounded to half precision once a step. Inside `with` they stand in for the float32 ones.

    To round a weight wherever it is used would read and write it once more a micro-step. Gradients of the rounded
    weights are added to .grad of the others in float32. (On several ranks FSDP does all this.)
    """

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype | None):
        self.places = [  # (projection, its weight, the rounded weight)
            (projection, weight, rounded_copy(weight, dtype))
            for module in modules
            for projection in module.children()
            if (weight := projection.weight).dim() == 2 and weight.dtype != (dtype or weight.dtype)
        ]

    def __enter__(self) -> None:
        with torch.no_grad():
            for projection, weight, rounded in self.places:
                projection.weight = rounded.copy_(weight)

    def __exit__(self, *exception) -> None:
        for projection, weight, _ in self.places:
            projection.weight = weight


def rounded_copy(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter for the values of another one in `dtype`, whose gradient is added to the gradient of that one."""

    def add(rounded: nn.Parameter) -> None:
        if weight.grad is None:
            weight.grad = rounded.grad.to(weight.dtype)
        else:
            weight.grad += rounded.grad
        rounded.grad = None

    rounded = nn.Parameter(torch.empty_like(weight, dtype=dtype))
    rounded.register_post_accumulate_grad_hook(add)
    return rounded


class MicroStepGraph:
    """A micro-step as one CUDA graph: its hundreds of kernels are queued at once.

    The first two run as they are, so that everything is compiled and has been used, and leave gradients. The graph adds
    to them, where they lie: from then on they must be set to zero, never to None.
    """

    def __init__(self, micro_step: Callable[[Tensor, bool], None]):
        self.micro_step, self.graph, self.before = micro_step, torch.cuda.CUDAGraph(), 2
        self.stream = torch.cuda.Stream()  # of the first two as well: autograd wants one for all
        self.tokens: Tensor | None = None  # where the graph finds its tokens

    def __call__(self, tokens: Tensor, last: bool) -> None:
        if self.before:
            self.before -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.micro_step(tokens, last)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.tokens is None:
            self.tokens = tokens.clone()
            # thread_local: other threads, which read data or save, may allocate meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.micro_step(self.tokens, last=False)
        self.tokens.copy_(tokens)
        self.graph.replay()


# The rules of an update, as Pythia's


def learning_rate(updates: int, steps: int, peak: float, schedule: str) -> float:
    """Learning rate of the update that follows `updates` successful ones.

    Linear warm-up over 1% of the steps, then a cosine down to a tenth of the peak. Published (GPT-NeoX v1.0): the
    cosine's half period is *all* steps and it aims at zero, so the floor is reached after 80.5% of the run. Textbook
    (GPT-NeoX since #1008, August 2023): the half period is what follows the warm-up, and it aims at the floor.
    """
    warmup, floor = steps / 100, peak / 10
    if updates <= warmup:
        return peak * updates / warmup  # the first update has rate 0: step1 equals step0
    if schedule == "published":
        done = min(updates, steps - warmup) - warmup
        return max(peak / 2 * (1 + math.cos(math.pi * done / steps)), floor)
    done = min(updates - warmup, steps - warmup)
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * done / (steps - warmup)))


class LossScaler:
    """The dynamic loss scale of DeepSpeed, as Pythia ran it: float16 gradients are kept from vanishing.

    A first overflow only uses up the hysteresis, further ones halve the scale (never below 1); 1000 steps without one
    double it and refill the hysteresis.
    """

    def __init__(self, scale: float = 2.0**12, window: int = 1000, hysteresis: int = 2):
        self.scale, self.window, self.full = scale, window, hysteresis
        self.hysteresis, self.clean_steps, self.overflows = hysteresis, 0, 0

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.hysteresis == 1:
                self.scale = max(self.scale / 2, 1.0)
            else:
                self.hysteresis -= 1
            self.clean_steps, self.overflows = 0, self.overflows + 1
            return
        self.clean_steps, self.overflows = self.clean_steps + 1, 0
        if self.clean_steps % self.window == 0:
            self.scale, self.hysteresis = 2 * self.scale, self.full
