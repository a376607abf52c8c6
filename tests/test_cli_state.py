from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import rootless
from fusewire.cli import listing, private, state
from fusewire.cli.control import ControlServer, control
from fusewire.cli.state import Store
from fusewire.linux import process, syscalls


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return str(path)


@pytest.fixture
def store(root):
    return Store([root])


def dead_pid():
    child = os.fork()
    if child == 0:
        os._exit(0)
    start = process.start_time(child)
    os.waitpid(child, 0)
    return child, start


@pytest.fixture
def sleeper():
    """A process that lives until the test ends."""
    child = subprocess.Popen(["sleep", "600"])
    yield child
    child.kill()
    child.wait()


# --- where


def test_state_lives_below_xdg_runtime_dir_if_it_is_a_directory_of_the_user(tmp_path):
    found = private.roots({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert found[0] == f"{tmp_path}/fusewire"
    assert f"/tmp/fusewire-{os.geteuid()}" in found


@pytest.mark.parametrize("value", ["", "relative", "/nowhere/at/all", "/etc/passwd"])
def test_state_lives_in_tmp_if_xdg_runtime_dir_is_useless(value):
    assert private.roots({"XDG_RUNTIME_DIR": value})[0] == f"/tmp/fusewire-{os.geteuid()}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_state_lives_in_tmp_if_xdg_runtime_dir_belongs_to_somebody_else(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    assert private.roots({"XDG_RUNTIME_DIR": str(tmp_path)})[0] == "/tmp/fusewire-0"


def test_root_is_made_private(tmp_path):
    old = os.umask(0)
    try:
        Store([f"{tmp_path}/new"]).create("a", "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.lstat(f"{tmp_path}/new").st_mode) == 0o700


def test_root_that_is_a_symlink_is_refused_and_nothing_is_put_behind_it(tmp_path):
    os.mkdir(f"{tmp_path}/behind", 0o700)
    os.symlink("behind", f"{tmp_path}/root")
    with pytest.raises(OSError, match=r"it is a symlink; remove it, or set XDG_RUNTIME_DIR") as caught:
        Store([f"{tmp_path}/root"]).create("a", "b")
    assert caught.value.filename == f"{tmp_path}/root"
    assert os.listdir(f"{tmp_path}/behind") == []


def test_root_that_is_a_file_or_open_to_others_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        Store([f"{tmp_path}/file"]).create("a", "b")
    os.mkdir(f"{tmp_path}/open")
    os.chmod(f"{tmp_path}/open", 0o750)
    with pytest.raises(OSError, match=r"mode 750.*set XDG_RUNTIME_DIR"):
        Store([f"{tmp_path}/open"]).load_all()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_root_of_somebody_else_is_refused(tmp_path):
    os.mkdir(f"{tmp_path}/foreign", 0o700)
    os.chown(f"{tmp_path}/foreign", 12345, 12345)
    with pytest.raises(OSError, match="belongs to user 12345"):
        Store([f"{tmp_path}/foreign"]).create("a", "b")


# --- records


def test_record_comes_back_as_it_was_saved(store, tmp_path):
    odd = b"\xff\n\xe4".decode(errors="surrogateescape")
    record = store.create(f"{tmp_path}/{odd}", f"{tmp_path}/t", strategy="namespace", options=["ro", odd])
    record.outside = "/proc/1/fd/7"
    record.inside = record.mount_point
    record.created = {"kind": "empty-directory", "mode": 0o755}
    record.mount = {"strategy": "namespace", "created": False, "mount_id": 7}
    store.save(record)
    (found,), problems = store.load_all()
    assert problems == []
    assert found.as_dict() == record.as_dict()
    assert found.directory == record.directory
    assert (found.pid, found.starttime) == (os.getpid(), process.start_time(os.getpid()))
    assert os.listdir(found.mount_point) == []
    assert stat.S_IMODE(os.stat(found.directory).st_mode) == 0o700
    assert sorted(os.listdir(found.directory)) == ["mnt", "state.json"]


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert Store([f"{tmp_path}/missing"]).load_all() == ([], [])


def test_records_of_all_roots_are_found_oldest_first(tmp_path):
    first, second = f"{tmp_path}/1", f"{tmp_path}/2"
    new = Store([first]).create("a", "a")
    old = Store([second]).create("b", "b", mounted_at=1.0)
    records, _ = Store([first, second]).load_all()
    assert [record.id for record in records] == [old.id, new.id]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "half written"),
        (b'{"version": 1, "id"', "half written"),
        (b"\xff\xfe\x00", "half written"),
        (b"[" * 100000, "half written"),
        (b"[1]", "not a record"),
        (b'{"version": 99}', "another version"),
        (b'{"version": 1}', "not the record of"),
        (b'{"version": 1, "id": "other", "source": "x", "options": []}', "not the record of"),
        (b'{"version": 1, "id": "broken", "source": "x", "pid": "1"}', "pid is '1'"),
        (b'{"version": 1, "id": "broken", "source": "x", "pid": true}', "pid is True"),
        (b'{"version": 1, "id": "broken", "source": "x", "options": [1]}', "not the record of"),
    ],
)
def test_unreadable_record_is_reported_and_the_others_are_loaded(store, root, content, reason):
    good = store.create("a", "b")
    os.mkdir(f"{root}/broken", 0o700)
    with open(f"{root}/broken/state.json", "wb") as file:
        file.write(content)
    (found,), (problem,) = store.load_all()
    assert found.id == good.id
    assert problem.id == "broken"
    assert reason in problem.reason
    assert str(problem).startswith(f"{root}/broken: ")
    store.remove(problem)
    assert os.listdir(root) == [good.id]


def test_things_that_are_no_records_are_reported(store, root, tmp_path):
    os.mkdir(f"{root}/empty")
    (tmp_path / "state" / "file").write_text("x")
    os.symlink("/etc", f"{root}/link")
    os.mkdir(f"{root}/fifo")
    os.mkfifo(f"{root}/fifo/state.json")
    os.mkdir(f"{root}/linked")
    os.symlink("/etc/passwd", f"{root}/linked/state.json")
    records, problems = store.load_all()
    assert records == []
    assert [problem.id for problem in problems] == ["empty", "fifo", "file", "link", "linked"]


def test_reader_never_sees_a_half_written_record(store):
    record = store.create("a", "b")
    record.options = ["x" * 1000] * 100
    stop = threading.Event()

    def write():
        while not stop.is_set():
            store.save(record)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            records, problems = store.load_all()
            assert [r.id for r in records] == [record.id]
            assert problems == []
    finally:
        stop.set()
        writer.join()


def test_create_in_a_directory_without_permission_names_it_and_the_way_out():
    code = (
        "from fusewire.cli.state import Store\n"
        "try: Store(['/etc/fusewire']).create('a', 'b')\n"
        "except PermissionError as error: print(error.filename, error.strerror)"
    )
    found = subprocess.check_output([*rootless.rootless_python(), "-c", code], text=True)
    assert found.startswith("/etc/fusewire ")
    assert "set XDG_RUNTIME_DIR" in found


@pytest.fixture
def full_root(tmp_path):
    """A private directory on a filesystem of one page and few inodes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    path = tmp_path / "small"
    path.mkdir()
    syscalls.mount(b"small", os.fsencode(path), b"tmpfs", 0, b"size=4k,nr_inodes=16,mode=700")
    yield str(path)
    syscalls.umount2(os.fsencode(path))


def test_full_filesystem_leaves_nothing_behind_and_the_old_record_stays(full_root):
    store = Store([full_root])
    record = store.create("a", "b")
    record.options = ["x" * 10000]
    with pytest.raises(OSError, match=r"No space left on device; set XDG_RUNTIME_DIR") as caught:
        store.save(record)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(record.directory)) == ["mnt", "state.json"]
    with pytest.raises(OSError, match="No space left on device"):
        store.create("a" * 5000, "b")
    assert os.listdir(full_root) == [record.id]
    assert store.load_all()[0][0].options == []


def test_no_inodes_left_leaves_nothing_behind(full_root):
    store = Store([full_root])
    kept = []
    with pytest.raises(OSError, match="No space left on device"):
        while True:
            kept.append(store.create("a", "b").id)
    assert sorted(os.listdir(full_root)) == sorted(kept)


# --- alive, find, remove


def test_alive_means_the_same_pid_and_the_same_start(store, sleeper):
    record = store.create("a", "b")
    record.served_by(sleeper.pid)
    assert state.alive(record)
    record.starttime -= 1
    assert not state.alive(record)
    record.pid, record.starttime = dead_pid()
    assert not state.alive(record)


def test_zombie_is_dead_and_has_no_mount(store):
    record = store.create("a", "b")
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    record.served_by(child.pid)
    assert not state.alive(record)
    child.wait()
    with pytest.raises(ProcessLookupError):
        record.served_by(dead_pid()[0])


def test_pid_of_another_pid_namespace_is_not_believed_but_the_socket_is(store):
    record = store.create("a", "b")
    record.pid, record.starttime = dead_pid()
    record.pidns += 1
    assert not state.alive(record)
    server = ControlServer(record.control, {})
    assert state.alive(record)
    server.close()
    assert not state.alive(record)


def test_mount_is_found_by_target_id_pid_and_by_paths_that_lead_to_it(store, tmp_path, monkeypatch, sleeper):
    os.mkdir(f"{tmp_path}/real")
    os.symlink("real", f"{tmp_path}/alias")
    record = store.create("img", f"{tmp_path}/alias/env/")
    assert record.target == f"{tmp_path}/real/env"
    record.outside = "/proc/77/fd/9"
    record.served_by(sleeper.pid)
    store.save(record)
    os.symlink("/proc/77/fd/999999", f"{tmp_path}/real/env")  # what a dead mount leaves
    monkeypatch.chdir(f"{tmp_path}/real")
    for name in ("env", "env/", "./env", f"{tmp_path}/alias/env", "/proc/77/fd/9", record.id, str(sleeper.pid)):
        found = store.find(name)
        assert found is not None, name
        assert found.id == record.id
    for name in ("other", "/", ".", "..", "0", "", "-1", "²"):
        assert store.find(name) is None


def test_living_mount_is_found_before_dead_ones_at_the_same_target(store, tmp_path):
    target = f"{tmp_path}/t"
    living = store.create("a", target, mounted_at=5.0)
    for at in (1.0, 9.0):
        dead = store.create("a", target, mounted_at=at)
        dead.pid, dead.starttime = dead_pid()
        store.save(dead)
    assert store.find(target).id == living.id
    store.remove(living)
    assert store.find(target).mounted_at == 9.0


def test_relative_name_in_a_directory_without_a_path_says_so(tmp_path):
    os.mkdir(f"{tmp_path}/gone")
    code = (
        f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir({str(tmp_path / 'gone')!r})\n"
        "from fusewire.cli import state\n"
        "assert state.place('/a/b') == '/a/b'\n"
        "try: state.place('b')\n"
        "except FileNotFoundError as error: print(error)"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "give an absolute path" in found


def test_remove_takes_what_is_ours_and_nothing_else(store, root, tmp_path):
    record = store.create("a", "b")
    ControlServer(record.control, {}).start()
    open(f"{record.directory}/state.json.1234", "w").close()
    (tmp_path / "precious").write_text("x")
    os.symlink(f"{tmp_path}/precious", f"{record.directory}/link")
    with pytest.raises(OSError, match="not Fusewire's") as caught:
        store.remove(record)
    assert caught.value.errno == errno.ENOTEMPTY
    assert os.listdir(record.directory) == ["link"]
    os.unlink(f"{record.directory}/link")
    store.remove(record)
    assert os.listdir(root) == []
    assert (tmp_path / "precious").read_text() == "x"
    store.remove(record)


def test_remove_follows_no_symlink(store, root, tmp_path):
    record = store.create("a", "b")
    os.rename(record.directory, f"{tmp_path}/elsewhere")
    os.symlink(f"{tmp_path}/elsewhere", record.directory)
    with pytest.raises(OSError, match="cannot remove the state"):
        store.remove(record)
    assert sorted(os.listdir(f"{tmp_path}/elsewhere")) == ["mnt", "state.json"]
    os.unlink(record.directory)
    other = store.create("a", "b")
    os.rmdir(other.mount_point)
    os.symlink(str(tmp_path), other.mount_point)
    with pytest.raises(OSError, match="not Fusewire's"):
        store.remove(other)
    assert os.path.lexists(other.mount_point)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_remove_is_refused_while_something_is_mounted(store):
    record = store.create("a", "b")
    syscalls.mount(b"x", os.fsencode(record.mount_point), b"tmpfs", 0)
    try:
        with pytest.raises(OSError, match="still mounted") as caught:
            store.remove(record)
    finally:
        syscalls.umount2(os.fsencode(record.mount_point))
    assert caught.value.errno == errno.EBUSY
    assert os.path.exists(f"{record.directory}/state.json")
    store.remove(record)


# --- the control socket


@pytest.fixture
def server(tmp_path):
    def fail(request):
        raise OSError(errno.EBUSY, "in use")

    def bug(request):
        return {"x": 1 // 0}

    server = ControlServer(
        f"{tmp_path}/control.sock",
        {"status": lambda request: {"requests": 3}, "echo": lambda r: {"got": r}, "umount": fail, "bug": bug},
    )
    server.start()
    yield server
    server.close()


def test_control_gives_the_handlers_answer(server):
    assert control(server.path, {"command": "status"}) == {"ok": True, "requests": 3}
    assert control(server.path, {"command": "echo", "lazy": True})["got"] == {"command": "echo", "lazy": True}
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600


def test_control_gives_the_handlers_failure(server):
    assert control(server.path, {"command": "umount"}) == {"ok": False, "error": "in use", "errno": errno.EBUSY}
    assert "ZeroDivisionError" in control(server.path, {"command": "bug"})["error"]
    assert "known are bug, echo" in control(server.path, {"command": "nonsense"})["error"]
    assert control(server.path, {"command": "status"})["ok"]


def raw(server, data, half_close=True):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(server.path)
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize("data", [b"\n", b"garbage\n", b"[]\n", b"\xff\n", b"[" * 60000 + b"\n", b"3\n", b"a" * 65536])
def test_garbage_gets_an_answer_and_harms_nobody(server, data):
    answer = json.loads(raw(server, data))
    assert not answer["ok"]
    assert control(server.path, {"command": "status"})["ok"]


def test_endless_line_is_cut_off(server):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(server.path)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                sock.sendall(b"a" * 65536)
    assert control(server.path, {"command": "status"})["ok"]


def test_request_in_pieces_and_half_requests_are_understood(server):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(server.path)
        for byte in b'{"command": "status"}\n':
            sock.send(bytes((byte,)))
        assert json.loads(sock.recv(65536)) == {"ok": True, "requests": 3}
    assert raw(server, b'{"command"') == b""


def test_silent_clients_do_not_keep_others_waiting(server):
    silent = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    try:
        for sock in silent:
            sock.connect(server.path)
        began = time.monotonic()
        assert control(server.path, {"command": "status"}, 4.0)["ok"]
        assert time.monotonic() - began < 4
    finally:
        for sock in silent:
            sock.close()


def test_silent_client_is_dropped_after_a_while(server, monkeypatch):
    monkeypatch.setattr("fusewire.cli.control._PATIENCE", 0.05)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(server.path)
        assert sock.recv(1) == b""


def test_long_path_is_no_obstacle(tmp_path):
    deep = tmp_path
    for _ in range(5):
        deep = deep / ("d" * 50)
    deep.mkdir(parents=True)
    server = ControlServer(str(deep / "control.sock"), {"status": lambda request: {}})
    server.start()
    try:
        assert len(server.path) > 250
        assert control(server.path, {"command": "status"}) == {"ok": True}
    finally:
        server.close()
    assert os.listdir(deep) == []


def test_server_that_is_gone_hung_or_dying_is_told_apart(tmp_path):
    path = f"{tmp_path}/control.sock"
    with pytest.raises(FileNotFoundError, match="the server is gone"):
        control(path, {})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        with pytest.raises(ConnectionRefusedError, match="the server is gone"):
            control(path, {})
        listener.listen(1)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            control(path, {}, 0.05)
        held = [listener.accept()[0]]

        def end_without_answer():
            listener.accept()[0].close()

        thread = threading.Thread(target=end_without_answer)
        thread.start()
        with pytest.raises(ConnectionResetError):
            control(path, {}, 20)
        thread.join()
        held[0].close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_refused_and_root_is_not(tmp_path):
    """The server is nobody's; root asks, then another user whom the directory lets through."""
    path = f"{rootless.rootless_home()}/control.sock"
    code = (
        "import os, sys; from fusewire.cli.control import ControlServer\n"
        f"server = ControlServer({path!r}, {{'status': lambda request: {{'uid': os.geteuid()}}}}); server.start()\n"
        f"os.chmod({path!r}, 0o666); print('up', flush=True); sys.stdin.read(); server.close()"
    )
    words = [*rootless.rootless_python(), "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        assert control(path, {"command": "status"}) == {"ok": True, "uid": 65534}
        ask = f"from fusewire.cli.control import control; print(control({path!r}, {{'command': 'status'}}))"
        stranger = subprocess.check_output([*rootless.rootless_python(12345), "-c", ask], text=True)
        child.stdin.close()
        assert child.wait() == 0
    assert "user 12345 may not control a mount of user 65534" in stranger
    assert not os.path.exists(path)


def test_answer_is_given_before_close_returns(tmp_path):
    """Unmounting ends the server: who asked for it must still get the answer."""
    ended = threading.Event()

    def umount(request):
        ended.set()
        return {"done": True}

    server = ControlServer(f"{tmp_path}/control.sock", {"umount": umount})
    server.start()
    answers = []
    asker = threading.Thread(target=lambda: answers.append(control(server.path, {"command": "umount"})))
    asker.start()
    assert ended.wait(20)
    server.close()
    asker.join()
    assert answers == [{"ok": True, "done": True}]
    assert not os.path.exists(server.path)


def test_full_queue_of_a_hung_server_is_waited_for_no_longer_than_asked(tmp_path):
    path = f"{tmp_path}/control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
                control(path, {}, 0.1)
            assert time.monotonic() - began >= 0.1
            listener.accept()[0].close()


def test_server_leaves_no_descriptor_and_no_thread_behind(tmp_path):
    def descriptors():
        return sorted(
            os.readlink(f"/proc/self/fd/{fd}") for fd in process.open_fds() if os.path.exists(f"/proc/self/fd/{fd}")
        )

    before, threads = len(descriptors()), threading.active_count()
    for index in range(3):
        server = ControlServer(f"{tmp_path}/{index}", {})
        if index:
            server.start()
            control(server.path, {})
        server.close()
        server.close()
    with pytest.raises(OSError, match="cannot make the control socket"):
        ControlServer(f"{tmp_path}/missing/control.sock", {})
    assert len(descriptors()) == before
    assert threading.active_count() == threads


# --- list


@pytest.fixture
def three_mounts(store, tmp_path, sleeper):
    """One that answers, one that is dead, one whose server is stopped."""
    live = store.create("/images/live.sqsh", f"{tmp_path}/live", strategy="direct", mounted_at=time.time() - 100)
    server = ControlServer(live.control, {"status": lambda request: {"requests": 1234}})
    server.start()
    dead = store.create("/images/dead.sqsh", f"{tmp_path}/de ad\n", strategy="namespace")
    dead.pid, dead.starttime = dead_pid()
    store.save(dead)
    hung = store.create("/images/hung.sqsh", f"{tmp_path}/hung", strategy="namespace")
    hung.outside = f"/proc/{sleeper.pid}/fd/5"
    hung.served_by(sleeper.pid)
    store.save(hung)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(hung.control)
    listener.listen(1)
    os.mkdir(f"{store.roots[0]}/rubbish", 0o700)
    yield live, dead, hung
    listener.close()
    server.close()


def test_list_says_of_each_mount_how_it_is(store, three_mounts, capsys):
    live, dead, hung = three_mounts
    assert listing.list_mounts(json=True, store=store) == 0
    out, err = capsys.readouterr()
    rows = {row["id"]: row for row in json.loads(out) if row["id"]}
    assert rows[live.id]["state"] == "serving"
    assert rows[live.id]["requests"] == 1234
    assert 90 < rows[live.id]["uptime"] < 1000
    assert rows[live.id]["path"] == live.target
    assert rows[dead.id]["state"] == "dead"
    assert rows[dead.id]["uptime"] is None
    assert rows[hung.id]["state"] == "no answer"
    assert rows[hung.id]["path"] == hung.outside
    assert rows[hung.id]["pid"] == hung.pid
    assert "rubbish" in err


def test_list_for_people_keeps_one_line_per_mount(store, three_mounts, capsys):
    assert listing.list_mounts(json=False, store=store) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["SOURCE", "TARGET"]
    assert sum("/images/" in line for line in lines) == 3
    assert any(r"de ad\n" in line and "dead" in line for line in lines)
    assert any("no answer" in line for line in lines)
    assert any(re.search(r"serving.*\b1234\b", line) for line in lines)


def test_list_of_nothing_says_so_and_is_valid_json(tmp_path, capsys):
    store = Store([f"{tmp_path}/none"])
    listing.list_mounts(json=True, store=store)
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_fuse_mount_without_a_record_is_listed_as_unknown_even_if_it_hangs(store, tmp_path, capsys):
    if os.geteuid() != 0:
        pytest.skip("only root can mount here")
    target = tmp_path / "mystery"
    target.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fd
    syscalls.mount(b"/images/x.sqsh", os.fsencode(target), b"fuse.fusewire", 0, data)
    try:  # nobody serves it: whoever looks into it waits for ever
        listing.list_mounts(json=True, store=store)
        rows = [row for row in json.loads(capsys.readouterr().out) if row["target"] == str(target)]
        assert rows[0]["state"] == "unknown"
        assert rows[0]["source"] == "/images/x.sqsh"
        store.create("/images/x.sqsh", str(target))
        listing.list_mounts(json=True, store=store)
        rows = [row for row in json.loads(capsys.readouterr().out) if row["target"] == str(target)]
        assert [row["state"] for row in rows] != ["unknown"]
        assert len(rows) == 1
    finally:
        os.close(fd)
        syscalls.umount2(os.fsencode(target), syscalls.MNT_DETACH)


def test_output_survives_names_that_are_not_utf8(store, tmp_path, monkeypatch):
    store.create(b"/images/\xff.sqsh".decode(errors="surrogateescape"), f"{tmp_path}/x")
    raw_output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw_output, encoding="utf-8"))
    listing.list_mounts(json=False, store=store)
    sys.stdout.flush()
    assert b"/images/\\xff.sqsh" in raw_output.getvalue()
