"""Frames between front and worker, over a real socket pair."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from multimodal_gen.engine.channel import ChannelClosed, WorkerChannel, pack
from multimodal_gen.messages import MAX_FRAME_BYTES, Cancel, Shutdown

pytestmark = [pytest.mark.unit]


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours, WorkerChannel(theirs)


def test_messages_arrive_whole_in_order_however_they_are_cut(pair):
    front, channel = pair
    frames = b"".join(pack(m) for m in (Cancel("a"), Cancel("b" * 70_000), Shutdown()))

    def drip() -> None:
        for start in range(0, len(frames), 9_001):
            front.sendall(frames[start : start + 9_001])

    thread = threading.Thread(target=drip)
    thread.start()
    got = []
    while len(got) < 3:
        got += channel.receive(wait=True)
    thread.join()
    assert got == [Cancel("a"), Cancel("b" * 70_000), Shutdown()]


def test_held_messages_leave_together_with_the_next_one(pair):
    front, channel = pair
    front.setblocking(False)
    channel.send(Cancel("a"), hold=True)
    with pytest.raises(BlockingIOError):
        front.recv(1)
    channel.send(Cancel("b"))
    assert front.recv(1000) == pack(Cancel("a")) + pack(Cancel("b"))
    channel.send(Shutdown(), hold=True)
    channel.flush()
    assert front.recv(1000) == pack(Shutdown())


def test_looking_without_waiting_returns_at_once(pair):
    _, channel = pair
    assert channel.receive(wait=False) == []


def test_the_end_of_the_front_is_seen(pair):
    front, channel = pair
    front.close()
    with pytest.raises(ChannelClosed):
        channel.receive(wait=True)
    with pytest.raises(ChannelClosed):
        channel.send(Shutdown())


def test_an_announced_giant_is_refused_before_it_is_read(pair):
    front, channel = pair
    front.sendall(struct.pack("<Q", MAX_FRAME_BYTES + 1))
    with pytest.raises(ChannelClosed, match="limit"):
        channel.receive(wait=True)


def test_a_thread_can_end_the_wait(pair):
    front, channel = pair
    thread = threading.Timer(0.05, channel.wake)
    thread.start()
    assert channel.receive(wait=True) == []
    thread.join()
    for _ in range(100_000):  # more than the pipe holds; whoever wakes must never block
        channel.wake()
    front.sendall(pack(Cancel("a")))
    got = channel.receive(wait=True) or channel.receive(wait=True)
    assert got == [Cancel("a")]
