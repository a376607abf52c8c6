"""A server that goes on in the background: started, and waited for until it says that it is ready.

Layer `cli`. What is served, and what "ready" means, is the caller's.
"""

from __future__ import annotations

import os
import signal
import sys

from fusewire.cli import supervise
from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection


def start(
    serve: Callable[[int], int],
    *,
    keep: Collection[int],
    name: str,
    died: str,
    failed: int,
    give_up: Callable[[int], None],
) -> int:
    """Have a child `serve(tell)` and wait until it has written "R" and what to print to `tell`; give the exit status.

    serve gives the status with which the child ends one day; what it raises is its failure. keep: descriptors that it
    needs. name, died: for the message that it has failed, the latter if it said nothing itself; failed: the exit status
    of that. give_up(pid): end one
    that is not ready, because whoever waits has been told to end.
    """
    from fusewire.cli.messages import describe, explain

    told, tell = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, supervise.ENDING)
    sys.stdout.flush()
    server = os.fork()
    if server == 0:
        os.close(told)
        code = failed
        try:
            # Whatever else the caller has open (a lock, a pipe that somebody reads) must not live as long as a server.
            process.close_inherited_fds({0, 1, 2, tell, *keep})
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            code = serve(tell)
        except OSError as error:
            _fail(tell, explain(error))
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except SystemExit as ended:  # of the one that serves, for which this process has waited
            code = ended.code if isinstance(ended.code, int) else failed
        except BaseException:  # noqa: BLE001 - the child's last stop
            import traceback

            _fail(tell, traceback.format_exc())
        finally:
            os._exit(code)
    os.close(tell)
    answer, ended_by = supervise.read_unless_ended(told)
    os.close(told)
    if answer.startswith(b"R"):
        sys.stdout.write(os.fsdecode(answer[1:]))
        return 0
    if ended_by := ended_by or supervise.pending():
        give_up(server)
        return supervise.leave(ended_by)
    _, status = os.waitpid(server, 0)
    text = os.fsdecode(answer[1:]) or f"{died} ({describe(status)})"
    print(f"{name}: {text}", file=sys.stderr)
    return failed


def _fail(tell: int, text: str) -> None:
    try:
        os.write(tell, b"E" + os.fsencode(text))
    except OSError:
        pass  # it has been told already, and the pipe is closed
