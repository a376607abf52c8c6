"""What a server may ask of the kernel while it serves: a seccomp filter, seccomp(2), made with libseccomp.

Layer: linux. It holds a list of system calls and loads it; it does not decide whether to. The list is for a Python
server that has imported and opened everything: it starts threads, opens files, and answers requests. It starts no
program, makes no socket, no mount and no namespace, maps no code, and signals nobody else.

A call that is not on the list ends the process, whichever thread makes it. A few are refused instead: those for which
a C library has another way, or where an error is all that is needed. Those whose arguments matter are in LIMITED; a
call without conditions costs nothing that could be measured, for since Linux 5.11 the kernel keeps a bitmap of them.

The C library chooses the calls, not we: so the list has the old and the new form of each, and whatever Linux got
after this was written (from number _UNKNOWN on) is answered ENOSYS, as by a kernel of today, which every C library
can bear. A name that the machine or libseccomp does not know is left out; numbers from 403 on are the same everywhere
and are given here for a libseccomp that is older than the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Condition = tuple[int, int, int]  # argument from 0 on, the bits of it that count, what they have to be
    Rule = tuple[str, int, tuple[Condition, ...]]

ACTIONS = ("kill", "trap", "log", "none")

# Memory: malloc, and mmap objects of guest memory. membarrier: a lock that is taken from one side only.
_MEMORY = "brk munmap mremap madvise membarrier"

# Threads of queues begin and end while we serve; the GIL and every lock is a futex, and so is the dirty log. rseq and
# set_robust_list: how glibc begins a thread. sched_getaffinity: os.process_cpu_count, sched_yield: spinning in glibc.
# pause: where a daemon thread stays that wants the interpreter when it is gone (Python 3.14).
_THREADS = "futex futex_time64 set_robust_list rseq sched_yield sched_getaffinity getcpu gettid pause exit exit_group"

# restart_syscall: what the kernel makes of a wait that was stopped and goes on. rt_sigtimedwait: signal.sigwait.
_SIGNALS = """rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigtimedwait_time64 sigreturn
    sigaltstack restart_syscall"""

# Most of these are no system calls where there is a vDSO; there may be none (a virtual clock, a tracer).
_TIME = """clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep clock_nanosleep_time64
    nanosleep gettimeofday time times getrusage"""

# Who and where we are, which changes nothing. sysinfo: qsort in glibc asks how much memory there is. getcwd: a
# traceback. getrandom: random, and the hash of new types of strings.
_ASKING = """getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups capget uname sysinfo getrlimit
    ugetrlimit setrlimit getrandom getcwd getuid32 geteuid32 getgid32 getegid32 getresuid32 getresgid32 getgroups32"""

# Waiting for the front end, for kicks, and for being told to end.
_WAITING = """poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 epoll_create1 epoll_ctl epoll_wait
    epoll_pwait epoll_pwait2 eventfd2 pipe2"""

# The front end: the next one is accepted; messages and descriptors go through sockets that are there already. Python
# asks a new socket what it is. memfd_create: the region of requests in flight.
_FRONT_END = "accept accept4 recvmsg sendmsg getsockname getsockopt memfd_create"

# Open files: requests become these.
_OPEN_FILES = """read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek close
    close_range dup dup2 dup3 fsync fdatasync syncfs ftruncate ftruncate64 fallocate fadvise64 fadvise64_64
    arm_fadvise64_64 copy_file_range flock getdents getdents64 fstat fstat64 fstatfs fstatfs64"""

# Names and inodes. What a symbolic link or a device would lead to is the sandbox's care, not this list's.
_NAMES = """open openat openat2 name_to_handle_at open_by_handle_at stat stat64 lstat lstat64 newfstatat fstatat64
    statx statfs statfs64 access faccessat faccessat2 readlink readlinkat mkdir mkdirat rmdir unlink unlinkat link
    linkat symlink symlinkat rename renameat renameat2 mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown
    lchown fchownat chown32 fchown32 lchown32 truncate truncate64 utimes utimensat utimensat_time64 umask chdir fchdir
    inotify_init1 inotify_add_watch inotify_rm_watch"""

_ATTRIBUTES = """getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat listxattr llistxattr
    flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat"""

# A thread acts as the caller of a request: by its filesystem ids and groups, which need CAP_SETUID and CAP_SETGID,
# and with fewer effective capabilities. The process's own ids, and so who it is to other processes, stay.
_CALLER = "setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capset"

_GROUPS = (
    _MEMORY, _THREADS, _SIGNALS, _TIME, _ASKING, _WAITING, _FRONT_END, _OPEN_FILES, _NAMES, _ATTRIBUTES, _CALLER,
)  # fmt: skip

ALLOWED: frozenset[str] = frozenset(name for group in _GROUPS for name in group.split())
"""The calls that are allowed whatever their arguments are."""

LIMITED: frozenset[str] = frozenset(
    {
        "clone", "clone3", "unshare", "tgkill", "prlimit64", "fcntl", "fcntl64", "ioctl", "prctl", "mmap", "mmap2",
        "mprotect",
    }
)  # fmt: skip
"""The calls that are allowed with some arguments only, or refused with an error (see `_limited`)."""

# Calls that an older libseccomp does not know by name.
_LATER = {
    "close_range": 436,
    "openat2": 437,
    "faccessat2": 439,
    "epoll_pwait2": 441,
    "fchmodat2": 452,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
}
_UNKNOWN = range(470, 512)  # after Linux 6.17, and before the x32 numbers of x86_64

_ALLOW, _KILL_PROCESS, _TRAP, _LOG, _ERRNO = 0x7FFF0000, 0x80000000, 0x00030000, 0x7FFC0000, 0x00050000
_REFUSED = _ERRNO | errno.EACCES
_DEFAULTS = {"kill": _KILL_PROCESS, "trap": _TRAP, "log": _LOG}

# <seccomp.h>: enum scmp_filter_attr, enum scmp_compare, struct scmp_arg_cmp
_BAD_ARCH, _NO_NEW_PRIVS, _TSYNC, _SSB, _OPTIMIZE = 2, 3, 4, 7, 8
_MASKED_EQ = 7
_arg_cmp = struct.Struct("=IIQQ")

_INT = 0xFFFFFFFF  # of an int or unsigned int the kernel reads 32 bits, and a C library may leave any above
_LONG = 0xFFFFFFFFFFFFFFFF

_PROT_EXEC = 4
_CLONE_THREAD, _CLONE_FS = 0x00010000, 0x00000200
_CLONE_NEW = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET

# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, record locks (and those of 32 bit machines), F_OFD_*, F_DUPFD_CLOEXEC,
# F_SETPIPE_SZ, F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS. Not F_SETOWN and F_SETSIG, which together are a kill(2), and no
# leases.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 36, 37, 38, 1030, 1031, 1032, 1033, 1034)
# FS_IOC_GETFLAGS and SETFLAGS of both widths, FS_IOC_FSGETXATTR and FSSETXATTR: what a client may ask for. FIONCLEX,
# FIOCLEX, FIONBIO: how Python marks descriptors. FUSE_DEV_IOC_CLONE, BACKING_OPEN, BACKING_CLOSE: a local mount's.
_IOCTL = (
    0x80086601, 0x80046601, 0x40086602, 0x40046602, 0x801C581F, 0x401C5820,
    0x5450, 0x5451, 0x5421,
    0x8004E500, 0x4010E501, 0x4004E502,
)  # fmt: skip
# TCGETS, TCGETS2, TIOCGWINSZ: "is it a terminal?", which open() asks of each file. No file of ours is one.
_TERMINAL = (0x5401, 0x802C542A, 0x5413)
# Capabilities may be dropped after the filter is loaded: PR_CAPBSET_READ and DROP, PR_GET and SET_NO_NEW_PRIVS,
# PR_GET and SET_DUMPABLE, PR_SET_PDEATHSIG. PR_SET_NAME, PR_GET_NAME: threads are named from Python 3.14 on.
# PR_SET_VMA: names of memory maps, by glibc and Python.
_PRCTL = (23, 24, 38, 39, 3, 4, 1, 15, 16, 0x53564D41)
_PR_CAP_AMBIENT, _AMBIENT = 47, (1, 3, 4)  # PR_CAP_AMBIENT_IS_SET, LOWER, CLEAR_ALL

# struct siginfo and struct sigaction, where the handler comes first, then the mask, then the flags.
_SIGINFO_MACHINES = ("x86_64", "aarch64", "riscv64", "loongarch64", "ppc64le")
_SI_SYSCALL = 24
_sigaction = struct.Struct("P128si4xP")
_SA_SIGINFO, _SA_NODEFER, _SA_RESETHAND = 4, 0x40000000, -0x80000000


def _limited() -> list[Rule]:
    """The calls of which some are allowed: a line for each, all conditions of which have to hold."""
    flags = 1 if os.uname().machine.startswith("s390") else 0
    rules: list[Rule] = [
        # A thread, and nothing else: no process, no namespace.
        ("clone", _ALLOW, ((flags, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD),)),
        # Its flags are in memory, where no filter sees them. Without it, glibc takes clone.
        ("clone3", _ERRNO | errno.ENOSYS, ()),
        # A thread may have a umask of its own.
        ("unshare", _ALLOW, ((0, _LONG, _CLONE_FS),)),
        # abort(3) and raise(3).
        ("tgkill", _ALLOW, ((0, _INT, os.getpid()),)),
        # Our own limits, nobody else's; to go beyond the hard ones takes CAP_SYS_RESOURCE.
        ("prlimit64", _ALLOW, ((0, _INT, 0),)),
    ]
    rules += [(name, _ALLOW, ((1, _INT, command),)) for name in ("fcntl", "fcntl64") for command in _FCNTL]
    rules += [("ioctl", _ALLOW, ((1, _INT, command),)) for command in _IOCTL]
    rules += [("ioctl", _ERRNO | errno.ENOTTY, ((1, _INT, command),)) for command in _TERMINAL]
    rules += [("prctl", _ALLOW, ((0, _INT, option),)) for option in _PRCTL]
    rules += [("prctl", _ALLOW, ((0, _INT, _PR_CAP_AMBIENT), (1, _LONG, what))) for what in _AMBIENT]
    for name in ("mmap", "mmap2", "mprotect"):
        if _compiles():
            rules.append((name, _ALLOW, ()))
            continue
        # A library that is loaded late is an ImportError, and a filesystem goes on.
        rules.append((name, _ALLOW, ((2, _PROT_EXEC, 0),)))
        rules.append((name, _REFUSED, ((2, _PROT_EXEC, _PROT_EXEC),)))
    return rules


def _compiles() -> bool:
    """True if this Python makes code as it runs: its JIT is on (3.14, sys._jit)."""
    jit = getattr(sys, "_jit", None)
    return jit is not None and bool(jit.is_enabled())


def _syslog() -> list[Rule]:
    """What syslog(3) needs, with openlog(3) and LOG_NDELAY before: to send to where it is connected.

    When the daemon has gone it would connect again: it is refused that and gives up, and the message is lost.
    """
    return [
        ("sendto", _ALLOW, ((4, _LONG, 0),)),
        ("send", _ALLOW, ()),
        ("socket", _REFUSED, ()),
    ]


def import_all(*modules: str) -> None:
    """Load what would be loaded late otherwise, when nothing can be found any more: the modules and some of Python's.

    array: socket.recv_fds. traceback, linecache, tokenize: a fault that is reported; its lines of source are not shown
    where they cannot be opened. syslog and time zone: messages.

    Raises ImportError.
    """
    import time

    late = ("array", "encodings.ascii", "encodings.latin_1", "linecache", "syslog", "tokenize", "traceback")
    for name in (*late, *modules):
        __import__(name)
    time.localtime()
    process.preload_thread_exit()


class _Library:
    """The functions of libseccomp."""

    def __init__(self) -> None:
        """Load it. Raises OSError(ENOENT) that names the package."""
        try:
            library = ctypes.CDLL("libseccomp.so.2")
        except OSError as error:
            raise OSError(
                errno.ENOENT,
                f"the system calls cannot be filtered without libseccomp ({error}): install it (Debian, Ubuntu: "
                "libseccomp2; Fedora, Alpine: libseccomp), or ask for no filter (seccomp none)",
            ) from error
        integer, word, pointer, text = ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p
        self.init = library.seccomp_init
        self.init.argtypes, self.init.restype = (word,), pointer
        self.release = library.seccomp_release
        self.release.argtypes, self.release.restype = (pointer,), None
        self.attribute = library.seccomp_attr_set
        self.attribute.argtypes = (pointer, integer, word)
        self.add = library.seccomp_rule_add_array
        self.add.argtypes = (pointer, word, integer, integer, text)
        self.load = library.seccomp_load
        self.load.argtypes = (pointer,)
        self.export = library.seccomp_export_bpf
        self.export.argtypes = (pointer, integer)
        self._number = library.seccomp_syscall_resolve_name
        self._number.argtypes = (text,)
        self._name = library.seccomp_syscall_resolve_num_arch
        self._name.argtypes, self._name.restype = (word, integer), pointer
        self._arch = library.seccomp_arch_native
        self._arch.argtypes, self._arch.restype = (), word

    def number(self, name: str) -> int | None:
        """The number of a call; None if this machine has none of that name."""
        number = int(self._number(name.encode()))
        return number if number >= 0 else _LATER.get(name)

    def knows(self, name: str) -> bool:
        """True if any machine has a call of that name: those of others have negative numbers, -1 is for none."""
        return name in _LATER or self._number(name.encode()) != -1

    def name(self, number: int) -> str:
        """The name of a call, or its number as a text."""
        found = self._name(self._arch(), number)
        if not found:
            return f"number {number}"
        name = ctypes.string_at(found).decode()
        ctypes.CDLL(None).free(ctypes.c_void_p(found))
        return name


def syscall_name(number: int) -> str:
    """The name of a call of this machine, as in the `syscall=` of an audit record. Raises OSError(ENOENT)."""
    return _Library().name(number)


class _Filter:
    """A filter as libseccomp makes it; `close` when it has been used."""

    def __init__(self, action: str, extra: Iterable[str], syslog: bool) -> None:
        """Make it. Raises OSError; ValueError for a name in `extra` that no machine has."""
        if action not in _DEFAULTS:
            raise ValueError(f"no such action: {action} ({', '.join(ACTIONS)})")
        self.library = library = _Library()
        self._default = _DEFAULTS[action]
        self._context = library.init(self._default)
        if not self._context:
            raise OSError(
                errno.ENOSYS, f"seccomp {action} needs Linux 4.14 with CONFIG_SECCOMP_FILTER; ask for no filter"
            )
        try:
            self._attributes()
            for name in extra:
                if not library.knows(name):
                    raise ValueError(f"no such system call: {name}")
            rules = {name: [(_ALLOW, ())] for name in (*ALLOWED, *extra)}
            for name, verdict, conditions in (*_limited(), *(_syslog() if syslog else ())):
                if name not in extra and (action != "log" or verdict != _REFUSED):  # the log is to have those
                    rules.setdefault(name, []).append((verdict, conditions))
            for name, found in rules.items():
                number = library.number(name)
                if number is not None:
                    for verdict, conditions in found:
                        self._add(name, number, verdict, conditions)
            for number in _UNKNOWN:
                self._add(f"number {number}", number, _ERRNO | errno.ENOSYS, ())
        except BaseException:
            self.close()
            raise

    def _attributes(self) -> None:
        set_attribute, context = self.library.attribute, self._context
        # All threads; and other machines' calls (32 bit ones on x86_64, x32) are as bad as any.
        for attribute, value in ((_TSYNC, 1), (_NO_NEW_PRIVS, 1), (_BAD_ARCH, self._default)):
            error = set_attribute(context, attribute, value)
            if error:
                raise OSError(-error, f"libseccomp attribute {attribute}: {os.strerror(-error)}; Linux 4.14 is needed")
        # A tree instead of a list, from libseccomp 2.5 on: it is for calls with conditions, and kernels before 5.11.
        set_attribute(context, _OPTIMIZE, 2)
        # Kernels before 5.16 switch memory disambiguation off for a process with a filter, which is for those who run
        # foreign code in their own address space. From libseccomp 2.5 on.
        set_attribute(context, _SSB, 1)

    def _add(self, name: str, number: int, verdict: int, conditions: tuple[Condition, ...]) -> None:
        packed = b"".join(_arg_cmp.pack(argument, _MASKED_EQ, mask, value) for argument, mask, value in conditions)
        error = self.library.add(self._context, verdict, number, len(conditions), packed)
        if error:
            raise OSError(-error, f"libseccomp does not take the rule for {name}: {os.strerror(-error)}")

    def load(self) -> None:
        """Put it on every thread of this process, and no_new_privs with it."""
        error = int(self.library.load(self._context))
        if error:
            why = os.strerror(-error) if error < 0 else f"thread {error} has another filter"
            raise OSError(
                abs(error),
                f"the kernel does not take a seccomp filter: {why}; it needs CONFIG_SECCOMP_FILTER, and a container "
                "may forbid seccomp(2). Ask for no filter (seccomp none)",
            )

    def export(self, fd: int) -> None:
        """Write it as a program, struct sock_filter after struct sock_filter."""
        error = self.library.export(self._context, fd)
        if error:
            raise OSError(-error, f"seccomp_export_bpf: {os.strerror(-error)}")

    def close(self) -> None:
        """Let go of it; it stays where it was loaded."""
        self.library.release(self._context)


def _to_stderr(message: str) -> None:
    os.write(2, os.fsencode(f"{message}\n"))


def load(
    action: str, *, extra: Iterable[str] = (), syslog: bool = False, say: Callable[[str], None] | None = None
) -> None:
    """Allow this process, with all its threads, the calls of ALLOWED and LIMITED from now on; there is no way back.

    action: what becomes of who makes another one. `kill`: SIGSYS ends the process, the kernel's log names the call by
    its number (`syscall=`, type 1326; syscall_name()). `trap`: the same, but before, the call's name and Python's
    traceback are told by `say`, or on standard error: for finding out. `log`: the kernel's log names the call, which
    goes on. `none`: there is no filter. extra: names of calls to be allowed besides. syslog: messages go to syslog(3).

    no_new_privs is set. Raises OSError that says what is missing, ValueError for an action that there is not.
    """
    if action == "none":
        return
    made = _Filter(action, frozenset(extra), syslog)
    try:
        if action == "trap":
            _name_what_traps(made.library, say or _to_stderr)
        made.load()
    finally:
        made.close()


def check() -> None:
    """Load what a filter takes, where files can still be opened. Raises OSError that says what is missing.

    That is the library that makes it, and what a thread could not load at its end with no code to be mapped any more.
    """
    _Library()
    process.preload_thread_exit()


def program(action: str, *, extra: Iterable[str] = (), syslog: bool = False) -> bytes:
    """What `load` would load: a program of struct sock_filter, 8 bytes each (<linux/filter.h>). Raises as that does."""
    made = _Filter(action, frozenset(extra), syslog)
    fd = os.memfd_create("fusewire-seccomp", os.MFD_CLOEXEC)
    try:
        made.export(fd)
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
        made.close()


def _name_what_traps(library: _Library, say: Callable[[str], None]) -> None:
    """Have SIGSYS tell what was called, and from where, and then end the process.

    Not by signal.signal(): such a handler runs later, in the first thread, while the call seems to have worked. This
    one runs in the middle of the call, in its thread, which is a safe place to run Python: the call was made by Python
    or for it, and the locks of C that may be held are those of calls that are allowed.
    """
    import signal

    if os.uname().machine not in _SIGINFO_MACHINES or struct.calcsize("P") != 8:
        import faulthandler

        faulthandler.register(signal.SIGSYS, all_threads=False, chain=True)  # without the name
        return
    import threading
    import traceback

    def tell(signum: int, info: int, context: int) -> None:
        try:
            name = library.name(ctypes.c_int.from_address(info + _SI_SYSCALL).value)
            stack = "".join(traceback.format_stack()[:-1])
            say(
                f"seccomp: the system call {name} is not allowed; thread {threading.current_thread().name} made it:\n"
                f"{stack.rstrip()}"
            )
        finally:
            signal.raise_signal(signal.SIGSYS)  # SA_RESETHAND: nobody handles it any more
            os._exit(128 + signal.SIGSYS)  # the first process of a PID namespace does not mind it: pid_namespaces(7)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(tell)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # never to be collected
    address = ctypes.cast(handler, ctypes.c_void_p).value
    wanted = _sigaction.pack(address, b"", _SA_SIGINFO | _SA_NODEFER | _SA_RESETHAND, 0)
    if ctypes.CDLL(None, use_errno=True).sigaction(int(signal.SIGSYS), wanted, None):
        number = ctypes.get_errno()
        raise OSError(number, f"sigaction: {os.strerror(number)}")
