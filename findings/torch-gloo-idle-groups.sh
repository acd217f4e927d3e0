#!/usr/bin/env bash
# torch 2.13.0 (gloo).
# Guess: a process group that nobody uses costs memory, and no time. Behaviour: every gloo group has a device of its own, whose
# thread polls with a time-out of 10 ms for as long as the group lives: three threads a group, and a hundred idle groups of one
# process take a good tenth of a core. Eight ranks that try ten layouts of ten groups each keep a core busy with waiting.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6
seen=$(GLOO_SOCKET_IFNAME=lo PYTHONPATH="$PACKAGES" "$python" - 2>/dev/null <<'PY'
import os
import time

import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def measure():
    threads, cpu, wall = len(os.listdir("/proc/self/task")), time.process_time(), time.monotonic()
    time.sleep(3)
    return threads, (time.process_time() - cpu) / (time.monotonic() - wall)


few, idle = measure()
groups = [dist.new_group([0]) for _ in range(100)]
many, polling = measure()
grown = "more than 5 times the time of one" if polling > 5 * idle else f"{polling / idle:.1f} times the time of one"
print(f"100 further groups: {many - few} threads, {grown}")
PY
)
expect "torch 2.13.0" "100 further groups: 300 threads, more than 5 times the time of one" "$seen"
