"""Questions to a server: several at a time, repeated with back-off, stopped at once.

The packages' own retries are switched off. They differ (Google's takes no notice of Retry-After, GigaChat's sleeps for
as long as that says, however long), they draw from the random numbers that training is seeded with, and none of them
can be interrupted while it sleeps.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .fence import Question
from .reply import Reply
from .trouble import Passing, Permanent, Stopped, Trouble

Ask = Callable[[Question], Reply]
Found = TypeVar("Found")

_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_FOR_S = 0.5, 20.0, 120.0
# Its own random numbers: those of the training are seeded, and drawing from them would change it.
_jitter = random.Random()


def insist(send: Ask, question: Question, *, retries: int, stop: threading.Event) -> Reply:
    """Ask, and again after what passes: half a second later, then twice that, up to 20 s, or when the server says.

    Args:
        send: One request.
        question: What is asked.
        retries: How many more.
        stop: Ends the waiting.

    Raises:
        Trouble: What was left of it in the end.
        Stopped: `stop` was set while it waited.
    """
    attempt = 0
    while not stop.is_set():
        try:
            return send(question)
        except Passing as trouble:
            asked_for = trouble.retry_after_s
            if asked_for is not None and asked_for > _LONGEST_ASKED_FOR_S:
                raise Trouble(f"{trouble}, and asked to wait longer than {_LONGEST_ASKED_FOR_S:g} s") from trouble
            if attempt == retries:
                times = f" {attempt + 1} times" if attempt else ""
                raise (Permanent if trouble.fatal else Trouble)(f"{trouble}{times}") from trouble
        wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * _jitter.uniform(0.5, 1.0)
        # A little later than asked for, so that those who were refused together do not come back together.
        stop.wait(wait if asked_for is None else asked_for * _jitter.uniform(1.0, 1.1))
        attempt += 1
    raise Stopped


def in_threads(
    judge: Callable[..., Found], items: Iterator[tuple[str, Any]], *, threads: int, stop: threading.Event
) -> Iterator[tuple[str, Found]]:
    """Judge items at once, and yield what is found as it comes.

    Args:
        judge: Called with a key and what belongs to it.
        items: Keys and what belongs to them.
        threads: How many at a time.
        stop: Set at the first `Permanent`, and when nobody asks for more. What is under way is then not repeated.

    Raises:
        Permanent: What `judge` raised, after all that was under way has come in.
    """
    lock = threading.Lock()
    done: queue.SimpleQueue[tuple[str, Found] | Permanent | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(items, None)
                if item is None:
                    break
                done.put((item[0], judge(*item)))
        except Permanent as trouble:
            stop.set()
            done.put(trouble)
        except Stopped:
            pass
        finally:
            done.put(None)

    permanent: Permanent | None = None
    try:
        for number in range(threads):
            # Daemons, because an interpreter that exits waits for all others.
            threading.Thread(target=work, name=f"forge-judge-{number}", daemon=True).start()
        while threads:
            found = done.get()
            if found is None:
                threads -= 1
            elif isinstance(found, Permanent):
                permanent = permanent or found
            else:
                yield found
    finally:
        stop.set()
    if permanent is not None:
        raise permanent
