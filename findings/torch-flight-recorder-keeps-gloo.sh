#!/usr/bin/env bash
# torch 2.13.0 (gloo).
# Guess: the flight recorder is NCCL's, and a CPU job of gloo does not have it. Behaviour: gloo groups record, too, by default: each
# process keeps its last 2,000 collectives with their stacks, so its memory grows by a kilobyte or more a collective until
# the 2,000th and is flat from there on; a watch of memory that ends sooner sees a leak. TORCH_FR_BUFFER_SIZE=0 turns it off.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6
look() {
  GLOO_SOCKET_IFNAME=lo PYTHONPATH="$PACKAGES" "$python" - 2>/dev/null <<'PY'
import ctypes

import torch
import torch.distributed as dist


class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap


def in_use():
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
values = torch.zeros(4)


def growth(collectives):
    before = in_use()
    for _ in range(collectives):
        dist.all_reduce(values)
    return (in_use() - before) / collectives


growth(100)
first, _, later = growth(900), growth(1200), growth(1500)
words = ["grows" if each > 500 else "flat" if abs(each) < 50 else f"{each:.0f} B each" for each in (first, later)]
print(f"before the 2,000th {words[0]}, after it {words[1]}")
PY
}
expect "torch 2.13.0, as it comes" "before the 2,000th grows, after it flat" "$(look)"
expect "torch 2.13.0, TORCH_FR_BUFFER_SIZE=0" "before the 2,000th flat, after it flat" "$(TORCH_FR_BUFFER_SIZE=0 look)"
