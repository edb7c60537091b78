"""The worker's side of the pool: answers messages, one at a time, until its pipe ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client import lazy
from simulations.segments import Lease, Segment, Segments, Source, pack, unpack


class Order(NamedTuple):
    """What goes before the content of a message: which segments it uses, by number, and which are gone."""

    metadata: Any
    context: Context
    content: int  # 0: none
    size: int  # bytes of arrays in it
    reply: int  # where the reply's arrays may be put; 0: nowhere
    news: tuple[int, ...]  # segments whose descriptors follow
    gone: tuple[int, ...]


def load(app: ClientApp | str) -> ClientApp:
    """A ClientApp, or the one of this name, ``module:attribute``."""
    if not isinstance(app, str):
        return app
    module, _, name = app.partition(":")
    loaded: ClientApp = getattr(importlib.import_module(module), name)
    return loaded


def work(
    pipe: Connection,
    inherited: Iterable[Connection],
    segments: Segments | None,
    app: ClientApp | str,
    threads: int,
    device: str,
) -> None:
    """Answer messages until the pipe ends.

    ``inherited`` and ``segments`` are the parent's, as far as a fork brought them along; ``device`` is where this
    worker computes if the job leaves it open, "" for no choice.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us by the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:  # the parent's ends: held open here, a dead parent would never be noticed
        other.close()
    if segments is not None:
        segments.forget()
    use_device(device)
    torch.set_num_threads(threads)
    keep_memory()
    open_many_files()
    lazy.install()
    client_app, known = load(app), dict[int, Segment]()
    gc.freeze()  # what is imported stays, and need not be looked at again
    with contextlib.suppress(EOFError, OSError):
        while True:
            order: Order = pipe.recv()
            for number in order.news:
                known[number] = Segment(number, recv_handle(pipe))
            for number in order.gone:
                del known[number]  # it is closed when no message that was kept refers to it
            answer(pipe, order, known, client_app)


def answer(pipe: Connection, order: Order, known: dict[int, Segment], app: ClientApp) -> None:
    """Take the rest of one message, run the app, send its reply and the node's state after it."""
    source = Source(Lease(known[order.content]), order.size) if order.content else None
    content = unpack(pipe.recv_bytes(), source)
    message = Message(content, metadata=order.metadata)  # type: ignore[call-overload]
    reply = call(app, message, order.context)
    target = known[order.reply] if order.reply else None
    body, size = pack((reply, order.context.state), target)
    held = source.held() if source is not None else None
    del source, content, message, reply
    give_back()
    pipe.send((size, held is not None and held()))
    pipe.send_bytes(body)


def give_back() -> None:
    """Hand the GPU's memory that is not in use back: another worker may be on it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


def call(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply; an error without its text if it raises: that stays in the site's own log."""
    try:
        return app(message, context)
    except Exception as error:
        home = context.node_config.get("home")
        if home:
            Path(str(home)).mkdir(parents=True, exist_ok=True)
            with (Path(str(home)) / "site.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(traceback.format_exc())
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)


def use_device(device: str) -> None:
    """Where this process computes if the job says ``auto`` or ``cuda``; must come before CUDA is used."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device:
        torch.cuda.set_device(torch.device(device))


def open_many_files() -> None:
    """Let this process open as many files as the system allows: each mapped column of a site's images is one, and there
    may be hundreds of simulated sites. The usual limit, 1,024, is for programs that cannot count further."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step instead of handing every large block back.

    Getting fresh pages for the same tensors again and again is a sixth of the time of a U-Net's step on a CPU.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt  # the parameters' numbers are those of <malloc.h>
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**27)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)
