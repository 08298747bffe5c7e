"""What interrupts a training loop: the clock that asks for a checkpoint, SIGTERM, Ctrl-C, and the launcher's end.

All processes must save the same step. So each says with the loss of a step what it wants, the sum goes to all, and
where one wants to stop or to save all do, after the same step. Before and after the loop there is nothing to save, and
a signal ends the process at once.

This module imports the standard library alone: a command calls `end_with_launcher` before the imports that take
seconds.
"""
import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time

SIGNALS = signal.SIGINT, signal.SIGTERM
AGAIN = 1.0  # seconds after which a Ctrl-C is another one: launchers pass the first on, so that it arrives twice
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def parse_every(text: str) -> tuple[float, int | None]:
    """'10min' -> (600.0, None), '5epochs' -> (inf, 5): seconds and epochs between checkpoints.

    Raises:
        ValueError: It is neither.
    """
    match = re.fullmatch(r'(\d+(?:\.\d+)?)min|(\d+)epochs?', text)
    amount = float(match[1] or match[2]) if match else 0.0
    if not 0 < amount < math.inf:
        raise ValueError(text)
    return (60 * amount, None) if match[1] else (math.inf, int(amount))


def end_with_launcher() -> None:
    """Let Ctrl-C end this process without a traceback, and the end of `accelerate launch` or torchrun end it too.

    A launcher that is killed leaves its processes running. One that was started from a shell without a launcher goes
    on without it, as any does.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as with nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if 'ACCELERATE_MIXED_PRECISION' not in os.environ and 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(process: int) -> None:
    """Wait until a process has ended, where the kernel does not tell, and give this one SIGTERM."""
    import psutil  # accelerate needs it too

    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(process).wait()
    signal.raise_signal(signal.SIGTERM)


class Interruptions:
    """A context in which signals and the clock are heard.

    Args:
        seconds: Between two checkpoints; by default none is asked for. Only the main process's clock is to count.
    """

    def __init__(self, seconds: float = math.inf):
        self.seconds = seconds
        self.received = dict.fromkeys(SIGNALS, math.inf)  # when, by this process
        self.signal = None  # that all processes stop for
        self.saved()

    def __enter__(self) -> 'Interruptions':
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if error is None and self.signal is None:  # one that came too late to be heard does what it would have done
            for number in SIGNALS:
                if self.received[number] < math.inf:
                    signal.raise_signal(number)

    def _receive(self, number: int, _) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self.received[number] + AGAIN:
            os._exit(128 + number)
        self.received[number] = min(now, self.received[number])

    def wishes(self) -> tuple[float, ...]:
        """1.0 where this process wants to save, to stop for Ctrl-C, to stop for SIGTERM; to be summed over all."""
        now = time.monotonic()
        return float(now >= self.next), *(float(self.received[number] <= now) for number in SIGNALS)

    def hear(self, save: float, *signals: float) -> None:
        """What the processes want together."""
        self.pending |= save > 0
        for number, wanted in zip(SIGNALS, signals, strict=True):
            if wanted and self.signal is None:
                self.signal, self.pending = number, True

    def saved(self) -> None:
        """A checkpoint has been written: `pending` is False until the next interruption."""
        self.pending = False
        self.next = time.monotonic() + self.seconds
