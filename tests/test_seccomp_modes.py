"""The filter in each sandbox: who makes a call that is not on its list ends, and is told of where it was to tell.

And the list for another C library than the one at hand: a program that is linked with musl runs under it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import daemons
import rootless
from fusewire.linux import seccomp_filter
from fusewire.testing.guest import FakeGuest
from fusewire.wire import abi
from vm.daemons import Daemon


def why_no_filter() -> str:
    """Why no filter can be loaded here, or an empty string."""
    try:
        seccomp_filter.program("kill")
    except OSError as error:
        return str(error)
    return daemons.missing("fusewire")


WHY = why_no_filter()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")
PATIENCE = 20.0

# `fusewire share`, with a filesystem that on READLINK makes a call which no server makes.
SHARE = """
import os, sys
from fusewire.cli import main
from fusewire.fs.passthrough import Passthrough
def careless(self, *arguments):
    os.getpgid(0)
    return b"still here"
Passthrough.readlink = careless
sys.exit(main(sys.argv[1:]))
"""
WAYS = [
    ("root", "--sandbox=namespace"),
    ("root", "--sandbox=chroot"),
    ("root", "--sandbox=none"),
    ("root", "--sandbox=none", "--landlock=off"),
    ("nobody", "--sandbox=namespace"),
    ("nobody", "--sandbox=none"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach, with a symbolic link."""
    found = Path(rootless.rootless_home()) / f"modes-{os.getpid()}-{os.urandom(4).hex()}"
    found.mkdir(mode=0o755)
    (found / "link").symlink_to("elsewhere")
    yield found
    shutil.rmtree(found)


@pytest.fixture(params=WAYS, ids=" ".join)
def careless(request: pytest.FixtureRequest, place: Path) -> list[str]:
    """Words that share `place` in one of the ways; they lack --seccomp."""
    user, *options = request.param
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    python = [sys.executable, "-W", "error"] if user == "root" else rootless.rootless_python()
    return [*python, "-c", SHARE, "share", str(place), "--fd={fd}", *options]


def read_the_link(daemon: Daemon) -> bytes:
    """Have the daemon make its call; gives its answer if it lives."""
    with FakeGuest.connect(str(daemon.path)) as guest:
        guest.init()
        node = guest.lookup(1, b"link").nodeid
        unique = guest.start(abi.FUSE_READLINK, node)
        try:
            return guest.finish(unique, PATIENCE)
        except ConnectionError:
            return b""


def status_of_the_end(daemon: Daemon) -> int:
    """What a shell says of a server that SIGSYS ended: its own status, or that of who waited for it."""
    status = daemon.process.wait(PATIENCE)
    return 128 - status if status < 0 else status


def test_trap_names_the_call_with_a_traceback_in_each_mode(careless: list[str]) -> None:
    """In namespaces the server is the first process there, which signals of its own do not end: pid_namespaces(7)."""
    with Daemon([*careless, "--seccomp=trap"]) as daemon:
        assert read_the_link(daemon) == b""
        assert status_of_the_end(daemon) == 128 + signal.SIGSYS
        said = daemon.said()
    assert "the system call getpgid is not allowed; thread " in said
    assert ", in careless" in said


def test_kill_ends_the_server_in_each_mode(careless: list[str]) -> None:
    with Daemon([*careless, "--seccomp=kill"]) as daemon:
        assert read_the_link(daemon) == b""
        assert status_of_the_end(daemon) == 128 + signal.SIGSYS
        assert "Traceback" not in daemon.said()


def test_log_lets_the_server_go_on_in_each_mode(careless: list[str]) -> None:
    with Daemon([*careless, "--seccomp=log"]) as daemon:
        assert read_the_link(daemon) == b"still here"
        daemon.process.terminate()
        assert daemon.process.wait(PATIENCE) == 0, daemon.said()


# A program that does what an interpreter does for a server: it takes the filter from its standard input, which traps,
# names what trapped by its number, and says "done" at its end.
PROGRAM = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))

struct instruction { unsigned short code; unsigned char jt, jf; unsigned int k; };
static struct { unsigned short length; struct instruction *program; } filter;
static struct instruction instructions[4096];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static sem_t semaphore;
static int turns;
static volatile sig_atomic_t heard;

static void fail(int line, const char *what)
{
	dprintf(2, "line %d: %s: %s\n", line, what, strerror(errno));
	_exit(3);
}

static void trapped(int number, siginfo_t *info, void *context)
{
	dprintf(2, "syscall %d\n", info->si_syscall);
	_exit(2);
}

static void hear(int number) { heard = number; }

static void *work(void *argument)
{
	struct timespec soon;
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	void *blocks[200];
	for (int i = 0; i < 200; i++) {
		blocks[i] = malloc((size_t)64 << i % 16);
		CHECK(blocks[i]);
		blocks[i] = realloc(blocks[i], (size_t)256 << i % 16);
	}
	for (int i = 0; i < 200; i++)
		free(blocks[i]);
	pthread_mutex_lock(&mutex);
	turns++;
	pthread_cond_broadcast(&condition);
	while (turns < 8)
		pthread_cond_wait(&condition, &mutex);
	clock_gettime(CLOCK_REALTIME, &soon);
	soon.tv_nsec = soon.tv_nsec / 2;
	pthread_cond_timedwait(&condition, &mutex, &soon);
	pthread_mutex_unlock(&mutex);
	sem_post(&semaphore);
	if (argument)
		pthread_exit(NULL);
	return NULL;
}

static void *leave(void *argument) { pthread_exit(argument); }  /* glibc loads a library for it, once */

static void threads(void)
{
	pthread_t thread[8];
	pthread_attr_t attributes;
	sem_init(&semaphore, 0, 0);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 1 << 20);
	for (long i = 0; i < 8; i++) {
		CHECK(pthread_create(&thread[i], &attributes, work, (void *)(i & 1)) == 0);
		if (i & 2)
			pthread_detach(thread[i]);
	}
	for (int i = 0; i < 8; i++)
		sem_wait(&semaphore);
	for (int i = 0; i < 8; i++)
		if (!(i & 2))
			pthread_join(thread[i], NULL);
	sched_yield();
}

static void files(void)
{
	char text[100], path[PATH_MAX];
	struct stat found;
	struct statvfs space;
	struct timespec times[2] = {{1, 2}, {3, 4}};
	FILE *file = fopen("file", "w+");
	CHECK(file);
	for (int i = 0; i < 10000; i++)
		fprintf(file, "%d %s\n", i, "something that is longer than a buffer in the end");
	CHECK(fflush(file) == 0 && fseeko(file, 100, SEEK_SET) == 0 && fgets(text, sizeof text, file));
	CHECK(fclose(file) == 0);
	int directory = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC), fd = openat(directory, "file", O_RDWR | O_CLOEXEC);
	CHECK(directory >= 0 && fd >= 0);
	struct iovec parts[2] = {{text, 10}, {text + 10, 10}};
	CHECK(preadv(fd, parts, 2, 5) == 20 && pwritev(fd, parts, 2, 5) == 20);
	CHECK(pread(fd, text, 10, 0) == 10 && pwrite(fd, text, 10, 0) == 10 && lseek(fd, 0, SEEK_END) > 0);
	CHECK(posix_fallocate(fd, 0, 4096) == 0 && ftruncate(fd, 100) == 0 && fdatasync(fd) == 0 && fsync(fd) == 0);
	CHECK(fstat(fd, &found) == 0 && fstatat(directory, "file", &found, AT_SYMLINK_NOFOLLOW) == 0);
	CHECK(stat("file", &found) == 0 && lstat("file", &found) == 0 && fstatvfs(fd, &space) == 0);
	CHECK(fchmod(fd, 0600) == 0 && fchmodat(directory, "file", 0640, 0) == 0 && chmod("file", 0644) == 0);
	CHECK(fchown(fd, -1, -1) == 0 && fchownat(directory, "file", -1, -1, AT_SYMLINK_NOFOLLOW) == 0);
	CHECK(futimens(fd, times) == 0 && utimensat(directory, "file", times, AT_SYMLINK_NOFOLLOW) == 0);
	CHECK(faccessat(directory, "file", R_OK, 0) == 0 && faccessat(directory, "file", R_OK, AT_EACCESS) == 0);
	CHECK(flock(fd, LOCK_EX) == 0 && lockf(fd, F_LOCK, 0) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	fgetxattr(fd, "user.x", text, sizeof text);
	listxattr("file", text, sizeof text);
	CHECK(mkdirat(directory, "new", 0755) == 0 && symlinkat("there", directory, "link") == 0);
	CHECK(readlinkat(directory, "link", text, sizeof text) == 5);
	CHECK(linkat(directory, "file", directory, "other", 0) == 0);
	CHECK(renameat(directory, "other", directory, "moved") == 0 && mkfifoat(directory, "fifo", 0600) == 0);
	DIR *listing = opendir(".");
	CHECK(listing);
	while (readdir(listing))
		;
	closedir(listing);
	listing = fdopendir(openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	CHECK(listing && readdir(listing));
	closedir(listing);
	CHECK(unlinkat(directory, "moved", 0) == 0 && unlinkat(directory, "link", 0) == 0);
	CHECK(unlinkat(directory, "fifo", 0) == 0 && unlinkat(directory, "new", AT_REMOVEDIR) == 0);
	CHECK(getcwd(path, sizeof path) && realpath("file", path) && unlink("file") == 0);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC && fcntl(fd, F_GETFL) >= 0 && dup2(fd, 50) == 50);
	close(50);
	close(fd);
	close(directory);
	isatty(1);
}

static void waiting(void)
{
	struct epoll_event event = {EPOLLIN};
	int epoll = epoll_create1(EPOLL_CLOEXEC), count = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
	int watch = inotify_init1(IN_CLOEXEC);
	struct pollfd one = {count, POLLIN};
	struct timespec none = {0, 1}, now;
	struct timeval little = {0, 1};
	fd_set set;
	CHECK(epoll >= 0 && count >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, count, &event) == 0);
	CHECK(epoll_wait(epoll, &event, 1, 0) == 1 && poll(&one, 1, 0) == 1 && ppoll(&one, 1, &none, NULL) == 1);
	FD_ZERO(&set);
	FD_SET(count, &set);
	CHECK(select(count + 1, &set, NULL, NULL, &little) == 1);
	CHECK(nanosleep(&none, NULL) == 0 && clock_nanosleep(CLOCK_MONOTONIC, 0, &none, NULL) == 0);
	CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0 && clock_getres(CLOCK_REALTIME, &now) == 0 && time(NULL) > 0);
	CHECK(inotify_add_watch(watch, ".", IN_CREATE) >= 0);
	time_t then = time(NULL);
	CHECK(localtime(&then) && clock() != (clock_t)-1);
}

static void sockets(int pair[2])
{
	char text[10], control[64];
	struct iovec part = {text, sizeof text};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	CHECK(sendmsg(pair[0], &message, MSG_NOSIGNAL) == 10);
	message.msg_control = control;
	message.msg_controllen = sizeof control;
	CHECK(recvmsg(pair[1], &message, MSG_CMSG_CLOEXEC) == 10);
}

static void memory(void)
{
	unsigned char random[32];
	struct rusage usage;
	struct rlimit limit;
	int fd = memfd_create("x", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
	void *map = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED && madvise(map, 1 << 20, MADV_DONTNEED) == 0 && mprotect(map, 4096, PROT_READ) == 0);
	CHECK(munmap(map, 1 << 20) == 0 && getentropy(random, sizeof random) == 0);
	char *big = malloc(1 << 20);
	CHECK(big && (big = realloc(big, 1 << 24)) && sysconf(_SC_NPROCESSORS_ONLN) > 0 && sysconf(_SC_PHYS_PAGES) > 0);
	free(big);
	CHECK(getrusage(RUSAGE_SELF, &usage) == 0 && getrlimit(RLIMIT_NOFILE, &limit) == 0 && getpid() > 0);
	close(fd);
}

int main(void)
{
	struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO};
	struct sigaction other = {.sa_handler = hear};
	int pair[2];
	sigset_t mask;
	pthread_t first;
	filter.program = instructions;
	filter.length = fread(instructions, sizeof *instructions, 4096, stdin);
	CHECK(filter.length > 100 && sigaction(SIGSYS, &action, NULL) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	CHECK(pthread_create(&first, NULL, leave, NULL) == 0 && pthread_join(first, NULL) == 0);
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, 2, &filter, 0, 0) == 0);
	CHECK(sigaction(SIGTERM, &other, NULL) == 0 && sigemptyset(&mask) == 0);
	memory();
	files();
	threads();
	waiting();
	sockets(pair);
	umask(022);
	puts("done");
	return fflush(stdout);
}
"""
COMPILERS = {"musl-gcc": "musl-tools", "gcc": "gcc"}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_program_of_either_c_library_runs_under_the_list(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian package {COMPILERS[compiler]})")
    program = tmp_path / "program"
    subprocess.run(
        [compiler, "-O1", "-w", "-pthread", "-x", "c", "-", "-o", program],
        input=PROGRAM.encode(),
        check=True,
        timeout=60,
    )
    ran = subprocess.run([program], input=seccomp_filter.program("trap"), capture_output=True, cwd=tmp_path, timeout=60)
    said = ran.stderr.decode()
    if said.startswith("syscall "):
        said = f"{seccomp_filter.syscall_name(int(said.split()[1]))} is not on the list"
    assert (said, ran.stdout, ran.returncode) == ("", b"done\n", 0)
