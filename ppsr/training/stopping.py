"""SIGTERM, SIGHUP and Ctrl-C as a wish to stop: the iteration is finished and a checkpoint saved first."""

import signal
import threading

__all__ = ['StopSignals']


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted instead of ending the process.

    A second Ctrl-C ends it at once with KeyboardInterrupt, unless there are several processes: torchrun repeats the
    terminal's Ctrl-C to each of them. Outside the main thread, where Python handles no signals, nothing is changed.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self, several_processes: bool = False):
        self.received: signal.Signals | None = None
        self.several_processes = several_processes
        self._before = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, 'SIGHUP', signal.SIGTERM)
            if signal.getsignal(hangup) is signal.SIG_IGN:  # nohup
                hangup = signal.SIGTERM
            self._before = {s: signal.signal(s, self._note) for s in {signal.SIGTERM, signal.SIGINT, hangup}}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received == number == signal.SIGINT and not self.several_processes:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
