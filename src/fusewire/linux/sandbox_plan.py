"""What a sandbox is made of: the plan, its steps, and the error that says why one cannot be had.

Layer: linux. Plain values: `sandbox` decides what they are, `sandbox_enter` does it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.linux.userns import IdMap


class SandboxError(OSError):
    """A sandbox cannot be had. `step` says where it failed, `remedy` what else can be done."""

    def __init__(self, number: int, message: str, remedy: str, step: str = "") -> None:
        super().__init__(number, message)
        self.step = step
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.strerror}; {self.remedy}" if self.remedy else str(self.strerror)


class Step:
    """One thing to do: `what` is done, and `why`, each in a line."""

    __slots__ = ("name", "what", "why")

    def __init__(self, name: str, what: str, why: str) -> None:
        self.name = name
        self.what = what
        self.why = why

    def __repr__(self) -> str:
        return f"Step({self.name!r}, {self.what!r})"


class Plan:
    """What will be done, in this order, and with what.

    shared: the directory, by path or descriptor; None for a server that needs no files but its open ones. keep: the
    mask of capabilities. uids, gids: the maps of a new user namespace, () without one; helpers: newuidmap(1) writes
    them. landlock: the ABI version to use, 0 for none. readable: directories outside that Landlock is to let it read;
    executes: files are opened to be executed, by the kernel in its name.
    child: the server is a child of whoever asks for it, whatever the mode. notes: what is weaker here than it could be.
    refused: pairs of a stronger mode and the reason why it is not this one.
    """

    __slots__ = (
        "child",
        "executes",
        "gids",
        "helpers",
        "keep",
        "landlock",
        "mode",
        "notes",
        "readable",
        "refused",
        "rlimit_nofile",
        "shared",
        "steps",
        "uids",
        "writable",
    )

    def __init__(self, mode: str, shared: bytes | int | None) -> None:
        self.mode = mode
        self.shared = shared
        self.steps: tuple[Step, ...] = ()
        self.notes: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.keep = 0
        self.uids: tuple[IdMap, ...] = ()
        self.gids: tuple[IdMap, ...] = ()
        self.helpers = False
        self.landlock = 0
        self.readable: tuple[bytes, ...] = ()
        self.executes = False
        self.rlimit_nofile: int | None = None
        self.writable = True
        self.child = False

    @property
    def confined(self) -> bool:
        """True if files outside cannot be opened by path any more."""
        return self.mode != "none" or self.landlock > 0

    @property
    def new_user(self) -> bool:
        """True with a user namespace of its own."""
        return bool(self.uids)

    def describe(self) -> str:
        """The steps with their reasons, the notes, and why no stronger mode: for --dry-run, a line each."""
        width = max((len(step.name) for step in self.steps), default=0)
        lines = [self.summary()]
        lines += [f"  {step.name:<{width}}  {step.what} - {step.why}" for step in self.steps]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line for the log: the mode, and why not a stronger one."""
        text = f"sandbox: {self.mode}"
        if self.landlock:
            text += f" with Landlock (ABI {self.landlock})"
        return "; ".join([text, *(f"not {mode}: {reason}" for mode, reason in self.refused)])
