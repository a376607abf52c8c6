"""Tables of nodes and handles: counts as the kernel keeps them, and nothing that a peer claims breaks them."""

import errno
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fusewire.inodes import HandleTable, InodeTable


def fails(number: int, function, *arguments) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number


def test_root_is_node_1_and_stays():
    table = InodeTable("root")
    assert table.get(1) == "root"
    assert table.forget(1, 1 << 63) is None
    assert table.get(1) == "root"
    assert len(table) == 1


def test_each_object_gets_a_number_of_its_own_and_none_is_used_again():
    table = InodeTable("root")
    first, _ = table.enter("a")
    assert table.forget(first, 1) == "a"
    second, _ = table.enter("a")
    assert 1 < first < second


def test_node_lives_until_its_last_lookup_is_forgotten():
    table = InodeTable("root")
    nodeid, _ = table.enter("a", key=7)
    assert table.enter("b", key=7) == (nodeid, "a")
    assert table.lookups(nodeid) == 2
    assert table.forget(nodeid, 1) is None
    assert table.get(nodeid) == "a"
    assert table.forget(nodeid, 1) == "a"
    fails(errno.ESTALE, table.get, nodeid)
    assert table.find(7) == 0


@pytest.mark.parametrize("nodeid", [0, 3, 1 << 63, (1 << 64) - 1])
def test_node_that_does_not_exist_is_stale_and_forgetting_it_does_nothing(nodeid):
    table = InodeTable("root")
    table.enter("a")
    fails(errno.ESTALE, table.get, nodeid)
    assert table.forget(nodeid, 1) is None
    assert table.lookups(nodeid) == 0
    assert len(table) == 2


def test_forgetting_more_than_was_looked_up_ends_the_node_once():
    table = InodeTable("root")
    nodeid, _ = table.enter("a", key=7)
    assert table.forget(nodeid, (1 << 64) - 1) == "a"
    assert table.forget(nodeid, (1 << 64) - 1) is None
    again, _ = table.enter("b", key=7)
    assert table.lookups(again) == 1


def test_detached_node_lives_on_and_its_key_is_free():
    table = InodeTable("root")
    old, _ = table.enter("old", key=7)
    table.detach(old)
    new, kept = table.enter("new", key=7)
    assert new != old
    assert kept == "new"
    assert table.get(old) == "old"
    assert table.forget(old, 1) == "old"
    assert table.find(7) == new
    table.detach(999)


def test_root_can_be_found_by_its_key():
    table = InodeTable("root")
    table.key_root((1, 2))
    assert table.find((1, 2)) == 1
    assert table.enter("again", key=(1, 2)) == (1, "root")
    assert table.drain() == []
    assert table.find((1, 2)) == 1


def test_drain_gives_all_but_the_root():
    table = InodeTable("root")
    table.enter("a", key=1)
    table.enter("b")
    assert table.drain() == ["a", "b"]
    assert len(table) == 1
    assert table.find(1) == 0
    assert table.get(1) == "root"
    assert table.drain() == []


def test_generation_is_what_the_table_was_given():
    assert InodeTable("root").generation == 0
    assert InodeTable("root", generation=5).generation == 5


def test_handle_is_known_until_it_is_removed():
    table = HandleTable()
    first, second = table.add("a"), table.add("b")
    assert first != second
    assert (table.get(first), table.get(second), len(table)) == ("a", "b", 2)
    assert table.remove(first) == "a"
    fails(errno.EBADF, table.get, first)
    fails(errno.EBADF, table.remove, first)
    assert table.add("c") not in (first, second)
    assert sorted(table.drain()) == ["b", "c"]
    assert len(table) == 0


@pytest.mark.parametrize("fh", [0, 2, (1 << 64) - 1])
def test_handle_that_was_never_given_is_ebadf(fh):
    table = HandleTable()
    table.add("a")
    fails(errno.EBADF, table.get, fh)
    fails(errno.EBADF, table.remove, fh)


def test_tables_hold_under_many_threads():
    nodes = InodeTable("root")
    handles = HandleTable()
    ended: list[object] = []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        for step in range(500):
            nodeid, _ = nodes.enter(object(), key=step % 7)
            nodes.get(nodeid)
            handles.remove(handles.add(step))
            if (item := nodes.forget(nodeid, 1)) is not None:
                ended.append(item)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(nodes) == 1
    assert len(handles) == 0
    assert len(set(ended)) == len(ended)
    assert not nodes._by_key


class Nodes(RuleBasedStateMachine):
    """The table against a model of it, under any claims of a peer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = InodeTable("root")
        self.counts: dict[int, int] = {}
        self.keys: dict[int, int] = {}
        self.serial = 0

    @rule(key=st.none() | st.integers(0, 3))
    def enter(self, key):
        self.serial += 1
        nodeid, item = self.table.enter(self.serial, key)
        if key in self.keys:
            assert nodeid == self.keys[key]
        else:
            assert nodeid not in self.counts
            assert item == self.serial
            if key is not None:
                self.keys[key] = nodeid
        self.counts[nodeid] = self.counts.get(nodeid, 0) + 1

    @rule(nodeid=st.integers(0, 12), nlookup=st.integers(0, 4) | st.just((1 << 64) - 1))
    def forget(self, nodeid, nlookup):
        item = self.table.forget(nodeid, nlookup)
        if nodeid in self.counts:
            self.counts[nodeid] -= nlookup
            if self.counts[nodeid] <= 0:
                assert item is not None
                del self.counts[nodeid]
                self.keys = {key: node for key, node in self.keys.items() if node != nodeid}
                return
        assert item is None

    @rule(nodeid=st.integers(0, 12))
    def detach(self, nodeid):
        self.table.detach(nodeid)
        self.keys = {key: node for key, node in self.keys.items() if node != nodeid}

    @invariant()
    def same(self):
        assert len(self.table) == len(self.counts) + 1
        assert {node: self.table.lookups(node) for node in self.counts} == self.counts
        assert all(self.table.find(key) == node for key, node in self.keys.items())
        assert {key: node[3] for key, node in self.table._by_key.items()} == self.keys


TestNodes = Nodes.TestCase
TestNodes.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
