"""Signals that end a command: not in the middle of its work, and with the exit code of each."""

import signal
import threading


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; the text says what is left of it."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number


class Stop:
    """While it lasts, Ctrl-C, SIGTERM and SIGHUP are noted, so that the work can come to an end.

    ``number`` is that of the signal that came, or None. A second one does not wait: it raises
    :class:`Interrupted`. What was ignored is so still, as under ``nohup``.

    Args:
        is_on: whether signals are noted at all; in other threads than the main one they never are.
    """

    def __init__(self, is_on: bool):
        self.number: int | None = None
        self._is_on = is_on and threading.current_thread() is threading.main_thread()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if self._is_on else ():
            if signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is not None:
            raise Interrupted("", number)
        self.number = number
