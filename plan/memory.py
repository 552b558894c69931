"""Memory of a run, computed from the table of sizes before anything is allocated, and the choice of --shard by it.

The formulas count tensors. tests/plan/test_memory.py compares them with the tensors that are alive during the steps of
a model on 1 to 16 ranks, and with the memory of processes. With --document-mask torch's own attention (--kernels torch,
and float32 on GPUs) saves a mask [micro_batch, seq_len, seq_len] in every layer, which they leave out.
"""

from dataclasses import dataclass, replace
from itertools import product

from kernels.cross_entropy import triton_chunk
from model import Config

USABLE = 0.92  # share of a GPU's memory that a run may fill: CUDA, NCCL's buffers and fragmentation need the rest
GPUS_PER_NODE = 8

# By --recompute: number of tensors [tokens, hidden] that a layer saves for its backward pass, and computes again in it.
#   none    saves the residual sum, its two norms, q, k, v, attention, and 4 + 4 before and after GELU
#   cheap   saves the residual sum and the outputs of matmuls and attention
#   full    saves the three inputs of the layer: residual, attention and MLP of the layer before
SAVED_ACTIVATIONS = {"none": 15, "cheap": 11, "full": 3}
RECOMPUTED_ACTIVATIONS = {"none": 0, "cheap": 7, "full": 12}

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

# Ways to shard, (--shard, whole gradients), with the least traffic between ranks first.
SHARDINGS = (
    ("grad", True),  # one all_gather of weights and one reduce_scatter of gradients per step
    ("none", True),  # one all_reduce of float32 gradients per step: more bytes than all_gather and reduce_scatter
    ("grad", False),  # gradients travel after every micro-step
    ("hybrid", True),  # weights travel twice per micro-step, but stay inside a node
    ("hybrid", False),  # and gradients after every micro-step
    ("full", True),  # weights travel twice per micro-step, between nodes too
    ("full", False),  # and gradients after every micro-step
)


@dataclass(frozen=True)
class Job:
    """The numbers of a run that decide its memory and time. `dataclasses.replace` makes variants.

    A job may leave open micro_batch (0), recompute and shard ("auto"): `variants` lists what they can be. Memory and
    time are those of a job that leaves nothing open.
    """

    config: Config
    batch: int  # rows of an optimizer step, over all ranks
    micro_batch: int  # rows of one forward and backward pass of a rank
    seq_len: int
    precision: str  # bf16, fp16 or fp32
    recompute: str = "none"
    shard: str = "none"
    world_size: int = 1
    local_world_size: int = GPUS_PER_NODE
    whole_gradients: bool = True  # kept on every rank and reduced once a step; False: in parts, after every micro-step
    bitwise: bool = False

    @property
    def micro_steps(self) -> int:
        return self.batch // (self.world_size * self.micro_batch)

    @property
    def width(self) -> int:
        """Bytes of one activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def parts(self) -> int:
        """Number of ranks that divide weights, gradients and moments among them."""
        return {"none": 1, "hybrid": min(self.local_world_size, self.world_size)}.get(self.shard, self.world_size)

    @property
    def flags(self) -> str:
        return f"--shard {self.shard} --recompute {self.recompute} --micro-batch {self.micro_batch}"

    @property
    def fsdp(self) -> bool:
        return self.world_size > 1 or self.bitwise

    @property
    def gathers_again(self) -> bool:
        """FSDP2 frees the gathered weights of a layer after its forward pass and gathers them for the backward pass."""
        return self.shard in ("full", "hybrid")

    @property
    def root(self) -> int:
        """Embedding, unembedding and final norm: FSDP2's root group."""
        return self.config.parameters - self.config.layers * self.config.layer_parameters


def memory(job: Job) -> dict[str, float]:
    """Bytes of a rank at the peak of a step, by what they hold. An allocator needs a few percent more."""
    layers, layer, root, width = job.config.layers, job.config.layer_parameters, job.root, job.width
    fsdp, accumulates, whole = job.fsdp, job.micro_steps > 1, job.whole_gradients
    own = 4 * job.config.parameters / job.parts  # float32 weights of a rank; gradients take as much, moments twice
    saved = SAVED_ACTIVATIONS[job.recompute] * job.micro_batch * job.seq_len * job.config.hidden * width  # by a layer
    in_loss, in_layer, in_embedding = _temporaries(job, saved)

    # Weights in the dtype of matmuls. FSDP2 copies even float32 weights, and gathers the next layer in advance.
    if fsdp:
        cast = width * (root + 2 * layer if job.gathers_again else job.config.parameters)
    else:
        cast = 0 if width == 4 else width * layer * layers
    stay_cast = not fsdp or (accumulates and not whole and not job.gathers_again)  # until the next micro-step
    cast_at_end = cast if stay_cast else min(cast, width * (root + layer))

    # Gradients at the start of the last backward pass, and when it reaches the first layer.
    before = (own if fsdp and not whole else 4 * job.config.parameters) if accumulates else 0
    nearly_all = own - 4 * (layer + root) / job.parts
    sums = 0
    if job.bitwise:  # sums that wait in the tree; the micro-step has its own gradients
        before, sums = 0, own * (job.micro_steps.bit_length() - 1)
    if fsdp and accumulates and whole:
        nearly_all += 4 * (layer + root)  # these are not reduced yet

    moments = (  # gradients, cast weights, activations, temporary tensors
        (before + sums, cast, layers * saved, in_loss),
        (before + sums, cast, layers * saved, in_layer),  # backward pass of the last layer
        (nearly_all + sums, cast_at_end, saved, in_layer),  # of the first layer
        (own + sums, cast if stay_cast else 0, 0, in_embedding),
    )
    names = "gradients", "weights cast for matmuls", "activations", "temporary tensors at the peak"
    return {"weights (fp32)": own, "Adam moments (fp32)": 2 * own} | dict(zip(names, max(moments, key=sum)))


def _temporaries(job: Job, saved: int) -> tuple[float, float, float]:
    """Bytes that live only in the loss, in the backward pass of a layer, which frees `saved`, and of the embedding."""
    width, layer, table = job.width, job.config.layer_parameters, job.config.vocab * job.config.hidden
    tokens, fsdp, accumulates = job.micro_batch * job.seq_len, job.fsdp, job.micro_steps > 1
    activation = tokens * job.config.hidden * width  # a tensor [tokens, hidden]

    # Forward: a chunk of logits; the unembedding in 16 bits and its float32 gradient; the three outputs of the last
    # layer, their norm, its gradient; FSDP2's buffer of the last layer. Backward: gradients and their scaled copies.
    forward = min(tokens, triton_chunk(job.config.hidden)) * job.config.vocab * width + 6 * table + 5 * activation
    forward += width * layer if fsdp and not job.gathers_again else 0
    in_loss = max(forward, 8 * table + 3 * activation)

    # In a layer: 5 gradients [tokens, hidden] around GELU, and the gradient of the largest weight, a third of a layer.
    in_layer = (5 + RECOMPUTED_ACTIVATIONS[job.recompute]) * activation + width * layer / 3
    if fsdp:
        # Meanwhile FSDP2 reduces the float32 gradients of the layer before. When a layer ends, it has their gradients
        # as computed, in float32 to send, and as received (with one part: all of them, and a third buffer to average).
        # The gradient of the unembedding waits until the end.
        # --bitwise receives the parts of all ranks, and adds pairs of them: half as much again.
        tree = 6 if job.bitwise else 0
        received = 4 * layer / job.parts + (4 * layer if job.parts == 1 else 0) + tree * layer
        at_end = width * layer + 4 * layer + received + 2 * activation - saved
        in_layer = max(in_layer + max(0, 4 * layer - saved), at_end) + width * table
        in_embedding = (8 if job.parts == 1 or (accumulates and job.whole_gradients) else 4 + width) * job.root
        in_embedding += tree * job.root
    else:  # gradients are cast to float32, then added to those of earlier micro-steps
        in_layer += (0 if width == 4 else 4 * layer / 3) + (0 if accumulates else 4 * table)
        in_embedding = (4 * table if accumulates else 0) + 2 * activation
    return in_loss, in_layer, in_embedding


def total_memory(job: Job) -> float:
    return sum(memory(job).values())


def fits(job: Job, gpu_memory: float) -> bool:
    return total_memory(job) <= USABLE * gpu_memory


def snapshot_memory(job: Job) -> float:
    """Bytes of host memory of a rank while a checkpoint is written: its share of weights and moments."""
    return 12 * job.config.parameters / job.world_size


def shardings(job: Job, shards: tuple[str, ...] = ()) -> list[Job]:
    """The ways to shard a job, in the order of SHARDINGS, of these values of --shard. Default: of all that differ."""
    if not shards:  # one rank has nothing to divide, and one node is the same as all
        hybrid = ("hybrid",) if job.world_size > job.local_world_size else ()
        shards = ("grad", "none", *hybrid, "full") if job.world_size > 1 else ("none",)
    kinds = (True,) if job.micro_steps == 1 else (False,) if job.bitwise else (True, False)
    ways = [(shard, whole) for shard, whole in SHARDINGS if shard in shards and whole in kinds]
    return [replace(job, shard=shard, whole_gradients=whole) for shard, whole in ways]


def variants(job: Job) -> list[Job]:
    """The jobs that a job can become which leaves open micro_batch (0), recompute or shard ("auto").

    With --bitwise ranks must divide the weights, and the micro-batch must also do on 8 ranks.
    """
    recomputes = RECOMPUTED_ACTIVATIONS if job.recompute == "auto" else (job.recompute,)
    rank_rows = max(job.batch // (max(job.world_size, 8) if job.bitwise else job.world_size), 1)
    micro_batches = (job.micro_batch,) if job.micro_batch else [n for n in MICRO_BATCHES if rank_rows % n == 0]
    shards = (job.shard,) if job.shard != "auto" else ("grad", "full") if job.bitwise else ()
    every = [replace(job, recompute=recompute, micro_batch=n) for recompute, n in product(recomputes, micro_batches)]
    return [variant for job in every for variant in shardings(job, shards)]


def choose_shard(job: Job, gpu_memory: float, shards: tuple[str, ...] = ()) -> Job:
    """The job with the first of its shardings that fits a GPU of so many bytes, else with that of the least memory."""
    variants = shardings(job, shards)
    return next((job for job in variants if fits(job, gpu_memory)), min(variants, key=total_memory))
