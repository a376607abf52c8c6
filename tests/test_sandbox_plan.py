"""What a sandbox's plan says: the steps and their order, what is refused, what is noted; nothing is entered."""

from __future__ import annotations

import errno

import pytest

from fusewire.linux import capabilities as caps
from fusewire.linux import sandbox, sandbox_plan, syscalls


def plan(mode: str, effective: int = 0, euid: int = 1000, **named: object) -> sandbox_plan.Plan:
    named.setdefault("shared", b"/srv")
    named.setdefault("landlock_abi", 7)
    rights = syscalls.Capabilities(effective, effective, 0)
    return sandbox.plan(mode, euid=euid, egid=euid, capabilities=rights, **named)  # type: ignore[arg-type]


def names(found: sandbox_plan.Plan) -> list[str]:
    return [step.name for step in found.steps]


def test_plan_is_a_list_of_steps_in_an_order_that_keeps_its_promises() -> None:
    order = names(plan("namespace"))
    for before, after in (
        ("imports", "wait"),
        ("limits", "wait"),
        ("wait", "namespaces"),
        ("namespaces", "ids"),
        ("ids", "groups"),
        ("descriptors", "root"),
        ("proc", "root"),
        ("modules", "root"),
        ("root", "capabilities"),
        ("no_new_privs", "landlock"),
        ("ids", "parent"),
        ("capabilities", "seccomp"),
    ):
        assert order.index(before) < order.index(after), (before, after)
    assert order[-1] == "seccomp"


def test_every_step_is_explained_in_a_line() -> None:
    for mode, effective in (("namespace", 0), ("namespace", caps.ALL), ("chroot", caps.ALL), ("none", 0)):
        for shared in (b"/srv", None):
            found = plan(mode, effective, shared=shared)
            text = found.describe().splitlines()
            assert text[0].startswith(f"sandbox: {mode}")
            assert len(text) == 1 + len(found.steps) + len(found.notes)
            assert all(step.what and step.why and "\n" not in step.what + step.why for step in found.steps)


def test_every_step_has_an_action() -> None:
    from fusewire.linux import sandbox_enter

    planned = {
        name for mode in sandbox.MODES for uid in (0, 1) for name in names(plan(mode, caps.ALL * (1 - uid) or 1 << 18))
    }
    assert planned == set(sandbox_enter._ACTIONS)


def test_user_namespace_is_for_who_has_no_sys_admin() -> None:
    assert plan("namespace").uids == (sandbox.IdMap(1000, 1000),)
    assert not plan("namespace").helpers
    assert not plan("namespace", caps.ALL, 0).new_user
    assert plan("namespace", uid_map=[(0, 1000, 1), (1, 100000, 65536)]).helpers
    assert plan("namespace", 1 << syscalls.CAP_SYS_CHROOT, 0).new_user


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ({"mode": "jail"}, "there is no sandbox 'jail'"),
        ({"landlock": "yes"}, "landlock is auto, require or off"),
        ({"mode": "chroot", "uid_map": [(0, 1000, 1)], "effective": caps.ALL}, "are for the user namespace"),
        ({"uid_map": [(0, 1000, 1)], "effective": caps.ALL}, "root makes no user namespace"),
        ({"uid_map": [(0, 1000, 2), (1, 5000, 1)]}, "inside of the namespace, id 1 is in two ranges"),
        ({"gid_map": [(0, 1000, 2), (9, 1001, 1)]}, "outside of the namespace, id 1001 is in two ranges"),
        ({"modcaps": "+sys_admin", "mode": "none"}, "may not keep sys_admin"),
        ({"modcaps": "+foo"}, "'foo' is no capability"),
        ({"modcaps": "-dac_read_search", "handles": True}, "drops what file handles take"),
    ],
)
def test_options_that_make_no_sense_are_named(named: dict[str, object], complaint: str) -> None:
    mode = str(named.pop("mode", "namespace"))
    with pytest.raises(ValueError, match=complaint):
        plan(mode, **named)  # type: ignore[arg-type]


def test_landlock_is_used_where_it_costs_no_function() -> None:
    assert plan("none").landlock == 7
    assert plan("none", landlock="off").landlock == 0
    assert not plan("none", landlock="off").confined
    assert plan("none", landlock_abi=1).landlock == 0
    assert plan("none", landlock_abi=1, writable=False).landlock == 1
    assert plan("none", landlock_abi=1, shared=None).landlock == 1
    assert plan("chroot", caps.ALL, handles=True).landlock == 0
    for named in ({"landlock_abi": 0}, {"landlock_abi": 1}, {"handles": True}):
        with pytest.raises(sandbox_plan.SandboxError, match="--landlock require"):
            plan("none", landlock="require", **named)


def test_auto_goes_down_the_modes_until_one_works() -> None:
    refusal = sandbox_plan.SandboxError(errno.EPERM, "not here", "", "namespaces")

    def attempt(works: str) -> object:
        return lambda found: None if found.mode == works else refusal

    assert plan("auto", attempt=attempt("namespace")).refused == []
    found = plan("auto", caps.ALL, attempt=attempt("chroot"))
    assert (found.mode, found.refused) == ("chroot", [("namespace", "not here")])
    assert found.summary() == "sandbox: chroot with Landlock (ABI 7); not namespace: not here"
    found = plan("auto", attempt=attempt("none"))
    assert [mode for mode, _ in found.refused] == ["namespace", "chroot"]
    assert "CAP_SYS_CHROOT" in found.refused[1][1]
    with pytest.raises(sandbox_plan.SandboxError, match="no sandbox can be had: namespace: not here; --uid-map and"):
        plan("auto", attempt=attempt("none"), uid_map=[(0, 1000, 1)])


def test_what_is_lost_is_noted() -> None:
    assert any("chroot is less than namespace" in note for note in plan("chroot", caps.ALL).notes)
    assert any("lies outside of the root" in note for note in plan("chroot", caps.ALL, landlock="off").notes)
    assert any("not confined" in note for note in plan("none", landlock="off").notes)
    assert any("not there to keep: chown" in note for note in plan("none").notes)
    assert any("file handles" in note for note in plan("namespace", caps.ALL, handles=True).notes)
    assert plan("namespace", caps.ALL).notes == []
