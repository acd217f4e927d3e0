"""What a block does beside matrix products and attention: launches, and bytes read and written, counted.

No values, no time: one block of the engine's own tower, with the gradient buffers that it trains with, runs on tensors
without values, in bf16. A launch is an operator that is no view; its bytes are what it reads and what it writes, in
bytes a token and channel of the residual stream. A fused operator (models/blocks/fused) counts as one pass: what its
sums over rows read again is at most what `tests/models/test_fused_compiled.py` asserts. Weights' gradient sums, which
grow with the weights and not with the tokens, are counted apart, in bytes an element.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.read import preset_model
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from models.blocks.packed import PackedTokens
from models.blocks.rope import text_rope_tables
from models.config import ModelConfig
from models.towers.text import TextTower
from models.towers.vision import VisionTower
from tools.cli import command_parser
from tools.dryrun.absent import Absent

_EXAMPLES = (
    "python -m benchmarks.operators              # every preset of the paper, torch's kernels and fused ones",
    "python -m benchmarks.operators --models b16 --rows",
)
MODELS = ("18b", "8b", "e14-plus", "l14", "b16")
SAMPLES, DROPOUT = 4, 0.5
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_NO_LAUNCH = {"detach", "_unsafe_view", "_reshape_alias", "lift_fresh", "device", "is_same_size", "view", "_to_copy"}


@dataclass
class Counts:
    """One pass of one block."""

    launches: Counter[str] = field(default_factory=Counter)
    """product, attention or other -> operators."""
    other_bytes: int = 0
    """Read and written by the others, gradient sums left out."""
    sum_bytes: int = 0
    """Read and written to add weights' gradients to their sums, outside of products."""
    rows: Counter[str] = field(default_factory=Counter)
    """Other operator with the shapes it takes -> bytes."""


class _Counting(TorchDispatchMode):
    def __init__(self, weights: set[torch.Size]):
        super().__init__()
        self.counts, self.weights = Counts(), weights

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, answers = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs or {}), out)
        )
        unchanged = name == "_to_copy" and given[0].dtype == answers[0].dtype
        if func.is_view or name.startswith("empty") or (name in _NO_LAUNCH and (name != "_to_copy" or unchanged)):
            return out
        if not answers:
            return out
        if name in _PRODUCTS:
            self.counts.launches["product"] += 1
        elif "scaled_dot_product" in name:
            self.counts.launches["attention"] += 1
        else:
            self._book(func, name, given, answers)
        return out

    def _book(self, func: Any, name: str, given: list[Tensor], answers: list[Tensor]) -> None:
        # A tensor that is written in place is read as well, but for a copy's, a zero's or a fill's.
        read = given[1:] if name == "copy_" else [] if name in ("zero_", "fill_", "zeros_like") else given
        moved = sum(t.numel() * t.element_size() for t in (*read, *answers))
        if name == "add_" and given[0].shape in self.weights and given[0].dtype == torch.float32:
            self.counts.sum_bytes += moved
            self.counts.launches["sums"] += 1
            return
        self.counts.launches["other"] += 1
        self.counts.other_bytes += moved
        shapes = ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in given)
        self.counts.rows[f"{name}({shapes})"] += moved


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """Forward with a graph, and backward."""

    forward: Counts
    backward: Counts
    channels: int
    """Tokens x H."""
    elements: int
    """Of the block's weights."""

    def per_channel(self) -> tuple[float, float]:
        """Bytes a token and channel outside of products, attention and gradient sums."""
        return self.forward.other_bytes / self.channels, self.backward.other_bytes / self.channels


def count_block(model: ModelConfig, mesh: Mesh) -> BlockCounts:
    """Count a block in the middle of the model's image tower. mesh: of one rank."""
    model = replace(model, attention="sdpa" if model.attention == "auto" else model.attention)
    vision = model.vision
    tokens = vision.kept_tokens(DROPOUT)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Absent(fake):
        tower = VisionTower(model, groups=mesh.vision_groups(), layers=range(1, 2), dtype=torch.bfloat16)
        kept = torch.zeros(SAMPLES, tokens - vision.prefix_tokens, dtype=torch.int64)
        return _count_first(tower, tower._tokens(SAMPLES, kept, kept.device), vision.width, mesh)


def count_caption_block(model: ModelConfig, mesh: Mesh) -> BlockCounts:
    """The same of the model's caption tower, at whole captions."""
    text = replace(model.text, depth=2)  # the last one works for the pooled token alone
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Absent(fake):
        tower = TextTower(replace(model, text=text), groups=mesh.text_groups(), dtype=torch.bfloat16)
        device, length = torch.device("cpu"), text.context_length
        rope = text_rope_tables(length, text.width // text.heads, device) if text.rope else None
        return _count_first(tower, PackedTokens.of(SAMPLES, length, device, rope), text.width, mesh)


def _count_first(tower: VisionTower | TextTower, tokens: PackedTokens, width: int, mesh: Mesh) -> BlockCounts:
    """Count the first block of a tower."""
    how = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    buckets = DistributedDataParallel(tower.config, how, tower, pg_collection=mesh.vision_groups())
    block, rows = tower.block.layers[0], SAMPLES * tokens.tokens_per_sample
    x = torch.zeros(rows, 1, width, dtype=torch.bfloat16, requires_grad=True)
    weights = {p.shape for p in block.parameters() if p.dim() > 1}
    tower.divide(1)
    with _Counting(weights) as forward:
        y = tower._divided(x, tokens, "below")
    gradient = torch.zeros_like(y)
    with _Counting(weights) as backward:
        y.backward(gradient)
    del buckets  # its hooks add gradients for as long as somebody has it
    elements = sum(p.numel() for p in block.parameters())
    return BlockCounts(forward=forward.counts, backward=backward.counts, channels=rows * width, elements=elements)


def main() -> None:
    parser = command_parser("operators", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in models/presets")
    parser.add_argument("--rows", action="store_true", help="every operator with its bytes a token and channel")
    options = parser.parse_args()
    prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mesh = build_mesh(1, 1, dist.distributed_c10d._get_default_group())
    columns = f"{'products':>9}{'others':>8}{'B a token, channel':>20}{'sums, B an element':>20}"
    print(f"{'block':<18}{'kernels':<9}{'pass':<10}{columns}")
    for name, count in product(options.models, (count_block, count_caption_block)):
        block = name if count is count_block else f"{name}, text"
        for kernels in ("torch", "fused"):
            found = count(replace(preset_model(name), block_kernels=kernels), mesh)
            for which, counts in (("forward", found.forward), ("backward", found.backward)):
                products, others = counts.launches["product"], counts.launches["other"]
                sums, moved = counts.sum_bytes / found.elements, counts.other_bytes / found.channels
                print(f"{block:<18}{kernels:<9}{which:<10}{products:>9}{others:>8}{moved:>20.1f}{sums:>20.1f}")
                for row, size in counts.rows.most_common() if options.rows else ():
                    print(f"    {size / found.channels:8.2f} {row}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
