"""What one way to run a job comes to: memory, step time, utilisation, duration. One definition of MFU and HFU."""

from dataclasses import dataclass

from engine.model_flops import teachers_flops
from models.config import ModelConfig
from models.tensors.flops import TRAINING_FORWARDS, vision_forward_flops
from tools.cost.cluster import Cluster, decoding_nodes
from tools.cost.counts import below_executed_flops, executed_flops, training_flops, vision_executed_flops
from tools.cost.layout import Layout, frozen_in, stages_of
from tools.cost.memory import Memory, peak_memory
from tools.cost.time import StepTime, step_time
from tools.cost.work import spared_in_pass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate of one layout, or of ZeRO-3."""

    name: str
    """For people."""
    memory: Memory
    time: StepTime
    cluster: Cluster
    global_batch: int
    model_flops: float
    """FLOPs of a pair: 3 forwards."""
    executed_flops: float
    """FLOPs of a pair, replays counted."""
    images_per_node_s: float
    """Images that the CPUs of a decoding node must deliver."""
    layout: Layout | None = None
    """None for ZeRO-3."""

    @property
    def fits(self) -> bool:
        """Into what the profile calls usable."""
        return self.memory.total <= self.cluster.hardware.usable_bytes

    @property
    def samples_s(self) -> float:
        """Pairs a second over all GPUs."""
        return self.global_batch / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs x samples/s / (GPUs x bf16 peak)."""
        return self._utilisation(self.model_flops)

    @property
    def hfu(self) -> float:
        """The same with executed FLOPs."""
        return self._utilisation(self.executed_flops)

    def _utilisation(self, flops: float) -> float:
        return flops * self.samples_s / (self.cluster.gpus * self.cluster.hardware.bf16_flops)

    def days(self, samples: float) -> float:
        """To train on that many pairs."""
        return samples / self.samples_s / 86400

    def gpu_hours(self, samples: float) -> float:
        """The same in GPU-hours."""
        return 24 * self.days(samples) * self.cluster.gpus


def estimate(model: ModelConfig, layout: Layout, cluster: Cluster) -> Estimate:
    """Estimate of a layout that divides."""
    return priced(model, layout, cluster, peak_memory(model, layout))


def priced(model: ModelConfig, layout: Layout, cluster: Cluster, memory: Memory) -> Estimate:
    """The same where its memory is known already."""
    time = step_time(model, layout, cluster)
    taught = flops_of_teachers(model, layout)
    flops = run_flops(model, layout, TRAINING_FORWARDS + 1 - layout.keep / layout.micro_batches)
    if layout.recompute == "full":
        frozen, tokens = frozen_in(model, layout.freeze), model.vision.kept_tokens(layout.patch_dropout)
        flops += layout.frames * vision_executed_flops(model, tokens)
        flops -= below_executed_flops(model, frozen, tokens, layout.frames)[0]
    flops += taught - _spared_flops(model, layout) / layout.local_batch
    images = layout.global_batch * layout.frames
    return Estimate(
        name=str(layout),
        memory=memory,
        time=time,
        cluster=cluster,
        global_batch=layout.global_batch,
        model_flops=counted_flops(model, layout) + taught,
        executed_flops=flops,
        images_per_node_s=0 if layout.features else images / time.total / decoding_nodes(layout, cluster),
        layout=layout,
    )


def counted_flops(model: ModelConfig, layout: Layout) -> float:
    """Model FLOPs of a pair, teachers apart."""
    once = training_flops(model, layout.patch_dropout, layout.frames, frozen_in(model, layout.freeze))
    tokens = model.vision.kept_tokens(layout.patch_dropout)
    return once - (layout.frames * vision_forward_flops(model, tokens) if layout.features else 0)


def run_flops(model: ModelConfig, layout: Layout, forwards: float) -> float:
    """FLOPs of a pair in so many forwards' worth of what is trained, and one of what lies below it; teachers apart."""
    share, frozen = TRAINING_FORWARDS + 1 - forwards, frozen_in(model, layout.freeze)
    once = executed_flops(model, layout.patch_dropout, share, layout.frames, frozen)
    tokens = model.vision.kept_tokens(layout.patch_dropout)
    return once - (layout.frames * vision_executed_flops(model, tokens) if layout.features else 0)


def flops_of_teachers(model: ModelConfig, layout: Layout) -> float:
    """FLOPs of a pair in all teachers; model: the student's."""
    models = (one.model for one in layout.teachers)
    return teachers_flops(models, frames=layout.frames, context=model.text.context_length)


def _spared_flops(model: ModelConfig, layout: Layout) -> float:
    """FLOPs of a replica's images that no repeated pass multiplies, because their outputs were kept."""
    if not layout.keeps_outputs:
        return 0.0
    each = sum(spared_in_pass(model, layout, stage.above) for stage in stages_of(model, layout))
    return layout.tensor * each * layout.passes_kept
