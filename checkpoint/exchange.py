"""What the ranks of a group tell each other: all of them rank 0, and rank 0 all of them.

    gather(message)       rank 0 gets a list of all ranks' messages, by rank; every other rank None
    broadcast(message)    every rank gets the message of rank 0
    star(timeout)         a process group for both, apart from training's

A rank sends a message of its own and hears one, however many ranks there are; rank 0 alone has as
many as there are ranks. Messages are bytes and travel compressed. Most are short: what does not fit
into the first kilobyte follows alone, to rank 0 one rank after another. So rank 0 never pads all
messages to the length of the longest.
"""

import os
import sys
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist

HEAD = 1024  # bytes of a message that travel at once
LENGTH = 8  # bytes in front of them, with the length of the message


def world_of(group) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank_in(group) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def star(timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group of all ranks in which rank 0 is connected to all, and others to few.

    All ranks call. gloo connects each rank to every other one: n sockets a rank, and 2n + 1
    messages to the store. Told to be lazy it connects two ranks when they first have a message:
    gather() takes each rank one connection, to rank 0, and broadcast() at most log2(n) more, 2
    messages to the store each. Only Linux's TCP can be lazy.
    """
    lazy = "TORCH_GLOO_LAZY_INIT"  # read when a group is made; what a user sets stays
    set_by_user = {lazy, "GLOO_DEVICE_TRANSPORT"} & os.environ.keys()
    is_lazy = sys.platform == "linux" and not set_by_user
    if is_lazy:
        os.environ[lazy] = "1"
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    finally:
        if is_lazy:
            del os.environ[lazy]
    # Connect now, while all are there. A connected rank that dies is noticed at once; who waits for
    # a first connection with a dead one waits until the timeout.
    token = torch.zeros(1)
    tokens = [torch.zeros(1) for _ in range(world_of(group))] if rank_in(group) == 0 else None
    dist.gather(token, tokens, group=group, group_dst=0)
    dist.broadcast(token, group=group, group_src=0)
    return group


def gather(message: bytes, group) -> list[bytes] | None:
    """On rank 0 of the group (None: of all ranks) the message of each rank; elsewhere None."""
    world = world_of(group)
    if world == 1:
        return [message]
    packed = zlib.compress(message, 1)
    head = head_of(packed).to(device_of(group))
    if rank_in(group) > 0:
        dist.gather(head, group=group, group_dst=0)
        if len(packed) > HEAD:
            dist.send(as_tensor(packed[HEAD:]).to(head.device), group=group, group_dst=0)
        return None

    heads = [torch.empty_like(head) for _ in range(world)]
    dist.gather(head, heads, group=group, group_dst=0)
    messages = [message]
    for rank in range(1, world):
        size, begin = parts_of(heads[rank])
        if size > HEAD:
            rest = torch.empty(size - HEAD, dtype=torch.uint8, device=head.device)
            dist.recv(rest, group=group, group_src=rank)
            begin += as_bytes(rest)
        messages.append(zlib.decompress(begin))
    return messages


def broadcast(message: bytes | None, group) -> bytes:
    """The message of rank 0 of the group; other ranks give None."""
    if world_of(group) == 1:
        return message
    is_root = rank_in(group) == 0
    packed = zlib.compress(message, 1) if is_root else b""
    head = head_of(packed).to(device_of(group))
    dist.broadcast(head, group=group, group_src=0)
    size, begin = parts_of(head)
    if size > HEAD:
        rest = torch.empty(size - HEAD, dtype=torch.uint8, device=head.device)
        if is_root:
            rest.copy_(as_tensor(packed[HEAD:]))
        dist.broadcast(rest, group=group, group_src=0)
        begin += as_bytes(rest)
    return message if is_root else zlib.decompress(begin)


def device_of(group) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def head_of(packed: bytes) -> torch.Tensor:
    """The length of a message and its beginning: the same size for every message."""
    head = len(packed).to_bytes(LENGTH, "little") + packed[:HEAD]
    return as_tensor(head.ljust(LENGTH + HEAD, b"\0"))


def parts_of(head: torch.Tensor) -> tuple[int, bytes]:
    """The length of a message, and its beginning."""
    data = as_bytes(head)
    size = int.from_bytes(data[:LENGTH], "little")
    return size, data[LENGTH:][: min(size, HEAD)]


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_bytes(data: torch.Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
