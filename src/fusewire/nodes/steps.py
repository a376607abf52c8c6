"""Handlers that may have to wait: generators that yield what a method of a node gave, awaitable or not.

Layer `nodes`. Where nothing has to be awaited, nothing of asyncio is loaded or run; where something has, the rest of
the generator goes on in a coroutine, and the request is answered by a `Pending`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Generator
    from typing import Any, TypeVar

    from fusewire.ops import Pending

    T = TypeVar("T")
    Steps = Generator[Any, Any, T]


def is_awaitable(value: Any) -> bool:
    """Tell whether a method of a node was async."""
    return hasattr(type(value), "__await__")


def run(steps: Steps[T]) -> T | Pending:
    """Go through the steps. Gives their result, or a `Pending` once one of them has to be waited for."""
    try:
        value = next(steps)
        while not is_awaitable(value):
            value = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    return later(_rest(steps, value))


def later(value: Awaitable[Any]) -> Pending:
    """Have a value awaited, on the loop that runs what is async."""
    from fusewire.aio import pending

    return pending(value)


def settled(value: Any) -> Any:
    """Give what a method gave as the answer, or a `Pending` if it has to be waited for."""
    return later(value) if is_awaitable(value) else value


async def _rest(steps: Steps[T], value: Any) -> T:
    try:
        while True:
            try:
                result = await value if is_awaitable(value) else value
            except BaseException as error:  # noqa: BLE001 - the steps have to hear of it, also that it was cancelled
                value = steps.throw(error)
            else:
                value = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
