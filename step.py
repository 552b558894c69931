"""The rules of an update, and one optimizer step of a rank. train.py repeats it; bench/step.py measures it.

    trainer.forward_backward(tokens)     every micro-batch; gradients are accumulated in float32
    trainer.update(lr)                   gradient norm, clipping, AdamW

The host only queues work for the device and never waits in here (in a step of many seconds it does, so that one can
stop it). The device itself decides how much to clip, and skips the update if a gradient is not finite. The caller waits
once a step, when it reads loss and grad_norm.
"""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kernels.backend import triton_runs
from model import Pythia
from parallel.gradients import Gradients
from runtime.ranks import Dist
from runtime.timing import StepTimer

GRAPH_BELOW = 200_000_000  # parameters; in smaller models the GPU finishes a kernel before the host queues the next one

# ---- the rules of an update ------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with Pythia's constants. Biases and LayerNorms (the one-dimensional parameters) have no weight decay."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(updates: int, steps: int, peak: float, schedule: str) -> float:
    """Learning rate of the update that follows `updates` successful updates in a run of `steps` steps.

    Linear warm-up over 1% of the steps, then a cosine down to peak / 10. "published" (GPT-NeoX v1.0): the half period
    of the cosine is *all* steps, and the cosine goes down to zero, so that it meets the floor after 80.5% of the run.
    "cosine" (textbook; GPT-NeoX since #1008, August 2023): the half period is the steps after the warm-up, and the
    cosine goes down to the floor.
    """
    warmup, floor = steps / 100, peak / 10
    if updates <= warmup:
        return peak * updates / warmup  # the first update has learning rate 0: step1 equals step0
    if schedule == "published":
        done = min(updates, steps - warmup) - warmup
        return max(peak / 2 * (1 + math.cos(math.pi * done / steps)), floor)
    done = min(updates - warmup, steps - warmup)
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * done / (steps - warmup)))


class LossScaler:
    """DeepSpeed's dynamic loss scale, as in Pythia's training. It keeps small float16 gradients from becoming zero.

    The first overflow only uses up the hysteresis. Further overflows halve the scale (never below 1). 1000 steps
    without an overflow double the scale and restore the hysteresis.
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


# ---- the step --------------------------------------------------------------------------------------------------------


class Step:
    """The optimizer step of a model. `gradients` accumulates over micro-steps and ranks.

    can_have_weights: some steps have loss weights, so none runs as a CUDA graph, which always does the same.
    """

    def __init__(
        self,
        model: Pythia,
        gradients: Gradients,
        optimizer: torch.optim.AdamW,
        dist: Dist,
        can_have_weights: bool = False,
    ):
        self.model, self.gradients, self.optimizer, self.dist = model, gradients, optimizer, dist
        # By default cuBLAS may add the partial sums of a product in 16 bits. Weight gradients sum over all tokens.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        sharded, small = isinstance(model, FSDPModule), model.config.parameters < GRAPH_BELOW
        self.cast_weights = CastWeights([] if sharded else list(model.blocks), model.compute_dtype)
        # The reference of the loss reads a value from the device, which a CUDA graph cannot do.
        kernels = triton_runs(torch.empty(0, dtype=model.compute_dtype, device=dist.device))
        use_graph = dist.device.type == "cuda" and kernels and small and not sharded and not can_have_weights
        self.graph = MicroStepGraph(self._micro_step) if use_graph else None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=dist.device)
        self.weight = torch.ones((), device=dist.device)  # of one micro-batch in the loss of the step
        self.micro_row_losses = torch.empty(0)  # [micro_batch], on the device: of the last micro-step
        self.step_row_losses = torch.empty(0)  # [micro_steps, micro_batch], on the device
        self.row_losses = torch.empty(0)  # the same on the CPU
        self.timer = StepTimer(dist.device)
        self.ends: deque[torch.cuda.Event] = deque()  # of the last two micro-steps, in long steps on a GPU

    def forward_backward(
        self,
        tokens: Tensor,
        loss_scale: float = 1.0,
        go_on: Callable[[int, int], bool] | None = None,
        weights: Tensor | None = None,
    ) -> bool:
        """Accumulate loss and gradients (times loss_scale) of tokens [micro_steps, micro_batch, seq_len + 1].

        row_losses, [micro_steps, micro_batch] float32 on the CPU, gets the mean loss of every row in nats. A GPU has
        written it when the result of update can be read.

        weights [micro_steps, micro_batch, seq_len] multiply the losses of the targets, for the gradients only: the loss
        that update returns, and row_losses, stay what the model makes of the rows.

        go_on(micro-steps done, micro-steps) is called between two micro-steps of a long step; all ranks must get the
        same answer. False drops the step: weights and moments are as before it, no other step may follow, and the
        result is False. Otherwise the result is True.
        """
        self.micro_steps, self.loss_scale = len(tokens) * self.dist.world_size, loss_scale
        self.weight.fill_(loss_scale / self.micro_steps)
        self.loss_sum.zero_()
        self._allocate_row_losses(tokens.shape[:2])
        self.timer.start()
        with self.cast_weights:
            for i, micro_batch in enumerate(tokens, start=1):
                extra = () if weights is None else (weights[i - 1],)
                (self.graph or self._micro_step)(micro_batch, i == len(tokens), *extra)
                self.step_row_losses[i - 1].copy_(self.micro_row_losses)
                if go_on and i < len(tokens):
                    self._limit_lead()
                    if not go_on(i, len(tokens)):
                        self._drop()
                        return False
        if self.graph:
            self.timer.lap()
        self.row_losses.copy_(self.step_row_losses, non_blocking=True)
        return True

    def _allocate_row_losses(self, shape: torch.Size) -> None:
        """Allocate the memory of the row losses, once. A GPU copies to page-locked memory without a host sync."""
        if self.row_losses.shape != shape:
            self.step_row_losses = torch.empty(shape, device=self.loss_sum.device)
            self.row_losses = torch.empty(shape, pin_memory=self.loss_sum.is_cuda)

    def _micro_step(self, tokens: Tensor, last: bool, weights: Tensor | None = None) -> None:
        """tokens [micro_batch, seq_len + 1], weights [micro_batch, seq_len]."""
        self.gradients.set_sync(last)
        # losses: [micro_batch, seq_len]
        loss, losses = self.model(tokens[:, :-1], tokens[:, 1:], "both", None, weights)
        self.micro_row_losses = losses.mean(dim=1)
        if last:
            self.timer.lap()  # from here on ranks wait for each other
        loss.backward(self.weight)
        self.gradients.accumulate(last)
        self.loss_sum += loss.detach() if weights is None else losses.mean()

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """What the model makes of tokens [texts, seq + 1], in nats: float32 [texts, seq]. On all ranks together; the
        training goes on as without. Compiled blocks run uncompiled: for other shapes they would be compiled again, also
        for the training."""
        with self.cast_weights, torch.compiler.set_stance("force_eager"):
            return self.model(tokens[:, :-1], tokens[:, 1:], "none").float()

    def _limit_lead(self) -> None:
        """Let the host queue at most two micro-steps ahead of a GPU: these cannot be taken back, and they are enough to
        keep the GPU busy."""
        if self.dist.device.type == "cuda":
            self.ends.append(torch.cuda.Event())
            self.ends[-1].record()
            if len(self.ends) > 2:
                self.ends.popleft().synchronize()

    def _drop(self) -> None:
        """Forget the gradients of an unfinished step. (FSDP2 may hold more of them, so no other step may follow.)"""
        self.gradients.sums.clear()
        self.optimizer.zero_grad(set_to_none=self.graph is None)

    def update(self, lr: float) -> Tensor:
        """Clip the global gradient norm to 1 and update the weights, unless loss or norm is not finite.

        Returns [2] float64 on the device: the mean loss of the batch in nats, and the gradient norm before clipping.
        """
        sums = self.dist.all_reduce(torch.stack((self.loss_sum, self.gradients.squared_norm())))
        loss, grad_norm = sums[0] / self.micro_steps, sums[1].sqrt() / self.loss_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Fused AdamW reads these GradScaler hooks: it divides by grad_scale, and skips the update if found_inf is 1.
        self.optimizer.grad_scale = (self.loss_scale * (grad_norm + 1e-6).clamp(min=1)).float()
        self.optimizer.found_inf = (loss + grad_norm).isfinite().logical_not().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        return torch.stack((loss, grad_norm))

    def compute_seconds(self) -> float:
        """Seconds from the start of the step until ranks wait for each other. Call it after reading loss and norm."""
        return self.timer.seconds()[0]


class CastWeights:
    """Half-precision copies of the weights of all matmuls, cast once a step. `with` puts them in place of the weights.

    A cast at every use would read and write each weight once more in every micro-step. The gradient of a copy is
    added to .grad of its float32 weight. (On several ranks FSDP does all this.)
    """

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype | None):
        self.casts = [  # (projection, its weight, the copy)
            (projection, weight, half_precision_copy(weight, dtype))
            for module in modules
            for projection in module.children()
            if (weight := projection.weight).dim() == 2 and weight.dtype != (dtype or weight.dtype)
        ]

    def __enter__(self) -> None:
        with torch.no_grad():
            for projection, weight, copy in self.casts:
                projection.weight = copy.copy_(weight)

    def __exit__(self, *exception) -> None:
        for projection, weight, _ in self.casts:
            projection.weight = weight


def half_precision_copy(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """An empty parameter of the shape of `weight`. Its gradients are added to weight.grad."""

    def add_gradient(copy: nn.Parameter) -> None:
        if weight.grad is None:
            weight.grad = copy.grad.to(weight.dtype)
        else:
            weight.grad += copy.grad
        copy.grad = None

    copy = nn.Parameter(torch.empty_like(weight, dtype=dtype))
    copy.register_post_accumulate_grad_hook(add_gradient)
    return copy


class MicroStepGraph:
    """A micro-step as one CUDA graph, so that the host queues its hundreds of kernels with one call.

    The first two micro-steps run without a graph: they compile and warm up everything, and leave gradients. The graph
    adds to the gradients at these addresses: from then on they must be set to zero, never to None.
    """

    def __init__(self, micro_step: Callable[[Tensor, bool], None]):
        self.micro_step, self.graph, self.warm_ups = micro_step, torch.cuda.CUDAGraph(), 2
        self.stream = torch.cuda.Stream()  # of the first two as well: autograd wants one stream for all
        self.tokens: Tensor | None = None  # the graph reads its tokens here

    def __call__(self, tokens: Tensor, last: bool) -> None:
        if self.warm_ups:
            self.warm_ups -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.micro_step(tokens, last)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.tokens is None:
            self.tokens = tokens.clone()
            # thread_local: the threads that read data and save may allocate meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.micro_step(self.tokens, last=False)
        self.tokens.copy_(tokens)
        self.graph.replay()
