"""The machine around the ranks: processors, memory, names and ports; shared memory and open files; devices.

Only what needs torch imports it, when it is called: the rest is of use where torch cannot be imported.
"""

import os
import platform
import resource
import shutil
import socket

from tools.doctor.rows import NOTE, WRONG, Row


def machine_rows() -> list[Row]:
    """What a bug report needs."""
    libc = " ".join(platform.libc_ver())
    cores = len(os.sched_getaffinity(0))
    return [
        Row("system", f"{platform.system()} {platform.release()}, {libc}, {platform.machine()}"),
        Row("processors", f"{cores} of {os.cpu_count()} for this process, load {os.getloadavg()[0]:.1f}"),
        Row("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"),
        _host_name(),
        _port(),
    ]


def limit_rows() -> list[Row]:
    """What may be too small for the readers of the data."""
    from engine.parallel import preflight

    return [_shared_memory(preflight.SHARED_MEMORY_GB), _open_files(preflight.OPEN_FILES)]


def _shared_memory(enough_gb: float) -> Row:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Row("shared memory", f"/dev/shm: {error.strerror}", WRONG, "mount a tmpfs there")
    text = f"/dev/shm: {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free"
    if usage.free / 1e9 < enough_gb:
        return Row("shared memory", text, NOTE, "docker run --shm-size=16g, or --ipc=host")
    return Row("shared memory", text)


def _open_files(enough: int) -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < enough:
        return Row("open files", f"{soft} (could be {hard})", NOTE, f"ulimit -n {min(hard, 65536)}")
    return Row("open files", str(soft))


def _host_name() -> Row:
    """torchrun and gloo look this name up unless an address or an interface is given."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        advice = "torchrun --local-addr 127.0.0.1 on one machine, GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME on several"
        return Row("host name", f"{name} does not resolve ({error})", NOTE, advice)
    return Row("host name", f"{name} is {address}")


def _port() -> Row:
    if "MASTER_PORT" in os.environ:
        return Row("rendezvous", f"{os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:{os.environ['MASTER_PORT']}")
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Row("ports", f"{server.getsockname()[1]} on 127.0.0.1 could be taken")
    except OSError as error:
        return Row("ports", f"none on 127.0.0.1: {error.strerror}", WRONG, "torchrun needs one for its rendezvous")


def device_rows() -> list[Row]:
    """The devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return [Row("devices", "no CUDA device: ranks compute on the CPU over gloo")]
    rows = []
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        text = f"{device.name}, {device.total_memory / 1e9:.1f} GB, capability {device.major}.{device.minor}"
        rows.append(Row(f"device {number}", text))
    return rows
